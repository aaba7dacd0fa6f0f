"""Verdicts on a GPU's results against the emulator's, and their record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from forms import LEFT_OUT, Form

from kernels import inputs

Outs = list[np.ndarray]

# Forms that may differ from the hardware, by name, each with the reason. A form without one fails.
ACCEPTED: dict[str, str] = {
    **dict.fromkeys(
        ("tanh.approx.bf16", "tanh.approx.bf16x2"),
        "tanh(0.746) is off by 0.0039065, a little more than the 2^-8 the ISA states; one unit in the last place",
    )
}


@dataclass(frozen=True)
class Bound:
    """What the PTX ISA promises of an approximate form: `error` in `unit`, where `domain` of the operands holds."""

    exact: Callable[..., Any]
    unit: str
    error: float
    domain: Callable[..., Any] = lambda *v: np.isfinite(v[0])


def _normal(x: Any) -> Any:
    return np.isfinite(x) & (np.abs(x) >= 2.0**-126)


def _near_one(x: Any) -> Any:
    return (x > 0.5) & (x < 2)


# Source: PTX ISA, the instruction's own page; for rcp.approx.ftz.f64 and rsqrt.approx.f64 it states none, and 2^-20
# (that of the gross rsqrt) and 2^-51 (a precise one) stand in.
BOUNDS: dict[str, Bound] = {
    "rcp.approx.f32": Bound(lambda x: 1 / x, "ulp", 1),
    "sqrt.approx.f32": Bound(np.sqrt, "relative", 2.0**-23),
    "rsqrt.approx.f32": Bound(lambda x: 1 / np.sqrt(x), "relative", 2.0**-22.9),
    # 2^-20.5 is the ISA's. An H200 showed 6.78e-7, 0.6 % above it: the result's own rounding (half an ulp below 1) is
    # allowed besides.
    "sin.approx.f32": Bound(np.sin, "absolute", 2.0**-20.5 + 2.0**-25, lambda x: np.abs(x) <= 2 * np.pi),
    "cos.approx.f32": Bound(np.cos, "absolute", 2.0**-20.5 + 2.0**-25, lambda x: np.abs(x) <= 2 * np.pi),
    "lg2.approx.f32": Bound(np.log2, "relative", 2.0**-22, lambda x: np.isfinite(x) & ~_near_one(x)),
    "ex2.approx.f32": Bound(np.exp2, "relative", 2.0**-22),
    "tanh.approx.f32": Bound(np.tanh, "relative", 2.0**-11),
    "div.approx.f32": Bound(np.divide, "ulp", 2, lambda x, y: (np.abs(y) >= 2.0**-126) & (np.abs(y) <= 2.0**126)),
    "div.full.f32": Bound(np.divide, "ulp", 2),
    "ex2.approx.f16": Bound(np.exp2, "relative", 2.0**-9.9),
    "ex2.approx.f16x2": Bound(np.exp2, "relative", 2.0**-9.9),
    "ex2.approx.bf16": Bound(np.exp2, "relative", 2.0**-7),
    "ex2.approx.bf16x2": Bound(np.exp2, "relative", 2.0**-7),
    "tanh.approx.f16": Bound(np.tanh, "absolute", 2.0**-10.987),
    "tanh.approx.f16x2": Bound(np.tanh, "absolute", 2.0**-10.987),
    "tanh.approx.bf16": Bound(np.tanh, "absolute", 2.0**-8),
    "tanh.approx.bf16x2": Bound(np.tanh, "absolute", 2.0**-8),
    "rcp.approx.f64": Bound(lambda x: 1 / x, "relative", 2.0**-20),
    "rsqrt.approx.f64": Bound(lambda x: 1 / np.sqrt(x), "relative", 2.0**-51),
    "rsqrt.approx.ftz.f64": Bound(lambda x: 1 / np.sqrt(x), "relative", 2.0**-20),
}


@dataclass(frozen=True)
class Verdict:
    """equal, within (the bound), accepted (with a reason) or FAILED."""

    name: str
    state: str
    note: str = ""


def elements(ty: str, bits: np.ndarray) -> np.ndarray:
    """The values of an operand or result, packed ones side by side, in float64."""
    if ty.endswith("x2"):
        return elements(ty[:-2], bits.view(np.uint16))
    if ty == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaN are ordinary operands
        return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[ty]).astype(np.float64)


def special(form: Form, emulator: np.ndarray, seed: int) -> np.ndarray:
    """Where an approximate form has no freedom: the result is zero, infinite or NaN. Per element."""
    ty = form.name.rsplit(".", 1)[1]
    value = elements(ty, emulator)
    zero = value == 0
    if form.name.startswith("div") and ".ftz" in form.name:
        # Near the least normal number it depends on the error whether a quotient is flushed.
        a, b = (np.abs(elements(ty, v)) for v in inputs(form, seed))
        zero &= ~((a >= 2.0**-126) & np.isfinite(a) & (b <= 2.0**126))
    return ~np.isfinite(value) | zero


def _words(form: Form, bits: np.ndarray) -> np.ndarray:
    return bits.view(np.uint16) if form.name.endswith("x2") else bits


def digest(form: Form, results: Outs, emulator: Outs, seed: int) -> str:
    """A hash of all result bits; of an approximate form only those where the result is special."""
    if not form.approximate:
        return hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest()[:20]
    fixed = special(form, emulator[0], seed)
    return hashlib.sha256(fixed.tobytes() + _words(form, results[0])[fixed].tobytes()).hexdigest()[:20]


def _approximate(form: Form, gpu: np.ndarray, emulator: np.ndarray, seed: int) -> Verdict:
    ty = form.name.rsplit(".", 1)[1]
    flushes = ".ftz" in form.name
    fixed = special(form, emulator, seed)
    wrong = int((_words(form, gpu)[fixed] != _words(form, emulator)[fixed]).sum())
    bound = BOUNDS.get(form.name) or BOUNDS[form.name.replace(".ftz", "")]
    values = [elements(ty, a) for a in inputs(form, seed)]
    least = 2.0 ** {"f16": -14, "f64": -1022}.get(ty.removesuffix("x2"), -126)
    if flushes:
        values = [np.where(np.abs(v) < least, np.copysign(0.0, v), v) for v in values]
    if ty == "f64" and flushes:
        # The gross forms see the upper half of the operand.
        values = [(v.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64) for v in values]
    exact = bound.exact(*values)
    got = elements(ty, gpu)
    # A subnormal result has its own, absolute, last place.
    enough = least * (1 + 2.0**-20) if flushes else least
    judged = ~fixed & bound.domain(*values) & (np.abs(exact) >= enough) & np.isfinite(got)
    error = np.abs(got - exact)
    if bound.unit == "relative":
        error = error / np.abs(exact)
    elif bound.unit == "ulp":
        error = error / 2.0 ** (np.floor(np.log2(np.abs(exact))) - 23)
    worst = float(error[judged].max())
    note = f"largest error {worst:.3g} {bound.unit}, bound {bound.error:.3g}; {int(judged.sum())} judged"
    if form.name.startswith("lg2"):
        near = _near_one(values[0]) & ~fixed
        worst_near = float(np.abs(got - exact)[near].max())
        note += f"; near 1 {worst_near:.3g} absolute, bound {2.0**-22:.3g}"
        worst = max(worst, worst_near)
    # The references are float64: for the f32 results of division that is 2^-29 ulp.
    if wrong:
        return Verdict(form.name, "FAILED", f"{wrong} of {int(fixed.sum())} zeros, infinities and NaN differ; {note}")
    return Verdict(form.name, "within" if worst <= bound.error * (1 + 2.0**-20) else "FAILED", note)


def judge(forms: list[Form], gpu: dict[str, Outs], emulator: dict[str, Outs], seed: int) -> list[Verdict]:
    """One verdict a form."""
    found = []
    for form in forms:
        with np.errstate(all="ignore"):
            ours, theirs = emulator[form.name], gpu[form.name]
            if form.approximate:
                verdict = _approximate(form, theirs[0], ours[0], seed)
            else:
                bad = np.zeros(form.n, bool)
                for a, b in zip(theirs, ours, strict=True):
                    bad |= (a != b).reshape(form.n, -1).any(axis=1)
                verdict = Verdict(form.name, "equal") if not bad.any() else _difference(form, theirs, ours, bad, seed)
        if verdict.state == "FAILED" and ACCEPTED.get(form.name):
            verdict = Verdict(form.name, "accepted", f"{ACCEPTED[form.name]} ({verdict.note})")
        found.append(verdict)
    return found


def _difference(form: Form, gpu: Outs, emulator: Outs, bad: np.ndarray, seed: int) -> Verdict:
    def show(arrays: Outs, i: int) -> str:
        return " ".join(a[i].tobytes()[::-1].hex() for a in arrays)

    i = int(np.argmax(bad))
    note = f"{int(bad.sum())} of {form.n}; operands {show(inputs(form, seed), i)}: GPU {show(gpu, i)}"
    return Verdict(form.name, "FAILED", f"{note}, emulator {show(emulator, i)}")


def record(
    verdicts: list[Verdict], forms: list[Form], gpu: dict[str, Outs], emulator: dict[str, Outs],
    conditions: dict[str, object], folder: str | None,
) -> str:  # fmt: skip
    """The summary's text; with a folder, summary.txt and digests.json there."""
    states = Counter(v.state for v in verdicts)
    family = {form.name: form.family for form in forms}
    tuples = sum(form.n for form in forms)
    lines = [
        f"{conditions.get('machine')}, driver {conditions.get('driver')}, {conditions.get('date')}, "
        f"commit {conditions.get('commit')}; operands of seed {conditions.get('seed')}",
        f"{len(forms)} forms, {tuples:,} operand tuples: {states['equal']} equal bit for bit, "
        f"{states['within']} approximate and within the ISA's bound, "
        f"{states['accepted']} different for a stated reason, {states['FAILED']} different",
        f"left out: {sum(map(len, LEFT_OUT.values()))} forms ("
        + "; ".join(f"{reason}: {len(names)}" for reason, names in LEFT_OUT.items())
        + ")",
        "",
        "family         forms   equal  within  accepted  different",
    ]
    for each in sorted(set(family.values())):
        count = Counter(v.state for v in verdicts if family[v.name] == each)
        row = (count.total(), count["equal"], count["within"], count["accepted"], count["FAILED"])
        lines.append(f"{each:12}" + "".join(f"{n:>{w}}" for n, w in zip(row, (8, 8, 8, 10, 11), strict=True)))
    for state, title in (("within", "approximate"), ("accepted", "accepted"), ("FAILED", "different")):
        chosen = [v for v in verdicts if v.state == state]
        if chosen:
            lines += ["", title, *(f"  {v.name:24} {v.note}" for v in chosen)]
    text = "\n".join(lines) + "\n"
    if folder:
        seed = int(str(conditions["seed"]))
        table = {form.name: digest(form, gpu[form.name], emulator[form.name], seed) for form in forms}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "summary.txt").write_text(text)
        content = {"conditions": conditions, "states": dict(sorted(states.items())), "digests": table}
        Path(folder, "digests.json").write_text(json.dumps(content, indent=0) + "\n")
    return text
