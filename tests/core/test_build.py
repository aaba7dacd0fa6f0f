"""Every kernel of the launchers' tables compiles for its architectures, without spills, within its register budget."""

import pytest

from dsv4_rt.compile import ARCHITECTURES, compile
from dsv4_rt.operation import instances

EVERY = [
    pytest.param(instance, arch, id=f"{instance.name}-{arch}")
    for arch in ARCHITECTURES
    for instance in instances()
    if arch in instance.architectures
]


@pytest.mark.parametrize(("instance", "arch"), EVERY)
def test_within_budget(instance, arch):
    kernel = compile(instance.source, arch, (instance.name,)).kernels[instance.name]
    assert (kernel.spill_store_bytes, kernel.spill_load_bytes, kernel.stack_bytes) == (0, 0, 0)
    assert kernel.registers <= instance.registers
    assert kernel.waits_for_dependency
