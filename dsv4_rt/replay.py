"""Launches that come again with the same addresses, as CUDA graphs: one call of the driver instead of one a kernel.

A call of Router that takes cuBLAS and a kernel behind it costs the host 15 to 22 us, replayed from a graph 3.5 to 5.5
(bench/results/h200-router.txt, host and new). Arrays that lie where they lay, as those of an allocator with a cache do,
are replayed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv4_rt.arrays import View
from dsv4_rt.cuda_device import CudaDevice
from dsv4_rt.operation import Launch

# Recording takes 0.12 ms (H200), ten times what it saves a call: a launch has to come this often first.
CALLS_BEFORE = 8
# Addresses that are counted or recorded at once, since each graph takes memory of the driver's; the ones used least
# recently go. More than these in turn are never recorded, so nobody pays for recordings that are not used.
MOST = 64


@dataclass(slots=True)
class _Seen:
    calls: int = 0
    replay: Callable[[int], None] | None = None


class Replays:
    """The graphs of one owner's launches.

    Nothing is recorded or replayed into a stream that is being captured: a caller's graph has the kernels themselves.
    """

    def __init__(self, on: CudaDevice) -> None:
        self._device = on
        self._seen: OrderedDict[tuple[int, ...], _Seen] = OrderedDict()
        self._lock = threading.Lock()
        self._wrapped = 0

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(each.replay is not None for each in self._seen.values())

    def clear(self) -> None:
        """Forget everything: what was recorded has addresses that are no longer valid."""
        with self._lock:
            self._seen.clear()

    def wrap(self, launch: Launch) -> Launch:
        """The same launch, replayed where that is possible. It must do the same work whenever the addresses are."""
        self._wrapped += 1
        return _Replayed(self, launch, self._wrapped)

    def launch(self, behind: Launch, key: tuple[int, ...], pointers: Sequence[int], stream: int) -> None:
        """`behind.launch(pointers, stream)`, or a replay of it."""
        on = self._device
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = _Seen()
                if len(self._seen) > MOST:
                    self._seen.popitem(last=False)
            else:
                self._seen.move_to_end(key)
            seen.calls += 1
            if seen.calls > CALLS_BEFORE and not on.is_capturing(stream):
                if seen.replay is None:
                    seen.replay = on.record(lambda recording: behind.launch(pointers, recording))
                seen.replay(stream)
                return
        behind.launch(pointers, stream)


class _Replayed:
    def __init__(self, replays: Replays, behind: Launch, number: int) -> None:
        self._replays, self._behind, self._number = replays, behind, number

    def launch(self, pointers: Sequence[int], stream: int = 0, views: Sequence[View] = ()) -> None:
        self._replays.launch(self._behind, (self._number, *pointers), pointers, stream)
