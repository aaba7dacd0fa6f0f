"""wgmma: warpgroup-wide products of matrices in shared memory, asynchronous, with accumulators in registers.

An operation is one instruction of one warpgroup: an `Op` of the engine that reads its matrices (shared memory through
descriptors, or A's registers) and adds to the accumulator when the schedule says. Operations of a warpgroup run in
order. What is checked besides the shared memory (`inflight.py`):

    registers in flight     from issue until this warp's wgmma.wait_group that covers the operation. Reading or writing
                            its accumulator is an error, except by operations of the same shape that accumulate in the
                            same registers; writing its A fragments is one, reading them does no harm
    wgmma.fence             due before a warpgroup's first operation, and after every access to a register that an
                            operation uses. What compilers move past a fence does not count: copies and constants;
                            arithmetic between the fence and the operation; arithmetic that makes A fragments
    descriptors             the same in all 128 threads, no reserved bits, all within the CTA's shared memory

One warp's wait says that the operation is over for the whole warpgroup, as CUTLASS assumes when one thread of a
warpgroup frees a buffer.

Source: PTX ISA, "Asynchronous warpgroup level matrix instructions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.async_ import DONE, Op, Span
from dsv4_rt.emulator.descriptors import MatrixDescriptor, decode, element_addresses
from dsv4_rt.emulator.inflight import Entry
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault
from dsv4_rt.emulator.mma import (
    BYTES,
    NARROW,
    WIDE,
    Unit,
    dot,
    element_type,
    factor_index,
    result_index,
    team,
    untied,
)
from dsv4_rt.emulator.tiles import Operand
from dsv4_rt.errors import EmulatorError, KernelFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
TEAM = 128
ROWS = 64
_JOIN = 256  # bytes: smaller gaps count as read; one slice of k of neighbouring rows lies at most that far apart


@dataclass(frozen=True)
class Form:
    """An instruction's modifiers and immediates."""

    columns: int
    depth: int
    types: tuple[str, str, str]  # of A, B, accumulator
    negative: bool = False  # whether one factor, not both, is negated
    mn_major_a: bool = False
    mn_major_b: bool = False

    @property
    def unit(self) -> Unit:
        return NARROW if BYTES[self.types[0]] == 1 else WIDE


@lru_cache(maxsize=4096)
def reach(
    d: MatrixDescriptor, rows: int, depth: int, size: int, mn_major: bool
) -> tuple[Array, list[tuple[int, int]]]:
    """(addresses [depth, rows] in elements, ranges of bytes [lo, hi)); small gaps are joined."""
    at = element_addresses(d, rows, depth, size, mn_major)
    chunks = np.unique(at >> 4)
    breaks = np.nonzero(np.diff(chunks) >= _JOIN >> 4)[0]
    first, last = chunks[np.r_[0, breaks + 1]], chunks[np.r_[breaks, len(chunks) - 1]]
    ranges = [(int(lo) << 4, int(hi) + 1 << 4) for lo, hi in zip(first, last, strict=True)]
    return np.ascontiguousarray(at.T) // size, ranges


@dataclass(slots=True, eq=False)
class Running:
    """An operation that some warp of its warpgroup has not waited for."""

    op: Op
    number: int
    serial: int  # of its group
    registers: list[Array]
    accumulator: Array  # slots
    factor: Array
    waiting: set[int]  # warps


def check_rank(matrix: Operand, rank: int) -> None:
    """Shared addresses of a CTA in a cluster have its rank in bits 24 and up; in a descriptor those are the leading
    offset, which a swizzled K-major matrix does not use: the bug shows with other layouts only."""
    field = matrix.descriptor.leading >> 4
    if rank and not matrix.mn_major and matrix.descriptor.swizzle and field >> 4 == rank and field & 15 <= 1:
        raise EmulatorError(
            f"the descriptor of {matrix.name} holds the CTA's rank in its cluster, {rank}, in the leading offset: an "
            "address that was not masked with 0x3FFFF"
        )


class Warpgroups:
    """The wgmma operations of a batch, and the marks of the registers they use."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.flying = 0  # operations not waited for by all their warps
        self.running: dict[int, list[Running]] = {}  # by first lane of the warpgroup
        self.last: dict[int, Op] = {}
        self.places: dict[tuple[int, int, int, bool], tuple[Array, list[tuple[int, int]]]] = {}  # by descriptor
        self.entries: dict[tuple[int, int, int], Entry] = {}  # the latest that reads a range, by (first lane, range)
        warps = batch.nlanes // 32
        self.committed = np.zeros(warps, np.int64)
        self.fenced = np.zeros(warps, np.bool_)
        self.issued: list[tuple[int, Form, Array]] = []  # number - 1 -> (line, form, slots of the accumulator)
        # Accumulators in flight as matrices, by (first lane, registers, slots). Nobody may look at their registers
        # before a wait covers the last operation on them; only then are they written.
        self.sums: dict[tuple[int, int, bytes], Array] = {}
        self._kept: dict[int, tuple[list[Array], Array, Array, Array]] = {}

    def _marks(self, registers: list[Array]) -> tuple[Array, Array, Array]:
        """[slots, warps]: number of the op that accumulates, of the op that reads, line of the last access."""
        found = self._kept.get(id(registers))
        if found is None:
            shape = (len(registers), self.batch.nlanes // 32)
            found = registers, np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            self._kept[id(registers)] = found
        return found[1:]

    # What generated code says of ordinary instructions.

    def touch(self, lanes: Array, registers: list[Array], slots: tuple[int, ...], names: tuple[str, ...]) -> None:
        """An instruction reads or writes registers that some wgmma uses; called only while any is in flight."""
        if id(registers) not in self._kept or not len(lanes):
            return
        accumulating, reading, _ = self._marks(registers)
        warps = lanes >> 5
        for marks, what in ((accumulating, "accumulator"), (reading, "A fragment")):
            for slot, name in zip(slots, names, strict=True):
                numbers = marks[slot].take(warps)
                if numbers.any():
                    bad = np.nonzero(numbers)[0]
                    self._raise_in_flight(name, what, int(numbers[bad[0]]), bad)

    def _raise_in_flight(self, name: str, what: str, number: int, bad: Array) -> None:
        line, _, _ = self.issued[number - 1]
        raise LaneFault(
            f"register {name} is the {what} of an asynchronous wgmma.mma_async that no wgmma.wait_group of this thread "
            f"has covered, issued at{self.batch.engine.place(line)}",
            bad,
        )

    def mark(self, lanes: Array, registers: list[Array], slots: Array, lines: Array) -> None:
        """Registers that some wgmma uses have been accessed."""
        self._marks(registers)[2][slots[:, None], np.unique(lanes >> 5)] = lines[:, None]

    # wgmma.fence, commit_group, wait_group: whole warps.

    def fence(self, lanes: Array) -> None:
        warps = lanes[::32] >> 5
        self.fenced[warps] = True
        for _, _, _, touched in self._kept.values():
            touched[:, warps] = 0

    def commit(self, lanes: Array) -> None:
        self.committed[lanes[::32] >> 5] += 1

    def wait(self, lanes: Array, n: int) -> None:
        """All but the last n groups of each warp are complete."""
        if not self.flying:
            return
        heads = lanes[::32]
        owners = self._owner(heads)
        for owner in np.unique(owners).tolist():
            mine = heads[owners == owner]
            due = [r for r in self.running.get(owner, ()) if r.serial < self.committed[mine[0] >> 5] - n]
            if not due:
                continue
            self.batch.engine.wait([r.op for r in due], mine)
            warps = mine >> 5
            for each in due:
                accumulating, reading, _ = self._marks(each.registers)
                if len(each.factor):
                    part = reading[each.factor[:, None], warps]
                    reading[each.factor[:, None], warps] = np.where(part == each.number, 0, part)
                # Operations in flight share all of an accumulator or nothing.
                if accumulating[each.accumulator[0], warps[0]] == each.number:
                    accumulating[each.accumulator[:, None], warps] = 0
                    self._settle(owner, each.registers, each.accumulator)
                each.waiting.difference_update(warps.tolist())
                if not each.waiting:
                    self.running[owner].remove(each)
                    self.flying -= 1

    def _owner(self, lanes: Array) -> Array:
        """The first lane of each lane's warpgroup."""
        tid = self.batch.tid[lanes]
        found: Array = lanes - tid % TEAM
        return found

    def complete(self, lanes: Array) -> Array:
        """Which of the lanes have their whole warpgroup beside them."""
        owners = self._owner(lanes)
        found: Array = np.bincount(owners, minlength=self.batch.nlanes)[owners] == TEAM
        return found

    # wgmma.mma_async: whole warpgroups.

    def issue(
        self,
        lanes: Array,
        registers: list[Array],
        line: int,
        form: Form,
        names: tuple[str, ...],
        accumulator: Array,
        factor: Array,
        a: Array | None,
        b: Array,
        accumulate: Array,
    ) -> None:
        """Start the operations of the warpgroups among the lanes.

        Args:
            names: of the accumulator's registers, then of A's.
            accumulator, factor: slots of these registers; no factor if A lies in shared memory.
            a, b: descriptors, one a lane; a is None if A lies in registers.
            accumulate: scale-d, one a lane.
        """
        for start in range(0, len(lanes), TEAM):
            part = slice(start, start + TEAM)
            bits = []
            for what, values in (("A", a), ("B", b), ("scale-d", accumulate)):
                if values is None:
                    continue
                mine = values[part]
                other = np.nonzero(mine != mine[0])[0]
                if len(other):
                    kind = what if what == "scale-d" else f"the descriptor of {what}"
                    raise LaneFault(
                        f"wgmma: {kind} must be the same in all threads of the warpgroup: {int(mine[0]):#x} in the "
                        f"first, {int(mine[other[0]]):#x} here",
                        start + other,
                    )
                bits.append(int(mine[0]))
            try:
                self._start(lanes[part], registers, line, form, names, accumulator, factor, bits)
            except KernelFault:
                raise  # of the operation itself, under the early schedule
            except EmulatorError as error:
                raise LaneFault(f"wgmma: {error}", np.arange(start, start + TEAM)) from None
            except LaneFault as error:
                raise LaneFault(error.what, start + error.bad) from None

    def _start(
        self, lanes: Array, registers: list[Array], line: int, form: Form, names: tuple[str, ...],
        accumulator: Array, factor: Array, bits: list[int],
    ) -> None:  # fmt: skip
        batch, first = self.batch, int(lanes[0])
        warps = lanes[::32] >> 5
        four = slice(int(warps[0]), int(warps[0]) + TEAM // 32)
        self._check_registers(four, registers, form, names, accumulator, factor)
        cta = int(batch.cta[first])
        self.issued.append((line, form, accumulator))
        number = len(self.issued)
        reads: list[Span] = []
        operands: list[Operand] = []
        places: list[Array | None] = [None] if len(factor) else []
        sides = [("A", ROWS, form.types[0], form.mn_major_a), ("B", form.columns, form.types[1], form.mn_major_b)]
        for (what, rows, ty, mn_major), word in zip(sides[len(places) :], bits, strict=False):
            place, ranges = self._place(word, what, rows, form.depth, BYTES[ty], mn_major)
            reads += [Span(cta, lo, hi) for lo, hi in ranges]
            places.append(place + (cta * batch.shared.stride - SHARED_FIRST) // BYTES[ty])
            operands.append(Operand(what, decode(word), rows, BYTES[ty], mn_major))
            check_rank(operands[-1], cta % batch.cluster_size)
        scale = bool(bits[-1])

        def read() -> list[Array]:
            self._check_tiles(cta, form.depth, operands)
            if places[0] is None:
                regs = [registers[slot][lanes] for slot in factor]
                index = factor_index(ROWS, form.depth, BYTES[form.types[0]], TEAM)
                left = team(regs, form.types[0], TEAM)[0][index]
            else:
                left = self._take(places[0], form.types[0], "A")
            assert places[1] is not None
            return [left, self._take(places[1], form.types[1], "B")]

        def write(data: list[Array]) -> None:
            self._add(lanes, registers, accumulator, form, data[0], data[1], scale)

        before = self.last.get(first)
        after = before if before is not None and before.state != DONE else None
        op = Op("wgmma", line, first, reads, [], read, write, after=after, parties=tuple(lanes[::32].tolist()))
        for marks, slots in zip(self._marks(registers), (accumulator, factor), strict=False):
            marks[slots, four] = number
        serial = int(self.committed[warps[0]])
        running = Running(op, number, serial, registers, accumulator, factor, set(warps.tolist()))
        self.running.setdefault(first, []).append(running)
        self.flying += 1
        self.last[first] = op
        batch.engine.issue(op)
        if op.sources is not None:
            op.sources.parties = ()
        # A warpgroup's operations end in order: of those that read one range only the last is of interest.
        known = batch.engine.flight.entries[cta]
        for entry in op.entries:
            key = (first, entry.lo, entry.hi)
            old = self.entries.get(key)
            if old is not None and old in known:
                known.remove(old)
            self.entries[key] = entry

    def _check_registers(
        self, warps: slice, registers: list[Array], form: Form, names: tuple[str, ...],
        accumulator: Array, factor: Array,
    ) -> None:  # fmt: skip
        everyone = np.arange(TEAM)
        accumulating, reading, touched = self._marks(registers)
        if not self.fenced[warps].all():
            raise LaneFault("wgmma.mma_async without a wgmma.fence before the warpgroup's first one", everyone)
        slots = np.concatenate([accumulator, factor])
        late = touched[slots, warps]
        if late.any():
            late = late.max(axis=1)
            at = int(np.argmax(late > 0))
            raise LaneFault(
                f"missing wgmma.fence: register {names[at]} was accessed since the last one, at"
                f"{self.batch.engine.place(int(late[at]))}",
                everyone,
            )
        numbers = accumulating[accumulator, warps].max(axis=1)
        for number in set(numbers[numbers > 0].tolist()):
            _, other, slots = self.issued[number - 1]
            alike = (other.columns, other.depth, other.types[2]) == (form.columns, form.depth, form.types[2])
            if not alike or not np.array_equal(slots, accumulator):
                at = int(np.argmax(numbers == number))
                self._raise_in_flight(names[at], "accumulator", number, everyone)
        for marks, mine, what, shift in (
            (accumulating, factor, "accumulator", len(accumulator)), (reading, accumulator, "A fragment", 0)
        ):  # fmt: skip
            numbers = marks[mine, warps].max(axis=1)
            if numbers.any():
                at = int(np.argmax(numbers > 0))
                self._raise_in_flight(names[shift + at], what, int(numbers[at]), everyone)

    def _place(
        self, word: int, what: str, rows: int, depth: int, size: int, mn_major: bool
    ) -> tuple[Array, list[tuple[int, int]]]:
        """(element addresses, byte ranges) of a matrix, which must lie in shared memory."""
        key = (word, rows, size, mn_major)
        if key not in self.places:
            self.places[key] = self._find(word, what, rows, depth, size, mn_major)
        return self.places[key]

    def _find(
        self, word: int, what: str, rows: int, depth: int, size: int, mn_major: bool
    ) -> tuple[Array, list[tuple[int, int]]]:
        d = decode(word)
        # The pattern repeats every 1024 bytes of address.
        base = d.start & ~1023
        place, ranges = reach(
            MatrixDescriptor(d.start - base, d.leading, d.stride, d.base_offset, d.swizzle), rows, depth, size, mn_major
        )
        lo, hi = base + ranges[0][0], base + ranges[-1][1]
        end = SHARED_FIRST + self.batch.shared.size
        if lo < SHARED_FIRST or hi > end:
            raise EmulatorError(
                f"out of bounds: matrix {what} lies at shared offsets {lo:#x} to {hi:#x} (start {d.start:#x}, leading "
                f"offset {d.leading:#x}, stride offset {d.stride:#x}, swizzle {d.swizzle} B); shared memory is "
                f"{SHARED_FIRST:#x} to {end:#x}"
            )
        return place + base // size, [(base + first, base + last) for first, last in ranges]

    def _check_tiles(self, cta: int, depth: int, operands: list[Operand]) -> None:
        tiles = self.batch.shared.tiles
        if tiles is None:
            return
        wrong = tiles.check(cta * self.batch.shared.stride - SHARED_FIRST, depth, operands)
        if wrong is not None:
            line, what = wrong
            raise LaneFault(f"wgmma: {what}; the copy was issued at{self.batch.engine.place(line)}", np.zeros(1, int))

    def _take(self, place: Array, ty: str, what: str) -> Array:
        """The elements of a matrix, [depth, rows], which must have been written."""
        k = BYTES[ty].bit_length() - 1
        shared = self.batch.shared
        written = shared.written[k].take(place)
        whole = written.dtype.type((0x1, 0x101, 0x1010101)[k])
        if not (written == whole).all():
            at = int(place[written != whole].min()) << k
            offset = at % shared.stride + SHARED_FIRST
            raise LaneFault(
                f"wgmma reads uninitialised shared memory: matrix {what} at shared offset {offset:#x}", np.zeros(1, int)
            )
        found: Array = shared.views[k].take(place)
        return found

    def _add(
        self, lanes: Array, registers: list[Array], slots: Array, form: Form, left: Array, right: Array, scale: bool
    ) -> None:
        """accumulator = (accumulator if scale) + left right."""
        ty, key = form.types[2], (int(lanes[0]), id(registers), slots.tobytes())
        total = self.sums.get(key)
        if not scale:
            total = np.zeros((ROWS, form.columns, 1), element_type(ty))
        elif total is None:
            flat = np.empty(ROWS * form.columns, element_type(ty))
            index = result_index(ROWS, form.columns, TEAM)
            flat[index.reshape(-1)] = team([registers[slot][lanes] for slot in slots], ty, TEAM)[0]
            total = flat.reshape(ROWS, form.columns, 1)
        self.sums[key] = dot(left[:, :, None], right[:, :, None], total, form.types, form.unit, form.negative)

    def _settle(self, first: int, registers: list[Array], slots: Array) -> None:
        """Write a sum to its registers."""
        total = self.sums.pop((first, id(registers), slots.tobytes()), None)
        if total is None:
            return
        index = result_index(ROWS, total.shape[1], TEAM)
        for slot, values in zip(slots, untied(total.reshape(1, -1)[:, index], TEAM, np.uint32), strict=True):
            registers[slot][first : first + TEAM] = values
