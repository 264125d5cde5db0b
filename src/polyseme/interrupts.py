"""Delays interrupts until no step is half done."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM, with which schedulers and containers end a process. Its exit status is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


INTERRUPTS = (KeyboardInterrupt, Terminated)
"""What is raised when a process is asked to stop."""

_Handler = Callable[[int, FrameType | None], Any]


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """A handler of SIGINT and SIGTERM that raises at once."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handling(handler: _Handler) -> Iterator[dict[int, Any]]:
    """Handle SIGINT and SIGTERM within the context; yields the previous handlers.

    Ignored signals stay ignored. Outside the main thread this does nothing, because only the main
    thread is interrupted.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield before
    finally:
        for caught, former in before.items():
            signal.signal(caught, former)


@contextmanager
def interrupt_between_steps(patience: float = math.inf) -> Iterator[Callable[[], None]]:
    """Hold back an interrupt until the caller calls the yielded function; a second acts at once.

    In the middle of a step, only part of the state includes the batch, so nothing consistent can
    be saved. After `patience` seconds the interrupt acts even within a step.
    """
    caught: list[int] = []
    waiting = threading.Timer(patience, lambda: signal.raise_signal(caught[0]))
    waiting.daemon = True

    def act(number: int, frame: FrameType | None = None) -> None:
        former = before.get(number)
        # A previous handler that is not callable would end the process without an exception.
        (former if callable(former) else interrupt)(number, frame)
        interrupt(number)

    def hold(number: int, frame: FrameType | None) -> None:
        if caught:
            act(number, frame)
        caught.append(number)
        if patience < math.inf:
            waiting.start()

    def pause() -> None:
        if caught:
            waiting.cancel()
            act(caught[0])

    with handling(hold) as before:
        try:
            yield pause
        finally:
            waiting.cancel()
    pause()
