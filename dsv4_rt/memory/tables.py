"""Block tables, lengths and slot mappings: host mirrors, their copies on a device, and uploads of what changed.

All tables lie in one arena of int32 words, on the host and, at the same places, on the device: one kernel writes all
of them, and a word's place on the device is its place in the mirror. A change is made in a mirror and marked; `upload`
stages the marked words, as they are then, and launches kernels/memory/upload_deltas.cu. The addresses on the device
never change: a captured graph reads what the latest upload before its replay wrote.

    full        int32 [B, max_blocks]       pages of the life cycle `full`; 0 past a sequence's end
    window      int32 [B, window_width]     ring of window pages; 0 where there is none
    lengths     int32 [B]                   tokens
    state       int32 [B]                   state slots; 0 without one
    slots.NAME  int64 [max_tokens]          where each token of a step goes in cache NAME; -1 nowhere
    token_rows  int32 [max_tokens]          the row of each token of a step
    positions   int32 [max_tokens]          its position; -1 past the step's tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsv4_rt.arrays import I32, I64, view
from dsv4_rt.checks import check_range
from dsv4_rt.device import Device
from dsv4_rt.device import device as current_device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.launch import Prepared
from dsv4_rt.memory.ops import CHUNK, prepare_upload_deltas, runs_start, upload_deltas_grid
from dsv4_rt.memory.staging import Buffer, Staging, resolve_stream

TABLE_ALIGN: Final = 32  # words: every table begins at a multiple of 128 B
SHORT_RUN: Final = 32  # words: a shorter run travels as words alone, 8 B each, instead of as a chunk of 512 B

_UNSIGNED: Final[dict[np.dtype[Any], np.dtype[Any]]] = {I32: np.dtype(np.uint32), I64: np.dtype(np.uint64)}

I32Array = NDArray[np.int32]
I64Array = NDArray[np.int64]


class Tables:
    """Device tables of at most `max_sequences` rows and `max_tokens` tokens a step. One writer at a time.

    Args:
        device: where; None is the current device.
        max_sequences: rows B.
        max_blocks: pages a row of `full`.
        window_width: columns of `window`.
        max_tokens: tokens a step.
        caches: names of the caches that have a slot mapping.
        steps_in_flight: uploads that may be on their way before one waits.

    Raises:
        ArgumentError: a size that is not positive, or tables of 2^31 words or more.
    """

    def __init__(
        self,
        device: Device | None,
        max_sequences: int,
        max_blocks: int,
        window_width: int,
        max_tokens: int,
        caches: Sequence[str],
        steps_in_flight: int = 2,
    ) -> None:
        self._device = device or current_device()
        sizes = {
            "max_sequences": max_sequences,
            "max_blocks": max_blocks,
            "window_width": window_width,
            "max_tokens": max_tokens,
        }
        for name, value in sizes.items():
            check_range("Tables", name, value, 1, 2**31 - 1)
        B = max_sequences
        shapes: list[tuple[str, tuple[int, ...], np.dtype[Any], int]] = [
            *((f"slots.{name}", (max_tokens,), I64, -1) for name in caches),
            ("full", (B, max_blocks), I32, 0),
            ("window", (B, window_width), I32, 0),
            ("lengths", (B,), I32, 0),
            ("state", (B,), I32, 0),
            ("token_rows", (max_tokens,), I32, 0),
            ("positions", (max_tokens,), I32, -1),
        ]
        # name -> (first word, words an element, elements)
        self._where: dict[str, tuple[int, int, int]] = {}
        words = 0
        for name, shape, dtype, _ in shapes:
            width, count = dtype.itemsize // 4, int(np.prod(shape, dtype=np.int64))
            self._where[name] = (words, width, count)
            words += -(-width * count // TABLE_ALIGN) * TABLE_ALIGN
        if words >= 2**31:
            raise ArgumentError(f"Tables: {words} words in all; fewer than 2^31 can be addressed")
        self._mirror: I32Array = np.zeros(words, np.int32)
        self._shape = {name: (shape, dtype) for name, shape, dtype, _ in shapes}
        mirrors = {name: self._part(self._mirror, name) for name in self._where}
        for name, _, _, start in shapes:
            mirrors[name][...] = start
        self.full: I32Array = mirrors["full"]
        self.window: I32Array = mirrors["window"]
        self.lengths: I32Array = mirrors["lengths"]
        self.state: I32Array = mirrors["state"]
        self.slots: dict[str, I64Array] = {name: mirrors[f"slots.{name}"] for name in caches}
        self.token_rows: I32Array = mirrors["token_rows"]
        self.positions: I32Array = mirrors["positions"]

        self._arena = self._device.array(self._mirror)
        self._device.synchronize()  # uploads may be on any stream
        self._arena_ptr = view(self._arena).ptr
        self._device_parts = {name: self._part(self._arena, name) for name in self._where}
        # Room for every token of a step and every row from the start: buffers grow in unusual steps only.
        each_step = sum(w * n for name, (_, w, n) in self._where.items() if name not in ("full", "window"))
        self._staging = Staging(self._device, steps_in_flight, 5 * each_step + 65536)
        self._singles = np.empty(4096, np.int32)  # words marked one by one, the first _count of them
        self._count = 0
        self._runs: list[tuple[int, int]] = []  # (first word, words)
        self._ready: dict[int, Prepared] = {}  # by grid

    def _part(self, arena: Any, name: str) -> Any:
        first, width, count = self._where[name]
        shape, dtype = self._shape[name]
        return arena[first : first + width * count].view(dtype).reshape(shape)

    def device(self, name: str) -> Any:
        """The device's copy of a table, at an address that never changes, in the device's kind of array."""
        return self._device_parts[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self._where:
            raise ArgumentError(f"Tables: no table {name!r}; there are {', '.join(self._where)}")
        return name

    @property
    def nbytes(self) -> int:
        """Bytes of all tables on the device."""
        return self._mirror.nbytes

    # Marks.

    @property
    def marked(self) -> bool:
        """Whether something was marked since the last upload: mirrors and device may differ."""
        return bool(self._count or self._runs)

    def mark(self, name: str, flat_indices: NDArray[Any]) -> None:
        """Elements of a mirror have changed; `upload` reads their values.

        Args:
            name: the table.
            flat_indices: int32 or int64 array, elements of the flattened table; repetition is allowed. Copied.

        Raises:
            ArgumentError: an unknown table, or an index outside it; nothing is marked.
        """
        first, width, count = self._where[self._known(name)]
        flat = np.asarray(flat_indices).reshape(-1)
        n = flat.size
        if not n:
            return
        unsigned = _UNSIGNED.get(flat.dtype)  # a negative index is a huge one: a single reduction finds both kinds
        if unsigned is None or np.maximum.reduce(flat.view(unsigned)) >= count:
            raise ArgumentError(f"Tables.mark: {name!r} has elements 0 to {count - 1}; {flat.dtype} {flat} given")
        start, end = self._count, self._count + width * n
        if end > self._singles.size:
            self._make_room(end)
            start, end = self._count, self._count + width * n
        marked = self._singles[start:end]
        if width == 1:
            marked[:] = flat
            marked += first
        else:  # both words of an int64
            marked[0::2] = flat
            marked[0::2] *= 2
            marked[0::2] += first
            marked[1::2] = marked[0::2]
            marked[1::2] += 1
        self._count = end

    def mark_one(self, name: str, index: int) -> None:
        """`mark` of one element, for a fraction of its cost.

        Raises:
            ArgumentError: an unknown table, or an index outside it; nothing is marked.
        """
        first, width, count = self._where[self._known(name)]
        if not 0 <= index < count:
            raise ArgumentError(f"Tables.mark_one: {name!r} has elements 0 to {count - 1}; {index} given")
        if self._count + width > self._singles.size:
            self._make_room(self._count + width)
        word = first + width * index
        self._singles[self._count] = word
        if width == 2:
            self._singles[self._count + 1] = word + 1
        self._count += width

    def mark_range(self, name: str, start: int, stop: int) -> None:
        """Elements start .. stop - 1 of a flattened mirror have changed.

        Raises:
            ArgumentError: an unknown table, or a range outside it; nothing is marked.
        """
        first, width, count = self._where[self._known(name)]
        if not 0 <= start <= stop <= count:
            raise ArgumentError(f"Tables.mark_range: {name!r} has elements 0 to {count - 1}; {start} .. {stop} given")
        words = (stop - start) * width
        if words >= SHORT_RUN:
            if len(self._runs) >= 1024:
                self._join_runs()
            self._runs.append((first + start * width, words))
        elif words:
            self.mark(name, np.arange(start, stop))

    def _make_room(self, need: int) -> None:
        """Drop repeated marks; grow if that leaves the buffer more than half full."""
        once = np.unique(self._singles[: self._count])
        size = self._singles.size
        while size < 2 * (once.size + need - self._count):
            size *= 2
        grown = np.empty(size, np.int32)
        grown[: once.size] = once
        self._singles, self._count = grown, once.size

    def _join_runs(self) -> None:
        """Marked runs that touch or overlap, as one."""
        joined: list[tuple[int, int]] = []
        for first, words in sorted(self._runs):
            if joined and first <= sum(joined[-1]):
                begin, length = joined[-1]
                joined[-1] = begin, max(length, first + words - begin)
            else:
                joined.append((first, words))
        self._runs = joined

    # Upload.

    def upload(self, stream: Any = None) -> int:
        """Bring the device's tables up to date: one launch for everything marked since the last upload.

        Kernels that read the tables see it in stream order; those on other streams are the caller's to order.

        Args:
            stream: the stream to work on; the caller's current stream if None. Waits only if as many uploads as
                `steps_in_flight` are still on their way.

        Returns:
            Bytes staged: 8 a word marked alone, 4 a word of a run and 8 for each 128 of them; 0 without a launch if
            nothing was marked.

        Raises:
            LaunchError: the stream is being captured.
            After any error all marks stay as they were, and another upload brings the tables up to date.
        """
        if not self._count and not self._runs:
            return 0
        handle = resolve_stream("Tables.upload", self._device, stream)
        buffer, chunks, singles, staged = self._stage()
        blocks = upload_deltas_grid(chunks, singles)
        ready = self._ready.get(blocks)
        if ready is None:
            ready = self._ready[blocks] = prepare_upload_deltas(self._device, blocks)
        buffer.begin()
        ready.launch((self._arena_ptr, buffer.ptr, self._mirror.size, chunks, singles), handle)
        self._staging.sent(buffer, handle)
        self._count = 0
        self._runs = []
        return staged

    def _stage(self) -> tuple[Buffer, int, int, int]:
        """Everything marked as a message in the next staging buffer: (buffer, chunks, singles, bytes staged)."""
        if len(self._runs) > 1 and sum(words for _, words in self._runs) > self._mirror.size:
            self._join_runs()
        if self._count > self._mirror.size:
            self._make_room(self._count)
        runs, singles = self._runs, self._count
        chunks = sum((words + CHUNK - 1) // CHUNK for _, words in runs)
        start = runs_start(chunks, singles)
        buffer = self._staging.take(start + CHUNK * chunks)
        message = buffer.words
        staged = 8 * (chunks + singles)
        heads = message[: 2 * chunks].reshape(chunks, 2)
        at = 0
        for first, words in runs:
            n = (words + CHUNK - 1) // CHUNK
            heads[at : at + n] = _heads(first, words)
            place = start + at * CHUNK
            message[place : place + words] = self._mirror[first : first + words]
            staged += 4 * words
            at += n
        if singles:
            pairs = message[2 * chunks : 2 * (chunks + singles)].reshape(singles, 2)
            marked = self._singles[:singles]
            pairs[:, 0] = marked
            pairs[:, 1] = self._mirror[marked]
        return buffer, chunks, singles, staged


@lru_cache(maxsize=512)
def _heads(first: int, words: int) -> I32Array:
    """(word, count) of every chunk of a run; runs come back step after step."""
    words_at = np.arange(first, first + words, CHUNK, dtype=np.int32)
    heads = np.stack([words_at, np.minimum(CHUNK, first + words - words_at)], axis=1)
    heads.setflags(write=False)
    return heads
