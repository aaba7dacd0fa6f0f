"""Which launches are recorded, replayed and forgotten; on a GPU, that a replay does what the launches did."""

from pathlib import Path

import numpy as np
import pytest

from dsv4_rt.replay import CALLS_BEFORE, MOST, Replays


class Counted:
    """A launch that remembers what it was given."""

    def __init__(self):
        self.calls = []

    def launch(self, pointers, stream=0, views=()):
        self.calls.append((tuple(pointers), stream))


class Recorder:
    """A device that records by calling once, on stream 99."""

    def __init__(self):
        self.capturing, self.replayed = False, []

    def is_capturing(self, stream):
        return self.capturing

    def record(self, run):
        number = run(99)
        return lambda stream: self.replayed.append((number, stream))


@pytest.fixture
def made():
    device, behind = Recorder(), Counted()
    replays = Replays(device)
    return device, behind, replays, replays.wrap(behind)


def test_replays_what_came_often_enough(made):
    device, behind, replays, launch = made
    for _ in range(CALLS_BEFORE):
        launch.launch([16, 32], 7)
    assert behind.calls == [((16, 32), 7)] * CALLS_BEFORE
    assert len(replays) == 0
    for _ in range(3):
        launch.launch([16, 32], 7)
    assert behind.calls[CALLS_BEFORE:] == [((16, 32), 99)]  # recorded once
    assert device.replayed == [(None, 7)] * 3
    assert len(replays) == 1


def test_other_addresses_and_other_launches_are_others(made):
    device, behind, replays, launch = made
    another = Counted()
    for i in range(3 * CALLS_BEFORE):
        launch.launch([i], 0)
    for _ in range(CALLS_BEFORE):
        launch.launch([-1], 0)
        replays.wrap(another).launch([-1], 0)
    assert not device.replayed
    assert len(behind.calls) == 4 * CALLS_BEFORE
    assert len(another.calls) == CALLS_BEFORE


def test_a_capture_gets_the_launches_themselves(made):
    device, behind, _, launch = made
    for _ in range(CALLS_BEFORE + 1):
        launch.launch([16], 7)
    device.capturing = True
    launch.launch([16], 8)
    assert behind.calls[-1] == ((16,), 8)
    assert device.replayed == [(None, 7)]


def test_forgets_the_least_recently_used(made):
    device, _, replays, launch = made
    for _ in range(CALLS_BEFORE + 1):
        for i in range(MOST):
            launch.launch([i], 0)
    assert len(replays) == MOST
    launch.launch([0], 0)
    launch.launch([-1], 0)  # one too many: the graph of 1 goes, the oldest, not that of 0
    assert len(replays) == MOST - 1
    before = len(device.replayed)
    launch.launch([0], 0)
    assert len(device.replayed) == before + 1
    launch.launch([1], 0)
    assert len(device.replayed) == before + 1


def test_more_addresses_in_turn_than_are_kept_are_never_recorded(made):
    device, _, replays, launch = made
    for _ in range(3 * CALLS_BEFORE):
        for i in range(MOST + 1):
            launch.launch([i], 0)
    assert not device.replayed
    assert len(replays) == 0


def test_clear_forgets_the_graphs(made):
    device, behind, replays, launch = made
    for _ in range(CALLS_BEFORE + 1):
        launch.launch([16], 0)
    replays.clear()
    launch.launch([16], 0)
    assert len(device.replayed) == 1
    assert behind.calls[-1] == ((16,), 0)


@pytest.mark.gpu
def test_a_recording_launches_what_was_launched(gpu):
    import cupy

    from dsv4_rt.launch import POINTER, load

    ready = load(str(Path(__file__).with_name("probe.cu")), "waits", gpu).prepare(1, 64, POINTER)
    x = gpu.array(np.arange(64, dtype=np.int32))
    gpu.synchronize()
    replay = gpu.record(lambda stream: [ready.launch([x.data.ptr], stream) for _ in range(3)])
    assert x.get()[5] == 5  # nothing ran yet
    stream = cupy.cuda.Stream(non_blocking=True)
    replay(stream.ptr)
    replay(stream.ptr)
    gpu.synchronize()
    assert np.array_equal(x.get(), np.arange(64) + 6)
    assert not gpu.is_capturing(stream.ptr)
    with stream:
        stream.begin_capture()
        assert gpu.is_capturing(stream.ptr)
        stream.end_capture()


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_nothing_behind(gpu):
    def fail(stream):
        raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        gpu.record(fail)
    gpu.record(lambda stream: None)(0)  # the stream of recordings is free again
    gpu.synchronize()
