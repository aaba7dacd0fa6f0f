"""The emulator behind the verbs of `dsv4_rt.device`: arrays are NumPy arrays, a launch has ended when it returns."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4_rt.compile import ARCHITECTURES, Artifact, kernels_dir
from dsv4_rt.device import Geometry, LoadedKernel, Parameters
from dsv4_rt.emulator import COMPLETIONS, LaunchReport, Machine, tensormap
from dsv4_rt.errors import DeviceError

CHECKS = {  # name -> field
    "global-writes": "check_global_writes",
    "uninitialised": "check_uninitialised",
    "tensor-fences": "check_tensor_fences",
}


class _Block:
    """Owner of one allocation of the arena: every NumPy view of it keeps this object, and so the allocation, alive."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


@dataclass(eq=False)
class EmulatedDevice:
    """The emulator behind the same verbs. `last_report` counts the instructions of the latest launch.

    ctas_per_sm: CTAs that run on one SM at the same time and share its tensor memory.
    check_global_writes, check_uninitialised, check_tensor_fences: the checks that a Machine has on request.
    completion: when asynchronous operations run, as a Machine takes it: "early", "late" or "random" (seeded).
    copies_in_order: as a Machine takes it.
    """

    arch: str = "sm_100a"
    order: str = "min-pc"
    seed: int = 0
    ctas_per_sm: int = 1
    check_global_writes: bool = False
    check_uninitialised: bool = False
    check_tensor_fences: bool = False
    completion: str = "early"
    copies_in_order: bool = False
    kind: str = field(default="emulator", init=False)
    index: int = field(default=0, init=False)
    max_shared: int = field(default=227 * 1024, init=False)
    sm_count: int = field(init=False)
    last_report: LaunchReport | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise DeviceError(f"the emulator runs {', '.join(ARCHITECTURES)}, not {self.arch!r}")
        self.sm_count = 132 if self.arch == "sm_90a" else 148  # H200; B200: so that grids are sized as there
        # The PTX names sources as "kernels/router/x.cu": a report quotes the line where the tree is found.
        self.machine = Machine(
            self.arch,
            order=self.order,
            seed=self.seed,
            ctas_per_sm=self.ctas_per_sm,
            source_roots=_source_roots(),
            check_global_writes=self.check_global_writes,
            check_uninitialised=self.check_uninitialised,
            check_tensor_fences=self.check_tensor_fences,
            completion=self.completion,
            copies_in_order=self.copies_in_order,
        )
        self._modules: dict[str, Any] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"EmulatedDevice({self.arch})"

    @property
    def name(self) -> str:
        return f"emulated {self.arch}"

    def load(self, artifact: Artifact, name: str) -> LoadedKernel:
        if artifact.arch != self.arch:
            raise DeviceError(f"{name} was compiled for {artifact.arch}; this is {self!r}")
        with self._lock:
            module = self._modules.get(artifact.key)
            if module is None:
                module = self._modules[artifact.key] = self.machine.load(artifact.ptx, artifact.source)
        return LoadedKernel(name, artifact.kernels[name], module)

    def bind(self, kernel: LoadedKernel, geometry: Geometry, params: Parameters) -> Callable[[int], None]:
        memory = self.machine.memory
        entry = kernel.handle.entries[kernel.info.lowered]
        # The PTX has the parameters where C puts them, the cubin may not: see cubin.Param.
        moves = [
            (offset, param.offset, size) for (offset, size), param in zip(entry.params, kernel.info.params, strict=True)
        ]

        def placed() -> bytes:
            if all(to == at for to, at, _ in moves):
                return bytes(params.buffer[: params.size])
            found = bytearray(entry.param_bytes)
            for to, at, size in moves:
                found[to : to + size] = params.buffer[at : at + size]
            return bytes(found)

        def launch(stream: int) -> None:
            with self._lock:
                tokens = []
                try:
                    for r in (*params.regions.values(), *params.mapped):
                        tokens.append(memory.register(r.address, r.nbytes, label=r.label, writable=r.writable))
                    self.last_report = self.machine.launch(
                        kernel.handle,
                        kernel.info.lowered,
                        geometry.grid,
                        geometry.block,
                        placed(),
                        dynamic_shared=geometry.shared,
                        cluster=geometry.cluster or kernel.info.cluster,
                        cooperative=geometry.cooperative,
                    )
                finally:
                    for token in tokens:
                        memory.unregister(token)

        return launch

    def encode_tensor_map(self, fields: dict[str, Any]) -> bytes:
        return tensormap.encode(fields)

    def tensor_map_encoder(self, fields: dict[str, Any]) -> Callable[[int], bytes]:
        return lambda address: tensormap.encode(fields | {"address": address})

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        """An uninitialised NumPy array in the arena: poisoned, between red zones, freed with its last view."""
        dtype = np.dtype(dtype)
        dims = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
        if nbytes == 0:
            return np.empty(dims, dtype)
        memory = self.machine.memory
        block = _Block(memory.alloc(nbytes, label=f"{dtype.name}{list(dims)}"), nbytes)
        weakref.finalize(block, memory.free, block.address)
        return np.asarray(block).view(dtype).reshape(dims)

    def array(self, host: Any) -> Any:
        host = np.asarray(host)
        out = self.empty(host.shape, host.dtype)
        out[...] = host
        if out.size:
            self.machine.memory.mark_written(out.ctypes.data, out.nbytes)
        return out

    def numpy(self, array: Any) -> np.ndarray[Any, Any]:
        return np.array(array)

    def current_stream(self) -> int:
        return 0

    def synchronize(self) -> None:
        return


def checks_from_environment() -> dict[str, Any]:
    """Fields of an EmulatedDevice: the checks that DSV4_RT_EMULATOR_CHECKS asks for, "global-writes,uninitialised", and
    the completion schedule that DSV4_RT_EMULATOR_COMPLETION names."""
    names = [name.strip() for name in os.environ.get("DSV4_RT_EMULATOR_CHECKS", "").split(",") if name.strip()]
    for name in names:
        if name not in CHECKS:
            raise DeviceError(f"DSV4_RT_EMULATOR_CHECKS: {name!r} is none of {', '.join(CHECKS)}")
    completion = os.environ.get("DSV4_RT_EMULATOR_COMPLETION", "") or "early"
    if completion not in COMPLETIONS:
        raise DeviceError(f"DSV4_RT_EMULATOR_COMPLETION: {completion!r} is none of {', '.join(COMPLETIONS)}")
    chosen = {} if completion == "early" else {"completion": completion}
    return chosen | {CHECKS[name]: True for name in names}


def _source_roots() -> tuple[str, ...]:
    return (str(kernels_dir().parent),)
