"""mbarrier objects: counts, phases, who waits, and what waiting tells about asynchronous operations and other threads.

A barrier is a Python object kept under the position of its 8 bytes in the batch's shared memory; the bytes themselves
stay untouched, and ordinary accesses to them are errors while the barrier lives. A phase is complete when no arrival
and no transaction byte is pending; then the next one begins with the expected count.

An arrival releases what its warp knows (see `races.py`), a wait that succeeds acquires what all arrivals of the phase
have released, and observes the asynchronous operations that completed in it. The state an arrival returns is
opaque; here it holds the phase and the pending count before the arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.inflight import Completion, Entry
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.async_ import Op
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
I64, U64 = np.int64, np.uint64
LIMIT = (1 << 20) - 1  # of counts, and of transaction bytes either way
_COUNT_BITS = 20
_ALL = slice(None)


class Barrier:
    """One mbarrier. `complete` is the completion of the current phase, `previous` that of the last."""

    __slots__ = (
        "at", "complete", "entry", "expected", "gathered", "known", "line", "made", "pending", "phase", "previous",
        "released", "tx", "used",
    )  # fmt: skip

    def __init__(self, at: int, count: int, line: int, made: tuple[int, int], entry: Entry) -> None:
        self.at, self.line, self.made, self.entry = at, line, made, entry
        self.expected = self.pending = count
        self.tx = self.phase = 0
        self.used = False
        self.complete = Completion()
        self.previous: Completion | None = None
        self.gathered: Array | None = None  # the clocks that arrivals of this phase have released
        self.released: Array | None = None  # those of the last phase
        self.known: Array | None = None  # lanes that the init is known to happen before

    def describe(self) -> str:
        came = f"phase {self.phase}, {self.pending} of {self.expected} arrivals pending"
        if self.tx > 0:
            return f"{came}, {self.tx:,} transaction bytes pending"
        return came if not self.tx else f"{came}, {-self.tx:,} transaction bytes more than were expected"


class Mbarriers:
    """The barriers of a batch, by position in its shared memory."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.live: dict[int, Barrier] = {}
        self.dead: dict[int, int] = {}  # position -> line of the inval
        self.flipped = False  # whether a phase has completed since the scheduler looked

    # Finding them.

    def position(self, cta: int, offset: int) -> int:
        """What an Op's `barriers` name a barrier by."""
        return cta * self.batch.shared.stride + offset - SHARED_FIRST

    def locate(self, lanes: Array, addr: Array, generic: bool, what: str) -> Array:
        """Positions of the barriers that the lanes name."""
        cta, offset = self.batch.engine.locate(lanes, addr, 8, 8, generic, what)
        found: Array = cta * self.batch.shared.stride + (offset - SHARED_FIRST)
        return found

    def name(self, at: int) -> str:
        """How messages name the barrier at a position."""
        cta, offset = divmod(at, self.batch.shared.stride)
        offset += SHARED_FIRST
        symbol = self.batch.program.symbol_at(offset)
        named = f"{symbol}, shared offset {offset:#x}" if symbol else f"shared offset {offset:#x}"
        return f"the mbarrier at {named} of CTA {self.batch.cta_name(cta)}"

    @staticmethod
    def each(at: Array) -> Iterator[tuple[int, Any]]:
        """(position, which lanes) for each barrier named."""
        first = int(at[0])
        if len(at) == 1 or bool((at == first).all()):
            yield first, _ALL
            return
        for position in np.unique(at).tolist():
            yield position, np.nonzero(at == position)[0]

    def find(self, at: int, lanes: Array, which: Any, what: str) -> Barrier:
        """A live barrier whose init happens before what lanes[which] do.

        Raises:
            LaneFault: there is none, or nothing orders its init.
        """
        barrier = self.live.get(at)
        if barrier is None:
            how = "was never initialised"
            if at in self.dead:
                how = f"was invalidated at{self.batch.engine.place(self.dead[at])}"
            raise LaneFault(f"{what}: {self.name(at)} {how}", _bad(lanes, which))
        if barrier.known is None:
            barrier.known = np.zeros(self.batch.nlanes, np.bool_)
        mine = lanes[which]
        if not barrier.known[mine].all():
            late = self.batch.races.after(mine, *barrier.made)
            if len(late):
                place = self.batch.engine.place(barrier.line)
                what = f"{what}: nothing orders it after the init of {self.name(at)} at{place}"
                raise LaneFault(what, _bad(lanes, which)[late])
            barrier.known[mine] = True
        barrier.used = True
        return barrier

    # Instructions.

    def init(self, lanes: Array, line: int, addr: Array, generic: bool, count: Array) -> None:
        at = self.locate(lanes, addr, generic, "mbarrier.init")
        count = np.broadcast_to(count, lanes.shape)
        _check_counts("mbarrier.init", count)
        batch = self.batch
        for position, which in self.each(at):
            counts = np.unique(count[which])
            old = self.live.get(position)
            if len(counts) > 1:
                what = "mbarrier.init: threads initialise one mbarrier with different counts"
                raise LaneFault(what, _bad(lanes, which))
            if old is not None:
                if old.used or old.expected != int(counts[0]):
                    raise LaneFault(
                        f"mbarrier.init: {self.name(position)} lives ({old.describe()}) and needs mbarrier.inval "
                        f"first; it was initialised at{batch.engine.place(old.line)}",
                        _bad(lanes, which),
                    )
                batch.engine.flight.drop(old.entry, position // batch.shared.stride)
            first = lanes[which][:1]
            batch.engine.flight.overwrite(first, position, position + 8, "mbarrier.init", line)
            entry = Entry(None, position, position + 8, True, None, line)
            batch.engine.flight.add(entry, position // batch.shared.stride)
            tick = batch.races.clock.tick(line)
            self.live[position] = Barrier(position, int(counts[0]), line, (tick, int(first[0])), entry)
            self.dead.pop(position, None)
        batch.races.fresh = True

    def inval(self, lanes: Array, line: int, addr: Array, generic: bool) -> None:
        at = self.locate(lanes, addr, generic, "mbarrier.inval")
        for position, which in self.each(at):
            barrier = self.find(position, lanes, which, "mbarrier.inval")
            waiting = self.batch.waits.count(position)
            if waiting or barrier.tx:
                how = f"{waiting} threads wait for it" if waiting else barrier.describe()
                raise LaneFault(f"mbarrier.inval: {self.name(position)} is in use: {how}", _bad(lanes, which))
            self.batch.engine.flight.drop(barrier.entry, position // self.batch.shared.stride)
            del self.live[position]
            self.dead[position] = line

    def arrive(
        self, lanes: Array, addr: Array, generic: bool, count: Array | None = None, tx: Array | None = None,
        drop: bool = False, complete: bool = True,
    ) -> Array:  # fmt: skip
        """Arrivals of `count` each (1 if None), after expect_tx of `tx` bytes; returns the states.

        drop: lower the expected count of later phases as well. complete=False: .noComplete.
        """
        what = "mbarrier.arrive_drop" if drop else "mbarrier.arrive"
        at = self.locate(lanes, addr, generic, what)
        counts = np.broadcast_to(np.ones(1, I64) if count is None else count.astype(I64), lanes.shape)
        if count is not None:
            _check_counts(what, counts)
        states = np.zeros(len(lanes), U64)
        for position, which in self.each(at):
            barrier = self.find(position, lanes, which, what)
            if tx is not None:
                self._expect(barrier, int(np.broadcast_to(tx, lanes.shape)[which].astype(I64).sum()), lanes, which)
            states[which] = self._arrive(barrier, counts[which], True, drop, complete, lanes, which)
        return states

    def promise(self, lanes: Array, addr: Array, generic: bool, counted: bool) -> Array:
        """cp.async.mbarrier.arrive: positions of the barriers on which `arrive_later` will arrive for the lanes.

        counted: without .noinc, the pending count is raised by one for each.
        """
        what = "cp.async.mbarrier.arrive"
        at = self.locate(lanes, addr, generic, what)
        for position, which in self.each(at):
            barrier = self.find(position, lanes, which, what)
            if counted:
                barrier.pending += len(lanes[which])
                if barrier.pending > LIMIT:
                    over = f"{what}: the pending count of {self.name(position)} becomes {barrier.pending:,}"
                    raise LaneFault(f"{over}; {LIMIT:,} is possible", _bad(lanes, which))
        return at

    def arrive_later(self, lanes: Array, at: Array, ops: Iterable[Op]) -> None:
        """The pieces of these ops that the lanes issued are complete: the current phase tells so; arrive."""
        for position, which in self.each(at):
            barrier = self.live.get(position) or self.find(position, lanes, which, "cp.async.mbarrier.arrive")
            chosen = np.zeros(self.batch.nlanes, np.bool_)
            chosen[lanes[which]] = True
            for op in ops:
                self.batch.engine.flight.attach(op, chosen, barrier.complete)
            counts = np.ones(len(lanes[which]), I64)
            self._arrive(barrier, counts, False, False, True, lanes, which)

    def _arrive(
        self, barrier: Barrier, counts: Array, releases: bool, drop: bool, complete: bool, lanes: Array, which: Any
    ) -> Array:
        states = []
        left, who = counts, lanes[which]
        while len(left):
            before = barrier.pending - np.cumsum(left) + left
            fits = int(np.count_nonzero(before - left >= 0))  # arrivals of this phase; more may follow in the next
            if not fits or (not complete and before[fits - 1] == left[fits - 1]):
                how = "more arrivals than the phase expects" if not fits else ".noComplete completes the phase"
                place = self.batch.engine.place(barrier.line)
                raise LaneFault(
                    f"mbarrier.arrive: {how}: a count of {int(left[0])} for {self.name(barrier.at)} "
                    f"({barrier.describe()}), initialised at{place}",
                    _bad(lanes, which),
                )
            if releases:
                row = self.batch.races.release(who[:fits])
                barrier.gathered = row if barrier.gathered is None else np.maximum(barrier.gathered, row)
            total = int(left[:fits].sum())
            states.append((before[:fits] | barrier.phase << _COUNT_BITS).astype(U64))
            barrier.pending -= total
            if drop:
                barrier.expected -= total
            left, who = left[fits:], who[fits:]
            self._settle(barrier)
        return states[0] if len(states) == 1 else np.concatenate(states)

    def expect_tx(self, lanes: Array, addr: Array, generic: bool, tx: Array, sign: int = 1) -> None:
        """expect_tx, or with sign -1 complete_tx."""
        what = "mbarrier.expect_tx" if sign > 0 else "mbarrier.complete_tx"
        at = self.locate(lanes, addr, generic, what)
        for position, which in self.each(at):
            barrier = self.find(position, lanes, which, what)
            total = int(np.broadcast_to(tx, lanes.shape)[which].astype(I64).sum())
            self._expect(barrier, sign * total, lanes, which)
            self._settle(barrier)

    def _expect(self, barrier: Barrier, tx: int, lanes: Array, which: Any) -> None:
        if abs(barrier.tx + tx) > LIMIT:
            raise LaneFault(
                f"the transaction count of {self.name(barrier.at)} becomes {barrier.tx + tx:,} bytes; "
                f"{LIMIT:,} are possible",
                _bad(lanes, which),
            )
        barrier.tx += tx

    def completed(self, op: Op) -> None:
        """An op has written: complete_tx on its barriers, whose phases now tell of its completion."""
        lanes = np.array([op.lane])
        for i, (position, nbytes) in enumerate(op.barriers):
            barrier = self.live.get(position)
            if barrier is None:
                barrier = self.find(position, lanes, _ALL, f"complete_tx of {op.kind}")
            if i < len(op.writes):
                op.entries[i].seen = barrier.complete
            for entry in op.entries[len(op.writes) :] if i == 0 else ():
                entry.seen = barrier.complete
            self._expect(barrier, -nbytes, lanes, _ALL)
            self._settle(barrier)

    def committed(self, position: int, lane: int, row: Array, phases: list[Completion]) -> None:
        """tcgen05.commit arrives once; the current phase, added to `phases`, tells of what it covers.

        row: what the thread knew when it committed, which the arrival releases.
        """
        lanes = np.array([lane])
        barrier = self.live.get(position) or self.find(position, lanes, _ALL, "tcgen05.commit")
        phases.append(barrier.complete)
        barrier.gathered = row if barrier.gathered is None else np.maximum(barrier.gathered, row)
        self._arrive(barrier, np.ones(1, I64), False, False, True, lanes, _ALL)

    def _settle(self, barrier: Barrier) -> None:
        """Begin the next phase if nothing is pending."""
        if barrier.pending or barrier.tx:
            return
        barrier.previous = barrier.complete
        barrier.complete = barrier.previous.later = Completion()
        barrier.phase += 1
        barrier.pending = barrier.expected
        barrier.released, barrier.gathered = barrier.gathered, None
        self.flipped = True
        self.batch.shared.version += 1

    def pending_count(self, states: Array) -> Array:
        """mbarrier.pending_count: the pending count before the arrival that returned a state."""
        found: Array = (states & U64(LIMIT)).astype(np.uint32)
        return found

    # Waiting.

    def test(self, lanes: Array, addr: Array, generic: bool, value: Array, parity: bool, what: str) -> Array:
        """test_wait and try_wait: whether the phase of a state, or of a parity, is complete.

        Under the random schedule try_wait sometimes says no although it is: its time may have run out.
        """
        at = self.locate(lanes, addr, generic, what)
        value = np.broadcast_to(value, lanes.shape)
        found = np.zeros(len(lanes), np.bool_)
        engine = self.batch.engine
        hesitate = engine.completion == "random" and "try_wait" in what and engine.dice.random() < 0.0625
        for position, which in self.each(at):
            barrier = self.find(position, lanes, which, what)
            yes = self._over(barrier, value[which], parity)
            if not parity:
                stale = np.nonzero(barrier.phase - (value[which].astype(I64) >> _COUNT_BITS) > 1)[0]
                if len(stale):
                    how = "the state is neither of the current phase nor of the one before"
                    what = f"{what}: {how}: {self.name(position)}, {barrier.describe()}"
                    raise LaneFault(what, _bad(lanes, which)[stale])
            if hesitate or not yes.any():
                continue
            found[which] = yes
            if self.batch.clusters is not None:
                self.batch.clusters.observed(lanes[which])
            who = lanes[which] if yes.all() else lanes[which][yes]
            if barrier.released is not None:
                self.batch.races.acquire(who, barrier.released)
            if barrier.previous is not None:
                engine.flight.observe([barrier.previous], who)
        return found

    @staticmethod
    def _over(barrier: Barrier, value: Array, parity: bool) -> Array:
        if parity:
            return np.asarray((value & value.dtype.type(1)) != barrier.phase & 1)
        return np.asarray(value.astype(I64) >> _COUNT_BITS != barrier.phase)

    def over(self, at: Array, value: Array, parity: bool) -> Array:
        """For the scheduler: whose phase is complete. Lanes that name no barrier may go on, to a fault."""
        found = np.ones(len(at), np.bool_)
        for position, which in self.each(at):
            barrier = self.live.get(position)
            if barrier is not None:
                found[which] = self._over(barrier, value[which], parity)
        return found


def _bad(lanes: Array, which: Any) -> Array:
    found: Array = np.arange(len(lanes))[which]
    return found


def _check_counts(what: str, counts: Array) -> None:
    wrong = np.nonzero((counts == 0) | (counts > LIMIT))[0]
    if len(wrong):
        raise LaneFault(f"{what}: a count of {int(counts[wrong[0]])}; 1 to {LIMIT:,} are possible", wrong)
