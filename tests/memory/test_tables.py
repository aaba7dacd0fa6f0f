"""Device tables: what is marked arrives, nothing else moves, and no failure loses a mark."""

import numpy as np
import pytest
from storages import keep_busy

from dsv4_rt import ArgumentError, LaunchError
from dsv4_rt.arrays import view
from dsv4_rt.launch import Prepared
from dsv4_rt.memory.tables import Tables

B, BLOCKS, WIDTH, TOKENS = 9, 37, 5, 300
CACHES = ("window", "csa", "index", "hca")
NAMES = (*(f"slots.{name}" for name in CACHES), "full", "window", "lengths", "state", "token_rows", "positions")


def make(device, **changes):
    sizes = {"max_sequences": B, "max_blocks": BLOCKS, "window_width": WIDTH, "max_tokens": TOKENS, "caches": CACHES}
    return Tables(device, **{**sizes, **changes})


def mirror(tables, name):
    return tables.slots[name[6:]] if name.startswith("slots.") else getattr(tables, name)


def assert_current(device, tables):
    for name in NAMES:
        assert np.array_equal(device.numpy(tables.device(name)), mirror(tables, name)), name


def change(rng, tables, name, n):
    """Change n random elements of a mirror; which they are."""
    table = mirror(tables, name)
    flat = rng.integers(0, table.size, n)
    top = 2**62 if table.dtype == np.int64 else 2**31 - 1
    table.reshape(-1)[flat] = rng.integers(-top, top, n)
    return flat


def test_shapes_dtypes_and_first_contents(device):
    tables = make(device)
    shapes = {"full": (B, BLOCKS), "window": (B, WIDTH), "lengths": (B,), "state": (B,)}
    for name in NAMES:
        found = view(tables.device(name))
        assert found.shape == shapes.get(name, (TOKENS,))
        assert found.dtype == (np.int64 if name.startswith("slots") else np.int32)
        assert found.ptr % 128 == 0
        assert (device.numpy(tables.device(name)) == (-1 if name.startswith(("slots", "positions")) else 0)).all()
    assert_current(device, tables)
    assert tables.nbytes >= sum(mirror(tables, name).nbytes for name in NAMES)


def test_what_is_marked_arrives(device, rng):
    tables = make(device)
    for _ in range(5):  # more than there are staging buffers
        for name in rng.permutation(NAMES)[: rng.integers(1, len(NAMES))]:
            tables.mark(name, change(rng, tables, name, rng.integers(0, 40)))
        for name in rng.permutation(NAMES)[:4]:
            table = mirror(tables, name)
            start, stop = sorted(rng.integers(0, table.size + 1, 2).tolist())
            table.reshape(-1)[start:stop] = rng.integers(-9, 9, stop - start)
            tables.mark_range(name, start, stop)
        tables.upload()
        assert_current(device, tables)


def test_only_what_is_marked_moves(device):
    tables = make(device)
    tables.full[:] = 7
    tables.lengths[:] = 8
    tables.mark("full", np.array([0, BLOCKS + 1, B * BLOCKS - 1]))
    tables.mark_range("lengths", 2, 4)
    tables.upload()
    full, lengths = np.zeros((B, BLOCKS), np.int32), np.zeros(B, np.int32)
    full[0, 0] = full[1, 1] = full[-1, -1] = 7
    lengths[2:4] = 8
    assert np.array_equal(device.numpy(tables.device("full")), full)
    assert np.array_equal(device.numpy(tables.device("lengths")), lengths)


def test_the_value_is_read_at_upload(device):
    tables = make(device)
    tables.mark("state", np.array([3]))
    tables.state[3] = 5
    tables.upload()
    assert device.numpy(tables.device("state"))[3] == 5


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_marks_are_copied_and_may_repeat(device, dtype):
    tables = make(device)
    indices = np.array([4, 4, 8, 4], dtype)
    tables.mark("state", indices)
    tables.mark("slots.csa", indices)
    tables.mark_range("state", 0, B)
    indices[:] = 0
    tables.state[:] = np.arange(B)
    tables.slots["csa"][[4, 8]] = 2**40, -(2**40)
    tables.upload()
    assert_current(device, tables)


def test_bytes_staged_follow_what_changed(emulator):
    tables = make(emulator)
    tables.mark("lengths", np.arange(5))
    assert tables.upload() == 5 * 8  # word and value
    tables.mark("slots.csa", np.arange(5))
    assert tables.upload() == 10 * 8  # two words a slot
    tables.mark_range("positions", 0, 31)
    assert tables.upload() == 31 * 8  # too short for a run
    tables.mark_range("positions", 10, 138)
    assert tables.upload() == 128 * 4 + 8
    tables.mark_range("slots.hca", 0, 65)
    assert tables.upload() == 130 * 4 + 2 * 8
    for width in (10, 1000, 100_000):  # not what could have changed
        wide = make(emulator, max_blocks=width)
        wide.mark("full", np.array([3, width + 3]))
        assert wide.upload() == 16


def test_nothing_marked_launches_nothing(emulator, monkeypatch):
    tables = make(emulator)
    monkeypatch.setattr(Prepared, "launch", None)
    tables.mark("full", np.array([], np.int64))
    tables.mark_range("full", 5, 5)
    assert tables.upload() == 0


def test_one_launch_for_all_groups(emulator, rng, monkeypatch):
    tables, names, launch = make(emulator), [], Prepared.launch
    monkeypatch.setattr(Prepared, "launch", lambda self, *args: (names.append(self.kernel.name), launch(self, *args)))
    for name in NAMES:
        tables.mark(name, change(rng, tables, name, 3))
        tables.mark_range(name, 0, mirror(tables, name).size)
    tables.upload()
    assert names == ["upload_deltas<4>"]
    assert_current(emulator, tables)


def test_many_marks_before_one_upload(emulator, rng):
    """Marks pile up where nobody uploads: repeated ones go, runs that touch become one."""
    tables = make(emulator)
    for _ in range(300):
        for name in ("full", "slots.csa"):
            tables.mark(name, change(rng, tables, name, 50))
        tables.mark_range("positions", 0, TOKENS)
        tables.mark_range("slots.hca", 10, 200)
        tables.mark_range("slots.hca", 100, 300)
        tables.mark_range("token_rows", 0, 40)
    staged = tables.upload()
    assert_current(emulator, tables)
    assert staged < 3 * tables.nbytes
    assert tables.upload() == 0


def test_addresses_never_change(device, rng):
    tables = make(device)
    before = {name: view(tables.device(name)).ptr for name in NAMES}
    for _ in range(4):
        tables.mark_range("full", 0, B * BLOCKS)
        tables.mark("full", change(rng, tables, "full", 3000))  # the staging buffer has to grow
        tables.upload()
    assert {name: view(tables.device(name)).ptr for name in NAMES} == before


def test_a_failed_upload_keeps_its_marks(device, rng, monkeypatch):
    tables = make(device)
    tables.mark("full", change(rng, tables, "full", 20))
    tables.mark_range("slots.csa", 0, TOKENS)
    tables.slots["csa"][:] = rng.integers(0, 2**40, TOKENS)
    was = device.numpy(tables.device("full"))

    def fail(self, *args):
        raise LaunchError("injected")

    for _ in range(3):
        with monkeypatch.context() as patched:
            patched.setattr(Prepared, "launch", fail)
            with pytest.raises(LaunchError, match="injected"):
                tables.upload()
        assert np.array_equal(device.numpy(tables.device("full")), was)
    tables.state[2] = 6  # and later marks join them
    tables.mark("state", np.array([2]))
    assert tables.upload() > 0
    assert_current(device, tables)
    assert tables.upload() == 0


def test_a_failure_after_the_launch_keeps_its_marks_too(device, rng, monkeypatch):
    from dsv4_rt.memory.staging import Staging

    tables = make(device)
    tables.mark("full", change(rng, tables, "full", 20))

    def fail(self, *args):
        raise LaunchError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(Staging, "sent", fail)
        with pytest.raises(LaunchError, match="injected"):
            tables.upload()
    tables.mark("full", change(rng, tables, "full", 20))
    assert tables.upload() > 0
    assert_current(device, tables)


def test_says_what_is_wrong_and_marks_nothing(emulator):
    tables = make(emulator)
    for name, bad in (("full", [B * BLOCKS]), ("full", [-1]), ("lengths", [0, B]), ("slots.csa", [TOKENS])):
        with pytest.raises(ArgumentError, match=rf"Tables\.mark: '{name}' has elements 0 to"):
            tables.mark(name, np.array(bad))
    with pytest.raises(ArgumentError, match=r"Tables\.mark: 'full' has elements 0 to 332; float64"):
        tables.mark("full", np.array([1.0]))
    with pytest.raises(ArgumentError, match=r"Tables\.mark_range: 'full' has elements 0 to 332; 5 \.\. 4 given"):
        tables.mark_range("full", 5, 4)
    with pytest.raises(ArgumentError, match=r"5 \.\. 10 given"):
        tables.mark_range("lengths", 5, 10)
    with pytest.raises(ArgumentError, match=r"no table 'swa'; there are slots\.window"):
        tables.mark("swa", np.array([0]))
    with pytest.raises(ArgumentError, match="no table 'swa'"):
        tables.device("swa")
    assert tables.upload() == 0
    with pytest.raises(ArgumentError, match="Tables: max_blocks = 0 must be an integer from 1"):
        make(emulator, max_blocks=0)
    with pytest.raises(ArgumentError, match="fewer than 2\\^31 can be addressed"):
        make(emulator, max_sequences=2**16, max_blocks=2**16)
    with pytest.raises(ArgumentError, match="count = 0 must be"):
        make(emulator, steps_in_flight=0)


# On a GPU: time passes between the launch and the read.


@pytest.mark.gpu
def test_is_refused_where_a_capture_forbids_it(gpu):
    """Another stream's capture forbids work on the legacy default stream: said, and the capture goes on."""
    import cupy

    tables = make(gpu)
    tables.full[:] = 3
    tables.mark_range("full", 0, B * BLOCKS)
    blocking, out = cupy.cuda.Stream(), cupy.zeros(8, np.int32)
    with blocking:
        cupy.add(out, 1, out=out)
        blocking.synchronize()
        blocking.begin_capture()
        cupy.add(out, 1, out=out)
        with pytest.raises(LaunchError, match=r"Tables\.upload: the stream is being captured"):
            tables.upload(stream=0)
        graph = blocking.end_capture()
        graph.launch(blocking)
        blocking.synchronize()
    assert (gpu.numpy(out) == 2).all()
    assert tables.upload() > 0
    assert_current(gpu, tables)


@pytest.mark.gpu
@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_a_buffer_is_not_overwritten_while_its_upload_may_still_read_it(gpu, rng, steps_in_flight):
    """Uploads queue behind a kernel that spins, each followed by a copy of the tables: every copy shows its step."""
    import cupy

    tables = make(gpu, steps_in_flight=steps_in_flight)
    seen, want = [], []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        copies = [cupy.empty((B, BLOCKS), np.int32) for _ in range(8)]
        for copy in copies:  # compiles what the loop below must not wait for
            tables.mark_range("full", 0, B * BLOCKS)
            tables.upload()
            copy[...] = tables.device("full")
        stream.synchronize()
        keep_busy(gpu, stream)
        for step, copy in enumerate(copies):
            tables.full[:] = 100 * step + np.arange(BLOCKS)
            tables.mark_range("full", 0, B * BLOCKS)
            tables.mark("state", change(rng, tables, "state", 3))
            tables.upload()
            copy[...] = tables.device("full")
            seen.append(copy)
            want.append(tables.full.copy())
        stream.synchronize()
    for got, wanted in zip(seen, want, strict=True):
        assert np.array_equal(gpu.numpy(got), wanted)
    assert_current(gpu, tables)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_uploads_that_have_buffers(gpu):
    import time

    import cupy

    tables = make(gpu, steps_in_flight=2)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        tables.mark_range("full", 0, B * BLOCKS)
        tables.upload()
        stream.synchronize()
        keep_busy(gpu, stream, milliseconds=400)
        start = time.perf_counter()
        for _ in range(2):
            tables.mark_range("full", 0, B * BLOCKS)
            tables.upload()
        assert time.perf_counter() - start < 0.2
        stream.synchronize()


@pytest.mark.gpu
def test_a_captured_graph_reads_what_was_uploaded_last(gpu, rng):
    import cupy

    tables = make(gpu)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        full, slots = tables.device("full"), tables.device("slots.csa")
        double, next_slot = cupy.zeros((B, BLOCKS), np.int32), cupy.zeros(TOKENS, np.int64)
        cupy.multiply(full, 2, out=double)  # compiled before the capture
        cupy.add(slots, 1, out=next_slot)
        stream.begin_capture()
        cupy.multiply(full, 2, out=double)
        cupy.add(slots, 1, out=next_slot)
        tables.mark("state", np.array([0]))
        with pytest.raises(LaunchError, match=r"Tables\.upload: the stream is being captured"):
            tables.upload()
        graph = stream.end_capture()
        for _ in range(5):
            tables.full[:] = rng.integers(0, 1000, (B, BLOCKS))
            tables.mark_range("full", 0, B * BLOCKS)
            tables.mark("slots.csa", change(rng, tables, "slots.csa", 9))
            tables.upload()
            graph.launch(stream)
            stream.synchronize()
            assert np.array_equal(gpu.numpy(double), 2 * tables.full)
            assert np.array_equal(gpu.numpy(next_slot), tables.slots["csa"] + 1)
    assert_current(gpu, tables)


def test_one_element_is_marked_like_many(device, rng):
    tables = make(device)
    for name in NAMES:
        table = mirror(tables, name)
        at = int(rng.integers(0, table.size))
        table.reshape(-1)[at] += 7
        tables.mark_one(name, at)
    assert tables.marked
    tables.upload()
    assert not tables.marked
    assert_current(device, tables)
    for _ in range(5000):  # more marks than there is room for at first
        tables.mark_one("slots.csa", TOKENS - 1)
    for index in (-1, TOKENS):
        with pytest.raises(
            ArgumentError, match=rf"mark_one: 'slots.csa' has elements 0 to {TOKENS - 1}; {index} given"
        ):
            tables.mark_one("slots.csa", index)
