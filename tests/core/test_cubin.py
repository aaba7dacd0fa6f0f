"""What is read from a cubin, against kernels whose layout the source fixes."""

import pytest

from dsv4_rt.compile import ARCHITECTURES, compile
from dsv4_rt.cubin import Param, read_kernels

SOURCE = """
struct Mixed { char tag; double value; short tail; };            // 24 bytes, aligned to 8
struct alignas(16) Wide { unsigned char bytes[32]; };
struct alignas(64) Map { unsigned char bytes[128]; };            // a tensor map

extern "C" __global__ void none() {}
extern "C" __global__ void widths(char a, short b, int c, long long d, char e, float* f, char g) {
    f[0] = float(a) + b + c + float(d) + e + g;
}
extern "C" __global__ void structs(int n, Mixed mixed, char c, const __grid_constant__ Wide wide, int last) {
    if (n) reinterpret_cast<volatile double*>(wide.bytes[3] + n + c + last)[0] = mixed.value + mixed.tag + mixed.tail;
}
extern "C" __global__ void tensor_map(int* x, const __grid_constant__ Map map, int last) { x[last] = map.bytes[3]; }
extern "C" __global__ void __launch_bounds__(96) bounded(int* x) { x[threadIdx.x] = 1; }
extern "C" __global__ void __cluster_dims__(4, 2, 1) clustered(int* x) { x[0] = 1; }
template <int N> __global__ void shared(float* x) {
    __shared__ float tile[N];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = tile[N - 1 - threadIdx.x];
}
extern "C" __global__ void stacked(int* x, int n) {
    int local[64];
    for (int i = 0; i < 64; ++i) local[i] = x[i];
    for (int i = 0; i < n; ++i) local[x[i] & 63] += i;           // indexed by data: no place in registers
    x[0] = local[n & 63];
}
template <int N> __global__ void __launch_bounds__(1024) spills(float* x) {   // 1024 threads leave 64 registers
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) { sum = __sinf(sum) + v[i]; x[threadIdx.x * N + i] = sum * v[N - 1 - i]; }
}
"""
NAMES = ["none", "widths", "structs", "tensor_map", "bounded", "clustered", "stacked"]
NAMES += ["shared<32>", "shared<300>", "spills<128>"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def artifact(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("cubin") / "layouts.cu"
    path.write_text(SOURCE)
    return compile(path, request.param, NAMES, cache=False)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("none", []),
        ("widths", [(0, 1), (2, 2), (4, 4), (8, 8), (16, 1), (24, 8), (32, 1)]),
        ("structs", [(0, 4), (8, 24), (32, 1), (48, 32), (80, 4)]),
        ("shared<32>", [(0, 8)]),
    ],
)
def test_parameters_lie_where_the_c_layout_puts_them(artifact, name, params):
    assert artifact.kernels[name].params == tuple(Param(*param) for param in params)


def test_a_tensor_map_is_aligned_where_it_lies_and_not_in_the_buffer(artifact):
    # Parameters start at byte 0x210 of the constant bank on sm_90 and at 0x380 on sm_100: only the latter is a multiple
    # of 64, so on sm_90 the C layout of the parameters is not the layout of the buffer.
    start = 0x210 if artifact.arch == "sm_90a" else 0x380
    pointer, tensor_map, last = artifact.kernels["tensor_map"].params
    assert (pointer.offset, tensor_map.size, last.offset) == (0, 128, tensor_map.offset + 128)
    assert tensor_map.offset == {"sm_90a": 48}.get(artifact.arch, 64)
    assert (start + tensor_map.offset) % 64 == 0


def test_launch_bounds_cluster_and_shared_memory(artifact):
    kernels = artifact.kernels
    assert {name: kernels[name].max_threads for name in ("none", "bounded", "spills<128>")} == {
        "none": 1024,
        "bounded": 96,
        "spills<128>": 1024,
    }
    assert kernels["clustered"].cluster == (4, 2, 1)
    assert kernels["bounded"].cluster is None
    assert [kernels[name].shared_bytes for name in ("none", "shared<32>", "shared<300>")] == [0, 128, 1200]


def test_registers_stack_and_spills(artifact):
    kernels = artifact.kernels
    for name, kernel in kernels.items():
        usage = artifact.log.split(f"Function properties for {kernel.lowered}\n")[1]
        assert f"Used {kernel.registers} registers" in usage.splitlines()[1], name
        assert read_kernels(artifact.cubin)[kernel.lowered].stack_bytes == kernel.stack_bytes, name
    assert kernels["none"].stack_bytes == kernels["none"].spill_store_bytes == 0
    assert kernels["stacked"].stack_bytes == 256
    assert kernels["stacked"].spill_store_bytes == 0
    assert kernels["spills<128>"].spill_store_bytes > 0
    assert kernels["spills<128>"].spill_load_bytes > 0
    assert kernels["spills<128>"].registers <= 64


def test_what_is_no_cubin_is_refused(artifact):
    for data in (b"", b"text", artifact.cubin[:200], artifact.cubin[: len(artifact.cubin) // 2]):
        with pytest.raises(ValueError, match=rf"not a (complete )?cubin: {len(data)} bytes"):
            read_kernels(data)
