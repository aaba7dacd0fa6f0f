"""Launchers of the pool's own kernels: docstring, checks, tuning, launch. The kernels are in kernels/memory/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsv4_rt.arrays import I32, U8, View, device_holding, stream_handle, view
from dsv4_rt.checks import Arg, check_range, match
from dsv4_rt.device import Device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.launch import POINTER, Prepared, load
from dsv4_rt.memory.staging import Staging
from dsv4_rt.operation import Instance

LANES = 32


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def grid(blocks: int) -> int:
    """`blocks` rounded up by less than an eighth: so few different grids that every one stays prepared."""
    step = 1 << max(blocks.bit_length() - 4, 0)
    return _ceil(blocks, step) * step


# ----------------------------------------------------------------------------------------------- upload_deltas

UPLOAD_DELTAS = "memory/upload_deltas.cu"
UPLOAD_DELTAS_WARPS = 4
CHUNK: Final = 128  # words of a run that one warp writes


def runs_start(chunks: int, singles: int) -> int:
    """The word of a message at which its runs begin: heads and pairs before them, rounded up to 128 B."""
    return _ceil(2 * (chunks + singles), LANES) * LANES


def upload_deltas(tables: Any, message: Any, chunks: int, singles: int, *, stream: Any = None) -> None:
    """Write changed words of the host's tables into the device's, all tables in one launch.

        tables[head[c].word + i] = run[c][i]           i < head[c].count <= 128, chunks c of runs of neighbours
        tables[pair[s].word]     = pair[s].value       words alone

    A word outside the tables is skipped; two values for one word are the caller's to avoid.

    Args:
        tables: [words] int32, written.
        message: [length] int32, 8 B aligned, at least runs_start(chunks, singles) + 128 chunks long: C heads
            (word, count), S pairs (word, value), from runs_start on C runs of 128 words. Pinned host memory that stays
            as it is until the launch has ended, or device memory.
        chunks: C.
        singles: S.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.

    Raises:
        ArgumentError: a shape, dtype, layout or place is not the one above; the message is too short.

    Traffic: reads 8 (C + S) + 512 C B of host memory over PCIe, writes as many words as changed.
    """
    chunks = check_range("upload_deltas", "chunks", chunks, 0, 2**31 - 1)
    singles = check_range("upload_deltas", "singles", singles, 0, 2**31 - 1)
    target, source = view(tables), view(message)
    on = device_holding(target, "upload_deltas: tables")
    here = source
    if on.kind == "cuda" and source.device == "host":
        import cupy

        if cupy.cuda.runtime.pointerGetAttributes(source.ptr).type != cupy.cuda.runtime.memoryTypeHost:
            raise ArgumentError(
                "upload_deltas: message is in pageable host memory, which a kernel cannot read; use pinned memory "
                "(cupy.cuda.alloc_pinned_memory) or device memory"
            )
        here = View(source.ptr, source.shape, source.strides, source.dtype, target.device, target.index, False)
    sizes = match(
        "upload_deltas",
        tables=Arg(target, "words", I32, output=True),
        message=Arg(here, "length", I32, align=8),
    )
    need = runs_start(chunks, singles) + CHUNK * chunks
    if sizes["length"] < need:
        raise ArgumentError(
            f"upload_deltas: message has {sizes['length']} words; {chunks} chunks and {singles} singles need {need}"
        )
    if chunks or singles:
        handle = on.current_stream() if stream is None else stream_handle(stream)
        views = (target, source) if on.kind == "emulator" else ()
        prepare_upload_deltas(on, upload_deltas_grid(chunks, singles)).launch(
            (target.ptr, source.ptr, sizes["words"], chunks, singles), handle, views
        )


def upload_deltas_grid(chunks: int, singles: int) -> int:
    """Blocks for a message."""
    return grid(_ceil(chunks + _ceil(singles, LANES), UPLOAD_DELTAS_WARPS))


def prepare_upload_deltas(device: Device, blocks: int) -> Prepared:
    """The launch behind `upload_deltas`, unchecked: addresses of tables and message, then words, chunks, singles.

    The three sizes have 64 bits, as pointers do, and are written like them: they change from launch to launch.
    """
    name = f"upload_deltas<{UPLOAD_DELTAS_WARPS}>"
    return load(UPLOAD_DELTAS, name, device).prepare(blocks, LANES * UPLOAD_DELTAS_WARPS, *(POINTER,) * 5)


# -------------------------------------------------------------------------------------------------- copy_pages

COPY_PAGES = "memory/copy_pages.cu"
# Warps a block, words a tile. bench/results/h200-copy-pages-tiles.txt, H200: 512 pages take the same time with 4 to 16
# words a lane and 4 to 16 warps, one page 3.1 us with 4 and 4, 3.4 with 8 and 8, 5.2 with 16 and 16.
COPY_PAGES_WARPS = 4
KINDS: Final = 6  # kinds of record a launch can take
WORD: Final = 16  # bytes
TILE_WORDS: Final = 128  # at most: 4 words a lane
LINE_WORDS: Final = 8  # words of a cache line: tiles end at one

_TILE = np.dtype(
    [
        ("source", np.uint64),
        ("target", np.uint64),
        ("source_page", np.uint32),
        ("target_page", np.uint32),
        ("row", np.uint32),
        ("words", np.uint32),
    ]
)


@dataclass(frozen=True)
class Piece:
    """What one kind of record moves in one cache: `nbytes` of a page or row, in every layer.

    source, target: [layers, pages, page bytes] uint8, contiguous, 16 B aligned; they may be the same array.
    row: bytes from row to row within a page; 0 where whole pages move.
    """

    source: Any
    target: Any
    nbytes: int
    row: int = 0


_NO_RECORDS: Final = np.empty((0, 4), np.int32)


class CopyPages:
    """Copies of pages, all caches and layers of every kind of record in one launch.

        target[l, to_page, to_row * row + b] = source[l, from_page, from_row * row + b]      b < nbytes, every layer l

    for every record (from_page, to_page, from_row, to_row) of a kind and every piece of that kind.

    Args:
        device: where the arrays are.
        kinds: the pieces of each kind of record, by name; at most 6 kinds.
        staging: buffers that records travel in.

    Raises:
        ArgumentError: more kinds, or arrays that are not as `Piece` says.
    """

    def __init__(self, device: Device, kinds: Mapping[str, Sequence[Piece]], staging: Staging) -> None:
        if len(kinds) > KINDS:
            raise ArgumentError(f"copy_pages: {len(kinds)} kinds of record, at most {KINDS}")
        self._device = device
        self._staging = staging
        self._kinds = tuple(kinds)
        self._pieces = tuple(tuple(pieces) for pieces in kinds.values())  # keeps the arrays alive
        tables = [_tiles(name, pieces) for name, pieces in zip(self._kinds, self._pieces, strict=True)]
        self._counts = [len(table) for table in tables]
        self._first = [sum(self._counts[:i]) for i in range(len(tables))]
        self._limits = [_limits(pieces) for pieces in self._pieces]
        flat = np.concatenate([np.zeros(0, _TILE), *tables])
        self._table = device.array(flat.view(np.int32))
        device.synchronize()  # launches may be on any stream
        self.tiles = view(self._table).ptr  # address of the table of tiles
        self._ready: dict[int, Prepared] = {}  # by grid
        self._record_bytes = [sum(view(p.source).shape[0] * p.nbytes for p in pieces) for pieces in self._pieces]

    def __call__(self, records: Mapping[str, NDArray[np.int32]], stream: int) -> int:
        """Copy; no page may be written twice, or read and written, by the records of one call.

        Args:
            records: int32 [n, 4] by kind: from page, to page, from row, to row.
            stream: handle of the stream. Never synchronises, unless every staging buffer is still being read.

        Returns:
            Bytes copied.

        Raises:
            ArgumentError: an unknown kind, another shape or dtype, no such page or row; nothing is copied.
        """
        message, warps = self.message(records)
        if not warps:
            return 0
        buffer = self._staging.take(message.size)
        buffer.words[: message.size] = message.reshape(-1)
        blocks = grid(_ceil(warps, COPY_PAGES_WARPS))
        ready = self._ready.get(blocks)
        if ready is None:
            ready = self._ready[blocks] = prepare_copy_pages(self._device, blocks)
        buffer.begin()
        ready.launch((self.tiles, buffer.on_device(message.size, stream), warps), stream)
        self._staging.sent(buffer, stream)
        return sum(len(rows) * self._record_bytes[self._kinds.index(name)] for name, rows in records.items())

    def message(self, records: Mapping[str, NDArray[np.int32]]) -> tuple[NDArray[np.int32], int]:
        """The kernel's message for these records, int32 [6 + records, 4], and its warps; 0: nothing to do."""
        given = [self._checked(name, records.get(name)) for name in self._kinds]
        unknown = set(records) - set(self._kinds)
        if unknown:
            raise ArgumentError(f"copy_pages: no kind {sorted(unknown)}; there are {', '.join(self._kinds)}")
        warps = sum(len(rows) * tiles for rows, tiles in zip(given, self._counts, strict=True))
        if warps >= 2**31:
            raise ArgumentError(f"copy_pages: {warps} pieces of 2 KiB in one call, at most 2^31 - 1; copy in parts")
        message = np.empty((KINDS + sum(map(len, given)), 4), np.int32)
        segments, end, at = [], 0, 0
        for rows, tiles, first in zip(given, self._counts, self._first, strict=True):
            end += len(rows) * tiles
            segments.append((end, max(tiles, 1), first, at))
            if len(rows):
                message[KINDS + at : KINDS + at + len(rows)] = rows
                at += len(rows)
        segments += [(end, 1, 0, 0)] * (KINDS - len(given))
        message[:KINDS] = segments
        return message, warps

    def _checked(self, name: str, rows: NDArray[np.int32] | None) -> NDArray[np.int32]:
        if rows is None:
            return _NO_RECORDS
        if not isinstance(rows, np.ndarray) or rows.dtype != I32 or rows.ndim != 2 or rows.shape[1] != 4:
            what = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
            raise ArgumentError(f"copy_pages: records of {name!r} are {what}; a NumPy int32 [n, 4] is wanted")
        limits = self._limits[self._kinds.index(name)]
        if len(rows) and limits is not None:
            bad = rows.view(np.uint32) >= limits  # a negative number is a huge one
            if bad.any():
                first = rows[bad.any(axis=1)][0].tolist()
                raise ArgumentError(
                    f"copy_pages: record {first} of {name!r} (from page, to page, from row, to row) must be below "
                    f"{limits.tolist()} and not negative"
                )
        return rows


def _limits(pieces: Sequence[Piece]) -> NDArray[np.int64] | None:
    """What page and row numbers of a record must be below."""
    if not pieces:
        return None
    below = []
    for piece in pieces:
        source, target = view(piece.source).shape, view(piece.target).shape
        rows = [(shape[2] - piece.nbytes) // piece.row + 1 if piece.row else 1 for shape in (source, target)]
        below.append([source[1], target[1], *rows])
    least: NDArray[np.int64] = np.array(below, np.int64).min(axis=0)
    return least


def _tiles(kind: str, pieces: Sequence[Piece]) -> NDArray[Any]:
    """The pieces of a kind of record, cut to what a warp moves."""
    tables = [np.empty(0, _TILE)]
    for piece in pieces:
        source, target = view(piece.source), view(piece.target)
        sizes = match(
            f"copy_pages, kind {kind}",
            source=Arg(source, "layers pages bytes", U8, align=WORD),
            target=Arg(target, "layers targets target_bytes", U8, align=WORD, output=True),
        )
        strides = (sizes["bytes"], sizes["target_bytes"], piece.nbytes, piece.row)
        if any(n % WORD for n in strides) or not 0 < piece.nbytes <= min(strides[:2]) or max(strides) >= 2**32:
            raise ArgumentError(
                f"copy_pages, kind {kind}: pages of {strides[0]} and {strides[1]} B, {piece.nbytes} B moved, rows of "
                f"{piece.row} B must be multiples of {WORD} B that fit into a page below 4 GiB"
            )
        words = piece.nbytes // WORD
        each = _ceil(_ceil(words, _ceil(words, TILE_WORDS)), LINE_WORDS) * LINE_WORDS
        start = np.arange(0, words, each, dtype=np.uint64)
        layer = np.arange(sizes["layers"], dtype=np.uint64)[:, None]
        table = np.empty((sizes["layers"], start.size), _TILE)
        for name, v in (("source", source), ("target", target)):
            table[name] = np.uint64(v.ptr) + layer * np.uint64(v.shape[1] * v.shape[2]) + start * np.uint64(WORD)
        table["source_page"], table["target_page"], table["row"] = sizes["bytes"], sizes["target_bytes"], piece.row
        table["words"] = np.minimum(each, words - start.astype(np.int64))
        tables.append(table.reshape(-1))
    return np.concatenate(tables)


def prepare_copy_pages(device: Device, blocks: int) -> Prepared:
    """The launch behind `CopyPages`, unchecked: addresses of tiles and message, then the warps, of 64 bits too."""
    name = f"copy_pages<{COPY_PAGES_WARPS}>"
    return load(COPY_PAGES, name, device).prepare(blocks, LANES * COPY_PAGES_WARPS, *(POINTER,) * 3)


# Registers: an SM should hold 64 warps of the one and 48 of the other.
INSTANCES = (
    Instance(UPLOAD_DELTAS, f"upload_deltas<{UPLOAD_DELTAS_WARPS}>", 32),
    Instance(COPY_PAGES, f"copy_pages<{COPY_PAGES_WARPS}>", 40),
)
