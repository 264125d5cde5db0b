"""The explorer as static files, to put on any web host."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyseme.explorer.root import WebRoot
from polyseme.remote import is_url

if TYPE_CHECKING:
    from polyseme.views import Run

_MARK = "polyseme-export"
"""Name of the file that marks a folder as an export, which another export may replace."""


def export(
    runs: Run | str | Path | Sequence[Run | str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> str | Path:
    """Write the pages of one run, or of several to compare, as static files.

    These are the files that `explore` serves, byte for byte, except for the page itself, which
    says that there is no live server. Paths are relative, so the pages work in any folder of any
    web host, and with ``python -m http.server``.

    If a run is partly damaged, the rest is written. A warning and the pages say what was left out.

    Parameters
    ----------
    runs : Run, str, Path, or sequence of these
        Runs, or their folders or URLs.
    out : str or Path
        The folder to create, with its parents, or a URL.
    overwrite : bool
        Replace an existing export. Nothing else is ever replaced.
    progress : bool
        Show progress on the terminal.

    Returns
    -------
    str or Path
        The folder, or the URL.

    Raises
    ------
    RunError
        `out` exists, or a run cannot be opened at all.
    """
    from polyseme.explorer.open_runs import open_all
    from polyseme.store.kind import Kind
    from polyseme.store.partial import Partial

    sources = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    root = WebRoot(lambda: open_all(sources))
    root.runs  # noqa: B018 - raises before anything is written
    kind = Kind(
        work="export",
        result="an export of polyseme",
        format="polyseme-export 1",
        fingerprint=lambda path: {} if (path / _MARK).is_file() else None,
        foreign=lambda path: set(),
        manifest=_MARK,
        resumable=False,
    )
    with Partial(out, kind, {}, overwrite=overwrite) as partial:
        lost = _write(root, partial.result, progress)
        partial.publish()
    lost += [f"{run.run.path / problem}" for run in root.runs for problem in run.damage]
    if lost:
        warnings.warn(
            f"The export in {out} is of a damaged run: {'; '.join(lost)}. What cannot be read is "
            "left out, and the rest may be wrong. Copy the run again from its source, or repeat "
            "the analysis, then export again with overwrite=True (--overwrite).",
            stacklevel=2,
        )
    return out if is_url(out) else Path(out)


def _write(root: WebRoot, folder: Path, progress: bool) -> list[str]:
    """Write every file that can be made; returns why the others could not."""
    from rich.console import Console
    from rich.progress import track

    from polyseme.store.files import DamagedRunError, writing

    for run in root.runs:
        run.check.join()  # the pages of an export state the result of the check
    paths = list(root.paths())
    shown = track(
        paths, "Exporting", console=Console(stderr=True), disable=not progress, transient=True
    )
    lost: dict[str, None] = {}
    for path in shown:
        try:
            content = root.file(path)
        except DamagedRunError as error:
            lost[str(error.path / str(error.problem))] = None
            continue
        file = folder / path
        with writing(file, resumable=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    with writing(folder / _MARK, resumable=False):
        (folder / _MARK).write_text("Written by polyseme export; --overwrite may replace it.\n")
    return list(lost)
