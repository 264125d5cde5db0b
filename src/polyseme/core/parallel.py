"""Work on many neurons in threads: NumPy releases the GIL in its loops."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

Chunk = TypeVar("Chunk")

# Cached, as finding the libraries takes longer than a small site does. NumPy's is loaded by the
# first call.
_blas = functools.cache(ThreadpoolController)
_worker = threading.local()


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices several times faster than float32.

    Requires torch. Checks for AMX units: without them, bfloat16 is slower.
    """
    import torch

    tell: Any = getattr(torch.cpu, "get_capabilities", dict)
    return bool(tell().get("amx_bf16"))


def in_threads(
    work: Callable[[Chunk], None], chunks: Sequence[Chunk], threads: int | None = None
) -> None:
    """Call a function on each chunk, in several threads if there are several cores.

    Parameters
    ----------
    work : callable
        Must write its results where no other chunk's are written.
    chunks : sequence
    threads : int, optional
        Number of threads, by default one per core. A call within another's work uses one.
    """
    workers = min(threads or os.cpu_count() or 1, len(chunks))
    if workers <= 1 or getattr(_worker, "busy", False):
        for chunk in chunks:
            work(chunk)
        return
    with _limits, ThreadPoolExecutor(workers, initializer=_busy) as pool:
        for _ in pool.map(work, chunks):
            pass


class _Limits:
    """Limits BLAS and torch to one thread in `in_threads`, where theirs would compete for cores.

    Both limits apply to the process, so the first holder sets them and the last one restores the
    previous values. A thread that first uses torch after a holder has left gets all of torch's
    threads, which is only slower.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._blas: Any = None
        self._torch_threads: int | None = None

    def __enter__(self) -> None:
        torch = sys.modules.get("torch")
        with self._lock:
            if not self._holders:
                self._torch_threads = torch.get_num_threads() if torch else None
                self._blas = _blas().limit(limits=1, user_api="blas")
            if torch and self._torch_threads is not None:
                # Threads that are new to torch start with the value set last.
                torch.set_num_threads(1)
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        torch = sys.modules.get("torch")
        with self._lock:
            self._holders -= 1
            if torch and self._torch_threads is not None:
                # In each thread that set it, as each thread also has its own value.
                torch.set_num_threads(self._torch_threads)
            if not self._holders:
                self._blas.restore_original_limits()


_limits = _Limits()


def _busy() -> None:
    _worker.busy = True
