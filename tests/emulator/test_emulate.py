"""python -m dsv4_rt emulate: what it runs, what it prints, and what it says when arguments or kernels are wrong."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from emulating import SUM, TINY, args, finds, refused
from programs import compile_ptx

# Every size of parameter, and a structure by value.
SCALARS = """struct Pair { int a; short b; };
extern "C" __global__ void f(double* out, signed char a, unsigned short b, int c, unsigned long long d, float e,
                             double g, Pair p, unsigned short half) {
    out[0] = a; out[1] = b; out[2] = c; out[3] = d; out[4] = e; out[5] = g; out[6] = p.a; out[7] = p.b; out[8] = half;
}
extern "C" __global__ void other(int* x) {
    extern __shared__ int s[];
    s[threadIdx.x] = 1;
    if (threadIdx.x == 0) x[0] = s[0];
}
"""


@pytest.fixture(scope="module")
def scalars():
    return compile_ptx(SCALARS, "sm_90a")


# ------------------------------------------------------------------------------------------------------- running


@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
def test_adds_vectors_from_files_into_a_file(emulate, rng, order):
    x, y = rng.standard_normal((2, 1000), np.float32)
    np.save("x.npy", x)
    np.save("y.npy", y)
    launch = ("--grid", 4, "--block", 256, "--order", order, "--seed", 3)
    found = finds(emulate, "add.cu", *launch, *args("in:x.npy", "inout:y.npy", "out:z.npy:f32:1000", "i32:1000"))
    z = np.load("z.npy")
    assert z.tobytes() == (x + y).tobytes()
    assert (found["ok"], found["fault"], found["kernel"], found["order"]) == (True, None, "add", order)
    assert (found["ctas"], found["threads"], found["grid"], found["block"]) == (4, 1024, [4, 1, 1], [256, 1, 1])
    assert found["instructions"] == sum(found["opcodes"].values())
    assert found["opcodes"]["st"] == 1000
    assert found["warp_instructions"] * 32 >= found["instructions"]
    untouched, written = found["buffers"]
    assert untouched["argument"] == "inout:y.npy"
    assert (untouched["changed"], untouched["saved"]) == (0, None)
    assert (written["changed"], written["saved"], written["shape"]) == (1000, "z.npy", [1000])
    np.testing.assert_array_equal(np.float32(written["first"] + written["last"]), np.r_[z[:3], z[-3:]])
    assert np.float32(written["min"]) == z.min()
    assert np.float32(written["max"]) == z.max()


def test_prints_counts_opcodes_and_buffers(emulate):
    specs = args("buf:f32:4x128:arange", "buf:f32:4")
    code, out, err = emulate("sum.cu", "--grid", 4, "--block", 128, *specs, "--histogram", 2)
    assert (code, err) == (0, "")
    assert re.search(r"block_sum\w*: grid 4 x 1 x 1, block 128 x 1 x 1, emulated sm_100a\n", out)
    assert re.search(r"[\d,]+ instructions of 512 threads, \d+ of warps, 4 CTAs, \d+\.\d{3} s\n", out)
    table = out.split("Opcodes")[1].split("Buffers")[0].strip().splitlines()
    assert len(table) == 3  # the heading and the two that were asked for
    assert re.search(r"1 +buf:f32:4 +4 of 4 +8128 24512 40896 57280 +8128 +57280", out)
    assert re.search(r"0 +buf:f32:4x128:arange +0 of 512 +0 1 2 +\.\.\. +509 510 511 +0 +511", out)
    assert "Opcodes" not in emulate("sum.cu", "--grid", 4, "--block", 128, *specs, "--histogram", 0)[1]


def test_every_scalar_lands_where_the_kernel_reads_it(emulate, scalars, tmp_path):
    (tmp_path / "s.ptx").write_text(scalars)
    half = np.array(1.5).astype(ml_dtypes.bfloat16).view(np.uint16)
    given = ("i8:-3", "u16:65535", "i32:-0x10", "u64:4503599627370497", "f32:1.5", "f64:-2.25", "hex:07000000feff0000")
    specs = args("out:o.npy:f64:9", *given, "bf16:1.5")
    found = finds(emulate, "s.ptx", "--kernel", "f", "--block", 1, *specs)
    expected = [-3, 65535, -16, 4503599627370497, 1.5, -2.25, 7, -2, int(half)]
    assert np.load("o.npy").tolist() == expected
    assert found["arch"] == "sm_90a"  # the PTX says so
    assert finds(emulate, "s.ptx", "--kernel", "f", "--block", 1, "--arch", "sm_100a", *specs)["arch"] == "sm_100a"


def test_fills_of_buffers(emulate):
    kernel = ("tiny.ptx", *args("buf:i32:4x8:random", "u32:0"))
    first, again = (finds(emulate, *kernel)["buffers"][0] for _ in range(2))
    assert first == again
    assert (first["changed"], first["dtype"], first["shape"]) == (32, "int32", [4, 8])
    assert (first["first"], first["min"], first["max"]) == ([5, 5, 5], 5, 5)
    for fill, value in (("zeros", 32), ("ones", 32), ("arange", 31)):  # 5 is already there
        assert finds(emulate, "tiny.ptx", *args(f"buf:i32:32:{fill}", "u32:0"))["buffers"][0]["changed"] == value


def test_orders_and_seeds_are_other_schedules(emulate, tmp_path):
    (tmp_path / "late.cu").write_text("""extern "C" __global__ void late(int* y) {
    __shared__ int s[64];
    if (threadIdx.x < 32) s[threadIdx.x] = threadIdx.x;  // and no barrier
    y[threadIdx.x] = s[threadIdx.x & 31];
}""")
    launch = ("late.cu", "--block", 64, *args("buf:i32:64"))
    code, out, _ = emulate(*launch, "--order", "reverse")
    assert code == 1
    assert "late.cu:4" in out
    assert any(emulate(*launch, "--order", "random", "--seed", seed)[0] == 1 for seed in range(10))
    launch = ("sum.cu", "--grid", 4, "--block", 128, *args("buf:f32:4x128", "buf:f32:4"), "--order", "random")
    assert len({finds(emulate, *launch, "--seed", seed)["warp_instructions"] for seed in range(10)}) > 1


def test_random_buffers_follow_the_seed(emulate):
    def sums(seed, *specs):
        specs = args(*specs, "buf:f32:1")
        return finds(emulate, "sum.cu", "--block", 128, "--seed", seed, *specs)["buffers"][-1]["first"]

    assert sums(1, "buf:f32:128:random") == sums(1, "buf:f32:128:random")
    assert sums(1, "buf:f32:128:random") != sums(2, "buf:f32:128:random")


def test_out_is_not_zero_before_the_launch_and_nan_is_text(emulate):
    found = finds(emulate, "add.cu", "--block", 32, *args("buf:f32:9", "buf:f32:9", "out:z.npy:f32:9", "i32:4"))
    z = found["buffers"][2]
    assert (z["changed"], z["nan"], z["min"], z["last"]) == (4, 5, 0, ["nan", "nan", "nan"])


def test_bfloat16_buffers_are_saved_as_bits(emulate):
    found = finds(emulate, "tiny.ptx", *args("out:b.npy:bf16:64", "u32:32"))["buffers"][0]
    assert np.load("b.npy").dtype == np.uint16
    assert np.load("b.npy").view(np.int32)[3] == 3 - 40
    assert found["dtype"] == "bfloat16"


def test_inout_is_written_back_only_with_write(emulate):
    np.save("a.npy", np.zeros(32, np.int32))
    specs = args("inout:a.npy", "u32:0x10")
    assert finds(emulate, "tiny.ptx", *specs)["buffers"][0]["saved"] is None
    assert not np.load("a.npy").any()
    assert finds(emulate, "tiny.ptx", *specs, "--write")["buffers"][0]["saved"] == "a.npy"
    assert np.load("a.npy").tolist() == [i - 40 if i < 16 else 5 for i in range(32)]


def test_dynamic_shared_memory(emulate, scalars, tmp_path):
    (tmp_path / "s.ptx").write_text(scalars)
    launch = ("s.ptx", "--kernel", "other", "--block", 32, *args("buf:i32:1"))
    assert finds(emulate, *launch, "--shared", 128)["buffers"][0]["first"] == [1]
    code, out, _ = emulate(*launch, "--shared", 64)
    assert code == 1
    assert "past the end of the 64 B of shared memory" in out
    refused(emulate(*launch, "--shared", 1 << 20), "other", "a CTA has 232,448")


# ------------------------------------------------------------------------------------------------------- listing


def test_lists_entries(emulate, scalars, tmp_path):
    (tmp_path / "s.ptx").write_text(scalars)
    code, out, _ = emulate("s.ptx", "--list")
    assert code == 0
    assert re.search(r"f +f_param_0: 8, f_param_1: 1, f_param_2: 2,", out)
    found = {each["name"]: each for each in finds(emulate, "s.ptx", "--list")}
    assert [size for _, size in found["f"]["parameters"]] == [8, 1, 2, 4, 8, 4, 8, 8, 2]
    assert (found["other"]["shared_bytes"], found["other"]["problem"]) == (0, None)
    (tile,) = finds(emulate, "sum.cu", "--list")
    assert (tile["shared_bytes"], tile["max_threads"]) == (512, 128)
    found = finds(emulate, "sum.cu", "--list", "--kernel", "tile_sum<8>")
    assert any("tile_sum" in each["name"] for each in found)


def test_lists_what_cannot_run(emulate, tmp_path):
    (tmp_path / "t.ptx").write_text(TINY.replace("mov.u32 %r3, 5;", "frobnicate.u32 %r3, 5;"))
    code, out, _ = emulate("t.ptx", "--list")
    assert code == 0
    assert "frobnicate.u32 is not implemented" in out
    assert "PTX line 13" in finds(emulate, "t.ptx", "--list")[0]["problem"]


def test_which_kernel(emulate, scalars, tmp_path):
    (tmp_path / "s.ptx").write_text(scalars)
    refused(emulate("s.ptx", "--block", 1), "has 2 entries", "other(other_param_0: 8 B)", "f_param_8: 2 B")
    refused(emulate("s.ptx", "--block", 1, "--kernel", "nope"), "0 entries like 'nope'", "other(", "f(")
    assert finds(emulate, "s.ptx", "--kernel", "oth", "--block", 1, "--shared", 4, *args("buf:i32:1"))
    refused(emulate("sum.cu", "--kernel", "nope", "--block", 1), "there is no kernel nope", "block_sum")
    tile = finds(emulate, "sum.cu", "--kernel", "tile_sum<4>", "--block", 1, *args("u64:0", "u64:0"))
    assert "tile_sum" in tile["kernel"]
    (tmp_path / "two.ptx").write_text(compile_ptx(SUM.replace("template <int N>", ""), "sm_90a"))
    refused(emulate("two.ptx", "--kernel", "sum"), "has 2 entries like 'sum'")
    specs = args("buf:f32:128", "buf:f32:1")
    assert "9block_sum" in finds(emulate, "two.ptx", "--kernel", "block_sum", "--block", 128, *specs)["kernel"]
    (tmp_path / "t.cu").write_text("template <int N>\n__global__ void g(int* x) { x[0] = N; }\n")
    refused(emulate("t.cu", "--block", 1), "--kernel 'f<128>'", "g<int N>  t.cu(2)")


# -------------------------------------------------------------------------------------------- faults and refusals


def test_a_fault_is_the_answer(emulate):
    launch = ("add.cu", "--block", 64, *args("buf:f32:60", "buf:f32:64", "out:z.npy:f32:64", "i32:64"))
    code, out, err = emulate(*launch, "--trace", "thread=60")
    assert (code, err) == (1, "")
    trace, report = out.split("\n\n")
    assert trace.splitlines()[-1].startswith("cta 0,0,0 thread 60,0,0")
    assert report.startswith("add: out of bounds: 4-byte read at 0x")
    assert '0 bytes past the end of "argument 0, buf:f32:60"' in report
    assert "CTA (0, 0, 0), thread (60, 0, 0), the first of 4 threads" in report
    assert "add.cu:3: if (i < n) z[i] = x[i] + y[i];" in report
    code, out, _ = emulate(*launch, "--json")
    found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    assert re.sub("0x[0-9a-f]+", "", found["fault"]) == re.sub("0x[0-9a-f]+", "", report.strip())
    with pytest.raises(FileNotFoundError):
        np.load("z.npy")


def test_a_fault_quotes_a_source_in_another_folder(emulate, tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "add.cu").rename(tmp_path / "below" / "sum_of_two.cu")
    _, out, _ = emulate("below/sum_of_two.cu", "--block", 8, *args("u64:0", "u64:0", "buf:f32:8", "i32:8"))
    assert "null pointer" in out
    assert "sum_of_two.cu:3: if (i < n) z[i] = x[i] + y[i];" in out


def test_in_is_read_only_and_a_deadlock_is_a_fault(emulate, tmp_path):
    np.save("a.npy", np.zeros(32, np.int32))
    code, out, _ = emulate("tiny.ptx", *args("in:a.npy", "u32:0"))
    assert code == 1
    assert "write to read-only memory" in out
    (tmp_path / "w.cu").write_text('extern "C" __global__ void w(volatile int* x) { while (x[0] == 0) {} }')
    code, out, _ = emulate("w.cu", "--block", 32, *args("buf:i32:1"))
    assert code == 1
    assert "poll memory that nobody writes" in out


def test_an_unknown_instruction_is_an_error(emulate, tmp_path):
    (tmp_path / "t.ptx").write_text(TINY.replace("mov.u32 %r3, 5;", "frobnicate.u32 %r3, 5;"))
    result = emulate("t.ptx", *args("buf:i32:32", "u32:0"))
    refused(result, "tiny: instruction frobnicate.u32 is not implemented", "PTX line 13")


def test_wrong_arguments_show_the_parameters(emulate):
    few = emulate("tiny.ptx", *args("buf:i32:32"))
    refused(few, "tiny has 2 parameters, 1 arguments are given", "0  out", "buf:i32:32 (8 bytes)", ">  1  k")
    refused(emulate("tiny.ptx", *args("buf:i32:32", "u32:1", "u32:2")), "tiny has 2 parameters, 3", ">  2  -")
    wide = emulate("tiny.ptx", *args("buf:i32:32", "u64:1"))
    refused(wide, "--arg u64:1 has 8 bytes, parameter 1 4", "0  out", ">  1  k", "4 bytes", "u64:1 (8 bytes)")
    refused(emulate("tiny.ptx", *args("u32:1", "buf:i32:32")), ">  0  out", ">  1  k")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("7", "wanted one of i32:5"),
        ("x32:7", "wanted one of"),
        ("i32:", "'' is not an integer"),
        ("i32:1.5", "'1.5' is not an integer"),
        ("i8:128", "128 does not lie in -128 ... 127"),
        ("u32:-1", "does not lie in 0"),
        ("f32:one", "'one' is not a number"),
        ("hex:123", "not pairs of hexadecimal digits"),
        ("buf:f32", "wanted buf:TYPE:SHAPE[:FILL]"),
        ("buf:q32:4", "no type 'q32'; types: i8"),
        ("buf:f32:4y4", "'4y4' is not a size such as 1024 or 64x256"),
        ("buf:f32:4:noise", "fills: zeros, ones, arange, random"),
        ("buf:f32:4:ones:2", "wanted buf:TYPE:SHAPE[:FILL]"),
        ("buf:f64:999999999999", "the largest buffer has"),
        ("in:", "wanted one of"),
        ("in:missing.npy", "cannot read missing.npy: No such file"),
        ("in:tiny.ptx", "tiny.ptx is not a .npy file of numbers"),
        ("out:x.npy", "wanted one of"),
        ("out:x.npy:f32:?", "'?' is not a size"),
    ],
)
def test_specs_that_are_none(emulate, spec, problem):
    refused(emulate("tiny.ptx", *args(spec, "u32:0")), f"--arg {spec}: ", problem)


def test_launches_that_cannot_be(emulate, tmp_path):
    specs = args("buf:i32:32", "u32:0")
    refused(emulate("tiny.ptx", "--block", 64, *specs), "block (64, 1, 1); the kernel requires (32, 1, 1)")
    refused(emulate("add.cu", *args("u64:0", "u64:0", "u64:0", "i32:0")), "give --block")
    refused(emulate("nothing.ptx"), "cannot read nothing.ptx: No such file")
    refused(emulate("tiny.ptx", *args("out:no/where.npy:i32:32", "u32:0")), "cannot write no/where.npy")
    (tmp_path / "bad.ptx").write_text(TINY[:-3] + "bra nowhere;\n}\n")
    refused(emulate("bad.ptx", *specs), "no label nowhere")
    (tmp_path / "cut.ptx").write_text(TINY[: TINY.index("{") - 20])
    refused(emulate("cut.ptx", *specs))
    for option in (("--grid", "0"), ("--grid", "1,2,3,4"), ("--block", "a"), ("--arch", "sm_80"), ("--shared", "-1")):
        with pytest.raises(SystemExit) as stopped:
            emulate("tiny.ptx", *option)
        assert stopped.value.code == 2


CLUSTER = """extern "C" __global__ void ranks(int* out) {
    int r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    if (threadIdx.x == 0) out[blockIdx.x] = r;
}
"""


def test_clusters(emulate, tmp_path):
    (tmp_path / "ranks.cu").write_text(CLUSTER)
    launch = ("ranks.cu", "--grid", 4, "--block", 32, "--arg", "buf:i32:4:zeros")
    assert finds(emulate, *launch)["cluster"] is None
    found = finds(emulate, *launch, "--cluster", 2)
    assert found["cluster"] == [2, 1, 1]
    assert found["buffers"][0]["first"] == [0, 1, 0]
    refused(emulate(*launch, "--cluster", 3), "clusters of (3, 1, 1) do not divide the grid (4, 1, 1)")
