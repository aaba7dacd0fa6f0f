"""The arena: what threads share, and what goes back to the system."""

import sys
import threading

from dsv4_rt.emulator import Machine


def test_allocations_of_many_threads_never_meet():
    memory = Machine("sm_90a").memory
    found: list[list[int]] = [[] for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda mine=mine: mine.extend(memory.alloc(64) for _ in range(2000)))
            for mine in found
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len({address for mine in found for address in mine}) == 8000


def test_freed_memory_goes_back_to_the_system():
    memory = Machine("sm_90a").memory
    page = 4096
    kept = memory.alloc(64)
    memory.view(kept, 64).fill(7)
    for _ in range(2000):
        address = memory.alloc(1500)  # several share a page
        memory.view(address, 1500).fill(1)
        memory.free(address)
    inside = address // page * page - 8 * page  # pages whose allocations are all gone read as fresh ones
    assert not memory.view(inside, page).any()
    assert (memory.view(kept, 64) == 7).all()
