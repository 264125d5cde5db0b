"""A run of texts in version 1, as it was first written: its files never change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from polyseme.opening import open_run
from polyseme.store import RunFolder

GOLDEN = Path(__file__).parents[1] / "golden" / "run-v1-texts"
SITE, NEURON = "model.layers.1.mlp", 7
EXAMPLES = pd.DataFrame(
    {
        "input": [0, 3, 2, 4],
        "position": [1, 3, 8, 5],
        "activation": np.array(
            [0.014765651896595955, 0.011837701313197613, 0.01076040044426918, 0.010657076723873615],
            np.float32,
        ),
        "feature": [0, 0, 0, 0],
        "vector": [0, 27, 22, 37],
    }
)
TREE = [
    [1, 2, 0.002291083335876465, 2],
    [3, 4, 0.011905848979949951, 3],
    [0, 5, 0.03304338455200195, 4],
]
TEXTS = ["the»river«bankwas", *["andawide»river«agreen"] * 3]


def test_the_golden_run_is_read_whole_and_in_parts():
    run = RunFolder(GOLDEN)
    run.verify()
    assert run.metadata["format_version"] == 1
    assert run.neurons["n_random"].tolist() == [2] * 24
    part = run.rows("examples", NEURON, NEURON + 1)
    pd.testing.assert_frame_equal(part[list(EXAMPLES)], EXAMPLES, check_dtype=False)
    assert run.rows("features", NEURON, NEURON + 1)["label"].tolist() == ["river a wide and green"]
    assert run.rows("random", 23, 24)["neuron"].tolist() == [23, 23]
    assert run.offsets("random").tolist() == list(range(0, 50, 2))
    assert run.site_rows(0, "tree", NEURON, NEURON + 1).tolist() == TREE
    assert run.site(0)["vectors"].dtype == np.float32
    assert run.features_of_token(0).tolist() == []


def test_the_golden_run_is_shown_in_views():
    neuron = open_run(GOLDEN).neuron(SITE, NEURON)
    windows = neuron.texts()
    assert [str(window) for window in windows] == TEXTS
    assert [window.importances for window in windows] == [None] * 4
    assert windows[1].activations[3] == EXAMPLES["activation"][1]
    promoted = neuron.tokens()["promoted"]
    assert promoted["token"][:2].tolist() == ["wide", "of"]
    assert promoted["logit"][0] == pytest.approx(0.0032337121665477753, rel=1e-6)
    fresh = neuron.recut(0.02)
    assert len(fresh.features) == 2
    assert neuron.clustering.tree.tolist() == TREE


def test_the_golden_run_is_readable_without_polyseme():
    assert json.loads((GOLDEN / "run.json").read_text(encoding="utf-8"))["format_version"] == 1
    examples = pd.read_parquet(GOLDEN / "examples.parquet").query("neuron == @NEURON")
    assert examples["input"].tolist() == EXAMPLES["input"].tolist()
    assert load_file(GOLDEN / "inputs.safetensors")["lengths"].tolist() == [12] * 5 + [9]
    assert load_file(GOLDEN / "sites" / "0.safetensors")["tree"].shape == (72, 4)


def test_the_golden_run_stays_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*")) < 60_000
