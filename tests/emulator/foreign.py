"""Other people's code as PTX, kept on disk between runs: CUDA headers from PyPI by NVRTC, kernels by Triton.

`dsv4_rt.compile` is not used: it is hermetic on purpose and gives NVRTC no header directory.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest
from cuda.bindings import nvrtc
from programs import nvrtc_ptx

HERE = Path(__file__).parent

TRITON = "3.9.0"  # as pyproject.toml names it: another version compiles to other programs


def cuda_include() -> Path:
    """The include folder of nvidia-cuda-runtime and nvidia-cuda-cccl, which share it."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / "cu13" / "include"
        if (folder / "cccl" / "cub").is_dir() and (folder / "cooperative_groups.h").is_file():
            return folder
    pytest.skip("nvidia-cuda-cccl and nvidia-cuda-runtime are not installed")


def kept(folder: Path, key: bytes, make) -> str:
    """The text make() returns, from a file named after the key if there is one; files appear whole."""
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.ptx"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(make())
        draft.replace(path)
    return path.read_text()


def compile_cccl(name: str, arch: str, folder: Path) -> str:
    """tests/emulator/cccl/NAME.cu as PTX for compute_NNa.

    Without line information, which is most of the text and of the time to read it: add -lineinfo to look for a fault.
    """
    include = cuda_include()
    source = (HERE / "cccl" / f"{name}.cu").read_text()
    version = (include / "cccl" / "cuda" / "std" / "__cccl" / "version.h").read_bytes()
    target = arch.replace("sm_", "compute_")
    options = [f"--gpu-architecture={target}", "--std=c++17", f"-I{include}", f"-I{include}/cccl"]
    build = f"{nvrtc.nvrtcVersion()} {options}".encode()

    def make() -> str:
        return nvrtc_ptx(source, f"{name}.cu", options)

    return kept(folder, b"\0".join((source.encode(), version, build)), make)


def compile_triton(name: str, arch: str, folder: Path) -> tuple[str, int]:
    """A kernel of triton_programs.py as (PTX, bytes of dynamic shared memory), compiled without a GPU."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.__version__ != TRITON:
        pytest.skip(f"triton {TRITON} is what these programs are written for, not {triton.__version__}")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton_programs import PROGRAMS

    def make() -> str:
        function, types, constants, warps = PROGRAMS[name]
        names = [each for each in function.arg_names if each not in constants]
        signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", int(arch.strip("sm_a")), 32)
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "debug": name == "positive"}
        with triton.knobs.cache.scope():
            triton.knobs.cache.dir = str(folder / "triton")
            made = triton.compile(source, target=target, options=options)
        assert made.metadata.global_scratch_size == made.metadata.profile_scratch_size == 0
        return f"// shared {made.metadata.shared}\n{made.asm['ptx']}"

    key = "\0".join((name, arch, triton.__version__, (HERE / "triton_programs.py").read_text()))
    ptx = kept(folder, key.encode(), make)
    return ptx, int(ptx.split(maxsplit=3)[2])
