"""Who holds what: pages into and out of the block tables, and computed pages into the prefix cache.

The methods here trust their arguments and, except for `Plan` making, never fail: KVPool checks first. Growing a row is
planned (which places of the block tables get a new page, which are left by the window, which pages must be copied),
compared with what is available, and only then applied. Plans of a few rows are made with Python integers, of many
with arrays; both mean the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from dsv4_rt.errors import PoolExhausted
from dsv4_rt.memory.admission import WINDOW
from dsv4_rt.memory.copies import Copies
from dsv4_rt.memory.pages import Ints, Pages
from dsv4_rt.memory.prefix import PAGE, Match, PrefixCache, page_digests, root_serial
from dsv4_rt.memory.sequences import NEVER, SHARED, STAGED, Sequences
from dsv4_rt.memory.slots import StepSlots, spread
from dsv4_rt.memory.tables import Tables

FEW: Final = (
    12  # rows: up to here integers are faster than arrays (between 10 and 24 a decode step takes the same time)
)
_NONE: Final = np.empty(0, np.int32)
_NOWHERE: Final = np.empty(0, np.int64)


@dataclass
class Plan:
    """What growing some rows takes. Places are flat indices into the block tables, int64."""

    full: Ints  # get a new page
    window: Ints
    passed: Ints  # of window pages that no query can see any more
    rows: int  # how many rows grow
    due: list[int]  # rows with computed pages that the prefix cache has not seen
    copies: dict[str, list[int]] = field(default_factory=dict)  # life cycle -> places of pages to copy before writing


class Ledger:
    """The books of a pool: rows of `sequences`, their entries in `tables`, the pages of `lives`."""

    def __init__(
        self,
        sequences: Sequences,
        tables: Tables,
        lives: dict[str, Pages],
        copies: Copies,
        prefix: PrefixCache,
        step: StepSlots,
        max_draft: int,
        checkpoint_every: int,
    ) -> None:
        self.sequences, self.tables, self.lives = sequences, tables, lives
        self.copies, self.prefix, self.step = copies, prefix, step
        self.max_draft, self.checkpoint_every = max_draft, checkpoint_every
        self.full, self.window, self.state = lives["full"], lives["window"], lives["state"]
        self.blocks, self.width = tables.full.shape[1], tables.window.shape[1]
        self.flat = {"full": tables.full.reshape(-1), "window": tables.window.reshape(-1)}
        self.staged: list[Ints] = []  # rows flagged STAGED
        self.copied_pages = 0

    # ------------------------------------------------------------------------------------------------------ growing

    def reserve(self, rows: Ints, n: Ints, m: Ints, base: Ints) -> None:
        """Pages for rows that grow from n to m tokens, all or nothing; `base` is what is computed of them.

        Raises:
            PoolExhausted: pages or window pages are missing; nothing changed.
        """
        if rows.size <= FEW:
            ends = zip(rows.tolist(), n.tolist(), m.tolist(), base.tolist(), strict=True)
            self.reserve_few(list(ends))
            return
        plan, firsts = self._plan_many(rows, n, m, base)
        self._apply(plan)
        self.sequences.first_window[rows] = firsts
        self.sequences.flags[rows] &= ~np.uint8(SHARED)
        self.rebase(rows, m)

    def reserve_few(self, growing: list[tuple[int, int, int, int]]) -> None:
        """`reserve` of (row, n, m, base)."""
        plan, firsts = self._plan_few(growing)
        self._apply(plan)
        s = self.sequences
        for (row, _, m, _), first in zip(growing, firsts, strict=True):
            s.first_window[row] = first
            if s.flags[row] & SHARED:
                s.flags[row] &= ~np.uint8(SHARED)
            self.rebase_one(row, m)

    def _plan_few(self, growing: list[tuple[int, int, int, int]]) -> tuple[Plan, list[int]]:
        s, width = self.sequences, self.width
        full: list[int] = []
        window: list[int] = []
        passed: list[int] = []
        runs: dict[str, list[Ints]] = {"full": [], "window": [], "passed": []}
        firsts, due, shared = [], [], []
        for row, n, m, base in growing:
            f0, f1, w0, w1 = (n + 255) >> 8, (m + 255) >> 8, (n + 63) >> 6, (m + 63) >> 6
            if f1 - f0 == 1:
                full.append(row * self.blocks + f0)
            elif f1 > f0:
                runs["full"].append(np.arange(row * self.blocks + f0, row * self.blocks + f1))
            if w1 - w0 == 1:
                window.append(row * width + w0 % width)
            elif w1 > w0:
                runs["window"] += self._ring(row, w0, w1)
            end = min(base, max(int(s.high[row]), m) - self.max_draft) if self.max_draft else base
            low, held = max(0, end - (WINDOW - 1)) >> 6, int(s.first_window[row])
            if low - held == 1:
                passed.append(row * width + held % width)
            elif low > held:
                runs["passed"] += self._ring(row, held, low)
            firsts.append(max(low, held))
            if min(base, int(s.known[row])) >> 8 > s.registered[row]:
                due.append(row)
            if s.flags[row] & SHARED:
                shared.append(row)
        plan = Plan(
            _places(full, runs["full"]),
            _places(window, runs["window"]),
            _places(passed, runs["passed"]),
            len(growing),
            due,
        )
        if shared:
            plan.copies = self._shared_pages(shared)
        return plan, firsts

    def _ring(self, row: int, first: int, stop: int) -> list[Ints]:
        """Places of the window's pages first .. stop - 1 of a row: one run, or two around the ring's end."""
        width, left = self.width, first % self.width
        start, count = row * width, stop - first
        if left + count <= width:
            return [np.arange(start + left, start + left + count)]
        return [np.arange(start + left, start + width), np.arange(start, start + left + count - width)]

    def _plan_many(self, rows: Ints, n: Ints, m: Ints, base: Ints) -> tuple[Plan, Ints]:
        s = self.sequences
        full0, window0 = (n + 255) >> 8, (n + 63) >> 6
        which, index = spread(full0, ((m + 255) >> 8) - full0)
        full = rows[which] * self.blocks + index
        which, index = spread(window0, ((m + 63) >> 6) - window0)
        window = rows[which] * self.width + index % self.width
        low, held = self._low(rows, m, base), s.first_window.take(rows)
        which, index = spread(held, np.maximum(low - held, 0))
        passed = rows[which] * self.width + index % self.width
        due = np.minimum(base, s.known.take(rows)) >> 8 > s.registered.take(rows)
        plan = Plan(full, window, passed, rows.size, rows[due].tolist())
        shared = rows[(s.flags.take(rows) & SHARED) != 0]
        if shared.size:
            plan.copies = self._shared_pages(shared.tolist())
        return plan, np.maximum(low, held)

    def _low(self, rows: Ints, m: Ints, base: Ints) -> Ints:
        """The first window page that a step from `base` to m tokens, or a truncation after it, can need."""
        end = base
        if self.max_draft:
            end = np.minimum(base, np.maximum(self.sequences.high.take(rows), m) - self.max_draft)
        low: Ints = np.maximum(0, end - (WINDOW - 1)) >> 6
        return low

    def _apply(self, plan: Plan) -> None:
        full, window = self.full, self.window
        flat = self.flat["window"]
        left = flat[plan.passed]
        want_full, want_window = plan.full.size, plan.window.size
        if plan.copies:
            want_full += len(plan.copies.get("full", ()))
            want_window += len(plan.copies.get("window", ()))
        if want_full > full.available:
            _exhausted(full, want_full)
        if want_window > window.available:
            released = 0 if self.copies.fence else window.freed_by(left)
            if want_window > window.available + released:
                _exhausted(window, want_window)

        # Nothing below fails.
        for row in plan.due:
            self.settle(row)
        again = _NONE  # pages that go straight from the old end of a window to its new one
        if left.size:
            flat[plan.passed] = 0
            if want_window and not self.copies.fence and not self.copies and window.sole(left):
                again = left[: plan.window.size]
                left = left[again.size :]
            if left.size:
                self._let_go("window", left, repeats=plan.rows > 1)
        for life, places in plan.copies.items():
            self._copy_on_write(life, places)
        if plan.full.size:
            self.flat["full"][plan.full] = full.take(plan.full.size)
            self.tables.mark("full", plan.full)
        if plan.window.size:
            if again.size:
                flat[plan.window[: again.size]] = again
            if again.size < plan.window.size:
                flat[plan.window[again.size :]] = window.take(plan.window.size - again.size)
            if not plan.passed.size:
                self.tables.mark("window", plan.window)
        if plan.passed.size:
            changed = np.concatenate([plan.passed, plan.window]) if plan.window.size else plan.passed
            self.tables.mark("window", changed)

    def rebase(self, rows: Ints, length: Ints) -> None:
        """Bring up to date what single tokens need: bases of the last pages, and the length to wake up at."""
        s = self.sequences
        last = np.maximum(length - 1, 0)
        window, full = last >> 6, last >> 8
        s.window_base[rows] = (self.flat["window"].take(rows * self.width + window % self.width) - window) << 6
        s.full_base[rows] = (self.flat["full"].take(rows * self.blocks + full) - full) << 8
        wake = (length + 63) & ~63
        registered = s.registered.take(rows)
        due = s.known.take(rows) >> 8 > registered
        if due.any():
            wake = np.where(due, np.minimum(wake, (np.where(due, registered, 0) + 1) << 8), wake)
        s.wake[rows] = np.where(self._low(rows, length, length) > s.first_window.take(rows), 0, wake)

    def rebase_one(self, row: int, length: int) -> None:
        """`rebase` of one row."""
        s = self.sequences
        last = length - 1 if length else 0
        window, full = last >> 6, last >> 8
        s.window_base[row] = (int(self.tables.window[row, window % self.width]) - window) << 6
        s.full_base[row] = (int(self.tables.full[row, full]) - full) << 8
        wake, registered = (length + 63) & ~63, int(s.registered[row])
        if int(s.known[row]) >> 8 > registered:
            wake = min(wake, (registered + 1) << 8)
        end = min(length, max(int(s.high[row]), length) - self.max_draft) if self.max_draft else length
        s.wake[row] = 0 if max(0, end - (WINDOW - 1)) >> 6 > s.first_window[row] else wake

    def grow(self, rows: Ints, n: Ints, m: Ints) -> None:
        """Note that rows of n tokens have m; they are staged from now on."""
        s = self.sequences
        fresh = rows
        if self.staged:
            new = (s.flags.take(rows) & STAGED) == 0
            if not new.all():
                fresh, n = rows[new], n[new]
        s.settled[fresh] = n
        s.flags[rows] |= STAGED
        if self.max_draft:
            s.settled_high[fresh] = s.high.take(fresh)
            s.high[rows] = np.maximum(s.high.take(rows), m)
        s.length[rows] = m
        self.staged.append(fresh)
        self.tables.lengths[rows] = m
        self.tables.mark("lengths", rows)

    def grow_one(self, row: int, n: int, m: int) -> None:
        """`grow` of one row."""
        s = self.sequences
        if not s.flags[row] & STAGED:
            s.settled[row] = n
            s.settled_high[row] = s.high[row]
            s.flags[row] |= STAGED
            self.staged.append(np.array([row]))
        if self.max_draft:
            s.high[row] = max(int(s.high[row]), m)
        s.length[row] = m
        self.tables.lengths[row] = m
        self.tables.mark_one("lengths", row)

    def uploaded(self) -> None:
        """The step has been uploaded: nothing is staged any more."""
        for rows in self.staged:
            self.sequences.flags[rows] &= ~np.uint8(STAGED)
        self.staged.clear()

    # ------------------------------------------------------------------------------------------------ copy on write

    def _shared_pages(self, rows: list[int]) -> dict[str, list[int]]:
        """Places of partly filled pages that must be copied before these rows write.

        Where all holders of a page are among the rows, the last one may have it, unless the prefix cache keeps it.
        """
        found: dict[str, list[int]] = {}
        left: dict[tuple[str, int], int] = {}
        for row in rows:
            n = int(self.sequences.length[row])
            places = [("full", row * self.blocks + n // PAGE)] if n % PAGE else []
            if n % 64:
                places.append(("window", row * self.width + n // 64 % self.width))
            for life, place in places:
                pages, page = self.lives[life], int(self.flat[life][place])
                holders = left.get((life, page), int(pages.refs[page] - pages.pins[page]))
                if holders > 1 or pages.keep[page]:
                    found.setdefault(life, []).append(place)
                    left[life, page] = holders - 1
        return found

    def _copy_on_write(self, life: str, places: list[int]) -> None:
        table = self.flat[life]
        new = self.lives[life].take(len(places))
        for place, target in zip(places, new.tolist(), strict=True):
            source = int(table[place])
            self.copies.copy(life, source, target)
            self._let_go(life, np.array([source], np.int32))
            table[place] = target
        self.copied_pages += len(places)
        self.tables.mark(life, np.array(places))

    def _let_go(self, life: str, pages: Ints, repeats: bool = False) -> None:
        idle = self.lives[life].drop(pages, self.copies.fence, repeats)
        if idle.size and self.copies:
            self.copies.abandon(life, idle)

    # ------------------------------------------------------------------------------------------------- prefix cache

    def computed(self, row: int) -> tuple[int, int]:
        """(length, longest length) of what a row has computed: without the tokens of the step being put together."""
        s = self.sequences
        staged = s.flags[row] & STAGED
        length = int(s.settled[row] if staged else s.length[row])
        if not self.max_draft:
            return length, length
        return length, int(s.settled_high[row] if staged else s.high[row])

    def settle(self, row: int) -> None:
        """Enter a row's complete, computed pages into the prefix cache and take the checkpoints that are due."""
        s, prefix = self.sequences, self.prefix
        length, high = self.computed(row)
        end = min(length, int(s.known[row])) // PAGE
        first = done = int(s.registered[row])
        if end <= done:
            return
        text = s.text[row]
        digests = text.digests
        page_digests(text.tokens, text.namespace, end, digests)
        serial = int(s.serial[row])
        if done and not prefix.alive(digests[done - 1], serial):
            done, serial = 0, root_serial(text.namespace)  # what it was linked to is gone: link it again from the start
        every, prompt_end = self.checkpoint_every // PAGE, int(s.prompt_end[row]) // PAGE
        table = self.tables.full[row]
        for j in range(done, end):
            page, serial = prefix.register(int(table[j]), digests[j], text.tokens[PAGE * j : PAGE * (j + 1)], serial)
            if not page:
                s.registered[row] = NEVER
                return
            if j >= first and ((j + 1) % every == 0 or j + 1 == prompt_end) and not prefix.checkpoint_of[page]:
                self._checkpoint(row, page, (j + 1) * PAGE, high)
        s.registered[row] = end
        s.serial[row] = serial

    def _checkpoint(self, row: int, page: int, boundary: int, high: int) -> None:
        """Take the checkpoint at `boundary` if the rings still hold what it needs."""
        first = boundary // 64 - 2
        if high - boundary > 4 + self.max_draft or first < self.sequences.first_window[row]:
            self.prefix.stats.checkpoints_missed += 1
            return
        window = self.tables.window[row].take(np.arange(first, first + 2) % self.width)
        self.prefix.checkpoint(page, window, int(self.tables.state[row]), boundary)

    # -------------------------------------------------------------------------------------------- rows come and go

    def begin(self, row: int, match: Match, prompt: int) -> None:
        """Seat a fresh row on what the cache has for it."""
        s, tables, hit = self.sequences, self.tables, match.length
        stats = self.prefix.stats
        stats.tokens_queried += prompt
        stats.tokens_hit += hit
        stats.tokens_lost += match.lost
        slot = int(self.state.take(1)[0])
        tables.state[row] = slot
        tables.mark_one("state", row)
        s.text[row].digests = match.digests
        if hit:
            n = hit // PAGE
            self.full.share(match.pages)
            self.window.share(match.window)
            tables.full[row, :n] = match.pages
            tables.mark_range("full", row * self.blocks, row * self.blocks + n)
            first = hit // 64 - 2
            places = row * self.width + np.arange(first, first + 2) % self.width
            self.flat["window"][places] = match.window
            tables.mark("window", places)
            s.first_window[row] = first
            s.length[row] = s.high[row] = s.floor[row] = hit
            s.registered[row] = n
            s.serial[row] = self.prefix.serial[match.pages[-1]]
            tables.lengths[row] = hit
            tables.mark_one("lengths", row)
            self.copies.restore(match.checkpoint, slot, hit)
        self.rebase_one(row, hit)

    def fork(self, row: int, to: int) -> None:
        """Make the fresh row `to` a twin of `row`, which has nothing staged."""
        s, tables = self.sequences, self.tables
        for array in (s.length, s.high, s.floor, s.first_window, s.registered, s.serial, s.prompt_end):
            array[to] = array[row]
        s.text[to].digests = list(s.text[row].digests)
        slot = int(self.state.take(1)[0])
        tables.state[to] = slot
        tables.mark_one("state", to)
        length = int(s.length[row])
        if length:
            full, columns = self.held(row)
            self.full.share(tables.full[row, :full])
            self.window.share(tables.window[row, columns])
            tables.full[to, :full] = tables.full[row, :full]
            tables.mark_range("full", to * self.blocks, to * self.blocks + full)
            tables.window[to, columns] = tables.window[row, columns]
            tables.mark("window", to * self.width + columns)
            tables.lengths[to] = length
            tables.mark_one("lengths", to)
            self.copies.copy("state", int(tables.state[row]), slot)
            s.flags[row] |= SHARED
            s.flags[to] |= SHARED
        self.rebase_one(row, length)
        self.rebase_one(to, length)

    def held(self, row: int) -> tuple[int, Ints]:
        """(full pages held, columns of window pages held, oldest first) of a row."""
        length = int(self.sequences.length[row])
        index = np.arange(int(self.sequences.first_window[row]), (length + 63) >> 6)
        return (length + 255) >> 8, index % self.width

    def cut(self, row: int, length: int) -> None:
        """Let go of what lies wholly past `length`; the row's length is still the old one."""
        s, tables = self.sequences, self.tables
        old = int(s.length[row])
        first, last = (length + 255) >> 8, (old + 255) >> 8
        if first < last:
            self._clear("full", row * self.blocks + np.arange(first, last))
        first, last = max((length + 63) >> 6, int(s.first_window[row])), (old + 63) >> 6
        if first < last:
            self._clear("window", row * self.width + np.arange(first, last) % self.width)
        if s.flags[row] & STAGED:
            self.step.withdraw(row, length)
            s.settled[row] = min(int(s.settled[row]), length)
        s.forget_tokens(row, length)
        if NEVER > s.registered[row] > length // PAGE:
            n = length // PAGE
            text = s.text[row]
            s.registered[row] = n
            s.serial[row] = self.prefix.serial_of(text.digests[n - 1]) if n else root_serial(text.namespace)
        s.flags[row] |= SHARED  # the prefix cache, or a checkpoint, may keep the page that is written next
        tables.lengths[row] = length
        s.length[row] = length

    def vacate(self, row: int, *, park: bool) -> None:
        """The row's pages and slot go, last page first; the sequence is parked or forgotten."""
        s, tables = self.sequences, self.tables
        self.settle(row)
        full, columns = self.held(row)
        if s.flags[row] & STAGED:
            self.step.withdraw(row, 0)
            self.staged = [rows[rows != row] for rows in self.staged]
        if full:
            pages = tables.full[row, :full][::-1].copy()
            tables.full[row, :full] = 0
            tables.mark_range("full", row * self.blocks, row * self.blocks + full)
            self._let_go("full", pages)
        if columns.size:
            self._clear("window", row * self.width + columns)
        self._let_go("state", tables.state[row : row + 1].copy())
        tables.state[row] = tables.lengths[row] = 0
        tables.mark_one("state", row)
        tables.mark_one("lengths", row)
        if park:
            s.park(row)
        else:
            s.unseat(row)

    def _clear(self, life: str, places: Ints) -> None:
        """Null pages in these places, which are in ascending order of positions; the last page goes first."""
        table = self.flat[life]
        pages = table[places[::-1]]
        table[places] = 0
        self.tables.mark(life, places)
        self._let_go(life, pages)


def _places(single: list[int], runs: list[Ints]) -> Ints:
    if not runs:
        return np.array(single, np.int64) if single else _NOWHERE
    if not single and len(runs) == 1:
        return runs[0]
    return np.concatenate([np.array(single, np.int64), *runs])


def _exhausted(pages: Pages, wanted: int) -> None:
    raise PoolExhausted(
        f"extend: {wanted} pages of the life cycle {pages.life!r} wanted; {pages.free} are free, {pages.cached} "
        f"cached, {pages.fenced} wait for steps in flight, {pages.used} of {pages.total} are used. Free or preempt a "
        "sequence, or end a step"
    )
