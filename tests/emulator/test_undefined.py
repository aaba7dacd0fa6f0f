"""Values nobody has set may be carried about as long as nobody uses them: compilers do so, and it is no fault."""

import numpy as np
import pytest
from programs import run_ptx

from dsv4_rt.errors import KernelFault

HEAD = """.version 9.0
.target sm_90a
.address_size 64
.entry f(.param .u64 dst) {
    .reg .pred p, q; .reg .b32 i, a, b, c, d, e; .reg .b64 out, at; .shared .align 16 .b8 s[16];
    ld.param.u64 out, [dst];
    mov.u32 i, %tid.x;
    mul.wide.u32 at, i, 4;
    add.u64 out, out, at;
"""


def launch(body):
    y = np.zeros(64, np.int32)
    run_ptx(f"{HEAD}{body}\nret; }}", "f", 1, 64, y, arch="sm_90a")
    return y


SELECTED = """
    setp.lt.u32 p, i, 8;
    @p mov.u32 a, 5;
    add.s32 b, a, 1;
    {where}
    selp.b32 c, b, i, q;
    st.global.u32 [out], c;"""


def test_an_operand_selp_does_not_choose_may_be_unset():
    y = launch(SELECTED.format(where="setp.lt.u32 q, i, 8;"))
    np.testing.assert_array_equal(y, np.where(np.arange(64) < 8, 6, np.arange(64)))


def test_the_operand_selp_chooses_must_be_set():
    with pytest.raises(KernelFault, match=r"(?s)register c becomes a stored value.*thread \(8, 0, 0\).* of 2 threads"):
        launch(SELECTED.format(where="setp.lt.u32 q, i, 10;"))


def test_selp_into_its_own_operand_round_a_loop():
    # As CUB's warp scans: a running value that is unset until its turn comes.
    y = launch("""
        mov.u32 e, 0;
        loop:
        setp.eq.u32 p, e, 2;
        selp.b32 a, i, a, p;
        add.u32 e, e, 1;
        setp.lt.u32 q, e, 4;
        @q bra loop;
        st.global.u32 [out], a;""")
    np.testing.assert_array_equal(y, np.arange(64))


WIDENED = """
    setp.eq.u32 p, i, 0;
    @p st.shared.v2.b32 [s], {{i, i}};
    @p st.shared.b32 [s+8], 7;
    bar.sync 0;
    ld.shared.v4.b32 {{a, b, c, d}}, [s];
    add.u32 c, c, b;
    st.global.u32 [out], {stored};"""


def test_elements_of_a_wide_load_that_nobody_reads_may_be_unwritten():
    np.testing.assert_array_equal(launch(WIDENED.format(stored="c")), np.full(64, 7))


def test_elements_of_a_wide_load_that_are_read_must_be_written():
    with pytest.raises(KernelFault, match="read of uninitialised shared memory: 4 bytes at shared offset 0x40c"):
        launch(WIDENED.format(stored="d"))
