"""Run the tensor-core forms on the emulator or a GPU, and compare two runs.

    python tests/conformance/tensor_run.py --on cuda --out h200.npz
    python tests/conformance/tensor_run.py --on emulator --out emulator.npz
    python tests/conformance/tensor_run.py --compare h200.npz emulator.npz [--record tests/conformance/results]
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from operands import SEED  # noqa: E402
from tensor_forms import TensorForm, all_forms, inputs, ptx  # noqa: E402

POISON = 0xA5A5A5A5


def on_cuda(forms: list[TensorForm], seed: int = SEED) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Results by form's name, and what they were made on. A form the driver refuses is left out and said so."""
    from kernels import Cuda

    device = Cuda()
    d = device.driver
    found: dict[str, np.ndarray] = {}
    buffers = {x: int(device._call(d.cuMemAlloc(1 << 24))) for x in "abcdei"}
    for form in forms:
        status, module = d.cuModuleLoadData(ptx([form]).encode() + b"\0")
        if int(status):
            print(f"refused by the driver: {form.name}: {status!r}")
            continue
        arrays = inputs(form, seed)
        out = np.full(form.threads * form.sizes[3], POISON, np.uint32)
        for letter, array in {**arrays, "d": out}.items():
            device._call(d.cuMemcpyHtoD(buffers[letter], array.ctypes.data, array.nbytes))
        params = np.array([buffers[x] for x in "abcdei"], np.uint64)
        pointers = np.array([params.ctypes.data + 8 * i for i in range(6)], np.uint64)
        function = device._call(d.cuModuleGetFunction(module, b"f0"))
        device._call(d.cuLaunchKernel(function, form.threads // 128, 1, 1, 128, 1, 1, 0, 0, pointers.ctypes.data, 0))
        device._call(d.cuCtxSynchronize())
        device._call(d.cuMemcpyDtoH(out.ctypes.data, buffers["d"], out.nbytes))
        device._call(d.cuModuleUnload(module))
        found[form.name] = out
    return found, {"machine": device.name, "driver": device.version}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--on")
    parser.add_argument("--out")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    from dataclasses import replace

    forms = all_forms()
    for label in ("m64n64k16.f32.f16.f16 1 1 0 0", "m64n64k16.f32.f16.f16 1 1 1 1", "m64n64k8.f32.tf32.tf32 1 1 0 0"):
        form = next(f for f in forms if f.name.endswith(label))
        forms.append(replace(form, name=form.name + " base", extra={"base": 1}))
    results, conditions = on_cuda(forms, args.seed)
    conditions |= {"seed": args.seed, "date": str(datetime.date.today())}
    part, size, number = {}, 0, 0
    for name, array in [*results.items(), ("", np.zeros(1 << 24, np.uint32))]:
        if size + array.nbytes > 14 << 20:
            np.savez_compressed(f"{args.out}{number}.npz", conditions=str(conditions), **part)
            part, size, number = {}, 0, number + 1
        part[name], size = array, size + array.nbytes
    print(len(results), conditions, number)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
