"""Reading a run, with no trust in the folder: it may be a stranger's, cut short or hostile."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from polyseme.errors import InputError, RunError
from polyseme.store import invariants
from polyseme.store.damage import decoding, locate, reporting, sha256
from polyseme.store.format import (
    FORMAT,
    FORMAT_VERSION,
    INPUT_ARRAYS,
    INPUTS_FILE,
    JSON,
    LONGEST_RUN_JSON,
    RUN_JSON,
    SAFETENSORS_DTYPES,
    SITE_ARRAYS,
    TABLES,
    Array,
    Problem,
    SiteInfo,
    check_headers,
    data_files,
    decode_json,
    missing_inputs,
    parse_files,
    parse_sites,
    require,
    site_file,
    table_file,
)
from polyseme.store.texts import check_texts, token_texts

# A real table of random examples takes bytes for a row, not rows for a byte; a "bomb" of a few
# kilobytes can otherwise claim billions of rows. The other tables are bounded by the arrays.
MOST_ROWS_PER_BYTE = 64


class RunFolder:
    """A finished run on disk.

    Opening checks everything that is cheap: the metadata, that each file is there at its
    recorded size, that the files agree on their sizes, and the neurons table. The other tables
    and the arrays are loaded, and checked, when they are first asked for.

    Parameters
    ----------
    path : str or Path
        The run folder.

    Attributes
    ----------
    path : Path
        The run folder, as given.
    metadata : dict
        run.json.
    sites : tuple of SiteInfo
        The layers of neurons, in the order of the files.

    Raises
    ------
    RunError
        From the constructor and from every member: the folder is missing, no run, unfinished,
        of a newer version, damaged, or not what the format asks. The message names the file,
        what is wrong and what to do.
    """

    path: Path
    metadata: dict[str, JSON]
    sites: tuple[SiteInfo, ...]

    def __init__(self, path: str | Path) -> None:
        with reporting(Path(path)):
            metadata = read_run_json(Path(path))
        self._open(Path(path), metadata)

    @classmethod
    def unsealed(cls, path: Path, metadata: dict[str, JSON]) -> RunFolder:
        """A folder that lacks only its run.json, for the writer's check before it seals it."""
        folder = cls.__new__(cls)
        folder._open(path, metadata)
        return folder

    def _open(self, path: Path, metadata: dict[str, JSON]) -> None:
        self.path = path
        self.metadata = metadata
        self._arrays: dict[str, _Arrays] = {}
        with reporting(path):
            for key in ("polyseme_version", "created"):
                require(metadata, key, str)
            for key in ("settings", "model", "data"):
                require(metadata, key, dict)
            if "fingerprint" in metadata:
                require(metadata, "fingerprint", dict)
            self.sites = parse_sites(metadata)
            self._files = parse_files(metadata, data_files(len(self.sites)))
            for name in self._files:
                self._locate(name)
            self._check_sizes()

    def _check_sizes(self) -> None:
        """Check that the files agree on their sizes, in an order that bounds each by the last.

        Bytes on disk bound the arrays, the arrays bound the tables: so no claim of a few bytes
        makes a reader set aside memory for billions of rows.
        """
        offset = 0
        n_neurons = sum(site.n_neurons for site in self.sites)
        for site in self.sites:
            if 4 * site.n_neurons * site.d_in > self._files[site_file(site.number)][0]:
                raise Problem(
                    site_file(site.number),
                    f"it is too small for {site.n_neurons} neurons with d_in {site.d_in}",
                )
        self._check_rows("neurons", n_neurons)
        counts = self.neurons["n_examples"].to_numpy()
        for site in self.sites:
            arrays = self._site(site.number)
            merges = int(invariants.tree_rows(counts[offset : offset + site.n_neurons]).sum())
            given = arrays.headers["tree"][1][0]
            if given != merges:
                raise Problem(
                    arrays.file,
                    f"'tree' has {given} rows, but the examples counted in neurons.parquet "
                    f"make {merges}",
                )
            offset += site.n_neurons
        self._check_rows("examples", int(counts.astype(np.int64).sum()))
        self._check_rows("features", int(self.neurons["n_clusters"].astype(np.int64).sum()))
        self._check_rows("random", None)
        self._input_arrays  # noqa: B018 - its headers are checked as it is made

    # --------------------------------------------------------------------------- members

    @cached_property
    def neurons(self) -> pd.DataFrame:
        """One row a neuron, dead ones too, ordered by site, then neuron number."""
        with reporting(self.path):
            table = self._read_table("neurons")
            invariants.check_neurons(self.sites, table)
            return table

    @cached_property
    def examples(self) -> pd.DataFrame:
        """One row an example, in the order of `neurons`, then example number."""
        with reporting(self.path):
            table = self._read_table("examples")
            n_vectors = [self._site(site.number).headers["vectors"][1][0] for site in self.sites]
            invariants.check_examples(
                self.sites, self.neurons, table, n_vectors, self._input_arrays["index"]
            )
            return table

    @cached_property
    def features(self) -> pd.DataFrame:
        """One row a feature cluster, in the order of `neurons`, then feature number."""
        with reporting(self.path):
            table = self._read_table("features")
            invariants.check_features(self.sites, self.neurons, table, self.examples)
            return table

    @cached_property
    def random(self) -> pd.DataFrame:
        """Seeded random activating examples, in the order of `neurons`."""
        with reporting(self.path):
            table = self._read_table("random")
            invariants.check_random(self.sites, table, self._input_arrays["index"])
            return table

    @property
    def inputs(self) -> Mapping[str, np.ndarray]:
        """The inputs that examples point at; each array is loaded when it is first used.

        ``index`` int64 (M,); for images ``pixels`` uint8 or float32 (M, ...), and where the
        data has them ``labels`` int64 (M,); for texts ``tokens`` int32 (M, L) and ``lengths``
        int32 (M,), see `token_texts`. Row i is the input with number ``index[i]``.
        """
        return self._input_arrays

    def site(self, number: int) -> Mapping[str, np.ndarray]:
        """The arrays of one site; each is loaded when it is first used.

        Parameters
        ----------
        number : int
            Which site: a position in `sites`.

        Returns
        -------
        mapping of str to ndarray
            ``weights`` float32 (n_neurons, d_in), ``vectors`` float32 (R, d_in), ``tree``
            float64 (merges, 4), ``histogram`` int64 (n_neurons, bins), ``histogram_upper``
            float64 (n_neurons,), and what else the run holds.

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
            return self._site(number)

    def verify(self) -> None:
        """Check every byte: the SHA-256 of each file, and all that the format asks of values.

        It reads the whole run, so it takes as long as the run is large.

        Raises
        ------
        RunError
            A file is not the one that was written, or breaks the format.
        """
        with reporting(self.path):
            for name, (_, digest) in self._files.items():
                if sha256(self._locate(name)) != digest:
                    raise Problem(name, "its SHA-256 is not the one that run.json records")
        self.load_all()

    def load_all(self) -> None:
        """Load, and so check, every table and every array once; the arrays are let go again."""
        for table in TABLES:
            getattr(self, table)
        with reporting(self.path):
            for site in self.sites:
                arrays = self._site(site.number)
                for name in arrays:
                    arrays.load(name)
            for name in self._input_arrays:
                self._input_arrays.load(name)
            if "tokens" in self._input_arrays:
                check_texts(self._input_arrays)

    @cached_property
    def token_texts(self) -> pd.Series[str]:
        """How each token of a run of texts reads, by its number."""
        with reporting(self.path):
            if "tokens" not in self._input_arrays:
                raise Problem(INPUTS_FILE, "it holds images, which have no tokens")
            return token_texts(self._input_arrays)

    # --------------------------------------------------------------------------- reading

    def _locate(self, name: str) -> Path:
        """Path of a file of the run, after the checks that make it safe to open."""
        file = locate(self.path, name)
        given, recorded = file.stat().st_size, self._files[name][0]
        if given != recorded:
            raise Problem(
                name,
                f"it has {given} bytes, but run.json records {recorded}, "
                "so it was cut short or changed",
            )
        return file

    def _check_rows(self, table: str, expected: int | None) -> None:
        name = table_file(table)
        file = self._locate(name)
        with decoding(name), pq.ParquetFile(file) as parquet:
            rows = parquet.metadata.num_rows
            groups = range(parquet.metadata.num_row_groups)
            in_groups = sum(parquet.metadata.row_group(group).num_rows for group in groups)
        if expected is None:
            if not 0 <= rows <= MOST_ROWS_PER_BYTE * self._files[name][0]:
                raise Problem(name, f"it claims {rows} rows, which its size rules out")
        elif rows != expected:
            raise Problem(name, f"it has {rows} rows, but the rest of the run makes {expected}")
        if in_groups != rows:
            raise Problem(name, f"its row groups have {in_groups} rows, its footer says {rows}")

    def _read_table(self, table: str) -> pd.DataFrame:
        name = table_file(table)
        file = self._locate(name)
        # The dictionary keeps a site's name from being repeated in memory for each row.
        opened = partial(
            pq.ParquetFile, file, read_dictionary=["site"], page_checksum_verification=True
        )
        with decoding(name), opened() as parquet:
            schema = parquet.schema_arrow
        self._check_columns(name, schema, TABLES[table])
        with decoding(name), opened() as parquet:
            data = parquet.read()
            data.validate(full=True)
        columns: dict[str, Any] = {}
        for column in [*TABLES[table], *(c for c in data.column_names if c not in TABLES[table])]:
            values = data.column(column)
            if column in TABLES[table] and values.null_count:
                raise Problem(name, f"the column {column!r} has nulls")
            with decoding(name):
                columns[column] = (
                    self._site_names(name, values) if column == "site" else values.to_pandas()
                )
        return pd.DataFrame(columns)

    @staticmethod
    def _check_columns(name: str, schema: pa.Schema, wanted: Mapping[str, str]) -> None:
        if len(set(schema.names)) != len(schema.names):
            raise Problem(name, "it has two columns of the same name")
        for column, dtype in wanted.items():
            if column not in schema.names:
                raise Problem(name, f"the column {column!r} is missing")
            given = schema.field(column).type
            if pa.types.is_dictionary(given):
                given = given.value_type
            text = pa.types.is_string(given) or pa.types.is_large_string(given)
            if not (text if dtype == "str" else given == pa.type_for_alias(dtype)):
                raise Problem(name, f"the column {column!r} is {given}, not {dtype}")
        for column in schema.names:
            given = schema.field(column).type
            plain = (
                pa.types.is_integer(given)
                or pa.types.is_floating(given)
                or pa.types.is_boolean(given)
                or pa.types.is_string(given)
                or pa.types.is_large_string(given)
            )
            if column not in wanted and not plain:
                raise Problem(
                    name, f"the extra column {column!r} is {given}, not numbers, booleans or text"
                )

    def _site_names(self, name: str, values: pa.ChunkedArray) -> np.ndarray:
        names = {site.name for site in self.sites}
        parts = []
        for chunk in values.chunks:
            words = np.array(chunk.dictionary.to_pylist(), dtype=object)
            if not names.issuperset(words):
                raise Problem(name, "it names a site that run.json does not have")
            parts.append(words[chunk.indices.to_numpy()])
        return np.concatenate(parts) if parts else np.array([], dtype=object)

    def _site(self, number: int) -> _Arrays:
        file = site_file(number)
        if file not in self._arrays:
            site = self.sites[number]
            first = sum(before.n_neurons for before in self.sites[:number])
            counts = self.neurons["n_examples"].to_numpy()[first : first + site.n_neurons]
            self._arrays[file] = _Arrays(
                self,
                file,
                SITE_ARRAYS,
                {
                    "n_neurons": site.n_neurons,
                    "d_in": site.d_in,
                    "n_examples": int(counts.sum()),
                },
                {
                    "tree": lambda tree: invariants.check_tree(number, tree, counts),
                    "histogram": lambda counts: invariants.check_histogram(number, counts),
                },
            )
        return self._arrays[file]

    @cached_property
    def _input_arrays(self) -> _Arrays:
        arrays = _Arrays(
            self,
            INPUTS_FILE,
            INPUT_ARRAYS,
            {},
            {
                "index": invariants.check_index,
                "vocabulary": invariants.check_vocabulary,
            },
        )
        for name in missing_inputs(arrays.headers):
            raise Problem(INPUTS_FILE, f"the array {name!r} is missing")
        return arrays


class _Arrays(Mapping[str, np.ndarray]):
    """The arrays of one safetensors file, each read when it is first asked for, then kept."""

    def __init__(
        self,
        run: RunFolder,
        file: str,
        schema: Mapping[str, Array],
        sizes: Mapping[str, int],
        checks: Mapping[str, Callable[[np.ndarray], None]],
    ) -> None:
        self.file = file
        self._run = run
        self._checks = checks
        self._loaded: dict[str, np.ndarray] = {}
        path = run._locate(file)
        with decoding(file), safe_open(path, framework="numpy") as opened:
            headers = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            self.headers = {
                name: (
                    SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype()),
                    tuple(header.get_shape()),
                )
                for name, header in sorted(headers.items())
            }
        check_headers(file, self.headers, schema, sizes)

    def load(self, name: str) -> np.ndarray:
        """Read one array and check it, without keeping it."""
        # The file is not held open between reads: it is memory-mapped, and one that is cut
        # short under a map kills the process.
        path = self._run._locate(self.file)
        with decoding(self.file), safe_open(path, framework="numpy") as opened:
            array: np.ndarray = opened.get_tensor(name)
        if name in self._checks:
            self._checks[name](array)
        return array

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.headers:
            raise KeyError(name)
        if name not in self._loaded:
            with reporting(self._run.path):
                self._loaded[name] = self.load(name)
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.headers  # the Mapping default would load the array

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def __repr__(self) -> str:
        arrays = ", ".join(
            f"{name}: {dtype}{shape}" for name, (dtype, shape) in self.headers.items()
        )
        return f"<{self.file} with {arrays}>"


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
