# ruff: noqa: E501  (a form is a row of a table, its PTX one string)
"""The table of instruction forms that a GPU and the emulator must agree on.

A form is a line or two of PTX over the registers %a %b %c %d (operands) and %r %q (results). The text may also use
%pa and %pr, %pq (the addresses of this thread's first operand and results), %s (the address of 16 bytes of its own in
shared memory, a multiple of 16) with %s0 (the block's), %lane, %t, and $ for a suffix that makes a label unique.
"""

from __future__ import annotations

from dataclasses import dataclass

ROUNDINGS = ("rn", "rz", "rm", "rp")
INTEGRAL = ("rni", "rzi", "rmi", "rpi")
INTS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
WORDS = INTS[2:]
HALVES = ("f16", "f16x2")
BRAINS = ("bf16", "bf16x2")
ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")
THREADS = 256


@dataclass(frozen=True)
class Form:
    """One instruction form."""

    name: str
    text: str
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    family: str
    n: int = 4096
    exhaustive: bool = False
    approximate: bool = False


# Forms of the PTX ISA that no sm_90a has; counted, so that the table says what it leaves out.
LEFT_OUT = {
    "sm_100 or later": (
        "add.f32.f16", "add.f32.bf16", "sub.f32.f16", "sub.f32.bf16", "fma.f32.f16", "fma.f32.bf16",
        "add.f32x2", "sub.f32x2", "mul.f32x2", "fma.f32x2", "min.f32 of three", "max.f32 of three",
        "redux.sync.min.f32", "redux.sync.max.f32", "redux.sync.min.abs.NaN.f32", "redux.sync.max.abs.NaN.f32",
        "cvt.rn.satfinite.e2m1x2.f32", "cvt.rn.satfinite.e2m3x2.f32", "cvt.rn.satfinite.e3m2x2.f32",
        "cvt.rz.satfinite.ue8m0x2.f32", "cvt.rp.satfinite.ue8m0x2.f32", "cvt.rz.satfinite.ue8m0x2.bf16x2",
        "cvt.rp.satfinite.ue8m0x2.bf16x2", "cvt.rn.f16x2.e2m1x2", "cvt.rn.f16x2.e2m3x2", "cvt.rn.f16x2.e3m2x2",
        "cvt.rn.bf16x2.ue8m0x2", "cvt.rs.f16x2.f32", "cvt.rs.bf16x2.f32", "cvt.rs.satfinite.e4m3x4.f32",
        "cvt.rs.satfinite.e5m2x4.f32", "ld.global.v8.b32", "st.global.v8.b32", "cvt.rn.satfinite.tf32.f32",
        "cvt.rz.satfinite.tf32.f32",
    ),
}  # fmt: skip


def _bits(ty: str) -> str:
    """The untyped result of a type's width."""
    if ty.endswith("x2") and ty[:-2] in ("f16", "bf16", "u16", "s16"):
        return "b32"
    digits = "".join(c for c in ty[1:] if c.isdigit()) if not ty.startswith("bf") else "16"
    return f"b{max(int(digits), 16)}"


def _options(*groups: tuple[str, ...]) -> list[str]:
    found = [""]
    for group in groups:
        found = [done + each for done in found for each in group]
    return found


class _Table:
    def __init__(self) -> None:
        self.forms: list[Form] = []

    def simple(self, family: str, op: str, kinds: str, out: str, **extra: object) -> None:
        """op %r, %a, %b ...: an instruction whose operands come in order."""
        ins = tuple(kinds.split())
        names = ", ".join(f"%{letter}" for letter in "abcd"[: len(ins)])
        self.form(family, op, f"{op} %r, {names};", kinds, out, **extra)

    def form(self, family: str, name: str, text: str, kinds: str, outs: str, **extra: object) -> None:
        self.forms.append(Form(name, text, tuple(kinds.split()), tuple(outs.split()), family, **extra))  # type: ignore[arg-type]


def _floats(t: _Table) -> None:
    for rnd in ROUNDINGS:
        for flags in _options(("", ".ftz"), ("", ".sat")):
            for op in ("add", "sub", "mul"):
                t.simple("float", f"{op}.{rnd}{flags}.f32", "f32 f32", "b32")
            t.simple("float", f"fma.{rnd}{flags}.f32", "f32 f32 f32", "b32")
        t.simple("float", f"mad.{rnd}.f32", "f32 f32 f32", "b32")
        for op in ("add", "sub", "mul", "div"):
            t.simple("float", f"{op}.{rnd}.f64", "f64 f64", "b64", n=2048)
        for op in ("fma", "mad"):
            t.simple("float", f"{op}.{rnd}.f64", "f64 f64 f64", "b64", n=2048)
        for ftz in ("", ".ftz"):
            t.simple("float", f"div.{rnd}{ftz}.f32", "f32 f32", "b32")
            t.simple("float", f"rcp.{rnd}{ftz}.f32", "f32", "b32")
            t.simple("float", f"sqrt.{rnd}{ftz}.f32", "f32", "b32")
        t.simple("float", f"rcp.{rnd}.f64", "f64", "b64", n=2048)
        t.simple("float", f"sqrt.{rnd}.f64", "f64", "b64", n=2048)
    for ty in HALVES:
        for flags in _options(("", ".ftz"), ("", ".sat")):
            for op in ("add", "sub", "mul"):
                t.simple("float", f"{op}.rn{flags}.{ty}", f"{ty} {ty}", _bits(ty))
        for flags in _options(("", ".ftz"), ("", ".sat", ".relu")):
            t.simple("float", f"fma.rn{flags}.{ty}", f"{ty} {ty} {ty}", _bits(ty))
    for ty in BRAINS:
        for op in ("add", "sub", "mul"):
            t.simple("float", f"{op}.rn.{ty}", f"{ty} {ty}", _bits(ty))
        for flags in ("", ".relu"):
            t.simple("float", f"fma.rn{flags}.{ty}", f"{ty} {ty} {ty}", _bits(ty))
    for ty, ftzs in (("f32", ("", ".ftz")), ("f64", ("",)), *((h, ("", ".ftz")) for h in HALVES), *((b, ("",)) for b in BRAINS)):
        for ftz in ftzs:
            for op in ("neg", "abs"):
                t.simple("sign", f"{op}{ftz}.{ty}", ty, _bits(ty), n=65536 if _bits(ty) == "b16" else 4096, exhaustive=_bits(ty) == "b16")
            flags = _options(("", ".NaN"), ("", ".xorsign.abs")) if ty != "f64" else [""]
            for flag in flags:
                for op in ("min", "max"):
                    t.simple("minmax", f"{op}{ftz}{flag}.{ty}", f"{ty} {ty}", _bits(ty))
    for ty in ("f32", "f64"):
        t.simple("sign", f"copysign.{ty}", f"{ty} {ty}", _bits(ty))
        for what in ("finite", "infinite", "number", "notanumber", "normal", "subnormal"):
            t.simple("compare", f"testp.{what}.{ty}", ty, "pred")


def _approximations(t: _Table) -> None:
    for ftz in ("", ".ftz"):
        for op in ("rcp", "sqrt", "rsqrt", "lg2", "ex2"):
            t.simple("approximate", f"{op}.approx{ftz}.f32", "f32", "b32", approximate=True)
        for op in ("sin", "cos"):
            t.simple("approximate", f"{op}.approx{ftz}.f32", "angle", "b32", approximate=True)
        for op in ("div.approx", "div.full"):
            t.simple("approximate", f"{op}{ftz}.f32", "f32 f32", "b32", approximate=True)
    t.simple("approximate", "tanh.approx.f32", "f32", "b32", approximate=True)
    for op in ("ex2.approx.f16", "ex2.approx.ftz.bf16", "tanh.approx.f16", "tanh.approx.bf16"):
        ty = op.rsplit(".", 1)[1]
        t.simple("approximate", op, ty, "b16", approximate=True, n=65536, exhaustive=True)
        t.simple("approximate", f"{op}x2", f"{ty}x2", "b32", approximate=True)
    for op in ("rcp.approx.ftz.f64", "rsqrt.approx.f64", "rsqrt.approx.ftz.f64"):
        t.simple("approximate", op, "f64", "b64", approximate=True)


def _comparisons(t: _Table) -> None:
    for op in ORDERED + UNORDERED:
        for ty in ("f32", "f32 .ftz", "f64", "f16", "f16 .ftz", "bf16"):
            kind, _, ftz = ty.partition(" ")
            t.simple("compare", f"setp.{op}{ftz}.{kind}", f"{kind} {kind}", "pred")
        for ty in ("f16x2", "bf16x2"):
            t.form("compare", f"setp.{op}.{ty}", f"setp.{op}.{ty} %r|%q, %a, %b;", f"{ty} {ty}", "pred pred")
            t.simple("compare", f"set.{op}.{ty}.{ty}", f"{ty} {ty}", "b32")
            t.simple("compare", f"set.{op}.u32.{ty}", f"{ty} {ty}", "b32", n=1024)
    for ty in WORDS:
        for op in ORDERED:
            t.simple("compare", f"setp.{op}.{ty}", f"{ty} {ty}", "pred")
        for op in ("lo", "ls", "hi", "hs") if ty.startswith("u") else ():
            t.simple("compare", f"setp.{op}.{ty}", f"{ty} {ty}", "pred")
    for ty in ("b16", "b32", "b64"):
        for op in ("eq", "ne"):
            t.simple("compare", f"setp.{op}.{ty}", f"{ty} {ty}", "pred")
    for ty in ("s32", "f32", "u64", "f16"):
        for combine in ("and", "or", "xor"):
            if ty != "f16":  # which writes one predicate
                text = f"setp.lt.{combine}.{ty} %r|%q, %a, %b, %c;"
                t.form("compare", f"setp.lt.{combine}.{ty} p|q", text, f"{ty} {ty} pred", "pred pred")
            t.form(
                "compare", f"setp.ge.{combine}.{ty} !c", f"setp.ge.{combine}.{ty} %r, %a, %b, !%c;", f"{ty} {ty} pred", "pred"
            )
    for combine in ("and", "or", "xor"):
        t.form(
            "compare", f"setp.gtu.{combine}.f16x2", f"setp.gtu.{combine}.f16x2 %r|%q, %a, %b, %c;", "f16x2 f16x2 pred", "pred pred"
        )
        t.form("compare", f"set.lt.{combine}.u32.f32", f"set.lt.{combine}.u32.f32 %r, %a, %b, %c;", "f32 f32 pred", "b32")
    for src in ("f32", "f64", "s32", "u32", "s16", "u16", "u64", "s64"):
        for dst in ("u32", "s32", "f32"):
            for op in ("lt", "ne"):
                t.simple("compare", f"set.{op}.{dst}.{src}", f"{src} {src}", "b32")
    for src in ("f16", "bf16"):
        for dst in ("u16", "s16", "u32", "s32", src):
            t.simple("compare", f"set.gt.{dst}.{src}", f"{src} {src}", _bits(dst))
    t.simple("compare", "set.leu.ftz.f32.f32", "f32 f32", "b32")
    for ty in ("b16", "b32", "b64", "f32", "f64"):
        t.simple("select", f"selp.{ty}", f"{ty} {ty} pred", _bits(ty))
    for ty, by in (("b32", "s32"), ("b64", "s32"), ("b16", "s32"), ("f32", "f32"), ("f64", "f32")):
        t.simple("select", f"slct.{ty}.{by}", f"{ty} {ty} {by}", _bits(ty))
    t.simple("select", "slct.ftz.f32.f32", "f32 f32 f32", "b32")


def _can_overflow(src: str, dst: str) -> bool:
    """Whether .sat has anything to do: ptxas refuses it elsewhere."""
    from_bits, to_bits = int(src[1:]), int(dst[1:])
    if src[0] == dst[0]:
        return to_bits < from_bits
    return src[0] == "s" or to_bits <= from_bits


def _conversions(t: _Table) -> None:
    for src in INTS:
        for dst in INTS:
            # A narrow result fills a wider register: 8 bits are read back in 32.
            out = "b32" if dst in ("u8", "s8") else _bits(dst)
            for sat in ("", ".sat") if _can_overflow(src, dst) else ("",):
                t.simple("convert", f"cvt{sat}.{dst}.{src}", src, out, n=1024)
    for rnd in INTEGRAL:
        for dst in INTS:
            out = "b32" if dst in ("u8", "s8") else _bits(dst)
            for src in ("f16", "bf16", "f32", "f64"):
                if src == "bf16" and dst in ("u8", "s8"):
                    continue  # not in the ISA
                half = _bits(src) == "b16"
                t.simple("convert", f"cvt.{rnd}.{dst}.{src}", src, out, n=65536 if half else 4096, exhaustive=half)
            t.simple("convert", f"cvt.{rnd}.ftz.{dst}.f32", "f32", out, n=1024)
        for ty in ("f16", "bf16", "f32", "f64"):
            half = _bits(ty) == "b16"
            t.simple("convert", f"cvt.{rnd}.{ty}.{ty}", ty, _bits(ty), n=65536 if half else 4096, exhaustive=half)
        t.simple("convert", f"cvt.{rnd}.sat.f32.f32", "f32", "b32")
        t.simple("convert", f"cvt.{rnd}.ftz.f32.f32", "f32", "b32")
    t.simple("convert", "cvt.rzi.sat.s32.f32", "f32", "b32")
    for rnd in ROUNDINGS:
        for src in INTS:
            for dst in ("f16", "bf16", "f32", "f64"):
                if dst == "bf16" and src in ("u8", "s8"):
                    continue  # not in the ISA
                t.simple("convert", f"cvt.{rnd}.{dst}.{src}", src, _bits(dst), n=2048)
        for src, dst in (("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32"), ("f16", "bf16"), ("bf16", "f16")):
            half = _bits(src) == "b16" or src == "f32"
            extra = {"n": 65536 if half else 4096, "exhaustive": half}
            t.simple("convert", f"cvt.{rnd}.{dst}.{src}", src, _bits(dst), **extra)
        t.simple("convert", f"cvt.{rnd}.ftz.f32.f64", "f64", "b32")
        t.simple("convert", f"cvt.{rnd}.sat.f32.f64", "f64", "b32")
        t.simple("convert", f"cvt.{rnd}.ftz.f16.f32", "f32", "b16")
        t.simple("convert", f"cvt.{rnd}.sat.f16.f32", "f32", "b16")
        t.simple("convert", f"cvt.{rnd}.sat.f32.s32", "s32", "b32")
    for rnd in ("rn", "rz"):
        for relu in ("", ".relu"):
            for dst in ("f16", "bf16"):
                if relu:
                    t.simple("convert", f"cvt.{rnd}.relu.{dst}.f32", "f32", "b16")
                op = f"cvt.{rnd}{relu}.{dst}x2.f32"
                t.form("convert", op, f"{op} %r, %a, %b;", "f32 f32", "b32", n=65536, exhaustive=True)
            t.simple("convert", f"cvt.{rnd}{relu}.tf32.f32", "f32", "b32", n=65536, exhaustive=True)
        for dst in ("f16", "bf16"):
            t.simple("convert", f"cvt.{rnd}.satfinite.{dst}.f32", "f32", "b16")
            t.simple("convert", f"cvt.{rnd}.satfinite.{dst}x2.f32", "f32 f32", "b32")
    t.simple("convert", "cvt.rna.tf32.f32", "f32", "b32", n=65536, exhaustive=True)
    t.simple("convert", "cvt.rna.satfinite.tf32.f32", "f32", "b32")
    for dst in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            t.simple("convert", f"cvt.rn.satfinite{relu}.{dst}.f32", "f32 f32", "b16", n=65536, exhaustive=True)
            t.simple("convert", f"cvt.rn.satfinite{relu}.{dst}.f16x2", "f16x2", "b16", n=65536, exhaustive=True)
            t.simple("convert", f"cvt.rn{relu}.f16x2.{dst}", dst, "b32", n=65536, exhaustive=True)
    for src, dst in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")):
        half = _bits(src) == "b16"
        t.simple("convert", f"cvt.{dst}.{src}", src, _bits(dst), n=65536 if half else 4096, exhaustive=half)
    for op, src in (
        ("cvt.ftz.f32.f16", "f16"), ("cvt.sat.f32.f16", "f16"), ("cvt.ftz.f64.f32", "f32"), ("cvt.sat.f32.f32", "f32"),
        ("cvt.ftz.f32.f32", "f32"), ("cvt.f32.f32", "f32"), ("cvt.sat.f16.f16", "f16"), ("cvt.f16.f16", "f16"),
        ("cvt.f64.f64", "f64"), ("cvt.sat.f64.f64", "f64"), ("cvt.sat.f64.f32", "f32"), ("cvt.sat.f64.f16", "f16"),
    ):  # fmt: skip
        t.simple("convert", op, src, _bits(op.split(".")[-2]))


def _integers(t: _Table) -> None:
    for ty in WORDS:
        for op in ("add", "sub", "div", "rem", "min", "max", "mul.lo", "mul.hi"):
            t.simple("integer", f"{op}.{ty}", f"{ty} {ty}", _bits(ty))
        for op in ("mad.lo", "mad.hi"):
            t.simple("integer", f"{op}.{ty}", f"{ty} {ty} {ty}", _bits(ty))
        t.simple("integer", f"sad.{ty}", f"{ty} {ty} {ty}", _bits(ty))
        if ty.startswith("s"):
            t.simple("integer", f"abs.{ty}", ty, _bits(ty))
            t.simple("integer", f"neg.{ty}", ty, _bits(ty))
        if "64" not in ty:
            wide = f"{ty[0]}{2 * int(ty[1:])}"
            t.simple("integer", f"mul.wide.{ty}", f"{ty} {ty}", _bits(wide))
            t.simple("integer", f"mad.wide.{ty}", f"{ty} {ty} {wide}", _bits(wide))
        t.simple("shift", f"shr.{ty}", f"{ty} shift", _bits(ty))
    for ty in ("u16x2", "s16x2"):
        for op in ("add", "min", "max"):
            t.simple("integer", f"{op}.{ty}", f"{ty} {ty}", "b32")
    for op in ("add.sat.s32", "sub.sat.s32", "min.relu.s32", "max.relu.s32"):
        t.simple("integer", op, "s32 s32", "b32")
    for op in ("min", "max"):
        t.simple("integer", f"{op}.relu.s16x2", "s16x2 s16x2", "b32")
    t.simple("integer", "mad.hi.sat.s32", "s32 s32 s32", "b32")
    t.simple("integer", "mad24.hi.sat.s32", "s32 s32 s32", "b32")
    for ty in ("u32", "s32"):
        for half in ("lo", "hi"):
            t.simple("integer", f"mul24.{half}.{ty}", f"{ty} {ty}", "b32")
            t.simple("integer", f"mad24.{half}.{ty}", f"{ty} {ty} {ty}", "b32")
    for ty in ("u32", "s32", "u64", "s64"):
        for op in ("add", "sub"):
            text = f"{op}.cc.{ty} %r, %a, %b; {op}c.{ty} %q, %c, %d;"
            t.form("carry", f"{op}.cc {op}c.{ty}", text, f"{ty} {ty} {ty} {ty}", f"{_bits(ty)} {_bits(ty)}")
            text = f"{op}.cc.{ty} %r, %a, %b; {op}c.cc.{ty} %r, %c, %d; {op}c.{ty} %q, %r, %r;"
            t.form("carry", f"{op}.cc {op}c.cc {op}c.{ty}", text, f"{ty} {ty} {ty} {ty}", f"{_bits(ty)} {_bits(ty)}")
        text = f"mad.lo.cc.{ty} %r, %a, %b, %c; madc.hi.{ty} %q, %a, %b, %d;"
        t.form("carry", f"mad.lo.cc madc.hi.{ty}", text, f"{ty} {ty} {ty} {ty}", f"{_bits(ty)} {_bits(ty)}")
        text = f"mad.hi.cc.{ty} %r, %a, %b, %c; madc.lo.cc.{ty} %q, %a, %b, %d; addc.{ty} %r, %r, %d;"
        t.form("carry", f"mad.hi.cc madc.lo.cc.{ty}", text, f"{ty} {ty} {ty} {ty}", f"{_bits(ty)} {_bits(ty)}")
    for bits in ("b16", "b32", "b64"):
        for op in ("and", "or", "xor"):
            t.simple("logic", f"{op}.{bits}", f"{bits} {bits}", bits)
        for op in ("not", "cnot"):
            t.simple("logic", f"{op}.{bits}", bits, bits)
        t.simple("shift", f"shl.{bits}", f"{bits} shift", bits)
        t.simple("shift", f"shr.{bits}", f"{bits} shift", bits)
    for op in ("and", "or", "xor"):
        t.simple("logic", f"{op}.pred", "pred pred", "pred", n=256)
    t.simple("logic", "not.pred", "pred", "pred", n=256)
    every = " ".join(f"lop3.b32 %q, %a, %b, %c, {lut}; mad.lo.u32 %r, %r, 1664525, %q;" for lut in range(256))
    t.form("logic", "lop3.b32 all 256", f"mov.u32 %r, 0; {every}", "b32 b32 b32", "b32 b32", n=1024)
    for combine in ("or", "and"):
        text = f"lop3.{combine}.b32 %r|%q, %a, %b, %c, 0x80, %d;"
        t.form("logic", f"lop3.{combine}.b32 d|p", text, "b32 b32 b32 pred", "b32 pred")
    for side in ("l", "r"):
        for mode in ("wrap", "clamp"):
            t.simple("shift", f"shf.{side}.{mode}.b32", "b32 b32 shift", "b32")
    for ty in WORDS[2:]:
        t.simple("bits", f"bfe.{ty}", f"{ty} position position", _bits(ty))
        t.simple("bits", f"bfind.{ty}", ty, "b32")
        t.simple("bits", f"bfind.shiftamt.{ty}", ty, "b32")
    for bits in ("b32", "b64"):
        t.simple("bits", f"bfi.{bits}", f"{bits} {bits} position position", bits)
        for op in ("brev", "clz", "popc"):
            t.simple("bits", f"{op}.{bits}", bits, bits if op == "brev" else "b32")
    for mode in ("wrap", "clamp"):
        t.simple("bits", f"bmsk.{mode}.b32", "position position", "b32")
        for ty in ("u32", "s32"):
            t.simple("bits", f"szext.{mode}.{ty}", f"{ty} position", "b32")
    t.form("bits", "fns.b32", "and.b32 %b, %b, 31; fns.b32 %r, %a, %b, %c;", "b32 position s32", "b32")
    text = "and.b32 %b, %b, 31; sub.s32 %c, %c, 32; fns.b32 %r, %a, %b, %c;"
    t.form("bits", "fns.b32 near", text, "b32 position small", "b32")
    t.simple("bits", "prmt.b32", "b32 b32 b32", "b32")
    for mode in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        t.simple("bits", f"prmt.b32.{mode}", "b32 b32 b32", "b32")
    for a in ("u32", "s32"):
        for b in ("u32", "s32"):
            t.simple("integer", f"dp4a.{a}.{b}", "b32 b32 b32", "b32")
            for half in ("lo", "hi"):
                t.simple("integer", f"dp2a.{half}.{a}.{b}", "b32 b32 b32", "b32")


def _video(t: _Table) -> None:
    for a, b in (("u32", "u32"), ("s32", "s32"), ("u32", "s32")):
        for d in ("u32", "s32"):
            for flag in ("", ".sat", ".add"):
                t.simple("integer", f"vabsdiff4.{d}.{a}.{b}{flag}", "b32 b32 b32", "b32")


def _warp(t: _Table) -> None:
    for mode in ("up", "down", "bfly", "idx"):
        t.form("warp", f"shfl.sync.{mode}.b32 d|p", f"shfl.sync.{mode}.b32 %r|%q, %a, %b, %c, -1;", "b32 shift warp", "b32 pred")
        for clamp in (0, 7, 31, 0x181F, 0x1C03):
            text = f"shfl.sync.{mode}.b32 %r|%q, %a, 3, {clamp}, -1;"
            t.form("warp", f"shfl.sync.{mode}.b32 3 {clamp:#x}", text, "b32", "b32 pred", n=1024)
    half = "and.b32 %q, %t, 1; setp.eq.u32 %odd, %q, 1; selp.b32 %q, 0xAAAAAAAA, 0x55555555, %odd;"
    split = "and.b32 %q, %t, 1; setp.eq.u32 %odd, %q, 1; @%odd bra $odd;"
    for mode, kind in (("all", "pred"), ("any", "pred"), ("uni", "pred"), ("ballot", "b32")):
        t.form("warp", f"vote.sync.{mode}", f"vote.sync.{mode}.{kind} %r, %a, -1;", "pred", kind, n=2048)
        text = f"{half} vote.sync.{mode}.{kind} %r, %a, %q;"
        t.form("warp", f"vote.sync.{mode} half mask", text, "pred", f"{kind} b32", n=2048)
        text = f"setp.lt.u32 %odd, %lane, 29; or.pred %r0, %a, %odd; vote.sync.{mode}.{kind} %r, %r0, -1;"
        t.form("warp", f"vote.sync.{mode} mostly true", text, "pred", kind, n=4096)
    for bits in ("32", "64"):
        t.form("warp", f"match.any.sync.b{bits}", f"match.any.sync.b{bits} %r, %a, -1;", f"few{bits}", "b32")
        t.form("warp", f"match.all.sync.b{bits}", f"match.all.sync.b{bits} %r|%q, %a, -1;", f"few{bits}", "b32 pred")
        t.form("warp", f"match.any.sync.b{bits} half mask", f"{half} match.any.sync.b{bits} %r, %a, %q;", f"few{bits}", "b32 b32")
    for op, ty in (*((o, ty) for o in ("add", "min", "max") for ty in ("u32", "s32")), ("and", "b32"), ("or", "b32"), ("xor", "b32")):
        t.form("warp", f"redux.sync.{op}.{ty}", f"redux.sync.{op}.{ty} %r, %a, -1;", ty, "b32")
        t.form("warp", f"redux.sync.{op}.{ty} half mask", f"{half} redux.sync.{op}.{ty} %r, %a, %q;", ty, "b32 b32")
    t.form("warp", "elect.sync", "elect.sync %r|%q, -1;", "b32", "b32 pred", n=256)
    t.form("warp", "elect.sync half", f"{split} elect.sync %r|%p0, 0x55555555; bra $end; $odd: elect.sync %r|%p0, 0xAAAAAAAA; $end: selp.b32 %q, 1, 0, %p0;", "b32", "b32 b32", n=256)
    t.form("warp", "activemask divergent", f"{split} activemask.b32 %r; bra $end; $odd: activemask.b32 %r; add.u32 %r, %r, 1; $end:", "b32", "b32 b32", n=256)
    t.form("warp", "shfl.sync half", f"{split} shfl.sync.down.b32 %r, %a, 2, 31, 0x55555555; bra $end; $odd: shfl.sync.up.b32 %r, %a, 4, 0, 0xAAAAAAAA; $end:", "b32", "b32 b32")
    for op, out in (("popc.u32", "b32"), ("and.pred", "pred"), ("or.pred", "pred")):
        for name, bias in (("", ""), (" mostly true", "or.pred %p0, %p0, %most;"), (" mostly false", "not.pred %most, %most; and.pred %p0, %p0, %most;")):
            text = f"setp.ne.u32 %most, %t, 77; mov.pred %p0, %a; {bias} barrier.red.{op} %r, 1, %p0;"
            t.form("barrier", f"barrier.red.{op}{name}", text, "pred", out)
        text = f"mov.pred %r, 0; setp.ge.u32 %most, %t, 192; @%most bra $end; bar.red.{op} %r, 2, 192, %a; $end:"
        text = text.replace("mov.pred %r, 0", "mov.u32 %r, 0") if out == "b32" else text
        t.form("barrier", f"bar.red.{op} 192 threads", text, "pred", out)
        text = f"setp.ge.u32 %most, %t, 224; @%most exit; bar.red.{op} %r, 0, %a;"
        t.form("barrier", f"bar.red.{op} after a warp's exit", text, "pred", out)
        text = f"setp.eq.u32 %most, %lane, 5; @%most exit; barrier.red.{op} %r, 0, %a;"
        t.form("barrier", f"barrier.red.{op} after lanes' exit", text, "pred", out)


_ATOMS = (
    ("add", "u32 s32 u64 f32 f64"), ("min", "u32 s32 u64 s64"), ("max", "u32 s32 u64 s64"), ("and", "b32 b64"),
    ("or", "b32 b64"), ("xor", "b32 b64"), ("exch", "b32 b64"), ("inc", "u32"), ("dec", "u32"),
    ("add.noftz", "f16 bf16 f16x2 bf16x2"),
)  # fmt: skip


def _vector_atomics(t: _Table) -> None:
    """Memory is a result array's own part of this thread; what atom returns fills that of the other result."""
    for ty, widths in (("f32", "24"), ("f16", "248"), ("bf16", "248"), ("f16x2", "24"), ("bf16x2", "24")):
        size = 16 if ty in HALVES[:1] + BRAINS[:1] else 32
        kind = {"f32": "f32x2", "f16": "f16x4", "f16x2": "f16x4"}.get(ty, "bf16x4")
        for n in map(int, widths):
            bits, part = n * size, "h" if size == 16 else "w"
            names = [f"%{part}{i}" for i in range(n)]
            vector = "{" + ", ".join(names) + "}"
            if bits == 32:
                split, joined = f"cvt.u32.u64 %w0, %a; mov.b32 {vector}, %w0;", ""
                store, keep = "cvt.u32.u64 %w0, %b; st.global.b32 [%pq], %w0; ", f"mov.b32 %r, {vector};"
                ins, outs = f"{kind} {kind}", "b32 mem32"
            elif bits == 64:
                split, joined = f"mov.b64 {vector}, %a;", ""
                store, keep, ins, outs = "st.global.b64 [%pq], %b; ", f"mov.b64 %r, {vector};", f"{kind} {kind}", "b64 mem64"
            else:
                halves = [f"{{{', '.join(names[: n // 2])}}}", f"{{{', '.join(names[n // 2 :])}}}"]
                split = f"mov.b64 {halves[0]}, %a; mov.b64 {halves[1]}, %b;"
                joined = f"mov.b64 %a, {halves[0]}; mov.b64 %b, {halves[1]}; "
                store, keep = "st.global.v2.b64 [%pq], {%c, %d}; ", "st.global.v2.b64 [%pr], {%a, %b};"
                ins, outs = " ".join([kind] * 4), "mem128 mem128"
            for op in ("add",) if ty == "f32" else ("add.noftz", "min.noftz", "max.noftz"):
                name = f"global.{op}.v{n}.{ty}"
                atom = f"{store}{split} atom.{name} {vector}, [%pq], {vector}; {joined}{keep}"
                t.form("atomic", f"atom.{name}", atom, ins, outs, n=2048)
                t.form("atomic", f"red.{name}", f"{store}{split} red.{name} [%pq], {vector}; {joined}{keep}", ins, outs, n=2048)
    four = "mov.b64 {%w0, %w1}, %a; mov.b64 {%w2, %w3}, %b; st.global.v2.b64 [%pq], {%c, %d};"
    for name in ("relaxed.gpu.add.v4.f32", "relaxed.cta.global.max.noftz.v4.bf16x2"):
        text = f"{four} red.{name} [%pq], {{%w0, %w1, %w2, %w3}}; st.global.v2.b64 [%pr], {{%a, %b}};"
        t.form("atomic", f"red.{name}", text, " ".join(["bf16x4" if "bf16" in name else "f32x2"] * 4), "mem128 mem128", n=2048)
    for space, at in (("global", "%pq"), ("shared", "%s")):
        wide = f"st.{space}.v2.b64 [{at}], {{%c, %d}}; mov.b128 %x0, {{%a, %b}}; mov.b128 %x1, {{%b, %a}};"
        keep = f"{'ld.shared.v2.b64 {%a, %b}, [%s]; st.global.v2.b64 [%pq], {%a, %b}; ' if space == 'shared' else ''}st.global.b128 [%pr], %x2;"
        for op, values in (("exch", "%x0"), ("cas", "%x0, %x1")):
            text = f"{wide} atom.{space}.{op}.b128 %x2, [{at}], {values}; {keep}"
            t.form("atomic", f"atom.{space}.{op}.b128", text, "few64 few64 few64 few64", "mem128 mem128", n=2048)


def _memory(t: _Table) -> None:
    for space, at in (("global", "%pq"), ("shared", "%s"), ("generic", "%g")):
        dot = "" if space == "generic" else f".{space}"
        make = "cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g; " if space == "generic" else ""
        for op, types in _ATOMS:
            for ty in types.split():
                bits = _bits(ty)
                store = f"{make}st{dot}.{bits} [{at}], %b; "
                load = f" ld{dot}.{bits} %q, [{at}];" if space != "global" else ""
                # The global word is this thread's own in the result array: what the atomic leaves is the result.
                out = f"{bits} {bits}" if space != "global" else f"{bits} mem{bits[1:]}"
                atom = f"atom{dot}.{op}.{ty} %r, [{at}], %a;"
                t.form("atomic", f"atom{dot or '.generic'}.{op}.{ty}", store + atom + load, f"{ty} {ty}", out)
                if op != "exch" and space != "generic":
                    red = f"mov.{bits} %r, %a; red{dot}.{op}.{ty} [{at}], %a;"
                    t.form("atomic", f"red{dot}.{op}.{ty}", store + red + load, f"{ty} {ty}", out, n=2048)
        for bits in ("16", "32", "64"):
            store = f"{make}st{dot}.b{bits} [{at}], %b; "
            load = f" ld{dot}.b{bits} %q, [{at}];" if space != "global" else ""
            out = f"b{bits} b{bits}" if space != "global" else f"b{bits} mem{bits}"
            kind = f"few{bits}" if bits != "16" else "b16"
            atom = f"atom{dot}.cas.b{bits} %r, [{at}], %a, %c;"
            t.form("atomic", f"atom{dot or '.generic'}.cas.b{bits}", store + atom + load, f"{kind} {kind} b{bits}", out)
    _vector_atomics(t)
    for op, ty in (("add", "u32"), ("add", "u64"), ("min", "s32"), ("max", "u64"), ("and", "b32"), ("or", "b64"), ("xor", "b32"), ("inc", "u32")):
        bits = _bits(ty)
        first = f"setp.eq.u32 %most, %t, 0; @%most st.shared.{bits} [%s0], %a; bar.sync 0; "
        value = "%a" if op != "inc" else "300"
        text = f"{first}red.shared.{op}.{ty} [%s0], {value}; bar.sync 0; ld.shared.{bits} %r, [%s0];"
        t.form("atomic", f"red.shared.{op}.{ty} conflicts", text, ty, bits, n=2048)
    for space, at in (("global", "%pa"), ("shared", "%s")):
        stage = "st.shared.b64 [%s], %a; " if space == "shared" else ""
        for ty in ("u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32"):
            for out in ("b16", "b32", "b64"):
                if int(ty[1:]) <= int(out[1:]):
                    text = f"{stage}ld.{space}.{ty} %r, [{at}+{4 if ty[1:] == '32' else 2}];"
                    t.form("memory", f"ld.{space}.{ty} to {out}", text, "b64", out, n=1024)
        for width in ("8", "16", "32", "64"):
            text = f"st.shared.b64 [%s], %b; st.shared.b{width} [%s{'' if width == '64' else '+4'}], %a; ld.shared.b64 %r, [%s];"
            if space == "shared":
                t.form("memory", f"st.shared.b{width}", text, "b64 b64", "b64", n=1024)
            else:
                text = f"st.global.b64 [%pq], %b; st.global.b{width} [%pq{'' if width == '64' else '+4'}], %a; mov.b64 %r, %a;"
                t.form("memory", f"st.global.b{width}", text, "b64 b64", "b64 mem64", n=1024)
    text = "mov.b64 {%w0, %w1}, %a; mov.b64 {%w2, %w3}, %b; st.shared.v4.b32 [%s], {%w3, %w0, %w2, %w1}; ld.shared.v2.b64 {%r, %q}, [%s];"
    t.form("memory", "st.shared.v4.b32 ld.shared.v2.b64", text, "b64 b64", "b64 b64", n=1024)
    text = "st.shared.v2.b64 [%s], {%a, %b}; ld.shared.v4.b16 {%h0, %h1, %h2, %h3}, [%s+8]; mov.b64 %r, {%h3, %h1, %h0, %h2}; ld.shared.v2.u8 {%h0, %h1}, [%s+2]; mov.b32 %q, {%h0, %h1};"
    t.form("memory", "ld.shared.v4.b16 v2.u8", text, "b64 b64", "b64 b32", n=1024)
    text = "cvta.to.global.u64 %g, %pa; ld.global.b64 %r, [%g]; cvta.global.u64 %g, %g; ld.b64 %q, [%g];"
    t.form("memory", "cvta.global", text, "b64", "b64 b64", n=1024)
    text = "st.shared.b64 [%s], %a; cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g; ld.b64 %r, [%g]; isspacep.shared %p0, %g; isspacep.global %most, %g; selp.b32 %q, 1, 0, %p0; @%most add.u32 %q, %q, 2; isspacep.local %most, %pa; @%most add.u32 %q, %q, 4; isspacep.global %most, %pa; @%most add.u32 %q, %q, 8;"
    t.form("memory", "cvta.shared isspacep", text, "b64", "b64 b32", n=1024)
    text = "st.shared.b64 [%s], %a; cvt.u64.u32 %g, %s; cvta.shared.u64 %g, %g; cvta.to.shared.u64 %g, %g; cvt.u32.u64 %q, %g; sub.u32 %q, %q, %s; ld.shared.s16 %r, [%g];"
    t.form("memory", "cvta.to.shared", text, "b64", "b32 b32", n=1024)
    for op, out in (("mov.b32 %r, {%a, %b};", "b32"), ("mov.b64 %r, {%a, %b, %b, %a};", "b64")):
        t.form("memory", f"mov pack {out}", op, "b16 b16", out, n=1024)
    text = "mov.b128 %x0, {%b, %a}; st.shared.b128 [%s], %x0; ld.shared.b128 %x1, [%s]; mov.b128 {%r, %q}, %x1;"
    t.form("memory", "mov.b128 st.shared.b128 ld.shared.b128", text, "b64 b64", "b64 b64", n=1024)
    t.form("memory", "mov unpack", "mov.b64 {%r, %q}, %a;", "b64", "b32 b32", n=1024)


def all_forms() -> list[Form]:
    """Every form; names are unique."""
    t = _Table()
    for add in (_floats, _approximations, _comparisons, _conversions, _integers, _video, _warp, _memory):
        add(t)
    return t.forms
