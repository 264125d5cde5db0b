"""Runs slow jobs outside the thread that answers requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """A thread that runs jobs one by one, started with the first job.

    Unlike a pool's threads it is a daemon, so stopping the program does not wait for a model.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """Submit a job; call this only from the event loop's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after its last job."""
        self._jobs.put(None)

    def _work(self) -> None:
        while entry := self._jobs.get():
            future, job = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)
            del entry, future, job  # do not keep a finished job until the next
