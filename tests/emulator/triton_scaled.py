"""Triton kernels with block-scaled products: what Triton makes of `tl.dot_scaled` for a Blackwell SM.

Scales come either as [rows, K/V] bytes, which Triton stores to tensor memory itself, or as the five-dimensional tiles
of the 128x4 layout, by TMA, which become tcgen05.cp. `PROGRAMS` is as in triton_dots.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_pointers(a, sa, b, sb, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
                 P: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """c = (a sa)(b sb)^T: V factors share a scale, P of them a byte; scales row by row."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK // P)
    s = tl.arange(0, BK // V)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K // BK):
        x = tl.load(a + m[:, None] * (K // P) + (i * (BK // P) + k)[None, :])
        y = tl.load(b + n[None, :] * (K // P) + (i * (BK // P) + k)[:, None])
        u = tl.load(sa + m[:, None] * (K // V) + (i * (BK // V) + s)[None, :])
        v = tl.load(sb + n[:, None] * (K // V) + (i * (BK // V) + s)[None, :])
        acc = tl.dot_scaled(x, u, F, y, v, F, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def dot_tiles(ta, tsa, tb, tsb, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
              PA: tl.constexpr, PB: tl.constexpr, FA: tl.constexpr, FB: tl.constexpr):  # fmt: skip
    """The same by TMA, scales in the 128x4 layout: [1, rows/128, K/V/4, 2, 256] bytes."""
    m, n = tl.program_id(0), tl.program_id(1)
    RM: tl.constexpr = BM // 128
    RN: tl.constexpr = BN // 128
    RK: tl.constexpr = BK // V // 4
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K // BK):
        x = ta.load([m * BM, i * (BK // PA)])
        y = tb.load([n * BN, i * (BK // PB)])
        u = tsa.load([0, m * RM, i * RK, 0, 0]).reshape(RM, RK, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(BM, BK // V)
        v = tsb.load([0, n * RN, i * RK, 0, 0]).reshape(RN, RK, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(BN, BK // V)
        acc = tl.dot_scaled(x, u, FA, y.T, v, FB, acc)
    at = (m * BM + tl.arange(0, BM))[:, None] * N + (n * BN + tl.arange(0, BN))[None, :]
    tl.store(c + at, acc)


_FP8 = {"BM": 128, "BN": 64, "BK": 128, "V": 32, "P": 1, "F": "e4m3"}
_FP4 = {"BM": 128, "BN": 128, "BK": 128, "V": 32, "P": 2, "F": "e2m1"}
_TILE = {"BM": 128, "BN": 128, "BK": 128, "V": 32, "PA": 1, "PB": 1, "FA": "e4m3", "FB": "e4m3"}
_TILE4 = {"BM": 128, "BN": 256, "BK": 256, "V": 32, "PA": 2, "PB": 2, "FA": "e2m1", "FB": "e2m1"}
_TILES = "tensordesc<{}[128,{}]> tensordesc<{}[1,1,{},2,256]> tensordesc<{}[{},{}]> tensordesc<{}[1,{},{},2,256]>"

PROGRAMS = {
    "scaled_mxfp8": (dot_pointers, "*fp8e4nv *u8 *fp8e4nv *u8 *fp32 i32 i32", _FP8, 4, 2),
    "scaled_mxfp4": (dot_pointers, "*u8 *u8 *u8 *u8 *fp32 i32 i32", _FP4, 4, 2),
    "scaled_nvfp4": (
        dot_pointers, "*u8 *fp8e4nv *u8 *fp8e4nv *fp32 i32 i32", _FP4 | {"V": 16, "BN": 64}, 4, 2
    ),
    "scaled_tiles_mxfp8": (
        dot_tiles, _TILES.format("fp8e4nv", 128, "u8", 1, "fp8e4nv", 128, 128, "u8", 1, 1) + " *fp32 i32 i32", _TILE,
        4, 3
    ),
    "scaled_tiles_mxfp4": (
        dot_tiles, _TILES.format("u8", 128, "u8", 2, "u8", 256, 128, "u8", 2, 2) + " *fp32 i32 i32", _TILE4, 4, 2
    ),
    "scaled_tiles_nvfp4": (
        dot_tiles, _TILES.format("u8", 128, "fp8e4nv", 4, "u8", 128, 128, "fp8e4nv", 1, 4) + " *fp32 i32 i32",
        _TILE4 | {"BN": 128, "V": 16}, 4, 3
    ),
    "scaled_tiles_mixed": (
        dot_tiles, _TILES.format("fp8e4nv", 128, "u8", 1, "u8", 128, 64, "u8", 1, 1) + " *fp32 i32 i32",
        _TILE | {"PB": 2, "FB": "e2m1"}, 4, 3
    ),
}  # fmt: skip
