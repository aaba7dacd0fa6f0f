"""The emulator could be lifted out of this package: it imports NumPy, the standard library, our errors and itself."""

import ast
import sys
from pathlib import Path

import pytest

import dsv4_rt.emulator

FOLDER = Path(dsv4_rt.emulator.__file__).parent


def imports(text):
    """The modules a source imports, anywhere in it; a relative import by its dots."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def foreign(text):
    """Those that are not allowed."""
    own = ("dsv4_rt.errors", "dsv4_rt.emulator")
    return [
        name
        for name in imports(text)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "numpy"}
        and not any(name == each or name.startswith(f"{each}.") for each in own)
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_imports_nothing_of_the_rest(path):
    assert foreign(path.read_text()) == []


def test_this_test_sees_foreign_imports():
    text = """
import os, numpy.typing, ml_dtypes
from dsv4_rt import models
def f():
    from dsv4_rt.router.ops import topk_select
    from .. import formats
    import dsv4_rt.errors
"""
    assert foreign(text) == ["ml_dtypes", "dsv4_rt", "dsv4_rt.router.ops", ".."]
