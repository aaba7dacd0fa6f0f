"""Run the tensor-core forms on the emulator or a GPU, and compare two runs bit by bit.

    python tests/conformance/tensor_run.py --on cuda --out h200.json          # on a machine with a GPU
    python tests/conformance/tensor_run.py --on emulator --out emulator.json
    python tests/conformance/tensor_run.py --compare h200.json emulator.json [--record tests/conformance/results]

--record writes tensor_summary.txt and tensor_digests.json, which test_tensor_conformance.py checks without a GPU.
--seed runs other operands than the recorded ones. What is kept of a form is a digest for each block of threads: equal
digests are equal bits.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from operands import SEED  # noqa: E402
from tensor_forms import CTAS, TensorForm, all_forms, inputs, ptx  # noqa: E402
from tensor_operands import MANNERS  # noqa: E402

from kernels import Cuda  # noqa: E402

POISON = 0xA5A5A5A5
BUFFER = 1 << 24


def blank(form: TensorForm) -> np.ndarray:
    """The result registers before the launch, thread by thread."""
    return np.full(form.threads * form.sizes[3], POISON, np.uint32)


def on_emulator(
    forms: list[TensorForm], seed: int = SEED, completion: str = "early", arch: str = "sm_90a"
) -> dict[str, np.ndarray]:
    """Results by form's name."""
    from dsv4_rt.emulator import Machine

    found = {}
    for form in forms:
        machine = Machine(arch, completion=completion)
        module = machine.load(ptx([form], arch), form.name)
        arrays = inputs(form, seed) | {"d": blank(form)}
        for label, array in arrays.items():
            machine.memory.register(array.ctypes.data, array.nbytes, label=label, keep=array)
        params = b"".join((arrays[x].ctypes.data if x in arrays else 0).to_bytes(8, "little") for x in "abcdei")
        machine.launch(module, "f0", form.threads // 128, 128, params)
        found[form.name] = arrays["d"]
    return found


def on_cuda(forms: list[TensorForm], seed: int = SEED) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Results by form's name, and what they were made on."""
    device = Cuda()
    d, call = device.driver, device._call
    buffers = {x: int(call(d.cuMemAlloc(BUFFER))) for x in "abcdei"}
    params = np.array(list(buffers.values()), np.uint64)
    pointers = np.array([params.ctypes.data + 8 * i for i in range(6)], np.uint64)
    found = {}
    for form in forms:
        module = call(d.cuModuleLoadData(ptx([form], device.arch).encode() + b"\0"))
        out = blank(form)
        for letter, array in (inputs(form, seed) | {"d": out}).items():
            assert array.nbytes <= BUFFER
            call(d.cuMemcpyHtoD(buffers[letter], array.ctypes.data, array.nbytes))
        function = call(d.cuModuleGetFunction(module, b"f0"))
        call(d.cuLaunchKernel(function, form.threads // 128, 1, 1, 128, 1, 1, 0, 0, int(pointers.ctypes.data), 0))
        call(d.cuCtxSynchronize())
        call(d.cuMemcpyDtoH(out.ctypes.data, buffers["d"], out.nbytes))
        call(d.cuModuleUnload(module))
        found[form.name] = out
    return found, {"machine": device.name, "driver": device.version, "arch": device.arch}


def digests(result: np.ndarray) -> str:
    """Eight hexadecimal digits for each block of 128 threads, in order."""
    return "".join(hashlib.sha256(part.tobytes()).hexdigest()[:8] for part in np.split(result, CTAS))


def difference(form: TensorForm, gpu: str, emulator: str) -> str:
    """Which blocks differ, by the manner of their operands; empty if none does."""
    bad = [i for i in range(CTAS) if gpu[8 * i : 8 * i + 8] != emulator[8 * i : 8 * i + 8]]
    manners = sorted({MANNERS[i % len(MANNERS)] for i in bad}) if form.family == "wgmma" else []
    return f"{len(bad)} of {CTAS} blocks differ {' '.join(manners)}".rstrip() if bad else ""


def _family(form: TensorForm) -> str:
    head = form.name.split(".")[0] if form.family != "mma" else "mma.sync"
    return head if form.family == "matrix" else f"{head} {form.types[0]} {form.types[1]} -> {form.types[2]}"


def record(gpu: dict[str, str], emulator: dict[str, str], conditions: dict[str, object], folder: str | None) -> str:
    """The summary's text; with a folder, tensor_summary.txt and tensor_digests.json there."""
    forms = all_forms()
    rows: dict[str, list[int]] = {}
    failures = []
    for form in forms:
        row = rows.setdefault(_family(form), [0, 0, 0])
        note = difference(form, gpu[form.name], emulator[form.name])
        row[0] += 1
        row[1] += form.threads * form.sizes[3]
        row[2] += not note
        failures += [f"  {form.name}: {note}"] if note else []
    total = np.array(list(rows.values())).sum(axis=0)
    lines = [
        f"{conditions['machine']}, driver {conditions['driver']}, {conditions['date']}, commit {conditions['commit']}; "
        f"operands of seed {conditions['seed']}",
        f"{total[0]} forms, {total[1]:,} result registers: {total[2]} forms equal bit for bit, "
        f"{len(failures)} different",
        "",
        f"{'family':34}  forms   registers   equal",
        *(f"{name:34} {row[0]:6} {row[1]:11,} {row[2]:7}" for name, row in sorted(rows.items())),
        *failures,
    ]
    text = "\n".join(lines) + "\n"
    if folder:
        Path(folder, "tensor_summary.txt").write_text(text)
        content = {"conditions": conditions, "digests": gpu}
        Path(folder, "tensor_digests.json").write_text(json.dumps(content, indent=0) + "\n")
    return text


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("emulator", "cuda"))
    parser.add_argument("--out")
    parser.add_argument("--compare", nargs=2, metavar=("GPU", "EMULATOR"))
    parser.add_argument("--record", metavar="FOLDER")
    parser.add_argument("--commit", default="")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    if args.on:
        if not args.out:
            parser.error("--on needs --out")
        conditions: dict[str, object] = {"on": args.on, "seed": args.seed, "date": str(datetime.date.today())}
        if args.on == "cuda":
            results, made_on = on_cuda(all_forms(), args.seed)
            conditions |= made_on
        else:
            results = on_emulator(all_forms(), args.seed)
        kept = {name: digests(result) for name, result in results.items()}
        Path(args.out).write_text(json.dumps({"conditions": conditions, "digests": kept}))
        print(f"{len(kept)} forms on {conditions} -> {args.out}")
        return 0
    if not args.compare:
        parser.error("--on or --compare")
    gpu, emulator = (json.loads(Path(path).read_text()) for path in args.compare)
    if gpu["conditions"]["seed"] != emulator["conditions"]["seed"]:
        parser.error("the two runs are of different seeds")
    text = record(gpu["digests"], emulator["digests"], gpu["conditions"] | {"commit": args.commit}, args.record)
    print(text)
    return 1 if gpu["digests"] != emulator["digests"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
