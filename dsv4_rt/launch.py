"""Artefact -> module -> kernel -> launch. Knows no operation.

    kernel = load("router/activation_topk.cu", "activation_topk<6, 8>", device)
    kernel.launch((64,), (128,), logits, bias, weights, ids, np.int32(64), ...)      # checked, any framework's arrays
    ready = kernel.prepare((64,), (128,), POINTER, POINTER, POINTER, POINTER, np.int32(64), ...)
    ready.launch(pointers, stream)                                                    # writes pointers, launches
    ready(stream)                                                                     # launches as it stands

Argument count and widths, block, grid, cluster and shared memory are checked against the cubin's own record before a
launch, on any machine. A launch goes to the caller's stream, never synchronises, and is legal in CUDA-graph capture.
"""

from __future__ import annotations

import operator
import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Final

import numpy as np

from dsv4_rt.arrays import View, framework, stream_handle, view
from dsv4_rt.compile import compile
from dsv4_rt.device import Device, Geometry, LoadedKernel, Parameters, Region, device
from dsv4_rt.errors import ArgumentError, LaunchError
from dsv4_rt.tensor_map import TensorMap, TensorMapAt


class _Pointer:
    def __repr__(self) -> str:
        return "POINTER"


POINTER: Final = _Pointer()  # an argument of `prepare`: an address that `Prepared.launch` writes
_BY_VALUE = (np.generic, bytes, bytearray, TensorMap, int, float)  # `prepare` refuses int and float: of unknown width
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_CLUSTER = 16  # blocks; more than 8 is not portable but what H200 and B200 can do


def load(source: str, name: str, on: Device | None = None, **defines: str | int | None) -> Kernel:
    """Compile (or find in the cache) one kernel of a source file and load it on a device.

    Args:
        source: path below the kernels directory, or an absolute path.
        name: the kernel's name expression, "activation_topk<6, 8>"; extern "C" kernels by plain name.
        on: the device; the current one if None.
        defines: preprocessor macros.

    Raises:
        CompileError: the source does not compile, or has no such kernel.
        DeviceError: the device cannot run it.
    """
    on = on or device()
    artifact = compile(source, on.arch, (name,), defines or None)
    return Kernel(on, on.load(artifact, name))


class Kernel:
    """A kernel on a device, ready to launch."""

    def __init__(self, on: Device, loaded: LoadedKernel) -> None:
        self.device = on
        self.loaded = loaded
        self.name = loaded.name
        self.info = loaded.info

    def __repr__(self) -> str:
        return f"Kernel({self.name} on {self.device!r})"

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *args: Any,
        shared: int = 0,
        cluster: Sequence[int] | None = None,
        cooperative: bool = False,
        pdl: bool = False,
        stream: Any = None,
    ) -> None:
        """Check everything and launch once.

        Args:
            grid, block: blocks and threads a block, 1 to 3 numbers each.
            args: arrays of any framework, NumPy scalars (np.int32(n): the width counts), `bytes` for structs by value,
                a TensorMap for a `const __grid_constant__` struct of 128 bytes aligned to 64.
            shared: dynamic shared memory, bytes.
            cluster: blocks a cluster; must divide the grid.
            cooperative: all blocks resident at once, grid-wide synchronisation allowed.
            pdl: programmatic dependent launch; refused for a kernel that never executes griddepcontrol.wait.
            stream: int, `__cuda_stream__` object or torch stream; if None, the first array's library's current one.

        Raises:
            ArgumentError, LaunchError: an argument or the geometry does not fit the kernel; nothing was launched.
        """
        arrays = [a for a in args if not isinstance(a, _BY_VALUE)]
        plain = [a if isinstance(a, _BY_VALUE) else POINTER for a in args]
        ready = self.prepare(grid, block, *plain, shared=shared, cluster=cluster, cooperative=cooperative, pdl=pdl)
        views = [view(a) for a in arrays]
        for i, v in enumerate(views):
            if not v.dtype.isnative:
                raise ArgumentError(f"{self.name}: array {i} is {v.dtype.str}; its byte order is not this machine's")
            if (v.device == "cuda") != (self.device.kind == "cuda") or v.index != self.device.index:
                raise ArgumentError(f"{self.name}: array {i} is on {v.on}, the kernel on {self.device!r}")
        if stream is not None:
            handle = stream_handle(stream)
        elif arrays and self.device.kind == "cuda":
            handle = framework(arrays[0]).stream(self.device.index)
        else:
            handle = self.device.current_stream()
        ready.launch([v.ptr for v in views], handle, views)

    def prepare(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *args: Any,
        shared: int = 0,
        cluster: Sequence[int] | None = None,
        cooperative: bool = False,
        pdl: bool = False,
    ) -> Prepared:
        """Check and build a launch once; a later call only writes pointers. Arguments as for `launch`, or POINTER, or
        a TensorMapAt: a pointer too, whose address the kernel gets in a tensor map."""
        geometry = Geometry(
            _three(grid), _three(block), shared, _three(cluster) if cluster is not None else None, cooperative, pdl
        )
        self._check_geometry(geometry)
        return Prepared(self, geometry, args)

    def _check_geometry(self, g: Geometry) -> None:
        info = self.info
        threads = g.block[0] * g.block[1] * g.block[2]

        def refuse(why: str) -> None:
            raise LaunchError(f"{self.name}: {why}\n  {g}; the kernel uses {info.registers} registers")

        if min(g.grid + g.block) < 1 or any(n > limit for n, limit in zip(g.grid, MAX_GRID, strict=True)):
            refuse(f"every grid dimension must be 1 to {MAX_GRID}")
        if threads > info.max_threads:
            refuse(f"{threads} threads a block; the kernel allows at most {info.max_threads}")
        if g.block[2] > 64:
            refuse("the third dimension of a block must be at most 64")
        if g.shared < 0 or info.shared_bytes + g.shared > self.device.max_shared:
            refuse(
                f"{info.shared_bytes} B static and {g.shared} B dynamic shared memory; "
                f"{self.device.name} gives a block {self.device.max_shared} B"
            )
        cluster = g.cluster or info.cluster
        if cluster:
            if g.cluster and info.cluster and g.cluster != info.cluster:
                refuse(f"the kernel was compiled for clusters of {info.cluster}")
            if min(cluster) < 1 or cluster[0] * cluster[1] * cluster[2] > MAX_CLUSTER:
                refuse(f"a cluster has 1 to {MAX_CLUSTER} blocks")
            if any(n % c for n, c in zip(g.grid, cluster, strict=True)):
                refuse(f"clusters of {cluster} do not divide the grid")
        if g.pdl and not info.waits_for_dependency:
            refuse("programmatic dependent launch of a kernel without griddepcontrol.wait is a race")


class Prepared:
    """A launch whose configuration and argument buffer are built. Safe to share between threads."""

    def __init__(self, kernel: Kernel, geometry: Geometry, args: Sequence[Any]) -> None:
        info = kernel.info
        if len(args) != len(info.params):
            raise LaunchError(f"{kernel.name}: {len(args)} arguments given, the kernel has {len(info.params)}")
        self.kernel = kernel
        self.geometry = geometry
        self._params = params = Parameters(info)
        self._lock = threading.Lock()
        self._pointer_params = []
        self._maps: list[TensorMap] = []  # which keep their arrays alive
        mapped = []  # (which pointer, where in the buffer, the map)
        for i, (arg, param) in enumerate(zip(args, info.params, strict=True)):
            if arg is POINTER:
                data = bytes(8)
                self._pointer_params.append(i)
            elif isinstance(arg, TensorMapAt):
                data = bytes(128)
                mapped.append((len(self._pointer_params), param.offset, arg))
                self._pointer_params.append(i)
            elif isinstance(arg, np.generic):
                data = arg.tobytes()
            elif isinstance(arg, bytes | bytearray):
                data = bytes(arg)
            elif isinstance(arg, TensorMap):
                data = arg.encode(kernel.device)
                params.mapped.append(arg.region)
                self._maps.append(arg)
            else:
                raise ArgumentError(
                    f"{kernel.name}: argument {i} is a {type(arg).__name__}; its width is ambiguous, "
                    f"the kernel's parameter has {param.size} B: use np.int32(n), np.int64(n), np.float32(x) or POINTER"
                )
            if len(data) != param.size:
                what = "a pointer" if arg is POINTER else repr(arg)
                raise LaunchError(
                    f"{kernel.name}: argument {i} ({what}) has {len(data)} B, the kernel's parameter {param.size} B"
                )
            params.buffer[param.offset : param.offset + param.size] = data
        offsets = [info.params[i].offset for i in self._pointer_params]
        self._write = _mapped_writer(params, offsets, mapped, kernel.device)
        self._enqueue = kernel.device.bind(kernel.loaded, geometry, params)

    def __call__(self, stream: int = 0) -> None:
        """Launch with the arguments as they stand."""
        self._lock.acquire()
        try:
            self._enqueue(stream)
        finally:
            self._lock.release()

    def launch(self, pointers: Sequence[int], stream: int = 0, views: Sequence[View] = ()) -> None:
        """Write every POINTER argument, in order, and launch.

        Args:
            pointers: device addresses, one for each POINTER.
            stream: CUstream handle.
            views: on the emulator, what lies behind each pointer; not needed for arrays the device itself allocated.
        """
        # The driver reads the buffer with the interpreter lock released: no other thread may write meanwhile.
        self._lock.acquire()  # a with block costs twice as much
        try:
            try:
                self._write(*pointers)
            except ArgumentError:  # of a map: the address does not suit it
                raise
            except (TypeError, ValueError, struct.error) as error:
                wanted = len(self._pointer_params)
                raise LaunchError(f"{self.kernel.name}: {wanted} pointers are wanted, {pointers!r} given") from error
            if views or self._params.regions:
                self._params.regions = {
                    i: Region(v.first_byte, v.span, f"argument {i}", v.writable)
                    for i, v in zip(self._pointer_params, views, strict=False)
                    if v.span
                }
            self._enqueue(stream)
        finally:
            self._lock.release()


def _pointer_writer(params: Parameters, offsets: Sequence[int]) -> Callable[..., None]:
    """A function that writes as many addresses as there are offsets; one C call where they are neighbours."""
    if all(b - a == 8 for a, b in pairwise(offsets)):
        return partial(struct.Struct(f"{len(offsets)}Q").pack_into, params.buffer, offsets[0] if offsets else 0)
    each = [struct.Struct("Q").pack_into] * len(offsets)

    def write(*pointers: int) -> None:
        for pack, offset, pointer in zip(each, offsets, pointers, strict=True):
            pack(params.buffer, offset, pointer)

    return write


def _mapped_writer(
    params: Parameters, offsets: Sequence[int], mapped: Sequence[tuple[int, int, TensorMapAt]], on: Device
) -> Callable[..., None]:
    """The same where some of the addresses go into tensor maps."""
    if not mapped:
        return _pointer_writer(params, offsets)
    plain = [i for i in range(len(offsets)) if all(i != which for which, _, _ in mapped)]
    write_plain = _pointer_writer(params, [offsets[i] for i in plain])
    buffer, maps = params.buffer, [(which, at, form.encoder(on)) for which, at, form in mapped]

    def write(*pointers: int) -> None:
        if len(pointers) != len(offsets):
            raise ValueError("as many addresses as pointers")
        for which, at, encoded in maps:
            buffer[at : at + 128] = encoded(pointers[which])
        write_plain(*[pointers[i] for i in plain])

    return write


def _three(dims: int | Sequence[int]) -> tuple[int, int, int]:
    given = tuple(dims) if isinstance(dims, Sequence) else (dims,)
    if not 1 <= len(given) <= 3:
        raise ArgumentError(f"{dims!r}: grid, block and cluster have 1 to 3 dimensions")
    try:
        x, y, z = (operator.index(n) for n in (*given, 1, 1)[:3])
    except TypeError as error:
        raise ArgumentError(f"{dims!r}: the dimensions of grid, block and cluster are integers") from error
    return x, y, z
