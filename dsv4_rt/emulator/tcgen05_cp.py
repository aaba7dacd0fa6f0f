"""tcgen05.cp: copies from shared into tensor memory, asynchronous, perhaps out of padded 4- or 6-bit elements.

The source is rows of 16 or 32 bytes, found like those of a K-major matrix of bytes by its descriptor. Source row r goes
to lanes, and its 16 or 32 bytes to 4 or 8 columns, from the column of the address on:

    128x256b, 128x128b              lane r
    4x256b                          lane l + 32 r, l the lane of the address
    64x128b.warpx2::02_13           lanes r, r + 64
    64x128b.warpx2::01_23           lanes r + 32 (r/32), 32 further
    32x128b.warpx4                  lanes r, r + 32, r + 64, r + 96

With cta_group::2 one thread of the even CTA issues, and each CTA of the pair copies from its own shared memory to its
own tensor memory, at the same places.

b8x16.b4x16_p64 and b8x16.b6x16_p32 make 16 bytes of 16 padded elements: what a product takes as containers from tensor
memory (`block_scale.py`).

Order, as the ISA has it: cp before a later mma of the same thread, or of one that comes after its issue; cp before
the commit of its thread. Nothing orders it after an earlier mma, ld, st or cp that uses the same columns: who issues it
must know that those are complete. A thread's operations run in order here all the same; what relies on that is
reported, unless the machine is told that copies are in order.

Source: PTX ISA 9.0, "tcgen05.cp", "Pipelined tcgen05 instructions"; the lanes as CUTLASS gives them
(copy_traits_sm100.hpp), whose 2-SM kernels also show whose shared memory a pair reads. No B200 has judged it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsv4_rt.emulator.async_ import Op, Span
from dsv4_rt.emulator.block_scale import of_padded, padded_bytes
from dsv4_rt.emulator.descriptors import decode_tcgen05
from dsv4_rt.emulator.memory import SHARED_FIRST, LaneFault
from dsv4_rt.emulator.tiles import Operand
from dsv4_rt.emulator.tmem import STRIP
from dsv4_rt.emulator.wgmma import check_rank
from dsv4_rt.errors import EmulatorError, KernelFault, UnsupportedInstruction

if TYPE_CHECKING:
    from dsv4_rt.emulator.tcgen05 import TensorCores

Array = npt.NDArray[Any]
KIND = "tcgen05.cp"
_ONE = np.zeros(1, np.int64)
SHAPES = {  # rows of the source and bytes of each
    "128x256b": (128, 32), "4x256b": (4, 32), "128x128b": (128, 16), "64x128b.warpx2::02_13": (64, 16),
    "64x128b.warpx2::01_23": (64, 16), "32x128b.warpx4": (32, 16),
}  # fmt: skip
SOURCES = {"b4x16_p64": "e2m1", "b6x16_p32": "e3m2"}  # a type of as many bits


def lanes_of(shape: str, first: int = 0) -> Array:
    """The TMEM lanes of each source row, [copies, rows]; `first` is the lane of the address."""
    row = np.arange(SHAPES[shape][0])
    if shape == "4x256b":
        return (first + 32 * row)[None]
    if shape == "64x128b.warpx2::01_23":
        row = row + row // 32 * 32
        return row + np.array([[0], [32]])
    return row + np.arange(0, 128, len(row))[:, None]


def copy(
    cores: TensorCores, lanes: Array, line: int, shape: str, source: str, address: Array, word: Array, group: int = 1
) -> None:
    """tcgen05.cp of each of these threads, for so many CTAs.

    Arguments: one a lane; `source` is "" or a key of SOURCES.
    """
    for i in range(len(lanes)):
        where, bits = (int(each[i if len(each) > 1 else 0]) for each in (address, word))
        lane = int(lanes[i])
        try:
            _start(cores, lane, line, shape, source, where, bits, group)
        except (KernelFault, UnsupportedInstruction):
            raise  # of an operation, under the early schedule; of a field
        except EmulatorError as error:
            raise LaneFault(f"{KIND}: {error}", np.array([i])) from None
        except LaneFault as error:
            raise LaneFault(error.what, np.array([i])) from None


def _start(
    cores: TensorCores, lane: int, line: int, shape: str, source: str, address: int, word: int, group: int
) -> None:
    """One copy, of every CTA of the group from its shared to its tensor memory."""
    batch, tmem = cores.batch, cores.batch.tmem
    cta = int(batch.cta[lane])
    if group == 2:
        batch.columns.check_leader(f"{KIND}.cta_group::2", np.array([lane]), _ONE)
    ctas = range(cta, cta + group)
    rows, width = SHAPES[shape]
    first, column = address >> 16, address & 0xFFFF
    if first >= (32 if shape == "4x256b" else 1):
        wanted = "0 to 31" if shape == "4x256b" else "0"
        raise EmulatorError(f"the address {address:#x} names TMEM lane {first}; {shape} wants {wanted}")
    place, ranges = cores._place(word, "source", rows, width, 1, False)
    origins = [each * batch.shared.stride - SHARED_FIRST for each in ctas]
    operand = Operand("source", decode_tcgen05(word), rows, 1, False)
    check_rank(operand, cta % batch.cluster_size)
    to = lanes_of(shape, first)
    strips = slice(first // STRIP, 8, 2) if shape == "4x256b" else slice(0, 8)
    used = np.arange(column, column + width // 4)
    slabs, lanes = [tmem.slab(each) for each in ctas], np.array([lane])
    but = lane if batch.machine.copies_in_order else -1
    for what, slab in zip((KIND, f"{KIND}, in the other CTA of the pair,"), slabs, strict=False):
        tmem.check_owned(slab, used, what, _ONE)
        tmem.check_products(slab, strips, used, lanes, what, _ONE, True, but=but)
        tmem.check_products(slab, strips, used, lanes, what, _ONE, but=but)
        tmem.check_accesses(slab, strips, used, lanes, what, ("ld", "st"), _ONE)

    def take(origin: int) -> Array:
        tiles = batch.shared.tiles
        wrong = None if tiles is None else tiles.check(origin, width, [operand])
        if wrong is not None:
            raise LaneFault(f"{KIND}: {wrong[1]}; the copy was issued at{batch.engine.place(wrong[0])}", _ONE)
        if not source:
            return cores._take(place + origin, "e4m3", "source", KIND)
        low, high, shift = padded_bytes(place + origin, SOURCES[source])
        begins, ends = (cores._take(each, "e4m3", "source", KIND) for each in (low, high))
        codes = of_padded(begins, ends, shift, SOURCES[source])
        return codes << np.uint8(2) if source == "b4x16_p64" else codes

    def read() -> list[Array]:
        return [take(origin) for origin in origins]

    def write(data: list[Array]) -> None:
        for slab, part in zip(slabs, data, strict=True):
            slab.cells[to[:, :, None], used] = np.ascontiguousarray(part.T).view("<u4")

    op = Op(KIND, line, lane, [Span(each, lo, hi) for each in ctas for lo, hi in ranges], [], read, write)
    number = tmem.enter_copy(op)
    for slab in slabs:
        slab.defined[to[:, :, None], used] = True
        slab.writers[strips, column : column + width // 4] = number
        for records in slab.records.values():
            records[strips, column : column + width // 4] = 0
    cores.start(op)
