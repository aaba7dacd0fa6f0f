"""Matrices in shared memory as tensor cores address them: swizzles, matrix descriptors, canonical layouts.

A swizzle permutes the 16-byte chunks of a pattern row by the row's number, both taken from address bits, so that it is
a function of the address alone:

    32 B   bit 4      ^= bit 7                  64 B   bits 4-5 ^= bits 7-8          128 B   bits 4-6 ^= bits 7-9

TMA and tensor cores apply it to absolute shared-memory addresses. A descriptor (PTX ISA, "Matrix descriptor") names a
start, two strides, a base offset and a swizzle; with a base offset b the source bits are those of address - 128 b, so
that a pattern may begin at any multiple of 128 bytes. With T elements to 16 bytes and a pattern of P = 16 (no
swizzle), 32, 64 or 128 bytes, the element (r, k) of an operand of rows r (M of A, N of B) lies before swizzling at

    K-major    none      start + r/8 SBO + r%8 16 + k/T LBO + k%T               (element sizes left out)
               swizzled  start + r/8 SBO + r%8 P  + k
    MN-major   none      start + r/T SBO + r%T    + k%8 16 + k/8 LBO
               swizzled  start + r/t LBO + r%t    + k%8 P  + k/8 SBO            t = P / element size

Source: PTX ISA on wgmma and tcgen05 ("Strides", "Canonical layouts"); the descriptor fields of both generations;
judged on an H200 by `tests/conformance/tensor_forms.py`, starts that are not pattern-aligned included.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.errors import EmulatorError, UnsupportedInstruction

Array = npt.NDArray[Any]
SWIZZLES = (0, 32, 64, 128)  # bytes of the pattern; 0 is none
_HOPPER = {0: 0, 1: 128, 2: 64, 3: 32}  # bits 62-63
_BLACKWELL = {0: 0, 2: 128, 4: 64, 6: 32}  # bits 61-63


def swizzle(address: Array, width: int, base_offset: int = 0) -> Array:
    """Addresses after swizzling: `width` is 0, 32, 64 or 128 bytes, base_offset in 128 bytes. Its own inverse."""
    if width not in SWIZZLES:
        raise EmulatorError(f"swizzle: a width of {width} B; there are {', '.join(map(str, SWIZZLES))}")
    if not width:
        return address
    return address ^ (((address >> 7) - base_offset & (width // 16 - 1)) << 4)


@dataclass(frozen=True)
class MatrixDescriptor:
    """What the 64 bits say; offsets and strides in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int


def decode(bits: int) -> MatrixDescriptor:
    """A descriptor of wgmma. Raises EmulatorError where reserved bits are set, with what they may have come from."""
    reserved = bits & ((3 << 14) | (3 << 30) | (7 << 46) | (0x3FF << 52))
    if reserved:
        why = "an address of more than 18 bits, which spills into the next field: mask it with 0x3FFFF"
        if not reserved & ((3 << 14) | (3 << 30)):
            why = "a descriptor for tcgen05" if bits >> 46 & 7 == 1 else "a field that was not cleared"
        raise EmulatorError(f"matrix descriptor {bits:#018x}: reserved bits {reserved:#x} are set ({why})")
    start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    return MatrixDescriptor(start, leading, stride, bits >> 49 & 7, _HOPPER[bits >> 62])


def decode_tcgen05(bits: int) -> MatrixDescriptor:
    """A descriptor of tcgen05.mma. Raises EmulatorError where the ISA forbids a field, UnsupportedInstruction else."""
    name = f"matrix descriptor {bits:#018x}"
    reserved = bits & ((3 << 14) | (3 << 30) | (0xFF << 53))
    if reserved & ((3 << 14) | (3 << 30)):
        why = "an address of more than 18 bits, which spills into the next field: mask it with 0x3FFFF"
        raise EmulatorError(f"{name}: reserved bits {reserved:#x} are set ({why})")
    if reserved or bits >> 46 & 7 != 1:
        why = f"bits 46-48 must be 0b001 and are {bits >> 46 & 7:#05b}, bits 53-60 must be 0"
        raise EmulatorError(f"{name}: {why} (a descriptor for wgmma?)")
    if bits >> 52 & 1 or bits >> 61 == 1:
        what = "an absolute leading offset (bit 52)" if bits >> 52 & 1 else "the 128B swizzle of 32-byte atoms"
        raise UnsupportedInstruction(f"{name}: {what} is not implemented by the emulator")
    if bits >> 61 not in _BLACKWELL:
        raise EmulatorError(f"{name}: swizzle {bits >> 61} (bits 61-63) does not exist")
    start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    return MatrixDescriptor(start, leading, stride, bits >> 49 & 7, _BLACKWELL[bits >> 61])


@lru_cache(maxsize=4096)
def element_addresses(d: MatrixDescriptor, rows: int, depth: int, size: int, mn_major: bool) -> Array:
    """Shared addresses of the elements, [rows, depth], of a matrix of `size`-byte elements. Read-only."""
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    pitch = d.swizzle or 16
    per_chunk = 16 // size
    if not mn_major:
        if d.swizzle:
            found = r // 8 * d.stride + r % 8 * pitch + k * size
        else:
            found = r // 8 * d.stride + r % 8 * 16 + k // per_chunk * d.leading + k % per_chunk * size
    elif d.swizzle:
        wide = pitch // size
        found = r // wide * d.leading + r % wide * size + k % 8 * pitch + k // 8 * d.stride
    else:
        found = r // per_chunk * d.stride + r % per_chunk * size + k % 8 * 16 + k // 8 * d.leading
    found = swizzle(d.start + found, d.swizzle, d.base_offset)
    found.flags.writeable = False
    return found
