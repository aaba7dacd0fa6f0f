"""The arguments of `python -m dsv4_rt emulate`: from `f32:1.5` or `in:x.npy` to bytes in a kernel's parameter buffer.

i32:-5  u64:7  f32:1.5  bf16:2            a scalar, of the parameter's size
hex:0102ff                                raw bytes, for a structure passed by value
buf:f32:1024  buf:f32:64x256:random       memory: zeros, or filled: zeros, ones, arange, random (--seed)
in:x.npy                                  an array the kernel may only read
inout:x.npy                               an array it may change; the file only with --write
out:y.npy:f32:64x256                      memory, all bits set before the launch, saved after it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dsv4_rt.errors import ArgumentError

if TYPE_CHECKING:
    from dsv4_rt.emulator import Memory

DTYPES: dict[str, np.dtype[Any]] = {
    **{f"i{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
FILLS = ("zeros", "ones", "arange", "random")
FORMS = (
    "i32:5, f32:1.5, hex:BYTES, buf:TYPE:SHAPE[:FILL], in:FILE.npy, inout:FILE.npy or out:FILE.npy:TYPE:SHAPE; "
    f"types: {', '.join(DTYPES)}; fills: {', '.join(FILLS)}"
)
SHOWN = 3  # elements of a buffer's beginning and end in a report
MOST = 1 << 34  # bytes of one buffer: a typing error should not ask the machine for all its memory


@dataclass
class Argument:
    """One argument as given, and its value: bytes of a scalar, or an array for memory."""

    spec: str
    form: str
    value: bytes | np.ndarray[Any, Any]
    path: Path | None = None

    @property
    def size(self) -> int:
        """Bytes it takes in the parameter buffer."""
        return len(self.value) if isinstance(self.value, bytes) else 8


@dataclass
class Placed:
    """A buffer in the emulator's memory."""

    index: int
    argument: Argument
    address: int
    array: np.ndarray[Any, Any]

    def changed(self) -> int:
        """How many elements differ, bit for bit, from what they were before the launch."""
        before = np.ascontiguousarray(self.argument.value)
        size = max(self.array.itemsize, 1)
        now, old = (a.reshape(-1).view(np.uint8).reshape(-1, size) for a in (self.array, before))
        return int((now != old).any(axis=1).sum())

    def save(self, path: Path) -> None:
        """Write the array as .npy; bfloat16, which .npy does not know, as its bits in uint16."""
        array = self.array.view(np.uint16) if self.array.dtype == DTYPES["bf16"] else self.array
        try:
            with path.open("wb") as file:
                np.save(file, array)
        except OSError as error:
            raise ArgumentError(f"{self.argument.spec}: cannot write {path}: {error.strerror}") from None

    def summary(self) -> dict[str, Any]:
        """What a report says of the buffer; values as Python numbers, those that are not finite as text."""
        flat = self.array.reshape(-1)
        found: dict[str, Any] = {
            "index": self.index,
            "argument": self.argument.spec,
            "dtype": self.array.dtype.name,
            "shape": list(self.array.shape),
            "changed": self.changed(),
            "first": [plain(v) for v in flat[:SHOWN]],
            "last": [plain(v) for v in flat[SHOWN:][-SHOWN:]],
            "min": None,
            "max": None,
            "nan": 0,
        }
        if flat.dtype.kind in "biuf" or flat.dtype == DTYPES["bf16"]:
            wide = flat.astype(np.float32) if flat.dtype == DTYPES["bf16"] else flat
            numbers = wide[~np.isnan(wide)] if wide.dtype.kind == "f" else wide
            found["nan"] = int(wide.size - numbers.size)
            if numbers.size:
                found["min"], found["max"] = plain(numbers.min()), plain(numbers.max())
        return found


def plain(value: Any) -> Any:
    """A NumPy scalar for JSON: a number in as few digits as tell it apart, or text where JSON has no number for it."""
    if isinstance(value, np.bool_ | np.integer):
        return int(value)
    text = str(value)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if np.isfinite(number) else text


def parse(specs: Sequence[str], seed: int) -> list[Argument]:
    """Read arguments and load their files.

    Raises:
        ArgumentError: one is not understood, or its file cannot be read.
    """
    return [_parse(spec, np.random.default_rng([seed, index])) for index, spec in enumerate(specs)]


def _parse(spec: str, rng: np.random.Generator) -> Argument:
    form, _, rest = spec.partition(":")
    if form in DTYPES:
        return Argument(spec, form, _scalar(spec, DTYPES[form], rest))
    if form == "hex":
        try:
            return Argument(spec, form, bytes.fromhex(rest))
        except ValueError:
            raise ArgumentError(f"--arg {spec}: {rest!r} is not pairs of hexadecimal digits") from None
    if form == "buf":
        parts = rest.split(":")
        kind, shape, fill = (*parts, "zeros")[:3] if len(parts) in (2, 3) else ("", "", "")
        if fill not in FILLS:
            raise ArgumentError(f"--arg {spec}: wanted buf:TYPE:SHAPE[:FILL], fills: {', '.join(FILLS)}")
        return Argument(spec, form, _filled(_dtype(spec, kind), _shape(spec, kind, shape), fill, rng))
    if form in ("in", "inout") and rest:
        return Argument(spec, form, _load(spec, rest), Path(rest))
    if form == "out" and rest.count(":") >= 2:
        name, kind, shape = rest.rsplit(":", 2)
        dims, dtype = _shape(spec, kind, shape), _dtype(spec, kind)
        count = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
        return Argument(spec, form, np.full(count, 0xFF, np.uint8).view(dtype).reshape(dims), Path(name))
    raise ArgumentError(f"--arg {spec}: wanted one of {FORMS}")


def _scalar(spec: str, dtype: np.dtype[Any], text: str) -> bytes:
    if dtype.kind in "iu":
        try:
            number = int(text, 0)
        except ValueError:
            raise ArgumentError(f"--arg {spec}: {text!r} is not an integer") from None
        limits = np.iinfo(dtype)
        if not limits.min <= number <= limits.max:
            raise ArgumentError(f"--arg {spec}: {number} does not lie in {limits.min} ... {limits.max}")
        return number.to_bytes(dtype.itemsize, "little", signed=dtype.kind == "i")
    try:
        with np.errstate(over="ignore"):
            return np.array(float(text)).astype(dtype).tobytes()
    except ValueError:
        raise ArgumentError(f"--arg {spec}: {text!r} is not a number") from None


def _dtype(spec: str, name: str) -> np.dtype[Any]:
    if name not in DTYPES:
        raise ArgumentError(f"--arg {spec}: no type {name!r}; types: {', '.join(DTYPES)}")
    return DTYPES[name]


def _shape(spec: str, kind: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(x[0-9]+)*", text):
        raise ArgumentError(f"--arg {spec}: {text!r} is not a size such as 1024 or 64x256")
    dims = tuple(int(part) for part in text.split("x"))
    size = _dtype(spec, kind).itemsize
    for dim in dims:
        size *= dim
    if size > MOST:
        raise ArgumentError(f"--arg {spec}: {size:,} bytes; the largest buffer has {MOST:,}")
    return dims


def _filled(dtype: np.dtype[Any], dims: tuple[int, ...], fill: str, rng: np.random.Generator) -> Any:
    """Random: floats are standard normal, integers have random bits. `arange` wraps around in small integers."""
    if fill == "zeros":
        return np.zeros(dims, dtype)
    if fill == "ones":
        return np.ones(dims, dtype)
    count = int(np.prod(dims, dtype=np.int64))
    if fill == "arange":
        return np.arange(count, dtype=np.int64).astype(dtype).reshape(dims)
    if dtype.kind in "iu":
        return np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).reshape(dims)
    return rng.standard_normal(dims).astype(dtype)


def _load(spec: str, name: str) -> Any:
    try:
        loaded = np.load(name, allow_pickle=False)
    except OSError as error:
        raise ArgumentError(f"--arg {spec}: cannot read {name}: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise ArgumentError(f"--arg {spec}: {name} is not a .npy file of numbers: {error}") from None
    if not isinstance(loaded, np.ndarray):
        raise ArgumentError(f"--arg {spec}: {name} is not one .npy array")
    return np.array(loaded, loaded.dtype.newbyteorder("="), order="C")


def place(arguments: Sequence[Argument], memory: Memory) -> list[Placed]:
    """Put every buffer into the emulator's memory, between red zones that no kernel may touch."""
    found = []
    for index, argument in enumerate(arguments):
        if isinstance(argument.value, bytes):
            continue
        source = argument.value
        label = f"argument {index}, {argument.spec}"
        address = memory.alloc(source.nbytes, label=label, writable=argument.form != "in")
        array = memory.view(address, source.nbytes).view(source.dtype).reshape(source.shape)
        array[...] = source
        found.append(Placed(index, argument, address, array))
    return found


def pack(
    arguments: Sequence[Argument], placed: Sequence[Placed], params: Sequence[tuple[int, int]], size: int
) -> bytes:
    """The parameter buffer; the arguments fit, see `check`."""
    buffer = bytearray(size)
    addresses = {each.index: each.address for each in placed}
    for index, (argument, (offset, length)) in enumerate(zip(arguments, params, strict=True)):
        value = argument.value if isinstance(argument.value, bytes) else addresses[index].to_bytes(8, "little")
        buffer[offset : offset + length] = value
    return bytes(buffer)


def check(kernel: str, arguments: Sequence[Argument], names: Sequence[str], params: Sequence[tuple[int, int]]) -> None:
    """Raise ArgumentError, with the kernel's parameters beside the arguments, unless they fit in number and size."""
    wrong = [i for i, (a, (_, size)) in enumerate(zip(arguments, params, strict=False)) if a.size != size]
    if len(arguments) == len(params) and not wrong:
        return
    if len(arguments) != len(params):
        problem = f"{kernel} has {len(params)} parameters, {len(arguments)} arguments are given"
    else:
        i = wrong[0]
        problem = f"{kernel}: --arg {arguments[i].spec} has {arguments[i].size} bytes, parameter {i} {params[i][1]}"
    lines = [problem]
    for i in range(max(len(arguments), len(params))):
        mark = ">" if i in wrong or i >= len(params) or i >= len(arguments) else " "
        name, size = (names[i], f"{params[i][1]} bytes") if i < len(params) else ("-", "")
        given = f"{arguments[i].spec} ({arguments[i].size} bytes)" if i < len(arguments) else "-"
        lines.append(f" {mark} {i:2}  {name:<24} {size:<10} {given}")
    raise ArgumentError("\n".join(lines))
