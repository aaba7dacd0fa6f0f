"""Plain kernels to measure against, written as an engineer would in an hour with Triton. Not part of the package."""

import triton
import triton.language as tl


@triton.jit
def _router_top_k(logits, bias, weights, ids, E, scale, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    e = tl.arange(0, BLOCK)
    inside = e < E
    x = tl.load(logits + row * E + e, mask=inside, other=0.0)
    b = tl.load(bias + e, mask=inside, other=float("-inf"))
    act = tl.sqrt(tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))))
    score = tl.where(inside, act + b, float("-inf"))
    place = tl.arange(0, KP)
    chosen = tl.zeros((KP,), tl.float32)
    index = tl.zeros((KP,), tl.int32)
    for j in tl.static_range(K):
        at = tl.argmax(score, axis=0)
        here = e == at
        chosen = tl.where(place == j, tl.sum(tl.where(here, act, 0.0), axis=0), chosen)
        index = tl.where(place == j, at, index)
        score = tl.where(here, float("-inf"), score)
    w = chosen / tl.sum(chosen, axis=0) * scale
    tl.store(weights + row * K + place, w, mask=place < K)
    tl.store(ids + row * K + place, index, mask=place < K)


def router_top_k(logits, bias, weights, ids, scale):
    """activation_topk for contiguous rows: one program, one warp a row."""
    N, E = logits.shape
    K = weights.shape[1]
    _router_top_k[(N,)](
        logits, bias, weights, ids, E, scale, K, triton.next_power_of_2(K), triton.next_power_of_2(E), num_warps=1
    )
