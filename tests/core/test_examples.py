"""The examples run, on whatever this machine has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_dlpack_roundtrip():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "dlpack_roundtrip.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "DLPack  in ->" in done.stdout


def test_chat_memory():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "chat_memory.py")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1024 of 1490 tokens found, 466 computed" in done.stdout
