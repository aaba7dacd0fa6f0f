"""compile(): what it gives, what it depends on, what it says when a source is wrong, and threads."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsv4_rt.compile import ARCHITECTURES, cache_info, compile, compiler_build, kernels_dir
from dsv4_rt.errors import ArgumentError, CompileError
from dsv4_rt.sources import declarations

module = sys.modules["dsv4_rt.compile"]  # the module: the name is the function here

SCALE = """\
#include "inner.cuh"
template <int K, typename T>
__global__ void __launch_bounds__((32) * (K > 1 ? K : 1)) scale(T* x, int n) {
    static_assert(K < 8, "K must be below 8");
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = twice(x[i]) * K;
}
extern "C" __global__ void plain(int* x) { x[0] = 1; }
extern "C" __global__ void waits(int* x) { asm volatile("griddepcontrol.wait;" ::: "memory"); x[0] = 1; }
"""
INNER = '#pragma once\n#include "deep/deepest.cuh"\n'
DEEPEST = "#pragma once\ntemplate <typename T> __device__ T twice(T v) { return v * T(2); }\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_RT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DSV4_RT_CACHE", raising=False)
    module._answered.clear()
    module._artifacts.clear()


def write(directory, files, age=10):
    """Files with a time stamp old enough to be trusted."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (time.time() - age, time.time() - age))
    return directory


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A kernels tree with one kernel and two headers."""
    tree = tmp_path / "somewhere" / "kernels"
    write(
        tree, {"family/scale.cu": SCALE, "include/inner.cuh": INNER, "include/deep/deepest.cuh": DEEPEST}
    )
    monkeypatch.setattr(module, "kernels_dir", lambda: tree)
    return tree


def refused(source, names, arch="sm_100a", **options):
    with pytest.raises(CompileError) as error:
        compile(source, arch, names, **options)
    return str(error.value)


# What comes out.


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gives_ptx_and_cubin_of_the_kernels_asked_for(tree, arch):
    artifact = compile("family/scale.cu", arch, ["scale<3, float>", "waits", "plain"])
    assert artifact.source == "kernels/family/scale.cu"
    assert artifact.cubin.startswith(b"\x7fELF")
    assert f".target {arch}" in artifact.ptx
    assert "\0" not in artifact.ptx
    assert set(artifact.kernels) == {"scale<3, float>", "waits", "plain"}
    for kernel in artifact.kernels.values():
        assert f".entry {kernel.lowered}(" in artifact.ptx
    assert artifact.kernels["scale<3, float>"].max_threads == 96
    assert {name for name, kernel in artifact.kernels.items() if kernel.waits_for_dependency} == {"waits"}
    assert artifact.compiler == compiler_build()
    assert artifact.compiler.startswith("NVRTC ")
    assert "(CL-" in artifact.compiler


def test_the_real_tree_is_found():
    assert (kernels_dir() / "include").is_dir()


def test_defines_reach_the_preprocessor_and_the_key(tree):
    write(tree, {"family/d.cu": 'extern "C" __global__ void d(int* x) { x[0] = A + B + sizeof(C) + ON; }\n'})
    one, two = (
        compile("family/d.cu", "sm_90a", ["d"], {"A": a, "B": "(1 << 4)", "C": "double", "ON": None}) for a in (5, 6)
    )
    assert ", 30;" in one.ptx
    assert ", 31;" in two.ptx
    assert one.key != two.key


# No path of this machine: the same bytes everywhere.


def test_bytes_do_not_depend_on_where_the_sources_lie(tree, tmp_path, monkeypatch):
    here = compile("family/scale.cu", "sm_100a", ["scale<3, float>"], cache=False)
    there = tmp_path / "other place" / "deeper" / "kernels"
    (tmp_path / "other place" / "deeper").mkdir(parents=True)
    tree.rename(there)
    monkeypatch.setattr(module, "kernels_dir", lambda: there)
    monkeypatch.chdir(there / "family")
    moved = compile(there / "family" / "scale.cu", "sm_100a", ["scale<3, float>"], cache=False)
    assert (here.key, here.cubin, here.ptx) == (moved.key, moved.cubin, moved.ptx)
    assert str(tmp_path).encode() not in here.cubin
    files = [line.split('"')[1] for line in here.ptx.splitlines() if ".file" in line]
    assert files == ["kernels/family/scale.cu", "kernels/include/deep/deepest.cuh"]


def test_a_source_outside_the_tree_shows_its_file_name_and_includes_its_neighbours(tree, tmp_path):
    text = '#include "mine.cuh"\n#include <inner.cuh>\n'
    text += 'extern "C" __global__ void f(int* x) { x[0] = twice(mine(x[1])); }\n'
    own = {"own/f.cu": text, "own/mine.cuh": "__device__ __forceinline__ int mine(int v) {\n    return __clz(v);\n}\n"}
    artifact = compile(write(tmp_path, own) / "own" / "f.cu", "sm_90a", ["f"])
    files = {line.split('"')[1] for line in artifact.ptx.splitlines() if ".file" in line}
    assert files == {"f.cu", "mine.cuh", "kernels/include/deep/deepest.cuh"}
    assert str(tmp_path).encode() not in artifact.cubin


# What it depends on.


def test_the_same_object_comes_back_until_a_file_changes(tree):
    names = ["scale<3, float>"]
    first = compile("family/scale.cu", "sm_100a", names)
    assert compile("family/scale.cu", "sm_100a", names) is first
    assert compile("family/scale.cu", "sm_90a", names) is not first
    write(tree, {"include/deep/deepest.cuh": DEEPEST.replace("T(2)", "T(4)")}, age=5)
    edited = compile("family/scale.cu", "sm_100a", names)
    assert edited.key != first.key
    assert edited.cubin != first.cubin
    write(tree, {"include/deep/deepest.cuh": DEEPEST}, age=3)
    assert compile("family/scale.cu", "sm_100a", names).cubin == first.cubin


def test_an_edit_that_leaves_size_and_time_is_noticed_while_the_file_is_young(tree):
    header = tree / "include" / "deep" / "deepest.cuh"
    now = time.time_ns()
    header.write_text(DEEPEST)
    os.utime(header, ns=(now, now))
    first = compile("family/scale.cu", "sm_100a", ["plain"])
    header.write_text(DEEPEST.replace("2", "4"))
    os.utime(header, ns=(now, now))
    assert compile("family/scale.cu", "sm_100a", ["plain"]).key != first.key


def test_a_new_file_that_hides_another_is_noticed(tree, tmp_path):
    text = '#include "inner.cuh"\nextern "C" __global__ void g(int* x) { *x = twice(2); }\n'
    own = write(tmp_path / "own", {"g.cu": text})
    first = compile(own / "g.cu", "sm_90a", ["g"])
    write(own, {"inner.cuh": "__device__ int twice(int v) { return 77; }\n"})
    second = compile(own / "g.cu", "sm_90a", ["g"])
    assert second.key != first.key
    assert ", 77;" in second.ptx


def test_asking_again_costs_microseconds(tree):
    compile("family/scale.cu", "sm_100a", ["plain"])
    start = time.perf_counter()
    for _ in range(1000):
        compile("family/scale.cu", "sm_100a", ["plain"])
    assert time.perf_counter() - start < 0.5, "1000 calls"  # about 15 us each: three files are looked at


def test_without_cache_it_compiles_anew(tree):
    first = compile("family/scale.cu", "sm_100a", ["plain"])
    again = compile("family/scale.cu", "sm_100a", ["plain"], cache=False)
    assert again is not first
    assert again == first
    assert not again.cached
    assert cache_info().total_misses == 1


# Includes.


@pytest.mark.parametrize(
    "text",
    [
        '// #include "no.cuh"\n',
        '/* \n#include "no.cuh"\n */\n',
        'const char* text = R"(\n#include "no.cuh"\n)";\n',
        '// a line that goes on \\\n#include "no.cuh"\n',
        "constexpr int million = 1'000'000;  // it's\n/* ' */\n",
        '#include "inner.cuh" // "no.cuh" /* \n',
        '#  include   <deep/deepest.cuh>\n/* here */ #include "inner.cuh"\n',
        'constexpr char quote = \'"\';\n// #include "no.cuh"\nconstexpr char other = \'\\\'\';\n',
        '#include "deep/../inner.cuh"\n',
    ],
)
def test_reads_the_includes_that_there_are(tree, text):
    write(tree, {"family/i.cu": text + 'extern "C" __global__ void i(int* x) { x[0] = __LINE__; }\n'})
    artifact = compile("family/i.cu", "sm_90a", ["i"])
    assert f", {text.count(chr(10)) + 1};" in artifact.ptx, "the lines must stay"


@pytest.mark.parametrize("wanted", ['"no.cuh"', "<cstdint>", '"../family/neighbour.cuh"', '"/etc/hostname"'])
def test_a_missing_include_says_where_it_was_looked_for(tree, wanted):
    write(tree, {"family/neighbour.cuh": "", "include/inner.cuh": f"#pragma once\n\n#include {wanted}\n"})
    text = refused("family/scale.cu", ["plain"])
    assert text.startswith("plain for sm_100a\n")
    assert f'kernels/include/inner.cuh(3): error: cannot find "{wanted[1:-1]}"' in text
    assert f"  searched: {tree / 'include'}" in text
    assert "\n  options: --gpu-architecture=sm_100a --std=c++17" in text


def test_a_macro_as_include_is_refused(tree):
    write(tree, {"family/m.cu": '#define H "inner.cuh"\n#include H\n'})
    assert "kernels/family/m.cu(2): error: an #include must name its file: #include H" in refused("family/m.cu", ["m"])


def test_headers_that_include_each_other_end(tree):
    for name, other in ("ab", "ba"):
        write(tree, {f"include/{name}.cuh": f'#pragma once\n#include "{other}.cuh"\n'})
    write(tree, {"family/c.cu": '#include "a.cuh"\nextern "C" __global__ void c() {}\n'})
    assert compile("family/c.cu", "sm_90a", ["c"]).kernels["c"].params == ()


# What is wrong.


def test_a_missing_source(tree):
    text = refused("family/none.cu", ["none"])
    assert "kernels/family/none.cu: error: there is no such source\n" in text
    assert str(tree / "family" / "none.cu") in text


@pytest.mark.parametrize("arch", ["sm_100", "sm_80", "compute_90a", "", "sm_90a "])
def test_other_architectures_are_refused(tree, arch):
    with pytest.raises(ArgumentError, match=r"architectures: sm_90a, sm_100a, sm_103a") as error:
        compile("family/scale.cu", arch, ["plain"])
    assert repr(arch) in str(error.value)


@pytest.mark.parametrize("names", ["plain", [], [""], [3]])
def test_names_must_be_a_sequence_of_names(tree, names):
    with pytest.raises(ArgumentError, match="names must be a non-empty sequence"):
        compile("family/scale.cu", "sm_90a", names)


@pytest.mark.parametrize("defines", [{"A B": 1}, {"": 1}, {"X=1": 2}, {"X": 1.5}])
def test_defines_must_be_names_and_numbers(tree, defines):
    with pytest.raises(ArgumentError, match="defines are names"):
        compile("family/scale.cu", "sm_90a", ["plain"], defines)


def test_errors_point_into_our_file(tree):
    write(tree, {"include/deep/deepest.cuh": DEEPEST + "int wrong = nothing;\n"})
    text = refused("family/scale.cu", ["plain"])
    assert 'kernels/include/deep/deepest.cuh(3): error: identifier "nothing" is undefined' in text
    assert "/dsv4_rt/" not in text


def test_template_arguments_that_the_source_refuses(tree):
    text = refused("family/scale.cu", ["scale<9, float>"], arch="sm_90a")
    assert text.splitlines()[0] == "scale<9, float> for sm_90a"
    assert 'kernels/family/scale.cu(4): error: static assertion failed with "K must be below 8"' in text
    assert text.splitlines()[-1].startswith("  options: --gpu-architecture=sm_90a --std=c++17")


@pytest.mark.parametrize("name", ["scael<3, float>", "ns::scale2<1>", "Plain"])
def test_a_kernel_that_does_not_exist_lists_those_that_do(tree, name):
    text = refused("family/scale.cu", ["plain", name])
    assert f"kernels/family/scale.cu: error: there is no kernel {name}" in text
    assert "    scale<int K, typename T>  kernels/family/scale.cu(3)\n" in text
    assert "    plain  kernels/family/scale.cu(8)\n" in text
    assert "__nv_name_map" not in text


@pytest.mark.parametrize("name", ["scale", "scale<float>", "scale<3>", "scale<3, flaot>", "scale<3, float"])
def test_template_arguments_that_do_not_fit(tree, name):
    text = refused("family/scale.cu", [name])
    assert f"kernels/family/scale.cu(3): error: {name}: " in text
    assert "    scale<int K, typename T>  kernels/family/scale.cu(3)\n" in text
    assert "__nv_name_map" not in text


def test_declarations_are_found():
    text = """
    // __global__ void commented();
    template <int K, typename T = float> __global__ void __launch_bounds__(max(32, K), (1 + 1)) a(T* x);
    extern "C" __global__ void b(int x) { }
    __global__ __cluster_dims__(2, 1, 1) void
    c (
       int x) {}
    const char* s = "__global__ void quoted()";
    template <typename F> __device__ void helper(F f) { f(); }
    static __global__ void d() { helper([] {}); }
    """
    assert [(kernel.name, kernel.template, kernel.line) for kernel in declarations(text, "x.cu")] == [
        ("a", "int K, typename T = float", 3),
        ("b", "", 4),
        ("c", "", 6),
        ("d", "", 10),
    ]


BAD_ASM = """\
#include "bad.cuh"
extern "C" __global__ void good(int* x) { x[0] = 1; }
extern "C" __global__ void broken(int* x) {
    x[1] = 2;
#ifdef INLINED
    x[0] = bad(x[1]);
#else
    asm volatile(
        "mov.u32 %0, 7;"
        "frobnicate.u32 %0, 1;" : "=r"(x[0]));
#endif
}
"""
BAD_HEADER = """\
#pragma once
__device__ __forceinline__ int bad(int v) {
    int r;
    asm("add.u32 %0, %1, banana;" : "=r"(r) : "r"(v));
    return r;
}
"""


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_ptx_error_is_shown_at_its_cuda_line(tree, arch):
    write(tree, {"family/bad.cu": BAD_ASM, "include/bad.cuh": BAD_HEADER})
    text = refused("family/bad.cu", ["broken", "good"], arch)
    # A statement over several lines: NVRTC 13.0 gives its last line, 13.5 its first.
    problem = "error: Not a name of any known instruction: 'frobnicate'"
    lines = BAD_ASM.splitlines()
    places = [f"\nkernels/family/bad.cu({row}): {problem}\n    {lines[row - 1].strip()}\n" for row in (8, 10)]
    assert any(place in text for place in places), text
    assert "  PTX line " in text
    assert "frobnicate.u32 %r" in text
    assert "ptxas" not in text.partition("\n  options:")[0]


def test_a_ptx_error_in_an_inlined_function(tree):
    write(tree, {"family/bad.cu": BAD_ASM, "include/bad.cuh": BAD_HEADER})
    text = refused("family/bad.cu", ["broken"], defines={"INLINED": 1})
    assert "kernels/include/bad.cuh(4): error: " in text
    assert '\n    asm("add.u32 %0, %1, banana;"' in text
    assert "inlined at kernels/family/bad.cu(6)" in text


def test_setmaxnreg_that_would_be_ignored_is_an_error(tree):
    body = '(int* x) { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); x[0] = 1; }\n'
    write(tree, {"family/s.cu": f'extern "C" __global__ void s{body}'})
    text = refused("family/s.cu", ["s"])
    assert "kernels/family/s.cu: error: (C7508)" in text
    assert "__launch_bounds__" in text


# Threads and processes.


def test_threads_that_want_the_same_kernel_compile_it_once(tree):
    gate = threading.Barrier(8)

    def one(_):
        gate.wait()
        return compile("family/scale.cu", "sm_100a", ["scale<5, float>"])

    before = cache_info()
    with ThreadPoolExecutor(8) as pool:
        artifacts = list(pool.map(one, range(8)))
    assert len({id(artifact) for artifact in artifacts}) == 1
    after = cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (0, 1)


def test_threads_compile_different_kernels(tree):
    names = [f"scale<{k}, {t}>" for k in range(1, 7) for t in ("float", "int")]
    with ThreadPoolExecutor(6) as pool:
        artifacts = list(pool.map(lambda name: compile("family/scale.cu", "sm_90a", [name]), names))
    for name, artifact in zip(names, artifacts, strict=True):
        assert artifact.cubin == compile("family/scale.cu", "sm_90a", [name], cache=False).cubin


def test_an_error_in_one_thread_is_an_error_in_all(tree):
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(compile, "family/scale.cu", "sm_90a", ["scale<8, float>"]) for _ in range(4)]
    assert {type(future.exception()) for future in futures} == {CompileError}


def test_loads_the_compiler_late():
    script = (
        "import sys, dsv4_rt.compile\n"
        "assert 'cuda.bindings.nvrtc' not in sys.modules\n"
        "print(dsv4_rt.compile.compiler_build())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, compiler_build()), done.stderr
