"""What the tcgen05 forms give, by NumPy: elements, factors and scales; moves, copies and marks."""

from __future__ import annotations

import numpy as np
from tcgen05_forms import COPIES, Tcgen05Form, size_of
from tensor_operands import FORMATS

# (exponent bits, mantissa bits, has infinities) of what tensor_operands.py does not have; only e4m3 has a NaN then.
MORE = {"e2m3": (2, 3, False), "e3m2": (3, 2, False), "e2m1": (2, 1, False), "ue4m3": (4, 3, False)}
PADDED = {"e2m3": 6, "e3m2": 6, "e2m1": 4}  # bits of elements that lie 16 to 16 bytes, packed from the lowest bit on


def decode(ty: str, bits: np.ndarray) -> np.ndarray:
    """Elements as float64; tf32 without its 13 low bits."""
    if ty == "ue8m0":
        return np.where(bits == 255, np.nan, np.ldexp(1.0, bits.astype(np.int64) - 127))
    e, m, infinities = (FORMATS | MORE)["e2m1" if ty == "e2m1x2" else ty]
    word = bits.astype(np.int64) & (~0x1FFF if ty == "tf32" else -1)
    field, low, bias = word >> m & (1 << e) - 1, word & (1 << m) - 1, (1 << e - 1) - 1
    value = np.ldexp(np.where(field == 0, low, low + (1 << m)).astype(np.float64), np.maximum(field, 1) - bias - m)
    if infinities:
        value = np.where(field == (1 << e) - 1, np.where(low == 0, np.inf, np.nan), value)
    elif ty.endswith("e4m3"):
        value = np.where(word & 0x7F == 0x7F, np.nan, value)
    return np.where(word >> (e + m) & 1, -value, value)


def addresses(word: int, rows: int, major: int, size: int, width: int = 32) -> np.ndarray:
    """Byte offsets in the image of the elements of a matrix, [rows, k], k of `width` bytes."""
    start, leading, stride = ((word >> at & 0x3FFF) * 16 for at in (0, 16, 32))
    base, pitch = word >> 49 & 7, {0: 16, 2: 128, 4: 64, 6: 32}[word >> 61]
    r, k = np.ogrid[:rows, : width // size]
    if not major:
        x, inside = k * size, r // 8 * stride + r % 8 * pitch
        at = inside + (x if pitch > 16 else x // 16 * leading + x % 16)
    else:
        x, inside = r * size, k % 8 * pitch
        across, along = (leading, stride) if pitch > 16 else (stride, leading)
        at = inside + x // pitch * across + x % pitch + k // 8 * along
    at = at + start
    return at ^ ((at // 128 - base) % (pitch // 16)) * 16


def _unpadded(image: np.ndarray, at: np.ndarray, bits: int) -> np.ndarray:
    """Elements of so many bits, 16 to the 16 bytes of a chunk: `at` counts them as bytes."""
    first = at % 16 * bits
    low = image[at // 16 * 16 + first // 8].astype(np.int64)
    high = image[at // 16 * 16 + np.minimum(first // 8 + 1, 15)].astype(np.int64)
    return ((low | high << 8) >> first % 8 & (1 << bits) - 1).astype(np.uint8)


def elements(form: Tcgen05Form, data: dict[str, np.ndarray], team: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The bits of (A [m, k], B [n, k]) that one instruction finds; the first CTA of the team issues it."""
    p = form.product
    assert p is not None
    found = []
    ctas = range(team * p.group, (team + 1) * p.group)
    for side, (rows, major, ty) in enumerate(zip((p.m, p.n), p.majors, p.types, strict=False)):
        size, parts = size_of(ty), []
        for cta in ctas:
            if side == 0 and p.from_tmem:
                at = p.a_column + 8 * step
                mine = p.cells[0][:, 0] == cta - ctas[0]
                there = data["before"][cta][p.cells[1][mine, 0], at : at + 8]
                part = np.ascontiguousarray(there).view(f"u{size}")
                part = part >> 2 & 15 if ty == "e2m1" else part
            else:
                at = addresses(int(data["table"][ctas[0], 2 * step + side]), rows // p.group, major, size)
                image = data["image"][cta]
                part = _unpadded(image, at, PADDED[ty]) if ty in PADDED else image.view(f"u{size}")[at // size]
            parts.append(part)
        whole = np.concatenate(parts)
        if ty == "e2m1x2":
            whole = np.stack((whole & 15, whole >> 4), axis=-1).reshape(len(whole), -1)
        found.append(whole)
    return found[0], found[1]


def scales(form: Tcgen05Form, data: dict[str, np.ndarray], team: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale factors of (A [m, k], B [n, k]), each as often as it is used; ones without block scales."""
    p = form.product
    assert p is not None
    if not p.vector:
        return np.ones((p.m, p.depth)), np.ones((p.n, p.depth))
    found = []
    for side, (rows, first, id_) in enumerate(zip((p.m, p.n), (4 * step, 16 + 8 * step), p.ids, strict=True)):
        row = np.arange(rows)
        cta = lane = 0 * row
        if p.group == 2 and side == 0:  # each CTA has those of its own half
            cta, row = divmod(row, rows // 2)
        elif p.group == 2 and p.m == 128:  # and here those of half the columns of D lie beside these
            half, row = divmod(row, rows // 2)
            lane = 64 * half
        at = team * p.group + cta, lane + row % 32, p.scale_column + first + row // 32
        words = data["before"][at]
        part = np.ascontiguousarray(words).view(np.uint8).reshape(rows, 4)[:, id_ : id_ + p.vector]
        found.append(np.repeat(decode(p.scale_type, part), p.depth // p.vector, axis=1))
    return found[0], found[1]


def factors(form: Tcgen05Form, data: dict[str, np.ndarray], team: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """(A [m, k], B [n, k]) of one instruction in float64, negated where the form says so, without scales."""
    p = form.product
    assert p is not None
    a, b = (decode(ty, x) for ty, x in zip(p.types, elements(form, data, team, step), strict=False))
    return -a if p.negate[0] else a, -b if p.negate[1] else b


def moved(form: Tcgen05Form, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(registers, tensor memory afterwards) of a move, by the pictures of the ISA: quads of lanes a row."""
    shape, count, split = form.shape
    thread, r = np.ogrid[:128, :count]
    lane, quad, inside = thread % 32, thread % 32 // 4, thread % 4
    row, column = {
        "32x32b": (lane, r),
        "16x32bx2": (lane % 16, r + split * (lane // 16)),
        "16x64b": (quad + 8 * (inside % 2), 2 * r + inside // 2),
        "16x128b": (quad + 8 * (r % 2), r // 2 * 4 + inside),
        "16x256b": (quad + 8 * (r // 2 % 2), r // 4 * 8 + 2 * inside + r % 2),
    }[shape]
    registers, after = [], before.copy()
    for cta in range(form.ctas):
        half = 16 if cta & 1 and shape != "32x32b" else 0
        at = np.broadcast_arrays(cta, thread // 32 * 32 + row + half, column)
        registers.append(before[tuple(at)])
        after[tuple(at)] = ~before[tuple(at)]
    return np.stack(registers), after


def marks(form: Tcgen05Form) -> np.ndarray:
    """What the allocations of a form hold in their first and last columns, [CTAs, 128, 2 x slots]."""
    cta, thread, word = np.ogrid[: form.ctas, :128, : form.columns]
    return (word // 2 << 24 | word % 2 << 23 | cta << 8 | thread).astype(np.uint32)


def copied(form: Tcgen05Form, data: dict[str, np.ndarray]) -> np.ndarray:
    """Tensor memory after a tcgen05.cp."""
    shape, _, source = form.shape[0].partition(".b8x16.")
    rows, width = COPIES[shape]
    row = np.arange(rows)
    lanes = {
        "4x256b": [32 * row],
        "64x128b.warpx2::01_23": [row + row // 32 * 32 + i for i in (0, 32)],
    }.get(shape, [row + i for i in range(0, 128, rows)])  # fmt: skip
    after = data["before"].copy()
    for cta in range(form.ctas):
        issuer = cta // form.group * form.group
        at, image = addresses(int(data["table"][issuer, 0]), rows, 0, 1, width), data["image"][cta]
        if source:
            part = _unpadded(image, at, int(source[1]))
            part = part << 2 if source[1] == "4" else part
        else:
            part = image[at]
        for place in lanes:
            after[cta, place, : width // 4] = np.ascontiguousarray(part).view(np.uint32)
    return after
