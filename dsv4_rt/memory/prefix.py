"""The prefix cache: pages found by what they say, and the checkpoints at which a sequence can start from them.

    digest[0]   = blake2b-128(namespace)
    digest[j+1] = blake2b-128(digest[j] | int32 tokens 256 j .. 256 j + 255)       one a page

A page is registered under its digest when its 256 tokens are known and computed. A hit is believed only if the tokens
of every page on the way are equal and every page names its predecessor's registration: a digest alone decides nothing,
so that even a colliding hash costs hits, never wrong content. `page_tokens` keeps 1 KiB a page for that, allocated
whole and touched only where a page is registered.

What a sequence needs besides the pages is kept at checkpoints only: at a boundary L the 4 CSA state rows before L are
copied into a checkpoint slot, and the 2 window pages that hold the last 128 tokens are kept as they are, not copied.
A hit therefore ends at the longest checkpoint on the path of matching pages.

Eviction takes the page that was let go longest ago; a sequence lets go of its last page first, so that tails go before
the heads that they need. A page, a checkpoint slot or a window page that is evicted takes its checkpoint along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from dsv4_rt.memory.copies import Copies
from dsv4_rt.memory.pages import Ints, Pages

PAGE: Final = 256  # tokens a page
DIGEST_BYTES: Final = 16
_NO_PAGES: Final = np.empty(0, np.int32)


def page_digest(parent: bytes, tokens: bytes | memoryview) -> bytes:
    """The digest of a page: of its predecessor's digest and its own int32 tokens, little endian."""
    h = hashlib.blake2b(parent, digest_size=DIGEST_BYTES)
    h.update(tokens)
    return h.digest()


def root_digest(namespace: bytes) -> bytes:
    """The digest before a sequence's first page."""
    return hashlib.blake2b(namespace, digest_size=DIGEST_BYTES).digest()


def root_serial(namespace: bytes) -> int:
    """What stands for the registration of the page before the first one: different from every page's (they are
    positive), and for every namespace."""
    return -int.from_bytes(hashlib.blake2b(namespace, digest_size=7).digest(), "little") - 1


def page_digests(tokens: Ints, namespace: bytes, pages: int, known: list[bytes] | None = None) -> list[bytes]:
    """The digests of the first pages of int32 tokens; `known` are the first ones of them, if some are."""
    digests = known if known is not None else []
    digest = digests[-1] if digests else root_digest(namespace)
    raw = tokens.view(np.uint8).data
    for at in range(4 * PAGE * len(digests), 4 * PAGE * pages, 4 * PAGE):
        digest = page_digest(digest, raw[at : at + 4 * PAGE])
        digests.append(digest)
    return digests


@dataclass
class Match:
    """What the cache has of a prompt."""

    pages: Ints  # int32: the pages up to the hit's end
    length: int  # tokens hit: where the checkpoint is
    checkpoint: int  # its slot; 0 without a hit
    window: Ints  # int32 [2]: the window pages before `length`
    digests: list[bytes]  # of the prompt's first pages, as far as they had to be computed
    lost: int  # tokens on matching pages behind the last checkpoint


@dataclass
class PrefixStats:
    """Counters since the pool was made."""

    tokens_queried: int = 0  # tokens of the prompts looked up
    tokens_hit: int = 0
    tokens_lost: int = 0  # on pages that matched, but behind the last living checkpoint
    checkpoints_taken: int = 0
    checkpoints_missed: int = 0  # the state had gone on, or no slot could be had
    evictions: int = 0
    checkpoint_evictions: int = 0
    collisions: int = 0  # equal digests of different content


class PrefixCache:
    """Digests, tokens and links of registered pages; checkpoints. `lives` are the pool's pages by life cycle."""

    def __init__(self, lives: Mapping[str, Pages], copies: Copies) -> None:
        self._full, self._window = lives["full"], lives["window"]
        self._slots = lives["checkpoint"]
        self._copies = copies
        P = self._full.count
        self.table: dict[bytes, int] = {}
        self.digest_of: list[bytes] = [b""] * P
        self.page_tokens = np.zeros((P, PAGE), np.int32)
        self.serial = np.zeros(P, np.int64)  # counts registrations; 0: not registered
        self.parent = np.zeros(P, np.int64)  # the serial of the page before
        self.checkpoint_of = np.zeros(P, np.int32)  # page -> checkpoint slot at its end; 0: none
        self.page_of = np.zeros(self._slots.count, np.int32)
        self.window_of = np.zeros((self._slots.count, 2), np.int32)
        self.holder = np.zeros(self._window.count, np.int32)  # window page -> checkpoint slot that keeps it
        self.clock = 0
        self.stats = PrefixStats()

    # Looking up.

    def match(self, tokens: Ints, namespace: bytes) -> Match:
        """The longest checkpointed prefix of `tokens` (int32, contiguous) that leaves a token to compute."""
        digest, digests, pages = root_digest(namespace), [], []
        raw = tokens.view(np.uint8).data
        lookup = self.table.get
        for at in range(0, 4 * ((tokens.size - 1) // PAGE * PAGE) if tokens.size else 0, 4 * PAGE):
            digest = page_digest(digest, raw[at : at + 4 * PAGE])
            digests.append(digest)
            page = lookup(digest)
            if page is None:
                break
            pages.append(page)
        found = np.array(pages, np.int32)
        n = self._verified(found, tokens, root_serial(namespace))
        ends = np.flatnonzero(self.checkpoint_of[found[:n]])
        if not ends.size:
            return Match(_NO_PAGES, 0, 0, _NO_PAGES, digests[: n + 1], n * PAGE)
        k = int(ends[-1]) + 1
        slot = int(self.checkpoint_of[found[k - 1]])
        return Match(found[:k], k * PAGE, slot, self.window_of[slot].copy(), digests[: n + 1], (n - k) * PAGE)

    def _verified(self, pages: Ints, tokens: Ints, root: int) -> int:
        """How many of the pages hold these tokens, each linked to the one before."""
        n = pages.size
        if not n:
            return 0
        same = (self.page_tokens[pages] == tokens[: n * PAGE].reshape(n, PAGE)).all(axis=1)
        self.stats.collisions += int(np.count_nonzero(~same))
        serial = self.serial[pages]
        same &= self.parent[pages] == np.concatenate(([root], serial[:-1]))
        return n if same.all() else int(np.argmin(same))

    # Registering.

    def register(self, page: int, digest: bytes, tokens: Ints, parent: int) -> tuple[int, int]:
        """Enter a computed page under its digest.

        Args:
            page: the page that a sequence computed.
            digest, tokens: the page's digest and 256 tokens.
            parent: serial of the registration before it.

        Returns:
            (page, serial) that is registered under the digest now: this one, or an equal one that was first.
            (0, 0) if another content has that digest: the page cannot be entered.
        """
        there = self.table.get(digest)
        if there is not None:
            if not np.array_equal(self.page_tokens[there], tokens):
                self.stats.collisions += 1
                return 0, 0
            if self.parent[there] == parent:
                return there, int(self.serial[there])
            self.unregister(np.array([there], np.int32))  # nobody reaches it any more: its predecessor was evicted
        if self.serial[page]:  # registered under another digest: a collision made two of one content
            return 0, 0
        self.clock += 1
        self.table[digest] = page
        self.digest_of[page] = digest
        self.page_tokens[page] = tokens
        self.serial[page], self.parent[page] = self.clock, parent
        self._full.keep[page] = True
        return page, self.clock

    def alive(self, digest: bytes, serial: int) -> bool:
        """Whether that registration of the digest still stands."""
        page = self.table.get(digest)
        return page is not None and int(self.serial[page]) == serial

    def serial_of(self, digest: bytes) -> int:
        """The serial of what is registered under a digest; 0 if nothing is."""
        page = self.table.get(digest)
        return 0 if page is None else int(self.serial[page])

    def unregister(self, pages: Ints) -> None:
        """Take registered pages out of the cache, their checkpoints with them; idle ones are free then."""
        for page in pages.tolist():
            del self.table[self.digest_of[page]]
            self.digest_of[page] = b""
        self.serial[pages] = 0
        slots = self.checkpoint_of[pages]
        self.drop_checkpoints(slots[slots != 0])
        self._full.forget(pages)

    # Checkpoints.

    def checkpoint(self, page: int, window: Ints, state: int, boundary: int) -> bool:
        """Keep what a sequence needs to start at `boundary`, the end of a registered page.

        False where no slot is to be had, or where another checkpoint keeps one of the window pages: a fork that parted
        within the last 64 tokens before the boundary. The first of the two has it.
        """
        if not self._slots.available or self._window.keep[window].any():
            self.stats.checkpoints_missed += 1
            return False
        taken = self._slots.take(1)
        slot = int(taken[0])
        self.checkpoint_of[page], self.page_of[slot] = slot, page
        self.window_of[slot] = window
        self.holder[window] = slot
        self._slots.keep[slot] = True
        self._window.keep[window] = True
        self._copies.save(state, slot, boundary)
        self._slots.drop(taken, self._copies.fence)
        self.stats.checkpoints_taken += 1
        return True

    def drop_checkpoints(self, slots: Ints) -> None:
        """Forget checkpoints; their slots and window pages are free where nobody uses them."""
        if not slots.size:
            return
        self.checkpoint_of[self.page_of[slots]] = 0
        self.page_of[slots] = 0
        window = self.window_of[slots].reshape(-1)
        self.window_of[slots] = 0
        self.holder[window] = 0
        self._window.forget(window)
        self._slots.forget(slots)
        self._copies.abandon("checkpoint", slots[self._slots.refs[slots] == 0])

    # Eviction: what Pages calls when it needs room.

    def evict_full(self, pages: Ints) -> None:
        self.stats.evictions += pages.size
        self.stats.checkpoint_evictions += int(np.count_nonzero(self.checkpoint_of[pages]))
        self.unregister(pages)

    def evict_window(self, pages: Ints) -> None:
        slots = np.unique(self.holder[pages])
        self.stats.checkpoint_evictions += slots.size
        self.drop_checkpoints(slots)

    def evict_checkpoints(self, slots: Ints) -> None:
        self.stats.checkpoint_evictions += slots.size
        self.drop_checkpoints(slots)

    def reset(self) -> int:
        """Forget everything; returns how many pages were registered. Pages in use stay with their sequences."""
        pages = np.fromiter(self.table.values(), np.int32, len(self.table))
        self.unregister(pages)
        return pages.size

    def bytes_kept(self, slot_bytes: int, window_bytes: int) -> int:
        """Bytes that living checkpoints take: their slots and the window pages they keep."""
        slots = int(np.count_nonzero(self.page_of))
        return slots * slot_bytes + int(np.count_nonzero(self._window.keep)) * window_bytes
