"""upload_deltas against its oracle: every word of the tables, guard words around them."""

import numpy as np
import pytest

from dsv4_rt import ArgumentError
from dsv4_rt.memory import reference
from dsv4_rt.memory.ops import CHUNK, runs_start, upload_deltas

GUARD = -0x5A5A5A5B  # 0xA5 bytes


def message(rng, words, chunks, singles):
    """Random changes, no word twice: chunks of any length, words alone."""
    start = runs_start(chunks, singles)
    out = rng.integers(-(2**31), 2**31, start + CHUNK * chunks).astype(np.int32)
    places = rng.permutation(words // CHUNK)  # disjoint stretches of the tables
    heads = out[: 2 * chunks].reshape(-1, 2)
    heads[:, 1] = rng.integers(1, CHUNK + 1, chunks)
    heads[:, 0] = CHUNK * places[:chunks] + rng.integers(0, CHUNK + 1 - heads[:, 1])
    free = (CHUNK * places[chunks:, None] + np.arange(CHUNK)).reshape(-1)
    out[2 * chunks : 2 * (chunks + singles)].reshape(-1, 2)[:, 0] = rng.permutation(free)[:singles]
    return out


def check(device, tables, sent, chunks, singles):
    around = np.full(tables.size + 64, GUARD, np.int32)
    around[32:-32] = tables
    buffer = device.array(around)
    upload_deltas(buffer[32:-32], device.array(sent), chunks, singles)
    reference.upload_deltas(around[32:-32], sent, chunks, singles)
    assert np.array_equal(device.numpy(buffer), around)


@pytest.mark.parametrize(
    ("chunks", "singles"), [(1, 0), (0, 1), (0, 32), (0, 33), (1, 1), (3, 31), (4, 64), (5, 100), (33, 7), (16, 1000)]
)
def test_matches_oracle(device, rng, chunks, singles):
    words = CHUNK * (chunks + singles // CHUNK + 3)
    tables = rng.integers(-(2**31), 2**31, words).astype(np.int32)
    check(device, tables, message(rng, words, chunks, singles), chunks, singles)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128])
def test_a_chunk_writes_its_count_and_no_more(device, count):
    sent = np.arange(32 + CHUNK, dtype=np.int32)
    sent[:2] = 5, count
    check(device, np.full(200, -7, np.int32), sent, 1, 0)


def test_nothing(device):
    check(device, np.arange(10, dtype=np.int32), np.empty(0, np.int32), 0, 0)


def test_words_outside_the_tables_are_skipped(device, rng):
    sent = rng.integers(0, 1000, runs_start(3, 4) + 3 * CHUNK).astype(np.int32)
    sent[:6] = 250, 128, -5, 20, 2**31 - 1, 128  # over the end, over the start, far outside
    sent[6:14:2] = -1, 300, -(2**31), 200
    check(device, rng.integers(0, 1000, 300).astype(np.int32), sent, 3, 4)


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_tables_need_no_alignment_beyond_words(device, rng, shift):
    sent = message(rng, 1000, 4, 9)
    tables = rng.integers(0, 100, 1024 + shift).astype(np.int32)
    buffer = device.array(tables)
    upload_deltas(buffer[shift:], device.array(sent), 4, 9)
    reference.upload_deltas(tables[shift:], sent, 4, 9)
    assert np.array_equal(device.numpy(buffer), tables)


@pytest.mark.gpu
def test_reads_pinned_memory(gpu, rng):
    import cupy

    sent = message(rng, 4096, 10, 50)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(sent.nbytes), np.int32, sent.size)
    pinned[:] = sent
    tables = rng.integers(0, 100, 4096).astype(np.int32)
    there = gpu.array(tables)
    upload_deltas(there, pinned, 10, 50)
    gpu.synchronize()
    reference.upload_deltas(tables, sent, 10, 50)
    assert np.array_equal(gpu.numpy(there), tables)
    with pytest.raises(ArgumentError, match="message is in pageable host memory"):
        upload_deltas(there, sent, 10, 50)


def test_says_what_is_wrong(emulator):
    tables, sent = np.zeros(64, np.int32), np.zeros(512, np.int32)
    with pytest.raises(ArgumentError, match=r"tables does not fit(.|\n)*dtype must be int32"):
        upload_deltas(tables.astype(np.int64), sent, 1, 0)
    with pytest.raises(ArgumentError, match=r"tables does not fit(.|\n)*must have 1 axis"):
        upload_deltas(tables.reshape(8, 8), sent, 1, 0)
    with pytest.raises(ArgumentError, match=r"message does not fit(.|\n)*must be a multiple of 8 B"):
        upload_deltas(tables, sent[1:], 1, 0)
    with pytest.raises(ArgumentError, match="message has 512 words; 4 chunks and 0 singles need 544"):
        upload_deltas(tables, sent, 4, 0)
    with pytest.raises(ArgumentError, match="singles = -1 must be an integer from 0"):
        upload_deltas(tables, sent, 1, -1)
    tables.setflags(write=False)
    with pytest.raises(ArgumentError, match=r"tables does not fit(.|\n)*read-only"):
        upload_deltas(tables, sent, 1, 0)
