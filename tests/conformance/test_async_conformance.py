"""Asynchronous programs on the emulator, under every schedule, against what an H200 computed.

A machine with a GPU also runs fresh operands on both.
"""

import json

import numpy as np
import pytest
from async_forms import all_forms
from async_run import RESULTS, digest, on_cuda, on_emulator
from operands import SEED

from dsv4_rt.cuda_device import cuda_device_count
from dsv4_rt.emulator import COMPLETIONS

FORMS = all_forms()
FAMILIES = sorted({form.family for form in FORMS})
RECORD = json.loads((RESULTS / "async_digests.json").read_text())


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_recorded_hardware(family, completion):
    mine = [form for form in FORMS if form.family == family]
    different = [form.name for form in mine if digest(on_emulator(form, completion)) != RECORD["digests"][form.name]]
    assert not different, f"{len(different)} of {len(mine)} programs differ from the H200: {', '.join(different)}"


def test_the_record_covers_the_table():
    assert set(RECORD["digests"]) == {form.name for form in FORMS}
    assert RECORD["conditions"]["seed"] == SEED
    assert "H200" in RECORD["conditions"]["machine"]


def test_one_wrong_bit_changes_the_digest():
    result = on_emulator(FORMS[0], "early")
    bent = result.copy()
    bent[7] ^= 1
    assert digest(bent) != digest(result)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="no CUDA device")
def test_fresh_operands_on_the_gpu(rng):
    seed = int(rng.integers(1 << 31))
    gpu, made_on = on_cuda(FORMS, seed)
    for form in FORMS:
        for completion in COMPLETIONS:
            assert np.array_equal(on_emulator(form, completion, seed, made_on["arch"]), gpu[form.name]), (
                form.name, completion
            )
