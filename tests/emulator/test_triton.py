"""Programs Triton compiles from the kernels of triton_programs.py, run on the emulator and equal to NumPy."""

import numpy as np
import pytest
from foreign import kept
from ml_dtypes import bfloat16, float8_e4m3fn
from programs import ARCHITECTURES, run_ptx

from dsv4_rt.errors import KernelFault

pytestmark = [pytest.mark.parametrize("arch", ARCHITECTURES), pytest.mark.usefixtures("checks")]
THREADS = {"layernorm": 256, "absmax_fp8": 64, "top_k": 64, "two_axes": 64} | dict.fromkeys(
    ("positive", "say", "spin_lock"), 32
)


@pytest.fixture
def launch(arch):
    """launch(name, grid, *args, **options): the entry takes two scratch pointers more, which stay null."""

    def run(name, grid, *args, **options):
        ptx, shared = kept(name, arch)
        args = (*args, np.uint64(0), np.uint64(0))
        return run_ptx(ptx, name, grid, THREADS.get(name, 128), *args, arch=arch, shared=shared, **options)

    return run


def test_absmax_fp8(launch, rng):
    x = rng.standard_normal((5, 256)).astype(np.float32)
    out, scales = np.zeros(x.shape, np.uint8), np.zeros(5, np.float32)
    launch("absmax_fp8", 5, x, out, scales)
    # Triton divides by a constant as a product with an approximate reciprocal: two roundings and 2 ulp on hardware.
    np.testing.assert_allclose(scales, np.abs(x).max(1) / 448, rtol=4 * 2.0**-24)
    # Division by a row's scale is div.full, which the emulator rounds correctly.
    np.testing.assert_array_equal(out, (x / scales[:, None]).astype(float8_e4m3fn).view(np.uint8))


def test_argmax(launch, rng):
    x = rng.integers(-40, 40, (7, 333)).astype(np.float32)  # many equal values: the first one wins
    best, where = np.zeros(7, np.float32), np.zeros(7, np.int32)
    launch("argmax_rows", 7, x, best, where, np.int32(333))
    np.testing.assert_array_equal(best, x.max(1))
    np.testing.assert_array_equal(where, x.argmax(1))


def test_dot_of_rows(launch, rng):
    x, y = rng.standard_normal((2, 3, 1000)).astype(bfloat16)
    out = np.zeros(3, np.float32)
    launch("dot_rows", 3, x.view(np.uint16), y.view(np.uint16), out, np.int32(1000))
    terms = x.astype(np.float64) * y.astype(np.float64)
    # A term is exact or rounded once in each of at most 4 + 8 additions: 4 turns of the loop, a tree over 256 lanes.
    assert (np.abs(out - terms.sum(1)) <= 12 * 2.0**-24 * np.abs(terms).sum(1)).all()


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_masked_gather(launch, order, rng):
    table = rng.integers(0, 2**31, (50, 64)).astype(np.int32)
    ids = rng.integers(-20, 70, 48)
    out = np.zeros((48, 64), np.int32)
    launch("gather_rows", 3, table, ids, out, np.int32(50), order=order, seed=1)
    known = (ids >= 0) & (ids < 50)
    np.testing.assert_array_equal(out, np.where(known[:, None], table[np.where(known, ids, 0)], -1))


def test_gelu(launch, rng):
    x = (3 * rng.standard_normal(1000)).astype(np.float16)
    out = np.zeros_like(x)
    launch("gelu", 4, x, out, np.int32(1000))
    v = x.astype(np.float64)
    want = v / (1 + np.exp(-1.5957691216057308 * (v + 0.044715 * v**3)))
    # Half an ulp of float16 (2^-11, or 2^-25 where it is subnormal) and as much again for the float32 arithmetic.
    np.testing.assert_allclose(out, want, rtol=2.0**-10, atol=2.0**-24)


def test_histogram(launch, rng):
    x = np.minimum(rng.geometric(0.1, 3000) - 1, 63).astype(np.int32)
    bins = np.arange(64, dtype=np.int32)
    launch("histogram", 6, x, bins, np.int32(3000))
    np.testing.assert_array_equal(bins, np.arange(64) + np.bincount(x, minlength=64))


def test_layernorm(launch, rng):
    n = 777
    x = rng.standard_normal((4, n)).astype(np.float16)
    weight, bias = rng.standard_normal((2, n)).astype(np.float32)
    out, mean = np.zeros((4, n), np.float32), np.zeros(4, np.float32)
    launch("layernorm", 4, x, weight, bias, out, mean, np.int32(n), np.float32(1e-5))
    v = x.astype(np.float64)
    centre = v.mean(1, keepdims=True)
    want = (v - centre) / np.sqrt(v.var(1, keepdims=True) + 1e-5) * weight + bias
    np.testing.assert_allclose(mean, centre[:, 0], rtol=0, atol=12 * 2.0**-24 * np.abs(v).mean())
    # The sums have a relative error of at most 12 roundings, each later operation one of its own.
    np.testing.assert_allclose(out, want, rtol=0, atol=20 * 2.0**-24 * (np.abs(want).max() + np.abs(bias).max()))


def test_associative_scan_of_pairs(launch, rng):
    gate = rng.integers(-1, 2, (3, 256)).astype(np.float32)  # small integers: exact in every order
    x = rng.integers(-9, 10, (3, 256)).astype(np.float32)
    out = np.zeros_like(x)
    launch("linear_recurrence", 3, gate, x, out)
    h, want = np.zeros(3), []
    for i in range(256):
        h = gate[:, i] * h + x[:, i]
        want.append(h)
    np.testing.assert_array_equal(out, np.stack(want, 1))


def test_philox(launch, rng):
    seed = int(rng.integers(0, 2**31))
    out = np.zeros(512, np.int32)
    launch("philox", 4, out, np.int32(seed))
    # Philox4x32-10 of Salmon et al.: counter (i, 0, 0, 0), key (seed, 0).
    c = [np.arange(512, dtype=np.uint64), *np.zeros((3, 512), np.uint64)]
    k0, k1, low = seed, 0, np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        shift = np.uint64(32)
        c = [(b >> shift) ^ c[1] ^ np.uint64(k0), b & low, (a >> shift) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    np.testing.assert_array_equal(out.view(np.uint32), c[0])


def test_device_assert(launch):
    x, out = np.arange(1, 65, dtype=np.int32), np.zeros(64, np.int32)
    launch("positive", 1, x, out)
    np.testing.assert_array_equal(out, x)
    x[21] = 0
    with pytest.raises(KernelFault, match=r"assertion failed: a value must be positive, in .*triton_programs\.py:\d+"):
        launch("positive", 1, x, out)


def test_device_print(launch, capsys, rng):
    x = rng.integers(-1000, 1000, 3).astype(np.int32)
    capsys.readouterr()
    launch("say", 3, x)
    said = capsys.readouterr().out.splitlines()
    # A scalar is printed by every thread of the program.
    assert said == [f"pid ({i}, 0, 0) idx () x: {value}" for i, value in enumerate(x) for _ in range(32)]


@pytest.mark.parametrize("order", ["min-pc", "reverse"])
def test_scans(launch, order, rng):
    x = rng.integers(-(2**20), 2**20, (3, 1024)).astype(np.int32)
    sums, backwards = np.zeros_like(x), np.zeros_like(x)
    launch("scan_rows", 3, x, sums, backwards, order=order)
    np.testing.assert_array_equal(sums, x.cumsum(1))
    np.testing.assert_array_equal(backwards, x[:, ::-1].cumsum(1)[:, ::-1])


def test_scatter_with_atomics(launch, rng):
    x = rng.integers(-50, 50, 1000).astype(np.float32)
    ids = rng.integers(-5, 40, 1000).astype(np.int32)
    out = np.ones(40, np.float32)
    launch("scatter_add", 4, x, ids, out, np.int32(1000))
    kept = ids >= 0
    np.testing.assert_array_equal(out, 1 + np.bincount(ids[kept], x[kept], minlength=40))


def test_gather_across_a_row(launch, rng):
    x = rng.integers(0, 2**31, (4, 64)).astype(np.int32)
    order = rng.integers(0, 64, (4, 64)).astype(np.int32)
    out = np.zeros_like(x)
    launch("shuffle_columns", 1, x, order, out)
    picked = np.take_along_axis(x, order, 1).reshape(4, 32, 2)
    np.testing.assert_array_equal(out, picked[:, :, ::-1].reshape(4, 64))


def test_softmax(launch, rng):
    x = (4 * rng.standard_normal((6, 300))).astype(np.float32)
    out = np.zeros_like(x)
    launch("softmax_rows", 6, x, out, np.int32(300))
    v = x.astype(np.float64)
    e = np.exp(v - v.max(1, keepdims=True))
    # The argument of exp2 is rounded twice, at a size below 64: 2^-18 each; the rest is a dozen roundings.
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), rtol=2.0**-17)


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_sort(launch, order, rng):
    x = rng.standard_normal((8, 128)).astype(np.float32)
    up, down = np.zeros_like(x), np.zeros_like(x)
    launch("sort_rows", 2, x, up, down, order=order, seed=2)
    np.testing.assert_array_equal(up, np.sort(x, 1))
    np.testing.assert_array_equal(down, np.sort(x, 1)[:, ::-1])


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_spin_lock(launch, order, rng):
    x = rng.integers(-1000, 1000, (9, 64)).astype(np.int32)
    lock, total = np.zeros(1, np.int32), np.zeros(1, np.int32)
    launch("spin_lock", 9, lock, total, x, order=order, seed=3)
    assert (lock[0], total[0]) == (0, x.sum())


def test_top_k(launch, rng):
    x = rng.integers(-(2**31), 2**31, (4, 256)).astype(np.int32)
    out = np.zeros((4, 8), np.int32)
    launch("top_k", 4, x, out)
    np.testing.assert_array_equal(out, np.sort(x, 1)[:, ::-1][:, :8])


def test_transpose(launch, rng):
    x = rng.standard_normal((50, 70)).astype(np.float32)
    out = np.zeros((70, 50), np.float32)
    launch("transpose", (2, 3), x, out, np.int32(50), np.int32(70))
    np.testing.assert_array_equal(out, x.T)


def test_reductions_of_both_axes(launch, rng):
    x = rng.integers(-1000, 1000, (16, 64)).astype(np.float64)
    sums, least = np.zeros(16), np.zeros(64)
    launch("two_axes", 1, x, sums, least)
    np.testing.assert_array_equal(sums, x.sum(1))
    np.testing.assert_array_equal(least, x.min(0))


def test_welford(launch, rng):
    x = (rng.standard_normal((3, 500)) + 10).astype(np.float32)
    mean, variance = np.zeros((2, 3), np.float32)
    launch("welford", 3, x, mean, variance, np.int32(500))
    v = x.astype(np.float64)
    # Merging 9 levels deep, a few roundings each, of means of size 10 whose error enters the variance times the spread.
    np.testing.assert_allclose(mean, v.mean(1), rtol=50 * 2.0**-24)
    np.testing.assert_allclose(variance, v.var(1), rtol=1e-4)
