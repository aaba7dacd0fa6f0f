"""Translation of tcgen05: allocation, ld, st, wait, mma, commit, fences."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Number, Vector
from dsv4_rt.emulator.isa_async import shared_address
from dsv4_rt.emulator.isa_group import is_wide, wide_mma
from dsv4_rt.emulator.isa_memory import address
from dsv4_rt.emulator.isa_mma import items
from dsv4_rt.emulator.tmem import REGISTERS

_SHARED = ("shared", "shared::cta", "shared::cluster")
_KINDS = {f"kind::{kind}": kind for kind in ("f16", "tf32", "f8f6f4")}


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
        "alloc", "dealloc", "relinquish_alloc_permit", "ld", "st", "wait::ld", "wait::st", "mma", "commit",
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
    elif kind == "mma" and is_wide(ins):
        wide_mma(e, ins, m, paired)
    elif kind == "mma":
        _mma(e, ins, m)
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
        found = e.temp(f"B.tmem.load({common})")
        for i, operand in enumerate(registers):
            e.define(operand, f"{found}[{i}]", "b32")
        return
    for each in registers:
        e.check_set(each, "a stored value")
    names = ", ".join(e.fill(e.use(each, "b32")) for each in registers)
    e.emit(f"B.tmem.store({common}, [{names}])")


def _mma(e: Emitter, ins: Instr, m: Mods) -> None:
    """mma: B in shared memory, A there or in tensor memory, accumulator in tensor memory."""
    for mod, what in (("ws", "weight-stationary products"), ("sp", "sparse matrices"), ("block_scale", "block scales")):
        if m.flag(mod):
            raise m.refuse(f"{ins.name}: {what} are not implemented by the emulator")
    kind = m.choose(*_KINDS)
    if not kind:
        raise m.refuse()
    m.flag("collector::a::discard", "collector::a::lastuse", "collector::a::fill", "collector::a::use")
    if any(isinstance(each, Vector) for each in ins.args):
        raise m.refuse(f"{ins.name}: a disable-output-lane mask is not implemented by the emulator")
    if len(ins.args) != 5:
        raise m.refuse(f"{ins.name}: scale-input-d is not implemented by the emulator")
    d, a, b, form, add = ins.args
    from_tmem = isinstance(a, Address)
    for each in (b, form, add) if from_tmem else (a, b, form, add):
        e.check_set(each, "an operand of tcgen05.mma")
    where = address(e, d, "shared")
    left = address(e, a, "shared") if from_tmem else e.use(a, "b64")
    operands = [left, e.use(b, "b64"), e.use(form, "b32"), e.use(add, "pred")]
    e.emit(f"B.tensor_cores.mma({e.lanes}, {ins.line}, {_KINDS[kind]!r}, {where}, {', '.join(operands)}, {from_tmem})")
