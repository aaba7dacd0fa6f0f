"""Translation of the tensor-core instructions: mma.sync, ldmatrix, stmatrix, movmatrix, wgmma."""

from __future__ import annotations

import re

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Instr, Number, Operand, Reg, Vector
from dsv4_rt.emulator.isa_memory import address, space_target
from dsv4_rt.emulator.mma import BYTES
from dsv4_rt.emulator.wgmma import Form

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


_BYTE_SHAPES = {"ldmatrix": ("m16n16", "m8n16"), "stmatrix": ("m16n8",)}
_PACKED = {"b6x16_p32": 6, "b4x16_p64": 4}  # 16 elements of so many bits, padded to 16 bytes


@handles("ldmatrix", "stmatrix")
def _matrix(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("sync", "aligned")
    loads = ins.op == "ldmatrix"
    shape = m.choose("m8n8", *_BYTE_SHAPES[ins.op])
    transpose = m.flag("trans")
    bits = _PACKED.get(m.choose(*_PACKED), 0) if m.flag("b8x16") and loads else 8
    count = int(m.choose("x1", "x2", "x4", default="x0")[1:])
    space = m.choose("shared", "shared::cta", default="generic")
    registers = items(ins.args[0] if loads else ins.args[1])
    if shape == "m8n8":
        known = ins.types == ["b16"] and bits == 8 and len(registers) == count
    else:
        target = e.namespace.get("target", "sm_90a")
        if target.startswith("sm_90"):
            raise m.refuse(f"{ins.name} exists from sm_100a on, not on {target}")
        tall = shape == "m16n16"
        known = ins.types == (["b8"] if bits == 8 else []) and transpose == (shape != "m8n16") and bits > 0
        known = known and (shape != "m8n16" or bits < 8) and count <= (2 if tall else 4)
        known = known and len(registers) == count * (2 if tall else 1)
    if not known or not count:
        raise m.refuse()
    _whole(e, ins)
    where = address(e, ins.args[1] if loads else ins.args[0], space.split("::")[0])
    memory, base = space_target(e, space.split("::")[0])
    common = f"{memory}, B.races, L, {where}, {base}, {ins.line}"
    if loads:
        if shape == "m8n8":
            found = e.temp(f"mma.load_matrices({common}, {count}, {transpose})")
        else:
            found = e.temp(f"mma.load_byte_matrices({common}, {count}, {16 if transpose else 8}, {bits})")
        for i, operand in enumerate(registers):
            e.define(operand, f"{found}[{i}]", "b32")
        return
    values = _names(e, registers, "b32", "a stored value")
    if shape == "m8n8":
        e.emit(f"mma.store_matrices({common}, {values}, {transpose})")
    else:
        e.emit(f"mma.store_byte_matrices({common}, {values})")


@handles("movmatrix")
def _movmatrix(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("sync", "aligned")
    if not (m.flag("m8n8") and m.flag("trans")) or ins.types != ["b16"]:
        raise m.refuse()
    _whole(e, ins)
    e.define(ins.args[0], f"mma.move_matrix({e.fill(e.use(ins.args[1], 'b32'))})", "b32")


_WGMMA = {
    "f16": (16, ("f16", "f32")), "bf16": (16, ("f32",)), "tf32": (8, ("f32",)), "e4m3": (32, ("f16", "f32")),
    "e5m2": (32, ("f16", "f32")),
}  # fmt: skip


@handles("wgmma")
def _wgmma(e: Emitter, ins: Instr, m: Mods) -> None:
    if e.namespace.get("target", "sm_90a") != "sm_90a":
        raise m.refuse(f"{ins.name} exists on sm_90a only, not on {e.namespace['target']}")
    m.flag("sync", "aligned")
    if m.flag("fence"):
        _whole(e, ins)
        e.touched.clear()
        e.after_fence = True
        e.emit("B.warpgroups.fence(L)")
    elif m.flag("commit_group"):
        _whole(e, ins)
        e.emit("B.warpgroups.commit(L)")
    elif m.flag("wait_group"):
        _whole(e, ins)
        (count,) = ins.args
        if not isinstance(count, Number):
            raise m.refuse()
        e.emit(f"B.warpgroups.wait(L, {count.value})")
    elif m.flag("mma_async"):
        _wgmma_issue(e, ins, m)
    else:
        raise m.refuse()


def _wgmma_issue(e: Emitter, ins: Instr, m: Mods) -> None:
    if m.flag("sp"):
        raise m.refuse(f"{ins.name}: sparse matrices are not implemented by the emulator")
    if {"s8", "u8", "b1"} & set(ins.mods):
        raise m.refuse(f"{ins.name}: wgmma on integers is not implemented by the emulator")
    shape = next((each for each in ins.mods if re.fullmatch(r"m64n\d+k\d+", each)), "")
    types = [each for each in ins.mods if each in BYTES]
    if not shape or len(types) != 3:
        raise m.refuse()
    d, a, b = types
    columns, depth = (int(x) for x in re.findall(r"\d+", shape)[1:])
    wanted, accumulators = _WGMMA.get(a, (0, ()))
    group = next((each for each in _GROUPS if a in each), ())
    if depth != wanted or d not in accumulators or b not in group or columns % 8 or not 8 <= columns <= 256:
        raise m.refuse()
    m.left = [each for each in m.left if each not in BYTES and each != shape]
    accumulator, left, right, scale, *immediates = ins.args
    values = [each.value for each in immediates if isinstance(each, Number)]
    from_registers = isinstance(left, Vector)
    majors = 0 if BYTES[a] != 2 else 1 if from_registers else 2
    if len(values) != len(immediates) or len(values) != 2 + majors or not {*values[:2]} <= {1, -1}:
        raise m.refuse(f"{ins.name}: {2 + majors} immediates are wanted: imm-scale-a, imm-scale-b of 1 or -1, majors")
    mn_major = ([0, 0] + values[2:])[-2:]
    if from_registers:
        mn_major[0] = 0
    slots = [items(accumulator), items(left) if from_registers else []]
    if len(slots[0]) * 4 * 128 != 64 * columns * BYTES[d] or (from_registers and len(slots[1]) != 4):
        raise m.refuse(f"{ins.name}: the wrong number of registers in a list")
    registers = [[each for each in part if isinstance(each, Reg)] for part in slots]
    if any(len(part) != len(regs) or len(set(regs)) != len(regs) for part, regs in zip(slots, registers, strict=True)):
        raise m.refuse(f"{ins.name}: an operand list that is not of distinct registers")
    for reg in registers[1]:
        e.check_set(reg, "an A fragment of wgmma")
    names = tuple(reg.name for part in registers for reg in part)
    descriptors = ["None" if from_registers else e.fill(e.use(left, "b64")), e.fill(e.use(right, "b64"))]
    predicate = e.fill(e.use(scale, "pred"))
    assert not {*registers[0], *registers[1]} & set(e.env)  # the block begins here: they are where blocks keep them
    form = f"f{len(e.namespace)}"
    negative = values[0] * values[1] < 0
    e.namespace[form] = Form(columns, depth, (a, b, d), negative, bool(mn_major[0]), bool(mn_major[1]))
    where = [e.constant_array([e.layout.slots[reg] for reg in part]) for part in registers]
    e.emit(
        f"B.warpgroups.issue(L, R, {ins.line}, {form}, {names}, {where[0]}, {where[1]}, {', '.join(descriptors)}, "
        f"{predicate})"
    )
    e.now_set(registers[0])
