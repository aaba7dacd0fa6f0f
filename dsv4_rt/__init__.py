"""dsv4_rt: raw CUDA kernels for DeepSeek-V4 inference, compiled at run time, with a PTX emulator to run them anywhere.

    weights, ids = dsv4_rt.activation_topk(logits, e_bias, top_k=6, routed_scaling_factor=2.5)

Importing this package imports no GPU framework, compiles nothing and opens no device.
"""

from dsv4_rt.device import Device, device, open_device, use_device
from dsv4_rt.errors import (
    ArgumentError,
    CompileError,
    Deadlock,
    DeviceError,
    Dsv4Error,
    EmulatorError,
    KernelFault,
    LaunchError,
    UnsupportedInstruction,
)
from dsv4_rt.kv.ops import append_index_keys, append_kv, compute_valid_lens, gather_kv, gather_kv_slots
from dsv4_rt.linear.ops import (
    dequantize_mxfp4,
    dequantize_nvfp4,
    quantize_mxfp4,
    quantize_nvfp4,
    quantize_nvfp4_given,
    quantize_nvfp4_tensor,
)
from dsv4_rt.models import FLASH, PRO
from dsv4_rt.router.dense import dense_router_decode, dense_router_prefill
from dsv4_rt.router.hash_gate import hash_gate, hash_gate_from_logits
from dsv4_rt.router.layer import Router
from dsv4_rt.router.ops import activation_topk, hash_router, topk_select
from dsv4_rt.router.product import GateProduct

__version__ = "0.1.0"

__all__ = [
    "FLASH",
    "PRO",
    "ArgumentError",
    "CompileError",
    "Deadlock",
    "Device",
    "DeviceError",
    "Dsv4Error",
    "EmulatorError",
    "GateProduct",
    "KernelFault",
    "LaunchError",
    "Router",
    "UnsupportedInstruction",
    "activation_topk",
    "append_index_keys",
    "append_kv",
    "compute_valid_lens",
    "dense_router_decode",
    "dense_router_prefill",
    "dequantize_mxfp4",
    "dequantize_nvfp4",
    "device",
    "gather_kv",
    "gather_kv_slots",
    "hash_gate",
    "hash_gate_from_logits",
    "hash_router",
    "open_device",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "quantize_nvfp4_given",
    "quantize_nvfp4_tensor",
    "topk_select",
    "use_device",
]
