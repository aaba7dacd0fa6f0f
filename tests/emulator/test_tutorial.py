"""TUTORIAL.md, run: its sources are written, its commands and its Python executed; they print what it says."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import dsv4_rt.emulator
from dsv4_rt import cli
from dsv4_rt.compile import compiler_build

TUTORIAL = Path(dsv4_rt.emulator.__file__).parent / "TUTORIAL.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def plain(text):
    """Text without what differs from run to run and from machine to machine: addresses, seconds, trailing spaces.

    Another compiler may emit other PTX: then the lines that speak of instructions are not compared.
    """
    text = re.sub(r"0x[0-9a-f]{6,}", "ADDRESS", text)
    text = re.sub(r"\d+\.\d{3} s$", "SECONDS", text, flags=re.MULTILINE)
    lines = [line.rstrip() for line in text.strip().splitlines()]
    if re.search(r"NVRTC [\d.]+\d", TUTORIAL.read_text())[0] != compiler_build().split(" (")[0]:
        lines = [line for line in lines if not re.search(r"PTX|instructions|\d%$", line)]
    return "\n".join(lines)


def blocks():
    return FENCE.findall(TUTORIAL.read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the tutorial's sources, as the current one."""
    for language, text in blocks():
        if language == "cuda":
            (tmp_path / re.match(r"// (\w+\.cu): ", text)[1]).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line):
    """Run `python -m dsv4_rt ...`, perhaps through `| tail -N`; returns what it prints and its exit code."""
    words, _, rest = line.partition(" | tail -")
    arguments = shlex.split(words)
    assert arguments[:3] == ["python", "-m", "dsv4_rt"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(arguments[3:])
    lines = out.getvalue().splitlines()
    return "\n".join(lines[-int(rest) :] if rest else lines), code


def consoles():
    return [text.removeprefix("$ ").split("\n", 1) for language, text in blocks() if language == "console"]


@pytest.mark.parametrize(("line", "expected"), consoles())
def test_commands_print_what_the_tutorial_says(folder, line, expected):
    out, code = command(line)
    print(out)
    assert plain(out) == plain(expected)
    assert code == (0 if "fixed.cu" in line else 1)


def test_the_python_prints_what_the_tutorial_says(folder):
    ((_, source),) = [block for block in blocks() if block[0] == "python"]
    ((_, expected),) = [block for block in blocks() if block[0] == "text"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "TUTORIAL.md", "exec"), {})
    print(out.getvalue())
    assert plain(out.getvalue()) == plain(expected)
    statements = [line for line in source.split("\n\n")[1].splitlines() if line.strip()]
    assert len(statements) <= 10


def test_the_fixed_kernel_is_right(folder):
    _, code = command(next(line for line, _ in consoles() if "fixed.cu" in line))
    assert code == 0
    x = np.arange(1000, dtype=np.float32)
    expected = np.r_[x[0], (x[:-2] + x[1:-1] + x[2:]) / np.float32(3), x[-1]]
    np.testing.assert_array_equal(np.load(folder / "y.npy"), expected)


def test_the_readme_links_to_it():
    assert "(TUTORIAL.md)" in (TUTORIAL.parent / "README.md").read_text()
