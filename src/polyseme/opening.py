"""Opening a run together with what needs its model, which is loaded only when it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyseme import views
from polyseme.errors import MissingDependencyError

if TYPE_CHECKING:
    from polyseme.views import Probe, Run


def open_run(path: str | Path) -> Run:
    """Open a run.

    Parameters
    ----------
    path : str or Path
        A folder that `analyse` wrote, or a URL such as ``s3://bucket/run``: of a run there, a
        checked copy is read, which is made once and kept in the cache.

    Returns
    -------
    Run
        It is looked at without torch; only `Run.probe` needs it.

    Raises
    ------
    RunError
        If it is missing, no run, unfinished, of a newer version, or damaged.
    """
    return views.open_run(path, probe=_probe)


def _probe(*arguments: Any, **options: Any) -> Probe:
    try:
        from polyseme.analysis.probing import probe
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("Probing a run", "torch", "torch") from error
    return probe(*arguments, **options)
