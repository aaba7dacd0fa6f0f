"""The kernels of hopper/, each with a run that compares it with NumPy: what a Hopper SM can do that older ones cannot.

A run takes the device, a way to load the kernel (from its file, or from a changed copy of it) and random numbers.
Inputs are small integers, so that every sum is exact in any order; `normal` inputs are compared within a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_dtypes import bfloat16

from dsv4_rt.tensor_map import TensorMap

FOLDER = Path(__file__).parent / "hopper"


def integers(rng, *shape):
    return rng.integers(-8, 9, shape).astype(bfloat16)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(bfloat16)


def product(a, b):
    """a b^T in float64, and the sum of the magnitudes of its terms."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b.T, np.abs(a) @ np.abs(b).T


def compare(got, a, b):
    """Products of 16-bit factors are exact. A tensor core adds 16 of them and the accumulator at once: it cuts each of
    the 17 below 2^-25 of the largest, and the result to fp32 (`mma.py`): 17 * 2^-25 + 2^-23 of the magnitudes."""
    want, size = product(a, b)
    assert (np.abs(got - want) <= -(-a.shape[1] // 16) * 21 * 2.0**-25 * size).all()
    if (a == np.rint(a.astype(np.float32))).all():
        np.testing.assert_array_equal(got, want)


def poisoned(device, *shape):
    return device.array(np.full(shape, np.nan, np.float32))


def run_gemm_ring(device, load, rng, M=192, N=160, K=584, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    kernel = load("gemm_ring.cu", "gemm_ring<4>")
    maps = [TensorMap(device.array(x), box=(128, 64), swizzle="128B") for x in (a, b)]
    c = poisoned(device, M, N)
    grid = (-(-N // 128), -(-M // 128))
    kernel.launch(grid, 384, *maps, c, np.int32(M), np.int32(N), np.int32(K), shared=4 * 32768 + 1024)
    compare(device.numpy(c), a, b)


def run_gemm_multicast(device, load, rng, M=150, N=100, K=520, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    kernel = load("gemm_multicast.cu", "gemm_multicast<3>")
    maps = [TensorMap(device.array(x), box=(rows, 64), swizzle="128B") for x, rows in ((a, 64), (b, 32))]
    c = poisoned(device, M, N)
    grid = (2 * -(-M // 128), -(-N // 64))
    kernel.launch(grid, 160, *maps, c, np.int32(M), np.int32(N), np.int32(K), shared=3 * 16384 + 1024)
    compare(device.numpy(c), a, b)


def run_split_k_cluster(device, load, rng, E=100, K=203):
    x, w = integers(rng, 3, K).astype(np.float32), integers(rng, E, K).astype(np.float32)
    kernel = load("split_k_cluster.cu", "split_k_cluster<4, 3>")
    y = poisoned(device, 3, E)
    arrays = device.array(x), device.array(w), y
    kernel.launch((4, -(-E // 64)), 128, *arrays, np.int32(E), np.int32(K), cluster=(4, 1, 1))
    np.testing.assert_array_equal(device.numpy(y), x @ w.T)


def run_stream_k(device, load, rng, tiles=5, steps=7, ctas=9):
    x = rng.integers(-100, 100, (tiles, steps, 128)).astype(np.float32)
    kernel = load("stream_k.cu", "stream_k")
    y, partial = poisoned(device, tiles, 128), poisoned(device, ctas, 128)
    flags = device.array(np.zeros(ctas, np.int32))
    sizes = np.int32(tiles), np.int32(steps)
    kernel.launch(ctas, 128, device.array(x), y, partial, flags, *sizes, cooperative=True)
    np.testing.assert_array_equal(device.numpy(y), x.sum(1))


def run_cp_async_ring(device, load, rng, M=100, N=72, K=200, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    kernel = load("cp_async_ring.cu", "cp_async_ring<4>")
    c = poisoned(device, M, N)
    inputs = [device.array(x.view(np.uint16)) for x in (a, b)]
    kernel.launch((-(-N // 32), -(-M // 64)), 128, *inputs, c, np.int32(M), np.int32(N), np.int32(K))
    compare(device.numpy(c), a, b)


def run_scale_tiles(device, load, rng, R=90, C=100, ctas=2):
    x = rng.integers(-1000, 1000, (R, C)).astype(np.float32)
    kernel = load("scale_tiles.cu", "scale_tiles")
    source, y = device.array(x), poisoned(device, R, C)
    maps = [TensorMap(each, box=(16, 32)) for each in (source, y)]
    kernel.launch(ctas, 128, *maps, np.float32(3), np.int32(R), np.int32(C))
    np.testing.assert_array_equal(device.numpy(y), 3 * x)


@dataclass(frozen=True)
class Evidence:
    run: Callable[..., None]
    hopper_only: bool = False  # wgmma


EVIDENCE = {
    "gemm_ring": Evidence(run_gemm_ring, hopper_only=True),
    "gemm_multicast": Evidence(run_gemm_multicast, hopper_only=True),
    "split_k_cluster": Evidence(run_split_k_cluster),
    "stream_k": Evidence(run_stream_k),
    "cp_async_ring": Evidence(run_cp_async_ring),
    "scale_tiles": Evidence(run_scale_tiles),
}
