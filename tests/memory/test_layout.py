"""Geometry as data: page sizes that engines agree on, where every byte of an entry lies, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dsv4_rt import FLASH, PRO, ArgumentError
from dsv4_rt.formats import BF16
from dsv4_rt.memory.layout import INDEX_KEYS, LIVES, RECORDS, Cache, KVLayout, Part

U8, F32 = np.dtype(np.uint8), np.dtype(np.float32)
ALL = [(model, record, index) for model in (FLASH, PRO) for record in RECORDS for index in INDEX_KEYS]
NAMES = [f"{model.name}-{record}-{index}" for model, record, index in ALL]


# Bytes of a 256-token page over all layers, as released engines print them; nvfp4 keys fill the padding of mxfp4's.
@pytest.mark.parametrize(
    ("model", "index", "full"),
    [
        (FLASH, "mxfp4", 917_568),
        (FLASH, "nvfp4", 917_568),
        (FLASH, "fp8", 1_002_240),
        (PRO, "mxfp4", 1_315_008),
        (PRO, "fp8", 1_435_968),
    ],
)
def test_v4_pages_are_those_of_released_engines(model, index, full):
    layout = KVLayout.for_model(model, "v4", index)
    assert layout.bytes_of("full") == full
    assert layout.cache("csa").page_bytes == layout.cache("window").page_bytes == 37_440
    assert layout.cache("hca").page_bytes == 1_728
    assert layout.cache("index").page_bytes == {"mxfp4": 4_608, "nvfp4": 4_608, "fp8": 8_640}[index]
    assert layout.cache("index").entry_bytes == {"mxfp4": 68, "nvfp4": 72, "fp8": 132}[index]
    assert layout.bytes_of("window") == model.num_layers * 37_440


@pytest.mark.parametrize(
    ("record", "entry", "window", "pages"),
    [
        ("v4", 584, 584, (37_440, 1_728)),
        ("split", 580, 580, (37_120, 1_184)),
        ("v4.1", 528, 528, (33_792, 1_536)),
        ("v4.1-fp4", 288, 528, (18_432, 768)),
    ],
)
def test_records(record, entry, window, pages):
    layout = KVLayout.for_model(FLASH, record)
    assert layout.cache("csa").entry_bytes == layout.cache("hca").entry_bytes == entry
    assert (layout.cache("csa").page_bytes, layout.cache("hca").page_bytes) == pages
    assert layout.cache("window").entry_bytes == window


def test_layers_follow_the_compress_ratios():
    for model, csa, hca in ((FLASH, 21, 20), (PRO, 30, 31)):
        layout = KVLayout.for_model(model)
        assert len(layout.cache("csa").layers) == csa
        assert layout.cache("index").layers == layout.cache("csa").layers == layout.cache("csa_state").layers
        assert len(layout.cache("hca").layers) == hca
        assert all(model.compress_ratios[i] == 4 for i in layout.cache("csa").layers)
        assert all(model.compress_ratios[i] == 128 for i in layout.cache("hca").layers)
        assert layout.cache("window").layers == tuple(range(model.num_layers))


def test_a_full_page_is_256_tokens_and_a_window_page_64():
    layout = KVLayout.for_model(PRO)
    assert {cache.tokens for cache in layout.of("full")} == {256}
    assert [cache.entries for cache in layout.of("full")] == [64, 64, 2]
    assert [cache.tokens for cache in layout.of("window")] == [64]


@pytest.mark.parametrize("max_draft", [0, 1, 3, 7])
def test_state_rings_are_longer_by_the_draft(max_draft):
    layout = KVLayout.for_model(FLASH, max_draft=max_draft)
    assert layout.cache("csa_state").entries == layout.cache("index_state").entries == 8 + max_draft
    assert layout.cache("hca_state").entries == 128 + max_draft
    rows = {"csa_state": 8192, "index_state": 2048, "hca_state": 4096}  # bytes: kv | score, fp32
    assert {name: layout.cache(name).entry_bytes for name in rows} == rows
    assert layout.cache("csa_checkpoint").page_bytes == 4 * 8192
    assert layout.cache("index_checkpoint").page_bytes == 4 * 2048
    # Flash, from the checkpoint's definition: 4 rows of main and indexer state in each of 21 layers.
    assert layout.bytes_of("checkpoint") == 21 * 4 * (8192 + 2048)


@pytest.mark.parametrize(("model", "record", "index"), ALL, ids=NAMES)
def test_every_byte_of_a_page_has_one_owner_at_most(model, record, index):
    for cache in KVLayout.for_model(model, record, index, max_draft=3).caches:
        owners = np.zeros(cache.page_bytes, int)
        for part in cache.parts:
            offset, stride = cache.locate(part.name)
            for entry in range(cache.entries):
                start = offset + entry * stride
                assert start % part.dtype.itemsize == 0
                owners[start : start + part.nbytes] += 1
        used = cache.entries * cache.entry_bytes
        assert (owners[:used] == 1).all()  # no hole, nothing twice
        assert not owners[used:].any()
        assert cache.page_bytes % cache.page_align == 0
        assert cache.page_bytes - used < cache.page_align
        assert cache.page_bytes % 16 == 0


def test_v4_entries_lie_where_flashmla_reads_them():
    for entries in (1, 2, 64, 256):
        cache = Cache("kv", "full", 4, entries, *RECORDS["v4"], layers=(0,))
        assert cache.page_bytes == (entries * 584 + 575) // 576 * 576
        assert cache.locate("data") == (0, 576)
        assert cache.locate("rope") == (448, 576)
        assert cache.locate("scales") == (entries * 576, 8)
        assert not cache.interleaved


def test_interleaved_records_are_rows_of_whole_entries():
    cache = Cache("kv", "full", 1, 64, (Part("data", U8, (512,)), Part("scales", U8, (16,))), 528, (0,))
    assert cache.interleaved
    assert cache.page_bytes == 64 * 528
    assert cache.locate("scales") == (512, 528)


def test_parts_have_the_dtypes_kernels_read():
    csa = KVLayout.for_model(FLASH).cache("csa")
    assert {p.name: (p.dtype, p.shape) for p in csa.parts} == {
        "data": (U8, (448,)),
        "rope": (BF16, (64,)),
        "scales": (U8, (8,)),
    }
    assert csa.part("rope").nbytes == 128


def test_a_life_cycle_sums_its_caches():
    layout = KVLayout.for_model(FLASH)
    assert sum(layout.bytes_of(life) for life in LIVES) == sum(len(c.layers) * c.page_bytes for c in layout.caches)
    assert KVLayout("none", ()).bytes_of("full") == 0


GOOD = {
    "name": "kv",
    "life": "full",
    "ratio": 4,
    "entries": 64,
    "parts": (Part("data", U8, (64,)),),
    "page_align": 64,
    "layers": (0, 1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"life": "forever"}, "Cache 'kv': life = 'forever' is none of full, window, state, checkpoint"),
        ({"entries": 0}, "Cache 'kv': entries = 0 must be an integer from 1"),
        ({"ratio": 2.5}, "ratio = 2.5 must be an integer"),
        ({"page_align": 0}, "page_align = 0 must be"),
        ({"parts": ()}, "at least one part"),
        ({"parts": (Part("a", U8, (16,)), Part("a", U8, (16,)))}, "parts need names, each its own"),
        ({"parts": (Part("a", U8, (16,), 1), Part("b", U8, (16,)))}, "in the order of their segments"),
        ({"parts": (Part("a", U8, (3,)),), "entries": 3, "page_align": 1}, "a page has 9 B, no multiple of 16"),
        (
            {"parts": (Part("a", U8, (2,)), Part("b", F32, (1,)))},
            "part 'b' at byte 2, 6 B apart, is not aligned to its",
        ),
        ({"layers": (0, 0)}, r"layers = \(0, 0\) must be different"),
        ({"layers": (-1,)}, "not negative"),
    ],
)
def test_refuses_what_no_kernel_could_read(change, message):
    Cache(**GOOD)
    with pytest.raises(ArgumentError, match=message):
        Cache(**{**GOOD, **change})


def test_refuses_what_is_no_layout():
    with pytest.raises(ArgumentError, match=r"record = 'v5' is none of v4, split, v4\.1, v4\.1-fp4"):
        KVLayout.for_model(FLASH, "v5")
    with pytest.raises(ArgumentError, match="index = 'fp4' is none of nvfp4, mxfp4, fp8"):
        KVLayout.for_model(FLASH, index="fp4")
    with pytest.raises(ArgumentError, match="max_draft = -1 must be an integer from 0"):
        KVLayout.for_model(FLASH, max_draft=-1)
    with pytest.raises(ArgumentError, match=r"compress ratios \[2\]; 0, 4 and 128 are known"):
        KVLayout.for_model(dataclasses.replace(FLASH, compress_ratios=(0, 2)))
    with pytest.raises(ArgumentError, match="index keys 128; flash has 256, 64 and 128"):
        KVLayout.for_model(dataclasses.replace(FLASH, head_dim=256))
    layout = KVLayout.for_model(FLASH)
    with pytest.raises(ArgumentError, match="no cache 'swa'; there are csa, index, hca, window"):
        layout.cache("swa")
    with pytest.raises(ArgumentError, match="life = 'swa' is none of"):
        layout.bytes_of("swa")
    with pytest.raises(ArgumentError, match="csa: no part 'sf'; there are data, rope, scales"):
        layout.cache("csa").locate("sf")
    with pytest.raises(ArgumentError, match="two caches have one name"):
        KVLayout("twice", (layout.cache("csa"), layout.cache("csa")))
    lone = dataclasses.replace(layout.cache("csa_checkpoint"), layers=(2,))
    with pytest.raises(
        ArgumentError, match="'csa_checkpoint' keeps rows of 'csa_state', which must be of life 'state'"
    ):
        KVLayout("lone", (layout.cache("csa_state"), lone))
