"""Opens a run; what needs its model is loaded only when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyseme.errors import MissingDependencyError
from polyseme.store import RunFolder
from polyseme.views import Run

if TYPE_CHECKING:
    from polyseme.views import Probe


def open_run(path: str | Path) -> Run:
    """Open a run.

    Parameters
    ----------
    path : str or Path
        A folder that `analyse` wrote, or a URL such as ``s3://bucket/run``. A run at a URL is
        copied to the cache once, checked, and read from there.

    Returns
    -------
    Run
        Only `Run.probe` needs torch.

    Raises
    ------
    RunError
        If it is missing, not a run, unfinished, of a newer version, or damaged.
    """
    return Run(RunFolder(path), _probe)


def _probe(*arguments: Any, **options: Any) -> Probe:
    try:
        from polyseme.analysis.probing import probe
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("Probing a run", "torch", "torch") from error
    return probe(*arguments, **options)
