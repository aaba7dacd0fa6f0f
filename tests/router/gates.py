"""Inputs of routers with a gate product, and the error bounds of their kernels' logits."""

import numpy as np

import dsv4_rt
from dsv4_rt.formats import BF16, F32
from dsv4_rt.router import dense, dense_sm100
from dsv4_rt.router.reference import MMA_UNITS

FLASH_BIAS = 8.08  # released Flash: biases near 8.08 on all experts, so scores differ in their last bits


def gate(rng, N, E, K, dtype=BF16, size=2.0):
    """Hidden states and weights whose logits have a standard deviation of `size`, and nearly equal biases."""
    hidden = rng.standard_normal((N, K)).astype(BF16)
    w_gate = (size / np.sqrt(K) * rng.standard_normal((E, K))).astype(dtype)
    return hidden, w_gate, (FLASH_BIAS + 0.01 * rng.standard_normal(E)).astype(np.float32)


def units(N, E, K, dtype):
    """Bound of the logits' error of dense_router_decode, on the current device, in UNITs of the sum of magnitudes."""
    if dense_sm100.tile(N, E, K, dtype, dsv4_rt.device().arch):  # 16 channels at a time in one chain, 8 blocks in order
        return 1.01 * MMA_UNITS * 4 * -(-K // 512) + 8
    tile = dense.decode_tile(N, E, K, dtype)
    if isinstance(tile, dense.StreamTile):  # a thread's products in turn, lanes by a butterfly, warps in order
        return -(-(K // 8) // (32 * tile.warps)) * 8 + 5 + tile.warps
    split = tile.warps // tile.groups
    steps = -(-(K // 32) // (tile.cluster * split)) + 1  # a warp's chain of mma: two a step, three times that for float
    return 1.01 * MMA_UNITS * 2 * steps * (3 if dtype == F32 else 1) + split + tile.cluster


def product_units(K, parts=1):
    """The same for cuBLAS: at worst one chain of mma over all channels, for each part of the weights."""
    return 1.01 * MMA_UNITS * (K // 16) * parts
