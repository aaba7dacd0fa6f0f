"""mma.sync, ldmatrix, stmatrix and movmatrix in CUDA C++ against NumPy."""

import numpy as np
import pytest
from programs import ARCHITECTURES, ORDERS, PRELUDE, compile_ptx, run_ptx
from tensor_programs import SIZES, bits_of, mma_source, values_of

from dsv4_rt.errors import Deadlock, KernelFault, UnsupportedInstruction

FP8 = ("e4m3", "e5m2")
FORMS = [
    *(((16, 8, k), d, "f16", "f16") for k in (8, 16) for d in ("f16", "f32")),
    *(((16, 8, k), "f32", "bf16", "bf16") for k in (8, 16)),
    *(((16, 8, k), "f32", "tf32", "tf32") for k in (4, 8)),
    *(((16, 8, k), d, a, b) for k in (16, 32) for d in ("f16", "f32") for a in FP8 for b in FP8),
    *(((m, 8, k), "s32", a, b) for m, k in ((8, 16), (16, 16), (16, 32)) for a in ("s8", "u8") for b in ("s8", "u8")),
    *((shape, "f64", "f64", "f64") for shape in ((8, 8, 4), (16, 8, 4), (16, 8, 8), (16, 8, 16))),
]  # fmt: skip


def run(source, *args, arch="sm_90a", grid=1, block=32, **options):
    return run_ptx(compile_ptx(PRELUDE + source, arch), "k", grid, block, *args, arch=arch, **options)


def multiply(form, a, b, c, arch="sm_90a", extra=""):
    shape, d, ta, tb = form
    out = np.full_like(c, 0xA5)
    run(mma_source(shape, d, ta, tb, extra), a, b, c, out, arch=arch, grid=len(a))
    return out


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "m{}n{}k{}".format(*f[0]) + f" {f[1]} {f[2]} {f[3]}")
def test_small_integers_are_exact(rng, form, arch):
    (m, n, k), d, ta, tb = form
    low = 0 if "u8" in (ta, tb) else -4
    a, b = rng.integers(low, 5, (3, m, k)), rng.integers(low, 5, (3, n, k))
    c = rng.integers(-50, 51, (3, m, n))
    got = multiply(form, bits_of(ta, a), bits_of(tb, b), bits_of(d, c), arch)
    assert np.array_equal(values_of(d, got), a @ b.swapaxes(1, 2) + c)


@pytest.mark.parametrize(("ta", "k"), [("f16", 16), ("bf16", 16), ("tf32", 8)])
def test_random_values_are_within_the_derived_bound(rng, ta, k):
    # Each of the k products and the accumulator is cut below 2^(e-25), 2^e at most the largest of them, and the sum
    # below 23 bits of mantissa: (k + 1) 2^-25 of the largest addend and 2^-23 of the result.
    form = ((16, 8, k), "f32", ta, ta)
    a, b = (rng.standard_normal((4, rows, k)) * np.exp2(rng.integers(-6, 6, (4, rows, k))) for rows in (16, 8))
    c = rng.standard_normal((4, 16, 8)).astype(np.float32)
    bits = [bits_of(ta, x) for x in (a, b)]
    if ta == "f16":
        a, b = (x.view(np.float16).astype(np.float64) for x in bits)
    else:
        words = [x.astype(np.uint32) << 16 if ta == "bf16" else x >> 13 << 13 for x in bits]
        a, b = (x.view(np.float32).astype(np.float64) for x in words)
    products = a[:, :, None] * b[:, None]
    want = products.sum(axis=-1) + c
    largest = np.maximum(np.abs(products).max(axis=-1), np.abs(c))
    got = values_of("f32", multiply(form, *bits, c.view(np.uint32)))
    assert (np.abs(got - want) <= (k + 1) * 2.0**-25 * largest + 2.0**-23 * np.abs(want)).all()
    assert (got != want.astype(np.float32)).any()  # it truncates: correct rounding would be the wrong model


SPECIALS = {
    "infinity": ([np.inf, 1], [2, 1], 0, 0x7F800000),
    "infinity times zero": ([np.inf], [0], 0, 0x7FFFFFFF),
    "infinity minus infinity": ([np.inf, np.inf], [1, -1], 0, 0x7FFFFFFF),
    "infinite accumulator": ([1], [1], -np.inf, 0xFF800000),
    "NaN": ([np.nan], [1], 0, 0x7FFFFFFF),
    "negative zeros": ([-0.0] * 16, [1.0] * 16, -0.0, 0),
    "subnormal factor": ([2.0**-24], [1], 0, 0x33800000),
    "subnormal accumulator": ([0], [1], 2.0**-149, 1),
    "two bits beyond the last still count": ([1, 2.0**-12], [1, -(2.0**-13)], 0, 0x3F7FFFFF),
    "less than that is nothing": ([1, 2.0**-12], [1, -(2.0**-13) * 0.9990234375], 0, 0x3F800000),
    "and many times nothing is nothing": ([1] + [2.0**-13] * 15, [1] + [-(2.0**-13)] * 15, 0, 0x3F800000),
}


@pytest.mark.parametrize("case", SPECIALS)
def test_edges(case):
    left, right, start, want = SPECIALS[case]
    a, b, c = np.zeros((1, 16, 16)), np.zeros((1, 8, 16)), np.zeros((1, 16, 8), np.float32)
    a[0, 3, : len(left)], b[0, 5, : len(right)], c[0, 3, 5] = left, right, start
    got = multiply(((16, 8, 16), "f32", "f16", "f16"), bits_of("f16", a), bits_of("f16", b), c.view(np.uint32))
    assert int(got[0, 3, 5]) == want


def test_overflow_of_each_accumulator():
    a, b = np.full((1, 16, 16), 60000.0), np.full((1, 8, 16), -60000.0)
    for d, want in (("f16", 0xFC00), ("f32", int(np.float32(-16 * 60000.0**2).view(np.uint32)))):
        zero = np.zeros((1, 16, 8), np.uint16 if d == "f16" else np.uint32)
        got = multiply(((16, 8, 16), d, "f16", "f16"), bits_of("f16", a), bits_of("f16", b), zero)
        assert (got == want).all()


@pytest.mark.parametrize("a", ["s8", "u8"])
def test_integers_wrap_or_saturate(a):
    left, right = np.full((1, 16, 32), 127), np.full((1, 8, 32), 127)
    c = np.full((1, 16, 8), 2**31 - 1000)
    form = ((16, 8, 32), "s32", a, a)
    bits = bits_of(a, left), bits_of(a, right), bits_of("s32", c)
    exact = 2**31 - 1000 + 32 * 127 * 127
    assert (values_of("s32", multiply(form, *bits)) == exact - 2**32).all()
    assert (values_of("s32", multiply(form, *bits, extra=".satfinite")) == 2**31 - 1).all()


def test_what_is_not_modelled_is_refused():
    text = """.version 8.7\n.target sm_90a\n.address_size 64\n.entry k(.param .u64 x) { .reg .b32 a, b, c, d;
        NAME {a, b, c, d}, {a, b, c, d}, {a, b}, {a, b, c, d}; ret; }"""
    for name in (
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.bf16.f32",
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32", "mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16",
    ):  # fmt: skip
        with pytest.raises(UnsupportedInstruction, match=name.replace(".", r"\.") + " is not implemented"):
            run_ptx(text.replace("NAME", name), "k", 1, 32, np.zeros(4, np.uint32))
    name = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32"
    with pytest.raises(UnsupportedInstruction, match=r"mma\.sp::ordered_metadata.* is not implemented"):
        run_ptx(text.replace("NAME", name), "k", 1, 32, np.zeros(4, np.uint32))


# ldmatrix, stmatrix, movmatrix.

MATRIX = """
extern "C" __global__ void k(const uint4* x, const u32* rows, u32* y) {
    __shared__ alignas(16) uint4 tile[4][64];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = lane; i < 64; i += 32) tile[warp][i] = x[(blockIdx.x * blockDim.x / 32 + warp) * 64 + i];
    SYNC
    u32 at = (u32)__cvta_generic_to_shared(&tile[warp][rows[lane]]), r[4] = {};
    asm volatile("ldmatrix.sync.aligned.NAME.b16 OUT, [%4];"
        : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]) : "r"(at) : "memory");
    for (int i = 0; i < COUNT; ++i) y[(blockIdx.x * blockDim.x + threadIdx.x) * COUNT + i] = r[i];
}
"""


def matrix(name, sync="__syncwarp();"):
    count = int(name[name.index("x") + 1])
    out = "{" + ",".join(f"%{i}" for i in range(count)) + "}"
    return MATRIX.replace("NAME", name).replace("OUT", out).replace("COUNT", str(count)).replace("SYNC", sync)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("order", ["m8n8.x{}{}.shared", "x{}.m8n8{}.shared"], ids=["shape first", "count first"])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(rng, count, trans, order, arch):
    name = order.format(count, trans)
    x = rng.integers(0, 1 << 16, (2, 4, 64, 8)).astype(np.uint16)
    rows = rng.permutation(64)[:32].astype(np.uint32)
    y = np.full((2, 4, 32, count), 0xA5A5A5A5, np.uint32)
    run(matrix(name), x, rows, y, grid=2, block=128, arch=arch)
    matrices = x[:, :, rows[: 8 * count]].reshape(2, 4, count, 8, 8)
    if trans:
        matrices = matrices.swapaxes(-1, -2)
    want = np.ascontiguousarray(matrices).reshape(2, 4, count, 32, 2).transpose(0, 1, 3, 2, 4)
    assert np.array_equal(y.view(np.uint16).reshape(want.shape), want)


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_and_back(rng, count, trans, generic):
    regs = ",".join(f"%{i + 1}" for i in range(count))
    space, where, c = (("", "(u64)", "l")) if generic else (".shared", "(u32)__cvta_generic_to_shared", "r")
    ins = ", ".join(f'"r"(x[threadIdx.x * {count} + {i}])' for i in range(count))
    source = f"""extern "C" __global__ void k(const u32* x, uint4* y) {{
        __shared__ alignas(16) uint4 tile[32];
        asm volatile("stmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 [%0], {{{regs}}};"
            :: "{c}"({where}(&tile[threadIdx.x ^ 5])), {ins} : "memory");
        __syncwarp();
        if (threadIdx.x < {8 * count}) y[threadIdx.x] = tile[threadIdx.x ^ 5];
    }}"""
    x = rng.integers(0, 1 << 16, (32, count, 2)).astype(np.uint16)
    y = np.zeros((count, 8, 8), np.uint16)
    run(source, x, y)
    want = x.transpose(1, 0, 2).reshape(count, 8, 8)
    assert np.array_equal(y, want.swapaxes(1, 2) if trans else want)


def test_movmatrix(rng):
    source = """extern "C" __global__ void k(u32* x) {
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x[threadIdx.x])); }"""
    x = rng.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    want = x.swapaxes(1, 2).copy()
    run(source, x, block=128)
    assert np.array_equal(x, want)


@pytest.mark.parametrize("order", ORDERS)
def test_a_branch_around_whole_warps(rng, order):
    source = """extern "C" __global__ void k(u32* x) {
        if (threadIdx.x / 32 % 2) asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x[threadIdx.x]));
        else x[threadIdx.x] += 1;
    }"""
    x = rng.integers(0, 1 << 15, (4, 8, 8)).astype(np.uint16)
    want = x.swapaxes(1, 2).copy()
    want[::2] = (x[::2].copy().view(np.uint32) + 1).view(np.uint16)
    run(source, x, block=128, order=order)
    assert np.array_equal(x, want)


# What is wrong is said.

ARGS = (np.zeros((1, 1, 64, 8), np.uint16), np.arange(32, dtype=np.uint32)[::-1].copy(), np.zeros((32, 4), np.uint32))


def test_a_load_of_matrices_is_a_shared_access():
    with pytest.raises(KernelFault, match=r"RAW race on shared memory(.|\n)*program.cu:8(.|\n)*ldmatrix"):
        run(matrix("m8n8.x4.shared", sync=""), *ARGS)
    with pytest.raises(KernelFault, match=r"uninitialised shared memory(.|\n)*ldmatrix"):
        run(matrix("m8n8.x4.shared").replace("i < 64", "i < 31"), *ARGS)
    with pytest.raises(KernelFault, match=r"misaligned 16-byte shared read(.|\n)*thread \(9, 0, 0\)(.|\n)*ldmatrix"):
        run(matrix("m8n8.x4.shared").replace("rows[lane]])", "rows[lane]]) + (lane == 9) * 8"), *ARGS)
    with pytest.raises(KernelFault, match=r"out of bounds(.|\n)*thread \(3, 0, 0\)(.|\n)*ldmatrix"):
        run(matrix("m8n8.x1.shared").replace("rows[lane]]", "rows[lane] + (lane == 3) * 1000]"), *ARGS)


def test_addresses_that_do_not_count_may_be_anything():
    run(matrix("m8n8.x1.shared").replace("rows[lane]]", "rows[lane] + (lane > 7) * 1000]"), *ARGS)


def test_half_a_warp_waits_for_the_other():
    source = """extern "C" __global__ void k(u32* x) {
        u32 v = x[threadIdx.x];
        if (threadIdx.x < 16) asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(v));
        __syncthreads(); x[threadIdx.x] = v; }"""
    with pytest.raises(Deadlock, match=r"names lanes that are elsewhere: 0xffff0000"):
        run(source, np.zeros(32, np.uint32))


def test_a_warp_of_fewer_threads_cannot():
    source = """extern "C" __global__ void k(u32* x) {
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(x[threadIdx.x])); }"""
    with pytest.raises(KernelFault, match=r"movmatrix\S* needs all 32 threads of the warp; 8 are here"):
        run(source, np.zeros(40, np.uint32), block=40)


def test_sizes_of_the_formats_are_those_of_the_emulator():
    from dsv4_rt.emulator.mma import BYTES

    assert BYTES == SIZES
