"""dense_router_decode against the float64 oracle: ids up to the derived bound, weights at the ids returned."""

import numpy as np
import pytest
from gates import gate, units

from dsv4_rt import ArgumentError, activation_topk, dense_router_decode, use_device
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.formats import BF16, F32
from dsv4_rt.router import dense
from dsv4_rt.router.reference import UNIT, check_dense_router, gate_logits


def run(device, hidden, w_gate, bias, k=6, scale=2.5, **options):
    options.setdefault("workspace", dense.new_workspace(w_gate.shape[0], max(hidden.shape[0], 1)))
    weights, ids = dense_router_decode(*(device.array(x) for x in (hidden, w_gate, bias)), k, scale, **options)
    assert not device.numpy(options["workspace"])[: dense.TICKETS].any()  # as the next launch needs them
    return device.numpy(weights), device.numpy(ids)


def check(device, hidden, w_gate, bias, k=6, scale=2.5, **options):
    weights, ids = run(device, hidden, w_gate, bias, k, scale, **options)
    bound = units(len(hidden), *w_gate.shape, w_gate.dtype)
    check_dense_router(weights, ids, hidden, w_gate, bias, k, scale, bound)
    return weights, ids


# Each choice of a kernel: streams of 1 to 4 tokens, two blocks of them; 1, 2, 4, 8 tiles of 8 tokens, two blocks.
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "float"])
@pytest.mark.parametrize("N", [1, 2, 3, 5, 7, 13, 30, 41, 70])
def test_matches_oracle(device, rng, N, dtype):
    check(device, *gate(rng, N, 256, 512, dtype), 6, 1.5)


@pytest.mark.parametrize(("E", "K"), [(256, 4096), (384, 7168)])
@pytest.mark.parametrize("N", [1, 4, 9])
def test_the_models_shapes(device, rng, N, E, K):
    check(device, *gate(rng, N, E, K))


@pytest.mark.slow
@pytest.mark.parametrize(("E", "K"), [(256, 4096), (384, 7168)])
@pytest.mark.parametrize("N", [8, 32, 64, 128])
def test_the_models_shapes_with_more_tokens(device, rng, N, E, K):
    check(device, *gate(rng, N, E, K))


# k from one to the limit; E one, not a multiple of anything, past a warp's step, the limit; K the least, odd multiples.
@pytest.mark.parametrize("N", [1, 5, 20])
@pytest.mark.parametrize(
    ("k", "E", "K"), [(1, 1, 64), (6, 6, 192), (2, 61, 64), (8, 129, 320), (16, 257, 448), (16, 512, 64)]
)
def test_any_shape(device, rng, N, k, E, K):
    check(device, *gate(rng, N, E, K), k)


def test_random_shapes(device, rng):
    for _ in range(100 if device.kind == "cuda" else 8):
        k = int(rng.integers(1, 17))
        E, K, N = int(rng.integers(k, 513)), 64 * int(rng.integers(1, 113)), int(rng.integers(1, 130))
        dtype = BF16 if rng.random() < 0.6 else F32
        if device.kind == "emulator":
            K, N = min(K, 512), min(N, 24)
        print(f"N {N}, E {E}, K {K}, k {k}, {dtype}")
        check(device, *gate(rng, N, E, K, dtype), k)


@pytest.mark.parametrize("N", [3, 12])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bf16", "float"])
def test_keeps_its_logits_if_asked(device, rng, guarded, N, dtype):
    hidden, w_gate, bias = gate(rng, N, 61, 320, dtype)
    kept = guarded((N, 61), np.float32, row_gap=3)
    weights, ids = run(device, hidden, w_gate, bias, logits=kept.array)
    logits = device.numpy(kept.array)
    want = gate_logits(hidden, w_gate)
    assert (np.abs(logits - want.logits) <= units(N, 61, 320, dtype) * UNIT * want.magnitude).all()
    # From its logits on the result is activation_topk's, bit for bit: it is the same code.
    again = activation_topk(device.array(np.ascontiguousarray(logits)), device.array(bias), 6, 2.5)
    assert np.array_equal(device.numpy(again[0]).view(np.uint32), weights.view(np.uint32))
    assert np.array_equal(device.numpy(again[1]), ids)
    assert kept.intact()


@pytest.mark.parametrize("N", [2, 9, 40])
def test_all_bits_of_a_float_weight_count(device, N):
    """1 + 2^-10 + 2^-20 is three bfloat16 parts. Here the first two cancel, exactly, whatever the order."""
    hidden = np.zeros((N, 128), BF16)
    hidden[:, 5], hidden[:, 77] = 1, -1
    w_gate = np.zeros((32, 128), np.float32)
    w_gate[:, 5], w_gate[:, 77] = 1 + 2.0**-10 + 2.0**-20, 1 + 2.0**-10
    kept = device.array(np.full((N, 32), np.nan, np.float32))
    run(device, hidden, w_gate, np.zeros(32, np.float32), logits=kept)
    assert (device.numpy(kept) == 2.0**-20).all()


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
@pytest.mark.parametrize("N", [3, 12, 40])
def test_every_order_of_warps_and_no_race(rng, N, order, arch):
    """Under a watch on global memory: the last block has synchronised with every block whose logits it reads."""
    device = EmulatedDevice(arch, order=order, seed=int(rng.integers(2**31)), check_global_writes=True)
    with use_device(device):
        check(device, *gate(rng, N, 70, 128))


@pytest.mark.parametrize("N", [4, 16])
def test_same_bits_every_run_and_in_any_place(device, rng, N):
    hidden, w_gate, bias = gate(rng, N, 256, 256)
    weights, ids = run(device, hidden, w_gate, bias)
    order = rng.permutation(N)
    for rows in (np.arange(N), order):
        again = run(device, hidden[rows], w_gate, bias)
        assert np.array_equal(again[0].view(np.uint32), weights[rows].view(np.uint32))
        assert np.array_equal(again[1], ids[rows])


@pytest.mark.parametrize("N", [2, 11])
def test_equal_experts_go_to_the_lower_index(device, rng, N):
    hidden, w_gate, bias = gate(rng, N, 96, 128)
    w_gate[:], bias[:] = w_gate[0], 8.0
    _, ids = run(device, hidden, w_gate, bias)
    assert (ids == np.arange(6)).all()


@pytest.mark.parametrize("N", [4, 11])
def test_nan_and_infinity(device, rng, N):
    hidden, w_gate, bias = gate(rng, N, 96, 128)
    hidden[1, 5] = np.nan  # a row without a number: nobody is chosen
    w_gate[7, 3] = np.nan  # an expert without a number: never chosen
    bias[50] = np.inf
    bias[51] = np.nan
    bias[52] = -np.inf
    weights, ids = run(device, hidden, w_gate, bias)
    assert (ids[1] == -1).all()
    assert (weights[1] == 0).all()
    rest = np.arange(N) != 1
    assert (ids[rest, 0] == 50).all()
    assert not np.isin(ids, (7, 51, 52)).any()
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("N", [3, 19])
def test_reads_strided_rows_and_writes_only_its_own(device, rng, guarded, N):
    hidden, w_gate, bias = gate(rng, N, 61, 192)
    wide = device.array(np.full((N, 192 + 24), np.nan, BF16))
    wide[:, 8:200] = device.array(hidden)
    weights, ids = guarded((N, 6), np.float32, row_gap=5), guarded((N, 6), np.int32, row_gap=1)
    space = guarded((1, dense.workspace_words(61, N)), np.int32, fill=0)
    out = dense_router_decode(
        wide[:, 8:200], device.array(w_gate), device.array(bias),
        workspace=space.array[0], out=(weights.array, ids.array),
    )  # fmt: skip
    assert out[0] is weights.array
    assert out[1] is ids.array
    bound = units(N, 61, 192, BF16)
    check_dense_router(device.numpy(out[0]), device.numpy(out[1]), hidden, w_gate, bias, 6, 2.5, bound)
    assert weights.intact()
    assert ids.intact()
    assert space.intact()


@pytest.mark.parametrize("N", [1, 3, 19])
def test_programmatic_dependent_launch_changes_nothing(device, rng, N):
    inputs = gate(rng, N, 256, 256)
    plain, early = run(device, *inputs), run(device, *inputs, pdl=True)
    assert np.array_equal(plain[0], early[0])
    assert np.array_equal(plain[1], early[1])


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 2, 4, 6, 8, 16, 33])
def test_many_dependent_launches_share_a_workspace(gpu, rng, N):
    """Each starts while the ones before still run, and waits where it must: the bits of launches one by one."""
    import cupy

    E, K, each = 256, 1024, []
    space = dense.new_workspace(E, 64)
    _, w_gate, bias = (gpu.array(x) for x in gate(rng, 1, E, K))
    for _ in range(200):
        hidden = gpu.array(rng.standard_normal((N, K)).astype(BF16))
        out = (cupy.full((N, 6), np.nan, np.float32), cupy.full((N, 6), -7, np.int32))
        each.append((hidden, dense_router_decode(hidden, w_gate, bias, workspace=space), out))
    gpu.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        for hidden, _, out in each:
            dense_router_decode(hidden, w_gate, bias, workspace=space, out=out, pdl=True)
        stream.synchronize()
    for _, want, got in each:
        assert all(bool((a.view(np.int32) == b.view(np.int32)).all()) for a, b in zip(want, got, strict=True))


def test_no_tokens(device, rng):
    hidden, w_gate, bias = gate(rng, 0, 64, 128)
    weights, ids = run(device, hidden, w_gate, bias)
    assert weights.shape == ids.shape == (0, 6)


@pytest.mark.parametrize("N", [1, 12])
def test_a_launch_cut_short_spoils_the_workspace_until_it_is_zeroed(device, rng, N):
    inputs = gate(rng, N, 64, 128)
    spoilt = np.zeros(dense.workspace_words(64, N), np.int32)
    spoilt[: dense.TICKETS] = 1  # as if one block had come and no other
    space = device.array(spoilt)
    with pytest.raises(AssertionError):
        check(device, *inputs, workspace=space)
    space[...] = 0
    check(device, *inputs, workspace=space)


def test_the_workspace_serves_one_size_after_another(device, rng):
    space = dense.new_workspace(128, 64)
    for N in (64, 1, 9, 33, 4, 1):
        check(device, *gate(rng, N, 128, 128), workspace=space)


def test_tiles_are_forms_the_kernels_have():
    for dtype in (BF16, F32):
        for E in (1, 6, 61, 256, 384, 511, 512):
            for K in (64, 320, 4096, 4160, 7168, 65536):
                for N in range(1, 513):
                    tile = dense.decode_tile(N, E, K, dtype)
                    if isinstance(tile, dense.StreamTile):
                        assert tile.tokens <= tile.warps
                        assert 1 <= tile.experts * tile.tokens <= 32
                        assert -(-N // tile.tokens) <= dense.TICKETS
                    else:
                        assert tile.warps % tile.groups == 0
                        assert tile.tiles <= (8 if tile.warps == 8 else 4)
                        assert 1 <= tile.steps <= 8
                        assert -(-N // 8) <= dense.TICKETS


def test_says_what_is_wrong(emulator):
    x, w, b = np.zeros((4, 128), BF16), np.zeros((64, 128), BF16), np.zeros(64, np.float32)
    space = dense.new_workspace(64)

    def refused(match, x=x, w=w, b=b, k=6, **options):
        with pytest.raises(ArgumentError, match=match):
            dense_router_decode(x, w, b, k, **({"workspace": space} | options))

    refused(r"w_gate does not fit(.|\n)*dtype must be bfloat16 or float32", w=w.astype(np.float16))
    refused(r"w_gate does not fit(.|\n)*axis 1 \(K\) must be 128", w=w[:, :64].copy())
    refused(r"e_bias does not fit(.|\n)*axis 0 \(E\) must be 64", b=b[:63])
    refused(r"hidden does not fit(.|\n)*dtype must be bfloat16", x=x.astype(np.float32))
    refused(r"K = 96 must be a multiple of 64 up to 65536; pad hidden and w_gate", x[:, :96].copy(), w[:, :96].copy())
    refused(r"E = 64 must be from top_k = 6 to 512|E = 5 must be from top_k = 6", w=w[:5], b=b[:5])
    refused(r"E = 513 must be from top_k = 6 to 512", w=np.zeros((513, 128), BF16), b=np.zeros(513, np.float32))
    refused(r"top_k = 17 must be an integer from 1 to 16", k=17)
    refused(r"workspace has 64 int32, 320 are needed for N = 4", workspace=space[:64])
    refused(r"workspace is None, an array is needed", workspace=None)
    refused(r"N = 513 tokens, up to 512 fit; use dense_router_prefill", x=np.zeros((513, 128), BF16))
    shifted = np.zeros((4, 136), BF16)[:, 1:129]
    refused(r"rows of hidden must lie at multiples of 16 B", x=shifted)
    refused(r"output weights overlaps", out=(space[64:88].view(np.float32).reshape(4, 6), np.zeros((4, 6), np.int32)))
