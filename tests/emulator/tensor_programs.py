"""CUDA C++ around the tensor-core instructions, and the NumPy side of it, for test_mma.py and test_wgmma.py.

The layouts are written down a second time here, as the PTX ISA's formulas in CUDA and as reshapes in NumPy, so that a
mistake in the emulator's tables does not repeat itself.
"""

from __future__ import annotations

import numpy as np

SIZES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "f32": 4, "s32": 4, "f64": 8}


def bits_of(ty: str, x: np.ndarray) -> np.ndarray:
    """Small numbers, exact in every format, as the type's bits."""
    if ty in ("s8", "u8"):
        return x.astype(np.int8).view(np.uint8)
    if ty == "s32":
        return x.astype(np.int32).view(np.uint32)
    if ty == "f64":
        return x.astype(np.float64).view(np.uint64)
    if ty == "f16":
        return x.astype(np.float16).view(np.uint16)
    word = x.astype(np.float32).view(np.uint32)
    if ty == "bf16":
        return (word >> 16).astype(np.uint16)
    if ty in ("e4m3", "e5m2"):
        # By way of f16, whose exponent e5m2 shares and e4m3 has with a bias of 7 instead of 15; |x| is 0 or >= 2^-6.
        half = x.astype(np.float16).view(np.uint16)
        magnitude = half & 0x7FFF
        narrow = magnitude >> 8 if ty == "e5m2" else np.where(magnitude == 0, 0, (magnitude >> 7) - (8 << 3))
        return (narrow | (half >> 8 & 0x80)).astype(np.uint8)
    return word


def values_of(ty: str, bits: np.ndarray) -> np.ndarray:
    """Results as numbers."""
    return bits.view({"f16": np.float16, "f32": np.float32, "s32": np.int32, "f64": np.float64}[ty])


def constraint(ty: str) -> str:
    return "l" if ty == "f64" else "r"


def mma_source(shape: tuple[int, int, int], d: str, a: str, b: str, extra: str = "") -> str:
    """A kernel of one warp: D = A B + C, A and C row by row, B column by column, as words of each type's width."""
    m, n, k = shape
    kinds = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
    word = "u64" if d == "f64" else "u32"
    width = 8 if d == "f64" else 4
    counts = [m * n * SIZES[d] // 32 // width, m * k * SIZES[a] // 32 // width, n * k * SIZES[b] // 32 // width]
    names = iter(range(100))
    lists = ["{" + ", ".join(f"%{next(names)}" for _ in range(c)) + "}" for c in (*counts, counts[0])]
    c = constraint(d)
    sources = zip("ABC", (counts[1], counts[2], counts[0]), strict=True)
    operands = [", ".join(f'"{c}"({x}[{i}])' for i in range(count)) for x, count in sources]
    ta, tb, td = (kinds[SIZES[ty]] for ty in (a, b, d))
    outs = ", ".join(f'"={c}"(D[{i}])' for i in range(counts[0]))
    name = f"mma.sync.aligned.m{m}n{n}k{k}.row.col{extra}.{d}.{a}.{b}.{d}"
    return f"""
extern "C" __global__ void k(const {ta}* a, const {tb}* b, const {td}* c, {td}* d) {{
    constexpr int M = {m}, N = {n}, K = {k}, PA = {width // SIZES[a]}, PD = {width // SIZES[d]};
    a += blockIdx.x * M * K; b += blockIdx.x * N * K; c += blockIdx.x * M * N; d += blockIdx.x * M * N;
    int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    {word} A[{counts[1]}] = {{}}, B[{counts[2]}] = {{}}, C[{counts[0]}] = {{}}, D[{counts[0]}];
    for (int i = 0; i < {counts[1]} * PA; ++i) {{
        int r = i / PA, row = M == 8 ? g : g + 8 * (r % 2), col = t * PA + i % PA + 4 * PA * (M == 8 ? r : r / 2);
        A[r] |= ({word})a[row * K + col] << (8 * sizeof(*a) * (i % PA)) % {8 * width};
    }}
    for (int i = 0; i < {counts[2]} * PA; ++i)
        B[i / PA] |= ({word})b[g * K + t * PA + i % PA + i / PA * 4 * PA] << (8 * sizeof(*b) * (i % PA)) % {8 * width};
    for (int i = 0; i < {counts[0]} * PD; ++i)
        C[i / PD] |= ({word})c[(g + 8 * (i / 2)) * N + 2 * t + i % 2] << (8 * sizeof(*c) * (i % PD)) % {8 * width};
    asm volatile("{name} {', '.join(lists)};" : {outs} : {', '.join(operands)});
    for (int i = 0; i < {counts[0]} * PD; ++i)
        d[(g + 8 * (i / 2)) * N + 2 * t + i % 2] = D[i / PD] >> (8 * sizeof(*d) * (i % PD)) % {8 * width};
}}
"""


# wgmma.

WGMMA_HELPERS = """
__device__ __forceinline__ void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wg_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}
__device__ __forceinline__ u64 matrix(const void* p, u64 rest) {
    return rest | ((u32)__cvta_generic_to_shared(p) & 0x3FFFF) >> 4;
}
"""


def wgmma_function(
    n: int, d: str, a: str, b: str, *, registers: bool = False, scale: tuple[int, int] = (1, 1),
    majors: tuple[int, int] = (0, 0), name: str = "wgmma",
) -> str:  # fmt: skip
    """`wgmma(d, a, b, accumulate)`: a is a descriptor or four registers."""
    count = n // (4 if d == "f16" else 2)
    kind, c = ("u32", "r") if d == "f16" else ("float", "f")
    lists = ", ".join(f"%{i}" for i in range(count))
    left = ("{" + ", ".join(f"%{count + i}" for i in range(4)) + "}") if registers else f"%{count}"
    at = count + (4 if registers else 1)
    tail = f"{scale[0]}, {scale[1]}"
    if SIZES[a] == 2:
        tail += f", {majors[1]}" if registers else f", {majors[0]}, {majors[1]}"
    outs = ", ".join(f'"+{c}"(d[{i}])' for i in range(count))
    ins = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    parameter = "const u32 (&a)[4]" if registers else "u64 a"
    return f"""
__device__ __forceinline__ void {name}({kind} (&d)[{count}], {parameter}, u64 b, u32 accumulate) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{at + 1}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{n}k{32 // SIZES[a]}.{d}.{a}.{b} {{{lists}}}, {left}, %{at}, p, {tail};\\n}}"
        : {outs} : {ins}, "l"(b), "r"(accumulate));
}}
"""


def descriptor(leading: int, stride: int, swizzle: int) -> np.uint64:
    """Everything but the start."""
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return np.uint64(leading >> 4 << 16 | stride >> 4 << 32 | mode << 62)


def image_k_major(x: np.ndarray, swizzle: int) -> np.ndarray:
    """[rows, k] elements as a shared-memory image of K-major tiles: atoms of 8 rows x 16 bytes, or of 8 rows x swizzle.

    Atoms of one k slice lie one after the other, row group by row group; a pattern starts at each atom.
    """
    rows, k = x.shape
    wide = (swizzle or 16) // x.itemsize
    atoms = x.reshape(rows // 8, 8, k // wide, wide).transpose(2, 0, 1, 3)  # [k slice, row group, row, element]
    return np.ascontiguousarray(atoms).view(np.uint8).reshape(-1)[_order(atoms.nbytes, swizzle)]


def image_mn_major(x: np.ndarray, swizzle: int) -> np.ndarray:
    """[rows, k] as MN-major tiles: atoms of 8 k x 16 bytes of rows, or x swizzle; row groups one after the other."""
    rows, k = x.shape
    wide = (swizzle or 16) // x.itemsize
    atoms = x.T.reshape(k // 8, 8, rows // wide, wide).transpose(0, 2, 1, 3)  # [k group, row group, k, element]
    return np.ascontiguousarray(atoms).view(np.uint8).reshape(-1)[_order(atoms.nbytes, swizzle)]


def _order(nbytes: int, swizzle: int) -> np.ndarray:
    """Where each byte of an image comes from: of every 128 bytes, the 16-byte chunks permuted by the row's number."""
    at = np.arange(nbytes)
    chunk, row = at // 16 % 8, at // 128 % 8
    mask = max((swizzle or 16) // 16 - 1, 0)
    picks = chunk ^ (row & mask)
    return at // 128 * 128 + picks * 16 + at % 16


def fragments(d: np.ndarray, n: int) -> np.ndarray:
    """Results of a warpgroup, [128, n/2] thread by thread, as a matrix [64, n]."""
    found = np.empty((64, n), d.dtype)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for i in range(n // 2):
            found[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = d[thread, i]
    return found
