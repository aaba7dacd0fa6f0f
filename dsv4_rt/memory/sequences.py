"""Sequences: ids, rows, and what is known about each row, as arrays indexed by row.

An id is (generation << 20) | handle, so that a batch of ids becomes a batch of rows by two gathers, and an id is never
used twice: freeing a sequence raises its handle's generation. A preempted sequence keeps its id and gives up its row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from dsv4_rt.errors import PoolExhausted, PoolMisuse, UnknownSequence
from dsv4_rt.memory.arguments import as_array
from dsv4_rt.memory.pages import Ints
from dsv4_rt.memory.prefix import PAGE, root_serial

HANDLE_BITS: Final = 20  # sequences alive or preempted at once: a million
_MASK: Final = (1 << HANDLE_BITS) - 1
NEVER: Final = 1 << 60

STAGED: Final = 1  # flag of a row: it has tokens that are not uploaded yet
SHARED: Final = 2  # its last page or window page may be held by others, too: look before writing


@dataclass
class Parked:
    """A preempted sequence: what it takes to look its prefix up again."""

    tokens: Ints
    namespace: bytes


@dataclass
class Text:
    """The tokens of a row on complete pages; the rest is in Sequences.tail."""

    namespace: bytes = b""
    tokens: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    digests: list[bytes] = field(default_factory=list)  # of the first pages, as far as they were needed


class Sequences:
    """Rows 0 .. max_sequences-1. Arrays are int64 where they index or count positions: NumPy gathers need no cast."""

    def __init__(self, max_sequences: int) -> None:
        B = max_sequences
        self.id_of = np.zeros(B, np.int64)  # 0: the row is free
        self.length = np.zeros(B, np.int64)
        self.high = np.zeros(B, np.int64)  # the longest it has been
        self.floor = np.zeros(B, np.int64)  # tokens that came from a checkpoint: nothing before them is there
        self.settled = np.zeros(B, np.int64)  # of rows flagged STAGED: the length at the last upload
        self.settled_high = np.zeros(B, np.int64)  # likewise
        self.known = np.zeros(B, np.int64)  # tokens appended
        self.flags = np.zeros(B, np.uint8)
        self.first_window = np.zeros(B, np.int64)  # index (position // 64) of the first window page held
        self.window_base = np.zeros(B, np.int64)  # window slot of position p on the last page = base + p
        self.full_base = np.zeros(B, np.int64)  # slot of ratio r on the last page = (base + p) // r
        self.wake = np.zeros(B, np.int64)  # the length from which on one more token needs more than slots
        self.registered = np.zeros(B, np.int64)  # pages the prefix cache has dealt with; NEVER: it must not
        self.serial = np.zeros(B, np.int64)  # the last of these pages' registration
        self.prompt_end = np.zeros(B, np.int64)  # last page boundary of the prompt; 0: none
        self.tail = np.zeros((B, PAGE), np.int32)
        self.text = [Text() for _ in range(B)]
        self._free_rows = list(range(B - 1, -1, -1))
        self._handle_id = np.zeros(64, np.int64)  # handle -> id; 0 if that has no row
        self._handle_id[0] = -1  # handle 0 is never used: no id, however wrong, equals its entry
        self._handle_row = np.zeros(64, np.int64)
        self._last_id = [0]  # handle -> the id that had it last, or has it
        self._free_handles: list[int] = []
        self.parked: dict[int, Parked] = {}
        self._scratch = np.zeros(B, np.int64)

    # Ids and rows.

    @property
    def free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def ids(self) -> list[int]:
        """Of the sequences that have a row, by row."""
        return [int(i) for i in self.id_of[self.id_of != 0]]

    def rows(self, ids: Ints, what: str) -> Ints:
        """int64 ids -> rows. Raises UnknownSequence, or PoolMisuse for a preempted sequence."""
        handles = ids & _MASK
        if (self._handle_id.take(handles, mode="clip") != ids).any():
            for i in ids.tolist():
                self.row(i, what)
        rows: Ints = self._handle_row.take(handles)
        return rows

    def row(self, seq: int, what: str) -> int:
        handle = seq & _MASK
        if seq > 0 and handle < len(self._last_id):
            if self._handle_id[handle] == seq:
                return int(self._handle_row[handle])
            if seq in self.parked:
                raise PoolMisuse(f"{what}: sequence {seq} is preempted; resume it first")
            if self._last_id[handle] >= seq > _MASK:
                raise UnknownSequence(f"{what}: sequence {seq} has been freed already")
        raise UnknownSequence(f"{what}: no sequence has the id {seq}")

    def distinct(self, rows: Ints, what: str) -> None:
        """Raise PoolMisuse if a row occurs twice."""
        order = np.arange(rows.size)
        self._scratch[rows] = order
        twice = self._scratch.take(rows) != order
        if twice.any():
            seq = int(self.id_of[rows[int(np.argmax(twice))]])
            raise PoolMisuse(f"{what}: sequence {seq} occurs twice in one batch; give it once, with the sum")

    def admit(self, namespace: bytes, tokens: Ints, what: str) -> tuple[int, int]:
        """A new sequence with a row: (id, row). The caller has checked free_rows."""
        if self._free_handles:
            handle = self._free_handles.pop()
            seq = self._last_id[handle] + (1 << HANDLE_BITS)
            self._last_id[handle] = seq
        else:
            handle = len(self._last_id)
            if handle > _MASK:
                raise PoolExhausted(f"{what}: {handle - 1} sequences are alive or preempted; free some")
            if handle == self._handle_id.size:
                self._handle_id = np.concatenate([self._handle_id, np.zeros_like(self._handle_id)])
                self._handle_row = np.concatenate([self._handle_row, np.zeros_like(self._handle_row)])
            seq = 1 << HANDLE_BITS | handle
            self._last_id.append(seq)
        return seq, self._seat(seq, namespace, tokens)

    def readmit(self, seq: int) -> int:
        """Give a preempted sequence a row again. The caller has checked free_rows."""
        parked = self.parked.pop(seq)
        return self._seat(seq, parked.namespace, parked.tokens)

    def _seat(self, seq: int, namespace: bytes, tokens: Ints) -> int:
        row = self._free_rows.pop()
        self._handle_id[seq & _MASK] = seq
        self._handle_row[seq & _MASK] = row
        self.id_of[row] = seq
        for array in (
            self.length,
            self.high,
            self.floor,
            self.settled,
            self.settled_high,
            self.flags,
            self.first_window,
        ):
            array[row] = 0
        for array in (self.window_base, self.full_base, self.wake, self.registered):
            array[row] = 0
        whole = tokens.size // PAGE * PAGE
        self.text[row] = Text(namespace, tokens[:whole].copy())
        self.tail[row, : tokens.size - whole] = tokens[whole:]
        self.known[row] = tokens.size
        self.prompt_end[row] = whole
        self.serial[row] = root_serial(namespace)
        return row

    def unseat(self, row: int) -> None:
        """Take the row away; the id then is unknown, unless it is parked."""
        handle = int(self.id_of[row]) & _MASK
        self._handle_id[handle] = 0
        self.id_of[row] = 0
        self.length[row] = self.high[row] = self.known[row] = self.flags[row] = 0
        self.text[row] = Text()
        self._free_rows.append(row)

    def park(self, row: int) -> None:
        """Preempt: keep id and tokens, give up the row."""
        seq = int(self.id_of[row])
        self.parked[seq] = Parked(self.tokens(row, 0, int(self.known[row])), self.text[row].namespace)
        self.unseat(row)

    def retire(self, seq: int) -> None:
        """The id, which has no row any more, is never used again."""
        self.parked.pop(seq, None)
        self._free_handles.append(seq & _MASK)

    # Tokens.

    def tokens(self, row: int, start: int, stop: int) -> Ints:
        """Known tokens of positions start .. stop-1: int32, a copy."""
        whole = int(self.known[row]) // PAGE * PAGE
        ready = self.text[row].tokens[start : min(stop, whole)]
        return np.concatenate([ready, self.tail[row, max(start - whole, 0) : max(stop - whole, 0)]])

    def append(self, row: int, tokens: Ints) -> None:
        """Tokens that follow the known ones."""
        known = int(self.known[row])
        within = known % PAGE
        whole = known - within
        end = known + tokens.size
        complete = end // PAGE * PAGE
        if complete > whole:
            text = self.text[row]
            if complete > text.tokens.size:
                grown = np.empty(max(complete, 2 * text.tokens.size), np.int32)
                grown[:whole] = text.tokens[:whole]
                text.tokens = grown
            text.tokens[whole:known] = self.tail[row, :within]
            text.tokens[known:complete] = tokens[: complete - known]
            self.tail[row, : end - complete] = tokens[complete - known :]
        else:
            self.tail[row, within : within + tokens.size] = tokens
        self.known[row] = end

    def append_one(self, rows: Ints, tokens: Ints) -> Ints:
        """One token for each of different rows; returns the rows that have completed a page."""
        at = self.known.take(rows)
        within = at & (PAGE - 1)
        ends = within == PAGE - 1
        if not ends.any():
            self.tail[rows, within] = tokens
            self.known[rows] = at + 1
            return np.empty(0, np.int64)
        self.tail[rows[~ends], within[~ends]] = tokens[~ends]
        self.known[rows[~ends]] += 1
        for row, token in zip(rows[ends].tolist(), tokens[ends], strict=True):
            self.append(row, np.array([token], np.int32))
        ended: Ints = rows[ends]
        return ended

    def forget_tokens(self, row: int, length: int) -> None:
        """Know only the first `length` tokens from now on."""
        if length >= self.known[row]:
            return
        whole = length // PAGE * PAGE
        if whole < self.known[row] // PAGE * PAGE:
            self.tail[row, : length - whole] = self.text[row].tokens[whole:length]
        self.known[row] = length
        del self.text[row].digests[length // PAGE :]
        self.prompt_end[row] = min(int(self.prompt_end[row]), whole)


def as_tokens(tokens: Any, what: str) -> Ints:
    """Token ids as contiguous int32 [N]: integers from 0 to 2^31 - 1, else PoolMisuse."""
    array = as_array(tokens, what, "tokens")
    if array.size == 0 and array.ndim == 1 and not isinstance(tokens, np.ndarray):
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise PoolMisuse(f"{what}: tokens are {array.dtype} {array.shape}; a row of integers is wanted")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**31):
        raise PoolMisuse(f"{what}: tokens from {array.min()} to {array.max()}; they must be from 0 to 2^31 - 1")
    return np.ascontiguousarray(array, np.int32)
