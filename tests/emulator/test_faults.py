"""Planted bugs: each is reported with the kernel, the thread and the CUDA line it stands on."""

import re

import numpy as np
import pytest
from programs import ARCHITECTURES, compile_ptx, line_of, run, run_ptx, write_source

from dsv4_rt.emulator import Machine
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault, LaunchError

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def refused(tmp_path, arch, source, *args, grid=1, block=64, error=KernelFault, **options):
    """Run a kernel with a bug on the line marked BUG; returns the message after checking that it names that line."""
    write_source(tmp_path, source)
    with pytest.raises(error) as caught:
        run(source, "f", grid, block, *args, arch=arch, roots=(tmp_path,), **options)
    message = str(caught.value)
    print(message)
    line = line_of(source, "BUG")
    assert f"program.cu:{line}: " in message, message
    assert "BUG" in message, message
    assert message.startswith("f: ")
    if error is KernelFault:
        assert re.search(r"\n  CTA \(\d+, 0, 0\), thread \(\d+, 0, 0\)", message), message
    assert re.search(r"PTX line \d+: \S", message), message
    return message


def test_reads_past_the_end(tmp_path, arch):
    source = """extern "C" __global__ void f(const float* x, float* y) {
        int i = blockIdx.x * 64 + threadIdx.x;
        y[i & 63] = x[i + 4]; // BUG
    }"""
    x, y = np.zeros((2, 128), np.float32)
    machine = Machine(arch, source_roots=(tmp_path,))
    at = machine.memory.alloc(512, label="the input")
    message = refused(tmp_path, arch, source, np.uint64(at), y, grid=2, machine=machine)
    assert "out of bounds: 4-byte read" in message
    assert '0 bytes past the end of "the input"' in message
    assert "512 B" in message
    assert "CTA (1, 0, 0), thread (60, 0, 0), the first of 4 threads" in message
    assert x.sum() == 0


def test_writes_before_the_start_and_null(tmp_path, arch):
    machine = Machine(arch, source_roots=(tmp_path,))
    at = machine.memory.alloc(256, label="target")
    source = 'extern "C" __global__ void f(int* y) { y[(int)threadIdx.x - 2] = 1; } // BUG'
    message = refused(tmp_path, arch, source, np.uint64(at), machine=machine)
    assert "4-byte write" in message
    assert '8 bytes before "target"' in message
    assert "null pointer" in refused(tmp_path, arch, source.replace("- 2", "+ 2"), np.uint64(0))


def test_use_after_free(tmp_path, arch):
    machine = Machine(arch, source_roots=(tmp_path,))
    at = machine.memory.alloc(1024, label="scratch")
    machine.memory.free(at)
    source = 'extern "C" __global__ void f(int* y) { y[threadIdx.x + 1] += 1; } // BUG'
    message = refused(tmp_path, arch, source, np.uint64(at), machine=machine)
    assert "use after free: 4-byte read" in message
    assert '4 bytes into freed "scratch"' in message


def test_write_to_read_only_memory(tmp_path, arch):
    y = np.zeros(64, np.int32)
    y.flags.writeable = False
    source = 'extern "C" __global__ void f(int* y) { if (threadIdx.x == 9) y[threadIdx.x] = 1; } // BUG'
    message = refused(tmp_path, arch, source, y)
    assert "write to read-only memory" in message
    assert "thread (9, 0, 0)" in message


def test_misaligned_vector(tmp_path, arch):
    source = """extern "C" __global__ void f(const float* x, float* y) {
        float4 v = *(const float4*)(x + threadIdx.x * 2); // BUG
        y[threadIdx.x] = v.x + v.y + v.z + v.w;
    }"""
    buffer = np.zeros(260, np.float32)
    x = buffer[(-buffer.ctypes.data // 4) % 4 :][:256]
    message = refused(tmp_path, arch, source, x, np.zeros(64, np.float32))
    assert "misaligned 16-byte read" in message
    assert "thread (1, 0, 0), the first of 32 threads" in message


def test_shared_out_of_bounds_and_uninitialised(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y, int shift) {
        __shared__ int s[64];
        s[threadIdx.x] = threadIdx.x;
        __syncthreads();
        y[threadIdx.x] = s[threadIdx.x + shift]; // BUG
    }"""
    y = np.zeros(64, np.int32)
    message = refused(tmp_path, arch, source, y, np.int32(3))
    assert "out of bounds: 4-byte read at shared offset" in message
    assert "thread (61, 0, 0), the first of 3 threads" in message
    source = source.replace("s[threadIdx.x] =", "if (threadIdx.x != 7) s[threadIdx.x] =").replace("s[64]", "s[80]")
    message = refused(tmp_path, arch, source, y, np.int32(0))
    assert "read of uninitialised shared memory" in message
    assert "thread (7, 0, 0)" in message


def test_local_out_of_bounds(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y, int n) {
        int a[8];
        for (int i = 0; i < n; ++i) a[i ^ 1] = i; // BUG
        int sum = 0;
        for (int i = 0; i < 8; ++i) sum += a[(i * n) & 7];
        y[threadIdx.x] = sum;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32), np.int32(64))
    assert "local" in message
    assert "out of bounds" in message


def test_barrier_divergence(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y) {
        __shared__ int s[64];
        s[threadIdx.x] = 1;
        if (threadIdx.x < 48) { __syncthreads(); y[threadIdx.x] = s[threadIdx.x ^ 1]; } // BUG
        else { y[threadIdx.x] = s[threadIdx.x]; __syncthreads(); y[threadIdx.x + 64] = s[threadIdx.x ^ 1]; }
    }"""
    message = refused(tmp_path, arch, source, np.zeros(128, np.int32))
    assert "barrier divergence" in message
    assert "thread (32, 0, 0), the first of 16 threads" in message


def test_shuffle_from_an_inactive_lane(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y) {
        int v = threadIdx.x;
        if (threadIdx.x < 20) v = __shfl_down_sync(0xfffffu, v, 4); // BUG
        y[threadIdx.x] = v;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32), block=32)
    assert "shfl reads lane 20, which is not in the mask" in message
    assert "thread (16, 0, 0), the first of 4 threads" in message


def test_shuffle_from_a_present_lane_that_is_not_named(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y) {
        u32 mask = threadIdx.x & 1 ? 0xaaaaaaaau : 0x55555555u;
        y[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, threadIdx.x < 30 ? 2 : 1); // BUG
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32), block=32)
    assert "shfl reads lane 31, which is not in the mask" in message


def test_a_lane_outside_its_mask(tmp_path, arch):
    source = """extern "C" __global__ void f(u32* y) {
        y[threadIdx.x] = __ballot_sync(0xffffu, threadIdx.x & 1); // BUG
    }"""
    assert "its mask 0x0000ffff does not name" in refused(tmp_path, arch, source, np.zeros(64, np.uint32))
    source = """extern "C" __global__ void f(u32* y) {
        y[threadIdx.x] = 1;
        __syncwarp(0xffffu); // BUG
        y[threadIdx.x ^ 1] += 1;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.uint32))
    assert "its mask 0x0000ffff does not name" in message
    assert "thread (16, 0, 0), the first of 32 threads" in message


def test_unset_register(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y) {
        int v;
        asm volatile("{.reg .pred p; setp.lt.u32 p, %1, 5;\\n @p mov.u32 %0, 9;}" : "=r"(v) : "r"(threadIdx.x));
        y[threadIdx.x] = v; // BUG
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32))
    assert "becomes a stored value, but no instruction has set it" in message
    assert "thread (5, 0, 0), the first of 59 threads" in message


def test_trap(tmp_path, arch):
    source = 'extern "C" __global__ void f(int* y) { if (threadIdx.x == 3) __trap(); y[threadIdx.x] = 1; } // BUG'
    assert "trap" in refused(tmp_path, arch, source, np.zeros(64, np.int32))


def test_deadlock_names_who_waits(tmp_path, arch):
    source = """extern "C" __global__ void f(volatile int* flag) {
        if (threadIdx.x == 0) while (flag[0] == 0) { } // BUG
        __syncthreads();
        flag[0] = 1;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(1, np.int32), error=Deadlock, grid=3)
    assert "189 threads, first CTA (0, 0, 0) thread (1, 0, 0), wait at" in message
    assert "3 threads, first CTA (0, 0, 0) thread (0, 0, 0), poll memory that nobody writes" in message
    assert "63 of 64 threads have come" in message


def test_deadlock_at_a_warp_barrier(tmp_path, arch):
    source = """extern "C" __global__ void f(volatile int* y) {
        if (threadIdx.x < 16) __syncwarp(); // BUG
        else while (y[0] == 0) { }
        y[1] = 2;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(2, np.int32), error=Deadlock, block=32)
    assert "names lanes that are elsewhere: 0xffff0000" in message


def test_barrier_with_a_missing_warp(tmp_path, arch):
    source = """extern "C" __global__ void f(int* y) {
        asm volatile("bar.sync 1, 96;" ::: "memory"); // BUG
        y[threadIdx.x] = 1;
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32), error=Deadlock)
    assert "barrier 1 of that CTA: 64 of 96 threads have come" in message


def test_hardware_division_by_zero_is_no_fault(arch):
    source = 'extern "C" __global__ void f(int* y, int z) { y[0] = 7 / z; y[1] = 7 % z; y[2] = 0x80000000 / (z - 1); }'
    y = np.zeros(3, np.int32)
    run(source, "f", 1, 1, y, np.int32(0), arch=arch)
    assert y[0] == -1
    assert y[1] == 7


def test_bad_launches(arch):
    source = 'extern "C" __global__ void __launch_bounds__(64) f(int* y) { y[0] = 1; }'
    ptx = compile_ptx(source, arch)
    y = np.zeros(1, np.int32)
    with pytest.raises(LaunchError, match="block of 128 threads; the kernel allows 64"):
        run_ptx(ptx, "f", 1, 128, y)
    machine = Machine(arch)
    module = machine.load(ptx, "m")
    with pytest.raises(LaunchError, match="4 bytes of parameters; the kernel takes 8"):
        machine.launch(module, "f", 1, 32, b"1234")
    with pytest.raises(EmulatorError, match="no entry g; it has f"):
        machine.launch(module, "g", 1, 32, b"")


def test_inlined_lines_name_the_call_too(tmp_path, arch):
    source = """__device__ __forceinline__ void put(int* y, int i) {
        y[i] = 1; // BUG
    }
    extern "C" __global__ void f(int* y) {
        put(y, threadIdx.x + 1); // CALL
    }"""
    message = refused(tmp_path, arch, source, np.zeros(64, np.int32))
    assert f"program.cu:{line_of(source, '// CALL')}: put(y, threadIdx.x + 1); // CALL" in message
    assert "[put, inlined]" in message
