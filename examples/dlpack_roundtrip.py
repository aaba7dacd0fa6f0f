"""One router gate, called with arrays of every framework at hand: no copies, results come back in the caller's kind.

    python examples/dlpack_roundtrip.py

On a GPU: CuPy, torch CUDA tensors, and a bare DLPack producer. Without one: NumPy, torch CPU tensors and the same
producer, on the emulator. torch is optional.
"""

import numpy as np

import dsv4_rt

N, E, K = 5, 256, 6


class Producer:
    """An array of a library this package has never heard of: all it offers is DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def main():
    device = dsv4_rt.device()
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((N, E), dtype=np.float32)
    bias = rng.standard_normal(E, dtype=np.float32)
    callers = {"CuPy" if device.kind == "cuda" else "NumPy": device.array}
    callers["DLPack"] = lambda x: Producer(device.array(x))
    try:
        import torch
    except ImportError:
        print("torch is not installed: its part is left out")
    else:
        where = f"cuda:{device.index}" if device.kind == "cuda" else "cpu"
        callers["torch"] = lambda x: torch.from_numpy(x).to(where)

    print(f"on {device.name}")
    expected = None
    for name, make in callers.items():
        x, b = make(logits), make(bias)
        weights, ids = dsv4_rt.activation_topk(x, b, K)
        # The caller's own DLPack import sees the memory the kernel wrote.
        seen = device.numpy(ids if name != "torch" else ids.cpu().numpy())
        expected = seen if expected is None else expected
        kind = type(ids).__module__.partition(".")[0]
        print(f"{name:7} in -> {kind}.{type(ids).__name__} out, token 0: experts {seen[0]}")
        assert np.array_equal(seen, expected), name
    if "torch" in callers:
        # Outputs may be another framework's arrays than the inputs: torch in, the device's own out, through one memory.
        out = (device.empty((N, K), np.float32), device.empty((N, K), np.int32))
        dsv4_rt.activation_topk(callers["torch"](logits), callers["torch"](bias), K, out=out)
        alias = torch.from_dlpack(out[1])
        assert alias.data_ptr() == (out[1].data.ptr if device.kind == "cuda" else out[1].ctypes.data)
        assert np.array_equal(alias.cpu().numpy(), expected)
        print("torch in, out= arrays of the device, read back by torch through DLPack: same memory, same experts")


if __name__ == "__main__":
    main()
