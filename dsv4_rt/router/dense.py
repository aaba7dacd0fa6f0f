"""Launchers of the dense router: hidden states and gate weights in, experts and weights out.

`dense_router_decode` is one launch, for few tokens; `dense_router_prefill` is cuBLAS and then activation_topk, for
many. Which one a Router takes is `decode_limit`. The kernels are in kernels/router/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_rt.arrays import I32, View
from dsv4_rt.checks import Arg, Dtype, check_range, check_scale, match
from dsv4_rt.device import Device, device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16, F32
from dsv4_rt.launch import POINTER, Prepared, load
from dsv4_rt.operation import Call, Instance, Operation, Plan
from dsv4_rt.router import dense_sm100
from dsv4_rt.router.ops import MAX_K, prepare_activation_topk
from dsv4_rt.router.product import GateProduct

MAX_EXPERTS = 512
MAX_CHANNELS = 65536
MAX_DECODE_TOKENS = 512
TICKETS = 64
_C_WEIGHT = {BF16: "bf16", F32: "float"}


def workspace_words(num_experts: int, max_num_tokens: int = 64) -> int:
    """Size of a workspace of `dense_router_decode`, in int32: 64 tickets, then a row of logits a token."""
    return TICKETS + -(-num_experts // 4) * 4 * max_num_tokens


def dense_router_decode(
    hidden: Any,
    w_gate: Any,
    e_bias: Any,
    top_k: int = 6,
    routed_scaling_factor: float = 2.5,
    *,
    workspace: Any,
    logits: Any = None,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
    pdl: bool = False,
) -> tuple[Any, Any]:
    """Route a few tokens by score, gate product included, in one launch.

        logits[n, e]  = sum_c hidden[n, c] * w_gate[e, c]
        act[n, e]     = sqrt(softplus(logits[n, e]))          softplus(x) = max(x, 0) + log1p(exp(-|x|))
        ids[n]        = the top_k experts with the largest act + e_bias, in that order; equal scores by lower index
        weights[n, j] = act[n, ids[n, j]] * (1 / sum_j act[n, ids[n, j]]) * routed_scaling_factor

    Products are exact and summed in float32, in an order that depends on the shapes only: the same bits on every run.
    The rest is as in `activation_topk`. Source: DeepSeek-V4 inference reference, model.py: Gate.forward.

    Args:
        hidden: [N, K] bfloat16, N up to 512 (made for 64 and fewer), K a multiple of 64; rows may be strided, each
            16 B aligned.
        w_gate: [E, K] bfloat16 or float32, E from top_k to 512, 16 B aligned. float32 weights are finite.
        e_bias: [E] float32.
        top_k: experts a token, 1 to 16.
        routed_scaling_factor: finite; 1.5 in Flash, 2.5 in Pro.
        workspace: int32, `workspace_words(E, N)` or more, 16 B aligned, zeroed once before its first use. The kernel
            leaves its tickets at zero. One launch at a time may use it: one stream, or one graph in flight. A launch
            that was cut short leaves it spoilt: zero it again.
        logits: [N, E] float32 to keep the logits in, rows may be strided; they are not kept if None.
        out: (weights, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.
        pdl: launch with programmatic stream serialisation; the kernel ahead may write hidden. w_gate and e_bias must be
            complete before that kernel starts: w_gate is on its way before it ends.

    Returns:
        weights: [N, top_k] float32, no unit.
        ids: [N, top_k] int32, expert numbers.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above.

    Traffic: reads w_gate once (for up to 64 tokens; from L2 again for each 64 more) and hidden, writes 8 N top_k B.
    The error bounds are in the kernels' headers.
    """
    if type(top_k) is not int:
        top_k = check_range("dense_router_decode", "top_k", top_k, 1, MAX_K)
    if type(routed_scaling_factor) is not float:
        routed_scaling_factor = check_scale("dense_router_decode", "routed_scaling_factor", routed_scaling_factor)
    given = (hidden, w_gate, e_bias, workspace, logits)
    return _DENSE_ROUTER_DECODE(given, out, (top_k, routed_scaling_factor, pdl), stream)


def dense_router_prefill(
    hidden: Any,
    w_gate: Any,
    e_bias: Any,
    top_k: int = 6,
    routed_scaling_factor: float = 2.5,
    *,
    product: GateProduct,
    logits: Any = None,
    out: tuple[Any, Any] | None = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Route many tokens by score: the gate's product by cuBLAS, then `activation_topk`.

    The same router as `dense_router_decode`. On the emulator NumPy stands in for cuBLAS (`product.library`).

    Args:
        hidden: [N, K] bfloat16, K a multiple of 64; rows may be strided, each 16 B aligned.
        w_gate: [E, K] bfloat16, E from top_k to 512, 16 B aligned.
        e_bias: [E] float32.
        top_k: experts a token, 1 to 16.
        routed_scaling_factor: finite; 1.5 in Flash, 2.5 in Pro.
        product: handle and scratch memory of cuBLAS; one stream or one graph in flight may use it.
        logits: [N, E] float32, 16 B aligned rows; holds the logits afterwards. Allocated if None, and then given up.
        out: (weights, ids) to write into, rows may be strided; allocated if None. A captured CUDA graph needs it and
            logits given.
        stream: the stream to launch on; the caller's current stream if None. Never synchronises.

    Returns:
        weights: [N, top_k] float32, no unit.
        ids: [N, top_k] int32, expert numbers.

    Raises:
        ArgumentError: a shape, dtype or layout is not the one above, or only one of logits and out is given.

    Traffic: reads w_gate and hidden, writes and reads 4 N E B of logits, writes 8 N top_k B.
    """
    if type(top_k) is not int:
        top_k = check_range("dense_router_prefill", "top_k", top_k, 1, MAX_K)
    if type(routed_scaling_factor) is not float:
        routed_scaling_factor = check_scale("dense_router_prefill", "routed_scaling_factor", routed_scaling_factor)
    if (logits is None) != (out is None):
        raise ArgumentError("dense_router_prefill: give both logits and out, or neither")
    whole = None if out is None else (*out, logits)
    settings = (top_k, routed_scaling_factor, product)
    return _DENSE_ROUTER_PREFILL((hidden, w_gate, e_bias), whole, settings, stream)[:2]


# ----------------------------------------------------------------------------------------- dense_router_decode

STREAM = "router/dense_router_decode.cu"
MMA = "router/dense_router_decode_mma.cu"


@dataclass(frozen=True)
class StreamTile:
    """dense_router_decode: tokens and experts a block, chunks of 8 channels a thread at once, warps a block."""

    tokens: int
    experts: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class MmaTile:
    """dense_router_decode_mma: tiles of 8 tokens a block, groups of 16 experts a block, steps of 32 channels a warp at
    once, blocks a cluster, warps a block."""

    tiles: int
    groups: int
    steps: int
    cluster: int
    warps: int = 8


# Streams of up to 4096 channels, by tokens: tokens a block, blocks that share the experts. In a stream of dependent
# launches fewer blocks than fit at once leave room for those of the next.
_NARROW_STREAM = {1: (1, 43), 2: (2, 64), 3: (2, 52), 4: (2, 52), 5: (3, 52), 6: (3, 52), 7: (4, 64), 8: (4, 64)}


def decode_tile(N: int, E: int, K: int, dtype: Dtype) -> StreamTile | MmaTile:
    """The kernel and its tile for a shape. bench/results/h200-dense-router-decode-tiles.txt has the measurements."""
    wide = K > 4096
    if dtype == BF16 and not wide and N in _NARROW_STREAM:
        tokens, blocks = _NARROW_STREAM[N]
        return StreamTile(tokens, -(-E // blocks), 2, 8)
    if N <= 4:
        tokens = min(N, 2) if N <= 2 else 4
        experts = min(4, max(1, -(-E // (96 if N == 1 and dtype == BF16 else 132))))
        return StreamTile(tokens, experts, 2, 14 if wide else 8)
    tiles = 1
    while tiles < 8 and tiles * 8 < N:
        tiles *= 2
    if dtype == F32:
        return MmaTile(tiles, 2 if N > 64 else 1, 1 if tiles == 8 else 2, 8)
    if N > 64:
        return MmaTile(8, 2, 2, 8)
    groups = 2 if N > 32 else 1
    steps = -(-K // (32 * 4 * 16 // groups))  # all channels of a warp in flight
    return MmaTile(min(tiles, 4), groups, min(steps, 8), 4, 16)


def decode_instance(tile: StreamTile | MmaTile, E: int, k: int, dtype: Dtype) -> tuple[str, str]:
    """Source and name expression of the instantiation for a tile."""
    head = f"{_C_WEIGHT[dtype]}, {k}, {4 * -(-E // 128)}"
    if isinstance(tile, StreamTile):
        return STREAM, f"dense_router_decode<{head}, {tile.tokens}, {tile.experts}, {tile.chunks}, {tile.warps}>"
    shape = f"{tile.tiles}, {tile.groups}, {tile.steps}, {tile.cluster}, {tile.warps}"
    return MMA, f"dense_router_decode_mma<{head}, {shape}>"


def prepare_dense_router_decode(
    on: Device,
    N: int,
    E: int,
    K: int,
    k: int,
    scale: float,
    dtype: Dtype,
    arguments: tuple[Any, ...] = (POINTER,) * 7,
    *,
    strides: tuple[int, int, int, int] | None = None,
    pdl: bool = False,
) -> Prepared:
    """The launch behind `dense_router_decode`, unchecked.

    Args:
        arguments: hidden, w_gate, e_bias, workspace, logits (address 0: not kept), weights, ids, each an address as
            np.uint64 or POINTER.
        strides: elements between rows of hidden, logits, weights and ids; contiguous if None.
    """
    blackwell = dense_sm100.tile(N, E, K, dtype, on.arch)  # before decode_tile: a table of its own
    if blackwell is not None:
        return dense_sm100.prepare(on, blackwell, (N, E, K), k, scale, arguments, strides or (K, E, k, k), pdl)
    tile = decode_tile(N, E, K, dtype)
    cluster = None
    if isinstance(tile, StreamTile):
        grid, block = (-(-E // tile.experts), -(-N // tile.tokens)), 32 * tile.warps
    else:
        clusters = -(-E // (16 * tile.groups))
        grid, block = (tile.cluster * clusters, -(-N // (8 * tile.tiles))), 32 * tile.warps
        cluster = (tile.cluster, 1, 1)
    source, name = decode_instance(tile, E, k, dtype)
    return load(source, name, on).prepare(
        grid,
        block,
        *arguments,
        np.int32(N),
        np.int32(E),
        np.int32(K),
        *(np.int64(s) for s in strides or (K, E, k, k)),
        np.float32(scale),
        cluster=cluster,
        pdl=pdl,
    )


def check_gate_shape(operation: str, E: int, K: int, k: int) -> None:
    """Refuse what the kernels of gate products have no form for."""
    if not k <= E <= MAX_EXPERTS:
        raise ArgumentError(f"{operation}: E = {E} must be from top_k = {k} to {MAX_EXPERTS}")
    if K % 64 or not 64 <= K <= MAX_CHANNELS:
        raise ArgumentError(
            f"{operation}: K = {K} must be a multiple of 64 up to {MAX_CHANNELS}; pad hidden and w_gate with zeros"
        )


def check_rows_aligned(operation: str, name: str, ptr: int, stride: int, itemsize: int) -> None:
    """Refuse rows that cannot be read 16 bytes at a time."""
    if ptr % 16 or stride * itemsize % 16:
        raise ArgumentError(
            f"{operation}: rows of {name} must lie at multiples of 16 B; it starts at {ptr:#x} and a row is "
            f"{stride * itemsize} B after the one before; copy it first"
        )


def check_rows_apart(operation: str, name: str, stride: int, width: int) -> None:
    """Refuse rows that overlap: cuBLAS takes no such matrix."""
    if stride < width:
        raise ArgumentError(
            f"{operation}: rows of {name} are {stride} elements apart and {width} wide; for the product of many tokens "
            "they must not overlap; copy it first"
        )


def _plan_dense_router_decode(call: Call) -> Plan:
    hidden, w_gate, e_bias, workspace, logits = call.inputs
    assert hidden is not None
    assert w_gate is not None
    assert e_bias is not None
    assert workspace is not None
    operation = "dense_router_decode"
    k, scale, pdl = call.settings
    check_range(operation, "top_k", k, 1, MAX_K)
    check_scale(operation, "routed_scaling_factor", scale)
    args = {
        "hidden": Arg(hidden, "N K", BF16, rows=True),
        "w_gate": Arg(w_gate, "E K", (BF16, F32), align=16),
        "e_bias": Arg(e_bias, "E", F32),
        "workspace": Arg(workspace, "words", I32, align=16, output=True),
    }
    if logits is not None:
        args["logits"] = Arg(logits, "N E", F32, rows=True, output=True)
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], f"N {k}", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], f"N {k}", I32, rows=True, output=True)
    N, K, E, words = match(operation, **args).values()
    check_gate_shape(operation, E, K, k)
    if N > MAX_DECODE_TOKENS:
        raise ArgumentError(f"{operation}: N = {N} tokens, up to {MAX_DECODE_TOKENS} fit; use dense_router_prefill")
    if words < workspace_words(E, N):
        raise ArgumentError(f"{operation}: workspace has {words} int32, {workspace_words(E, N)} are needed for N = {N}")
    ready = None
    if N:
        check_rows_aligned(operation, "hidden", hidden.ptr, hidden.strides[0] if N > 1 else 0, 2)
        strides = (
            hidden.strides[0],
            logits.strides[0] if logits is not None else E,
            call.outputs[0].strides[0] if call.outputs is not None else k,
            call.outputs[1].strides[0] if call.outputs is not None else k,
        )
        keep = np.uint64(0) if logits is None else POINTER
        arguments = (*(POINTER,) * 4, keep, POINTER, POINTER)
        ready = prepare_dense_router_decode(
            call.device, N, E, K, k, scale, w_gate.dtype, arguments, strides=strides, pdl=bool(pdl)
        )
    return Plan((((N, k), F32), ((N, k), I32)), ready)


_DENSE_ROUTER_DECODE = Operation(
    "dense_router_decode",
    ("hidden", "w_gate", "e_bias", "workspace", "logits"),
    ("weights", "ids"),
    _plan_dense_router_decode,
    ("logits",),
)


# ---------------------------------------------------------------------------------------- dense_router_prefill

# activation_topk after cuBLAS by programmatic dependent launch: 1.0 us gained at 512 tokens, 0.2 us lost at 4096.
# bench/results/h200-router.txt, pair and pair PDL.
PREFILL_PDL_LIMIT = 512


def decode_limit(dtype: Dtype, K: int, pdl: bool, arch: str = "sm_90a") -> int:
    """Up to how many tokens a Router takes dense_router_decode, and above it dense_router_prefill.

    H200, microseconds, one launch against two (activation_topk early: PREFILL_PDL_LIMIT). By programmatic dependent
    launch, bfloat16 weights: 128 tokens 8.5 against 8.2 to 9.0 (flash; pro 12.5, 10.0), 64 tokens 5.3, 8.1 (7.2, 8.8).
    Without it 64 tokens 7.2, 8.1, but in pro 10.0, 8.8 to 9.6; 40 tokens 9.9, 8.6 to 9.3; 32 tokens 7.9, 9.2. Float
    weights are three products for cuBLAS, and one launch of 128 tokens takes 10.8 (16.4).
    bench/results/h200-dense-router-decode-tiles.txt, and h200-router.txt: pair PDL. What loses there is the form by
    mma.sync; that by tcgen05 has been timed nowhere and has up to 64 tokens.
    """
    if dtype != BF16:
        return 128
    return 64 if pdl or K <= 4096 or arch in dense_sm100.ARCHITECTURES else 32


class ProductThen:
    """The gate's product, then a kernel that reads the logits: one `launch` for both.

    Its pointers, with those of `fixed` behind them, begin with hidden and end with logits.

    Args:
        product, parts: the GateProduct and the addresses of its weights; None: the second of the pointers.
        shape: N, E, K and the elements between rows of hidden and of logits.
        then: what follows.
        choose: which of the pointers `then` wants, in its order.
        fixed: arrays that no call gives.
    """

    def __init__(
        self,
        product: GateProduct,
        parts: Sequence[int] | None,
        shape: tuple[int, int, int, int, int],
        then: Prepared,
        choose: tuple[int, ...],
        fixed: Sequence[View] = (),
    ) -> None:
        self._product, self._parts, self._shape = product, parts, shape
        self._then, self._choose = then, choose
        self._fixed, self._fixed_pointers = fixed, [v.ptr for v in fixed]

    def launch(self, pointers: Sequence[int], stream: int = 0, views: Sequence[View] = ()) -> None:
        every = [*pointers, *self._fixed_pointers]
        parts = (every[1],) if self._parts is None else self._parts
        self._product.run(every[0], parts, every[-1], *self._shape, stream)
        seen = [*views, *self._fixed]
        self._then.launch([every[i] for i in self._choose], stream, [seen[i] for i in self._choose] if views else ())


def _plan_dense_router_prefill(call: Call) -> Plan:
    hidden, w_gate, e_bias = call.inputs
    assert hidden is not None
    assert w_gate is not None
    assert e_bias is not None
    operation = "dense_router_prefill"
    k, scale, product = call.settings
    check_range(operation, "top_k", k, 1, MAX_K)
    check_scale(operation, "routed_scaling_factor", scale)
    if not isinstance(product, GateProduct) or product.device is not call.device:
        raise ArgumentError(f"{operation}: product must be a GateProduct of {call.device!r}, not {product!r}")
    args = {
        "hidden": Arg(hidden, "N K", BF16, rows=True),
        "w_gate": Arg(w_gate, "E K", BF16, align=16),
        "e_bias": Arg(e_bias, "E", F32),
    }
    if call.outputs is not None:
        args["weights"] = Arg(call.outputs[0], f"N {k}", F32, rows=True, output=True)
        args["ids"] = Arg(call.outputs[1], f"N {k}", I32, rows=True, output=True)
        args["logits"] = Arg(call.outputs[2], "N E", F32, rows=True, align=16, output=True)
    N, K, E = match(operation, **args).values()
    check_gate_shape(operation, E, K, k)
    ready = None
    if N:
        stride = hidden.strides[0] if N > 1 else K
        check_rows_aligned(operation, "hidden", hidden.ptr, stride, 2)
        check_rows_apart(operation, "hidden", stride, K)
        weights_stride, ids_stride, pitch = (k, k, E) if call.outputs is None else (o.strides[0] for o in call.outputs)
        wide = E % 4 == 0 and pitch % 4 == 0 and e_bias.ptr % 16 == 0
        strides, pdl = (pitch, weights_stride, ids_stride), N <= PREFILL_PDL_LIMIT
        then = prepare_activation_topk(call.device, N, E, k, scale, wide=wide, strides=strides, pdl=pdl)
        # pointers: hidden, w_gate, e_bias, weights, ids, logits
        ready = ProductThen(product, None, (N, E, K, stride, pitch), then, (5, 2, 3, 4))
    return Plan((((N, k), F32), ((N, k), I32), ((N, E), F32)), ready)


_DENSE_ROUTER_PREFILL = Operation(
    "dense_router_prefill",
    ("hidden", "w_gate", "e_bias"),
    ("weights", "ids", "logits"),
    _plan_dense_router_prefill,
)


def new_workspace(num_experts: int, max_num_tokens: int = 64, on: Device | None = None) -> Any:
    """A zeroed workspace of `dense_router_decode` on a device, the current one if None."""
    return (on or device()).array(np.zeros(workspace_words(num_experts, max_num_tokens), np.int32))


def _decode_instances() -> tuple[Instance, ...]:
    """What the released models use, and the widest forms."""
    found: dict[tuple[str, str], int] = {}
    for E, K, k in ((256, 4096, 6), (384, 7168, 6), (512, 8192, 16)):
        for dtype in (BF16, F32):
            for N in (1, 2, 4, 6, 8, 16, 32, 64, 128):
                tile = decode_tile(N, E, K, dtype)
                found[decode_instance(tile, E, k, dtype)] = 160 if isinstance(tile, StreamTile) else 128
    return tuple(Instance(source, name, registers) for (source, name), registers in found.items())


INSTANCES = _decode_instances() + dense_sm100.INSTANCES
