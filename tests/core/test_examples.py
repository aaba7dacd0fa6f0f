"""The examples run, on whatever this machine has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dlpack_roundtrip():
    assert "DLPack  in ->" in run("dlpack_roundtrip.py")


def test_kv_roundtrip():
    assert run("kv_roundtrip.py").count(": 76 entries as ") in (2, 4)  # two sequences, without torch and with it
