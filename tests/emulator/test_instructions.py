"""One line of PTX for each instruction and modifier the emulator translates, on values whose result is known by hand.

The arithmetic itself is judged elsewhere; this catches a translation that picks the wrong operand, width or function.
"""

import re
import struct

import numpy as np
import pytest
from programs import run_ptx

from dsv4_rt.errors import KernelFault

HEAD = """.version 9.5
.target sm_100a
.address_size 64
"""


def f32(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f64(value):
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def half(value):
    return struct.unpack("<H", struct.pack("<e", value))[0]


# One thread with an mbarrier at s+8 that expects 4 bytes; and its wait, after which s is read.
ALONE = (
    "mov.u32 i, %tid.x; setp.eq.u32 t, i, 0; @t mbarrier.init.shared::cta.b64 [s+8], 1; "
    "@t mbarrier.arrive.expect_tx.shared::cta.b64 _, [s+8], 4; "
)
# 32 columns of tensor memory for warp 0 (q), from i on; 128 bytes of 0x1234s, their descriptor in o; t: thread 0.
TMEM = (
    "mov.u32 i, %tid.x; setp.lt.u32 q, i, 32; setp.eq.u32 t, i, 0; @t mbarrier.init.shared::cta.b64 [s+8], 1; "
    "@q tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [s], 32; { .shared .align 128 .b8 m[128]; .reg .b32 j; "
    "mov.u32 j, m; mad.lo.u32 j, i, 2, j; st.shared.u16 [j], c; fence.proxy.async; mov.u32 j, m; shr.u32 j, j, 4; "
    "cvt.u64.u32 o, j; or.b64 o, o, 0x400000040000; } bar.sync 0; ld.shared.u32 i, [s]; "
)
COPIED = (
    " @t tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [s+8]; "
    "@q mbarrier.try_wait.parity.shared::cta.b64 u, [s+8], 0;"
)
FREED = " @q tcgen05.wait::ld.sync.aligned; @q tcgen05.dealloc.cta_group::1.sync.aligned.b32 i, 32;"
WAITED = " @t mbarrier.try_wait.parity.shared::cta.b64 u, [s+8], 0; @t ld.shared.u32 R, [s];"

# a = 100 (u32), b = -7 (s32), c = 0x80001234, x = 1.5, y = -2.25 (f32), w = 2^40 + 5 (u64), v = -3 (s64),
# X = 1.5, Y = -2.25 (f64), h = 1.5, g = -2.25 (f16), H = {1.5, -2.25} (f16x2), P = {x, y}, p = true, q = false.
# A result in 32 bits lands in R or F, in 64 bits in Q or D, in 16 bits in S.
CASES = [
    ("add.u32 R, a, b;", 93),
    ("sub.s32 R, b, a;", -107),
    ("mul.lo.s32 R, a, b;", -700),
    ("mul.hi.s32 R, a, b;", -1),
    ("mul.hi.u32 R, c, 4;", 2),
    ("mul.wide.s32 Q, a, b;", -700),
    ("mul.wide.u32 Q, b, 2;", 2 * (2**32 - 7)),
    ("mad.lo.s32 R, a, b, 1;", -699),
    ("mad.hi.u32 R, c, 4, 1;", 3),
    ("mad.wide.s32 Q, a, b, w;", 2**40 - 695),
    ("mul24.lo.u32 R, a, 3;", 300),
    ("add.sat.s32 R, 0x7fffffff, a;", 0x7FFFFFFF),
    ("div.s32 R, a, b;", -14),
    ("rem.s32 R, a, b;", 2),
    ("div.u64 Q, w, 2;", 2**39 + 2),
    ("rem.u64 Q, w, 8;", 5),
    ("neg.s32 R, b;", 7),
    ("abs.s32 R, b;", 7),
    ("abs.s64 Q, v;", 3),
    ("min.s32 R, a, b;", -7),
    ("max.u32 R, a, b;", -7),
    ("min.s64 Q, w, v;", -3),
    ("and.b32 R, c, 0xff;", 0x34),
    ("or.b32 R, c, 1;", 0x80001235),
    ("xor.b32 R, c, c;", 0),
    ("not.b32 R, c;", 0x7FFFEDCB),
    ("cnot.b32 R, 0;", 1),
    ("shl.b32 R, a, 4;", 1600),
    ("shl.b32 R, a, 32;", 0),
    ("shr.u32 R, c, 28;", 8),
    ("shr.s32 R, c, 40;", -1),
    ("shr.b64 Q, w, 40;", 1),
    ("shl.b64 Q, w, a;", 0),
    ("shf.l.wrap.b32 R, c, a, 33;", 201),
    ("shf.r.clamp.b32 R, c, a, 40;", 100),
    ("lop3.b32 R, a, c, b, 0x96;", 100 ^ 0x80001234 ^ (2**32 - 7)),
    ("bfe.u32 R, c, 4, 8;", 0x23),
    ("bfe.s32 R, c, 31, 1;", -1),
    ("bfi.b32 R, a, 0, 8, 8;", 100 << 8),
    ("popc.b32 R, c;", 6),
    ("popc.b64 R, w;", 3),
    ("clz.b32 R, a;", 25),
    ("clz.b64 R, w;", 23),
    ("brev.b32 R, 1;", 0x80000000),
    ("bfind.u32 R, a;", 6),
    ("bfind.shiftamt.u32 R, a;", 25),
    ("prmt.b32 R, c, a, 0x0123;", 0x34120080),
    ("prmt.b32 R, c, a, 0x4000;", 0x64343434),
    ("sad.u32 R, a, 3, 1;", 98),
    ("dp4a.u32.u32 R, 0x01020304, 0x01010101, a;", 110),
    ("vabsdiff4.u32.u32.u32 R, c, a, 0;", 0x80001230),
    ("vabsdiff4.u32.u32.u32.add R, c, a, a;", 100 + 0x80 + 0x12 + 0x30),
    ("bmsk.clamp.b32 R, 4, 8;", 0xFF0),
    ("fns.b32 R, c, 0, 2;", 4),
    ("szext.wrap.s32 R, 0xff, 8;", -1),
    ("selp.b32 R, a, b, p;", 100),
    ("selp.b32 R, a, b, !p;", -7),
    ("slct.s32.s32 R, a, b, -1;", -7),
    ("set.lt.u32.s32 R, b, a;", -1),
    ("set.gt.f32.s32 F, a, b;", f32(1.0)),
    ("set.gt.u32.f16x2 R, H, 0;", 0xFFFF),
    ("add.cc.u32 R, c, c; addc.u32 R, a, 0;", 101),
    ("sub.cc.u32 R, 0, 1; subc.u32 R, a, 0;", 99),
    ("add.f32 F, x, y;", f32(-0.75)),
    ("sub.rz.f32 F, x, y;", f32(3.75)),
    ("mul.ftz.f32 F, x, y;", f32(-3.375)),
    ("fma.rn.f32 F, x, y, x;", f32(-1.875)),
    ("mad.rn.f32 F, x, x, x;", f32(3.75)),
    ("add.sat.f32 F, x, x;", f32(1.0)),
    ("sub.rn.f32.f16 F, g, x;", f32(-3.75)),
    ("add.rn.f32.bf16 F, 0x3FC0, y;", f32(-0.75)),
    ("fma.rn.f32.f16 F, h, g, y;", f32(-5.625)),
    ("fma.rn.f32.bf16 F, 0x3FC0, 0xC010, x;", f32(-1.875)),
    ("div.rn.f32 F, y, x;", f32(-1.5)),
    ("div.full.f32 F, y, x;", f32(-1.5)),
    ("div.approx.ftz.f32 F, y, x;", f32(-1.5)),
    ("rcp.rn.f32 F, 0f40000000;", f32(0.5)),
    ("rcp.approx.ftz.f32 F, 0f40000000;", f32(0.5)),
    ("sqrt.rn.f32 F, 0f40800000;", f32(2)),
    ("sqrt.approx.f32 F, 0f40800000;", f32(2)),
    ("rsqrt.approx.f32 F, 0f40800000;", f32(0.5)),
    ("ex2.approx.ftz.f32 F, 0f40400000;", f32(8)),
    ("lg2.approx.f32 F, 0f41000000;", f32(3)),
    ("sin.approx.f32 F, 0f00000000;", 0),
    ("cos.approx.f32 F, 0f00000000;", f32(1)),
    ("tanh.approx.f32 F, 0f00000000;", 0),
    ("neg.f32 F, x;", f32(-1.5)),
    ("abs.f32 F, y;", f32(2.25)),
    ("copysign.f32 F, y, x;", f32(-1.5)),
    ("min.f32 F, x, y;", f32(-2.25)),
    ("max.NaN.f32 F, x, 0f7FFFFFFF;", 0x7FFFFFFF),
    ("max.f32 F, x, 0f7FFFFFFF;", f32(1.5)),
    ("min.xorsign.abs.f32 F, x, y;", f32(-1.5)),
    ("max.f32 F, x, y, 0f40A00000;", f32(5)),
    ("add.f64 D, X, Y;", f64(-0.75)),
    ("fma.rn.f64 D, X, Y, X;", f64(-1.875)),
    ("div.rn.f64 D, Y, X;", f64(-1.5)),
    ("sqrt.rn.f64 D, 0d4010000000000000;", f64(2)),
    ("min.f64 D, X, Y;", f64(-2.25)),
    ("neg.f64 D, Y;", f64(2.25)),
    ("add.f16 S, h, g;", half(-0.75)),
    ("fma.rn.f16 S, h, g, h;", half(-1.875)),
    ("neg.f16 S, h;", half(-1.5)),
    ("max.f16 S, h, g;", half(1.5)),
    ("add.f16x2 R, H, H;", half(3) | half(-4.5) << 16),
    ("fma.rn.f16x2 R, H, H, H;", half(3.75) | half(2.8125) << 16),
    ("neg.f16x2 R, H;", half(-1.5) | half(2.25) << 16),
    ("abs.f16x2 R, H;", half(1.5) | half(2.25) << 16),
    ("max.f16x2 R, H, 0;", half(1.5)),
    ("mul.rn.bf16x2 R, 0x40003F80, 0x40404040;", 0x40C04040),
    ("fma.rn.bf16 S, 0x3F80, 0x4000, 0x3F80;", 0x4040),
    ("add.s16 S, 0x7fff, 1;", 0x8000),
    ("mul.lo.s16 S, 300, 300;", 90000 & 0xFFFF),
    ("mul.wide.s16 R, 300, -300;", -90000),
    ("min.s16x2 R, 0x0001ffff, 0;", 0xFFFF),
    ("shl.b16 S, 1, 15;", 0x8000),
    ("shr.s16 S, 0x8000, 15;", 0xFFFF),
    ("cvt.rn.f32.s32 F, b;", f32(-7)),
    ("cvt.rzi.s32.f32 R, y;", -2),
    ("cvt.rni.s32.f32 R, y;", -2),
    ("cvt.rmi.f32.f32 F, y;", f32(-3)),
    ("cvt.sat.f32.f32 F, y;", 0),
    ("cvt.rn.f16.f32 S, x;", half(1.5)),
    ("cvt.f32.f16 F, g;", f32(-2.25)),
    ("cvt.rn.bf16.f32 S, x;", 0x3FC0),
    ("cvt.f32.bf16 F, 0x3FC0;", f32(1.5)),
    ("cvt.f64.f32 D, x;", f64(1.5)),
    ("cvt.rn.f32.f64 F, Y;", f32(-2.25)),
    ("cvt.u16.u32 S, c;", 0x1234),
    ("cvt.s64.s32 Q, b;", -7),
    ("cvt.u64.u32 Q, b;", 2**32 - 7),
    ("cvt.u32.u64 R, w;", 5),
    ("cvt.s32.s8 R, 0x80;", -128),
    ("cvt.u32.u8 R, c;", 0x34),
    ("cvt.sat.u8.s32 R, 300;", 255),
    ("cvt.rn.bf16x2.f32 R, y, x;", 0xC0103FC0),
    ("cvt.rn.f16x2.f32 R, y, x;", half(1.5) | half(-2.25) << 16),
    ("cvt.rn.satfinite.e4m3x2.f32 S, y, x;", 0xC13C),
    ("cvt.rn.satfinite.e5m2x2.f32 S, y, x;", 0xC03E),
    ("cvt.rn.f16x2.e4m3x2 R, 0x3CC0;", half(-2) | half(1.5) << 16),
    ("cvt.rna.tf32.f32 F, x;", f32(1.5)),
    ("cvt.rz.satfinite.ue8m0x2.f32 S, x, x;", 0x7F7F),
    ("cvt.rn.satfinite.e2m1x2.f32 B, y, x; cvt.u32.u8 R, B;", 0xC3),
    ("fma.rn.f32x2 Q, P, P, P;", f32(3.75) | f32(2.8125) << 32),
    ("add.f32x2 Q, P, P;", f32(3) | f32(-4.5) << 32),
    ("mul.rn.f32x2 Q, P, P;", f32(2.25) | f32(5.0625) << 32),
    ("sub.rz.f32x2 Q, P, P;", 0),
    ("fma.rm.ftz.f32x2 Q, P, P, P;", f32(3.75) | f32(2.8125) << 32),
    ("cvt.u8.u16 B, 0xC3; cvt.rn.f16x2.e2m1x2 R, B;", half(1.5) | half(-2) << 16),
    ("cvt.rn.bf16x2.ue8m0x2 R, 0x7F80;", 0x3F804000),
    ("setp.lt.s32 t, b, a; selp.u32 R, 1, 0, t;", 1),
    ("setp.ltu.f32 t, x, 0f7FFFFFFF; selp.u32 R, 1, 0, t;", 1),
    ("setp.neu.f32 t, x, x; selp.u32 R, 1, 0, t;", 0),
    ("setp.nan.f32 t, x, 0f7FFFFFFF; selp.u32 R, 1, 0, t;", 1),
    ("setp.hi.u32 t, b, a; selp.u32 R, 1, 0, t;", 1),
    ("setp.eq.and.u32 t|u, a, 100, q; selp.u32 R, 1, 0, u;", 0),
    ("setp.ne.or.u32 t|u, a, 100, p; selp.u32 R, 1, 0, t;", 1),
    ("setp.gt.f16x2 t|u, H, 0; selp.u32 R, 1, 0, t; @u mov.u32 R, 9;", 1),
    ("and.pred t, p, q; or.pred t, t, p; xor.pred t, t, q; not.pred t, t; selp.u32 R, 1, 0, t;", 0),
    ("testp.infinite.f32 t, 0f7F800000; selp.u32 R, 1, 0, t;", 1),
    ("mov.pred t, p; selp.u32 R, 1, 0, t;", 1),
    ("isspacep.global t, Q; selp.u32 R, 1, 0, t;", 1),
    ("mov.u32 R, %nwarpid;", 2),
    ("mov.u32 R, %lanemask_lt;", 0),
    ("mov.u32 R, %laneid; add.u32 R, R, %ntid.x;", 64),
    ("mov.u32 R, %nctaid.y;", 1),
    ("mov.u64 Q, %clock64; mov.u64 Q, 1;", 1),
    ("membar.gl; fence.acq_rel.gpu; fence.sc.cta; nanosleep.u32 20;", 0),
    ("griddepcontrol.wait; griddepcontrol.launch_dependents;", 0),
    ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { F,_,_,_}, {H,H,H,H}, {H,H}, {x,x,x,x};", f32(60)),
    ("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.u8.s32 {R,_,_,_}, {a,a,a,a}, {a,a}, {a,a,a,a};", 80100),
    ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 { D,_}, {X}, {Y}, {X,X};", f64(-12)),
    ("movmatrix.sync.aligned.m8n8.trans.b16 R, H;", half(1.5) * 0x10001),
    ("{ .shared .align 16 .b8 m[16]; stmatrix.sync.aligned.m8n8.x1.shared.b16 [m], {c}; "
     "ldmatrix.sync.aligned.x1.m8n8.trans.shared.b16 {R}, [m]; }", 0x12341234),
    ("elect.sync _|t, -1; selp.u32 R, 1, 0, t;", 1),
    ("elect.sync R|t, -1; add.u32 R, R, 4;", 4),
    ("activemask.b32 R;", -1),
    ("vote.ballot.sync.b32 R, p, -1;", -1),
    ("vote.sync.uni.pred t, q, -1; selp.u32 R, 1, 0, t;", 1),
    ("redux.sync.max.NaN.abs.f32 F, y, -1;", f32(2.25)),
    ("redux.sync.min.f32 F, y, -1;", f32(-2.25)),
    ("redux.sync.min.abs.f32 F, y, -1;", f32(2.25)),
    ("redux.sync.and.b32 R, c, -1;", 0x80001234),
    ("match.all.sync.b64 R|t, w, -1;", -1),
    ("barrier.sync 3, 64; bar.warp.sync -1; barrier.cta.sync.aligned.all 1;", None),
    ("bar.red.popc.u32 R, 0, p;", 64),
    ("bar.red.and.pred t, 2, 64, q; selp.u32 R, 1, 0, t;", 0),
    ("prefetch.global.L2 [out]; createpolicy.fractional.L2::evict_first.b64 Q, 1.0; mov.u64 Q, 0;", 0),
    ("st.shared.u16 [s+2], c; ld.shared.s16 R, [s+2];", 0x1234),
    ("st.local.v2.u32 [l+8], {a, b}; ld.local.u32 R, [l+12];", -7),
    ("mov.u32 R, s; sub.u32 R, R, 1020;", 4),
    ("st.shared.b32 [s], {a}; ld.shared.b32 {R}, [s];", 100),
    ("st.shared.v2.b32 [s], {a, c}; ld.shared.v4.b32 {_, R, _, _}, [s];", 0x80001234),
    ("st.shared.u32 [s], 5; atom.relaxed.sys.shared.add.u32 R, [s], 1;", 5),
    ("cvta.shared.u64 Q, SA; st.u32 [Q], a; ld.shared.u32 R, [s]; mov.u64 Q, 0;", 100),
    ("st.shared.u32 [s], 5; atom.shared.inc.u32 R, [s], 1000; atom.shared.exch.b32 R, [s], 2; mov.u32 R, 3;", 3),
    ("st.volatile.shared.b8 [s], 200; ld.volatile.shared.s8 R, [s];", -56),
    ("add.u32 R, a, b; @!p add.u32 R, R, 1; @q ld.global.u32 R, [out];", 93),
    ("mapa.shared::cluster.u32 R, s, 0; sub.u32 R, R, 1020;", 4),
    ("mapa.shared::cluster.u32 R, s+4, a; and.b32 R, R, 0xff000fff;", (100 << 24) + 0x404),
    ("mapa.u64 Q, SA, 5; shr.b64 Q, Q, 24;", 5),
    ("getctarank.shared::cluster.u32 R, 0x3000400;", 3),
    ("mapa.u64 o, SA, 6; getctarank.u64 R, o;", 6),
    ("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 R, %cluster_nctarank;", 1),
    ("barrier.cluster.arrive.relaxed; barrier.cluster.wait; mov.u32 R, %cluster_ctarank;", 0),
    ("mov.pred t, %is_explicit_cluster; selp.u32 R, 1, 0, t;", 0),
    ("cvta.shared.u64 o, SA; isspacep.shared::cluster t, o; selp.u32 R, 1, 0, t;", 1),
    ("st.shared::cluster.u32 [s], 5; ld.shared::cluster.u32 R, [s];", 5),
    ("st.shared.u32 [s], 5; atom.relaxed.cluster.shared::cluster.add.u32 R, [s], 1;", 5),
    (ALONE + "@t st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [s], 77, [s+8];" + WAITED, 77),
    (
        ALONE + "@t st.shared.u32 [s], 70; @t red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes"
        ".add.u32 [s], 7, [s+8];" + WAITED,
        77,
    ),
    (TMEM + "@q tcgen05.st.sync.aligned.32x32b.x1.unpack::16b.b32 [i], {c}; @q tcgen05.wait::st.sync.aligned; "
     "@q tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {R}, [i];" + FREED, 0x80001234),
    (TMEM + "@q tcgen05.st.sync.aligned.16x64b.x1.unpack::16b.b32 [i], {c}; @q tcgen05.wait::st.sync.aligned; "
     "@q tcgen05.ld.sync.aligned.32x32b.x1.b32 {R}, [i+1]; and.b32 R, R, 0xffff;" + FREED, 0x8000),
    (TMEM + "@t tcgen05.cp.cta_group::1.32x128b.warpx4 [i], o;" + COPIED
     + "@q tcgen05.ld.sync.aligned.32x32b.x1.b32 {R}, [i+3];" + FREED, 0x12341234),
    (TMEM + "@t tcgen05.cp.cta_group::1.4x256b [i], o;" + COPIED
     + "@q tcgen05.ld.sync.aligned.32x32b.x1.b32 {R}, [i+7];" + FREED, 0x12341234),
    (TMEM + "@t tcgen05.cp.cta_group::1.4x256b.b8x16.b4x16_p64 [i], o;" + COPIED
     + "@q tcgen05.ld.sync.aligned.32x32b.x1.b32 {R}, [i];" + FREED, 0x04080C10),
    (TMEM + "@t tcgen05.cp.cta_group::1.warpx2::01_23.64x128b.b8x16.b6x16_p32 [i], o;" + COPIED
     + "@q tcgen05.ld.sync.aligned.32x32b.x1.b32 {R}, [i];" + FREED, 0x0D010834),
    # Asynchronous copies and mbarriers: every thread executes the line.
    ("mbarrier.init.shared.b64 [s], 64; bar.sync 0; mbarrier.arrive.shared.b64 Q, [s];"
     "mbarrier.test_wait.shared::cta.b64 t, [s], Q; selp.u32 R, 1, 0, t;", 1),
    ("cvta.shared.u64 Q, SA; mbarrier.init.b64 [Q], 65; bar.sync 0; mbarrier.arrive.release.cta.b64 _, [Q];"
     "mbarrier.test_wait.parity.acquire.cta.b64 t, [Q], 0; selp.u32 R, 1, 0, t;", 0),
    ("mbarrier.init.shared.b64 [s], 100; bar.sync 0; mbarrier.arrive.noComplete.shared.b64 Q, [s], 1;"
     "mbarrier.pending_count.b64 R, Q;", 100),
    ("mbarrier.init.shared.b64 [s], 65; bar.sync 0; mbarrier.arrive_drop.noComplete.shared.b64 Q, [s], 1;"
     "mbarrier.pending_count.b64 R, Q;", 65),
    ("mbarrier.init.shared.b64 [s], 64; bar.sync 0; mbarrier.expect_tx.relaxed.cta.shared.b64 [s], 16;"
     "mbarrier.complete_tx.relaxed.cta.shared.b64 [s], 16; mbarrier.arrive.expect_tx.shared.b64 _, [s], 32;"
     "mbarrier.complete_tx.shared.b64 [s], 32; mbarrier.try_wait.parity.shared.b64 t, [s], 0, 100;"
     "selp.u32 R, 1, 0, t;", 1),
    ("mbarrier.init.shared.b64 [s], 1; bar.sync 0; mbarrier.inval.shared.b64 [s]; bar.sync 0;"
     "st.shared.u32 [s], 5; ld.shared.u32 R, [s];", 5),
    ("cp.async.ca.shared.global [s], [out], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;"
     "ld.shared.u32 R, [s]; add.u32 R, R, 7;", 7),
    ("cp.async.cg.shared.global.L2::128B [s], [out], 16, 0; cp.async.wait_all; bar.sync 0;"
     "ld.shared.u32 R, [s+12]; add.u32 R, R, 8;", 8),
    ("mbarrier.init.shared.b64 [s], 64; bar.sync 0; cp.async.mbarrier.arrive.noinc.shared.b64 [s];"
     "mbarrier.try_wait.parity.shared.b64 t, [s], 0; selp.u32 R, 1, 0, t;", 1),
    ("cp.async.bulk.prefetch.L2.global [out], 16; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"
     "cp.async.bulk.wait_group.read 1; mov.u32 R, a;", 100),
    ("fence.proxy.async; fence.proxy.async.global; fence.proxy.async.shared::cta; fence.proxy.alias;"
     "fence.mbarrier_init.release.cluster; fence.proxy.tensormap::generic.release.gpu;"
     "fence.proxy.tensormap::generic.acquire.gpu [out], 128; fence.acq_rel.cluster; mov.u32 R, a;", 100),
    ("setmaxnreg.inc.sync.aligned.u32 64; griddepcontrol.wait; nanosleep.u32 20; mov.u32 R, a;", 100),
    # Tensor memory, by the first warp; launch control, of which nothing is left to cancel.
    ("{ .shared .align 16 .b8 m[16]; mov.u32 i, %tid.x; setp.lt.u32 t, i, 32;"
     "@t tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [m], 64;"
     "@t tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; bar.sync 0; ld.shared.u32 R, [m];"
     "@t tcgen05.dealloc.cta_group::1.sync.aligned.b32 R, 64; }", 448),
    (
        ALONE + "@t mbarrier.complete_tx.shared.b64 [s+8], 4;"
        "@t tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [s+8];"
        "@t mbarrier.try_wait.parity.shared::cta.b64 u, [s+8], 1; mov.u32 R, a;",
        100,
    ),
    ("{ .shared .align 16 .b8 m[32]; .reg .b128 r; mov.u32 i, %tid.x; setp.eq.u32 t, i, 0; mov.pred u, p;"
     "@t mbarrier.init.shared::cta.b64 [m+16], 1; @t mbarrier.arrive.expect_tx.shared::cta.b64 _, [m+16], 16;"
     "@t clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [m], [m+16];"
     "@t mbarrier.try_wait.parity.shared::cta.b64 u, [m+16], 0; @t ld.shared.b128 r, [m];"
     "@t clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 u, r; selp.u32 R, 3, 5, u; }", 5),
    ("mov.u64 Q, %globaltimer; mov.u64 w, %globaltimer; setp.gt.u64 t, w, Q; selp.u32 R, 1, 0, t;", 1),
    ("mov.u32 R, %clock; mov.u32 H, %clock; sub.u32 R, H, R; setp.gt.s32 t, R, 0; selp.u32 R, 1, 0, t;", 1),
]

PROLOGUE = """
    .reg .pred p, q, t, u; .reg .b16 h, g, S; .reg .b8 B; .reg .b32 a, b, c, H, R, i; .reg .f32 x, y, F;
    .reg .b64 w, v, Q, P, out, o, SA; .reg .f64 X, Y, D;
    .shared .align 16 .b8 s[16]; .local .align 8 .b8 l[16];
    mov.u32 a, 100; mov.s32 b, -7; mov.b32 c, 0x80001234; mov.f32 x, 0f3FC00000; mov.f32 y, 0fC0100000;
    mov.u64 w, 0x10000000005; mov.s64 v, -3; mov.f64 X, 0d3FF8000000000000; mov.f64 Y, 0dC002000000000000;
    mov.b16 h, 0x3E00; mov.b16 g, 0xC080; mov.b32 H, {h, g}; mov.b64 P, {x, y};
    setp.eq.u32 p, a, 100; setp.eq.u32 q, a, 101; mov.u64 SA, s;
    mov.u32 R, 0; mov.f32 F, 0f00000000; mov.u64 Q, 0; mov.f64 D, 0d0000000000000000; mov.b16 S, 0;
    ld.param.u64 out, [dst];
    add.u64 Q, Q, 0;
"""


def text_of(line):
    return f"""{HEAD}
    .entry f(.param .u64 dst) {{ {PROLOGUE}
    {line}
    mov.u32 i, %tid.x;
    setp.ne.u32 t, i, 0;
    @t exit;
    st.global.u32 [out], R; st.global.f32 [out+4], F; st.global.u64 [out+8], Q; st.global.f64 [out+16], D;
    st.global.u16 [out+24], S;
    ret; }}"""


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_instruction(line, expected):
    if expected is None:
        with pytest.raises(Exception, match=r"modifier \.all of barrier"):
            run_ptx(text_of(line), "f", 1, 64, np.zeros(32, np.uint8))
        return
    out = np.zeros(4, np.uint64)
    run_ptx(text_of(line), "f", 1, 64, out)
    written = set(re.findall(r" ([RFQDS])[,|]", line)) or {"R"}
    register = next(each for each in "RFQDS" if each in written)
    dtype, index = {"R": ("u4", 0), "F": ("u4", 1), "Q": ("u8", 1), "D": ("u8", 2), "S": ("u2", 12)}[register]
    got = int(out.view(dtype)[index])
    want = expected & (1 << 8 * np.dtype(dtype).itemsize) - 1
    assert got == want, f"{register} is {got:#x}, not {want:#x}"


def test_shared_address_faults_name_the_instruction():
    with pytest.raises(KernelFault, match=r"PTX line 17: ld\.shared\.u32 R, \[s\+64\];"):
        run_ptx(text_of("ld.shared.u32 R, [s+64];"), "f", 1, 32, np.zeros(4, np.uint64))
