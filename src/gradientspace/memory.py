"""The memory of this process: how much it holds, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import threading


class PeakMemory:
    """Peak resident memory of this process while the block runs, in bytes, sampled every 50 ms."""

    def __init__(self, interval: float = 0.05) -> None:
        self.peak_bytes = self._before = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak_bytes = max(self.peak_bytes, resident_bytes())
            self._stop.wait(self._interval)

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = self._before = resident_bytes()
        self._thread.start()
        return self

    @property
    def grown_bytes(self) -> int:
        """What the block held at its peak, beyond what was held before."""
        return self.peak_bytes - self._before

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def resident_bytes() -> int:
    """Resident set size of this process in bytes."""
    import psutil  # a dependency of accelerate

    return psutil.Process().memory_info().rss


def repeated_size(n: int) -> int:
    """`n` rounded up, by less than a sixteenth, to one of sixteen sizes a doubling, so that sizes of tensors repeat.

    For every size it has not seen the CPU's matrix library compiles a kernel, and keeps it in the midst of memory that
    is free a moment later. With batches of any size a long process ends with its memory in thousands of holes between
    kernels, and a search through them for every tensor.
    """
    step = 1 << max(0, n.bit_length() - 5)
    return -(-n // step) * step


def return_free_memory() -> None:
    """Give memory that is free back to the system, where the C library can (glibc).

    Batches of many lengths leave holes that glibc keeps: a run of many trainings came to hold several times what it
    uses.
    """
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
