"""Snapshots: whole, deterministic, and nothing but what they claim to be."""

import dataclasses

import numpy as np
import pytest
from pools import fingerprint, prefill, small_layout, small_pool, tokens

import dsv4_rt
from dsv4_rt.errors import PoolError, PoolMisuse, SnapshotError
from dsv4_rt.memory import KVLayout, KVPool, snapshot


def lived_in(rng, **changes):
    """A pool with running, forked, preempted and freed sequences, a warm cache, and random contents."""
    pool = small_pool(**changes)
    prompts = [tokens(rng, 700) for _ in range(3)]
    for prompt in prompts:
        seq = pool.create(prompt, b"tenant")
        prefill(pool, seq, 700)
        pool.free(seq)
    a, b, c = pool.create(prompts[0], b"tenant"), pool.create(), pool.create(prompts[1])
    prefill(pool, a, 650)
    prefill(pool, b, 77)
    prefill(pool, c, 300)
    pool.append(b, tokens(rng, 90))
    seqs = [a, b, c, pool.fork(a)]
    pool.preempt(c)
    pool.upload()
    for cache in pool.layout.names:
        array = pool.storage.array(cache)
        array[:, 1:] = pool.device.array(rng.integers(0, 256, array[:, 1:].shape, dtype=np.uint8))
    return pool, seqs, prompts


def go_on(pool, seqs, prompts, seed):
    """A reproducible rest of a life; what the calls returned."""
    rng, said = np.random.default_rng(seed), []
    a, b, c, d = seqs
    for prompt in prompts:
        said.append(pool.create(prompt, b"tenant"))
        said.append(pool.length(said[-1]))
        pool.extend([a, b, d], rng.integers(0, 99, 3))
        pool.upload()
        pool.free(said[-2])
    said.append(pool.resume(c))
    said.append(pool.reset_prefix_cache())
    pool.free(d)
    said.append(pool.fork(b))
    pool.upload()
    pool.check()
    return said


def test_a_restored_pool_is_the_same_and_goes_on_alike(emulator, rng):
    pool, seqs, prompts = lived_in(rng)
    data = pool.snapshot()
    assert pool.snapshot() == data
    twin = KVPool.restore(data, pool.layout)
    assert twin.snapshot() == data
    assert dataclasses.asdict(twin.stats()) == dataclasses.asdict(pool.stats())
    numpy = pool.device.numpy
    for cache in pool.layout.names:
        life = pool._lives[pool.layout.cache(cache).life]
        pages = np.flatnonzero(np.isin(life.where, (1, 2)))
        assert pages.size
        assert (numpy(pool.storage.array(cache)[:, pages]) == numpy(twin.storage.array(cache)[:, pages])).all()
    for name in ("csa", "window"):
        assert (numpy(pool.block_table(name)) == numpy(twin.block_table(name))).all()
    assert go_on(pool, seqs, prompts, 3) == go_on(twin, seqs, prompts, 3)
    (header, books), (other, others) = (snapshot.parse(p.snapshot(), p.layout) for p in (pool, twin))
    assert header == other
    for name in books:
        if not name.startswith("cache."):  # pages that were given out since hold what was there before
            assert np.array_equal(books[name], others[name]), name


def test_the_same_history_gives_the_same_bytes(emulator, rng):
    seed = int(rng.integers(2**31))
    first, second = (lived_in(np.random.default_rng(seed))[0].snapshot() for _ in range(2))
    assert first == second


def test_from_one_device_to_another(device, rng):
    pool, seqs, prompts = lived_in(rng)
    with dsv4_rt.use_device("emulator:sm_90a") as other:
        twin = KVPool.restore(pool.snapshot(), pool.layout, device=other)
        assert twin.snapshot() == pool.snapshot()


def test_damage_is_refused(emulator, rng):
    pool, *_ = lived_in(rng, pages=12)
    data = pool.snapshot()
    for at in [0, 5, 16, 20, 30, len(data) // 2, len(data) - 40, len(data) - 1, *rng.integers(0, len(data), 20)]:
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        with pytest.raises(SnapshotError, match="restore: "):
            KVPool.restore(bytes(broken), pool.layout)
    for cut in [0, 1, 15, 16, 30, len(data) // 2, len(data) - 1]:
        with pytest.raises(SnapshotError, match="restore: "):
            KVPool.restore(data[:cut], pool.layout)
    with pytest.raises(SnapshotError, match="damaged or cut off"):
        KVPool.restore(data + b"x", pool.layout)
    for no in (b"", "text", None, b"\x80\x04K\x01."):
        with pytest.raises(SnapshotError, match="no snapshot of a KVPool"):
            KVPool.restore(no, pool.layout)


def test_another_version_or_layout_is_refused(emulator, rng):
    pool, *_ = lived_in(rng)
    data = pool.snapshot()
    other = bytearray(data)
    other[15] = 9
    with pytest.raises(SnapshotError, match="the snapshot has version 9; this package reads version 1"):
        KVPool.restore(bytes(other), pool.layout)
    layouts = [small_layout(1), small_layout(0, "split"), small_layout(0, "v4", "fp8")]
    caches = list(pool.layout.caches)
    caches[0] = dataclasses.replace(caches[0], layers=(3,))
    layouts.append(KVLayout(pool.layout.name, tuple(caches)))
    for layout in layouts:
        with pytest.raises(SnapshotError, match="restore it with the layout it was made with"):
            KVPool.restore(data, layout)


def test_a_snapshot_of_a_pool_in_motion_is_refused(emulator, rng):
    pool, seqs, _ = lived_in(rng)
    step = pool.begin_step()
    before = fingerprint(pool)
    with pytest.raises(PoolMisuse, match="steps .* are in flight"):
        pool.snapshot()
    pool.end_step(step)
    pool.extend(seqs[0], 1)
    before = fingerprint(pool)
    with pytest.raises(PoolMisuse, match="upload first"):
        pool.snapshot()
    assert fingerprint(pool) == before
    pool.upload()
    pool.fork(seqs[0])
    with pytest.raises(PoolMisuse, match="upload first"):
        pool.snapshot()


def test_no_pickle():
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(snapshot))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported == {"hashlib", "json", "struct", "numpy"}
    assert issubclass(SnapshotError, PoolError)
