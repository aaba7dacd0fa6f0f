"""The meaning of KVPool, slow and obvious: an object a page, dicts and lists, one page at a time, no hash at all.

What a page holds is looked up by all tokens up to its end. Holders of a page are a list of names. Every operation
either does everything or raises before it changes anything. Ids of pages are the pool's own business: a test maps the
pool's ids to these objects and demands that the map stays one to one.
"""

from dsv4_rt.memory import PoolExhausted, PoolMisuse, TooLong, UnknownSequence

FULL, COLUMN, WINDOW = 256, 64, 128  # tokens a page, tokens a window page, positions that a query sees


class EitherError(PoolMisuse, TooLong):
    """Two things are wrong at once: which one is reported is nobody's business."""


class Page:
    """A page or slot. `kept`: the prefix cache wants it when nobody holds it."""

    def __init__(self):
        self.holders = []
        self.kept = False


class Life:
    """All pages of one life cycle. `idle` are cached ones, the first to be evicted first; `fenced` wait for a step."""

    def __init__(self, total, evict=None):
        self.total = total
        self.out = []  # every page that is not free
        self.idle = []
        self.fenced = []  # (step, page)
        self.evict = evict

    @property
    def free(self):
        return self.total - len(self.out)

    @property
    def available(self):
        return self.free + len(self.idle)

    def take(self, n, holder):
        """n fresh pages; what was let go longest ago is evicted for them, as many as are missing."""
        while self.free < n:
            for page in self.idle[: n - self.free]:
                if page in self.idle:  # one that went before may have taken it along
                    self.evict(page)
        pages = [Page() for _ in range(n)]
        for page in pages:
            page.holders.append(holder)
        self.out += pages
        return pages

    def hold(self, page, holder):
        if page in self.idle:
            self.idle.remove(page)
        self.fenced = [(step, other) for step, other in self.fenced if other is not page]
        page.holders.append(holder)

    def drop(self, page, holder, fence):
        """True if nobody holds it any more."""
        page.holders.remove(holder)
        if page.holders:
            return False
        if fence:
            self.fenced.append((fence, page))
        else:
            self.rest(page)
        return True

    def rest(self, page):
        if page.kept:
            self.idle.append(page)
        else:
            self.out.remove(page)

    def forget(self, page):
        """The cache does not want it any more."""
        page.kept = False
        if page in self.idle:
            self.idle.remove(page)
            self.out.remove(page)

    def retire(self, oldest):
        done = [page for step, page in self.fenced if step < oldest]
        self.fenced = [(step, page) for step, page in self.fenced if step >= oldest]
        for page in done:
            self.rest(page)


class Entry:
    """A page that can be found: after which other entry it comes (None: the first), and its checkpoint."""

    def __init__(self, key, page, before):
        self.key, self.page, self.before = key, page, before
        self.checkpoint = None


class Checkpoint:
    def __init__(self, entry, slot, window):
        self.entry, self.slot, self.window = entry, slot, window


class Sequence:
    def __init__(self, namespace, tokens):
        self.namespace = namespace
        self.tokens = list(tokens)
        self.prompt_end = len(tokens) // FULL * FULL
        self.length = self.high = self.floor = 0
        self.staged = None  # (length, high) at the last upload, if tokens came since
        self.full = []
        self.window = {}  # position // 64 -> page
        self.state = None
        self.registered = 0  # pages the cache has dealt with; None: it must not
        self.entry = None  # of the last of them


class Model:
    """Sequences by name, which the test chooses."""

    def __init__(
        self, *, pages, window_pages, checkpoints, max_sequences, max_length, max_in_flight, max_tokens, max_draft=0,
        checkpoint_every=4096, steps_in_flight=2, watermark=0.01,
    ):  # fmt: skip
        self.max_sequences, self.max_length = max_sequences, max_length
        self.max_in_flight, self.max_tokens, self.max_draft = max_in_flight, max_tokens, max_draft
        self.checkpoint_every, self.steps_in_flight, self.watermark = checkpoint_every, steps_in_flight, watermark
        self.full = Life(pages, self.evict_full)
        self.window = Life(window_pages, lambda page: self.evict_checkpoint(self.checkpoint_with(page)))
        self.state = Life(max_sequences + steps_in_flight)
        self.slots = Life(checkpoints, lambda slot: self.evict_checkpoint(self.checkpoint_with(slot)))
        self.lives = {"full": self.full, "window": self.window, "state": self.state, "checkpoint": self.slots}
        self.live, self.preempted = {}, {}
        self.ever = set()
        self.found = {}  # (namespace, tokens up to the page's end) -> Entry
        self.copies = []  # (life, source, life, target) until the next upload
        self.step_tokens = 0
        self.epoch, self.open = 0, []
        self.counts = dict.fromkeys(
            ["tokens_queried", "tokens_hit", "tokens_lost", "checkpoints_taken", "checkpoints_missed", "evictions"]
            + ["checkpoint_evictions", "copied_pages", "preemptions"], 0
        )  # fmt: skip

    # Sequences.

    def get(self, name):
        if name in self.preempted:
            raise PoolMisuse(f"{name} is preempted")
        if name not in self.live:
            raise UnknownSequence(name)
        return self.live[name]

    def create(self, name, tokens=(), namespace=b""):
        self.refuse_too_long(len(tokens))
        self.check_room()
        self.begin(name, Sequence(namespace, tokens))

    def check_room(self):
        if len(self.live) == self.max_sequences or not self.state.free:
            raise PoolExhausted("rows or state slots")

    def refuse_too_long(self, length):
        if length > self.max_length:
            raise TooLong(length)
        need = self.need(length, 0, self.max_in_flight)
        if need["full"] > self.full.total or need["window"] > self.window.total:
            raise TooLong(length)

    def match(self, namespace, tokens):
        """(entries that match, how many of them up to the last checkpoint); one token is left to compute."""
        entries, before = [], None
        for end in range(FULL, len(tokens), FULL):
            entry = self.found.get((namespace, tuple(tokens[:end])))
            if entry is None or entry.before is not before:
                break
            entries.append(entry)
            before = entry
        hit = max((i + 1 for i, entry in enumerate(entries) if entry.checkpoint), default=0)
        return entries, hit

    def begin(self, name, s):
        entries, hit = self.match(s.namespace, s.tokens)
        self.counts["tokens_queried"] += len(s.tokens)
        self.counts["tokens_hit"] += hit * FULL
        self.counts["tokens_lost"] += (len(entries) - hit) * FULL
        self.live[name] = s
        self.ever.add(name)
        (s.state,) = self.state.take(1, s)
        if hit:
            checkpoint = entries[hit - 1].checkpoint
            for entry in entries[:hit]:
                self.full.hold(entry.page, s)
                s.full.append(entry.page)
            first = hit * FULL // COLUMN - 2
            for i, page in enumerate(checkpoint.window):
                self.window.hold(page, s)
                s.window[first + i] = page
            s.length = s.high = s.floor = hit * FULL
            s.registered, s.entry = hit, entries[hit - 1]
            self.copy("checkpoint", checkpoint.slot, "state", s.state)

    def extend(self, names, counts, seen=None):
        """`seen`: name -> the first window page that the pool holds after it. Only in a step of one token each, and
        only for a sequence that needs no new window page, may a page that no query sees any more leave later."""
        seqs = [self.get(name) for name in names]
        if len(set(names)) < len(names):
            raise PoolMisuse("twice")
        if any(count < 0 for count in counts):
            raise PoolMisuse("counts")
        work = [(s, s.length, s.length + count) for s, count in zip(seqs, counts, strict=True) if count]
        too_many = self.step_tokens + sum(counts) > self.max_tokens
        too_many |= any(m - self.computed(s)[0] > self.max_in_flight for s, _, m in work)
        too_long = any(m > min(self.max_length, self.full.total * FULL) for _, _, m in work)
        if too_many and too_long:
            raise EitherError("counts")
        if too_many:
            raise PoolMisuse("counts")
        if too_long:
            raise TooLong("extend")

        # What it takes: new pages, copies of pages that others see, less what leaves the windows.
        passed, want_full, want_window = [], 0, 0
        for s, n, m in work:
            want_full += len(range(-(-n // FULL), -(-m // FULL)))
            want_window += len(range(-(-n // COLUMN), -(-m // COLUMN)))
            first = self.first_column(s, m)
            if set(counts) == {1} and n % COLUMN:
                name = next(name for name in names if self.live[name] is s)
                late = seen[name] if seen else min(s.window)
                assert min(s.window) <= late, f"{name}: window pages left that a query sees"
                first = min(first, late)
            passed += [(s, i) for i in sorted(s.window) if i < first]
        copies = self.shared_pages(work)
        want_full += sum(life == "full" for life, _, _ in copies)
        want_window += sum(life == "window" for life, _, _ in copies)
        leaving = [s.window[i] for s, i in passed]
        released = sum(leaving.count(page) == len(page.holders) for page in set(leaving)) if not self.open else 0
        if want_full > self.full.available or want_window > self.window.available + released:
            raise PoolExhausted("pages")

        for s, _, _ in work:
            self.settle(s)
        for s, i in passed:
            self.let_go("window", s.window.pop(i), s)
        for kind in dict.fromkeys(life for life, _, _ in copies):
            self.copy_on_write(kind, [(s, i) for life, s, i in copies if life == kind])
        fresh = iter(self.full.take(want_full - sum(life == "full" for life, _, _ in copies), None))
        for s, n, m in work:
            for _ in range(-(-n // FULL), -(-m // FULL)):
                s.full.append(next(fresh))
                s.full[-1].holders = [s]
        fresh = iter(self.window.take(want_window - sum(life == "window" for life, _, _ in copies), None))
        for s, n, m in work:
            for i in range(-(-n // COLUMN), -(-m // COLUMN)):
                s.window[i] = next(fresh)
                s.window[i].holders = [s]
        for s, n, m in work:
            if s.staged is None:
                s.staged = (n, s.high)
            s.length, s.high = m, max(s.high, m)
            self.step_tokens += m - n

    def first_column(self, s, m):
        """The first window page that a query of this step, or one after a truncation, can see."""
        earliest = min(self.computed(s)[0], max(s.high, m) - self.max_draft)
        return max(0, earliest - (WINDOW - 1)) // COLUMN

    def shared_pages(self, work):
        """(life, sequence, index) of partly filled pages that are written next and that others, or the cache, see."""
        found, left = [], {}
        for s, n, _ in work:
            last = [("full", n // FULL, s.full[n // FULL])] if n % FULL else []
            last += [("window", n // COLUMN, s.window[n // COLUMN])] if n % COLUMN else []
            for life, i, page in last:
                holders = left.get(page, sum(holder != "copy" for holder in page.holders))
                if holders > 1 or page.kept:
                    found.append((life, s, i))
                    left[page] = holders - 1
        return found

    def copy_on_write(self, life, places):
        pages = self.lives[life].take(len(places), None)
        for page, (s, i) in zip(pages, places, strict=True):
            page.holders = [s]
            old = s.full[i] if life == "full" else s.window[i]
            self.copy(life, old, life, page)
            self.let_go(life, old, s)
            if life == "full":
                s.full[i] = page
            else:
                s.window[i] = page
            self.counts["copied_pages"] += 1

    def let_go(self, life, page, holder):
        if self.lives[life].drop(page, holder, self.fence) and not page.kept:
            self.abandon(life, page)

    @property
    def fence(self):
        return self.open[-1] if self.open else 0

    def append(self, name, tokens):
        s = self.get(name)
        if len(s.tokens) + len(tokens) > self.max_length:
            raise TooLong("append")
        if not tokens:
            return
        s.tokens += tokens
        self.settle(s)

    def truncate(self, name, length):
        s = self.get(name)
        if not max(s.high - self.max_draft, s.floor, 0) <= length <= s.length:
            raise PoolMisuse("truncate")
        if length == s.length:
            return
        while len(s.full) > -(-length // FULL):
            self.let_go("full", s.full.pop(), s)
        for i in sorted(s.window, reverse=True):
            if i >= -(-length // COLUMN):
                self.let_go("window", s.window.pop(i), s)
        if s.staged:
            s.staged = (min(s.staged[0], length), s.staged[1])
        if length < len(s.tokens):
            del s.tokens[length:]
            s.prompt_end = min(s.prompt_end, length // FULL * FULL)
        if s.registered is not None and s.registered > length // FULL:
            s.registered = length // FULL
            s.entry = self.found.get((s.namespace, tuple(s.tokens[: s.registered * FULL]))) if s.registered else None
        s.length = length

    def fork(self, name, child):
        s = self.get(name)
        if s.staged:
            raise PoolMisuse("not uploaded")
        self.check_room()
        self.settle(s)
        new = Sequence(s.namespace, s.tokens)
        for field in ("prompt_end", "length", "high", "floor", "registered", "entry"):
            setattr(new, field, getattr(s, field))
        (new.state,) = self.state.take(1, new)
        for page in s.full:
            self.full.hold(page, new)
        for page in s.window.values():
            self.window.hold(page, new)
        new.full, new.window = list(s.full), dict(s.window)
        if s.length:
            self.copy("state", s.state, "state", new.state)
        self.live[child] = new
        self.ever.add(child)

    def free(self, name):
        if name in self.preempted:
            del self.preempted[name]
        else:
            self.vacate(self.get(name))
            del self.live[name]

    def preempt(self, name):
        s = self.get(name)
        self.vacate(s)
        self.preempted[name] = self.live.pop(name)
        self.counts["preemptions"] += 1

    def resume(self, name):
        if name not in self.preempted:
            self.get(name)
            raise PoolMisuse("not preempted")
        self.check_room()
        old = self.preempted.pop(name)
        self.begin(name, Sequence(old.namespace, old.tokens))

    def vacate(self, s):
        self.settle(s)
        for page in reversed(s.full):  # the tail first
            self.let_go("full", page, s)
        for i in sorted(s.window, reverse=True):
            self.let_go("window", s.window[i], s)
        self.let_go("state", s.state, s)

    # Steps.

    def begin_step(self):
        if len(self.open) >= self.steps_in_flight:
            raise PoolMisuse("steps")
        self.epoch += 1
        self.open.append(self.epoch)
        return self.epoch

    def end_step(self, epoch):
        if epoch not in self.open:
            raise PoolMisuse("no such step")
        self.open.remove(epoch)
        for life in self.lives.values():
            life.retire(self.open[0] if self.open else self.epoch + 1)

    def upload(self):
        kinds = ("full", "window", "state")
        done = [c for kind in kinds for c in self.copies if c[0] == c[2] == kind]
        done += [c for c in self.copies if c[2] == "checkpoint"] + [c for c in self.copies if c[0] == "checkpoint"]
        self.copies = []
        for life, source, _, _ in done:
            self.let_go(life, source, "copy")
        self.step_tokens = 0
        for s in self.live.values():
            s.staged = None

    def copy(self, life, source, to, target):
        """Note a copy; its source is held until it is made. What is itself yet to be copied is read where that is."""
        for kind, origin, same, middle in self.copies:
            if (same, middle) == (life, source) and (kind == life or to == life):
                life, source = kind, origin
        self.lives[life].hold(source, "copy")
        self.copies.append((life, source, to, target))

    def abandon(self, life, page):
        """Nobody holds or keeps the page: nothing needs to be copied into it."""
        gone = [copy for copy in self.copies if (copy[2], copy[3]) == (life, page)]
        self.copies = [copy for copy in self.copies if copy not in gone]
        for kind, source, _, _ in gone:
            self.let_go(kind, source, "copy")

    # The prefix cache.

    def computed(self, s):
        """(length, longest length) without what the step being put together adds."""
        return s.staged or (s.length, s.high)

    def settle(self, s):
        length, high = self.computed(s)
        end = min(length, len(s.tokens)) // FULL
        if s.registered is None or end <= s.registered:
            return
        first, entry = s.registered, s.entry
        start = first
        if first and (entry is None or self.found.get(entry.key) is not entry):
            start, entry = 0, None  # the chain is broken: it is linked anew from its beginning
        for j in range(start, end):
            key = (s.namespace, tuple(s.tokens[: (j + 1) * FULL]))
            entry = self.register(key, s.full[j], entry)
            boundary = (j + 1) * FULL
            wanted = boundary % self.checkpoint_every == 0 or boundary == s.prompt_end
            if j >= first and wanted and not entry.checkpoint:
                self.take_checkpoint(s, entry, boundary, high)
        s.registered, s.entry = end, entry

    def register(self, key, page, before):
        there = self.found.get(key)
        if there and there.before is before:
            return there
        if there:
            self.unregister(there)
        self.found[key] = Entry(key, page, before)
        page.kept = True
        return self.found[key]

    def unregister(self, entry):
        del self.found[entry.key]
        if entry.checkpoint:
            self.drop_checkpoint(entry.checkpoint)
        self.full.forget(entry.page)

    def take_checkpoint(self, s, entry, boundary, high):
        columns = [boundary // COLUMN - 2, boundary // COLUMN - 1]
        rows_gone = high - boundary > 4 + self.max_draft
        window_gone = any(i not in s.window for i in columns)
        to_be_restored = any(life == "checkpoint" and target is s.state for life, _, _, target in self.copies)
        if rows_gone or window_gone or to_be_restored or not self.slots.available:
            self.counts["checkpoints_missed"] += 1
            return
        window = [s.window[i] for i in columns]
        if any(page.kept for page in window):
            self.counts["checkpoints_missed"] += 1
            return
        (slot,) = self.slots.take(1, "new")
        entry.checkpoint = Checkpoint(entry, slot, window)
        for page in (slot, *window):
            page.kept = True
        self.copy("state", s.state, "checkpoint", slot)
        self.slots.drop(slot, "new", self.fence)
        self.counts["checkpoints_taken"] += 1

    def checkpoint_with(self, page):
        for entry in self.found.values():
            if entry.checkpoint and page in (entry.checkpoint.slot, *entry.checkpoint.window):
                return entry.checkpoint
        raise AssertionError("a page is kept for no checkpoint")

    def drop_checkpoint(self, checkpoint):
        checkpoint.entry.checkpoint = None
        for page in checkpoint.window:
            self.window.forget(page)
        self.slots.forget(checkpoint.slot)
        if not checkpoint.slot.holders:
            self.abandon("checkpoint", checkpoint.slot)

    def evict_checkpoint(self, checkpoint):
        self.counts["checkpoint_evictions"] += 1
        self.drop_checkpoint(checkpoint)

    def evict_full(self, page):
        (entry,) = [entry for entry in self.found.values() if entry.page is page]
        self.counts["evictions"] += 1
        self.counts["checkpoint_evictions"] += entry.checkpoint is not None
        self.unregister(entry)

    def reset_prefix_cache(self):
        for entry in list(self.found.values()):
            self.unregister(entry)
        for s in self.live.values():
            s.registered = None

    # Admission.

    def need(self, length, cached, chunk):
        """The most that a sequence newly holds at any moment, by growing one: pages as sets of indices."""
        most = 0
        floor = cached // COLUMN
        for n in range(cached, length, chunk):
            m = min(n + chunk, length)
            first = max(0, min(n, m - self.max_draft) - (WINDOW - 1)) // COLUMN
            most = max(most, sum(i >= floor for i in range(first, -(-m // COLUMN))))
        return {"full": -(-length // FULL) - cached // FULL, "window": most}

    def can_admit(self, tokens, namespace=b"", chunk=None):
        self.refuse_too_long(len(tokens))
        entries, hit = self.match(namespace, tokens)
        need = self.need(len(tokens), hit * FULL, chunk or self.max_in_flight)
        if len(self.live) == self.max_sequences or not self.state.free:
            return False
        pinned = {
            "full": [entry.page for entry in entries[:hit]],
            "window": entries[hit - 1].checkpoint.window if hit else [],
        }
        for life in ("full", "window"):
            pool = self.lives[life]
            spared = int(self.watermark * pool.total) if self.live else 0
            idle = sum(page in pool.idle for page in pinned[life])  # available now, but not once it is shared
            if need[life] + idle + spared > pool.available:
                return False
        return True
