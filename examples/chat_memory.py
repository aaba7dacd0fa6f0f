"""The memory side of a chat: two turns behind one prompt, drafts taken back, two answers sampled from one past.

    python examples/chat_memory.py

An engine without a model: where its kernels would run, the tables are ready on the device. On a GPU if there is one,
else on the emulator.
"""

import dataclasses

import numpy as np

import dsv4_rt
from dsv4_rt.memory import KVLayout, KVPool

DRAFT = 3  # tokens guessed ahead in each step of decoding
CHUNK = 512


def prefill(pool, seq, prompt):
    """Compute what the prefix cache has not, in chunks that end where a checkpoint can be taken."""
    while (n := pool.length(seq)) < len(prompt):
        step(pool, seq, min(CHUNK, len(prompt) - n, pool.next_checkpoint(seq) - n))


def step(pool, seqs, counts):
    pool.extend(seqs, counts)
    pool.upload()
    in_flight = pool.begin_step()
    # Here kernels write through pool.slot_mapping(cache) and read through pool.block_table(cache), pool.lengths.
    pool.end_step(in_flight)


def decode(pool, seq, tokens, rng):
    """Answer with `tokens`, some of each step's guesses right; what was wrong is taken back."""
    while len(tokens):
        guessed = min(1 + DRAFT, len(tokens))
        step(pool, seq, guessed)
        accepted = int(rng.integers(1, guessed + 1))
        pool.truncate(seq, pool.length(seq) - (guessed - accepted))
        pool.append(seq, tokens[:accepted])
        tokens = tokens[accepted:]


def main():
    rng = np.random.default_rng(0)
    few_layers = dataclasses.replace(dsv4_rt.FLASH, num_layers=4, compress_ratios=(0, 4, 128, 4))
    layout = KVLayout.for_model(few_layers, max_draft=DRAFT)
    pool = KVPool(layout, pages=32, max_sequences=4, max_length=4096, max_in_flight=CHUNK, max_draft=DRAFT)
    print(f"on {pool.device.name}: {pool.storage.nbytes / 2**20:.0f} MiB, {pool.stats().full.total} pages")

    prompt = rng.integers(0, dsv4_rt.FLASH.vocab_size, 1200)
    first = pool.create(prompt)
    prefill(pool, first, prompt)
    answer = rng.integers(0, dsv4_rt.FLASH.vocab_size, 90)
    decode(pool, first, answer, rng)
    pool.free(first)
    print(f"turn 1: {len(prompt)} tokens computed, {len(answer)} answered, pages kept: {pool.stats().full.cached}")

    prompt = np.concatenate([prompt, answer, rng.integers(0, dsv4_rt.FLASH.vocab_size, 200)])
    second = pool.create(prompt)
    found = pool.length(second)
    prefill(pool, second, prompt)
    print(f"turn 2: {found} of {len(prompt)} tokens found, {len(prompt) - found} computed")
    assert found == 1024  # the last page boundary of turn 1's prompt

    other = pool.fork(second)
    for _ in range(20):
        step(pool, [second, other], [1, 1])
    copied = pool.stats().copied_pages
    print(f"two samples of turn 2: {pool.stats().full.used} pages used by both, {copied} copied when they parted")
    pool.check()
    for seq in (second, other):
        pool.free(seq)
    pool.upload()
    stats = pool.stats()
    assert stats.full.used == stats.window.used == stats.state.used == 0


if __name__ == "__main__":
    main()
