"""Route tokens through two layers of DeepSeek-V4-Flash, with random weights: on a GPU, or on the emulator without one.

    python examples/route_tokens.py [CHECKPOINT]        a folder of .safetensors files to take the weights from
"""

import sys

import numpy as np

import dsv4_rt
from dsv4_rt.formats import BF16

rng = np.random.default_rng(0)
device = dsv4_rt.device()
print(f"{device.name}")


def weights_of(router):
    """Random weights of a router's shape."""
    E, K, V = router.num_experts, router.hidden_size, router.vocab_size
    w_gate = (rng.standard_normal((E, K)) / np.sqrt(K)).astype(BF16)
    if router.mode == "dense":
        return w_gate, rng.normal(8.08, 0.01, E).astype(np.float32)
    return w_gate, None, rng.permuted(np.tile(np.arange(E, dtype=np.int32), (V, 1))[:, :8], axis=1)[:, : router.top_k]


for layer in (0, 5):  # the first three layers route by token id, the others by score
    router = dsv4_rt.Router.for_layer("flash", layer, max_num_tokens=16)
    if len(sys.argv) > 1:
        router.load_checkpoint(sys.argv[1], layer)
    else:
        router.load_weights(*weights_of(router))
    router.finalize_weights()
    hidden = device.array(rng.standard_normal((4, router.hidden_size)).astype(BF16))
    token_ids = device.array(np.array([1, 22, 333, 4444], np.int32))
    weights, ids = router(hidden, token_ids)  # launched on the current stream; nothing is allocated
    print(f"layer {layer}, {router.mode} routing")
    for row in zip(device.numpy(ids), device.numpy(weights), strict=True):
        print("   experts", *(f"{e:3d}" for e in row[0]), "  weights", *(f"{w:.3f}" for w in row[1]))
