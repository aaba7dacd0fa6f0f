"""What a launch reports: counts when it ends well, and messages that name kernel, thread and line when it does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_rt.emulator.ir import Instr, Loc
from dsv4_rt.emulator.ptx import Ptx

Triple = tuple[int, int, int]


@dataclass(slots=True)
class LaunchReport:
    """What a launch did.

    Attributes:
        kernel: the entry's name in the PTX.
        ctas, threads: how many were launched.
        instructions: thread-instructions executed; an instruction whose guard fails counts.
        warp_instructions: the same for warps that had a thread there.
        opcodes: PTX base opcode -> thread-instructions.
        quiet_races: racing stores that are no faults: of the bytes that were there already, or by lanes of one warp in
            one instruction.
        cancelled: CTAs that did not run, because others cancelled them (clusterlaunchcontrol).
    """

    kernel: str
    ctas: int
    threads: int
    instructions: int = 0
    warp_instructions: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)
    quiet_races: int = 0
    cancelled: int = 0


def source_lines(ptx: Ptx, loc: Loc | None, roots: Sequence[Path]) -> list[str]:
    """`file:line: text`, and one line more for each call it is inlined into."""
    found = []
    while loc is not None and (loc.line or loc.inlined_at):
        name = ptx.files.get(loc.file, f"file {loc.file}")
        inside = ptx.strings.get(loc.function.split("+")[0], "")
        text = _excerpt(name, loc.line, roots)
        line = f"{name}:{loc.line}: {text}" if text else f"{name}:{loc.line}"
        found.append(line + (f"   [{_plain(inside)}, inlined]" if inside else ""))
        loc = loc.inlined_at
    return found


def _plain(mangled: str) -> str:
    """The last name in an Itanium-mangled function name; anything else unchanged."""
    rest, name = mangled[2:].lstrip("N") if mangled.startswith("_Z") else "", ""
    while rest[:1].isdigit():
        digits = len(rest) - len(rest.lstrip("0123456789"))
        size = int(rest[:digits])
        name, rest = rest[digits : digits + size], rest[digits + size :]
    return name or mangled


def _excerpt(name: str, line: int, roots: Sequence[Path]) -> str:
    """A line of a source file: at its own path, or by the longest tail of that path found under a root."""
    parts = [part for part in Path(name).parts if part != "/"]
    tails = [Path(*parts[i:]) for i in range(len(parts))]
    for path in (Path(name), *(root / tail for root in roots for tail in tails)):
        try:
            lines = path.read_text(errors="replace").split("\n")
        except OSError:
            continue
        return lines[line - 1].strip() if 0 < line <= len(lines) else ""
    return ""


def where(ptx: Ptx, ins: Instr | None, roots: Sequence[Path], indent: str = "  ") -> str:
    """The lines of a message that say where in the PTX and in the CUDA source an instruction stands."""
    if ins is None:
        return ""
    lines = [f"PTX line {ins.line}: {ins.text}", *source_lines(ptx, ins.loc, roots)]
    return "".join(f"\n{indent}{line}" for line in lines)


def fault(kernel: str, what: str, cta: Triple, thread: Triple, lanes: int, place: str) -> str:
    """The message of a KernelFault: what, where, and the first of the threads it happened to."""
    others = f", the first of {lanes} threads" if lanes > 1 else ""
    return f"{kernel}: {what}\n  CTA {cta}, thread {thread}{others}{place}"
