"""Block-scaled products as Triton compiles them (triton_scaled.py): descriptors, scale layouts and order not ours."""

import re

import numpy as np
import pytest
from asynchronous import all_schedules
from foreign import kept
from keep import triton_programs, triton_source
from programs import Scratch, aligned, run_ptx

from dsv4_rt import formats
from dsv4_rt.emulator import Machine
from dsv4_rt.errors import KernelFault
from dsv4_rt.tensor_map import TensorMap

pytestmark = all_schedules


def launch(name, grid, *args, completion, rng, **options):
    """A kept program; scratch comes behind the arguments."""
    ptx, shared = kept(name, "sm_100a")
    entry, threads = re.search(r"\.entry (\w+)\(", ptx)[1], int(re.search(r"\.reqntid (\d+)", ptx)[1])
    scratch = re.match(r".*scratch (\d+)", ptx)
    size = int(scratch[1]) * int(np.prod(grid)) if scratch else 0
    room = aligned(np.zeros(size, np.uint8)).view(Scratch) if size else np.uint64(0)
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)), **options)
    run_ptx(ptx, entry, grid, threads, *args, room, np.uint64(0), machine=machine, shared=shared)


def operand(rng, rows, K, ty, scale, vector):
    """(bytes, scale bytes, values): e4m3 integers or e2m1 codes, with power-of-two scales or small e4m3 ones."""
    if ty == "e4m3":
        data = formats.e4m3_encode(rng.integers(-4, 5, (rows, K)).astype(np.float32))
        values = formats.e4m3_decode(data)
    else:
        codes = rng.integers(0, 16, (rows, K)).astype(np.uint8)
        data, values = formats.e2m1_pack(codes), formats.e2m1_decode(codes)
    if scale == "ue8m0":
        sf = rng.integers(125, 130, (rows, K // vector)).astype(np.uint8)
        factor = formats.ue8m0_decode(sf)
    else:
        sf = rng.integers(0x30, 0x41, (rows, K // vector)).astype(np.uint8)  # 0.5 to 2.25
        factor = formats.e4m3_decode(sf)
    return data, sf, values.astype(np.float64) * np.repeat(factor.astype(np.float64), vector, axis=1)


POINTERS = {
    "scaled_mxfp8": ("e4m3", "ue8m0", 32, 64), "scaled_mxfp4": ("e2m1", "ue8m0", 32, 128),
    "scaled_nvfp4": ("e2m1", "ue4m3", 16, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", POINTERS)
def test_scales_by_rows(name, completion, rng):
    ty, scale, vector, width = POINTERS[name]
    M, N, K = 128, 2 * width, 256
    (a, sa, va), (b, sb, vb) = (operand(rng, rows, K, ty, scale, vector) for rows in (M, N))
    c = aligned(np.full((M, N), np.nan, np.float32))
    data = [aligned(each) for each in (a, sa, b, sb)]
    launch(name, (1, 2), *data, c, np.int32(N), np.int32(K), completion=completion, rng=rng)
    # Sums of at most 256 products, each a multiple of 2^-8 below 2^12: exact in fp32 but for the top, below 2^16 here.
    np.testing.assert_array_equal(c, va @ vb.T)


TILES = {
    "scaled_tiles_mxfp8": ("e4m3", "e4m3", "ue8m0", 32, 128, 128),
    "scaled_tiles_mxfp4": ("e2m1", "e2m1", "ue8m0", 32, 256, 256),
    "scaled_tiles_nvfp4": ("e2m1", "e2m1", "ue4m3", 16, 256, 128),
    "scaled_tiles_mixed": ("e4m3", "e2m1", "ue8m0", 32, 128, 128),
}  # fmt: skip


def run_tiles(name, completion, rng, **options):
    ta, tb, scale, vector, BK, BN = TILES[name]
    M, N, K = 256, BN, 3 * BK
    (a, sa, va), (b, sb, vb) = (operand(rng, rows, K, ty, scale, vector) for rows, ty in ((M, ta), (N, tb)))
    described = []
    for data, sf, ty, box in ((a, sa, ta, 128), (b, sb, tb, BN)):
        padded = ty == "e2m1" and ta != tb
        data = aligned(data)
        tiles = formats.interleave_128x4(sf).reshape(1, len(sf) // 128, sf.shape[1] // 4, 2, 256)
        if padded:
            described.append([TensorMap(data, box=(box, 128), dtype="u4x16_p64", swizzle="128B")])
        else:
            described.append([TensorMap(data, box=(box, 128), swizzle="128B")])
        described[-1] += [*map(np.int32, data.shape), *(np.int64(s) for s in data.strides)]
        parts = aligned(tiles)
        described.append([TensorMap(parts, box=(1, box // 128, BK // vector // 4, 2, 256))])
        described[-1] += [*map(np.int32, parts.shape), *(np.int64(s) for s in parts.strides)]
    c = aligned(np.full((M, N), np.nan, np.float32))
    launch(name, (2, 1), *sum(described, []), c, np.int32(N), np.int32(K), completion=completion, rng=rng, **options)
    return c, va @ vb.T


@pytest.mark.parametrize("name", TILES)
def test_scales_by_tiles(name, completion, rng):
    """Triton copies the next scales over those that its products in flight take: `copies_in_order`."""
    np.testing.assert_array_equal(*run_tiles(name, completion, rng, copies_in_order=True))


def test_that_nothing_orders_its_copies_is_reported(completion, rng):
    with pytest.raises(KernelFault, match=r"tcgen05\.cp overwrites scale factors of"):
        run_tiles("scaled_tiles_mxfp8", completion, rng)


def test_all_are_here(completion):
    names = {name for name, _ in triton_programs() if triton_source(name).stem == "triton_scaled"}
    assert names == {*POINTERS, *TILES}
