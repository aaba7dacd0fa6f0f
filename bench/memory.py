"""Host time of the paged KV pool against a manager of page objects, and replay of request traces.

    python bench/memory.py [--out FILE] [--readme] [--recorded FILE]
    python bench/memory.py --trace FILE [--limit N] [--pools PAGES ...] [--out FILE] [--plot FILE]

The pool runs on a device whose kernels do nothing, so that a time is the host's alone; the rival (memory_rival.py) keeps
the same books in the same run, one core each. Medians; a time that passes its must is marked.
"""

import datetime
import os
import platform
import time
from pathlib import Path

import numpy as np
from harness import arguments, commit, read_out, write_out, write_readme
from memory_rival import RivalPool
from memory_trace import Engine, read_trace, upper_bound

from dsv4_rt.device import use_device
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.memory import Cache, KVLayout, KVPool, Part

BYTE = (Part("data", np.dtype(np.uint8), (1,)),)
STEPS = 400  # decode steps a row measures
MILLION = 1 << 20
CHUNK = 8192


class NoKernels(EmulatedDevice):
    """The emulator's memory, and launches that return at once: what is timed is the host's side of an upload."""

    def bind(self, kernel, geometry, params):
        return lambda stream: None


def thin_layout():
    """Every cache of a model with one byte an entry and one layer: 365,000 pages fit anywhere, the books are the same."""
    return KVLayout(
        "thin",
        (
            Cache("csa", "full", 4, 64, BYTE, 16, (0,)),
            Cache("index", "full", 4, 64, BYTE, 16, (0,)),
            Cache("hca", "full", 128, 2, BYTE, 16, (0,)),
            Cache("window", "window", 1, 64, BYTE, 16, (0,)),
            Cache("csa_state", "state", 1, 8, BYTE, 16, (0,)),
            Cache("index_state", "state", 1, 8, BYTE, 16, (0,)),
            Cache("hca_state", "state", 1, 128, BYTE, 16, (0,)),
            Cache("csa_checkpoint", "checkpoint", 1, 4, BYTE, 16, (0,)),
            Cache("index_checkpoint", "checkpoint", 1, 4, BYTE, 16, (0,)),
        ),
    )


def make_pool(device, **sizes):
    given = {"window_pages": 4096, "checkpoints": 64, "max_sequences": 256, "max_length": MILLION} | sizes
    return KVPool(thin_layout(), max_in_flight=CHUNK, max_tokens=CHUNK, device=device, **given)


def make_rival(**sizes):
    given = {"window_pages": 4096, "max_sequences": 256, "max_length": MILLION} | sizes
    return RivalPool(max_in_flight=CHUNK, max_tokens=CHUNK, **given)


def microseconds(call, repeats):
    """(median, p10, p90) us of `call`, each timed by itself."""
    times = np.empty(repeats)
    for i in range(repeats):
        start = time.perf_counter()
        call()
        times[i] = time.perf_counter() - start
    return [float(x) * 1e6 for x in np.percentile(times, (50, 10, 90))]


def fill(pool, rng, batch, low, high):
    """`batch` sequences of random lengths in the pool (or the rival), as a batch of a running server has them."""
    seqs = [pool.create() for _ in range(batch)]
    for seq, length in zip(seqs, rng.integers(low, high, batch).tolist(), strict=True):
        for at in range(0, length, CHUNK):
            pool.extend([seq], [min(CHUNK, length - at)])
    return seqs


def row(case, us, rival=None, must=None, goal=None, **facts):
    """A line of the table, times in us."""
    median, low, high = us
    line = {"case": case, "us": round(median, 2), "p10": round(low, 2), "p90": round(high, 2)}
    line |= {"rival_us": round(rival[0], 2)} if rival else {}
    return line | {"must_us": must, "goal_us": goal} | facts


def decode_steps(device, rng):
    """Steps that reserve one token for every sequence of a batch, in all groups; and the staging of what they changed."""
    rows = []
    for batch in (1, 64, 256):
        pages = 16 * batch + 64
        lengths = rng.spawn(1)[0]
        pool, rival = make_pool(device, pages=pages), make_rival(pages=pages)
        ours = fill(pool, rng, batch, 1000, 2000)
        theirs = fill(rival, lengths, batch, 1000, 2000)
        ones = [1] * batch
        staged = []
        rival_times = []
        times, upload_times = [], []
        pool.upload()
        for _ in range(STEPS):
            start = time.perf_counter()
            pool.extend(ours, ones)
            middle = time.perf_counter()
            staged.append(pool.upload())
            end = time.perf_counter()
            rival.extend(theirs, ones)
            rival.take_deltas()
            rival_times.append(time.perf_counter() - end)
            times.append(middle - start)
            upload_times.append(end - middle)
        spread = [[float(x) * 1e6 for x in np.percentile(t, (50, 10, 90))] for t in (times, upload_times, rival_times)]
        limits = {"must": 150.0, "goal": 100.0} if batch == 256 else {}
        rows.append(row(f"decode step, B = {batch}", spread[0], spread[2], **limits))
        rows.append(row(f"its upload, no launch, B = {batch}", spread[1], bytes=int(np.median(staged))))
    return rows


def long_sequence(device):
    """1,048,576 tokens in chunks of 8,192, all reservations together; then free."""
    grown, freed, rival_grown, rival_freed = [], [], [], []
    pool, rival = make_pool(device, pages=4200), make_rival(pages=4200)
    for _ in range(7):
        for manager, grow, release in ((pool, grown, freed), (rival, rival_grown, rival_freed)):
            start = time.perf_counter()
            seq = manager.create()
            for _ in range(MILLION // CHUNK):
                manager.extend([seq], [CHUNK])
                if manager is rival:
                    rival.take_deltas()
            middle = time.perf_counter()
            manager.free(seq)
            release.append(time.perf_counter() - middle)
            grow.append(middle - start)
        pool.upload()
        rival.take_deltas()
    spread = [[float(x) * 1e6 for x in np.percentile(t, (50, 10, 90))] for t in (grown, rival_grown, freed, rival_freed)]
    return [
        row("1M tokens in chunks of 8,192", spread[0], spread[1], must=10_000.0),
        row("free of 1M tokens", spread[2], spread[3], must=1000.0),
    ]


def prefix_hash(device, rng):
    """Digests of a prompt of 1M tokens, and what a lookup that finds all of it costs with verification and sharing."""
    tokens = rng.integers(0, 129_280, MILLION, dtype=np.int32)
    rival = make_rival(pages=64)
    first = rival.create()
    theirs = microseconds(lambda: rival.append(first, tokens), 5)
    pool = make_pool(device, pages=4200)
    ours = microseconds(lambda: pool.digests(tokens), 9)
    seq = pool.create(tokens)
    while pool.length(seq) < MILLION:
        pool.extend([seq], [min(CHUNK, MILLION - pool.length(seq), pool.next_checkpoint(seq) - pool.length(seq))])
        pool.upload()
    pool.free(seq)

    def hit():
        found = pool.create(tokens)
        assert pool.length(found) >= MILLION - 4096, pool.length(found)
        pool.free(found)

    return [
        row("prefix hash of 1M tokens", ours, theirs, must=15_000.0),
        row("lookup that finds 1M tokens, and free", microseconds(hit, 5)),
    ]


def by_length(device, rng):
    """A decode step of 16 sequences at lengths 1k to 1M: time and staged bytes must not grow."""
    rows = []
    for length in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, MILLION - 1024):
        pages = 16 * (length // 256 + 8)
        pool = make_pool(device, pages=pages, max_sequences=16)
        seqs = fill(pool, rng, 16, length, length + 1)
        pool.upload()
        staged = []

        def step(pool=pool, seqs=seqs, staged=staged):
            pool.extend(seqs, [1] * 16)
            staged.append(pool.upload())

        rows.append(row(f"extend and upload, B = 16, at {length:,}", microseconds(step, STEPS), bytes=int(np.median(staged))))
    return rows


def facts():
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.machine(),
    )
    return {
        "cpu": f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def show(rows):
    print(f"{'':42}{'us':>10}{'p10 .. p90':>22}{'rival us':>11}{'rival':>8}{'must us':>9}{'goal us':>9}{'bytes':>9}")
    for r in rows:
        ratio = f"{r['rival_us'] / r['us']:.1f}x" if "rival_us" in r else ""
        limits = "".join(f"{r[k]:9.0f}" if r[k] else " " * 9 for k in ("must_us", "goal_us"))
        missed = "  MISSED" if r["must_us"] and r["us"] > r["must_us"] else ""
        print(
            f"{r['case']:42}{r['us']:10.1f}{r['p10']:11.1f} ..{r['p90']:8.1f}{r.get('rival_us', ''):>11}{ratio:>8}"
            f"{limits}{r.get('bytes', ''):>9}{missed}"
        )


def readme_table(f, rows):
    lines = ["| operation | us | against page objects | must, us | bytes staged |", "|---|---|---|---|---|"]
    for r in rows:
        ratio = f"{r['rival_us'] / r['us']:.1f}x" if "rival_us" in r else ""
        must = f"{r['must_us']:,.0f}" if r["must_us"] else ""
        lines.append(f"| {r['case']} | {r['us']:,.1f} | {ratio} | {must} | {r.get('bytes', '')} |")
    lines += [
        "",
        f"{f['cpu']}, one core used, Python {f['python']}, NumPy {f['numpy']}, commit {f['commit']}, {f['date']}. Host "
        "time, medians, without the launch; reservation of all groups, tables and slot mappings. Page objects: "
        "`bench/memory_rival.py`, the same books kept by an object a page, in the same run. Written by "
        "`python bench/memory.py --readme`.",
    ]
    return "\n".join(lines)


def measure(device):
    rng = np.random.default_rng()
    rows = decode_steps(device, rng) + long_sequence(device) + prefix_hash(device, rng) + by_length(device, rng)
    return [{"bench": "memory", **r} for r in rows]
