"""launch.py: what is checked before a launch, and that a launch is what was asked for."""

import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from dsv4_rt import ArgumentError, CompileError, DeviceError, KernelFault, LaunchError
from dsv4_rt.launch import POINTER, load

PROBE = str(Path(__file__).with_name("probe.cu"))


def test_fills_exactly_what_it_should(device):
    out = device.array(np.zeros(1000, np.int32))
    load(PROBE, "fill").launch(4, 256, out, np.int32(999), np.int32(7))
    got = device.numpy(out)
    assert np.array_equal(got[:999], 7 + np.arange(999))
    assert got[999] == 0


def test_grid_block_and_dynamic_shared_memory_arrive(device):
    out = device.array(np.full((24, 8), -1, np.int32))
    load(PROBE, "shape").launch((2, 3, 4), (8, 4, 2), out, shared=1024)
    assert (device.numpy(out) == [2, 3, 4, 8, 4, 2, 1, 1024]).all()


def test_every_width_of_parameter(device):
    out = device.array(np.zeros(6, np.int64))
    pair = np.array([(-5, 6.0)], [("first", "<i4"), ("second", "<f4")]).tobytes()
    load(PROBE, "widths").launch(1, 1, out, np.int8(-1), np.float64(2), np.int16(-3), pair, np.uint8(200))
    assert device.numpy(out).tolist() == [-1, 2, -3, -5, 6, 200]


def test_large_dynamic_shared_memory(device):
    n = 1024
    out = device.array(np.arange(n, dtype=np.int32))
    load(PROBE, "reverse_shared").launch(1, n, out, shared=100 * 1024)  # past the 48 KB that need no permission
    assert np.array_equal(device.numpy(out), np.arange(n)[::-1])


def test_prepared_rewrites_every_pointer_and_nothing_else(device):
    kernel = load(PROBE, "fill")
    ready = kernel.prepare(1, 32, POINTER, np.int32(4), np.int32(100))
    first, second = (device.array(np.zeros(8, np.int32)) for _ in range(2))
    for array in (first, second):
        ready.launch([address(array)])
    ready()  # as it stands: the second array again
    expected = [100, 101, 102, 103, 0, 0, 0, 0]
    assert device.numpy(first).tolist() == device.numpy(second).tolist() == expected


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def test_a_prepared_launch_may_be_shared_by_threads(device):
    ready = load(PROBE, "fill").prepare(1, 32, POINTER, np.int32(32), np.int32(5))
    arrays = [device.array(np.zeros(32, np.int32)) for _ in range(24)]

    def work(mine):
        for array in mine:
            ready.launch([address(array)])

    threads = [threading.Thread(target=work, args=(arrays[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.synchronize()
    for array in arrays:
        assert np.array_equal(device.numpy(array), 5 + np.arange(32))


def test_refuses_arguments_that_do_not_fit(emulator):
    fill, out = load(PROBE, "fill"), np.zeros(8, np.int32)
    with pytest.raises(LaunchError, match="fill: 2 arguments given, the kernel has 3"):
        fill.launch(1, 32, out, np.int32(1))
    with pytest.raises(LaunchError, match=r"argument 1 \(np.int64\(1\)\) has 8 B, the kernel's parameter 4 B"):
        fill.launch(1, 32, out, np.int64(1), np.int32(1))
    with pytest.raises(LaunchError, match=r"argument 1 \(a pointer\) has 8 B, the kernel's parameter 4 B"):
        fill.prepare(1, 32, POINTER, POINTER, np.int32(1))
    with pytest.raises(ArgumentError, match=r"argument 1 is a int; its width is ambiguous.*4 B"):
        fill.prepare(1, 32, POINTER, 1, np.int32(1))
    with pytest.raises(LaunchError, match=r"fill: 1 pointers are wanted, \[\] given"):
        fill.prepare(1, 32, POINTER, np.int32(1), np.int32(1)).launch([])
    with pytest.raises(ArgumentError, match=r"argument 1 is a int; its width is ambiguous"):
        fill.launch(1, 32, out, 1, np.int32(1))
    with pytest.raises(ArgumentError, match="str is no array"):
        fill.launch(1, 32, "out", np.int32(1), np.int32(1))


def test_refuses_geometry_that_does_not_fit(emulator):
    fill, pairs = load(PROBE, "fill"), load(PROBE, "in_pairs")
    args = (POINTER, np.int32(1), np.int32(1))
    for grid, block, options, message in [
        (1, 257, {}, r"257 threads a block; the kernel allows at most 256(.|\n)*the kernel uses \d+ registers"),
        (0, 32, {}, "every grid dimension must be 1 to"),
        ((1, 65536), 32, {}, "every grid dimension must be 1 to"),
        ((1, 1, 1, 1), 32, {}, "1 to 3 dimensions"),
        (1, 32, {"shared": 228 * 1024}, r"dynamic shared memory; emulated sm_100a gives a block 232448 B"),
        (1, 32, {"shared": -1}, "dynamic shared memory"),
        (5, 32, {"cluster": (2,)}, r"clusters of \(2, 1, 1\) do not divide the grid"),
        (32, 32, {"cluster": (32,)}, "a cluster has 1 to 16 blocks"),
        (1, 32, {"pdl": True}, "without griddepcontrol.wait is a race"),
    ]:
        with pytest.raises((LaunchError, ArgumentError), match=message):
            fill.prepare(grid, block, *args, **options)
    with pytest.raises(LaunchError, match=r"compiled for clusters of \(2, 1, 1\)"):
        pairs.prepare(4, 32, POINTER, cluster=(4,))
    with pytest.raises(LaunchError, match="do not divide the grid"):
        pairs.prepare(3, 32, POINTER)


def test_pdl_of_a_kernel_that_waits(device):
    out = device.array(np.zeros(32, np.int32))
    kernel = load(PROBE, "waits")
    for _ in range(5):
        kernel.launch(1, 32, out, pdl=True)
    assert (device.numpy(out) == 5).all()


def test_names_the_kernels_that_exist(emulator):
    with pytest.raises(CompileError, match=r"(?s)no_such.*fill.*widths"):
        load(PROBE, "no_such")


def test_a_store_out_of_bounds_names_kernel_thread_and_line(emulator):
    with pytest.raises(KernelFault, match=r"(?s)store_far.*probe\.cu"):
        load(PROBE, "store_far").launch(1, 1, np.zeros(4, np.int32), np.int64(4))


def test_cluster_and_cooperative_launches(gpu):
    out = gpu.array(np.full((8, 8), -1, np.int32))
    load(PROBE, "shape").launch(8, 32, out, cluster=(4,))
    assert (gpu.numpy(out)[:, 6] == 4).all()
    load(PROBE, "shape").launch(8, 32, out, cooperative=True)
    assert (gpu.numpy(out)[:, 6] == 1).all()
    load(PROBE, "shape").launch(16, 32, gpu.array(np.zeros((16, 8), np.int32)), cluster=(16,))  # not portable, allowed
    with pytest.raises(
        LaunchError, match=r"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE(.|\n)*usual cause: a cooperative grid"
    ):
        load(PROBE, "shape").launch(10**6, 1024, out, cooperative=True)
    gpu.synchronize()


def test_launches_are_legal_in_graph_capture(gpu):
    import cupy

    out = gpu.array(np.zeros(32, np.int32))
    kernel = load(PROBE, "waits")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        kernel.launch(1, 32, out)
        kernel.launch(1, 32, out, pdl=True)
        graph = stream.end_capture()
        for _ in range(10):
            graph.launch(stream)
        stream.synchronize()
    assert (gpu.numpy(out) == 20).all()


def test_a_thread_without_a_context_can_launch(gpu):
    out = gpu.array(np.zeros(64, np.int32))
    ready = load(PROBE, "fill").prepare(1, 64, POINTER, np.int32(64), np.int32(1))
    thread = threading.Thread(target=ready.launch, args=([out.data.ptr],))
    thread.start()
    thread.join()
    gpu.synchronize()
    assert np.array_equal(gpu.numpy(out), 1 + np.arange(64))


@pytest.mark.parametrize("sync", ["0", "1"])
def test_a_dead_context_names_its_killer_ever_after(gpu, sync):
    program = f"""
        import numpy as np, dsv4_rt
        from dsv4_rt.launch import load
        device = dsv4_rt.device()
        out = device.array(np.zeros(32, np.int32))
        fill = load({PROBE!r}, "fill")
        far = load({PROBE!r}, "store_far")
        fill.launch(1, 32, out, np.int32(32), np.int32(0))
        device.synchronize()
        for attempt in range(3):
            try:
                far.launch(1, 1, out, np.int64(1 << 40))
                device.synchronize()
            except dsv4_rt.DeviceError as error:
                print(attempt, str(error).replace(chr(10), " | "))
        try:
            fill.launch(1, 32, out, np.int32(32), np.int32(0))
        except dsv4_rt.DeviceError as error:
            print("later", str(error).replace(chr(10), " | "))
    """
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"DSV4_RT_SYNC": sync, "DSV4_RT_DEVICE": "cuda:0"},
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    for line in lines:
        assert "the context of cuda:0 is dead" in line
        assert "killed by store_far" in line
        assert "grid 1, block 1" in line
        assert "CUDA_ERROR_ILLEGAL_ADDRESS (700)" in line
        assert "usual cause: an index out of bounds" in line


def test_refuses_a_device_that_does_not_exist():
    from dsv4_rt import open_device

    with pytest.raises(DeviceError, match="none of cuda, cuda:N, emulator, emulator:sm_90a"):
        open_device("tpu")
    with pytest.raises(DeviceError, match="none of"):
        open_device("emulator:sm_80")
    with pytest.raises(DeviceError, match=r"cuda:99 does not exist|no CUDA driver"):
        open_device("cuda:99")


def test_refuses_dimensions_that_are_no_integers(emulator):
    fill = load(PROBE, "fill")
    for grid in ((2.9,), 2.9, "2"):
        with pytest.raises(ArgumentError, match="the dimensions of grid, block and cluster are integers"):
            fill.launch(grid, 32, np.zeros(4, np.int32), np.int32(4), np.int32(0))
    with pytest.raises(LaunchError, match="the third dimension of a block must be at most 64"):
        fill.launch(1, (1, 1, 65), np.zeros(4, np.int32), np.int32(4), np.int32(0))


def test_refuses_arrays_of_another_byte_order(emulator):
    with pytest.raises(ArgumentError, match=r"array 0 is >i4; its byte order is not this machine's"):
        load(PROBE, "fill").launch(1, 32, np.zeros(4, ">i4"), np.int32(4), np.int32(0))


def test_defines_reach_the_compiler_as_numbers(emulator, tmp_path):
    source = tmp_path / "flag.cu"
    source.write_text(
        'extern "C" __global__ void k(int* out) {\n#if FLAG\n *out = 1;\n#else\n *out = 2;\n#endif\n}\n'
    )
    for flag, expected in ((True, 1), (False, 2), (3, 1)):
        out = np.zeros(1, np.int32)
        load(str(source), "k", FLAG=flag).launch(1, 1, out)
        assert out[0] == expected
    with pytest.raises(ArgumentError, match="defines are names with a string, a number or None"):
        load(str(source), "k", FLAG=[1])


def test_a_fault_leaves_no_host_array_registered(emulator):
    with pytest.raises(KernelFault):
        load(PROBE, "store_far").launch(1, 1, np.zeros(4, np.int32), np.int64(1 << 30))
    assert emulator.machine.memory._foreign == {}


def test_two_launches_of_one_kernel_keep_their_shared_memory(gpu):
    kernel = load(PROBE, "reverse_shared")
    n = 1024
    large = kernel.prepare(1, n, POINTER, shared=200 * 1024)
    kernel.prepare(1, n, POINTER, shared=100 * 1024)
    out = gpu.array(np.arange(n, dtype=np.int32))
    large.launch([out.data.ptr])
    assert np.array_equal(gpu.numpy(out), np.arange(n)[::-1])


def test_a_fault_of_others_is_not_blamed_on_us(gpu):
    """Another library kills the context; the launch that the driver then refuses did not do it."""
    program = f"""
        import cupy, numpy as np, dsv4_rt
        from dsv4_rt.launch import load
        device = dsv4_rt.device()
        out = device.array(np.zeros(32, np.int32))
        fill = load({PROBE!r}, "fill")
        fill.launch(1, 32, out, np.int32(32), np.int32(0))
        device.synchronize()
        bad = cupy.RawKernel('extern "C" __global__ void bad(long long a) {{ *(volatile int*)a = 1; }}', "bad")
        bad((1,), (1,), (8,))
        try:
            device.numpy(out)
        except dsv4_rt.DeviceError as error:
            print(str(error).replace(chr(10), " | "))
        try:
            fill.launch(1, 32, out, np.int32(32), np.int32(0))
        except dsv4_rt.DeviceError as error:
            print(str(error).replace(chr(10), " | "))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    for line in lines:
        assert "killed by work that this package did not launch" in line
