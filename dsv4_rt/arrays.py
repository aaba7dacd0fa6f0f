"""Any framework's array -> pointer, shape, strides, dtype, stream; and back. Never a copy.

CuPy, PyTorch (CPU and CUDA) and NumPy are read directly; anything else through `__cuda_array_interface__` (Numba, ...)
or DLPack (JAX, ...), asking the producer for no synchronisation: work already queued on the stream of the launch is
ordered before the kernel, work on other streams is the caller's to order.

Results come back in the caller's kind: CuPy, torch or NumPy; for another framework through its own zero-copy import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsv4_rt import dlpack
from dsv4_rt.device import Device, device_of
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16

I32 = np.dtype(np.int32)
I64 = np.dtype(np.int64)
U8 = np.dtype(np.uint8)

# One-byte float formats that arrive as a framework's own type: the kernels see bytes.
_AS_BYTES = frozenset({"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "float4_e2m1fn"})


@dataclass(frozen=True, slots=True)
class View:
    """One array argument, without its framework."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    dtype: np.dtype[Any]
    device: str  # "cuda" or "host"
    index: int  # CUDA ordinal, 0 for the host
    writable: bool

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last; 0 if empty."""
        if 0 in self.shape:
            return 0
        return (1 + sum((n - 1) * abs(s) for n, s in zip(self.shape, self.strides, strict=True))) * self.dtype.itemsize

    @property
    def first_byte(self) -> int:
        """The lowest address the array occupies: below `ptr` where a stride is negative."""
        below = sum((n - 1) * min(s, 0) for n, s in zip(self.shape, self.strides, strict=True))
        return self.ptr + below * self.dtype.itemsize

    @property
    def on(self) -> str:
        return f"cuda:{self.index}" if self.device == "cuda" else "host memory"


class Framework(Protocol):
    """How one array library is read and written."""

    def facts(self, x: Any) -> tuple[int, Hashable]:
        """(pointer, everything a launch depends on beside it, this library included). On every call's path: cheap."""

    def view(self, x: Any) -> View: ...
    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any: ...
    def wrap(self, result: Any) -> Any:
        """A result of `empty` as the caller's kind of array."""

    def adopt(self, owned: Any) -> Any:
        """An array of a device's own kind (CuPy, NumPy) as the caller's kind, the same memory."""

    def stream(self, index: int) -> int:
        """The library's current stream on a device."""


def _element_strides(
    strides: tuple[int, ...] | None, shape: tuple[int, ...], itemsize: int, what: str
) -> tuple[int, ...]:
    if strides is None:
        out, step = [], 1
        for n in reversed(shape):
            out.append(step)
            step *= n
        return tuple(reversed(out))
    if any(s % itemsize for s in strides):
        raise ArgumentError(f"{what} strides {strides} B are not multiples of its {itemsize} B elements")
    return tuple(s // itemsize for s in strides)


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return U8 if dtype.name in _AS_BYTES else dtype


class _Own:
    """Libraries whose arrays `empty` makes directly."""

    def wrap(self, result: Any) -> Any:
        return result

    def adopt(self, owned: Any) -> Any:
        return owned


class _NumPy(_Own):
    def facts(self, x: Any) -> tuple[int, Hashable]:
        ptr = x.__array_interface__["data"][0]
        return ptr, (x.shape, x.strides, x.dtype, ptr & 15, "rw" if x.flags.writeable else "r")

    def view(self, x: Any) -> View:
        strides = _element_strides(x.strides, x.shape, x.itemsize, "NumPy array:")
        return View(x.ctypes.data, x.shape, strides, _plain(x.dtype), "host", 0, bool(x.flags.writeable))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any:
        return device.empty(shape, dtype)

    def stream(self, index: int) -> int:
        return 0


class _CuPy(_Own):
    def __init__(self) -> None:
        import cupy

        self._empty = cupy.empty
        self._device = cupy.cuda.Device
        self._current = cupy.cuda.get_current_stream
        self._several = cupy.cuda.is_available() and cupy.cuda.runtime.getDeviceCount() > 1

    def facts(self, x: Any) -> tuple[int, Hashable]:
        data = x.data
        ptr = data.ptr
        return ptr, (x.shape, x.strides, x.dtype, ptr & 15, data.device_id)

    def view(self, x: Any) -> View:
        strides = _element_strides(x.strides, x.shape, x.itemsize, "CuPy array:")
        return View(x.data.ptr, x.shape, strides, _plain(x.dtype), "cuda", x.data.device_id, True)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any:
        if not self._several:
            return self._empty(shape, dtype)
        with self._device(device.index):
            return self._empty(shape, dtype)

    def stream(self, index: int) -> int:
        return self._current(index).ptr  # type: ignore[no-any-return]


class _Torch(_Own):
    def __init__(self) -> None:
        import torch

        self._torch = torch
        names = ("float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
        self._dtypes = {getattr(torch, name): np.dtype(name) for name in names}
        self._dtypes[torch.bfloat16] = BF16
        self._results = {dtype: name for name, dtype in self._dtypes.items()}
        for name in _AS_BYTES:
            if hasattr(torch, name):
                self._dtypes[getattr(torch, name)] = U8
        # Without CUDA in this build of torch there is no stream to ask for.
        self._raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def facts(self, x: Any) -> tuple[int, Hashable]:
        ptr = x.data_ptr()
        return ptr, (x.shape, x.stride(), x.dtype, ptr & 15, x.get_device(), x.is_neg())

    def view(self, x: Any) -> View:
        if x.layout is not self._torch.strided or x.device.type not in ("cpu", "cuda"):
            raise ArgumentError(f"a {x.layout} tensor on {x.device} has no plain memory; dense CPU or CUDA tensors do")
        if x.is_neg() or x.is_conj():
            raise ArgumentError("a lazily negated or conjugated tensor; call .resolve_neg() or .resolve_conj() first")
        if x.dtype not in self._dtypes:
            raise ArgumentError(f"a {x.dtype} tensor; no kernel reads that dtype")
        kind = "cuda" if x.device.type == "cuda" else "host"
        dtype = self._dtypes[x.dtype]
        return View(x.data_ptr(), tuple(x.shape), tuple(x.stride()), dtype, kind, max(x.get_device(), 0), True)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any:
        where = self._torch.device("cuda", device.index) if device.kind == "cuda" else self._torch.device("cpu")
        return self._torch.empty(shape, dtype=self._results[dtype], device=where)

    def adopt(self, owned: Any) -> Any:
        # A capsule, because from_dlpack(owned) would have the producer wait for a stream; -1 asks it not to.
        capsule = owned.__dlpack__() if isinstance(owned, np.ndarray) else owned.__dlpack__(stream=-1)
        return self._torch.utils.dlpack.from_dlpack(capsule)

    def stream(self, index: int) -> int:
        if self._raw_stream is not None:
            return self._raw_stream(index)
        return int(self._torch.cuda.current_stream(index).cuda_stream)


class _Foreign:
    """Any other producer: `__cuda_array_interface__` first, then DLPack.

    Results are allocated as CuPy or NumPy arrays; JAX and Numba get them through their own zero-copy import.
    """

    def __init__(self, root: str = "") -> None:
        self._root = root

    def wrap(self, result: Any) -> Any:
        if self._root in ("jax", "jaxlib"):
            return sys.modules["jax"].dlpack.from_dlpack(result)
        if self._root == "numba" and not isinstance(result, np.ndarray):
            return sys.modules["numba.cuda"].as_cuda_array(result)
        return result

    def adopt(self, owned: Any) -> Any:
        return self.wrap(owned)

    def facts(self, x: Any) -> tuple[int, Hashable]:
        v = self.view(x)
        return v.ptr, (type(x), v.shape, v.strides, v.dtype, v.ptr & 15, v.device, v.index, v.writable)

    def view(self, x: Any) -> View:
        interface = getattr(x, "__cuda_array_interface__", None)
        if interface is not None:
            dtype = np.dtype(interface["typestr"])
            shape = tuple(interface["shape"])
            strides = _element_strides(interface.get("strides"), shape, dtype.itemsize, f"{type(x).__name__}:")
            ptr, read_only = interface["data"]
            return View(ptr or 0, shape, strides, _plain(dtype), "cuda", _ordinal(ptr), not read_only)
        export = dlpack.read(x)
        if export.kind not in (dlpack.CPU, dlpack.CUDA, dlpack.CUDA_HOST):
            raise ArgumentError(f"{type(x).__name__}: DLPack device type {export.kind}; host memory and CUDA work")
        on_gpu = export.kind == dlpack.CUDA
        return View(
            export.ptr,
            export.shape,
            export.strides,
            export.dtype,
            "cuda" if on_gpu else "host",
            export.index if on_gpu else 0,
            export.writable,
        )

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> Any:
        return device.empty(shape, dtype)

    def stream(self, index: int) -> int:
        cupy = sys.modules.get("cupy")
        return int(cupy.cuda.get_current_stream(index).ptr) if cupy and cupy.cuda.is_available() else 0


def _ordinal(ptr: int) -> int:
    """The GPU a device pointer belongs to."""
    import cupy

    return int(cupy.cuda.runtime.pointerGetAttributes(ptr).device) if ptr else 0


_NUMPY = _NumPy()
_FRAMEWORKS: dict[type, Framework] = {np.ndarray: _NUMPY}

# type -> its library's `facts`, for types seen before: what an operation looks up on its fast path. None is an argument
# left out: it has no pointer.
FACTS: dict[type, Callable[[Any], tuple[Any, Hashable]]] = {
    np.ndarray: _NUMPY.facts,
    type(None): lambda _: (None, None),
}


def framework(x: Any) -> Framework:
    """How to read `x`. Raises ArgumentError for what is no array."""
    return _FRAMEWORKS.get(type(x)) or _classify(x)


def _classify(x: Any) -> Framework:
    root = type(x).__module__.partition(".")[0]
    found: Framework
    if isinstance(x, np.ndarray):
        found = _NUMPY
    elif root == "cupy":
        found = _CuPy()
    elif "torch" in sys.modules and isinstance(x, sys.modules["torch"].Tensor):
        found = _Torch()
    elif hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack__"):
        found = _Foreign(root)
    else:
        raise ArgumentError(
            f"{type(x).__name__} is no array: give CuPy, torch, NumPy, or anything with "
            "__cuda_array_interface__ or __dlpack__"
        )
    _FRAMEWORKS[type(x)] = found
    FACTS[type(x)] = found.facts
    return found


def view(x: Any) -> View:
    """Pointer, shape, strides, dtype and place of any framework's array, without a copy."""
    return framework(x).view(x)


def stream_handle(stream: Any) -> int:
    """The CUstream behind a stream argument: an int, `__cuda_stream__` (CuPy, cuda.core), or a torch stream."""
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol() if callable(protocol) else protocol
        if version != 0:
            raise ArgumentError(f"stream: __cuda_stream__ protocol version {version}, 0 is known")
        return int(handle)
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise ArgumentError(f"stream: {type(stream).__name__} is no CUDA stream: an int, __cuda_stream__, a torch stream")


def device_holding(v: View, name: str) -> Device:
    """The device that runs kernels on `v`; an error names the way out where the current device cannot reach it."""
    found = device_of("cuda" if v.device == "cuda" else "emulator", v.index)
    if found.kind == "cuda" and v.device == "host":
        raise ArgumentError(
            f"{name} is in host memory and kernels run on cuda:{found.index}; copy it with dsv4_rt.device().array(x), "
            "or set DSV4_RT_DEVICE=emulator"
        )
    if found.kind == "emulator" and v.device == "cuda":
        raise ArgumentError(
            f"{name} is on cuda:{v.index}, kernels run on the {found.name} device; unset DSV4_RT_DEVICE"
        )
    return found
