"""printf, assert, trap and brkpt: what a kernel asks of the machine around it."""

import re

import numpy as np
import pytest
from programs import ARCHITECTURES, ORDERS, line_of, run, run_ptx, write_source

from dsv4_rt.errors import KernelFault, UnsupportedInstruction

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def test_printf_formats_as_c_does(capsys, arch):
    source = r"""extern "C" __global__ void f(const float* x, int* y) {
        const int t = threadIdx.x;
        const char* name = t ? "one" : "zero";
        y[t] = printf("%d|%5u|%-4x|%#o|%lld|%+.3f|%g|%s|%c|%%|%hhd|%*d|%.*e|%p\n", t - 1, 7u, 255, 8, (1ll << 40) + t,
                      x[t], (double)x[t], name, 'a' + t, 511, 4, t, 2, x[t], (void*)0x1000);
    }"""
    x, y = np.array([1.5, -2.25], np.float32), np.zeros(2, np.int32)
    run(source, "f", 1, 2, x, y, arch=arch)
    assert capsys.readouterr().out == (
        "-1|    7|ff  |010|1099511627776|+1.500|1.5|zero|a|%|-1|   0|1.50e+00|0x1000\n"
        "0|    7|ff  |010|1099511627777|-2.250|-2.25|one|b|%|-1|   1|-2.25e+00|0x1000\n"
    )
    assert y.tolist() == [15, 15]  # CUDA's printf returns how many arguments it read


def test_printf_of_some_threads_and_of_different_formats(capsys, arch):
    source = r"""__device__ __noinline__ void tell(int t) {
        if (t % 40 == 3) printf("thread %d of %d\n", t, blockDim.x);
    }
    extern "C" __global__ void f(int* y) {
        printf(threadIdx.x & 1 ? "odd\n" : "even\n");
        __syncthreads();
        tell(threadIdx.x + 100 * blockIdx.x);
        y[blockIdx.x * 64 + threadIdx.x] = 1;
    }"""
    y = np.zeros(128, np.int32)
    run(source, "f", 2, 64, y, arch=arch)
    said = capsys.readouterr().out.splitlines()
    assert said[:128] == ["even", "odd"] * 64
    assert said[128:] == [f"thread {t} of 64" for t in (3, 43, 123, 163)]
    assert y.all()


def test_printf_of_a_bad_pointer_names_the_thread(tmp_path, arch):
    source = r"""extern "C" __global__ void f(const char* name) { printf("%s\n", name + threadIdx.x); } // BUG"""
    write_source(tmp_path, source)
    with pytest.raises(KernelFault, match=r"(?s)f: out of bounds: 1-byte read.*vprintf.*BUG"):
        run(source, "f", 1, 1, np.uint64(64), arch=arch, roots=(tmp_path,))


@pytest.mark.parametrize("order", ORDERS)
def test_assert_reports_text_file_line_and_thread(tmp_path, arch, order):
    source = """#include <assert.h>
    __device__ void check(int value, int limit) { assert(value < limit && "too large"); } // BUG
    extern "C" __global__ void f(const int* x) { check(x[blockIdx.x * 32 + threadIdx.x], 10); }"""
    source = source.replace("#include <assert.h>", "")
    x = np.zeros(64, np.int32)
    run(source, "f", 2, 32, x, arch=arch, order=order)
    x[[37, 41]] = 10, 11
    write_source(tmp_path, source)
    with pytest.raises(KernelFault) as caught:
        run(source, "f", 2, 32, x, arch=arch, order=order, roots=(tmp_path,))
    message = str(caught.value)
    print(message)
    line = line_of(source, "BUG")
    assert re.match(rf'f: assertion failed: value < limit && "too large", in .*check.* at program.cu:{line}\n', message)
    assert "CTA (1, 0, 0), thread (5, 0, 0), the first of 2 threads" in message
    assert f"program.cu:{line}: " in message


@pytest.mark.parametrize("stop", ["__trap();", "__brkpt();"])
def test_trap_and_breakpoint_are_reported(tmp_path, arch, stop):
    source = f"""extern "C" __global__ void f(const int* x) {{
        if (x[threadIdx.x])
            {stop} // BUG
    }}"""
    x = np.zeros(64, np.int32)
    run(source, "f", 1, 64, x, arch=arch)
    x[40] = 1
    write_source(tmp_path, source)
    with pytest.raises(KernelFault, match=r"(?s)trap.*thread \(40, 0, 0\)"):
        run(source, "f", 1, 64, x, arch=arch, roots=(tmp_path,))


def test_other_external_functions_are_refused_by_name(arch):
    ptx = f""".version 9.0
    .target {arch}
    .address_size 64
    .extern .func elsewhere (.param .b32 p);
    .entry f() {{
        .param .b32 v;
        st.param.b32 [v], 1;
        call.uni elsewhere, (v);
        ret;
    }}"""
    with pytest.raises(UnsupportedInstruction, match="f: a call of elsewhere, which this module does not define"):
        run_ptx(ptx, "f", 1, 32, arch=arch)
