"""What tests of asynchronous operations share: PTX wrappers in CUDA C++, and a decorator for the three schedules."""

from pathlib import Path

import pytest
from programs import PRELUDE, compile_ptx, run_ptx

from dsv4_rt.emulator import Machine

COMPLETIONS = ("early", "late", "random")
all_schedules = pytest.mark.parametrize("completion", COMPLETIONS)
WRAPPERS = (Path(__file__).parent / "asynchronous.cuh").read_text()


def launch(source, entry, grid, block, *args, arch="sm_90a", completion="early", order="min-pc", seed=0, shared=0,
           roots=(), cluster=None, **options):  # fmt: skip
    """Compile WRAPPERS and a source, and launch an extern "C" kernel under a completion schedule."""
    machine = Machine(arch, order=order, seed=seed, completion=completion, source_roots=roots, **options)
    ptx = compile_ptx(PRELUDE + WRAPPERS + source, arch)
    return run_ptx(ptx, entry, grid, block, *args, machine=machine, shared=shared, cluster=cluster)
