"""append_index_keys against its oracle: every byte of every page, each record with and without rotation."""

import numpy as np
import pytest
from caches import BF16, activations

from dsv4_rt import ArgumentError
from dsv4_rt.kv import ops, reference
from dsv4_rt.kv.ops import INDEX_KEYS, KeyTile, append_index_keys

forms = pytest.mark.parametrize(
    ("record", "rotate"), [(record, rotate) for record in INDEX_KEYS for rotate in (True, False)]
)


def poisoned(P, record, entries=64):
    pages = np.full((P, -(-entries * INDEX_KEYS[record][1] // 576) * 576), 0xFF, np.uint8)
    pages[0] = 0
    return pages


def check(device, x, slots, pages, record, rotate, g=1.0, entries=64):
    there = device.array(pages)
    given = {"record": record, "rotate": rotate, "g": g, "entries": entries}
    append_index_keys(device.array(x), device.array(slots), there, **given)
    got, want = device.numpy(there), reference.append_index_keys(x, slots, pages, **given)
    wrong = np.argwhere(got != want)
    assert not wrong.size, f"{len(wrong)} bytes differ, first at [page, byte] {wrong[0].tolist()}"
    return got


@forms
@pytest.mark.parametrize(("T", "entries"), [(0, 64), (1, 64), (13, 64), (67, 64), (21, 2)])
def test_matches_oracle(device, rng, record, rotate, T, entries):
    P = 2 + -(-T // entries)
    slots = rng.permutation(P * entries)[:T].astype(np.int64)
    check(device, activations(rng, T, 128), slots, poisoned(P, record, entries), record, rotate, entries=entries)


@pytest.mark.parametrize(
    ("record", "g"), [("nvfp4", 1.0), ("nvfp4", 2.0**-61), ("nvfp4", 0.37), ("mxfp4", 1.0), ("fp8", 1.0)]
)
@pytest.mark.parametrize("size", [1.0, 2.0**-8, 2.0**9, 2.0**-61])  # scales normal, subnormal, saturated, tiny
def test_every_quotient(device, record, g, size):
    """Every significand under every largest one, over all binades that give a code: 128 x 128 x 5."""
    binade = 1.0 + np.arange(128) / 128
    below = np.concatenate([binade * 2.0**-i for i in range(5)])
    x = np.zeros((128, 7, 8, 16))
    values = np.minimum(np.resize(below, 7 * 8 * 15), binade[:, None]).reshape(128, 7, 8, 15)
    x[..., 1:] = values * np.where(np.arange(15) % 2, 1, -1)
    x[..., 0] = binade[:, None, None]
    x = (x.reshape(-1, 128) * size).astype(BF16)
    check(device, x, np.arange(64, 64 + len(x)), poisoned(1 + len(x) // 64, record), record, False, g)


@forms
@pytest.mark.parametrize("tile", [KeyTile(8, 4), KeyTile(4, 4)])
def test_either_tile(device, rng, monkeypatch, record, rotate, tile):
    monkeypatch.setattr(ops, "append_index_keys_tile", lambda tokens: tile)
    T = 200 + tile.share  # a shape of its own: launches are remembered by shape
    x = activations(rng, T, 128)
    x[::7, 3] = np.nan
    x[::5, 100] = -np.inf
    slots = rng.permutation(5 * 64)[:T].astype(np.int64)
    check(device, x, slots, poisoned(5, record), record, rotate)


@pytest.mark.parametrize("g", [2.0**-6, 0.37, 100.0])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_layers_scale(device, rng, g, rotate):
    check(device, activations(rng, 40, 128), np.arange(64, 104), poisoned(2, "nvfp4"), "nvfp4", rotate, g)


@forms
def test_edge_values(device, rng, record, rotate):
    """Zero, -0, subnormal, huge, infinite and NaN dimensions, alone and among others."""
    values = [0.0, -0.0, 1e-40, 1e-4, 448, 6, 3.0e38, 3.3895e38, np.inf, -np.inf, np.nan, -np.nan]
    x = rng.standard_normal((3 * len(values), 128)).astype(np.float32)
    for i, value in enumerate(values):
        x[3 * i] = value
        x[3 * i + 1, [3, 40, 127]] = [value, -value, value]
        x[3 * i + 2] = np.where(rng.random(128) < 0.5, value, -0.0)
    check(device, x.astype(BF16), np.arange(64, 64 + len(x)), poisoned(2, record), record, rotate)


@forms
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_one_special_value_among_eight_keys(device, rng, record, rotate, value):
    """In every key of a warp and every eighth of a key in turn: no test of finiteness leaves a lane out."""
    x = activations(rng, 128, 128)
    i = np.arange(16)
    x[8 * i + i % 8, 8 * i + i % 7] = value
    check(device, x, np.arange(64, 192), poisoned(3, record), record, rotate)


def test_rotation_is_the_hadamard_matrix(rng):
    """The oracle's butterflies against the matrix (-1)^popcount(i & j), in float64.

    Seven additions, the product and 128^-1/2 itself round in fp32, 2^-24 each of at most sum |x|; then bf16 rounds.
    """
    x = activations(rng, 50, 128)
    i = np.arange(128)
    matrix = (-1.0) ** np.bitwise_count(i[:, None] & i[None, :])
    exact = x.astype(np.float64) @ matrix * 128**-0.5
    error = np.abs(reference.hadamard(x).astype(np.float64) - exact)
    total = np.abs(x.astype(np.float64)).sum(-1, keepdims=True) * 128**-0.5
    assert (error <= 9 * 2.0**-24 * total * 1.01 + 2.0**-8 * np.abs(exact)).all()


@forms
def test_slots_outside_write_nothing(device, rng, record, rotate):
    slots = np.array([-1, 192, 2**31, 2**40, -(2**62), 5, 2**63 - 1], np.int64)
    check(device, activations(rng, slots.size, 128), slots, poisoned(3, record), record, rotate)


@forms
def test_duplicate_slots_damage_only_that_record(device, rng, record, rotate):
    pages, slots = poisoned(3, record), np.array([70, 71, 70, 70, 72], np.int64)
    x = activations(rng, 5, 128)
    there = device.array(pages)
    append_index_keys(device.array(x), device.array(slots), there, record=record, rotate=rotate)
    got, want = device.numpy(there), reference.append_index_keys(x, slots, pages, record, rotate)
    for part, values in reference.key_parts(got, record, 64).items():
        expected = reference.key_parts(want, record, 64)[part].copy()
        expected[1, 6] = values[1, 6]
        assert np.array_equal(values.view(np.uint8), expected.view(np.uint8)), part


@forms
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, record, rotate):
    T, P = 9, 3
    x = activations(rng, T, 128)
    wide = device.array(np.full((T, 144), np.nan, BF16))
    wide[:, 8:136] = device.array(x)
    target = guarded(poisoned(P, record).shape, np.uint8, row_gap=32)
    before = np.ascontiguousarray(device.numpy(target.array))
    slots = rng.permutation(P * 64)[:T].astype(np.int64)
    append_index_keys(wide[:, 8:136], device.array(slots), target.array, record=record, rotate=rotate)
    want = reference.append_index_keys(x, slots, before, record, rotate)
    assert np.array_equal(device.numpy(target.array), want)
    assert target.intact()


@pytest.mark.gpu
@forms
def test_offsets_past_2_to_the_31(gpu, rng, record, rotate):
    """Records at the far end of a pool of 4.5 GiB."""
    import cupy

    width = poisoned(1, record).shape[1]
    P = 9 * 2**29 // width
    pages = cupy.zeros((P, width), np.uint8)
    slots = (P - 4) * 64 + rng.permutation(256)[:200]
    x = activations(rng, 200, 128)
    append_index_keys(gpu.array(x), gpu.array(slots), pages, record=record, rotate=rotate)
    want = reference.append_index_keys(x, slots - (P - 4) * 64, np.zeros((4, width), np.uint8), record, rotate)
    assert np.array_equal(gpu.numpy(pages[-4:]), want)
    assert not int(pages[:-4].any())


def test_says_what_is_wrong(emulator):
    x, slots, pages = np.zeros((4, 128), BF16), np.zeros(4, np.int64), np.zeros((2, 4608), np.uint8)
    with pytest.raises(ArgumentError, match="append_index_keys: record = 'v4' is none of nvfp4, mxfp4, fp8"):
        append_index_keys(x, slots, pages, record="v4")
    with pytest.raises(ArgumentError, match=r"g = -1.0 must be positive"):
        append_index_keys(x, slots, pages, g=-1)
    with pytest.raises(ArgumentError, match=r"g = 2.0 must be positive, and 1.0 for 'mxfp4' keys"):
        append_index_keys(x, slots, pages, record="mxfp4", g=2.0)
    with pytest.raises(ArgumentError, match="g = nan must be a finite float32"):
        append_index_keys(x, slots, pages, g=float("nan"))
    with pytest.raises(ArgumentError, match="entries = 3 must be a multiple of 2"):
        append_index_keys(x, slots, pages, entries=3)
    with pytest.raises(ArgumentError, match="pages of 4608 B do not hold 64 entries of 132 B"):
        append_index_keys(x, slots, pages, record="fp8")
    with pytest.raises(ArgumentError, match=r"x does not fit(.|\n)*axis 1 \(128\) must be 128"):
        append_index_keys(x[:, :64], slots, pages)
