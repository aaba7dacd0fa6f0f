# ruff: noqa: E501  (bugs are changes of source lines, kernels are inline assembly)
"""tcgen05 of pairs of CTAs, in clusters and with launch control: kernels and single instructions against NumPy, bugs."""

import pytest
from asynchronous import all_schedules
from hopper_kernels import normal
from pair_kernels import loader, run_gemm_pair
from programs import ORDERS

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice


def emulated(completion, rng, **options):
    options = {"completion": completion, "seed": int(rng.integers(1 << 30))} | options
    return dsv4_rt.use_device(EmulatedDevice("sm_100a", **options))


@pytest.mark.parametrize("tile", [(256, 64), (128, 64), (256, 256), (128, 32)])
@all_schedules
def test_gemm_of_pairs(tile, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, tile=tile)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_of_pairs_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, ctas=4, draw=normal)
