"""Reading a DLPack producer without importing its array anywhere: pointer, shape, strides, dtype and place.

The structures are those of DLPack 1.x (dlpack.h); a capsule is read and dropped, its memory stays the producer's. That
is sound only for a producer that exports its own memory, so a copy is asked not to be made and refused where one is.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType: the kinds of memory a kernel can be given
_READ_ONLY, _COPIED = 1, 2  # DLPACK_FLAG_BITMASK_*
_BFLOAT, _BOOL, _FIRST_NARROW, _LAST_NARROW = 4, 6, 7, 17  # DLDataTypeCode; 7 to 17 are the fp8, fp6 and fp4 formats
_KINDS: Final = {0: "i", 1: "u", 2: "f", 5: "c"}


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)


@dataclass(frozen=True)
class Export:
    """What a producer says of its array; strides in elements."""

    ptr: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    kind: int  # CPU, CUDA or CUDA_HOST
    index: int
    writable: bool


def read(producer: Any) -> Export:
    """Export `producer` once, without a copy and without any synchronisation.

    Raises:
        ArgumentError: it exports a copy, a dtype no kernel reads, memory of another kind, or nothing at all.
    """
    name = type(producer).__name__
    stream = -1 if int(producer.__dlpack_device__()[0]) == CUDA else None  # -1: the producer must not synchronise
    try:
        try:
            capsule = producer.__dlpack__(stream=stream, max_version=(1, 0), copy=False)
        except TypeError:  # older than DLPack 1.0: cannot be asked not to copy, but two copies lie apart
            capsule = producer.__dlpack__(stream=stream)
            second = producer.__dlpack__(stream=stream)
            if _open(capsule)[0].data != _open(second)[0].data:
                raise ArgumentError(f"{name}: __dlpack__ exports a copy; its own memory is needed") from None
    except (BufferError, RuntimeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(f"{name}: __dlpack__ cannot export its own memory: {error}") from error
    tensor, flags = _open(capsule)
    if flags & _COPIED:
        raise ArgumentError(f"{name}: __dlpack__ exports a copy; its own memory is needed")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:
        strides = tuple(int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(tensor.ndim))
    return Export(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        _dtype(name, tensor),
        tensor.device.kind,
        tensor.device.index,
        not flags & _READ_ONLY,
    )


def _open(capsule: Any) -> tuple[_Tensor, int]:
    """(tensor, flags) of a capsule, which must outlive them."""
    if _is_valid(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_pointer(capsule, b"dltensor_versioned"))
        if managed.major != 1:
            raise ArgumentError(f"DLPack version {managed.major}.{managed.minor}; 1.x is known")
        return managed.tensor, managed.flags
    if _is_valid(capsule, b"dltensor"):
        return _Tensor.from_address(_pointer(capsule, b"dltensor")), 0
    raise ArgumentError("__dlpack__ returned no unused DLPack capsule")


def _dtype(name: str, tensor: _Tensor) -> np.dtype[Any]:
    """One-byte narrow floats are bytes to a kernel."""
    code, bits, lanes = tensor.code, tensor.bits, tensor.lanes
    if lanes == 1 and code == _BFLOAT and bits == 16:
        return BF16
    if lanes * bits == 8 and _FIRST_NARROW <= code <= _LAST_NARROW:
        return np.dtype(np.uint8)
    if lanes == 1 and code == _BOOL and bits == 8:
        return np.dtype(np.bool_)
    if lanes == 1 and code in _KINDS and bits % 8 == 0:
        try:
            return np.dtype(f"{_KINDS[code]}{bits // 8}")
        except TypeError:
            pass
    raise ArgumentError(f"{name}: DLPack dtype (code {code}, {bits} bits, {lanes} lanes); no kernel reads that")
