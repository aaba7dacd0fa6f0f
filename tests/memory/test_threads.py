"""One writer at a time: whoever comes second is told so, and nothing happens to the pool."""

import threading

import pytest
from pools import fingerprint, prefill, small_pool, tokens

import dsv4_rt
from dsv4_rt.errors import PoolError, PoolMisuse

MUTATORS = [
    lambda pool, seq: pool.create(),
    lambda pool, seq: pool.create([1, 2, 3]),
    lambda pool, seq: pool.extend(seq, 1),
    lambda pool, seq: pool.append(seq, [1]),
    lambda pool, seq: pool.truncate(seq, 10),
    lambda pool, seq: pool.fork(seq),
    lambda pool, seq: pool.free(seq),
    lambda pool, seq: pool.preempt(seq),
    lambda pool, seq: pool.resume(seq),
    lambda pool, seq: pool.begin_step(),
    lambda pool, seq: pool.end_step(1),
    lambda pool, seq: pool.upload(),
    lambda pool, seq: pool.can_admit(5),
    lambda pool, seq: pool.reset_prefix_cache(),
    lambda pool, seq: pool.snapshot(),
    lambda pool, seq: pool.check(),
]


def test_a_call_inside_a_call_is_refused(emulator, monkeypatch):
    """While one thread stands in the middle of an upload, every call of another one is refused."""
    pool = small_pool()
    seq = pool.create()
    prefill(pool, seq, 10)
    pool.fork(seq)  # a copy to carry out
    inside, go_on = threading.Event(), threading.Event()
    copy = pool.storage.copy

    def slow(*args, **kwargs):
        inside.set()
        assert go_on.wait(30)
        return copy(*args, **kwargs)

    monkeypatch.setattr(pool.storage, "copy", slow)

    def upload():
        with dsv4_rt.use_device(emulator):
            pool.upload()

    first = threading.Thread(target=upload)
    first.start()
    assert inside.wait(30)
    before = fingerprint(pool)
    for call in MUTATORS:
        with pytest.raises(PoolMisuse, match="another thread is inside the pool; one writer at a time"):
            call(pool, seq)
        assert fingerprint(pool) == before
    go_on.set()
    first.join()
    pool.check()
    pool.extend(seq)


@pytest.mark.parametrize("locked", [False, True], ids=["unlocked", "locked"])
def test_eight_threads(emulator, rng, locked):
    """Unlocked they get in each other's way and the pool stays whole; with the engine's lock nothing is refused."""
    pool = small_pool(max_sequences=12, pages=200, window_pages=300)
    lock = threading.Lock() if locked else threading.Semaphore(8)
    refused, unexpected, done = [], [], []
    prompts = [tokens(rng, 700) for _ in range(8)]

    def work(i):
        def call(f, *args):
            while True:
                try:
                    with lock:
                        return f(*args)
                except PoolMisuse as error:
                    if "another thread" not in str(error):
                        raise
                    refused.append(error)

        try:
            with dsv4_rt.use_device(emulator):
                for _ in range(25):
                    seq = call(pool.create, prompts[i])
                    for n in (300, 1, 5):
                        call(pool.extend, seq, n)
                        call(pool.upload)
                    call(pool.append, seq, [1, 2])
                    call(pool.preempt, seq)
                    call(pool.resume, seq)
                    call(pool.free, seq)
                    done.append(seq)
        except PoolError as error:
            unexpected.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not unexpected
    assert len(set(done)) == 200
    assert not (locked and refused)
    pool.upload()
    pool.check()
    stats = pool.stats()
    assert (stats.full.used, stats.window.used, stats.state.used, stats.sequences) == (0, 0, 0, 0)
