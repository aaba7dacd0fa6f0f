"""dense_router_decode on Blackwell: when its tcgen05 form is taken, with which tile, and how it is launched.

The kernel is kernels/router/dense_router_decode_sm100.cu. It is compiled, emulated, and not yet run on a B200: nothing
here was timed, and reasons are arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4_rt.checks import Dtype
from dsv4_rt.device import Device
from dsv4_rt.formats import BF16
from dsv4_rt.launch import POINTER, Prepared, load
from dsv4_rt.operation import Instance
from dsv4_rt.tensor_map import TensorMapAt

SOURCE = "router/dense_router_decode_sm100.cu"
ARCHITECTURES = ("sm_100a", "sm_103a")  # which have tcgen05
CLUSTER = 8  # blocks a cluster
TOKENS = 64  # of a block
PIECE = 64  # channels of a stage
MAX_STAGES = 16  # of the widest tile: 192 KiB

# Up to this many tokens the streaming form stays. A block of that reads all of hidden, 2 N K B, one of this form an
# eighth: for 4 tokens of Flash 28 KB less from L2 for each SM, 0.24 us at the 64 B a clock that an SM takes from there.
# Against it stand a cluster barrier, tensor memory and one exchange more. An H200, with the same width from L2, gives
# 3.59 us to the streaming form and 3.74 to its sibling with clusters at 4 tokens, 3.80 and 3.87 at 8, where the
# streaming form also reads the weights twice: bench/results/h200-dense-router-decode-tiles.txt.
STREAM_TOKENS = 4


@dataclass(frozen=True)
class Sm100Tile:
    """dense_router_decode_sm100: experts a cluster of 8 blocks, stages of 64 channels a block."""

    experts: int
    stages: int

    @property
    def shared(self) -> int:
        """Dynamic shared memory of a block, bytes: rows of 128 B, and room to begin at a multiple of 1,024."""
        return self.stages * 128 * (TOKENS + self.experts) + 1024


def tile(N: int, E: int, K: int, dtype: Dtype, arch: str) -> Sm100Tile | None:
    """The tile for a shape; None where `dense.decode_tile` has it: few tokens, float32 weights, no tcgen05.

    At most 16 clusters, what 8 GPCs of 16 SMs hold at once, and of their experts as few as that allows; as many stages
    as a block has pieces of channels, so that everything is in flight at once up to K = 8,192.
    """
    if arch not in ARCHITECTURES or dtype != BF16 or N <= STREAM_TOKENS:
        return None
    return Sm100Tile(8 * -(-E // 128), min(MAX_STAGES, -(-K // (PIECE * CLUSTER))))


def instance(E: int, k: int) -> tuple[str, str]:
    """Source and name expression of the instantiation for E experts."""
    return SOURCE, f"dense_router_decode_sm100<{k}, {4 * -(-E // 128)}>"


# What the released models use, and the least and the widest form.
INSTANCES = tuple(
    Instance(*instance(E, k), registers=64, architectures=ARCHITECTURES)
    for E, k in ((6, 6), (256, 6), (384, 6), (512, 16))
)


def prepare(
    on: Device,
    tile: Sm100Tile,
    shape: tuple[int, int, int],
    k: int,
    scale: float,
    arguments: Sequence[Any],
    strides: tuple[int, int, int, int],
    pdl: bool,
) -> Prepared:
    """The launch, unchecked.

    Args:
        shape: N, E, K.
        arguments: hidden, w_gate, e_bias, workspace, logits, weights, ids, each an address as np.uint64 or POINTER. The
            first two reach the kernel as tensor maps, encoded again when a launch brings an address not seen before.
        strides: elements between rows of hidden, logits, weights and ids.
    """
    N, E, K = shape
    given = []
    for rows, stride, box, address in ((N, strides[0], min(TOKENS, -(-N // 8) * 8), 0), (E, K, tile.experts, 1)):
        form = TensorMapAt((rows, K), (stride, 1), BF16, (box, PIECE), swizzle="128B", l2_promotion="256B")
        at = arguments[address]
        given.append(form if at is POINTER else form.encoder(on)(int(at)))
    return load(*instance(E, k), on).prepare(
        (CLUSTER * -(-E // tile.experts), -(-N // TOKENS)),
        256,
        *given,
        *arguments[2:],
        *(np.int32(n) for n in (N, E, K, tile.stages)),
        *(np.int64(s) for s in strides[1:]),
        np.float32(scale),
        shared=tile.shared,
        cluster=(CLUSTER, 1, 1),
        pdl=pdl,
    )
