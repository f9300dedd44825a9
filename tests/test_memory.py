"""What a process no longer needs goes back to the system."""

import ctypes
import sys

import pytest
import torch

from gradientspace.memory import PeakMemory, repeated_size, resident_bytes, return_free_memory


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc"
)
def test_memory_that_is_free_is_returned() -> None:
    return_free_memory()
    before = resident_bytes()
    # Small blocks come from the heap; every 64th stays, so that the heap cannot shrink from its end.
    blocks = [torch.ones(2_000) for _ in range(20_000)]
    grown = resident_bytes() - before
    kept = blocks[::64]
    del blocks
    return_free_memory()
    assert grown > 100 * 2**20
    assert resident_bytes() - before < grown / 2
    assert len(kept) == 313


def test_sizes_repeat_and_are_hardly_larger() -> None:
    sizes = [repeated_size(n) for n in range(1, 4097)]
    assert all(n <= size < n * (1 + 1 / 16) or n == size for n, size in enumerate(sizes, start=1))
    assert len({size for size in sizes if 1024 < size <= 2048}) == 16
    assert sizes[:31] == list(range(1, 32))
    assert sorted(sizes) == sizes


def test_the_peak_is_seen_after_it_has_passed() -> None:
    before = resident_bytes()
    with PeakMemory(interval=0.001) as memory:
        rows = torch.ones(32 * 2**20)
        del rows
    assert memory.peak_bytes - before > 64 * 2**20
    assert memory.grown_bytes > 64 * 2**20
    with PeakMemory() as nothing:
        pass
    assert nothing.grown_bytes < 2**20
