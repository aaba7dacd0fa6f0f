"""A pipelined GEMM: one producer warp, bulk copies, a ring of mbarriers, two warpgroups of wgmma, a bulk store."""

import numpy as np
import pytest
from asynchronous import COMPLETIONS, WRAPPERS, all_schedules
from programs import PRELUDE, compile_ptx, run_ptx
from tensor_programs import WGMMA_HELPERS, bits_of, descriptor, image_k_major, wgmma_function

from dsv4_rt.emulator import Machine
from dsv4_rt.errors import Deadlock, KernelFault

# Tiles of A [128, 64] and B [128, 64] come from global memory as shared-memory images with the 128-byte swizzle.
GEMM = """
constexpr int STAGES = 4, TILE = 16384;
extern "C" __global__ void __launch_bounds__(384) gemm(const u8* a, const u8* b, float* d, int steps, u64 rest) {
    extern __shared__ __align__(1024) u8 ring[];
    __shared__ u64 full[STAGES], empty[STAGES];
    const u32 t = threadIdx.x, group = t / 128;
    if (t == 0) {
        for (int s = 0; s < STAGES; ++s) { bar_init(&full[s], 1); bar_init(&empty[s], 8); }
        fence_init();
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (t == 0)
            for (int k = 0; k < steps; ++k) {
                int s = k % STAGES;
                bar_wait(&empty[s], (k / STAGES & 1) ^ 1);                          // the slot is free
                bar_expect(&full[s], 2 * TILE);
                bulk_load(ring + s * 2 * TILE, a + (u64)k * TILE, TILE, &full[s]);
                bulk_load(ring + s * 2 * TILE + TILE, b + (u64)k * TILE, TILE, &full[s]);
            }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float acc[64];
    for (int i = 0; i < 64; ++i) acc[i] = 0;
    for (int k = 0; k < steps; ++k) {
        int s = k % STAGES;
        bar_wait(&full[s], k / STAGES & 1);                                         // the tiles are there
        u64 da = matrix(ring + s * 2 * TILE + (group - 1) * 8192, rest), db = matrix(ring + s * 2 * TILE + TILE, rest);
        wg_fence();
        for (int i = 0; i < 4; ++i) wgmma(acc, da + 2 * i, db + 2 * i, 1);
        wg_commit();
        wg_wait<1>();                                                               // all but this step
        if (k > 0 && t % 32 == 0) bar_arrive(&empty[(k - 1) % STAGES]);
    }
    wg_wait<0>();
    float* out = (float*)ring + (t - 128) * 64;                                     // reuses the ring
    asm volatile("bar.sync 1, 256;" ::: "memory"); // both groups are done with it
    for (int i = 0; i < 64; ++i) out[i] = acc[i];
    fence_async();                                                                  // each writer
    asm volatile("bar.sync 1, 256;" ::: "memory");
    if (t == 128) { bulk_store(d, ring, 65536); bulk_commit(); bulk_wait<0>(); }
}
"""
SOURCE = PRELUDE + WRAPPERS + WGMMA_HELPERS + wgmma_function(128, "f32", "bf16", "bf16") + GEMM


def gemm(rng, depth, change=("", ""), **options):
    """A launch, compared with NumPy."""
    assert change[0] in SOURCE
    left, right = (bits_of("bf16", rng.standard_normal((128, depth))) for _ in "ab")
    a, b = (
        np.concatenate([image_k_major(np.ascontiguousarray(m[:, k : k + 64]), 128) for k in range(0, depth, 64)])
        for m in (left, right)
    )
    x, y = ((m.astype(np.uint32) << 16).view(np.float32) for m in (left, right))
    d = np.full((256, 64), -1, np.float32)
    ptx = compile_ptx(SOURCE.replace(*change), "sm_90a")
    machine = Machine("sm_90a", **options)
    rest = descriptor(16, 1024, 128)
    run_ptx(ptx, "gemm", 1, 384, a, b, d, np.int32(depth // 64), rest, machine=machine, shared=131072 + 1024)
    thread, i = np.indices(d.shape)
    row = thread // 128 * 64 + thread % 128 // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    column = i // 4 * 8 + thread % 4 * 2 + i % 2
    want = x.astype(np.float64) @ y.T.astype(np.float64)
    # Of each sum of 17 terms every term is cut below 2^-25 of the largest, and the result to fp32 (`mma.py`).
    bound = depth / 16 * (17 * 2.0**-25 + 2.0**-23) * np.abs(x.astype(np.float64)) @ np.abs(y.T.astype(np.float64))
    assert (np.abs(d - want[row, column]) <= bound[row, column]).all()


@all_schedules
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
def test_equals_numpy(rng, order, completion):
    gemm(rng, 640, order=order, completion=completion, seed=int(rng.integers(1000)))


BUGS = {
    "no wait for the slot": ("bar_wait(&empty[s], (k / STAGES & 1) ^ 1);", "", KernelFault,
                             "asynchronous (wgmma|cp.async.bulk)|more arrivals"),
    "no wait for the tiles": ("bar_wait(&full[s], k / STAGES & 1);", "", KernelFault,
                              "reads the destination of an asynchronous cp.async.bulk|uninitialised"),
    "the slot goes back a step early": (
        "if (k > 0 && t % 32 == 0) bar_arrive(&empty[(k - 1) % STAGES])", "if (t % 32 == 0) bar_arrive(&empty[s])",
        KernelFault, "overwrites the source of an asynchronous wgmma"),
    "the ring is reused before it is read": ("wg_wait<0>();\n    float", "float", KernelFault, "wgmma"),
    "one group does not wait for the other": ('"bar.sync 1, 256;" ::: "memory"); // both', '"" ::: "memory"); // both',
                                              KernelFault, "asynchronous wgmma"),
    "no proxy fence": ("fence_async();  ", "", KernelFault, "no fence.proxy.async"),
    "the fence of one writer": ("fence_async();  ", "if (t == 128) fence_async();", KernelFault,
                                "no fence.proxy.async"),
    "half the bytes": ("bar_expect(&full[s], 2 * TILE)", "bar_expect(&full[s], TILE)", (KernelFault, Deadlock),
                       "transaction bytes|asynchronous cp.async.bulk"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_a_bug_is_reported(rng, bug, completion):
    old, new, error, message = BUGS[bug]
    with pytest.raises(error, match=message) as caught:
        gemm(rng, 640, change=(old, new), completion=completion)
    assert "PTX line" in str(caught.value)
