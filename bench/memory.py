"""Host time of the paged KV pool against a manager of page objects, and replay of request traces.

    python bench/memory.py [--out FILE] [--readme] [--recorded FILE]
    python bench/memory.py --trace FILE [--limit N] [--pools PAGES ...] [--checkpoint-every N] [--device cuda:0]
        [--out FILE] [--plot FILE]

The pool runs on a device whose kernels do nothing, so that a time is the host's alone; the rival (memory_rival.py)
keeps the same books in the same run. Times are CPU time of the one thread that works (on a core of its own that is host
time; on a busy machine other programs are left out), medians; a time that passes its must is marked.
"""

import datetime
import functools
import os
import platform
import time
from pathlib import Path

import memory_replay
import numpy as np
from harness import arguments, commit, read_out, write_out, write_readme
from memory_replay import infinite_pool, replay
from memory_rival import RivalPool
from memory_trace import read_trace

from dsv4_rt.device import open_device, use_device
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.memory import Cache, KVLayout, KVPool, Part
from dsv4_rt.models import FLASH

BYTE = (Part("data", np.dtype(np.uint8), (1,)),)
ROW = (Part("data", np.dtype(np.uint8), (16,)),)  # state rows are copied in words of 16 B
STEPS = 400  # decode steps a row measures
MILLION = 1 << 20
CHUNK = 8192


class NoKernels(EmulatedDevice):
    """The emulator's memory, and launches that return at once: what is timed is the host's side of an upload."""

    def bind(self, kernel, geometry, params):
        return lambda stream: None


def thin_layout():
    """Every cache of a model, one layer and one byte an entry: any number of pages fits, the books are the same."""
    return KVLayout(
        "thin",
        (
            Cache("csa", "full", 4, 64, BYTE, 16, (0,)),
            Cache("index", "full", 4, 64, BYTE, 16, (0,)),
            Cache("hca", "full", 128, 2, BYTE, 16, (0,)),
            Cache("window", "window", 1, 64, BYTE, 16, (0,)),
            Cache("csa_state", "state", 1, 8, ROW, 16, (0,)),
            Cache("index_state", "state", 1, 8, ROW, 16, (0,)),
            Cache("hca_state", "state", 1, 128, ROW, 16, (0,)),
            Cache("csa_checkpoint", "checkpoint", 1, 4, ROW, 16, (0,), "csa_state"),
            Cache("index_checkpoint", "checkpoint", 1, 4, ROW, 16, (0,), "index_state"),
        ),
    )


def make_pool(device, **sizes):
    given = {"window_pages": 4096, "checkpoints": 64, "max_sequences": 256, "max_length": MILLION} | sizes
    return KVPool(thin_layout(), max_in_flight=CHUNK, device=device, **given)


def make_rival(**sizes):
    given = {"window_pages": 4096, "max_sequences": 256, "max_length": MILLION} | sizes
    return RivalPool(max_in_flight=CHUNK, max_tokens=CHUNK, **given)


def microseconds(call, repeats):
    """(median, p10, p90) us of `call`, each timed by itself."""
    times = np.empty(repeats)
    for i in range(repeats):
        start = time.thread_time()
        call()
        times[i] = time.thread_time() - start
    return [float(x) * 1e6 for x in np.percentile(times, (50, 10, 90))]


def fill(pool, rng, batch, low, high):
    """`batch` sequences of random lengths in the pool (or the rival), as a batch of a running server has them."""
    upload = pool.upload if isinstance(pool, KVPool) else pool.take_deltas
    seqs = [pool.create() for _ in range(batch)]
    for seq, length in zip(seqs, rng.integers(low, high, batch).tolist(), strict=True):
        for at in range(0, length - 1, CHUNK):
            pool.extend([seq], [min(CHUNK, length - 1 - at)])
            upload()
        pool.extend([seq], [1])  # the window pages that only the chunk needed leave
        upload()
    return seqs


def row(case, us, rival=None, must=None, goal=None, **facts):
    """A line of the table, times in us."""
    median, low, high = us
    line = {"case": case, "us": round(median, 2), "p10": round(low, 2), "p90": round(high, 2)}
    line |= {"rival_us": round(rival[0], 2)} if rival else {}
    return line | {"must_us": must, "goal_us": goal} | facts


def decode_steps(device, rng):
    """Steps that reserve one token for every sequence of a batch, in all groups; staging of what they changed."""
    rows = []
    for batch in (1, 64, 256):
        pages = 16 * batch + 64
        lengths = rng.spawn(1)[0]
        pool, rival = make_pool(device, pages=pages), make_rival(pages=pages)
        ours = fill(pool, rng, batch, 1000, 2000)
        theirs = fill(rival, lengths, batch, 1000, 2000)
        ids = np.array(ours)
        ones = [1] * batch
        staged = []
        rival_times = []
        times, upload_times = [], []
        pool.upload()
        for _ in range(STEPS):
            start = time.thread_time()
            pool.extend(ids)
            middle = time.thread_time()
            staged.append(pool.upload())
            end = time.thread_time()
            rival.extend(theirs, ones)
            rival.take_deltas()
            rival_times.append(time.thread_time() - end)
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
            upload = manager.upload if manager is pool else manager.take_deltas
            seq, spent = manager.create(), 0.0
            for _ in range(MILLION // CHUNK):
                start = time.thread_time()
                manager.extend(*((seq, CHUNK) if manager is pool else ([seq], [CHUNK])))
                spent += time.thread_time() - start
                upload()
            start = time.thread_time()
            manager.free(seq)
            release.append(time.thread_time() - start)
            grow.append(spent)
            upload()
    spread = [
        [float(x) * 1e6 for x in np.percentile(t, (50, 10, 90))] for t in (grown, rival_grown, freed, rival_freed)
    ]
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
        pool.extend([seq], [pool.next_checkpoint(seq) - pool.length(seq)])
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
        seqs = np.array(fill(pool, rng, 16, length, length + 1))
        staged = []

        def step(pool=pool, seqs=seqs, staged=staged):
            pool.extend(seqs)
            staged.append(pool.upload())

        rows.append(
            row(f"extend and upload, B = 16, at {length:,}", microseconds(step, STEPS), bytes=int(np.median(staged)))
        )
    return rows


def staged_bytes(device, rng):
    """What an upload stages against the bytes of table entries that are other than before, and its time."""
    pool = make_pool(device, pages=16 * 256 + 4200, max_sequences=257)
    seqs = np.array(fill(pool, rng, 256, 1000, 2000))
    mirror = pool._tables._mirror
    long = pool.create()

    def grow():
        pool.extend(long, CHUNK)

    def free():
        pool.free(long)

    def blank():
        pass

    rows = []
    cases = [("a decode step, B = 256", lambda: pool.extend(seqs)), ("the first chunk of 8,192", grow)]
    cases += [("the last of 128 chunks of 8,192", grow)] * 127 + [("free of 1M tokens", free), ("nothing", blank)]
    for case, change in cases:
        before = mirror.copy()
        change()
        pool._step.trim()  # what upload would do first: the step's tokens are blank from here on
        changed = int(np.count_nonzero(before != mirror)) * 4
        start = time.thread_time()
        staged = pool.upload()
        us = (time.thread_time() - start) * 1e6
        rows.append(row(f"upload of {case}", (us, us, us), bytes=staged, changed=changed))
    return [r for i, r in enumerate(rows) if i in (0, 1, 128, 129, 130)]


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
    head = {"us": 10, "p10 .. p90": 22, "rival us": 11, "rival": 8, "must us": 9, "goal us": 9, "staged B": 10}
    print(" " * 42 + "".join(f"{name:>{width}}" for name, width in head.items()) + f"{'changed B':>10}")
    for r in rows:
        ratio = f"{r['rival_us'] / r['us']:.1f}x" if "rival_us" in r else ""
        limits = "".join(f"{r[k]:9.0f}" if r[k] else " " * 9 for k in ("must_us", "goal_us"))
        missed = "  MISSED" if r["must_us"] and r["us"] > r["must_us"] else ""
        print(
            f"{r['case']:42}{r['us']:10.1f}{r['p10']:11.1f} ..{r['p90']:8.1f}{r.get('rival_us', ''):>11}{ratio:>8}"
            f"{limits}{r.get('bytes', ''):>10}{r.get('changed', ''):>10}{missed}"
        )


def readme_table(f, rows):
    lines = [
        "| operation | us | against page objects | must, us | bytes staged | changed |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ratio = f"{r['rival_us'] / r['us']:.1f}x" if "rival_us" in r else ""
        must = f"{r['must_us']:,.0f}" if r["must_us"] else ""
        lines.append(
            f"| {r['case']} | {r['us']:,.1f} | {ratio} | {must} | {r.get('bytes', '')} | {r.get('changed', '')} |"
        )
    lines += [
        "",
        f"{f['cpu']}, one core used, Python {f['python']}, NumPy {f['numpy']}, commit {f['commit']}, {f['date']}. CPU "
        "time of the host, medians, without the launch; reservation of all groups, tables and slot mappings. "
        "Page objects: `bench/memory_rival.py`, the same books kept by an object a page, in the same run. Written by "
        "`python bench/memory.py --readme`.",
    ]
    return "\n".join(lines)


def measure(device):
    rng = np.random.default_rng()
    rows = decode_steps(device, rng) + long_sequence(device) + prefix_hash(device, rng)
    rows += by_length(device, rng) + staged_bytes(device, rng)
    return [{"bench": "memory", **r} for r in rows]


# Traces.

POOLS = (1024, 4096, 16384, 65536)  # pages of 256 tokens
BATCH = 256


def trace_pool(options, device, requests, pages):
    """(pool, what its memory is): thin pages and no kernels, or with --device those of V4 Flash and all launches."""
    sizes = {"max_sequences": BATCH, "max_length": 1 << 18, "max_in_flight": CHUNK}
    sizes |= {"checkpoint_every": options.checkpoint_every}
    if pages:
        sizes |= {"pages": pages}
    else:
        pages, checkpoints = infinite_pool(requests, options.checkpoint_every)
        sizes |= {"pages": pages, "checkpoints": checkpoints}
    if options.device:
        return KVPool(KVLayout.for_model(FLASH), device=device, **sizes), f"V4 Flash on {device.name}"
    return KVPool(thin_layout(), device=device, **sizes), "host only"


def run_trace(options, device):
    from rich import progress as rich

    requests = read_trace(options.trace, options.limit)
    if not requests:
        raise SystemExit(f"{options.trace} holds no request")
    columns = (rich.TextColumn("{task.description:>16}"), rich.BarColumn(), rich.MofNCompleteColumn())
    rows = []
    with rich.Progress(*columns, rich.TimeElapsedColumn(), rich.TimeRemainingColumn()) as progress:
        for pages in options.pools:
            task = progress.add_task(f"{pages:,} pages" if pages else "infinite", total=len(requests))
            pool, label = trace_pool(options, device, requests, pages)
            tick = functools.partial(lambda task, done: progress.update(task, completed=done), task)
            rows.append(replay(pool, requests, tick, batch=BATCH, infinite=not pages, label=label))
    return rows


def main():
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, help="replay a Mooncake JSONL trace instead")
    parser.add_argument("--limit", type=int, help="only the first requests of the trace")
    parser.add_argument("--pools", type=int, nargs="+", default=[*POOLS, 0], help="pages of each pool, 0: never full")
    parser.add_argument("--checkpoint-every", type=int, default=4096, help="tokens between checkpoints")
    parser.add_argument("--device", help="replay with the memory of V4 Flash and all launches there: cuda:0")
    parser.add_argument("--plot", type=Path, help="draw the trace's use over time (PNG or SVG; matplotlib)")
    options = parser.parse_args()
    device = open_device(options.device) if options.device else NoKernels("sm_100a")
    if options.recorded:
        about, rows = read_out(options.recorded)
    else:
        about = facts()
        with use_device(device):
            rows = run_trace(options, device) if options.trace else measure(device)
    print(
        f"{about['cpu']}; Python {about['python']}, NumPy {about['numpy']}, commit {about['commit']}, {about['date']}"
    )
    if rows[0]["bench"] == "memory-trace":
        flash_page = KVLayout.for_model(FLASH).bytes_of("full")
        memory_replay.show(rows, flash_page)
        if options.readme:
            write_readme("memory_trace", memory_replay.readme_table(about, rows, flash_page))
        if options.plot:
            memory_replay.plot(options.plot, about, rows)
    else:
        show(rows)
        if options.readme:
            write_readme("memory", readme_table(about, rows))
    if options.out:
        write_out(options.out, about, rows)


if __name__ == "__main__":
    main()
