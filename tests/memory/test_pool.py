"""KVPool: sequences grow, shrink, fork and end; what the device sees of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pools import expected_slots, fingerprint, mapping, prefill, small_layout, small_pool, table, tokens

from dsv4_rt.arrays import view
from dsv4_rt.errors import ArgumentError, PoolExhausted, PoolMisuse, UnknownSequence
from dsv4_rt.memory import KVPool

CACHES = ("csa", "index", "hca", "window")
LENGTHS = [1, 3, 4, 5, 63, 64, 65, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 511, 512, 513, 600]


def assert_mapped(pool, batch):
    """The device maps exactly these (sequence, first position, count), in this order, and nothing behind them."""
    n = sum(count for _, _, count in batch)
    rows, positions = pool.device.numpy(pool.token_rows), pool.device.numpy(pool.positions)
    want_rows = [pool.row(seq) for seq, _, count in batch for _ in range(count)]
    want_positions = [p for _, first, count in batch for p in range(first, first + count)]
    assert rows[:n].tolist() == want_rows
    assert positions[:n].tolist() == want_positions
    assert (positions[n:] == -1).all()
    assert (rows[n:] == 0).all()
    for cache in CACHES:
        slots = mapping(pool, cache)
        want = [s for seq, a, c in batch for s in expected_slots(pool, cache, pool.row(seq), range(a, a + c))]
        assert slots[:n].tolist() == want, cache
        assert (slots[n:] == -1).all(), cache


def test_slots_of_a_batch(device, rng):
    pool = small_pool(window_pages=90)
    seqs = [pool.create() for _ in range(4)]
    for _ in range(6):
        counts = rng.choice([0, 1, 2, 30, 47, 48, 49, 64, 200, 300], 4)
        batch = [(s, pool.length(s), int(c)) for s, c in zip(seqs, counts, strict=True)]
        pool.extend(seqs, counts)
        pool.upload()
        assert_mapped(pool, batch)
        pool.check()
    ones = [(s, pool.length(s), 1) for s in seqs]
    pool.extend(np.array(seqs))
    pool.upload()
    assert_mapped(pool, ones)


@pytest.mark.parametrize("length", LENGTHS)
def test_all_ways_to_grow_map_alike(emulator, length):
    """One long run, runs of a batch, and single tokens take the same pages in the same order, and map the same."""
    found = []
    for chunks in ([length], [length - length // 2, length // 2], [1] * length):
        for batched in (False, True):
            pool = small_pool(max_sequences=2)
            seq, other = pool.create(), pool.create()
            for c in chunks:
                if batched:
                    pool.extend(np.array([seq, other]), [c, 0])
                else:
                    pool.extend(seq, c)
            pool.upload()
            assert_mapped(pool, [(seq, 0, length)])
            pool.check()
            found.append([mapping(pool, cache).tolist() for cache in CACHES])
    assert all(f == found[0] for f in found)


def test_calls_before_an_upload_are_one_step(emulator):
    pool = small_pool()
    a, b = pool.create(), pool.create()
    pool.extend(a, 100)
    pool.extend([b, a], [3, 70])
    assert pool.step_tokens == 173
    pool.upload()
    assert_mapped(pool, [(a, 0, 100), (b, 0, 3), (a, 100, 70)])
    pool.extend(b)
    pool.upload()
    assert_mapped(pool, [(b, 3, 1)])


def test_addresses_never_change(device, rng):
    pool = small_pool()
    names = ("lengths", "state_slots", "token_rows", "positions")

    def addresses():
        arrays = [getattr(pool, name) for name in names]
        arrays += [f(c) for f in (pool.slot_mapping, pool.block_table) for c in CACHES]
        arrays += [pool.view(pool.layout.cache(c).layers[0], c) for c in CACHES]
        return [view(array).ptr for array in arrays]

    first = addresses()
    for _ in range(3):
        seq = pool.create(tokens(rng, 700))
        prefill(pool, seq, 700)
        pool.free(pool.fork(seq))
        pool.preempt(seq)
        pool.resume(seq)
        pool.free(seq)
        pool.upload()
    assert addresses() == first
    assert view(pool.slot_mapping("index")).ptr == view(pool.slot_mapping("csa")).ptr


def test_a_reused_row_never_shows_its_former_owner(emulator):
    pool = small_pool(max_sequences=1)
    for length in (600, 1, 300):
        seq = pool.create()
        pool.extend(seq, length)
        pool.upload()
        assert pool.row(seq) == 0
        assert np.count_nonzero(table(pool, "csa")[0]) == -(-length // 256)
        assert np.count_nonzero(table(pool, "window")[0]) == -(-length // 64)
        assert pool.device.numpy(pool.lengths)[0] == length
        pool.free(seq)
        pool.upload()
        for name in ("csa", "window"):
            assert not table(pool, name).any()
        assert pool.device.numpy(pool.lengths)[0] == pool.device.numpy(pool.state_slots)[0] == 0


def test_ids_are_never_used_twice(emulator):
    pool = small_pool()
    seen = set()
    for _ in range(200):
        seq = pool.create()
        assert type(seq) is int
        assert seq not in seen
        seen.add(seq)
        pool.free(seq)


def test_decoding_holds_three_window_pages(emulator):
    pool = small_pool()
    seq = pool.create()
    prefill(pool, seq, 500)
    for _ in range(300):
        pool.extend(seq)
        pool.upload()
        assert pool.stats().window.used in (2, 3)
    row = table(pool, "window")[pool.row(seq)]
    live = {p // 64 % row.size for p in range(800 - 127, 800)}
    assert live <= set(np.flatnonzero(row).tolist())


@pytest.mark.parametrize("B", [1, 2, 20])  # an id, a few rows, many
def test_a_chunk_leaves_the_window_with_the_next_token(emulator, B):
    pool = small_pool(max_sequences=B, pages=3 * B, window_pages=10 * B, max_tokens=600 * B)
    seqs = np.array([pool.create() for _ in range(B)])
    pool.extend(seqs, 590)
    pool.upload()
    assert pool.stats().window.used == 10 * B
    pool.extend(seqs)
    assert pool.stats().window.used == 3 * B
    pool.check()


def test_three_window_pages_are_enough_to_decode(emulator):
    """What a call lets go it may take again, where no step is in flight; also what two sequences let go at once."""
    pool = small_pool(window_pages=6)
    seqs = np.array([pool.create(), pool.create()])
    for _ in range(400):
        pool.extend(seqs)
        pool.upload()
    pool.check()
    pool = small_pool(window_pages=4)
    parent = pool.create()
    prefill(pool, parent, 191)
    pool.extend(parent)
    pool.upload()
    child = pool.fork(parent)
    pool.extend([parent, child])  # both let the first page go and begin another one
    pool.upload()
    pool.check()
    assert pool.stats().window.free == 0


def test_a_long_run_after_short_ones(emulator):
    """The places of -1 of a run are not taken for granted when something else was written in between."""
    pool = small_pool()
    a, b, c = pool.create(), pool.create(), pool.create()
    for between in (lambda: pool.extend([b, c], [30, 30]), lambda: pool.extend([b, c]), lambda: pool.extend(b)):
        first = pool.length(a)
        pool.extend(a, 256)
        pool.upload()
        assert_mapped(pool, [(a, first, 256)])
        between()
        pool.upload()
        pool.check()
    pool.extend(a, 256)
    pool.upload()
    assert_mapped(pool, [(a, 768, 256)])


def contents(pool, cache, page):
    return pool.device.numpy(pool.storage.array(cache)[:, page])


def poison(pool, cache, page, byte):
    pool.storage.array(cache)[:, page] = byte


@pytest.mark.parametrize("writer", ["parent", "child", "both at once"])
def test_fork_copies_what_is_written(emulator, writer):
    pool = small_pool()
    parent = pool.create()
    prefill(pool, parent, 300)  # partly filled: the second page and the fifth window page
    row = pool.row(parent)
    shared = {"csa": int(table(pool, "csa")[row, 1]), "window": int(table(pool, "window")[row, 300 // 64])}
    state = int(pool.device.numpy(pool.state_slots)[row])
    for cache, byte in (("csa", 0x11), ("index", 0x12), ("hca", 0x13)):
        poison(pool, cache, shared["csa"], byte)
    poison(pool, "window", shared["window"], 0x14)
    poison(pool, "hca_state", state, 0x15)
    child = pool.fork(parent)
    pool.check()
    assert pool.stats().full.used == 2  # nothing but references so far
    writers = {"parent": [parent], "child": [child], "both at once": [parent, child]}[writer]
    pool.extend(writers)
    pool.upload()
    pool.check()
    full, window = table(pool, "csa"), table(pool, "window")
    mine, other = pool.row(parent), pool.row(child)
    assert full[mine, 0] == full[other, 0]
    assert full[mine, 1] != full[other, 1]
    assert window[mine, 300 // 64] != window[other, 300 // 64]
    assert pool.stats().copied_pages == 2  # one of each life cycle: the last holder writes in place
    for r in (mine, other):
        for cache, byte in (("csa", 0x11), ("index", 0x12), ("hca", 0x13)):
            assert (contents(pool, cache, full[r, 1]) == byte).all()
        assert (contents(pool, "window", window[r, 300 // 64]) == 0x14).all()
        assert (contents(pool, "hca_state", pool.device.numpy(pool.state_slots)[r]) == 0x15).all()


def test_forks_of_forks_before_one_upload(emulator):
    """The state goes from the first to all, although slots in between are freed again before anything is copied."""
    pool = small_pool()
    first = pool.create()
    prefill(pool, first, 10)
    poison(pool, "csa_state", int(pool.device.numpy(pool.state_slots)[pool.row(first)]), 0x77)
    second = pool.fork(first)
    third = pool.fork(second)
    fourth = pool.fork(third)
    pool.free(second)
    pool.free(first)
    fifth = pool.fork(third)
    pool.check()
    pool.upload()
    pool.check()
    for seq in (third, fourth, fifth):
        slot = pool.device.numpy(pool.state_slots)[pool.row(seq)]
        assert (contents(pool, "csa_state", slot) == 0x77).all()
    assert pool.stats().state.used == 3


def test_fork_of_staged_tokens_is_refused(emulator):
    pool = small_pool()
    seq = pool.create()
    pool.extend(seq, 5)
    before = fingerprint(pool)
    with pytest.raises(PoolMisuse, match=rf"fork: sequence {seq} has tokens that are not uploaded"):
        pool.fork(seq)
    assert fingerprint(pool) == before


@pytest.mark.parametrize("at", [4, 8, 64, 65, 128, 130, 256, 257, 384, 512])
@pytest.mark.parametrize("back", [1, 2, 3, 5])
def test_truncate_is_exact(emulator, at, back):
    """Over- and back-stepping any boundary leaves what a sequence that never went further has."""
    pool = small_pool(max_draft=5)
    seq, plain = pool.create(), pool.create()
    start = at - min(back, 2)  # so that the drafts reach over the boundary
    for s in (seq, plain):
        prefill(pool, s, start)
    pool.extend(seq, back)
    pool.upload()
    pool.truncate(seq, start)
    pool.check()
    pool.upload()
    assert pool.length(seq) == start
    assert pool.device.numpy(pool.lengths)[pool.row(seq)] == start
    mine, other = pool.row(seq), pool.row(plain)
    full, window = table(pool, "csa") != 0, table(pool, "window") != 0
    assert (full[mine] == full[other]).all()
    ring = window.shape[1]
    for p in range(max(0, start - 127), start + 320):  # what the next query sees, and five pages further
        assert window[mine, p // 64 % ring] == (p < -(-start // 64) * 64), p
    pool.extend([seq, plain], [7, 7])
    pool.upload()
    assert_mapped(pool, [(seq, start, 7), (plain, start, 7)])
    pool.check()


def test_truncate_past_max_draft(emulator):
    pool = small_pool(max_draft=3)
    seq = pool.create()
    prefill(pool, seq, 100)
    pool.truncate(seq, 98)
    before = fingerprint(pool)
    for length in (96, 99, -1, 0):
        with pytest.raises(PoolMisuse, match=r"truncate: sequence \d+ of 98 tokens \(at most 100 so far\)"):
            pool.truncate(seq, length)
        assert fingerprint(pool) == before
    pool.truncate(seq, 97)
    pool.extend(seq, 5)
    pool.upload()
    pool.truncate([seq], [99])
    pool.check()


def test_staged_tokens_that_are_taken_back_go_nowhere(emulator):
    pool = small_pool(max_draft=4)
    a, b = pool.create(), pool.create()
    prefill(pool, a, 62)
    pool.extend([a, b], [4, 70])
    pool.truncate(a, 63)
    pool.free(b)
    pool.upload()
    assert pool.device.numpy(pool.positions)[:74].tolist() == [62] + [-1] * 73
    for cache in CACHES:
        assert mapping(pool, cache)[:74].tolist() == expected_slots(pool, cache, pool.row(a), [62]) + [-1] * 73
    pool.check()


def test_pages_wait_for_steps_in_flight(emulator):
    pool = small_pool(pages=3)
    seq = pool.create()
    first = pool.begin_step()
    pool.extend(seq, 600)
    pool.upload()
    second = pool.begin_step()
    pool.free(seq)
    pool.upload()
    assert pool.stats().full.fenced == 3
    other = pool.create()
    before = fingerprint(pool)
    with pytest.raises(PoolExhausted, match="3 wait for steps in flight"):
        pool.extend(other, 1)
    assert fingerprint(pool) == before
    pool.end_step(first)
    assert pool.stats().full.fenced == 3  # the second may read them, too
    pool.check()
    pool.end_step(second)
    assert pool.stats().full.free == 3
    pool.extend(other, 600)
    pool.check()


def test_steps_end_in_any_order_and_once(emulator):
    pool = small_pool()
    a, b = pool.begin_step(), pool.begin_step()
    with pytest.raises(PoolMisuse, match="begin_step: 2 steps are in flight"):
        pool.begin_step()
    pool.end_step(b)
    with pytest.raises(PoolMisuse, match=f"end_step: step {b} is not in flight"):
        pool.end_step(b)
    pool.end_step(a)
    assert pool.begin_step() == b + 1


def test_window_pages_of_a_chunk_are_fenced(emulator):
    pool = small_pool(window_pages=19, max_in_flight=512)
    seq = pool.create()
    step = pool.begin_step()
    pool.extend(seq, 512)
    pool.upload()
    pool.extend(seq, 512)  # lets 6 pages go, which the open step may read; 8 others are taken
    pool.upload()
    assert (pool.stats().window.used, pool.stats().window.fenced) == (10, 6)
    before = fingerprint(pool)
    with pytest.raises(PoolExhausted):
        pool.extend(seq, 512)
    assert fingerprint(pool) == before
    pool.end_step(step)
    pool.extend(seq, 512)
    pool.check()


def test_one_batch_all_or_nothing(emulator):
    pool = small_pool(pages=4)
    a, b = pool.create(), pool.create()
    pool.extend([a, b], [512, 256])
    pool.upload()
    before = fingerprint(pool)
    for way in ([1, 257], [257, 1]):
        with pytest.raises(PoolExhausted, match="'full' wanted; 1 are free"):
            pool.extend([a, b], way)
        assert fingerprint(pool) == before
    pool.extend([a, b], [0, 256])
    pool.check()


@pytest.mark.parametrize("record", ["v4", "split", "v4.1", "v4.1-fp4"])
@pytest.mark.parametrize("index", ["nvfp4", "mxfp4", "fp8"])
def test_every_layout_makes_a_pool(emulator, record, index):
    pool = KVPool(small_layout(0, record, index), pages=4, max_sequences=2, max_length=512, max_in_flight=64)
    seq = pool.create()
    pool.extend(seq, 64)
    pool.upload()
    pool.check()
    layer = pool.layout.cache("index").layers[0]
    assert view(pool.read_indexer_view(layer)).ptr == view(pool.view(layer, "index")).ptr
    assert pool.records(layer, "csa").shape[:3] == (5, 64, 1)
    assert set(pool.parts(layer, "csa")) == {p.name for p in pool.layout.cache("csa").parts}


def test_a_ring_of_another_length_is_refused(emulator):
    with pytest.raises(ArgumentError, match="give the layout the same max_draft"):
        KVPool(small_layout(2), pages=4, max_sequences=2, max_length=512, max_draft=3)


def test_a_million_tokens(emulator):
    pool = small_pool(
        pages=4097, max_length=1_048_576, max_in_flight=8192, max_tokens=8192, window_pages=300, checkpoints=2
    )
    seq = pool.create()
    for _ in range(128):
        pool.extend(seq, 8192)
        pool.upload()
    assert_mapped(pool, [(seq, 1_048_576 - 8192, 8192)])
    assert pool.stats().full.used == 4096
    pool.check()
    pool.free(seq)
    pool.upload()
    assert pool.stats().full.free == 4097
    assert pool.stats().window.free == 300
    pool.check()


def test_lookups(emulator):
    pool = small_pool()
    a, b = pool.create(), pool.create()
    pool.extend(b, 9)
    assert pool.rows([b, a]).tolist() == [pool.row(b), pool.row(a)]
    assert (pool.length(a), pool.length(b)) == (0, 9)
    with pytest.raises(ArgumentError, match="'csa_state' has no block table; csa, index, hca, window have"):
        pool.slot_mapping("csa_state")
    with pytest.raises(UnknownSequence):
        pool.row(0)


def test_the_readme_says_what_happens(emulator):
    text = (Path(__file__).parents[2] / "README.md").read_text().split("## Paged memory")[1]
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})


def test_memory_imports_no_family():
    code = (
        "import sys, dsv4_rt.memory; "
        "assert not {m for m in sys.modules if m.startswith(('dsv4_rt.indexer', 'dsv4_rt.moe', 'torch'))}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
