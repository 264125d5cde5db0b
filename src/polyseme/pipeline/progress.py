"""Progress on the terminal, and interrupts that come when nothing is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Hold back an interrupt until the caller calls what this yields; a second one acts at once.

    In the middle of a batch some sites have seen it and others have not, and there is nothing
    whole to save.
    """
    caught = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal caught
        if caught:
            raise KeyboardInterrupt
        caught = True

    def pause() -> None:
        if caught:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers, and only it is interrupted.
        yield pause
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pause
    finally:
        signal.signal(signal.SIGINT, before)
    pause()


@contextmanager
def progress_bars(show: bool) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    ) as bars:
        yield bars
