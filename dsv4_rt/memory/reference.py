"""Oracles of the pool's kernels: what a copy and an upload mean, in NumPy, by indices instead of addresses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_rt.memory.layout import CHECKPOINT_ROWS, LIVES, KVLayout

Bytes = NDArray[np.uint8]


def upload_deltas(tables: NDArray[np.int32], message: NDArray[np.int32], chunks: int, singles: int) -> None:
    """Write a message into the tables, in place; the layout of a message is that of `ops.upload_deltas`."""
    heads = message[: 2 * chunks].reshape(-1, 2).tolist()
    pairs = message[2 * chunks : 2 * (chunks + singles)].reshape(-1, 2).tolist()
    runs = message[(2 * (chunks + singles) + 31) // 32 * 32 :]
    changes = [(word, value) for word, value in pairs]
    for c, (word, count) in enumerate(heads):
        changes += [(word + i, int(runs[128 * c + i])) for i in range(min(count, 128))]
    for word, value in changes:
        if 0 <= word < tables.size:
            tables[word] = value


def copy(
    layout: KVLayout,
    arrays: Mapping[str, Bytes],
    copies: Mapping[str, Any] | None = None,
    save: Any = (),
    restore: Any = (),
) -> dict[str, Bytes]:
    """The arrays [layers, pages, page_bytes] after `Storage.copy` of the same arguments; the given ones stay."""
    after = {name: array.copy() for name, array in arrays.items()}
    for life in LIVES:
        for source, target in (copies or {}).get(life, ()):
            for cache in layout.of(life):
                after[cache.name][:, target] = arrays[cache.name][:, source]
    for cache in layout.of("checkpoint"):
        n, ring = cache.entry_bytes, layout.cache(cache.rows_of).entries
        for row in range(CHECKPOINT_ROWS):
            kept = slice(row * n, (row + 1) * n)
            for state, checkpoint, L in save:
                at = (L - CHECKPOINT_ROWS + row) % ring * n
                after[cache.name][:, checkpoint, kept] = arrays[cache.rows_of][:, state, at : at + n]
            for checkpoint, state, L in restore:
                at = (L - CHECKPOINT_ROWS + row) % ring * n
                after[cache.rows_of][:, state, at : at + n] = arrays[cache.name][:, checkpoint, kept]
    return after
