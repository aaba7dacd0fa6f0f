"""Translation of what only clusters have: mapa, getctarank, the cluster barrier, st.async and red.async."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import TYPES, Address, Instr, Operand, Sym, Vector
from dsv4_rt.emulator.isa_arith import result
from dsv4_rt.emulator.isa_memory import address

_SHARED = "shared::cluster"
_REDUCTIONS = {
    "add": ("u32", "s32", "u64"), **dict.fromkeys(("min", "max"), ("u32", "s32")), "inc": ("u32",), "dec": ("u32",),
    **dict.fromkeys(("and", "or", "xor"), ("b32",)),
}  # fmt: skip


def _shared_address(operand: Operand) -> Operand:
    """mapa takes a register, or a variable with an offset, with or without brackets."""
    if isinstance(operand, Address):
        base = operand.base
        return Sym(base.name, operand.offset, base.var) if isinstance(base, Sym) else base
    return operand


@handles("mapa")
def _mapa(e: Emitter, ins: Instr, m: Mods) -> None:
    """The address with the same offset in the CTA of another rank."""
    space, ty = m.flag(_SHARED), m.types[-1]
    address, rank = e.use(_shared_address(ins.args[1]), ty), e.use(ins.args[2], "u32")
    if not space and isinstance(ins.args[1], Sym):
        raise m.refuse(f"{ins.name} of a variable's name is not implemented by the emulator")
    result(e, ins.args[0], ty, "clusters.map_address({}, {})", address, rank)


@handles("getctarank")
def _getctarank(e: Emitter, ins: Instr, m: Mods) -> None:
    """The rank of the CTA that owns an address."""
    m.flag(_SHARED)
    result(e, ins.args[0], "u32", "clusters.rank_of({})", e.use(_shared_address(ins.args[1]), m.types[-1]))


@handles("barrier.cluster")
def _barrier(e: Emitter, ins: Instr, m: Mods) -> None:
    """barrier.cluster: waiting is the scheduler's; all orders are kept, memory is sequentially consistent."""
    m.flag("cluster", "aligned")
    kind = m.choose("arrive", "wait")
    order = m.choose("release", "acquire", "relaxed")
    if not kind or order == ("acquire" if kind == "arrive" else "release") or (kind == "wait" and order == "relaxed"):
        raise m.refuse()
    if kind == "arrive":
        e.emit(f"B.cluster_barrier().arrive({e.lanes})")


@handles("st.async")
def _store_async(e: Emitter, ins: Instr, m: Mods) -> None:
    """st.async and red.async: each lane's own asynchronous operation, which reports to an mbarrier."""
    m.flag("async", "weak", "relaxed", "cluster", _SHARED)
    op = m.choose(*_REDUCTIONS) if ins.op == "red" else ""
    ty, many = m.types[-1], m.choose("v2", "v4")
    legal = _REDUCTIONS.get(op, ()) if ins.op == "red" else ("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64")
    if not m.flag("mbarrier::complete_tx::bytes") or ty not in legal or (ins.op == "red" and many):
        raise m.refuse()
    items: list[Operand] = list(ins.args[1].items) if isinstance(ins.args[1], Vector) else [ins.args[1]]
    if len(items) != int(many[1:] or 1):
        raise m.refuse()
    for item in items:
        e.check_set(item, "a stored value")
    to, barrier = address(e, ins.args[0], "shared"), address(e, ins.args[2], "shared")
    values = "".join(f"{e.fill(e.use(item, ty))}, " for item in items)
    size = TYPES[ty][0] // 8 * len(items)
    e.emit(f"remote.store_async(B, {e.lanes}, {ins.line}, {to}, {barrier}, ({values}), {size}, {op!r}, {ty!r})")
