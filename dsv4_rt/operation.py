"""The road from a public launcher to its kernel, paved once for every operation.

A launcher hands its arrays and settings to an `Operation`. The first call of a kind runs the launcher's plan: full
checks, choice of the kernel, geometry, a prepared launch. A later call whose arguments agree in everything a plan may
depend on (settings, framework, device, dtype, shape, strides, alignment) only compares memory ranges, writes pointers
and launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dsv4_rt.arrays import FACTS, Framework, View, device_holding, framework, stream_handle
from dsv4_rt.checks import overlap
from dsv4_rt.compile import ARCHITECTURES
from dsv4_rt.device import Device, device
from dsv4_rt.errors import ArgumentError

# Plans kept per operation; an engine that varies N from 1 to max_num_tokens stays below it. Past it, start again.
MAX_PLANS = 8192


# Modules of dsv4_rt that have launchers and a table INSTANCES.
OPS = ("router.ops", "router.dense", "router.hash_gate", "memory.ops", "kv.ops", "linear.ops")


@dataclass(frozen=True)
class Instance:
    """One instantiation of a kernel that a launcher may choose: compiled by `warmup`, budgeted by the build test."""

    source: str  # path below the kernels directory
    name: str  # name expression
    registers: int  # budget a thread; the build test fails above it
    architectures: tuple[str, ...] = ARCHITECTURES  # it has code for


def instances() -> tuple[Instance, ...]:
    """Every instance of every family's tuning tables."""
    return tuple(i for module in OPS for i in importlib.import_module(f"dsv4_rt.{module}").INSTANCES)


@dataclass(frozen=True)
class Call:
    """One call as a plan function sees it: where it runs, what its arrays look like, and the launcher's settings."""

    device: Device
    inputs: tuple[View | None, ...]
    outputs: tuple[View, ...] | None  # None: the operation allocates them, contiguous
    settings: tuple[Any, ...]


class Launch(Protocol):
    """What a plan leaves to do: `dsv4_rt.launch.Prepared`, or several of its kind behind one another."""

    def launch(self, pointers: Sequence[int], stream: int = 0, views: Sequence[View] = ()) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a plan function answers: shapes and dtypes of the results, and the launch, None if there is nothing to do.

    The POINTER arguments of `ready` stand for the arrays that were given, inputs before outputs.
    """

    results: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    ready: Launch | None


@dataclass(slots=True)
class _Known:
    """A plan, and what the fast path needs beside it."""

    plan: Plan
    device: Device
    emulated: bool
    home: Framework  # of the first array: stream and kind of the results
    apart: tuple[tuple[int, int, int, int], ...]  # (output, other, bytes of output, bytes of other) must not overlap
    seen: list[int]  # the addresses last found apart


class Operation:
    """One operation: its name, its array arguments, and the function that plans a call."""

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        plan: Callable[[Call], Plan],
        optional: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._inputs = tuple(inputs)
        self._optional = frozenset(optional)  # inputs that may be None
        self._outputs = tuple(outputs)
        self._plan = plan
        self._known: dict[Hashable, _Known] = {}

    def __call__(
        self, inputs: tuple[Any, ...], out: Sequence[Any] | None, settings: tuple[Hashable, ...], stream: Any
    ) -> tuple[Any, ...]:
        """Run the operation; returns the outputs, in the first input's kind unless given."""
        try:
            given = inputs if out is None else (*inputs, *out)
            found = [FACTS[type(x)](x) for x in given]
        except Exception:  # a type not seen before, or no array at all
            given = self._readable(inputs, out)
            found = [(None, None) if x is None else framework(x).facts(x) for x in given]
        pointers = [pointer for pointer, _ in found if pointer is not None]
        key: Hashable = (device(), settings, out is None, *[facts for _, facts in found])  # type: ignore[arg-type]
        try:
            known = self._known.get(key)
        except TypeError as error:
            raise ArgumentError(f"{self.name}: {error} among the settings {settings!r}") from error
        if known is None:
            known = self._learn(key, inputs, out, settings)

        results: Sequence[Any]
        if out is None:
            results = [known.home.empty(shape, dtype, known.device) for shape, dtype in known.plan.results]
            pointers += [framework(x).facts(x)[0] for x in results]
            given = (*inputs, *results)
        else:
            results = out
            if pointers != known.seen:
                for i, j, size_i, size_j in known.apart:
                    if pointers[i] < pointers[j] + size_j and pointers[j] < pointers[i] + size_i:
                        present = [n for n, x in zip(self._inputs + self._outputs, given, strict=True) if x is not None]
                        raise overlap(self.name, present, i, j)
                known.seen = pointers
        ready = known.plan.ready
        if ready is not None:
            handle = stream_handle(stream) if stream is not None else 0
            if known.emulated:
                ready.launch(pointers, handle, [framework(x).view(x) for x in given if x is not None])
            elif stream is None:
                ready.launch(pointers, known.home.stream(known.device.index))
            else:
                ready.launch(pointers, handle)
        if out is None:
            return tuple(known.home.wrap(x) for x in results)
        return out if type(out) is tuple else tuple(out)

    def _readable(self, inputs: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
        """All arguments, once each has shown that it can be read; the error of the first that cannot."""
        if out is not None and not isinstance(out, tuple | list):
            raise ArgumentError(f"{self.name}: out is a {type(out).__name__}; give ({', '.join(self._outputs)})")
        given = (*inputs, *(out or ()))
        for x in given:
            if x is not None:
                framework(x).view(x)
        return given

    def _learn(
        self, key: Hashable, inputs: tuple[Any, ...], out: Sequence[Any] | None, settings: tuple[Any, ...]
    ) -> _Known:
        """Check a call of a new kind completely and remember its plan."""
        for name, x in zip(self._inputs, inputs, strict=True):
            if x is None and name not in self._optional:
                raise ArgumentError(f"{self.name}: {name} is None, an array is needed")
        if out is not None and (len(out) != len(self._outputs) or any(x is None for x in out)):
            raise ArgumentError(f"{self.name}: out has {len(out)} arrays or a None; give ({', '.join(self._outputs)})")
        views = tuple(None if x is None else framework(x).view(x) for x in inputs)
        targets = None if out is None else tuple(framework(x).view(x) for x in out)
        first = next(v for v in views if v is not None)
        on = device_holding(first, f"{self.name}: {self._inputs[0]}")
        plan = self._plan(Call(on, views, targets, settings))
        present = [v for v in (*views, *(targets or ())) if v is not None]
        start = len(present) - len(targets or ())
        apart = tuple(
            (i, j, present[i].span, present[j].span)
            for i in range(start, len(present))
            for j in range(i)
            if present[i].span and present[j].span
        )
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
        home = framework(next(x for x in inputs if x is not None))
        known = self._known[key] = _Known(plan, on, on.kind == "emulator", home, apart, [])
        return known
