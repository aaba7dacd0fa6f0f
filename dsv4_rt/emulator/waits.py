"""Where lanes wait for mbarriers: parked at mbarrier.try_wait until the phase they ask for is complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.memory import LaneFault
from dsv4_rt.emulator.report import where

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch, Key
    from dsv4_rt.emulator.ir import Instr

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Wait:
    """Lanes at one instruction: the position of each one's barrier, and the state or parity of its phase."""

    lanes: Array
    at: Array
    value: Array
    parity: bool

    def part(self, chosen: Array) -> Wait:
        return Wait(self.lanes[chosen], self.at[chosen], self.value[chosen], self.parity)

    def joined(self, other: Wait) -> Wait:
        lanes = np.concatenate([self.lanes, other.lanes])
        order = np.argsort(lanes)
        at, value = np.concatenate([self.at, other.at]), np.concatenate([self.value, other.value])
        return Wait(lanes[order], at[order], value[order], self.parity)


class Waits:
    """The waits of a batch. What lets lanes go returns the blocks they are at, and the lanes."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.parked: dict[Key, Wait] = {}

    def park(self, key: Key, sync: Instr, lanes: Array, addr: Array, value: Array) -> list[tuple[Key, Array]]:
        """Park the lanes whose phase is not complete; the others may go on."""
        generic = not any(mod.startswith("shared") for mod in sync.mods)
        try:
            at = self.batch.mbarriers.locate(lanes, addr, generic, sync.name)
        except LaneFault as error:
            raise self.batch.fault(error.what, sync, lanes[error.bad]) from None
        wait = Wait(lanes, at, value, "parity" in sync.mods)
        over = self.batch.mbarriers.over(at, value, wait.parity)
        if over.all():
            return [(key, lanes)]
        other, rest = self.parked.get(key), wait.part(~over)
        self.parked[key] = rest if other is None else other.joined(rest)
        return [(key, lanes[over])] if over.any() else []

    def wake(self) -> list[tuple[Key, Array]]:
        """Phases have completed: let those go who wait for them."""
        self.batch.mbarriers.flipped = False
        free = []
        for key, wait in list(self.parked.items()):
            over = self.batch.mbarriers.over(wait.at, wait.value, wait.parity)
            if over.any():
                free.append((key, wait.lanes[over]))
                if over.all():
                    del self.parked[key]
                else:
                    self.parked[key] = wait.part(~over)
        return free

    def expire(self) -> list[tuple[Key, Array]]:
        """Nothing else can go on: all waits return that their phase is not complete, as they may on hardware."""
        free = [(key, wait.lanes) for key, wait in self.parked.items()]
        self.parked.clear()
        return free

    def count(self, at: int) -> int:
        """How many lanes wait for the mbarrier at a position."""
        return sum(int(np.count_nonzero(wait.at == at)) for wait in self.parked.values())

    def describe(self) -> list[str]:
        """Who waits for which mbarrier, and what its phase lacks."""
        batch, lines = self.batch, []
        for key, wait in sorted(self.parked.items(), key=lambda item: item[0]):
            place = where(batch.program.ptx, batch.program.blocks[key[1]].sync, batch.machine.source_roots, "    ")
            for at in np.unique(wait.at).tolist():
                lanes = wait.lanes[wait.at == at]
                cta, thread = batch.thread(int(lanes[0]))
                lines.append(f"  {len(lanes)} threads, first CTA {cta} thread {thread}, wait at{place}")
                barrier = batch.mbarriers.live.get(at)
                value = int(wait.value[wait.at == at][0])
                asked = f"parity {value & 1}" if wait.parity else f"phase {value >> 20}"
                state = barrier.describe() if barrier is not None else "not initialised"
                lines.append(f"    for {asked} of {batch.mbarriers.name(at)}: {state}")
                if barrier is not None:
                    lines.append(f"    it was initialised at{batch.engine.place(barrier.line)}")
        return lines
