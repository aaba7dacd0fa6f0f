"""Other people's code as PTX: what is kept in kept/ (see keep.py), and CUDA headers from PyPI compiled by NVRTC.

`dsv4_rt.compile` is not used: it is hermetic on purpose and gives NVRTC no header directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from functools import cache
from pathlib import Path

from cuda.bindings import nvrtc
from keep import CCCL, HERE, KEPT, cccl_ptx


def cuda_include() -> Path | None:
    """The include folder of nvidia-cuda-runtime and nvidia-cuda-cccl, which share it, where they are installed."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(root) / "cu13" / "include"
        if (folder / "cccl" / "cub").is_dir() and (folder / "cooperative_groups.h").is_file():
            return folder
    return None


def installed_triton() -> str:
    """The version of Triton that is installed; empty where none is."""
    try:
        return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


@cache
def kept(name: str, arch: str) -> tuple[str, int]:
    """A kept program as (PTX, bytes of dynamic shared memory)."""
    text = (KEPT / f"{name}.{arch}.ptx").read_text()
    first = text.split("\n", 1)[0]
    return text, int(first.rsplit("shared ", 1)[1])


def compiled(name: str, arch: str, folder: Path) -> str:
    """A program of CCCL compiled by the NVRTC that is installed; from a file of `folder` if it has been before."""
    assert name in CCCL
    include = cuda_include()
    assert include is not None
    version = (include / "cccl" / "cuda" / "std" / "__cccl" / "version.h").read_bytes()
    source = (HERE / "cccl" / f"{name}.cu").read_bytes()
    key = b"\0".join((source, version, f"{nvrtc.nvrtcVersion()} {arch}".encode()))
    path = folder / f"{hashlib.sha256(key).hexdigest()[:24]}.ptx"
    if not path.exists():
        draft = path.with_suffix(f".{os.getpid()}")  # files appear whole
        draft.write_text(cccl_ptx(name, arch, include))
        draft.replace(path)
    return path.read_text()
