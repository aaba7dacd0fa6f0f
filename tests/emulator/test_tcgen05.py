# ruff: noqa: E501  (bugs are changes of source lines, kernels are inline assembly)
"""tcgen05 and tensor memory: a GEMM and single instructions against NumPy, bugs planted in them, and what is refused."""

import re
import time

import numpy as np
import pytest
from asynchronous import all_schedules
from blackwell_kernels import loader, run_gemm_tcgen05
from hopper_kernels import compare, normal, poisoned
from programs import ORDERS, PRELUDE, compile_ptx, run_ptx
from tensor_programs import SIZES, bits_of, image_k_major, image_mn_major, values_of

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.descriptors import decode_tcgen05
from dsv4_rt.emulator.tcgen05 import decode_instruction
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault, UnsupportedInstruction
from dsv4_rt.tensor_map import TensorMap


def emulated(completion, rng, **options):
    options = {"completion": completion, "seed": int(rng.integers(1 << 30)), "check_tensor_fences": True} | options
    return dsv4_rt.use_device(EmulatedDevice("sm_100a", **options))


# The GEMM.


@pytest.mark.parametrize("tile", [(128, 64), (128, 128), (64, 48), (64, 256)])
@all_schedules
def test_gemm(tile, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_tcgen05(device, loader(tmp_path), rng, tile=tile)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order) as device:
        run_gemm_tcgen05(device, loader(tmp_path), rng)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 8), (128, 64, 64), (300, 65, 1000)])
def test_gemm_shapes(M, N, K, rng, tmp_path):
    with emulated("late", rng) as device:
        run_gemm_tcgen05(device, loader(tmp_path), rng, M=M, N=N, K=K, draw=normal)


@all_schedules
def test_a_deep_tile_is_fast(completion, rng, tmp_path):
    """128 x 128 x 7168 in bf16, every check on: under half a second of one core."""
    M, N, K = 128, 128, 7168
    with emulated(completion, rng) as device:
        a, b = normal(rng, M, K), normal(rng, N, K)
        maps = [TensorMap(device.array(x), box=(128, 64), swizzle="128B") for x in (a, b)]
        kernel, c = loader(tmp_path)("gemm_tcgen05.cu", "gemm_tcgen05<128, 128, 4>"), poisoned(device, M, N)
        seconds = []
        for _ in range(4):
            start = time.thread_time()  # of this thread: that of a matrix product on others does not count
            kernel.launch(1, 192, *maps, c, np.int32(M), np.int32(N), np.int32(K), shared=4 * 32768 + 1024)
            seconds.append(time.thread_time() - start)
        print(f"{completion}: cold {seconds[0]:.3f} s, warm {min(seconds[1:]):.3f} s")
        compare(device.numpy(c), a, b)
    assert min(seconds[1:]) < 0.5


MMA, LOAD = "tc_mma_16bit(acc, da", "tmem_load_16(r, acc"
BEFORE_LOOP = "const u32 acc = tmem_base;\n"
FENCED = """            tc_fence_after();
            for (int k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE;
                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
"""
PLANTS = {
    "accumulate over undefined TMEM": ("k + j > 0", "true", "accumulates over undefined tensor memory", MMA),
    "no wait before the load": (
        "mbarrier_wait(shared_address(&done), tile & 1);\n", "\n",
        "of undefined tensor memory|tcgen05.mma that has", LOAD),
    "the first product waited for twice": (
        "mbarrier_wait(shared_address(&done), tile & 1);\n", "mbarrier_wait(shared_address(&done), 0);\n",
        "tcgen05.mma that has|nothing orders it after the tcgen05.wait::ld|no thread can go on", ""),
    "done by a plain arrive": (
        "tc_commit(shared_address(&done))", "mbarrier_arrive(shared_address(&done))", "tcgen05.mma that has", LOAD),
    "stage freed by a plain arrive": (
        "tc_commit(shared_address(&empty[i % STAGES]))", "mbarrier_arrive(shared_address(&empty[i % STAGES]))",
        "overwrites the source of an asynchronous tcgen05.mma", "tma_load_2d"),
    "another thread commits": (
        "            tc_commit(shared_address(&done));\n        }\n    } else",
        "        }\n    } else if (warp == 5 && lane == 1) {\n"
        "        for (int t = blockIdx.x; t < tiles; t += gridDim.x) tc_commit(shared_address(&done));\n    } else",
        "of undefined tensor memory|tcgen05.mma that has|more arrivals|no thread can go on", ""),
    "no wait::ld": (
        "                tmem_wait_load();\n", "", "missing tcgen05.wait::ld", "tc_mma_16bit|tmem_dealloc"),
    "wait::ld after the arrival": (
        "                tmem_wait_load();\n", "                if (n + 16 == TN) mbarrier_arrive(shared_address(&taken));\n"
        "                tmem_wait_load();\n",
        "nothing orders it after the tcgen05.wait::ld|more arrivals|missing tcgen05.(wait::ld|fence::before)",
        "tc_mma_16bit|mbarrier_arrive"),
    "no fence behind done": (
        "(&done), tile & 1);\n            tc_fence_after();\n", "(&done), tile & 1);\n",
        "missing tcgen05.fence::after_thread_sync: tcgen05.ld.32x32b after the tcgen05.mma", LOAD),
    "no fence before taken": (
        "            tc_fence_before();\n            mbarrier_arrive", "            mbarrier_arrive",
        "missing tcgen05.fence::before_thread_sync: tcgen05.mma after the tcgen05.ld", MMA),
    "no fence behind taken": (FENCED, FENCED.replace("tc_fence_after();", ""), "missing tcgen05.fence::after_thread_sync: tcgen05.mma after the tcgen05.ld", MMA),
    "accumulator not waited for": (
        "            mbarrier_wait(shared_address(&taken), (tile & 1) ^ 1);\n", "",
        "tcgen05.mma.? of tensor memory still in use|nothing orders it after the tcgen05.wait::ld|tcgen05.mma that has|"
        "more arrivals|missing tcgen05.wait::ld|no thread can go on", ""),
    "wrong quarter": ("(warp * 32 << 16)", "((warp ^ 1) * 32 << 16)", "names TMEM lane 32; warp 0 .* lanes 0 to 31", LOAD),
    "no quarter": ("acc + (warp * 32 << 16) + n", "acc + n", "names TMEM lane 0; warp 1", LOAD),
    "no dealloc": ("if (warp == 5) tmem_dealloc(acc, COLUMNS);", "", "exits without tcgen05.dealloc", ""),
    "dealloc twice": (
        "if (warp == 5) tmem_dealloc(acc, COLUMNS);", "if (warp == 5) { tmem_dealloc(acc, COLUMNS);\n tmem_dealloc(acc, COLUMNS); }",
        "where no allocation begins; it was deallocated", "tmem_dealloc"),
    "dealloc of fewer columns": ("tmem_dealloc(acc, COLUMNS)", "tmem_dealloc(acc, COLUMNS / 2)", "64 were allocated at", "tmem_dealloc"),
    "dealloc without a barrier": (
        "    __syncthreads();\n    if (warp == 5) tmem_dealloc", "    if (warp == 5) tmem_dealloc",
        "tcgen05.dealloc touches|missing tcgen05.wait::ld|nothing orders it after|allocated none", "tmem_dealloc|tmem_load_16|tc_mma"),
    "alloc after relinquish": (
        "        tmem_relinquish();\n", "        tmem_relinquish();\n        tmem_alloc(shared_address(&tmem_base), 32);\n",
        "after this CTA gave up the permit", "tmem_alloc"),
    "more columns than there are": (
        "        tmem_relinquish();\n", "        tmem_alloc(shared_address(&tmem_base), 512);\n", "for 512 columns in a row: 64 of 512 are allocated; held: 64 columns", "tmem_alloc"),
    "columns out of range": ("shared_address(&tmem_base), COLUMNS)", "shared_address(&tmem_base), 32)", "out of bounds: tcgen05.mma of TMEM column", MMA),
    "base taken for 0": (BEFORE_LOOP, "const u32 acc = 0;\n", "out of bounds: tcgen05.mma of TMEM column 0", MMA),
    "wrong SBO": ("u64(1024 >> 4) << 32 | u64(1) << 46", "u64(512 >> 4) << 32 | u64(1) << 46", "is not what its descriptor", MMA),
    "swizzle of wgmma": ("u64(2) << 61", "u64(1) << 62 | u64(1) << 61", "does not exist|swizzle", MMA),
    "64B swizzle": ("u64(2) << 61", "u64(4) << 61", "is not what its descriptor", MMA),
    "no version bits": ("u64(1) << 46 | ", "", "bits 46-48 must be 0b001", MMA),
    "wrong K advance": ("db + 2 * j", "db + 1 * j", "is not what its descriptor|take different k", MMA),
    "wrong M in the descriptor": ("tc_bf16(TM, TN)", "tc_bf16(TM + 16, TN)", "M = 144", MMA),
    "full not waited for": (
        "                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);\n", "",
        "reads uninitialised shared|reads the destination of an asynchronous", MMA),
    "wrong full parity": (
        "i / STAGES & 1);\n                tc_fence_after", "(i / STAGES & 1) ^ 1);\n                tc_fence_after",
        "reads uninitialised shared|reads the destination of an asynchronous|no thread can go on", ""),
    "generic writes without a proxy fence": (
        "                tc_fence_after();\n                const u64 da",
        "                tc_fence_after();\n                asm volatile(\"st.shared.b32 [%0], 0;\" :: \"r\"(stage) : \"memory\");\n                const u64 da",
        "no fence.proxy.async lies between", MMA),
}  # fmt: skip


def path_line(folder, name, line):
    """The text of a source line that a report names."""
    return (folder / name).read_text().split("\n")[int(line) - 1]


@pytest.mark.parametrize("name", PLANTS)
@all_schedules
def test_planted_bug_is_reported(name, completion, rng, tmp_path):
    old, new, message, at = PLANTS[name]
    with emulated(completion, rng) as device, pytest.raises((KernelFault, Deadlock, EmulatorError)) as caught:
        run_gemm_tcgen05(device, loader(tmp_path, old, new), rng)
    text = str(caught.value)
    assert re.search(message, text), text
    assert re.search(r"CTA \(\d+, \d+, \d+\),? thread \(\d+", text)
    assert re.search(r"PTX line \d+: ", text)
    assert re.search(r"(blackwell\.cuh|hopper\.cuh|gemm_tcgen05\.cu):\d+", text)
    lines = "".join(path.read_text() for path in tmp_path.iterdir()).split("\n")
    named = [path_line(tmp_path, *found) for found in re.findall(r"(\w+\.cuh?):(\d+)", text)]
    assert set(named) <= set(lines)
    assert not at or any(part in line for part in at.split("|") for line in named), text


# Single products, of images of A and B as they lie in shared memory.

PRODUCT = """
extern "C" __global__ void __launch_bounds__(128) k(
    const uint4* a, const uint4* b, u32* d, const u32* start, u64 da, u64 db, u32 form, int step_a, int step_b, int steps)
{
    extern __shared__ __align__(1024) u8 tiles[];
    __shared__ u32 base;
    __shared__ __align__(8) u64 bar;
    uint4* left = (uint4*)tiles, *right = (uint4*)(tiles + BYTES_A);
    for (int i = threadIdx.x; i < BYTES_A / 16; i += 128) left[i] = a[i];
    for (int i = threadIdx.x; i < BYTES_B / 16; i += 128) right[i] = b[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"((u32)__cvta_generic_to_shared(&bar)));
    if (warp == 0)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 256;"
                     :: "r"((u32)__cvta_generic_to_shared(&base)) : "memory");
    __syncthreads();
    u32 at = base + (warp * 32 << 16);
    for (int n = 0; n < 256; ++n)
        asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};" :: "r"(at + n), "r"(start[threadIdx.x * 256 + n]) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        da |= (u32)__cvta_generic_to_shared(left) >> 4;
        db |= (u32)__cvta_generic_to_shared(right) >> 4;
        for (int i = 0; i < steps; ++i)
            asm volatile("tcgen05.mma.cta_group::1.kind::KIND [%0], %1, %2, %3, 1;"
                         :: "r"(base + (LANE << 16)), "l"(da + (i * step_a >> 4)), "l"(db + (i * step_b >> 4)), "r"(form) : "memory");
        asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];"
                     :: "r"((u32)__cvta_generic_to_shared(&bar)) : "memory");
    }
    asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\\n@!P bra W;\\n}"
                 :: "r"((u32)__cvta_generic_to_shared(&bar)) : "memory");
    for (int n = 0; n < 256; ++n)
        asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(d[threadIdx.x * 256 + n]) : "r"(at + n));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    __syncthreads();
    if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 256;" :: "r"(base) : "memory");
}
"""
FORMATS = {"f16": ("f16", 0), "bf16": ("f16", 1), "tf32": ("tf32", 2), "e4m3": ("f8f6f4", 0), "e5m2": ("f8f6f4", 1)}
CODES = {0: 0, 128: 2, 64: 4, 32: 6}


def layout(x, major, swizzle):
    """(image, descriptor less its start, bytes from one k slice of an instruction to the next)."""
    rows, size = len(x), x.itemsize

    def word(leading, stride):
        return np.uint64(leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | CODES[swizzle] << 61)

    if not major and not swizzle:
        return image_k_major(x, 0), word(rows * 16, 128), 2 * rows * 16
    if not major:
        return image_k_major(x, swizzle), word(0, 8 * swizzle), 32
    if not swizzle:
        return image_mn_major(x, 0), word(rows * 16, 128), 2 * rows * 16
    wide = swizzle // size
    return image_mn_major(x, swizzle), word(8 * swizzle, rows // wide * 8 * swizzle), rows * 32


CASES = [
    ("bf16", "bf16", "f32", 128, 64, (0, 0), (128, 128), 0), ("f16", "f16", "f16", 128, 32, (0, 0), (64, 32), 0),
    ("f16", "bf16", "f32", 64, 24, (0, 0), (0, 0), 16), ("bf16", "bf16", "f32", 64, 64, (1, 1), (128, 128), 0),
    ("f16", "f16", "f32", 128, 128, (1, 0), (0, 64), 0), ("tf32", "tf32", "f32", 128, 16, (0, 0), (128, 32), 0),
    ("e4m3", "e5m2", "f32", 128, 48, (0, 0), (128, 128), 0), ("e5m2", "e4m3", "f16", 64, 8, (0, 0), (64, 64), 0),
]  # fmt: skip


@pytest.mark.parametrize(("ta", "tb", "td", "m", "n", "majors", "swizzles", "lane"), CASES)
@all_schedules
def test_product(ta, tb, td, m, n, majors, swizzles, lane, completion, rng):
    """Small integers, added to integers that tcgen05.st put there; cells outside the accumulator stay."""
    depth = (max(swizzles) or 32) // SIZES[ta]
    swizzles_fit = [s for s, major in zip(swizzles, majors, strict=True) if s and not major]
    depth = min([depth, *(s // SIZES[ta] for s in swizzles_fit)])
    a, b = rng.integers(-4, 5, (m, depth)), rng.integers(-4, 5, (n, depth))
    sides = []
    for x, ty, major, swizzle in zip((a, b), (ta, tb), majors, swizzles, strict=True):
        if swizzle and not major and swizzle // SIZES[ty] > depth:  # the pattern is wider than what is used of it
            x = np.pad(x, ((0, 0), (0, swizzle // SIZES[ty] - depth)))
        sides.append(layout(bits_of(ty, x), major, swizzle))
    (left, da, step_a), (right, db, step_b) = sides
    kind, _ = FORMATS[ta]
    form = (td == "f32") << 4 | FORMATS[ta][1] << 7 | FORMATS[tb][1] << 10 | majors[0] << 15 | majors[1] << 16
    form |= n >> 3 << 17 | m >> 4 << 24
    source = PRELUDE + PRODUCT.replace("KIND", kind).replace("LANE", str(lane))
    source = source.replace("BYTES_A", str(left.nbytes)).replace("BYTES_B", str(right.nbytes))
    before = rng.integers(-100, 100, (128, 256))
    start = bits_of(td, before).astype(np.uint32)
    d = np.full((128, 256), 0xFFFFFFFF, np.uint32)
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)))
    sizes = np.uint32(form), np.int32(step_a), np.int32(step_b), np.int32(depth * SIZES[ta] // 32)
    images = [np.frombuffer(x.tobytes(), np.uint8).copy() for x in (left, right)]
    run_ptx(compile_ptx(source, "sm_100a"), "k", 1, 128, *images, d, start, da, db, *sizes, machine=machine,
            shared=left.nbytes + right.nbytes + 1024)  # fmt: skip
    rows = np.arange(128) if m == 128 else np.concatenate([32 * w + lane + np.arange(16) for w in range(4)])
    got = d[rows, :n] if td == "f32" else (d[rows, :n] & 0xFFFF).astype(np.uint16)
    np.testing.assert_array_equal(values_of(td, np.ascontiguousarray(got)), before[rows, :n] + a @ b.T)
    rest = np.ones((128, 256), bool)
    rest[rows[:, None], np.arange(n)] = False
    np.testing.assert_array_equal(d[rest], start[rest])


# ld and st.

MOVE = """
extern "C" __global__ void __launch_bounds__(128) k(const u32* x, u32* y) {
    __shared__ u32 base;
    int warp = threadIdx.x / 32;
    if (warp == 0)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 64;"
                     :: "r"((u32)__cvta_generic_to_shared(&base)) : "memory");
    __syncthreads();
    u32 at = base + (warp * 32 << 16), r[COUNT];
    for (int n = 0; n < 64; ++n)
        asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};" :: "r"(at + n), "r"(x[threadIdx.x * 64 + n]) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    asm volatile("tcgen05.ld.sync.aligned.SHAPE.b32 {REGS}, [%COUNT]SPLIT;" : OUT : "r"(at + (HALF << 16)));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    for (int i = 0; i < COUNT; ++i) y[threadIdx.x * COUNT + i] = r[i];
    for (int i = 0; i < COUNT; ++i) r[i] = ~r[i];
    asm volatile("tcgen05.st.sync.aligned.SHAPE.b32 [%COUNT]SPLIT, {REGS};" :: IN, "r"(at + (HALF << 16)) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    for (int n = 0; n < 64; ++n)
        asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(y[128 * COUNT + threadIdx.x * 64 + n]) : "r"(at + n));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    __syncthreads();
    if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 64;" :: "r"(base) : "memory");
}
"""


def cells(shape, lane, r, split):
    """(row, column) of a register, by the pictures of the ISA: quads of lanes a row, the other eight rows afterwards."""
    if shape == "32x32b":
        return lane, r
    if shape == "16x32bx2":
        return lane % 16, r + (split if lane >= 16 else 0)
    quad, inside = divmod(lane, 4)
    if shape == "16x64b":
        return quad + (8 if inside & 1 else 0), 2 * r + (inside >> 1)
    pair, word = divmod(r, 2)
    if shape == "16x128b":
        return quad + 8 * word, 4 * pair + inside
    return quad + 8 * (pair % 2), 8 * (pair // 2) + 2 * inside + word


@pytest.mark.parametrize("half", [0, 16])
@pytest.mark.parametrize(
    ("shape", "repeat", "count"),
    [("32x32b", 8, 8), ("16x64b", 4, 4), ("16x128b", 4, 8), ("16x256b", 4, 16), ("16x32bx2", 16, 16)],
)
def test_load_and_store(shape, repeat, count, half, rng):
    half = 0 if shape == "32x32b" else half
    split = 16 if shape == "16x32bx2" else 0
    text = MOVE.replace("SHAPE", f"{shape}.x{repeat}").replace("HALF", str(half))
    text = text.replace("REGS", ", ".join(f"%{i}" for i in range(count))).replace("SPLIT", f", {split}" if split else "")
    text = text.replace("OUT", ", ".join(f'"=r"(r[{i}])' for i in range(count)))
    text = text.replace("IN", ", ".join(f'"r"(r[{i}])' for i in range(count))).replace("COUNT", str(count))
    x = rng.integers(0, 1 << 32, (128, 64), dtype=np.uint32)
    y = np.zeros(128 * count + 128 * 64, np.uint32)
    run_ptx(compile_ptx(PRELUDE + text, "sm_100a"), "k", 1, 128, x, y)
    got, after = y[: 128 * count].reshape(128, count), y[128 * count :].reshape(128, 64)
    want = x.copy()
    for thread in range(128):
        for r in range(count):
            row, column = cells(shape, thread % 32, r, split)
            row += thread // 32 * 32 + half
            assert got[thread, r] == x[row, column]
            want[row, column] = ~x[row, column]
    np.testing.assert_array_equal(after, want)


# Descriptors.

F16 = 1 << 4 | 64 >> 3 << 17 | 128 >> 4 << 24


@pytest.mark.parametrize(
    ("bits", "kind", "message"),
    [
        (F16 | 1 << 3, "f16", "must be 0"), (F16 | 1 << 6, "f16", "must be 0"), (F16 | 1 << 23, "f16", "must be 0"),
        (F16 | 1 << 31, "f16", "must be 0"), (F16 | 2 << 7, "f16", "format 2 of A"), (F16 | 7 << 10, "f8f6f4", "format 7 of B"),
        (F16, "tf32", "format 0 of A"), (F16 | 2 << 4, "f16", "format 3 of D"), (F16 & ~(3 << 4) | 1 << 7, "f16", "format 0 of D"),
        (F16 ^ 3 << 24, "f16", "M = 176"), (F16 & ~(63 << 17), "f16", "N = 0"), (F16 | 63 << 17, "f16", "N = 504"),
        (F16 ^ 1 << 17 | 1 << 16, "f8f6f4", "N = 72"), (F16 ^ 9 << 17 | 1 << 16, "f8f6f4", "N = 8"),
    ],
)  # fmt: skip
def test_forbidden_instruction_descriptor(bits, kind, message):
    with pytest.raises(EmulatorError, match=message):
        decode_instruction(bits, kind)


def test_instruction_descriptor_that_is_not_modelled():
    with pytest.raises(UnsupportedInstruction, match="are not implemented"):
        decode_instruction(F16 | 4, "f8f6f4")


def test_matrix_descriptors():
    bits = 0x4000_4040_0000_0000 | 0x2400 >> 4
    d = decode_tcgen05(bits)
    assert (d.start, d.leading, d.stride, d.base_offset, d.swizzle) == (0x2400, 0, 1024, 0, 128)
    for wrong in (1 << 47, 1 << 53, 1 << 60, 1 << 14, 1 << 62 | 1 << 61):
        with pytest.raises(EmulatorError, match="matrix descriptor"):
            decode_tcgen05(bits ^ wrong)
    for known in (1 << 52, 3 << 61):
        with pytest.raises(UnsupportedInstruction, match="is not implemented"):
            decode_tcgen05(bits ^ known)


# What is refused.

REFUSED = {
    "tcgen05.mma.cta_group::1.kind::i8 [r], d, d, r, p;": "kind::i8",
    "tcgen05.shift.cta_group::1.down [r];": "tcgen05.shift",
    "tcgen05.ld.red.sync.aligned.32x32b.x2.max.u32 {r, s}, r, [r];": "tcgen05.ld.red",
}


@pytest.mark.parametrize("line", REFUSED)
def test_is_refused_by_name(line):
    text = f""".version 9.0
    .target sm_100a
    .address_size 64
    .visible .entry f() .reqntid 32, 1, 1 {{
    .reg .b32 r, s; .reg .b64 d; .reg .pred p;
    mov.b32 r, 0; mov.b64 d, 0; setp.eq.b32 p, r, 0;
    {line}
    ret; }}"""
    with pytest.raises(UnsupportedInstruction, match=re.escape(REFUSED[line])) as caught:
        Machine("sm_100a").load(text, "refused").program("f")
    assert "PTX line 7" in str(caught.value)




# A in tensor memory.

WAIT_ST = '    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");\n    __syncthreads();\n'
WAIT_MMA = '    asm volatile("{ .reg .pred P'
STORE_A = (
    '    asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};\\ntcgen05.wait::st.sync.aligned;"'
    ' :: "r"(at + 130), "r"(0) : "memory");\n'
)


def product_of_tmem(m, lane, completion, rng, edit=lambda text: text):
    """Run D += A B with A [m, 32] in TMEM from column 128 on; returns (D, wanted)."""
    n, depth = 32, 32
    a, b = rng.integers(-4, 5, (m, depth)), rng.integers(-4, 5, (n, depth))
    right, db, step_b = layout(bits_of("bf16", b), 0, 64)
    rows = np.arange(128) if m == 128 else np.concatenate([32 * w + lane + np.arange(16) for w in range(4)])
    before = rng.integers(-100, 100, (128, 256))
    start = bits_of("f32", before).astype(np.uint32)
    start[rows, 128:144] = bits_of("bf16", a).view(np.uint32)
    form = np.uint32(1 << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 4 << 24)
    source = PRODUCT.replace("[%0], %1, %2, %3, 1;", "[%0], [%1], %2, %3, 1;")
    source = source.replace('"l"(da + (i * step_a >> 4))', '"r"(base + 128 + (LANE << 16) + i * step_a)')
    source = edit(source.replace("KIND", "f16").replace("LANE", str(lane)))
    source = PRELUDE + source.replace("BYTES_A", "16").replace("BYTES_B", str(right.nbytes))
    d = np.full((128, 256), 0xFFFFFFFF, np.uint32)
    image = np.frombuffer(right.tobytes(), np.uint8).copy()
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)))
    sizes = np.int32(8), np.int32(step_b), np.int32(2)
    source = source.replace("tiles + 16", "tiles + 1024")
    run_ptx(compile_ptx(source, "sm_100a"), "k", 1, 128, np.zeros(16, np.uint8), image, d, start, np.uint64(0), db,
            form, *sizes, machine=machine, shared=right.nbytes + 1024)  # fmt: skip
    return d.view(np.float32)[rows, :n], before[rows, :n] + a @ b.T


@pytest.mark.parametrize(("m", "lane"), [(128, 0), (64, 0), (64, 16)])
@all_schedules
def test_a_in_tensor_memory(m, lane, completion, rng):
    np.testing.assert_array_equal(*product_of_tmem(m, lane, completion, rng))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (WAIT_ST, "    __syncthreads();\n", "missing tcgen05.wait::st"),
        (WAIT_ST, WAIT_ST.split("    __")[0], "nothing orders it after the tcgen05.wait::st"),
        (WAIT_MMA, STORE_A + WAIT_MMA, "overwrites matrix A of an asynchronous tcgen05.mma that"),
        ("n < 256; ++n)\n        asm volatile(\"tcgen05.st", "n < 128; ++n)\n        asm volatile(\"tcgen05.st",
         "matrix A lies in undefined tensor memory"),
        ("base + 128 +", "base + 252 +", "out of bounds: tcgen05.mma, matrix A|of TMEM column"),
        ("base + 128 +", "base + 128 + (8 << 16) +", "of matrix A names TMEM lane"),
    ],
)  # fmt: skip
@all_schedules
def test_a_in_tensor_memory_misused(old, new, message, completion, rng):
    def edit(text):
        assert text.count(old) == 1
        return text.replace(old, new)

    with pytest.raises(KernelFault, match=message) as caught:
        product_of_tmem(128, 0, completion, rng, edit)
    assert re.search(r"PTX line \d+: .*\n  .*program\.cu:\d+", str(caught.value))
