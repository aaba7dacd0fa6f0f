"""The tcgen05 forms that a B200 is to judge: products, commits, copies, tensor-memory loads, stores and allocations.

A form is a small kernel. It fills tensor memory, shared memory or both, does one thing, and gives back all of tensor
memory that it filled, so that what was changed beside the result shows too. Each of the eight CTAs (or pairs) of a
product has operands in another manner (tensor_operands.py), and for every instruction descriptors of its own: a
swizzle, strides, a base offset and a start, pattern-aligned or not, in a shared-memory image full of numbers.

To add a product, add a call in `_products`. What else an instruction takes goes into `Product.instruction` (operands),
`inputs` (what lies in memory) and tcgen05_numpy.py (what comes out). The file is long because it is that table.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from operands import SEED, random_bits
from tensor_forms import descriptor
from tensor_operands import BYTES, MANNERS, draw

CTAS = len(MANNERS)
IMAGE = 55296  # bytes of shared memory; A lies below SPLIT, B above
SPLIT = 18432
ROW = 16  # 64-bit words of a CTA's table
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}  # a repetition of ld and st
WIDTH = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8, "16x32bx2": 2}  # columns a repetition reaches
# Of a factor, in the instruction descriptor. e2m1x2 is two to a byte, as kind::mxf4 has them.
CODES = {
    "f16": 0, "bf16": 1, "tf32": 2, "e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5, "e2m1x2": 1,
}  # fmt: skip
NARROW = ("e2m3", "e3m2", "e2m1", "e2m1x2")  # any bits are numbers
MASK = (0x0000F00F, 0xFFFFFFFF, 0x00000000, 0x80000001)  # of lanes whose D is not to change
# Of tcgen05.cp: source rows and bytes of each.
COPIES = {
    "128x256b": (128, 32), "4x256b": (4, 32), "128x128b": (128, 16), "64x128b.warpx2::02_13": (64, 16),
    "64x128b.warpx2::01_23": (64, 16), "32x128b.warpx4": (32, 16),
}  # fmt: skip


def size_of(ty: str) -> int:
    """Bytes of a container of a factor."""
    return 1 if ty in NARROW else BYTES[ty]


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
    %(sync)s
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
    %(sync)s
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
    group: int = 1  # CTAs; with two, the even one's thread issues and tells both
    ws: bool = False
    vector: int = 0  # scale factors a row of A or B, 0 without block scales
    scale_type: str = "ue8m0"
    ids: tuple[int, int] = (0, 0)  # the byte of a word where the scale factors of A, B begin
    shrink: int = 0  # D is divided by 2^shrink before it is added to
    masked: bool = False

    @property
    def depth(self) -> int:
        """k of one instruction."""
        return 64 if self.types[0] == "e2m1x2" else 32 // size_of(self.types[0])

    @property
    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rank in the pair, tensor-memory lane, column) of D, [m, n] each."""
        m, n = np.indices((self.m, self.n))
        if self.group == 2:
            half = self.n // 2
            return (m // 128, m % 128, n) if self.m == 256 else (m // 64, m % 64 + n // half * 64, n % half)
        if self.ws and self.m < 128:
            wide = self.n * self.m // 128
            return 0 * m, m + n // wide * self.m, n % wide
        return 0 * m, m if self.m == 128 else 32 * (m // 16) + m % 16 + self.lane, n

    @property
    def changes(self) -> np.ndarray:
        """Whether an element of D is written, [m, n]."""
        words = np.array(MASK if self.masked else (0, 0, 0, 0))
        lane = self.cells[1]
        return words[lane // 32] >> lane % 32 & 1 == 0

    @property
    def a_column(self) -> int:
        """Where A lies in tensor memory."""
        return -(-(int(self.cells[2].max()) + 1) // 32) * 32

    @property
    def scale_column(self) -> int:
        """Where scale factors lie: four columns a step of A's, after 16 of them eight a step of B's."""
        return self.a_column + 32 * self.from_tmem

    @property
    def columns(self) -> int:
        """Columns that are filled and read back."""
        if self.vector:
            return self.scale_column + 16 + 8 * self.steps
        return self.scale_column if self.from_tmem else -(-(int(self.cells[2].max()) + 1) // 8) * 8

    @property
    def descriptor(self) -> int:
        """The 32 bits that the instruction takes."""
        a, b, d = self.types
        found = CODES[a] << 7 | CODES[b] << 10 | self.negate[0] << 13 | self.negate[1] << 14
        found |= self.majors[0] << 15 | self.majors[1] << 16 | self.n >> 3 << 17 | self.m >> 4 << 24
        if self.vector:
            return found | self.ids[1] << 4 | (self.scale_type == "ue8m0") << 23 | self.ids[0] << 29
        return found | (d == "f32") << 4

    def instruction(self, step: int) -> str:
        """The CUDA statement of one step."""
        a = f'"r"(base + u32(table[10]) + {8 * step})' if self.from_tmem else f'"l"(placed(table[{2 * step}], pool))'
        add = "u32(table[9])" if step == 0 else "1"
        name = f'tcgen05.mma{".ws" if self.ws else ""}." GROUP ".kind::{self.kind}'
        operands = ["[%0]", "[%1]" if self.from_tmem else "%1", "%2", "%3"]
        values = [
            '"r"(base + u32(table[11]))', a, f'"l"(placed(table[{2 * step + 1}], pool))', '"r"(u32(table[8]))',
            f'"r"({add})',
        ]  # fmt: skip
        if self.vector:
            name += f".block_scale.scale_vec::{self.vector}X"
            operands += ["[%5]", "[%6]"]
            values += [
                f'"r"(base + {self.scale_column + 4 * step})',
                f'"r"(base + {self.scale_column + 16 + 8 * step})',
            ]
        if self.masked:
            operands.append("{%5, %6, %7, %8}")
            values += [f'"r"({word:#x})' for word in MASK]
        operands.append(f"p, {self.shrink}" if self.shrink else "p")
        text = f"{name} {', '.join(operands)};"
        values_text = ", ".join(values)
        return f'asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %4, 0;\\n{text}\\n}}" :: {values_text} : "memory");'


# How a thread says that its products are done: after each step, after all, what everyone waits for, arrivals a phase.
COMMITS = {
    "once": ("", "commit(&bars[0]);", (0,), 1),
    "each": ("commit(&bars[{i}]);", "", (0, 1, 2), 1),
    "last": ("commit(&bars[{i}]);", "", (2,), 1),  # what a later commit covers an earlier one has
    "twice": ("", "commit(&bars[0]);\n        commit(&bars[0]);", (0,), 2),
    "generic": ("", "commit<true>(&bars[0]);", (0,), 1),
    "multicast": ("", "commit_to(&bars[0], 3);", (0,), 2),  # two CTAs, each to both
    "pair": ("", "commit_to(&bars[0], 3);", (0,), 1),  # the even CTA's, to both
}


@dataclass(frozen=True)
class Tcgen05Form:
    """One kernel. `columns` of tensor memory (words a thread, of `alloc`) come back, and `registers` of a thread."""

    name: str
    family: str  # mma, pair, scaled, commit, copy, move or alloc
    source: str  # with ENTRY for the name
    columns: int
    registers: int = 0
    ctas: int = CTAS
    cluster: int = 1
    product: Product | None = None
    shape: tuple[str, int, int] = ("", 0, 0)  # of a move: shape, registers, split; of a copy: shape and what it expands
    note: str = ""  # what is not certain of it
    paired: bool = False  # a copy for both CTAs of a pair

    @property
    def group(self) -> int:
        """CTAs that one instruction is for."""
        return self.product.group if self.product else 1 + self.paired


def _product(label: str, product: Product, family: str = "mma", note: str = "") -> Tcgen05Form:
    after, end, waits, count = COMMITS[product.commit]
    lines = ["    if (t == 0 && cta % 2 == 0) {" if product.group == 2 else "    if (t == 0) {"]
    for i in range(product.steps):
        lines += [f"        {product.instruction(i)}", f"        {after.format(i=i)}"]
    lines += [f"        {end}", "    }", *(f"    barrier_wait(shared_address(&bars[{i}]));" for i in waits)]
    lines.append('    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");')
    both = product.commit in ("multicast", "pair")
    fill = {"cluster": "__cluster_dims__(2)" if both else "", "sync": "cluster_sync();" if both else ""}
    source = KERNEL % {**fill, "name": "ENTRY", "count": count, "body": "\n".join(lines)}
    a, b, d = product.types
    sides = ("tmem" if product.from_tmem else "KM"[product.majors[0]]) + "KM"[product.majors[1]]
    scales = f" {product.vector}X {product.scale_type}" if product.vector else ""
    kind = f"{product.kind}{'.ws' if product.ws else ''}{scales}"
    name = f"{family} {kind} {a} {b} {d} {product.m}x{product.n}x{product.depth} {sides}{label}"
    return Tcgen05Form(
        name, family, source, product.columns, ctas=CTAS * product.group, cluster=1 + both, product=product, note=note
    )


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


def _pairs() -> list[Tcgen05Form]:
    """Two CTAs for one D."""
    found = []

    def add(label: str, kind: str, ty: str, d: str, m: int, n: int, **more: object) -> None:
        product = Product(kind, (ty, ty, d), m, n, commit="pair", group=2, **more)  # type: ignore[arg-type]
        found.append(_product(label, product, "pair"))

    for m in (128, 256):
        for n in (32, 64, 256):
            add("", "f16", "bf16", "f32", m, n)
        add("", "f16", "f16", "f16", m, 48)
        add("", "tf32", "tf32", "f32", m, 64)
        add("", "f8f6f4", "e4m3", "f32", m, 96)
        add(" 3 steps", "f16", "bf16", "f32", m, 64, steps=3)
        add("", "f16", "f16", "f32", m, 128, majors=(1, 1))
        add(" negate 10", "f8f6f4", "e5m2", "f32", m, 32, negate=(1, 0))
    return found


def _wide() -> list[Tcgen05Form]:
    """Weight-stationary products, masked lanes, D divided."""
    found = []

    def add(label: str, kind: str, ty: str, m: int, n: int, **more: object) -> None:
        found.append(_product(label, Product(kind, (ty, ty, "f32"), m, n, **more), "wide"))  # type: ignore[arg-type]

    for m in (32, 64, 128):
        for n in (64, 256):
            add("", "f16", "bf16", m, n, ws=True)
        add("", "tf32", "tf32", m, 128, ws=True)
        add("", "f8f6f4", "e4m3", m, 64, ws=True)
    add("", "f8f6f4", "e3m2", 64, 64, ws=True)
    for kind, ty in (("f16", "bf16"), ("tf32", "tf32"), ("f8f6f4", "e5m2")):
        add(" masked", kind, ty, 128, 32, masked=True)
        if kind != "f8f6f4":
            add(" D / 8", kind, ty, 128, 48, shrink=3)
    return found


def _scaled() -> list[Tcgen05Form]:
    """Block scales, and factors of 6 and 4 bits."""
    found = []

    def add(label: str, kind: str, a: str, b: str, n: int, vector: int = 0, m: int = 128, **more: object) -> None:
        product = Product(kind, (a, b, "f32"), m, n, vector=vector, **more)  # type: ignore[arg-type]
        found.append(_product(label, product, "scaled"))

    for n in (16, 64, 128, 256):
        add("", "mxf8f6f4", "e4m3", "e4m3", n, 1)
        add("", "mxf4nvf4", "e2m1x2", "e2m1x2", n, 4, scale_type="ue4m3")
    for n in (40, 128):
        add("", "mxf4", "e2m1x2", "e2m1x2", n, 2)
        add("", "mxf4nvf4", "e2m1x2", "e2m1x2", n, 4)
        add("", "mxf4nvf4", "e2m1x2", "e2m1x2", n, 2)
    for ids in ((1, 2), (3, 0)):
        add(f" ids {ids[0]} {ids[1]}", "mxf8f6f4", "e5m2", "e4m3", 48, 1, ids=ids)
    add(" ids 2 0", "mxf4", "e2m1x2", "e2m1x2", 32, 2, ids=(2, 0))
    for a, b in (("e2m1", "e4m3"), ("e3m2", "e2m3"), ("e5m2", "e2m1"), ("e2m1", "e2m1")):
        add("", "mxf8f6f4", a, b, 64, 1)
        add("", "f8f6f4", a, b, 32)
    add("", "f8f6f4", "e2m3", "e3m2", 24, m=64)
    for ty in ("e2m1", "e2m3"):
        add("", "f8f6f4", ty, "e5m2", 32, from_tmem=True)
    for kind, ty, vector in (("mxf8f6f4", "e4m3", 1), ("mxf4nvf4", "e2m1x2", 4)):
        add(" 2 steps", kind, ty, ty, 96, vector, steps=2)
        add(" negate 01", kind, ty, ty, 32, vector, negate=(0, 1))
        add("", kind, ty, ty, 48, vector, from_tmem=True)
    for majors in ((0, 1), (1, 0)):
        add("", "mxf8f6f4", "e4m3", "e5m2", 64, 1, majors=majors)
    pair = {"commit": "pair", "group": 2}
    for m, n in ((128, 160), (256, 80)):
        add(" pair", "mxf4nvf4", "e2m1x2", "e2m1x2", n, 4, m, scale_type="ue4m3", **pair)
        add(" pair ids 2 0", "mxf4", "e2m1x2", "e2m1x2", 32, 2, m, ids=(2, 0), **pair)
        add(" pair negate 10", "mxf8f6f4", "e5m2", "e3m2", 64, 1, m, majors=(1, 0), negate=(1, 0), **pair)
        add(" pair", "mxf8f6f4", "e4m3", "e4m3", 48, 1, m, from_tmem=True, **pair)
    add(" pair 2 steps", "mxf4nvf4", "e2m1x2", "e2m1x2", 256, 2, 256, steps=2, **pair)
    add(" pair", "f8f6f4", "e2m3", "e2m1", 32, 0, 128, **pair)
    return found


def _copies() -> list[Tcgen05Form]:
    """cp of rows of 16 or 32 bytes, also of 4- and 6-bit elements that become bytes."""
    found = []
    kinds = [(shape, "") for shape in COPIES]
    kinds += [(shape, source) for shape in ("128x128b", "32x128b.warpx4") for source in ("b4x16_p64", "b6x16_p32")]
    everyone = [(number, *kind, paired) for paired in (False, True) for number, kind in enumerate(kinds)]
    for number, shape, source, paired in everyone:
        name = f"{shape}{f'.b8x16.{source}' if source else ''}"
        body = f"""    if (t == 0{" && cta % 2 == 0" if paired else ""}) {{
        asm volatile("tcgen05.cp." GROUP ".{name} [%0], %1;" :: "r"(base), "l"(placed(table[0], pool)) : "memory");
        {"commit_to(&bars[0], 3)" if paired else "commit(&bars[0])"};
    }}
    barrier_wait(shared_address(&bars[0]));
    asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");"""
        fill = {"cluster": "__cluster_dims__(2)" if paired else "", "sync": "cluster_sync();" if paired else ""}
        source_text = KERNEL % {**fill, "name": "ENTRY", "count": 1, "body": body}
        found.append(
            Tcgen05Form(
                f"cp {name}{' pair' if paired else ''}", "copy", source_text, 8, cluster=1 + paired,
                shape=(name, number, 0), paired=paired,
            )
        )  # fmt: skip
    return found


def _commits() -> list[Tcgen05Form]:
    found = []
    for style in [style for style in COMMITS if style != "pair"]:
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
    return Tcgen05Form(f"ld, st {name}", "move", source, columns, count, ctas=2, shape=(shape, count, split))


def _moves() -> list[Tcgen05Form]:
    return [_move(shape, 1 << i) for shape in REGISTERS for i in range(8) if REGISTERS[shape] << i <= 128]


def _alloc(script: str, ctas: int = 2) -> Tcgen05Form:
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
    return [*_moves(), *_allocations(), *_products(), *_commits(), *_pairs(), *_wide(), *_scaled(), *_copies()]


def cuda(forms: list[Tcgen05Form]) -> tuple[str, dict[str, str]]:
    """(CUDA source, entry by form's name); forms that differ in data only share a kernel."""
    entries: dict[tuple[int, str], str] = {}
    kernels: dict[int, list[str]] = {}
    for form in forms:
        key = form.group, form.source
        if key not in entries:
            entries[key] = f"f{len(entries)}"
            kernels.setdefault(form.group, []).append(form.source.replace("ENTRY", entries[key]))
    head = Path(__file__).with_name("tcgen05_forms.cuh").read_text()
    parts = [
        f'#define GROUP "cta_group::{group}"\nnamespace group{group} {{\n{head}{"".join(mine)}}}\n#undef GROUP\n'
        for group, mine in kernels.items()
    ]
    return "".join(parts), {form.name: entries[form.group, form.source] for form in forms}


def _word(w: list[int], rows: int, major: int, lo: int, hi: int, size: int) -> int:
    """A matrix descriptor of tcgen05 by random words; its start is an offset of the image."""
    hopper = descriptor(w, rows, major, lo, hi, size)
    return hopper & ~(3 << 62) | {0: 0, 1: 2, 2: 4, 3: 6}[hopper >> 62] << 61 | 1 << 46


def _elements(seed: int, name: str, ty: str, nbytes: int, manner: str) -> np.ndarray:
    """Bytes of shared or tensor memory full of factors."""
    if ty in NARROW:
        words = random_bits(seed ^ zlib.crc32(f"{name} {manner}".encode()), nbytes // 8)
        found = words.view(np.uint8)
        return found & np.uint8(0x3C if ty == "e2m1" else 0x3F) if " T" in name else found  # one to a byte there
    return draw(seed, name, ty, nbytes // BYTES[ty], manner).view(np.uint8)


def _scales(seed: int, name: str, p: Product, manner: str, columns: int) -> np.ndarray:
    """Words of scale factors, [128, columns], the same in each 32 lanes: 1, near it, or far from it."""
    raw = random_bits(seed ^ zlib.crc32(name.encode()), 16 * columns).view(np.uint8)
    if p.scale_type == "ue4m3":
        found = 0x38 + 0 * raw if manner == "ints" else raw % 0x7F
        found = np.where(raw == 0xFF, 0x7F, found) if manner == "special" else found
    else:
        spread = {"ints": 1, "normal": 5, "wide": 41, "tiny": 60, "huge": 60}.get(manner, 21)
        found = 127 + raw % spread - spread // 2
        found = np.where(raw == 0xFF, 0xFF, found) if manner == "special" else found
    return np.tile(found.astype(np.uint8).view(np.uint32).reshape(32, columns), (4, 1))


def inputs(form: Tcgen05Form, seed: int = SEED) -> dict[str, np.ndarray]:
    """`before`: tensor memory, [CTAs, lanes, columns]; of a product or copy also `table` and `image`."""
    if form.family == "alloc":
        return {}
    words = random_bits(seed ^ zlib.crc32(form.name.encode()), form.ctas * 128 * form.columns)
    found = {"before": (words >> np.uint64(7)).astype(np.uint32).reshape(form.ctas, 128, form.columns)}
    picks = random_bits(seed ^ zlib.crc32(form.name.encode()) ^ 77, form.ctas * 64).reshape(form.ctas, 64)
    table = np.zeros((form.ctas, ROW), np.uint64)
    if form.family == "copy":
        image = random_bits(seed ^ zlib.crc32(form.name.encode()) ^ 78, form.ctas * IMAGE // 8).view(np.uint8)
        for i in range(form.ctas):
            w = [int(x >> np.uint64(8)) for x in picks[i]]
            table[i, 0] = _word(w, max(COPIES[form.shape[0].split(".b8x16")[0]][0], 8), 0, 0, SPLIT, 1)
        return found | {"table": table, "image": image.reshape(form.ctas, IMAGE)}
    p = form.product
    if p is None:
        return found
    a, b, d = p.types
    image = np.empty((form.ctas, IMAGE), np.uint8)
    _, lanes, columns = (np.unique(x) for x in p.cells)
    for i in range(form.ctas):
        manner = MANNERS[i // p.group % len(MANNERS)]
        image[i, :SPLIT] = _elements(seed, f"{form.name} A{i}", a, SPLIT, manner)
        image[i, SPLIT:] = _elements(seed, f"{form.name} B{i}", b, IMAGE - SPLIT, manner)
        w = [int(x >> np.uint64(8)) for x in picks[i]]
        for step in range(p.steps):
            mine = w[14 * step + 1 :]
            table[i, 2 * step] = _word(mine[:7], p.m // p.group, p.majors[0], 0, SPLIT, size_of(a))
            table[i, 2 * step + 1] = _word(mine[7:14], p.n // p.group, p.majors[1], SPLIT, IMAGE, size_of(b))
        table[i, 8:12] = p.descriptor, w[0] % 4 != 0 or p.masked, p.lane << 16 | p.a_column, p.lane << 16
        cells, place = found["before"][i], np.ix_(lanes, columns)
        of = "e4m3" if a in NARROW else a
        start = draw(seed, f"{form.name} D{i}", d, len(lanes) * len(columns), manner, of)
        start = start.reshape(len(lanes), len(columns))
        cells[place] = cells[place] & np.uint32(0xFFFF0000) | start if d == "f16" else start
        if p.from_tmem:
            there = _elements(seed, f"{form.name} T{i}", a, 128 * 128, manner)
            there = there.view(np.uint32).reshape(128, 32)
            if p.group == 2 and p.m == 128:
                there[64:] = there[:64]  # both halves of the lanes take these rows
            cells[:, p.a_column : p.a_column + 32] = there
        if p.vector:
            there = _scales(seed, f"{form.name} S{i}", p, manner, form.columns - p.scale_column)
            for half in (0, 64) if p.group == 2 else ():  # of B: in both CTAs, of M = 128 in the lanes of its D
                name = f"{form.name} S{i // 2} B{half if p.m == 128 else 0}"
                same = _scales(seed, name, p, manner, form.columns - p.scale_column - 16)
                there[half : half + 64, 16:] = same[:64]
            cells[:, p.scale_column :] = there
    return found | {"table": table, "image": image}
