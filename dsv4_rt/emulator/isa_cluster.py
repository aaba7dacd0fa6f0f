"""Translation of what only clusters have: mapa, getctarank and the cluster barrier."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Operand, Sym
from dsv4_rt.emulator.isa_arith import result

_SHARED = "shared::cluster"


def rank_bits(e: Emitter) -> str:
    """The rank of each lane's CTA, in place in an address."""
    return f"B.rank_bits[{e.lanes}]" if e.guarded or not e.full else "B.rank_bits"


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


def cluster_barrier(e: Emitter, ins: Instr, m: Mods) -> None:
    """barrier.cluster: waiting is the scheduler's; all orders are kept, memory is sequentially consistent."""
    m.flag("cluster", "aligned")
    kind = m.choose("arrive", "wait")
    order = m.choose("release", "acquire", "relaxed")
    if not kind or order == ("acquire" if kind == "arrive" else "release") or (kind == "wait" and order == "relaxed"):
        raise m.refuse()
    if kind == "arrive":
        e.emit(f"B.cluster_arrive({e.lanes})")
