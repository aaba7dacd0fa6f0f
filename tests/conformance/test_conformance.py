"""The emulator against results an H200 computed: every form's bits must hash to what was recorded there.

A machine with a GPU also runs fresh operands on both. Where hashes differ, `run.py --compare` on such a machine shows
the operands.
"""

import json
import re
from pathlib import Path

import documents
import numpy as np
import pytest
from compare import ACCEPTED, BOUNDS, digest, judge
from forms import LEFT_OUT, all_forms
from launches import EMULATOR, FILES
from launches import LEFT_OUT as NOT_COMPARED
from operands import SEED, operands

from dsv4_rt.cuda_device import cuda_device_count
from kernels import Cuda, inputs, on_emulator

# Tests of the same files that expect an error, check something that a GPU has not, or repeat another's launches.
LAUNCHES_NOTHING = set(
    """test_wrong_pointers_name_the_call_and_the_thread test_an_unset_pointer_and_its_cuda_line
    test_a_missing_callee_is_refused_before_the_launch test_a_pointer_that_another_kernel_stored
    test_faults_name_the_thread
    test_vector_atomics_race_with_plain_stores_only test_forms_that_do_not_exist_are_refused
    test_all_are_here
    test_selects_in_under_a_third_of_a_second test_narrow_formats_by_instruction_and_by_software""".split()
)
FORMS = all_forms()
FAMILIES = sorted({form.family for form in FORMS})
RECORD = json.loads(Path(__file__).with_name("results").joinpath("digests.json").read_text())
PER_TEST = 130
CHUNKS = [
    pytest.param(part[i : i + PER_TEST], id=f"{family}-{i // PER_TEST}")
    for family in FAMILIES
    for part in [[form for form in FORMS if form.family == family]]
    for i in range(0, len(part), PER_TEST)
]


@pytest.mark.parametrize("forms", CHUNKS)
def test_equals_the_recorded_hardware(forms):
    results = on_emulator(forms)
    with np.errstate(all="ignore"):
        found = {form.name: digest(form, results[form.name], results[form.name], SEED) for form in forms}
    different = [name for name, value in found.items() if value != RECORD["digests"][name]]
    assert not different, f"{len(different)} of {len(forms)} forms differ from the H200: {', '.join(different)}"


def test_the_record_covers_the_table():
    assert set(RECORD["digests"]) == {form.name for form in FORMS}
    assert len(FORMS) >= 600
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert RECORD["conditions"]["seed"] == SEED
    assert RECORD["conditions"]["on"] == "cuda"
    assert RECORD["states"].get("FAILED", 0) == 0


def test_every_accepted_difference_has_a_reason_and_every_approximation_a_bound():
    names = {form.name for form in FORMS}
    assert set(ACCEPTED) <= names
    assert all(len(reason) > 20 for reason in ACCEPTED.values())
    approximate = {form.name for form in FORMS if form.approximate}
    assert approximate <= set(BOUNDS) | {name for name in approximate if name.replace(".ftz", "") in BOUNDS}
    assert not names & {name for group in LEFT_OUT.values() for name in group}


def test_one_wrong_bit_changes_the_verdict_and_the_digest():
    form = next(form for form in FORMS if form.name == "add.rn.f32")
    results = on_emulator([form])
    bent = {form.name: [results[form.name][0].copy()]}
    bent[form.name][0][1234] ^= 1
    assert digest(form, bent[form.name], bent[form.name], SEED) != RECORD["digests"][form.name]
    verdict = judge([form], bent, results, SEED)[0]
    assert verdict.state == "FAILED"
    assert verdict.note.startswith("1 of 4096; operands")


def test_an_approximation_outside_its_bound_fails():
    form = next(form for form in FORMS if form.name == "rcp.approx.f32")
    results = on_emulator([form])
    assert judge([form], results, results, SEED)[0].state == "within"
    one = int(np.argmax(inputs(form)[0] == 0x3F800000))
    bent = {form.name: [results[form.name][0].copy()]}
    bent[form.name][0][one] += 2
    verdict = judge([form], bent, results, SEED)[0]
    assert (verdict.state, verdict.note[:17]) == ("FAILED", "largest error 2 u")


def test_operands_depend_on_the_seed_and_the_form_alone():
    first = operands("x", ("f32", "u64"), 512)
    assert all((a == b).all() for a, b in zip(first, operands("x", ("f32", "u64"), 512), strict=True))
    assert (operands("y", ("f32", "u64"), 512)[1] != first[1]).any()
    assert (operands("x", ("f32", "u64"), 512, seed=1)[1] != first[1]).any()


def test_the_readme_shows_the_record():
    assert documents.shown(documents.README.read_text()) == documents.README.read_text(), "run documents.py"
    first = documents.SUMMARIES["forms"].read_text().split("\n")
    counted = RECORD["states"]
    assert first[1].startswith(f"{len(FORMS)} forms, ")
    assert f"{counted['equal']} equal bit for bit, {counted['within']} approximate" in first[1]
    assert f"commit {RECORD['conditions']['commit']};" in first[0]


def test_every_program_ran_on_the_hardware():
    rows = documents.SUMMARIES["launches"].read_text().split("result\n")[1].strip().split("\n")
    assert not [row for row in rows if "DIFFERENT" in row]
    ran = {row.split("[")[0].split(" ")[0] for row in rows}
    for name in FILES:
        tests = re.findall(r"^def (test_\w+)", (EMULATOR / name).read_text(), re.MULTILINE)
        launching = [test for test in tests if test not in LAUNCHES_NOTHING | set(NOT_COMPARED)]
        assert set(launching) <= ran, f"{name}: {sorted(set(launching) - ran)}: run launches.py again"


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
def test_the_same_for_blackwell(arch):
    """A B200 is given the same forms; the emulator makes no difference."""
    forms = FORMS[::23]
    results, hopper = on_emulator(forms, SEED, arch), on_emulator(forms, SEED)
    for form in forms:
        for a, b in zip(results[form.name], hopper[form.name], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="no CUDA device")
def test_fresh_operands_on_the_gpu(rng):
    seed = int(rng.integers(1 << 31))
    device = Cuda()
    for start in range(0, len(FORMS), 50):
        forms = FORMS[start : start + 50]
        with np.errstate(all="ignore"):
            verdicts = judge(forms, device.run(forms, seed), on_emulator(forms, seed, device.arch), seed)
        failed = [f"{v.name}: {v.note}" for v in verdicts if v.state == "FAILED"]
        assert not failed, "\n".join(failed)
