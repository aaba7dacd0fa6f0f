"""Launchers of the linear kernels: docstring, checks, tuning, launch; nearly half of it is docstrings.

FP4 as dsv4_rt/formats.py defines it: e2m1 codes two a byte, the even element in the low nibble; block scales row-major
("rows", [M, K/16] or [M, K/32]) or in the 128x4 interleaved layout that tcgen05 reads ("128x4", one axis of
formats.scale_bytes_128x4(M, scales of a row) bytes, padding 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dsv4_rt.arrays import I32, U8, View
from dsv4_rt.checks import Arg, check_range, match
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16, F32, MXFP4_GROUP, NVFP4_GROUP, scale_bytes_128x4
from dsv4_rt.launch import POINTER, load
from dsv4_rt.operation import Call, Instance, Operation, Plan

LAYOUTS: Final = ("rows", "128x4")  # of block scales
VECTOR: Final = 16  # bytes
MAX_K: Final = 32768  # of quantize_nvfp4, whose rows lie in registers
THREADS: Final = 256
WARP: Final = 32  # threads
STRIP: Final = 128  # threads of the kernels that need no row's maximum
FEW_ROWS: Final = 256  # up to which latency counts, not instructions
MAX_PARTIALS: Final = 512
_DTYPES: Final = {"bfloat16": BF16, "float32": F32}


def quantize_nvfp4(
    x: Any,
    *,
    scale_layout: str = "rows",
    out: tuple[Any, Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any, Any]:
    """Quantise activations to NVFP4, the global scale of each row taken from the row; one launch.

        g[t]     = max(max_k |x[t, k]| / 2688, 2^-126), 1 for a row of zeros
        sf[t, j] = e4m3(max|x[t, 16j : 16j + 16]| / (6 * g[t]))
        q[t, k]  = e2m1(x[t, k] / (sf[t, k // 16] * g[t])), 0 where sf = 0

    Float32 IEEE operations in this order, conversions round to nearest even and saturate: bit-exact. NaN is ignored in
    the maxima and encodes as 7 (+6), an infinity counts as the largest finite of x's dtype, -0 is kept.
    Source: OCP Microscaling Formats 1.0, TensorRT Model Optimizer (two scales).

    Args:
        x: [M, K] bfloat16 or float32, K a multiple of 16 up to 32768; 16 B aligned, rows may be strided.
        scale_layout: "rows", or "128x4": what tcgen05's block-scaled product reads.
        out: (q, sf, g) to write into, contiguous; q 16 B aligned, with "128x4" sf too; allocated if None. A captured
            CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        q: [M, K/2] uint8, two codes a byte.
        sf: [M, K/16] uint8, e4m3; with "128x4" one axis of formats.scale_bytes_128x4(M, K/16) bytes.
        g: [M] float32, no unit.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads x once, writes 9/16 B a value.
    """
    return _QUANTIZE_NVFP4((x,), out, (scale_layout, pdl), stream)


def quantize_nvfp4_tensor(
    x: Any,
    *,
    scale_layout: str = "rows",
    workspace: Any = None,
    out: tuple[Any, Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any, Any]:
    """`quantize_nvfp4` with one global scale, from the data of the whole tensor; two launches.

        g = max(max|x| / 2688, 2^-126), 1 for a tensor of zeros

    Args:
        x: [M, K] bfloat16 or float32, K a multiple of 16; 16 B aligned, rows may be strided.
        scale_layout: "rows" or "128x4".
        workspace: [nvfp4_partials(M, K)] float32, overwritten; allocated if None. A captured CUDA graph needs it given.
        out: (q, sf, g) to write into, contiguous and aligned as quantize_nvfp4 wants them; allocated if None. A
            captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        q, sf: as quantize_nvfp4.
        g: [1] float32.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads x twice, writes 9/16 B a value.
    """
    (partial,) = _TENSOR_AMAX((x,), None if workspace is None else (workspace,), (pdl,), stream)
    return _QUANTIZE_NVFP4_TENSOR((x, partial), out, (scale_layout, pdl), stream)


def quantize_nvfp4_given(
    x: Any,
    g: Any,
    saturated: Any,
    *,
    scale_layout: str = "rows",
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """`quantize_nvfp4` with the caller's global scale: one of the pool, or calibrated at training time.

        saturated += blocks with max|x[t, 16j : 16j + 16]| / (6 * g) > 464: their e4m3 scale was cut to 448

    A calibrated scale that run-time activations outgrow loses their magnitude: where `saturated` grows, use
    quantize_nvfp4.

    Args:
        x: [M, K] bfloat16 or float32, K a multiple of 16; 16 B aligned, rows may be strided.
        g: [1] or [M] float32, positive and finite; any other gives what the equations give in IEEE arithmetic.
        saturated: [1] int32, added to; the caller zeroes it.
        scale_layout: "rows" or "128x4".
        out: (q, sf) to write into, contiguous and aligned as quantize_nvfp4 wants them; allocated if None. A captured
            CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        q, sf: as quantize_nvfp4.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads x once, writes 9/16 B a value.
    """
    return _QUANTIZE_NVFP4_GIVEN((x, g, saturated), out, (scale_layout, pdl), stream)


def dequantize_nvfp4(
    q: Any,
    sf: Any,
    g: Any,
    *,
    dtype: str = "bfloat16",
    scale_layout: str = "rows",
    out: Any = None,
    stream: Any = None,
    pdl: bool = False,
) -> Any:
    """NVFP4 to bfloat16 or float32.

        x[t, k] = (e2m1(q[t, k]) * e4m3(sf[t, k // 16])) * g[t]

    The first product is exact, the second rounded to float32, the result once more to bfloat16 where that is wanted.

    Args:
        q: [M, K/2] uint8, contiguous, 16 B aligned.
        sf: [M, K/16] uint8; with "128x4" one axis of formats.scale_bytes_128x4(M, K/16) bytes.
        g: [1] or [M] float32.
        dtype: "bfloat16" or "float32".
        scale_layout: "rows" or "128x4".
        out: [M, K] to write into, contiguous, 16 B aligned; allocated if None.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        x: [M, K].

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads 9/16 B a value, writes 2 or 4.
    """
    outs = None if out is None else (out,)
    return _DEQUANTIZE_NVFP4((q, sf, g), outs, (dtype, scale_layout, pdl), stream)[0]


def quantize_mxfp4(
    x: Any,
    *,
    scale_layout: str = "rows",
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """Quantise to MXFP4: a power-of-two scale for 32 values.

        s[t, j] = 2 ^ ceil(log2(max(max|x[t, 32j : 32j + 32]|, 6 * 2^-126) / 6))
        q[t, k] = e2m1(x[t, k] / s[t, k // 32])

    Bit-exact. NaN is ignored in the maximum and encodes as 7, an infinity counts as the largest finite of x's dtype.
    Source: DeepSeek-V4 inference reference, kernel.py: fp4_quant_kernel.

    Args:
        x: [M, K] bfloat16 or float32, K a multiple of 32; 16 B aligned, rows may be strided.
        scale_layout: "rows" or "128x4".
        out: (q, sf) to write into, contiguous; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        q: [M, K/2] uint8, two codes a byte.
        sf: [M, K/32] uint8, ue8m0; with "128x4" one axis of formats.scale_bytes_128x4(M, K/32) bytes.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads x once, writes 17/32 B a value.
    """
    return _QUANTIZE_MXFP4((x,), out, (scale_layout, pdl), stream)


def dequantize_mxfp4(
    q: Any,
    sf: Any,
    *,
    dtype: str = "bfloat16",
    scale_layout: str = "rows",
    out: Any = None,
    stream: Any = None,
    pdl: bool = False,
) -> Any:
    """MXFP4 to bfloat16 or float32: x[t, k] = e2m1(q[t, k]) * 2^(sf[t, k // 32] - 127).

    Args:
        q: [M, K/2] uint8, contiguous, 16 B aligned.
        sf: [M, K/32] uint8; with "128x4" one axis of formats.scale_bytes_128x4(M, K/32) bytes. 255 gives NaN.
        dtype, scale_layout, out, stream, pdl: as dequantize_nvfp4.

    Returns:
        x: [M, K].

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads 17/32 B a value, writes 2 or 4.
    """
    outs = None if out is None else (out,)
    return _DEQUANTIZE_MXFP4((q, sf), outs, (dtype, scale_layout, pdl), stream)[0]


def nvfp4_partials(M: int, K: int) -> int:
    """Elements of quantize_nvfp4_tensor's workspace."""
    return min(MAX_PARTIALS, max(1, _ceil(M * K // NVFP4_GROUP, THREADS)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _type(dtype: Any) -> str:
    return "bf16" if dtype == BF16 else "float"


def _bool(tiled: bool) -> str:
    return "true" if tiled else "false"


def _tiled(operation: str, layout: Any) -> bool:
    if layout not in LAYOUTS:
        raise ArgumentError(f"{operation}: scale_layout = {layout!r} is none of {', '.join(LAYOUTS)}")
    return bool(layout == "128x4")


def _input(operation: str, x: View, group: int) -> tuple[int, int]:
    """(M, K) of what is quantised."""
    sizes = match(operation, x=Arg(x, "M K", (BF16, F32), rows=True, align=VECTOR))
    M, K = sizes["M"], sizes["K"]
    if K % group:
        raise ArgumentError(f"{operation}: K = {K} is not a multiple of {group}; pad x to {_ceil(K, group) * group}")
    each = VECTOR // x.dtype.itemsize
    if M > 1 and x.strides[0] % each:
        raise ArgumentError(f"{operation}: rows of x are {x.strides[0]} elements apart; a multiple of {each} is wanted")
    check_range(operation, "M * K / 16", _ceil(M, 128) * 128 * (K // NVFP4_GROUP + 4), 0, 2**31 - 1)
    return M, K


def _scales(M: int, columns: int, tiled: bool) -> tuple[int, ...]:
    return (scale_bytes_128x4(M, columns),) if tiled else (M, columns)


def _axes(shape: tuple[int, ...]) -> str:
    return " ".join(map(str, shape))


def _padded(M: int, tiled: bool) -> int:
    return _ceil(M, 128) * 128 if tiled else M


def strip_items(M: int) -> int:
    """Blocks of 16 a thread takes where no row's maximum is needed."""
    return 1 if M <= FEW_ROWS else 4


def _grid(M: int, columns: int, tiled: bool, items: int, each: int = 1) -> tuple[int, int]:
    """Rows, and strips of a row in which a scale takes `each` blocks of 16; padding included."""
    width = _ceil(columns, 4) * 4 if tiled else columns
    return _padded(M, tiled), _ceil(width * each, STRIP * items)


# ---------------------------------------------------------------------------------------------- quantize_nvfp4

QUANTIZE_NVFP4 = "linear/quantize_nvfp4.cu"


@dataclass(frozen=True)
class Tile:
    """A block of threads takes a row."""

    threads: int
    items: int  # blocks of 16 a thread takes

    def instance(self, dtype: Any, tiled: bool) -> str:
        """The instantiation for a dtype and a layout."""
        return f"quantize_nvfp4<{_type(dtype)}, {self.threads}, {self.items}, {_bool(tiled)}>"

    def launch(self, M: int, columns: int, tiled: bool) -> tuple[tuple[int, int], int]:
        """Grid and block for M rows of so many scales."""
        return (_padded(M, tiled), 1), self.threads


@dataclass(frozen=True)
class FewTile:
    """Several blocks of threads read the same row; each encodes a part of it."""

    threads: int
    values: int  # that a thread encodes
    parts: int  # of a row

    def instance(self, dtype: Any, tiled: bool) -> str:
        """The instantiation for a dtype and a layout."""
        return f"quantize_nvfp4_few<{_type(dtype)}, {self.threads}, {self.values}, {self.parts}, {_bool(tiled)}>"

    def launch(self, M: int, columns: int, tiled: bool) -> tuple[tuple[int, int], int]:
        """Grid and block for M rows of so many scales; a warp more where there are padding rows."""
        width = _ceil(columns, 4) * 4 if tiled else columns
        grid = M, _ceil(width * (NVFP4_GROUP // self.values), self.threads)
        return grid, self.threads + (WARP if tiled and M % 128 else 0)


def quantize_nvfp4_tile(M: int, K: int) -> Tile | FewTile:
    """The tile for a shape. bench/results/h200-linear-tiles.txt, measured at K = 7168, chose the numbers."""
    blocks = K // NVFP4_GROUP
    if M <= 64 and blocks <= 448:
        threads = 128 if blocks <= 256 else 224
        return FewTile(threads, 8, 4) if M <= 32 else FewTile(threads, 16, 2)
    if M <= FEW_ROWS and blocks <= 448:
        return Tile(256 if blocks <= 256 else 448, 1)
    if blocks <= 512:
        return Tile(64 if blocks <= 256 else 128, 4)
    return Tile(128 if blocks <= 1024 else 256, 8)


def _nvfp4_outputs(call: Call, operation: str, x: View, M: int, K: int, tiled: bool, g: str) -> tuple[Any, ...]:
    """Shapes of q, sf and, with axes for it, g; given outputs are checked."""
    sf = _scales(M, K // NVFP4_GROUP, tiled)
    shapes: list[tuple[tuple[int, ...], Any]] = [((M, K // 2), U8), (sf, U8)]
    if g:
        shapes.append(((int(g),), F32))
    if call.outputs is not None:
        args = {"x": Arg(x, "M K", (BF16, F32), rows=True)}
        for name, view, (shape, dtype) in zip(("q", "sf", "g"), call.outputs, shapes, strict=False):
            align = VECTOR if name == "q" or (name == "sf" and tiled) else 0
            args[name] = Arg(view, _axes(shape), dtype, output=True, align=align)
        match(operation, **args)
    return tuple(shapes)


def _plan_quantize_nvfp4(call: Call) -> Plan:
    (x,) = call.inputs
    assert x is not None
    layout, pdl = call.settings
    tiled = _tiled("quantize_nvfp4", layout)
    M, K = _input("quantize_nvfp4", x, NVFP4_GROUP)
    if K > MAX_K:
        raise ArgumentError(f"quantize_nvfp4: K = {K} is more than {MAX_K}; quantize_nvfp4_tensor takes longer rows")
    shapes = _nvfp4_outputs(call, "quantize_nvfp4", x, M, K, tiled, str(M))
    ready = None
    if M * K:
        tile = quantize_nvfp4_tile(M, K)
        ready = load(QUANTIZE_NVFP4, tile.instance(x.dtype, tiled), call.device).prepare(
            *tile.launch(M, K // NVFP4_GROUP, tiled),
            *(POINTER,) * 4,
            np.int32(M),
            np.int32(K),
            np.int64(x.strides[0]),
            pdl=bool(pdl),
        )
    return Plan(shapes, ready)


_QUANTIZE_NVFP4 = Operation("quantize_nvfp4", ("x",), ("q", "sf", "g"), _plan_quantize_nvfp4)


def _plan_tensor_amax(call: Call) -> Plan:
    (x,) = call.inputs
    assert x is not None
    (pdl,) = call.settings
    M, K = _input("quantize_nvfp4_tensor", x, NVFP4_GROUP)
    partials = nvfp4_partials(M, K)
    if call.outputs is not None:
        match(
            "quantize_nvfp4_tensor",
            x=Arg(x, "M K", (BF16, F32), rows=True),
            workspace=Arg(call.outputs[0], str(partials), F32, output=True),
        )
    ready = None
    if M * K:
        ready = load(QUANTIZE_NVFP4, f"tensor_amax<{_type(x.dtype)}>", call.device).prepare(
            partials, THREADS, *(POINTER,) * 2, np.int32(M), np.int32(K), np.int64(x.strides[0]), pdl=bool(pdl)
        )
    return Plan((((partials,), F32),), ready)


_TENSOR_AMAX = Operation("quantize_nvfp4_tensor", ("x",), ("workspace",), _plan_tensor_amax)


def _plan_quantize_nvfp4_tensor(call: Call) -> Plan:
    x, partial = call.inputs
    assert x is not None
    assert partial is not None
    layout, pdl = call.settings
    tiled = _tiled("quantize_nvfp4_tensor", layout)
    M, K = _input("quantize_nvfp4_tensor", x, NVFP4_GROUP)
    shapes = _nvfp4_outputs(call, "quantize_nvfp4_tensor", x, M, K, tiled, "1")
    ready = None
    if M * K:
        items = strip_items(M)
        name = f"quantize_nvfp4_tensor<{_type(x.dtype)}, {items}, {_bool(tiled)}>"
        ready = load(QUANTIZE_NVFP4, name, call.device).prepare(
            _grid(M, K // NVFP4_GROUP, tiled, items),
            STRIP,
            *(POINTER,) * 5,
            *(np.int32(n) for n in (M, K, partial.shape[0])),
            np.int64(x.strides[0]),
            pdl=bool(pdl),
        )
    return Plan(shapes, ready)


_QUANTIZE_NVFP4_TENSOR = Operation(
    "quantize_nvfp4_tensor", ("x", "workspace"), ("q", "sf", "g"), _plan_quantize_nvfp4_tensor
)


def _check_g(operation: str, x: View, g: View, M: int) -> int:
    """Elements from one row's global scale to the next: 0 where all rows share one."""
    axes = "1" if g.shape == (1,) else str(M)
    match(operation, x=Arg(x, " ".join("ab"[: len(x.shape)]), x.dtype, rows=True), g=Arg(g, axes, F32))
    return 0 if g.shape == (1,) else 1


def _plan_quantize_nvfp4_given(call: Call) -> Plan:
    x, g, saturated = call.inputs
    assert x is not None
    assert g is not None
    assert saturated is not None
    layout, pdl = call.settings
    tiled = _tiled("quantize_nvfp4_given", layout)
    M, K = _input("quantize_nvfp4_given", x, NVFP4_GROUP)
    g_stride = _check_g("quantize_nvfp4_given", x, g, M)
    match(
        "quantize_nvfp4_given",
        x=Arg(x, "M K", (BF16, F32), rows=True),
        saturated=Arg(saturated, "1", I32, output=True),
    )
    shapes = _nvfp4_outputs(call, "quantize_nvfp4_given", x, M, K, tiled, "")
    ready = None
    if M * K:
        items = strip_items(M)
        name = f"quantize_nvfp4_given<{_type(x.dtype)}, {items}, {_bool(tiled)}>"
        ready = load(QUANTIZE_NVFP4, name, call.device).prepare(
            _grid(M, K // NVFP4_GROUP, tiled, items),
            STRIP,
            *(POINTER,) * 5,
            *(np.int32(n) for n in (M, K, g_stride)),
            np.int64(x.strides[0]),
            pdl=bool(pdl),
        )
    return Plan(shapes, ready)


_QUANTIZE_NVFP4_GIVEN = Operation(
    "quantize_nvfp4_given", ("x", "g", "saturated"), ("q", "sf"), _plan_quantize_nvfp4_given
)


# ---------------------------------------------------------------------------------------------- quantize_mxfp4

QUANTIZE_MXFP4 = "linear/quantize_mxfp4.cu"


def _plan_quantize_mxfp4(call: Call) -> Plan:
    (x,) = call.inputs
    assert x is not None
    layout, pdl = call.settings
    tiled = _tiled("quantize_mxfp4", layout)
    M, K = _input("quantize_mxfp4", x, MXFP4_GROUP)
    sf = _scales(M, K // MXFP4_GROUP, tiled)
    if call.outputs is not None:
        match(
            "quantize_mxfp4",
            x=Arg(x, "M K", (BF16, F32), rows=True),
            q=Arg(call.outputs[0], "M K/2", U8, output=True, align=VECTOR),
            sf=Arg(call.outputs[1], _axes(sf), U8, output=True),
        )
    ready = None
    if M * K:
        items = strip_items(M)
        name = f"quantize_mxfp4<{_type(x.dtype)}, {items}, {_bool(tiled)}>"
        ready = load(QUANTIZE_MXFP4, name, call.device).prepare(
            _grid(M, K // MXFP4_GROUP, tiled, items, 2),
            STRIP,
            *(POINTER,) * 3,
            *(np.int32(n) for n in (M, K)),
            np.int64(x.strides[0]),
            pdl=bool(pdl),
        )
    return Plan((((M, K // 2), U8), (sf, U8)), ready)


_QUANTIZE_MXFP4 = Operation("quantize_mxfp4", ("x",), ("q", "sf"), _plan_quantize_mxfp4)


# ---------------------------------------------------------------------------------------------- dequantize_fp4

DEQUANTIZE_FP4 = "linear/dequantize_fp4.cu"


def _dequantize(call: Call, operation: str, group: int, dtype: Any, layout: Any) -> tuple[int, int, bool]:
    """(M, K, tiled) of what is decoded; its arrays are checked."""
    tiled = _tiled(operation, layout)
    if dtype not in _DTYPES:
        raise ArgumentError(f"{operation}: dtype = {dtype!r} is none of {', '.join(_DTYPES)}")
    q, sf = call.inputs[:2]
    assert q is not None
    assert sf is not None
    args = {"q": Arg(q, "M bytes", U8, align=VECTOR)}
    M, half = match(operation, **args).values()
    K = 2 * half
    if K % group:
        raise ArgumentError(f"{operation}: q has rows of {K} codes, no multiple of {group}")
    check_range(operation, "M * K / 16", M * (K // NVFP4_GROUP), 0, 2**31 - 1)
    args["sf"] = Arg(sf, _axes(_scales(M, K // group, tiled)), U8)
    if call.outputs is not None:
        args["out"] = Arg(call.outputs[0], f"{M} {K}", _DTYPES[dtype], output=True, align=VECTOR)
    match(operation, **args)
    return M, K, tiled


def _plan_dequantize_nvfp4(call: Call) -> Plan:
    dtype, layout, pdl = call.settings
    M, K, tiled = _dequantize(call, "dequantize_nvfp4", NVFP4_GROUP, dtype, layout)
    q, _, g = call.inputs
    assert q is not None
    assert g is not None
    g_stride = _check_g("dequantize_nvfp4", q, g, M)
    ready = None
    if M * K:
        name = f"dequantize_nvfp4<{_type(_DTYPES[dtype])}, {_bool(tiled)}>"
        ready = load(DEQUANTIZE_FP4, name, call.device).prepare(
            _ceil(M * (K // NVFP4_GROUP), THREADS),
            THREADS,
            *(POINTER,) * 4,
            *(np.int32(n) for n in (M, K, g_stride)),
            pdl=bool(pdl),
        )
    return Plan((((M, K), _DTYPES[dtype]),), ready)


_DEQUANTIZE_NVFP4 = Operation("dequantize_nvfp4", ("q", "sf", "g"), ("out",), _plan_dequantize_nvfp4)


def _plan_dequantize_mxfp4(call: Call) -> Plan:
    dtype, layout, pdl = call.settings
    M, K, tiled = _dequantize(call, "dequantize_mxfp4", MXFP4_GROUP, dtype, layout)
    ready = None
    if M * K:
        name = f"dequantize_mxfp4<{_type(_DTYPES[dtype])}, {_bool(tiled)}>"
        ready = load(DEQUANTIZE_FP4, name, call.device).prepare(
            _ceil(M * (K // NVFP4_GROUP), THREADS),
            THREADS,
            *(POINTER,) * 3,
            np.int32(M),
            np.int32(K),
            pdl=bool(pdl),
        )
    return Plan((((M, K), _DTYPES[dtype]),), ready)


_DEQUANTIZE_MXFP4 = Operation("dequantize_mxfp4", ("q", "sf"), ("out",), _plan_dequantize_mxfp4)


_FORMS = tuple((kind, tiled) for kind in ("bf16", "float") for tiled in ("false", "true"))
# Every tile, with its register budgets for bf16 and float32.
_NVFP4_TILES: Final[tuple[tuple[Tile | FewTile, int, int], ...]] = (
    *((FewTile(threads, 8, 4), 48, 56) for threads in (128, 224)),
    *((FewTile(threads, 16, 2), 72, 72) for threads in (128, 224)),
    *((Tile(threads, 1), 56, 56) for threads in (256, 448)),
    *((Tile(threads, 4), 80, 120) for threads in (64, 128)),
    *((Tile(threads, 8), 128, 176) for threads in (128, 256)),
)
INSTANCES = (
    *(
        Instance(QUANTIZE_NVFP4, tile.instance(_DTYPES[dtype], tiled), wide if dtype == "float32" else narrow)
        for tile, narrow, wide in _NVFP4_TILES
        for dtype in _DTYPES
        for tiled in (False, True)
    ),
    *(Instance(QUANTIZE_NVFP4, f"tensor_amax<{kind}>", 40) for kind in ("bf16", "float")),
    *(
        Instance(source, f"{name}<{kind}, {items}, {tiled}>", narrow if kind == "bf16" else wide)
        for source, name in (
            (QUANTIZE_NVFP4, "quantize_nvfp4_tensor"),
            (QUANTIZE_NVFP4, "quantize_nvfp4_given"),
            (QUANTIZE_MXFP4, "quantize_mxfp4"),
        )
        for kind, tiled in _FORMS
        for items, narrow, wide in ((1, 48, 64), (4, 80, 112))
    ),
    *(
        Instance(DEQUANTIZE_FP4, f"{name}<{kind}, {tiled}>", 40)
        for name in ("dequantize_nvfp4", "dequantize_mxfp4")
        for kind, tiled in _FORMS
    ),
)
