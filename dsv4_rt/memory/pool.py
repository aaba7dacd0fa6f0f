"""KVPool: sequences, their pages and block tables, prefix reuse, admission. The public face of dsv4_rt.memory.

    pool = KVPool(KVLayout.for_model(FLASH), budget=0.8, max_sequences=256, max_length=1_048_576)
    seq = pool.create(prompt)                       # pool.length(seq) tokens of it are there already
    while ...:                                      # a step
        pool.extend(seqs, counts)                   # all or nothing
        pool.upload()                               # copies, then what changed in the tables
        step = pool.begin_step()
        ...                                         # kernels write through slot_mapping, read through block_table
        pool.end_step(step)                         # when the device is through
    pool.free(seq)

Rules. Everything a call refuses it refuses before it changes anything. The stream's order is the truth: what was
uploaded and launched counts as computed when the sequence is next extended, forked, preempted or freed. One writer at
a time: any thread may call, but a call that begins while another runs raises PoolMisuse, which costs one try-lock.
Calls that only look, like length, row, need and stats, do without: beside a writer they may see a step half done. An
engine with several threads brings its own lock around what belongs together. Host arrays are plain NumPy.

The class is the public face and most of this file is its documentation; that is why it is long. The work is done in
ledger.py (rows and pages), prefix.py, copies.py, slots.py and admission.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np

from dsv4_rt.checks import check_range
from dsv4_rt.device import Device, given_device
from dsv4_rt.errors import ArgumentError, PoolExhausted, PoolMisuse, TooLong
from dsv4_rt.memory import admission, snapshot
from dsv4_rt.memory.admission import Need
from dsv4_rt.memory.arguments import (
    as_array,
    as_count,
    as_counts,
    as_id,
    as_ids,
    as_namespace,
    budget_bytes,
    optional,
)
from dsv4_rt.memory.check import check
from dsv4_rt.memory.copies import Copies
from dsv4_rt.memory.layout import LIVES, KVLayout
from dsv4_rt.memory.ledger import Ledger
from dsv4_rt.memory.pages import CACHED, Ints, Pages
from dsv4_rt.memory.prefix import PAGE, PrefixCache, page_digests
from dsv4_rt.memory.sequences import NEVER, STAGED, Parked, Sequences, as_tokens
from dsv4_rt.memory.slots import StepSlots, mappings
from dsv4_rt.memory.stats import LifeStats, PoolStats
from dsv4_rt.memory.storage import Storage
from dsv4_rt.memory.tables import Tables
from dsv4_rt.memory.views import Views

P = ParamSpec("P")
R = TypeVar("R")


def _exclusive(method: Callable[Concatenate[KVPool, P], R]) -> Callable[Concatenate[KVPool, P], R]:
    """The pool's owner check: whoever enters while somebody is inside is told so, and nothing happens."""

    @functools.wraps(method)
    def guarded(self: KVPool, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._entry.acquire(blocking=False):
            raise PoolMisuse(
                f"{method.__name__}: another thread is inside the pool; one writer at a time, put a lock around it"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._entry.release()

    return cast("Callable[Concatenate[KVPool, P], R]", guarded)


class KVPool(Views):
    """The paged memory of one model on one device."""

    def __init__(
        self,
        layout: KVLayout,
        *,
        budget: int | float | str | None = None,
        pages: int | None = None,
        window_pages: int | None = None,
        checkpoints: int | None = None,
        state_slots: int | None = None,
        max_sequences: int,
        max_length: int,
        max_in_flight: int = 8192,
        max_tokens: int | None = None,
        max_draft: int = 0,
        checkpoint_every: int = 4096,
        watermark: float = 0.01,
        steps_in_flight: int = 2,
        device: Device | str | None = None,
    ) -> None:
        """
        Args:
            layout: the caches; made with the same max_draft.
            budget: bytes for the pages of all caches (int), or a fraction of the device's free memory (float or "0.8");
                block tables come on top.
            pages: 256-token pages, instead of a budget; like the two below without the null page.
            window_pages: 64-token window pages; by default 4 a sequence, max_tokens / 64 for each of steps_in_flight
                and 2 a checkpoint: enough if a sequence whose prompt is done decodes in the next step.
            checkpoints: checkpoint slots; by default one every `checkpoint_every` tokens of pages, one a sequence.
                With 0 nothing is ever found again.
            state_slots: at least one a sequence; by default max_sequences + steps_in_flight: a slot that is let go
                while steps are in flight, or while a copy out of it waits for an upload, cannot be given out yet.
            max_sequences: rows of the block tables, B.
            max_length: tokens of the longest sequence; block tables have ceil(max_length / 256) columns.
            max_in_flight: tokens by which one sequence may grow in a step.
            max_tokens: tokens of a whole step; by default max_in_flight + max_sequences * (1 + max_draft).
            max_draft: tokens that `truncate` may take back.
            checkpoint_every: tokens between checkpoints, a multiple of 256.
            watermark: the share of pages and window pages that `can_admit` leaves alone.
            steps_in_flight: steps that may be between begin_step and end_step.
            device: a device or its name, as `use_device` takes it; the current one if None.

        Raises:
            ArgumentError: a size out of range, rings in the layout that do not fit max_draft, too small a budget.
            DeviceError: device names none.
        """
        what = "KVPool"
        if not isinstance(layout, KVLayout):
            raise ArgumentError(f"{what}: layout is {type(layout).__name__}; give a KVLayout (KVLayout.for_model)")
        if budget is not None and pages is not None:
            raise ArgumentError(f"{what}: budget = {budget} and pages = {pages} both say how large it is; give one")
        self.layout = layout
        self.device = given_device(device)
        self.max_sequences = check_range(what, "max_sequences", max_sequences, 1, 1 << 20)
        self.max_length = check_range(what, "max_length", max_length, 1, 2**30)
        self.max_in_flight = check_range(what, "max_in_flight", max_in_flight, 1, 2**30)
        self.max_draft = check_range(what, "max_draft", max_draft, 0, self.max_in_flight)
        self.checkpoint_every = check_range(what, "checkpoint_every", checkpoint_every, PAGE, 2**30)
        if self.checkpoint_every % PAGE:
            raise ArgumentError(f"{what}: checkpoint_every = {checkpoint_every} is not a multiple of {PAGE}")
        if not isinstance(watermark, (int, float)) or not 0 <= watermark < 1:
            raise ArgumentError(f"{what}: watermark = {watermark!r} is not a share from 0 to below 1")
        self.watermark = float(watermark)
        self.steps_in_flight = check_range(what, "steps_in_flight", steps_in_flight, 1, 64)
        tokens = max_tokens if max_tokens is not None else max_in_flight + max_sequences * (1 + max_draft)
        self.max_tokens = check_range(what, "max_tokens", tokens, 1, 2**30)
        for cache in layout.of("state"):
            if cache.entries not in (8 + max_draft, 128 + max_draft):
                raise ArgumentError(
                    f"{what}: {cache.name!r} has rings of {cache.entries} rows; with max_draft = {max_draft} they are "
                    f"{8 + max_draft} or {128 + max_draft}: give the layout the same max_draft"
                )
        counts = admission.counts_for(
            layout,
            budget=budget_bytes(budget, self.device),
            pages=optional("pages", pages, 1),
            window_pages=optional("window_pages", window_pages, 1),
            checkpoints=optional("checkpoints", checkpoints, 0),
            state_slots=self.max_sequences + self.steps_in_flight
            if state_slots is None
            else check_range(what, "state_slots", state_slots, max_sequences, 2**30),
            max_sequences=max_sequences,
            max_tokens=self.max_tokens,
            checkpoint_every=checkpoint_every,
            steps_in_flight=steps_in_flight,
        )
        self._mappings, self._alias = mappings(layout)
        self.storage = Storage(layout, self.device, counts, staging=2 * steps_in_flight)
        self._tables = Tables(
            self.device,
            max_sequences,
            -(-max_length // PAGE),
            admission.window_width(max_in_flight),
            self.max_tokens,
            [m.name for m in self._mappings],
            steps_in_flight,
        )
        evictions: dict[str, Callable[[Ints], None]] = {
            "full": lambda pages: self._prefix.evict_full(pages),
            "window": lambda pages: self._prefix.evict_window(pages),
            "checkpoint": lambda slots: self._prefix.evict_checkpoints(slots),
        }
        self._lives = {life: Pages(life, counts[life], evictions.get(life, _never)) for life in LIVES}
        self._full, self._window, self._state, _ = (self._lives[life] for life in LIVES)
        self._copies = Copies(self._lives)
        self._prefix = PrefixCache(self._lives, self._copies)
        self._seqs = Sequences(max_sequences)
        self._longest = admission.longest(max_length, self._full.total, self._window.total, max_draft)
        self._step = StepSlots(self._tables, self._mappings, self.max_tokens)
        self._ledger = Ledger(
            self._seqs,
            self._tables,
            self._lives,
            self._copies,
            self._prefix,
            self._step,
            self.max_draft,
            self.checkpoint_every,
        )
        self._epoch = 0
        self._open: list[int] = []  # steps in flight, ascending
        self._preemptions = 0
        self._entry = threading.Lock()

    # --------------------------------------------------------------------------------------------------- sequences

    @_exclusive
    def create(self, tokens: Any = None, namespace: bytes = b"") -> int:
        """A new sequence; with prompt tokens it begins with what the prefix cache has of them.

        Args:
            tokens: the prompt, integers. `length` then says how many of them need no computing: a multiple of 256,
                at least one token less than the prompt.
            namespace: only sequences of the same namespace share pages (an adapter, a tenant's salt).

        Returns:
            the sequence's id.

        Raises:
            PoolExhausted: no row or state slot is free.
            TooLong: the prompt is longer than max_length, or than the whole pool can hold.
            PoolMisuse: tokens that are no integers from 0 to 2^31 - 1; a namespace that is not bytes.
        """
        namespace = as_namespace(namespace, "create")
        prompt = as_tokens([] if tokens is None else tokens, "create")
        self._refuse_too_long("create", prompt.size)
        self._check_room("create")
        match = self._prefix.match(prompt, namespace)
        seq, row = self._seqs.admit(namespace, prompt, "create")
        self._ledger.begin(row, match, prompt.size)
        return seq

    def _check_room(self, what: str) -> None:
        if not self._seqs.free_rows:
            raise PoolExhausted(f"{what}: all {self.max_sequences} rows are taken; free or preempt a sequence")
        if not self._state.free:
            raise PoolExhausted(
                f"{what}: no state slot is free, {self._state.fenced} wait for steps in flight; end a step, or free a "
                "sequence"
            )

    @_exclusive
    def extend(self, seqs: Any, counts: Any = None) -> None:
        """Reserve the next positions of one sequence or a batch, all or nothing, and map their slots.

            positions length .. length + count - 1 of each sequence, in the order of the batch

        Pages that no later query can see leave the window (at the latest when a decoding sequence begins another
        64 tokens), shared pages that would be written are copied, complete pages enter the prefix cache, checkpoints
        are taken. Calls before the same upload add to one step. The window pages of a chunk stay until the sequence is
        extended again.

        Args:
            seqs: an id, or a batch of different ids (an int64 array costs no conversion).
            counts: tokens for each, or one number for all; None is 1. At most max_in_flight a sequence and step.

        Raises:
            PoolExhausted: not enough pages or window pages.
            TooLong: a sequence would be longer than max_length, or than the whole pool.
            UnknownSequence, PoolMisuse: a bad id, count or dtype, an id twice, more than max_tokens in the step.
        """
        s = self._seqs
        if type(seqs) is list and len(seqs) == 1 and type(seqs[0]) is int:
            seqs = seqs[0]
        if type(seqs) is int:
            self._extend_one(seqs, as_count(counts))
            return
        ids = as_ids(seqs, "extend")
        if ids.size == 1:
            self._extend_one(int(ids[0]), as_count(counts))
            return
        rows = s.rows(ids, "extend")
        n = s.length.take(rows)
        ones = counts is None or (type(counts) is int and counts == 1)
        if not ones:
            c = as_counts(counts, ids.size)
            ones = bool((c == 1).all())
        s.distinct(rows, "extend")
        if not ones or s.flags.take(rows).any():
            self._extend(rows, n, np.ones_like(n) if ones else c)
            return
        if not ids.size:
            return
        self._check_step(ids.size)
        self._refuse_too_long("extend", int(n.max()) + 1)
        m = n + 1
        wake = n >= s.wake.take(rows)
        if wake.any():
            self._ledger.reserve(rows[wake], n[wake], m[wake], n[wake])
        self._step.add_ones(rows, n, s.window_base.take(rows), s.full_base.take(rows))
        self._ledger.grow(rows, n, m)

    def _extend(self, rows: Ints, n: Ints, c: Ints) -> None:
        """The general case: any counts, rows that have staged tokens or share their last pages."""
        s = self._seqs
        if (c < 0).any():
            raise PoolMisuse(f"extend: counts must not be negative; {int(c.min())} given")
        if not c.all():
            rows, n, c = rows[c > 0], n[c > 0], c[c > 0]
        if not rows.size:
            return
        m = n + c
        base = np.where(s.flags.take(rows) & STAGED, s.settled.take(rows), n)
        longest = int(np.argmax(m - base))
        self._check_growth(int(rows[longest]), int(base[longest]), int(m[longest]))
        self._refuse_too_long("extend", int(m.max()))
        self._check_step(int(c.sum()))
        self._ledger.reserve(rows, n, m, base)
        self._step.add(rows, n, c)
        self._ledger.grow(rows, n, m)

    def _extend_one(self, seq: int, c: int) -> None:
        """One sequence, without arrays."""
        s = self._seqs
        row = s.row(seq, "extend")
        if c <= 0:
            if c < 0:
                raise PoolMisuse(f"extend: counts must not be negative; {c} given")
            return
        n = int(s.length[row])
        m = n + c
        base = int(s.settled[row]) if s.flags[row] & STAGED else n
        self._check_growth(row, base, m)
        self._refuse_too_long("extend", m)
        self._check_step(c)
        self._ledger.reserve_few([(row, n, m, base)])
        self._step.add_one(row, n, c)
        self._ledger.grow_one(row, n, m)

    def _check_growth(self, row: int, base: int, m: int) -> None:
        if m - base > self.max_in_flight:
            raise PoolMisuse(
                f"extend: sequence {int(self._seqs.id_of[row])} by {m - base} tokens in one step; max_in_flight is "
                f"{self.max_in_flight}: go in chunks, or make the pool with more"
            )

    def _check_step(self, tokens: int) -> None:
        if self._step.count + tokens > self.max_tokens:
            raise PoolMisuse(
                f"extend: {tokens} tokens on top of {self._step.count} since the last upload; a step has at most "
                f"max_tokens = {self.max_tokens}: upload first, or make the pool with more"
            )

    @_exclusive
    def append(self, seqs: Any, tokens: Any) -> None:
        """The token ids of the next positions, in order; only what is known can be found again or resumed.

        Args:
            seqs: an id, and `tokens` are what follows in that sequence, before or behind its length; or a batch of
                different ids, and `tokens` has one token for each.

        Raises:
            TooLong: more tokens than max_length.
            UnknownSequence, PoolMisuse: a bad id or dtype, a token that is no integer from 0 to 2^31 - 1.
        """
        s = self._seqs
        ids = as_ids(seqs, "append")
        rows = s.rows(ids, "append")
        one = np.ndim(seqs) == 0
        given = as_array(tokens, "append", "tokens")
        new = as_tokens(given.reshape(1) if one and not given.ndim else tokens, "append")
        if not one and new.size != ids.size:
            raise PoolMisuse(f"append: {new.size} tokens for {ids.size} sequences; a batch takes one for each")
        if not new.size:
            return
        s.distinct(rows, "append")
        known = int(s.known.take(rows).max()) + (new.size if one else 1)
        if known > self.max_length:
            raise TooLong(f"append: {known} tokens; the pool was made for max_length = {self.max_length}")
        if one:
            s.append(int(rows[0]), new)
            complete = rows
        else:
            complete = s.append_one(rows, new)
        for row in complete.tolist():
            self._ledger.settle(row)
        if complete.size:
            self._ledger.rebase(complete, s.length.take(complete))

    @_exclusive
    def truncate(self, seqs: Any, lengths: Any) -> None:
        """Take tokens back (drafts that were not accepted), exactly; tokens appended from there on are forgotten.

        The rings have room for max_draft tokens: a sequence cannot become shorter than its longest length ever minus
        max_draft, nor shorter than what it got from the prefix cache. Tokens that the step being put together has
        staged go nowhere then.

        Args:
            seqs: an id or a batch of different ids.
            lengths: the new length, or one for each.

        Raises:
            PoolMisuse: longer than it is, or shorter than the rings allow; nothing changed.
            UnknownSequence: a bad id.
        """
        s = self._seqs
        ids = as_ids(seqs, "truncate")
        rows = s.rows(ids, "truncate")
        s.distinct(rows, "truncate")
        new = as_counts(lengths, ids.size, "truncate", "lengths")
        old = s.length.take(rows)
        high = s.high.take(rows) if self.max_draft else old
        least = np.maximum(high - self.max_draft, s.floor.take(rows))
        bad = (new > old) | (new < least)
        if bad.any():
            i = int(np.argmax(bad))
            raise PoolMisuse(
                f"truncate: sequence {int(ids[i])} of {int(old[i])} tokens (at most {int(high[i])} so far) to "
                f"{int(new[i])}; with max_draft = {self.max_draft} it can be from {max(0, int(least[i]))} on"
            )
        change = new < old
        rows, new, old = rows[change], new[change], old[change]
        if not rows.size:
            return
        over = ((new + 63) >> 6 < (old + 63) >> 6) | (s.known.take(rows) > new)
        over |= (s.flags.take(rows) & STAGED != 0) | (s.registered.take(rows) << 8 > new)
        for row, length in zip(rows[over].tolist(), new[over].tolist(), strict=True):
            self._ledger.cut(row, length)
        s.length[rows] = new
        self._tables.lengths[rows] = new
        self._tables.mark("lengths", rows)
        self._ledger.rebase(rows, new)

    @_exclusive
    def fork(self, seq: int) -> int:
        """Another sequence with the same past: pages shared, copied when one of both writes; the state copied now.

        Raises:
            PoolExhausted: no row or state slot is free.
            PoolMisuse: the sequence has tokens that were not uploaded yet: upload and launch first.
            UnknownSequence: a bad id.
        """
        s = self._seqs
        row = self._one(seq, "fork")
        if s.flags[row] & STAGED:
            raise PoolMisuse(f"fork: sequence {seq} has tokens that are not uploaded; upload and launch, then fork")
        self._check_room("fork")
        child, to = s.admit(s.text[row].namespace, s.tokens(row, 0, int(s.known[row])), "fork")
        self._ledger.settle(row)
        self._ledger.fork(row, to)
        return child

    @_exclusive
    def free(self, seq: int) -> None:
        """The sequence ends: what nobody shares is free, or stays in the prefix cache until it is evicted.

        Raises:
            UnknownSequence: no such sequence, or freed already.
        """
        if as_id(seq, "free") not in self._seqs.parked:
            self._ledger.vacate(self._one(seq, "free"), park=False)
        self._seqs.retire(seq)

    @_exclusive
    def preempt(self, seq: int) -> None:
        """Take a sequence's pages, slot and row; it keeps its id and tokens, and `resume` brings it back.

        Raises:
            UnknownSequence, PoolMisuse: a bad id; preempted already.
        """
        self._ledger.vacate(self._one(seq, "preempt"), park=True)
        self._preemptions += 1

    @_exclusive
    def resume(self, seq: int) -> int:
        """Bring a preempted sequence back: a prefix lookup with all its known tokens, like `create`.

        Returns:
            its length now: what has to be recomputed begins there.

        Raises:
            PoolExhausted: no row or state slot is free.
            UnknownSequence, PoolMisuse: a bad id; not preempted.
        """
        parked = self._parked(seq, "resume")
        self._check_room("resume")
        match = self._prefix.match(parked.tokens, parked.namespace)
        row = self._seqs.readmit(seq)
        self._ledger.begin(row, match, parked.tokens.size)
        return match.length

    def _parked(self, seq: int, what: str) -> Parked:
        parked = self._seqs.parked.get(as_id(seq, what))
        if parked is None:
            self._seqs.row(seq, what)
            raise PoolMisuse(f"{what}: sequence {seq} is not preempted")
        return parked

    # ------------------------------------------------------------------------------------------------------- steps

    @_exclusive
    def begin_step(self) -> int:
        """A step is in flight from now on: pages let go before it ends are not handed out until then.

        Call it after `upload`, right before the step's kernels are launched: what `extend`, `preempt` or `free` let go
        for this step is not read by it, and need only wait for the steps before.

        Returns:
            the step's number, for `end_step`.

        Raises:
            PoolMisuse: steps_in_flight steps are in flight already.
        """
        if len(self._open) >= self.steps_in_flight:
            raise PoolMisuse(
                f"begin_step: {len(self._open)} steps are in flight, as many as the pool was made for; end one first"
            )
        self._epoch += 1
        self._open.append(self._epoch)
        self._copies.fence = self._epoch
        return self._epoch

    @_exclusive
    def end_step(self, epoch: int) -> None:
        """The device is through with a step (an event was waited for): it reads nothing any more.

        Raises:
            PoolMisuse: no such step is in flight.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, (int, np.integer)) or epoch not in self._open:
            raise PoolMisuse(f"end_step: step {epoch} is not in flight; in flight are {self._open}")
        self._open.remove(epoch)
        self._copies.fence = self._open[-1] if self._open else 0
        oldest = self._open[0] if self._open else self._epoch + 1
        for pages in self._lives.values():
            pages.retire(oldest)

    @_exclusive
    def upload(self, stream: Any = None) -> int:
        """Carry out pending copies, then bring the device's tables up to date; the next `extend` begins a new step.

        Call it outside graph capture, before the step's kernels or the replay of their graph. If it raises, nothing
        is lost: what is pending stays pending, and another call does it all.

        Args:
            stream: the stream to work on; the caller's current stream if None. Never synchronises, unless more
                uploads are on their way than steps_in_flight.

        Returns:
            bytes of table changes staged.
        """
        if self._copies:
            kept = bool(self.layout.of("checkpoint"))
            for batch in self._copies.batches():
                save, restore = (batch.save, batch.restore) if kept else (None, None)
                self.storage.copy(batch.whole, save=save, restore=restore, stream=stream)
        self._step.trim()
        staged = self._tables.upload(stream)
        self._copies.done()
        self._step.begin()
        self._ledger.uploaded()
        return staged

    # ---------------------------------------------------------------------------------------------------- admission

    def need(self, length: int, cached: int = 0, chunk: int | None = None) -> Need:
        """Pages that a sequence takes: the most it newly holds at any moment on its way from `cached` to `length`.

        Args:
            length: tokens.
            cached: tokens that the prefix cache has (a multiple of 256, at a checkpoint).
            chunk: tokens a step; max_in_flight if None. Each step is computed before the next is reserved: steps that
                overlap hold fenced window pages on top.

        Raises:
            ArgumentError: a negative length, more cached than it is long or no multiple of 256, a chunk below 1.
        """
        length = check_range("KVPool.need", "length", length, 0, 2**30)
        cached = check_range("KVPool.need", "cached", cached, 0, max(length, 0))
        if cached % PAGE:
            raise ArgumentError(
                f"KVPool.need: cached = {cached} is not a multiple of {PAGE}; a hit ends at a page boundary"
            )
        chunk = check_range("KVPool.need", "chunk", self.max_in_flight if chunk is None else chunk, 1, 2**30)
        return admission.need(length, cached, chunk, self.max_draft, self.checkpoint_every)

    @_exclusive
    def can_admit(self, prompt: Any, namespace: bytes = b"", chunk: int | None = None) -> bool:
        """Whether `create(prompt)` and extending it to its whole length would succeed now, above the watermark.

        The answer is what allocation then does, as long as nobody else allocates: cached pages of the prefix are not
        counted as evictable, pages waiting for steps in flight are not counted at all. A pool without sequences
        ignores the watermark, so that whatever fits is admitted at some time.

        Args:
            prompt: its tokens, or a number of tokens (then nothing is looked up).
            namespace: as for `create`.
            chunk: tokens a step; max_in_flight if None.

        Raises:
            TooLong: it would never fit.
            ArgumentError: a negative number, a chunk below 1.
            PoolMisuse: tokens that are no integers from 0 to 2^31 - 1; a namespace that is not bytes.
        """
        namespace = as_namespace(namespace, "can_admit")
        pinned_full = pinned_window = cached = 0
        if isinstance(prompt, (int, np.integer)) and not isinstance(prompt, bool):
            length = int(prompt)
        else:
            tokens = as_tokens(prompt, "can_admit")
            length = tokens.size
            match = self._prefix.match(tokens, namespace)
            cached = match.length
            pinned_full = int(np.count_nonzero(self._full.where[match.pages] == CACHED))
            pinned_window = int(np.count_nonzero(self._window.where[match.window] == CACHED))
        self._refuse_too_long("can_admit", length)
        need = self.need(length, cached, chunk)
        if need.window > self._window.total:
            raise TooLong(
                f"can_admit: {length} tokens in chunks of {chunk or self.max_in_flight} take {need.window} window "
                f"pages; the pool has {self._window.total} in all: go in smaller chunks"
            )
        if not self._seqs.free_rows or self._state.free < need.state:
            return False
        share = self.watermark if self._seqs.free_rows < self.max_sequences else 0.0
        return (
            need.full + pinned_full + int(share * self._full.total) <= self._full.available
            and need.window + pinned_window + int(share * self._window.total) <= self._window.available
        )

    def _refuse_too_long(self, what: str, length: int) -> None:
        if length > self._longest:
            raise TooLong(
                f"{what}: {length} tokens; the pool was made for max_length = {self.max_length} and has "
                f"{self._full.total} pages and {self._window.total} window pages in all: {self._longest} tokens at most"
            )

    def can_resume(self, seq: int, chunk: int | None = None) -> bool:
        """`can_admit` for a preempted sequence and the tokens that are known of it.

        Raises:
            UnknownSequence, PoolMisuse: a bad id; not preempted.
            TooLong, ArgumentError: as for `can_admit`.
        """
        parked = self._parked(seq, "can_resume")
        return self.can_admit(parked.tokens, parked.namespace, chunk)

    def digests(self, tokens: Any, namespace: bytes = b"") -> list[bytes]:
        """The digests under which the complete pages of a prompt are known here: 16 bytes each. Two prompts share
        pages as far as these are equal, so that a router can send them to the same pool.

        Raises:
            PoolMisuse: tokens that are no integers from 0 to 2^31 - 1; a namespace that is not bytes.
        """
        prompt = as_tokens(tokens, "digests")
        return page_digests(prompt, as_namespace(namespace, "digests"), prompt.size // PAGE)

    def next_checkpoint(self, seq: int) -> int:
        """The next boundary at which a chunk of the prompt should end, so that a checkpoint can be taken there.

        Raises:
            UnknownSequence, PoolMisuse: a bad id; preempted.
        """
        row = self._one(seq, "next_checkpoint")
        length, end = int(self._seqs.length[row]), int(self._seqs.prompt_end[row])
        regular = (length // self.checkpoint_every + 1) * self.checkpoint_every
        return min(end, regular) if end > length else regular

    @_exclusive
    def reset(self) -> int:
        """Empty the prefix cache (the weights have changed). Sequences go on, but nothing of them enters the cache
        until `preempt` and `resume` have them computed anew. Returns how many pages were registered."""
        s = self._seqs
        s.registered[s.id_of != 0] = NEVER
        rows = np.flatnonzero(s.id_of)
        count = self._prefix.reset()
        self._ledger.rebase(rows, s.length.take(rows))
        return count

    # ------------------------------------------------------------------------------------------- what is there

    def length(self, seq: int) -> int:
        """Tokens of a sequence that have positions; 0 while it is preempted. UnknownSequence, PoolMisuse: a bad id."""
        if as_id(seq, "length") in self._seqs.parked:
            return 0
        return int(self._seqs.length[self._one(seq, "length")])

    def row(self, seq: int) -> int:
        """The row of the block tables that the sequence has. UnknownSequence, PoolMisuse: a bad id; preempted."""
        return self._one(seq, "row")

    def rows(self, seqs: Any) -> Ints:
        """int32 [N]: `row` of a batch, with its errors."""
        return self._seqs.rows(as_ids(seqs, "rows"), "rows").astype(np.int32)

    @property
    def step_tokens(self) -> int:
        """Tokens of the step being put together: extended since the last upload."""
        return self._step.count

    def stats(self) -> PoolStats:
        """How full the pool is, and counters since it was made."""
        size = {life: self.layout.bytes_of(life) for life in LIVES}
        lives = {
            life: LifeStats(p.total, p.free, p.used, p.cached, p.fenced, size[life]) for life, p in self._lives.items()
        }
        p = self._prefix.stats
        return PoolStats(
            full=lives["full"],
            window=lives["window"],
            state=lives["state"],
            checkpoint=lives["checkpoint"],
            sequences=self.max_sequences - self._seqs.free_rows,
            preempted=len(self._seqs.parked),
            steps_in_flight=len(self._open),
            checkpoint_bytes=self._prefix.bytes_kept(size["checkpoint"], size["window"]),
            copied_pages=self._ledger.copied_pages,
            preemptions=self._preemptions,
            **vars(p),
        )

    @_exclusive
    def snapshot(self) -> bytes:
        """The whole pool as plain bytes, versioned and checksummed: books, tokens, and the contents of every page that
        is not free. Synchronises. The same history gives the same bytes.

        Raises:
            PoolMisuse: steps are in flight, or something waits for an upload.
        """
        self.device.synchronize()
        return snapshot.dump(self)

    @classmethod
    def restore(cls, data: bytes, layout: KVLayout, *, device: Device | None = None) -> KVPool:
        """A pool like the one that `snapshot` saw, under the same ids, on any device.

        Raises:
            SnapshotError: not a snapshot, damaged, of another version or another layout.
        """
        header, arrays = snapshot.parse(data, layout)
        settings, counts = header["settings"], header["counts"]
        pool = cls(
            layout,
            pages=counts["full"] - 1,
            window_pages=counts["window"] - 1,
            checkpoints=counts["checkpoint"] - 1,
            state_slots=counts["state"] - 1,
            device=device,
            **settings,
        )
        snapshot.load(pool, header, arrays)
        return pool

    @_exclusive
    def check(self) -> None:
        """Prove all invariants: every page has exactly its holders, free + used + cached + fenced + null = all, the
        eviction order, the prefix cache's links, slot mappings and, where nothing waits for an upload, the device's
        tables. Slow; synchronises.

        Raises:
            PoolError: one does not hold.
        """
        check(self)

    def _one(self, seq: int, what: str) -> int:
        return self._seqs.row(as_id(seq, what), what)


def _never(pages: Ints) -> None:
    raise AssertionError(f"pages {pages} of a life cycle that nobody caches were to be evicted")
