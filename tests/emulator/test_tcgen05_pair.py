# ruff: noqa: E501  (bugs are changes of source lines, kernels are inline assembly)
"""tcgen05 of pairs of CTAs, in clusters and with launch control: kernels and single instructions against NumPy."""

import re

import numpy as np
import pytest
from asynchronous import all_schedules
from hopper_kernels import normal
from pair_kernels import emulated, loader, run_gemm_launch_control, run_gemm_pair, run_split_k_tcgen05
from programs import ORDERS, PRELUDE, aligned, compile_ptx, run_ptx
from tensor_programs import SIZES, bits_of
from test_tcgen05 import FORMATS, layout

from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.wide import decode
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault, UnsupportedInstruction
from dsv4_rt.tensor_map import TensorMap


@pytest.mark.parametrize("tile", [(256, 64), (128, 64), (256, 256), (128, 32)])
@all_schedules
def test_gemm_of_pairs(tile, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, tile=tile)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_of_pairs_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order, ctas_per_sm=2) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, ctas=4, draw=normal)


@pytest.mark.parametrize(("split", "columns", "K"), [(4, 32, 456), (2, 16, 264), (4, 16, 72)])
@all_schedules
def test_split_k(split, columns, K, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_split_k_tcgen05(device, loader(tmp_path, "split_k_tcgen05.cu"), rng, split=split, columns=columns, K=K)


@all_schedules
def test_launch_control(completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_launch_control(device, loader(tmp_path, "gemm_launch_control.cu"), rng)
        assert completion == "random" or device.last_report.cancelled == 6  # 3 of 9 tiles begin


# Single products: images of A and B as they lie in the shared memory of each CTA, D in its tensor memory.

PRODUCT = """
extern "C" __global__ void __launch_bounds__(128) k(
    const uint4* a, const uint4* b, u32* d, const u32* start, const u32* mask, u64 da, u64 db, u32 form, int step_a,
    int step_b, int steps)
{
    extern __shared__ __align__(1024) u8 tiles[];
    __shared__ u32 base;
    __shared__ __align__(8) u64 bar;
    int warp = threadIdx.x / 32, cta = blockIdx.x;
    uint4* left = (uint4*)tiles, *right = (uint4*)(tiles + BYTES_A);
    for (int i = threadIdx.x; i < BYTES_A / 16; i += 128) left[i] = a[cta * BYTES_A / 16 + i];
    for (int i = threadIdx.x; i < BYTES_B / 16; i += 128) right[i] = b[cta * BYTES_B / 16 + i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    u32 done = (u32)__cvta_generic_to_shared(&bar);
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(done) : "memory");
    SYNC
    if (warp == 0)
        asm volatile("tcgen05.alloc.cta_group::GROUP.sync.aligned.shared::cta.b32 [%0], 256;"
                     :: "r"((u32)__cvta_generic_to_shared(&base)) : "memory");
    __syncthreads();
    u32 at = base + (warp * 32 << 16);
    for (int n = 0; n < WIDTH; ++n)
        asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};" :: "r"(at + n), "r"(start[(cta * 128 + threadIdx.x) * WIDTH + n]) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    SYNC
    if (threadIdx.x == 0 && cta == 0) {
        da |= ((u32)__cvta_generic_to_shared(left) & 0x3ffff) >> 4;
        db |= ((u32)__cvta_generic_to_shared(right) & 0x3ffff) >> 4;
        for (int i = 0; i < steps; ++i)
            asm volatile("tcgen05.mma.WHAT [%0], A_OPERAND, %2, %3 MASK, 1 SCALE;"
                         :: "r"(base), "A_KIND"(A_VALUE), "l"(db + (i * step_b >> 4)), "r"(form), "r"(mask[0]), "r"(mask[1]),
                            "r"(mask[2]), "r"(mask[3]), "r"(mask[4]), "r"(mask[5]), "r"(mask[6]), "r"(mask[7]) : "memory");
        COMMIT
    }
    asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\\n@!P bra W;\\n}" :: "r"(done) : "memory");
    for (int n = 0; n < WIDTH; ++n)
        asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(d[(cta * 128 + threadIdx.x) * WIDTH + n]) : "r"(at + n));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    SYNC
    if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::GROUP.sync.aligned.b32 %0, 256;" :: "r"(base) : "memory");
}
"""
CLUSTER_SYNC = 'asm volatile("barrier.cluster.arrive.aligned;\\nbarrier.cluster.wait.aligned;" ::: "memory");'
COMMITS = {
    1: 'asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" :: "r"(done) : "memory");',
    2: 'asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;"'
       ' :: "r"(done), "h"((unsigned short)3) : "memory");',
}  # fmt: skip
A_COLUMN = 40  # of the tensor memory


def home(m, n, M, N, group, ws):
    """(CTA, lane, column) of an element of D, by the pictures of layouts A, B, D, E and G."""
    cta, m = divmod(m, M // group)
    rows = M // group  # of a CTA
    across = 128 // rows if ws or group == 2 else 1
    return cta, m + rows * (n // (N // across)), n % (N // across)


def product(rng, completion, kind, types, m, n, swizzles, majors=(0, 0), group=1, ws=False, mask=None, scale=0, tmem=False,
            what="", edit=lambda text: text):  # fmt: skip
    """Run D += A B on small integers; returns (D as [group, 128, columns] bits, wanted)."""
    ta, tb, td = types
    depth = min(s // SIZES[ta] for s in swizzles)
    a, b = rng.integers(-4, 5, (m, depth)), rng.integers(-4, 5, (n, depth))
    sides = []
    for x, ty, major, swizzle in zip((a, b), (ta, tb), majors, swizzles, strict=True):
        wide = 0 if major else swizzle // SIZES[ty] - depth
        halves = np.split(np.pad(x, ((0, 0), (0, wide))), group)
        images = [layout(bits_of(ty, half), major, swizzle) for half in halves]
        sides.append((b"".join(image.tobytes() for image, _, _ in images), *images[0][1:], images[0][0].nbytes))
    (left, da, step_a, bytes_a), (right, db, step_b, bytes_b) = sides
    form = (td == "f32") << 4 | FORMATS[ta][1] << 7 | FORMATS[tb][1] << 10 | majors[0] << 15 | majors[1] << 16
    form |= n >> 3 << 17 | m >> 4 << 24
    width = 64 if n <= 64 else n  # columns that are filled before and looked at afterwards
    before = rng.integers(-100, 100, (group, 128, width)) << scale
    start = bits_of(td, before).astype(np.uint32)
    places = home(*np.indices((m, n)), m, n, group, ws)
    if tmem:
        cells = bits_of(ta, a).view(np.uint32)
        start[places[0][:, :, None], places[1][:, :, None], A_COLUMN + np.arange(cells.shape[1])] = cells[:, None]
    bits = np.unpackbits(np.array(mask or [0] * 4 * group, np.uint32).view(np.uint8), bitorder="little")
    on = bits[places[0] * 128 + places[1]] == 0
    at = tuple(each[on] for each in places)
    sums = bits_of(td, (before[at] // 2**scale + (a @ b.T)[on])).astype(np.uint32)
    want = start.copy()
    want[at] = sums if td == "f32" else sums | 0x7FFF0000
    text = PRODUCT.replace("WHAT", what or f"cta_group::{group}.kind::{kind}").replace("GROUP", str(group)).replace("WIDTH", str(width))
    text = text.replace("A_OPERAND", "[%1]" if tmem else "%1").replace("A_KIND", "r" if tmem else "l")
    text = text.replace("A_VALUE", f"base + {A_COLUMN} + i * 8" if tmem else "da + (i * step_a >> 4)")
    words = ", ".join(f"%{4 + i}" for i in range(4 * group))
    text = text.replace("MASK", "" if mask is None else f", {{{words}}}").replace("SCALE", f", {scale}" if scale else "")
    text = text.replace("SYNC", CLUSTER_SYNC if group == 2 else "__syncthreads();").replace("COMMIT", COMMITS[group])
    text = PRELUDE + edit(text.replace("BYTES_A", str(bytes_a)).replace("BYTES_B", str(bytes_b)))
    d = np.full((group, 128, width), 0xFFFFFFFF, np.uint32)
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)))
    images = [np.frombuffer(x, np.uint8).copy() for x in (left, right)]
    masks = np.resize(np.array([0] if mask is None else mask, np.uint32), 8)
    sizes = np.uint32(form), np.int32(step_a), np.int32(step_b), np.int32(depth * SIZES[ta] // 32)
    run_ptx(compile_ptx(text, "sm_100a"), "k", group, 128, *images, d, start, masks, da, db, *sizes, machine=machine,
            shared=bytes_a + bytes_b + 1024, cluster=group if group == 2 else None)  # fmt: skip
    return d, want


WIDE = {
    "layout A, bf16": ("f16", ("bf16", "bf16", "f32"), 256, 64, (128, 128), {"group": 2}),
    "layout A, tf32": ("tf32", ("tf32", "tf32", "f32"), 256, 32, (128, 32), {"group": 2}),
    "layout A, transposed": ("f16", ("f16", "f16", "f32"), 256, 128, (128, 128), {"group": 2, "majors": (1, 1)}),
    "layout B, f16": ("f16", ("f16", "f16", "f16"), 128, 32, (64, 64), {"group": 2}),
    "layout B, fp8": ("f8f6f4", ("e4m3", "e5m2", "f32"), 128, 256, (128, 128), {"group": 2}),
    "layout D, .ws": ("f16", ("bf16", "bf16", "f32"), 128, 64, (64, 64), {"ws": True}),
    "layout E": ("f16", ("bf16", "bf16", "f32"), 64, 128, (128, 128), {"ws": True}),
    "layout G": ("f8f6f4", ("e4m3", "e4m3", "f32"), 32, 64, (64, 64), {"ws": True}),
    "A in TMEM, layout A": ("f16", ("bf16", "bf16", "f32"), 256, 32, (64, 64), {"group": 2, "tmem": True}),
    "A in TMEM, layout B": ("f16", ("bf16", "bf16", "f32"), 128, 32, (64, 64), {"group": 2, "tmem": True}),
    "A in TMEM, layout E": ("f16", ("f16", "f16", "f32"), 64, 64, (64, 64), {"ws": True, "tmem": True}),
    "mask": ("f16", ("bf16", "bf16", "f32"), 128, 48, (64, 64), {"mask": 4}),
    "mask of a pair": ("f16", ("bf16", "bf16", "f32"), 256, 32, (64, 64), {"group": 2, "mask": 8}),
    "mask of a pair, layout B": ("f16", ("bf16", "bf16", "f32"), 128, 32, (64, 64), {"group": 2, "mask": 8}),
    "scaled D": ("f16", ("bf16", "bf16", "f32"), 128, 32, (32, 32), {"scale": 5}),
    "scaled D of a pair": ("tf32", ("tf32", "tf32", "f32"), 256, 32, (32, 32), {"scale": 1, "group": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
@all_schedules
def test_product(name, completion, rng):
    kind, types, m, n, swizzles, options = WIDE[name]
    options = dict(options)
    if "mask" in options:
        options["mask"] = rng.integers(0, 1 << 32, options["mask"], dtype=np.uint32).tolist()
    if "ws" in options:
        options["what"] = f"ws.cta_group::1.kind::{kind}.collector::b1::lastuse"
    got, want = product(rng, completion, kind, types, m, n, swizzles, **options)
    np.testing.assert_array_equal(got, want)


# Launch control by hand: clusters of two, the response to both.

TAKE_OVER = """
extern "C" __global__ void __launch_bounds__(32) k(u32* seen) {
    __shared__ uint4 answer;
    __shared__ __align__(8) u64 bar;
    u32 to = (u32)__cvta_generic_to_shared(&answer), told = (u32)__cvta_generic_to_shared(&bar), rank, phase = 0;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(told) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    SYNC
    u32 x = blockIdx.x, y = blockIdx.y, z = blockIdx.z, more = 1;
    while (more) {
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 16;" :: "r"(told) : "memory");
            if (rank == 0)
                asm volatile("clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes"
                             ".multicast::cluster::all.b128 [%0], [%1];" :: "r"(to), "r"(told) : "memory");
            atomicAdd(&seen[(z * gridDim.y + y) * gridDim.x + x], 1);
        }
        asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], %1;\\n@!P bra W;\\n}"
                     :: "r"(told), "r"(phase) : "memory");
        asm volatile("{\\n.reg .pred p;\\n.reg .b128 r;\\nld.shared.b128 r, [%4];\\n"
                     "clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 p, r;\\nselp.u32 %0, 1, 0, p;\\n"
                     "@p clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%1, %2, _, _}, r;\\n"
                     "@p clusterlaunchcontrol.query_cancel.get_first_ctaid::z.b32.b128 %3, r;\\n}"
                     : "=r"(more), "+r"(x), "+r"(y), "+r"(z) : "r"(to) : "memory");
        x += rank;
        phase ^= 1;
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        SYNC
    }
}
""".replace("SYNC", CLUSTER_SYNC)


@pytest.mark.parametrize("order", ORDERS)
@all_schedules
def test_clusters_take_over_others(order, completion, rng):
    machine = Machine("sm_100a", completion=completion, order=order, seed=int(rng.integers(1 << 30)))
    seen = np.zeros((2, 3, 8), np.uint32)
    report = run_ptx(compile_ptx(PRELUDE + TAKE_OVER, "sm_100a"), "k", (8, 3, 2), 32, seen, machine=machine, cluster=2)
    np.testing.assert_array_equal(seen, 1)
    assert report.cancelled % 2 == 0
    if completion != "random":  # a quarter of the 24 clusters begins, and takes over all others
        assert report.cancelled == 2 * 18


def test_requests_may_fail_although_ctas_are_left(monkeypatch):
    """Under the random schedule, with one cluster of 8 that begins: it takes over all others, or fewer."""
    monkeypatch.setattr("dsv4_rt.emulator.machine.resident", lambda *_: 1)
    ptx, found = compile_ptx(PRELUDE + TAKE_OVER, "sm_100a"), []
    for seed in range(12):
        machine = Machine("sm_100a", completion="random", seed=seed)
        seen = np.zeros(16, np.uint32)
        found.append(run_ptx(ptx, "k", 16, 32, seen, machine=machine, cluster=2).cancelled)
        np.testing.assert_array_equal(seen, 1)
    assert max(found) == 14
    assert min(found) < 14


def test_only_responses_are_queried():
    text = TAKE_OVER.replace("answer;", "answer, other;").replace('"r"(to) : "memory");\n        x +=', '"r"((u32)__cvta_generic_to_shared(&other)) : "memory");\n        x +=')
    text = text.replace("SYNC", CLUSTER_SYNC).replace("u32 x = blockIdx.x", "other = make_uint4(0, 0, 0, 1); u32 x = blockIdx.x")
    with pytest.raises(KernelFault, match="16 bytes that are no response of try_cancel"):
        run_ptx(compile_ptx(PRELUDE + text, "sm_100a"), "k", 4, 32, np.zeros(4, np.uint32), cluster=2)


# Allocation.

ALLOCS = """
extern "C" __global__ void __launch_bounds__(32) k(volatile u32* flag, int columns, int waits) {
    __shared__ u32 base;
    u32 to = (u32)__cvta_generic_to_shared(&base);
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" :: "r"(to), "r"(columns) : "memory");
    __syncwarp();
    if (waits && blockIdx.x == 0) while (flag[1] == 0) {}
    if (threadIdx.x == 0) flag[blockIdx.x] = 1 + base;
    __threadfence();
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" :: "r"(base), "r"(columns) : "memory");
}
"""


@pytest.mark.parametrize(("columns", "waits"), [(256, 1), (512, 0), (64, 1)])
@pytest.mark.parametrize("order", ORDERS)
def test_ctas_of_one_sm_share_its_columns(columns, waits, order):
    """Two CTAs an SM: what fits goes at once, otherwise the second waits until the first has given its columns back."""
    flag = np.zeros(4, np.uint32)
    machine = Machine("sm_100a", ctas_per_sm=2, order=order)
    run_ptx(compile_ptx(PRELUDE + ALLOCS, "sm_100a"), "k", 4, 32, flag, np.int32(columns), np.int32(waits), machine=machine)
    assert (flag > 0).all()
    assert {int(flag[0]), int(flag[1])} == ({1} if columns == 512 else {513 - columns, 513 - 2 * columns})


def test_two_ctas_that_want_more_than_an_sm_has_are_a_deadlock(rng):
    ptx = compile_ptx(PRELUDE + ALLOCS, "sm_100a")
    flag, sizes = np.zeros(2, np.uint32), (np.int32(512), np.int32(1))
    with pytest.raises(Deadlock) as caught:
        run_ptx(ptx, "k", 2, 32, flag, *sizes, machine=Machine("sm_100a", ctas_per_sm=2))
    text = str(caught.value)
    assert re.search(r"CTA \(1, 0, 0\) thread \(0, 0, 0\), wait at\s+PTX line \d+: tcgen05.alloc", text), text
    assert "for 512 columns in a row: 512 of 512 are allocated; held: 512 columns of CTA (0, 0, 0) by" in text
    assert "poll memory that nobody writes" in text
    run_ptx(ptx, "k", 2, 32, flag, *sizes)  # each has an SM of its own


PAIRED = """
extern "C" __global__ void __launch_bounds__(32) k(int alone) {
    __shared__ u32 base;
    u32 to = (u32)__cvta_generic_to_shared(&base);
    SYNC
    if (alone && blockIdx.x == 1) return;
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], 64;" :: "r"(to) : "memory");
    __syncwarp();
    if (alone < 0 && blockIdx.x == 1) return;
    asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, 64;" :: "r"(base) : "memory");
}
""".replace("SYNC", CLUSTER_SYNC)


def test_both_ctas_of_a_pair_must_come():
    ptx = compile_ptx(PRELUDE + PAIRED, "sm_100a")
    run_ptx(ptx, "k", 4, 32, np.int32(0), cluster=2)
    with pytest.raises(Deadlock, match=r"for a warp of CTA \(1, 0, 0\), the other of the pair, which has exited"):
        run_ptx(ptx, "k", 2, 32, np.int32(1), cluster=2)


def test_the_other_cta_must_be_known_to_run():
    text = PAIRED.replace(CLUSTER_SYNC, "")
    with pytest.raises(KernelFault, match=r"nothing tells that CTA \(1, 0, 0\), the other of the pair, has begun"):
        run_ptx(compile_ptx(PRELUDE + text, "sm_100a"), "k", 2, 32, np.int32(0), cluster=2)


COMMIT_AND_LEAVE = """
extern "C" __global__ void __launch_bounds__(32) k() {
    __shared__ __align__(8) u64 bar;
    u32 told = (u32)__cvta_generic_to_shared(&bar);
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(told) : "memory");
    SYNC
    if (threadIdx.x == 0 && blockIdx.x == 0)
        asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;"
                     :: "r"(told), "h"((unsigned short)3) : "memory");
    AFTER
    if (blockIdx.x == 0)
        asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\\n@!P bra W;\\n}" :: "r"(told) : "memory");
}
""".replace("SYNC", CLUSTER_SYNC)


@pytest.mark.parametrize(
    ("after", "completion", "order", "message"),
    [
        ("", "early", "min-pc", "the CTA exits while others may still access its shared memory"),
        ("", "early", "reverse", "the shared memory of rank 1, whose CTA has exited|the CTA exits while others"),
        (CLUSTER_SYNC, "late", "min-pc", "tcgen05.commit to an mbarrier of rank 1, whose CTA has exited"),
    ],
)
def test_a_commit_needs_the_other_cta(after, completion, order, message):
    machine = Machine("sm_100a", completion=completion, order=order)
    with pytest.raises(KernelFault, match=message):
        run_ptx(compile_ptx(PRELUDE + COMMIT_AND_LEAVE.replace("AFTER", after), "sm_100a"), "k", 2, 32, machine=machine, cluster=2)


@pytest.mark.parametrize(("cluster", "grid", "message"), [(None, 2, "without clusters"), (3, 3, "with clusters of 3 CTAs")])
def test_pairs_need_clusters_of_an_even_size(cluster, grid, message):
    with pytest.raises(KernelFault, match=rf"tcgen05.alloc.cta_group::2 in a launch {message}: a pair is two CTAs"):
        run_ptx(compile_ptx(PRELUDE + PAIRED, "sm_100a"), "k", grid, 32, np.int32(0), cluster=cluster)


HEAD = """.version 9.0
.target sm_100a
.address_size 64
.visible .entry f() .reqntid 32, 1, 1 {
.reg .b32 r, s; .reg .b64 d; .reg .pred p; .shared .align 16 .b8 m[32];
mov.b32 r, 0; mov.b64 d, 0; setp.eq.b32 p, r, 0;
"""


def test_one_kernel_has_one_cta_group():
    text = HEAD + "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [m], 32;\n" + (
        "tcgen05.dealloc.cta_group::1.sync.aligned.b32 r, 32;\nret; }"
    )
    with pytest.raises(EmulatorError, match=r"cta_group::1 and cta_group::2 in one kernel(.|\n)*PTX line 8(.|\n)*PTX line 7"):
        Machine("sm_100a").load(text, "mixed").program("f")


REFUSED = {
    "tcgen05.mma.ws.cta_group::1.kind::f16 [r], d, d, r, p, d;": "a zero-column mask",
    "tcgen05.mma.cta_group::1.kind::f8f6f4 [r], d, d, r, p, 1;": "scale-input-d is a number from 0 to 15, of kind::f16",
    "tcgen05.mma.cta_group::1.kind::f16 [r], d, d, r, p, 16;": "scale-input-d is a number from 0 to 15",
    "tcgen05.mma.sp.cta_group::2.kind::mxf4.block_scale [r], d, d, [r], r, [r], [r], p;": "sparse matrices",
    "tcgen05.mma.ws.cta_group::1.kind::mxf4.block_scale [r], d, d, r, [r], [r], p;": "block scales with .ws",
    "tcgen05.mma.cta_group::2.kind::i8 [r], d, d, r, p;": "kind::i8",
    "tcgen05.mma.sp.cta_group::2.kind::f16 [r], d, d, [r], r, p;": "sparse matrices",
    "tcgen05.mma.cta_group::2.kind::f16.ashift [r], [r], d, r, p;": ".ashift",
    "tcgen05.mma.cta_group::2.kind::f16 [r], d, d, r, {r, r, r, r}, p;": "tcgen05.mma",
    "tcgen05.shift.cta_group::2.down [r];": "tcgen05.shift",
}


@pytest.mark.parametrize("line", REFUSED)
def test_is_refused_by_name(line):
    with pytest.raises(UnsupportedInstruction, match=re.escape(REFUSED[line])) as caught:
        Machine("sm_100a").load(f"{HEAD}{line}\nret; }}", "refused").program("f")
    assert "PTX line 7" in str(caught.value)


@pytest.mark.parametrize(
    ("m", "n", "group", "ws", "message"),
    [
        (64, 64, 2, False, "M of 128 or 256 with cta_group::2"), (256, 40, 2, False, "steps of 16"),
        (48, 64, 1, True, "M of 32, 64 or 128 with .ws"), (64, 32, 1, True, "N of 64, 128 or 256"),
    ],
)  # fmt: skip
def test_shapes(m, n, group, ws, message):
    with pytest.raises(EmulatorError, match=re.escape(message)):
        decode(1 << 4 | n >> 3 << 17 | m >> 4 << 24, "f16", group, ws)


def test_fields_are_those_of_other_products():
    form = 1 << 4 | 64 >> 3 << 17 | 256 >> 4 << 24
    assert decode(form | 1 << 13, "f16", 2, False).negative
    with pytest.raises(EmulatorError, match=f"{form | 8:#010x} of kind::f16: bits 0x8 must be 0"):
        decode(form | 8, "f16", 2, False)


# Tiles that report to another CTA of the pair.

MULTICAST = """
struct alignas(64) Map { u64 opaque[16]; };
extern "C" __global__ void __launch_bounds__(32) k(const __grid_constant__ Map map, u32* y, int issuer, int home, int bytes) {
    __shared__ alignas(128) u32 tile[64];
    __shared__ alignas(8) u64 bar;
    u32 rank, told = (u32)__cvta_generic_to_shared(&bar), to = (u32)__cvta_generic_to_shared(tile);
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(told) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        if (rank % 2 == home % 2) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(told), "r"(bytes) : "memory");
    }
    SYNC
    if (threadIdx.x == 0 && rank == issuer) {
        u32 there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(told), "r"(home));
        asm volatile("cp.async.bulk.tensor.2d.cta_group::2.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
                     " [%0], [%1, {%2, %2}], [%3], %4;" :: "r"(to), "l"(&map), "r"(0), "r"(there), "h"((unsigned short)15) : "memory");
    }
    if (rank % 2 == home % 2)
        asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 P, [%0], 0;\\n@!P bra W;\\n}" :: "r"(told) : "memory");
    SYNC
    for (int i = threadIdx.x; i < 64; i += 32) y[rank * 64 + i] = tile[i];
}
""".replace("SYNC", CLUSTER_SYNC)


@pytest.mark.parametrize(("issuer", "home"), [(1, 0), (0, 1), (2, 3), (3, 0)])
@all_schedules
def test_multicast_reports_to_one_cta_of_each_pair(issuer, home, completion, rng):
    """To both tiles of a pair: the CTA whose rank is as odd as that of the mbarrier named."""
    x = aligned(rng.integers(0, 1 << 32, (8, 8), dtype=np.uint32))
    y, ptx = np.zeros((4, 64), np.uint32), compile_ptx(PRELUDE + MULTICAST, "sm_100a")
    tensor, sizes = TensorMap(x, box=(8, 8)), (np.int32(issuer), np.int32(home))
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)))
    run_ptx(ptx, "k", 4, 32, tensor, y, *sizes, np.int32(512), machine=machine, cluster=4)
    np.testing.assert_array_equal(y, np.tile(x.reshape(1, -1), (4, 1)))
    with pytest.raises((KernelFault, Deadlock), match="no thread can go on|in flight|destination of an asynchronous"):
        run_ptx(ptx, "k", 4, 32, tensor, y, *sizes, np.int32(256), machine=machine, cluster=4)


def test_a_tile_without_a_pair_cannot_report_elsewhere(rng):
    x = aligned(np.zeros((8, 8), np.uint32))
    ptx = compile_ptx(PRELUDE + MULTICAST, "sm_100a").replace(".multicast::cluster [", " [")
    ptx = re.sub(r"(bytes \[.*\]), %rs\d+;", r"\1;", ptx)
    for changed, message in ((ptx, "with an mbarrier of rank 2: it or the other of its pair is wanted"),
                             (ptx.replace("cta_group::2.", ""), "another of the pair needs .cta_group::2")):  # fmt: skip
        with pytest.raises(KernelFault, match=message):
            run_ptx(changed, "k", 4, 32, TensorMap(x, box=(8, 8)), np.zeros((4, 64), np.uint32), np.int32(1), np.int32(2),
                    np.int32(256), cluster=4)  # fmt: skip


# What a commit tells.

WAIT = 'asm volatile("{ .reg .pred P;\\nLABEL: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], PARITY;\\n@!P bra LABEL;\\n}" :: "r"(done) : "memory");'


def waits(label, parity):
    return WAIT.replace("LABEL", label).replace("PARITY", str(parity))


@all_schedules
def test_a_commit_belongs_to_the_phase_it_arrives_in(completion, rng):
    """Who waits for the phase before, which a plain arrival has completed, knows nothing of the product."""
    plain = 'if (threadIdx.x == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(done) : "memory");'
    issue, arguments = "    if (threadIdx.x == 0 && cta == 0) {", ("f16", ("bf16", "bf16", "f32"), 128, 32, (64, 64))

    def edit(text, last):
        assert text.count(issue) == text.count(waits("W", 0)) == 1
        return text.replace(waits("W", 0), last).replace(issue, f"{plain}{waits('V', 0)}__syncthreads();{issue}")

    with pytest.raises(KernelFault, match="tcgen05.ld.32x32b touches the accumulator of an asynchronous tcgen05.mma that"):
        product(rng, completion, *arguments, edit=lambda text: edit(text, "__syncthreads();"))
    np.testing.assert_array_equal(*product(rng, completion, *arguments, edit=lambda text: edit(text, waits("W", 1))))
