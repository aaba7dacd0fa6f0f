"""The arrays of a pool that kernels are given: tables of a step, pages of a layer. None of these calls copies."""

from __future__ import annotations

from typing import Any

from dsv4_rt.errors import ArgumentError
from dsv4_rt.memory.layout import KVLayout
from dsv4_rt.memory.storage import Storage
from dsv4_rt.memory.tables import Tables


class Views:
    """Base of KVPool: what it hands to kernels. The tables' addresses never change for the pool's life."""

    layout: KVLayout
    storage: Storage
    _tables: Tables
    _alias: dict[str, str]  # cache -> the cache whose slot mapping it shares

    def slot_mapping(self, cache: str) -> Any:
        """int64 [max_tokens], on the device, always at this address: where the step's tokens go in a cache; -1 nowhere.

        Raises:
            ArgumentError: no cache of the life cycles full and window has that name.
        """
        return self._tables.device(f"slots.{self._mapped(cache)}")

    def block_table(self, cache: str) -> Any:
        """int32 [B, max_blocks], on the device, always at this address; for window caches the ring [B, width], whose
        column (p // 64) % width has position p. 0, the null page, where a row has nothing."""
        self._mapped(cache)
        return self._tables.device(self.layout.cache(cache).life)

    def _mapped(self, cache: str) -> str:
        if not isinstance(cache, str) or cache not in self._alias:
            raise ArgumentError(f"KVPool: {cache!r} has no block table; {', '.join(self._alias)} have")
        return self._alias[cache]

    @property
    def lengths(self) -> Any:
        """int32 [B], on the device, always at this address: tokens of each row."""
        return self._tables.device("lengths")

    @property
    def state_slots(self) -> Any:
        """int32 [B], on the device, always at this address: the state slot of each row; 0 without a sequence."""
        return self._tables.device("state")

    @property
    def token_rows(self) -> Any:
        """int32 [max_tokens], on the device, always at this address: the row of each of the step's tokens."""
        return self._tables.device("token_rows")

    @property
    def positions(self) -> Any:
        """int32 [max_tokens], on the device, always at this address: positions of the step's tokens, then -1."""
        return self._tables.device("positions")

    def view(self, layer: int, cache: str) -> Any:
        """[pages, page_bytes] uint8: a cache of one layer."""
        return self.storage.view(layer, cache)

    def parts(self, layer: int, cache: str) -> dict[str, Any]:
        """Named views of one layer's cache: [pages, entries, ...] a part."""
        return self.storage.parts(layer, cache)

    def records(self, layer: int, cache: str) -> Any:
        """[pages, entries, 1, entry_bytes] uint8: the form FlashMLA takes."""
        return self.storage.records(layer, cache)

    def read_indexer_view(self, layer: int) -> Any:
        """What the indexer of a layer reads."""
        return self.storage.read_indexer_view(layer)
