"""Translation of tcgen05: allocation, ld, st, wait, mma, cp, commit, fences."""

from __future__ import annotations

from dsv4_rt.emulator import wide
from dsv4_rt.emulator.block_scale import VECTORS
from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Number, Operand
from dsv4_rt.emulator.isa_async import shared_address
from dsv4_rt.emulator.isa_group import is_wide, wide_mma
from dsv4_rt.emulator.isa_memory import address
from dsv4_rt.emulator.isa_mma import items
from dsv4_rt.emulator.tcgen05_cp import SHAPES, SOURCES
from dsv4_rt.emulator.tmem import REGISTERS

_SHARED = ("shared", "shared::cta", "shared::cluster")
_KINDS = {f"kind::{kind}": kind for kind in ("f16", "tf32", "f8f6f4")}
_SCALED = {f"kind::{kind}": kind for kind in VECTORS}


@handles("tcgen05")
def _tcgen05(e: Emitter, ins: Instr, m: Mods) -> None:
    if not e.namespace.get("target", "sm_100a").startswith(("sm_100", "sm_103")):
        raise m.refuse(f"{ins.name} exists on sm_100 and sm_103 only, not on {e.namespace['target']}")
    paired = m.choose("cta_group::1", "cta_group::2") == "cta_group::2"
    if m.flag("sync"):
        m.flag("aligned")
        if not e.dense:
            e.emit(f"mma.whole_warps(L, {ins.name!r})")
    kind = m.choose(
        "alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st", "mma", "cp", "commit",
        "fence::before_thread_sync", "fence::after_thread_sync",
    )  # fmt: skip
    if kind == "alloc":
        generic = not m.flag(*_SHARED)
        where, count = shared_address(e, ins.args[0], generic), e.fill(e.use(ins.args[1], "u32"))
        e.emit(f"B.tmem.alloc(L, {ins.line}, {where}, {generic}, {count}, {paired})")
    elif kind == "dealloc":
        e.check_set(ins.args[0], "an address")
        where, count = e.fill(e.use(ins.args[0], "b32")), e.fill(e.use(ins.args[1], "u32"))
        e.emit(f"B.tmem.dealloc(L, {where}, {count}, {ins.line}, {paired})")
    elif kind == "relinquish_alloc_permit":
        e.emit(f"B.tmem.relinquish(L, {ins.line})")
    elif kind in ("ld", "st"):
        _move(e, ins, m, kind == "ld")
    elif kind in ("wait::ld", "wait::st"):
        e.emit(f"B.tmem.wait(L, {kind[-2:]!r})")
    elif kind.startswith("fence::"):
        e.emit(f"B.tmem.fence({e.lanes}, {kind[7:].split('_')[0]!r})")
    elif kind == "mma" and is_wide(ins):
        wide_mma(e, ins, m, paired)
    elif kind == "mma":
        _mma(e, ins, m, paired)
    elif kind == "cp":
        _copy(e, ins, m, 2 if paired else 1)
    elif kind == "commit":
        m.flag("mbarrier::arrive::one")
        generic = not m.flag(*_SHARED)
        masks = e.use(ins.args[1], "b16") if m.flag("multicast::cluster") else "None"
        where = shared_address(e, ins.args[0], generic)
        e.emit(f"B.tensor_cores.commit({e.lanes}, {ins.line}, {where}, {generic}, {masks}, {paired})")
    elif not kind:
        raise m.refuse()


def _move(e: Emitter, ins: Instr, m: Mods, loads: bool) -> None:
    """ld and st: the registers of a warp and the cells of its quarter."""
    shape = m.choose(*REGISTERS)
    repeat = m.choose(*(f"x{1 << i}" for i in range(8)))
    if not shape or not repeat or ins.types != ["b32"]:
        raise m.refuse()
    packed = m.flag("pack::16b" if loads else "unpack::16b")
    to, *rest = ins.args if loads else (ins.args[1], ins.args[0], *ins.args[2:])
    if not loads and shape == "16x32bx2":  # the split stands between the address and the registers
        to, rest = ins.args[2], [ins.args[0], ins.args[1]]
    registers, split = items(to), 0
    if shape == "16x32bx2":
        if len(rest) != 2 or not isinstance(rest[1], Number):
            raise m.refuse(f"{ins.name}: an immediate is wanted that says how far apart the two halves lie")
        split = rest[1].value
    count = REGISTERS[shape] * int(repeat[1:])
    if len(registers) != count or count > 128:
        raise m.refuse(f"{ins.name}: {len(registers)} registers; {count} are wanted, 128 at most")
    common = f"L, {ins.line}, {address(e, rest[0], 'shared')}, {shape!r}, {count}, {split}"
    if loads:
        found = e.temp(f"B.tmem.load({common}, {packed})")
        for i, operand in enumerate(registers):
            e.define(operand, f"{found}[{i}]", "b32")
        return
    for each in registers:
        e.check_set(each, "a stored value")
    names = ", ".join(e.fill(e.use(each, "b32")) for each in registers)
    e.emit(f"B.tmem.store({common}, [{names}], {packed})")


def _mma(e: Emitter, ins: Instr, m: Mods, paired: bool) -> None:
    """mma: B in shared memory, A there or in tensor memory, accumulator and scale factors in tensor memory."""
    if m.flag("sp"):
        raise m.refuse(f"{ins.name}: sparse matrices are not implemented by the emulator")
    kinds = _SCALED if m.flag("block_scale") else _KINDS
    kind = kinds.get(m.choose(*kinds))
    if not kind:
        raise m.refuse()
    m.flag("collector::a::discard", "collector::a::lastuse", "collector::a::fill", "collector::a::use")
    if kinds is _SCALED:
        _scaled_mma(e, ins, m, kind, paired)
        return
    if len(ins.args) != 5:
        raise m.refuse()
    d, a, b, form, add = ins.args
    operands = _factors(e, d, a, b, form, add)
    e.emit(f"B.tensor_cores.mma({e.lanes}, {ins.line}, {kind!r}, {operands})")


def _factors(e: Emitter, d: Operand, a: Operand, b: Operand, form: Operand, add: Operand) -> str:
    """The operands that every product has, and whether A is in tensor memory."""
    from_tmem = isinstance(a, Address)
    for each in (b, form, add) if from_tmem else (a, b, form, add):
        e.check_set(each, "an operand of tcgen05.mma")
    where = address(e, d, "shared")
    left = address(e, a, "shared") if from_tmem else e.use(a, "b64")
    operands = [where, left, e.use(b, "b64"), e.use(form, "b32"), e.use(add, "pred")]
    return f"{', '.join(operands)}, {from_tmem}"


def _scaled_mma(e: Emitter, ins: Instr, m: Mods, kind: str, paired: bool) -> None:
    """mma with block scales: their addresses stand before the predicate."""
    sizes = VECTORS[kind]
    vector = sizes.get(m.choose("scale_vec::1X", "scale_vec::2X", "scale_vec::4X", "block16", "block32"))
    if not vector:
        raise m.refuse(f"{ins.name}: kind::{kind} takes {', '.join(f'.{each}' for each in sizes if each)}")
    if len(ins.args) != 7:
        raise m.refuse(f"{ins.name}: {len(ins.args)} operands; a block-scaled product has 7")
    d, a, b, form, scale_a, scale_b, add = ins.args
    operands = _factors(e, d, a, b, form, add)
    scales = ", ".join(address(e, each, "shared") for each in (scale_a, scale_b))
    if paired:
        e.namespace["wide"] = wide
        e.emit(f"wide.scaled_mma(B, {e.lanes}, {ins.line}, {kind!r}, {operands}, {vector}, ({scales}))")
    else:
        e.emit(f"B.tensor_cores.mma({e.lanes}, {ins.line}, {kind!r}, {operands}, {vector}, ({scales}))")


def _copy(e: Emitter, ins: Instr, m: Mods, group: int) -> None:
    """cp: a descriptor in shared memory, an address in tensor memory."""
    shape = m.choose(*{each.split(".")[0] for each in SHAPES})
    multicast = m.choose("warpx2::02_13", "warpx2::01_23", "warpx4")
    shape = f"{shape}.{multicast}" if multicast else shape
    expanded, source = m.flag("b8x16"), m.choose(*SOURCES)
    if shape not in SHAPES or expanded != bool(source):
        raise m.refuse()
    e.check_set(ins.args[1], "an operand of tcgen05.cp")
    where, word = address(e, ins.args[0], "shared"), e.use(ins.args[1], "b64")
    e.emit(f"tcgen05_cp.copy(B.tensor_cores, {e.lanes}, {ins.line}, {shape!r}, {source!r}, {where}, {word}, {group})")
