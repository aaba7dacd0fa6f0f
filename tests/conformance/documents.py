"""The recorded summaries where people read them: between markers in the emulator's README.

    python tests/conformance/documents.py        # run.py --record and launches.py --summary do it too
"""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[2] / "dsv4_rt" / "emulator" / "README.md"
SUMMARIES = {"forms": RESULTS / "summary.txt", "launches": RESULTS / "launches.txt"}


def shown(readme: str) -> str:
    """The README with each summary, of launches its head, between <!-- conformance:NAME --> and <!-- end -->."""
    for name, path in SUMMARIES.items():
        text = path.read_text().strip()
        if name == "launches":
            text = text.split("\n\n")[0]  # the table of tests is long
        head = f"<!-- conformance:{name} -->"
        start = readme.index(head) + len(head)
        end = readme.index("<!-- end -->", start)
        readme = f"{readme[:start]}\n```text\n{text}\n```\n{readme[end:]}"
    return readme


def write() -> None:
    """Bring the README up to date."""
    README.write_text(shown(README.read_text()))


if __name__ == "__main__":
    write()
