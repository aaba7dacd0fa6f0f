"""Clusters: what CTAs of one see of each other, their barrier, and the bugs only they can have."""

from dataclasses import dataclass

import numpy as np
import pytest
from programs import ORDERS, PRELUDE, compile_ptx, line_of, run, run_ptx, write_source
from tensor_programs import fragments, values_of
from test_wgmma import integers, layout
from test_wgmma import source as wgmma_source

from dsv4_rt.emulator import Machine
from dsv4_rt.errors import Deadlock, KernelFault, LaunchError
from dsv4_rt.launch import load

CLUSTERS = [((2, 1, 1), (4, 2, 1)), ((1, 2, 1), (2, 4, 1)), ((2, 2, 1), (4, 2, 2)), ((1, 1, 2), (1, 1, 4)),
            ((2, 1, 2), (2, 1, 2)), ((8, 1, 1), (16, 1, 1)), ((4, 2, 2), (4, 2, 2))]  # fmt: skip
HELPERS = """
__device__ u32 saddr(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ u32 mapa(u32 a, u32 rank) {
    u32 r; asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank)); return r; }
__device__ u32 rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ u32 size() { u32 r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
__device__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ void sync() { arrive(); wait(); }
__device__ u32 remote_load(u32 a) {
    u32 v; asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory"); return v; }
__device__ void remote_store(u32 a, u32 v) {
    asm volatile("st.shared::cluster.u32 [%0], %1;" :: "r"(a), "r"(v) : "memory"); }
"""
FACTS = HELPERS + """
extern "C" __global__ void facts(u32* out) {
    __shared__ u32 box[4];
    u32 t[16], s = saddr(box), r32, rk, rk64, q[6], remap;
    u64 own = (u64)(void*)box, r64;
    asm volatile("mov.u32 %0, %%cluster_ctaid.x; mov.u32 %1, %%cluster_ctaid.y; mov.u32 %2, %%cluster_ctaid.z;"
                 : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]));
    asm volatile("mov.u32 %0, %%cluster_nctaid.x; mov.u32 %1, %%cluster_nctaid.y; mov.u32 %2, %%cluster_nctaid.z;"
                 : "=r"(t[3]), "=r"(t[4]), "=r"(t[5]));
    asm volatile("mov.u32 %0, %%clusterid.x; mov.u32 %1, %%clusterid.y; mov.u32 %2, %%clusterid.z;"
                 : "=r"(t[6]), "=r"(t[7]), "=r"(t[8]));
    asm volatile("mov.u32 %0, %%nclusterid.x; mov.u32 %1, %%nclusterid.y; mov.u32 %2, %%nclusterid.z;"
                 : "=r"(t[9]), "=r"(t[10]), "=r"(t[11]));
    asm volatile("{.reg .pred p; mov.pred p, %%is_explicit_cluster; selp.u32 %0, 1, 0, p;}" : "=r"(t[12]));
    u32 peer = (rank() + 1) % size();
    r32 = mapa(s, peer);
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r64) : "l"(own), "r"(peer));
    asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(rk) : "r"(r32));
    asm volatile("getctarank.u64 %0, %1;" : "=r"(rk64) : "l"(r64));
    remap = mapa(r32, rank());
    #define ISSPACE(i, space, a) asm volatile("{.reg .pred p; isspacep." space " p, %1; selp.u32 %0, 1, 0, p;}" \\
                                              : "=r"(q[i]) : "l"(a))
    ISSPACE(0, "shared::cta", own); ISSPACE(1, "shared::cta", r64); ISSPACE(2, "shared::cluster", own);
    ISSPACE(3, "shared::cluster", r64); ISSPACE(4, "shared", r64); ISSPACE(5, "global", r64);
    box[0] = 1000 + rank();
    sync();
    u32 first = remote_load(s & 0xffffff), other;
    asm volatile("ld.u32 %0, [%1];" : "=r"(other) : "l"(r64));
    sync();
    u32* o = out + 32 * (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    for (int i = 0; i < 13; ++i) o[i] = t[i];
    o[13] = rank(); o[14] = size(); o[15] = s; o[16] = r32; o[17] = rk; o[18] = rk64; o[19] = remap;
    for (int i = 0; i < 6; ++i) o[20 + i] = q[i];
    o[26] = first; o[27] = other; o[28] = (u32)own == s && (u32)r64 == r32;
}
"""


def expected_facts(cluster, grid):
    """What an H200 returned for these kernels (the numbering of ranks, addresses with the rank from bit 24 on)."""
    n, size = int(np.prod(grid)), int(np.prod(cluster))
    rows = np.zeros((n, 32), np.uint32)
    clusters = [g // c for g, c in zip(grid, cluster, strict=True)]
    for i, row in enumerate(rows):
        ctaid = (i % grid[0], i // grid[0] % grid[1], i // (grid[0] * grid[1]))
        inside = [a % c for a, c in zip(ctaid, cluster, strict=True)]
        rank = inside[0] + cluster[0] * (inside[1] + cluster[1] * inside[2])
        peer = (rank + 1) % size
        own = 0x400 + (rank << 24)
        row[:13] = [*inside, *cluster, *(a // c for a, c in zip(ctaid, cluster, strict=True)), *clusters, 1]
        row[13:20] = [rank, size, own, 0x400 + (peer << 24), peer, peer, own]
        row[20:29] = [1, size == 1, 1, 1, size == 1, 0, 1000, 1000 + peer, 1]
    return rows


def kernel(tmp_path, source, name, device):
    """A kernel of a source on a device, so that a GPU can judge the test."""
    path = tmp_path / "program.cu"
    path.write_text(PRELUDE + source)
    return load(str(path), name, device)


@pytest.mark.parametrize(("cluster", "grid"), CLUSTERS)
def test_ids_and_addresses_are_those_of_the_hardware(device, tmp_path, cluster, grid):
    n = int(np.prod(grid))
    out = device.array(np.zeros((n, 32), np.uint32))
    kernel(tmp_path, FACTS, "facts", device).launch(grid, 1, out, cluster=cluster)
    assert np.array_equal(device.numpy(out), expected_facts(cluster, grid))


def test_a_launch_without_clusters_is_one_cta_a_cluster():
    out = np.zeros((2, 32), np.uint32)
    run(FACTS, "facts", 2, 1, out)
    want = expected_facts((1, 1, 1), (2, 1, 1))
    want[:, 12] = 0  # not explicit
    assert np.array_equal(out, want)
    run(FACTS, "facts", 2, 1, out, cluster=1)
    assert np.array_equal(out, expected_facts((1, 1, 1), (2, 1, 1)))


EXCHANGE = HELPERS + """
// Every CTA adds its numbers into rank 0 by atomics, reads all others, and stores to its right neighbour.
extern "C" __global__ void exchange(const u32* x, u32* y, int n) {
    __shared__ u32 mine[64], box[64], total;
    u32 t = threadIdx.x, cta = blockIdx.x;
    mine[t] = x[64 * cta + t];
    if (t == 0) total = 0;
    sync();
    u32 sum = 0;
    for (u32 r = 0; r < size(); ++r) sum += remote_load(mapa(saddr(&mine[63 - t]), r));
    u32 right = mapa(saddr(&box[t]), (rank() + 1) % size());
    remote_store(right, mine[t] * 3);
    asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" :: "r"(mapa(saddr(&total), 0)), "r"(mine[t]));
    u64 generic;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"((u64)(void*)&total), "r"(0));
    sync();
    y[(64 * cta + t) * 3] = sum;
    y[(64 * cta + t) * 3 + 1] = box[t];
    y[(64 * cta + t) * 3 + 2] = *(u32*)generic;
    sync();
}
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_exchange_through_distributed_shared_memory(rng, size, order):
    x = rng.integers(0, 1000, (16, 64)).astype(np.uint32)
    y = np.full((16, 64, 3), 0xFFFFFFFF, np.uint32)
    run(EXCHANGE, "exchange", 16, 64, x, y, np.int32(0), cluster=size, order=order, seed=int(rng.integers(100)))
    check_exchange(x, y, size)


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_exchange_on_every_device(device, rng, tmp_path, size):
    x = rng.integers(0, 1000, (16, 64)).astype(np.uint32)
    y = device.array(np.full((16, 64, 3), 0xFFFFFFFF, np.uint32))
    ready = kernel(tmp_path, EXCHANGE, "exchange", device)
    ready.launch(16, 64, device.array(x), y, np.int32(0), cluster=(size,))
    check_exchange(x, device.numpy(y), size)


def check_exchange(x, y, size):
    parts = x.reshape(-1, size, 64)
    assert np.array_equal(y[..., 0].reshape(-1, size, 64), np.repeat(parts.sum(1)[:, None, ::-1], size, 1))
    assert np.array_equal(y[..., 1].reshape(-1, size, 64), 3 * np.roll(parts, 1, 1))
    totals = np.broadcast_to(parts.sum((1, 2))[:, None, None], parts.shape)
    assert np.array_equal(y[..., 2].reshape(-1, size, 64), totals)


def test_matrices_and_copies_of_every_rank(device, rng, tmp_path):
    """Instructions that take shared addresses in other ways: their addresses carry the rank too."""
    source = HELPERS + """extern "C" __global__ void pieces(const uint4* x, u32* y) {
        __shared__ alignas(128) uint4 tile[32]; u32 t = threadIdx.x, a, b;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(saddr(&tile[t])), "l"(x + 32 * blockIdx.x + t));
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncwarp();
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(a) : "r"(saddr(&tile[t & 7])));
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.b16 {%0}, [%1];" : "=r"(b) : "l"((u64)&tile[t & 7]));
        __syncwarp();
        u32 to = saddr(&tile[8 + (t & 7)]);
        asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" :: "r"(to), "r"(a + b));
        __syncwarp();
        y[32 * blockIdx.x + t] = ((u32*)tile)[32 + t];
        sync();
    }"""
    x = rng.integers(0, 1 << 15, (4, 32, 4), dtype=np.uint32)
    y = device.array(np.zeros((4, 32), np.uint32))
    kernel(tmp_path, source, "pieces", device).launch(4, 32, device.array(x), y, cluster=(4,))
    assert np.array_equal(device.numpy(y), 2 * x.reshape(4, 128)[:, :32])


def test_cluster_dims_of_the_kernel_hold_without_a_launch_attribute():
    source = HELPERS + """extern "C" __global__ void __cluster_dims__(4, 1, 1) dims(u32* y) {
        if (threadIdx.x == 0) y[blockIdx.x] = rank() + 10 * size(); }"""
    y = np.zeros(8, np.uint32)
    run(source, "dims", 8, 32, y)
    assert y.tolist() == [40, 41, 42, 43] * 2
    with pytest.raises(LaunchError, match=r"cluster \(2, 1, 1\); the kernel requires \(4, 1, 1\)"):
        run(source, "dims", 8, 32, y, cluster=2)
    with pytest.raises(LaunchError, match=r"clusters of \(4, 1, 1\) do not divide the grid \(6, 1, 1\)"):
        run(source, "dims", 6, 32, y)


def test_refuses_clusters_that_no_gpu_has():
    with pytest.raises(LaunchError, match=r"a cluster has 1 to 16 CTAs, not \(32, 1, 1\)"):
        run(FACTS, "facts", 32, 1, np.zeros(1024, np.uint32), cluster=32)


@dataclass(frozen=True)
class Plant:
    """A kernel of 4 CTAs of 64 threads in clusters of 2, right without MUTANT. BUG marks the line of the report."""

    body: str
    message: str
    error: type = KernelFault
    orders: tuple[str, ...] = ORDERS


PLANTS = {
    "no barrier before the exit": Plant(
        """mine[t] = x[i]; sync();
        y[i] = remote_load(mapa(saddr(&mine[t]), rank() ^ 1)); // BUG
        #ifndef MUTANT
        sync();
        #endif""",
        r"the CTA exits while others may still access its shared memory|whose CTA has exited",
    ),
    "the owner is gone when the load comes": Plant(
        """mine[t] = x[i]; sync();
        #ifdef MUTANT
        if (rank() == 1) return;
        #endif
        y[i] = remote_load(mapa(saddr(&mine[t]), rank() ^ 1)); // BUG
        sync();""",
        r"access to the shared memory of rank 1, whose CTA has exited", orders=("reverse",),
    ),
    "an asynchronous store with a foreign mbarrier": Plant(
        """__shared__ u64 bar;
        if (t == 0) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 64;" :: "r"(saddr(&bar)) : "memory");
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        sync();
        u32 to = mapa(saddr(&mine[t]), rank() ^ 1), b = mapa(saddr(&bar), rank() ^ 1);
        #ifdef MUTANT
        b = saddr(&bar);
        #endif
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 4;" :: "r"(saddr(&bar)) : "memory");
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" // BUG
                     :: "r"(to), "r"(x[i]), "r"(b) : "memory");
        asm volatile("{\\n.reg .pred P;\\nAGAIN:\\nmbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\\n"
                     "@P bra DONE;\\nbra AGAIN;\\nDONE:\\n}" :: "r"(saddr(&bar)) : "memory");
        y[i] = mine[t]; sync();""",
        r"st.async to rank 1 with an mbarrier of rank 0, not of one CTA",
    ),
    "store before the owner has read": Plant(
        """mine[t] = x[i]; sync();
        u32 v = mine[63 - t];
        #ifndef MUTANT
        sync();
        #endif
        remote_store(mapa(saddr(&mine[t]), rank() ^ 1), v); // BUG
        sync(); y[i] = mine[63 - t];""",
        "WAR race|RAW race",
    ),
    "load before the other has written": Plant(
        """mine[t] = x[i];
        #ifndef MUTANT
        sync();
        #endif
        y[i] = remote_load(mapa(saddr(&mine[t]), rank() ^ 1)); // BUG
        sync();""",
        "RAW race|WAR race|uninitialised shared",
    ),
    "an atomic on a pair of halves, which an H200 adds as an integer": Plant(
        """mine[t] = x[i]; sync();
        u32 a = mapa(saddr(&mine[t]), rank() ^ 1);
        #ifdef MUTANT
        asm volatile("red.relaxed.cluster.shared::cluster.add.noftz.f16x2 [%0], %1;" :: "r"(a), "r"(7)); // BUG
        #else
        asm volatile("red.relaxed.cluster.shared::cluster.add.u32 [%0], %1;" :: "r"(a), "r"(7));
        #endif
        sync(); y[i] = mine[t];""",
        "add.f16x2 in the shared memory of another CTA: an H200 adds the pair as one 32-bit integer",
    ),
    "a remote address in shared::cta": Plant(
        """mine[t] = x[i]; sync();
        u32 a = mapa(saddr(&mine[t]), rank() ^ 1), v;
        #ifndef MUTANT
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(a));
        #else
        asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(a)); // BUG
        #endif
        sync(); y[i] = v;""",
        "shared::cta access with the address 0x1000400 of rank 1, from rank 0|of rank 0, from rank 1",
    ),
    "an own address without its rank": Plant(
        """mine[t] = x[i]; sync();
        u32 a = saddr(&mine[t]), v;
        #ifdef MUTANT
        a &= 0xffffff;
        #endif
        asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(v) : "r"(a)); // BUG
        y[i] = v;""",
        "of rank 0, from rank 1",
    ),
    "a rank that does not exist": Plant(
        """mine[t] = x[i]; sync();
        #ifdef MUTANT
        u32 other = rank() + 1;
        #else
        u32 other = rank() ^ 1;
        #endif
        u32 v = remote_load(mapa(saddr(&mine[t]), other)); // BUG
        sync(); y[i] = v;""",
        "names rank 2 of a cluster of 2 CTAs",
    ),
    "one CTA does not come to the barrier": Plant(
        """mine[t] = x[i];
        #ifdef MUTANT
        if (rank() == 0) { sync(); }
        else { for (;;) asm volatile("barrier.sync 1, 96;"); } // BUG
        #else
        sync();
        #endif
        y[i] = mine[t];""",
        r"cluster barrier: 64 of 128 threads have arrived; missing are threads of rank 1", Deadlock,
    ),
    "waits without having arrived": Plant(
        """mine[t] = x[i];
        #ifndef MUTANT
        arrive();
        #endif
        wait(); // BUG
        y[i] = mine[t];""",
        "barrier.cluster.wait without a barrier.cluster.arrive",
    ),
    "arrives twice": Plant(
        """mine[t] = x[i]; arrive();
        #ifdef MUTANT
        arrive(); // BUG
        #endif
        wait(); y[i] = mine[t];""",
        "arrive a second time",
    ),
    "half a warp arrives by itself": Plant(
        """mine[t] = x[i];
        #ifdef MUTANT
        if (t & 1) { arrive(); wait(); } // BUG
        else { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); wait(); }
        #else
        sync();
        #endif
        y[i] = mine[t];""",
        "its mask 0xffffffff names lanes that are elsewhere", Deadlock,
    ),
}  # fmt: skip
HEAD = HELPERS + """extern "C" __global__ void test(const u32* x, u32* y) {
    __shared__ u32 mine[64]; u32 t = threadIdx.x, i = 64 * blockIdx.x + t;
"""


def source_of(plant, mutant):
    return ("#define MUTANT\n" if mutant else "\n") + HEAD + plant.body + "\n}\n"


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bugs_are_found_where_they_are(rng, tmp_path, name):
    plant = PLANTS[name]
    x = rng.integers(0, 1000, 256).astype(np.uint32)
    results = []
    for order in ORDERS:
        y = np.zeros_like(x)
        run(source_of(plant, False), "test", 4, 64, x, y, cluster=2, order=order)
        results.append(y)
    assert all(np.array_equal(results[0], each) for each in results)
    text = source_of(plant, True)
    write_source(tmp_path, text)
    for order in plant.orders:
        with pytest.raises(plant.error, match=plant.message) as caught:
            run(text, "test", 4, 64, x, np.zeros_like(x), cluster=2, order=order, roots=(tmp_path,))
        message = str(caught.value)
        assert f"program.cu:{line_of(text, 'BUG')}" in message, message


ASYNC = HELPERS + """
__device__ void init(u64* bar, u32 bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(saddr(bar)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(saddr(bar)), "r"(bytes) : "memory");
}
__device__ void wait_for(u64* bar) {
    asm volatile("{\\n.reg .pred P;\\nAGAIN:\\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], 0;\\n"
                 "@P bra DONE;\\nbra AGAIN;\\nDONE:\\n}" :: "r"(saddr(bar)) : "memory");
}
// Each CTA sends four words a thread to its right neighbour, and adds into a word of rank 0.
extern "C" __global__ void send(const uint4* x, uint4* y, u32* totals) {
    __shared__ uint4 box[64]; __shared__ u32 total; __shared__ u64 full, sums;
    u32 t = threadIdx.x, right = (rank() + 1) % size();
    if (t == 0) { total = 0; init(&full, TX); init(&sums, rank() == 0 ? size() * 64 * 4 : 0); }
    sync();
    uint4 v = x[64 * blockIdx.x + t];
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(mapa(saddr(&box[t]), right)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w),
                    "r"(mapa(saddr(&full), right)) : "memory");
    asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];"
                 :: "r"(mapa(saddr(&total), 0)), "r"(v.x), "r"(mapa(saddr(&sums), 0)) : "memory");
    WAIT
    y[64 * blockIdx.x + t] = box[t]; // READ
    if (rank() == 0) { wait_for(&sums); if (t == 0) totals[blockIdx.x / size()] = total; }
    sync();
}
"""


@pytest.mark.parametrize("completion", ["early", "late", "random"])
def test_asynchronous_stores_to_a_neighbour(rng, completion):
    x = rng.integers(0, 1 << 20, (8, 64, 4)).astype(np.uint32)
    y, totals = np.full_like(x, 7), np.full(2, 7, np.uint32)
    source = ASYNC.replace("TX", "1024").replace("WAIT", "wait_for(&full);")
    run(source, "send", 8, 64, x, y, totals, cluster=4, machine=Machine("sm_90a", completion=completion))
    assert np.array_equal(y.reshape(2, 4, 64, 4), np.roll(x.reshape(2, 4, 64, 4), 1, 1))
    assert np.array_equal(totals, x.reshape(2, -1, 4)[..., 0].sum(1))


def test_asynchronous_stores_on_every_device(device, rng, tmp_path):
    x = rng.integers(0, 1 << 20, (8, 64, 4)).astype(np.uint32)
    y, totals = device.array(np.full_like(x, 7)), device.array(np.full(2, 7, np.uint32))
    source = ASYNC.replace("TX", "1024").replace("WAIT", "wait_for(&full);")
    kernel(tmp_path, source, "send", device).launch(8, 64, device.array(x), y, totals, cluster=(4,))
    assert np.array_equal(device.numpy(y).reshape(2, 4, 64, 4), np.roll(x.reshape(2, 4, 64, 4), 1, 1))
    assert np.array_equal(device.numpy(totals), x.reshape(2, -1, 4)[..., 0].sum(1))


@pytest.mark.parametrize("completion", ["early", "late", "random"])
def test_asynchronous_stores_without_a_wait_or_with_wrong_bytes(rng, completion):
    x = np.zeros((8, 64, 4), np.uint32)
    for tx, wait, error, message in (
        ("1024", "", KernelFault, r"reads the destination of an asynchronous st.async"),
        ("1040", "wait_for(&full);", Deadlock, r"mbarrier(.|\n)*16"),
    ):
        source = ASYNC.replace("TX", tx).replace("WAIT", wait)
        machine = Machine("sm_90a", completion=completion)
        with pytest.raises(error, match=message):
            run(source, "send", 8, 64, x, x.copy(), np.zeros(2, np.uint32), cluster=4, machine=machine)


def test_an_unmasked_address_in_a_matrix_descriptor(rng):
    """The rank at bit 24 spills into the leading offset: rank 0 is right, rank 1 reads elsewhere."""
    (a, left), (b, right) = integers(rng, "bf16", 64, 64), integers(rng, "bf16", 32, 64)
    (left, rest_a, step_a), (right, rest_b, step_b) = layout(left, 0, 0), layout(right, 0, 0)
    text = source("f32", left, right)
    out = np.zeros((2, 128, 16), np.uint32)
    args = (left, right, out, np.uint64(rest_a), np.uint64(rest_b), np.int32(step_a), np.int32(step_b), np.int32(4))
    options = {"shared": left.nbytes + right.nbytes, "cluster": 2, "arch": "sm_90a"}
    run_ptx(compile_ptx(text, "sm_90a"), "k", 2, 128, *args, np.int32(0), **options)
    for each in out:
        assert np.array_equal(fragments(values_of("f32", each), 32), a @ b.T)
    unmasked = text.replace("& 0x3FFFF) >> 4", ") >> 4")
    assert unmasked != text
    with pytest.raises(KernelFault, match=r"out of bounds: matrix B (.|\n)*leading offset 0x300(.|\n)*CTA \(1, 0, 0\)"):
        run_ptx(compile_ptx(unmasked, "sm_90a"), "k", 2, 128, *args, np.int32(0), **options)


def source(kind, left, right):
    """The product of test_wgmma.py, each CTA into its own result."""
    text = wgmma_source(32, kind, "bf16", "bf16", left.nbytes, right.nbytes, "0")
    return text.replace("d[threadIdx.x *", "d[(128 * blockIdx.x + threadIdx.x) *")
