"""CUDA programs of one idea each, run on the emulator in every thread order and compared with NumPy."""

import numpy as np
import pytest
from programs import ARCHITECTURES, ORDERS, run, run_ptx

pytestmark = [pytest.mark.parametrize("arch", ARCHITECTURES), pytest.mark.parametrize("order", ORDERS)]


@pytest.fixture
def rng():
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def test_vector_add(arch, order, rng):
    source = """extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) c[i] = a[i] + b[i];
    }"""
    a, b = rng.standard_normal((2, 1000)).astype(np.float32)
    c = np.zeros(1000, np.float32)
    report = run(source, "add", 8, 128, a, b, c, np.int32(1000), arch=arch, order=order)
    np.testing.assert_array_equal(c, a + b)
    assert (report.ctas, report.threads) == (8, 1024)
    assert report.opcodes["st"] == 1000


def test_divergent_loops_and_switch(arch, order, rng):
    source = """extern "C" __global__ void f(const int* x, int* y, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        int v = x[i], count = 0;
        while (v != 1 && count < 200) {
            if (v & 1) { v = 3 * v + 1; if (v % 5 == 0) v += 2; else { for (int j = 0; j < v % 7; ++j) count += j; } }
            else v >>= 1;
            ++count;
        }
        switch (v % 11) {
            case 0: count += 3; break; case 1: count *= 5; break; case 2: count ^= 0x55; break;
            case 3: count -= 7; case 4: count = -count; break; case 5: count <<= 2; break;
            case 6: count /= 3; break; case 7: count %= 13; break; case 8: count = count * count; break;
            default: count = v;
        }
        y[i] = count;
    }"""

    def reference(v):
        count = 0
        while v != 1 and count < 200:
            if v & 1:
                v = 3 * v + 1
                if v % 5 == 0:
                    v += 2
                else:
                    for j in range(v % 7):
                        count += j
            else:
                v >>= 1
            count += 1
        case = v % 11
        if case == 3:
            count -= 7
        if case in (3, 4):
            return -count
        table = {0: count + 3, 1: count * 5, 2: count ^ 0x55, 5: count << 2, 6: count // 3, 7: count % 13, 8: count**2}
        return table.get(case, v)

    x = rng.integers(1, 300, 256).astype(np.int32)
    y = np.zeros_like(x)
    run(source, "f", 2, 128, x, y, np.int32(256), arch=arch, order=order)
    np.testing.assert_array_equal(y, [reference(int(v)) for v in x])


def test_block_reduction(arch, order, rng):
    source = """extern "C" __global__ void sum(const int* x, int* y) {
        __shared__ int part[256];
        int t = threadIdx.x;
        part[t] = x[blockIdx.x * 256 + t];
        __syncthreads();
        for (int d = 128; d; d >>= 1) { if (t < d) part[t] += part[t + d]; __syncthreads(); }
        if (t == 0) y[blockIdx.x] = part[0];
    }"""
    x = rng.integers(-1000, 1000, (40, 256)).astype(np.int32)
    y = np.zeros(40, np.int32)
    run(source, "sum", 40, 256, x, y, arch=arch, order=order)
    np.testing.assert_array_equal(y, x.sum(1))


def test_dynamic_shared_and_generic_pointers(arch, order, rng):
    source = """__device__ __noinline__ int pick(const int* p, int i) { return p[i]; }
    extern "C" __global__ void f(const int* x, int* y, int n) {
        extern __shared__ int buffer[];
        int local[4];
        int t = threadIdx.x;
        buffer[n - 1 - t] = x[t];
        for (int i = 0; i < 4; ++i) local[i] = t * 10 + i;
        __syncthreads();
        const int* p = t % 3 == 0 ? buffer : t % 3 == 1 ? local : x;
        y[t] = pick(p, t % 3 == 1 ? t & 3 : t);
    }"""
    n = 96
    x = rng.integers(0, 1000, n).astype(np.int32)
    y = np.zeros_like(x)
    run(source, "f", 1, n, x, y, np.int32(n), arch=arch, order=order, shared=4 * n)
    t = np.arange(n)
    np.testing.assert_array_equal(y, np.where(t % 3 == 0, x[::-1], np.where(t % 3 == 1, t * 10 + (t & 3), x)))


def test_shuffles(arch, order, rng):
    source = """extern "C" __global__ void f(const int* x, int* y) {
        int t = threadIdx.x, v = x[t];
        y[t] = __shfl_up_sync(~0u, v, 3);
        y[t + 64] = __shfl_down_sync(~0u, v, 5, 16);
        y[t + 128] = __shfl_xor_sync(~0u, v, 9);
        y[t + 192] = __shfl_sync(~0u, v, t * 7, 8);
        int p, q;
        asm("{.reg .pred p; shfl.sync.up.b32 %0|p, %2, 2, 0, 0xffffffff; selp.s32 %1, 1, 0, p;}"
            : "=r"(q), "=r"(p) : "r"(v));
        y[t + 256] = p; y[t + 320] = q;
        if (t % 32 < 12) y[t + 384] = __shfl_xor_sync(0xfffu, v, 3); else y[t + 384] = -1;
    }"""
    x = rng.integers(0, 1 << 30, 64).astype(np.int32)
    y = np.zeros((7, 64), np.int32)
    run(source, "f", 1, 64, x, y, arch=arch, order=order)
    w, lane = x.reshape(2, 32), np.arange(32)
    up = np.where(lane >= 3, lane - 3, lane)
    down = np.where(lane % 16 + 5 < 16, lane + 5, lane)
    np.testing.assert_array_equal(y[0].reshape(2, 32), w[:, up])
    np.testing.assert_array_equal(y[1].reshape(2, 32), w[:, down])
    np.testing.assert_array_equal(y[2].reshape(2, 32), w[:, lane ^ 9])
    np.testing.assert_array_equal(y[3].reshape(2, 32), w[:, lane // 8 * 8 + lane * 7 % 8])
    np.testing.assert_array_equal(y[4].reshape(2, 32), np.tile(lane >= 2, (2, 1)))
    np.testing.assert_array_equal(y[5].reshape(2, 32), w[:, np.where(lane >= 2, lane - 2, lane)])
    np.testing.assert_array_equal(y[6].reshape(2, 32), np.where(lane < 12, w[:, lane ^ 3], -1))


def test_votes_match_redux(arch, order, rng):
    source = """extern "C" __global__ void f(const int* x, u32* y) {
        int t = threadIdx.x, v = x[t];
        y[t] = __ballot_sync(~0u, v & 1);
        y[t + 64] = __all_sync(~0u, v < 16) * 2 + __any_sync(~0u, v == 3);
        y[t + 128] = __match_any_sync(~0u, v);
        int all; u32 m = __match_all_sync(~0u, v / 16, &all);
        y[t + 192] = m + all;
        y[t + 256] = __reduce_add_sync(~0u, v);
        y[t + 320] = __reduce_min_sync(~0u, v - 8);
        y[t + 384] = __reduce_xor_sync(~0u, (u32)v);
        u32 mask = t & 1 ? 0xaaaaaaaau : 0x55555555u;
        y[t + 448] = __reduce_max_sync(mask, v);
        y[t + 512] = t % 32 >= 20 ? __activemask() : 0;
    }"""
    x = rng.integers(0, 16, 64).astype(np.int32)
    y = np.zeros((9, 64), np.uint32)
    run(source, "f", 1, 64, x, y, arch=arch, order=order)
    w, y = x.reshape(2, 32), y.reshape(9, 2, 32)
    bit = np.uint32(1) << np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(y[0], np.repeat(((w & 1) * bit).sum(1), 32).reshape(2, 32))
    np.testing.assert_array_equal(y[1], np.repeat(2 + (w == 3).any(1), 32).reshape(2, 32))
    np.testing.assert_array_equal(y[2], ((w[:, :, None] == w[:, None, :]) * bit).sum(2))
    np.testing.assert_array_equal(y[3], np.zeros((2, 32)))  # all lanes agree: 0xffffffff + 1
    np.testing.assert_array_equal(y[4], np.repeat(w.sum(1), 32).reshape(2, 32))
    np.testing.assert_array_equal(y[5].view(np.int32), np.repeat(w.min(1) - 8, 32).reshape(2, 32))
    np.testing.assert_array_equal(y[6], np.repeat(np.bitwise_xor.reduce(w, 1), 32).reshape(2, 32))
    parity = np.stack([w[:, 0::2].max(1), w[:, 1::2].max(1)], 1)
    np.testing.assert_array_equal(y[7], np.tile(parity, 16))
    if order == "min-pc":
        np.testing.assert_array_equal(y[8], np.tile(np.where(np.arange(32) >= 20, 0xFFF00000, 0), (2, 1)))


def test_atomics_with_duplicates(arch, order, rng):
    source = """extern "C" __global__ void f(const u32* x, u32* y, u64* z, float* w, u32* seen) {
        __shared__ u32 count[8];
        int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
        if (t < 8) count[t] = 0;
        __syncthreads();
        u32 v = x[i];
        u32 old = atomicAdd(&count[v % 8], 1u);
        seen[blockIdx.x * 1024 + (v % 8) * 128 + old] = 1;
        atomicMin(&y[0], v); atomicMax((int*)&y[1], (int)v - 500); atomicAnd(&y[2], v | 0xff); atomicOr(&y[3], v);
        atomicXor(&y[4], v); atomicInc(&y[5], 10u); atomicDec(&y[6], 7u); atomicAdd(&z[v % 3], (u64)v << 20);
        atomicAdd(&w[v % 2], 0.5f); atomicExch(&y[7], 77u);
        u32 assumed, now = y[8];
        do { assumed = now; now = atomicCAS(&y[8], assumed, assumed + v); } while (assumed != now);
        __syncthreads();
        if (t < 8) atomicAdd(&y[16 + t], count[t]);
    }"""
    x = rng.integers(0, 1000, 256).astype(np.uint32)
    y, z, w = np.zeros(24, np.uint32), np.zeros(3, np.uint64), np.zeros(2, np.float32)
    y[[0, 2]] = 0xFFFFFFFF
    y[1] = 0x80000000
    seen = np.zeros((2, 8, 128), np.uint32)
    run(source, "f", 2, 128, x, y, z, w, seen, arch=arch, order=order)
    assert y[0] == x.min()
    assert y[1].view(np.int32) == int(x.max()) - 500
    assert y[2] == np.bitwise_and.reduce(x | 0xFF)
    assert y[3] == np.bitwise_or.reduce(x)
    assert y[4] == np.bitwise_xor.reduce(x)
    assert y[5] == 256 % 11
    assert y[6] == (-256) % 8
    assert y[7] == 77
    assert y[8] == x.sum()
    np.testing.assert_array_equal(y[16:], np.bincount(x % 8, minlength=8))
    np.testing.assert_array_equal(z, [int(x[x % 3 == i].astype(np.uint64).sum()) << 20 for i in range(3)])
    np.testing.assert_array_equal(w, np.bincount(x % 2) * 0.5)
    for block in range(2):
        counts = np.bincount(x[128 * block : 128 * block + 128] % 8, minlength=8)
        np.testing.assert_array_equal(seen[block].sum(1), counts)  # every ticket was handed out once


def test_spin_waits_make_progress(arch, order, rng):
    source = """extern "C" __global__ void f(volatile int* flag, int* y) {
        int i = blockIdx.x, n = gridDim.x;
        if (threadIdx.x == 0) {
            if (i < n - 1) while (flag[i + 1] == 0) { }   // wait for the CTA above: the last goes first
            y[i] = i < n - 1 ? y[i + 1] + 1 : 1;
            __threadfence();
            flag[i] = 1;
        }
        __shared__ volatile int ready;
        if (threadIdx.x == 0) ready = 0;
        __syncthreads();
        if (threadIdx.x == 64) ready = 5;
        if (threadIdx.x < 32) { while (ready == 0) __nanosleep(20); y[n + i] = ready; }
    }"""
    n = 300  # more than one batch of CTAs: a batch that waits for the next is set aside
    flag, y = np.zeros(n, np.int32), np.zeros((2, n), np.int32)
    run(source, "f", n, 96, flag, y, arch=arch, order=order)
    np.testing.assert_array_equal(y[0], np.arange(n, 0, -1))
    np.testing.assert_array_equal(y[1], 5)


def test_a_lock_taken_by_every_thread(arch, order, rng):
    source = """extern "C" __global__ void f(int* lock, volatile int* y) {
        bool done = false;
        while (!done) {
            if (atomicCAS(lock, 0, 1) == 0) { y[0] = y[0] + 1; __threadfence(); atomicExch(lock, 0); done = true; }
        }
    }"""
    lock, y = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(source, "f", 2, 64, lock, y, arch=arch, order=order)
    assert y[0] == 128


def test_calls_recursion_and_structs(arch, order, rng):
    source = """struct S { int a[5]; double d; u8 c; };
    __device__ __noinline__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
    __device__ __noinline__ S twist(S s, int k) { for (int i = 0; i < 5; ++i) s.a[i] = s.a[4 - i] * k;
        s.d += k; s.c ^= k; return s; }
    extern "C" __global__ void f(S in, int* y, double* d) {
        int t = threadIdx.x;
        S s = in; s.a[t % 5] += t;
        if (t & 1) s = twist(s, t); else s = twist(twist(s, 2), 3);
        int total = s.c;
        for (int i = 0; i < 5; ++i) total += s.a[i] * (i + 1);
        y[t] = total + fib(t % 9);
        d[t] = s.d;
    }"""
    struct = np.zeros(1, np.dtype([("a", "i4", 5), ("d", "f8"), ("c", "u1")], align=True))
    struct["a"] = rng.integers(-50, 50, 5)
    struct["d"], struct["c"] = 2.5, 201
    y, d = np.zeros(64, np.int32), np.zeros(64)
    run(source, "f", 1, 64, struct.tobytes(), y, d, arch=arch, order=order)

    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    def twist(a, d, c, k):
        a = list(a)
        for i in range(5):
            a[i] = a[4 - i] * k
        return a, d + k, c ^ (k & 255)

    for t in range(64):
        state = ([int(v) for v in struct["a"][0]], 2.5, 201)
        state[0][t % 5] += t
        state = twist(*state, t) if t & 1 else twist(*twist(*state, 2), 3)
        assert y[t] == state[2] + sum(v * (i + 1) for i, v in enumerate(state[0])) + fib(t % 9)
        assert d[t] == state[1]


def test_grids_of_three_dimensions(arch, order, rng):
    source = """extern "C" __global__ void f(u32* y) {
        u32 b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
        u32 t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
        y[b * blockDim.x * blockDim.y * blockDim.z + t] = blockIdx.x | blockIdx.y << 4 | blockIdx.z << 8
            | threadIdx.x << 12 | threadIdx.y << 16 | threadIdx.z << 20;
    }"""
    y = np.zeros(24 * 30, np.uint32)
    run(source, "f", (2, 3, 4), (5, 3, 2), y, arch=arch, order=order)
    bz, by, bx, tz, ty, tx = np.indices((4, 3, 2, 2, 3, 5))
    np.testing.assert_array_equal(y, (bx | by << 4 | bz << 8 | tx << 12 | ty << 16 | tz << 20).reshape(-1))


def test_constants_globals_and_local_arrays(arch, order, rng):
    source = """__constant__ int table[8] = {3, 1, 4, 1, 5, 9, 2, 6};
    __device__ int counter = 40;
    __device__ const int* pointer = table + 2;
    extern "C" __global__ void f(const int* x, int* y) {
        int t = threadIdx.x, stack[16], top = 0;
        for (int i = 0; i < 16; ++i) stack[i] = -i;
        for (int i = 0; i < x[t]; ++i) stack[(top++ * 5) & 15] = table[(t + i) & 7] + i;
        int sum = 0;
        for (int i = 0; i < 16; ++i) sum = sum * 3 + stack[(i * x[t]) & 15];
        y[t] = sum + pointer[t & 3];
        if (t == 0) atomicAdd(&counter, 2);
        __syncthreads();
        if (t == 33) y[64] = *(volatile int*)&counter;
    }"""
    x = rng.integers(0, 20, 64).astype(np.int32)
    y = np.zeros(65, np.int32)
    run(source, "f", 1, 64, x, y, arch=arch, order=order)
    table = [3, 1, 4, 1, 5, 9, 2, 6]
    for t in range(64):
        stack = [-i for i in range(16)]
        for i in range(x[t]):
            stack[i * 5 & 15] = table[(t + i) & 7] + i
        total = 0
        for i in range(16):
            total = total * 3 + stack[i * int(x[t]) & 15]
        assert y[t] == np.int64(total + table[2 + (t & 3)]).astype(np.int32)
    assert y[64] == 42


def test_vector_access_and_small_types(arch, order, rng):
    source = """extern "C" __global__ void f(const float4* a, const u8* b, const short* c, float4* d, int* e, u64* g) {
        int t = threadIdx.x;
        float4 v = a[t];
        d[t] = make_float4(v.w, v.z * 2.0f, v.y, v.x);
        e[t] = b[t] - (signed char)b[t] + c[t];
        ((u8*)(e + 64))[t] = (u8)(b[t] * 3);
        g[t] = __umul64hi((u64)b[t] << 60, (u64)c[t] * 0x123456789ull) + (u64)__popcll((u64)c[t])
            + __clz(t) + __brev(t);
    }"""
    a = rng.standard_normal((64, 4)).astype(np.float32)
    b, c = rng.integers(0, 256, 64).astype(np.uint8), rng.integers(-3000, 3000, 64).astype(np.int16)
    d, e, g = np.zeros_like(a), np.zeros(128, np.int32), np.zeros(64, np.uint64)
    run(source, "f", 1, 64, a, b, c, d, e, g, arch=arch, order=order)
    np.testing.assert_array_equal(d, a[:, ::-1] * np.float32([1, 2, 1, 1]))
    np.testing.assert_array_equal(e[:64], b.astype(int) - b.view(np.int8) + c)
    np.testing.assert_array_equal(e[64:80].view(np.uint8), b * np.uint8(3))
    for t in range(64):
        wide = int(c[t]) % 2**64
        high = (int(b[t]) << 60) % 2**64 * (wide * 0x123456789 % 2**64) >> 64
        rest = wide.bit_count() + 32 - t.bit_length() + int(f"{t:032b}"[::-1], 2)
        assert int(g[t]) == (high + rest) % 2**64


def test_barriers_with_names_and_counts(arch, order, rng):
    source = """extern "C" __global__ void f(int* y) {
        __shared__ int box[64];
        int t = threadIdx.x;
        if (t < 64) {                                        // producers arrive and go on
            box[t] = t * 3;
            asm volatile("bar.arrive 2, 128;" ::: "memory");
        } else {
            asm volatile("bar.sync 2, 128;" ::: "memory");
            y[t - 64] = box[127 - t];
        }
        y[64 + t] = __syncthreads_count(t % 3 == 0) * 4 + __syncthreads_or(t == 5) * 2 + __syncthreads_and(t < 127);
    }"""
    y = np.zeros(192, np.int32)
    run(source, "f", 1, 128, y, arch=arch, order=order)
    np.testing.assert_array_equal(y[:64], np.arange(63, -1, -1) * 3)
    np.testing.assert_array_equal(y[64:], 43 * 4 + 2)


def test_narrow_formats(arch, order, rng):
    source = """extern "C" __global__ void f(const float* x, u16* q, u32* h) {
        int t = threadIdx.x;
        float a = x[2 * t], b = x[2 * t + 1];
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(q[t]) : "f"(b), "f"(a));
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(h[t]) : "f"(b), "f"(a));
    }"""
    import ml_dtypes

    x = (rng.standard_normal(128) * 60).astype(np.float32)
    q, h = np.zeros(64, np.uint16), np.zeros(64, np.uint32)
    run(source, "f", 1, 64, x, q, h, arch=arch, order=order)
    np.testing.assert_array_equal(q.view(ml_dtypes.float8_e4m3fn), x.astype(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(h.view(ml_dtypes.bfloat16), x.astype(ml_dtypes.bfloat16))


def test_early_exit_before_a_barrier(arch, order, rng):
    source = """extern "C" __global__ void f(int* y) {
        if (threadIdx.x >= 70) return;
        __syncthreads();
        y[threadIdx.x] = __popc(__activemask());
    }"""
    y = np.zeros(70, np.int32)
    run(source, "f", 3, 100, y, arch=arch, order=order)
    np.testing.assert_array_equal(y > 0, True)


def test_a_jump_table(arch, order, rng):
    ptx = """.version 8.0
    .target sm_90
    .address_size 64
    .visible .entry f(.param .u64 y) {
        .reg .b32 %r<4>; .reg .b64 %rd<4>;
        mov.u32 %r1, %tid.x;
        and.b32 %r2, %r1, 3;
        ld.param.u64 %rd1, [y];
        mad.wide.u32 %rd2, %r1, 4, %rd1;
    table: .branchtargets A, B, C, B;
        brx.idx %r2, table;
    A:  mov.u32 %r3, 10;
        bra.uni done;
    B:  mov.u32 %r3, 20;
        bra.uni done;
    C:  mov.u32 %r3, 30;
    done: st.global.u32 [%rd2], %r3;
        ret;
    }"""
    y = np.zeros(64, np.int32)
    run_ptx(ptx, "f", 1, 64, y, arch=arch, order=order)
    np.testing.assert_array_equal(y.reshape(-1, 4), np.tile([10, 20, 30, 20], (16, 1)))




def test_one_load_over_every_space(arch, order, rng):
    source = """struct Table { int v[8]; };
    __constant__ int fixed[8] = {80, 81, 82, 83, 84, 85, 86, 87};
    __device__ __noinline__ int pick(const int* p, int i) { return p[i]; }
    extern "C" __global__ void f(const __grid_constant__ Table given, const int* x, int* y) {
        __shared__ int shared[8];
        int local[8];
        const int t = threadIdx.x;
        for (int i = 0; i < 8; ++i) local[i] = 100 * t + i;
        if (t < 8) shared[t] = 50 + t;
        __syncthreads();
        const int* p = t % 5 == 0 ? given.v : t % 5 == 1 ? fixed : t % 5 == 2 ? shared : t % 5 == 3 ? local : x;
        y[t] = pick(p, t & 7);
    }"""
    given = rng.integers(0, 1000, 8).astype(np.int32)
    x, y = rng.integers(0, 1000, 8).astype(np.int32), np.zeros(64, np.int32)
    run(source, "f", 1, 64, given.tobytes(), x, y, arch=arch, order=order)
    t = np.arange(64)
    at = t & 7
    np.testing.assert_array_equal(y, np.choose(t % 5, [given[at], 80 + at, 50 + at, 100 * t + at, x[at]]))


def test_elements_of_a_structure_by_value(arch, order, rng):
    source = """struct Mixed { char a; short b; double c; float d[3]; char e; };
    __device__ __noinline__ Mixed turned(Mixed m, int by) {
        Mixed r = m;
        for (int i = 0; i < 3; ++i) r.d[i] = m.d[(i + by) % 3];
        r.a += by; r.b -= by; r.c *= 2; r.e = m.a;
        return r;
    }
    extern "C" __global__ void f(Mixed m, double* y) {
        const int t = threadIdx.x;
        Mixed r = turned(turned(m, t), 1);
        double* out = y + 7 * t;
        out[0] = r.a; out[1] = r.b; out[2] = r.c; out[3] = r.d[0]; out[4] = r.d[1]; out[5] = r.d[2]; out[6] = r.e;
    }"""
    form = np.dtype({"names": list("abcde"), "formats": ["i1", "i2", "f8", ("f4", 3), "i1"],
                     "offsets": [0, 2, 8, 16, 28], "itemsize": 32})  # fmt: skip
    m = np.zeros(1, form)
    m["a"], m["b"], m["c"], m["d"], m["e"] = 7, -300, 1.5, rng.integers(0, 99, 3), 9
    y = np.zeros((32, 7))
    run(source, "f", 1, 32, m.tobytes(), y, arch=arch, order=order)
    for t in range(32):
        want = [7 + t + 1, -300 - t - 1, 6.0, *np.roll(m["d"][0], -(t + 1)), 7 + t]
        assert y[t].tolist() == want
