"""What is made in a folder, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseme.store.format import JSON


@dataclass(frozen=True)
class Kind:
    """What is made in a folder.

    Attributes
    ----------
    work, result : str
        What the making and what is made are called: "analysis", "a polyseme run".
    format : str
        Name and version of the format. Unfinished work of another one is not resumed.
    fingerprint : callable (Path) -> dict or None
        That of a finished result; None where a folder is no such thing.
    foreign : callable (Path) -> set of str
        What is in the folder of a result and no part of it.
    check : callable (Path or URL)
        Raises if a finished result is damaged.
    manifest : str
        The file that makes it whole: of a result at a URL it is written last.
    resumable : bool
        Whether unfinished work is worth resuming.
    """

    work: str
    result: str
    format: str
    fingerprint: Callable[[Path], Mapping[str, JSON] | None]
    foreign: Callable[[Path], set[str]]
    manifest: str
    check: Callable[[str | Path], Any] = lambda _: None
    resumable: bool = True
