"""Functions a kernel may call without defining them: what the driver links in on a GPU.

Each takes the batch, the call, the lanes that make it and its arguments as arrays, and returns the result's bits.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.ir import Instr

if TYPE_CHECKING:
    from dsv4_rt.emulator.batch import Batch

Array = npt.NDArray[Any]
_LIBC = ctypes.CDLL(None)
_CONVERSION = re.compile(
    r"%(?P<flags>[-+ #0]*)(?P<width>\*|\d*)(?P<precision>\.(?:\*|\d*))?(?P<size>hh|h|ll|l|j|z|t|L)?(?P<kind>.)",
    re.DOTALL,
)
_NARROW = {"hh": 8, "h": 16}
_LONGEST = 1 << 16  # bytes of a string, so that one without an end is an error message and not a hang


def _load(batch: Batch, lanes: Array, address: Array, k: int) -> Array:
    bases = batch.shared_base[lanes], batch.local_base[lanes]
    batch.races.touch(lanes, batch.races.line, 0)
    return batch.generic.load(address, bases, k)


def _string(batch: Batch, lane: int, address: int) -> str:
    """The zero-terminated text at a lane's generic address."""
    lanes, found = np.array([lane]), bytearray()
    while len(found) < _LONGEST:
        byte = int(_load(batch, lanes, np.array([address + len(found)], np.uint64), 0)[0])
        if not byte:
            break
        found.append(byte)
    return found.decode(errors="replace")


def _print(batch: Batch, ins: Instr, lanes: Array, args: Sequence[Array]) -> Array:
    """vprintf(format, arguments): text to Python's standard output, threads in order; the count of arguments read.

    Arguments lie one after the other, each aligned to its size: 4 bytes for int, 8 for the rest.
    """
    formats, arguments = args
    batch.races.line = ins.line
    lines = [""] * len(lanes)
    count = np.zeros(len(lanes), np.uint32)
    strings: dict[int, str] = {}
    for address in np.unique(formats).tolist():
        chosen = np.nonzero(formats == address)[0]
        text = _string(batch, int(lanes[chosen[0]]), address)
        offset, end = 0, 0

        def take(size: int, chosen: Array = chosen) -> list[int]:
            nonlocal offset
            offset = -(-offset // size) * size
            at = arguments[chosen] + np.uint64(offset)
            offset += size
            count[chosen] += 1
            values: list[int] = _load(batch, lanes[chosen], at, size.bit_length() - 1).tolist()
            return values

        pieces: list[list[str]] = []
        for match in _CONVERSION.finditer(text):
            pieces.append([text[end : match.start()]] * len(chosen))
            end = match.end()
            if match["kind"] == "%":
                pieces.append(["%"] * len(chosen))
                continue
            stars = [take(4) for part in (match["width"], match["precision"] or "") if "*" in part]
            wide = match["kind"] not in "cdiouxX" or match["size"] in ("l", "ll", "j", "z", "t")
            values = take(8 if wide else 4)
            piece = []
            for i, value in enumerate(values):
                given = [_signed(star[i], 32) for star in stars]
                if match["kind"] == "s" and value not in strings:
                    strings[value] = _string(batch, int(lanes[chosen[i]]), value)
                piece.append(_format(match, given, value, strings))
            pieces.append(piece)
        pieces.append([text[end:]] * len(chosen))
        for i, at in enumerate(chosen.tolist()):
            lines[at] = "".join(piece[i] for piece in pieces)
    sys.stdout.write("".join(lines))
    return count


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _format(match: re.Match[str], stars: list[int], value: int, strings: Mapping[int, str]) -> str:
    """One conversion, by the C library's own rules."""
    kind, size = match["kind"], match["size"] or ""
    given: Any
    if kind in "diouxX":
        bits = _NARROW.get(size, 64 if size else 32)
        value = _signed(value, bits) if kind in "di" else value & (1 << bits) - 1
        size, given = "ll", ctypes.c_longlong(value)
    elif kind in "eEfFgGaA":
        size, given = "", ctypes.c_double(float(np.array([value], np.uint64).view(np.float64)[0]))
    elif kind == "c":
        size, given = "", ctypes.c_int(value & 255)
    elif kind == "p":
        size, given = "", ctypes.c_void_p(value)
    elif kind == "s":
        size, given = "", ctypes.c_char_p(strings[value].encode())
    else:
        return match.group()
    form = f"%{match['flags']}{match['width']}{match['precision'] or ''}{size}{kind}".encode()
    found = ctypes.create_string_buffer(_LONGEST)
    written = _LIBC.snprintf(found, ctypes.c_size_t(_LONGEST), form, *map(ctypes.c_int, stars), given)
    return found.raw[: max(0, min(written, _LONGEST - 1))].decode(errors="replace")


def _assert_failed(batch: Batch, ins: Instr, lanes: Array, args: Sequence[Array]) -> Array | None:
    """__assertfail(message, file, line, function, bytes a character)."""
    lane = int(lanes[0])
    batch.races.line = ins.line
    message, file, function = (_string(batch, lane, int(args[i][0])) for i in (0, 1, 3))
    what = f"assertion failed: {message}, in {function} at {file}:{int(args[2][0])}"
    raise batch.fault(what, ins, lanes)


EXTERNAL: Mapping[str, Callable[[Batch, Instr, Array, Sequence[Array]], Array | None]] = {
    "vprintf": _print,
    "__assertfail": _assert_failed,
}
