"""Router on a GPU: CUDA graphs, several routers at once, nothing allocated."""

import numpy as np
import pytest
from gates import gate, product_units, units

import dsv4_rt
from dsv4_rt import replay
from dsv4_rt.formats import BF16
from dsv4_rt.router import dense, reference

pytestmark = pytest.mark.gpu
E, K, V = 256, 512, 1000


def dense_router(rng, E=E, K=K, **options):
    _, w_gate, bias = gate(rng, 1, E, K)
    router = dsv4_rt.Router(K, E, **options)
    router.load_weights(w_gate, bias)
    router.finalize_weights()
    return router, w_gate, bias


def hash_router(rng, **options):
    _, w_gate, _ = gate(rng, 1, E, K)
    table = np.stack([rng.permutation(E)[:6] for _ in range(V)]).astype(np.int32)
    router = dsv4_rt.Router(K, E, mode="hash", vocab_size=V, **options)
    router.load_weights(w_gate, None, table)
    router.finalize_weights()
    return router, w_gate, table


def states(rng, N, K=K):
    return rng.standard_normal((N, K)).astype(BF16)


def check_dense(got, hidden, w_gate, bias):
    N = len(hidden)
    limit = dense.decode_limit(w_gate.dtype, w_gate.shape[1], False)
    bound = units(N, E, K, w_gate.dtype) if N <= limit else product_units(K)
    reference.check_dense_router(got[0].get(), got[1].get(), hidden, w_gate, bias, 6, 2.5, bound)


@pytest.mark.parametrize("N", [1, 8, 64, 200, 300, 4096])
def test_captured_without_a_call_before_and_replayed_with_other_inputs(gpu, rng, N):
    import cupy

    router, w_gate, bias = dense_router(rng)
    hidden = gpu.array(states(rng, N))
    gpu.synchronize()  # the copy was made on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        for _ in range(3):
            got = router(hidden)
        graph = stream.end_capture()
        for _ in range(3):
            new = states(rng, N)
            hidden.set(new)
            graph.launch(stream)
            stream.synchronize()
            check_dense(got, new, w_gate, bias)


@pytest.mark.parametrize("N", [1, 8, 1500])
def test_token_ids_change_between_replays(gpu, rng, N):
    import cupy

    router, w_gate, table = hash_router(rng)
    hidden, tokens = gpu.array(states(rng, N)), gpu.array(np.zeros(N, np.int64))
    gpu.synchronize()  # the copies were made on another stream
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        got = router(hidden, tokens)
        graph = stream.end_capture()
        for _ in range(3):
            new, ids = states(rng, N), rng.integers(-1, V + 1, N)
            hidden.set(new)
            tokens.set(ids)
            graph.launch(stream)
            stream.synchronize()
            want = reference.hash_gate(new, w_gate, ids, table, 2.5)
            magnitude = reference.gate_logits(new, w_gate).magnitude
            reference.check_hash_gate(got[0].get(), got[1].get(), want, magnitude, product_units(K) + 40)


@pytest.mark.parametrize("N", [1, 2, 13, 64])
def test_two_graphs_of_two_routers_interleaved(gpu, rng, N):
    """Each router has tickets of its own: however the two interleave, nobody waits for, or counts, another's blocks."""
    import cupy

    pairs, kept = [], []
    for _ in range(2):
        router, w_gate, bias = dense_router(rng)
        kept.append(router)
        hidden = states(rng, N)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            array = cupy.asarray(hidden)
            router(array)
            stream.begin_capture()
            got = router(array, pdl=True)
            graph = stream.end_capture()
        pairs.append((stream, graph, got, hidden, w_gate, bias))
        kept.append(array)  # the graph reads it
    wrong = [cupy.zeros(1, np.int32) for _ in pairs]
    first = []
    for stream, graph, got, *inputs in pairs:
        graph.launch(stream)
        stream.synchronize()
        check_dense(got, *inputs)
        first.append([x.copy() for x in got])
    gpu.synchronize()  # the copies were made on another stream
    for _ in range(1000):
        for (stream, graph, got, *_), want, bad in zip(pairs, first, wrong, strict=True):
            with stream:
                got[0].fill(np.nan)
                got[1].fill(-7)
                graph.launch(stream)
                bad += (got[0].view(np.int32) != want[0].view(np.int32)).any() | (got[1] != want[1]).any()
    gpu.synchronize()
    assert [int(bad[0]) for bad in wrong] == [0, 0]


def test_streams_with_routers_of_their_own(gpu, rng):
    import cupy

    work = []
    for N in (1, 4, 16, 64, 300):
        router, w_gate, bias = dense_router(rng)
        work.append((router, cupy.cuda.Stream(non_blocking=True), states(rng, N), w_gate, bias))
    arrays = [gpu.array(hidden) for _, _, hidden, _, _ in work]
    gpu.synchronize()
    for _ in range(50):
        results = [router(x, stream=stream) for (router, stream, *_), x in zip(work, arrays, strict=True)]
    gpu.synchronize()
    for (_, _, *inputs), got in zip(work, results, strict=True):
        check_dense(got, *inputs)


def test_calls_allocate_nothing(gpu, rng):
    import cupy

    router, _, _ = dense_router(rng)
    by_hash, _, _ = hash_router(rng)
    inputs = [(gpu.array(states(rng, N)), gpu.array(rng.integers(0, V, N))) for N in (1, 64, 300, 2000)]
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(3):
        for hidden, tokens in inputs:
            router(hidden)
            by_hash(hidden, tokens)
    gpu.synchronize()
    assert (pool.used_bytes(), pool.total_bytes()) == before


def test_torch_tensors_in_a_torch_graph(gpu, rng, torch):
    router, w_gate, bias = dense_router(rng)
    hidden = torch.from_numpy(states(rng, 7).view(np.int16)).view(torch.bfloat16).cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = router(hidden)
    new = states(rng, 7)
    hidden.copy_(torch.from_numpy(new.view(np.int16)).view(torch.bfloat16))
    graph.replay()
    torch.cuda.synchronize()
    assert weights.is_cuda
    bound = units(7, E, K, w_gate.dtype)
    reference.check_dense_router(weights.cpu().numpy(), ids.cpu().numpy(), new, w_gate, bias, 6, 2.5, bound)


def test_a_host_array_is_refused(gpu, rng):
    router, _, _ = dense_router(rng)
    with pytest.raises(dsv4_rt.ArgumentError, match="hidden is on host memory, the router on CudaDevice"):
        router(states(rng, 3))


@pytest.mark.parametrize("N", [300, 5000])
def test_replays_calls_that_keep_coming(gpu, rng, N):
    """The same addresses again: a graph of the router's own, with new contents each time, in order on any stream."""
    import cupy

    router, w_gate, bias = dense_router(rng)
    hidden = gpu.array(states(rng, N))
    streams = [cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)]
    for i in range(replay.CALLS_BEFORE + 3):
        new = states(rng, N)
        gpu.synchronize()
        with streams[i % 2]:
            hidden.set(new)
            got = router(hidden)
            for x in got:
                x.fill(-1)
            got = router(hidden)
            gpu.synchronize()
        check_dense(got, new, w_gate, bias)
    assert len(router._replays) == 1


def test_replays_hash_routing_and_what_is_given_as_out(gpu, rng):
    import cupy

    N = 1500
    router, w_gate, table = hash_router(rng)
    hidden, tokens = gpu.array(states(rng, N)), gpu.array(np.zeros(N, np.int64))
    outs = [(cupy.empty((N, 6), np.float32), cupy.empty((N, 6), np.int32)) for _ in range(2)]
    for i in range(2 * replay.CALLS_BEFORE + 4):
        new, ids = states(rng, N), rng.integers(-1, V + 1, N)
        hidden.set(new)
        tokens.set(ids)
        out = outs[i % 2]
        out[0].fill(np.nan)
        out[1].fill(-7)
        router(hidden, tokens, out=out)
        if i > 2 * replay.CALLS_BEFORE:
            want = reference.hash_gate(new, w_gate, ids, table, 2.5)
            magnitude = reference.gate_logits(new, w_gate).magnitude
            reference.check_hash_gate(out[0].get(), out[1].get(), want, magnitude, product_units(K) + 40)
    assert len(router._replays) == 2


def test_a_capture_after_a_recording_and_new_weights(gpu, rng):
    """A caller's capture gets the kernels, not the router's graph; new weights are not hidden by an old graph."""
    import cupy

    N = 300
    router, w_gate, bias = dense_router(rng)
    hidden = gpu.array(states(rng, N))
    for _ in range(replay.CALLS_BEFORE + 2):
        router(hidden)
    gpu.synchronize()
    assert len(router._replays) == 1
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        got = router(hidden)
        graph = stream.end_capture()
        new = states(rng, N)
        hidden.set(new)
        got[0].fill(np.nan)
        graph.launch(stream)
        stream.synchronize()
    check_dense(got, new, w_gate, bias)
    _, w_gate, bias = gate(rng, 1, E, K)
    router.load_weights(w_gate, bias)
    router.finalize_weights()
    assert len(router._replays) == 0
    for _ in range(replay.CALLS_BEFORE + 2):
        got = router(hidden)
    check_dense(got, new, w_gate, bias)


def test_recording_waits_for_nothing(gpu, rng):
    """Every call returns while the device is still at work, the one that records too."""
    import cupy

    router, _, _ = dense_router(rng)
    hidden = gpu.array(states(rng, 300))
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin() { long long t = clock64(); while (clock64() - t < 400000000) {} }', "spin"
    )
    router(hidden)
    spin((1,), (1,), ())
    gpu.synchronize()
    done = cupy.cuda.Event()
    spin((1,), (1,), ())
    done.record()
    for _ in range(replay.CALLS_BEFORE + 3):
        router(hidden)
    assert not done.done  # 0.2 s
    assert len(router._replays) == 1
    gpu.synchronize()
