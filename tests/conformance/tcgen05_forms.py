"""The tcgen05 forms that a B200 is to judge: products, commits, tensor-memory loads, stores and allocations.

A form is a small kernel. It fills tensor memory, shared memory or both, does one thing, and gives back all of tensor
memory that it filled, so that what was changed beside the result shows too. Each of the eight CTAs of a product has
operands in another manner (tensor_operands.py), and for every instruction descriptors of its own: a swizzle, strides, a
base offset and a start, pattern-aligned or not, in a shared-memory image full of numbers.

To add a product, add a call in `_products`; other operand types need their `FORMATS` and `BYTES` in tensor_operands.py.
What else an instruction takes goes into `Product.instruction` (operands) and `inputs` (what lies in tensor memory).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from operands import SEED, random_bits
from tensor_forms import descriptor
from tensor_operands import BYTES, FORMATS, MANNERS, draw

CTAS = len(MANNERS)
IMAGE = 55296  # bytes of shared memory; A lies below SPLIT, B above
SPLIT = 18432
ROW = 16  # 64-bit words of a CTA's table
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}  # a repetition of ld and st
WIDTH = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8, "16x32bx2": 2}  # columns a repetition reaches
CODES = {"f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1}  # of a factor, in the instruction descriptor
GROUP = "cta_group::1"

KERNEL = """
extern "C" __global__ void %(cluster)s __launch_bounds__(128)
%(name)s(const uint4* before, const u64* table, const uint4* image, uint4* after, u32* registers, u32 columns)
{
    extern __shared__ u8 raw[];
    __shared__ alignas(8) u64 bars[4];
    __shared__ u32 slot;
    const u32 pool = (shared_address(raw) + 1023) & ~1023u, t = threadIdx.x, cta = blockIdx.x;
    const u32 room = columns <= 32 ? 32 : columns <= 64 ? 64 : columns <= 128 ? 128 : columns <= 256 ? 256 : 512;
    uint4* const matrices = (uint4*)(raw + (pool - shared_address(raw)));
    if (image)
        for (u32 i = t; i < IMAGE / 16; i += 128) matrices[i] = image[cta * (IMAGE / 16) + i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (t == 0) {
        for (int i = 0; i < 4; ++i) barrier_init(shared_address(&bars[i]), %(count)d);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (t < 32) {
        tmem_alloc(shared_address(&slot), room);
        tmem_relinquish();
    }
    meet();
    %(sync)s
    const u32 base = slot, mine = base + (t / 32 * 32 << 16);
    before += (cta * 128 + t) * (columns / 4);
    after += (cta * 128 + t) * (columns / 4);
    table += cta * 16;
    for (u32 n = 0; n < columns; n += 8) store_8(mine + n, before + n / 4);
    wait_store();
    meet();
%(body)s
    for (u32 n = 0; n < columns; n += 8) load_8(mine + n, after + n / 4);
    meet();
    %(sync)s
    if (t < 32) tmem_dealloc(base, room);
}
"""
ALLOCATIONS = """
extern "C" __global__ void __launch_bounds__(128)
%(name)s(const uint4* before, const u64* table, const uint4* image, u32* after, u32* registers, u32 columns)
{
    __shared__ u32 slot;
    const u32 t = threadIdx.x, cta = blockIdx.x, row = t / 32 * 32 << 16, mark = cta << 8 | t;
    after += (cta * 128 + t) * columns;
%(body)s
}
"""


@dataclass(frozen=True)
class Product:
    """D += A B in `steps` instructions, and how their end is made known."""

    kind: str
    types: tuple[str, str, str]  # a, b, d
    m: int
    n: int
    majors: tuple[int, int] = (0, 0)
    negate: tuple[int, int] = (0, 0)
    lane: int = 0  # of the addresses of D and of A in tensor memory
    from_tmem: bool = False
    steps: int = 1
    commit: str = "once"

    @property
    def depth(self) -> int:
        """k of one instruction."""
        return 32 // BYTES[self.types[0]]

    @property
    def a_column(self) -> int:
        """Where A lies in tensor memory."""
        return -(-self.n // 32) * 32

    @property
    def columns(self) -> int:
        """Columns that are filled and read back."""
        return self.a_column + 32 if self.from_tmem else -(-self.n // 8) * 8

    @property
    def descriptor(self) -> int:
        """The 32 bits that the instruction takes."""
        a, b, d = self.types
        found = (d == "f32") << 4 | CODES[a] << 7 | CODES[b] << 10 | self.negate[0] << 13 | self.negate[1] << 14
        return found | self.majors[0] << 15 | self.majors[1] << 16 | self.n >> 3 << 17 | self.m >> 4 << 24

    @property
    def rows(self) -> np.ndarray:
        """The tensor-memory lane of each row of D, and of A if it lies there."""
        row = np.arange(self.m)
        return row if self.m == 128 else 32 * (row // 16) + row % 16 + self.lane

    def instruction(self, step: int) -> str:
        """The CUDA statement of one step."""
        a = f'"r"(base + u32(table[10]) + {8 * step})' if self.from_tmem else f'"l"(placed(table[{2 * step}], pool))'
        add = "u32(table[9])" if step == 0 else "1"
        return (
            f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %4, 0;\\ntcgen05.mma." GROUP ".kind::{self.kind} [%0], '
            f'{"[%1]" if self.from_tmem else "%1"}, %2, %3, p;\\n}}" :: "r"(base + u32(table[11])), {a}, '
            f'"l"(placed(table[{2 * step + 1}], pool)), "r"(u32(table[8])), "r"({add}) : "memory");'
        )


# How a thread says that its products are done: after each step, after all, what everyone waits for, arrivals a phase.
COMMITS = {
    "once": ("", "commit(&bars[0]);", (0,), 1),
    "each": ("commit(&bars[{i}]);", "", (0, 1, 2), 1),
    "last": ("commit(&bars[{i}]);", "", (2,), 1),  # what a later commit covers an earlier one has
    "twice": ("", "commit(&bars[0]);\n        commit(&bars[0]);", (0,), 2),
    "generic": ("", "commit<true>(&bars[0]);", (0,), 1),
    "multicast": ("", "commit_to(&bars[0], 3);", (0,), 2),  # two CTAs, each to both
}


@dataclass(frozen=True)
class Tcgen05Form:
    """One kernel. `columns` of tensor memory (words a thread, of `alloc`) come back, and `registers` of a thread."""

    name: str
    family: str  # mma, commit, move or alloc
    source: str  # with ENTRY for the name
    columns: int
    registers: int = 0
    ctas: int = CTAS
    cluster: int = 1
    product: Product | None = None
    shape: tuple[str, int, int] = ("", 0, 0)  # of a move: shape, registers, split
    note: str = ""  # what is not certain of it


def _product(label: str, product: Product, family: str = "mma", note: str = "") -> Tcgen05Form:
    after, end, waits, count = COMMITS[product.commit]
    lines = ["    if (t == 0) {"]
    for i in range(product.steps):
        lines += [f"        {product.instruction(i)}", f"        {after.format(i=i)}"]
    lines += [f"        {end}", "    }", *(f"    barrier_wait(shared_address(&bars[{i}]));" for i in waits)]
    lines.append('    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");')
    pair = product.commit == "multicast"
    fill = {"cluster": "__cluster_dims__(2)" if pair else "", "sync": "cluster_sync();" if pair else ""}
    source = KERNEL % {**fill, "name": "ENTRY", "count": count, "body": "\n".join(lines)}
    a, b, d = product.types
    sides = ("tmem" if product.from_tmem else "KM"[product.majors[0]]) + "KM"[product.majors[1]]
    name = f"{family} {product.kind} {a} {b} {d} {product.m}x{product.n}x{product.depth} {sides}{label}"
    return Tcgen05Form(name, family, source, product.columns, cluster=1 + pair, product=product, note=note)


def _products() -> list[Tcgen05Form]:
    found: list[Tcgen05Form] = []

    def add(label: str, kind: str, a: str, b: str, d: str, m: int, n: int, note: str = "", **more: object) -> None:
        found.append(_product(label, Product(kind, (a, b, d), m, n, **more), note=note))  # type: ignore[arg-type]

    narrow = "the ISA wants N in steps of 16 with M = 128; CUTLASS and others use 8"
    for m, widths in ((128, (16, 48, 64, 128, 208, 256)), (64, (8, 24, 64, 136, 256))):
        for n in widths:
            add("", "f16", "bf16", "bf16", "f32", m, n)
    for n in (8, 40):
        add("", "f16", "f16", "f16", "f32", 128, n, note=narrow)
    for m in (64, 128):
        for n in (16, 128):
            for d in ("f16", "f32"):
                add("", "f16", "f16", "f16", d, m, n)
            add("", "tf32", "tf32", "tf32", "f32", m, n)
    add("", "tf32", "tf32", "tf32", "f32", 128, 256)
    add("", "f16", "f16", "bf16", "f32", 128, 32, note="factors of two formats")
    for a in ("e4m3", "e5m2"):
        for b in ("e4m3", "e5m2"):
            for d in ("f16", "f32"):
                add("", "f8f6f4", a, b, d, 128, 32 if d == "f16" else 64)
            add("", "f8f6f4", a, b, "f32", 64, 24)
    add("", "f8f6f4", "e4m3", "e4m3", "f32", 128, 256)
    for majors in ((0, 1), (1, 0), (1, 1)):
        add("", "f16", "bf16", "bf16", "f32", 128, 64, majors=majors)
        add("", "f16", "f16", "f16", "f16", 64, 40, majors=majors)
        add("", "f8f6f4", "e4m3", "e5m2", "f32", 128, 64, majors=majors)
    for negate in ((1, 0), (0, 1), (1, 1)):
        for kind, ty in (("f16", "bf16"), ("tf32", "tf32"), ("f8f6f4", "e4m3")):
            add(f" negate {negate[0]}{negate[1]}", kind, ty, ty, "f32", 128, 32, negate=negate)
    for kind, ty in (("f16", "f16"), ("tf32", "tf32"), ("f8f6f4", "e5m2")):
        add(" lane 16", kind, ty, ty, "f32", 64, 32, lane=16)
        add(" 4 steps", kind, ty, ty, "f32", 128, 64, steps=4)
    add(" 2 steps", "f16", "f16", "f16", "f16", 128, 32, steps=2)
    for kind, ty in (("f16", "bf16"), ("f16", "f16"), ("tf32", "tf32"), ("f8f6f4", "e4m3"), ("f8f6f4", "e5m2")):
        add("", kind, ty, ty, "f32", 128, 48, from_tmem=True)
        add(" 3 steps", kind, ty, ty, "f32", 64, 32, from_tmem=True, steps=3)
    add("", "f16", "bf16", "bf16", "f32", 128, 256, from_tmem=True, majors=(0, 1))
    add(" lane 16", "f16", "f16", "f16", "f16", 64, 16, from_tmem=True, lane=16)
    return found


def _commits() -> list[Tcgen05Form]:
    found = []
    for style in COMMITS:
        product = Product("f16", ("bf16", "bf16", "f32"), 128, 64, steps=3, commit=style)
        found.append(_product(f" {style}", product, "commit"))
    return found


def _names(count: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%{first + i}" for i in range(count)) + "}"


def _move(shape: str, repeat: int) -> Tcgen05Form:
    """ld of a shape, its registers given back; st of their complements."""
    count, split = REGISTERS[shape] * repeat, repeat if shape == "16x32bx2" else 0
    tail = f", {split}" if split else ""
    half = 0 if shape == "32x32b" else 16  # every other CTA takes the upper half of a quarter
    outs = ", ".join(f'"=r"(r[{i}])' for i in range(count))
    ins = ", ".join(f'"r"(r[{i}])' for i in range(count))
    name = f"{shape}.x{repeat}"
    body = f"""    u32 r[{count}];
    const u32 at = mine + ((cta & 1) * {half} << 16);
    asm volatile("tcgen05.ld.sync.aligned.{name}.b32 {_names(count)}, [%{count}]{tail};" : {outs} : "r"(at) : "memory");
    wait_load();
    for (int i = 0; i < {count}; ++i) registers[(cta * 128 + t) * {count} + i] = r[i];
    for (int i = 0; i < {count}; ++i) r[i] = ~r[i];
    asm volatile("tcgen05.st.sync.aligned.{name}.b32 [%0]{tail}, {_names(count, 1)};" :: "r"(at), {ins} : "memory");
    wait_store();"""
    source = KERNEL % {"cluster": "", "sync": "", "name": "ENTRY", "count": 1, "body": body}
    columns = max(8, WIDTH[shape] * repeat)
    return Tcgen05Form(f"ld, st {name}", "move", source, columns, count, shape=(shape, count, split))


def _moves() -> list[Tcgen05Form]:
    return [_move(shape, 1 << i) for shape in REGISTERS for i in range(8) if REGISTERS[shape] << i <= 128]


def _alloc(script: str, ctas: int = CTAS) -> Tcgen05Form:
    """+N allocates N columns for the next slot, -I gives slot I back. First and last column of each are marked."""
    lines, sizes, live = [], [], []

    def release(i: int) -> None:
        live.remove(i)
        lines.append(f"""    after[{2 * i}] = load_1(s{i} + row);
    after[{2 * i + 1}] = load_1(s{i} + row + {sizes[i] - 1});
    wait_load();
    meet();
    if (t < 32) tmem_dealloc(s{i}, {sizes[i]});""")

    for word in script.split():
        if word[0] == "-":
            release(int(word[1:]))
            continue
        i, size = len(sizes), int(word[1:])
        sizes.append(size)
        live.append(i)
        lines.append(f"""    if (t < 32) tmem_alloc(shared_address(&slot), {size});
    meet();
    const u32 s{i} = slot;
    __syncthreads();
    registers[(cta * 128 + t) * %(slots)d + {i}] = s{i};
    store_1(s{i} + row, {i}u << 24 | mark);
    store_1(s{i} + row + {size - 1}, {i}u << 24 | 1u << 23 | mark);
    wait_store();
    meet();""")
    lines.append("    if (t < 32) tmem_relinquish();")
    for i in list(live):
        release(i)
    body = "\n".join(lines) % {"slots": len(sizes)}
    source = ALLOCATIONS % {"name": "ENTRY", "body": body}
    return Tcgen05Form(f"alloc {script}", "alloc", source, 2 * len(sizes), len(sizes), ctas)


def _allocations() -> list[Tcgen05Form]:
    scripts = (
        "+32", "+512", "+256 +256", "+32 +64 +128 +256", "+256 +128 +64 +32 +32", "+64 -0 +64 +32 -1 +64 -2",
        "+128 +128 +128 +128 -1 -2 +128 +128", "+32 +256 -0 +128 +64 -2 +32",
    )  # fmt: skip
    # More CTAs than SMs, all columns each: who comes late waits in the instruction.
    return [*(_alloc(script) for script in scripts), _alloc("+512 -0 +512", 320)]


def all_forms() -> list[Tcgen05Form]:
    """Every form, in the order of the report."""
    return [*_moves(), *_allocations(), *_products(), *_commits()]


def cuda(forms: list[Tcgen05Form]) -> tuple[str, dict[str, str]]:
    """(CUDA source, entry by form's name); forms that differ in data only share a kernel."""
    entries: dict[str, str] = {}
    kernels = []
    for form in forms:
        if form.source not in entries:
            entries[form.source] = f"f{len(entries)}"
            kernels.append(form.source.replace("ENTRY", entries[form.source]))
    head = Path(__file__).with_name("tcgen05_forms.cuh").read_text()
    source = f'#define GROUP "{GROUP}"\n{head}{"".join(kernels)}'
    return source, {form.name: entries[form.source] for form in forms}


def _word(w: list[int], rows: int, major: int, lo: int, hi: int, ty: str) -> int:
    """A matrix descriptor of tcgen05 by random words; its start is an offset of the image."""
    hopper = descriptor(w, rows, major, lo, hi, BYTES[ty])
    return hopper & ~(3 << 62) | {0: 0, 1: 2, 2: 4, 3: 6}[hopper >> 62] << 61 | 1 << 46


def inputs(form: Tcgen05Form, seed: int = SEED) -> dict[str, np.ndarray]:
    """`before`: tensor memory, [CTAs, lanes, columns]; of a product also `table` and `image`."""
    if form.family == "alloc":
        return {}
    words = random_bits(seed ^ zlib.crc32(form.name.encode()), form.ctas * 128 * form.columns)
    found = {"before": (words >> np.uint64(7)).astype(np.uint32).reshape(form.ctas, 128, form.columns)}
    p = form.product
    if p is None:
        return found
    a, b, d = p.types
    picks = random_bits(seed ^ zlib.crc32(form.name.encode()) ^ 77, form.ctas * 64).reshape(form.ctas, 64)
    image = np.empty((form.ctas, IMAGE), np.uint8)
    table = np.zeros((form.ctas, ROW), np.uint64)
    for i in range(form.ctas):
        manner = MANNERS[i % len(MANNERS)]
        image[i, :SPLIT] = draw(seed, f"{form.name} A{i}", a, SPLIT // BYTES[a], manner).view(np.uint8)
        image[i, SPLIT:] = draw(seed, f"{form.name} B{i}", b, (IMAGE - SPLIT) // BYTES[b], manner).view(np.uint8)
        w = [int(x >> np.uint64(8)) for x in picks[i]]
        for step in range(p.steps):
            mine = w[14 * step + 1 :]
            table[i, 2 * step] = _word(mine[:7], p.m, p.majors[0], 0, SPLIT, a)
            table[i, 2 * step + 1] = _word(mine[7:14], p.n, p.majors[1], SPLIT, IMAGE, b)
        table[i, 8:12] = p.descriptor, w[0] % 4 != 0, p.lane << 16 | p.a_column, p.lane << 16
        cells = found["before"][i]
        start = draw(seed, f"{form.name} D{i}", d, 128 * p.n, manner, a).reshape(128, p.n)
        cells[:, : p.n] = cells[:, : p.n] & np.uint32(0xFFFF0000) | start if d == "f16" else start
        if p.from_tmem:
            there = draw(seed, f"{form.name} T{i}", a, 128 * 128 // BYTES[a], manner)
            cells[:, p.a_column :] = there.view(np.uint32).reshape(128, 32)
    return found | {"table": table, "image": image}


# What comes out, by another road than the emulator's where there is one.


def decode(ty: str, bits: np.ndarray) -> np.ndarray:
    """Elements as float64; tf32 without its 13 low bits."""
    e, m, infinities = FORMATS[ty]
    word = bits.astype(np.int64) & (~0x1FFF if ty == "tf32" else -1)
    field, low, bias = word >> m & (1 << e) - 1, word & (1 << m) - 1, (1 << e - 1) - 1
    value = np.ldexp(np.where(field == 0, low, low + (1 << m)).astype(np.float64), np.maximum(field, 1) - bias - m)
    if infinities:
        value = np.where(field == (1 << e) - 1, np.where(low == 0, np.inf, np.nan), value)
    else:
        value = np.where(word & 0x7F == 0x7F, np.nan, value)
    return np.where(word >> (e + m) & 1, -value, value)


def addresses(word: int, rows: int, major: int, ty: str) -> np.ndarray:
    """Byte offsets in the image of the elements of a matrix, [rows, k]."""
    size = BYTES[ty]
    start, leading, stride = ((word >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    base, pitch = word >> 49 & 7, {0: 16, 2: 128, 4: 64, 6: 32}[word >> 61]
    r, k = np.ogrid[:rows, : 32 // size]
    if not major:
        x, inside = k * size, r // 8 * stride + r % 8 * pitch
        at = inside + (x if pitch > 16 else x // 16 * leading + x % 16)
    else:
        x, inside = r * size, k % 8 * pitch
        across, along = (leading, stride) if pitch > 16 else (stride, leading)
        at = inside + x // pitch * across + x % pitch + k // 8 * along
    at = at + start
    return at ^ ((at // 128 - base) % (pitch // 16)) * 16


def elements(form: Tcgen05Form, data: dict[str, np.ndarray], cta: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The bits of (A [m, k], B [n, k]) that one instruction finds."""
    p = form.product
    assert p is not None
    found = []
    for side, (rows, major, ty) in enumerate(zip((p.m, p.n), p.majors, p.types, strict=False)):
        kind = np.dtype(f"u{BYTES[ty]}")
        if side == 0 and p.from_tmem:
            at = p.a_column + 8 * step
            found.append(np.ascontiguousarray(data["before"][cta][p.rows, at : at + 8]).view(kind))
        else:
            at = addresses(int(data["table"][cta, 2 * step + side]), rows, major, ty)
            found.append(data["image"][cta].view(kind)[at // BYTES[ty]])
    return found[0], found[1]


def factors(form: Tcgen05Form, data: dict[str, np.ndarray], cta: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(A [m, k], B [n, k]) of one instruction in float64, negated where the form says so."""
    p = form.product
    assert p is not None
    a, b = (decode(ty, x) for ty, x in zip(p.types, elements(form, data, cta, step), strict=False))
    return -a if p.negate[0] else a, -b if p.negate[1] else b


def moved(form: Tcgen05Form, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(registers, tensor memory afterwards) of a move, by the pictures of the ISA: quads of lanes a row."""
    shape, count, split = form.shape
    thread, r = np.ogrid[:128, :count]
    lane, quad, inside = thread % 32, thread % 32 // 4, thread % 4
    row, column = {
        "32x32b": (lane, r),
        "16x32bx2": (lane % 16, r + split * (lane // 16)),
        "16x64b": (quad + 8 * (inside % 2), 2 * r + inside // 2),
        "16x128b": (quad + 8 * (r % 2), r // 2 * 4 + inside),
        "16x256b": (quad + 8 * (r // 2 % 2), r // 4 * 8 + 2 * inside + r % 2),
    }[shape]
    registers, after = [], before.copy()
    for cta in range(form.ctas):
        half = 16 if cta & 1 and shape != "32x32b" else 0
        at = np.broadcast_arrays(cta, thread // 32 * 32 + row + half, column)
        registers.append(before[tuple(at)])
        after[tuple(at)] = ~before[tuple(at)]
    return np.stack(registers), after


def marks(form: Tcgen05Form) -> np.ndarray:
    """What the allocations of a form hold in their first and last columns, [CTAs, 128, 2 x slots]."""
    cta, thread, word = np.ogrid[: form.ctas, :128, : form.columns]
    return (word // 2 << 24 | word % 2 << 23 | cta << 8 | thread).astype(np.uint32)
