"""copy_pages through Storage.copy, against its oracle: every byte of every array, so that a stray write shows too."""

import numpy as np
import pytest
from storages import COUNTS, assert_same, contents, few_layers, filled, keep_busy

from dsv4_rt import FLASH, ArgumentError, LaunchError
from dsv4_rt.launch import Prepared
from dsv4_rt.memory import reference
from dsv4_rt.memory.layout import INDEX_KEYS, LIVES, RECORDS, KVLayout
from dsv4_rt.memory.ops import CopyPages, Piece, grid
from dsv4_rt.memory.staging import Staging
from dsv4_rt.memory.storage import Storage


def rows(*given):
    return np.array(given, np.int32)


def check(storage, before, copies=None, save=None, restore=None):
    """Copy, compare everything; returns the bytes it said it copied."""
    moved = storage.copy(copies, save=save, restore=restore)
    none = np.empty((0, 3), np.int32)
    want = reference.copy(
        storage.layout, before, copies, none if save is None else save, none if restore is None else restore
    )
    assert_same(storage, want)
    return moved


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched so far, by name."""
    names, launch = [], Prepared.launch

    def counted(self, *args):
        names.append(self.kernel.name)
        return launch(self, *args)

    monkeypatch.setattr(Prepared, "launch", counted)
    return names


def random_copies(rng, counts):
    """Pages of each life cycle: some written, from others or from the null page."""
    copies = {}
    for life in LIVES:
        pages = rng.permutation(np.arange(1, counts[life]))
        n = int(rng.integers(0, pages.size // 2 + 1))
        source = np.append(pages[n:], 0)[rng.integers(0, pages.size - n + 1, n)]
        copies[life] = np.stack([source, pages[:n]], axis=1).astype(np.int32)
    return copies


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("index", INDEX_KEYS)
def test_matches_oracle(device, rng, launches, record, index):
    storage, before = filled(device, rng, record, index)
    copies = random_copies(rng, COUNTS)
    copies["full"] = rows((1, 2), (1, 4), (0, 3))  # one source twice; the null page zeroes
    moved = check(storage, before, copies)
    assert moved == sum(len(pairs) * storage.layout.bytes_of(life) for life, pairs in copies.items())
    assert launches == ["copy_pages<4>"]  # all caches, layers and life cycles


@pytest.mark.parametrize("max_draft", [0, 1, 3])  # rings of 8, 9 and 11 rows: the four may wrap, by any share
@pytest.mark.parametrize("L", [4, 8, 12, 16, 256, 260, 1_048_576])
def test_checkpoints_keep_the_rows_before_a_boundary(device, rng, launches, max_draft, L):
    storage, before = filled(device, rng, max_draft=max_draft)
    moved = check(storage, before, save=rows((1, 2, L), (3, 1, L + 4)))
    assert launches == ["copy_pages<4>"]
    assert moved == 2 * storage.layout.bytes_of("checkpoint")
    ring = 8 + max_draft
    state = before["csa_state"].reshape(2, COUNTS["state"], -1)[..., : ring * 8192].reshape(2, -1, ring, 8192)
    kept = device.numpy(storage.array("csa_checkpoint")).reshape(2, -1, 4, 8192)
    for i in range(4):
        assert np.array_equal(kept[:, 2, i], state[:, 1, (L - 4 + i) % ring])
    # And back, into another slot: the four rows, the other rows as they were.
    check(storage, contents(storage), restore=rows((2, 4, L)))


def test_everything_in_one_launch(device, rng, launches):
    storage, before = filled(device, rng, max_draft=3)
    copies = {"full": rows((1, 2), (6, 5)), "window": rows((1, 5)), "state": rows((1, 2)), "checkpoint": rows((1, 3))}
    check(storage, before, copies, save=rows((1, 2, 260)), restore=rows((5, 3, 512), (4, 4, 4)))
    assert launches == ["copy_pages<4>"]


def test_one_source_many_targets_and_a_null_source(device, rng):
    storage, before = filled(device, rng)
    check(storage, before, {"full": rows(*((1, page) for page in range(2, COUNTS["full"])))})
    check(storage, contents(storage), {"full": rows(*((0, page) for page in range(1, COUNTS["full"])))})
    assert not device.numpy(storage.array("csa")).any()


def test_nothing_to_do_launches_nothing(device, rng, launches):
    storage, before = filled(device, rng)
    none = np.empty((0, 2), np.int32)
    assert storage.copy() == storage.copy({}) == storage.copy({"full": none, "state": none}) == 0
    assert check(storage, before, save=np.empty((0, 3), np.int32)) == 0
    assert launches == []


def test_repeated_calls_reuse_their_buffers(device, rng):
    storage, now = filled(device, rng, layers=1)
    for _ in range(7):  # more than there are staging buffers
        copies = random_copies(rng, COUNTS)
        storage.copy(copies)
        now = reference.copy(storage.layout, now, copies)
    assert_same(storage, now)


@pytest.mark.parametrize("words", [1, 31, 32, 127, 128, 129, 150, 255, 257])
def test_any_page_size(device, rng, words):
    """Pages of any number of 16 B words: one tile, its last lane, a tail tile; guard pages on both sides stay."""
    before = rng.integers(0, 256, (3, 5, 16 * words), dtype=np.uint8)
    array = device.array(before)
    copier = CopyPages(device, {"page": [Piece(array, array, 16 * words)]}, Staging(device, 1))
    copier({"page": rows((1, 3, 0, 0), (4, 2, 0, 0))}, device.current_stream())
    before[:, 3], before[:, 2] = before[:, 1], before[:, 4]
    assert np.array_equal(device.numpy(array), before)


def test_rows_between_arrays_of_other_page_sizes(device, rng):
    source, target = (rng.integers(0, 256, (2, 3, n * 48), dtype=np.uint8) for n in (5, 2))
    there = device.array(target)
    copier = CopyPages(device, {"row": [Piece(device.array(source), there, 48, 48)]}, Staging(device, 1))
    copier({"row": rows((2, 1, 4, 0), (0, 1, 0, 1))}, device.current_stream())
    target[:, 1, :48], target[:, 1, 48:] = source[:, 2, 192:], source[:, 0, :48]
    assert np.array_equal(device.numpy(there), target)
    with pytest.raises(ArgumentError, match=r"record \[2, 1, 5, 0\] of 'row'(.|\n)*must be below \[3, 3, 5, 2\]"):
        copier({"row": rows((2, 1, 5, 0))}, device.current_stream())


def test_grids_are_few_and_large_enough():
    sizes = np.arange(1, 100_000)
    grids = np.array([grid(int(n)) for n in sizes])
    assert (grids >= sizes).all()
    assert (grids - sizes <= sizes / 8).all()
    assert len(set(grids.tolist())) < 130


# A copy that is refused or fails leaves everything as it was, and the next one works.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"copies": {"full": rows((1, 2), (3, 2))}}, "full page 2 is written twice"),
        ({"copies": {"full": rows((1, 2), (2, 3))}}, "full page 2 is written twice, or read and written, in one call"),
        ({"copies": {"window": rows((4, 4))}}, "window page 4 is written twice, or read and written"),
        ({"copies": {"full": rows((1, 0))}}, "full page 0 is the null page"),
        ({"copies": {"full": rows((1, 7))}}, "full pages must be from 0 to 6"),
        ({"copies": {"full": rows((-1, 2))}}, "full pages must be from 0 to 6"),
        ({"copies": {"state": rows((1, 2))}, "restore": rows((1, 2, 8))}, "state page 2 is written twice"),
        ({"copies": {"state": rows((1, 2))}, "save": rows((2, 1, 8))}, "state page 2 is written twice, or read and"),
        ({"save": rows((1, 1, 8)), "restore": rows((1, 2, 8))}, "checkpoint page 1 is written twice, or read and"),
        ({"save": rows((1, 1, 6))}, r"save has positions \[6\]; multiples of 4"),
        ({"restore": rows((1, 1, 0))}, r"restore has positions \[0\]; multiples of 4 are wanted, at least 4"),
        ({"copies": {"swa": rows((1, 2))}}, "life = 'swa' is none of full, window"),
        ({"copies": {"full": [(1, 2)]}}, r"copies\['full'\] is list; a NumPy int32 \[n, 2\] is wanted"),
        ({"copies": {"full": np.array([(1, 2)])}}, r"copies\['full'\] is int64 \(1, 2\)"),
        ({"save": rows((1, 2))}, r"save is int32 \(1, 2\); a NumPy int32 \[n, 3\]"),
    ],
)
def test_refuses_and_changes_nothing(emulator, rng, launches, arguments, message):
    storage, before = filled(emulator, rng, layers=1)
    with pytest.raises(ArgumentError, match=message):
        storage.copy(**arguments)
    assert launches == []
    assert_same(storage, before)
    check(storage, before, {"full": rows((1, 2))})


def test_a_failed_launch_changes_nothing(device, rng, monkeypatch):
    storage, before = filled(device, rng)

    def fail(self, *args):
        raise LaunchError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(Prepared, "launch", fail)
        with pytest.raises(LaunchError, match="injected"):
            storage.copy({"full": rows((1, 2))}, save=rows((1, 1, 256)))
    assert_same(storage, before)
    check(storage, before, {"full": rows((1, 2))}, save=rows((1, 1, 256)))


def test_layouts_without_checkpoints(emulator, rng):
    layout = few_layers(KVLayout.for_model(FLASH), 1)
    bare = Storage(KVLayout("bare", (layout.cache("csa"),)), emulator, {"full": 3})
    with pytest.raises(ArgumentError, match="layout 'bare' has no checkpoint caches"):
        bare.copy(save=rows((1, 1, 8)))
    assert bare.copy({"full": rows((0, 1))}) == layout.cache("csa").page_bytes


def test_pieces_that_do_not_fit(emulator):
    page = emulator.array(np.zeros((1, 2, 64), np.uint8))

    def make(**kinds):
        return CopyPages(emulator, kinds, Staging(emulator, 1))

    with pytest.raises(ArgumentError, match="7 kinds of record, at most 6"):
        make(**{f"k{i}": [] for i in range(7)})
    with pytest.raises(ArgumentError, match="kind a: pages of 64 and 64 B, 24 B moved(.|\n)*multiples of 16 B"):
        make(a=[Piece(page, page, 24)])
    with pytest.raises(ArgumentError, match="80 B moved"):
        make(a=[Piece(page, page, 80)])
    with pytest.raises(ArgumentError, match=r"kind a: source does not fit(.|\n)*must have 3 axes"):
        make(a=[Piece(page[0], page, 64)])
    with pytest.raises(ArgumentError, match=r"target does not fit(.|\n)*axis 0 \(layers\) must be 1"):
        make(a=[Piece(page, emulator.array(np.zeros((2, 2, 64), np.uint8)), 64)])
    shifted = emulator.array(np.zeros(136, np.uint8))[8:].reshape(1, 2, 64)
    with pytest.raises(ArgumentError, match=r"must be a multiple of 16 B"):
        make(a=[Piece(shifted, shifted, 64)])
    copier = make(a=[Piece(page, page, 64)])
    with pytest.raises(ArgumentError, match=r"no kind \['b'\]; there are a"):
        copier({"b": rows((0, 1, 0, 0))}, 0)
    with pytest.raises(ArgumentError, match=r"records of 'a' are int32 \(1, 2\); a NumPy int32 \[n, 4\]"):
        copier({"a": rows((0, 1))}, 0)


# On a GPU: the real model, many pages, and staging that is still being read.


@pytest.mark.gpu
def test_many_pages_of_a_whole_model(gpu, rng):
    counts = {"full": 300, "window": 120, "state": 6, "checkpoint": 20}
    storage, before = filled(gpu, rng, layers=43, counts=counts)
    copies = random_copies(rng, counts)
    check(storage, before, copies)


@pytest.mark.gpu
def test_a_buffer_is_not_overwritten_while_it_may_be_read(gpu, rng):
    """Copies queue behind a kernel that spins: with two staging buffers the third must wait for the first."""
    import cupy

    storage, _ = filled(gpu, rng, layers=1)
    steps = [random_copies(rng, COUNTS) for _ in range(9)]
    storage.copy({"full": rows((1, 2))})  # compiles, and gives a buffer its twin on the device
    now = contents(storage)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        keep_busy(gpu, stream)
        for copies in steps:
            storage.copy(copies, stream=stream)
        stream.synchronize()
    for copies in steps:
        now = reference.copy(storage.layout, now, copies)
    assert_same(storage, now)


@pytest.mark.gpu
def test_is_refused_in_a_capture(gpu, rng):
    import cupy

    storage, before = filled(gpu, rng, layers=1)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(LaunchError, match=r"Storage\.copy: the stream is being captured"):
            storage.copy({"full": rows((1, 2))})
        stream.end_capture()
    check(storage, before, {"full": rows((1, 2))})
