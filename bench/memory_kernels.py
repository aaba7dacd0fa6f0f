"""Latency of the pool's own kernels: upload_deltas for a step's tables, copy_pages against the copy roof.

    python bench/memory_kernels.py [--out FILE] [--readme] [--recorded FILE]

upload_deltas: the floor is its staged bytes at the roof of a large copy out of pinned memory, the baseline a
cudaMemcpyAsync for every run of changed words. copy_pages: Flash, v4 records, nvfp4 keys; the floor is the bytes read
and written at the roof of a large cudaMemcpyAsync within the GPU, the baseline torch's `pages[:, dst] = pages[:, src]`
for every cache. The error column counts bytes that are not what they should be.
"""

import time

import cupy
import numpy as np
from harness import Bench, main
from router import captured_by_torch

import dsv4_rt
from dsv4_rt.memory.layout import KVLayout
from dsv4_rt.memory.ops import COPY_PAGES_WARPS, grid, prepare_copy_pages, prepare_upload_deltas, upload_deltas_grid
from dsv4_rt.memory.storage import Storage
from dsv4_rt.memory.tables import Tables

CACHES = ("window", "csa", "index", "hca")
ROOF_BYTES = 2**30
LAUNCHES = 20


def copy_roofs(bench):
    """(GB/s read and written within the GPU, GB/s out of pinned memory), by large cudaMemcpyAsync."""
    runtime, stream = cupy.cuda.runtime, bench.stream
    a, b = (cupy.zeros(ROOF_BYTES, cupy.uint8) for _ in range(2))
    before, after = cupy.cuda.Event(), cupy.cuda.Event()
    times = []
    for _ in range(7):  # eager: as a node of a graph the same copy reaches two thirds of this
        before.record(stream)
        for _ in range(4):
            runtime.memcpyAsync(b.data.ptr, a.data.ptr, ROOF_BYTES, runtime.memcpyDeviceToDevice, stream.ptr)
        after.record(stream)
        after.synchronize()
        times.append(cupy.cuda.get_elapsed_time(before, after) * 1e3 / 4)
    inside = float(np.median(times))
    host = cupy.cuda.alloc_pinned_memory(2**26)
    over = bench.device_time(
        [lambda s: runtime.memcpyAsync(a.data.ptr, host.ptr, 2**26, runtime.memcpyHostToDevice, s)] * 4, cold=False
    )[0]
    return 2 * ROOF_BYTES / inside * 1e-3, 2**26 / over * 1e-3


# ----------------------------------------------------------------------------------------------- upload_deltas


def step(tables, rng, rows, tokens):
    """Mark what a step changes: every token's slots, row and position, every row's length, some pages."""
    for name, slots in tables.slots.items():
        slots[:tokens] = rng.integers(0, 2**31, tokens)
        tables.mark_range(f"slots.{name}", 0, tokens)
    for name, array, n in (
        ("token_rows", tables.token_rows, tokens),
        ("positions", tables.positions, tokens),
        ("lengths", tables.lengths, rows),
    ):
        array[:n] = rng.integers(0, 2**20, n)
        tables.mark_range(name, 0, n)
    for name, table, pages in (("full", tables.full, tokens / 256), ("window", tables.window, tokens / 64)):
        at = rng.integers(0, table[:rows].size, max(1, round(pages)))
        table.reshape(-1)[at] = rng.integers(1, 1000, at.size)
        tables.mark(name, at)


def upload(bench, name, rows, tokens):
    rng = np.random.default_rng()
    sets = []
    for _ in range(8):
        tables = Tables(bench.device, max(rows, 256), 4096, 131, 8192, CACHES, 1)
        step(tables, rng, rows, tokens)
        runs = list(tables._runs)
        buffer, chunks, singles, staged = tables._stage()
        ready = prepare_upload_deltas(bench.device, upload_deltas_grid(chunks, singles))
        sets.append(
            (tables, buffer, (tables._arena_ptr, buffer.ptr, tables._mirror.size, chunks, singles), ready, runs)
        )

    def launch(i, stream):
        _, _, pointers, ready, _ = sets[i % len(sets)]
        ready.launch(pointers, stream)

    def by_memcpy(i, stream):
        tables, buffer, pointers, _, runs = sets[i % len(sets)]
        runtime = cupy.cuda.runtime
        for first, words in [*runs, *((int(word), 1) for word in tables._singles[: pointers[4]])]:
            to = tables._arena_ptr + 4 * first
            runtime.memcpyAsync(to, buffer.ptr, 4 * words, runtime.memcpyHostToDevice, stream)

    timed = bench.device_time([lambda s, i=i: launch(i, s) for i in range(LAUNCHES)])
    wrong = sum(int((t._arena.get().view(np.uint8) != t._mirror.view(np.uint8)).sum()) for t, *_ in sets)
    memcpy = bench.device_time([lambda s, i=i: by_memcpy(i, s) for i in range(4)])[0]
    tables = sets[0][0]
    samples = []
    for _ in range(200):
        step(tables, rng, rows, tokens)
        bench.device.synchronize()
        start = time.perf_counter()
        tables.upload()
        samples.append((time.perf_counter() - start) * 1e6)
    return {
        "case": "upload_deltas",
        "what": name,
        **timing(timed, staged / bench.host_roof * 1e-3),
        "bytes": staged,
        "baseline_us": round(memcpy, 3),
        "host_us": round(float(np.median(samples)), 2),
        "error": wrong,
    }


# -------------------------------------------------------------------------------------------------- copy_pages


def copy(bench, storage, life, n):
    """One row: n copies of a life cycle, or of checkpoints out of state rings ("save")."""
    rng = np.random.default_rng()
    copier, layout = storage._copy_pages, storage.layout
    source_life, target_life = ("state", "checkpoint") if life == "save" else (life, life)
    count = min(storage.counts[source_life], storage.counts[target_life])
    names = [c.name for c in layout.of(target_life)]
    each = 2 * layout.bytes_of(target_life) * n  # read and written
    # As many different lists of pages as pass the L2 twice, where there are pages for them.
    lists = max(1, min(LAUNCHES, (count - 1) // (2 * n)))
    pages = rng.permutation(np.arange(1, count))[: 2 * n * lists].reshape(lists, 2, n).astype(np.int32)
    sets = []
    for source, target in pages:
        records = np.zeros((n, 4), np.int32)
        records[:, 0], records[:, 1] = source, target
        if life == "save":
            records = np.repeat(records, 4, axis=0)
            records[:, 2] = records[:, 3] = np.tile(np.arange(4), n)
        message, warps = copier.message({life: records})
        pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(message.nbytes), np.int32, message.size)
        pinned[:] = message.reshape(-1)
        ready = prepare_copy_pages(bench.device, grid(-(-warps // COPY_PAGES_WARPS)))
        sets.append((source, target, pinned, cupy.asarray(message), warps, ready))

    def kernel(i, stream):
        _, _, _, message, warps, ready = sets[i % lists]
        ready.launch((copier.tiles, message.data.ptr, warps), stream)

    def both(i, stream):
        _, _, pinned, message, _, _ = sets[i % lists]
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(message.data.ptr, pinned.ctypes.data, pinned.nbytes, runtime.memcpyHostToDevice, stream)
        kernel(i, stream)

    launches = LAUNCHES if each < 2**30 else 4
    wrong = 0
    for _, target, *_ in sets:
        for name in names:
            storage.array(name)[:, cupy.asarray(target)] = 0xA5
    timed = bench.device_time([lambda s, i=i: kernel(i, s) for i in range(launches)])
    sent = bench.device_time([lambda s, i=i: both(i, s) for i in range(launches)])[0]
    for source, target, *_ in sets[:launches]:
        for cache in layout.of(target_life):
            got = storage.array(cache.name)[:, cupy.asarray(target[:64])]
            of = storage.array(cache.rows_of)[:, cupy.asarray(source[:64])] if life == "save" else None
            want = storage.array(cache.name)[:, cupy.asarray(source[:64])] if of is None else of[..., : got.shape[2]]
            wrong += int((got != want).sum())
    pairs = np.stack([pages[0][0], pages[0][1]], axis=1)
    triples = np.concatenate([pairs, np.full((n, 1), 256, np.int32)], axis=1)
    call = {"save": triples} if life == "save" else {"copies": {life: pairs}}
    samples = []
    for _ in range(40 if n < 100 else 8):
        bench.device.synchronize()  # otherwise it waits for a staging buffer that a long copy still reads
        start = time.perf_counter()
        storage.copy(**call)
        samples.append((time.perf_counter() - start) * 1e6)
    host = float(np.median(samples))
    return {
        "case": "copy_pages",
        "what": f"{n} {life}",
        **timing(timed, each / bench.copy_roof * 1e-3),
        "bytes": each,
        "with_message_us": round(sent, 3),
        "baseline_us": None if life == "save" else by_torch(bench, storage, names, pages, min(launches, 4)),
        "host_us": round(host, 2),
        "error": wrong,
    }


def by_torch(bench, storage, names, pages, launches):
    try:
        import torch
    except ImportError:
        return None
    arrays = [torch.from_dlpack(storage.array(name)) for name in names]
    index = torch.from_dlpack(cupy.asarray(pages.astype(np.int64)))

    def call(i, stream):
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            source, target = index[i % len(index)]
            for array in arrays:
                array.index_copy_(1, target, array.index_select(1, source))

    return captured_by_torch(bench, call, launches)


def timing(timed, floor):
    median, low, high = timed
    return {
        "us": round(median, 3),
        "p10": round(low, 3),
        "p90": round(high, 3),
        "floor_us": round(floor, 3),
        "of_roof": round(floor / median, 3),
    }


def measure(bench):
    rows = [upload(bench, "one sequence", 1, 1)]
    rows += [upload(bench, f"decode, B = {B}", B, B) for B in (64, 256, 1024)]
    rows += [upload(bench, "prefill, 8192 tokens", 1, 8192)]
    counts = {"full": 9000, "window": 2000, "state": 200, "checkpoint": 1000}
    storage = Storage(KVLayout.for_model(dsv4_rt.FLASH), bench.device, counts)
    for name in storage.layout.names:
        array = storage.array(name)
        array.view(cupy.uint32)[...] = cupy.random.randint(0, 2**31, array.shape[2] // 4, dtype=cupy.uint32)
        array.view(cupy.uint32)[...] += cupy.arange(array.shape[1], dtype=cupy.uint32)[:, None]
        array[:, 0] = 0
    for life, n in (
        ("full", 1), ("full", 8), ("full", 64), ("full", 512), ("full", 4096),
        ("window", 1), ("window", 64), ("state", 1), ("state", 16), ("save", 1), ("save", 64),
    ):  # fmt: skip
        rows.append(copy(bench, storage, life, n))
    return [{"bench": "memory_kernels", **row} for row in rows]


def show(rows):
    print(f"{'':16}{'':22}{'us':>9}{'p10 .. p90':>20}{'+message':>10}{'MB':>10}{'GB/s':>7}", end="")
    print(f"{'of roof':>9}{'baseline':>10}{'host us':>9}{'error':>7}")
    for row in rows:
        message = f"{row['with_message_us']:.2f}" if "with_message_us" in row else ""
        ratio = f"{row['baseline_us'] / row['us']:.1f}x" if row["baseline_us"] else ""
        share = f"{100 * row['of_roof']:.0f} %" if row["of_roof"] > 0.2 else "latency"
        print(
            f"{row['case']:16}{row['what']:22}{row['us']:9.2f}{row['p10']:10.2f} ..{row['p90']:7.2f}{message:>10}"
            f"{row['bytes'] / 1e6:10.3f}{row['bytes'] / row['us'] * 1e-3:7.0f}{share:>9}{ratio:>10}"
            f"{row['host_us']:9.2f}{row['error']:7}"
        )


def readme_table(facts, rows):
    lines = [
        "| kernel | what | us | us, message sent too | MB | floor, us | of roof | against |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rival = "memcpy" if row["case"] == "upload_deltas" else "torch"
        ratio = f"{row['baseline_us'] / row['us']:.1f}x {rival}" if row["baseline_us"] else ""
        lines.append(
            f"| `{row['case']}` | {row['what']} | {row['us']:.2f} | {row.get('with_message_us', row['us']):.2f} "
            f"| {row['bytes'] / 1e6:.4g} | {row['floor_us']:.2f} | {100 * row['of_roof']:.0f} % | {ratio} |"
        )
    f = facts
    lines += [
        "",
        f"{f['gpu']} (`{f['arch']}`), driver {f['driver']}, {f['compiler']}, commit {f['commit']}, {f['date']}, clocks "
        f"not locked. Device time by CUDA-graph replay, cold, medians; an empty node takes {f['empty_node_us']:.2f} us."
        f" Roofs of the same run, by cudaMemcpyAsync: {f['copy_roof_GBps']:.0f} GB/s read and written within the GPU, "
        f"{f['host_roof_GBps']:.0f} GB/s out of pinned memory. copy_pages: Flash, v4 records, nvfp4 keys, all caches "
        "and layers; bytes read and written; its list of pages is sent to the device first, upload_deltas reads its "
        "message where it lies. Against: a cudaMemcpyAsync for each run of changed words; torch's "
        "index_select and index_copy_ for each cache. Written by `python bench/memory_kernels.py --readme`.",
    ]
    return "\n".join(lines)


def measured():
    bench = Bench("bench/memory_kernels.py")
    bench.copy_roof, bench.host_roof = copy_roofs(bench)
    rows = measure(bench)
    bench.header("the pool's own kernels: a step's tables uploaded, pages of Flash copied")
    print(f"roofs by cudaMemcpyAsync, GB/s: {bench.copy_roof:.0f} in the GPU, {bench.host_roof:.0f} from the host\n")
    roofs = {"copy_roof_GBps": round(bench.copy_roof, 1), "host_roof_GBps": round(bench.host_roof, 1)}
    return {**bench.facts, **roofs}, rows


if __name__ == "__main__":
    main(__doc__, "memory_kernels", measured, show, readme_table)
