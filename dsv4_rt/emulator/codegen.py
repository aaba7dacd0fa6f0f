"""Blocks of PTX to Python functions over NumPy.

A register is one array of raw bits over the lanes of a group, or a one-element array where the value is the same in all
lanes (immediates, parameters and what is computed from them: NumPy broadcasting does the rest). Each block compiles on
first use into one of three variants:

    full      every lane of the batch: registers are whole arrays, replaced when written
    dense     whole warps: live-in registers are gathered once, live-out registers scattered once
    sparse    any lanes; the block ends before the next warp-wide operation instead of running through it

Instructions register their translation with `@handles`; they see an Emitter, ask it for operands and define results.
"""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4_rt.emulator import alu, atomics, clusters, collective, copies, mma, remote, tcgen05_cp, tma
from dsv4_rt.emulator.ir import (
    TYPES,
    Address,
    Block,
    Function,
    Instr,
    Not,
    Number,
    Operand,
    Pair,
    Reg,
    Sink,
    Special,
    Sym,
    Var,
    is_warp_sync,
    members,
    results,
    sources,
)
from dsv4_rt.emulator.memory import LOCAL_FIRST, UNSIGNED
from dsv4_rt.errors import UnsupportedInstruction

Handler = Callable[["Emitter", Instr, "Mods"], None]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register the translation of instructions by base name."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


class Mods:
    """An instruction's modifiers, taken one by one; what is left at the end is not implemented."""

    def __init__(self, ins: Instr) -> None:
        self.ins = ins
        self.types = ins.types
        self.left = [m for m in ins.mods if m not in TYPES]

    def flag(self, *names: str) -> bool:
        found = [m for m in self.left if m in names]
        self.left = [m for m in self.left if m not in names]
        return bool(found)

    def choose(self, *names: str, default: str = "") -> str:
        found = [m for m in self.left if m in names]
        self.left = [m for m in self.left if m not in names]
        if len(found) > 1:
            raise self.refuse()
        return found[0] if found else default

    def refuse(self, why: str = "") -> UnsupportedInstruction:
        return UnsupportedInstruction(why or f"{self.ins.name} is not implemented by the emulator")

    def done(self) -> None:
        if self.left:
            raise self.refuse(f"modifier .{self.left[0]} of {self.ins.name} is not implemented by the emulator")


@dataclass(slots=True)
class Layout:
    """Where a program keeps things: register slots per function, addresses of symbols."""

    slots: dict[Reg, int] = field(default_factory=dict)
    shadows: dict[Reg, int] = field(default_factory=dict)  # slots of "has been set" flags
    unset: set[Reg] = field(default_factory=set)
    unread: set[Reg] = field(default_factory=set)  # written, but no instruction reads them
    tensor: dict[Reg, bool] = field(default_factory=dict)  # a wgmma uses them; whether it accumulates in them
    addresses: dict[int, int] = field(default_factory=dict)  # id(Var) -> address, for global, const and shared
    functions: dict[str, int] = field(default_factory=dict)  # name -> what a pointer to it holds


@dataclass(slots=True)
class Code:
    """A compiled block variant."""

    run: Callable[..., Any]
    count: int
    opcodes: Counter[str]
    last: Block  # the block whose end decides where the lanes go
    polls: bool
    lines: dict[int, Instr]


class Emitter:
    """Writes the Python of one block variant."""

    def __init__(self, function: Function, layout: Layout, full: bool, dense: bool, namespace: dict[str, Any]) -> None:
        self.function, self.layout, self.full, self.dense = function, layout, full, dense
        self.namespace = namespace
        self.source: list[str] = ["def block(B, R, F, L, n):"]
        self.lines: dict[int, Instr] = {}
        self.env: dict[Reg, str] = {}
        self.set_env: dict[Reg, str] = {}
        self.dirty: dict[Reg, None] = {}
        self.constant: set[str] = set()
        self.cached: dict[str, str] = {}
        self.temps = 0
        self.indent = " "
        self.guarded = ""  # name of the positions that pass the guard, inside a guarded memory access
        self.ins: Instr | None = None
        self.mask = ""  # name of the guard's bool array
        self.lane_operand = False
        self.touched: dict[Reg, int] = {}  # registers in layout.tensor accessed since a wgmma.fence, and the line
        self.observed: set[Reg] = set()  # such registers known not to be in flight
        self.after_fence = False

    # Text.

    def emit(self, text: str) -> None:
        self.source.append(self.indent + text)
        if self.ins is not None:
            self.lines[len(self.source)] = self.ins

    def temp(self, expr: str, constant: bool = False) -> str:
        name = f"t{self.temps}"
        self.temps += 1
        self.emit(f"{name} = {expr}")
        if constant:
            self.constant.add(name)
        return name

    def number(self, value: int, bits: int) -> str:
        """A one-element array constant."""
        value &= (1 << bits) - 1
        name = f"c{bits}_{value:x}"
        if name not in self.namespace:
            array: Any
            if bits == 1:
                array = np.array([bool(value)])
            elif bits == 128:
                array = np.array([[value & (1 << 64) - 1, value >> 64]], np.uint64)
            else:
                array = np.array([value], f"u{bits // 8}")
            array.flags.writeable = False
            self.namespace[name] = array
        self.constant.add(name)
        return name

    # Reading.

    def _fetch(self, slot: int, name: str) -> str:
        self.emit(f"{name} = R[{slot}]" if self.full else f"{name} = R[{slot}].take(L, axis=0)")
        return name

    def reg(self, reg: Reg) -> str:
        """The whole-group array of a register, whatever the guard."""
        name = self.env.get(reg)
        if name is None:
            indent, self.indent = self.indent, " "
            name = self.env[reg] = self._fetch(self.layout.slots[reg], f"v{reg.index}")
            self.indent = indent
        return name

    def previous(self, reg: Reg) -> str:
        """What a register holds before a guarded result; any value will do where it holds nothing."""
        known = reg in self.env or reg in self.layout.slots
        return self.reg(reg) if known else self.number(0, reg.bits)

    def is_set(self, reg: Reg) -> str:
        """The array that says in which lanes a register has been set; empty when it always is."""
        if reg not in self.layout.unset:
            return ""
        name = self.set_env.get(reg)
        if name is None:
            if reg in self.layout.shadows:
                name = self._fetch(self.layout.shadows[reg], f"s{reg.index}")
            else:
                name = self.number(0, 1)
            self.set_env[reg] = name
        return name

    def check_set(self, operand: Operand, use: str) -> None:
        """A register that may be unset must be set where it becomes an address, a branch or a stored value."""
        reg = operand.reg if isinstance(operand, Not) else operand
        flags = self.is_set(reg) if isinstance(reg, Reg) else ""
        if flags and isinstance(reg, Reg):
            self.emit(f"B.check_set({self._narrow(flags)}, {reg.name!r}, {use!r}, {self.count})")

    @property
    def count(self) -> str:
        """The expression for the number of lanes that take part."""
        return f"len({self.guarded})" if self.guarded else "n"

    @property
    def lanes(self) -> str:
        return "LG" if self.guarded else "L"

    def _narrow(self, name: str) -> str:
        if self.guarded and name not in self.constant:
            return f"{name}[{self.guarded}]"
        return name

    def use(self, operand: Operand, ty: str) -> str:
        """The raw bits of a source operand, in the width of the type; one element when all lanes agree."""
        bits = TYPES[ty][0]
        if isinstance(operand, Number):
            if operand.float_bits and operand.float_bits != bits:
                raise UnsupportedInstruction(f"a literal of {operand.float_bits} bits as {ty}")
            return self.number(operand.value, bits)
        if isinstance(operand, Reg):
            name = self._narrow(self.reg(operand))
            if operand.bits > bits and bits > 1:
                return self.derived(name, f"{{}}.astype(U{bits})")
            if operand.bits < bits:
                raise UnsupportedInstruction(f"the {operand.bits}-bit register {operand.name} as {ty}")
            return self._keep(name)
        if isinstance(operand, Not):
            return self.derived(self._narrow(self.reg(operand.reg)), "~{}")
        if isinstance(operand, Special):
            return self.special(operand.name, bits)
        if isinstance(operand, Sym):
            return self.symbol(operand, bits)
        raise UnsupportedInstruction(f"an operand of {self.ins.name if self.ins else ''} has a form that is not known")

    def _keep(self, name: str) -> str:
        if name.endswith("]"):
            return self.temp(name)
        return name

    def derived(self, name: str, form: str) -> str:
        return self.temp(form.format(name), name in self.constant)

    def fill(self, name: str) -> str:
        """The same value as an array over the lanes that take part."""
        return self.temp(f"{name}.repeat({self.count}, axis=0)") if name in self.constant else name

    def special(self, name: str, bits: int) -> str:
        key = f"{name}/{bits}/{self.guarded}"
        if key not in self.cached:
            value, uniform = f"B.special({name!r})", name in UNIFORM
            if name in collective.PER_GROUP:
                value, uniform = f"B.group_special({name!r}, {self.lanes})", name not in ("activemask",)
            elif not uniform and self.guarded:
                value += "[LG]"
            elif not uniform and not self.full:
                value += "[L]"
            if bits != SPECIAL_BITS.get(name, 32):
                value += f".astype(U{bits})"
            result = self.temp(value, uniform)
            if name in collective.PER_GROUP or self.guarded:
                return result
            self.cached[key] = result
        return self.cached[key]

    def symbol(self, operand: Sym, bits: int) -> str:
        """The address of a variable, in its own space (`mov`), plus the offset."""
        var = operand.var
        if var is None and operand.name in self.layout.functions:
            return self.number(self.layout.functions[operand.name], bits)
        if var is None:
            raise UnsupportedInstruction(f"the address of {operand.name}, which is not a variable of this module")
        if var.space == "param" and self.function.entry and var in self.function.params:
            return self.temp(f"B.param_address({var.offset + operand.offset}, U{bits})", True)
        if var.space in ("local", "param"):
            if self.function.entry:
                return self.number(LOCAL_FIRST + var.offset + operand.offset, bits)
            key = f"F/{bits}/{self.guarded}"
            if key not in self.cached:
                frame = f"F[{self.lanes}]" if self.guarded or not self.full else "F"
                self.cached[key] = self.temp(f"{frame}.astype(U{bits})")
            return self.temp(f"{self.cached[key]} + U{bits}({var.offset + operand.offset})")
        name = self.number(self.layout.addresses[id(var)] + operand.offset, bits)
        if var.space == "shared" and self.namespace.get("clustered"):
            lanes = f"[{self.lanes}]" if self.guarded or not self.full else ""
            return self.temp(f"B.rank_bits{lanes}.astype(U{bits}) + {name}")
        return name

    # Writing.

    def define(self, operand: Operand, expr: str, ty: str, constant: bool = False) -> None:
        """Give a result its value: bits in the type's width, extended to the register's as the type's kind says."""
        if isinstance(operand, Sink):
            self.emit(expr)
            return
        if not isinstance(operand, Reg):
            raise UnsupportedInstruction(f"{self.ins.name if self.ins else ''}: a result that is not a register")
        bits = TYPES[ty][0]
        if operand.bits > bits:
            expr = f"resize({ty!r}, {expr}, U{operand.bits})"
        elif operand.bits < bits:
            raise UnsupportedInstruction(f"a {ty} result into the {operand.bits}-bit register {operand.name}")
        name = f"v{operand.index}_{self.temps}"
        self.temps += 1
        if self.guarded:
            # The whole array was copied before the guard's branch: see guarded_access.
            self.emit(f"{self.env[operand]}[{self.guarded}] = {expr}")
        elif self.mask:
            old = self.previous(operand)
            mask = f"{self.mask}[:, None]" if operand.bits == 128 else self.mask
            self.emit(f"{name} = where({mask}, {expr}, {old})")
            self.env[operand] = name
        else:
            self.emit(f"{name} = {expr}")
            if constant:
                self.constant.add(name)
            self.env[operand] = name
        self.dirty[operand] = None
        if not self.guarded:  # otherwise guarded_access does it, outside the branch
            self._define_set(operand)

    def alias(self, operand: Reg, name: str) -> None:
        """Make a register another name for a value; only without a guard."""
        self.env[operand] = name
        self.dirty[operand] = None
        self._define_set(operand)

    def _define_set(self, reg: Reg) -> None:
        if reg not in self.layout.unset or self.ins is None:
            return
        flags = self.number(1, 1)
        if self.ins.op == "selp":
            flags = self._set_selected(self.ins, flags)
        elif self.ins.op in _PASSES_ON:
            for name in filter(None, [self.is_set(source) for source in sources(self.ins)]):
                flags = self.temp(f"{flags} & {name}", flags in self.constant and name in self.constant)
        if self.mask:
            flags = self.temp(f"where({self.mask}, {flags}, {self.is_set(reg)})")
        self.set_env[reg] = flags

    def _set_selected(self, ins: Instr, flags: str) -> str:
        """Which lanes selp gives a set value: the operand not chosen may be anything, and compilers rely on that."""
        yes, no = ((isinstance(each, Reg) and self.is_set(each)) or flags for each in ins.args[1:3])
        condition = self.use(ins.args[3], "pred")
        return self.temp(f"where({condition}, {yes}, {no})", {condition, yes, no} <= self.constant)

    # Instructions.

    def translate(self, ins: Instr) -> None:
        self.ins = ins
        self.emit(f"# {ins.line}: {ins.text}")
        handler = HANDLERS.get(ins.op)
        if handler is None:
            raise UnsupportedInstruction(f"instruction {ins.name} is not implemented by the emulator")
        mods = Mods(ins)
        self.mask = ""
        if ins.guard is not None:
            mask = self.reg(ins.guard)
            mask = self.derived(mask, "~{}") if ins.negated else mask
            self.check_set(ins.guard, "a guard")
            self.mask = self.fill(mask)
        if self.layout.tensor and ins.op != "wgmma":
            self._touch_fragments(ins)
        if ins.guard is not None and ins.op in NEEDS_LANES:
            self.guarded_access(ins, mods, handler)
        else:
            handler(self, ins, mods)
        mods.done()
        if "trace" in self.namespace:
            self.call_trace(ins)
        self.mask = ""

    def _touch_fragments(self, ins: Instr) -> None:
        """See that registers which a wgmma uses are not in flight, and remember that they were accessed."""
        # To read what a wgmma only reads does no harm.
        read = [reg for reg in sources(ins) if self.layout.tensor.get(reg)]
        mine = list(dict.fromkeys([*read, *(reg for reg in results(ins) if reg in self.layout.tensor)]))
        unseen = [reg for reg in mine if reg not in self.observed]
        if unseen:
            slots, names = tuple(self.layout.slots[reg] for reg in unseen), tuple(reg.name for reg in unseen)
            lanes = f"L[{self.mask}]" if self.mask else "L"
            self.emit(f"if B.warpgroups.flying: B.warpgroups.touch({lanes}, R, {slots}, {names})")
            if not self.mask:
                self.observed.update(unseen)
        # Compilers put copies and constants anywhere, and arithmetic as late as they can: past a fence, though the
        # source has it before, and an A fragment's to the front of the product that takes it.
        if ins.op == "mov":
            return
        if ins.op not in _STAYS:
            mine = [] if self.after_fence else [reg for reg in mine if self.layout.tensor[reg]]
        self.touched.update(dict.fromkeys(mine, ins.line))

    def constant_array(self, values: list[int]) -> str:
        """The name of an array of integers that generated code may use."""
        name = f"k{len(self.namespace)}"
        self.namespace[name] = np.array(values, np.intp)
        return name

    def now_set(self, regs: list[Reg]) -> None:
        """Something else than `define` has set these registers."""
        for reg in regs:
            self._define_set(reg)

    def call_trace(self, ins: Instr) -> None:
        """Tell the machine's trace what the instruction did; see trace.py. Only in a machine that has one."""
        shown = tuple(reg for reg in results(ins) or dict.fromkeys(sources(ins)) if reg in self.env)
        name = f"i{len(self.namespace)}"
        self.namespace[name] = (ins, shown)
        values = "".join(f", {self.env[reg]}" for reg in shown)
        self.emit(f"trace(B, {name}, L, {self.mask or None}{values})")

    def guarded_access(self, ins: Instr, mods: Mods, handler: Handler) -> None:
        """Run a handler for the lanes that pass the guard only, and not at all when there are none."""
        for reg in results(ins):
            old = self.previous(reg)
            self.env[reg] = self.temp(f"{old}.repeat(n, axis=0)" if old in self.constant else f"{old}.copy()")
            self.dirty[reg] = None
        for reg in sources(ins):
            self.reg(reg)
            self.is_set(reg)
        at = self.temp(f"{self.mask}.nonzero()[0]")
        self.emit(f"if len({at}):")
        self.guarded, self.indent = at, "  "
        self.emit(f"LG = L[{at}]")
        handler(self, ins, mods)
        self.guarded, self.indent = "", " "
        for reg in results(ins):
            self._define_set(reg)

    def finish(self, block: Block) -> None:
        """Write live registers back and return the branch predicate."""
        self.ins = block.end or self.ins
        condition = ""
        if block.kind == "branch" and block.reg is not None:
            self.check_set(block.reg, "a branch condition")
            condition = self.reg(block.reg)
            condition = self.derived(condition, "~{}") if block.negated else condition
            condition = self.fill(condition)
        if block.kind == "index" and block.end is not None:
            self.check_set(block.end.args[0], "a branch index")
            condition = self.fill(self.use(block.end.args[0], "u32"))
        if block.kind == "call" and block.end is not None and isinstance(block.end.args[0], Reg):
            self.check_set(block.end.args[0], "the target of a call")
            condition = self.fill(self.use(block.end.args[0], "u64"))
        if self.touched:
            slots = self.constant_array([self.layout.slots[reg] for reg in self.touched])
            lines = self.constant_array(list(self.touched.values()))
            self.emit(f"B.warpgroups.mark(L, R, {slots}, {lines})")
        live = set(members(block.function, block.live_out))
        stored: set[str] = set()
        for reg in self.dirty:
            if reg in live and reg in self.layout.slots:
                self._write_back(self.layout.slots[reg], self.env[reg], stored)
        for reg, flags in self.set_env.items():
            if reg in live and reg in self.layout.shadows:
                self._write_back(self.layout.shadows[reg], flags, stored)
        self.emit(f"return {condition or None}")

    def _write_back(self, slot: int, name: str, stored: set[str]) -> None:
        if not self.full:
            self.emit(f"R[{slot}][L] = {name}")
            return
        # A register must own its array: constants are spread, and what another register holds is copied.
        fresh = name.startswith("v") and "_" in name and name not in stored
        stored.add(name)
        if name in self.constant:
            name = f"{name}.repeat(n, axis=0)"
        elif not fresh:
            name = f"{name}.copy()"
        self.emit(f"R[{slot}] = {name}")


_STAYS = frozenset("ld ldu ldg atom shfl ldmatrix mma".split())  # what no compiler moves past a volatile asm
_PASSES_ON = frozenset("mov cvt cvta selp add sub mul mad fma neg abs min max div rem".split())
NEEDS_LANES = frozenset(
    "tensormap ld ldu ldg st atom red bar barrier cp mbarrier fence membar tcgen05 clusterlaunchcontrol".split()
)
SPECIAL_BITS = {"clock64": 64, "globaltimer": 64, "gridid": 64}
UNIFORM = frozenset(
    """ntid.x ntid.y ntid.z nctaid.x nctaid.y nctaid.z nwarpid nsmid gridid clock clock_hi clock64 globaltimer
    globaltimer_lo globaltimer_hi nclusterid.x nclusterid.y nclusterid.z
    cluster_nctaid.x cluster_nctaid.y cluster_nctaid.z cluster_nctarank is_explicit_cluster
    dynamic_smem_size total_smem_size aggr_smem_size envreg1 envreg2""".split()
)


def chain(blocks: list[Block], block: Block, first: int) -> list[Block]:
    """A block and those that follow it across warp-wide operations, which whole warps can run through."""
    found = [block]
    while found[-1].kind == "jump" and found[-1].end is None and found[-1].next[0] == found[-1].index + 1:
        follow = blocks[found[-1].next[0] - first]
        if follow.sync is None or not is_warp_sync(follow.sync):
            break
        found.append(follow)
    return found


def new_namespace() -> dict[str, Any]:
    """What generated code sees."""
    names: dict[str, Any] = {"np": np, "where": np.where, "resize": alu.resize, "alu": alu}
    names |= {"collective": collective, "atomics": atomics, "clusters": clusters, "copies": copies, "mma": mma}
    names |= {"remote": remote, "tma": tma, "tcgen05_cp": tcgen05_cp, "U1": np.bool_}
    names |= {f"U{8 << k}": dtype for k, dtype in enumerate(UNSIGNED)}
    names |= {f"I{8 << k}": dtype for k, dtype in enumerate((np.int8, np.int16, np.int32, np.int64))}
    return names


def translate_block(
    parts: list[Block], layout: Layout, full: bool, dense: bool, namespace: dict[str, Any]
) -> tuple[Emitter, Counter[str], bool]:
    """Write the Python of a chain of blocks. Raises UnsupportedInstruction with `ins` set to the culprit.

    Returns the emitter, the opcodes, and whether the code polls memory.
    """
    emitter = Emitter(parts[0].function, layout, full, dense, namespace)
    opcodes: Counter[str] = Counter()
    polls = False
    try:
        for block in parts:
            for ins in block.instrs:
                opcodes[ins.op] += 1
                polls |= is_poll(ins)
                emitter.translate(ins)
        emitter.finish(parts[-1])
    except UnsupportedInstruction as error:
        error.ins = emitter.ins  # type: ignore[attr-defined]
        raise
    return emitter, opcodes, polls


def compile_block(parts: list[Block], layout: Layout, full: bool, dense: bool, namespace: dict[str, Any]) -> Code:
    """Compile a chain of blocks into one function."""
    emitter, opcodes, polls = translate_block(parts, layout, full, dense, namespace)
    variant = "full" if full else "dense" if dense else "sparse"
    filename = f"<ptx {parts[0].function.name} block {parts[0].index} {variant} {id(layout):x}>"
    text = "\n".join(emitter.source) + "\n"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    local: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), namespace, local)
    run = local["block"]
    return Code(run, sum(opcodes.values()), opcodes, parts[-1], polls, emitter.lines)


def is_poll(ins: Instr) -> bool:
    """Whether a loop around this instruction may be waiting for another thread."""
    if ins.op in ("atom", "nanosleep") or (ins.op == "mbarrier" and "test_wait" in ins.mods):
        return True
    return ins.op == "ld" and bool({"volatile", "acquire", "relaxed"} & set(ins.mods))


def var_of(address: Address) -> Var | None:
    return address.base.var if isinstance(address.base, Sym) else None


def split_pair(operand: Operand) -> tuple[Operand, Operand | None]:
    return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)
