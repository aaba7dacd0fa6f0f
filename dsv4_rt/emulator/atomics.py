"""Atomic operations of many lanes at once, lanes in order: equal addresses see one another's results.

Lanes are sorted by address (stably). Where every address is different the update is one vector operation. Otherwise
operations that NumPy can accumulate run address by address when addresses are few, and the rest go in rounds: round i
updates every address with its i-th lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import alu
from dsv4_rt.emulator.clusters import ClusterShared
from dsv4_rt.emulator.memory import _TOP, Generic, LaneFault, Memory, _misaligned

Array = npt.NDArray[Any]
_ACCUMULATE: dict[str, np.ufunc] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip
_FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def run(
    space: Any, addr: Array, base: Any, k: int, op: str, ty: str, values: tuple[Array, ...], want: bool, noftz: bool
) -> Array | None:
    """Do an atomic in any space; returns the old values if wanted."""
    if isinstance(space, Generic):
        parts = space.atomic_parts(addr, base)
        old = np.zeros_like(values[0])
        for own, at, offset, own_base in parts:
            part = values if at is None else tuple(value[at] for value in values)
            try:
                got = run(own, offset, own_base, k, op, ty, part, want, noftz)
            except LaneFault as fault:
                raise LaneFault(fault.what, fault.bad if at is None else at[fault.bad]) from None
            if want and got is not None:
                old[slice(None) if at is None else at] = got
        return old
    if ty == "b128":
        _misaligned(addr, 16, "atomic")
        # The upper half is checked and recorded as an access of its own, the lower with the operation.
        space.atomic(addr + addr.dtype.type(8), base, 3, lambda view, at: (None, False))
        wide: Array = space.atomic(addr, base, 3, lambda view, at: _update_wide(view, at, op, values))
        return wide
    if ty.endswith("x2") and isinstance(space, ClusterShared):
        away = space.away(addr, base)
        if len(away):
            raise LaneFault(
                f"{op}.{ty} in the shared memory of another CTA: an H200 adds the pair as one 32-bit integer there; "
                "use two scalar atomics, or compare-and-swap",
                away,
            )
    # PTX ISA, atom: add.f32 on global memory flushes subnormal inputs and results, on shared memory it does not.
    ftz = ty == "f32" and isinstance(space, Memory) and not noftz
    if ty == "f64" and op == "add" and isinstance(space, Memory):
        op = "add.raw"
    result: Array | None = space.atomic(addr, base, k, lambda view, at: _update(view, at, op, ty, values, want, ftz))
    return result


def run_vector(
    space: Any, addr: Array, base: Any, k: int, op: str, ty: str, values: tuple[Array, ...], want: bool, noftz: bool
) -> list[Array | None]:
    """Atomics on consecutive elements of global memory, each atomic by itself; the address is aligned to them all."""
    if isinstance(space, Generic):
        outside = np.nonzero(addr >= np.uint64(_TOP))[0]
        if len(outside):
            raise LaneFault(f"a vector atomic outside global memory, at {int(addr[outside[0]]):#x}", outside)
        ((space, _, addr, base),) = space.atomic_parts(addr, base)
    space.place(addr, len(values) << k, True)
    return [
        run(space, addr + np.uint64(i << k), base, k, op, ty, (value,), want, noftz) for i, value in enumerate(values)
    ]


def _update_wide(view: Array, at: Array, op: str, values: tuple[Array, ...]) -> tuple[Array, bool]:
    """exch and cas of 16 bytes, whose places are those of their lower halves among the words of 8 bytes."""
    old = np.empty_like(values[0])
    changed = False
    for i, place in enumerate(at.tolist()):
        before = view[place : place + 2].copy()
        after = values[-1][i] if op == "exch" or bool((before == values[0][i]).all()) else before
        old[i] = before
        changed |= bool((after != before).any())
        view[place : place + 2] = after
    return old, changed


def apply(op: str, ty: str, old: Array, values: tuple[Array, ...], ftz: bool) -> Array:
    """What an atomic stores where `old` was."""
    b = values[0]
    if op == "exch":
        return b
    if op == "cas":
        return np.where(old == b, values[1], old)
    if op == "inc":
        return np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1))
    if op == "dec":
        return np.where((old == 0) | (old > b), b, old - old.dtype.type(1))
    if op == "add.raw":
        # The memory's adder passes a NaN as it is, the operand's before its own; shared memory's is the thread's adder.
        r = alu.add(ty, b, old)
        for each in (old, b):
            r = np.where(np.isnan(each.view(np.float64)), each, r)
        return r
    if ty in _FLOATS:
        if op == "add":
            if ty == "f64":
                return alu.add(ty, b, old)
            return alu.add2(ty, old, b) if ty.endswith("x2") else alu.add(ty, old, b, ftz=ftz)
        pick = alu.minimum if op == "min" else alu.maximum
        if ty.endswith("x2"):
            pick = alu.min2 if op == "min" else alu.max2
        return pick(ty, old, b)
    if ty.startswith("s"):
        signed = f"i{old.dtype.itemsize}"
        return np.asarray(_ACCUMULATE[op](old.view(signed), b.view(signed)).view(old.dtype))
    return np.asarray(_ACCUMULATE[op](old, b))


def _update(
    view: Array, at: Array, op: str, ty: str, values: tuple[Array, ...], want: bool, ftz: bool
) -> tuple[Array | None, bool]:
    n = len(at)
    order = np.argsort(at, kind="stable")
    places = at[order]
    first = np.empty(n, np.bool_)
    first[0] = True
    np.not_equal(places[1:], places[:-1], out=first[1:])
    starts = np.nonzero(first)[0]
    if len(starts) == n:
        old = view[at]
        new = apply(op, ty, old, values, ftz)
        changed = bool((new != old).any())
        if changed:
            view[at] = new
        return (old if want else None), changed
    sorted_values = tuple(value[order] for value in values)
    ends = np.append(starts[1:], n)
    rounds = int((ends - starts).max())
    if op in _ACCUMULATE and ty not in _FLOATS and len(starts) <= rounds:
        old, changed = _by_address(view, places, starts, ends, op, ty, sorted_values[0])
    else:
        old, changed = _by_round(view, places, starts, ends, rounds, op, ty, sorted_values, ftz)
    if not want:
        return None, changed
    result = np.empty_like(old)
    result[order] = old
    return result, changed


def _by_address(
    view: Array, places: Array, starts: Array, ends: Array, op: str, ty: str, b: Array
) -> tuple[Array, bool]:
    dtype = f"i{b.dtype.itemsize}" if ty.startswith("s") else b.dtype
    old = np.empty_like(b)
    changed = False
    for lo, hi in zip(starts.tolist(), ends.tolist(), strict=True):
        line = np.empty(hi - lo + 1, b.dtype)
        line[0] = view[places[lo]]
        line[1:] = b[lo:hi]
        line = _ACCUMULATE[op].accumulate(line.view(dtype), dtype=dtype).view(b.dtype)
        old[lo:hi] = line[:-1]
        changed |= bool((line != line[0]).any())
        view[places[lo]] = line[-1]
    return old, changed


def _by_round(
    view: Array, places: Array, starts: Array, ends: Array, rounds: int, op: str, ty: str, values: tuple[Array, ...],
    ftz: bool,
) -> tuple[Array, bool]:  # fmt: skip
    old = np.empty_like(values[0])
    changed = False
    for i in range(rounds):
        lane = starts + i
        lane = lane[lane < ends]
        place = places[lane]
        before = view[place]
        after = apply(op, ty, before, tuple(value[lane] for value in values), ftz)
        old[lane] = before
        changed |= bool((after != before).any())
        view[place] = after
    return old, changed
