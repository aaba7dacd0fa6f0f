"""Tensor maps: what the 128 bytes behind a TMA instruction say, as the emulator writes and reads them.

A driver's encoding is not published, so the emulator has its own: `encode` makes it of a plain dict, `decode` reads it,
`replace` changes one field as tensormap.replace does. Axes are numbered as in PTX, the contiguous one first; sizes are
in elements, strides in bytes.

A box of b elements an axis, of which every s-th is taken, holds ceil(b / s) of them; along axis 0 s counts as 1. In
shared memory its rows (axis 0) lie one after the other, with a swizzle each in a pattern row of 32, 64 or 128 bytes,
also where a row is shorter. The transaction counts the elements only, those outside the tensor too. All of this an H200
has shown (`tests/conformance/results/tma.txt`).

u4x16_p64 and u6x16_p32 are packed in global memory and padded in shared: 16 elements to 16 bytes, of which the first 8
or 12 hold them and the others stay undefined. The transaction counts the packed bytes, as CUTLASS and Triton expect. No
GPU has judged them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from dsv4_rt.errors import EmulatorError

NBYTES, ALIGN = 128, 64
_MAGIC = b"dsv4_rt emulated tensor map\0"
_HEAD = struct.Struct("<28s4xBBBBQ5I4Q5H5B")
# dtype -> bits of an element, kind: u, s, f; as the PTX names them, u4x16: sixteen 4-bit numbers in 8 bytes; _p: padded
DTYPES: dict[str, tuple[int, str]] = {
    "u8": (8, "u"), "u16": (16, "u"), "u32": (32, "u"), "s32": (32, "s"), "u64": (64, "u"), "s64": (64, "s"),
    "f16": (16, "f"), "f32": (32, "f"), "f64": (64, "f"), "bf16": (16, "f"), "tf32": (32, "f"), "u4x16": (4, "u"),
    "u4x16_p64": (4, "u"), "u6x16_p32": (6, "u"),
}  # fmt: skip
PADDED = {"u4x16_p64": 8, "u6x16_p32": 12}  # bytes in use of 16
SWIZZLES = {"none": 0, "32B": 32, "64B": 64, "128B": 128}  # bytes of the pattern's row
FILLS = ("zero", "nan")
_NAMES = tuple(DTYPES)
# tensormap.replace.elemtype: the values of PTX that the emulator knows.
_ELEMTYPES = {0: "u8", 1: "u16", 2: "u32", 3: "s32", 4: "u64", 5: "s64", 6: "f16", 7: "f32", 9: "f64", 10: "bf16",
              11: "tf32", 13: "u4x16", 14: "u4x16_p64", 15: "u6x16_p32"}  # fmt: skip


@dataclass(frozen=True)
class TileMap:
    """A decoded map of a tiled tensor: `strides` has the bytes of a step along the axes 1, 2 ..."""

    dtype: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    swizzle: str = "none"
    oob_fill: str = "zero"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def bits(self) -> int:
        """Of an element."""
        return DTYPES[self.dtype][0]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Elements of a box along each axis."""
        steps = (1, *self.element_strides[1:])
        return tuple(-(-b // s) for b, s in zip(self.box, steps, strict=True))

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of a box along axis 0, in global memory."""
        return self.box[0] * self.bits // 8

    @cached_property
    def row_bytes(self) -> int:
        """The same in shared memory."""
        return self.box[0] if self.dtype in PADDED else self.packed_bytes

    @cached_property
    def rows(self) -> int:
        found = 1
        for count in self.counts[1:]:
            found *= count
        return found

    @cached_property
    def pitch(self) -> int:
        """Bytes from row to row of a box in shared memory."""
        return SWIZZLES[self.swizzle] or self.row_bytes

    @cached_property
    def transaction_bytes(self) -> int:
        return self.rows * self.packed_bytes


def encode(fields: Mapping[str, Any]) -> bytes:
    """The 128 bytes of a map.

    Args:
        fields: dtype, address, shape, strides, box, element_strides, swizzle, oob_fill as in TileMap; other fields
            (interleave, l2_promotion) change nothing here.

    Raises:
        EmulatorError: the emulator does not model what is asked for.
    """
    if fields.get("interleave", "none") != "none":
        raise EmulatorError(f"tensor map: interleave {fields['interleave']!r} is not implemented by the emulator")
    if fields["dtype"] not in DTYPES:
        raise EmulatorError(f"tensor map: dtype {fields['dtype']!r} is none of {', '.join(DTYPES)}")
    if fields["swizzle"] not in SWIZZLES:
        raise EmulatorError(f"tensor map: swizzle {fields['swizzle']!r} is not implemented by the emulator")
    sizes = [tuple(int(n) for n in fields[name]) for name in ("shape", "strides", "box", "element_strides")]
    shape, strides, box, steps = sizes
    address = int(fields["address"])
    return _pack(TileMap(fields["dtype"], address, shape, strides, box, steps, fields["swizzle"], fields["oob_fill"]))


def _pack(tile: TileMap) -> bytes:
    def padded(values: tuple[int, ...], n: int) -> list[int]:
        return [*values, *[0] * (n - len(values))]

    head = _HEAD.pack(
        _MAGIC, _NAMES.index(tile.dtype), tile.rank, list(SWIZZLES).index(tile.swizzle), FILLS.index(tile.oob_fill),
        tile.address, *padded(tuple(n - 1 for n in tile.shape), 5), *padded(tile.strides, 4), *padded(tile.box, 5),
        *padded(tile.element_strides, 5),
    )  # fmt: skip
    return head.ljust(NBYTES, b"\0")


@lru_cache(maxsize=1024)
def decode(record: bytes) -> TileMap:
    """What 128 bytes say.

    Raises:
        EmulatorError: they are no map that `encode` made.
    """
    magic, dtype, rank, swizzle, fill, address, *rest = _HEAD.unpack_from(record)
    if magic != _MAGIC:
        raise EmulatorError(
            "the 128 bytes are not a tensor map that this emulator has encoded (TensorMap.encode(device) makes one for "
            "a device; a GPU's do not serve here)"
        )
    shape, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:19]
    return TileMap(
        _NAMES[dtype], address, tuple(n + 1 for n in shape[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]),
        tuple(steps[:rank]), list(SWIZZLES)[swizzle], FILLS[fill],
    )  # fmt: skip


_EMPTY = TileMap("u8", 0, (1,), (), (1,), (1,))  # 128 zeros, which a kernel may begin a map with


def replace(record: bytes, field: str, value: int, axis: int = 0) -> bytes:
    """A map with one field changed, as tensormap.replace does: `field` and `value` as PTX has them.

    Raises:
        EmulatorError: the field or the value is not modelled, or the map has no such axis.
    """
    tile = decode(record) if any(record) else _EMPTY
    now: dict[str, Any] = {name: getattr(tile, name) for name in TileMap.__dataclass_fields__}
    lists = {"box_dim": "box", "global_dim": "shape", "global_stride": "strides", "element_stride": "element_strides"}
    if field in lists:
        name = lists[field]
        values = list(now[name])
        if axis >= len(values):
            raise EmulatorError(f"tensormap.replace.{field}: axis {axis} of a map of rank {tile.rank}")
        values[axis] = value
        now[name] = tuple(values)
    elif field == "global_address":
        now["address"] = value
    elif field == "elemtype" and value in _ELEMTYPES:
        now["dtype"] = _ELEMTYPES[value]
    elif field == "swizzle_mode" and value in (0, 1, 2, 3):
        now["swizzle"] = list(SWIZZLES)[value]
    elif field == "fill_mode" and value in (0, 1):
        now["oob_fill"] = FILLS[value]
    elif field == "rank" and 0 <= value < 5:
        rank = value + 1  # PTX: the rank less one
        now["shape"] = (*tile.shape, *[1] * 5)[:rank]
        now["strides"] = (*tile.strides, *[16] * 5)[: rank - 1]
        now["box"] = (*tile.box, *[1] * 5)[:rank]
        now["element_strides"] = (*tile.element_strides, *[1] * 5)[:rank]
    elif not (field == "interleave_layout" and value == 0):
        raise EmulatorError(f"tensormap.replace.{field} with {value} is not implemented by the emulator")
    return _pack(TileMap(**now))
