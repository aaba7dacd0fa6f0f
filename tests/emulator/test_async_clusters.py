"""mbarriers and bulk copies across the CTAs of a cluster, under every completion schedule."""

import numpy as np
import pytest
from asynchronous import all_schedules, launch

from dsv4_rt.errors import Deadlock, KernelFault

# CTA 0 of each pair multicasts tiles to both; the consumers of both give slots back to CTA 0's barriers.
SHARE = """
constexpr int STAGES = 2, WORDS = 64;
extern "C" __global__ void share(const u32* x, u32* y, int steps) {
    __shared__ alignas(128) u32 tile[STAGES][WORDS];
    __shared__ u64 full[STAGES], empty[STAGES];
    const u32 t = threadIdx.x, rank = cluster_rank();
    if (t == 0) {
        for (int s = 0; s < STAGES; ++s) { bar_init(&full[s], 1); bar_init(&empty[s], 4); }
        fence_init();
    }
    cluster_sync();
    if (t < 32) {
        if (t == 0)
            for (int k = 0; k < steps; ++k) {
                int s = k % STAGES;
                if (k >= STAGES) cluster_wait(&empty[s], (k / STAGES - 1) & 1);
                bar_expect(&full[s], WORDS * 4);
                if (rank == 0) bulk_load_multicast(tile[s], x + k * WORDS, WORDS * 4, &full[s], 3);
            }
    } else {
        u32 sum = 0;
        for (int k = 0; k < steps; ++k) {
            int s = k % STAGES;
            cluster_wait(&full[s], k / STAGES & 1);
            sum += tile[s][t - 32] * (k + 1);
            __syncwarp();
            if (t % 32 == 0) for (u32 r = 0; r < 2; ++r) remote_arrive(&empty[s], r);
        }
        y[blockIdx.x * 64 + t - 32] = sum + rank;
    }
    cluster_sync();
}
"""


def share(rng, change=("", ""), **options):
    assert change[0] in SHARE
    x = rng.integers(0, 1 << 20, (7, 64), np.uint32)
    y = np.full((4, 64), 0xA5, np.uint32)
    launch(SHARE.replace(*change), "share", 4, 96, x, y, np.int32(7), cluster=2, **options)
    want = (x * np.arange(1, 8, dtype=np.uint32)[:, None]).sum(axis=0, dtype=np.uint32)
    assert np.array_equal(y, want + np.array([0, 1, 0, 1], np.uint32)[:, None])


@all_schedules
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
def test_multicast_with_slots_given_back_across_ctas(rng, order, completion):
    share(rng, order=order, completion=completion, seed=int(rng.integers(1000)))


BUGS = {
    "no cluster barrier after init": ("cluster_sync();\n    if", "__syncthreads();\n    if", KernelFault,
                                      "never initialised|orders it after the init"),
    "the neighbour is not asked": ("for (u32 r = 0; r < 2; ++r) remote_arrive(&empty[s], r)",
                                   "for (u32 r = 0; r < 2; ++r) bar_arrive(&empty[s])", (KernelFault, Deadlock),
                                   "WAR race on shared memory: cp.async.bulk|asynchronous cp.async.bulk|arrivals"),
    "slots of half the consumers": ("bar_init(&empty[s], 4)", "bar_init(&empty[s], 2)",
                                    (KernelFault, Deadlock), "WAR race on shared memory: cp.async.bulk|arrivals"),
    "a mask beyond the cluster": ("&full[s], 3)", "&full[s], 7)", KernelFault, "ctaMask 0x0007 in a cluster of 2"),
    "an empty mask": ("&full[s], 3)", "&full[s], 0)", KernelFault, "ctaMask 0x0000"),
    "one CTA forgotten": ("&full[s], 3)", "&full[s], 1)", Deadlock, "256 transaction bytes pending"),
    "one CTA expects nothing": ("bar_expect(&full[s], WORDS * 4);", "if (rank) bar_arrive(&full[s]); else "
                                "bar_expect(&full[s], WORDS * 4);", (KernelFault, Deadlock),
                                "transaction bytes|asynchronous cp.async.bulk|uninitialised shared memory"),
    "an arrival at a CTA that does not exist": ("remote_arrive(&empty[s], r)", "remote_arrive(&empty[s], r + 1)",
                                                (KernelFault, Deadlock), "rank 2"),
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_across_ctas_is_reported(rng, bug, completion):
    old, new, error, message = BUGS[bug]
    with pytest.raises(error, match=message) as caught:
        share(rng, change=(old, new), completion=completion)
    assert "PTX line" in str(caught.value)


PUSH = """
extern "C" __global__ void push(const u32* x, u32* y) {
    __shared__ alignas(16) u32 mine[64], theirs[64];
    __shared__ u64 bar;
    const u32 t = threadIdx.x, rank = cluster_rank(), next = (rank + 1) % 4;
    if (t == 0) { bar_init(&bar, 1); bar_expect(&bar, 256); fence_init(); }
    mine[t] = x[blockIdx.x * 64 + t];
    FENCE
    cluster_sync();
    if (t == 0) bulk_copy_to(next, theirs, mine, 256, &bar);
    WAIT
    y[blockIdx.x * 64 + t] = theirs[t];
    cluster_sync();
}
"""


def push(rng, fence="fence_async();", wait="cluster_wait(&bar, 0);", **options):
    x = rng.integers(0, 1 << 31, (8, 64), np.uint32)
    y = np.full_like(x, 0xA5)
    launch(PUSH.replace("FENCE", fence).replace("WAIT", wait), "push", 8, 64, x, y, cluster=4, **options)
    assert np.array_equal(y, x[[3, 0, 1, 2, 7, 4, 5, 6]])


@all_schedules
def test_a_bulk_copy_to_the_neighbour(rng, completion):
    push(rng, completion=completion)


@all_schedules
def test_a_bulk_copy_to_the_neighbour_without_fence_or_wait(rng, completion):
    with pytest.raises(KernelFault, match=r"no fence.proxy.async(.|\n)*PTX line"):
        push(rng, fence="", completion=completion)
    with pytest.raises(KernelFault, match=r"reads the destination of an asynchronous cp.async.bulk(.|\n)*PTX line"):
        push(rng, wait="", completion=completion)


GIVE = """
extern "C" __global__ void give(const u32* x, u32* y) {
    __shared__ u32 box[64];
    __shared__ u64 bar;
    const u32 t = threadIdx.x, other = cluster_rank() ^ 1;
    if (t == 0) { bar_init(&bar, 64); fence_init(); }
    cluster_sync();
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(at_rank(&box[63 - t], other)), "r"(x[blockIdx.x * 64 + t]));
    remote_arrive(&bar, other);
    WAIT
    y[blockIdx.x * 64 + t] = box[t];
    cluster_sync();
}
"""


@all_schedules
def test_stores_to_a_neighbour_with_an_mbarrier_between(rng, completion):
    x = rng.integers(0, 1 << 31, (4, 64), np.uint32)
    y = np.full_like(x, 0xA5)
    launch(GIVE.replace("WAIT", "cluster_wait(&bar, 0);"), "give", 4, 64, x, y, cluster=2, completion=completion)
    assert np.array_equal(y, x[[1, 0, 3, 2], ::-1])
    with pytest.raises(KernelFault, match="RAW race on shared memory|uninitialised"):
        launch(GIVE.replace("WAIT", ""), "give", 4, 64, x, y, cluster=2, completion=completion)


LETTER = """
extern "C" __global__ void letter(u32* y) {
    __shared__ u32 box[32];
    __shared__ u64 come;
    const u32 t = threadIdx.x, rank = cluster_rank();
    if (t == 0) { bar_init(&come, 1); fence_init(); }
    cluster_sync();
    if (rank == 1 && t < 32) {
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"((u32)__cvta_generic_to_shared(&box[t])));
        asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(there), "r"(t) : "memory");
        __syncwarp();
        if (t == 0) remote_arrive(&come, 0);
    }
    if (rank == 0 && t == 0) cluster_wait(&come, 0);
    if (EVERYBODY || rank == 0) __syncthreads();
    if (rank == 0 && t >= 96) y[t - 96] = box[t - 96];
}
"""


@all_schedules
@pytest.mark.parametrize("everybody", [0, 1])
def test_a_block_barrier_tells_all_threads_what_one_knows_of_another_cta(everybody, completion):
    y = np.full(32, 0xA5, np.uint32)
    launch(LETTER.replace("EVERYBODY", str(everybody)), "letter", 2, 128, y, cluster=2, completion=completion)
    np.testing.assert_array_equal(y, np.arange(32))
    alone = LETTER.replace("    if (EVERYBODY || rank == 0) __syncthreads();\n", "")
    with pytest.raises(KernelFault, match="RAW race on shared memory|uninitialised shared memory"):
        launch(alone, "letter", 2, 128, y, cluster=2, completion=completion)
