"""dense_router_decode_sm100 as machine code, and what it may take: evidence without a B200, and no measurement.

    python bench/static_sm100.py [--out FILE] [--readme] [--recorded FILE]

NVRTC assembles each instantiation for sm_100a; nvdisasm (`pip install nvidia-cuda-nvdisasm`, or a toolkit's on PATH)
counts what proves that tensor cores and TMA are used. Registers, spills and shared memory are ptxas's own report.

The time is an estimate: latency + max(bytes / HBM, a block's bytes / L2), where
  latency  what an H200 took for 16 tokens by dense_router_decode_mma, cold, with programmatic dependent launch, less
           its byte floor (h200-router.jsonl, commit 6ae12ec): 4.12 - 0.48 us for Flash, 4.96 - 1.23 for Pro. It holds
           the launch, a trip to HBM, the cluster, the ticket, the row and the rule; tcgen05 is assumed to add nothing.
  HBM      8 TB/s, the data sheet's.
  L2       64 B a clock for each SM at 1.85 GHz, nobody in anybody's way.
Bytes in flight are those that a block has asked for before the first has come; 8 TB/s over 148 SMs for 1 us of loaded
latency, an assumption too, is what keeps HBM busy.
"""

import datetime
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from harness import arguments, commit, read_out, write_out, write_readme

from dsv4_rt.compile import compile, compiler_build
from dsv4_rt.formats import BF16
from dsv4_rt.router import dense_sm100

SMS, HBM, SECOND_OF_LATENCY = 148, 8e12, 1e-6
L2_OF_SM = 64 * 1.85e9
SHAPES = {"flash": (256, 4096, 6, 4.18 - 0.48), "pro": (384, 7168, 6, 4.56 - 1.23)}  # E, K, k, latency in us
TOKENS = (8, 16, 32, 64)
PTX = {
    "mma": r"\btcgen05\.mma\.", "tma load": r"\bcp\.async\.bulk\.tensor\.", "commit": r"\btcgen05\.commit\.",
    "tma prefetch": r"\bcp\.async\.bulk\.prefetch\.tensor\.", "tmem load": r"\btcgen05\.ld\.",
}  # fmt: skip
SASS = {"mma": "UTCHMMA", "tma load": "UTMALDG", "commit": "UTCBAR", "tma prefetch": "UTMAPF", "tmem load": "LDTM"}
LOCAL = ("STL", "LDL")  # spills as instructions
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


def nvdisasm():
    """The disassembler, None if there is none."""
    try:
        import nvidia

        places = [Path(root) / "cu13" / "bin" / "nvdisasm" for root in nvidia.__path__]
    except ImportError:
        places = []
    found = next((str(path) for path in places if path.is_file()), None)
    return found or shutil.which("nvdisasm")


def opcodes(cubin, tool):
    """Opcode without its modifiers -> how often it occurs in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    counts = {}
    for name in _OPCODE.findall(text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def code(model, tool):
    """What the compiler made for a model's shape; "sass" only with a disassembler."""
    E, K, k, _ = SHAPES[model]
    source, name = dense_sm100.instance(E, k)
    artifact = compile(source, "sm_100a", (name,))
    kernel, tile = artifact.kernels[name], dense_sm100.tile(64, E, K, BF16, "sm_100a")
    row = {
        "table": "code",
        "case": model,
        "kernel": name,
        "registers": kernel.registers,
        "spill_bytes": kernel.spill_store_bytes + kernel.spill_load_bytes,
        "stack_bytes": kernel.stack_bytes,
        "shared_bytes": kernel.shared_bytes + tile.shared,
        "ptx": {what: len(re.findall(pattern, artifact.ptx)) for what, pattern in PTX.items()},
    }
    if tool:
        found = opcodes(artifact.cubin, tool)
        row["sass"] = {what: found.get(name, 0) for what, name in SASS.items()}
        row["sass"]["local memory"] = sum(found.get(name, 0) for name in LOCAL)
        row["instructions"] = sum(found.values())
    return row


def cost(model, N):
    """Bytes, and the time they may take."""
    E, K, _, latency = SHAPES[model]
    tile = dense_sm100.tile(N, E, K, BF16, "sm_100a")
    blocks = dense_sm100.CLUSTER * -(-E // tile.experts)
    pieces = -(-K // (dense_sm100.PIECE * dense_sm100.CLUSTER))  # of a block
    weights, hidden = pieces * tile.experts * 128, pieces * N * 128
    whole = 2 * (E + N) * K
    hbm, l2 = 1e6 * whole / HBM, 1e6 * (weights + hidden) / L2_OF_SM
    return {
        "table": "cost",
        "case": model,
        "N": N,
        "blocks": blocks,
        "whole_bytes": whole,
        "in_flight_bytes": min(tile.stages, pieces) * (tile.experts + N) * 128,
        "needed_bytes": round(HBM / SMS * SECOND_OF_LATENCY),
        "hbm_us": round(hbm, 2),
        "l2_us": round(l2, 2),
        "latency_us": round(latency, 2),
        "estimate_us": round(latency + max(hbm, l2), 1),
    }


def rows(tool):
    return [code(model, tool) for model in SHAPES] + [cost(model, N) for model in SHAPES for N in TOKENS]


def text(facts, rows):
    """Both tables, for a terminal and for bench/results."""
    lines = [
        "dense_router_decode_sm100: compiled, emulated, not yet run on a B200",
        f"{facts['compiler']}, {facts['nvdisasm']}, commit {facts['commit']}, {facts['date']}",
        "",
        f"{'case':6} {'UTCHMMA':>8} {'UTMALDG':>8} {'UTMAPF':>7} {'LDTM':>5} {'UTCBAR':>7} {'STL+LDL':>8} "
        f"{'instructions':>13} {'registers':>10} {'spill B':>8} {'shared B':>9}  kernel",
    ]
    for row in (row for row in rows if row["table"] == "code"):
        s = row["sass"]
        lines.append(
            f"{row['case']:6} {s['mma']:8} {s['tma load']:8} {s['tma prefetch']:7} {s['tmem load']:5} {s['commit']:7} "
            f"{s['local memory']:8} {row['instructions']:13} {row['registers']:10} {row['spill_bytes']:8} "
            f"{row['shared_bytes']:9}  {row['kernel']}"
        )
    lines += [
        "",
        "estimates, nothing measured: see bench/static_sm100.py for what they assume",
        f"{'case':6} {'N':>3} {'blocks':>7} {'of SMs':>7} {'KB in flight':>13} {'KB needed':>10} {'MB':>6} "
        f"{'HBM us':>7} {'L2 us':>6} {'latency us':>11} {'estimate us':>12}",
    ]
    for row in (row for row in rows if row["table"] == "cost"):
        lines.append(
            f"{row['case']:6} {row['N']:3} {row['blocks']:7} {SMS:7} {row['in_flight_bytes'] / 1e3:13.1f} "
            f"{row['needed_bytes'] / 1e3:10.1f} {row['whole_bytes'] / 1e6:6.2f} {row['hbm_us']:7.2f} "
            f"{row['l2_us']:6.2f} {row['latency_us']:11.2f} {row['estimate_us']:12.1f}"
        )
    return "\n".join(lines) + "\n"


def readme_table(facts, rows):
    lines = [
        "| case | UTCHMMA | UTMALDG | UTMAPF | LDTM | UTCBAR | registers | spills, B | shared memory, B |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["table"] == "code"):
        s = row["sass"]
        lines.append(
            f"| {row['case']} | {s['mma']} | {s['tma load']} | {s['tma prefetch']} | {s['tmem load']} | {s['commit']} "
            f"| {row['registers']} | {row['spill_bytes']} | {row['shared_bytes']:,} |"
        )
    lines += [
        "",
        "| case | tokens | blocks, on 148 SMs | KB in flight a block | KB needed | HBM, us | L2, us | *estimate*, us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (row for row in rows if row["table"] == "cost"):
        lines.append(
            f"| {row['case']} | {row['N']} | {row['blocks']} | {row['in_flight_bytes'] / 1e3:.1f} "
            f"| {row['needed_bytes'] / 1e3:.1f} | {row['hbm_us']:.2f} | {row['l2_us']:.2f} "
            f"| *{row['estimate_us']:.1f}* |"
        )
    flash, pro = SHAPES["flash"][3], SHAPES["pro"][3]
    lines += [
        "",
        f"Compiled, emulated, not yet run on a B200. {facts['compiler']}, {facts['nvdisasm']}, commit "
        f"{facts['commit']}, {facts['date']}. All that a block reads is in flight at once; where that is less than "
        "keeps 8 TB/s busy for a microsecond, there is no more to read. The estimate assumes 8 TB/s, 64 B a clock from "
        f"L2 to an SM at 1.85 GHz, and the latency an H200 has in the same place ({flash:.2f} and {pro:.2f} us: 16 "
        "tokens by `dense_router_decode_mma`, cold, with PDL, less the byte floor); nothing in the second table was "
        "measured. Written by `python bench/static_sm100.py --readme`.",
    ]
    return "\n".join(lines)


def main():
    options = arguments(__doc__).parse_args()
    if options.recorded:
        facts, found = read_out(options.recorded)
    else:
        tool = nvdisasm()
        if tool is None:
            raise SystemExit("bench/static_sm100.py: no nvdisasm; pip install nvidia-cuda-nvdisasm")
        version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
        facts = {
            "compiler": compiler_build(),
            "nvdisasm": "nvdisasm " + re.search(r"\bV([\d.]+)", version)[1],
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }
        found = rows(tool)
    print(text(facts, found), end="")
    if options.out:
        write_out(options.out, facts, found)
        options.out.with_suffix(".txt").write_text(text(facts, found))
    if options.readme:
        write_readme("static_sm100", readme_table(facts, found))


if __name__ == "__main__":
    main()
