"""Reading a run: what it gives, and what it says of a folder that is not one."""

from __future__ import annotations

import hashlib
import json
import os
import random as rng
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_builder import contents, write
from safetensors.numpy import load_file, save_file

from polyseme.errors import InputError, RunError
from polyseme.parquet import chunks, page_bytes
from polyseme.store import RunFolder, SiteInfo, altered_files, refuse_altered
from polyseme.store import contents as store_contents
from polyseme.store.files import too_deep
from polyseme.store.format import DEEPEST_JSON
from polyseme.store.run_json import write_run_json

REMEDY = (
    r"copy it again from its source, or "
    r"(analyse again with overwrite=True \(--overwrite\)|move it away and analyse again)\.$"
)


def reseal(folder: Path) -> None:
    """Make run.json agree with the files, as someone who forges a run would."""
    content = json.loads((folder / "run.json").read_text())
    for name in content["files"]:
        raw = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    write_run_json(folder, content, resumable=False)


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "run.json").read_text())
    change(content)
    (folder / "run.json").write_text(json.dumps(content) + "\n")


def edit_table(folder: Path, table: str, change: Callable[[pd.DataFrame], object]) -> None:
    frame = pd.read_parquet(folder / f"{table}.parquet")
    frame["site"] = frame["site"].astype(object)
    changed = change(frame)
    frame = changed if isinstance(changed, pd.DataFrame) else frame
    columns = {name: pa.array(frame[name].to_numpy(), from_pandas=False) for name in frame}
    pq.write_table(pa.table(columns), folder / f"{table}.parquet")
    reseal(folder)


def edit_arrays(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    arrays = load_file(folder / f"{name}.safetensors")
    change(arrays)
    save_file(
        {key: np.ascontiguousarray(array) for key, array in arrays.items()},
        folder / f"{name}.safetensors",
    )
    reseal(folder)


def read_all(folder: Path) -> None:
    RunFolder(folder).load_all()


def refused(folder: Path, message: str) -> None:
    """Reading all of a run gives one clear sentence and the remedy."""
    with pytest.raises(RunError, match=message) as caught:
        read_all(folder)
    assert re.search(REMEDY, str(caught.value))
    assert str(folder) in str(caught.value)
    with pytest.raises(RunError):
        RunFolder(folder).verify()


# ----------------------------------------------------------------------------- what it gives


def test_a_run_gives_what_it_holds(pristine):
    made = contents()
    run = RunFolder(str(pristine))
    assert run.path == pristine
    assert run.sites == (
        SiteInfo(0, "layers.0", "mlp", n_neurons=3, d_in=4, extra={"threshold": 0.2}),
        SiteInfo(1, "layers.1", "mlp", n_neurons=2, d_in=4, extra={"threshold": 0.2}),
    )
    assert run.metadata["settings"] == {"threshold": 0.2, "linkage": "average"}
    assert run.metadata["fingerprint"]["model"] == "m"
    assert run.neurons["n_examples"].tolist() == [5, 0, 1, 4, 2]
    assert run.neurons is run.neurons
    pd.testing.assert_frame_equal(run.random, made.tables["random"], check_dtype=False)
    site = run.site(0)
    assert "activation_map" in site
    assert "activation_map" not in run.site(1)
    assert list(site) == sorted(site)
    assert len(site) == 8
    assert "weights: float32(3, 4)" in repr(site)
    assert site["weights"] is site["weights"]
    with pytest.raises(KeyError):
        site["decoder"]
    assert set(run.inputs) == {"index", "labels", "pixels"}
    assert run.inputs["pixels"].shape == (8, 2, 3)
    assert run.site(np.int64(1))["tree"].shape == (4, 4)


@pytest.mark.parametrize("number", [-1, 2, 10**30])
def test_a_site_that_is_not_there_is_explained(pristine, number):
    with pytest.raises(InputError, match=r"not in this run: give a number from 0 to 1"):
        RunFolder(pristine).site(number)


def test_arrays_are_loaded_when_they_are_used(folder):
    run = RunFolder(folder)
    site = run.site(0)
    site["weights"]
    os.truncate(folder / "sites" / "0.safetensors", 500)
    site["weights"]
    with pytest.raises(RunError, match="truncated or changed"):
        site["vectors"]


def test_other_files_in_the_folder_are_ignored(folder):
    (folder / "notes.txt").write_text("mine")
    edit_json(folder, lambda run: run["files"].update({"../../etc/passwd": None, "x": 1}))
    RunFolder(folder).load_all()
    assert altered_files(folder) == ["run.json"]


# -------------------------------------------------------------------------- what is not a run


def test_a_missing_run_is_explained(tmp_path, folder):
    with pytest.raises(RunError, match=r"nothing does not exist\. Give the folder.*analyse wrote"):
        RunFolder(tmp_path / "nothing")
    with pytest.raises(RunError, match=r"run.json is not a folder. A run is a folder"):
        RunFolder(folder / "run.json")
    with pytest.raises(RunError, match=r"is not a run: it has no run.json"):
        RunFolder(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(RunError, match="is not a folder"):
        RunFolder(tmp_path / "dangling")


@pytest.mark.parametrize("version", [-1, 0, 2, 7, 10**30])
def test_another_version_says_what_to_do(folder, version):
    edit_json(folder, lambda run: run.update(format_version=version, files=None))
    said = "a whole number of more than 18 digits" if version > 10**18 else version
    with pytest.raises(
        RunError,
        match=rf"has format version {said}, and this polyseme reads only version 1\. Read the run "
        r"with the polyseme that wrote it \(.*pip install --upgrade polyseme\), or analyse again\.",
    ):
        RunFolder(folder)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "the end is missing"),
        (b"{}", "the end is missing"),
        (b"[]}\n", "not valid JSON"),
        (b"[{}\n", "not valid JSON"),
        (b"{\xff}\n", "not valid JSON"),
        (b'{"a": NaN}\n', "NaN is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "not valid JSON"),
        (b'{"a":' * 100_000 + b"{" + b"}" * 100_000 + b"}\n", "nested too deeply"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}\n", "nested too deeply"),
        (b"{}\n", 'does not say "format": "polyseme-run"'),
        (b'{"format": "polyseme-run"}\n', "'format_version' is missing"),
        (b'{"format": "polyseme-run", "format_version": true}\n', "a whole number, not true"),
        (b'{"format": "polyseme-run", "x": 1e999}\n', "not valid JSON .*inf"),
        (b'{"format": "polyseme-run", "x": "\\ud800"}\n', "not valid JSON .*surrogates"),
        (b'{"format": "polyseme-run", "format_version": "1"}\n', 'a whole number, not "1"'),
    ],
)
def test_a_run_json_that_is_none_is_refused(folder, raw, message):
    (folder / "run.json").write_bytes(raw)
    refused(folder, f"run.json: .*{message}")


def test_a_list_is_no_run_json(folder):
    (folder / "run.json").write_bytes(b'[1, {"a": 1}\n]')
    refused(folder, "the end is missing")


def set_site(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda run: run["sites"][0].update(changes)


def set_data(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda run: run["data"].update(changes)


def of_text(run: dict[str, Any]) -> None:
    run["settings"]["window"] = [2, 1]
    run["data"] = {
        "kind": "text", "n_inputs": 9, "length": 5, "leave_out": [], "tokenizer": {}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("sites"), "'sites' is missing"),
        (lambda run: run.update(sites={}), "'sites' must be a list, not an object"),
        (lambda run: run.update(sites=[]), "'sites' is empty"),
        (lambda run: run.update(sites=[[]]), r"'sites\[0\]' must be an object, not a list"),
        (set_site(name="layers.1"), "the name 'layers.1' twice"),
        (set_site(name=""), "a string of 1 to 1024 characters"),
        (set_site(name="x" * 1025), "a string of 1 to 1024 characters"),
        (set_site(name=None), "not null"),
        (set_site(name="\ud800"), "not valid JSON .*surrogates"),
        (set_site(kind=3), r"'sites\[0\].kind' must be a string"),
        (set_site(n_neurons=-1), r"n_neurons' must be a whole number from 1 .*, not -1"),
        (set_site(n_neurons=0), "not 0"),
        (set_site(n_neurons=1e30), r"not 1e\+30"),
        (set_site(n_neurons=10**30), "not a whole number of more than 18 digits"),
        (set_site(n_neurons=3.0), r"not 3\.0"),
        (set_site(n_neurons=True), "not true"),
        (set_site(n_neurons="3"), 'not "3"'),
        (set_site(n_neurons=2**31 - 1), "too small for 2147483647 neurons with d_in 4"),
        (set_site(n_neurons=4), "neurons.parquet: it has 5 rows, but the rest of the run makes 6"),
        (set_site(d_in=3), r"'weights' has shape \(3, 4\), not \(n_neurons=3, d_in=3\)"),
        (set_site(d_in=2**31), "must be a whole number from 1 to 2147483647"),
        (lambda run: run.update(created=3), "'created' must be a string, not 3"),
        (lambda run: run.update(settings=None), "'settings' must be an object, not null"),
        (lambda run: run.pop("model"), "'model' is missing"),
        (lambda run: run.update(fingerprint=[]), "'fingerprint' must be an object, not a list"),
        (lambda run: run["settings"].pop("linkage"), "'settings.linkage' is missing"),
        (lambda run: run["settings"].update(linkage="ward"), '"average" or "single", not "ward"'),
        (lambda run: run["model"].update({"class": 3}), "'model.class' must be a string, not 3"),
        (
            set_site(threshold=None),
            r"'sites\[0\].threshold' must be a number from 0 to 2, not null",
        ),
        (set_site(threshold="0.2"), 'a number from 0 to 2, not "0.2"'),
        (set_site(threshold=True), "a number from 0 to 2, not true"),
        (set_site(threshold=10**400), "not a whole number of more than 18 digits"),
        (set_site(hook=3), r"'sites\[0\].hook' must be a string, not 3"),
        (set_site(kernel_shape=[1, 2]), "three whole numbers from 1, not a list"),
        (
            set_site(kernel_shape=[1, 2, 3]),
            r"'sites\[0\].d_in' is 4, but its 'kernel_shape' makes 6",
        ),
        (set_site(reads_inputs=True), r"'sites\[0\].d_in' is 4, but its 'reads_inputs' makes 6"),
        (set_data(n_inputs="many"), "'data.n_inputs' must be a whole number from 0"),
        (set_data(shape=6), "'data.shape' must be a list of 1 to 8 whole numbers from 1, not 6"),
        (set_data(shape=[6, 2]), r"'data.image_shape' is \[2, 3\], 'data.shape' \[6, 2\]"),
        (
            set_data(shape=[7], image_shape=None),
            r"a row of 'activation_map' has shape \(2, 3\), but 'data.shape' of run.json is \(7,\)",
        ),
        (set_data(image_shape=[6]), "'data.image_shape' must be two or three whole numbers from 1"),
        (set_data(mean={}), "'data.mean' must be a number, or a list of numbers, not an object"),
        (set_data(std=[0.5] * 3), "'data.std' has 3 numbers, but 'data.shape' begins with 2"),
        (set_data(low=None), "'data.low' must be a number, not null"),
        (set_data(class_names=["a", 1]), "'data.class_names' must be a list of strings"),
        (set_data(kind="text"), "'settings.window' is missing"),
        (lambda run: (of_text(run), run["settings"].pop("window")), "'settings.window' is missing"),
        (
            lambda run: (of_text(run), run["settings"].update(window=[1, 2, 3])),
            "two whole numbers of tokens, before and after, from 0 to 1000",
        ),
        (lambda run: (of_text(run), run["data"].pop("tokenizer")), "'data.tokenizer' is missing"),
        (lambda run: of_text(run), "inputs.safetensors: it holds images, but run.json says texts"),
        (lambda run: run.update(files=[]), "'files' must be an object"),
        (lambda run: run["files"].pop("random.parquet"), "'files' does not list random.parquet"),
        (
            lambda run: run["files"].update({"random.parquet": [1]}),
            "the entry of random.parquet in 'files' must be",
        ),
        (lambda run: run["files"]["random.parquet"].update(bytes=-1), "must be {'bytes': int"),
        (lambda run: run["files"]["random.parquet"].update(bytes=1e9), "must be {'bytes': int"),
        (lambda run: run["sites"].extend(run["sites"]), "the name 'layers.0' twice"),
        (
            lambda run: run["sites"].append({**run["sites"][0], "name": "x"}),
            "'files' does not list sites/2.safetensors",
        ),
    ],
)
def test_hostile_metadata_is_refused(folder, change, message):
    edit_json(folder, change)
    refused(folder, message)


def test_a_huge_run_json_is_not_read(folder):
    with (folder / "run.json").open("ab") as file:
        file.truncate(2**40)  # sparse: it takes no room on disk
    refused(folder, "longer than")


def test_depth_is_counted_without_recursion():
    value: Any = []
    for _ in range(DEEPEST_JSON - 1):
        value = [value]
    assert not too_deep(value)
    assert too_deep([value])


# --------------------------------------------------------------------------------- accidents


def test_run_json_cut_at_any_byte_is_refused(folder):
    raw = (folder / "run.json").read_bytes()
    for length in range(len(raw)):
        (folder / "run.json").write_bytes(raw[:length])
        with pytest.raises(RunError, match=r"the end is missing|not valid JSON"):
            RunFolder(folder)


DATA = [
    "neurons.parquet",
    "examples.parquet",
    "features.parquet",
    "random.parquet",
    "inputs.safetensors",
    "sites/0.safetensors",
    "sites/1.safetensors",
]


@pytest.mark.parametrize("name", DATA)
def test_a_file_cut_at_any_byte_is_refused(folder, name):
    size = (folder / name).stat().st_size
    for length in range(size - 1, -1, -1):
        os.truncate(folder / name, length)
        with pytest.raises(RunError, match=f"{name}: it has {length} bytes, .* records {size}, so"):
            RunFolder(folder)


@pytest.mark.parametrize("name", DATA)
def test_a_file_cut_with_its_record_is_refused(folder, name):
    raw = (folder / name).read_bytes()
    for length in sorted({0, 1, 4, 8, 12, *range(20, len(raw), 97), len(raw) - 1}):
        (folder / name).write_bytes(raw[:length])
        reseal(folder)
        refused(folder, rf"{name}: it (cannot be decoded|is too small)")


@pytest.mark.parametrize("name", DATA)
def test_flipped_bytes_are_found_and_never_leak_another_error(folder, name):
    raw = (folder / name).read_bytes()
    dice = rng.Random(name)
    for _ in range(25):
        at = dice.randrange(len(raw))
        changed = bytearray(raw)
        changed[at] ^= 1 << dice.randrange(8)
        (folder / name).write_bytes(changed)
        with pytest.raises(RunError):
            RunFolder(folder).verify()
        try:
            read_all(folder)
        except RunError as error:
            assert name.split("/")[0].split(".")[0] in str(error) or "rows" in str(error)  # noqa: PT017


def test_verify_reads_every_byte(folder):
    raw = bytearray((folder / "inputs.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "inputs.safetensors").write_bytes(raw)
    read_all(folder)
    with pytest.raises(RunError, match=r"inputs.safetensors is not as written: the SHA-256 is not"):
        RunFolder(folder).verify()
    assert altered_files(folder) == ["inputs.safetensors"]
    edit_json(folder, lambda run: run["settings"].update(threshold=0.3))
    (folder / "neurons.parquet").unlink()
    assert altered_files(folder) == ["run.json", "neurons.parquet", "inputs.safetensors"]
    with pytest.raises(
        RunError,
        match=r"run: run.json, neurons.parquet and inputs.safetensors are not as written: ",
    ):
        refuse_altered(folder)


@pytest.mark.parametrize("name", DATA)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    refused(folder, f"{name}: the file is missing")


def test_a_folder_or_a_pipe_is_no_file_of_a_run(folder):
    (folder / "random.parquet").unlink()
    (folder / "random.parquet").mkdir()
    refused(folder, "random.parquet: it is not a regular file")
    (folder / "random.parquet").rmdir()
    os.mkfifo(folder / "random.parquet")
    refused(folder, "random.parquet: it is not a regular file")
    (folder / "run.json").unlink()
    os.mkfifo(folder / "run.json")
    refused(folder, "run.json: it is not a regular file")


@pytest.mark.parametrize("name", [*DATA, "run.json"])
def test_no_path_leaves_the_run_folder(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, f"{name}: it is a link out of the run folder")


def test_a_linked_folder_of_sites_is_refused(folder, tmp_path):
    (folder / "sites").rename(tmp_path / "sites")
    (folder / "sites").symlink_to(tmp_path / "sites")
    refused(folder, r"sites/0.safetensors: it is a link out of the run")


def test_a_link_that_stays_inside_or_leads_to_the_run_is_followed(folder, tmp_path):
    (folder / "random.parquet").rename(folder / "elsewhere")
    (folder / "random.parquet").symlink_to("elsewhere")
    (tmp_path / "latest").symlink_to(folder)
    RunFolder(tmp_path / "latest").verify()
    (folder / "elsewhere").unlink()
    (folder / "elsewhere").symlink_to("random.parquet")
    refused(folder, "random.parquet: it cannot be read")


# ------------------------------------------------------------------------------------ tables


def put(column: str, row: int, value: Any) -> Callable[[pd.DataFrame], object]:
    def change(frame: pd.DataFrame) -> None:
        frame.loc[row, column] = value

    return change


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("neurons", lambda f: f.drop(columns="density"), "the column 'density' is missing"),
        ("neurons", lambda f: f.astype({"neuron": "int64"}), "'neuron' is int64, not int32"),
        ("neurons", lambda f: f.assign(site=b"x"), "'site' is binary, not str"),
        ("neurons", lambda f: f[:-1], "has 4 rows, but the rest of the run makes 5"),
        ("neurons", lambda f: f[::-1], "one row per neuron, ordered by site"),
        ("neurons", put("site", 0, "mars"), "names a site that run.json does not have"),
        ("neurons", put("site", 0, None), "'site' has nulls"),
        ("neurons", put("neuron", 2, 3), "'neuron' in row 2 is not a neuron of its site"),
        ("neurons", put("neuron", 2, -1), "'neuron' in row 2 is not a neuron of its site"),
        ("neurons", put("n_examples", 1, -1), "'n_examples' is negative in row 1"),
        ("neurons", put("n_clusters", 0, 6), "'n_clusters' must be .* row 0 does not"),
        ("neurons", put("n_clusters", 0, 0), "'n_clusters' must be .* row 0 does not"),
        ("neurons", put("n_clusters", 1, 1), "'n_clusters' must be .* row 1 does not"),
        ("neurons", put("n_examples", 0, 6), "'tree' has 4 rows, but .* make 5"),
        ("neurons", put("n_examples", 0, 2**31 - 1), "'tree' has 4 rows"),
        ("neurons", put("n_clusters", 3, 3), "features.parquet: it has"),
        ("examples", lambda f: f[:-1], "has 11 rows, but the rest of the run makes 12"),
        ("examples", lambda f: f[::-1], "n_examples rows for each neuron, in the order"),
        ("examples", put("example", 1, 0), "'example' must count 0, 1, … .* row 1 does not"),
        ("examples", put("input", 3, 10**6), "'input' in row 3 is not in the 'index'"),
        ("examples", put("input", 3, -(2**63)), "'input' in row 3 is not in the 'index'"),
        ("examples", put("position", 4, -1), "'position' is negative in row 4"),
        ("examples", put("activation", 4, np.nan), "'activation' is not a finite number in row 4"),
        ("examples", put("feature", 0, 99), "'feature' must be from 0 to n_clusters - 1"),
        ("examples", put("feature", 0, -1), "'feature' must be from 0 to n_clusters - 1"),
        ("examples", put("vector", 11, 8), "'vector' must be a row of its site's .* row 11"),
        ("examples", put("vector", 11, -1), "'vector' must be a row of its site's .* row 11"),
        ("examples", lambda f: f.assign(input=f["input"].iloc[0]), "row 1 repeats an input"),
        ("features", lambda f: f[:-1], "rows, but the rest of the run makes"),
        ("features", lambda f: f[::-1], "n_clusters rows for each neuron, in the order"),
        ("features", put("feature", 1, 0), "'feature' must count 0, 1, … .* row 1 does not"),
        ("features", put("n_examples", 1, 2), "'n_examples' must be the number of the feature's"),
        ("features", put("medoid", 0, 5), "'medoid' must be an example of the neuron; row 0"),
        ("features", put("medoid", 0, -1), "'medoid' must be an example of the neuron; row 0"),
        ("features", put("medoid", 0, 1), "'medoid' must be one of the feature's own .* row 0"),
        ("random", lambda f: f[::-1], "n_random rows for each neuron, in the order"),
        ("random", put("input", 0, 10**6), "'input' in row 0 is not in the 'index'"),
        ("random", lambda f: f.assign(input=f["input"].iloc[0]), "row 1 repeats an input"),
        ("random", put("activation", 0, np.inf), "'activation' is not a finite number in row 0"),
    ],
)
def test_a_table_that_breaks_the_format_is_refused(folder, table, change, message):
    edit_table(folder, table, change)
    refused(folder, message)


def test_feature_0_is_the_largest(folder):
    def swap(frame: pd.DataFrame) -> None:
        frame["feature"] = np.where(
            frame["neuron"].eq(0) & frame["site"].eq("layers.0"),
            frame["feature"].map({0: 1, 1: 0}).fillna(frame["feature"]),
            frame["feature"],
        ).astype("int32")

    edit_table(folder, "examples", swap)
    found = pd.read_parquet(folder / "examples.parquet").groupby(["site", "neuron", "feature"])

    def follow(frame: pd.DataFrame) -> None:
        frame["n_examples"] = found.size().to_numpy().astype("int32")
        frame["medoid"] = found["example"].first().to_numpy().astype("int32")

    edit_table(folder, "features", follow)
    refused(folder, "feature 0 must be the neuron's largest; row 1 is larger")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"bomb": [[1]] * 5}, "the extra column 'bomb' is list"),
        ({"bomb": [b"x"] * 5}, "the extra column 'bomb' is binary"),
    ],
)
def test_an_extra_column_that_is_not_plain_is_refused(folder, columns, message):
    table = pq.read_table(folder / "neurons.parquet")
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, folder / "neurons.parquet")
    reseal(folder)
    refused(folder, message)


def test_two_columns_of_one_name_are_refused(folder):
    table = pq.read_table(folder / "neurons.parquet")
    pq.write_table(
        table.append_column("density", table.column("density")), folder / "neurons.parquet"
    )
    reseal(folder)
    refused(folder, "two columns of the same name")


def test_nulls_are_refused_where_a_value_must_be(folder):
    table = pq.read_table(folder / "neurons.parquet")
    at = table.column_names.index("mean_distance")
    table = table.set_column(at, "mean_distance", pa.array([None, 1.0, 1.0, 1.0, 1.0]))
    pq.write_table(table, folder / "neurons.parquet")
    reseal(folder)
    refused(folder, "the column 'mean_distance' has nulls")


def test_a_table_of_a_few_bytes_and_billions_of_rows_is_not_read(folder, monkeypatch):
    # A writer that makes such a file by itself is hard to find, so the bound is lowered.
    monkeypatch.setattr(store_contents, "MOST_ROWS_PER_BYTE", 4)
    rows = 200_000
    table = pa.table(
        {
            "site": pa.array(["layers.0"] * rows),
            "neuron": np.zeros(rows, np.int32),
            "input": np.zeros(rows, np.int64),
            "position": np.zeros(rows, np.int64),
            "activation": np.zeros(rows, np.float32),
        }
    )
    pq.write_table(table, folder / "random.parquet", compression="zstd")
    reseal(folder)
    refused(folder, f"random.parquet: it claims {rows} rows, which its size rules out")


# ------------------------------------------------------------------------------------ arrays


def change(name: str, by: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], object]:
    return lambda arrays: arrays.update({name: by(arrays[name])})


def at(name: str, where: Any, value: float) -> Callable[[dict], object]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][where] = value

    return change


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("sites/0", lambda a: a.pop("weights"), "the array 'weights' is missing"),
        ("sites/0", change("vectors", lambda v: v[:, :3]), r"'vectors' has shape \(8, 3\), not"),
        ("sites/0", change("vectors", lambda v: v[:4]), "'vector' must be a row of its site's"),
        ("sites/0", change("weights", np.float64), "'weights' is float64, not float32"),
        ("sites/0", change("tree", lambda t: t[:-1]), "'tree' has 3 rows, but .* make 4"),
        ("sites/0", change("tree", lambda t: t[:, :3]), r"'tree' has shape \(4, 3\)"),
        ("sites/0", change("tree", np.ravel), r"'tree' has shape \(16,\)"),
        ("sites/0", change("histogram", lambda h: h[:2]), "'histogram' has shape"),
        ("sites/0", change("histogram", lambda h: h - 100), "'histogram' holds a negative count"),
        ("sites/0", change("histogram_upper", lambda h: h[:, None]), "'histogram_upper' has shape"),
        ("sites/0", change("activation_map", lambda m: m[:, 0, 0]), "'activation_map' has shape"),
        (
            "sites/0",
            change("activation_map", lambda m: m[..., :2]),
            r"a row of 'activation_map' has shape \(2, 2\)",
        ),
        ("sites/0", lambda a: a.pop("logit_ablation"), "the array 'logit_ablation' is missing"),
        ("sites/0", change("logit_gradient", lambda m: m[:1]), "'logit_gradient' has shape"),
        (
            "sites/0",
            lambda a: a.update(logit_ablation=np.zeros((3, 9), np.float32)),
            r"'logit_\w+' has shape",
        ),
        ("sites/0", at("tree", (0, 2), np.nan), "'tree' holds a NaN or an infinity"),
        ("sites/0", at("tree", (0, 2), -0.1), "heights from 0 to 2, .* row 0 does not"),
        ("sites/0", at("tree", (3, 2), 2.1), "heights from 0 to 2, .* row 3 does not"),
        (
            "sites/0",
            at("tree", (0, 0), 5),
            "existing nodes, given as whole numbers; row 0 does not",
        ),
        (
            "sites/0",
            at("tree", (0, 0), -1),
            "existing nodes, given as whole numbers; row 0 does not",
        ),
        (
            "sites/0",
            at("tree", (0, 0), 0.5),
            "existing nodes, given as whole numbers; row 0 does not",
        ),
        (
            "sites/0",
            at("tree", (0, 0), 1e300),
            "existing nodes, given as whole numbers; row 0 does not",
        ),
        ("sites/0", at("tree", (3, 3), 4), "count the examples .* row 3 has a wrong"),
        ("sites/1", at("tree", (3, 1), 0), "must merge each node once; row 3"),
        ("sites/1", at("tree", (2, 0), 0), "must merge each node once"),
        ("inputs", lambda a: a.pop("index"), "the array 'index' is missing"),
        ("inputs", lambda a: a.pop("pixels"), "the array 'pixels' is missing"),
        ("inputs", change("index", lambda i: i[::-1]), "'index' must be strictly increasing"),
        ("inputs", change("index", np.zeros_like), "'index' must be strictly increasing"),
        ("inputs", change("index", lambda i: i - 1000), "'index' holds a negative"),
        ("inputs", change("index", np.int32), "'index' is int32, not int64"),
        ("inputs", change("pixels", np.float64), "'pixels' is float64, not uint8 or float32"),
        ("inputs", change("pixels", lambda p: p[:7]), "'pixels' has shape"),
        ("inputs", change("pixels", lambda p: p[..., :2]), r"a row of 'pixels' has shape \(2, 2\)"),
        ("inputs", change("pixels", lambda p: p[:, 0, 0]), "'pixels' has shape"),
        ("inputs", change("labels", lambda p: p[:7]), r"'labels' has shape \(7,\), not \(M=8\)"),
        (
            "inputs",
            lambda a: a.update({k: v[:0] for k, v in a.items()}),
            "'input' in row 0 is not in the 'index'",
        ),
    ],
)
def test_an_array_that_breaks_the_format_is_refused(folder, file, edit, message):
    edit_arrays(folder, file, edit)
    refused(folder, message)


def header(entries: dict[str, Any]) -> bytes:
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw


@pytest.mark.parametrize(
    "raw",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        header({"index": {"dtype": "I64", "shape": [2**60], "data_offsets": [0, 2**63 - 1]}}),
        header({"index": {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 0]}}),
        header({"index": {"dtype": "I64", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        header({"index": {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}}) + b"\0" * 8,
        header({"index": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 8]}}) + b"\0" * 8,
        b"\x80\x04." + b"\0" * 40,
    ],
)
def test_a_hostile_safetensors_header_is_refused(folder, raw):
    (folder / "inputs.safetensors").write_bytes(raw)
    reseal(folder)
    refused(folder, "inputs.safetensors: it cannot be decoded")


def test_a_bfloat16_array_is_explained(folder):
    raw = header({"index": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}) + b"\0" * 8
    (folder / "inputs.safetensors").write_bytes(raw)
    reseal(folder)
    refused(folder, "'index' is BF16, not int64")


# --------------------------------------------------------------- the tree, by a plain oracle


def plainly_valid(tree: np.ndarray, n: int) -> bool:
    """The rules of one neuron's tree, as the specification says them."""
    size = dict.fromkeys(range(n), 1)
    free = set(size)
    for i, (a, b, height, count) in enumerate(tree):
        if not (np.isfinite([a, b, height, count]).all() and 0 <= height <= 2 + 1e-6):
            return False
        if a == b or a not in free or b not in free:
            return False
        free -= {a, b}
        free.add(n + i)
        size[n + i] = size[int(a)] + size[int(b)]
        if size[n + i] != count:
            return False
    return True


def test_the_tree_check_agrees_with_the_plain_one():
    from polyseme.store.format import Problem
    from polyseme.store.invariants import check_tree

    dice = np.random.default_rng(0)
    verdicts = []
    for trial in range(250):
        counts = tuple(int(n) for n in dice.integers(0, 6, 3))
        tree = contents(seed=trial, counts=(counts,)).sites[0]["tree"].copy()
        if len(tree) and trial % 4:
            row, column = dice.integers(len(tree)), dice.integers(4)
            tree[row, column] += dice.choice([-2, -1, 0.5, 1, 2, np.nan])
        parts = np.split(tree, np.cumsum([max(n - 1, 0) for n in counts])[:-1])
        expected = all(plainly_valid(part, n) for part, n in zip(parts, counts, strict=True))
        try:
            check_tree(0, tree, np.array(counts, dtype=np.int32))
            given = True
        except Problem:
            given = False
        assert given == expected, (counts, tree)
        verdicts.append(given)
    assert {True, False} == set(verdicts)


def test_the_remedy_for_a_damaged_run_works(folder):
    (folder / "random.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"with overwrite=True \(--overwrite\)\.$"):
        RunFolder(folder)
    RunFolder(write(folder, overwrite=True)).verify()
    (folder / "run.json").write_bytes(b"{")
    with pytest.raises(RunError, match=r"move it away and analyse again\.$"):
        RunFolder(folder)
    folder.rename(folder.with_name("away"))
    RunFolder(write(folder)).verify()


def with_column(folder: Path, table: str, name: str, values: pa.Array, **options: Any) -> None:
    data = pq.read_table(folder / f"{table}.parquet").append_column(name, values)
    pq.write_table(data, folder / f"{table}.parquet", compression="zstd", **options)
    reseal(folder)


LONG = "x" * 2**19


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (lambda n: [LONG] * n, {"use_dictionary": ["label"]}, "its text would take over 1,[0-9,]+"),
        (lambda n: [LONG] * n, {"use_dictionary": False}, "it would take over 1,[0-9,]+ bytes of"),
        (
            lambda n: [LONG + str(i) for i in range(n)],
            {"use_dictionary": False, "column_encoding": {"label": "DELTA_BYTE_ARRAY"}},
            "an encoding that can take any amount of memory",
        ),
    ],
)
def test_a_few_kilobytes_of_text_do_not_fill_the_memory(folder, texts, options, message):
    n = len(pd.read_parquet(folder / "features.parquet"))
    with_column(folder, "features", "label", pa.array(texts(n)), **options)
    assert (folder / "features.parquet").stat().st_size < 20_000
    refused(folder, f"features.parquet: .*{message}")
    with pytest.raises(RunError, match=message):
        RunFolder(folder).column("features", "label")


def test_columns_without_end_do_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("polyseme.store.parquet_tables.MOST_BYTES", 0)
    made = contents(counts=((1,) * 2000,), n_inputs=3)
    for number in range(80):
        made.tables["neurons"][f"more{number}"] = 0.5
    with pytest.raises(RunError, match=r"neurons.parquet: it would take over [0-9,]+ bytes of"):
        write(tmp_path / "run", made)


def test_labels_that_are_all_alike_are_no_bomb(tmp_path):
    made = contents(counts=((1,) * 5000,), n_inputs=3)
    made.tables["features"]["label"] = "the river bank and " * 5
    run = RunFolder(write(tmp_path / "run", made))
    assert run.features["label"].nunique() == 1


def test_a_page_that_is_no_page_is_refused(folder):
    file = folder / "features.parquet"
    raw = file.read_bytes()
    known = pq.ParquetFile(file).metadata.row_group(0).column(3)

    def sizes() -> list[int]:
        with file.open("rb") as opened:
            [group] = chunks(opened.fileno())
            assert group[3].stop - group[3].start == known.total_compressed_size
            return list(page_bytes(opened.fileno(), group[3], text=False))

    assert sizes() == [4 * known.num_values + 6]  # and that none is null
    said = set()
    for at in [*range(known.data_page_offset, known.data_page_offset + 30), len(raw) - 8]:
        for value in (0, 0x0D, 0x7E, 0xFF):
            file.write_bytes(raw[:at] + bytes([value]) + raw[at + 1 :])
            try:
                sizes()
            except ValueError as error:
                said.add(str(error))
    assert said >= {
        "a header is damaged",
        "a page claims more values than its row group has rows",
        "a page is of kind 63",
    }
