"""Atomics on vectors of global memory, and exchanges of 16 bytes: duplicates, alignment, bounds, races, refusals.

What each form computes is compared with an H200 in tests/conformance.
"""

import numpy as np
import pytest
from ml_dtypes import bfloat16
from programs import ARCHITECTURES, ORDERS, pack, run_ptx

from dsv4_rt.emulator import Machine
from dsv4_rt.errors import KernelFault, UnsupportedInstruction

HEAD = ".version 8.6\n.target sm_90a\n.address_size 64\n"


def text(body):
    """A kernel over x and y with the thread's number %t and pointers %x, %y."""
    return f"""{HEAD}.visible .entry f(.param .u64 x, .param .u64 y) {{
    .reg .pred %p; .reg .b16 %h<8>; .reg .b32 %t, %w<4>, %r<4>; .reg .b64 %x, %y, %z, %q<2>; .reg .b128 %e<3>;
    .shared .align 16 .b8 s[64];
    ld.param.u64 %x, [x]; ld.param.u64 %y, [y]; mov.u32 %t, %tid.x;
    {body}
    ret; }}"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rows_added_by_every_thread(arch, order, rng):
    ids = rng.integers(0, 5, 96).astype(np.uint32)  # rows that many threads share
    sums = rng.integers(-9, 9, (5, 4)).astype(np.float32)
    want = sums.copy()
    np.add.at(want, ids, np.arange(96, dtype=np.float32)[:, None] + [0, 1, 2, 3])  # small integers: exact in any order
    body = """mad.wide.u32 %x, %t, 4, %x; ld.global.u32 %r0, [%x]; mad.wide.u32 %y, %r0, 16, %y;
    cvt.rn.f32.u32 %w0, %t; add.f32 %w1, %w0, 0f3F800000; add.f32 %w2, %w0, 0f40000000; add.f32 %w3, %w0, 0f40400000;
    red.relaxed.gpu.global.add.v4.f32 [%y], {%w0, %w1, %w2, %w3};"""
    run_ptx(text(body), "f", 1, 96, ids, sums, arch=arch, order=order, seed=1)
    np.testing.assert_array_equal(sums, want)


def test_what_atom_returns_is_each_element_before(rng):
    y = rng.integers(0, 2**16, 8).astype(np.uint16)
    y = np.where(np.isnan(y.view(bfloat16).astype(np.float32)), 0, y).astype(np.uint16)
    before, old = y.copy(), np.zeros((32, 8), np.uint16)
    names = "{%h0, %h1, %h2, %h3, %h4, %h5, %h6, %h7}"
    body = f"""cvt.rn.bf16.u32 %h0, %t; mov.b16 %h1, %h0; mov.b16 %h2, %h0; mov.b16 %h3, 0; mov.b16 %h4, %h0;
    mov.b16 %h5, %h0; mov.b16 %h6, 0x7F80; mov.b16 %h7, %h0;
    atom.global.max.noftz.v8.bf16 {names}, [%y], {names};
    mad.wide.u32 %x, %t, 16, %x;
    mov.b64 %q0, {{%h0, %h1, %h2, %h3}}; mov.b64 %q1, {{%h4, %h5, %h6, %h7}}; st.global.v2.b64 [%x], {{%q0, %q1}};"""
    run_ptx(text(body), "f", 1, 32, old, y, arch="sm_90a")
    mine = np.arange(32).astype(np.float32).repeat(8).reshape(32, 8)
    mine[:, 3], mine[:, 6] = 0, np.inf
    # In the order of lanes: what a lane finds is the largest of those before it.
    seen = np.maximum.accumulate(np.vstack([before.view(bfloat16).astype(np.float32), mine]), axis=0)
    np.testing.assert_array_equal(old.view(bfloat16).astype(np.float32), seen[:-1])
    np.testing.assert_array_equal(y.view(bfloat16).astype(np.float32), seen[-1])


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
def test_sixteen_bytes_change_as_one(space):
    """Every lane adds one to both halves by compare and swap until it succeeds."""
    at = {"global": "%y", "shared": "s", "generic": "%y"}[space]
    dot = "" if space == "generic" else f".{space}"
    body = f""".reg .b64 %t64; cvt.u64.u32 %t64, %t; mov.b64 %q0, 0;
    setp.eq.u32 %p, %t, 0; mov.b128 %e0, {{%q0, %q0}}; @%p st{dot}.b128 [{at}], %e0; bar.sync 0;
    $again: ld.relaxed.cta{dot}.b128 %e0, [{at}]; mov.b128 {{%q0, %q1}}, %e0;
    add.u64 %q0, %q0, 1; add.u64 %q1, %q1, %t64; mov.b128 %e1, {{%q0, %q1}};
    atom{dot}.cas.b128 %e2, [{at}], %e0, %e1;
    mov.b128 {{%q0, %q1}}, %e2; mov.b128 {{%z, %x}}, %e0; setp.ne.u64 %p, %q0, %z; @%p bra $again;
    bar.sync 0; ld{dot}.v2.b64 {{%q0, %q1}}, [{at}]; st.global.v2.b64 [%y], {{%q0, %q1}};"""
    x, y = np.zeros(2, np.uint64), np.zeros(2, np.uint64)
    run_ptx(text(body), "f", 1, 64, x, y, arch="sm_90a")
    assert y.tolist() == [64, 63 * 64 // 2]


def faulty(body, *arrays, machine=None):
    with pytest.raises(KernelFault) as caught:
        run_ptx(text(body), "f", 1, 32, *arrays, machine=machine or Machine("sm_90a"))
    return str(caught.value)


def test_faults_name_the_thread():
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    add = "mov.b32 %w0, 0; red.global.add.v4.f32 [%y], {%w0, %w0, %w0, %w0};"
    message = faulty(f"mad.wide.u32 %y, %t, 4, %y; {add}", x, y)
    assert "misaligned 16-byte write" in message
    assert "PTX line" in message
    message = faulty(f"mad.wide.u32 %y, %t, 16, %y; {add}", x, y)
    assert "out of bounds: 16-byte write" in message
    assert "thread (16, 0, 0), the first of 16 threads" in message
    message = faulty(f"mov.u64 %z, s; cvta.shared.u64 %y, %z; {add.replace('.global', '')}", x, y)
    assert "a vector atomic outside global memory" in message
    message = faulty(".reg .b32 %u; red.global.add.v2.f32 [%y], {%u, %u};", x, y)
    assert "register %u becomes the value of an atomic, but no instruction has set it" in message
    message = faulty("mov.b64 %q0, 0; mov.b128 %e0, {%q0, %q0}; atom.global.exch.b128 %e0, [%y+8], %e0;", x, y)
    assert "misaligned 16-byte atomic" in message


def test_vector_atomics_race_with_plain_stores_only():
    machine = Machine("sm_90a", check_global_writes=True)
    x, y = np.zeros(64, np.float32), np.zeros(64, np.float32)
    add = "mov.b32 %w0, 0; red.global.add.v4.f32 [%y], {%w0, %w0, %w0, %w0};"
    module = machine.load(text(add), "atomics")
    for a in (x, y):
        machine.memory.register(a.ctypes.data, a.nbytes, keep=a)
    machine.launch(module, "f", 2, 64, pack(module.entries["f"].params, (x, y)))
    store = "setp.eq.u32 %p, %t, 40; mov.b32 %w1, 7; @%p st.global.b32 [%y+8], %w1;"
    module = machine.load(text(add + store), "race")
    with pytest.raises(KernelFault, match="race on global memory"):
        machine.launch(module, "f", 1, 64, pack(module.entries["f"].params, (x, y)))


@pytest.mark.parametrize(
    "line",
    [
        "red.shared.add.v4.f32 [s], {%w0, %w0, %w0, %w0};",
        "red.global.add.v8.f32 [%y], {%w0, %w0, %w0, %w0, %w0, %w0, %w0, %w0};",
        "red.global.min.v2.f32 [%y], {%w0, %w0};",
        "red.global.add.v2.u32 [%y], {%w0, %w0};",
        "red.global.add.v2.f16x2 [%y], {%w0, %w0};",
        "red.global.add.v4.f32 [%y], {%w0, %w0};",
        "red.global.max.noftz.f16x2 [%y], %w0;",
        "atom.global.add.b128 %e0, [%y], %e0;",
    ],
)
def test_forms_that_do_not_exist_are_refused(line):
    with pytest.raises(UnsupportedInstruction, match=r"PTX line 9: (red|atom)"):
        run_ptx(text(f"mov.b32 %w0, 0; mov.b64 %q0, 0; mov.b128 %e0, {{%q0, %q0}};\n{line}"), "f", 1, 32,
                np.zeros(8, np.uint64), np.zeros(8, np.uint64), arch="sm_90a")  # fmt: skip
