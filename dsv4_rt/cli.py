"""The command line: python -m dsv4_rt demo | doctor | kernels | warmup | cache | emulate | selftest.

Exit codes: 0 done, 1 the command's answer is bad (a result differs from the oracle, nothing can run), 2 an error.
With --json one document goes to standard output and nothing else; errors and progress go to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dsv4_rt import __version__, demo, doctor, emulate, selftest
from dsv4_rt.cache import cache_info
from dsv4_rt.compile import ARCHITECTURES, KernelInfo, cache_clear, compile
from dsv4_rt.device import open_device, use_device
from dsv4_rt.errors import Dsv4Error
from dsv4_rt.operation import Instance, instances

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it
FILE_COLUMNS = 110  # of the table of kernels where no terminal limits it: their names are long
CURVE_COLUMNS = 32
CURVE_STEPS = " ▁▂▃▄▅▆▇█"
CURVE_STEPS_ASCII = " .:-=+*#@"


class _Output(Console):
    """Standard output. rich would leave with code 1 where nobody reads it any more; here 1 says something else."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Usage errors, --help and --version raise SystemExit, as argparse does."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the text routed may hold what the terminal cannot show
    options = _parser().parse_args(argv)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
    except Dsv4Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` for one, has enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsv4_rt", description="Raw CUDA kernels for DeepSeek-V4 inference, and an emulator to run them anywhere."
    )
    parser.add_argument("--version", action="version", version=f"dsv4_rt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        sub.add_argument("--json", action="store_true", help="print one JSON document")
        return sub

    sub = command("demo", _demo, "route real text through the router kernels and check every result")
    sub.add_argument("file", nargs="?", metavar="FILE", help="a UTF-8 text; one comes with the package")
    sub.add_argument("--model", choices=tuple(demo.MODELS), default="flash", help="whose shapes (default: flash)")
    sub.add_argument("--layer", type=int, help="the dense-routed layer (default: 3, the first)")
    sub.add_argument(
        "--max-tokens",
        type=_positive,
        default=demo.MAX_TOKENS,
        metavar="N",
        help=f"route the first N tokens (default: {demo.MAX_TOKENS})",
    )
    sub.add_argument("--seed", type=_natural, default=0, help="of the random weights (default: 0)")
    _add_device(sub)

    sub = command("doctor", _doctor, "what works on this machine, what is missing and how to get it")
    _add_device(sub)

    sub = command("kernels", _kernels, "every kernel for each architecture: registers, shared memory, spills, stack")
    _add_architectures(sub)

    sub = command("warmup", _warmup, "compile every kernel into the cache, in parallel")
    _add_architectures(sub)

    sub = command("cache", _cache, "the cache of compiled kernels: where, how large, how useful; or clear it")
    sub.add_argument("action", nargs="?", choices=("clear",), help="remove all entries")

    emulate.add_arguments(command("emulate", _emulate, "run a kernel of any PTX or CUDA file on the emulator, checked"))
    selftest.add_arguments(command("selftest", _selftest, "all that a GPU can judge, in one report"))
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _add_device(sub: argparse.ArgumentParser) -> None:
    text = "cuda, cuda:N, emulator, emulator:sm_90a, ... (default: DSV4_RT_DEVICE, else a GPU, else the emulator)"
    sub.add_argument("--device", metavar="SPEC", help=text)


def _add_architectures(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _print_json(document: Any) -> int:
    print(json.dumps(document, indent=2))
    return 0


# --------------------------------------------------------------------------------------------------------- demo


def _demo(options: argparse.Namespace) -> int:
    chosen = use_device(open_device(options.device)) if options.device else contextlib.nullcontext()
    with chosen, Console(stderr=True).status("routing"):
        report = demo.run(
            options.file, model=options.model, layer=options.layer, max_tokens=options.max_tokens, seed=options.seed
        )
    if options.json:
        _print_json(report.as_json())
    else:
        _show_demo(report, _Output())
    return 0 if report.ok else 1


def _show_demo(report: demo.Report, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _demo_facts(report):
        facts.add_row(name, escape(value))
    console.print(facts)
    loads = _load_table(report, console)
    console.print("", _kernel_table(report), "", loads, "", _extremes_table(report), "", _sample_table(report), "")
    for run in report.kernels:
        if run.mismatch:
            console.print(f"MISMATCH {run.kernel}, layer {run.layer}: {run.mismatch}", markup=False, soft_wrap=True)
    if report.ok:
        console.print(f"All {len(report.kernels)} results agree with the oracle. {report.seconds:.1f} s in all.")


def _demo_facts(report: demo.Report) -> Iterator[tuple[str, str]]:
    part = f"the first {report.tokens} tokens" if report.truncated else f"all {report.tokens} tokens"
    more = "; --max-tokens N routes more" if report.truncated else ""
    yield "model", (
        f"DeepSeek-V4-{report.model.capitalize()}: {report.experts} experts, {report.top_k} a token, "
        f"scaling factor {report.routed_scaling_factor}"
    )
    yield "text", f"{report.text}: {part}, {report.distinct_tokens} of them distinct{more}"
    how = "its PTX executed on the CPU" if report.device_kind == "emulator" else f"code for {report.arch}"
    yield "ran on", f"{report.device}, {how}, compiled by {report.compiler}. {report.hardware_note}"
    listed = ", ".join(report.seeded)
    yield "random", f"{listed} (seed {report.seed}): released weights do not come with this package."
    yield "logits", f"by {report.logits_by}: RMS-normalised embedding row times gate, no attention in between."


def _kernel_table(report: demo.Report) -> Table:
    emulated = report.device_kind == "emulator"
    title = (
        "Kernels: instructions executed, summed over threads"
        if emulated
        else f"Kernels: device time on {report.device}, median of CUDA-graph replays, inputs warm in L2"
    )
    table = _table(title)
    table.add_column("kernel")
    for heading in ("layer", *(("instructions", "per token") if emulated else ("us", "ns per token"))):
        table.add_column(heading, justify="right")
    table.add_column("against the oracle", overflow="fold")
    for run in report.kernels:
        if emulated:
            cells = [f"{run.instructions or 0:,}", f"{(run.instructions or 0) / run.tokens:,.0f}"]
        else:
            cells = [f"{run.device_us or 0:.2f}", f"{(run.device_us or 0) * 1e3 / run.tokens:,.1f}"]
        table.add_row(run.kernel, str(run.layer), *cells, run.agreement or "MISMATCH")
    return table


def _load_table(report: demo.Report, console: Console) -> Table:
    steps = CURVE_STEPS_ASCII if console.options.ascii_only else CURVE_STEPS
    table = _table("Expert load; the curve falls from the busiest to the least busy")
    for heading in ("layer", "mean", "max/mean", "cv", "idle"):
        table.add_column(heading, justify="right")
    table.add_column("load curve", no_wrap=True)
    for load in report.load:
        numbers = (f"{load.mean:.1f}", f"{load.max_over_mean:.2f}", f"{load.variation:.2f}", str(load.idle))
        table.add_row(f"{load.routing} {load.layer}", *numbers, _curve(load.counts, steps))
    return table


def _extremes_table(report: demo.Report) -> Table:
    table = _table("Experts and how many tokens they got")
    table.add_column("layer", justify="right")
    table.add_column("busiest", overflow="fold")
    table.add_column("least busy", overflow="fold")
    for load in report.load:
        ends = (", ".join(f"{expert}: {count}" for expert, count in end) for end in (load.busiest, load.least))
        table.add_row(f"{load.routing} {load.layer}", *ends)
    return table


def _curve(counts: Sequence[int], steps: str) -> str:
    """Experts by falling load, an equal share of them a column, the height relative to the busiest column."""
    ordered = sorted(counts, reverse=True)
    edges = [i * len(ordered) // CURVE_COLUMNS for i in range(CURVE_COLUMNS + 1)]
    means = [sum(ordered[a:b]) / max(b - a, 1) for a, b in zip(edges, edges[1:], strict=False)]
    top = max(means) or 1
    return "".join(steps[round(mean / top * (len(steps) - 1))] for mean in means)


def _sample_table(report: demo.Report) -> Table:
    table = _table("The first tokens, their experts and weights")
    table.add_column("token", overflow="fold")
    table.add_column("layer", justify="right")
    table.add_column("experts", overflow="fold")
    table.add_column("weights", overflow="fold")
    shown = (report.load[0], report.load[-1])  # one hash layer stands for all
    for sample in report.sample:
        for load in shown:
            if load.layer == sample.layer:
                name = f"{sample.text!r} {sample.token_id}" if load is shown[0] else ""
                experts = " ".join(f"{expert:3}" for expert in sample.experts)
                weights = " ".join(f"{weight:.2f}".removeprefix("0") for weight in sample.weights)
                if len(set(sample.weights)) == 1:
                    weights = f"{sample.weights[0]:.3f} each"
                table.add_row(escape(name), f"{load.routing} {load.layer}", experts, weights)
    return table


# ------------------------------------------------------------------------------------------------------- doctor


def _doctor(options: argparse.Namespace) -> int:
    with Console(stderr=True).status("looking around"):
        found = doctor.examine(options.device)
    if options.json:
        _print_json(found.as_json())
    else:
        doctor.show(found, _Output())
    return 0 if found.ok else 1


# --------------------------------------------------------------------------------------------- kernels, warmup


@dataclass(frozen=True)
class _Built:
    instance: Instance
    arch: str
    info: KernelInfo


def _build(architectures: Sequence[str]) -> list[_Built]:
    """Compile every instance for every architecture, in threads: NVRTC releases the interpreter lock.

    Each on its own, as a launch asks for it, so that a launch finds it in the cache.
    """

    def build(instance: Instance, arch: str) -> _Built:
        return _Built(instance, arch, compile(instance.source, arch, (instance.name,)).kernels[instance.name])

    wanted = [(i, arch) for i in instances() for arch in dict.fromkeys(architectures) if arch in i.architectures]
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with progress, ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        futures = [pool.submit(build, *each) for each in wanted]
        try:
            for _ in progress.track(as_completed(futures), total=len(futures)):
                pass
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _kernels(options: argparse.Namespace) -> int:
    built = _build(options.arch)
    if options.json:
        return _print_json(
            [
                {
                    "source": b.instance.source,
                    "name": b.instance.name,
                    "arch": b.arch,
                    "registers": b.info.registers,
                    "register_budget": b.instance.registers,
                    "shared_bytes": b.info.shared_bytes,
                    "spill_store_bytes": b.info.spill_store_bytes,
                    "spill_load_bytes": b.info.spill_load_bytes,
                    "stack_bytes": b.info.stack_bytes,
                    "max_threads": b.info.max_threads,
                }
                for b in built
            ]
        )
    table = _table("Registers a thread and the budget for them; static shared memory, spills and stack in bytes")
    table.add_column("kernel", overflow="fold")
    table.add_column("arch")
    for heading in ("regs", "budget", "shared", "spills", "stack"):
        table.add_column(heading, justify="right")
    last = ""
    for b in built:
        name, last = ("" if b.instance.name == last else b.instance.name), b.instance.name
        spills = b.info.spill_store_bytes + b.info.spill_load_bytes
        numbers = (b.info.registers, b.instance.registers, b.info.shared_bytes, spills, b.info.stack_bytes)
        table.add_row(escape(name), b.arch, *(str(n) for n in numbers))
    console = _Output()
    if not console.is_terminal:
        console.width = max(console.width, FILE_COLUMNS)
    console.print(table)
    return 0


def _warmup(options: argparse.Namespace) -> int:
    before, start = cache_info(), time.perf_counter()
    built = _build(options.arch)
    seconds, after = time.perf_counter() - start, cache_info()
    compiled = after.misses - before.misses
    facts = {
        "kernels": len(built),
        "compiled": compiled,
        "already_cached": len(built) - compiled,
        "seconds": seconds,
        "architectures": list(dict.fromkeys(options.arch)),
        "cache_problem": after.problem,
    }
    if options.json:
        _print_json(facts)
    else:
        print(f"{len(built)} kernels: {compiled} compiled, {len(built) - compiled} already cached, {seconds:.1f} s")
        if after.problem:
            print(f"Nothing was kept for later: {after.problem}")
    return 1 if after.problem else 0


# -------------------------------------------------------------------------------------------------------- cache


def _cache(options: argparse.Namespace) -> int:
    if options.action == "clear":
        removed = cache_clear()
        if options.json:
            return _print_json({"removed": removed})
        print(f"{removed} entries removed")
        return 0
    info = cache_info()
    if options.json:
        place = str(info.directory) if info.directory else None
        return _print_json(dataclasses.asdict(info) | {"directory": place})
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("directory", escape(str(info.directory)))
    table.add_row("entries", f"{info.entries}, {info.bytes / 2**20:.1f} MiB")
    table.add_row("hits", f"{info.total_hits} since it was cleared, {info.hits} in this process")
    table.add_row("misses", f"{info.total_misses} since it was cleared, {info.misses} in this process")
    if info.problem:
        table.add_row("problem", escape(info.problem))
    _Output().print(table)
    return 0


# ------------------------------------------------------------------------------------------------------ emulate


def _emulate(options: argparse.Namespace) -> int:
    if options.list:
        found = emulate.entries(options)
        if options.json:
            return _print_json([dataclasses.asdict(entry) for entry in found])
        emulate.show_entries(found, _Output())
        return 0
    outcome = emulate.run(options, None if options.json else print)
    if options.json:
        _print_json(outcome.as_json())
    else:
        emulate.show(outcome, _Output(), options.histogram)
    return 1 if outcome.fault else 0


# ----------------------------------------------------------------------------------------------------- selftest


def _selftest(options: argparse.Namespace) -> int:
    def say(line: str) -> None:
        print(line, file=sys.stderr if options.json else sys.stdout, flush=True)

    document = selftest.run(options, say)
    if options.json:
        _print_json(document)
    return int(document["exit_status"])
