"""cuda::barrier, cuda::pipeline, cuda::memcpy_async and cuda::ptx on the emulator, under every completion schedule."""

import numpy as np
import pytest
from asynchronous import all_schedules
from foreign import compile_cccl
from programs import ARCHITECTURES, run_ptx

from dsv4_rt.emulator import Machine

WANT = {
    "add_one": (4, 128, 0, lambda x: x + 1),
    "reverse": (4, 128, 0, lambda x: x.reshape(4, 256)[:, ::-1]),
    "pipeline": (1, 128, 8, lambda x: x.reshape(8, 128)[:, ::-1]),
    "group_copy": (1, 128, 8, lambda x: x.reshape(8, 128)[:, ::-1]),
    "phases": (1, 64, 16, lambda x: np.repeat(np.arange(16), 64) + x[0]),
}


@all_schedules
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", WANT)
def test_equals_numpy(rng, kept_ptx, name, arch, completion):
    grid, block, n, want = WANT[name]
    x = rng.integers(0, 1 << 20, 1024).astype(np.int32)
    y = np.full_like(x, -1)
    machine = Machine(arch, completion=completion, seed=int(rng.integers(1000)))
    run_ptx(compile_cccl("asynchronous", arch, kept_ptx("cccl")), name, grid, block, x, y, np.int32(n), machine=machine)
    assert np.array_equal(y, want(x).reshape(-1))
