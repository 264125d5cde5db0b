"""The commands about SAEs, from a model file to a comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import polyseme as ps
from polyseme import cli

MODEL = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
"""

SOURCE = ["models.py:net", "--site", "0", "--data", "flat.npz"]
TRAINING = ["--d-sae", "16", "--epochs", "4", "--batch-size", "32", "--quiet"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a model and labelled data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "models", raising=False)
    Path("models.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(300, 12)).astype(np.float32)
    with torch.random.fork_rng():
        scope: dict = {}
        exec(MODEL, scope)
        with torch.no_grad():
            labels = scope["net"](torch.from_numpy(images)).argmax(1).numpy()
    np.savez("flat.npz", images=images, labels=labels)
    return tmp_path


def said(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def train(out, *more):
    return ["train-sae", *SOURCE, "--l1", "0.5", *TRAINING, "--out", out, *more]


def test_train_and_compare(place, capsys):
    status, out, err = said(capsys, *train("saes/standard"))
    assert (status, err) == (0, "")
    assert out.startswith("saes/standard: 16 latents, ")
    assert ", L0 " in out
    assert ", FVU " in out
    assert said(capsys, *train("saes/ne", "--ne", "5", "--form", "unweighted"))[0] == 0
    sae = ps.load_sae("saes/ne")
    settings = sae.cfg.metadata["polyseme"]["settings"]
    assert (settings["ne_coefficient"], settings["ne_form"]) == (5.0, "unweighted")
    assert settings["metadata"] == {"model": "models.py:net", "site": "0"}

    both = ["compare", "saes/standard", "saes/ne", "--data", "flat.npz", "--quiet"]
    status, out, err = said(capsys, *both)
    assert status == 1, "a model named by a file is never run without being asked for"
    assert err.count("\n") == 1
    assert "saes/standard" not in out
    assert (
        "give --model and --site. The metadata of standard says: --model models.py:net --site 0"
        in err
    )

    status, out, err = said(capsys, *both, "--model", "models.py:net", "--out", "compared")
    assert (status, err) == (0, "")
    for name in ("dead latents", "FVU", "L0", "accuracy with the SAE", "label purity"):
        assert name in out
    head = next(line for line in out.splitlines() if "standard" in line)
    assert head.split() == ["standard", "ne"]
    assert Path("compared/comparison.png").stat().st_size > 10_000
    assert len(ps.open_run("compared/ne").neurons()) == 16

    status, _, err = said(capsys, *both, "--model", "models.py:net", "--out", "compared")
    assert status == 1
    assert "exists" in err
    assert said(capsys, *both, "--model", "models.py:net", "--out", "compared", "--resume")[0] == 0


def test_nothing_is_lost(place, capsys):
    assert said(capsys, *train("sae"))[0] == 0
    weights = Path("sae/sae_weights.safetensors").read_bytes()
    status, _, err = said(capsys, *train("sae", "--seed", "1"))
    assert status == 1
    assert err.count("\n") == 1
    assert "--overwrite" in err or "overwrite" in err
    assert Path("sae/sae_weights.safetensors").read_bytes() == weights
    assert said(capsys, *train("sae", "--seed", "1", "--resume"))[0] == 1
    assert Path("sae/sae_weights.safetensors").read_bytes() == weights
    assert said(capsys, *train("sae", "--resume"))[0] == 0
    assert Path("sae/sae_weights.safetensors").read_bytes() == weights
    assert said(capsys, *train("sae", "--seed", "1", "--overwrite"))[0] == 0
    assert Path("sae/sae_weights.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ne", "-1"], "ne_coefficient is -1.0; "),
        (["--momentum", "1"], "momentum is 1.0; "),
        (["--form", "heavy"], "unknown form of the NE loss: 'heavy'. Must be one of: weighted"),
        (["--architecture", "transcoder"], "transcoder"),
        (["--architecture", "topk"], "k"),
        (["--d-sae", "0"], "d_sae is 0; "),
    ],
)
def test_bad_options(place, capsys, more, message):
    status, out, err = said(capsys, *train("sae", *more))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()
    assert not Path("sae").exists()


def test_sweep(place, capsys):
    arguments = ["sweep", *SOURCE, *TRAINING, "--out", "swept", "--ne", "0,5", "--seeds", "2"]
    arguments += ["--l1", "0.1,1", "--forms", "weighted,unweighted"]
    status, out, err = said(capsys, *arguments)
    assert (status, err) == (0, "")
    records = sorted(Path("swept/records").glob("*.json"))
    assert len(records) == 2 * 2 * 3
    # The labels are what the model says, so this is the share of answers that stay.
    assert all(0.4 < json.loads(file.read_text())["accuracy"] <= 1 for file in records)
    described = [json.loads(file.read_text()) for file in records]
    assert any(record["random_n"] for record in described)
    assert all(1 / 3 <= r["random_purity"] <= 1 for r in described if r["random_n"])
    lines = [line.split() for line in out.splitlines() if " ne " in line]
    n = sum(int(line[3].removeprefix("n=")) for line in lines)
    assert n >= 2
    assert n == 6 or f"{6 - n} of 6 combinations of form, coefficient and seed are left out" in out
    assert "± half the width of the 95% confidence interval" in out
    assert Path("swept/pareto.png").stat().st_size > 5_000
    before = [file.stat().st_mtime_ns for file in records]
    assert said(capsys, *arguments)[1] == out
    assert [file.stat().st_mtime_ns for file in records] == before
    status, _, err = said(capsys, *arguments, "--l0", "1000")
    assert status == 1
    assert "No SAEs of the sweep lie on both sides of L0 = 1000.0" in err
    status, _, err = said(capsys, *arguments, "--epochs", "5")
    assert status == 1
    assert "epochs was 4.0 and is now 5.0" in err


def test_a_sweep_without_an_l1_coefficient(place, capsys):
    arguments = ["sweep", *SOURCE, *TRAINING, "--out", "swept", "--ne", "0", "--seeds", "2"]
    arguments += ["--architecture", "topk", "--k", "3"]
    status, out, err = said(capsys, *arguments, "--forms", "weighted:5,weighted:9,unweighted:200")
    assert (status, err) == (0, "")
    assert out.startswith("means over seeds ± half the width of the 95% confidence interval:")
    assert [line.split() for line in out.splitlines() if " ne " in line] == [
        ["none", "ne", "0", "n=2"],
        ["unweighted", "ne", "200", "n=2"],
        ["weighted", "ne", "5", "n=2"],
        ["weighted", "ne", "9", "n=2"],
    ]
    l0 = [json.loads(file.read_text())["l0"] for file in Path("swept/records").glob("*.json")]
    assert len(l0) == 8
    shown = [float(line.split()[1]) for line in out.splitlines() if line.split()[0] == "l0"]
    assert np.mean(shown) == pytest.approx(np.mean(l0), abs=1e-3)
    status, _, err = said(capsys, *arguments, "--l1", "3")
    assert status == 1
    assert "l1_coefficient is 3.0, but the architecture 'topk' does not use it" in err
    status, _, err = said(capsys, *arguments, "--forms", "weighted:many")
    assert status == 1
    assert "--forms has 'weighted:many'; expected a form such as weighted, or a form with" in err
