"""The tensor-core forms that an H200 has judged: mma.sync, ldmatrix, stmatrix, movmatrix and wgmma.

A form is one instruction in a kernel of its own. Fragments travel as raw registers, so a wrong layout shows as well as
a wrong sum. A wgmma form draws, for each warpgroup, a swizzle, a start (pattern-aligned or not), strides (canonical or
any), a base offset and a shared-memory image full of numbers: which elements the descriptor reaches is part of what is
compared.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from operands import SEED, random_bits
from tensor_operands import BYTES, MANNERS, draw, groups

from kernels import head

WARPS = 64  # of a warp-wide form: eight for each manner
CTAS = 16  # of a wgmma form: two for each manner
IMAGE = 49152  # bytes of shared memory; A lies below SPLIT, B above
SPLIT = 12288
FIRST = 0x400  # the shared offset at which a kernel's only array starts


@dataclass(frozen=True)
class TensorForm:
    """One instruction. `sizes` are the 32-bit registers of a, b, c and d a thread holds."""

    name: str
    family: str
    body: str
    sizes: tuple[int, int, int, int]
    types: tuple[str, str, str] = ("b16", "b16", "b16")  # a, b, accumulator
    exact: bool = True  # bits, not a float sum
    n: int = 0  # of wgmma
    majors: tuple[int, int] = (0, 0)

    @property
    def threads(self) -> int:
        return CTAS * 128 if self.family == "wgmma" else WARPS * 32


def _regs(letter: str, count: int) -> str:
    return "{" + ", ".join(f"%{letter}{i}" for i in range(count)) + "}"


def _kernel(form: TensorForm, name: str) -> str:
    """The entry: registers from memory, the instruction, registers to memory."""
    shared = IMAGE if form.family == "wgmma" else 2048 * 4
    lines = [
        f".visible .entry {name}(" + ", ".join(f".param .u64 {name}_{x}" for x in "abcdei") + ")",
        "{",
        ".reg .pred %p; .reg .b32 %t, %cta, %i, %s, %o, %x<4>; .reg .b64 %g, %base, %da, %db;",
        f".shared .align 1024 .b8 {name}_shared[{shared}];",
        *(f".reg .b32 %{x}<{max(n, 1)}>;" for x, n in zip("abcd", form.sizes, strict=True)),
        "mov.u32 %t, %tid.x; mov.u32 %cta, %ctaid.x; mad.lo.u32 %i, %cta, 128, %t;",
        f"mov.u32 %s, {name}_shared;",
    ]
    for x, n in zip("abc", form.sizes, strict=False):
        if n:
            lines.append(f"ld.param.u64 %base, [{name}_{x}]; mad.wide.u32 %g, %i, {4 * n}, %base;")
            lines += [f"ld.global.b32 %{x}{j}, [%g+{4 * j}];" for j in range(n)]
    if form.family == "wgmma":
        lines += [
            f"ld.param.u64 %base, [{name}_i]; mad.wide.u32 %g, %cta, {IMAGE}, %base;",
            "mul.wide.u32 %base, %t, 16; add.u64 %g, %g, %base; mad.lo.u32 %o, %t, 16, %s;",
            f"mov.u32 %i, 0;\nL_{name}:",
            "ld.global.v4.b32 {%x0, %x1, %x2, %x3}, [%g]; st.shared.v4.b32 [%o], {%x0, %x1, %x2, %x3};",
            f"add.u64 %g, %g, 2048; add.u32 %o, %o, 2048; add.u32 %i, %i, 1; setp.lt.u32 %p, %i, {IMAGE // 2048};",
            f"@%p bra L_{name};",
            "fence.proxy.async; bar.sync 0;",
            f"ld.param.u64 %base, [{name}_e]; mad.wide.u32 %g, %cta, 32, %base;",
            "ld.global.b64 %da, [%g]; ld.global.b64 %db, [%g+8]; ld.global.b32 %o, [%g+16];",
            "setp.ne.u32 %p, %o, 0;",
            *(f"mov.b32 %d{j}, %c{j};" for j in range(form.sizes[3])),
            "wgmma.fence.sync.aligned;",
            form.body,
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            "mad.lo.u32 %i, %cta, 128, %t;",
        ]
    else:
        lines.append(form.body)
    lines.append(f"ld.param.u64 %base, [{name}_d]; mad.wide.u32 %g, %i, {4 * form.sizes[3]}, %base;")
    lines += [f"st.global.b32 [%g+{4 * j}], %d{j};" for j in range(form.sizes[3])]
    return "\n".join([*lines, "ret;", "}", ""])


def ptx(forms: list[TensorForm], arch: str = "sm_90a") -> str:
    """A module with an entry f0, f1, ... for each form; wgmma is of sm_90a only."""
    return head(arch, "8.7") + "\n".join(_kernel(form, f"f{i}") for i, form in enumerate(forms))


def _mma_forms() -> list[TensorForm]:
    found = []

    def add(shape: str, d: str, a: str, b: str, c: str, extra: str = "") -> None:
        m, n, k = (int(x) for x in shape.replace("m", "").replace("n", " ").replace("k", " ").split())
        per = 4 if a != "f64" else 8
        sizes = [m * k * BYTES[a] // 128, n * k * BYTES[b] // 128, m * n * BYTES[c] // 128, m * n * BYTES[d] // 128]
        operands = []
        before = after = ""
        if per == 8:  # pairs of words become 64-bit registers
            before = ".reg .b64 " + ", ".join(
                f"%{x}q{j}" for x, s in zip("abcd", sizes, strict=True) for j in range(s // 2)
            ) + ";\n"
            for x, s in zip("abc", sizes, strict=False):
                before += "".join(f"mov.b64 %{x}q{j}, {{%{x}{2 * j}, %{x}{2 * j + 1}}};\n" for j in range(s // 2))
            after = "\n" + "".join(f"mov.b64 {{%d{2 * j}, %d{2 * j + 1}}}, %dq{j};\n" for j in range(sizes[3] // 2))
            operands = [_regs(f"{x}q", s // 2) for x, s in zip("dabc", [sizes[3], *sizes[:3]], strict=True)]
        else:
            operands = [_regs(x, s) for x, s in zip("dabc", [sizes[3], *sizes[:3]], strict=True)]
        name = f"mma.sync.aligned.{shape}.row.col{extra}.{d}.{a}.{b}.{c}"
        body = f"{before}{name} {', '.join(operands)};{after}"
        found.append(TensorForm(name, "mma", body, tuple(sizes), (a, b, c), a in ("s8", "u8", "f64")))

    for shape in ("m16n8k8", "m16n8k16"):
        for d in ("f16", "f32"):
            add(shape, d, "f16", "f16", d)
        add(shape, "f32", "bf16", "bf16", "f32")
    for shape in ("m16n8k4", "m16n8k8"):
        add(shape, "f32", "tf32", "tf32", "f32")
    for shape in ("m16n8k16", "m16n8k32"):
        for d in ("f16", "f32"):
            for a in ("e4m3", "e5m2"):
                for b in ("e4m3", "e5m2"):
                    add(shape, d, a, b, d)
    for shape in ("m8n8k16", "m16n8k16", "m16n8k32"):
        for a in ("s8", "u8"):
            for b in ("s8", "u8"):
                for extra in ("", ".satfinite"):
                    add(shape, "s32", a, b, "s32", extra)
    for shape in ("m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"):
        add(shape, "f64", "f64", "f64", "f64")
    return found


def _matrix_forms() -> list[TensorForm]:
    """ldmatrix from, stmatrix to a region of 1 KiB a warp; row addresses are a permutation of its 16-byte lines."""
    found = []
    where = (
        "mov.u32 %x0, %laneid; shr.u32 %x1, %t, 5; mad.lo.u32 %x1, %x1, 1024, %s;\n"
        "and.b32 %x2, %a0, 63; mad.lo.u32 %x2, %x2, 16, %x1;\n"  # this lane's row
        "mad.lo.u32 %x3, %x0, 32, %x1;\n"
    )
    for trans in ("", ".trans"):
        for x in (1, 2, 4):
            name = f"ldmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16"
            fill = "".join(f"st.shared.b32 [%x3+{4 * j}], %b{j};\n" for j in range(8))
            body = f"{where}{fill}bar.warp.sync -1;\n{name} {_regs('d', x)}, [%x2];"
            found.append(TensorForm(name, "matrix", body, (1, 8, 0, x)))
            name = f"stmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16"
            fill = "".join(f"st.shared.b32 [%x3+{4 * j}], 0;\n" for j in range(8))
            body = f"{where}{fill}bar.warp.sync -1;\n{name} [%x2], {_regs('b', x)};\nbar.warp.sync -1;\n"
            body += "".join(f"ld.shared.b32 %d{j}, [%x3+{4 * j}];\n" for j in range(8))
            found.append(TensorForm(name, "matrix", body, (1, 8, 0, 8)))
    name = "movmatrix.sync.aligned.m8n8.trans.b16"
    found.append(TensorForm(name, "matrix", f"{name} %d0, %b0;", (1, 1, 0, 1)))
    return found


def _wgmma_forms() -> list[TensorForm]:
    found = []

    def add(n: int, d: str, a: str, b: str, rs: int = 0, negate: tuple[int, int] = (1, 1), majors=(0, 0)) -> None:
        k = 32 // BYTES[a]
        acc = n // (4 if d == "f16" else 2)
        name = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.{d}.{a}.{b}"
        tail = f"%p, {negate[0]}, {negate[1]}"
        if BYTES[a] == 2:
            tail += f", {majors[1]}" if rs else f", {majors[0]}, {majors[1]}"
        body = f"{name} {_regs('d', acc)}, {_regs('a', 4) if rs else '%da'}, %db, {tail};"
        label = f"{name}{' rs' if rs else ''} {negate[0]} {negate[1]} {majors[0]} {majors[1]}"
        found.append(TensorForm(label, "wgmma", body, (4 * rs, 0, acc, acc), (a, b, d), False, n, majors))

    for n in range(8, 257, 8):
        add(n, "f32", "bf16", "bf16")
    for n in (8, 24, 64, 128, 256):
        for d in ("f16", "f32"):
            add(n, d, "f16", "f16")
        add(n, "f32", "tf32", "tf32")
    for d in ("f16", "f32"):
        for a in ("e4m3", "e5m2"):
            for b in ("e4m3", "e5m2"):
                for n in (8, 64, 256) if a == b else (16, 96):
                    add(n, d, a, b)
                add(32, d, a, b, rs=1)
    for n in (8, 40, 64, 200, 256):
        for majors in ((0, 1), (1, 0), (1, 1)):
            add(n, "f32", "bf16" if n != 64 else "f16", "bf16" if n != 64 else "f16", majors=majors)
    for d, a in (("f32", "bf16"), ("f32", "f16"), ("f16", "f16"), ("f32", "tf32")):
        for n in (8, 64):
            add(n, d, a, a, rs=1)
        for negate in ((-1, 1), (1, -1), (-1, -1)):
            add(32, d, a, a, negate=negate)
    for d, a in (("f32", "bf16"), ("f16", "f16")):
        add(48, d, a, a, rs=1, majors=(0, 1))
        add(16, d, a, a, rs=1, negate=(-1, 1))
    return found


def all_forms() -> list[TensorForm]:
    """Every form, in the order of the record."""
    return [*_matrix_forms(), *_mma_forms(), *_wgmma_forms()]


def descriptor(words: list[int], rows: int, major: int, lo: int, hi: int, size: int = 2) -> int:
    """A descriptor whose reach [rows x 32 bytes of k, or k x rows] lies in shared [lo, hi), by its random words.

    size: bytes an element, which matters where it is MN-major.
    """
    mode = words[0] % 4  # 0 none, 1 128 B, 2 64 B, 3 32 B
    pitch = (16, 128, 64, 32)[mode]
    step = (128, 16, 128, 1024)[words[1] % 4]
    if major == 0:
        blocks, wide = rows // 8, mode == 0
        sbo, lbo = 8 * pitch, 128
        room = (hi - lo - 8 * pitch - 512 - 1024) // max(blocks - 1, 1)
        if words[1] % 4:
            sbo = min(step * (1 + words[2] % 16), room // 16 * 16)
        lbo = 16 * (1 + words[3] % 32) if wide and words[1] % 4 else lbo
        reach = (blocks - 1) * sbo + 8 * pitch + (lbo if wide else 32)
    else:
        atom, ahead = pitch // size, 32 // size // 8 - 1  # elements across; k groups behind the first
        blocks = -(-rows // atom)
        many = min(step * (1 + words[2] % 16), (hi - lo - 4096) // max(blocks, 1) // 16 * 16)
        few = 16 * (1 + words[3] % 64)
        if not words[1] % 4:
            many, few = 8 * pitch, min(8 * pitch * blocks, 2048)
        reach = (blocks - 1) * many + ahead * few + 8 * pitch
        sbo, lbo = (many, few) if mode == 0 else (few, many)
    slack = hi - lo - reach - 1024
    assert slack >= 0, (rows, major, mode, reach)
    start = lo + (words[4] % (slack // 16 + 1)) * 16
    if not words[5] % 3:
        start = start // 1024 * 1024
    offset = words[6] % 8 if words[5] & 1 else 0
    return (start >> 4) | (lbo >> 4) << 16 | (sbo >> 4) << 32 | offset << 49 | mode << 62


def inputs(form: TensorForm, seed: int = SEED) -> dict[str, np.ndarray]:
    """The arrays a, b, c (registers), e (descriptors and scale-d) and i (images) of a form."""
    a, b, c = form.types
    found = {}
    teams = CTAS if form.family == "wgmma" else WARPS
    lanes = 128 if form.family == "wgmma" else 32
    for letter, ty, size in zip("abc", form.types, form.sizes, strict=False):
        if size:
            of = a if letter == "c" else ""
            each = lanes * size * 4 // BYTES[ty]
            rows = groups(seed, f"{form.name} {letter}", ty, teams, each, of)
            found[letter] = np.ascontiguousarray(rows).view(np.uint32).reshape(-1)
    if form.family == "matrix":
        rows = np.argsort(random_bits(seed ^ 77, WARPS * 64).reshape(WARPS, 64), axis=1)[:, :32]
        found["a"] = rows.astype(np.uint32).reshape(-1)  # stmatrix rows do not overlap
    if form.family == "wgmma":
        words = random_bits(seed ^ zlib.crc32(form.name.encode()), CTAS * 16).reshape(CTAS, 16)
        image = np.empty((CTAS, IMAGE), np.uint8)
        table = np.zeros((CTAS, 4), np.uint64)
        for i in range(CTAS):
            manner = MANNERS[i % len(MANNERS)]
            image[i, :SPLIT] = draw(seed, f"{form.name} A{i}", a, SPLIT // BYTES[a], manner).view(np.uint8)
            image[i, SPLIT:] = draw(seed, f"{form.name} B{i}", b, (IMAGE - SPLIT) // BYTES[b], manner).view(np.uint8)
            w = [int(x >> np.uint64(8)) for x in words[i]]
            table[i, 0] = descriptor(w[:7], 64, form.majors[0], FIRST, FIRST + SPLIT)
            table[i, 1] = descriptor(w[7:14], form.n, form.majors[1], FIRST + SPLIT, FIRST + IMAGE)
            table[i, 2] = w[14] % 4 != 0
        found["e"], found["i"] = table.reshape(-1), image.reshape(-1)
    return found

