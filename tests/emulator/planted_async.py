"""Bugs planted in the kernels of hopper/: a change of their text, the check that must find it, and where that points.

    python tests/emulator/planted_async.py       # run all under every schedule and write the emulator's README

`-v` prints every report instead.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
README = HERE.parents[1] / "dsv4_rt" / "emulator" / "README.md"
BEGIN, END = "<!-- planted: python tests/emulator/planted_async.py -->", "<!-- /planted -->"
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from asynchronous import COMPLETIONS  # noqa: E402
from hopper_kernels import EVIDENCE, FOLDER  # noqa: E402

import dsv4_rt  # noqa: E402
from dsv4_rt.emulated_device import EmulatedDevice  # noqa: E402
from dsv4_rt.errors import Deadlock, KernelFault  # noqa: E402
from dsv4_rt.launch import load as load_kernel  # noqa: E402


@dataclass(frozen=True)
class Plant:
    kernel: str
    old: str  # once in the text of the kernel, or of hopper.cuh
    new: str
    check: str  # of CHECKS: what reports it, under every schedule, the first if several could
    at: str  # in the text of a source line that the report quotes


# What a report says -> the check, as the table names it. The first that fits counts.
CHECKS = {
    "in flight, read": "reads the destination of an asynchronous",
    "in flight, written": "overwrites the (destination|source) of an asynchronous",
    "registers in flight": "is the accumulator of an asynchronous wgmma",
    "wgmma.fence": "without a wgmma.fence|missing wgmma.fence",
    "proxy fence": "no fence.proxy.async lies between",
    "descriptor and tile": "is not what its descriptor|take different k",
    "descriptor": "holds the CTA's rank",
    "alignment": "is not a multiple of",
    "mbarrier order": "nothing orders it after the init of the mbarrier",
    "mbarrier count": "more arrivals than the phase expects",
    "deadlock": "no thread can go on",
    "race": "race on shared memory",
    "uninitialised": "uninitialised shared memory",
    "cluster exit": "the CTA exits while others may still access",
    "cluster rank": "names rank",
    "exit": "the thread exits while its asynchronous",
}
WRITES = "for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) out[b][i] = s * in[b][i];"
LOAD_A, PRODUCT = "tma_load_2d(stage, &a", "wgmma_64x128x16(acc"

PLANTS = {
    # The ring: transaction bytes, phases, waits.
    "no expect_tx": Plant(
        "gemm_ring", "mbarrier_arrive_expect(barrier, STAGE)", "mbarrier_arrive(barrier)", "in flight, read", PRODUCT
    ),
    "expect_tx too small": Plant(
        "gemm_ring", "expect(barrier, STAGE)", "expect(barrier, STAGE / 2)", "in flight, read", PRODUCT
    ),
    "expect_tx too large": Plant(
        "gemm_ring",
        "expect(barrier, STAGE)",
        "expect(barrier, STAGE + 16)",
        "deadlock",
        "mbarrier_wait(shared_address(&full",
    ),
    "no full wait": Plant(
        "gemm_ring", "mbarrier_wait(shared_address(&full[s]), i / STAGES & 1);", "", "uninitialised", PRODUCT
    ),
    "wrong full parity": Plant(
        "gemm_ring", "&full[s]), i / STAGES & 1)", "&full[s]), (i / STAGES & 1) ^ 1)", "uninitialised", PRODUCT
    ),
    "wrong empty parity": Plant(
        "gemm_ring",
        "(i / STAGES & 1) ^ 1);   //",
        "i / STAGES & 1);   //",
        "deadlock",
        "mbarrier_wait(shared_address(&full",
    ),
    "no empty wait": Plant(
        "gemm_ring",
        "mbarrier_wait(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);",
        "",
        "in flight, written|mbarrier count",
        "",
    ),
    "slot freed too early": Plant(
        "gemm_ring",
        "if (i > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(shared_address(&empty[(i - 1) % STAGES]));",
        "if (threadIdx.x % 128 == 0) mbarrier_arrive(shared_address(&empty[i % STAGES]));",
        "in flight, written",
        LOAD_A,
    ),
    "products not waited for": Plant("gemm_ring", "wgmma_wait<1>();", "", "in flight, written", LOAD_A),
    "accumulator read too early": Plant("gemm_ring", "wgmma_wait<0>();", "", "registers in flight", "= acc[4 * j + e]"),
    "no wgmma.fence": Plant("gemm_ring", "wgmma_fence();", "", "wgmma.fence", PRODUCT),
    "empty counts one warpgroup": Plant(
        "gemm_ring",
        "init(shared_address(&empty[s]), 2)",
        "init(shared_address(&empty[s]), 1)",
        "deadlock",
        "mbarrier_wait(",
    ),
    "empty counts three": Plant(
        "gemm_ring",
        "init(shared_address(&empty[s]), 2)",
        "init(shared_address(&empty[s]), 3)",
        "deadlock",
        "mbarrier_wait(",
    ),
    "barriers used before init": Plant(
        "gemm_ring",
        "    __syncthreads();\n\n    if (group == 0)",
        "    if (group == 0)",
        "mbarrier order",
        "mbarrier_wait(",
    ),
    "wrong swizzle": Plant("gemm_ring", "u64(1) << 62", "u64(2) << 62", "descriptor and tile", PRODUCT),
    "wrong SBO": Plant("gemm_ring", "u64(1024 >> 4) << 32", "u64(512 >> 4) << 32", "descriptor and tile", PRODUCT),
    "wrong K advance": Plant("gemm_ring", "da + 2 * k, db", "da + k, db", "descriptor and tile", PRODUCT),
    "stage not aligned": Plant(
        "gemm_ring",
        "(shared_address(raw) + 1023) & ~1023u",
        "(shared_address(raw) + 1023 & ~1023u) + 8",
        "alignment",
        LOAD_A,
    ),
    # Clusters.
    "address of a cluster not masked": Plant(
        "gemm_multicast", "(address & 0x3ffff) >> 4", "address >> 4", "descriptor", "wgmma_64x64x16(acc"
    ),
    "no cluster barrier before exit": Plant(
        "gemm_multicast",
        "cluster_sync();                                           // the other",
        "// the other",
        "cluster exit",
        "",
    ),
    "block barrier for a cluster barrier": Plant(
        "gemm_multicast",
        "cluster_sync();                                           // no copy",
        "__syncthreads(); // no copy",
        "mbarrier order",
        "gemm_multicast.cu:27",
    ),
    "empty counts one block": Plant(
        "gemm_multicast",
        "init(shared_address(&empty[s]), 2)",
        "init(shared_address(&empty[s]), 1)",
        "deadlock|mbarrier count",
        "",
    ),
    "multicast to one block": Plant("gemm_multicast", "barrier, 0b11)", "barrier, 0b01)", "deadlock", "mbarrier_wait"),
    "both blocks load one half": Plant(
        "gemm_multicast",
        "stage + HALF + rank * (HALF / 2)",
        "stage + HALF",
        "in flight, written",
        "tma_load_2d_multicast(",
    ),
    "mailbox read after a block barrier": Plant(
        "split_k_cluster",
        "cluster_sync();                                           // all partial",
        "__syncthreads(); // all partial",
        "cluster exit|race|uninitialised",
        "",
    ),
    "a rank that is not there": Plant(
        "split_k_cluster", "e % OWN]), e / OWN)", "e % OWN]), e / OWN + 1)", "cluster rank", "store_remote("
    ),
    # cp.async.
    "waits for too few groups": Plant(
        "cp_async_ring", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()", "in flight, read", "ldmatrix_x4("
    ),
    "no barrier after the wait": Plant(
        "cp_async_ring",
        "__syncthreads();                                      // everyone's",
        "// everyone's",
        "race",
        "ldmatrix_x4(",
    ),
    "no commit": Plant("cp_async_ring", "        cp_async_commit();", "", "in flight, read", "ldmatrix_x4("),
    "slot filled while it is read": Plant(
        "cp_async_ring",
        "__syncthreads();                                      // everyone's are, and step i - 1 has been read\n"
        "        fill(i + STAGES - 1);",
        "fill(i + STAGES - 1);\n        __syncthreads();",
        "race",
        "cp_async_16(",
    ),
    "cp.async not aligned": Plant("cp_async_ring", "PITCH = 80", "PITCH = 72", "alignment", "cp_async_16("),
    # Stores by TMA.
    "no proxy fence before a store": Plant("scale_tiles", "fence_async_shared(); ", "", "proxy fence", "tma_store_2d("),
    "proxy fence before the writes": Plant(
        "scale_tiles",
        f"{WRITES}\n        fence_async_shared();",
        f"fence_async_shared();\n        {WRITES}",
        "proxy fence",
        "tma_store_2d(",
    ),
    "buffer reused under a store": Plant(
        "scale_tiles",
        'if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");',
        "",
        "in flight, written",
        "out[b][i] = s * in[b][i]",
    ),
    "store not committed": Plant(
        "scale_tiles", "            bulk_commit();\n", "", "in flight, written", "out[b][i] = s * in[b][i]"
    ),
    "exit while a store reads": Plant(
        "scale_tiles", "if (threadIdx.x == 0) bulk_wait_read();  ", "//", "exit", "tma_store_2d("
    ),
    "tile loaded into a buffer in use": Plant(
        "scale_tiles",
        "load(tile + gridDim.x, b ^ 1);",
        "load(tile + gridDim.x, b);",
        "in flight, written|mbarrier count",
        "",
    ),
}


def planted(each: Plant, folder: Path) -> str:
    """A copy of the kernel's folder with the bug in it; returns the changed text."""
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    for name in (f"{each.kernel}.cu", "hopper.cuh"):
        text = (FOLDER / name).read_text()
        if each.old in text:
            assert text.count(each.old) == 1, f"{each.old!r} is not unique in {name}"
            (folder / name).write_text(text.replace(each.old, each.new))
            return text
    raise AssertionError(f"{each.old!r} is in neither {each.kernel}.cu nor hopper.cuh")


def outcome(each: Plant, folder: Path, completion: str, seed: int = 1) -> str:
    """The report under one schedule, "" if there is none."""
    device = EmulatedDevice("sm_90a", completion=completion, seed=seed)
    device.machine.source_roots = (folder,)

    def load(file, name):
        return load_kernel(str(folder / file), name, device)

    with dsv4_rt.use_device(device):
        try:
            EVIDENCE[each.kernel].run(device, load, np.random.default_rng(seed))
        except (KernelFault, Deadlock) as error:
            return str(error)
        except AssertionError:
            pass  # a wrong result, and nobody said so
    return ""


def check_of(message: str) -> str:
    """The check that a report comes from."""
    return next((name for name, pattern in CHECKS.items() if re.search(pattern, message)), "")


def findings(each: Plant, folder: Path) -> dict[str, tuple[str, str]]:
    """Completion schedule -> (check, report); the check is "" where the kernel ran through, even if wrongly."""
    planted(each, folder)
    found = {}
    for completion in COMPLETIONS:
        message = outcome(each, folder, completion)
        found[completion] = check_of(message), message
    return found


def table() -> str:
    """The table of the emulator's README."""
    lines = [f"| bug | kernel | {' | '.join(COMPLETIONS)} |", "|---" * (2 + len(COMPLETIONS)) + "|"]
    for name, each in PLANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = findings(each, Path(folder))
        checks = [found[completion][0] or "unseen" for completion in COMPLETIONS]
        lines.append(f"| {name} | {each.kernel} | {' | '.join(checks)} |")
        if "-v" in sys.argv:
            print(f"== {name}")
            for completion, (check, message) in found.items():
                print(f"  {completion}: {check}\n    " + message.replace("\n", "\n    "))
    return "\n".join(lines)


def main() -> None:
    found = table()
    if "-v" not in sys.argv:
        text = README.read_text()
        head, rest = text.split(BEGIN)
        README.write_text(f"{head}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
