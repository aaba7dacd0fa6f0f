"""The emulator's memory: global memory in place at its real addresses, shared and local memory, generic addresses.

Global memory is the host's: four virtual NumPy arrays (8, 16, 32 and 64 bit) span the user address range, NumPy touches
only what is indexed, and every access is first checked against the map of live ranges. Own allocations come from one
reserved arena with red zones between them and never reuse an address, so that a use after free is seen and addresses
repeat from run to run. Shared and local memory belong to a batch of CTAs and carry one "written" flag per byte.

A check that fails raises LaneFault with the positions of the offending lanes; the machine adds thread and line.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.errors import EmulatorError

Array = npt.NDArray[Any]

U8, U16, U32, U64, I64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64
UNSIGNED: tuple[Any, ...] = (U8, U16, U32, U64)
_WRITTEN = tuple(dtype(0x0101010101010101 & ((1 << 8 * (1 << k)) - 1)) for k, dtype in enumerate(UNSIGNED))

_BASE = 0x1000  # of the virtual arrays; below lies the null page
_TOP = 1 << 47
RED_ZONE = 256
REMEMBERED = 4096  # freed allocations that a message can still name
POISON = 0xFF  # fresh memory: NaN in every float format, -1 in every signed integer

SHARED_FIRST = 0x400  # first shared offset, so that 0 stays invalid as on hardware
LOCAL_FIRST = 0x100
SHARED_WINDOW = 1 << 48  # generic addresses of shared memory: above everything a host can map
LOCAL_WINDOW = 2 << 48

_ARENA_HINT = 0x2000_0000_0000
_ARENA_SIZES = (1 << 40, 1 << 36, 1 << 32)
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_NORESERVE = 0x4000
_MADV_DONTNEED = 4


def _page_up(address: int) -> int:
    return -(-address // mmap.PAGESIZE) * mmap.PAGESIZE


class LaneFault(Exception):
    """A check failed for some lanes of one instruction. `bad` holds their positions in the operand arrays."""

    def __init__(self, what: str, bad: Array) -> None:
        super().__init__(what)
        self.what = what
        self.bad = bad


class _Window:
    """Host memory as an array, without owning it."""

    def __init__(self, address: int, count: int, dtype: Any, keep: object = None) -> None:
        self.keep = keep
        self.__array_interface__ = {
            "shape": (count,), "typestr": np.dtype(dtype).str, "data": (address, False), "version": 3
        }  # fmt: skip


class _Reservation:
    """A stretch of address space; pages appear when touched and go when the last view goes."""

    def __init__(self) -> None:
        self.address, self.size = 0, 0
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        for size in _ARENA_SIZES:
            address: Any = _LIBC.mmap(_ARENA_HINT, size, protection, flags, -1, 0)
            if address is not None and address != ctypes.c_void_p(-1).value:
                self.address = address
                self.size = size
                weakref.finalize(self, _LIBC.munmap, address, size)
                return
        raise EmulatorError("cannot reserve address space for the emulator's memory")


@dataclass(slots=True, eq=False)
class Range:
    """A live (or freed) range of global memory."""

    lo: int
    hi: int
    label: str
    writable: bool
    keep: object = None
    alive: bool = True

    def describe(self) -> str:
        access = "" if self.writable else ", read-only"
        return f'"{self.label}" [{self.lo:#x}, {self.hi - self.lo:,} B{access}]'


def _positions(mask: Array) -> Array:
    return np.nonzero(mask)[0]


def _misaligned(addr: Array, size: int, verb: str) -> None:
    """Raise if an address is not a multiple of size; size is a power of two."""
    if int(np.bitwise_or.reduce(addr)) & (size - 1):
        bad = _positions((addr & addr.dtype.type(size - 1)) != 0)
        raise LaneFault(f"misaligned {size}-byte {verb} at {int(addr[bad[0]]):#x}", bad)


def used_flags(k: int, part: int, used: int | None) -> int:
    """The written flags that element `part` of a vector of 2**k-byte elements must have."""
    flags = int(_WRITTEN[k])
    if used is None:
        return flags
    mask = used >> (part << k)
    return sum(0xFF << 8 * i for i in range(1 << k) if mask >> i & 1) & flags


class Memory:
    """Global memory: allocations, registered host memory, and checked vector access by real address."""

    def __init__(self) -> None:
        self._arena = _Reservation()
        self._next = self._arena.address + 4096
        self._lock = threading.RLock()  # arrays are made and collected by any thread, in the middle of anything
        self._owned: dict[int, Range] = {}
        self._order: list[int] = []  # addresses of _owned, which are handed out in ascending order
        self._foreign: dict[int, Range] = {}
        self._freed: deque[Range] = deque(maxlen=REMEMBERED)
        self._tokens = 0
        self._segments: list[Range] = []
        self._starts: list[int] = []
        self._stale = False
        self._bounds: tuple[Array, Array, Array] | None = None
        self._last = Range(0, 0, "", False)
        self.version = 0  # counts stores: a spinning thread sleeps until it changes
        self.views = tuple(np.asarray(_Window(_BASE, (_TOP - _BASE) >> k, dtype)) for k, dtype in enumerate(UNSIGNED))

    # The map.

    def alloc(self, nbytes: int, *, align: int = 256, label: str = "", writable: bool = True) -> int:
        """Allocate poisoned memory between red zones; returns its address, which no later allocation gets again."""
        if nbytes < 0 or align < 1 or align & (align - 1):
            raise EmulatorError(f"alloc: {nbytes} bytes aligned to {align} cannot be allocated")
        with self._lock:
            address = -(-self._next // align) * align
            after = address + max(nbytes, 1) + RED_ZONE
            if after > self._arena.address + self._arena.size:
                raise EmulatorError(
                    f"alloc: the arena's {self._arena.size:,} B of addresses, never used twice, are used up; "
                    "make a new Machine, or lift the limit on address space (ulimit -v) if there is one"
                )
            self._next = after
            self._owned[address] = Range(address, address + nbytes, label or f"allocation {len(self._owned)}", writable)
            self._order.append(address)
            self._stale = True
        if nbytes:
            self.view(address, nbytes).fill(POISON)
        return address

    def free(self, address: int) -> None:
        """Free an allocation. Later accesses fault and name it; its pages go back to the system."""
        with self._lock:
            gone = self._owned.pop(address, None)
            if gone is None:
                raise EmulatorError(f"free: {address:#x} is not a live allocation")
            gone.alive = False
            self._freed.append(gone)
            at = bisect_left(self._order, address)
            del self._order[at]
            self._stale = True
            # Whole pages that no live allocation touches: those inside, and those shared with others already freed.
            below = self._owned[self._order[at - 1]].hi if at else self._arena.address
            above = self._order[at] if at < len(self._order) else self._next
            first = max(_page_up(below), gone.lo // mmap.PAGESIZE * mmap.PAGESIZE)
            last = min(above // mmap.PAGESIZE * mmap.PAGESIZE, _page_up(gone.hi))
            if last > first:
                _LIBC.madvise(first, last - first, _MADV_DONTNEED)

    def register(
        self, address: int, nbytes: int, *, label: str = "", writable: bool = True, keep: object = None
    ) -> int:
        """Let kernels access host memory [address, address + nbytes); `keep` is held until unregister. Returns a token.

        Ranges may overlap or repeat; memory is writable if any range over it is.
        """
        if nbytes < 0 or address < _BASE or address + nbytes > _TOP:
            raise EmulatorError(f"register: [{address:#x}, {nbytes} B] is not host memory")
        with self._lock:
            self._tokens += 1
            token = self._tokens
            name = label or f"host memory {token}"
            self._foreign[token] = Range(address, address + nbytes, name, writable, keep)
            self._stale = True
        return token

    def unregister(self, token: int) -> None:
        """Undo a register; accesses to the range fault from now on, unless another range covers them."""
        with self._lock:
            if self._foreign.pop(token, None) is None:
                raise EmulatorError(f"unregister: no registered range has the token {token}")
            self._stale = True

    def view(self, address: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Arena memory as bytes, without a copy; the view stays valid memory even after a free."""
        first, last = self._arena.address, self._arena.address + self._arena.size
        if not first <= address <= address + nbytes <= last:
            raise EmulatorError(f"view: [{address:#x}, {nbytes} B] is not arena memory")
        return np.asarray(_Window(address, nbytes, np.uint8, self._arena))

    def check_written(self, view: Array, size: int) -> None:
        """Elements of `size` bytes are read, a view of bytes in place: were all written, where that is known?"""

    def mark_written(self, address: int, nbytes: int) -> None:
        """The host has written these bytes: known where reads of uninitialised memory are checked (`watched.py`)."""

    def _refresh(self) -> None:
        """Sort the live ranges into disjoint segments; ranges that overlap are joined."""
        with self._lock:
            self._stale = False
            segments: list[Range] = []
            for each in sorted((*self._owned.values(), *self._foreign.values()), key=lambda r: (r.lo, -r.hi)):
                if segments and each.lo < segments[-1].hi:
                    last = segments[-1]
                    if each.writable and not last.writable and (each.lo > last.lo or each.hi < last.hi):
                        # Keep the read-only remainder read-only: cut the outer range around the writable one.
                        segments[-1:] = [
                            part
                            for part in (
                                Range(last.lo, each.lo, last.label, False),
                                each,
                                Range(each.hi, last.hi, last.label, False),
                            )
                            if part.hi > part.lo
                        ]
                    else:
                        segments[-1] = Range(last.lo, max(last.hi, each.hi), last.label, last.writable or each.writable)
                elif each.hi > each.lo:
                    segments.append(each)
            self._segments = segments
            self._starts = [s.lo for s in segments]
            self._bounds = None
            self._last = Range(0, 0, "", False)

    # Checked access. `base` is unused here; the other spaces need it.

    def place(self, addr: Array, size: int, write: bool) -> Array:
        """Byte positions of accesses in the virtual arrays, after every check."""
        if self._stale:
            self._refresh()
        lo, hi = int(addr.min()), int(addr.max()) + size
        last = self._last
        if lo < last.lo or hi > last.hi or (write and not last.writable):
            at = bisect_right(self._starts, lo) - 1
            if at >= 0 and hi <= self._segments[at].hi and (self._segments[at].writable or not write):
                self._last = self._segments[at]
            else:
                self._scan(addr, size, write)
        if size > 1:
            _misaligned(addr, size, "write" if write else "read")
        found: Array = (addr - U64(_BASE)).view(I64)
        return found

    def _scan(self, addr: Array, size: int, write: bool) -> None:
        """The lanes touch more than one range: check each."""
        if not self._segments:
            raise LaneFault(self._explain(int(addr[0]), size, write), np.arange(len(addr)))
        if self._bounds is None:
            segments = self._segments
            self._bounds = (
                np.array(self._starts, U64),
                np.array([s.hi for s in segments], U64),
                np.array([s.writable for s in segments]),
            )
        starts, ends, writable = self._bounds
        at = np.searchsorted(starts, addr, side="right") - 1
        inside = (at >= 0) & (addr < ends[at]) & (ends[at] - addr >= U64(size))
        if write:
            inside &= writable[at]
        if not inside.all():
            bad = _positions(~inside)
            raise LaneFault(self._explain(int(addr[bad[0]]), size, write), bad)

    def _explain(self, address: int, size: int, write: bool) -> str:
        verb = "write" if write else "read"
        for each in self._segments:
            if each.lo <= address and address + size <= each.hi:
                return f"write to read-only memory: {size} bytes at {address:#x} in {each.describe()}"
        head = f"{size}-byte {verb} at {address:#x}"
        for each in reversed(self._freed):
            if each.lo - RED_ZONE < address < each.hi + RED_ZONE and each.lo <= address < each.hi:
                return f"use after free: {head}, {address - each.lo:,} bytes into freed {each.describe()}"
        if address < _BASE:
            return f"out of bounds: {head}: null pointer"
        if not self._segments:
            return f"out of bounds: {head}: nothing is allocated"

        def distance(each: Range) -> int:
            return max(each.lo - address, address + size - each.hi)

        near = min(self._segments, key=distance)
        if address >= near.hi:
            where = f"{address - near.hi:,} bytes past the end of"
        elif address + size <= near.lo:
            where = f"{near.lo - address:,} bytes before"
        else:
            where = "straddling an end of"
        return f"out of bounds: {head}: {where} {near.describe()}"

    def span(self, address: int, nbytes: int, write: bool) -> Array:
        """The bytes of a range, in place, after every check of an access to it as a whole.

        Raises:
            LaneFault: it does not lie in one live range, or is not writable.
        """
        if self._stale:
            self._refresh()
        at = bisect_right(self._starts, address) - 1
        inside = at >= 0 and address + nbytes <= self._segments[at].hi
        if not inside or (write and not self._segments[at].writable):
            raise LaneFault(self._explain(address, nbytes, write), np.zeros(1, I64))
        found: Array = self.views[0][address - _BASE : address - _BASE + nbytes]
        return found

    def load(self, addr: Array, base: object, k: int, used: int | None = None) -> Array:
        """Values of 2**k bytes as unsigned bits."""
        found: Array = self.views[k][self.place(addr, 1 << k, False) >> k]
        return found

    def load_vector(self, addr: Array, base: object, k: int, n: int, used: int | None = None) -> list[Array]:
        at = self.place(addr, n << k, False) >> k
        view = self.views[k]
        return [view[at + i] for i in range(n)]

    def store(self, addr: Array, base: object, value: Array, k: int) -> None:
        self.views[k][self.place(addr, 1 << k, True) >> k] = value
        self.version += 1

    def store_vector(self, addr: Array, base: object, values: Sequence[Array], k: int) -> None:
        at = self.place(addr, len(values) << k, True) >> k
        view = self.views[k]
        for i, value in enumerate(values):
            view[at + i] = value
        self.version += 1

    def atomic(self, addr: Array, base: object, k: int, update: Callable[[Array, Array], tuple[Any, bool]]) -> Any:
        """Run update(view, positions) on checked places; it returns its result and whether memory changed."""
        result, changed = update(self.views[k], self.place(addr, 1 << k, True) >> k)
        self.version += changed
        return result


class LaneMemory:
    """Shared memory of a batch of CTAs, or local memory of a batch of threads: equal slices of one array.

    `base[lane]` is the byte position of the lane's slice less the first valid offset, so position = offset + base.
    """

    def __init__(self, name: str, slices: int, size: int, first: int) -> None:
        self.name, self.size, self.first = name, size, first
        self.stride = max(16, -(-size // 16) * 16)
        self.views = _all_views(np.zeros(slices * self.stride // 8, U64))
        self.written = _all_views(np.zeros(slices * self.stride // 8, U64))
        self.version = 0

    def bases(self, slice_of: Array) -> Array:
        """The base array for lanes whose slices are given."""
        found: Array = slice_of.astype(I64) * self.stride - self.first
        return found

    def place(self, addr: Array, base: Array, size: int, write: bool) -> Array:
        lo, hi = int(addr.min()), int(addr.max())
        if lo < self.first or hi + size > self.first + self.size:
            signed = addr.astype(I64)
            bad = _positions((addr < self.first) | (signed + size > self.first + self.size) | (signed < 0))
            offset = int(addr[bad[0]])
            beside = _beside(offset, size, self.first, self.first + self.size)
            raise LaneFault(
                f"out of bounds: {size}-byte {'write' if write else 'read'} at {self.name} offset {offset:#x}, "
                f"{beside} the {self.size:,} B of {self.name} memory",
                bad,
            )
        if size > 1:
            _misaligned(addr, size, f"{self.name} {'write' if write else 'read'}")
        found: Array = addr.astype(I64) + base
        return found

    def _initialised(self, addr: Array, at: Array, k: int, part: int, used: int | None) -> None:
        flags = UNSIGNED[k](used_flags(k, part, used))
        seen = self.written[k][at]
        if not bool((seen & flags == flags).all() if used is not None else (seen == flags).all()):
            bad = _positions(seen & flags != flags)
            offset = int(addr[bad[0]]) + (part << k)
            raise LaneFault(
                f"read of uninitialised {self.name} memory: {1 << k} bytes at {self.name} offset {offset:#x} "
                f"(byte {offset - self.first:,} of {self.size:,})",
                bad,
            )

    def load(self, addr: Array, base: Array, k: int, used: int | None = None) -> Array:
        at = self.place(addr, base, 1 << k, False) >> k
        self._initialised(addr, at, k, 0, used)
        found: Array = self.views[k][at]
        return found

    def load_vector(self, addr: Array, base: Array, k: int, n: int, used: int | None = None) -> list[Array]:
        at = self.place(addr, base, n << k, False) >> k
        for i in range(n):
            self._initialised(addr, at + i, k, i, used)
        return [self.views[k][at + i] for i in range(n)]

    def store(self, addr: Array, base: Array, value: Array, k: int) -> None:
        at = self.place(addr, base, 1 << k, True) >> k
        self.views[k][at] = value
        self.written[k][at] = _WRITTEN[k]
        self.version += 1

    def store_vector(self, addr: Array, base: Array, values: Sequence[Array], k: int) -> None:
        at = self.place(addr, base, len(values) << k, True) >> k
        for i, value in enumerate(values):
            self.views[k][at + i] = value
            self.written[k][at + i] = _WRITTEN[k]
        self.version += 1

    def atomic(self, addr: Array, base: Array, k: int, update: Callable[[Array, Array], tuple[Any, bool]]) -> Any:
        at = self.place(addr, base, 1 << k, True) >> k
        self._initialised(addr, at, k, 0, None)
        result, changed = update(self.views[k], at)
        self.version += changed
        return result


def _all_views(words: Array) -> tuple[Array, ...]:
    return tuple(words.view(dtype) for dtype in UNSIGNED)


def _beside(offset: int, size: int, first: int, end: int) -> str:
    if offset >= end:
        return f"{offset - end:,} bytes past the end of"
    if offset + size <= first:
        return f"{first - offset:,} bytes before"
    return "straddling an end of"


class Generic:
    """Generic addresses: each lane's window decides its space. `base` is the pair of shared and local bases."""

    def __init__(self, memory: Memory, shared: Any, local: LaneMemory) -> None:
        self.spaces: tuple[Any, ...] = (memory, shared, local)

    @staticmethod
    def _window(addr: Array) -> Array:
        found: Array = np.minimum(addr >> U64(48), U64(3)) % U64(3)  # anything above the windows faults as global
        return found

    def _split(self, addr: Array, base: tuple[Array, Array]) -> list[tuple[int, Array | None, Array, Any]]:
        """(space, positions or None for all lanes, offsets, base) for each space that some lane names."""
        if int(addr.max()) < _TOP:
            return [(0, None, addr, None)]
        window = self._window(addr)
        found: list[tuple[int, Array | None, Array, Any]] = []
        for space in np.unique(window).tolist():
            at = _positions(window == U64(space))
            offset = addr[at] if space == 0 else addr[at] & U64((1 << 48) - 1)
            found.append((space, at, offset, None if space == 0 else base[space - 1][at]))
        return found

    def _each(
        self, addr: Array, base: tuple[Array, Array], act: Callable[[Any, Array | None, Array, Any], list[Array]]
    ) -> list[Array]:
        parts = self._split(addr, base)
        outputs: list[Array] = []
        for space, at, offset, own in parts:
            try:
                got = act(self.spaces[space], at, offset, own)
            except LaneFault as fault:
                raise LaneFault(fault.what, fault.bad if at is None else at[fault.bad]) from None
            if at is None or len(parts) == 1:
                return got
            outputs = outputs or [np.zeros(len(addr), value.dtype) for value in got]
            for output, value in zip(outputs, got, strict=True):
                output[at] = value
        return outputs

    def load(self, addr: Array, base: tuple[Array, Array], k: int, used: int | None = None) -> Array:
        return self._each(addr, base, lambda space, at, off, own: [space.load(off, own, k, used)])[0]

    def load_vector(
        self, addr: Array, base: tuple[Array, Array], k: int, n: int, used: int | None = None
    ) -> list[Array]:
        return self._each(addr, base, lambda space, at, off, own: list(space.load_vector(off, own, k, n, used)))

    def store(self, addr: Array, base: tuple[Array, Array], value: Array, k: int) -> None:
        self.store_vector(addr, base, [value], k)

    def store_vector(self, addr: Array, base: tuple[Array, Array], values: Sequence[Array], k: int) -> None:
        def act(space: Any, at: Array | None, off: Array, own: Any) -> list[Array]:
            own_values = values if at is None else [value if len(value) == 1 else value[at] for value in values]
            space.store_vector(off, own, own_values, k)
            return []

        self._each(addr, base, act)

    def atomic_parts(self, addr: Array, base: tuple[Array, Array]) -> list[tuple[Any, Array | None, Array, Any]]:
        """The spaces an atomic touches: (space, positions or None, offsets, base)."""
        return [(self.spaces[space], at, off, own) for space, at, off, own in self._split(addr, base)]
