"""The arrays of the pool: one contiguous uint8 [layers, pages, page_bytes] a cache, views into it, copies within it.

Alignment: every array begins at a multiple of 256 B; strides between layers and pages are what the layout says,
multiples of 16 B (64 B with `v4`, whose page stride is a multiple of 576). Page 0 and slot 0 of every life cycle are
zeroed and stay so: reading them is always legal and finite. All other pages begin with whatever was in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsv4_rt.arrays import I32, view
from dsv4_rt.checks import check_range
from dsv4_rt.device import Device
from dsv4_rt.device import device as current_device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.memory.layout import CHECKPOINT_ROWS, LIVES, Cache, KVLayout
from dsv4_rt.memory.ops import CopyPages, Piece
from dsv4_rt.memory.staging import Staging, resolve_stream

BASE_ALIGN: Final = 256  # bytes: of every array

Pairs = NDArray[np.int32]


class Storage:
    """Pages of every cache of a layout, on a device.

    Args:
        layout: the caches.
        device: where; None is the current device.
        counts: pages by life cycle, the null page included: at least 1 for every life cycle that has caches.
        staging: how many calls of `copy` may be in flight before one waits.

    Raises:
        ArgumentError: a life cycle without a count, a count that int32 slots cannot address, state rows that are no
            multiple of 16 B, or checkpointed rings of different lengths.
    """

    def __init__(self, layout: KVLayout, device: Device | None, counts: Mapping[str, int], staging: int = 2) -> None:
        self.layout = layout
        self.device = device or current_device()
        unknown = set(counts) - set(LIVES)
        if unknown:
            raise ArgumentError(f"Storage: counts for {sorted(unknown)}; the life cycles are {', '.join(LIVES)}")
        given = {life: counts.get(life, None if layout.of(life) else 1) for life in LIVES}
        self.counts = {life: check_range("Storage", f"counts[{life!r}]", n, 1, 2**31 - 1) for life, n in given.items()}
        for cache in layout.caches:
            slots = self.counts[cache.life] * cache.entries
            if slots >= 2**31:
                raise ArgumentError(f"Storage: {slots} entries of {cache.name!r}; kernels address them by int32")
        self._layer = {cache.name: {layer: i for i, layer in enumerate(cache.layers)} for cache in layout.caches}
        self._rings = {layout.cache(cache.rows_of).entries for cache in layout.of("checkpoint")}
        if len(self._rings) > 1:
            raise ArgumentError(f"Storage: checkpoints of rings of {sorted(self._rings)} rows; one length is wanted")
        self._arrays = {cache.name: self._allocate(cache) for cache in layout.caches}
        self._copy_pages = CopyPages(self.device, self._kinds(), Staging(self.device, staging))

    def _allocate(self, cache: Cache) -> Any:
        array = self.device.empty((len(cache.layers), self.counts[cache.life], cache.page_bytes), np.uint8)
        array[:, 0] = 0
        if array.size and view(array).ptr % BASE_ALIGN:
            raise ArgumentError(f"Storage: {cache.name!r} was allocated at {view(array).ptr:#x}, no multiple of 256 B")
        return array

    def _kinds(self) -> dict[str, list[Piece]]:
        """What each kind of copy moves: whole pages of a life cycle, or checkpointed rows out of and into a ring."""
        arrays = self._arrays
        kinds = {
            life: [Piece(arrays[c.name], arrays[c.name], c.page_bytes) for c in self.layout.of(life)] for life in LIVES
        }
        kept = self.layout.of("checkpoint")
        kinds["save"] = [Piece(arrays[c.rows_of], arrays[c.name], c.entry_bytes, c.entry_bytes) for c in kept]
        kinds["restore"] = [Piece(arrays[c.name], arrays[c.rows_of], c.entry_bytes, c.entry_bytes) for c in kept]
        return kinds

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.counts[life] * self.layout.bytes_of(life) for life in LIVES)

    # Views. None copies, all keep the array alive and go out by DLPack (NumPy has no bfloat16 there: view as uint16).

    def array(self, cache: str) -> Any:
        """[layers, pages, page_bytes] uint8, contiguous: all of a cache, layers in the order of its `layers`."""
        self.layout.cache(cache)
        return self._arrays[cache]

    def view(self, layer: int, cache: str) -> Any:
        """[pages, page_bytes] uint8: a cache of one layer of the model. ArgumentError if the layer has none."""
        array = self.array(cache)
        try:
            return array[self._layer[cache][layer]]
        except KeyError:
            has = ", ".join(map(str, self.layout.cache(cache).layers))
            raise ArgumentError(f"Storage: layer {layer!r} has no {cache!r}; layers {has} have") from None

    def parts(self, layer: int, cache: str) -> dict[str, Any]:
        """Named views of every part: [pages, entries, *shape] in the part's dtype, strided."""
        c, base = self.layout.cache(cache), self.view(layer, cache)
        found = {}
        for part in c.parts:
            offset, stride = c.locate(part.name)
            inner = np.empty(part.shape, part.dtype).strides
            shape = (self.counts[c.life], c.entries, *part.shape)
            found[part.name] = _window(base, shape, part.dtype, offset, (c.page_bytes, stride, *inner))
        return found

    def records(self, layer: int, cache: str) -> Any:
        """[pages, entries, 1, entry_bytes] uint8, page_bytes from page to page: the form FlashMLA takes ([..., 584]).

        Rows of it are no entries unless the layout is interleaved: a kernel that takes this form knows the page.
        """
        c, base = self.layout.cache(cache), self.view(layer, cache)
        shape = (self.counts[c.life], c.entries, 1, c.entry_bytes)
        return _window(base, shape, np.dtype(np.uint8), 0, (c.page_bytes, c.entry_bytes, c.entry_bytes, 1))

    def read_indexer_view(self, layer: int) -> Any:
        """What the indexer of a layer reads: `records` of its index keys, the form DeepGEMM's paged logits take."""
        return self.records(layer, "index")

    # Copies.

    def copy(
        self,
        copies: Mapping[str, Pairs] | None = None,
        *,
        save: NDArray[np.int32] | None = None,
        restore: NDArray[np.int32] | None = None,
        stream: Any = None,
    ) -> int:
        """Copy pages, and rows between state rings and checkpoints, in one launch.

            copies[life] = (src, dst)            page dst <- page src, every cache and layer of that life cycle
            save         = (state, checkpoint, L)  row i of the checkpoint <- row (L - 4 + i) % ring of the state, i < 4
            restore      = (checkpoint, state, L)  the other way

        All happen at once: no page may be written twice, or both read and written, by one call. Page 0 may be read,
        which zeroes what it is copied to; it is never written. Kernels on other streams are the caller's to order.

        Args:
            copies: int32 [n, 2] by life cycle.
            save: int32 [n, 3]; L is a position that 4 divides, at least 4: the rows before it are kept.
            restore: int32 [n, 3], likewise.
            stream: the stream to work on; the caller's current stream if None. Never synchronises, unless all staging
                buffers are still being read.

        Returns:
            Bytes copied; 0 without a launch if there is nothing to do.

        Raises:
            ArgumentError: a page that does not exist or is null, a page in conflict, another dtype or shape.
            LaunchError: the stream is being captured.
            Nothing has been copied then.
        """
        handle = resolve_stream("Storage.copy", self.device, stream)
        records: dict[str, NDArray[np.int32]] = {}
        reads: dict[str, list[NDArray[np.int32]]] = {}
        writes: dict[str, list[NDArray[np.int32]]] = {}
        for life, given in (copies or {}).items():
            if life not in LIVES:
                raise ArgumentError(f"Storage.copy: life = {life!r} is none of {', '.join(LIVES)}")
            pairs = _rows(f"copies[{life!r}]", given, 2)
            if len(pairs):
                records[life] = _records(pairs[:, 0], pairs[:, 1])
                reads[life], writes[life] = [pairs[:, 0]], [pairs[:, 1]]
        for name, moved, source, target in (
            ("save", save, "state", "checkpoint"),
            ("restore", restore, "checkpoint", "state"),
        ):
            if moved is not None and len(_rows(name, moved, 3)):
                self._check_positions(name, moved[:, 2])
                records[name] = self._row_records(moved, ring_is_source=source == "state")
                reads.setdefault(source, []).append(moved[:, 0])
                writes.setdefault(target, []).append(moved[:, 1])
        for life in reads.keys() | writes.keys():
            read, written = reads.get(life, []), writes.get(life, [])
            _check_pages(life, read + written, self.counts[life])
            _check_conflicts(life, read, written)
        return self._copy_pages(records, handle)

    def _check_positions(self, name: str, L: NDArray[np.int32]) -> None:
        if not self._rings:
            raise ArgumentError(f"Storage.copy: layout {self.layout.name!r} has no checkpoint caches")
        if ((L < CHECKPOINT_ROWS) | (L % CHECKPOINT_ROWS != 0)).any():
            raise ArgumentError(
                f"Storage.copy: {name} has positions {L.tolist()}; multiples of {CHECKPOINT_ROWS} are wanted, at least "
                f"{CHECKPOINT_ROWS}"
            )

    def _row_records(self, moved: NDArray[np.int32], *, ring_is_source: bool) -> NDArray[np.int32]:
        """(from, to, L) -> a record for each of the rows L - 4 .. L - 1."""
        (ring,) = self._rings
        i = np.arange(CHECKPOINT_ROWS, dtype=np.int32)
        in_ring = (moved[:, 2:] - CHECKPOINT_ROWS + i) % ring
        in_checkpoint = np.broadcast_to(i, in_ring.shape)
        source, target = np.repeat(moved[:, 0], CHECKPOINT_ROWS), np.repeat(moved[:, 1], CHECKPOINT_ROWS)
        first, second = (in_ring, in_checkpoint) if ring_is_source else (in_checkpoint, in_ring)
        return _records(source, target, first.reshape(-1), second.reshape(-1))


def _records(
    source: NDArray[np.int32], target: NDArray[np.int32], source_row: Any = 0, target_row: Any = 0
) -> NDArray[np.int32]:
    records = np.empty((len(source), 4), np.int32)
    records[:, 0], records[:, 1], records[:, 2], records[:, 3] = source, target, source_row, target_row
    return records


def _rows(name: str, given: Any, width: int) -> NDArray[np.int32]:
    if not isinstance(given, np.ndarray) or given.dtype != I32 or given.ndim != 2 or given.shape[1] != width:
        what = f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__
        raise ArgumentError(f"Storage.copy: {name} is {what}; a NumPy int32 [n, {width}] is wanted")
    return given


def _check_pages(life: str, used: list[NDArray[np.int32]], pages: int) -> None:
    for given in used:
        if given.min() < 0 or given.max() >= pages:
            raise ArgumentError(f"Storage.copy: {life} pages must be from 0 to {pages - 1}")


def _check_conflicts(life: str, reads: list[NDArray[np.int32]], writes: list[NDArray[np.int32]]) -> None:
    """Refuse writes to the null page, and pages whose content would depend on the order of the copies."""
    written = [page for each in writes for page in each.tolist()]
    once = set(written)
    if 0 in once:
        raise ArgumentError(f"Storage.copy: {life} page 0 is the null page, it is never written")
    clash = once.intersection(page for each in reads for page in each.tolist())
    if len(once) < len(written):
        clash |= {page for page in once if written.count(page) > 1}
    if clash:
        raise ArgumentError(
            f"Storage.copy: {life} page {min(clash)} is written twice, or read and written, in one call; all copies of "
            "a call happen at once: make two calls"
        )


def _window(base: Any, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int, strides: tuple[int, ...]) -> Any:
    """A strided array over the bytes of `base` from `offset` on; keeps base alive."""
    if isinstance(base, np.ndarray):
        return np.ndarray(shape, dtype, base, offset, strides)
    import cupy

    return cupy.ndarray(shape, dtype, base.data + offset, strides)
