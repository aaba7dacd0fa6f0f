"""tcgen05.mma and commit: products of matrices in shared memory, asynchronous, with accumulators in tensor memory.

    D[m, n] (+)= sum_k A[m, k] B[n, k]      k of 32 bytes: 16 (f16, bf16), 8 (tf32), 32 (e4m3, e5m2)

One thread issues. Its operations run in order; each is an `Op` of the engine that reads A and B when the schedule says.
What tells of their end is tcgen05.commit: when the operations that its own thread has issued before are done, it
arrives on an mbarrier, and who knows of that phase knows of them. Commits of one thread form a chain of `Completion`s,
so that knowing a later one is knowing the earlier.

    M = 128 (layout D)   row m in TMEM lane m
    M = 64 (layout F)    row m in lane 32 (m/16) + m%16, 16 further if the address names lane 16
    A in TMEM            rows as those of D, k ascending from the low end of 8 columns
    column               that of the address + n; an f16 result is the low half of its cell

Sums: nobody has measured a B200 here. Products and sum of one instruction are taken exactly (in fp64), the accumulator
is added and the whole truncated to fp32 once, or rounded to nearest in f16. Integers below 2^24 are exact on any
hardware; otherwise compare within a bound derived from K.

Source: PTX ISA, "Instruction descriptor", "Matrix descriptor", "Data path layout organization"; how CUTLASS and
DeepGEMM fill them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import block_scale
from dsv4_rt.emulator.async_ import DONE, Op, Span
from dsv4_rt.emulator.block_scale import PADDED, SIZES, ScaleFactors, ScaleForm
from dsv4_rt.emulator.descriptors import MatrixDescriptor, decode_tcgen05
from dsv4_rt.emulator.inflight import Completion, Entry
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault
from dsv4_rt.emulator.mma import exact_dot, truncated_dot
from dsv4_rt.emulator.tiles import Operand
from dsv4_rt.emulator.tmem import STRIP
from dsv4_rt.emulator.wgmma import check_rank, reach
from dsv4_rt.errors import EmulatorError, KernelFault, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
_ONE = np.zeros(1, np.int64)  # position 0: the lane at fault
_FACTORS = {"f16": ("f16", "bf16"), "tf32": (None, None, "tf32"), "f8f6f4": block_scale.FACTORS}
_A_COLUMNS = 8  # 32 bytes of k


@dataclass(frozen=True)
class InstructionDescriptor:
    """What the 32 bits say."""

    m: int
    n: int
    types: tuple[str, str, str]  # of A, B, D
    negative: bool
    mn_major: tuple[bool, bool]
    scales: ScaleForm | None = None

    @property
    def depth(self) -> int:
        """Containers of k: elements, but for fp4 packed in bytes."""
        return 32 // SIZES[self.types[0]]


def decode_instruction(bits: int, kind: str, vector: int = 0) -> InstructionDescriptor:
    """The instruction descriptor of a product with cta_group::1; vector: scale factors a row, 0 without block scales.

    Raises:
        EmulatorError: a field that the ISA forbids.
        UnsupportedInstruction: one that is not modelled.
    """
    if vector:
        return InstructionDescriptor(*block_scale.decode(bits, kind, vector))
    name = f"instruction descriptor {bits:#010x} of kind::{kind}"
    reserved = bits & (0b1000 | 1 << 6 | 1 << 23 | 1 << 29 | 3 << 30 | 3)
    if bits & 4:
        raise UnsupportedInstruction(f"{name}: sparse matrices are not implemented by the emulator")
    if reserved:
        raise EmulatorError(f"{name}: bits {reserved:#x} must be 0 (saturation, sparsity, max shift, reserved)")
    factors = []
    for what, at in (("A", 7), ("B", 10)):
        code, known = bits >> at & 7, _FACTORS[kind]
        ty = known[code] if code < len(known) else None
        if ty is None:
            raise EmulatorError(f"{name}: format {code} of {what} does not exist")
        factors.append(ty)
    code = bits >> 4 & 3
    if code > 1 or (code == 0 and (kind == "tf32" or "bf16" in factors)):
        raise EmulatorError(f"{name}: format {code} of D does not exist for A and B of {' and '.join(factors)}")
    m, n = (bits >> 24 & 31) << 4, (bits >> 17 & 63) << 3
    step = 16 if kind == "f8f6f4" and bits >> 16 & 1 else 8
    if m not in (64, 128) or not step <= n <= 256 or n % step:
        wanted = "M of 64 or 128 with cta_group::1, N from 8 to 256 in steps of 8 (16 where B is MN-major, of 8 bits)"
        raise EmulatorError(f"{name}: M = {m}, N = {n}; possible: {wanted}")
    mn_major = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
    if kind == "tf32" and any(mn_major):
        raise UnsupportedInstruction(f"{name}: MN-major tf32 is not implemented by the emulator")
    negative = bool((bits >> 13 ^ bits >> 14) & 1)
    return InstructionDescriptor(m, n, (factors[0], factors[1], "f32" if code else "f16"), negative, mn_major)


def _rows(m: int, first: int) -> Any:
    """The TMEM lanes of the rows of A or D; `first` is the lane of its address."""
    row = np.arange(64)
    return slice(0, 128) if m == 128 else row // 16 * 32 + row % 16 + first


def _strips(m: int, first: int) -> slice:
    """The strips these lanes are."""
    return slice(0, 8) if m == 128 else slice(first // STRIP, 8, 2)


def _check_lane(what: str, m: int, address: int) -> None:
    if address >> 16 not in ((0,) if m == 128 else (0, STRIP)):
        wanted = "0" if m == 128 else f"0 or {STRIP}"
        raise EmulatorError(f"the address {address:#x} of {what} names TMEM lane {address >> 16}; {wanted} is wanted")


class TensorCores:
    """The tcgen05 operations of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.last: dict[int, Op] = {}  # of a thread
        self.open: dict[int, Completion] = {}  # of what a thread has issued since its last commit
        self.forms: dict[int, tuple[int, InstructionDescriptor, int]] = {}  # id of an op -> its accumulator
        self.places: dict[tuple[int, int, int, int, bool], tuple[Array, list[tuple[int, int]]]] = {}
        self.entries: dict[tuple[int, int, int], Entry] = {}  # the latest that reads a range, by thread
        self.empty: dict[int, int] = {}  # thread -> PTX line of a commit of it that covers nothing

    def mma(
        self, lanes: Array, line: int, kind: str, address: Array, a: Array, b: Array, form: Array, add: Array,
        from_tmem: bool, vector: int = 0, scales: tuple[Array, ...] = (),
    ) -> None:  # fmt: skip
        """tcgen05.mma of each of these threads. Arguments: one a lane, `form` the instruction descriptors.

        from_tmem: `a` are addresses of tensor memory. vector, scales: scale factors a row, addresses of A's and B's.
        """
        for i in range(len(lanes)):
            values = [int(each[i if len(each) > 1 else 0]) for each in (address, a, b, form, add, *scales)]
            try:
                self._start(int(lanes[i]), line, kind, values, from_tmem, vector)
            except (KernelFault, UnsupportedInstruction):
                raise  # of an operation, under the early schedule; of a field
            except EmulatorError as error:
                raise LaneFault(f"tcgen05.mma: {error}", np.array([i])) from None
            except LaneFault as error:
                raise LaneFault(error.what, np.array([i])) from None

    def _start(self, lane: int, line: int, kind: str, values: list[int], from_tmem: bool, vector: int) -> None:
        batch, tmem = self.batch, self.batch.tmem
        address, a, b, bits, add, *scales = values
        cta, form = int(batch.cta[lane]), decode_instruction(bits, kind, vector)
        reads: list[Span] = []
        places: list[Array] = []
        operands: list[Operand] = []
        sides = list(zip("AB", (form.m, form.n), (a, b), form.types, form.mn_major, strict=False))
        for what, rows, word, ty, major in sides[from_tmem:]:
            place, ranges = self._place(word, what, rows, form.depth, SIZES[ty], major)
            reads += [Span(cta, lo, hi) for lo, hi in ranges]
            places.append(place + (cta * batch.shared.stride - SHARED_FIRST) // SIZES[ty])
            operands.append(Operand(what, decode_tcgen05(word), rows, SIZES[ty], major, ty))
            check_rank(operands[-1], cta % batch.cluster_size)
        if from_tmem:
            self._claim_a(lane, cta, a, form)
        slab, column = tmem.slab(cta), address & 0xFFFF
        factors: tuple[ScaleFactors, ...] = ()
        if form.scales is not None:
            factors = block_scale.scale_factors(form.scales, (form.m, form.n), (scales[0], scales[1]))
            block_scale.claim(tmem, slab, lane, factors, range(column, column + form.n))
        number = self._claim(lane, cta, address, form, bool(add))
        rows_of_d, columns = _rows(form.m, address >> 16), slice(column, column + form.n)
        copies = [each for each in tmem.copying if each.lane != lane and int(batch.cta[each.lane]) == cta]

        def read() -> list[Array]:
            for each in copies:  # of other threads, issued before
                batch.engine.finish(each)
            tiles = batch.shared.tiles
            origin = cta * batch.shared.stride - SHARED_FIRST
            wrong = None if tiles is None else tiles.check(origin, form.depth, operands)
            if wrong is not None:
                place = batch.engine.place(wrong[0])
                raise LaneFault(f"tcgen05.mma: {wrong[1]}; the copy was issued at{place}", _ONE)
            taken = [self._take(place, side[3], side[0]) for place, side in zip(places, sides[from_tmem:], strict=True)]
            if from_tmem:
                cells = slab.cells[_rows(form.m, a >> 16), a & 0xFFFF : (a & 0xFFFF) + _A_COLUMNS]
                found = np.ascontiguousarray(cells).view(block_scale.container(form.types[0])).T
                taken.insert(0, block_scale.of_containers(form.types[0], found))
            return taken + [each.take(slab) for each in factors]

        def write(data: list[Array]) -> None:
            d = slab.cells[rows_of_d, columns]
            half = form.types[2] == "f16"
            total = (d & np.uint32(0xFFFF)).astype(np.uint16) if half else d
            if kind in ("f16", "tf32"):
                found = exact_dot(data[0], data[1], total if add else None, form.types, form.negative)
            else:
                left, right = (block_scale.values(form.types[i], data[i]) for i in (0, 1))
                if factors:
                    left, right = block_scale.scaled(left, data[2]), block_scale.scaled(right, data[3])
                found = truncated_dot(left, right, total if add else None, form.types[2], form.negative)
            slab.cells[rows_of_d, columns] = found | np.uint32(0x7FFF0000) if half else found

        op = Op("tcgen05.mma", line, lane, reads, [], read, write)
        entered = tmem.enter(op)
        assert number == entered
        if from_tmem:
            tmem.slab(cta).readers[_strips(form.m, a >> 16), a & 0xFFFF : (a & 0xFFFF) + _A_COLUMNS] = number
        block_scale.mark(slab, factors, number)
        self.forms[number] = address, form, lane
        self.start(op)

    def start(self, op: Op) -> None:
        """Issue an operation after those of its thread; a commit of the thread will tell of its end."""
        lane = op.lane
        before = self.last.get(lane)
        op.after = before if before is not None and before.state != DONE else None
        op.sources = op.results = self.open.setdefault(lane, Completion())
        op.sources.phases = op.sources.phases or []
        self.last[lane] = op
        self.batch.engine.issue(op)
        # A thread's operations end in order: of those that read one range only the last is of interest.
        for entry in op.entries:
            known = self.batch.engine.flight.entries[entry.lo // self.batch.shared.stride]
            key = (lane, entry.lo, entry.hi)
            old = self.entries.get(key)
            if old is not None and old in known:
                known.remove(old)
            self.entries[key] = entry

    def _claim(self, lane: int, cta: int, address: int, form: InstructionDescriptor, add: bool) -> int:
        """Check the accumulator as of the issue, and mark it; returns the operation's number."""
        tmem, first, column = self.batch.tmem, address >> 16, address & 0xFFFF
        slab, lanes = tmem.slab(cta), np.array([lane])
        _check_lane("the accumulator", form.m, address)
        strips = _strips(form.m, first)
        used = np.arange(column, column + form.n)
        tmem.check_owned(slab, used, "tcgen05.mma", _ONE)
        for number in np.unique(slab.writers[strips, column : column + form.n]).tolist():
            # The ISA orders operations of one thread on one accumulator, of one shape and kind.
            if number in tmem.copies:
                tmem.check_copy(number, lanes, "tcgen05.mma", _ONE)
            elif number:
                at, other, issuer = self.forms[number]
                alike = replace(other, negative=False, mn_major=(False, False), scales=None) == replace(
                    form, negative=False, mn_major=(False, False), scales=None
                )
                if not (alike and at == address and issuer == lane):
                    tmem.check_products(slab, strips, used, lanes, "tcgen05.mma", _ONE, ordered=True)
                    break
        tmem.check_products(slab, strips, used, lanes, "tcgen05.mma", _ONE, True)
        tmem.check_accesses(slab, strips, used, lanes, "tcgen05.mma", ("ld", "st"), _ONE)
        rows = np.arange(128).reshape(8, STRIP)[strips].reshape(-1)
        there = slab.defined[rows[:, None], used]
        if add and not there.all():
            row, at = (int(each[0]) for each in np.nonzero(~there))
            raise EmulatorError(
                f"accumulates over undefined tensor memory: nothing has written lane {int(rows[row])}, column "
                f"{int(used[at])}; the first product of a sum must not accumulate"
            )
        slab.defined[rows[:, None], used] = True
        number = len(tmem.products) + 1
        slab.writers[strips, column : column + form.n] = number
        for records in slab.records.values():
            records[strips, column : column + form.n] = 0
        return number

    def _claim_a(self, lane: int, cta: int, address: int, form: InstructionDescriptor) -> None:
        """Check matrix A in tensor memory as of the issue."""
        tmem, first = self.batch.tmem, address >> 16
        _check_lane("matrix A", form.m, address)
        if form.mn_major[0]:
            raise EmulatorError("matrix A in tensor memory is K-major; the instruction descriptor says MN-major")
        slab, strips, lanes = tmem.slab(cta), _strips(form.m, first), np.array([lane])
        used = np.arange(_A_COLUMNS) + (address & 0xFFFF)
        tmem.check_owned(slab, used, "tcgen05.mma, matrix A", _ONE)
        tmem.check_products(slab, strips, used, lanes, "tcgen05.mma, matrix A,", _ONE, ordered=True)
        tmem.check_accesses(slab, strips, used, lanes, "tcgen05.mma, matrix A", ("st",), _ONE)
        there = slab.defined[np.arange(128)[_rows(form.m, first)][:, None], used]
        if not there.all():
            column = int(used[np.nonzero(~there)[1][0]])
            raise EmulatorError(f"matrix A lies in undefined tensor memory: nothing has written column {column}")

    def _place(
        self, word: int, what: str, rows: int, depth: int, size: int, mn_major: bool
    ) -> tuple[Array, list[tuple[int, int]]]:
        """(element addresses, byte ranges) of a matrix, which must lie in shared memory."""
        key = (word, rows, depth, size, mn_major)
        if key not in self.places:
            d = decode_tcgen05(word)
            base = d.start & ~1023  # every pattern repeats after 1024 bytes
            relative = MatrixDescriptor(d.start - base, d.leading, d.stride, d.base_offset, d.swizzle)
            place, ranges = reach(relative, rows, depth, size, mn_major)
            lo, hi, end = base + ranges[0][0], base + ranges[-1][1], SHARED_FIRST + self.batch.shared.size
            if lo < SHARED_FIRST or hi > end:
                raise EmulatorError(
                    f"out of bounds: matrix {what} lies at shared offsets {lo:#x} to {hi:#x} (start {d.start:#x}, "
                    f"leading offset {d.leading:#x}, stride offset {d.stride:#x}, swizzle {d.swizzle} B); shared "
                    f"memory is {SHARED_FIRST:#x} to {end:#x}"
                )
            self.places[key] = place + base // size, [(base + first, base + last) for first, last in ranges]
        return self.places[key]

    def _take(self, place: Array, ty: str, what: str, by: str = "tcgen05.mma") -> Array:
        """The elements of a matrix, [depth, rows], which must have been written."""
        if ty in PADDED:
            low, high, shift = block_scale.padded_bytes(place, ty)
            first, last = (self._take(each, "e4m3", what) for each in (low, high))
            return block_scale.of_padded(first, last, shift, ty)
        k, shared = SIZES[ty].bit_length() - 1, self.batch.shared
        written = shared.written[k].take(place)
        missing = written != written.dtype.type((0x1, 0x101, 0x1010101)[k])
        if missing.any():
            offset = (int(place[missing].min()) << k) % shared.stride + SHARED_FIRST
            raise LaneFault(
                f"{by} reads uninitialised shared memory: matrix {what} at shared offset {offset:#x}", _ONE
            )
        found: Array = shared.views[k].take(place)
        return found

    def commit(
        self, lanes: Array, line: int, barrier: Array, generic: bool, masks: Array | None, paired: bool = False
    ) -> None:
        """tcgen05.commit of each of these threads: an arrival when what it has issued so far is done.

        masks: CTAs of the cluster whose mbarriers at the same offset all get one.
        paired: cta_group::2.
        """
        batch, what = self.batch, "tcgen05.commit"
        for i in range(len(lanes)):
            one, mine = slice(i, i + 1), lanes[i : i + 1]
            lane = int(mine[0])
            if paired:
                batch.columns.check_pair("tcgen05.commit.cta_group::2", mine, np.array([i]))
            cta, offset = batch.engine.locate(mine, barrier[one], 8, 8, generic, what)
            targets = [int(cta[0])]
            if masks is not None:
                mask, first = int(masks[i if len(masks) > 1 else 0]), targets[0] - targets[0] % batch.cluster_size
                if not mask or mask >> batch.cluster_size:
                    raise LaneFault(f"{what}: ctaMask {mask:#06x} in a cluster of {batch.cluster_size}", np.array([i]))
                targets = [first + rank for rank in range(batch.cluster_size) if mask >> rank & 1]
            at = [batch.mbarriers.position(each, int(offset[0])) for each in targets]
            for position in at:
                batch.mbarriers.find(position, lanes, one, what)
            try:
                for each in targets if batch.clusters is not None else ():
                    assert batch.clusters is not None
                    batch.clusters.touch(mine, np.array([each]), line)
            except LaneFault as error:
                raise LaneFault(error.what, np.array([i])) from None
            self._commit(lane, line, at)

    def _commit(self, lane: int, line: int, at: list[int]) -> None:
        batch = self.batch
        before = self.last.get(lane)
        if before is None or before.kind == "tcgen05.commit":
            self.empty[lane] = line
        done = self.open.setdefault(lane, Completion())
        phases = done.phases = done.phases or []
        self.open[lane] = done.later = Completion()
        row = batch.races.release(np.array([lane]))

        def signal() -> None:
            for position in at:
                batch.mbarriers.committed(position, lane, row, phases)

        def check(_: None) -> None:
            for cta in (position // batch.shared.stride for position in at):
                if batch.clusters is not None and cta in batch.clusters.left and cta != int(batch.cta[lane]):
                    rank = cta % batch.cluster_size
                    raise LaneFault(f"tcgen05.commit to an mbarrier of rank {rank}, whose CTA has exited", _ONE)

        op = Op("tcgen05.commit", line, lane, [], [], lambda: None, check, signal)
        op.after = before if before is not None and before.state != DONE else None
        self.last[lane] = op
        batch.engine.schedule(op)

    def strays(self, issuer: int) -> str:
        """What the commits of other threads than the issuer of a product have to do with it: nothing."""
        batch = self.batch
        same = batch.cta[issuer] // batch.cluster_size
        for lane, line in self.empty.items():
            if lane != issuer and batch.cta[lane] // batch.cluster_size == same:
                (cta, thread), (_, by) = batch.thread(lane), batch.thread(issuer)
                return (
                    f"; the tcgen05.commit of CTA {cta}, thread {thread}, does not cover it, since that thread has "
                    f"issued nothing: the thread that issues must commit, here thread {by}. The commit is at"
                    f"{batch.engine.place(line)}"
                )
        return ""
