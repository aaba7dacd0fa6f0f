"""The pool's arrays: shapes, alignment, views that share memory with the page, and what leaves by DLPack."""

import gc

import numpy as np
import pytest
from storages import COUNTS, few_layers, filled

from dsv4_rt import FLASH, PRO, ArgumentError
from dsv4_rt.arrays import view
from dsv4_rt.formats import BF16
from dsv4_rt.memory.layout import INDEX_KEYS, LIVES, RECORDS, Cache, KVLayout, Part
from dsv4_rt.memory.storage import Storage


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("index", INDEX_KEYS)
def test_base_and_strides_are_aligned(device, record, index):
    storage = Storage(few_layers(KVLayout.for_model(PRO, record, index, max_draft=1)), device, COUNTS)
    for cache in storage.layout.caches:
        array = view(storage.array(cache.name))
        assert array.ptr % 256 == 0
        assert array.shape == (2, COUNTS[cache.life], cache.page_bytes)
        assert array.strides == (COUNTS[cache.life] * cache.page_bytes, cache.page_bytes, 1)  # contiguous
        assert cache.page_bytes % cache.page_align == 0
        for i, layer in enumerate(cache.layers):
            pages = view(storage.view(layer, cache.name))
            assert pages.ptr == array.ptr + i * array.strides[0]
            assert pages.ptr % 16 == 0
            assert pages.strides == (cache.page_bytes, 1)
            for name, part in storage.parts(layer, cache.name).items():
                found, size = view(part), cache.part(name).dtype.itemsize
                assert found.ptr % size == 0
                assert found.dtype == cache.part(name).dtype
                assert found.strides[0] * size == cache.page_bytes


def test_sizes_add_up(device):
    storage = Storage(few_layers(KVLayout.for_model(FLASH)), device, COUNTS)
    assert storage.nbytes == sum(storage.array(name).nbytes for name in storage.layout.names)
    assert storage.counts == COUNTS


def test_null_pages_are_zero(device):
    storage = Storage(few_layers(KVLayout.for_model(FLASH)), device, COUNTS)
    for name in storage.layout.names:
        assert not device.numpy(storage.array(name)[:, 0]).any()


@pytest.mark.parametrize("record", RECORDS)
def test_parts_are_the_bytes_of_the_page(device, rng, record):
    """Each part, written through its view, appears at the bytes that `locate` names, and nowhere else."""
    storage, before = filled(device, rng, record, max_draft=2)
    for cache in storage.layout.caches:
        layer, page, entry = cache.layers[1], 2, cache.entries - 1
        for part in cache.parts:
            value = rng.integers(0, 256, part.nbytes, dtype=np.uint8)
            value = np.where(value == 0x7F, 0, value).astype(np.uint8)  # no NaN: their payload may not survive a copy
            storage.parts(layer, cache.name)[part.name][page, entry] = device.array(value.view(part.dtype))
            offset, stride = cache.locate(part.name)
            start = offset + entry * stride
            before[cache.name][1, page, start : start + part.nbytes] = value
            assert np.array_equal(device.numpy(storage.view(layer, cache.name)), before[cache.name][1])


def test_flashmla_alias(device, rng):
    """[pages, entries, 1, 584]: the strides the kernel asks for, and its address formula reads our parts."""
    storage, before = filled(device, rng)
    for name, entries in (("csa", 64), ("hca", 2), ("window", 64)):
        cache = storage.layout.cache(name)
        layer = cache.layers[1]
        alias = view(storage.records(layer, name))
        assert alias.shape == (COUNTS[cache.life], entries, 1, 584)
        assert alias.strides[0] % 576 == 0
        assert alias.strides[1:] == (584, 584, 1)
        assert alias.ptr == view(storage.view(layer, name)).ptr
        assert alias.ptr % 16 == 0
        # FlashMLA: data row at page + i * 576, scales at page + entries * 576 + i * 8.
        flat, stride = before[name][1].reshape(-1), alias.strides[0]
        parts = {key: device.numpy(part) for key, part in storage.parts(layer, name).items()}
        for slot in (1 * entries, 2 * entries - 1, 3 * entries + 1):
            page, i = divmod(slot, entries)
            row = flat[page * stride + i * 576 :][:576]
            assert np.array_equal(parts["data"][page, i], row[:448])
            assert np.array_equal(parts["rope"][page, i].view(np.uint8), row[448:])
            assert np.array_equal(parts["scales"][page, i], flat[page * stride + entries * 576 + i * 8 :][:8])


@pytest.mark.parametrize(("index", "width"), [("nvfp4", 72), ("mxfp4", 68), ("fp8", 132)])
def test_read_indexer_view(device, rng, index, width):
    storage, before = filled(device, rng, index=index)
    layer = storage.layout.cache("index").layers[1]
    keys = view(storage.read_indexer_view(layer))
    assert keys.shape == (COUNTS["full"], 64, 1, width)
    assert keys.strides == (storage.layout.cache("index").page_bytes, width, width, 1)
    values = width - {"nvfp4": 8, "mxfp4": 4, "fp8": 4}[index]
    parts = storage.parts(layer, "index")
    assert np.array_equal(device.numpy(parts["data"])[3, 5], before["index"][1, 3, 5 * values :][:values])
    scale = before["index"][1, 3, 64 * values + 5 * (width - values) :][: width - values]
    assert np.array_equal(device.numpy(parts["scales"])[3, 5].view(np.uint8), scale)


def test_state_rows_are_kv_then_score(device, rng):
    storage, before = filled(device, rng, max_draft=1)
    layer = storage.layout.cache("csa_state").layers[0]
    rows = {name: device.numpy(part) for name, part in storage.parts(layer, "csa_state").items()}
    assert rows["kv"].shape == rows["score"].shape == (COUNTS["state"], 9, 1024)
    assert np.array_equal(rows["score"][2, 8].view(np.uint8), before["csa_state"][0, 2, 8 * 8192 + 4096 :][:4096])


def test_slots_address_entries(device):
    """A slot is page * entries + entry, for every cache: written by slot, read by page."""
    storage = Storage(few_layers(KVLayout.for_model(FLASH)), device, COUNTS)
    for name in ("csa", "hca", "index", "window"):
        cache = storage.layout.cache(name)
        data = storage.parts(cache.layers[0], name)["data"]
        for slot in (cache.entries, 2 * cache.entries - 1, 3 * cache.entries + 1):
            data[slot // cache.entries, slot % cache.entries] = slot % 251
            got = device.numpy(storage.view(cache.layers[0], name))[slot // cache.entries]
            row = cache.part("data").nbytes if name == "index" else 576
            assert (got[slot % cache.entries * row :][: cache.part("data").nbytes] == slot % 251).all()


def test_views_keep_the_memory(device, rng):
    storage, before = filled(device, rng)
    layer = storage.layout.cache("csa").layers[1]
    alive = storage.records(layer, "csa"), storage.parts(layer, "csa")["data"]
    del storage
    gc.collect()
    assert np.array_equal(device.numpy(alive[1])[3, 9], before["csa"][1, 3, 9 * 576 :][:448])


def test_goes_out_by_dlpack(device, rng, torch):
    storage, before = filled(device, rng)
    csa, state = storage.layout.cache("csa").layers[1], storage.layout.cache("hca_state").layers[0]
    for array in (
        storage.view(csa, "csa"),
        storage.records(csa, "csa"),
        storage.read_indexer_view(csa),
        storage.parts(csa, "csa")["data"],
        storage.parts(state, "hca_state")["score"],
    ):
        tensor = torch.from_dlpack(array)
        assert tensor.data_ptr() == view(array).ptr
        assert tuple(tensor.shape) == view(array).shape
        assert tensor.stride() == view(array).strides
    tensor = torch.from_dlpack(storage.parts(csa, "csa")["rope"].view(np.uint16)).view(torch.bfloat16)
    want = before["csa"][1, 4, 7 * 576 + 448 :][:128].view(BF16)
    assert np.array_equal(tensor[4, 7].cpu().view(torch.int16).numpy(), want.view(np.int16))


def test_numpy_reads_it_by_dlpack(emulator, rng):
    storage, before = filled(emulator, rng)
    layer = storage.layout.cache("csa").layers[0]
    assert np.array_equal(np.from_dlpack(storage.view(layer, "csa")), before["csa"][0])


def test_any_layout_is_stored(emulator):
    """Geometry is data: an interleaved record of another model, in one layer."""
    kv = Cache("kv", "full", 2, 128, (Part("data", np.dtype(np.uint8), (512,)), Part("sf", BF16, (8,))), 528, (5,))
    storage = Storage(KVLayout("other", (kv,)), emulator, {"full": 3})
    assert storage.records(5, "kv").shape == (3, 128, 1, 528)
    assert storage.parts(5, "kv")["sf"].strides == (128 * 528, 528, 2)
    assert storage.counts == {"full": 3, "window": 1, "state": 1, "checkpoint": 1}
    assert set(storage.counts) == set(LIVES)


def test_says_what_is_wrong(emulator):
    layout = few_layers(KVLayout.for_model(FLASH))
    storage = Storage(layout, emulator, COUNTS)
    with pytest.raises(ArgumentError, match="layer 3 has no 'csa'; layers 2, 4 have"):
        storage.view(3, "csa")
    with pytest.raises(ArgumentError, match="no cache 'swa'"):
        storage.parts(2, "swa")
    with pytest.raises(ArgumentError, match=r"counts\['window'\] = None must be an integer from 1"):
        Storage(layout, emulator, {"full": 3, "state": 2, "checkpoint": 2})
    with pytest.raises(ArgumentError, match=r"counts\['full'\] = 0 must be"):
        Storage(layout, emulator, {**COUNTS, "full": 0})
    with pytest.raises(ArgumentError, match=r"counts for \['swa'\]; the life cycles are full, window"):
        Storage(layout, emulator, {**COUNTS, "swa": 3})
    with pytest.raises(ArgumentError, match=r"2147483648 entries of 'csa'; kernels address them by int32"):
        Storage(layout, emulator, {**COUNTS, "full": 2**25})
