"""The recorded summaries where people read them: between markers in the emulator's README.

    python tests/conformance/documents.py        # run.py --record and programs.py --summary do it too
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "dsv4_rt" / "emulator" / "README.md"
SUMMARIES = {"forms": RESULTS / "summary.txt", "programs": RESULTS / "programs.txt"}


def shown(readme: str) -> str:
    """The README with each recorded summary between <!-- conformance:NAME --> and <!-- end -->."""
    for name, path in SUMMARIES.items():
        head = f"<!-- conformance:{name} -->"
        start = readme.index(head) + len(head)
        end = readme.index("<!-- end -->", start)
        readme = f"{readme[:start]}\n```text\n{path.read_text().strip()}\n```\n{readme[end:]}"
    return readme


def write() -> None:
    """Bring the README up to date."""
    README.write_text(shown(README.read_text()))


if __name__ == "__main__":
    write()
