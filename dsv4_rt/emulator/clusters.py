"""Clusters: which CTAs make one, their shared memory as they see it of one another, and the cluster barrier.

The CTAs of a cluster are neighbours in a batch: cluster by cluster, within a cluster by rank. A cluster covers a box of
`cluster` CTAs of the grid, rank = x + y * nx + z * nx * ny of the place in the box, as an H200 numbers them.

An address of shared memory has the rank of the CTA that owns it from bit 24 on, also a CTA's own addresses, as an H200
forms them; programs that mask or shift addresses see that. A launch without clusters has rank 0 everywhere.

Remote accesses are checked: the rank exists, the owner has not exited, and before the owner exits it has learnt that
the access is over. For the last, everything by which a thread of the owner may have learnt of it counts: a cluster
barrier, a wait on an mbarrier, or a load that acquires, after the access.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import collective
from dsv4_rt.emulator.ir import is_cluster_wait
from dsv4_rt.emulator.memory import SHARED_WINDOW, LaneFault, LaneMemory
from dsv4_rt.emulator.report import Triple, where

if TYPE_CHECKING:
    from dsv4_rt.emulator.async_ import Op
    from dsv4_rt.emulator.batch import Batch, Group
    from dsv4_rt.emulator.ir import Instr

Array = npt.NDArray[Any]
I64, U32, U64 = np.int64, np.uint32, np.uint64
RANK_BIT = 24  # of shared addresses
MAX_CLUSTER = 16  # CTAs; more than 8 are not portable, but an H200 has them
OFFSET = (1 << RANK_BIT) - 1


def split(index: Any, sizes: Triple) -> tuple[Any, Any, Any]:
    """x, y and z of a number that counts x first; of one index or of an array."""
    return index % sizes[0], index // sizes[0] % sizes[1], index // (sizes[0] * sizes[1])


def ctaid(index: Any, grid: Triple, cluster: Triple) -> tuple[Any, Any, Any]:
    """The place in the grid of the index-th CTA of a launch, counted cluster by cluster; of one or of an array."""
    if cluster == (1, 1, 1):
        return split(index, grid)
    size = cluster[0] * cluster[1] * cluster[2]
    outer: Triple = (grid[0] // cluster[0], grid[1] // cluster[1], grid[2] // cluster[2])
    major, minor = split(index // size, outer), split(index % size, cluster)
    return (
        major[0] * cluster[0] + minor[0], major[1] * cluster[1] + minor[1], major[2] * cluster[2] + minor[2]
    )  # fmt: skip



def map_address(address: Array, rank: Array) -> Array:
    """mapa: the rank replaced, in a shared or a generic address. A rank that no CTA has shows when it is accessed."""
    ty = address.dtype.type
    found: Array = (address & ~ty(0xFF << RANK_BIT)) | (rank.astype(address.dtype) & ty(0xFF)) << ty(RANK_BIT)
    return found


def rank_of(address: Array) -> Array:
    """getctarank: the rank in a shared or in a generic address."""
    return np.asarray((address >> address.dtype.type(RANK_BIT)).astype(U32) & U32(0xFF))


def is_own(address: Array, rank_bits: Array) -> Array:
    """isspacep.shared::cta: whether a generic address lies in the shared memory of the thread's own CTA."""
    window = U64(SHARED_WINDOW >> RANK_BIT)
    return np.asarray((address >> U64(RANK_BIT)) == window + (rank_bits >> U32(RANK_BIT)))


class Clusters:
    """The clusters of a batch: who has arrived at the barrier, and which remote accesses nobody has waited for."""

    def __init__(self, batch: Batch, size: int) -> None:
        self.batch, self.size = batch, size
        self.of = batch.cta // size  # cluster of a lane
        self.count = batch.count // size
        self.phase = np.zeros(self.count, I64)  # completed phases of the barrier
        self.arrived = np.full(batch.nlanes, -1, I64)  # the phase a lane has arrived in, until it has waited for it
        self.released: dict[int, Array] = {}  # cluster -> what those know who have arrived in the phase
        self.given: dict[int, Array] = {}  # cluster -> what the last phase gives to those who wait for it
        self.complete_at = np.zeros(self.count, I64)  # tick at which the last phase was complete
        self.waited = np.zeros(batch.nlanes, I64)  # that tick of the last phase a lane has waited for
        self.left: set[int] = set()  # CTAs that have exited
        self.remote: dict[int, tuple[int, int]] = {}  # CTA -> (PTX line, lane) of an access not waited for

    # The barrier.

    def arrive(self, lanes: Array) -> None:
        """barrier.cluster.arrive of some lanes."""
        twice = self.arrived[lanes] >= 0
        if twice.any():
            raise LaneFault("barrier.cluster.arrive a second time without a barrier.cluster.wait", np.nonzero(twice)[0])
        self.arrived[lanes] = self.phase[self.of[lanes]]
        for cluster in np.unique(self.of[lanes]).tolist():
            row = self.batch.races.release(lanes[self.of[lanes] == cluster])
            old = self.released.get(cluster)
            self.released[cluster] = row if old is None else np.maximum(old, row)
        self.batch.check_parked = True
        self.complete()

    def complete(self) -> None:
        """Complete the phases in which every thread that has not exited has arrived."""
        alive = self.batch.alive
        here = self.arrived == self.phase[self.of]
        missing = np.bincount(self.of[alive & ~here], minlength=self.count)
        some = np.bincount(self.of[alive & here], minlength=self.count)
        done = (missing == 0) & (some > 0)
        if not done.any():
            return
        for cluster in np.nonzero(done)[0].tolist():
            self.given[cluster] = self.released.pop(cluster)
        self.phase[done] += 1
        self.complete_at[done] = self.batch.races.clock.tick()

    def wait(self, key: tuple[int, int], sync: Instr, group: Group) -> None:
        """barrier.cluster.wait: park lanes until every thread of the cluster that has not exited has arrived."""
        bad = np.nonzero(self.arrived[group.lanes] < 0)[0]
        if len(bad):
            what = "barrier.cluster.wait without a barrier.cluster.arrive before it"
            raise self.batch.fault(what, sync, group.lanes[bad])
        self.batch._merge(self.batch.parked, key, group)
        self.release()

    def release(self) -> None:
        """Let those go whose phase is complete; of .aligned waits whole warps."""
        self.complete()
        batch = self.batch
        for key in list(batch.parked):
            sync = batch.program.blocks[key[1]].sync
            if sync is None or not is_cluster_wait(sync):
                continue
            lanes = batch.parked[key].lanes
            free = self.arrived[lanes] < self.phase[self.of[lanes]]
            if "aligned" in sync.mods and free.any():
                free &= collective.complete(batch.nlanes, lanes, np.full(len(lanes), 0xFFFFFFFF, U32), batch.alive)
            self._pass(lanes[free])
            batch._let_go(key, free)

    def _pass(self, lanes: Array) -> None:
        """Lanes leave the barrier: they know what all did before they arrived."""
        self.arrived[lanes] = -1
        for cluster in np.unique(self.of[lanes]).tolist():
            self.batch.races.acquire(lanes[self.of[lanes] == cluster], self.given[cluster])
        self.waited[lanes] = self.complete_at[self.of[lanes]]
        self.batch.races.cluster_barrier(self.waited)
        self.observed(lanes)

    def waiting_for(self, lane: int) -> str:
        """Whom a lane at the barrier waits for, for the deadlock report."""
        batch, cluster = self.batch, int(self.of[lane])
        mine = batch.alive & (self.of == cluster)
        late = mine & (self.arrived != self.phase[cluster])
        ranks = np.unique(batch.cta[late] % self.size).tolist()
        return (
            f"    cluster barrier: {int(np.count_nonzero(mine & ~late))} of {int(np.count_nonzero(mine))} threads have "
            f"arrived; missing are threads of rank {', '.join(map(str, ranks))}"
        )

    # Remote accesses.

    def resolve(self, lanes: Array, cta: Array, address: Array) -> tuple[Array, Array]:
        """(CTA of the batch, shared offset) of addresses in shared::cluster, checked; `cta` is the accessing lanes'."""
        rank = address.astype(I64) >> RANK_BIT
        first = cta - cta % self.size
        if int(rank.max()) >= self.size or int(rank.min()) < 0:
            bad = np.nonzero((rank >= self.size) | (rank < 0))[0]
            raise LaneFault(
                f"shared::cluster address {int(address[bad[0]]):#x} names rank {int(rank[bad[0]])} of a cluster of "
                f"{self.size} CTAs",
                bad,
            )
        owner = first + rank
        away = owner != cta
        if away.any():
            self._note(lanes, owner, away, self.batch.races.line)
        return owner, address & address.dtype.type(OFFSET)

    def _note(self, lanes: Array, owner: Array, away: Array, line: int) -> None:
        if self.left:
            gone = away & np.isin(owner, list(self.left))
            if gone.any():
                bad = np.nonzero(gone)[0]
                rank = int(owner[bad[0]]) % self.size
                raise LaneFault(
                    f"access to the shared memory of rank {rank}, whose CTA has exited: a cluster barrier before the "
                    "exit keeps it",
                    bad,
                )
        for each in np.unique(owner[away]).tolist():
            self.remote[each] = (line, int(lanes[np.argmax(away & (owner == each))]))

    def touch(self, lanes: Array, owner: Array, line: int = 0) -> None:
        """An instruction, on a line of the PTX if it is known, names the shared memory of CTAs of the batch."""
        away = owner != self.batch.cta[lanes]
        if away.any():
            self._note(lanes, owner, away, line)

    def check_targets(self, op: Op) -> None:
        """An asynchronous operation is about to write: other CTAs it writes to must not have exited."""
        if not self.left:
            return
        ctas = {span.cta for span in op.writes} | {at // self.batch.shared.stride for at, _ in op.barriers}
        for cta in sorted((ctas & self.left) - {int(self.batch.cta[op.lane])}):
            raise LaneFault(
                f"an asynchronous {op.kind} writes to shared memory of rank {cta % self.size}, whose CTA has exited",
                np.zeros(1, I64),
            )

    def observed(self, lanes: Array) -> None:
        """These lanes have learnt what others did: by an acquiring load, or by an mbarrier."""
        if self.remote:
            for cta in np.unique(self.batch.cta[lanes]).tolist():
                self.remote.pop(cta, None)

    def exited(self, lanes: Array) -> tuple[str, int] | None:
        """Lanes have exited. Returns what is wrong, and where, if a CTA is gone that others may still access."""
        batch = self.batch
        ctas = np.unique(batch.cta[lanes])
        living = np.bincount(batch.cta[batch.alive], minlength=batch.count)
        for cta in ctas[living[ctas] == 0].tolist():
            self.left.add(cta)
            noted = self.remote.get(cta)
            if noted is None:
                continue
            line, lane = noted
            ins = next((i for block in batch.program.blocks for i in block.instrs if i.line == line), None)
            place = where(batch.program.ptx, ins, batch.machine.source_roots, "    ")
            other, thread = batch.thread(lane)
            place = f", at{place}" if place else ""
            return (
                f"the CTA exits while others may still access its shared memory: it has not waited (cluster barrier, "
                f"mbarrier or acquiring load) since the access of CTA {other}, thread {thread}{place}",
                cta,
            )
        return None


class ClusterShared:
    """Shared memory under addresses that carry ranks: of the thread's own CTA, or of all CTAs of its cluster.

    Takes the same base as the batch's shared memory, of the accessing lanes, and hands every access on to that.
    """

    def __init__(self, shared: LaneMemory, clusters: Clusters, remote: bool) -> None:
        self.shared, self.clusters, self.remote = shared, clusters, remote

    @property
    def lanes(self) -> Array:
        found: Array = self.shared.lanes  # type: ignore[attr-defined]
        return found

    @lanes.setter
    def lanes(self, lanes: Array) -> None:
        self.shared.lanes = lanes  # type: ignore[attr-defined]

    def _own(self, address: Array, base: Array) -> tuple[Array, Array]:
        shared = self.shared
        cta = (base + shared.first) // shared.stride
        if not self.remote:
            rank = address.astype(I64) >> RANK_BIT
            wrong = rank != cta % self.clusters.size
            if wrong.any():
                bad = np.nonzero(wrong)[0]
                raise LaneFault(
                    f"shared::cta access with the address {int(address[bad[0]]):#x} of rank {int(rank[bad[0]])}, from "
                    f"rank {int(cta[bad[0]]) % self.clusters.size}: a remote address needs .shared::cluster",
                    bad,
                )
            return address & address.dtype.type(OFFSET), base
        owner, offset = self.clusters.resolve(self.lanes, cta, address)
        return offset, shared.bases(owner)

    def away(self, addr: Array, base: Array) -> Array:
        """Positions of the addresses that belong to another CTA than the accessing thread's."""
        rank = (base + self.shared.first) // self.shared.stride % self.clusters.size
        found: Array = np.nonzero(addr.astype(I64) >> RANK_BIT != rank)[0]
        return found

    def load(self, addr: Array, base: Array, k: int, used: int | None = None) -> Array:
        return self.shared.load(*self._own(addr, base), k, used)

    def load_vector(self, addr: Array, base: Array, k: int, n: int, used: int | None = None) -> list[Array]:
        return self.shared.load_vector(*self._own(addr, base), k, n, used)

    def store(self, addr: Array, base: Array, value: Array, k: int) -> None:
        self.shared.store(*self._own(addr, base), value, k)

    def store_vector(self, addr: Array, base: Array, values: Sequence[Array], k: int) -> None:
        self.shared.store_vector(*self._own(addr, base), values, k)

    def atomic(self, addr: Array, base: Array, k: int, update: Callable[[Array, Array], tuple[Any, bool]]) -> Any:
        return self.shared.atomic(*self._own(addr, base), k, update)

