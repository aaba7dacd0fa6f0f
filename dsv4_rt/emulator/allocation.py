"""Where warps wait at tcgen05.alloc and dealloc: for free columns of tensor memory, and for the other CTA of a pair.

With cta_group::2 a warp of each of the two CTAs must come; then both get the same columns, or give them back. Columns
are granted when a warp may go on: of several that wait and fit, the first to come is the first served. Those that ask
for something wrong go on at once, to the fault. The CTAs of one SM share its columns, see `Machine.ctas_per_sm`.

Source: PTX ISA, "tcgen05.alloc": it blocks while columns are short; with cta_group::2 the two CTAs do it collectively,
and the issuing warp must make sure that the peer has been launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import collective
from dsv4_rt.emulator.memory import LaneFault
from dsv4_rt.emulator.report import where
from dsv4_rt.emulator.tmem import COLUMNS, GRANULE

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch, Key
    from dsv4_rt.emulator.ir import Instr

Array = npt.NDArray[Any]


@dataclass(slots=True, eq=False)
class Request:
    """A warp at an alloc (`columns` wanted) or a dealloc."""

    key: Key
    sync: Instr
    lanes: Array
    cta: int
    columns: int
    allocates: bool
    paired: bool


class Columns:
    """The warps of a batch that wait for tensor memory."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.parked: dict[Key, Array] = {}  # lanes of warps that have not come whole
        self.queue: list[Request] = []
        self.granted: dict[int, int] = {}  # warp -> first of the columns its alloc gets
        self.changed = False  # whether columns have been freed since anybody looked

    @property
    def waited_for(self) -> bool:
        """Whether somebody waits."""
        return bool(self.parked or self.queue)

    def come(self, key: Key, sync: Instr, lanes: Array) -> list[tuple[Key, Array]]:
        """Lanes have come to an alloc or dealloc; returns the blocks at which somebody may go on, and the lanes."""
        batch = self.batch
        old = self.parked.pop(key, None)
        if old is not None:
            lanes = np.sort(np.concatenate([old, lanes]))
        whole = collective.complete(batch.nlanes, lanes, np.full(len(lanes), 0xFFFFFFFF, np.uint32), batch.alive)
        if not whole.all():
            self.parked[key] = lanes[~whole]
        lanes = lanes[whole]
        counts = batch._operand(key, sync.args[1], lanes)
        for warp in np.unique(lanes >> 5).tolist():
            mine = lanes >> 5 == warp
            cta = int(batch.cta[warp << 5])
            paired = "cta_group::2" in sync.mods
            self.queue.append(Request(key, sync, lanes[mine], cta, int(counts[mine][0]), "alloc" in sync.mods, paired))
        return self.release()

    def release(self) -> list[tuple[Key, Array]]:
        """Let those go on for whom there are columns and, with cta_group::2, the other CTA's warp."""
        self.changed = False
        free: list[tuple[Key, Array]] = []
        for each in list(self.queue):
            if each not in self.queue:
                continue
            partner = self._partner(each) if each.paired and not self.batch.cluster_size % 2 else each
            if partner is None:
                continue
            ctas = sorted({each.cta, partner.cta})
            wrong = each.columns != partner.columns or any(self._wrong(cta, each) for cta in ctas)
            if each.allocates and not wrong:
                base = self.room(ctas, each.columns)
                if base is None:
                    continue
                for cta in ctas:
                    self.batch.tmem.slab(cta).taken[base : base + each.columns] = True
                self.granted[int(each.lanes[0]) >> 5] = self.granted[int(partner.lanes[0]) >> 5] = base
            for one in {id(each): each, id(partner): partner}.values():
                self.queue.remove(one)
                free.append((one.key, one.lanes))
        return free

    def _partner(self, mine: Request) -> Request | None:
        """The warp of the other CTA of the pair that has come to the same kind of instruction."""
        for each in self.queue:
            if each.cta == mine.cta ^ 1 and each.paired and each.allocates == mine.allocates:
                return each
        return None

    def _wrong(self, cta: int, request: Request) -> bool:
        """Whether an alloc cannot be granted however long it waits, and will say so itself."""
        n = request.columns
        return n not in (32, 64, 128, 256, 512) or bool(self.batch.tmem.slab(cta).relinquished)

    def room(self, ctas: list[int], count: int) -> int | None:
        """The highest place at which columns in a row are free in the tensor memory of all these CTAs."""
        slabs = [self.batch.tmem.slab(cta) for cta in ctas]
        for base in range(COLUMNS - count, -1, -GRANULE):
            if not any(slab.taken[base : base + count].any() for slab in slabs):
                return base
        return None

    def grant(self, lanes: Array, count: int, bad: Array) -> int:
        """The columns that a warp's alloc has been granted."""
        base = self.granted.pop(int(lanes[0]) >> 5, None)
        if base is None:
            raise LaneFault(f"tcgen05.alloc.cta_group::2 of {count} columns; the other CTA's asks for others", bad)
        return base

    def check_pair(self, what: str, lanes: Array, bad: Array) -> int:
        """The even CTA of the pair that lanes of one CTA belong to; there must be one, known to have begun."""
        batch = self.batch
        if batch.cluster_size % 2:
            explicit = batch.shape.explicit_cluster
            how = f"with clusters of {batch.cluster_size} CTAs" if explicit else "without clusters"
            what = f"{what} in a launch {how}: a pair is two CTAs of a cluster whose ranks differ in the last bit"
            raise LaneFault(what, bad)
        cta = int(batch.cta[lanes[0]])
        return cta & ~1

    def check_leader(self, what: str, lanes: Array, bad: Array) -> None:
        """What a thread issues for a pair, a thread of the even CTA must."""
        cta = int(self.batch.cta[lanes[0]])
        if cta != self.check_pair(what, lanes, bad):
            rank = cta % self.batch.cluster_size
            raise LaneFault(
                f"{what} issued by the odd CTA of the pair, rank {rank} of the cluster; a thread of the even one, rank "
                f"{rank - 1}, issues for both",
                bad,
            )

    def check_begun(self, what: str, lanes: Array, bad: Array) -> None:
        """Something must tell a CTA that the other one of its pair runs: a cluster barrier, or an mbarrier."""
        batch, races = self.batch, self.batch.races
        cta = int(batch.cta[lanes[0]])
        first = (cta ^ 1) % batch.cluster_size * races.warps
        rows = slice(cta * races.warps, (cta + 1) * races.warps)
        if races.seen is None or not races.seen[rows, first : first + races.warps].any():
            raise LaneFault(
                f"{what}: nothing tells that CTA {batch.cta_name(cta ^ 1)}, the other of the pair, has begun: a "
                "cluster barrier before it does",
                bad,
            )

    def describe(self) -> list[str]:
        """Who waits, and what for, for the deadlock report."""
        batch, lines = self.batch, []
        for key, lanes in sorted(self.parked.items()):
            cta, thread = batch.thread(int(lanes[0]))
            place = where(batch.program.ptx, batch.program.blocks[key[1]].sync, batch.machine.source_roots, "    ")
            lines.append(f"  {len(lanes)} threads, first CTA {cta} thread {thread}, wait at{place}")
            lines.append("    for the other threads of their warp")
        for each in self.queue:
            cta, thread = batch.thread(int(each.lanes[0]))
            place = where(batch.program.ptx, each.sync, batch.machine.source_roots, "    ")
            lines.append(f"  {len(each.lanes)} threads, first CTA {cta} thread {thread}, wait at{place}")
            lines.append(f"    for {self._lacking(each)}")
        return lines

    def _lacking(self, request: Request) -> str:
        batch = self.batch
        if request.paired and self._partner(request) is None:
            left = "" if batch.alive[batch.cta == request.cta ^ 1].any() else ", which has exited"
            return f"a warp of CTA {batch.cta_name(request.cta ^ 1)}, the other of the pair{left}"
        ctas = [request.cta, request.cta ^ 1] if request.paired else [request.cta]
        slabs = [batch.tmem.slab(cta) for cta in ctas]
        short = max(slabs, key=lambda slab: int(slab.taken.sum()))
        sharers = [cta for cta, slab in batch.tmem.slabs.items() if slab.taken is short.taken]
        held = "; ".join(
            f"{n} columns of CTA {batch.cta_name(cta)} by{batch.engine.place(line)}"
            for cta in sharers
            for n, line in batch.tmem.slab(cta).live.values()
        )
        return (
            f"{request.columns} columns in a row: {int(short.taken.sum())} of {COLUMNS} are allocated; held: "
            f"{held or 'none'}"
        )
