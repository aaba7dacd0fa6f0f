"""A wheel built from this tree and installed elsewhere finds its kernels and runs the demo."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_wheel_holds_every_kernel_and_the_sample_text(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.cu*")}
    assert {f"dsv4_rt/_kernels/{name}" for name in sources} <= names
    assert "dsv4_rt/data/sample.txt" in names
    assert "dsv4_rt/py.typed" in names


def test_installed_wheel_runs_the_demo(wheel, tmp_path):
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    text = tmp_path / "text.txt"
    text.write_text("Every token finds its experts.\n")
    env = os.environ | {"PYTHONPATH": str(site), "DSV4_RT_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "dsv4_rt", "demo", str(text), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,  # not the checkout: its own dsv4_rt would be imported
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    where = subprocess.run(
        [sys.executable, "-c", "from dsv4_rt.compile import kernels_dir; print(kernels_dir())"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        check=True,
    )
    assert where.stdout.strip() == str(site / "dsv4_rt" / "_kernels")
