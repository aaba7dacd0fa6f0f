"""What shapes alone do not reach: every tile of the launchers, dependent launches, captured graphs."""

import ml_dtypes
import numpy as np
import pytest
from test_quantize_nvfp4 import activations, edges, given, same

from dsv4_rt import formats
from dsv4_rt.linear import ops, reference
from dsv4_rt.linear.ops import (
    FewTile,
    Tile,
    dequantize_mxfp4,
    dequantize_nvfp4,
    nvfp4_partials,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_nvfp4_given,
    quantize_nvfp4_tensor,
)

BF16 = np.dtype(ml_dtypes.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=["bf16", "f32"])
both_layouts = pytest.mark.parametrize("layout", ["rows", "128x4"])


@pytest.fixture
def forgotten(monkeypatch):
    """No plan of an earlier call is known, none of this test's is kept."""
    for name in ("_QUANTIZE_NVFP4", "_QUANTIZE_NVFP4_TENSOR", "_QUANTIZE_NVFP4_GIVEN", "_QUANTIZE_MXFP4"):
        monkeypatch.setattr(getattr(ops, name), "_known", {})
    return monkeypatch


@both_dtypes
@both_layouts
@pytest.mark.parametrize(
    ("tile", "K"),
    [
        (FewTile(128, 8, 4), 4080),
        (FewTile(224, 8, 4), 7120),
        (FewTile(224, 8, 4), 48),
        (FewTile(128, 16, 2), 4080),
        (FewTile(224, 16, 2), 7120),
        (FewTile(224, 16, 2), 48),
        (Tile(256, 1), 4080),
        (Tile(448, 1), 7120),
        (Tile(64, 4), 2064),
        (Tile(128, 4), 7168),
        (Tile(128, 8), 8208),
        (Tile(256, 8), 20496),
    ],
    ids=str,
)
def test_every_tile(device, rng, forgotten, dtype, layout, tile, K):
    forgotten.setattr(ops, "quantize_nvfp4_tile", lambda *_: tile)
    x = activations(rng, 3, K, dtype)
    x[1, ::97] = np.inf
    x[2, 16:32] = 0
    same(device, quantize_nvfp4(device.array(x), scale_layout=layout), reference.quantize_nvfp4(x, layout))


@pytest.mark.parametrize("tile", [FewTile(128, 8, 4), FewTile(128, 16, 2)], ids=str)
@pytest.mark.parametrize("M", [1, 2, 31, 32, 33, 64, 127, 128, 130])
def test_few_rows_zero_the_padding(device, rng, forgotten, tile, M):
    """Every byte of the 128x4 layout is written: rows past M in their 16 B groups, and columns past K / 16."""
    forgotten.setattr(ops, "quantize_nvfp4_tile", lambda *_: tile)
    K = 16 * 14
    x = activations(rng, M, K, BF16)
    out = (
        device.array(np.full((M, K // 2), 0xA5, np.uint8)),
        device.array(np.full(formats.scale_bytes_128x4(M, K // 16), 0xA5, np.uint8)),
        device.array(np.full(M, np.nan, np.float32)),
    )
    quantize_nvfp4(device.array(x), scale_layout="128x4", out=out)
    same(device, out, reference.quantize_nvfp4(x, "128x4"))


def test_tiles_cover_every_row():
    shapes = [(M, K, tiled) for M in (1, 33, 64, 65, 300) for K in range(16, 32769, 16) for tiled in (False, True)]
    for M, K, tiled in shapes:
        tile = ops.quantize_nvfp4_tile(M, K)
        assert tile.threads * (tile.items * 16 if isinstance(tile, Tile) else tile.values * tile.parts) >= K
        assert any(tile.instance(BF16, tiled) == instance.name for instance in ops.INSTANCES)


@both_dtypes
@both_layouts
@pytest.mark.parametrize("items", [1, 4])
@pytest.mark.parametrize(("M", "K"), [(1, 64), (3, 2080), (2, 9248), (131, 96)])
def test_every_strip(device, rng, forgotten, dtype, layout, items, M, K):
    forgotten.setattr(ops, "strip_items", lambda _: items)
    x = activations(rng, M, K, dtype)
    same(device, quantize_mxfp4(device.array(x), scale_layout=layout), reference.quantize_mxfp4(x, layout))
    want = reference.quantize_nvfp4_tensor(x, layout)
    same(device, quantize_nvfp4_tensor(device.array(x), scale_layout=layout), want)
    g = np.exp(rng.uniform(-6, 2, M)).astype(np.float32)
    *want, count = reference.quantize_nvfp4_given(x, g, layout)
    got, saturated = given(device, x, g, layout)
    same(device, got, want)
    assert saturated == count


@pytest.mark.parametrize("g", [1 - 2.0**-24, 2 - 2.0**-23, (1 - 2.0**-24) / 8])
def test_divisors_of_all_ones(device, g):
    """x / (sf * g) = T (1 + 2^-24 + ..): the double-width reciprocal would round to the tie T."""
    x = np.zeros((4, 32), np.float32)
    x[:, 0] = x[:, 16] = 6
    x[:, 1:16] = np.ldexp(1.0, np.arange(-12, 3))
    x[:, 17:32] = 1.5 * np.ldexp(1.0, np.arange(-12, 3))
    x *= np.array([[1], [-1], [2.0**-3], [2.0**5]], np.float32)
    x = x.astype(BF16)
    *want, _ = reference.quantize_nvfp4_given(x, np.array([g], np.float32))
    same(device, given(device, x, np.array([g], np.float32))[0], want)


def launches(device, x, layout, pdl):
    """{name: outputs} of every launcher, each into arrays of its own, poisoned."""
    M, K = x.shape

    def poisoned(*shape):
        return device.array(np.full(shape, 0xA5, np.uint8))

    def scales(group):
        return poisoned(formats.scale_bytes_128x4(M, K // group)) if layout == "128x4" else poisoned(M, K // group)

    def floats(*shape):
        return device.array(np.full(shape, np.nan, np.float32))

    options = {"scale_layout": layout, "pdl": pdl}
    row = (poisoned(M, K // 2), scales(16), floats(M))
    tensor = (poisoned(M, K // 2), scales(16), floats(1))
    fixed = (poisoned(M, K // 2), scales(16))
    micro = (poisoned(M, K // 2), scales(32))
    back, micro_back = floats(M, K), floats(M, K)
    workspace, saturated = floats(nvfp4_partials(M, K)), device.array(np.zeros(1, np.int32))

    def run(stream=None):
        quantize_nvfp4(x, out=row, stream=stream, **options)
        quantize_nvfp4_tensor(x, workspace=workspace, out=tensor, stream=stream, **options)
        quantize_nvfp4_given(x, row[2], saturated, out=fixed, stream=stream, **options)  # g of the launch before
        quantize_mxfp4(x, out=micro, stream=stream, **options)
        dequantize_nvfp4(*row, dtype="float32", out=back, stream=stream, **options)
        dequantize_mxfp4(*micro, dtype="float32", out=micro_back, stream=stream, **options)

    return run, {
        "row": row,
        "tensor": tensor,
        "given": (*fixed, saturated),
        "micro": micro,
        "back": (back,),
        "micro_back": (micro_back,),
    }


def check(device, x, layout, results):
    row, micro = reference.quantize_nvfp4(x), reference.quantize_mxfp4(x)
    laid = reference.scales(row[1], layout)
    same(device, results["row"], (row[0], laid, row[2]))
    same(device, results["tensor"], reference.quantize_nvfp4_tensor(x, layout))
    same(device, results["given"], (row[0], laid, np.zeros(1, np.int32)))
    same(device, results["micro"], (micro[0], reference.scales(micro[1], layout)))
    same(device, results["back"], (reference.dequantize_nvfp4(*row, "float32"),))
    same(device, results["micro_back"], (reference.dequantize_mxfp4(*micro, "float32"),))


@both_layouts
def test_programmatic_dependent_launches_wait(device, rng, layout):
    """Each reads what the launches before it write."""
    x = activations(rng, 5, 96, BF16)
    run, results = launches(device, device.array(x), layout, pdl=True)
    run()
    check(device, x, layout, results)


@pytest.mark.gpu
@both_layouts
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("M", [1, 64, 1500])
def test_captured_and_replayed_with_other_inputs(gpu, rng, layout, pdl, M):
    import cupy

    first, second = activations(rng, M, 7168, BF16), edges(rng, 7168, BF16)
    second = np.resize(np.concatenate([second, activations(rng, 64, 7168, BF16)]), (M, 7168))
    second[~np.isfinite(second.astype(np.float32))] = 3
    x = gpu.array(first)
    run, results = launches(gpu, x, layout, pdl)
    stream = cupy.cuda.Stream(non_blocking=True)
    run(stream.ptr)  # plans and compiles
    stream.synchronize()
    results["given"][2].fill(0)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        run(stream.ptr)
        graph = stream.end_capture()
    for values in (first, second):
        x[:] = gpu.array(values)
        results["given"][2].fill(0)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        check(gpu, values, layout, results)
