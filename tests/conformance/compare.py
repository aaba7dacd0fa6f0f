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
    section: str  # of the PTX ISA 9.1
    domain: Callable[..., Any] = lambda *v: np.isfinite(v[0])
    where: str = ""


def _near_one(x: Any) -> Any:
    return (x > 0.5) & (x < 2)


def _turns(x: Any) -> Any:
    return np.abs(x) <= 2 * np.pi


def _waves(function: Callable[..., Any], section: str) -> tuple[Bound, ...]:
    """sin and cos: one bound within a turn, one within fifty."""
    # An H200 showed 6.78e-7, 0.6 % above 2^-20.5: the result's own rounding (half an ulp below 1) is allowed besides.
    return (
        Bound(function, "absolute", 2.0**-20.5 + 2.0**-25, section, _turns),
        Bound(
            function, "absolute", 2.0**-14.7 + 2.0**-25, section,
            lambda x: ~_turns(x) & (np.abs(x) <= 100 * np.pi), "from 2 pi to 100 pi",
        ),
    )  # fmt: skip


def _inverse(x: Any) -> Any:
    return 1 / x


def _inverse_root(x: Any) -> Any:
    return 1 / np.sqrt(x)


_NONE_STATED = "; it states no error, this is what the result's own bits allow"

# The ISA counts ex2's two ulp from the correctly rounded result, which is half of one from the exact.
BOUNDS: dict[str, tuple[Bound, ...]] = {
    "rcp.approx.f32": (Bound(_inverse, "ulp", 1, "9.7.3.13"),),
    "sqrt.approx.f32": (Bound(np.sqrt, "relative", 2.0**-23, "9.7.3.15"),),
    "rsqrt.approx.f32": (Bound(_inverse_root, "relative", 2.0**-22.9, "9.7.3.16"),),
    "sin.approx.f32": _waves(np.sin, "9.7.3.18"),
    "cos.approx.f32": _waves(np.cos, "9.7.3.19"),
    "lg2.approx.f32": (
        Bound(np.log2, "relative", 2.0**-22, "9.7.3.20", lambda x: np.isfinite(x) & ~_near_one(x)),
        Bound(np.log2, "absolute", 2.0**-22, "9.7.3.20", _near_one, "from 0.5 to 2"),
    ),
    "ex2.approx.f32": (Bound(np.exp2, "ulp", 2.5, "9.7.3.21"),),
    "tanh.approx.f32": (Bound(np.tanh, "relative", 2.0**-11, "9.7.3.22"),),
    "div.approx.f32": (
        Bound(np.divide, "ulp", 2, "9.7.3.8", lambda x, y: (np.abs(y) >= 2.0**-126) & (np.abs(y) <= 2.0**126)),
    ),
    "div.full.f32": (Bound(np.divide, "ulp", 2, "9.7.3.8"),),
    **{
        f"{op}.approx.{ty}{packed}": (Bound(function, unit, error, section),)
        for op, ty, function, unit, error, section in (
            ("ex2", "f16", np.exp2, "relative", 2.0**-9.9, "9.7.4.10"),
            ("ex2", "bf16", np.exp2, "relative", 2.0**-7, "9.7.4.10"),
            ("tanh", "f16", np.tanh, "absolute", 2.0**-10.987, "9.7.4.9"),
            ("tanh", "bf16", np.tanh, "absolute", 2.0**-8, "9.7.4.9"),
        )
        for packed in ("", "x2")
    },
    "rcp.approx.f64": (Bound(_inverse, "relative", 2.0**-20, f"9.7.3.14{_NONE_STATED}"),),
    "rsqrt.approx.f64": (Bound(_inverse_root, "relative", 2.0**-51, f"9.7.3.16{_NONE_STATED}"),),
    "rsqrt.approx.ftz.f64": (Bound(_inverse_root, "relative", 2.0**-20, f"9.7.3.17{_NONE_STATED}"),),
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
    bounds = BOUNDS.get(form.name) or BOUNDS[form.name.replace(".ftz", "")]
    values = [elements(ty, a) for a in inputs(form, seed)]
    least = 2.0 ** {"f16": -14, "f64": -1022}.get(ty.removesuffix("x2"), -126)
    if flushes:
        values = [np.where(np.abs(v) < least, np.copysign(0.0, v), v) for v in values]
    if ty == "f64" and flushes:
        # The gross forms see the upper half of the operand.
        values = [(v.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64) for v in values]
    got = elements(ty, gpu)
    # A subnormal result has its own, absolute, last place.
    enough = least * (1 + 2.0**-20) if flushes else least
    notes, within = [], True
    for bound in bounds:
        exact = bound.exact(*values)
        judged = ~fixed & bound.domain(*values) & np.isfinite(got)
        error = np.abs(got - exact)
        if bound.unit != "absolute":
            judged &= np.abs(exact) >= enough
            last = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 23)
            error = error / (last if bound.unit == "ulp" else np.abs(exact))
        worst = float(error[judged].max())
        # The references are float64: for the f32 results of division that is 2^-29 ulp.
        within &= worst <= bound.error * (1 + 2.0**-20)
        notes.append(
            f"{bound.where + ' ' if bound.where else ''}largest error {worst:.3g} {bound.unit}, "
            f"bound {bound.error:.3g} ({bound.section}); {int(judged.sum())} judged"
        )
    note = "; ".join(notes)
    if wrong:
        return Verdict(form.name, "FAILED", f"{wrong} of {int(fixed.sum())} zeros, infinities and NaN differ; {note}")
    return Verdict(form.name, "within" if within else "FAILED", note)


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
    titles = {
        "within": "approximate: largest error on this GPU, bound, section of the PTX ISA 9.1",
        "accepted": "accepted",
        "FAILED": "different",
    }
    for state, title in titles.items():
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
