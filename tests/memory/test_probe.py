"""Content: after any history every live position reads back its own value, through the device's tables.

Histories are directed at what goes wrong in pools: pages shared and overwritten, copies of one upload that depend on
each other, rings that wrap, pages handed out while still to be copied, tables of a row's former owner.
"""

import dataclasses

import numpy as np
import pytest
from probe import Probe

from dsv4_rt.errors import LaunchError
from dsv4_rt.memory import KVLayout, KVPool, PoolExhausted, PoolMisuse
from dsv4_rt.models import FLASH


def prompt(rng, n):
    return rng.integers(0, 129_280, n, dtype=np.int32)


def prefill(pool, probe, seq, upto, chunk=512):
    """Compute a sequence up to a length, chunks ending where a checkpoint can be taken."""
    while pool.length(seq) < upto:
        start = pool.length(seq)
        stop = min(upto, start + chunk)
        probe.step([seq], [min(stop, pool.next_checkpoint(seq)) - start])


def start(pool, probe, tokens, namespace=b""):
    seq = pool.create(tokens, namespace=namespace)
    probe.set_content(seq, tokens, namespace)
    return seq


def end(pool, probe, seq):
    pool.free(seq)
    probe.forget(seq)


@pytest.mark.parametrize("length", [5, 64, 130, 256, 300, 511])
def test_fork_then_both_go_their_own_way(probed, rng, length):
    """Parent and child share all pages, then write different tokens into the same places."""
    pool, probe = probed()
    tokens = prompt(rng, length + 600)
    parent = pool.create()
    probe.set_content(parent, tokens)
    probe.step([parent], [length])
    child = pool.fork(parent)
    probe.set_content(child, np.concatenate([tokens[:length], prompt(rng, 600)]))
    pool.check()
    probe.step([parent, child], [1, 2])
    pool.check()
    probe.step([child], [3])
    probe.step([parent, child], [130, 257])
    for seq in (parent, child):
        probe.read_back(seq, pool.length(seq))
    end(pool, probe, parent)
    probe.step([child], [1])
    probe.check_tables()
    pool.check()


def test_forks_of_forks_before_any_upload(probed, rng):
    """Copies of one upload that depend on each other; then the parent goes and its slot comes back."""
    pool, probe = probed(checkpoint_every=256)
    tokens = prompt(rng, 900)
    parent = start(pool, probe, tokens)
    prefill(pool, probe, parent, 301)
    child = pool.fork(parent)
    grandchild = pool.fork(child)
    for seq in (child, grandchild):
        probe.set_content(seq, np.concatenate([tokens[:301], prompt(rng, 600)]))
    end(pool, probe, parent)
    again = pool.fork(child)
    probe.set_content(again, np.concatenate([tokens[:301], prompt(rng, 600)]))
    end(pool, probe, child)
    newcomer = start(pool, probe, tokens[:500])  # a hit restores a checkpoint into a slot that was just given back
    pool.check()
    starts = [pool.length(seq) for seq in (grandchild, again, newcomer)]
    assert starts[2] == 256
    probe.step([grandchild, again, newcomer], [3, 5, 100])
    probe.step([newcomer, grandchild], [1, 300])
    probe.check_tables()
    pool.check()


def test_a_checkpoint_found_before_it_is_saved(probed, rng):
    """A hit on a checkpoint that the next upload will save is given back: the save has to happen all the same."""
    pool, probe = probed(checkpoint_every=256)
    tokens = prompt(rng, 400)
    first = start(pool, probe, tokens[:256])
    prefill(pool, probe, first, 256)
    end(pool, probe, first)
    second = start(pool, probe, tokens)
    assert pool.length(second) == 256
    end(pool, probe, second)
    pool.upload()
    third = start(pool, probe, tokens)
    assert pool.length(third) == 256
    prefill(pool, probe, third, 400)
    pool.check()


def test_copies_where_pages_are_scarce(probed, rng):
    """Copy on write into pages that the same upload still reads: a freed page comes back as a destination."""
    pool, probe = probed(pages=6, window_pages=16, max_sequences=4, checkpoints=1)
    tokens = prompt(rng, 900)
    a = pool.create()
    probe.set_content(a, tokens)
    probe.step([a], [130])
    b, c = pool.fork(a), pool.fork(a)
    for seq in (b, c):
        probe.set_content(seq, np.concatenate([tokens[:130], prompt(rng, 600)]))
    pool.extend([b], [1])  # a copy is pending ...
    end(pool, probe, a)
    pool.extend([c], [1])
    end(pool, probe, b)  # ... its destination is given back before it was made
    d = pool.create()
    probe.set_content(d, prompt(rng, 600))
    pool.extend([d], [40])  # and may be d's page now
    pool.check()
    pool.upload()
    probe.read_back(c, 130)
    probe.write()
    e = pool.fork(c)
    probe.set_content(e, np.concatenate([probe.content[c][:131], prompt(rng, 600)]))
    probe.step([c, d, e], [1, 1, 1])
    for seq in (c, d, e):
        probe.read_back(seq, pool.length(seq))
    probe.check_tables()
    pool.check()


def test_a_shared_prefix_is_never_overwritten(probed, rng):
    """Many sequences behind one prefix, one truncated back into a cached page and continued otherwise."""
    pool, probe = probed(max_draft=6, checkpoint_every=256)
    common = prompt(rng, 600)
    first = start(pool, probe, common)
    prefill(pool, probe, first, 514)
    pool.truncate(first, 510)  # page 1 is complete and may be cached: what follows must go elsewhere
    changed = np.concatenate([common[:510], prompt(rng, 100)])
    probe.set_content(first, changed)
    probe.step([first], [7])
    pool.check()
    others = []
    for _ in range(3):
        seq = start(pool, probe, np.concatenate([common[:550], prompt(rng, 200)]))
        others.append(seq)
        prefill(pool, probe, seq, pool.length(seq) + 90)
        pool.check()
    probe.step([first, *others], [50, 1, 2, 3])
    probe.check_tables()
    pool.check()


def test_preempted_and_resumed(probed, rng):
    """Preempt loses nothing but time: pages of the prompt are found again, the rest is computed again."""
    pool, probe = probed(pages=9, window_pages=40, checkpoint_every=256)
    tokens = prompt(rng, 1000)
    seq = start(pool, probe, tokens)
    prefill(pool, probe, seq, 900)
    pool.preempt(seq)
    probe.parked.add(seq)
    pool.check()
    other = start(pool, probe, prompt(rng, 1000))
    prefill(pool, probe, other, 700)
    end(pool, probe, other)
    at = pool.resume(seq)
    probe.parked.remove(seq)
    assert at % 256 == 0
    assert at == pool.length(seq) <= 900
    prefill(pool, probe, seq, 1000)
    probe.read_back(seq, 1000)
    pool.check()


def test_evicted_content_is_not_found(probed, rng):
    """A pool much smaller than what passes through it: hits come and go, values never mix."""
    pool, probe = probed(pages=9, window_pages=26, checkpoints=4, max_sequences=3, checkpoint_every=256)
    prompts = [prompt(rng, int(n)) for n in rng.integers(200, 1100, 5)]
    hits = 0
    for _ in range(14):
        tokens = prompts[rng.integers(len(prompts))]
        seq = start(pool, probe, tokens)
        hits += pool.length(seq) > 0
        prefill(pool, probe, seq, len(tokens))
        probe.check_tables()
        pool.check()
        end(pool, probe, seq)
    print("hits", hits)


def test_a_step_in_flight_keeps_its_window(probed, rng):
    """Pages released while a step is in flight are not handed out before it has ended."""
    pool, probe = probed(window_pages=8, pages=6, max_sequences=2, checkpoints=1, max_in_flight=64)
    seq = pool.create()
    probe.set_content(seq, prompt(rng, 800))
    seen = []
    for _ in range(6):
        probe.step([seq], [64])
    epoch = pool.begin_step()
    probe.step([seq], [64])
    free = pool.stats().window.free
    for _ in range(free):
        probe.step([seq], [64])
        seen.append(pool.stats().window.fenced)
        pool.check()
    with pytest.raises(PoolExhausted):
        pool.extend([seq], [64])
    assert seen == sorted(seen)
    assert seen[-1] > 0
    pool.end_step(epoch)
    assert pool.stats().window.fenced == 0
    probe.step([seq], [64])
    pool.check()


@pytest.mark.parametrize(
    ("record", "index"), [("v4", "nvfp4"), ("split", "mxfp4"), ("v4.1", "fp8"), ("v4.1-fp4", "nvfp4")]
)
def test_records_of_the_released_models(device, rng, record, index):
    """The same on pages as kernels know them, every byte of every part: prefill, fork, drafts taken back, a hit."""
    model = dataclasses.replace(FLASH, num_layers=4, compress_ratios=(0, 4, 128, 4))
    layout = KVLayout.for_model(model, record=record, index=index, max_draft=3)
    pool = KVPool(layout, pages=8, window_pages=24, max_sequences=3, max_length=1024, max_in_flight=320, max_draft=3)
    probe = Probe(pool, device)
    tokens = prompt(rng, 420)
    first = start(pool, probe, tokens)
    prefill(pool, probe, first, 300, chunk=256)
    child = pool.fork(first)
    probe.set_content(child, np.concatenate([tokens[:300], prompt(rng, 40)]))
    probe.step([first, child], [2, 5])
    pool.truncate(child, 302)
    probe.set_content(child, np.concatenate([probe.content[child][:302], prompt(rng, 40)]))
    second = start(pool, probe, tokens)
    assert pool.length(second) == 256
    probe.step([second, child, first], [64, 3, 90])
    probe.step([second, child, first], [1, 1, 1])
    probe.check_tables()
    pool.check()


ACTIONS = ["create", *["extend"] * 4, "decode", "append", "truncate", "fork", "free", "preempt", "resume"]


def history(pool, probe, rng, steps):
    """Fork, truncate, preempt, resume, free, prefix hits and eviction in random order on a small pool."""
    roots = [prompt(rng, 2000) for _ in range(3)]
    live, preempted, told = [], [], {}
    for _ in range(steps):
        action = str(rng.choice(ACTIONS)) if live else "resume" if preempted else "create"
        pick = live[rng.integers(len(live))] if live else None
        try:
            if action == "create" and len(live) + len(preempted) < 5:
                n = int(rng.integers(0, 1200))
                tokens = np.concatenate([roots[rng.integers(3)][:n], prompt(rng, int(rng.integers(1, 300)))])
                seq = start(pool, probe, tokens, namespace=bytes([int(rng.integers(2))]))
                live.append(seq)
                told[seq] = len(tokens)
            elif action == "extend" and live:
                chosen = [seq for seq in live if rng.random() < 0.6] or [pick]
                advance(pool, probe, rng, chosen, [int(rng.choice([1, 3, 64, 130, 256])) for _ in chosen])
            elif action == "decode" and live:
                advance(pool, probe, rng, live, [1] * len(live))
            elif action == "append" and live:
                new = probe.content[pick][told[pick] :][: int(rng.integers(1, 400))]
                pool.append(pick, new)
                told[pick] += len(new)
            elif action == "truncate" and live:
                back = int(min(rng.integers(0, 6), pool.length(pick)))
                advance(pool, probe, rng, [pick], [6])
                length = pool.length(pick) - back
                pool.truncate(pick, length)
                if back:  # what was told from there on is forgotten
                    told[pick] = min(told[pick], length)
                    probe.set_content(pick, np.concatenate([probe.content[pick][:length], prompt(rng, 300)]))
            elif action == "fork" and live and len(live) + len(preempted) < 5:
                child = pool.fork(pick)
                live.append(child)
                probe.set_content(child, probe.content[pick], probe.namespace[pick])
                told[child] = told[pick]
            elif action == "free" and live:
                live.remove(pick)
                end(pool, probe, pick)
            elif action == "preempt" and live:
                pool.preempt(pick)
                live.remove(pick)
                preempted.append(pick)
                probe.parked.add(pick)
            elif action == "resume" and preempted:
                pool.resume(preempted[0])
                live.append(preempted.pop(0))
                probe.parked.discard(live[-1])
        except PoolExhausted:
            if live:
                live.remove(pick)
                end(pool, probe, pick)
        pool.check()
        if rng.random() < 0.2:
            pool.upload()
            probe.check_tables()
    for seq in live + preempted:
        end(pool, probe, seq)
    pool.upload()
    pool.check()
    assert probe.checked > 20 * steps
    print(probe.checked, "entries read back;", pool.stats())


SCARCE = {"pages": 14, "window_pages": 44, "checkpoints": 5, "max_sequences": 5, "max_draft": 5, "max_tokens": 1300}


@pytest.mark.parametrize("steps", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_any_history(probed, rng, steps):
    history(*probed(**SCARCE), rng, steps)


@pytest.mark.parametrize("digests", [1, 3])
def test_any_history_under_a_hash_that_collides(probed, rng, monkeypatch, digests):
    """All pages have one of so few digests: hits are rare, what is read is right all the same."""

    def collide(parent, tokens):
        return bytes([sum(bytes(tokens)) % digests]) * 16

    monkeypatch.setattr("dsv4_rt.memory.prefix.page_digest", collide)
    pool, probe = probed(**SCARCE)
    history(pool, probe, rng, 100)
    assert max(map(len, pool._prefix.table), default=16) == 16
    assert len(pool._prefix.table) <= digests


def test_any_history_with_uploads_that_fail(probed, rng, monkeypatch):
    """Copies or table changes fail, before they were launched or after; the next upload makes it good."""
    pool, probe = probed(**SCARCE)
    works, failed = pool.upload, []

    def upload():
        if rng.random() < 0.6:
            # Few uploads have something to copy, all have tables.
            where, name = (pool.storage, "copy") if rng.random() < 0.8 else (pool._tables, "upload")
            call, launched = getattr(where, name), rng.random() < 0.5

            def fail(*args, **kwargs):
                if launched:
                    call(*args, **kwargs)
                raise LaunchError("injected")

            with monkeypatch.context() as patch:
                patch.setattr(where, name, fail)
                try:
                    return works()
                except LaunchError:
                    failed.append(name)
            pool.check()
        return works()

    monkeypatch.setattr(pool, "upload", upload)
    history(pool, probe, rng, 150)
    assert set(failed) == {"copy", "upload"}


@pytest.mark.parametrize("how", ["create", "resume", "fork"])
def test_truncation_into_a_prefix_hit_is_refused(probed, rng, how):
    """Behind a hit the rings hold nothing but its last 4 rows: going back there would read what nobody restored."""
    pool, probe = probed(max_draft=5, checkpoint_every=256)
    tokens = prompt(rng, 300)
    first = start(pool, probe, tokens)
    prefill(pool, probe, first, 300)
    if how == "resume":
        pool.preempt(first)
        assert pool.resume(first) == 256
        seq = first
    else:
        seq = start(pool, probe, tokens)
        assert pool.length(seq) == 256
    probe.step([seq], [2])
    if how == "fork":
        parent, seq = seq, pool.fork(seq)
        probe.set_content(seq, probe.content[parent])
    with pytest.raises(PoolMisuse, match="truncate"):
        pool.truncate(seq, 255)
    pool.truncate(seq, 256)
    probe.step([seq], [7])
    pool.check()


def advance(pool, probe, rng, seqs, counts):
    """One step of a batch, content made up where a sequence has none left."""
    for seq, count in zip(seqs, counts, strict=True):
        want = pool.length(seq) + count
        if len(probe.content[seq]) < want:
            new = prompt(rng, want - len(probe.content[seq]))
            probe.set_content(seq, np.concatenate([probe.content[seq], new]))
    probe.step(seqs, counts)
