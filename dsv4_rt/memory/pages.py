"""The page ids of one life cycle: who holds them, which are free, which may be evicted, which wait for a step to end.

    free -> used            take: a stack, last in first out
    used -> fenced          the last holder let go while steps were in flight
    used, fenced -> cached  nobody holds it, the prefix cache keeps it: evictable, least recently used first
    used, fenced -> free    nobody holds it, nobody keeps it
    cached, fenced -> used  a prefix hit

Everything is an array indexed by page id; there is no object a page. The LRU order is a queue of ids in which an entry
is valid only while `place[id]` names its position: a page that is used again leaves its entry behind, and eviction
skips it. Each push leaves at most one such entry, so the cost of a page stays constant on average.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np

Ints = np.ndarray[Any, np.dtype[Any]]

FREE: Final = 0
USED: Final = 1
CACHED: Final = 2
FENCED: Final = 3
NULL: Final = 4


class Pages:
    """Page ids 0 .. count-1 of one life cycle. Id 0 is the null page: never handed out.

    `refs` counts holders: sequences, and copies that were decided but not yet uploaded, which `pins` counts once more.
    `keep` says that the prefix cache wants the page when nobody holds it. Batches must not name a page twice, except
    where said. Callers check `available` before they take: a shortage here is a bug.
    """

    def __init__(self, life: str, count: int, evict: Callable[[Ints], None]) -> None:
        """
        Args:
            life: the life cycle's name.
            count: page ids, the null page among them.
            evict: called with cached pages that must go; it has to end with `forget` of (at least) these pages.
        """
        self.life = life
        self.count = count
        self.refs = np.zeros(count, np.int32)
        self.pins = np.zeros(count, np.int32)
        self.keep = np.zeros(count, bool)
        self.where = np.full(count, FREE, np.uint8)
        self.where[0] = NULL
        self.stack = np.arange(count, 0, -1, dtype=np.int32)  # page 1 is the first to go; stack[:free] are free
        self.stack[0] = 0
        if count > 1:
            self.stack[: count - 1] = np.arange(count - 1, 0, -1, dtype=np.int32)
        self.free = count - 1
        self.cached = 0
        self.fenced = 0
        self.entry_of = np.zeros(count, np.int64)  # of fenced pages: the entry that counts, the latest
        self._fences: deque[tuple[int, int, Ints]] = deque()  # step, number of the entry, pages
        self._entries = 0
        self.place = np.full(count, -1, np.int64)
        self._queue = np.zeros(2 * count + 64, np.int32)
        self._head = self._tail = 0  # positions count up for ever; the array is a ring
        self._evict = evict
        self._mark = np.zeros(count, np.int64)

    @property
    def total(self) -> int:
        """Pages that can be handed out at all."""
        return self.count - 1

    @property
    def available(self) -> int:
        """Pages that `take` can hand out now: free ones, and cached ones that it would evict."""
        return self.free + self.cached

    @property
    def used(self) -> int:
        return self.total - self.free - self.cached - self.fenced

    def take(self, n: int) -> Ints:
        """n pages, each held once: int32 [n]. Evicts if fewer are free."""
        if n > self.free:
            self._make_free(n)
        pages: Ints = self.stack[self.free - n : self.free][::-1].copy()
        self.free -= n
        self.refs[pages] = 1
        self.where[pages] = USED
        return pages

    def share(self, pages: Ints) -> None:
        """One more holder for each page. A cached or fenced page is used again and cannot be evicted."""
        idle = pages[self.refs[pages] == 0]
        self.refs[pages] += 1
        if idle.size:
            where = self.where[idle]
            self.cached -= int(np.count_nonzero(where == CACHED))
            self.fenced -= int(np.count_nonzero(where == FENCED))
            self.where[idle] = USED
            self.place[idle] = -1

    def drop(self, pages: Ints, fence: int, repeats: bool = False) -> Ints:
        """One holder less for each page.

        Args:
            pages: may name a page several times if `repeats`. Those dropped first are evicted first later.
            fence: the newest step in flight, 0 if there is none: what becomes idle waits until it has ended.

        Returns:
            the pages that nobody holds any more.
        """
        if repeats:
            order = np.arange(pages.size)
            self._mark[pages] = order
            repeats = bool((self._mark[pages] != order).any())
        if repeats:
            np.subtract.at(self.refs, pages, 1)
            idle = pages[self.refs[pages] == 0]
            order = np.arange(idle.size)
            self._mark[idle] = order
            idle = idle[self._mark[idle] == order]
        else:
            self.refs[pages] -= 1
            idle = pages[self.refs[pages] == 0]
        if idle.size:
            if fence:
                self.where[idle] = FENCED
                self._entries += 1
                self.entry_of[idle] = self._entries
                self.fenced += idle.size
                self._fences.append((fence, self._entries, idle))
            else:
                self._settle(idle)
        left: Ints = idle
        return left

    def sole(self, pages: Ints) -> bool:
        """Whether each of these used pages would be free, not cached, if its only holder let go."""
        return int(np.maximum.reduce(self.refs.take(pages))) == 1 and not np.logical_or.reduce(self.keep.take(pages))

    def freed_by(self, pages: Ints) -> int:
        """How many pages `drop(pages, 0, repeats=True)` would make available."""
        distinct, times = np.unique(pages, return_counts=True)
        return int(np.count_nonzero(self.refs[distinct] == times))

    def retire(self, oldest: int) -> None:
        """Steps before `oldest` have ended: pages that waited for them are free or cached now."""
        while self._fences and self._fences[0][0] < oldest:
            _, entry, pages = self._fences.popleft()
            waiting = pages[(self.where[pages] == FENCED) & (self.entry_of[pages] == entry)]
            self.fenced -= waiting.size
            self._settle(waiting)

    def forget(self, pages: Ints) -> None:
        """The prefix cache keeps these pages no longer: the cached ones among them are free."""
        self.keep[pages] = False
        cached = pages[self.where[pages] == CACHED]
        if cached.size:
            self.cached -= cached.size
            self.place[cached] = -1
            self._push_free(cached)

    def oldest_first(self) -> Ints:
        """The cached pages in the order in which they would be evicted."""
        positions = np.arange(self._head, self._tail)
        pages: Ints = self._queue[positions % self._queue.size]
        left: Ints = pages[self.place[pages] == positions]
        return left

    def waiting(self) -> list[tuple[int, Ints]]:
        """(step, pages that wait for its end), oldest first."""
        return [(fence, p[(self.where[p] == FENCED) & (self.entry_of[p] == entry)]) for fence, entry, p in self._fences]

    def restore_queue(self, pages: Ints) -> None:
        """Set the LRU order of a fresh object to these cached pages, oldest first."""
        self._head = self._tail = 0
        self.place[:] = -1
        self._push_queue(pages)

    def _settle(self, idle: Ints) -> None:
        kept = self.keep[idle]
        if kept.any():
            cached = idle[kept]
            self.where[cached] = CACHED
            self.cached += cached.size
            self._push_queue(cached)
            idle = idle[~kept]
        self._push_free(idle)

    def _push_free(self, pages: Ints) -> None:
        self.where[pages] = FREE
        self.stack[self.free : self.free + pages.size] = pages
        self.free += pages.size

    def _push_queue(self, pages: Ints) -> None:
        if self._tail - self._head + pages.size > self._queue.size:
            valid = self.oldest_first()
            self._head = self._tail
            self._append(valid)
        self._append(pages)

    def _append(self, pages: Ints) -> None:
        positions = np.arange(self._tail, self._tail + pages.size)
        self._queue[positions % self._queue.size] = pages
        self.place[pages] = positions
        self._tail += pages.size

    def _make_free(self, n: int) -> None:
        while self.free < n:
            wanted = n - self.free
            stop = min(self._tail, self._head + max(2 * wanted, 64))
            if stop == self._head:
                raise AssertionError(f"{self.life}: {n} pages taken, {self.available} available")
            positions = np.arange(self._head, stop)
            pages = self._queue[positions % self._queue.size]
            valid = np.flatnonzero(self.place[pages] == positions)[:wanted]
            self._head = self._head + int(valid[-1]) + 1 if valid.size == wanted else stop
            if valid.size:
                self._evict(pages[valid])
