"""The oracles of the kv family: NumPy, codecs of dsv4_rt/formats.py, pages taken apart by memory/layout.py.

Letters: T tokens, k chosen, B sequences, P pages, N entries a page.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsv4_rt import formats
from dsv4_rt.formats import BF16, F32
from dsv4_rt.memory.layout import INDEX_KEYS, RECORDS, Cache, Part

Bytes = NDArray[np.uint8]
Ints = NDArray[np.integer[Any]]
Bf16 = NDArray[Any]

CODES: Final = 448  # dimensions kept as e4m3
_FLOOR: Final = np.float32(1e-4)
_BF16_MAX: Final = np.float32((2 - 2.0**-7) * 2.0**127)
_NAN: Final = 0x7FFF  # what a conversion to bf16 makes of a NaN


def parts(pages: Bytes, record: str, entries: int) -> dict[str, NDArray[Any]]:
    """Views of a cache's parts: data [P, N, 448], rope [P, N, 64] bf16, scales [P, N, 8] ue8m0 or [P, N, 1] float32."""
    return _parts(pages, *RECORDS[record], entries)


def _parts(pages: Bytes, record: tuple[Part, ...], align: int, entries: int) -> dict[str, NDArray[Any]]:
    cache = Cache("cache", "full", 1, entries, record, align, ())
    found = {}
    for part in cache.parts:
        offset, stride = cache.locate(part.name)
        strides = (pages.strides[0], stride, part.dtype.itemsize)
        found[part.name] = np.ndarray((len(pages), entries, *part.shape), part.dtype, pages, offset, strides)
    return found


def decode(data: Bytes, rope: Bf16, scales: NDArray[Any]) -> Bf16:
    """Records as values: [..., 448], [..., 64] and their scales -> [..., 512] bfloat16; a NaN is 0x7fff."""
    scale = formats.ue8m0_decode(scales[..., :7]) if scales.dtype == np.uint8 else scales
    with np.errstate(all="ignore"):
        values = formats.e4m3_decode(data) * np.repeat(scale, CODES // scale.shape[-1], axis=-1)
        bits = values.astype(BF16).view(np.uint16)
    bits[np.isnan(values)] = _NAN
    return np.concatenate([bits.view(BF16), rope], axis=-1)


def gather_kv(
    topk_indices: Ints, block_table: Ints, pages: Bytes, record: str = "v4", entries: int = 64, row: Ints | None = None
) -> Bf16:
    """What dsv4_rt.kv.ops.gather_kv documents: an index -> a slot, then gather_kv_slots."""
    T = len(topk_indices)
    rows = np.arange(T) if row is None else row
    slots = np.full(topk_indices.shape, -1, np.int64)
    for t in range(T):
        if not 0 <= rows[t] < len(block_table):
            continue
        for j, index in enumerate(topk_indices[t].tolist()):
            if 0 <= index < block_table.shape[1] * entries:
                page = int(block_table[rows[t], index // entries])
                slots[t, j] = page * entries + index % entries if 0 <= page < len(pages) else -1
    return gather_kv_slots(slots, pages, record, entries)


def gather_kv_slots(slots: Ints, pages: Bytes, record: str = "v4", entries: int = 64) -> Bf16:
    """What dsv4_rt.kv.ops.gather_kv_slots documents: every chosen record decoded, zeros elsewhere."""
    there = (slots >= 0) & (slots < len(pages) * entries)
    out = np.zeros((*slots.shape, 512), BF16)
    at = np.divmod(slots[there], entries)
    cache = parts(pages, record, entries)
    out[there] = decode(*(cache[name][at] for name in ("data", "rope", "scales")))
    return out


def encode(x: Bf16, record: str) -> tuple[Bytes, Bf16, NDArray[Any]]:
    """Values as records: [..., 512] bfloat16 -> e4m3 codes [..., 448], rope [..., 64], scales."""
    values = x[..., :CODES].astype(np.float32)
    largest = np.where(np.isinf(values), _BF16_MAX, np.abs(values))
    groups = 7 if record == "v4" else 1
    amax = np.fmax.reduce(largest.reshape(*x.shape[:-1], groups, CODES // groups), axis=-1, initial=np.float32(0))
    scale = np.maximum(amax, _FLOOR) / np.float32(448)
    if record == "v4":
        exponent = np.ceil(np.log2(scale.astype(np.float64))).astype(np.int64)
        scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
        scales: NDArray[Any] = np.concatenate([exponent + 127, np.zeros_like(exponent[..., :1])], -1).astype(np.uint8)
    else:
        scales = scale.astype(F32)
    with np.errstate(all="ignore"):
        codes = formats.e4m3_encode(values / np.repeat(scale, CODES // groups, axis=-1))
    return codes, x[..., CODES:], scales


def append_kv(x: Bf16, slots: Ints, pages: Bytes, record: str = "v4", entries: int = 64) -> Bytes:
    """What dsv4_rt.kv.ops.append_kv documents: a copy of `pages` with the records of all valid slots written."""
    out = pages.copy()
    there = (slots >= 0) & (slots < len(pages) * entries)
    at = np.divmod(slots[there], entries)
    cache = parts(out, record, entries)
    for name, values in zip(("data", "rope", "scales"), encode(x[there], record), strict=True):
        cache[name][at] = values
    return out


def compute_valid_lens(
    positions: Ints, block_table: Ints, ratio: int, entries: int = 64, row: Ints | None = None
) -> NDArray[np.int32]:
    """What dsv4_rt.kv.ops.compute_valid_lens documents, token by token."""
    rows = range(len(positions)) if row is None else row.tolist()
    lens = []
    for p, r in zip(positions.tolist(), rows, strict=True):
        ids = block_table[r].tolist() if 0 <= r < len(block_table) else []
        pages = next((i for i, page in enumerate(ids) if page <= 0), len(ids))
        lens.append(min(max(p + 1, 0) // ratio, pages * entries))
    return np.array(lens, np.int32)


def hadamard(x: Bf16) -> Bf16:
    """[..., 128] bfloat16 -> bf16(H x * 128^-1/2): fp32 butterflies of stride 1 to 64, one rounding at the end."""
    v = x.astype(np.float32)
    with np.errstate(all="ignore"):
        for stride in (1, 2, 4, 8, 16, 32, 64):
            pairs = v.reshape(-1, 64 // stride, 2, stride)
            a, b = pairs[:, :, 0], pairs[:, :, 1]
            v = np.stack([a + b, a - b], axis=2).reshape(x.shape)
        return (v * np.float32(128**-0.5)).astype(BF16)


def encode_keys(x: Bf16, record: str, g: float = 1.0) -> tuple[Bytes, NDArray[Any]]:
    """Index keys as records: [T, 128] bfloat16 -> codes [T, 64] or [T, 128], scales."""
    if record == "nvfp4":
        return formats.nvfp4_encode(x, np.float32(g))
    if record == "mxfp4":
        return formats.mxfp4_encode(x)
    values = x.astype(np.float32)
    largest = np.where(np.isinf(values), _BF16_MAX, np.abs(values))
    amax = np.fmax.reduce(largest, axis=-1, keepdims=True, initial=np.float32(0))
    ideal = np.maximum(amax, _FLOOR) / np.float32(448)
    scale = np.exp2(np.ceil(np.log2(ideal.astype(np.float64)))).astype(np.float32)
    with np.errstate(all="ignore"):
        return formats.e4m3_encode(values / scale), scale


def key_parts(pages: Bytes, record: str, entries: int) -> dict[str, NDArray[Any]]:
    """Views of an index cache's parts: data [P, N, 64 or 128], scales [P, N, 8 e4m3, 4 ue8m0 or 1 float32]."""
    return _parts(pages, *INDEX_KEYS[record], entries)


def append_index_keys(
    x: Bf16, slots: Ints, pages: Bytes, record: str = "nvfp4", rotate: bool = True, g: float = 1.0, entries: int = 64
) -> Bytes:
    """What dsv4_rt.kv.ops.append_index_keys documents: a copy of `pages` with the keys of all valid slots written."""
    out = pages.copy()
    there = (slots >= 0) & (slots < len(pages) * entries)
    at = np.divmod(slots[there], entries)
    data, scales = encode_keys(hadamard(x[there]) if rotate else x[there], record, g)
    cache = key_parts(out, record, entries)
    cache["data"][at], cache["scales"][at] = data, scales
    return out
