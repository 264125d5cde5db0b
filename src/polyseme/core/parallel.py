"""Work on many neurons in threads: NumPy lets go of the interpreter's lock in its loops."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
    with _one_thread_each(), ThreadPoolExecutor(workers, initializer=_busy) as pool:
        for _ in pool.map(work, chunks):
            pass


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Threads of BLAS and torch inside worker threads would fight over the cores."""
    torch = sys.modules.get("torch")
    with _blas().limit(limits=1, user_api="blas"):
        if torch is None:
            yield
            return
        # Threads that are new to torch begin with what was set last.
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _busy() -> None:
    _worker.busy = True
