"""Write the PTX that the tests of other people's code run, into tests/emulator/kept/.

    python tests/emulator/keep.py triton     # needs Triton, in the version named in pyproject.toml
    python tests/emulator/keep.py cccl       # needs nvidia-cuda-cccl, nvidia-cuda-runtime and NVRTC 13.0

The kernels are those of triton_programs.py, triton_dots.py, triton_scaled.py and cccl/*.cu. What compilers make of them
is kept, so that the tests need neither, and so that a GPU can run the same PTX: its version is 9.0, which a driver of
CUDA 13.0 loads.
A file's first line says what made it and from which source; a test compares that with the source. Paths and DWARF are
left out.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "kept"
ARCHITECTURES = ("sm_90a", "sm_100a")
CCCL = ("cub_blocks", "groups_atomics", "async_copies", "cluster_groups")
TRITON_SOURCES = {"triton_programs": ARCHITECTURES, "triton_dots": ARCHITECTURES, "triton_scaled": ("sm_100a",)}
TRITON = "3.9.0"  # as pyproject.toml names it: another version compiles to other programs
PTX_VERSION = 90


def digest(source: Path) -> str:
    """What a kept file's first line says of its source."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def without_paths(ptx: str) -> str:
    """Triton's PTX without the folder it was compiled in, and without DWARF, which holds it too."""

    def strings(match: re.Match[str]) -> str:
        data = bytes(int(each) for each in match[3].split(","))
        at = re.search(rb"triton_(programs|dots|scaled)\.py", data)
        if at is None:
            return match[0]
        short = data[at.start() :]
        return f"{match[1]}[{len(short) + 1}] = {{{', '.join(map(str, short))}}};"

    ptx = re.sub(r"(\.b8 \w+)\[(\d+)\] = \{([\d, ]+)\};", strings, ptx)
    ptx = re.sub(r'(\.file\s+\d+ ")[^"]*/(triton/[^"]*"|triton_\w+\.py")', r"\1\2", ptx)
    ptx = re.sub(r"\t\.section\t\.debug_(?:abbrev|info|macinfo|loc)\s*\{[^}]*\}\n", "", ptx)
    return re.sub(r"[ \t]+//[^\n]*(?=\n)", "", ptx)


def triton_source(name: str) -> Path:
    """The file of a Triton program."""
    at = f'    "{name}": ('
    return next(path for each in TRITON_SOURCES if at in (path := HERE / f"{each}.py").read_text())


def triton_ptx(name: str, arch: str) -> str:
    """A Triton kernel compiled, without a GPU, with the first line of its kept file."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    path = triton_source(name)
    function, types, constants, warps, *stages = importlib.import_module(path.stem).PROGRAMS[name]
    names = [each for each in function.arg_names if each not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    kinds = [signature[each] for each in function.arg_names]
    aligned = [at for at, each in enumerate(kinds) if each[0] == "*" or each == "i32"]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned if stages}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(arch.strip("sm_a")), 32)
    options = {"num_warps": warps, "num_stages": (stages or [1])[0], "enable_fp_fusion": True}
    options["debug"] = name == "positive"
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        made = triton.compile(source, target=target, options=options | {"ptx_version": PTX_VERSION})
    assert made.metadata.profile_scratch_size == 0
    scratch = f", scratch {made.metadata.global_scratch_size}" if made.metadata.global_scratch_size else ""
    first = f"// Triton {triton.__version__}, source {digest(path)}{scratch}, shared {made.metadata.shared}"
    return f"{first}\n{without_paths(made.asm['ptx'])}"


def cccl_ptx(name: str, arch: str, include: Path) -> str:
    """tests/emulator/cccl/NAME.cu compiled by the NVRTC that is installed, with the first line of its kept file.

    Without line information, which is most of the text and of the time to read it: add -lineinfo to look for a fault.
    """
    from cuda.bindings import nvrtc
    from programs import nvrtc_ptx

    source = HERE / "cccl" / f"{name}.cu"
    target = arch.replace("sm_", "compute_")
    options = [f"--gpu-architecture={target}", "--std=c++17", f"-I{include}", f"-I{include}/cccl"]
    version = (include / "cccl" / "cuda" / "std" / "__cccl" / "version.h").read_text()
    number = int(re.findall(r"#define CCCL_VERSION (\d+)", version)[0])
    cccl = f"{number // 1000000}.{number // 1000 % 1000}.{number % 1000}"
    _, major, minor = nvrtc.nvrtcVersion()
    first = f"// CCCL {cccl}, NVRTC {major}.{minor}, source {digest(source)}, shared 0"
    return f"{first}\n{nvrtc_ptx(source.read_text(), source.name, options)}"


def triton_programs() -> list[tuple[str, str]]:
    """(name, architecture) of every Triton program that is kept."""
    found = []
    for each, architectures in TRITON_SOURCES.items():
        names = re.findall(r'^    "(\w+)": \(', (HERE / f"{each}.py").read_text(), re.MULTILINE)
        found += [(name, arch) for name in names for arch in architectures]
    return found


def main() -> int:
    """The command line."""
    from foreign import cuda_include, installed_triton

    KEPT.mkdir(exist_ok=True)
    made: dict[str, str] = {}
    if sys.argv[1:] == ["triton"]:
        if installed_triton() != TRITON:
            raise SystemExit(f"keep.py: Triton {TRITON} is wanted, not {installed_triton() or 'none'}")
        made = {f"{name}.{arch}": triton_ptx(name, arch) for name, arch in triton_programs()}
    elif sys.argv[1:] == ["cccl"]:
        include = cuda_include()
        if include is None:
            raise SystemExit("keep.py: nvidia-cuda-cccl and nvidia-cuda-runtime are not installed")
        made = {f"{name}.{arch}": cccl_ptx(name, arch, include) for name in CCCL for arch in ARCHITECTURES}
        if any(".version 9.0" not in text[:1000] for text in made.values()):
            raise SystemExit("keep.py: NVRTC 13.0 is wanted, which writes PTX of version 9.0")
    else:
        raise SystemExit(__doc__)
    for name, text in made.items():
        (KEPT / f"{name}.ptx").write_text(text)
    print(f"{len(made)} files, {sum(map(len, made.values())):,} bytes in {KEPT.name}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
