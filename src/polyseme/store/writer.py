"""Writing a run: aside, in steps that can be resumed, and never half visible."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata as installed
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from polyseme.errors import InputError, RunError
from polyseme.store.arrays import overwrite
from polyseme.store.casting import arrow_table, cast, storable
from polyseme.store.damage import DamagedRunError, sha256
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    INPUT_ARRAYS,
    INPUTS_FILE,
    JSON,
    RUN_JSON,
    SITE_ARRAYS,
    Array,
    Problem,
    data_files,
    encode_run_json,
    missing_inputs,
    parse_sites,
    site_file,
    table_file,
)
from polyseme.store.partial import (
    ASIDE,
    OVERWRITE,
    PARTIAL_JSON,
    RESUME,
    RUN,
    STATE,
    Partial,
    differences,
    is_run,
    plain_json,
    read_json,
    refuse_to_replace,
    replace_bytes,
    writing,
)
from polyseme.store.reader import RunFolder
from polyseme.store.tables import write_table

_STATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
# An array, as a safetensors header has a limited size.
_STATE_METADATA = "metadata.json"
_WRITTEN_BY_US = "format format_version polyseme_version created fingerprint files sha256".split()


class RunWriter:
    """Writes one run into a sibling ``<out>.partial`` and renames it to `out` at the end.

    Use it as a context manager: leaving it, with or without an error, lets another process in
    and keeps what was written for a resume.

    Parameters
    ----------
    out : str or Path
        The run folder to make, with its parents.
    fingerprint : mapping
        JSON that identifies the analysis: settings, model and data. Two analyses with equal
        fingerprints are taken for the same.
    overwrite : bool
        Replace an existing run, once the new one is complete, and discard an unfinished one.
    resume : bool
        Go on with an unfinished analysis of the same fingerprint, if there is one.

    Attributes
    ----------
    path : Path
        The run folder to make.
    finished : bool
        `out` is the finished run of this fingerprint: there is nothing to do.
    resumed : bool
        An unfinished analysis is gone on with; `load_state` gives its checkpoints.

    Raises
    ------
    InputError
        Both flags at once, an output without a name, or a fingerprint that is not JSON.
    RunError
        Something is in the way, belongs to another analysis, or is in use.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        fingerprint: Mapping[str, JSON],
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        if overwrite and resume:
            raise InputError(
                f"{OVERWRITE} and {RESUME} exclude each other: the first starts again, the second "
                "goes on. Give one."
            )
        self.path = Path(out)
        if self.path.name in ("", ".."):
            raise InputError(
                f"The output {str(out)!r} has no name. Give a folder such as runs/new."
            )
        # Replacing means renaming, and what is meant is the run, not a link to it.
        target = Path(os.path.realpath(out)) if self.path.is_symlink() else self.path.absolute()
        self.finished = False
        self.resumed = False
        self._fingerprint = plain_json("fingerprint", fingerprint)
        self._partial: Partial | None = None
        self._overwrite = overwrite

        if resume and self._is_this_run(target) and not self._is_being_replaced(target):
            self.finished = True
            with suppress(RunError):  # in use or not ours: then it is not for us to remove
                self._forget_leftovers(target)
            return
        self._check_output(target, overwrite=overwrite, resume=resume)
        partial = Partial(target)
        try:
            # Again: it may have come back, or into being, before the lock was ours.
            self._check_output(target, overwrite=overwrite, resume=resume)
            before = partial.read()
            if before is not None and resume:
                self._go_on(partial, before)
            elif before is not None and not overwrite:
                raise RunError(
                    f"{partial.path} holds an unfinished analysis. Go on with it by {RESUME}, or "
                    f"discard it and start again by {OVERWRITE}."
                )
            elif resume and os.path.lexists(target):
                raise RunError(
                    f"{self.path} is the run of another analysis, so it cannot be resumed: "
                    f"{self._differences(read_json(target / RUN_JSON) or {})}. Choose another "
                    f"output, or replace it by {OVERWRITE}."
                )
            else:
                partial.start(self._fingerprint, overwrite=overwrite)
        except BaseException:
            partial.release()
            raise
        self._partial = partial

    def _check_output(self, target: Path, *, overwrite: bool, resume: bool) -> None:
        if not os.path.lexists(target):
            return
        if overwrite:
            refuse_to_replace(target)
        elif resume:
            if not is_run(target):
                raise RunError(
                    f"{self.path} is not a polyseme run, so it cannot be resumed. Choose another "
                    "output, or move it away."
                )
        else:
            raise RunError(
                f"{self.path} exists already. Replace it by {OVERWRITE}, go on with an unfinished "
                f"analysis by {RESUME}, or choose another output."
            )

    def _is_this_run(self, target: Path) -> bool:
        content = read_json(target / RUN_JSON) if is_run(target) else None
        if content is None or content.get("fingerprint") != self._fingerprint:
            return False
        RunFolder(target)  # raises where the run is damaged: "nothing to do" would be wrong
        return True

    def _is_being_replaced(self, target: Path) -> bool:
        """Whether the same analysis was begun again by overwrite=True, and is not complete."""
        aside = target.with_name(target.name + ".partial")
        before = read_json(aside / PARTIAL_JSON) or {}
        return (
            (aside / RUN).is_dir()
            and before.get("overwrite") is True
            and before.get("fingerprint") == self._fingerprint
        )

    def _forget_leftovers(self, target: Path) -> None:
        """Remove what a process left that was killed right after it moved this run in place."""
        if not target.with_name(target.name + ".partial").is_dir():
            return
        partial = Partial(target)
        try:
            before = partial.read() or {}
            if before.get("fingerprint") == self._fingerprint and not partial.run.exists():
                partial.discard()
        finally:
            partial.release()

    def _go_on(self, partial: Partial, before: Mapping[str, JSON]) -> None:
        if before["fingerprint"] != self._fingerprint:
            raise RunError(
                f"{partial.path} holds an unfinished analysis that is not this one: "
                f"{self._differences(before)}. Give the same settings, or discard it and start "
                f"again by {OVERWRITE}."
            )
        # An interrupted overwrite=True goes on as one: the permission was given then.
        self._overwrite = before.get("overwrite") is True
        if os.path.lexists(partial.out) and not self._overwrite:
            raise RunError(
                f"{self.path} exists already, and so does an unfinished analysis for it. Move the "
                f"first away, then go on by {RESUME}; or replace both by {OVERWRITE}."
            )
        partial.go_on()
        self.resumed = True

    def _differences(self, before: Mapping[str, JSON]) -> str:
        return differences(before.get("fingerprint", {}), self._fingerprint)

    # ---------------------------------------------------------------------------- context

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        refused = isinstance(error, Exception) and not (self.resumed or self._overwrite)
        if refused and self._partial is not None:
            # A mistake that was refused at once must not be in the way of its correction.
            self._partial.discard_if_empty()
        self.close()

    def close(self) -> None:
        """Let another process in; what was written stays for a resume."""
        if self._partial is not None:
            self._partial.release()
            self._partial = None

    def _at_work(self) -> Partial:
        if self._partial is None:
            reason = "is finished" if self.finished else "was closed"
            raise RunError(f"The writer of {self.path} {reason}: open another RunWriter to write.")
        return self._partial

    # ------------------------------------------------------------------------ checkpoints

    def save_state(
        self, name: str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, JSON]
    ) -> None:
        """Keep a checkpoint, replacing one of the same name in one step.

        Parameters
        ----------
        name : str
            Letters, digits, ``_``, ``.`` and ``-``.
        arrays : mapping of str to ndarray
            Booleans, integers or floats, of any shape.
        metadata : mapping
            JSON to keep with them.

        Raises
        ------
        InputError
            A bad name, an array that safetensors cannot hold, or metadata that is not JSON.
        """
        file = self._state_file(name)
        plain = {key: storable(f"state {name!r}", key, value) for key, value in arrays.items()}
        if _STATE_METADATA in plain:
            raise InputError(f"An array of a state cannot be named {_STATE_METADATA!r}.")
        text = json.dumps(plain_json(f"metadata of state {name!r}", metadata))
        plain[_STATE_METADATA] = np.frombuffer(text.encode(), dtype=np.uint8)
        _write_arrays(file, plain)

    def load_state(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, JSON]] | None:
        """The checkpoint that `save_state` kept under a name; None if there is none.

        Raises
        ------
        RunError
            The file is damaged.
        """
        file = self._state_file(name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="numpy") as opened:
                arrays = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
            metadata = json.loads(arrays.pop(_STATE_METADATA).tobytes())
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"{file} cannot be read back ({error}). Start the analysis again by {OVERWRITE}."
            ) from error
        return arrays, metadata

    @property
    def state_folder(self) -> Path:
        """Where checkpoints are, and what else is needed until the run is finished."""
        return self._at_work().path / STATE

    def _state_file(self, name: str) -> Path:
        if not _STATE_NAME.fullmatch(name):
            raise InputError(
                f"A state cannot be named {name!r}: use letters, digits, '_', '.' and '-', at most "
                "100, not starting with '.' or '-'."
            )
        return self.state_folder / f"{name}.safetensors"

    # --------------------------------------------------------------------------- contents

    def write_inputs(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the inputs that examples point at.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            ``index`` int64 (M,), strictly increasing. Images: ``pixels`` uint8 or float32
            (M, ...), optionally ``labels`` int64 (M,). Texts: ``tokens`` int32 (M, L), ``lengths``
            int32 (M,), and `vocabulary_arrays`. Others are kept as they are.

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
            Position of the site in the ``sites`` that `finish` is given.
        arrays : mapping of str to ndarray
            ``weights`` float32 (n_neurons, d_in); ``vectors`` float16 or float32 (R, d_in);
            ``tree`` float64 (sum of max(n_examples - 1, 0), 4); ``histogram`` int64
            (n_neurons, bins); ``histogram_upper`` float64 (n_neurons,); and those that may be
            missing, see docs/run-format.md. Other arrays are kept as they are.

        Raises
        ------
        InputError
            An array is missing or cannot be cast to the format's dtype.
        """
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
            raise InputError(f"A site is numbered from 0, not {number!r}.")
        self._write_arrays(site_file(int(number)), arrays, SITE_ARRAYS)

    def overwrite_in_site(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Put other values in the place of some arrays that `write_site` wrote."""
        file = self._at_work().run / site_file(number)
        with writing(file):
            overwrite(file, arrays)

    def _write_arrays(
        self, name: str, arrays: Mapping[str, np.ndarray], schema: Mapping[str, Array]
    ) -> None:
        file = self._at_work().run / name
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
        _write_arrays(file, plain)

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
            With at least the columns of the format, in any order, cast where no value changes
            but by rounding a float. Other columns of numbers, booleans or text are kept.

        Raises
        ------
        InputError
            A column is missing, or cannot be cast.
        """
        run = self._at_work().run
        frames = {"neurons": neurons, "examples": examples, "features": features, "random": random}
        tables = {name: arrow_table(name, frame) for name, frame in frames.items()}

        def write(name: str) -> None:
            file = run / table_file(name)
            with writing(file):
                write_table(tables[name], aside := file.with_name(file.name + ASIDE))
                os.replace(aside, file)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(write, tables))

    # ----------------------------------------------------------------------------- finish

    def finish(self, metadata: Mapping[str, JSON]) -> Path:
        """Check everything that was written, seal it with run.json and move it into place.

        Parameters
        ----------
        metadata : mapping
            JSON for run.json: ``sites``, ``settings``, ``model``, ``data`` and whatever else.
            The format, the versions, the date, the fingerprint and the files are added.

        Returns
        -------
        Path
            The finished run.

        Raises
        ------
        InputError
            The metadata is not JSON, or sets what the writer adds.
        RunError
            What was written is not a valid run, or it cannot be moved into place. All of it
            stays, for a resume.
        """
        partial = self._at_work()
        if taken := [key for key in _WRITTEN_BY_US if key in metadata]:
            raise InputError(f"The metadata cannot set {taken[0]!r}: the writer does.")
        content: dict[str, JSON] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "polyseme_version": _version(),
            "created": _now(),
            **plain_json("metadata", metadata),
            "fingerprint": self._fingerprint,
        }
        try:
            names = data_files(len(parse_sites(content)))
            for name in names:
                if not (partial.run / name).is_file():
                    raise Problem(name, "it was not written")
            with writing(partial.run):
                _remove_others(partial.run, {*names, RUN_JSON})
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    digests = list(pool.map(sha256, [partial.run / name for name in names]))
                content["files"] = {
                    name: {"bytes": (partial.run / name).stat().st_size, "sha256": digest}
                    for name, digest in zip(names, digests, strict=True)
                }
            RunFolder.unsealed(partial.run, content).load_all()
        except Problem as problem:
            raise RunError(f"What was written is not a valid run: {problem}.") from None
        except DamagedRunError as error:
            raise RunError(f"What was written is not a valid run: {error.problem}.") from None
        with writing(partial.run / RUN_JSON):
            replace_bytes(partial.run / RUN_JSON, encode_run_json(content))
        partial.publish(overwrite=self._overwrite)
        self.finished = True
        self.close()
        return self.path


def _version() -> str:
    try:
        return installed.version("polyseme")
    except installed.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _remove_others(run: Path, names: set[str]) -> None:
    """Remove what an interrupted write left, so that a run is the files of the format."""
    for file in sorted(run.rglob("*")):
        if not file.is_dir() and file.relative_to(run).as_posix() not in names:
            file.unlink()


def _write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    aside = file.with_name(file.name + ASIDE)
    with writing(file):
        try:
            save_file(dict(sorted(arrays.items())), aside)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        os.replace(aside, file)
