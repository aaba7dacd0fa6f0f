"""Paged KV memory for DeepSeek-V4: layouts, page storage, block tables, sequences, prefix reuse. Imports no family."""

from dsv4_rt.errors import PoolError, PoolExhausted, PoolMisuse, SnapshotError, TooLong, UnknownSequence
from dsv4_rt.memory.admission import Need
from dsv4_rt.memory.layout import Cache, KVLayout, Part
from dsv4_rt.memory.pool import KVPool
from dsv4_rt.memory.stats import LifeStats, PoolStats

__all__ = [
    "Cache",
    "KVLayout",
    "KVPool",
    "LifeStats",
    "Need",
    "Part",
    "PoolError",
    "PoolExhausted",
    "PoolMisuse",
    "PoolStats",
    "SnapshotError",
    "TooLong",
    "UnknownSequence",
]
