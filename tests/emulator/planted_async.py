"""Bugs planted in the kernels of hopper/: a change of their text, the report it must lead to and where that points.

`python tests/emulator/planted_async.py` runs all under every schedule and prints the table of the emulator's README.
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
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from hopper_kernels import EVIDENCE, FOLDER  # noqa: E402
from asynchronous import COMPLETIONS as SCHEDULES  # noqa: E402

import dsv4_rt  # noqa: E402
from dsv4_rt.emulated_device import EmulatedDevice  # noqa: E402
from dsv4_rt.errors import Deadlock, KernelFault  # noqa: E402
from dsv4_rt.launch import load as load_kernel  # noqa: E402


@dataclass(frozen=True)
class Plant:
    kernel: str
    old: str  # once in the text of the kernel, or of hopper.cuh
    new: str
    message: str  # of the report, a regular expression
    at: str = ""  # in the text of a source line the report names; "" where `new` is


PLANTS: dict[str, Plant] = {}
EXPECT = "mbarrier_arrive_expect(barrier, STAGE)"


def plant(name, kernel, old, new, message, at=""):
    PLANTS[name] = Plant(kernel, old, new, message, at)


# The ring: transaction bytes, phases, waits.
plant("no expect_tx", "gemm_ring", EXPECT, "mbarrier_arrive(barrier)", "in flight|not been observed", "wgmma")
plant("expect_tx too small", "gemm_ring", EXPECT, EXPECT.replace("STAGE", "STAGE / 2"), "in flight|tx", "")
plant("expect_tx too large", "gemm_ring", EXPECT, EXPECT.replace("STAGE", "STAGE + 16"), r"tx", "mbarrier")
plant("no full wait", "gemm_ring", "mbarrier_wait(shared_address(&full[s]), i / STAGES & 1);", "",
      "in flight|not been observed|uninitialised", "wgmma")
plant("wrong full parity", "gemm_ring", "&full[s]), i / STAGES & 1)", "&full[s]), (i / STAGES & 1) ^ 1)",
      "in flight|not been observed|uninitialised|no thread can go on", "")
plant("wrong empty parity", "gemm_ring", "(i / STAGES & 1) ^ 1);   //", "i / STAGES & 1);   //", "no thread can go on",
      "mbarrier")
plant("no empty wait", "gemm_ring", "mbarrier_wait(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);", "",
      "overwrit|in flight|still read", "")
plant("slot freed too early", "gemm_ring", "&empty[(i - 1) % STAGES]", "&empty[i % STAGES]", "overwrit|still read|in flight",
      "")
plant("products not waited for", "gemm_ring", "wgmma_wait<1>();", "", "overwrit|still read|in flight", "")
plant("accumulator read too early", "gemm_ring", "wgmma_wait<0>();", "", "wait_group|in flight", "")
plant("no wgmma.fence", "gemm_ring", "wgmma_fence();", "", "wgmma.fence", "")
plant("empty counts one warpgroup", "gemm_ring", "mbarrier_init(shared_address(&empty[s]), 2)",
      "mbarrier_init(shared_address(&empty[s]), 1)", "overwrit|still read|in flight|arriv", "")
plant("empty counts three", "gemm_ring", "mbarrier_init(shared_address(&empty[s]), 2)",
      "mbarrier_init(shared_address(&empty[s]), 3)", "no thread can go on", "mbarrier")
plant("barriers used before init", "gemm_ring", "    __syncthreads();\n\n    if (group == 0)", "\n    if (group == 0)",
      "mbarrier|race", "")
plant("no fence after mbarrier init", "gemm_ring", "fence_mbarrier_init();", "", "fence", "")
plant("wrong swizzle", "gemm_ring", "u64(1) << 62", "u64(2) << 62", "swizzle", "wgmma")
plant("wrong SBO", "gemm_ring", "u64(1024 >> 4) << 32", "u64(512 >> 4) << 32", "descriptor|row", "wgmma")
plant("wrong K advance", "gemm_ring", "da + 2 * k, db", "da + k, db", "descriptor|k ", "wgmma")
plant("stage not aligned", "gemm_ring", "(shared_address(raw) + 1023) & ~1023u", "(shared_address(raw) + 1023 & ~1023u) + 8",
      "align", "")
# Clusters.
plant("cluster address not masked", "gemm_multicast", "(address & 0x3ffff) >> 4", "address >> 4", "descriptor|bit", "wgmma")
plant("no cluster barrier before exit", "gemm_multicast", "    cluster_sync();                                           // the other",
      "// the other", "exit", "")
plant("block barrier for a cluster barrier", "gemm_multicast", "    cluster_sync();                                           // no copy",
      "    __syncthreads(); // no copy", "mbarrier|init|race", "")
plant("empty counts one block", "gemm_multicast", "mbarrier_init(shared_address(&empty[s]), 2);",
      "mbarrier_init(shared_address(&empty[s]), 1);", "overwrit|still read|in flight|arriv", "")
plant("multicast to one block", "gemm_multicast", "barrier, 0b11)", "barrier, 0b01)", "no thread can go on|in flight|tx", "")
plant("both blocks load one half", "gemm_multicast", "stage + HALF + rank * (HALF / 2)", "stage + HALF",
      "in flight|uninitialised|overwrit", "")
plant("no barrier before the mailbox is read", "split_k_cluster", "    cluster_sync();                                           // all partial",
      "    __syncthreads(); // all partial", "race|uninitialised", "mailbox[r]")
plant("a rank that is not there", "split_k_cluster", "e % OWN]), e / OWN)", "e % OWN]), e / OWN + 1)", "rank|cluster", "")
# cp.async.
plant("waits for too few groups", "cp_async_ring", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()",
      "in flight|not been observed|uninitialised", "ldmatrix")
plant("no barrier after the wait", "cp_async_ring", "__syncthreads();                                      // everyone's", "// everyone's",
      "race|in flight|not been observed|uninitialised", "")
plant("no commit", "cp_async_ring", "        cp_async_commit();", "", "in flight|not been observed|uninitialised", "ldmatrix")
plant("slot filled while it is read", "cp_async_ring",
      "        __syncthreads();                                      // everyone's are, and step i - 1 has been read\n        fill(i + STAGES - 1);",
      "        fill(i + STAGES - 1);\n        __syncthreads();", "race|overwrit|still", "")
plant("cp.async not aligned", "cp_async_ring", "PITCH = 80", "PITCH = 72", "align", "")
# Stores by TMA.
plant("no proxy fence before a store", "scale_tiles", "fence_async_shared(); ", "", "fence.proxy.async", "tma_store_2d")
plant("proxy fence before the writes", "scale_tiles",
      "for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) out[b][i] = s * in[b][i];\n        fence_async_shared();",
      "fence_async_shared();\n        for (int i = threadIdx.x; i < ROWS * COLUMNS; i += 128) out[b][i] = s * in[b][i];",
      "fence.proxy.async", "tma_store_2d")
plant("buffer reused under a store", "scale_tiles",
      'if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");', "",
      "still read|in flight|overwrit", "out[b][i]")
plant("store not committed", "scale_tiles", "            bulk_commit();\n", "", "still read|in flight|overwrit|exit", "")
plant("exit while a store reads", "scale_tiles", "    if (threadIdx.x == 0) bulk_wait_read();  ", "    //", "exit", "")
plant("tile loaded into a buffer in use", "scale_tiles", "load(tile + gridDim.x, b ^ 1);", "load(tile + gridDim.x, b);",
      "in flight|overwrit|tx|no thread can go on", "")


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


def outcome(each: Plant, folder: Path, completion: str, seed: int = 1) -> tuple[str, str]:
    """("reported", message), ("wrong", "") or ("unseen", "") under one schedule."""
    device = EmulatedDevice("sm_90a", completion=completion, seed=seed)
    device.machine.source_roots = (folder,)

    def load(file, name):
        return load_kernel(str(folder / file), name, device)

    with dsv4_rt.use_device(device):
        try:
            EVIDENCE[each.kernel].run(device, load, np.random.default_rng(seed))
        except (KernelFault, Deadlock) as error:
            return "reported", str(error)
        except AssertionError:
            return "wrong", ""
    return "unseen", ""


def fits(each: Plant, message: str) -> bool:
    return re.search(each.message, message) is not None and re.search(r"\.cuh?[:(]\d+", message) is not None and each.at in message


def main() -> None:
    for name, each in PLANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            planted(each, Path(folder))
            for completion in SCHEDULES:
                state, message = outcome(each, Path(folder), completion)
                first = message.strip().split("\n")
                print(f"{name:36} {completion:7} {state:9} {fits(each, message)!s:6}")
                if "-v" in sys.argv:
                    print("      " + "\n      ".join(line[:170] for line in first[:8]))


if __name__ == "__main__":
    main()
