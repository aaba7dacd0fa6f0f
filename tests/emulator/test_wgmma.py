"""wgmma in CUDA C++ against NumPy, under every completion schedule, and what is said of kernels that use it wrongly."""

import re

import numpy as np
import pytest
from asynchronous import COMPLETIONS, all_schedules
from programs import PRELUDE, compile_ptx, run_ptx
from tensor_programs import (
    SIZES,
    WGMMA_HELPERS,
    bits_of,
    descriptor,
    fragments,
    image_k_major,
    image_mn_major,
    values_of,
    wgmma_function,
)

from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.descriptors import swizzle
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault, UnsupportedInstruction

SWIZZLES = (0, 32, 64, 128)

# Images of A [64, K] and B [n, K] come as they lie in shared memory; K is one or more instructions deep.
KERNEL = """
extern "C" __global__ void __launch_bounds__(128) k(
    const uint4* a, const uint4* b, KIND* d, u64 rest_a, u64 rest_b, int step_a, int step_b, int steps, int scale)
{
    extern __shared__ __align__(1024) u8 tiles[];
    uint4* left = (uint4*)tiles, *right = (uint4*)(tiles + BYTES_A);
    for (int i = threadIdx.x; i < BYTES_A / 16; i += 128) left[i] = a[i];
    for (int i = threadIdx.x; i < BYTES_B / 16; i += 128) right[i] = b[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    KIND acc[COUNT];
    for (int i = 0; i < COUNT; ++i) acc[i] = START;
    u64 da = matrix(left, rest_a), db = matrix(right, rest_b);
    wg_fence();
    for (int i = 0; i < steps; ++i) wgmma(acc, da + (i * step_a >> 4), db + (i * step_b >> 4), i > 0 || scale);
    wg_commit();
    wg_wait<0>();
    for (int i = 0; i < COUNT; ++i) d[threadIdx.x * COUNT + i] = acc[i];
}
"""


def source(n, d, ta, tb, bytes_a, bytes_b, start, **options):
    count = n // (4 if d == "f16" else 2)
    text = PRELUDE + WGMMA_HELPERS + wgmma_function(n, d, ta, tb, **options) + KERNEL
    kind = "u32" if d == "f16" else "float"
    for name, value in (("KIND", kind), ("COUNT", count), ("BYTES_A", bytes_a), ("BYTES_B", bytes_b), ("START", start)):
        text = text.replace(name, str(value))
    return text


def layout(x, major, swizzle):
    """(image, rest of the descriptor, bytes from one k slice of an instruction to the next)."""
    rows, size = len(x), x.itemsize
    if major == 0:
        if not swizzle:
            # [slice of 16 bytes, row group, row, 16 bytes]
            return image_k_major(x, 0), descriptor(rows * 16, 128, 0), 2 * rows * 16
        assert x.shape[1] * size == swizzle  # one pattern wide
        return image_k_major(x, swizzle), descriptor(0, 8 * swizzle, swizzle), 32
    if not swizzle:
        # [k group, row group, k, 16 bytes]: leading offset between k groups, stride offset between row groups
        return image_mn_major(x, 0), descriptor(rows * 16, 128, 0), 2 * rows * 16
    wide = swizzle // size
    return image_mn_major(x, swizzle), descriptor(8 * swizzle, rows // wide * 8 * swizzle, swizzle), rows * 32


def multiply(
    a, b, types, *, majors=(0, 0), swizzles=(128, 128), completion="early", start="0", scale=1, scales=(1, 1),
    edit=lambda text: text, **changes,
):  # fmt: skip
    """D = +-A B [+ D] on the emulator, [64, n]; a and b are bits [64, K] and [n, K]."""
    d, ta, tb = types
    n = len(b)
    (left, rest_a, step_a), (right, rest_b, step_b) = (
        layout(x, major, swizzle) for x, major, swizzle in zip((a, b), majors, swizzles, strict=True)
    )
    text = edit(source(n, d, ta, tb, left.nbytes, right.nbytes, start, majors=majors, scale=scales))
    out = np.full((128, n // (4 if d == "f16" else 2)), 0xA5A5A5A5, np.uint32)
    steps = a.shape[1] * SIZES[ta] // 32
    arguments = {"rest_a": rest_a, "rest_b": rest_b, "step_a": step_a, "step_b": step_b} | changes
    run_ptx(
        compile_ptx(text, "sm_90a"), "k", 1, 128, left, right, out, np.uint64(arguments["rest_a"]),
        np.uint64(arguments["rest_b"]), np.int32(arguments["step_a"]), np.int32(arguments["step_b"]), np.int32(steps),
        np.int32(scale), shared=left.nbytes + right.nbytes, machine=Machine("sm_90a", completion=completion),
    )  # fmt: skip
    return fragments(values_of(d, out.view(np.uint16) if d == "f16" else out), n)


def integers(rng, ty, rows, k):
    x = rng.integers(-4, 5, (rows, k))
    return x, bits_of(ty, x)


@pytest.mark.parametrize("completion", COMPLETIONS)
@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_width(rng, n, completion):
    (a, left), (b, right) = integers(rng, "bf16", 64, 64), integers(rng, "bf16", n, 64)
    got = multiply(left, right, ("f32", "bf16", "bf16"), completion=completion, start="float(i)")
    thread = np.arange(n // 2) * np.ones((128, 1))
    assert np.array_equal(got, a @ b.T + fragments(thread, n))


@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(
    ("d", "ta", "tb"),
    [("f32", "f16", "f16"), ("f16", "f16", "f16"), ("f32", "bf16", "bf16"), ("f32", "tf32", "tf32")]
    + [(d, a, b) for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")],
)
def test_every_type_and_swizzle(rng, d, ta, tb, swizzle):
    k = (swizzle or 64) // SIZES[ta]
    (a, left), (b, right) = integers(rng, ta, 64, k), integers(rng, tb, 24, k)
    got = multiply(left, right, (d, ta, tb), swizzles=(swizzle, swizzle))
    assert np.array_equal(got, a @ b.T)


@pytest.mark.parametrize("swizzles", [(x, y) for x in SWIZZLES for y in SWIZZLES], ids=str)
@pytest.mark.parametrize("majors", [(0, 1), (1, 0), (1, 1)], ids=["B MN-major", "A MN-major", "both MN-major"])
def test_every_major_mode_and_swizzle(rng, majors, swizzles):
    k = 16
    if 0 in majors and swizzles[majors.index(0)]:
        k = max(k, swizzles[majors.index(0)] // 2)
    (a, left), (b, right) = integers(rng, "bf16", 64, k), integers(rng, "bf16", 128, k)
    got = multiply(left, right, ("f32", "bf16", "bf16"), majors=majors, swizzles=swizzles)
    assert np.array_equal(got, a @ b.T)


@all_schedules
def test_scale_d_and_negation(rng, completion):
    (a, left), (b, right) = integers(rng, "f16", 64, 64), integers(rng, "f16", 16, 64)
    types = ("f32", "f16", "f16")
    assert np.array_equal(multiply(left, right, types, scale=0, start="7.0f", completion=completion), a @ b.T)
    for scales, sign in (((-1, 1), -1), ((1, -1), -1), ((-1, -1), 1)):
        got = multiply(left, right, types, scales=scales, start="7.0f", completion=completion)
        assert np.array_equal(got, sign * (a @ b.T) + 7)


@all_schedules
@pytest.mark.parametrize(
    ("d", "ta", "mn_major"), [("f32", "bf16", 0), ("f16", "f16", 1), ("f32", "tf32", 0), ("f32", "e4m3", 0)]
)
def test_a_from_registers(rng, d, ta, mn_major, completion):
    k = 32 // SIZES[ta]
    (a, left), (b, right) = integers(rng, ta, 64, k), integers(rng, ta, 32, k)
    right, rest_b, _ = layout(right, mn_major, 0)
    per = 4 // SIZES[ta]
    words = np.zeros((128, 4), np.uint32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for r in range(4):
            row, col = 16 * warp + lane // 4 + 8 * (r % 2), lane % 4 * per + 4 * per * (r // 2)
            words[thread, r] = np.ascontiguousarray(left[row, col : col + per]).view(np.uint32)[0]
    text = source(32, d, ta, ta, 16, right.nbytes, "0", registers=True, majors=(0, mn_major))
    text = text.replace("wgmma(acc, da + (i * step_a >> 4)", "wgmma(acc, words")
    fetch = "u32 words[4]; for (int i = 0; i < 4; ++i) words[i] = ((const u32*)a)[threadIdx.x * 4 + i];\n"
    text = text.replace("wg_fence();\n    for", f"{fetch}wg_fence();\n    for")
    out = np.zeros((128, 8 if d == "f16" else 16), np.uint32)
    run_ptx(
        compile_ptx(text, "sm_90a"), "k", 1, 128, words, right, out, np.uint64(0), rest_b, np.int32(0), np.int32(0),
        np.int32(1), np.int32(1), shared=16 + right.nbytes + 1024, machine=Machine("sm_90a", completion=completion),
    )  # fmt: skip
    got = fragments(values_of(d, out.view(np.uint16) if d == "f16" else out), 32)
    assert np.array_equal(got, a @ b.T)


# Pipelines: two warpgroups beside a warp that does something else, several groups in flight.

PIPELINE = """
extern "C" __global__ void __launch_bounds__(288) k(
    const uint4* a, const uint4* b, float* d, int* other, u64 rest, int n)
{
    __shared__ __align__(1024) uint4 left[2][512], right[256];
    for (int i = threadIdx.x; i < 1024; i += 288) left[i / 512][i % 512] = a[i];
    for (int i = threadIdx.x; i < 256; i += 288) right[i] = b[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    int team = threadIdx.x / 128;
    if (team == 2) { atomicAdd(other, threadIdx.x); return; }
    float acc[16];
    u64 da = matrix(left[team], rest), db = matrix(right, rest);
    for (int j = 0; j < n; ++j) {
        wg_fence();
        for (int i = 0; i < 4; ++i) wgmma(acc, da + 2 * i, db + 2 * i, j > 0 || i > 0);
        wg_commit();
        wg_wait<1>();
        for (int i = 0; i < 16; ++i) asm volatile("" : "+f"(acc[i]) :: "memory");  // as CUTLASS pins accumulators
    }
    wg_wait<0>();
    for (int i = 0; i < 16; ++i) d[threadIdx.x * 16 + i] = acc[i];
}
"""


@all_schedules
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
def test_groups_in_flight(rng, completion, order):
    text = PRELUDE + WGMMA_HELPERS + wgmma_function(32, "f32", "bf16", "bf16") + PIPELINE
    (a, left), (b, right) = integers(rng, "bf16", 128, 64), integers(rng, "bf16", 32, 64)
    images = [image_k_major(x, 128) for x in (left, right)]
    d, other = np.zeros((2, 2, 128, 16), np.float32), np.zeros(1, np.int32)
    machine = Machine("sm_90a", completion=completion, order=order, seed=int(rng.integers(99)))
    ptx = compile_ptx(text, "sm_90a")
    run_ptx(ptx, "k", 1, 288, *images, d[0], other, descriptor(0, 1024, 128), np.int32(5), machine=machine)
    got = np.concatenate([fragments(part, 32) for part in d[0]])
    assert np.array_equal(got, 5 * (a @ b.T))
    assert other[0] == sum(range(256, 288))


# Planted bugs.

A_OR_B = [("rest_a", "A"), ("rest_b", "B")]


def planted(rng, edit=lambda text: text, completion="late", **changes):
    """(result, what a right kernel gives) of a 64 x 16 x 64 product in bf16 with swizzle 128."""
    (a, left), (b, right) = integers(rng, "bf16", 64, 64), integers(rng, "bf16", 16, 64)
    return multiply(left, right, ("f32", "bf16", "bf16"), completion=completion, edit=edit, **changes), a @ b.T


def swap(old, new):
    def edit(text):
        assert old in text
        return text.replace(old, new)

    return edit


def both(*edits):
    def edit(text):
        for each in edits:
            text = each(text)
        return text

    return edit


IN_FLIGHT = r"register %f\d+ is the accumulator of an asynchronous wgmma.mma_async"
NO_FENCE = r"missing wgmma.fence: register %f\d+ was accessed since the last one, at\n +PTX line \d+: "
REPORTED = {
    "no wait": (
        swap("wg_wait<0>();", ""),
        IN_FLIGHT + r" that no wgmma.wait_group of this thread has covered, issued at\n +PTX line \d+: wgmma.mma"),
    "no commit": (swap("wg_commit();", ""), IN_FLIGHT),
    "wait for all but one": (swap("wg_wait<0>", "wg_wait<1>"), IN_FLIGHT),
    "accumulator read before the wait": (
        swap("wg_wait<0>();", "d[0] = acc[1]; wg_wait<0>();"), IN_FLIGHT + r"(.|\n)*\d: st\.global"),
    "accumulator written before the wait": (
        swap("wg_commit();", 'asm volatile("mul.f32 %0, %0, %0;" : "+f"(acc[3])); wg_commit();'),
        IN_FLIGHT + r"(.|\n)*\d: mul"),
    "the later of two products": (
        swap("wg_wait<0>();", "float more[8]; wg_fence(); wgmma(more, da, db, 0); wg_commit(); wg_wait<1>();"
             "d[0] = acc[1]; d[1] = more[1]; wg_wait<0>(); d[2] = more[2];"),
        IN_FLIGHT + r"(.|\n)*\d: st\.global.*\+4\]"),
    "no fence at all": (swap("wg_fence();", ""), r"without a wgmma.fence before the warpgroup's first one"),
    "fence before the accumulator is set": (
        both(swap("= 0;\n", "= d[i];\n"), swap("float acc", "wg_fence(); float acc"), swap("wg_fence();\n", "")),
        NO_FENCE + r"ld\.global"),
    "no fence before the next product": (
        swap("wg_wait<0>();", "wg_wait<0>(); acc[2] *= 3; wgmma(acc, da, db, 1); wg_commit(); wg_wait<0>();"),
        NO_FENCE + "mul"),
    "another shape on an accumulator in flight": (
        both(swap("wg_commit();", "narrow(*(float (*)[4])acc, da, db, 1); wg_commit();"),
             swap('extern "C"', wgmma_function(8, "f32", "bf16", "bf16", name="narrow") + 'extern "C"')),
        IN_FLIGHT),
    "no proxy fence": (
        swap('asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', ""),
        r"wgmma reads shared offset 0x\w+ through the async proxy, but no fence\.proxy\.async lies between"),
    "no barrier after the tiles are written": (
        swap("__syncthreads();", ""), r"RAW race on shared memory: wgmma|no fence\.proxy"),
    "a tile is overwritten before the wait": (
        swap("wg_wait<0>();", "left[threadIdx.x] = right[0]; wg_wait<0>();"),
        r"store to shared offset 0x[0-9a-f]+ overwrites the source of an asynchronous wgmma"),
    "an uninitialised tile": (swap("i < 2048 / 16", "i < 100"), r"uninitialised shared memory: matrix B at"),
    "a descriptor that differs": (
        swap("matrix(right, rest_b)", "matrix(right + threadIdx.x / 64, rest_b)"),
        r"the descriptor of B must be the same in all threads of the warpgroup(.|\n)*thread \(64, 0, 0\)"),
    "an address that is not masked": (
        swap("wg_fence();\n", "db |= 0xABull << 14; wg_fence();\n"),
        r"reserved bits 0x\w+ are set \(an address of more than 18 bits"),
    "a descriptor of tcgen05": (
        swap("wg_fence();\n", "db |= 1ull << 46; wg_fence();\n"), r"\(a descriptor for tcgen05\)"),
    "one warp elsewhere": (
        swap("wgmma(acc", "if (threadIdx.x < 96) wgmma(acc"), r"all 128 threads of a warpgroup"),
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("bug", REPORTED)
def test_planted_bugs_are_reported(rng, bug, completion):
    edit, message = REPORTED[bug]
    with pytest.raises((KernelFault, Deadlock), match=message):
        planted(rng, edit, completion)


def test_the_kernel_the_bugs_are_planted_in_is_right(rng):
    for completion in COMPLETIONS:
        got, want = planted(rng, completion=completion)
        assert np.array_equal(got, want)


@pytest.mark.parametrize("what", ["stride", "swizzle", "k step", "leading offset"])
def test_a_wrong_layout_gives_a_wrong_result_or_is_out_of_bounds(rng, what):
    right = descriptor(0, 1024, 128)
    if what == "leading offset":
        (a, left), (b, other) = integers(rng, "bf16", 64, 32), integers(rng, "bf16", 16, 32)
        got = multiply(left, other, ("f32", "bf16", "bf16"), swizzles=(0, 0), rest_b=descriptor(128, 128, 0))
        assert not np.array_equal(got, a @ b.T)
        return
    wrong = {
        "stride": {"rest_b": descriptor(0, 512, 128)}, "swizzle": {"rest_a": descriptor(0, 1024, 64)},
        "k step": {"step_a": 16},
    }[what]  # fmt: skip
    got, want = planted(rng, **wrong)
    assert not np.array_equal(got, want)
    with pytest.raises(KernelFault, match=r"out of bounds: matrix B lies at shared offsets .*stride offset 0x2000"):
        planted(rng, rest_b=right + np.uint64((0x2000 - 1024) >> 4 << 32))


def test_registers_of_a_may_be_read_but_not_written_in_flight():
    text = source(32, "f32", "bf16", "bf16", 16, 1024, "0", registers=True)
    text = text.replace("wgmma(acc, da + (i * step_a >> 4)", "wgmma(acc, words")
    words = "u32 words[4] = {u32(step_a), u32(step_a + 1), 2, 3};\n    "
    text = text.replace("wg_fence();\n    for", f"{words}wg_fence();\n    for")
    args = np.zeros((128, 4), np.uint32), np.zeros(256, np.uint32), np.zeros((128, 16), np.uint32), np.uint64(0)
    more = descriptor(512, 128, 0), np.int32(0), np.int32(0), np.int32(1), np.int32(1)
    ptx = compile_ptx(text, "sm_90a")
    register = re.search(r"wgmma\.mma_async.*, \{(%r\d+), ", ptx).group(1)

    def run(instruction):
        changed = ptx.replace("wgmma.commit_group", f"{instruction}\n\twgmma.commit_group")
        run_ptx(changed, "k", 1, 128, *args, *more, shared=4096, machine=Machine("sm_90a"))

    run(f"{{ .reg .b32 other; add.u32 other, {register}, 1; }}")
    with pytest.raises(KernelFault, match=rf"register {register} is the A fragment of an asy(.|\n)*\d: add"):
        run(f"add.u32 {register}, {register}, 1;")


def module(instruction, target="sm_90a"):
    return f""".version 8.0\n.target {target}\n.address_size 64\n.entry k() {{
    .reg .pred p; .reg .b64 a, b; .reg .b32 d0, d1, d2, d3; .reg .f32 f0, f1, f2, f3;
    {instruction}
    ret; }}"""


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("sync.aligned.m64n8k32.s32.s8.s8 {d0,d1,d2,d3}, a, b, p;", "wgmma on integers is not implemented"),
        ("sp.sync.aligned.m64n8k32.f32.f16.f16 {f0,f1,f2,f3}, a, b, d0, 0, p, 1, 1, 0, 0;", "sparse matrices are not"),
        ("sync.aligned.m64n12k16.f32.f16.f16 {f0,f1,f2,f3}, a, b, p, 1, 1, 0, 0;", "is not implemented"),
        ("sync.aligned.m64n8k16.f32.f16.f16 {f0,f1,f2,f3}, a, b, p, 1, 1;", "4 immediates are wanted"),
        ("sync.aligned.m64n8k16.f32.f16.f16 {f0,f1,f2}, a, b, p, 1, 1, 0, 0;", "wrong number of registers"),
        ("sync.aligned.m64n8k16.f32.f16.f16 {f0,f1,f2,f2}, a, b, p, 1, 1, 0, 0;", "not of distinct"),
    ],
)  # fmt: skip
def test_refused_by_name(instruction, message):
    with pytest.raises(UnsupportedInstruction, match=rf"wgmma\.mma_async(.|\n)*{message}(.|\n)*PTX line 6"):
        run_ptx(module(f"wgmma.mma_async.{instruction}"), "k", 1, 128)


@pytest.mark.parametrize("width", SWIZZLES)
def test_a_swizzle_permutes_the_chunks_of_its_pattern(width):
    at = np.arange(0, 4096, 4)
    for base in range(8):
        there = swizzle(at, width, base)
        assert np.array_equal(np.sort(there), at)
        assert np.array_equal(swizzle(there, width, base), at)
        assert np.array_equal(there >> 7, at >> 7)
    assert np.array_equal(swizzle(at + 128 * 3, width, 3), swizzle(at, width) + 128 * 3)
    with pytest.raises(EmulatorError, match="a width of 96 B; there are 0, 32, 64, 128"):
        swizzle(at, 96)


def test_only_hopper_has_it():
    with pytest.raises(UnsupportedInstruction, match=r"wgmma\.fence\.sync\.aligned exists on sm_90a only, not on sm_1"):
        run_ptx(module("wgmma.fence.sync.aligned;", "sm_100a"), "k", 1, 128)
