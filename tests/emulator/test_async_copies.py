"""cp.async, cp.async.bulk and cp.reduce.async.bulk move the right bytes, under every completion schedule."""

import re

import numpy as np
import pytest
from asynchronous import all_schedules, launch
from programs import ARCHITECTURES, run_ptx

from dsv4_rt.errors import KernelFault, UnsupportedInstruction

RING = """
template <int BYTES, int STAGES> __device__ void ring(const u32* x, u32* y, int steps) {
    __shared__ alignas(16) u32 tile[STAGES][128 * BYTES / 4];
    constexpr int WORDS = BYTES / 4;
    auto load = [&](int k) {
        if (k < steps) copy<BYTES>(&tile[k % STAGES][threadIdx.x * WORDS], x + (k * 128 + threadIdx.x) * WORDS);
        copy_commit();
    };
    for (int k = 0; k < STAGES - 1; ++k) load(k);
    for (int k = 0; k < steps; ++k) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        load(k + STAGES - 1);
        int other = 127 - threadIdx.x;
        for (int i = 0; i < WORDS; ++i) y[(k * 128 + other) * WORDS + i] = tile[k % STAGES][other * WORDS + i] ^ k;
    }
}
extern "C" __global__ void ring4(const u32* x, u32* y, int steps) { ring<4, 3>(x, y, steps); }
extern "C" __global__ void ring8(const u32* x, u32* y, int steps) { ring<8, 2>(x, y, steps); }
extern "C" __global__ void ring16(const u32* x, u32* y, int steps) { ring<16, 4>(x, y, steps); }
"""


@all_schedules
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_a_ring_of_cp_async(rng, arch, completion, size):
    steps = 7
    x = rng.integers(0, 1 << 31, (steps, 128 * size // 4), np.uint32)
    y = np.full_like(x, 0xA5)
    launch(RING, f"ring{size}", 1, 128, x, y, np.int32(steps), arch=arch, completion=completion)
    assert np.array_equal(y, x ^ np.arange(steps, dtype=np.uint32)[:, None])


@all_schedules
@pytest.mark.parametrize("order", ["random", "reverse"])
def test_the_order_of_threads_does_not_matter(rng, order, completion):
    x = rng.integers(0, 1 << 31, (5, 512), np.uint32)
    y = np.full_like(x, 0xA5)
    launch(RING, "ring16", 1, 128, x, y, np.int32(5), order=order, seed=3, completion=completion)
    assert np.array_equal(y, x ^ np.arange(5, dtype=np.uint32)[:, None])


ZEROS = """
extern "C" __global__ void zeros(const u32* x, u32* y, int n) {
    __shared__ alignas(16) u32 tile[128];
    int words = n - (int)threadIdx.x * 4;
    copy<16>(&tile[threadIdx.x * 4], x + threadIdx.x * 4, words <= 0 ? 0 : words >= 4 ? 16 : words * 4);
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
}
extern "C" __global__ void ignore(const u32* x, u32* y, int n) {
    __shared__ alignas(16) u32 tile[128];
    asm volatile("{\\n.reg .pred P;\\nsetp.ge.s32 P, %2, %3;\\ncp.async.ca.shared.global [%0], [%1], 4, P;\\n}"
                 :: "r"(smem(&tile[threadIdx.x])), "l"(x + threadIdx.x), "r"((int)threadIdx.x), "r"(n) : "memory");
    copy_commit(); copy_wait<0>();
    y[threadIdx.x] = tile[threadIdx.x];
}
"""


@all_schedules
@pytest.mark.parametrize(("entry", "threads"), [("zeros", 32), ("ignore", 128)])
def test_bytes_beyond_the_source_size_are_zero_and_not_read(rng, completion, entry, threads):
    n = 93
    x = rng.integers(1, 1 << 31, n, np.uint32)  # ends where the copies must end
    y = np.full(128, 0xA5, np.uint32)
    launch(ZEROS, entry, 1, threads, x, y, np.int32(n), completion=completion)
    assert np.array_equal(y, np.concatenate([x, np.zeros(128 - n, np.uint32)]))


ARRIVE = """
extern "C" __global__ void arrive(const u32* x, u32* y) {
    __shared__ alignas(16) u32 tile[512];
    __shared__ u64 bar;
    if (threadIdx.x == 0) bar_init(&bar, COUNT);
    __syncthreads();
    copy<16>(&tile[threadIdx.x * 4], x + threadIdx.x * 4);
    asm volatile("cp.async.mbarrier.arriveNOINC.shared::cta.b64 [%0];" :: "r"(smem(&bar)) : "memory");
    EXTRA
    bar_wait(&bar, 0);
    for (int i = 0; i < 4; ++i) y[i * 128 + threadIdx.x] = tile[511 - (i * 128 + threadIdx.x)];
}
"""


@all_schedules
@pytest.mark.parametrize(("noinc", "extra"), [(".noinc", ""), ("", "bar_arrive(&bar);")])
def test_cp_async_arrives_on_an_mbarrier(rng, completion, noinc, extra):
    source = ARRIVE.replace("COUNT", "128").replace("NOINC", noinc).replace("EXTRA", extra)
    x = rng.integers(0, 1 << 31, 512, np.uint32)
    y = np.full_like(x, 0xA5)
    launch(source, "arrive", 1, 128, x, y, completion=completion)
    assert np.array_equal(y, x[::-1])


STORE = {
    "the writers fence": "fence_async(); __syncthreads();",
    "the issuing thread fences": "__syncthreads(); if (threadIdx.x == 0) fence_async();",
}
PASS = """
extern "C" __global__ void pass(const u32* x, u32* y, int tiles) {
    __shared__ alignas(16) u32 tile[2][128];
    for (int t = 0; t < tiles; ++t) {
        if (threadIdx.x == 0) bulk_wait_read<1>();
        __syncthreads();
        tile[t % 2][threadIdx.x] = x[t * 128 + threadIdx.x] + t;
        FENCE
        if (threadIdx.x == 0) { bulk_store(y + t * 128, tile[t % 2], 512); bulk_commit(); }
    }
    if (threadIdx.x == 0) bulk_wait<0>();
}
"""


@all_schedules
@pytest.mark.parametrize("fence", STORE)
def test_bulk_store(rng, completion, fence):
    x = rng.integers(0, 1 << 30, (6, 128), np.uint32)
    y = np.full_like(x, 0xA5)
    launch(PASS.replace("FENCE", STORE[fence]), "pass", 1, 128, x, y, np.int32(6), completion=completion)
    assert np.array_equal(y, x + np.arange(6, dtype=np.uint32)[:, None])


REDUCE = """
extern "C" __global__ void fold(const u8* x, u8* y) {
    __shared__ alignas(16) u8 tile[1024];
    for (int i = threadIdx.x; i < 1024; i += 32) tile[i] = x[i];
    fence_async();
    __syncwarp();
    if (threadIdx.x == 0) {
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.OP [%0], [%1], 1024;"
                     :: "l"(y), "r"(smem(tile)) : "memory");
        bulk_commit(); bulk_wait<0>();
    }
}
"""
FOLDS = {
    "add.u32": np.add, "add.u64": np.add, "add.f32": np.add, "add.f64": np.add, "add.noftz.f16": np.add,
    "min.s32": np.minimum, "max.u32": np.maximum, "min.s64": np.minimum, "max.f16": np.maximum,
    "and.b32": np.bitwise_and, "or.b64": np.bitwise_or, "xor.b32": np.bitwise_xor,
    "inc.u32": lambda old, new: np.where(old >= new, 0, old + 1),
    "dec.u32": lambda old, new: np.where((old == 0) | (old > new), new, old - 1),
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("op", FOLDS)
def test_bulk_reduction(rng, completion, op):
    kind = op.split(".")[-1]
    dtype = np.dtype(f"{'u' if kind[0] in 'ub' else 'i' if kind[0] == 's' else 'f'}{int(kind[1:]) // 8}")
    count = 1024 // dtype.itemsize
    if dtype.kind == "f":
        x, y = (rng.standard_normal(count).astype(dtype) for _ in "xy")
    else:
        x, y = (rng.integers(0, 1 << 31, count).astype(dtype) for _ in "xy")
    want = FOLDS[op](y, x).astype(dtype)
    launch(REDUCE.replace("OP", op), "fold", 1, 32, x, y, completion=completion)
    assert np.array_equal(y, want)


@pytest.mark.parametrize(
    "instruction",
    [
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.xor.u64 [%rd1], [%r1], 16;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd1], [%r1], 16;",
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.f32 [%r1], [%r1], 16, "
        "[%r1];",
        "cp.async.cg.shared.global [%r1], [%rd1], 8;",
        "setmaxnreg.inc.sync.aligned.u32 100;",
        "setmaxnreg.dec.sync.aligned.u32 16;",
    ],
)
def test_what_does_not_exist_is_refused(instruction):
    ptx = f""".version 8.5
    .target sm_90a
    .address_size 64
    .visible .entry refused() {{ .reg .b32 %r<2>; .reg .b64 %rd<2>; {instruction} ret; }}"""
    with pytest.raises(UnsupportedInstruction, match=re.escape(instruction.split()[0].split(".")[0])):
        run_ptx(ptx, "refused", 1, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("bulk_load(tile, x + 1, 512, &bar);", "global address .* is not a multiple of 16"),
        ("bulk_load(tile, x, 520, &bar);", "a size of 520 bytes is not a multiple of 16"),
        ("bulk_load(tile + 1, x, 512, &bar);", "destination: shared offset .* is not a multiple of 16"),
        ("bulk_load(tile, x + 64, 512, &bar);", "out of bounds: 512-byte read"),
        ("bulk_load(tile, x, 1 << 18, &bar);", "out of bounds: 262144-byte read"),
        ("bulk_load(&tile[4], x, 512, &bar);", "live mbarrier, initialised at(.|\n)*bar_init"),
        ("copy<16>(tile, x + 1);", "cp.async: global address .* is not a multiple of 16"),
        ("copy<16>(tile, x, 17);", "a source size of 17 of 16 bytes"),
    ],
)
def test_rules_of_copies(tmp_path, call, message):
    source = f"""
    extern "C" __global__ void rules(const u32* x) {{
        struct Shared {{ alignas(16) u32 tile[128]; u64 bar; }};
        __shared__ Shared s;
        u32* tile = s.tile; u64& bar = s.bar;
        bar_init(&bar, 1);
        {call}
        asm volatile("cp.async.wait_all;" ::: "memory");
    }}"""
    with pytest.raises(KernelFault, match=message):
        launch(source, "rules", 1, 1, np.zeros(128, np.uint32))


FORMS = """
cp.async.ca.shared.global.L2::64B [%r1], [%rd1], 4;
cp.async.ca.shared::cta.global.L2::256B [%r1+8], [%rd1+8], 8, %r2;
cp.async.cg.shared.global.L2::cache_hint.L2::128B [%r1], [%rd1], 16, %rd2;
cp.async.cg.shared.global.L2::cache_hint [%r1], [%rd1], 16, %r2, %rd2;
cp.async.cg.shared.global [%r1], [%rd1], 16, %p1;
cp.async.mbarrier.arrive.b64 [%rd1];
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r1];
LOAD.L2::cache_hint [%r1], [%rd1], 16, [%r1], %rd2;
cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1], %r2, [%r1];
LOAD.multicast::cluster [%r1], [%rd1], 16, [%r1], %h1;
LOAD.multicast::cluster.L2::cache_hint [%r1], [%rd1], 16, [%r1], %h1, %rd2;
cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r1], [%r1], 16, [%r1];
cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%rd1], [%r1], 16, %rd2;
cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.cp_mask [%rd1], [%r1], 16, %rd2, %h1;
cp.async.bulk.prefetch.L2.global.L2::cache_hint [%rd1], 16, %rd2;
cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.noftz.bf16 [%rd1], [%r1], 16, %rd2;
cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u64 [%r1], [%r1], 16, [%r1];
cp.async.bulk.wait_group.read 3;
mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1], 2;
mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [%r1], 16;
mbarrier.arrive_drop.expect_tx.release.cta.shared::cta.b64 %rd3, [%r1], 16;
mbarrier.arrive_drop.noComplete.release.cta.b64 %rd3, [%rd1], 1;
mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r1], 16;
mbarrier.test_wait.relaxed.cluster.shared::cta.b64 %p1, [%r1], %rd2;
mbarrier.try_wait.parity.relaxed.cluster.b64 %p1, [%rd1], 1, 1000;
mbarrier.try_wait.acquire.cta.shared::cta.b64 %p1, [%r1], %rd2, %r2;
@%p1 mbarrier.arrive.shared::cta.b64 %rd3, [%r1];
@%p1 mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], %r2;
fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;
fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;
@%p1 fence.proxy.async.shared::cluster;
""".replace("LOAD", "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes").strip().split("\n")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_translated(form):
    ptx = f""".version 8.6
    .target sm_100a
    .address_size 64
    .visible .entry forms() {{
        .reg .b16 %h<2>; .reg .b32 %r<3>; .reg .b64 %rd<4>; .reg .pred %p<2>;
        mov.b16 %h1, 1; mov.b32 %r1, 1024; mov.b32 %r2, 0; mov.b64 %rd1, 0; mov.b64 %rd2, 0; setp.eq.u32 %p1, %r2, %r2;
        @%p1 exit;
        {form}
        ret; }}"""
    run_ptx(ptx, "forms", 1, 32)
