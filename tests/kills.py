"""Killing a process at any of its operations on files, as often as there are any.

The process that is killed comes from a fork server, which has loaded what it needs. What it is
killed at are Python's own audit events, so that nothing of the package is changed for it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KILLED = 86
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
Work = Callable[[Path], Any]


class Killing:
    """Runs work in a process that ends at the n-th operation on files below its folder."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*preload])

    def operations(self, work: Work, folder: Path) -> int:
        """How many there are; the work is done then."""
        done, count = self._run(work, folder, 0)
        assert done == 0, f"the work failed: exit status {done}"
        return count

    def kill(self, work: Work, folder: Path, at: int) -> None:
        done, _ = self._run(work, folder, at)
        assert done in (0, KILLED), f"the work failed before it was killed: exit status {done}"

    def _run(self, work: Work, folder: Path, at: int) -> tuple[int | None, int]:
        count = self._context.Value("i", 0)
        process = self._context.Process(target=_child, args=(work, folder, at, count))
        process.start()
        process.join(120)
        if process.exitcode is None:
            process.kill()
        return process.exitcode, count.value


def _child(work: Work, folder: Path, at: int, count: Any) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    below = f"{folder.resolve()}{os.sep}"
    counting = threading.Lock()

    def reached() -> bool:
        with counting:
            count.value += 1
            return bool(count.value == at)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS or not _is_below(event, args, below):
            return
        fresh = event == "open" and _truncates(args)
        if (event != "open" or fresh or _writes(args)) and reached():
            if fresh:  # as a process leaves it that is killed while it writes
                file = os.open(args[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.write(file, b"half of i")
            os._exit(KILLED)

    def counted_fsync(file: int) -> None:
        if reached():
            os._exit(KILLED)
        # The process is killed, not the machine: there is no need to wait for the disk.

    os.fsync = counted_fsync
    sys.addaudithook(hook)
    work(folder)


def _is_below(event: str, args: tuple[Any, ...], below: str) -> bool:
    if isinstance(args[0], int) or args[0] is None:
        return False
    path = os.fsdecode(args[0])
    # shutil removes by the name within a folder that is open.
    return path.startswith(below) or (
        not os.path.isabs(path) and event in ("os.remove", "os.rmdir")
    )


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    return any(c in (mode or "") for c in "wxa+") or bool(flags & (os.O_WRONLY | os.O_RDWR))


def _truncates(args: tuple[Any, ...]) -> bool:
    return "w" in (args[1] or "") or bool(args[2] & os.O_TRUNC)
