# ruff: noqa: E501  (bugs are changes of source lines, kernels are inline assembly)
"""Block scales and copies into tensor memory for pairs of CTAs: an nvfp4 GEMM, single instructions, bugs in both."""

import re
import subprocess

import numpy as np
import pytest
from asynchronous import all_schedules
from pair_kernels import emulated
from programs import ORDERS
from scaled_kernels import COMMON, PAIR, loader, run_gemm_pair_scaled
from test_block_scale import disassembler
from test_tcgen05_pair import COMMITS, HEAD, product

from dsv4_rt.compile import compile
from dsv4_rt.emulator import Machine
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault


def load(folder, *edits):
    return loader(folder, *edits, sources=(*PAIR, *COMMON))


@pytest.mark.parametrize(
    ("M", "N", "K", "tile", "stages", "ctas"), [(300, 100, 608, 64, 2, 2), (257, 40, 288, 32, 3, 4)]
)
@all_schedules
def test_gemm(M, N, K, tile, stages, ctas, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_pair_scaled(device, load(tmp_path), rng, M, N, K, tile, stages, ctas)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order) as device:
        run_gemm_pair_scaled(device, load(tmp_path), rng)


@pytest.mark.parametrize(("M", "N", "K", "tile"), [(1, 1, 32, 32), (512, 64, 512, 32), (129, 33, 96, 128)])
def test_gemm_shapes(M, N, K, tile, rng, tmp_path):
    with emulated("late", rng) as device:
        run_gemm_pair_scaled(device, load(tmp_path), rng, M, N, K, tile)


if disassembler():

    def test_machine_code(tmp_path):
        """A machine with a disassembler sees the tensor core's instructions of pairs in what NVRTC makes for a B200."""
        load(tmp_path)
        made = compile(str(tmp_path / "gemm_pair_scaled.cu"), "sm_100a", ["gemm_pair_scaled<64, 2>"])
        (tmp_path / "cubin").write_bytes(made.cubin)
        text = subprocess.run([disassembler(), "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
        names = re.findall(r"\b(?:UTCOMMA|UTCCP|UTCBAR|UTMALDG)[\w.]*", text)
        print({name: names.count(name) for name in sorted(set(names))})
        assert names.count("UTCOMMA.2CTA.4X") == 4
        assert all(".2CTA" in name for name in names)


# Bugs: changes of the text, what the report says, which source line it points to.

READS = r"tcgen05.(cp|mma) (reads uninitialised|on shared offset .* reads the destination)"
SFB_LOAD = "pair_load_3d(stage + SCALES, &sb, 0, k * 4, n / 128, leaders)"
SFA_LOAD = "pair_load_3d(stage + SCALES + SIDE, &sa, 0, k * 4, rows / 128, leaders)"
SFB_COPY = "pair_copy_scales(sfb + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * w));"
SFA_COPY = "pair_copy_scales(sfa + 4 * w, tc_descriptor_scales(stage + SCALES + SIDE + 512 * w));"
MMA, FREE = "pair_mma_nvf4(sums", "pair_commit(shared_address(&empty[i % STAGES]), 0b11)"
EMPTY = "                mbarrier_wait_cluster(shared_address(&empty[s]), (i / STAGES & 1) ^ 1);\n"
FULL = "                mbarrier_wait_cluster(shared_address(&full[i % STAGES]), i / STAGES & 1);\n"
LAST = "    } else if (warp < 4) {\n"
ODD = "    } else if (warp == 5 && lane == 0) {\n        pair_copy_scales(sums + TN, tc_descriptor_scales(ring + SCALES));\n" + LAST
PLANTS = {
    "one set of scale columns": ([("sums + TN + i % STAGES * 32", "sums + TN")], "tcgen05.cp overwrites scale factors of an asynchronous tcgen05.mma", "pair_copy_scales"),
    "scales of other columns of B in the peer": ([(SFB_LOAD, SFB_LOAD.replace("n / 128", "n / 128 + rank"))],
        "the scale factors of B differ between the CTAs of the pair: those of row 0 are", MMA),
    "scales of B in the leader only": ([(SFB_LOAD, "if (rank == 0) " + SFB_LOAD), ("2 * STAGE", "2 * STAGE - SIDE")], READS, "pair_copy_scales"),
    "the odd CTA copies": ([(LAST, ODD)], r"tcgen05.cp.cta_group::2 issued by the odd CTA of the pair, rank 1", "pair_copy_scales"),
    "scales of A not copied": ([(SFA_COPY, "")], "scale factors of A lie in undefined tensor memory", MMA),
    "scales of B not copied": ([(SFB_COPY, "")], "scale factors of B lie in undefined tensor memory", MMA),
    "bytes of the scales not expected": ([("2 * STAGE);", "2 * STAGE - 4 * SIDE);")], READS + "|no thread can go on|more", ""),
    "the peer's scales report to its own barrier": ([(SFA_LOAD, SFA_LOAD.replace("leaders", "shared_address(&full[s])"))], "no thread can go on", "mbarrier_wait"),
    "the peer does not wait for its stage": ([(EMPTY, EMPTY.replace("mbar", "if (rank == 0) mbar", 1))],
        "overwrites the (source|destination) of an asynchronous|more arrivals", ""),
    "stage freed in the leader only": ([(FREE, FREE.replace("0b11", "0b01"))], r"no thread can go on(.|\n)*empty", "mbarrier_wait"),
    "stage freed by a plain arrive in the peer": (
        [(FREE, FREE.replace("0b11", "0b01") + ";\n                mbarrier_arrive_remote(shared_address(&empty[i % STAGES]), 1)")],
        "overwrites the source of an asynchronous tcgen05.(cp|mma)", "pair_load"),
    "full not waited for": ([(FULL, "")], READS, "pair_copy_scales"),
    "M of one CTA": ([("256 >> 4 << 24", "128 >> 4 << 24")], "tcgen05.ld.32x32b of undefined tensor memory", "tmem_load_16"),
    "N that pairs do not have": ([("TN >> 3 << 17", "(TN - 8) >> 3 << 17")], "N = 24; possible: M of 128 or 256 with cta_group::2, N from 16 to 256 in steps of 16", MMA),
    "scales in the accumulator": ([("sums + TN + i", "sums + TN / 2 + i")], "tcgen05.mma that has|the accumulator in", "pair_copy_scales|" + MMA),
    "scales outside the allocation": ([("USED = TN + STAGES * 32, COLUMNS = USED <= 128", "USED = TN, COLUMNS = USED <= 64 ? 64 : USED <= 128")],
        "out of bounds: tcgen05.cp of TMEM column", "pair_copy_scales"),
    "wrong SBO of the scales": ([("u64(128 >> 4)", "u64(512 >> 4)")], READS + "|out of bounds|differ between", "pair_"),
    "another shape of copy": ([("tcgen05.cp.cta_group::2.32x128b.warpx4", "tcgen05.cp.cta_group::2.64x128b.warpx2::02_13")],
        READS + "|differ among the four|differ between", "pair_"),
    "scale columns wrong by 4": ([("sfa + 4 * j,", "sfa + 4 * j + 4,")], "scale factors of A lie in undefined tensor memory", MMA),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each bug: the schedules share what is compiled there."""
    made = {name: tmp_path_factory.mktemp(f"bug{i}") for i, name in enumerate(PLANTS)}
    return made.__getitem__


@pytest.mark.parametrize("name", PLANTS)
@all_schedules
def test_planted_bug_is_reported(name, completion, rng, folders):
    edits, message, at = PLANTS[name]
    folder = folders(name)
    with emulated(completion, rng) as device, pytest.raises((KernelFault, Deadlock, EmulatorError)) as caught:
        run_gemm_pair_scaled(device, load(folder, *edits), rng, M=140, N=30, K=800, tile=32)
    text = str(caught.value)
    assert re.search(message, text), text
    assert re.search(r"PTX line \d+: ", text)
    assert re.search(r"CTA \(\d+, \d+, \d+\),? thread \(\d+", text)
    named = [(folder / file).read_text().split("\n")[int(line) - 1] for file, line in re.findall(r"(\w+\.cuh?):(\d+)", text)]
    assert not at or any(part in line for part in at.split("|") for line in named), text


COPIES = f"""                for (int w = 0; w < 4; ++w) {{
                    {SFB_COPY}
                    {SFA_COPY}
                }}
"""
ANOTHER = f"""    }} else if (warp == 5 && lane == 1 && rank == 0) {{
        int i = 0;
        for (int t = pair; t < tiles; t += pairs)
            for (int k = 0; k < steps; ++k, ++i) {{
                const u32 stage = ring + i % STAGES * STAGE, sfb = sums + TN + i % STAGES * 32, sfa = sfb + 16;
{FULL}                tc_fence_after();
{COPIES}                {FREE};
                if (k == steps - 1) pair_commit(shared_address(&done), 0b11);
                __syncwarp(3);
            }}
{LAST}"""
INITS = [(f"mbarrier_init(shared_address(&{each}), 1)", f"mbarrier_init(shared_address(&{each}), 2)") for each in ("empty[s]", "done")]


@all_schedules
def test_copies_by_another_thread(completion, rng, tmp_path):
    """Right if an order that both threads know puts them before the product, and their own thread commits."""
    meets = [(COPIES, "                __syncwarp(3);\n"), (LAST, ANOTHER), *INITS]
    with emulated(completion, rng) as device:
        run_gemm_pair_scaled(device, load(tmp_path, *meets), rng)
    alone = [(COPIES, ""), (LAST, ANOTHER.replace("                __syncwarp(3);\n", "")), *INITS]
    with emulated(completion, rng) as device, pytest.raises(KernelFault, match="nothing orders it after the tcgen05.cp of|undefined"):
        run_gemm_pair_scaled(device, load(tmp_path, *alone), rng)


# Single products of e4m3 by scales that tcgen05.st writes: 1 where nothing else is said.

SFA, SFB, ONES = 100, 110, "0x7f7f7f7fu"
WAIT_ST = '    asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory");\n'
ISSUE = "    if (threadIdx.x == 0 && cta == 0) {\n"
WAIT_DONE = '    asm volatile("{ .reg .pred P;\\nW: mbarrier'
FILL_B, FENCE = "right[i] = b[", 'asm volatile("fence.proxy.async.shared::cta;"'
COPY = f"""        asm volatile("tcgen05.cp.cta_group::2.32x128b.warpx4 [%0], %1;" :: "r"(base + {SFA}),
                     "l"(1ull << 46 | 8ull << 32 | ((u32)__cvta_generic_to_shared(right) & 0x3ffff) >> 4) : "memory");
"""
BEHIND_B = "right[256 + threadIdx.x % 32] = make_uint4(0, 0, 0, 0);\n"
LOAD = f"""    u32 word;
    if (cta == 1) asm volatile("tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%0}}, [%1];" : "=r"(word) : "r"(at + {SFA}));
"""


def store(column, value, when="true"):
    return f'    if ({when}) asm volatile("tcgen05.st.sync.aligned.32x32b.x1.b32 [%0], {{%1}};" :: "r"(at + {column}), "r"({value}) : "memory");\n'


def scaled_product(completion, rng, m, n, a=ONES, b=ONES, when="true", edits=()):
    """(D, wanted if all scales are 1); a, b: the words of scales, `when`: which threads store them."""

    def changed(text):
        stores = [store(SFA + i, a, when) for i in range(4)] + [store(SFB + i, b, when) for i in range(3)]
        scales = f'"r"(form ^ 0x800010u), "r"(base + {SFA}), "r"(base + {SFB})'  # ue8m0, and no id where fp32 stands
        replaced = [
            (WAIT_ST, "".join(stores) + WAIT_ST), ("%2, %3 , 1 ;", "%2, %3, [%4], [%5], 1;"),
            ('"r"(form), "r"(mask[0]), "r"(mask[1])', scales), *edits,
        ]  # fmt: skip
        for old, new in replaced:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text

    types, what = ("e4m3", "e4m3", "f32"), "cta_group::2.kind::mxf8f6f4.block_scale"
    return product(rng, completion, "f8f6f4", types, m, n, (128, 128), group=2, what=what, edit=changed)


@pytest.mark.parametrize(("m", "n", "completion"), [(256, 48, "random"), (128, 64, "late")])
def test_product(m, n, completion, rng):
    """Twice A B with all scales of A 2. Where those of one CTA's rows are, or of the columns in the upper lanes, so there."""
    seed = int(rng.integers(1 << 31))

    def run(**scales):
        return scaled_product(completion, np.random.default_rng(seed), m, n, **scales)

    once, want = run()
    np.testing.assert_array_equal(once, want)
    twice = run(a="0x80808080u")[0]
    assert not np.array_equal(once, twice)
    rows = run(a=f"cta == 1 ? 0x80808080u : {ONES}")[0]
    np.testing.assert_array_equal(rows, np.stack((once[0], twice[1])))
    if m == 128:
        columns = run(b=f"warp / 2 ? 0x80808080u : {ONES}")[0]
        np.testing.assert_array_equal(columns, np.concatenate((once[:, :64], twice[:, 64:]), axis=1))


MISUSED = {
    "partitions of the peer differ": (256, {"a": f"warp == 1 && cta == 1 ? 0 : {ONES}"}, [],
        "scale factors of A differ among the four 32-lane partitions: those of row 0 are 7f, 00, 7f, 7f"),
    "partitions of half the columns differ": (128, {"b": f"warp == 3 ? 0 : {ONES}"}, [],
        "scale factors of B differ among the 32-lane partitions 2 and 3: those of row 32 are 7f, 00"),
    "the CTAs differ": (256, {"b": f"cta ? 0 : {ONES}"}, [], "scale factors of B differ between the CTAs of the pair: those of row 0 are 7f and 00"),
    "nothing in the peer": (256, {"when": "cta == 0"}, [], "scale factors of A, in the other CTA of the pair, lie in undefined tensor memory: nothing has written lane 0, column"),
    "half of it in the peer": (128, {"when": "cta == 0 || warp < 3"}, [], r"scale factors of A, in the other CTA of the pair, lie in undefined tensor memory: .* lane 96, column \d+ \(row 0\)"),
    "stores of the peer not waited for": (256, {}, [(WAIT_ST, "    if (cta == 0)\n" + WAIT_ST)],
        "missing tcgen05.wait::st: tcgen05.mma, scale factors of A, in the other CTA of the pair, of tensor memory still in use"),
    "overwritten in the peer": (256, {}, [(WAIT_DONE, store(SFB, ONES, "cta == 1") + WAIT_DONE)],
        "tcgen05.st.32x32b overwrites scale factors of an asynchronous tcgen05.mma|missing tcgen05.wait::st: tcgen05.mma, scale factors of B, in the other"),
    "copied over what the peer loads": (256, {}, [(WAIT_ST, WAIT_ST + LOAD), (ISSUE, ISSUE + COPY)],
        "missing tcgen05.wait::ld: tcgen05.cp, in the other CTA of the pair, of tensor memory still in use"),
    "the source of a copy overwritten in the peer": (
        256, {}, [(FENCE, BEHIND_B + FENCE), (ISSUE, ISSUE + COPY.replace("(right)", "(right + 256)")), (WAIT_DONE, "    if (cta == 1) " + BEHIND_B + WAIT_DONE)],
        r"overwrites the source of an asynchronous tcgen05.cp|tcgen05.cp on shared offset .* no fence.proxy.async lies between"),
    "copied from what the peer has not written": (256, {}, [(FILL_B, "if (cta == 0) " + FILL_B), (ISSUE, ISSUE + COPY)],
        "tcgen05.cp reads uninitialised shared memory: matrix source"),
    "copied over what the product reads": (256, {}, [("        " + COMMITS[2], COPY + COMMITS[2])], "tcgen05.cp overwrites scale factors of an asynchronous tcgen05.mma"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSED)
@all_schedules
def test_misuse_is_reported(name, completion, rng):
    m, options, edits, message = MISUSED[name]
    with pytest.raises(KernelFault, match=message) as caught:
        scaled_product(completion, rng, m, 64, edits=edits, **options)
    assert re.search(r"PTX line \d+: .*tcgen05", str(caught.value))


def test_copies_of_one_kernel_are_all_for_pairs():
    """As ptxas has it too."""
    copies = [f"tcgen05.cp.cta_group::{group}.32x128b.warpx4 [r], d;\n" for group in (2, 1)]
    with pytest.raises(EmulatorError, match=r"cta_group::1 and cta_group::2 in one kernel(.|\n)*PTX line 8(.|\n)*PTX line 7"):
        Machine("sm_100a").load(HEAD + "".join(copies) + "ret; }", "mixed").program("f")
