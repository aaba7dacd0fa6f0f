"""Translation of the tensor-core instructions: mma.sync, ldmatrix, stmatrix, movmatrix."""

from __future__ import annotations

import re

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Instr, Operand, Vector
from dsv4_rt.emulator.isa_memory import _base, address
from dsv4_rt.emulator.mma import BYTES

_FLOAT_SHAPES = {
    "f16": ("m16n8k8", "m16n8k16"), "bf16": ("m16n8k8", "m16n8k16"), "tf32": ("m16n8k4", "m16n8k8"),
    "e4m3": ("m16n8k16", "m16n8k32"), "e5m2": ("m16n8k16", "m16n8k32"),
    "s8": ("m8n8k16", "m16n8k16", "m16n8k32"), "u8": ("m8n8k16", "m16n8k16", "m16n8k32"),
    "f64": ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"),
}  # fmt: skip
_GROUPS = (("f16",), ("bf16",), ("tf32",), ("e4m3", "e5m2"), ("s8", "u8"), ("f64",))
_ACCUMULATORS = {
    "f16": ("f16", "f32"), "bf16": ("f32",), "tf32": ("f32",), "e4m3": ("f16", "f32"), "e5m2": ("f16", "f32"),
    "s8": ("s32",), "u8": ("s32",), "f64": ("f64",),
}  # fmt: skip


def items(operand: Operand) -> list[Operand]:
    """The registers of a brace list; a list of one may stand without braces."""
    return list(operand.items) if isinstance(operand, Vector) else [operand]


def _names(e: Emitter, operands: list[Operand], ty: str, use: str) -> str:
    for each in operands:
        e.check_set(each, use)
    return "[" + ", ".join(e.fill(e.use(each, ty)) for each in operands) + "]"


def _whole(e: Emitter, ins: Instr) -> None:
    if not e.dense:
        e.emit(f"mma.whole_warps(L, {ins.name!r})")


@handles("mma")
def _mma(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("sync", "aligned")
    saturate = m.flag("satfinite")
    shape, (d, a, b, c) = element_types(ins, m)
    row, column = m.flag("row"), m.flag("col")
    group = next((each for each in _GROUPS if a in each), ())
    if not (row and column) or shape not in _FLOAT_SHAPES.get(a, ()) or b not in group or d != c:
        raise m.refuse()
    if c not in _ACCUMULATORS[a] or (saturate and c != "s32"):
        raise m.refuse()
    m.left = [each for each in m.left if each not in BYTES and each != shape]
    sizes = tuple(int(x) for x in re.findall(r"\d+", shape))
    width = "b64" if a == "f64" else "b32"
    lists = [items(each) for each in ins.args]
    registers = 64 // 8 if a == "f64" else 4
    rows, columns, depth = sizes
    wanted = [rows * columns * BYTES[c], rows * depth * BYTES[a], columns * depth * BYTES[b], rows * columns * BYTES[c]]
    for operands, size in zip(lists, wanted, strict=True):
        if len(operands) * 32 * registers != size:
            raise m.refuse(f"{ins.name}: an operand of {len(operands)} registers; {size // 32 // registers} are wanted")
    _whole(e, ins)
    names = [_names(e, operands, width, "a factor or accumulator of mma") for operands in lists[1:]]
    found = e.temp(f"mma.warp_mma({sizes}, {(a, b, c)}, {', '.join(names)}, n, {saturate})")
    for i, operand in enumerate(lists[0]):
        e.define(operand, f"{found}[{i}]", width)


def element_types(ins: Instr, m: Mods) -> tuple[str, tuple[str, str, str, str]]:
    """(shape, types of d, a, b, c) from the modifiers in their order."""
    shape = next((each for each in ins.mods if re.fullmatch(r"m\d+n\d+k\d+", each)), "")
    types = [each for each in ins.mods if each in BYTES]
    if not shape or len(types) != 4:
        raise m.refuse()
    return shape, (types[0], types[1], types[2], types[3])


@handles("ldmatrix", "stmatrix")
def _matrix(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("sync", "aligned", "m8n8")
    if "m8n8" not in ins.mods or ins.types != ["b16"]:
        raise m.refuse()
    transpose = m.flag("trans")
    count = int(m.choose("x1", "x2", "x4", default="x0")[1:])
    space = m.choose("shared", "shared::cta", default="generic")
    loads = ins.op == "ldmatrix"
    registers = items(ins.args[0] if loads else ins.args[1])
    if len(registers) != count:
        raise m.refuse()
    _whole(e, ins)
    where = address(e, ins.args[1] if loads else ins.args[0], space.split("::")[0])
    lanes = "" if e.full else "[L]"
    memory, base = "B.shared", _base(e, f"B.shared_base{lanes}")
    if space == "generic":
        memory, base = "B.generic", f"({base}, {_base(e, f'B.local_base{lanes}')})"
    common = f"{memory}, B.races, L, {where}, {base}, {ins.line}"
    if loads:
        found = e.temp(f"mma.load_matrices({common}, {count}, {transpose})")
        for i, operand in enumerate(registers):
            e.define(operand, f"{found}[{i}]", "b32")
        return
    e.emit(f"mma.store_matrices({common}, {_names(e, registers, 'b32', 'a stored value')}, {transpose})")


@handles("movmatrix")
def _movmatrix(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("sync", "aligned")
    if not (m.flag("m8n8") and m.flag("trans")) or ins.types != ["b16"]:
        raise m.refuse()
    _whole(e, ins)
    e.define(ins.args[0], f"mma.move_matrix({e.fill(e.use(ins.args[1], 'b32'))})", "b32")
