"""Random tensor copies: what is copied, the same copy in NumPy, and how a device runs it.

    python tests/conformance/tiles.py --record tests/conformance/results      # on a machine with a GPU

records digests of what the GPU returned, which test_tiles.py compares with the emulator's on any machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import dsv4_rt
from dsv4_rt.launch import load
from dsv4_rt.tensor_map import DTYPES, FLOATS, SWIZZLES, TensorMap

SEED, COUNT = 20261121, 400
SOURCE = str(Path(__file__).with_name("tiles.cu"))
BYTES = 32768
POISON = 0xEE
REDUCTIONS = {
    "add": ("u32", "s32", "u64", "f16", "bf16", "f32", "f64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64", "f16", "bf16")),
    **dict.fromkeys(("and", "or", "xor"), ("u32", "s32", "u64")),
    **dict.fromkeys(("inc", "dec"), ("u32",)),
}
COPIED = [each for each in DTYPES if "x16" not in each]  # sm_90a has no packed types


@dataclass(frozen=True)
class Case:
    """One copy. Axes in the order of an array, the contiguous one last; strides in bytes."""

    op: str  # load, store, or a reduction
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: str
    fill: str
    coords: tuple[int, ...]
    start: int
    seed: int

    @property
    def size(self) -> int:
        return DTYPES[self.dtype] // 8

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @property
    def transaction_bytes(self) -> int:
        return int(np.prod(self.counts)) * self.size

    def memory(self) -> tuple[np.ndarray, np.ndarray]:
        """(the tensor's bytes, those of shared memory)."""
        rng = np.random.default_rng(self.seed)
        extent = self.size + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        tensor = rng.integers(0, 256, -(-extent // 256) * 256 + 256, np.uint8)
        shared = rng.integers(0, 256, BYTES, np.uint8)
        if self.op in ("add", "min", "max") and self.dtype in FLOATS:
            tensor, shared = (_floats(rng, each, self.dtype) for each in (tensor, shared))
        return tensor, shared


def _floats(rng: np.random.Generator, memory: np.ndarray, dtype: str) -> np.ndarray:
    """Random bits, a third of them of one size, so that sums round, and a third subnormal or nearly so."""
    bits, fraction = DTYPES[dtype], {"f16": 10, "bf16": 7, "f32": 23, "f64": 52}[dtype]
    words = memory.view(f"u{bits // 8}").copy()
    word = words.dtype.type
    rest, sign = word((1 << fraction) - 1), word(1 << bits - 1)
    pick = rng.integers(0, 3, len(words))
    near = words & (rest | sign) | word((1 << bits - 2) - (1 << fraction)) + (words >> word(bits - 3) << word(fraction))
    tiny = words & (rest | sign | word(1 << fraction))
    return np.where(pick == 0, words, np.where(pick == 1, near, tiny)).view(np.uint8)


def case(rng: np.random.Generator, op: str = "", dtype: str = "") -> Case:
    """A random copy that TMA can do."""
    op = op or str(rng.choice(["load", "load", "load", "store"]))
    allowed = REDUCTIONS.get(op, tuple(COPIED))
    dtype = dtype or str(rng.choice(allowed))
    size, rank = DTYPES[dtype] // 8, int(rng.integers(1, 6))
    swizzle = str(rng.choice(list(SWIZZLES)))
    while True:
        shape = tuple(int(n) for n in rng.integers(1, 12, rank - 1)) + (int(rng.integers(1, 200)),)
        strides, step = [size], -(-shape[-1] * size // 16) * 16
        for n in shape[-2::-1]:
            step += 16 * int(rng.integers(0, 3))
            strides.insert(0, step)
            step *= n
        widest = min(SWIZZLES[swizzle] or 512, 256 * size)
        row = 16 * int(rng.integers(1, widest // 16 + 1)) // size
        if row * size % 16:
            continue
        box = tuple(int(n) for n in rng.integers(1, 10, rank - 1)) + (row,)
        loose = rng.random() < 0.3
        steps = tuple(int(n) for n in rng.integers(1, 4 if loose else 2, rank - 1)) + (1,)
        rows = int(np.prod([-(-b // s) for b, s in zip(box[:-1], steps[:-1], strict=True)]))
        pitch = SWIZZLES[swizzle] or row * size
        if rows * pitch + 1024 <= BYTES and strides[0] * shape[0] < 1 << 21:
            break
    coords = [int(rng.integers(-b if op == "load" else 0, n + 2)) for b, n in zip(box, shape, strict=True)]
    if rng.random() < 0.05:
        coords[int(rng.integers(rank))] = int(rng.choice([-(1 << 31) if op == "load" else 0, (1 << 31) - 16, 1 << 20]))
    coords[-1] = coords[-1] * size // 16 * 16 // size
    fill = "nan" if op == "load" and dtype in FLOATS and rng.random() < 0.4 else "zero"
    start = 128 * int(rng.integers(8))
    seed = int(rng.integers(1 << 31))
    return Case(op, dtype, shape, tuple(strides), box, steps, swizzle, fill, tuple(coords), start, seed)


def cases(seed: int = SEED, count: int = COUNT) -> list[Case]:
    """Random copies, and each reduction of each type a few times."""
    rng = np.random.default_rng(seed)
    found = [case(rng) for _ in range(count)]
    for op, dtypes in REDUCTIONS.items():
        found += [case(rng, op, dtype) for dtype in dtypes for _ in range(3)]
    return found


# The same in NumPy.


def _places(c: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each element of the box: inside the tensor, its byte there, its byte in shared memory."""
    grid = np.indices(c.counts).reshape(len(c.box), -1)
    index = grid * np.array(c.steps)[:, None] + np.array(c.coords, np.int64)[:, None]
    if c.op != "load":  # a store goes out in pieces of 16 bytes
        index[-1] = index[-1] * c.size // 16 * 16 // c.size
    inside = ((index >= 0) & (index < np.array(c.shape)[:, None])).all(0)
    index = grid * np.array(c.steps)[:, None] + np.array(c.coords, np.int64)[:, None]
    there = (index * np.array(c.strides)[:, None]).sum(0)
    row = np.ravel_multi_index(tuple(grid[:-1]), c.counts[:-1]) if len(c.box) > 1 else np.zeros(grid.shape[1], np.int64)
    pitch = SWIZZLES[c.swizzle] or c.box[-1] * c.size
    here = c.start + row * pitch + grid[-1] * c.size
    if c.swizzle != "none":
        line, chunk = here // 128, here % 128 // 16
        here = here // 128 * 128 + (chunk ^ (line % (SWIZZLES[c.swizzle] // 16))) * 16 + here % 16
    return inside, there, here


def _elements(memory: np.ndarray, at: np.ndarray, size: int) -> np.ndarray:
    return memory[at[:, None] + np.arange(size)]


def _tf32(bits: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits of mantissa through float64, NaN as an H200 writes it."""
    with np.errstate(invalid="ignore"):  # signalling NaN are ordinary operands
        values = bits.view(np.float32).astype(np.float64)
    ulp = 2.0 ** (np.maximum(np.frexp(values)[1], -125) - 11)
    with np.errstate(all="ignore"):
        rounded = (np.rint(values / ulp) * ulp).astype(np.float32)
    rounded = np.where(np.isinf(values), values, rounded).astype(np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(0x7FFFE000), rounded | (bits & np.uint32(1 << 31))).astype(np.uint32)


def expected(c: Case) -> np.ndarray:
    """Shared memory after a load; the tensor after a store or a reduction of integers."""
    tensor, shared = c.memory()
    inside, there, here = _places(c)
    if c.op == "load":
        out = np.full(BYTES, POISON, np.uint8)
        fill = np.uint16(0x7FF7 if c.fill == "nan" else 0)
        data = np.broadcast_to(np.array([fill]).view(np.uint8)[np.arange(c.size) % 2], (len(here), c.size)).copy()
        data[inside] = _elements(tensor, there[inside], c.size)
        if c.dtype == "tf32":
            rounded = _tf32(np.ascontiguousarray(data[inside]).view(np.uint32).reshape(-1))
            data[inside] = rounded.view(np.uint8).reshape(-1, 4)
        out[here[:, None] + np.arange(c.size)] = data
        return out
    source = np.ascontiguousarray(_elements(shared, here[inside], c.size))
    old = np.ascontiguousarray(_elements(tensor, there[inside], c.size))
    if c.op != "store":
        kind = {"u": "u", "s": "i", "f": "f"}[c.dtype[0]] + str(c.size)
        a, b = (each.view(kind).reshape(-1) for each in (old, source))
        with np.errstate(all="ignore"):
            new = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                   "xor": np.bitwise_xor, "inc": lambda a, b: np.where(a >= b, 0, a + 1),
                   "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - 1)}[c.op](a, b).astype(kind)  # fmt: skip
        source = np.ascontiguousarray(new).view(np.uint8).reshape(-1, c.size)
    tensor[there[inside][:, None] + np.arange(c.size)] = source
    return tensor


def exact_in_numpy(c: Case) -> bool:
    """Whether `expected` has all bits: sums and extrema of floats have their own rules for NaN, zero and subnormals."""
    return c.op in ("load", "store") or c.dtype not in FLOATS


# On a device.


def strided(buffer: object, dtype: object, shape: tuple[int, ...], strides: tuple[int, ...]) -> object:
    """A view of a buffer of bytes on a device."""
    if isinstance(buffer, np.ndarray):
        from numpy.lib.stride_tricks import as_strided
    else:
        from cupy.lib.stride_tricks import as_strided
    return as_strided(buffer.view(dtype), shape, strides)


def tensor_map(c: Case, buffer: object) -> TensorMap:
    """The map over a buffer of bytes on the device."""
    array = strided(buffer, "f4" if c.dtype == "tf32" else f"u{c.size}", c.shape, c.strides)
    return TensorMap(array, c.box, dtype=c.dtype, element_strides=c.steps, swizzle=c.swizzle, oob_fill=c.fill)


def image(
    device: dsv4_rt.Device, given: TensorMap, coords: tuple[int, ...], start: int, nbytes: int, in_global: bool = False
) -> np.ndarray:
    """Shared memory after a load of the tile at coordinates, in the order of the array's axes."""
    rank = len(coords)
    out = device.array(np.zeros(BYTES // 4, np.uint32))
    name = f"tile_load_global<{rank}>" if in_global else f"tile_load<{rank}>"
    tiles = device.array(np.frombuffer(given.encode(device), np.uint8)) if in_global else given
    numbers = [np.uint32(start), np.uint32(nbytes), *(np.int32(n) for n in (*coords[::-1], *[0] * (5 - rank)))]
    load(SOURCE, name, device).launch(1, 128, tiles, out, *numbers, shared=BYTES + 1024)
    return device.numpy(out).view(np.uint8)


def run(c: Case, device: dsv4_rt.Device, in_global: bool = False) -> np.ndarray:
    """What the device makes of the copy, as `expected`."""
    tensor, shared = c.memory()
    buffer = device.array(tensor)
    tiles = tensor_map(c, buffer)
    assert tiles.transaction_bytes == c.transaction_bytes
    if c.op == "load":
        return image(device, tiles, c.coords, c.start, c.transaction_bytes, in_global)
    rank = len(c.shape)
    coords = [np.int32(n) for n in (*c.coords[::-1], *[0] * (5 - rank))]
    name = f"tile_{c.op}<{rank}>"
    given = device.array(shared.view(np.uint32))
    load(SOURCE, name, device).launch(1, 128, tiles, given, np.uint32(c.start), *coords, shared=BYTES + 1024)
    return device.numpy(buffer)


def digest(result: np.ndarray) -> str:
    return hashlib.sha256(result.tobytes()).hexdigest()[:16]


def rows(device: dsv4_rt.Device, size: int, mask: int, swizzle: str) -> tuple[np.ndarray, np.ndarray]:
    """(a tensor, what each CTA of a multicast launch has in shared memory after it)."""
    x = np.random.default_rng(size * 100 + mask).integers(0, 256, (8 * size, 64), np.uint8)
    tiles = TensorMap(device.array(x), (4, 64 if swizzle != "32B" else 32), swizzle=swizzle)
    out = device.array(np.zeros((2 * size, BYTES // 4), np.uint32))
    pitch = SWIZZLES[swizzle] or 64
    load(SOURCE, "multicast", device).launch(
        2 * size, 64, tiles, out, np.uint32(tiles.transaction_bytes), np.uint32(4), np.uint32(pitch), np.uint32(mask),
        shared=BYTES + 1024, cluster=(size,),
    )  # fmt: skip
    return x, device.numpy(out).view(np.uint8)


MULTICASTS = [(1, 1, "none"), (2, 3, "128B"), (2, 2, "64B"), (4, 0b1010, "32B"), (8, 0xFF, "128B"), (16, 0x7FFE, "64B")]


def names(found: list[Case]) -> list[str]:
    """A name a case: its number and operands at a glance."""
    return [f"{i}:{c.op}.{c.dtype}.{len(c.shape)}d.{c.swizzle}" for i, c in enumerate(found)]


def main() -> int:
    """Record what a GPU returns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="FOLDER", required=True)
    parser.add_argument("--commit", default="")
    args = parser.parse_args()
    device = dsv4_rt.open_device("cuda:0")
    with dsv4_rt.use_device(device):
        found = cases()
        table = {name: digest(run(c, device)) for name, c in zip(names(found), found, strict=True)}
        for each in MULTICASTS:
            table["multicast " + " ".join(map(str, each))] = digest(rows(device, *each)[1])
        emulator = dsv4_rt.open_device("emulator:sm_90a")
        equal = Counter(
            (c.op, digest(run(c, emulator)) == table[name]) for name, c in zip(names(found), found, strict=True)
        )
    text = [f"{device.name}, {datetime.date.today()}, commit {args.commit}; copies of seed {SEED}",
            "copies of tiles, all bytes of the destination compared: GPU against emulator", "",
            "operation    copies   equal"]  # fmt: skip
    for op in dict.fromkeys(c.op for c in found):
        text.append(f"{op:12}{equal[op, True] + equal[op, False]:>7}{equal[op, True]:>8}")
    text.append(f"multicast   {len(MULTICASTS):>7}  (compared by the tests)")
    Path(args.record, "tma.txt").write_text("\n".join(text) + "\n")
    content = {"machine": device.name, "date": str(datetime.date.today()), "commit": args.commit, "digests": table}
    Path(args.record, "tma.json").write_text(json.dumps(content, indent=0) + "\n")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
