"""TensorMap: its rules, refused where a driver refuses, and its way into a kernel."""

from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from dsv4_rt import ArgumentError, KernelFault, LaunchError
from dsv4_rt.arrays import view
from dsv4_rt.launch import POINTER, TensorMap, load
from dsv4_rt.tensor_map import ADDRESSES, TensorMapAt

SOURCE = str(Path(__file__).with_name("tensor_map.cu"))
BIG = 1 << 20


def buffer(device):
    return device.array(np.arange(BIG, dtype=np.uint8))


def strided(array, dtype, shape, strides):
    """A view with any strides, in bytes."""
    if isinstance(array, np.ndarray):
        return as_strided(array.view(dtype), shape, strides)
    from cupy.lib.stride_tricks import as_strided as on_gpu

    return on_gpu(array.view(dtype), shape, strides)


# What a map may be: (dtype of the array, shape, strides, box, options), at its limits.
LEGAL = {
    "rows": ("u1", (64, 256), (256, 1), (8, 64), {}),
    "one axis": ("f4", (1000,), (4,), (256,), {}),
    "five axes": ("u2", (3, 4, 5, 6, 64), (16384, 3072, 768, 128, 2), (1, 2, 3, 4, 16), {}),
    "no step between rows": ("u1", (64, 256), (0, 1), (8, 64), {}),
    "rows that overlap": ("u1", (64, 256), (128, 1), (8, 64), {}),
    "steps that are no multiples of one another": ("u1", (8, 8, 64), (176, 80, 1), (2, 8, 64), {}),
    "steps that fall": ("u1", (8, 8, 64), (64, 1024, 1), (2, 8, 64), {}),
    "a step of 2^40 - 16": ("u1", (8, 64), ((1 << 40) - 16, 1), (8, 64), {}),
    "2^32 rows": ("u1", (1 << 32, 64), (0, 1), (8, 64), {}),
    "a box larger than the tensor": ("u1", (8, 64), (64, 1), (16, 128), {}),
    "a box of 256 x 256 bytes": ("u1", (300, 512), (512, 1), (256, 256), {}),
    "a box of 228 KB": ("u1", (64, 256, 16), (4096, 16, 1), (57, 256, 16), {}),
    "every eighth row": ("u1", (64, 64), (64, 1), (16, 64), {"element_strides": (8, 1)}),
    "swizzle 128B, full": ("u2", (64, 64), (128, 2), (8, 64), {"swizzle": "128B"}),
    "swizzle 128B, short": ("u2", (64, 64), (128, 2), (8, 24), {"swizzle": "128B"}),
    "swizzle 64B": ("u2", (64, 64), (128, 2), (8, 32), {"swizzle": "64B"}),
    "swizzle 32B": ("u2", (64, 64), (128, 2), (8, 16), {"swizzle": "32B"}),
    "NaN outside": ("f2", (64, 64), (128, 2), (8, 16), {"oob_fill": "nan"}),
    "bf16": ("u2", (64, 64), (128, 2), (8, 16), {"dtype": "bf16", "oob_fill": "nan"}),
    "tf32": ("f4", (64, 64), (256, 4), (8, 16), {"dtype": "tf32"}),
    "no promotion": ("u1", (64, 256), (256, 1), (8, 64), {"l2_promotion": "none"}),
}
# What it may not, with a piece of the message.
ILLEGAL = {
    "a step of 264 B": ("u1", (64, 256), (264, 1), (8, 64), {}, "axis 0 steps 264 B; TMA takes multiples of 16"),
    "a step of 2^40": ("u1", (8, 64), (1 << 40, 1), (8, 64), {}, "axis 0 steps 1099511627776 B"),
    "no elements": ("u1", (0, 64), (64, 1), (8, 64), {}, r"axis 0 has 0 elements; TMA takes 1 to 2\^32"),
    "2^32 + 1 rows": ("u1", ((1 << 32) + 1, 64), (0, 1), (8, 64), {}, "axis 0 has 4294967297 elements"),
    "an empty box": ("u1", (8, 64), (64, 1), (0, 64), {}, "the box has 0 elements on axis 0; TMA takes 1 to 256"),
    "a box of 257 rows": ("u1", (300, 64), (64, 1), (257, 64), {}, "the box has 257 elements on axis 0"),
    "a row of 24 B": ("u1", (8, 64), (64, 1), (8, 24), {}, "a row of the box has 24 B; it must be a multiple of 16"),
    "a box past 228 KB": ("u1", (64, 256, 16), (4096, 16, 1), (58, 256, 16), {}, "237,568 B; TMA takes at most 233"),
    "element stride 9": ("u1", (64, 64), (64, 1), (18, 64), {"element_strides": (9, 1)}, "element stride 9 on axis 0"),
    "element stride 0": ("u1", (64, 64), (64, 1), (18, 64), {"element_strides": (0, 1)}, "element stride 0 on axis 0"),
    "160 B under swizzle 128B": (
        "u1", (64, 256), (256, 1), (8, 160), {"swizzle": "128B"}, "has 160 B; swizzle 128B takes at most 128"),
    "96 B under swizzle 64B": ("u1", (64, 256), (256, 1), (8, 96), {"swizzle": "64B"}, "swizzle 64B takes at most 64"),
    "48 B under swizzle 32B": ("u1", (64, 256), (256, 1), (8, 48), {"swizzle": "32B"}, "swizzle 32B takes at most 32"),
    "NaN of integers": ("u1", (64, 64), (64, 1), (8, 64), {"oob_fill": "nan"}, "oob_fill 'nan' of u8, which is no f"),
}  # fmt: skip
# What this package refuses although a driver may not look, or was never asked.
OWN_RULES = {
    "element stride on the last axis": (
        (8, 64), (64, 1), (8, 64), {"element_strides": (1, 2)}, "element stride 2 on the last axis, where TMA ign"),
    "a strided last axis": ((8, 64), (128, 2), (8, 64), {}, "the array's last axis steps 2 elements; it must be "),
    "six axes": ((1,) * 6, (64,) * 6, (1,) * 6, {}, "an array of 6 axes; TMA has 1 to 5"),
    "a box of another rank": ((8, 64), (64, 1), (64,), {}, r"box \(64,\) has 1 axes, the array 2"),
    "interleave": ((8, 8, 64), (512, 64, 1), (8, 8, 16), {"interleave": "16B"}, "interleave '16B' is not implemented"),
    "an atomicity": ((8, 64), (64, 1), (8, 64), {"swizzle": "128B_ATOM_32B"}, "swizzle '128B_ATOM_32B' is none of "),
    "a dtype": ((8, 64), (64, 1), (8, 64), {"dtype": "u6x16"}, "dtype 'u6x16' is none of u8, "),
    "a width": ((8, 64), (64, 1), (8, 64), {"dtype": "f32"}, "elements of 32 bits, of a uint8 array"),
    "half a byte": ((8, 63), (64, 1), (8, 24), {"dtype": "u4x16"}, "a row of the box has 12 B"),
    "a box of padded elements": ((8, 64), (64, 1), (8, 64), {"dtype": "u4x16_p64"}, "takes boxes of 128 elements"),
    "a row of padded elements": ((8, 64), (64, 1), (8, 128), {"dtype": "u6x16_p32"}, "a multiple of 128 of them"),
    "a stride of padded elements": ((8, 64), (80, 1), (8, 128), {"dtype": "u4x16_p64"}, "that are multiples of 32 B"),
    "a swizzle of padded elements": (
        (8, 96), (96, 1), (8, 128), {"dtype": "u6x16_p32", "swizzle": "64B"}, "takes at most 64|takes swizzle 'none'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
def test_what_tma_can_do_is_encoded(device, name):
    dtype, shape, strides, box, options = LEGAL[name]
    tiles = TensorMap(strided(buffer(device), dtype, shape, strides), box, **options)
    assert len(tiles.encode(device)) == 128


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_it_cannot_is_refused_by_rule(name):
    dtype, shape, strides, box, options, message = ILLEGAL[name]
    with pytest.raises(ArgumentError, match=message):
        TensorMap(strided(np.zeros(BIG, np.uint8), dtype, shape, strides), box, **options)


@pytest.mark.parametrize("name", ILLEGAL)
def test_the_driver_refuses_the_same(gpu, monkeypatch, name):
    dtype, shape, strides, box, options, _ = ILLEGAL[name]
    monkeypatch.setattr(TensorMap, "_check", lambda self: None)
    tiles = TensorMap(strided(buffer(gpu), dtype, shape, strides), box, **options)
    with pytest.raises(LaunchError, match="CUDA_ERROR_INVALID_VALUE"):
        tiles.encode(gpu)


@pytest.mark.parametrize("name", OWN_RULES)
def test_rules_of_its_own(name):
    shape, strides, box, options, message = OWN_RULES[name]
    with pytest.raises(ArgumentError, match=message):
        TensorMap(strided(np.zeros(BIG, np.uint8), "u1", shape, strides), box, **options)


def test_a_base_that_is_not_aligned(device, monkeypatch):
    array = buffer(device)[8 : 8 + 4096].reshape(64, 64)
    with pytest.raises(ArgumentError, match="which is not a multiple of 16"):
        TensorMap(array, (8, 64))
    if device.kind == "cuda":
        monkeypatch.setattr(TensorMap, "_check", lambda self: None)
        with pytest.raises(LaunchError, match="CUDA_ERROR_INVALID_VALUE"):
            TensorMap(array, (8, 64)).encode(device)


def test_four_bit_elements_are_for_sm_100(emulator):
    import dsv4_rt

    array = emulator.array(np.zeros((8, 64), np.uint8))
    tiles = TensorMap(array, (8, 128), dtype="u4x16", swizzle="64B")
    assert (tiles.shape, tiles.row_bytes, tiles.transaction_bytes) == ((8, 128), 64, 512)
    assert len(tiles.encode(emulator)) == 128
    with pytest.raises(ArgumentError, match="sm_90a has no u4x16; a u8 map of the same bytes gives the same tile"):
        tiles.encode(dsv4_rt.open_device("emulator:sm_90a"))


@pytest.mark.parametrize(("dtype", "row"), [("u4x16_p64", 64), ("u6x16_p32", 96)])
def test_padded_elements_are_for_sm_100(dtype, row, emulator):
    import dsv4_rt

    tiles = TensorMap(emulator.array(np.zeros((8, 2 * row), np.uint8)), (8, 128), dtype=dtype, swizzle="128B")
    assert (tiles.shape, tiles.row_bytes, tiles.transaction_bytes) == ((8, 256), 128, 8 * row)
    assert len(tiles.encode(emulator)) == 128
    with pytest.raises(ArgumentError, match=f"sm_90a has no {dtype}"):
        tiles.encode(dsv4_rt.open_device("emulator:sm_90a"))


def test_a_map_goes_to_the_device_of_its_array(emulator):
    tiles = TensorMap(emulator.array(np.zeros((8, 64), np.uint8)), (8, 64))
    other = type("Gpu", (), {"kind": "cuda", "index": 0, "arch": "sm_90a", "__repr__": lambda self: "a GPU"})()
    with pytest.raises(ArgumentError, match="the array is on host memory, the kernel on a GPU"):
        tiles.encode(other)


def rows_of(device):
    x = np.arange(64 * 16, dtype=np.uint32).reshape(64, 16)
    return x, device.array(x)


@pytest.mark.parametrize("place", ["first", "last", "second", "in_memory"])
def test_a_map_arrives_wherever_the_parameter_is(device, place):
    x, array = rows_of(device)
    tiles = TensorMap(array, (1, 16))
    other = TensorMap(device.array(np.zeros((64, 16), np.uint32)), (1, 16))
    out = device.array(np.full(16, 7, np.uint32))
    y = np.int32(5)
    if place == "in_memory":
        both = np.frombuffer(other.encode(device) + tiles.encode(device), np.uint8)
        args = (device.array(both), y, out)
    else:
        args = {"first": (tiles, y, out), "last": (out, y, tiles), "second": (other, np.int8(1), tiles, y, out)}[place]
    load(SOURCE, place).launch(1, 32, *args)
    assert np.array_equal(device.numpy(out), x[5])


def test_a_prepared_launch_keeps_the_map_and_its_array(device):
    x, array = rows_of(device)
    out = device.array(np.full(16, 7, np.uint32))
    ready = load(SOURCE, "last").prepare(1, 32, POINTER, np.int32(9), TensorMap(array, (1, 16)))
    del array
    address = out.ctypes.data if isinstance(out, np.ndarray) else out.data.ptr
    ready.launch([address])
    assert np.array_equal(device.numpy(out), x[9])


@pytest.mark.parametrize("place", ["first", "last", "second"])
def test_the_array_of_a_map_may_be_another_each_launch(device, place):
    form = TensorMapAt((64, 16), (16, 1), np.dtype(np.uint32), (1, 16))
    y, out = np.int32(5), device.array(np.zeros(16, np.uint32))
    args = {"first": (form, y, POINTER), "last": (POINTER, y, form), "second": (form, np.int8(1), form, y, POINTER)}
    ready = load(SOURCE, place).prepare(1, 32, *args[place])
    arrays = [device.array(np.arange(1024, dtype=np.uint32) + 5000 * i) for i in range(3)]
    for i in (0, 1, 2, 1, 0):
        given = {"first": (arrays[i], out), "last": (out, arrays[i]), "second": (arrays[0], arrays[i], out)}[place]
        views = [view(a) for a in given]
        ready.launch([v.ptr for v in views], device.current_stream(), views)
        assert np.array_equal(device.numpy(out), np.arange(80, 96) + 5000 * i)


def test_a_map_is_encoded_once_for_each_address(emulator, monkeypatch):
    seen = []
    plain = type(emulator).tensor_map_encoder

    def counting(self, fields):
        encode = plain(self, fields)
        return lambda address: seen.append(address) or encode(address)

    monkeypatch.setattr(type(emulator), "tensor_map_encoder", counting)
    encoded = TensorMapAt((64, 16), (16, 1), np.dtype(np.uint32), (1, 16)).encoder(emulator)
    assert encoded(4096) == encoded(4096) != encoded(8192)
    assert seen == [4096, 8192]
    array = emulator.array(np.zeros((64, 16), np.uint32))
    assert encoded(view(array).ptr) == TensorMap(array, (1, 16)).encode(emulator)
    for i in range(ADDRESSES):  # and not kept without end
        encoded(16 * (i + 1))
    assert encoded(4096) == encoded(4096)
    with pytest.raises(ArgumentError, match="an array at 0x1008; TMA takes multiples of 16 B"):
        encoded(0x1008)
    with pytest.raises(ArgumentError, match="an array at 0x0; TMA takes"):
        encoded(0)
    with pytest.raises(ArgumentError, match="axis 0 steps 72 B"):
        TensorMapAt((64, 16), (18, 1), np.dtype(np.uint32), (1, 16))


def test_a_launch_gives_as_many_addresses_as_there_are_maps_and_pointers(emulator):
    form = TensorMapAt((64, 16), (16, 1), np.dtype(np.uint32), (1, 16))
    ready = load(SOURCE, "first").prepare(1, 32, form, np.int32(0), POINTER)
    with pytest.raises(LaunchError, match="2 pointers are wanted"):
        ready.launch([4096])
    with pytest.raises(ArgumentError, match="an array at 0x1008; TMA takes multiples of 16 B"):
        ready.launch([0x1008, 4096])


def test_memory_of_the_host_is_reached_through_a_map(emulator):
    x = np.arange(64 * 16 + 16, dtype=np.uint32)
    x = x[-x.ctypes.data % 64 // 4 :][: 64 * 16].reshape(64, 16)  # not of the emulator's arena; 16-byte aligned
    out = emulator.array(np.zeros(16, np.uint32))
    load(SOURCE, "first").launch(1, 32, TensorMap(x, (1, 16)), np.int32(3), out)
    assert np.array_equal(out, x[3])


def test_an_edited_map(device):
    _, array = rows_of(device)
    elsewhere = np.arange(1000, 1000 + 64 * 16, dtype=np.uint32)
    there, scratch = device.array(elsewhere), device.array(np.zeros(128, np.uint8))
    for rows, y, want in ((8, 7, elsewhere[112:128]), (7, 7, np.zeros(16))):  # row 7 of 7 lies outside
        out = device.array(np.full(16, 7, np.uint32))
        args = (TensorMap(array, (1, 16)), scratch, there, np.uint32(rows), np.int32(y), out)
        load(SOURCE, "edited").launch(1, 32, *args)
        assert np.array_equal(device.numpy(out), want)


def test_refuses_a_map_where_another_parameter_is(emulator):
    _, array = rows_of(emulator)
    with pytest.raises(LaunchError, match=r"argument 0 \(TensorMap\(u32 .*\)\) has 128 B, the kernel's parameter 8 B"):
        load(SOURCE, "last").launch(1, 32, TensorMap(array, (1, 16)), np.int32(0), array)


def test_what_is_no_map_is_said_so(emulator):
    out = emulator.array(np.zeros(16, np.uint32))
    with pytest.raises(KernelFault, match="the 128 bytes are not a tensor map that this emulator has encoded"):
        load(SOURCE, "first").launch(1, 32, bytes(128), np.int32(0), out)
