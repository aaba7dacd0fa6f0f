"""How every bench script measures, and how it prints.

Device time: a CUDA graph of many launches, replayed between two events; time per launch = (after - before) / launches,
median over replays, p10 and p90 beside it. The replay's own fixed cost is inside, a graph of empty kernels shows it.
  cold  a 256 MB read before every replay evicts the L2, and the launches of the graph walk over inputs of their own,
        or, where these are large, over as many sets as pass the L2 more than twice
  warm  every launch reads the same inputs
Host time: eager calls in a loop without synchronisation, median of several loops.
Roof: pure read of 1 GiB in the same run.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import cupy
import numpy as np

import dsv4_rt
from dsv4_rt.compile import compiler_build
from dsv4_rt.launch import POINTER, load

HERE = Path(__file__).resolve().parent
SWEEP_BYTES = 256 * 2**20
ROOF_BYTES = 2**30


class Bench:
    """A GPU, a stream to capture on, and the two reference kernels."""

    def __init__(self, title):
        self.device = dsv4_rt.device()
        if self.device.kind != "cuda":
            raise SystemExit(f"{title} measures a GPU; there is none (kernels would run on the {self.device.name})")
        self.stream = cupy.cuda.Stream(non_blocking=True)
        source = str(HERE / "roof.cu")
        self.sweep = self._reader(source, SWEEP_BYTES)
        empty = load(source, "empty", self.device).prepare(1, 32)
        self.empty_us = self.device_time([lambda s: empty(s)] * 40, cold=False)[0]
        roof = self._reader(source, ROOF_BYTES)
        us = self.device_time([roof] * 4, cold=False)[0]
        self.roof = ROOF_BYTES / us * 1e-6  # TB/s
        self.machine = cupy.cuda.runtime.getDeviceProperties(self.device.index)["name"].decode()
        driver = cupy.cuda.runtime.driverGetVersion()
        self.facts = {
            "gpu": self.machine,
            "arch": self.device.arch,
            "driver": nvidia_driver(),
            "cuda": f"{driver // 1000}.{driver % 1000 // 10}",
            "compiler": compiler_build(),
            "python": platform.python_version(),
            "cupy": cupy.__version__,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "empty_node_us": round(self.empty_us, 3),
            "read_roof_TBps": round(self.roof, 3),
        }

    def _reader(self, source, nbytes):
        buffer = cupy.zeros(nbytes // 4, cupy.uint32)
        sink = cupy.zeros(1, cupy.uint32)
        ready = load(source, "read_all", self.device).prepare(nbytes // 16 // 4096, 512, POINTER, POINTER)
        pointers = [buffer.data.ptr, sink.data.ptr]

        def read(stream, _keep=(buffer, sink)):
            ready.launch(pointers, stream)

        return read

    def header(self, what):
        f = self.facts
        print(what)
        print(
            f"{f['gpu']}, {f['arch']}, driver {f['driver']} (CUDA {f['cuda']}), {f['compiler']}, "
            f"commit {f['commit']}, {f['date']}; clocks not locked"
        )
        print(
            f"CUDA graph replay, medians; cold: L2 evicted before each replay, inputs that no launch left in L2; "
            f"empty node {self.empty_us:.2f} us; read roof in this run {self.roof:.2f} TB/s\n"
        )

    def device_time(self, launches, cold=True, repeats=11):
        """(median, p10, p90) us per launch of a graph of `launches`, callables of a stream handle."""
        cupy.cuda.Device().synchronize()  # the stream that measures does not wait for the one that filled the inputs
        with self.stream:
            for launch in launches:
                launch(self.stream.ptr)
            self.stream.synchronize()
            self.stream.begin_capture()
            for launch in launches:
                launch(self.stream.ptr)
            graph = self.stream.end_capture()
            graph.upload(self.stream)
            before, after = cupy.cuda.Event(), cupy.cuda.Event()
            samples = []
            for _ in range(repeats + 2):
                if cold:
                    self.sweep(self.stream.ptr)
                else:
                    graph.launch(self.stream)
                before.record(self.stream)
                graph.launch(self.stream)
                after.record(self.stream)
                after.synchronize()
                samples.append(cupy.cuda.get_elapsed_time(before, after) * 1e3 / len(launches))
        us = np.array(samples[2:])  # the first two warm clocks and caches of the driver
        return float(np.median(us)), float(np.percentile(us, 10)), float(np.percentile(us, 90))

    def host_time(self, call, calls=400, repeats=9):
        """Median us of host time for one eager call."""
        for _ in range(50):
            call()
        self.device.synchronize()
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - start) / calls * 1e6)
            self.device.synchronize()
        return float(np.median(samples))


def nvidia_driver():
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return next(word for word in text.split() if word[0].isdigit() and word.count(".") >= 1)
    except (OSError, StopIteration):
        return "unknown"


def commit():
    if given := os.environ.get("BENCH_COMMIT"):  # for a tree that travelled without its history
        return given
    done = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def arguments(doc):
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md between its markers")
    parser.add_argument("--recorded", type=Path, help="measure nothing: take the rows that --out kept in this file")
    return parser


def write_out(path, facts, rows):
    with path.open("a") as file:
        file.writelines(json.dumps({"run": facts, **row}) + "\n" for row in rows)


def read_out(path):
    """(facts, rows) of the last run that `write_out` kept in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    facts = lines[-1]["run"]
    return facts, [line for line in lines if line["run"] == facts]


def write_readme(marker, text):
    """Replace what stands between <!-- bench:MARKER --> and <!-- end --> in README.md."""
    path = HERE.parent / "README.md"
    whole = path.read_text()
    start = whole.index(f"<!-- bench:{marker} -->") + len(f"<!-- bench:{marker} -->")
    end = whole.index("<!-- end -->", start)
    path.write_text(f"{whole[:start]}\n{text.strip()}\n{whole[end:]}")


def main(doc, marker, measured, show, readme_table):
    """A bench script: rows from measured() -> (facts, rows), or from a file, to be shown, kept, put into the README."""
    options = arguments(doc).parse_args()
    facts, rows = read_out(options.recorded) if options.recorded else measured()
    show(rows)
    if options.out:
        write_out(options.out, facts, rows)
    if options.readme:
        write_readme(marker, readme_table(facts, rows))
