"""Tensor copies: the emulator against NumPy on fresh cases, and against what an H200 returned for recorded ones."""


import numpy as np
import pytest
import tiles
from tiles import MULTICASTS, cases, exact_in_numpy, expected, rows, run

CASES = cases()
PER_TEST = 60


@pytest.mark.parametrize("in_global", [False, True])
def test_fresh_copies_equal_numpy(device, rng, in_global):
    for _ in range(40):
        c = tiles.case(rng, "load" if in_global else "")
        got = run(c, device, in_global)
        assert np.array_equal(got, expected(c)), c


def test_every_reduction_of_integers_equals_numpy(device, rng):
    for op, dtypes in tiles.REDUCTIONS.items():
        for dtype in dtypes:
            c = tiles.case(rng, op, dtype)
            got = run(c, device)
            if exact_in_numpy(c):
                assert np.array_equal(got, expected(c)), c


@pytest.mark.parametrize(("size", "mask", "swizzle"), MULTICASTS)
def test_multicast_gives_every_tile_to_the_named_ctas(device, size, mask, swizzle):
    x, got = rows(device, size, mask, swizzle)
    row, pitch = (32, 32) if swizzle == "32B" else (64, {"none": 64, "64B": 64, "128B": 128}[swizzle])
    for cta, tile in enumerate(got):
        want = np.full(tiles.BYTES, tiles.POISON, np.uint8)
        if mask >> cta % size & 1:
            for i in range(4 * size):
                source = x[4 * size * (cta // size) + i, :row]
                for chunk in range(row // 16):
                    at = i * pitch + 16 * chunk
                    to = at ^ ((at >> 7) & (tiles.SWIZZLES[swizzle] // 16 - 1)) << 4 if swizzle != "none" else at
                    want[to : to + 16] = source[16 * chunk : 16 * chunk + 16]
        assert np.array_equal(tile, want), cta
