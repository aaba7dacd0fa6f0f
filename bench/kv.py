"""Latency of the kv kernels against a byte floor, a torch composition and a plain Triton kernel.

    python bench/kv.py [--out FILE] [--readme] [--recorded FILE]

gather_kv: k = 1024 entries a token, all different, of random pages of 1.2 GB; every launch has tokens of its own, and
an output of its own but for the rows "one output", where all write into one, as layers do into a workspace. The
floor is the bytes read and written at the roof of a large cudaMemcpyAsync within the GPU, measured in the same run.
PDL: the same launches, each let start while the one before it ends; host us: an eager call.
The error column counts elements (gathers) or bytes (appends) that differ from the oracle's, on a sample of tokens.
"""

import cupy
import numpy as np
from harness import Bench, main
from memory_kernels import copy_roofs, timing
from router import captured_by_torch

from dsv4_rt.formats import BF16
from dsv4_rt.kv import reference
from dsv4_rt.kv.ops import (
    INDEX_KEYS,
    RECORDS,
    append_index_keys,
    append_kv,
    compute_valid_lens,
    gather_kv,
)

PAGES, ENTRIES, BLOCKS, K = 32768, 64, 256, 1024
PAGE_BYTES = {"v4": 37440, "split": 37120}
TOKENS = (1, 32, 128, 1024)
REPEATS = 41  # replays: the first ten over arrays just made are slower, now and then by half
SAMPLE = 4  # tokens of a gather that the oracle checks


def random_cache(record):
    """Pages of records whose codes and scales are finite; the null page zero."""
    pages = cupy.random.randint(0, 2**31, (PAGES, PAGE_BYTES[record] // 4), dtype=cupy.uint32).view(cupy.uint8)
    pages &= 0x7B  # no code, bf16 or float32 with all exponent bits set
    if record == "v4":
        pages[:, 64 * 576 : 64 * 584] = cupy.random.randint(110, 140, (PAGES, 64 * 8), dtype=cupy.uint8)
    else:
        pages.view(cupy.float32)[:, 64 * 576 // 4 : 64 * 580 // 4] = cupy.random.rand(PAGES, 64, dtype=cupy.float32)
    pages[0] = 0
    return pages


def torch_of(*arrays):
    """The same arrays as torch tensors; bfloat16 crosses as uint16."""
    import torch

    given = []
    for x in arrays:
        wide = x.dtype == BF16
        tensor = torch.from_dlpack(x.view(cupy.int16) if wide else x)
        given.append(tensor.view(torch.bfloat16) if wide else tensor)
    return given


def by_torch_and_triton(bench, launches, chain, kernels):
    """(us of the torch chain, us of the fastest Triton kernel), callables of a launch's number."""
    try:
        import torch
    except ImportError:
        return {}

    def on(call):
        def run(i, stream):
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                call(i)

        return run

    torch_us = captured_by_torch(bench, on(chain), min(launches, 4))
    triton_us = min((captured_by_torch(bench, on(kernel), launches) for kernel in kernels), default=None)
    return {"torch_us": torch_us, "triton_us": triton_us}


def serial_and_pdl(bench, launch, launches, repeats=REPEATS):
    """Device time of launch(i, stream, pdl): (median, p10, p90) one after another, and the median with early starts."""

    def every(pdl):
        return bench.device_time([lambda s, i=i: launch(i, s, pdl) for i in range(launches)], repeats=repeats)

    return every(False), every(True)[0]


def gather(bench, record, pages, T, one_output=False):
    launches = 20 if T < 1024 else 6
    sets, outputs = [], []
    for _ in range(launches if T < 1024 else 2):
        if not (outputs and one_output):
            outputs.append(cupy.full((T, K, 512), 7, BF16))
        index = cupy.argsort(cupy.random.rand(T, BLOCKS * ENTRIES, dtype=cupy.float32), axis=1)[:, :K]
        table = cupy.random.randint(1, PAGES, (T, BLOCKS), dtype=cupy.int32)
        sets.append((cupy.ascontiguousarray(index.astype(cupy.int32)), table, outputs[-1]))

    def launch(i, stream=None, pdl=False):
        index, table, out = sets[i % len(sets)]
        gather_kv(index, table, pages, record=record, out=out, stream=stream, pdl=pdl)

    timed = serial_and_pdl(bench, launch, launches, 11 if T >= 128 else REPEATS)
    wrong = 0
    for i in range(2):
        launch(i)
        index, table, out = sets[i]
        some = slice(max(T - SAMPLE, 0), T)
        ids = table[some].get()
        used, small = np.unique(ids, return_inverse=True)
        want = reference.gather_kv(
            index[some].get(), small.reshape(ids.shape), pages[cupy.asarray(used)].get(), record, ENTRIES
        )
        wrong += int((out[some].get().view(np.uint16) != want.view(np.uint16)).sum())
    host = bench.host_time(lambda: launch(0), calls=40 if T >= 128 else 400)
    nbytes = T * K * (4 + RECORDS[record][1] + 1024)
    baselines = {}
    try:
        import kv_baselines
    except ImportError:
        pass
    else:
        (bytes_,) = torch_of(pages)
        cache = kv_baselines.parts(bytes_, record)
        given = [torch_of(*each) for each in sets]
        baselines = by_torch_and_triton(
            bench,
            launches,
            lambda i: kv_baselines.torch_gather(*given[i % len(given)][:2], cache, record),
            [
                lambda i, R=R, w=w: kv_baselines.gather_kv(
                    *given[i % len(given)][:2], bytes_, given[i % len(given)][2], record, R, w
                )
                for R, w in ((1, 1), (1, 2), (2, 2), (4, 2), (8, 4))
            ],
        )
    name = f"gather_kv {record}" + (", one output" if one_output else "")
    return row(bench, name, T, timed, nbytes, host, wrong, baselines)


def append(bench, record, pages, T):
    launches = 20
    sets = []
    for _ in range(launches if T <= 1024 else 4):
        slots = cupy.random.permutation(PAGES * ENTRIES)[:T].astype(cupy.int64)
        if T > 1024:  # a prefill: neighbours, page by page
            slots = (cupy.random.permutation(PAGES)[: T // ENTRIES, None] * ENTRIES + cupy.arange(ENTRIES)).reshape(-1)
        sets.append((cupy.random.standard_normal((T, 512), dtype=cupy.float32).astype(BF16), slots))

    def launch(i, stream=None, pdl=False):
        x, slots = sets[i % len(sets)]
        append_kv(x, slots, pages, record=record, stream=stream, pdl=pdl)

    timed = serial_and_pdl(bench, launch, launches)
    x, slots = sets[0]
    launch(0)
    used = np.unique(slots[:256].get() // ENTRIES)
    mine = np.isin(slots.get() // ENTRIES, used)
    before = pages[cupy.asarray(used)].get()
    moved = np.searchsorted(used, slots.get()[mine] // ENTRIES) * ENTRIES + slots.get()[mine] % ENTRIES
    wrong = int((reference.append_kv(x.get()[mine], moved, before, record, ENTRIES) != before).sum())
    host = bench.host_time(lambda: launch(0), calls=100)
    nbytes = T * (8 + 1024 + RECORDS[record][1])
    baselines = {}
    try:
        import kv_baselines
    except ImportError:
        pass
    else:
        (bytes_,) = torch_of(pages)
        cache = kv_baselines.parts(bytes_, record)
        given = [torch_of(*each) for each in sets]
        baselines = by_torch_and_triton(
            bench,
            launches,
            lambda i: kv_baselines.torch_append(*given[i % len(given)], cache, record),
            [lambda i: kv_baselines.append_kv(*given[i % len(given)], bytes_, record)],
        )
    return row(bench, f"append_kv {record}", T, timed, nbytes, host, wrong, baselines)


def index_keys(bench, record, rotate, T):
    width = -(-ENTRIES * INDEX_KEYS[record][1] // 576) * 576
    pages = cupy.zeros((PAGES, width), cupy.uint8)
    launches = 20
    sets = []
    for _ in range(launches if T < 65536 else 8):
        slots = cupy.random.permutation(PAGES * ENTRIES)[:T].astype(cupy.int64)
        if T > 1024:
            slots = (cupy.random.permutation(PAGES)[: T // ENTRIES, None] * ENTRIES + cupy.arange(ENTRIES)).reshape(-1)
        sets.append((cupy.random.standard_normal((T, 128), dtype=cupy.float32).astype(BF16), slots))

    def launch(i, stream=None, pdl=False):
        x, slots = sets[i % len(sets)]
        append_index_keys(x, slots, pages, record=record, rotate=rotate, stream=stream, pdl=pdl)

    timed = serial_and_pdl(bench, launch, launches)
    x, slots = sets[0]
    pages.fill(0)
    launch(0)
    used = np.unique(slots[:256].get() // ENTRIES)
    mine = np.isin(slots.get() // ENTRIES, used)
    found = pages[cupy.asarray(used)].get()
    moved = np.searchsorted(used, slots.get()[mine] // ENTRIES) * ENTRIES + slots.get()[mine] % ENTRIES
    wrong = int(
        (reference.append_index_keys(x.get()[mine], moved, np.zeros_like(found), record, rotate) != found).sum()
    )
    host = bench.host_time(lambda: launch(0), calls=100)
    baselines = {}
    try:
        import kv_baselines
    except ImportError:
        pass
    else:
        (bytes_,) = torch_of(pages)
        cache = kv_baselines.key_parts(bytes_, record)
        given = [torch_of(*each) for each in sets]
        matrix = kv_baselines.hadamard().cuda() if rotate else None
        signs = matrix.sign().bfloat16() if rotate else None
        baselines = by_torch_and_triton(
            bench,
            launches,
            lambda i: kv_baselines.torch_index_keys(*given[i % len(given)], cache, record, matrix),
            [
                lambda i, R=R, w=w: kv_baselines.append_index_keys(*given[i % len(given)], bytes_, record, signs, R, w)
                for R, w in ((16, 1), (16, 4), (32, 4), (64, 4))
            ],
        )
    name = f"append_index_keys {record}" + (", rotated" if rotate else "")
    return row(bench, name, T, timed, T * (8 + 256 + INDEX_KEYS[record][1]), host, wrong, baselines)


def valid_lens(bench, T):
    launches = 20
    sets = []
    for _ in range(launches):
        positions = cupy.random.randint(0, 4 * ENTRIES * BLOCKS, T, dtype=cupy.int32)
        table = cupy.random.randint(1, PAGES, (64, BLOCKS), dtype=cupy.int32)
        table[:, BLOCKS // 2 :] = 0
        rows = cupy.random.randint(0, 64, T, dtype=cupy.int32)
        sets.append((positions, table, rows, cupy.full(T, -7, cupy.int32)))

    def launch(i, stream=None, pdl=False):
        positions, table, rows, out = sets[i]
        compute_valid_lens(positions, table, 4, row=rows, out=out, stream=stream, pdl=pdl)

    timed = serial_and_pdl(bench, launch, launches)
    wrong = 0
    for positions, table, rows, out in sets[:2]:
        want = reference.compute_valid_lens(positions.get(), table.get(), 4, ENTRIES, rows.get())
        wrong += int((out.get() != want).sum())
    host = bench.host_time(lambda: launch(0))

    def chain(i):
        positions, table, rows, _ = given[i % launches]
        pages = (table > 0).sum(1)[rows.long()]
        return ((positions + 1) // 4).minimum(pages * ENTRIES).int()

    baselines = {}
    try:
        import kv_baselines
    except ImportError:
        pass
    else:
        given = [torch_of(*each) for each in sets]
        baselines = by_torch_and_triton(
            bench,
            launches,
            chain,
            [
                lambda i, R=R, w=w: kv_baselines.compute_valid_lens(*given[i % launches], 4, R, w)
                for R, w in ((1, 1), (4, 1), (16, 4))
            ],
        )
    return row(bench, "compute_valid_lens", T, timed, T * 16, host, wrong, baselines)


def row(bench, case, T, timed, nbytes, host, wrong, baselines):
    alone, early = timed
    return {
        "case": case,
        "T": T,
        **timing(alone, nbytes / bench.copy_roof * 1e-3),
        "pdl_us": round(early, 3),
        "bytes": nbytes,
        "host_us": round(host, 2),
        "error": wrong,
        **baselines,
    }


def measure(bench):
    rows = []
    for record in RECORDS:
        pages = random_cache(record)
        rows += [gather(bench, record, pages, T) for T in TOKENS]
        rows += [gather(bench, record, pages, T, one_output=True) for T in (1, 32)]
        rows += [append(bench, record, pages, T) for T in (1, 64, 1024, 65536)]
        del pages
        cupy.get_default_memory_pool().free_all_blocks()
    rows += [
        index_keys(bench, record, rotate, T) for record in INDEX_KEYS for rotate in (False, True) for T in (64, 65536)
    ]
    rows += [valid_lens(bench, T) for T in (1, 8192)]
    return [{"bench": "kv", **each} for each in rows]


def ratio(row, name):
    return f"{row[name] / row['us']:.2f}x" if row.get(name) else ""


def share(row):
    return f"{100 * row['of_roof']:.0f} %" if row["of_roof"] > 0.2 else "latency"


def show(rows):
    print(f"{'':34}{'T':>7}{'us':>9}{'p10 .. p90':>20}{'PDL':>9}{'floor':>9}{'MB':>10}{'GB/s':>7}", end="")
    print(f"{'of roof':>9}{'vs torch':>10}{'vs Triton':>11}{'host us':>9}{'error':>7}")
    for row in rows:
        print(
            f"{row['case']:34}{row['T']:7}{row['us']:9.2f}{row['p10']:10.2f} ..{row['p90']:7.2f}{row['pdl_us']:9.2f}"
            f"{row['floor_us']:9.2f}{row['bytes'] / 1e6:10.3f}{row['bytes'] / row['us'] * 1e-3:7.0f}{share(row):>9}"
            f"{ratio(row, 'torch_us'):>10}{ratio(row, 'triton_us'):>11}{row['host_us']:9.2f}{row['error']:7}"
        )


def readme_table(facts, rows):
    lines = [
        "| kernel | T | us | with PDL | byte floor, us | of copy roof | against torch ops | against plain Triton |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['case']}` | {row['T']} | {row['us']:.2f} | {row['pdl_us']:.2f} | {row['floor_us']:.2f} "
        f"| {share(row)} | {ratio(row, 'torch_us')} | {ratio(row, 'triton_us')} |"
        for row in rows
    ]
    f = facts
    lines += [
        "",
        f"{f['gpu']} (`{f['arch']}`), driver {f['driver']}, {f['compiler']}, commit {f['commit']}, {f['date']}, clocks "
        f"not locked. Device time by CUDA-graph replay, cold, medians; an empty node takes {f['empty_node_us']:.2f} us."
        f" With PDL: the same launches, each let start while the one before it ends. The floor is the bytes read and "
        f"written at {f['copy_roof_GBps']:.0f} GB/s, a large cudaMemcpyAsync of the same run. "
        f"Gathers: k = {K} different entries of random pages of 1.2 GB; every launch has an output of its own, or all "
        "have one. Written by `python bench/kv.py --readme`.",
    ]
    return "\n".join(lines)


def measured():
    bench = Bench("bench/kv.py")
    bench.copy_roof = copy_roofs(bench)[0]
    rows = measure(bench)
    bench.header(f"kv kernels; gathers of k = {K}: records -> bf16 [T, {K}, 512]")
    print(f"roof by cudaMemcpyAsync within the GPU: {bench.copy_roof:.0f} GB/s\n")
    return {**bench.facts, "copy_roof_GBps": round(bench.copy_roof, 1)}, rows


if __name__ == "__main__":
    main(__doc__, "kv", measured, show, readme_table)
