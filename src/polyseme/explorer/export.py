"""The explorer as static files, to put on any web host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyseme.explorer.root import WebRoot

if TYPE_CHECKING:
    from polyseme.views import Run

_MARK = "polyseme-export"
"""Name of the file that says that a folder is an export, and so may be replaced by another."""


def export(
    runs: Run | str | Path | Sequence[Run | str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the pages of one run, or of several to compare, as static files.

    They are the files that `explore` serves, byte for byte, but for the page itself, which says
    that there is no server behind it. Paths are relative, so they work in any folder of any
    web host, and from a plain ``python -m http.server``.

    Parameters
    ----------
    runs : Run, str, Path, or sequence of these
        Runs, or their folders.
    out : str or Path
        The folder to make, with its parents.
    overwrite : bool
        Replace an earlier export. Nothing else is ever replaced.
    progress : bool
        Show how far it is.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    RunError
        There is something at `out`; or a run cannot be opened, or is damaged where an export needs
        it.
    """
    from polyseme.explorer.opening import open_all
    from polyseme.store.partial import Kind, Partial

    given = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    root = WebRoot(lambda: open_all(given))
    root.runs  # noqa: B018 - before anything is made
    kind = Kind(
        work="export",
        result="an export of polyseme",
        format="polyseme-export 1",
        fingerprint=lambda path: {} if (path / _MARK).is_file() else None,
        foreign=lambda path: set(),
        resumable=False,
    )
    with Partial(out, kind, {}, overwrite=overwrite) as partial:
        _write(root, partial.result, progress)
        partial.publish()
    return Path(out)


def _write(root: WebRoot, folder: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import track

    from polyseme.store.files import writing

    for run in root.runs:
        run.check.join()  # an export says once and for all whether the files are as written
    paths = list(root.paths())
    shown = track(
        paths, "Exporting", console=Console(stderr=True), disable=not progress, transient=True
    )
    for path in shown:
        file, content = folder / path, root.file(path)
        with writing(file, resumable=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    with writing(folder / _MARK, resumable=False):
        (folder / _MARK).write_text("Written by polyseme export; --overwrite may replace it.\n")
