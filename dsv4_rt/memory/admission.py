"""How much memory a sequence takes, and how much there is: needs, sizes of a pool from a budget of bytes.

Window pages of a step that brings a sequence from n to m tokens: from the page of the earliest position that its
queries see, n - 127, to the page of m - 1. With drafts, positions that a truncated sequence may still have to see,
down to max_draft tokens before its longest length, stay too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from dsv4_rt.device import Device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.memory.layout import FULL_TOKENS, LIVES, WINDOW_TOKENS, KVLayout

WINDOW = 128  # positions a query sees: its own and 127 before


@dataclass(frozen=True)
class Need:
    """Pages and slots by life cycle, new ones: what is shared with the prefix cache is not counted."""

    full: int
    window: int
    state: int
    checkpoint: int  # wanted, never required: without a free slot the checkpoint is not taken


def window_width(max_in_flight: int) -> int:
    """Columns of the window's ring: ceil((128 + max_in_flight) / 64) + 1."""
    return -(-(WINDOW + max_in_flight) // WINDOW_TOKENS) + 1


def need(length: int, cached: int, chunk: int, max_draft: int, checkpoint_every: int) -> Need:
    """The most pages that a sequence holds newly at any moment while it grows from `cached` to `length` tokens.

    `cached` tokens (a multiple of 256) come from the prefix cache with their pages and the 2 window pages before them.
    Chunks of `chunk` tokens, each computed before the next is reserved.
    """
    n = np.arange(cached, length, chunk) if length > cached else np.array([cached])
    m = np.minimum(n + chunk, length)
    low = np.maximum(0, np.minimum(n, m - max_draft) - (WINDOW - 1)) // WINDOW_TOKENS
    window = -(-m // WINDOW_TOKENS) - np.maximum(low, cached // WINDOW_TOKENS)
    boundaries = length // checkpoint_every - cached // checkpoint_every
    end = length // FULL_TOKENS * FULL_TOKENS
    boundaries += end > cached and end % checkpoint_every != 0
    return Need(
        full=-(-length // FULL_TOKENS) - cached // FULL_TOKENS,
        window=int(window.max()) if length > cached else 0,
        state=1,
        checkpoint=int(boundaries),
    )


def counts_for(
    layout: KVLayout,
    *,
    budget: int | None,
    pages: int | None,
    window_pages: int | None,
    checkpoints: int | None,
    state_slots: int,
    max_sequences: int,
    max_tokens: int,
    checkpoint_every: int,
    steps_in_flight: int,
) -> dict[str, int]:
    """Pages by life cycle, null pages included, from what the caller fixed and a budget of bytes for the rest.

    Window: 4 pages a sequence, which is what decoding holds at most; the pages that whole chunks of max_tokens in all
    pass through, for each step in flight; and 2 a checkpoint. Checkpoints: one for every
    `checkpoint_every` tokens of full pages and one a sequence. Full pages take what is left of the budget.
    """
    size = {life: layout.bytes_of(life) for life in LIVES}
    moving = 4 * max_sequences + -(-max_tokens // WINDOW_TOKENS) * steps_in_flight
    per_page = FULL_TOKENS / checkpoint_every if checkpoints is None else 0.0
    fixed = max_sequences if checkpoints is None else checkpoints
    if pages is None:
        if budget is None:
            raise ArgumentError("KVPool: neither budget nor pages is given")
        kept = size["checkpoint"] + (2 * size["window"] if window_pages is None else 0)
        spent = (state_slots + 1) * size["state"] + size["full"] + size["window"] + size["checkpoint"]
        spent += (window_pages if window_pages is not None else moving) * size["window"] + fixed * kept
        pages = int((budget - spent) // (size["full"] + per_page * kept)) if budget > spent else 0
        if pages < 1:
            raise ArgumentError(
                f"KVPool: budget = {budget:,} B; state, window and checkpoints of {max_sequences} sequences alone take "
                f"{spent:,} B. Give more, or fewer max_sequences, max_in_flight, window_pages or checkpoints"
            )
    if checkpoints is None:
        checkpoints = fixed + int(pages * per_page)
    if window_pages is None:
        window_pages = moving + 2 * checkpoints
    return {
        "full": pages + 1,
        "window": window_pages + 1,
        "state": state_slots + 1,
        "checkpoint": checkpoints + 1,
    }


def longest(max_length: int, pages: int, window_pages: int, max_draft: int) -> int:
    """The most tokens that a sequence can have in a pool of that many pages, in however small steps."""
    for_ever = need(8 * WINDOW_TOKENS + WINDOW + max_draft, 0, 1, max_draft, FULL_TOKENS).window
    window = max_length if window_pages >= for_ever else WINDOW_TOKENS * window_pages
    return min(max_length, FULL_TOKENS * pages, window)


def free_memory(device: Device) -> int:
    """Bytes that can be allocated now: of the GPU, or of this machine's memory on the emulator."""
    if device.kind == "cuda":
        import cupy

        return int(cupy.cuda.Device(device.index).mem_info[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
