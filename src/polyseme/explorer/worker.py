"""Work that takes long, away from the thread that answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A thread that does one job after the other; there is none until the first.

    Unlike a pool's it is a daemon: whoever stops the program does not wait for a model.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Have a job done; from the thread of the event loop alone."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """Let the thread end once it is at rest."""
        self._jobs.put(None)

    def _work(self) -> None:
        while entry := self._jobs.get():
            future, job = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            del entry, future, job  # what is done is not kept until the next
