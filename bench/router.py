"""Latency of the router kernels against a byte floor, a torch composition and a plain Triton kernel.

    python bench/router.py [--out FILE] [--plot FILE] [--readme] [--recorded FILE]

Every timed result is checked against the oracle; the error column is the largest relative weight error, or how many
rows differ where nothing may.
"""

from pathlib import Path

import cupy
import gates
import numpy as np
from harness import Bench, arguments, read_out, write_out, write_readme

import dsv4_rt
from dsv4_rt.formats import BF16
from dsv4_rt.router import reference
from dsv4_rt.router.hash_gate import HASH_GATE_LIMIT

K = 6
CACHE_SPREAD = 150 * 2**20  # bytes of inputs a cold graph walks over: well past the L2
TOKENS = (1, 8, 64, 512, 2048, 4096, 8192, 16384)
README_TOKENS = (1, 64, 512, 4096, 8192, 16384)


def copies_and_launches(nbytes, N):
    """How many sets of inputs, and launches a graph: as many launches as sets, or sets that together pass the L2."""
    launches = 40 if N <= 512 else 20
    return min(launches, max(8, -(-CACHE_SPREAD // max(nbytes, 1)))), launches


def activation_topk(bench, E, N, pdl=False):
    """One row of the table, and the callables that made it."""
    scale = 1.5 if E == 256 else 2.5
    nbytes = 4 * N * E + 4 * E + 8 * N * K
    copies, launches = copies_and_launches(nbytes, N)
    sets = []
    for _ in range(copies):
        logits = 2 * cupy.random.standard_normal((N, E), dtype=cupy.float32)
        bias = (8.08 + 0.01 * cupy.random.standard_normal(E)).astype(cupy.float32)
        out = (cupy.full((N, K), cupy.nan, cupy.float32), cupy.full((N, K), -7, cupy.int32))
        sets.append((logits, bias, out))

    def launch(i, stream=None):
        logits, bias, out = sets[i % copies]
        dsv4_rt.activation_topk(logits, bias, K, scale, out=out, stream=stream, pdl=pdl)

    timed = bench.device_time([lambda s, i=i: launch(i, s) for i in range(launches)])
    warm = bench.device_time([lambda s: launch(0, s)] * launches, cold=False)
    host = bench.host_time(lambda: launch(0))
    found = [
        reference.check_activation_topk(out[0].get(), out[1].get(), logits.get(), bias.get(), K, scale)
        for logits, bias, out in sets
    ]
    baselines = {} if pdl else {name: f(bench, sets, launches, scale) for name, f in BASELINES.items()}
    return {
        "case": f"activation_topk E={E}" + (" pdl" if pdl else ""),
        "N": N,
        **timing(bench, timed, nbytes),
        "warm_us": round(warm[0], 3),
        "host_us": round(host, 2),
        "error": max(each.max_weight_error for each in found),
        "reordered": sum(each.rows_reordered for each in found),
        **baselines,
    }


def timing(bench, timed, nbytes):
    median, low, high = timed
    floor = nbytes / bench.roof * 1e-6
    return {
        "us": round(median, 3),
        "p10": round(low, 3),
        "p90": round(high, 3),
        "MB": round(nbytes / 1e6, 3),
        "GBps": round(nbytes / median * 1e-3, 1),
        "floor_us": round(floor, 3),
        "of_roof": round(floor / median, 3),
    }


def torch_chain(bench, sets, launches, scale):
    """softplus, sqrt, add, topk, gather, sum, divide, scale: what a model file writes."""

    def chain(logits, bias):
        import torch

        act = torch.nn.functional.softplus(logits).sqrt()
        ids = (act + bias).topk(K, dim=-1).indices
        weights = act.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * scale, ids.int()

    return torch_calls(bench, [(logits, bias) for logits, bias, _ in sets], launches, chain)


def torch_calls(bench, sets, launches, chain):
    """Time `chain` of torch tensors over the same inputs; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    inputs = [tuple(torch.from_dlpack(x) for x in each) for each in sets]

    def call(i, stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            chain(*inputs[i % len(inputs)])

    return captured_by_torch(bench, call, min(launches, 8))


def captured_by_torch(bench, call, launches):
    """Time torch work: its allocator wants torch's own capture. Same sweep, same events."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(3):
            call(i, stream.cuda_stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                call(i, torch.cuda.current_stream().cuda_stream)
        samples = []
        for _ in range(9):
            bench.sweep(stream.cuda_stream)
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record(stream)
            graph.replay()
            after.record(stream)
            after.synchronize()
            samples.append(before.elapsed_time(after) * 1e3 / launches)
    return round(float(np.median(samples[2:])), 3)


def triton_kernel(bench, sets, launches, scale):
    """One program a row: k rounds of max and lowest index over the padded row."""
    try:
        import torch
        from baselines import router_top_k
    except ImportError:
        return None
    inputs = [tuple(torch.from_dlpack(a) for a in (x, b, *out)) for x, b, out in sets]

    def call(i, stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            router_top_k(*inputs[i % len(inputs)], scale)

    return captured_by_torch(bench, call, launches)


BASELINES = {"torch_us": torch_chain, "triton_us": triton_kernel}


def topk_select(bench, E, N, dtype):
    nbytes = N * E * np.dtype(dtype).itemsize + N * K * (4 + np.dtype(dtype).itemsize)
    copies, launches = copies_and_launches(nbytes, N)
    sets = []
    for _ in range(copies):
        scores = cupy.random.standard_normal((N, E), dtype=cupy.float32).astype(dtype)
        sets.append((scores, (cupy.full((N, K), cupy.nan, dtype), cupy.full((N, K), -7, cupy.int32))))

    def launch(i, stream=None):
        scores, out = sets[i % copies]
        dsv4_rt.topk_select(scores, K, out=out, stream=stream)

    timed = bench.device_time([lambda s, i=i: launch(i, s) for i in range(launches)])
    wrong = 0
    for scores, out in sets:
        values, ids = reference.topk_select(scores.get(), K)
        wrong += int(((out[1].get() != ids) | (out[0].get() != values)).any(axis=1).sum())
    host = bench.host_time(lambda: launch(0))
    name = f"topk_select {'f32' if np.dtype(dtype) == np.float32 else 'bf16'} E={E}"
    torch_us = torch_calls(bench, [(scores,) for scores, _ in sets], launches, lambda scores: scores.topk(K, dim=-1))
    facts = {"host_us": round(host, 2), "error": wrong, "torch_us": torch_us}
    return {"case": name, "N": N, **timing(bench, timed, nbytes), **facts}


def hash_router(bench, N):
    V = 129_280
    nbytes = N * (4 + 4 * K) + 8 * N * K
    _, launches = copies_and_launches(nbytes, N)
    sets = []
    for _ in range(launches):
        tokens = cupy.random.randint(0, V, N, dtype=cupy.int32)
        table = cupy.random.randint(0, 256, (V, K), dtype=cupy.int32)
        sets.append((tokens, table, (cupy.full((N, K), cupy.nan, cupy.float32), cupy.full((N, K), -7, cupy.int32))))

    def launch(i, stream=None):
        tokens, table, out = sets[i]
        dsv4_rt.hash_router(tokens, table, out=out, stream=stream)

    timed = bench.device_time([lambda s, i=i: launch(i, s) for i in range(launches)])
    wrong = 0
    for tokens, table, out in sets:
        weights, ids = reference.hash_router(tokens.get(), table.get())
        wrong += int(((out[1].get() != ids) | (out[0].get() != weights)).any(axis=1).sum())
    host = bench.host_time(lambda: launch(0))

    def chain(tokens, table):
        import torch

        ids = table[tokens]
        return ids, torch.full(ids.shape, 1 / K, device=ids.device)

    torch_us = torch_calls(bench, [(tokens, table) for tokens, table, _ in sets], launches, chain)
    facts = {"host_us": round(host, 2), "error": wrong, "torch_us": torch_us}
    return {"case": f"hash_router V={V}", "N": N, **timing(bench, timed, nbytes), **facts}


def show(rows):
    gated = [row for row in rows if "way" in row]
    rows = [row for row in rows if "way" not in row]
    print(f"{'':26}{'N':>7}{'us':>8}{'p10 .. p90':>16}{'MB':>8}{'GB/s':>7}{'of roof':>9}", end="")
    print(f"{'vs torch':>10}{'vs Triton':>11}{'host us':>9}{'error':>10}")
    previous = None
    for row in rows:
        ratio = {name: f"{row[name] / row['us']:.1f}x" if row.get(name) else "" for name in BASELINES}
        error = f"{row['error']:.1e}" if isinstance(row["error"], float) else str(row["error"])
        share = f"{100 * row['of_roof']:.0f} %" if row["of_roof"] > 0.2 else "launch"
        case = row["case"] if row["case"] != previous else ""
        previous = row["case"]
        print(
            f"{case:26}{row['N']:7}{row['us']:8.2f}{row['p10']:8.2f} ..{row['p90']:6.2f}{row['MB']:8.2f}"
            f"{row['GBps']:7.0f}{share:>9}{ratio['torch_us']:>10}{ratio['triton_us']:>11}"
            f"{row['host_us']:9.2f}{error:>10}"
        )
    gates.show(gated)


def readme_table(facts, rows):
    f = facts
    gated = [row for row in rows if "way" in row]
    rows = [row for row in rows if "way" not in row]
    early = {(row["case"], row["N"]): row["us"] for row in rows}
    lines = [
        "| kernel | tokens | us | us, PDL | byte floor, us | of read roof | against torch ops | against plain Triton |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["N"] in README_TOKENS and not row["case"].endswith(" pdl"):
            torch_us, triton_us = (f"{row[n] / row['us']:.1f}x" if row.get(n) else "" for n in BASELINES)
            pdl = early.get((row["case"] + " pdl", row["N"]))
            lines.append(
                f"| `{row['case']}` | {row['N']} | {row['us']:.2f} | {f'{pdl:.2f}' if pdl else ''} "
                f"| {row['floor_us']:.2f} | {100 * row['of_roof']:.0f} % | {torch_us} | {triton_us} |"
            )
    lines += ["", *gates.readme_table(gated)]
    lines += [
        "",
        f"{f['gpu']} (`{f['arch']}`), driver {f['driver']}, {f['compiler']}, commit {f['commit']}, {f['date']}, clocks "
        "not locked. Device time by CUDA-graph replay, cold (L2 evicted, inputs not left in it), medians; an empty "
        f"node takes {f['empty_node_us']:.2f} us, the read roof is {f['read_roof_TBps']:.2f} TB/s in the same run and "
        f"gives the byte floor. k = {K}. PDL: with programmatic dependent launch (`pdl=True`); comparisons are "
        "without. The second table starts at the hidden states: flash has 4096 channels and 256 experts, pro 7168 and "
        "384; the second kernel is activation_topk or hash_gate_from_logits, and Router leaves hash_gate for that pair "
        f"above {HASH_GATE_LIMIT} tokens. Host: an eager `router(...)`, with arrays that come again and with hidden "
        "states whose addresses never do, where cuBLAS cannot be replayed from a graph. Written by "
        "`python bench/router.py --readme`.",
    ]
    return "\n".join(lines)


def plot(path, facts, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for label in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == label]
        axes.loglog([row["N"] for row in mine], [row["us"] for row in mine], "o-", label=label)
        axes.loglog(
            [row["N"] for row in mine], [row["floor_us"] for row in mine], ":", color=axes.lines[-1].get_color()
        )
    axes.set_xlabel("N, tokens")
    axes.set_ylabel("device time, us (dotted: bytes at the read roof)")
    axes.set_title(f"{facts['gpu']}, cold, k = {K}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def measure(bench):
    rows = [activation_topk(bench, E, N) for E in (256, 384) for N in TOKENS]
    rows += [activation_topk(bench, E, N, pdl=True) for E in (256, 384) for N in TOKENS]
    rows += [topk_select(bench, 256, N, np.float32) for N in (1, 512, 16384)]
    rows += [topk_select(bench, 256, N, BF16) for N in (1, 512, 16384)]
    rows += [topk_select(bench, 4096, N, np.float32) for N in (1, 512)]
    rows += [hash_router(bench, N) for N in (1, 512, 16384)]
    rows += gates.measure(bench, timing, torch_calls)
    return [{"bench": "router", **row} for row in rows]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, help="draw the rows into a PNG")
    options = parser.parse_args()
    if options.recorded:
        facts, rows = read_out(options.recorded)
    else:
        bench = Bench("bench/router.py")
        facts, rows = bench.facts, measure(bench)
        bench.header(f"router kernels, k = {K}; activation_topk: f32 [N, E] -> f32 [N, {K}] + i32 [N, {K}]")
    show(rows)
    if options.out:
        write_out(options.out, facts, rows)
    if options.plot:
        plot(options.plot, facts, rows)
    if options.readme:
        write_readme("router", readme_table(facts, rows))


if __name__ == "__main__":
    main()
