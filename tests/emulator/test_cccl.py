"""CUB's block and warp primitives, cooperative groups and cuda::atomic_ref, run on the emulator and equal to NumPy."""

import numpy as np
import pytest
from foreign import compile_cccl
from programs import ARCHITECTURES, run_ptx

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture(scope="module")
def launch(kept_ptx):
    """launch(file, entry, grid, block, *args, arch=...): each file is compiled once an architecture."""
    folder = kept_ptx("cccl")

    def run(name, entry, grid, block, *args, arch, **options):
        return run_ptx(compile_cccl(name, arch, folder), entry, grid, block, *args, arch=arch, **options)

    return run


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_block_radix_sort_pairs(launch, arch, order, rng):
    keys = rng.standard_normal((3, 1152)).astype(np.float32)
    keys[0] = rng.integers(-5, 5, 1152)  # equal keys: the sort is stable
    values = rng.permutation(keys.size).astype(np.int32).reshape(keys.shape)
    out, ids = np.zeros_like(keys), np.zeros_like(values)
    launch("cub_blocks", "sort_pairs", 3, 128, keys, values, out, ids, arch=arch, order=order, seed=5)
    by = np.argsort(-keys, axis=1, kind="stable")
    np.testing.assert_array_equal(out, np.take_along_axis(keys, by, 1))
    np.testing.assert_array_equal(ids, np.take_along_axis(values, by, 1))


def test_block_radix_sort_of_some_bits(launch, arch, rng):
    keys = rng.integers(0, 2**32, (2, 384), dtype=np.uint32)
    out = np.zeros_like(keys)
    launch("cub_blocks", "sort_bits", 2, 96, keys, out, arch=arch)
    by = np.argsort(keys >> 4 & 0xFFFF, axis=1, kind="stable")
    np.testing.assert_array_equal(out, np.take_along_axis(keys, by, 1))


@pytest.mark.parametrize("n", [160, 97, 1])
def test_block_reduce(launch, arch, rng, n):
    x = rng.integers(-(2**20), 2**20, (4, 160)).astype(np.int32)
    out = np.zeros((3, 4, 2), np.int32)
    launch("cub_blocks", "reduce_int", 4, 160, x, np.int32(n), out, arch=arch)
    for algorithm in out:
        np.testing.assert_array_equal(algorithm, np.stack([x.sum(1), x[:, :n].max(1)], 1))


def test_block_reduce_of_doubles_in_three_dimensions(launch, arch, rng):
    x = rng.integers(-1000, 1000, (5, 128)) / 8.0
    out = np.zeros(5)
    launch("cub_blocks", "reduce_double", 5, (8, 8, 2), x, out, arch=arch)
    np.testing.assert_array_equal(out, x.sum(1))


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_block_scan(launch, arch, order, rng):
    x = rng.integers(-1000, 1000, (3, 384)).astype(np.int32)
    inclusive, exclusive = np.zeros((2, *x.shape), np.int32), np.zeros((2, *x.shape), np.int32)
    total = np.zeros((2, 3), np.int32)
    args = (x, np.int32(x.size), inclusive, exclusive, total)
    launch("cub_blocks", "scan_int", 3, 128, *args, arch=arch, order=order, seed=6)
    for i in (0, 1):
        np.testing.assert_array_equal(inclusive[i], np.maximum.accumulate(x, axis=1))
        np.testing.assert_array_equal(exclusive[i], np.cumsum(x, axis=1) - x)
        np.testing.assert_array_equal(total[i], x.sum(1))


@pytest.mark.parametrize("width", [32, 16, 5])
def test_warp_reduce_and_scan(launch, arch, width, rng):
    x = rng.integers(-500, 500, 128).astype(np.float32)
    span = 16 if width == 16 else 32
    sums, scans = np.zeros(128 // span, np.float32), np.zeros_like(x)
    launch("cub_blocks", f"warp_{width}", 2, 64, x, sums, scans, arch=arch)
    rows = x.reshape(-1, span)[:, :width]
    np.testing.assert_array_equal(sums, rows.sum(1))
    np.testing.assert_array_equal(scans.reshape(-1, span)[:, :width], np.maximum.accumulate(rows, axis=1))


def test_block_histogram(launch, arch, rng):
    x = rng.integers(0, 64, (2, 512)).astype(np.uint8)
    bins = np.zeros((2, 2, 64), np.uint32)
    launch("cub_blocks", "histogram", 2, 128, x, bins, arch=arch)
    want = np.stack([np.bincount(row, minlength=64) for row in x])
    np.testing.assert_array_equal(bins, np.stack([want, want], 1))


@pytest.mark.parametrize("width", [32, 8])
def test_tiled_partition(launch, arch, width, rng):
    n, block = 192, 96
    x = rng.integers(0, 100, n).astype(np.int32)
    out = np.zeros((10, n), np.int32)
    launch("groups_atomics", f"tile_{width}", n // block, block, x, out, np.int32(n), arch=arch)
    rows, t = x.reshape(-1, width), np.arange(n) % block
    rank = np.arange(width)

    def spread(one):
        return np.repeat(one, width)

    np.testing.assert_array_equal(out[0], spread(rows.sum(1)))
    np.testing.assert_array_equal(out[1], spread(rows.max(1)))
    np.testing.assert_array_equal(out[2], rows.cumsum(1).ravel())
    np.testing.assert_array_equal(out[3], (rows.cumsum(1) - rows).ravel())
    np.testing.assert_array_equal(out[4], rows[:, (rank + 3) % width].ravel())
    np.testing.assert_array_equal(out[5], rows[:, rank ^ 1].ravel())
    np.testing.assert_array_equal(out[6], spread((rows > 90).any(1) + 2 * (rows > 10).all(1)))
    bits = ((rows & 1).astype(np.uint64) << rank.astype(np.uint64)).sum(1)
    np.testing.assert_array_equal(out[7].view(np.uint32), spread(bits))
    same = (rows[:, :, None] & 3) == (rows[:, None, :] & 3)
    np.testing.assert_array_equal(out[8].view(np.uint32), (same << rank.astype(np.uint64)).sum(2).ravel())
    np.testing.assert_array_equal(out[9], t // width * 1000 + block // width * 10 + t % width)


@pytest.mark.parametrize("order", ["min-pc", "reverse"])
def test_coalesced_threads(launch, arch, order, rng):
    n = 128
    x = rng.integers(0, 100, n).astype(np.int32)
    x[64:96] = 2  # a warp without a member
    x[96:] |= 1  # and one in which all are
    out = np.zeros((3, n), np.int32)
    launch("groups_atomics", "coalesced", 1, n, x, out, np.int32(n), arch=arch, order=order)
    want = np.full((3, n), -1)
    for warp in range(0, n, 32):
        odd = warp + np.nonzero(x[warp : warp + 32] & 1)[0]
        if len(odd):
            want[:, odd] = np.arange(len(odd)), np.full(len(odd), x[odd].sum()), np.full(len(odd), x[odd[0]])
    np.testing.assert_array_equal(out, want)


def test_labelled_partition(launch, arch, rng):
    n = 96
    x = rng.integers(0, 100, n).astype(np.int32)
    out = np.zeros((2, n), np.int32)
    launch("groups_atomics", "labelled", 1, n, x, out, np.int32(n), arch=arch)
    rows = x.reshape(-1, 32)
    same = rows[:, :, None] % 3 == rows[:, None, :] % 3
    np.testing.assert_array_equal(out[0], (same * rows[:, None, :]).sum(2).ravel())
    np.testing.assert_array_equal(out[1], same.sum(2).ravel())


def test_acquire_and_release_along_a_chain(launch, arch):
    flags, order = np.zeros(65, np.int32), np.zeros(64, np.int32)
    flags[0] = 1
    launch("groups_atomics", "baton", 1, 64, flags, order, arch=arch)
    np.testing.assert_array_equal(order, 1 + 3 * np.arange(64))
    assert flags.all()


def test_atomic_refs(launch, arch, rng):
    x = rng.integers(-1000, 1000, 256).astype(np.int32)
    i32 = np.array([5, 5, -1, 0, 9, -(2**31), 2**31 - 1, 0, 0], np.int32)
    u64, f32, f64 = np.array([7, 0, 1], np.uint64), np.array([0.5], np.float32), np.array([0.25])
    launch("groups_atomics", "atomic_refs", 2, 128, x, i32, u64, f32, f64, arch=arch)
    bits = np.bitwise_or.reduce(1 << (x.astype(np.int64) & 31))
    want = [5 + x.sum(), 5 - x.sum(), ~bits, bits, np.bitwise_xor.reduce(x) ^ 9, x.max(), x.min()]
    np.testing.assert_array_equal(i32[:7], np.array(want).astype(np.int32))
    np.testing.assert_array_equal(i32[7:], x.reshape(2, 128).sum(1).astype(np.int16))
    wide = x.astype(np.uint64)
    third = 1
    for _ in x:
        third = (third * 3 + 1) % 2**64
    total, most = (wide << np.uint64(33)).sum() + np.uint64(7), (wide << np.uint64(40)).max()
    assert u64.tolist() == [int(total), int(most), third]
    assert (f32[0], f64[0]) == (0.5 + x.sum(), 0.25 + x.sum() / 2)  # exact: every partial sum fits


@pytest.mark.parametrize("order", ["min-pc", "random"])
def test_ctas_that_wait_for_each_other(launch, arch, order):
    grid, block = 6, 64
    n = grid * block
    counter, before, after = np.zeros(1, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32)
    launch("groups_atomics", "grid_meeting", grid, block, counter, before, after, arch=arch, order=order, seed=9)
    np.testing.assert_array_equal(after, np.arange(n)[::-1] * 7)


@pytest.mark.parametrize("order", ["min-pc", "random"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_cluster_histogram(launch, arch, order, size, rng):
    x, bins = rng.integers(0, 256, 3000).astype(np.int32), np.zeros(256, np.uint32)
    each = 256 // size
    options = {"arch": arch, "order": order, "seed": 3, "shared": 4 * each, "cluster": size}
    launch("cluster_groups", "histogram", 16, 64, x, np.int32(x.size), bins, np.int32(each), **options)
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=256))


def test_cluster_group(launch, arch):
    out = np.zeros((8, 32, 8), np.int32)
    launch("cluster_groups", "facts", 8, 32, out, arch=arch, cluster=4)
    rank, thread = np.arange(8) % 4, np.arange(32)
    np.testing.assert_array_equal(out[:, 0, 0], rank)
    np.testing.assert_array_equal(out[..., 2], rank[:, None] * 32 + thread)
    expected = np.stack([np.full(8, 4), np.full(8, 128), rank, rank, 100 + (rank + 1) % 4, (rank + 1) % 4], 1)
    np.testing.assert_array_equal(out[:, 5][:, [1, 3, 4, 5, 6, 7]], expected)
