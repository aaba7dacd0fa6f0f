"""checks.py: the sizes that are found, and the error that shows every argument."""

import ml_dtypes
import numpy as np
import pytest

from dsv4_rt import ArgumentError
from dsv4_rt.arrays import view
from dsv4_rt.checks import Arg, check_range, check_scale, match
from dsv4_rt.formats import BF16, F32

U8 = np.dtype(np.uint8)


def arg(array, axes, dtype, **options):
    return Arg(view(array), axes, dtype, **options)


def test_sizes_come_in_order_of_appearance():
    x = np.zeros((4096, 7168), ml_dtypes.bfloat16)
    s = np.zeros((4096, 56), np.float32)
    assert match("quant", x=arg(x, "T K", BF16), s=arg(s, "T K/128", F32)) == {"T": 4096, "K": 7168}


def test_the_whole_table_is_shown_with_the_wrong_one_marked():
    x = np.zeros((4096, 7168), ml_dtypes.bfloat16)
    q = np.zeros((4096, 7168), np.uint8)
    s = np.zeros((4096, 55), np.float32)
    with pytest.raises(ArgumentError) as error:
        match("quant_fp8_1x128", x=arg(x, "T K", BF16), q=arg(q, "T K", U8), s=arg(s, "T K/128", F32))
    assert str(error.value) == (
        "quant_fp8_1x128: s does not fit\n"
        "     x  [T, K]      bfloat16  (4096, 7168)\n"
        "     q  [T, K]      uint8     (4096, 7168)\n"
        "  >  s  [T, K/128]  float32   (4096, 55)      axis 1 (K/128) must be 56"
    )


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((4, 8), np.float64), {}, "dtype must be float32"),
        (np.zeros((4, 8), ">f4"), {}, "byte order is not this machine's; use .astype('float32')"),
        (np.zeros(8, np.float32), {}, "must have 2 axes"),
        (np.zeros((4, 16), np.float32)[:, ::2], {"rows": True}, "last axis must be contiguous, has stride 2"),
        (np.zeros((4, 16), np.float32)[:, :8], {}, "must be contiguous, has strides (16, 1)"),
        (np.zeros((4, 8), np.float32)[::-1], {"rows": True}, "axis 0 has stride -8; it must not be negative"),
        (np.zeros((4, 9), np.float32)[:, 1:], {"rows": True, "align": 16}, "must be a multiple of 16 B"),
        (np.frombuffer(bytes(129), np.uint8)[1:].view(np.float32).reshape(4, 8), {}, "must be a multiple of 4 B"),
        (np.frombuffer(bytes(128), np.float32).reshape(4, 8), {"output": True}, "is read-only"),
        (np.broadcast_to(np.float32(0), (4, 8)), {}, "must be contiguous"),
    ],
)
def test_what_does_not_fit(array, options, message):
    with pytest.raises(ArgumentError) as error:
        match("op", x=arg(array, "N E", F32, **options))
    assert message in str(error.value)


def test_strided_and_broadcast_rows_are_fine_for_inputs_only():
    gap = np.zeros((4, 16), np.float32)[:, :8]
    same = np.broadcast_to(np.zeros(8, np.float32), (4, 8))
    one = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (1, 8), (4, 4))  # one row: its stride is no stride
    for array in (gap, same, one):
        assert match("op", x=arg(array, "N E", F32, rows=True)) == {"N": array.shape[0], "E": 8}
    close = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (4, 8), (28, 4))
    with pytest.raises(ArgumentError, match="axis 0 has stride 7; rows of an output must not overlap"):
        match("op", x=arg(close, "N E", F32, rows=True, output=True))


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_empty_arrays_have_no_layout(shape):
    assert list(match("op", x=arg(np.zeros(shape, np.float32)[:, ::-1], "N E", F32)).values()) == list(shape)


@pytest.mark.parametrize("value", [0, 17, 2.0, True, None, "6"])
def test_a_count_is_an_integer_in_range(value):
    with pytest.raises(ArgumentError, match="op: k = .* must be an integer from 1 to 16"):
        check_range("op", "k", value, 1, 16)
    assert check_range("op", "k", np.int64(6), 1, 16) == 6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39, None, "x"])
def test_a_scale_is_finite(value):
    with pytest.raises(ArgumentError, match="op: s = .* must be a finite float32"):
        check_scale("op", "s", value)
    assert check_scale("op", "s", np.float32(2.5)) == 2.5
