"""Programs of one cluster whose every result byte must be what an H200 computes: async_forms.py says how they are run.

Four CTAs of 64 threads. Bytes of `tile` come from `x`; each CTA writes 4,096 bytes of `y`. Where threads meet in a
word the operation commutes; otherwise every thread has places of its own, which a table in front of the data names.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from operands import operands

CTAS, THREADS, SHARE = 4, 64, 4096
ALL = CTAS * THREADS
ATTRIBUTES = f"__cluster_dims__({CTAS}, 1, 1) __launch_bounds__({THREADS})"
Make = Callable[[np.random.Generator], np.ndarray]

BEGIN = f"""const u32 rank = cluster_rank(), id = rank * {THREADS} + t;
    const u32* table = (const u32*)x; const u8* data = x + {ALL * 4};
    for (u32 i = t; i < {SHARE}; i += {THREADS}) tile[i] = data[rank * {SHARE} + i];
    fence_async(); cluster_sync();"""
END = f"""cluster_sync(); u8* mine = y + rank * {SHARE};
    for (u32 i = t; i < {SHARE}; i += {THREADS}) mine[i] = tile[i];"""
WHERE = "const u32 to = at_rank(tile, table[id] / {n}) + table[id] % {n} * {size};"


def _permuted(size: int) -> Make:
    """A table of (CTA, slot) pairs, each once, and random bytes; slots of `size` bytes."""

    def make(rng: np.random.Generator) -> np.ndarray:
        table = rng.permutation(CTAS * (SHARE // 2 // size))[:ALL].astype(np.uint32)
        return np.concatenate([table.view(np.uint8), rng.integers(0, 256, CTAS * SHARE, np.uint8)])

    return make


def _operands(name: str, ty: str) -> Make:
    """The same table; the halves of a CTA's share are words in memory and operands of the operation."""
    kind = ty.split(".")[-1]
    bits = int(kind.lstrip("bfsu"))

    def make(rng: np.random.Generator) -> np.ndarray:
        n = CTAS * SHARE // 2 * 8 // bits
        words, values = operands(name, (kind, kind), n, seed=int(rng.integers(1 << 30)))
        both = [np.ascontiguousarray(each).view(np.uint8).reshape(CTAS, -1) for each in (words, values)]
        table = rng.permutation(CTAS * (SHARE // 2 // (bits // 8)))[:ALL].astype(np.uint32)
        return np.concatenate([table.view(np.uint8), np.concatenate(both, axis=1).reshape(-1)])

    return make


def _where(size: int) -> str:
    return WHERE.format(n=SHARE // 2 // size, size=size)


WIDTHS = {  # a type of ld and st: its C type, elements and constraint
    "b8": ("u16", 1, "h"), "u8": ("u32", 1, "r"), "s8": ("int", 1, "r"), "b16": ("u16", 1, "h"),
    "s16": ("int", 1, "r"), "b32": ("u32", 1, "r"), "b64": ("u64", 1, "l"), "f32": ("float", 1, "f"),
    "f64": ("double", 1, "d"), "v2.b8": ("u16", 2, "h"), "v4.b8": ("u16", 4, "h"), "v2.b16": ("u16", 2, "h"),
    "v4.b16": ("u16", 4, "h"), "v2.b32": ("u32", 2, "r"), "v4.b32": ("u32", 4, "r"), "v2.b64": ("u64", 2, "l"),
}  # fmt: skip


def _list(n: int, first: int) -> str:
    names = ", ".join(f"%{first + i}" for i in range(n))
    return f"{{{names}}}" if n > 1 else names


def _moves() -> list[tuple[str, str, Make]]:
    """ld, st and st.async of every width, from and to places of other CTAs."""
    found = []
    for ty, (c, n, letter) in WIDTHS.items():
        size = int(ty.split(".")[-1][1:]) // 8 * n
        outs = ", ".join(f'"={letter}"(v[{i}])' for i in range(n))
        ins = ", ".join(f'"{letter}"(v[{i}])' for i in range(n))
        load = f"""{BEGIN} {_where(size)} {c} v[{n}];
            asm volatile("ld.shared::cluster.{ty} {_list(n, 0)}, [%{n}];" : {outs} : "r"(to) : "memory");
            u8* at = y + id * 64; const u8* got = (const u8*)v;
            for (int i = 0; i < {n} * (int)sizeof({c}); ++i) at[i] = got[i]; cluster_sync();"""
        found.append((f"ld.{ty}", load, _permuted(size)))
        own = f"""{c} v[{n}]; u64 z = id * 0x9e3779b97f4a7c15ull;
            for (int i = 0; i < {n}; ++i) {{ z = (z ^ z >> 29) * 0xbf58476d1ce4e5b9ull; v[i] = ({c})(z >> 11); }}"""
        store = f"""{BEGIN} {_where(size)} {own}
            asm volatile("st.shared::cluster.{ty} [%0], {_list(n, 1)};" :: "r"(to), {ins} : "memory"); {END}"""
        found.append((f"st.{ty}", store, _permuted(size)))
        if size < 4 or ty in ("v4.b8", "v2.b16", "v4.b16"):
            continue
        count = f"""u32 come = 0; for (int i = 0; i < {ALL}; ++i) come += table[i] / {SHARE // 2 // size} == rank;
            if (t == 0) bar_expect(&bar, come * {size});"""
        store = f"""{BEGIN} {_where(size)} {own} {count}
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.{ty} [%0], {_list(n, 1)}, [%{n + 1}];"
                         :: "r"(to), {ins}, "r"(at_rank(&bar, table[id] / {SHARE // 2 // size})) : "memory");
            cluster_wait(&bar, 0); {END}"""
        found.append((f"st.async.{ty}", store, _permuted(size)))
    return found


ATOMICS = {
    "add": ("u32", "s32", "u64", "f32", "f64", "noftz.f16", "noftz.bf16"),  # pairs: an H200 adds integers, a fault here
    "inc": ("u32",), "dec": ("u32",), "min": ("u32", "s32", "u64", "s64"), "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"), "or": ("b32", "b64"), "xor": ("b32", "b64"), "exch": ("b32", "b64"),
}  # fmt: skip
RED_ASYNC = {"add": ("u32", "s32", "u64"), "inc": ("u32",), "dec": ("u32",), "min": ("u32", "s32"),
             "max": ("u32", "s32"), "and": ("b32",), "or": ("b32",), "xor": ("b32",)}  # fmt: skip


def _shape(ty: str) -> tuple[str, str, int]:
    """(C type, constraint, bytes) of a type's operand."""
    return {16: ("u16", "h", 2), 32: ("u32", "r", 4), 64: ("u64", "l", 8)}[int(ty.split(".")[-1].lstrip("bfsu"))]


def _atomics() -> list[tuple[str, str, Make]]:
    """atom, red and red.async in another CTA; registers hold bits, whatever the type."""
    found = []
    for op, types in ATOMICS.items():
        for ty in types:
            c, letter, size = _shape(ty)
            held = {"f32": "f", "f64": "d"}.get(ty, letter)
            float_of = {"f32": "__uint_as_float(v)", "f64": "__longlong_as_double(v)"}.get(ty, "v")
            takes = f"{c} v = (({c}*)(tile + {SHARE // 2}))[t]; {_where(size)}"
            result = {"f32": "float", "f64": "double"}.get(ty, c)
            atom = f"""{BEGIN} {takes} {result} was;
                asm volatile("atom.relaxed.cluster.shared::cluster.{op}.{ty} %0, [%1], %2;"
                             : "={held}"(was) : "r"(to), "{held}"({float_of}) : "memory");
                cluster_sync(); *({result}*)(tile + {SHARE // 2 + 1024} + t * 8) = was; {END}"""
            found.append((f"atom.{op}.{ty}", atom, _operands(f"{op} {ty}", ty)))
            if op == "exch":
                continue
            red = f"""{BEGIN} {takes}
                asm volatile("red.relaxed.cluster.shared::cluster.{op}.{ty} [%0], %1;"
                             :: "r"(to), "{held}"({float_of}) : "memory"); {END}"""
            found.append((f"red.{op}.{ty}", red, _operands(f"{op} {ty}", ty)))
    for ty, old in (("b32", "u32"), ("b64", "u64")):
        _, letter, size = _shape(ty)
        cas = f"""{BEGIN} {old} v = (({old}*)(tile + {SHARE // 2}))[t], was, want; {_where(size)}
            asm volatile("ld.shared::cluster.{ty} %0, [%1];" : "={letter}"(want) : "r"(to) : "memory");
            asm volatile("atom.relaxed.cluster.shared::cluster.cas.{ty} %0, [%1], %2, %3;"
                         : "={letter}"(was) : "r"(to), "{letter}"(want + t % 3 % 2), "{letter}"(v) : "memory");
            cluster_sync(); *({old}*)(tile + {SHARE // 2 + 1024} + t * 8) = was; {END}"""
        found.append((f"atom.cas.{ty}", cas, _operands(f"cas {ty}", ty)))
    for op, types in RED_ASYNC.items():
        for ty in types:
            c, letter, size = _shape(ty)
            red = f"""{BEGIN} {c} v = (({c}*)(tile + {SHARE // 2}))[{"0" if op in ("inc", "dec") else "t"}];
                const u32 other = table[id] % {CTAS}, to = at_rank(tile, other) + t % 16 * {size};
                u32 come = 0; for (int i = 0; i < {ALL}; ++i) come += table[i] % {CTAS} == rank;
                if (t == 0) bar_expect(&bar, come * {size});
                asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{op}.{ty} "
                    "[%0], %1, [%2];" :: "r"(to), "{letter}"(v), "r"(at_rank(&bar, other)) : "memory");
                cluster_wait(&bar, 0); {END}"""
            found.append((f"red.async.{op}.{ty}", red, _operands(f"{op} {ty}", ty)))
    return found


def _same_value(make: Make) -> Make:
    """inc and dec commute only among equal operands: those of every CTA begin with one and the same word."""

    def made(rng: np.random.Generator) -> np.ndarray:
        x = make(rng)
        shares = x[ALL * 4 :].reshape(CTAS, SHARE)
        shares[:, SHARE // 2 : SHARE // 2 + 4] = shares[0, SHARE // 2 : SHARE // 2 + 4]
        return x

    return made


def _bulk() -> list[tuple[str, str, Make]]:
    """Bulk copies to several CTAs and from CTA to CTA: 16-byte pieces at random places that do not overlap."""

    def make(rng: np.random.Generator) -> np.ndarray:
        table = np.zeros((CTAS, 16, 4), np.uint32)  # first chunk, chunks, mask or CTA, source chunk
        for rank in range(CTAS):  # each CTA fills a quarter of every other's share
            cuts = np.sort(rng.choice(np.arange(1, 64), 15, replace=False))
            starts = np.concatenate([[0], cuts])
            table[rank, :, 0] = rank * 64 + starts
            table[rank, :, 1] = rng.integers(0, np.diff(np.concatenate([starts, [64]])) + 1)
            table[rank, :, 2] = rng.integers(0, 1 << CTAS, 16)
            table[rank, :, 3] = rng.integers(0, SHARE // 16 - table[rank, :, 1] + 1)
        return np.concatenate([table.reshape(-1).view(np.uint8), rng.integers(0, 256, CTAS * SHARE, np.uint8)])

    expect = f"""u32 come = 0;
        for (int i = 0; i < {CTAS} * 16; ++i) come += {{mine}} ? table[4 * i + 1] * 16 : 0;
        if (t == 0) bar_expect(&bar, come);
        if (t == 0) for (int i = rank * 16; i < rank * 16 + 16; ++i) {{{{
            const u32 at = table[4 * i] * 16, n = table[4 * i + 1] * 16, who = table[4 * i + 2];
            const u32 from = table[4 * i + 3] * 16;
            if (n) {{{{ {{call}} }}}} }}}}
        cluster_wait(&bar, 0);"""
    copied = BEGIN.replace("tile[i] = data", "tile[8192 + i] = data")
    return [
        ("bulk multicast", BEGIN + expect.format(
            mine="table[4 * i + 2] >> rank & 1",
            call=f"if (who) bulk_load_multicast(tile + at, data + rank * {SHARE} + from, n, &bar, who);") + END, make),
        ("bulk to another CTA", copied + expect.format(
            mine="table[4 * i + 2] % 4 == rank",
            call="bulk_copy_to(who % 4, tile + at, tile + 8192 + from, n, &bar);") + END, make),
    ]  # fmt: skip


def _rest() -> list[tuple[str, str, Make]]:
    """Numbers of a cluster, its barrier in every form, mbarriers of other CTAs, and what changes no value."""
    facts = f"""{BEGIN} u32 r[16]; const u32 peer = (rank + 1 + t) % {CTAS}, s = smem(tile), a = at_rank(tile, peer);
        u64 own = (u64)tile, far; u32 k, k64, in;
        asm volatile("mapa.u64 %0, %1, %2;" : "=l"(far) : "l"(own), "r"(peer));
        asm volatile("getctarank.shared::cluster.u32 %0, %1;" : "=r"(k) : "r"(a));
        asm volatile("getctarank.u64 %0, %1;" : "=r"(k64) : "l"(far));
        asm volatile("{{ .reg .pred p; isspacep.shared::cluster p, %1; selp.u32 %0, 1, 0, p; }}" : "=r"(in) : "l"(far));
        r[0] = a - (s & 0xffffff); r[1] = (u32)(far - own) + (rank << 24); r[2] = k; r[3] = k64; r[4] = in;
        r[5] = (s >> 24) == rank;
        #define REGISTER(i, name) asm volatile("mov.u32 %0, %%" name ";" : "=r"(r[i]));
        REGISTER(6, "clusterid.x") REGISTER(7, "nclusterid.x") REGISTER(8, "cluster_ctaid.x")
        REGISTER(9, "cluster_nctaid.x")
        REGISTER(10, "cluster_ctarank") REGISTER(11, "cluster_nctarank") REGISTER(12, "cluster_ctaid.y")
        REGISTER(13, "cluster_nctaid.z") REGISTER(14, "clusterid.z")
        asm volatile("{{ .reg .pred p; isspacep.shared::cta p, %1; selp.u32 %0, 1, 0, p; }}" : "=r"(r[15]) : "l"(far));
        for (int i = 0; i < 16; ++i) ((u32*)y)[id * 16 + i] = r[i]; cluster_sync();"""
    found = [("numbers and addresses", facts, _permuted(4))]
    for arrive, wait in (("", ""), (".aligned", ".aligned"), (".release", ".acquire"),
                         (".release.aligned", ".acquire.aligned"), (".relaxed", ""),
                         (".relaxed.aligned", ".aligned")):  # fmt: skip
        fence = 'asm volatile("fence.acq_rel.cluster;" ::: "memory");' if "relaxed" in arrive else ""
        ring = f"""{BEGIN} u32* words = (u32*)tile;
            for (int i = 0; i < 8; ++i) {{
                const u32 v = words[t + 64 * (i % 2)] * 2654435761u + i;
                asm volatile("st.shared::cluster.u32 [%0], %1;"
                    :: "r"(at_rank(words + t + 64 * (1 - i % 2), (rank + i) % {CTAS})), "r"(v) : "memory");
                {fence}
                asm volatile("barrier.cluster.arrive{arrive};\\n" ::: "memory");
                asm volatile("barrier.cluster.wait{wait};" ::: "memory");
                {fence}
            }} {END}"""
        found.append((f"barrier.cluster arrive{arrive}, wait{wait}", ring, _permuted(4)))
    arrivals = f"""{BEGIN} __shared__ u64 gates[4]; if (t < 4) bar_init(gates + t, {THREADS} * 3);
        fence_init(); cluster_sync();
        const u32 other = (rank + 1) % {CTAS}, n = table[id] % 3, gate = at_rank(gates + t % 4, other);
        for (u32 i = 0; i < 3; ++i) if (i != n) remote_arrive(gates + t % 4, other);
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0], %1;"
                     :: "r"(gate), "r"(1 + n) : "memory");
        cluster_sync(); if (t < 4) {{ u32 left; u64 s = bar_arrive(gates + t);
            asm volatile("mbarrier.pending_count.b64 %0, %1;" : "=r"(left) : "l"(s));
            words_of(tile)[t] = left; }} __syncthreads(); {END}"""
    bytes_ = f"""{BEGIN} const u32 other = (rank + 3) % {CTAS};
        if (t == 0) {{ asm volatile("mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%0], %1;"
                :: "r"(at_rank(&bar, other)), "r"(4u * {THREADS}) : "memory"); }}
        cluster_sync();
        asm volatile("mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%0], 4;"
                     :: "r"(at_rank(&bar, (rank + 1) % {CTAS})) : "memory");
        cluster_wait(&bar, 0); words_of(tile)[t] = bar_test(&bar, 0) * 2 + bar_test(&bar, 1); __syncthreads(); {END}"""
    still = f"""{BEGIN} u32 a, b; u64 c, d;
        asm volatile("griddepcontrol.launch_dependents;\\ngriddepcontrol.wait;" ::: "memory");
        asm volatile("mov.u32 %0, %%clock; mov.u64 %1, %%globaltimer;" : "=r"(a), "=l"(c) :: "memory");
        asm volatile("nanosleep.u32 %0;" :: "r"(table[id] % 100) : "memory");
        asm volatile("mov.u32 %0, %%clock; mov.u64 %1, %%globaltimer;" : "=r"(b), "=l"(d) :: "memory");
        words_of(tile)[t] = (b != a) + 2 * (d >= c); __syncthreads(); {END}"""
    return [*found, ("mbarrier.arrive at another CTA", arrivals, _permuted(4)),
            ("mbarrier.expect_tx, complete_tx at another CTA", bytes_, _permuted(4)),
            ("griddepcontrol, nanosleep, clock, globaltimer", still, _permuted(4))]  # fmt: skip


def programs() -> list[tuple[str, str, Make]]:
    """(name, body, what makes the operands) of every program."""
    found = [*_moves(), *_atomics(), *_bulk(), *_rest()]
    return [(n, b, _same_value(m) if n.startswith(("red.async.inc", "red.async.dec")) else m) for n, b, m in found]
