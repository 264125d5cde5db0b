"""Parts of a run: what a range of neurons has, without the rest, and with the same checks."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_builder import contents, write
from test_run_folder import edit_arrays, edit_table, put
from test_run_texts import of_texts

from polyseme.errors import InputError, RunError
from polyseme.store import RunFolder, parquet_tables
from polyseme.store.format import SITE_ARRAYS, TABLES, UNITS

COUNTS = ((5, 0, 1, 7), (4, 2), (0, 0), (3, 8, 8, 6, 1))


@pytest.fixture(scope="module")
def in_groups(tmp_path_factory):
    """A run of many row groups, and all that it holds."""
    made = contents(counts=COUNTS)
    neurons = [row for sizes in COUNTS for row in sizes]
    made.tables["neurons"]["n_random"] = [min(n, 2) for n in neurons]
    for site, sizes in zip(made.sites, COUNTS, strict=True):
        n = sum(sizes)
        site["windows"] = np.arange(n * 3).reshape(n, 3)
        site["importances"] = np.arange(n * 3, dtype=np.uint8).reshape(n, 3)
        site["layout"] = np.arange(n * 2).reshape(n, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_tables, "ROWS_IN_GROUP", 3)
        folder = write(tmp_path_factory.mktemp("parts") / "run", made)
    assert pq.ParquetFile(folder / "examples.parquet").num_row_groups > 10
    return folder


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_part_is_a_part_of_the_whole(in_groups, data):
    n = sum(map(len, COUNTS))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    run, whole = RunFolder(in_groups), RunFolder(in_groups)
    names = [site.name for site in whole.sites]
    for table in TABLES:
        frame = getattr(whole, table)
        row = frame["site"].map(names.index).map(whole.first_neuron) + frame["neuron"]
        expected = frame[(row >= start) & (row < stop)].reset_index(drop=True)
        for folder in (run, whole):
            pd.testing.assert_frame_equal(folder.rows(table, start, stop), expected)
        counts = np.bincount(row, minlength=n)
        assert run.offsets(table).tolist() == [0, *counts.cumsum()]
    number = data.draw(st.integers(0, len(COUNTS) - 1))
    sizes = COUNTS[number]
    first = data.draw(st.integers(0, len(sizes)))
    last = data.draw(st.integers(first, len(sizes)))
    clusters = whole.neurons["n_clusters"][whole.first_neuron(number) :].tolist()[: len(sizes)]
    per = {
        "n_neurons": [1] * len(sizes),
        "n_examples": sizes,
        "n_features": clusters,
        "merges": [max(size - 1, 0) for size in sizes],
    }
    for name in whole.site(number):
        unit = SITE_ARRAYS[name].shape[0]
        if unit in UNITS:
            array, rows = whole.site(number)[name], per[unit]
            expected = array[sum(rows[:first]) : sum(rows[:last])]
            for folder in (run, whole):
                found = folder.site_rows(number, name, first, last)
                assert found.dtype == array.dtype
                assert found.tolist() == expected.tolist()


@given(rows=st.lists(st.integers(0, 7), max_size=20))
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_rows_are_taken_in_any_order(in_groups, rows):
    run, whole = RunFolder(in_groups), RunFolder(in_groups)
    for arrays, name in ((lambda r: r.site(0), "vectors"), (lambda r: r.inputs, "pixels")):
        expected = arrays(whole)[name][np.array(rows, int)]
        for folder in (run, whole):
            found = arrays(folder).take(name, rows)
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert (found == expected).all()


def test_only_the_groups_that_are_needed_are_read(in_groups, monkeypatch):
    read = []
    plain = pq.ParquetFile.read_row_groups

    def noting(self, groups, **options):
        read.extend(groups)
        return plain(self, groups, **options)

    run = RunFolder(in_groups)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", noting)
    run.rows("examples", 4, 5)  # the first of layers.1: examples 13 to 16
    assert read == [4, 5]
    run.rows("examples", 4, 5)
    assert read == [4, 5]
    assert "vectors" in run.site(0)
    run.site(0).take("vectors", [3])
    assert run.site(0)._loaded == {}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda run: run.rows("tokens", 0, 1), "Unknown table: 'tokens'"),
        (lambda run: run.rows("examples", 3, 14), "Rows 3 to 14 were requested; The run has 13"),
        (lambda run: run.rows("examples", 3, 2), "Rows 3 to 2 were requested"),
        (lambda run: run.rows("examples", -1, 2), "Rows -1 to 2 were requested"),
        (lambda run: run.offsets("vectors"), "Unknown unit: 'vectors'"),
        (lambda run: run.site_rows(0, "vectors", 0, 1), "Unknown array: 'vectors'. Must"),
        (lambda run: run.site_rows(0, "decoder", 0, 1), "Unknown array: 'decoder'"),
        (lambda run: run.site_rows(4, "tree", 0, 1), "Site 4 is not in this run"),
        (lambda run: run.site_rows(1, "tree", 0, 3), r"Rows 0 to 3 .*'layers.1' has 2"),
        (lambda run: run.site(0).take("vectors", [0, 8]), "Rows 0 to 8 of 'vectors' .* it has 8"),
        (lambda run: run.site(0).take("vectors", [-1]), "Rows -1 to -1 of 'vectors'"),
        (lambda run: run.site(0).between("vectors", 2, 9), "Rows 2 to 9 of 'vectors'"),
    ],
)
def test_missing_parts_are_explained(in_groups, ask, message):
    with pytest.raises(InputError, match=message):
        ask(RunFolder(in_groups))


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("examples", put("vector", 8, 8), "'vector' must be a row of its site's"),
        ("examples", put("input", 8, 10**6), "is not in the 'index'"),
        ("examples", put("feature", 8, 99), "'feature' must be from 0"),
        ("examples", put("activation", 8, np.nan), "not a finite number"),
        ("examples", put("neuron", 8, 1), "n_examples rows for each neuron"),
        ("examples", put("example", 8, 7), "must count 0, 1"),
        ("examples", put("position", 8, -1), "'position' is negative"),
        ("features", put("medoid", 5, 9), "'medoid' must be an example of the neuron"),
        ("features", put("n_examples", 5, 9), "'n_examples' must be the number of"),
        ("features", lambda f: f.assign(input=1), "'input' must be that of the medoid"),
        ("random", put("input", 3, 10**6), "is not in the 'index'"),
        ("random", put("neuron", 3, 1), "n_random rows for each neuron"),
        ("neurons", lambda f: f.assign(n_random=f["n_random"] + 1), "'n_random' makes"),
        ("neurons", lambda f: f.assign(n_random=-f["n_random"]), "'n_random' is negative"),
        ("neurons", lambda f: f.assign(n_random=1.0), "'n_random' is double, not int32"),
    ],
)
def test_format_errors_are_found_in_their_part(tmp_path, table, change, message):
    made = contents()
    made.tables["neurons"]["n_random"] = [2, 0, 1, 2, 2]
    folder = write(tmp_path / "run", made)
    edit_table(folder, table, change)

    def look():
        run = RunFolder(folder)
        if table == "neurons":
            run.rows("random", 0, 1)
        else:
            for neuron in range(5):
                run.rows(table, neuron, neuron + 1)

    with pytest.raises(RunError, match=message):
        look()


def test_a_tree_that_breaks_the_format_is_found_in_its_part(tmp_path):
    folder = write(tmp_path / "run")
    edit_arrays(folder, "sites/1", lambda arrays: arrays["tree"].__setitem__((2, 0), 0))
    run = RunFolder(folder)
    assert len(run.site_rows(1, "tree", 1, 2)) == 1
    with pytest.raises(RunError, match="'tree' must merge each node once"):
        run.site_rows(1, "tree", 0, 1)


def test_a_file_that_changes_is_noticed(tmp_path):
    folder = write(tmp_path / "run")
    run = RunFolder(folder)
    for name in ("examples.parquet", "sites/0.safetensors"):
        os.truncate(folder / name, 100)
    random = folder / "random.parquet"
    random.write_bytes(b"x" * random.stat().st_size)
    with pytest.raises(RunError, match=r"examples\.parquet: it has 100 bytes, but"):
        run.rows("examples", 0, 1)
    with pytest.raises(RunError, match=r"safetensors: it has 100 bytes, but"):
        run.site_rows(0, "tree", 0, 1)
    with pytest.raises(RunError, match=r"random\.parquet: it cannot be decoded"):
        run.rows("random", 0, 1)


def test_contexts_are_checked_one_by_one(tmp_path):
    folder = write(tmp_path / "run", of_texts())
    run = RunFolder(folder)
    tokens, lengths = run.contexts([3, 0])
    assert tokens.tolist() == run.inputs["tokens"][[3, 0]].tolist()
    assert lengths.tolist() == run.inputs["lengths"][[3, 0]].tolist()
    edit_arrays(folder, "inputs", lambda arrays: arrays["tokens"].__setitem__((3, 0), 5))
    run = RunFolder(folder)
    run.contexts([0, 1, 2])
    with pytest.raises(RunError, match="'tokens' holds a token that 'vocabulary' does not"):
        run.contexts([2, 3])
    with pytest.raises(RunError, match="it holds images, which have no tokens"):
        RunFolder(write(tmp_path / "images")).contexts([0])


def indexed():
    made = of_texts()
    made.inputs["token_features"] = np.array([4, 0, 2])
    made.inputs["token_features_ends"] = np.array([0, 2, 2, 2, 3, 3])
    return made


def test_features_are_found_by_token(tmp_path):
    run = RunFolder(write(tmp_path / "run", indexed()))
    assert [run.features_of_token(row).tolist() for row in range(6)] == [
        [], [4, 0], [], [], [2], []
    ]  # fmt: skip
    with pytest.raises(InputError, match="Rows 6 to 7 were requested; The vocabulary has 6"):
        run.features_of_token(6)
    plain = RunFolder(write(tmp_path / "plain", of_texts()))
    assert plain.features_of_token(1).tolist() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["token_features"].__setitem__(0, 99), "must be rows of features.parquet"),
        (lambda a: a["token_features"].__setitem__(0, -1), "must be rows of features.parquet"),
        (lambda a: a["token_features_ends"].__setitem__(5, 9), "do not fit 'token_features'"),
        (lambda a: a["token_features_ends"].__setitem__(1, -1), "do not fit 'token_features'"),
        (lambda a: a.pop("token_features_ends"), "one of 'token_features' and its ends, not both"),
    ],
)
def test_an_index_by_token_that_leads_nowhere_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "run", indexed())
    edit_arrays(folder, "inputs", change)

    def look():
        RunFolder(folder).features_of_token(1)

    for ask in (look, lambda: RunFolder(folder).load_all()):
        with pytest.raises(RunError, match=message):
            ask()


def test_a_position_beyond_its_context_is_refused(tmp_path):
    folder = write(tmp_path / "run", of_texts())
    edit_table(folder, "examples", put("position", 2, 5))
    with pytest.raises(RunError, match="'position' in row 2 is beyond the end of its context"):
        RunFolder(folder).rows("examples", 0, 1)


def test_the_end_of_a_context_is_no_position_of_it(tmp_path):
    folder = write(tmp_path / "run", of_texts())
    run = RunFolder(folder)
    row = int(np.searchsorted(run.inputs["index"], run.examples["input"][2]))
    length = int(run.inputs["lengths"][row])
    edit_table(folder, "examples", put("position", 2, length - 1))
    assert RunFolder(folder).rows("examples", 0, 1)["position"][2] == length - 1
    edit_table(folder, "examples", put("position", 2, length))
    with pytest.raises(RunError, match="'position' in row 2 is beyond the end of its context"):
        RunFolder(folder).rows("examples", 0, 1)


def test_similar_features_that_lead_nowhere_are_refused(tmp_path):
    made = contents()
    n = len(made.tables["features"].query("site == 'layers.0'"))
    made.sites[0]["similar_features"] = np.full((n, 2), -1)
    made.sites[0]["similar_similarity"] = np.full((n, 2), np.nan, np.float16)
    folder = write(tmp_path / "run", made)
    assert RunFolder(folder).site_rows(0, "similar_features", 0, 3).shape == (n, 2)
    edit_arrays(folder, "sites/0", lambda a: a["similar_features"].__setitem__((0, 0), 11))
    with pytest.raises(RunError, match=r"must be rows of features\.parquet, below 11, or -1"):
        RunFolder(folder).site_rows(0, "similar_features", 0, 1)


def test_vectors_of_half_precision_are_kept(tmp_path):
    made = contents()
    made.sites[0]["vectors"] = made.sites[0]["vectors"].astype(np.float16)
    run = RunFolder(write(tmp_path / "run", made))
    assert run.site(0)["vectors"].dtype == np.float16
    assert run.site(1)["vectors"].dtype == np.float32
