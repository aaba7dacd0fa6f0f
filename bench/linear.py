"""Latency of the FP4 kernels against a byte floor, a torch composition and a plain Triton kernel.

    python bench/linear.py [--out FILE] [--readme] [--recorded FILE]

The floor is the bytes read and written once at the roof of a large cudaMemcpyAsync within the GPU, measured in the same
run. The error column counts bytes that differ from the oracle's, on a sample of rows.
"""

import cupy
import numpy as np
from harness import Bench, main
from kv import by_torch_and_triton, ratio, share, torch_of
from memory_kernels import copy_roofs, timing

from dsv4_rt import formats
from dsv4_rt.formats import BF16
from dsv4_rt.linear import reference
from dsv4_rt.linear.ops import (
    dequantize_mxfp4,
    dequantize_nvfp4,
    nvfp4_partials,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_nvfp4_given,
    quantize_nvfp4_tensor,
)

K = 7168
SPREAD = 150 * 2**20  # bytes that the sets of a row pass together
SAMPLE = 64  # rows the oracle checks
FEW = 64  # rows up to which programmatic dependent launch is measured too


def inputs(M, dtype):
    """(sets of x, launches): enough sets that none is left in the L2 by a launch before."""
    size = M * K * np.dtype(dtype).itemsize
    launches = 20
    sets = [
        cupy.random.standard_normal((M, K), dtype=cupy.float32).astype(dtype)
        for _ in range(min(launches, max(4, -(-SPREAD // size))))
    ]
    return sets, launches


def outputs(M, group, layout):
    columns = K // group
    shape = (M, columns) if layout == "rows" else (formats.scale_bytes_128x4(M, columns),)
    return cupy.full((M, K // 2), 0xA5, cupy.uint8), cupy.full(shape, 0xA5, cupy.uint8)


def quantise(bench, case, M, launch, oracle, group, layout="rows", dtype=BF16, extra=0, reads=1, rivals=None):
    """One row: launch(x, out, stream, pdl) fills out; oracle(x, out) -> the arrays of out, row-major scales."""
    sets, launches = inputs(M, dtype)
    outs = [(*outputs(M, group, layout), cupy.full(max(M if extra else 1, 1), 7, cupy.float32)) for _ in sets]

    def run(i, stream=None, pdl=False):
        launch(sets[i % len(sets)], outs[i % len(sets)], stream, pdl)

    timed = bench.device_time([lambda s, i=i: run(i, s) for i in range(launches)])
    early = bench.device_time([lambda s, i=i: run(i, s, True) for i in range(launches)])[0] if M <= FEW else None
    wrong = 0
    if oracle:
        some = slice(max(M - SAMPLE, 0), M)
        q, sf, _ = outs[0]
        sf = sf if layout == "rows" else formats.deinterleave_128x4(sf.get(), M, K // group)
        sf = np.asarray(sf.get() if hasattr(sf, "get") else sf)
        for got, want in zip((q[some].get(), sf[some]), oracle(sets[0][some].get(), outs[0]), strict=False):
            wrong += int((got != want).sum())
    host = bench.host_time(lambda: run(0), calls=100)
    nbytes = M * (K * np.dtype(dtype).itemsize * reads + K // 2 + K // group + extra)
    baselines = {}
    if rivals:
        try:
            import linear_baselines
        except ImportError:
            pass
        else:
            given = [torch_of(x, *out) for x, out in zip(sets, outs, strict=True)]
            chain, kernels = rivals(linear_baselines, given)
            baselines = by_torch_and_triton(bench, launches, chain, kernels)
    return {
        "case": case,
        "M": M,
        **timing(timed, nbytes / bench.copy_roof * 1e-3),
        "bytes": nbytes,
        "pdl_us": early and round(early, 3),
        "host_us": round(host, 2),
        "error": wrong,
        **baselines,
    }


def nvfp4_rivals(baselines, given):
    n = len(given)
    return (
        lambda i: baselines.torch_nvfp4(given[i % n][0]),
        [lambda i, w=w: baselines.quantize_nvfp4(*given[i % n], w) for w in (4, 8, 16)],
    )


def tensor_rivals(baselines, given):
    return lambda i: baselines.torch_nvfp4_tensor(given[i % len(given)][0]), []


def given_rivals(baselines, given):
    return lambda i: baselines.torch_nvfp4_given(given[i % len(given)][0], 0.001), []


def mxfp4_rivals(baselines, given):
    n = len(given)
    return (
        lambda i: baselines.torch_mxfp4(given[i % n][0]),
        [lambda i: baselines.quantize_mxfp4(*given[i % n][:3])],
    )


def by_row(layout):
    return lambda x, out, stream, pdl: quantize_nvfp4(x, scale_layout=layout, out=out, stream=stream, pdl=pdl)


def measure(bench):
    def rows_of(x, _):
        return reference.quantize_nvfp4(x)

    def at_its_scale(x, out):
        return formats.nvfp4_encode(x, out[2].get())

    rows = [
        quantise(bench, "quantize_nvfp4 by row, bf16", M, by_row("rows"), rows_of, 16, extra=4, rivals=nvfp4_rivals)
        for M in (1, 16, 32, 64, 512, 8192)
    ]
    rows += [
        quantise(bench, "quantize_nvfp4 by row, bf16, 128x4", M, by_row("128x4"), rows_of, 16, "128x4", extra=4)
        for M in (1, 64, 8192)
    ]
    f32 = ("rows", np.float32, 4, 1, nvfp4_rivals)
    rows.append(quantise(bench, "quantize_nvfp4 by row, f32", 8192, by_row("rows"), rows_of, 16, *f32))
    for M, layout in ((64, "rows"), (8192, "rows"), (8192, "128x4")):
        workspace = cupy.empty(nvfp4_partials(M, K), cupy.float32)

        def tensor(x, out, stream, pdl, workspace=workspace, layout=layout):
            quantize_nvfp4_tensor(x, scale_layout=layout, workspace=workspace, out=out, stream=stream, pdl=pdl)

        case, rivals = ("", tensor_rivals) if layout == "rows" else (", 128x4", None)
        case = "quantize_nvfp4 by tensor, bf16" + case
        rows.append(quantise(bench, case, M, tensor, at_its_scale, 16, layout, reads=2, rivals=rivals))
    g, saturated = cupy.full(1, 0.001, cupy.float32), cupy.zeros(1, cupy.int32)

    def at_g(x, _):
        return formats.nvfp4_encode(x, np.full(1, 0.001, np.float32))

    for M, layout in ((64, "rows"), (8192, "rows"), (8192, "128x4")):

        def given(x, out, stream, pdl, layout=layout):
            quantize_nvfp4_given(x, g, saturated, scale_layout=layout, out=out[:2], stream=stream, pdl=pdl)

        case, rivals = ("", given_rivals) if layout == "rows" else (", 128x4", None)
        rows.append(quantise(bench, "quantize_nvfp4 given, bf16" + case, M, given, at_g, 16, layout, rivals=rivals))

    def micro(x, _):
        return reference.quantize_mxfp4(x)

    for M, layout in ((1, "rows"), (64, "rows"), (8192, "rows"), (8192, "128x4")):

        def mxfp4(x, out, stream, pdl, layout=layout):
            quantize_mxfp4(x, scale_layout=layout, out=out[:2], stream=stream, pdl=pdl)

        case, rivals = ("", mxfp4_rivals) if layout == "rows" else (", 128x4", None)
        rows.append(quantise(bench, "quantize_mxfp4, bf16" + case, M, mxfp4, micro, 32, layout, rivals=rivals))
    for name, group, encode in (("nvfp4", 16, quantize_nvfp4), ("mxfp4", 32, quantize_mxfp4)):
        packed = encode(cupy.random.standard_normal((8192, K), dtype=cupy.float32).astype(BF16))
        decode = dequantize_nvfp4 if name == "nvfp4" else dequantize_mxfp4
        back = [cupy.full((8192, K), 7, BF16) for _ in range(3)]
        timed = bench.device_time(
            [lambda s, i=i, d=decode, p=packed, b=back: d(*p, out=b[i % 3], stream=s) for i in range(20)]
        )
        few = [a[:SAMPLE].get() for a in packed]
        oracle = reference.dequantize_nvfp4 if name == "nvfp4" else reference.dequantize_mxfp4
        wrong = int((back[0][:SAMPLE].get().view(np.uint16) != oracle(*few).view(np.uint16)).sum())
        host = bench.host_time(lambda d=decode, p=packed, b=back: d(*p, out=b[0]), calls=100)
        nbytes = 8192 * (2 * K + K // 2 + K // group)
        baselines = {}
        try:
            import linear_baselines
        except ImportError:
            pass
        else:
            chain = getattr(linear_baselines, f"torch_dequantize_{name}")
            parts = torch_of(*packed)
            baselines = by_torch_and_triton(bench, 20, lambda i, c=chain, p=parts: c(*p), [])
        rows.append(
            {
                "case": f"dequantize_{name}, bf16",
                "M": 8192,
                **timing(timed, nbytes / bench.copy_roof * 1e-3),
                "bytes": nbytes,
                "host_us": round(host, 2),
                "error": wrong,
                **baselines,
            }
        )
    return [{"bench": "linear", **each} for each in rows]


def with_pdl(row):
    return f"{row['pdl_us']:.2f}" if row.get("pdl_us") else ""


def show(rows):
    print(f"{'':38}{'M':>7}{'us':>9}{'p10 .. p90':>20}{'pdl us':>8}{'floor':>8}{'MB':>10}{'GB/s':>7}", end="")
    print(f"{'of roof':>9}{'vs torch':>10}{'vs Triton':>11}{'host us':>9}{'error':>7}")
    for row in rows:
        print(
            f"{row['case']:38}{row['M']:7}{row['us']:9.2f}{row['p10']:10.2f} ..{row['p90']:7.2f}{with_pdl(row):>8}"
            f"{row['floor_us']:8.2f}{row['bytes'] / 1e6:10.3f}{row['bytes'] / row['us'] * 1e-3:7.0f}{share(row):>9}"
            f"{ratio(row, 'torch_us'):>10}{ratio(row, 'triton_us'):>11}{row['host_us']:9.2f}{row['error']:7}"
        )


def readme_table(facts, rows):
    lines = [
        f"| kernel, K = {K} | M | us | with PDL, us | byte floor, us | of copy roof | against torch ops "
        "| against plain Triton |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['case']}` | {row['M']} | {row['us']:.2f} | {with_pdl(row)} "
        f"| {row['floor_us']:.2f} | {share(row)} | {ratio(row, 'torch_us')} | {ratio(row, 'triton_us')} |"
        for row in rows
    ]
    f = facts
    lines += [
        "",
        f"{f['gpu']} (`{f['arch']}`), driver {f['driver']}, {f['compiler']}, commit {f['commit']}, {f['date']}, clocks "
        f"not locked. Device time by CUDA-graph replay, cold, medians; an empty node takes {f['empty_node_us']:.2f} us."
        f" The floor is the bytes read (by tensor: twice) and written at {f['copy_roof_GBps']:.0f} GB/s, a large "
        "cudaMemcpyAsync of the same run. Written by `python bench/linear.py --readme`.",
    ]
    return "\n".join(lines)


def measured():
    bench = Bench("bench/linear.py")
    bench.copy_roof = copy_roofs(bench)[0]
    rows = measure(bench)
    bench.header(f"FP4 kernels, [M, {K}]")
    print(f"roof by cudaMemcpyAsync within the GPU: {bench.copy_roof:.0f} GB/s\n")
    return {**bench.facts, "copy_roof_GBps": round(bench.copy_roof, 1)}, rows


if __name__ == "__main__":
    main(__doc__, "linear", measured, show, readme_table)
