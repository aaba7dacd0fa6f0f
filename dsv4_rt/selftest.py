"""Everything a GPU can judge of this package, in one command and one report: python -m dsv4_rt selftest.

Steps run one after the other, each in a process group of its own with a time limit; one that fails or hangs does not
stop the others, and Ctrl-C still leaves a report. What could not run (a tool that is missing or refuses) counts as not
passed. The steps are the scripts and tests of the source checkout, which an installed wheel does not have.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from dsv4_rt import doctor
from dsv4_rt.cuda_device import cuda_device_count
from dsv4_rt.errors import Dsv4Error

ROOT: Final = Path(__file__).absolute().parents[1]
NEEDED_FILES: Final = ("tests/conformance/everything.py", "tests/conformance/tcgen05_run.py", "bench/harness.py")
NEEDED_PACKAGES: Final = ("pytest", "cupy", "ml_dtypes")
VERSIONS: Final = ("numpy", "cupy-cuda13x", "cuda-bindings", "torch", "triton", "pytest", "pytest-xdist")
BLACKWELL: Final = ("sm_100a", "sm_103a")
BENCHES: Final = ("router", "kv", "linear", "memory_kernels", "launch")
WORKERS: Final = 8  # processes that share the GPU while tests run
GRACE: Final = 5.0  # seconds between asking a step to end and ending it

# Tests that a sanitizer is spared: a hundred shapes each compiled anew, torch's own kernels, a thousand replays, a
# hundred thousand rows; and what it takes away: host times, calls that return while the device works.
SPARED: Final = ("random_shapes", "torch", "interleaved", "many", "host_does", "waits_for_nothing")
CLEAN: Final = r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"
SOME_PASSED: Final = r"\b[1-9]\d* passed"


@dataclass(frozen=True)
class Step:
    """One command. It has passed if it ends with 0 and every pattern of `shows` is found in its output."""

    name: str
    what: str
    command: tuple[str, ...]
    seconds: float
    shows: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()  # GPUs it is for; empty: all
    lacks: str = ""  # why it cannot run on this machine


@dataclass
class Verdict:
    """passed, FAILED, TIMED OUT, NOT RUN, INTERRUPTED, or `for others`: the step is not for this GPU."""

    step: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    output: str = ""  # file

    @property
    def good(self) -> bool:
        return self.state in ("passed", "for others")


def steps(out: Path, arch: str, commit: str) -> list[Step]:
    """All steps in their order; `out` is where they put their files, `arch` that of the GPU or empty."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m")
    folders = [p.name for p in sorted((ROOT / "tests").glob("*/")) if any(p.glob("test_*.py"))]
    tests = [f"tests/{name}" for name in folders if name not in ("emulator", "conformance")]  # those: conformance
    families = [name for name in tests if name != "tests/core"]
    parallel = ("-n", str(min(WORKERS, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    warmup = (python, "-m", "dsv4_rt", "warmup", *(("--arch", arch) if arch else ()))
    forms = (python, "tests/conformance/tcgen05_run.py", "--on", "cuda", "--commit", commit, "--out")
    everything = (python, "tests/conformance/everything.py", "--out", str(out / "conformance"), "--commit", commit)
    found = [
        Step("doctor", "what is installed; a small kernel on each device", (python, "-m", "dsv4_rt", "doctor"), 300),
        Step("warmup", "every kernel compiled for this GPU", warmup, 900),
        Step(
            "tests", "tests of the kernels and the launch layer",
            (*pytest, "gpu", *parallel, *tests), 2400, (SOME_PASSED,),
        ),
        Step(
            "tcgen05", "tcgen05 forms against NumPy and the emulator",
            (*forms, str(out / "tcgen05")), 1200, (), BLACKWELL,
        ),
        Step(
            "tcgen05-checked", "the same, tensor-memory accesses checked by code that ptxas adds",
            (*forms, str(out / "tcgen05-checked"), "--access-check"), 1200, (), BLACKWELL,
        ),
        Step("conformance", "what else of the emulator a GPU judges", everything, 3600),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer") or ""
    spared = " and ".join(f"not {word}" for word in SPARED)
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        check = (sanitizer or "compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", "--tool", tool)
        command = (*check, *pytest, "gpu and not slow", "-k", spared, *families)
        lacks = "" if sanitizer else "compute-sanitizer is not found; it comes with the CUDA toolkit: put it on PATH"
        what = f"compute-sanitizer {tool} over the kernel families"
        found.append(Step(tool, what, command, 1800, (SOME_PASSED, CLEAN), lacks=lacks))
    for name in BENCHES:
        rows = str(out / f"bench-{name}.jsonl")
        found.append(Step(f"bench-{name}", f"bench/{name}.py", (python, f"bench/{name}.py", "--out", rows), 1200))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m dsv4_rt selftest`."""
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default: selftest-DATE-TIME)")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step only; may be given again")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="let no step take longer than this")
    parser.add_argument("--commit", default="", help="of the checkout, where there is no git to ask")
    parser.add_argument("--list", action="store_true", help="show steps and commands, run nothing")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Run the steps, or list them; returns the report as a document, with its exit status.

    Raises:
        Dsv4Error: no checkout, no GPU, a package or a step that does not exist.
    """
    _check_checkout()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = (options.out or Path(f"selftest-{stamp}")).absolute()
    commit = options.commit or _commit()
    if options.list:
        chosen = _chosen(steps(out, "", commit), options.only)
        for step in chosen:
            where = f" ({' and '.join(step.archs)} only)" if step.archs else ""
            say(f"{step.name:15} {step.what}{where}, {step.seconds:g} s at most\n    {shlex.join(step.command)}")
            if step.lacks:
                say(f"    cannot run here: {step.lacks}")
        return {"steps": [dataclasses.asdict(step) for step in chosen], "exit_status": 0}
    arch = _gpu()
    chosen = _chosen(steps(out, arch, commit), options.only)
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(commit)
    say(f"{facts['GPU']}; report: {out / 'report.md'}")
    verdicts: list[Verdict] = []
    for verdict in perform(chosen, arch, out, options.limit, say, commit):
        verdicts.append(verdict)
        write(out, facts, verdicts, [step.name for step in chosen])
    status = int(not all(v.good for v in verdicts))
    say(f"{summary(verdicts)}; exit status {status}; {out / 'report.md'}")
    return {"facts": facts, "steps": [dataclasses.asdict(v) for v in verdicts], "exit_status": status}


def perform(
    chosen: Sequence[Step], arch: str, out: Path, limit: float | None, say: Callable[[str], None], commit: str = ""
) -> Iterator[Verdict]:
    """Run steps one after the other; a verdict after each, for the rest too if somebody interrupts."""
    interrupted = False
    for step in chosen:
        if interrupted:
            verdict = Verdict(step.name, "NOT RUN", detail="interrupted before")
        elif step.archs and arch not in step.archs:
            verdict = Verdict(step.name, "for others", detail=f"only on {' and '.join(step.archs)}")
        elif step.lacks:
            verdict = Verdict(step.name, "NOT RUN", detail=step.lacks)
        else:
            say(f"{step.name} ...")
            verdict = execute(step, out, min(step.seconds, limit or step.seconds), commit)
            interrupted = verdict.state == "INTERRUPTED"
        say(f"{step.name:15} {verdict.state:11} {verdict.seconds:6.0f} s  {verdict.detail}")
        yield verdict


def execute(step: Step, out: Path, seconds: float, commit: str = "") -> Verdict:
    """Run one step's command to its end, its time limit or a Ctrl-C."""
    path = out / f"{step.name}.txt"
    python_path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = os.environ | {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "BENCH_COMMIT": commit}
    start = time.monotonic()
    with path.open("w") as output:
        output.write(f"$ {shlex.join(step.command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Verdict(step.name, "NOT RUN", 0.0, f"{step.command[0]}: {error.strerror}", path.name)
        state = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            state = "TIMED OUT"
        except KeyboardInterrupt:
            state = "INTERRUPTED"
        finally:
            _end(process)
    took = time.monotonic() - start
    text = path.read_text(errors="replace")
    detail = _last_line(text)
    if state:
        return Verdict(step.name, state, took, f"after {took:.0f} s; last: {detail}", path.name)
    missing = [pattern for pattern in step.shows if not re.search(pattern, text)]
    if process.returncode:
        return Verdict(step.name, "FAILED", took, f"exit status {process.returncode}: {detail}", path.name)
    if missing:
        return Verdict(step.name, "FAILED", took, f"no {' and no '.join(missing)} in its output: {detail}", path.name)
    return Verdict(step.name, "passed", took, detail, path.name)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a step, its own children included."""
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _last_line(text: str) -> str:
    """What a tool says in the end: a sanitizer's summary, pytest's, or simply the last line."""
    lines = [line.strip() for line in text.split("\n")[1:] if line.strip()]
    told = [line.strip("= ") for line in lines if re.search(r"SUMMARY: |\d+ (passed|failed|error)\b.* in \d", line)]
    return "; ".join(told[-2:])[:300] if told else lines[-1][:300] if lines else "no output"


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many of each."""
    states = [v.state for v in verdicts]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def write(out: Path, facts: dict[str, str], verdicts: Sequence[Verdict], planned: Sequence[str]) -> None:
    """report.md and report.json, complete or as far as the steps have come."""
    done = len(verdicts) == len(planned)
    good = all(v.good for v in verdicts)
    status = f"{0 if good else 1}" if done else f"not yet: {len(verdicts)} of {len(planned)} steps are done"
    lines = ["# dsv4_rt selftest", "", f"{summary(verdicts)}. Exit status {status}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    lines += ["", "| step | verdict | seconds | what it says in the end | output |", "|---|---|---|---|---|"]
    lines += [f"| {v.step} | {v.state} | {v.seconds:.0f} | {_cell(v.detail)} | {v.output} |" for v in verdicts]
    lines += ["", "Output lies beside this file; `for others`: a step for another GPU. NOT RUN is not passed."]
    temporary = out / "report.md.new"
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(out / "report.md")
    document = {"facts": facts, "steps": [dataclasses.asdict(v) for v in verdicts], "complete": done}
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _chosen(found: list[Step], only: Sequence[str] | None) -> list[Step]:
    unknown = [name for name in only or () if name not in [step.name for step in found]]
    if unknown:
        names = ", ".join(step.name for step in found)
        raise Dsv4Error(f"selftest: --only {unknown[0]}: there is no such step; steps: {names}")
    return [step for step in found if not only or step.name in only]


def _check_checkout() -> None:
    lacking = [name for name in NEEDED_FILES if not (ROOT / name).is_file()]
    if lacking:
        raise Dsv4Error(
            f"selftest: needs the source checkout, and {ROOT} has no {lacking[0]}: an installed wheel brings neither "
            'tests nor benches. Get the sources, `pip install -e ".[test,bench]"` there, and run it there'
        )


def _gpu() -> str:
    """The architecture of cuda:0. Raises Dsv4Error where steps cannot run, with the remedy."""
    if not cuda_device_count():
        raise Dsv4Error(
            "selftest: there is no CUDA device here; it judges a B200, B300, H100 or H200. Without one `pytest -q` "
            "runs everything on the emulator, and `python -m dsv4_rt doctor` says what is missing"
        )
    for name in NEEDED_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise Dsv4Error(f'selftest: {name} is not installed: pip install -e ".[test,bench]" in {ROOT}')
    gpu = doctor.gpus()[0]
    if gpu.arch is None:
        raise Dsv4Error(f"selftest: no kernel exists for cuda:0, {gpu.name} of compute capability {gpu.capability}")
    return gpu.arch


def _facts(commit: str) -> dict[str, str]:
    """What the steps run on, with and from."""
    found = doctor.examine("cuda:0")
    packages = []
    for name in VERSIONS:
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"{name} not installed")
    gpus = [f"{gpu.name}, {gpu.arch}, {gpu.memory_bytes / 2**30:.0f} GiB" for gpu in found.gpus]
    missing = [f"{lack.what}: {lack.remedy}" for lack in found.missing]
    return {
        "GPU": gpus[0] + (f" (and {len(gpus) - 1} more)" if len(gpus) > 1 else ""),
        "driver": f"{_driver()}, for CUDA {found.driver}",
        "compiler": str(found.compiler),
        "dsv4_rt": f"{found.version}, commit {commit}",
        "host": f"{found.system}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "packages": ", ".join(packages),
        "missing": "; ".join(missing) or "nothing",
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join([sys.executable, "-m", "dsv4_rt", *sys.argv[1:]]),
    }


def _driver() -> str:
    """The release of the kernel module: "580.159.04"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "release unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found.group() if found else "release unknown"


def _commit() -> str:
    """Of the checkout; "unknown" where there is no git or no history."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
