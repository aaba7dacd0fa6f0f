"""Latency of the FP4 kernels against a byte floor, a torch composition and a plain Triton kernel.

    python bench/linear.py [--out FILE] [--readme] [--recorded FILE]

The floor is the bytes read and written once at the roof of a large cudaMemcpyAsync within the GPU, measured in the same
run. The error column counts bytes that differ from the oracle's, on a sample of rows.
"""

import cupy
import numpy as np
from harness import Bench, arguments, read_out, write_out, write_readme
from kv import by_torch_and_triton, ratio, torch_of
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
    """One row: launch(x, out, stream) fills out; oracle(x) -> the arrays of out, row-major scales."""
    sets, launches = inputs(M, dtype)
    outs = [(*outputs(M, group, layout), cupy.full(max(M if extra else 1, 1), 7, cupy.float32)) for _ in sets]

    def run(i, stream=None):
        launch(sets[i % len(sets)], outs[i % len(sets)], stream)

    timed = bench.device_time([lambda s, i=i: run(i, s) for i in range(launches)])
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


def mxfp4_rivals(baselines, given):
    n = len(given)
    return (
        lambda i: baselines.torch_mxfp4(given[i % n][0]),
        [lambda i: baselines.quantize_mxfp4(*given[i % n][:3])],
    )


def by_row(layout):
    return lambda x, out, stream: quantize_nvfp4(x, scale_layout=layout, out=out, stream=stream)


def measure(bench):
    def rows_of(x, _):
        return reference.quantize_nvfp4(x)

    def at_its_scale(x, out):
        return formats.nvfp4_encode(x, out[2].get())

    rows = [
        quantise(bench, "quantize_nvfp4 by row, bf16", M, by_row("rows"), rows_of, 16, extra=4, rivals=nvfp4_rivals)
        for M in (1, 16, 64, 512, 8192)
    ]
    rows += [
        quantise(bench, "quantize_nvfp4 by row, bf16, 128x4", M, by_row("128x4"), rows_of, 16, "128x4", extra=4)
        for M in (1, 64, 8192)
    ]
    rows.append(quantise(bench, "quantize_nvfp4 by row, f32", 8192, by_row("rows"), rows_of, 16, "rows", np.float32, 4))
    for M in (64, 8192):
        workspace = cupy.empty(nvfp4_partials(M, K), cupy.float32)

        def tensor(x, out, stream, workspace=workspace):
            quantize_nvfp4_tensor(x, workspace=workspace, out=out, stream=stream)

        rows.append(quantise(bench, "quantize_nvfp4 by tensor, bf16", M, tensor, at_its_scale, 16, reads=2))
    g, saturated = cupy.full(1, 0.001, cupy.float32), cupy.zeros(1, cupy.int32)

    def given(x, out, stream):
        quantize_nvfp4_given(x, g, saturated, out=out[:2], stream=stream)

    def at_g(x, _):
        return formats.nvfp4_encode(x, np.full(1, 0.001, np.float32))

    rows += [quantise(bench, "quantize_nvfp4 given, bf16", M, given, at_g, 16) for M in (64, 8192)]

    def mxfp4(x, out, stream):
        quantize_mxfp4(x, out=out[:2], stream=stream)

    rows += [
        quantise(
            bench, "quantize_mxfp4, bf16", M, mxfp4, lambda x, _: reference.quantize_mxfp4(x), 32, rivals=mxfp4_rivals
        )
        for M in (1, 64, 8192)
    ]
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
        rows.append(
            {
                "case": f"dequantize_{name}, bf16",
                "M": 8192,
                **timing(timed, nbytes / bench.copy_roof * 1e-3),
                "bytes": nbytes,
                "host_us": round(host, 2),
                "error": wrong,
            }
        )
    return [{"bench": "linear", **each} for each in rows]


def show(rows):
    print(f"{'':36}{'M':>7}{'us':>9}{'p10 .. p90':>20}{'floor':>9}{'MB':>10}{'GB/s':>7}{'of roof':>9}", end="")
    print(f"{'vs torch':>10}{'vs Triton':>11}{'host us':>9}{'error':>7}")
    for row in rows:
        share = f"{100 * row['of_roof']:.0f} %" if row["of_roof"] > 0.2 else "latency"
        print(
            f"{row['case']:36}{row['M']:7}{row['us']:9.2f}{row['p10']:10.2f} ..{row['p90']:7.2f}{row['floor_us']:9.2f}"
            f"{row['bytes'] / 1e6:10.3f}{row['bytes'] / row['us'] * 1e-3:7.0f}{share:>9}{ratio(row, 'torch_us'):>10}"
            f"{ratio(row, 'triton_us'):>11}{row['host_us']:9.2f}{row['error']:7}"
        )


def readme_table(facts, rows):
    lines = [
        f"| kernel, K = {K} | M | us | byte floor, us | of copy roof | against torch ops | against plain Triton |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['case']}` | {row['M']} | {row['us']:.2f} | {row['floor_us']:.2f} | {100 * row['of_roof']:.0f} % "
        f"| {ratio(row, 'torch_us')} | {ratio(row, 'triton_us')} |"
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


def main():
    options = arguments(__doc__).parse_args()
    if options.recorded:
        facts, rows = read_out(options.recorded)
    else:
        bench = Bench("bench/linear.py")
        bench.copy_roof = copy_roofs(bench)[0]
        facts = {**bench.facts, "copy_roof_GBps": round(bench.copy_roof, 1)}
        rows = measure(bench)
        bench.header(f"FP4 kernels, [M, {K}]")
        print(f"roof by cudaMemcpyAsync within the GPU: {bench.copy_roof:.0f} GB/s\n")
    show(rows)
    if options.out:
        write_out(options.out, facts, rows)
    if options.readme:
        write_readme("linear", readme_table(facts, rows))


if __name__ == "__main__":
    main()
