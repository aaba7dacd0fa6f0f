"""Asynchronous copies without tensor maps: what cp.async, cp.async.bulk and cp.reduce.async.bulk do.

Bulk copies are issued by one thread each, so they are handled lane by lane; cp.async moves up to 16 bytes a lane and is
one operation of all lanes of the instruction. The global side is checked for bounds and write access at issue; races on
global memory between asynchronous operations and threads are not looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import atomics
from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
I64, U8 = np.int64, np.uint8


def _nothing() -> None:
    """An op's read that has nothing to take."""


# cp.async: lanes at once, in the generic proxy.


def copy_async(
    batch: Batch, lanes: Array, line: int, to: Array, generic_to: bool, source: Array, size: int, valid: Array | None
) -> None:
    """cp.async of `size` bytes a lane; `valid` bytes come from memory and the rest are zeros."""
    engine, what = batch.engine, "cp.async"
    cta, offset = engine.locate(lanes, to, size, size, generic_to, f"{what} destination")
    places = cta * batch.shared.stride + (offset - SHARED_FIRST)
    lengths = np.full(len(lanes), size, I64)
    if valid is not None:
        lengths = np.broadcast_to(valid, lanes.shape).astype(I64)
        wrong = np.nonzero(lengths > size)[0]
        if len(wrong):
            raise LaneFault(f"{what}: a source size of {int(lengths[wrong[0]])} of {size} bytes", wrong)
    if int(np.bitwise_or.reduce(source)) & (size - 1):
        bad = np.nonzero(source & source.dtype.type(size - 1))[0]
        raise LaneFault(f"{what}: global address {int(source[bad[0]]):#x} is not a multiple of {size}", bad)
    whole = np.nonzero(lengths == size)[0]
    part = np.nonzero((lengths < size) & (lengths > 0))[0]
    batch.races.touch(lanes, line, 0)
    _check_source(batch, source, whole, part, lengths, size)
    k = min(3, size.bit_length() - 1)

    def read() -> Array:
        data = np.zeros((len(lanes), size), U8)
        if len(whole):
            batch.races.touch(lanes[whole], line, 0)
            words = batch.memory.load_vector(source[whole], None, k, size >> k)
            data[whole] = np.stack(words, axis=1).view(U8)
        for i in part.tolist():
            address, length = int(source[i]), int(lengths[i])
            data[i, :length] = batch.memory.span(address, length, False)
        return data

    def write(data: Array) -> None:
        view = np.ascontiguousarray(data).view(f"u{1 << k}")
        for j in range(size >> k):
            batch.shared.views[k][(places >> k) + j] = view[:, j]
            batch.shared.written[k][(places >> k) + j] = 0x0101010101010101 & (1 << 8 * (1 << k)) - 1
        batch.shared.version += 1

    op = Op(what, line, int(lanes[0]), [], [], read, write, proxy="generic", group=what)
    engine.issue_pieces(op, lanes, places, size)


def _check_source(batch: Batch, source: Array, whole: Array, part: Array, lengths: Array, size: int) -> None:
    """Bounds of what will be read, while the instruction is known."""
    for at, last, nbytes in ((whole, None, size), (part, None, 1), (part, lengths, 1)):
        if not len(at):
            continue
        addr = source[at] if last is None else source[at] + (last[at] - 1).astype(source.dtype)
        try:
            batch.memory.place(addr, nbytes, False)
        except LaneFault as error:
            raise LaneFault(error.what, at[error.bad]) from None


def arrive_after_copies(batch: Batch, lanes: Array, line: int, addr: Array, generic: bool, counted: bool) -> None:
    """cp.async.mbarrier.arrive: arrive when all cp.async that each lane has issued so far are complete."""
    at = batch.mbarriers.promise(lanes, addr, generic, counted)
    ops = batch.engine.release_pieces("cp.async", lanes)

    def signal() -> None:
        for op in ops:
            batch.engine.finish(op)
        batch.mbarriers.arrive_later(lanes, at, ops)

    kind = "cp.async.mbarrier.arrive"
    batch.engine.schedule(Op(kind, line, int(lanes[0]), [], [], _nothing, lambda data: None, signal, proxy="generic"))


# Bulk copies: one thread each, in the async proxy.


def bulk_load(
    batch: Batch, lanes: Array, line: int, to: Array, source: Array, size: Array, barrier: Array, masks: Array | None
) -> None:
    """cp.async.bulk from global memory to shared memory, with complete_tx on an mbarrier beside the destination.

    masks: CTAs of the cluster that all get the bytes, at the same offsets, each reporting to its own mbarrier.
    """
    what = "cp.async.bulk"

    def one(i: int, lane: Array, nbytes: int) -> None:
        address = int(source[i])
        _multiple_of_16(what, address, nbytes)
        data = batch.memory.span(address, nbytes, False)
        targets = shared_targets(batch, lane, to[i : i + 1], barrier[i : i + 1], nbytes, masks, i, what)
        spans = [span for span, _ in targets]

        def write(got: Array) -> None:
            for span in spans:
                batch.engine.fill(span, got)

        barriers = [(position, nbytes) for _, position in targets]
        batch.engine.issue(Op(what, line, int(lane[0]), [], spans, data.copy, write, barriers=barriers))

    _each_lane(lanes, size, one)


def shared_targets(
    batch: Batch, lane: Array, to: Array, barrier: Array, nbytes: int, masks: Array | None, i: int, what: str
) -> list[tuple[Span, int]]:
    """(destination, position of its mbarrier) for one lane's copy, or for each CTA of its multicast mask."""
    engine = batch.engine
    ctas, offsets = engine.locate(lane, to, nbytes, 16, False, f"{what} destination")
    owners, bars = engine.locate(lane, barrier, 8, 8, False, f"{what} mbarrier")
    cta, offset, bar = int(ctas[0]), int(offsets[0]), int(bars[0])
    if masks is None:
        return [(Span(cta, offset, offset + nbytes), batch.mbarriers.position(int(owners[0]), bar))]
    mask, first = int(masks[i if len(masks) > 1 else 0]), cta // batch.cluster_size * batch.cluster_size
    if not mask or mask >> batch.cluster_size:
        raise LaneFault(f"{what}: ctaMask {mask:#06x} in a cluster of {batch.cluster_size}", np.zeros(1, I64))
    named = [first + rank for rank in range(batch.cluster_size) if mask >> rank & 1]
    return [(Span(each, offset, offset + nbytes), batch.mbarriers.position(each, bar)) for each in named]


def bulk_store(
    batch: Batch, lanes: Array, line: int, to: Array, source: Array, size: Array, mask: Array | None = None,
    op: str = "", ty: str = "",
) -> None:  # fmt: skip
    """cp.async.bulk, or with `op` cp.reduce.async.bulk, from shared memory to global memory, in a bulk group.

    mask: which bytes of every 16 are written.
    """
    what = "cp.reduce.async.bulk" if op else "cp.async.bulk"

    def one(i: int, lane: Array, nbytes: int) -> None:
        address = int(to[i])
        _multiple_of_16(what, address, nbytes)
        target = batch.memory.span(address, nbytes, True)
        span = _source(batch, lane, source[i : i + 1], nbytes, what)
        bits = None if mask is None else int(mask[i if len(mask) > 1 else 0])

        def write(got: Array) -> None:
            if op:
                target[:] = reduce(op, ty, target, got, True)
            elif bits is None:
                target[:] = got
            else:
                rows = np.array([bits >> byte & 1 for byte in range(16)], np.bool_)
                target.reshape(-1, 16)[:, rows] = got.reshape(-1, 16)[:, rows]
            batch.memory.mark_written(address, nbytes)
            batch.memory.version += 1

        batch.engine.issue(
            Op(what, line, int(lane[0]), [span], [], lambda: batch.engine.take(span), write, group="bulk")
        )

    _each_lane(lanes, size, one)


def bulk_remote(
    batch: Batch, lanes: Array, line: int, to: Array, source: Array, size: Array, barrier: Array, op: str = "",
    ty: str = "",
) -> None:  # fmt: skip
    """cp.async.bulk or cp.reduce.async.bulk from shared memory to that of a CTA of the cluster, and its mbarrier."""
    what = "cp.reduce.async.bulk" if op else "cp.async.bulk"

    def one(i: int, lane: Array, nbytes: int) -> None:
        _multiple_of_16(what, 0, nbytes)
        if batch.clusters is None:
            why = "to shared::cluster from shared memory is an illegal instruction in a launch without clusters"
            raise LaneFault(f"{what} {why}; launch with a cluster, if only of one CTA", np.zeros(1, I64))
        ((target, position),) = shared_targets(batch, lane, to[i : i + 1], barrier[i : i + 1], nbytes, None, i, what)
        span = _source(batch, lane, source[i : i + 1], nbytes, what)

        def write(got: Array) -> None:
            value = reduce(op, ty, batch.engine.take(target), got, False) if op else got
            batch.engine.fill(target, value)

        batch.engine.issue(
            Op(what, line, int(lane[0]), [span], [target], lambda: batch.engine.take(span), write,
               barriers=[(position, nbytes)])
        )  # fmt: skip

    _each_lane(lanes, size, one)


def prefetch(lanes: Array, address: Array, size: Array) -> None:
    """cp.async.bulk.prefetch.L2: nothing but the rules."""

    def one(i: int, lane: Array, nbytes: int) -> None:
        _multiple_of_16("cp.async.bulk.prefetch", int(address[i]), nbytes)

    _each_lane(lanes, size, one)


def _each_lane(lanes: Array, size: Array, one: Callable[[int, Array, int], None]) -> None:
    """Call one(position, its lane, its bytes) for lanes whose size is not 0; its faults are those of the position."""
    sizes = np.broadcast_to(size, lanes.shape).tolist()
    for i, nbytes in enumerate(sizes):
        if not nbytes:
            continue
        try:
            one(i, lanes[i : i + 1], nbytes)
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def _source(batch: Batch, lane: Array, addr: Array, nbytes: int, what: str) -> Span:
    ctas, offsets = batch.engine.locate(lane, addr, nbytes, 16, False, f"{what} source")
    return Span(int(ctas[0]), int(offsets[0]), int(offsets[0]) + nbytes)


def _multiple_of_16(what: str, address: int, nbytes: int) -> None:
    if address & 15:
        raise LaneFault(f"{what}: global address {address:#x} is not a multiple of 16", np.zeros(1, I64))
    if nbytes & 15:
        raise LaneFault(f"{what}: a size of {nbytes} bytes is not a multiple of 16", np.zeros(1, I64))


def reduce(op: str, ty: str, old: Array, new: Array, in_global: bool) -> Array:
    """The bytes of op(old, new), element by element.

    As an H200 does it: add.f32 keeps subnormals, unlike red; add.f64 in global memory passes a NaN on as it is.
    """
    width = {"f16": 2, "bf16": 2}.get(ty) or int(ty[1:]) // 8
    a, b = (np.frombuffer(each.tobytes(), f"u{width}") for each in (old, new))
    if ty == "f64" and in_global:
        op = "add.raw"
    found: Array = atomics.apply(op, ty, a, (b,), False)
    return np.ascontiguousarray(found).view(U8)
