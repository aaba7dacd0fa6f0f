"""What the hardware counters say about one launch of the router's decode kernels and of the pair they replace.

    ncu --clock-control none -k "regex:dense_router|nvjet|splitK|activation_topk" --metrics METRICS \\
        --csv --page raw --log-file FILE python bench/router_counters.py
    python bench/router_counters.py --table FILE

METRICS: what `python bench/router_counters.py --metrics` prints. ncu empties the caches before each pass and runs one
kernel at a time, launch included: its times are not those of a graph. Shares are what explains them.
"""

import argparse
import csv
from pathlib import Path

METRICS = {
    "gpu__time_duration.sum": ("us", 1e-3),
    "launch__grid_size": ("blocks", 1),
    "launch__registers_per_thread": ("regs", 1),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps %", 1),
    "dram__bytes_read.sum": ("HBM MB", 1e-6),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("HBM %", 1),
    "lts__t_bytes.sum": ("L2 MB", 1e-6),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("L2 %", 1),
    "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_active": ("L1 %", 1),
    "smsp__cycles_active.avg": ("cycles", 1),
    "smsp__issue_active.avg.pct_of_peak_sustained_active": ("issue %", 1),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("memory", 1),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("barrier", 1),
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio": ("fence", 1),
    "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio": ("queue", 1),
    "smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio": ("shared", 1),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("wait", 1),
}
TOKENS = (1, 4, 8, 16, 32, 64)


def launch_each():
    import cupy
    import numpy as np
    from gates import MODELS, gate_sets

    import dsv4_rt
    from dsv4_rt.router import dense

    product = dsv4_rt.GateProduct()
    for shape in MODELS.values():
        E, H = shape.num_experts, shape.hidden_size
        space = dense.new_workspace(E, 64)
        for N in TOKENS:
            ((hidden, w_gate, bias, out, logits),) = gate_sets(shape, N, 1)
            dsv4_rt.dense_router_decode(hidden, w_gate, bias, 6, 2.5, workspace=space, out=out)
        product.run(hidden.data.ptr, (w_gate.data.ptr,), logits.data.ptr, N, E, H, H, E, 0)
        dsv4_rt.activation_topk(logits, bias, 6, 2.5, out=out)
        cupy.cuda.runtime.deviceSynchronize()
        assert not bool(cupy.isnan(out[0]).any())
        assert np.isfinite(out[0].get()).all()


def table(path):
    rows = list(csv.reader(path.read_text().splitlines()))
    start = next(i for i, row in enumerate(rows) if row[:1] == ["ID"])
    names = rows[start]
    print("".join(f"{name:>8}" for name, _ in METRICS.values()), " kernel")
    for row in rows[start + 2 :]:
        found = dict(zip(names, row, strict=True))
        kernel = found["Kernel Name"].partition("(")[0].removeprefix("void ")
        cells = []
        for metric, (_, unit) in METRICS.items():
            value = float(found[metric].replace(",", "") or "nan") * unit
            cells.append(f"{value:8.0f}" if value == int(value) or value > 1000 else f"{value:8.2f}")
        print("".join(cells), "", kernel)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--metrics", action="store_true", help="print the names of the counters")
    parser.add_argument("--table", type=Path, help="show what ncu wrote")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS))
    elif options.table:
        table(options.table)
    else:
        launch_each()


if __name__ == "__main__":
    main()
