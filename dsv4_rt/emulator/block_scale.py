"""Block scales and narrow factors of tcgen05.mma: instruction descriptors, where scale factors and elements lie.

    D[m, n] (+)= sum_k A[m, k] SFA[m, k / B] B[n, k] SFB[n, k / B]

    kind        factors                          K     scales            spelling                    B    ids
    mxf8f6f4    e4m3, e5m2, e2m3, e3m2, e2m1     32    ue8m0             scale_vec::1X, block32      32   0 to 3
    mxf4        e2m1                             64    ue8m0             scale_vec::2X, block32      32   0, 2
    mxf4nvf4    e2m1                             64    ue8m0             scale_vec::2X, block32      32   0, 2
                                                       ue8m0, ue4m3      scale_vec::4X, block16      16   0

Scale factors lie in tensor memory, those of row r (m of A, n of B) in lane r%32, column r/32 of their address, byte
`id` + j of the word the one of block j; all of it four times, once in each 32 lanes.

Of a pair of CTAs each tensor memory holds the factors of its own rows of A, and those of all N columns of B. With
M = 128, where its lanes 0 to 63 hold the first N/2 columns of D, they also hold the factors of these columns of B only,
lanes 64 to 127 those of the others, each half twice.

Narrow factors, as containers of 8 bits:

    shared memory, f8f6f4 and mxf8f6f4    16 elements to 16 bytes, packed from the lowest bit on, the rest is padding
    tensor memory, f8f6f4 and mxf8f6f4    an element to a byte: e2m1 in its bits 2 to 5, e2m3 and e3m2 in its low six
    mxf4, mxf4nvf4                        two e2m1 to a byte, the lower k in the low half, nothing else

The positions inside a byte of tensor memory are pictures in the PTX ISA; what they show is taken from the text on
mma.sync, which wants the same. The two upper bits of a scale factor's address are not looked at: CUTLASS keeps the id
there. Where the factors of a pair lie is CUTLASS's (tmem_sf_frg, "2by2" for M = 128; the copies of a 2-SM kernel).

Source: PTX ISA 9.0, "Instruction descriptor", "Block scaling", "Packing formats"; the padding in shared memory also by
what Triton 3.9 compiles. No B200 has judged it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.memory import LaneFault
from dsv4_rt.emulator.mma import BYTES
from dsv4_rt.emulator.narrow import FORMATS
from dsv4_rt.errors import EmulatorError, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.tmem import Slab, TensorMemory

Array = npt.NDArray[Any]
_ONE = np.zeros(1, np.int64)
PARTITION = 32  # lanes that hold one copy of all scale factors
PADDED = ("e2m3", "e3m2", "e2m1")  # types whose elements have containers of their own
PACKED = "e2m1x2"  # two to a byte
SIZES = BYTES | dict.fromkeys((*PADDED, PACKED), 1)  # bytes of a container
FACTORS = ("e4m3", "e5m2", None, "e2m3", "e3m2", "e2m1")  # by code
# kind -> spelling of the vector size -> scale factors a row
VECTORS: dict[str, dict[str, int]] = {
    "mxf8f6f4": {"": 1, "scale_vec::1X": 1, "block32": 1},
    "mxf4": {"": 2, "scale_vec::2X": 2, "block32": 2},
    "mxf4nvf4": {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4},
}
_IDS = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,)}


@dataclass(frozen=True)
class ScaleForm:
    """What an instruction descriptor says of the scale factors."""

    ty: str  # ue8m0 or ue4m3
    vector: int  # factors a row
    ids: tuple[int, int]  # of A, B: the first byte


Fields = tuple[int, int, tuple[str, str, str], bool, tuple[bool, bool], ScaleForm]


def decode(bits: int, kind: str, vector: int, group: int = 1) -> Fields:
    """M, N, types, negation, majors and scales of a block-scaled product's instruction descriptor.

    vector: scale factors a row. group: CTAs that take part.

    Raises:
        EmulatorError: a field that the ISA forbids, or that contradicts the kind or the vector size.
        UnsupportedInstruction: one that is not modelled.
    """
    name = f"instruction descriptor {bits:#010x} of kind::{kind}.block_scale, {vector} scale factors a row"
    packed = kind != "mxf8f6f4"
    if bits & 4:
        raise UnsupportedInstruction(f"{name}: sparse matrices are not implemented by the emulator")
    if packed and bits >> 31:
        raise UnsupportedInstruction(f"{name}: K = 96 (bit 31), which sm_103a has, is not implemented by the emulator")
    reserved = bits & (0b1011 | 1 << 6 | 7 << 24 | 1 << 31 | (1 << 12 if packed else 0))
    if reserved:
        raise EmulatorError(f"{name}: bits {reserved:#x} must be 0 (sparsity, reserved, M is a multiple of 128)")
    factors = []
    for what, at in (("A", 7), ("B", 10)):
        code = bits >> at & (3 if packed and what == "B" else 7)
        ty = (PACKED if code == 1 else None) if packed else FACTORS[code] if code < len(FACTORS) else None
        if ty is None:
            wanted = "; e2m1, which is 1, is all there is" if packed else ""
            raise EmulatorError(f"{name}: format {code} of {what} does not exist{wanted}")
        factors.append(ty)
    scale = "ue8m0" if bits >> 23 & 1 else "ue4m3"
    if scale == "ue4m3" and (kind != "mxf4nvf4" or vector != 4):
        raise EmulatorError(f"{name}: scale factors of type UE4M3 (bit 23); they must be UE8M0")
    ids = bits >> 29 & 3, bits >> 4 & 3
    for what, id_ in zip("AB", ids, strict=True):
        if id_ not in _IDS[vector]:
            allowed = " or ".join(map(str, _IDS[vector]))
            raise EmulatorError(f"{name}: scale factor id {id_} of {what}; it must be {allowed}")
    mn_major = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    if packed and any(mn_major):
        raise EmulatorError(f"{name}: matrices of kind::{kind} are K-major (bits 15 and 16)")
    m, n = (bits >> 27 & 3) << 7, (bits >> 17 & 63) << 3
    rows, step = ((128,), 8) if group == 1 else ((128, 256), 16)
    step *= 1 + (bits >> 16 & 1)  # where B is MN-major
    if m not in rows or not step <= n <= 256 or n % step:
        wanted = f"M of {' or '.join(map(str, rows))} with cta_group::{group}, N from {step} to 256 in steps of {step}"
        raise EmulatorError(f"{name}: M = {m}, N = {n}; possible: {wanted}")
    negative = bool((bits >> 13 ^ bits >> 14) & 1)
    return m, n, (factors[0], factors[1], "f32"), negative, mn_major, ScaleForm(scale, vector, ids)


# Elements.


def container(ty: str) -> Any:
    """The NumPy type of an element's container."""
    return (np.uint8, np.uint16, np.uint32)[SIZES[ty].bit_length() - 1]


def padded_bytes(place: Array, ty: str) -> tuple[Array, Array, Array]:
    """(first byte, last byte, shift) of elements in padded shared memory; `place`: their containers, 16 a chunk."""
    bits = FORMATS[ty].bits
    bit = bits * (place & 15)
    first = (place & ~15) + (bit >> 3)
    shift = bit & 7
    return first, first + (shift + bits > 8), shift


def of_padded(low: Array, high: Array, shift: Array, ty: str) -> Array:
    """Codes out of the bytes that padded_bytes names."""
    word = low.astype(np.uint16) | high.astype(np.uint16) << np.uint16(8)
    found: Array = (word >> shift.astype(np.uint16) & np.uint16((1 << FORMATS[ty].bits) - 1)).astype(np.uint8)
    return found


def of_containers(ty: str, bits: Array) -> Array:
    """Codes out of containers as they lie in tensor memory."""
    if ty not in PADDED:
        return bits
    found: Array = bits >> np.uint8(2) & np.uint8(15) if ty == "e2m1" else bits & np.uint8(63)
    return found


@lru_cache(maxsize=8)
def _table(ty: str) -> Array:
    """The value of each code of a format without infinities, or of a scale factor."""
    if ty == "ue8m0":
        found = np.ldexp(1.0, np.arange(256) - 127)
        found[255] = np.nan
        return found
    f = FORMATS["e4m3" if ty == "ue4m3" else ty]
    code = np.arange(1 << f.bits)
    field, low = code >> f.mantissa & (f.exponent_mask >> f.mantissa), code & ((1 << f.mantissa) - 1)
    found = np.ldexp(low + np.where(field > 0, 1 << f.mantissa, 0), np.maximum(field, 1) - f.bias - f.mantissa)
    found[code & (f.sign - 1) > f.largest] = np.nan
    if f.has_inf:
        found[code & (f.sign - 1) == f.inf] = np.inf
    return np.asarray(np.where(code & f.sign, -found, found))


def values(ty: str, codes: Array) -> Array:
    """[containers, rows] of a factor of 8 bits or fewer as numbers, [k, rows]."""
    if ty != PACKED:
        return np.asarray(_table(ty)[codes])
    pairs = np.stack((codes & np.uint8(15), codes >> np.uint8(4)), axis=1)
    return np.asarray(_table("e2m1")[pairs.reshape(-1, codes.shape[1])])


# Scale factors.


@dataclass(frozen=True)
class ScaleFactors:
    """The scale factors of one matrix in the tensor memory of a CTA."""

    name: str  # "A" or "B"
    column: int
    rows: int
    ty: str
    vector: int
    id: int
    parts: int = 1  # that the rows come in; each has its own of the four partitions

    @property
    def each(self) -> int:
        """Rows of a part."""
        return self.rows // self.parts

    @property
    def columns(self) -> Array:
        return np.arange(self.column, self.column - (-self.each // PARTITION))

    def cells(self) -> tuple[Array, Array]:
        """(lane of a partition, column) of each row of a part."""
        row = np.arange(self.each)
        return row % PARTITION, self.column + row // PARTITION

    def codes(self, slab: Slab) -> Array:
        """The bytes, [rows, blocks of k], which all partitions of a part must hold alike."""
        lane, column = self.cells()
        words = slab.cells.reshape(4, PARTITION, -1)[:, lane, column]
        found = np.ascontiguousarray(words, "<u4").view(np.uint8).reshape(self.parts, -1, self.each, 4)
        found = found[..., self.id : self.id + self.vector]
        other = np.argwhere((found != found[:, :1]).any(axis=(1, 3)))
        if len(other):
            part, row = (int(at) for at in other[0])
            copies = found[part, :, row]
            first = len(copies) * part
            among = "four 32-lane partitions" if self.parts == 1 else f"32-lane partitions {first} and {first + 1}"
            raise LaneFault(
                f"tcgen05.mma: the scale factors of {self.name} differ among the {among}: those of row "
                f"{part * self.each + row} are {', '.join(copy.tobytes().hex(' ') for copy in copies)}; each needs a "
                "copy of all",
                _ONE,
            )
        codes: Array = found[:, 0].reshape(self.rows, self.vector)
        if self.ty == "ue4m3" and (codes & 0x80).any():
            row = int(np.nonzero((codes & 0x80).any(axis=1))[0][0])
            raise LaneFault(
                f"tcgen05.mma: a scale factor of {self.name}, row {row}, has its upper bit set: UE4M3 has no sign", _ONE
            )
        return codes

    def take(self, slab: Slab) -> Array:
        """The factors, [blocks of k, rows]."""
        return np.asarray(_table(self.ty)[self.codes(slab)].T)


def of_pair(factors: tuple[ScaleFactors, ...], slabs: list[Slab]) -> list[Array]:
    """The factors of A and B of a pair, [blocks of k, rows]; both CTAs must hold the same of B."""
    of_a, of_b = factors
    codes = [of_b.codes(slab) for slab in slabs]
    other = np.nonzero((codes[0] != codes[1]).any(axis=1))[0]
    if len(other):
        row = int(other[0])
        raise LaneFault(
            f"tcgen05.mma: the scale factors of B differ between the CTAs of the pair: those of row {row} are "
            f"{' and '.join(each[row].tobytes().hex(' ') for each in codes)}; both need those of all columns of D",
            _ONE,
        )
    return [np.concatenate([of_a.take(slab) for slab in slabs], axis=1), of_b.take(slabs[0])]


def scale_factors(
    form: ScaleForm, rows: tuple[int, int], addresses: tuple[int, int], parts: int = 1
) -> tuple[ScaleFactors, ...]:
    """Where those of A and B lie; `rows`: of A and B in this CTA, `parts`: that those of B come in.

    Raises:
        EmulatorError: an address does not name lane 0.
    """
    found = []
    for what, n, address, id_ in zip("AB", rows, addresses, form.ids, strict=True):
        lane = address >> 16 & 0x3FFF
        if lane:
            raise EmulatorError(
                f"the address {address:#x} of the scale factors of {what} names TMEM lane {lane}; 0 is wanted"
            )
        found.append(ScaleFactors(what, address & 0xFFFF, n, form.ty, form.vector, id_, parts if what == "B" else 1))
    return tuple(found)


def claim(
    tmem: TensorMemory, slab: Slab, lane: int, factors: tuple[ScaleFactors, ...], taken: range, where: str = ""
) -> None:
    """Check scale factors as of a product's issue; `taken`: the columns of its accumulator, `where`: if elsewhere.

    Raises:
        LaneFault: they are not allocated, or not known to be there.
        EmulatorError: undefined, or in the accumulator's columns.
    """
    lanes = np.array([lane])
    for each in factors:
        what, used = f"tcgen05.mma, scale factors of {each.name}{where}", each.columns
        everywhere = slice(0, len(slab.writers))
        tmem.check_owned(slab, used, what, _ONE)
        both = [column for column in used.tolist() if column in taken]
        if both:
            raise EmulatorError(
                f"the scale factors of {each.name}{where} lie in columns {used[0]} to {used[-1]}, the accumulator in "
                f"{taken.start} to {taken.stop - 1}"
            )
        tmem.check_products(slab, everywhere, used, lanes, what, _ONE, ordered=True)
        tmem.check_accesses(slab, everywhere, used, lanes, what, ("st",), _ONE)
        first, column = each.cells()
        there = slab.defined.reshape(4, PARTITION, -1)[:, first, column]
        if not there.all():
            part, row = (int(at[0]) for at in np.nonzero(~there))
            raise EmulatorError(
                f"the scale factors of {each.name}{where} lie in undefined tensor memory: nothing has written lane "
                f"{PARTITION * part + row % PARTITION}, column {int(column[row])} (row "
                f"{part * each.parts // 4 * each.each + row})"
            )


def mark(slab: Slab, factors: tuple[ScaleFactors, ...], number: int) -> None:
    """Operation `number` reads them."""
    for each in factors:
        slab.scale_readers[:, each.columns] = number


def scaled(factor: Array, scale: Array) -> Array:
    """[k, rows] times [blocks of k, rows]."""
    with np.errstate(invalid="ignore"):
        found: Array = factor * np.repeat(scale, len(factor) // len(scale), axis=0)
    return found
