"""Whole programs on a GPU and on the emulator: the same PTX on the same inputs, results compared.

    python tests/conformance/launches.py --record FOLDER [--arch sm_100a]         # here: what the tests launch
    python tests/conformance/launches.py --replay FOLDER [--summary FILE]         # on a machine with a GPU
    python tests/conformance/launches.py --replay FOLDER --on emulator            # anywhere: is the record complete?

--record runs the emulator's tests of CUB, cooperative_groups, cuda::atomic_ref, cuda::barrier and its kin, Triton,
mathematical functions and of small CUDA programs, which compare with NumPy, and writes down every launch: PTX, inputs,
and the emulator's results. Of a tensor map it keeps the fields, which the replaying machine encodes for its own
memory; of scratch memory the size.
--replay loads that PTX with the driver, launches it on those inputs, and compares bit for bit; where a program uses
instructions whose result the ISA leaves open, within a bound. A driver of CUDA 13.0 loads PTX up to version 9.0, so
that --record needs NVRTC 13.0. The summary's place is results/launches.txt, which the emulator's README shows.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
EMULATOR = HERE.parent / "emulator"
sys.path[:0] = [str(HERE), str(EMULATOR)]

import programs  # noqa: E402
from programs import Scratch, aligned, pack  # noqa: E402

import dsv4_rt  # noqa: E402
from dsv4_rt.emulator import Machine  # noqa: E402
from dsv4_rt.emulator.tensormap import encode  # noqa: E402
from dsv4_rt.tensor_map import TensorMap  # noqa: E402

SUMMARY = HERE / "results" / "launches.txt"
FILES = ("test_cccl.py", "test_triton.py", "test_programs.py", "test_pointers.py", "test_vector_atomics.py",
         "test_math.py", "test_radix_speed.py", "test_intrinsics.py", "test_triton_dots.py",
         "test_cccl_async.py")  # fmt: skip
ARCHITECTURES = ("sm_90a", "sm_100a")  # what programs are compiled for; the first unless --arch says otherwise
SELECTION = " and ".join(
    f"not {each}"
    for each in ("random", "reverse", "compiled", "every-check", "by_software", "-late", "[late")
)  # every program once
NEWEST = (9, 0)


@dataclass(frozen=True)
class Bound:
    """How far two right results may lie apart: relative * |emulator's|, of_largest * the launch's largest float32, ulp
    units in the emulator's last place, and an absolute error, added up."""

    why: str
    relative: float = 0
    of_largest: float = 0
    ulp: float = 0
    absolute: float = 0


# Tests whose programs use .approx or .full instructions. Either result lies within the test's own bound of the exact
# one, so that they lie within twice that of each other.
BOUNDS = {
    # Twice the test's delta, which is 2^-9 + 2^-15 and, of scores whose 64 terms have magnitudes below 200 in all,
    # 2 (1 + 64 * 0.125 * 200) 2^-22 < 2^-10: below 2^-8 together. Means of values below 8 = 2^3.
    "test_attention": Bound("ex2.approx before a rounding to bf16", absolute=2 * 2.0**-8 * 2.0**3),
    "test_function": Bound("an approximation to begin with", ulp=2 * 10),
    "test_layernorm": Bound("div.full and sqrt.approx", of_largest=2 * 20 * 2 * 2.0**-24),
    "test_softmax": Bound("ex2.approx and div.full", relative=2 * 2.0**-17),
    "test_welford": Bound("div.full", relative=2e-4),
}
# Launches whose results are not a function of their inputs.
LEFT_OUT = {
    "test_what_atom_returns_is_each_element_before": "in which order a GPU serves the lanes of a warp is its own affair"
}


class Recorder:
    """Writes down launches, in the order of the tests."""

    def __init__(self, folder: Path, arch: str = ARCHITECTURES[0]) -> None:
        self.folder, self.arch, self.entries = folder, arch, []
        (folder / "ptx").mkdir(parents=True, exist_ok=True)
        self.arrays: dict[str, np.ndarray] = {}
        self.refused: list[str] = []

    def __call__(
        self, ptx: str, entry: str, grid: Any, block: Any, shared: int, cooperative: bool, cluster: Any,
        args: tuple[Any, ...], before: list[Any],
    ) -> None:  # fmt: skip
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split(" ")[0]
        if f".target {self.arch[:-1]}" not in ptx:
            return
        version = tuple(map(int, ptx.split(".version ", 1)[1].split(None, 1)[0].split(".")))
        if version > NEWEST:
            self.refused.append(f"{test}: PTX of version {version[0]}.{version[1]}")
            return
        name = hashlib.sha256(ptx.encode()).hexdigest()[:16]
        (self.folder / "ptx" / f"{name}.ptx").write_text(ptx)
        listed: list[dict[str, Any]] = []
        for arg, old in zip(args, before, strict=True):
            if isinstance(arg, Scratch):
                listed.append({"scratch": arg.nbytes})
            elif isinstance(arg, np.ndarray | TensorMap):
                array = arg if isinstance(arg, np.ndarray) else arg.array
                key = f"a{len(self.arrays)}"
                # Two rows of bytes: before and after.
                self.arrays[key] = np.stack([np.frombuffer(each.tobytes(), np.uint8) for each in (old, array)])
                listed.append({"array": key, "dtype": array.dtype.str})
                if isinstance(arg, TensorMap):
                    assert array.flags.c_contiguous  # the bytes are those the map's strides speak of
                    listed[-1]["map"] = arg.fields() | {"address": 0}
            else:
                listed.append({"bytes": (arg if isinstance(arg, bytes) else np.asarray(arg).tobytes()).hex()})
        sizes = [[each] if isinstance(each, int) else list(each) for each in (grid, block, cluster or [])]
        self.entries.append(
            {"test": test, "ptx": name, "entry": entry, "grid": sizes[0], "block": sizes[1], "cluster": sizes[2],
             "shared": shared, "cooperative": cooperative, "args": listed}
        )  # fmt: skip

    def save(self, versions: str) -> None:
        """launches.json and launches.npz beside the PTX."""
        content = {"versions": versions, "arch": self.arch, "launches": self.entries}
        (self.folder / "launches.json").write_text(json.dumps(content, indent=0))
        np.savez_compressed(self.folder / "launches.npz", **self.arrays)


def record(folder: Path, arch: str = ARCHITECTURES[0]) -> int:
    """Run the tests with a recorder of launches of this architecture."""
    import pytest
    from cuda.bindings import nvrtc

    recorder = Recorder(folder, arch)
    programs.LISTENERS.append(recorder)
    files = [str(EMULATOR / each) for each in FILES]
    others = "".join(f" and not {each}" for each in ARCHITECTURES if each != arch)
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", SELECTION + others, *files])
    _, major, minor = nvrtc.nvrtcVersion()
    kept = [(EMULATOR / "kept" / f"{name}.{arch}.ptx").read_text() for name in ("cub_blocks", "gelu")]
    first = {text.split(", source")[0][3:] for text in kept}
    recorder.save(f"CUDA programs by NVRTC {major}.{minor}; {'; '.join(sorted(first))}")
    print(f"{len(recorder.entries)} launches in {folder}")
    if recorder.refused:
        print(f"NVRTC 13.0 is wanted; left out {len(recorder.refused)}: {recorder.refused[0]} ...")
    return int(code) or bool(recorder.refused)


class Emulated:
    """Launches on the emulator, from the record alone."""

    name, version = "emulator", "none"

    def __init__(self, folder: Path, arch: str) -> None:
        self.folder, self.arch = folder, arch

    def launch(self, entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What the arrays hold afterwards, as bytes."""
        machine = Machine(self.arch)
        module = machine.load((self.folder / "ptx" / f"{entry['ptx']}.ptx").read_text(), entry["test"])
        found, values = [], []
        for arg in entry["args"]:
            if "bytes" in arg:
                values.append(bytes.fromhex(arg["bytes"]))
                continue
            data = aligned(arrays[arg["array"]][0] if "array" in arg else np.zeros(arg["scratch"], np.uint8), 256)
            machine.memory.register(data.ctypes.data, data.nbytes, label=entry["test"], keep=data)
            found += [data] if "array" in arg else []
            values.append(encode(arg["map"] | {"address": data.ctypes.data}) if "map" in arg else data)
        machine.launch(
            module, entry["entry"], entry["grid"], entry["block"], pack(module.entries[entry["entry"]].params, values),
            dynamic_shared=entry["shared"], cooperative=entry["cooperative"], cluster=entry["cluster"] or None,
        )  # fmt: skip
        return found


class Gpu:
    """Launches on the first GPU."""

    def __init__(self, folder: Path) -> None:
        from kernels import Cuda

        self.folder, self.cuda = folder, Cuda()
        self.device = dsv4_rt.open_device("cuda:0")
        self.name, self.version = self.cuda.name, self.cuda.version
        self.modules: dict[str, Any] = {}

    def launch(self, entry: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What the arrays hold afterwards, as bytes."""
        call, d = self.cuda._call, self.cuda.driver
        if entry["ptx"] not in self.modules:
            text = (self.folder / "ptx" / f"{entry['ptx']}.ptx").read_bytes()
            self.modules[entry["ptx"]] = call(d.cuModuleLoadData(text + b"\0"))
        function = call(d.cuModuleGetFunction(self.modules[entry["ptx"]], entry["entry"].encode()))
        attribute = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        call(d.cuFuncSetAttribute(function, attribute, entry["shared"]))
        buffers, notes, values = [], [], []
        for arg in entry["args"]:
            if "bytes" in arg:
                values.append(np.frombuffer(bytes.fromhex(arg["bytes"]), np.uint8))
                continue
            data = np.ascontiguousarray(arrays[arg["array"]][0]) if "array" in arg else np.zeros(arg["scratch"], "u1")
            address = call(d.cuMemAlloc(max(data.nbytes, 16)))
            call(d.cuMemcpyHtoD(address, data.ctypes.data, data.nbytes))
            (buffers if "array" in arg else notes).append((address, data))
            value = int(address).to_bytes(8, "little")
            if "map" in arg:
                value = self.device.encode_tensor_map(arg["map"] | {"address": int(address)})
            values.append(aligned(np.frombuffer(value, np.uint8)))
        pointers = np.array([value.ctypes.data for value in values], np.uint64)
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (entry["grid"], entry["block"]))
        where = int(pointers.ctypes.data)
        if entry["cooperative"]:
            call(d.cuLaunchCooperativeKernel(function, *grid, *block, entry["shared"], 0, where))
        elif entry["cluster"]:
            call(d.cuLaunchKernelEx(self._config(grid, block, entry), function, where, 0))
        else:
            call(d.cuLaunchKernel(function, *grid, *block, entry["shared"], 0, where, 0))
        call(d.cuCtxSynchronize())
        found = []
        for address, data in buffers:
            after = np.empty_like(data)
            call(d.cuMemcpyDtoH(after.ctypes.data, address, after.nbytes))
            call(d.cuMemFree(address))
            found.append(after)
        for address, _ in notes:
            call(d.cuMemFree(address))
        return found

    def _config(self, grid: Any, block: Any, entry: dict[str, Any]) -> Any:
        """A launch in clusters that the kernel itself does not name."""
        d = self.cuda.driver
        config, attribute = d.CUlaunchConfig(), d.CUlaunchAttribute()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = entry["shared"]
        attribute.id = d.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        sizes = attribute.value.clusterDim
        sizes.x, sizes.y, sizes.z = (*entry["cluster"], 1, 1)[:3]
        config.attrs, config.numAttrs = [attribute], 1
        return config


def compare(test: str, dtype: str, gpu: np.ndarray, emulator: np.ndarray, largest: float) -> tuple[str, str]:
    """(equal, within or DIFFERENT; a note) of one array's bytes; `largest` is the largest float32 of the launch."""
    if (gpu == emulator).all():
        return "equal", ""
    a, b = gpu.view(dtype), emulator.view(dtype)
    at = int(np.argmax(a != b)) if a.dtype.kind != "f" else int(np.argmax(~((a == b) | ((a != a) & (b != b)))))
    note = f"{int((a != b).sum())} of {a.size} elements, first [{at}]: GPU {a[at]}, emulator {b[at]}"
    bound = BOUNDS.get(test)
    if bound is None or a.dtype.kind != "f":
        return "DIFFERENT", note
    x, y = a.astype(np.float64), b.astype(np.float64)
    room = bound.relative * np.abs(y) + bound.of_largest * largest + bound.absolute
    error = np.abs(x - y) - room - bound.ulp * np.abs(np.spacing(b)).astype(np.float64)
    apart = np.abs(x - y) / np.maximum(np.abs(y), np.finfo(a.dtype).tiny)
    ok = bool((np.isfinite(x) == np.isfinite(y)).all() and (error[np.isfinite(y)] <= 0).all())
    return ("within" if ok else "DIFFERENT"), f"{note}; largest relative difference {np.nanmax(apart):.2g}"


def replay(folder: Path, summary: Path | None, commit: str, on: str = "cuda") -> int:
    """Launch what was recorded and compare."""
    content = json.loads((folder / "launches.json").read_text())
    gpu = Gpu(folder) if on == "cuda" else Emulated(folder, content["arch"])
    rows: dict[str, list[Any]] = defaultdict(lambda: [0, 0, 0, "equal", ""])
    with np.load(folder / "launches.npz") as arrays:
        for entry in content["launches"]:
            test, name = entry["test"], entry["test"].split("[")[0]
            if name in LEFT_OUT:
                continue
            found = gpu.launch(entry, arrays)
            row = rows[test]
            row[0] += 1
            results = {arg["array"]: arrays[arg["array"]][1] for arg in entry["args"] if "array" in arg}
            floats = [results[arg["array"]].view("f4") for arg in entry["args"] if arg.get("dtype") == "<f4"]
            largest = max((float(np.nanmax(np.abs(each))) for each in floats), default=0.0)
            for arg, after in zip([each for each in entry["args"] if "array" in each], found, strict=True):
                state, note = compare(name, arg["dtype"], after, results[arg["array"]], largest)
                row[1], row[2] = row[1] + 1, row[2] + after.nbytes
                if state != "equal" and row[3] != "DIFFERENT":
                    row[3], row[4] = state, f"{entry['entry']}: {note}"
    states = [row[3] for row in rows.values()]
    lines = [
        f"{gpu.name}, driver {gpu.version}, {datetime.date.today()}, commit {commit}; {content['versions']}",
        "python tests/conformance/launches.py --record FOLDER, and there --replay FOLDER",
        f"{len(rows)} tests, {sum(row[0] for row in rows.values())} launches, {sum(row[2] for row in rows.values()):,} "
        f"bytes: {states.count('equal')} equal bit for bit, {states.count('within')} within a bound, "
        f"{states.count('DIFFERENT')} different",
        *(f"left out: {test}: {why}" for test, why in LEFT_OUT.items()),
        "",
        f"{'test':58} {'launches':>8} {'bytes':>9}  result",
    ]
    for test, (launches, _, size, state, note) in rows.items():
        why = f" ({BOUNDS[test.split('[')[0]].why}: {note})" if state == "within" else f" {note}" if note else ""
        lines.append(f"{test:58} {launches:8} {size:9,}  {state}{why}")
    text = "\n".join(lines) + "\n"
    print(text)
    if summary:
        summary.write_text(text)
    if summary and summary.resolve() == SUMMARY:
        import documents

        documents.write()
    return int("DIFFERENT" in states)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FOLDER")
    parser.add_argument("--replay", type=Path, metavar="FOLDER")
    parser.add_argument("--summary", type=Path, metavar="FILE")
    parser.add_argument("--commit", default="")
    parser.add_argument("--on", choices=("cuda", "emulator"), default="cuda")
    parser.add_argument("--arch", choices=ARCHITECTURES, default=ARCHITECTURES[0], help="of the launches to record")
    args = parser.parse_args()
    if args.record:
        return record(args.record, args.arch)
    if args.summary and args.on == "emulator":
        parser.error("--summary is of what a GPU computed")
    if args.replay:
        return replay(args.replay, args.summary, args.commit, args.on)
    parser.error("--record or --replay")
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
