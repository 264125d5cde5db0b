"""Runs at URLs, read from a local copy."""

from __future__ import annotations

from pathlib import Path

from polyseme.errors import RunError
from polyseme.remote import (
    NothingThereError,
    RemotePath,
    cache_folder,
    is_url,
    key_of,
    placed,
    showing,
)
from polyseme.store.files import reporting
from polyseme.store.format import LONGEST_RUN_JSON, RUN_JSON, data_files
from polyseme.store.run_json import parse_files, parse_sites, read_run_json


def local_run(path: str | Path, *, again: bool = False) -> Path:
    """The folder of a run; for a run at a URL, its copy in the cache.

    A copy is keyed by its run.json, so a run that has changed is copied again. Each file is checked
    against that run.json, and only files that the format names are copied.

    Parameters
    ----------
    path : str or Path
        A folder or a URL.
    again : bool
        Copy and check the run even if it was copied before.

    Raises
    ------
    RunError
        There is no run at the URL, it is damaged or of another version, or it cannot be read.
    """
    if not is_url(path):
        return Path(path)
    remote = RemotePath(str(path))
    try:
        raw = (remote / RUN_JSON).read(LONGEST_RUN_JSON + 1)
    except NothingThereError as error:
        raise RunError(
            f"{error} A complete run has a {RUN_JSON}: give the URL that polyseme analyse wrote to "
            f"(its --out, or out= in Python)."
        ) from None
    copy = copy_of(remote, raw)
    if copy.is_dir() and not again:
        return copy
    with placed(copy.parent) as aside:
        run = aside / copy.name
        run.mkdir()
        (run / RUN_JSON).write_bytes(raw)
        try:
            _copy_files(remote, run)
        except RunError as error:
            raise RunError(str(error).replace(str(run), str(remote))) from None
    return copy


def _copy_files(remote: RemotePath, run: Path) -> None:
    metadata = read_run_json(run)
    with reporting(run):
        files = parse_files(metadata, data_files(len(parse_sites(metadata))))
    with showing(f"Fetching {remote.name}", sum(size for size, _ in files.values())) as show:
        for name, (_, digest) in files.items():
            file = run / name
            file.parent.mkdir(exist_ok=True)
            if (remote / name).copy(file, show) != digest:
                raise RunError(
                    f"{remote / name} has changed since it was written: its SHA-256 is not the one "
                    f"that {RUN_JSON} records. If the run was just being replaced, open it again; "
                    "otherwise copy it again from its source, or analyse again with "
                    "overwrite=True (--overwrite)."
                )


def copy_of(remote: RemotePath, run_json: bytes) -> Path:
    """Path of the copy of a run with this run.json, whether or not it exists."""
    return cache_folder() / "copies" / key_of(remote, run_json) / remote.name
