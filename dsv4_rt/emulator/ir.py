"""What the parser produces and the code generator consumes: operands, instructions, functions, blocks, analyses.

Modifiers are kept in text order but matched as a set, because their order is not fixed (`vote.sync.ballot` and
`vote.ballot.sync` both occur). Registers are numbered within a function; sets of registers are Python integers
used as bit sets, which makes liveness and definite assignment of functions with thousands of registers a matter of
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from dsv4_rt.errors import EmulatorError

# Every type name that may stand as a modifier: bits of the whole (packed) value and its kind.
# Kinds: b untyped bits, u unsigned, s signed, f floating point (packed forms included), p predicate.
TYPES: dict[str, tuple[int, str]] = {
    "pred": (1, "p"),
    **{f"{kind}{bits}": (bits, kind) for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"b128": (128, "b"), "f16": (16, "f"), "bf16": (16, "f"), "f32": (32, "f"), "f64": (64, "f"), "tf32": (32, "f")},
    **{"f16x2": (32, "f"), "bf16x2": (32, "f"), "f32x2": (64, "f"), "u16x2": (32, "u"), "s16x2": (32, "s")},
    **{"e4m3x2": (16, "f"), "e5m2x2": (16, "f"), "e2m1x2": (8, "f"), "e2m3x2": (16, "f"), "e3m2x2": (16, "f")},
    **{"ue8m0x2": (16, "f"), "e4m3x4": (32, "f"), "e5m2x4": (32, "f"), "e2m1x4": (16, "f")},
    **{"e2m3x4": (32, "f"), "e3m2x4": (32, "f"), "u8x4": (32, "u"), "s8x4": (32, "s")},
}


@dataclass(slots=True, frozen=True)
class Loc:
    """A `.loc`: file number, line, column, and for inlined code the function's label and the call's Loc."""

    file: int
    line: int
    column: int
    function: str = ""
    inlined_at: Loc | None = None


@dataclass(slots=True, eq=False)
class Reg:
    """A virtual register. `index` is unique in its function, `bits` is 1 for predicates."""

    index: int
    name: str
    bits: int


@dataclass(slots=True, eq=False)
class Var:
    """A variable in `.global`, `.const`, `.shared`, `.local` or `.param` space. `size` 0 is an extern array."""

    name: str
    space: str
    size: int
    align: int
    initial: list[tuple[int, int, Number | Sym]] = field(default_factory=list)  # (offset, bytes, value)
    offset: int = 0  # in its frame, parameter buffer or shared layout, once laid out


@dataclass(slots=True, frozen=True)
class Number:
    """A literal: an integer (may be negative), or raw bits and the float width they were written in."""

    value: int
    float_bits: int = 0


@dataclass(slots=True, frozen=True)
class Special:
    """A special register such as `%tid.x`, without the percent sign."""

    name: str


@dataclass(slots=True, frozen=True)
class Sym:
    """A variable, function or label by name, with a byte offset; `var` is set when the name is a variable."""

    name: str
    offset: int = 0
    var: Var | None = None


@dataclass(slots=True, frozen=True)
class Address:
    base: Reg | Sym | Number
    offset: int = 0
    extra: tuple[Operand, ...] = ()  # what follows a comma inside the brackets


@dataclass(slots=True, frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(slots=True, frozen=True)
class Pair:
    """`d|p`: a value and a predicate."""

    first: Operand
    second: Operand


@dataclass(slots=True, frozen=True)
class Not:
    reg: Reg


@dataclass(slots=True, frozen=True)
class Sink:
    """`_`: a result nobody wants."""


Operand = Reg | Number | Special | Sym | Address | Vector | Pair | Not | Sink


@dataclass(slots=True, eq=False)
class Instr:
    op: str
    mods: tuple[str, ...]
    args: list[Operand]
    guard: Reg | None = None
    negated: bool = False
    line: int = 0
    loc: Loc | None = None
    text: str = ""
    used_bytes: int | None = None  # .pragma "used_bytes_mask": only these bytes of the load matter
    returns: tuple[Operand, ...] = ()  # of a call
    scope: int = 0

    @property
    def types(self) -> list[str]:
        return [m for m in self.mods if m in TYPES]

    @property
    def name(self) -> str:
        return ".".join((self.op, *self.mods))


@dataclass(slots=True, eq=False)
class Function:
    name: str
    entry: bool
    line: int
    params: list[Var] = field(default_factory=list)
    returns: list[Var] = field(default_factory=list)
    regs: list[Reg] = field(default_factory=list)
    variables: list[Var] = field(default_factory=list)  # declared in the body: shared, local, call-scoped param, ...
    instrs: list[Instr] = field(default_factory=list)
    labels: dict[tuple[int, str], int] = field(default_factory=dict)  # (scope, name) -> index into instrs
    scopes: list[int] = field(default_factory=lambda: [-1])  # parent of each scope; the body is scope 0
    targets: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)  # .branchtargets, .calltargets
    prototypes: dict[tuple[int, str], tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    directives: dict[str, list[int]] = field(default_factory=dict)  # maxntid and the like
    frame_size: int = 0  # bytes of local memory for its variables and the parameters of calls

    def lookup(self, name: str, scope: int) -> int | None:
        """The instruction index of a label as seen from a scope."""
        while scope >= 0:
            found = self.labels.get((scope, name))
            if found is not None:
                return found
            scope = self.scopes[scope]
        return None

    def branch_targets(self, name: str, scope: int) -> tuple[str, ...] | None:
        """The names in a table of labels (brx.idx) or of functions (call), as seen from a scope."""
        while scope >= 0:
            found = self.targets.get((scope, name))
            if found is not None:
                return found
            scope = self.scopes[scope]
        return None

    def prototype(self, name: str, scope: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The bytes of what functions of a .callprototype return and take, as seen from a scope."""
        while scope >= 0:
            found = self.prototypes.get((scope, name))
            if found is not None:
                return found
            scope = self.scopes[scope]
        return None


def regs_in(operand: Operand) -> Iterator[Reg]:
    match operand:
        case Reg():
            yield operand
        case Not():
            yield operand.reg
        case Vector():
            for item in operand.items:
                yield from regs_in(item)
        case Pair():
            yield from regs_in(operand.first)
            yield from regs_in(operand.second)
        case Address():
            if isinstance(operand.base, Reg):
                yield operand.base
            for item in operand.extra:
                yield from regs_in(item)


# Instructions whose first operand is not a result although it stands where results stand.
_NO_RESULT = frozenset(
    "st red membar fence bra brx ret exit trap brkpt nanosleep prefetch prefetchu griddepcontrol call discard "
    "applypriority setmaxnreg pmevent".split()
)


def has_result(ins: Instr) -> bool:
    if ins.op in ("bar", "barrier"):
        return "red" in ins.mods
    if ins.op == "tcgen05":
        return "ld" in ins.mods
    return ins.op not in _NO_RESULT and bool(ins.args) and not isinstance(ins.args[0], Address)


def results(ins: Instr) -> list[Reg]:
    """The registers an instruction writes. What a call returns travels through .param space instead."""
    return list(regs_in(ins.args[0])) if has_result(ins) else []


def sources(ins: Instr) -> list[Reg]:
    """The registers an instruction reads, its guard included."""
    found = [] if ins.guard is None else [ins.guard]
    for operand in ins.args[1:] if has_result(ins) and ins.op != "wgmma" else ins.args:
        found.extend(regs_in(operand))
    return found


MATRIX = frozenset({"mma", "ldmatrix", "stmatrix", "movmatrix", "wgmma"})  # the whole warp, without a mask
UNMASKED = MATRIX | {"setmaxnreg"}
WARP_SYNC = frozenset({"shfl", "vote", "match", "redux", "elect"}) | UNMASKED
ENDS = frozenset({"bra", "ret", "exit", "trap", "brkpt", "call", "brx"})


def is_warp_sync(ins: Instr) -> bool:
    """Whether the named lanes of a warp meet at this instruction."""
    if ins.op == "tcgen05":
        return "sync" in ins.mods and not is_allocation(ins)
    if ins.op in WARP_SYNC:
        return not is_warpgroup_sync(ins)
    return (ins.op in ("bar", "barrier") and "warp" in ins.mods) or is_cluster_arrive(ins)


def is_cluster_arrive(ins: Instr) -> bool:
    """Whether a whole warp arrives at the cluster barrier together."""
    return ins.op == "barrier" and {"cluster", "arrive", "aligned"} <= set(ins.mods)


def is_cluster_wait(ins: Instr | None) -> bool:
    """Whether threads wait at the cluster barrier here."""
    return ins is not None and ins.op == "barrier" and "cluster" in ins.mods and "wait" in ins.mods


def is_warpgroup_sync(ins: Instr) -> bool:
    """Whether the four warps of a warpgroup meet at this instruction."""
    return ins.op == "wgmma" and "mma_async" in ins.mods


def fragments(ins: Instr) -> list[Reg]:
    """The registers a wgmma.mma_async uses until it is waited for: its accumulator, and A if that is no descriptor."""
    return [reg for operand in ins.args[:2] if isinstance(operand, Vector) for reg in regs_in(operand)]


def sync_mask(ins: Instr) -> Operand:
    """The mask operand of a warp-wide instruction."""
    return Number(0xFFFFFFFF) if ins.op in {*UNMASKED, "tcgen05"} or is_cluster_arrive(ins) else ins.args[-1]


def is_wait(ins: Instr) -> bool:
    """Whether threads may be suspended at this instruction until an mbarrier's phase is complete."""
    return ins.op == "mbarrier" and "try_wait" in ins.mods


def is_allocation(ins: Instr) -> bool:
    """Whether warps may be suspended at this instruction until tensor memory is free, or the other CTA's warp comes."""
    return ins.op == "tcgen05" and ("alloc" in ins.mods or "dealloc" in ins.mods)


def is_sync(ins: Instr) -> bool:
    """Whether threads meet, or wait, at this instruction; a block starts there."""
    if is_warp_sync(ins) or is_warpgroup_sync(ins) or is_wait(ins) or is_allocation(ins):
        return True
    return ins.op in ("bar", "barrier") and "arrive" not in ins.mods


@dataclass(slots=True, eq=False)
class Block:
    """Straight-line code and how it ends: jump, branch (on `reg`), ret, exit, call, index (brx.idx) or trap."""

    index: int
    function: Function
    instrs: list[Instr] = field(default_factory=list)
    sync: Instr | None = None  # the first instruction, when threads meet there
    kind: str = "open"
    reg: Reg | None = None
    negated: bool = False
    end: Instr | None = None
    next: list[int] = field(default_factory=list)  # branch: [taken, fall through]
    live_in: int = 0
    live_out: int = 0
    label: str = ""


def build_blocks(function: Function, first: int) -> list[Block]:
    """Cut a function into blocks numbered from `first` in text order.

    Blocks end at labels, branches and calls, and before every instruction where threads meet. A guarded instruction of
    the last three kinds becomes a branch around an unguarded one, so that guards inside blocks only select values.
    """
    heads = {at: name for (_, name), at in function.labels.items()}
    after_skip: set[int] = set()
    position: dict[int, int] = {}  # instruction index -> block
    wanted: list[tuple[Block, list[int]]] = []
    blocks: list[Block] = []

    def start(label: str = "") -> Block:
        block = Block(first + len(blocks), function, label=label)
        if blocks and blocks[-1].kind == "open":
            blocks[-1].kind, blocks[-1].next = "jump", [block.index]
        blocks.append(block)
        return block

    current = start()
    for at, ins in enumerate(function.instrs):
        if at in heads or at in after_skip or current.kind != "open" or (is_sync(ins) and current.instrs):
            current = start(heads.get(at, ""))
        position[at] = current.index
        guarded = ins.guard is not None and ins.op != "bra" and (ins.op in ENDS or is_sync(ins))
        if guarded:
            after_skip.add(at + 1)
            current.kind, current.reg, current.negated = "branch", ins.guard, ins.negated
            current.next = [current.index + 1]
            wanted.append((current, [at + 1]))
            current = start()
            ins = replace(ins, guard=None)
        current.instrs.append(ins)
        if is_sync(ins):
            current.sync = ins
        if ins.op in ENDS:
            current.end = ins
            current.kind = {"bra": "jump", "brx": "index", "brkpt": "trap"}.get(ins.op, ins.op)
            if ins.op == "bra":
                name = ins.args[0].name if isinstance(ins.args[0], Sym) else ""
                wanted.append((current, [_label(function, name, ins)]))
                if ins.guard is not None:
                    current.kind, current.reg, current.negated = "branch", ins.guard, ins.negated
                    wanted.append((current, [at + 1]))
            elif ins.op == "brx":
                table = ins.args[1].name if isinstance(ins.args[1], Sym) else ""
                names = function.branch_targets(table, ins.scope) or ()
                wanted.append((current, [_label(function, name, ins) for name in names]))
            elif ins.op == "call":
                wanted.append((current, [at + 1]))
    end = len(function.instrs)
    if end in heads or any(end in ats for _, ats in wanted):
        current = start()
    position[end] = current.index
    if current.kind == "open":
        current.kind = "exit" if function.entry else "ret"
    for block, ats in wanted:
        block.next.extend(position[at] for at in ats)
    return blocks


def _label(function: Function, name: str, ins: Instr) -> int:
    found = function.lookup(name, ins.scope)
    if found is None:
        raise EmulatorError(f"PTX line {ins.line}: no label {name}")
    return found


def _mask(regs: Iterable[Reg]) -> int:
    bits = 0
    for reg in regs:
        bits |= 1 << reg.index
    return bits


def members(function: Function, bits: int) -> list[Reg]:
    """The registers of a bit set, in order."""
    found = []
    while bits:
        low = bits & -bits
        found.append(function.regs[low.bit_length() - 1])
        bits ^= low
    return found


def liveness(blocks: list[Block]) -> None:
    """Set live_in and live_out of one function's blocks.

    A result under a guard counts as read, since the lanes that fail the guard keep the old value.
    """
    first = blocks[0].index
    reads: list[int] = []
    writes: list[int] = []
    for block in blocks:
        read = written = 0
        for ins in block.instrs:
            out = _mask(results(ins))
            need = _mask(sources(ins)) | (out if ins.guard is not None else 0)
            read |= need & ~written
            written |= out
        if block.reg is not None:
            read |= _mask([block.reg]) & ~written
        reads.append(read)
        writes.append(written)
    changed = True
    while changed:
        changed = False
        for at in range(len(blocks) - 1, -1, -1):
            block = blocks[at]
            out = 0
            for target in block.next:
                out |= blocks[target - first].live_in
            live = reads[at] | (out & ~writes[at])
            if live != block.live_in or out != block.live_out:
                block.live_in, block.live_out, changed = live, out, True


# A register that may be unset passes that on through these; bit operations are left out, because compilers build packed
# values by inserting fields into a register they never set.
_PASSES_ON = frozenset("mov cvt cvta selp add sub mul mad fma neg abs min max div rem".split())


def maybe_unset(blocks: list[Block]) -> int:
    """The registers that some path leaves unset before a use, and those computed from them, as a bit set."""
    first = blocks[0].index
    everything = (1 << len(blocks[0].function.regs)) - 1
    before = {block.index: everything for block in blocks}
    before[first] = 0
    changed = True
    while changed:
        changed = False
        for block in blocks:
            after = before[block.index]
            for ins in block.instrs:
                if ins.guard is None:
                    after |= _mask(results(ins))
            for target in block.next:
                if before[target] & ~after:
                    before[target] &= after
                    changed = True
    reached = _reachable(blocks)
    unset = 0
    for block in blocks:
        if block.index not in reached:
            continue
        have = before[block.index]
        for ins in block.instrs:
            unset |= _mask(sources(ins)) & ~have
            if ins.guard is None:
                have |= _mask(results(ins))
    grown = True
    while unset and grown:
        grown = False
        for block in blocks:
            for ins in block.instrs:
                if ins.op in _PASSES_ON and _mask(sources(ins)) & unset and _mask(results(ins)) & ~unset:
                    unset |= _mask(results(ins))
                    grown = True
    return unset


def _reachable(blocks: list[Block]) -> set[int]:
    first = blocks[0].index
    seen = {first}
    work = [first]
    while work:
        for target in blocks[work.pop() - first].next:
            if target not in seen:
                seen.add(target)
                work.append(target)
    return seen
