"""Reading an untrusted run folder, which may be truncated or hostile."""

from __future__ import annotations

import operator
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from polyseme.errors import InputError, one_of
from polyseme.store import invariants
from polyseme.store.contents import Contents
from polyseme.store.files import reporting
from polyseme.store.format import (
    INPUTS_FILE,
    JSON,
    SITE_ARRAYS,
    TABLES,
    UNITS,
    Problem,
    SiteInfo,
    neuron_offsets,
    token_texts,
)
from polyseme.store.remote_runs import local_run
from polyseme.store.run_json import read_run_json, refuse_altered
from polyseme.store.safetensors_files import Arrays

# Neurons checked at a time in all tables: enough for long reads, few enough to fit in memory.
NEURONS_AT_A_TIME = 4096


class RunFolder:
    """A finished run on disk.

    Opening makes the cheap checks: of the metadata, that each file exists with its recorded size,
    that the files agree on their sizes, and of the neurons table. The other tables and the arrays
    are loaded and checked on first access; `rows`, `site_rows` and `contexts` read only the part
    that concerns some neurons or inputs.

    Parameters
    ----------
    path : str or Path
        The run folder, or its URL.

    Attributes
    ----------
    path : Path
        The run folder, as given; for a run at a URL, its local copy.
    metadata : dict
        run.json.
    sites : tuple of SiteInfo
        The layers of neurons, in the order of the files.

    Raises
    ------
    RunError
        From the constructor and every member: the folder is missing, not a run, unfinished, of
        another version or damaged, or does not conform to the format. The message names the file,
        what is wrong and what to do.
    """

    path: Path
    metadata: dict[str, JSON]
    sites: tuple[SiteInfo, ...]

    def __init__(self, path: str | Path) -> None:
        self._open(local_run(path))

    @classmethod
    def salvaged(cls, path: str | Path) -> RunFolder:
        """Open a run that may have damaged files, to read the rest.

        run.json and the table of neurons must be intact. Reading a damaged file raises the
        problem that `damage` reports for it.

        Parameters
        ----------
        path : str or Path
            The run folder.

        Raises
        ------
        RunError
            It is not a run, or run.json or the table of neurons is damaged.
        """
        folder = cls.__new__(cls)
        folder._open(local_run(path), tolerant=True)
        return folder

    @property
    def damage(self) -> list[str]:
        """What is wrong with each damaged file; empty unless the run was opened with `salvaged`."""
        return [str(problem) for problem in self._contents.damage.values()]

    @classmethod
    def unsealed(cls, path: Path, metadata: dict[str, JSON]) -> RunFolder:
        """Open a folder that lacks only its run.json, for the writer's check before sealing it."""
        folder = cls.__new__(cls)
        folder._open(path, metadata)
        return folder

    def _open(
        self, path: Path, metadata: dict[str, JSON] | None = None, *, tolerant: bool = False
    ) -> None:
        self.path = path
        with reporting(path):
            self.metadata = read_run_json(path) if metadata is None else metadata
            self._contents = Contents(path, self.metadata, tolerant=tolerant)
        self.sites = self._contents.sites

    @property
    def neurons(self) -> pd.DataFrame:
        """One row per neuron, dead ones included, ordered by site, then neuron number."""
        return self._contents.neurons

    @property
    def examples(self) -> pd.DataFrame:
        """One row per example, in the order of `neurons`, then example number."""
        with reporting(self.path):
            return self._contents.whole("examples")

    @property
    def features(self) -> pd.DataFrame:
        """One row per feature cluster, in the order of `neurons`, then feature number."""
        with reporting(self.path):
            return self._contents.whole("features")

    @property
    def random(self) -> pd.DataFrame:
        """Seeded random activating examples, in the order of `neurons`."""
        with reporting(self.path):
            return self._contents.whole("random")

    def rows(self, table: str, start: int, stop: int) -> pd.DataFrame:
        """Rows of a table that belong to a range of neurons, without reading the rest.

        Every rule of the format on these rows is checked, so no index in them points outside
        the run.

        Parameters
        ----------
        table : {"neurons", "examples", "features", "random"}
        start, stop : int
            Rows ``start`` to ``stop - 1`` of `neurons`, in any sites.

        Returns
        -------
        pandas.DataFrame
            In the order of the table, indexed from 0.

        Raises
        ------
        InputError
            The run has no such table, or fewer neurons.
        """
        if table not in TABLES:
            raise InputError(one_of("table", table, TABLES))
        start, stop = self._range(start, stop, len(self.neurons), "The run")
        with reporting(self.path):
            return self._contents.read(table, start, stop)

    def column(self, table: str, name: str) -> pd.Series[Any]:
        """All rows of one column of a table, without reading the rest.

        Unlike `rows`, this does not check the values against the rest of the run.

        Parameters
        ----------
        table : {"neurons", "examples", "features", "random"}
        name : str
            A column of the table.
        """
        if table not in TABLES:
            raise InputError(one_of("table", table, TABLES))
        with reporting(self.path):
            return self._contents.table(table).column(name)

    def columns(self, table: str) -> list[str]:
        """Names of the columns of a table."""
        if table not in TABLES:
            raise InputError(one_of("table", table, TABLES))
        with reporting(self.path):
            return self._contents.table(table).columns

    def offsets(self, unit: str) -> np.ndarray:
        """Index of the first row of each neuron.

        Parameters
        ----------
        unit : str
            Unit of the rows: a table (``"neurons"``, ``"examples"``, ``"features"`` or
            ``"random"``), or ``"merges"`` for the rows of trees.

        Returns
        -------
        ndarray of int64, shape (n_neurons + 1,)
            For each row of `neurons`, the first row that belongs to it; then one past the last. A
            site's arrays are indexed relative to the first row of the site's neuron 0.
        """
        if unit != "merges" and unit not in TABLES:
            raise InputError(one_of("unit", unit, [*TABLES, "merges"]))
        with reporting(self.path):
            return self._contents.offsets(unit)

    def first_neuron(self, number: int) -> int:
        """Row of `neurons` for neuron 0 of the site with this number."""
        return int(neuron_offsets(self.sites)[number])

    def site_rows(self, number: int, array: str, start: int, stop: int) -> np.ndarray:
        """Rows of a site's array that belong to a range of its neurons, without reading the rest.

        Parameters
        ----------
        number : int
            Which site.
        array : str
            An array whose rows belong to neurons, or to their examples, features or merges; see
            docs/run-format.md. Not ``vectors``, whose rows are shared: use ``site(number).take``.
        start, stop : int
            Neurons ``start`` to ``stop - 1`` of the site.

        Returns
        -------
        ndarray
            Checked as for the whole array.

        Raises
        ------
        InputError
            The run has no such site, or the site has no such array or fewer neurons.
        """
        arrays = self.site(number)
        known = SITE_ARRAYS.get(array)
        unit = known.shape[0] if known else None
        if array not in arrays or unit not in UNITS:
            named = (name for name in arrays if name in SITE_ARRAYS)
            have = [name for name in named if SITE_ARRAYS[name].shape[0] in UNITS]
            raise InputError(one_of("array", array, have))
        info = self.sites[number]
        start, stop = self._range(start, stop, info.n_neurons, f"Site {info.name!r}")
        first = self.first_neuron(number)
        with reporting(self.path):
            offsets = self._contents.offsets(str(unit))
            begin, end = (int(offsets[first + n] - offsets[first]) for n in (start, stop))
            rows = arrays.between(array, begin, end)
            self._contents.check_rows_of(number, array, rows, first + start, first + stop)
        return rows

    def contexts(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Some contexts of a run of texts, without reading the rest.

        Parameters
        ----------
        rows : array of int, shape (n,)
            Rows of the arrays in `inputs`.

        Returns
        -------
        tokens : ndarray of int32, shape (n, L)
            All in `token_texts`, except the padding.
        lengths : ndarray of int32, shape (n,)
        """
        with reporting(self.path):
            inputs = self._texts()
            tokens, lengths = inputs.take("tokens", rows), inputs.take("lengths", rows)
            invariants.check_contexts(tokens, lengths, inputs["vocabulary"])
        return tokens, lengths

    def features_of_token(self, row: int) -> np.ndarray:
        """Rows of `features` that a token represents, the feature with the most examples first.

        Parameters
        ----------
        row : int
            Row of the token in ``inputs["vocabulary"]``.

        Returns
        -------
        ndarray of int64
            Empty if the run has no token index.
        """
        with reporting(self.path):
            inputs = self._texts()
            row, _ = self._range(row, row + 1, len(inputs["vocabulary"]), "The vocabulary")
            if "token_features" not in inputs or "token_features_ends" not in inputs:
                return np.empty(0, np.int64)
            ends = inputs["token_features_ends"]
            start = int(ends[row - 1]) if row else 0
            features = inputs.between("token_features", start, int(ends[row]))
            invariants.check_token_features(features, self._contents.table("features").n_rows)
            return features

    def _texts(self) -> Arrays:
        if "tokens" not in self._contents.inputs:
            raise Problem(INPUTS_FILE, "it holds images, which have no tokens")
        return self._contents.inputs

    @staticmethod
    def _range(start: int, stop: int, length: int, what: str) -> tuple[int, int]:
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= length:
            raise InputError(f"Rows {start} to {stop} were requested; {what} has {length}.")
        return start, stop

    @property
    def inputs(self) -> Arrays:
        """The inputs that examples refer to; each array is loaded on first access.

        ``index`` int64 (M,); for images, ``pixels`` uint8 or float32 (M, ...) and, if the data
        has them, ``labels`` int64 (M,); for texts, ``tokens`` int32 (M, L) and ``lengths``
        int32 (M,), see `token_texts`. Row i is input number ``index[i]``.
        """
        with reporting(self.path):
            return self._contents.inputs

    def site(self, number: int) -> Arrays:
        """The arrays of one site; each is loaded on first access.

        Parameters
        ----------
        number : int
            Which site: a position in `sites`.

        Returns
        -------
        mapping of str to ndarray
            ``weights`` float32 (n_neurons, d_in), ``vectors`` float16 or float32 (R, d_in),
            ``tree`` float64 (merges, 4), ``histogram`` int64 (n_neurons, bins), ``histogram_upper``
            float64 (n_neurons,), and any others in the run.

        Raises
        ------
        InputError
            The run has no such site.
        """
        number = operator.index(number)
        if number not in range(len(self.sites)):
            raise InputError(
                f"Site {number} is not in this run: give a number from 0 to "
                f"{len(self.sites) - 1}, a position in .sites."
            )
        with reporting(self.path):
            return self._contents.site(number)

    def verify(self) -> None:
        """Check everything: the SHA-256 of each file, and every rule of the format on values.

        This reads the whole run.

        Raises
        ------
        RunError
            A file has changed since it was written, or violates the format.
        """
        refuse_altered(self.path)
        self.load_all()

    def load_all(self) -> None:
        """Check every rule of the format on values, reading a part at a time."""
        contents, n = self._contents, len(self.neurons)

        def read(start: int) -> None:
            for table in ("features", "random"):  # checking features checks their examples too
                contents.read(table, start, min(start + NEURONS_AT_A_TIME, n))

        def check(arrays: Arrays) -> None:
            for name in arrays.checked:
                arrays.load(name)

        with reporting(self.path):
            contents.offsets("random")  # computed once here, rather than by several threads
            sites = [contents.site(site.number) for site in self.sites]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for done in (
                    pool.map(read, range(0, n, NEURONS_AT_A_TIME)),
                    pool.map(check, [*sites, contents.inputs]),
                ):
                    list(done)
            if "tokens" in contents.inputs:
                invariants.check_texts(contents.inputs)

    @cached_property
    def token_texts(self) -> pd.Series[str]:
        """Text of each token of a run of texts, by token id."""
        with reporting(self.path):
            return token_texts(self._texts())
