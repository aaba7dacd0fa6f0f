"""Translation of the tensor copies of TMA and of tensormap.*"""

from __future__ import annotations

from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Number, Operand, Vector
from dsv4_rt.emulator.isa_memory import address, space_target, touch
from dsv4_rt.emulator.tma import REDUCTIONS
from dsv4_rt.errors import EmulatorError

_DIMENSIONS = ("1d", "2d", "3d", "4d", "5d")
_FIELDS = (
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
    "interleave_layout", "swizzle_mode", "fill_mode",
)  # fmt: skip


def _tensor(e: Emitter, operand: Operand, rank: int) -> str:
    """The arguments `map address, (coordinates)` of `[map, {c0, c1}]`."""
    if not isinstance(operand, Address) or len(operand.extra) != 1:
        raise EmulatorError(f"PTX line {e.ins.line if e.ins else 0}: [tensorMap, {{coordinates}}] is wanted")
    listed = operand.extra[0]
    items = listed.items if isinstance(listed, Vector) else (listed,)
    if len(items) != rank:
        raise EmulatorError(f"PTX line {e.ins.line if e.ins else 0}: {len(items)} coordinates for {rank} dimensions")
    for item in items:
        e.check_set(item, "a coordinate")
    coords = "".join(f"{e.fill(e.use(item, 'b32'))}, " for item in items)
    return f"{address(e, Address(operand.base, operand.offset), 'generic')}, ({coords})"


@handles("cp.async.bulk.tensor")
def _copy(e: Emitter, ins: Instr, m: Mods) -> None:
    """All forms of cp.*.tensor in tile mode."""
    for mod in ins.mods:
        if mod.startswith(("im2col", "tile::")):
            raise m.refuse(f"modifier .{mod} of {ins.name} is not implemented by the emulator")
    m.flag("async", "bulk", "tensor", "tile")
    dimension = m.choose(*_DIMENSIONS)
    if not dimension:
        raise m.refuse()
    rank, args = int(dimension[0]), ins.args
    hinted = m.flag("L2::cache_hint")
    reduces = m.flag("reduce")
    op = m.choose(*REDUCTIONS) if reduces else ""
    group = m.flag("bulk_group")
    spaces = [each for each in ins.mods if each == "global" or each.startswith("shared")]
    m.flag(*spaces)
    if m.flag("prefetch"):
        m.flag("L2")
        if spaces != ["global"] or len(args) != 1 + hinted:
            raise m.refuse()
        e.emit(f"tma.prefetch(B, {e.lanes}, {_tensor(e, args[0], rank)})")
    elif spaces == ["global", "shared::cta"] and group and bool(op) == reduces:
        if len(args) != 2 + hinted:
            raise m.refuse()
        source = address(e, args[1], "shared")
        e.emit(f"tma.store(B, {e.lanes}, {ins.line}, {source}, {_tensor(e, args[0], rank)}, {op!r})")
    elif spaces in (["shared::cluster", "global"], ["shared::cta", "global"]) and not reduces:
        multicast = m.flag("multicast::cluster")
        paired = m.choose("cta_group::1", "cta_group::2") == "cta_group::2"
        if not m.flag("mbarrier::complete_tx::bytes") or len(args) != 3 + multicast + hinted:
            raise m.refuse()
        to, barrier = address(e, args[0], "shared"), address(e, args[2], "shared")
        masks = e.fill(e.use(args[3], "b16")) if multicast else "None"
        e.emit(f"tma.load(B, {e.lanes}, {ins.line}, {to}, {barrier}, {_tensor(e, args[1], rank)}, {masks}, {paired})")
    else:
        raise m.refuse()


@handles("tensormap")
def _tensormap(e: Emitter, ins: Instr, m: Mods) -> None:
    if m.flag("cp_fenceproxy"):
        m.flag("global", "shared::cta", "tensormap::generic", "release", "sync", "aligned")
        m.flag("cta", "cluster", "gpu", "sys")
        to, source = address(e, ins.args[0], "global"), address(e, ins.args[1], "shared")
        touch(e, ins, "shared")
        pairs = [space_target(e, space) for space in ("shared", "global")]
        (name, base), (to_name, to_base) = pairs
        e.emit(f"tma.copy_map({name}, {source}, {base}, {to_name}, {to}, {to_base})")
        return
    if not m.flag("replace"):
        raise m.refuse()
    m.flag("tile", "b1024")
    field = m.choose(*_FIELDS)
    space = m.choose("global", "shared::cta", default="generic").split("::")[0]
    if not field or len(ins.args) != 2 + (field in ("box_dim", "global_dim", "global_stride", "element_stride")):
        raise m.refuse()
    axis = ins.args[1] if len(ins.args) == 3 else Number(0)
    if not isinstance(axis, Number):
        raise m.refuse()
    where, value = address(e, ins.args[0], space), e.use(ins.args[-1], m.types[-1])
    touch(e, ins, space)
    name, base = space_target(e, space)
    e.emit(f"tma.replace({name}, {where}, {base}, {field!r}, {axis.value}, {value})")
