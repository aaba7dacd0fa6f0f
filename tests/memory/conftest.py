"""What the tests of the pool share: a pool with a probe, the bench scripts as modules."""

import sys
from pathlib import Path

import pytest
from probe import Probe
from small import small_pool

import dsv4_rt

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))


@pytest.fixture
def probed(device):
    """probed(**sizes) -> (pool, probe): a small pool on the test's device, and the stand-in kernels of its model."""

    def make(**options):
        pool = small_pool(**options)
        return pool, Probe(pool, dsv4_rt.device())

    return make
