"""The rival of `dsv4_rt.memory`: a page manager as one writes it first, an object a page and a loop a sequence.

It keeps the same books as the pool: reference counts, a free list, copy on write of a shared last page, window pages
that leave when no query can read them, block tables, lengths, slot mappings, token rows and positions, and the list of
table entries that a step has changed. It knows neither checkpoints nor fences, and checks no argument: everything it
does the pool does too.
"""

import hashlib
from collections import deque

import numpy as np

FULL, WINDOW_PAGE, WINDOW = 256, 64, 128  # tokens a full page, tokens a window page, positions a query sees


class Page:
    """One page: its id and how many sequences hold it."""

    __slots__ = ("id", "refs")

    def __init__(self, id):
        self.id = id
        self.refs = 0


class Pages:
    """The pages of one life cycle; page 0 is the null page and never on the free list."""

    def __init__(self, count):
        self.pages = [Page(i) for i in range(count)]
        self.free = deque(self.pages[1:])

    def take(self):
        page = self.free.popleft()
        page.refs = 1
        return page

    def drop(self, page):
        page.refs -= 1
        if page.refs == 0:
            self.free.append(page)


class Sequence:
    """A sequence: its row, its length, the pages it holds and the token ids it was told."""

    def __init__(self, row):
        self.row = row
        self.length = 0
        self.full = []
        self.window = {}  # position // 64 -> page
        self.digest = b""
        self.hashed = 0  # full pages that have a digest


class RivalPool:
    """The manager. Sizes as in KVPool: pages include the null page, max_tokens is the most tokens of one step."""

    def __init__(self, *, pages, window_pages, max_sequences, max_length, max_in_flight, max_tokens):
        width = -(-(WINDOW + max_in_flight) // WINDOW_PAGE) + 1
        self.full, self.window = Pages(pages), Pages(window_pages)
        self.rows = deque(range(max_sequences))
        self.slots = deque(range(1, max_sequences + 1))
        self.width = width
        self.full_table = np.zeros((max_sequences, -(-max_length // FULL)), np.int32)
        self.window_table = np.zeros((max_sequences, width), np.int32)
        self.state = np.zeros(max_sequences, np.int32)
        self.lengths = np.zeros(max_sequences, np.int32)
        self.mapping = {name: np.full(max_tokens, -1, np.int64) for name in ("window", "csa", "hca")}
        self.token_rows = np.full(max_tokens, -1, np.int32)
        self.positions = np.full(max_tokens, -1, np.int32)
        self.last_tokens = 0
        self.sequences = {}
        self.next_id = 0
        self.cached = {}
        self.deltas = []  # (table, row, column, value)

    def create(self):
        sequence = Sequence(self.rows.popleft())
        self.state[sequence.row] = self.slots.popleft()
        self.deltas.append(("state", sequence.row, 0, int(self.state[sequence.row])))
        self.next_id += 1
        self.sequences[self.next_id] = sequence
        return self.next_id

    def extend(self, seqs, counts):
        """Reserve the next positions of a batch; MemoryError and nothing changed if the pages do not suffice."""
        need_full = need_window = 0
        for seq, count in zip(seqs, counts, strict=True):
            s = self.sequences[seq]
            new = s.length + count
            need_full += -(-new // FULL) - len(s.full)
            if s.length % FULL and s.full[-1].refs > 1:
                need_full += 1
            for i in range(s.length // WINDOW_PAGE, -(-new // WINDOW_PAGE)):
                if i not in s.window or s.window[i].refs > 1:
                    need_window += 1
        if need_full > len(self.full.free) or need_window > len(self.window.free):
            raise MemoryError(f"{need_full} pages and {need_window} window pages wanted")
        token = 0
        for seq, count in zip(seqs, counts, strict=True):
            s = self.sequences[seq]
            self._release_window(s)
            self._pages(s, s.length + count)
            self._slots(s, count, token)
            token += count
            s.length += count
            self.lengths[s.row] = s.length
            self.deltas.append(("lengths", s.row, 0, s.length))
        for i in range(token, self.last_tokens):
            for name in self.mapping:
                self.mapping[name][i] = -1
                self.deltas.append((name, i, 0, -1))
        self.last_tokens = token

    def _release_window(self, s):
        first = max(0, s.length - WINDOW + 1) // WINDOW_PAGE
        for i in [i for i in s.window if i < first]:
            self.window.drop(s.window.pop(i))
            self.window_table[s.row, i % self.width] = 0
            self.deltas.append(("window_table", s.row, i % self.width, 0))

    def _pages(self, s, new):
        if s.length % FULL and s.full[-1].refs > 1:
            self.full.drop(s.full.pop())
            s.full.append(self.full.take())
            self.full_table[s.row, len(s.full) - 1] = s.full[-1].id
            self.deltas.append(("full_table", s.row, len(s.full) - 1, s.full[-1].id))
        while len(s.full) < -(-new // FULL):
            page = self.full.take()
            self.full_table[s.row, len(s.full)] = page.id
            self.deltas.append(("full_table", s.row, len(s.full), page.id))
            s.full.append(page)
        for i in range(s.length // WINDOW_PAGE, -(-new // WINDOW_PAGE)):
            if i in s.window and s.window[i].refs > 1:
                self.window.drop(s.window.pop(i))
            if i not in s.window:
                page = self.window.take()
                s.window[i] = page
                self.window_table[s.row, i % self.width] = page.id
                self.deltas.append(("window_table", s.row, i % self.width, page.id))

    def _slots(self, s, count, token):
        if count > 16:  # a chunk: even a first version takes an array here
            p = np.arange(s.length, s.length + count)
            full = self.full_table[s.row, p // FULL].astype(np.int64)
            window = self.window_table[s.row, p // WINDOW_PAGE % self.width].astype(np.int64)
            new = {
                "window": window * WINDOW_PAGE + p % WINDOW_PAGE,
                "csa": np.where((p + 1) % 4 == 0, full * 64 + p // 4 % 64, -1),
                "hca": np.where((p + 1) % 128 == 0, full * 2 + p // 128 % 2, -1),
            }
            for name, values in new.items():
                self.mapping[name][token : token + count] = values
                self.deltas.append((name, token, 0, values))
            self.token_rows[token : token + count] = s.row
            self.positions[token : token + count] = p
            self.deltas.append(("token_rows", token, 0, s.row))
            self.deltas.append(("positions", token, 0, p))
            return
        for t in range(count):
            p = s.length + t
            full = s.full[p // FULL].id
            slots = {
                "window": s.window[p // WINDOW_PAGE].id * WINDOW_PAGE + p % WINDOW_PAGE,
                "csa": full * 64 + p // 4 % 64 if (p + 1) % 4 == 0 else -1,
                "hca": full * 2 + p // 128 % 2 if (p + 1) % 128 == 0 else -1,
            }
            for name, slot in slots.items():
                self.mapping[name][token + t] = slot
                self.deltas.append((name, token + t, 0, slot))
            self.token_rows[token + t] = s.row
            self.positions[token + t] = p
            self.deltas.append(("token_rows", token + t, 0, s.row))
            self.deltas.append(("positions", token + t, 0, p))

    def append(self, seq, tokens):
        """Hash the full pages of a prompt: a chain over token ids, one digest a page."""
        s = self.sequences[seq]
        for start in range(0, len(tokens) - FULL + 1, FULL):
            page = tokens[start : start + FULL]
            s.digest = hashlib.blake2b(s.digest + page.tobytes(), digest_size=16).digest()
            if s.digest not in self.cached:
                self.cached[s.digest] = page.tolist()
            s.hashed += 1

    def free(self, seq):
        s = self.sequences.pop(seq)
        for i, page in enumerate(s.full):
            self.full.drop(page)
            self.full_table[s.row, i] = 0
            self.deltas.append(("full_table", s.row, i, 0))
        for i, page in s.window.items():
            self.window.drop(page)
            self.window_table[s.row, i % self.width] = 0
            self.deltas.append(("window_table", s.row, i % self.width, 0))
        self.lengths[s.row] = 0
        self.deltas.append(("lengths", s.row, 0, 0))
        self.slots.append(int(self.state[s.row]))
        self.state[s.row] = 0
        self.deltas.append(("state", s.row, 0, 0))
        self.rows.append(s.row)

    def take_deltas(self):
        """What an upload would carry; the list starts anew."""
        deltas, self.deltas = self.deltas, []
        return deltas
