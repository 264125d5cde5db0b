"""Writing a run: in a separate folder, in resumable steps, published atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from polyseme.errors import InputError, RunError
from polyseme.remote import is_url
from polyseme.store.files import (
    ASIDE,
    LITTER,
    DamagedRunError,
    plain_json,
    read_json,
    sha256,
    whole,
    writing,
)
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    INPUT_ARRAYS,
    INPUTS_FILE,
    JSON,
    RUN_JSON,
    SITE_ARRAYS,
    SITES_FOLDER,
    TABLES,
    Array,
    Problem,
    data_files,
    missing_inputs,
    site_file,
    table_file,
)
from polyseme.store.kind import Kind
from polyseme.store.parquet_tables import arrow_table, write_table
from polyseme.store.partial import Partial
from polyseme.store.reader import RunFolder
from polyseme.store.run_json import WRITTEN, parse_sites, write_run_json
from polyseme.store.safetensors_files import (
    cast,
    load_state,
    overwrite,
    save_state,
    storable,
    write_arrays,
)

_STATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def _fingerprint(path: Path) -> dict[str, JSON] | None:
    """Fingerprint of a run of any version, in any state; None if the folder is not a run."""
    content = read_json(path / RUN_JSON) if path.is_dir() else {}
    return content.get("fingerprint", {}) if content.get("format") == FORMAT else None


def _foreign(path: Path) -> set[str]:
    """Names in a run folder that polyseme did not write."""
    ours = {RUN_JSON, RUN_JSON + ASIDE, INPUTS_FILE, SITES_FOLDER, *map(table_file, TABLES)}
    foreign = {entry.name for entry in path.iterdir()} - ours
    sites = path / SITES_FOLDER
    return foreign | {
        f"{SITES_FOLDER}/{entry.name}"
        for entry in (sites.iterdir() if sites.is_dir() else ())
        if not (entry.suffix == ".safetensors" and entry.stem.isdecimal())
        and entry.name not in LITTER
    }


RUN = Kind(
    work="analysis",
    result="a polyseme run",
    format=f"{FORMAT} {FORMAT_VERSION}",
    fingerprint=_fingerprint,
    foreign=_foreign,
    manifest=RUN_JSON,
    check=RunFolder,
)


class Writer(AbstractContextManager[Any]):
    """Writes one result of its kind into ``<out>.partial`` and renames it to `out` at the end.

    Use it as a context manager: on exit, with or without an error, it unlocks the folder and keeps
    what was written for a resume.

    Parameters
    ----------
    out : str or Path
        The folder to create, with its parents, or a URL.
    fingerprint : mapping
        JSON that identifies the work: settings, model and data. Work with equal fingerprints is
        taken to be the same.
    overwrite : bool
        Replace an existing result once the new one is complete, and discard an unfinished one.
    resume : bool
        Continue unfinished work with the same fingerprint, if there is any.

    Attributes
    ----------
    path : str or Path
        The folder to create, or its URL.
    finished : bool
        `out` is already the finished result with this fingerprint: nothing is left to do.
    resumed : bool
        Unfinished work is being continued; `load_state` returns its checkpoints.

    Raises
    ------
    InputError
        Both flags were given, the output has no name, or the fingerprint is not JSON.
    RunError
        The output is in the way, belongs to other work, or is in use.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        out: str | Path,
        *,
        fingerprint: Mapping[str, JSON],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        partial = Partial(out, self.kind, fingerprint, overwrite=overwrite, resume=resume)
        self.path: str | Path = out if is_url(out) else Path(out)
        self.finished, self.resumed = partial.finished, partial.resumed
        self._partial: Partial | None = None if partial.finished else partial

    # ---------------------------------------------------------------------------- context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._partial is not None:
            self._partial.__exit__(*raised)
            self._partial = None

    def close(self) -> None:
        """Unlock the folder; what was written stays for a resume."""
        self.__exit__(None, None, None)

    def _at_work(self) -> Partial:
        if self._partial is None:
            reason = "is finished" if self.finished else "was closed"
            raise RunError(f"The writer of {self.path} {reason}: open another RunWriter to write.")
        return self._partial

    # ------------------------------------------------------------------------ checkpoints

    def save_state(
        self, name: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, JSON]
    ) -> None:
        """Save a checkpoint, atomically replacing one of the same name.

        Parameters
        ----------
        name : str
            Letters, digits, ``_``, ``.`` and ``-``.
        arrays : mapping of str to ndarray
            Booleans, integers or floats, of any shape.
        metadata : mapping
            JSON to save with them.

        Raises
        ------
        InputError
            A bad name, an array that safetensors cannot hold, or metadata that is not JSON.
        """
        save_state(self._state_file(name), arrays, metadata)

    def load_state(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, JSON]] | None:
        """Load the checkpoint that `save_state` saved under a name; None if there is none.

        Raises
        ------
        RunError
            The file is damaged.
        """
        return load_state(self._state_file(name))

    @property
    def state_folder(self) -> Path:
        """Folder of checkpoints, and of anything else needed until the run is finished."""
        return self._at_work().state

    def _state_file(self, name: str) -> Path:
        if not _STATE_NAME.fullmatch(name):
            raise InputError(
                f"A state cannot be named {name!r}: use letters, digits, '_', '.' and '-', at most "
                "100, not starting with '.' or '-'."
            )
        return self.state_folder / f"{name}.safetensors"


class RunWriter(Writer):
    """Writes one run; see `Writer`."""

    kind = RUN

    # --------------------------------------------------------------------------- contents

    def write_inputs(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the inputs that examples refer to.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            ``index`` int64 (M,), strictly increasing. Images: ``pixels`` uint8 or float32
            (M, ...), optionally ``labels`` int64 (M,). Texts: ``tokens`` int32 (M, L), ``lengths``
            int32 (M,), and `vocabulary_arrays`. Others are kept unchanged.

        Raises
        ------
        InputError
            An array is missing or cannot be cast to the format's dtype without loss.
        """
        self._write_arrays(INPUTS_FILE, arrays, INPUT_ARRAYS)

    def write_site(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of one site.

        Parameters
        ----------
        number : int
            Position of the site in the ``sites`` given to `finish`.
        arrays : mapping of str to ndarray
            ``weights`` float32 (n_neurons, d_in); ``vectors`` float16 or float32 (R, d_in);
            ``tree`` float64 (sum of max(n_examples - 1, 0), 4); ``histogram`` int64
            (n_neurons, bins); ``histogram_upper`` float64 (n_neurons,); and optional ones, see
            docs/run-format.md. Other arrays are kept unchanged.

        Raises
        ------
        InputError
            An array is missing or cannot be cast to the format's dtype.
        """
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise InputError(f"A site is numbered from 0, not {number!r}.")
        self._write_arrays(site_file(int(number)), arrays, SITE_ARRAYS)

    def overwrite_in_site(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace the values of some arrays that `write_site` wrote."""
        file = self._at_work().result / site_file(number)
        with writing(file):
            overwrite(file, arrays)

    def _write_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray], schema: Mapping[str, Array]
    ) -> None:
        file = self._at_work().result / name
        missing = [key for key, array in schema.items() if array.required and key not in arrays]
        missing += missing_inputs(arrays) if schema is INPUT_ARRAYS else []
        if missing:
            raise InputError(f"{name} needs the array {missing[0]!r}; got {sorted(arrays)}.")
        plain = {}
        for key, value in arrays.items():
            value = storable(name, key, value)
            if key in schema and str(value.dtype) not in schema[key].dtypes:
                value = cast(f"{key!r} of {name}", value, schema[key].dtypes)
            plain[key] = value
        write_arrays(file, plain)

    def write_tables(
        self,
        *,
        neurons: pd.DataFrame,
        examples: pd.DataFrame,
        features: pd.DataFrame,
        random: pd.DataFrame,
    ) -> None:
        """Write the four tables, in the columns and dtypes of the format.

        Parameters
        ----------
        neurons, examples, features, random : DataFrame
            With at least the columns of the format, in any order, cast if no value changes except
            by rounding floats. Other columns of numbers, booleans or text are kept.

        Raises
        ------
        InputError
            A column is missing, or cannot be cast.
        """
        run = self._at_work().result
        frames = {"neurons": neurons, "examples": examples, "features": features, "random": random}
        tables = {name: arrow_table(name, frame) for name, frame in frames.items()}

        def write(name: str) -> None:
            file = run / table_file(name)
            with writing(file), whole(file) as aside:
                write_table(tables[name], aside)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, tables))

    # ----------------------------------------------------------------------------- finish

    def finish(self, metadata: Mapping[str, JSON]) -> str | Path:
        """Check everything written, seal it with run.json and move it into place.

        Parameters
        ----------
        metadata : mapping
            JSON for run.json: ``sites``, ``settings``, ``model``, ``data`` and any other keys. The
            format, the versions, the date, the fingerprint and the files are added.

        Returns
        -------
        str or Path
            The finished run.

        Raises
        ------
        InputError
            The metadata is not JSON, or sets a key that the writer adds.
        RunError
            What was written is not a valid run, or cannot be moved into place. Everything stays for
            a resume.
        """
        partial = self._at_work()
        if taken := [key for key in WRITTEN if key in metadata]:
            raise InputError(f"The metadata cannot set {taken[0]!r}: the writer does.")
        content: dict[str, JSON] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "polyseme_version": partial.versions[-1].get("polyseme", "unknown"),
            "created": _now(),
            **plain_json("metadata", metadata),
            "versions": partial.versions,
            "fingerprint": partial.fingerprint,
        }
        try:
            names = data_files(len(parse_sites(content)))
            for name in names:
                if not (partial.result / name).is_file():
                    raise Problem(name, "it was not written")
            with writing(partial.result):
                _remove_others(partial.result, {*names, RUN_JSON})
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    digests = list(pool.map(sha256, [partial.result / name for name in names]))
                content["files"] = {
                    name: {"bytes": (partial.result / name).stat().st_size, "sha256": digest}
                    for name, digest in zip(names, digests, strict=True)
                }
            RunFolder.unsealed(partial.result, content).load_all()
        except Problem as problem:
            raise RunError(f"What was written is not a valid run: {problem}.") from None
        except DamagedRunError as error:
            raise RunError(f"What was written is not a valid run: {error.problem}.") from None
        write_run_json(partial.result, content, resumable=True)
        partial.publish()
        self.finished = True
        self.close()
        return self.path


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _remove_others(run: Path, names: set[str]) -> None:
    """Remove leftovers of an interrupted write, so that the run holds only files of the format."""
    for file in sorted(run.rglob("*")):
        if not file.is_dir() and file.relative_to(run).as_posix() not in names:
            file.unlink()
