"""A batch of CTAs in lockstep: registers, groups of lanes, the scheduler, barriers and calls.

Lanes are numbered CTA by CTA, thread by thread, with the last warp of a CTA padded, so that a warp is 32 neighbours.
A group is the lanes at one (call depth, block). Groups that meet merge. A group at a place where threads meet is parked
until those it waits for are there; a group that polls memory in vain gives way until memory changes.

The file is long because the scheduler, barriers, calls and messages all work on the same per-lane state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator import collective
from dsv4_rt.emulator.allocation import Columns
from dsv4_rt.emulator.async_ import Engine
from dsv4_rt.emulator.clusters import RANK_BIT, Clusters, ClusterShared, ctaid, split
from dsv4_rt.emulator.intrinsics import EXTERNAL
from dsv4_rt.emulator.ir import (
    Address,
    Block,
    Instr,
    Number,
    Operand,
    Reg,
    Sym,
    is_allocation,
    is_cluster_wait,
    is_wait,
    is_warp_sync,
    is_warpgroup_sync,
    sync_mask,
)
from dsv4_rt.emulator.launchcontrol import Pool
from dsv4_rt.emulator.mbarrier import Mbarriers
from dsv4_rt.emulator.memory import LOCAL_FIRST, LaneFault, LaneMemory
from dsv4_rt.emulator.races import Races, RacyGeneric, RacyShared
from dsv4_rt.emulator.report import LaunchReport, Triple, fault, where
from dsv4_rt.emulator.tcgen05 import TensorCores
from dsv4_rt.emulator.tiles import Tiles
from dsv4_rt.emulator.tmem import TensorMemory
from dsv4_rt.emulator.waits import Waits
from dsv4_rt.emulator.watched import WatchedMemory
from dsv4_rt.emulator.wgmma import Warpgroups
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.machine import Machine, Program

Array = npt.NDArray[Any]
Key = tuple[int, int]  # (-call depth, block)
U32 = np.uint32
SPINS = 16  # polls in vain before a group gives way
EXPIRIES = 8  # times all waits of mbarriers may expire in vain before it is a deadlock
PATIENCE = 2000  # times everyone may poll in vain before it is a deadlock
_DTYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64, 128: np.uint64}


@dataclass(frozen=True)
class Grid:
    """A launch's geometry."""

    grid: Triple
    block: Triple
    dynamic_shared: int
    cluster: Triple = (1, 1, 1)
    explicit_cluster: bool = False

    @property
    def ctas(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def cluster_size(self) -> int:
        """CTAs a cluster."""
        return self.cluster[0] * self.cluster[1] * self.cluster[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def clusters(self) -> Triple:
        """Clusters in each dimension of the grid."""
        return tuple(g // c for g, c in zip(self.grid, self.cluster, strict=True))  # type: ignore[return-value]

    @property
    def lanes(self) -> int:
        """Lanes a CTA takes: its threads rounded up to warps."""
        return -(-self.threads // 32) * 32


class Group:
    """Lanes that stand at one place, in order."""

    def __init__(self, lanes: Array) -> None:
        self.lanes = lanes
        self.spins = 0
        self.asleep_at = -1  # the memory version at which it gave way

    @cached_property
    def dense(self) -> bool:
        """Whether the lanes are whole warps."""
        lanes = self.lanes
        if len(lanes) % 32:
            return False
        heads = lanes[::32]
        return not bool((heads & 31).any()) and bool((lanes[31::32] - heads == 31).all())

    @cached_property
    def warps(self) -> int:
        warp = self.lanes >> 5
        return 1 + int(np.count_nonzero(warp[1:] != warp[:-1]))


class Batch:
    def __init__(
        self,
        machine: Machine,
        program: Program,
        shape: Grid,
        first: int,
        count: int,
        params: bytes,
        param_base: int,
        report: LaunchReport,
        pool: Pool | None = None,
    ) -> None:
        self.pool = pool  # the CTAs of the launch that have not begun
        self.refused: set[int] = set()  # CTAs that know of a try_cancel that failed
        self.machine, self.program, self.shape, self.report = machine, program, shape, report
        self.first, self.count, self.params, self.param_base = first, count, params, param_base
        self.cluster_size = shape.cluster_size
        self.nlanes = count * shape.lanes
        self.all = np.arange(self.nlanes)
        self.cta = self.all // shape.lanes
        self.tid = self.all % shape.lanes
        self.alive = self.tid < shape.threads
        self.memory = machine.memory
        self.races = Races(self, machine.clock)
        self.shared = RacyShared(self.races, count, program.shared_bytes + shape.dynamic_shared)
        self.races.shared = self.shared
        self.races.watched = machine.memory if isinstance(machine.memory, WatchedMemory) else None
        self.local = LaneMemory("local", self.nlanes, program.entry.frame_size + program.local_bytes, LOCAL_FIRST)
        self.engine = Engine(self, machine.completion, machine.dice)
        self.mbarriers = Mbarriers(self)
        self.warpgroups = Warpgroups(self)
        self.tmem = TensorMemory(self)
        self.columns = Columns(self)
        self.tensor_cores = TensorCores(self)
        if program.tiled:
            self.shared.tiles = Tiles(count * self.shared.stride >> 4)
        self.generic: RacyGeneric = RacyGeneric(self.memory, self.shared, self.local)
        self.shared_base = self.shared.bases(self.cta)
        self.local_base = self.local.bases(self.all)
        self.rank_bits = (self.cta % shape.cluster_size).astype(U32) << U32(RANK_BIT)
        self.clusters: Clusters | None = None
        if shape.explicit_cluster:
            self.clusters = Clusters(self, shape.cluster_size)
            self.shared_own = ClusterShared(self.shared, self.clusters, False)
            self.shared_cluster = ClusterShared(self.shared, self.clusters, True)
            self.generic = RacyGeneric(self.memory, self.shared_cluster, self.local)
        self.specials: dict[str, Array] = {}
        self.registers: dict[tuple[int, str], list[Array]] = {}
        self.frames: dict[int, Array] = {}
        self.returns: dict[int, Array] = {}
        self.ready: dict[Key, Group] = {}
        self.parked: dict[Key, Group] = {}
        self.waits = Waits(self)
        self.at_barrier = np.full(self.nlanes, -1, np.int64)  # barrier each parked lane waits at
        self.wants = np.zeros(self.nlanes, np.int64)  # threads its barrier needs, 0 for all
        self.arrived = np.zeros((count, 16), np.int64)  # by bar.arrive
        self.steps = 0
        self.naps = 0
        self.check_parked = False
        self._place((0, program.first[program.entry.name]), Group(np.nonzero(self.alive)[0]))

    # What generated code asks for.

    def special(self, name: str) -> Array:
        found = self.specials.get(name)
        if found is None:
            found = self.specials[name] = self._special(name)
        return found

    def _special(self, name: str) -> Array:
        shape, axis = self.shape, "xyz".find(name[-1])
        base = name.split(".")[0]
        cta, rank, clusters = self.cta + self.first, self.cta % shape.cluster_size, shape.clusters
        lane = (self.all & 31).astype(U32)
        bit = U32(1) << lane
        threes = {
            "tid": (self.tid, shape.block), "cluster_ctaid": (rank, shape.cluster),
            "clusterid": (cta // shape.cluster_size, clusters),
        }  # fmt: skip
        if base in threes:
            index, sizes = threes[base]
            return split(index, sizes)[axis].astype(U32)
        if base == "ctaid":
            return np.asarray(ctaid(cta, shape.grid, shape.cluster)[axis].astype(U32))
        single = {
            "ntid": shape.block, "nctaid": shape.grid, "nclusterid": clusters, "cluster_nctaid": shape.cluster
        }  # fmt: skip
        if base in single:
            return np.array([single[base][axis]], U32)
        scalar = {
            "nwarpid": shape.lanes // 32, "nsmid": 1, "gridid": 1, "cluster_nctarank": shape.cluster_size,
            "is_explicit_cluster": shape.explicit_cluster, "dynamic_smem_size": shape.dynamic_shared,
            "aggr_smem_size": self.shared.size, "total_smem_size": self.shared.size,
            "envreg1": self.machine.workspace >> 32, "envreg2": self.machine.workspace & 0xFFFFFFFF,
        }  # fmt: skip
        if base in scalar:
            return np.array([scalar[base]], np.uint64 if base == "gridid" else U32)
        per_lane = {
            "cluster_ctarank": rank.astype(U32),
            "laneid": lane, "warpid": (self.tid >> 5).astype(U32), "smid": np.zeros(self.nlanes, U32),
            "lanemask_eq": bit, "lanemask_lt": bit - U32(1), "lanemask_le": bit | (bit - U32(1)),
            "lanemask_gt": ~(bit | (bit - U32(1))), "lanemask_ge": ~(bit - U32(1)),
        }  # fmt: skip
        if base in per_lane:
            return per_lane[base]
        raise EmulatorError(f"special register %{name} is not implemented by the emulator")

    def group_special(self, name: str, lanes: Array) -> Array:
        """Clocks: the count of blocks run so far, which only ever grows."""
        self.steps += 1
        if name == "clock_hi" or name == "globaltimer_hi":
            return np.array([self.steps >> 32], U32)
        if name in ("clock64", "globaltimer"):
            return np.array([self.steps], np.uint64)
        return np.array([self.steps & 0xFFFFFFFF], U32)

    def param(self, offset: int, dtype: Any) -> Array:
        return np.frombuffer(self.params, dtype, 1, offset)

    def param_address(self, offset: int, dtype: Any) -> Array:
        return np.array([offset if dtype is U32 else self.param_base + offset], dtype)

    def param_generic(self, address: Array) -> Array:
        """Generic addresses of parameters: those that 32 bits hold are offsets."""
        return np.where(address < np.uint64(1 << 32), address + np.uint64(self.param_base), address)

    def check_set(self, flags: Array, name: str, use: str, n: int) -> None:
        flags = np.broadcast_to(flags, n)
        if not flags.all():
            raise LaneFault(f"register {name} becomes {use}, but no instruction has set it", np.nonzero(~flags)[0])

    def sleep(self) -> None:
        self.naps += 1

    def barrier_arrive(self, lanes: Array, ids: Array, counts: Array) -> None:
        """bar.arrive: counted, not waited for."""
        ids, counts = np.broadcast_to(ids, lanes.shape), np.broadcast_to(counts, lanes.shape)
        self.races.arrive(lanes, ids)
        np.add.at(self.arrived, (self.cta[lanes], ids), 1)
        self.check_parked = True

    def barrier_reduce(self, lanes: Array, p: Array, op: str) -> Array:
        """bar.red over the lanes released together: whole CTAs."""
        cta = self.cta[lanes]
        count = np.bincount(cta, weights=p, minlength=self.count).astype(np.int64)
        if op == "popc":
            return count[cta].astype(U32)
        if op == "or":
            return np.asarray(count[cta] > 0)
        return np.asarray(count[cta] == np.bincount(cta, minlength=self.count)[cta])

    # Groups.

    def _place(self, key: Key, group: Group) -> None:
        """Put lanes at a block, merging with those already there; where threads meet, see who may go on."""
        block = self.program.blocks[key[1]]
        if block.sync is None:
            self._merge(self.ready, key, group)
            return
        if is_wait(block.sync):
            sync, lanes = block.sync, group.lanes
            addr, value = self._address(key, sync.args[1], lanes), self._operand(key, sync.args[2], lanes)
            self._admit(self.waits.park(key, sync, lanes, addr, value))
            return
        if is_allocation(block.sync):
            self._admit(self.columns.come(key, block.sync, group.lanes))
            return
        if is_warpgroup_sync(block.sync):
            self._merge(self.parked, key, group)
            self._let_go(key, self.warpgroups.complete(self.parked[key].lanes))
            return
        if is_warp_sync(block.sync):
            if group.dense and key not in self.parked and block.sync.op not in ("bar", "barrier"):
                self._merge(self.ready, key, group)
                return
            self._merge(self.parked, key, group)
            self._release_warps(key)
            return
        if is_cluster_wait(block.sync):
            self.cluster_barrier().wait(key, block.sync, group)
            return
        ids, counts = self._barrier_operands(key, block.sync, group.lanes)
        self.at_barrier[group.lanes] = ids
        self.wants[group.lanes] = counts
        self._merge(self.parked, key, group)
        self._release_barriers()

    def _admit(self, free: list[tuple[Key, Array]]) -> None:
        """Lanes need not wait for their mbarriers, or for tensor memory, any more."""
        for key, lanes in free:
            self._merge(self.ready, key, Group(lanes))

    def _address(self, key: Key, operand: Operand, lanes: Array) -> Array:
        """The address operand of a sync instruction at the start of its block."""
        assert isinstance(operand, Address)
        base = operand.base
        if isinstance(base, Sym):
            layout = self.program.layouts[self.program.blocks[key[1]].function.name]
            at = layout.addresses[id(base.var)] + base.offset + operand.offset
            return np.full(len(lanes), at, np.uint64)
        return self._operand(key, base, lanes).astype(np.uint64) + np.uint64(operand.offset & (1 << 64) - 1)

    def _merge(self, groups: dict[Key, Group], key: Key, group: Group) -> None:
        other = groups.get(key)
        if other is not None:
            mask = np.zeros(self.nlanes, np.bool_)
            mask[other.lanes] = True
            mask[group.lanes] = True
            group = Group(np.nonzero(mask)[0])
        groups[key] = group

    def _operand(self, key: Key, operand: Operand, lanes: Array) -> Array:
        """The value of a sync instruction's operand at the start of its block."""
        if isinstance(operand, Number):
            return np.full(len(lanes), operand.value & 0xFFFFFFFF, U32)
        if isinstance(operand, Reg):
            function = self.program.blocks[key[1]].function.name
            slot = self.program.layouts[function].slots[operand]
            found: Array = self._registers(-key[0], function)[slot][lanes]
            return found
        raise EmulatorError("the operand of a barrier or mask has a form that is not known")

    def _release_warps(self, key: Key) -> None:
        group = self.parked[key]
        sync = self.program.blocks[key[1]].sync
        assert sync is not None
        lanes = group.lanes
        if self._is_warp_barrier(key):
            keys = [k for k in self.parked if self._is_warp_barrier(k)]
            everyone = np.sort(np.concatenate([self.parked[k].lanes for k in keys]))
            for each in keys:
                at = self.parked[each].lanes
                mask = self._operand(each, self._mask_of(each), at)
                try:
                    collective.must_name((at & 31).astype(U32), mask)
                except LaneFault as error:
                    raise self.fault(error.what, self.program.blocks[each[1]].sync, at[error.bad]) from None
                present = collective.warp_bits(self.nlanes, everyone)[at >> 5]
                living = collective.warp_bits(self.nlanes, np.nonzero(self.alive)[0])[at >> 5]
                self._let_go(each, mask & living & ~present == 0)
            return
        mask = self._operand(key, sync_mask(sync), lanes)
        self._let_go(key, collective.complete(self.nlanes, lanes, mask, self.alive))

    def cluster_barrier(self) -> Clusters:
        """The cluster barrier, also in a launch without clusters."""
        if self.clusters is None:
            self.clusters = Clusters(self, 1)
        return self.clusters

    def _is_warp_barrier(self, key: Key) -> bool:
        sync = self.program.blocks[key[1]].sync
        return sync is not None and sync.op in ("bar", "barrier") and "warp" in sync.mods

    def _mask_of(self, key: Key) -> Operand:
        sync = self.program.blocks[key[1]].sync
        assert sync is not None
        return sync_mask(sync)

    def _let_go(self, key: Key, free: Array) -> None:
        group = self.parked[key]
        if not free.any():
            return
        self.races.meet(group.lanes[free])
        if free.all():
            del self.parked[key]
            self._merge(self.ready, key, group)
            return
        self.parked[key] = Group(group.lanes[~free])
        self._merge(self.ready, key, Group(group.lanes[free]))

    def _barrier_operands(self, key: Key, sync: Instr, lanes: Array) -> tuple[Array, Array]:
        args = sync.args
        if "red" in sync.mods:
            args = args[1:-1]
        ids = self._operand(key, args[0], lanes).astype(np.int64)
        counts = np.zeros(len(lanes), np.int64)
        if len(args) > 1:
            counts = self._operand(key, args[1], lanes).astype(np.int64)
        if (ids > 15).any():
            raise self.fault(f"barrier {int(ids.max())} does not exist: there are 16", sync, lanes[ids > 15])
        if (counts & 31).any():
            raise self.fault("the thread count of a barrier must be a multiple of 32", sync, lanes[(counts & 31) != 0])
        return ids, counts

    def _release_barriers(self) -> None:
        waiting = np.nonzero(self.at_barrier >= 0)[0]
        if not len(waiting):
            return
        slot = self.cta[waiting] * 16 + self.at_barrier[waiting]
        here = np.bincount(slot, minlength=self.count * 16)
        need = np.zeros(self.count * 16, np.int64)
        need[slot] = self.wants[waiting]
        living = np.bincount(self.cta[self.alive], minlength=self.count)
        need = np.where(need == 0, np.repeat(living, 16), need)
        done = (here > 0) & (here + self.arrived.reshape(-1) >= need)
        if not done.any():
            return
        lanes = waiting[done[slot]]
        self._check_convergence(lanes)
        self.races.barrier(lanes, self.at_barrier[lanes])
        self.arrived.reshape(-1)[done] = 0
        self.at_barrier[lanes] = -1
        leaving = np.zeros(self.nlanes, np.bool_)
        leaving[lanes] = True
        for key in list(self.parked):
            sync = self.program.blocks[key[1]].sync
            if sync is not None and not is_warp_sync(sync):
                self._let_go(key, leaving[self.parked[key].lanes])

    def _check_convergence(self, lanes: Array) -> None:
        """Threads of a warp must come to a barrier at one instruction, unless it is barrier without .aligned."""
        keys = [k for k in self.parked if not is_warp_sync(self.program.blocks[k[1]].sync or Instr("", (), []))]
        if len(keys) < 2:
            return
        place = np.full(self.nlanes, -1, np.int64)
        for i, key in enumerate(keys):
            place[self.parked[key].lanes] = i
        mine = np.full(self.nlanes, -1, np.int64)
        mine[lanes] = place[lanes]
        rows = mine.reshape(-1, 32)
        low = np.where(rows < 0, len(keys), rows).min(axis=1)
        mixed = np.nonzero((rows.max(axis=1) >= 0) & (rows.max(axis=1) != low))[0]
        if not len(mixed):
            return
        warp = int(mixed[0])
        first, second = (self.program.blocks[keys[int(i)][1]].sync for i in (low[warp], rows.max(axis=1)[warp]))
        assert first is not None
        assert second is not None
        if first.op == second.op == "barrier" and "aligned" not in first.mods and "aligned" not in second.mods:
            return
        other = where(self.program.ptx, second, self.machine.source_roots, "    ")
        bad = np.nonzero(rows[warp] == low[warp])[0] + 32 * warp
        what = f"barrier divergence: threads of one warp wait at different barrier instructions; others are at{other}"
        raise self.fault(what, first, bad)

    def _registers(self, depth: int, function: str) -> list[Array]:
        found = self.registers.get((depth, function))
        if found is None:
            found = [
                np.zeros((self.nlanes, 2) if bits == 128 else self.nlanes, _DTYPES[bits])
                for _, bits in self.program.registers[function]
            ]
            self.registers[depth, function] = found
        return found

    def _frame(self, depth: int) -> Array:
        if depth not in self.frames:
            self.frames[depth] = np.full(self.nlanes, LOCAL_FIRST, np.uint64)
        return self.frames[depth]

    # The scheduler.

    def run(self, patience: int) -> bool:
        """Run until every thread has exited (True), or all that are left have polled memory in vain (False).

        patience: how often they may all do so before this gives up.
        """
        idle = expired = 0
        while True:
            if self.engine.queue and self.engine.completion == "random":
                self.engine.step()
            if self.mbarriers.flipped:
                self._admit(self.waits.wake())
            if self.columns.changed:
                self._admit(self.columns.release())
            version = self._version()
            awake = [k for k, g in self.ready.items() if g.asleep_at != version] if self.ready else []
            if awake:
                self._step(self.machine.pick(awake))
                if self._version() != version:
                    idle = expired = 0
                continue
            if self.check_parked:
                self._recheck()
                continue
            if self.engine.pump():
                continue
            if self.waits.parked and expired < EXPIRIES:
                expired += 1
                self._admit(self.waits.expire())
                continue
            if self.ready:
                idle += 1
                if idle > patience:
                    return False
                for group in self.ready.values():
                    group.asleep_at = -1
                    group.spins = SPINS
                continue
            if self.waits.parked:
                return False
            if self.parked or self.columns.waited_for:
                self._recheck()
                if self.ready:
                    continue
                lines = "\n".join(self.describe_waiting())
                raise Deadlock(f"{self.program.entry.name}: no thread can go on\n{lines}")
            return True

    def _version(self) -> int:
        return self.memory.version + self.shared.version

    def _recheck(self) -> None:
        """Lanes have exited or arrived: others may no longer have anyone to wait for."""
        self.check_parked = False
        for key in list(self.parked):
            if key in self.parked and is_warp_sync(self.program.blocks[key[1]].sync or Instr("", (), [])):
                self._release_warps(key)
        self._release_barriers()
        if self.clusters is not None:
            self.clusters.release()

    def _step(self, key: Key) -> None:
        group = self.ready.pop(key)
        depth, index = -key[0], key[1]
        lanes, n = group.lanes, len(group.lanes)
        full = n == self.nlanes
        dense = full or group.dense
        code = self.program.code(index, full, dense)
        version, naps = self._version(), self.naps
        self.steps += 1
        function = self.program.blocks[index].function
        registers = self._registers(depth, function.name)
        try:
            condition = code.run(self, registers, self._frame(depth), lanes, n)
        except LaneFault as error:
            ins, who = self._origin(error, code.lines, lanes)
            raise self.fault(error.what, ins, who[error.bad]) from None
        except KernelFault:  # of an asynchronous operation that ran meanwhile
            raise
        except UnsupportedInstruction as error:
            ins, _ = self._origin(error, code.lines, lanes)
            place = where(self.program.ptx, ins, self.machine.source_roots)
            raise UnsupportedInstruction(f"{self.program.entry.name}: {error}{place}") from None
        except Exception as error:
            ins, _ = self._origin(error, code.lines, lanes)
            place = where(self.program.ptx, ins, self.machine.source_roots)
            raise EmulatorError(f"{self.program.entry.name}: the emulator failed: {error!r}{place}") from error
        report = self.report
        report.instructions += n * code.count
        report.warp_instructions += group.warps * code.count
        for opcode, times in code.opcodes.items():
            report.opcodes[opcode] += n * times
        polled = code.polls or self.naps != naps
        if polled and self._version() == version:
            group.spins += 1
        elif self._version() != version:
            group.spins = 0
        self._leave(key, code.last, group, condition)

    def _leave(self, key: Key, block: Block, group: Group, condition: Array | None) -> None:
        """Send lanes on their way at the end of a block."""
        depth = key[0]
        if block.kind == "jump":
            self._go((depth, block.next[0]), group, block)
        elif block.kind == "branch":
            assert condition is not None
            taken = int(np.count_nonzero(condition))
            if taken == len(condition):
                self._go((depth, block.next[0]), group, block)
            elif taken == 0:
                self._go((depth, block.next[1]), group, block)
            else:
                if block.end is not None and "uni" in block.end.mods:
                    self._check_uniform(block.end, group, condition)
                for to, chosen in zip(block.next, (condition, ~condition), strict=True):
                    part = Group(group.lanes[chosen])
                    part.spins = group.spins
                    self._go((depth, to), part, block)
        elif block.kind == "ret" and depth < 0:
            back = self.returns[-depth][group.lanes]
            for to in np.unique(back).tolist():
                self._return(key, int(to), group.lanes[back == to])
        elif block.kind in ("ret", "exit"):
            self.alive[group.lanes] = False
            leaving = self.engine.left_reading(group.lanes) or self.tmem.left(group.lanes)
            if leaving is not None:
                raise self.fault(leaving[0], block.end, np.array([leaving[1]]))
            if self.clusters is not None:
                wrong = self.clusters.exited(group.lanes)
                if wrong is not None:
                    raise self.fault(wrong[0], block.end, group.lanes[self.cta[group.lanes] == wrong[1]])
            if not self.alive.any():
                self.engine.drain()
            self.check_parked = bool(self.parked)
            if self.parked:
                self._recheck()
        elif block.kind == "call":
            self._call(key, block, group, condition)
        elif block.kind == "index":
            assert condition is not None
            for i in np.unique(condition).tolist():
                if i >= len(block.next):
                    raise self.fault(f"brx.idx: index {i} of {len(block.next)}", block.end, group.lanes[condition == i])
                self._go((depth, block.next[i]), Group(group.lanes[condition == i]), block)
        else:
            raise self.fault("trap: the kernel stopped itself", block.end, group.lanes)

    def _go(self, key: Key, group: Group, block: Block) -> None:
        """Move on; on the way back in a loop, a group that has polled in vain long enough gives way."""
        if key[1] <= block.index and group.spins >= SPINS:
            group.asleep_at = self._version()
        self._place(key, group)

    def _check_uniform(self, ins: Instr, group: Group, condition: Array) -> None:
        yes = collective.warp_bits(self.nlanes, group.lanes, condition)
        no = collective.warp_bits(self.nlanes, group.lanes, ~condition)
        split = np.nonzero((yes != 0) & (no != 0))[0]
        if len(split):
            bad = group.lanes[group.lanes >> 5 == split[0]]
            raise self.fault("bra.uni: threads of one warp go different ways", ins, bad)

    # Calls: parameters are bytes of the frames in local memory.

    def _call(self, key: Key, block: Block, group: Group, pointers: Array | None) -> None:
        ins = block.end
        assert ins is not None
        target = ins.args[0]
        if pointers is not None:
            for each in np.unique(pointers).tolist():
                lanes = group.lanes[pointers == each]
                self._enter(key, block, Group(lanes), self._pointed(block, each, lanes), ins.args[1:-1])
            return
        assert isinstance(target, Sym)
        name = self.program.ptx.resolve(target.name)
        if name not in self.program.first:
            self._call_external(key, block, group)
            return
        self._enter(key, block, group, name, ins.args[1:])

    def _pointed(self, block: Block, pointer: int, lanes: Array) -> str:
        """The function a pointer holds, if the call may reach it."""
        ins, function, program = block.end, block.function, self.program
        assert ins is not None
        name = program.functions.get(pointer, "")
        entry = bool(name) and program.ptx.functions[name].entry
        if name not in program.first or entry:
            what = f"{pointer:#x}, where no function is"
            if name:
                what = f"{name}, which {'is a kernel' if entry else 'this module does not define'}"
            raise self.fault(f"a call through a pointer to {what}", ins, lanes)
        listed = ins.args[-1].name if isinstance(ins.args[-1], Sym) else ""
        targets, prototype = function.branch_targets(listed, ins.scope), function.prototype(listed, ins.scope)
        callee = program.ptx.functions[name]
        sizes = tuple(v.size for v in callee.returns), tuple(v.size for v in callee.params)
        if targets is not None and name not in map(program.ptx.resolve, targets):
            raise self.fault(f"a call through a pointer to {name}, which {listed} does not list", ins, lanes)
        if prototype is not None and prototype != sizes:
            what = f"returns and takes {sizes} bytes, not the {prototype} of {listed}"
            raise self.fault(f"a call through a pointer to {name}, which {what}", ins, lanes)
        return name

    def _enter(self, key: Key, block: Block, group: Group, name: str, actuals: list[Operand]) -> None:
        ins, lanes, depth = block.end, group.lanes, -key[0]
        callee = self.program.ptx.functions[name]
        size = block.function.frame_size
        self._frame(depth + 1)[lanes] = self._frame(depth)[lanes] + np.uint64(size)
        deepest = int(self.frames[depth + 1][lanes].max()) + callee.frame_size
        if deepest > LOCAL_FIRST + self.local.size:
            raise self.fault(f"stack overflow at call depth {depth + 1}: {self.local.size} bytes", ins, lanes)
        self.returns.setdefault(depth + 1, np.zeros(self.nlanes, np.int64))[lanes] = block.next[0]
        for formal, actual in zip(callee.params, actuals, strict=True):
            if not isinstance(actual, Sym) or actual.var is None:
                raise self.fault("a call argument that is not a .param variable", ins, lanes)
            self._copy(lanes, depth, actual.var.offset, depth + 1, formal.offset, formal.size)
        self._place((-(depth + 1), self.program.first[callee.name]), Group(lanes))

    def _call_external(self, key: Key, block: Block, group: Group) -> None:
        ins, lanes = block.end, group.lanes
        assert ins is not None
        assert isinstance(ins.args[0], Sym)
        frame, base = self._frame(-key[0])[lanes], self.local_base[lanes]
        try:
            args = [
                self.local.load(frame + np.uint64(each.var.offset), base, each.var.size.bit_length() - 1)
                for each in ins.args[1:]
                if isinstance(each, Sym) and each.var is not None
            ]
            found = EXTERNAL[ins.args[0].name](self, ins, lanes, args)
        except LaneFault as error:
            raise self.fault(error.what, ins, lanes[error.bad]) from None
        for each in ins.returns:
            if found is not None and isinstance(each, Sym) and each.var is not None:
                self.local.store(frame + np.uint64(each.var.offset), base, found, 2)
        self._go((key[0], block.next[0]), group, block)

    def _return(self, key: Key, to: int, lanes: Array) -> None:
        depth = -key[0]
        callee = self.program.blocks[key[1]].function
        call = self.program.blocks[to - 1].end
        if call is None or call.op != "call":
            call = next(b.end for b in self.program.blocks if b.kind == "call" and b.next[0] == to)
        assert call is not None
        for formal, actual in zip(callee.returns, call.returns, strict=True):
            if isinstance(actual, Sym) and actual.var is not None:
                self._copy(lanes, depth, formal.offset, depth - 1, actual.var.offset, formal.size)
        self._place((-(depth - 1), to), Group(lanes))

    def _copy(self, lanes: Array, source: int, source_at: int, to: int, to_at: int, size: int) -> None:
        steps = np.arange(size)
        base = self.local_base[lanes]
        read = (base + self._frame(source)[lanes].astype(np.int64) + source_at)[:, None] + steps
        write = (base + self._frame(to)[lanes].astype(np.int64) + to_at)[:, None] + steps
        for views in (self.local.views, self.local.written):
            views[0][write] = views[0][read]

    # Messages.

    def thread(self, lane: int) -> tuple[Triple, Triple]:
        """(CTA, thread) of a lane."""

        cta = ctaid(int(self.cta[lane]) + self.first, self.shape.grid, self.shape.cluster)
        return cta, split(int(self.tid[lane]), self.shape.block)

    def cta_name(self, cta: int) -> Triple:
        """The index in the grid of a CTA of this batch."""
        return self.thread(cta * self.shape.lanes)[0]

    def fault(self, what: str, ins: Instr | None, lanes: Array) -> KernelFault:
        cta, thread = self.thread(int(lanes[0]))
        place = where(self.program.ptx, ins, self.machine.source_roots)
        return KernelFault(fault(self.program.entry.name, what, cta, thread, len(lanes), place))

    @staticmethod
    def _origin(error: Exception, lines: dict[int, Instr], lanes: Array) -> tuple[Instr | None, Array]:
        """The instruction that raised and the lanes that took part, from the frame of the generated function."""
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_name == "block" and trace.tb_frame.f_code.co_filename.startswith("<ptx "):
                found = trace.tb_frame.f_locals
                ins = lines.get(trace.tb_lineno)
                if ins is not None and ins.guard is not None and "LG" in found:
                    lanes = found["LG"]
                return ins, lanes
            trace = trace.tb_next
        return None, lanes

    def describe_waiting(self) -> list[str]:
        """One paragraph for each group that waits: where, how many threads, and whom for."""
        lines = self.waits.describe() + self.columns.describe()
        for groups, how in ((self.parked, "wait at"), (self.ready, "poll memory that nobody writes, in a loop at")):
            for key, group in sorted(groups.items()):
                block = self.program.blocks[key[1]]
                ins = block.sync or (block.instrs[0] if block.instrs else None)
                cta, thread = self.thread(int(group.lanes[0]))
                place = where(self.program.ptx, ins, self.machine.source_roots, "    ")
                lines.append(f"  {len(group.lanes)} threads, first CTA {cta} thread {thread}, {how}{place}")
                lines.extend(self._missing(key, group))
        return lines

    def _missing(self, key: Key, group: Group) -> list[str]:
        sync = self.program.blocks[key[1]].sync
        if sync is None or key not in self.parked:
            return []
        lane = int(group.lanes[0])
        if is_cluster_wait(sync) and self.clusters is not None:
            return [self.clusters.waiting_for(lane)]
        if is_warp_sync(sync):
            mask = int(self._operand(key, sync_mask(sync), group.lanes[:1])[0])
            here = int(collective.warp_bits(self.nlanes, group.lanes)[lane >> 5])
            living = int(collective.warp_bits(self.nlanes, np.nonzero(self.alive)[0])[lane >> 5])
            return [f"    its mask {mask:#010x} names lanes that are elsewhere: {mask & living & ~here:#010x}"]
        if is_warpgroup_sync(sync):
            return ["    all 128 threads of a warpgroup, four warps from a multiple of four on, must come here"]
        same = (self.cta == self.cta[lane]) & (self.at_barrier == self.at_barrier[lane])
        want = int(self.wants[lane]) or int(np.count_nonzero(self.alive & (self.cta == self.cta[lane])))
        came = int(np.count_nonzero(same)) + int(self.arrived[self.cta[lane], self.at_barrier[lane]])
        return [f"    barrier {int(self.at_barrier[lane])} of that CTA: {came} of {want} threads have come"]
