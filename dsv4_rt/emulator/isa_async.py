"""Translation of asynchronous copies, mbarriers and proxy fences."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import HANDLERS, Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Sink
from dsv4_rt.emulator.isa_memory import address

_SHARED = ("shared", "shared::cta", "shared::cluster")
_HINTS = ("L2::cache_hint",)


def shared_address(e: Emitter, operand: object, generic: bool) -> str:
    """A lane-shaped array of addresses in shared::cta, shared::cluster or generic space."""
    assert isinstance(operand, Address)
    return address(e, operand, "generic" if generic else "shared")


@handles("mbarrier")
def _mbarrier(e: Emitter, ins: Instr, m: Mods) -> None:
    kind = m.choose("init", "inval", "arrive", "arrive_drop", "complete_tx", "test_wait", "try_wait", "pending_count")
    expects = m.flag("expect_tx")
    kind = kind or "expect_tx"
    m.flag("relaxed", "release", "acquire", "cta", "cluster")
    generic = not m.flag(*_SHARED)
    args = list(ins.args)
    if kind == "pending_count":
        e.define(args[0], f"B.mbarriers.pending_count({e.use(args[1], 'b64')})", "u32")
    elif kind == "init":
        where, count = shared_address(e, args[0], generic), e.use(args[1], "u32")
        e.emit(f"B.mbarriers.init({e.lanes}, {ins.line}, {where}, {generic}, {count})")
    elif kind == "inval":
        e.emit(f"B.mbarriers.inval({e.lanes}, {ins.line}, {shared_address(e, args[0], generic)}, {generic})")
    elif kind in ("expect_tx", "complete_tx"):
        where, tx = shared_address(e, args[0], generic), e.use(args[1], "u32")
        sign = ", -1" if kind == "complete_tx" else ""
        e.emit(f"B.mbarriers.expect_tx({e.lanes}, {where}, {generic}, {tx}{sign})")
    elif kind in ("arrive", "arrive_drop"):
        partial = m.flag("noComplete")
        state = Sink() if isinstance(args[0], Address) else args.pop(0)
        where = shared_address(e, args[0], generic)
        operand = e.use(args[1], "u32") if len(args) > 1 else "None"
        count, tx = ("None", operand) if expects else (operand, "None")
        flags = f"{kind == 'arrive_drop'}, {not partial}"
        e.define(state, f"B.mbarriers.arrive({e.lanes}, {where}, {generic}, {count}, {tx}, {flags})", "b64")
    elif kind in ("test_wait", "try_wait"):
        parity = m.flag("parity")
        where = shared_address(e, args[1], generic)
        value = e.use(args[2], "u32" if parity else "b64")
        e.define(args[0], f"B.mbarriers.test({e.lanes}, {where}, {generic}, {value}, {parity}, {ins.name!r})", "pred")
    else:
        raise m.refuse()


@handles("cp")
def _copy(e: Emitter, ins: Instr, m: Mods) -> None:
    """cp.async and cp.reduce.async in all forms; those on tensors are registered as cp.async.bulk.tensor."""
    if "tensor" in ins.mods:
        handler = HANDLERS.get("cp.async.bulk.tensor")
        if handler is None:
            raise m.refuse()
        handler(e, ins, m)
    elif "bulk" in ins.mods and "async" in ins.mods:
        _bulk(e, ins, m)
    else:
        raise m.refuse()


def _bulk(e: Emitter, ins: Instr, m: Mods) -> None:
    m.flag("async", "bulk")
    hinted = m.flag(*_HINTS)
    spaces = [each for each in ins.mods if each in (*_SHARED, "global")]
    m.flag(*_SHARED, "global")
    if spaces in (["shared::cluster", "global"], ["shared::cta", "global"]) and m.flag("mbarrier::complete_tx::bytes"):
        multicast = m.flag("multicast::cluster")
        to, source, size, barrier, *rest = ins.args
        names = [shared_address(e, to, False), address_of_global(e, source), e.use(size, "u32")]
        names.append(shared_address(e, barrier, False))
        masks = e.fill(e.use(rest[0], "b16")) if multicast else "None"
        if len(rest) != multicast + hinted:
            raise m.refuse()
        e.emit(f"copies.bulk_load(B, {e.lanes}, {ins.line}, {', '.join(names)}, False, {masks})")
    else:
        raise m.refuse()


def address_of_global(e: Emitter, operand: object) -> str:
    assert isinstance(operand, Address)
    return address(e, operand, "global")


@handles("fence", "membar")
def _fence(e: Emitter, ins: Instr, m: Mods) -> None:
    """Memory is sequentially consistent here; fences order accesses for the checks of races and proxies."""
    proxy = m.flag("proxy")
    kind = m.choose("alias", "async", "async::generic", "tensormap::generic", "mbarrier_init")
    m.flag("sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl")
    m.flag("sync_restrict::shared::cta", "sync_restrict::shared::cluster", *_SHARED, "global")
    if proxy == (kind in ("", "mbarrier_init")):
        raise m.refuse()
    if kind.startswith("async"):
        if "global" not in ins.mods:
            e.emit(f"B.engine.flight.fence({e.lanes})")
    elif kind in ("", "mbarrier_init"):
        e.emit(f"B.races.fence({e.lanes})")
