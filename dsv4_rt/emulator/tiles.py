"""Which swizzle TMA has given to which shared memory, so that a matrix descriptor that says another is an error.

Only tiles that came with a swizzle count, and only while their bytes are still those that TMA wrote: data without one
may have been permuted beforehand, and what a thread has rewritten is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.memory import LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
CHUNK = np.complex128  # 16 bytes that NumPy moves as one; nobody computes with them


@dataclass(slots=True, eq=False)
class Tile:
    """Shared offsets [lo, hi) of a CTA, the swizzle's pattern in bytes, who wrote it, its chunks' numbers and bytes."""

    lo: int
    hi: int
    width: int
    line: int
    at: Array
    data: Array


class Tiles:
    """The swizzled tiles in the shared memory of a batch, by CTA."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.of: dict[int, list[Tile]] = {}

    def note(self, cta: int, tile: Tile) -> None:
        """TMA has written a tile; those it overlaps are gone."""
        kept = [each for each in self.of.get(cta, ()) if each.hi <= tile.lo or each.lo >= tile.hi]
        if tile.width:
            kept.append(tile)
        self.of[cta] = kept

    def check(self, cta: int, ranges: Sequence[tuple[int, int]], width: int, what: str) -> None:
        """A descriptor reads ranges of shared memory with a swizzle.

        Raises:
            LaneFault: TMA has put them there with another.
        """
        for tile in self.of.get(cta, ()):
            if tile.width == width or not any(lo < tile.hi and hi > tile.lo for lo, hi in ranges):
                continue
            now = self.batch.shared.views[3].view(CHUNK)[tile.at].view(np.uint64)
            if np.array_equal(now, tile.data.view(np.uint64)):
                raise LaneFault(
                    f"{what} says swizzle {f'{width}B' if width else 'none'}, but the tile there came with swizzle "
                    f"{tile.width}B, by{self.batch.engine.place(tile.line)}",
                    np.zeros(1, np.int64),
                )
