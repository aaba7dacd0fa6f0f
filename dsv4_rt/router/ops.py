"""Launchers of the router kernels: docstring, checks, tuning, launch. The kernels are in kernels/router/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_rt.arrays import I32, I64
from dsv4_rt.checks import Arg, check_range, check_scale, match
from dsv4_rt.device import Device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16, F32
from dsv4_rt.launch import POINTER, Prepared, load
from dsv4_rt.operation import Call, Instance, Operation, Plan

MAX_K = 16
MAX_EXPERTS = 1024  # activation_topk
MAX_SCORES = 4096  # topk_select


def hash_router(
    token_ids: Any, table: Any, *, out: tuple[Any, Any] | None = None, stream: Any = None, pdl: bool = False
) -> tuple[Any, Any]:
    """Route tokens by a fixed table of experts, all with the same weight.

        ids[n, j]     = table[token_ids[n], j]
        weights[n, j] = 1 / k                      never scaled

    A token id outside 0 .. V-1 gives id -1 and weight 0.
    Source: the hash layers (0 to 2) of DeepSeek-V4, with uniform weights; released checkpoints weigh by gate logits.

    Args:
        token_ids: [N] int32 or int64.
        table: [V, k] int32 or int64, k from 1 to 16, contiguous.
        out: (weights, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation: it may start before the kernel ahead in the stream ends.

    Returns:
        weights: [N, k] float32, no unit.
        ids: [N, k] int32, expert numbers.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads N token ids and N table rows, writes 8 N k B.
    """
    return _HASH_ROUTER((token_ids, table), out, (pdl,), stream)


def topk_select(
    scores: Any,
    k: int,
    *,
    lengths: Any = None,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """The k largest scores of every row, in descending order, and where they are.

        ids[n] = the k columns e < lengths[n] with the largest scores[n, e]; equal scores by lower column

    -0 equals +0; NaN is never chosen; -inf and +inf are ordinary scores. A place that is missing because a row has
    fewer than k candidates has id -1 and value -inf. The same bits on every run.

    Args:
        scores: [N, E] float32 or bfloat16, E from k to 4096; rows may be strided.
        k: how many, 1 to 16.
        lengths: [N] int32, candidates of each row, clipped to 0 .. E; E everywhere if None.
        out: (values, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation.

    Returns:
        values: [N, k] in the dtype of the scores, the bits as they were.
        ids: [N, k] int32.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above, or k > E.

    Traffic: reads N E scores once, writes k (4 + itemsize) B a row.
    """
    if type(k) is not int:
        k = check_range("topk_select", "k", k, 1, MAX_K)
    return _TOPK_SELECT((scores, lengths), out, (k, pdl), stream)


def activation_topk(
    logits: Any,
    e_bias: Any,
    top_k: int = 6,
    routed_scaling_factor: float = 2.5,
    *,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """The gate of a DeepSeek-V4 router, from logits to experts and weights, in one launch.

        act[n, e]     = sqrt(softplus(logits[n, e]))          softplus(x) = max(x, 0) + log1p(exp(-|x|))
        ids[n]        = the top_k experts with the largest act + e_bias, in that order; equal scores by lower index
        weights[n, j] = act[n, ids[n, j]] * (1 / sum_j act[n, ids[n, j]]) * routed_scaling_factor

    The bias selects, it does not weigh. A NaN score is never chosen; a missing place has id -1 and weight 0; a zero sum
    gives zero weights, a non-finite one what IEEE arithmetic gives. The same bits on every run.
    Source: DeepSeek-V4 inference reference, model.py: Gate.forward (scoring sqrtsoftplus, noaux_tc).

    Args:
        logits: [N, E] float32, E from top_k to 1024; rows may be strided. Tuned for E = 256 and 384.
        e_bias: [E] float32.
        top_k: experts a token, 1 to 16.
        routed_scaling_factor: finite; 1.5 in Flash, 2.5 in Pro.
        out: (weights, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation; e_bias must then not be written by the kernel ahead.

    Returns:
        weights: [N, top_k] float32, no unit.
        ids: [N, top_k] int32, expert numbers.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above, or top_k > E.

    Traffic: reads 4 N E B once, writes 8 N top_k B. The error bounds of score and weight are in the kernel's header.
    """
    if type(top_k) is not int:
        top_k = check_range("activation_topk", "top_k", top_k, 1, MAX_K)
    if type(routed_scaling_factor) is not float:
        routed_scaling_factor = check_scale("activation_topk", "routed_scaling_factor", routed_scaling_factor)
    return _ACTIVATION_TOPK((logits, e_bias), out, (top_k, routed_scaling_factor, pdl), stream)


def _rows(out: tuple[Any, ...] | None, i: int, width: int) -> np.int64:
    """Elements from one row of output i to the next."""
    return np.int64(out[i].strides[0] if out is not None else width)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------------------------- hash_router

HASH_ROUTER = "router/hash_router.cu"
HASH_ROUTER_THREADS = 128
_C_INT = {I32: "int", I64: "long long"}


def prepare_hash_router(
    device: Device,
    N: int,
    V: int,
    k: int,
    dtypes: tuple[Any, Any],
    arguments: tuple[Any, ...] = (POINTER,) * 4,
    *,
    strides: tuple[int, int] | None = None,
    pdl: bool = False,
) -> Prepared:
    """The launch behind `hash_router`, unchecked.

    Args:
        dtypes: of token_ids and table.
        arguments: token_ids, table, weights, ids, each an address as np.uint64 or POINTER.
        strides: elements between rows of weights and ids; contiguous if None.
    """
    rows = HASH_ROUTER_THREADS // k
    return load(HASH_ROUTER, f"hash_router<{_C_INT[dtypes[0]]}, {_C_INT[dtypes[1]]}>", device).prepare(
        _ceil(N, rows),
        (k, rows),
        *arguments,
        np.int32(N),
        np.int64(V),
        *(np.int64(s) for s in strides or (k, k)),
        pdl=pdl,
    )


def _plan_hash_router(call: Call) -> Plan:
    token_ids, table = call.inputs
    assert token_ids is not None
    assert table is not None
    (pdl,) = call.settings
    args = {
        "token_ids": Arg(token_ids, "N", (I32, I64)),
        "table": Arg(table, "V k", (I32, I64)),
    }
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], "N k", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], "N k", I32, rows=True, output=True)
    N, V, k = match("hash_router", **args).values()
    check_range("hash_router", "k", k, 1, MAX_K)
    ready = None
    if N:
        strides = (int(_rows(call.outputs, 0, k)), int(_rows(call.outputs, 1, k)))
        dtypes = (token_ids.dtype, table.dtype)
        ready = prepare_hash_router(call.device, N, V, k, dtypes, strides=strides, pdl=bool(pdl))
    return Plan((((N, k), F32), ((N, k), I32)), ready)


_HASH_ROUTER = Operation("hash_router", ("token_ids", "table"), ("weights", "ids"), _plan_hash_router)


# ------------------------------------------------------------------------------------------------- topk_select

TOPK_SELECT = "router/topk_select.cu"
TOPK_SELECT_WARPS = 4


def topk_select_instance(dtype: Any, E: int, k: int, wide: bool) -> str:
    """The instantiation for a row width; `wide`: rows may be read 16 bytes at a time."""
    split = 1 if E <= 1024 else TOPK_SELECT_WARPS
    vec = 16 // dtype.itemsize if wide else 1
    step = max(vec, 4)
    items = _ceil(_ceil(E, 32 * split), step) * step
    return f"topk_select<{'float' if dtype == F32 else 'bf16'}, {k}, {items}, {vec}, {TOPK_SELECT_WARPS}, {split}>"


def _plan_topk_select(call: Call) -> Plan:
    scores, lengths = call.inputs
    assert scores is not None
    k, pdl = call.settings
    check_range("topk_select", "k", k, 1, MAX_K)
    args = {"scores": Arg(scores, "N E", (F32, BF16), rows=True)}
    if lengths is not None:
        args["lengths"] = Arg(lengths, "N", I32)
    if call.outputs is not None:
        args["values"] = Arg(call.outputs[0], f"N {k}", scores.dtype, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], f"N {k}", I32, rows=True, output=True)
    N, E = match("topk_select", **args).values()
    if not k <= E <= MAX_SCORES:
        raise ArgumentError(f"topk_select: E = {E} must be from k = {k} to {MAX_SCORES}")
    ready = None
    if N:
        vec = 16 // scores.dtype.itemsize
        wide = E % vec == 0 and scores.strides[0] % vec == 0 and scores.ptr % 16 == 0
        split = 1 if E <= 1024 else TOPK_SELECT_WARPS
        ready = load(TOPK_SELECT, topk_select_instance(scores.dtype, E, k, wide), call.device).prepare(
            _ceil(N * split, TOPK_SELECT_WARPS),
            32 * TOPK_SELECT_WARPS,
            POINTER,
            np.uint64(0) if lengths is None else POINTER,
            POINTER,
            POINTER,
            np.int32(N),
            np.int32(E),
            np.int64(scores.strides[0]),
            _rows(call.outputs, 0, k),
            _rows(call.outputs, 1, k),
            pdl=bool(pdl),
        )
    return Plan((((N, k), scores.dtype), ((N, k), I32)), ready)


_TOPK_SELECT = Operation("topk_select", ("scores", "lengths"), ("values", "ids"), _plan_topk_select, ("lengths",))


# --------------------------------------------------------------------------------------------- activation_topk

ACTIVATION_TOPK = "router/activation_topk.cu"


@dataclass(frozen=True)
class Tile:
    """How activation_topk splits its work: lanes that share a row, warps a block."""

    lanes: int
    warps: int


def activation_topk_tile(N: int, E: int, k: int) -> Tile:
    """The tile for a shape. bench/results/h200-activation-topk-tiles.txt, H200, cold, k = 6:

    up to 512 rows one warp a block is 3 to 6 % ahead of four under programmatic dependent launch and as fast without;
    from 3072 rows of 256 two rows a warp are 2 to 14 % ahead of one (8192: 5.86 against 6.28 us); rows of 384 gain
    from it at 16384 only, and would need 80 registers.
    """
    if N <= 512:
        return Tile(32, 1)
    if N >= 3072 and E <= 256 and k < 16:
        return Tile(16, 4)
    return Tile(32, 4)


def activation_topk_instance(tile: Tile, E: int, k: int, wide: bool) -> str:
    """The instantiation for a row width; `wide`: rows and bias may be read 16 bytes at a time."""
    items = 4 * _ceil(E, 4 * tile.lanes)
    return f"activation_topk<{k}, {items}, {4 if wide else 1}, {tile.lanes}, {tile.warps}>"


def prepare_activation_topk(
    device: Device,
    N: int,
    E: int,
    k: int,
    scale: float,
    *,
    wide: bool = True,
    strides: tuple[int, int, int] | None = None,
    pdl: bool = False,
) -> Prepared:
    """The launch behind `activation_topk`, unchecked: pointers in the order logits, e_bias, weights, ids.

    Args:
        wide: E and the stride of the logits are multiples of 4, logits and bias lie at multiples of 16 B.
        strides: elements between rows of logits, weights and ids; contiguous if None.
    """
    tile = activation_topk_tile(N, E, k)
    return load(ACTIVATION_TOPK, activation_topk_instance(tile, E, k, wide), device).prepare(
        _ceil(N * tile.lanes, 32 * tile.warps),
        32 * tile.warps,
        *(POINTER,) * 4,
        np.int32(N),
        np.int32(E),
        *(np.int64(s) for s in strides or (E, k, k)),
        np.float32(scale),
        pdl=pdl,
    )


def _plan_activation_topk(call: Call) -> Plan:
    logits, e_bias = call.inputs
    assert logits is not None
    assert e_bias is not None
    k, scale, pdl = call.settings
    check_range("activation_topk", "top_k", k, 1, MAX_K)
    check_scale("activation_topk", "routed_scaling_factor", scale)
    args = {"logits": Arg(logits, "N E", F32, rows=True), "e_bias": Arg(e_bias, "E", F32)}
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], f"N {k}", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], f"N {k}", I32, rows=True, output=True)
    N, E = match("activation_topk", **args).values()
    if not k <= E <= MAX_EXPERTS:
        raise ArgumentError(f"activation_topk: E = {E} must be from top_k = {k} to {MAX_EXPERTS}")
    ready = None
    if N:
        wide = E % 4 == 0 and logits.strides[0] % 4 == 0 and logits.ptr % 16 == e_bias.ptr % 16 == 0
        strides = (logits.strides[0], int(_rows(call.outputs, 0, k)), int(_rows(call.outputs, 1, k)))
        ready = prepare_activation_topk(call.device, N, E, k, scale, wide=wide, strides=strides, pdl=bool(pdl))
    return Plan((((N, k), F32), ((N, k), I32)), ready)


_ACTIVATION_TOPK = Operation("activation_topk", ("logits", "e_bias"), ("weights", "ids"), _plan_activation_topk)


# Every instantiation the released models use, and the general forms at their widest, with register budgets: the least
# that leaves the warps an SM should hold.
INSTANCES = (
    *(
        Instance(HASH_ROUTER, f"hash_router<{token}, {entry}>", 32)
        for token in ("int", "long long")
        for entry in ("int", "long long")
    ),
    *(Instance(TOPK_SELECT, topk_select_instance(F32, E, k, True), 64) for E in (256, 384, 4096) for k in (6, 16)),
    *(Instance(TOPK_SELECT, topk_select_instance(BF16, E, k, True), 80) for E in (256, 384, 4096) for k in (6, 16)),
    Instance(TOPK_SELECT, topk_select_instance(F32, 4096, 16, False), 80),
    Instance(TOPK_SELECT, topk_select_instance(BF16, 4096, 16, False), 80),
    *(
        Instance(ACTIVATION_TOPK, activation_topk_instance(Tile(32, warps), E, k, wide), registers)
        for E, registers in ((256, 40), (384, 56))
        for k in (6, 8)
        for wide in (True, False)
        for warps in (1, 4)
    ),
    *(Instance(ACTIVATION_TOPK, activation_topk_instance(Tile(16, 4), 256, k, True), 64) for k in (6, 8)),
    *(Instance(ACTIVATION_TOPK, activation_topk_instance(Tile(32, 4), 1024, 16, wide), 128) for wide in (True, False)),
)
