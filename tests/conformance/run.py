"""Run the conformance forms on the emulator or a GPU, and compare two runs bit by bit.

    python tests/conformance/run.py --on cuda --out h200.npz          # on a machine with a GPU
    python tests/conformance/run.py --on emulator --out emulator.npz
    python tests/conformance/run.py --compare h200.npz emulator.npz [--record tests/conformance/results]

--record writes summary.txt and digests.json, which test_conformance.py checks without a GPU, and puts the summary into
the emulator's README. --seed runs other operands than the recorded ones; --only takes the forms whose name contains a
text.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import documents  # noqa: E402
from compare import judge, record  # noqa: E402
from documents import RESULTS  # noqa: E402
from forms import THREADS, Form, all_forms  # noqa: E402
from operands import SEED  # noqa: E402

from kernels import Cuda, on_emulator  # noqa: E402

PER_MODULE = 50  # the driver compiles a module at a time; one a form would spend its time on overheads


def run(on: str, forms: list[Form], seed: int) -> tuple[dict[str, list[np.ndarray]], dict[str, object]]:
    """(results by name, what they were made on)."""
    conditions: dict[str, object] = {"on": on, "seed": seed, "date": str(datetime.date.today())}
    if on == "cuda":
        device = Cuda()
        conditions |= {"machine": device.name, "driver": device.version}
    results: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(forms), PER_MODULE):
        chunk = forms[start : start + PER_MODULE]
        results |= device.run(chunk, seed) if on == "cuda" else on_emulator(chunk, seed)
    return results, conditions


def save(path: str, results: dict[str, list[np.ndarray]], conditions: dict[str, object]) -> None:
    """All results in one compressed file."""
    arrays = {f"{name}#{i}": array for name, outs in results.items() for i, array in enumerate(outs)}
    np.savez_compressed(
        path, **{key.replace("/", "_"): a for key, a in arrays.items()}, conditions=json.dumps(conditions)
    )


def load(path: str) -> tuple[dict[str, list[np.ndarray]], dict[str, object]]:
    """What `save` wrote."""
    with np.load(path) as file:
        conditions = json.loads(str(file["conditions"]))
        results: dict[str, list[np.ndarray]] = {}
        for key in file.files:
            if key != "conditions":
                results.setdefault(key.rsplit("#", 1)[0], []).append(file[key])
    return results, conditions


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", choices=("emulator", "cuda"))
    parser.add_argument("--out")
    parser.add_argument("--compare", nargs=2, metavar=("GPU", "EMULATOR"))
    parser.add_argument("--record", metavar="FOLDER")
    parser.add_argument("--commit", default="")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if args.on:
        if not args.out:
            parser.error("--on needs --out")
        forms = [form for form in all_forms() if args.only in form.name]
        results, conditions = run(args.on, forms, args.seed)
        save(args.out, results, conditions)
        print(f"{len(results)} forms of {THREADS} threads a block on {conditions} -> {args.out}")
        return 0
    if not args.compare:
        parser.error("--on or --compare")
    (gpu, conditions), (emulator, _) = load(args.compare[0]), load(args.compare[1])
    forms = [form for form in all_forms() if form.name in gpu and form.name in emulator]
    verdicts = judge(forms, gpu, emulator, int(str(conditions["seed"])))
    text = record(verdicts, forms, gpu, emulator, conditions | {"commit": args.commit}, args.record)
    print(text)
    if args.record and Path(args.record).resolve() == RESULTS:
        documents.write()
    return 1 if any(v.state == "FAILED" for v in verdicts) else 0


if __name__ == "__main__":
    raise SystemExit(main())
