"""Triton kernels with pipelined products: what Triton makes of `tl.dot` for a Hopper SM, with and without TMA.

`PROGRAMS` says how to compile each: the kernel, the types of its arguments, its constants, warps and stages. Pointers
and 32-bit arguments are multiples of 16, which wide copies need.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot_pointers(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b, row-major, loads by cp.async."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (first + k)[None, :], mask=m[:, None] < M, other=0.0)
        y = tl.load(b + (first + k)[:, None] * N + n[None, :], mask=n[None, :] < N, other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def dot_transposed(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b^T, both K-major: the layout of a linear layer, and the only one of fp8."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (first + k)[None, :], mask=m[:, None] < M, other=0.0)
        y = tl.load(b + n[None, :] * K + (first + k)[:, None], mask=n[None, :] < N, other=0.0)
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def dot_descriptors(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b^T, tiles by TMA from descriptors that the kernel makes, stored by TMA."""
    tile_a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    tile_b = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    tile_c = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        acc = tl.dot(tile_a.load([m, first]), tile_b.load([n, first]).T, acc)
    tile_c.store([m, n], acc.to(tile_c.dtype))


@triton.jit
def dot_host_descriptors(tile_a, tile_b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = a b^T, tiles by TMA from descriptors that the host makes."""
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        acc = tl.dot(tile_a.load([m, first]), tile_b.load([n, first]).T, acc)
    at = (m + tl.arange(0, BM))[:, None] * N + (n + tl.arange(0, BN))[None, :]
    tl.store(c + at, acc)


@triton.jit
def attention(q, k, v, out, L, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    """out = softmax(q k^T scale) v for one head, by online softmax: the second product takes its A from registers."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    x = tl.load(q + m[:, None] * D + d[None, :], mask=m[:, None] < L, other=0.0)
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for first in range(0, L, BN):
        n = first + tl.arange(0, BN)
        y = tl.load(k + n[None, :] * D + d[:, None], mask=n[None, :] < L, other=0.0)
        s = tl.where(n[None, :] < L, tl.dot(x, y) * scale, float("-inf"))
        peak = tl.maximum(most, tl.max(s, 1))
        p = tl.exp2((s - peak[:, None]) * 1.4426950408889634)
        fade = tl.exp2((most - peak) * 1.4426950408889634)
        total = total * fade + tl.sum(p, 1)
        z = tl.load(v + n[:, None] * D + d[None, :], mask=n[:, None] < L, other=0.0)
        acc = tl.dot(p.to(z.dtype), z, acc * fade[:, None])
        most = peak
    tl.store(out + m[:, None] * D + d[None, :], acc / total[:, None], mask=m[:, None] < L)


@triton.jit
def dot_scaled_rows(a, sa, b, sb, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c = (a sa)(b sb)^T in fp8 with a scale a row and 128 columns, promoted to fp32 each block."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(0, K // BK):
        x = tl.load(a + m[:, None] * K + (block * BK + k)[None, :])
        y = tl.load(b + n[None, :] * K + (block * BK + k)[:, None])
        scale = tl.load(sa + m * (K // BK) + block)[:, None] * tl.load(sb + n * (K // BK) + block)[None, :]
        acc += tl.dot(x, y) * scale
    tl.store(c + m[:, None] * N + n[None, :], acc)


@triton.jit
def dot_split_k(a, b, c, N, K, PART, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c += a b^T over a part of K, added up with atomics."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.program_id(2) * PART + tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, PART, BK):
        x = tl.load(a + m[:, None] * K + (first + k)[None, :])
        y = tl.load(b + n[None, :] * K + (first + k)[:, None])
        acc = tl.dot(x, y, acc)
    tl.atomic_add(c + m[:, None] * N + n[None, :], acc)


_TILE = {"BM": 64, "BN": 64, "BK": 64}
_WIDE = {"BM": 64, "BN": 64, "BK": 128}
_SMALL = {"BM": 32, "BN": 32, "BK": 32}  # too small for wgmma: mma.sync
_BF16, _FP16, _FP8 = "*bf16 *bf16 *fp32", "*fp16 *fp16 *fp32", "*fp8e4nv *fp8e4nv *fp32"

PROGRAMS = {
    "dot_bf16": (dot_pointers, f"{_BF16} i32 i32 i32", _TILE, 4, 3),
    "dot_bf16_mma_sync": (dot_pointers, f"{_BF16} i32 i32 i32", _SMALL, 2, 3),
    "dot_fp16_transposed": (dot_transposed, f"{_FP16} i32 i32 i32", _TILE, 4, 4),
    "dot_tf32": (dot_pointers, "*fp32 *fp32 *fp32 i32 i32 i32", {"BM": 64, "BN": 32, "BK": 32}, 4, 2),
    "dot_fp8": (dot_transposed, f"{_FP8} i32 i32 i32", _WIDE, 4, 3),
    "dot_fp8_scaled": (dot_scaled_rows, "*fp8e4nv *fp32 *fp8e4nv *fp32 *fp32 i32 i32", _WIDE, 4, 3),
    "dot_descriptors": (dot_descriptors, "*bf16 *bf16 *bf16 i32 i32 i32", _TILE, 4, 3),
    "dot_fp8_descriptors": (dot_descriptors, "*fp8e4nv *fp8e4nv *bf16 i32 i32 i32", _WIDE, 4, 3),
    "dot_host_descriptors": (
        dot_host_descriptors, "tensordesc<bf16[64,64]> tensordesc<bf16[64,64]> *fp32 i32 i32", _TILE, 4, 3
    ),
    "attention": (attention, "*bf16 *bf16 *bf16 *fp32 i32 fp32", {"BM": 64, "BN": 64, "D": 64}, 4, 3),
    "dot_split_k": (dot_split_k, f"{_BF16} i32 i32 i32", _TILE, 8, 3),
}  # fmt: skip
