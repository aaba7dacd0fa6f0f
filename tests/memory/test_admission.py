"""What is predicted is what is taken; what can never fit is refused at once; a budget is kept."""

import numpy as np
import pytest
from pools import fingerprint, prefill, small_layout, small_pool, tokens

from dsv4_rt.errors import ArgumentError, PoolError, PoolExhausted, TooLong
from dsv4_rt.memory import KVPool, admission


def peak(pool, seq, length, chunk):
    """Grow in chunks; the most window pages held at any moment, and the full pages in the end."""
    most = pool.stats().window.used
    while (n := pool.length(seq)) < length:
        pool.extend(seq, min(chunk, length - n))
        pool.upload()
        most = max(most, pool.stats().window.used)
    return pool.stats().full.used, most


@pytest.mark.parametrize("max_draft", [0, 1, 5])
@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 600])
def test_need_is_what_is_taken(emulator, rng, chunk, max_draft):
    for length in [1, 64, 65, 128, 129, 255, 256, 257, *rng.integers(1, 1500, 2)]:
        pool = small_pool(max_draft)
        need = pool.need(int(length), chunk=chunk)
        assert (need.full, need.window) == peak(pool, pool.create(), int(length), chunk)
        assert need.state == pool.stats().state.used == 1


def test_need_behind_a_hit_is_what_is_taken(emulator, rng):
    for length in rng.integers(513, 1500, 8):
        pool, prompt = small_pool(), tokens(rng, int(length))
        first = pool.create(prompt)
        prefill(pool, first, 512)
        pool.extend(first, 1)  # now the checkpoint is taken
        pool.upload()
        before = pool.stats()
        second = pool.create(prompt)
        assert pool.length(second) == 512
        need = pool.need(int(length), cached=512)
        full, window = peak(pool, second, int(length), 600)
        assert need.full == full - before.full.used
        assert need.window == window - before.window.used


def test_need_counts_checkpoints(emulator, rng):
    for length in (100, 256, 512, 700, 1536, 1600):
        pool = small_pool()
        seq = pool.create(tokens(rng, length))
        prefill(pool, seq, length)
        pool.free(seq)
        assert pool.need(length).checkpoint == pool.stats().checkpoints_taken


def load(pool, rng):
    """Some random load: sequences that run, a cache that is warm."""
    prompts = [tokens(rng, int(n)) for n in rng.integers(300, 1200, 3)]
    live = []
    for _ in range(12):
        try:
            match rng.integers(4):
                case 0 | 1:
                    live.append(pool.create(prompts[rng.integers(3)]))
                    prefill(pool, live[-1], int(rng.integers(1, 1000)))
                case 2 if live:
                    pool.free(live.pop(rng.integers(len(live))))
                case 3 if live:
                    live.append(pool.fork(live[rng.integers(len(live))]))
        except PoolExhausted:
            pool.upload()
    pool.upload()
    return prompts


@pytest.mark.parametrize("in_flight", [False, True])
def test_can_admit_is_what_allocation_then_does(emulator, rng, in_flight):
    """With no watermark the answer is exact both ways, for prompts that the cache has, and has not."""
    answers = []
    for _ in range(40):
        pool = small_pool(pages=int(rng.integers(6, 16)), window_pages=int(rng.integers(12, 40)), watermark=0)
        if in_flight:
            pool.begin_step()
        prompts = load(pool, rng)
        prompt = prompts[rng.integers(3)] if rng.integers(2) else tokens(rng, int(rng.integers(1, 1500)))
        prompt = prompt[: rng.integers(1, prompt.size + 1)]
        one_chunk = len(prompt) <= 600
        before = fingerprint(pool)
        try:
            answer = pool.can_admit(prompt)
        except TooLong:
            assert fingerprint(pool) == before
            continue
        assert fingerprint(pool) == before
        if in_flight and not one_chunk:
            continue  # what a first chunk lets go waits for the step: only one chunk is predicted
        answers.append(answer)
        try:
            prefill(pool, pool.create(prompt), len(prompt), checkpoints=False)
            assert answer
        except PoolError:
            assert not answer
        pool.check()
    assert 0 < sum(answers) < len(answers)


def test_a_hit_is_no_longer_there_to_evict(emulator, rng):
    """Of 4 pages 1 is used, 1 free and 2 are cached: a prompt that finds these 2 can have 1 more, not 3."""
    pool, prompt = small_pool(pages=4, watermark=0), tokens(rng, 900)
    seq = pool.create(prompt[:520])
    prefill(pool, seq, 520)
    pool.free(seq)
    pool.extend(pool.create(), 256)
    stats = pool.stats()
    assert (stats.full.used, stats.full.cached, stats.full.free) == (1, 2, 1)
    assert pool.can_admit(prompt[:768])
    assert not pool.can_admit(prompt[:769])
    assert pool.can_admit(tokens(rng, 768))  # one that finds nothing can have the cached pages themselves
    assert not pool.can_admit(tokens(rng, 769))


def test_a_fenced_hit_takes_nothing_that_is_available(emulator, rng):
    pool, prompt = small_pool(pages=4, watermark=0), tokens(rng, 900)
    seq = pool.create(prompt[:520])
    prefill(pool, seq, 520)
    pool.begin_step()
    pool.free(seq)
    assert pool.stats().full.fenced == 3
    assert pool.can_admit(prompt[:768])
    assert not pool.can_admit(prompt[:769])
    seq = pool.create(prompt[:768])
    assert pool.length(seq) == 512
    pool.extend(seq, 256)
    pool.check()


def test_watermark(emulator):
    pool = small_pool(pages=20, watermark=0.25, max_length=8192)
    assert pool.can_admit(20 * 256)  # alone it may have all
    seq = pool.create()
    pool.extend(seq, 256)
    assert pool.can_admit(14 * 256)
    assert not pool.can_admit(14 * 256 + 1)
    pool.free(seq)
    with pytest.raises(TooLong, match="5121 tokens"):
        small_pool(pages=20, max_length=8192).can_admit(5121)


def test_rows_and_slots_are_part_of_the_answer(emulator):
    pool = small_pool(max_sequences=2, state_slots=2)
    a, _ = pool.create(), pool.create()
    assert not pool.can_admit(1)
    pool.begin_step()
    pool.free(a)
    assert not pool.can_admit(1)  # its slot waits for the step
    before = fingerprint(pool)
    with pytest.raises(PoolExhausted, match="create: no state slot is free, 1 wait for steps in flight"):
        pool.create()
    assert fingerprint(pool) == before
    spare = small_pool(max_sequences=2)
    a, _ = spare.create(), spare.create()
    spare.begin_step()
    spare.free(a)
    spare.create()


def test_too_long_is_refused_at_once(emulator, rng):
    pool = small_pool(pages=4, max_length=1200)
    seq = pool.create()
    pool.extend(seq, 500)
    pool.upload()
    before = fingerprint(pool)
    calls = [
        lambda: pool.create(tokens(rng, 1025)),
        lambda: pool.extend(seq, 525),
        lambda: pool.extend([seq], np.array([525])),
        lambda: pool.append(seq, tokens(rng, 1201)),
        lambda: pool.can_admit(1025),
    ]
    for call in calls:
        with pytest.raises(TooLong):
            call()
        assert fingerprint(pool) == before
    pool.extend(seq, 524)
    pool.upload()
    with pytest.raises(TooLong, match="1025 tokens; .* 1024 tokens at most"):
        pool.extend(np.array([seq]))
    with pytest.raises(TooLong, match="take 10 window pages; the pool has 8 in all: go in smaller chunks"):
        small_pool(window_pages=8).can_admit(1000)


SHAPE = {"max_sequences": 3, "max_length": 100_000, "max_in_flight": 512}


@pytest.mark.parametrize("given", [{}, {"checkpoints": 0}, {"checkpoints": 9}, {"window_pages": 50}])
def test_a_budget_is_kept_and_used(emulator, rng, given):
    layout = small_layout()
    budget = int(rng.integers(20, 60)) * 2**20
    pool = KVPool(layout, budget=budget, **SHAPE, **given)
    assert pool.storage.nbytes <= budget
    left = budget - pool.storage.nbytes
    assert left < layout.bytes_of("full") + layout.bytes_of("checkpoint") + 2 * layout.bytes_of("window")
    counts = pool.stats()
    assert (counts.state.total, counts.full.total >= 1) == (5, True)
    for name, value in given.items():
        assert getattr(counts, {"checkpoints": "checkpoint", "window_pages": "window"}[name]).total == value


def test_a_share_of_free_memory(emulator, monkeypatch):
    monkeypatch.setattr(admission, "free_memory", lambda device: 64 * 2**20)
    pools = [KVPool(small_layout(), budget=b, **SHAPE) for b in (0.5, "0.5", 32 * 2**20)]
    assert len({pool.storage.nbytes for pool in pools}) == 1


def test_free_memory_is_some(emulator):
    assert admission.free_memory(emulator) > 0


def test_sizes_that_make_no_pool(emulator):
    wrong = [
        ({"budget": 1 << 20}, "budget = 1,048,576 B; state, window and checkpoints"),
        ({}, "neither budget nor pages"),
        ({"budget": 1 << 30, "pages": 8}, "both say how large it is"),
        ({"budget": "a lot"}, "is no number"),
        ({"budget": 1.5}, "no share of free memory"),
        ({"pages": 0}, "pages = 0"),
        ({"pages": 4, "watermark": 1.0}, "watermark"),
        ({"pages": 4, "watermark": "1 %"}, "watermark = '1 %' is not a share"),
        ({"pages": 4, "checkpoint_every": 300}, "not a multiple of 256"),
        ({"pages": 4, "state_slots": 2}, "state_slots"),
    ]
    for given, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            KVPool(small_layout(), **{**SHAPE, **given})
    with pytest.raises(ArgumentError, match="layout is str; give a KVLayout"):
        KVPool("flash", pages=4, **SHAPE)
