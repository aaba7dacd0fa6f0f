"""The router kernels as PyTorch operators: torch.ops.dsv4_rt.*, for torch.compile and torch.cuda.graph.

    import dsv4_rt.torch_ops
    weights, ids = torch.ops.dsv4_rt.activation_topk(logits, e_bias, 6, 1.5)

    key = dsv4_rt.torch_ops.register(router)                  # a finalized dsv4_rt.Router
    weights, ids = torch.ops.dsv4_rt.dense_route(hidden, key)
    weights, ids = torch.ops.dsv4_rt.hash_route(hidden, token_ids, key)

Importing this module imports torch; importing dsv4_rt does not. Results are new tensors. CUDA tensors run on their GPU,
CPU tensors on the emulator. There is no gradient.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch

from dsv4_rt.device import device, use_device
from dsv4_rt.errors import ArgumentError
from dsv4_rt.router import ops
from dsv4_rt.router.layer import Router

_DEVICES = ("cpu", "cuda")
_routers: dict[int, Router] = {}
_keys = itertools.count()  # never the same twice: a compiled function must not meet another router under its number


def register(router: Router) -> int:
    """A number that stands for a router in `dense_route` and `hash_route`; it is kept alive until `unregister`."""
    key = next(_keys)
    _routers[key] = router
    return key


def unregister(key: int) -> None:
    """Forget a router; its number is not given again. Graphs that use it must be gone. ArgumentError: there is none."""
    _router(key)
    del _routers[key]


def _router(key: int, mode: str | None = None) -> Router:
    router = _routers.get(key)
    if router is None:
        raise ArgumentError(f"torch_ops: no router is registered as {key}; give what register(router) returned")
    if mode is not None and router.mode != mode:
        raise ArgumentError(f"torch_ops: router {key} has mode {router.mode!r}; {mode}_route wants mode {mode!r}")
    return router


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The emulator for a CPU tensor where the current device is a GPU."""
    return use_device("emulator") if x.device.type == "cpu" and device().kind == "cuda" else contextlib.nullcontext()


def _define(name: str, signature: str, run: Any, fake: Any) -> None:
    torch.library.define(f"dsv4_rt::{name}", signature)
    torch.library.impl(f"dsv4_rt::{name}", _DEVICES, run)
    torch.library.register_fake(f"dsv4_rt::{name}", fake)


def _fake_pair(x: torch.Tensor, k: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    N = x.shape[0]
    return x.new_empty((N, k), dtype=dtype), x.new_empty((N, k), dtype=torch.int32)


def _activation_topk(
    logits: torch.Tensor, e_bias: torch.Tensor, top_k: int, routed_scaling_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    with _on(logits):
        return ops.activation_topk(logits, e_bias, top_k, routed_scaling_factor)


def _topk_select(scores: torch.Tensor, k: int, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    with _on(scores):
        return ops.topk_select(scores, k, lengths=lengths)


def _dense_route(hidden: torch.Tensor, router: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = _router(router, "dense")
    return chosen(hidden, out=_fake_pair(hidden, chosen.top_k))


def _hash_route(hidden: torch.Tensor, token_ids: torch.Tensor, router: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = _router(router, "hash")
    return chosen(hidden, token_ids, out=_fake_pair(hidden, chosen.top_k))


_define(
    "activation_topk",
    "(Tensor logits, Tensor e_bias, int top_k=6, float routed_scaling_factor=2.5) -> (Tensor weights, Tensor ids)",
    _activation_topk,
    lambda logits, e_bias, top_k=6, routed_scaling_factor=2.5: _fake_pair(logits, top_k),
)
_define(
    "topk_select",
    "(Tensor scores, int k, Tensor? lengths=None) -> (Tensor values, Tensor ids)",
    _topk_select,
    lambda scores, k, lengths=None: _fake_pair(scores, k, scores.dtype),
)
_define(
    "dense_route",
    "(Tensor hidden, int router) -> (Tensor weights, Tensor ids)",
    _dense_route,
    lambda hidden, router: _fake_pair(hidden, _router(router, "dense").top_k),
)
_define(
    "hash_route",
    "(Tensor hidden, Tensor token_ids, int router) -> (Tensor weights, Tensor ids)",
    _hash_route,
    lambda hidden, token_ids, router: _fake_pair(hidden, _router(router, "hash").top_k),
)
