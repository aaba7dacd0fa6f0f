"""The kernels of blackwell/, each with a run that compares it with NumPy, as hopper_kernels.py has them for hopper/."""

from pathlib import Path

import numpy as np
from hopper_kernels import compare, integers, poisoned

from dsv4_rt.launch import load as load_kernel
from dsv4_rt.tensor_map import TensorMap

FOLDER = Path(__file__).parent / "blackwell"
PAIRS = ("pair.cuh", "gemm_pair.cu", "split_k_tcgen05.cu", "gemm_launch_control.cu")  # those of pair_kernels.py
HOPPER = Path(__file__).parent / "hopper" / "hopper.cuh"


def loader(folder, old="", new=""):
    """Load kernels from a copy of blackwell/ in `folder`, with hopper.cuh beside, in which `old` (once) is `new`."""
    mine = [path for path in FOLDER.iterdir() if path.name not in PAIRS]
    texts = {path.name: path.read_text() for path in (*mine, HOPPER)}
    assert not old or sum(text.count(old) for text in texts.values()) == 1, old
    for name, text in texts.items():
        (folder / name).write_text(text.replace(old, new) if old else text)
    return lambda file, name: load_kernel(str(folder / file), name)


def run_gemm_tcgen05(device, load, rng, M=200, N=90, K=328, tile=(128, 64), stages=3, ctas=2, draw=integers):
    a, b = draw(rng, M, K), draw(rng, N, K)
    rows, columns = tile
    kernel = load("gemm_tcgen05.cu", f"gemm_tcgen05<{rows}, {columns}, {stages}>")
    maps = [TensorMap(device.array(x), box=(box, 64), swizzle="128B") for x, box in ((a, rows), (b, columns))]
    c = poisoned(device, M, N)
    shared = stages * (rows + columns) * 128 + 1024
    kernel.launch(ctas, 192, *maps, c, np.int32(M), np.int32(N), np.int32(K), shared=shared)
    compare(device.numpy(c), a, b)
