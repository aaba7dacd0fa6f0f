"""Programs with asynchronous copies and mbarriers whose every result byte must be what an H200 computes.

Each program is one CTA, or one cluster (cluster_forms.py): kernel(const u8* x, u8* y), with operands from `inputs` and
a poisoned result. They judge what moves (sizes, offsets, zero fill, reductions on edge values, within a CTA and between
those of a cluster) and what an mbarrier answers (phases, parities, pending counts) to random sequences of operations,
which a model of three lines makes valid.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cluster_forms
import numpy as np
from operands import SEED, operands

WRAPPERS = (Path(__file__).parents[1] / "emulator" / "asynchronous.cuh").read_text()
PRELUDE = """
using u8 = unsigned char; using u16 = unsigned short; using u32 = unsigned int; using u64 = unsigned long long;
__device__ u32* words_of(u8* bytes) { return (u32*)bytes; }
"""
OUT = 1 << 14
POISON = 0xA5
CLUSTER = "__cluster_dims__(1, 1, 1)"


@dataclass(frozen=True)
class AsyncForm:
    """A program: its kernel's body, threads, a function of a random generator that makes its input bytes, attributes.

    Copies from shared memory to shared::cluster are an illegal instruction on an H200 in a launch without clusters.
    """

    name: str
    body: str
    threads: int
    make: Callable[[np.random.Generator], np.ndarray]
    attributes: str = ""
    ctas: int = 1

    @property
    def family(self) -> str:
        return self.name.split("/")[0]


def source(form: AsyncForm) -> str:
    """The CUDA text of a form."""
    return f"""{PRELUDE}{WRAPPERS}{STEPS}
extern "C" __global__ void {form.attributes} form(const u8* x, u8* y) {{
    __shared__ alignas(128) u8 tile[{OUT}];
    __shared__ u64 bar;
    const u32 t = threadIdx.x;
    for (u32 i = t; i < {OUT}; i += blockDim.x) tile[i] = {POISON};
    if (t == 0) {{ bar_init(&bar, 1); fence_init(); }}
    fence_async();
    __syncthreads();
    {form.body}
}}"""


def inputs(form: AsyncForm, seed: int = SEED) -> np.ndarray:
    """The operand bytes of a form, which depend on its name and the seed alone."""
    return np.ascontiguousarray(form.make(np.random.default_rng([seed, zlib.crc32(form.name.encode())])))


DUMP = f"__syncthreads(); for (u32 i = t; i < {OUT}; i += blockDim.x) y[i] = tile[i];"


# cp.async: 128 threads; word t of the input is the source size, the data follow.


def _sizes(size: int) -> Callable[[np.random.Generator], np.ndarray]:
    def make(rng: np.random.Generator) -> np.ndarray:
        lengths = rng.integers(0, size + 1, 128).astype(np.uint32)
        return np.concatenate([lengths.view(np.uint8), rng.integers(0, 256, 128 * size, np.uint8)])

    return make


def _copies() -> list[AsyncForm]:
    found = []
    for size in (4, 8, 16):
        body = f"""u32 length = ((const u32*)x)[t];
        copy<{size}>(tile + (127 - t) * {size}, x + 512 + t * {size}, length);
        copy_commit(); copy_wait<0>(); {DUMP}"""
        found.append(AsyncForm(f"cp.async/{size} bytes, zero fill", body, 128, _sizes(size)))
    ignore = """asm volatile("{\\n.reg .pred P;\\nsetp.ne.u32 P, %2, 0;\\n"
        "cp.async.ca.shared.global [%0], [%1], 4, P;\\n}"
        :: "r"(smem(tile + t * 4)), "l"(x + 512 + t * 4), "r"(((const u32*)x)[t]) : "memory");"""
    found.append(AsyncForm("cp.async/ignore-src", f"{ignore} copy_commit(); copy_wait<0>(); {DUMP}", 128, _sizes(4)))
    for noinc in ("", ".noinc"):
        body = f"""__syncthreads();
        if (t == 0) {{ bar_inval(&bar); bar_init(&bar, 128); }}
        __syncthreads();
        copy<16>(tile + t * 16, x + 512 + t * 16);
        asm volatile("cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [%0];" :: "r"(smem(&bar)) : "memory");
        {"" if noinc else "bar_arrive(&bar);"}
        bar_wait(&bar, 0); {DUMP}"""
        found.append(AsyncForm(f"cp.async/mbarrier.arrive{noinc}", body, 128, _sizes(16)))
    return found


# Bulk copies: 16 of them at random places that do not overlap; words (source, destination, size) / 16 precede the data.


def _places(rng: np.random.Generator) -> np.ndarray:
    cuts = np.sort(rng.choice(np.arange(1, OUT // 16), 15, replace=False))
    starts = np.concatenate([[0], cuts])
    room = np.diff(np.concatenate([starts, [OUT // 16]]))
    size = np.array([rng.integers(0, r + 1) for r in room])
    source = np.array([rng.integers(0, OUT // 16 - s + 1) for s in size])
    table = np.stack([source, starts, size], axis=1).astype(np.uint32) * 16
    data = rng.integers(0, 256, OUT, np.uint8)
    return np.concatenate([table.reshape(-1).view(np.uint8), np.zeros(64, np.uint8), data])


EACH = """const u32* table = (const u32*)x; const u8* data = x + 256;
    if (t == 0) {{ for (int i = 0; i < 16; ++i) {{ u32 from = table[3 * i], to = table[3 * i + 1], n = table[3 * i + 2];
        if (n) {{ {call} }} }} {end} }}"""


def _bulk() -> list[AsyncForm]:
    load = "bar_expect_more(&bar, n); bulk_load(tile + to, data + from, n, &bar);"
    fill = f"for (u32 i = t; i < {OUT}; i += blockDim.x) tile[i] = x[256 + i]; fence_async(); __syncthreads();"
    store = EACH.format(call="bulk_store(y + to, tile + from, n);", end="bulk_commit(); bulk_wait<0>();")
    inside = """u32 half_n = n / 2 & ~15u; bar_expect_more(&bar, half_n);
        bulk_copy(half + (to / 2 & ~15u), tile + (from / 2 & ~15u), half_n, &bar);"""
    return [
        AsyncForm("cp.async.bulk/global to shared",
                  EACH.format(call=load, end="bar_arrive(&bar);") + "bar_wait(&bar, 0);" + DUMP, 64, _places),
        AsyncForm("cp.async.bulk/shared to global", fill + store, 64, _places),
        AsyncForm("cp.async.bulk/shared to shared::cluster",
                  fill + "u8* half = tile + 8192;" + EACH.format(
                      call=inside, end="bar_arrive(&bar);")
                  + "bar_wait(&bar, 0);" + DUMP, 64, _places, CLUSTER),
    ]  # fmt: skip


# Reductions: 4,096 bytes of operands, then 4,096 of what they are folded into.

REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "noftz.f16", "noftz.bf16"), "inc": ("u32",), "dec": ("u32",),
    "min": ("u32", "s32", "u64", "s64", "f16", "bf16"), "max": ("u32", "s32", "u64", "s64", "f16", "bf16"),
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"),
}  # fmt: skip
IN_CLUSTER = {"add": ("u32", "s32", "u64"), "inc": ("u32",), "dec": ("u32",), "min": ("u32", "s32"),
              "max": ("u32", "s32"), "and": ("b32",), "or": ("b32",), "xor": ("b32",)}  # fmt: skip


def _pairs(name: str, ty: str) -> Callable[[np.random.Generator], np.ndarray]:
    kind = ty.split(".")[-1]

    def make(rng: np.random.Generator) -> np.ndarray:
        n = 4096 * 8 // int(kind.lstrip("bfsu"))
        both = operands(name, (kind, kind), n, seed=int(rng.integers(1 << 30)))
        return np.concatenate([each.view(np.uint8) for each in both])

    return make


def _reductions() -> list[AsyncForm]:
    found = []
    fill = "for (u32 i = t; i < 8192; i += blockDim.x) tile[i] = x[i];"
    for op, types in REDUCTIONS.items():
        for ty in types:
            body = f"""{fill} for (u32 i = t; i < 4096; i += blockDim.x) y[i] = x[4096 + i];
            fence_async(); asm volatile("fence.proxy.async;" ::: "memory"); __syncthreads();
            if (t == 0) {{
                asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{ty} [%0], [%1], 4096;"
                             :: "l"(y), "r"(smem(tile)) : "memory");
                bulk_commit(); bulk_wait<0>();
            }}"""
            name = f"cp.reduce.async.bulk/global {op}.{ty}"
            found.append(AsyncForm(name, body, 64, _pairs(name, ty)))
    for op, types in IN_CLUSTER.items():
        for ty in types:
            body = f"""{fill} fence_async(); __syncthreads();
            if (t == 0) {{
                bar_expect(&bar, 4096);
                asm volatile("cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.{op}.{ty} "
                             "[%0], [%1], 4096, [%2];" :: "r"(smem(tile + 4096)), "r"(smem(tile)), "r"(smem(&bar))
                             : "memory");
            }}
            bar_wait(&bar, 0); {DUMP}"""
            name = f"cp.reduce.async.bulk/shared::cluster {op}.{ty}"
            found.append(AsyncForm(name, body, 64, _pairs(name, ty), CLUSTER))
    return found


# mbarriers: one thread runs 512 steps (operation, operand) and notes what the barrier answers after each.

OPS = ("arrive", "arrive.noComplete", "arrive_drop", "expect_tx", "complete_tx", "arrive.expect_tx", "inval and init",
       "arrive_drop.noComplete", "arrive_drop.expect_tx")  # fmt: skip
STEPS = Path(__file__).with_name("mbarrier_steps.cuh").read_text()
INTERPRETER = "if (t == 0) mbarrier_steps(&bar, (const u32*)x, (u32*)y);"


def _steps(rng: np.random.Generator) -> np.ndarray:
    """A valid sequence; `expected`, `pending` and `tx` follow what each step does to the barrier of count 1."""
    expected = pending = 1
    tx, steps = 0, []
    while len(steps) < 512:
        op = int(rng.choice(9, p=[0.25, 0.15, 0.05, 0.15, 0.15, 0.1, 0.05, 0.05, 0.05]))
        n = 0
        if op in (0, 1, 2, 7):
            room = min(pending, 1 if op in (2, 7) and rng.random() < 0.5 else 1 << 20)
            room -= op in (1, 7)  # these must not complete the phase
            if room < 1 or (op in (2, 7) and expected <= room):
                continue
            n = int(rng.integers(1, room + 1))
            pending -= n
            expected -= n if op in (2, 7) else 0
        elif op in (3, 5, 8):
            n = 16 * int(rng.integers(1, 100))
            if op != 3 and (pending < 1 or (op == 8 and expected < 2)):
                continue
            tx += n
            pending -= op != 3
            expected -= op == 8
        elif op == 4:
            n = tx if tx > 0 and rng.random() < 0.5 else 16 * int(rng.integers(1, 100))
            if tx - n < -100000 or (tx - n == 0 and pending == 0 and expected == 0):
                continue
            tx -= n
        else:
            if tx:
                continue
            n = int(rng.choice([1, 2, 3, 17, 1000, (1 << 20) - 1]))
            expected = pending = n
        if pending == 0 and tx == 0:
            pending = expected
        steps.append((op, n))
    return np.array(steps, np.uint32).reshape(-1).view(np.uint8)


def _barriers() -> list[AsyncForm]:
    late = [(4, 16), (0, 1), (3, 16), (0, 1)]  # bytes, the last arrival, and only then what is expected
    still = np.array(late + [(6, 1)] * (512 - len(late)), np.uint32).reshape(-1).view(np.uint8)
    return [
        *(AsyncForm(f"mbarrier/sequence {i}", INTERPRETER, 32, _steps) for i in range(16)),
        AsyncForm("mbarrier/expect_tx after the last arrival", INTERPRETER, 32, lambda rng: still),
    ]


def all_forms() -> list[AsyncForm]:
    """Every program."""
    clusters = [
        AsyncForm(f"cluster/{name}", body, cluster_forms.THREADS, make, cluster_forms.ATTRIBUTES, cluster_forms.CTAS)
        for name, body, make in cluster_forms.programs()
    ]
    return [*_copies(), *_bulk(), *_reductions(), *_barriers(), *clusters]
