"""Run the tcgen05 forms on a Blackwell GPU or the emulator and judge what came out.

    python tests/conformance/tcgen05_run.py --on cuda --out FOLDER       # on a machine with a B200 or B300
    python tests/conformance/tcgen05_run.py --on emulator --out FOLDER   # judges the emulator by NumPy

--on cuda compares bits with the emulator too, and every result with float64: FOLDER/tcgen05.txt says for each form what
share of the results is equal bit for bit, and the largest error as a part of what may be. --access-check has ptxas add
checks of tensor-memory accesses. The forms run in a process of their own: one that stops the GPU is reported, and the
others run in the next. Exit status: 0 nothing is wrong, 1 something is, 2 there is no such GPU.

What may be. Integers small enough to be exact are exact, cells that no instruction writes keep what they held, moves
and marks are NumPy's. Else a step adds k products and the accumulator in a unit that loses, of each, what lies F bits
below the largest, and then rounds once: the error grows by (k + 1) 2^-F S + 2^-m |D|, S the sum of the magnitudes,
2^-133 at least. No B200 has been measured. F = m = 23, which is fp32, is asked of f16, bf16 and tf32; F = m = 13 of
8-bit factors, as Hopper's unit has it; m = 10 of an f16 accumulator, whatever its rounding. The emulator is held to
what it says of itself: exact sums in float64 (F = 47), m = 23, or 11 for f16, which it rounds to nearest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "emulator"), str(HERE.parents[1])]

from operands import SEED  # noqa: E402
from programs import nvrtc_ptx  # noqa: E402
from tcgen05_forms import IMAGE, NARROW, Tcgen05Form, all_forms, cuda, inputs  # noqa: E402
from tcgen05_numpy import MORE, copied, decode, elements, factors, marks, moved, scales  # noqa: E402
from tensor_operands import FORMATS, MANNERS  # noqa: E402

from dsv4_rt.emulator import mma  # noqa: E402
from dsv4_rt.errors import UnsupportedInstruction  # noqa: E402

ARCHITECTURES = {(10, 0): "sm_100a", (10, 3): "sm_103a"}
POISON = 0xA5A5A5A5
SHARED = IMAGE + 1024
FORM_SECONDS = 20  # of a form on a GPU, compilation left out
ACCESS_CHECK = "--ptxas-options=--g-tensor-memory-access-check"
Results = dict[str, np.ndarray]
LEAST = 2.0**-133  # no unit that is known aligns to a smaller one
EXACT = "ints"  # the manner whose sums are exact
# Sums that hardware is known to make (emulator/mma.py): those of Hopper's wide kinds, and of its 8-bit kinds.
UNITS = {"F = 25": mma.WIDE, "F = 13, m = 13": mma.NARROW}


def shared_bytes(form: Tcgen05Form) -> int:
    """Dynamic shared memory of a form."""
    return SHARED if form.product or form.family == "copy" else 0


def blank(form: Tcgen05Form) -> Results:
    """The result arrays before the launch."""
    return {
        "after": np.full((form.ctas, 128, form.columns), POISON, np.uint32),
        "registers": np.full((form.ctas, 128, form.registers), POISON, np.uint32),
    }


def on_emulator(forms: list[Tcgen05Form], seed: int = SEED, completion: str = "early") -> dict[str, Results]:
    """Results by form's name, of those that the emulator does not refuse."""
    from dsv4_rt.emulator import Machine

    source, entries = cuda(forms)
    machine = Machine("sm_100a", completion=completion, seed=seed)
    options = ["--gpu-architecture=sm_100a", "--std=c++17"]
    module = machine.load(nvrtc_ptx(source, "tcgen05_forms.cu", options), "tcgen05")
    found = {}
    for form in forms:
        data, out = inputs(form, seed), blank(form)
        arrays = [data.get("before"), data.get("table"), data.get("image"), out["after"], out["registers"]]
        arrays = [a if a is not None and a.size else None for a in arrays]
        params = b"".join((0 if a is None else a.ctypes.data).to_bytes(8, "little") for a in arrays)
        present = [a for a in arrays if a is not None]
        tokens = [machine.memory.register(a.ctypes.data, a.nbytes, label="operand", keep=a) for a in present]
        try:
            machine.launch(
                module, entries[form.name], form.ctas, 128, params + form.columns.to_bytes(4, "little"),
                dynamic_shared=shared_bytes(form), cluster=form.cluster if form.cluster > 1 else None,
            )  # fmt: skip
            found[form.name] = out
        except UnsupportedInstruction:
            continue
        finally:
            for token in tokens:
                machine.memory.unregister(token)
    return found


# On a GPU: a child runs forms until one kills it, and saves each.


def gpu_arch() -> str:
    """The architecture of the first GPU, or why it cannot run tcgen05."""
    from dsv4_rt.cuda_device import cuda_device_count

    if not cuda_device_count():
        return ""
    from cuda.bindings import driver as cu

    attr, handle = cu.CUdevice_attribute, cu.cuDeviceGet(0)[1]
    found = [
        int(cu.cuDeviceGetAttribute(getattr(attr, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{each}"), handle)[1])
        for each in ("MAJOR", "MINOR")
    ]
    return ARCHITECTURES.get((found[0], found[1]), "")


def cubin(source: str, arch: str, access_check: bool) -> bytes:
    """The forms' kernels as machine code."""
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={arch}", "--std=c++17", *([ACCESS_CHECK] if access_check else [])]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"tcgen05_forms.cu", 0, [], [])
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [each.encode() for each in options])
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, log)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise SystemExit(f"tcgen05_forms.cu does not compile for {arch}: {log.decode()}")
    code = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    return bytes(code)


def child(folder: Path, seed: int) -> None:
    """Run the forms whose numbers standard input gives, one .npz each; the kernels are in FOLDER/forms.cubin."""
    from kernels import Cuda

    device, forms = Cuda(), all_forms()
    d, call = device.driver, device._call
    module = call(d.cuModuleLoadData((folder / "forms.cubin").read_bytes()))
    entries = json.loads((folder / "entries.json").read_text())
    for number in (int(line) for line in sys.stdin):
        form = forms[number]
        data, out = inputs(form, seed), blank(form)
        arrays = [data.get("before"), data.get("table"), data.get("image"), out["after"], out["registers"]]
        params = np.zeros(6, np.uint64)
        for i, array in enumerate(arrays):
            if array is not None and array.size:
                params[i] = int(call(d.cuMemAlloc(array.nbytes)))
                call(d.cuMemcpyHtoD(int(params[i]), array.ctypes.data, array.nbytes))
        params[5] = form.columns
        pointers = np.array([params.ctypes.data + 8 * i for i in range(6)], np.uint64)
        function = call(d.cuModuleGetFunction(module, entries[form.name].encode()))
        shared = shared_bytes(form)
        attribute = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call(d.cuFuncSetAttribute(function, attribute, shared))
        call(d.cuLaunchKernel(function, form.ctas, 1, 1, 128, 1, 1, shared, 0, int(pointers.ctypes.data), 0))
        call(d.cuCtxSynchronize())
        for i, name in ((3, "after"), (4, "registers")):
            if out[name].size:
                call(d.cuMemcpyDtoH(out[name].ctypes.data, int(params[i]), out[name].nbytes))
        for pointer in params[:5]:
            if pointer:
                call(d.cuMemFree(int(pointer)))
        np.savez(folder / f"{number}.npz", **out)
        print(number, flush=True)


def on_cuda(numbers: list[int], folder: Path, command: list[str], seconds: float = FORM_SECONDS) -> dict[int, str]:
    """Run forms in children; {number: why it has no result}. `command` starts a child.

    A child that says nothing for so long is ended, and the form it had in hand is the culprit.
    """
    failed: dict[int, str] = {}
    left = list(numbers)
    while left:
        text = "".join(f"{number}\n" for number in left)
        with (
            (folder / "child.txt").open("w+") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, text=True
            ) as process,
        ):
            assert process.stdin is not None
            process.stdin.write(text)
            process.stdin.close()
            why = _watch(process, folder, left, seconds)
            log.seek(0)
            last = (log.read().strip().split("\n") or [""])[-1]
        left = [number for number in left if not (folder / f"{number}.npz").exists()]
        if left:
            failed[left[0]] = why or last or f"the process ended with {process.returncode}"
            left = left[1:]
    return failed


def _watch(process: subprocess.Popen[str], folder: Path, numbers: list[int], seconds: float) -> str:
    """Wait for a child while results keep coming; why it was ended, or nothing."""
    before = 0
    while True:
        try:
            process.wait(seconds)
            return ""
        except subprocess.TimeoutExpired:
            now = sum((folder / f"{number}.npz").exists() for number in numbers)
            if now == before:
                process.kill()
                return f"no end after {seconds:g} s"
            before = now


# Verdicts.


@dataclass
class Verdict:
    """equal (right, and the emulator's bit for bit), right (within what may be), FAILED, or refused by the emulator."""

    name: str
    state: str
    words: int = 0  # compared
    equal: int = 0
    worst: float = 0.0  # largest error as a part of what may be
    note: str = ""


@dataclass
class _Bounds:
    fraction: int  # F
    mantissa: int  # m


def _bounds(types: tuple[str, str, str], hardware: bool) -> _Bounds:
    a, _, d = types
    if not hardware:
        return _Bounds(47, 11 if d == "f16" else 23)
    narrow = a in ("e4m3", "e5m2", *NARROW)
    return _Bounds(13 if narrow else 23, 10 if d == "f16" else 13 if narrow else 23)


def _at_least(ty: str, x: np.ndarray) -> np.ndarray:
    """Magnitudes as a unit aligns them: a subnormal has the least normal exponent."""
    if ty == "ue8m0":
        return np.abs(x)
    e, _, _ = (FORMATS | MORE)["e2m1" if ty == "e2m1x2" else ty]
    return np.where(x == 0, 0.0, np.maximum(np.abs(x), 2.0 ** (2 - (1 << e - 1))))


def _teams(form: Tcgen05Form, array: np.ndarray) -> np.ndarray:
    """[CTAs, ...] as [teams, CTAs of one, ...]."""
    return array.reshape(-1, form.group, *array.shape[1:])


def _product(form: Tcgen05Form, data: Results, got: Results, hardware: bool) -> tuple[float, list[str]]:
    """(largest error as a part of what may be, what is wrong)."""
    p = form.product
    assert p is not None
    bounds, worst, wrong = _bounds(p.types, hardware), 0.0, []
    half, changes = p.types[2] == "f16", p.changes
    bits = np.uint32(0xFFFF if half else 0xFFFFFFFF)
    limit, least = (65504.0, 2.0**-24) if half else (2.0**128, 2.0**-149)
    elsewhere = np.ones((p.group, 128, form.columns), bool)
    elsewhere[tuple(each[changes] for each in p.cells)] = False
    for team, (before, after) in enumerate(zip(_teams(form, data["before"]), _teams(form, got["after"]), strict=True)):
        manner = MANNERS[team % len(MANNERS)]
        where = f"CTA {team * p.group} ({manner})"
        changed = int((before != after)[elsewhere].sum())
        if changed:
            wrong.append(f"{where}: {changed} words beside the result changed")
        total = decode(p.types[2], before[p.cells] & bits) * 2.0**-p.shrink
        if not data["table"][team * p.group, 9]:
            total = np.zeros_like(total)
        error, large = np.full_like(total, least if p.shrink else 0.0), np.zeros(total.shape, bool)
        with np.errstate(all="ignore"):
            for step in range(p.steps):
                ab, scale = factors(form, data, team, step), scales(form, data, team, step)
                sizes = [
                    _at_least(ty, np.where(np.isfinite(x), x, 0.0)) * _at_least(p.scale_type, np.nan_to_num(s))
                    for ty, x, s in zip(p.types, ab, scale, strict=False)
                ]
                size = sizes[0] @ sizes[1].T + error
                size += _at_least(p.types[2], np.where(np.isfinite(total), total, 0.0))
                total = total + (ab[0] * scale[0]) @ (ab[1] * scale[1]).T
                error += (p.depth + 1) * 2.0**-bounds.fraction * np.maximum(size, LEAST)
                error += 2.0**-bounds.mantissa * (np.abs(np.where(np.isfinite(total), total, 0.0)) + error) + least
                large |= np.isfinite(total) & (np.abs(total) + error >= limit)
            result = decode(p.types[2], after[p.cells] & bits)
            same = np.where(np.isfinite(total), np.isfinite(result), result == total)
            same |= np.isnan(total) & np.isnan(result)
            part = np.where(np.isfinite(total) & np.isfinite(result), np.abs(result - total) / error, 0.0)
        if manner == EXACT and not p.shrink:
            part = np.where(result == total, 0.0, np.inf)
        judged = ~large & changes
        part = np.where(judged, part, 0.0)
        special = int((~same & judged).sum())
        if special:
            wrong.append(f"{where}: {special} infinities or NaN differ")
        worst = max(worst, float(part.max()))
        if part.max() > 1:
            m, n = (int(i) for i in np.unravel_index(int(part.argmax()), part.shape))
            values = f"D[{m}, {n}] is {result[m, n]:.9g}, {total[m, n]:.9g} in float64"
            wrong.append(f"{where}: {values}; {int((part > 1).sum())} such")
    return worst, wrong


def has_units(form: Tcgen05Form) -> bool:
    """Whether `by_unit` knows this product's operands."""
    p = form.product
    return p is not None and not p.vector and not p.shrink and not set(p.types) & set(NARROW)


def by_unit(form: Tcgen05Form, data: Results, unit: str) -> Results:
    """What a product would be on hardware whose sums are those of a unit that is known: see UNITS."""
    p = form.product
    assert p is not None
    after, half = data["before"].copy(), p.types[2] == "f16"
    for team, cells in enumerate(_teams(form, after)):
        before = cells[p.cells]
        d = (before & np.uint32(0xFFFF)).astype(np.uint16) if half else before
        d = d if data["table"][team * p.group, 9] else np.zeros_like(d)
        for step in range(p.steps):
            a, b = (np.ascontiguousarray(x.T)[:, :, None] for x in elements(form, data, team, step))
            with np.errstate(all="ignore"):
                d = mma.dot(a, b, d[:, :, None], p.types, UNITS[unit], p.negate[0] != p.negate[1])[:, :, 0]
            d = np.ascontiguousarray(d)
        cells[p.cells] = np.where(p.changes, d, before)
    return {"after": after}


def _equal(form: Tcgen05Form, got: Results, other: Results) -> tuple[int, int]:
    """(words compared, equal ones): not where columns lie, nor the unused half of an f16 accumulator."""
    apart = _teams(form, got["after"] ^ other["after"])
    p = form.product
    if p is not None and p.types[2] == "f16":
        mask = np.full(apart.shape[1:], 0xFFFFFFFF, np.uint32)
        mask[p.cells] = 0xFFFF
        apart = apart & mask
    words, equal = apart.size, int((apart == 0).sum())
    if form.family == "move":
        words, equal = words + got["registers"].size, equal + int((got["registers"] == other["registers"]).sum())
    return words, equal


def _remark(form: Tcgen05Form, data: Results, got: Results) -> str:
    """What hardware is free to choose, for the record."""
    if form.family == "alloc":
        bases = got["registers"][0, 0]
        return f"columns {', '.join(str(int(base) & 0xFFFF) for base in bases)}"
    p = form.product
    if p is None or p.types[2] != "f16":
        return ""
    high, before = (_teams(form, each)[:, *p.cells] >> 16 for each in (got["after"], data["before"]))
    return f"upper halves: {(high == 0).mean():.0%} zero, {(high == before).mean():.0%} as before"


def judge(form: Tcgen05Form, data: Results, got: Results, emulator: Results | None, on: str = "cuda") -> Verdict:
    """A GPU's result against NumPy and the emulator's if there is one; on "emulator", its own against NumPy."""
    worst, wrong = 0.0, []
    if form.family in ("move", "copy"):
        wanted = dict(zip(("registers", "after"), moved(form, data["before"]), strict=True)) if form.registers else {}
        for name, want in (wanted or {"after": copied(form, data)}).items():
            bad = int((got[name] != want).sum())
            wrong += [f"{bad} of {want.size} words of {name} differ"] if bad else []
    elif form.family == "alloc":
        bad = int((got["after"] != marks(form)).sum())
        wrong += [f"{bad} of {got['after'].size} marks were lost"] if bad else []
        lanes = int((got["registers"] >> 16 != 0).sum()) + int((got["registers"] % 32 != 0).sum())
        wrong += [f"{lanes} bases name a lane, or are no multiple of 32"] if lanes else []
    else:
        worst, wrong = _product(form, data, got, on == "cuda")
    words, equal = _equal(form, got, emulator) if emulator and on == "cuda" else (0, 0)
    notes = [*wrong[:4], *([f"and {len(wrong) - 4} more"] if len(wrong) > 4 else [])]
    notes += [each for each in (form.note if wrong else "", _remark(form, data, got)) if each]
    if has_units(form) and equal < words:
        for unit in UNITS:
            compared, alike = _equal(form, got, by_unit(form, data, unit))
            notes.append(f"{alike / compared:.4%} equal to sums of {unit}")
    if on == "cuda" and not emulator:
        notes.append("the emulator does not have it")
    state = "FAILED" if wrong else "equal" if words and equal == words else "right"
    return Verdict(form.name, state, words, equal, worst, "; ".join(notes))


def report(forms: list[Tcgen05Form], verdicts: list[Verdict], conditions: dict[str, object]) -> str:
    """The text of the report."""
    families = {form.name: form.family for form in forms}
    count = Counter(v.state for v in verdicts)
    lines = [
        ", ".join(f"{name} {value}" for name, value in conditions.items() if value != ""),
        f"{len(verdicts)} forms: {count['equal']} equal bit for bit, {count['right']} right, {count['FAILED']} FAILED"
        + (f", {count['refused']} refused by the emulator" if count["refused"] else ""),
        "",
        f"{'family':10} forms  equal  right  FAILED   equal words  largest error / allowed",
    ]
    for family in dict.fromkeys(families.values()):
        mine = [v for v in verdicts if families[v.name] == family]
        if mine:
            n = Counter(v.state for v in mine)
            share = sum(v.equal for v in mine) / max(sum(v.words for v in mine), 1)
            row = f"{family:10} {len(mine):5}  {n['equal']:5}  {n['right']:5}  {n['FAILED']:6}   {share:11.4%}"
            lines.append(f"{row}  {max(v.worst for v in mine):.3g}")
    lines.append("")
    for v in verdicts:
        share = f"{v.equal / v.words:9.4%}" if v.words else "         "
        lines.append(f"{v.state:7} {share} {v.worst:9.3g}  {v.name}{': ' + v.note if v.note else ''}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("emulator", "cuda"))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--commit", default="")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default="", metavar="TEXT", help="forms whose names hold this")
    parser.add_argument("--access-check", action="store_true", help="let ptxas check accesses of tensor memory")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.out, args.seed)
        return 0
    everything = all_forms()
    numbers = [i for i, form in enumerate(everything) if args.only in form.name]
    forms = [everything[i] for i in numbers]
    if not forms:
        parser.error(f"no form's name holds {args.only!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    conditions: dict[str, object] = {"on": args.on, "seed": args.seed, "date": datetime.date.today()}
    conditions["commit"] = args.commit
    failed: dict[int, str] = {}
    if args.on == "cuda":
        arch = gpu_arch()
        if not arch:
            print("tcgen05_run.py: the first GPU is no B200 or B300 (compute capability 10.0 or 10.3)", file=sys.stderr)
            return 2
        conditions |= {"architecture": arch, "build": "checked accesses" if args.access_check else ""}
        source, entries = cuda(forms)
        (args.out / "forms.cubin").write_bytes(cubin(source, arch, args.access_check))
        (args.out / "entries.json").write_text(json.dumps(entries))
        for old in args.out.glob("*.npz"):
            old.unlink()
        command = [sys.executable, __file__, "--child", "--out", str(args.out), "--seed", str(args.seed)]
        failed = on_cuda(numbers, args.out, command)
    emulated = on_emulator(forms, args.seed)
    verdicts = []
    for number, form in zip(numbers, forms, strict=True):
        if number in failed:
            verdicts.append(Verdict(form.name, "FAILED", note=f"{failed[number]}; {form.note}".strip("; ")))
            continue
        data = inputs(form, args.seed)
        if args.on == "cuda":
            path = args.out / f"{number}.npz"
            with np.load(path) as file:
                verdicts.append(judge(form, data, dict(file), emulated.get(form.name)))
            path.unlink()
        elif form.name in emulated:
            verdicts.append(judge(form, data, emulated[form.name], None, "emulator"))
        else:
            verdicts.append(Verdict(form.name, "refused"))
    text = report(forms, verdicts, conditions)
    (args.out / "tcgen05.txt").write_text(text)
    (args.out / "tcgen05.json").write_text(json.dumps([asdict(v) for v in verdicts], indent=0) + "\n")
    print(text)
    return int(any(v.state == "FAILED" for v in verdicts))


if __name__ == "__main__":
    raise SystemExit(main())
