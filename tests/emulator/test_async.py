"""Asynchronous copies and mbarriers: the patterns real kernels use, under every completion schedule."""

import numpy as np
import pytest
from asynchronous import all_schedules, launch
from programs import ARCHITECTURES

from dsv4_rt.emulated_device import EmulatedDevice, checks_from_environment
from dsv4_rt.emulator import Machine
from dsv4_rt.errors import Deadlock, DeviceError, EmulatorError, KernelFault

WAITS = {
    "every thread waits": "bar_wait(&bar, 0);",
    "one thread waits": "if (threadIdx.x == 0) bar_wait(&bar, 0); __syncthreads();",
    "one lane of each warp waits": "if (threadIdx.x % 32 == 0) bar_wait(&bar, 0); __syncwarp();",
}
LOAD = """
extern "C" __global__ void load(const u32* x, u32* y) {
    __shared__ alignas(16) u32 tile[256];
    __shared__ u64 bar;
    if (threadIdx.x == 0) { bar_init(&bar, 1); fence_init(); }
    __syncthreads();
    if (threadIdx.x == 0) {
        bar_expect(&bar, sizeof(tile));
        bulk_load(tile, x + blockIdx.x * 256, sizeof(tile), &bar);
    }
    WAIT
    for (int i = threadIdx.x; i < 256; i += blockDim.x) y[blockIdx.x * 256 + i] = tile[i] + 1;
}
"""


@all_schedules
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("wait", WAITS)
def test_bulk_load(rng, arch, completion, wait):
    x = rng.integers(0, 1 << 31, 3 * 256, np.uint32)
    y = np.full_like(x, 0xA5)
    launch(LOAD.replace("WAIT", WAITS[wait]), "load", 3, 128, x, y, arch=arch, completion=completion)
    assert np.array_equal(y, x + 1)


@all_schedules
def test_a_missing_wait_is_reported(rng, completion):
    x = rng.integers(0, 1 << 31, 256, np.uint32)
    with pytest.raises(KernelFault, match=r"reads the destination of an asynchronous cp.async.bulk(.|\n)*program.cu"):
        launch(LOAD.replace("WAIT", ""), "load", 1, 128, x, x.copy(), completion=completion)


@all_schedules
def test_a_wrong_parity_is_a_deadlock(rng, completion):
    x = rng.integers(0, 1 << 31, 256, np.uint32)
    wait = "bar_wait(&bar, 0); bar_wait(&bar, 1);"
    with pytest.raises(Deadlock, match=r"parity 1 of the mbarrier(.|\n)*phase 1, 1 of 1 arrivals pending"):
        launch(LOAD.replace("WAIT", wait), "load", 1, 128, x, x.copy(), completion=completion)


def test_a_device_takes_the_schedule(monkeypatch):
    assert EmulatedDevice("sm_90a", completion="late").machine.completion == "late"
    monkeypatch.setenv("DSV4_RT_EMULATOR_COMPLETION", "random")
    assert checks_from_environment() == {"completion": "random"}
    monkeypatch.setenv("DSV4_RT_EMULATOR_COMPLETION", "sometimes")
    with pytest.raises(DeviceError, match="DSV4_RT_EMULATOR_COMPLETION: 'sometimes' is none of early, late, random"):
        checks_from_environment()
    with pytest.raises(EmulatorError, match="completion 'sometimes' is none of early, late, random"):
        Machine(completion="sometimes")


def test_the_random_schedule_repeats_with_its_seed(rng):
    x = rng.integers(0, 1 << 31, 3 * 256, np.uint32)

    def steps(seed):
        source = LOAD.replace("WAIT", "bar_wait(&bar, 0);")
        return launch(source, "load", 3, 128, x, x.copy(), completion="random", seed=seed).instructions

    assert steps(5) == steps(5)
    assert len({steps(seed) for seed in range(20)}) > 1  # waits return false at different times


LATE = """
extern "C" __global__ void late(u32* x, u32* y) {
    __shared__ alignas(16) u32 tile[4];
    copy<16>(tile, x);
    copy_commit();
    __threadfence();
    x[0] = 2;                    // nobody may rely on what the copy takes
    copy_wait<0>();
    y[0] = tile[0];
}
"""


def test_when_operations_run():
    def got(completion):
        y = np.zeros(1, np.uint32)
        launch(LATE, "late", 1, 1, np.ones(4, np.uint32), y, completion=completion)
        return int(y[0])

    assert got("early") == 1
    assert got("late") == 2
