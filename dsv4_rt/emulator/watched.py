"""Global memory with the checks that a Machine has on request: racing stores, and reads of what nobody wrote.

Racing stores: two threads of one launch touch the same bytes, one of them stores, and neither a barrier, nor atomics
with a fence, order them (see `races.py`). Between launches everything is ordered.

What nobody wrote: bytes of an allocation that no kernel has stored and the host has not declared written. The machine
declares module variables, parameters and `EmulatedDevice.array`; whoever fills memory another way calls `mark_written`.
Host writes through a NumPy view cannot be seen, but they show: an element counts as unwritten only while it still holds
the poison of a fresh allocation in all its bytes, so that only host data of this very pattern (-1, a NaN) need be
declared. Registered host memory counts as written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from dsv4_rt.emulator.memory import _WRITTEN, UNSIGNED, LaneFault, Memory, _Reservation, _Window, used_flags
from dsv4_rt.emulator.races import Races, Shadow, Watch, changes_of, grain_of

if TYPE_CHECKING:
    from dsv4_rt.emulator.machine import Program

Array = npt.NDArray[Any]
I64 = np.int64


class WatchedMemory(Memory):
    """Global memory that checks more; `lanes` and `races` say whose access the next one is."""

    def __init__(self, writes: bool, uninitialised: bool) -> None:
        super().__init__()
        self.writes, self.uninitialised = writes, uninitialised
        self.lanes: Array = np.zeros(0, I64)
        self.races: Races | None = None
        self._shadow = Shadow(0)
        self._watch = Watch("global memory", 2, lambda: self._shadow, True)
        self._atomic = False
        self._map = (np.zeros(1, I64), np.zeros(1, I64))
        if uninitialised:
            flags = _Reservation()  # a byte for each of the arena; pages appear when touched
            first, size = flags.address, min(flags.size, self._arena.size)
            self._flags = [np.asarray(_Window(first, size >> k, each, flags)) for k, each in enumerate(UNSIGNED)]

    def begin(self, program: Program) -> None:
        """A launch begins: forget who touched what."""
        if not self.writes:
            return
        if self._stale:
            self._refresh()
        self._watch.grain = grain_of(program, "global")
        # A launch cannot change the map, so that records of all ranges lie one after the other.
        starts = np.array([each.lo & ~15 for each in self._segments], I64)
        sizes = np.array([((each.hi + 15) & ~15) - (each.lo & ~15) for each in self._segments], I64)
        self._map = (starts, np.cumsum(sizes) - sizes)
        self._shadow = Shadow(int(sizes.sum()) >> self._watch.grain)

    def _record(self, addr: Array) -> Array:
        """Positions in the records."""
        starts, offsets = self._map
        signed = addr.astype(I64)
        segment = np.searchsorted([each.lo for each in self._segments], signed, side="right") - 1
        found: Array = signed - starts[segment] + offsets[segment]
        return found

    def place(self, addr: Array, size: int, write: bool) -> Array:
        at = super().place(addr, size, write)
        if self.writes and self.races is not None and (self._atomic or not write):
            check = self._watch.atomic if self._atomic else self._watch.read
            check(self.races, self.lanes, addr, self._record(addr), size)
        return at

    def load(self, addr: Array, base: object, k: int, used: int | None = None) -> Array:
        value = super().load(addr, base, k, used)
        self._check(addr, value, k, 0, used)
        return value

    def load_vector(self, addr: Array, base: object, k: int, n: int, used: int | None = None) -> list[Array]:
        values = super().load_vector(addr, base, k, n, used)
        for i, value in enumerate(values):
            self._check(addr, value, k, i, used)
        return values

    def store(self, addr: Array, base: object, value: Array, k: int) -> None:
        self.store_vector(addr, base, (value,), k)

    def store_vector(self, addr: Array, base: object, values: Sequence[Array], k: int) -> None:
        size = len(values) << k
        at = self.place(addr, size, True) >> k

        def put() -> None:
            for j, value in enumerate(values):
                self.views[k][at + j] = value

        if self.writes and self.races is not None:
            changes = changes_of(self.views[k], at, values)
            self._watch.store(self.races, self.lanes, addr, self._record(addr), size, changes, put)
        else:
            put()
        for j in range(len(values)):
            self._mark(addr, k, j)
        self.version += 1

    def atomic(self, addr: Array, base: object, k: int, update: Callable[[Array, Array], tuple[Any, bool]]) -> Any:
        def checked(view: Array, at: Array) -> tuple[Any, bool]:
            self._check(addr, view[at], k, 0, None)
            return update(view, at)

        self._atomic = True
        try:
            found = super().atomic(addr, base, k, checked)
        finally:
            self._atomic = False
        self._mark(addr, k, 0)
        return found

    # What was written.

    def mark_written(self, address: int, nbytes: int) -> None:
        offset = address - self._arena.address
        if self.uninitialised and 0 <= offset < self._arena.size:
            self._flags[0][offset : offset + nbytes] = 1

    def check_written(self, view: Array, size: int) -> None:
        address = int(view.__array_interface__["data"][0])
        offset = address - self._arena.address
        if not self.uninitialised or not 0 <= offset < self._arena.size:
            return
        flags = as_strided(self._flags[0][offset : offset + 1], view.shape, view.strides)
        groups = (*view.shape[:-1], view.shape[-1] // size, size)
        bad = ((view == 0xFF) & (flags == 0)).reshape(groups).all(axis=-1)
        if bad.any():
            where = np.unravel_index(int(np.argmax(bad)), bad.shape)
            first = address + sum(int(i) * s for i, s in zip(where, (*view.strides[:-1], size), strict=True))
            raise LaneFault(self._unwritten(size, first), np.zeros(1, I64))

    def _unwritten(self, size: int, address: int) -> str:
        near = next(each for each in self._segments if each.lo <= address < each.hi)
        return (
            f"read of uninitialised global memory: {size} bytes at {address:#x}, {address - near.lo:,} bytes "
            f"into {near.describe()}; if the host wrote them, memory.mark_written says so"
        )

    def _owned_part(self, addr: Array, k: int, part: int) -> tuple[Array, Array]:
        """(positions of accesses to own allocations, places of their element among the flags)."""
        offset = addr.astype(I64) - self._arena.address
        inside = np.nonzero((offset >= 0) & (offset < self._arena.size))[0]
        return inside, (offset[inside] >> k) + part

    def _mark(self, addr: Array, k: int, part: int) -> None:
        if self.uninitialised:
            _, at = self._owned_part(addr, k, part)
            self._flags[k][at] = _WRITTEN[k]

    def _check(self, addr: Array, value: Array, k: int, part: int, used: int | None) -> None:
        if not self.uninitialised:
            return
        poisoned = value == UNSIGNED[k](~UNSIGNED[k](0))
        if not poisoned.any() or not used_flags(k, part, used):
            return
        inside, at = self._owned_part(addr, k, part)
        bad = inside[poisoned[inside] & (self._flags[k][at] == 0)]
        if len(bad):
            raise LaneFault(self._unwritten(1 << k, int(addr[bad[0]]) + (part << k)), bad)
