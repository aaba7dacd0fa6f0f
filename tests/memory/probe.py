"""A stand-in for the model's kernels: writes known values through the slot mapping, and reads every live one back.

The value at position p of a cache is a 64-bit mix of all token ids up to p, the cache and the layer, as a real key
depends on the whole prefix: two sequences may share a page exactly if the values agree. A step does what kernels do:

  1. reserve (extend) and upload;
  2. read, before anything is written, what a step starting at position s may look at: window positions s-127 .. s-1,
     compressed entries of positions < s, compressor rows of the groups that s continues (CSA: this group and the one
     before it; HCA: this one); all through the device's tables;
  3. write the step's own values: entries through the slot mapping, compressor rows at p % ring of the state slot.
"""

import numpy as np

WINDOW = 128
U64 = np.uint64


def mix(x):
    """A bijection of 64-bit words that leaves no bit alone (splitmix64's finaliser)."""
    x = np.asarray(x, U64).copy()
    x ^= x >> U64(30)
    x *= U64(0xBF58476D1CE4E5B9)
    x ^= x >> U64(27)
    x *= U64(0x94D049BB133111EB)
    x ^= x >> U64(31)
    return x


def prefix_values(tokens):
    """uint64 [n]: a digest of tokens[: p + 1] for every p."""
    tokens = np.asarray(tokens, np.int64).astype(U64)
    places = np.arange(1, len(tokens) + 1, dtype=U64)
    return mix(np.cumsum(mix(tokens + (places << U64(32))), dtype=U64) + places)


class Probe:
    """Plays engine and kernels on one pool. `content[seq]`: the token ids of all positions, reserved or yet to come."""

    def __init__(self, pool, device):
        self.pool, self.device, self.layout = pool, device, pool.layout
        self.content = {}
        self.values = {}
        self.namespace = {}
        self.parked = set()  # preempted sequences: they have content, but no row
        self.checked = 0  # entries read back and found right
        self.salt = {
            (cache.name, layer): mix(U64(1000 * i + layer + 1))
            for i, cache in enumerate(self.layout.caches)
            for layer in cache.layers
        }

    def set_content(self, seq, tokens, namespace=None):
        """Token ids of a sequence from position 0 on; another namespace (an adapter) gives other values."""
        if namespace is not None:
            self.namespace[seq] = namespace
        self.content[seq] = np.asarray(tokens, np.int32)
        first = int.from_bytes(self.namespace.setdefault(seq, b""), "little")
        self.values[seq] = prefix_values(np.concatenate([[first], self.content[seq]]))[1:]

    def forget(self, seq):
        del self.content[seq], self.values[seq], self.namespace[seq]

    def step(self, seqs, counts):
        """extend, upload, read back, write. Positions reserved must be covered by `content`."""
        starts = [self.pool.length(seq) for seq in seqs]
        self.pool.extend(seqs, counts)
        self.pool.upload()
        self.after_upload(seqs, starts, counts)

    def after_upload(self, seqs, starts, counts):
        self.check_step_tables(seqs, starts, counts)
        for seq, start in zip(seqs, starts, strict=True):
            self.read_back(seq, start)
        self.write()

    def host(self, array):
        return self.device.numpy(array)

    def check_step_tables(self, seqs, starts, counts):
        """token_rows, positions and lengths say what was asked for; slots past the step's tokens are -1."""
        rows = [self.pool.row(seq) for seq in seqs]
        n = sum(counts)
        want_rows = np.repeat(rows, counts)
        want_positions = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)] or [[]])
        assert (self.host(self.pool.token_rows)[:n] == want_rows).all()
        assert (self.host(self.pool.positions)[:n] == want_positions).all()
        lengths = self.host(self.pool.lengths)
        for seq, row, start, count in zip(seqs, rows, starts, counts, strict=True):
            assert lengths[row] == start + count == self.pool.length(seq)
        for cache in self.layout.caches:
            if cache.life in ("full", "window"):
                slots = self.host(self.pool.slot_mapping(cache.name))
                assert (slots[n:] == -1).all(), cache.name
                emits = (want_positions + 1) % cache.ratio == 0
                assert ((slots[:n] >= 0) == emits).all(), cache.name

    def write(self):
        """What the step's kernels write: entries through the slot mapping, compressor rows by position."""
        positions = self.host(self.pool.positions)
        mine = positions >= 0
        positions, rows = positions[mine], self.host(self.pool.token_rows)[mine]
        owner = {self.pool.row(seq): seq for seq in self.content if seq not in self.parked}
        values = np.zeros(len(positions), U64)
        for row in np.unique(rows):
            values[rows == row] = self.values[owner[row]][positions[rows == row]]
        for cache in self.layout.caches:
            if cache.life in ("full", "window"):
                slots = self.host(self.pool.slot_mapping(cache.name))
                assert (slots[: len(mine)][~mine] == -1).all(), f"{cache.name}: a token without a position has a slot"
                slots = slots[mine]
                used = slots >= 0
                assert len(np.unique(slots[used])) == used.sum(), f"{cache.name}: two tokens of a step share a slot"
                self.put(cache, slots[used] // cache.entries, slots[used] % cache.entries, values[used])
            elif cache.life == "state":
                state = self.host(self.pool.state_slots)[rows]
                # Of a chunk longer than the ring the last rows stay; a GPU would not say which of two writes wins.
                last = np.array([positions[rows == row].max() for row in rows], np.int64)
                stays = positions > last - cache.entries
                self.put(cache, state[stays], positions[stays] % cache.entries, values[stays])

    def read_back(self, seq, length):
        """Everything that a step starting at `length` may look at holds this sequence's values."""
        row, values = self.pool.row(seq), self.values[seq]
        for cache in self.layout.caches:
            if cache.life == "window":
                p = np.arange(max(0, length - WINDOW + 1), length)
                table = self.host(self.pool.block_table(cache.name))[row]
                page = table[p // cache.entries % len(table)]
                self.expect(cache, seq, p, page, p % cache.entries, values[p])
            elif cache.life == "full":
                entry = np.arange(length // cache.ratio)
                table = self.host(self.pool.block_table(cache.name))[row]
                page = table[entry // cache.entries]
                last = entry * cache.ratio + cache.ratio - 1
                self.expect(cache, seq, last, page, entry % cache.entries, values[last])
            elif cache.life == "state":
                ratio = 128 if cache.name == "hca_state" else 4
                group = length // ratio * ratio
                first = group if ratio == 128 else group - 4  # CSA entries overlap: eight rows, two groups
                p = np.arange(max(0, first), length)
                page = np.full(len(p), self.host(self.pool.state_slots)[row])
                self.expect(cache, seq, p, page, p % cache.entries, values[p])

    def expect(self, cache, seq, positions, page, offset, values):
        assert (page > 0).all(), f"{cache.name}: sequence {seq} has the null page at {positions[page <= 0][:4]}"
        for layer in cache.layers:
            view = self.pool.view(layer, cache.name)
            got = self.host(view[self.bytes_of(cache, page, offset)])
            wrong = (got != self.pattern(cache, layer, values)).any(axis=1)
            assert not wrong.any(), (
                f"{cache.name} layer {layer}, sequence {seq}: positions {positions[wrong][:8]}, pages "
                f"{page[wrong][:8]}, hold other values than were written for them"
            )
            self.checked += len(positions)

    def put(self, cache, page, offset, values):
        for layer in cache.layers:
            view = self.pool.view(layer, cache.name)
            view[self.bytes_of(cache, page, offset)] = self.on_device(self.pattern(cache, layer, values))

    def pattern(self, cache, layer, values):
        """uint8 [n, entry_bytes]: the eight bytes of the value, again and again, each time another constant added."""
        words = mix(values ^ self.salt[cache.name, layer]).reshape(-1, 1).view(np.uint8)
        k = np.arange(cache.entry_bytes)
        return words[:, k % 8] + (k // 8 * 29).astype(np.uint8)

    def bytes_of(self, cache, page, offset):
        """(pages, bytes) to index a [pages, page_bytes] view with: every byte of these entries, part after part."""
        columns = []
        for part in cache.parts:
            start, stride = cache.locate(part.name)
            columns.append(start + np.asarray(offset, np.int64)[:, None] * stride + np.arange(part.nbytes))
        pages = np.asarray(page, np.int64)[:, None]
        return self.on_device(pages), self.on_device(np.concatenate(columns, axis=1))

    def on_device(self, array):
        return self.device.array(array) if self.device.kind == "cuda" else array

    def check_tables(self):
        """Past its end a row holds the null page, a row without a sequence nothing else; null pages are zero."""
        live = {self.pool.row(seq): seq for seq in self.content if seq not in self.parked}
        lengths = self.host(self.pool.lengths)
        for cache in self.layout.caches:
            if cache.life == "full":
                table = self.host(self.pool.block_table(cache.name))
                for row in range(len(table)):
                    used = -(-self.pool.length(live[row]) // cache.tokens) if row in live else 0
                    assert not table[row, used:].any(), f"{cache.name}: row {row} shows pages past its end"
            for layer in cache.layers:
                assert not self.host(self.pool.view(layer, cache.name)[0]).any(), f"{cache.name}: null page written"
        for row in range(len(lengths)):
            assert lengths[row] == (self.pool.length(live[row]) if row in live else 0)
