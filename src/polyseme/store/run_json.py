"""Reading run.json, which says whether a folder is a finished run, and of which version."""

from __future__ import annotations

import os
from pathlib import Path

from polyseme.errors import RunError
from polyseme.store.damage import locate, reporting
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    JSON,
    LONGEST_RUN_JSON,
    RUN_JSON,
    Problem,
    decode_json,
    require,
)


def read_run_json(path: Path) -> dict[str, JSON]:
    """The metadata of a finished run of a version that this reader knows.

    Raises
    ------
    RunError
        There is no such run, or its run.json is damaged or newer.
    """
    unfinished = (
        "go on with it by resume=True (--resume), or start again with overwrite=True (--overwrite)"
    )
    aside = path.with_name(path.name + ".partial") if path.name else path
    if (path / "partial.json").is_file():
        raise RunError(f"{path} is an unfinished analysis: {unfinished}.")
    if not os.path.lexists(path):
        if (aside / "partial.json").is_file():
            raise RunError(f"{path} is not finished, {aside} holds what there is: {unfinished}.")
        raise RunError(
            f"{path} does not exist. Give the folder that polyseme analyse wrote "
            "(its --out, or out= in Python)."
        )
    if not path.is_dir():
        raise RunError(f"{path} is not a folder. A run is a folder with a run.json: give that.")
    if not os.path.lexists(path / RUN_JSON):
        raise RunError(
            f"{path} is not a run: it has no {RUN_JSON}. A run is a folder with a {RUN_JSON}, "
            "as polyseme analyse writes it."
        )
    with reporting(path):
        file = locate(path, RUN_JSON)
        if file.stat().st_size > LONGEST_RUN_JSON:
            raise Problem(RUN_JSON, f"it is longer than {LONGEST_RUN_JSON} bytes")
        metadata = decode_json(file.read_bytes(), RUN_JSON)
        if metadata.get("format") != FORMAT:
            raise Problem(RUN_JSON, f'it does not say "format": "{FORMAT}"')
        version = require(metadata, "format_version", int)
        if version < 1:
            raise Problem(RUN_JSON, f"'format_version' is {version}, but versions start at 1")
    if version > FORMAT_VERSION:
        raise RunError(
            f"{path / RUN_JSON} has format version {version if version < 10**18 else '(huge)'}, "
            f"and this polyseme reads versions up to {FORMAT_VERSION}. "
            "Upgrade it: pip install --upgrade polyseme"
        )
    return metadata
