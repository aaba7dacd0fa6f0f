"""Everything of the emulator that a GPU judges, in one command; README.md beside this file says what it covers.

    python tests/conformance/everything.py --out FOLDER [--commit HASH]      # on a machine with an H200 or B200

Each step's output goes to FOLDER/NAME.txt, the verdicts to FOLDER/verdicts.txt. A step that fails does not stop the
others. Exit status: 0 all steps passed, 1 one did not, 2 there is no GPU or a package is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEEDED = ("numpy", "ml_dtypes", "pytest", "cupy", "cuda.bindings")


def steps(out: Path, commit: str, arch: str = "sm_90a") -> dict[str, list[str]]:
    """The commands by name, in their order; a replay compares what the record before it wrote.

    Programs are compiled for sm_90a and sm_100a: a B300, whose driver loads neither, runs the tests only.
    """
    launches, record = str(HERE / "launches.py"), str(out / "launches")
    tests = [str(HERE.parent / "emulator"), str(HERE)]
    found = {"tests": ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", *tests]}
    if arch not in ("sm_90a", "sm_100a"):
        return found
    return found | {
        "record": [launches, "--record", record, "--arch", arch],
        "replay": [launches, "--replay", record, "--summary", str(out / "launches.txt"), "--commit", commit],
    }


def missing() -> str:
    """Why this machine cannot judge; empty if it can."""
    for name in NEEDED:
        if importlib.util.find_spec(name.split(".")[0]) is None or importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install it"
    sys.path.insert(0, str(ROOT))
    from dsv4_rt.cuda_device import cuda_device_count

    return "" if cuda_device_count() else "no CUDA device here; run it on a machine with an H200"


def first_arch() -> str:
    """The architecture of the first GPU; empty if no kernel exists for it."""
    from dsv4_rt import doctor

    return doctor.gpus()[0].arch or ""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    why = missing()
    if why:
        print(f"everything.py: {why}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    lines, failed = [], False
    for name, command in steps(args.out.resolve(), args.commit, first_arch()).items():
        start = time.monotonic()
        with (args.out / f"{name}.txt").open("w") as output:
            code = subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        failed |= code != 0
        last = (args.out / f"{name}.txt").read_text().strip().split("\n")[-1]
        lines.append(f"{name:8} {'passed' if code == 0 else 'FAILED'} in {time.monotonic() - start:.0f} s: {last}")
        print(lines[-1], flush=True)
        (args.out / "verdicts.txt").write_text("\n".join(lines) + "\n")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
