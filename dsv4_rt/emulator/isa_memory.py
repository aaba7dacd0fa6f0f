"""Translation of memory and synchronisation: loads, stores, atomics, barriers, warp-wide operations, no-ops."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles, split_pair, var_of
from dsv4_rt.emulator.ir import TYPES, Address, Instr, Number, Operand, Reg, Sink, Sym, Vector
from dsv4_rt.emulator.isa_arith import result
from dsv4_rt.emulator.races import kind_of
from dsv4_rt.errors import EmulatorError

_CACHE = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::no_allocate", "L1::evict_first", "L1::evict_last",
    "L1::evict_normal", "L1::evict_unchanged", "L2::evict_first", "L2::evict_last", "L2::evict_normal", "L2::64B",
    "L2::128B", "L2::256B", "unified",
)  # fmt: skip
_ORDER = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "mmio", "cta", "cluster", "gpu", "sys")
_SPACES = ("global", "shared", "shared::cta", "local", "const", "param", "param::entry", "param::func")


def _space(m: Mods) -> str:
    """global, shared, local, param or generic; const lives in global memory."""
    space = m.choose(*_SPACES, default="generic").split("::")[0]
    return "global" if space == "const" else space


def _target(e: Emitter, space: str) -> tuple[str, str]:
    """The Python names of a space and of its base argument."""
    lanes = f"[{e.lanes}]" if e.guarded or not e.full else ""
    if space == "global":
        return "B.memory", "None"
    if space == "shared":
        return "B.shared", _base(e, f"B.shared_base{lanes}")
    if space == "local":
        return "B.local", _base(e, f"B.local_base{lanes}")
    return "B.generic", f"({_base(e, f'B.shared_base{lanes}')}, {_base(e, f'B.local_base{lanes}')})"


def _touch(e: Emitter, ins: Instr, space: str) -> None:
    """Say who makes the access that follows, where races are watched."""
    watched = ("shared", "generic", "global") if e.namespace.get("watch_global") else ("shared", "generic")
    if space in watched or kind_of(ins):
        e.emit(f"B.races.touch({e.lanes}, {ins.line}, {kind_of(ins)})")


def _base(e: Emitter, expr: str) -> str:
    if e.guarded:
        return e.temp(expr)
    if expr not in e.cached:
        e.cached[expr] = e.temp(expr)
    return e.cached[expr]


def address(e: Emitter, operand: Operand, space: str) -> str:
    """A lane-shaped array of addresses."""
    if not isinstance(operand, Address):
        raise EmulatorError(f"PTX line {e.ins.line if e.ins else 0}: an address in brackets is wanted")
    base = operand.base
    if isinstance(base, Reg):
        e.check_set(base, "an address")
        name = e.use(base, f"b{base.bits}")
        if operand.offset:
            name = e.derived(name, f"{{}} + {e.number(operand.offset, base.bits)}")
        if space in ("global", "generic") and base.bits == 32:
            name = e.derived(name, "{}.astype(U64)")
    elif isinstance(base, Number):
        name = e.number(base.value + operand.offset, 64)
    else:
        name = e.use(Sym(base.name, base.offset + operand.offset, base.var), "b64")
        if space == "generic" and base.var is not None and base.var.space in ("shared", "local"):
            name = e.derived(name, f"{{}} + U64({_WINDOW[base.var.space]})")
    return e.fill(name)


_WINDOW = {"shared": 1 << 48, "local": 2 << 48}


def _resolve(e: Emitter, space: str, operand: Operand, m: Mods) -> str:
    """Where `.param` lives: the launch's buffer for an entry's parameters, the thread's frame for calls."""
    if space != "param":
        return space
    var = var_of(operand) if isinstance(operand, Address) else None
    if var is None:
        return "global"
    return "launch" if e.function.entry and var in e.function.params else "local"


def _shape(m: Mods) -> tuple[int, int, str]:
    """(log2 of the element's bytes, elements, type); a b128 element is two of b64."""
    ty = m.types[-1]
    n = int(m.choose("v2", "v4", "v8", default="v1")[1:])
    bits = TYPES[ty][0]
    if bits == 128:
        return 3, 2 * n, ty
    return (bits // 8).bit_length() - 1, n, ty


@handles("ld", "ldu", "ldg")
def _load(e: Emitter, ins: Instr, m: Mods) -> None:
    space = _space(m)
    m.flag(*_CACHE, *_ORDER)
    m.flag("L2::cache_hint")
    space = _resolve(e, space, ins.args[1], m)
    k, n, ty = _shape(m)
    d, a = ins.args[:2]
    items: list[Operand] = list(d.items) if isinstance(d, Vector) else [d]
    if space == "launch" and isinstance(a, Address):
        var = var_of(a)
        offset = (var.offset if var is not None else 0) + a.offset
        if ty == "b128":
            raise m.refuse()
        for i, item in enumerate(items):
            e.define(item, f"B.param({offset + (i << k)}, U{8 << k})", ty, True)
        return
    where = address(e, a, space)
    name, base = _target(e, space)
    used = _used_bytes(e, ins, items, k, ty)
    _touch(e, ins, space)
    if n == 1:
        e.define(items[0], f"{name}.load({where}, {base}, {k}{used})", ty)  # items[0]: `ld.b32 {r}` is legal
        return
    parts = e.temp(f"{name}.load_vector({where}, {base}, {k}, {n}{used})")
    if ty == "b128":
        for i, item in enumerate(items):
            e.define(item, f"np.stack({parts}[{2 * i}:{2 * i + 2}], axis=1)", ty)
        return
    for i, item in enumerate(items):
        if not isinstance(item, Sink):
            e.define(item, f"{parts}[{i}]", ty)


def _used_bytes(e: Emitter, ins: Instr, items: list[Operand], k: int, ty: str) -> str:
    """The argument that says which bytes must have been written: not those of elements no instruction reads.

    Compilers widen a load of three words to four where memory allows it.
    """
    used = ins.used_bytes
    idle = [i for i, item in enumerate(items) if isinstance(item, Sink) or item in e.layout.unread]
    if len(items) > 1 and idle and ty != "b128":
        used = (1 << (len(items) << k)) - 1 if used is None else used
        for i in idle:
            used &= ~(((1 << (1 << k)) - 1) << (i << k))
    return f", {used}" if used is not None else ""


@handles("st")
def _store(e: Emitter, ins: Instr, m: Mods) -> None:
    space = _space(m)
    m.flag(*_CACHE, *_ORDER)
    m.flag("L2::cache_hint")
    space = _resolve(e, space, ins.args[0], m)
    k, n, ty = _shape(m)
    a, value = ins.args[:2]
    items: list[Operand] = list(value.items) if isinstance(value, Vector) else [value]
    where = address(e, a, space)
    for item in items:
        e.check_set(item, "a stored value")
    names = [e.use(item, ty) for item in items]
    name, base = _target(e, space)
    if ty == "b128":
        names = [f"{each}[:, {i}]" for each in names for i in (0, 1)]
    _touch(e, ins, space)
    if n == 1:
        e.emit(f"{name}.store({where}, {base}, {names[0]}, {k})")
    else:
        e.emit(f"{name}.store_vector({where}, {base}, ({', '.join(names)},), {k})")


@handles("atom", "red")
def _atomic(e: Emitter, ins: Instr, m: Mods) -> None:
    space = _space(m)
    m.flag(*_ORDER)
    m.flag("L2::cache_hint")
    noftz = m.flag("noftz")
    op = m.choose("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
    ty = m.types[-1]
    if not op or m.left or ty not in ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64", "b16", "f16x2", "bf16x2",
                                      "f16", "bf16"):  # fmt: skip
        raise m.refuse()
    d: Operand = Sink()
    args = ins.args
    if ins.op == "atom":
        d, *args = ins.args
    if isinstance(d, Vector) or isinstance(args[1], Vector):
        raise m.refuse()
    k = (TYPES[ty][0] // 8).bit_length() - 1
    where = address(e, args[0], space)
    count = 2 if op == "cas" else 1
    for each in args[1 : 1 + count]:
        e.check_set(each, "the value of an atomic")
    names = [e.fill(e.use(each, ty)) for each in args[1 : 1 + count]]
    name, base = _target(e, space)
    call = f"atomics.run({name}, {where}, {base}, {k}, {op!r}, {ty!r}, ({', '.join(names)},), "
    call += f"{not isinstance(d, Sink)}, {noftz})"
    _touch(e, ins, space)
    if isinstance(d, Sink):
        e.emit(call)
    else:
        e.define(d, call, ty)


@handles("cvta")
def _cvta(e: Emitter, ins: Instr, m: Mods) -> None:
    to = m.flag("to")
    space = m.choose(*_SPACES).split("::")[0]
    ty = m.types[-1]
    name = e.use(ins.args[1], ty)
    window = {"shared": 1 << 48, "local": 2 << 48}.get(space, 0)
    if not window:
        if isinstance(ins.args[0], Reg) and not e.mask:
            e.alias(ins.args[0], name)
        else:
            result(e, ins.args[0], ty, "{}", name)
    else:
        result(e, ins.args[0], ty, f"{{}} {'-' if to else '+'} U64({window})", name)


@handles("isspacep")
def _isspacep(e: Emitter, ins: Instr, m: Mods) -> None:
    space = m.choose(*_SPACES).split("::")[0]
    window = {"shared": 1, "local": 2}.get(space, 0)
    if space in ("const", "param"):
        raise m.refuse()
    result(e, ins.args[0], "pred", f"({{}} >> U64(48)) == U64({window})", e.use(ins.args[1], "u64"))


@handles("shfl")
def _shuffle(e: Emitter, ins: Instr, m: Mods) -> None:
    e.emit("B.races.meet(L)")
    m.flag("sync")
    mode = m.choose("up", "down", "bfly", "idx")
    d, a, b, c, mask = ins.args
    first, predicate = split_pair(d)
    value = e.fill(e.use(a, "b32"))
    names = [e.use(b, "u32"), e.use(c, "u32"), e.use(mask, "u32")]
    dense = e.dense and all(isinstance(each, Number) for each in (b, c, mask))
    if dense and isinstance(mask, Number) and mask.value & 0xFFFFFFFF == 0xFFFFFFFF:
        assert isinstance(b, Number)
        assert isinstance(c, Number)
        constants = f"{mode!r}, {b.value & 0xFFFFFFFF}, {c.value & 0xFFFFFFFF}"
        e.define(first, f"collective.shuffle_dense({value}, {constants})", "b32")
        if predicate is not None:
            e.define(predicate, f"collective.in_range_dense(n, {constants})", "pred")
        return
    pair = e.temp(f"collective.shuffle(B.nlanes, L, {value}, {mode!r}, {', '.join(names)})")
    e.define(first, f"{pair}[0]", "b32")
    if predicate is not None:
        e.define(predicate, f"{pair}[1]", "pred")


@handles("vote")
def _vote(e: Emitter, ins: Instr, m: Mods) -> None:
    e.emit("B.races.meet(L)")
    m.flag("sync")
    mode = m.choose("all", "any", "uni", "ballot")
    d, a, mask = ins.args
    p = e.fill(e.use(a, "pred"))
    ty = "b32" if mode == "ballot" else "pred"
    e.define(d, f"collective.vote(B.nlanes, L, {p}, {e.use(mask, 'u32')}, {mode!r})", ty)


@handles("match")
def _match(e: Emitter, ins: Instr, m: Mods) -> None:
    e.emit("B.races.meet(L)")
    m.flag("sync")
    mode = m.choose("any", "all")
    ty = m.types[-1]
    d, a, mask = ins.args
    first, predicate = split_pair(d)
    pair = e.temp(f"collective.match(B.nlanes, L, {e.fill(e.use(a, ty))}, {e.use(mask, 'u32')}, {mode!r})")
    e.define(first, f"{pair}[0]", "b32")
    if predicate is not None:
        e.define(predicate, f"{pair}[1]", "pred")


@handles("redux")
def _redux(e: Emitter, ins: Instr, m: Mods) -> None:
    e.emit("B.races.meet(L)")
    m.flag("sync")
    op = m.choose("add", "min", "max", "and", "or", "xor")
    absolute, nan = m.flag("abs"), m.flag("NaN")
    ty = m.types[-1]
    d, a, mask = ins.args
    value = e.fill(e.use(a, ty))
    tail = f"{op!r}, {ty!r}, {absolute}, {nan}"
    e.define(d, f"collective.redux(B.nlanes, L, {value}, {e.use(mask, 'u32')}, {tail})", ty)


@handles("elect")
def _elect(e: Emitter, ins: Instr, m: Mods) -> None:
    e.emit("B.races.meet(L)")
    m.flag("sync")
    first, predicate = split_pair(ins.args[0])
    pair = e.temp(f"collective.elect(B.nlanes, L, {e.use(ins.args[1], 'u32')})")
    if not isinstance(first, Sink):
        e.define(first, f"{pair}[0]", "b32")
    if predicate is not None:
        e.define(predicate, f"{pair}[1]", "pred")


@handles("activemask")
def _activemask(e: Emitter, ins: Instr, m: Mods) -> None:
    e.define(ins.args[0], f"collective.active_mask(B.nlanes, {e.lanes})", "b32")


@handles("bar", "barrier")
def _barrier(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("cta", "aligned")
    if m.flag("warp"):
        m.flag("sync")
        mask = ins.args[-1]
        if not isinstance(mask, Number) or mask.value & 0xFFFFFFFF != 0xFFFFFFFF:
            e.emit(f"collective.must_name((L & 31).astype(U32), {e.use(mask, 'u32')})")
        e.emit(f"B.races.meet({e.lanes})")
        return
    kind = m.choose("sync", "arrive", "red")
    if kind == "red":
        op = m.choose("popc", "and", "or")
        d, *rest = ins.args
        p = e.fill(e.use(rest[-1], "pred"))
        e.define(d, f"B.barrier_reduce(L, {p}, {op!r})", "u32" if op == "popc" else "pred")
    elif kind == "arrive":
        a, b = (e.use(each, "u32") for each in ins.args)
        e.emit(f"B.barrier_arrive({e.lanes}, {a}, {b})")
    elif kind != "sync":
        raise m.refuse()


@handles(
    "membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "discard", "applypriority", "pmevent"
)
def _nothing(e: Emitter, ins: Instr, m: Mods) -> None:
    """Memory is sequentially consistent here, and nothing takes time."""
    m.flag(*_SPACES, *_ORDER, *_CACHE, "gl", "L1", "L2", "wait", "launch_dependents", "mask")
    if ins.op in ("fence", "membar"):
        e.emit(f"B.races.fence({e.lanes})")
        m.flag("sync_restrict::shared::cta", "sync_restrict::shared::cluster")
    if ins.op == "nanosleep":
        e.emit("B.sleep()")


@handles("createpolicy")
def _policy(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("fractional", "range", "cvt", "L2", *_SPACES, *_CACHE)
    result(e, ins.args[0], "b64", "{}", e.number(1, 64))


@handles("bra", "ret", "exit", "call", "brx", "trap", "brkpt")
def _end(e: Emitter, ins: Instr, m: Mods) -> None:
    """Control flow is the machine's: only the modifiers are checked here."""
    m.flag("uni")
    if ins.op == "brx" and not m.flag("idx"):
        raise m.refuse()
