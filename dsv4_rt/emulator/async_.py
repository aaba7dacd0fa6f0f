"""Asynchronous operations of a batch: when they read, when they write, and who knows that they have.

An `Op` is issued by a thread and runs later. Its addresses are taken at issue, its data is not. When it runs is the
machine's completion schedule:

    early    at once, at issue
    late     when a thread waits for it, or when no thread can go on otherwise
    random   at seeded moments in between; reading and writing may lie apart

`inflight.py` remembers what each op reads and writes until those who touch it know that it is complete.

For the authors of instructions:

    B.engine.issue(op)                   check the operands against what is in flight, then queue or run
    B.engine.wait(ops, lanes)            complete these ops; the lanes know it
    B.engine.commit(group, lanes)        close the open group of ops with `op.group == group` of each lane
    B.engine.wait_group(group, lanes, n, read=False)   all but the last n groups of each lane
    B.engine.locate(lanes, addr, size, align, generic, what) -> (CTA index of the batch, shared offset) of addresses

An op that reports to mbarriers lists them in `barriers`, one (position, bytes) for each of `writes`: the engine does
the complete_tx and ties the knowledge of completion to the phase. `signal` is for anything else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.inflight import Completion, Entry, Flight
from dsv4_rt.emulator.memory import SHARED_FIRST, SHARED_WINDOW, LaneFault
from dsv4_rt.emulator.report import where

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch
    from dsv4_rt.emulator.ir import Instr

Array = npt.NDArray[Any]
COMPLETIONS = ("early", "late", "random")
ISSUED, READ, DONE = 0, 1, 2


@dataclass(slots=True, frozen=True)
class Span:
    """Bytes [lo, hi) of a CTA's shared memory: index of the CTA in the batch, offsets as PTX sees them, less rank."""

    cta: int
    lo: int
    hi: int


@dataclass(slots=True, eq=False)
class Op:
    """One asynchronous operation.

    Attributes:
        kind: as messages name it, "cp.async.bulk".
        line: the PTX line of the instruction.
        lane: who issued it (wgmma: the first lane of the warpgroup).
        reads, writes: the shared memory it touches.
        read: takes the source data, when the schedule says.
        write: makes the result visible, at or after `read`.
        signal: called after `write`.
        after: an op that must be done before this one starts.
        proxy: "async", or "generic" for cp.async.
        barriers: for each of `writes` the mbarrier (see Mbarriers.position) it reports to, and the bytes. Empty for ops
            whose completion a group tells.
        group: the kind of group it belongs to, for commit and wait_group; "" if it is waited for by name.
        parties: the lanes all of which must have waited before what it touched may be reused; (lane,) if empty. One
            lane for each warp suffices.
    """

    kind: str
    line: int
    lane: int
    reads: list[Span]
    writes: list[Span]
    read: Callable[[], Any]
    write: Callable[[Any], None]
    signal: Callable[[], None] | None = None
    after: Op | None = None
    proxy: str = "async"
    barriers: list[tuple[int, int]] = field(default_factory=list)
    group: str = ""
    parties: tuple[int, ...] = ()
    state: int = ISSUED
    data: Any = None
    serial: int = -1  # the number of its group among those of its lane
    sources: Completion | None = None  # who knows that the sources have been read
    results: Completion | None = None  # who knows that the results are there
    entries: list[Entry] = field(default_factory=list)  # of `writes`, then of `reads`
    lanes: Array | None = None  # of an instruction of many lanes (cp.async): each waits for its own piece
    serials: Array | None = None  # `serial` of each of them


class Groups:
    """The groups of one kind: how many each lane has committed, and the ops not yet waited for."""

    def __init__(self, nlanes: int) -> None:
        self.committed = np.zeros(nlanes, np.int64)
        self.ops: list[Op] = []


class Engine:
    """The operations in flight of a batch."""

    def __init__(self, batch: Batch, completion: str, dice: random.Random) -> None:
        self.batch, self.completion, self.dice = batch, completion, dice
        self.flight = Flight(batch)
        self.queue: list[Op] = []
        self.groups: dict[str, Groups] = {}

    # Issue and schedule.

    def issue(self, op: Op) -> None:
        """Check an op against what is in flight and start it.

        Raises:
            LaneFault: it reads what is not known to be there, or overwrites what may still be read.
        """
        if not op.barriers and op.sources is None:
            parties = op.parties or (op.lane,)
            op.sources = Completion(parties)
            op.results = op.sources if not op.reads or not op.writes else Completion(parties)
        self.flight.claim(op)
        if op.group:
            groups = self._groups(op.group)
            op.serial = int(groups.committed[op.lane])
            groups.ops.append(op)
        self.schedule(op)

    def issue_pieces(self, op: Op, lanes: Array, places: Array, size: int) -> None:
        """Start an op of many lanes that writes `size` bytes at a position of shared memory for each."""
        self.flight.claim_pieces(op, lanes, places, size)
        groups = self._groups(op.group)
        op.lanes, op.serials = lanes, groups.committed[lanes]
        groups.ops.append(op)
        self.schedule(op)

    def schedule(self, op: Op) -> None:
        """Hand an op to the schedule, without checks."""
        if self.completion == "early":
            self.finish(op)
        else:
            self.queue.append(op)

    def step(self) -> None:
        """Between two blocks, under the random schedule: perhaps run something."""
        while self.queue and self.dice.random() < 0.3:
            op = self.dice.choice(self.queue)
            if op.after is None or op.after.state == DONE:
                self._advance(op)

    def pump(self) -> bool:
        """No thread can go on: run the oldest op, or under the random schedule any. False if there is none."""
        if not self.queue:
            return False
        op = self.dice.choice(self.queue) if self.completion == "random" else self.queue[0]
        self.finish(op)
        return True

    def drain(self) -> None:
        """Complete everything."""
        while self.queue:
            self.finish(self.queue[0])

    def _advance(self, op: Op) -> None:
        """Read, or write and signal."""
        try:
            if op.state == ISSUED:
                op.data = op.read()
                op.state = READ
                return
            if self.batch.clusters is not None:
                self.batch.clusters.check_targets(op)
            op.write(op.data)
        except LaneFault as error:
            raise self.batch.fault(error.what, self.instr(op.line), np.array([op.lane])) from None
        op.state, op.data = DONE, None
        if op in self.queue:
            self.queue.remove(op)
        if op.barriers:
            self.batch.mbarriers.completed(op)
        if op.signal is not None:
            op.signal()

    def finish(self, op: Op, read_only: bool = False) -> None:
        """Run an op now, or only its read; what it must come after first."""
        chain = [op]
        while chain[-1].after is not None and chain[-1].after.state != DONE:
            chain.append(chain[-1].after)
        for each in reversed(chain):
            while each.state < (READ if read_only and each is op else DONE):
                self._advance(each)

    # Waiting.

    def wait(self, ops: Iterable[Op], lanes: Array, read_only: bool = False) -> None:
        """Complete ops (their reads only, if so asked); the lanes know it from now on."""
        known: list[Completion] = []
        for op in ops:
            self.finish(op, read_only)
            known += [each for each in (op.sources, None if read_only else op.results) if each is not None]
        if known:
            self.flight.observe(known, lanes)

    def _groups(self, kind: str) -> Groups:
        found = self.groups.get(kind)
        if found is None:
            found = self.groups[kind] = Groups(self.batch.nlanes)
        return found

    def commit(self, kind: str, lanes: Array) -> None:
        """What each lane has issued since its last commit becomes a group."""
        self._groups(kind).committed[lanes] += 1

    def wait_group(self, kind: str, lanes: Array, n: int, read: bool = False) -> None:
        """Wait for all but the n latest groups of each lane; `read`: only until their sources have been read."""
        groups = self._groups(kind)
        if not groups.ops:
            return
        waits = np.zeros(self.batch.nlanes, np.bool_)
        waits[lanes] = True
        if groups.ops[0].lanes is not None:
            self._wait_pieces(groups, waits, n)
            return
        due = [op for op in groups.ops if waits[op.lane] and op.serial < groups.committed[op.lane] - n]
        for op in due:
            self.wait([op], np.array([op.lane]), read)
        if not read:
            groups.ops = [op for op in groups.ops if op not in due]

    def _wait_pieces(self, groups: Groups, waits: Array, n: int) -> None:
        limit = groups.committed - n
        left = []
        for op in groups.ops:
            assert op.lanes is not None
            assert op.serials is not None
            due = waits[op.lanes] & (op.serials < limit[op.lanes])
            if due.any():
                self.finish(op)
                chosen = np.zeros(self.batch.nlanes, np.bool_)
                chosen[op.lanes[due]] = True
                self.flight.waited(op, chosen)
                if due.all():
                    continue
                op.lanes, op.serials = op.lanes[~due], op.serials[~due]
            left.append(op)
        groups.ops = left

    def release_pieces(self, kind: str, lanes: Array) -> list[Op]:
        """Take what the lanes have issued and not waited for out of their groups; returns the ops it belongs to."""
        groups = self._groups(kind)
        mine = np.zeros(self.batch.nlanes, np.bool_)
        mine[lanes] = True
        taken, left = [], []
        for op in groups.ops:
            assert op.lanes is not None
            assert op.serials is not None
            gone = mine[op.lanes]
            if gone.any():
                taken.append(op)
                op.lanes, op.serials = op.lanes[~gone], op.serials[~gone]
            if len(op.lanes):
                left.append(op)
        groups.ops = left
        return taken

    def left_reading(self, lanes: Array) -> tuple[str, int] | None:
        """(message, lane) if one of these lanes, which exit, has not waited for what reads its CTA's shared memory."""
        for op in self.groups["bulk"].ops if "bulk" in self.groups else ():
            seen = None if op.sources is None else op.sources.seen
            if op.reads and op.lane in lanes and (seen is None or not seen[op.lane]):
                return (
                    f"the thread exits while its asynchronous {op.kind} may still read shared memory: it has not "
                    f"waited (cp.async.bulk.wait_group.read) since it was issued at{self.place(op.line)}"
                ), op.lane
        return None

    def wait_all(self, kind: str, lanes: Array) -> None:
        """Wait for all ops of a kind that the lanes have issued, committed or not."""
        self.wait_group(kind, lanes, -1)

    # Addresses and messages.

    def locate(self, lanes: Array, addr: Array, size: int, align: int, generic: bool, what: str) -> tuple[Array, Array]:
        """(CTA of the batch, shared offset) of addresses in shared::cta, shared::cluster or generic space.

        Raises:
            LaneFault: an address is not shared memory of the cluster, is misaligned, or `size` bytes do not fit.
        """
        batch = self.batch
        offset = addr.astype(np.int64)
        if generic:
            outside = np.nonzero(offset >> 48 != SHARED_WINDOW >> 48)[0]
            if len(outside):
                raise LaneFault(f"{what}: {int(addr[outside[0]]):#x} is not an address in shared memory", outside)
            offset &= (1 << 48) - 1
        cta = batch.cta[lanes]
        ranks = batch.cluster_size
        if ranks > 1:
            rank = offset >> 24
            wrong = np.nonzero(rank >= ranks)[0]
            if len(wrong):
                raise LaneFault(f"{what}: CTA rank {int(rank[wrong[0]])} in a cluster of {ranks}", wrong)
            cta = cta - cta % ranks + rank
            offset &= (1 << 24) - 1
            if batch.clusters is not None:
                batch.clusters.touch(lanes, cta)
        bad = np.nonzero((offset < SHARED_FIRST) | (offset + size > SHARED_FIRST + batch.shared.size))[0]
        if len(bad):
            raise LaneFault(
                f"out of bounds: {what}: {size} bytes at shared offset {int(offset[bad[0]]):#x}; there are "
                f"{batch.shared.size:,} B from {SHARED_FIRST:#x}",
                bad,
            )
        bad = np.nonzero(offset & (align - 1))[0]
        if len(bad):
            raise LaneFault(f"{what}: shared offset {int(offset[bad[0]]):#x} is not a multiple of {align}", bad)
        return cta, offset

    def bytes_of(self, span: Span) -> Array:
        """The bytes of a span, without any check."""
        lo = self.start(span)
        found: Array = self.batch.shared.views[0][lo : lo + span.hi - span.lo]
        return found

    def start(self, span: Span) -> int:
        """The position of a span in the batch's shared memory."""
        return span.cta * self.batch.shared.stride + span.lo - SHARED_FIRST

    def fill(self, span: Span, data: Array) -> None:
        """Write a span's bytes."""
        shared, lo = self.batch.shared, self.start(span)
        if shared.tiles is not None:
            shared.tiles.forget_range(lo, lo + span.hi - span.lo)
        shared.views[0][lo : lo + span.hi - span.lo] = data
        shared.written[0][lo : lo + span.hi - span.lo] = 1
        shared.version += 1

    def take(self, span: Span) -> Array:
        """A copy of a span's bytes, which must have been written.

        Raises:
            LaneFault: some have not.
        """
        shared, lo = self.batch.shared, self.start(span)
        missing = np.nonzero(shared.written[0][lo : lo + span.hi - span.lo] == 0)[0]
        if len(missing):
            raise LaneFault(
                f"read of uninitialised shared memory at shared offset {span.lo + int(missing[0]):#x}",
                np.zeros(1, np.int64),
            )
        return self.bytes_of(span).copy()

    def instr(self, line: int) -> Instr | None:
        """The instruction on a line of the PTX."""
        return next((i for block in self.batch.program.blocks for i in block.instrs if i.line == line), None)

    def place(self, line: int) -> str:
        """Where an instruction stands, for the second half of a message."""
        batch = self.batch
        return where(batch.program.ptx, self.instr(line), batch.machine.source_roots, "    ")
