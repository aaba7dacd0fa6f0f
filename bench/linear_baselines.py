"""Plain NVFP4 encoders to measure against, written in an hour with Triton or torch. Not part of the package."""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _nvfp4(x, q, sf, g, K, BLOCKS: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    j, i = tl.arange(0, BLOCKS), tl.arange(0, 8)
    inside = j < K // 16
    pair = t * K + j[:, None] * 16 + 2 * i[None, :]
    even = tl.load(x + pair, mask=inside[:, None], other=0).to(tl.float32)
    odd = tl.load(x + pair + 1, mask=inside[:, None], other=0).to(tl.float32)
    amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    scale = tl.maximum(tl.max(amax, axis=0) / 2688.0, 1.1754943508222875e-38)
    tl.store(g + t, scale)
    block = (amax / (6.0 * scale)).to(tl.float8e4nv)
    tl.store(sf + t * (K // 16) + j, block.to(tl.uint8, bitcast=True), mask=inside)
    step = block.to(tl.float32) * scale
    inverse = tl.where(step == 0.0, 0.0, 1.0 / step)[:, None]
    low = _code(even * inverse)
    high = _code(odd * inverse)
    tl.store(q + t * (K // 2) + j[:, None] * 8 + i[None, :], (low | high << 4).to(tl.uint8), mask=inside[:, None])


@triton.jit
def _code(v):
    a = tl.abs(v)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | (v < 0.0).to(tl.int32) << 3


def quantize_nvfp4(x, q, sf, g, warps):
    """quantize_nvfp4 for contiguous rows, its quotients by a reciprocal: one program a row."""
    M, K = x.shape
    _nvfp4[(M,)](x, q, sf, g, K, triton.next_power_of_2(K // 16), num_warps=warps)


@triton.jit
def _mxfp4(x, q, sf, groups, BLOCK: tl.constexpr):
    j, i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, 16)
    inside = j < groups
    pair = j[:, None] * 32 + 2 * i[None, :]
    even = tl.load(x + pair, mask=inside[:, None], other=0).to(tl.float32)
    odd = tl.load(x + pair + 1, mask=inside[:, None], other=0).to(tl.float32)
    amax = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), axis=1)
    bits = (tl.maximum(amax, 7.052966104933725e-38) / 6.0).to(tl.int32, bitcast=True)
    byte = (bits + 0x7FFFFF) >> 23
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]
    tl.store(sf + j, byte.to(tl.uint8), mask=inside)
    codes = _code(even * inverse) | _code(odd * inverse) << 4
    tl.store(q + j[:, None] * 16 + i[None, :], codes.to(tl.uint8), mask=inside[:, None])


def quantize_mxfp4(x, q, sf):
    """quantize_mxfp4 for contiguous rows: one program for 64 groups."""
    groups = x.numel() // 32
    _mxfp4[(triton.cdiv(groups, 64),)](x, q, sf, groups, 64, num_warps=4)


@functools.cache
def edges(device):
    """Where e2m1 rounds to the next code; made once: a capture allows no copy from the host."""
    return torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=device)


def torch_codes(v):
    """[..., K] floats -> [..., K/2] e2m1 codes, two a byte."""
    code = torch.bucketize(v.abs(), edges(v.device)) | (v < 0).long() << 3
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)


def torch_nvfp4(x):
    """What a model file writes; ties are not looked after."""
    blocks = x.float().view(len(x), -1, 16)
    amax = blocks.abs().amax(-1)
    g = (amax.amax(-1, keepdim=True) / 2688).clamp(min=2.0**-126)
    sf = (amax / (6 * g)).to(torch.float8_e4m3fn)
    return torch_codes(blocks / (sf.float() * g)[..., None]), sf, g


def torch_nvfp4_given(x, g):
    """The same with a scale that is known."""
    blocks = x.float().view(len(x), -1, 16)
    sf = (blocks.abs().amax(-1) / (6 * g)).clamp(max=448).to(torch.float8_e4m3fn)
    return torch_codes(blocks / (sf.float() * g)[..., None]), sf


def torch_nvfp4_tensor(x):
    """The same with one scale for the tensor."""
    g = (x.abs().amax().float() / 2688).clamp(min=2.0**-126)
    return *torch_nvfp4_given(x, g), g


@functools.cache
def values(device):
    """What the sixteen codes mean."""
    half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=device)
    return torch.cat([half, -half])


def torch_decode(q):
    """[M, K/2] bytes -> [M, K] floats."""
    return torch.stack([values(q.device)[(q & 15).long()], values(q.device)[(q >> 4).long()]], -1).view(len(q), -1)


def torch_dequantize_nvfp4(q, sf, g):
    """What a model file writes."""
    scale = sf.view(torch.float8_e4m3fn).float() * g[:, None]
    return (torch_decode(q).view(*sf.shape, 16) * scale[..., None]).view(len(q), -1).bfloat16()


def torch_dequantize_mxfp4(q, sf):
    """What a model file writes."""
    scale = torch.exp2(sf.float() - 127)
    return (torch_decode(q).view(*sf.shape, 32) * scale[..., None]).view(len(q), -1).bfloat16()


def torch_mxfp4(x):
    """What a model file writes; ties are not looked after."""
    blocks = x.float().view(len(x), -1, 32)
    exponent = torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=2.0**-123) / 6))
    return torch_codes(blocks * torch.exp2(-exponent)[..., None]), (exponent + 127).to(torch.uint8)
