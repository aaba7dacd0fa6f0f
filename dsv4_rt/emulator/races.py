"""Data races: accesses of two threads to the same bytes, one of them a store, that nothing orders.

Every access takes a tick. Memory is divided into cells (words, or bytes where a kernel accesses smaller things), and a
cell remembers its last store and its last two loads by different threads as tick, strength and thread. An access is
ordered after one that a cell remembers if

    both are of one thread, or the CTA has met at a full barrier since,
    they are of one warp: both threads have met others at bar.warp.sync or a warp-wide operation since,
    they are of two warps of a cluster: the vector clock of the warp (one tick for each warp of its cluster, joined by
        the participants of a barrier, by a wait for an mbarrier with those who arrived, and by a strong load that
        follows a fence and a strong store) has reached the tick,
    they are of two clusters (global memory only): the first CTA has fenced and then stored strongly, the second has
        since loaded strongly.

Strong accesses (atom, red, volatile, relaxed, acquire, release) do not race with one another. A store of the bytes
that are there already, and a store of one instruction in which several lanes of a warp write one cell, are counted, not
reported. Where exactness would cost much the check is lenient: it may miss a
race, and it raises no alarm where the CUDA programming model gives an order.

The file is long because clocks, records and the watched shared memory are one mechanism.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.clusters import ctaid, split
from dsv4_rt.emulator.ir import TYPES, Instr
from dsv4_rt.emulator.memory import SHARED_FIRST, Generic, LaneFault, LaneMemory, used_flags
from dsv4_rt.emulator.report import where

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch
    from dsv4_rt.emulator.inflight import Flight
    from dsv4_rt.emulator.machine import Program
    from dsv4_rt.emulator.tiles import Tiles

Array = npt.NDArray[Any]
I64 = np.int64
_NONE = np.zeros(0, I64)
_SHIFT = 31  # a record is tick << 31 | strong << 30 | thread
_STRONG = 1 << 30
_LANE = _STRONG - 1
STRONG, WRITES, READS, RELEASES = 1, 2, 4, 8  # what an instruction is, in `Races.touch`
_STRONG_MODS = frozenset("volatile relaxed acquire release acq_rel sc mmio".split())
_ACCESSES = frozenset("ld ldu ldg st atom red".split())


def kind_of(ins: Instr) -> int:
    """The flags of a memory instruction that is strong; 0 for a plain one."""
    atomic = ins.op in ("atom", "red")
    if not atomic and not _STRONG_MODS.intersection(ins.mods):
        return 0
    flags = STRONG | (0 if ins.op == "st" else READS) | (WRITES if atomic or ins.op == "st" else 0)
    return flags | (RELEASES if {"release", "acq_rel", "sc"} & set(ins.mods) else 0)


def grain_of(program: Program, space: str) -> int:
    """log2 of the bytes of a cell: of the smallest element that the program accesses in a space, at most a word."""
    found = 2
    others = {"global", "const", "shared", "shared::cta", "local", "param", "param::entry", "param::func"}
    mine = {space, f"{space}::cta"}
    for block in program.blocks:
        for ins in block.instrs:
            if ins.op in _ACCESSES and not (others - mine) & set(ins.mods):
                found = min(found, (TYPES[ins.types[-1]][0] // 8).bit_length() - 1)
    return found


class LaunchClock:
    """What the batches of one launch share: the ticks, and what CTAs have released to and acquired from others."""

    def __init__(self, ctas: int) -> None:
        self.log = array("I", [0])  # tick -> PTX line; 0 where threads met. Grows with the launch, 4 bytes a tick
        self.fenced = False
        self.fence = np.zeros(ctas, I64)  # tick of a CTA's last fence
        self.released = np.zeros(ctas, I64)  # what its strong stores have published: the fence before the last of them
        self.acquired = np.zeros(ctas, I64)  # tick of its last strong load

    def tick(self, line: int = 0) -> int:
        self.log.append(line)
        return len(self.log) - 1


class Races:
    """What orders the threads of a batch: clocks of lanes and warps."""

    def __init__(self, batch: Batch, clock: LaunchClock) -> None:
        self.batch, self.clock = batch, clock
        self.warps = batch.shape.lanes // 32
        self.ranks = batch.cluster_size
        self.columns = self.warps * self.ranks  # of the vector clocks: the warps of a cluster
        self.met = np.zeros(batch.nlanes, I64)  # tick at which a lane last met others
        self.whole = np.zeros(batch.count, I64)  # tick of a CTA's last barrier of all its threads
        self.limit = 1 << _SHIFT  # records below it lie before a barrier that all threads of every cluster have left
        self.seen: Array | None = None  # [warp, warp of its cluster]: the ticks it has learnt of
        self.fences: Array | None = None  # [warp, ...]: what it knew at its last fence
        self.queue = np.zeros((batch.count // self.ranks, self.columns), I64)  # what strong stores have published
        self.pending: dict[tuple[int, int], Array] = {}  # (CTA, barrier) -> what bar.arrive brought
        self.base = batch.first * batch.shape.lanes  # of thread numbers in the launch
        self.stored_alike: dict[int, Array] = {}  # tick -> (lane, cell) of stores of equal bytes to one cell
        self.line, self.strong = 0, False
        self.all_met = 0  # records below it lie before a meeting of every lane with its warp
        self.fresh = False  # whether anything was accessed since all lanes met
        self.shared: RacyShared | None = None
        self.watched: Any = None  # global memory, where it is watched

    # What generated code says.

    def touch(self, lanes: Array, line: int, flags: int) -> None:
        """The next access is by these lanes, by the instruction on a line of the PTX."""
        self.line, self.strong, self.fresh = line, flags != 0, True
        if self.shared is not None:
            self.shared.lanes = lanes
        if self.watched is not None:
            self.watched.lanes, self.watched.races = lanes, self
        if flags & READS and self.batch.clusters is not None:
            self.batch.clusters.observed(lanes)
        if flags and (self.clock.fenced or flags & RELEASES):
            self._synchronise(lanes, flags)

    def meet(self, lanes: Array) -> None:
        """Lanes of a warp have met."""
        if not self.fresh:
            return
        tick = self.clock.tick()
        self.met[lanes] = tick
        if len(lanes) == len(self.met):
            self.all_met, self.fresh = tick << _SHIFT, False

    def fence(self, lanes: Array) -> None:
        """What these lanes' warps know now is what their strong stores publish."""
        tick = self.clock.tick()
        self.clock.fenced = True
        warps = np.unique(lanes >> 5)
        seen = self._seen()
        if self.fences is None:
            self.fences = np.zeros_like(seen)
        self.fences[warps] = seen[warps]
        self.fences[warps, warps % self.columns] = tick
        self.clock.fence[warps // self.warps + self.batch.first] = tick

    def _synchronise(self, lanes: Array, flags: int) -> None:
        """A strong load learns what strong stores have published; a strong store publishes what was fenced."""
        if flags & RELEASES:
            self.fence(lanes)
        tick = self.clock.tick()
        warps = np.unique(lanes >> 5)
        ctas = warps // self.warps
        self.met[lanes] = tick
        if flags & READS:
            seen = self._seen()
            seen[warps] = np.maximum(seen[warps], self.queue[ctas // self.ranks])
            self.clock.acquired[ctas + self.batch.first] = tick
        if flags & WRITES:
            if self.fences is not None:
                np.maximum.at(self.queue, ctas // self.ranks, self.fences[warps])
            self.clock.released[ctas + self.batch.first] = self.clock.fence[ctas + self.batch.first]

    # What the scheduler says.

    def barrier(self, lanes: Array, ids: Array) -> None:
        """Lanes leave a barrier together."""
        tick, batch = self.clock.tick(), self.batch
        if len(lanes) == np.count_nonzero(batch.alive) and ids.min() == ids.max() and self.fences is None:
            self.whole[:] = tick
            if self.ranks == 1:
                self.limit = (tick + 1) << _SHIFT
            self._share(np.arange(batch.count))
            self.stored_alike.clear()
            self.pending.clear()
            self.fresh = False
            return
        self.met[lanes] = tick
        came = np.bincount(batch.cta[lanes] * 16 + ids, minlength=batch.count * 16)
        living = np.bincount(batch.cta[batch.alive], minlength=batch.count)
        whole = (came.reshape(-1, 16).max(axis=1) == living) & (living > 0)
        for slot in np.nonzero(came)[0].tolist():
            index, number = divmod(slot, 16)
            if whole[index]:
                self.pending.pop((index, number), None)
                continue
            warps = np.unique(lanes[(batch.cta[lanes] == index) & (ids == number)] >> 5)
            seen = self._seen()
            seen[warps, warps % self.columns] = tick
            row = seen[warps].max(axis=0)
            arrived = self.pending.pop((index, number), None)
            seen[warps] = row if arrived is None else np.maximum(row, arrived)
        self.whole[whole] = tick
        self._share(np.nonzero(whole)[0])
        if self.fences is not None:
            # A fence before the barrier serves the thread that stores after it for all: fence, barrier, one flag.
            for index in np.nonzero(whole)[0].tolist():
                rows = slice(index * self.warps, (index + 1) * self.warps)
                self.fences[rows] = self.fences[rows].max(axis=0)
        if self.ranks == 1:
            self.limit = (int(self.whole[living > 0].min()) + 1) << _SHIFT

    def cluster_barrier(self, left: Array) -> None:
        """Lanes have left the cluster barrier; `left` is, for every lane, the tick at which the last one completed."""
        self.limit = (int(left[self.batch.alive].min(initial=self.clock.tick())) + 1) << _SHIFT

    def _share(self, ctas: Array) -> None:
        """All threads of these CTAs have met: what a warp knows of other CTAs of its cluster, all its CTA knows."""
        if self.ranks == 1 or self.seen is None or not len(ctas):
            return
        rows = self.seen.reshape(-1, self.warps, self.columns)
        rows[ctas] = rows[ctas].max(axis=1, keepdims=True)

    def arrive(self, lanes: Array, ids: Array) -> None:
        """bar.arrive: others will know what these lanes did; they learn nothing."""
        tick = self.clock.tick()
        seen = self._seen()
        for warp, number in {(int(lane) >> 5, int(i)) for lane, i in zip(lanes, ids, strict=True)}:
            seen[warp, warp % self.columns] = tick
            key = (warp // self.warps, number)
            old = self.pending.get(key)
            self.pending[key] = seen[warp].copy() if old is None else np.maximum(old, seen[warp])

    def release(self, lanes: Array) -> Array:
        """What the warps of these lanes know, for whoever acquires it; they are of one cluster."""
        tick = self.clock.tick()
        seen = self._seen()
        self.met[lanes] = tick
        warps = warps_of(lanes)
        seen[warps, warps % self.columns] = tick
        found: Array = seen[warps].max(axis=0)
        return found

    def acquire(self, lanes: Array, row: Array) -> None:
        """The warps of these lanes learn what was released."""
        seen = self._seen()
        warps = warps_of(lanes)
        seen[warps] = np.maximum(seen[warps], row)
        self.met[lanes] = self.clock.tick()

    def _seen(self) -> Array:
        """The vector clocks, at least what the last whole barrier of each CTA gave."""
        if self.seen is None:
            self.seen = np.zeros((self.batch.count * self.warps, self.columns), I64)
        ranks = self.ranks
        if ranks == 1:
            np.maximum(self.seen, np.repeat(self.whole, self.warps)[:, None], out=self.seen)
            return self.seen
        own = self.seen.reshape(-1, ranks, self.warps, ranks, self.warps)
        for rank in range(ranks):
            mine = own[:, rank, :, rank, :]
            np.maximum(mine, self.whole[rank::ranks, None, None], out=mine)
        return self.seen

    # Order.

    def after(self, lanes: Array, tick: int, lane: int) -> Array:
        """Positions of the lanes that what a lane did at a tick does not happen before."""
        return self.pairs_unordered(lanes, np.full(len(lanes), tick), np.full(len(lanes), lane))

    def pairs_unordered(self, lanes: Array, ticks: Array, others: Array) -> Array:
        """Positions where nothing orders what a lane does now after what the other did at a tick."""
        strong, self.strong = self.strong, False
        found = self.unordered(lanes, ticks << _SHIFT | others, 0, np.zeros(len(lanes), I64))
        self.strong = strong
        return found

    def unordered(self, lanes: Array, records: Array, base: int, cells: Array) -> Array:
        """Positions of the accesses that nothing orders after the records of other threads. 0 is no record."""
        if int(records.max()) < self.all_met and not ((records & _LANE) ^ (lanes + base)).max() >> 5:
            return _NONE  # all within warps that have met since
        ticks, all_lanes = records >> _SHIFT, lanes
        cta = self.batch.cta[lanes]
        other = (records & _LANE) - base
        suspect = (records != 0) & (other != lanes)
        if self.strong:
            suspect &= (records & _STRONG) == 0
        lanes_per_cta = self.batch.shape.lanes
        owner = other // lanes_per_cta
        near = owner // self.ranks == cta // self.ranks
        suspect &= (owner != cta) | (ticks > self.whole[cta])
        at: Array = np.nonzero(suspect)[0]
        if not len(at):
            return at
        lanes, other, ticks, near, cta = lanes[at], other[at], ticks[at], near[at], cta[at]
        mine = np.where(near, other, lanes)  # any lane of this batch where the other is not
        together = (self.met[mine] > ticks) & (self.met[lanes] > ticks)
        if self.seen is None:
            ordered = (lanes >> 5 == mine >> 5) & together
        else:
            known = self.seen[lanes >> 5, (mine >> 5) % self.columns] >= ticks
            ordered = np.where(lanes >> 5 == mine >> 5, together, known)
        if not near.all():
            first = (other + base) // lanes_per_cta
            far = (ticks <= self.clock.released[first]) & (ticks < self.clock.acquired[cta + self.batch.first])
            ordered = np.where(near, ordered, far)
        at = at[~ordered]
        if self.stored_alike and len(at):
            # A thread that stored the same bytes in the same instruction finds what it would have found alone.
            ticks = records[at] >> _SHIFT
            pairs = _pairs(all_lanes[at] + base, cells[at])
            excused = np.zeros(len(at), np.bool_)
            for tick in np.unique(ticks).tolist():
                if tick in self.stored_alike:
                    excused |= (ticks == tick) & np.isin(pairs, self.stored_alike[tick])
            at = at[~excused]
        return np.asarray(at)

    # Messages.

    def fault(self, kind: str, what: str, record: int, base: int, bad: Array) -> LaneFault:
        batch, program = self.batch, self.batch.program
        thread = (record & _LANE) - base
        cta_index, tid = divmod(thread + batch.first * batch.shape.lanes, batch.shape.lanes)
        cta, name = ctaid(cta_index, batch.shape.grid, batch.shape.cluster), split(tid, batch.shape.block)
        line = self.clock.log[record >> _SHIFT]
        ins = next((i for block in program.blocks for i in block.instrs if i.line == line), None)
        place = where(program.ptx, ins, batch.machine.source_roots, "    ")
        verb = "load" if kind == "WAR" else "store"
        return LaneFault(
            f"{kind} race on {what}: nothing orders it after the {verb} of CTA {cta}, thread {name}, at{place}", bad
        )


def warps_of(lanes: Array) -> Array:
    """The warps of lanes, which are in order."""
    warps: Array = lanes >> 5
    if len(warps) < 2:
        return warps
    first = np.ones(len(warps), np.bool_)
    np.not_equal(warps[1:], warps[:-1], out=first[1:])
    found: Array = warps[first]
    return found


def _pairs(threads: Array, cells: Array) -> Array:
    """One number for each thread and cell."""
    found: Array = (threads << 33) + cells
    return found


class Shadow:
    """The records of a memory: last store, and the last two loads by different threads, of each cell."""

    def __init__(self, cells: int) -> None:
        self.stores = np.zeros(cells, I64)
        self.loads = np.zeros(cells, I64)
        self.loads_before = np.zeros(cells, I64)

    def read(self, races: Races, cells: Array, lanes: Array, base: int, limit: int) -> tuple[Array, Array]:
        """Remember loads; returns the positions of those that race with a store, and the records of these."""
        stores = self.stores.take(cells)
        if int(stores.max()) >= limit:
            bad = races.unordered(lanes, stores, base, cells)
            if len(bad):
                return bad, stores[bad]
        tick = races.clock.tick(races.line)
        record = lanes + ((tick << _SHIFT) + _STRONG * races.strong + base)
        old = self.loads.take(cells)
        self.loads[cells] = record
        if int(old.max()) >= limit:
            keep = np.nonzero(((old ^ record) & _LANE != 0) & (old >= limit))[0]
            self.loads_before[cells[keep]] = old[keep]
        lost = self.loads.take(cells) != record
        if lost.any():  # several lanes load one cell
            self.loads_before[cells[lost]] = record[lost]
        return _NONE, _NONE

    def conflicts(
        self, races: Races, cells: Array, lanes: Array, base: int, limit: int
    ) -> Iterable[tuple[str, Array, Array]]:
        """(class, positions, records) of the stores or atomics that race with what is remembered."""
        for kind, kept in (("WAW", self.stores), ("WAR", self.loads), ("WAR", self.loads_before)):
            records = kept.take(cells)
            if int(records.max()) < limit:
                if kept is self.loads:
                    return  # the load before it is no later
                continue
            bad = races.unordered(lanes, records, base, cells)
            if len(bad):
                yield kind, bad, records[bad]

    def write(self, races: Races, cells: Array, lanes: Array, base: int, plain: bool) -> tuple[Array, Array]:
        """Remember stores; returns the positions that another lane of the instruction overwrote, and its records."""
        tick = races.clock.tick(races.line)
        record = lanes + ((tick << _SHIFT) + _STRONG * races.strong + base)
        self.stores[cells] = record
        now = self.stores.take(cells)
        lost: Array = np.nonzero(now != record)[0]
        if plain and len(lost):
            races.stored_alike[tick] = _pairs(lanes + base, cells)
        return lost, now[lost]


def cells_of(at: Array, lanes: Array, size: int, grain: int) -> tuple[Array, Array, int]:
    """(cells, their lanes, cells an access) of accesses of `size` bytes at byte positions."""
    first, many = at >> grain, max(size >> grain, 1)  # printf reads bytes in a kernel that reads words
    if many == 1:
        return first, lanes, 1
    return (first[:, None] + np.arange(many)).reshape(-1), lanes.repeat(many), many


class Watch:
    """The checks of one memory: its records, and whose access the next one is."""

    def __init__(self, name: str, grain: int, shadow: Callable[[], Shadow], in_launch: bool) -> None:
        self.name, self.grain, self.shadow, self.in_launch = name, grain, shadow, in_launch

    def _bounds(self, races: Races) -> tuple[int, int]:
        """(number of the batch's first thread, records below this are ordered before everything)."""
        return (races.base, 1) if self.in_launch else (0, races.limit)

    def _raise(
        self, races: Races, kind: str, what: str, addr: Array, many: int, records: Array, bad: Array
    ) -> LaneFault:
        place = f"{self.name}: {what} at {'' if self.in_launch else 'shared offset '}{int(addr[bad[0] // many]):#x}"
        return races.fault(kind, place, int(records[0]), self._bounds(races)[0], np.unique(bad // many))

    def read(self, races: Races, lanes: Array, addr: Array, at: Array, size: int) -> None:
        cells, lanes, many = cells_of(at, lanes, size, self.grain)
        bad, records = self.shadow().read(races, cells, lanes, *self._bounds(races))
        if len(bad):
            raise self._raise(races, "RAW", f"{size}-byte load", addr, many, records, bad)

    def atomic(self, races: Races, lanes: Array, addr: Array, at: Array, size: int) -> None:
        cells, lanes, many = cells_of(at, lanes, size, self.grain)
        base, limit = self._bounds(races)
        for kind, bad, records in self.shadow().conflicts(races, cells, lanes, base, limit):
            raise self._raise(races, kind, "atomic", addr, many, records, bad)
        self.shadow().write(races, cells, lanes, base, False)

    def store(
        self, races: Races, lanes: Array, addr: Array, at: Array, size: int,
        changes: Callable[[Array], Array], put: Callable[[], None],
    ) -> None:  # fmt: skip
        """Check a store and do it. `changes` says of accesses whether they would change memory as it is."""
        cells, lanes, many = cells_of(at, lanes, size, self.grain)
        base, limit = self._bounds(races)
        what = f"{size}-byte store"
        for kind, bad, records in self.shadow().conflicts(races, cells, lanes, base, limit):
            loud = changes(bad // many)
            races.batch.report.quiet_races += len(np.unique(bad[~loud] // many))
            if loud.any():
                raise self._raise(races, kind, what, addr, many, records[loud], bad[loud])
        lost, records = self.shadow().write(races, cells, lanes, base, not races.strong)
        put()
        if len(lost) and not races.strong:
            # Lanes of one warp in one instruction: one of them writes, unspecified which. Compilers rely on that where
            # all lanes hold a result that differs in rounding only (Triton's reductions).
            one_warp = ((records & _LANE) - base) >> 5 == lanes[lost] >> 5
            races.batch.report.quiet_races += len(np.unique(lost[one_warp] // many))
            loud = changes(lost // many) & ~one_warp
            if loud.any():
                raise self._raise(races, "WAW", what, addr, many, records[loud], lost[loud])


def changes_of(view: Array, place: Array, values: Any) -> Callable[[Array], Array]:
    """Whether accesses with elements `values` at `place` and after differ from what a view holds."""

    def changes(which: Array) -> Array:
        different = np.zeros(len(which), np.bool_)
        for j, value in enumerate(values):
            different |= view[place[which] + j] != np.broadcast_to(value, place.shape)[which]
        return different

    return changes


class RacyShared(LaneMemory):
    """Shared memory that knows who touches it."""

    def __init__(self, races: Races, slices: int, size: int) -> None:
        super().__init__("shared", slices, size, SHARED_FIRST)
        self.races = races
        self.lanes: Array = np.zeros(0, I64)
        self._slices = slices
        self._kept: Shadow | None = None
        self.flight: Flight | None = None  # what asynchronous operations touch, once there is one
        self.tiles: Tiles | None = None  # where tiles lie, in kernels whose products read them
        self._watch = Watch("shared memory", grain_of(races.batch.program, "shared"), self._shadow, False)
        self._atomic = False

    def _shadow(self) -> Shadow:
        if self._kept is None:
            self._kept = Shadow(self._slices * self.stride >> self._watch.grain)
        return self._kept

    def place(self, addr: Array, base: Array, size: int, write: bool) -> Array:
        at = super().place(addr, base, size, write)
        if self.flight is not None:
            self.flight.check(self.lanes, at, size, write)
        if write and self.tiles is not None:
            self.tiles.forget(at, size)
        if not write:
            self._watch.read(self.races, self.lanes, addr, at, size)
        elif self._atomic:
            self._watch.atomic(self.races, self.lanes, addr, at, size)
        return at

    def store(self, addr: Array, base: Array, value: Array, k: int) -> None:
        self.store_vector(addr, base, (value,), k)

    def store_vector(self, addr: Array, base: Array, values: Any, k: int) -> None:
        size = len(values) << k
        at = self.place(addr, base, size, True)

        def put() -> None:
            for j, value in enumerate(values):
                self.views[k][(at >> k) + j] = value
                self.written[k][(at >> k) + j] = used_flags(k, 0, None)

        changes = changes_of(self.views[k], at >> k, values)
        self._watch.store(self.races, self.lanes, addr, at, size, changes, put)
        self.version += 1

    def claim(self, lanes: Array, lo: int, hi: int, write: bool, what: str, line: int) -> None:
        """An asynchronous operation issued by lanes will read or write positions [lo, hi): see who touched them.

        Raises:
            LaneFault: nothing orders the issue after an ordinary access.
        """
        shadow, grain = self._kept, self._watch.grain
        if shadow is None:
            return
        cells = slice(lo >> grain, -(-hi >> grain))
        kinds = [("WAW", shadow.stores), ("WAR", shadow.loads), ("WAR", shadow.loads_before)]
        for kind, kept in kinds if write else [("RAW", shadow.stores)]:
            part = kept[cells]
            if int(part.max(initial=0)) < self.races.limit:
                continue
            records = np.unique(part[part >= self.races.limit])
            ticks, others = records >> _SHIFT, records & _LANE
            for lane in lanes[:1] if len(lanes) == 1 else lanes.tolist():
                bad = self.races.pairs_unordered(np.full(len(records), lane), ticks, others)
                if len(bad):
                    raise self.races.fault(kind, f"shared memory: {what}", int(records[bad[0]]), 0, np.zeros(1, I64))
        if write:
            for kept in (shadow.stores, shadow.loads, shadow.loads_before):
                kept[cells] = 0

    def claim_pieces(self, lanes: Array, at: Array, size: int, what: str) -> None:
        """The same for pieces of equal size, one for each lane, that an instruction will write."""
        shadow = self._kept
        if shadow is None:
            return
        cells, owners, many = cells_of(at, lanes, size, self._watch.grain)
        for kind, bad, records in shadow.conflicts(self.races, cells, owners, 0, self.races.limit):
            offset = int(at[bad[0] // many]) % self.stride + self.first
            place = f"shared memory: {what} to shared offset {offset:#x}"
            raise self.races.fault(kind, place, int(records[0]), 0, np.unique(bad // many))
        for kept in (shadow.stores, shadow.loads, shadow.loads_before):
            kept[cells] = 0

    def stored(self, lanes: Array, at: Array, size: int, line: int) -> None:
        """Pieces that an instruction wrote count as stores of the lanes, done now."""
        cells, owners, _ = cells_of(at, lanes, size, self._watch.grain)
        self.races.line, self.races.strong, self.races.fresh = line, False, True
        self._shadow().write(self.races, cells, owners, 0, False)

    def last_stores(self, words: Array) -> tuple[Array, Array]:
        """(lane, tick) of the last ordinary store to each word."""
        kept = self._shadow().stores
        many = 4 >> self._watch.grain
        records = kept.reshape(-1, many)[words].max(axis=1) if many > 1 else kept[words]
        return records & _LANE, records >> _SHIFT

    def atomic(self, addr: Array, base: Array, k: int, update: Any) -> Any:
        self._atomic = True
        try:
            return super().atomic(addr, base, k, update)
        finally:
            self._atomic = False


class RacyGeneric(Generic):
    """Generic addresses: tells each space which lanes its part of an access belongs to."""

    def _split(self, addr: Array, base: tuple[Array, Array]) -> list[tuple[int, Array | None, Array, Any]]:
        found = super()._split(addr, base)
        for space, at, _, _ in found:
            memory = self.spaces[space]
            lanes = getattr(memory, "lanes", None)
            if at is not None and lanes is not None:
                memory.lanes = lanes[at]
        return found
