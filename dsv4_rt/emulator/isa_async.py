"""Translation of asynchronous copies, mbarriers and proxy fences."""

from __future__ import annotations

from dsv4_rt.emulator.codegen import HANDLERS, Emitter, Mods, handles
from dsv4_rt.emulator.ir import Address, Instr, Number, Reg, Sink
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
        return
    m.flag("async")
    if m.flag("commit_group"):
        group = "bulk" if m.flag("bulk") else "cp.async"
        e.emit(f"B.engine.commit({group!r}, {e.lanes})")
    elif m.flag("wait_group"):
        group, count = "bulk" if m.flag("bulk") else "cp.async", ins.args[0]
        if not isinstance(count, Number):
            raise m.refuse()
        e.emit(f"B.engine.wait_group({group!r}, {e.lanes}, {count.value}, {m.flag('read')})")
    elif m.flag("wait_all"):
        e.emit(f"B.engine.wait_all('cp.async', {e.lanes})")
    elif m.flag("mbarrier"):
        m.flag("arrive")
        counted, generic = not m.flag("noinc"), not m.flag(*_SHARED)
        where = shared_address(e, ins.args[0], generic)
        e.emit(f"copies.arrive_after_copies(B, {e.lanes}, {ins.line}, {where}, {generic}, {counted})")
    elif m.flag("bulk"):
        _bulk(e, ins, m)
    else:
        _small(e, ins, m)


def _small(e: Emitter, ins: Instr, m: Mods) -> None:
    """cp.async of 4, 8 or 16 bytes."""
    m.flag("ca", "cg", "global", "L2::64B", "L2::128B", "L2::256B")
    hinted = m.flag(*_HINTS)
    generic = not m.flag(*_SHARED)
    to, source, size, *rest = ins.args
    if hinted:
        rest.pop()
    if not isinstance(size, Number) or size.value not in ((16,) if "cg" in ins.mods else (4, 8, 16)) or len(rest) > 1:
        raise m.refuse()
    names = [shared_address(e, to, generic), str(generic), address_of_global(e, source), str(size.value)]
    valid = "None"
    if rest and isinstance(rest[0], Reg) and rest[0].bits == 1:  # ignore-src
        valid = e.temp(f"where({e.use(rest[0], 'pred')}, U32(0), U32({size.value}))")
    elif rest:
        valid = e.use(rest[0], "u32")
    e.emit(f"copies.copy_async(B, {e.lanes}, {ins.line}, {', '.join(names)}, {valid})")


_REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "f16", "bf16"), "inc": ("u32",), "dec": ("u32",),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16"), "max": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"),
}  # fmt: skip
_IN_CLUSTER = ("u32", "s32", "u64", "b32")


def _bulk(e: Emitter, ins: Instr, m: Mods) -> None:
    """Bulk copies and reductions: the order of the two spaces says which way."""
    hinted = m.flag(*_HINTS)
    spaces = tuple(each.removesuffix("::cta") for each in ins.mods if each in (*_SHARED, "global"))
    m.flag(*_SHARED, "global")
    op, ty = "", ""
    if m.flag("reduce"):
        m.flag("noftz")
        op, ty = m.choose(*_REDUCTIONS), m.types[-1]
        if ty not in _REDUCTIONS.get(op, ()) or (ty in ("f16", "bf16") and op == "add" and "noftz" not in ins.mods):
            raise m.refuse()
    tail = f", op={op!r}, ty={ty!r})" if op else ")"
    args = ins.args[: len(ins.args) - hinted]
    start = f"(B, {e.lanes}, {ins.line}, "
    if m.flag("prefetch"):
        m.flag("L2")
        e.emit(f"copies.prefetch({e.lanes}, {address_of_global(e, args[0])}, {e.use(args[1], 'u32')})")
    elif spaces == ("global", "shared"):
        m.flag("bulk_group")
        masked = m.flag("cp_mask")
        if masked:  # the byte mask follows the cache policy
            args = [*ins.args[:3], ins.args[-1]]
        names = [address_of_global(e, args[0]), shared_address(e, args[1], False), e.use(args[2], "u32")]
        names.append(e.use(args[3], "b16") if masked else "None")
        e.emit(f"copies.bulk_store{start}{', '.join(names)}{tail}")
    elif spaces[1:] == ("global",) and not op:
        m.flag("mbarrier::complete_tx::bytes")
        masks = e.use(args[4], "b16") if m.flag("multicast::cluster") else "None"
        names = [shared_address(e, args[0], False), address_of_global(e, args[1]), e.use(args[2], "u32")]
        e.emit(f"copies.bulk_load{start}{', '.join(names)}, {shared_address(e, args[3], False)}, {masks})")
    elif spaces == ("shared::cluster", "shared") and (not op or (ty in _IN_CLUSTER and (op, ty) != ("add", "b32"))):
        m.flag("mbarrier::complete_tx::bytes")
        names = [shared_address(e, args[0], False), shared_address(e, args[1], False), e.use(args[2], "u32")]
        e.emit(f"copies.bulk_remote{start}{', '.join(names)}, {shared_address(e, args[3], False)}{tail}")
    else:
        raise m.refuse()


def address_of_global(e: Emitter, operand: object) -> str:
    """A lane-shaped array of addresses in global memory."""
    assert isinstance(operand, Address)
    return address(e, operand, "global")


@handles("fence", "membar")
def _fence(e: Emitter, ins: Instr, m: Mods) -> None:
    """Memory is sequentially consistent here; fences order accesses for the checks of races and proxies.

    fence.mbarrier_init does nothing: that the init happens before other threads' use is checked at their use.
    """
    proxy = m.flag("proxy")
    kind = m.choose("alias", "async", "async::generic", "tensormap::generic", "mbarrier_init")
    m.flag("sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl")
    m.flag("sync_restrict::shared::cta", "sync_restrict::shared::cluster", *_SHARED, "global")
    if proxy == (kind in ("", "mbarrier_init")):
        raise m.refuse()
    if kind.startswith("async"):
        if "global" not in ins.mods:
            e.emit(f"B.engine.flight.fence({e.lanes})")
    elif not kind:
        e.emit(f"B.races.fence({e.lanes})")


@handles("setmaxnreg")
def _set_registers(e: Emitter, ins: Instr, m: Mods) -> None:
    """Registers are unlimited here: only the rules of the instruction are checked."""
    m.choose("inc", "dec")
    if not m.flag("sync") or not m.flag("aligned"):
        raise m.refuse()
    count = ins.args[0]
    if not isinstance(count, Number) or count.value % 8 or not 24 <= count.value <= 256:
        raise m.refuse(f"setmaxnreg: {ins.text}: the count must be a multiple of 8 from 24 to 256")
    e.emit("B.races.meet(L)")
