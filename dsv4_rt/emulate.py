"""Run any PTX file, or a CUDA file, on the emulator: what `python -m dsv4_rt emulate` does.

    python -m dsv4_rt emulate add.ptx --grid 4 --block 256 --arg in:x.npy --arg out:y.npy:f32:1000 --arg i32:1000

The arguments are described in `emulate_args.py`, `--trace` in `emulator/trace.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4_rt import emulate_args, sources
from dsv4_rt.compile import ARCHITECTURES, compile, kernels_dir
from dsv4_rt.emulator import LaunchReport, Machine, Tracer
from dsv4_rt.emulator.machine import ORDERS
from dsv4_rt.errors import ArgumentError, CompileError, Deadlock, EmulatorError, KernelFault, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator import Module

MOST_SHARED = 227 * 1024  # bytes a CTA can have on sm_90a and sm_100a
FILE_COLUMNS = 110  # of tables where no terminal limits them
FIRST_THREAD = "cta=0:thread=0"


@dataclass(frozen=True)
class EntryFacts:
    """One kernel of a file. `problem` says what the emulator does not implement of it."""

    name: str
    parameters: tuple[tuple[str, int], ...]
    shared_bytes: int | None
    max_threads: int | None
    problem: str | None = None


@dataclass
class Outcome:
    """A launch and what it did; `fault` is the message of a kernel that went wrong."""

    file: str
    arch: str
    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    order: str
    seed: int
    seconds: float = 0.0
    report: LaunchReport | None = None
    fault: str | None = None
    buffers: list[dict[str, Any]] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    trace_dropped: int = 0
    cluster: tuple[int, int, int] | None = None

    def as_json(self) -> dict[str, Any]:
        names = "file arch kernel grid block cluster shared order seed seconds fault buffers trace trace_dropped"
        found: dict[str, Any] = {name: getattr(self, name) for name in names.split()} | {"ok": self.fault is None}
        if self.report is not None:
            for name in ("instructions", "warp_instructions", "ctas", "threads"):
                found[name] = getattr(self.report, name)
            found["opcodes"] = dict(self.report.opcodes.most_common())
        return found


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of the command."""
    sub.add_argument("file", metavar="FILE", help="a .ptx file, or a .cu file that is compiled first")
    sub.add_argument("--kernel", metavar="NAME", help="the entry, or a part of its name; of a .cu, a name expression")
    sub.add_argument("--list", action="store_true", help="print the entries with their parameters and run nothing")
    sub.add_argument("--grid", type=_sizes, default=(1, 1, 1), metavar="X[,Y[,Z]]", help="CTAs (default: 1)")
    sub.add_argument("--cluster", type=_sizes, metavar="X[,Y[,Z]]", help="CTAs a cluster; default: as the kernel says")
    sub.add_argument("--block", type=_sizes, metavar="X[,Y[,Z]]", help="threads; default: what the kernel requires")
    sub.add_argument(
        "--arg", action="append", default=[], metavar="SPEC", help=f"one for each parameter: {emulate_args.FORMS}"
    )
    sub.add_argument("--shared", type=_count, default=0, metavar="BYTES", help="dynamic shared memory (default: 0)")
    sub.add_argument("--arch", choices=ARCHITECTURES, help="default: the PTX's target, sm_100a for a .cu")
    sub.add_argument("--order", choices=ORDERS, default=ORDERS[0], help=f"which threads first (default: {ORDERS[0]})")
    sub.add_argument("--seed", type=_count, default=0, help="of random buffers and --order random (default: 0)")
    sub.add_argument("--write", action="store_true", help="write inout: arrays back to their files")
    sub.add_argument("--histogram", type=_count, default=10, metavar="N", help="show the N most frequent opcodes (10)")
    sub.add_argument(
        "--trace", nargs="?", const=FIRST_THREAD, metavar="SPEC",
        help=f"print what threads execute: cta=X,Y,Z, thread=X,Y,Z, warp=N, joined by colons (default: {FIRST_THREAD})",
    )  # fmt: skip
    sub.add_argument("--trace-limit", type=_count, default=1000, metavar="N", help="lines of the trace (default: 1000)")


def _sizes(text: str) -> tuple[int, int, int]:
    parts = [int(part) for part in text.split(",")]
    if not 1 <= len(parts) <= 3 or min(parts) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not one to three sizes of 1 or more")
    x, y, z = (*parts, 1, 1)[:3]
    return x, y, z


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


# ---------------------------------------------------------------------------------------------------- the file


@dataclass(frozen=True)
class _Program:
    """PTX text ready to load. `chosen` is the entry a .cu was compiled for, None where there is a choice left."""

    text: str
    arch: str
    roots: tuple[Path, ...]
    chosen: str | None = None


def _read(options: argparse.Namespace) -> _Program:
    path = Path(options.file)
    if path.suffix == ".cu":
        return _compiled(path, options)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    targets = [line.split()[1].rstrip(",") for line in text.splitlines() if line.startswith(".target ")]
    known = [target for target in targets if target in ARCHITECTURES]
    return _Program(text, options.arch or (known or ["sm_100a"])[0], _roots(path))


def _compiled(path: Path, options: argparse.Namespace) -> _Program:
    """A .cu: the kernel asked for, or every kernel that is no template."""
    arch, path = options.arch or "sm_100a", path.absolute()
    found = sources.read(path, kernels_dir()).declarations()
    names = [options.kernel] if options.kernel else [k.name for k in found if not k.template]
    if not names:
        listed = "".join(f"\n  {kernel}" for kernel in found) or " none"
        raise CompileError(f"{path.name}: name the kernel to compile, as --kernel 'f<128>'; it declares:{listed}")
    artifact = compile(path, arch, names)
    chosen = artifact.kernels[names[0]].lowered if len(names) == 1 else None
    return _Program(artifact.ptx, arch, _roots(path), chosen)


def _roots(path: Path) -> tuple[Path, ...]:
    return (path.absolute().parent, kernels_dir().parent)


def _load(machine: Machine, program: _Program, file: str) -> Module:
    try:
        return machine.load(program.text, Path(file).name)
    except (KeyError, IndexError, ValueError) as error:
        raise EmulatorError(f"{file} cannot be read as PTX: {error!r}") from None


def _shared_bytes(module: Module, name: str) -> int:
    """Static shared memory. Translates the whole kernel, so whatever is not implemented is refused here."""
    try:
        return module.program(name).shared_bytes
    except (KeyError, IndexError, ValueError) as error:
        raise EmulatorError(f"{name} cannot be read as PTX: {error!r}") from None


def _facts(module: Module, name: str) -> EntryFacts:
    entry, function = module.entries[name], module.ptx.functions[name]
    shared, problem = None, None
    try:
        shared = _shared_bytes(module, name)
    except EmulatorError as error:
        problem = str(error)
    parameters = tuple((var.name, var.size) for var in function.params)
    return EntryFacts(name, parameters, shared, entry.max_threads, problem)


def entries(options: argparse.Namespace) -> list[EntryFacts]:
    """Every kernel of the file."""
    program = _read(options)
    module = _load(Machine(program.arch, source_roots=program.roots), program, options.file)
    return [_facts(module, name) for name in module.entries]


def _choose(module: Module, wanted: str | None, file: str) -> str:
    """The entry meant: by name, by its name in the source, or by a part of the name that only one has."""
    names = list(module.entries)
    found = names
    if wanted is not None:
        mangled = f"{len(wanted)}{wanted}"  # as C++ spells it inside a longer name
        for fits in (lambda n: n == wanted, lambda n: mangled in n, lambda n: wanted in n):
            found = [name for name in names if fits(name)]
            if found:
                break
    if len(found) == 1:
        return found[0]
    lines = []
    for name in found or names:
        sizes = ", ".join(f"{var.name}: {var.size} B" for var in module.ptx.functions[name].params)
        lines.append(f"\n  {name}({sizes})")
    problem = f"has {len(names)} entries" if wanted is None else f"has {len(found)} entries like {wanted!r}"
    raise ArgumentError(f"{file} {problem}; choose with --kernel:{''.join(lines) or ' there is none'}")


# ------------------------------------------------------------------------------------------------------ the run


def run(options: argparse.Namespace, write: Callable[[str], object] | None = None) -> Outcome:
    """Launch the kernel that the options describe; trace lines go to `write` as they come, and into the outcome.

    Raises:
        ArgumentError, CompileError, LaunchError, UnsupportedInstruction, EmulatorError: nothing has run, or the
            emulator failed. What a kernel does wrong is no exception but the outcome's `fault`.
    """
    program = _read(options)
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        if write is not None:
            write(line)

    tracer = None if options.trace is None else Tracer(keep, options.trace, options.trace_limit)
    machine = Machine(program.arch, order=options.order, seed=options.seed, source_roots=program.roots, trace=tracer)
    module = _load(machine, program, options.file)
    kernel = program.chosen or _choose(module, options.kernel, options.file)
    entry = module.entries[kernel]
    arguments = emulate_args.parse(options.arg, options.seed)
    emulate_args.check(kernel, arguments, [var.name for var in module.ptx.functions[kernel].params], entry.params)
    block = options.block or entry.required_threads
    if block is None:
        raise ArgumentError(f"{kernel} does not say how many threads it wants: give --block")
    static = _shared_bytes(module, kernel)
    if static + options.shared > MOST_SHARED:
        raise ArgumentError(f"{kernel}: {static} + {options.shared} bytes of shared memory; a CTA has {MOST_SHARED:,}")
    _inside(tracer, options.grid, block)

    placed = emulate_args.place(arguments, machine.memory)
    params = emulate_args.pack(arguments, placed, entry.params, entry.param_bytes)
    outcome = Outcome(
        options.file, program.arch, kernel, options.grid, block, options.shared, options.order, options.seed,
        cluster=options.cluster or entry.cluster,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        outcome.report = machine.launch(
            module, kernel, options.grid, block, params, dynamic_shared=options.shared, cluster=options.cluster
        )
    except (KernelFault, Deadlock) as error:
        outcome.fault = str(error)
    except UnsupportedInstruction:
        raise
    except EmulatorError as error:
        if isinstance(error.__cause__, BrokenPipeError):  # nobody reads the trace any more
            raise error.__cause__ from None
        raise
    outcome.seconds = time.perf_counter() - start
    outcome.trace, outcome.trace_dropped = lines, tracer.dropped if tracer else 0
    if outcome.fault is None:
        outcome.buffers = _finish(placed, options.write)
    return outcome


def _inside(tracer: Tracer | None, grid: Sequence[int], block: Sequence[int]) -> None:
    if tracer is None:
        return
    wanted = tracer.selection
    warps = -(-block[0] * block[1] * block[2] // 32)
    for what, at, sizes in (("cta", wanted.cta, grid), ("thread", wanted.thread, block)):
        if at is not None and any(i >= size for i, size in zip(at, sizes, strict=True)):
            raise ArgumentError(f"--trace {what}={','.join(map(str, at))}: there are {','.join(map(str, sizes))}")
    if wanted.warp is not None and wanted.warp >= warps:
        raise ArgumentError(f"--trace warp={wanted.warp}: a CTA has {warps}")


def _finish(placed: Sequence[emulate_args.Placed], write: bool) -> list[dict[str, Any]]:
    """Save what is to be saved and describe what the kernel may have written."""
    found = []
    for each in placed:
        form, path = each.argument.form, each.argument.path
        if form == "in":
            continue
        saved = path is not None and (form == "out" or write)
        if saved and path is not None:
            each.save(path)
        found.append(each.summary() | {"saved": str(path) if saved else None})
    return found


# ---------------------------------------------------------------------------------------------------- the report


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _widen(console: Console) -> None:
    if not console.is_terminal:
        console.width = max(console.width, FILE_COLUMNS)


def show(outcome: Outcome, console: Console, histogram: int) -> None:
    """Print an outcome; the trace has been printed while it ran."""
    _widen(console)
    if outcome.trace_dropped:
        console.print(f"{outcome.trace_dropped:,} more lines; --trace-limit N shows more", markup=False)
    if outcome.trace:
        console.print()
    if outcome.fault is not None:
        console.print(outcome.fault, markup=False, highlight=False, soft_wrap=True)
        return
    report = outcome.report
    assert report is not None
    console.print(
        f"{outcome.kernel}: grid {_by(outcome.grid)}, block {_by(outcome.block)}, emulated {outcome.arch}\n"
        f"{report.instructions:,} instructions of {report.threads:,} threads, {report.warp_instructions:,} of warps, "
        f"{report.ctas:,} CTAs, {outcome.seconds:.3f} s",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    if histogram:
        table = _table("Opcodes")
        for heading, justify in (("opcode", "left"), ("instructions", "right"), ("share", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for opcode, count in report.opcodes.most_common(histogram):
            table.add_row(opcode, f"{count:,}", f"{count / report.instructions:.1%}")
        console.print("", table)
    if outcome.buffers:
        table = _table("Buffers")
        for heading in ("argument", "changed", "elements", "min", "max"):
            table.add_column(heading, overflow="fold")
        for each in outcome.buffers:
            table.add_row(*(escape(cell) for cell in _cells(each)))
        console.print("", table)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _cells(buffer: dict[str, Any]) -> tuple[str, ...]:
    count = 1
    for dim in buffer["shape"]:
        count *= dim
    gap = "  ...  " if count > len(buffer["first"]) + len(buffer["last"]) else " "
    ends = (" ".join(_short(value) for value in buffer[end]) for end in ("first", "last"))
    low, high = ("-" if buffer[end] is None else _short(buffer[end]) for end in ("min", "max"))
    nan = f", {buffer['nan']:,} NaN" if buffer["nan"] else ""
    name = f"{buffer['index']}  {buffer['argument']}" + (", saved" if buffer["saved"] else "")
    return name, f"{buffer['changed']:,} of {count:,}", gap.join(ends).strip(), low, high + nan


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_entries(found: Sequence[EntryFacts], console: Console) -> None:
    """Print the kernels of a file."""
    _widen(console)
    table = _table("Entries; parameters and static shared memory in bytes")
    for heading in ("entry", "parameters", "shared", "threads at most"):
        table.add_column(heading, overflow="fold")
    for each in found:
        parameters = ", ".join(f"{name}: {size}" for name, size in each.parameters) or "none"
        shared = "-" if each.shared_bytes is None else f"{each.shared_bytes:,}"
        table.add_row(each.name, parameters, shared, str(each.max_threads or 1024))
    console.print(table)
    for each in found:
        if each.problem:
            console.print(each.problem, markup=False, highlight=False, soft_wrap=True)
