# ruff: noqa: E501  (bugs are changes of source lines, kernels are inline assembly)
"""tcgen05 of pairs of CTAs, in clusters and with launch control: kernels and single instructions against NumPy, bugs."""

import numpy as np
import pytest
from asynchronous import all_schedules
from hopper_kernels import normal
from pair_kernels import loader, run_gemm_launch_control, run_gemm_pair, run_split_k_tcgen05
from programs import ORDERS, PRELUDE, compile_ptx, run_ptx
from tensor_programs import SIZES, bits_of
from test_tcgen05 import FORMATS, layout

import dsv4_rt
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.emulator import Machine


def emulated(completion, rng, **options):
    options = {"completion": completion, "seed": int(rng.integers(1 << 30))} | options
    return dsv4_rt.use_device(EmulatedDevice("sm_100a", **options))


@pytest.mark.parametrize("tile", [(256, 64), (128, 64), (256, 256), (128, 32)])
@all_schedules
def test_gemm_of_pairs(tile, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, tile=tile)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_of_pairs_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order) as device:
        run_gemm_pair(device, loader(tmp_path, "gemm_pair.cu"), rng, ctas=4, draw=normal)


@pytest.mark.parametrize(("split", "columns", "K"), [(4, 32, 456), (2, 64, 264), (4, 16, 72)])
@all_schedules
def test_split_k(split, columns, K, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_split_k_tcgen05(device, loader(tmp_path, "split_k_tcgen05.cu"), rng, split=split, columns=columns, K=K)


@all_schedules
def test_launch_control(completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_launch_control(device, loader(tmp_path, "gemm_launch_control.cu"), rng)


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
