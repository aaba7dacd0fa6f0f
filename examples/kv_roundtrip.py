"""The paged KV memory of one layer: append a prompt, fork the sequence, let both go on, gather what each can see.

    python examples/kv_roundtrip.py

On a GPU the arrays are CuPy's and torch's CUDA tensors; without one NumPy's and torch's CPU tensors, on the emulator.
torch is optional.
"""

import numpy as np

import dsv4_rt
from dsv4_rt.formats import BF16
from dsv4_rt.kv.ops import append_kv, compute_valid_lens, gather_kv
from dsv4_rt.memory import KVLayout, KVPool

LAYER, PROMPT = 2, 300  # Flash's first layer with compressed entries


def main():
    device = dsv4_rt.device()
    rng = np.random.default_rng(0)
    callers = {"CuPy" if device.kind == "cuda" else "NumPy": device.array}
    try:
        import torch
    except ImportError:
        print("torch is not installed: its part is left out")
    else:
        where = f"cuda:{device.index}" if device.kind == "cuda" else "cpu"

        def tensor(x):
            given = torch.from_numpy(x.view(np.int16) if x.dtype == BF16 else x)
            return given.view(torch.bfloat16 if x.dtype == BF16 else given.dtype).to(where)

        callers["torch"] = tensor

    print(f"on {device.name}")
    for name, make in callers.items():
        layout = KVLayout.for_model(dsv4_rt.FLASH)
        pool = KVPool(layout, pages=8, checkpoints=0, max_sequences=2, max_length=1024, max_in_flight=512)
        pages = pool.view(LAYER, "csa")

        def step(seqs, count, pool=pool, pages=pages, make=make):
            """Reserve places, bring the tables to the device, write: one entry for every fourth token."""
            pool.extend(seqs, count)
            n = pool.step_tokens
            pool.upload()
            x = rng.standard_normal((n, 512)).astype(BF16)
            append_kv(make(x), pool.slot_mapping("csa")[:n], pages)
            return x[3::4]

        def see(seq, pool=pool, pages=pages, make=make):
            """All entries a sequence's last token can see."""
            row = make(np.array([pool.row(seq)], np.int32))
            last = make(np.array([pool.length(seq) - 1], np.int32))
            lens = compute_valid_lens(last, pool.block_table("csa"), 4, row=row)
            count = int(lens[0])
            index = make(np.arange(count, dtype=np.int32)[None])
            return gather_kv(index, pool.block_table("csa"), pages, row=row)[0]

        prompt = pool.create()
        past = step(prompt, PROMPT)
        other = pool.fork(prompt)  # shares the pages; the last one is copied as soon as one of both writes to it
        ours, theirs = step(prompt, 4), step(other, 4)
        for seq, mine in ((prompt, ours), (other, theirs)):
            got = see(seq)
            back = np.array(device.numpy(got) if name != "torch" else got.float().cpu().numpy(), np.float32)
            want = np.concatenate([past, mine]).astype(np.float32)
            error = np.abs(back - want).max() / np.abs(want).max()
            assert back.shape == want.shape
            assert error < 2.0**-4, error  # half a step of e4m3
            kind = f"{type(got).__module__.partition('.')[0]}.{type(got).__name__}"
            print(f"{name:6} sequence {seq}: {len(back)} entries as {kind}, largest error {error:.4f}")


if __name__ == "__main__":
    main()
