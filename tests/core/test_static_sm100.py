"""The committed evidence of dense_router_decode_sm100: what the compiler makes, the same in all three places."""

import sys
from pathlib import Path

import pytest

from dsv4_rt.compile import compiler_build

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "bench"))

import static_sm100  # noqa: E402
from harness import read_out  # noqa: E402

RECORDED = ROOT / "bench" / "results" / "sm100-static.jsonl"


@pytest.fixture(scope="module")
def recorded():
    facts, rows = read_out(RECORDED)
    return facts, [{name: value for name, value in row.items() if name != "run"} for row in rows]


def without_machine_code(row):
    return {name: value for name, value in row.items() if name not in ("sass", "instructions")}


def test_the_table_is_what_the_compiler_makes(recorded):
    """Registers and shared memory for the compiler it names, counts of PTX for any; SASS where there is nvdisasm."""
    facts, rows = recorded
    same = facts["compiler"] == compiler_build()
    tool = static_sm100.nvdisasm() if same else None
    for now, then in zip(static_sm100.rows(tool), rows, strict=True):
        if same:
            assert (now if tool else without_machine_code(now)) == (then if tool else without_machine_code(then))
        elif now["table"] == "code":
            assert now["ptx"] == then["ptx"]
        else:
            assert now == then


def test_the_machine_code_has_every_instruction_of_the_ptx(recorded):
    """4 products of 16 channels a piece; weights twice and hidden, asked for once ahead; 8 columns a load."""
    for row in recorded[1][: len(static_sm100.SHAPES)]:
        experts = {"flash": 16, "pro": 24}[row["case"]]
        wanted = {"mma": 4, "tma load": 3, "commit": 2, "tma prefetch": 1, "tmem load": experts // 8}
        assert row["ptx"] == wanted
        assert row["sass"] == wanted | {"local memory": 0}
        assert row["spill_bytes"] == row["stack_bytes"] == 0


def test_the_text_and_the_readme_say_the_same(recorded):
    assert RECORDED.with_suffix(".txt").read_text() == static_sm100.text(*recorded)
    readme = (ROOT / "README.md").read_text()
    assert f"<!-- bench:static_sm100 -->\n{static_sm100.readme_table(*recorded)}\n<!-- end -->" in readme
    assert "not yet run on a B200" in static_sm100.text(*recorded)
    assert "not yet run on a B200" in static_sm100.readme_table(*recorded)


def test_what_the_estimate_is_made_of():
    """8 TB/s and 118 GB/s an SM against bytes counted by hand."""
    row = static_sm100.cost("pro", 64)
    assert row["blocks"] == 128  # 16 clusters of 8
    assert row["whole_bytes"] == 2 * 7168 * (384 + 64)
    assert row["in_flight_bytes"] == 2 * 7168 // 8 * (24 + 64)
    assert row["needed_bytes"] == 54054
    assert row["hbm_us"] == pytest.approx(6.422528 / 8, abs=0.01)
    assert row["l2_us"] == pytest.approx(157.696 / 118.4, abs=0.01)
    assert row["estimate_us"] == pytest.approx(static_sm100.SHAPES["pro"][3] + 157.696 / 118.4, abs=0.06)
