"""Adding to a finished run what was found out about it later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polyseme.errors import InputError
from polyseme.store.damage import reporting
from polyseme.store.format import JSON, RUN_JSON, Problem, digest_of, encode_run_json
from polyseme.store.partial import plain_json, replace_bytes, writing
from polyseme.store.run_json import read_run_json

_OF_THE_ANALYSIS = frozenset(
    (
        "format",
        "format_version",
        "polyseme_version",
        "created",
        "sites",
        "settings",
        "model",
        "data",
        "fingerprint",
        "seconds",
        "files",
        "sha256",
    )
)


def add_metadata(path: str | Path, metadata: Mapping[str, JSON]) -> None:
    """Add to the run.json of a finished run what was found out about it later, in one step.

    Parameters
    ----------
    path : str or Path
    metadata : mapping
        JSON by top-level key; a key that was added before is replaced.

    Raises
    ------
    InputError
        The metadata is not JSON, or is of a key that describes the analysis itself.
    RunError
        There is no such run, or its run.json is damaged or cannot be written.
    """
    path = Path(path)
    content = read_run_json(path)
    with reporting(path):
        if content.get("sha256") != digest_of(content):
            raise Problem(RUN_JSON, "it is not as written, by its own SHA-256")
    taken = [key for key in metadata if key in _OF_THE_ANALYSIS]
    if taken:
        raise InputError(f"{taken[0]!r} describes the analysis itself, and cannot be added later.")
    added = {**content, **plain_json("metadata", metadata)}
    if added != content:
        with writing(path / RUN_JSON):
            replace_bytes(path / RUN_JSON, encode_run_json(added))
