"""Products that Triton pipelines (triton_dots.py), by cp.async or TMA and wgmma or tcgen05, against NumPy."""

import re

import numpy as np
import pytest
from asynchronous import all_schedules
from foreign import kept
from hopper_kernels import compare, integers, normal, product
from keep import ARCHITECTURES, triton_programs, triton_source
from ml_dtypes import bfloat16, float8_e4m3fn
from programs import Scratch, aligned, run_ptx

from dsv4_rt.emulator import Machine
from dsv4_rt.tensor_map import TensorMap

pytestmark = all_schedules


def bits(array):
    return aligned(array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize]))


@pytest.fixture(params=ARCHITECTURES)
def launch(request, completion, rng):
    """launch(name, grid, *args): a kept program; arrays are 128-byte aligned, scratch comes behind the arguments."""

    def run(name, grid, *args):
        ptx, shared = kept(name, request.param)
        entry = re.search(r"\.entry (\w+)\(", ptx)[1]
        threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        scratch = re.match(r".*scratch (\d+)", ptx)
        size = int(scratch[1]) * int(np.prod(grid)) if scratch else 0
        room = aligned(np.zeros(size, np.uint8)).view(Scratch) if size else np.uint64(0)
        machine = Machine(request.param, completion=completion, seed=int(rng.integers(1 << 30)))
        return run_ptx(ptx, entry, grid, threads, *args, room, np.uint64(0), machine=machine, shared=shared)

    return run


def sizes(*numbers):
    return tuple(np.int32(n) for n in numbers)


def poisoned(*shape, dtype=np.float32):
    return aligned(np.full(shape, np.nan, dtype))


@pytest.mark.parametrize("name", ["dot_bf16", "dot_bf16_mma_sync"])
@pytest.mark.parametrize("draw", [integers, normal])
def test_bf16(launch, name, draw, rng):
    M, N, K = 96, 80, 192
    a, b, c = draw(rng, M, K), draw(rng, K, N), poisoned(M, N)
    launch(name, (2, 2) if name == "dot_bf16" else (3, 3), bits(a), bits(b), c, *sizes(M, N, K))
    compare(c, a, b.T)


def test_fp16_transposed(launch, rng):
    a, b, c = (x.astype(np.float16) for x in (normal(rng, 64, 256), normal(rng, 128, 256))), None, poisoned(64, 128)
    a, b = a
    launch("dot_fp16_transposed", (1, 2), bits(a), bits(b), c, *sizes(64, 128, 256))
    compare(c, a, b)


def test_tf32_takes_the_upper_19_bits(launch, rng):
    M, N, K = 64, 64, 96
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((M, K), (K, N)))
    c = poisoned(M, N)
    launch("dot_tf32", (1, 2), aligned(a), aligned(b), c, *sizes(M, N, K))
    want, size = product(a, b.T)
    # Operands are cut to 10 explicit mantissa bits (2^-10 each); sums as in `compare`, 8 products each: 13 * 2^-25.
    assert (np.abs(c - want) <= (2.0**-9 + 2.0**-19 + K / 8 * 13 * 2.0**-25) * size).all()
    a, b = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((M, K), (K, N)))
    launch("dot_tf32", (1, 2), aligned(a), aligned(b), c, *sizes(M, N, K))
    np.testing.assert_array_equal(c, a @ b)


def small(rng, *shape):
    """e4m3 integers of which any 256 products sum exactly in the 14 bits that fp8 sums keep."""
    return rng.integers(-2, 3, shape).astype(float8_e4m3fn)


def test_fp8(launch, rng):
    a, b, c = small(rng, 128, 256), small(rng, 64, 256), poisoned(128, 64)
    launch("dot_fp8", (2, 1), bits(a), bits(b), c, *sizes(128, 64, 256))
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


def test_fp8_scaled_rows(launch, rng):
    a, b, c = small(rng, 64, 384), small(rng, 128, 384), poisoned(64, 128)
    sa, sb = (2.0 ** rng.integers(-3, 4, shape).astype(np.float32) for shape in ((64, 3), (128, 3)))
    launch("dot_fp8_scaled", (1, 2), bits(a), aligned(sa), bits(b), aligned(sb), c, *sizes(128, 384))
    parts = [a[:, i : i + 128].astype(np.float64) @ b[:, i : i + 128].astype(np.float64).T for i in (0, 128, 256)]
    # Powers of two: the scaled sums of three blocks are exact in fp32 (13 + 2 * 6 bits at most).
    np.testing.assert_array_equal(c, sum(p * sa[:, i : i + 1] * sb[:, i] for i, p in enumerate(parts)))


def test_descriptors_made_by_the_kernel(launch, rng):
    M, N, K = 100, 72, 136  # tails on every side: TMA fills with zeros and clips the store
    a, b = integers(rng, M, K), integers(rng, N, K)
    c = poisoned(M, N, dtype=bfloat16)
    launch("dot_descriptors", (2, 2), bits(a), bits(b), c.view(np.uint16), *sizes(M, N, K))
    np.testing.assert_array_equal(c, product(a, b)[0].astype(np.float32).astype(bfloat16))


def test_fp8_descriptors_made_by_the_kernel(launch, rng):
    a, b = small(rng, 64, 256), small(rng, 128, 256)
    c = poisoned(64, 128, dtype=bfloat16)
    launch("dot_fp8_descriptors", (1, 2), bits(a), bits(b), c.view(np.uint16), *sizes(64, 128, 256))
    np.testing.assert_array_equal(c, product(a, b)[0].astype(np.float32).astype(bfloat16))


def test_descriptors_made_by_the_host(launch, rng):
    M, N, K = 64, 64, 256
    a, b, c = integers(rng, M, K), integers(rng, N, K), poisoned(M, N)
    described = []
    for array in (a, b):
        box = TensorMap(bits(array), box=(64, 64), dtype="bf16", swizzle="128B", l2_promotion="none")
        described += [box, *sizes(64, K), np.int64(K), np.int64(1)]
    launch("dot_host_descriptors", (1, 1), *described, c, *sizes(N, K))
    compare(c, a, b)


def test_attention(launch, rng):
    L, D = 160, 64
    q, k, v = (normal(rng, L, D) for _ in range(3))
    out = poisoned(L, D)
    scale = np.float32(0.125)
    launch("attention", (3, 1), bits(q), bits(k), bits(v), out, np.int32(L), scale)
    scores, size = product(q, k)
    p = np.exp((scores - scores.max(1, keepdims=True)) * 0.125)
    values = v.astype(np.float64)
    want = p @ values / p.sum(1, keepdims=True)
    # p is rounded to bf16 (2^-9) and comes from ex2.approx (2^-22) of a score off as in `compare`; so does the
    # sum it is divided by. The second product and the fades add less than 2^-15 of the magnitudes.
    delta = 2.0**-9 + 2 * (2.0**-22 + D / 16 * 21 * 2.0**-25 * 0.125 * size.max()) + 2.0**-15
    assert (np.abs(out - want) <= delta * (p @ np.abs(values)) / p.sum(1, keepdims=True)).all()


def test_split_k(launch, rng):
    M, N, K = 64, 64, 512
    a, b, c = integers(rng, M, K), integers(rng, N, K), aligned(np.zeros((M, N), np.float32))
    launch("dot_split_k", (1, 1, 4), bits(a), bits(b), c, *sizes(N, K, K // 4))
    np.testing.assert_array_equal(c, product(a, b)[0])


def test_all_are_here(completion):
    source = open(__file__).read()
    names = {name for name, _ in triton_programs() if triton_source(name).stem == "triton_dots"}
    assert names == {name for name in names if f'"{name}"' in source}
