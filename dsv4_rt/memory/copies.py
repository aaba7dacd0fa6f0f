"""Copies that were decided but not yet carried out: copy on write, forked state, checkpoints saved and restored.

A copy runs at the next upload, before the kernels of the step. Until then its source is pinned, so that nobody can
be given the page; a copy whose destination has no holder any more is forgotten. Sources are resolved when the copy
is decided (a fork of a fork reads the first one), so that within one batch nothing is both read and written, except
where a checkpoint is saved and restored in the same step: restores of those run in a second batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsv4_rt.memory.pages import Ints, Pages


@dataclass(frozen=True)
class Batch:
    """Copies that may run in any order, int32, as Storage.copy takes them."""

    whole: dict[str, Ints]  # life cycle -> [n, 2] source, target
    save: Ints | None  # [n, 3] state slot, checkpoint slot, boundary
    restore: Ints | None  # [n, 3] checkpoint slot, state slot, boundary


class Copies:
    """The pending copies of a pool. `lives` are its pages; every method but `batches` changes pins.

    `fence` is the newest step in flight, 0 if there is none: what is let go now waits for its end. The pool sets it.
    """

    def __init__(self, lives: Mapping[str, Pages]) -> None:
        self._lives = lives
        self.fence = 0
        self.whole: dict[str, dict[int, int]] = {"full": {}, "window": {}, "state": {}}  # destination -> source
        self.saves: dict[int, tuple[int, int]] = {}  # checkpoint slot -> (state slot, boundary)
        self.restores: dict[int, tuple[int, int]] = {}  # state slot -> (checkpoint slot, boundary)

    def __bool__(self) -> bool:
        return bool(self.restores or self.saves or any(self.whole.values()))

    def copy(self, life: str, source: int, target: int) -> None:
        """A whole page or slot. A state slot that is itself yet to be restored is restored twice instead."""
        if life == "state" and source in self.restores:
            self.restore(self.restores[source][0], target, self.restores[source][1])
            return
        pending = self.whole[life]
        source = pending.get(source, source)
        self._pin(life, source)
        pending[target] = source

    def save(self, state: int, slot: int, boundary: int) -> None:
        """The rows of the state before `boundary` into a checkpoint slot."""
        state = self.whole["state"].get(state, state)
        self._pin("state", state)
        self.saves[slot] = state, boundary

    def restore(self, slot: int, state: int, boundary: int) -> None:
        """A checkpoint slot into the rows of a state before `boundary`."""
        self._pin("checkpoint", slot)
        self.restores[state] = slot, boundary

    def abandon(self, life: str, targets: Ints) -> None:
        """Nobody holds these pages or slots any more: copies into those that are not kept either are not needed."""
        targets = targets[~self._lives[life].keep[targets]]  # an idle checkpoint still has to be saved
        if life in self.whole and self.whole[life]:
            for target in targets.tolist():
                if (source := self.whole[life].pop(target, None)) is not None:
                    self._unpin(life, source)
        if life == "state" and self.restores:
            for target in targets.tolist():
                if target in self.restores:
                    self._unpin("checkpoint", self.restores.pop(target)[0])
        if life == "checkpoint" and self.saves:
            for target in targets.tolist():
                if target in self.saves:
                    self._unpin("state", self.saves.pop(target)[0])

    def batches(self) -> list[Batch]:
        """What has to be copied, in order. Within a batch nothing is read and written, or written twice."""
        whole = {
            life: np.array([(s, t) for t, s in pairs.items()], np.int32) for life, pairs in self.whole.items() if pairs
        }
        saves = [(state, slot, at) for slot, (state, at) in self.saves.items()]
        ready = [(slot, state, at) for state, (slot, at) in self.restores.items() if slot not in self.saves]
        later = [(slot, state, at) for state, (slot, at) in self.restores.items() if slot in self.saves]
        batches = []
        if whole or saves or ready:
            batches.append(Batch(whole, _triples(saves), _triples(ready)))
        if later:
            batches.append(Batch({}, None, _triples(later)))
        return batches

    def done(self) -> None:
        """All of them have been carried out."""
        read = [(life, source) for life, pairs in self.whole.items() for source in pairs.values()]
        read += [("state", state) for state, _ in self.saves.values()]
        read += [("checkpoint", slot) for slot, _ in self.restores.values()]
        for pairs in self.whole.values():
            pairs.clear()
        self.saves.clear()
        self.restores.clear()
        for life, page in read:
            self._unpin(life, page)

    def _pin(self, life: str, page: int) -> None:
        pages = self._lives[life]
        pages.share(np.array([page], np.int32))
        pages.pins[page] += 1

    def _unpin(self, life: str, page: int) -> None:
        pages = self._lives[life]
        pages.pins[page] -= 1
        self.abandon(life, pages.drop(np.array([page], np.int32), self.fence))


def _triples(rows: list[tuple[int, int, int]]) -> Ints | None:
    return np.array(rows, np.int32) if rows else None
