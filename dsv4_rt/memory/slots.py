"""The slot mappings of a step: where each of its tokens goes in each cache.

    slot(p) = page * entries + (p // ratio) % entries      if (p + 1) % ratio == 0, else -1

with the page of position p in the sequence's row of block tables: p // 256 for caches of the life cycle `full`, the
ring column (p // 64) % width for `window`. Since entries * ratio is the page's number of tokens, this is
(page * tokens + p % tokens) // ratio, which is what is computed. Caches with the same life cycle and ratio share one
mapping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from dsv4_rt.errors import ArgumentError
from dsv4_rt.memory.layout import FULL_TOKENS, WINDOW_TOKENS, KVLayout
from dsv4_rt.memory.pages import Ints
from dsv4_rt.memory.tables import Tables

LONG: Final = 48  # tokens: more of one sequence are written as slices, fewer together with other sequences'


@dataclass(frozen=True)
class Mapping:
    """One array of slots and what it is for."""

    name: str  # of the first cache that uses it
    life: str
    ratio: int


def mappings(layout: KVLayout) -> tuple[tuple[Mapping, ...], dict[str, str]]:
    """The distinct mappings of a layout, and cache name -> mapping name."""
    found: dict[tuple[str, int], Mapping] = {}
    alias = {}
    for cache in (*layout.of("full"), *layout.of("window")):
        tokens = FULL_TOKENS if cache.life == "full" else WINDOW_TOKENS
        if cache.tokens != tokens or cache.ratio & (cache.ratio - 1):
            raise ArgumentError(
                f"KVPool: cache {cache.name!r} has {cache.entries} entries of {cache.ratio} tokens a page; a page of "
                f"the life cycle {cache.life!r} is {tokens} tokens, and ratios are powers of two"
            )
        mapping = found.setdefault((cache.life, cache.ratio), Mapping(cache.name, cache.life, cache.ratio))
        alias[cache.name] = mapping.name
    return tuple(found.values()), alias


def spread(starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """(i, v): for every i the values starts[i] .. starts[i] + counts[i] - 1, one after the other."""
    which = np.repeat(np.arange(counts.size), counts)
    ends = np.cumsum(counts)
    return which, np.arange(which.size) + (starts - ends + counts)[which]


class StepSlots:
    """Slot mappings, rows and positions of the step that is being put together: everything since the last upload."""

    def __init__(self, tables: Tables, distinct: tuple[Mapping, ...], max_tokens: int) -> None:
        self._tables = tables
        self._max_blocks = tables.full.shape[1]
        self._width = tables.window.shape[1]
        self._arrays = [(m, tables.slots[m.name], f"slots.{m.name}", m.ratio.bit_length() - 1) for m in distinct]
        self.max_tokens = max_tokens
        # By entries a page, as bits: the place within its page of each entry of a long run.
        bits = {(8 if m.life == "full" else 6) - m.ratio.bit_length() + 1 for m in distinct}
        self._within = {b: np.arange(max_tokens + FULL_TOKENS) & ((1 << b) - 1) for b in bits}
        self._positions = np.arange(max_tokens, dtype=np.int32)
        self.count = 0  # tokens so far
        self._pattern: dict[str, tuple[int, int, int]] = {}  # mapping -> where and how its last long run has its -1
        self._written = 0  # entries that may be other than -1, of this step or the one before

    def add_ones(self, rows: Ints, positions: Ints, window_base: Ints, full_base: Ints) -> None:
        """One token a sequence, on the page that its base describes."""
        start, stop = self.count, self.count + rows.size
        tables = self._tables
        self._pattern.clear()
        w, f = window_base + positions, full_base + positions
        for m, array, name, shift in self._arrays:
            source = w if m.life == "window" else f
            out = array[start:stop]
            if not shift:
                out[:] = source
            else:
                last = m.ratio - 1
                hits = (positions & last) == last
                np.copyto(out, -1)
                np.right_shift(source, shift, out=out, where=hits)
            tables.mark_range(name, start, stop)
        self._finish(start, stop, rows, positions)

    def add(self, rows: Ints, first: Ints, counts: Ints) -> None:
        """counts[i] tokens from position first[i] on for each row, in this order."""
        start = self.count
        self._pattern.clear()
        ends = start + np.cumsum(counts)
        long = counts >= LONG
        for i in np.flatnonzero(long).tolist():
            n = int(counts[i])
            self._add_long(int(ends[i]) - n, int(rows[i]), int(first[i]), n)
        short = np.flatnonzero(~long & (counts > 0))
        if short.size:
            self._add_short(rows[short], first[short], counts[short], ends[short] - counts[short])
        stop = int(ends[-1]) if ends.size else start
        for _, _, name, _ in self._arrays:
            self._tables.mark_range(name, start, stop)
        self._close(start, stop)

    def add_one(self, row: int, first: int, n: int) -> None:
        """n tokens from position `first` on of one row."""
        start, stop = self.count, self.count + n
        if n == 1:
            self._add_single(start, row, first)
            return
        self._add_long(start, row, first, n)
        for _, _, name, _ in self._arrays:
            self._tables.mark_range(name, start, stop)
        self._close(start, stop)

    def _add_single(self, at: int, row: int, p: int) -> None:
        tables = self._tables
        self._pattern.clear()
        full = (int(tables.full[row, p >> 8]) << 8) + (p & 255)
        window = (int(tables.window[row, (p >> 6) % self._width]) << 6) + (p & 63)
        for m, array, name, shift in self._arrays:
            last = m.ratio - 1
            array[at] = (window if m.life == "window" else full) >> shift if p & last == last else -1
            tables.mark_one(name, at)
        tables.token_rows[at] = row
        tables.positions[at] = p
        tables.mark_one("token_rows", at)
        tables.mark_one("positions", at)
        self.count = at + 1
        self._written = max(self._written, at + 1)

    def _add_short(self, rows: Ints, first: Ints, counts: Ints, at: Ints) -> None:
        which, p = spread(first, counts)
        place = spread(at, counts)[1]
        row = rows[which]
        tables = self._tables
        full = tables.full.reshape(-1).take(row * self._max_blocks + (p >> 8)).astype(np.int64)
        window = tables.window.reshape(-1).take(row * self._width + (p >> 6) % self._width).astype(np.int64)
        f, w = (full << 8) + (p & 255), (window << 6) + (p & 63)
        for m, array, _, shift in self._arrays:
            last = m.ratio - 1
            source = (w if m.life == "window" else f) >> shift
            array[place] = source if not shift else np.where((p & last) == last, source, -1)
        tables.token_rows[place] = row
        tables.positions[place] = p

    def _add_long(self, at: int, row: int, first: int, n: int) -> None:
        tables, end = self._tables, first + n
        page0 = first >> 8
        full = tables.full[row, page0 : (end + 255) >> 8].astype(np.int64)
        for m, array, name, shift in self._arrays:
            out = array[at : at + n]
            if m.life == "full":
                if shift:
                    self._blank(name, out, (at, n, first & (m.ratio - 1)))
                    out = out[(-1 - first) & (m.ratio - 1) :: m.ratio]  # positions that complete an entry
                self._fill(out, full, 8 - shift, (first >> shift) - (page0 << (8 - shift)))
            else:
                ring = tables.window[row].astype(np.int64)
                left, count = (first >> 6) % self._width, ((end + 63) >> 6) - (first >> 6)
                pages = ring[left : left + count]
                if pages.size < count:
                    pages = np.concatenate([pages, ring[: count - pages.size]])
                self._fill(out, pages, 6, first & 63)
        tables.token_rows[at : at + n] = row
        np.add(self._positions[:n], first, out=tables.positions[at : at + n])

    def _blank(self, name: str, out: Ints, pattern: tuple[int, int, int]) -> None:
        """-1 everywhere; skipped where the last slots written were a run with the same places of -1."""
        if self._pattern.get(name) != pattern:
            out.fill(-1)
            self._pattern[name] = pattern

    def _fill(self, out: Ints, pages: Ints, bits: int, skip: int) -> None:
        """out = slots pages[0] * 2^bits + skip, ... one after the other through all the pages."""
        stop = skip + out.size
        np.add(np.repeat(pages << bits, 1 << bits)[skip:stop], self._within[bits][skip:stop], out=out)

    def _finish(self, start: int, stop: int, rows: Ints, positions: Ints) -> None:
        self._tables.token_rows[start:stop] = rows
        self._tables.positions[start:stop] = positions
        self._close(start, stop)

    def _close(self, start: int, stop: int) -> None:
        self._tables.mark_range("token_rows", start, stop)
        self._tables.mark_range("positions", start, stop)
        self.count = stop
        self._written = max(self._written, stop)

    def withdraw(self, row: int, length: int) -> None:
        """The staged tokens of a row from position `length` on go nowhere: slots and positions -1."""
        tables, n = self._tables, self.count
        gone = np.flatnonzero((tables.token_rows[:n] == row) & (tables.positions[:n] >= length))
        for _, array, name, _ in self._arrays:
            array[gone] = -1
            tables.mark(name, gone)
        tables.positions[gone] = -1
        tables.mark("positions", gone)

    def trim(self) -> None:
        """Blank what an earlier, longer step has left behind this one's tokens."""
        start, stop = self.count, self._written
        if start < stop:
            tables = self._tables
            for _, array, name, _ in self._arrays:
                array[start:stop] = -1
                tables.mark_range(name, start, stop)
            tables.positions[start:stop] = -1
            tables.mark_range("positions", start, stop)
            tables.token_rows[start:stop] = 0
            tables.mark_range("token_rows", start, stop)

    def begin(self) -> None:
        """What was put together has been uploaded; the next token is the first of another step."""
        self._written = self.count
        self.count = 0
