"""NVRTC through cuda.bindings: one compilation, and its messages in the words of our files and lines."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from dsv4_rt.cache import Entry
from dsv4_rt.errors import CompileError
from dsv4_rt.sources import ROOT, Declaration, Sources

_PTXAS_ERROR = re.compile(r"ptxas [^\n]*?, line (\d+); (?:error|fatal)\s*: ([^\n]*)")
_NAME_ERROR = re.compile(r"__nv_name_map\(\d+\): error: ([^\n]*)\n\s*#pragma nv_mangled_name ([^\n]*)\n[^\n]*\n?")
_LOC = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)(?:\s+\d+)?(?:,[^\n]*?inlined_at\s+(\d+)\s+(\d+))?")
_FILE = re.compile(r'^(\s*\.file\s+(\d+)\s+")([^"]*)(")', re.MULTILINE)


def message(names: Sequence[str], arch: str, text: str, options: Sequence[str]) -> str:
    """The text of a CompileError: what was asked for, what is wrong where, how it was compiled."""
    return f"{', '.join(names)} for {arch}\n{text.strip()}\n  options: {' '.join(options)}"


@functools.cache
def build() -> str:
    """Version and build of NVRTC, as it writes them into the PTX of an empty program (milliseconds, once a process).

    The version need not name one build, the change list does; a hash of the library would read 140 MB.
    """
    with _Program("", "build.cu", {}) as program:
        program.compile(["--gpu-architecture=compute_90a"])
        head = program.get("PTX").decode(errors="replace").split(".version")[0]
    major, minor = _call("nvrtcVersion")
    version = re.search(r"\bV(\d[\d.]*)", head)
    number = re.search(r"\bCL-\w+", head)
    if version and number:
        return f"NVRTC {version[1]} ({number[0]})"
    return f"NVRTC {major}.{minor} ({' '.join(head.replace('//', ' ').split())})"


def build_entry(sources: Sources, options: Sequence[str], names: Sequence[str]) -> Entry:
    """Compile; what comes back can be kept in the disk cache.

    Raises:
        CompileError: with the log, pointing at files and lines as the reader knows them.
    """
    arch = options[0].partition("=")[2]

    def failure(text: str) -> CompileError:
        if not sources.name.startswith("kernels/"):
            text = f"{text.rstrip()}\n  source: {sources.path}"
        return CompileError(message(names, arch, text, options))

    with _Program(sources.programs[sources.name], sources.name, sources.programs) as program:
        for name in names:
            program.add_name(name)
        compiled = program.compile(options)
        log = program.get("ProgramLog").decode(errors="replace").replace(ROOT, "")
        if not compiled:
            raise failure(_explain(log, sources, options, names))
        # setmaxnreg silently does nothing unless the kernel fixes its block size: a performance bug that nobody sees.
        ignored = [line for line in log.splitlines() if "C7508" in line]
        if ignored:
            text = "\n".join(line.partition(":")[2].strip() for line in ignored)
            raise failure(f"{sources.name}: error: {text}\n  give the kernel __launch_bounds__ of its block size")
        return Entry(
            compiler=build(),
            lowered={name: program.lowered(name) for name in names},
            ptx=_FILE.sub(_shown, program.get("PTX").decode()).encode(),
            cubin=program.get("CUBIN"),
            log=log.encode(),
        )


def _shown(match: re.Match[str]) -> str:
    return match[1] + match[3].removeprefix(ROOT) + match[4]


def _explain(log: str, sources: Sources, options: Sequence[str], names: Sequence[str]) -> str:
    """A log of errors, with those that name no line of ours rewritten to do so."""
    kernels = sources.declarations()
    misnamed = _NAME_ERROR.search(log)
    text = _NAME_ERROR.sub(lambda match: _name_error(match, kernels, sources), log)
    if _PTXAS_ERROR.search(text):
        ptx = _ptx(sources, options, names)
        text = _PTXAS_ERROR.sub(lambda match: _ptxas_error(int(match[1]), match[2], ptx, sources), text)
    noise = r"ptxas (info|\s*\.|fatal\s*: Ptx assembly aborted).*|.*errors? detected in the compilation of .*\s*"
    lines = [line.rstrip() for line in text.splitlines() if line.strip() and not re.fullmatch(noise, line)]
    if misnamed:
        lines += [f"  kernels in {sources.name}:" if kernels else f"  {sources.name} declares no kernel"]
        lines += [f"    {kernel}" for kernel in kernels]
    return "\n".join(lines)


def _name_error(match: re.Match[str], kernels: Sequence[Declaration], sources: Sources) -> str:
    """An error in a name expression: NVRTC reports it at a line of a file of its own."""
    problem, expression = match[1], match[2].strip()
    if problem.startswith(("Error in parsing name expression", "expected an expression")):
        return ""  # these follow the error that says why
    base = expression.partition("<")[0].rpartition("::")[2].strip()
    kernel = next((kernel for kernel in kernels if kernel.name == base), None)
    if kernel is None:
        return f"{sources.name}: error: there is no kernel {expression}: {problem}\n"
    return f"{kernel.file}({kernel.line}): error: {expression}: {problem}\n"


def _ptx(sources: Sources, options: Sequence[str], names: Sequence[str]) -> str:
    """The PTX that ptxas refused: the same program, compiled no further. Empty if that fails too."""
    virtual = [option.replace("=sm_", "=compute_") for option in options if not option.startswith("--ptxas-options")]
    with _Program(sources.programs[sources.name], sources.name, sources.programs) as program:
        for name in names:
            program.add_name(name)
        return program.get("PTX").decode() if program.compile(virtual) else ""


def _ptxas_error(number: int, problem: str, ptx: str, sources: Sources) -> str:
    """An error of ptxas, which names only a line of PTX, at the CUDA line that this PTX came from."""
    lines = ptx.splitlines()
    if not 0 < number <= len(lines):
        return f"{sources.name}: error: PTX line {number}: {problem}"
    shown = f"  PTX line {number}: {lines[number - 1].strip()}"
    paths = {int(match[2]): match[3].removeprefix(ROOT) for match in _FILE.finditer(ptx)}
    for line in reversed(lines[:number]):
        if match := _LOC.match(line):
            file, row = paths.get(int(match[1]), "?"), int(match[2])
            text = f"{file}({row}): error: {problem}\n    {sources.line(file, row).strip()}\n{shown}"
            if match[3]:
                text += f"\n  inlined at {paths.get(int(match[3]), '?')}({match[4]})"
            return text
        if re.match(r"\s*(\.visible |\.weak |\.extern )*\.(entry|func)\b", line):
            break
    return f"{sources.name}: error: {problem}\n{shown}"


class _Program:
    """An nvrtcProgram that is destroyed at the end of its block."""

    def __init__(self, text: str, name: str, headers: dict[str, str]) -> None:
        included = {ROOT + other: body for other, body in headers.items() if other != name}
        bodies = [body.encode() for body in included.values()]
        paths = [path.encode() for path in included]
        (self._handle,) = _call("nvrtcCreateProgram", text.encode(), (ROOT + name).encode(), len(paths), bodies, paths)

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        _call("nvrtcDestroyProgram", self._handle)

    def add_name(self, name: str) -> None:
        _call("nvrtcAddNameExpression", self._handle, name.encode())

    def compile(self, options: Sequence[str]) -> bool:
        """False if the source has errors: the log says which."""
        nvrtc = _nvrtc()
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(self._handle, len(encoded), encoded)
        return bool(status == nvrtc.nvrtcResult.NVRTC_SUCCESS)

    def get(self, what: str) -> bytes:
        """ "PTX", "CUBIN" or "ProgramLog". Text comes with a terminating zero, which is dropped."""
        (size,) = _call(f"nvrtcGet{what}Size", self._handle)
        buffer = bytearray(size)  # not bytes: the binding writes into it
        _call(f"nvrtcGet{what}", self._handle, buffer)
        return bytes(buffer) if what == "CUBIN" else bytes(buffer).rstrip(b"\0")

    def lowered(self, name: str) -> str:
        (lowered,) = _call("nvrtcGetLoweredName", self._handle, name.encode())
        return str(lowered.decode())


@functools.cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc  # imported late: 80 ms, and doctor must be able to say that it is missing

        status, *_ = nvrtc.nvrtcVersion()  # loads the library
    except Exception as error:
        remedy = "pip install cuda-bindings nvidia-cuda-nvrtc"
        raise CompileError(f"NVRTC cannot be loaded: {error}\n  remedy: {remedy}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC cannot be used: nvrtcVersion returned {status.name}")
    return nvrtc


def _call(function: str, *arguments: object) -> tuple[Any, ...]:
    """Call NVRTC; the results without the status."""
    nvrtc = _nvrtc()
    call: Callable[..., tuple[Any, ...]] = getattr(nvrtc, function)
    status, *results = call(*arguments)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{function} returned {status.name} ({int(status)})")
    return tuple(results)
