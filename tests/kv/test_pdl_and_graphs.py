"""The kv kernels one after another: early starts, and inside a CUDA graph replayed over new data."""

import numpy as np
import pytest
from caches import BF16, activations, poisoned, same_bits

from dsv4_rt.kv import reference
from dsv4_rt.kv.ops import (
    INDEX_KEYS,
    append_index_keys,
    append_kv,
    compute_valid_lens,
    gather_kv,
    gather_kv_slots,
)

T, K, P, B, BLOCKS = 192, 64, 40, 5, 30


class Step:
    """Appends, and gathers that read what was appended; every launch needs the one before it to have finished."""

    def __init__(self, device, record, key):
        self.device, self.record, self.key = device, record, key
        self.x = device.array(np.zeros((T, 512), BF16))
        self.keys = device.array(np.zeros((T, 128), BF16))
        self.slots = device.array(np.zeros(T, np.int64))
        self.table = device.array(np.zeros((B, BLOCKS), np.int32))
        self.row = device.array(np.zeros(T, np.int32))
        self.positions = device.array(np.zeros(T, np.int32))
        self.index = device.array(np.zeros((T, K), np.int32))
        self.pages = device.array(poisoned(P, record, 64))
        self.key_pages = device.array(np.full((P, -(-64 * INDEX_KEYS[key][1] // 576) * 576), 0xFF, np.uint8))
        self.dense = device.array(np.full((T, K, 512), np.nan, BF16))
        self.own = device.array(np.full((T, 1, 512), np.nan, BF16))
        self.lens = device.array(np.full(T, -7, np.int32))

    def fill(self, rng):
        def put(to, values):
            to[...] = self.device.array(np.ascontiguousarray(values))

        self.host = {
            "x": activations(rng, T, 512),
            "keys": activations(rng, T, 128),
            "slots": rng.permutation(np.arange(64, P * 64))[:T],
            "table": rng.integers(1, P, (B, BLOCKS)).astype(np.int32),
            "row": rng.integers(0, B, T).astype(np.int32),
            "positions": rng.integers(-1, 4 * 64 * BLOCKS, T).astype(np.int32),
            "index": rng.integers(-1, 64 * BLOCKS, (T, K)).astype(np.int32),
        }
        for name, values in self.host.items():
            put(getattr(self, name), values)
        self.before = self.device.numpy(self.pages).copy(), self.device.numpy(self.key_pages).copy()

    def run(self, pdl):
        append_kv(self.x, self.slots, self.pages, record=self.record, pdl=pdl)
        given = {"record": self.record, "pdl": pdl}
        gather_kv(self.index, self.table, self.pages, row=self.row, out=self.dense, **given)
        gather_kv_slots(self.slots[:, None], self.pages, out=self.own, **given)
        append_index_keys(self.keys, self.slots, self.key_pages, record=self.key, pdl=pdl)
        compute_valid_lens(self.positions, self.table, 4, row=self.row, out=self.lens, pdl=pdl)

    def check(self):
        h, numpy = self.host, self.device.numpy
        pages = reference.append_kv(h["x"], h["slots"], self.before[0], self.record)
        assert np.array_equal(numpy(self.pages), pages)
        same_bits(numpy(self.dense), reference.gather_kv(h["index"], h["table"], pages, self.record, 64, h["row"]))
        same_bits(numpy(self.own), reference.gather_kv_slots(h["slots"][:, None], pages, self.record))
        keys = reference.append_index_keys(h["keys"], h["slots"], self.before[1], self.key)
        assert np.array_equal(numpy(self.key_pages), keys)
        lens = reference.compute_valid_lens(h["positions"], h["table"], 4, 64, h["row"])
        assert np.array_equal(numpy(self.lens), lens)


pairs = pytest.mark.parametrize(("record", "key"), [("v4", "nvfp4"), ("split", "mxfp4"), ("v4", "fp8")])


@pytest.mark.gpu
@pairs
@pytest.mark.parametrize("pdl", [False, True])
def test_one_after_another(gpu, rng, record, key, pdl):
    step = Step(gpu, record, key)
    for _ in range(5):
        step.fill(rng)
        step.run(pdl)
        step.check()


@pytest.mark.gpu
@pairs
@pytest.mark.parametrize("pdl", [False, True])
def test_captured_and_replayed_over_new_data(gpu, rng, record, key, pdl):
    import cupy

    step = Step(gpu, record, key)
    step.fill(rng)
    step.run(pdl)  # compiles and loads
    gpu.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        step.run(pdl)
        graph = stream.end_capture()
    for _ in range(5):
        step.fill(rng)
        gpu.synchronize()
        graph.launch(stream)
        stream.synchronize()
        step.check()
