"""The disk cache of compiled kernels: one file an entry, named by the hash of everything that made it.

An entry holds code, so a directory or an entry that somebody else could have written is never read, and reading one
executes nothing. Losing a cache costs a compile, so no failure of the disk is an error: an entry that is missing,
truncated or changed is compiled again, and an entry that cannot be written is not.

An entry is a line with the SHA-256 of the rest, a line of JSON with the lengths and the compiler, and then the PTX, the
cubin and the log. It appears under its name by an atomic rename: several processes may compile the same kernel at once,
the last one's entry stays, each uses what it compiled itself. Nothing is locked, so a network file system will do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1  # of an entry and of what goes into its key: raised when either changes

_SUFFIX = ".dsv4k"
_PARTIAL = ".partial-"
_TOTALS = ("hits", "misses")

_counts = dict.fromkeys(_TOTALS, 0)
_counts_lock = threading.Lock()


@dataclass(frozen=True)
class Entry:
    """What one compilation made: all that cannot be derived from it again without the compiler."""

    compiler: str
    lowered: Mapping[str, str]  # name expression -> lowered name
    ptx: bytes
    cubin: bytes
    log: bytes


@dataclass(frozen=True)
class CacheInfo:
    """State of the disk cache.

    directory: where entries lie, None where no place can be named.
    entries, bytes: how many there are and their size.
    hits, misses: of this process. A hit was read from disk, a miss was compiled; asking again for what the process
        already has is neither.
    total_hits, total_misses: of all processes since the directory was last cleared, as far as they could be written.
    writable: new entries can be kept.
    problem: why the cache is not used as it should be, "" if it is.
    """

    directory: Path | None
    entries: int
    bytes: int
    hits: int
    misses: int
    total_hits: int
    total_misses: int
    writable: bool
    problem: str = ""


def enabled() -> bool:
    """False if DSV4_RT_CACHE=0 turns the disk cache off."""
    return os.environ.get("DSV4_RT_CACHE", "").strip().lower() not in ("0", "off", "no", "false")


def directory() -> Path | None:
    """$DSV4_RT_CACHE_DIR, else $XDG_CACHE_HOME/dsv4_rt, else ~/.cache/dsv4_rt; None if there is no home directory."""
    try:
        if own := os.environ.get("DSV4_RT_CACHE_DIR"):
            return Path(own).expanduser().absolute()
        if base := os.environ.get("XDG_CACHE_HOME"):
            return Path(base).expanduser().absolute() / "dsv4_rt"
        return Path.home() / ".cache" / "dsv4_rt"
    except RuntimeError:
        return None


def load(key: str) -> Entry | None:
    """The entry of a key, None where there is none that can be trusted. Counts a hit, never a miss."""
    place = directory()
    if place is None or _problem(place):
        return None
    data = _read_private(place / (key + _SUFFIX))
    entry = None if data is None else _unpack(key, data)
    if entry is not None:
        _count("hits", place)
    return entry


def store(key: str, entry: Entry) -> bool:
    """Keep an entry, if the disk will; True if it did. Counts a miss."""
    place = directory()
    usable = place is not None and _create(place) and not _problem(place)
    _count("misses", place if usable else None)
    if place is None or not usable:
        return False
    partial = None
    try:
        handle, partial = tempfile.mkstemp(prefix=_PARTIAL, dir=place)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(_pack(key, entry))
        os.replace(partial, place / (key + _SUFFIX))
    except OSError:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
        return False
    return True


def count_uncached() -> None:
    """Count a compilation that the disk was not asked about."""
    _count("misses", None)


def cache_info() -> CacheInfo:
    """Where the disk cache is, what it holds, how often it helped. Makes the directory, to say if that is possible."""
    place = directory()
    sizes: list[int] = []
    if place is None:
        problem = "there is no home directory; set DSV4_RT_CACHE_DIR"
    else:
        problem = _problem(place)
        with contextlib.suppress(OSError):
            sizes = [item.stat().st_size for item in _files(place) if item.name.endswith(_SUFFIX)]
    if not enabled():
        problem = "turned off by DSV4_RT_CACHE=0"
    writable = place is not None and not problem and _create(place) and _can_write(place)
    if not writable and not problem:
        problem = f"{place} cannot be written"
    with _counts_lock:
        hits, misses = _counts["hits"], _counts["misses"]
    return CacheInfo(
        place, len(sizes), sum(sizes), hits, misses, _total(place, "hits"), _total(place, "misses"), writable, problem
    )


def cache_clear() -> int:
    """Remove all entries, what interrupted writes left, and the totals; return how many entries were removed."""
    place = directory()
    removed = 0
    if place is None or _problem(place):
        return removed
    with contextlib.suppress(OSError):
        for item in list(_files(place)):
            if not item.name.endswith(_SUFFIX) and not item.name.startswith(_PARTIAL) and item.name not in _TOTALS:
                continue
            with contextlib.suppress(OSError):
                os.unlink(item.path)
                removed += item.name.endswith(_SUFFIX)
    return removed


def _problem(place: Path) -> str:
    """Why nothing may be loaded from a directory, "" if it may. A directory that is not there yet is no problem."""
    try:
        status = os.stat(place)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{place}: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{place} is not a directory"
    if status.st_uid != os.geteuid():
        return f"{place} belongs to user {status.st_uid}, not to {os.geteuid()}"
    if status.st_mode & 0o022:
        return f"{place} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}); chmod 700 makes it usable"
    return ""


def _create(place: Path) -> bool:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return False
    return True


def _can_write(place: Path) -> bool:
    """Whether a file can be made; permissions alone do not tell on a read-only or a full disk."""
    try:
        with tempfile.TemporaryFile(dir=place):
            return True
    except OSError:
        return False


def _read_private(path: Path) -> bytes | None:
    """The bytes of a regular file of this user that nobody else can write, else None."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        try:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            return file.read()
        except OSError:
            return None


def _pack(key: str, entry: Entry) -> bytes:
    parts = [entry.ptx, entry.cubin, entry.log]
    header = {
        "format": FORMAT,
        "key": key,
        "compiler": entry.compiler,
        "lowered": dict(entry.lowered),
        "lengths": [len(part) for part in parts],
    }
    body = json.dumps(header).encode() + b"\n" + b"".join(parts)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _unpack(key: str, data: bytes) -> Entry | None:
    """The entry, or None if one bit of it is not as it was written."""
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        text, _, payload = body.partition(b"\n")
        header = json.loads(text)
        if header["format"] != FORMAT or header["key"] != key or sum(header["lengths"]) != len(payload):
            return None
        ptx, cubin, _ = header["lengths"]
        return Entry(
            compiler=header["compiler"],
            lowered=header["lowered"],
            ptx=payload[:ptx],
            cubin=payload[ptx : ptx + cubin],
            log=payload[ptx + cubin :],
        )
    except (ValueError, KeyError, TypeError):
        return None


def _files(place: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(place) as items:
        yield from items


def _count(total: str, place: Path | None) -> None:
    """Count here and, in a file that grows by a byte each time, over all processes: no lock, no lost update."""
    with _counts_lock:
        _counts[total] += 1
    if place is None:
        return
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(place / total, flags, 0o600)
        try:
            os.write(handle, b".")
        finally:
            os.close(handle)


def _total(place: Path | None, total: str) -> int:
    try:
        return 0 if place is None else (place / total).stat().st_size
    except OSError:
        return 0
