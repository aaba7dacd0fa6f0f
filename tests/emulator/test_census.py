# ruff: noqa: E501  (a form is a line of PTX)
"""What compilers emit, family by family: each instruction is executed, has no effect on purpose, or is refused by name.

The list is a census of 53 modules (290,000 instructions): own kernels, CCCL, Triton, and public attention, GEMM and
top-k kernels for sm_90a and sm_100a. Instructions of kernels without tensor cores, clusters and asynchronous copies must
run; any other either runs or is refused, and nothing else may happen to it.
"""

import numpy as np
import pytest
from programs import run_ptx

from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.ptx import SPECIAL
from dsv4_rt.errors import EmulatorError, UnsupportedInstruction

PROLOGUE = """
    .reg .pred p, q, t; .reg .b8 c; .reg .b16 h, i, h0, h1, h2, h3; .reg .b32 r, a, b, r0, r1, r2, r3, r4, r5, r6, r7;
    .reg .f32 x, y, z; .reg .b64 d, u, v, g, gs, gl, pol, d0, d1; .reg .f64 e, f; .reg .b128 w;
    .shared .align 128 .b8 s[1024]; .local .align 16 .b8 l[64]; .reg .b32 sa;
    ld.param.u64 g, [out]; mov.u64 gs, s; cvta.shared.u64 gs, gs; mov.u64 gl, l; cvta.local.u64 gl, gl; mov.u32 sa, s;
    setp.eq.u32 p, 1, 1; not.pred q, p; setp.eq.u32 t, 1, 1; mov.b16 h, 0x3C00; mov.b16 i, 0x4000; mov.b32 {h0, h1}, 0;
    mov.b32 {h2, h3}, 0; mov.u16 h, 1; mov.b32 r, 5; mov.b32 a, 6; mov.b32 b, 7; mov.b64 d, 9; mov.b64 u, 3; mov.b64 v, 4;
    mov.f32 x, 0f3F800000; mov.f32 y, 0f40000000; mov.f32 z, 0f40400000; mov.f64 e, 0d3FF0000000000000; mov.b64 pol, 0;
    mov.f64 f, 0d4000000000000000; mov.b32 r0, 0; mov.b32 r1, 0; mov.b32 r2, 0; mov.b32 r3, 0; mov.b32 r4, 0;
    mov.b32 r5, 0; mov.b32 r6, 0; mov.b32 r7, 0; mov.b64 d0, 0; mov.b64 d1, 0; mov.b128 w, {d0, d1};
    st.shared.v4.b32 [s], {r0, r1, r2, r3}; st.shared.v4.b32 [s+16], {r0, r1, r2, r3}; bar.sync 0;
    st.local.v4.b32 [l], {r0, r1, r2, r3}; st.local.v4.b32 [l+16], {r0, r1, r2, r3};
"""
ORDERS = ("weak", "relaxed.cta", "relaxed.gpu", "relaxed.sys", "acquire.gpu", "volatile")
V4 = "{r0, r1, r2, r3}"
V8 = "{r0, r1, r2, r3, r4, r5, r6, r7}"


def loads_and_stores():
    yield from (f"ld.{space}.{ty} {reg}, [{at}];" for space, at in (("global", "g"), ("shared", "s"), ("local", "l"))
                for ty, reg in (("u8", "r"), ("s8", "h"), ("u16", "r"), ("s16", "h"), ("b32", "r"), ("f32", "x"),
                                ("u64", "d"), ("f64", "e"), ("b128", "w")))  # fmt: skip
    yield from (f"ld.{order}.global.b32 r, [g];" for order in ORDERS)
    yield from ("ld.shared::cta.b32 r, [s+4];", "ld.b32 r, [gs];", "ld.b32 r, [gl];", "ld.b64 d, [g+-0];",
                "ld.param.b64 d, [out+0];", "ld.global.nc.b32 r, [g];", "ld.global.v2.f32 {x, y}, [g];",
                f"ld.global.v4.u32 {V4}, [g];", f"ld.global.v8.b32 {V8}, [g];", "ld.global.v4.b64 {d, u, v, d0}, [g];",
                f"ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {V4}, [g];",
                f"ld.global.nc.L1::evict_last.L2::evict_last.v8.b32 {V8}, [g];",
                "ld.global.L1::evict_first.L2::cache_hint.b32 r, [g], pol;", "ld.global.cs.b32 r, [g];",
                "ld.global.cg.b32 r, [g];", "ld.global.ca.b32 r, [g];", "ld.global.lu.b32 r, [g];",
                "ld.global.cv.b32 r, [g];", "ld.volatile.shared.u8 r, [s];", "ld.shared.v2.b64 {d, u}, [s];",
                "ld.shared.v4.b16 {h0, h1, h2, h3}, [s];", "ld.acquire.sys.global.b64 d, [g];",
                '.pragma "used_bytes_mask 0x0fff"; ld.shared.v4.b32 {r0, r1, r2, r3}, [s];')  # fmt: skip
    yield from (f"st.{space}.{ty} [{at}], {reg};" for space, at in (("global", "g"), ("shared", "s"), ("local", "l"))
                for ty, reg in (("u8", "r"), ("b16", "h"), ("b32", "r"), ("f32", "x"), ("b64", "d"), ("b128", "w")))
    yield from (f"st.global.v4.b32 [g], {V4};", f"st.global.v8.b32 [g], {V8};", "st.release.gpu.global.b32 [g], r;",
                "st.relaxed.sys.global.b32 [g], r;", "st.volatile.global.b32 [g], r;", "st.global.cs.b32 [g], r;",
                "st.global.wt.b32 [g], r;", "st.global.L1::no_allocate.L2::cache_hint.v2.b32 [g], {r, a}, pol;",
                "st.b32 [gs], r;", "st.weak.shared.v2.b32 [s], {r, a};", "st.global.cg.b32 [g], r;")  # fmt: skip


MOVES = (
    "mov.b32 r, a;", "mov.b64 d, {r, a};", "mov.b64 {r, a}, d;", "mov.b32 {h, _}, r;", "mov.b128 w, {d, u};",
    "mov.b128 {d, u}, w;", "mov.u64 d, s;", "mov.u32 r, s+16;", "mov.pred t, p;", "mov.b16 h, {c, c};", "mov.f64 e, f;",
    "mov.b32 r, 017;", "mov.b32 r, 0x1fU;", "mov.b32 r, -5;", "mov.b64 d, 0x8000000000000000;", "mov.b64 d, out;",
    "cvta.to.global.u64 d, g;", "cvta.shared.u64 d, u;", "cvta.to.shared.u64 d, gs;", "cvta.local.u64 d, u;",
    "cvta.param.u64 d, u;", "isspacep.global t, g;", "isspacep.shared t, gs;", "isspacep.local t, gl;",
)  # fmt: skip
INTEGER = (
    "add.s32 r, a, b;", "sub.u64 d, u, v;", "add.s16 h, h0, h1;", "mul.lo.u32 r, a, b;", "mul.hi.s64 d, u, v;",
    "mul.wide.u16 r, h0, h1;", "mad.lo.s32 r, a, b, r;", "mad.wide.u32 d, a, b, u;", "mad.lo.cc.u32 r, a, b, r;",
    "add.cc.u32 r, a, b;", "add.cc.u32 r, a, b; addc.cc.u32 r, a, b; addc.u32 r, a, b;",
    "sub.cc.u32 r, a, b; subc.u32 r, a, b;", "neg.s32 r, a;", "abs.s64 d, u;",
    "min.u16x2 r, a, b;", "max.s16x2 r, a, b;", "min.relu.s32 r, a, b;", "max.u64 d, u, v;", "div.s32 r, a, b;",
    "rem.u64 d, u, v;", "sad.u32 r, a, b, r;", "dp4a.u32.s32 r, a, b, r;", "dp2a.lo.s32.s32 r, a, b, r;",
    "shl.b32 r, a, b;", "shr.s64 d, u, a;", "shf.l.wrap.b32 r, a, b, r;", "shf.r.clamp.b32 r, a, b, r;",
    "bmsk.wrap.b32 r, a, b;", "and.b16 h, h0, h1;", "xor.pred t, p, q;", "not.b64 d, u;", "lop3.b32 r, a, b, r, 0xE8;",
    "lop3.or.b32 r|t, a, b, r, 0xE8, p;", "bfe.s32 r, a, b, r;", "bfi.b64 d, u, v, a, b;", "prmt.b32 r, a, b, 0x5410;",
    "brev.b64 d, u;", "popc.b64 r, d;", "clz.b32 r, a;", "bfind.shiftamt.u32 r, a;", "fns.b32 r, a, 0, 1;",
    "szext.clamp.u32 r, a, b;", "vabsdiff4.u32.u32.u32.add r, a, b, r;", "cnot.b32 r, a;", "mul24.lo.s32 r, a, b;",
)  # fmt: skip
FLOAT = (
    *(f"fma.{rnd}{mods}.f32 x, y, z, x;" for rnd in ("rn", "rz", "rm", "rp") for mods in ("", ".ftz", ".ftz.sat")),
    "add.rz.ftz.f32 x, y, z;", "mul.rm.f32 x, y, z;", "sub.rp.f32 x, y, z;", "add.sat.f32 x, y, z;",
    "fma.rn.relu.f16x2 r, a, b, r;", "fma.rn.bf16x2 r, a, b, r;", "fma.rn.ftz.f16 h, h0, h1, h2;",
    "fma.rn.f32x2 d, u, v, d;", "add.f32x2 d, u, v;", "mul.rn.f32x2 d, u, v;", "fma.rz.f64 e, f, e, f;",
    "add.rn.bf16 h, h0, h1;", "sub.bf16x2 r, a, b;", "mul.f16x2 r, a, b;", "neg.bf16x2 r, a;", "abs.f16x2 r, a;",
    "min.f32 x, y, z;", "max.NaN.f32 x, y, z;", "min.ftz.xorsign.abs.f32 x, y, z;", "max.f32 x, y, z, x;",
    "max.NaN.bf16x2 r, a, b;", "min.f16x2 r, a, b;", "div.rn.f32 x, y, z;", "div.full.ftz.f32 x, y, z;",
    "div.approx.f32 x, y, z;", "div.rp.f64 e, f, e;", "rcp.approx.ftz.f32 x, y;", "rcp.rn.f64 e, f;",
    "rcp.approx.ftz.f64 e, f;", "sqrt.rn.f32 x, y;", "sqrt.approx.ftz.f32 x, y;", "rsqrt.approx.f32 x, y;",
    "rsqrt.approx.ftz.f64 e, f;", "ex2.approx.ftz.f32 x, y;", "ex2.approx.ftz.bf16x2 r, a;", "ex2.approx.f16x2 r, a;",
    "lg2.approx.ftz.f32 x, y;", "sin.approx.f32 x, y;", "cos.approx.ftz.f32 x, y;", "tanh.approx.f32 x, y;",
    "tanh.approx.bf16x2 r, a;", "copysign.f32 x, y, z;", "testp.subnormal.f64 t, e;",
)  # fmt: skip
COMPARE = (
    *(f"setp.{op}.f32 t, x, y;" for op in "eq ne lt le gt ge equ neu ltu leu gtu geu num nan".split()),
    *(f"setp.{op}.u32 t, a, b;" for op in "lo ls hi hs".split()),
    "setp.ne.and.b32 t, a, b, p;", "setp.lt.or.s64 t|q, u, v, !p;", "setp.gt.bf16x2 t|q, a, b;", "setp.eq.b16 t, h0, h1;",
    "setp.neu.ftz.f16 t, h0, h1;", "set.gt.u32.f32 r, x, y;", "set.leu.bf16x2.bf16x2 r, a, b;", "set.gt.f32.f32 x, y, z;",
    "selp.b16 h, h0, h1, p;", "selp.f64 e, f, e, p;", "slct.b32.s32 r, a, b, r;", "selp.b32 r, a, b, !p;",
)  # fmt: skip
CONVERT = (
    "cvt.rn.bf16x2.f32 r, x, y;", "cvt.rz.relu.f16x2.f32 r, x, y;", "cvt.rn.satfinite.e4m3x2.f32 h, x, y;",
    "cvt.rn.satfinite.e5m2x2.f16x2 h, r;", "cvt.rn.f16x2.e4m3x2 r, h;", "cvt.rn.satfinite.e2m1x2.f32 c, x, y;",
    "cvt.rn.f16x2.e2m1x2 r, c;", "cvt.rn.satfinite.e2m3x2.f32 h, x, y;", "cvt.rn.f16x2.e3m2x2 r, h;",
    "cvt.rp.satfinite.ue8m0x2.f32 h, x, y;", "cvt.rn.bf16x2.ue8m0x2 r, h;", "cvt.rz.satfinite.ue8m0x2.bf16x2 h, r;",
    "cvt.rna.tf32.f32 r, x;", "cvt.rn.satfinite.relu.e2m1x2.f32 c, x, y;", "cvt.rzi.s32.f32 r, x;", "cvt.rpi.f32.f32 x, y;",
    "cvt.rni.ftz.s64.f32 d, x;", "cvt.rzi.u64.f64 d, e;", "cvt.rn.f32.u64 x, d;", "cvt.rm.f64.s64 e, d;", "cvt.rp.f32.f64 x, e;",
    "cvt.f64.f32 e, x;", "cvt.sat.f32.f32 x, y;", "cvt.sat.u8.s32 r, a;", "cvt.s16.s8 h, h0;", "cvt.u64.u32 d, r;",
    "cvt.rn.bf16.f32 h, x;", "cvt.f32.bf16 x, h;", "cvt.rn.f16.s32 h, r;", "cvt.rzi.u16.f16 h, h0;", "cvt.rn.bf16.s32 h, r;",
    "cvt.rn.f16.f32 h, x;", "cvt.rn.f32.s16 x, h;", "cvt.u32.u16 r, h;",
)  # fmt: skip
CONTROL = (
    "bra $next; $next:", "@p bra.uni $next; $next:", "@!p bra $next; mov.b32 r, 1; $next:", "ret;", "exit;", "@q trap;",
    "@q brkpt;", "$list: .branchtargets $one, $one; mov.b32 r, 0; brx.idx r, $list; $one:",
    "{ .reg .b32 scoped; mov.b32 scoped, r; }", "{ .param .b32 v; st.param.b32 [v], r; call.uni helper, (v); }",
    "{ .param .b32 v; mov.u64 d, helper; st.param.b32 [v], r; proto: .callprototype _ (.param .b32 _); call d, (v), proto; }",
    '.pragma "nounroll"; mov.b32 r, 1;',
)  # fmt: skip
WARP = (
    "shfl.sync.idx.b32 r, a, 0, 31, -1;", "shfl.sync.up.b32 r|t, a, 1, 0, -1;", "shfl.sync.down.b32 r, a, 4, 0x181f, -1;",
    "shfl.sync.bfly.b32 r, a, 16, 31, -1;", "vote.sync.ballot.b32 r, p, -1;", "vote.ballot.sync.b32 r, p, -1;",
    "vote.sync.any.pred t, p, -1;", "vote.sync.all.pred t, !p, -1;", "vote.sync.uni.pred t, p, -1;", "activemask.b32 r;",
    "match.any.sync.b32 r, a, -1;", "match.all.sync.b64 r|t, d, -1;", "redux.sync.add.s32 r, a, -1;",
    "redux.sync.or.b32 r, a, -1;", "redux.sync.max.NaN.f32 x, y, -1;", "redux.sync.min.abs.f32 x, y, -1;",
    "elect.sync r|t, -1;", "elect.sync _|t, -1;", "bar.warp.sync -1;",
)  # fmt: skip
BARRIERS = (
    "bar.sync 0;", "bar.sync 1, 32;", "bar.arrive 2, 64;", "barrier.sync.aligned 0;", "barrier.cta.sync 3;",
    "barrier.sync 4, 32;", "bar.red.popc.u32 r, 0, p;", "bar.red.and.pred t, 0, p;", "barrier.red.or.pred t, 1, 32, p;",
    "bar.sync r;", "barrier.cta.red.popc.aligned.u32 r, 1, p;",
)  # fmt: skip
ATOMICS = (
    *(f"atom.{space}.{op}.{ty} {reg}, [{at}], {value};" for space, at in (("global", "g"), ("shared", "s"))
      for op, ty, reg, value in (("add", "u32", "r", "a"), ("add", "u64", "d", "u"), ("add", "f32", "x", "y"),
                                 ("add", "f64", "e", "f"), ("min", "s64", "d", "u"), ("max", "u32", "r", "a"),
                                 ("and", "b32", "r", "a"), ("or", "b64", "d", "u"), ("xor", "b32", "r", "a"),
                                 ("exch", "b64", "d", "u"), ("inc", "u32", "r", "a"), ("dec", "u32", "r", "a"),
                                 ("cas", "b32", "r", "a, b"), ("cas", "b64", "d", "u, v"), ("cas", "b16", "h", "h0, h1"),
                                 ("add.noftz", "bf16x2", "r", "a"), ("add.noftz", "f16", "h", "h0"))),
    "atom.global.gpu.acq_rel.add.u32 r, [g], a;", "atom.add.release.gpu.u32 r, [g], a;",
    "atom.relaxed.gpu.global.add.u32 r, [g], a;", "atom.acquire.cta.shared.cas.b32 r, [s], a, b;",
    "atom.add.u32 r, [gs], a;", "atom.sys.global.exch.b32 r, [g], a;", "atom.shared::cta.add.u32 r, [s], a;",
    "atom.global.cas.b128 w, [g], w, w;", "atom.global.v2.f32.add {x, y}, [g], {x, y};",
    "red.global.add.u32 [g], a;", "red.relaxed.gpu.global.add.f32 [g], x;", "red.release.gpu.global.add.s32 [g], a;",
    "red.global.add.v4.f32 [g], {x, y, z, x};", "red.global.add.noftz.bf16x2 [g], r;", "red.shared.max.s32 [s], a;",
    "red.global.add.noftz.v4.bf16x2 [g], {r0, r1, r2, r3};", "red.async.relaxed.cluster.global.add.u32 [g], a;",
    "red.global.add.noftz.L2::cache_hint.v4.bf16x2 [g], {r0, r1, r2, r3}, pol;",
)  # fmt: skip
NO_EFFECT = (
    "membar.gl;", "membar.cta;", "membar.sys;", "fence.acq_rel.gpu;", "fence.sc.sys;", "fence.acq_rel.cta;",
    "fence.acq_rel.cluster;", "nanosleep.u32 100;", "griddepcontrol.wait;", "griddepcontrol.launch_dependents;",
    "prefetch.global.L2 [g];", "prefetch.global.L1 [g];", "prefetchu.L1 [g];", "discard.global.L2 [g], 128;",
    "applypriority.global.L2::evict_normal [g], 128;", "pmevent 1;", "prefetch.global.L2::evict_last [g];",
    "createpolicy.fractional.L2::evict_first.b64 pol, 1.0;", "createpolicy.fractional.L2::evict_last.L2::evict_unchanged.b64 pol, 0f3F000000;",
)  # fmt: skip
MUST_RUN = [
    *loads_and_stores(), *MOVES, *INTEGER, *FLOAT, *COMPARE, *CONVERT, *CONTROL, *WARP, *BARRIERS,
    *(each for each in ATOMICS if "async" not in each), *NO_EFFECT,
]  # fmt: skip
# Tensor cores, clusters, asynchronous copies and their barriers, tensor maps.
OTHERS = (
    "mbarrier.init.shared.b64 [s], 1;", "mbarrier.arrive.shared.b64 d, [s];", "mbarrier.inval.shared.b64 [s];",
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [s], 64;", "mbarrier.try_wait.parity.shared::cta.b64 t, [s], 0;",
    "mbarrier.test_wait.shared.b64 t, [s], d;", "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [s], 16;",
    "cp.async.ca.shared.global [s], [g], 16;", "cp.async.cg.shared.global.L2::128B [s], [g], 16, 8;",
    "cp.async.commit_group;", "cp.async.wait_group 0;", "cp.async.wait_all;", "cp.async.mbarrier.arrive.noinc.shared.b64 [s];",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [sa], [g], 16, [sa];",
    "cp.async.bulk.global.shared::cta.bulk_group [g], [sa], 16;", "cp.async.bulk.commit_group;",
    "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.prefetch.L2.global [g], 64;",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [g], [sa], 16;",
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [sa], [g, {r, a}], [sa];",
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [g, {r, a}], [sa];", "prefetch.tensormap [g];",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4.mbarrier::complete_tx::bytes [sa], [g, {r, a, b, r0, r1}], [sa];",
    "fence.proxy.async;", "fence.proxy.async.shared::cta;", "fence.mbarrier_init.release.cluster;",
    "fence.proxy.tensormap::generic.acquire.gpu [g], 128;", "fence.proxy.alias;", "setmaxnreg.inc.sync.aligned.u32 232;",
    "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;", "barrier.cluster.arrive.relaxed;",
    "mapa.shared::cluster.u32 r, sa, 0;", "mapa.u64 d, gs, 0;", "ld.shared::cluster.b32 r, [sa];", "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [sa], r, [sa];",
    "tensormap.replace.tile.global_address.shared::cta.b1024.b64 [s], d;", "getctarank.u64 r, gs;", "isspacep.shared::cluster t, gs;",
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {r0, r1, r2, r3}, [s];", "ldmatrix.sync.aligned.x4.m8n8.trans.shared.b16 {r0, r1, r2, r3}, [s];",
    "stmatrix.sync.aligned.m8n8.x2.shared.b16 [s], {r0, r1};", "movmatrix.sync.aligned.m8n8.trans.b16 r, a;",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {r0, r1, r2, r3}, {r0, r1, r2, r3}, {r4, r5}, {r0, r1, r2, r3};",
    "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {r0, r1, r2, r3}, d, u, p, 1, 1, 0, 0;",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [s], 32;", "tcgen05.dealloc.cta_group::1.sync.aligned.b32 r, 32;",
    "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;", "tcgen05.ld.sync.aligned.32x32b.x4.b32 {r0, r1, r2, r3}, [r];",
    "tcgen05.st.sync.aligned.32x32b.x2.b32 [r], {r0, r1};", "tcgen05.wait::ld.sync.aligned;", "tcgen05.fence::before_thread_sync;",
    "tcgen05.mma.cta_group::1.kind::f16 [r], d, u, a, p;", "tcgen05.mma.ws.cta_group::1.kind::f16 [r], d, u, a, p;",
    "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [s];", "tcgen05.cp.cta_group::1.128x256b [r], d;",
    "tcgen05.cp.cta_group::1.4x256b [r], d;", "tcgen05.cp.cta_group::1.128x128b [r], d;", "tcgen05.cp.cta_group::1.warpx4.32x128b [r], d;",
    "tcgen05.cp.cta_group::1.64x128b.warpx2::02_13 [r], d;", "tcgen05.cp.cta_group::1.64x128b.warpx2::01_23.b8x16.b6x16_p32 [r], d;",
    "tcgen05.cp.cta_group::1.128x128b.b8x16.b4x16_p64 [r], d;", "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.scale_vec::1X [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32.collector::a::fill [r], [r], u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32 [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::2X [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::2.kind::mxf4nvf4.block_scale.block16 [r], d, u, a, [r], [r], p;",
    "tcgen05.mma.cta_group::2.kind::mxf8f6f4.block_scale.collector::a::use [r], [r], u, a, [r], [r], p;",
    "tcgen05.cp.cta_group::2.32x128b.warpx4 [r], d;", "tcgen05.cp.cta_group::2.64x128b.warpx2::01_23.b8x16.b4x16_p64 [r], d;",
    "tcgen05.ld.sync.aligned.16x64b.x2.pack::16b.b32 {r0, r1}, [r];", "tcgen05.st.sync.aligned.16x128b.x1.unpack::16b.b32 [r], {r0, r1};",
    "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [s], [s];",
    "multimem.ld_reduce.relaxed.sys.global.add.f32 x, [g];", "tex.2d.v4.f32.s32 {x, y, z, x}, [g, {r, a}];", "wmma.mma.sync.aligned.m16n16k16.row.col.f32.f32 {x}, {r}, {a}, {y};",
    "no.such.instruction r, a;", "stackrestore.u64 d;", "alloca.u64 d, 16;",
)  # fmt: skip


def text(line, target="sm_100a"):
    return f""".version 9.0
    .target {target}
    .address_size 64
    .func helper(.param .b32 v) {{ ret; }}
    .visible .entry f(.param .u64 .ptr .global .align 16 out) .reqntid 32, 1, 1 .minnctapersm 1 {{ {PROLOGUE}
    {line}
    ret; }}"""


def test_the_list_is_as_long_as_it_looks():
    assert len(MUST_RUN) > 300
    assert len(set(MUST_RUN)) == len(MUST_RUN)


@pytest.mark.parametrize("line", MUST_RUN)
def test_is_executed(line):
    out = np.zeros(64, np.uint64)
    at = out.ctypes.data % 128 and 16 - out.ctypes.data % 128 // 8
    run_ptx(text(line), "f", 1, 32, out[at : at + 48])


@pytest.mark.parametrize("line", OTHERS)
def test_runs_or_is_refused_by_name(line):
    module = Machine("sm_100a").load(text(line), "census")
    refused = ""
    try:
        module.program("f")
    except UnsupportedInstruction as error:
        refused = str(error)
    opcode = line.split()[0].rstrip(";").split(".")[0]
    assert not refused or (opcode in refused and "PTX line" in refused)


@pytest.mark.parametrize("name", sorted(SPECIAL))
def test_special_registers_have_a_value_or_are_refused_by_name(name):
    wide = name in ("clock64", "globaltimer", "gridid")
    line = f"mov.u{64 if wide else 32} {'d' if wide else 'r'}, %{name};"
    if name.startswith("reserved_smem"):
        with pytest.raises((UnsupportedInstruction, EmulatorError), match=f"%{name}"):
            run_ptx(text(line), "f", 1, 32, np.zeros(64, np.uint64))
    else:
        run_ptx(text(line), "f", 1, 32, np.zeros(64, np.uint64))


@pytest.mark.parametrize(
    "directives",
    [
        ".maxntid 1024, 1, 1", ".reqntid 32", ".minnctapersm 2", ".maxnctapersm 2", ".maxnreg 32", ".noreturn",
        '.pragma "enable_smem_spilling";', ".reqnctapercluster 1, 1, 1", ".maxclusterrank 8", ".blocksareclusters",
    ],
)  # fmt: skip
def test_directives_of_kernels(directives):
    source = text("").replace(".reqntid 32, 1, 1 .minnctapersm 1", directives)
    Machine("sm_100a").load(source, "census").program("f")
