"""A small geometry that has every cache of a model: what a probe fills quickly."""

import numpy as np

from dsv4_rt.memory import Cache, KVLayout, KVPool, Part

U8 = np.dtype(np.uint8)
WORD = (Part("data", U8, (8,)), Part("scale", U8, (8,), 1))  # an entry of 16 B in two segments of the page
ROW = (Part("kv", U8, (8,)), Part("score", U8, (8,)))  # state rows are one piece of memory


def small_layout(max_draft=0):
    """Every cache of a model, in three layers (window only, CSA, HCA) and 16 B an entry: what a probe fills quickly."""
    return KVLayout(
        "small",
        (
            Cache("csa", "full", 4, 64, WORD, 16, (1,)),
            Cache("index", "full", 4, 64, WORD, 16, (1,)),
            Cache("hca", "full", 128, 2, WORD, 16, (2,)),
            Cache("window", "window", 1, 64, WORD, 16, (0, 1, 2)),
            Cache("csa_state", "state", 1, 8 + max_draft, ROW, 16, (1,)),
            Cache("index_state", "state", 1, 8 + max_draft, ROW, 16, (1,)),
            Cache("hca_state", "state", 1, 128 + max_draft, ROW, 16, (2,)),
            Cache("csa_checkpoint", "checkpoint", 1, 4, ROW, 16, (1,), "csa_state"),
            Cache("index_checkpoint", "checkpoint", 1, 4, ROW, 16, (1,), "index_state"),
        ),
    )


def small_pool(**options):
    """A pool of the small layout; every size may be overridden."""
    sizes = {
        "pages": 32,
        "window_pages": 64,
        "checkpoints": 8,
        "max_sequences": 8,
        "max_length": 4096,
        "max_in_flight": 768,
        "max_tokens": 1024,
        "max_draft": 0,
        "checkpoint_every": 512,
    } | options
    return KVPool(small_layout(sizes["max_draft"]), **sizes)
