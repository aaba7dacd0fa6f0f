"""End to end: tokens appended through KVPool in random chunks, forked and taken back, then gathered.

The oracle keeps a list of entries a sequence and knows nothing of pages, slots or tables.
"""

import dataclasses

import numpy as np
import pytest
from caches import activations, same_bits

from dsv4_rt import FLASH
from dsv4_rt.kv import reference
from dsv4_rt.kv.ops import append_index_keys, append_kv, compute_valid_lens, gather_kv
from dsv4_rt.memory import KVLayout, KVPool

RATIO = {"csa": 4, "hca": 128, "window": 1, "index": 4}
ENTRIES = {"csa": 64, "hca": 2, "window": 64}
WINDOW, DRAFT, CHUNK = 128, 3, 300


class Sequence:
    """What a sequence should hold: position -> entry, for every cache."""

    def __init__(self, length=0, entries=None):
        self.length = length
        self.entries = entries or {cache: [] for cache in RATIO}

    def fork(self):
        return Sequence(self.length, {cache: list(each) for cache, each in self.entries.items()})

    def append(self, cache, values):
        """values[i] is what position length + i writes, if it completes an entry."""
        ratio = RATIO[cache]
        self.entries[cache] += [v for i, v in enumerate(values) if (self.length + i + 1) % ratio == 0]

    def truncate(self, length):
        self.length = length
        for cache, entries in self.entries.items():
            del entries[length // RATIO[cache] :]


def layers_of(layout):
    return {cache.name: cache.layers[0] for cache in layout.caches}


def step(pool, rng, record, key, chosen):
    """Append random entries to the sequences of {id: (Sequence, tokens)}, in every cache."""
    ids = list(chosen)
    counts = [n for _, n in chosen.values()]
    pool.extend(ids, counts)
    total = pool.step_tokens
    assert total == sum(counts)
    pool.upload()
    layer = layers_of(pool.layout)
    for cache in RATIO:
        x = activations(rng, total, 128 if cache == "index" else 512)
        slots = pool.slot_mapping(cache)[:total]
        pages = pool.view(layer[cache], cache)
        if cache == "index":
            append_index_keys(pool.device.array(x), slots, pages, record=key)
        else:
            append_kv(pool.device.array(x), slots, pages, record=record, entries=ENTRIES[cache])
        at = 0
        for oracle, n in chosen.values():
            oracle.append(cache, x[at : at + n])
            at += n
    for oracle, n in chosen.values():
        oracle.length += n


def compare(pool, seq, oracle, record, key):
    """Everything the sequence can see, gathered and compared."""
    device, row, layer = pool.device, pool.row(seq), layers_of(pool.layout)
    assert pool.length(seq) == oracle.length
    width = device.numpy(pool.block_table("window")).shape[1]
    rows = device.array(np.array([row], np.int32))
    for cache, entries in ENTRIES.items():
        expected = oracle.entries[cache]
        index = np.arange(len(expected))
        if cache == "window":
            index = index[-WINDOW:]
            expected = expected[-WINDOW:]
            index = index // 64 % width * 64 + index % 64
        if not len(expected):
            continue
        table, pages = pool.block_table(cache), pool.view(layer[cache], cache)
        given = device.array(index[None].astype(np.int32))
        got = gather_kv(given, table, pages, record=record, entries=entries, row=rows)
        same_bits(device.numpy(got)[0], reference.decode(*reference.encode(np.stack(expected), record)))
        if cache != "window":
            last = device.array(np.array([oracle.length - 1], np.int32))
            lens = compute_valid_lens(last, table, RATIO[cache], entries=entries, row=rows)
            assert device.numpy(lens).tolist() == [len(expected)]
    keys = oracle.entries["index"]
    if keys:
        parts = {name: device.numpy(part) for name, part in pool.parts(layer["index"], "index").items()}
        page = device.numpy(pool.block_table("index"))[row, np.arange(len(keys)) // 64]
        data, scales = reference.encode_keys(reference.hadamard(np.stack(keys)), key)
        for name, want in (("data", data), ("scales", scales)):
            assert np.array_equal(parts[name][page, np.arange(len(keys)) % 64], want), name


@pytest.mark.parametrize(("record", "key"), [("v4", "nvfp4"), ("split", "mxfp4"), ("v4", "fp8")])
def test_appended_forked_and_taken_back(device, rng, record, key):
    layout = KVLayout.for_model(FLASH, record, key, max_draft=DRAFT)
    layout = KVLayout(layout.name, tuple(dataclasses.replace(c, layers=c.layers[:1]) for c in layout.caches))
    pool = KVPool(
        layout,
        pages=60,
        window_pages=80,
        checkpoints=4,
        max_sequences=6,
        max_length=4096,
        max_in_flight=CHUNK,
        max_tokens=6 * CHUNK,
        max_draft=DRAFT,
        device=device,
    )
    for cache in layout.caches:  # what nobody wrote reads as NaN
        pool.storage.array(cache.name)[:, 1:] = 0xFF
    live = {pool.create(): Sequence() for _ in range(3)}
    appended = forks = cuts = 0
    while appended < 3000 or not forks or not cuts:
        chosen = rng.choice(list(live), int(rng.integers(1, len(live) + 1)), replace=False).tolist()
        counts = rng.choice([1, 2, 5, 64, 127, CHUNK], len(chosen)).tolist()
        step(pool, rng, record, key, {seq: (live[seq], n) for seq, n in zip(chosen, counts, strict=True)})
        appended += sum(counts)
        seq = int(rng.choice(chosen))
        what = rng.random()
        if what < 0.3:
            back = min(int(rng.integers(1, DRAFT + 1)), counts[chosen.index(seq)])
            pool.truncate(seq, live[seq].length - back)
            live[seq].truncate(live[seq].length - back)
            cuts += 1
        elif what < 0.6:
            if len(live) == pool.max_sequences:
                gone = next(other for other in live if other != seq)
                pool.free(gone)
                del live[gone]
            live[pool.fork(seq)] = live[seq].fork()
            forks += 1
        pool.check()
    pool.upload()
    for seq, oracle in live.items():
        compare(pool, seq, oracle, record, key)
