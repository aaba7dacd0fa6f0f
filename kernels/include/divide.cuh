// divide.cuh: many IEEE quotients with one divisor, five instructions each.
//
//   q0 = x * r,   q1 = q0 - (q0 * s - x) * r,   q2 = q1 - (q1 * s - x) * r         r = 1 / s, rounded to nearest
//
// Source    Markstein's theorem (Muller et al., Handbook of Floating-Point Arithmetic, division with an FMA): if r is
//           1 / s correctly rounded and q1 one of the two floats next to x / s, q2 is x / s rounded to nearest.
//           q0 is off by at most 2^-23 relative, q1 before its rounding by 2^-45: q1 is such a neighbour.
// Numerics  bit-exact for s in 2^-60 .. 2^125 and a quotient in 2^-20 .. 2^60 in magnitude, s normal and positive. A smaller
//           quotient has an absolute error far below 2^-40; a zero keeps its sign, which the other way to write the
//           residual would lose. NaN stays NaN; where q0 overflows or x is infinite, the quotient is infinite.
#pragma once

#include "numeric.cuh"

struct Divisor {
    float s, r;

    __device__ __forceinline__ explicit Divisor(float divisor) : s(divisor), r(1.0f / divisor) {}

    __device__ __forceinline__ float quotient(float x) const {
        const float q0 = x * r;
        const float q1 = fmaf(-fmaf(q0, s, -x), r, q0);
        const float q2 = fmaf(-fmaf(q1, s, -x), r, q1);
        return fabsf(q0) < __uint_as_float(0x7f800000u) ? q2 : q0;
    }
};
