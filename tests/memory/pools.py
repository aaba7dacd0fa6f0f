"""Small pools for tests, and a fingerprint of everything that a refused call must leave alone."""

import collections
import dataclasses

import numpy as np
from storages import few_layers

from dsv4_rt import FLASH
from dsv4_rt.memory import KVLayout, KVPool

SIZES = {
    "pages": 40,
    "window_pages": 64,
    "checkpoints": 6,
    "max_sequences": 6,
    "max_length": 4096,
    "max_in_flight": 600,
    "max_tokens": 1500,
    "checkpoint_every": 512,
}


def small_layout(max_draft=0, record="v4", index="nvfp4"):
    """FLASH with one layer a cache."""
    return few_layers(KVLayout.for_model(FLASH, record, index, max_draft), 1)


def small_pool(max_draft=0, **changes):
    return KVPool(small_layout(max_draft), max_draft=max_draft, **{**SIZES, **changes})


def tokens(rng, n, vocabulary=129_280):
    return rng.integers(0, vocabulary, n, dtype=np.int32)


def prefill(pool, seq, length, checkpoints=True):
    """Extend to `length` in chunks, each uploaded; with `checkpoints`, chunks end where one can be taken."""
    while (n := pool.length(seq)) < length:
        stop = min(length, n + pool.max_in_flight)
        if checkpoints and n < pool.next_checkpoint(seq) < stop:
            stop = pool.next_checkpoint(seq)
        pool.extend(seq, stop - n)
        pool.upload()


def mapping(pool, cache):
    """A slot mapping of the device, as NumPy has it, after an upload."""
    return pool.device.numpy(pool.slot_mapping(cache))


def table(pool, cache):
    return pool.device.numpy(pool.block_table(cache))


def expected_slots(pool, cache, row, positions):
    """Slots of positions of a row, one by one, from the block table alone."""
    c = pool.layout.cache(cache)
    pages = table(pool, cache)[row]
    slots = []
    for p in positions:
        if (p + 1) % c.ratio:
            slots.append(-1)
        else:
            column = p // 256 if c.life == "full" else p // 64 % pages.size
            slots.append(int(pages[column]) * c.entries + p // c.ratio % c.entries)
    return slots


def fingerprint(pool):
    """All of a pool's books, block tables, marks and pending copies, comparable; no scratch memory, no contents."""
    seen = set()

    def flat(value):
        if isinstance(value, np.ndarray):
            return value.dtype.str, value.shape, value.tobytes()
        if isinstance(value, (int, float, str, bytes, bool, type(None), np.generic)):
            return value
        if isinstance(value, (list, tuple, collections.deque)):
            return [flat(v) for v in value]
        if isinstance(value, dict):
            return [(flat(k), flat(v)) for k, v in value.items()]
        if type(value).__module__.startswith("dsv4_rt.memory") and id(value) not in seen:
            seen.add(id(value))
            fields = vars(value) if not dataclasses.is_dataclass(value) else dataclasses.asdict(value)
            return [(name, flat(v)) for name, v in sorted(fields.items()) if name not in ("_mark", "_scratch")]
        return None

    tables = pool._tables
    return [
        flat(getattr(pool, name)) for name in ("_seqs", "_lives", "_copies", "_prefix", "_step", "_epoch", "_open")
    ] + [
        flat(pool._ledger.staged),
        flat(tables._mirror),
        flat(tables._singles[: tables._count]),
        flat(tables._runs),
        flat(dataclasses.asdict(pool.stats())),
    ]
