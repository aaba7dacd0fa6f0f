"""Launchers of the kv kernels: docstring, checks, tuning, launch; nearly half of it is docstrings.

A cache is given as `pages`, uint8 [P, page bytes]: what `KVPool.view(layer, cache)` returns. Its record ("v4" or
"split") and entries a page say what the bytes mean (dsv4_rt/memory/layout.py). Page 0 is the null page, zeroed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dsv4_rt.arrays import I32, I64, U8, View
from dsv4_rt.checks import Arg, check_range, check_scale, match
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16
from dsv4_rt.launch import POINTER, load
from dsv4_rt.operation import Call, Instance, Operation, Plan

DIMS: Final = 512  # of a record
RECORDS: Final = {"v4": ("V4", 584), "split": ("Split", 580)}  # the kernels' name, bytes an entry
KEY_DIMS: Final = 128  # of an index key
INDEX_KEYS: Final = {"nvfp4": ("Nvfp4", 72), "mxfp4": ("Mxfp4", 68), "fp8": ("Fp8", 132)}  # likewise
VECTOR: Final = 16  # bytes: what the widest access takes
ENTRIES: Final = 64  # a page of the csa and window caches
HCA_ENTRIES: Final = 2


def gather_kv(
    topk_indices: Any,
    block_table: Any,
    pages: Any,
    *,
    record: str = "v4",
    entries: int = ENTRIES,
    row: Any = None,
    out: Any = None,
    stream: Any = None,
    pdl: bool = False,
) -> Any:
    """Chosen records of each token's sequence, dequantised to dense bf16 rows.

        page, e   = block_table[row[t], topk_indices[t, j] // entries], topk_indices[t, j] % entries
        out[t, j] = bf16(e4m3(codes[page, e]) * scale[page, e]) for 448 dimensions, then the 64 bf16 ones as they lie

    Index -1, or one outside the table, gives zeros; so do a row outside 0 .. B-1 and a page id outside the pool (the
    null page). A NaN code or scale gives NaN, 0x7fff. Bit-exact. No entry is read that no index names.
    Source: DeepSeek-V4 inference reference, sparse attention; FlashMLA tests/quant.py for the v4 page.

    Args:
        topk_indices: [T, k] int32, entries of the sequence's cache; rows may be strided.
        block_table: [B, max_blocks] int32, page ids; rows may be strided. Up to 1,024 blocks spare a dependent load.
        pages: [P, page bytes] uint8, 16 B aligned; pages may be strided, by a multiple of 16 B.
        record: "v4" or "split".
        entries: a page: 64 (csa, window), 2 (hca), or another number.
        row: [T] int32, the table row of each token; token t has row t if None.
        out: [T, k, 512] bfloat16 to write into, 16 B aligned; tokens and entries may be strided, by a multiple of 8.
            Allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        [T, k, 512] bfloat16.

    Raises:
        ArgumentError: a shape, dtype, layout or record is not the one above.

    Traffic: reads 584 (v4) or 580 (split) B and 4 B of index a record, the token's row of the table for every 8 to 32
    records (4 B a record where max_blocks > 1024), writes 1024 B.
    """
    outs = None if out is None else (out,)
    return _GATHER_KV((topk_indices, block_table, row, pages), outs, (record, entries, pdl), stream)[0]


def gather_kv_slots(
    slots: Any,
    pages: Any,
    *,
    record: str = "v4",
    entries: int = ENTRIES,
    out: Any = None,
    stream: Any = None,
    pdl: bool = False,
) -> Any:
    """`gather_kv` for resolved slots: the same records and bits, no block table.

        page, e   = slots[t, j] // entries, slots[t, j] % entries
        out[t, j] = as gather_kv

    A slot outside 0 .. P * entries - 1 gives zeros, -1 above all.

    Args:
        slots: [T, k] int32 or int64; rows may be strided.
        pages, record, entries, out, stream, pdl: as gather_kv.

    Returns:
        [T, k, 512] bfloat16.

    Raises:
        ArgumentError: a shape, dtype, layout or record is not the one above.

    Traffic: reads 584 (v4) or 580 (split) B and a slot a record, writes 1024 B.
    """
    outs = None if out is None else (out,)
    return _GATHER_KV_SLOTS((slots, pages), outs, (record, entries, pdl), stream)[0]


def append_kv(
    x: Any,
    slots: Any,
    pages: Any,
    *,
    record: str = "v4",
    entries: int = ENTRIES,
    stream: Any = None,
    pdl: bool = False,
) -> None:
    """Quantise KV entries into records of a paged cache, in place.

        v4     per 64 dimensions  e = ceil(log2(max(amax, 1e-4) / 448)), q = e4m3(x * 2^-e), scale byte e + 127, pad 0
        split  per record         s = max(amax, 1e-4) / 448,             q = e4m3(x / s),    scale s, float32

    Dimensions 448 .. 511 are copied. A slot outside 0 .. P * entries - 1 (-1 above all) writes nothing. Two tokens with
    one slot leave that record in either's bytes, mixed; no other record is touched. A NaN does not count in amax and
    becomes NaN, an infinity counts as the largest finite bf16. Bit-exact.
    Source: DeepSeek-V4 inference reference, kernel.py: act_quant; FlashMLA tests/quant.py.

    Args:
        x: [T, 512] bfloat16, already rotated; 16 B aligned, rows may be strided, by a multiple of 8.
        slots: [T] int64, page * entries + entry: KVPool.slot_mapping.
        pages: [P, page bytes] uint8, written; 16 B aligned, pages may be strided, by a multiple of 16 B.
        record: "v4" or "split".
        entries: a page.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Raises:
        ArgumentError: a shape, dtype, layout or record is not the one above.

    Traffic: reads 1032 B a token, writes 584 (v4) or 580 (split) B.
    """
    _APPEND_KV((x, slots), (pages,), (record, entries, pdl), stream)


def append_index_keys(
    x: Any,
    slots: Any,
    pages: Any,
    *,
    record: str = "nvfp4",
    rotate: bool = True,
    g: float = 1.0,
    entries: int = ENTRIES,
    stream: Any = None,
    pdl: bool = False,
) -> None:
    """Quantise index keys into records of a paged cache, in place, rotated by a Hadamard matrix or as they are.

        y      = bf16(H x * 128^-1/2) where `rotate`, else x        H: 128 x 128 of +-1, natural order, in fp32
        nvfp4  sf = e4m3(amax16 / (6 * g)), q = e2m1(y / (sf * g)), 0 where sf = 0
        mxfp4  s = 2^ceil(log2(max(amax32, 6 * 2^-126) / 6)),       q = e2m1(y / s), s as ue8m0
        fp8    s = 2^ceil(log2(max(amax128, 1e-4) / 448)),          q = e4m3(y / s), s float32

    A slot outside 0 .. P * entries - 1 (-1 above all) writes nothing; two tokens with one slot leave that record in
    either's bytes, mixed. NaN is ignored in amax, an infinity counts as the largest finite bf16. Bit-exact.
    Source: DeepSeek-V4 inference reference, model.py: Indexer, kernel.py: fp4_quant_kernel, act_quant.

    Args:
        x: [T, 128] bfloat16; 16 B aligned, rows may be strided, by a multiple of 8.
        slots: [T] int64, page * entries + entry: KVPool.slot_mapping("index").
        pages: [P, page bytes] uint8, written; 16 B aligned, pages may be strided, by a multiple of 16 B.
        record: "nvfp4", "mxfp4" or "fp8".
        rotate: whether keys are rotated first; queries must be rotated alike.
        g: the layer's global scale of nvfp4, fixed when the pool is made; must be 1.0 for the others.
        entries: a page, a multiple of 2.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Raises:
        ArgumentError: a shape, dtype, layout, record or scale is not the one above.

    Traffic: reads 264 B a token, writes 72 (nvfp4), 68 (mxfp4) or 132 (fp8) B.
    """
    _APPEND_INDEX_KEYS((x, slots), (pages,), (record, rotate, g, entries, pdl), stream)


def compute_valid_lens(
    positions: Any,
    block_table: Any,
    ratio: int,
    *,
    entries: int = ENTRIES,
    row: Any = None,
    out: Any = None,
    stream: Any = None,
    pdl: bool = False,
) -> Any:
    """How many compressed entries each token may see, computed where the tables are.

        lens[t] = min((positions[t] + 1) // ratio, entries * pages of block_table[row[t]]), 0 for a negative position

    The pages of a row are its leading ids above 0: a row's pages must come first, as KVPool keeps them. A row outside
    0 .. B-1 has none.
    Source: DeepSeek-V4 inference reference, model.py: Compressor (an entry is visible to the token that completes it).

    Args:
        positions: [T] int32 or int64; -1 where there is no token.
        block_table: [B, max_blocks] int32; rows may be strided.
        ratio: tokens an entry: 4 (csa), 128 (hca), 1 (window).
        entries: a page.
        row: [T] int32, the table row of each token; token t has row t if None.
        out: [T] int32 to write into; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        lens: [T] int32, entries.

    Raises:
        ArgumentError: a shape, dtype, layout or number is not the one above.

    Traffic: reads 8 to 16 B a token and a word of the table, writes 4 B.
    """
    outs = None if out is None else (out,)
    return _COMPUTE_VALID_LENS((positions, block_table, row), outs, (ratio, entries, pdl), stream)[0]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _page(operation: str, record: Any, entries: Any) -> tuple[int, int]:
    """(entries a page, bytes of a page's entries)."""
    if record not in RECORDS:
        raise ArgumentError(f"{operation}: record = {record!r} is none of {', '.join(RECORDS)}")
    n = check_range(operation, "entries", entries, 1, 65536)
    return n, n * RECORDS[record][1]


def _check_pages(operation: str, pages: View, entries: int, nbytes: int) -> None:
    """Pages hold their entries, every vector access is aligned, slots fit what kernels compute with."""
    P, width = pages.shape
    if width < nbytes:
        raise ArgumentError(f"{operation}: pages of {width} B do not hold {entries} entries of {nbytes // entries} B")
    if P > 1 and pages.strides[0] % VECTOR:
        raise ArgumentError(
            f"{operation}: pages are {pages.strides[0]} B apart; a multiple of {VECTOR} B is wanted, as layouts have"
        )


def _check_rows(operation: str, name: str, view: View, multiple: int) -> None:
    if any(n > 1 and s % multiple for n, s in zip(view.shape[:-1], view.strides[:-1], strict=True)):
        raise ArgumentError(f"{operation}: strides {view.strides} of {name} must be multiples of {multiple} elements")


# --------------------------------------------------------------------------------------------------- gather_kv

GATHER_KV = "kv/gather_kv.cu"
GATHER_KV_WARPS = 8  # a block
GATHER_KV_ROW = 1024  # ids: the longest row of a table that a block fetches whole


@dataclass(frozen=True)
class Tile:
    """How a gather splits its work: neighbours that a warp takes at once, blocks an SM is to hold."""

    each: int
    blocks: int


def gather_kv_tile(T: int, k: int) -> Tile:
    """The tile for T lists of k records. bench/results/h200-kv-tiles.txt has them timed for k = 1024.

    A block has 8 * each records of one list: lists too short for four a warp take one.
    """
    if T * k <= 2048 or k < 4 * GATHER_KV_WARPS:
        return Tile(1, 8)
    return Tile(4, 4) if T * k <= 49152 else Tile(2, 6)


def gather_kv_instance(tile: Tile, max_blocks: int, record: str, entries: int) -> str:
    """The instantiation for a length of the table's rows, a record and page."""
    tabled = "true" if 0 < max_blocks <= GATHER_KV_ROW else "false"
    return f"gather_kv<{RECORDS[record][0]}, {entries}, {tile.each}, {tile.blocks}, {tabled}>"


def gather_kv_slots_instance(tile: Tile, record: str, entries: int, slot: np.dtype[Any]) -> str:
    """The instantiation for a record, page and type of slots."""
    kind = "int" if slot == I32 else "long long"
    return f"gather_kv_slots<{RECORDS[record][0]}, {entries}, {kind}, {tile.each}, {tile.blocks}>"


def gather_kv_grid(tile: Tile, T: int, k: int) -> tuple[int, int, int]:
    """(blocks a list, y, z), y * z >= T tokens: one dimension of a grid holds no more than 65,535."""
    z = _ceil(T, 65535)
    return _ceil(k, tile.each * GATHER_KV_WARPS), _ceil(T, z), z


def _out_strides(out: View | None, k: int) -> tuple[np.int64, np.int64]:
    return (np.int64(k * DIMS), np.int64(DIMS)) if out is None else (np.int64(out.strides[0]), np.int64(out.strides[1]))


def _plan_gather_kv(call: Call) -> Plan:
    topk, table, row, pages = call.inputs
    assert topk is not None
    assert table is not None
    assert pages is not None
    record, entries, pdl = call.settings
    entries, nbytes = _page("gather_kv", record, entries)
    args = {
        "topk_indices": Arg(topk, "T k", I32, rows=True),
        "block_table": Arg(table, "B max_blocks", I32, rows=True),
        "pages": Arg(pages, "P bytes", U8, rows=True, align=VECTOR),
    }
    if row is not None:
        args["row"] = Arg(row, "T", I32)
    out = call.outputs[0] if call.outputs is not None else None
    if out is not None:
        args["out"] = Arg(out, f"T k {DIMS}", BF16, rows=True, output=True, align=VECTOR)
        _check_rows("gather_kv", "out", out, VECTOR // 2)
    sizes = match("gather_kv", **args)
    T, k, B, max_blocks, P = (sizes[name] for name in ("T", "k", "B", "max_blocks", "P"))
    _check_pages("gather_kv", pages, entries, nbytes)
    if row is None and T > B:
        raise ArgumentError(f"gather_kv: {T} tokens and a block_table of {B} rows; give row, or a row for every token")
    ready = None
    if T * k:
        check_range("gather_kv", "T * k", T * k, 1, 2**31 - 1)
        tile = gather_kv_tile(T, k)
        name = gather_kv_instance(tile, max_blocks if B else 0, record, entries)
        ready = load(GATHER_KV, name, call.device).prepare(
            gather_kv_grid(tile, T, k),
            32 * GATHER_KV_WARPS,
            *(POINTER,) * 2,
            np.uint64(0) if row is None else POINTER,
            *(POINTER,) * 2,
            *(np.int32(n) for n in (T, k, B, max_blocks, P)),
            *(np.int64(v.strides[0]) for v in (topk, table, pages)),
            *_out_strides(out, k),
            pdl=bool(pdl),
        )
    return Plan((((T, k, DIMS), BF16),), ready)


_GATHER_KV = Operation(
    "gather_kv", ("topk_indices", "block_table", "row", "pages"), ("out",), _plan_gather_kv, optional=("row",)
)


def _plan_gather_kv_slots(call: Call) -> Plan:
    slots, pages = call.inputs
    assert slots is not None
    assert pages is not None
    record, entries, pdl = call.settings
    entries, nbytes = _page("gather_kv_slots", record, entries)
    args = {
        "slots": Arg(slots, "T k", (I32, I64), rows=True),
        "pages": Arg(pages, "P bytes", U8, rows=True, align=VECTOR),
    }
    out = call.outputs[0] if call.outputs is not None else None
    if out is not None:
        args["out"] = Arg(out, f"T k {DIMS}", BF16, rows=True, output=True, align=VECTOR)
        _check_rows("gather_kv_slots", "out", out, VECTOR // 2)
    sizes = match("gather_kv_slots", **args)
    T, k, P = (sizes[name] for name in ("T", "k", "P"))
    _check_pages("gather_kv_slots", pages, entries, nbytes)
    ready = None
    if T * k:
        check_range("gather_kv_slots", "T * k", T * k, 1, 2**31 - 1)
        tile = gather_kv_tile(T, k)
        name = gather_kv_slots_instance(tile, record, entries, slots.dtype)
        ready = load(GATHER_KV, name, call.device).prepare(
            gather_kv_grid(tile, T, k),
            32 * GATHER_KV_WARPS,
            *(POINTER,) * 3,
            *(np.int32(n) for n in (T, k, P)),
            *(np.int64(v.strides[0]) for v in (slots, pages)),
            *_out_strides(out, k),
            pdl=bool(pdl),
        )
    return Plan((((T, k, DIMS), BF16),), ready)


_GATHER_KV_SLOTS = Operation("gather_kv_slots", ("slots", "pages"), ("out",), _plan_gather_kv_slots)


# --------------------------------------------------------------------------------------------------- append_kv

APPEND_KV = "kv/append_kv.cu"
# Warps a block. bench/results/h200-kv-tiles.txt: 65,536 tokens (v4) take 80 us with 1, 40 with 2, 30 with 4 and 31 with
# 8 or 16; 64 tokens 2.5 us with any.
APPEND_KV_WARPS = 4


def append_kv_instance(record: str, entries: int) -> str:
    """The instantiation for a record and page."""
    return f"append_kv<{RECORDS[record][0]}, {entries}, {APPEND_KV_WARPS}>"


def _plan_append_kv(call: Call) -> Plan:
    x, slots = call.inputs
    assert x is not None
    assert slots is not None
    assert call.outputs is not None
    pages = call.outputs[0]
    record, entries, pdl = call.settings
    entries, nbytes = _page("append_kv", record, entries)
    sizes = match(
        "append_kv",
        x=Arg(x, f"T {DIMS}", BF16, rows=True, align=VECTOR),
        slots=Arg(slots, "T", I64),
        pages=Arg(pages, "P bytes", U8, rows=True, align=VECTOR, output=True),
    )
    _check_pages("append_kv", pages, entries, nbytes)
    _check_rows("append_kv", "x", x, VECTOR // 2)
    T, P = sizes["T"], sizes["P"]
    ready = None
    if T and P:
        ready = load(APPEND_KV, append_kv_instance(record, entries), call.device).prepare(
            _ceil(T, APPEND_KV_WARPS),
            32 * APPEND_KV_WARPS,
            *(POINTER,) * 3,
            *(np.int32(n) for n in (T, P)),
            *(np.int64(v.strides[0]) for v in (x, pages)),
            pdl=bool(pdl),
        )
    return Plan((), ready)


_APPEND_KV = Operation("append_kv", ("x", "slots"), ("pages",), _plan_append_kv)


# ------------------------------------------------------------------------------------------- append_index_keys

APPEND_INDEX_KEYS = "kv/append_index_keys.cu"


@dataclass(frozen=True)
class KeyTile:
    """How append_index_keys splits its work: lanes that share a key, warps a block."""

    share: int
    warps: int


def append_index_keys_tile(tokens: int) -> KeyTile:
    """The tile for T tokens. bench/results/h200-kv-tiles.txt, H200, cold:

    65,536 rotated nvfp4 keys take 10.3 us by fours, 10.7 by eights and 12.5 by twos; 64 tokens 2.5, 2.2 and 3.6 us.
    """
    return KeyTile(8, 4) if tokens <= 8192 else KeyTile(4, 4)


def is_power_of_two(g: float) -> bool:
    """Whether the kernel may take the fast way: 2^-60 .. 2^60."""
    mantissa, exponent = math.frexp(g)
    return mantissa == 0.5 and -59 <= exponent <= 61


def append_index_keys_instance(tile: KeyTile, record: str, rotate: bool, entries: int, g: float = 1.0) -> str:
    """The instantiation for a record, with or without rotation, and page."""
    form = INDEX_KEYS[record][0]
    if record == "nvfp4":
        form += f"<{'true' if is_power_of_two(g) else 'false'}>"
    rotated = "true" if rotate else "false"
    return f"append_index_keys<{form}, {rotated}, {entries}, {tile.share}, {tile.warps}>"


def _plan_append_index_keys(call: Call) -> Plan:
    x, slots = call.inputs
    assert x is not None
    assert slots is not None
    assert call.outputs is not None
    pages = call.outputs[0]
    record, rotate, g, entries, pdl = call.settings
    if record not in INDEX_KEYS:
        raise ArgumentError(f"append_index_keys: record = {record!r} is none of {', '.join(INDEX_KEYS)}")
    g = check_scale("append_index_keys", "g", g)
    if np.float32(g) <= 0 or (record != "nvfp4" and g != 1):
        raise ArgumentError(f"append_index_keys: g = {g} must be positive, and 1.0 for {record!r} keys but nvfp4")
    entries = check_range("append_index_keys", "entries", entries, 1, 65536)
    if entries % 2:
        raise ArgumentError(f"append_index_keys: entries = {entries} must be a multiple of 2: scales are aligned then")
    sizes = match(
        "append_index_keys",
        x=Arg(x, f"T {KEY_DIMS}", BF16, rows=True, align=VECTOR),
        slots=Arg(slots, "T", I64),
        pages=Arg(pages, "P bytes", U8, rows=True, align=VECTOR, output=True),
    )
    _check_pages("append_index_keys", pages, entries, entries * INDEX_KEYS[record][1])
    _check_rows("append_index_keys", "x", x, VECTOR // 2)
    T, P = sizes["T"], sizes["P"]
    ready = None
    if T and P:
        tile = append_index_keys_tile(T)
        name = append_index_keys_instance(tile, record, bool(rotate), entries, float(np.float32(g)))
        blocks = check_range("append_index_keys", "T", _ceil(T * tile.share, 32 * tile.warps), 1, 2**31 - 1)
        ready = load(APPEND_INDEX_KEYS, name, call.device).prepare(
            blocks,
            32 * tile.warps,
            *(POINTER,) * 3,
            *(np.int32(n) for n in (T, P)),
            *(np.int64(v.strides[0]) for v in (x, pages)),
            np.float32(g),
            pdl=bool(pdl),
        )
    return Plan((), ready)


_APPEND_INDEX_KEYS = Operation("append_index_keys", ("x", "slots"), ("pages",), _plan_append_index_keys)


# ------------------------------------------------------------------------------------------ compute_valid_lens

COMPUTE_VALID_LENS = "kv/compute_valid_lens.cu"
COMPUTE_VALID_LENS_THREADS = 128
LANES_A_TOKEN = 8  # of compute_valid_lens


def _plan_compute_valid_lens(call: Call) -> Plan:
    positions, table, row = call.inputs
    assert positions is not None
    assert table is not None
    ratio, entries, pdl = call.settings
    ratio = check_range("compute_valid_lens", "ratio", ratio, 1, 2**31 - 1)
    entries = check_range("compute_valid_lens", "entries", entries, 1, 65536)
    args = {
        "positions": Arg(positions, "T", (I32, I64)),
        "block_table": Arg(table, "B max_blocks", I32, rows=True),
    }
    if row is not None:
        args["row"] = Arg(row, "T", I32)
    if call.outputs is not None:
        args["out"] = Arg(call.outputs[0], "T", I32, output=True)
    sizes = match("compute_valid_lens", **args)
    T, B, max_blocks = (sizes[name] for name in ("T", "B", "max_blocks"))
    if row is None and T > B:
        raise ArgumentError(
            f"compute_valid_lens: {T} tokens and a block_table of {B} rows; give row, or a row for every token"
        )
    ready = None
    if T:
        kind = "int" if positions.dtype == I32 else "long long"
        blocks = _ceil(T * LANES_A_TOKEN, COMPUTE_VALID_LENS_THREADS)
        ready = load(COMPUTE_VALID_LENS, f"compute_valid_lens<{kind}>", call.device).prepare(
            blocks,
            COMPUTE_VALID_LENS_THREADS,
            *(POINTER,) * 2,
            np.uint64(0) if row is None else POINTER,
            POINTER,
            *(np.int32(n) for n in (T, B, max_blocks, ratio, entries)),
            np.int64(table.strides[0]),
            pdl=bool(pdl),
        )
    return Plan((((T,), I32),), ready)


_COMPUTE_VALID_LENS = Operation(
    "compute_valid_lens", ("positions", "block_table", "row"), ("lens",), _plan_compute_valid_lens, ("row",)
)


# The pages of the released models' caches, with register budgets.
_PAGES = tuple((record, entries) for record in RECORDS for entries in (ENTRIES, HCA_ENTRIES))
_GATHERS = tuple((gather_kv_tile(T, 1024), budget) for T, budget in ((1, 32), (8, 64), (1024, 40)))
INSTANCES = (
    *(
        Instance(GATHER_KV, gather_kv_instance(tile, max_blocks, record, entries), budget)
        for record, entries in _PAGES
        for tile, budget in _GATHERS
        for max_blocks in (GATHER_KV_ROW, GATHER_KV_ROW + 1)
    ),
    *(
        Instance(GATHER_KV, gather_kv_slots_instance(tile, record, entries, slot), budget)
        for record, entries in _PAGES
        for tile, budget in _GATHERS
        for slot in (I32, I64)
    ),
    *(Instance(APPEND_KV, append_kv_instance(record, entries), 40) for record, entries in _PAGES),
    *(
        Instance(
            APPEND_INDEX_KEYS,
            append_index_keys_instance(append_index_keys_tile(tokens), record, rotate, ENTRIES, g),
            64,
        )
        for record, g in (*((record, 1.0) for record in INDEX_KEYS), ("nvfp4", 0.37))
        for rotate in (True, False)
        for tokens in (1, 2**16)
    ),
    *(Instance(COMPUTE_VALID_LENS, f"compute_valid_lens<{kind}>", 32) for kind in ("int", "long long")),
)
