"""CUDA's mathematical functions as NVRTC expands them: long programs of fma in four roundings, tables and branches.

The CUDA C++ Programming Guide's accuracy tables give at most 10 ulp for the functions below (tgamma), most of them one
or two; a wrongly translated instruction shows as far more. tests/conformance/launches.py compares bits with a GPU.
"""

import math

import numpy as np
import pytest
from programs import compile_ptx, run_ptx

ULP = 10
vector = {name: np.vectorize(getattr(math, name), otypes=[np.float64]) for name in ("erf", "erfc", "gamma")}
# name without the f of the float form: (reference in float64, ends of the arguments)
FUNCTIONS = {
    "exp": (np.exp, (-80, 80)), "exp2": (np.exp2, (-120, 120)), "exp10": (lambda x: 10.0**x, (-30, 30)),
    "expm1": (np.expm1, (-5, 80)), "log": (np.log, (1e-6, 1e6)), "log2": (np.log2, (1e-6, 1e6)),
    "log10": (np.log10, (1e-6, 1e6)), "log1p": (np.log1p, (-0.9, 1e6)), "sin": (np.sin, (-3e5, 3e5)),
    "cos": (np.cos, (-3e5, 3e5)), "tan": (np.tan, (-100, 100)), "asin": (np.arcsin, (-1, 1)),
    "acos": (np.arccos, (-1, 1)), "atan": (np.arctan, (-50, 50)), "sinh": (np.sinh, (-50, 50)),
    "cosh": (np.cosh, (-50, 50)), "tanh": (np.tanh, (-6, 6)), "asinh": (np.arcsinh, (-1e4, 1e4)),
    "acosh": (np.arccosh, (1, 1e4)), "atanh": (np.arctanh, (-0.99, 0.99)), "cbrt": (np.cbrt, (-1e4, 1e4)),
    "sqrt": (np.sqrt, (0, 1e6)), "rsqrt": (lambda x: 1 / np.sqrt(x), (1e-6, 1e6)), "erf": (vector["erf"], (-3, 3)),
    "erfc": (vector["erfc"], (-3, 6)), "tgamma": (vector["gamma"], (0.1, 30)),
}  # fmt: skip
PAIRS = {
    "pow": (np.power, (0.01, 20), (-9, 9)), "atan2": (np.arctan2, (-9, 9), (-9, 9)),
    "hypot": (np.hypot, (-1e3, 1e3), (-1e3, 1e3)), "fmod": (np.fmod, (-1e6, 1e6), (0.1, 9)),
    "fdim": (lambda x, y: np.maximum(x - y, 0), (-9, 9), (-9, 9)), "divide": (np.divide, (-9, 9), (0.1, 9)),
    "remainder": (np.vectorize(math.remainder, otypes=[np.float64]), (-1e6, 1e6), (0.1, 9)),
}  # fmt: skip
EXACT = {"sqrt", "fmod", "remainder", "fdim", "divide"}  # rounded correctly
KINDS = {"float": ("f", np.float32), "double": ("", np.float64)}


def source():
    lines = ["__device__ float dividef(float x, float y) { return x / y; }",
             "__device__ double divide(double x, double y) { return x / y; }"]  # fmt: skip
    for kind, (tail, _) in KINDS.items():
        for name in (*FUNCTIONS, *PAIRS):
            call = f"{name}{tail}(x[t]{', y[t]' if name in PAIRS else ''})"
            lines.append(
                f'extern "C" __global__ void {kind}_{name}(const {kind}* x, const {kind}* y, {kind}* r) '
                f"{{ const int t = blockIdx.x * blockDim.x + threadIdx.x; r[t] = {call}; }}"
            )
    return "\n".join(lines)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FUNCTIONS, *PAIRS])
def test_function(name, kind, rng):
    dtype = KINDS[kind][1]
    reference, *domains = FUNCTIONS.get(name) or PAIRS[name]
    x, y = (rng.uniform(*(domains[-1] if i else domains[0]), 256).astype(dtype) for i in range(2))
    got = np.full(256, np.nan, dtype)
    run_ptx(compile_ptx(source(), "sm_90a"), f"{kind}_{name}", 2, 128, x, y, got, arch="sm_90a")
    arguments = [x.astype(np.float64), y.astype(np.float64)][: len(domains)]
    want = reference(*arguments)
    if name in EXACT:
        rounded = reference(*arguments).astype(dtype) if kind == "float" and name != "fdim" else None
        rounded = np.maximum(x - y, dtype(0)) if name == "fdim" else want if rounded is None else rounded
        np.testing.assert_array_equal(got, rounded)
        return
    # NumPy's and the C library's own error in double is about an ulp, inside the margin above.
    ulps = np.abs(got - want) / np.spacing(np.abs(want).astype(dtype)).astype(np.float64)
    assert ulps.max() <= ULP, f"{ulps.max():.1f} ulp at {[float(a[ulps.argmax()]) for a in arguments]}"
