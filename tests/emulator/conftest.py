"""Fixtures of the emulator's tests."""

import numpy as np
import programs
import pytest
from emulating import ADD, SUM, TINY

from dsv4_rt import cli


@pytest.fixture(params=["usual-checks", "every-check"])
def checks(request, monkeypatch):
    """With the checks that are always on, and with those on request besides: no false alarm in a right kernel."""
    if request.param == "every-check":
        monkeypatch.setitem(programs.CHECKS, "check_uninitialised", True)
        # By PTX's memory model a lane's load of the total races with another lane's store of it two lines on: Triton
        # relies on the warp's lanes going together there.
        if "spin_lock" not in request.node.name:
            monkeypatch.setitem(programs.CHECKS, "check_global_writes", True)


@pytest.fixture
def quiet():
    """What the machine does around its programs, for tests that call the arithmetic directly."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def emulate(capsys, monkeypatch, tmp_path):
    """emulate("add.cu", ...) in a folder with the files of these tests -> (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"add.cu": ADD, "sum.cu": SUM, "tiny.ptx": TINY}.items():
        (tmp_path / name).write_text(text)

    def call(*argv):
        capsys.readouterr()
        code = cli.main(["emulate", *(str(a) for a in argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def kept_ptx(pytestconfig, tmp_path_factory):
    """kept_ptx(name) -> a folder for compiled programs that outlives the run, where pytest keeps a cache."""
    cache = getattr(pytestconfig, "cache", None)
    return cache.mkdir if cache is not None else tmp_path_factory.mktemp
