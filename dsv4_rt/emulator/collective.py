"""Warp-wide operations: shfl, vote, match, redux, elect, activemask, and who must be present for them.

`L` holds the batch's lane numbers in order; a warp is 32 neighbours. `mask` has one element or one per lane.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import alu
from dsv4_rt.emulator.memory import LaneFault

Array = npt.NDArray[Any]
U32 = np.uint32
PER_GROUP = frozenset({"clock", "clock_hi", "clock64", "globaltimer", "globaltimer_lo", "globaltimer_hi"})
_ALL = 0xFFFFFFFF


def warp_bits(nlanes: int, lanes: Array, flags: Array | None = None) -> Array:
    """One 32-bit word per warp of the batch with a bit for every lane listed (and flagged)."""
    present = np.zeros(nlanes, np.bool_)
    present[lanes] = True if flags is None else flags
    found: Array = np.packbits(present, bitorder="little").view(U32)
    return found


def _source(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """(lane to read, whether it is in range) by the PTX ISA's rules for shfl."""
    lane, b, c = lane.astype(np.int64), (b & U32(31)).astype(np.int64), c.astype(np.int64)
    segment, clamp = c >> 8 & 31, c & 31
    last = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        j = lane - b
        inside = j >= last
    else:
        first = lane & segment
        j = {"down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        inside = j <= last
    return np.where(inside, j, lane), inside


@lru_cache(maxsize=1024)
def _pattern(mode: str, b: int, c: int) -> tuple[Array, Array]:
    return _source(mode, np.arange(32), np.array([b], U32), np.array([c], U32))


def shuffle_dense(value: Array, mode: str, b: int, c: int) -> Array:
    """shfl.sync of whole warps with constant operands and all lanes named."""
    source, _ = _pattern(mode, b, c)
    return value.reshape(-1, 32).take(source, axis=1).reshape(-1)


def in_range_dense(n: int, mode: str, b: int, c: int) -> Array:
    _, inside = _pattern(mode, b, c)
    return np.tile(inside, n // 32)


def shuffle(nlanes: int, lanes: Array, value: Array, mode: str, b: Array, c: Array, mask: Array) -> tuple[Array, Array]:
    """shfl.sync: (value, predicate). Faults when a lane reads one that is not named or not there."""
    own = (lanes & 31).astype(U32)
    must_name(own, mask)
    source, inside = _source(mode, own, b, c)
    named = (mask >> source.astype(U32)) & U32(1) != 0
    where = np.full(nlanes, -1, np.int64)
    where[lanes] = np.arange(len(lanes))
    at = where[(lanes & ~31) | source]
    wrong = inside & (~named | (at < 0))
    if wrong.any():
        bad = np.nonzero(wrong)[0]
        which = "not in the mask" if not np.broadcast_to(named, wrong.shape)[bad[0]] else "not active"
        raise LaneFault(f"shfl reads lane {int(source[bad[0]])}, which is {which}", bad)
    return value[at], np.broadcast_to(inside, value.shape).copy()


def must_name(own: Array, mask: Array) -> None:
    absent = (mask >> own) & U32(1) == 0
    if absent.any():
        bad = np.nonzero(absent)[0]
        word = int(mask[bad[0] if len(mask) > 1 else 0])
        raise LaneFault(f"a lane takes part that its mask {word:#010x} does not name", bad)


def vote(nlanes: int, lanes: Array, p: Array, mask: Array, mode: str) -> Array:
    """vote.sync: all, any, uni give predicates, ballot a word; only lanes named by the mask count."""
    must_name((lanes & 31).astype(U32), mask)
    warp = lanes >> 5
    yes = warp_bits(nlanes, lanes, p)[warp] & mask
    if mode == "ballot":
        return yes
    members = warp_bits(nlanes, lanes)[warp] & mask
    if mode == "any":
        return yes != 0
    return yes == members if mode == "all" else (yes == members) | (yes == 0)


def match(nlanes: int, lanes: Array, value: Array, mask: Array, mode: str) -> tuple[Array, Array]:
    """match.sync: (mask of lanes with an equal value, predicate); for `all` 0 unless every value is equal."""
    own = (lanes & 31).astype(U32)
    must_name(own, mask)
    mask = np.broadcast_to(mask, lanes.shape)
    warps, table, present = _table(nlanes, lanes, value)
    row = warps[lanes]
    named = present[row] & ((mask[:, None] >> np.arange(32, dtype=U32)) & U32(1)).astype(np.bool_)
    same = (table[row] == value[:, None]) & named
    bits: Array = np.packbits(same, axis=1, bitorder="little").view(U32)[:, 0]
    if mode == "any":
        return bits, np.ones(len(lanes), np.bool_)
    every = (same == named).all(axis=1)
    return np.where(every, bits, U32(0)), every


def _table(nlanes: int, lanes: Array, value: Array) -> tuple[Array, Array, Array]:
    """(row of each lane's warp, values [warps, 32], presence [warps, 32])."""
    table = np.zeros(nlanes, value.dtype)
    table[lanes] = value
    present = np.zeros(nlanes, np.bool_)
    present[lanes] = True
    return np.arange(nlanes) >> 5, table.reshape(-1, 32), present.reshape(-1, 32)


_IDENTITY = {
    ("min", "u32"): 0xFFFFFFFF, ("max", "u32"): 0, ("min", "s32"): 0x7FFFFFFF, ("max", "s32"): 0x80000000,
    ("and", "b32"): _ALL, ("or", "b32"): 0, ("xor", "b32"): 0, ("add", "u32"): 0, ("add", "s32"): 0,
}  # fmt: skip
_FOLD: dict[str, np.ufunc] = {
    "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "add": np.add,
}  # fmt: skip


def redux(nlanes: int, lanes: Array, value: Array, mask: Array, op: str, ty: str, absolute: bool, nan: bool) -> Array:
    """redux.sync over the lanes of a warp that share a mask."""
    must_name((lanes & 31).astype(U32), mask)
    if ty == "f32":
        return _redux_f32(nlanes, lanes, value, mask, op, absolute, nan)
    dtype = np.int32 if ty == "s32" else U32
    ty = "b32" if op in ("and", "or", "xor") else ty
    empty = np.array(_IDENTITY[op, ty], U32).view(dtype)
    rows, table, present = _table(nlanes, lanes, value.view(dtype))
    if len(mask) == 1:
        named = (int(mask[0]) >> np.arange(32)) & 1 == 1
        folded = _FOLD[op].reduce(np.where(present & named, table, empty), axis=1, dtype=dtype)
        return np.asarray(folded[rows[lanes]].view(U32))
    row = rows[lanes]
    members = present[row] & ((mask[:, None] >> np.arange(32, dtype=U32)) & U32(1)).astype(np.bool_)
    return np.asarray(_FOLD[op].reduce(np.where(members, table[row], empty), axis=1, dtype=dtype).view(U32))


def _redux_f32(nlanes: int, lanes: Array, value: Array, mask: Array, op: str, absolute: bool, nan: bool) -> Array:
    if absolute:
        value = alu.abs_("f32", value)
    pick = alu.minimum if op == "min" else alu.maximum
    rows, table, present = _table(nlanes, lanes, value)
    row = rows[lanes]
    mask = np.broadcast_to(mask, lanes.shape)
    members = present[row] & ((mask[:, None] >> np.arange(32, dtype=U32)) & U32(1)).astype(np.bool_)
    # A lane that does not take part repeats the reader's own value, which changes neither minimum nor maximum.
    columns = np.where(members, table[row], value[:, None])
    total = value
    for i in range(32):
        total = pick("f32", total, np.ascontiguousarray(columns[:, i]), nan=nan)
    return total


def elect(nlanes: int, lanes: Array, mask: Array) -> tuple[Array, Array]:
    """elect.sync: (leader, whether this lane leads); the leader is the lowest lane named that is there."""
    own = (lanes & 31).astype(U32)
    must_name(own, mask)
    members = warp_bits(nlanes, lanes)[lanes >> 5] & mask
    lowest = members & (~members + U32(1))
    leader = alu.bfind("u32", lowest)
    return leader, leader == own


def active_mask(nlanes: int, lanes: Array) -> Array:
    return warp_bits(nlanes, lanes)[lanes >> 5]


def complete(nlanes: int, lanes: Array, mask: Array, alive: Array) -> Array:
    """Which of the waiting lanes may go on: all live lanes their mask names in their warp are waiting too."""
    present, living = warp_bits(nlanes, lanes), warp_bits(nlanes, np.nonzero(alive)[0])
    warp = lanes >> 5
    found: Array = mask & living[warp] & ~present[warp] == 0
    return found
