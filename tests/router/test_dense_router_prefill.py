"""dense_router_prefill and the product under it; on the emulator the product is NumPy's."""

import numpy as np
import pytest
from gates import gate, product_units

from dsv4_rt import ArgumentError, GateProduct, dense_router_prefill
from dsv4_rt.arrays import framework
from dsv4_rt.formats import BF16
from dsv4_rt.router import reference
from dsv4_rt.router.product import bf16_parts


@pytest.fixture
def product(device):
    try:
        return GateProduct(device)
    except Exception as error:
        if "cuBLAS" in str(error):
            pytest.skip("cuBLAS is not installed")
        raise


@pytest.mark.parametrize(("N", "E", "K"), [(1, 61, 64), (100, 256, 512), (257, 384, 192)])
def test_matches_oracle(device, product, rng, N, E, K):
    hidden, w_gate, bias = gate(rng, N, E, K)
    inputs = [device.array(x) for x in (hidden, w_gate, bias)]
    out = (device.array(np.full((N, 6), np.nan, np.float32)), device.array(np.full((N, 6), -7, np.int32)))
    logits = device.array(np.full((N, -(-E // 4) * 4), np.nan, np.float32))[:, :E]
    dense_router_prefill(*inputs, 6, 1.5, product=product, logits=logits, out=out)
    weights, ids = (device.numpy(x) for x in out)
    reference.check_dense_router(weights, ids, hidden, w_gate, bias, 6, 1.5, product_units(K))


def test_allocates_its_results_if_none_are_given(device, product, rng, monkeypatch):
    hidden, w_gate, bias = gate(rng, 9, 64, 128)
    inputs = [device.array(x) for x in (hidden, w_gate, bias)]
    home, shapes = framework(inputs[0]), []
    plain = home.empty

    def poisoned(shape, dtype, on):
        made = plain(shape, dtype, on)
        made[...] = np.nan if dtype == np.float32 else -7
        shapes.append(shape)
        return made

    monkeypatch.setattr(home, "empty", poisoned)  # what is not written shows, logits too
    weights, ids = (device.numpy(x) for x in dense_router_prefill(*inputs, product=product))
    assert shapes == [(9, 6), (9, 6), (9, 64)]
    reference.check_dense_router(weights, ids, hidden, w_gate, bias, 6, 2.5, product_units(128))


def test_keeps_logits_and_writes_only_its_own(device, product, rng, guarded):
    N, E, K = 70, 60, 128
    hidden, w_gate, bias = gate(rng, N, E, K)
    wide = device.array(np.full((N, K + 16), np.nan, BF16))
    wide[:, 8 : K + 8] = device.array(hidden)
    weights, ids = guarded((N, 6), np.float32, row_gap=1), guarded((N, 6), np.int32)
    logits = guarded((N, E), np.float32, row_gap=4)
    out, kept = (weights.array, ids.array), logits.array
    inputs = (wide[:, 8 : K + 8], device.array(w_gate), device.array(bias))
    dense_router_prefill(*inputs, product=product, logits=kept, out=out)
    want = reference.gate_logits(hidden, w_gate)
    error = np.abs(device.numpy(kept) - want.logits)
    assert (error <= product_units(K) * reference.UNIT * want.magnitude).all()
    reference.check_activation_topk(
        device.numpy(out[0]), device.numpy(out[1]), np.ascontiguousarray(device.numpy(kept)), bias, 6, 2.5
    )
    assert weights.intact()
    assert ids.intact()
    assert logits.intact()


def test_three_parts_make_a_float_exactly(rng):
    w = (rng.standard_normal((50, 50)) * np.exp(rng.uniform(-30, 30, (50, 50)))).astype(np.float32)
    parts = bf16_parts(w)
    assert np.array_equal(sum(p.astype(np.float64) for p in parts), w.astype(np.float64))


def test_says_what_is_wrong(emulator):
    x, w, b = np.zeros((4, 128), BF16), np.zeros((64, 128), BF16), np.zeros(64, np.float32)
    product = GateProduct(emulator)
    assert product.library == "NumPy"
    with pytest.raises(ArgumentError, match="give both logits and out, or neither"):
        dense_router_prefill(x, w, b, product=product, logits=np.zeros((4, 64), np.float32))
    same = np.lib.stride_tricks.as_strided(x, (4, 128), (0, 2))
    with pytest.raises(ArgumentError, match="rows of hidden are 0 elements apart and 128 wide"):
        dense_router_prefill(same, w, b, product=product)
    with pytest.raises(ArgumentError, match="product must be a GateProduct of EmulatedDevice"):
        dense_router_prefill(x, w, b, product=7)
    with pytest.raises(ArgumentError, match=r"w_gate does not fit(.|\n)*dtype must be bfloat16"):
        dense_router_prefill(x, w.astype(np.float32), b, product=product)
