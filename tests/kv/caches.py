"""Caches in host memory for the tests of the kv kernels: pages with every byte known, and lists of what to gather."""

import ml_dtypes
import numpy as np

from dsv4_rt.kv import reference

BF16 = np.dtype(ml_dtypes.bfloat16)
PAGE_ALIGN = {"v4": 576, "split": 32}
ENTRY = {"v4": 584, "split": 580}


def page_bytes(record, entries):
    return -(-entries * ENTRY[record] // PAGE_ALIGN[record]) * PAGE_ALIGN[record]


def activations(rng, *shape):
    """Rows from 1e-6 to 1e5 in size, so that scales differ from token to token."""
    return (rng.standard_normal(shape) * np.exp(rng.uniform(-14, 12, (*shape[:-1], 1)))).astype(BF16)


def poisoned(P, record, entries):
    """Pages whose every byte reads as NaN: e4m3, ue8m0, bf16 and float32 alike; page 0 is zero."""
    pages = np.full((P, page_bytes(record, entries)), 0xFF, np.uint8)
    pages[0] = 0
    return pages


def filled(rng, P, record, entries):
    """Pages full of records, the null page zero; padding poisoned."""
    pages = poisoned(P, record, entries)
    slots = np.arange(entries, P * entries)
    return reference.append_kv(activations(rng, slots.size, 512), slots, pages, record, entries)


def same_bits(got, want):
    assert got.shape == want.shape
    assert np.array_equal(got.view(np.uint16), want.view(np.uint16))
