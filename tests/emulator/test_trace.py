"""Traces: which threads and lines they show, and that a machine without one runs the same code as ever."""

import re

import numpy as np
import pytest
from emulating import TINY, args, finds, refused

from dsv4_rt.emulator import Machine, Tracer
from dsv4_rt.errors import EmulatorError


def test_trace_of_one_thread(emulate):
    line = TINY.splitlines().index("    @%p add.s32 %r3, %r2, -40;") + 1
    _, out, _ = emulate("tiny.ptx", *args("buf:i32:32", "u32:8"), "--trace", "cta=0,0,0:thread=3,0,0")
    trace = out.split("\n\n")[0].splitlines()
    assert len(trace) == 9  # as many as the kernel has instructions
    assert all(each.startswith("cta 0,0,0 thread 3,0,0  PTX ") for each in trace)
    assert trace[2].endswith("mov.u32 %r2, %tid.x;  %r2=3")
    assert trace[3].endswith("setp.lt.u32 %p, %r2, %r1;  %p=1")
    assert trace[5].endswith(f"PTX {line}  @%p add.s32 %r3, %r2, -40;  %r3=-37")
    assert re.search(r"st\.global\.u32 \[%rd2\], %r3;  %rd2=0x[0-9a-f]+  %r3=4294967259$", trace[7])
    _, out, _ = emulate("tiny.ptx", *args("buf:i32:32", "u32:8"), "--trace", "thread=9")
    assert "add.s32 %r3, %r2, -40;  guard false\n" in out


def test_trace_of_a_warp_with_cuda_lines(emulate):
    specs = args("buf:f32:4x128:arange", "buf:f32:4")
    launch = ("sum.cu", "--grid", 4, "--block", 128, *specs)
    found = finds(emulate, *launch, "--trace", "cta=2:warp=0")
    trace = found["trace"]
    assert found["trace_dropped"] == 0
    tids = " ".join(str(i) for i in range(32))
    assert any(f"%tid.x;  %r2=[{tids}]" in line and "sum.cu:7" in line for line in trace)
    assert all(line.startswith("cta 2,0,0 ") for line in trace)
    additions = [line for line in trace if "add.f32" in line]
    lanes = ("0xffffffff", "0xffffffff", "0x0000ffff", "0x000000ff", "0x0000000f", "0x00000003", "")
    assert len(additions) == len(lanes)
    for line, mask in zip(additions, lanes, strict=True):
        assert ("thread 0,0,0" in line) if not mask else (f"warp 0 lanes {mask}" in line)
        assert "sum.cu:10" in line
    assert additions[-1].endswith("=40896.0")
    loads = [line for line in trace if "ld.shared." in line]
    assert re.search(r"=\[(\d+\.0 ?)+\]$", loads[0])  # bits that an addition of floats takes are shown as floats


def test_trace_of_a_cta_in_a_later_batch(emulate):
    launch = ("sum.cu", "--grid", "4,5,8", "--block", 128, *args("buf:f32:160x128:arange", "buf:f32:160"))
    trace = finds(emulate, *launch, "--trace", "cta=1,2,6:thread=0")["trace"]
    assert trace
    assert all(line.startswith("cta 1,2,6 thread 0,0,0  ") for line in trace)


def test_trace_names_calls_that_are_inlined(emulate, tmp_path):
    source = """__device__ __forceinline__ int twice(int v) {
    return v * 2 + 1;
}
extern "C" __global__ void g(int* x) {
    x[threadIdx.x] = twice(x[threadIdx.x]);
}"""
    (tmp_path / "g.cu").write_text(source)
    assert any("g.cu:2 < g.cu:5" in line for line in finds(
        emulate, "g.cu", "--block", 32, *args("buf:i32:32"), "--trace"
    )["trace"])  # fmt: skip


def test_trace_limit_and_a_machine_without_a_trace(emulate):
    specs = args("buf:i32:32", "u32:8")
    found = finds(emulate, "tiny.ptx", *specs, "--trace", "--trace-limit", 4)
    assert (len(found["trace"]), found["trace_dropped"]) == (4, 5)
    assert "5 more lines; --trace-limit" in emulate("tiny.ptx", *specs, "--trace", "--trace-limit", 4)[1]
    without = finds(emulate, "tiny.ptx", *specs)
    assert without["trace"] == []
    assert without["opcodes"] == found["opcodes"]


def test_trace_does_not_change_results(emulate, rng):
    np.save("x.npy", rng.standard_normal(512, np.float32))
    launch = ("sum.cu", "--grid", 4, "--block", 128, *args("in:x.npy", "out:s.npy:f32:4"))
    finds(emulate, *launch)
    plain = np.load("s.npy").tobytes()
    finds(emulate, *launch, "--order", "random", "--trace", "warp=3")
    assert np.load("s.npy").tobytes() == plain


def test_generated_code_has_trace_calls_only_in_a_machine_that_traces():
    steps = []
    out = np.zeros(32, np.int32)
    for trace in (None, steps.append):
        machine = Machine("sm_90a", trace=trace)
        module = machine.load(TINY, "tiny")
        machine.memory.register(out.ctypes.data, out.nbytes)
        params = out.ctypes.data.to_bytes(8, "little") + (8).to_bytes(4, "little")
        report = machine.launch(module, "tiny", 1, 32, params)
        assert ("trace" in module.program("tiny").namespace) == (trace is not None)
    assert len(steps) == report.warp_instructions == 9
    guarded = steps[5]
    assert guarded.ins.op == "add"
    assert guarded.passed.tolist() == [i < 8 for i in range(32)]
    ((register, values),) = guarded.registers
    assert register.name == "%r3"
    assert values.view(np.int32).tolist() == out.tolist()
    assert guarded.batch.thread(int(guarded.lanes[7])) == ((0, 0, 0), (7, 0, 0))


@pytest.mark.parametrize(
    "select", ["", "cta", "cta=", "cta=1,2,3,4", "lane=3", "warp=0:warp=1", "warp=0,1", "thread=-1"]
)
def test_trace_selections_that_are_none(select):
    with pytest.raises(EmulatorError, match="^trace: "):
        Tracer(print, select)


def test_trace_selections_outside_the_launch(emulate):
    launch = ("tiny.ptx", *args("buf:i32:32", "u32:8"), "--trace")
    refused(emulate(*launch, "cta=1"), "--trace cta=1,0,0: there are 1,1,1")
    refused(emulate(*launch, "thread=0,1"), "--trace thread=0,1,0: there are 32,1,1")
    refused(emulate(*launch, "warp=1"), "--trace warp=1: a CTA has 1")
