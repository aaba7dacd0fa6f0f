"""Write the PTX that the tests of other people's code run, into tests/emulator/kept/.

    python tests/emulator/keep.py triton     # needs Triton, in the version named in pyproject.toml
    python tests/emulator/keep.py cccl       # needs nvidia-cuda-cccl, nvidia-cuda-runtime and NVRTC 13.0

The kernels are those of triton_programs.py and cccl/*.cu. What compilers make of them is kept, so that the tests need
neither, and so that a GPU can run the same PTX: its version is 9.0, which a driver of CUDA 13.0 loads. A file's first
line says what made it and from which source; a test compares that with the source. Paths and DWARF are left out.
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
CCCL = ("cub_blocks", "groups_atomics")
TRITON = "3.9.0"  # as pyproject.toml names it: another version compiles to other programs
PTX_VERSION = 90


def digest(source: Path) -> str:
    """What a kept file's first line says of its source."""
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def without_paths(ptx: str) -> str:
    """Triton's PTX without the folder it was compiled in, and without DWARF, which holds it too."""
    source = "triton_programs.py"

    def strings(match: re.Match[str]) -> str:
        data = bytes(int(each) for each in match[3].split(","))
        if source.encode() not in data:
            return match[0]
        short = data[data.index(source.encode()) :]
        return f"{match[1]}[{len(short) + 1}] = {{{', '.join(map(str, short))}}};"

    ptx = re.sub(r"(\.b8 \w+)\[(\d+)\] = \{([\d, ]+)\};", strings, ptx)
    ptx = re.sub(rf'(\.file\s+\d+ ")[^"]*/(triton/[^"]*"|{source}")', r"\1\2", ptx)
    ptx = re.sub(r"\t\.section\t\.debug_(?:abbrev|info|macinfo|loc)\s*\{[^}]*\}\n", "", ptx)
    return re.sub(r"[ \t]+//[^\n]*(?=\n)", "", ptx)


def triton_ptx(name: str, arch: str) -> str:
    """A kernel of triton_programs.py compiled, without a GPU, with the first line of its kept file."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton_programs import PROGRAMS

    function, types, constants, warps = PROGRAMS[name]
    names = [each for each in function.arg_names if each not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    target = GPUTarget("cuda", int(arch.strip("sm_a")), 32)
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "debug": name == "positive"}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        made = triton.compile(source, target=target, options=options | {"ptx_version": PTX_VERSION})
    assert made.metadata.global_scratch_size == made.metadata.profile_scratch_size == 0
    made_from = digest(HERE / "triton_programs.py")
    first = f"// Triton {triton.__version__}, source {made_from}, shared {made.metadata.shared}"
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


def main() -> int:
    """The command line."""
    from foreign import cuda_include, installed_triton

    KEPT.mkdir(exist_ok=True)
    made: dict[str, str] = {}
    if sys.argv[1:] == ["triton"]:
        if installed_triton() != TRITON:
            raise SystemExit(f"keep.py: Triton {TRITON} is wanted, not {installed_triton() or 'none'}")
        from triton_programs import PROGRAMS

        made = {f"{name}.{arch}": triton_ptx(name, arch) for name in PROGRAMS for arch in ARCHITECTURES}
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
