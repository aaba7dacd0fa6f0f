"""Asynchronous copies: what cp.async and cp.async.bulk do when they are issued, waited for and run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.memory import LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]


def bulk_load(
    batch: Batch, lanes: Array, line: int, to: Array, source: Array, size: Array, barrier: Array, generic: bool,
    masks: Array | None,
) -> None:  # fmt: skip
    """cp.async.bulk from global memory to shared memory, with complete_tx on an mbarrier beside the destination.

    masks: CTAs of the cluster that all get the bytes, at the same offsets, each reporting to its own mbarrier.
    """
    engine, what = batch.engine, "cp.async.bulk"
    source, size = np.broadcast_to(source, lanes.shape), np.broadcast_to(size, lanes.shape)
    check_bulk(what, source, size)
    for i in range(len(lanes)):
        one, nbytes, address = slice(i, i + 1), int(size[i]), int(source[i])
        if not nbytes:
            continue
        try:
            data = batch.memory.span(address, nbytes, False)
            ctas, offsets = engine.locate(lanes[one], to[one], nbytes, 16, generic, f"{what} destination")
            owners, bars = engine.locate(lanes[one], barrier[one], 8, 8, generic, f"{what} mbarrier")
            cta, offset, bar = int(ctas[0]), int(offsets[0]), int(bars[0])
            targets = [(cta, int(owners[0]))]
            if masks is not None:
                first = int(batch.cta[lanes[i]]) // batch.cluster_size * batch.cluster_size
                named = [rank for rank in range(16) if int(masks[i]) >> rank & 1]
                if not named or named[-1] >= batch.cluster_size:
                    mask = f"ctaMask {int(masks[i]):#06x} in a cluster of {batch.cluster_size}"
                    raise LaneFault(f"{what}: {mask}", np.zeros(1, np.int64))
                targets = [(first + rank, first + rank) for rank in named]
            spans = [Span(each, offset, offset + nbytes) for each, _ in targets]

            def write(got: Array, spans: list[Span] = spans) -> None:
                for span in spans:
                    engine.fill(span, got)

            engine.issue(
                Op(
                    what, line, int(lanes[i]), [], spans, data.copy, write,
                    barriers=[(batch.mbarriers.position(owner, bar), nbytes) for _, owner in targets],
                )
            )  # fmt: skip
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def check_bulk(what: str, address: Array, size: Array) -> None:
    """The rules of bulk copies: 16-byte multiples of addresses and sizes."""
    bad = np.nonzero(address & address.dtype.type(15))[0]
    if len(bad):
        raise LaneFault(f"{what}: global address {int(address[bad[0]]):#x} is not a multiple of 16", bad)
    bad = np.nonzero(size & size.dtype.type(15))[0]
    if len(bad):
        raise LaneFault(f"{what}: a size of {int(size[bad[0]])} bytes is not a multiple of 16", bad)
