"""Arithmetic of PTX on raw bits, vectorised over lanes: one import for the code generator.

Values are one-dimensional unsigned arrays of the type's width, predicates bool arrays; immediates may be one-element
arrays or NumPy scalars of the same dtype, as long as one operand is an array. Results are new arrays. The first
argument is the PTX type without its dot. Unknown types, roundings and comparisons raise UnsupportedInstruction.

Callers wrap a whole run in `np.errstate(all="ignore")`: overflow, NaN and division by zero are ordinary here, and
silencing NumPy in every function would cost more than an addition.

    alu_int       integers, bits, shifts, fields, carry chains
    alu_float     add sub mul fma div rcp sqrt, neg abs copysign, testp (alu_f64: the float64 side of them)
    alu_approx    ex2 lg2 rcp sqrt rsqrt sin cos tanh, div.approx, div.full
    alu_compare   compare, minimum, maximum, set
    alu_packed    the same on f16x2, bf16x2, f32x2
    cvt, narrow   conversions, number formats
"""

from dsv4_rt.emulator.alu_approx import (
    cos_approx,
    div_approx,
    div_full,
    ex2_approx,
    lg2_approx,
    rcp_approx,
    rsqrt_approx,
    sin_approx,
    sqrt_approx,
    tanh_approx,
)
from dsv4_rt.emulator.alu_compare import compare, maximum, maximum3, minimum, minimum3, set_value
from dsv4_rt.emulator.alu_float import abs_, add, copysign, div, flush, fma, mul, neg, rcp, sqrt, sub, testp
from dsv4_rt.emulator.alu_int import (
    bfe,
    bfi,
    bfind,
    bmsk,
    brev,
    clz,
    cnot,
    dp2a,
    dp4a,
    fns,
    int_abs,
    int_add,
    int_add_cc,
    int_div,
    int_mad24_hi,
    int_mad24_lo,
    int_mad_cc,
    int_mad_hi,
    int_mad_lo,
    int_mad_wide,
    int_max,
    int_min,
    int_mul24_hi,
    int_mul24_lo,
    int_mul_hi,
    int_mul_lo,
    int_mul_wide,
    int_neg,
    int_rem,
    int_sub,
    int_sub_cc,
    lop3,
    popc,
    prmt,
    resize,
    sad,
    shf_l,
    shf_r,
    shl,
    shr,
    szext,
    vabsdiff4,
)
from dsv4_rt.emulator.alu_packed import (
    abs2,
    add2,
    ex2_approx2,
    fma2,
    max2,
    min2,
    mul2,
    neg2,
    packed,
    sub2,
    tanh_approx2,
)
from dsv4_rt.emulator.cvt import cvt, cvt_pack, cvt_packed, cvt_unpack

__all__ = [
    "abs2", "abs_", "add", "add2", "bfe", "bfi", "bfind", "bmsk", "brev", "clz", "cnot", "compare", "copysign",
    "cos_approx", "cvt", "cvt_pack", "cvt_packed", "cvt_unpack", "div", "div_approx", "div_full", "dp2a", "dp4a",
    "ex2_approx", "ex2_approx2", "flush", "fma", "fma2", "fns", "int_abs", "int_add", "int_add_cc", "int_div",
    "int_mad24_hi", "int_mad24_lo", "int_mad_cc", "int_mad_hi", "int_mad_lo", "int_mad_wide", "int_max", "int_min",
    "int_mul24_hi", "int_mul24_lo", "int_mul_hi", "int_mul_lo", "int_mul_wide", "int_neg", "int_rem", "int_sub",
    "int_sub_cc", "lg2_approx", "lop3", "max2", "maximum", "maximum3", "min2", "minimum", "minimum3", "mul", "mul2",
    "neg", "neg2", "packed", "popc", "prmt", "rcp", "rcp_approx", "resize", "rsqrt_approx", "sad", "set_value",
    "shf_l", "shf_r", "shl", "shr", "sin_approx", "sqrt", "sqrt_approx", "sub", "sub2", "szext", "tanh_approx",
    "tanh_approx2", "testp", "vabsdiff4",
]  # fmt: skip
