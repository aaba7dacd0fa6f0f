"""Tensor copies: the emulator against NumPy on fresh cases, and against what an H200 returned for recorded ones."""


import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiles
from tiles import MULTICASTS, Case, cases, digest, exact_in_numpy, expected, names, rows, run

import dsv4_rt
from dsv4_rt.emulator import tma
from dsv4_rt.errors import UnsupportedInstruction
from dsv4_rt.tensor_map import TensorMap

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


def test_four_bit_elements_are_the_bytes_they_lie_in(emulator, rng):
    """A map of nibbles gives the tile that a map of bytes gives, coordinates and sizes doubled."""
    for _ in range(10):
        c = tiles.case(rng, "load", "u8")
        while c.box[-1] * 2 > 256 or abs(c.coords[-1]) >= 1 << 30:
            c = tiles.case(rng, "load", "u8")
        tensor, _ = c.memory()
        array = tiles.strided(emulator.array(tensor), np.uint8, c.shape, c.strides)
        images = []
        for dtype, many in (("u8", 1), ("u4x16", 2)):
            box, coords = (*c.box[:-1], many * c.box[-1]), (*c.coords[:-1], many * c.coords[-1])
            given = TensorMap(array, box, dtype=dtype, element_strides=c.steps, swizzle=c.swizzle)
            images.append(tiles.image(emulator, given, coords, c.start, c.transaction_bytes))
        assert np.array_equal(*images), c


def test_reductions_into_elements_that_overlap_are_refused(emulator):
    rows = Case("add", "u32", (4, 64), (0, 4), (2, 16), (1, 1), "none", "zero", (0, 0), 0, 7)
    with pytest.raises(UnsupportedInstruction, match=r"add to a tensor whose elements overlap(.|\n)*tiles.cu"):
        run(rows, emulator)
    run(replace(rows, strides=(256, 4)), emulator)


def test_tf32_rounds_as_the_hardware_does():
    # What an H200 made of these words: ties to even, subnormals, overflow, infinities and NaN.
    words = {
        0x3879C141: 0x3879C000, 0x3F801000: 0x3F800000, 0x3F801001: 0x3F802000, 0x3F803000: 0x3F804000,
        0x3F802FFF: 0x3F802000, 0x00000001: 0x00000000, 0x007FFFFF: 0x00800000, 0x807FFFFF: 0x80800000,
        0x7F7FFFFF: 0x7F800000, 0x7F800000: 0x7F800000, 0xFF800000: 0xFF800000, 0x7F800001: 0x7FFFE000,
        0x7FA00000: 0x7FFFE000, 0xFFFFFFFF: 0x7FFFE000,
    }  # fmt: skip
    bits, want = (np.array(list(each), np.uint32) for each in (words, words.values()))
    assert np.array_equal(tma.to_tf32(bits), want)
    assert np.array_equal(tiles._tf32(bits), want)


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


RECORD = Path(__file__).with_name("results").joinpath("tma.json")


@pytest.mark.parametrize("chunk", range(0, len(CASES), PER_TEST))
def test_equals_the_recorded_hardware(chunk):
    record = json.loads(RECORD.read_text())["digests"]
    found = dict(list(zip(names(CASES), CASES, strict=True))[chunk : chunk + PER_TEST])
    emulator = dsv4_rt.open_device("emulator:sm_90a")
    with dsv4_rt.use_device(emulator):
        different = [name for name, c in found.items() if digest(run(c, emulator)) != record[name]]
    assert not different, f"{len(different)} of {len(found)} copies differ from the H200's: {', '.join(different)}"


def test_multicast_equals_the_recorded_hardware(emulator):
    record = json.loads(RECORD.read_text())["digests"]
    for each in MULTICASTS:
        assert digest(rows(emulator, *each)[1]) == record["multicast " + " ".join(map(str, each))], each


def test_one_wrong_byte_changes_a_digest(emulator):
    got = run(CASES[0], emulator)
    got[123] ^= 1
    assert digest(got) != json.loads(RECORD.read_text())["digests"][names(CASES)[0]]


def test_the_record_covers_the_cases():
    record = json.loads(RECORD.read_text())
    assert set(names(CASES)) <= set(record["digests"])
    assert len(record["digests"]) == len(CASES) + len(MULTICASTS)
    assert "H200" in record["machine"]
