"""The tcgen05 forms: right on the emulator, compiled for both Blackwell chips, and judged so that an error shows."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tcgen05_run
from tcgen05_forms import COMMITS, REGISTERS, all_forms, cuda, inputs
from tcgen05_run import UNITS, Verdict, by_unit, cubin, gpu_arch, has_units, judge, on_cuda, on_emulator, report

FORMS = all_forms()
BY_NAME = {form.name: form for form in FORMS}
PRODUCTS = [form for form in FORMS if form.product]


FAMILIES = ("move", "alloc", "mma", "commit", "pair", "wide", "scaled", "copy")


def failures(forms, results, seed, emulated=None):
    """Reports of the forms that are not right: a GPU's, or without `emulated` the emulator's own."""
    on, emulated = ("cuda", emulated) if emulated else ("emulator", {})
    found = [judge(form, inputs(form, seed), results[form.name], emulated.get(form.name), on) for form in forms]
    return [f"{v.name}: {v.note}" for v in found if v.state == "FAILED"]


@pytest.mark.parametrize("family", FAMILIES)
def test_emulator_is_right(family, rng):
    forms, seed = [form for form in FORMS if form.family == family], int(rng.integers(1 << 31))
    results = on_emulator(forms, seed)
    assert len(results) == len(forms)
    assert not failures(forms, results, seed)


@pytest.mark.parametrize("completion", ["late", "random"])
def test_a_schedule_changes_nothing(completion, rng):
    forms, seed = [form for form in FORMS if form.family == "commit"], int(rng.integers(1 << 31))
    early, other = on_emulator(forms, seed), on_emulator(forms, seed, completion)
    for form in forms:
        np.testing.assert_array_equal(early[form.name]["after"], other[form.name]["after"])


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_compiles(arch):
    """All of it for a B200, parts for a B300 and with the checks that ptxas builds in."""
    source, entries = cuda(FORMS if arch == "sm_100a" else FORMS[::5])
    assert cubin(source, arch, False)[:4] == b"\x7fELF"
    few = cuda([form for form in FORMS if form.family == "commit"])[0]
    plain, checked = cubin(few, arch, False), cubin(few, arch, True)
    assert len(checked) > 1.5 * len(plain)
    assert arch == "sm_103a" or set(entries) == set(BY_NAME)


def test_the_table_has_every_kind():
    """Kinds, sizes, majors, places of A, swizzles, base offsets and starts, shapes and repetitions, ways to commit."""
    assert len(BY_NAME) == len(FORMS) >= 120
    assert {form.family for form in FORMS} == set(FAMILIES)
    p = [form.product for form in PRODUCTS if form.family in ("mma", "commit")]
    assert {(x.kind, x.types) for x in p} >= {
        *(("f16", (a, a, d)) for a, d in (("f16", "f16"), ("f16", "f32"), ("bf16", "f32"))),
        ("tf32", ("tf32", "tf32", "f32")),
        *(("f8f6f4", (a, b, d)) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2") for d in ("f16", "f32")),
    }
    assert {(x.m, x.from_tmem) for x in p} == {(m, t) for m in (64, 128) for t in (False, True)}
    pairs = {(form.product.kind, form.product.m) for form in PRODUCTS if form.group == 2}
    assert pairs >= {(kind, m) for kind in ("f16", "f8f6f4", "mxf8f6f4", "mxf4", "mxf4nvf4") for m in (128, 256)}
    for kind in ("f16", "f8f6f4"):
        assert {x.majors for x in p if x.kind == kind} == {(a, b) for a in (0, 1) for b in (0, 1)}
        assert {x.negate for x in p if x.kind == kind} == {(a, b) for a in (0, 1) for b in (0, 1)}
    assert {form.product.commit for form in PRODUCTS} == set(COMMITS)
    moves = {form.shape[:2] for form in FORMS if form.family == "move"}
    assert moves == {(s, n << i) for s, n in REGISTERS.items() for i in range(8) if n << i <= 128}
    words = np.concatenate([inputs(form)["table"][:, : 2 * form.product.steps].reshape(-1) for form in PRODUCTS[::3]])
    swizzles, offsets = words >> np.uint64(61), words >> np.uint64(49) & np.uint64(7)
    assert set(swizzles.tolist()) == {0, 2, 4, 6}
    for mode, pattern in ((2, 1024), (4, 512), (6, 256)):
        start = (words[swizzles == mode] & np.uint64(0x3FFF)) << np.uint64(4)
        assert set(offsets[swizzles == mode].tolist()) == set(range(8))
        assert (start % pattern == 0).any()
        assert (start % pattern != 0).any()


# As if a GPU had answered.


@pytest.mark.parametrize("unit", UNITS)
def test_sums_of_known_hardware_are_right(unit, rng):
    """Fewer bits than float64 has are no error; Hopper's 8-bit unit would be one for f16, bf16 and tf32."""
    seed = int(rng.integers(1 << 31))
    narrow = [form for form in PRODUCTS if form.product.kind == "f8f6f4"]
    forms = (narrow if unit == "F = 13, m = 13" else PRODUCTS)[::5]
    emulated = on_emulator(forms, seed)
    forms = [form for form in forms if form.name in emulated and has_units(form)]
    verdicts = []
    for form in forms:
        data = inputs(form, seed)
        verdicts.append(judge(form, data, by_unit(form, data, unit), emulated[form.name]))
    assert not [v for v in verdicts if v.state == "FAILED"]
    assert all(f"100.0000% equal to sums of {unit}" in v.note for v in verdicts if v.state == "right")
    assert any(v.state == "right" and v.equal < v.words for v in verdicts)


def test_a_narrow_unit_is_wrong_for_wide_kinds(rng):
    seed = int(rng.integers(1 << 31))
    forms = [form for form in PRODUCTS if form.product.types[2] == "f32" and form.product.kind in ("f16", "tf32")]
    forms = [form for form in forms if form.family == "mma"][::6]
    emulated = on_emulator(forms, seed)
    results = {form.name: by_unit(form, inputs(form, seed), "F = 13, m = 13") for form in forms}
    assert len(failures(forms, results, seed, emulated)) == len(forms)


def changed(form, result, how):
    """The result with one thing wrong."""
    after, p = result["after"].copy(), form.product
    registers = result["registers"].copy()
    if how == "an exact sum off by one":  # the first CTA's operands are small integers
        at = 0, p.cells[1][0, 0], 0
        after[at] = (after[at].view(np.float32) + np.float32(1)).view(np.uint32)
    if how == "an exponent":
        after[1, p.cells[1][3, 0], 5] += np.uint32(1 << 23)
    if how == "a row in another lane":
        after[:, [0, 1], : p.n] = after[:, [1, 0], : p.n]
    if how == "a cell beside the result":
        after[2, 0, p.n] ^= np.uint32(1)
    if how == "an infinity":
        after[1, p.cells[1][0, 0], 0] = 0x7F800000
    if how == "a register":
        registers[0, 77, -1] ^= np.uint32(1)
    if how == "a mark":
        after[1, 5, 1] ^= np.uint32(4)
    return {"after": after, "registers": registers}


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("mma f16 bf16 bf16 f32 128x48x16 tmemK", "an exact sum off by one", r"CTA 0 \(ints\): D\[0, 0\] is"),
        ("mma f16 bf16 bf16 f32 128x48x16 tmemK", "an exponent", r"CTA 1 \(normal\): D\[3, 5\] is .* 1 such"),
        ("mma f16 bf16 bf16 f32 128x48x16 tmemK", "a row in another lane", r"CTA 0 .*CTA 1 .*and \d more"),
        ("mma f16 bf16 bf16 f32 128x48x16 tmemK", "a cell beside the result", r"CTA 2 \(wide\): 1 words beside"),
        ("mma f16 bf16 bf16 f32 128x48x16 tmemK", "an infinity", r"CTA 1 \(normal\): 1 infinities or NaN differ"),
        ("ld, st 16x128b.x4", "a register", r"1 of 2048 words of registers differ"),
        ("ld, st 16x128b.x4", "a mark", r"1 of 4096 words of after differ"),
        ("alloc +256 +256", "a mark", r"1 of 1024 marks were lost"),
    ],
)
def test_an_error_shows(name, how, message, rng):
    form, seed = BY_NAME[name], int(rng.integers(1 << 31))
    emulated = on_emulator([form], seed)
    assert failures([form], emulated, seed, emulated) == []
    wrong = {name: changed(form, emulated[name], how)}
    (text,) = failures([form], wrong, seed, emulated)
    assert re.search(message, text), text


def test_the_unused_half_of_a_cell_may_be_anything(rng):
    form, seed = next(f for f in PRODUCTS if f.product.types[2] == "f16"), int(rng.integers(1 << 31))
    emulated = on_emulator([form], seed)[form.name]
    after = emulated["after"].copy()
    after[:, *form.product.cells[1:]] &= np.uint32(0xFFFF)
    verdict = judge(form, inputs(form, seed), {**emulated, "after": after}, emulated)
    assert (verdict.state, verdict.note) == ("equal", "upper halves: 100% zero, 0% as before")


CHILD = """
import os, sys, time
from pathlib import Path
for line in sys.stdin:
    if line.strip() == "2":
        print("driver: CUDA_ERROR_ILLEGAL_INSTRUCTION", file=sys.stderr)
        os.abort()
    if line.strip() == "4":
        time.sleep(60)
    Path(sys.argv[1], line.strip() + ".npz").touch()
"""


def test_a_form_that_stops_the_gpu_or_hangs_is_left_out(tmp_path):
    failed = on_cuda(list(range(6)), tmp_path, [sys.executable, "-c", CHILD, str(tmp_path)], seconds=5)
    assert failed == {2: "driver: CUDA_ERROR_ILLEGAL_INSTRUCTION", 4: "no end after 5 s"}
    assert sorted(path.stem for path in tmp_path.glob("*.npz")) == ["0", "1", "3", "5"]


def test_report():
    forms = [BY_NAME["alloc +32"], BY_NAME["ld, st 32x32b.x1"]]
    verdicts = [Verdict("alloc +32", "equal", 100, 100), Verdict("ld, st 32x32b.x1", "FAILED", 200, 150, 3.0, "why")]
    text = report(forms, verdicts, {"on": "cuda", "commit": ""})
    assert text.startswith("on cuda\n2 forms: 1 equal bit for bit, 0 right, 1 FAILED\n")
    assert re.search(r"^FAILED +75\.0000% +3  ld, st 32x32b\.x1: why$", text, re.M)


def test_command_line_without_such_a_gpu(tmp_path):
    if gpu_arch():
        pytest.skip("this machine has a Blackwell GPU")
    command = [sys.executable, tcgen05_run.__file__, "--on", "cuda", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no B200 or B300" in done.stderr
    done = subprocess.run([*command[:2], "--on", "emulator", *command[4:], "--only", "alloc +32"], capture_output=True)
    assert done.returncode == 0
    assert Path(tmp_path, "tcgen05.txt").read_text().count("right") == 5


@pytest.mark.gpu
@pytest.mark.skipif(not gpu_arch(), reason="no Blackwell GPU")
def test_fresh_operands_on_the_gpu(rng, tmp_path):
    seed = str(int(rng.integers(1 << 31)))
    command = [sys.executable, tcgen05_run.__file__, "--on", "cuda", "--out", str(tmp_path), "--seed", seed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
