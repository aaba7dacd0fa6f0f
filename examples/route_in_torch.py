"""A DeepSeek-V4 router inside a compiled PyTorch model: on a GPU also as a CUDA graph, else on the emulator."""

import torch

import dsv4_rt
from dsv4_rt import torch_ops

home = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)

# A layer's gate. Here a small one with random weights; Router.for_layer("flash", 5) has the shape of a real one.
router = dsv4_rt.Router(512, 64, routed_scaling_factor=1.5, max_num_tokens=32)
router.load_weights(torch.randn(64, 512).bfloat16() / 512**0.5, torch.full((64,), 8.08))
router.finalize_weights()
key = torch_ops.register(router)


def layer(hidden):
    """Norm, then the experts of each token and their weights."""
    normed = torch.nn.functional.rms_norm(hidden, (512,))
    return torch.ops.dsv4_rt.dense_route(normed, key)


compiled = torch.compile(layer, fullgraph=True, backend="inductor" if home.type == "cuda" else "aot_eager")
hidden = torch.randn(4, 512, device=home, dtype=torch.bfloat16)
weights, ids = compiled(hidden)
print(f"{dsv4_rt.device().name}: compiled")
print(ids.tolist())

if home.type == "cuda":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = layer(hidden)
    hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    print("captured and replayed with other hidden states")
    print(ids.tolist())
assert (weights.sum(-1) - 1.5).abs().max() < 1e-6
