"""A pool as bytes, and back: sequences, prefix cache and the contents of all pages that are not free.

    magic | version u32 | header bytes u64 | header, JSON | arrays, one after the other | blake2b-256 of all that

Plain data, little endian: the header holds geometry, settings, counters and each array's name, dtype and shape. The
same history gives the same bytes, and a restored pool goes on as the original would have: ids, free lists, eviction.
Nothing is believed before the checksum holds, and the restored pool proves its invariants before it is handed out.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dsv4_rt.errors import PoolError, PoolMisuse, SnapshotError
from dsv4_rt.memory.layout import KVLayout
from dsv4_rt.memory.pages import FREE, NULL, Ints
from dsv4_rt.memory.prefix import DIGEST_BYTES, PAGE, PrefixStats
from dsv4_rt.memory.sequences import Parked, Text

if TYPE_CHECKING:
    from dsv4_rt.memory.pool import KVPool

MAGIC: Final = b"dsv4_rt KVPool\n"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<IQ")
_CHECKSUM: Final = 32

_ROWS: Final = (
    "id_of length high floor settled settled_high known flags first_window window_base full_base wake registered "
    "serial prompt_end"
).split()
_SETTINGS: Final = (
    "max_sequences max_length max_in_flight max_tokens max_draft checkpoint_every watermark steps_in_flight"
).split()


def geometry(layout: KVLayout) -> dict[str, Any]:
    """All that a layout says, as JSON has it: equal for layouts that mean the same memory."""
    caches = []
    for cache in layout.caches:
        parts = [[p.name, np.dtype(p.dtype).name, list(p.shape), p.segment] for p in cache.parts]
        sizes = [cache.name, cache.life, cache.ratio, cache.entries, cache.page_align, list(cache.layers)]
        caches.append([*sizes, cache.rows_of, parts])
    return {"name": layout.name, "caches": caches}


def dump(pool: KVPool) -> bytes:
    """See KVPool.snapshot."""
    if pool._open:
        raise PoolMisuse(f"snapshot: steps {pool._open} are in flight; end them first")
    if pool._copies or pool._step.count:
        raise PoolMisuse("snapshot: copies or tokens of a step wait for an upload; upload first")
    s, prefix, tables = pool._seqs, pool._prefix, pool._tables
    arrays: dict[str, Any] = {f"rows.{name}": getattr(s, name) for name in _ROWS}
    seated = np.flatnonzero(s.id_of).tolist()
    arrays["rows.tokens"] = _joined([s.tokens(row, 0, int(s.known[row])) for row in seated])
    arrays["rows.digests"] = _bytes([d for row in seated for d in s.text[row].digests])
    arrays["rows.digest_counts"] = np.array([len(s.text[row].digests) for row in seated], np.int64)
    arrays["rows.free"] = np.array(s._free_rows, np.int64)
    arrays["handles.row"] = s._handle_row
    arrays["handles.id"] = s._handle_id
    arrays["handles.last"] = np.array(s._last_id, np.int64)
    arrays["handles.free"] = np.array(s._free_handles, np.int64)
    arrays["parked.id"] = np.array(list(s.parked), np.int64)
    arrays["parked.counts"] = np.array([p.tokens.size for p in s.parked.values()], np.int64)
    arrays["parked.tokens"] = _joined([p.tokens for p in s.parked.values()])
    arrays["table.full"] = _joined([tables.full[row, : pool._ledger.held(row)[0]] for row in seated])
    arrays["table.window"], arrays["table.state"] = tables.window, tables.state
    for life, pages in pool._lives.items():
        for name in ("refs", "keep", "where"):
            arrays[f"{life}.{name}"] = getattr(pages, name)
        arrays[f"{life}.free"] = pages.stack[: pages.free]
        arrays[f"{life}.cached"] = pages.oldest_first()
    registered = np.fromiter(prefix.table.values(), np.int32, len(prefix.table))  # in their order: reset follows it
    arrays["prefix.pages"] = registered
    arrays["prefix.digests"] = _bytes(list(prefix.table))
    arrays["prefix.tokens"] = prefix.page_tokens[registered]
    for name in ("serial", "parent", "checkpoint_of", "page_of", "window_of", "holder"):
        arrays[f"prefix.{name}"] = getattr(prefix, name)
    for cache in pool.layout.caches:
        pages_there = _occupied(pool, cache.life)
        arrays[f"cache.{cache.name}"] = pool.device.numpy(
            pool.storage.array(cache.name)[:, pool.device.array(pages_there)]
        )
    header = {
        "geometry": geometry(pool.layout),
        "settings": {name: getattr(pool, name) for name in _SETTINGS},
        "counts": {life: pages.count for life, pages in pool._lives.items()},
        "namespaces": [s.text[row].namespace.hex() for row in seated],
        "parked": [p.namespace.hex() for p in s.parked.values()],
        "numbers": {
            "clock": prefix.clock,
            "epoch": pool._epoch,
            "copied_pages": pool._ledger.copied_pages,
            "preemptions": pool._preemptions,
        },
        "prefix": asdict(prefix.stats),
        "arrays": [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    blobs = [np.ascontiguousarray(a).tobytes() for a in arrays.values()]
    body = b"".join([MAGIC, _HEAD.pack(VERSION, len(text)), text, *blobs])
    return body + hashlib.blake2b(body, digest_size=_CHECKSUM).digest()


def parse(data: bytes, layout: KVLayout) -> tuple[dict[str, Any], dict[str, Ints]]:
    """(header, arrays by name) of a snapshot that is whole, of this version and of this layout; else SnapshotError."""
    start = len(MAGIC) + _HEAD.size
    if not isinstance(data, (bytes, bytearray, memoryview)) or bytes(data[: len(MAGIC)]) != MAGIC:
        raise SnapshotError("restore: this is no snapshot of a KVPool")
    if len(data) < start + _CHECKSUM:
        raise SnapshotError(f"restore: a snapshot of {len(data)} B is cut off")
    version, length = _HEAD.unpack(data[len(MAGIC) : start])
    if version != VERSION:
        raise SnapshotError(f"restore: the snapshot has version {version}; this package reads version {VERSION}")
    body = memoryview(data)[:-_CHECKSUM]
    if hashlib.blake2b(body, digest_size=_CHECKSUM).digest() != bytes(data[-_CHECKSUM:]):
        raise SnapshotError("restore: the snapshot is damaged or cut off: its checksum is another")
    header = json.loads(bytes(body[start : start + length]))
    if header["geometry"] != geometry(layout):
        raise SnapshotError(
            f"restore: the snapshot is of layout {header['geometry']['name']!r}, whose caches are not those of "
            f"{layout.name!r}; restore it with the layout it was made with"
        )
    arrays, at = {}, start + length
    for name, dtype, shape in header["arrays"]:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(body[at : at + size], dtype).reshape(shape)
        at += size
    return header, arrays


def load(pool: KVPool, header: dict[str, Any], arrays: dict[str, Ints]) -> None:
    """Fill a fresh pool of the snapshot's settings; see KVPool.restore."""
    s, prefix, tables, numbers = pool._seqs, pool._prefix, pool._tables, header["numbers"]
    for name in _ROWS:
        getattr(s, name)[:] = arrays[f"rows.{name}"]
    full, tokens, digests = (_pieces(arrays[name]) for name in ("table.full", "rows.tokens", "rows.digests"))
    tables.lengths[:] = s.length
    tables.window[:] = arrays["table.window"]
    tables.state[:] = arrays["table.state"]
    seated = np.flatnonzero(s.id_of).tolist()
    counts = arrays["rows.digest_counts"].tolist()
    for row, namespace, n in zip(seated, header["namespaces"], counts, strict=True):
        pages = pool._ledger.held(row)[0]
        tables.full[row, :pages] = full(pages)
        known = tokens(int(s.known[row]))
        whole = known.size // PAGE * PAGE
        s.text[row] = Text(bytes.fromhex(namespace), known[:whole].copy(), _digests(digests(n)))
        s.tail[row, : known.size - whole] = known[whole:]
    s._free_rows = arrays["rows.free"].tolist()
    s._handle_row, s._handle_id = arrays["handles.row"].copy(), arrays["handles.id"].copy()
    s._last_id, s._free_handles = arrays["handles.last"].tolist(), arrays["handles.free"].tolist()
    parked = _pieces(arrays["parked.tokens"])
    ids, sizes = arrays["parked.id"].tolist(), arrays["parked.counts"].tolist()
    for seq, size, namespace in zip(ids, sizes, header["parked"], strict=True):
        s.parked[seq] = Parked(parked(size).copy(), bytes.fromhex(namespace))
    for name in ("full", "window", "lengths", "state"):
        tables.mark_range(name, 0, getattr(tables, name).size)

    for life, p in pool._lives.items():
        free, cached = arrays[f"{life}.free"], arrays[f"{life}.cached"]
        for name in ("refs", "keep", "where"):
            getattr(p, name)[:] = arrays[f"{life}.{name}"]
        p.stack[: free.size] = free
        p.free, p.cached = free.size, cached.size
        p.restore_queue(cached)
    registered = arrays["prefix.pages"]
    for page, digest in zip(registered.tolist(), _digests(arrays["prefix.digests"]), strict=True):
        prefix.table[digest] = page
        prefix.digest_of[page] = digest
    prefix.page_tokens[registered] = arrays["prefix.tokens"]
    for name in ("serial", "parent", "checkpoint_of", "page_of", "window_of", "holder"):
        getattr(prefix, name)[:] = arrays[f"prefix.{name}"]
    prefix.clock, prefix.stats = numbers["clock"], PrefixStats(**header["prefix"])
    pool._epoch, pool._preemptions = numbers["epoch"], numbers["preemptions"]
    pool._ledger.copied_pages = numbers["copied_pages"]
    for cache in pool.layout.caches:
        pages_there = _occupied(pool, cache.life)
        contents = pool.device.array(arrays[f"cache.{cache.name}"])
        pool.storage.array(cache.name)[:, pool.device.array(pages_there)] = contents
    try:
        pool.upload()
        pool.check()
    except PoolError as error:
        raise SnapshotError(f"restore: the snapshot contradicts itself: {error}") from error


def _occupied(pool: KVPool, life: str) -> Ints:
    """int64: pages of a life cycle whose contents matter."""
    where = pool._lives[life].where
    return np.flatnonzero((where != FREE) & (where != NULL))


def _joined(pieces: list[Ints]) -> Ints:
    return np.concatenate([np.empty(0, np.int32), *pieces])


def _bytes(digests: list[bytes]) -> Ints:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def _digests(rows: Ints) -> list[bytes]:
    return [row.tobytes() for row in rows]


def _pieces(array: Ints) -> Any:
    """A function that returns the next n elements at each call."""
    at = 0

    def take(n: int) -> Ints:
        nonlocal at
        at += n
        piece: Ints = array[at - n : at]
        return piece

    return take
