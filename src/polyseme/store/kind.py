"""The kinds of results that are written atomically to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseme.store.format import JSON


@dataclass(frozen=True)
class Kind:
    """A kind of result that is written to a folder.

    Attributes
    ----------
    work, result : str
        Names of the work and of its result: "analysis", "a polyseme run".
    format : str
        Name and version of the format. Unfinished work in another format is not resumed.
    fingerprint : callable (Path) -> dict or None
        Returns the fingerprint of a finished result; None if the folder is not one.
    foreign : callable (Path) -> set of str
        Returns the names in a result's folder that are not part of it.
    check : callable (Path or URL)
        Raises if a finished result is damaged.
    manifest : str
        The file that completes a result; at a URL it is written last.
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
