"""What asynchronous operations touch, and who knows that they are complete.

Each shared range an op reads or writes is an `Entry` of its CTA until somebody who knows of the op's completion writes
over it, or the whole CTA knows. Knowledge begins with a thread's own wait (of an mbarrier's phase, of a group) and
travels as `races.py` says: by barriers, mbarriers, warp-wide operations, fences with strong accesses.

    touched by                 while in flight, or unknown to who touches
    a load                     a destination: "before its completion was observed"
    a store, another op        a destination or a source: "may still be written", "may still be read"

One byte for each word of shared memory says whether anything is to be looked up there, so that ordinary accesses cost
one vector operation more, and nothing in kernels without asynchronous operations. The same byte says which words wait
for a proxy fence: written by ordinary stores since the last fence.proxy.async of a thread that those stores happen
before. An op of the async proxy that reads such a word, or one whose fence is not ordered before the op, is an error.
The fence may be the writer's, before the barrier, or the issuing thread's, after it: the PTX memory model asks for one
anywhere on the causality path. What cp.async wrote needs none here, though PTX counts it to the generic proxy: Triton's
pipelines multiply it by wgmma without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.async_ import Op, Span
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
I64 = np.int64
WRITING, READING, UNFENCED = 1, 2, 4
SERVICES = 16  # proxy fences that are remembered one by one
_NONE = np.zeros(0, I64)
_SPREAD = 0x01010101


class Completion:
    """Who knows that something is complete: observations as (tick, lane), and lanes known to know.

    parties: lanes that must all have observed it; empty where one observation is as good as any (an mbarrier's phase).
    later: the completion of the next phase, whose observers know this one too.
    phases: of a tcgen05.commit: those of the mbarriers it has arrived on; who knows one of them knows this.
    """

    __slots__ = ("later", "parties", "phases", "records", "seen")

    def __init__(self, parties: tuple[int, ...] = ()) -> None:
        self.parties = parties
        self.records: list[tuple[int, int]] = []
        self.seen: Array | None = None
        self.later: Completion | None = None
        self.phases: list[Completion] | None = None


class Entry:
    """A range of shared memory that an op reads or writes; positions in the batch's shared memory.

    Without an op it is a live mbarrier, initialised on a line.
    """

    __slots__ = ("hi", "line", "lo", "op", "seen", "write")

    def __init__(self, op: Op | None, lo: int, hi: int, write: bool, seen: Completion | None, line: int = 0) -> None:
        self.op, self.lo, self.hi, self.write, self.seen, self.line = op, lo, hi, write, seen, line

    def hit(self, at: Array, size: int) -> Array:
        """Which accesses of `size` bytes at some positions touch it."""
        found: Array = (at < self.hi) & (at + size > self.lo)
        return found


class Pieces(Entry):
    """What one instruction of many lanes writes: pieces of equal size, each with the lane that must wait for it."""

    __slots__ = ("lanes", "order", "places", "size")

    def __init__(self, op: Op, places: Array, size: int, lanes: Array, seen: Completion | None = None) -> None:
        super().__init__(op, 0, 0, True, seen)
        self.places, self.size, self.lanes = places, size, lanes
        self._bound()

    def _bound(self) -> None:
        self.order = np.sort(self.places)
        if len(self.places):
            self.lo, self.hi = int(self.order[0]), int(self.order[-1]) + self.size

    def hit(self, at: Array, size: int) -> Array:
        last = np.searchsorted(self.order, at + size, side="left") - 1  # the last piece that begins before the end
        found: Array = (last >= 0) & (self.order[np.maximum(last, 0)] + self.size > at)
        return found

    def split(self, chosen: Array) -> tuple[Array, Array]:
        """Take chosen pieces out; returns their places and lanes."""
        taken = self.places[chosen], self.lanes[chosen]
        self.places, self.lanes = self.places[~chosen], self.lanes[~chosen]
        self._bound()
        return taken


class Service:
    """What a proxy fence has done: for words that lanes stored themselves (`own`), or that happen before it.

    stores: records of these stores. after: lanes that have fenced after all of them; fences: when, as (tick, lane).
    """

    __slots__ = ("after", "fences", "own", "stores", "tick")

    def __init__(self, tick: int, own: bool, stores: Array, nlanes: int) -> None:
        self.tick, self.own, self.stores = tick, own, stores
        self.after = np.zeros(nlanes, np.bool_)
        self.fences: list[tuple[int, int]] = []


class Flight:
    """The entries of a batch, by CTA."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.entries: list[list[Entry]] = [[] for _ in range(batch.count)]
        self.hot: Array = np.zeros(0, np.uint8)  # flags of each word
        self.views: tuple[Array, ...] = ()
        self.fenced: Array = np.zeros(0, I64)  # tick of the service of a word, as a record of `races.py`
        self.services: dict[int, Service] = {}  # by tick; only the latest are kept, older ones count as ordered
        self.proxied = batch.program.proxied
        if self.proxied:  # stores before the first operation need a fence too
            self.start()

    def start(self) -> None:
        """From now on shared memory asks `check`."""
        if len(self.hot):
            return
        words = self.batch.count * self.batch.shared.stride >> 2
        self.hot = np.zeros(words, np.uint8)
        self.views = (self.hot, self.hot.view(np.uint16), self.hot.view(np.uint32))
        self.fenced = np.zeros(words if self.proxied else 0, I64)
        self.batch.shared.flight = self

    # Knowledge.

    def observe(self, completions: list[Completion], lanes: Array) -> None:
        """Lanes have waited for these."""
        batch = self.batch
        tick = batch.races.clock.tick()
        batch.races.fresh = True
        warps = lanes >> 5
        first = np.ones(len(lanes), np.bool_)
        first[1:] = warps[1:] != warps[:-1]
        records = [(tick, int(lane)) for lane in lanes[first]]
        for each in completions:
            if each.seen is None:
                each.seen = np.zeros(batch.nlanes, np.bool_)
            elif not each.parties and each.seen[lanes].all():
                continue
            each.seen[lanes] = True
            each.records += records

    def unknown(self, seen: Completion | None, lanes: Array) -> Array:
        """The positions of the lanes that do not know of a completion."""
        left = np.arange(len(lanes))
        if seen is None:
            return left
        if seen.parties:
            for party in seen.parties:
                records = [r for r in seen.records if r[1] >> 5 == party >> 5]
                if len(self._unordered(lanes, records)):
                    return left
            return _NONE
        at: Completion | None = seen
        if seen.phases is not None:
            while at is not None and len(left):
                for phase in at.phases or ():
                    left = left[self.unknown(phase, lanes[left])]
                at = at.later
            return left
        while at is not None and len(left):
            if at.seen is not None:
                left = left[~at.seen[lanes[left]]]
            at = at.later
        if not len(left):
            return left
        at = seen
        while at is not None and len(left):
            left = left[self._unordered(lanes[left], at.records)]
            at = at.later
        if len(left) < len(lanes):
            if seen.seen is None:
                seen.seen = np.zeros(self.batch.nlanes, np.bool_)
            know = np.ones(len(lanes), np.bool_)
            know[left] = False
            seen.seen[lanes[know]] = True
        return left

    def _unordered(self, lanes: Array, records: list[tuple[int, int]]) -> Array:
        """The positions of the lanes that none of the observations happens before."""
        left = np.arange(len(lanes))
        for tick, lane in records:
            if not len(left):
                break
            left = left[self.batch.races.after(lanes[left], tick, lane)]
        return left

    def _everyone(self, seen: Completion | None, cta: int) -> bool:
        """Whether a barrier of the whole CTA has told all its threads."""
        if seen is None:
            return False
        if seen.phases is not None:
            return any(self._everyone(phase, cta) for phase in seen.phases)
        batch = self.batch
        whole = int(batch.races.whole[cta])
        told = {lane >> 5 for tick, lane in seen.records if tick <= whole and int(batch.cta[lane]) == cta}
        if seen.parties:
            return all(party >> 5 in told for party in seen.parties)
        if told:
            return True
        if seen.seen is None:
            return False
        first = cta * batch.shape.lanes
        mine = slice(first, first + batch.shape.lanes)
        return bool((seen.seen[mine] | ~batch.alive[mine]).all())

    # Entries.

    def add(self, entry: Entry, cta: int) -> None:
        self.start()
        self.entries[cta].append(entry)
        self._mark(entry)

    def _mark(self, entry: Entry) -> None:
        if isinstance(entry, Pieces):
            self._flag(entry.places, entry.size, WRITING)
            return
        self.hot[entry.lo >> 2 : (entry.hi + 3) >> 2] |= WRITING if entry.write else READING

    def _flag(self, places: Array, size: int, flags: int, keep: int = 0xFF) -> None:
        """Set flags of the words of pieces, after clearing those not in `keep`."""
        k = 0 if size <= 4 else 1 if size == 8 else 2
        view, spread = self.views[k], _SPREAD & (1 << 8 * (1 << k)) - 1
        at = places >> (2 + k)
        view[at] = view[at] & view.dtype.type(keep * spread) | view.dtype.type(flags * spread)

    def drop(self, entry: Entry, cta: int) -> None:
        """Forget an entry."""
        entries = self.entries[cta]
        entries.remove(entry)
        if isinstance(entry, Pieces):
            self._flag(entry.places, entry.size, 0, UNFENCED)
            return
        self.hot[entry.lo >> 2 : (entry.hi + 3) >> 2] &= UNFENCED
        for other in entries:
            if other.lo < entry.hi and other.hi > entry.lo:
                self._mark(other)

    def check(self, lanes: Array, at: Array, size: int, write: bool) -> None:
        """An ordinary access of lanes at positions of shared memory: see that nothing in flight is touched."""
        k = 0 if size <= 4 else 1 if size == 8 else 2
        flags = WRITING | READING if write else WRITING
        hot = self.views[k].take(at >> (2 + k)) & self.views[k].dtype.type(flags * (_SPREAD & (1 << 8 * (1 << k)) - 1))
        if hot.any():
            self._look(lanes, at, size, write)
        if write and self.proxied:
            self.views[k][at >> (2 + k)] |= self.views[k].dtype.type(UNFENCED * (_SPREAD & (1 << 8 * (1 << k)) - 1))

    def _look(self, lanes: Array, at: Array, size: int, write: bool) -> None:
        ctas = at // self.batch.shared.stride
        for cta in np.unique(ctas).tolist():
            mine = np.nonzero(ctas == cta)[0]
            place = at[mine]
            for entry in list(self.entries[cta]):
                if not write and not entry.write:
                    continue
                hit = mine[entry.hit(place, size)]
                if not len(hit):
                    continue
                bad = hit[self.unknown(entry.seen, lanes[hit])]
                if len(bad):
                    offset = int(at[bad[0]]) % self.batch.shared.stride + SHARED_FIRST
                    verb = "store to" if write else "load of"
                    raise LaneFault(self._explain(f"{size}-byte {verb} shared offset {offset:#x}", entry, write), bad)
                if self._everyone(entry.seen, cta):
                    self.drop(entry, cta)

    def _explain(self, what: str, entry: Entry, write: bool) -> str:
        op = entry.op
        if op is None:
            return f"{what}: those are bytes of a live mbarrier, initialised at{self.batch.engine.place(entry.line)}"
        place = self.batch.engine.place(op.line)
        state = "has not completed" if op.state != 2 else "has completed, but this thread has not waited for it"
        if not entry.write:
            how = "overwrites the source of"
        else:
            how = "overwrites the destination of" if write else "reads the destination of"
        return f"{what} {how} an asynchronous {op.kind} that {state}, issued at{place}"

    def overwrite(self, lanes: Array, lo: int, hi: int, what: str, line: int) -> None:
        """Check that lanes may write positions [lo, hi), forget what is known of them."""
        cta = lo // self.batch.shared.stride
        self.start()
        for entry in [e for e in self.entries[cta] if e.lo < hi and e.hi > lo]:
            if len(self.unknown(entry.seen, lanes)):
                raise LaneFault(self._explain(f"{what} at {self._offset(lo)}", entry, True), np.arange(len(lanes)))
            if lo <= entry.lo and entry.hi <= hi:
                self.drop(entry, cta)
        self.batch.shared.claim(lanes, lo, hi, True, f"{what} at {self._offset(lo)}", line)

    def _offset(self, at: int) -> str:
        return f"shared offset {at % self.batch.shared.stride + SHARED_FIRST:#x}"

    # Operations.

    def claim(self, op: Op) -> None:
        """Check an op's ranges as of its issue, and add them."""
        self.start()
        lanes = np.array(op.parties or (op.lane,))
        memo: dict[int, bool] = {}
        for write, spans in ((False, op.reads), (True, op.writes)):
            for span in spans:
                self._claim_span(op, span, write, lanes, memo)
        for span in op.writes:
            self._enter(op, span, True, op.results)
        for span in op.reads:
            self._enter(op, span, False, op.sources)

    def _enter(self, op: Op, span: Span, write: bool, seen: Completion | None) -> None:
        lo = self.batch.engine.start(span)
        entry = Entry(op, lo, lo + span.hi - span.lo, write, seen)
        op.entries.append(entry)
        self.add(entry, span.cta)

    def _claim_span(self, op: Op, span: Span, write: bool, lanes: Array, memo: dict[int, bool]) -> None:
        lo = self.batch.engine.start(span)
        hi = lo + span.hi - span.lo
        entries = self.entries[span.cta]
        for entry in list(entries) if entries else ():
            if entry.lo >= hi or entry.hi <= lo or not (write or entry.write):
                continue
            if isinstance(entry, Pieces) and not ((entry.places < hi) & (entry.places + entry.size > lo)).any():
                continue
            key = id(entry.seen)
            if key not in memo:
                memo[key] = not len(self.unknown(entry.seen, lanes))
            if not memo[key]:
                what = f"{op.kind} on shared offset {span.lo:#x}"
                raise LaneFault(self._explain(what, entry, write), np.zeros(1, I64))
            if write and lo <= entry.lo and entry.hi <= hi:
                self.drop(entry, span.cta)
        words = slice(lo >> 2, (hi + 3) >> 2)
        if not write and op.proxy == "async" and self.proxied:
            self._check_fence(op, words, lanes)
        self.batch.shared.claim(lanes, lo, hi, write, f"{op.kind} on shared offset {span.lo:#x}", op.line)
        if write:
            self.hot[words] &= WRITING | READING
            if self.proxied:
                self.fenced[words] = 0

    # Operations of many lanes, for which each lane waits itself.

    def claim_pieces(self, op: Op, lanes: Array, places: Array, size: int) -> None:
        """Check what the lanes of one instruction are going to write, and add it."""
        self.start()
        self.check(lanes, places, size, True)
        self.batch.shared.claim_pieces(lanes, places, size, op.kind)
        if self.proxied:
            self._flag(places, size, 0, WRITING | READING)
        ctas = places // self.batch.shared.stride
        for cta in np.unique(ctas).tolist():
            mine = ctas == cta
            entry = Pieces(op, places[mine], size, lanes[mine])
            op.entries.append(entry)
            self.add(entry, cta)

    def waited(self, op: Op, lanes: Array) -> None:
        """Lanes (as flags) have waited for their pieces: from now on these are stores of theirs."""
        for entry in list(op.entries):
            assert isinstance(entry, Pieces)
            chosen = lanes[entry.lanes]
            if entry.seen is not None or not chosen.any():
                continue
            places, who = entry.split(chosen)
            self._flag(places, entry.size, 0, UNFENCED)  # no fence is asked for: see the top
            self.batch.shared.stored(who, places, entry.size, op.line)
            if not len(entry.places):
                op.entries.remove(entry)
                self.entries[int(places[0]) // self.batch.shared.stride].remove(entry)

    def attach(self, op: Op, lanes: Array, seen: Completion) -> None:
        """The pieces of lanes (as flags) are known to be complete by a phase of an mbarrier."""
        for entry in list(op.entries):
            assert isinstance(entry, Pieces)
            chosen = lanes[entry.lanes]
            if entry.seen is not None or not chosen.any():
                continue
            cta = int(entry.places[0]) // self.batch.shared.stride
            places, who = entry.split(chosen)
            part = Pieces(op, places, entry.size, who, seen)
            op.entries.append(part)
            self.entries[cta].append(part)
            if not len(entry.places):
                op.entries.remove(entry)
                self.entries[cta].remove(entry)

    # The proxies.

    def fence(self, lanes: Array) -> None:
        """fence.proxy.async: serves the lanes' own stores, and those of others that happen before it."""
        if not self.proxied:
            return
        batch = self.batch
        for service in self.services.values():
            self._join(service, lanes)
        stride = batch.shared.stride >> 2
        for cta in np.unique(batch.cta[lanes]).tolist():
            words = np.nonzero(self.hot[cta * stride : (cta + 1) * stride] & UNFENCED)[0] + cta * stride
            if not len(words):
                continue
            writers, ticks = batch.shared.last_stores(words)
            here = lanes[batch.cta[lanes] == cta]
            own = np.isin(writers, here)
            self._serve(here, words[own], ticks[own], writers[own], True)
            self._serve(here, words[~own], ticks[~own], writers[~own], False)

    def _serve(self, lanes: Array, words: Array, ticks: Array, writers: Array, own: bool) -> None:
        """Words that a fence of lanes serves: all if they are the lanes' own, else those that it comes after."""
        if not own and len(words):
            late = np.ones(len(words), np.bool_)
            for lane in lanes[_heads(lanes)].tolist():
                left = np.nonzero(late)[0]
                late[left] = False
                late[left[self.batch.races.pairs_unordered(np.full(len(left), lane), ticks[left], writers[left])]] = (
                    True
                )
                if not late.any():
                    break
            words, ticks, writers = words[~late], ticks[~late], writers[~late]
        if not len(words):
            return
        tick = self.batch.races.clock.tick()
        service = Service(tick, own, np.unique(ticks << 31 | writers), self.batch.nlanes)
        self._join(service, lanes)
        self.services[tick] = service
        if len(self.services) > SERVICES:
            del self.services[next(iter(self.services))]
        self.hot[words] &= WRITING | READING
        self.fenced[words] = tick << 31

    def _join(self, service: Service, lanes: Array) -> None:
        """Note which of the lanes of a fence come after all stores of a service: they may issue an operation."""
        if service.after[lanes].all():
            return
        stores = service.stores
        for head in lanes[_heads(lanes)].tolist():
            ticks, writers = stores >> 31, stores & ((1 << 30) - 1)
            if not len(self.batch.races.pairs_unordered(np.full(len(stores), head), ticks, writers)):
                service.after[lanes[lanes >> 5 == head >> 5]] = True
                service.fences.append((self.batch.races.clock.tick(), head))

    def _check_fence(self, op: Op, words: slice, lanes: Array) -> None:
        """An op of the async proxy, issued by lanes, reads words: each needs a fence between its store and the op."""
        late = np.nonzero(self.hot[words] & UNFENCED)[0]
        if len(late):
            raise self._unfenced(op, words.start + int(late[0]))
        records = self.fenced[words]
        if int(records.max(initial=0)) < self.batch.races.limit:
            return
        for record in np.unique(records[records > 0]).tolist():
            service = self.services.get(record >> 31)
            if service is None:
                continue
            left = lanes[~service.after[lanes]]
            left = left[self._unordered(left, service.fences)]
            if not len(left):
                continue
            mine = words.start + np.nonzero(records == record)[0]
            writers = np.unique(self.batch.shared.last_stores(mine)[0])
            ticks = np.full(len(writers), service.tick)
            for lane in left.tolist():
                if not service.own or len(
                    self.batch.races.pairs_unordered(np.full(len(writers), lane), ticks, writers)
                ):
                    raise self._unfenced(op, int(mine[0]))

    def _unfenced(self, op: Op, word: int) -> LaneFault:
        offset = (word << 2) % self.batch.shared.stride + SHARED_FIRST
        writer, ticks = self.batch.shared.last_stores(np.array([word]))
        place = self.batch.engine.place(self.batch.races.clock.log[int(ticks[0])])
        cta, thread = self.batch.thread(int(writer[0]))
        return LaneFault(
            f"{op.kind} reads shared offset {offset:#x} through the async proxy, but no fence.proxy.async lies between "
            f"it and the store of CTA {cta}, thread {thread}, at{place}",
            np.zeros(1, I64),
        )


def _heads(lanes: Array) -> Array:
    """Positions of the first lane of each warp among lanes in order."""
    first = np.ones(len(lanes), np.bool_)
    np.not_equal(lanes[1:] >> 5, lanes[:-1] >> 5, out=first[1:])
    found: Array = np.nonzero(first)[0]
    return found
