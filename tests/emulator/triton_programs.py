"""Triton kernels of one idea each. They use neither tensor cores nor asynchronous copies: no tl.dot, one stage.

`PROGRAMS` says how to compile each: the kernel, the types of its arguments, its constants and its warps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def absmax_fp8(x, out, scales, WIDTH: tl.constexpr):
    """Rows to e4m3 with one scale each."""
    row = tl.program_id(0)
    at = row * WIDTH + tl.arange(0, WIDTH)
    v = tl.load(x + at)
    scale = tl.max(tl.abs(v), axis=0) / 448.0
    tl.store(out + at, (v / scale).to(tl.float8e4nv))
    tl.store(scales + row, scale)


@triton.jit
def argmax_rows(x, best, where, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    value = tl.load(x + row * columns + at, mask=at < columns, other=float("-inf"))
    most, index = tl.max(value, axis=0, return_indices=True)
    tl.store(best + row, most)
    tl.store(where + row, index)


@triton.jit
def dot_rows(x, y, out, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, columns, WIDTH):
        at = first + tl.arange(0, WIDTH)
        keep = at < columns
        a = tl.load(x + row * columns + at, mask=keep, other=0.0).to(tl.float32)
        b = tl.load(y + row * columns + at, mask=keep, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + row, tl.sum(total, axis=0))


@triton.jit
def gather_rows(table, ids, out, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids + first)
    column = tl.arange(0, WIDTH)
    keep = (row >= 0) & (row < rows)
    value = tl.load(table + row[:, None] * WIDTH + column[None, :], mask=keep[:, None], other=-1)
    tl.store(out + first[:, None] * WIDTH + column[None, :], value)


@triton.jit
def gelu(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n).to(tl.float32)
    inner = 1.5957691216057308 * (v + 0.044715 * v * v * v)
    tl.store(out + at, (v * tl.sigmoid(inner)).to(out.dtype.element_ty), mask=at < n)


@triton.jit
def histogram(x, bins, n, BLOCK: tl.constexpr, BINS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0)
    counts = tl.histogram(value, BINS, mask=at < n)
    tl.atomic_add(bins + tl.arange(0, BINS), counts)


@triton.jit
def layernorm(x, weight, bias, out, mean_out, columns, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    keep = at < columns
    v = tl.load(x + row * columns + at, mask=keep, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / columns
    centred = tl.where(keep, v - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / columns + eps)
    w = tl.load(weight + at, mask=keep)
    b = tl.load(bias + at, mask=keep)
    tl.store(out + row * columns + at, centred * scale * w + b, mask=keep)
    tl.store(mean_out + row, mean)


@triton.jit
def philox(out, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.randint(seed, at))


@triton.jit
def positive(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    tl.device_assert(v > 0, "a value must be positive")
    tl.store(out + at, v)


@triton.jit
def say(x):
    tl.device_print("x", tl.load(x + tl.program_id(0)))


@triton.jit
def scan_rows(x, sums, backwards, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = row * WIDTH + tl.arange(0, WIDTH)
    v = tl.load(x + at)
    tl.store(sums + at, tl.cumsum(v, axis=0))
    tl.store(backwards + at, tl.cumsum(v, axis=0, reverse=True))


@triton.jit
def _affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def linear_recurrence(gate, x, out, WIDTH: tl.constexpr):
    """h[i] = gate[i] * h[i - 1] + x[i], as a scan over pairs."""
    row = tl.program_id(0)
    at = row * WIDTH + tl.arange(0, WIDTH)
    _, h = tl.associative_scan((tl.load(gate + at), tl.load(x + at)), 0, _affine)
    tl.store(out + at, h)


@triton.jit
def scatter_add(x, ids, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = at < n
    to = tl.load(ids + at, mask=keep, other=0)
    tl.atomic_add(out + to, tl.load(x + at, mask=keep, other=0.0), mask=keep & (to >= 0))


@triton.jit
def shuffle_columns(x, order, out, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out[r, c] = x[r, order[r, c]], by tl.gather; even and odd columns change places on the way out."""
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    picked = tl.gather(tl.load(x + at), tl.load(order + at), axis=1)
    even, odd = tl.split(tl.reshape(picked, (ROWS, WIDTH // 2, 2)))
    tl.store(out + at, tl.interleave(odd, even))


@triton.jit
def softmax_rows(x, out, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    v = tl.load(x + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * columns + at, e / tl.sum(e, axis=0), mask=at < columns)


@triton.jit
def sort_rows(x, up, down, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    v = tl.load(x + at)
    tl.store(up + at, tl.sort(v))
    tl.store(down + at, tl.sort(v, descending=True))


@triton.jit
def spin_lock(lock, total, x, BLOCK: tl.constexpr):
    """Programs take turns by compare and swap; the sum is a plain load and store in between."""
    v = tl.sum(tl.load(x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(total, tl.load(total) + v)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def top_k(x, out, WIDTH: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    v = tl.load(x + row * WIDTH + tl.arange(0, WIDTH))
    tl.store(out + row * K + tl.arange(0, K), tl.topk(v, K))


@triton.jit
def transpose(x, out, rows, columns, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    keep = (r < rows)[:, None] & (c < columns)[None, :]
    v = tl.load(x + r[:, None] * columns + c[None, :], mask=keep)
    tl.store(out + c[:, None] * rows + r[None, :], tl.trans(v), mask=tl.trans(keep))


@triton.jit
def two_axes(x, rows_out, columns_out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R), tl.arange(0, C)
    v = tl.load(x + r[:, None] * C + c[None, :])
    tl.store(rows_out + r, tl.sum(v, axis=1))
    tl.store(columns_out + c, tl.min(v, axis=0))


@triton.jit
def _merge(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    share = tl.where(n == 0, 0.0, n_b / n)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, n


@triton.jit
def welford(x, mean_out, variance_out, columns, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, WIDTH)
    keep = at < columns
    v = tl.load(x + row * columns + at, mask=keep, other=0.0)
    mean, m2, n = tl.reduce((v, tl.zeros_like(v), keep.to(tl.float32)), 0, _merge)
    tl.store(mean_out + row, mean)
    tl.store(variance_out + row, m2 / n)


PROGRAMS = {
    "absmax_fp8": (absmax_fp8, "*fp32 *fp8e4nv *fp32", {"WIDTH": 256}, 2),
    "argmax_rows": (argmax_rows, "*fp32 *fp32 *i32 i32", {"WIDTH": 512}, 4),
    "dot_rows": (dot_rows, "*bf16 *bf16 *fp32 i32", {"WIDTH": 256}, 4),
    "gather_rows": (gather_rows, "*i32 *i64 *i32 i32", {"WIDTH": 64, "BLOCK": 16}, 4),
    "gelu": (gelu, "*fp16 *fp16 i32", {"BLOCK": 256}, 4),
    "histogram": (histogram, "*i32 *i32 i32", {"BLOCK": 512, "BINS": 64}, 4),
    "layernorm": (layernorm, "*fp16 *fp32 *fp32 *fp32 *fp32 i32 fp32", {"WIDTH": 1024}, 8),
    "linear_recurrence": (linear_recurrence, "*fp32 *fp32 *fp32", {"WIDTH": 256}, 4),
    "philox": (philox, "*i32 i32", {"BLOCK": 128}, 4),
    "positive": (positive, "*i32 *i32", {"BLOCK": 64}, 1),
    "say": (say, "*i32", {}, 1),
    "scan_rows": (scan_rows, "*i32 *i32 *i32", {"WIDTH": 1024}, 4),
    "scatter_add": (scatter_add, "*fp32 *i32 *fp32 i32", {"BLOCK": 256}, 4),
    "shuffle_columns": (shuffle_columns, "*i32 *i32 *i32", {"ROWS": 4, "WIDTH": 64}, 4),
    "softmax_rows": (softmax_rows, "*fp32 *fp32 i32", {"WIDTH": 512}, 4),
    "sort_rows": (sort_rows, "*fp32 *fp32 *fp32", {"WIDTH": 128, "ROWS": 4}, 4),
    "spin_lock": (spin_lock, "*i32 *i32 *i32", {"BLOCK": 64}, 1),
    "top_k": (top_k, "*i32 *i32", {"WIDTH": 256, "K": 8}, 2),
    "transpose": (transpose, "*fp32 *fp32 i32 i32", {"R": 32, "C": 32}, 4),
    "two_axes": (two_axes, "*fp64 *fp64 *fp64", {"R": 16, "C": 64}, 2),
    "welford": (welford, "*fp32 *fp32 *fp32 i32", {"WIDTH": 512}, 4),
}
