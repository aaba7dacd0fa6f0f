"""The kernels of scaled/, each with a run that compares it with NumPy, as blackwell_kernels.py has others."""

from pathlib import Path

import ml_dtypes
import numpy as np
from hopper_kernels import poisoned

from dsv4_rt import formats
from dsv4_rt.launch import load as load_kernel
from dsv4_rt.tensor_map import TensorMap

HERE = Path(__file__).parent
COMMON = (HERE / "scaled" / "scaled.cuh", HERE / "blackwell" / "blackwell.cuh", HERE / "hopper" / "hopper.cuh")
SOURCES = (HERE / "scaled" / "gemm_scaled.cu", *COMMON)
PAIR = (HERE / "scaled" / "gemm_pair_scaled.cu", HERE / "scaled" / "pair_scaled.cuh", HERE / "blackwell" / "pair.cuh")
# Factor -> code in the instruction descriptor, type of the tensor map.
FORMATS = {
    "e4m3": (0, None), "e5m2": (1, None), "e2m3": (3, "u6x16_p32"), "e3m2": (4, "u6x16_p32"), "e2m1": (5, "u4x16_p64"),
}  # fmt: skip
# Kind -> k that share a scale, type of the scale, k of a product, 512 B of scales a stage.
KINDS = {"F8": (0, "", 32, 0), "MXF8": (32, "ue8m0", 32, 1), "MXF4": (32, "ue8m0", 64, 2), "NVF4": (16, "ue4m3", 64, 4)}


def loader(folder, *edits, sources=SOURCES):
    """Load kernels from a copy of the sources in `folder`, in which the first of each pair (once) is the second."""
    texts = {path.name: path.read_text() for path in sources}
    for old, new in edits:
        assert sum(text.count(old) for text in texts.values()) == 1, old
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return lambda file, name: load_kernel(str(folder / file), name)


def pack6(codes):
    """[..., K] 6-bit codes -> [..., K * 3/4] bytes, packed from the lowest bit on."""
    bits = (codes[..., None] >> np.arange(6) & 1).astype(np.uint8)
    return np.packbits(bits.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def factor(rng, ty, rows, K):
    """(codes, values) of random finite numbers."""
    if ty == "e4m3":
        codes = rng.integers(0, 0x7F, (rows, K)).astype(np.uint8)
        codes |= rng.integers(0, 2, (rows, K)).astype(np.uint8) << 7
        return codes, formats.e4m3_decode(codes)
    if ty == "e5m2":
        codes = rng.integers(0x30, 0x50, (rows, K)).astype(np.uint8)
        codes |= rng.integers(0, 2, (rows, K)).astype(np.uint8) << 7
        return codes, formats.e5m2_decode(codes)
    if ty == "e2m1":
        codes = rng.integers(0, 16, (rows, K)).astype(np.uint8)
        return codes, formats.e2m1_decode(codes)
    codes = rng.integers(0, 64, (rows, K)).astype(np.uint8)
    return codes, codes.view({"e2m3": ml_dtypes.float6_e2m3fn, "e3m2": ml_dtypes.float6_e3m2fn}[ty]).astype(np.float32)


def scales(rng, ty, rows, count):
    """(codes, values)."""
    if ty == "ue8m0":
        codes = rng.integers(120, 135, (rows, count)).astype(np.uint8)
        return codes, formats.ue8m0_decode(codes)
    codes = rng.integers(0, 0x7F, (rows, count)).astype(np.uint8)
    return codes, formats.e4m3_decode(codes)


def run_gemm_scaled(
    device, load, rng, kind="NVF4", types=("e2m1", "e2m1"), M=150, N=100, K=576, tile=64, stages=3, ctas=2,
    dtype_of_b=None, sign=0,
):  # fmt: skip
    """dtype_of_b: another type of B's tensor map; sign: bits set in all scales of A."""
    vector, scale, depth, words = KINDS[kind]
    fp4 = kind in ("MXF4", "NVF4")
    maps, sf, values = [], [], []
    for rows, ty, box in ((M, types[0], 128), (N, types[1], tile)):
        codes, value = factor(rng, ty, rows, K)
        dtype = None if fp4 else FORMATS[ty][1]
        if dtype_of_b and sf:
            dtype = dtype_of_b
        data = formats.e2m1_pack(codes) if ty == "e2m1" else pack6(codes) if ty in ("e2m3", "e3m2") else codes
        maps.append(TensorMap(device.array(data), box=(box, 128), dtype=dtype, swizzle="128B"))
        value = value.astype(np.float64)
        if vector:
            codes, each = scales(rng, scale, rows, -(-K // vector))
            value *= np.repeat(each.astype(np.float64), vector, axis=1)[:, :K]
            sf.append(device.array(formats.interleave_128x4(codes | np.uint8(0 if sf else sign))))
        else:
            sf.append(device.array(np.zeros(16, np.uint8)))
        values.append(value)
    names = [1, 1] if fp4 else [FORMATS[ty][0] for ty in types]
    kernel = load("gemm_scaled.cu", f"gemm_scaled<{kind}, {names[0]}, {names[1]}, {tile}, {stages}>")
    c = poisoned(device, M, N)
    shared = stages * ((128 + tile) * 128 + words * 1024) + 1024
    kernel.launch(ctas, 192, *maps, *sf, c, np.int32(M), np.int32(N), np.int32(K), shared=shared)
    got, want = device.numpy(c), values[0] @ values[1].T
    # Each product of `depth` is added exactly and the sum truncated to fp32 (tcgen05.py): 2^-23 of its magnitude.
    size = np.abs(values[0]) @ np.abs(values[1]).T
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= -(-K // depth) * 2.0**-23 * size).all()
    return got, want


def run_gemm_pair_scaled(device, load, rng, M=300, N=100, K=608, tile=64, stages=2, ctas=2):
    """nvfp4 by pairs of CTAs."""
    maps, scale_maps, values = [], [], []
    for rows, box in ((M, 128), (N, tile // 2)):
        codes, value = factor(rng, "e2m1", rows, K)
        maps.append(TensorMap(device.array(formats.e2m1_pack(codes)), box=(box, 128), swizzle="128B"))
        codes, each = scales(rng, "ue4m3", rows, -(-K // 16))
        packed = formats.interleave_128x4(codes).view(np.uint32).reshape(-(-rows // 128), -(-K // 64), 128)
        scale_maps.append(TensorMap(device.array(packed), box=(1, 4, 128)))
        values.append(value.astype(np.float64) * np.repeat(each.astype(np.float64), 16, axis=1)[:, :K])
    kernel = load("gemm_pair_scaled.cu", f"gemm_pair_scaled<{tile}, {stages}>")
    c = poisoned(device, M, N)
    shared = stages * ((128 + tile // 2) * 128 + 4096) + 1024
    kernel.launch(ctas, 192, *maps, *scale_maps, c, np.int32(M), np.int32(N), np.int32(K), shared=shared)
    got, want = device.numpy(c), values[0] @ values[1].T
    size = np.abs(values[0]) @ np.abs(values[1]).T  # the bound is that of run_gemm_scaled
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= -(-K // 64) * 2.0**-23 * size).all()
