"""Run the asynchronous programs on the emulator and a GPU, and compare bytes.

    python tests/conformance/async_run.py --out h200.npz                                # on a machine with a GPU
    python tests/conformance/async_run.py --record h200.npz --commit HASH               # writes results/async.*

The second command compares what the first saved with the emulator under every completion schedule.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "emulator")]

from async_forms import OUT, POISON, AsyncForm, all_forms, inputs, source  # noqa: E402
from operands import SEED  # noqa: E402
from programs import compile_ptx, run_ptx  # noqa: E402

from dsv4_rt.emulator import COMPLETIONS, Machine  # noqa: E402

RESULTS = Path(__file__).with_name("results")


def on_emulator(form: AsyncForm, completion: str, seed: int = SEED, arch: str = "sm_90a") -> np.ndarray:
    """The result bytes of a form."""
    x, y = inputs(form, seed), np.full(OUT, POISON, np.uint8)
    machine = Machine(arch, completion=completion, seed=seed)
    run_ptx(compile_ptx(source(form), arch), "form", form.ctas, form.threads, x, y, machine=machine)
    return y


def on_cuda(forms: list[AsyncForm], seed: int = SEED) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """(result bytes by form's name, what they were made on)."""
    from kernels import Cuda

    device = Cuda()
    d, call = device.driver, device._call
    buffers = [int(call(d.cuMemAlloc(1 << 20))) for _ in "xy"]
    params = np.array(buffers, np.uint64)
    pointers = np.array([params.ctypes.data, params.ctypes.data + 8], np.uint64)
    found = {}
    for form in forms:
        module = call(d.cuModuleLoadData(compile_ptx(source(form), device.arch).encode() + b"\0"))
        function = call(d.cuModuleGetFunction(module, b"form"))
        x, y = inputs(form, seed), np.full(OUT, POISON, np.uint8)
        for buffer, array in zip(buffers, (x, y), strict=True):
            call(d.cuMemcpyHtoD(buffer, array.ctypes.data, array.nbytes))
        call(d.cuLaunchKernel(function, form.ctas, 1, 1, form.threads, 1, 1, 0, 0, int(pointers.ctypes.data), 0))
        call(d.cuCtxSynchronize())
        call(d.cuMemcpyDtoH(y.ctypes.data, buffers[1], y.nbytes))
        call(d.cuModuleUnload(module))
        found[form.name] = y
    made_on: dict[str, object] = {"machine": device.name, "driver": device.version, "arch": device.arch}
    return found, made_on | {"date": str(datetime.date.today())}


def digest(result: np.ndarray) -> str:
    """What is recorded of a result."""
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--record")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    forms = all_forms()
    if args.out:
        results, conditions = on_cuda(forms)
        np.savez_compressed(args.out, conditions=json.dumps(conditions), **{f.name.replace("/", "|"): results[f.name]
                                                                            for f in forms})  # fmt: skip
        print(f"{len(results)} programs on {conditions}")
        return 0
    with np.load(args.record) as file:
        conditions = json.loads(str(file["conditions"])) | {"commit": args.commit, "seed": SEED}
        gpu = {form.name: file[form.name.replace("/", "|")] for form in forms}
    count: Counter[str] = Counter()
    lines = []
    for form in forms:
        wrong = [c for c in COMPLETIONS if not np.array_equal(on_emulator(form, c), gpu[form.name])]
        count[form.family] += 1
        if wrong:
            got, want = on_emulator(form, wrong[0]), gpu[form.name]
            at = np.nonzero(got != want)[0]
            first = slice(at[0], at[0] + 8)
            bits = f"{got[first].tobytes().hex()} for {want[first].tobytes().hex()}"
            lines.append(f"DIFFERENT {form.name} ({', '.join(wrong)}): {len(at)} bytes, first at {at[0]}: {bits}")
    made = f"{conditions['machine']}, driver {conditions['driver']}, {conditions['date']}, commit {args.commit}"
    head = (
        f"{made}; seed {SEED}\n"
        f"{len(forms)} programs, each on the emulator under {', '.join(COMPLETIONS)}: "
        f"{len(forms) - len(lines)} equal byte for byte, {len(lines)} different\n"
    )
    text = head + "".join(f"\n{name:24} {n:4}" for name, n in count.items()) + "\n" + "\n".join(lines) + "\n"
    print(text)
    if not lines:
        (RESULTS / "async_summary.txt").write_text(text.rstrip("\n") + "\n")
        record = {"conditions": conditions, "digests": {form.name: digest(gpu[form.name]) for form in forms}}
        (RESULTS / "async_digests.json").write_text(json.dumps(record, indent=1) + "\n")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
