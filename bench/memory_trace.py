"""Request traces in Mooncake's JSONL format, and an engine without a model that replays them against a KVPool.

A line is one request: {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [one per 512 input tokens]}.
Equal hash ids stand for equal content, so a block's 512 token ids are computed from its hash id; the last block may be
partial. Source: the trace release of Mooncake (FAST'25).

The engine is the usual one: continuous batching, chunked prefill that shares the step with decoding, first come first
served, and under pressure the youngest request is preempted and recomputed later. Its clock is a model and says so:
a step takes `base_ms` + prefill tokens / `tokens_per_ms`. What is measured is the pool's own time.
"""

import json
import time
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from dsv4_rt.memory import PoolExhausted, TooLong

BLOCK = 512  # tokens a hash id stands for
VOCABULARY = 129_280
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class Request:
    """One line of a trace. arrival in ms, lengths in tokens, hash_ids int64 [ceil(input_length / 512)]."""

    arrival: float
    input_length: int
    output_length: int
    hash_ids: np.ndarray

    @cached_property
    def total(self):
        return self.input_length + self.output_length

    def tokens(self):
        """The input's token ids, int32 [input_length]: a 32-bit mix of (hash id, place in the block)."""
        x = (self.hash_ids[:, None] * BLOCK + np.arange(BLOCK)).astype(np.uint32).ravel()[: self.input_length]
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x *= np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
        return (x % np.uint32(VOCABULARY)).astype(np.int32)


def read_trace(path, limit=None):
    """The requests of a JSONL file in order of arrival, the first `limit` of them; ValueError names a bad line."""
    requests = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if limit is not None and len(requests) == limit:
                break
            if not line.strip():
                continue
            try:
                arrival, given, wanted, ids = (json.loads(line)[name] for name in FIELDS)
                request = Request(float(arrival), int(given), int(wanted), np.array(ids, np.int64).reshape(-1))
            except (ValueError, KeyError, TypeError) as error:
                wants = f"a JSON object with {', '.join(FIELDS)}"
                raise ValueError(f"{path}:{number}: not a request ({error!r}); wanted {wants}") from error
            if request.input_length < 1 or request.output_length < 1 or request.arrival < 0:
                raise ValueError(f"{path}:{number}: lengths must be positive, the timestamp not negative")
            blocks = -(-request.input_length // BLOCK)
            if len(request.hash_ids) != blocks:
                given = f"{len(request.hash_ids)} hash_ids for {request.input_length} tokens"
                raise ValueError(f"{path}:{number}: {given}; wanted {blocks}, one per {BLOCK} tokens")
            requests.append(request)
    return sorted(requests, key=lambda request: request.arrival)


def write_trace(path, requests):
    """The same format back."""
    with path.open("w") as file:
        for r in requests:
            values = (r.arrival, r.input_length, r.output_length, r.hash_ids.tolist())
            file.write(json.dumps(dict(zip(FIELDS, values, strict=True))) + "\n")


def make_trace(rng, requests, *, per_second=4.0, turns=4.0, mean_new=1500, mean_output=60, sessions_share=0.6):
    """A trace of conversations: a request either continues one, its prompt all the old one's full blocks and more, or
    starts one behind a system prompt of one block that all share."""
    made, conversations, fresh, arrival = [], [], 1, 0.0
    for _ in range(requests):
        arrival += rng.exponential(1000 / per_second)
        if conversations and rng.random() < sessions_share:
            old = conversations[rng.integers(len(conversations))]
        else:
            old = np.zeros(1, np.int64)
        length = len(old) * BLOCK + 1 + int(rng.exponential(mean_new))
        blocks = -(-length // BLOCK)
        ids = np.concatenate([old, np.arange(fresh, fresh + blocks - len(old))])
        fresh += blocks - len(old)
        made.append(Request(round(arrival), length, 1 + int(rng.exponential(mean_output)), ids))
        conversations.append(ids[: length // BLOCK])  # a partial block is never the prefix of another prompt
        if len(conversations) > turns * 8:
            conversations.pop(0)
    return made


def upper_bound(requests):
    """Input tokens an infinite cache would have, by the trace alone: the longest run of leading blocks seen earlier.

    An engine computes at least the last token of a prompt, so a prompt seen before counts one token less.
    """
    seen, hit = set(), 0
    for request in requests:
        known = 0
        for block in request.hash_ids.tolist():
            if block not in seen:
                break
            known += BLOCK
        hit += min(known, request.input_length - 1)
        seen.update(request.hash_ids.tolist())
    return hit


@dataclass
class Job:
    """A request inside the engine: `known` tokens exist, given or sampled; `computed` of them are in the pool."""

    request: Request
    number: int
    seq: int = -1
    known: int = 0
    computed: int = 0
    sampled: int = 0


@dataclass
class Replay:
    """What one replay measured. Times are of the pool alone, CPU microseconds; `clock` ms is the model engine's."""

    steps: list = field(default_factory=list)  # (clock, running, waiting, tokens, us, used, cached, free) a step
    decode_us: list = field(default_factory=list)  # pool time of the steps that only decoded, and
    decode_batch: list = field(default_factory=list)  # how many sequences each of them had
    finished: int = 0
    refused: int = 0  # longer than the pool can ever hold
    preemptions: int = 0
    hit_tokens: int = 0  # of first admissions; what preempted requests found again is `resumed_tokens`
    resumed_tokens: int = 0
    computed_tokens: int = 0
    sampled_tokens: int = 0
    seconds: float = 0.0  # of the whole replay on this machine, engine included


class Engine:
    """Replays requests against a pool. `run` returns the Replay; every sequence is freed when it ends.

    chunk: most tokens a step; batch: most sequences at a time; a step lasts base_ms + prefill tokens / tokens_per_ms.
    """

    def __init__(self, pool, requests, *, chunk=8192, batch=256, base_ms=20.0, tokens_per_ms=40.0, steps_in_flight=2):
        self.pool, self.requests = pool, requests
        self.chunk, self.batch = chunk, batch
        self.base_ms, self.tokens_per_ms = base_ms, tokens_per_ms
        self.steps_in_flight = steps_in_flight
        self.epochs = deque()
        self.clock = 0.0
        self.running, self.waiting = [], deque()
        self.room = True  # the head of the queue has not been refused since something was given back
        self.longest = min(pool.max_length, 256 * pool.stats().full.total)
        self.result = Replay()

    def run(self, tick=lambda finished: None, check_every=0):
        """Replay all. `tick` hears how many requests have ended; check() runs every `check_every` steps and at last."""
        started = time.perf_counter()
        arriving, result = 0, self.result
        while arriving < len(self.requests) or self.running or self.waiting:
            if not self.running and not self.waiting:
                self.clock = max(self.clock, self.requests[arriving].arrival)
            while arriving < len(self.requests) and self.requests[arriving].arrival <= self.clock:
                self.waiting.append(Job(self.requests[arriving], arriving))
                arriving += 1
            self.step()
            if check_every and len(result.steps) % check_every == 0:
                self.pool.check()
            tick(result.finished + result.refused)
        self.drain()
        self.pool.check()
        result.seconds = time.perf_counter() - started
        return result

    def step(self):
        """One step: admit, choose tokens, reserve (preempting until that works), upload, sample, free what is done."""
        self.us = 0.0
        while len(self.epochs) >= self.steps_in_flight:
            self.timed(self.pool.end_step, self.epochs.popleft())
        decoding = [job for job in self.running if job.known - job.computed == 1]
        only_decoding = len(decoding) == len(self.running)
        jobs, counts = decoding, [1] * len(decoding)
        budget = self.chunk - len(jobs)
        if not only_decoding:
            for job in self.running:
                if job.known - job.computed > 1 and budget > 0:
                    jobs.append(job)
                    counts.append(self.take(job, budget))
                    budget -= counts[-1]
        while self.waiting and self.room and len(self.running) < self.batch and budget > 0:
            job = self.admit()
            if job is not None:
                only_decoding = False
                jobs.append(job)
                counts.append(self.take(job, budget))
                budget -= counts[-1]
        if not jobs:  # nothing runs and nothing fits: what waits for steps and uploads comes back
            self.drain()
            self.room = True
            return
        self.reserve(jobs, counts, only_decoding)
        self.timed(self.pool.upload)
        self.epochs.append(self.timed(self.pool.begin_step))  # here the kernels would be launched
        self.advance(jobs, counts)

    def reserve(self, jobs, counts, only_decoding):
        """Extend the batch; without room wait for the steps in flight, then preempt the youngest, until it fits."""
        while True:
            seqs = np.array([job.seq for job in jobs])
            try:
                self.timed(self.pool.extend, seqs, None if only_decoding else counts)
                return
            except PoolExhausted:
                if self.epochs:
                    while self.epochs:
                        self.timed(self.pool.end_step, self.epochs.popleft())
                    continue
                victim = self.running[-1]
                if victim is self.running[0]:
                    raise  # alone in the pool, and it fitted when it came
                self.preempt(victim)
                if victim in jobs:
                    at = jobs.index(victim)
                    del jobs[at], counts[at]

    def take(self, job, budget):
        """Tokens of this step: what is left, what the step may have, and not past a place for a checkpoint."""
        count = min(job.known - job.computed, budget)
        if count > 1:
            count = min(count, self.timed(self.pool.next_checkpoint, job.seq) - job.computed)
        return count

    def admit(self):
        """The head of the queue if the pool takes it, else None, until something has been given back."""
        job, pool = self.waiting[0], self.pool
        if job.seq >= 0:
            self.room = self.timed(pool.can_resume, job.seq)
            if not self.room:
                return None
            job.computed = self.timed(pool.resume, job.seq)
            self.result.resumed_tokens += job.computed
        else:
            tokens = job.request.tokens()
            try:
                self.room = self.timed(pool.can_admit, tokens)
                if job.request.total > self.longest:
                    raise TooLong
            except TooLong:
                self.waiting.popleft()
                self.result.refused += 1
                return None
            if not self.room:
                return None
            job.known = len(tokens)
            job.seq = self.timed(pool.create, tokens)
            job.computed = self.timed(pool.length, job.seq)
            self.result.hit_tokens += job.computed
        self.waiting.popleft()
        self.running.append(job)
        return job

    def preempt(self, job):
        self.timed(self.pool.preempt, job.seq)
        self.running.remove(job)
        self.waiting.appendleft(job)
        self.room = False  # what it had is for the others first
        self.result.preemptions += 1

    def drain(self):
        """Every step has ended, every copy is made."""
        self.pool.upload()
        while self.epochs:
            self.pool.end_step(self.epochs.popleft())

    def advance(self, jobs, counts):
        """The step has run: what is complete has one more token; what has all its tokens is freed."""
        result, goes_on, done = self.result, [], False
        for job, count in zip(jobs, counts, strict=True):
            job.computed += count
            if job.computed < job.known:
                continue
            job.sampled += 1
            result.sampled_tokens += 1
            if job.sampled == job.request.output_length:
                self.timed(self.pool.free, job.seq)
                job.seq = -2
                done = True
                result.finished += 1
            else:
                job.known += 1
                goes_on.append(job)
        if goes_on:
            seqs = np.array([job.seq for job in goes_on])
            sampled = np.array([(job.number * 7919 + job.sampled * 104_729) % VOCABULARY for job in goes_on], np.int32)
            self.timed(self.pool.append, seqs, sampled)
        if done:
            self.running = [job for job in self.running if job.seq != -2]
            self.room = True
        tokens = sum(counts)
        prefill = tokens - sum(count == 1 for count in counts)
        self.clock += self.base_ms + prefill / self.tokens_per_ms
        result.computed_tokens += tokens
        if prefill == 0:
            result.decode_us.append(self.us)
            result.decode_batch.append(len(jobs))
        use = self.pool.stats().full
        now = (self.clock, len(self.running), len(self.waiting), tokens, self.us, use.used, use.cached, use.free)
        result.steps.append(now)

    def timed(self, call, *args):
        start = time.thread_time()
        try:
            return call(*args)
        finally:
            self.us += (time.thread_time() - start) * 1e6
