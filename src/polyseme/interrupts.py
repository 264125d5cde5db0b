"""Interrupts that come when nothing is half done."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """SIGTERM, by which schedulers and containers ask a process to end. Its status is 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


INTERRUPTS = (KeyboardInterrupt, Terminated)
"""What is raised when a process is asked to stop."""

_Handler = Callable[[int, FrameType | None], Any]


def interrupt(number: int, frame: FrameType | None = None) -> None:
    """The handler of SIGINT and SIGTERM that raises at once."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def handling(handler: _Handler) -> Iterator[dict[int, Any]]:
    """Handle SIGINT and SIGTERM for a while; yields the handlers before.

    Signals that are ignored stay ignored. In any thread but the main one nothing is handled, as
    only that one is interrupted.
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
    """Hold back an interrupt until the caller calls what this yields; a second one acts at once.

    In the middle of a step some of the work has seen a batch and some has not, and there is
    nothing whole to save. A step that takes so many seconds more is not waited for.
    """
    caught: list[int] = []
    waiting = threading.Timer(patience, lambda: signal.raise_signal(caught[0]))
    waiting.daemon = True

    def act(number: int, frame: FrameType | None = None) -> None:
        former = before.get(number)
        # What would have handled it is not asked if it would end the process without a word.
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
