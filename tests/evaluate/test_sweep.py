"""Sweeps: every combination once, kept across interrupts, compared at one L0."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats
from tests.evaluate.models import SAE

from polyseme.errors import InputError, RunError
from polyseme.evaluate.latents import latent_meanings
from polyseme.evaluate.sweep import (
    at_equal_l0,
    common_l0,
    draw_pareto,
    mean_and_interval,
    pareto,
    points,
    read_sweep,
    sweep,
)

SETTINGS = {"epochs": 3, "d_sae": 8}


def records(seeds=3, forms=("weighted",), coefficients=(0, 20)):
    """L0 halves with each L1 coefficient; the distance falls with the NE coefficient."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "form": point.form,
            "ne_coefficient": point.ne_coefficient,
            "l1_coefficient": point.l1_coefficient,
            "seed": point.seed,
            "l0": 32 / point.l1_coefficient + rng.normal() / 10,
            "fvu": 0.1 * point.l1_coefficient + rng.normal() / 100,
            "mean_distance": 0.2 / (1 + point.ne_coefficient) + rng.normal() / 100,
        }
        for point in points(dict.fromkeys(forms, coefficients), (1, 2, 4), range(seeds))
    ]
    return pd.DataFrame(rows)


def test_points():
    found = points({"weighted": (0, 20), "unweighted": (0, 200)}, (3, 5), range(2))
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2)
    assert {(p.form, p.ne_coefficient) for p in found} == {
        ("none", 0),
        ("weighted", 20),
        ("unweighted", 200),
    }
    assert [point.seed for point in found] == [0] * 6 + [1] * 6
    assert {p.form for p in found if p.ne_coefficient == 0} == {"none"}
    assert len({point.name for point in found}) == len(found)
    assert [p.name for p in points({"weighted": (0, 20)}, (None,), (3,))] == [
        "none-ne0-seed3",
        "weighted-ne20-seed3",
    ]


def test_a_sweep_resumes_where_it_stopped(tmp_path):
    torch.manual_seed(0)
    activations = torch.randn(300, 5).relu()
    todo = points({"weighted": (0, 20)}, (3,), range(2))
    trained = []

    def train(point):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(point)
        return SAE()

    work = sweep(
        activations, todo, train, out=tmp_path / "s", settings=SETTINGS, score=lambda _: {"x": 1.5}
    )
    with pytest.raises(KeyboardInterrupt):
        list(work)
    before = read_sweep(tmp_path / "s")
    assert len(before) == 2
    assert before["x"].tolist() == [1.5, 1.5]
    assert set(before["l0"] > 0) == {True}
    again = []
    done = list(
        sweep(
            activations,
            todo,
            lambda point: again.append(point) or SAE(),
            out=tmp_path / "s",
            settings=SETTINGS,
        )
    )
    assert again == todo[2:]
    assert [number for number, _ in done] == [1, 2, 3, 4]
    assert [record["l0"] for _, record in done[:2]] == [
        json.loads((tmp_path / "s" / "records" / f"{p.name}.json").read_text())["l0"]
        for p in todo[:2]
    ]
    assert len(read_sweep(tmp_path / "s")) == 4


def test_other_settings_and_other_files(tmp_path):
    list(sweep(torch.zeros(0, 5), [], SAE, out=tmp_path / "s", settings=SETTINGS))
    with pytest.raises(RunError, match=r"a different sweep: epochs was 3 and is now 4\. Choose"):
        list(
            sweep(
                torch.zeros(0, 5), [], SAE, out=tmp_path / "s", settings={**SETTINGS, "epochs": 4}
            )
        )
    with pytest.raises(RunError, match=r"a different sweep: activations was .* and is now"):
        list(sweep(torch.zeros(1, 5), [], SAE, out=tmp_path / "s", settings=SETTINGS))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(RunError, match="holds other files; choose a new or empty folder"):
        list(sweep(torch.zeros(0, 5), [], SAE, out=tmp_path / "mine", settings=SETTINGS))
    with pytest.raises(
        RunError, match=r"holds no records of a sweep; make one with: polyseme sweep"
    ):
        read_sweep(tmp_path / "mine")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    """Even where it was killed while it wrote the very first file."""
    (tmp_path / "records").mkdir()
    for left in ("lock", "sweep.json.new"):
        (tmp_path / left).write_text("{")
    with pytest.raises(RunError, match="holds other files"):
        list(sweep(torch.zeros(0, 5), [], SAE, out=tmp_path, settings=SETTINGS))
    (tmp_path / "records").rmdir()
    work = sweep(
        torch.zeros(0, 5),
        points({"weighted": (0,)}, (3,), range(2)),
        broken,
        out=tmp_path,
        settings={},
    )
    with pytest.raises(ZeroDivisionError):
        next(work)
    (tmp_path / "records" / "half.json.new").write_text("{")
    list(sweep(torch.zeros(0, 5), [], SAE, out=tmp_path, settings={}))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["records", "sweep.json"]


def broken(point):
    raise ZeroDivisionError


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    todo = points({"weighted": (0,)}, (3,), range(2))
    rows = torch.rand(9, 5)
    first = sweep(rows, todo, lambda _: SAE(), out=tmp_path, settings={})
    next(first)
    with pytest.raises(RunError, match="is in use by another process"):
        list(sweep(rows, todo, lambda _: SAE(), out=tmp_path, settings={}))


def test_at_one_l0_by_hand():
    table = pd.DataFrame(
        {
            "form": "weighted",
            "ne_coefficient": 20.0,
            "seed": 0,
            "l1_coefficient": [1.0, 2.0, 4.0],
            "l0": [32.0, 8.0, 2.0],
            "fvu": [0.1, 0.3, 0.9],
        }
    )
    assert at_equal_l0(table, 16, ["fvu"])["fvu"].tolist() == pytest.approx([0.2])
    assert at_equal_l0(table, 8, ["fvu"])["fvu"].tolist() == pytest.approx([0.3])
    assert at_equal_l0(table, 4, ["fvu"])["fvu"].tolist() == pytest.approx([0.6])
    assert at_equal_l0(table, 1.9, ["fvu"]).empty, "never beyond what was measured"
    assert at_equal_l0(table, 33, ["fvu"]).empty
    # Where L0 rises again with the L1 coefficient, the better SAEs count.
    risen = table.assign(l0=[32.0, 8.0, 20.0])
    assert at_equal_l0(risen, 16, ["fvu"])["fvu"].tolist() == pytest.approx([0.2])


def test_where_most_can_be_compared():
    def curve(ne, *l0):
        l1 = range(len(l0), 0, -1)
        return pd.DataFrame(
            {"form": "weighted", "ne_coefficient": ne, "seed": 0, "l0": l0, "l1_coefficient": l1}
        )

    table = pd.concat([curve(1, 2, 8), curve(2, 4, 16), curve(3, 5, 7), curve(4, 100, 200)])
    assert common_l0(table) == pytest.approx(35**0.5)
    assert len(at_equal_l0(table.assign(fvu=0.0), common_l0(table), ["fvu"])) == 3
    assert common_l0(curve(1, 3)) == 3


def test_the_interval_is_students(tmp_path):
    values = np.random.default_rng(1).normal(size=5)
    mean, half = mean_and_interval(values)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert np.isnan(mean_and_interval([1.0])[1])
    assert all(np.isnan(mean_and_interval([])))


def test_pareto():
    found = records(seeds=4)
    table = pareto(found, 16, ["fvu", "mean_distance"])
    assert table[["form", "ne_coefficient", "seeds"]].values.tolist() == [
        ["none", 0, 4],
        ["weighted", 20, 4],
    ]
    by_seed = at_equal_l0(found, 16, ["fvu"])
    mine = by_seed[by_seed["form"] == "weighted"]["fvu"]
    assert table["fvu"][1] == pytest.approx(mine.mean())
    assert table["fvu_ci"][1] == pytest.approx(mine.std() / 2 * stats.t.ppf(0.975, 3))
    assert table["mean_distance"][0] > 10 * table["mean_distance"][1]


def test_saes_of_one_l0_are_taken_as_they_are():
    found = records(seeds=3)
    found = found[found["l1_coefficient"] == 2]
    table = pareto(found, None, ["fvu"])
    plain = found[found["ne_coefficient"] == 0]["fvu"]
    assert table["seeds"].tolist() == [3, 3]
    assert table["fvu"][0] == pytest.approx(plain.mean())
    low, high = stats.t.interval(0.95, 2, plain.mean(), stats.sem(plain))
    assert table["fvu_ci"][0] == pytest.approx((high - low) / 2)


def test_a_sweep_records_the_meanings_of_latents(tmp_path):
    torch.manual_seed(0)
    activations = torch.randn(400, 5).relu()
    labels = np.arange(400) % 7
    sae = SAE()
    todo = points({"weighted": (0,)}, (None,), (3,))
    work = sweep(activations, todo, lambda _: sae, out=tmp_path, settings={}, labels=labels)
    [(_, record)] = work
    expected = latent_meanings(sae, activations, labels, seed=3)
    assert record.items() >= expected.items()
    assert record["strongest_n"] > 0
    assert read_sweep(tmp_path)["l1_coefficient"].isna().all()


def test_the_figure(tmp_path):
    table = pareto(records(forms=("weighted", "unweighted")), 16, ["fvu", "mean_distance"])
    figure = draw_pareto(table, 16, tmp_path / "new" / "pareto.png")
    with Image.open(tmp_path / "new" / "pareto.png") as image:
        assert image.format == "PNG"
    (axes,) = figure.axes
    assert axes.get_xlabel() == "FVU at L0 = 16"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["unweighted", "weighted"]
    with pytest.raises(InputError, match="none of the measures"):
        draw_pareto(table[["form", "ne_coefficient", "fvu", "fvu_ci"]], 16)
