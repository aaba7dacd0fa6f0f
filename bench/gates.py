"""Rows of bench/router.py for routers with a gate product: hidden states in, experts out.

Every launch of a cold graph has hidden states, weights and biases of its own. The pair is what the fused kernel
replaces: cuBLAS (`GateProduct`) and activation_topk; the chain is what a model file writes in torch.
"""

import itertools

import cupy
import numpy as np

import dsv4_rt
from dsv4_rt.formats import BF16
from dsv4_rt.models import FLASH, PRO
from dsv4_rt.replay import MOST
from dsv4_rt.router import dense, reference

K = 6
MODELS = {"flash": FLASH, "pro": PRO}
DECODE_TOKENS = (1, 4, 8, 16, 32, 64, 128)
PREFILL_TOKENS = (512, 4096, 8192)
HASH_TOKENS = (1, 8, 64, 512, 768, 1024)
HOST = ("host_us", "host_torch_us", "host_new_us")
HOST_CALLS = 100
CHECKED = 3  # sets of inputs whose results are compared with the float64 oracle
MAX_UNITS = 1.01 * reference.MMA_UNITS * 448  # one chain of mma over 7168 channels: no kernel here adds worse


def random_bf16(shape, size=1.0):
    """Normal random bfloat16 on the GPU: the high halves of floats."""
    x = size * cupy.random.standard_normal(shape, dtype=cupy.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16).view(BF16)


def gate_sets(shape, N, copies):
    """(hidden, w_gate, e_bias, (weights, ids), logits), poisoned."""
    E, H = shape.num_experts, shape.hidden_size
    for _ in range(copies):
        bias = (8.08 + 0.01 * cupy.random.standard_normal(E)).astype(np.float32)
        out = (cupy.full((N, K), cupy.nan, np.float32), cupy.full((N, K), -7, np.int32))
        yield random_bf16((N, H)), random_bf16((E, H), 2 / H**0.5), bias, out, cupy.empty((N, E), np.float32)


def host_times(bench, router, hidden, tokens=None):
    """Host us of an eager call: the same CuPy arrays each time, the same torch tensors, hidden states not met before.

    Few calls at a time, so that the driver's queue of launches never fills and nobody waits for the device.
    """
    N, H = hidden.shape
    found = {"host_us": bench.host_time(lambda: router(hidden, tokens), calls=HOST_CALLS)}
    try:
        import torch
    except ImportError:
        found["host_torch_us"] = None
    else:
        x = torch.from_dlpack(hidden.view(np.int16)).view(torch.bfloat16)
        ids = None if tokens is None else torch.from_dlpack(tokens)
        found["host_torch_us"] = bench.host_time(lambda: router(x, ids), calls=HOST_CALLS)
    many = random_bf16((N + 2 * MOST, H))
    others = itertools.cycle([many[i : i + N] for i in range(2 * MOST)])
    found["host_new_us"] = bench.host_time(lambda: router(next(others), tokens), calls=HOST_CALLS)
    return {name: us and round(us, 2) for name, us in found.items()}


def dense_rows(bench, model, N, timing, torch_calls):
    """One row: the way Router takes, against the pair and the chain."""
    shape = MODELS[model]
    E, H, scale = shape.num_experts, shape.hidden_size, shape.routed_scaling_factor
    launches = 40 if N <= 512 else 8
    sets = list(gate_sets(shape, N, launches))
    product, space = dsv4_rt.GateProduct(bench.device), dense.new_workspace(E, max(N, 64))
    one_launch = {pdl: dense.decode_limit(BF16, H, pdl) >= N for pdl in (False, True)}
    way = "one launch" if one_launch[False] else "cuBLAS + activation_topk"

    def fused(i, stream=None, pdl=False):
        hidden, w_gate, bias, out, _ = sets[i]
        dsv4_rt.dense_router_decode(hidden, w_gate, bias, K, scale, workspace=space, out=out, stream=stream, pdl=pdl)

    def pair(i, stream=None, pdl=False):
        hidden, w_gate, bias, out, logits = sets[i]
        product.run(hidden.data.ptr, (w_gate.data.ptr,), logits.data.ptr, N, E, H, H, E, stream)
        dsv4_rt.activation_topk(logits, bias, K, scale, out=out, stream=stream, pdl=pdl)

    def prefill(i, stream=None, pdl=False):
        hidden, w_gate, bias, out, logits = sets[i]
        dsv4_rt.dense_router_prefill(
            hidden, w_gate, bias, K, scale, product=product, logits=logits, out=out, stream=stream
        )

    def gemm(i, stream=None):
        hidden, w_gate, _, _, logits = sets[i]
        product.run(hidden.data.ptr, (w_gate.data.ptr,), logits.data.ptr, N, E, H, H, E, stream)

    def timed(call, cold=True, **options):
        return bench.device_time([lambda s, i=i: call(i, s, **options) for i in range(launches)], cold=cold)

    pair_us, pair_pdl_us = timed(pair)[0], timed(pair, pdl=True)[0]
    gemm_us = timed(gemm)[0]
    ours = fused if one_launch[False] else prefill
    for *_, out, _ in sets:
        out[0].fill(cupy.nan)
        out[1].fill(-7)
    pdl_us = timed(fused, pdl=True)[0] if one_launch[True] else None
    median = timed(ours)
    warm = bench.device_time([lambda s: ours(0, s)] * launches, cold=False)
    error = 0.0
    for hidden, w_gate, bias, out, _ in sets[:CHECKED]:
        rows = slice(0, 512)
        inputs = (hidden[rows].get(), w_gate.get(), bias.get())
        found = reference.check_dense_router(out[0][rows].get(), out[1][rows].get(), *inputs, K, scale, MAX_UNITS)
        error = max(error, found.max_weight_error)
    assert not any(bool(cupy.isnan(out[0]).any()) or bool((out[1] < 0).any()) for *_, out, _ in sets)

    router = dsv4_rt.Router.for_layer(model, 5)
    router.load_weights(sets[0][1], sets[0][2])
    router.finalize_weights()
    host = host_times(bench, router, sets[0][0])

    def chain(hidden, w_gate, bias):
        import torch

        logits = torch.mm(hidden.view(torch.bfloat16), w_gate.view(torch.bfloat16).T, out_dtype=torch.float32)
        act = torch.nn.functional.softplus(logits).sqrt()
        ids = (act + bias).topk(K, dim=-1).indices
        weights = act.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * scale, ids.int()

    inputs = [(hidden.view(np.int16), w_gate.view(np.int16), bias) for hidden, w_gate, bias, _, _ in sets]
    return {
        "case": f"router {model}",
        "way": way + (", one launch with PDL" if one_launch[True] and not one_launch[False] else ""),
        "N": N,
        **timing(bench, median, 2 * N * H + 2 * E * H + 4 * E + 8 * N * K),
        "pdl_us": pdl_us and round(pdl_us, 3),
        "warm_us": round(warm[0], 3),
        "gemm_us": round(gemm_us, 3),
        "pair_us": round(pair_us, 3),
        "pair_pdl_us": round(pair_pdl_us, 3),
        "torch_us": torch_calls(bench, inputs, launches, chain),
        **host,
        "error": error,
    }


def hash_rows(bench, model, N, timing):
    """One row: hash_gate against the whole product and hash_gate_from_logits."""
    shape = MODELS[model]
    E, H, V, scale = shape.num_experts, shape.hidden_size, shape.vocab_size, shape.routed_scaling_factor
    launches = 40 if N <= 512 else 20
    sets = list(gate_sets(shape, N, launches))
    table = cupy.random.randint(0, E, (V, K), dtype=np.int32)
    tokens = [cupy.random.randint(0, V, N, dtype=np.int32) for _ in sets]
    product = dsv4_rt.GateProduct(bench.device)

    def gather(i, stream=None, pdl=False):
        hidden, w_gate, _, out, _ = sets[i]
        dsv4_rt.hash_gate(hidden, w_gate, tokens[i], table, scale, out=out, stream=stream, pdl=pdl)

    def pair(i, stream=None, pdl=False):
        hidden, w_gate, _, out, logits = sets[i]
        product.run(hidden.data.ptr, (w_gate.data.ptr,), logits.data.ptr, N, E, H, H, E, stream)
        dsv4_rt.hash_gate_from_logits(logits, tokens[i], table, scale, out=out, stream=stream, pdl=pdl)

    def timed(call, **options):
        return bench.device_time([lambda s, i=i: call(i, s, **options) for i in range(launches)])

    pair_us, pair_pdl_us = timed(pair)[0], timed(pair, pdl=True)[0]
    for *_, out, _ in sets:
        out[0].fill(cupy.nan)
        out[1].fill(-7)
    median, pdl_us = timed(gather), timed(gather, pdl=True)[0]
    error = 0.0
    for (hidden, w_gate, _, out, _), ids in zip(sets[:CHECKED], tokens, strict=False):
        x, w = hidden.get(), w_gate.get()
        want = reference.hash_gate(x, w, ids.get(), table.get(), scale)
        magnitude = reference.gate_logits(x, w).magnitude
        error = max(error, reference.check_hash_gate(out[0].get(), out[1].get(), want, magnitude, 64))
    router = dsv4_rt.Router.for_layer(model, 0)
    router.load_weights(sets[0][1], None, table)
    router.finalize_weights()
    host = host_times(bench, router, sets[0][0], tokens[0])
    nbytes = N * (4 + 4 * K) + 2 * N * H + 2 * H * min(N * K, E) + 8 * N * K
    return {
        "case": f"hash_gate {model}",
        "way": "one launch",
        "N": N,
        **timing(bench, median, nbytes),
        "pdl_us": round(pdl_us, 3),
        "pair_us": round(pair_us, 3),
        "pair_pdl_us": round(pair_pdl_us, 3),
        **host,
        "error": error,
    }


def measure(bench, timing, torch_calls):
    rows = [
        dense_rows(bench, model, N, timing, torch_calls) for model in MODELS for N in DECODE_TOKENS + PREFILL_TOKENS
    ]
    return rows + [hash_rows(bench, model, N, timing) for model in MODELS for N in HASH_TOKENS]


def show(rows):
    print(f"\n{'':18}{'N':>6}{'us':>8}{'p10 .. p90':>16}{'PDL':>8}{'warm':>8}{'floor':>7}", end="")
    print(f"{'GEMM':>8}{'pair':>8}{'pair PDL':>9}{'torch':>8}{'host':>7}{'torch':>7}{'new':>7}{'error':>10}  way taken")

    def cell(row, name, width):
        return f"{row[name]:{width}.2f}" if row.get(name) else " " * width

    previous = None
    for row in rows:
        case = row["case"] if row["case"] != previous else ""
        previous = row["case"]
        print(
            f"{case:18}{row['N']:6}{row['us']:8.2f}{row['p10']:8.2f} ..{row['p90']:6.2f}{cell(row, 'pdl_us', 8)}"
            f"{cell(row, 'warm_us', 8)}{row['floor_us']:7.2f}{cell(row, 'gemm_us', 8)}{row['pair_us']:8.2f}"
            f"{row['pair_pdl_us']:9.2f}{cell(row, 'torch_us', 8)}{cell(row, 'host_us', 7)}"
            f"{cell(row, 'host_torch_us', 7)}{cell(row, 'host_new_us', 7)}{row['error']:10.1e}"
            f"  {row['way']}"
        )


def readme_table(rows):
    lines = [
        "| router, product included | tokens | us | us, PDL | byte floor, us | cuBLAS, us | cuBLAS + 2nd kernel, us "
        "| the same, PDL | against torch ops | host us: CuPy | torch | new addresses | the way taken |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        pdl = f"{row['pdl_us']:.2f}" if row.get("pdl_us") else ""
        chain = f"{row['torch_us'] / row['us']:.1f}x" if row.get("torch_us") else ""
        gemm = f"{row['gemm_us']:.2f}" if row.get("gemm_us") else ""
        host = " | ".join(f"{row[n]:.1f}" if row.get(n) else "" for n in HOST)
        lines.append(
            f"| `{row['case']}` | {row['N']} | {row['us']:.2f} | {pdl} | {row['floor_us']:.2f} | {gemm} "
            f"| {row['pair_us']:.2f} | {row['pair_pdl_us']:.2f} | {chain} | {host} | {row['way']} |"
        )
    return lines
