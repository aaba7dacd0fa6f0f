"""Bugs planted in right kernels. Each source runs clean without MUTANT, in every order, and equals NumPy; with it the
emulator says what is wrong and on which line, which the source marks with BUG."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
from programs import ORDERS, line_of, run, write_source

from dsv4_rt.emulated_device import EmulatedDevice, checks_from_environment
from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.memory import RED_ZONE
from dsv4_rt.errors import Deadlock, DeviceError, KernelFault


def same(x):
    return x


def sums(x):
    return np.repeat(x.reshape(2, -1).sum(1, dtype=np.int32), 64)


def flipped(x):
    return x.reshape(2, 64)[:, ::-1].reshape(-1)


def next_sum(x):
    return (x.reshape(2, 64) + np.roll(x.reshape(2, 64), -1, 1)).reshape(-1)


@dataclass(frozen=True)
class Plant:
    """`body` uses t, i (the thread's place in x and y), x, y, n = 128, z (scratch, zeros). It is compiled with and
    without MUTANT. The kernel runs as 2 CTAs of 64 threads."""

    body: str
    expected: object
    message: str
    error: type = KernelFault
    checks: tuple[str, ...] = ()
    orders: tuple[str, ...] = ORDERS  # in which the mutant must be reported


PLANTS = {
    "missing barrier": Plant(
        """__shared__ int s[64]; s[t] = x[i];
        #ifndef MUTANT
        __syncthreads();
        #endif
        y[i] = s[63 - t]; // BUG""",
        flipped, "RAW race|uninitialised shared",
    ),
    "barrier too early": Plant(
        """__shared__ int s[64]; s[t] = 0; __syncthreads(); int v = x[i];
        #ifdef MUTANT
        __syncthreads(); s[t] = v;
        #else
        s[t] = v; __syncthreads();
        #endif
        int w = s[63 - t]; // BUG
        y[i] = w;""",
        flipped, "RAW race|WAR race", orders=("min-pc",),
    ),
    "write after read without barrier": Plant(
        """__shared__ int s[64]; s[t] = x[i]; __syncthreads();
        int v = s[(t + 1) & 63] + s[t];
        #ifndef MUTANT
        __syncthreads();
        #endif
        s[t] = v; // BUG
        y[i] = v;""",
        next_sum, "WAR race", orders=("min-pc",),
    ),
    "write after write without barrier": Plant(
        """__shared__ int s[64]; s[63 - t] = -5;
        #ifndef MUTANT
        __syncthreads();
        #endif
        s[t] = x[i]; // BUG
        __syncthreads(); y[i] = s[t];""",
        same, "WAW race", orders=("min-pc",),
    ),
    "all threads store one word": Plant(
        """__shared__ int s;
        #ifndef MUTANT
        if (t == 0)
        #endif
        s = x[i]; // BUG
        __syncthreads(); y[i] = s;""",
        lambda x: np.repeat(x[::64], 64), "WAW race",
    ),
    "double buffer with one buffer": Plant(
        """__shared__ int s[2][64]; int v = x[i];
        for (int k = 0; k < n / 32; ++k) {
        #ifdef MUTANT
            int b = 0;
        #else
            int b = k & 1;
        #endif
            s[b][t] = v; // BUG
            __syncthreads();
            v = s[b][63 - t] + 1;
        }
        y[i] = v;""",
        lambda x: x + 4, "WAR race", orders=("min-pc",),
    ),
    "double buffer without barrier": Plant(
        """__shared__ int s[2][64]; int v = x[i];
        for (int k = 0; k < n / 32; ++k) {
            s[k & 1][t] = v;
        #ifndef MUTANT
            __syncthreads();
        #endif
            v = s[k & 1][63 - t] + 1; // BUG
        }
        y[i] = v;""",
        lambda x: x + 4, "RAW race|uninitialised shared",
    ),
    "reduction without its barrier": Plant(
        """__shared__ int s[64]; s[t] = x[i]; __syncthreads();
        #pragma unroll 1
        for (int d = 32; d; d >>= 1) {
            if (t < d) s[t] += s[t + d]; // BUG
        #ifndef MUTANT
            __syncthreads();
        #endif
        }
        __syncthreads(); y[i] = s[0];""",
        sums, "RAW race|WAR race",
    ),
    "warp reduction without __syncwarp": Plant(
        """__shared__ int s[64]; s[t] = x[i]; __syncthreads();
        #pragma unroll 1
        for (int d = 16; d; d >>= 1) {
            int v = (t & 31) < d ? s[t + d] : 0; // BUG
        #ifndef MUTANT
            __syncwarp();
        #endif
            s[t] += v;
        #ifndef MUTANT
            __syncwarp();
        #endif
        }
        __syncthreads(); y[i] = s[0] + s[32];""",
        sums, "RAW race", orders=("min-pc",),
    ),
    "histogram without atomics": Plant(
        """__shared__ int s[4]; if (t < 4) s[t] = 0; __syncthreads();
        #ifdef MUTANT
        s[x[i] & 3] += x[i]; // BUG
        #else
        atomicAdd(&s[x[i] & 3], x[i]);
        #endif
        __syncthreads(); y[i] = s[0] + s[1] + s[2] + s[3];""",
        sums, "race on shared",
    ),
    "histogram cleared without barrier": Plant(
        """__shared__ int s[64]; s[t] = 0;
        #ifndef MUTANT
        __syncthreads();
        #endif
        atomicAdd(&s[63 - t], x[i]); // BUG
        __syncthreads(); y[i] = s[t];""",
        flipped, "WAW race|uninitialised shared", orders=("min-pc",),
    ),
    "read of a count still being added to": Plant(
        """__shared__ int s; if (t == 0) s = 0; __syncthreads();
        atomicAdd(&s, x[i]);
        #ifndef MUTANT
        __syncthreads();
        #endif
        y[i] = s; // BUG""",
        sums, "RAW race", orders=("min-pc",),
    ),
    "named barrier of the other warp": Plant(
        """__shared__ int s[64]; s[t] = x[i];
        #ifdef MUTANT
        asm volatile("bar.sync %0, 32;" :: "r"(1 + t / 32) : "memory");
        #else
        asm volatile("bar.sync 1, 64;" ::: "memory");
        #endif
        y[i] = s[63 - t]; // BUG""",
        flipped, "RAW race|uninitialised shared",
    ),
    "flag without fence": Plant(
        """__shared__ int s[32]; __shared__ volatile int flag; if (t == 0) flag = 0; __syncthreads();
        if (t < 32) {
            s[t] = x[i]; __syncwarp();
        #ifndef MUTANT
            __threadfence_block();
        #endif
            if (t == 0) flag = 1;
            y[i] = x[i];
        } else {
            while (flag == 0) { }
            y[i] = s[63 - t]; // BUG
        }""",
        lambda x: np.concatenate([np.concatenate([r[:32], r[31::-1]]) for r in x.reshape(2, 64)]), "RAW race",
    ),
    "flag that is not volatile": Plant(
        """__shared__ int flag; if (t == 0) flag = 0; __syncthreads();
        #ifdef MUTANT
        if (t == 40) flag = x[i];
        #else
        if (t == 40) atomicExch(&flag, x[i]);
        #endif
        if (t == 0) while (atomicAdd(&flag, 0) == 0) { } // BUG
        __syncthreads(); y[i] = flag;""",
        lambda x: np.repeat(x.reshape(2, 64)[:, 40], 64), "WAW race", orders=("min-pc",),
    ),
    "off by one in the input": Plant(
        """int v = 0;
        #ifdef MUTANT
        int stop = n + 1;
        #else
        int stop = n;
        #endif
        for (int j = blockIdx.x * 64; j < stop && j < (blockIdx.x + 1) * 64 + (stop - n); ++j)
            v += x[j]; // BUG
        y[i] = v;""",
        sums, "out of bounds: 4-byte read",
    ),
    "wrong stride": Plant(
        """
        #ifdef MUTANT
        int at = blockIdx.x * 128 + t;
        #else
        int at = blockIdx.x * 64 + t;
        #endif
        y[at] = x[i]; // BUG""",
        same, "out of bounds: 4-byte write",
    ),
    "shared array too small": Plant(
        """
        #ifdef MUTANT
        __shared__ int s[63];
        #else
        __shared__ int s[64];
        #endif
        s[t] = x[i]; // BUG
        __syncthreads(); y[i] = s[63 - t];""",
        flipped, "out of bounds: 4-byte write at shared",
    ),
    "reduction that forgets its tail": Plant(
        """__shared__ int s[64];
        #ifdef MUTANT
        if (t < 63)
        #endif
        s[t] = x[i];
        __syncthreads();
        int v = 0;
        for (int j = 0; j < 64; ++j) v += s[j]; // BUG
        y[i] = v;""",
        sums, "read of uninitialised shared",
    ),
    "accumulator in shared memory not cleared": Plant(
        """__shared__ int s;
        #ifndef MUTANT
        if (t == 0) s = 0;
        #endif
        __syncthreads(); atomicAdd(&s, x[i]); // BUG
        __syncthreads(); y[i] = s;""",
        sums, "read of uninitialised shared",
    ),
    "local array not cleared": Plant(
        """int a[8];
        #ifdef MUTANT
        for (int j = 0; j < 7; ++j) a[(j + n) & 7] = 0;
        #else
        for (int j = 0; j < 8; ++j) a[(j + n) & 7] = 0;
        #endif
        a[x[i] & 7 & -(n > 500)] = 0;
        int v = x[i] + a[(n - 1 + (x[i] & 0)) & 7]; // BUG
        y[i] = v;""",
        same, "read of uninitialised local",
    ),
    "register not set": Plant(
        """int v = x[i];
        #ifdef MUTANT
        asm volatile("{.reg .pred p; .reg .b32 q; setp.lt.u32 p, %1, 60;\\n @p mov.u32 q, %2;\\n mov.u32 %0, q;}"
            : "=r"(v) : "r"(t), "r"(x[i]));
        #endif
        y[i] = v; // BUG""",
        same, "no instruction has set it",
    ),
    "misaligned vector": Plant(
        """
        #ifdef MUTANT
        int2 v = *(const int2*)(x + (i & ~1) + (t == 2)); // BUG
        #else
        int2 v = *(const int2*)(x + (i & ~1));
        #endif
        y[i] = t & 1 ? v.y : v.x;""",
        same, "misaligned 8-byte read",
    ),
    "divergent barrier": Plant(
        """__shared__ int s[64]; s[t] = x[i];
        #ifdef MUTANT
        if (t < 16) { asm volatile("bar.sync 0;" ::: "memory"); y[i] = 1; } // BUG
        else { asm volatile("bar.sync 0;" ::: "memory"); y[i] = 2; }
        #else
        __syncthreads();
        #endif
        y[i] = s[63 - t];""",
        flipped, "barrier divergence", orders=("min-pc",),
    ),
    "write to the input": Plant(
        """
        #ifdef MUTANT
        ((int*)x)[i] = 3; // BUG
        #endif
        y[i] = x[i];""",
        same, "write to read-only memory",
    ),
    "shuffle from a lane that is not named": Plant(
        """int v = x[i], w = v;
        #ifdef MUTANT
        if ((t & 31) < 16) w = __shfl_xor_sync(0xffffu, v, 16); // BUG
        #else
        w = __shfl_xor_sync(~0u, v, 16); w = __shfl_xor_sync(~0u, w, 16);
        #endif
        y[i] = w;""",
        same, "which is not in the mask",
    ),
    "a lane outside its mask": Plant(
        """
        #ifdef MUTANT
        u32 mask = 0x7fffffffu;
        #else
        u32 mask = ~0u;
        #endif
        int any = __any_sync(mask, t >= 0); // BUG
        y[i] = any ? x[i] : 0;""",
        same, "its mask 0x7fffffff does not name",
    ),
    "barrier counted too high": Plant(
        """__shared__ int s[64]; s[t] = x[i];
        #ifdef MUTANT
        asm volatile("bar.sync 1, 96;" ::: "memory"); // BUG
        #else
        asm volatile("bar.sync 1, 64;" ::: "memory");
        #endif
        y[i] = s[63 - t];""",
        flipped, "64 of 96 threads have come", Deadlock,
    ),
    "infinite spin": Plant(
        """
        #ifndef MUTANT
        if (t == 5) atomicExch(z + blockIdx.x, 1);
        #endif
        while (((volatile int*)z)[blockIdx.x] == 0) { } // BUG
        y[i] = x[i];""",
        same, "poll memory that nobody writes", Deadlock,
    ),
    "last block without fence": Plant(
        """__shared__ int s, last; if (t == 0) s = 0; __syncthreads(); atomicAdd(&s, x[i]); __syncthreads();
        if (t == 0) {
            z[8 + blockIdx.x] = s;
        #ifndef MUTANT
            __threadfence();
        #endif
            last = atomicAdd(z, 1) == 1;
            __threadfence();
        }
        __syncthreads();
        if (last) {
            int v = z[8] + z[9]; // BUG
            y[t] = v; y[t + 64] = v;
        }""",
        lambda x: np.full(128, x.sum(), np.int32), "RAW race on global memory", checks=("check_global_writes",),
    ),
    "every block stores one result": Plant(
        """
        #ifdef MUTANT
        z[3] = x[i]; // BUG
        #else
        atomicMax(z + 3, x[i]);
        #endif
        y[i] = x[i];""",
        same, "WAW race on global memory", checks=("check_global_writes",),
    ),
    "reads what another block stores": Plant(
        """y[i] = x[i];
        #ifdef MUTANT
        int v = y[127 - i]; // BUG
        #else
        int v = y[i];
        #endif
        y[i] = v;""",
        same, "R race on global memory|RAW race on global memory", checks=("check_global_writes",), orders=("min-pc",),
    ),
}  # fmt: skip


def text(body, mutant):
    head = "#define MUTANT\n" if mutant else "\n"
    return head + (
        'extern "C" __global__ void f(const int* __restrict__ x0, int* y, int n, int* z) {\n'
        "const int* x = x0; const int t = threadIdx.x, i = blockIdx.x * 64 + t;\n" + body + "\n}"
    )


def inputs(rng):
    x = rng.permutation(np.arange(1, 1000, dtype=np.int32))[:128]
    while x.ctypes.data % 8:
        x = x.copy()
    x.flags.writeable = False
    return x


def launch(source, x, order, checks, roots=()):
    y, z = np.full(128, -77, np.int32), np.zeros(16, np.int32)
    machine = Machine("sm_90a", order=order, seed=7, source_roots=roots, **dict.fromkeys(checks, True))
    run(source, "f", 2, 64, x, y, np.int32(128), z, machine=machine)
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", PLANTS)
def test_the_right_version_runs_clean(name, order, rng):
    plant, x = PLANTS[name], inputs(rng)
    every = ("check_global_writes", "check_uninitialised")
    for checks in ((), every):
        np.testing.assert_array_equal(launch(text(plant.body, False), x, order, checks), plant.expected(x))


@pytest.mark.parametrize("name", PLANTS)
def test_the_bug_is_reported(name, rng, tmp_path):
    plant, x = PLANTS[name], inputs(rng)
    source = text(plant.body, True)
    write_source(tmp_path, source)
    for order in plant.orders:
        with pytest.raises(plant.error, match=plant.message) as caught:
            launch(source, x, order, plant.checks, (tmp_path,))
        message = str(caught.value)
        assert f"program.cu:{line_of(source, '// BUG')}: " in message, f"{order}: {message}"
        assert message.startswith("f: ")
        assert re.search(r"CTA \(\d, 0, 0\),? thread \(\d+, 0, 0\)", message), message
        assert re.search(r"PTX line \d+: \S", message), message


def test_both_accesses_of_a_race_are_named(rng, tmp_path):
    source = text("""__shared__ int s[64];
        s[t] = x[i]; // FIRST
        y[i] = s[63 - t]; // BUG""", False)  # fmt: skip
    write_source(tmp_path, source)
    with pytest.raises(KernelFault) as caught:
        launch(source, inputs(rng), "min-pc", (), (tmp_path,))
    message = str(caught.value)
    first, second = line_of(source, "// FIRST"), line_of(source, "// BUG")
    assert "f: RAW race on shared memory: 4-byte load at shared offset 0x4fc: nothing orders it after the store of" in (
        message
    )
    assert "CTA (0, 0, 0), thread (63, 0, 0), at\n    PTX line" in message
    assert "CTA (0, 0, 0), thread (0, 0, 0), the first of 128 threads\n  PTX line" in message
    assert message.index(f"program.cu:{first}: ") < message.index(f"program.cu:{second}: ")


@pytest.mark.parametrize("order", ORDERS)
def test_bytes_of_one_word_and_equal_stores_are_no_race(order, rng):
    """Threads may fill the bytes of a word; a flag that many set to one value is counted, not reported."""
    source = text("""__shared__ u8 s[64]; __shared__ int any; if (t == 0) any = 0; __syncthreads();
        s[t] = (u8)x[i]; if (x[i] & 1) any = 1; __syncthreads(); y[i] = s[63 - t] * 2 + any;""", False)  # fmt: skip
    x = inputs(rng)
    y, z, machine = np.zeros(128, np.int32), np.zeros(16, np.int32), Machine("sm_90a", order=order, seed=3)
    report = run(source, "f", 2, 64, x, y, np.int32(128), z, machine=machine)
    odd = (x.reshape(2, 64) & 1).any(1, keepdims=True)
    np.testing.assert_array_equal(y.reshape(2, 64), (x & 255).reshape(2, 64)[:, ::-1] * 2 + odd)
    assert report.quiet_races > 0


def test_lanes_of_one_warp_may_write_one_word_in_one_instruction(rng):
    """One of them wins; between warps the same store is a race."""
    source = text("""__shared__ int s[1]; if (t >= 32 && t < LAST) s[0] = t; __syncthreads(); y[i] = s[0];""", False)
    x, y, z = inputs(rng), np.zeros(128, np.int32), np.zeros(16, np.int32)
    report = run(source.replace("LAST", "64"), "f", 2, 64, x, y, np.int32(128), z, arch="sm_90a")
    assert report.quiet_races > 0
    assert len(set(y.tolist())) == 1
    assert 32 <= y[0] < 64
    with pytest.raises(KernelFault, match="WAW race on shared memory"):
        run(source.replace("t >= 32 && t < LAST", "t < 64"), "f", 2, 64, x, y, np.int32(128), z, arch="sm_90a")


@pytest.mark.parametrize("order", ORDERS)
def test_a_lock_orders_what_it_protects(order):
    """Threads of one warp and of others; a fence on either side of the lock, as CUDA wants it."""
    source = text("""__shared__ int lock, sum; if (t == 0) { lock = 0; sum = 0; } __syncthreads();
        bool done = false;
        while (!done) if (atomicCAS(&lock, 0, 1) == 0) {
            __threadfence_block(); sum += x[i]; __threadfence_block(); atomicExch(&lock, 0); done = true; }
        __syncthreads(); y[i] = sum;""", False)  # fmt: skip
    x = np.arange(128, dtype=np.int32)
    np.testing.assert_array_equal(launch(source, x, order, ()), sums(x))


COPY = 'extern "C" __global__ void f(const int* x, int* y) { y[threadIdx.x] = x[threadIdx.x]; } // BUG'


def copy(machine, x, y):
    return run(COPY, "f", 1, 64, np.uint64(x), np.uint64(y), machine=machine)


def test_reads_of_what_nobody_wrote(tmp_path):
    write_source(tmp_path, COPY)
    machine = Machine("sm_90a", source_roots=(tmp_path,), check_uninitialised=True)
    a, b, c = (machine.memory.alloc(256, label=label) for label in "abc")
    machine.memory.mark_written(a, 256)
    copy(machine, a, b)  # -1 throughout, declared by the host
    copy(machine, b, a)  # written by a kernel
    machine.memory.view(c, 252)[:] = 5  # what differs from fresh memory was written by someone
    with pytest.raises(KernelFault, match="read of uninitialised global memory: 4 bytes") as caught:
        copy(machine, c, b)
    assert "252 bytes into \"c\"" in str(caught.value)
    assert "thread (63, 0, 0)" in str(caught.value)
    assert f"program.cu:{line_of(COPY, 'BUG')}: " in str(caught.value)


def test_use_after_free():
    machine = Machine("sm_90a")
    a, b = (machine.memory.alloc(256) for _ in "ab")
    copy(machine, a, b)
    machine.memory.free(a)
    with pytest.raises(KernelFault, match="use after free: 4-byte read"):
        copy(machine, a, b)


@pytest.mark.parametrize("checks", [(), ("check_global_writes", "check_uninitialised")])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("size", [4, 256, 1000])
def test_both_ends_of_every_range_are_guarded(size, own, checks):
    """One byte before and after faults, and so does the whole red zone of an allocation."""
    machine = Machine("sm_90a", **dict.fromkeys(checks, True))
    source = 'extern "C" __global__ void f(u8* y) { *y = 7; }'
    keep = np.zeros(size, np.uint8)
    if own:
        starts = [machine.memory.alloc(size) for _ in range(3)]
    else:
        starts = [keep.ctypes.data]
        machine.memory.register(starts[0], size, keep=keep)
    for start in starts:
        for at in (0, size - 1):
            run(source, "f", 1, 1, np.uint64(start + at), machine=machine)
        for at in (-1, size, *((-RED_ZONE, size + RED_ZONE - 1) if own else ())):
            with pytest.raises(KernelFault, match="out of bounds: 1-byte write"):
                run(source, "f", 1, 1, np.uint64(start + at), machine=machine)


def test_a_device_takes_the_checks(monkeypatch):
    device = EmulatedDevice("sm_90a", check_uninitialised=True)
    full, fresh, never = device.array(np.full(64, -1, np.int32)), device.empty(64, np.int32), device.empty(64, np.int32)
    copy(device.machine, full.ctypes.data, fresh.ctypes.data)
    with pytest.raises(KernelFault, match="uninitialised global"):
        copy(device.machine, never.ctypes.data, fresh.ctypes.data)
    monkeypatch.setenv("DSV4_RT_EMULATOR_CHECKS", "global-writes, uninitialised, tensor-fences")
    found = checks_from_environment()
    assert found == {"check_global_writes": True, "check_uninitialised": True, "check_tensor_fences": True}
    monkeypatch.setenv("DSV4_RT_EMULATOR_CHECKS", "")
    assert checks_from_environment() == {}
    monkeypatch.setenv("DSV4_RT_EMULATOR_CHECKS", "races")
    with pytest.raises(DeviceError, match="'races' is none of global-writes, uninitialised"):
        checks_from_environment()
