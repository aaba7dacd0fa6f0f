"""What goes wrong with asynchronous copies and mbarriers is reported with lines; what is right raises no alarm."""

import numpy as np
import pytest
from asynchronous import WRAPPERS, all_schedules, launch
from programs import PRELUDE

from dsv4_rt.errors import Deadlock, KernelFault

# A warp loads tiles into a ring of STAGES slots, three warps add them up; slots are handed over by mbarriers.
RING = """
constexpr int STAGES = 3, WORDS = 96;
extern "C" __global__ void __launch_bounds__(128) ring(const u32* x, u32* y, int steps) {
    __shared__ alignas(128) u32 tile[STAGES][WORDS];
    __shared__ u64 full[STAGES], empty[STAGES];
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) { bar_init(&full[s], 1); bar_init(&empty[s], ARRIVALS); }
        fence_init();
    }
    __syncthreads();                                                                // after init
    if (threadIdx.x < 32) {
        if (threadIdx.x == 0)
            for (int k = 0; k < steps; ++k) {
                int s = k % STAGES, round = k / STAGES;
                if (round > 0) bar_wait(&empty[s], (round - 1) & 1);                // wait for the slot
                bar_expect(&full[s], WORDS * 4);                                    // expect
                bulk_load(tile[s], x + k * WORDS, WORDS * 4, &full[s]);             // load
            }
    } else {
        u32 sum = 0, i = threadIdx.x - 32;
        for (int k = 0; k < steps; ++k) {
            int s = k % STAGES, round = k / STAGES;
            bar_wait(&full[s], round & 1);                                          // wait for the tile
            sum += tile[s][i] + tile[s][WORDS - 1 - i];
            FREE
        }
        y[i] = sum;
    }
}
"""
FREE = {
    "every consumer arrives": (96, "bar_arrive(&empty[s]);"),
    "a lane of each warp arrives": (3, "__syncwarp(); if (threadIdx.x % 32 == 0) bar_arrive(&empty[s]);"),
    "one consumer arrives": (
        1, 'asm volatile("bar.sync 1, 96;" ::: "memory"); if (threadIdx.x == 32) bar_arrive(&empty[s]);'
    ),
}  # fmt: skip


def ring(rng, kind="every consumer arrives", change=("", ""), **options):
    arrivals, free = FREE[kind]
    source = RING.replace("ARRIVALS", str(arrivals)).replace("FREE", free)
    assert change[0] in source
    x = rng.integers(0, 1 << 20, (11, 96), np.uint32)
    y = np.full(96, 0xA5, np.uint32)
    launch(source.replace(*change), "ring", 1, 128, x, y, np.int32(len(x)), **options)
    assert np.array_equal(y, (x + x[:, ::-1]).sum(axis=0))


@all_schedules
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
@pytest.mark.parametrize("kind", FREE)
def test_a_producer_and_consumers(rng, kind, order, completion):
    ring(rng, kind, order=order, completion=completion, seed=int(rng.integers(1000)))


RING_BUGS = {
    "no wait for the tile": (
        "bar_wait(&full[s], round & 1);", "", KernelFault, "reads the destination of an asynchronous cp.async.bulk"
    ),
    "the other parity": (
        "bar_wait(&full[s], round & 1);", "bar_wait(&full[s], ~round & 1);", (KernelFault, Deadlock),
        "reads the destination of an asynchronous cp.async.bulk|parity 1 of the mbarrier at _ZZ4ringE4full",
    ),
    "no wait for the slot": (
        "if (round > 0) bar_wait(&empty[s], (round - 1) & 1);", "", KernelFault,
        "WAR race on shared memory: cp.async.bulk|the destination of an asynchronous cp.async.bulk|more arrivals",
    ),
    "the slot's other parity": (
        "bar_wait(&empty[s], (round - 1) & 1);", "bar_wait(&empty[s], round & 1);", KernelFault,
        "WAR race on shared memory: cp.async.bulk|the destination of an asynchronous cp.async.bulk|more arrivals",
    ),
    "no expect_tx": (
        "bar_expect(&full[s], WORDS * 4);", "bar_arrive(&full[s]);", (KernelFault, Deadlock),
        "384 transaction bytes more than were expected|reads the destination",
    ),
    "too many bytes expected": ("bar_expect(&full[s], WORDS * 4)", "bar_expect(&full[s], WORDS * 4 + 16)", Deadlock,
                                "16 transaction bytes pending"),
    "too few bytes loaded": ("x + k * WORDS, WORDS * 4,", "x + k * WORDS, WORDS * 4 - 16,", Deadlock,
                             "16 transaction bytes pending"),
    "the consumer never arrives": ("bar_arrive(&empty[s]);", "", Deadlock, "96 of 96 arrivals pending"),
    "arrives before it reads": (
        "sum += tile[s][i] + tile[s][WORDS - 1 - i];\n"
        "            bar_arrive(&empty[s]);", "bar_arrive(&empty[s]); sum += tile[s][i] + tile[s][WORDS - 1 - i];",
        KernelFault, "WAR race on shared memory: cp.async.bulk|reads the destination of an asynchronous",
    ),
    "no barrier after init": ("__syncthreads();  ", "", KernelFault, "never initialised|orders it after the init"),
    "a count too high": ("bar_init(&empty[s], 96)", "bar_init(&empty[s], 97)", Deadlock, "1 of 97 arrivals pending"),
    "a count too low": ("bar_init(&empty[s], 96)", "bar_init(&empty[s], 64)", KernelFault,
                        "WAR race on shared memory: cp.async.bulk"),
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("bug", RING_BUGS)
def test_a_bug_in_the_ring_is_reported(rng, bug, completion):
    old, new, error, message = RING_BUGS[bug]
    with pytest.raises(error, match=message) as caught:
        ring(rng, change=(old, new), completion=completion)
    assert "program.cu:" in str(caught.value)
    assert "PTX line" in str(caught.value)


# Single mistakes, each in a kernel of one CTA of 64 threads.
SMALL = """
extern "C" __global__ void small(u32* x) {{
    __shared__ alignas(16) u32 tile[256];
    __shared__ u64 bar, other;
    u32 t = threadIdx.x, w = t / 32;
    if (t == 0) {{ bar_init(&bar, 64); bar_init(&other, 1); }}
    for (int i = t; i < 256; i += 64) tile[i] = i;
    __syncthreads();
    {body}
    asm volatile("cp.async.wait_all;" ::: "memory");
    bulk_wait<0>();
}}
"""
STATE = (
    'asm volatile("mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %0, [%1], {n};" : "=l"(s) : "r"(smem(&bar)));'
)
SMALL_BUGS = {
    "init of a barrier in use": ("bar_arrive(&bar); __syncthreads(); if (t == 0) bar_init(&bar, 64);",
                                 r"mbarrier.init: the mbarrier at (\S+, )?shared offset \S+ of CTA \(0, 0, 0\) lives"),
    "init with another count": ("if (t == 0) bar_init(&other, 2);", "mbarrier.init: .* lives"),
    "use after inval": ("if (t == 0) { bar_inval(&other); bar_arrive(&other); }", "was invalidated at(.|\n)*bar_inval"),
    "not initialised": ("if (t == 0) bar_arrive((u64*)&tile[0]);", "was never initialised"),
    "misaligned": ("if (t == 0) bar_arrive((u64*)&tile[1]);", "is not a multiple of 8"),
    "count of 0": ("if (t == 0) bar_init((u64*)&tile[0], 0);", "a count of 0; 1 to 1,048,575 are possible"),
    "too many arrivals": ("if (t == 0) { bar_arrive(&other); } bar_arrive(&bar); if (t < 2) bar_expect(&bar, 16);"
                          " bar_arrive(&bar);", "more arrivals than the phase expects"),
    "noComplete that completes": ("u64 s; if (t == 0) " + STATE.format(n=64), ".noComplete completes the phase"),
    "too many bytes": ("if (t == 0) for (int i = 0; i < 3; ++i) bar_expect(&bar, 400000);",
                       "becomes 1,200,000 bytes; 1,048,575 are possible"),
    "a load of the barrier": ("x[t] = ((volatile u32*)&bar)[0];",
                              "bytes of a live mbarrier, initialised at(.|\n)*bar_init"),
    "a store to the barrier": ("if (t == 0) bar = 0;", "bytes of a live mbarrier"),
    "cp.async not waited for": ("copy<16>(&tile[t * 4], x + t * 4); copy_commit(); x[t] = tile[t * 4];",
                                "reads the destination of an asynchronous cp.async"),
    "cp.async of a group too many": ("copy<16>(&tile[t * 4], x + t * 4); copy_commit(); copy_wait<1>();"
                                     "x[t] = tile[t * 4];", "reads the destination of an asynchronous cp.async"),
    "cp.async of another thread": ("copy<16>(&tile[t * 4], x + t * 4); copy_commit(); copy_wait<0>();"
                                   "x[t] = tile[(t ^ 32) * 4];", "RAW race|reads the destination"),
    "a store below cp.async": ("copy<16>(&tile[t * 4], x + t * 4); tile[t * 4] = 1;",
                               "overwrites the destination of an asynchronous cp.async"),
    "cp.async over what others read": ("u32 v = tile[(t ^ 32) * 4]; copy<16>(&tile[t * 4], x + t * 4); x[t] = v;",
                                       "WAR race on shared memory: cp.async|RAW race|reads the destination"),
    "a load that overtakes stores": ("tile[t] = t; if (t == 63) { bar_expect(&other, 256);"
                                     "bulk_load(tile, x, 256, &other); }", "WAW race on shared memory: cp.async.bulk"),
    "no proxy fence": ("tile[t] = t; __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); }",
                       "no fence.proxy.async lies between it and the store of CTA(.|\n)*tile\\[t\\] = t"),
    "a proxy fence of one writer": ("tile[t] = t; if (t < 32) fence_async(); __syncthreads();"
                                    "if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); }", "no fence.proxy.async"),
    "a proxy fence before the stores": (
        "fence_async(); tile[t] = t; __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); }",
        "no fence.proxy.async"),
    "no barrier before a store": (
        "tile[t] = t; fence_async(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); }",
        "RAW race on shared memory: cp.async.bulk|no fence.proxy.async"),
    "a source overwritten": ("fence_async(); __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); }"
                             "__syncthreads(); tile[t] = t;", "overwrites the source of an asynchronous cp.async.bulk"),
    "a source overwritten in a group too many": (
        "fence_async(); __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); bulk_wait_read<1>(); }"
        "__syncthreads(); tile[t] = t;", "overwrites the source of an asynchronous cp.async.bulk"),
    "a wait that others do not learn of": (
        "fence_async(); __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); bulk_wait_read<0>(); }"
        "tile[t] = t;", "overwrites the source of an asynchronous cp.async.bulk|WAW race|WAR race"),
    "one lane waits for its warp": (
        "if (t == 0) { bar_expect(&other, 256); bulk_load(tile, x, 256, &other); bar_wait(&other, 0); }"
        "if (t < 32) x[t] = tile[t];", "reads the destination of an asynchronous cp.async.bulk"),
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("bug", SMALL_BUGS)
def test_a_mistake_is_reported(tmp_path, bug, completion):
    body, message = SMALL_BUGS[bug]
    source = SMALL.format(body=body)
    (tmp_path / "program.cu").write_text(PRELUDE + WRAPPERS + source)
    with pytest.raises(KernelFault, match=message) as caught:
        launch(source, "small", 1, 64, np.zeros(256, np.uint32), completion=completion, roots=(tmp_path,))
    assert "program.cu:" in str(caught.value)
    assert "PTX line" in str(caught.value)


RIGHT = {
    "a barrier used again after inval": "if (t == 0) { bar_inval(&other); bar_init(&other, 1); bar_arrive(&other); }",
    "the bytes of an invalidated barrier": "if (t == 0) { bar_inval(&other); other = 5; x[0] = (u32)other; }",
    "a wait_group of one thread, then a barrier":
        "fence_async(); __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); bulk_wait_read<0>(); }"
        "__syncthreads(); tile[t] = t;",
    "the other half is written meanwhile":
        "fence_async(); __syncthreads(); if (t == 0) { bulk_store(x, tile, 256); bulk_commit(); } tile[64 + t] = t;",
    "tests until it is true": "bar_arrive(&bar); while (!bar_test(&bar, 0)) {}",
    "the phase before the first is complete": "bar_wait(&bar, 1);",
    "bytes arrive before they are expected":
        "if (t == 0) { bulk_load(tile, x, 256, &other); bar_expect(&other, 256); } bar_wait(&other, 0);"
        "x[t] = tile[t];",
    "a barrier of many phases":
        "for (int i = 0; i < 5; ++i) { bar_arrive(&bar); bar_wait(&bar, i & 1); tile[(t + i) % 64 * 4] = i; }",
    "a state": "u64 s = bar_arrive(&bar); while (!bar_try(&bar, s)) {}",
}  # fmt: skip


@all_schedules
@pytest.mark.parametrize("what", RIGHT)
@pytest.mark.parametrize("order", ["min-pc", "random", "reverse"])
def test_what_is_right_raises_no_alarm(rng, what, order, completion):
    seed = int(rng.integers(1000))
    x = np.zeros(256, np.uint32)
    launch(SMALL.format(body=RIGHT[what]), "small", 1, 64, x, order=order, seed=seed, completion=completion)
