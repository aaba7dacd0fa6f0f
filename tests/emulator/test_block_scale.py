# ruff: noqa: E501  (bugs are changes of source lines)
"""GEMMs of fp8, fp6, fp4, mxfp8, mxfp4 and nvfp4 by tcgen05 against NumPy, and bugs planted in them."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from asynchronous import all_schedules
from programs import ORDERS
from scaled_kernels import loader, run_gemm_scaled

import dsv4_rt
from dsv4_rt.compile import compile
from dsv4_rt.emulated_device import EmulatedDevice
from dsv4_rt.errors import Deadlock, EmulatorError, KernelFault


def emulated(completion, rng, **options):
    options = {"completion": completion, "seed": int(rng.integers(1 << 30)), "check_tensor_fences": True} | options
    return dsv4_rt.use_device(EmulatedDevice("sm_100a", **options))


E2M1 = ("e2m1", "e2m1")
GEMMS = [  # kind, factors, K: ragged but where padded elements want a multiple of 128
    ("F8", ("e4m3", "e5m2"), 336), ("F8", ("e3m2", "e2m1"), 384), ("MXF8", ("e4m3", "e4m3"), 336),
    ("MXF8", ("e5m2", "e2m1"), 384), ("MXF8", ("e2m3", "e3m2"), 256), ("MXF4", E2M1, 608), ("NVF4", E2M1, 608),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "types", "K"), GEMMS)
@all_schedules
def test_gemm(kind, types, K, completion, rng, tmp_path):
    with emulated(completion, rng) as device:
        run_gemm_scaled(device, loader(tmp_path), rng, kind, types, K=K)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_gemm_in_other_thread_orders(order, rng, tmp_path):
    with emulated("random", rng, order=order) as device:
        run_gemm_scaled(device, loader(tmp_path), rng)


@pytest.mark.parametrize(
    ("kind", "M", "N", "K", "tile"),
    [("NVF4", 1, 1, 32, 64), ("NVF4", 260, 130, 1024, 128), ("MXF4", 128, 96, 64, 32), ("MXF8", 129, 300, 144, 128)],
)
def test_gemm_shapes(kind, M, N, K, tile, rng, tmp_path):
    with emulated("late", rng) as device:
        types = ("e4m3", "e4m3") if kind == "MXF8" else E2M1
        run_gemm_scaled(device, loader(tmp_path), rng, kind, types, M=M, N=N, K=K, tile=tile)


def disassembler():
    """nvdisasm of a CUDA toolkit, or the one that Triton brings; empty where there is none."""
    spec = importlib.util.find_spec("triton")
    beside = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm" if spec and spec.origin else Path()
    return shutil.which("nvdisasm") or (str(beside) if beside.is_file() else "")


if disassembler():

    @pytest.mark.parametrize(
        ("kind", "wanted"), [("F8", "UTCQMMA"), ("MXF8", "UTCQMMA"), ("MXF4", "UTCOMMA"), ("NVF4", "UTCOMMA.4X")]
    )
    def test_machine_code(kind, wanted, tmp_path):
        """A machine with a disassembler sees the tensor core's instructions in what NVRTC makes for a B200."""
        loader(tmp_path)
        factors = "0, 0" if kind in ("F8", "MXF8") else "1, 1"
        made = compile(str(tmp_path / "gemm_scaled.cu"), "sm_100a", [f"gemm_scaled<{kind}, {factors}, 64, 3>"])
        (tmp_path / "cubin").write_bytes(made.cubin)
        text = subprocess.run([disassembler(), "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
        counts = {name: len(re.findall(rf"\b{name}\b", text)) for name in ("UTCQMMA", "UTCOMMA", "UTCCP", "UTCBAR", "LDTM")}
        print(kind, counts)
        assert re.search(rf"\b{re.escape(wanted)} ", text)
        assert counts["UTCBAR"] == 2
        assert (counts["UTCCP"] > 0) == (kind != "F8")


# Bugs: kind, changes, what is reported, a part of the source line that the report names.

COPY_B, COPY_A = "tc_copy_scales(sfb + 4 * w", "tc_copy_scales(sfa + 4 * w"
NVF4 = "tc_mma_nvf4(acc, da + 2 * j, db + 2 * j, form, sfa + 4 * w, from, add)"
MXF4 = "tc_mma_mxf4(acc"
WAIT = "mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);\n"
COPIES = """                for (u32 w = 0; w < WORDS && k * WORDS + w < words; ++w) {
                    tc_copy_scales(sfb + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * w));
                    tc_copy_scales(sfa + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * (WORDS + w)));
                }
"""
ANOTHER = """    } else if (warp == 5 && lane == 1) {
        u32 i = 0;
        for (u32 t = blockIdx.x; t < tiles; t += gridDim.x)
            for (u32 k = 0; k < steps; ++k, ++i) {
                const u32 stage = ring + i % STAGES * STAGE, sfb = scales + i % STAGES * WORDS * 8, sfa = sfb + 4 * WORDS;
                mbarrier_wait(shared_address(&full[i % STAGES]), i / STAGES & 1);
                tc_fence_after();
""" + COPIES + """            }
    } else if (warp < 4) {
"""
TOGETHER = ANOTHER.replace("            }\n    } else if", "                __syncwarp(3);\n            }\n    } else if")
PLANTS = {
    "id of A that two scales a row do not have": ("MXF4", [("id << 4 | id << 29", "id << 4 | (id ^ 1) << 29")], "scale factor id 1 of A; it must be 0 or 2", MXF4),
    "id of B that two scales a row do not have": ("MXF4", [("id << 4 | id << 29", "(id ^ 1) << 4 | id << 29")], "scale factor id 1 of B; it must be 0 or 2", MXF4),
    "id with four scales a row": ("NVF4", [("id << 4 | id << 29", "id << 4 | 2u << 29")], "scale factor id 2 of A; it must be 0", "tc_mma_nvf4"),
    "wrong scale format": ("MXF8", [("KIND == NVF4 ? 0 : 1 << 23", "0")], r"UE4M3 \(bit 23\); they must be UE8M0", "tc_mma_mxf8f6f4"),
    "descriptor of a product without scales": ("NVF4", [("KIND == NVF4 ? 0", "KIND == NVF4 ? 1 << 4")], "scale factor id 1 of B", "tc_mma_nvf4"),
    "format of fp4 in bytes": ("NVF4", [("u32(FA) << 7", "5u << 7")], "format 5 of A does not exist; e2m1, which is 1", "tc_mma_nvf4"),
    "M of 64": ("NVF4", [("128 >> 4 << 24", "64 >> 4 << 24")], "M is a multiple of 128", "tc_mma_nvf4"),
    "N of no multiple": ("NVF4", [("TN >> 3 << 17", "0 >> 3 << 17")], "N = 0; possible", "tc_mma_nvf4"),
    "N wider than the accumulator": ("NVF4", [("TN >> 3 << 17", "2 * TN >> 3 << 17")], "lie in columns .* the accumulator in", "tc_mma_nvf4"),
    "MN-major fp4": ("MXF4", [("u32(FA) << 7", "1 << 15 | u32(FA) << 7")], "are K-major", MXF4),
    "one set of scale columns": ("NVF4", [("scales + i % STAGES * WORDS * 8", "scales")], "tcgen05.cp overwrites scale factors of an asynchronous tcgen05.mma", "tc_copy_scales"),
    "stage freed by a plain arrive": ("NVF4", [("tc_commit(shared_address(&empty[i % STAGES]))", "mbarrier_arrive(shared_address(&empty[i % STAGES]))")],
        "overwrites the source of an asynchronous tcgen05.(cp|mma)|overwrites scale factors of an asynchronous tcgen05.mma", "load|tc_copy_scales"),
    "scales of A not copied": ("NVF4", [("                    tc_copy_scales(sfa + 4 * w, tc_descriptor_scales(stage + SCALES + 512 * (WORDS + w)));\n", "")],
        "scale factors of A lie in undefined tensor memory", "tc_mma_nvf4"),
    "no scales copied": ("MXF8", [(COPIES, "")], "scale factors of A lie in undefined tensor memory", "tc_mma_mxf8f6f4"),
    "wrong SBO of the scales": ("NVF4", [("u64(128 >> 4)", "u64(256 >> 4)")], "tcgen05.cp (reads uninitialised|on shared offset .* reads the destination)|out of bounds", "tc_copy_scales"),
    "scales with a swizzle": ("NVF4", [("u64(128 >> 4) << 32", "u64(128 >> 4) << 32 | u64(2) << 61")], "tcgen05.cp (reads uninitialised|on shared offset .* reads the destination)|out of bounds", "tc_copy_scales"),
    "scale columns wrong by 4": ("NVF4", [(NVF4, NVF4.replace("sfa + 4 * w", "sfa + 4 * w + 4"))], "scale factors of A lie in undefined tensor memory", "tc_mma_nvf4"),
    "scales in the accumulator": ("NVF4", [("scales = acc + TN;", "scales = acc + TN / 2;")], "tcgen05.mma that has|the accumulator in", "tc_copy_scales|tc_mma_nvf4"),
    "scales outside the allocation": ("NVF4", [("USED = TN + STAGES * WORDS * 8", "USED = TN")], "out of bounds: tcgen05.cp of TMEM column", "tc_copy_scales"),
    "scales copied to another lane": ("NVF4", [(COPY_B, COPY_B + " + (32 << 16)")], "names TMEM lane 32; 32x128b.warpx4 wants 0", COPY_B),
    "scales read from another lane": ("NVF4", [(NVF4, NVF4.replace("from", "from + (32 << 16)"))], "scale factors of B names TMEM lane 32; 0 is wanted", "tc_mma_nvf4"),
    "scales not in all partitions": ("NVF4", [("32x128b.warpx4 [", "64x128b.warpx2::02_13 [")], "differ among the four 32-lane partitions|reads uninitialised|reads the destination", "tc_"),
    "another shape of copy": ("NVF4", [("32x128b.warpx4 [", "4x256b [")], "touches what is written by an asynchronous tcgen05.cp", "tc_copy_scales"),
    "full not waited for": ("NVF4", [(WAIT, "\n")], "tcgen05.cp (reads uninitialised|on shared offset .* reads the destination)", "tc_copy_scales"),
    "another thread copies": ("NVF4", [(COPIES, ""), ("    } else if (warp < 4) {\n", ANOTHER)],
        "nothing orders it after the tcgen05.cp of CTA|lie in undefined tensor memory|overwrites the source of an asynchronous tcgen05.cp", "tc_|load"),
    "another thread copies, with a barrier": ("NVF4", [(COPIES, "                __syncwarp(3);\n"), ("    } else if (warp < 4) {\n", TOGETHER)],
        "overwrites the source of an asynchronous tcgen05.cp|overwrites what is|touches what is written by an asynchronous tcgen05.cp", "load|tc_copy_scales"),
    "scales written without a proxy fence": ("NVF4", [(WAIT, WAIT + '                asm volatile("st.shared.b32 [%0], 0;" :: "r"(stage + SCALES) : "memory");\n')],
        "no fence.proxy.async lies between", "tc_copy_scales"),
    "done by a plain arrive": ("NVF4", [("tc_commit(shared_address(&done))", "mbarrier_arrive(shared_address(&done))")], "tcgen05.mma that has", "tmem_load_16"),
    "fp4 not padded": ("MXF8", {"types": ("e4m3", "e2m1"), "K": 256, "dtype_of_b": "u4x16"}, "matrix B lies in a tile of u4x16, the product takes e2m1 padded to bytes", "tc_mma_mxf8f6f4"),
    "fp4 padded for a product of packed": ("MXF4", {"edits": [("TN * WIDE_B", "TN * 64")], "K": 512, "dtype_of_b": "u4x16_p64"},
        "matrix B lies in a tile of u4x16_p64, the product takes bytes without padding", MXF4),
    "padded tile that begins between": ("MXF8", {"types": ("e4m3", "e2m1"), "K": 256, "edits": [("k * 128, n, barrier", "k * 128 + 32, n, barrier")]},
        "the coordinate 32 of the contiguous axis, of u4x16_p64, is not a multiple of 128", "tma_load_2d"),
    "scale with a sign": ("NVF4", {"sign": 0x80}, "a scale factor of A, row 0, has its upper bit set", "tc_mma_nvf4"),
}  # fmt: skip


@all_schedules
def test_copies_by_another_thread(completion, rng, tmp_path):
    """Right if they are issued before the product, in an order that both threads know, and their own thread commits."""
    commits = TOGETHER.replace(
        "__syncwarp(3);",
        "tc_commit(shared_address(&empty[i % STAGES]));\n"
        "                if (k == steps - 1) tc_commit(shared_address(&done));\n                __syncwarp(3);")
    edits = [
        (COPIES, "                __syncwarp(3);\n"), ("    } else if (warp < 4) {\n", commits),
        ("mbarrier_init(shared_address(&empty[s]), 1)", "mbarrier_init(shared_address(&empty[s]), 2)"),
        ("mbarrier_init(shared_address(&done), 1)", "mbarrier_init(shared_address(&done), 2)"),
    ]  # fmt: skip
    with emulated(completion, rng) as device:
        run_gemm_scaled(device, loader(tmp_path, *edits), rng)


@all_schedules
def test_copies_taken_to_be_in_order(completion, rng, tmp_path):
    """One set of scale columns for all stages, as Triton and DeepGEMM have it: right where copies do not overtake."""
    with emulated(completion, rng, copies_in_order=True) as device:
        run_gemm_scaled(device, loader(tmp_path, *PLANTS["one set of scale columns"][1]), rng)


def planted(name, completion, rng, folder):
    kind, changes, message, at = PLANTS[name]
    options = {"edits": changes} if isinstance(changes, list) else changes
    options = ({"types": ("e4m3", "e4m3")} if kind == "MXF8" else {}) | options
    edits = options.pop("edits", [])
    with emulated(completion, rng) as device:
        run_gemm_scaled(device, loader(folder, *edits), rng, kind, **options)


@pytest.mark.parametrize("name", PLANTS)
@all_schedules
def test_planted_bug_is_reported(name, completion, rng, tmp_path):
    with pytest.raises((KernelFault, Deadlock, EmulatorError)) as caught:
        planted(name, completion, rng, tmp_path)
    text, (_, _, message, at) = str(caught.value), PLANTS[name]
    assert re.search(message, text), text
    assert re.search(r"CTA \(\d+, \d+, \d+\),? thread \(\d+", text)
    assert re.search(r"PTX line \d+: ", text)
    named = [(tmp_path / file).read_text().split("\n")[int(line) - 1] for file, line in re.findall(r"(\w+\.cuh?):(\d+)", text)]
    assert any(part in line for part in at.split("|") for line in named), text


@all_schedules
def test_a_copy_that_only_happens_to_come_first(completion, rng, tmp_path):
    """Another thread copies, and gets there before the products: nothing orders the two all the same."""
    with (
        emulated(completion, rng, order="reverse") as device,
        pytest.raises(KernelFault, match=r"scale factors of A: nothing orders it after the tcgen05\.cp of CTA"),
    ):
        run_gemm_scaled(device, loader(tmp_path, *PLANTS["another thread copies"][1]), rng)
