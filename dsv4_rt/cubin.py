"""What a cubin says about its kernels, read from its ELF sections: no driver, no GPU, no external tool.

A cubin is a little-endian ELF64 file. Per kernel it has a section `.nv.info.<kernel>`, a list of attributes that the
driver reads before a launch: the offset and size of every parameter, launch bounds, cluster dimensions. The section
`.nv.info` has the registers and the stack frame of every function. Spills and static shared memory are only in the log
of ptxas: the section `.nv.shared.<kernel>` counts the 1 KB that these architectures reserve, too.

An attribute is a format byte, an identifier byte and a value: a 16-bit value inline, or, in format 4, a 16-bit length
and that many bytes. The format is not published; the identifiers used here are checked against kernels whose layout is
known in tests/core/test_cubin.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_SIZED = 0x04  # attribute format: u16 length, then the value; every other format has its 16-bit value inline

_MAX_THREADS = 0x05  # u32 x, y, z of __launch_bounds__ (x only) or .reqntid / .maxntid
_FRAME_SIZE = 0x11  # u32 symbol, u32 bytes of stack frame
_PARAM = 0x17  # u32 index, u16 ordinal, u16 offset, u32 packed with the size from bit 18
_REGISTERS = 0x2F  # u32 symbol, u32 registers a thread
_CLUSTER = 0x3D  # u32 x, y, z of __cluster_dims__

_SHT_SYMTAB = 2


@dataclass(frozen=True)
class Param:
    """Where one kernel parameter lies in the parameter buffer, in bytes.

    Not always where C would put it: a parameter aligned to more than 16 bytes, such as a tensor map, is aligned in the
    constant bank, where the buffer starts at a multiple of 16 on sm_90 and of 128 on sm_100.
    """

    offset: int
    size: int


@dataclass(frozen=True)
class KernelRecord:
    """One kernel of a cubin; sizes in bytes, `max_threads` 1024 where the source sets no bound."""

    registers: int
    stack_bytes: int
    max_threads: int
    cluster: tuple[int, int, int] | None
    params: tuple[Param, ...]


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    link: int
    data: bytes


def read_kernels(cubin: bytes) -> dict[str, KernelRecord]:
    """Every kernel of a cubin, by lowered (mangled) name.

    Raises:
        ValueError: the bytes are not a 64-bit little-endian ELF file, or are cut short.
    """
    try:
        return _read_kernels(cubin)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"not a complete cubin: {len(cubin)} bytes, {error}") from error


def _read_kernels(cubin: bytes) -> dict[str, KernelRecord]:
    sections = _sections(cubin)
    by_name = {section.name: section for section in sections}
    symbols = _symbol_names(sections)
    registers: dict[str, int] = {}
    frames: dict[str, int] = {}
    for attribute, value in _attributes(by_name[".nv.info"].data if ".nv.info" in by_name else b""):
        if attribute in (_REGISTERS, _FRAME_SIZE):
            symbol, number = struct.unpack_from("<II", value)
            (registers if attribute == _REGISTERS else frames)[symbols[symbol]] = number

    kernels: dict[str, KernelRecord] = {}
    prefix = ".nv.info."
    for section in sections:
        name = section.name.removeprefix(prefix)
        if name == section.name or f".text.{name}" not in by_name:
            continue
        params: dict[int, Param] = {}
        max_threads, cluster = 1024, None
        for attribute, value in _attributes(section.data):
            if attribute == _PARAM:
                _, ordinal, offset, packed = struct.unpack_from("<IHHI", value)
                params[ordinal] = Param(offset, packed >> 18)
            elif attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<III", value)
                max_threads = x * y * z
            elif attribute == _CLUSTER:
                x, y, z = struct.unpack_from("<III", value)
                cluster = (x, y, z)
        kernels[name] = KernelRecord(
            registers=registers.get(name, 0),
            stack_bytes=frames.get(name, 0),
            max_threads=max_threads,
            cluster=cluster,
            params=tuple(params[ordinal] for ordinal in sorted(params)),
        )
    return kernels


def _sections(cubin: bytes) -> list[_Section]:
    """The section table of an ELF64 file (System V ABI, "Sections")."""
    if cubin[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"not a cubin: {len(cubin)} bytes that start with {cubin[:6]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQII", cubin, table + i * entry_size) for i in range(count)]
    names_at = headers[names_index][4]
    sections = []
    for name, kind, _flags, _address, offset, size, link, _info in headers:
        end = cubin.index(b"\0", names_at + name)
        text = cubin[names_at + name : end].decode()
        sections.append(_Section(text, kind, link, cubin[offset : offset + size]))
    return sections


def _symbol_names(sections: list[_Section]) -> list[str]:
    """Names of the symbol table, by symbol index."""
    names: list[str] = []
    for table in (section for section in sections if section.kind == _SHT_SYMTAB):
        strings = sections[table.link].data
        for at in range(0, len(table.data), 24):
            (start,) = struct.unpack_from("<I", table.data, at)
            names.append(strings[start : strings.index(b"\0", start)].decode())
    return names


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(identifier, value) of every attribute of a `.nv.info` section."""
    at = 0
    while at < len(data):
        form, attribute, short = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _SIZED:
            yield attribute, data[at : at + short]
            at += short
        else:
            yield attribute, struct.pack("<H", short)
