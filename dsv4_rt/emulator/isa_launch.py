"""Translation of clusterlaunchcontrol."""

from __future__ import annotations

from dsv4_rt.emulator import launchcontrol
from dsv4_rt.emulator.codegen import Emitter, Mods, handles
from dsv4_rt.emulator.ir import Instr, Sink, Vector
from dsv4_rt.emulator.isa_async import shared_address

_FIRST = {f"get_first_ctaid::{axis}": i for i, axis in enumerate("xyz")}


@handles("clusterlaunchcontrol")
def _launch_control(e: Emitter, ins: Instr, m: Mods) -> None:
    e.namespace["launchcontrol"] = launchcontrol
    if m.flag("try_cancel"):
        everywhere = m.flag("multicast::cluster::all")
        generic = not m.flag("shared::cta")
        if not m.flag("async") or not m.flag("mbarrier::complete_tx::bytes") or len(ins.args) != 2:
            raise m.refuse()
        to, barrier = (shared_address(e, each, generic) for each in ins.args)
        e.emit(f"launchcontrol.try_cancel(B, {e.lanes}, {ins.line}, {to}, {barrier}, {generic}, {everywhere})")
        return
    kind = m.choose("is_canceled", "get_first_ctaid", *_FIRST)
    m.flag("v4")
    if not m.flag("query_cancel") or not kind or len(ins.args) != 2:
        raise m.refuse()
    e.check_set(ins.args[1], "a response of try_cancel")
    response = e.fill(e.use(ins.args[1], "b128"))
    if kind == "is_canceled":
        e.define(ins.args[0], f"launchcontrol.is_canceled(B, {e.lanes}, {response})", "pred")
        return
    items = ins.args[0].items if isinstance(ins.args[0], Vector) else (ins.args[0],)
    axes = (0, 1, 2) if kind == "get_first_ctaid" else (_FIRST[kind],)
    if len(items) != (4 if len(axes) == 3 else 1):
        raise m.refuse()
    for item, axis in zip(items, axes, strict=False):
        if not isinstance(item, Sink):
            e.define(item, f"launchcontrol.first_ctaid({response}, {axis})", "b32")
    for item in items[len(axes) :]:
        if not isinstance(item, Sink):  # unspecified
            e.define(item, e.number(0, 32), "b32", True)
