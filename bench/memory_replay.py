"""One replay as a row of a table: what it measured, the table, the plot of use over time."""

import numpy as np
from memory_trace import Engine, upper_bound

SAMPLES = 300  # points of use over time that are kept


def infinite_pool(requests, checkpoint_every):
    """(pages, checkpoints) that no replay of these requests can fill."""
    blocks = len({block for request in requests for block in request.hash_ids.tolist()})
    pages = 2 * blocks + sum(-(-request.output_length // 256) + 3 for request in requests)
    return pages, 2 * len(requests) + 256 * pages // checkpoint_every


def replay(pool, requests, tick, *, batch, infinite=False, label=""):
    """All requests through a pool, every page back at the end: a row of the table."""
    bound = upper_bound(requests)
    pages = pool.stats().full.total
    result = Engine(pool, requests, batch=batch).run(tick)
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
        "memory": label,
        "pages": pages,
        "infinite": infinite,
        "checkpoint_every": pool.checkpoint_every,
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


def order(rows):
    """By memory, checkpoints, size."""
    return sorted(rows, key=lambda r: (r["requests"], r["memory"] != "host only", -r["checkpoint_every"], r["pages"]))


def cells(r, flash_page):
    """What the table says of a row, by column."""
    return {
        "pages": f"{r['pages']:,}" + (" (never full)" if r["infinite"] else ""),
        "GiB of V4 Flash": f"{r['pages'] * flash_page / 2**30:.1f}",
        "checkpoint every": f"{r['checkpoint_every']:,}",
        "hit rate": f"{100 * r['hit_rate']:.1f} %",
        "bound": f"{100 * r['bound']:.1f} %",
        "lost to checkpoints": f"{100 * r['lost_to_checkpoints'] / r['input_tokens']:.1f} %",
        "preempted": f"{r['preemptions']:,}",
        "refused": f"{r['refused']:,}",
        "evicted": f"{r['evicted_pages']:,}",
        "used, mean / peak": f"{100 * r['mean_used']:.0f} / {100 * r['peak_used']:.0f} %",
        "steps": f"{r['steps']:,}",
        "us a step, median / p99": f"{r['us_per_step']:.0f} / {r['us_per_step_p99']:.0f}",
        "us a decode step (B)": f"{r['us_decode_step']:.0f} ({r['decode_batch']:.0f})",
        "replayed in, s": f"{r['replay_seconds']:.0f}",
    }


def show(rows, flash_page):
    from rich.console import Console
    from rich.table import Table

    for memory, requests in dict.fromkeys((r["memory"], r["requests"]) for r in order(rows)):
        mine = [cells(r, flash_page) for r in order(rows) if (r["memory"], r["requests"]) == (memory, requests)]
        table = Table(title=f"{requests:,} requests; memory: {memory}", title_justify="left")
        for name in mine[0]:
            table.add_column(name, justify="right")
        for row in mine:
            table.add_row(*row.values())
        Console(width=220).print(table)
    print("hit rate and bound: of the input tokens. bound: an infinite cache of 512-token blocks, by the trace alone.")


def readme_table(f, rows, flash_page):
    left_out = ("refused", "steps", "evicted", "used, mean / peak")
    mine = [cells(r, flash_page) for r in order(rows) if r["memory"] == "host only"]
    columns = [name for name in mine[0] if name not in left_out]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in mine]
    r = order(rows)[-1]
    lines += [
        "",
        f"{r['requests']:,} requests, {r['input_tokens'] / 1e6:.0f} million input tokens: admission, prefix reuse, "
        "chunked prefill, decoding, preemption and eviction on a model engine (20 ms a step, 25 us a prefill token); "
        "every page is back at the end. Hit rate and bound are shares of the input tokens; the bound is what an "
        "infinite cache of 512-token blocks would find. Times are the pool's own CPU time, hashing included, without "
        f"launches. {f['cpu']}, Python {f['python']}, NumPy {f['numpy']}, commit {f['commit']}, {f['date']}. Written "
        "by `python bench/memory.py --trace FILE --readme`.",
    ]
    return "\n".join(lines)


def plot(path, facts, rows):
    """Pages used and cached over the engine's time, and how many requests wait; a panel a pool."""
    rows = [r for r in order(rows) if r["memory"] == "host only"]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 1.9 * len(rows)), sharex=True, squeeze=False)
    for axis, r in zip(axes[:, 0], rows, strict=True):
        minutes, used, cached, waiting = np.array(r["use"]).T
        axis.stackplot(minutes, 100 * used / r["pages"], 100 * cached / r["pages"], labels=("used", "cached"))
        axis.set_ylim(0, 100)
        axis.set_ylabel("% of pages")
        axis.set_title(
            f"{r['pages']:,} pages, checkpoints every {r['checkpoint_every']:,}, hit rate {100 * r['hit_rate']:.1f} %",
            fontsize="medium",
            loc="left",
        )
        queue = axis.twinx()
        queue.plot(minutes, waiting, color="black", linewidth=0.7, label="waiting")
        queue.set_ylabel("waiting")
    axes[0, 0].legend(loc="upper right")
    axes[-1, 0].set_xlabel(f"minutes of the engine's clock; {facts['cpu']}, commit {facts['commit']}")
    figure.tight_layout()
    figure.savefig(path, dpi=72)
