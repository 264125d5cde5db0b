"""A run of images in version 1, as it was first written: its files never change."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from polyseme.store import RunFolder

HERE = Path(__file__).parent
GOLDEN = HERE.parent / "golden" / "run-v1"
PAGE = HERE.parent.parent / "docs" / "run-format.md"

NEURONS = pd.DataFrame(
    {
        "site": ["layers.0"] * 3 + ["layers.1"] * 2,
        "neuron": [0, 1, 2, 0, 1],
        "n_examples": [5, 0, 1, 4, 2],
        "n_clusters": [4, 0, 1, 2, 1],
        "density": [0.625, 0.0, 0.125, 0.5, 0.25],
        "n_random": [2, 0, 1, 2, 2],
    }
)
EXAMPLES = pd.DataFrame(
    {
        "site": ["layers.0"] * 6 + ["layers.1"] * 6,
        "neuron": [0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 1],
        "example": [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 1],
        "input": [11, 26, 52, 82, 98, 44, 11, 24, 52, 86, 11, 86],
        "position": [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 0, 1],
        "feature": [2, 0, 3, 0, 1, 0, 1, 0, 0, 1, 0, 0],
        "vector": [0, 2, 4, 5, 7, 3, 0, 1, 4, 6, 0, 6],
    }
)
FEATURES = pd.DataFrame(
    {
        "neuron": [0, 0, 0, 0, 2, 0, 0, 1],
        "feature": [0, 1, 2, 3, 0, 0, 1, 0],
        "n_examples": [2, 1, 1, 1, 1, 2, 2, 2],
        "medoid": [1, 4, 0, 2, 0, 1, 0, 0],
    }
)
TREE_0 = [
    [1, 3, 0.18188176006759194, 2],
    [4, 5, 0.4221223174086418, 3],
    [0, 2, 0.7438891447281961, 2],
    [6, 7, 1.6885376674393713, 5],
]
INDEX = [11, 24, 26, 44, 52, 82, 86, 98]


def check(
    metadata: dict,
    tables: dict[str, pd.DataFrame],
    inputs: dict[str, np.ndarray],
    sites: list[dict[str, np.ndarray]],
) -> None:
    assert metadata["format"] == "polyseme-run"
    assert metadata["format_version"] == 1
    assert metadata["created"] == "2025-01-01T00:00:00Z"
    site = {"name": "layers.1", "kind": "mlp", "n_neurons": 2, "d_in": 4, "threshold": 0.2}
    assert metadata["sites"][1] == site
    for name, expected in [("neurons", NEURONS), ("examples", EXAMPLES), ("features", FEATURES)]:
        pd.testing.assert_frame_equal(
            tables[name][list(expected.columns)], expected, check_dtype=False
        )
    assert np.isnan(tables["neurons"]["max_distance"][1])
    assert tables["examples"]["activation"][0] == np.float32(0.49704617261886597)
    assert tables["random"]["input"].tolist() == [11, 26, 44, 11, 24, 11, 86]
    assert inputs["index"].tolist() == INDEX
    assert inputs["pixels"].dtype == np.uint8
    assert inputs["pixels"][7].tolist() == [[70, 76, 171], [146, 39, 141]]
    assert inputs["labels"].tolist() == [0, 2, 0, 6, 8, 8, 8, 9]
    assert sites[0]["tree"].tolist() == TREE_0
    assert sites[0]["weights"][0, 0] == np.float32(-0.4567716419696808)
    assert sites[0]["activation_map"].shape == (3, 2, 3)
    assert sites[1]["histogram"].tolist() == [[0, 5, 1], [1, 0, 0]]
    assert sites[1]["vectors"].shape == (8, 4)


def test_the_golden_run_is_read_to_the_same_values():
    run = RunFolder(GOLDEN)
    run.verify()
    tables = {name: getattr(run, name) for name in ("neurons", "examples", "features", "random")}
    check(run.metadata, tables, dict(run.inputs), [dict(run.site(0)), dict(run.site(1))])


def test_the_golden_run_is_readable_without_polyseme():
    tables = {
        name: pd.read_parquet(GOLDEN / f"{name}.parquet")
        for name in ("neurons", "examples", "features", "random")
    }
    metadata = json.loads((GOLDEN / "run.json").read_text(encoding="utf-8"))
    sites = [load_file(GOLDEN / "sites" / f"{number}.safetensors") for number in (0, 1)]
    check(metadata, tables, load_file(GOLDEN / "inputs.safetensors"), sites)


def test_the_golden_run_stays_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*")) < 60_000


def test_the_snippet_of_the_format_page_works(tmp_path):
    # With pandas alone; the one after it is polyseme's own way to parts of a run.
    snippet, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert "polyseme" not in snippet.replace('"polyseme-run"', "")
    shutil.copytree(GOLDEN, tmp_path / "runs" / "mnist")
    shown = "print(neuron, images.shape, embeddings.shape, tree.tolist())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{snippet}\n{shown}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.strip() == f"0 (2, 2, 3) (2, 4) {np.array(TREE_0).tolist()}"


@pytest.mark.parametrize("table", ["neurons", "examples", "features", "random"])
def test_the_format_page_names_every_column(table):
    from polyseme.store.format import TABLES

    page = PAGE.read_text(encoding="utf-8")
    section = page.split(f"\n## {table}.parquet\n")[1].split("\n## ")[0]
    for column in TABLES[table]:
        assert f"`{column}`" in section


def test_the_store_needs_neither_torch_nor_the_rest_of_polyseme():
    code = (
        "import json, sys, polyseme.store; "
        "names = [m for m in sys.modules if m.startswith(('polyseme', 'torch', 'scipy'))]; "
        "print(json.dumps(names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    allowed = {"polyseme", *(f"polyseme.{n}" for n in ("errors", "parquet", "remote", "store"))}
    assert all(
        name in allowed or name.startswith("polyseme.store.") for name in json.loads(done.stdout)
    )
