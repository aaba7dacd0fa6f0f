"""What a pool says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LifeStats:
    """Pages or slots of one life cycle, the null page not counted: total = free + used + cached + fenced."""

    total: int
    free: int
    used: int
    cached: int  # idle, kept by the prefix cache, evictable
    fenced: int  # let go while steps were in flight that may still read them
    bytes_each: int


@dataclass(frozen=True)
class PoolStats:
    """What `KVPool.stats` returns; counters run since the pool was made."""

    full: LifeStats
    window: LifeStats
    state: LifeStats
    checkpoint: LifeStats
    sequences: int  # with a row
    preempted: int
    steps_in_flight: int
    tokens_queried: int
    tokens_hit: int
    tokens_lost: int  # on cached pages that matched a prompt, behind the last living checkpoint
    checkpoint_bytes: int  # living checkpoints: slots and the window pages they keep
    checkpoints_taken: int
    checkpoints_missed: int
    evictions: int
    checkpoint_evictions: int
    collisions: int
    copied_pages: int  # copies on write
    preemptions: int
