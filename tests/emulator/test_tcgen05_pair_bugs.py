# ruff: noqa: E501  (bugs are changes of source lines)
"""Bugs in kernels of pairs of CTAs, split over clusters and with launch control, and those that test_tcgen05.py leaves out.

Each is reported under every completion schedule, with its thread and lines.
"""

import re

import pytest
from asynchronous import all_schedules
from blackwell_kernels import run_gemm_tcgen05
from pair_kernels import emulated, loader, run_gemm_launch_control, run_gemm_pair, run_split_k_tcgen05

from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault

# Bugs: kernel, a change of its text, what the report says, and which source line it points to.

def run_gemm_of_one(device, load, rng):
    run_gemm_tcgen05(device, lambda file, name: load(name), rng)


RUNS = {
    "gemm_pair": run_gemm_pair, "split_k_tcgen05": run_split_k_tcgen05, "gemm_launch_control": run_gemm_launch_control,
    "gemm_tcgen05": run_gemm_of_one,
}  # fmt: skip
PAIR_MMA, PAIR_LOAD, TMEM_LOAD = "pair_mma_16bit(sums", "pair_load_2d(stage", "tmem_load_16(r, sums"
WAITS = "mbarrier_wait"
PLANTS = {
    "the odd CTA issues": (
        "gemm_pair", "    } else if (warp < 4) {\n        int tile = 0;",
        "    } else if (warp == 5 && lane == 0) {\n"
        "        pair_mma_16bit(sums, tc_descriptor_128b(ring), tc_descriptor_128b(ring + PART_A), tc_bf16(TM, TN), false);\n"
        "    } else if (warp < 4) {\n        int tile = 0;",
        "issued by the odd CTA of the pair, rank 1", PAIR_MMA),
    "both CTAs issue": (
        "gemm_pair", "lane == 0 && rank == 0)", "lane == 0)", "issued by the odd CTA of the pair|no thread can go on", ""),
    "done committed to the leader only": (
        "gemm_pair", "pair_commit(shared_address(&done), 0b11)", "pair_commit(shared_address(&done), 0b01)",
        r"no thread can go on(.|\n)*done, shared offset", WAITS),
    "stage freed in the leader only": (
        "gemm_pair", "pair_commit(shared_address(&empty[i % STAGES]), 0b11)", "pair_commit(shared_address(&empty[i % STAGES]), 0b01)",
        r"no thread can go on(.|\n)*empty", WAITS),
    "commit to a CTA that is not there": (
        "gemm_pair", "pair_commit(shared_address(&done), 0b11)", "pair_commit(shared_address(&done), 0b1000)",
        "ctaMask 0x0008 in a cluster of 2", "pair_commit"),
    "commit to the other CTA only": (
        "gemm_pair", "pair_commit(shared_address(&done), 0b11)", "pair_commit(shared_address(&done), 0b10)",
        r"no thread can go on(.|\n)*done, shared offset", WAITS),
    "no cluster barrier before alloc": (
        "gemm_pair", "    cluster_sync();                                           // both run",
        "    __syncthreads();   // both run", "nothing tells that CTA .*, the other of the pair, has begun|nothing orders it after the init", ""),
    "mbarriers initialised without a cluster barrier": (
        "gemm_pair", "        fence_mbarrier_init();\n    }\n    cluster_sync();                                           // both run",
        "    }\n    __syncthreads();   // both run", "nothing tells that CTA|nothing orders it after the init", ""),
    "the peer's stage is filled again too early": (
        "gemm_pair", "mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);",
        "if (rank == 0) mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);",
        "overwrites the (source|destination) of an asynchronous|more arrivals", ""),
    "stage freed by a plain arrive in the peer": (
        "gemm_pair", "                pair_commit(shared_address(&empty[i % STAGES]), 0b11);\n",
        "                pair_commit(shared_address(&empty[i % STAGES]), 0b01);\n"
        "                mbarrier_arrive_remote(shared_address(&empty[i % STAGES]), 1);\n",
        "overwrites the source of an asynchronous tcgen05.mma", PAIR_LOAD),
    "the peer's accumulator is read early": (
        "gemm_pair", "            mbarrier_wait_cluster(shared_address(&done), tile & 1);\n",
        "            if (rank == 0) mbarrier_wait_cluster(shared_address(&done), tile & 1);\n",
        "touches the accumulator of an asynchronous tcgen05.mma|of undefined tensor memory", TMEM_LOAD),
    "the peer's accumulator is written early": (
        "gemm_pair", "            mbarrier_arrive_remote(shared_address(&taken), 0);\n",
        "            for (int twice = 0; twice < 2 && rank == 0; ++twice) mbarrier_arrive_remote(shared_address(&taken), 0);\n",
        "tcgen05.mma, in the other CTA of the pair,(:| of tensor memory still)|of undefined tensor memory|tcgen05.mma that", ""),
    "the accumulators are not waited for": (
        "gemm_pair", "            mbarrier_wait_cluster(shared_address(&taken), (tile & 1) ^ 1);\n", "",
        "tcgen05.mma.* of tensor memory still in use|nothing orders it after the tcgen05.wait::ld|tcgen05.mma that|more arrivals|no thread can go on", ""),
    "expect_tx for half of the pair": (
        "gemm_pair", "mbarrier_arrive_expect(shared_address(&full[s]), 2 * PART)", "mbarrier_arrive_expect(shared_address(&full[s]), PART)",
        "reads uninitialised shared|reads the destination of an asynchronous|no thread can go on", ""),
    "the peer reports to its own barrier": (
        "gemm_pair", "leaders = of_leader(shared_address(&full[s]))", "leaders = shared_address(&full[s])",
        "no thread can go on", WAITS),
    "TMA without cta_group::2": (
        "gemm_pair", "cp.async.bulk.tensor.2d.cta_group::2.shared", "cp.async.bulk.tensor.2d.shared",
        "to rank 1 with an mbarrier of rank 0: it; another of the pair needs .cta_group::2", PAIR_LOAD),
    "full parity off by one": (
        "gemm_pair", "mbarrier_wait_cluster(shared_address(&full[i % STAGES]), i / STAGES & 1)",
        "mbarrier_wait_cluster(shared_address(&full[i % STAGES]), (i / STAGES & 1) ^ 1)",
        "reads uninitialised shared|reads the destination of an asynchronous|no thread can go on", ""),
    "empty parity off by one": (
        "gemm_pair", "&empty[s]), (i / STAGES & 1) ^ 1)", "&empty[s]), i / STAGES & 1)", "no thread can go on", WAITS),
    "no dealloc in the peer": (
        "gemm_pair", "if (warp == 5) pair_dealloc", "if (warp == 5 && rank == 0) pair_dealloc",
        "exits without tcgen05.dealloc", ""),
    "no alloc in the peer": (
        "gemm_pair", "    if (warp == 5) {\n        pair_alloc", "    if (warp == 5 && rank == 0) {\n        pair_alloc",
        "read of uninitialised shared memory: 4 bytes", "const u32 sums = tmem_at"),
    "different columns in the peer": (
        "gemm_pair", "pair_alloc(shared_address(&tmem_at), COLUMNS)", "pair_alloc(shared_address(&tmem_at), COLUMNS << rank)",
        "the other CTA's asks for others", "pair_alloc"),
    "M of one CTA": ("gemm_pair", "tc_bf16(TM, TN)", "tc_bf16(TM / 4, TN)", "M = 64, N = 64; possible: M of 128 or 256 with cta_group::2", PAIR_MMA),
    "rows of a whole tile": (
        "gemm_pair", "PART_A = TM / 2 * 128", "PART_A = TM / 2 * 64", "overwrites the destination of|is not what its descriptor|more arrivals|not a multiple", ""),
    "no cluster barrier before dealloc": (
        "gemm_pair", "    cluster_sync();\n    if (warp == 5) pair_dealloc", "    if (warp == 5) pair_dealloc",
        "dealloc|the CTA exits while others may still access|nothing orders it after", ""),
    "no columns are given back before more are asked for": (
        "gemm_pair", "        pair_relinquish();\n", "        pair_alloc(shared_address(&tmem_at), 512);\n",
        "for 512 columns in a row: 64 of 512 are allocated; held: 64 columns of CTA", "pair_alloc"),
    "an address that is not masked": (
        "split_k_tcgen05", "u64((address & 0x3ffff) >> 4) | u64(1024 >> 4) << 32 | u64(1) << 46", "u64(address >> 4) | u64(1024 >> 4) << 32 | u64(1) << 46",
        "holds the CTA's rank in its cluster, [123]", "tc_mma_16bit"),
    "mail before its barrier is there": (
        "split_k_tcgen05", "    cluster_sync();                                           // no mail", "    __syncthreads();   // no mail",
        "nothing orders it after the init|was never initialised|has exited", ""),
    "too little mail expected": (
        "split_k_tcgen05", "sizeof(mailbox)", "sizeof(mailbox) / 2", "reads the destination of an asynchronous st.async|uninitialised shared memory|whose CTA has exited|no thread can go on|the CTA exits", ""),
    "mail to a barrier of the wrong CTA": (
        "split_k_tcgen05", "map_to_rank(shared_address(&mail), owner)", "shared_address(&mail)", "with an mbarrier of rank", "store_remote_async"),
    "mail not waited for": (
        "split_k_tcgen05", "        mbarrier_wait_cluster(shared_address(&mail), 0);\n", "",
        "uninitialised shared memory|reads the destination of an asynchronous st.async", "sum += mailbox"),
    "lane 0 issues, an elected lane commits": (
        "split_k_tcgen05", "        tc_commit(shared_address(&done));\n    } else if (warp < 4) {",
        "    } else if (warp == 5 && lane == 1) {\n        tc_commit(shared_address(&done));\n    } else if (warp < 4) {",
        "does not cover it, since that thread has issued nothing: the thread that issues must commit|of undefined tensor memory", TMEM_LOAD),
    "the answer is read before it is there": (
        "gemm_launch_control", "        mbarrier_wait(shared_address(&asked[turn % 2]), turn / 2 & 1);\n        const bool",
        "        const bool", "reads the destination of an asynchronous clusterlaunchcontrol|uninitialised shared memory", "launch_cancelled"),
    "the asker does not wait": (
        "gemm_launch_control", "            mbarrier_wait(shared_address(&asked[turn % 2]), turn / 2 & 1);\n        } while",
        "        } while", "reads the destination of an asynchronous clusterlaunchcontrol|uninitialised shared memory", "launch_cancelled"),
    "the place of an answer is reused early": (
        "gemm_launch_control", "            mbarrier_wait(shared_address(&heard[turn % 2]), (turn / 2 & 1) ^ 1);\n", "",
        "WAR race|more arrivals|(overwrites|reads) the destination|nothing orders it|no thread can go on", ""),
    "asks again after a failure": (
        "gemm_launch_control", "} while (launch_cancelled(shared_address(answers[turn++ % 2]), got));",
        "} while (launch_cancelled(shared_address(answers[turn++ % 2]), got) || turn < 9);",
        "after this CTA has learnt that one failed", "launch_try_cancel"),
    "the tile of a failed request": (
        "gemm_launch_control", '"@p clusterlaunchcontrol.query', '"clusterlaunchcontrol.query', "get_first_ctaid of a request that failed", "launch_cancelled"),
    "no bytes of the answer expected": (
        "gemm_launch_control", "mbarrier_arrive_expect(shared_address(&asked[turn % 2]), 16)", "mbarrier_arrive(shared_address(&asked[turn % 2]))",
        "reads the destination of an asynchronous clusterlaunchcontrol|uninitialised shared memory|more arrivals|no thread can go on", ""),
    "one accumulator for two tiles": (
        "gemm_launch_control", "tc_mma_16bit(sums + turn % 2 * TN", "tc_mma_16bit(sums",
        "of undefined tensor memory|still in use|nothing orders it after the tcgen05.wait|tcgen05.mma that", ""),
    # What test_tcgen05.py leaves out.
    "no swizzle": ("gemm_tcgen05", "u64(2) << 61", "u64(0) << 61", "is not what its descriptor", "tc_mma_16bit(acc"),
    "K advance of 128 B": (
        "gemm_tcgen05", "da + 2 * j, db + 2 * j", "da + 8 * j, db + 8 * j", "is not what its descriptor|reads the destination of an asynchronous", "tc_mma_16bit(acc"),
    "stages not aligned": (
        "gemm_tcgen05", "(shared_address(raw) + 1023) & ~1023u", "((shared_address(raw) + 1023) & ~1023u) + 8",
        "is not a multiple of", "tma_load_2d"),
    "no commit of a tile": ("gemm_tcgen05", "            tc_commit(shared_address(&done));\n", "", "no thread can go on", WAITS),
    "a fresh stage waited for": ("gemm_tcgen05", "(i / STAGES & 1) ^ 1);   //", "i / STAGES & 1);   //", "no thread can go on", WAITS),
    "ld by half a warp": (
        "gemm_tcgen05", "                tmem_load_16(r", "                if (lane < 16) tmem_load_16(r",
        "tcgen05.ld.sync.aligned|no thread can go on", "tmem_load_16"),
    "alloc by one lane": (
        "gemm_tcgen05", "    if (warp == 5) {\n        tmem_alloc", "    if (warp == 5 && lane == 0) {\n        tmem_alloc",
        "for the other threads of their warp", "tmem_alloc"),
    "barriers and columns used before they are there": (
        "gemm_tcgen05", "    __syncthreads();\n    tc_fence_after();\n    const u32 acc", "    tc_fence_after();\n    const u32 acc",
        "nothing orders it after|was never initialised|uninitialised shared memory", ""),
}  # fmt: skip


LUCKY = {("the place of an answer is reused early", "random")}  # may come out right, or as wrong numbers


@pytest.mark.parametrize("name", PLANTS)
@all_schedules
def test_planted_bug_is_reported(name, completion, rng, tmp_path):
    kernel, old, new, message, at = PLANTS[name]
    text = ""
    with emulated(completion, rng) as device:
        try:
            RUNS[kernel](device, loader(tmp_path, f"{kernel}.cu", old, new), rng)
        except (KernelFault, Deadlock, EmulatorError) as error:
            text = str(error)
        except AssertionError:
            assert (name, completion) in LUCKY
    if not text and (name, completion) in LUCKY:
        return
    assert re.search(message, text), text
    assert re.search(r"CTA \(\d+, \d+, \d+\),? thread \(\d+", text), text
    assert re.search(r"PTX line \d+: ", text)
    named = [
        (tmp_path / file).read_text().split("\n")[int(line) - 1] for file, line in re.findall(r"(\w+\.cuh?):(\d+)", text)
    ]
    assert named
    assert not at or any(part in line for part in at.split("|") for line in named), text
