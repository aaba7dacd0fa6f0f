"""tcgen05.mma beyond one whole product of one CTA: of a pair of CTAs, weight-stationary, masked, with D scaled.

Block scales, which only pairs have here, lie as `block_scale.py` has them.

    D[m, n] = sum_k A[m, k] B[n, k] + 2^-s D[m, n]

A product is made of parts. Each is some TMEM lanes of one CTA that hold some rows and columns of D, from the column of
the address on; a lane's row of A is that of its rows of D, also where A itself lies in tensor memory, so that there A
has to stand in the lanes of every part that needs it:

    M = 256, cta_group::2 (layout A)   rank c: rows 128 c.., all n, in all lanes
    M = 128, cta_group::2 (layout B)   rank c: rows 64 c.., n < N/2 in lanes 0-63, the other n in lanes 64-127
    M = 128 (layout D)                 all rows and n
    M = 64 (layout F)                  row m in lane 32 (m/16) + m%16, 16 further if the address names lane 16
    M = 64, .ws (layout E)             n < N/2 in lanes 0-63, the other n in lanes 64-127
    M = 32, .ws (layout G)             the quarters of n in lanes 0-31, 32-63, 64-95, 96-127

With cta_group::2 one thread of the even CTA issues; rows of A and columns of B come half from the shared memory of each
CTA, at the same offsets. The mask has a bit for each lane whose D is not to change, lane 0 first, the even CTA first.
Sums are those of `tcgen05.py`. What a .ws product keeps in its collector changes no result.

Source: PTX ISA, "Data path layout organization", "tcgen05.mma", "tcgen05.mma.ws"; CUTLASS's fragments of tensor memory
for layouts B, E and G, whose pictures the ISA's text leaves out. That the mask's second half is the odd CTA's is read
from its size alone.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import block_scale
from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.block_scale import SIZES, ScaleFactors
from dsv4_rt.emulator.descriptors import decode_tcgen05
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault
from dsv4_rt.emulator.mma import exact_dot, truncated_dot
from dsv4_rt.emulator.tcgen05 import InstructionDescriptor, decode_instruction
from dsv4_rt.emulator.tiles import Operand
from dsv4_rt.emulator.tmem import LANES, STRIP, Slab
from dsv4_rt.emulator.wgmma import check_rank
from dsv4_rt.errors import EmulatorError, KernelFault, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
_ONE = np.zeros(1, np.int64)  # position 0: the lane at fault
_A_COLUMNS = 8  # 32 bytes of k


@dataclass(frozen=True)
class Form(InstructionDescriptor):
    """An instruction descriptor with the modifiers that decide where D lies."""

    group: int = 1
    ws: bool = False


def decode(bits: int, kind: str, group: int, ws: bool, vector: int = 0) -> Form:
    """The instruction descriptor of a product of these modifiers: all fields but M and N are as without them.

    vector: scale factors a row, 0 without block scales.
    """
    if vector:
        return Form(*block_scale.decode(bits, kind, vector, group), group, ws)
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    if ws:
        fits, wanted = m in (32, 64, 128) and n in (64, 128, 256), "M of 32, 64 or 128 with .ws, N of 64, 128 or 256"
    elif group == 2:
        fits = m in (128, 256) and 16 <= n <= 256 and not n % 16
        wanted = "M of 128 or 256 with cta_group::2, N from 16 to 256 in steps of 16"
    else:
        fits, wanted = True, ""
    name = f"instruction descriptor {bits:#010x}"
    if not fits:
        raise EmulatorError(f"{name} of kind::{kind}: M = {m}, N = {n}; possible: {wanted}")
    plain = bits if group == 1 and not ws else bits & ~(31 << 24 | 63 << 17) | 8 << 24 | 2 << 17
    try:
        found = decode_instruction(plain, kind)
    except EmulatorError as error:
        raise type(error)(str(error).replace(f"instruction descriptor {plain:#010x}", name)) from None
    known = {each.name: getattr(found, each.name) for each in fields(found)}
    return Form(**known | {"m": m, "n": n, "group": group, "ws": ws})


def _shape(form: InstructionDescriptor) -> tuple[Any, ...]:
    """What two products on one accumulator must have in common to follow one another without a wait."""
    modifiers = (form.group, form.ws) if isinstance(form, Form) else (1, False)
    return form.m, form.n, form.types, modifiers


def _plain(form: Form) -> InstructionDescriptor:
    """What `tcgen05.py` knows a product by that differs from its own in nothing but masks and scales."""
    return InstructionDescriptor(**{each.name: getattr(form, each.name) for each in fields(InstructionDescriptor)})


@dataclass(frozen=True)
class Part:
    """TMEM lanes of a CTA of the batch and the rows and columns of D they hold."""

    cta: int
    lanes: Array
    m: slice
    n: slice

    @property
    def width(self) -> int:
        return int(self.n.stop - self.n.start)


def parts(form: Form, cta: int, first: int) -> list[Part]:
    """Where D lies; `first` is the lane that its address names."""
    m, n, row = form.m, form.n, np.arange(LANES)
    if form.group == 2 and m == 256:
        return [Part(cta + c, row, slice(128 * c, 128 * c + 128), slice(0, n)) for c in (0, 1)]
    if form.group == 2:
        halves = [(c, h) for c in (0, 1) for h in (0, 1)]
        return [
            Part(cta + c, row[64 * h : 64 * h + 64], slice(64 * c, 64 * c + 64), slice(n // 2 * h, n // 2 * (h + 1)))
            for c, h in halves
        ]
    if form.ws:
        across = LANES // m
        wide = n // across
        return [
            Part(cta, row[m * i : m * (i + 1)], slice(0, m), slice(wide * i, wide * (i + 1))) for i in range(across)
        ]
    lanes = row if m == LANES else row[:64] // 16 * 32 + row[:64] % 16 + first
    return [Part(cta, lanes, slice(0, m), slice(0, n))]


def mma(
    batch: Batch, lanes: Array, line: int, kind: str, group: int, ws: bool, scale: int, values: tuple[Array, ...],
    masks: tuple[Array, ...], from_tmem: bool, vector: int = 0,
) -> None:  # fmt: skip
    """tcgen05.mma of each of these threads.

    Args:
        values: one a lane: addresses of D, A (a descriptor, or with `from_tmem` an address of tensor memory),
            descriptors of B, instruction descriptors, whether to accumulate; of block scales, A's and B's addresses.
        masks: 32 bits each of the lanes that are not to change; none if all are.
        scale: D is divided by 2^scale before it is added to.
        vector: scale factors a row, 0 without block scales.
    """
    for i in range(len(lanes)):
        mine = [int(each[i if len(each) > 1 else 0]) for each in values]
        bits = [int(each[i if len(each) > 1 else 0]) for each in masks]
        try:
            _start(batch, int(lanes[i]), line, kind, group, ws, scale, mine, bits, from_tmem, vector)
        except (KernelFault, UnsupportedInstruction):
            raise
        except EmulatorError as error:
            raise LaneFault(f"tcgen05.mma: {error}", np.array([i])) from None
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def scaled_mma(
    batch: Batch, lanes: Array, line: int, kind: str, address: Array, a: Array, b: Array, form: Array, add: Array,
    from_tmem: bool, vector: int, scales: tuple[Array, ...],
) -> None:  # fmt: skip
    """tcgen05.mma.cta_group::2 with block scales; the arguments are those of `TensorCores.mma`."""
    mma(batch, lanes, line, kind, 2, False, 0, (address, a, b, form, add, *scales), (), from_tmem, vector)


def _start(
    batch: Batch, lane: int, line: int, kind: str, group: int, ws: bool, scale: int, values: list[int],
    mask: list[int], from_tmem: bool, vector: int,
) -> None:  # fmt: skip
    address, a, b, bits, add, *scales = values
    cores, tmem, cta = batch.tensor_cores, batch.tmem, int(batch.cta[lane])
    if group == 2:
        batch.columns.check_leader("tcgen05.mma.cta_group::2", np.array([lane]), _ONE)
    form = decode(bits, kind, group, ws, vector)
    if scale and form.types[2] != "f32":
        what = "scale-input-d of f16 accumulators is not implemented by the emulator"
        raise UnsupportedInstruction(f"tcgen05.mma: {what}")
    ctas = range(cta, cta + group)
    sides = list(zip("AB", (form.m, form.n), (a, b), form.types, form.mn_major, strict=False))[from_tmem:]
    reads: list[Span] = []
    places: list[tuple[Array, str, str]] = []  # of A of each CTA, then of B
    operands: list[Operand] = []
    for what, rows, word, ty, major in sides:
        rows //= group
        place, ranges = cores._place(word, what, rows, form.depth, SIZES[ty], major)
        operands.append(Operand(what, decode_tcgen05(word), rows, SIZES[ty], major, ty))
        check_rank(operands[-1], cta % batch.cluster_size)
        for each in ctas:
            reads += [Span(each, lo, hi) for lo, hi in ranges]
            places.append((place + (each * batch.shared.stride - SHARED_FIRST) // SIZES[ty], ty, what))
    mine = parts(form, cta, address >> 16)
    off = np.unpackbits(np.array(mask, "<u4").view(np.uint8), bitorder="little").astype(np.bool_)
    number = len(tmem.products) + 1
    held_a = parts(form, cta, a >> 16) if from_tmem else []
    if from_tmem:
        _claim_a(batch, lane, a, form, held_a, number)
    on = [~off[(p.cta - cta) * LANES + p.lanes] if mask else np.ones(len(p.lanes), np.bool_) for p in mine]
    factors: tuple[ScaleFactors, ...] = ()
    slabs = [tmem.slab(each) for each in ctas]
    if form.scales is not None:
        shape, halves = (form.m // group, form.n), form.n // mine[0].width
        factors = block_scale.scale_factors(form.scales, shape, (scales[0], scales[1]), halves)
        taken = range(address & 0xFFFF, (address & 0xFFFF) + mine[0].width)
        for where, slab in zip(("", ", in the other CTA of the pair,"), slabs, strict=True):
            block_scale.claim(tmem, slab, lane, factors, taken, where)
    _claim(batch, lane, address, form, bool(add), mine, on, number)
    for slab in slabs:
        block_scale.mark(slab, factors, number)
    column, column_of_a = address & 0xFFFF, a & 0xFFFF
    copies = [each for each in tmem.copying if each.lane != lane and int(batch.cta[each.lane]) in ctas]

    def values_of(side: int, codes: Array) -> Array:
        return codes if kind in ("f16", "tf32") else block_scale.values(form.types[side], codes)

    def read() -> list[list[Array]]:
        for each in copies:  # of other threads, issued before
            batch.engine.finish(each)
        tiles = batch.shared.tiles
        for at in ctas if tiles is not None else ():
            assert tiles is not None
            wrong = tiles.check(at * batch.shared.stride - SHARED_FIRST, form.depth, operands)
            if wrong is not None:
                place = batch.engine.place(wrong[0])
                raise LaneFault(f"tcgen05.mma: {wrong[1]}; the copy was issued at{place}", _ONE)
        taken = [cores._take(place, ty, what) for place, ty, what in places]
        right = values_of(1, np.concatenate(taken[-group:], axis=1))
        lefts = []
        if from_tmem:
            for part, held in zip(mine, held_a, strict=True):
                cells = tmem.slab(part.cta).cells[held.lanes, column_of_a : column_of_a + _A_COLUMNS]
                codes = np.ascontiguousarray(cells).view(block_scale.container(form.types[0])).T
                lefts.append(values_of(0, block_scale.of_containers(form.types[0], codes)))
        else:
            left = values_of(0, np.concatenate(taken[:group], axis=1))
            lefts = [left[:, part.m] for part in mine]
        if factors:
            of_a, of_b = block_scale.of_pair(factors, slabs)
            right = block_scale.scaled(right, of_b)
            lefts = [block_scale.scaled(left, of_a[:, part.m]) for left, part in zip(lefts, mine, strict=True)]
        return [[left, right[:, part.n]] for left, part in zip(lefts, mine, strict=True)]

    def write(data: list[list[Array]]) -> None:
        half = form.types[2] == "f16"
        for part, changed, (left, right) in zip(mine, on, data, strict=True):
            at = np.ix_(part.lanes[changed], np.arange(column, column + part.width))
            cells = tmem.slab(part.cta).cells
            total = (cells[at] & np.uint32(0xFFFF)).astype(np.uint16) if half else cells[at]
            if scale:
                total = (total.view(np.float32) * np.float32(2.0**-scale)).view(np.uint32)
            start = total if add else None
            if kind in ("f16", "tf32"):
                found = exact_dot(left[:, changed], right, start, form.types, form.negative)
            else:
                found = truncated_dot(left[:, changed], right, start, form.types[2], form.negative)
            cells[at] = found | np.uint32(0x7FFF0000) if half else found

    cores.forms[number] = address, form if group == 2 or ws else _plain(form), lane
    op = Op("tcgen05.mma", line, lane, reads, [], read, write)
    entered = tmem.enter(op)
    assert number == entered
    cores.start(op)


def _strips(lanes: Array) -> Array:
    return np.unique(lanes // STRIP)


def _runs(strips: Array) -> list[slice]:
    """Strips as slices."""
    breaks = np.nonzero(np.diff(strips) != 1)[0] + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(strips, breaks) if len(run)]


def _check_lane(what: str, address: int, form: Form) -> None:
    halved = form.m == 64 and not form.ws
    if address >> 16 not in ((0, STRIP) if halved else (0,)):
        wanted = f"0 or {STRIP}" if halved else "0"
        raise EmulatorError(f"the address {address:#x} of {what} names TMEM lane {address >> 16}; {wanted} is wanted")


def _claim(
    batch: Batch, lane: int, address: int, form: Form, add: bool, mine: list[Part], on: list[Array], number: int
) -> None:
    """Check the accumulator as of the issue, and mark it."""
    tmem, column, lanes = batch.tmem, address & 0xFFFF, np.array([lane])
    _check_lane("the accumulator", address, form)
    for part, changed in zip(mine, on, strict=True):
        slab, used = tmem.slab(part.cta), np.arange(column, column + part.width)
        what = "tcgen05.mma" if part.cta == int(batch.cta[lane]) else "tcgen05.mma, in the other CTA of the pair,"
        tmem.check_owned(slab, used, what, _ONE)
        for strips in _runs(_strips(part.lanes[changed])):
            _check_strips(batch, slab, strips, used, lanes, what, address, form)
        there = slab.defined[np.ix_(part.lanes[changed], used)]
        if add and not there.all():
            row, at = (int(each[0]) for each in np.nonzero(~there))
            raise EmulatorError(
                f"accumulates over undefined tensor memory: nothing has written lane {int(part.lanes[changed][row])}, "
                f"column {int(used[at])} of CTA {batch.cta_name(part.cta)}; the first product of a sum must not "
                "accumulate"
            )
    for part, changed in zip(mine, on, strict=True):
        slab, used = tmem.slab(part.cta), np.arange(column, column + part.width)
        slab.defined[np.ix_(part.lanes[changed], used)] = True
        for strips in _runs(_strips(part.lanes[changed])):
            slab.writers[strips, column : column + part.width] = number
            for records in slab.records.values():
                records[strips, column : column + part.width] = 0


def _check_strips(
    batch: Batch, slab: Slab, strips: slice, used: Array, lanes: Array, what: str, address: int, form: Form
) -> None:
    """What else works on these cells must be known to be over; products alike of one thread follow one another."""
    tmem, forms = batch.tmem, batch.tensor_cores.forms
    for number in np.unique(slab.writers[strips][:, used]).tolist():
        if number in tmem.copies:
            tmem.check_copy(number, lanes, what, _ONE)
        elif number:
            at, other, issuer = forms[number]
            if not (_shape(other) == _shape(form) and at == address and issuer == int(lanes[0])):
                tmem.check_products(slab, strips, used, lanes, what, _ONE, ordered=True)
                break
    tmem.check_products(slab, strips, used, lanes, what, _ONE, True)
    tmem.check_accesses(slab, strips, used, lanes, what, ("ld", "st"), _ONE)


def _claim_a(batch: Batch, lane: int, address: int, form: Form, held: list[Part], number: int) -> None:
    """Check matrix A in tensor memory as of the issue, and mark it."""
    tmem, lanes, what = batch.tmem, np.array([lane]), "tcgen05.mma, matrix A"
    _check_lane("matrix A", address, form)
    if form.mn_major[0]:
        raise EmulatorError("matrix A in tensor memory is K-major; the instruction descriptor says MN-major")
    used = np.arange(_A_COLUMNS) + (address & 0xFFFF)
    for part in held:
        slab = tmem.slab(part.cta)
        tmem.check_owned(slab, used, what, _ONE)
        for strips in _runs(_strips(part.lanes)):
            tmem.check_products(slab, strips, used, lanes, f"{what},", _ONE, ordered=True)
            tmem.check_accesses(slab, strips, used, lanes, what, ("st",), _ONE)
            slab.readers[strips, used[0] : used[-1] + 1] = number
        there = slab.defined[np.ix_(part.lanes, used)]
        if not there.all():
            column = int(used[np.nonzero(~there)[1][0]])
            raise EmulatorError(
                f"matrix A lies in undefined tensor memory: nothing has written column {column} in some of the lanes "
                f"{int(part.lanes[0])} to {int(part.lanes[-1])} of CTA {batch.cta_name(part.cta)}"
            )
