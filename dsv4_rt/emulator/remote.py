"""st.async and red.async: stores and reductions into shared memory of a CTA of the cluster, told by its mbarrier."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import atomics
from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]


def store_async(
    batch: Batch, lanes: Array, line: int, to: Array, barrier: Array, values: tuple[Array, ...], size: int, op: str,
    ty: str,
) -> None:  # fmt: skip
    """One operation a lane. With `op` it combines with what is there; several such may be in flight on one word."""
    engine, kind = batch.engine, "red.async" if op else "st.async"
    ctas, offsets = engine.locate(lanes, to, size, size, False, kind)
    homes, bars = engine.locate(lanes, barrier, 8, 8, False, f"{kind} mbarrier")
    wrong = np.nonzero(ctas != homes)[0]
    if len(wrong):
        ranks = [int(each[wrong[0]]) % batch.cluster_size for each in (ctas, homes)]
        raise LaneFault(f"{kind} to rank {ranks[0]} with an mbarrier of rank {ranks[1]}, not of one CTA", wrong)
    for at, which in batch.mbarriers.each(homes * batch.shared.stride + (bars - SHARED_FIRST)):
        batch.mbarriers.find(at, lanes, which, kind)
    data = np.stack(values, 1)
    for i in range(len(lanes)):
        span = Span(int(ctas[i]), int(offsets[i]), int(offsets[i]) + size)
        position = batch.mbarriers.position(span.cta, int(bars[i]))

        def read(i: int = i) -> Array:
            return data[i]

        def write(new: Array, span: Span = span) -> None:
            if op:
                old = engine.take(span).view(new.dtype)
                new = atomics.apply(op, ty, old, (new,), False)
            engine.fill(span, np.ascontiguousarray(new).view(np.uint8))

        spans = [] if op else [span]
        try:
            engine.issue(
                Op(kind, line, int(lanes[i]), [], spans, read, write, proxy="generic", barriers=[(position, size)])
            )
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None
