"""A GPU behind the verbs of `dsv4_rt.device`, through the driver API of cuda-bindings.

Errors of the driver carry name, meaning and usual cause; after one that kills the context, every later call says so and
names the kernel, or the last few if several ran since the device was last known to be well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dsv4_rt.compile import ARCHITECTURES, Artifact
from dsv4_rt.device import Geometry, LoadedKernel, Parameters
from dsv4_rt.errors import DeviceError, LaunchError

CAPABILITIES = {(9, 0): "sm_90a", (10, 0): "sm_100a", (10, 3): "sm_103a"}

# What usually lies behind an error of the driver; the driver itself gives name and meaning.
USUAL_CAUSES = {
    "CUDA_ERROR_INVALID_VALUE": "a grid, block, cluster or shared-memory size the device does not allow",
    "CUDA_ERROR_INVALID_CONTEXT": "another library destroyed or reset the primary context",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the cubin is for another architecture than this GPU",
    "CUDA_ERROR_OUT_OF_MEMORY": "device memory is full; see nvidia-smi",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "more threads than __launch_bounds__, or too many registers for the block",
    "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE": "a cooperative grid must be resident at once: use fewer blocks",
    "CUDA_ERROR_INVALID_CLUSTER_SIZE": "more than 8 blocks a cluster, or a grid the cluster does not divide",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an index out of bounds, or an array freed while the kernel still ran",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "a vector access through a pointer that is not aligned to the whole vector",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "a trap in the kernel, or an instruction used against its rules",
    "CUDA_ERROR_ASSERT": "a device-side assertion failed",
    "CUDA_ERROR_LAUNCH_FAILED": "an access to a shared or local address out of range, or a bad barrier",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the kernel ran longer than the display watchdog allows",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "a call that may not be captured; launch once before the capture begins",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "an earlier illegal call spoilt the capture of this stream",
}
# Element types of tensor maps, by their names in PTX.
TENSOR_MAP_TYPES = {
    "u8": "UINT8", "u16": "UINT16", "u32": "UINT32", "s32": "INT32", "u64": "UINT64", "s64": "INT64", "f16": "FLOAT16",
    "f32": "FLOAT32", "f64": "FLOAT64", "bf16": "BFLOAT16", "tf32": "TFLOAT32", "u4x16": "16U4_ALIGN8B",
    "u4x16_p64": "16U4_ALIGN16B", "u6x16_p32": "16U6_ALIGN16B",
}  # fmt: skip
# Errors after which every call in this process fails: the context is gone.
CONTEXT_KILLERS = frozenset({214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721})


@functools.cache
def _driver() -> Any:
    """cuda.bindings.driver, initialised. Raises DeviceError where there is no driver or no GPU."""
    try:
        from cuda.bindings import driver

        (status,) = driver.cuInit(0)
    except Exception as error:  # no libcuda: cuda.pathfinder raises its own exception types
        raise DeviceError(f"no CUDA driver on this machine ({type(error).__name__})") from error
    if int(status) != 0:
        raise DeviceError(f"the CUDA driver does not start: {_driver_error(driver, status)[0]}")
    return driver


def _driver_error(driver: Any, status: Any) -> tuple[str, str]:
    """(name, 'NAME (code): meaning; usual cause: ...')"""
    _, name = driver.cuGetErrorName(status)
    _, text = driver.cuGetErrorString(status)
    short = name.decode() if name else "CUDA_ERROR_UNKNOWN"
    message = f"{short} ({int(status)}): {text.decode() if text else 'no text'}"
    cause = USUAL_CAUSES.get(short)
    return short, message + (f"\n  usual cause: {cause}" if cause else "")


@functools.cache
def cuda_device_count() -> int:
    """CUDA devices the driver shows; 0 without a driver."""
    try:
        driver = _driver()
    except DeviceError:
        return 0
    status, count = driver.cuDeviceGetCount()
    return int(count) if int(status) == 0 else 0


class _Graph:
    """An executable graph that is destroyed with this object; the driver lets a launch under way finish."""

    def __init__(self, cu: Any, executable: Any) -> None:
        self._cu, self.executable = cu, executable

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the interpreter's end the driver may be gone
            self._cu.cuGraphExecDestroy(self.executable)


class CudaDevice:
    """One GPU, through its primary context, which CuPy and PyTorch share."""

    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        self._cu = driver = _driver()
        count = cuda_device_count()
        if not 0 <= index < count:
            raise DeviceError(f"cuda:{index} does not exist: the driver shows {count} CUDA device(s)")
        self.index = index
        self._killed: str | None = None
        self._since_sync: deque[tuple[str, Geometry]] = deque(maxlen=8)
        self._libraries: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._sync_each = os.environ.get("DSV4_RT_SYNC", "0") not in ("", "0")
        self._several = count > 1
        self._recording: Any = None  # a stream of our own to capture on
        self._streams: dict[int, Any] = {}
        self._not_capturing = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        self._ok = driver.CUresult.CUDA_SUCCESS
        self._device = self._call(driver.cuDeviceGet(index))
        self._name = self._call(driver.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        attr = driver.CUdevice_attribute
        major = self.attribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = self.attribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        if (major, minor) not in CAPABILITIES:
            raise DeviceError(
                f"cuda:{index} is {self._name}, compute capability {major}.{minor}; kernels exist for "
                f"{', '.join(ARCHITECTURES)} (9.0, 10.0, 10.3). DSV4_RT_DEVICE=emulator runs them without a GPU"
            )
        self.arch = CAPABILITIES[major, minor]
        self._max_shared = self.attribute(attr.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
        self._sm_count = self.attribute(attr.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self._context = self._call(driver.cuDevicePrimaryCtxRetain(self._device))
        self._call(driver.cuCtxSetCurrent(self._context))

    def __repr__(self) -> str:
        return f"CudaDevice({self.index}: {self._name}, {self.arch})"

    @property
    def name(self) -> str:
        return str(self._name)

    @property
    def max_shared(self) -> int:
        return self._max_shared

    @property
    def sm_count(self) -> int:
        return self._sm_count

    def attribute(self, which: Any) -> int:
        return int(self._call(self._cu.cuDeviceGetAttribute(which, self._device)))

    def _call(self, result: tuple[Any, ...], what: str = "") -> Any:
        """The value of a driver call, or its error, which says what it was for."""
        if result[0] != self._ok:
            self._fail(result[0], what)
        return result[1] if len(result) == 2 else None

    def _fail(self, status: Any, what: str) -> None:
        """Raise for a driver error; remember a killed context and who killed it."""
        if self._killed:
            raise DeviceError(self._killed)
        _, text = _driver_error(self._cu, status)
        if int(status) not in CONTEXT_KILLERS:
            raise LaunchError(f"{what}: {text}" if what else text)
        recent = list(self._since_sync)
        if len(recent) == 1 or (self._sync_each and recent):
            name, geometry = recent[-1]
            blame = f"killed by {name}\n  {geometry}"
        elif recent:
            lines = "\n".join(f"    {name}  {geometry}" for name, geometry in recent)
            blame = f"killed by one of the last launches (DSV4_RT_SYNC=1 names the one):\n{lines}"
        else:
            blame = "killed by work that this package did not launch"
        self._killed = f"the context of cuda:{self.index} is dead, restart the process\n  {text}\n  {blame}"
        raise DeviceError(self._killed)

    def load(self, artifact: Artifact, name: str) -> LoadedKernel:
        if artifact.arch != self.arch:
            raise DeviceError(f"{name} was compiled for {artifact.arch}; {self!r} runs {self.arch}")
        if self._killed:
            raise DeviceError(self._killed)
        info = artifact.kernels[name]
        cu = self._cu
        with self._lock, self._current():
            library = self._libraries.get(artifact.key)
            if library is None:
                library = self._call(cu.cuLibraryLoadData(artifact.cubin, [], [], 0, [], [], 0), f"loading {name}")
                self._libraries[artifact.key] = library
            handle = self._call(cu.cuLibraryGetKernel(library, info.lowered.encode()), f"loading {name}")
            # Loads the code now: a first launch inside a stream capture must not.
            self._call(cu.cuKernelGetFunction(handle), f"loading {name}")
        return LoadedKernel(name, info, handle)

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """This device's context, current for a while."""
        self._call(self._cu.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._cu.cuCtxPopCurrent()

    def bind(self, kernel: LoadedKernel, geometry: Geometry, params: Parameters) -> Callable[[int], None]:
        cu = self._cu
        what = f"{kernel.name}: {geometry}; the kernel uses {kernel.info.registers} registers"
        if kernel.info.shared_bytes + geometry.shared > 48 * 1024:
            # The attribute is the kernel's, not this launch's: all there is, or another launch would lose its own.
            which = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            most = self._max_shared - kernel.info.shared_bytes
            self._call(cu.cuKernelSetAttribute(which, most, kernel.handle, self._device), what)
        x, y, z = geometry.cluster or kernel.info.cluster or (1, 1, 1)
        if x * y * z > 8:
            which = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            self._call(cu.cuKernelSetAttribute(which, 1, kernel.handle, self._device), what)
        configs: dict[int, Any] = {}  # one config a stream: setting hStream costs more than finding it
        enqueue, handle, slots = cu.cuLaunchKernelEx, kernel.handle, params.slots_address
        ok, remember, entry = self._ok, self._since_sync.append, (kernel.name, geometry)
        several, sync_each = self._several, self._sync_each

        def launch(stream: int) -> None:
            config = configs.get(stream)
            if config is None:
                if len(configs) > 64:
                    configs.clear()
                config = configs[stream] = self._config(geometry, stream)
            if several:
                with self._current():
                    status = enqueue(config, handle, slots, 0)[0]
            else:
                status = enqueue(config, handle, slots, 0)[0]
            if status is not ok and status != ok:
                if int(status) == 201 and not self._killed:  # a new thread: no context is current in it yet
                    self._call(cu.cuCtxSetCurrent(self._context))
                    status = enqueue(config, handle, slots, 0)[0]
                if status != ok:
                    self._fail(status, what)
            remember(entry)  # only what the driver took: a launch refused for a dead context did not kill it
            if sync_each:
                self.synchronize()

        return launch

    def is_capturing(self, stream: int) -> bool:
        """Is what goes to this stream captured into a graph? True too where the driver cannot tell."""
        status, state = self._cu.cuStreamIsCapturing(self._stream(stream))
        return bool(status != self._ok or state != self._not_capturing)

    def _stream(self, handle: int) -> Any:
        """The driver's object for a stream; making one costs more than finding it."""
        found = self._streams.get(handle)
        if found is None:
            if len(self._streams) > 64:
                self._streams.clear()
            found = self._streams[handle] = self._cu.CUstream(handle)
        return found

    def record(self, run: Callable[[int], None]) -> Callable[[int], None]:
        """Capture what `run` launches on the stream it is given; a function of the stream that launches all of it.

        Does not wait for the device. The graph lives as long as the function. With DSV4_RT_SYNC=1 nothing is recorded:
        it names one kernel, not a graph.
        """
        if self._sync_each:
            return run
        cu = self._cu
        relaxed = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        with self._lock, self._current():
            if self._recording is None:
                flags = cu.CUstream_flags.CU_STREAM_NON_BLOCKING
                self._recording = self._call(cu.cuStreamCreate(flags), "a stream to record on")
            earlier = list(self._since_sync)
            self._since_sync.clear()
            # A capture that is under way elsewhere in this process must not take offence.
            mode = self._call(cu.cuThreadExchangeStreamCaptureMode(relaxed))
            try:
                self._call(cu.cuStreamBeginCapture(self._recording, relaxed), "recording")
                try:
                    run(int(self._recording))
                finally:
                    status, graph = cu.cuStreamEndCapture(self._recording)
                self._call((status,), "recording")
                executable = self._call(cu.cuGraphInstantiate(graph, 0), "recording")
                self._call(cu.cuGraphDestroy(graph), "recording")
            finally:
                cu.cuThreadExchangeStreamCaptureMode(mode)
                inside = list(self._since_sync)
                self._since_sync.clear()
                self._since_sync.extend(earlier)
        handle = _Graph(cu, executable)
        enqueue, ok, several = cu.cuGraphLaunch, self._ok, self._several
        remember = self._since_sync.extend

        def replay(stream: int) -> None:
            if several:
                with self._current():
                    status = enqueue(handle.executable, self._stream(stream))[0]
            else:
                status = enqueue(handle.executable, self._stream(stream))[0]
            if status != ok:
                if int(status) == 201 and not self._killed:  # a new thread: no context is current in it yet
                    self._call(cu.cuCtxSetCurrent(self._context))
                    status = enqueue(handle.executable, self._stream(stream))[0]
                if status != ok:
                    self._fail(status, "a recorded graph")
            remember(inside)

        return replay

    def _config(self, geometry: Geometry, stream: int) -> Any:
        cu = self._cu
        config = cu.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = geometry.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = geometry.block
        config.sharedMemBytes = geometry.shared
        config.hStream = cu.CUstream(stream)
        ids, attributes = cu.CUlaunchAttributeID, []
        if geometry.cluster:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dims = attribute.value.clusterDim
            dims.x, dims.y, dims.z = geometry.cluster
            attributes.append(attribute)
        if geometry.cooperative:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            attribute.value.cooperative = 1
            attributes.append(attribute)
        if geometry.pdl:
            attribute = cu.CUlaunchAttribute()
            attribute.id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        return config

    def encode_tensor_map(self, fields: dict[str, Any]) -> bytes:
        return self.tensor_map_encoder(fields)(fields["address"])

    def tensor_map_encoder(self, fields: dict[str, Any]) -> Callable[[int], bytes]:
        cu = self._cu

        def code(kind: str, name: str) -> Any:
            return getattr(getattr(cu, f"CUtensorMap{kind}"), f"CU_TENSOR_MAP_{name}")

        strides = fields["strides"] or (16,)  # of one axis nobody reads them, but a null pointer is refused
        sizes = [[cu.cuuint64_t(n) for n in each] for each in (fields["shape"], strides)]
        sizes += [[cu.cuuint32_t(n) for n in fields[name]] for name in ("box", "element_strides")]
        fill = "NONE" if fields["oob_fill"] == "zero" else "NAN_REQUEST_ZERO_FMA"
        promotion = fields["l2_promotion"]
        head = (code("DataType", f"DATA_TYPE_{TENSOR_MAP_TYPES[fields['dtype']]}"), len(fields["shape"]))
        tail = (
            *sizes,
            code("Interleave", "INTERLEAVE_NONE"),
            code("Swizzle", f"SWIZZLE_{fields['swizzle'].upper()}"),
            code("L2promotion", f"L2_PROMOTION_{'NONE' if promotion == 'none' else 'L2_' + promotion}"),
            code("FloatOOBfill", f"FLOAT_OOB_FILL_{fill}"),
        )

        def encode(address: int) -> bytes:
            with self._current():
                found = self._call(
                    cu.cuTensorMapEncodeTiled(*head, address, *tail),
                    f"encoding a tensor map at {address:#x}: {fields}",
                )
            return struct.pack("<16Q", *map(int, found.opaque))

        return encode

    @contextlib.contextmanager
    def _cupy(self, what: str) -> Iterator[Any]:
        """CuPy with this device current; its errors are told as this device's own."""
        import cupy

        if self._killed:
            raise DeviceError(self._killed)
        try:
            with cupy.cuda.Device(self.index):
                yield cupy
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status not in CONTEXT_KILLERS:
                raise
            self._fail(self._cu.CUresult(error.status), what)

    def empty(self, shape: int | Sequence[int], dtype: Any) -> Any:
        with self._cupy("empty") as cupy:
            return cupy.empty(shape, dtype)

    def array(self, host: Any) -> Any:
        with self._cupy("array") as cupy:
            return cupy.asarray(host)

    def numpy(self, array: Any) -> np.ndarray[Any, Any]:
        with self._cupy("numpy") as cupy:
            return cupy.asnumpy(array)  # type: ignore[no-any-return]

    def current_stream(self) -> int:
        with self._cupy("current_stream") as cupy:
            return int(cupy.cuda.get_current_stream(self.index).ptr)

    def synchronize(self) -> None:
        """Wait for all work of the device; a fault of an earlier kernel surfaces here."""
        if self._killed:
            raise DeviceError(self._killed)
        with self._current():
            status = self._cu.cuCtxSynchronize()[0]
        if status != self._ok:
            self._fail(status, "synchronize")
        self._since_sync.clear()
