"""Work on many neurons in threads: NumPy lets go of the interpreter's lock in its loops."""

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

# Looking for the libraries takes longer than a small site; NumPy's is loaded by now.
_blas = functools.cache(ThreadpoolController)
_worker = threading.local()


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 several times as quickly.

    It takes torch, and asks for units made for that (AMX): without them it is slower.
    """
    import torch

    tell: Any = getattr(torch.cpu, "get_capabilities", dict)
    return bool(tell().get("amx_bf16"))


def in_threads(
    work: Callable[[Chunk], None], chunks: Sequence[Chunk], threads: int | None = None
) -> None:
    """Call a function on each chunk, in several threads where there are several cores.

    Parameters
    ----------
    work : callable
        Writes what it finds where no other chunk does.
    chunks : sequence
    threads : int, optional
        By default one for each core. Within the work of another call there is one alone.
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
    """Held by all who work in threads: threads of BLAS and torch in these would fight over cores.

    Both limits are the process's, so the first one in sets them, and the last one out puts back
    what there was before. Threads that begin with torch after the first one is out have all of
    its threads, which only takes longer.
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
                # Threads that are new to torch begin with what was set last.
                torch.set_num_threads(1)
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        torch = sys.modules.get("torch")
        with self._lock:
            self._holders -= 1
            if torch and self._torch_threads is not None:
                # In each thread that set it, as it is the thread's own besides.
                torch.set_num_threads(self._torch_threads)
            if not self._holders:
                self._blas.restore_original_limits()


_limits = _Limits()


def _busy() -> None:
    _worker.busy = True
