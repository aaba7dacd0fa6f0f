"""Tensor cores against results an H200 computed: the bits of every block of threads must hash to what was recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from operands import SEED
from tensor_forms import CTAS, all_forms, inputs
from tensor_run import difference, digests, on_cuda, on_emulator

from dsv4_rt.cuda_device import cuda_device_count
from kernels import Cuda

FORMS = all_forms()
RECORD = json.loads(Path(__file__).with_name("results").joinpath("tensor_digests.json").read_text())
PER_TEST = 30
CHUNKS = [
    pytest.param(part[i : i + PER_TEST], id=f"{family}-{i // PER_TEST}")
    for family in ("matrix", "mma", "wgmma")
    for part in [[form for form in FORMS if form.family == family]]
    for i in range(0, len(part), PER_TEST)
]


def different(forms, results, recorded):
    notes = {form.name: difference(form, recorded[form.name], digests(results[form.name])) for form in forms}
    return [f"{name}: {note}" for name, note in notes.items() if note]


@pytest.mark.parametrize("forms", CHUNKS)
def test_equals_the_recorded_hardware(forms):
    assert not different(forms, on_emulator(forms), RECORD["digests"])


@pytest.mark.parametrize("completion", ["late", "random"])
def test_a_schedule_changes_nothing(completion):
    forms = [form for form in FORMS if form.family == "wgmma"][::9]
    assert not different(forms, on_emulator(forms, completion=completion), RECORD["digests"])


def test_the_record_covers_the_table():
    assert list(RECORD["digests"]) == [form.name for form in FORMS]
    assert len(FORMS) == len(set(RECORD["digests"])) >= 170
    assert RECORD["conditions"]["seed"] == SEED
    assert RECORD["conditions"]["on"] == "cuda"
    widths = {form.n for form in FORMS if form.family == "wgmma"}
    assert widths == set(range(8, 257, 8))


def test_one_wrong_bit_and_one_wrong_operand_show():
    form = next(form for form in FORMS if form.name.endswith("m64n8k16.f32.bf16.bf16 1 1 0 0"))
    result = on_emulator([form])[form.name]
    result[-1] ^= 1
    assert different([form], {form.name: result}, RECORD["digests"]) == [f"{form.name}: 1 of 16 blocks differ sparse"]
    assert different([form], on_emulator([form], seed=SEED + 1), RECORD["digests"])


def test_operands_cover_what_descriptors_can_say():
    some = [form for form in FORMS if form.n][::4]
    words = np.concatenate([inputs(form)["e"].reshape(CTAS, 4)[:, :2].reshape(-1) for form in some])
    swizzles, offsets = words >> np.uint64(62), words >> np.uint64(49) & np.uint64(7)
    assert set(swizzles.tolist()) == {0, 1, 2, 3}
    for mode, pattern in ((1, 1024), (2, 512), (3, 256)):
        mine = swizzles == mode
        start = (words[mine] & np.uint64(0x3FFF)) << np.uint64(4)
        assert set(offsets[mine].tolist()) == set(range(8))
        assert (start % pattern == 0).any()
        assert (start % pattern != 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not cuda_device_count(), reason="no CUDA device")
def test_fresh_operands_on_the_gpu(rng):
    seed = int(rng.integers(1 << 31))
    hopper = Cuda().arch == "sm_90a"
    forms = [form for form in FORMS if hopper or form.family != "wgmma"]
    gpu, made_on = on_cuda(forms, seed)
    recorded = {name: digests(result) for name, result in gpu.items()}
    assert not different(forms, on_emulator(forms, seed, arch=made_on["arch"]), recorded)
