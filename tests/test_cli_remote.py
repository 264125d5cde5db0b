"""Commands whose data and runs are at URLs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import polyseme as ps
from polyseme import cli
from polyseme.errors import RunError
from polyseme.remote import RemotePath
from polyseme.store import RunFolder

KEY_IN_OUT = ("--out", "s3://KEY:hunter2@b/x")
MODEL = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "models", None)
    del sys.modules["models"]
    Path("models.py").write_text(MODEL)
    images = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    np.savez("flat.npz", images=images, labels=np.arange(40) % 3)
    return tmp_path


def said(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_from_a_bucket_to_a_bucket(s3, place, capsys):
    (RemotePath(s3) / "data/flat.npz").put(place / "flat.npz")
    run = f"{s3}/runs/net"
    analyse = ("analyse", "models.py:net", "--sites", "0", "--quiet")
    remote = (*analyse, "--data", f"{s3}/data/flat.npz", "--out", run)
    status, out, err = said(capsys, *remote)
    assert (status, err) == (0, "")
    assert (
        f"View it with polyseme explore {run}, or open it in Python with polyseme.open_run({run!r})"
        in out
    )
    status, _, err = said(capsys, *analyse, "--data", "flat.npz", "--out", "local")
    assert (status, err) == (0, "")
    ours, theirs = ps.open_run(run), ps.open_run("local")
    assert ours.neurons().equals(theirs.neurons())
    fingerprint = ours.metadata["fingerprint"]
    assert fingerprint == theirs.metadata["fingerprint"]
    status, out, err = said(capsys, "verify", run)
    assert (status, out, err) == (0, f"{run} is intact.\n", "")
    status, _, err = said(capsys, *remote)
    assert status == 1
    assert f"polyseme: {run} already exists. Replace it with overwrite=True (--overwrite)" in err
    assert said(capsys, *remote, "--resume")[0] == 0
    status, out, _ = said(capsys, "benchmark", "features", run, "--neurons", "4")
    assert status == 0
    assert "Means over 1 site" in out
    assert not Path("s3:").exists()


def test_pages_at_a_url(memory, place, capsys):
    said(capsys, "analyse", "models.py:net", "--sites", "0", "--data", "flat.npz", "--out", "r")
    status, out, _ = said(capsys, "export", "r", f"{memory}/pages", "--quiet")
    assert (status, out) == (0, f"The pages are at {memory}/pages.\n")
    assert said(capsys, "export", "r", "pages", "--quiet")[0] == 0
    local = {p.relative_to("pages").as_posix(): p for p in Path("pages").rglob("*") if p.is_file()}
    there = RemotePath(f"{memory}/pages").files()
    assert {name: file.read(1 << 30) for name, file in there.items()} == {
        name: file.read_bytes() for name, file in local.items()
    }
    status, _, err = said(capsys, "export", "r", f"{memory}/pages", "--quiet")
    assert status == 1
    assert "already exists" in err
    assert said(capsys, "export", "r", f"{memory}/pages", "--quiet", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("analyse", "m.py:net", "--data", "s3://KEY:hunter2@b/x", "--sites", "0", "--out", "r"),
            "The URL s3://… contains credentials, which would end up in logs and runs.",
        ),
        (
            (*("analyse", "models.py:net", "--data", "flat.npz", "--sites", "0"), *KEY_IN_OUT),
            "The URL s3://… contains credentials, which would end up in logs and runs.",
        ),
        (
            ("analyse", "s3://KEY:hunter2@b/model", "--text", "--out", "r"),
            "A model folder must be local, but s3://… is a URL",
        ),
        (("explore", "s3://none/run"), "There is nothing at s3://none/run/run.json (The specified"),
        (("verify", "memory://none/run"), "There is nothing at memory://none/run/run.json. Check"),
        (
            ("probe", "gs://none/run", "text"),
            "gs://none/run requires a package that is not installed",
        ),
        (
            ("benchmark", "meanings", "--out", "s3://b/x", "--part", "synthetic"),
            "The folder of a benchmark must be local, but s3://… is a URL",
        ),
        (("demo", "--out", "s3://b/x"), "The demo's folder must be local"),
    ],
)
def test_bad_input(s3, place, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    status, _, err = said(capsys, *arguments)
    assert status == 1
    assert err.startswith(f"polyseme: {message}")
    assert "hunter2" not in err
    assert "Traceback" not in err
    assert {path.name for path in Path().iterdir()} <= {"models.py", "flat.npz", "__pycache__"}


def test_a_training_is_refused_before_the_text_is_read(memory, place, capsys):
    pytest.importorskip("sae_lens")
    (RemotePath(memory) / "sae/cfg.json").put(place / "models.py")
    options = ("--site", "x", "--text", "--d-sae", "8", "--out", f"{memory}/sae")
    status, _, err = said(capsys, "train-sae", "minilm", *options)
    assert status == 1
    assert err.startswith("polyseme: memory://tests/sae already exists. Replace it with")


def test_an_sae_at_a_url(memory, place):
    pytest.importorskip("sae_lens")
    from polyseme.sae import load_sae, read_training, train_sae

    vectors = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    settings = {"d_sae": 8, "l1_coefficient": 1.0, "epochs": 2, "batch_size": 16, "progress": False}
    ours = train_sae(vectors, out=f"{memory}/sae", **settings)
    theirs = train_sae(vectors, out="sae", **settings)
    loaded = load_sae(f"{memory}/sae")
    for name, tensor in theirs.state_dict().items():
        assert (ours.state_dict()[name] == tensor).all()
        assert (loaded.state_dict()[name] == tensor).all()
    assert read_training(f"{memory}/sae").history == theirs.training_record.history
    assert set(RemotePath(f"{memory}/sae").files()) == {p.name for p in Path("sae").iterdir()}


def test_a_run_of_the_library_at_a_url(memory, place):
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU())
    images = np.load("flat.npz")["images"]
    run = ps.analyse(net, images, sites="0", out=f"{memory}/run", progress=False)
    local = ps.analyse(net, images, sites="0", out="local", progress=False)
    assert run.neurons().equals(local.neurons())
    again = ps.analyse(net, images, sites="0", out=f"{memory}/run", progress=False, resume=True)
    assert again.neurons().equals(local.neurons())
    RunFolder(f"{memory}/run").verify()
    with pytest.raises(RunError, match="already exists"):
        ps.analyse(net, images, sites="0", out=f"{memory}/run", progress=False)
