# ruff: noqa: E501  (an expression is a row of a table)
"""CUDA's intrinsic functions: every one compiles to instructions that run here.

That they also give a GPU's bits is what tests/conformance/launches.py compares; those that may differ, since they use
approximate instructions, are in test_math.py or among the conformance forms.
"""

import numpy as np
import pytest
from foreign import cuda_include
from programs import PRELUDE, nvrtc_ptx, run_ptx

# a, b, c: u32; i, j: int; x, y, z: float; d, e: double; u, v: u64; n, m: i64; t: the thread. S(type) is this thread's
# place in shared memory, G(type) in global memory; out is a scratch of each type: I, F, D, P.
BUILT_IN = """
__vabsdiffu4(a,b) __vabsdiffs4(a,b) __vadd4(a,b) __vaddss4(a,b) __vaddus2(a,b) __vavgs4(a,b) __vavgu4(a,b) __vhaddu4(a,b)
__vcmpeq4(a,b) __vcmpgts2(a,b) __vcmpleu4(a,b) __vmaxs4(a,b) __vmaxu2(a,b) __vmins2(a,b) __vneg4(a) __vnegss2(a) __vsads4(a,b)
__vsadu4(a,b) __vseteq4(a,b) __vsetltu2(a,b) __vsub4(a,b) __vsubus4(a,b) __vabs4(a) __vabsss2(a) __vimax3_s32(i,j,i) __vibmax_s32(i,j,&P)
__vimax_s16x2_relu(a,b) __viaddmax_s32(i,j,i) __viaddmax_s16x2(a,b,c) __viaddmin_u32_(a,b,c) __vimin3_u16x2(a,b,c) __vibmin_u16x2(a,b,&P,&Q)
__dp4a(a,b,c) __dp4a(i,j,i) __dp2a_lo(i,j,i) __dp2a_hi(a,b,c) __byte_perm(a,b,c) __funnelshift_l(a,b,c) __funnelshift_lc(a,b,c)
__funnelshift_r(a,b,c) __funnelshift_rc(a,b,c) __brev(a) __brevll(u) __clz(a) __clzll(u) __ffs(a) __ffsll(u) __popc(a) __popcll(u)
__hadd(i,j) __rhadd(i,j) __uhadd(a,b) __urhadd(a,b) __mul24(i,j) __umul24(a,b) __mulhi(i,j) __umulhi(a,b) __mul64hi(n,m)
__umul64hi(u,v) __sad(i,j,a) __usad(a,b,c) __fns(a,b&31,1) __fns(a,b&31,-2) u/(v|1) u%(v|1) n/(m|1) n%(m|1) a/(b|1) a%(b|1) i/(j|1) i%(j|1) u/10 n/7 i/3
a%1000 u*v n>>(b&63) u<<(b&63) i>>(b&31) n<m u>v min(i,j) max(a,b) min(u,v) max(n,m) abs(i) llabs(n)
__fadd_rd(x,y) __fadd_ru(x,y) __fsub_rz(x,y) __fmul_ru(x,y) __fmaf_rn(x,y,z) __fmaf_ru(x,y,z) __fmaf_rd(x,y,z) __fmaf_rz(x,y,z)
__fmaf_ieee_rn(x,y,z) __fdiv_rn(x,y) __fdiv_rd(x,y) __fdiv_ru(x,y) __frcp_rn(x) __frcp_rz(x) __fsqrt_rn(x) __fsqrt_rd(x)
__frsqrt_rn(x) __saturatef(x) x/y sqrtf(x) rintf(x) roundf(x) truncf(x) floorf(x) ceilf(x) nearbyintf(x) fminf(x,y) fmaxf(x,y)
fabsf(x) copysignf(x,y) nextafterf(x,y) ldexpf(x,i&31) scalbnf(x,-(i&63)) frexpf(x,&I) ilogbf(x) logbf(x) modff(x,&F) fdimf(x,y)
isnan(x) isinf(x) isfinite(x) signbit(x) lrintf(x) llroundf(x) lroundf(x)
__dadd_rd(d,e) __dsub_rz(d,e) __dmul_ru(d,e) __fma_rd(d,e,d) __fma_ru(d,e,e) __fma_rz(d,e,d) __ddiv_rn(d,e) __ddiv_rz(d,e)
__drcp_rn(d) __drcp_ru(d) __dsqrt_rn(d) __dsqrt_rd(d) d/e sqrt(d) rint(d) round(d) trunc(d) floor(d) ceil(d) fmin(d,e) fmax(d,e)
copysign(d,e) nextafter(d,e) ldexp(d,i&63) frexp(d,&I) ilogb(d) logb(d) modf(d,&D) fdim(d,e) signbit(d) llrint(d) llround(d)
__float2int_rn(x) __float2int_ru(x) __float2uint_rd(x) __float2uint_rz(x) __float2ll_rn(x) __float2ull_ru(x) __int2float_rz(i) __uint2float_rd(a)
__ll2float_ru(n) __ull2float_rn(u) __double2int_rn(d) __double2uint_rz(d) __double2ll_rd(d) __double2ull_rz(d) __double2float_ru(d) __double2float_rz(d)
__int2double_rn(i) __uint2double_rn(a) __ll2double_rd(n) __ull2double_ru(u) __double2hiint(d) __double2loint(d) __hiloint2double(i,j)
__float_as_int(x) __int_as_float(i) __double_as_longlong(d) __longlong_as_double(n) __float_as_uint(x) (signed_char)i (short)x (u8)d (char)n (u16)a
__shfl_sync(~0u,d,t^3) __shfl_xor_sync(~0u,u,9) __shfl_up_sync(~0u,x,5) __shfl_down_sync(~0u,n,3,8) __match_any_sync(~0u,u&3) __match_all_sync(~0u,a&1,&I)
__match_any_sync(~0u,d>0) __reduce_add_sync(~0u,a) __reduce_min_sync(~0u,i) __reduce_max_sync(~0u,a) __reduce_xor_sync(~0u,a)
__reduce_and_sync(~0u,a) __reduce_or_sync(~0u,b) __activemask() __any_sync(~0u,a&1) __all_sync(~0u,a|1) __uni_sync(~0u,t&32) __ballot_sync(~0u,a&1)
__syncthreads_count(a&1) __syncthreads_and(a) __syncthreads_or(b&64) (__syncwarp(),1) (__threadfence(),2) (__threadfence_block(),__threadfence_system(),3) (__nanosleep(20),4)
atomicAdd(S(u32),a) atomicSub(S(int),i) atomicExch(S(u32),a) atomicMin(S(int),i) atomicMax(S(u32),b) atomicInc(S(u32),a) atomicDec(S(u32),b)
atomicCAS(S(u32),c,b) atomicAnd(S(u32),b) atomicOr(S(u64),v) atomicXor_block(S(u32),a) atomicAdd(S(float),x) atomicAdd(S(double),d) atomicCAS(S(u16),(u16)c,(u16)b)
atomicAdd_system(G(u32),a) atomicAdd(G(float),x) atomicAdd(G(double),d) atomicMax(G(u64),v) atomicMin(G(i64),n) atomicCAS(G(u64),u,v) atomicExch(G(float),x) atomicAnd_system(G(u64),u)
atomicAdd(G(u64),v) atomicAdd_block(G(int),i) atomicInc(G(u32),5u)
__ldg(G(u32)) __ldg(G(double)) __ldcg(G(u64)) __ldcs(G(float)) __ldlu(G(int)) __ldcv(G(u32)) __ldca(G(i64)) (__stwt(G(u32),a),*G(u32)) (__stcs(G(float),x),*G(float)) (__stcg(G(u64),u),*G(u64)) (__stwb(G(double),d),*G(double))
__isGlobal(G(u32)) __isShared(S(u32)) __isLocal(&I) __isShared(G(u32)) (u32)__cvta_generic_to_shared(S(u32))-(u32)__cvta_generic_to_shared(S0) __builtin_assume_aligned_(a)
"""
WITH_HEADERS = """
__hadd(h,k) __hsub(h,k) __hmul(h,k) __hfma(h,k,h) __hadd_sat(h,k) __hfma_sat(h,k,h) __hfma_relu(h,k,h) __hdiv(h,k) __hneg(h) __habs(h) __hmax(h,k) __hmin_nan(h,k)
hrint(h) hfloor(h) htrunc(h) hsqrt(h) __heq(h,k) __hltu(h,k) __hisnan(h) __hadd2(H,K) __hmul2_sat(H,K) __hfma2_relu(H,K,H) __hcmadd(H,K,H) __h2div(H,K) __hmax2_nan(H,K) __hbequ2(H,K) __heq2_mask(H,K)
__half2int_ru(h) __half2uint_rz(h) __half2ll_rn(h) __int2half_rd(i) __ull2half_rn(u) __ll2half_rz(n) __double2half(d) __float2half_ru(x) __half2short_rd(h) __ushort_as_half((u16)a) __halves2half2(h,k) __low2half(H) __shfl_down_sync(~0u,h,1)
__shfl_xor_sync(~0u,H,4) atomicAdd(G(__half2),H)
__hadd(f,g) __hsub(f,g) __hmul(f,g) __hfma(f,g,f) __hfma_relu(f,g,f) __hmax(f,g) __hmin_nan(f,g) hrint(f) hfloor(f) __hgt(f,g) __hneu(f,g) __hadd2(B,C) __hfma2(B,C,B) __hmin2(B,C) __hmax2_nan(B,C) __hne2_mask(B,C)
__bfloat162int_rz(f) __bfloat162ull_ru(f) __int2bfloat16_ru(i) __ull2bfloat16_rz(u) __double2bfloat16(d) __float2bfloat16_rd(x) __floats2bfloat162_rn(x,y) atomicAdd(G(__nv_bfloat162),B) __shfl_up_sync(~0u,f,2)
__nv_cvt_float_to_fp8(x,__NV_SATFINITE,__NV_E4M3) __nv_cvt_float2_to_fp8x2(make_float2(x,y),__NV_NOSAT,__NV_E5M2) __nv_cvt_double_to_fp8(d,__NV_SATFINITE,__NV_E4M3) __nv_cvt_halfraw_to_fp8(h,__NV_SATFINITE,__NV_E5M2)
__nv_cvt_bfloat16raw_to_fp6(f,__NV_E2M3,cudaRoundNearest) __nv_cvt_float_to_fp6(x,__NV_E3M2,cudaRoundNearest) __nv_cvt_double2_to_fp4x2(make_double2(d,e),__NV_E2M1,cudaRoundNearest) __nv_cvt_float2_to_fp4x2(make_float2(x,y),__NV_E2M1,cudaRoundNearest)
__nv_cvt_bfloat16raw_to_e8m0(f,__NV_SATFINITE,cudaRoundPosInf) __nv_cvt_float_to_e8m0(x,__NV_SATFINITE,cudaRoundZero) (float)__nv_fp8_e4m3(x) (float)__nv_fp8_e5m2(h) (float)__nv_fp8_e8m0(x) (float)__nv_fp6_e2m3(x) (float)__nv_fp6_e3m2(f) (float)__nv_fp4_e2m1(x)
__nv_cvt_fp8_to_halfraw((u8)a,__NV_E4M3) __nv_cvt_fp8x2_to_halfraw2((u16)a,__NV_E5M2) __nv_cvt_fp6_to_halfraw((u8)(a&63),__NV_E3M2) __nv_cvt_fp4x2_to_halfraw2((u8)a,__NV_E2M1) __nv_cvt_e8m0_to_bf16raw((u8)a)
"""
HEADERS = "".join(f"#include <cuda_{name}.h>\n" for name in ("fp16", "bf16", "fp8", "fp6", "fp4"))
HALVES = """__half h = __float2half(x), k = __float2half(y); __half2 H(h, k), K(k, h);
    __nv_bfloat16 f = __float2bfloat16(x), g = __float2bfloat16(y); __nv_bfloat162 B(f, g), C(g, f);"""
FIXED = {"__viaddmin_u32_(a,b,c)": "__viaddmin_u32(a,b,c)", "(signed_char)i": "(signed char)i",
         "__builtin_assume_aligned_(a)": "__builtin_expect(a, 1)"}  # fmt: skip
COMMON = """
template <class T> __device__ void put(u64* at, T value) {             // the bits of a result, zero extended
    u64 bits = 0;
    for (int i = 0; i < (int)sizeof(T); ++i) bits |= (u64)((const u8*)&value)[i] << 8 * i;
    *at = bits;
}
#define S(T) ((T*)(shared + threadIdx.x))
#define G(T) ((T*)(scratch + threadIdx.x))
#define S0 shared
"""
LISTS = {"built in": BUILT_IN.split()}
if cuda_include():
    LISTS["headers"] = WITH_HEADERS.split()
# Narrow formats are other instructions on sm_100a; the rest are the same.
CASES = [(group, i, "sm_90a") for group, listed in LISTS.items() for i in range(len(listed))]
NARROW = [(group, i) for group, i, _ in CASES if "__nv_" in LISTS[group][i] and "bfloat162" not in LISTS[group][i]]
CASES += [(group, i, "sm_100a") for group, i in NARROW]
COMPILED = {}
PER_MODULE = 30  # reading a module's text costs more than running one of its kernels


def module(group, arch, first):
    """Expressions of a group from the `first` on, as kernels k0_, k1_, ... of one module."""
    if (group, arch, first) not in COMPILED:
        text, options = PRELUDE + COMMON, [f"--gpu-architecture={arch}", "--std=c++17"]
        if group == "headers":
            text = HEADERS + text
            options += [f"-I{cuda_include()}", f"-I{cuda_include()}/cccl"]
        for at, expression in enumerate(LISTS[group][first : first + PER_MODULE], first):
            text += f"""
extern "C" __global__ void k{at}_(const u32* as, const float* xs, const double* ds, const u64* us, u64* scratch, u64* out) {{
    __shared__ u64 shared[64];
    const int t = threadIdx.x;
    const u32 a = as[t], b = as[t + 64], c = as[t + 128]; const int i = a, j = b; const float x = xs[t], y = xs[t + 64], z = xs[t + 128];
    const double d = ds[t], e = ds[t + 64]; const u64 u = us[t], v = us[t + 64]; const i64 n = u, m = v;
    int I = 0; float F = 0; double D = 0; bool P = false, Q = false;
    {HALVES if group == "headers" else ""}
    shared[t] = us[t + 128];
    put(out + t, {FIXED.get(expression, expression)});
    put(out + 64 + t, I); put(out + 128 + t, F); put(out + 192 + t, D); out[256 + t] = P + 2 * Q; out[320 + t] = shared[t];
}}"""
        COMPILED[group, arch, first] = nvrtc_ptx(text, "intrinsics.cu", options)
    return COMPILED[group, arch, first]


def run(group, at, arch, rng):
    """What the kernel of an expression leaves in `out`, for random operands."""
    a = (rng.integers(0, 1 << 32, 192, np.uint64) >> rng.integers(0, 32, 192).astype(np.uint64)).astype(np.uint32)
    x = (rng.standard_normal(192) * np.exp(rng.uniform(-9, 9, 192))).astype(np.float32)
    d = rng.standard_normal(128) * np.exp(rng.uniform(-20, 20, 128))
    x[:7] = d[:7] = [np.inf, -np.inf, np.nan, 0, -0.0, 1e-40, -1e30]
    x[66:73] = d[66:73] = x[:7]
    u = rng.integers(0, 1 << 63, 192, np.uint64) >> rng.integers(0, 63, 192).astype(np.uint64)
    scratch = np.concatenate([x, x]).view(np.uint64)[:64].copy()
    out = np.full((6, 64), 0xA5A5A5A5A5A5A5A5, np.uint64)
    run_ptx(module(group, arch, at - at % PER_MODULE), f"k{at}_", 1, 64, a, x, d, u, scratch, out, arch=arch)
    return out


@pytest.mark.parametrize(("group", "at", "arch"), CASES, ids=[f"{LISTS[group][at]}-{arch}" for group, at, arch in CASES])
def test_intrinsic(group, at, arch, rng):
    assert (run(group, at, arch, rng)[0] != 0xA5A5A5A5A5A5A5A5).all()


@pytest.mark.parametrize(("group", "at"), NARROW, ids=[LISTS[group][at] for group, at in NARROW])
def test_narrow_formats_by_instruction_and_by_software(group, at):
    """sm_90a has no instruction for fp6, fp4 and ue8m0: there CUDA's headers compute them, which an H200 has judged."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    software, hardware = (run(group, at, arch, np.random.default_rng(seed)) for arch in ("sm_90a", "sm_100a"))
    np.testing.assert_array_equal(software, hardware)
