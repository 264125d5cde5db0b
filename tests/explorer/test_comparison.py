"""Two runs side by side, against the plainest way to work it out."""

from __future__ import annotations

import json

import numpy as np
import pytest

import polyseme as ps
from explorer.conftest import decoded
from polyseme.explorer import comparison
from polyseme.explorer.open_runs import open_all
from polyseme.explorer.root import WebRoot


@pytest.fixture(scope="module")
def root(text_run, grey_run, tmp_path_factory):
    from views import runs

    other = runs.analyse_grey(
        tmp_path_factory.mktemp("other") / "other", select=ps.TopK(9), sites=["second", "first"]
    )
    files = open_all([grey_run, other])
    return WebRoot(lambda: files)


def test_one_run_is_compared_with_nothing(text_run):
    alone = WebRoot(lambda: open_all([text_run]))
    assert "data/compare.json" not in set(alone.paths())
    with pytest.raises(KeyError):
        alone.file("data/compare.json")


def test_every_measure_of_each_run(root):
    compared = json.loads(root.file("data/compare.json"))
    assert compared["titles"] == [run.title for run in root.runs]
    rows = {row["key"]: row for row in compared["rows"]}
    assert [row["group"] for row in compared["rows"]] == sorted(
        (row["group"] for row in compared["rows"]),
        key=["meanings", "published metrics", "cost", "caveats"].index,
    )
    for number, files in enumerate(root.runs):
        neurons = files.run.neurons()
        live = neurons[neurons["n_examples"] > 0]
        assert rows["neurons"]["values"][number] == len(neurons)
        dead = (neurons["density"] == 0).mean()
        assert rows["dead_share"]["values"][number] == dead
        unlisted = rows["without_examples_share"]["values"][number]
        assert unlisted == pytest.approx(1 - len(live) / len(neurons) - dead)
        assert rows["l0"]["values"][number] == pytest.approx(neurons["density"].sum())
        for key in ("mean_distance", "inter_cluster_distance", "calibrated_distance"):
            values = [x for x in live[key] if not np.isnan(x)]
            assert rows[key]["values"][number] == pytest.approx(sum(values) / len(values))
            assert rows[key]["counts"][number] == len(values)
    assert "fvu" not in rows


def test_an_evaluation_is_shown_where_there_is_one(root):
    first, second = (files.run for files in root.runs)
    first.metadata["evaluation"] = {
        "fvu": 0.25,
        "fvu_n": "many",
        "accuracy": "high",
        "recovered": float("nan"),
    }
    try:
        rows = comparison.comparison([first, second], ["a", "b"])["rows"]
    finally:
        del first.metadata["evaluation"]
    (fvu,) = (row for row in rows if row["key"] == "fvu")
    assert (fvu["values"], fvu["counts"]) == ([0.25, None], None)
    assert {row["key"] for row in rows}.isdisjoint({"accuracy", "recovered"})


@pytest.mark.parametrize("block", [2**24, 7])
def test_best_matches(root, monkeypatch, block):
    monkeypatch.setattr(comparison, "_BLOCK", block)
    arrays, metadata = comparison.best_matches(*(files.folder for files in root.runs))
    assert metadata == {"by": "weights"}
    one, other = (files.run for files in root.runs)
    table, theirs = one.neurons(), other.neurons()
    for row, (site, neuron) in enumerate(zip(table["site"], table["neuron"], strict=True)):
        mine = one.neuron(site, neuron).weights
        best = -2.0
        for place, (name, number) in enumerate(zip(theirs["site"], theirs["neuron"], strict=True)):
            if name != site:
                continue
            weights = other.neuron(name, number).weights
            cosine = mine @ weights / np.linalg.norm(mine) / np.linalg.norm(weights)
            if cosine > best + 1e-6:
                best, where = cosine, place
        if site not in other.sites:
            assert arrays["row"][row] == -1
            continue
        assert arrays["row"][row] == where
        assert arrays["similarity"][row] == pytest.approx(best, abs=1e-5)
    # The sites come in another order, so the same neuron is in another row.
    first = one.folder.first_neuron(one.sites.index("first"))
    assert arrays["row"][first] == other.folder.first_neuron(other.sites.index("first"))


def test_sites_of_other_names_are_matched_where_none_is_shared(root, rgb_run, grey_run):
    arrays, metadata = comparison.best_matches(rgb_run.folder, grey_run.folder)
    assert (arrays["row"] == -1).all()  # no vectors are of one length
    assert metadata["reason"].startswith("No neuron has a match, because only vectors of the same")
    found, metadata = decoded(root.file("data/pairs.safetensors"))
    assert metadata == {"by": "weights"}
    assert len(found["row"]) == len(found["similarity"]) == len(root.runs[0].run.neurons())
