"""Fixtures every test shares: the devices a kernel must run on, fresh random numbers, guarded and poisoned arrays."""

import os
import secrets

import numpy as np
import pytest

import dsv4_rt
from dsv4_rt.cuda_device import cuda_device_count

DEVICES = [
    pytest.param("emulator:sm_90a", id="emulated-sm_90a"),
    pytest.param("emulator:sm_100a", id="emulated-sm_100a"),
    pytest.param("cuda:0", id="cuda", marks=pytest.mark.gpu),
]
GUARD = 0xA5


@pytest.fixture(params=DEVICES)
def device(request):
    """The current device of the test: emulated sm_90a, emulated sm_100a, and a GPU if there is one."""
    if request.param.startswith("cuda") and not cuda_device_count():
        pytest.skip("no CUDA device")
    with dsv4_rt.use_device(request.param) as chosen:
        yield chosen
        chosen.synchronize()


@pytest.fixture
def emulator():
    """The emulated sm_100a as the current device, for what depends on no architecture."""
    with dsv4_rt.use_device("emulator:sm_100a") as chosen:
        yield chosen


@pytest.fixture
def rng():
    """Fresh random numbers; the seed is printed, DSV4_RT_TEST_SEED repeats a failure."""
    seed = int(os.environ.get("DSV4_RT_TEST_SEED") or secrets.randbits(32))
    print(f"DSV4_RT_TEST_SEED={seed}")
    return np.random.default_rng(seed)


class Guarded:
    """A device array inside a larger buffer of 0xA5 bytes; `intact` tells whether anything around it was written."""

    def __init__(self, device, shape, dtype, row_gap=0, before=64, after=64, fill=GUARD):
        self._device = device
        dtype = np.dtype(dtype)
        n, width = shape
        pitch = (width + row_gap) * dtype.itemsize
        self._host = np.full(before + n * pitch + after, GUARD, np.uint8)
        inside = np.zeros(self._host.shape, bool)
        for row in range(n):
            start = before + row * pitch
            inside[start : start + width * dtype.itemsize] = True
        self._host[inside] = fill
        self._inside = inside
        self._buffer = device.array(self._host)
        body = self._buffer[before : before + n * pitch].view(dtype).reshape(n, width + row_gap)
        self.array = body[:, :width]

    def intact(self):
        now = self._device.numpy(self._buffer)
        return bool((now[~self._inside] == self._host[~self._inside]).all())


@pytest.fixture
def guarded(device):
    """guarded(shape, dtype, row_gap=...) -> an output between guard bytes, poisoned."""

    def make(shape, dtype, **options):
        return Guarded(device, shape, dtype, **options)

    return make


@pytest.fixture
def gpu():
    """cuda:0 as the current device; the test is skipped where there is none."""
    if not cuda_device_count():
        pytest.skip("no CUDA device")
    with dsv4_rt.use_device("cuda:0") as chosen:
        yield chosen


@pytest.fixture
def torch():
    """The torch module; its tests are skipped where it is not installed."""
    return pytest.importorskip("torch", reason="torch is not installed")
