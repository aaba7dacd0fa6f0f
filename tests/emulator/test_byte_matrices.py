"""ldmatrix and stmatrix of bytes and of packed 6- and 4-bit elements, sm_100a, against NumPy; unjudged by a GPU."""

import numpy as np
import pytest
from programs import PRELUDE, compile_ptx, run_ptx

from dsv4_rt.errors import KernelFault, UnsupportedInstruction

LOAD = """
extern "C" __global__ void k(const uint4* x, const u32* rows, u32* y) {
    __shared__ alignas(16) uint4 tile[4][64];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = lane; i < 64; i += 32) FILL;
    __syncwarp();
    u32 at = (u32)__cvta_generic_to_shared(&tile[warp][rows[lane]]) ADD, r[4] = {};
    asm volatile("NAME OUT, [%4];" : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3]) : "r"(at) : "memory");
    for (int i = 0; i < COUNT; ++i) y[(blockIdx.x * blockDim.x + threadIdx.x) * COUNT + i] = r[i];
}
"""
FILL = "tile[warp][i] = x[(blockIdx.x * 4 + warp) * 64 + i]"
PACKED = {"b8": 8, "b8x16.b6x16_p32": 6, "b8x16.b4x16_p64": 4}
FORMS = [
    *(("m16n16", count, fmt) for count in (1, 2) for fmt in PACKED),
    *(("m8n16", count, fmt) for count in (1, 2, 4) for fmt in PACKED if fmt != "b8"),
]  # fmt: skip
everyone = pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f[0]}.x{f[1]}.{f[2]}")


def name_of(form):
    shape, count, fmt = form
    return f"ldmatrix.sync.aligned.{shape}.x{count}{'.trans' if shape == 'm16n16' else ''}.shared.{fmt}"


def source_of(form, fill=FILL, add=""):
    count = form[1] * (2 if form[0] == "m16n16" else 1)
    out = "{" + ",".join(f"%{i}" for i in range(count)) + "}"
    text = LOAD.replace("NAME", name_of(form)).replace("OUT", out).replace("COUNT", str(count))
    return text.replace("FILL", fill).replace("ADD", add)


def run(source, *args, arch="sm_100a", grid=2, block=128):
    return run_ptx(compile_ptx(PRELUDE + source, arch), "k", grid, block, *args, arch=arch)


def packed(elements, bits):
    """[..., 16] small numbers as rows of 16 bytes: a string of bits, the first element lowest, and padding of ones."""
    ones = np.unpackbits(elements[..., None], axis=-1, bitorder="little")[..., :bits].reshape(*elements.shape[:-1], -1)
    room = np.ones((*elements.shape[:-1], 128), np.uint8)
    room[..., : 16 * bits] = ones
    return np.packbits(room, axis=-1, bitorder="little")


def inputs(rng, form):
    bits = PACKED[form[2]]
    elements = rng.integers(0, 1 << bits, (2, 4, 64, 16)).astype(np.uint8)
    registers = form[1] * (2 if form[0] == "m16n16" else 1)
    return elements, packed(elements, bits), np.full((2, 4, 32, registers), 0xA5A5A5A5, np.uint32)


@everyone
def test_loads(rng, form):
    shape, count, _ = form
    elements, x, y = inputs(rng, form)
    rows = rng.permutation(64)[:32].astype(np.uint32)
    run(source_of(form), x, rows, y)
    got = y.view(np.uint8).reshape(2, 4, 32, -1, 4)
    height = 16 if shape == "m16n16" else 8
    for lane in range(32):
        for i in range(count):
            matrix = elements[:, :, rows[height * i : height * (i + 1)]]
            columns = slice(4 * (lane % 4), 4 * (lane % 4) + 4)
            if shape == "m8n16":
                assert np.array_equal(got[:, :, lane, i], matrix[:, :, lane // 4, columns])
            for upper in range(height // 8 if shape == "m16n16" else 0):
                want = matrix[:, :, columns, lane // 4 + 8 * upper]
                assert np.array_equal(got[:, :, lane, 2 * i + upper], want)


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stores(rng, count, arch):
    values = ", ".join(f'"r"(x[threadIdx.x * {count} + {i}])' for i in range(count))
    registers = ",".join(f"%{i + 1}" for i in range(count))
    source = f"""extern "C" __global__ void k(const u32* x, uint4* y) {{
        __shared__ alignas(16) uint4 tile[32];
        asm volatile("stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%0], {{{registers}}};"
            :: "r"((u32)__cvta_generic_to_shared(&tile[threadIdx.x ^ 5])), {values} : "memory");
        __syncwarp();
        if (threadIdx.x < {8 * count}) y[threadIdx.x] = tile[threadIdx.x ^ 5];
    }}"""
    x, y = rng.integers(0, 256, (32, count, 4)).astype(np.uint8), np.full((count, 8, 16), 0xA5, np.uint8)
    run(source, x, y, arch=arch, grid=1, block=32)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        want = x[lane].reshape(count, 2, 2)  # elements (row, column), (row, column + 1), then those 8 rows on
        assert np.array_equal(y[:, column : column + 2, row], want[:, 0])
        assert np.array_equal(y[:, column : column + 2, row + 8], want[:, 1])


@everyone
def test_padding_need_not_be_written(rng, form):
    words = {8: 4, 6: 3, 4: 2}[PACKED[form[2]]]
    fill = f"for (int j = 0; j < N; ++j) ((u32*)&tile[warp][i])[j] = ((const u32*)&{FILL.split('= ')[1]})[j]"
    _, x, y = inputs(rng, form)
    rows = np.arange(32, dtype=np.uint32)
    run(source_of(form, fill.replace("N", str(words))), x, rows, y)
    with pytest.raises(KernelFault, match=r"uninitialised shared memory(.|\n)*ldmatrix"):
        run(source_of(form, fill.replace("N", str(words - 1))), x, rows, y)


@everyone
def test_rows_are_16_byte_aligned(rng, form):
    _, x, y = inputs(rng, form)
    with pytest.raises(KernelFault, match=r"misaligned 16-byte shared read(.|\n)*thread \(5, 0, 0\)(.|\n)*ldmatrix"):
        run(source_of(form, add="+ (lane == 5) * 8"), x, np.arange(32, dtype=np.uint32), y)


HEAD = """.version 8.7\n.target ARCH\n.address_size 64\n.entry k(.param .u64 x) { .reg .b32 a, b, c, d, s;
    .shared .align 16 .b8 m[512]; NAME; ret; }"""
WRONG = {
    "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {a, b, c, d}, [m]": "x4",
    "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {a, b}, [m]": "m16n16",
    "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {a}, [m]": "m16n16",
    "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {a}, [m]": "m8n16",
    "ldmatrix.sync.aligned.m8n16.x1.trans.shared.b8x16.b4x16_p64 {a}, [m]": "m8n16",
    "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16 {a}, [m]": "m8n16",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b8 {a}, [m]": "b8",
    "stmatrix.sync.aligned.m16n8.x1.shared.b8 [m], {a}": "m16n8",
    "stmatrix.sync.aligned.m16n16.x1.trans.shared.b8 [m], {a, b}": "m16n16",
}


@pytest.mark.parametrize("form", WRONG)
def test_forms_that_do_not_exist_are_refused(form):
    with pytest.raises(UnsupportedInstruction, match=WRONG[form] + r"\S* .*is not implemented"):
        run_ptx(HEAD.replace("ARCH", "sm_100a").replace("NAME", form), "k", 1, 32, np.zeros(1, np.uint64))


@pytest.mark.parametrize("form", [name_of(FORMS[0]) + " {a, b}, [m]", name_of(FORMS[-1]) + " {a, b, c, d}, [m]"])
def test_hopper_has_none_of_them(form):
    with pytest.raises(UnsupportedInstruction, match=r"exists from sm_100a on, not on sm_90a"):
        run_ptx(HEAD.replace("ARCH", "sm_90a").replace("NAME", form), "k", 1, 32, np.zeros(1, np.uint64), arch="sm_90a")
