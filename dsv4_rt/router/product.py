"""The gate's matrix product for many tokens: bfloat16 in, float32 out, by cuBLAS; on the emulator by NumPy.

A `GateProduct` has a handle and a scratch memory of its own, so that nothing is allocated when it runs and a CUDA graph
may capture it. cuBLAS is called through ctypes: CuPy's binding of the same library refuses to run while a stream is
being captured, and has no word for scratch memory.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from dsv4_rt.device import Device, device
from dsv4_rt.errors import DeviceError
from dsv4_rt.formats import BF16, F32

SCRATCH_BYTES: Final = 32 * 2**20  # what cuBLAS takes by itself on Hopper
_R_32F, _R_16BF, _COMPUTE_32F, _ALGO_DEFAULT = 0, 14, 68, -1  # library_types.h, cublas_api.h
_OP_N, _OP_T = 0, 1
_P, _I = ctypes.c_void_p, ctypes.c_int
_SIGNATURES: Final = {
    "cublasCreate_v2": (ctypes.POINTER(_P),),
    "cublasSetStream_v2": (_P, _P),
    "cublasSetWorkspace_v2": (_P, _P, ctypes.c_size_t),
    "cublasGemmEx": (_P, _I, _I, _I, _I, _I, _P, _P, _I, _I, _P, _I, _I, _P, _P, _I, _I, _I, _I),
}


@functools.cache
def _cublas() -> Any:
    """The library, its functions' arguments declared."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    try:
        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception as error:
        raise DeviceError(f"GateProduct: cuBLAS is not to be had ({error}); pip install nvidia-cublas") from error
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


class GateProduct:
    """logits[n, e] = sum over parts p and channels c of hidden[n, c] * part_p[e, c], in float32.

    One stream or one graph in flight at a time: two would share the scratch memory.

    Attributes:
        library: "cuBLAS", or "NumPy" where the emulator stands in for the GPU.

    Raises:
        DeviceError: on a GPU, if cuBLAS is not installed.
    """

    def __init__(self, on: Device | None = None) -> None:
        self.device = on or device()
        self.library = "cuBLAS" if self.device.kind == "cuda" else "NumPy"
        if self.library == "NumPy":
            return
        import cupy

        library = _cublas()
        self._lock = threading.Lock()
        self._handle = _P()
        with cupy.cuda.Device(self.device.index):
            _check(library.cublasCreate_v2(ctypes.byref(self._handle)), "cublasCreate")
        self._gemm, self._set_stream, self._set_scratch = (
            library.cublasGemmEx, library.cublasSetStream_v2, library.cublasSetWorkspace_v2,
        )  # fmt: skip
        self._scratch = self.device.empty(SCRATCH_BYTES, np.uint8)
        # initcheck does not see what cuBLAS stores by the copy engine and would report what it reads back.
        # bench/results/h200-router-tests-and-sanitizer.txt has the control.
        self._scratch.data.memset(0, SCRATCH_BYTES)
        self.device.synchronize()  # the stream of the first product need not be the one of the memset
        self._stream: int | None = None
        self._numbers = np.array([0, 1], np.float32)
        self._zero, self._one = (int(self._numbers.ctypes.data) + 4 * i for i in range(2))

    def run(
        self,
        hidden: int,
        parts: Sequence[int],
        logits: int,
        N: int,
        E: int,
        K: int,
        pitch: int,
        stride: int,
        stream: int,
    ) -> None:
        """Enqueue the product, unchecked.

        Args:
            hidden, logits: addresses of [N, K] bfloat16, rows `pitch` elements apart, and [N, E] float32, rows `stride`
                apart.
            parts: addresses of [E, K] bfloat16, contiguous; their products are added, in order.
        """
        if self.library == "NumPy":
            self._run_numpy(hidden, parts, logits, N, E, K, pitch, stride)
            return
        with self._lock:
            if stream != self._stream:
                _check(self._set_stream(self._handle, stream), "cublasSetStream")  # takes the scratch memory away
                _check(self._set_scratch(self._handle, self._scratch.data.ptr, SCRATCH_BYTES), "cublasSetWorkspace")
                self._stream = stream
            beta = self._zero
            for part in parts:
                # Column-major: logits^T [E, N] = part^T^T [E, K] hidden^T [K, N].
                status = self._gemm(
                    self._handle, _OP_T, _OP_N, E, N, K, self._one, part, _R_16BF, K, hidden, _R_16BF, pitch,
                    beta, logits, _R_32F, stride, _COMPUTE_32F, _ALGO_DEFAULT,
                )  # fmt: skip
                if status:
                    _check(status, f"cublasGemmEx of [{N}, {K}] and [{E}, {K}]")
                beta = self._one

    def _run_numpy(
        self, hidden: int, parts: Sequence[int], logits: int, N: int, E: int, K: int, pitch: int, stride: int
    ) -> None:
        x = _array_at(hidden, N, K, pitch, BF16).astype(np.float32)
        y = _array_at(logits, N, E, stride, F32)
        y[...] = sum(x @ _array_at(part, E, K, K, BF16).astype(np.float32).T for part in parts)
        for row in range(N):
            self.device.machine.memory.mark_written(logits + 4 * row * stride, 4 * E)  # type: ignore[attr-defined]


def _check(status: int, what: str) -> None:
    if status:
        raise DeviceError(f"GateProduct: {what} failed, cublasStatus_t {status}")


def _array_at(address: int, rows: int, width: int, pitch: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Host memory as an array [rows, width]."""
    count = (rows - 1) * pitch + width
    memory: Any = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    flat = np.frombuffer(memory, dtype)
    return np.lib.stride_tricks.as_strided(flat, (rows, width), (pitch * dtype.itemsize, dtype.itemsize))


def bf16_parts(w_gate: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """Three bfloat16 arrays whose sum is a float32 array, exactly (magnitudes of at least 2^-100, or 0; finite)."""
    parts, rest = [], w_gate.astype(np.float32)
    for _ in range(3):
        parts.append(rest.astype(BF16))
        rest = rest - parts[-1].astype(np.float32)
    return parts
