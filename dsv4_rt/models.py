"""FLASH and PRO: the shapes of the released DeepSeek-V4 models, as far as kernels need them.

Source: config.json and inference/config.json of DeepSeek-V4-Flash and DeepSeek-V4-Pro, names adapted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class ModelShape:
    """The sizes and constants of one model. All sizes count elements, not bytes.

    Every layer is a mixture of experts. Its attention keeps the last `window` positions as they are and, where its
    compress ratio r is not 0, one compressed entry per r positions; ratio 4 also has an indexer that picks `index_topk`
    of these entries. The multi-token-prediction block after the last layer has ratio 0 and routes by score.
    """

    name: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_positions: int
    rms_eps: float

    # Attention. Keys equal values: one key-value head, head_dim wide, its last rope_dim dimensions rotated.
    num_heads: int
    head_dim: int
    rope_dim: int
    q_lora_rank: int
    o_groups: int  # the output projection works on groups of num_heads / o_groups heads,
    o_lora_rank: int  # each brought down to o_lora_rank channels first
    window: int
    compress_ratios: tuple[int, ...]  # one a layer: 0 (window only), 4 or 128 positions an entry

    # Rotary positions: theta and no scaling where the ratio is 0; compress_theta and YaRN elsewhere.
    rope_theta: float
    compress_rope_theta: float
    yarn_factor: float
    yarn_original_positions: int
    yarn_beta_fast: float
    yarn_beta_slow: float

    # Indexer, on layers of ratio 4.
    index_num_heads: int
    index_head_dim: int
    index_topk: int

    # Experts.
    num_experts: int
    num_shared_experts: int
    top_k: int
    moe_intermediate: int  # of a routed and of the shared expert
    routed_scaling_factor: float
    num_hash_layers: int  # layers 0 .. num_hash_layers-1 take their experts from a table of token ids
    swiglu_limit: float

    # Manifold-constrained hyper-connections: hc_mult residual streams.
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float


FLASH: Final = ModelShape(
    name="flash",
    hidden_size=4096,
    num_layers=43,
    vocab_size=129280,
    max_positions=1_048_576,
    rms_eps=1e-6,
    num_heads=64,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    window=128,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
    rope_theta=10_000.0,
    compress_rope_theta=160_000.0,
    yarn_factor=16.0,
    yarn_original_positions=65_536,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    index_num_heads=64,
    index_head_dim=128,
    index_topk=512,
    num_experts=256,
    num_shared_experts=1,
    top_k=6,
    moe_intermediate=2048,
    routed_scaling_factor=1.5,
    num_hash_layers=3,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
)

PRO: Final = ModelShape(
    name="pro",
    hidden_size=7168,
    num_layers=61,
    vocab_size=129280,
    max_positions=1_048_576,
    rms_eps=1e-6,
    num_heads=128,
    head_dim=512,
    rope_dim=64,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    window=128,
    compress_ratios=(128, 128, *(4, 128) * 29, 4),
    rope_theta=10_000.0,
    compress_rope_theta=160_000.0,
    yarn_factor=16.0,
    yarn_original_positions=65_536,
    yarn_beta_fast=32.0,
    yarn_beta_slow=1.0,
    index_num_heads=64,
    index_head_dim=128,
    index_topk=1024,
    num_experts=384,
    num_shared_experts=1,
    top_k=6,
    moe_intermediate=3072,
    routed_scaling_factor=2.5,
    num_hash_layers=3,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
)
