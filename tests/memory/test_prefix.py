"""The prefix cache: what is found again, what is never believed, what goes first."""

import numpy as np
import pytest
from pools import fingerprint, prefill, small_pool, table, tokens

from dsv4_rt.errors import PoolExhausted, PoolMisuse
from dsv4_rt.memory import prefix


def finished(pool, prompt, namespace=b""):
    """Run a prompt to its end and free the sequence."""
    seq = pool.create(prompt, namespace)
    prefill(pool, seq, len(prompt))
    pool.free(seq)


def hit(pool, prompt, namespace=b""):
    """Tokens that a new sequence with this prompt gets; it is freed again."""
    seq = pool.create(prompt, namespace)
    n = pool.length(seq)
    pool.free(seq)
    pool.check()
    return n


@pytest.mark.parametrize(
    ("length", "found"), [(1, 0), (255, 0), (256, 0), (257, 256), (511, 256), (513, 512), (700, 512), (1300, 1280)]
)
def test_a_prompt_is_found_again(emulator, rng, length, found):
    """Up to its last page boundary, but always leaving a token to compute."""
    pool, prompt = small_pool(), tokens(rng, length)
    assert hit(pool, prompt) == 0
    finished(pool, prompt)
    assert hit(pool, prompt) == found
    assert hit(pool, np.concatenate([prompt, tokens(rng, 300)])) == length // 256 * 256
    stats = pool.stats()
    assert stats.tokens_hit == found + length // 256 * 256


def test_another_token_anywhere_ends_the_hit(emulator, rng):
    pool, prompt = small_pool(), tokens(rng, 1300, 100)
    finished(pool, prompt)
    for at in rng.integers(0, 1280, 8):
        other = prompt.copy()
        other[at] += 1
        assert hit(pool, other) == at // 512 * 512  # checkpoints every 512 tokens, and at 1280


def test_what_a_hit_brings(emulator, rng):
    """The pages themselves, the 2 window pages before the boundary, and the 4 state rows before it."""
    pool, prompt = small_pool(), tokens(rng, 520)
    seq = pool.create(prompt)
    prefill(pool, seq, 512)
    row, numpy = pool.row(seq), pool.device.numpy
    full, window = table(pool, "csa")[row].copy(), table(pool, "window")[row].copy()
    state = pool.storage.array("csa_state")
    slot = int(numpy(pool.state_slots)[row])
    rows = rng.integers(0, 256, (8, state.shape[2] // 8), dtype=np.uint8)
    state[0, slot] = pool.device.array(rows.reshape(-1))
    prefill(pool, seq, 520)
    state[0, slot] = 0  # the sequence goes on; the checkpoint must not
    pool.free(seq)
    again = pool.create(prompt)
    pool.upload()
    assert pool.length(again) == 512
    row = pool.row(again)
    assert table(pool, "csa")[row][:2].tolist() == full[:2].tolist()
    held = [i % window.size for i in (6, 7)]
    assert np.flatnonzero(table(pool, "window")[row]).tolist() == sorted(held)
    assert table(pool, "window")[row][held].tolist() == window[held].tolist()
    restored = numpy(state[0, int(numpy(pool.state_slots)[row])]).reshape(8, -1)
    assert (restored[4:] == rows[4:]).all()  # positions 508 .. 511 lie in rows 4 .. 7
    pool.check()


def test_namespaces_share_nothing(emulator, rng):
    pool, prompt = small_pool(), tokens(rng, 600)
    finished(pool, prompt, b"a")
    assert hit(pool, prompt) == hit(pool, prompt, b"b") == 0
    assert hit(pool, prompt, b"a") == 512


def collide(monkeypatch, digest):
    monkeypatch.setattr(prefix, "page_digest", digest)


def test_equal_digests_of_all_pages(emulator, rng, monkeypatch):
    """A hash that says nothing costs hits, never content."""
    collide(monkeypatch, lambda parent, page: b"x" * 16)
    pool, first, second = small_pool(checkpoint_every=256), tokens(rng, 1100), tokens(rng, 1100)
    finished(pool, first)
    finished(pool, second)
    assert hit(pool, second) == hit(pool, second, b"other") == hit(pool, first, b"other") == 0
    assert hit(pool, first) == 256  # its other pages could not be entered
    assert pool.stats().collisions > 0
    pool.check()


def test_a_digest_that_forgets_the_past(emulator, rng, monkeypatch):
    """The same page after another beginning has the same digest and the same tokens, and is still not taken."""
    collide(monkeypatch, lambda parent, page: prefix.hashlib.blake2b(page, digest_size=16).digest())
    pool = small_pool(checkpoint_every=256)
    a, b, common = tokens(rng, 256), tokens(rng, 256), tokens(rng, 257)
    finished(pool, np.concatenate([a, common]))
    assert hit(pool, np.concatenate([a, common])) == 512
    finished(pool, b)
    assert hit(pool, np.concatenate([b, common])) == 256
    assert hit(pool, np.concatenate([common, a])) == 0


def test_two_that_compute_the_same_keep_their_pages(emulator, rng):
    """The page registered first stays the one; a running sequence's pages are never exchanged."""
    pool, prompt = small_pool(), tokens(rng, 600)
    a, b = pool.create(prompt), pool.create(prompt)
    pool.extend([a, b], [512, 512])
    pool.upload()
    before = table(pool, "csa")[pool.rows([a, b])].copy()
    pool.extend([a, b], [88, 88])
    pool.upload()
    after = table(pool, "csa")[pool.rows([a, b])]
    assert (before[:, :2] == after[:, :2]).all()
    assert not set(after[0]) & set(after[1]) - {0}
    pool.free(a)
    pool.free(b)
    pool.check()
    assert pool.stats().full.cached == 2
    assert hit(pool, prompt) == 512


def test_tails_are_evicted_first_and_the_longest_unused(emulator, rng):
    pool = small_pool(pages=8, checkpoint_every=256)
    old, young = tokens(rng, 1025), tokens(rng, 513)
    finished(pool, old)
    finished(pool, young)
    assert pool.stats().full.cached == 6
    seq = pool.create()
    prefill(pool, seq, 3 * 256, checkpoints=False)  # two were free: one page goes, the last of the old prompt
    assert hit(pool, old) == 768
    assert hit(pool, young) == 512
    pool.extend(seq, 256)  # the old prompt was looked up first: its tail again
    pool.upload()
    pool.check()
    assert (hit(pool, old), hit(pool, young)) == (512, 512)
    assert pool.stats().evictions == 2


def test_pages_in_use_are_not_evicted(emulator, rng):
    pool = small_pool(pages=4)
    prompt = tokens(rng, 600)
    finished(pool, prompt)
    seq = pool.create(prompt)
    assert pool.length(seq) == 512
    other = pool.create()
    pool.extend(other, 512)
    before = fingerprint(pool)
    with pytest.raises(PoolExhausted):
        pool.extend(other, 1)
    assert fingerprint(pool) == before
    pool.check()


def test_a_hit_without_a_checkpoint_is_lost(emulator, rng):
    pool, prompt = small_pool(checkpoints=1), tokens(rng, 1290)
    finished(pool, prompt)  # boundaries 512, 1024 and 1280: one slot
    assert hit(pool, prompt) == 1280
    assert hit(pool, prompt[:1200]) == 0
    stats = pool.stats()
    assert stats.tokens_lost == 1024
    assert (stats.checkpoints_taken, stats.checkpoint_evictions) == (3, 2)
    size = pool.layout.bytes_of
    assert stats.checkpoint_bytes == size("checkpoint") + 2 * size("window")


def test_next_checkpoint(emulator, rng):
    pool = small_pool()
    seq = pool.create(tokens(rng, 1300))
    boundaries = []
    while pool.length(seq) < 1290:
        boundaries.append(pool.next_checkpoint(seq))
        prefill(pool, seq, min(1290, boundaries[-1]))
    assert boundaries == [512, 1024, 1280, 1536]


def test_passing_a_boundary_misses_its_checkpoint(emulator, rng):
    pool, prompt = small_pool(), tokens(rng, 600)
    seq = pool.create(prompt)
    prefill(pool, seq, 600, checkpoints=False)
    pool.free(seq)
    stats = pool.stats()
    assert (stats.checkpoints_taken, stats.checkpoints_missed) == (0, 1)
    assert hit(pool, prompt) == 0
    assert pool.stats().tokens_lost == 512


@pytest.mark.parametrize(("late", "taken"), [(0, 1), (4, 1), (5, 0)])
def test_tokens_that_come_late(emulator, rng, late, taken):
    """The ring has the 4 rows before a boundary until 4 tokens have been written behind it."""
    pool, prompt = small_pool(), tokens(rng, 512)
    seq = pool.create()
    pool.append(seq, prompt[:500])
    prefill(pool, seq, 512 + late)
    pool.append(seq, prompt[500:])
    assert pool.stats().checkpoints_taken == taken
    pool.check()
    pool.extend(seq, 300)
    pool.upload()
    pool.free(seq)
    assert hit(pool, np.append(prompt, 1)) == 512 * taken


def test_tokens_of_a_batch(emulator, rng):
    """One token a sequence and call, over page boundaries, is what one call for all of them is."""
    pool, text = small_pool(), tokens(rng, 520)
    seqs = np.array([pool.create(), pool.create()])
    for t in text:
        pool.append(seqs, [t, t + 1])
        pool.extend(seqs)
        pool.upload()
    pool.check()
    for seq in seqs.tolist():
        pool.free(seq)
    assert hit(pool, text) == 512
    assert hit(pool, text + 1) == 512


def test_window_pages_wanted_take_checkpoints(emulator, rng):
    pool = small_pool(window_pages=12)
    finished(pool, tokens(rng, 520))
    assert pool.stats().window.cached == 2
    seq = pool.create()
    pool.extend(seq, 600)
    pool.upload()
    assert pool.stats().window.cached == 2
    other = pool.create()
    pool.extend(other, 128)
    stats = pool.stats()
    assert (stats.window.cached, stats.checkpoint.cached, stats.checkpoint_evictions) == (0, 0, 1)
    pool.check()


def test_what_a_checkpoint_keeps_is_not_written_again(emulator, rng):
    pool, prompt = small_pool(), tokens(rng, 1400)
    seq = pool.create(prompt)
    prefill(pool, seq, 512)
    ring = table(pool, "window").shape[1]
    kept = table(pool, "window")[pool.row(seq)][[6 % ring, 7 % ring]].tolist()
    for length in (700, 1000, 1400):
        prefill(pool, seq, length)
        assert not set(kept) & set(table(pool, "window")[pool.row(seq)].tolist()) or length == 700
        pool.check()
    again = pool.create(prompt[:600])
    pool.upload()
    assert table(pool, "window")[pool.row(again)][[6 % ring, 7 % ring]].tolist() == kept


def test_forks_that_part_just_before_a_boundary(emulator, rng):
    """Both have the window page before the last: it is kept once, and once given up."""
    pool, prompt, other = small_pool(), tokens(rng, 600), tokens(rng, 600)
    a = pool.create()
    prefill(pool, a, 500)
    pool.append(a, prompt[:500])
    b = pool.fork(a)
    pool.append(a, prompt[500:])
    pool.append(b, other[500:])
    pool.extend([a, b], [12, 12])
    pool.upload()
    pool.extend([a, b], [50, 50])
    pool.upload()
    pool.check()
    pool.free(a)
    pool.free(b)
    pool.check()
    assert hit(pool, prompt) == 512
    assert hit(pool, np.concatenate([prompt[:500], other[500:]])) == 0
    assert pool.stats().checkpoints_missed == 1


def test_nothing_before_a_hit_can_be_taken_back(emulator, rng):
    """The checkpoint has 4 state rows and 128 positions: a sequence cannot step back behind it."""
    pool, prompt = small_pool(max_draft=5), tokens(rng, 600)
    finished(pool, prompt)
    seq = pool.create(prompt)
    pool.extend(seq, 2)
    pool.upload()
    twin = pool.fork(seq)
    for s in (seq, twin):
        before = fingerprint(pool)
        with pytest.raises(PoolMisuse, match="it can be from 512 on"):
            pool.truncate(s, 511)
        assert fingerprint(pool) == before
        pool.truncate(s, 512)
    pool.check()


def test_reset(emulator, rng):
    pool, prompt = small_pool(), tokens(rng, 1300)
    finished(pool, prompt)
    seq = pool.create(prompt[:1000])
    assert pool.length(seq) == 512
    assert pool.reset_prefix_cache() == 5
    pool.check()
    stats = pool.stats()
    assert (stats.full.cached, stats.checkpoint.cached, stats.window.cached) == (0, 0, 0)
    prefill(pool, seq, 1000)
    pool.preempt(seq)  # what was computed before the reset never comes back
    assert hit(pool, prompt) == 0
    assert pool.resume(seq) == 0


def test_preempt_and_resume(emulator, rng):
    pool, prompt = small_pool(max_sequences=2), tokens(rng, 700)
    seq = pool.create(prompt)
    prefill(pool, seq, 700)
    pool.append(seq, tokens(rng, 400))
    prefill(pool, seq, 1100)
    pool.preempt(seq)
    pool.check()
    assert pool.length(seq) == 0
    stats = pool.stats()
    assert (stats.full.used, stats.state.used, stats.sequences, stats.preempted) == (0, 0, 0, 1)
    for call in (pool.extend, pool.fork, pool.preempt, lambda s: pool.append(s, [1])):
        before = fingerprint(pool)
        with pytest.raises(PoolMisuse, match=f"sequence {seq} is preempted; resume it first"):
            call(seq)
        assert fingerprint(pool) == before
    a, b = pool.create(), pool.create()
    with pytest.raises(PoolExhausted, match="resume: all 2 rows are taken"):
        pool.resume(seq)
    pool.free(a)
    assert pool.can_resume(seq)
    assert pool.resume(seq) == 1024
    pool.check()
    with pytest.raises(PoolMisuse, match="resume: sequence .* is not preempted"):
        pool.resume(seq)
    prefill(pool, seq, 1100)
    pool.preempt(seq)
    pool.free(seq)
    pool.free(b)
    pool.check()


def test_a_cached_page_is_not_overwritten_after_a_truncation(emulator, rng):
    """Drafts over a boundary were registered with their tokens, then taken back: what comes now goes to a copy."""
    pool, prompt = small_pool(max_draft=4), tokens(rng, 256)
    seq = pool.create()
    prefill(pool, seq, 252)
    pool.append(seq, prompt)
    pool.extend(seq, 4)
    pool.upload()
    pool.append(seq, [7])  # the page is complete, computed and known
    page = int(table(pool, "csa")[pool.row(seq), 0])
    assert pool.stats().full.used == 1
    pool.truncate(seq, 253)
    pool.append(seq, (prompt[253:] + 1) % 100)
    pool.extend(seq, 3)
    pool.upload()
    pool.check()
    assert table(pool, "csa")[pool.row(seq), 0] != page
    assert pool.stats().full.cached == 1
    assert pool.stats().copied_pages >= 1


def test_a_chain_whose_beginning_was_evicted_is_linked_again(emulator, rng):
    """B computed the same first page as A. When A's registered page is gone, B's takes its place."""
    pool, prompt = small_pool(pages=6, checkpoint_every=256), tokens(rng, 800)
    a, b = pool.create(prompt), pool.create(prompt)
    pool.extend([a, b], [256, 256])
    pool.upload()
    pool.extend([a, b], [1, 1])  # A's page is registered, B's is not
    pool.upload()
    pool.free(a)
    other = pool.create()
    prefill(pool, other, 1024)  # takes all that is left: A's page, too
    assert pool.stats().evictions == 1
    pool.free(other)
    prefill(pool, b, 800)
    pool.check()
    pool.free(b)
    assert hit(pool, prompt) == 768


def test_digests_chain(rng):
    """blake2b over namespace, predecessor and the int32 tokens of a page, written out."""
    import hashlib

    text = tokens(rng, 600)
    want = hashlib.blake2b(b"ns", digest_size=16).digest()
    for j, got in enumerate(prefix.page_digests(text, b"ns", 2)):
        want = hashlib.blake2b(want + text[256 * j : 256 * (j + 1)].astype("<i4").tobytes(), digest_size=16).digest()
        assert got == want
