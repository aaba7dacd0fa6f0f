"""A record of launches holds all that a launch needs: who has nothing else launches from it and finds differences."""

import subprocess
import sys

import everything
import launches
import numpy as np
import programs
import pytest
from foreign import kept
from hopper_kernels import integers
from programs import Scratch, aligned, run_ptx

from dsv4_rt.emulator import Machine
from dsv4_rt.tensor_map import TensorMap


@pytest.fixture
def recorded(tmp_path, monkeypatch, rng):
    """A folder with launches that take maps, clusters and scratch memory."""
    recorder = launches.Recorder(tmp_path)
    monkeypatch.setattr(programs, "LISTENERS", [recorder])
    a, b = (aligned(integers(rng, 64, 256).view(np.uint16)) for _ in range(2))
    maps = []
    for array in (a, b):
        box = TensorMap(array, box=(64, 64), dtype="bf16", swizzle="128B")
        maps += [box, np.int32(64), np.int32(256), np.int64(256), np.int64(1)]
    c = aligned(np.full((64, 64), np.nan, np.float32))
    ptx, shared = kept("dot_host_descriptors", "sm_90a")
    tail = np.int32(64), np.int32(256), np.uint64(0), np.uint64(0)
    run_ptx(ptx, "dot", (1, 1), 128, *maps, c, *tail, machine=Machine("sm_90a"), shared=shared)

    x, bins = rng.integers(0, 256, 3000).astype(np.int32), np.zeros(256, np.uint32)
    args = x, np.int32(x.size), bins, np.int32(64)
    ptx = kept("cluster_groups", "sm_90a")[0]
    run_ptx(ptx, "histogram", 16, 64, *args, machine=Machine("sm_90a"), shared=256, cluster=4)

    a, b = (aligned(integers(rng, 64, 64).view(np.uint16)) for _ in range(2))
    c = aligned(np.full((64, 64), 0x7FC0, np.uint16))
    ptx, shared = kept("dot_descriptors", "sm_90a")
    size = int(ptx.split("scratch ")[1].split(",")[0])
    room = aligned(np.zeros(size, np.uint8)).view(Scratch)
    sizes = [np.int32(64)] * 3
    run_ptx(ptx, "dot", (1, 1), 128, a, b, c, *sizes, room, np.uint64(0), machine=Machine("sm_90a"), shared=shared)
    recorder.save("test")
    return recorder


def test_replays_from_the_folder_alone(recorded, capsys):
    kinds = [{key for arg in entry["args"] for key in arg} for entry in recorded.entries]
    assert ["map" in kinds[0], recorded.entries[1]["cluster"], "scratch" in kinds[2]] == [True, [4], True]
    assert launches.replay(recorded.folder, None, "", "emulator") == 0
    assert "3 launches" in capsys.readouterr().out


@pytest.mark.parametrize("launch", range(3))
@pytest.mark.parametrize("row", [0, 1], ids=["input", "result"])
def test_a_changed_byte_is_a_difference(recorded, capsys, launch, row):
    """Of an input or of a result: arrays travel whole and every byte is compared."""
    keys = [arg["array"] for arg in recorded.entries[launch]["args"] if "array" in arg]
    array = recorded.arrays[keys[0]].copy()
    array[row, 4] ^= 0x40
    recorded.arrays[keys[0]] = array
    recorded.save("test")
    assert launches.replay(recorded.folder, None, "", "emulator") == 1
    assert "DIFFERENT" in capsys.readouterr().out


def test_every_step_is_a_program_that_is_there(tmp_path):
    assert list(everything.steps(tmp_path, "", "sm_103a")) == ["tests"]
    for command in [c for arch in launches.ARCHITECTURES for c in everything.steps(tmp_path, "", arch).values()]:
        options = [each for each in command if each.startswith("--")]
        if command[0].endswith(".py"):
            text = subprocess.run([sys.executable, command[0], "--help"], capture_output=True, text=True, check=True)
            assert all(each in text.stdout for each in options)


def test_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(everything, "NEEDED", ("numpy", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["everything.py", "--out", str(tmp_path / "out")])
    assert everything.main() == 2
    assert "no_such_package is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
