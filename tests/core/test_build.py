"""Every kernel of the launchers' tables compiles for its architectures, without spills, within its register budget."""

from pathlib import Path

import pytest

from dsv4_rt.compile import ARCHITECTURES, compile, kernels_dir
from dsv4_rt.nvrtc import build_entry
from dsv4_rt.operation import instances
from dsv4_rt.sources import read

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


ROOT = kernels_dir().parent
TENSOR_MEMORY = [i for i in instances() if '"tcgen05.cuh"' in (kernels_dir() / i.source).read_text()]
GEMM = (str(ROOT / "tests/emulator/blackwell/gemm_tcgen05.cu"), "gemm_tcgen05<128, 64, 3>")


@pytest.mark.parametrize(
    ("source", "name"), [*((i.source, i.name) for i in TENSOR_MEMORY), GEMM], ids=lambda text: text.rpartition("/")[2]
)
def test_builds_with_checks_of_tensor_memory(source, name, tmp_path):
    """For the first run on a B200: ptxas adds traps on wrong tensor memory addresses, and makes other code of it."""
    if source == GEMM[0]:  # which includes what stands in another folder
        for file in (Path(source), Path(source).with_name("blackwell.cuh"), ROOT / "tests/emulator/hopper/hopper.cuh"):
            (tmp_path / file.name).write_text(file.read_text())
        source = str(tmp_path / "gemm_tcgen05.cu")
    sources = read(source, kernels_dir())
    plain = compile(source, "sm_100a", (name,))
    entry = build_entry(sources, (*plain.options, "--ptxas-options=--g-tensor-memory-access-check"), (name,))
    assert len(entry.cubin) > len(plain.cubin)


def test_there_are_kernels_with_tensor_memory():
    assert {i.source for i in TENSOR_MEMORY} >= {"router/dense_router_decode_sm100.cu"}
    assert all("sm_90a" not in i.architectures for i in TENSOR_MEMORY)
