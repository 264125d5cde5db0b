"""What the pages are told of meanings, against the same neurons as Python shows them."""

from __future__ import annotations

import http.client
import json

import numpy as np
import pytest

import polyseme as ps
from explorer.conftest import decoded
from polyseme.core.meaning import MIN_SIZE, OVERLAP
from polyseme.explorer import meaning_files
from polyseme.explorer.open_runs import open_all
from polyseme.explorer.runfiles import RunFiles
from polyseme.store import RunWriter
from store.run_builder import write


@pytest.fixture(scope="module", params=["text", "grey", "rgb"])
def run(request):
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture(scope="module")
def files(run):
    return RunFiles(run, "a run")


def row_of(run, neuron):
    return run.folder.first_neuron(neuron.info.number) + neuron.number


def every_neuron(run):
    for site in run.folder.sites:
        for number in range(site.n_neurons):
            yield run.neuron(site.name, number)


def test_they_are_those_of_the_view(run, files):
    """At the run's own cut, and at any other."""
    for neuron in every_neuron(run):
        told = json.loads(files.file(f"meanings/{row_of(run, neuron)}.json"))
        if not len(neuron.examples):
            assert told == {"cuts": [], "groups": []}
            continue
        meanings = neuron.meanings
        assert len(meanings) == neuron.row["n_meanings"]
        assert told["cuts"][-1]["threshold"] == 1
        for threshold in (OVERLAP, *np.linspace(0.05, 1, 20)):
            truth = meanings if threshold == OVERLAP else meanings.cut(threshold)
            cut = next(cut for cut in told["cuts"] if threshold <= cut["threshold"])
            assert [told["groups"][place] for place in cut["groups"]] == [
                {
                    "examples": meaning.examples["example"].tolist(),
                    "medoid": meaning.medoid,
                    "label": meaning.label,
                }
                for meaning in truth
            ]
        assert all(group["medoid"] in group["examples"] for group in told["groups"])
        # Each is described once.
        assert len({tuple(group["examples"]) for group in told["groups"]}) == len(told["groups"])
        assert told["verdict"] == meanings.verdict
        for name in ("separation", "stability"):
            truth = getattr(meanings, name)
            assert told[name] == (pytest.approx(truth) if np.isfinite(truth) else None)


def test_the_pack_and_the_table_have_the_numbers(run, files):
    described = json.loads(files.file("run.json"))
    assert described["has"]["meanings"]
    table, _ = decoded(files.file("neurons.safetensors"))
    assert table["n_meanings"].tolist() == run.neurons()["n_meanings"].tolist()
    for site in described["sites"]:
        pack, _ = decoded(files.file(f"packs/{site['first_pack']}.safetensors"))
        neurons = range(min(described["pack"], site["n_neurons"]))
        frames = [run.neuron(site["name"], n).examples["meaning"] for n in neurons]
        assert pack["meaning"].tolist() == [m for frame in frames for m in frame]
        held = [run.neuron(site["name"], n) for n in neurons]
        trees = [one.meanings.groups for one in held if len(one.examples)]
        nodes = np.concatenate([groups.tree[:, :2] for groups in trees])
        assert pack["meaning_nodes"].tolist() == nodes.tolist()
        overlaps = np.concatenate([groups.overlaps for groups in trees])
        np.testing.assert_array_equal(pack["meaning_overlap"], overlaps.astype(np.float32))
    assert described["meaning_cut"] == {"overlap": OVERLAP, "smallest": MIN_SIZE}


def test_a_server_answers_and_an_export_holds_the_same(text_run, tmp_path):
    out = ps.export(text_run, tmp_path / "site", progress=False)
    with ps.explore(text_run, open_browser=False) as explorer:
        connection = http.client.HTTPConnection(explorer.url.removeprefix("http://").rstrip("/"))
        last = len(text_run.neurons()) - 1
        for row, status in ((0, 200), (last, 200), (last + 1, 404)):
            path = f"data/0/meanings/{row}.json"
            connection.request("GET", f"/{path}")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status
            if status == 200:
                assert answer.headers["Content-Type"] == "application/json"
                assert (out / path).read_bytes() == body
                assert json.loads(body)["cuts"]
        connection.close()


def test_an_export_of_a_large_run_is_without(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr("polyseme.explorer.runfiles._MOST_MEANINGS", len(text_run.neurons()) - 1)
    out = ps.export(text_run, tmp_path / "site", progress=False)
    assert not (out / "data/0/meanings").exists()
    assert json.loads((out / "data/0/run.json").read_text())["meanings_exported"] is False
    # A server still answers for any neuron that is looked at.
    assert RunFiles(text_run, "texts").file("meanings/0.json")


def test_a_run_without_meanings(tmp_path):
    (files,) = open_all([write(tmp_path / "run")])
    described = json.loads(files.file("run.json"))
    assert described["has"]["meanings"] is False
    assert not [path for path in files.paths() if path.startswith("meanings/")]
    assert "meaning" not in decoded(files.file("packs/0.safetensors"))[0]
    assert "n_meanings" not in decoded(files.file("neurons.safetensors"))[0]
    with pytest.raises(KeyError):
        files.file("meanings/0.json")


@pytest.mark.parametrize("told", [256, 0, -1, True, 1.5, 2**60, "many", None, [1]])
def test_how_many_vectors_there_were(text_run, told, monkeypatch):
    site = text_run.folder.sites[0]
    monkeypatch.setitem(site.extra, "n_moments", told)
    described = json.loads(RunFiles(text_run, "texts").file("run.json"))["sites"][0]
    assert described["n_moments"] == (told if told in (256, 0) and told is not False else None)
    assert described["enough_moments"] == 3 * site.d_in


# ------------------------------------------------------------------------------ hostile runs


def rewritten(run, out, arrays=lambda arrays: {}, examples=lambda examples: examples):
    """The run with other arrays or examples, written as a valid one."""
    folder = run.folder
    with RunWriter(out, fingerprint={}) as writer:
        for site in folder.sites:
            held = dict(folder.site(site.number))
            writer.write_site(site.number, held | arrays(held))
        writer.write_inputs(dict(folder.inputs))
        tables = {name: getattr(folder, name) for name in ("neurons", "features", "random")}
        writer.write_tables(**tables, examples=examples(folder.examples.copy()))
        writer.finish({key: folder.metadata[key] for key in ("settings", "model", "data", "sites")})
    return open_all([out])[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 0.0])
@pytest.mark.parametrize(
    "name", ["meaning_overlap", "meaning_drive", "space_mean", "space_matrix", "vectors"]
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_numbers_without_sense_are_told_or_passed_over(text_run, tmp_path, name, value):
    def change(arrays):
        with np.errstate(over="ignore"):
            return {name: np.full_like(arrays[name], value)}

    try:
        files = rewritten(text_run, tmp_path / "run", change)
    except ps.PolysemeError:
        return  # the store refuses it
    for row in range(4):
        told = json.loads(files.file(f"meanings/{row}.json"))  # strict JSON: no NaN
        assert told.get("problem") or told["verdict"] in ("several", "one", "no clear groups")


def test_gaps_between_meanings_are_told(text_run, monkeypatch):
    run = ps.open_run(text_run.path)
    rows = type(run.folder).rows

    def gapped(self, table, start, stop):
        found = rows(self, table, start, stop)
        return found.assign(meaning=2) if table == "examples" else found

    monkeypatch.setattr(type(run.folder), "rows", gapped)
    told = meaning_files.neuron_meanings(run, run.sites[0], 0)
    assert told == {
        "cuts": [],
        "groups": [],
        "problem": "The run's data on the meanings of this neuron is inconsistent.",
    }


@pytest.mark.parametrize(("limit", "kept"), [("_MOST_DRAWN", True), ("_MOST_EXAMPLES", False)])
def test_too_many_examples_cost_no_memory(text_run, monkeypatch, limit, kept):
    monkeypatch.setattr(meaning_files, limit, 4)
    told = meaning_files.neuron_meanings(text_run, text_run.sites[0], 0)
    assert bool(told["cuts"]) == kept
    if kept:
        assert told["stability"] is None
        # The run's own cut alone.
        assert [cut["threshold"] for cut in told["cuts"]] == [OVERLAP]
    else:
        assert told["problem"].startswith("This neuron has 5 examples; ")
