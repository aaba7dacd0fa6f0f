"""Kernel source -> cubin and PTX, by NVRTC, in memory, with a disk cache. Knows no device and needs no driver.

One compilation gives both: the cubin for a GPU and the PTX it was assembled from for the emulator, with a record of
every kernel (registers, spills, shared memory, parameters) taken from the compiler's log and from the cubin.

An artefact is a function of what was read: the source, everything it includes, the options, the names asked for and the
build of the compiler. Its `key` is the hash of these, and the same on every machine; so are its bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv4_rt import cache as disk
from dsv4_rt import nvrtc
from dsv4_rt.cache import CacheInfo, cache_info
from dsv4_rt.cubin import Param, read_kernels
from dsv4_rt.errors import ArgumentError, CompileError
from dsv4_rt.sources import Sources, Stamp, read, unchanged

__all__ = [
    "ARCHITECTURES",
    "Artifact",
    "CacheInfo",
    "KernelInfo",
    "Param",
    "cache_clear",
    "cache_info",
    "compile",
    "compiler_build",
    "kernels_dir",
]

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_103a")

Defines = Mapping[str, str | int | None]


@dataclass(frozen=True)
class KernelInfo:
    """One compiled kernel, for one architecture; sizes in bytes.

    name, lowered: the name expression asked for, and the mangled name in the cubin and the PTX.
    registers: of one thread. stack_bytes, spill_store_bytes, spill_load_bytes: of the kernel's own frame.
    shared_bytes: static shared memory; dynamic comes on top at the launch.
    max_threads: the largest block that `__launch_bounds__` allows, 1024 where there is none.
    cluster: `__cluster_dims__`, None where there is none.
    params: every parameter's place in the parameter buffer.
    waits_for_dependency: the kernel itself executes `griddepcontrol.wait`, so a programmatic dependent launch is sound.
    """

    name: str
    lowered: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int
    max_threads: int
    cluster: tuple[int, int, int] | None
    params: tuple[Param, ...]
    waits_for_dependency: bool


@dataclass(frozen=True)
class Artifact:
    """What one compilation made. Two artefacts are equal if their keys are.

    source: the kernel file as messages name it, "kernels/router/x.cu"; one outside the tree has its file name only.
    options, compiler: what it was made with.
    ptx: the PTX that the cubin was assembled from, `.file` entries shown under the names that `source` uses.
    log: what the compiler said, warnings and resource use.
    kernels: name expression -> its record.
    key: the content address, hexadecimal.
    cached: it was read from the disk cache and not compiled by this process.
    """

    source: str = field(compare=False)
    arch: str = field(compare=False)
    options: tuple[str, ...] = field(compare=False)
    compiler: str = field(compare=False)
    cubin: bytes = field(compare=False, repr=False)
    ptx: str = field(compare=False, repr=False)
    log: str = field(compare=False, repr=False)
    kernels: Mapping[str, KernelInfo] = field(compare=False)
    key: str
    cached: bool = field(compare=False)


_Request = tuple[str, str, str, tuple[str, ...], tuple[tuple[str, str | int | None], ...]]

# What this process has: a request that was answered, with the stamps of the files it depends on; and artefacts by key.
# The lock of a key is held while it is compiled, so that threads that want the same kernel compile it once.
_answered: dict[_Request, tuple[Mapping[str, Stamp], Artifact]] = {}
_artifacts: dict[str, Artifact] = {}
_locks: dict[str, threading.Lock] = {}


@functools.cache
def kernels_dir() -> Path:
    """The kernel sources: `dsv4_rt/_kernels` of an installed package, `kernels` beside the package in a checkout.

    Raises:
        CompileError: there is neither.
    """
    package = Path(__file__).absolute().parent
    for place in (package / "_kernels", package.parent / "kernels"):
        if (place / "include").is_dir():
            return place
    raise CompileError(f"the kernel sources are missing: no {package}/_kernels, no {package.parent}/kernels")


def compiler_build() -> str:
    """The build of NVRTC that this process compiles with: "NVRTC 13.0.88 (CL-36424714)".

    Raises:
        CompileError: NVRTC is not installed or cannot be loaded.
    """
    return nvrtc.build()


def compile(
    source: str | os.PathLike[str],
    arch: str,
    names: Sequence[str],
    defines: Defines | None = None,
    *,
    cache: bool | None = None,
) -> Artifact:
    """Compile kernels of one source for one architecture.

    Args:
        source: the kernel file: a path relative to `kernels_dir()`, "router/activation_topk.cu", or an absolute path.
        arch: one of ARCHITECTURES.
        names: the kernels wanted, as name expressions: "activation_topk<6, 384>"; `extern "C"` kernels by their name.
        defines: preprocessor macros, name -> value; None defines a name without a value (as 1).
        cache: False compiles anew and neither reads nor writes what this process or the disk holds; True uses both;
            None does as True unless DSV4_RT_CACHE=0 turns the disk off.

    Returns:
        The artefact. Asking again in one process returns the same object after a look at the time stamp and size of
        every file it was made from (microseconds), so an edit of any of them is noticed. Files that were edited within
        the last two seconds are read again instead, since their time stamps cannot yet be trusted.

    Raises:
        ArgumentError: an unknown architecture, no names, or a define that is none.
        CompileError: the source does not compile or has no such kernel; the message points into our file and line.

    Thread-safe; different kernels compile in parallel, the same kernel is compiled once. A file in the kernels tree may
    include files of `kernels/include`; a source elsewhere those of its own directory too.
    """
    if arch not in ARCHITECTURES:
        raise ArgumentError(f"compile: no kernel is written for {arch!r}; architectures: {', '.join(ARCHITECTURES)}")
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ArgumentError(f"compile: names must be a non-empty sequence of kernel names, got {names!r}")
    tree = kernels_dir()
    _check_defines(defines or {})
    macros = tuple(sorted(defines.items())) if defines else ()
    request = (str(tree), os.fspath(source), arch, tuple(names), macros)
    if cache is not False and (answer := _answered.get(request)) is not None and unchanged(answer[0]):
        return answer[1]

    options = _options(arch, macros)
    wanted = tuple(sorted(set(names)))
    try:
        sources = read(source, tree)
    except CompileError as error:
        raise CompileError(nvrtc.message(wanted, arch, str(error), options)) from None
    key = _key(sources, options, wanted)
    if cache is False:
        disk.count_uncached()
        return _artifact(key, sources, arch, options, wanted, nvrtc.build_entry(sources, options, wanted), cached=False)

    with _locks.setdefault(key, threading.Lock()):
        artifact = _artifacts.get(key)
        if artifact is None:
            on_disk = cache or disk.enabled()
            artifact = _load_or_build(key, sources, arch, options, wanted, on_disk=on_disk)
            _artifacts[key] = artifact
    if sources.settled:
        _answered[request] = (sources.stamps, artifact)
    return artifact


def cache_clear() -> int:
    """Forget what this process compiled and remove all entries of the disk cache; return how many were removed."""
    _answered.clear()
    _artifacts.clear()
    return disk.cache_clear()


def _load_or_build(
    key: str, sources: Sources, arch: str, options: tuple[str, ...], names: tuple[str, ...], *, on_disk: bool
) -> Artifact:
    entry = disk.load(key) if on_disk else None
    if entry is not None:
        return _artifact(key, sources, arch, options, names, entry, cached=True)
    entry = nvrtc.build_entry(sources, options, names)
    if on_disk:
        disk.store(key, entry)
    else:
        disk.count_uncached()
    return _artifact(key, sources, arch, options, names, entry, cached=False)


def _check_defines(defines: Mapping[Any, Any]) -> None:
    for name, value in defines.items():
        named = isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name)
        if not named or not isinstance(value, (str, int, type(None))):
            raise ArgumentError(f"compile: defines are names with a string, a number or None, got {name!r}: {value!r}")


def _options(arch: str, macros: tuple[tuple[str, str | int | None], ...]) -> tuple[str, ...]:
    values = {name: int(value) if isinstance(value, bool) else value for name, value in macros}
    return (
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "-default-device",  # a constexpr function needs no __device__
        "-lineinfo",
        "--ptxas-options=-v",
        "--no-cache",  # the driver's own cache hands out a cubin without the log that says what it uses
        *(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in values.items()),
    )


def _key(sources: Sources, options: tuple[str, ...], names: tuple[str, ...]) -> str:
    """The content address: all that the result depends on, and the format in which it is kept."""
    content = [disk.FORMAT, nvrtc.build(), options, names, sources.name, list(sources.digests().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# What ptxas -v says of a function, over two lines: "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" and
# "Used 12 registers, used 1 barriers, 128 bytes smem", the last part only where there is static shared memory.
_USAGE = re.compile(
    r"Function properties for (\S+)\s*\n"
    r"[^\n]*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads[ \t]*\n"
    r"[^\n]*?Used \d+ registers(?:[^\n]*?\b(\d+) bytes smem)?"
)


def _artifact(
    key: str,
    sources: Sources,
    arch: str,
    options: tuple[str, ...],
    names: tuple[str, ...],
    entry: disk.Entry,
    *,
    cached: bool,
) -> Artifact:
    """An artefact from what was built or loaded: the records are read again from log, cubin and PTX."""
    log, ptx = entry.log.decode(errors="replace"), entry.ptx.decode()
    usage = {match[1]: tuple(int(number or 0) for number in match.groups()[1:]) for match in _USAGE.finditer(log)}
    records = read_kernels(entry.cubin)
    waiting = _waiting(ptx)
    kernels: dict[str, KernelInfo] = {}
    for name in names:
        lowered = entry.lowered[name]
        if lowered not in records or lowered not in usage:
            problem = f"{entry.compiler} reports no resources of {lowered}"
            raise CompileError(nvrtc.message(names, arch, problem, options))
        record = records[lowered]
        stack, stores, loads, shared = usage[lowered]
        kernels[name] = KernelInfo(
            name=name,
            lowered=lowered,
            registers=record.registers,
            stack_bytes=stack,
            spill_store_bytes=stores,
            spill_load_bytes=loads,
            shared_bytes=shared,
            max_threads=record.max_threads,
            cluster=record.cluster,
            params=record.params,
            waits_for_dependency=lowered in waiting,
        )
    return Artifact(
        source=sources.name,
        arch=arch,
        options=options,
        compiler=entry.compiler,
        cubin=entry.cubin,
        ptx=ptx,
        log=log,
        kernels=MappingProxyType(kernels),
        key=key,
        cached=cached,
    )


def _waiting(ptx: str) -> set[str]:
    """The entries whose own body waits for the grid before. A wait in a function that is called does not count."""
    found = set()
    for part in re.split(r"(?m)^[^\n/]*(?=\.entry\s|\.func\b)", re.sub(r"//[^\n]*", "", ptx)):
        entry = re.match(r"\.entry\s+([\w$]+)", part)
        if entry and re.search(r"\bgriddepcontrol\.wait\b", part):
            found.add(entry[1])
    return found
