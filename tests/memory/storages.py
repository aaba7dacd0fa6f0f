"""Small storages with every byte known, and a stream kept busy: for the tests of what runs on a device."""

import dataclasses
from pathlib import Path

import numpy as np

from dsv4_rt import FLASH
from dsv4_rt.launch import load
from dsv4_rt.memory.layout import KVLayout
from dsv4_rt.memory.storage import Storage

COUNTS = {"full": 7, "window": 6, "state": 5, "checkpoint": 6}


def few_layers(layout, layers=2):
    """The layout with the first layers of every cache only."""
    return KVLayout(layout.name, tuple(dataclasses.replace(c, layers=c.layers[:layers]) for c in layout.caches))


def filled(device, rng, record="v4", index="nvfp4", max_draft=0, layers=2, counts=COUNTS):
    """A storage with random bytes in every page but the null pages, and copies of its arrays."""
    storage = Storage(few_layers(KVLayout.for_model(FLASH, record, index, max_draft), layers), device, counts)
    for name in storage.layout.names:
        array = storage.array(name)
        array[:, 1:] = device.array(rng.integers(0, 256, array[:, 1:].shape, dtype=np.uint8))
    return storage, contents(storage)


def contents(storage):
    return {name: storage.device.numpy(storage.array(name)) for name in storage.layout.names}


def assert_same(storage, want):
    for name, now in contents(storage).items():
        wrong = np.argwhere(now != want[name])
        assert not wrong.size, f"{name}: {len(wrong)} bytes differ, first at [layer, page, byte] {wrong[0].tolist()}"


def keep_busy(device, stream, milliseconds=100):
    """Occupy a stream: what is enqueued behind this has to wait."""
    busy = load(str(Path(__file__).with_name("busy.cu")), "busy", device)
    busy.prepare(1, 1, np.int64(milliseconds * 1_000_000))(stream.ptr)
