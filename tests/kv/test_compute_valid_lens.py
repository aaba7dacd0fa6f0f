"""compute_valid_lens against its oracle, number by number."""

import numpy as np
import pytest

from dsv4_rt import ArgumentError
from dsv4_rt.kv import reference
from dsv4_rt.kv.ops import compute_valid_lens


def tables(rng, B, blocks):
    """Rows with 0 .. blocks pages; ends in 0 or -1."""
    table = rng.integers(1, 1000, (B, blocks)).astype(np.int32)
    for r, pages in enumerate(rng.integers(0, blocks + 1, B)):
        table[r, pages:] = rng.choice([0, -1])
    return table


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("ratio", "entries"), [(4, 64), (128, 2), (1, 64), (3, 5)])
@pytest.mark.parametrize("T", [0, 1, 300])
def test_matches_oracle(device, rng, dtype, ratio, entries, T):
    B, blocks = 7, 11
    table = tables(rng, B, blocks)
    positions = rng.integers(-3, ratio * entries * (blocks + 1), T).astype(dtype)
    row = rng.integers(-1, B + 1, T).astype(np.int32)
    given = [device.array(x) for x in (positions, table)]
    got = compute_valid_lens(*given, ratio, entries=entries, row=device.array(row))
    assert np.array_equal(device.numpy(got), reference.compute_valid_lens(positions, table, ratio, entries, row))


@pytest.mark.parametrize("blocks", [31, 32, 33, 1023, 1025, 2500])  # one round, two, three
def test_long_rows_are_searched(device, rng, blocks):
    T = 90
    table = tables(rng, T, blocks)
    table[0], table[1] = 1, 0
    table[2, : blocks - 1], table[2, -1] = 1, 0
    positions = rng.integers(0, 4 * 64 * blocks, T).astype(np.int32)
    positions[:40] = 2**31 - 1
    got = compute_valid_lens(device.array(positions), device.array(table), 4)
    assert np.array_equal(device.numpy(got), reference.compute_valid_lens(positions, table, 4))


def test_a_group_counts_when_its_last_token_is_there(device):
    positions = np.array([-1, 0, 2, 3, 6, 7, 255, 256, 1023, 2**31 - 1], np.int32)
    table = np.tile(np.array([5, 3, 9, 0], np.int32), (positions.size, 1))
    got = compute_valid_lens(device.array(positions), device.array(table), 4)
    assert device.numpy(got).tolist() == [0, 0, 0, 1, 1, 2, 64, 64, 192, 192]


def test_huge_positions_and_no_pages(device):
    positions = np.array([2**63 - 1, 2**40, -(2**63), 5], np.int64)
    table = np.ones((4, 3), np.int32)
    table[3] = 0
    got = compute_valid_lens(device.array(positions), device.array(table), 1, entries=64)
    assert device.numpy(got).tolist() == [192, 192, 0, 0]
    none = compute_valid_lens(device.array(positions), device.array(table[:, :0]), 1)
    assert device.numpy(none).tolist() == [0, 0, 0, 0]


def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded):
    table = tables(rng, 5, 6)
    wide = device.array(np.full((5, 9), 7, np.int32))
    wide[:, :6] = device.array(table)
    out = guarded((1, 5), np.int32)
    positions = rng.integers(0, 2000, 5).astype(np.int32)
    compute_valid_lens(device.array(positions), wide[:, :6], 4, out=out.array[0])
    assert np.array_equal(device.numpy(out.array[0]), reference.compute_valid_lens(positions, table, 4))
    assert out.intact()


def test_says_what_is_wrong(emulator):
    positions, table = np.zeros(3, np.int32), np.ones((3, 2), np.int32)
    with pytest.raises(ArgumentError, match="ratio = 0 must be an integer from 1"):
        compute_valid_lens(positions, table, 0)
    with pytest.raises(ArgumentError, match="3 tokens and a block_table of 2 rows; give row"):
        compute_valid_lens(positions, table[:2], 4)
    with pytest.raises(ArgumentError, match=r"positions does not fit(.|\n)*dtype must be int32 or int64"):
        compute_valid_lens(positions.astype(np.float32), table, 4)
    with pytest.raises(ArgumentError, match=r"out does not fit(.|\n)*dtype must be int32"):
        compute_valid_lens(positions, table, 4, out=np.empty(3, np.int64))
