"""The kept PTX is of the sources beside it, names no folder of the machine that made it, and can be made again."""

import re

import pytest
from foreign import installed_triton, kept
from keep import ARCHITECTURES, CCCL, HERE, KEPT, TRITON, digest, triton_programs, triton_ptx, triton_source

SOURCE = {name: HERE / "cccl" / f"{name}.cu" for name in CCCL}
TRITON_PROGRAMS = triton_programs()
FILES = [f"{name}.{arch}" for name, arch in (*((n, a) for n in CCCL for a in ARCHITECTURES), *TRITON_PROGRAMS)]


def test_every_program_is_kept():
    assert len({name for name, arch in TRITON_PROGRAMS if arch == "sm_100a"}) >= 10
    assert len([name for name, _ in TRITON_PROGRAMS if "dot" in name]) >= 6
    assert {path.name for path in KEPT.iterdir()} == {f"{name}.ptx" for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_it_is_of_the_source_that_is_here(name):
    program, arch = name.split(".")
    text, shared = kept(program, arch)
    first = text.split("\n", 1)[0]
    made_by = r"// CCCL [\d.]+, NVRTC 13\.0" if program in CCCL else rf"// Triton {re.escape(TRITON)}"
    source = digest(SOURCE[program] if program in CCCL else triton_source(program))
    wanted = rf"{made_by}, source {source}(, scratch \d+)?, shared {shared}"
    assert re.fullmatch(wanted, first), "run tests/emulator/keep.py again"
    assert f".target {arch}" in text
    assert ".version 9.0" in text


def strings(text):
    """What a module spells out in quotes and, byte by byte, in initialisers and debug sections."""
    listed = re.findall(r"= \{([\d, ]+)\}", text) + re.findall(r"((?:\.b8 \d+\s+)+)", text)
    found = [bytes(int(each) & 255 for each in re.findall(r"(?<![b\d])\d+", one)).decode("latin-1") for one in listed]
    return found + re.findall(r'"([^"]*)"', text)


@pytest.mark.parametrize("name", FILES)
def test_it_names_no_folder_of_a_machine(name):
    text, _ = kept(*name.split("."))
    assert not [each for each in strings(text) if "/" in each and not each.startswith("triton/")]


if installed_triton() == TRITON:

    @pytest.mark.parametrize(("name", "arch"), TRITON_PROGRAMS)
    def test_triton_makes_it_again(name, arch):
        assert triton_ptx(name, arch) == kept(name, arch)[0]
