"""PTX kernels of the conformance forms, and what runs them: the emulator, or a GPU through the driver."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np
from forms import THREADS, Form
from operands import SEED, UINT, WIDTH, operands

from dsv4_rt.cuda_device import CAPABILITIES

VERSIONS = {"sm_90a": "8.6", "sm_100a": "8.6", "sm_103a": "8.8"}  # of PTX, as old as the target allows
FILL = 0xA5
_OUT = {"b16": 16, "b32": 32, "b64": 64, "pred": 32, "mem16": 16, "mem32": 32, "mem64": 64, "mem128": 128}
_LETTERS = "abcd"


def out_width(out: str) -> int:
    """Bits a result takes in its array; a predicate takes a word of 0 or 1."""
    return _OUT[out]


def entry(form: Form, name: str) -> str:
    """The kernel of a form: load operands, run the text, store results."""
    text = re.sub(r"\$(\w+)", rf"L_\1_{name}", form.text)

    def uses(register: str) -> bool:
        return re.search(re.escape(register) + r"\b", text) is not None

    lines = [
        f".visible .entry {name}(" + ", ".join(f".param .u64 {name}_{x}" for x in "abcdrq") + ")",
        "{",
        ".reg .pred %odd, %most, %p0, %r0;",
        ".reg .b16 %h<8>;",
        ".reg .b128 %x<3>;",
        ".reg .b32 %t, %i, %lane, %s, %s0, %w0, %w1, %w2, %w3, %o, %n;",
        ".reg .b64 %g, %base, %pa, %pb, %pc, %pd, %pr, %pq;",
    ]
    for letter, kind in zip(_LETTERS, form.ins, strict=False):
        lines.append(f".reg .{'pred' if kind == 'pred' else f'b{WIDTH[kind]}'} %{letter};")
    for letter, out in zip("rq", form.outs, strict=False):
        if not out.startswith("mem"):
            lines.append(f".reg .{out} %{letter};")
    if "q" not in "rq"[: len(form.outs)] and uses("%q"):
        lines.append(".reg .b32 %q;")
    shared = uses("%s") or uses("%s0")
    if shared:
        lines.append(f".shared .align 16 .b8 {name}_shared[{16 * THREADS}];")
    lines += ["mov.u32 %t, %tid.x;", "mov.u32 %i, %ctaid.x;", "mov.u32 %n, %ntid.x;", "mad.lo.u32 %i, %i, %n, %t;"]
    if uses("%lane"):
        lines.append("mov.u32 %lane, %laneid;")
    if shared:
        lines += [f"mov.u32 %s0, {name}_shared;", "mad.lo.u32 %s, %t, 16, %s0;"]
    for letter, kind in zip(_LETTERS, form.ins, strict=False):
        width = WIDTH[kind]
        lines += [f"ld.param.u64 %base, [{name}_{letter}];", f"mad.wide.u32 %p{letter}, %i, {width // 8}, %base;"]
        if kind == "pred":
            lines += [f"ld.global.u8 %w0, [%p{letter}];", f"setp.ne.u32 %{letter}, %w0, 0;"]
        else:
            lines.append(f"ld.global.b{width} %{letter}, [%p{letter}];")
    for letter, out in zip("rq", form.outs, strict=False):
        lines += [
            f"ld.param.u64 %base, [{name}_{letter}];",
            f"mad.wide.u32 %p{letter}, %i, {out_width(out) // 8}, %base;",
        ]
    lines.append(text)
    for letter, out in zip("rq", form.outs, strict=False):
        if out == "pred":
            lines += [f"selp.b32 %o, 1, 0, %{letter};", f"st.global.b32 [%p{letter}], %o;"]
        elif not out.startswith("mem"):
            lines.append(f"st.global.{out} [%p{letter}], %{letter};")
    return "\n".join([*lines, "ret;", "}", ""])


def head(arch: str, version: str = "") -> str:
    """How a module for a target begins."""
    return f".version {max(version, VERSIONS[arch])}\n.target {arch}\n.address_size 64\n"


def ptx(forms: Iterable[Form], arch: str = "sm_90a") -> str:
    """A module with an entry f0, f1, ... for each form."""
    return head(arch) + "\n".join(entry(form, f"f{i}") for i, form in enumerate(forms))


def inputs(form: Form, seed: int = SEED) -> list[np.ndarray]:
    """The form's operand arrays."""
    return operands(form.name, form.ins, form.n, exhaustive=form.exhaustive, seed=seed)


def blank(form: Form) -> list[np.ndarray]:
    """Result arrays before the launch."""
    found = []
    for out in form.outs:
        width = out_width(out)
        array = np.full(form.n * width // 8, FILL, np.uint8).view(UINT[min(width, 64)])
        found.append(array.reshape(form.n, 2) if width == 128 else array)
    return found


Runner = Callable[[list[Form], int], dict[str, list[np.ndarray]]]


def on_emulator(forms: list[Form], seed: int = SEED, arch: str = "sm_90a") -> dict[str, list[np.ndarray]]:
    """Results by form's name."""
    from dsv4_rt.emulator import Machine

    machine = Machine(arch)
    module = machine.load(ptx(forms, arch), "conformance")
    found = {}
    for i, form in enumerate(forms):
        ins, outs = inputs(form, seed), blank(form)
        slots = [*ins, *[None] * (4 - len(ins)), *outs, *[None] * (2 - len(outs))]
        tokens = [
            machine.memory.register(a.ctypes.data, a.nbytes, label="operand", keep=a) for a in slots if a is not None
        ]
        params = b"".join((0 if a is None else a.ctypes.data).to_bytes(8, "little") for a in slots)
        try:
            machine.launch(module, f"f{i}", form.n // THREADS, THREADS, params)
        finally:
            for token in tokens:
                machine.memory.unregister(token)
        found[form.name] = outs
    return found


class Cuda:
    """The first GPU of the machine, through the driver."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self._call(driver.cuInit(0))
        device = self._call(driver.cuDeviceGet(0))
        self.name = self._call(driver.cuDeviceGetName(80, device)).decode().split("\0")[0].strip()
        self.version = self._call(driver.cuDriverGetVersion())
        attr = driver.CUdevice_attribute
        major = self._call(driver.cuDeviceGetAttribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device))
        minor = self._call(driver.cuDeviceGetAttribute(attr.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device))
        self.arch = CAPABILITIES[major, minor]
        self._call(driver.cuCtxSetCurrent(self._call(driver.cuDevicePrimaryCtxRetain(device))))
        self._buffers = [int(self._call(driver.cuMemAlloc(65536 * 8))) for _ in range(6)]

    def _call(self, result):  # type: ignore[no-untyped-def]
        status, *rest = result
        if int(status) != 0:
            raise RuntimeError(f"driver: {status!r}")
        return rest[0] if len(rest) == 1 else rest or None

    def run(self, forms: list[Form], seed: int = SEED) -> dict[str, list[np.ndarray]]:
        """Results by form's name, all forms in one module that the driver compiles."""
        d = self.driver
        module = self._call(d.cuModuleLoadData(ptx(forms, self.arch).encode() + b"\0"))
        params = np.array(self._buffers, np.uint64)
        pointers = np.array([params.ctypes.data + 8 * i for i in range(6)], np.uint64)
        found = {}
        for i, form in enumerate(forms):
            ins, outs = inputs(form, seed), blank(form)
            for buffer, array in [*zip(self._buffers, ins, strict=False), *zip(self._buffers[4:], outs, strict=False)]:
                self._call(d.cuMemcpyHtoD(buffer, array.ctypes.data, array.nbytes))
            function = self._call(d.cuModuleGetFunction(module, f"f{i}".encode()))
            grid = form.n // THREADS
            self._call(d.cuLaunchKernel(function, grid, 1, 1, THREADS, 1, 1, 0, 0, int(pointers.ctypes.data), 0))
            self._call(d.cuCtxSynchronize())
            for buffer, array in zip(self._buffers[4:], outs, strict=False):
                self._call(d.cuMemcpyDtoH(array.ctypes.data, buffer, array.nbytes))
            found[form.name] = outs
        self._call(d.cuModuleUnload(module))
        return found
