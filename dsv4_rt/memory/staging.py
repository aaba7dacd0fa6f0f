"""Host memory that a kernel or a copy engine reads while the host goes on: buffers in rotation, an event for each.

On a CUDA device the buffers are pinned (page-locked) memory, which kernels can also read in place; on the emulator,
where a launch has ended when it returns, they are plain NumPy arrays.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dsv4_rt.arrays import stream_handle, view
from dsv4_rt.checks import check_range
from dsv4_rt.device import Device
from dsv4_rt.errors import LaunchError

CAPTURE_IMPLICIT = 906  # cudaErrorStreamCaptureImplicit: another stream's capture forbids the legacy default stream
GRANULE = 4096  # bytes: buffers grow to the next power of two of at least this


class Buffer(Protocol):
    """One buffer: the host writes `words`, then sends."""

    words: NDArray[np.int32]  # the host's view; 256 B aligned or better
    ptr: int  # the same memory, as a kernel addresses it

    def wait(self) -> None:
        """Return when nothing reads the buffer any more."""

    def begin(self) -> None:
        """Work that reads the buffer is about to be enqueued; if that fails half way, `wait` waits for everything."""

    def sent(self, stream: int) -> None:
        """All work that reads the buffer has been enqueued on `stream`."""

    def on_device(self, words: int, stream: int) -> int:
        """Enqueue a copy of the first words into device memory of the buffer's own; returns its address."""


class Staging:
    """`count` buffers in rotation, one for each step in flight. Not safe to share between threads."""

    def __init__(self, device: Device, count: int, nbytes: int = GRANULE) -> None:
        self._device = device
        count = check_range("Staging", "count", count, 1, 1024)
        self._buffers = [_buffer(device, _grown(nbytes)) for _ in range(count)]
        self._turn = 0

    def take(self, words: int) -> Buffer:
        """The next buffer, at least `words` int32 long and no longer read by anything; waits for that if it must."""
        buffer = self._buffers[self._turn]
        buffer.wait()
        if buffer.words.size < words:
            buffer = self._buffers[self._turn] = _buffer(self._device, _grown(4 * words))
        return buffer

    def sent(self, buffer: Buffer, stream: int) -> None:
        """The buffer is on its way on `stream`; the next `take` gives another one."""
        buffer.sent(stream)
        self._turn = (self._turn + 1) % len(self._buffers)


def resolve_stream(what: str, device: Device, stream: Any) -> int:
    """The handle of the stream to work on: the given one, or the caller's current one.

    Raises:
        LaunchError: the stream takes part in a capture. A graph would repeat this step's copy with whatever the staging
            buffer holds at its replay.
    """
    handle = device.current_stream() if stream is None else stream_handle(stream)
    if device.kind == "cuda":
        import cupy

        runtime = cupy.cuda.runtime
        try:
            capturing = runtime.streamIsCapturing(handle)
        except runtime.CUDARuntimeError as error:
            if error.status != CAPTURE_IMPLICIT:
                raise
            capturing = True
        if capturing:
            raise LaunchError(
                f"{what}: the stream is being captured; call it before the capture and between replays, the arrays "
                "it writes keep their addresses"
            )
    return handle


def _grown(nbytes: int) -> int:
    return 1 << (max(nbytes, GRANULE) - 1).bit_length()


def _buffer(device: Device, nbytes: int) -> Buffer:
    return _PinnedBuffer(device, nbytes) if device.kind == "cuda" else _PlainBuffer(device, nbytes)


class _PlainBuffer:
    """On the emulator: an array of its arena, so that a kernel's reads are bounds-checked."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.words: NDArray[np.int32] = device.array(np.zeros(nbytes // 4, np.int32))
        self.ptr = view(self.words).ptr

    def wait(self) -> None:
        return

    def begin(self) -> None:
        return

    def sent(self, stream: int) -> None:
        return

    def on_device(self, words: int, stream: int) -> int:
        return self.ptr


class _PinnedBuffer:
    """Page-locked memory and an event that is recorded behind its last reader."""

    def __init__(self, device: Device, nbytes: int) -> None:
        import cupy

        self._runtime = cupy.cuda.runtime
        self._device = device
        self._nbytes = nbytes
        self._unsure = False
        self._twin: Any = None
        with cupy.cuda.Device(device.index):
            # Memory of its own, not from CuPy's pool: that would hand it on while a kernel may still read it.
            self._memory = cupy.cuda.PinnedMemory(nbytes)
            self._event = cupy.cuda.Event(block=False, disable_timing=True)
        self.ptr = int(self._memory.ptr)
        self.words = np.frombuffer(cupy.cuda.PinnedMemoryPointer(self._memory, 0), np.int32, nbytes // 4)
        self.words[:] = 0

    def wait(self) -> None:
        if self._unsure:
            self._device.synchronize()
            self._unsure = False
        self._runtime.eventSynchronize(self._event.ptr)

    def begin(self) -> None:
        self._unsure = True

    def sent(self, stream: int) -> None:
        self._runtime.eventRecord(self._event.ptr, stream)
        self._unsure = False

    def on_device(self, words: int, stream: int) -> int:
        if self._twin is None:
            self._twin = self._device.empty(self._nbytes // 4, np.int32)
        self._runtime.memcpyAsync(self._twin.data.ptr, self.ptr, 4 * words, self._runtime.memcpyHostToDevice, stream)
        return int(self._twin.data.ptr)
