"""The tcgen05 GEMM that the emulator runs, on a Blackwell GPU."""

import pytest
from blackwell_kernels import loader, run_gemm_tcgen05
from hopper_kernels import normal


@pytest.fixture
def blackwell(gpu):
    """cuda:0 as the current device; the test is skipped where it is no Blackwell."""
    if not gpu.arch.startswith("sm_10"):
        pytest.skip(f"no Blackwell GPU here: tcgen05 does not exist on {gpu.arch}")
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(128, 64), (128, 128), (64, 48), (64, 256)])
def test_gemm(tile, blackwell, rng, tmp_path):
    load = loader(tmp_path)
    for _ in range(20):
        run_gemm_tcgen05(blackwell, load, rng, tile=tile)


@pytest.mark.gpu
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 8), (128, 64, 64), (300, 65, 1000), (1024, 512, 7168)])
def test_gemm_shapes(M, N, K, blackwell, rng, tmp_path):
    run_gemm_tcgen05(blackwell, loader(tmp_path), rng, M=M, N=N, K=K, ctas=148, draw=normal)
