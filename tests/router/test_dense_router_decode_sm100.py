"""dense_router_decode by tcgen05, emulated: every completion schedule, every order of threads, bugs planted.

That it computes what its siblings do is in test_dense_router_decode.py, whose tests run it too.
"""

import threading

import numpy as np
import pytest
from gates import gate, units

from dsv4_rt import Router, dense_router_decode, use_device
from dsv4_rt.arrays import view
from dsv4_rt.compile import compile, kernels_dir
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.errors import EmulatorError
from dsv4_rt.formats import BF16, F32
from dsv4_rt.router import dense, dense_sm100
from dsv4_rt.router.reference import check_dense_router
from dsv4_rt.tensor_map import TensorMap

all_schedules = pytest.mark.parametrize("completion", ["early", "late", "random"])


@pytest.fixture(autouse=True)
def no_plans(monkeypatch):
    """Plans made here are forgotten, and their devices with them."""
    monkeypatch.setattr(dense._DENSE_ROUTER_DECODE, "_known", {})


def emulated(rng, completion="early", **options):
    """A device of its own, every check on."""
    checks = {"check_global_writes": True, "check_uninitialised": True, "check_tensor_fences": True}
    seed = int(rng.integers(2**31))
    return use_device(EmulatedDevice("sm_100a", completion=completion, seed=seed, **checks, **options))


def check(device, inputs, k=6, scale=2.5, workspace=None, pdl=False):
    """Into poisoned outputs, between logits; the tickets stand at zero again. Returns weights and ids."""
    hidden, w_gate, bias = inputs
    N, E = len(hidden), len(w_gate)
    assert dense_sm100.tile(N, *w_gate.shape, w_gate.dtype, device.arch)
    space = dense.new_workspace(E, N, device) if workspace is None else workspace
    out = device.array(np.full((N, k), np.nan, np.float32)), device.array(np.full((N, k), -77, np.int32))
    kept = device.array(np.full((N, E), np.nan, np.float32))
    given = [device.array(x) for x in inputs]
    dense_router_decode(*given, k, scale, workspace=space, logits=kept, out=out, pdl=pdl)
    weights, ids = (device.numpy(x) for x in out)
    assert not device.numpy(space)[: dense.TICKETS].any(), "tickets are left standing"
    assert np.isfinite(device.numpy(kept)).all()
    check_dense_router(weights, ids, hidden, w_gate, bias, k, scale, units(N, *w_gate.shape, w_gate.dtype))
    return weights, ids


# Tokens: one box of 8, ragged, full, a second block. Experts: fewer than a tile, ragged, each width of the tile, the
# limit. Channels: fewer pieces than blocks, as many, not the same for all.
SHAPES = [(5, 6, 64), (8, 61, 128), (13, 129, 192), (33, 257, 512), (64, 385, 320), (57, 512, 576), (70, 128, 128)]


@all_schedules
@pytest.mark.parametrize(("N", "E", "K"), SHAPES)
def test_every_schedule(rng, completion, N, E, K):
    with emulated(rng, completion) as device:
        check(device, gate(rng, N, E, K))


@all_schedules
@pytest.mark.parametrize("order", ["random", "reverse"])
def test_every_order_of_threads(rng, completion, order):
    with emulated(rng, completion, order=order) as device:
        check(device, gate(rng, 19, 70, 576), pdl=True)


def few_stages(monkeypatch, stages):
    monkeypatch.setattr(dense_sm100, "MAX_STAGES", stages)


@all_schedules
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_more_pieces_than_stages(rng, monkeypatch, completion, stages):
    few_stages(monkeypatch, stages)
    with emulated(rng, completion) as device:
        check(device, gate(rng, 21, 40, 64 * 50))  # 6 and 7 pieces a block


def test_the_longest_rows_go_around_the_ring(rng):
    with emulated(rng, "late") as device:
        check(device, gate(rng, 9, 6, 64 * 8 * 17))


@pytest.mark.slow
@all_schedules
@pytest.mark.parametrize(("E", "K"), [(256, 4096), (384, 7168), (384, 4096), (256, 7168)])
@pytest.mark.parametrize("N", [8, 64])
def test_the_models_shapes(rng, completion, N, E, K):
    with emulated(rng, completion) as device:
        check(device, gate(rng, N, E, K), 6, 1.5)


@pytest.mark.slow
@all_schedules
def test_random_shapes(rng, completion):
    for _ in range(10):
        k = int(rng.integers(1, 17))
        N, E, K = int(rng.integers(5, 65)), int(rng.integers(k, 513)), 64 * int(rng.integers(1, 33))
        print(f"N {N}, E {E}, K {K}, k {k}")
        with emulated(rng, completion) as device:
            check(device, gate(rng, N, E, K), k)


@all_schedules
def test_one_workspace_launch_after_launch(rng, completion):
    """As a graph replays them: the tickets are reset each time, the bits are the same, whatever was left behind."""
    with emulated(rng, completion) as device:
        space = dense.new_workspace(40, 64, device)
        inputs = {N: gate(rng, N, 40, 128) for N in (64, 7, 33)}
        first = {}
        for N in (64, 7, 33, 7, 64, 7):
            weights, ids = check(device, inputs[N], workspace=space)
            before = first.setdefault(N, (weights, ids))
            assert np.array_equal(before[0].view(np.uint32), weights.view(np.uint32))
            assert np.array_equal(before[1], ids)


def test_two_routers_at_once(rng):
    """Each has a workspace of its own; threads take turns at the device."""
    with emulated(rng) as device:
        routers, batches = [], []
        for E, K in ((24, 256), (40, 192)):
            router = Router(K, E, max_num_tokens=32, device=device)
            _, w_gate, bias = gate(rng, 1, E, K)
            router.load_weights(w_gate, bias)
            router.finalize_weights()
            routers.append((router, w_gate, bias))
            batches.append([rng.standard_normal((N, K)).astype(BF16) for N in (6, 32, 17)])
        problems = []

        def work(which):
            router, w_gate, bias = routers[which]
            try:
                with use_device(device):
                    for hidden in batches[which] * 2:
                        weights, ids = (device.numpy(x) for x in router(device.array(hidden)))
                        bound = units(len(hidden), *w_gate.shape, BF16)
                        check_dense_router(weights, ids, hidden, w_gate, bias, 6, 2.5, bound)
            except BaseException as problem:
                problems.append(problem)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]


def test_a_launch_cut_short_spoils_the_workspace_until_it_is_zeroed(rng):
    with emulated(rng) as device:
        inputs = gate(rng, 12, 64, 128)
        spoilt = np.zeros(dense.workspace_words(64, 12), np.int32)
        spoilt[: dense.TICKETS] = 1
        space = device.array(spoilt)
        with pytest.raises(AssertionError):
            check(device, inputs, workspace=space)
        space[...] = 0
        check(device, inputs, workspace=space)


def test_hidden_and_weights_may_move_from_call_to_call(rng):
    """One prepared launch; its tensor maps follow the addresses, forth and back."""
    with emulated(rng) as device:
        sets = [gate(rng, 9, 64, 192) for _ in range(3)]
        given = [[device.array(x) for x in inputs] for inputs in sets]
        space = dense.new_workspace(64, 9, device)
        out = device.array(np.zeros((9, 6), np.float32)), device.array(np.zeros((9, 6), np.int32))
        ready = dense.prepare_dense_router_decode(
            device, 9, 64, 192, 6, 2.5, BF16, (*(dense.POINTER,) * 4, np.uint64(0), dense.POINTER, dense.POINTER)
        )
        for hidden, weights in ((0, 0), (1, 0), (2, 1), (0, 0), (1, 2)):
            arrays = [given[hidden][0], given[weights][1], given[weights][2], space, *out]
            ready.launch([view(x).ptr for x in arrays], 0, [view(x) for x in arrays])
            inputs = (sets[hidden][0], sets[weights][1], sets[weights][2])
            got = [device.numpy(x) for x in out]
            check_dense_router(*got, *inputs, 6, 2.5, units(9, 64, 192, BF16))


def test_a_router_keeps_the_map_of_its_weights(rng, monkeypatch):
    """Of the two maps only that of hidden is a matter of each call."""
    with emulated(rng) as device:
        router = Router(128, 32, max_num_tokens=16, device=device)
        _, w_gate, bias = gate(rng, 1, 32, 128)
        router.load_weights(w_gate, bias)
        router.finalize_weights()
        arrays = [device.array(rng.standard_normal((16, 128)).astype(BF16)) for _ in range(2)]
        router(arrays[0])
        encoded = []
        monkeypatch.setattr(TensorMap, "fields", lambda self: pytest.fail("a form is read once"))
        plain = type(device).tensor_map_encoder
        monkeypatch.setattr(type(device), "tensor_map_encoder", lambda *a: encoded.append(a) or plain(*a))
        for array in arrays * 2:
            router(array)
        assert not encoded


def test_rows_far_apart_and_rows_that_are_one(device, rng):
    """The map takes any step from row to row that is a multiple of 16 B, none included."""
    hidden, w_gate, bias = gate(rng, 9, 61, 128)
    wide = device.array(np.full((9, 128 + 40), np.nan, BF16))
    wide[:, 16:144] = device.array(hidden)
    same = np.broadcast_to(hidden[:1], hidden.shape)
    one = device.array(hidden[:1].copy())
    if device.kind == "emulator":
        alike = np.broadcast_to(one, hidden.shape)
    else:
        import cupy

        alike = cupy.broadcast_to(one, hidden.shape)
    for array, values in ((wide[:, 16:144], hidden), (alike, same)):
        weights, ids = dense_router_decode(
            array, device.array(w_gate), device.array(bias), workspace=dense.new_workspace(61, 9)
        )
        bound = units(9, 61, 128, BF16)
        check_dense_router(device.numpy(weights), device.numpy(ids), values, w_gate, bias, 6, 2.5, bound)


def test_the_table():
    """Few tokens and float weights stay with the streaming form and mma.sync, Hopper with both."""
    for arch in ("sm_90a", "sm_100a", "sm_103a"):
        for dtype in (BF16, F32):
            for N in (1, 4, 5, 8, 64, 65, 512):
                tile = dense_sm100.tile(N, 256, 4096, dtype, arch)
                assert (tile is not None) == (arch != "sm_90a" and dtype == BF16 and N > 4)
    assert dense_sm100.tile(8, 256, 4096, BF16, "sm_100a") == dense_sm100.Sm100Tile(16, 8)
    assert dense_sm100.tile(64, 384, 7168, BF16, "sm_100a") == dense_sm100.Sm100Tile(24, 14)
    assert dense_sm100.tile(64, 512, 65536, BF16, "sm_100a") == dense_sm100.Sm100Tile(32, 16)


@pytest.mark.parametrize(("N", "dtype", "taken"), [(5, BF16, True), (4, BF16, False), (5, F32, False)])
def test_the_launcher_follows_the_table(emulator, N, dtype, taken):
    ready = dense.prepare_dense_router_decode(emulator, N, 64, 128, 6, 2.5, dtype)
    assert ready.kernel.name.startswith("dense_router_decode_sm100<") == taken


@pytest.mark.parametrize("E", [16, 128, 129, 256, 384, 385, 512])
def test_a_block_has_the_shared_memory_and_the_grid_the_sms(emulator, E):
    source, name = dense_sm100.instance(E, 16)
    tile = dense_sm100.tile(64, E, dense.MAX_CHANNELS, BF16, "sm_100a")
    kernel = compile(source, "sm_100a", (name,)).kernels[name]
    assert kernel.shared_bytes + tile.shared <= emulator.max_shared
    assert dense_sm100.CLUSTER * -(-E // tile.experts) <= 128


# ------------------------------------------------------------------------------------------------- planted bugs

COMMIT = "if (i + stages < steps) tc_commit(shared_address(&empty[s]));"
TURN = "\n            if (++s == stages) s = 0, parity ^= 1;"
ZERO = "*reinterpret_cast<uint4*>(zeros + s * STAGE + at) = make_uint4(0, 0, 0, 0);"
ARRIVE = COMMIT.replace("tc_commit(", 'asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(')[:-1] + ");"
DRAIN = "tc_fence_after();\n#pragma unroll\n            for (int e = 0; e < EXPERTS"
DEALLOC = "tmem_dealloc(acc, COLUMNS);"
SECOND = "    cluster_arrive();\n    cluster_wait();\n"
NAMED = '    if (warp <= MULTIPLIES) asm volatile("bar.sync 1, 192;" ::: "memory");\n'
NOT_WAITED = "of an asynchronous (tcgen05.mma|cp.async.bulk.tensor) that|undefined tensor memory|no thread can go on"
TWICE = NOT_WAITED + "|more arrivals than the phase expects"
NUMBERS = "^row .* is wanted|^row .*the oracle has"
RACE = "race on global memory"
# What is wrong -> (line, what it becomes, what is said: by the emulator, or in comparison with the oracle).
PLANTS = {
    "products are not waited for": ("mbarrier_wait(shared_address(&done), 0);", ";", NOT_WAITED),
    "the wrong parity of done": ("(&done), 0);", "(&done), 1);", NOT_WAITED),
    "a stage is not waited for": ("mbarrier_wait(shared_address(&full[s]), parity);", ";", NOT_WAITED),
    "the parity of full never turns": (COMMIT + TURN, COMMIT + TURN.replace(", parity ^= 1", ""), NOT_WAITED),
    "a stage is overwritten unasked": ("mbarrier_wait(shared_address(&empty[s]), parity);", ";", TWICE),
    "the parity of empty": ("u32 parity = 1; ", "u32 parity = 0; ", TWICE),
    "a stage is never given back": (COMMIT, "", "no thread can go on"),
    "a stage is given back by an arrival": (COMMIT, ARRIVE, NOT_WAITED),
    "weights of other channels": ("w_gate, (begin + i) * PIECE", "w_gate, i * PIECE", NUMBERS),
    "hidden of other channels": ("STAGE, hidden, (begin + i) * PIECE", "STAGE, hidden, i * PIECE", NUMBERS),
    "a piece of K is left out": ("/ C - begin;", "/ C - begin - (rank == 3);", NUMBERS),
    "A and B of different channels": ("b + 2 * j, i + j > 0", "b + 2 * (j & 2), i + j > 0", NUMBERS),
    "a step of 16 bytes": ("a + 2 * j, b + 2 * j", "a + j, b + j", NUMBERS),
    "sums begin with what was there": ("i + j > 0);", "true);", "accumulates over undefined tensor memory"),
    "fewer bytes expected": ("(rows + EXPERTS) * ROW_BYTES);", "EXPERTS * ROW_BYTES);", NOT_WAITED),
    "rows without a token are left as they are": (ZERO, ";", "tcgen05.mma reads uninitialised shared memory: matrix A"),
    "no proxy fence after the zeros": ("fence_async_shared();", ";", "no fence.proxy.async lies between"),
    "no fence behind done": (DRAIN, DRAIN.replace("tc_fence_after();", ""), "missing tcgen05.fence::after"),
    "another warp's tokens": ("acc + (warp *", "acc + ((warp ^ 1) *", "warp 0 of the CTA reaches lanes 0 to 31 only"),
    "no wait for the load": ("tmem_wait_load();", ";", "missing tcgen05.wait::ld"),
    "tensor memory is kept": (DEALLOC, ";", "exits without tcgen05.dealloc of 32 columns"),
    "tensor memory is given back twice": (DEALLOC, 2 * DEALLOC, "where no allocation begins; it was deallocated"),
    "parts are added before they have come": (SECOND, NAMED, "race on shared|uninitialised shared"),
    "each block waits for itself only": (SECOND, "    __syncthreads();\n", "race on shared|uninitialised shared"),
    "the wrong owner of a token": ("n / TILE,", "(n / TILE + 1) % C,", "uninitialised shared memory"),
    "a block's sum is left out": ("block = 1; block < C", "block = 2; block < C", NUMBERS),
    "the ticket one short": ("1) == clusters - 1", "1) == clusters - 2", RACE),
    "tickets are not reset": ("rank, clusters - 1) ==", "rank, 0xffffffffu) ==", "tickets"),
    "one ticket for all tokens": ("+ n0 / TILE + rank", "+ n0 / TILE", RACE + "|id -77 is no expert"),
}


@pytest.mark.parametrize("bug", PLANTS)
def test_a_bug_is_found(rng, monkeypatch, tmp_path, bug):
    """Under every schedule, and called by its name."""
    line, wrong, said = PLANTS[bug]
    text = (kernels_dir() / dense_sm100.SOURCE).read_text()
    assert text.count(line) == 1, line
    (tmp_path / "broken.cu").write_text(text.replace(line, wrong))
    monkeypatch.setattr(dense_sm100, "SOURCE", str(tmp_path / "broken.cu"))
    few_stages(monkeypatch, 2)
    inputs = gate(rng, 13, 40, 64 * 8 * 4)
    for completion in ("early", "late", "random"):
        with (
            emulated(rng, completion) as device,
            pytest.raises((AssertionError, EmulatorError), match=said) as found,
        ):
            check(device, inputs)
        print(f"{completion}: {found.value}")
