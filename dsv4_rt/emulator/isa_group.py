"""Translation of tcgen05.mma of a pair of CTAs, weight-stationary, with masked lanes or a scaled accumulator."""

from __future__ import annotations

from dsv4_rt.emulator import wide
from dsv4_rt.emulator.codegen import Emitter, Mods
from dsv4_rt.emulator.ir import Address, Instr, Number, Operand, Vector
from dsv4_rt.emulator.isa_memory import address

KINDS = {f"kind::{kind}": kind for kind in ("f16", "tf32", "f8f6f4")}
_MAX_SCALE = 15  # of scale-input-d, an exponent


def is_wide(ins: Instr) -> bool:
    """Whether a tcgen05.mma is one of these."""
    if "ws" in ins.mods:
        return True
    if "block_scale" in ins.mods:
        return False
    return "cta_group::2" in ins.mods or len(ins.args) > 5 or any(isinstance(each, Vector) for each in ins.args)


def wide_mma(e: Emitter, ins: Instr, m: Mods, paired: bool) -> None:
    """d, a, b, idesc, [mask,] accumulate [, scale-input-d]; with .ws the last is a zero-column mask."""
    for mod, what in (("sp", "sparse matrices"), ("block_scale", "block scales with .ws")):
        if mod in ins.mods:
            raise m.refuse(f"{ins.name}: {what} are not implemented by the emulator")
    if "ashift" in ins.mods:
        raise m.refuse(f"{ins.name}: .ashift is not implemented by the emulator")
    ws, kind = m.flag("ws"), m.choose(*KINDS)
    if not kind or (ws and paired):
        raise m.refuse()
    buffers = ("b0", "b1", "b2", "b3") if ws else ("a",)
    m.choose(*(f"collector::{buffer}::{use}" for buffer in buffers for use in ("discard", "lastuse", "fill", "use")))
    d, a, b, form, *rest = ins.args
    mask: tuple[Operand, ...] = rest.pop(0).items if rest and isinstance(rest[0], Vector) else ()  # type: ignore[union-attr]
    if not rest or len(rest) > 2 or len(mask) not in (0, 8 if paired else 4) or (ws and mask):
        raise m.refuse()
    add, scale = rest[0], 0
    if len(rest) == 2:
        last = rest[1]
        if ws and not (isinstance(last, Number) and last.value == 0):
            raise m.refuse(f"{ins.name}: a zero-column mask is not implemented by the emulator")
        if not isinstance(last, Number) or not 0 <= last.value <= _MAX_SCALE or (not ws and kind == "kind::f8f6f4"):
            wanted = f"scale-input-d is a number from 0 to {_MAX_SCALE}, of kind::f16 and kind::tf32"
            raise m.refuse(f"{ins.name}: {wanted}")
        scale = last.value
    from_tmem = isinstance(a, Address)
    for each in (b, form, add, *mask) if from_tmem else (a, b, form, add, *mask):
        e.check_set(each, "an operand of tcgen05.mma")
    left = address(e, a, "shared") if from_tmem else e.use(a, "b64")
    values = [address(e, d, "shared"), left, e.use(b, "b64"), e.use(form, "b32"), e.use(add, "pred")]
    e.namespace["wide"] = wide
    masks = "".join(f"{e.use(each, 'b32')}, " for each in mask)
    e.emit(
        f"wide.mma(B, {e.lanes}, {ins.line}, {KINDS[kind]!r}, {2 if paired else 1}, {ws}, {scale}, "
        f"({', '.join(values)}), ({masks}), {from_tmem})"
    )
