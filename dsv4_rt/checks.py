"""Argument checks: one call compares every array with the shape, dtype and layout a docstring states.

    N, E = match("activation_topk", logits=Arg(v, "N E", F32, rows=True), e_bias=Arg(b, "E", F32)).values()

A mismatch is one ArgumentError that shows every argument and marks the wrong one:

    ArgumentError: activation_topk: e_bias does not fit
         logits  [N, E]  float32  (64, 256)
      >  e_bias  [E]     float32  (255,)      axis 0 (E) must be 256
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_rt.arrays import View
from dsv4_rt.errors import ArgumentError

Dtype = np.dtype[Any]


@dataclass(frozen=True)
class Arg:
    """An array and what it must look like."""

    view: View
    axes: str  # one word an axis: a letter is a size, "K/128" a size divided, "64" a constant
    dtype: Dtype | tuple[Dtype, ...]
    rows: bool = False  # rows may be strided: only the last axis must be contiguous
    align: int = 0  # bytes; the element's own size if 0
    output: bool = False


def match(operation: str, /, **args: Arg) -> dict[str, int]:
    """The size behind every letter of the patterns, in order of appearance.

    Raises:
        ArgumentError: an argument has another rank, size, dtype, layout, alignment or device than its pattern says.
    """
    sizes: dict[str, int] = {}
    first = next(iter(args.values())).view
    for name, arg in args.items():
        complaint = _complaint(arg, sizes, first)
        if complaint:
            raise ArgumentError(f"{operation}: {name} does not fit\n{_table(args, name, complaint)}")
    return sizes


def _complaint(arg: Arg, sizes: dict[str, int], first: View) -> str:
    """What is wrong with one argument, or ''. Letters seen for the first time are added to `sizes`."""
    view, axes = arg.view, arg.axes.split()
    wanted = arg.dtype if isinstance(arg.dtype, tuple) else (arg.dtype,)
    if view.dtype not in wanted:
        if view.dtype.newbyteorder() in wanted:
            return f"byte order is not this machine's; use .astype({view.dtype.newbyteorder().name!r})"
        return f"dtype must be {' or '.join(d.name for d in wanted)}"
    if len(view.shape) != len(axes):
        return f"must have {len(axes)} {'axis' if len(axes) == 1 else 'axes'}"
    for i, (axis, n) in enumerate(zip(axes, view.shape, strict=True)):
        letter, _, divisor = axis.partition("/")
        if letter.isdecimal():
            want = int(letter)
        elif letter not in sizes and not divisor:
            want = sizes[letter] = n
        else:
            want = sizes[letter] // int(divisor or 1)
        if n != want:
            return f"axis {i} ({axis}) must be {want}"
    if (view.device, view.index) != (first.device, first.index):
        return f"is on {view.on}, the first argument on {first.on}"
    return _layout_complaint(arg)


def _layout_complaint(arg: Arg) -> str:
    view = arg.view
    if view.span == 0:
        return ""
    expected = 1
    for i in reversed(range(len(view.shape))):
        n, stride = view.shape[i], view.strides[i]
        if n > 1 and stride != expected:
            if not arg.rows:
                return f"must be contiguous, has strides {view.strides}; copy it first"
            if i == len(view.shape) - 1:
                return f"last axis must be contiguous, has stride {stride}"
            if stride < (expected if arg.output else 0):
                rule = "rows of an output must not overlap" if arg.output else "it must not be negative"
                return f"axis {i} has stride {stride}; {rule}"
            expected = stride
        expected *= n
    align = arg.align or view.dtype.itemsize
    if view.ptr % align:
        return f"address {view.ptr:#x} must be a multiple of {align} B"
    if arg.output and not view.writable:
        return "is read-only, an output must be writable"
    return ""


def _table(args: dict[str, Arg], wrong: str, complaint: str) -> str:
    rows = [
        (
            "  >  " if name == wrong else "     ",
            name,
            f"[{', '.join(arg.axes.split())}]",
            arg.view.dtype.name,
            str(arg.view.shape),
            complaint if name == wrong else "",
        )
        for name, arg in args.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(1, 5)]
    return "\n".join(
        (row[0] + "  ".join(cell.ljust(w) for cell, w in zip(row[1:5], widths, strict=True)) + "    " + row[5]).rstrip()
        for row in rows
    )


def check_range(operation: str, name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int within [low, high], or an ArgumentError. A bool or a float with a fraction is refused."""
    try:
        number = value.__index__()
    except AttributeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ArgumentError(f"{operation}: {name} = {value!r} must be an integer from {low} to {high}")
    return int(number)


def check_scale(operation: str, name: str, value: Any) -> float:
    """`value` as a float that is finite in float32, or an ArgumentError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            raise ArgumentError(f"{operation}: {name} = {value!r} must be a finite float32")
    return number


def overlap(operation: str, names: Iterable[str], i: int, j: int) -> ArgumentError:
    """The error for an output whose memory another argument also uses."""
    listed = list(names)
    return ArgumentError(
        f"{operation}: output {listed[i]} overlaps {listed[j]} in memory; an output needs an address range of its own"
    )
