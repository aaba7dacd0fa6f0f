"""Host time of the paged KV pool against a manager of page objects, and replay of request traces.

    python bench/memory.py [--out FILE] [--readme] [--recorded FILE]
    python bench/memory.py --trace FILE [--limit N] [--pools PAGES ...] [--out FILE] [--plot FILE]

The pool runs on a device whose kernels do nothing, so that a time is the host's alone; the rival (memory_rival.py)
keeps the same books in the same run. Times are CPU time of the one thread that works (on a core of its own that is host
time; on a busy machine other programs are left out), medians; a time that passes its must is marked.
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
                manager.extend([seq], [CHUNK])
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
SAMPLES = 300  # points of use over time that are kept


def replay(device, requests, pages, progress, **engine):
    """One row of the table: all requests through a pool of so many pages; 0: as many as the trace can use."""
    bound = upper_bound(requests)
    infinite = pages == 0
    if infinite:
        blocks = len({block for request in requests for block in request.hash_ids.tolist()})
        pages = 2 * blocks + sum(-(-request.output_length // 256) + 3 for request in requests)
    checkpoints = max(pages // 8, 16)
    batch = engine.get("batch", 256)
    pool = make_pool(
        device,
        pages=pages + 1,
        window_pages=4 * batch + 2 * (CHUNK // 64 + 4) + 2 * checkpoints,
        checkpoints=checkpoints + 1,
        max_sequences=batch,
        max_length=1 << 18,
    )
    task = progress.add_task("infinite" if infinite else f"{pages:,} pages", total=len(requests))
    result = Engine(pool, requests, **engine).run(lambda done: progress.update(task, completed=done))
    stats = pool.stats()
    pool.reset_prefix_cache()
    pool.check()
    after = pool.stats()
    back = all(
        getattr(after, life).free == getattr(after, life).total for life in ("full", "window", "state", "checkpoint")
    )
    if not back:
        raise SystemExit(f"{pages} pages: not every page came back: {after}")
    steps = np.array(result.steps)
    weights = np.diff(steps[:, 0], prepend=0.0)
    share = steps[:, 5:7] / pages
    every = max(1, len(steps) // SAMPLES)
    prompt_tokens = sum(request.input_length for request in requests)
    return {
        "bench": "memory-trace",
        "pages": pages,
        "infinite": infinite,
        "requests": len(requests),
        "finished": result.finished,
        "refused": result.refused,
        "input_tokens": prompt_tokens,
        "hit_rate": round(result.hit_tokens / prompt_tokens, 4),
        "bound": round(bound / prompt_tokens, 4),
        "of_bound": round(result.hit_tokens / bound, 4) if bound else None,
        "lost_to_checkpoints": stats.tokens_lost,
        "preemptions": result.preemptions,
        "evicted_pages": stats.evictions,
        "mean_used": round(float(np.average(share[:, 0], weights=weights)), 4),
        "mean_cached": round(float(np.average(share[:, 1], weights=weights)), 4),
        "peak_used": round(float(share[:, 0].max()), 4),
        "steps": len(steps),
        "us_per_step": round(float(np.median(steps[:, 4])), 1),
        "us_per_step_p99": round(float(np.percentile(steps[:, 4], 99)), 1),
        "us_per_step_mean": round(float(steps[:, 4].mean()), 1),
        "us_decode_step": round(float(np.median(result.decode_us)), 1),
        "decode_batch": round(float(np.median(result.decode_batch)), 1),
        "engine_minutes": round(float(steps[-1, 0]) / 60e3, 1),
        "replay_seconds": round(result.seconds, 1),
        "use": [
            [round(t / 60e3, 2), int(u), int(c), int(w)] for t, u, c, w in steps[::every][:, (0, 5, 6, 2)].tolist()
        ],
    }


def show_trace(rows, flash_page):
    from rich.console import Console
    from rich.table import Table

    table = Table(title="pool sizes", title_justify="left")
    columns = (
        "pages",
        "GiB, Flash",
        "hit rate",
        "of bound",
        "lost to checkpoints",
        "preempted",
        "refused",
        "evicted",
        "used mean / peak",
    )
    columns += ("us a step", "p99", "us decode step (B)", "engine min", "replay s")
    for name in columns:
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            f"{r['pages']:,}" + (" (infinite)" if r["infinite"] else ""),
            f"{r['pages'] * flash_page / 2**30:.1f}",
            f"{100 * r['hit_rate']:.1f} %",
            f"{100 * (r['of_bound'] or 0):.1f} %",
            f"{100 * r['lost_to_checkpoints'] / r['input_tokens']:.1f} %",
            f"{r['preemptions']:,}",
            f"{r['refused']:,}",
            f"{r['evicted_pages']:,}",
            f"{100 * r['mean_used']:.0f} / {100 * r['peak_used']:.0f} %",
            f"{r['us_per_step']:.0f}",
            f"{r['us_per_step_p99']:.0f}",
            f"{r['us_decode_step']:.0f} ({r['decode_batch']:.0f})",
            f"{r['engine_minutes']:.0f}",
            f"{r['replay_seconds']:.0f}",
        )
    Console(width=200).print(table)
    print(f"the trace's own bound on hits, an infinite cache of 512-token blocks: {100 * rows[0]['bound']:.1f} %")


def plot_trace(path, facts, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 1.9 * len(rows)), sharex=True, squeeze=False)
    for axis, r in zip(axes[:, 0], rows, strict=True):
        minutes, used, cached, waiting = np.array(r["use"]).T
        axis.stackplot(minutes, 100 * used / r["pages"], 100 * cached / r["pages"], labels=("used", "cached"))
        axis.set_ylim(0, 100)
        axis.set_ylabel("% of pages")
        axis.set_title(f"{r['pages']:,} pages, hit rate {100 * r['hit_rate']:.1f} %", fontsize="medium", loc="left")
        queue = axis.twinx()
        queue.plot(minutes, waiting, color="black", linewidth=0.7, label="waiting")
        queue.set_ylabel("waiting")
    axes[0, 0].legend(loc="upper right")
    axes[-1, 0].set_xlabel(f"minutes of the engine's clock; {facts['cpu']}, commit {facts['commit']}")
    figure.tight_layout()
    figure.savefig(path)


def run_trace(options, device):
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    requests = read_trace(options.trace, options.limit)
    if not requests:
        raise SystemExit(f"{options.trace} holds no request")
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        return [replay(device, requests, pages, progress) for pages in options.pools]


def main():
    parser = arguments(__doc__)
    parser.add_argument("--trace", type=Path, help="replay a Mooncake JSONL trace instead")
    parser.add_argument("--limit", type=int, help="only the first requests of the trace")
    parser.add_argument("--pools", type=int, nargs="+", default=[*POOLS, 0], help="pages of each pool, 0: never full")
    parser.add_argument("--plot", type=Path, help="draw the trace's use over time (PNG or SVG; matplotlib)")
    options = parser.parse_args()
    device = NoKernels("sm_100a")
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
        show_trace(rows, KVLayout.for_model(FLASH).bytes_of("full"))
        if options.plot:
            plot_trace(options.plot, about, rows)
    else:
        show(rows)
        if options.readme:
            write_readme("memory", readme_table(about, rows))
    if options.out:
        write_out(options.out, about, rows)


if __name__ == "__main__":
    main()
