"""The trace bench: reader, bound, and a replay of a small trace that it makes itself, checked after every step."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from memory_trace import BLOCK, Engine, Request, make_trace, read_trace, upper_bound, write_trace
from small import small_pool

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_is_read(rng, tmp_path):
    trace = make_trace(rng, 40)
    write_trace(tmp_path / "t.jsonl", trace)
    again = read_trace(tmp_path / "t.jsonl")
    assert len(again) == 40
    for a, b in zip(trace, again, strict=True):
        assert (a.arrival, a.input_length, a.output_length) == (b.arrival, b.input_length, b.output_length)
        assert (a.hash_ids == b.hash_ids).all()
    assert len(read_trace(tmp_path / "t.jsonl", limit=7)) == 7


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a request"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1}', "hash_ids"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "wanted 2, one per 512"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', "must be positive"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "not negative"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, why):
    good = {"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [9]}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:3: (.|\n)*" + why):
        read_trace(tmp_path / "t.jsonl")


def test_tokens_follow_from_the_hash_ids():
    """Equal ids at equal places give equal tokens, others do not; a partial block is the beginning of the whole one."""
    whole = Request(0, 1024, 1, np.array([7, 9]))
    part = Request(0, 700, 1, np.array([7, 9]))
    other = Request(0, 1024, 1, np.array([9, 7]))
    assert whole.tokens().dtype == np.int32
    assert (whole.tokens()[:700] == part.tokens()).all()
    assert (whole.tokens()[:BLOCK] == other.tokens()[BLOCK:]).all()
    assert (whole.tokens()[:BLOCK] != other.tokens()[:BLOCK]).mean() > 0.99


def test_the_bound_counts_leading_blocks_seen_before():
    def request(ids, length):
        return Request(0, length, 1, np.array(ids))

    trace = [request([1, 2, 3], 1500), request([1, 2, 4], 1300), request([5, 2], 600), request([1, 2, 4], 1300)]
    # nothing; blocks 1 and 2; block 2 behind another block does not count; all but the last token
    assert upper_bound(trace) == 0 + 1024 + 0 + 1299


@pytest.mark.parametrize("pages", [16, 40, 400])
def test_a_replay_ends_with_every_page_back(emulator, rng, pages):
    """Scarce, tight and ample pools: every request ends, hits stay below the bound, check() holds after every step."""
    trace = make_trace(rng, 25, per_second=8, mean_new=500, mean_output=12)
    longest = max(request.total for request in trace)
    pool = small_pool(
        pages=max(pages, -(-longest // 256) + 2),
        window_pages=pages + 80,
        checkpoints=max(pages // 4, 4),
        max_sequences=6,
        max_length=1 << 15,
        max_in_flight=1024,
    )
    result = Engine(pool, trace, chunk=1024, batch=6).run(check_every=1)
    stats = pool.stats()
    print(pages, result.preemptions, "preemptions", result.hit_tokens, "hit", stats)
    assert result.finished == len(trace)
    assert result.refused == 0
    bound = upper_bound(trace)
    assert 0 <= result.hit_tokens <= bound
    if pages == 400:
        assert result.preemptions == 0
        assert result.hit_tokens > 0.3 * bound
    elif pages == 16:
        assert stats.evictions > 0
    outputs = sum(request.output_length for request in trace)
    assert result.sampled_tokens == outputs
    pool.reset_prefix_cache()
    pool.check()
    after = pool.stats()
    for life in ("full", "window", "state", "checkpoint"):
        use = getattr(after, life)
        assert use.free == use.total, life


def test_the_bench_replays_a_file(rng, tmp_path):
    """The command line as a user gives it: table, JSON lines, and the rows again from the file."""
    write_trace(tmp_path / "t.jsonl", make_trace(rng, 12, mean_new=400, mean_output=5))
    command = [sys.executable, str(ROOT / "bench" / "memory.py")]
    run = [*command, "--trace", str(tmp_path / "t.jsonl"), "--pools", "64", "0", "--out", str(tmp_path / "o.jsonl")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "hit rate" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [row["infinite"] for row in rows] == [False, True]
    assert all(row["finished"] == 12 for row in rows)
    shown = [*command, "--trace", "x", "--recorded", str(tmp_path / "o.jsonl")]
    again = subprocess.run(shown, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "infinite" in again.stdout
