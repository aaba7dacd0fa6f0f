"""The geometry of paged KV memory as data: which caches there are, what one entry holds, how a page is laid out.

A page of n entries is a row of segments, each [n, row bytes], then padding up to a multiple of `page_align`:

    v4        [n x (448 e4m3 | 64 bf16)] [n x 8 ue8m0]      584 B an entry, 576 B aligned: what FlashMLA reads
    split     [n x 448 e4m3] [n x 64 bf16] [n x 1 f32]      580 B, 32 B aligned
    v4.1      [n x 512 e4m3] [n x 16 ue8m0]                 528 B, 512 B aligned
    v4.1-fp4  [n x 256 e2m1 pairs] [n x 32 e4m3]            288 B, 256 B aligned: compressed caches; the window is v4.1

    nvfp4     [n x 64 e2m1 pairs] [n x 8 e4m3]              72 B an index key
    mxfp4     [n x 64 e2m1 pairs] [n x 4 ue8m0]             68 B
    fp8       [n x 128 e4m3] [n x 1 f32]                    132 B; index pages are 576 B aligned, as vLLM keeps them

Four life cycles. `full`: a page is 256 tokens and one id names the CSA (64 entries), index (64) and HCA (2) page of
every layer. `window`: a page is 64 tokens. `state`: a slot holds a sequence's compressor rings, fp32, the row of
position p at p % entries. `checkpoint`: a slot holds the last 4 CSA rows before a page boundary; at a multiple of 128
the HCA compressor has nothing pending.

Sources: FlashMLA tests/quant.py and csrc/sm100/decode/head64 (page layout, alignment), DeepSeek-V4 inference reference,
model.py: Compressor (state), vLLM models/deepseek_v4 (pages of 256 and 64 tokens, alignment of index pages).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Final

import numpy as np

from dsv4_rt.checks import check_range
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16, F32
from dsv4_rt.models import ModelShape

FULL_TOKENS: Final = 256  # tokens a page of the life cycle `full`
WINDOW_TOKENS: Final = 64
CSA_RATIO: Final = 4
HCA_RATIO: Final = 128
CSA_ROWS: Final = 8  # rows an entry is pooled from: the group before and the current one
HCA_ROWS: Final = 128
CHECKPOINT_ROWS: Final = CSA_RATIO  # of a boundary's CSA state only the group before it is still needed
LIVES: Final = ("full", "window", "state", "checkpoint")
VECTOR_BYTES: Final = 16  # pages are copied in such words: every page size is a multiple

_U8 = np.dtype(np.uint8)


@dataclass(frozen=True)
class Part:
    """One named piece of an entry: `shape` elements of `dtype`. Parts of one segment lie side by side in its rows."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    segment: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of this part in one entry."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Cache:
    """One kind of memory that some layers of a model have: entries of `parts`, `entries` a page.

    Raises:
        ArgumentError: a size that is not positive, an unknown life cycle, a page that is no multiple of 16 B, a part
            that would not be aligned to its own elements.
    """

    name: str
    life: str
    ratio: int  # tokens an entry
    entries: int  # entries a page
    parts: tuple[Part, ...]
    page_align: int  # bytes; the stride between pages is a multiple
    layers: tuple[int, ...]  # the model's layers that have it
    rows_of: str = ""  # life `checkpoint`: the cache of life `state` whose rows it keeps

    def __post_init__(self) -> None:
        def refuse(why: str) -> None:
            raise ArgumentError(f"Cache {self.name!r}: {why}")

        if self.life not in LIVES:
            refuse(f"life = {self.life!r} is none of {', '.join(LIVES)}")
        for what in ("ratio", "entries", "page_align"):
            check_range(f"Cache {self.name!r}", what, getattr(self, what), 1, 2**31 - 1)
        if len({part.name for part in self.parts}) < len(self.parts) or not self.parts:
            refuse("parts need names, each its own; at least one part")
        if [part.segment for part in self.parts] != sorted(part.segment for part in self.parts):
            refuse("parts must stand in the order of their segments")
        if len(set(self.layers)) < len(self.layers) or any(layer < 0 for layer in self.layers):
            refuse(f"layers = {self.layers} must be different and not negative")
        if self.page_bytes % VECTOR_BYTES:
            refuse(
                f"a page has {self.page_bytes} B, no multiple of {VECTOR_BYTES}; give page_align = a multiple of "
                f"{VECTOR_BYTES}, not {self.page_align}"
            )
        for part in self.parts:
            offset, stride = self.locate(part.name)
            if offset % part.dtype.itemsize or (stride % part.dtype.itemsize and self.entries > 1):
                refuse(f"part {part.name!r} at byte {offset}, {stride} B apart, is not aligned to its {part.dtype}")

    @property
    def interleaved(self) -> bool:
        """Whether an entry is one piece of memory: all its parts share one segment."""
        return len({part.segment for part in self.parts}) == 1

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry, without the page's padding."""
        return sum(part.nbytes for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens a page covers."""
        return self.ratio * self.entries

    @cached_property
    def page_bytes(self) -> int:
        """Bytes from one page to the next: the entries, rounded up to page_align."""
        return -(-self.entries * self.entry_bytes // self.page_align) * self.page_align

    def part(self, name: str) -> Part:
        """The part of that name. Raises ArgumentError if there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise ArgumentError(f"{self.name}: no part {name!r}; there are {', '.join(p.name for p in self.parts)}")

    def locate(self, name: str) -> tuple[int, int]:
        """(bytes from the page's start to entry 0's part, bytes from entry to entry)."""
        self.part(name)
        start = 0
        for _, group in groupby(self.parts, key=lambda part: part.segment):
            row = list(group)
            stride = sum(part.nbytes for part in row)
            within = 0
            for part in row:
                if part.name == name:
                    return start + within, stride
                within += part.nbytes
            start += self.entries * stride
        raise AssertionError(name)


@dataclass(frozen=True)
class KVLayout:
    """All caches of a model. Names are unique; caches of one life cycle share their page ids."""

    name: str
    caches: tuple[Cache, ...]

    def __post_init__(self) -> None:
        if len({cache.name for cache in self.caches}) < len(self.caches):
            raise ArgumentError(f"KVLayout {self.name!r}: two caches have one name")
        for cache in self.of("checkpoint"):
            state = self.cache(cache.rows_of)
            alike = state.interleaved and cache.interleaved and state.parts == cache.parts
            if state.life != "state" or state.layers != cache.layers or not alike:
                raise ArgumentError(
                    f"KVLayout {self.name!r}: {cache.name!r} keeps rows of {state.name!r}, which must be of life "
                    "'state', in the same layers, with the same parts in one segment"
                )

    def cache(self, name: str) -> Cache:
        """The cache of that name. Raises ArgumentError if there is none."""
        for cache in self.caches:
            if cache.name == name:
                return cache
        raise ArgumentError(f"KVLayout {self.name!r}: no cache {name!r}; there are {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(cache.name for cache in self.caches)

    def of(self, life: str) -> tuple[Cache, ...]:
        """The caches of one life cycle."""
        if life not in LIVES:
            raise ArgumentError(f"KVLayout {self.name!r}: life = {life!r} is none of {', '.join(LIVES)}")
        return tuple(cache for cache in self.caches if cache.life == life)

    def bytes_of(self, life: str) -> int:
        """Bytes of one page (or slot) of a life cycle, all its caches and layers together."""
        return sum(len(cache.layers) * cache.page_bytes for cache in self.of(life))

    @classmethod
    def for_model(cls, model: ModelShape, record: str = "v4", index: str = "nvfp4", max_draft: int = 0) -> KVLayout:
        """The layout of a released model.

        Args:
            model: FLASH or PRO, or another shape with compress ratios 0, 4 and 128.
            record: of KV entries: "v4", "split", "v4.1" or "v4.1-fp4".
            index: of index keys: "nvfp4", "mxfp4" or "fp8".
            max_draft: speculated tokens that may have to be taken back: rows the state rings are longer by.

        Raises:
            ArgumentError: a record, an index format, a compress ratio or a width that is not among these.
        """
        if record not in RECORDS:
            raise ArgumentError(f"KVLayout.for_model: record = {record!r} is none of {', '.join(RECORDS)}")
        if index not in INDEX_KEYS:
            raise ArgumentError(f"KVLayout.for_model: index = {index!r} is none of {', '.join(INDEX_KEYS)}")
        odd = sorted(set(model.compress_ratios) - {0, CSA_RATIO, HCA_RATIO})
        if odd:
            raise ArgumentError(f"KVLayout.for_model: {model.name} has compress ratios {odd}; 0, 4 and 128 are known")
        check_range("KVLayout.for_model", "max_draft", max_draft, 0, 1024)
        if (model.head_dim, model.rope_dim, model.index_head_dim) != (512, 64, 128):
            raise ArgumentError(
                f"KVLayout.for_model: records are 512 wide, 64 of it rotated, index keys 128; {model.name} has "
                f"{model.head_dim}, {model.rope_dim} and {model.index_head_dim}"
            )
        every = tuple(range(model.num_layers))
        csa = tuple(i for i in every if model.compress_ratios[i] == CSA_RATIO)
        hca = tuple(i for i in every if model.compress_ratios[i] == HCA_RATIO)
        compressed, compressed_align = RECORDS[record]
        window, window_align = RECORDS["v4.1" if record == "v4.1-fp4" else record]
        keys, keys_align = INDEX_KEYS[index]
        wide, narrow = 2 * model.head_dim, 2 * model.index_head_dim  # CSA overlaps: two halves a row
        csa_ring, kept = CSA_ROWS + max_draft, CHECKPOINT_ROWS
        caches = (
            Cache("csa", "full", CSA_RATIO, FULL_TOKENS // CSA_RATIO, compressed, compressed_align, csa),
            Cache("index", "full", CSA_RATIO, FULL_TOKENS // CSA_RATIO, keys, keys_align, csa),
            Cache("hca", "full", HCA_RATIO, FULL_TOKENS // HCA_RATIO, compressed, compressed_align, hca),
            Cache("window", "window", 1, WINDOW_TOKENS, window, window_align, every),
            Cache("csa_state", "state", 1, csa_ring, _state(wide), STATE_ALIGN, csa),
            Cache("index_state", "state", 1, csa_ring, _state(narrow), STATE_ALIGN, csa),
            Cache("hca_state", "state", 1, HCA_ROWS + max_draft, _state(model.head_dim), STATE_ALIGN, hca),
            Cache("csa_checkpoint", "checkpoint", 1, kept, _state(wide), STATE_ALIGN, csa, "csa_state"),
            Cache("index_checkpoint", "checkpoint", 1, kept, _state(narrow), STATE_ALIGN, csa, "index_state"),
        )
        return cls(f"{model.name}-{record}-{index}", caches)


def _state(width: int) -> tuple[Part, ...]:
    """A row of compressor state: what is pooled, and the scores it is pooled by."""
    return Part("kv", F32, (width,)), Part("score", F32, (width,))


STATE_ALIGN: Final = 128  # bytes: a cache line; rows of the released models are multiples anyway

# KV records: parts of an entry, and what the page stride must be a multiple of.
RECORDS: Final[dict[str, tuple[tuple[Part, ...], int]]] = {
    "v4": ((Part("data", _U8, (448,)), Part("rope", BF16, (64,)), Part("scales", _U8, (8,), 1)), 576),
    "split": ((Part("data", _U8, (448,)), Part("rope", BF16, (64,), 1), Part("scales", F32, (1,), 2)), 32),
    "v4.1": ((Part("data", _U8, (512,)), Part("scales", _U8, (16,), 1)), 512),
    "v4.1-fp4": ((Part("data", _U8, (256,)), Part("scales", _U8, (32,), 1)), 256),
}

# Index keys of 128 dimensions, likewise.
INDEX_KEYS: Final[dict[str, tuple[tuple[Part, ...], int]]] = {
    "nvfp4": ((Part("data", _U8, (64,)), Part("scales", _U8, (8,), 1)), 576),
    "mxfp4": ((Part("data", _U8, (64,)), Part("scales", _U8, (4,), 1)), 576),
    "fp8": ((Part("data", _U8, (128,)), Part("scales", F32, (1,), 1)), 576),
}
