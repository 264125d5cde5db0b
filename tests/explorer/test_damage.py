"""A damaged run: what is damaged is told, the rest is shown, and no path of this machine is."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import polyseme as ps
from explorer.conftest import decoded
from polyseme.errors import RunError
from polyseme.explorer.open_runs import open_all
from polyseme.store import RunFolder

CUT = "so it was truncated or changed"


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-1])


def pack_of(files, site, described):
    return decoded(files.file(f"packs/{described['sites'][site]['first_pack']}.safetensors"))


@pytest.mark.parametrize(
    ("name", "lost", "kept"),
    [
        ("sites/1.safetensors", set(), {"tree_heights", "activation", "window_tokens"}),
        ("sites/0.safetensors", {"tree_heights"}, {"activation", "feature", "window_tokens"}),
        ("examples.parquet", {"activation", "window_tokens"}, {"tree_heights", "promoted_tokens"}),
        ("features.parquet", {"feature_sizes"}, {"activation", "window_tokens", "tree_heights"}),
        ("random.parquet", {"random_tokens"}, {"activation", "window_tokens", "tree_heights"}),
        ("inputs.safetensors", {"activation", "window_tokens"}, {"tree_heights", "counts"}),
    ],
)
@pytest.mark.parametrize("how", [cut_short, lambda file: file.unlink()], ids=["cut", "missing"])
def test_the_rest_is_shown(text_run, copied, name, lost, kept, how):
    folder = copied(text_run)
    how(folder / name)
    (files,) = open_all([folder])
    described = json.loads(files.file("run.json"))
    (sentence,) = described["damage"]
    assert sentence.startswith(f"{name}: ")
    assert CUT in sentence or sentence.endswith("the file is missing")
    assert str(folder) not in sentence
    assert described["kind"] == "text"
    table, _ = decoded(files.file("neurons.safetensors"))
    assert len(table["neuron"]) == len(text_run.neurons())
    arrays, metadata = pack_of(files, 0, described)
    assert not lost & arrays.keys()
    assert arrays.keys() >= kept
    assert metadata.get("damage", []) == ([sentence] if lost else [])
    for path in files.paths():
        files.file(path)


def test_a_damaged_site_costs_its_own_neurons_alone(text_run, copied):
    folder = copied(text_run)
    (whole,) = open_all([folder])
    described = json.loads(whole.file("run.json"))
    before, _ = pack_of(whole, 0, described)
    cut_short(folder / "sites" / "1.safetensors")
    (files,) = open_all([folder])
    arrays, _ = pack_of(files, 0, described)
    assert arrays.keys() == before.keys()
    before, _ = pack_of(whole, 1, described)
    arrays, metadata = pack_of(files, 1, described)
    assert "tree_heights" not in arrays
    for name in ("counts", "activation", "feature", "window_tokens", "random_tokens"):
        np.testing.assert_array_equal(arrays[name], before[name])
    assert len(metadata["damage"]) == 1
    # What would follow an example to its vector is refused.
    salvaged = RunFolder.salvaged(folder)
    with pytest.raises(RunError, match=f"sites/1.safetensors: .*{CUT}"):
        salvaged.site(1)
    with pytest.raises(RunError, match=f"sites/1.safetensors: .*{CUT}"):
        RunFolder(folder)


def test_a_byte_that_changed_is_found_when_it_is_read(text_run, copied):
    """Its size is right, so only the checksum of the page tells."""
    folder = copied(text_run)
    file = folder / "examples.parquet"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    file.write_bytes(bytes(raw))
    (files,) = open_all([folder])
    described = json.loads(files.file("run.json"))
    assert described["damage"] == []
    arrays, metadata = pack_of(files, 0, described)
    assert metadata["damage"][0].startswith("examples.parquet: ")
    assert "tree_heights" in arrays


@pytest.mark.parametrize("name", ["run.json", "neurons.parquet"])
def test_explore_rejects_a_damaged_file_that_all_pages_need(text_run, copied, name):
    folder = copied(text_run)
    cut_short(folder / name)
    with pytest.raises(RunError, match=f"{name}: .* The run is damaged, or was not written by"):
        ps.explore(folder, open_browser=False)


def test_images_without_inputs(grey_run, copied):
    folder = copied(grey_run)
    (folder / "inputs.safetensors").unlink()
    (files,) = open_all([folder])
    described = json.loads(files.file("run.json"))
    assert (described["kind"], described["image"]) == ("image", None)
    arrays, _ = pack_of(files, 0, described)
    assert "histogram" in arrays


def test_hostile_metadata_is_refused(grey_run, copied):
    """Whatever the pages rely on is of the right kind; the rest is passed on as it is."""
    folder = copied(grey_run)
    metadata = json.loads((folder / "run.json").read_text("utf-8"))

    def opened(**changes):
        text = json.dumps({**metadata, **changes}, indent=2) + "\n"
        (folder / "run.json").write_text(text, "utf-8")
        return open_all([folder])

    model = {"class": "</script><script>alert(1)", "size": [1, {"x": None}]}
    (files,) = opened(model=model)
    assert json.loads(files.file("run.json"))["model"] == model
    for key in ("class_names", "mean", "std", "low", "high", "image_shape"):
        with pytest.raises(RunError, match=rf"run.json: 'data.{key}' must be .*, not an object"):
            opened(data={**metadata["data"], key: {"x": "<script>"}})


def test_an_altered_file_is_told_and_still_shown(text_run, copied, tmp_path):
    folder = copied(text_run)
    raw = bytearray((folder / "inputs.safetensors").read_bytes())
    raw[-1] ^= 1  # in the padding of a context, or a letter of the vocabulary
    (folder / "inputs.safetensors").write_bytes(raw)
    with ps.explore(folder, text_run, open_browser=False) as explorer:
        first = json.loads(explorer.root.file("data/0/verified.json"))
        assert first["state"] in ("checking", "altered")
        for files in explorer.root.runs:
            files.check.join()
        told = [json.loads(explorer.root.file(f"data/{n}/verified.json")) for n in (0, 1)]
        assert told == [
            {"state": "altered", "files": ["inputs.safetensors"]},
            {"state": "verified", "files": []},
        ]
        assert json.loads(explorer.root.file("data/0/run.json"))["damage"] == []
        explorer.root.file("data/0/packs/0.safetensors")
    with pytest.warns(
        UserWarning, match=r"is of a damaged run: .*inputs\.safetensors: its SHA-256"
    ):
        out = ps.export([folder, text_run], tmp_path / "site", progress=False)
    told = [json.loads((out / f"data/{n}/verified.json").read_text())["state"] for n in (0, 1)]
    assert told == ["altered", "verified"]


def test_a_check_that_goes_on_is_told(text_run, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(
        "polyseme.explorer.runfiles.altered_files", lambda *given: go_on.wait(60) and ["run.json"]
    )
    with ps.explore(text_run.path, open_browser=False) as explorer:
        for _ in range(2):
            told = json.loads(explorer.root.file("data/0/verified.json"))
            assert told == {"state": "checking", "files": []}
        go_on.set()
        explorer.root.runs[0].check.join()
        told = json.loads(explorer.root.file("data/0/verified.json"))
        assert told == {"state": "altered", "files": ["run.json"]}


def test_a_salvaged_folder_refuses_what_is_damaged(text_run, copied):
    folder = copied(text_run)
    assert RunFolder.salvaged(folder).damage == []
    cut_short(folder / "random.parquet")
    with pytest.raises(RunError, match=CUT):
        RunFolder(folder)
    salvaged = RunFolder.salvaged(folder)
    assert len(salvaged.examples) == len(text_run.folder.examples)
    for asks in (
        lambda: salvaged.random,
        lambda: salvaged.rows("random", 0, 1),
        lambda: salvaged.column("random", "input"),
        lambda: salvaged.columns("random"),
    ):
        with pytest.raises(RunError, match=f"random.parquet: .*{CUT}"):
            asks()
