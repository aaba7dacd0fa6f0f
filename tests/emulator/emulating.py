"""What the tests of `python -m dsv4_rt emulate` share: small kernels and how to ask for a run."""

import json

import pytest

ADD = """extern "C" __global__ void add(const float* x, const float* y, float* z, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) z[i] = x[i] + y[i];
}
"""
SUM = """// Sums of 128 floats each.
template <int N>
__global__ void tile_sum(const float* x, float* sums) {}

__global__ void __launch_bounds__(128) block_sum(const float* x, float* sums) {
    __shared__ float part[128];
    part[threadIdx.x] = x[blockIdx.x * 128 + threadIdx.x];
    for (int half = 64; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}
"""
TINY = """.version 8.5
.target sm_90a
.address_size 64
.visible .entry tiny(.param .u64 out, .param .u32 k) .reqntid 32, 1, 1
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    .reg .pred %p;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [k];
    mov.u32 %r2, %tid.x;
    setp.lt.u32 %p, %r2, %r1;
    mov.u32 %r3, 5;
    @%p add.s32 %r3, %r2, -40;
    mad.wide.u32 %rd2, %r2, 4, %rd1;
    st.global.u32 [%rd2], %r3;
    ret;
}
"""


def args(*specs):
    return [word for spec in specs for word in ("--arg", spec)]


def finds(emulate, *argv):
    """The JSON document of a run that ends well."""
    code, out, err = emulate(*argv, "--json")
    assert code == 0, err
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def refused(result, *words):
    code, out, err = result
    assert code == 2, out
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err, err
