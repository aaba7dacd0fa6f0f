"""Lengths around every boundary of the geometry: 4 (CSA), 64 (window pages), 128 (HCA, window), 256 (pages)."""

import numpy as np
import pytest
from small import small_pool

from dsv4_rt.memory import PoolMisuse, TooLong

LENGTHS = [0, 1, 3, 4, 127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 511, 512, 513]


def prompt(rng, n):
    return rng.integers(0, 129_280, n, dtype=np.int32)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_then_decode(probed, rng, length):
    """One chunk of `length`, then six single tokens: all that each step may look at is there."""
    pool, probe = probed()
    seq = pool.create()
    probe.set_content(seq, prompt(rng, length + 6))
    probe.step([seq], [length])
    for _ in range(6):
        probe.step([seq], [1])
        probe.check_tables()
    pool.check()
    assert pool.length(seq) == length + 6
    probe.read_back(seq, length + 6)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_second_sequence_finds_what_the_first_computed(probed, rng, length):
    """The same prompt twice: the hit ends at the last page boundary and holds what the first computed."""
    pool, probe = probed(checkpoint_every=256)
    tokens = prompt(rng, length + 4)
    first = pool.create(tokens)
    probe.set_content(first, tokens)
    while pool.length(first) < len(tokens):
        start = pool.length(first)
        probe.step([first], [min(pool.next_checkpoint(first), len(tokens)) - start])
    pool.free(first)
    probe.forget(first)
    second = pool.create(tokens)
    probe.set_content(second, tokens)
    assert pool.length(second) == (length + 3) // 256 * 256  # the last token is always computed
    probe.step([second], [len(tokens) - pool.length(second)])
    probe.check_tables()
    pool.check()


@pytest.mark.parametrize("back", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("length", [5, 8, 127, 128, 130, 256, 257, 260, 384, 513])
def test_truncation_is_exact(probed, rng, length, back):
    """Take `back` tokens back over boundaries of 4, 64, 128 and 256, put others in their place: all reads right."""
    if back > length:
        back = length
    pool, probe = probed(max_draft=7)
    tokens = prompt(rng, length + 8)
    seq = pool.create()
    probe.set_content(seq, tokens)
    draft = min(length, 8)
    if length > draft:
        probe.step([seq], [length - draft])
    probe.step([seq], [draft])
    pool.truncate(seq, length - back)
    pool.check()
    assert pool.length(seq) == length - back
    probe.set_content(seq, np.concatenate([tokens[: length - back], prompt(rng, back + 8)]))
    for count in (back, 1, 1, 3):
        probe.step([seq], [count])
        probe.check_tables()
        pool.check()


def test_truncation_further_back_than_the_draft_is_refused(probed, rng):
    pool, probe = probed(max_draft=3)
    seq = pool.create()
    probe.set_content(seq, prompt(rng, 200))
    probe.step([seq], [200])
    before = pool.snapshot()
    with pytest.raises(PoolMisuse, match="truncate"):
        pool.truncate(seq, 196)
    with pytest.raises(PoolMisuse, match="truncate"):
        pool.truncate(seq, 201)
    with pytest.raises(PoolMisuse, match="truncate"):
        pool.truncate(seq, -1)
    assert pool.snapshot() == before
    pool.truncate(seq, 197)
    assert pool.length(seq) == 197


def test_a_sequence_of_a_million_tokens(emulator):
    """1,048,576 tokens in chunks of 8,192: the tables at the end, every page back after free."""
    pool = small_pool(
        pages=4096,
        window_pages=140,
        checkpoints=4,
        max_sequences=2,
        max_length=1 << 20,
        max_in_flight=8192,
        max_tokens=8192,
    )
    seq = pool.create()
    for _ in range(128):
        pool.extend([seq], [8192])
        pool.upload()
    pool.check()
    assert pool.length(seq) == 1 << 20
    with pytest.raises(TooLong):
        pool.extend([seq], [1])
    row = pool.row(seq)
    pages = emulator.numpy(pool.block_table("csa"))[row]
    assert len(np.unique(pages)) == 4096
    assert pages.min() >= 1
    assert pool.stats().full.free == 0
    pool.free(seq)
    pool.check()
    assert pool.stats().full.free == 4096
