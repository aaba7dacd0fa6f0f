"""Random operations against the slow model, check() after each; content read back at every upload.

Hypothesis draws the operations and shrinks what fails. Both sides must raise the same exception or none, hold the same
number of pages in the same conditions, have the same lengths and counters, and equal tables up to the names of pages.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from model import COLUMN, FULL, Model
from probe import Probe
from small import small_pool

import dsv4_rt
from dsv4_rt.errors import LaunchError
from dsv4_rt.memory import KVPool, PoolError, PoolExhausted

SIZES = {
    "pages": 12,
    "window_pages": 40,
    "checkpoints": 4,
    "max_sequences": 6,
    "max_length": 2304,
    "max_in_flight": 600,
    "max_tokens": 900,
    "checkpoint_every": 512,
}
COUNTS = [0, 1, 1, 2, 3, 5, 63, 64, 65, 128, 130, 255, 256, 257, 300, 512, 600, 601]
LENGTHS = [0, 1, 255, 256, 257, 300, 511, 512, 513, 600, 770, 1024, 1025, 1300, 2304, 2305, 4000]
TURNS = [10**9, 10**9, 256, 300, 600]  # where a prompt turns into another
APPENDED = [0, 1, 3, 100, 256, 257, 700, 3000]
BACK = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 200]


def text(root, n, turn=10**9):
    """Prompt `root`: the same ids for all who ask, up to `turn`; from there on those of another."""
    i = np.arange(n)
    return ((i * 7919 + np.where(i < turn, root, root + 1000 + turn) * 104_729) % 50_000).astype(np.int32)


OPERATIONS = {  # how often each is drawn
    "serve": 6, "create": 4, "extend": 8, "decode": 5, "append": 5, "truncate": 4, "draft": 5, "fork": 3, "free": 5,
    "preempt": 2, "resume": 3, "upload": 4, "failing": 2, "step": 3, "need": 1, "reset": 1, "restore": 1,
}  # fmt: skip
DRAWN = [kind for kind, times in OPERATIONS.items() for _ in range(times)]


class PoolMachine(RuleBasedStateMachine):
    """`ids` maps the model's names to the pool's ids. The probe's content are the token ids that kernels would see."""

    operations = 0  # calls on a pool that were compared, of all machines

    @initialize(draft=st.sampled_from([0, 0, 3, 7]), pages=st.sampled_from([5, 9, 12, 24]))
    def start(self, draft, pages):
        sizes = SIZES | {"max_draft": draft, "pages": pages}
        self.pool, self.model = small_pool(**sizes), Model(**sizes)
        self.probe = Probe(self.pool, dsv4_rt.device())
        self.ids, self.names = {}, []
        self.starts = {}  # name -> length at the last upload, of those in the step
        self.epochs = []

    @rule(kind=st.sampled_from(DRAWN), i=st.integers(0, 59), j=st.integers(0, 59), k=st.integers(0, 59))
    def operation(self, kind, i, j, k):
        if not self.model.live and kind not in ("create", "serve", "free", "resume", "step"):
            kind = "create"
        getattr(self, kind)(i, j, k)

    def both(self, what, model_call, pool_call):
        """The same call on both sides, then everything is compared. Returns (result of the pool, type raised)."""
        outcome = []
        for call in (pool_call, model_call):
            try:
                outcome.append((call(), None))
            except PoolError as error:
                outcome.append((error, type(error)))
        (result, got), (ours, expected) = outcome
        same = got is expected or (got and expected and issubclass(expected, got) and got is not PoolError)
        assert same, f"{what}: the pool raises {got} ({result}), the model {expected} ({ours})"
        if isinstance(ours, bool):
            assert result is ours, f"{what}: the pool says {result}"
        PoolMachine.operations += 1
        self.same()
        return result, got

    def seq(self, name):
        return self.ids.get(name, 10**6 + 7)

    def name(self, i, parked=False):
        """The i-th living sequence; now and then one that was freed or is preempted, or never was."""
        living = [*self.model.live, *(self.model.preempted if parked else ())]
        if not living or i % 20 == 19:
            return self.names[i % len(self.names)] if self.names else "nobody"
        return living[i % len(living)]

    def create(self, i, j, k):
        """A prompt of one of three texts, which may turn into another at some place."""
        tokens = text(i % 3, LENGTHS[j % len(LENGTHS)], TURNS[k % len(TURNS)])
        namespace = b"adapter" if i % 3 == 2 else b""
        able, _ = self.both(
            "can_admit",
            lambda: self.model.can_admit(tokens.tolist(), namespace),
            lambda: self.pool.can_admit(tokens, namespace),
        )
        name = f"s{len(self.names)}"
        seq, raised = self.both(
            f"create of {len(tokens)}",
            lambda: self.model.create(name, tokens.tolist(), namespace),
            lambda: self.ids.setdefault(name, self.pool.create(tokens, namespace)),
        )
        self.able = able is True
        assert not (raised and self.able)
        if raised:
            return None
        self.names.append(name)
        self.probe.set_content(seq, np.concatenate([tokens, text(9, 4000)]), namespace)
        return name

    def serve(self, i, j, k):
        """A whole request: prompt in chunks that end at checkpoints, some tokens of output, perhaps the end."""
        name = self.create(i, j, k)
        promised = self.able and not self.epochs  # nobody else allocates; steps in flight would hold window pages
        while name and self.model.live[name].length < len(self.model.live[name].tokens):
            s = self.model.live[name]
            stop = min(self.pool.next_checkpoint(self.ids[name]), len(s.tokens), s.length + 600)
            if raised := self.reserve({name: stop - s.length}):
                assert not (promised and raised is PoolExhausted), "can_admit said that it fits"
                break
            self.upload()
        if name and j % 3:
            self.free_name(name)

    def extend(self, i, j, k):
        batch = {self.name(i): COUNTS[j % len(COUNTS)]}
        if k % 3:
            batch |= {self.name(i + 1): COUNTS[k % len(COUNTS)], self.name(i + 2): 1}
        self.reserve(batch)

    def decode(self, i, j, k):
        """One step of everybody."""
        self.reserve(dict.fromkeys(self.model.live, 64 if i % 5 == 0 else 1))
        if j % 4:
            self.upload()

    def reserve(self, batch):
        starts = {name: self.model.live[name].length for name in batch if name in self.model.live}
        counts = list(batch.values())
        _, raised = self.both(
            f"extend {batch}",
            lambda: self.model.extend(list(batch), counts, self.first_window_pages(batch, starts)),
            lambda: self.pool.extend([self.seq(name) for name in batch], counts),
        )
        if not raised:
            for name, count in batch.items():
                if count:
                    self.starts.setdefault(name, starts[name])
                self.cover(name)
        return raised

    def first_window_pages(self, batch, starts):
        """name -> index of the first window page in the pool's table; None if the pool did not extend."""
        found = {}
        for name, start in starts.items():
            length = self.pool.length(self.ids[name])
            if length != start + batch[name] or len(starts) < len(batch):
                return None
            held = np.count_nonzero(self.pool._tables.window[self.pool.row(self.ids[name])])
            found[name] = -(-length // COLUMN) - int(held)
        return found

    def cover(self, name):
        """The kernels need token ids for every position, told to the pool or not."""
        seq = self.ids[name]
        if len(self.probe.content[seq]) < self.model.live[name].length + 700:
            self.probe.set_content(seq, np.concatenate([self.probe.content[seq], text(9, 4000)]))

    def upload(self, *_):
        self.both("upload", self.model.upload, lambda: self.pool.upload() and None)
        self.kernels()

    def kernels(self):
        """What follows an upload: everything that the step may look at is read, then the step's values are written."""
        for name, start in self.starts.items():
            if name in self.model.live:
                self.probe.read_back(self.ids[name], min(start, self.model.live[name].length))
        self.probe.write()
        self.probe.check_tables()
        self.starts = {}

    def failing(self, i, j, k):
        """Copies or table changes fail, before or after their launch: to the books it never happened."""
        where, name = [(self.pool.storage, "copy"), (self.pool._tables, "upload")][i % 2]
        call = getattr(where, name)

        def fail(*args, **kwargs):
            if j % 2:
                call(*args, **kwargs)
            raise LaunchError("injected")

        setattr(where, name, fail)
        try:
            self.pool.upload()
        except LaunchError:
            self.same()
        else:  # there was nothing to copy
            self.model.upload()
            self.kernels()
        finally:
            delattr(where, name)

    def append(self, i, j, k):
        self.append_some(self.name(i), APPENDED[j % len(APPENDED)])

    def append_some(self, name, n):
        known = len(self.model.live[name].tokens) if name in self.model.live else 0
        content = self.probe.content.get(self.seq(name), np.zeros(9, np.int32))
        tokens = content[known : known + n]
        self.both(
            f"append {len(tokens)} to {known}",
            lambda: self.model.append(name, tokens.tolist()),
            lambda: self.pool.append(self.seq(name), tokens),
        )

    def truncate(self, i, j, k):
        """Take some back, or far too many; what follows may be the same text or another."""
        name = self.name(i)
        old = self.model.live[name].length if name in self.model.live else 0
        self.truncate_to(name, old - BACK[j % len(BACK)], k)

    def truncate_to(self, name, length, k):
        old = self.model.live[name].length if name in self.model.live else 0
        _, raised = self.both(
            f"truncate {old} to {length}",
            lambda: self.model.truncate(name, length),
            lambda: self.pool.truncate(self.seq(name), length),
        )
        if not raised and length < old:
            seq = self.ids[name]
            if k % 3:
                content = self.probe.content[seq][:length]
                self.probe.set_content(seq, np.concatenate([content, text(20 + k % 3, 4000)]))
            if name in self.starts:
                self.starts[name] = min(self.starts[name], length)

    def draft(self, i, j, k):
        """A step of speculation: some tokens, some of them taken back, the others told."""
        name = list(self.model.live)[i % len(self.model.live)]
        known = len(self.model.live[name].tokens)
        if not self.reserve({name: 1 + j % 7}):
            if k % 2:
                self.upload()
            length = self.model.live[name].length - min(k % 9, 1 + j % 7)
            self.truncate_to(name, length, k)
            if known <= length and name in self.model.live:
                self.append_some(name, length - len(self.model.live[name].tokens))

    def fork(self, i, j, k):
        name, child = self.name(i), f"s{len(self.names)}"
        seq, raised = self.both(
            "fork",
            lambda: self.model.fork(name, child),
            lambda: self.ids.setdefault(child, self.pool.fork(self.seq(name))),
        )
        if not raised:
            self.names.append(child)
            s, parent = self.model.live[child], self.ids[name]
            content = self.probe.content[parent][: max(s.length, len(s.tokens))]
            content = np.concatenate([content, text(30 + j % 3, 4000)])
            self.probe.set_content(seq, content, self.probe.namespace[parent])

    def free(self, i, j, k):
        self.free_name(self.name(i, parked=True))

    def free_name(self, name):
        seq = self.seq(name)
        _, raised = self.both("free", lambda: self.model.free(name), lambda: self.pool.free(seq))
        if not raised:
            self.probe.parked.discard(seq)
            self.probe.forget(seq)
            self.starts.pop(name, None)

    def preempt(self, i, j, k):
        name = self.name(i)
        _, raised = self.both("preempt", lambda: self.model.preempt(name), lambda: self.pool.preempt(self.seq(name)))
        if not raised:
            self.probe.parked.add(self.ids[name])
            self.starts.pop(name, None)

    def resume(self, i, j, k):
        parked = list(self.model.preempted)
        name = parked[i % len(parked)] if parked and j % 9 else self.name(i)
        result, raised = self.both("resume", lambda: self.model.resume(name), lambda: self.pool.resume(self.seq(name)))
        if not raised:
            assert result == self.model.live[name].length
            self.probe.parked.discard(self.ids[name])

    def step(self, i, j, k):
        """Begin a step or end one, not always the oldest; now and then one too many, or one that never was."""
        if i % 10 == 9:
            self.both("end_step", lambda: self.model.end_step(10**6), lambda: self.pool.end_step(10**6))
        elif len(self.epochs) < 2 and i % 2 or i % 10 == 8:
            epoch, raised = self.both("begin_step", self.model.begin_step, self.pool.begin_step)
            if not raised:
                self.epochs.append(epoch)
        elif self.epochs:
            epoch = self.epochs.pop(j % len(self.epochs))
            self.both("end_step", lambda: self.model.end_step(epoch), lambda: self.pool.end_step(epoch))

    def reset(self, i, j, k):
        if i % 4 == 0:
            self.both("reset", self.model.reset_prefix_cache, lambda: self.pool.reset_prefix_cache() and None)

    def restore(self, i, j, k):
        """The life goes on in a pool made from a snapshot, whose own snapshot is the same bytes."""
        for epoch in self.epochs:
            self.both("end_step", lambda e=epoch: self.model.end_step(e), lambda e=epoch: self.pool.end_step(e))
        self.epochs = []
        self.upload()
        data = self.pool.snapshot()
        self.pool = self.probe.pool = KVPool.restore(data, self.pool.layout)
        assert self.pool.snapshot() == data
        self.same()

    def need(self, i, j, k):
        n, cached, chunk = LENGTHS[i % len(LENGTHS)], (0, 256, 512)[j % 3], (1, 64, 600)[k % 3]
        if cached <= n:
            got, want = self.pool.need(n, cached, chunk), self.model.need(n, cached, chunk)
            assert (got.full, got.window) == (want["full"], want["window"])

    def same(self):
        self.pool.check()
        stats = self.pool.stats()
        for life, pages in self.model.lives.items():
            got, idle = getattr(stats, life), len(pages.idle)
            used = len(pages.out) - idle - len(pages.fenced)
            have = (got.free, got.used, got.cached, got.fenced)
            assert have == (pages.free, used, idle, len(pages.fenced)), life
        for counter, value in self.model.counts.items():
            assert getattr(stats, counter) == value, counter
        taken = {"full": {}, "window": {}, "state": {}}  # id -> page
        for name, s in self.model.live.items():
            seq = self.ids[name]
            assert self.pool.length(seq) == s.length
            row = self.pool.row(seq)
            tables = self.pool._tables
            ring = tables.window[row]
            pairs = {
                "full": list(zip(s.full, tables.full[row], strict=False)),
                "window": [(page, ring[i % len(ring)]) for i, page in s.window.items()],
                "state": [(s.state, tables.state[row])],
            }
            assert not tables.full[row, len(s.full) :].any()
            assert np.count_nonzero(ring) == len(s.window)
            assert len(s.full) == -(-s.length // FULL)
            assert max(s.window, default=-1) == -(-s.length // COLUMN) - 1
            for life, found in pairs.items():
                for page, number in found:
                    assert number > 0
                    assert taken[life].setdefault(int(number), page) is page, f"{life} {number} is two pages"
                    assert getattr(page, "number", number) == number, f"{life}: a page has another id now"
                    page.number = int(number)
        for life, held in taken.items():
            numbers = [page.number for page in self.model.lives[life].out if hasattr(page, "number")]
            assert len(set(numbers)) == len(numbers), f"{life}: one id for two pages"
            assert len(set(map(id, held.values()))) == len(held)

    def teardown(self):
        """Everything is given back: all pages are free again."""
        if not hasattr(self, "pool"):
            return
        for name in [*self.model.live, *self.model.preempted]:
            self.pool.free(self.ids[name])
        self.pool.upload()
        for epoch in self.epochs:
            self.pool.end_step(epoch)
        self.pool.reset_prefix_cache()
        self.pool.check()
        stats = self.pool.stats()
        assert all(getattr(stats, life).free == getattr(stats, life).total for life in self.model.lives)


def run(examples, steps, phases=tuple(Phase)):
    run_state_machine_as_test(
        PoolMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=phases,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_short_histories(emulator):
    run(25, 40)


@pytest.mark.slow
def test_100_000_operations(emulator):
    PoolMachine.operations = 0
    while PoolMachine.operations < 100_000:
        run(100, 120, (Phase.generate,))  # to shrink a history of hundreds of operations takes longer than to read it
