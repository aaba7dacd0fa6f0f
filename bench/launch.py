"""Host cost of a launch, as ratios to cuda.core's launch of the same kernel in the same run.

    python bench/launch.py [--out FILE] [--readme] [--recorded FILE]

Arms, all of activation_topk on one token (10 arguments): the driver call alone with everything prebuilt; cuda.core's
launch; a prepared launch, frozen and with every pointer rewritten; the whole operation, for CuPy and torch.
"""

import itertools

import cupy
import numpy as np
from cuda.bindings import driver
from harness import Bench, main

import dsv4_rt
from dsv4_rt.compile import compile
from dsv4_rt.device import Parameters
from dsv4_rt.router import ops


def measure(bench):
    N, E, k = 1, 256, 6
    logits = cupy.random.standard_normal((N, E), dtype=cupy.float32)
    bias = cupy.random.standard_normal(E, dtype=cupy.float32)
    out = (cupy.empty((N, k), cupy.float32), cupy.empty((N, k), cupy.int32))
    other = itertools.cycle([out, tuple(cupy.empty_like(x) for x in out)])  # addresses that differ from call to call
    ready = ops.prepare_activation_topk(bench.device, N, E, k, 2.5)
    pointers = [x.data.ptr for x in (logits, bias, *out)]
    stream = cupy.cuda.get_current_stream().ptr
    ready.launch(pointers, stream)

    # The driver's own share: the same configuration and buffer, nothing around the call.
    params = Parameters(ready.kernel.info)
    params.buffer[:] = ready._params.buffer[:]
    config = bench.device._config(ready.geometry, stream)
    handle, slots, enqueue = ready.kernel.loaded.handle, params.slots_address, driver.cuLaunchKernelEx

    import cuda.core as core

    Device = core.Device
    ObjectCode, LaunchConfig, launch = core.ObjectCode, core.LaunchConfig, core.launch
    gpu = Device(bench.device.index)
    gpu.set_current()
    name = ready.kernel.name
    artifact = compile(ops.ACTIVATION_TOPK, bench.device.arch, (name,))
    kernel = ObjectCode.from_cubin(artifact.cubin).get_kernel(artifact.kernels[name].lowered)
    core_stream = gpu.create_stream(cupy.cuda.get_current_stream())
    core_config = LaunchConfig(grid=ready.geometry.grid, block=ready.geometry.block)
    scalars = (np.int32(N), np.int32(E), np.int64(E), np.int64(k), np.int64(k), np.float32(2.5))

    arms = {
        "driver call alone": lambda: enqueue(config, handle, slots, 0),
        "cuda.core launch": lambda: launch(core_stream, core_config, kernel, *pointers, *scalars),
        "prepared, frozen": lambda: ready(stream),
        "prepared, pointers rewritten": lambda: ready.launch(pointers, stream),
        "operation, CuPy arrays": lambda: dsv4_rt.activation_topk(logits, bias, k, out=out),
        "operation, CuPy arrays, new addresses": lambda: dsv4_rt.activation_topk(logits, bias, k, out=next(other)),
        "operation, CuPy, outputs allocated": lambda: dsv4_rt.activation_topk(logits, bias, k),
    }
    try:
        import torch
    except ImportError:
        print("torch is not installed: its arms are left out")
    else:
        t_logits, t_bias = torch.from_dlpack(logits), torch.from_dlpack(bias)
        t_out = tuple(torch.from_dlpack(x) for x in out)
        arms["operation, torch tensors"] = lambda: dsv4_rt.activation_topk(t_logits, t_bias, k, out=t_out)
        arms["operation, torch, outputs allocated"] = lambda: dsv4_rt.activation_topk(t_logits, t_bias, k)
    bench.facts["cuda_core"] = core.__version__

    # All arms in turn, several rounds: a drift of the host's clock falls on all of them.
    samples = {arm: [] for arm in arms}
    for _ in range(7):
        for arm, call in arms.items():
            samples[arm].append(bench.host_time(call, repeats=3))
    base = float(np.median(samples["cuda.core launch"]))
    return [
        {"bench": "launch", "arm": arm, "us": round(us, 3), "ratio": round(us / base, 3)}
        for arm, us in ((arm, float(np.median(values))) for arm, values in samples.items())
    ]


def readme_table(f, rows):
    lines = ["| call | us | against cuda.core |", "|---|---|---|"]
    lines += [f"| {row['arm']} | {row['us']:.2f} | {row['ratio']:.2f}x |" for row in rows]
    lines += [
        "",
        f"Host of an {f['gpu']}, Python {f['python']}, cuda.core {f['cuda_core']}, CuPy {f['cupy']}, commit "
        f"{f['commit']}, {f['date']}; medians of interleaved rounds. Written by `python bench/launch.py --readme`.",
    ]
    return "\n".join(lines)


def show(rows):
    print(f"{'':38}{'us':>8}{'ratio':>8}")
    for row in rows:
        print(f"{row['arm']:38}{row['us']:8.2f}{row['ratio']:7.2f}x")


def measured():
    bench = Bench("bench/launch.py")
    rows = measure(bench)
    bench.header("host time of one launch, activation_topk on one token; ratio to cuda.core's launch in this run")
    return bench.facts, rows


if __name__ == "__main__":
    main(__doc__, "launch", measured, show, readme_table)
