"""The model shapes agree with what is published about them."""

from __future__ import annotations

import dataclasses

import pytest

from dsv4_rt.models import FLASH, PRO


@pytest.mark.parametrize(
    ("model", "window_only", "c4", "c128"), [(FLASH, 2, 21, 20), (PRO, 0, 30, 31)], ids=["flash", "pro"]
)
def test_compress_ratios(model, window_only, c4, c128):
    ratios = model.compress_ratios
    assert len(ratios) == model.num_layers == window_only + c4 + c128
    assert [ratios.count(r) for r in (0, 4, 128)] == [window_only, c4, c128]
    assert all(ratio == (4 if layer % 2 == 0 else 128) for layer, ratio in enumerate(ratios) if layer >= 2)


@pytest.mark.parametrize("model", [FLASH, PRO], ids=["flash", "pro"])
def test_sizes_fit_together(model):
    assert model.num_heads // model.o_groups * model.head_dim == 4096  # input channels of one output group
    assert model.rope_dim < model.head_dim
    assert model.head_dim - model.rope_dim == 448  # the dimensions a cache entry keeps in fp8
    assert model.index_head_dim == 128  # the length of the Hadamard transform
    assert model.hidden_size % 128 == 0  # block scales of 128 x 128
    assert model.moe_intermediate % 128 == 0
    assert model.top_k <= 16 <= model.num_experts <= 1024  # what the router kernels accept
    assert model.num_hash_layers <= model.num_layers


def test_what_differs_between_the_two():
    same = {"vocab_size", "top_k", "num_hash_layers", "swiglu_limit", "head_dim", "rope_dim", "window", "max_positions"}
    for field in same:
        assert getattr(FLASH, field) == getattr(PRO, field), field
    assert (FLASH.num_experts, PRO.num_experts) == (256, 384)
    assert (FLASH.routed_scaling_factor, PRO.routed_scaling_factor) == (1.5, 2.5)
    assert (FLASH.index_topk, PRO.index_topk) == (512, 1024)
    assert (FLASH.hidden_size, PRO.hidden_size) == (4096, 7168)


def routed_parameters(model) -> int:
    """Gate, up and down projection of every routed expert of every layer."""
    return model.num_layers * model.num_experts * 3 * model.hidden_size * model.moe_intermediate


def test_routed_experts_are_most_of_the_published_parameters():
    assert 0.9 < routed_parameters(FLASH) / 284e9 < 1
    assert 0.9 < routed_parameters(PRO) / 1.6e12 < 1


def test_shapes_are_constants():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FLASH.top_k = 8
