"""Kernel sources as the compiler gets them: every file that a kernel includes, under names that are alike everywhere.

NVRTC writes the path of each file into the line table of the cubin and completes a relative one with the current
directory. So files are handed over in memory, under absolute names below a root that is on no disk, and the include
directives are rewritten to these names. Then a cubin depends on what was read and on nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv4_rt.errors import CompileError

ROOT = "/dsv4_rt/"  # of the names that the compiler sees; messages and PTX show them without it

# The time stamps of a file system may be as coarse as this: a file younger than that when it was read may be changed
# again without its stamp changing.
_COARSEST_STAMP_NS = 2_000_000_000

_TOKEN = re.compile(
    r"""
      (?P<include> ^[ \t]* (?:/\*(?:[^*\n]|\*(?!/))*\*/[ \t]*)* \#[ \t]*include\b [ \t]*
        (?: "(?P<quoted>[^"\n]*)" | <(?P<angled>[^>\n]*)> | [^\n]* ) )
    | // (?:\\\n|[^\n])*
    | /\* .*? (?:\*/|\Z)
    | R"(?P<delimiter>[^\s()\\"]{0,16})\( .*? \)(?P=delimiter)"
    | "(?:\\.|[^"\\\n])*"
    | \b\d[\w.']*
    | '(?:\\.|[^'\\\n])*'
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)

Stamp = tuple[int, int, int] | None  # mtime in ns, size, inode; None: there is no such file


@dataclass(frozen=True)
class Declaration:
    """A `__global__` function as a source declares it."""

    name: str
    template: str  # the template parameters, "" where it is not a template
    file: str
    line: int

    def __str__(self) -> str:
        signature = f"{self.name}<{self.template}>" if self.template else self.name
        return f"{signature}  {self.file}({self.line})"


@dataclass
class Sources:
    """A kernel source and everything it includes, read once.

    texts: display name -> text as it lies on disk; the kernel source first, the others in the order of inclusion.
    programs: display name -> text for the compiler, includes rewritten. The same lines.
    stamps: every path that was read or looked for and not found, so that any change that matters shows in one of them.
    settled: no file was so young that a later change could leave its stamp as it is.
    """

    name: str
    path: Path
    texts: dict[str, str] = field(default_factory=dict)
    programs: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)
    settled: bool = True

    def digests(self) -> dict[str, str]:
        """Display name -> SHA-256 of the text."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}

    def declarations(self) -> list[Declaration]:
        """The kernels of all files read, in that order."""
        return [kernel for name, text in self.texts.items() for kernel in declarations(text, name)]

    def line(self, name: str, number: int) -> str:
        """One source line, "" where there is none."""
        lines = self.texts.get(name, "").splitlines()
        return lines[number - 1] if 0 < number <= len(lines) else ""


def stamp(path: str) -> Stamp:
    """What changes when a file changes."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def unchanged(stamps: Mapping[str, Stamp]) -> bool:
    """True if every path still has its stamp."""
    return all(stamp(path) == old for path, old in stamps.items())


def read(source: str | os.PathLike[str], kernels: Path) -> Sources:
    """Read a kernel source and, transitively, what it includes.

    Args:
        source: a path below `kernels`, relative to it or absolute, or the absolute path of a source elsewhere.
        kernels: the kernels tree. Its files show as "kernels/...", a source elsewhere by its file name.

    A file of the tree may include files of `kernels/include`; a source elsewhere those of its own directory too, which
    come first. A header may name its neighbours. All includes are read, also those in an untaken `#if`.

    Raises:
        CompileError: the source or an include does not exist, or an include is a macro.
    """
    path = Path(os.path.normpath(kernels / source))
    inside = path.is_relative_to(kernels)
    include = kernels / "include"
    roots = [include] if inside else [path.parent, include]
    sources = Sources(_display(path, kernels, path.parent), path)

    def visit(path: Path, name: str, text: str) -> None:
        sources.texts[name] = text
        sources.programs[name] = ""  # its place in the order, and the mark that ends a cycle of includes
        pieces, done = [], 0
        for match in _includes(text):
            wanted = match["quoted"] or match["angled"]
            line = text.count("\n", 0, match.start("include")) + 1
            if not wanted:
                raise CompileError(f"{name}({line}): error: an #include must name its file: {match['include'].strip()}")
            found, content = find(path, name, line, wanted)
            target = _display(found, kernels, roots[0])
            pieces += [text[done : match.start("include")], f'#include "{ROOT}{target}"']
            done = match.end("include")
            if target not in sources.texts:
                visit(found, target, content)
        sources.programs[name] = "".join([*pieces, text[done:]])

    def find(includer: Path, name: str, line: int, wanted: str) -> tuple[Path, str]:
        neighbours = [includer.parent] if any(includer.is_relative_to(root) for root in roots) else []
        searched = []
        for directory in dict.fromkeys([*neighbours, *roots]):
            candidate = Path(os.path.normpath(directory / wanted))
            if not any(candidate.is_relative_to(root) for root in roots):
                continue
            searched.append(candidate)
            content = load(candidate)
            if content is not None:
                return candidate, content
        raise CompileError(
            f'{name}({line}): error: cannot find "{wanted}"; a kernel includes only '
            + ("its own directory and " if not inside else "")
            + "kernels/include, and NVRTC brings no headers of the standard library or of CUDA\n"
            + "\n".join(f"  searched: {candidate}" for candidate in searched or roots)
        )

    def load(path: Path) -> str | None:
        key = str(path)
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError:
            sources.stamps[key] = None
            return None
        sources.stamps[key] = (status.st_mtime_ns, status.st_size, status.st_ino)
        sources.settled &= status.st_mtime_ns < time.time_ns() - _COARSEST_STAMP_NS
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise CompileError(f"{path}({line}): error: not UTF-8 text: {error.reason}") from error

    text = load(path)
    if text is None:
        raise CompileError(f"{sources.name}: error: there is no such source\n  searched: {path}")
    visit(path, sources.name, text)
    return sources


def _display(path: Path, kernels: Path, own: Path) -> str:
    """The name of a file in messages, in PTX and (below ROOT) for the compiler; never a path of this machine."""
    if path.is_relative_to(kernels):
        return f"kernels/{path.relative_to(kernels).as_posix()}"
    return path.relative_to(own).as_posix()


def _includes(text: str) -> Iterator[re.Match[str]]:
    return (match for match in _TOKEN.finditer(text) if match["include"])


def _blank(match: re.Match[str]) -> str:
    """Comments and literals as spaces, so that offsets and lines stay."""
    return match[0] if match["include"] or match[0][0].isdigit() else re.sub(r"[^\n]", " ", match[0])


def declarations(text: str, file: str) -> list[Declaration]:
    """The `__global__` functions that a source declares, found by reading its text; macros are not expanded."""
    text = _TOKEN.sub(_blank, text)
    called = re.compile(r"\b(\w+)\s*\(")
    found: dict[str, Declaration] = {}
    for match in re.finditer(r"\b__global__\b", text):
        # `__launch_bounds__(32 * WARPS)` and its like come before the name and have parentheses too.
        name = called.search(text, match.end())
        while name is not None and name[1].startswith("__"):
            name = called.search(text, _closing(text, name.end()))
        if name is None:
            continue
        head = text[: match.start()]
        head = head[max(head.rfind(";"), head.rfind("}"), head.rfind("{")) + 1 :]
        template = re.search(r"\btemplate\s*<(.*)>[^>]*\Z", head, re.DOTALL)
        line = text.count("\n", 0, name.start(1)) + 1
        parameters = " ".join(template[1].split()) if template else ""
        found.setdefault(name[1], Declaration(name[1], parameters, file, line))
    return list(found.values())


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that was opened before `at` closes."""
    depth = 1
    while depth and at < len(text):
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at
