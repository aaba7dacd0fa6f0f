"""Tensor maps for TMA: one host object, encoded by the driver for a GPU and by the emulator for itself.

    tiles = TensorMap(x, (64, 64), swizzle="128B")       # boxes of 64 rows x 64 columns of x [T, K] bfloat16
    kernel.launch(grid, block, tiles, out)               # parameter: const __grid_constant__ Map tiles
    in_memory = device.array(np.frombuffer(tiles.encode(device), np.uint8))      # or anywhere in global memory

Shapes, boxes and element strides are given in the order of the array's axes, as NumPy has them; the coordinates in PTX
count the other way round, the contiguous axis first. In the kernel a map is any struct of 128 bytes aligned to 64.

Every rule of cuTensorMapEncodeTiled is checked here, on any machine, before a driver says CUDA_ERROR_INVALID_VALUE. The
rules are the CUDA driver API's; that an H200's driver agrees on each is in tests/core/test_tensor_map.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv4_rt.arrays import View, view
from dsv4_rt.device import Device, Region, device
from dsv4_rt.errors import ArgumentError

MAX_RANK = 5
MAX_BOX = 256  # elements along an axis
MAX_BOX_BYTES = 228 * 1024
MAX_ELEMENT_STRIDE = 8
ADDRESSES = 1024  # maps that a TensorMapAt keeps
# Element types by their names in PTX: bits, and what an array may hold for them.
DTYPES = {
    "u8": 8, "u16": 16, "u32": 32, "s32": 32, "u64": 64, "s64": 64, "f16": 16, "f32": 32, "f64": 64, "bf16": 16,
    "tf32": 32, "u4x16": 4,
    "u4x16_p64": 4, "u6x16_p32": 6,
}  # fmt: skip
PADDED = ("u4x16_p64", "u6x16_p32")  # 16 elements take 16 bytes of shared memory
FLOATS = ("f16", "f32", "f64", "bf16", "tf32")
SWIZZLES = {"none": 0, "32B": 32, "64B": 64, "128B": 128}  # bytes a row of a box may have
FILLS = ("zero", "nan")
L2_PROMOTIONS = ("none", "64B", "128B", "256B")
_OF_ARRAY = {
    "uint8": "u8", "int8": "u8", "uint16": "u16", "int16": "u16", "uint32": "u32", "int32": "s32", "uint64": "u64",
    "int64": "s64", "float16": "f16", "float32": "f32", "float64": "f64", "bfloat16": "bf16",
}  # fmt: skip


class TensorMap:
    """How TMA sees an array: a tensor of up to five axes, and the box that one instruction moves.

    Args:
        array: any framework's array, kept alive by the map, or a View. The last axis is contiguous, the others may be
            strided or overlap; 16-byte aligned.
        box: elements an instruction moves, for each axis, at most 256; the row (last axis) has a multiple of 16 bytes.
        dtype: the element type by its PTX name; that of the array if None. "tf32" of a float32 array rounds what is
            loaded to the nearest tf32; "u4x16" of a uint8 array counts its nibbles (not on sm_90a). "u4x16_p64"
            and "u6x16_p32", also of uint8, count elements of 4 and 6 bits that arrive padded, 16 of them in 16 bytes:
            what kind::f8f6f4 and mxf8f6f4 of tcgen05.mma take (not on sm_90a).
        element_strides: of each axis, take every n-th element, 1 to 8: ceil(box / n) elements arrive. The last axis has
            1.
        swizzle: "none", "32B", "64B" or "128B": permute the 16-byte pieces of a row, which has at most that many bytes.
        oob_fill: "zero" or, for floats, "nan" (the bits 0x7ff7 in every 16): what elements outside the array read as.
        l2_promotion: "none", "64B", "128B", "256B": a hint.
        interleave: "none"; the others are not implemented.

    Raises:
        ArgumentError: TMA cannot do it; the message says which rule.
    """

    def __init__(
        self,
        array: Any,
        box: Sequence[int],
        *,
        dtype: str | None = None,
        element_strides: Sequence[int] | None = None,
        swizzle: str = "none",
        oob_fill: str = "zero",
        l2_promotion: str = "128B",
        interleave: str = "none",
    ) -> None:
        seen = array if isinstance(array, View) else view(array)
        name = dtype or _OF_ARRAY.get(seen.dtype.name) or ("u8" if seen.dtype.itemsize == 1 else "")
        self.dtype = _one_of("dtype", name or seen.dtype.name, DTYPES)
        self.swizzle = _one_of("swizzle", swizzle, SWIZZLES)
        self.oob_fill = _one_of("oob_fill", oob_fill, FILLS)
        self.l2_promotion = _one_of("l2_promotion", l2_promotion, L2_PROMOTIONS)
        if interleave != "none":
            raise ArgumentError(f"TensorMap: interleave {interleave!r} is not implemented; only 'none'")
        rank = len(seen.shape)
        if not 1 <= rank <= MAX_RANK:
            raise ArgumentError(f"TensorMap: an array of {rank} axes; TMA has 1 to {MAX_RANK}")
        self.box = _sizes("box", box, rank)
        self.element_strides = _sizes("element_strides", element_strides or (1,) * rank, rank)
        self.array, self.view = array, seen
        self.shape, self.strides = _layout(seen, DTYPES[self.dtype])
        self._encoded: dict[str, bytes] = {}
        self._check()

    def __repr__(self) -> str:
        return f"TensorMap({self.dtype} {self.shape}, box {self.box}, swizzle {self.swizzle})"

    @property
    def row_bytes(self) -> int:
        """Bytes of a box along the last axis, in shared memory."""
        return self.box[-1] if self.dtype in PADDED else self.box[-1] * DTYPES[self.dtype] // 8

    @property
    def transaction_bytes(self) -> int:
        """What one load of a box credits to its mbarrier: elements, outside the array too, without padding."""
        rows = [-(-b // s) for b, s in zip(self.box[:-1], self.element_strides[:-1], strict=True)]
        return int(np.prod(rows, dtype=np.int64)) * (self.box[-1] * DTYPES[self.dtype] // 8)

    @property
    def region(self) -> Region:
        """The memory a kernel may touch through the map; the emulator lets it."""
        v = self.view
        return Region(v.first_byte, v.span, repr(self), v.writable)

    def fields(self) -> dict[str, Any]:
        """The map as a plain dict, axes in the order of PTX: what a device encodes."""
        return {
            "dtype": self.dtype, "address": self.view.ptr, "shape": self.shape[::-1],
            "strides": self.strides[:-1][::-1], "box": self.box[::-1], "element_strides": self.element_strides[::-1],
            "swizzle": self.swizzle, "oob_fill": self.oob_fill, "l2_promotion": self.l2_promotion,
            "interleave": "none",
        }  # fmt: skip

    def encode(self, on: Device | None = None) -> bytes:
        """The 128 bytes for a device, the current one if None.

        Raises:
            ArgumentError: the array is not on that device, or its architecture has no such map.
        """
        on = on or device()
        found = self._encoded.get(repr(on))
        if found is None:
            if (self.view.device == "cuda") != (on.kind == "cuda") or self.view.index != on.index:
                raise ArgumentError(f"TensorMap: the array is on {self.view.on}, the kernel on {on!r}")
            if self.dtype in PADDED and on.arch == "sm_90a":
                raise ArgumentError(f"TensorMap: sm_90a has no {self.dtype}")
            if self.dtype == "u4x16" and on.arch == "sm_90a":
                raise ArgumentError("TensorMap: sm_90a has no u4x16; a u8 map of the same bytes gives the same tile")
            found = self._encoded[repr(on)] = on.encode_tensor_map(self.fields())
        return found

    def _check(self) -> None:
        """The rules of cuTensorMapEncodeTiled."""
        bits, rank = DTYPES[self.dtype], len(self.shape)

        def refuse(why: str) -> None:
            raise ArgumentError(
                f"TensorMap: {why}\n  {self.dtype} {self.shape}, strides {self.strides} B, box {self.box}, "
                f"element strides {self.element_strides}, swizzle {self.swizzle}"
            )

        if self.view.ptr % 16 or not self.view.ptr:
            refuse(f"the array begins at {self.view.ptr:#x}, which is not a multiple of 16")
        for axis in range(rank):
            if not 1 <= self.shape[axis] <= 1 << 32:
                refuse(f"axis {axis} has {self.shape[axis]} elements; TMA takes 1 to 2^32")
            if not 1 <= self.box[axis] <= MAX_BOX:
                refuse(f"the box has {self.box[axis]} elements on axis {axis}; TMA takes 1 to {MAX_BOX}")
            if not 1 <= self.element_strides[axis] <= MAX_ELEMENT_STRIDE:
                refuse(f"element stride {self.element_strides[axis]} on axis {axis}; TMA takes 1 to 8")
        if self.element_strides[-1] != 1:
            refuse(f"element stride {self.element_strides[-1]} on the last axis, where TMA ignores it; give 1")
        for axis, stride in enumerate(self.strides[:-1]):
            if stride % 16 or not 0 <= stride < 1 << 40:
                refuse(f"axis {axis} steps {stride} B; TMA takes multiples of 16 below 2^40: pad the rows of the array")
        if self.box[-1] * bits % 128:
            refuse(f"a row of the box has {self.box[-1] * bits / 8:g} B; it must be a multiple of 16")
        if self.transaction_bytes > MAX_BOX_BYTES:
            refuse(f"the box has {self.transaction_bytes:,} B; TMA takes at most {MAX_BOX_BYTES:,}")
        widest = SWIZZLES[self.swizzle]
        if widest and self.row_bytes > widest:
            refuse(f"a row of the box has {self.row_bytes} B; swizzle {self.swizzle} takes at most {widest}")
        if self.oob_fill == "nan" and self.dtype not in FLOATS:
            refuse(f"oob_fill 'nan' of {self.dtype}, which is no float")
        if self.dtype == "u4x16" and self.shape[-1] % 2:
            refuse("u4x16 takes an even number of elements on the last axis")
        if self.dtype in PADDED:
            self._check_padded(refuse)

    def _check_padded(self, refuse: Callable[[str], None]) -> None:
        """The further rules of elements that arrive padded."""
        if self.box[-1] != 128 or self.shape[-1] % 128:
            refuse(f"{self.dtype} takes boxes of 128 elements, and a multiple of 128 of them on the last axis")
        if self.view.ptr % 32 or any(stride % 32 for stride in self.strides[:-1]):
            refuse(f"{self.dtype} takes arrays and strides that are multiples of 32 B")
        if self.swizzle not in ("none", "128B"):
            refuse(f"{self.dtype} takes swizzle 'none' or '128B'")


class TensorMapAt:
    """A tensor map whose array begins where a launch says: what `prepare` takes in place of POINTER.

        ready = kernel.prepare(grid, block, TensorMapAt((T, K), (K, 1), BF16, (64, 64), swizzle="128B"), POINTER)
        ready.launch([x.data.ptr, out.data.ptr], stream)

    The driver encodes a map once for each address (microseconds); the last ADDRESSES of them are kept.

    Args:
        shape, strides, dtype: of the array, strides in elements.
        box, options: as for `TensorMap`.

    Raises:
        ArgumentError: TMA cannot do it; the message says which rule.
    """

    def __init__(
        self, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype[Any], box: Sequence[int], **options: Any
    ) -> None:
        anywhere = View(1 << 12, tuple(shape), tuple(strides), dtype, "cuda", 0, True)
        self._form = TensorMap(anywhere, box, **options)

    def __repr__(self) -> str:
        return f"TensorMapAt({self._form!r})"

    def encoder(self, on: Device) -> Callable[[int], bytes]:
        """A function of the address that returns the 128 bytes for a device.

        It raises ArgumentError if the address is null or not a multiple of 16.
        """
        encode, known = on.tensor_map_encoder(self._form.fields()), dict[int, bytes]()

        def encoded(address: int) -> bytes:
            found = known.get(address)
            if found is None:
                if address % 16 or not address:
                    raise ArgumentError(f"{self!r}: an array at {address:#x}; TMA takes multiples of 16 B")
                if len(known) >= ADDRESSES:
                    known.clear()
                found = known[address] = encode(address)
            return found

        return encoded


def _one_of(what: str, given: Any, known: Any) -> str:
    if given not in known:
        raise ArgumentError(f"TensorMap: {what} {given!r} is none of {', '.join(known)}")
    return str(given)


def _sizes(what: str, given: Sequence[int], rank: int) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in given)
    if len(sizes) != rank:
        raise ArgumentError(f"TensorMap: {what} {sizes} has {len(sizes)} axes, the array {rank}")
    return sizes


def _layout(v: View, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape in elements, strides in bytes) of the array, as elements of so many bits."""
    size = v.dtype.itemsize
    if bits != 8 * size and not (bits in (4, 6) and size == 1):
        raise ArgumentError(f"TensorMap: elements of {bits} bits, of a {v.dtype.name} array")
    if v.shape[-1] > 1 and v.strides[-1] != 1:
        raise ArgumentError(f"TensorMap: the array's last axis steps {v.strides[-1]} elements; it must be contiguous")
    shape = (*v.shape[:-1], v.shape[-1] * 8 // bits) if bits < 8 else v.shape
    # Nobody steps along an axis of one element: any legal stride serves, and frameworks give odd ones.
    strides = tuple(s * size if n > 1 else 16 for n, s in zip(v.shape[:-1], v.strides[:-1], strict=True))
    return shape, (*strides, size)
