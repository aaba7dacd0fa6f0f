"""Kernels of blackwell/ for pairs of CTAs, clusters and launch control, each with a run that compares it with NumPy."""

import numpy as np
from blackwell_kernels import FOLDER, HOPPER
from hopper_kernels import compare, integers, poisoned

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.launch import load as load_kernel
from dsv4_rt.tensor_map import TensorMap

HEADERS = ("blackwell.cuh", "pair.cuh", "hopper.cuh")


def emulated(completion, rng, **options):
    options = {"completion": completion, "seed": int(rng.integers(1 << 30)), "check_tensor_fences": True} | options
    return dsv4_rt.use_device(EmulatedDevice("sm_100a", **options))


def loader(folder, kernel, old="", new=""):
    """Load kernels from a copy of `kernel` and the headers in `folder`, in which `old` (once) is `new`."""
    paths = [FOLDER / kernel, *(HOPPER if name == "hopper.cuh" else FOLDER / name for name in HEADERS)]
    texts = {path.name: path.read_text() for path in paths}
    assert not old or sum(text.count(old) for text in texts.values()) == 1, old
    for name, text in texts.items():
        (folder / name).write_text(text.replace(old, new) if old else text)
    return lambda name, *options: load_kernel(str(folder / kernel), name, *options)


def maps_of(device, a, b, rows, columns):
    return [TensorMap(device.array(x), box=(box, 64), swizzle="128B") for x, box in ((a, rows), (b, columns))]


def run_gemm_pair(device, load, rng, M=200, N=100, K=200, tile=(256, 64), stages=2, ctas=2, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    rows, columns = tile
    kernel = load(f"gemm_pair<{rows}, {columns}, {stages}>")
    c = poisoned(device, M, N)
    sizes = np.int32(M), np.int32(N), np.int32(K)
    shared = stages * (rows + columns) * 64 + 1024
    kernel.launch(ctas, 192, *maps_of(device, a, b, rows // 2, columns // 2), c, *sizes, shared=shared)
    compare(device.numpy(c), a, b)


def run_split_k_tcgen05(device, load, rng, M=100, N=30, K=456, split=4, columns=32, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    kernel = load(f"split_k_tcgen05<{columns}, {split}, 2>")
    c = poisoned(device, M, N)
    sizes = np.int32(M), np.int32(N), np.int32(K)
    grid, shared = (split, -(-M // 128) * -(-N // columns)), 2 * (128 + columns) * 128 + 1024
    kernel.launch(grid, 192, *maps_of(device, a, b, 128, columns), c, *sizes, shared=shared)
    compare(device.numpy(c), a, b)


def run_gemm_launch_control(device, load, rng, M=300, N=90, K=200, columns=32, draw=integers):
    """Every tile is computed once, whoever does it; returns the launch's report."""
    a, b = draw(rng, M, K), draw(rng, N, K)
    kernel = load(f"gemm_launch_control<{columns}, 2>")
    tiles = -(-M // 128) * -(-N // columns)
    c, count = poisoned(device, M, N), device.array(np.zeros(tiles, np.uint32))
    sizes = np.int32(M), np.int32(N), np.int32(K)
    shared = 2 * (128 + columns) * 128 + 1024
    kernel.launch(tiles, 224, *maps_of(device, a, b, 128, columns), c, count, *sizes, shared=shared)
    compare(device.numpy(c), a, b)
    np.testing.assert_array_equal(device.numpy(count), 1)
