"""The kernels of hopper/ against NumPy: emulated under every completion schedule and thread order, and on a GPU."""

import time

import numpy as np
import pytest
from asynchronous import COMPLETIONS
from hopper_kernels import EVIDENCE, FOLDER, compare, normal, run_cp_async_ring, run_gemm_multicast, run_gemm_ring
from programs import ARCHITECTURES, ORDERS

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.launch import load as load_kernel
from dsv4_rt.tensor_map import TensorMap

EMULATED = [
    (name, arch)
    for name, evidence in EVIDENCE.items()
    for arch in ARCHITECTURES
    if arch == "sm_90a" or not evidence.hopper_only
]


def load(file, name):
    return load_kernel(str(FOLDER / file), name)


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize(("name", "arch"), EMULATED)
def test_on_the_emulator(name, arch, completion, rng):
    with dsv4_rt.use_device(EmulatedDevice(arch, completion=completion, seed=int(rng.integers(1 << 30)))) as device:
        EVIDENCE[name].run(device, load, rng)


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("name", EVIDENCE)
def test_in_other_thread_orders(name, order, rng):
    options = {"order": order, "completion": "random", "seed": int(rng.integers(1 << 30))}
    with dsv4_rt.use_device(EmulatedDevice("sm_90a", **options)) as device:
        EVIDENCE[name].run(device, load, rng)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVIDENCE)
def test_on_a_gpu(name, gpu, rng):
    if EVIDENCE[name].hopper_only and gpu.arch != "sm_90a":
        pytest.skip("wgmma is Hopper's: no such hardware here")
    for _ in range(20):
        EVIDENCE[name].run(gpu, load, rng)


SHAPES = [(1, 1, 8), (128, 128, 64), (129, 127, 72), (64, 300, 1024)]


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("run", [run_gemm_ring, run_gemm_multicast, run_cp_async_ring])
def test_shapes(run, M, N, K, rng):
    """One row and column; whole tiles; tails on each side; a ring that wraps often. Normal numbers."""
    with dsv4_rt.use_device(EmulatedDevice("sm_90a", completion="late")) as device:
        run(device, load, rng, M=M, N=N, K=K, draw=normal)


@pytest.mark.parametrize("ctas", [1, 2, 34, 35])
def test_stream_k_with_any_share(ctas, rng):
    with dsv4_rt.use_device(EmulatedDevice("sm_90a")) as device:
        EVIDENCE["stream_k"].run(device, load, rng, ctas=ctas)


def test_the_kernels_are_told_apart_by_their_results(rng):
    """The comparison itself can fail: one wrong element is seen."""
    from hopper_kernels import compare, integers, product

    a, b = integers(rng, 4, 8), integers(rng, 5, 8)
    got = product(a, b)[0]
    got[3, 4] += 1
    with pytest.raises(AssertionError):
        compare(got, a, b)
    compare(got - np.pad([[1.0]], ((3, 0), (4, 0))), a, b)


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_deep_tile_is_fast(completion, rng):
    """128 x 128 x 4096 in bf16 by TMA, a ring of four stages and wgmma, every check on: under half a second."""
    M, N, K = 128, 128, 4096
    with dsv4_rt.use_device(EmulatedDevice("sm_90a", completion=completion)) as device:
        a, b = normal(rng, M, K), normal(rng, N, K)
        maps = [TensorMap(device.array(x), box=(128, 64), swizzle="128B") for x in (a, b)]
        kernel, c = load("gemm_ring.cu", "gemm_ring<4>"), device.array(np.full((M, N), np.nan, np.float32))
        seconds = []  # of the processor, so that what else the machine does counts little
        for _ in range(4):
            start = time.process_time()
            kernel.launch((1, 1), 384, *maps, c, np.int32(M), np.int32(N), np.int32(K), shared=4 * 32768 + 1024)
            seconds.append(time.process_time() - start)
        print(f"{completion}: cold {seconds[0]:.3f} s, warm {min(seconds[1:]):.3f} s")
        compare(device.numpy(c), a, b)
    assert min(seconds[1:]) < 0.5
