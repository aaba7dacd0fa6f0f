"""cuda::barrier, cuda::pipeline, cuda::memcpy_async, cuda::ptx and cluster groups, under every completion schedule."""

import numpy as np
import pytest
from asynchronous import all_schedules
from foreign import kept
from programs import ARCHITECTURES, run_ptx

from dsv4_rt.emulator import Machine

pytestmark = [pytest.mark.parametrize("arch", ARCHITECTURES), all_schedules]


@pytest.fixture
def launch(arch, completion, rng):
    """launch(entry, grid, block, *args): a kernel of async_copies.cu, or of another file, under this schedule."""

    def run(entry, grid, block, *args, file="async_copies", **options):
        machine = Machine(arch, completion=completion, seed=int(rng.integers(1 << 30)))
        return run_ptx(kept(file, arch)[0], entry, grid, block, *args, machine=machine, **options)

    return run


@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_producer_and_consumer(launch, rng, rounds):
    x = rng.integers(-1000, 1000, (rounds, 32)).astype(np.int32)
    total = np.zeros(32, np.int32)
    launch("producer_consumer", 1, 64, x, total, np.int32(rounds))
    np.testing.assert_array_equal(total, 2 * x[:, ::-1].sum(0))


def test_threads_drop_out_of_a_barrier(launch):
    count = np.zeros(64, np.int32)
    launch("drop_out", 1, 64, count)
    np.testing.assert_array_equal(count, 16 * (0 + 1 + 2 + 3))


@pytest.mark.parametrize("n", [4, 128, 252])
def test_memcpy_async_to_a_barrier(launch, rng, n):
    x = rng.integers(0, 2**31, (3, n)).astype(np.int32)
    y = np.zeros_like(x)
    launch("copy_by_barrier", 3, 96, x, y, np.int32(n), shared=4 * n)
    np.testing.assert_array_equal(y, x[:, ::-1])


@pytest.mark.parametrize("n", [1, 77, 512])
def test_memcpy_async_without_alignment(launch, rng, n):
    x = rng.integers(-128, 128, n + 1).astype(np.int8)[1:]
    y = np.zeros(n, np.int8)
    launch("copy_unaligned", 1, 64, x, y, np.int32(n))
    np.testing.assert_array_equal(y, x[::-1])


def test_memcpy_async_that_counts_bytes(launch, rng):
    x = rng.integers(0, 2**30, (2, 200)).astype(np.int32)
    y = np.zeros_like(x)
    launch("copy_by_bytes", 2, 64, x, y, np.int32(200), shared=800)
    np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_pipeline_of_a_thread(launch, rng, rounds):
    x = rng.integers(-1000, 1000, (rounds, 128)).astype(np.int32)
    y = np.zeros(128, np.int32)
    launch("thread_pipeline", 1, 128, x, y, np.int32(rounds))
    np.testing.assert_array_equal(y, (x * np.arange(1, rounds + 1)[:, None]).sum(0))


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_pipeline_of_a_block(launch, rng, rounds):
    x = rng.integers(-100, 100, (rounds, 64)).astype(np.int32)
    y = np.zeros(64, np.int32)
    launch("block_pipeline", 1, 128, x, y, np.int32(rounds))
    powers = 3 ** np.arange(rounds - 1, -1, -1)
    np.testing.assert_array_equal(y, (x[:, ::-1] * powers[:, None]).sum(0))


def test_copy_of_a_group(launch, rng):
    x = rng.integers(0, 2**31, (2, 144)).astype(np.int32)
    y = np.zeros_like(x)
    launch("group_copy", 2, 64, x, y, np.int32(144))
    np.testing.assert_array_equal(y, np.roll(x, -5, axis=1))


def test_bulk_copies_and_a_bulk_reduction(launch, rng):
    x = rng.integers(-1000, 1000, (5, 128)).astype(np.int32)
    y, total = np.zeros_like(x), np.zeros(128, np.int32)
    for array in (x, y, total):
        assert array.ctypes.data % 16 == 0
    launch("bulk_round_trip", 5, 64, x, y, total, np.int32(128), shared=512)
    np.testing.assert_array_equal(y, 3 * x - 1)
    np.testing.assert_array_equal(total, (3 * x - 1).sum(0))


def test_blocks_of_a_cluster_pass_numbers_on(launch, rng):
    x = rng.integers(0, 2**31, (8, 32)).astype(np.int32)
    y = np.zeros_like(x)
    launch("ring_of_blocks", 8, 32, x, y)
    np.testing.assert_array_equal(y, np.roll(x.reshape(2, 4, 32), 1, axis=1).reshape(8, 32)[:, ::-1])


def test_a_histogram_in_distributed_shared_memory(launch, rng):
    x = rng.integers(0, 64, 500).astype(np.int32)
    bins = np.zeros(64, np.int32)
    launch("cluster_histogram", 2, 96, x, bins, np.int32(500))
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=64))


@pytest.mark.parametrize("size", [1, 2, 8])
def test_histograms_of_several_clusters(launch, size, rng):
    x, bins = rng.integers(0, 256, 3000).astype(np.int32), np.zeros(256, np.uint32)
    each = 256 // size
    options = {"file": "cluster_groups", "shared": 4 * each, "cluster": size}
    launch("histogram", 16, 64, x, np.int32(x.size), bins, np.int32(each), **options)
    np.testing.assert_array_equal(bins, np.bincount(x, minlength=256))


def test_facts_of_a_cluster_group(launch):
    out = np.zeros((8, 32, 8), np.int32)
    launch("facts", 8, 32, out, file="cluster_groups", cluster=4)
    rank, thread = np.arange(8) % 4, np.arange(32)
    np.testing.assert_array_equal(out[:, 0, 0], rank)
    np.testing.assert_array_equal(out[..., 2], rank[:, None] * 32 + thread)
    expected = np.stack([np.full(8, 4), np.full(8, 128), rank, rank, 100 + (rank + 1) % 4, (rank + 1) % 4], 1)
    np.testing.assert_array_equal(out[:, 5][:, [1, 3, 4, 5, 6, 7]], expected)
