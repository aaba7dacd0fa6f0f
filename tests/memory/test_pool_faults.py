"""Whatever is refused changes nothing: bad arguments, exhaustion anywhere, failing copies and uploads."""

import numpy as np
import pytest
from pools import fingerprint, mapping, prefill, small_pool, table, tokens

from dsv4_rt.device import open_device
from dsv4_rt.errors import (
    ArgumentError,
    DeviceError,
    Dsv4Error,
    LaunchError,
    PoolError,
    PoolExhausted,
    PoolMisuse,
    TooLong,
    UnknownSequence,
)
from dsv4_rt.memory import sequences


def busy_pool(rng, **changes):
    """A pool in the middle of things: two running sequences, one preempted, one freed, a warm cache, staged tokens."""
    pool = small_pool(**changes)
    prompt = tokens(rng, 600)
    for _ in range(2):
        seq = pool.create(prompt)
        prefill(pool, seq, 600)
        pool.free(seq)
    a, b, parked, freed = (pool.create(prompt) for _ in range(4))
    prefill(pool, a, 590)
    pool.preempt(parked)
    pool.free(freed)
    pool.extend(a, 3)
    return pool, a, b, parked, freed


NO_ID = [0, -1, 5, 1 << 40, -(1 << 20), 1 << 62]
NOT_AN_ID = [1.0, "a", None, b"x", np.float32(1), [[1]], [1.5], True]


@pytest.mark.parametrize("name", ["extend", "append", "truncate", "fork", "free", "preempt", "resume", "row", "length"])
def test_bad_ids(emulator, rng, name):
    pool, a, _, _, freed = busy_pool(rng)
    more = {"append": ([1],), "truncate": (1,)}.get(name, ())
    before = fingerprint(pool)
    for bad in [*NO_ID, freed]:
        with pytest.raises(UnknownSequence, match=f"{name}: (sequence {bad} has been freed|no sequence has the id)"):
            getattr(pool, name)(bad, *more)
        assert fingerprint(pool) == before
    for bad in NOT_AN_ID:
        with pytest.raises(PoolMisuse, match=name):
            getattr(pool, name)(bad, *more)
        assert fingerprint(pool) == before
    if name in ("extend", "truncate"):
        for bad in NO_ID:
            with pytest.raises(UnknownSequence):
                getattr(pool, name)(np.array([a, bad]), [590, 590])
            assert fingerprint(pool) == before


def test_double_free_is_named(emulator):
    pool = small_pool()
    seq = pool.create()
    pool.free(seq)
    with pytest.raises(UnknownSequence, match=f"free: sequence {seq} has been freed already"):
        pool.free(seq)
    again = pool.create()
    with pytest.raises(UnknownSequence, match=f"free: sequence {seq} has been freed already"):
        pool.free(seq)
    pool.free(again)


def test_bad_arguments(emulator, rng):
    pool, a, b, parked, _ = busy_pool(rng)
    assert pool.begin_step() == 1
    wrong = [
        (lambda: pool.extend(a, -1), PoolMisuse, "counts must not be negative; -1 given"),
        (lambda: pool.extend([a, b], [1, -5]), PoolMisuse, "counts must not be negative; -5 given"),
        (lambda: pool.extend([a, b], [1]), PoolMisuse, "for 2 sequences"),
        (lambda: pool.extend([a, b], [1.0, 2.0]), PoolMisuse, "float64"),
        (lambda: pool.extend(a, "9"), PoolMisuse, "<U1"),
        (lambda: pool.extend(a, 2**40), PoolMisuse, "max_in_flight is 600"),
        (lambda: pool.extend([a, b], [2**40, 1]), PoolMisuse, "out of range"),
        (lambda: pool.extend([a, b, a]), PoolMisuse, f"extend: sequence {a} occurs twice"),
        (lambda: pool.extend(np.array([b, b])), PoolMisuse, f"extend: sequence {b} occurs twice"),
        (lambda: pool.extend(a, 601), PoolMisuse, "by 604 tokens in one step; max_in_flight is 600"),
        (lambda: pool.extend([a, b], [600, 1]), PoolMisuse, "by 603 tokens in one step"),
        (lambda: pool.extend(parked), PoolMisuse, "is preempted"),
        (lambda: pool.append(a, [-1]), PoolMisuse, "from 0 to 2\\^31 - 1"),
        (lambda: pool.append(a, [2**31]), PoolMisuse, "from 0 to 2\\^31 - 1"),
        (lambda: pool.append(a, [1.5]), PoolMisuse, "tokens are float64"),
        (lambda: pool.append(a, np.zeros((2, 2), int)), PoolMisuse, "\\(2, 2\\)"),
        (lambda: pool.append([a, b], [1]), PoolMisuse, "1 tokens for 2 sequences"),
        (lambda: pool.append([a, a], [1, 2]), PoolMisuse, "occurs twice"),
        (lambda: pool.append(a, np.zeros(5000, int)), TooLong, "max_length = 4096"),
        (lambda: pool.create([0.5]), PoolMisuse, "tokens are float64"),
        (lambda: pool.create("text"), PoolMisuse, "tokens are"),
        (lambda: pool.create([1], "space"), PoolMisuse, "namespace is str; bytes are wanted"),
        (lambda: pool.create(np.zeros(5000, int)), TooLong, "5000 tokens"),
        (lambda: pool.truncate(a, 592), PoolMisuse, "truncate: sequence"),
        (lambda: pool.truncate(a, 594), PoolMisuse, "truncate: sequence"),
        (lambda: pool.truncate(a, 2.0), PoolMisuse, "lengths are float64"),
        (lambda: pool.truncate([a, a], [593, 593]), PoolMisuse, "occurs twice"),
        (lambda: pool.fork(a), PoolMisuse, "tokens that are not uploaded"),
        (lambda: pool.end_step(2), PoolMisuse, "step 2 is not in flight; in flight are \\[1\\]"),
        (lambda: pool.end_step(True), PoolMisuse, "step True is not in flight"),
        (lambda: pool.end_step(np.array([1, 2])), PoolMisuse, "is not in flight"),
        (lambda: pool.can_admit(True), PoolMisuse, "tokens are bool"),
        (lambda: pool.can_admit(5000), TooLong, "5000 tokens"),
        (lambda: pool.can_admit([-1]), PoolMisuse, "from 0 to"),
        (lambda: pool.can_admit([1], "space"), PoolMisuse, "can_admit: namespace is str; bytes are wanted"),
        (lambda: pool.can_admit(-1), ArgumentError, "length = -1"),
        (lambda: pool.digests([1], None), PoolMisuse, "digests: namespace is NoneType; bytes are wanted"),
        (lambda: pool.create([[1], [2, 3]]), PoolMisuse, "create: tokens are list, of which NumPy says: "),
        (lambda: pool.append(a, [[1], [2, 3]]), PoolMisuse, "append: tokens are list, of which NumPy says: "),
        (lambda: pool.extend([[a], [a, b]]), PoolMisuse, "extend: sequence ids are list, of which NumPy says: "),
        (lambda: pool.extend([a, b], [[1], [2, 3]]), PoolMisuse, "extend: counts are list, of which NumPy says: "),
        (lambda: pool.truncate(a, [[1], [2, 3]]), PoolMisuse, "truncate: lengths are list, of which NumPy says: "),
        (lambda: pool.can_resume(a), PoolMisuse, "is not preempted"),
        (lambda: pool.snapshot(), PoolMisuse, "steps \\[1\\] are in flight"),
        (lambda: pool.need(-1), Dsv4Error, "length = -1"),
    ]
    before = fingerprint(pool)
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()
        assert fingerprint(pool) == before, message
    pool.check()


def test_no_more_ids(emulator, rng, monkeypatch):
    """The last refusal of create and fork; pages that the prefix cache has not seen yet stay unseen."""
    monkeypatch.setattr(sequences, "_MASK", 3)
    pool = small_pool()
    a, b, _ = (pool.create() for _ in range(3))
    pool.append(a, tokens(rng, 300))
    prefill(pool, a, 300)
    before = fingerprint(pool)
    for call in (pool.create, lambda: pool.fork(a)):
        with pytest.raises(PoolExhausted, match="3 sequences are alive or preempted; free some"):
            call()
        assert fingerprint(pool) == before
    pool.free(b)
    pool.fork(a)
    pool.check()
    assert fingerprint(pool) != before


def test_a_step_longer_than_the_tables(emulator):
    pool = small_pool(max_tokens=8)
    a, b = pool.create(), pool.create()
    pool.extend(a, 5)
    before = fingerprint(pool)
    for call in (lambda: pool.extend(b, 4), lambda: pool.extend([b, a], [2, 2]), lambda: pool.extend(b, 9)):
        with pytest.raises(PoolMisuse, match="on top of 5 since the last upload; .* max_tokens = 8"):
            call()
        assert fingerprint(pool) == before
    pool.extend(b, 3)
    pool.upload()
    pool.extend(b, 8)


def test_errors_are_one_family():
    assert all(issubclass(e, PoolError) for e in (PoolExhausted, PoolMisuse, TooLong, UnknownSequence))
    assert issubclass(PoolError, Dsv4Error)


@pytest.mark.parametrize("max_draft", [0, 3])
def test_exhaustion_anywhere(emulator, rng, max_draft):
    """Random operations on pools of all small sizes: each that fails leaves everything as it was."""
    refused = {}
    for pages in range(3, 12):
        pool = small_pool(
            max_draft,
            pages=pages,
            window_pages=int(rng.integers(10, 24)),
            checkpoints=int(rng.integers(0, 4)),
            state_slots=4,
            max_sequences=4,
        )
        prompts = [tokens(rng, 700) for _ in range(2)]
        seqs, steps = [], []

        def some(seqs=seqs):
            return seqs[rng.integers(len(seqs))]

        names = ["create", "one", "batch", "ones", "fork", "free", "preempt", "resume", "step", "upload"]
        for name in [*rng.choice(names, 120), *["create", "batch"] * 12]:  # in the end nothing is given back
            before = fingerprint(pool)
            try:
                if name == "create":
                    prompt = prompts[rng.integers(2)]
                    seqs.append(pool.create(prompt[: rng.integers(1, 700)]))
                elif name == "step":
                    if steps and rng.integers(2):
                        pool.end_step(steps.pop(0))
                    elif len(steps) < 2:
                        steps.append(pool.begin_step())
                elif name == "upload":
                    pool.upload()
                elif seqs:
                    if name == "one":
                        pool.extend(some(), int(rng.integers(0, 400)))
                    elif name == "batch":
                        pool.extend(np.array(seqs), rng.integers(0, 300, len(seqs)))
                    elif name == "ones":
                        pool.extend(np.array(seqs))
                    elif name == "fork":
                        seqs.append(pool.fork(some()))
                    elif name == "free":
                        seq = some()
                        pool.free(seq)
                        seqs.remove(seq)
                    else:
                        getattr(pool, name)(some())
                error = None
            except PoolError as raised:
                error = type(raised).__name__
            if error:
                assert fingerprint(pool) == before, (name, error)
                refused[str(name), error] = refused.get((str(name), error), 0) + 1
            pool.check()
    assert {("create", "PoolExhausted"), ("one", "PoolExhausted"), ("batch", "PoolExhausted")} <= set(refused), refused
    assert {("fork", "PoolExhausted"), ("resume", "PoolExhausted")} <= set(refused), refused


def failing(monkeypatch, where, name, after=0):
    """Let the calls of a method after the first `after` ones fail; returns how to repair it."""
    works, calls = getattr(where, name), []

    def fail(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise LaunchError("injected")
        return works(*args, **kwargs)

    monkeypatch.setattr(where, name, fail)
    return lambda: monkeypatch.setattr(where, name, works)


@pytest.mark.parametrize("point", ["copies", "second copies", "tables"])
def test_an_upload_that_fails_is_made_good_by_the_next(emulator, rng, monkeypatch, point):
    """Copies on write, a forked state, a checkpoint saved and restored in one upload, which fails at each point."""
    pool, prompt = small_pool(), tokens(rng, 520)
    a = pool.create(prompt)
    prefill(pool, a, 512)
    pool.storage.array("csa_state")[:, int(pool.device.numpy(pool.state_slots)[pool.row(a)])] = 0x5A
    child = pool.fork(a)  # takes the checkpoint at 512
    prefix = pool.create(prompt)  # finds it, although it is not written yet
    assert pool.length(prefix) == 512
    pool.extend([a, child, prefix], [3, 2, 1])
    where, name = (pool._tables, "upload") if point == "tables" else (pool.storage, "copy")
    repair = failing(monkeypatch, where, name, after=1 if point == "second copies" else 0)
    before = fingerprint(pool)
    for _ in range(3):
        with pytest.raises(LaunchError, match="injected"):
            pool.upload()
        pool.check()
        if point == "copies":
            assert fingerprint(pool) == before
    assert pool.step_tokens == 6
    repair()
    pool.upload()
    pool.check()
    numpy = pool.device.numpy
    states = numpy(pool.storage.array("csa_state"))[0]
    slots = numpy(pool.state_slots)[pool.rows([a, child, prefix])]
    assert (states[slots[:2]] == 0x5A).all()
    assert (states[slots[2]].reshape(8, -1)[4:] == 0x5A).all()
    assert numpy(pool.lengths)[pool.rows([a, child, prefix])].tolist() == [515, 514, 513]
    assert (mapping(pool, "window")[:6] > 0).all()
    assert np.count_nonzero(table(pool, "csa")[pool.row(child)]) == 3


def test_check_finds_what_is_broken(emulator, rng):
    """Each book altered by one: check says so, and holds again when it is put back."""
    pool, a, *_ = busy_pool(rng)
    row = pool.row(a)
    pool.check()
    arrays = [
        (pool._full.refs, int(pool._tables.full[row, 0])),
        (pool._window.refs, 1),
        (pool._full.pins, 1),
        (pool._full.where, 2),
        (pool._full.keep, int(pool._prefix.page_of.max())),
        (pool._state.refs, 1),
        (pool._tables.full, (row, 0)),
        (pool._tables.full, (row, 9)),
        (pool._tables.window, (row, 590 // 64 % pool._tables.window.shape[1])),
        (pool._tables.state, row),
        (pool._tables.lengths, row),
        (pool._tables.slots["csa"], 0),
        (pool._seqs.first_window, row),
        (pool._seqs.window_base, row),
        (pool._seqs.full_base, row),
        (pool._seqs.id_of, row),
        (pool._prefix.serial, int(pool._prefix.serial.argmax())),
        (pool._prefix.checkpoint_of, int(pool._prefix.page_of.max())),
        (pool._prefix.holder, 0),
    ]
    for array, at in arrays:
        was = array[at].copy()
        array[at] = ~was if array.dtype == bool else was + 1
        with pytest.raises(PoolError, match="check: "):
            pool.check()
        array[at] = was
        pool.check()
    for name in ("free", "cached", "fenced"):
        setattr(pool._full, name, getattr(pool._full, name) + 1)
        with pytest.raises(PoolError, match="check: full"):
            pool.check()
        setattr(pool._full, name, getattr(pool._full, name) - 1)
    pool.upload()
    pool.check()
    pool.device.synchronize()
    pool.block_table("csa")[row, 0] += 1
    with pytest.raises(PoolError, match="full on the device"):
        pool.check()
    pool.block_table("csa")[row, 0] -= 1
    pool.storage.array("hca")[0, 0, 5] = 1
    with pytest.raises(PoolError, match="'hca': the null page is not zero"):
        pool.check()


def test_device_by_name():
    assert small_pool(device="emulator:sm_90a").device is open_device("emulator:sm_90a")
    with pytest.raises(DeviceError, match="'tpu' is none of"):
        small_pool(device="tpu")
    with pytest.raises(DeviceError, match="device is int"):
        small_pool(device=3)


@pytest.mark.parametrize("name", ["nothing", 3, None, ["csa"]])
def test_caches_that_are_none(emulator, name):
    pool = small_pool()
    for ask in (pool.slot_mapping, pool.block_table, lambda name: pool.view(3, name), lambda name: pool.parts(3, name)):
        with pytest.raises(ArgumentError, match="no block table|no cache"):
            ask(name)
