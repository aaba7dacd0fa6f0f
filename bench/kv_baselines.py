"""Plain kernels to measure the kv family against, written in an hour with Triton or torch. Not part of it."""

import torch
import triton
import triton.language as tl
from linear_baselines import torch_codes


@triton.jit
def _gather(topk, table, pages, out, k, max_blocks, page_stride, N: tl.constexpr, R: tl.constexpr, V4: tl.constexpr):
    per_row = tl.cdiv(k, R)
    t = tl.program_id(0) // per_row
    j = (tl.program_id(0) % per_row) * R + tl.arange(0, R)
    index = tl.load(topk + t * k + j, mask=j < k, other=-1)
    there = index >= 0
    page = tl.load(table + t * max_blocks + index // N, mask=there, other=0).to(tl.int64)
    base, e = pages + page * page_stride, index % N
    d = tl.arange(0, 512)
    coded = d[None, :] < 448
    codes = base + e * (576 if V4 else 448)
    rope = codes + 448 if V4 else base + N * 448 + e * 128
    raw = tl.load(codes[:, None] + d[None, :], mask=coded & there[:, None], other=0)
    value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    if V4:
        at = base[:, None] + N * 576 + e[:, None] * 8 + (d // 64)[None, :]
        byte = tl.load(at, mask=coded & there[:, None], other=0).to(tl.int32)
        scale = (byte << 23).to(tl.float32, bitcast=True)
    else:
        at = (base + N * 576 + e * 4).to(tl.pointer_type(tl.float32))
        scale = tl.load(at, mask=there, other=0.0)[:, None]
    tail = tl.load(rope.to(tl.pointer_type(tl.bfloat16))[:, None] + d[None, :] - 448, mask=~coded & there[:, None])
    both = tl.where(coded, (value * scale).to(tl.bfloat16), tail)
    both = tl.where(there[:, None], both, 0.0)
    row = (t.to(tl.int64) * k + j) * 512
    tl.store(out + row[:, None] + d[None, :], both, mask=(j < k)[:, None])


def gather_kv(topk, table, pages, out, record, R, warps):
    """gather_kv for contiguous arrays, one table row a token: one program for R entries."""
    T, k = topk.shape
    grid = (T * triton.cdiv(k, R),)
    _gather[grid](topk, table, pages, out, k, table.shape[1], pages.stride(0), 64, R, record == "v4", num_warps=warps)


@triton.jit
def _append(x, slots, pages, page_stride, N: tl.constexpr, V4: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if slot < 0:
        return
    page, e = pages + slot // N * page_stride, slot % N
    group, g = tl.arange(0, 8), tl.arange(0, 64)
    d = group[:, None] * 64 + g[None, :]
    raw = tl.load(x + t * 512 + d)
    value = raw.to(tl.float32)
    coded = d < 448
    amax = tl.max(tl.where(coded, tl.abs(value), 0.0), axis=1)
    if V4:
        bits = (tl.maximum(amax, 1e-4) / 448.0).to(tl.int32, bitcast=True)
        byte = (bits + 0x7FFFFF) >> 23
        inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
        value = value * inverse[:, None]
        tl.store(page + N * 576 + e * 8 + group, tl.where(group < 7, byte, 0).to(tl.uint8))
    else:
        scale = tl.maximum(tl.max(amax, axis=0), 1e-4) / 448.0
        value = value / scale
        tl.store((page + N * 576 + e * 4).to(tl.pointer_type(tl.float32)), scale)
    code = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    codes = page + e * (576 if V4 else 448)
    tl.store(codes + d, code, mask=coded)
    rope = codes + 448 if V4 else page + N * 448 + e * 128
    tl.store(rope.to(tl.pointer_type(tl.bfloat16)) + d - 448, raw, mask=~coded)


def append_kv(x, slots, pages, record):
    """append_kv for contiguous arrays: one program a token."""
    _append[(len(slots),)](x, slots, pages, pages.stride(0), 64, record == "v4", num_warps=1)


@triton.jit
def _index_keys(
    x, slots, pages, matrix, T, stride, FORM: tl.constexpr, GROUP: tl.constexpr, ROTATE: tl.constexpr, R: tl.constexpr
):
    t = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, 128)
    raw = tl.load(x + t.to(tl.int64)[:, None] * 128 + d[None, :], mask=(t < T)[:, None], other=0.0)
    if ROTATE:  # on tensor cores: sums in another order, so now and then another bf16
        h = tl.load(matrix + d[:, None] * 128 + d[None, :])
        raw = (tl.dot(raw, h) * 0.08838834764831845).to(tl.bfloat16)
    v = tl.reshape(raw.to(tl.float32), (R, 128 // GROUP, GROUP))
    amax = tl.max(tl.abs(v), axis=2)
    slot = tl.load(slots + t, mask=t < T, other=-1)
    there = (slot >= 0)[:, None]
    page, e = pages + slot // 64 * stride, slot % 64
    g = tl.arange(0, 128 // GROUP)
    if FORM == "nvfp4":
        kept = (amax / 6.0).to(tl.float8e4nv)
        scale = kept.to(tl.float32)
        inverse = tl.where(scale > 0, 1.0 / scale, 0.0)
        at = (page + 4096 + e * 8)[:, None] + g[None, :]
        tl.store(at, kept.to(tl.uint8, bitcast=True), mask=there)
    else:
        least, most = (7.052966104933725e-38, 6.0) if FORM == "mxfp4" else (1e-4, 448.0)
        byte = ((tl.maximum(amax, least) / most).to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
        if FORM == "mxfp4":
            tl.store((page + 4096 + e * 4)[:, None] + g[None, :], byte.to(tl.uint8), mask=there)
        else:
            at = (page + 8192 + e * 4).to(tl.pointer_type(tl.float32))
            tl.store(at[:, None] + g[None, :], (byte << 23).to(tl.float32, bitcast=True), mask=there)
    q = tl.reshape(v * inverse[:, :, None], (R, 128))
    if FORM == "fp8":
        code = tl.minimum(tl.maximum(q, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        tl.store((page + e * 128)[:, None] + d[None, :], code, mask=there)
    else:
        a = tl.abs(q)
        code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
        code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
        code += (q.to(tl.int32, bitcast=True) >> 28) & 8
        low, high = tl.split(tl.reshape(code, (R, 64, 2)))
        tl.store((page + e * 64)[:, None] + tl.arange(0, 64)[None, :], (low | high << 4).to(tl.uint8), mask=there)


def append_index_keys(x, slots, pages, record, matrix, R, warps):
    """append_index_keys for contiguous arrays and g = 1: one program for R tokens; `matrix` of +-1 in bf16, or None."""
    group = {"nvfp4": 16, "mxfp4": 32, "fp8": 128}[record]
    rotate = matrix is not None
    _index_keys[(triton.cdiv(len(slots), R),)](
        x, slots, pages, matrix if rotate else x, len(slots), pages.stride(0), record, group, rotate, R, num_warps=warps
    )


@triton.jit
def _valid_lens(positions, table, row, lens, T, max_blocks, ratio, N, R: tl.constexpr, BLOCKS: tl.constexpr):
    t = tl.program_id(0) * R + tl.arange(0, R)
    there = t < T
    r = tl.load(row + t, mask=there, other=0)
    b = tl.arange(0, BLOCKS)
    mask = there[:, None] & (b < max_blocks)[None, :]
    ids = tl.load(table + r[:, None] * max_blocks + b[None, :], mask=mask, other=0)
    pages = tl.sum((ids > 0).to(tl.int32), axis=1)
    n = (tl.load(positions + t, mask=there, other=-1) + 1) // ratio
    tl.store(lens + t, tl.minimum(n, pages * N), mask=there)


def compute_valid_lens(positions, table, row, lens, ratio, R, warps):
    """compute_valid_lens for int32 positions, counting every page of the rows: one program for R tokens."""
    T, blocks = len(positions), table.shape[1]
    _valid_lens[(triton.cdiv(T, R),)](
        positions, table, row, lens, T, blocks, ratio, 64, R, triton.next_power_of_2(blocks), num_warps=warps
    )


# What a model file writes with torch alone.


def parts(pages, record):
    """data [P, 64, 448], rope [P, 64, 64] bf16, scales: views of the pages' bytes."""
    P, stride = len(pages), pages.stride(0)
    width, rope, scales = (576, 448, 64 * 576) if record == "v4" else (448, 64 * 448, 64 * 576)
    wide = pages.view(torch.bfloat16)
    data = pages.as_strided((P, 64, 448), (stride, width, 1))
    tail = wide.as_strided((P, 64, 64), (stride // 2, (width if record == "v4" else 128) // 2, 1), rope // 2)
    if record == "v4":
        return data, tail, pages.as_strided((P, 64, 7), (stride, 8, 1), scales)
    return data, tail, pages.view(torch.float32).as_strided((P, 64, 1), (stride // 4, 1, 1), scales // 4)


def torch_gather(topk, table, cache, record):
    """gather_kv for indices that are all there."""
    data, rope, scales = cache
    index = topk.long()
    page, e = table.long().gather(1, index // 64), index % 64
    scale = scales[page, e]
    scale = torch.exp2(scale.float() - 127).repeat_interleave(64, -1) if record == "v4" else scale
    values = data[page, e].view(torch.float8_e4m3fn).float() * scale
    return torch.cat([values.bfloat16(), rope[page, e]], -1)


def hadamard():
    """The 128 x 128 matrix of +-128^-1/2 in natural order."""
    one = torch.ones(1, 1)
    for _ in range(7):
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    return one * 128**-0.5


def torch_index_keys(x, slots, cache, record, matrix):
    """append_index_keys for slots that are all there; `matrix` None: as they are. FP4 ties are not looked after."""
    data, scales = cache
    page, e = slots // 64, slots % 64
    values = (x.float() @ matrix).bfloat16().float() if matrix is not None else x.float()
    group = {"nvfp4": 16, "mxfp4": 32, "fp8": 128}[record]
    blocks = values.view(-1, 128 // group, group)
    amax = blocks.abs().amax(-1)
    if record == "nvfp4":
        kept = (amax / 6).to(torch.float8_e4m3fn)
        scale = kept.float()
    elif record == "mxfp4":
        exponent = torch.ceil(torch.log2(amax.clamp(min=2.0**-123) / 6))
        kept, scale = (exponent + 127).to(torch.uint8), torch.exp2(exponent)
    else:
        scale = torch.exp2(torch.ceil(torch.log2(amax.clamp(min=1e-4) / 448)))
        kept = scale
    scales[page, e] = kept.view(torch.uint8) if record == "nvfp4" else kept
    quotients = (blocks / scale[..., None]).flatten(1)
    if record == "fp8":
        data[page, e] = quotients.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return
    data[page, e] = torch_codes(quotients)


def key_parts(pages, record):
    """data and scales of index keys: views of the pages' bytes."""
    P, stride = len(pages), pages.stride(0)
    if record == "fp8":
        scales = pages.view(torch.float32).as_strided((P, 64, 1), (stride // 4, 1, 1), 64 * 128 // 4)
        return pages.as_strided((P, 64, 128), (stride, 128, 1)), scales
    width = 8 if record == "nvfp4" else 4
    return pages.as_strided((P, 64, 64), (stride, 64, 1)), pages.as_strided((P, 64, width), (stride, width, 1), 64 * 64)


def torch_append(x, slots, cache, record):
    """append_kv for slots that are all there."""
    data, rope, scales = cache
    page, e = slots // 64, slots % 64
    values = x[:, :448].float()
    if record == "v4":
        amax = values.view(-1, 7, 64).abs().amax(-1).clamp(min=1e-4)
        exponent = torch.ceil(torch.log2(amax / 448))
        scales[page, e] = (exponent + 127).to(torch.uint8)
        values = values * torch.exp2(-exponent).repeat_interleave(64, -1)
    else:
        scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        scales[page, e] = scale
        values = values / scale
    data[page, e] = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    rope[page, e] = x[:, 448:]
