"""The machine: modules, launches, and the program each entry becomes.

A launch runs in batches of whole CTAs, a few thousand lanes each (see `batch.py`). A batch in which every thread waits
for memory that only other CTAs can write is set aside while the next batch runs; only when no batch can go on and no
CTA is left to start is it a deadlock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv4_rt.emulator import (  # noqa: F401  isa_*: they register the instructions
    isa_arith,
    isa_async,
    isa_cluster,
    isa_launch,
    isa_memory,
    isa_mma,
    isa_tcgen05,
    isa_tma,
)
from dsv4_rt.emulator.async_ import COMPLETIONS
from dsv4_rt.emulator.batch import PATIENCE, Batch, Grid
from dsv4_rt.emulator.clusters import MAX_CLUSTER
from dsv4_rt.emulator.codegen import Code, Layout, chain, compile_block, new_namespace, translate_block
from dsv4_rt.emulator.intrinsics import EXTERNAL
from dsv4_rt.emulator.ir import (
    Address,
    Block,
    Function,
    Instr,
    Reg,
    Sym,
    Var,
    build_blocks,
    fragments,
    is_warpgroup_sync,
    liveness,
    maybe_unset,
    members,
    results,
    sources,
)
from dsv4_rt.emulator.launchcontrol import Pool, resident
from dsv4_rt.emulator.memory import SHARED_FIRST, Memory
from dsv4_rt.emulator.ptx import Ptx, parse
from dsv4_rt.emulator.races import LaunchClock
from dsv4_rt.emulator.report import LaunchReport, where
from dsv4_rt.emulator.trace import Step, hook
from dsv4_rt.emulator.watched import WatchedMemory
from dsv4_rt.errors import Deadlock, EmulatorError, LaunchError, UnsupportedInstruction

LANES_PER_BATCH = 8192  # 4.1 and 4.3 of the measurements: more falls out of cache, fewer pays for dispatch
ORDERS = ("min-pc", "random", "reverse")
WORKSPACE = 64  # bytes; cooperative_groups uses the second word, as the counter of grid.sync()
FUNCTIONS = 4 << 48  # what pointers to functions hold lies above every window of memory
STACK = 16384  # bytes of local memory a thread has for the frames of the functions it calls


@dataclass(frozen=True)
class Entry:
    """A kernel of a module. `params` are (offset, size) in the parameter buffer."""

    name: str
    params: tuple[tuple[int, int], ...]
    param_bytes: int
    max_threads: int | None = None
    required_threads: tuple[int, int, int] | None = None
    cluster: tuple[int, int, int] | None = None


@dataclass
class Program:
    """An entry with every function it may call: blocks, layouts and the code compiled so far."""

    ptx: Ptx
    entry: Function
    blocks: list[Block]
    first: dict[str, int]  # function -> its first block
    layouts: dict[str, Layout]
    registers: dict[str, list[tuple[int, int]]]  # function -> (slot, bits) of registers and their shadows
    functions: dict[int, str]  # what a pointer to a function holds -> its name
    shared_bytes: int
    local_bytes: int
    tiled: bool = False  # whether TMA writes tiles and wgmma or tcgen05.mma reads them: see `tiles.py`
    proxied: bool = False  # whether something reads shared memory through the async proxy
    cancels: bool = False  # whether it takes over the work of CTAs that have not begun
    symbols: dict[int, str] = field(default_factory=dict)  # shared offset -> variable
    namespace: dict[str, Any] = field(default_factory=new_namespace)
    codes: dict[tuple[int, bool, bool], Code] = field(default_factory=dict)

    def symbol_at(self, offset: int) -> str:
        """The shared variable an offset lies in, `name+bytes`; empty if none is known."""
        first = max((at for at in self.symbols if at <= offset), default=-1)
        if first < 0:
            return ""
        return self.symbols[first] + (f"+{offset - first}" if offset > first else "")

    def code(self, block: int, full: bool, dense: bool) -> Code:
        """The compiled variant of a block, made on first use."""
        found = self.codes.get((block, full, dense))
        if found is None:
            head = self.blocks[block]
            name = head.function.name
            first = self.first[name]
            parts = chain(self.blocks[first:], head, first) if dense else [head]
            found = compile_block(parts, self.layouts[name], full, dense, self.namespace)
            self.codes[block, full, dense] = found
        return found


class Module:
    """Loaded PTX: entries by name, and its global and constant variables in the machine's memory."""

    def __init__(self, ptx: Ptx, name: str, memory: Memory, roots: Sequence[Path]) -> None:
        self.ptx, self.name, self.memory, self.roots = ptx, name, memory, roots
        self.entries: Mapping[str, Entry] = {
            function.name: _entry(function) for function in ptx.functions.values() if function.entry
        }
        self.addresses: dict[int, int] = {}
        self.functions = {each: FUNCTIONS + 16 * i for i, each in enumerate(ptx.functions, 1)}
        self.globals: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)
        self.programs: dict[tuple[str, bool], Program] = {}
        for var in ptx.variables.values():
            self._place(var)
        for var in ptx.variables.values():
            self._fill(var)

    def _place(self, var: Var) -> None:
        if var.space in ("global", "const"):
            label = f"{'constant' if var.space == 'const' else 'variable'} {var.name}"
            address = self.memory.alloc(var.size, align=max(var.align, 16), label=label, writable=var.space != "const")
            self.addresses[id(var)] = address
            self.globals[var.name] = (address, var.size)

    def _fill(self, var: Var) -> None:
        if id(var) not in self.addresses or not var.size:
            return
        view = self.memory.view(self.addresses[id(var)], var.size)
        view[:] = 0
        self.memory.mark_written(self.addresses[id(var)], var.size)
        for offset, size, value in var.initial:
            if isinstance(value, Sym):
                target = self.ptx.variables.get(value.name)
                function = self.functions.get(self.ptx.resolve(value.name))
                if function is None and (target is None or id(target) not in self.addresses):
                    raise UnsupportedInstruction(f"{var.name}: the address of {value.name} in an initialiser")
                bits = function or self.addresses[id(target)] + value.offset
            else:
                bits = value.value
            view[offset : offset + size] = list((bits & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def program(self, name: str, clustered: bool = False) -> Program:
        """Everything an entry needs, checked: raises UnsupportedInstruction before anything runs.

        clustered: for launches with clusters, in which shared addresses carry the rank of a CTA.
        """
        if (name, clustered) not in self.programs:
            self.programs[name, clustered] = _build(self, name, clustered)
        return self.programs[name, clustered]

    def unload(self) -> None:
        """Free the module's variables."""
        for address, _ in self.globals.values():
            self.memory.free(address)
        self.globals.clear()


def _entry(function: Function) -> Entry:
    offset, params = 0, []
    for var in function.params:
        offset = -(-offset // var.align) * var.align
        var.offset = offset
        params.append((offset, var.size))
        offset += var.size
    required = function.directives.get("reqntid")
    limit = function.directives.get("maxntid")
    threads = int(np.prod(limit)) if limit else None
    padded = (*required, 1, 1)[:3] if required else None
    dims = function.directives.get("reqnctapercluster")
    cluster = (*dims, 1, 1)[:3] if dims else None
    return Entry(function.name, tuple(params), offset, threads, padded, cluster)  # type: ignore[arg-type]


def _build(module: Module, name: str, clustered: bool) -> Program:
    ptx = module.ptx
    if name not in module.entries:
        raise EmulatorError(f"{module.name}: no entry {name}; it has {', '.join(sorted(module.entries)) or 'none'}")
    order = _reachable(module, name)
    calls = len(order) > 1
    blocks: list[Block] = []
    first: dict[str, int] = {}
    shared = _layout_shared(ptx, order)
    addresses = {**module.addresses, **shared[0]}
    layouts: dict[str, Layout] = {}
    registers: dict[str, list[tuple[int, int]]] = {}
    for function in order:
        _layout_frame(function)
        first[function.name] = len(blocks)
        mine = build_blocks(function, len(blocks))
        liveness(mine)
        layout, slots = _slots(function, mine, addresses)
        aliases = {alias: module.functions[of] for alias, of in ptx.aliases.items() if of in module.functions}
        layout.functions = module.functions | aliases
        layouts[function.name], registers[function.name] = layout, slots
        blocks.extend(mine)
    pointers = {address: each for each, address in module.functions.items()}
    program = Program(
        ptx, ptx.functions[name], blocks, first, layouts, registers, pointers, shared[1], STACK if calls else 0
    )
    ops = {(ins.op, mod) for function in order for ins in function.instrs for mod in ins.mods}
    matrices = {("wgmma", "mma_async"), ("tcgen05", "mma"), ("tcgen05", "cp")}
    program.tiled = bool(matrices & ops) and ("cp", "tensor") in ops
    program.proxied = any(_reads_by_proxy(ins) for function in order for ins in function.instrs)
    program.symbols = {shared[0][id(var)]: var.name for var in shared[2]}
    program.cancels = ("clusterlaunchcontrol", "try_cancel") in ops
    program.namespace["watch_global"] = isinstance(module.memory, WatchedMemory)
    program.namespace["clustered"] = clustered
    program.namespace["target"] = ptx.target
    _check_groups(program, module.roots)
    _verify(program, module.roots)
    return program


def _reachable(module: Module, name: str) -> list[Function]:
    """The functions an entry may call, in text order, and the entry last."""
    ptx, work = module.ptx, [name]
    seen: set[str] = set()
    through_pointers = False
    while work:
        at = work.pop()
        if at in seen:
            continue
        seen.add(at)
        for ins in ptx.body(at).instrs:
            if ins.op != "call":
                continue
            target = ins.args[0] if ins.args else None
            if isinstance(target, Reg):
                through_pointers = True
                continue
            callee = ptx.resolve(target.name) if isinstance(target, Sym) else ""
            if callee in EXTERNAL and not ptx.defined(callee):
                continue
            if not ptx.defined(callee):
                what = f"a call of {callee}, which this module does not define,"
                place = where(ptx, ins, module.roots)
                raise UnsupportedInstruction(f"{name}: {what} is not implemented by the emulator{place}")
            work.append(callee)
        if through_pointers and not work:
            work = [each for each in _pointed_to(ptx) if each not in seen]
    order = sorted((ptx.functions[each] for each in seen if each != name), key=lambda f: f.line)
    return [*order, ptx.functions[name]]


def _pointed_to(ptx: Ptx) -> list[str]:
    """Functions whose address a variable or any code of the module takes: another kernel may have stored it."""
    held = {v.name for var in ptx.variables.values() for _, _, v in var.initial if isinstance(v, Sym)}
    for name in [each for each in ptx.functions if ptx.defined(each)]:
        taken = [ins for ins in ptx.body(name).instrs if ins.op not in ("call", "bra", "brx")]
        held |= {symbol.name for ins in taken for symbol in _symbols(ins) if symbol.var is None}
    names = sorted({ptx.resolve(each) for each in held} & set(ptx.functions))
    return [each for each in names if ptx.defined(each) and not ptx.functions[each].entry]


def _reads_by_proxy(ins: Instr) -> bool:
    """Whether an instruction reads shared memory through the async proxy."""
    if ins.op == "cp":
        return "bulk" in ins.mods and ("shared::cta" in ins.mods[:-1]) and "prefetch" not in ins.mods
    return ins.op in ("wgmma", "tcgen05")


def _layout_shared(ptx: Ptx, functions: Sequence[Function]) -> tuple[dict[int, int], int, list[Var]]:
    """Addresses of shared variables, the bytes before the dynamic part, which starts at its own alignment, and them."""
    used = {a.var for f in functions for ins in f.instrs for a in _symbols(ins) if a.var is not None}
    listed = [v for v in ptx.variables.values() if v.space == "shared" and v in used]
    listed += [v for f in functions for v in f.variables if v.space == "shared"]
    at, found = SHARED_FIRST, {}
    for var in listed:
        if var.size:
            at = -(-at // var.align) * var.align
            found[id(var)] = at
            at += var.size
    dynamic = [v for v in listed if not v.size]
    align = max((v.align for v in dynamic), default=1)
    end = -(-at // align) * align
    for var in dynamic:
        found[id(var)] = end
    return found, (end if dynamic else at) - SHARED_FIRST, [*(v for v in listed if v.size), *dynamic]


def _symbols(ins: Instr) -> list[Sym]:
    found = [a for a in ins.args if isinstance(a, Sym)]
    bases = [a.base for a in ins.args if isinstance(a, Address)]
    return [*found, *(base for base in bases if isinstance(base, Sym))]


def _layout_frame(function: Function) -> None:
    at = 0
    mine = [v for v in function.variables if v.space in ("local", "param")]
    for var in mine if function.entry else [*function.params, *function.returns, *mine]:
        at = -(-at // var.align) * var.align
        var.offset = at
        at += var.size
    function.frame_size = -(-at // 16) * 16


def _slots(function: Function, blocks: list[Block], addresses: dict[int, int]) -> tuple[Layout, list[tuple[int, int]]]:
    crossing = 0
    for block in blocks:
        crossing |= block.live_in | block.live_out
    products = [ins for block in blocks for ins in block.instrs if is_warpgroup_sync(ins)]
    tensor = {reg: False for ins in products for reg in fragments(ins)}
    tensor |= {reg: True for ins in products for reg in results(ins)}
    unset = maybe_unset(blocks)
    read = {reg for block in blocks for ins in block.instrs for reg in sources(ins)}
    read |= {block.reg for block in blocks if block.reg is not None}
    layout = Layout(
        addresses=addresses, unset=set(members(function, unset)), unread=set(function.regs) - read, tensor=tensor
    )
    slots: list[tuple[int, int]] = []
    for reg in members(function, crossing):
        layout.slots[reg] = len(slots)
        slots.append((len(slots), reg.bits))
    for reg in members(function, crossing & unset):
        layout.shadows[reg] = len(slots)
        slots.append((len(slots), 1))
    return layout, slots


def _check_groups(program: Program, roots: Sequence[Path]) -> None:
    """All tcgen05 instructions of a kernel name the same cta_group."""
    named: dict[str, Instr] = {}
    for block in program.blocks:
        for ins in block.instrs:
            if ins.op == "tcgen05":
                named |= {mod: ins for mod in ins.mods if mod.startswith("cta_group::") and mod not in named}
    if len(named) > 1:
        first, second = named.values()
        raise EmulatorError(
            f"{program.entry.name}: cta_group::1 and cta_group::2 in one kernel: {second.name}"
            f"{where(program.ptx, second, roots)}\n  but {first.name}{where(program.ptx, first, roots)}"
        )


def _verify(program: Program, roots: Sequence[Path]) -> None:
    """Translate every block once, so that whatever is not implemented is refused before the launch."""
    for block in program.blocks:
        try:
            translate_block([block], program.layouts[block.function.name], False, False, program.namespace)
        except UnsupportedInstruction as error:
            ins = getattr(error, "ins", None)
            message = f"{program.entry.name}: {error}{where(program.ptx, ins, roots)}"
            raise UnsupportedInstruction(message) from None


class Machine:
    """An emulated GPU.

    Args:
        arch: the architecture to be; modules for another are accepted, since PTX says what it needs.
        order: which threads run first: "min-pc" (lowest program point, the fastest), "random" (seeded), "reverse"
            (highest program point and last warp first). A right kernel gives the same result under all.
        seed: for order="random" and completion="random".
        ctas_per_sm: CTAs that run on one SM at the same time and share its tensor memory.
        source_roots: folders in which the CUDA files named by line information are looked up for error messages.
        trace: called after every instruction with what it did, see `trace.Tracer`; None costs nothing.
        check_global_writes: report threads of one launch that touch the same bytes of global memory, one of them with
            a store, without a barrier, or atomics and a fence, between them.
        check_uninitialised: report reads of bytes of allocations that neither a kernel nor, as far as is known, the
            host has written (see `watched.py`).
        check_tensor_fences: report work on tensor memory that another thread has worked on, where the one has not
            executed tcgen05.fence::before_thread_sync or the other ::after_thread_sync. Triton 3.9 leaves them out.
        completion: when asynchronous operations run (see `async_.py`): "early" at once, "late" when waited for or when
            nothing else can go on, "random" at seeded moments. A right kernel gives the same result under all.
        copies_in_order: do not report a tcgen05.cp over tensor memory that earlier operations of its own thread use.
            The PTX ISA does not order the two, but code in use (Triton 3.9, DeepGEMM) relies on it.
    """

    def __init__(
        self,
        arch: str = "sm_100a",
        *,
        order: str = "min-pc",
        seed: int = 0,
        ctas_per_sm: int = 1,
        source_roots: Sequence[str | Path] = (),
        trace: Callable[[Step], None] | None = None,
        check_global_writes: bool = False,
        check_uninitialised: bool = False,
        check_tensor_fences: bool = False,
        completion: str = "early",
        copies_in_order: bool = False,
    ) -> None:
        if order not in ORDERS:
            raise EmulatorError(f"Machine: order {order!r} is none of {', '.join(ORDERS)}")
        if completion not in COMPLETIONS:
            raise EmulatorError(f"Machine: completion {completion!r} is none of {', '.join(COMPLETIONS)}")
        self.arch, self.order, self.seed, self.completion = arch, order, seed, completion
        self.copies_in_order, self.check_tensor_fences = copies_in_order, check_tensor_fences
        self.source_roots = tuple(Path(root) for root in source_roots)
        if ctas_per_sm < 1:
            raise EmulatorError(f"Machine: ctas_per_sm {ctas_per_sm} is not a positive number")
        self.ctas_per_sm = ctas_per_sm
        watched = check_global_writes or check_uninitialised
        self.memory = WatchedMemory(check_global_writes, check_uninitialised) if watched else Memory()
        self._random = random.Random(seed)
        self.dice = random.Random(seed + 1)  # of the random completion schedule
        self._trace = trace
        self.clock = LaunchClock(0)
        self.workspace = 0  # of a cooperative launch: what cooperative_groups finds in %envreg1 and %envreg2

    def load(self, ptx: str, name: str) -> Module:
        """Load a module; `name` stands in messages. Functions are parsed when first launched."""
        return Module(parse(ptx), name, self.memory, self.source_roots)

    def launch(
        self,
        module: Module,
        entry: str,
        grid: Sequence[int] | int,
        block: Sequence[int] | int,
        params: bytes,
        *,
        dynamic_shared: int = 0,
        cluster: Sequence[int] | int | None = None,
        cooperative: bool = False,
    ) -> LaunchReport:
        """Run a kernel to its end.

        Args:
            module, entry: which kernel.
            grid, block: CTAs and threads, up to three sizes.
            params: the parameter buffer as the cubin lays it out; pointers are real addresses.
            dynamic_shared: bytes of dynamic shared memory a CTA.
            cluster: CTAs a cluster, up to three sizes; None for what .reqnctapercluster says, or no clusters.
            cooperative: run all CTAs at once.

        Raises:
            LaunchError: the geometry or the parameters do not fit the kernel.
            UnsupportedInstruction: the kernel uses what the emulator does not implement; nothing has run.
            KernelFault, Deadlock: the kernel is wrong; memory keeps what it wrote so far.
        """
        wanted = module.entries[entry].cluster if cluster is None and entry in module.entries else cluster
        program = module.program(entry, wanted is not None)
        if self._trace is not None:  # before the first block is compiled
            program.namespace["trace"] = hook(self._trace)
        shape = Grid(_three(grid), _three(block), dynamic_shared, _three(wanted or 1), wanted is not None)
        self._check(module.entries[entry], shape, params)
        report = LaunchReport(entry, shape.ctas, shape.ctas * shape.threads)
        self.clock = LaunchClock(shape.ctas)
        size = module.entries[entry].param_bytes
        address = self.memory.alloc(max(size, 1), align=128, label=f"parameters of {entry}", writable=False)
        self.memory.view(address, max(size, 1))[:size] = np.frombuffer(params, np.uint8)[:size]
        self.memory.mark_written(address, size)
        if cooperative:
            self.workspace = self.memory.alloc(WORKSPACE, label=f"grid workspace of {entry}")
            self.memory.view(self.workspace, WORKSPACE)[:] = 0
            self.memory.mark_written(self.workspace, WORKSPACE)
        if isinstance(self.memory, WatchedMemory):
            self.memory.begin(program)
        try:
            with np.errstate(all="ignore"):
                self._run(program, shape, params, address, report, cooperative)
        finally:
            self.memory.free(address)
            if self.workspace:
                self.memory.free(self.workspace)
                self.workspace = 0
        return report

    def _check(self, entry: Entry, shape: Grid, params: bytes) -> None:
        if len(params) < entry.param_bytes:
            raise LaunchError(f"{entry.name}: {len(params)} bytes of parameters; the kernel takes {entry.param_bytes}")
        if min(shape.cluster) < 1 or shape.cluster_size > MAX_CLUSTER:
            raise LaunchError(f"{entry.name}: a cluster has 1 to {MAX_CLUSTER} CTAs, not {shape.cluster}")
        if entry.cluster is not None and shape.cluster != entry.cluster:
            raise LaunchError(f"{entry.name}: cluster {shape.cluster}; the kernel requires {entry.cluster}")
        if any(g % c for g, c in zip(shape.grid, shape.cluster, strict=True)):
            raise LaunchError(f"{entry.name}: clusters of {shape.cluster} do not divide the grid {shape.grid}")
        if min(*shape.grid, *shape.block) < 1 or shape.threads > 1024:
            raise LaunchError(f"{entry.name}: grid {shape.grid} and block {shape.block} cannot be launched")
        if entry.max_threads is not None and shape.threads > entry.max_threads:
            raise LaunchError(f"{entry.name}: block of {shape.threads} threads; the kernel allows {entry.max_threads}")
        if entry.required_threads is not None and shape.block != entry.required_threads:
            raise LaunchError(f"{entry.name}: block {shape.block}; the kernel requires {entry.required_threads}")

    def _run(
        self, program: Program, shape: Grid, params: bytes, address: int, report: LaunchReport, cooperative: bool
    ) -> None:
        size = shape.cluster_size
        per_batch = shape.ctas if cooperative else max(1, LANES_PER_BATCH // (shape.lanes * size)) * size
        if program.cancels and not cooperative:
            per_batch = min(per_batch, resident(shape.ctas // size, self.completion, self.dice) * size)
        pool = Pool(shape.ctas, size, self.order == "reverse")
        waiting: list[tuple[Batch, int]] = []  # batches that gave up, and the memory version at which they did
        while pool or waiting:
            turn = next((i for i, (_, version) in enumerate(waiting) if version != self.memory.version), None)
            if turn is not None:
                batch, _ = waiting.pop(turn)
            elif pool:
                batch = Batch(self, program, shape, *pool.begin(per_batch), params, address, report, pool)
            else:
                waiting = self._last_chance(program, [batch for batch, _ in waiting])
                continue
            if not batch.run(PATIENCE // 50):
                waiting.append((batch, self.memory.version))

    def _last_chance(self, program: Program, waiting: list[Batch]) -> list[tuple[Batch, int]]:
        """Only polling threads are left. Loops with a bound may still end; otherwise it is a deadlock."""
        before = self.memory.version
        left = [batch for batch in waiting if not batch.run(PATIENCE)]
        if len(left) == len(waiting) and self.memory.version == before:
            lines = [line for batch in left for line in batch.describe_waiting()]
            raise Deadlock(f"{program.entry.name}: no thread can go on\n" + "\n".join(lines))
        return [(batch, before) for batch in left]

    def pick(self, keys: list[tuple[int, int]]) -> tuple[int, int]:
        """The group to run next: (-call depth, block)."""
        if self.order == "min-pc":
            return min(keys)
        if self.order == "reverse":
            return max(keys)
        return self._random.choice(keys)


def _three(size: Sequence[int] | int) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(int(s) for s in size)
    if not 1 <= len(sizes) <= 3:
        raise LaunchError(f"a grid or block has one to three sizes, not {len(sizes)}")
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


