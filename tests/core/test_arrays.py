"""arrays.py: every framework goes in without a copy and comes out as its own kind."""

import numpy as np
import pytest

import dsv4_rt
from dsv4_rt import ArgumentError, activation_topk
from dsv4_rt.arrays import stream_handle, view
from dsv4_rt.formats import BF16

N, E = 3, 64


class Foreign:
    """DLPack and nothing else; counts what it was asked."""

    def __init__(self, array):
        self.array = array
        self.asked = []

    def __dlpack__(self, **options):
        self.asked.append(options)
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OldForeign(Foreign):
    """DLPack before 1.0: knows no max_version, dl_device or copy."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__() if stream is None else self.array.__dlpack__(stream=stream)


class Interface:
    """`__cuda_array_interface__` and nothing else."""

    def __init__(self, array, **changes):
        self.keep = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__ | changes


def inputs(rng):
    return rng.standard_normal((N, E), dtype=np.float32), rng.standard_normal(E, dtype=np.float32)


def same(device, got, x, b):
    want = activation_topk(device.array(x), device.array(b), 4)
    for a, w in zip(got, want, strict=True):
        assert np.array_equal(device.numpy(a), device.numpy(w))


def test_numpy_view_is_the_array_itself():
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::2, 1:]
    v = view(x)
    assert (v.ptr, v.shape, v.strides, v.dtype, v.on) == (x.ctypes.data, (2, 2, 3), (12, 8, 1), np.int32, "host memory")
    assert v.span == ((12 + 8 + 2) + 1) * 4


def test_view_of_reversed_rows_starts_at_the_lowest_address():
    x = np.zeros((4, 8), np.float32)
    v = view(x[::-1])
    assert v.first_byte == x.ctypes.data
    assert v.span == x.nbytes


@pytest.mark.parametrize("producer", [Foreign, OldForeign])
def test_any_dlpack_producer(device, rng, producer):
    x, b = inputs(rng)
    foreign = producer(device.array(x))
    assert view(foreign).ptr == view(foreign.array).ptr
    same(device, activation_topk(foreign, producer(device.array(b)), 4), x, b)
    assert all(asked.get("stream") in (None, -1) for asked in foreign.asked)  # no synchronisation asked for


def test_torch_goes_in_and_comes_out(device, rng, torch):
    x, b = inputs(rng)
    where = "cpu" if device.kind == "emulator" else "cuda:0"
    t = torch.from_numpy(x).to(where)
    weights, ids = activation_topk(t, torch.from_numpy(b).to(where), 4)
    assert isinstance(weights, torch.Tensor)
    assert weights.device == t.device
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert view(t).ptr == t.data_ptr()
    same(device, (weights.cpu().numpy(), ids.cpu().numpy()), x, b)


def test_torch_bfloat16_and_float8_are_read(torch):
    assert view(torch.zeros(3, dtype=torch.bfloat16)).dtype == BF16
    assert view(torch.zeros(3, dtype=torch.float8_e4m3fn)).dtype == np.uint8


def test_torch_tensors_without_plain_memory_are_refused(torch):
    for tensor, message in [
        (torch.zeros(3, 3).to_sparse(), "has no plain memory"),
        (torch.zeros(3, device="meta"), "has no plain memory"),
        (torch._neg_view(torch.zeros(3)), "lazily negated"),
        (torch.zeros(3, dtype=torch.complex64), "no kernel reads that dtype"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            view(tensor)


def test_outputs_may_be_of_another_framework_than_the_inputs(device, rng, torch):
    x, b = inputs(rng)
    where = "cpu" if device.kind == "emulator" else "cuda:0"
    out = (torch.empty((N, 4), device=where), torch.empty((N, 4), dtype=torch.int32, device=where))
    weights, ids = activation_topk(device.array(x), device.array(b), 4, out=out)
    assert weights is out[0]
    same(device, (weights.cpu().numpy(), ids.cpu().numpy()), x, b)


def test_read_only_inputs_are_fine_and_outputs_are_not(emulator, rng):
    x, b = inputs(rng)
    x.flags.writeable = b.flags.writeable = False
    weights, ids = activation_topk(x, b, 4)
    ids.flags.writeable = False
    with pytest.raises(ArgumentError, match="ids does not fit(.|\n)*is read-only"):
        activation_topk(x, b, 4, out=(weights, ids))


def test_what_is_no_array_is_said_so(emulator):
    with pytest.raises(ArgumentError, match="str is no array: give CuPy, torch, NumPy"):
        view("abc")


class Stream:
    def __init__(self, version, handle):
        self._answer = (version, handle)

    def __cuda_stream__(self):
        return self._answer


def test_streams_of_every_kind():
    assert stream_handle(5) == 5
    assert stream_handle(Stream(0, 77)) == 77
    with pytest.raises(ArgumentError, match="protocol version 1"):
        stream_handle(Stream(1, 77))
    with pytest.raises(ArgumentError, match="str is no CUDA stream"):
        stream_handle("main")


def test_host_arrays_on_a_gpu_are_refused_with_a_way_out(gpu):
    x = np.zeros((N, E), np.float32)
    with pytest.raises(
        ArgumentError, match=r"(?s)logits is in host memory and kernels run on cuda:0.*DSV4_RT_DEVICE=emulator"
    ):
        activation_topk(x, np.zeros(E, np.float32), 4)
    with pytest.raises(
        ArgumentError, match=r"e_bias does not fit(.|\n)*is on host memory, the first argument on cuda:0"
    ):
        activation_topk(gpu.array(x), np.zeros(E, np.float32), 4)


def test_gpu_arrays_on_the_emulator_are_refused_with_a_way_out(gpu):
    x, b = gpu.array(np.zeros((N, E), np.float32)), gpu.array(np.zeros(E, np.float32))
    with (
        dsv4_rt.use_device("emulator"),
        pytest.raises(ArgumentError, match="logits is on cuda:0, kernels run on the emulated"),
    ):
        activation_topk(x, b, 4)


def test_cuda_array_interface(gpu, rng):
    x, b = inputs(rng)
    same(gpu, activation_topk(Interface(gpu.array(x)), Interface(gpu.array(b)), 4), x, b)
    out = (gpu.empty((N, 4), np.float32), gpu.empty((N, 4), np.int32))
    locked = Interface(out[1], data=(out[1].data.ptr, True))
    with pytest.raises(ArgumentError, match="ids does not fit(.|\n)*is read-only"):
        activation_topk(gpu.array(x), gpu.array(b), 4, out=(out[0], locked))


def test_jax_and_numba_come_back_as_their_own(gpu, rng):
    x, b = inputs(rng)
    jax = pytest.importorskip("jax")
    weights, ids = activation_topk(
        jax.numpy.asarray(x).block_until_ready(), jax.numpy.asarray(b).block_until_ready(), 4
    )
    assert isinstance(ids, jax.Array)
    same(gpu, (np.asarray(weights), np.asarray(ids)), x, b)
    cuda = pytest.importorskip("numba.cuda")
    weights, ids = activation_topk(cuda.to_device(x), cuda.to_device(b), 4)
    assert type(ids).__module__.startswith("numba")
    same(gpu, (weights.copy_to_host(), ids.copy_to_host()), x, b)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_the_callers_current_stream_is_used(gpu, rng, library):
    """Work behind a long kernel on a side stream: on any other stream the copy would be read too early."""
    import cupy

    x, b = inputs(rng)
    late, bias = gpu.array(np.zeros((N, E), np.float32)), gpu.array(b)
    source, big = gpu.array(x), cupy.ones((8192, 8192), cupy.float32)
    gpu.synchronize()
    if library == "cupy":
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            for _ in range(5):
                big @ big
            late[...] = source
            got = activation_topk(late, bias, 4)
        explicit = activation_topk(late, bias, 4, stream=stream)
        stream.synchronize()
        same(gpu, explicit, x, b)
    else:
        torch = pytest.importorskip("torch")
        t, tb = torch.zeros((N, E), device="cuda"), torch.from_numpy(b).cuda()
        slow, t_source = torch.ones((8192, 8192), device="cuda"), torch.from_numpy(x).cuda()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                slow @ slow
            t.copy_(t_source)
            got = activation_topk(t, tb, 4)
        explicit = activation_topk(t, tb, 4, stream=stream)
        stream.synchronize()
        same(gpu, [a.cpu().numpy() for a in explicit], x, b)
        got = [a.cpu().numpy() for a in got]
    same(gpu, got, x, b)


def test_operation_in_a_cuda_graph(gpu, rng):
    import cupy

    x, b = inputs(rng)
    logits, bias = gpu.array(x), gpu.array(b)
    out = (gpu.empty((N, 4), np.float32), gpu.empty((N, 4), np.int32))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        activation_topk(logits, bias, 4, out=out)
        graph = stream.end_capture()
        y = rng.standard_normal((N, E), dtype=np.float32)
        logits[...] = gpu.array(y)
        graph.launch(stream)
        stream.synchronize()
    same(gpu, out, y, b)


class Copying(Foreign):
    """Exports a fresh copy each time, as DLPack allows unless copy=False is asked for."""

    def __dlpack__(self, **options):
        if options.get("copy") is False:
            raise BufferError("this array cannot be exported without a copy")
        return self.array.copy().__dlpack__()


class OldCopying(OldForeign):
    def __dlpack__(self, stream=None):
        return self.array.copy().__dlpack__()


@pytest.mark.parametrize("producer", [Copying, OldCopying])
def test_a_producer_that_copies_is_refused(emulator, rng, producer):
    x, b = inputs(rng)
    with pytest.raises(ArgumentError, match=r"opying: __dlpack__ (cannot export its own memory|exports a copy)"):
        activation_topk(producer(x), b, 4)


def test_bfloat16_through_bare_dlpack(emulator, torch):
    scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    values, ids = dsv4_rt.topk_select(Foreign(scores), 2)
    assert ids.tolist() == [[1, 2]]
    assert values.dtype == BF16
    assert view(Foreign(torch.zeros(3, dtype=torch.float64))).dtype == np.float64
    with pytest.raises(ArgumentError, match="no kernel reads that"):
        view(Foreign(torch.zeros(3, dtype=torch.complex32)))


def test_arguments_that_are_missing_or_no_arrays(emulator, rng, torch):
    x, b = inputs(rng)
    with pytest.raises(ArgumentError, match="activation_topk: e_bias is None"):
        activation_topk(x, None)
    with pytest.raises(ArgumentError, match="hash_router: token_ids is None"):
        dsv4_rt.hash_router(None, None)
    with pytest.raises(ArgumentError, match=r"out is a int; give \(weights, ids\)"):
        activation_topk(x, b, 4, out=5)
    with pytest.raises(ArgumentError, match="has no plain memory"):
        activation_topk(torch.zeros(3, 64).to_sparse(), b, 4)
    with pytest.raises(ArgumentError, match="str is no CUDA stream"):
        activation_topk(x, b, 4, stream="nonsense")
    with pytest.raises(ArgumentError, match="unhashable type: 'list' among the settings"):
        activation_topk(x, b, 4, pdl=[1])


CHANGES = {
    "strides": lambda x: np.ascontiguousarray(np.repeat(x, 2, axis=0))[::2],
    "alignment": lambda x: np.concatenate([np.zeros(1, x.dtype), x.ravel()])[1:].reshape(x.shape),
    "both": lambda x: np.pad(x, ((0, 0), (1, 2)))[:, 1:-2],
    "none": lambda x: x.copy(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("wrap", ["numpy", "torch", "dlpack"])
def test_a_known_call_looks_again_when_one_fact_changes(emulator, rng, torch, wrap, change):
    """The fast path must not take a plan made for other strides or another alignment."""
    convert = {"numpy": lambda x: x, "torch": torch.from_numpy, "dlpack": Foreign}[wrap]
    x, b = inputs(rng)
    aligned = emulator.array(x)
    changed = CHANGES[change](x)
    for given in (aligned, changed, aligned, changed):
        same(emulator, [np.asarray(a) for a in activation_topk(convert(given), convert(b), 4)], x, b)


def test_a_known_call_looks_again_at_writability_and_dtype(emulator, rng):
    x, b = inputs(rng)
    for wrap in (lambda a: a, Foreign):
        out = (np.empty((N, 4), np.float32), np.empty((N, 4), np.int32))
        activation_topk(x, b, 4, out=tuple(wrap(a) for a in out))
        out[1].flags.writeable = False
        with pytest.raises(ArgumentError, match=r"read-only|cannot export"):
            activation_topk(x, b, 4, out=tuple(wrap(a) for a in out))
    with pytest.raises(ArgumentError, match="dtype must be float32"):
        activation_topk(x.view(np.int32), b, 4)


def test_a_plan_for_host_arrays_is_not_taken_for_device_arrays(emulator, rng):
    """Producers such as JAX have one type for both."""
    x, b = inputs(rng)

    class Anywhere(Foreign):
        on_gpu = False

        @property
        def __cuda_array_interface__(self):
            if not self.on_gpu:
                raise AttributeError
            return {"data": (0, False), "shape": self.array.shape, "typestr": "<f4", "version": 3, "strides": None}

    logits = Anywhere(x)
    activation_topk(logits, b, 4)
    logits.on_gpu = True
    with pytest.raises(ArgumentError, match=r"logits is on cuda:0|e_bias does not fit"):
        activation_topk(logits, b, 4)


def test_the_emulator_forgets_host_arrays_after_every_launch(emulator, rng):
    x, b = inputs(rng)
    activation_topk(x, b, 4)
    assert emulator.machine.memory._foreign == {}
