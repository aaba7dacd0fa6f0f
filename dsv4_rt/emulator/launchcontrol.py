"""Which CTAs of a launch have not begun, and clusterlaunchcontrol, by which a running CTA takes over the work of one.

try_cancel asks that the next cluster be cancelled; what becomes of it is written to shared memory asynchronously and
told by an mbarrier. A kernel that asks finds both answers here: its launch begins with a quarter of the grid's clusters
(under the random schedule with any number), requests take the clusters that follow, in order, until none is left, and
those that nobody has cancelled begin when the first are done. Under the random schedule some requests fail although
there are clusters left, as they do on hardware when something else wants the SM.

The response is opaque: here x, y and z of the cluster's first CTA, and a word that says whether there is one.

Source: PTX ISA, "clusterlaunchcontrol.try_cancel" and ".query_cancel".
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.clusters import ctaid
from dsv4_rt.emulator.memory import LaneFault

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
NBYTES = 16  # of a response
KIND = "clusterlaunchcontrol.try_cancel"
_FAILED, _CANCELLED = 0x5EED0000, 0x5EED0001  # the last word of a response


class Pool:
    """The CTAs of a launch that have not begun: the numbers from `lo` to before `hi`, whole clusters."""

    def __init__(self, ctas: int, cluster: int, backwards: bool) -> None:
        self.lo, self.hi, self.cluster, self.backwards = 0, ctas, cluster, backwards

    def __bool__(self) -> bool:
        return self.lo < self.hi

    def begin(self, most: int) -> tuple[int, int]:
        """(first, how many) of the CTAs that begin now."""
        count = min(most, self.hi - self.lo)
        if self.backwards:
            self.hi -= count
            return self.hi, count
        self.lo += count
        return self.lo - count, count

    def cancel(self) -> int | None:
        """The first CTA of a cluster that will not begin; None if there is none."""
        return self.begin(self.cluster)[0] if self else None


def resident(clusters: int, completion: str, dice: random.Random) -> int:
    """How many clusters of a launch that cancels run at the same time."""
    return dice.randint(1, clusters) if completion == "random" else -(-clusters // 4)


def try_cancel(
    batch: Batch, lanes: Array, line: int, to: Array, barrier: Array, generic: bool, everywhere: bool
) -> None:  # fmt: skip
    """clusterlaunchcontrol.try_cancel of each of these threads.

    everywhere: every CTA of the cluster gets the response at the same offset, and its mbarrier is told.
    """
    engine, here = batch.engine, np.zeros(1, np.int64)
    for i in range(len(lanes)):
        one, cta = slice(i, i + 1), int(batch.cta[lanes[i]])
        try:
            if cta in batch.refused:
                raise LaneFault(f"{KIND} after this CTA has learnt that one failed: no other may follow", here)
            owners, offsets = engine.locate(lanes[one], to[one], NBYTES, NBYTES, generic, KIND)
            homes, bars = engine.locate(lanes[one], barrier[one], 8, 8, generic, f"{KIND} mbarrier")
            if int(owners[0]) != cta or int(homes[0]) != cta:
                raise LaneFault(f"{KIND}: response and mbarrier must lie in the CTA's own shared memory", here)
            first = cta - cta % batch.cluster_size
            targets = range(first, first + batch.cluster_size) if everywhere else (cta,)
            spans, barriers = [], []
            for each in targets:
                if batch.clusters is not None:
                    batch.clusters.touch(lanes[one], np.array([each]), line)
                at = batch.mbarriers.position(each, int(bars[0]))
                batch.mbarriers.find(at, lanes[one], slice(None), KIND)
                spans.append(Span(each, int(offsets[0]), int(offsets[0]) + NBYTES))
                barriers.append((at, NBYTES))

            def write(response: Array, spans: list[Span] = spans) -> None:
                for span in spans:
                    engine.fill(span, response)

            engine.issue(
                Op(KIND, line, int(lanes[i]), [], spans, lambda: _response(batch), write, barriers=barriers)
            )  # fmt: skip
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def _response(batch: Batch) -> Array:
    engine = batch.engine
    unwilling = engine.completion == "random" and engine.dice.random() < 0.125
    first = None if batch.pool is None or unwilling else batch.pool.cancel()
    if first is None:
        words = [0, 0, 0, _FAILED]
    else:
        words = [*ctaid(first, batch.shape.grid, batch.shape.cluster), _CANCELLED]
        batch.report.cancelled += batch.cluster_size
    return np.array(words, np.uint32).view(np.uint8)


def _words(response: Array) -> Array:
    """[lanes, 4] words of responses, which must be such."""
    words = np.ascontiguousarray(response).view(np.uint32).reshape(-1, 4)
    wrong = np.nonzero((words[:, 3] != _CANCELLED) & (words[:, 3] != _FAILED))[0]
    if len(wrong):
        raise LaneFault("clusterlaunchcontrol.query_cancel of 16 bytes that are no response of try_cancel", wrong)
    return words


def is_canceled(batch: Batch, lanes: Array, response: Array) -> Array:
    """clusterlaunchcontrol.query_cancel.is_canceled."""
    found = _words(response)[:, 3] == _CANCELLED
    batch.refused.update(np.unique(batch.cta[lanes[~np.broadcast_to(found, lanes.shape)]]).tolist())
    return np.asarray(found)


def first_ctaid(response: Array, axis: int) -> Array:
    """clusterlaunchcontrol.query_cancel.get_first_ctaid::x, ::y, ::z, of requests that have succeeded."""
    words = _words(response)
    failed = np.nonzero(words[:, 3] == _FAILED)[0]
    if len(failed):
        raise LaneFault("clusterlaunchcontrol.query_cancel.get_first_ctaid of a request that failed", failed)
    return np.ascontiguousarray(words[:, axis])
