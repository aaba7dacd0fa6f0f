"""The disk cache: races, damage, other people's files, disks that refuse, and what it counts."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv4_rt import cache
from dsv4_rt.compile import cache_clear, cache_info, compile

module = sys.modules["dsv4_rt.compile"]  # the module: the name is the function here
SOURCE = 'extern "C" __global__ void one(int* x) { x[0] = 1; }\n'


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty cache directory, not made yet."""
    place = tmp_path / "cache"
    monkeypatch.setenv("DSV4_RT_CACHE_DIR", str(place))
    monkeypatch.delenv("DSV4_RT_CACHE", raising=False)
    return place


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "one.cu"
    path.write_text(SOURCE)
    return path


def build(source):
    """Compile as a process would that starts now."""
    module._answered.clear()
    module._artifacts.clear()
    return compile(source, "sm_100a", ["one"])


def entry_of(place):
    (entry,) = place.glob("*.dsv4k")
    return entry


def test_the_second_process_reads_what_the_first_wrote(place, source):
    before = cache_info()
    first, second = build(source), build(source)
    after = cache_info()
    assert (first.cached, second.cached) == (False, True)
    assert (first.key, first.cubin, first.ptx, first.log) == (second.key, second.cubin, second.ptx, second.log)
    assert (first.kernels, first.compiler, first.options) == (second.kernels, second.compiler, second.options)
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 1)
    assert (after.total_hits, after.total_misses) == (1, 1)
    assert (after.entries, after.bytes) == (1, entry_of(place).stat().st_size)
    assert (after.directory, after.writable, after.problem) == (place, True, "")


def test_directory_and_entries_are_private(place, source):
    old = os.umask(0)
    try:
        build(source)
    finally:
        os.umask(old)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


def test_processes_that_compile_the_same_kernel_at_once(place, source):
    script = (
        "import sys; sys.stdin.read(1); from dsv4_rt.compile import compile;"
        "a = compile(sys.argv[1], 'sm_100a', ['one']); print(a.key, len(a.cubin))"
    )
    command = [sys.executable, "-c", script, str(source)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        process.stdin.write("g")
        process.stdin.flush()
    results = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    mine = build(source)
    assert results == {f"{mine.key} {len(mine.cubin)}\n"}
    assert mine.cached
    assert {path.name for path in place.iterdir()} <= {entry_of(place).name, "hits", "misses"}
    info = cache_info()
    assert info.total_hits + info.total_misses == 3


def test_the_loser_of_a_race_uses_its_own_artefact(place, source, monkeypatch):
    def lost(old, new):
        raise FileNotFoundError(2, "not visible yet", new)

    monkeypatch.setattr(os, "replace", lost)
    assert build(source).kernels["one"].registers > 0
    assert list(place.glob(".partial-*")) == list(place.glob("*.dsv4k")) == []


@pytest.mark.parametrize("keep", [0, 1, 64, 65, 200, 0.5, -1])
def test_a_truncated_entry_is_compiled_again(place, source, keep):
    first = build(source)
    entry = entry_of(place)
    whole = entry.read_bytes()
    entry.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    again = build(source)
    assert (again.cached, again.cubin) == (False, first.cubin)
    assert build(source).cached, "the damaged entry was not replaced"


def test_no_flipped_bit_gets_through(place, source, rng):
    build(source)
    entry = entry_of(place)
    whole = entry.read_bytes()
    lines = [whole.index(b"\n"), whole.index(b"\n", 65)]
    for at in [0, *lines, lines[0] + 10, len(whole) - 1, *rng.integers(0, len(whole), 200)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        entry.write_bytes(damaged)
        assert cache.load(entry.stem) is None, f"byte {at}"
    assert not build(source).cached
    assert build(source).cached


def test_an_entry_under_another_key_is_not_loaded(place, source):
    build(source)
    other = "0" * 64
    shutil.copy(entry_of(place), place / f"{other}.dsv4k")
    assert cache.load(other) is None


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_directory_that_others_can_write_is_never_used(place, source, mode):
    build(source)
    place.chmod(mode)
    assert not build(source).cached
    info = cache_info()
    assert not info.writable
    assert "can be written by others" in info.problem
    place.chmod(0o755)
    assert build(source).cached


def test_an_entry_that_others_can_write_is_not_loaded(place, source):
    build(source)
    entry_of(place).chmod(0o620)
    assert not build(source).cached


def test_a_link_is_not_followed(place, source, tmp_path):
    build(source)
    entry = entry_of(place)
    shutil.move(entry, tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    assert not build(source).cached


def test_what_belongs_to_another_user_is_never_loaded(place, source, monkeypatch):
    build(source)
    me = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: me + 1)
        assert not build(source).cached
        assert f"belongs to user {me}, not to {me + 1}" in cache_info().problem
        assert cache_clear() == 0
    assert build(source).cached


def test_an_entry_given_away_is_not_loaded(place, source, monkeypatch):
    build(source)
    assert build(source).cached
    status = os.fstat

    def given_away(handle):
        found = status(handle)
        facts = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**facts | {"st_uid": found.st_uid + 1})

    monkeypatch.setattr(os, "fstat", given_away)  # only root could give the file away
    assert not build(source).cached


def test_goes_on_where_no_directory_can_be_made(tmp_path, source, place, monkeypatch):
    (tmp_path / "file").write_text("")
    for impossible in (tmp_path / "file" / "cache", tmp_path / "file", Path("/proc/none/cache")):
        monkeypatch.setenv("DSV4_RT_CACHE_DIR", str(impossible))
        assert not build(source).cached
        info = cache_info()
        assert (info.entries, info.writable) == (0, False)
        assert str(impossible) in info.problem


@pytest.mark.parametrize("full_at", ["mkstemp", "write"])
def test_goes_on_where_the_disk_refuses(place, source, monkeypatch, full_at):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    if full_at == "mkstemp":
        monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    else:
        monkeypatch.setattr(cache.os, "fdopen", refuse)
    assert not build(source).cached
    assert list(place.glob("*.dsv4k")) == list(place.glob(".partial-*")) == []


def test_a_read_only_directory_still_serves(place, source, monkeypatch):
    """Every write is refused as a read-only mount would; permissions alone do not stop root."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    build(source)
    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(
        cache.os,
        "open",
        lambda path, flags, *more, _open=os.open: (
            refuse() if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else _open(path, flags, *more)
        ),
    )
    assert build(source).cached
    assert not cache_info().writable


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("DSV4_RT_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.directory() == tmp_path / "xdg" / "dsv4_rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory() == tmp_path / "home" / ".cache" / "dsv4_rt"
    monkeypatch.setenv("DSV4_RT_CACHE_DIR", str(tmp_path / "own"))
    assert cache.directory() == tmp_path / "own"


def test_clear_removes_entries_totals_and_leavings_and_nothing_else(place, source):
    first = build(source)
    (place / ".partial-abc").write_text("interrupted")
    (place / "notes.txt").write_text("not ours")
    assert cache_clear() == 1
    assert [path.name for path in place.iterdir()] == ["notes.txt"]
    assert (cache_info().total_hits, cache_info().total_misses) == (0, 0)
    again = compile(source, "sm_100a", ["one"])
    assert again is not first, "this process must forget, too"
    assert again.cubin == first.cubin


def test_it_can_be_turned_off(place, source, monkeypatch):
    monkeypatch.setenv("DSV4_RT_CACHE", "0")
    misses = cache_info().misses
    assert not build(source).cached
    assert not place.exists()
    assert cache_info().misses == misses + 1
    assert "DSV4_RT_CACHE=0" in cache_info().problem
    module._artifacts.clear()
    module._answered.clear()
    compile(source, "sm_100a", ["one"], cache=True)
    assert cache_info().entries == 1
