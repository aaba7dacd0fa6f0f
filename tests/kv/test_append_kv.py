"""append_kv against its oracle: every byte of every page, so that a stray write shows too."""

import numpy as np
import pytest
from caches import BF16, activations, filled, page_bytes, poisoned, same_bits

from dsv4_rt import ArgumentError
from dsv4_rt.kv import reference
from dsv4_rt.kv.ops import RECORDS, append_kv, gather_kv_slots


def check(device, x, slots, pages, record, entries=64):
    there = device.array(pages)
    append_kv(device.array(x), device.array(slots), there, record=record, entries=entries)
    got, want = device.numpy(there), reference.append_kv(x, slots, pages, record, entries)
    wrong = np.argwhere(got != want)
    assert not wrong.size, f"{len(wrong)} bytes differ, first at [page, byte] {wrong[0].tolist()}"
    return got


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("entries", [64, 2, 5])
@pytest.mark.parametrize("T", [0, 1, 13, 67])
def test_matches_oracle(device, rng, record, entries, T):
    P = 2 + -(-T // entries)
    slots = rng.permutation(P * entries)[:T].astype(np.int64)
    check(device, activations(rng, T, 512), slots, poisoned(P, record, entries), record, entries)


@pytest.mark.parametrize("record", RECORDS)
def test_slots_outside_write_nothing(device, rng, record):
    P, entries = 3, 64
    pages = filled(rng, P, record, entries)
    slots = np.array([-1, P * entries, 2**31, 2**40, -(2**62), 5, 2**63 - 1], np.int64)
    check(device, activations(rng, slots.size, 512), slots, pages, record)
    assert np.array_equal(check(device, activations(rng, 3, 512), np.full(3, -1), pages, record), pages)


@pytest.mark.parametrize("record", RECORDS)
def test_edge_values(device, record):
    """Zero, -0, both sides of the floor, powers of two of the scale, the largest, infinities, NaN; alone and mixed."""
    floor = np.array([1e-4]).astype(BF16).view(np.uint16)[0]
    near = np.array([floor - 1, floor, floor + 1], np.uint16).view(BF16).astype(np.float64)
    values = [0.0, -0.0, *near, 448, 450, 446, 224, 896, 3.0e38, 3.3895e38, np.inf, -np.inf, np.nan, 1e-40, 2.0**-133]
    x = np.zeros((2 * len(values), 512), BF16)
    for i, value in enumerate(values):
        x[2 * i] = value
        x[2 * i + 1, [3, 64, 447, 448]] = [value, -value, value, value]
        x[2 * i + 1, 100] = 1.5
    check(device, x, np.arange(64, 64 + len(x)), poisoned(3, record, 64), record)


@pytest.mark.parametrize("record", RECORDS)
def test_every_bf16(device, record):
    """All 65,536 bf16 values in groups of a size: as codes and as copied dimensions."""
    x = np.arange(65536, dtype=np.uint16).view(BF16).reshape(128, 512)
    check(device, x, np.arange(128), poisoned(2, record, 64), record)


@pytest.mark.parametrize("record", RECORDS)
def test_every_quotient(device, record):
    """Every significand under every largest one, over all binades that give a code: 128 x 128 x 21."""
    binade = (1.0 + np.arange(128) / 128).astype(np.float64)
    rows = []
    for first in range(0, 21, 3):
        x = np.zeros((128, 512))
        x[:, :384] = np.concatenate([binade * 2.0 ** -(first + i) for i in range(3)])
        x[:, :384] = np.minimum(x[:, :384], binade[:, None])
        x[:, 384] = -binade
        rows.append(x)
    x = np.concatenate(rows).astype(BF16)
    if record == "v4":  # a group is 64 wide: let every group have the largest
        x[:, 0:384:64] = x[:, 384:385]
    check(device, x, np.arange(64, 64 + len(x)), poisoned(1 + len(x) // 64, record, 64), record)


@pytest.mark.parametrize("record", RECORDS)
def test_round_trip_is_within_half_a_step(device, rng, record):
    """e4m3 keeps 4 bits: half a step is 2^-4 of a normal value, 2^-10 of the scale below; the product rounds again.

    A scale is at most amax / 224 (v4: it is rounded up to a power of two), so its subnormal half step is
    2^-10 * amax / 224.
    """
    x = activations(rng, 64, 512)
    pages = device.array(poisoned(2, record, 64))
    slots = np.arange(64, 128)
    append_kv(device.array(x), device.array(slots), pages, record=record)
    got = device.numpy(gather_kv_slots(device.array(slots[:, None]), pages, record=record))[:, 0]
    same_bits(got[:, 448:], x[:, 448:])
    given = x[:, :448].astype(np.float64)
    amax = np.maximum(np.abs(given).reshape(64, 7 if record == "v4" else 1, -1).max(-1), 1e-4)
    step = np.repeat(amax, 64 if record == "v4" else 448, axis=1) / 224 * 2.0**-10
    bound = (np.abs(given) * 2.0**-4 + step) * (1 + 2.0**-8) + np.abs(given) * 2.0**-8
    assert (np.abs(got[:, :448].astype(np.float64) - given) <= bound).all()


@pytest.mark.parametrize("record", RECORDS)
def test_duplicate_slots_damage_only_that_record(device, rng, record):
    pages = filled(rng, 3, record, 64)
    slots = np.array([70, 71, 70, 70, 72], np.int64)
    x = activations(rng, 5, 512)
    there = device.array(pages)
    append_kv(device.array(x), device.array(slots), there, record=record)
    got, want = device.numpy(there), reference.append_kv(x, slots, pages, record)
    for part, values in reference.parts(got, record, 64).items():
        expected = reference.parts(want, record, 64)[part].copy()
        expected[1, 6] = values[1, 6]
        assert np.array_equal(values.view(np.uint8), expected.view(np.uint8)), part
    padding = 64 * {"v4": 584, "split": 580}[record]
    assert (got[:, padding:] == pages[:, padding:]).all()


@pytest.mark.parametrize("record", RECORDS)
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, record):
    T, P, entries = 9, 4, 64
    x = activations(rng, T, 512)
    wide = device.array(np.full((T, 528), np.nan, BF16))
    wide[:, 8:520] = device.array(x)
    target = guarded((P, page_bytes(record, entries)), np.uint8, row_gap=32)
    before = device.numpy(target.array)
    slots = rng.permutation(P * entries)[:T].astype(np.int64)
    append_kv(wide[:, 8:520], device.array(slots), target.array, record=record)
    want = reference.append_kv(x, slots, np.ascontiguousarray(before), record, entries)
    assert np.array_equal(device.numpy(target.array), want)
    assert target.intact()


@pytest.mark.gpu
@pytest.mark.parametrize("record", RECORDS)
def test_offsets_past_2_to_the_31(gpu, rng, record):
    """65,536 tokens spread over 4.5 GiB; an input of 5 GiB, strided."""
    import cupy

    entries, T = 64, 65536
    width = page_bytes(record, entries)
    P = 9 * 2**29 // width
    pages = cupy.zeros((P, width), np.uint8)
    wide = cupy.empty((T, 40960), BF16)
    x = activations(rng, T, 512)
    wide[:, :512] = gpu.array(x)
    slots = np.sort(rng.permutation(P * entries)[:T])
    slots[-1] = P * entries - 1
    append_kv(wide[:, :512], gpu.array(slots), pages, record=record)
    del wide
    few = np.r_[0:64, T - 512 : T]
    used, renumbered = np.unique(slots[few] // entries, return_inverse=True)
    mine = np.isin(slots // entries, used)
    small = np.zeros((used.size, width), np.uint8)
    moved = np.searchsorted(used, slots[mine] // entries) * entries + slots[mine] % entries
    want = reference.append_kv(x[mine], moved, small, record, entries)
    assert renumbered.max() + 1 == used.size
    assert np.array_equal(gpu.numpy(pages[gpu.array(used)]), want)
    written = len(np.unique(slots))
    assert int((pages != 0).any(axis=1).sum()) == len(np.unique(slots // entries))
    assert written == T


def test_says_what_is_wrong(emulator):
    x, slots, pages = np.zeros((4, 512), BF16), np.zeros(4, np.int64), np.zeros((2, 37440), np.uint8)
    with pytest.raises(ArgumentError, match="append_kv: record = 'bf16' is none of v4, split"):
        append_kv(x, slots, pages, record="bf16")
    with pytest.raises(ArgumentError, match=r"x does not fit(.|\n)*axis 1 \(512\) must be 512"):
        append_kv(x[:, :448], slots, pages)
    with pytest.raises(ArgumentError, match=r"slots does not fit(.|\n)*dtype must be int64"):
        append_kv(x, slots.astype(np.int32), pages)
    with pytest.raises(ArgumentError, match=r"slots does not fit(.|\n)*axis 0 \(T\) must be 4"):
        append_kv(x, slots[:3], pages)
    with pytest.raises(ArgumentError, match="pages of 37000 B do not hold 64 entries of 584 B"):
        append_kv(x, slots, np.zeros((2, 37000), np.uint8))
    with pytest.raises(ArgumentError, match=r"strides .* of x must be multiples of 8 elements"):
        append_kv(np.zeros((4, 516), BF16)[:, :512], slots, pages)
    frozen = pages.copy()
    frozen.setflags(write=False)
    with pytest.raises(ArgumentError, match=r"pages does not fit(.|\n)*is read-only"):
        append_kv(x, slots, frozen)
