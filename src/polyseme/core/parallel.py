"""Work on many neurons in threads: NumPy lets go of the interpreter's lock in its loops."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Chunk = TypeVar("Chunk")

# Looking for the libraries takes longer than a small site; NumPy's is loaded by now.
_blas = functools.cache(ThreadpoolController)
_worker = threading.local()


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
    # BLAS threads inside worker threads would fight over the cores.
    with (
        _blas().limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(workers, initializer=_busy) as pool,
    ):
        for _ in pool.map(work, chunks):
            pass


def _busy() -> None:
    _worker.busy = True
