"""Calls through pointers: tables of functions, virtual functions, .calltargets, .alias, and calls that are wrong."""

import numpy as np
import pytest
from programs import ARCHITECTURES, ORDERS, compile_ptx, line_of, pack, run, run_ptx, write_source

from dsv4_rt.emulator import Machine
from dsv4_rt.errors import KernelFault, UnsupportedInstruction

TABLES = """
typedef int (*op)(int, int);
__device__ __noinline__ int plus(int a, int b) { return a + b; }
__device__ __noinline__ int minus(int a, int b) { return a - b; }
__device__ __noinline__ int product(int a, int b) { return a <= 0 ? 0 : b + product(a - 1, b); }
__device__ op table[3] = {plus, minus, product};
__constant__ op other[2] = {minus, plus};
struct Shape { int w; __device__ virtual int area(int s) const { return w * s; } };
struct Square : Shape { __device__ int area(int s) const override { return w * w + s; } };
extern "C" __global__ void f(const int* which, const int* x, int* y) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    const op one = table[which[t]];
    y[t] = one(x[t], t) + other[which[t] & 1](t, 2);
    Shape shape; Square square;
    shape.w = 3; square.w = x[t];
    const Shape* some = which[t] == 1 ? &shape : (const Shape*)&square;
    y[t] += 1000 * some->area(t);
}
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tables_and_virtual_functions(arch, order, rng):
    which = rng.integers(0, 3, 128).astype(np.int32)
    x, y = rng.integers(0, 9, 128).astype(np.int32), np.zeros(128, np.int32)
    run(TABLES, "f", 2, 64, which, x, y, arch=arch, order=order, seed=4)
    t = np.arange(128)
    one = np.choose(which, [x + t, x - t, x * t])
    other = np.where(which & 1, t + 2, t - 2)
    np.testing.assert_array_equal(y, one + other + 1000 * np.where(which == 1, 3 * t, x * x + t))


TARGETS = """.version 9.0
.target sm_90a
.address_size 64
.func (.param .b32 r) twice(.param .b32 v) { .reg .b32 %a; ld.param.b32 %a, [v]; add.u32 %a, %a, %a;
    st.param.b32 [r], %a; ret; }
.func (.param .b32 r) thrice(.param .b32 v) { .reg .b32 %a; ld.param.b32 %a, [v]; mul.lo.u32 %a, %a, 3;
    st.param.b32 [r], %a; ret; }
.func (.param .b32 r) wide(.param .b64 v) { st.param.b32 [r], 1; ret; }
.visible .func (.param .b32 r) again(.param .b32 v);
.alias again, twice;
.visible .entry f(.param .u64 out, .param .u32 use) {
    .reg .pred %p; .reg .b32 %t, %v; .reg .b64 %f, %out;
    ld.param.u64 %out, [out];
    mov.u32 %t, %tid.x;
    and.b32 %v, %t, 1;
    setp.eq.u32 %p, %v, 1;
    mov.u64 %f, ODD;
    @!%p mov.u64 %f, EVEN;
    {
        .param .b32 arg; .param .b32 back;
        st.param.b32 [arg], %t;
        proto: .callprototype (.param .b32 _) _ (.param .b32 _);
        listed: .calltargets twice, thrice;
        call (back), %f, (arg), LIST;
        ld.param.b32 %v, [back];
    }
    mad.wide.u32 %out, %t, 4, %out;
    st.global.u32 [%out], %v;
    ret;
}
"""


def through(odd, even, listed):
    text = TARGETS.replace("ODD", odd).replace("EVEN", even).replace("LIST", listed)
    out = np.zeros(64, np.uint32)
    run_ptx(text, "f", 1, 64, out, np.uint32(0), arch="sm_90a")
    return out


@pytest.mark.parametrize("listed", ["proto", "listed"])
@pytest.mark.parametrize("even", ["twice", "again"])
def test_lists_prototypes_and_aliases(listed, even):
    t = np.arange(64)
    np.testing.assert_array_equal(through("thrice", even, listed), np.where(t & 1, 3 * t, 2 * t))


@pytest.mark.parametrize(
    ("pointer", "listed", "message"),
    [
        ("0", "proto", "a call through a pointer to 0x0, where no function is"),
        ("77", "listed", "a call through a pointer to 0x4d, where no function is"),
        ("wide", "proto", r"wide, which returns and takes \(\(4,\), \(8,\)\) bytes, not the \(\(4,\), \(4,\)\)"),
        ("wide", "listed", "pointer to wide, which listed does not list"),
        ("f", "proto", "pointer to f, which is a kernel"),
    ],
)
def test_wrong_pointers_name_the_call_and_the_thread(pointer, listed, message):
    with pytest.raises(KernelFault, match=message) as caught:
        through(pointer, "twice", listed)
    assert "CTA (0, 0, 0), thread (1, 0, 0), the first of 32 threads" in str(caught.value)
    assert f"call (back), %f, (arg), {listed};" in str(caught.value)


def test_an_unset_pointer_and_its_cuda_line(tmp_path):
    source = """
typedef int (*op)(int);
__device__ __noinline__ int one(int a) { return a + 1; }
__device__ op table[2] = {one, nullptr};
extern "C" __global__ void f(int* y) {
    const op g = table[threadIdx.x == 40];
    y[threadIdx.x] = g(5); // BUG
}
"""
    write_source(tmp_path, source)
    with pytest.raises(KernelFault, match="a call through a pointer to 0x0, where no function is") as caught:
        run(source, "f", 1, 64, np.zeros(64, np.int32), roots=(tmp_path,))
    assert f"program.cu:{line_of(source, 'BUG')}: " in str(caught.value)
    assert "thread (40, 0, 0)" in str(caught.value)


def test_a_pointer_that_another_kernel_stored():
    source = """
typedef int (*op)(int);
__device__ __noinline__ int one(int a) { return a + 1; }
__device__ __noinline__ int two(int a) { return a * 2; }
__device__ op kept;
extern "C" __global__ void store(int which) { kept = which ? one : two; }
extern "C" __global__ void use(int* y) { y[threadIdx.x] = kept(threadIdx.x); }
"""
    machine, y = Machine("sm_90a"), np.zeros(32, np.int32)
    module = machine.load(compile_ptx(source, "sm_90a"), "pointers")
    machine.memory.register(y.ctypes.data, y.nbytes, keep=y)
    for which, want in ((0, np.arange(32) * 2), (1, np.arange(32) + 1)):
        machine.launch(module, "store", 1, 1, pack(module.entries["store"].params, (np.int32(which),)))
        machine.launch(module, "use", 1, 32, pack(module.entries["use"].params, (y,)))
        np.testing.assert_array_equal(y, want)


def test_a_missing_callee_is_refused_before_the_launch():
    text = TARGETS.replace("ODD", "twice").replace("EVEN", "twice").replace("%f, (arg), LIST", "absent, (arg)")
    with pytest.raises(UnsupportedInstruction, match="a call of absent, which this module does not define"):
        run_ptx(text, "f", 1, 64, np.zeros(64, np.uint32), np.uint32(0), arch="sm_90a")
