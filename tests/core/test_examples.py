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


def test_route_tokens():
    printed = run("route_tokens.py")
    assert "layer 0, hash routing" in printed
    assert "layer 5, dense routing" in printed
    assert printed.count("experts") == 8


def test_route_in_torch(torch):
    assert "compiled" in run("route_in_torch.py")


def test_chat_memory():
    assert "1024 of 1490 tokens found, 466 computed" in run("chat_memory.py")


def test_kv_roundtrip():
    assert run("kv_roundtrip.py").count(": 76 entries as ") in (2, 4)  # two sequences, without torch and with it
