"""Tensor memory (TMEM): 128 lanes x 512 columns of 32 bits for each CTA, its allocation, tcgen05.ld and st.

An address is lane << 16 | column. Columns are handed out (`allocation.py`) from the top, so that the
base is 0 only when it must be, and hold NaN and the mark "undefined" until something writes them.

    32x32b      lane l, register r of warp w:  TMEM lane 32 (w%4) + l, column r
    16x64b      row l/4 + 8 (l%2), column l/2%2 + 2 r              (16 lanes: the address says which half of the 32)
    16x128b     row l/4 + 8 (r%2), column l%4 + 4 (r/2)
    16x256b     row l/4 + 8 (r/2%2), column r%2 + 2 (l%4) + 8 (r/4)
    16x32bx2    row l%16, column r, for l >= 16 further on by the immediate

With pack::16b and unpack::16b column c stands for the low halves of the columns 2 c, the low half of a register, and
2 c + 1, the high one; the immediate counts columns of tensor memory. The upper halves that st writes are NaN's.

ld and st move their data at once; what makes them asynchronous is checked instead: until the warp's wait::ld or
wait::st nobody may reuse what they touch, and the reuse must be ordered after that wait. Operations of the tensor core
(`tcgen05.py`) are known by number; who touches what one writes must know of its commit's phase. Knowledge is kept for
strips of 16 lanes, column by column.

Source: PTX ISA, "Tensor Memory"; the tables of TVM's documentation of tcgen05.ld. No B200 has judged it.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.async_ import DONE, Op
from dsv4_rt.emulator.memory import LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
I64, U32 = np.int64, np.uint32
LANES, COLUMNS, STRIP = 128, 512, 16
POISON = 0x7FFFFFFF  # NaN
GRANULE = 32  # columns
_SHIFT = 31  # a record is tick << 31 | lane
_LANE = (1 << 30) - 1
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}  # a repetition


@lru_cache(maxsize=256)
def pattern(shape: str, count: int, split: int, packed: bool = False) -> tuple[Array, Array]:
    """(TMEM lanes, columns) relative to the address, [registers, 32]; with `packed` a register is two columns."""
    if packed and shape == "16x32bx2":
        rows, columns = pattern(shape, count, 0)
        return rows, 2 * columns + split * (np.arange(32) // 16)
    if packed:
        rows, columns = pattern(shape, count, split)
        return rows, 2 * columns
    lane, r = np.arange(32)[None, :], np.arange(count)[:, None]
    zero = np.zeros((count, 32), I64)
    if shape == "32x32b":
        return lane + zero, r + zero
    if shape == "16x64b":
        return lane // 4 + 8 * (lane % 2) + zero, lane // 2 % 2 + 2 * r
    if shape == "16x128b":
        return lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)
    if shape == "16x256b":
        return lane // 4 + 8 * (r // 2 % 2), r % 2 + 2 * (lane % 4) + 8 * (r // 4)
    return lane % 16 + zero, r + split * (lane // 16)


class Slab:
    """The tensor memory of one CTA; `taken` are the columns that it and others of its SM have allocated."""

    def __init__(self, taken: Array) -> None:
        self.taken = taken
        self.cells = np.full((LANES, COLUMNS), POISON, U32)
        self.defined = np.zeros((LANES, COLUMNS), np.bool_)
        self.live: dict[int, tuple[int, int]] = {}  # base -> (columns, PTX line)
        self.owned = np.zeros(COLUMNS, np.bool_)
        self.freed: dict[int, int] = {}  # base -> PTX line
        self.relinquished = 0  # PTX line
        strips = LANES // STRIP, COLUMNS
        self.writers = np.zeros(strips, np.int32)  # number of the last operation that writes there
        self.readers = np.zeros(strips, np.int32)  # of the last that takes A from there
        self.scale_readers = np.zeros(strips, np.int32)  # of the last that takes scale factors
        self.records = {"ld": np.zeros(strips, I64), "st": np.zeros(strips, I64)}  # the last of each


class TensorMemory:
    """The tensor memory of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.slabs: dict[int, Slab] = {}
        self.taken: dict[int, Array] = {}  # SM -> which of its columns are allocated
        self.products: list[Op] = []  # number - 1 -> operation
        self.copies: dict[int, tuple[int, int]] = {}  # number of a tcgen05.cp -> tick of its issue, lane
        self.copying: list[Op] = []  # copies that have not completed
        self.waits: dict[str, dict[int, list[int]]] = {"ld": {}, "st": {}}  # warp -> ticks of its wait::ld, wait::st
        # With the check on request: ticks of each thread's last fence::before_thread_sync and ::after_thread_sync, and
        # at which an operation completed.
        self.fences = {kind: np.zeros(batch.nlanes, I64) for kind in ("before", "after")}
        self.finished: dict[int, int] = {}

    def enter(self, op: Op) -> int:
        """Give an operation of the tensor core its number."""
        self.products.append(op)
        number = len(self.products)
        if self.batch.machine.check_tensor_fences:
            write = op.write

            def finish(data: Any) -> None:
                write(data)
                self.finished[number] = self.batch.races.clock.tick()

            op.write = finish
        return number

    def fence(self, lanes: Array, kind: str) -> None:
        """tcgen05.fence::before_thread_sync or ::after_thread_sync."""
        self.fences[kind][lanes] = self.batch.races.clock.tick()

    def _check_fences(self, what: str, lanes: Array, since: int, of: str, releaser: int, bad: Array) -> None:
        """A thread that knows of the end of another's work at a tick has fenced since; so has the warp of a ld, st.

        Not asked of dealloc, which touches no cells: kernels in use give back behind a plain barrier.
        """
        if not self.batch.machine.check_tensor_fences or what == "tcgen05.dealloc":
            return
        if releaser >= 0 and self.fences["before"][releaser >> 5 << 5 : (releaser >> 5 << 5) + 32].max() <= since:
            raise LaneFault(
                f"missing tcgen05.fence::before_thread_sync: {what} after {of}, and its warp has not fenced since", bad
            )
        if (self.fences["after"][lanes] <= since).any():
            raise LaneFault(
                f"missing tcgen05.fence::after_thread_sync: {what} after {of}; this thread has not fenced since then",
                bad,
            )

    def enter_copy(self, op: Op) -> int:
        """The same of a tcgen05.cp, issued now."""
        number = self.enter(op)
        self.copies[number] = self.batch.races.clock.tick(op.line), op.lane
        self.batch.races.fresh = True
        self.copying = [each for each in self.copying if each.state != DONE] + [op]
        return number

    def slab(self, cta: int) -> Slab:
        """The tensor memory of a CTA of the batch."""
        if cta not in self.slabs:
            # The CTAs of a cluster are on SMs of their own; neighbouring clusters share these.
            size = self.batch.cluster_size
            sm = cta // size // self.batch.machine.ctas_per_sm * size + cta % size
            self.slabs[cta] = Slab(self.taken.setdefault(sm, np.zeros(COLUMNS, np.bool_)))
        return self.slabs[cta]

    def _warps(self, lanes: Array, *values: Array) -> list[tuple[int, Array, list[int]]]:
        """(position of its first lane, lanes, values, the same in all of them) of each warp."""
        found = []
        for at in range(0, len(lanes), 32):
            part, mine = slice(at, at + 32), []
            for value in values:
                all_ = np.broadcast_to(value, lanes.shape)[part]
                other = np.nonzero(all_ != all_[0])[0]
                if len(other):
                    what = f"{int(all_[0]):#x} in the first lane, {int(all_[other[0]]):#x} here"
                    raise LaneFault(f"tcgen05: an operand differs among the threads of a warp: {what}", at + other)
                mine.append(int(all_[0]))
            found.append((at, lanes[part], mine))
        return found

    # Allocation: whole warps.

    def alloc(self, lanes: Array, line: int, to: Array, generic: bool, columns: Array, paired: bool = False) -> None:
        """tcgen05.alloc: the address of the columns that `allocation.py` has granted goes to shared memory."""
        batch = self.batch
        ctas, offsets = batch.engine.locate(lanes, to, 4, 4, generic, "tcgen05.alloc")
        for at, mine, (offset, count) in self._warps(lanes, offsets, columns):
            cta, bad = int(batch.cta[mine[0]]), np.arange(at, at + 32)
            slab = self.slab(cta)
            if paired:
                batch.columns.check_pair("tcgen05.alloc.cta_group::2", mine, bad)
                batch.columns.check_begun("tcgen05.alloc.cta_group::2", mine, bad)
            if int(ctas[at]) != cta:
                raise LaneFault("tcgen05.alloc: the destination is shared memory of another CTA", bad)
            _check_count("tcgen05.alloc", count, bad)
            if slab.relinquished:
                place = batch.engine.place(slab.relinquished)
                raise LaneFault(f"tcgen05.alloc after this CTA gave up the permit to allocate, at{place}", bad)
            base = batch.columns.grant(mine, count, bad)
            slab.live[base] = count, line
            slab.owned[base : base + count] = True
            slab.freed.pop(base, None)
            slab.cells[:, base : base + count] = POISON
            slab.defined[:, base : base + count] = False
            first = mine[:1]
            batch.races.touch(first, line, 0)
            batch.shared.store(np.array([offset], U32), batch.shared_base[first], np.array([base], U32), 2)

    def dealloc(self, lanes: Array, address: Array, columns: Array, line: int, paired: bool = False) -> None:
        """tcgen05.dealloc: an allocation as it was made, which nothing uses any more."""
        for at, mine, (base, count) in self._warps(lanes, address, columns):
            bad = np.arange(at, at + 32)
            if paired:
                self.batch.columns.check_pair("tcgen05.dealloc.cta_group::2", mine, bad)
            slab = self.slab(int(self.batch.cta[mine[0]]))
            found = slab.live.get(base)
            if found is None:
                line_of = slab.freed.get(base)
                how = "" if line_of is None else f"; it was deallocated at{self.batch.engine.place(line_of)}"
                raise LaneFault(f"tcgen05.dealloc of {base:#x}, where no allocation begins{how}", bad)
            if found[0] != count:
                place = self.batch.engine.place(found[1])
                raise LaneFault(f"tcgen05.dealloc of {count} columns; {found[0]} were allocated at{place}", bad)
            everywhere, mine_columns = slice(0, LANES // STRIP), np.arange(base, base + count)
            self.check_products(slab, everywhere, mine_columns, mine, "tcgen05.dealloc", bad)
            self.check_products(slab, everywhere, mine_columns, mine, "tcgen05.dealloc", bad, True)
            self.check_accesses(slab, everywhere, mine_columns, mine, "tcgen05.dealloc", ("ld", "st"), bad)
            slab.writers[:, base : base + count] = 0
            slab.readers[:, base : base + count] = 0
            slab.scale_readers[:, base : base + count] = 0
            for records in slab.records.values():
                records[:, base : base + count] = 0
            del slab.live[base]
            slab.owned[base : base + count] = slab.taken[base : base + count] = False
            slab.freed[base] = line
            self.batch.columns.changed = True

    def relinquish(self, lanes: Array, line: int) -> None:
        """tcgen05.relinquish_alloc_permit."""
        for cta in np.unique(self.batch.cta[lanes]).tolist():
            self.slab(cta).relinquished = line

    def left(self, lanes: Array) -> tuple[str, int] | None:
        """(message, lane) if the CTA of one of these lanes, which exit, ends with columns allocated."""
        if not self.slabs:
            return None
        for lane in lanes.tolist():
            cta = int(self.batch.cta[lane])
            slab = self.slabs.get(cta)
            if slab is not None and slab.live and not self.batch.alive[self.batch.cta == cta].any():
                base, (count, line) = next(iter(slab.live.items()))
                return (
                    f"the CTA exits without tcgen05.dealloc of {count} columns from {base:#x} on, allocated at"
                    f"{self.batch.engine.place(line)}"
                ), lane
        return None

    # Who may touch what.

    def check_owned(self, slab: Slab, columns: Array, what: str, bad: Array) -> None:
        """Columns must be allocated."""
        last = int(columns.max())
        wrong = [last] if last >= COLUMNS else columns[~slab.owned[columns]].tolist()
        if wrong:
            held = ", ".join(f"{base} to {base + count - 1}" for base, (count, _) in sorted(slab.live.items()))
            raise LaneFault(
                f"out of bounds: {what} of TMEM column {wrong[0]}; this CTA has allocated {held or 'none'}", bad
            )

    def check_products(
        self, slab: Slab, strips: slice, columns: Array, lanes: Array, what: str, bad: Array, reader: bool = False,
        ordered: bool = False, but: int = -1,
    ) -> None:  # fmt: skip
        """The operations of the tensor core that write there, or with `reader` read, must be known to be complete.

        ordered: a tcgen05.cp need only have been issued before, as for a product. but: a lane whose own do not count.
        """
        roles = [("overwrites matrix A", slab.readers), ("overwrites scale factors", slab.scale_readers)]
        for touched, numbers in roles if reader else [("", slab.writers)]:
            for number in np.unique(numbers[strips][:, columns]).tolist():
                if not number:
                    continue
                op = self.products[number - 1]
                if op.lane == but:
                    continue
                if ordered and number in self.copies:
                    self.check_copy(number, lanes, what, bad)
                elif len(self.batch.engine.flight.unknown(op.results, lanes)):
                    state = "has not completed"
                    if op.state == DONE:
                        state = "has completed, but this thread has not waited for its tcgen05.commit"
                    written = "touches what is written by" if number in self.copies else "touches the accumulator of"
                    raise LaneFault(
                        f"{what} {f'{touched} of' if reader else written} an asynchronous {op.kind} that {state}, "
                        f"issued at{self.batch.engine.place(op.line)}{self.batch.tensor_cores.strays(op.lane)}",
                        bad,
                    )
                elif number in self.finished and op.lane != int(lanes[0]):
                    of = f"the {op.kind} issued at{self.batch.engine.place(op.line)}"
                    self._check_fences(what, lanes, self.finished[number], of, -1, bad)

    def check_copy(self, number: int, lanes: Array, what: str, bad: Array) -> None:
        """A product comes after the issue of a tcgen05.cp."""
        tick, lane = self.copies[number]
        if lane != int(lanes[0]) and len(
            self.batch.races.pairs_unordered(lanes[:1], np.array([tick]), np.array([lane]))
        ):
            cta, thread = self.batch.thread(lane)
            place = self.batch.engine.place(self.products[number - 1].line)
            raise LaneFault(
                f"{what}: nothing orders it after the tcgen05.cp of CTA {cta}, thread {thread}, issued at{place}", bad
            )

    def check_accesses(
        self, slab: Slab, strips: slice, columns: Array, lanes: Array, what: str, kinds: tuple[str, ...], bad: Array
    ) -> None:
        """The last tcgen05.ld or st of each place must have been waited for, and what comes now ordered after that."""
        races = self.batch.races
        for kind in kinds:
            for record in np.unique(slab.records[kind][strips][:, columns]).tolist():
                if not record:
                    continue
                tick, other = record >> _SHIFT, record & _LANE
                waits = self.waits[kind].get(other >> 5, [])
                at = bisect_right(waits, tick)
                place = self.batch.engine.place(races.clock.log[tick])
                cta, thread = self.batch.thread(other)
                who = f"the tcgen05.{kind} by the warp of CTA {cta}, thread {thread}, at{place}"
                if at == len(waits):
                    raise LaneFault(f"missing tcgen05.wait::{kind}: {what} of tensor memory still in use by {who}", bad)
                if other >> 5 == int(lanes[0]) >> 5:
                    continue
                if len(races.pairs_unordered(lanes[:1], np.array([waits[at]]), np.array([other]))):
                    raise LaneFault(f"{what}: nothing orders it after the tcgen05.wait::{kind} of {who}", bad)
                self._check_fences(what, lanes[:1], waits[at], who, other, bad)

    # tcgen05.ld, st and wait: whole warps.

    def _place(
        self, what: str, mine: Array, address: int, shape: str, count: int, split: int, packed: bool, bad: Array
    ) -> Any:
        """(slab, TMEM lanes, columns, strips, distinct columns) of a warp's access."""
        row, column = address >> 16, address & 0xFFFF
        warp = int(self.batch.tid[mine[0]]) >> 5
        first = 32 * (warp % 4)
        begins = (first,) if shape == "32x32b" else (first, first + STRIP)
        if row not in begins:
            raise LaneFault(
                f"{what}: the address {address:#x} names TMEM lane {row}; warp {warp} of the CTA reaches lanes "
                f"{first} to {first + 31} only, and {shape} begins at {' or '.join(map(str, begins))}",
                bad,
            )
        rows, columns = pattern(shape, count, split, packed)
        slab = self.slab(int(self.batch.cta[mine[0]]))
        used = np.unique((columns, columns + packed)) + column
        self.check_owned(slab, used, what, bad)
        strips = slice(row // STRIP, row // STRIP + (2 if shape == "32x32b" else 1))
        return slab, rows + row, columns + column, strips, used

    def _record(self, slab: Slab, kind: str, strips: slice, columns: Array, lane: int, line: int) -> None:
        self.batch.races.fresh = True
        slab.records[kind][strips, columns] = self.batch.races.clock.tick(line) << _SHIFT | lane

    def load(
        self, lanes: Array, line: int, address: Array, shape: str, count: int, split: int, packed: bool = False
    ) -> list[Array]:
        """tcgen05.ld: `count` registers, each over the lanes; `packed`: of the low halves of two columns each."""
        what = f"tcgen05.ld.{shape}"
        found = np.empty((count, len(lanes)), U32)
        for at, mine, (where,) in self._warps(lanes, address):
            bad = np.arange(at, at + 32)
            slab, rows, columns, strips, used = self._place(what, mine, where, shape, count, split, packed, bad)
            self.check_products(slab, strips, used, mine, what, bad)
            self.check_accesses(slab, strips, used, mine, what, ("st",), bad)
            there = slab.defined[strips.start * STRIP : strips.stop * STRIP, used].any(axis=0)
            if not there.all():
                column = int(used[~there][0])
                raise LaneFault(f"{what} of undefined tensor memory: nothing has written column {column}", bad)
            found[:, at : at + 32] = slab.cells[rows, columns]
            if packed:
                high = slab.cells[rows, columns + 1]
                found[:, at : at + 32] = found[:, at : at + 32] & U32(0xFFFF) | high << U32(16)
            self._record(slab, "ld", strips, used, int(mine[0]), line)
        self.batch.races.meet(lanes)
        return list(found)

    def store(
        self, lanes: Array, line: int, address: Array, shape: str, count: int, split: int, values: list[Array],
        packed: bool = False,
    ) -> None:  # fmt: skip
        """tcgen05.st of `count` registers; `packed`: of both halves, to a column each."""
        what = f"tcgen05.st.{shape}"
        data = np.array(values)
        for at, mine, (where,) in self._warps(lanes, address):
            bad = np.arange(at, at + 32)
            slab, rows, columns, strips, used = self._place(what, mine, where, shape, count, split, packed, bad)
            self.check_products(slab, strips, used, mine, what, bad)
            self.check_products(slab, strips, used, mine, what, bad, True)
            self.check_accesses(slab, strips, used, mine, what, ("ld",), bad)
            part = data[:, at : at + 32]
            slab.cells[rows, columns] = part & U32(0xFFFF) | U32(POISON & ~0xFFFF) if packed else part
            slab.defined[rows, columns] = True
            if packed:
                slab.cells[rows, columns + 1] = part >> U32(16) | U32(POISON & ~0xFFFF)
                slab.defined[rows, columns + 1] = True
            self._record(slab, "st", strips, used, int(mine[0]), line)
        self.batch.races.meet(lanes)

    def wait(self, lanes: Array, kind: str) -> None:
        """tcgen05.wait::ld, wait::st."""
        self.batch.races.fresh = True
        tick = self.batch.races.clock.tick()
        for warp in np.unique(lanes >> 5).tolist():
            self.waits[kind].setdefault(warp, []).append(tick)
        self.batch.races.meet(lanes)


def _check_count(what: str, count: int, bad: Array) -> None:
    if not GRANULE <= count <= COLUMNS or count & (count - 1):
        raise LaneFault(f"{what} of {count} columns: a power of two from {GRANULE} to {COLUMNS} is wanted", bad)
