"""The oracles of the linear family: NumPy, on the codecs of dsv4_rt/formats.py, which define the formats.

Letters: M rows, K channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv4_rt import formats
from dsv4_rt.formats import BF16, Codes, F32Array, Floats


def scales(sf: Codes, layout: str) -> Codes:
    """Row-major block scales in a layout of the kernels: "rows" or "128x4"."""
    return sf if layout == "rows" else formats.interleave_128x4(sf)


def quantize_nvfp4(x: Floats, layout: str = "rows") -> tuple[Codes, Codes, F32Array]:
    """What dsv4_rt.linear.ops.quantize_nvfp4 documents."""
    g = formats.nvfp4_row_scale(x)
    return (*quantize_nvfp4_given(x, g, layout)[:2], g)


def quantize_nvfp4_tensor(x: Floats, layout: str = "rows") -> tuple[Codes, Codes, F32Array]:
    """What dsv4_rt.linear.ops.quantize_nvfp4_tensor documents."""
    g = formats.nvfp4_tensor_scale(x).reshape(1)
    return (*quantize_nvfp4_given(x, g, layout)[:2], g)


def quantize_nvfp4_given(x: Floats, g: F32Array, layout: str = "rows") -> tuple[Codes, Codes, int]:
    """What dsv4_rt.linear.ops.quantize_nvfp4_given documents, with the number of saturated blocks."""
    q, sf = formats.nvfp4_encode(x, g)
    return q, scales(sf, layout), formats.nvfp4_saturated_blocks(x, g)


def quantize_mxfp4(x: Floats, layout: str = "rows") -> tuple[Codes, Codes]:
    """What dsv4_rt.linear.ops.quantize_mxfp4 documents."""
    q, sf = formats.mxfp4_encode(x)
    return q, scales(sf, layout)


def dequantize_nvfp4(q: Codes, sf: Codes, g: F32Array, dtype: str = "bfloat16") -> NDArray[Any]:
    """What dsv4_rt.linear.ops.dequantize_nvfp4 documents, for row-major scales."""
    with np.errstate(all="ignore"):
        return _as(formats.nvfp4_decode(q, sf, g), dtype)


def dequantize_mxfp4(q: Codes, sf: Codes, dtype: str = "bfloat16") -> NDArray[Any]:
    """What dsv4_rt.linear.ops.dequantize_mxfp4 documents, for row-major scales."""
    return _as(formats.mxfp4_decode(q, sf), dtype)


def _as(values: F32Array, dtype: str) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return values if dtype == "float32" else values.astype(BF16)
