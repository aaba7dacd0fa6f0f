# ruff: noqa: E501  (kernels are inline assembly)
"""tcgen05.cp, scale factors, narrow factors, packed ld and st: one instruction each, against layouts written anew here.

The 128x4 layout is host packing in `formats.py`, and copy and reading here, from the documentation of each.
"""

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from asynchronous import all_schedules
from programs import PRELUDE, compile_ptx, run_ptx
from scaled_kernels import pack6
from test_tcgen05 import PRODUCT, STORE_A, WAIT_MMA, WAIT_ST, layout

from dsv4_rt import formats
from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.block_scale import ScaleFactors, of_padded, padded_bytes, values
from dsv4_rt.emulator.descriptors import decode_tcgen05
from dsv4_rt.emulator.tcgen05 import decode_instruction
from dsv4_rt.emulator.wgmma import reach
from dsv4_rt.errors import EmulatorError, KernelFault, UnsupportedInstruction

# Copies: an image in shared memory, one tcgen05.cp for each descriptor, all of tensor memory afterwards.

COPY = """
extern "C" __global__ void __launch_bounds__(128) k(const uint4* image, u32* found, const u32* start, const u64* words, const u32* to, int copies) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ u32 base;
    __shared__ __align__(8) u64 bar;
    for (int i = threadIdx.x; i < BYTES / 16; i += 128) ((uint4*)memory)[i] = image[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"((u32)__cvta_generic_to_shared(&bar)));
    if (warp == 0)
        asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 64;"
                     :: "r"((u32)__cvta_generic_to_shared(&base)) : "memory");
    __syncthreads();
    u32 at = base + (warp * 32 << 16);
    for (int n = 0; n < 64; ++n)
        asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {%1};" :: "r"(at + n), "r"(start[threadIdx.x * 64 + n]) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 first = (u32)__cvta_generic_to_shared(memory) >> 4;
        for (int i = 0; i < copies; ++i)
            asm volatile("tcgen05.cp.cta_group::1.SHAPE [%0], %1;" :: "r"(base + to[i]), "l"(words[i] + first) : "memory");
        asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];"
                     :: "r"((u32)__cvta_generic_to_shared(&bar)) : "memory");
    }
    asm volatile("{ .reg .pred P;\\nW: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], 0;\\n@!P bra W;\\n}"
                 :: "r"((u32)__cvta_generic_to_shared(&bar)) : "memory");
    for (int n = 0; n < 64; ++n)
        asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(found[threadIdx.x * 64 + n]) : "r"(at + n));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    __syncthreads();
    if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 64;" :: "r"(base) : "memory");
}
"""


def descriptor(start=0, leading=0, stride=128, swizzle=0):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | {0: 0, 32: 6, 64: 4, 128: 2}[swizzle] << 61


def run_copies(shape, image, words, to, start, completion, rng):
    """All 64 columns of tensor memory, [128, 64] words, after copies of an image in shared memory."""
    machine = Machine("sm_100a", completion=completion, seed=int(rng.integers(1 << 30)))
    source = PRELUDE + COPY.replace("SHAPE", shape).replace("BYTES", str(image.nbytes))
    found = np.zeros((128, 64), np.uint32)
    run_ptx(compile_ptx(source, "sm_100a"), "k", 1, 128, image, found, start, np.array(words, np.uint64),
            np.array(to, np.uint32), np.int32(len(words)), machine=machine, shared=image.nbytes + 1024)  # fmt: skip
    return found


def warps_of(shape, row):
    """The lanes a source row goes to, by the words of the ISA: which warp's quarter gets it, and where in it."""
    if shape.startswith("128x"):
        return [row]
    if shape == "4x256b":
        return [32 * row]
    if shape == "32x128b.warpx4":
        return [32 * warp + row for warp in (0, 1, 2, 3)]
    pairs = ((0, 2), (1, 3)) if shape.endswith("02_13") else ((0, 1), (2, 3))  # each pair gets one half of the rows
    return [32 * warp + row % 32 for warp in pairs[row // 32]]


SHAPES = {"128x256b": (128, 32), "4x256b": (4, 32), "128x128b": (128, 16), "64x128b.warpx2::02_13": (64, 16),
          "64x128b.warpx2::01_23": (64, 16), "32x128b.warpx4": (32, 16)}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("swizzle", "completion"), [(0, "early"), (0, "late"), (0, "random"), (32, "random"), (128, "late")]
)
def test_copy(shape, swizzle, completion, rng):
    rows, width = SHAPES[shape]
    data = rng.integers(0, 256, (rows, width), dtype=np.uint8)
    image = np.full(8192 if swizzle < 128 else 16384, 0xEE, np.uint8)
    pitch = swizzle or 16
    for r in range(rows):
        for chunk in range(width // 16):
            at = r // 8 * 8 * pitch + r % 8 * pitch + (16 * chunk if swizzle else 4096 * chunk)
            at ^= (at >> 7 & (pitch // 16 - 1)) << 4
            image[at : at + 16] = data[r, 16 * chunk : 16 * chunk + 16]
    start = rng.integers(0, 1 << 32, (128, 64), dtype=np.uint32)
    lane = 3 if shape == "4x256b" else 0
    word = descriptor(leading=0 if swizzle else 4096, stride=8 * pitch, swizzle=swizzle)
    found = run_copies(shape, image, [word], [lane << 16 | 5], start, completion, rng)
    want = start.copy()
    for r in range(rows):
        for to in warps_of(shape, r):
            want[to + lane, 5 : 5 + width // 4] = data[r].view(np.uint32)
    np.testing.assert_array_equal(found, want)


def test_two_widths_of_one_descriptor(rng):
    image = rng.integers(0, 256, 4096, dtype=np.uint8)
    start = np.zeros((128, 64), np.uint32)
    shape = "128x256b [%0 + 16], %1; tcgen05.cp.cta_group::1.128x128b"
    found = run_copies(shape, image, [descriptor(leading=2048)], [0], start, "early", rng)
    halves = image.reshape(2, 128, 16).view(np.uint32)
    np.testing.assert_array_equal(found[:, :4], halves[0])
    np.testing.assert_array_equal(found[:, 16:24], np.concatenate(halves, axis=1))


@pytest.mark.parametrize(("source", "bits"), [("b4x16_p64", 4), ("b6x16_p32", 6)])
@pytest.mark.parametrize(("shape", "completion"), [("128x256b", "random"), ("32x128b.warpx4", "late")])
def test_copy_of_padded_elements(shape, source, bits, completion, rng):
    rows, width = SHAPES[shape]
    codes = rng.integers(0, 1 << bits, (rows, width), dtype=np.uint8)
    packed = formats.e2m1_pack(codes) if bits == 4 else pack6(codes)
    image = np.full((width // 16, rows, 16), 0xEE, np.uint8)
    image[..., : 2 * bits] = packed.reshape(rows, width // 16, 2 * bits).transpose(1, 0, 2)
    start = np.zeros((128, 64), np.uint32)
    found = run_copies(f"{shape}.b8x16.{source}", image, [descriptor(leading=16 * rows)], [0], start, completion, rng)
    want = (codes << (2 if bits == 4 else 0)).view(np.uint32)  # e2m1 in the middle of a byte, 6 bits at its lower end
    for r in range(rows):
        for to in warps_of(shape, r):
            np.testing.assert_array_equal(found[to, : width // 4], want[r])


# Scale factors.


@all_schedules
def test_every_scale_of_the_128x4_layout(completion, rng):
    """A number for each (row, block), packed by the host, copied by cp, read as products of every size and id read it."""
    rows, blocks = 256, 12
    number = np.arange(rows * blocks).reshape(rows, blocks)
    digits = []
    for digit in (number % 200, number // 200):  # bytes: ue8m0 codes, whose values tell them apart
        image = formats.interleave_128x4(digit.astype(np.uint8))
        words = [descriptor(512 * i) for i in range(len(image) // 512)]
        to = [i % 3 * 8 + i // 3 * 4 for i in range(len(words))]  # k block by k block, 8 columns for 256 rows
        start = np.zeros((128, 64), np.uint32)
        slab = SimpleNamespace(cells=run_copies("32x128b.warpx4", image, words, to, start, completion, rng))
        read = np.full((rows, blocks), -1)
        for word in range(3):
            for vector, ids in ((1, (0, 1, 2, 3)), (2, (0, 2)), (4, (0,))):
                for at in ids:
                    found = ScaleFactors("B", 8 * word, rows, "ue8m0", vector, at).take(slab)
                    codes = (np.log2(found) + 127).astype(int).T
                    column = slice(4 * word + at, 4 * word + at + vector)
                    assert vector == 1 or (read[:, column] == codes).all()
                    read[:, column] = codes
        digits.append(read)
    np.testing.assert_array_equal(digits[0] + 200 * digits[1], number)


def test_offsets_of_the_documentation():
    """A scale's byte is (row % 32) * 16 + (row / 32) % 4 * 4 + block % 4 of its 512: counted out by hand."""
    offsets = formats.scale_offsets_128x4(256, 8)
    at = 0
    for row_block in range(2):
        for k_block in range(2):
            for lane in range(32):
                for quarter in range(4):
                    for k in range(4):
                        assert offsets[128 * row_block + 32 * quarter + lane, 4 * k_block + k] == at
                        at += 1


# Elements.


def test_values_of_all_codes():
    """The emulator's own tables against those of `formats.py` and of ml_dtypes."""
    every = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_array_equal(values("e4m3", every), formats.e4m3_decode(every))
    np.testing.assert_array_equal(values("e5m2", every), formats.e5m2_decode(every))
    np.testing.assert_array_equal(values("ue8m0", every), formats.ue8m0_decode(every))
    np.testing.assert_array_equal(values("ue4m3", every[:128]), formats.e4m3_decode(every[:128]))
    np.testing.assert_array_equal(values("e2m1", every[:16]), formats.e2m1_decode(every[:16]))
    for ty, of in (("e2m3", ml_dtypes.float6_e2m3fn), ("e3m2", ml_dtypes.float6_e3m2fn)):
        np.testing.assert_array_equal(values(ty, every[:64]), every[:64].view(of).astype(np.float64))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("padding", [False, True])
def test_every_fp4_of_a_matrix(padding, swizzle):
    """A number for each (row, k), in hexadecimal digits, packed by the host, found and unpacked as a product does."""
    rows, depth = 128, 32 if padding else 64
    number = np.arange(rows * depth).reshape(rows, depth)
    read = np.zeros_like(number)
    for shift in (0, 4, 8, 12):
        codes = (number >> shift & 15).astype(np.uint8)
        elements = codes if padding else formats.e2m1_pack(codes)
        image, word, _ = layout(np.pad(elements, ((0, 0), (0, max(swizzle - 32, 0)))), 0, swizzle)
        memory = np.frombuffer((padded("e2m1", image) if padding else image).tobytes(), np.uint8)
        place, _ = reach(decode_tcgen05(int(word)), rows, 32, 1, False)
        if padding:
            first, last, at = padded_bytes(place, "e2m1")
            found = values("e2m1", of_padded(memory[first], memory[last], at, "e2m1"))
        else:
            found = values("e2m1x2", memory[place])
        read |= formats.e2m1_encode(found.T).astype(int) << shift
    np.testing.assert_array_equal(read, number)


# Single products, with A in shared or tensor memory.

NARROW = {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}


def codes_of(rng, ty, *shape):
    """(codes, values) of small exact numbers."""
    types = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn,
             "e3m2": ml_dtypes.float6_e3m2fn, "e2m1": ml_dtypes.float4_e2m1fn}  # fmt: skip
    if ty in ("e4m3", "e5m2"):
        values = rng.integers(-8, 9, shape).astype(types[ty])
        return values.view(np.uint8), values.astype(np.float64)
    codes = rng.integers(0, 16 if ty == "e2m1" else 64, shape, dtype=np.uint8)
    return codes, codes.view(types[ty]).astype(np.float64)


def padded(ty, image):
    """An image of one element a byte, its chunks of 16 packed and padded with garbage."""
    if ty in ("e4m3", "e5m2"):
        return image
    chunks = np.ascontiguousarray(image).view(np.uint8).reshape(-1, 16)
    packed = formats.e2m1_pack(chunks) if ty == "e2m1" else pack6(chunks)
    out = np.full_like(chunks, 0xEE)
    out[:, : packed.shape[1]] = packed
    return out


PRODUCTS = [  # kind, spelling, factors, majors, swizzle, A in tensor memory, id of both scales
    ("f8f6f4", "", ("e2m1", "e4m3"), (0, 0), 128, False, 0), ("f8f6f4", "", ("e3m2", "e2m3"), (1, 1), 128, False, 0),
    ("f8f6f4", "", ("e2m1", "e3m2"), (1, 0), 64, False, 0), ("f8f6f4", "", ("e2m3", "e5m2"), (0, 0), 64, True, 0),
    ("mxf8f6f4", "scale_vec::1X", ("e4m3", "e2m1"), (0, 1), 128, False, 3), ("mxf8f6f4", "block32", ("e2m1", "e2m1"), (0, 0), 128, True, 2),
    ("mxf8f6f4", "", ("e3m2", "e5m2"), (0, 0), 0, True, 1), ("mxf4", "", ("e2m1", "e2m1"), (0, 0), 128, False, 2),
    ("mxf4", "scale_vec::2X", ("e2m1", "e2m1"), (0, 0), 0, True, 0), ("mxf4", "block32", ("e2m1", "e2m1"), (0, 0), 64, False, 0),
    ("mxf4nvf4", "scale_vec::2X", ("e2m1", "e2m1"), (0, 0), 128, True, 2), ("mxf4nvf4", "block32", ("e2m1", "e2m1"), (0, 0), 32, False, 0),
    ("mxf4nvf4", "scale_vec::4X", ("e2m1", "e2m1"), (0, 0), 128, True, 0), ("mxf4nvf4", "block16", ("e2m1", "e2m1"), (0, 0), 128, False, 0),
    ("mxf4nvf4", "scale_vec::4X, ue4m3", ("e2m1", "e2m1"), (0, 0), 0, False, 0), ("mxf4nvf4", "block16, ue4m3", ("e2m1", "e2m1"), (0, 0), 128, True, 0),
]  # fmt: skip
SFA, SFB = 180, 190


VECTORS = {("mxf8f6f4", ""): 1, ("mxf8f6f4", "block32"): 1, ("mxf4", ""): 2, ("mxf4", "block32"): 2, ("mxf4nvf4", "block32"): 2,
           ("mxf4nvf4", "block16"): 4}  # fmt: skip


def run_product(kind, size, types, majors, swizzle, in_tmem, id_, rng, edit=lambda text: text):
    """Exact: D starts with integers, A is negated, cells outside D and everything else stay."""
    size, _, scale = size.partition(", ")
    scale = scale or "ue8m0"
    vector = 0 if kind == "f8f6f4" else VECTORS.get((kind, size)) or int(size[-2])
    m, n, packed = 128, 48 if majors[1] else 40, kind in ("mxf4", "mxf4nvf4")
    depth = 64 if packed else 32
    images, words, numbers, codes = [], [], [], []
    for ty, rows, major in zip(types, (m, n), majors, strict=True):
        wide = 128 * -(-rows // 128) if major else rows  # whole patterns of MN-major rows
        code, value = codes_of(rng, ty, wide, depth)
        bits = formats.e2m1_pack(code) if packed else code
        if swizzle and not major:
            bits = np.pad(bits, ((0, 0), (0, swizzle - 32)), constant_values=0xEE & 15)
        image, word, _ = layout(bits, major, swizzle)
        images.append(np.frombuffer((image if packed else padded(ty, image)).tobytes(), np.uint8).copy())
        words.append(word)
        numbers.append(value[:rows])
        codes.append(code[:rows])
    before = rng.integers(-100, 100, (128, 256))
    start = before.astype(np.float32).view(np.uint32).copy()
    form = m >> 4 << 24 | n >> 3 << 17 | 1 << 13 | majors[0] << 15 | majors[1] << 16
    if packed:
        form |= 1 << 7 | 1 << 10
    else:
        form |= NARROW[types[0]] << 7 | NARROW[types[1]] << 10
    spelling = f"kind::{kind}" + ".block_scale" * bool(vector) + f".{size}" * bool(size)
    source = PRODUCT.replace("kind::KIND", spelling)
    if vector:
        form |= id_ << 4 | id_ << 29 | (scale == "ue8m0") << 23
        for i, (rows, column) in enumerate(((m, SFA), (n, SFB))):
            sf = rng.integers(125, 130, (rows, vector)) if scale == "ue8m0" else rng.integers(0x30, 0x48, (rows, vector))
            factor = formats.ue8m0_decode(sf) if scale == "ue8m0" else formats.e4m3_decode(sf)
            numbers[i] = numbers[i] * np.repeat(factor, depth // vector, axis=1)
            for r in range(rows):
                for part in range(4):
                    cell = start[32 * part + r % 32, column + r // 32 :][:1].view(np.uint8)
                    cell[id_ : id_ + vector] = sf[r]
        source = source.replace("%1, %2, %3, 1;", "%1, %2, %3, [%4], [%5], 1;")
        upper = id_ << 30  # CUTLASS leaves the id there
        source = source.replace('"r"(form) : "memory"', f'"r"(form), "r"(base + {SFA + upper}u), "r"(base + {SFB}) : "memory"')
    else:
        form |= 1 << 4
    if in_tmem:
        held = formats.e2m1_pack(codes[0]) if packed else codes[0] << (2 if types[0] == "e2m1" else 0)
        start[:, 128:136] = np.ascontiguousarray(held).view(np.uint32)
        source = source.replace("[%0], %1,", "[%0], [%1],").replace('"l"(da + (i * step_a >> 4))', '"r"(base + 128)')
    source = source.replace("LANE", "0").replace("BYTES_A", str(images[0].nbytes)).replace("BYTES_B", str(images[1].nbytes))
    d = np.zeros((128, 256), np.uint32)
    machine = Machine("sm_100a", completion="late")
    run_ptx(compile_ptx(PRELUDE + edit(source), "sm_100a"), "k", 1, 128, *images, d, start, *words, np.uint32(form), np.int32(0),
            np.int32(0), np.int32(1), machine=machine, shared=images[0].nbytes + images[1].nbytes + 1024)  # fmt: skip
    np.testing.assert_array_equal(d[:, :n].view(np.float32), before[:, :n] - numbers[0] @ numbers[1].T)
    np.testing.assert_array_equal(d[:, n:], start[:, n:])


@pytest.mark.parametrize(("kind", "size", "types", "majors", "swizzle", "in_tmem", "id_"), PRODUCTS)
def test_product(kind, size, types, majors, swizzle, in_tmem, id_, rng):
    run_product(kind, size, types, majors, swizzle, in_tmem, id_, rng)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (WAIT_ST, "    __syncthreads();\n", "missing tcgen05.wait::st: tcgen05.mma, scale factors of A of tensor memory"),
        (f"(base + {SFB})", "(base + 255)", "out of bounds: tcgen05.mma, scale factors of B of TMEM column"),
        (f"(base + {SFB})", "(base + 140)", "scale factors of B differ among the four 32-lane partitions: those of row 0 are"),
        (f"(base + {SFB})", "(base + 20)", "the scale factors of B lie in columns .* the accumulator in"),
        (WAIT_MMA, STORE_A.replace("130", str(SFA)) + WAIT_MMA, "overwrites scale factors of an asynchronous tcgen05.mma that"),
        ("n < 256; ++n)\n        asm volatile(\"tcgen05.st", "n < 192; ++n)\n        asm volatile(\"tcgen05.st", "a sum must not accumulate|undefined"),
    ],
)  # fmt: skip
def test_scales_misused(old, new, message, rng):
    def edit(text):
        assert text.count(old) == 1
        return text.replace(old, new)

    with pytest.raises(KernelFault, match=message) as caught:
        run_product("mxf4nvf4", "scale_vec::4X", ("e2m1", "e2m1"), (0, 0), 128, False, 0, rng, edit)
    assert re.search(r"PTX line \d+: .*\n  .*program\.cu:\d+", str(caught.value))


# Instruction descriptors.

NV = 1 << 7 | 1 << 10 | 64 >> 3 << 17 | 1 << 27
MX8 = 1 << 23 | 64 >> 3 << 17 | 1 << 27


@pytest.mark.parametrize(
    ("bits", "kind", "vector", "message"),
    [
        (NV | 1, "mxf4nvf4", 4, "must be 0"), (NV | 8, "mxf4nvf4", 4, "must be 0"), (NV | 64, "mxf4nvf4", 4, "must be 0"),
        (NV | 1 << 12, "mxf4nvf4", 4, "must be 0"), (NV | 1 << 25, "mxf4nvf4", 4, "must be 0"), (MX8 | 1 << 31, "mxf8f6f4", 1, "must be 0"),
        (NV, "mxf4nvf4", 2, "must be UE8M0"), (NV, "mxf4", 2, "must be UE8M0"), (MX8 ^ 1 << 23, "mxf8f6f4", 1, "must be UE8M0"),
        (NV | 1 << 4, "mxf4nvf4", 4, "id 1 of B; it must be 0$"), (NV | 1 << 23 | 3 << 29, "mxf4", 2, "id 3 of A; it must be 0 or 2"),
        (NV ^ 1 << 7, "mxf4nvf4", 4, "format 0 of A"), (NV | 2 << 10, "mxf4nvf4", 4, "format 3 of B"), (MX8 | 2 << 7, "mxf8f6f4", 1, "format 2 of A"),
        (NV | 1 << 28, "mxf4nvf4", 4, "M = 384"), (MX8 ^ 1 << 27, "mxf8f6f4", 1, "M = 0"), (MX8 & ~(63 << 17), "mxf8f6f4", 1, "N = 0"),
        (MX8 | 63 << 17, "mxf8f6f4", 1, "N = 504"), (MX8 | 1 << 16 | 1 << 17, "mxf8f6f4", 1, "N = 72; .* in steps of 16"), (NV | 1 << 16, "mxf4nvf4", 4, "K-major"),
    ],
)  # fmt: skip
def test_forbidden_instruction_descriptor(bits, kind, vector, message):
    with pytest.raises(EmulatorError, match=message):
        decode_instruction(bits, kind, vector)


def test_instruction_descriptors():
    assert decode_instruction(NV | 1 << 23, "mxf4nvf4", 4).scales.ty == "ue8m0"
    d = decode_instruction(MX8 | 3 << 4 | 1 << 29 | 5 << 7 | 1 << 14, "mxf8f6f4", 1)
    assert (d.m, d.n, d.types, d.negative, d.scales.ids) == (128, 64, ("e2m1", "e4m3", "f32"), True, (1, 3))
    for bits in (NV | 4, NV | 1 << 31):
        with pytest.raises(UnsupportedInstruction, match="not implemented"):
            decode_instruction(bits, "mxf4nvf4", 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale [r], d, d, r, [r], [r], p;", "takes .scale_vec::2X, .block32, .scale_vec::4X"),
        ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::4X [r], d, d, r, [r], [r], p;", "takes .scale_vec::2X, .block32"),
        ("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block16 [r], d, d, r, [r], [r], p;", "takes .scale_vec::1X, .block32"),
        ("tcgen05.mma.cta_group::1.kind::f8f6f4.block_scale [r], d, d, r, [r], [r], p;", "is not implemented"),
        ("tcgen05.mma.cta_group::1.kind::mxf4 [r], d, d, r, p;", "is not implemented"),
        ("tcgen05.mma.sp.cta_group::1.kind::mxf4.block_scale [r], d, d, [r], r, [r], [r], p;", "sparse matrices"),
        ("tcgen05.cp.cta_group::1.64x128b [r], d;", "is not implemented"), ("tcgen05.cp.cta_group::1.32x128b.warpx4.b8x16 [r], d;", "is not implemented"),
    ],
)  # fmt: skip
def test_is_refused_by_name(line, message):
    text = f""".version 9.0
    .target sm_100a
    .address_size 64
    .visible .entry f() .reqntid 32, 1, 1 {{
    .reg .b32 r; .reg .b64 d; .reg .pred p;
    mov.b32 r, 0; mov.b64 d, 0; setp.eq.b32 p, r, 0;
    {line}
    ret; }}"""
    with pytest.raises(UnsupportedInstruction, match=re.escape(message)) as caught:
        Machine("sm_100a").load(text, "refused").program("f")
    assert "PTX line 7" in str(caught.value)


# Packed ld and st.

PACKED = """
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
    asm volatile("tcgen05.ld.sync.aligned.SHAPE.pack::16b.b32 {REGS}, [%COUNT]SPLIT;" : OUT : "r"(at));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    for (int i = 0; i < COUNT; ++i) y[threadIdx.x * COUNT + i] = r[i];
    for (int i = 0; i < COUNT; ++i) r[i] = ~r[i];
    asm volatile("tcgen05.st.sync.aligned.SHAPE.unpack::16b.b32 [%COUNT]SPLIT, {REGS};" :: IN, "r"(at) : "memory");
    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");
    for (int n = 0; n < 64; ++n)
        asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%0}, [%1];" : "=r"(y[128 * COUNT + threadIdx.x * 64 + n]) : "r"(at + n));
    asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
    __syncthreads();
    if (warp == 0) asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 64;" :: "r"(base) : "memory");
}
"""


@pytest.mark.parametrize(
    ("shape", "repeat", "count", "split"),
    [("32x32b", 16, 16, 0), ("16x64b", 8, 8, 0), ("16x128b", 4, 8, 0), ("16x256b", 2, 8, 0), ("16x32bx2", 8, 8, 20)],
)
def test_packed_load_and_store(shape, repeat, count, split, rng):
    """As in CUTLASS's tables: the same fragments, of a matrix whose columns are the low halves, two to a word."""
    text = PACKED.replace("SHAPE", f"{shape}.x{repeat}").replace("SPLIT", f", {split}" if split else "")
    text = text.replace("REGS", ", ".join(f"%{i}" for i in range(count)))
    text = text.replace("OUT", ", ".join(f'"=r"(r[{i}])' for i in range(count)))
    text = text.replace("IN", ", ".join(f'"r"(r[{i}])' for i in range(count))).replace("COUNT", str(count))
    x = rng.integers(0, 1 << 32, (128, 64), dtype=np.uint32)
    y = np.zeros(128 * count + 128 * 64, np.uint32)
    run_ptx(compile_ptx(PRELUDE + text, "sm_100a"), "k", 1, 128, x, y)
    got, after = y[: 128 * count].reshape(128, count), y[128 * count :].reshape(128, 64)
    want = x.copy()
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        quad, inside = divmod(lane, 4)
        for r in range(count):
            row, word = {  # in units of 32 bits of the packed matrix
                "32x32b": (lane, r), "16x32bx2": (lane % 16, r), "16x64b": (quad + 8 * (inside & 1), 2 * r + (inside >> 1)),
                "16x128b": (quad + 8 * (r % 2), 4 * (r // 2) + inside),
                "16x256b": (quad + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * inside + r % 2),
            }[shape]  # fmt: skip
            row, column = 32 * warp + row, 2 * word + (split if lane >= 16 else 0)
            low, high = int(x[row, column]) & 0xFFFF, int(x[row, column + 1]) & 0xFFFF
            assert got[thread, r] == low | high << 16
            want[row, column], want[row, column + 1] = ~low & 0xFFFF, ~high & 0xFFFF
    touched = want != x
    np.testing.assert_array_equal(after[~touched], x[~touched])
    np.testing.assert_array_equal(after[touched] & 0xFFFF, want[touched])


def test_packed_load_out_of_range(rng):
    text = PACKED.replace("SHAPE", "32x32b.x16").replace("SPLIT", "").replace("[%COUNT]", "[%16 + 40]").replace("COUNT", "16")
    text = text.replace("REGS", ", ".join(f"%{i}" for i in range(16)))
    text = text.replace("OUT", ", ".join(f'"=r"(r[{i}])' for i in range(16))).replace("IN", ", ".join(f'"r"(r[{i}])' for i in range(16)))
    x, y = np.zeros((128, 64), np.uint32), np.zeros(128 * 16 + 128 * 64, np.uint32)
    with pytest.raises(KernelFault, match=r"out of bounds: tcgen05.ld.32x32b of TMEM column"):
        run_ptx(compile_ptx(PRELUDE + text, "sm_100a"), "k", 1, 128, x, y)
