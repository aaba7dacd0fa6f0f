"""Translation of arithmetic: integers, floating point, bits, comparisons, conversions."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles, split_pair
from dsv4_rt.emulator.ir import TYPES, Instr, Number, Operand, Reg, Sink, Vector

ROUNDINGS = ("rn", "rz", "rm", "rp", "rna")
_PACKED = {"f16x2", "bf16x2", "f32x2"}
_LIMB = {"s16x2", "u16x2"}
_COMPARE = tuple("eq ne lt le gt ge equ neu ltu leu gtu geu num nan lo ls hi hs".split())
_NARROW = {"e4m3x2", "e5m2x2", "e2m1x2", "e2m3x2", "e3m2x2", "ue8m0x2"}
_UNSIGNED_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_INLINE = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}


def result(e: Emitter, dst: Operand, ty: str, form: str, *names: str) -> None:
    """Define dst as an expression of the named values; it is the same in all lanes when they all are."""
    e.define(dst, form.format(*names), ty, all(name in e.constant for name in names) and bool(names))


def is_float(ty: str) -> bool:
    return TYPES[ty][1] == "f"


def keywords(m: Mods, *flags: str, rnd: bool = False) -> str:
    """Python keyword arguments for the modifiers an instruction carries."""
    found = [f"{flag.lower().replace('::', '_')}=True" for flag in flags if m.flag(flag)]
    if rnd:
        mode = m.choose(*ROUNDINGS)
        if mode:
            found.append(f"rnd={mode!r}")
    return "".join(f", {each}" for each in found)


@handles("add", "sub", "mul", "fma", "mad")
def _arithmetic(e: Emitter, ins: Instr, m: Mods) -> None:
    ty, op = m.types[-1], ins.op
    d, *args = ins.args
    if is_float(ty):
        op = "fma" if op == "mad" else op
        extra = keywords(m, "ftz", "sat", "relu", rnd=True)
        if len(m.types) == 2:  # add.f32.f16: the first source is narrow
            narrow = m.types[-1]
            ty = m.types[0]
            count = 2 if op == "fma" else 1  # fma.f32.f16: both factors are
            wide = f"alu.cvt({ty!r}, {narrow!r}, {{}})"
            names = [e.derived(e.use(a, narrow), wide) for a in args[:count]]
            names.extend(e.use(a, ty) for a in args[count:])
        else:
            names = [e.use(a, ty) for a in args]
        if ty in _PACKED:
            op += "2"
        result(e, d, ty, f"alu.{op}({ty!r}, {', '.join(['{}'] * len(names))}{extra})", *names)
        return
    if m.flag("cc"):
        _carry(e, ins, m, None)
        return
    sat = keywords(m, "sat")
    if op in ("add", "sub"):
        names = [e.use(a, ty) for a in args]
        form = f"{{}} {_INLINE[op]} {{}}" if not sat and ty not in _LIMB else f"alu.int_{op}({ty!r}, {{}}, {{}}{sat})"
        result(e, d, ty, form, *names)
        return
    half = m.choose("lo", "hi", "wide", default="lo")
    names = [e.use(a, ty) for a in args[:2]]
    wide = f"{TYPES[ty][1]}{TYPES[ty][0] * 2}" if half == "wide" else ty
    names.extend(e.use(a, wide) for a in args[2:])
    if half == "lo" and op == "mul":
        result(e, d, ty, "{} * {}", *names)
    elif half == "lo":
        result(e, d, ty, "{} * {} + {}", *names)
    else:
        result(e, d, wide, f"alu.int_{op}_{half}({ty!r}, {', '.join(['{}'] * len(names))}{sat})", *names)


@handles("addc", "subc", "madc")
def _with_carry(e: Emitter, ins: Instr, m: Mods) -> None:
    if "carry" not in e.cached:
        raise m.refuse(f"{ins.name} without the instruction that sets the carry in the same block is not implemented")
    m.flag("cc")
    _carry(e, ins, m, e.cached["carry"])


def _carry(e: Emitter, ins: Instr, m: Mods, carry: str | None) -> None:
    ty = m.types[-1]
    d, *args = ins.args
    names = [e.use(a, ty) for a in args]
    op = ins.op.rstrip("c")
    half = f"{m.choose('lo', 'hi')!r}, " if op == "mad" else ""
    both = e.temp(f"alu.int_{op}_cc({ty!r}, {half}{', '.join(names)}{f', {carry}' if carry else ''})")
    constant = all(n in e.constant for n in names) and (carry is None or carry in e.constant)
    e.cached["carry"] = e.temp(f"{both}[1]", constant)
    e.define(d, f"{both}[0]", ty, constant)


@handles("mul24", "mad24")
def _mul24(e: Emitter, ins: Instr, m: Mods) -> None:
    ty, half = m.types[-1], m.choose("lo", "hi")
    names = [e.use(a, ty) for a in ins.args[1:]]
    sat = keywords(m, "sat")
    result(e, ins.args[0], ty, f"alu.int_{ins.op}_{half}({ty!r}, {', '.join(['{}'] * len(names))}{sat})", *names)


@handles("div", "rem")
def _divide(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    names = [e.use(a, ty) for a in ins.args[1:]]
    if not is_float(ty):
        result(e, ins.args[0], ty, f"alu.int_{ins.op}({ty!r}, {{}}, {{}})", *names)
    else:
        kind = m.choose("approx", "full")
        name = f"div_{kind}" if kind else "div"
        extra = keywords(m, "ftz", rnd=not kind)
        result(e, ins.args[0], ty, f"alu.{name}({ty!r}, {{}}, {{}}{extra})", *names)


@handles("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _unary_float(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    name = f"{ins.op}_approx" if m.flag("approx") else ins.op
    if name == ins.op and ins.op not in ("rcp", "sqrt"):
        raise m.refuse()
    extra = keywords(m, "ftz", rnd=name == ins.op)
    if ty in _PACKED:
        name += "2"
        if ins.op not in ("ex2", "tanh"):
            raise m.refuse()
    result(e, ins.args[0], ty, f"alu.{name}({ty!r}, {{}}{extra})", e.use(ins.args[1], ty))


@handles("neg", "abs")
def _sign(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    a = e.use(ins.args[1], ty)
    if not is_float(ty):
        result(e, ins.args[0], ty, f"alu.int_{ins.op}({ty!r}, {{}})", a)
        return
    name = {"neg": "neg", "abs": "abs_"}[ins.op] if ty not in _PACKED else f"{ins.op}2"
    result(e, ins.args[0], ty, f"alu.{name}({ty!r}, {{}}{keywords(m, 'ftz')})", a)


@handles("copysign")
def _copysign(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    result(e, ins.args[0], ty, f"alu.copysign({ty!r}, {{}}, {{}})", *(e.use(a, ty) for a in ins.args[1:]))


@handles("min", "max")
def _extreme(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    names = [e.use(a, ty) for a in ins.args[1:]]
    if not is_float(ty):
        result(e, ins.args[0], ty, f"alu.int_{ins.op}({ty!r}, {{}}, {{}}{keywords(m, 'relu')})", *names)
        return
    xorsign = m.flag("xorsign")
    absolute = m.flag("abs")
    extra = keywords(m, "ftz") + (", nan=True" if m.flag("NaN") else "")
    if xorsign != absolute and len(names) == 2:
        raise m.refuse()
    if ty in _PACKED:
        name = f"{ins.op}2"
    else:
        name = {"min": "minimum", "max": "maximum"}[ins.op] + ("3" if len(names) == 3 else "")
    if len(names) == 3 and ty != "f32":
        raise m.refuse()
    extra += ", xorsign_abs=True" if xorsign else ", abs=True" if absolute else ""
    result(e, ins.args[0], ty, f"alu.{name}({ty!r}, {', '.join(['{}'] * len(names))}{extra})", *names)


@handles("and", "or", "xor")
def _logic(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    form = f"{{}} {_INLINE[ins.op]} {{}}"
    result(e, ins.args[0], ty, form, *(e.use(a, ty) for a in ins.args[1:]))


@handles("not", "cnot")
def _not(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    form = "~{}" if ins.op == "not" else f"alu.cnot({ty!r}, {{}})"
    result(e, ins.args[0], ty, form, e.use(ins.args[1], ty))


@handles("shl", "shr")
def _shift(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    bits, kind = TYPES[ty]
    d, a, amount = ins.args
    if isinstance(amount, Number) and bits >= 32 and 0 <= amount.value < bits:
        if ins.op == "shl" or kind != "s":
            sign = "<<" if ins.op == "shl" else ">>"
            result(e, d, ty, f"{{}} {sign} {{}}", e.use(a, ty), e.number(amount.value, bits))
            return
    result(e, d, ty, f"alu.{ins.op}({ty!r}, {{}}, {{}})", e.use(a, ty), e.use(amount, "u32"))


@handles("shf")
def _funnel(e: Emitter, ins: Instr, m: Mods) -> None:
    side, mode = m.choose("l", "r"), m.choose("wrap", "clamp")
    names = [e.use(a, "b32") for a in ins.args[1:]]
    result(e, ins.args[0], "b32", f"alu.shf_{side}({{}}, {{}}, {{}}, wrap={mode == 'wrap'})", *names)


@handles("lop3")
def _lop3(e: Emitter, ins: Instr, m: Mods) -> None:
    combine = m.choose("or", "and")
    d, a, b, c, lut, *q = ins.args
    if not isinstance(lut, Number):
        raise m.refuse()
    names = [e.use(each, "b32") for each in (a, b, c)]
    first, predicate = split_pair(d)
    value = e.temp(f"alu.lop3({', '.join(names)}, {lut.value})", all(n in e.constant for n in names))
    result(e, first, "b32", "{}.copy()", value)
    if combine and predicate is not None:
        sign = "|" if combine == "or" else "&"
        result(e, predicate, "pred", f"({{}} != 0) {sign} {{}}", value, e.use(q[0], "pred"))


@handles("bfe", "bfi", "bfind", "brev", "clz", "popc", "fns", "sad", "bmsk", "szext")
def _bits(e: Emitter, ins: Instr, m: Mods) -> None:
    ty, op = m.types[-1], ins.op
    d, *args = ins.args
    pattern = {"bfe": (ty, "u32", "u32"), "bfi": (ty, ty, "u32", "u32"), "fns": ("b32", "b32", "s32"), "sad": (ty,) * 3}
    kinds = pattern.get(op, (ty,) * len(args))
    if op in ("bmsk", "szext"):
        kinds = (ty, "u32") if op == "szext" else ("u32", "u32")
    names = [e.use(a, kind) for a, kind in zip(args, kinds, strict=True)]
    extra = keywords(m, "shiftamt")
    if op in ("bmsk", "szext"):
        extra = f", wrap={m.choose('wrap', 'clamp') == 'wrap'}"
    ret = "u32" if op in ("bfind", "clz", "popc", "fns") else ty
    lead = "" if op in ("fns", "bmsk") else f"{ty!r}, "
    result(e, d, ret, f"alu.{op}({lead}{', '.join(['{}'] * len(names))}{extra})", *names)


@handles("prmt")
def _permute(e: Emitter, ins: Instr, m: Mods) -> None:
    mode = m.choose("f4e", "b4e", "rc8", "ecl", "ecr", "rc16") or None
    names = [e.use(a, "b32") for a in ins.args[1:]]
    result(e, ins.args[0], "b32", f"alu.prmt({{}}, {{}}, {{}}, {mode!r})", *names)


@handles("dp4a", "dp2a")
def _dot(e: Emitter, ins: Instr, m: Mods) -> None:
    a, b = m.types[0], m.types[1]
    half = f"{m.choose('lo', 'hi')!r}, " if ins.op == "dp2a" else ""
    names = [e.use(each, "b32") for each in ins.args[1:]]
    result(e, ins.args[0], "b32", f"alu.{ins.op}({half}{a!r}, {b!r}, {{}}, {{}}, {{}})", *names)


@handles("setp", "set")
def _compare(e: Emitter, ins: Instr, m: Mods) -> None:
    op = m.choose(*_COMPARE)
    combine = m.choose("and", "or", "xor")
    ftz = keywords(m, "ftz")
    ty = m.types[-1]
    d, a, b, *c = ins.args
    sign = {"and": "&", "or": "|", "xor": "^"}.get(combine, "")
    names = [e.use(a, ty), e.use(b, ty)]
    plain = {"eq": "==", "ne": "!="}.get(op)
    if TYPES[ty][1] in "bu" and TYPES[ty][0] <= 64:
        plain = plain or _UNSIGNED_COMPARE.get(op)
    inline = plain and not is_float(ty)
    form = f"{{}} {plain} {{}}" if inline else f"alu.compare({op!r}, {ty!r}, {{}}, {{}}{ftz})"
    extra = [e.use(c[0], "pred")] if c else []
    constant = all(n in e.constant for n in names)
    if ins.op == "set":
        value = e.temp(form.format(*names), constant)
        if extra:
            value = e.temp(f"{value} {sign} {extra[0]}", constant and extra[0] in e.constant)
        result(e, d, m.types[0], f"alu.set_value({m.types[0]!r}, {{}})", value)
        return
    first, second = split_pair(d)
    if ty in ("f16x2", "bf16x2"):
        both = e.temp(form.format(*names), constant)
        parts = [e.temp(f"{both}[..., {i}]", constant) for i in (0, 1)]
        for part, dst in zip(parts, (first, second), strict=True):
            if dst is not None and not isinstance(dst, Sink):
                result(e, dst, "pred", f"{{}} {sign} {{}}" if extra else "{}.copy()", part, *extra)
        return
    if second is None and not extra:
        result(e, first, "pred", form, *names)
        return
    value = e.temp(form.format(*names), constant)
    if not isinstance(first, Sink):
        result(e, first, "pred", f"{{}} {sign} {{}}" if extra else "{}.copy()", value, *extra)
    if second is not None and not isinstance(second, Sink):
        result(e, second, "pred", f"~{{}} {sign} {{}}" if extra else "~{}", value, *extra)


@handles("testp")
def _testp(e: Emitter, ins: Instr, m: Mods) -> None:
    what = m.choose("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    ty = m.types[-1]
    result(e, ins.args[0], "pred", f"alu.testp({ty!r}, {what!r}, {{}})", e.use(ins.args[1], ty))


@handles("selp")
def _select(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    d, a, b, p = ins.args
    condition, yes, no = e.use(p, "pred"), e.use(a, ty), e.use(b, ty)
    result(e, d, ty, "where({}, {}, {})", condition, yes, no)


@handles("slct")
def _slct(e: Emitter, ins: Instr, m: Mods) -> None:
    ty, by = m.types
    ftz = keywords(m, "ftz")
    d, a, b, c = ins.args
    zero = e.number(0, 32)
    test = f"alu.compare('ge', {by!r}, {{}}, {zero}{ftz})"
    result(e, d, ty, f"where({test}, {{}}, {{}})", e.use(c, by), e.use(a, ty), e.use(b, ty))


@handles("cvt")
def _convert(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("approx")
    dst, src = m.types[0], m.types[-1]
    rnd = m.choose("rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi", "rs")
    d, *args = ins.args
    if rnd == "rs":
        raise m.refuse()
    if dst in _NARROW or src in _NARROW or dst in ("f16x2", "bf16x2"):
        m.flag("ftz")
        extra = keywords(m, "satfinite", "relu") + (f", rnd={rnd!r}" if rnd else "")
        if len(args) == 2 and src == "f32":
            hi, lo = (e.use(a, "f32") for a in args)
            form = f"alu.cvt_pack({dst!r}, {{}}, {{}}{extra})"
            result(e, d, dst, form, hi, lo)
        else:
            result(e, d, dst, f"alu.cvt_packed({dst!r}, {src!r}, {{}}{extra})", e.use(args[0], src))
        return
    if len(args) != 1 or dst not in _SCALAR or src not in _SCALAR:
        raise m.refuse()
    extra = keywords(m, "ftz", "sat", "satfinite", "relu") + (f", rnd={rnd!r}" if rnd else "")
    bits, kind = TYPES[src]
    out = "b32" if dst == "tf32" else dst
    a = e.use(args[0], src)
    if kind == "u" and TYPES[dst][1] in "us" and not extra and TYPES[dst][0] >= bits:
        result(e, d, dst, f"{{}}.astype(U{TYPES[dst][0]})", a)
    else:
        result(e, d, out, f"alu.cvt({dst!r}, {src!r}, {{}}{extra})", a)


_SCALAR = {*(f"{k}{b}" for k in "us" for b in (8, 16, 32, 64)), "f16", "bf16", "f32", "f64", "tf32"}


@handles("mov")
def _move(e: Emitter, ins: Instr, m: Mods) -> None:
    ty = m.types[-1]
    d, a = ins.args
    bits = TYPES[ty][0]
    if isinstance(d, Vector):
        _unpack(e, d, e.use(a, ty), bits)
    elif isinstance(a, Vector):
        _pack(e, d, a, bits, ty)
    elif isinstance(d, Reg) and isinstance(a, Reg) and not e.mask and d.bits == a.bits:
        e.alias(d, e.reg(a))
    else:
        name = e.use(a, ty)
        if isinstance(d, Reg) and not e.mask and d.bits == bits:
            e.alias(d, name)
        else:
            result(e, d, ty, "{}", name)


def _unpack(e: Emitter, d: Vector, name: str, bits: int) -> None:
    part = bits // len(d.items)
    ty = f"b{part}"
    for i, item in enumerate(d.items):
        if isinstance(item, Sink):
            continue
        if bits == 128:
            result(e, item, ty, f"{{}}[:, {i}].copy()", name)
        else:
            result(e, item, ty, f"({{}} >> U{bits}({i * part})).astype(U{part})", name)


def _pack(e: Emitter, d: Operand, a: Vector, bits: int, ty: str) -> None:
    part = bits // len(a.items)
    names = [e.use(item, f"b{part}") for item in a.items if not isinstance(item, Sink)]
    if len(names) != len(a.items):
        names = [e.number(0, part) if isinstance(i, Sink) else e.use(i, f"b{part}") for i in a.items]
    if bits == 128:
        result(e, d, "b128", "np.stack(np.broadcast_arrays({}, {}), axis=1)", *names)
        return
    shifted = [f"({{}}.astype(U{bits}) << U{bits}({i * part}))" for i in range(1, len(names))]
    form = " | ".join([f"{{}}.astype(U{bits})", *shifted])
    result(e, d, ty, form, *names)
