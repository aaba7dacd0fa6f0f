"""TMA in kernels: a copy through a ring of stages under every schedule, and the bugs such kernels have.

What single copies do is judged in tests/conformance/test_tiles.py.
"""

import time
from dataclasses import dataclass

import numpy as np
import pytest
from programs import PRELUDE, run_ptx
from tensor_programs import WGMMA_HELPERS, bits_of, descriptor, fragments, wgmma_function
from test_instructions import text_of

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.errors import Deadlock, KernelFault, UnsupportedInstruction
from dsv4_rt.launch import load
from dsv4_rt.tensor_map import TensorMap

COMPLETIONS = ("early", "late", "random")
HEAD = r"""
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long;
struct alignas(64) Map { u64 opaque[16]; };
__device__ u32 smem(const void* p) { return (u32)__cvta_generic_to_shared(p); }
#define LOAD(D) "cp.async.bulk.tensor." D ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"
__device__ void init(u64* bar, u32 n) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(smem(bar)), "r"(n) : "memory");
}
__device__ void init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ void expect(u64* bar, u32 n) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(smem(bar)), "r"(n) : "memory");
}
__device__ void arrive(u64* bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(smem(bar)) : "memory");
}
__device__ void wait(u64* bar, u32 parity) {
    asm volatile("{\n.reg .pred P;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1;\n"
                 "@P bra DONE;\nbra AGAIN;\nDONE:\n}"
                 :: "r"(smem(bar)), "r"(parity) : "memory");
}
__device__ void tile_in(void* to, const Map* map, int x, int y, u64* bar) {
    asm volatile(LOAD("2d") " [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(smem(to)), "l"(map), "r"(smem(bar)), "r"(x), "r"(y) : "memory");
}
__device__ void cube_in(void* to, const Map* map, u64* bar) {
    asm volatile(LOAD("3d") " [%0], [%1, {0, 0, 0}], [%2];" :: "r"(smem(to)), "l"(map), "r"(smem(bar)) : "memory");
}
__device__ void tile_to_all(void* to, const Map* map, int x, int y, u64* bar, u16 mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 :: "r"(smem(to)), "l"(map), "r"(smem(bar)), "r"(x), "r"(y), "h"(mask) : "memory");
}
__device__ void tile_out(const Map* map, int x, int y, const void* from) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(map), "r"(smem(from)), "r"(x), "r"(y) : "memory");
}
__device__ void tile_add(const Map* map, int x, int y, const void* from) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];"
                 :: "l"(map), "r"(smem(from)), "r"(x), "r"(y) : "memory");
}
__device__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ void drain() { asm volatile("cp.async.bulk.wait_group %0;" :: "n"(N) : "memory"); }
template <int N> __device__ void drain_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}
__device__ void fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ u32 rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
"""
# y = 3 x + 1 over tiles of 16 x 32 words, a producer warp, a ring of STAGES tiles under 128B swizzle, TMA both ways.
RING = HEAD + r"""
constexpr int STAGES = 3, ROWS = 16, BYTES = ROWS * 128;
extern "C" __global__ void ring(const __grid_constant__ Map x, const __grid_constant__ Map y, int tiles) {
    __shared__ alignas(1024) u32 in[STAGES][ROWS * 32];
    __shared__ alignas(1024) u32 out[ROWS * 32];
    __shared__ u64 full[STAGES], empty[STAGES];
    const int t = threadIdx.x;
    if (t == 0) {
        for (int s = 0; s < STAGES; ++s) { init(&full[s], 1); init(&empty[s], 64); }
        init_done();
    }
    __syncthreads();
    if (t >= 64) {
        if (t == 64)
            for (int i = 0; i < tiles; ++i) {
                const int s = i % STAGES;
                if (i >= STAGES) wait(&empty[s], i / STAGES - 1 & 1);
                expect(&full[s], BYTES);
                tile_in(in[s], &x, 32 * blockIdx.x, ROWS * i, &full[s]);
            }
        return;
    }
    for (int i = 0; i < tiles; ++i) {
        const int s = i % STAGES;
        wait(&full[s], i / STAGES & 1);
        u32 v[8];
        for (int j = 0; j < 8; ++j) v[j] = in[s][t + 64 * j] * 3 + 1;
        arrive(&empty[s]);
        if (i > 0 && t == 0) drain_read<0>();
        asm volatile("bar.sync 1, 64;" ::: "memory");
        for (int j = 0; j < 8; ++j) out[t + 64 * j] = v[j];
        fence();
        asm volatile("bar.sync 1, 64;" ::: "memory");
        if (t == 0) { tile_out(&y, 32 * blockIdx.x, ROWS * i, out); commit(); }
    }
    if (t == 0) drain<0>();
}
"""


def write(tmp_path, source):
    path = tmp_path / "program.cu"
    path.write_text(source)
    return str(path)


@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_ring_of_stages(rng, tmp_path, completion, order):
    device = EmulatedDevice("sm_90a", completion=completion, order=order, seed=int(rng.integers(1 << 30)))
    x = rng.integers(0, 1 << 30, (150, 100), dtype=np.uint32)
    source, result = device.array(x), device.array(np.full((150, 100), 0xA5A5A5A5, np.uint32))
    maps = [TensorMap(each, (16, 32), swizzle="128B") for each in (source, result)]
    load(write(tmp_path, RING), "ring", device).launch(4, 96, *maps, np.int32(10))
    assert np.array_equal(result, x * np.uint32(3) + np.uint32(1))


def test_a_ring_on_every_device(device, rng, tmp_path):
    x = rng.integers(0, 1 << 30, (150, 100), dtype=np.uint32)
    source, result = device.array(x), device.array(np.full((150, 100), 0xA5A5A5A5, np.uint32))
    maps = [TensorMap(each, (16, 32), swizzle="128B") for each in (source, result)]
    load(write(tmp_path, RING), "ring", device).launch(4, 96, *maps, np.int32(10))
    assert np.array_equal(device.numpy(result), x * np.uint32(3) + np.uint32(1))


def test_other_swizzles_give_other_images(emulator, tmp_path, rng):
    """A kernel that reads a tile as it lies finds rows only under the swizzle it reads by."""
    x = rng.integers(0, 1 << 30, (16, 32), dtype=np.uint32)
    source = HEAD + """extern "C" __global__ void image(const __grid_constant__ Map x, u32* y) {
        __shared__ alignas(1024) u32 tile[512]; __shared__ u64 bar;
        if (threadIdx.x == 0) { init(&bar, 1); init_done(); expect(&bar, 2048); tile_in(tile, &x, 0, 0, &bar); }
        __syncthreads(); wait(&bar, 0);
        for (int i = threadIdx.x; i < 512; i += 32) {  // the address bits 4 to 6 with 7 to 9, as SWIZZLE_128B has them
            y[i] = tile[i ^ (i >> 5 & 7) << 2];
        }
    }"""
    images = {}
    for swizzle in ("none", "128B"):
        y = emulator.array(np.zeros((16, 32), np.uint32))
        load(write(tmp_path, source), "image").launch(
            1, 32, TensorMap(emulator.array(x), (16, 32), swizzle=swizzle), y
        )
        images[swizzle] = y
    assert np.array_equal(images["128B"], x)
    assert not np.array_equal(images["none"], x)


@dataclass(frozen=True)
class Plant:
    """A kernel over two 64 x 64 maps of u32, boxes of 8 x 32, and scratch z; right without MUTANT.

    It runs as 2 CTAs of 32 threads in one cluster. BUG marks the line of the report.
    """

    body: str
    message: str
    error: type = KernelFault
    schedules: tuple[str, ...] = COMPLETIONS


START = "if (t == 0) { init(&bar, 1); init_done(); } cluster_sync();\n"
LOADED = START + "if (t == 0) { expect(&bar, 1024); tile_in(tile, &x, 0, 8 * cta, &bar); } wait(&bar, 0);\n"
FILLED = "for (int i = t; i < 256; i += 32) tile[i] = cta + i;\n"
PLANTS = {
    "too many bytes expected": Plant(
        START + """
        #ifdef MUTANT
        const u32 total = 1040;
        #else
        const u32 total = 1024;
        #endif
        if (t == 0) { expect(&bar, total); tile_in(tile, &x, 0, 8 * cta, &bar); }
        wait(&bar, 0); // BUG
        z[32 * cta + t] = tile[t];""",
        r"parity 0 of the mbarrier at \w*bar, .* 0 of 1 arrivals pending, 16 transaction bytes pending", Deadlock,
    ),
    "fewer bytes expected than the box has": Plant(
        START + """
        #ifdef MUTANT
        const u32 total = 512;
        #else
        const u32 total = 1024;
        #endif
        if (t == 0) { expect(&bar, total); tile_in(tile, &x, 0, 8 * cta, &bar); }
        wait(&bar, 0); // BUG
        z[32 * cta + t] = tile[t];""",
        r"parity 0 of the mbarrier at \w*bar, .* 512 transaction bytes more than were expected", Deadlock,
    ),
    "nobody waits for the tile": Plant(
        START + """if (t == 0) { expect(&bar, 1024); tile_in(tile, &x, 0, 8 * cta, &bar); }
        #ifndef MUTANT
        wait(&bar, 0);
        #endif
        __syncwarp();
        u32 v = tile[t]; // BUG
        wait(&bar, 0);
        z[32 * cta + t] = v;""",
        r"reads the destination of an asynchronous cp.async.bulk.tensor",
    ),
    "the next tile comes before all have read": Plant(
        LOADED + """
        u32 v = tile[t ^ 31];
        #ifndef MUTANT
        __syncwarp();
        #endif
        if (t == 0) { expect(&bar, 1024); tile_in(tile, &x, 32, 8 * cta, &bar); } // BUG
        wait(&bar, 1);
        z[32 * cta + t] = v + tile[t];""",
        r"WAR race on shared memory: cp.async.bulk.tensor",
    ),
    "no proxy fence before the tile goes out": Plant(
        FILLED + """
        #ifndef MUTANT
        fence();
        #endif
        __syncwarp();
        if (t == 0) { tile_out(&y, 0, 8 * cta, tile); commit(); drain<0>(); } // BUG""",
        "no fence.proxy.async lies between",
    ),
    "overwrites a tile that is going out": Plant(
        FILLED + """
        fence(); __syncwarp();
        if (t == 0) { tile_out(&y, 0, 8 * cta, tile); commit(); }
        #ifndef MUTANT
        if (t == 0) drain_read<0>();
        #endif
        __syncwarp();
        tile[t] = 7; // BUG
        if (t == 0) drain<0>();""",
        "overwrites the source of an asynchronous cp.async.bulk.tensor",
    ),
    "part of the tile was never written": Plant(
        """
        #ifdef MUTANT
        for (int i = t; i < 240; i += 32) tile[i] = i;
        #else
        for (int i = t; i < 256; i += 32) tile[i] = i;
        #endif
        fence(); __syncwarp();
        if (t == 0) { tile_out(&y, 0, 8 * cta, tile); commit(); drain<0>(); } // BUG""",
        "cp.async.bulk.tensor reads uninitialised shared memory: 64 bytes of its tile",
    ),
    "the destination is aligned to 64": Plant(
        START + """
        #ifdef MUTANT
        u32* to = tile + 16;
        #else
        u32* to = tile + 32;
        #endif
        if (t == 0) { expect(&bar, 1024); tile_in(to, &x, 0, 8 * cta, &bar); } // BUG
        wait(&bar, 0); z[32 * cta + t] = to[t];""",
        r"cp.async.bulk.tensor destination: shared offset 0x\w+ is not a multiple of 128",
    ),
    "a tile past the end of shared memory": Plant(
        START + """
        #ifdef MUTANT
        u32* to = tile + 1024 - 192;
        #else
        u32* to = tile + 1024 - 256;
        #endif
        if (t == 0) { expect(&bar, 1024); tile_in(to, &x, 0, 8 * cta, &bar); } // BUG
        wait(&bar, 0); z[32 * cta + t] = to[t];""",
        r"out of bounds: cp.async.bulk.tensor destination: 1024 bytes",
    ),
    "a column that is no multiple of 16 bytes": Plant(
        START + """
        #ifdef MUTANT
        const int column = 5;
        #else
        const int column = 4;
        #endif
        if (t == 0) { expect(&bar, 1024); tile_in(tile, &x, column, 8 * cta, &bar); } // BUG
        wait(&bar, 0); z[32 * cta + t] = tile[t];""",
        "the coordinate 5 of the contiguous axis, of u32, is 20 B, not a multiple of 16 B",
    ),
    "a negative row of a store": Plant(
        FILLED + """
        fence(); __syncwarp();
        #ifdef MUTANT
        const int row = -4;
        #else
        const int row = 60 - 8 * cta;
        #endif
        if (t == 0) { tile_out(&y, 0, row, tile); commit(); drain<0>(); } // BUG""",
        r"the coordinates \(0, -4\) of a store: negative ones are for loads only",
    ),
    "three coordinates for two axes": Plant(
        START + """if (t == 0) {
            expect(&bar, 1024);
            #ifdef MUTANT
            cube_in(tile, &x, &bar); // BUG
            #else
            tile_in(tile, &x, 0, 0, &bar);
            #endif
        }
        wait(&bar, 0); z[32 * cta + t] = tile[t];""",
        "3 coordinates for a tensor map of rank 2",
    ),
    "a multicast to a rank that is not there": Plant(
        START + """
        #ifdef MUTANT
        const u16 mask = 7;
        #else
        const u16 mask = 3;
        #endif
        if (t == 0) { expect(&bar, 1024); if (cta == 0) tile_to_all(tile, &x, 0, 0, &bar, mask); } // BUG
        wait(&bar, 0); z[32 * cta + t] = tile[t]; cluster_sync();""",
        "ctaMask 0x0007 in a cluster of 2 CTAs",
    ),
    "a multicast before the other CTA is ready": Plant(
        """if (t == 0) { init(&bar, 1); init_done(); expect(&bar, 1024); }
        #ifdef MUTANT
        __syncwarp();
        #else
        cluster_sync();
        #endif
        if (t == 0 && cta == 0) tile_to_all(tile, &x, 0, 0, &bar, 3); // BUG
        wait(&bar, 0); z[32 * cta + t] = tile[t]; cluster_sync();""",
        "never initialised|nothing orders it after the init",
    ),
    "a CTA leaves while the other sends to it": Plant(
        START + """if (t == 0 && cta == 1) expect(&bar, 1024);
        if (t == 0 && cta == 0) tile_to_all(tile, &x, 0, 0, &bar, 2); // BUG
        #ifdef MUTANT
        if (cta == 1) return;
        #else
        if (cta == 1) { wait(&bar, 0); z[t] = tile[t]; }
        #endif
        """,
        "the CTA exits while others may still access its shared memory",
    ),
    "a CTA leaves that has waited for something else": Plant(
        START + """if (t == 0 && cta == 1) expect(&bar, 1024);
        if (t == 0 && cta == 0) tile_to_all(tile, &x, 0, 0, &bar, 2); // BUG
        cluster_sync();
        #ifndef MUTANT
        if (cta == 1) wait(&bar, 0);
        #endif
        """,
        "an asynchronous cp.async.bulk.tensor writes to shared memory of rank 1, whose CTA has exited",
        schedules=("late",),
    ),
    "adds bytes": Plant(
        FILLED + """
        fence(); __syncwarp();
        #ifdef MUTANT
        if (t == 0) { tile_add(&bytes, 0, 8 * cta, tile); commit(); drain<0>(); } // BUG
        #else
        if (t == 0) { tile_add(&y, 0, 8 * cta, tile); commit(); drain<0>(); }
        #endif""",
        r"cp.reduce.async.bulk.tensor.add of u8; it takes u32, s32, u64, f16, bf16, f32, f64",
    ),
    "a store past the end of the allocation": Plant(
        """for (int i = t; i < 1024; i += 32) tile[i] = i;
        fence(); __syncwarp();
        #ifdef MUTANT
        if (t == 0 && cta == 0) { tile_out(&bytes, 0, 0, tile); commit(); drain<0>(); } // BUG
        #else
        if (t == 0 && cta == 0) { tile_out(&y, 0, 0, tile); commit(); drain<0>(); }
        #endif""",
        r"out of bounds: \d+-byte write at 0x\w+: straddling an end of \"uint8\[4024\]\"",
    ),
}  # fmt: skip
PLANT_HEAD = HEAD + """
extern "C" __global__ void test(const __grid_constant__ Map x, const __grid_constant__ Map y,
                                const __grid_constant__ Map bytes, u32* z) {
    __shared__ alignas(1024) u32 tile[1024]; __shared__ u64 bar; const int t = threadIdx.x, cta = blockIdx.x;
"""


def as_strided(array, shape, strides):
    if isinstance(array, np.ndarray):
        return np.lib.stride_tricks.as_strided(array, shape, strides)
    from cupy.lib.stride_tricks import as_strided as on_gpu

    return on_gpu(array, shape, strides)


def run_plant(device, path, mutant):
    x = device.array(np.arange(64 * 64, dtype=np.uint32).reshape(64, 64))
    y, z = device.array(np.zeros((64, 64), np.uint32)), device.array(np.zeros(64, np.uint32))
    # The allocation ends in the middle of 16 bytes of the last row: a store writes all of them.
    short = device.array(np.zeros(62 * 64 + 56, np.uint8))
    rows = as_strided(short, (63, 56), (64, 1))
    bytes_ = TensorMap(rows, (63, 64))
    defines = {"MUTANT": 1} if mutant else {}
    load(path, "test", device, **defines).launch(
        2, 32, TensorMap(x, (8, 32)), TensorMap(y, (8, 32)), bytes_, z, cluster=(2,)
    )
    device.synchronize()
    return np.concatenate([device.numpy(y).reshape(-1), device.numpy(z)])


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_found_where_they_are(tmp_path, name):
    plant = PLANTS[name]
    source = PLANT_HEAD + plant.body + "\n}\n"
    path = write(tmp_path, source)
    line = next(i for i, text in enumerate(source.split("\n"), 1) if "BUG" in text)
    right = [run_plant(EmulatedDevice("sm_90a", completion=each), path, False) for each in COMPLETIONS]
    assert all(np.array_equal(right[0], each) for each in right)
    for completion in plant.schedules:
        device = EmulatedDevice("sm_90a", completion=completion)
        with pytest.raises(plant.error, match=plant.message) as caught:
            run_plant(device, path, True)
        assert f"program.cu:{line}" in str(caught.value), caught.value


TO_SHARED = "cp.async.bulk.tensor.2d.{}.global{}.mbarrier::complete_tx::bytes{} [s], [out, {{a, b}}], [s]{};"
FORMS = [
    TO_SHARED.format("shared::cta", "", "", ""),
    TO_SHARED.format("shared::cluster", ".tile", ".L2::cache_hint", ", w"),
    TO_SHARED.format("shared::cluster", ".tile", ".multicast::cluster.L2::cache_hint", ", h, w"),
    TO_SHARED.format("shared::cta", ".tile", ".cta_group::2", ""),
    TO_SHARED.format("shared::cluster", "", "", "").replace(".2d.", ".2d.cta_group::1."),
    *(
        f"cp.async.bulk.prefetch.tensor.{n}d.L2.global.tile{hint} [out, {{{', '.join('a' * n)}}}]{more};"
        for n, hint, more in ((1, "", ""), (3, ".L2::cache_hint", ", w"), (5, "", ""))
    ),
    "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group.L2::cache_hint [out, {a, b}], [s], w;",
    *(
        f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.bulk_group [out, {{a, b}}], [s];"
        for op in ("add", "min", "max", "inc", "dec", "and", "or", "xor")
    ),
    "tensormap.replace.tile.global_address.global.b1024.b64 [out], w;",
    *(f"tensormap.replace.tile.{field}.shared::cta.b1024.b32 [s], {number}a;"
      for field, number in (("rank", ""), ("box_dim", "0, "), ("global_dim", "1, "), ("element_stride", "2, "))),
    "tensormap.replace.tile.global_stride.global.b1024.b64 [out], 1, w;",
    *(f"tensormap.replace.tile.{field}.global.b1024.b32 [out], 1;"
      for field in ("elemtype", "swizzle_mode", "fill_mode", "interleave_layout")),
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [out], [s], 128;",
]  # fmt: skip
REFUSED = {
    TO_SHARED.format("shared::cluster", ".im2col", "", ", {h, h}"): "im2col",
    TO_SHARED.format("shared::cta", ".tile::gather4", "", "").replace("{a, b}", "{a, a, a, a, a}"): "tile::gather4",
    "tensormap.replace.tile.swizzle_atomicity.global.b1024.b32 [out], 1;": "swizzle_atomicity",
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANTS)
def test_the_right_kernels_do_the_same_on_a_gpu(gpu, tmp_path, name):
    path = write(tmp_path, PLANT_HEAD + PLANTS[name].body + "\n}\n")
    assert np.array_equal(run_plant(gpu, path, False), run_plant(EmulatedDevice("sm_90a"), path, False))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_translated(form):
    run_ptx(text_of("@q " + form), "f", 1, 64, np.zeros(4, np.uint64))


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(form):
    with pytest.raises(UnsupportedInstruction, match=REFUSED[form]):
        run_ptx(text_of("@q " + form), "f", 1, 64, np.zeros(4, np.uint64))


GEMM = PRELUDE + WGMMA_HELPERS + wgmma_function(32, "f32", "bf16", "bf16") + HEAD + """
extern "C" __global__ void gemm(const __grid_constant__ Map a, const __grid_constant__ Map b, float* d, u64 rest) {
    __shared__ alignas(1024) u16 left[64 * 64]; __shared__ alignas(1024) u16 right[32 * 64]; __shared__ u64 bar;
    if (threadIdx.x == 0) {
        init(&bar, 1); init_done(); expect(&bar, sizeof(left) + sizeof(right));
        tile_in(left, &a, 0, 0, &bar); tile_in(right, &b, 0, 0, &bar);
    }
    __syncthreads();
    wait(&bar, 0);
    #ifdef REWRITTEN
    for (int i = threadIdx.x; i < 64 * 64; i += 128) left[i] += 0x80;
    for (int i = threadIdx.x; i < 32 * 64; i += 128) right[i] += 0x80;
    fence();
    __syncthreads();
    #endif
    float acc[16] = {};
    u64 x = matrix(left, rest), y = matrix(right, rest);
    wg_fence();
    for (int i = 0; i < 4; ++i) wgmma(acc, x + 2 * i, y + 2 * i, i > 0);
    wg_commit(); wg_wait<0>();
    for (int i = 0; i < 16; ++i) d[threadIdx.x * 16 + i] = acc[i];
}
"""


def gemm(device, path, rng, swizzles, width, **defines):
    """(result, exact product, error) of a tile whose maps and descriptors name swizzles."""
    a, b = rng.integers(-4, 5, (64, 64)), rng.integers(-4, 5, (32, 64))
    maps = [
        TensorMap(device.array(bits_of("bf16", x)), x.shape, dtype="bf16", swizzle=swizzle)
        for x, swizzle in zip((a, b), swizzles, strict=True)
    ]
    d = device.array(np.zeros((128, 16), np.float32))
    kernel = load(path, "gemm", device, **defines)
    kernel.launch(1, 128, *maps, d, np.uint64(descriptor(0, 8 * width, width)))
    return fragments(device.numpy(d), 32), a @ b.T


@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_descriptor_that_contradicts_the_tensor_map(tmp_path, rng, completion):
    path = write(tmp_path, GEMM)
    device = EmulatedDevice("sm_90a", completion=completion)
    got, want = gemm(device, path, rng, ("128B", "128B"), 128)
    assert np.array_equal(got, want)
    message = r"wgmma: matrix A is not what its descriptor \(swizzle 64 B(.|\n)*the copy was issued at\n +PTX line"
    with pytest.raises(KernelFault, match=message):
        gemm(device, path, rng, ("128B", "128B"), 64)
    # Data that came as it lies may have been permuted before; and what threads rewrite is theirs.
    assert not np.array_equal(*gemm(device, path, rng, ("none", "none"), 128))
    gemm(device, path, rng, ("128B", "128B"), 64, REWRITTEN=1)


def test_a_tile_that_nobody_wrote_is_reported_on_request(tmp_path):
    source = HEAD + """extern "C" __global__ void test(const __grid_constant__ Map x, u32* y) {
        __shared__ alignas(1024) u32 tile[256]; __shared__ u64 bar;
        if (threadIdx.x == 0) { init(&bar, 1); init_done(); expect(&bar, 1024); tile_in(tile, &x, 0, 60, &bar); } // BUG
        __syncwarp(); wait(&bar, 0);
        y[threadIdx.x] = tile[threadIdx.x];
    }"""
    path = write(tmp_path, source)
    line = next(i for i, text in enumerate(source.split("\n"), 1) if "BUG" in text)
    for completion in COMPLETIONS:
        device = EmulatedDevice("sm_90a", completion=completion, check_uninitialised=True)
        x, y = device.empty((64, 64), np.uint32), device.empty(32, np.uint32)
        x[:63] = 5
        device.machine.memory.mark_written(x.ctypes.data, 63 * 256)
        kernel = load(path, "test", device)
        with pytest.raises(KernelFault, match=r"uninitialised global memory: 4 bytes at 0x\w+, 16,128 bytes") as caught:
            kernel.launch(1, 32, TensorMap(x, (8, 32)), y)
        assert f"program.cu:{line}" in str(caught.value)
        x[63] = 6
        device.machine.memory.mark_written(x.ctypes.data, x.nbytes)
        kernel.launch(1, 32, TensorMap(x, (8, 32)), y)
        assert (y == 5).all()


def test_a_tile_is_one_copy(tmp_path, rng):
    """256 tiles of 128 x 64 bf16 under 128B swizzle, the A side of a GEMM with K = 16384: one NumPy copy each."""
    device = EmulatedDevice("sm_90a", completion="late")
    x = device.array(rng.integers(0, 1 << 16, (128, 64 * 256), dtype=np.uint16))
    source = HEAD + """extern "C" __global__ void test(const __grid_constant__ Map x, u16* y) {
        __shared__ alignas(1024) u16 tile[128 * 64]; __shared__ u64 bar;
        if (threadIdx.x == 0) { init(&bar, 1); init_done(); }
        __syncthreads();
        for (int i = 0; i < 256; ++i) {
            if (threadIdx.x == 0) { expect(&bar, sizeof(tile)); tile_in(tile, &x, 64 * i, 0, &bar); }
            wait(&bar, i & 1);
        }
        y[threadIdx.x] = tile[threadIdx.x];
    }"""
    y = device.array(np.zeros(64, np.uint16))
    ready = load(write(tmp_path, source), "test", device).prepare(
        1, 64, TensorMap(x, (128, 64), dtype="bf16", swizzle="128B"), dsv4_rt.launch.POINTER
    )
    ready.launch([y.ctypes.data])
    start = time.perf_counter()
    ready.launch([y.ctypes.data])
    seconds = time.perf_counter() - start
    assert np.array_equal(y, x[0, 64 * 255 :])
    assert seconds < 1.0, f"{1e6 * seconds / 256:.0f} us a tile"  # ten times what it takes on one core
    print(f"{1e6 * seconds / 256:.0f} us a tile and its wait")
