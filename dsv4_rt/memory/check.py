"""`KVPool.check`: every invariant of the pool, recomputed from its other half. Slow; for tests and doubts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dsv4_rt.errors import PoolError
from dsv4_rt.memory.layout import LIVES
from dsv4_rt.memory.pages import CACHED, FENCED, FREE, NULL, USED, Ints, Pages
from dsv4_rt.memory.prefix import PAGE
from dsv4_rt.memory.sequences import STAGED

if TYPE_CHECKING:
    from dsv4_rt.memory.pool import KVPool


def _demand(truth: Any, what: str) -> None:
    if not truth:
        raise PoolError(f"check: {what}")


def _equal(got: Any, want: Any, what: str) -> None:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape or (got != want).any():
        wrong = np.flatnonzero((got != want).reshape(-1))[:4] if got.shape == want.shape else ()
        pairs = ", ".join(f"[{i}] {got.reshape(-1)[i]}, not {want.reshape(-1)[i]}" for i in wrong)
        raise PoolError(f"check: {what}: {pairs or f'{got.shape}, not {want.shape}'}")


def check(pool: KVPool) -> None:
    """Raise PoolError, naming the first thing that is not as it must be."""
    holders = {life: np.zeros(p.count, np.int64) for life, p in pool._lives.items()}
    _check_rows(pool, holders)
    _check_copies(pool, holders)
    for life in LIVES:
        _check_pages(pool._lives[life], holders[life])
    _check_prefix(pool)
    _check_step(pool)
    _check_device(pool)


def _check_rows(pool: KVPool, holders: dict[str, Ints]) -> None:
    s, tables = pool._seqs, pool._tables
    _equal(tables.lengths, s.length, "lengths in the table are those of the sequences")
    seated = s.id_of != 0
    _demand(not s.length[~seated].any() and not tables.state[~seated].any(), "a free row has a length or a state slot")
    _demand(tables.state[seated].all(), "a sequence has no state slot")
    _demand(sorted(s._free_rows) == np.flatnonzero(~seated).tolist(), "free rows are listed once each")
    np.add.at(holders["state"], tables.state[seated], 1)
    for row in range(pool.max_sequences):
        n = int(s.length[row])
        name = f"row {row} of {n} tokens"
        full, table = -(-n // PAGE), tables.full[row]
        _demand(table[:full].all() and not table[full:].any(), f"{name}: pages up to its end, then null pages")
        np.add.at(holders["full"], table[:full], 1)
        first, last = int(s.first_window[row]) if seated[row] else 0, -(-n // 64)
        columns = np.arange(first, last) % pool._ledger.width
        _demand(
            last - first <= pool._ledger.width, f"{name}: {last - first} window pages in a ring of {pool._ledger.width}"
        )
        _demand(n == 0 or first <= max(0, n - 127) // 64, f"{name}: window begins at page {first}, too late")
        others = np.ones(pool._ledger.width, bool)
        others[columns] = False
        ring = tables.window[row]
        _demand(ring[columns].all() and not ring[others].any(), f"{name}: window pages {first} to {last - 1}, no other")
        np.add.at(holders["window"], ring[columns], 1)
        if not seated[row]:
            continue
        seq = int(s.id_of[row])
        _demand(s.row(seq, "check") == row, f"{name}: id {seq} leads to another row")
        _demand(seq not in s.parked, f"{name}: sequence {seq} is preempted and has a row")
        if n % 64:
            _demand(s.window_base[row] + n == ring[n // 64 % pool._ledger.width] * 64 + n % 64, f"{name}: window base")
        if n % PAGE:
            _demand(s.full_base[row] + n == table[n // PAGE] * PAGE + n % PAGE, f"{name}: full base")
        _demand(s.wake[row] <= -(-n // 64) * 64, f"{name}: wakes at {s.wake[row]}, too late")
        staged = any(row in rows for rows in pool._ledger.staged)
        _demand(staged == bool(s.flags[row] & STAGED), f"{name}: flagged as staged, or listed, but not both")
        _demand(len(s.text[row].tokens) >= int(s.known[row]) // PAGE * PAGE, f"{name}: tokens are missing")
        if pool.max_draft:
            _demand(n <= s.high[row] <= n + pool.max_draft, f"{name}: high-water mark {s.high[row]}")


def _check_copies(pool: KVPool, holders: dict[str, Ints]) -> None:
    copies, lives = pool._copies, pool._lives
    pins = {life: np.zeros(p.count, np.int64) for life, p in lives.items()}
    for life, pairs in copies.whole.items():
        for target, source in pairs.items():
            pins[life][source] += 1
            _demand(target not in pairs.values(), f"copies: {life} page {target} is read and written")
            _demand(lives[life].refs[target] > 0, f"copies: {life} page {target} is written and nobody holds it")
    for slot, (state, _) in copies.saves.items():
        pins["state"][state] += 1
        _demand(
            lives["checkpoint"].keep[slot] or slot in {c for c, _ in copies.restores.values()}, "a save is not kept"
        )
    for state, (slot, _) in copies.restores.items():
        pins["checkpoint"][slot] += 1
        _demand(lives["state"].refs[state] > 0, f"copies: state slot {state} is restored and nobody holds it")
    for life, pages in lives.items():
        _equal(pages.pins, pins[life], f"{life}: pins are those of pending copies")
        holders[life] += pins[life]


def _check_pages(p: Pages, holders: Ints) -> None:
    life = p.life
    _equal(p.refs, holders, f"{life}: references are those of the holders")
    _demand(p.refs[0] == 0 and not p.keep[0] and p.where[0] == NULL, f"{life}: the null page is not held or kept")
    counts = np.bincount(p.where, minlength=NULL + 1)
    _equal(counts[[FREE, CACHED, FENCED]], [p.free, p.cached, p.fenced], f"{life}: counters of free, cached, fenced")
    _demand(counts[NULL] == 1 and counts[USED] == p.used, f"{life}: free + used + cached + fenced + null = all")
    _equal(p.where == USED, p.refs > 0, f"{life}: used pages are those with a holder")
    free = p.stack[: p.free]
    _demand(
        np.unique(free).size == p.free and (p.where[free] == FREE).all(), f"{life}: the free stack holds free pages"
    )
    _demand(not p.keep[p.where == FREE].any(), f"{life}: a free page is kept by the prefix cache")
    cached = np.flatnonzero(p.where == CACHED)
    _demand(p.keep[cached].all(), f"{life}: a cached page is not kept by the prefix cache")
    _equal(np.sort(p.oldest_first()), cached, f"{life}: the eviction order holds the cached pages")
    waiting = [pages for _, pages in p.waiting()]
    fenced = np.unique(np.concatenate(waiting)) if waiting else np.empty(0, np.int32)
    _equal(fenced, np.flatnonzero(p.where == FENCED), f"{life}: fenced pages wait for a step")


def _check_prefix(pool: KVPool) -> None:
    c, full, window, slots = pool._prefix, pool._full, pool._window, pool._lives["checkpoint"]
    pages = np.sort(np.fromiter(c.table.values(), np.int64, len(c.table)))
    _equal(pages, np.flatnonzero(full.keep), "prefix: registered pages are those that are kept")
    _equal(pages, np.flatnonzero(c.serial), "prefix: registered pages are those with a serial")
    _demand(all(c.digest_of[page] == digest for digest, page in c.table.items()), "prefix: digests of pages")
    _demand(np.unique(c.serial[pages]).size == pages.size, "prefix: serials are distinct")
    _demand(c.serial.max() <= c.clock, "prefix: a page was registered later than now")
    live = np.flatnonzero(c.page_of)
    _equal(live, np.flatnonzero(slots.keep), "prefix: living checkpoints are the slots that are kept")
    _equal(c.checkpoint_of[c.page_of[live]], live, "prefix: checkpoint and page name each other")
    _demand(np.count_nonzero(c.checkpoint_of) == live.size, "prefix: a page names a dead checkpoint")
    _demand(full.keep[c.page_of[live]].all(), "prefix: the page of a checkpoint is not registered")
    kept = c.window_of[live]
    _equal(np.sort(kept.reshape(-1)), np.flatnonzero(window.keep), "prefix: window pages of checkpoints are kept")
    _equal(c.holder[kept], np.repeat(live[:, None], 2, axis=1), "prefix: window pages name their checkpoint")
    _demand(np.count_nonzero(c.holder) == kept.size, "prefix: a window page names a dead checkpoint")


def _check_step(pool: KVPool) -> None:
    """Slot mappings, from the block tables."""
    tables, n = pool._tables, pool._step.count
    p, rows = tables.positions[:n].astype(np.int64), tables.token_rows[:n]
    there = p >= 0
    for m in pool._mappings:
        slots = tables.slots[m.name]
        if m.life == "full":
            page, tokens = tables.full[rows, np.maximum(p, 0) // PAGE].astype(np.int64), PAGE
        else:
            page, tokens = tables.window[rows, np.maximum(p, 0) // 64 % pool._ledger.width].astype(np.int64), 64
        want = (page * tokens + p % tokens) // m.ratio
        if m.life == "window":  # a step may be longer than the ring keeps behind its sequences' ends
            there = there & (p >= 64 * pool._seqs.first_window[rows])
        want = np.where(there & ((p + 1) % m.ratio == 0), want, -1)
        seen = there | (p < 0)
        _equal(slots[:n][seen], want[seen], f"slots of {m.name!r}")
    if pool._step._written <= n:
        _demand((tables.positions[n:] == -1).all(), "positions behind the step's tokens are not -1")
        _demand(all((a[n:] == -1).all() for a in tables.slots.values()), "slots behind the step's tokens are not -1")


def _check_device(pool: KVPool) -> None:
    numpy = pool.device.numpy
    for cache in pool.layout.caches:
        _demand(not numpy(pool.storage.array(cache.name)[:, 0]).any(), f"{cache.name!r}: the null page is not zero")
    if pool._tables.marked:
        return
    for name in ("full", "window", "lengths", "state", "token_rows", "positions"):
        _equal(numpy(pool._tables.device(name)), getattr(pool._tables, name), f"{name} on the device")
    for name, mirror in pool._tables.slots.items():
        _equal(numpy(pool._tables.device(f"slots.{name}")), mirror, f"slots of {name!r} on the device")
