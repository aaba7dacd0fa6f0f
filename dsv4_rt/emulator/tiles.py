"""Whether a matrix descriptor fits the tile it reads: which piece of which row of a TMA tile lies where.

TMA puts the 16-byte pieces of a tile's rows in places that its swizzle chooses; a descriptor of wgmma finds the pieces
of a matrix by strides and a swizzle of its own. Nothing in hardware compares the two. Here every piece of shared memory
that a tile covers carries the number of its copy, its row and its place in the row until something else is written
there, and a matrix that lies wholly in such pieces must be made of them in order:

    K-major    row r of the matrix is (part of) one row of a tile, the same part for all r; no row is there twice
    MN-major   the rows of the tile are the k: each k one row, the same for all pieces of one tile, none there twice
    A and B    both K-major, of tiles with rows of equal size: they begin at the same byte of these rows

Elements of 4 and 6 bits lie packed or padded as the copy's type says, which must be what the product takes.

A matrix with a piece of unknown origin is not looked at, nor one of a tile that came without a swizzle: its rows may
have been permuted beforehand. That what one product takes from A belongs to what it takes
from B beyond that (which tiles, which step of the loop) is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.descriptors import MatrixDescriptor, element_addresses

Array = npt.NDArray[Any]
PATTERN = 1024  # bytes after which every swizzle repeats
_PADDED = {"e2m1": "u4x16_p64", "e2m3": "u6x16_p32", "e3m2": "u6x16_p32"}  # type of a factor -> of the copy it needs
_ROW, _PIECE = 16, 40  # a mark is copy << 40 | row << 16 | piece


@dataclass(frozen=True)
class Operand:
    """A matrix as a descriptor gives it."""

    name: str  # "A" or "B"
    descriptor: MatrixDescriptor
    rows: int
    size: int  # bytes an element
    mn_major: bool
    ty: str = ""  # of its elements


class Tiles:
    """The marks of a batch's shared memory, one for each 16 bytes; 0 where no tile lies."""

    def __init__(self, pieces: int) -> None:
        self.marks = np.zeros(pieces, np.int64)
        self.copies: list[tuple[int, int, str]] = [(0, 0, "")]  # (PTX line, bytes of a row, type)
        self.right: dict[tuple[int, int, int, bool], Array] = {}  # marks of a matrix less its first that are in order

    def put(self, at: Array, line: int, row_bytes: int, dtype: str = "") -> None:
        """A copy has written its pieces, row by row, to these places; row_bytes is 0 for a tile without a swizzle."""
        if not row_bytes:
            self.marks[at] = 0
            return
        pieces = np.arange(len(at))
        across = row_bytes // 16
        self.marks[at] = (len(self.copies) << _PIECE) + (pieces // across << _ROW) + pieces % across
        self.copies.append((line, row_bytes, dtype))

    def forget(self, at: Array, size: int) -> None:
        """Accesses of `size` bytes, 16 at most, have written at these bytes."""
        self.marks[at >> 4] = 0
        if size > 16:
            self.marks[(at + size - 1) >> 4] = 0

    def forget_range(self, lo: int, hi: int) -> None:
        """Something else has written bytes [lo, hi)."""
        self.marks[lo >> 4 : (hi + 15) >> 4] = 0

    def check(self, origin: int, depth: int, operands: list[Operand]) -> tuple[int, str] | None:
        """(PTX line of a copy, what is wrong) of the matrices of one product; None if nothing is known to be.

        origin: what to add to a shared offset for its place in the batch's shared memory.
        """
        begins: list[tuple[int, int, int]] = []
        for each in operands:
            d, per_piece = each.descriptor, 16 // each.size
            base = d.start & ~(PATTERN - 1)
            relative = MatrixDescriptor(d.start - base, d.leading, d.stride, d.base_offset, d.swizzle)
            places = element_addresses(relative, each.rows, depth, each.size, each.mn_major)
            places = places[::per_piece] if each.mn_major else places[:, ::per_piece]
            marks = self.marks.take((places + (base + origin)) >> 4)
            if not marks.all():
                continue
            line, row_bytes, dtype = self.copies[int(marks[0, 0]) >> _PIECE]
            odd = _packing(each, dtype)
            if odd:
                return line, odd
            form = (each.rows, depth, each.size, each.mn_major)
            step = marks - marks[0, 0]
            if form in self.right and np.array_equal(step, self.right[form]):
                wrong = ""
            else:
                wrong = _mn_major(marks) if each.mn_major else _k_major(marks)
                if not wrong:
                    self.right[form] = step
            if wrong:
                return line, (
                    f"matrix {each.name} is not what its descriptor (swizzle {d.swizzle} B, leading offset "
                    f"{d.leading:#x}, stride offset {d.stride:#x}) should find in the tile of rows of {row_bytes} B: "
                    f"{wrong}"
                )
            if not each.mn_major:
                begins.append((int(marks[0, 0]) & (1 << _ROW) - 1, row_bytes, line))
        if len(begins) == 2 and begins[0][0] != begins[1][0] and begins[0][1] == begins[1][1]:
            at = [16 * begin for begin, _, _ in begins]
            return begins[0][2], (
                f"matrices A and B take different k: A begins at byte {at[0]} of the rows of its tile, B at {at[1]}"
            )
        return None


def _packing(operand: Operand, dtype: str) -> str:
    """What is wrong with the packing of elements that a copy of a type brought."""
    padded = _PADDED.get(operand.ty)
    if not operand.ty or (dtype != "u4x16" and dtype not in _PADDED.values()) or dtype == padded:
        return ""
    if dtype == "u4x16" and not padded:
        return ""  # bytes of two
    wanted = f"{operand.ty} padded to bytes, as {padded} brings it" if padded else "bytes without padding"
    return f"matrix {operand.name} lies in a tile of {dtype}, the product takes {wanted}"


def _split(mark: int) -> str:
    return f"bytes {16 * (mark & (1 << _ROW) - 1)}.. of row {mark >> _ROW & (1 << _PIECE - _ROW) - 1}"


def _k_major(marks: Array) -> str:
    """What is wrong with [rows, pieces]."""
    ahead = np.arange(marks.shape[1])
    piece = marks[:, 0] & (1 << _ROW) - 1
    bad = (marks != marks[:, :1] + ahead).any(axis=1) | (piece != piece[0])
    if bad.any():
        row = int(np.argmax(bad))
        found = ", ".join(_split(mark) for mark in marks[row].tolist())
        return f"its row {row} is {found}; row 0 is {_split(int(marks[0, 0]))}"
    _, first, inverse = np.unique(marks[:, 0], return_index=True, return_inverse=True)
    again = np.nonzero(first[inverse] != np.arange(len(marks)))[0]
    if len(again):
        row = int(again[0])
        return f"its rows {int(first[inverse[row]])} and {row} are both {_split(int(marks[row, 0]))}"
    return ""


def _mn_major(marks: Array) -> str:
    """What is wrong with [pieces, k]."""
    step = marks - marks[:, :1]
    bad = (step & (1 << _ROW) - 1 != 0).any(axis=1) | (step >> _PIECE != 0).any(axis=1) | (step != step[0]).any(axis=1)
    if bad.any():
        piece = int(np.argmax(bad))
        k = int(np.argmax(step[piece] != step[0])) or 1
        return f"its k = 0 and {k} are {_split(int(marks[piece, 0]))} and {_split(int(marks[piece, k]))}"
    if len(np.unique(marks)) != marks.size:
        return f"a piece of it is there twice, {_split(int(marks[0, 0]))} among them"
    return ""
