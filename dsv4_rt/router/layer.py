"""Router: what an engine constructs once a layer and calls once a step.

    router = dsv4_rt.Router.for_layer("flash", layer=5)
    router.load_checkpoint("DeepSeek-V4-Flash", layer=5)
    router.finalize_weights()
    weights, ids = router(hidden)                       # [N, 6] float32, [N, 6] int32
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsv4_rt.arrays import FACTS, I32, I64, framework, stream_handle, view
from dsv4_rt.checks import Arg, check_range, check_scale, match
from dsv4_rt.cuda_device import CudaDevice
from dsv4_rt.device import Device, given_device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.formats import BF16, F32
from dsv4_rt.launch import POINTER
from dsv4_rt.models import FLASH, PRO
from dsv4_rt.operation import MAX_PLANS, Launch
from dsv4_rt.replay import Replays
from dsv4_rt.router import checkpoint, dense, hash_gate, ops
from dsv4_rt.router.product import GateProduct, bf16_parts

MODELS: Final = {"flash": FLASH, "pro": PRO}


@dataclass(frozen=True, slots=True)
class _Known:
    """What a call of a kind seen before needs."""

    ready: Launch | None  # None: no tokens
    results: tuple[Any, Any]
    stream: Callable[[int], int]  # of the caller's library
    index: int
    emulated: bool


class Router:
    """Routes tokens to experts: one MoE layer's gate, its weights and its buffers.

    mode "dense": the experts of largest biased score. mode "hash": the experts a table has for the token's id, weighed
    by the gate (hash_weights "gate", what released checkpoints do) or all alike (hash_weights "uniform").
    The equations are those of `dense_router_decode`, `hash_gate` and `hash_router`.

    Build it, `load_weights` or `load_checkpoint`, `finalize_weights`, then call it. A call writes into buffers that the
    router owns: the next call overwrites what the one before returned. So one stream, or one CUDA graph in flight, may
    use a router at a time; others want routers of their own.

    Args:
        hidden_size: K, a multiple of 64.
        num_experts: E, up to 512.
        top_k: experts a token, 1 to 16.
        routed_scaling_factor: finite; 1.5 in Flash, 2.5 in Pro. Uniform weights are not scaled.
        mode: "dense" or "hash".
        hash_weights: "gate" or "uniform"; for mode "hash".
        vocab_size: V, rows of the table; for mode "hash".
        max_num_tokens: the largest N of a call.
        device: a device or its name, as `use_device` takes it; the current one if None.

    Raises:
        ArgumentError: a number or a word is none of these.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 6,
        routed_scaling_factor: float = 2.5,
        *,
        mode: str = "dense",
        hash_weights: str = "gate",
        vocab_size: int | None = None,
        max_num_tokens: int = 8192,
        device: Device | str | None = None,
    ) -> None:
        self.hidden_size = check_range("Router", "hidden_size", hidden_size, 1, dense.MAX_CHANNELS)
        self.num_experts = check_range("Router", "num_experts", num_experts, 1, dense.MAX_EXPERTS)
        self.top_k = check_range("Router", "top_k", top_k, 1, ops.MAX_K)
        self.routed_scaling_factor = check_scale("Router", "routed_scaling_factor", routed_scaling_factor)
        self.max_num_tokens = check_range("Router", "max_num_tokens", max_num_tokens, 1, 2**24)
        dense.check_gate_shape("Router", self.num_experts, self.hidden_size, self.top_k)
        words_of = {"mode": (mode, ("dense", "hash")), "hash_weights": (hash_weights, ("gate", "uniform"))}
        for name, (word, words) in words_of.items():
            if word not in words:
                raise ArgumentError(f"Router: {name} = {word!r} must be {' or '.join(map(repr, words))}")
        if (mode == "hash") != (vocab_size is not None):
            raise ArgumentError(f"Router: vocab_size = {vocab_size!r} with mode = {mode!r}; 'hash' alone needs it")
        self.vocab_size = None if vocab_size is None else check_range("Router", "vocab_size", vocab_size, 1, 2**31 - 1)
        self.mode, self.hash_weights = mode, hash_weights
        self.device = given_device(device)
        self._kind = mode if mode == "dense" else hash_weights  # "dense", "gate" or "uniform"
        self._what = "dense routing" if mode == "dense" else f"hash routing with {hash_weights} weights"
        self._host: dict[str, np.ndarray[Any, Any]] = {}  # loaded, not yet on the device
        self._arrays: dict[str, Any] = {}  # on the device
        self._product: GateProduct | None = None
        self._parts: tuple[int, ...] = ()
        self._known: dict[Hashable, _Known] = {}
        self._replays = Replays(self.device) if isinstance(self.device, CudaDevice) else None
        self._final = False

    @classmethod
    def for_layer(cls, model: str, layer: int, **options: Any) -> Router:
        """The router of a layer of a released model: hash routing with gate weights in layers 0 to 2, dense elsewhere.

        Args:
            model: "flash" or "pro".
            layer: 0 to num_layers; num_layers is the multi-token-prediction block.
            options: max_num_tokens, device, or anything else `Router` takes, instead of the model's own.

        Raises:
            ArgumentError: no such model or layer.
        """
        if model not in MODELS:
            raise ArgumentError(f"Router.for_layer: model = {model!r} must be {' or '.join(map(repr, MODELS))}")
        shape = MODELS[model]
        layer = check_range("Router.for_layer", "layer", layer, 0, shape.num_layers)
        given: dict[str, Any] = {
            "hidden_size": shape.hidden_size,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "routed_scaling_factor": shape.routed_scaling_factor,
        }
        if layer < shape.num_hash_layers:
            given |= {"mode": "hash", "vocab_size": shape.vocab_size}
        return cls(**(given | options))

    # ------------------------------------------------------------------------------------------------ weights

    def load_weights(self, W_gate: Any = None, e_bias: Any = None, hash_lut: Any = None) -> None:
        """Take the layer's weights: copies, checked at once. `finalize_weights` brings them to the device.

        Args:
            W_gate: [E, K] bfloat16, or finite float32 (kept as it is); for dense routing and hash routing with gate
                weights.
            e_bias: [E] float32; for dense routing.
            hash_lut: [V, k] int32 or int64, experts in 0 .. E-1; for hash routing.

        Raises:
            ArgumentError: an array is missing, is not this router's, or has another shape, dtype or range.
        """
        given = {"W_gate": W_gate, "e_bias": e_bias, "hash_lut": hash_lut}
        wanted = {"dense": ("W_gate", "e_bias"), "gate": ("W_gate", "hash_lut"), "uniform": ("hash_lut",)}[self._kind]
        for name, x in given.items():
            if (x is None) == (name in wanted):
                problem = "is missing" if x is None else "has no place here"
                raise ArgumentError(f"Router.load_weights: {name} {problem}; {self._what} takes {' and '.join(wanted)}")
        E, K, V, k = self.num_experts, self.hidden_size, self.vocab_size, self.top_k
        axes = {"W_gate": f"{E} {K}", "e_bias": f"{E}", "hash_lut": f"{V} {k}"}
        dtypes = {"W_gate": (BF16, F32), "e_bias": (F32,), "hash_lut": (I32, I64)}
        host = {name: np.ascontiguousarray(_on_host(given[name])) for name in wanted}
        for name, x in host.items():
            match("Router.load_weights", **{name: Arg(view(x), axes[name], dtypes[name])})
        w_gate = host.get("W_gate")
        if w_gate is not None and w_gate.dtype == F32 and not np.isfinite(w_gate).all():
            expert = int(np.argmin(np.isfinite(w_gate).all(axis=1)))
            raise ArgumentError(
                f"Router.load_weights: W_gate of expert {expert} is not finite; float32 weights are split into parts "
                "of bfloat16, which infinities and NaN do not have"
            )
        if "hash_lut" in host:
            low, high = int(host["hash_lut"].min()), int(host["hash_lut"].max())
            if low < 0 or high >= E:
                raise ArgumentError(
                    f"Router.load_weights: hash_lut has experts from {low} to {high}; they must be in 0 .. {E - 1}"
                )
            host["hash_lut"] = host["hash_lut"].astype(np.int32)
        self._host = {name: x.copy() for name, x in host.items()}
        self._forget()
        self._final = False

    def load_checkpoint(self, source: str | Path | Mapping[str, Any], layer: int) -> None:
        """`load_weights` from a released checkpoint: keys layers.{layer}.ffn.gate.{weight, bias, tid2eid}, any prefix.

        Args:
            source: a .safetensors file, a directory of them, or a mapping of names to arrays.
            layer: which layer's gate.

        Raises:
            ArgumentError: the checkpoint has no such layer, or its gate is of another kind than this router.
        """
        parts = {"dense": ("weight", "bias"), "gate": ("weight", "tid2eid"), "uniform": ("tid2eid",)}[self._kind]
        found = checkpoint.gate(source, layer, parts)
        self.load_weights(found.get("weight"), found.get("bias"), found.get("tid2eid"))

    def finalize_weights(self) -> None:
        """Bring the weights to the device, allocate the buffers, compile and load every kernel a call may launch.

        Called again it resets the router: buffers and their addresses stay, the tickets of a launch that was cut short
        are cleared. Synchronises the device.

        Raises:
            ArgumentError: no weights were loaded.
            DeviceError: max_num_tokens wants cuBLAS, and it is not installed.
        """
        if not (self._host or self._arrays):
            raise ArgumentError("Router.finalize_weights: no weights; call load_weights or load_checkpoint first")
        loaded = self._host
        for name, x in loaded.items():
            self._put(name, x)
        N, E, k = self.max_num_tokens, self.num_experts, self.top_k
        self._put("weights", np.zeros((N, k), np.float32))
        self._put("ids", np.zeros((N, k), np.int32))
        if self._kind == "dense":
            limit = min(N, self._decode_limit(True))
            self._put("workspace", np.zeros(dense.workspace_words(E, limit), np.int32))
        if self._whole_product(N, False):
            if self._product is None:
                self._product = GateProduct(self.device)
            self._put("logits", np.zeros((N, E), np.float32))
            if self._arrays["W_gate"].dtype == F32:
                for i, part in enumerate(bf16_parts(loaded["W_gate"]) if loaded else ()):
                    self._put(f"part{i}", part)
                self._parts = tuple(self._address(f"part{i}") for i in range(3))
            else:
                self._parts = (self._address("W_gate"),)
        self._forget()
        self._warm_up()
        self.device.synchronize()
        self._host, self._final = {}, True

    def _put(self, name: str, x: np.ndarray[Any, Any]) -> None:
        """Copy to the device, into the array of that name if there is a fitting one: graphs hold its address."""
        there = self._arrays.get(name)
        if there is None or there.shape != x.shape or there.dtype != x.dtype:
            self._arrays[name] = self.device.array(x)
        else:
            there[...] = self.device.array(x)

    def _address(self, name: str) -> int:
        return view(self._arrays[name]).ptr

    def _forget(self) -> None:
        """Forget the launches that were prepared: they have the addresses of arrays that may go."""
        self._known.clear()
        if self._replays is not None:
            self._replays.clear()

    def _decode_limit(self, pdl: bool) -> int:
        return dense.decode_limit(self._arrays["W_gate"].dtype, self.hidden_size, pdl, self.device.arch)

    def _whole_product(self, N: int, pdl: bool) -> bool:
        """Does a call of N tokens compute all logits by the product?"""
        if self._kind == "uniform":
            return False
        if self._kind == "gate":
            return N > hash_gate.HASH_GATE_LIMIT
        if self.max_num_tokens <= self._decode_limit(True):
            return False  # so that a router for few tokens does without cuBLAS
        return N > self._decode_limit(pdl)

    def _warm_up(self) -> None:
        """Load the kernel of every choice a number of tokens can lead to; let cuBLAS load those of common sizes."""
        edges = (1, 2, 4, 8, 16, 32, 64, 128, 132, 256, 512, hash_gate.HASH_GATE_LIMIT, 3072)
        sizes = {n + more for n in edges for more in (0, 1)} | {self.max_num_tokens}
        tokens = {"dense": (None,), "gate": (I32, I64), "uniform": (I32, I64)}[self._kind]
        for N in sorted(n for n in sizes if n <= self.max_num_tokens):
            for token in tokens:
                for pdl in (False, True):
                    self._prepare(N, self.hidden_size, token, pdl)
        if self._product is not None:
            E, K = self.num_experts, self.hidden_size
            most = min(self.max_num_tokens, 1024)
            hidden = self.device.array(np.zeros((most, K), BF16))
            pointers = (view(hidden).ptr, self._parts, self._address("logits"))
            for N in {min(2**i, most) for i in range(6, 11)}:
                self._product.run(*pointers, N, E, K, K, E, self.device.current_stream())
            self.device.synchronize()  # hidden is read until here

    # --------------------------------------------------------------------------------------------------- calls

    def __call__(
        self,
        hidden: Any,
        token_ids: Any = None,
        *,
        out: tuple[Any, Any] | None = None,
        stream: Any = None,
        pdl: bool = False,
    ) -> tuple[Any, Any]:
        """Route N tokens.

        No array is allocated, nothing synchronised; a CUDA graph may capture it, and replay it after `hidden` and
        `token_ids` were overwritten. Eager calls that take cuBLAS and keep coming with the same addresses are replayed
        from a graph of the router's own (`dsv4_rt.replay`); it is recorded once, which the driver allocates memory for.

        Args:
            hidden: [N, K] bfloat16, rows may be strided, each 16 B aligned. Uniform hash weights do not read it: None
                will do.
            token_ids: [N] int32 or int64, for hash routing; dense routing does not read it. An id outside the table
                gives expert -1, weight 0.
            out: (weights, ids) to write into instead of the router's buffers, rows may be strided.
            stream: the stream to launch on; the caller's current stream if None.
            pdl: programmatic dependent launch: the kernel ahead may write hidden; token_ids must be complete before it
                starts.

        Returns:
            weights: [N, top_k] float32, ids: [N, top_k] int32: views of the router's buffers in the caller's kind of
            array, which the next call overwrites; or what was given as `out`.

        Raises:
            ArgumentError: `finalize_weights` was not called, an argument is missing or does not fit, N is too large.
        """
        try:
            pointer, first = FACTS[type(hidden)](hidden)
            token_pointer, second = FACTS[type(token_ids)](token_ids)
        except Exception:  # a type not seen before, or no array at all
            (pointer, first), (token_pointer, second) = (
                (None, None) if x is None else framework(x).facts(x) for x in (hidden, token_ids)
            )
        key: Hashable = (first, second, pdl)
        pointers = [pointer] if self._kind == "dense" else [token_pointer]
        if self._kind == "gate":
            pointers = [pointer, token_pointer]
        if out is not None:
            results = [framework(x).facts(x) for x in out]
            pointers += [pointer for pointer, _ in results]
            key = (key, *[facts for _, facts in results])
        known = self._known.get(key)
        if known is None:
            known = self._learn(key, hidden, token_ids, out, pdl)
        if known.ready is not None:
            if known.emulated:
                arrays = {"dense": [hidden], "gate": [hidden, token_ids], "uniform": [token_ids]}[self._kind]
                known.ready.launch(pointers, 0, [view(x) for x in (*arrays, *(out or ()))])
            else:
                handle = known.stream(known.index) if stream is None else stream_handle(stream)
                known.ready.launch(pointers, handle)
        return known.results if out is None else out

    def _learn(
        self, key: Hashable, hidden: Any, token_ids: Any, out: tuple[Any, Any] | None, pdl: bool
    ) -> _Known:
        """Check a call of a new kind completely and remember what it needs."""
        if not self._final:
            raise ArgumentError("Router: the weights are not final; call finalize_weights first")
        wanted = {"dense": ("hidden",), "gate": ("hidden", "token_ids"), "uniform": ("token_ids",)}[self._kind]
        given = {"hidden": hidden, "token_ids": token_ids}
        for name in wanted:
            if given[name] is None:
                raise ArgumentError(f"Router: {name} is missing; {self._what} needs {' and '.join(wanted)}")
        axes = {"hidden": f"N {self.hidden_size}", "token_ids": "N"}
        dtypes = {"hidden": (BF16,), "token_ids": (I32, I64)}
        views = {name: view(given[name]) for name in wanted}
        args = {name: Arg(v, axes[name], dtypes[name], rows=name == "hidden") for name, v in views.items()}
        if out is not None:
            if len(out) != 2:
                raise ArgumentError(f"Router: out has {len(out)} arrays; give (weights, ids)")
            for name, x, dtype in zip(("weights", "ids"), out, (F32, I32), strict=True):
                args[name] = Arg(view(x), f"N {self.top_k}", dtype, rows=True, output=True)
        N = match("Router", **args)["N"]
        for name, v in views.items():
            if (v.device == "cuda") != (self.device.kind == "cuda") or v.index != self.device.index:
                raise ArgumentError(f"Router: {name} is on {v.on}, the router on {self.device!r}")
        if N > self.max_num_tokens:
            raise ArgumentError(f"Router: N = {N} tokens; this router has max_num_tokens = {self.max_num_tokens}")
        pitch = self.hidden_size
        if "hidden" in views and N:
            pitch = views["hidden"].strides[0] if N > 1 else pitch
            dense.check_rows_aligned("Router", "hidden", views["hidden"].ptr, pitch, 2)
            if self._whole_product(N, pdl):
                dense.check_rows_apart("Router", "hidden", pitch, self.hidden_size)
        token = views["token_ids"].dtype if "token_ids" in views else None
        home = framework(hidden if hidden is not None else token_ids)
        results = tuple(home.adopt(self._arrays[name][:N]) for name in ("weights", "ids"))
        strides = None if out is None else (args["weights"].view.strides[0], args["ids"].view.strides[0])
        ready = self._prepare(N, pitch, token, pdl, strides) if N else None
        known = _Known(ready, (results[0], results[1]), home.stream, self.device.index, self.device.kind == "emulator")
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
        self._known[key] = known
        return known

    def _prepare(
        self, N: int, pitch: int, token: np.dtype[Any] | None, pdl: bool, out: tuple[int, int] | None = None
    ) -> Launch:
        """The launch for N tokens whose hidden rows are `pitch` elements apart, the router's own arrays filled in.

        out: elements between rows of weights and ids that each call gives; None: the router's buffers.
        """
        on, E, K, k, scale = self.device, self.num_experts, self.hidden_size, self.top_k, self.routed_scaling_factor
        own = {name: view(array) for name, array in self._arrays.items()}

        def address(name: str) -> Any:
            return np.uint64(own[name].ptr)

        results = (address("weights"), address("ids")) if out is None else (POINTER, POINTER)
        w_stride, i_stride = out or (k, k)
        if self._kind == "uniform":
            assert token is not None
            addresses: tuple[Any, ...] = (POINTER, address("hash_lut"), *results)
            V, dtypes = self.vocab_size or 0, (token, I32)
            return ops.prepare_hash_router(on, N, V, k, dtypes, addresses, strides=(w_stride, i_stride), pdl=pdl)
        product = self._product if self._whole_product(N, pdl) else None
        shape, early = (N, E, K, pitch, E), N <= dense.PREFILL_PDL_LIMIT
        if self._kind == "dense":
            if product is not None:
                strides = (E, w_stride, i_stride)
                then = ops.prepare_activation_topk(on, N, E, k, scale, wide=E % 4 == 0, strides=strides, pdl=early)
                fixed = [own[name] for name in (*(() if out else ("weights", "ids")), "e_bias", "logits")]
                return self._replayed(dense.ProductThen(product, self._parts, shape, then, (4, 3, 1, 2), fixed))
            names = ("W_gate", "e_bias", "workspace")
            addresses = (POINTER, *map(address, names), np.uint64(0), *results)
            return dense.prepare_dense_router_decode(
                on, N, E, K, k, scale, own["W_gate"].dtype, addresses, strides=(pitch, E, w_stride, i_stride), pdl=pdl
            )
        assert token is not None
        V = self.vocab_size or 0
        if product is not None:
            then = hash_gate.prepare_hash_gate_from_logits(
                on, N, E, k, V, scale, (token, I32), strides=(E, w_stride, i_stride), pdl=early
            )
            fixed = [own[name] for name in (*(() if out else ("weights", "ids")), "hash_lut", "logits")]
            return self._replayed(dense.ProductThen(product, self._parts, shape, then, (5, 1, 4, 2, 3), fixed))
        addresses = (POINTER, address("W_gate"), POINTER, address("hash_lut"), *results)
        return hash_gate.prepare_hash_gate(
            on, N, E, K, k, V, scale, (own["W_gate"].dtype, token, I32), addresses,
            strides=(pitch, w_stride, i_stride), pdl=pdl,
        )  # fmt: skip

    def _replayed(self, launch: Launch) -> Launch:
        """cuBLAS's launches cost the host the most: replayed from a graph on a GPU."""
        return launch if self._replays is None else self._replays.wrap(launch)


def _on_host(x: Any) -> np.ndarray[Any, Any]:
    """Any framework's array as a NumPy array."""
    if isinstance(x, np.ndarray):
        return x
    root = type(x).__module__.partition(".")[0]
    if root == "torch":
        import torch

        x = x.detach().cpu().contiguous()
        return x.view(torch.int16).numpy().view(BF16) if x.dtype == torch.bfloat16 else x.numpy()  # type: ignore[no-any-return]
    if root == "cupy":
        return x.get()  # type: ignore[no-any-return]
    return np.asarray(x)
