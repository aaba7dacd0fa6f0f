"""Router: weights in, launches out, and nothing behind anybody's back."""

import json

import numpy as np
import pytest
from gates import gate, product_units, units

import dsv4_rt
from dsv4_rt import ArgumentError, Router
from dsv4_rt.formats import BF16, F32
from dsv4_rt.router import dense, hash_gate, reference

E, K, V = 96, 128, 50


def table_of(rng, dtype=np.int32):
    return np.stack([rng.permutation(E)[:6] for _ in range(V)]).astype(dtype)


@pytest.fixture
def cublas(device):
    try:
        dsv4_rt.GateProduct(device)
    except dsv4_rt.DeviceError as error:
        pytest.skip(f"cuBLAS is not installed: {error}")


def dense_router(rng, dtype=BF16, **options):
    _, w_gate, bias = gate(rng, 1, E, K, dtype)
    router = Router(K, E, routed_scaling_factor=1.5, **options)
    router.load_weights(w_gate, bias)
    router.finalize_weights()
    return router, w_gate, bias


def hash_router(rng, weights="gate", dtype=BF16, **options):
    _, w_gate, _ = gate(rng, 1, E, K, dtype)
    table = table_of(rng)
    router = Router(K, E, routed_scaling_factor=1.5, mode="hash", hash_weights=weights, vocab_size=V, **options)
    router.load_weights(*((w_gate, None, table) if weights == "gate" else (None, None, table)))
    router.finalize_weights()
    return router, w_gate, table


@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "float"])
def test_dense_of_every_size(device, cublas, rng, dtype):
    router, w_gate, bias = dense_router(rng, dtype, max_num_tokens=260)
    limit = dense.decode_limit(np.dtype(dtype), K, False, device.arch)
    for N in (0, 1, 2, 5, 8, 40, limit, limit + 1, 260):
        hidden = rng.standard_normal((N, K)).astype(BF16)
        weights, ids = router(device.array(hidden))
        assert weights.shape == ids.shape == (N, 6)
        bound = units(N, E, K, dtype) if N <= limit else product_units(K, 3 if dtype == F32 else 1)
        reference.check_dense_router(
            device.numpy(weights), device.numpy(ids), hidden, w_gate, bias, 6, 1.5, bound if N else 0
        )


def test_wide_gates_take_two_launches_earlier_without_pdl(device, cublas, rng, monkeypatch):
    N, E, K = 33, 16, 4160
    hidden, w_gate, bias = gate(rng, N, E, K)
    products = []
    run = dsv4_rt.GateProduct.run
    monkeypatch.setattr(dsv4_rt.GateProduct, "run", lambda *args: (products.append(args[4]), run(*args)))
    two = [33] if device.arch == "sm_90a" else []  # the form by tcgen05 is another kernel
    for most, taken in ((65, two), (64, [])):  # a router for 64 tokens does without cuBLAS
        router = Router(K, E, max_num_tokens=most)
        router.load_weights(w_gate, bias)
        router.finalize_weights()
        products.clear()
        for pdl in (True, False):
            weights, ids = (device.numpy(x) for x in router(device.array(hidden), pdl=pdl))
            reference.check_dense_router(weights, ids, hidden, w_gate, bias, 6, 2.5, product_units(K))
        assert products == taken


@pytest.mark.parametrize("token", [np.int32, np.int64])
def test_hash_with_gate_weights_of_every_size(device, cublas, rng, token, monkeypatch):
    monkeypatch.setattr(hash_gate, "HASH_GATE_LIMIT", 20)  # the other road, without a thousand tokens
    router, w_gate, table = hash_router(rng, max_num_tokens=40)
    for N in (0, 1, 20, 21, 40):
        hidden, tokens = rng.standard_normal((N, K)).astype(BF16), rng.integers(-1, V + 1, N).astype(token)
        weights, ids = router(device.array(hidden), device.array(tokens))
        want = reference.hash_gate(hidden, w_gate, tokens, table, 1.5)
        magnitude = reference.gate_logits(hidden, w_gate).magnitude
        reference.check_hash_gate(device.numpy(weights), device.numpy(ids), want, magnitude, product_units(K) + 40)


@pytest.mark.parametrize("token", [np.int32, np.int64])
def test_hash_with_uniform_weights(device, rng, token):
    router, _, table = hash_router(rng, "uniform", max_num_tokens=40)
    for N in (0, 3, 40):
        tokens = rng.integers(-1, V + 1, N).astype(token)
        for hidden in (None, device.array(np.zeros((N, K), BF16))):  # not read: may be left out
            weights, ids = router(hidden, device.array(tokens))
            want = reference.hash_router(tokens, table)
            assert np.array_equal(device.numpy(weights), want[0])
            assert np.array_equal(device.numpy(ids), want[1])


def test_results_are_views_of_one_buffer_and_cached(device, rng):
    router, _, _ = dense_router(rng, max_num_tokens=8)
    hidden = device.array(rng.standard_normal((8, K)).astype(BF16))
    eight, five, again = router(hidden), router(hidden[:5]), router(hidden)
    assert eight[0] is again[0]
    assert five[1] is router(hidden[:5])[1]
    assert np.shares_memory(eight[0], five[0]) if device.kind == "emulator" else eight[0].data.ptr == five[0].data.ptr


def test_token_ids_are_no_burden_to_a_dense_router(device, rng):
    router, _, _ = dense_router(rng, max_num_tokens=8)
    hidden = device.array(rng.standard_normal((3, K)).astype(BF16))
    plain = device.numpy(router(hidden)[1])
    assert np.array_equal(device.numpy(router(hidden, device.array(np.zeros(3, np.int64)))[1]), plain)


def test_strided_hidden_states(device, cublas, rng):
    router, w_gate, bias = dense_router(rng, max_num_tokens=200)
    for N in (3, 200):
        wide = rng.standard_normal((N, 3, K)).astype(BF16)
        weights, ids = router(device.array(wide)[:, 1])
        bound = max(product_units(K), units(N, E, K, BF16))
        hidden = np.ascontiguousarray(wide[:, 1])
        reference.check_dense_router(device.numpy(weights), device.numpy(ids), hidden, w_gate, bias, 6, 1.5, bound)


def test_the_same_row_for_all_tokens(emulator, rng):
    router, w_gate, bias = dense_router(rng, max_num_tokens=70)
    hidden = rng.standard_normal((1, K)).astype(BF16)
    same = np.lib.stride_tricks.as_strided(hidden, (70, K), (0, 2))
    weights, ids = router(same[:9])
    reference.check_dense_router(weights, ids, same[:9], w_gate, bias, 6, 1.5, units(9, E, K, BF16))
    with pytest.raises(ArgumentError, match="Router: rows of hidden are 0 elements apart and 128 wide"):
        router(same)


def test_finalize_again_keeps_what_is_on_the_device(device, cublas, rng):
    router, w_gate, bias = dense_router(rng, F32, max_num_tokens=140)
    addresses = {name: router._address(name) for name in router._arrays}
    router.finalize_weights()
    assert {name: router._address(name) for name in router._arrays} == addresses
    for N in (5, 140):
        hidden = rng.standard_normal((N, K)).astype(BF16)
        weights, ids = (device.numpy(x) for x in router(device.array(hidden)))
        bound = max(product_units(K, 3), units(N, E, K, F32))
        reference.check_dense_router(weights, ids, hidden, w_gate, bias, 6, 1.5, bound)


def test_finalize_again_recovers_from_a_launch_cut_short(device, rng):
    router, _, _ = dense_router(rng, max_num_tokens=16)
    hidden = device.array(rng.standard_normal((5, K)).astype(BF16))
    right = [device.numpy(x).copy() for x in router(hidden)]
    address = router._address("workspace")
    router._arrays["workspace"][: dense.TICKETS] = 1  # one block came, and no other
    router(hidden)  # some block takes itself for the last too early
    assert device.numpy(router._arrays["workspace"])[: dense.TICKETS].any()
    router.finalize_weights()
    assert not device.numpy(router._arrays["workspace"])[: dense.TICKETS].any()
    weights, ids = router(hidden)
    assert np.array_equal(device.numpy(weights), right[0])
    assert np.array_equal(device.numpy(ids), right[1])
    assert router._address("workspace") == address  # graphs hold it


def test_new_weights_want_finalize_again(device, rng):
    router, w_gate, bias = dense_router(rng, max_num_tokens=16)
    hidden = rng.standard_normal((5, K)).astype(BF16)
    router(device.array(hidden))
    w_gate = w_gate[::-1].copy()
    router.load_weights(w_gate, bias)
    with pytest.raises(ArgumentError, match="not final; call finalize_weights first"):
        router(device.array(hidden))
    router.finalize_weights()
    weights, ids = (device.numpy(x) for x in router(device.array(hidden)))
    reference.check_dense_router(weights, ids, hidden, w_gate, bias, 6, 1.5, units(5, E, K, BF16))


def test_for_layer_knows_the_models():
    for model, shape in (("flash", dsv4_rt.FLASH), ("pro", dsv4_rt.PRO)):
        for layer in (0, 2, 3, shape.num_layers):
            router = Router.for_layer(model, layer, device="emulator:sm_90a")
            assert (router.hidden_size, router.num_experts) == (shape.hidden_size, shape.num_experts)
            assert (router.top_k, router.routed_scaling_factor) == (6, shape.routed_scaling_factor)
            assert router.mode == ("hash" if layer < 3 else "dense")
            assert router.vocab_size == (shape.vocab_size if layer < 3 else None)
            assert router.hash_weights == "gate"
    assert Router.for_layer("pro", 0, max_num_tokens=4, device="emulator").max_num_tokens == 4
    with pytest.raises(ArgumentError, match="model = 'ultra' must be 'flash' or 'pro'"):
        Router.for_layer("ultra", 0)
    with pytest.raises(ArgumentError, match="layer = 62 must be an integer from 0 to 61"):
        Router.for_layer("pro", 62)


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(rng, prefix):
    tensors = {}
    for layer in (0, 3, 13):
        hidden, w_gate, bias = gate(rng, 1, E, K)
        tensors[f"{prefix}layers.{layer}.ffn.gate.weight"] = w_gate
        if layer == 0:
            tensors[f"{prefix}layers.{layer}.ffn.gate.tid2eid"] = table_of(rng, np.int64)
        else:
            tensors[f"{prefix}layers.{layer}.ffn.gate.bias"] = bias
        tensors[f"{prefix}layers.{layer}.ffn.experts.0.w1"] = hidden
    return tensors


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("form", ["mapping", "file", "folder", "index"])
def test_checkpoints(emulator, rng, tmp_path, prefix, form):
    from safetensors.numpy import save_file

    tensors = checkpoint(rng, prefix)
    source = tensors
    if form == "file":
        source = tmp_path / "gate.safetensors"
        save_file(tensors, source)
    elif form != "mapping":
        source = str(tmp_path)
        names = sorted(tensors)
        for i, part in enumerate((names[::2], names[1::2])):
            save_file({name: tensors[name] for name in part}, tmp_path / f"part{i}.safetensors")
        if form == "index":
            where = {name: f"part{i % 2}.safetensors" for i, name in enumerate(names)}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    dense_layer, hash_layer = Router(K, E), Router(K, E, mode="hash", vocab_size=V)
    dense_layer.load_checkpoint(source, 3)
    assert np.array_equal(dense_layer._host["W_gate"], tensors[f"{prefix}layers.3.ffn.gate.weight"])
    assert np.array_equal(dense_layer._host["e_bias"], tensors[f"{prefix}layers.3.ffn.gate.bias"])
    hash_layer.load_checkpoint(source, 0)
    assert np.array_equal(hash_layer._host["W_gate"], tensors[f"{prefix}layers.0.ffn.gate.weight"])
    assert np.array_equal(hash_layer._host["hash_lut"], tensors[f"{prefix}layers.0.ffn.gate.tid2eid"])
    with pytest.raises(ArgumentError, match=r"layer 0 has gate.\{weight, tid2eid\}; this router takes weight, bias"):
        dense_layer.load_checkpoint(source, 0)
    with pytest.raises(ArgumentError, match=r"layer 4 has gate.\{nothing\}"):
        dense_layer.load_checkpoint(source, 4)


def test_a_checkpoint_that_is_not_there(emulator, rng, tmp_path):
    router = Router(K, E)
    with pytest.raises(ArgumentError, match=r"nowhere' is no .safetensors file and no directory of them"):
        router.load_checkpoint(tmp_path / "nowhere", 0)
    twice = checkpoint(rng, "a.") | checkpoint(rng, "b.")
    with pytest.raises(ArgumentError, match=r"layers.3.ffn.gate.weight is there 2 times: a.layers(.)*, b.layers"):
        router.load_checkpoint(twice, 3)


def test_a_checkpoint_that_cannot_be_read(emulator, rng, tmp_path):
    """A part that was not downloaded, a file cut off, an index that is none: the file is named."""
    from safetensors.numpy import save_file

    router, index = Router(K, E), tmp_path / "model.safetensors.index.json"
    tensors = checkpoint(rng, "")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    with pytest.raises(ArgumentError, match=r"part.safetensors' cannot be read: .*No such file"):
        router.load_checkpoint(tmp_path, 3)
    save_file(tensors, tmp_path / "part.safetensors")
    router.load_checkpoint(tmp_path, 3)
    whole = (tmp_path / "part.safetensors").read_bytes()
    (tmp_path / "part.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArgumentError, match=r"part.safetensors' cannot be read"):
        router.load_checkpoint(tmp_path, 3)
    with pytest.raises(ArgumentError, match=r"part.safetensors' cannot be read"):
        router.load_checkpoint(tmp_path / "part.safetensors", 3)
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(ArgumentError, match=r"index.json' cannot be read"):
            router.load_checkpoint(tmp_path, 3)


# -------------------------------------------------------------------------------------------------------- refusals


def test_construction_says_what_is_wrong(emulator):
    for match, options in {
        "K = 100 must be a multiple of 64": {"hidden_size": 100},
        "num_experts = 513 must be an integer from 1 to 512": {"num_experts": 513},
        "E = 96 must be from top_k|top_k = 17 must be": {"top_k": 17},
        "E = 5 must be from top_k = 6": {"num_experts": 5},
        "mode = 'sparse' must be 'dense' or 'hash'": {"mode": "sparse"},
        "hash_weights = 'equal' must be 'gate' or 'uniform'": {"hash_weights": "equal"},
        "vocab_size = None with mode = 'hash'": {"mode": "hash"},
        "vocab_size = 9 with mode = 'dense'": {"vocab_size": 9},
        "max_num_tokens = 0 must be": {"max_num_tokens": 0},
        "routed_scaling_factor = nan must be a finite": {"routed_scaling_factor": float("nan")},
    }.items():
        with pytest.raises(ArgumentError, match=match):
            Router(**({"hidden_size": K, "num_experts": E} | options))


def test_loading_says_what_is_wrong(emulator, rng):
    _, w, b = gate(rng, 1, E, K)
    table = table_of(rng)
    plain = Router(K, E)
    gated = Router(K, E, mode="hash", vocab_size=V)
    uniform = Router(K, E, mode="hash", hash_weights="uniform", vocab_size=V)
    outside = table.copy()
    outside[3, :2] = 0, E
    infinite = w.astype(np.float32)
    infinite[7, 3] = -np.inf
    for router, match, given in (
        (plain, "e_bias is missing; dense routing takes W_gate and e_bias", (w,)),
        (plain, "hash_lut has no place here; dense routing takes W_gate and e_bias", (w, b, table)),
        (gated, "e_bias has no place here; hash routing with gate weights takes W_gate and hash_lut", (w, b, table)),
        (gated, "hash_lut is missing", (w,)),
        (uniform, "W_gate has no place here; hash routing with uniform weights takes hash_lut", (w, None, table)),
        (plain, r"W_gate does not fit(.|\n)*axis 0 \(96\) must be 96", (w[:-1], b)),
        (plain, r"W_gate does not fit(.|\n)*dtype must be bfloat16 or float32", (w.astype(np.float16), b)),
        (plain, r"W_gate of expert 7 is not finite", (infinite, b)),
        (plain, r"e_bias does not fit(.|\n)*dtype must be float32", (w, b.astype(np.float64))),
        (gated, r"hash_lut does not fit(.|\n)*axis 1 \(6\) must be 6", (w, None, table[:, :5])),
        (gated, r"hash_lut has experts from 0 to 96; they must be in 0 .. 95", (w, None, outside)),
        (uniform, r"hash_lut has experts from -\d+ to", (None, None, table - E)),
    ):
        with pytest.raises(ArgumentError, match=match):
            router.load_weights(*given)
    with pytest.raises(ArgumentError, match="no weights; call load_weights or load_checkpoint first"):
        Router(K, E).finalize_weights()


def test_calls_say_what_is_wrong(emulator, rng):
    hidden, w, b = gate(rng, 9, E, K)
    router = Router(K, E, max_num_tokens=8)
    with pytest.raises(ArgumentError, match="not final; call finalize_weights first"):
        router(hidden)
    router.load_weights(w, b)
    router.finalize_weights()
    for match, given in {
        "N = 9 tokens; this router has max_num_tokens = 8": (hidden,),
        r"hidden does not fit(.|\n)*axis 1 \(128\) must be 128": (hidden[:3, :64],),
        r"hidden does not fit(.|\n)*dtype must be bfloat16": (hidden[:3].astype(np.float32),),
        "rows of hidden must lie at multiples of 16 B": (np.zeros((4, K + 4), BF16)[:, :K],),
        "hidden is missing; dense routing needs hidden": (None,),
        "str is no array": ("hidden",),
    }.items():
        with pytest.raises(ArgumentError, match=match):
            router(*given)
    gated, _, _ = hash_router(rng, max_num_tokens=8)
    with pytest.raises(ArgumentError, match="token_ids is missing; hash routing with gate weights needs hidden"):
        gated(hidden[:3])
    with pytest.raises(ArgumentError, match=r"token_ids does not fit(.|\n)*axis 0 \(N\) must be 3"):
        gated(hidden[:3], np.zeros(4, np.int32))
    with pytest.raises(ArgumentError, match=r"token_ids does not fit(.|\n)*dtype must be int32 or int64"):
        gated(hidden[:3], np.zeros(3, np.int16))


def test_weights_of_any_framework(emulator, rng, torch):
    _, w, b = gate(rng, 1, E, K)
    router = Router(K, E, max_num_tokens=8)
    router.load_weights(torch.from_numpy(w.view(np.int16)).view(torch.bfloat16), torch.from_numpy(b))
    assert np.array_equal(router._host["W_gate"].view(np.uint16), w.view(np.uint16))
    hidden = rng.standard_normal((3, K)).astype(BF16)
    router.finalize_weights()
    weights, ids = router(torch.from_numpy(hidden.view(np.int16)).view(torch.bfloat16))
    assert isinstance(weights, torch.Tensor)
    same = router(hidden)
    assert np.array_equal(weights.numpy(), same[0])
    assert np.array_equal(ids.numpy(), same[1])
