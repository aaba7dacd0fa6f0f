"""TMA: tiles of tensors between global and shared memory, as the operations of the asynchronous engine.

A tile is the box of a tensor map at given coordinates. In global memory it is a strided view, clipped to the tensor;
elements outside read as zero or NaN and are not written. In shared memory it is a list of 16-byte chunks, one row of
the box after the other, permuted by the swizzle; the list depends only on the map and on the low bits of the start, and
is kept. Both sides are one NumPy copy.

What an H200 showed and the PTX ISA leaves open: with a swizzle a row takes a whole pattern row of shared memory however
short it is; the swizzle works on absolute shared addresses; the coordinate along the contiguous axis must be a multiple
of 16 bytes, coordinates of stores must not be negative (else an illegal instruction); a load is clipped to elements, a
store to 16 bytes, so that it writes up to 15 bytes beyond a row that is no multiple of 16; NaN fill is the bits 0x7ff7;
tf32 rounds to nearest even, and every NaN becomes 0x7fffe000.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from dsv4_rt.emulator import tensormap
from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.copies import reduce
from dsv4_rt.emulator.descriptors import swizzle
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault
from dsv4_rt.emulator.tensormap import PADDED, SWIZZLES, TileMap
from dsv4_rt.errors import EmulatorError, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
KIND, REDUCE = "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor"
PATTERN = 1024  # bytes after which every swizzle repeats
NAN_FILL = 0x7FF7  # in every 16 bits
MAX_SPANS = 64  # more separate stretches of a tile are told to the checks as one
CHUNK = np.complex128  # 16 bytes that NumPy moves as one; nobody computes with them
_FULL = np.uint64(0x0101010101010101)  # "written" flags of 8 bytes
# Reduction -> element types it takes; the rest stops an H200 with an illegal instruction.
REDUCTIONS: dict[str, tuple[str, ...]] = {
    "add": ("u32", "s32", "u64", "f16", "bf16", "f32", "f64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64", "f16", "bf16")),
    **dict.fromkeys(("and", "or", "xor"), ("u32", "s32", "u64")),
    **dict.fromkeys(("inc", "dec"), ("u32",)),
}


@dataclass(frozen=True)
class Chunks:
    """Where the 16-byte chunks of a tile lie: numbers relative to the pattern's start, and the bytes they span."""

    at: Array
    runs: tuple[tuple[int, int], ...]  # contiguous byte ranges [lo, hi)
    end: int  # the last byte + 1
    whole: bool  # the ranges have no holes


@lru_cache(maxsize=1024)
def chunks(rows: int, row_bytes: int, width: int, start: int) -> Chunks:
    """The chunks of a tile that starts `start` bytes into a pattern."""
    pitch = width or row_bytes
    linear = start + pitch * np.arange(rows)[:, None] + 16 * np.arange(row_bytes // 16)[None, :]
    at = swizzle(linear.reshape(-1), width) >> 4
    at.flags.writeable = False
    order = np.sort(at)
    breaks = np.nonzero(np.diff(order) != 1)[0]
    whole = len(breaks) < MAX_SPANS
    if not whole:
        breaks = breaks[:0]
    first = order[np.concatenate([[0], breaks + 1])] * 16
    last = order[np.concatenate([breaks, [len(order) - 1]])] * 16 + 16
    return Chunks(at, tuple(zip(first.tolist(), last.tolist(), strict=True)), int(order[-1]) * 16 + 16, whole)


@dataclass(frozen=True)
class Box:
    """A box of a tensor at coordinates, clipped: its global bytes, and which of the box's bytes they are."""

    first: int  # address of the first byte inside
    nbytes: int  # to the end of the last; 0 where all is outside
    shape: tuple[int, ...]  # of the bytes inside, the contiguous axis last
    strides: tuple[int, ...]
    inside: tuple[slice, ...]  # their place in the box
    box: tuple[int, ...]  # of all bytes of the box


def clip(m: TileMap, coords: tuple[int, ...], out: bool = False) -> Box:
    """The part of a box that lies in the tensor; of a box that goes out, to whole 16 bytes.

    Raises:
        LaneFault: the first coordinate is not a multiple of 16 bytes, or one of a box that goes out is negative.
    """
    if out and min(coords) < 0:
        raise _fault(f"the coordinates {coords} of a store: negative ones are for loads only")
    if m.dtype in PADDED and coords[0] % 128:
        raise _fault(f"the coordinate {coords[0]} of the contiguous axis, of {m.dtype}, is not a multiple of 128")
    if coords[0] * m.bits % 128:
        raise _fault(
            f"the coordinate {coords[0]} of the contiguous axis, of {m.dtype}, is {coords[0] * m.bits / 8:g} B, "
            "not a multiple of 16 B"
        )
    bits = m.bits
    first, shape, strides, inside, box = m.address, [], [], [], []
    extent = 0
    for axis in range(m.rank):
        step = m.element_strides[axis] if axis else 1
        lo = max(0, -(coords[axis] // step))
        hi = min(m.counts[axis], -((coords[axis] - m.shape[axis]) // step))
        if hi <= lo:
            return Box(m.address, 0, (), (), (), _box(m))
        if axis == 0:
            if out:
                per_chunk = 128 // bits
                hi = min(m.counts[0], -(-hi // per_chunk) * per_chunk)
            first += (coords[0] + lo) * bits // 8
            shape.append((hi - lo) * bits // 8)
            strides.append(1)
            inside.append(slice(lo * bits // 8, hi * bits // 8))
            box.append(m.packed_bytes)
            extent = shape[0]
        else:
            stride = m.strides[axis - 1]
            first += (coords[axis] + lo * step) * stride
            shape.append(hi - lo)
            strides.append(stride * step)
            inside.append(slice(lo, hi))
            box.append(m.counts[axis])
            extent += (hi - lo - 1) * stride * step
    return Box(
        first, extent, tuple(shape[::-1]), tuple(strides[::-1]), tuple(inside[::-1]), tuple(box[::-1])
    )  # fmt: skip


def _box(m: TileMap) -> tuple[int, ...]:
    return (*m.counts[:0:-1], m.packed_bytes)


def overlaps(tile: Box) -> bool:
    """Whether a byte of the tile may have more than one place in the box."""
    reach = 0
    for stride, n in sorted(zip(tile.strides, tile.shape, strict=True)):
        if n > 1 and stride <= reach:
            return True
        reach += stride * (n - 1)
    return False


def _view(batch: Batch, tile: Box, write: bool) -> Array:
    """The clipped tile in global memory, in place, as bytes."""
    return as_strided(batch.memory.span(tile.first, tile.nbytes, write), tile.shape, tile.strides)


def gather(batch: Batch, m: TileMap, tile: Box) -> Array:
    """The bytes of a box, elements outside filled."""
    if m.oob_fill == "nan":
        found = np.full(tile.box[:-1] + (tile.box[-1] // 2,), NAN_FILL, np.uint16).view(np.uint8)
    else:
        found = np.zeros(tile.box, np.uint8)
    if tile.nbytes:
        view = _view(batch, tile, False)
        batch.memory.check_written(view, max(1, m.bits // 8))
        found[tile.inside] = view
        if m.dtype == "tf32":
            part = np.ascontiguousarray(found[tile.inside]).view(np.uint32)
            found[tile.inside] = to_tf32(part).view(np.uint8)
    if m.dtype in PADDED:
        used = PADDED[m.dtype]
        padded = np.full((found.size // used, 16), 0xFF, np.uint8)
        padded[:, :used] = found.reshape(-1, used)
        return padded
    return found


def to_tf32(bits: Array) -> Array:
    """fp32 to tf32, to nearest even; every NaN the same."""
    rounded = (bits + np.uint32(0xFFF) + (bits >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = np.where(magnitude == 0x7F800000, bits, rounded)
    return np.asarray(np.where(magnitude > 0x7F800000, np.uint32(0x7FFFE000), rounded))


# Instructions.


def load(
    batch: Batch, lanes: Array, line: int, to: Array, barrier: Array, tensor: Array, coords: tuple[Array, ...],
    masks: Array | None, paired: bool = False,
) -> None:  # fmt: skip
    """cp.async.bulk.tensor from global to shared memory.

    masks: CTAs of the cluster that all get the tile, at the same offsets, each reporting to its own mbarrier.
    paired: cta_group::2: the mbarrier may be that of the other CTA of the pair; of a multicast each tile reports to the
        CTA of its pair whose rank is as odd as that of the mbarrier named.
    """
    engine = batch.engine
    for i in range(len(lanes)):
        one = slice(i, i + 1)
        try:
            m = map_at(batch, int(tensor[i]), len(coords))
            tile = clip(m, _signed(coords, i))
            if tile.nbytes:
                batch.memory.span(tile.first, tile.nbytes, False)
            cta, start, where = _locate(batch, lanes[one], to[one], m, f"{KIND} destination")
            (owner,), (bar,) = engine.locate(lanes[one], barrier[one], 8, 8, False, f"{KIND} mbarrier")
            _check_home(batch, cta, int(owner), paired, masks is not None)
            targets = [(cta, int(owner))]
            if masks is not None:
                targets = [(each, each) for each in _named(batch, int(lanes[i]), int(masks[i]))]
            if masks is not None and paired:
                targets = [(each, each & ~1 | int(owner) & 1) for each, _ in targets]
            spans, barriers = [], []
            for each, home in targets:
                if batch.clusters is not None:
                    batch.clusters.touch(lanes[[i, i]], np.array([each, home]), line)
                at = batch.mbarriers.position(home, int(bar))
                batch.mbarriers.find(at, lanes[one], slice(None), KIND)
                spans += [Span(each, start + lo, start + hi) for lo, hi in where.runs]
                barriers += [(at, 0)] * (len(where.runs) - 1) + [(at, m.transaction_bytes)]

            def read(m: TileMap = m, tile: Box = tile) -> Array:
                return gather(batch, m, tile)

            def write(
                data: Array, m: TileMap = m, targets: list[tuple[int, int]] = targets, start: int = start,
                where: Chunks = where,
            ) -> None:
                for each, _ in targets:
                    _fill(batch, each, start, where, data, line, m)

            engine.issue(Op(KIND, line, int(lanes[i]), [], spans, read, write, barriers=barriers))
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def store(
    batch: Batch, lanes: Array, line: int, source: Array, tensor: Array, coords: tuple[Array, ...], op: str = ""
) -> None:
    """cp.async.bulk.tensor from shared to global memory, or cp.reduce.async.bulk.tensor with an operation."""
    engine, kind = batch.engine, REDUCE if op else KIND
    for i in range(len(lanes)):
        one = slice(i, i + 1)
        try:
            m = map_at(batch, int(tensor[i]), len(coords))
            if m.dtype in PADDED:
                raise UnsupportedInstruction(f"{kind}: a store of {m.dtype} is not implemented by the emulator")
            if op and m.dtype not in REDUCTIONS[op]:
                raise _fault(f"{REDUCE}.{op} of {m.dtype}; it takes {', '.join(REDUCTIONS[op])}")
            tile = clip(m, _signed(coords, i), True)
            if op and overlaps(tile):
                what = f"{REDUCE}.{op} to a tensor whose elements overlap is not implemented by the emulator"
                raise UnsupportedInstruction(what)
            if tile.nbytes:
                batch.memory.span(tile.first, tile.nbytes, True)
            cta, start, where = _locate(batch, lanes[one], source[one], m, f"{kind} source")
            spans = [Span(cta, start + lo, start + hi) for lo, hi in where.runs]

            def read(cta: int = cta, start: int = start, where: Chunks = where, tile: Box = tile) -> Array:
                return _take(batch, cta, start, where, tile)

            def write(data: Array, m: TileMap = m, tile: Box = tile) -> None:
                _put(batch, m, tile, data, op)

            engine.issue(Op(kind, line, int(lanes[i]), spans, [], read, write, group="bulk"))
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def prefetch(batch: Batch, lanes: Array, tensor: Array, coords: tuple[Array, ...]) -> None:
    """cp.async.bulk.prefetch.tensor: only its operands are checked."""
    for i in range(len(lanes)):
        try:
            clip(map_at(batch, int(tensor[i]), len(coords)), _signed(coords, i))
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def replace(space: Any, address: Array, base: Any, field: str, axis: int, values: Array) -> None:
    """tensormap.replace: one field of a map in memory."""
    words = [np.stack(space.load_vector(address + address.dtype.type(64 * i), base, 3, 8), 1) for i in (0, 1)]
    records = np.concatenate(words, 1)
    values = np.broadcast_to(values, address.shape)
    for i, record in enumerate(records):
        try:
            new = tensormap.replace(record.tobytes(), field, int(values[i]), axis)
        except EmulatorError as error:
            raise LaneFault(str(error), np.array([i])) from None
        records[i] = np.frombuffer(new, np.uint64)
    for i in (0, 1):
        parts = [records[:, 8 * i + j] for j in range(8)]
        space.store_vector(address + address.dtype.type(64 * i), base, parts, 3)


def copy_map(source: Any, at: Array, base: Any, to_space: Any, to: Array, to_base: Any) -> None:
    """tensormap.cp_fenceproxy: the 128 bytes of a map, which all lanes of a warp copy alike."""
    for i in (0, 1):
        words = source.load_vector(at + at.dtype.type(64 * i), base, 3, 8)
        to_space.store_vector(to + to.dtype.type(64 * i), to_base, words, 3)


# Parts.


def map_at(batch: Batch, address: int, rank: int) -> TileMap:
    """The tensor map at an address in global, constant or parameter memory."""
    if address % tensormap.ALIGN:
        raise _fault(f"the tensor map at {address:#x} is not aligned to {tensormap.ALIGN} B")
    if address >> 47:
        raise _fault(f"the tensor map at {address:#x} is not in global, constant or parameter memory")
    record = batch.memory.span(address, tensormap.NBYTES, False).tobytes()
    try:
        m = tensormap.decode(record)
    except EmulatorError as error:
        raise _fault(str(error)) from None
    if m.rank != rank:
        raise _fault(f"{rank} coordinates for a tensor map of rank {m.rank}")
    return m


def _locate(batch: Batch, lane: Array, address: Array, m: TileMap, what: str) -> tuple[int, int, Chunks]:
    """(CTA of the batch, shared offset of the pattern's start, chunks) of a lane's tile in shared memory."""
    (cta,), (offset,) = batch.engine.locate(lane, address, 1, 128, False, what)
    inside = int(offset) % PATTERN
    where = chunks(m.rows, m.row_bytes, SWIZZLES[m.swizzle], inside)
    start = int(offset) - inside
    if start + where.end > SHARED_FIRST + batch.shared.size:
        size = start + where.end - int(offset)
        batch.engine.locate(lane, address, size, 128, False, what)  # says what is out of bounds
    return int(cta), start, where


def _check_home(batch: Batch, cta: int, owner: int, paired: bool, multicast: bool) -> None:
    """The mbarrier lies in the CTA of the destination, or with cta_group::2 in that of its pair."""
    size = batch.cluster_size
    if paired and size % 2:
        raise _fault(f"{KIND}.cta_group::2 in a launch without clusters of an even number of CTAs")
    if not multicast and owner != cta and not (paired and owner == cta ^ 1):
        wanted = "it or the other of its pair" if paired else "it; another of the pair needs .cta_group::2"
        raise _fault(f"{KIND} to rank {cta % size} with an mbarrier of rank {owner % size}: {wanted} is wanted")


def _named(batch: Batch, lane: int, mask: int) -> list[int]:
    """The CTAs of the batch that a multicast mask names."""
    size = batch.cluster_size
    first = int(batch.cta[lane]) // size * size
    named = [rank for rank in range(16) if mask >> rank & 1]
    if not named or named[-1] >= size:
        raise _fault(f"{KIND}: ctaMask {mask:#06x} in a cluster of {size} CTAs")
    return [first + rank for rank in named]


def _signed(coords: tuple[Array, ...], i: int) -> tuple[int, ...]:
    return tuple(int(np.int32(int(c[i]) - (int(c[i]) >> 31 << 32))) for c in coords)


def _places(batch: Batch, cta: int, start: int, where: Chunks) -> Array:
    """The chunks' numbers in the batch's shared memory."""
    found: Array = where.at + ((cta * batch.shared.stride + start - SHARED_FIRST) >> 4)
    return found


def _fill(batch: Batch, cta: int, start: int, where: Chunks, data: Array, line: int, m: TileMap) -> None:
    shared, at = batch.shared, _places(batch, cta, start, where)
    shared.views[3].view(CHUNK)[at] = data.reshape(-1).view(CHUNK)
    if shared.tiles is not None:
        shared.tiles.put(at, line, m.row_bytes if SWIZZLES[m.swizzle] else 0, m.dtype)
    begin = cta * shared.stride + start - SHARED_FIRST
    if m.dtype in PADDED:
        used = np.arange(16) < PADDED[m.dtype]
        shared.written[3].reshape(-1, 2)[at] = used.astype(np.uint8).view(np.uint64)
    elif where.whole:
        for lo, hi in where.runs:
            shared.written[3][begin + lo >> 3 : begin + hi >> 3] = _FULL
    else:
        shared.written[3].reshape(-1, 2)[at] = _FULL
    shared.version += 1


def _take(batch: Batch, cta: int, start: int, where: Chunks, tile: Box) -> Array:
    """The bytes of a box from shared memory; those that go somewhere must have been written."""
    at, shared = _places(batch, cta, start, where), batch.shared
    if tile.nbytes:
        flags = shared.written[3].view(CHUNK)[at].view(np.uint64)
        if not bool((flags == _FULL).all()):
            missing = flags.view(np.uint8).reshape(tile.box)[tile.inside] == 0
            if missing.any():
                raise _fault(f"{KIND} reads uninitialised shared memory: {int(missing.sum())} bytes of its tile")
    found: Array = shared.views[3].view(CHUNK)[at].view(np.uint8).reshape(tile.box)
    return found


def _put(batch: Batch, m: TileMap, tile: Box, data: Array, op: str) -> None:
    if not tile.nbytes:
        return
    view, part = _view(batch, tile, True), data[tile.inside]
    if op:
        part = reduce(op, m.dtype, view, part, True).reshape(part.shape)
    view[...] = part
    batch.memory.mark_written(tile.first, tile.nbytes)
    batch.memory.version += 1


def _fault(what: str) -> LaneFault:
    return LaneFault(what, np.zeros(1, np.int64))
