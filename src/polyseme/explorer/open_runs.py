"""Opens the runs to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from polyseme.explorer.runfiles import RunFiles
from polyseme.store import RunFolder
from polyseme.views import Run


def open_all(sources: Sequence[Run | str | Path]) -> list[RunFiles]:
    """Open runs, each with a unique title.

    Raises
    ------
    RunError
        One of them cannot be opened.
    """
    runs = [run if isinstance(run, Run) else Run(RunFolder.salvaged(run)) for run in sources]
    return [RunFiles(run, title) for run, title in zip(runs, titles(runs), strict=True)]


def titles(runs: Sequence[Run]) -> list[str]:
    """The folders' names; duplicates get the parent folder's name, then numbers."""
    paths = [run.path.absolute() for run in runs]
    names = [path.name for path in paths]
    alike = Counter(names)
    names = [
        f"{path.parent.name}/{name}" if alike[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    alike = Counter(names)
    return [
        f"{name} ({number})" if alike[name] > 1 else name for number, name in enumerate(names, 1)
    ]
