"""Compile small CUDA programs with NVRTC and run them on the emulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from cuda.bindings import nvrtc

from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.tensormap import encode
from dsv4_rt.tensor_map import TensorMap

ARCHITECTURES = ("sm_90a", "sm_100a")
ORDERS = ("min-pc", "random", "reverse")
PRELUDE = """
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long;
using i64 = long long;
"""


@cache
def compile_ptx(source: str, arch: str, names: tuple[str, ...] = (), name: str = "program.cu") -> str:
    """CUDA source to PTX, with line information. The compiler's log is the message of the AssertionError on failure."""
    return nvrtc_ptx(source, name, [f"--gpu-architecture={arch}", "-lineinfo", "--std=c++17"], names)


def nvrtc_ptx(source: str, name: str, options: list[str], names: tuple[str, ...] = ()) -> str:
    """CUDA source to PTX by NVRTC, without this package's own compiler."""
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    for each in names:
        nvrtc.nvrtcAddNameExpression(program, each.encode())
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)  # filled in place: an immutable b" " would be the interpreter's own
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    _, size = nvrtc.nvrtcGetPTXSize(program)
    text = bytearray(size)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(program)
    return text.decode().rstrip("\0")


class Scratch(np.ndarray):
    """An array that a program needs only on its way, for notes in a machine's own format: nobody compares it."""


def aligned(array: np.ndarray, align: int = 128) -> np.ndarray:
    """A copy that begins at a multiple of `align` bytes, as every allocation on a GPU does."""
    room = np.zeros(array.nbytes + align, np.uint8)
    first = -room.ctypes.data % align
    out = room[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def pack(params: tuple[tuple[int, int], ...], args: tuple[object, ...]) -> bytes:
    """The parameter buffer: arrays by address, maps, NumPy scalars and bytes by value, at the entry's offsets."""
    buffer = bytearray(max((offset + size for offset, size in params), default=0))
    assert len(params) == len(args), f"{len(args)} arguments for {len(params)} parameters"
    for (offset, size), arg in zip(params, args, strict=True):
        if isinstance(arg, np.ndarray):
            data = arg.ctypes.data.to_bytes(8, "little")
        elif isinstance(arg, TensorMap):
            data = encode(arg.fields())
        else:
            data = bytes(arg) if isinstance(arg, bytes) else np.asarray(arg).tobytes()
        assert len(data) == size, f"an argument of {len(data)} bytes for a parameter of {size}"
        buffer[offset : offset + size] = data
    return bytes(buffer)


# Called after each launch that ends well, by tests/conformance/launches.py: (module's PTX, entry, grid, block, shared
# bytes, cooperative or not, cluster or None, arguments, what arrays held before: its own and those of its maps).
LISTENERS: list[Callable[..., None]] = []
CHECKS: dict[str, bool] = {}  # arguments of the Machine that run_ptx makes, for fixtures that turn checks on


def run_ptx(ptx, entry, grid, block, *args, order="min-pc", seed=0, shared=0, arch="sm_100a", machine=None, roots=(),
            cooperative=False, cluster=None):  # fmt: skip
    """Launch an entry (found by part of its name) with arrays registered in place; returns the report."""
    machine = machine or Machine(arch, order=order, seed=seed, source_roots=roots, **CHECKS)
    module = machine.load(ptx, "test")
    name = next(each for each in module.entries if entry in each)
    held = [a.array if isinstance(a, TensorMap) else a for a in args]
    tokens = [
        machine.memory.register(a.ctypes.data, a.nbytes, label=f"argument {i}", writable=a.flags.writeable, keep=a)
        for i, a in enumerate(held)
        if isinstance(a, np.ndarray)
    ]
    before = [a.copy() if LISTENERS and isinstance(a, np.ndarray) else a for a in held]
    try:
        params = pack(module.entries[name].params, args)
        report = machine.launch(
            module, name, grid, block, params, dynamic_shared=shared, cooperative=cooperative, cluster=cluster
        )
        for listener in LISTENERS:
            listener(ptx, name, grid, block, shared, cooperative, cluster, args, before)
        return report
    finally:
        for token in tokens:
            machine.memory.unregister(token)


def run(source, entry, grid, block, *args, arch="sm_90a", name="program.cu", **options):
    """Compile and launch an extern "C" kernel."""
    return run_ptx(compile_ptx(PRELUDE + source, arch, (), name), entry, grid, block, *args, arch=arch, **options)


def line_of(source: str, mark: str) -> int:
    """The line number, in the compiled text, of the first line that holds `mark`."""
    lines = (PRELUDE + source).split("\n")
    return next(i for i, line in enumerate(lines, 1) if mark in line)


def write_source(folder: Path, source: str, name: str = "program.cu") -> Path:
    """Put the compiled text where a Machine with source_roots=(folder,) finds it."""
    path = folder / name
    path.write_text(PRELUDE + source)
    return path
