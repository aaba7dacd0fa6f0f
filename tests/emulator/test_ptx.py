"""Hand-written PTX: what the parser must take, and what must be refused by name before anything runs."""

import re

import numpy as np
import pytest
from programs import run_ptx

from dsv4_rt.emulator import Machine
from dsv4_rt.emulator.ir import build_blocks, liveness, maybe_unset, members
from dsv4_rt.emulator.ptx import parse
from dsv4_rt.errors import EmulatorError, KernelFault, UnsupportedInstruction

HEAD = ".version 9.5\n.target sm_100a\n.address_size 64\n"


def kernel(body, module="", params=".param .u64 y"):
    return f"""{HEAD}{module}
    .visible .entry f({params})
    {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %rd<9>; .reg .f32 %f<9>; .reg .b128 %q<3>;
        mov.u32 %r1, %tid.x;
        ld.param.u64 %rd1, [y];
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        {body}
    }}"""


def results(body, n=32, dtype=np.uint32, count=None, **options):
    buffer = np.zeros((count or n) + 8, dtype)  # NumPy aligns to 16 bytes, the widest vector needs 32
    y = buffer[-(buffer.ctypes.data // 4) % 8 :][: count or n]
    run_ptx(kernel(body, **options), "f", 1, n, y)
    return y


def test_scopes_shadow_names_and_labels():
    y = results("""
        mov.u32 %r2, 1;
        { .reg .b32 %r2; mov.u32 %r2, 7; bra SKIP; mov.u32 %r2, 8; SKIP: st.global.u32 [%rd2], %r2; }
        { .reg .b32 t; bra SKIP; SKIP: ld.global.u32 t, [%rd2]; add.u32 t, t, %r2; st.global.u32 [%rd2], t; }
        ret;""")
    np.testing.assert_array_equal(y, 8)


def test_vectors_sinks_and_packing():
    y = results("""
        mov.b64 %rd3, {%r1, 5};
        mov.b64 {_, %r2}, %rd3;
        mov.b32 {%h1, %h2}, %r2;
        mov.b32 %r3, {%h2, %h1};
        mov.b64 %rd4, {%h1, %h1, %h2, %h2};
        mov.b64 {%r4, %r5}, %rd4;
        mov.b128 %q1, {%rd3, %rd4};
        mov.b128 {%rd5, %rd6}, %q1;
        mov.b64 {%r6, %r7}, %rd5;
        add.u32 %r8, %r3, %r4; add.u32 %r8, %r8, %r6;
        st.global.u32 [%rd2], %r8;
        ret;""")
    np.testing.assert_array_equal(y, np.arange(32) + (5 << 16) + 5 * 0x10001)


def test_literals_and_address_forms():
    y = results(
        """
        mov.u32 %r2, 0x10U; mov.u32 %r3, 010; mov.u32 %r4, 0b101; mov.b32 %r5, 0f3F800000; mov.s32 %r6, -3;
        add.u32 %r7, %r2, %r3; add.u32 %r7, %r7, %r4; add.u32 %r7, %r7, %r6;
        ld.const.u32 %r8, [table+8]; add.u32 %r7, %r7, %r8;
        mov.u64 %rd3, table; ld.const.u32 %r9, [%rd3+-0]; add.u32 %r7, %r7, %r9;
        add.u64 %rd4, %rd2, 16; sub.u32 %r7, %r7, WARP_SZ;
        st.global.u32 [%rd4+-16], %r7;
        ret;""",
        module=".const .align 4 .u32 table[4] = {100, 200, 300, 400};",
    )
    np.testing.assert_array_equal(y, 16 + 8 + 5 - 3 + 300 + 100 - 32)


def test_guards_keep_what_they_do_not_write():
    y = results("""
        setp.lt.u32 %p1, %r1, 8;
        setp.gt.u32 %p2|%p3, %r1, 16;
        mov.u32 %r2, 1;
        @%p1 mov.u32 %r2, 2;
        @!%p3 add.u32 %r2, %r2, 10;
        @%p1 ld.global.u32 %r2, [%rd2];
        @!%p1 st.global.u32 [%rd2], %r2;
        @%p1 exit;
        @%p2 bra L;
        st.global.u32 [%rd2], 77;
    L:  ret;""")
    t = np.arange(32)
    np.testing.assert_array_equal(y, np.where(t < 8, 0, np.where(t > 16, 11, 77)))


def test_a_guarded_result_keeps_a_value_from_an_earlier_block():
    y = results("""
        mov.u32 %r2, 5;
        setp.lt.u32 %p1, %r1, 8;
        bra L;
    L:  @%p1 mov.u32 %r2, 6;
        bra M;
    M:  st.global.u32 [%rd2], %r2;
        ret;""")
    np.testing.assert_array_equal(y, np.where(np.arange(32) < 8, 6, 5))


def test_a_copy_does_not_follow_its_source():
    y = results("""
        add.u32 %r2, %r1, 5;
        mov.u32 %r3, %r2;
        mov.u32 %r4, %r1;
        setp.lt.u32 %p1, %r1, 8;
        @!%p1 bra L;
        add.u32 %r2, %r2, 1000;
        add.u32 %r1, %r1, 2000;
    L:  add.u32 %r5, %r3, %r4; st.global.u32 [%rd2], %r5;
        setp.eq.u32 %p2, %r2, 0; @%p2 st.global.u32 [%rd2], %r1;
        ret;""")
    np.testing.assert_array_equal(y, np.arange(32) * 2 + 5)


@pytest.mark.parametrize("limit", [0, 8])
def test_a_load_under_a_guard_leaves_other_lanes_unset(limit):
    with pytest.raises(KernelFault, match=rf"%r2 becomes a stored value(.|\n)*thread \({limit}, 0, 0\)"):
        results(f"""
            setp.lt.u32 %p1, %r1, {limit};
            @%p1 ld.global.u32 %r2, [%rd2];
            st.global.u32 [%rd2], %r2;
            ret;""")


def test_wide_vectors_and_b128():
    y = results(
        """
        mul.wide.u32 %rd3, %r1, 32; add.u64 %rd4, %rd1, %rd3;
        add.u32 %r2, %r1, 1;
        st.global.v8.b32 [%rd4], {%r1, %r2, %r1, %r2, %r1, %r1, %r1, %r2};
        ld.global.nc.L1::no_allocate.L2::128B.v8.b32 {%r3, %r4, _, _, _, _, _, %r5}, [%rd4];
        ld.global.b128 %q1, [%rd4];
        st.global.b128 [%rd4+16], %q1;
        add.u32 %r6, %r3, %r5; st.global.u32 [%rd4], %r6;
        ret;""",
        count=256,
    ).reshape(32, 8)
    t = np.arange(32)
    np.testing.assert_array_equal(y, np.stack([2 * t + 1, t + 1, t, t + 1, t, t + 1, t, t + 1], 1))


def test_every_pointer_initialiser_form_is_read():
    module = """.global .align 8 .u64 p[3] = {generic(v), v+4, 9};
    .global .align 4 .b8 v[8] = {1, 0, 0, 0, 2};"""
    y = results("ld.global.u64 %rd3, [p+8]; ld.global.u32 %r2, [%rd3]; st.global.u32 [%rd2], %r2; ret;", module=module)
    np.testing.assert_array_equal(y, 2)


def test_used_bytes_mask_excuses_uninitialised_bytes():
    body = """
        st.shared.u8 [s], 5;
        {pragma}
        ld.shared.u32 %r2, [s];
        and.b32 %r2, %r2, 255;
        st.global.u32 [%rd2], %r2;
        ret;"""
    module = ".shared .align 4 .b8 s[4];"
    np.testing.assert_array_equal(results(body.format(pragma='.pragma "used_bytes_mask 0x1";'), module=module), 5)
    with pytest.raises(EmulatorError, match="uninitialised shared"):
        results(body.format(pragma=""), module=module)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("frobnicate.u32 %r2, %r1;", "instruction frobnicate.u32 is not implemented"),
        ("add.u32.weird %r2, %r1, %r1;", "modifier .weird of add.u32.weird is not implemented"),
        ("mov.u32 %r2, %pm0;", "register %pm0 is not known"),
        ("tcgen05.shift.cta_group::1.down [%r1];", "tcgen05.shift.cta_group::1.down is not implemented"),
        ("cp.async.ca.frob.shared.global [%r1], [%rd2], 16;", "modifier .frob of cp.async.ca.frob"),
        ("call.uni foo;", "a call of foo, which this module does not define"),
        (".frob 3;", "directive .frob is not implemented"),
    ],
)
def test_refuses_by_name_before_running(instruction, message):
    y = np.zeros(32, np.uint32)
    text = kernel(f"st.global.u32 [%rd2], 1;\n {instruction}\n ret;")
    line = next(i for i, each in enumerate(text.split("\n"), 1) if instruction in each)
    with pytest.raises(UnsupportedInstruction, match=re.escape(message)) as caught:
        run_ptx(text, "f", 1, 32, y)
    assert f"PTX line {line}" in str(caught.value)
    assert not y.any()


def test_text_that_is_not_ptx():
    with pytest.raises(EmulatorError, match="PTX line 2: cannot read"):
        parse(".version 9.0\n ~~~")


def test_line_tables_come_after_the_code():
    text = kernel("""
        .loc 1 7 3
        add.u32 %r2, %r1, 1;
        .loc 1 9 5, function_name $L__info_string0, inlined_at 1 20 2
        add.u32 %r3, %r2, 1;
        ret;""")
    text += '\n.file 1 "kernels/x.cu", 123, 45\n'
    text += '.section .debug_str { $L__info_string0: .b8 95,90,51,102,111,111,118,0\n}'
    module = parse(text)
    body = module.body("f")
    assert module.files == {1: "kernels/x.cu"}
    assert module.strings == {"$L__info_string0": "_Z3foov"}
    assert [ins.loc.line for ins in body.instrs if ins.loc] == [7, 9, 9]
    assert body.instrs[-1].loc.inlined_at.line == 20


def test_liveness_and_definite_assignment():
    module = parse(kernel("""
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra A;
        mov.u32 %r2, 1;
    A:  add.u32 %r3, %r2, 1;
        st.global.u32 [%rd2], %r3;
        ret;"""))
    function = module.body("f")
    blocks = build_blocks(function, 0)
    liveness(blocks)
    assert [block.kind for block in blocks] == ["branch", "jump", "ret"]
    assert {reg.name for reg in members(function, blocks[2].live_in)} == {"%r2", "%rd2"}
    assert {reg.name for reg in members(function, maybe_unset(blocks))} == {"%r2", "%r3"}


def test_parameters_follow_alignment():
    formals = ".param .u8 a, .param .u64 .ptr .global .align 1 b, .param .align 4 .b8 c[6], .param .u16 d"
    text = f"{HEAD}.entry f({formals}) {{ ret; }}"
    entry = Machine().load(text, "m").entries["f"]
    assert entry.params == ((0, 1), (8, 8), (16, 6), (22, 2))


def test_packed_f32_pairs_and_three_operand_maximum():
    y = results(
        """
        cvt.rn.f32.u32 %f1, %r1;
        mov.f32 %f2, 0f40000000;
        mov.b64 %rd3, {%f1, %f2}; mov.b64 %rd4, {%f2, %f2};
        fma.rn.f32x2 %rd5, %rd3, %rd4, %rd4;
        mov.b64 {%f3, %f4}, %rd5;
        max.f32 %f5, %f3, %f4, 0f41A00000;
        st.global.f32 [%rd2], %f5;
        ret;""",
        dtype=np.float32,
    )
    np.testing.assert_array_equal(y, np.maximum(np.arange(32) * 2 + 2, 20).astype(np.float32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("bra NOWHERE;", "PTX line 6: no label NOWHERE"),
        ("ld.global.b32 %r1, %r1;", "PTX line 6: an address in brackets is wanted"),
    ],
)
def test_what_no_compiler_writes_is_an_error_with_its_line(body, message):
    head = ".version 8.5\n.target sm_90a\n.address_size 64\n.visible .entry f()\n"
    text = f"{head}{{ .reg .b32 %r<2>;\n{body}\nret; }}\n"
    machine = Machine("sm_90a")
    with pytest.raises(EmulatorError, match=message):
        machine.launch(machine.load(text, "f.ptx"), "f", (1, 1, 1), (32, 1, 1), b"")
