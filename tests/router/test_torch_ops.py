"""torch.ops.dsv4_rt: schemas, fakes and dispatch by opcheck, torch.compile, CUDA graphs; results are the launchers'."""

import numpy as np
import pytest
from gates import gate

import dsv4_rt
from dsv4_rt.formats import BF16

E, K, V = 96, 128, 50


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def home(request, torch):
    """The torch device of the test; its kernels run on the emulator, or on the GPU."""
    pytest.importorskip("dsv4_rt.torch_ops")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec, name = ("emulator:sm_90a", "cpu") if request.param == "emulated" else ("cuda:0", "cuda")
    with dsv4_rt.use_device(spec):
        yield torch.device(name)


def bf16(torch, x, home):
    return torch.from_numpy(x.astype(BF16).view(np.int16)).view(torch.bfloat16).to(home)


@pytest.fixture
def routers(home, rng):
    """Keys of a dense and of a hash router."""
    from dsv4_rt import torch_ops

    _, w_gate, bias = gate(rng, 1, E, K)
    dense = dsv4_rt.Router(K, E, max_num_tokens=64)
    dense.load_weights(w_gate, bias)
    by_hash = dsv4_rt.Router(K, E, mode="hash", vocab_size=V, max_num_tokens=64)
    by_hash.load_weights(w_gate, None, np.stack([rng.permutation(E)[:6] for _ in range(V)]).astype(np.int32))
    for router in (dense, by_hash):
        router.finalize_weights()
    keys = [torch_ops.register(router) for router in (dense, by_hash)]
    yield keys
    for key in keys:
        torch_ops.unregister(key)


def calls(torch, home, rng, routers, N=5):
    """(operator, arguments) of every operator."""
    ops = torch.ops.dsv4_rt
    logits = torch.from_numpy(rng.standard_normal((N, E)).astype(np.float32)).to(home)
    bias = torch.from_numpy(rng.standard_normal(E).astype(np.float32)).to(home)
    lengths = torch.from_numpy(rng.integers(0, E, N).astype(np.int32)).to(home)
    hidden = bf16(torch, rng.standard_normal((N, K)), home)
    tokens = torch.from_numpy(rng.integers(0, V, N)).to(home)
    return {
        "activation_topk": (ops.activation_topk, (logits, bias, 6, 1.5)),
        "topk_select": (ops.topk_select, (logits, 4, lengths)),
        "dense_route": (ops.dense_route, (hidden, routers[0])),
        "hash_route": (ops.hash_route, (hidden, tokens, routers[1])),
    }


NAMES = ("activation_topk", "topk_select", "dense_route", "hash_route")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(torch, home, rng, routers, name):
    op, arguments = calls(torch, home, rng, routers)[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_launcher(torch, home, rng, routers, name):
    from dsv4_rt import torch_ops

    op, arguments = calls(torch, home, rng, routers)[name]
    if name.endswith("route"):
        want = torch_ops._routers[arguments[-1]](*arguments[:-1])
    elif name == "topk_select":
        want = dsv4_rt.topk_select(arguments[0], 4, lengths=arguments[2])
    else:
        want = dsv4_rt.activation_topk(*arguments)
    got = op(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0].data_ptr() != want[0].data_ptr()  # a tensor of its own


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_a_full_graph(torch, home, rng, routers, name):
    op, arguments = calls(torch, home, rng, routers)[name]

    def model(x, *rest):
        weights, ids = op(x * 1, *rest)
        return weights * 2, ids + 1

    # On a GPU the default backend; its code for CPUs would want a C++ compiler, which a test machine need not have.
    backend = "inductor" if home.type == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    for got, want in zip(compiled(*arguments), model(*arguments), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_cuda_graph(torch, home, rng, routers, name):
    if home.type != "cuda":
        pytest.skip("no CUDA device")
    op, arguments = calls(torch, home, rng, routers)[name]
    op(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = op(*arguments)
    _, others = calls(torch, home, rng, routers)[name]
    for old, new in zip(arguments, others, strict=True):
        if isinstance(old, torch.Tensor):
            old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, op(*others), strict=True))


def test_says_what_is_wrong(torch, home, rng, routers):
    from dsv4_rt import torch_ops

    hidden = bf16(torch, rng.standard_normal((2, K)), home)
    with pytest.raises(dsv4_rt.ArgumentError, match="no router is registered as -99"):
        torch.ops.dsv4_rt.dense_route(hidden, -99)
    with pytest.raises(dsv4_rt.ArgumentError, match="has mode 'hash'; dense_route wants mode 'dense'"):
        torch.ops.dsv4_rt.dense_route(hidden, routers[1])
    with pytest.raises(dsv4_rt.ArgumentError, match="no router is registered as -77"):
        torch_ops.unregister(-77)


def test_a_number_is_never_given_twice(torch, routers):
    from dsv4_rt import torch_ops

    router = torch_ops._router(routers[0])
    key = torch_ops.register(router)
    torch_ops.unregister(key)
    assert torch_ops.register(router) > key
