"""The contents of an untrusted run folder, each part checked when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from polyseme.store import invariants
from polyseme.store.files import locate
from polyseme.store.format import (
    GO_TOGETHER,
    INPUT_ARRAYS,
    INPUTS_FILE,
    JSON,
    SITE_ARRAYS,
    Problem,
    SiteInfo,
    data_files,
    is_text,
    missing_inputs,
    neuron_offsets,
    site_file,
    table_file,
)
from polyseme.store.parquet_tables import Table
from polyseme.store.run_json import check_metadata, parse_files, parse_sites
from polyseme.store.safetensors_files import Arrays

# Arrays of a site with checks of their own.
_CHECKED = ("tree", "meaning_tree", "histogram", "similar_features")
# A real table of random examples has several bytes per row, not several rows per byte; without this
# limit, a "bomb" of a few kilobytes could claim billions of rows. The arrays bound the other
# tables.
MOST_ROWS_PER_BYTE = 4


class Contents:
    """The files of one run. Made by `RunFolder`.

    Parameters
    ----------
    path : Path
        The run folder.
    metadata : dict
        run.json.
    tolerant : bool
        Skip damaged files, except run.json and the table of neurons.

    Attributes
    ----------
    damage : dict of str to Problem
        Problems of the files that a tolerant reader skips, by file; accessing such a file raises
        its problem.

    Raises
    ------
    Problem
        From the constructor and every member: a file does not conform to the format.
    """

    def __init__(self, path: Path, metadata: dict[str, JSON], *, tolerant: bool = False) -> None:
        self.path = path
        self.damage: dict[str, Problem] = {}
        self._tolerant = tolerant
        self._arrays: dict[str, Arrays] = {}
        self._tables: dict[str, Table] = {}
        self._whole: dict[str, pd.DataFrame] = {}
        self._starts: dict[str, np.ndarray] = {}
        self.sites = parse_sites(metadata)
        check_metadata(metadata)
        self._text = is_text(metadata)
        # Sizes of arrays, according to run.json.
        self._shape = () if self._text else tuple(metadata["data"]["shape"])
        self._window = sum(metadata["settings"]["window"]) + 1 if self._text else 0
        self.files = parse_files(metadata, data_files(len(self.sites)))
        for name in self.files:
            with self._noting(name):
                self.locate(name)
        self._check_sizes()

    @contextmanager
    def _noting(self, file: str) -> Iterator[None]:
        """Record a damaged file for a tolerant reader to skip; otherwise raise its problem."""
        try:
            yield
        except Problem as problem:
            if not self._tolerant or file == table_file("neurons"):
                raise
            self.damage.setdefault(problem.file, problem)

    def _refuse_damaged(self, file: str) -> None:
        if problem := self.damage.get(file):
            raise Problem(problem.file, problem.what) from problem.__cause__

    def _check_sizes(self) -> None:
        """Check that the files agree on their sizes, in an order where each bounds the next.

        Bytes on disk bound the arrays, and the arrays bound the tables, so a few bytes cannot
        make a reader allocate memory for billions of rows.
        """
        for site in self.sites:
            with self._noting(site_file(site.number)):
                if 4 * site.n_neurons * site.d_in > self.files[site_file(site.number)][0]:
                    raise Problem(
                        site_file(site.number),
                        f"it is too small for {site.n_neurons} neurons with d_in {site.d_in}",
                    )
        self._check_rows("neurons", sum(site.n_neurons for site in self.sites))
        counts = self.neurons["n_examples"].to_numpy()
        offsets = neuron_offsets(self.sites)
        for site in self.sites:
            with self._noting(site_file(site.number)):
                self._check_merges(site, counts[offsets[site.number] : offsets[site.number + 1]])
        self._check_rows("examples", int(counts.astype(np.int64).sum()))
        self._check_rows("features", int(self.neurons["n_clusters"].astype(np.int64).sum()))
        self._check_rows("random", None)
        with self._noting(INPUTS_FILE):
            self.inputs  # noqa: B018 - creating it checks its headers

    def _check_merges(self, site: SiteInfo, counts: np.ndarray) -> None:
        arrays = self.site(site.number)
        merges = int(invariants.tree_rows(counts).sum())
        n_rows = arrays.headers["tree"][1][0]
        if n_rows != merges:
            raise Problem(
                arrays.file,
                f"'tree' has {n_rows} rows, but the examples counted in neurons.parquet "
                f"make {merges}",
            )

    def locate(self, name: str) -> Path:
        """Path of a file of the run, once checked to be safe to open."""
        file = locate(self.path, name)
        size, recorded = file.stat().st_size, self.files[name][0]
        if size != recorded:
            raise Problem(
                name,
                f"it has {size} bytes, but run.json records {recorded}, so it was truncated or "
                f"changed",
            )
        return file

    def _check_rows(self, name: str, expected: int | None) -> None:
        with self._noting(table_file(name)):
            table = self.table(name)
            if expected is None:
                if not 0 <= table.n_rows <= MOST_ROWS_PER_BYTE * self.files[table.file][0]:
                    raise Problem(
                        table.file, f"it claims {table.n_rows} rows, which its size rules out"
                    )
            elif table.n_rows != expected:
                raise Problem(
                    table.file,
                    f"it has {table.n_rows} rows, but the rest of the run makes {expected}",
                )

    def table(self, name: str) -> Table:
        """A table, of which only the footer has been read."""
        self._refuse_damaged(table_file(name))
        if name not in self._tables:
            self._tables[name] = Table(name, self.locate, [site.name for site in self.sites])
        return self._tables[name]

    @property
    def neurons(self) -> pd.DataFrame:
        """The table of neurons, against which everything else is checked."""
        return self.whole("neurons")

    def whole(self, table: str) -> pd.DataFrame:
        """A whole table, checked and cached."""
        if table not in self._whole:
            if table == "neurons":
                frame = self.table(table).read()
                invariants.check_neurons(self.sites, frame)
            else:
                if table == "features":
                    self.whole("examples")  # features are checked against them
                frame = self.read(table, 0, len(self.neurons))
            self._whole[table] = frame
        return self._whole[table]

    def read(self, table: str, start: int, stop: int) -> pd.DataFrame:
        """Rows of a table that belong to neurons ``start`` to ``stop - 1``, checked."""
        offsets = self.offsets(table)
        begin, end = int(offsets[start]), int(offsets[stop])
        if table in self._whole:
            return self._whole[table].iloc[begin:end].reset_index(drop=True)
        frame = self.table(table).read(begin, end)
        if table == "examples":
            first = neuron_offsets(self.sites)
            # Only the sites concerned: the files of others may be damaged.
            n_vectors = [
                self._n_vectors(site.number)
                if first[site.number] < stop and start < first[site.number + 1]
                else 0
                for site in self.sites
            ]
            invariants.check_examples(
                self.sites, self.neurons, frame, n_vectors, self._held, start, stop
            )
        elif table == "features":
            examples = self.read("examples", start, stop)
            invariants.check_features(self.sites, self.neurons, frame, examples, start, stop)
        else:
            counts = np.diff(offsets)
            invariants.check_random(self.sites, counts, frame, self._held, start, stop)
        return frame

    def _n_vectors(self, number: int) -> int:
        """Number of rows of a site's vectors."""
        try:
            return int(self.site(number).headers["vectors"][1][0])
        except Problem:
            if not self._tolerant:
                raise
            return np.iinfo(np.int64).max  # following such a row raises an error later

    def offsets(self, unit: str) -> np.ndarray:
        """First row of each neuron in a table, or in a site's arrays with rows of this unit."""
        if unit not in self._starts:
            neurons = self.neurons
            if unit in ("n_neurons", "neurons"):
                counts = np.ones(len(neurons), np.int64)
            elif unit in ("n_examples", "examples"):
                counts = neurons["n_examples"].to_numpy(np.int64)
            elif unit in ("n_features", "features"):
                counts = neurons["n_clusters"].to_numpy(np.int64)
            elif unit == "merges":
                counts = invariants.tree_rows(neurons["n_examples"].to_numpy())
            else:
                counts = self._random_counts()
            self._starts[unit] = np.concatenate([[0], counts.cumsum()])
        return self._starts[unit]

    def _random_counts(self) -> np.ndarray:
        table = self.table("random")
        counts = self.neurons["n_random"].to_numpy(np.int64)
        if counts.sum() != table.n_rows:
            raise Problem(
                table.file, f"it has {table.n_rows} rows, but 'n_random' makes {counts.sum()}"
            )
        return counts

    @cached_property
    def _held(self) -> invariants.Held:
        return invariants.Held(self.inputs["index"], self.inputs.get("lengths"))

    def site(self, number: int) -> Arrays:
        """The arrays of one site."""
        file = site_file(number)
        self._refuse_damaged(file)
        if file not in self._arrays:
            site = self.sites[number]
            first = int(neuron_offsets(self.sites)[number])
            stop = first + site.n_neurons
            neurons = self.neurons.iloc[first:stop]

            def checking(array: str) -> Callable[[np.ndarray], None]:
                return lambda values: self.check_rows_of(number, array, values, first, stop)

            arrays = Arrays(
                self.path,
                self.locate,
                file,
                SITE_ARRAYS,
                {
                    "n_neurons": site.n_neurons,
                    "d_in": site.d_in,
                    "n_examples": int(neurons["n_examples"].sum()),
                    "n_features": int(neurons["n_clusters"].sum()),
                    **({"window": self._window} if self._text else {}),
                },
                {name: checking(name) for name in _CHECKED},
            )
            for names in GO_TOGETHER:
                missing = [name for name in names if name not in arrays]
                if 0 < len(missing) < len(names):
                    raise Problem(file, f"the array {missing[0]!r} is missing")
            if not self._text:
                self._check_shape(arrays, "activation_map")
            self._arrays[file] = arrays
        return self._arrays[file]

    def _check_shape(self, arrays: Arrays, name: str) -> None:
        """Check that the rows of an array have the shape of an input."""
        shape = arrays.headers[name][1][1:] if name in arrays else self._shape
        if math.prod(shape) != math.prod(self._shape):
            raise Problem(
                arrays.file,
                f"a row of {name!r} has shape {shape}, but 'data.shape' of run.json is "
                f"{self._shape}",
            )

    def check_rows_of(
        self, number: int, array: str, values: np.ndarray, start: int, stop: int
    ) -> None:
        """Check the part of a site's array that belongs to neurons ``start`` to ``stop - 1``."""
        if array in ("tree", "meaning_tree"):
            counts = self.neurons["n_examples"].to_numpy()[start:stop]
            invariants.check_tree(number, values, counts, array)
        elif array == "histogram":
            invariants.check_histogram(number, values)
        elif array == "similar_features":
            invariants.check_similar(number, values, self.table("features").n_rows)

    @cached_property
    def inputs(self) -> Arrays:
        """The arrays of the inputs."""
        self._refuse_damaged(INPUTS_FILE)
        arrays = Arrays(
            self.path,
            self.locate,
            INPUTS_FILE,
            INPUT_ARRAYS,
            {},
            {
                "index": invariants.check_index,
                "lengths": lambda lengths: invariants.check_lengths(
                    lengths, self.inputs.headers["tokens"][1][1]
                ),
                "vocabulary": invariants.check_vocabulary,
                "token_features": lambda features: invariants.check_token_features(
                    features, self.table("features").n_rows
                ),
                "token_features_ends": lambda ends: invariants.check_token_features_ends(
                    ends, self.inputs.headers["token_features"][1][0]
                ),
            },
        )
        for name in missing_inputs(arrays.headers):
            raise Problem(INPUTS_FILE, f"the array {name!r} is missing")
        if ("tokens" in arrays) != self._text:
            holds, says = ("texts", "images") if "tokens" in arrays else ("images", "texts")
            raise Problem(INPUTS_FILE, f"it holds {holds}, but run.json says {says}")
        if not self._text:
            self._check_shape(arrays, "pixels")
        if ("token_features" in arrays) != ("token_features_ends" in arrays):
            raise Problem(INPUTS_FILE, "it holds one of 'token_features' and its ends, not both")
        return arrays
