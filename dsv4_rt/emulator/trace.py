"""Tracing: a machine made with `trace=f` calls f after every instruction, with the lanes that ran it and what they got.

    tracer = Tracer(print, select="cta=0,0,0:thread=3,0,0")
    machine = Machine(trace=tracer)

The calls are part of the generated code of a machine that traces and of no other. An instruction that faults is not
traced: the fault names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.clusters import ctaid
from dsv4_rt.emulator.ir import TYPES, Address, Instr, Loc, Reg, results, sources
from dsv4_rt.errors import EmulatorError

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
_FLOATS: dict[str, Any] = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@dataclass(slots=True)
class Step:
    """One instruction, executed by the lanes of a group at once.

    Attributes:
        batch: the CTAs that run in lockstep; `batch.thread(lane)` is the (CTA, thread) of a lane.
        ins: the instruction, with its PTX line and text.
        lanes: the lanes, in order.
        passed: which of them pass the guard; None where there is no guard.
        registers: raw bits of the results, or of the sources where there is no result. One value stands for all lanes.
    """

    batch: Batch
    ins: Instr
    lanes: Array
    passed: Array | None
    registers: list[tuple[Reg, Array]]


def hook(trace: Callable[[Step], None]) -> Callable[..., None]:
    """What generated code calls."""

    def call(
        batch: Batch, what: tuple[Instr, tuple[Reg, ...]], lanes: Array, passed: Array | None, *values: Array
    ) -> None:
        ins, registers = what
        trace(Step(batch, ins, lanes, passed, list(zip(registers, values, strict=True))))

    return call


@dataclass(frozen=True)
class Selection:
    """Which threads to trace; None means all. `warp` counts within a CTA."""

    cta: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    warp: int | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """`cta=X,Y,Z`, `thread=X,Y,Z` and `warp=N`, joined by colons; sizes left out are 0.

        Raises:
            EmulatorError: the text is none of these.
        """
        found: dict[str, Any] = {}
        for part in text.split(":"):
            name, _, value = part.partition("=")
            if name not in ("cta", "thread", "warp") or name in found or not re.fullmatch(r"\d+(,\d+){0,2}", value):
                raise EmulatorError(f"trace: {text!r} is not like cta=0,0,0:thread=3,0,0 or warp=0")
            numbers = tuple(int(number) for number in value.split(","))
            found[name] = (*numbers, 0, 0)[:3]
            if name == "warp":
                if len(numbers) > 1:
                    raise EmulatorError(f"trace: a warp has one number, not {value}")
                found[name] = numbers[0]
        return cls(**found)

    def mask(self, batch: Batch) -> Array:
        """Which lanes of a batch are chosen."""

        def at(index: tuple[int, int, int], sizes: tuple[int, int, int]) -> int:
            outside = any(i >= size for i, size in zip(index, sizes, strict=True))
            return -1 if outside else index[0] + sizes[0] * (index[1] + sizes[1] * index[2])

        chosen: Array = np.ones(batch.nlanes, np.bool_)
        if self.cta is not None:
            shape = batch.shape
            x, y, z = ctaid(batch.cta + batch.first, shape.grid, shape.cluster)
            chosen &= x + shape.grid[0] * (y + shape.grid[1] * z) == at(self.cta, shape.grid)
        if self.thread is not None:
            chosen &= batch.tid == at(self.thread, batch.shape.block)
        if self.warp is not None:
            chosen &= batch.tid >> 5 == self.warp
        return chosen


class Tracer:
    """Writes one line for each instruction and each warp that has a chosen thread there.

    Args:
        write: gets the lines.
        select: which threads, see `Selection.parse`; thread 0 of CTA 0 by default.
        limit: lines written; `dropped` counts the others.
    """

    def __init__(self, write: Callable[[str], object], select: str = "cta=0:thread=0", limit: int = 1000) -> None:
        self.write, self.selection, self.limit = write, Selection.parse(select), limit
        self.lines = self.dropped = 0
        self._batch: Batch | None = None
        self._chosen: Array = np.zeros(0, np.bool_)
        self._kinds: dict[Reg, str] = {}

    def __call__(self, step: Step) -> None:
        if step.batch is not self._batch:
            if self._batch is None or step.batch.program is not self._batch.program:
                self._kinds = _used_as(ins for block in step.batch.program.blocks for ins in block.instrs)
            self._batch, self._chosen = step.batch, self.selection.mask(step.batch)
        at = np.nonzero(self._chosen[step.lanes])[0]
        if not len(at):
            return
        warps = step.lanes[at] >> 5
        for part in np.split(at, np.nonzero(np.diff(warps))[0] + 1):
            if self.lines >= self.limit:
                self.dropped += 1
                continue
            self.lines += 1
            self.write(self._line(step, part))

    def _line(self, step: Step, at: Array) -> str:
        ins, lanes = step.ins, step.lanes[at]
        cta, thread = step.batch.thread(int(lanes[0]))
        who = f"cta {_three(cta)} "
        if len(at) == 1:
            who += f"thread {_three(thread)}"
        else:
            mask = sum(1 << int(lane) for lane in lanes & 31)
            who += f"warp {int(step.batch.tid[lanes[0]]) >> 5} lanes {mask:#010x}"
        ran = np.ones(len(at), np.bool_) if step.passed is None else np.broadcast_to(step.passed, step.lanes.shape)[at]
        place = f"PTX {ins.line}"
        if ins.loc is not None:
            place += "  " + _cuda(ins.loc, step.batch.program.ptx.files)
        line = f"{who}  {place}  {ins.text}"
        if not ran.any():
            return f"{line}  guard false"
        values = (f"{reg.name}={self._values(ins, reg, bits, at, ran)}" for reg, bits in step.registers)
        return "  ".join([line, *values])

    def _values(self, ins: Instr, reg: Reg, bits: Array, at: Array, ran: Array) -> str:
        """The chosen lanes' values, one if all agree; `-` where the guard fails."""
        ty = _type_of(ins, reg)
        if TYPES.get(ty, (0, "b"))[1] == "b":
            ty = self._kinds.get(reg, ty)
        if any(isinstance(operand, Address) and operand.base is reg for operand in ins.args):
            ty = ""
        texts = []
        for i, ok in zip(at.tolist(), ran.tolist(), strict=True):
            raw = bits[i if len(bits) > 1 else 0]
            value = int(raw[0]) | int(raw[1]) << 64 if reg.bits == 128 else int(raw)
            texts.append(_text(ty, reg.bits, value) if ok else "-")
        return texts[0] if len(set(texts)) == 1 else f"[{' '.join(texts)}]"


def _three(index: Sequence[int]) -> str:
    return ",".join(str(i) for i in index)


def _cuda(loc: Loc | None, files: dict[int, str]) -> str:
    """file:line, and after `<` the lines of the calls it is inlined into."""
    found = []
    while loc is not None:
        found.append(f"{Path(files.get(loc.file, f'file {loc.file}')).name}:{loc.line}")
        loc = loc.inlined_at
    return " < ".join(found)


def _type_of(ins: Instr, reg: Reg) -> str:
    """The type an instruction reads or writes a register as."""
    types = ins.types
    return (types[0] if reg in results(ins) else types[-1]) if types else ""


def _used_as(instrs: Iterable[Instr]) -> dict[Reg, str]:
    """What arithmetic takes each register for. Loads and moves have types of bits only: this tells floats apart."""
    found: dict[Reg, set[str]] = {}
    for ins in instrs:
        for reg in (*results(ins), *sources(ins)):
            ty = _type_of(ins, reg)
            if TYPES.get(ty, (0, "b"))[1] in "fsu":
                found.setdefault(reg, set()).add(ty)
    return {reg: types.pop() for reg, types in found.items() if len({TYPES[ty][1] for ty in types}) == 1}


def _text(ty: str, width: int, value: int) -> str:
    """A register's bits as its type reads them; addresses, untyped bits and large 64-bit integers hexadecimal."""
    if width == 1:
        return str(value)
    bits, kind = TYPES.get(ty, (0, "b"))
    if kind == "f" and ty in _FLOATS and bits == width:
        return str(np.array(value, f"u{bits // 8}").view(_FLOATS[ty])[()])
    if kind == "s" and value >> (width - 1):
        value -= 1 << width
    if kind in ("s", "u") and abs(value) < 1 << 32:
        return str(value)
    return f"{value:#x}"
