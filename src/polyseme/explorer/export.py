"""The explorer as static files, to put on any web host."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polyseme.errors import InputError
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

    Of a run that is damaged in part the rest is written. A warning says what was left out, and so
    do the pages.

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
    InputError
        There is something at `out`.
    RunError
        A run cannot be opened at all.
    """
    from polyseme.explorer.opening import open_all

    given = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    target = Path(out)
    _refuse(target, overwrite)
    root = WebRoot(lambda: open_all(given))
    root.runs  # noqa: B018 - before anything is made
    aside = target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    aside.mkdir(parents=True)
    try:
        lost = _write(root, aside, progress)
        _refuse(target, overwrite)  # it may have appeared meanwhile
        _replace(aside, target.absolute())
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    lost += [f"{run.run.path / problem}" for run in root.runs for problem in run.damage]
    if lost:
        warnings.warn(
            f"The export in {target} is of a damaged run: {'; '.join(lost)}. What cannot be read "
            "is left out, and the rest may be wrong. Copy the run again from where it came, or "
            "analyse again, and then export it with overwrite=True (--overwrite).",
            stacklevel=2,
        )
    return target


def _refuse(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not (target / _MARK).is_file():
        raise InputError(
            f"{target} exists and is no export of polyseme, so it is not replaced. Give a folder "
            "that does not exist yet."
        )
    if not overwrite:
        raise InputError(
            f"{target} is an earlier export. Replace it with overwrite=True (--overwrite), or give "
            "another folder."
        )


def _write(root: WebRoot, folder: Path, progress: bool) -> list[str]:
    """Write every file; what cannot be made is left out, and the reasons are given."""
    from rich.console import Console
    from rich.progress import track

    from polyseme.store.damage import DamagedRunError

    for run in root.runs:
        run.check.join()  # an export says once and for all whether the files are as written
    paths = list(root.paths())
    shown = track(
        paths, "Exporting", console=Console(stderr=True), disable=not progress, transient=True
    )
    lost: dict[str, None] = {}
    for path in shown:
        try:
            body = root.file(path)
        except DamagedRunError as error:
            lost[str(error.path / str(error.problem))] = None
            continue
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
    (folder / _MARK).write_text("Written by polyseme export; it may be replaced by --overwrite.\n")
    return list(lost)


def _replace(aside: Path, target: Path) -> None:
    if not os.path.lexists(target):
        aside.rename(target)
        return
    old = aside.with_suffix(".old")
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
