"""Arguments of KVPool as the types it works with, or an error that says what came and what was wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv4_rt.checks import check_range
from dsv4_rt.device import Device
from dsv4_rt.errors import ArgumentError, PoolMisuse
from dsv4_rt.memory import admission
from dsv4_rt.memory.pages import Ints


def optional(name: str, value: int | None, least: int) -> int | None:
    return None if value is None else check_range("KVPool", name, value, least, 2**31 - 2)


def budget_bytes(budget: int | float | str | None, device: Device) -> int | None:
    """A budget as bytes: a number of them, or a share of what is free on the device."""
    if budget is None:
        return None
    if isinstance(budget, str):
        try:
            budget = float(budget)
        except ValueError:
            raise ArgumentError(f"KVPool: budget = {budget!r} is no number") from None
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ArgumentError(f"KVPool: budget = {budget} is no share of free memory, from above 0 to 1")
        return int(budget * admission.free_memory(device))
    return check_range("KVPool", "budget", budget, 1, 2**62)


def as_namespace(namespace: Any, what: str) -> bytes:
    if isinstance(namespace, bytes):
        return namespace
    raise PoolMisuse(f"{what}: namespace is {type(namespace).__name__}; bytes are wanted")


def as_array(x: Any, what: str, name: str) -> Ints:
    """What NumPy makes of an argument, or PoolMisuse where it can make nothing of it."""
    try:
        return np.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:  # lists of unequal lengths, arrays of a GPU
        raise PoolMisuse(f"{what}: {name} are {type(x).__name__}, of which NumPy says: {error}") from None


def as_id(seq: Any, what: str) -> int:
    if isinstance(seq, (int, np.integer)) and not isinstance(seq, bool):
        return int(seq)
    raise PoolMisuse(f"{what}: a sequence id is an integer, not {type(seq).__name__}")


def as_ids(seqs: Any, what: str) -> Ints:
    """An id or a batch of ids as int64 [N]."""
    if type(seqs) is np.ndarray and seqs.dtype == np.int64 and seqs.ndim == 1:
        return seqs
    array = as_array(seqs, what, "sequence ids")
    if array.size == 0 and isinstance(seqs, Sequence):
        return np.empty(0, np.int64)
    if array.ndim > 1 or array.dtype.kind not in "iu":
        raise PoolMisuse(f"{what}: sequence ids are {array.dtype} {array.shape}; integers are wanted")
    return array.reshape(-1).astype(np.int64)


def as_counts(counts: Any, n: int, what: str = "extend", name: str = "counts") -> Ints:
    """One number for all, or one each, as int64 [n]."""
    array = as_array(counts, what, name)
    if array.size == 0 and n == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim > 1 or (array.ndim and array.size != n):
        raise PoolMisuse(f"{what}: {name} are {array.dtype} {array.shape} for {n} sequences; integers, one each")
    if array.size and (int(array.min()) < -(2**31) or int(array.max()) >= 2**31):
        raise PoolMisuse(f"{what}: {name} from {array.min()} to {array.max()} are out of range")
    return np.broadcast_to(array.astype(np.int64), (n,))


def as_count(counts: Any) -> int:
    """What `extend` is given for one sequence."""
    if counts is None:
        return 1
    if type(counts) is list and len(counts) == 1:
        counts = counts[0]
    return counts if type(counts) is int else int(as_counts(counts, 1)[0])
