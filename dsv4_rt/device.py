"""Where kernels run: a CUDA device, or the emulator. One small protocol, two implementations.

    dev = dsv4_rt.device()            # CUDA if there is one, else the emulator; DSV4_RT_DEVICE overrides
    with dsv4_rt.use_device("emulator:sm_90a"): ...

A device loads artefacts, launches, allocates, copies, synchronises and knows the caller's stream. On a CUDA device
arrays are CuPy arrays and every call is asynchronous; on the emulator arrays are NumPy arrays and a launch has ended
when it returns.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsv4_rt.compile import ARCHITECTURES, Artifact, KernelInfo
from dsv4_rt.errors import DeviceError

log = logging.getLogger("dsv4_rt")


@dataclass(frozen=True)
class Geometry:
    """The shape of one launch: blocks, threads, dynamic shared memory and launch attributes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int = 0  # dynamic shared memory, bytes
    cluster: tuple[int, int, int] | None = None
    cooperative: bool = False
    pdl: bool = False  # programmatic dependent launch

    def __str__(self) -> str:
        text = f"grid {_dims(self.grid)}, block {_dims(self.block)}, shared {self.shared} B"
        if self.cluster:
            text += f", cluster {_dims(self.cluster)}"
        return text + (", cooperative" if self.cooperative else "") + (", pdl" if self.pdl else "")


def _dims(dims: tuple[int, int, int]) -> str:
    x, y, z = dims
    return str(x) if y == z == 1 else f"({x}, {y}, {z})"


@dataclass(frozen=True)
class Region:
    """Host memory behind a pointer argument, for the emulator: what the kernel may touch."""

    address: int
    nbytes: int
    label: str
    writable: bool


class Parameters:
    """The parameter buffer of a launch as the cubin lays it out, and the driver's array of pointers into it."""

    def __init__(self, info: KernelInfo) -> None:
        self.size = max((p.offset + p.size for p in info.params), default=0)
        storage = np.zeros(self.size + 1, np.uint8)
        self.buffer = storage.data
        base = storage.ctypes.data
        self._slots = np.array([base + p.offset for p in info.params] or [0], np.uint64)
        self.slots_address = int(self._slots.ctypes.data)
        self.regions: dict[int, Region] = {}  # parameter index -> memory behind it; read by the emulator only
        self.mapped: list[Region] = []  # memory behind tensor maps, likewise


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel on one device: `handle` is a CUkernel, or the emulator's module."""

    name: str
    info: KernelInfo
    handle: Any


class Device(Protocol):
    """What the rest of the package asks of a device."""

    kind: str  # "cuda" or "emulator"
    arch: str  # "sm_90a", "sm_100a", "sm_103a"
    index: int  # CUDA ordinal; 0 on the emulator

    @property
    def name(self) -> str: ...
    @property
    def max_shared(self) -> int:
        """Shared memory one block may have, static and dynamic together, bytes."""

    @property
    def sm_count(self) -> int: ...
    def load(self, artifact: Artifact, name: str) -> LoadedKernel: ...
    def bind(self, kernel: LoadedKernel, geometry: Geometry, params: Parameters) -> Callable[[int], None]:
        """A function of the stream that launches `kernel` with what `params` holds at that moment."""

    def encode_tensor_map(self, fields: dict[str, Any]) -> bytes:
        """The 128 bytes of a tensor map; `fields` as `TensorMap.fields` gives them."""

    def tensor_map_encoder(self, fields: dict[str, Any]) -> Callable[[int], bytes]:
        """The same for one address after another: all else is as in `fields`."""

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any: ...
    def array(self, host: Any) -> Any: ...
    def numpy(self, array: Any) -> np.ndarray[Any, Any]: ...
    def current_stream(self) -> int: ...
    def synchronize(self) -> None: ...


_chosen: contextvars.ContextVar[Device | None] = contextvars.ContextVar("dsv4_rt_device", default=None)


@functools.cache
def open_device(spec: str) -> Device:
    """The device a spec names: "cuda", "cuda:1", "emulator" (sm_100a), "emulator:sm_90a". One object a spec."""
    kind, _, detail = spec.partition(":")
    if kind == "cuda" and (not detail or detail.isdecimal()):
        return _cuda(int(detail or 0))
    if kind == "emulator" and (not detail or detail in ARCHITECTURES):
        return _emulated(detail or "sm_100a")
    emulated = ", ".join("emulator:" + arch for arch in ARCHITECTURES)
    raise DeviceError(f"device {spec!r} is none of cuda, cuda:N, emulator, {emulated}")


@functools.cache
def _cuda(index: int) -> Device:
    from dsv4_rt.cuda_device import CudaDevice

    return CudaDevice(index)


@functools.cache
def _emulated(arch: str) -> Device:
    from dsv4_rt.emulated_device import EmulatedDevice, checks_from_environment

    return EmulatedDevice(arch, **checks_from_environment())


@functools.cache
def _default() -> Device:
    """CUDA if there is a device that kernels exist for, else the emulator; says which, once."""
    if spec := os.environ.get("DSV4_RT_DEVICE", ""):
        chosen = open_device(spec)
    else:
        try:
            chosen = _cuda(0)
        except DeviceError as error:
            chosen = _emulated("sm_100a")
            log.warning("dsv4_rt: %s; kernels run on the emulator (sm_100a)", str(error).splitlines()[0])
            return chosen
    log.info("dsv4_rt: kernels run on %r", chosen)
    return chosen


def device() -> Device:
    """The device that calls of this context use: `use_device`, else DSV4_RT_DEVICE, else cuda:0, else the emulator.

    Raises:
        DeviceError: DSV4_RT_DEVICE names something that does not exist, or a GPU that kernels have no code for.
    """
    return _chosen.get() or _default()


def device_of(kind: str, index: int) -> Device:
    """The device that holds an array: the current one, or another GPU beside it."""
    current = device()
    if kind == current.kind == "cuda" and index != current.index:
        return _cuda(index)
    return current


def given_device(which: Device | str | None) -> Device:
    """The device of an argument: a device, a spec as `use_device` takes it, or the current device if None.

    Raises:
        DeviceError: a spec that names no device, or something that is neither a device nor a spec.
    """
    if which is None:
        return device()
    if isinstance(which, str):
        return open_device(which)
    if not hasattr(which, "arch"):
        raise DeviceError(f"device is {type(which).__name__}; give a device, or a spec like \"cuda:1\"")
    return which


@contextlib.contextmanager
def use_device(which: Device | str) -> Iterator[Device]:
    """Make a device the current one inside a with block (this thread and the tasks it starts).

    Args:
        which: a device, or a spec as DSV4_RT_DEVICE takes it: "cuda:1", "emulator", "emulator:sm_90a".
    """
    chosen = given_device(which)
    token = _chosen.set(chosen)
    try:
        yield chosen
    finally:
        _chosen.reset(token)
