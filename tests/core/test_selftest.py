"""selftest: its steps exist, a step that fails or hangs stops no other, and the report says what came of each."""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from dsv4_rt import cli, selftest
from dsv4_rt.cuda_device import cuda_device_count
from dsv4_rt.selftest import CLEAN, ROOT, SOME_PASSED, Step, execute, perform, steps

FACTS = {"GPU": "NVIDIA a|b", "commit": "abc"}


def python(name, code, seconds=60.0, **more):
    """A step that runs some Python."""
    return Step(name, f"runs {name}", (sys.executable, "-c", textwrap.dedent(code)), seconds, **more)


# A step that never ends, nor does its child, which writes down who it is.
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def outcomes(found, tmp_path, arch="sm_90a", limit=None):
    """(state, detail) by step, and what was said."""
    said = []
    verdicts = list(perform(found, arch, tmp_path, limit, said.append))
    return {v.step: (v.state, v.detail) for v in verdicts}, said


def is_alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("arch", ["", "sm_90a", "sm_100a", "sm_103a"])
def test_steps(arch, tmp_path):
    """In their order; every file and folder a command names exists; each test folder is in one of them."""
    found = steps(tmp_path, arch, "abc")
    assert [step.name for step in found] == [
        "doctor", "warmup", "tests", "tcgen05", "tcgen05-checked", "conformance", "memcheck", "racecheck", "initcheck",
        "synccheck", "bench-router", "bench-kv", "bench-linear", "bench-memory_kernels", "bench-launch",
    ]  # fmt: skip
    for step in found:
        assert step.seconds > 0
        named = [word for word in step.command if re.match(r"(tests|bench)/", word)]
        assert all((ROOT / word).exists() for word in named)
    tests = {word.partition("/")[2] for word in found[2].command if word.startswith("tests/")}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert tests == folders - {"emulator", "conformance"}  # everything.py has these two
    assert "gpu" in found[2].command
    checks = [step for step in found if step.name.endswith("check")]
    assert all(step.shows == (SOME_PASSED, CLEAN) and "core" not in " ".join(step.command) for step in checks)
    assert [step.name for step in found if step.archs] == ["tcgen05", "tcgen05-checked"]
    if arch:
        assert found[1].command[-2:] == ("--arch", arch)


def test_verdicts(tmp_path):
    found = [
        python("fails", "import sys; print('one'); print('the reason'); sys.exit(3)"),
        python("passes", "print('fine')"),
        python("says", "print('========= ERROR SUMMARY: 0 errors'); print('12 passed in 3.0s'); print('bye')",
               shows=(SOME_PASSED, CLEAN)),
        python("refuses", "print('Device not supported')", shows=(CLEAN,)),
        python("skips", "print('0 passed, 9 skipped in 1s')", shows=(SOME_PASSED,)),
        python("dirty", "print('========= ERROR SUMMARY: 10 errors')", shows=(CLEAN,)),
        python("hazards", "print('= RACECHECK SUMMARY: 0 hazards displayed (3 errors, 0 warnings)')", shows=(CLEAN,)),
        python("elsewhere", "print('fine')", archs=("sm_100a",)),
        python("lacks", "print('fine')", lacks="no such tool"),
        Step("absent", "", ("/nonexistent/tool",), 10),
        python("last", "pass"),
    ]  # fmt: skip
    got, said = outcomes(found, tmp_path)
    assert got == {
        "fails": ("FAILED", "exit status 3: the reason"),
        "passes": ("passed", "fine"),
        "says": ("passed", "ERROR SUMMARY: 0 errors; 12 passed in 3.0s"),
        "refuses": ("FAILED", f"no {CLEAN} in its output: Device not supported"),
        "skips": ("FAILED", f"no {SOME_PASSED} in its output: 0 passed, 9 skipped in 1s"),
        "dirty": ("FAILED", f"no {CLEAN} in its output: ERROR SUMMARY: 10 errors"),
        "hazards": (
            "FAILED",
            f"no {CLEAN} in its output: RACECHECK SUMMARY: 0 hazards displayed (3 errors, 0 warnings)",
        ),
        "elsewhere": ("for others", "only on sm_100a"),
        "lacks": ("NOT RUN", "no such tool"),
        "absent": ("NOT RUN", "/nonexistent/tool: No such file or directory"),
        "last": ("passed", "no output"),
    }
    assert len(said) == len(found) + 9  # a line before each that starts
    assert (tmp_path / "fails.txt").read_text().endswith("one\nthe reason\n")
    assert [v.good for v in perform(found[7:9], "sm_90a", tmp_path, None, said.append)] == [True, False]


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path):
    start = time.monotonic()
    verdict = execute(python("hangs", HANGS), tmp_path, 4)
    assert time.monotonic() - start < 60
    assert verdict.state == "TIMED OUT"
    child = re.fullmatch(r"after \d+ s; last: child (\d+)", verdict.detail)
    for _ in range(100):  # it has been told to end, and on a busy machine takes its time
        if not is_alive(child[1]):
            break
        time.sleep(0.1)
    assert not is_alive(child[1])


def test_the_limit_of_a_step(tmp_path):
    got, _ = outcomes([python("hangs", HANGS, seconds=1), python("passes", "print(1)")], tmp_path, limit=90)
    assert [state for state, _ in got.values()] == ["TIMED OUT", "passed"]
    got, _ = outcomes([python("hangs", HANGS)], tmp_path, limit=1)
    assert got["hangs"][0] == "TIMED OUT"


INTERRUPTED = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with it ignored
from dsv4_rt import selftest
from dsv4_rt.selftest import Step
kill = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
codes = {"first": "print(1)", "second": kill, "third": "print(1)"}
found = [Step(name, "", (sys.executable, "-c", code), 60) for name, code in codes.items()]
selftest.steps = lambda out, arch, commit: found
selftest._gpu = lambda: "sm_90a"
selftest._facts = lambda commit: {"GPU": "none"}
from dsv4_rt import cli
raise SystemExit(cli.main(["selftest", "--out", sys.argv[1]]))
"""


def test_an_interrupt_leaves_a_report(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(step["step"], step["state"]) for step in report["steps"]] == [
        ("first", "passed"), ("second", "INTERRUPTED"), ("third", "NOT RUN"),
    ]  # fmt: skip
    assert "| third | NOT RUN | 0 | interrupted before |" in (tmp_path / "report.md").read_text()


# The command, on a GPU that is not there.


@pytest.fixture
def pretend(monkeypatch):
    """pretend(steps): what `selftest` finds on this machine."""

    def set_up(found):
        monkeypatch.setattr(selftest, "steps", lambda out, arch, commit: found)
        monkeypatch.setattr(selftest, "_gpu", lambda: "sm_90a")
        monkeypatch.setattr(selftest, "_facts", lambda commit: FACTS | {"commit": commit})

    return set_up


def test_report(pretend, tmp_path, capsys):
    pretend([python("passes", "print('a|b')"), python("fails", "raise SystemExit(1)"), python("lacks", "", lacks="no")])
    out = tmp_path / "new" / "folder"
    assert cli.main(["selftest", "--out", str(out), "--commit", "1234567"]) == 1
    text = (out / "report.md").read_text()
    assert "\n1 passed, 1 FAILED, 1 NOT RUN. Exit status 1.\n" in text
    assert "\n| GPU | NVIDIA a\\|b |\n| commit | 1234567 |\n" in text
    assert re.search(r"\n\| passes \| passed \| \d+ \| a\\\|b \| passes\.txt \|\n\| fails \| FAILED ", text)
    assert capsys.readouterr().out.rstrip().endswith(f"exit status 1; {out / 'report.md'}")
    assert sorted(path.name for path in out.iterdir()) == ["fails.txt", "passes.txt", "report.json", "report.md"]


def test_the_report_is_there_after_each_step(pretend, tmp_path):
    shows = "from pathlib import Path; print(Path('report.md').read_text().split(chr(10))[2])"
    look = f"import os; os.chdir({str(tmp_path)!r}); {shows}"
    pretend([python("one", "pass"), python("two", look)])
    assert cli.main(["selftest", "--out", str(tmp_path)]) == 0
    assert "1 passed. Exit status not yet: 1 of 2 steps are done." in (tmp_path / "two.txt").read_text()


def test_exit_status_and_json(pretend, tmp_path, capsys):
    found = [python("passes", "pass"), python("fails", "raise SystemExit(1)"), python("b200", "", archs=("sm_100a",))]
    pretend(found)
    arguments = ["selftest", "--out", str(tmp_path), "--json", "--only", "passes", "--only", "b200"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert [step["state"] for step in json.loads(out)["steps"]] == ["passed", "for others"]
    assert "b200" in err
    pretend([python("lacks", "pass", lacks="no tool")])
    assert cli.main(["selftest", "--out", str(tmp_path)]) == 1


def test_list_needs_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "cuda_device_count", lambda: 0)
    assert cli.main(["selftest", "--list", "--out", "there"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^\S.* s at most$", out, re.M)) == 15
    assert "(sm_100a and sm_103a only)" in out
    assert f"tests/conformance/everything.py --out {Path('there').absolute()}/conformance" in out
    assert not Path("there").exists()


def refusal(capsys, *arguments):
    assert cli.main(["selftest", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_refusals(capsys, monkeypatch, tmp_path):
    assert "--only nothing: there is no such step; steps: doctor, " in refusal(capsys, "--list", "--only", "nothing")
    monkeypatch.setattr(selftest, "cuda_device_count", lambda: 0)
    err = refusal(capsys, "--out", str(tmp_path / "x"))
    assert err.startswith("error: selftest: there is no CUDA device here; it judges a B200, B300, H100 or H200.")
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(selftest, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(selftest, "NEEDED_PACKAGES", ("pytest", "no_such_package"))
    assert 'no_such_package is not installed: pip install -e ".[test,bench]"' in refusal(capsys)
    monkeypatch.setattr(selftest, "ROOT", tmp_path)
    err = refusal(capsys, "--list")
    assert "needs the source checkout" in err
    assert "has no tests/conformance/everything.py" in err


def test_a_gpu_without_kernels_is_refused(capsys, monkeypatch):
    old = selftest.doctor.Gpu(0, "NVIDIA A100", "8.0", None, 1 << 36)
    monkeypatch.setattr(selftest, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(selftest.doctor, "gpus", lambda: [old])
    monkeypatch.setattr(selftest, "NEEDED_PACKAGES", ("pytest",))
    assert "no kernel exists for cuda:0, NVIDIA A100 of compute capability 8.0" in refusal(capsys)


def test_what_the_real_command_says_here(capsys, tmp_path):
    if cuda_device_count():
        pytest.skip("this machine has a GPU")
    assert "no CUDA device here" in refusal(capsys, "--out", str(tmp_path))


@pytest.mark.parametrize("word", selftest.SPARED)
def test_what_sanitizers_are_spared_exists(word):
    """A test that was renamed would run under them again, and fail there or take an hour."""
    names = [
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in [path.stem, *re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    ]
    assert any(word in name for name in names)
