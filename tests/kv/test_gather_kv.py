"""gather_kv and gather_kv_slots against their oracle, bit for bit."""

import numpy as np
import pytest
from caches import BF16, activations, filled, page_bytes, poisoned, same_bits

from dsv4_rt import ArgumentError
from dsv4_rt.kv import ops, reference
from dsv4_rt.kv.ops import RECORDS, gather_kv, gather_kv_slots


def lists(rng, T, k, B, blocks, P, entries):
    """Random indices with repeats, -1 and values outside; tables with shuffled, shared, null and impossible pages."""
    table = rng.integers(1, P, (B, blocks)).astype(np.int32)
    table[rng.random(table.shape) < 0.1] = 0
    table[rng.random(table.shape) < 0.05] = P
    table[rng.random(table.shape) < 0.05] = -7
    index = rng.integers(0, blocks * entries, (T, k)).astype(np.int32)
    index[rng.random(index.shape) < 0.1] = -1
    index[rng.random(index.shape) < 0.03] = blocks * entries
    index[rng.random(index.shape) < 0.02] = rng.choice([2**31 - 1, -(2**31)])
    return index, table


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("entries", [64, 2, 5])  # csa and window pages, hca pages, no power of two
@pytest.mark.parametrize(("T", "k"), [(1, 1), (3, 37), (5, 130)])
def test_matches_oracle(device, rng, record, entries, T, k):
    P, B, blocks = 9, 4, 6
    pages = filled(rng, P, record, entries)
    index, table = lists(rng, T, k, B, blocks, P, entries)
    row = rng.integers(-1, B + 1, T).astype(np.int32)
    given = [device.array(x) for x in (index, table, pages)]
    got = gather_kv(*given, record=record, entries=entries, row=device.array(row))
    same_bits(device.numpy(got), reference.gather_kv(index, table, pages, record, entries, row))


@pytest.mark.parametrize("record", RECORDS)
def test_one_row_a_token_without_row(device, rng, record):
    pages = filled(rng, 5, record, 64)
    index, table = lists(rng, 4, 10, 6, 3, 5, 64)
    got = gather_kv(*[device.array(x) for x in (index, table, pages)], record=record)
    same_bits(device.numpy(got), reference.gather_kv(index, table, pages, record))


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slots(device, rng, record, dtype):
    P, entries = 7, 64
    pages = filled(rng, P, record, entries)
    slots = rng.integers(-3, P * entries + 3, (6, 23)).astype(dtype)
    slots[0, :4] = [-1, P * entries, np.iinfo(dtype).max, np.iinfo(dtype).min]
    got = gather_kv_slots(device.array(slots), device.array(pages), record=record)
    same_bits(device.numpy(got), reference.gather_kv_slots(slots, pages, record))


TILES = [ops.gather_kv_tile(T, 1024) for T in (1, 8, 1024)]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("blocks", [6, 1024, 1025])
@pytest.mark.parametrize("number", range(len(TILES)))
def test_every_tile_and_length_of_table(device, rng, monkeypatch, record, blocks, number):
    """Lists that fill no block of any tile, and table rows that a block fetches whole, or does not."""
    monkeypatch.setattr(ops, "gather_kv_tile", lambda T, k: TILES[number])
    blocks_a_list = ops.gather_kv_grid(TILES[number], 3, 37)[0]
    monkeypatch.setattr(ops, "gather_kv_grid", lambda tile, T, k: (blocks_a_list, 2, 2))  # as where T passes 65,535
    for operation in (ops._GATHER_KV, ops._GATHER_KV_SLOTS):
        monkeypatch.setattr(operation, "_known", {})  # plans are remembered by shape
    T, k, P = 3, 37, 6
    pages = filled(rng, P, record, 64)
    index, table = lists(rng, T, k, T, blocks, P, 64)
    index[0, :3] = [blocks * 64 - 1, blocks * 64, 0]  # the last entry there is, the first there is not
    table[0, [0, -1]] = [2, 3]
    got = gather_kv(*[device.array(x) for x in (index, table, pages)], record=record)
    same_bits(device.numpy(got), reference.gather_kv(index, table, pages, record))
    slots = rng.integers(-3, P * 64 + 3, (T, k))
    got = gather_kv_slots(device.array(slots), device.array(pages), record=record)
    same_bits(device.numpy(got), reference.gather_kv_slots(slots, pages, record))


def test_tiles_and_grids():
    assert len(set(TILES)) == len(TILES)
    assert ops.gather_kv_tile(4096, 31) == TILES[0]  # four a warp would leave warps without a record
    names = [ops.gather_kv_instance(TILES[0], blocks, "v4", 64) for blocks in (0, 1, 1024, 1025)]
    assert names[0] == names[3] != names[1] == names[2]
    for tile in TILES:
        assert ops.gather_kv_grid(tile, 65535, 1) == (1, 65535, 1)
        x, y, z = ops.gather_kv_grid(tile, 2**20 + 1, 1000)
        assert x * 8 * tile.each >= 1000 > (x - 1) * 8 * tile.each
        assert max(y, z) <= 65535
        assert y * z >= 2**20 + 1


@pytest.mark.gpu
def test_more_tokens_than_one_dimension_of_a_grid(gpu, rng):
    T, k, P = 70_001, 2, 5
    pages = filled(rng, P, "v4", 64)
    index, table = lists(rng, T, k, 7, 3, P, 64)
    row = rng.integers(-1, 8, T).astype(np.int32)
    got = gather_kv(*[gpu.array(x) for x in (index, table, pages)], row=gpu.array(row))
    same_bits(gpu.numpy(got), reference.gather_kv(index, table, pages, "v4", 64, row))


@pytest.mark.parametrize("record", RECORDS)
def test_every_code_and_scale(device, record):
    """All 256 bytes as codes under every scale byte: subnormal products, overflow, NaN."""
    entries, scales = 64, 256
    pages = np.zeros((scales // entries + 1, page_bytes(record, entries)), np.uint8)
    cache = reference.parts(pages, record, entries)
    flat = {name: part[1:] for name, part in cache.items()}
    flat["data"][...] = np.arange(448) % 256
    if record == "v4":
        flat["scales"][...] = np.arange(scales).reshape(-1, entries, 1)
    else:
        exponents = np.linspace(-149, 128, scales).reshape(-1, entries, 1)
        with np.errstate(over="ignore"):
            flat["scales"][...] = np.exp2(exponents).astype(np.float32)
    flat["rope"].view(np.uint16)[...] = np.arange(scales * 64).reshape(-1, entries, 64) * 4  # infinities and NaN too
    slots = np.arange(entries, pages.shape[0] * entries).reshape(4, -1)
    got = gather_kv_slots(device.array(slots), device.array(pages), record=record)
    same_bits(device.numpy(got), reference.gather_kv_slots(slots, pages, record))


@pytest.mark.parametrize("record", RECORDS)
def test_poison_beyond_the_valid_length_does_not_matter(device, rng, record):
    """Recycled pages full of NaN, a few valid entries, a list that names only those."""
    P, entries, valid = 6, 64, 70
    table = rng.permutation(np.arange(1, P)).astype(np.int32)[None]
    slots = table[0, np.arange(valid) // entries] * entries + np.arange(valid) % entries
    pages = reference.append_kv(activations(rng, valid, 512), slots, poisoned(P, record, entries), record, entries)
    index = rng.integers(-1, valid, (1, 40)).astype(np.int32)
    got = device.numpy(gather_kv(*[device.array(x) for x in (index, table, pages)], record=record))
    assert np.isfinite(got.astype(np.float32)).all()
    same_bits(got, reference.gather_kv(index, table, pages, record))
    outside = np.array([[-1, P * entries, valid + 256, -(2**31)]], np.int32)  # nothing of the poison comes back
    outside[0, 2] = (P - 1) * entries
    got = gather_kv(*[device.array(x) for x in (outside, table, pages)], record=record)
    assert not device.numpy(got).view(np.uint16).any()


def test_nothing_and_nowhere(device, rng):
    pages, table = device.array(filled(rng, 3, "v4", 64)), device.array(np.ones((2, 1), np.int32))
    for T, k in ((0, 4), (2, 0)):
        empty = device.array(np.empty((T, k), np.int32))
        assert gather_kv(empty, table, pages).shape == (T, k, 512)
        assert gather_kv_slots(empty, pages).shape == (T, k, 512)
    index = device.array(np.zeros((2, 9), np.int32))
    empty = device.array(np.empty((2, 0), np.int32))  # tables without a block, and without a row
    assert not device.numpy(gather_kv(index, empty, pages)).view(np.uint16).any()
    none, row = device.array(np.empty((0, 4), np.int32)), device.array(np.zeros(2, np.int32))
    assert not device.numpy(gather_kv(index, none, pages, row=row)).view(np.uint16).any()
    nowhere = device.array(np.full((2, 9), -1, np.int32))
    assert not device.numpy(gather_kv(nowhere, table, pages)).view(np.uint16).any()
    assert not device.numpy(gather_kv_slots(nowhere, pages)).view(np.uint16).any()
    none = pages[:0]
    assert not device.numpy(gather_kv(index, table, none)).view(np.uint16).any()


@pytest.mark.parametrize("record", RECORDS)
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, record):
    T, k, P, entries = 5, 7, 6, 64
    pages = filled(rng, P, record, entries)
    index, table = lists(rng, T, k, T, 3, P, entries)

    def wide(x, gap):
        buffer = device.array(np.full((x.shape[0], x.shape[1] + gap), 77, x.dtype))
        buffer[:, : x.shape[1]] = device.array(x)
        return buffer[:, : x.shape[1]]

    target = guarded((T * k, 512), BF16, row_gap=8)
    out = target.array.reshape(T * k, 512) if target.array.flags.c_contiguous else target.array
    strides = (k * out.strides[0], out.strides[0], out.strides[1])
    as_strided = np.lib.stride_tricks.as_strided
    if device.kind == "cuda":
        import cupy

        as_strided = cupy.lib.stride_tricks.as_strided
    shaped = as_strided(target.array, (T, k, 512), strides)
    gather_kv(wide(index, 3), wide(table, 2), wide(pages, 48), record=record, out=shaped)
    same_bits(device.numpy(shaped), reference.gather_kv(index, table, pages, record, entries))
    assert target.intact()
    slots = rng.integers(-3, P * entries + 3, (T, k))
    gather_kv_slots(wide(slots, 1), wide(pages, 16), record=record, out=shaped)
    same_bits(device.numpy(shaped), reference.gather_kv_slots(slots, pages, record, entries))
    assert target.intact()


@pytest.mark.gpu
@pytest.mark.parametrize("record", RECORDS)
def test_offsets_past_2_to_the_31(gpu, rng, record):
    """A pool of 4.5 GiB and an output of 3 GiB; the records that matter lie at the far end of both."""
    import cupy

    entries, T, k = 64, 3000, 1024
    P = 9 * 2**29 // page_bytes(record, entries)
    few = filled(rng, 9, record, entries)
    pages = cupy.empty((P, few.shape[1]), np.uint8)
    pages[0] = 0
    pages[-8:] = gpu.array(few[1:])
    table = np.array([[P - 1, P - 3, 0, P - 8]], np.int32)
    index = rng.integers(-1, 4 * entries, (T, k)).astype(np.int32)
    far = [0, T - 1]
    small = np.where(table > 0, table - P + 9, 0)
    row = np.zeros(T, np.int32)
    given = [gpu.array(x) for x in (index, table)]
    out = cupy.full((T, k, 512), 7, BF16)
    gather_kv(*given, pages, record=record, row=gpu.array(row), out=out)
    want = reference.gather_kv(index[far], small, few, record, entries, row[far])
    same_bits(gpu.numpy(out[cupy.array(far)]), want)
    slots = np.where(index < 0, -1, table[0, index // entries].astype(np.int64) * entries + index % entries)
    assert slots.max() * 584 > 2**32
    out.fill(7)
    gather_kv_slots(gpu.array(slots), pages, record=record, out=out)
    same_bits(gpu.numpy(out[cupy.array(far)]), want)


def test_says_what_is_wrong(emulator):
    index, table, pages = np.zeros((2, 4), np.int32), np.ones((2, 3), np.int32), np.zeros((3, 37440), np.uint8)
    with pytest.raises(ArgumentError, match="gather_kv: record = 'v5' is none of v4, split"):
        gather_kv(index, table, pages, record="v5")
    with pytest.raises(ArgumentError, match="entries = 0 must be an integer from 1"):
        gather_kv(index, table, pages, entries=0)
    with pytest.raises(ArgumentError, match="pages of 37440 B do not hold 65 entries of 584 B"):
        gather_kv(index, table, pages, entries=65)
    with pytest.raises(ArgumentError, match="2 tokens and a block_table of 1 rows; give row"):
        gather_kv(index, table[:1], pages)
    with pytest.raises(ArgumentError, match=r"row does not fit(.|\n)*axis 0 \(T\) must be 2"):
        gather_kv(index, table, pages, row=np.zeros(3, np.int32))
    with pytest.raises(ArgumentError, match=r"topk_indices does not fit(.|\n)*dtype must be int32"):
        gather_kv(index.astype(np.int64), table, pages)
    with pytest.raises(ArgumentError, match="pages are 37448 B apart; a multiple of 16 B"):
        gather_kv(index, table, np.zeros((3, 37448), np.uint8)[:, :37440])
    with pytest.raises(ArgumentError, match=r"pages does not fit(.|\n)*must be a multiple of 16 B"):
        gather_kv(index, table, np.zeros(3 * 37440 + 16, np.uint8)[8:-8].reshape(3, 37440))
    with pytest.raises(ArgumentError, match=r"out does not fit(.|\n)*axis 2 \(512\) must be 512"):
        gather_kv(index, table, pages, out=np.empty((2, 4, 448), BF16))
    with pytest.raises(ArgumentError, match=r"strides .* of out must be multiples of 8 elements"):
        gather_kv_slots(index, pages, out=np.empty((2, 4, 516), BF16)[..., :512])
    with pytest.raises(ArgumentError, match=r"slots does not fit(.|\n)*dtype must be int32 or int64"):
        gather_kv_slots(index.astype(np.uint8), pages)
    block = np.zeros(2 * 37440, np.uint8)
    with pytest.raises(ArgumentError, match="output out overlaps pages in memory"):
        gather_kv_slots(index, block.reshape(2, -1), out=block[:8192].view(BF16).reshape(2, 4, 512))
