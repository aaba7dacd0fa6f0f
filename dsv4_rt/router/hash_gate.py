"""Launchers of hash routing with gate weights. The kernels are in kernels/router/hash_gate.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsv4_rt.arrays import I32, I64
from dsv4_rt.checks import Arg, Dtype, check_range, check_scale, match
from dsv4_rt.device import Device
from dsv4_rt.formats import BF16, F32
from dsv4_rt.launch import POINTER, Prepared, load
from dsv4_rt.operation import Call, Instance, Operation, Plan
from dsv4_rt.router.dense import check_gate_shape, check_rows_aligned
from dsv4_rt.router.ops import MAX_K

HASH_GATE = "router/hash_gate.cu"
FROM_LOGITS_WARPS = 4

# Up to how many tokens hash_gate is ahead of the whole product and hash_gate_from_logits.
# bench/results/h200-hash-gate-tiles.txt.
HASH_GATE_LIMIT = 768
_C_INT = {I32: "int", I64: "long long"}
_C_WEIGHT = {BF16: "bf16", F32: "float"}


def hash_gate(
    hidden: Any,
    w_gate: Any,
    token_ids: Any,
    table: Any,
    routed_scaling_factor: float = 2.5,
    *,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """Route tokens by a fixed table of experts, weighed by the gate, without the product of the other experts.

        ids[n, j]     = table[token_ids[n], j]
        act[n, j]     = sqrt(softplus(sum_c hidden[n, c] * w_gate[ids[n, j], c]))
        weights[n, j] = act[n, j] * (1 / sum_j act[n, j]) * routed_scaling_factor

    A token id outside 0 .. V-1 gives id -1 and weight 0 in every place, an entry outside 0 .. E-1 in its own. A zero
    sum gives zero weights, a non-finite one what IEEE arithmetic gives. The same bits on every run and for any N.
    Source: DeepSeek-V4 inference reference, model.py: Gate.forward, layers 0 to 2.

    Args:
        hidden: [N, K] bfloat16, K a multiple of 64; rows may be strided, each 16 B aligned.
        w_gate: [E, K] bfloat16 or float32, E up to 512, 16 B aligned.
        token_ids: [N] int32 or int64.
        table: [V, k] int32 or int64, k from 1 to 16, contiguous.
        routed_scaling_factor: finite; 1.5 in Flash, 2.5 in Pro.
        out: (weights, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation; the kernel ahead may write hidden. What else is read here,
            token_ids too, must be complete before that kernel starts: the weights of the experts are on their way
            before it ends.

    Returns:
        weights: [N, k] float32, no unit.
        ids: [N, k] int32, expert numbers.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: N k rows of w_gate and hidden, writes 8 N k B: for many tokens the whole product and
    `hash_gate_from_logits` cost less (`HASH_GATE_LIMIT`).
    """
    if type(routed_scaling_factor) is not float:
        routed_scaling_factor = check_scale("hash_gate", "routed_scaling_factor", routed_scaling_factor)
    return _HASH_GATE((hidden, w_gate, token_ids, table), out, (routed_scaling_factor, pdl), stream)


def hash_gate_from_logits(
    logits: Any,
    token_ids: Any,
    table: Any,
    routed_scaling_factor: float = 2.5,
    *,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """`hash_gate` for tokens whose logits are known.

    Args:
        logits: [N, E] float32; rows may be strided.
        token_ids, table, routed_scaling_factor, out, stream, pdl: as for `hash_gate`; with pdl the kernel ahead may
            write logits and token_ids.

    Returns:
        weights: [N, k] float32; ids: [N, k] int32.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads N k logits and table entries at random, writes 8 N k B.
    """
    if type(routed_scaling_factor) is not float:
        routed_scaling_factor = check_scale("hash_gate_from_logits", "routed_scaling_factor", routed_scaling_factor)
    return _HASH_GATE_FROM_LOGITS((logits, token_ids, table), out, (routed_scaling_factor, pdl), stream)


def hash_gate_instance(N: int, K: int, k: int, weight: Dtype, token: Dtype, entry: Dtype) -> tuple[str, int]:
    """Name expression and warps a block.

    All of a row in flight where the registers suffice: 96 for weights; bench/results/h200-hash-gate-tiles.txt.
    """
    chunks = 2 if k * 2 * (4 if weight == BF16 else 8) <= 96 else 1
    warps = 14 if K > 4096 and N <= 64 and k <= 8 else 8
    types = f"{_C_WEIGHT[weight]}, {_C_INT[token]}, {_C_INT[entry]}"
    return f"hash_gate<{types}, {k}, {chunks}, {warps}>", warps


def prepare_hash_gate(
    on: Device,
    N: int,
    E: int,
    K: int,
    k: int,
    V: int,
    scale: float,
    dtypes: tuple[Dtype, Dtype, Dtype],
    arguments: tuple[Any, ...] = (POINTER,) * 6,
    *,
    strides: tuple[int, int, int] | None = None,
    pdl: bool = False,
) -> Prepared:
    """The launch behind `hash_gate`, unchecked.

    Args:
        dtypes: of w_gate, token_ids and table.
        arguments: hidden, w_gate, token_ids, table, weights, ids, each an address as np.uint64 or POINTER.
        strides: elements between rows of hidden, weights and ids; contiguous if None.
    """
    name, warps = hash_gate_instance(N, K, k, *dtypes)
    numbers = (np.int32(E), np.int32(K), np.int64(V), *(np.int64(s) for s in strides or (K, k, k)), np.float32(scale))
    return load(HASH_GATE, name, on).prepare(N, 32 * warps, *arguments, *numbers, pdl=pdl)


def prepare_hash_gate_from_logits(
    on: Device,
    N: int,
    E: int,
    k: int,
    V: int,
    scale: float,
    dtypes: tuple[Dtype, Dtype],
    arguments: tuple[Any, ...] = (POINTER,) * 5,
    *,
    strides: tuple[int, int, int] | None = None,
    pdl: bool = False,
) -> Prepared:
    """The launch behind `hash_gate_from_logits`, unchecked: logits, token_ids, table, weights, ids."""
    name = f"hash_gate_from_logits<{_C_INT[dtypes[0]]}, {_C_INT[dtypes[1]]}, {k}, {FROM_LOGITS_WARPS}>"
    numbers = (np.int32(N), np.int32(E), np.int64(V), *(np.int64(s) for s in strides or (E, k, k)), np.float32(scale))
    grid = -(-N // (2 * FROM_LOGITS_WARPS))
    return load(HASH_GATE, name, on).prepare(grid, 32 * FROM_LOGITS_WARPS, *arguments, *numbers, pdl=pdl)


def _out_strides(call: Call, k: int) -> tuple[int, int]:
    return (k, k) if call.outputs is None else (call.outputs[0].strides[0], call.outputs[1].strides[0])


def _plan_hash_gate(call: Call) -> Plan:
    hidden, w_gate, token_ids, table = call.inputs
    assert hidden is not None
    assert w_gate is not None
    assert token_ids is not None
    assert table is not None
    scale, pdl = call.settings
    check_scale("hash_gate", "routed_scaling_factor", scale)
    args = {
        "hidden": Arg(hidden, "N K", BF16, rows=True),
        "w_gate": Arg(w_gate, "E K", (BF16, F32), align=16),
        "token_ids": Arg(token_ids, "N", (I32, I64)),
        "table": Arg(table, "V k", (I32, I64)),
    }
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], "N k", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], "N k", I32, rows=True, output=True)
    N, K, E, V, k = match("hash_gate", **args).values()
    check_range("hash_gate", "k", k, 1, MAX_K)
    check_gate_shape("hash_gate", E, K, 1)
    ready = None
    if N:
        check_rows_aligned("hash_gate", "hidden", hidden.ptr, hidden.strides[0] if N > 1 else 0, 2)
        dtypes = (w_gate.dtype, token_ids.dtype, table.dtype)
        strides = (hidden.strides[0], *_out_strides(call, k))
        ready = prepare_hash_gate(call.device, N, E, K, k, V, scale, dtypes, strides=strides, pdl=bool(pdl))
    return Plan((((N, k), F32), ((N, k), I32)), ready)


def _plan_hash_gate_from_logits(call: Call) -> Plan:
    logits, token_ids, table = call.inputs
    assert logits is not None
    assert token_ids is not None
    assert table is not None
    scale, pdl = call.settings
    check_scale("hash_gate_from_logits", "routed_scaling_factor", scale)
    args = {
        "logits": Arg(logits, "N E", F32, rows=True),
        "token_ids": Arg(token_ids, "N", (I32, I64)),
        "table": Arg(table, "V k", (I32, I64)),
    }
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], "N k", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], "N k", I32, rows=True, output=True)
    N, E, V, k = match("hash_gate_from_logits", **args).values()
    check_range("hash_gate_from_logits", "k", k, 1, MAX_K)
    ready = None
    if N:
        strides = (logits.strides[0], *_out_strides(call, k))
        ready = prepare_hash_gate_from_logits(
            call.device, N, E, k, V, scale, (token_ids.dtype, table.dtype), strides=strides, pdl=bool(pdl)
        )
    return Plan((((N, k), F32), ((N, k), I32)), ready)


_HASH_GATE = Operation(
    "hash_gate", ("hidden", "w_gate", "token_ids", "table"), ("weights", "ids"), _plan_hash_gate
)
_HASH_GATE_FROM_LOGITS = Operation(
    "hash_gate_from_logits", ("logits", "token_ids", "table"), ("weights", "ids"), _plan_hash_gate_from_logits
)


def _instances() -> tuple[Instance, ...]:
    found: dict[str, int] = {}
    for token in (I32, I64):
        for weight in (BF16, F32):
            for K, k in ((4096, 6), (7168, 6), (8192, 16)):
                for N in (1, 256):
                    found[hash_gate_instance(N, K, k, weight, token, I32)[0]] = 168 if k == 6 else 248
        found[f"hash_gate_from_logits<{_C_INT[token]}, int, 6, {FROM_LOGITS_WARPS}>"] = 32
    return tuple(Instance(HASH_GATE, name, registers) for name, registers in found.items())


INSTANCES = _instances()
