"""The files of a run, against the same neurons as Python shows them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from explorer.conftest import HOSTILE, decoded
from polyseme.core import Clustering
from polyseme.explorer.addresses import site_addresses
from polyseme.explorer.open_runs import open_all, titles
from polyseme.explorer.pictures import LARGEST_SIDE, Pictures
from polyseme.explorer.run_texts import RunTexts
from polyseme.explorer.runfiles import RunFiles, n_missing
from polyseme.opening import open_run
from polyseme.store import RunWriter, SiteInfo


@pytest.fixture(scope="module", params=["text", "grey", "rgb"])
def run(request):
    return request.getfixturevalue(f"{request.param}_run")


@pytest.fixture(scope="module")
def files(run):
    files = RunFiles(run, "a run")
    files.pack = 4  # several packs a site, the last of them not full
    return files


@pytest.fixture(scope="module")
def described(files):
    return json.loads(files.file("run.json"))


class Reader:
    """One neuron of a pack, cut out of it as the pages do."""

    def __init__(self, files: RunFiles, described: dict, site: int, neuron: int) -> None:
        first = described["sites"][site]["first_pack"]
        path = f"packs/{first + neuron // described['pack']}.safetensors"
        self.arrays, self.metadata = decoded(files.file(path))
        self.at = neuron % described["pack"]

    def part(self, name: str, counts: str | None = None, *, less: int = 0) -> np.ndarray:
        if counts is None:
            return self.arrays[name][self.at]
        sizes = np.maximum(self.arrays[counts].astype(int) - less, 0)
        ends = np.cumsum(sizes)
        return self.arrays[name][ends[self.at] - sizes[self.at] : ends[self.at]]


def every_neuron(run, files, described):
    for number, site in enumerate(run.sites):
        for neuron in range(described["sites"][number]["n_neurons"]):
            yield run.neuron(site, neuron), Reader(files, described, number, neuron)


def test_every_path_leads_to_a_file(files):
    paths = list(files.paths())
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert files.file(path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "packs/",
        "packs/-1.safetensors",
        "packs/00.safetensors",
        "packs/999.safetensors",
        "packs/999999999999.safetensors",
        "packs/\u00b2.safetensors",
        "packs/0.safetensors\n",
        "packs/../run.json",
        "../run.json",
        "/run.json",
        "contexts/999.safetensors",
        "search/999.json",
        "sites/0.safetensors",
    ],
)
def test_other_paths_lead_nowhere(files, path):
    with pytest.raises(KeyError):
        files.file(path)


def test_the_run_is_described(run, files, described):
    assert described["title"] == "a run"
    assert described["damage"] == []
    assert described["n_neurons"] == len(run.neurons())
    assert [site["name"] for site in described["sites"]] == run.sites
    ends = [site["first"] + site["n_neurons"] for site in described["sites"]]
    assert [site["first"] for site in described["sites"]] == [0, *ends[:-1]]
    # A pack holds neurons of one site alone.
    packs = [-(-site["n_neurons"] // 4) for site in described["sites"]]
    assert [site["first_pack"] for site in described["sites"]] == [0, *np.cumsum(packs)[:-1]]
    assert described["n_packs"] == sum(packs)


def test_the_table_of_neurons(run, files):
    found, _ = decoded(files.file("neurons.safetensors"))
    neurons = run.neurons()
    sites = np.array(run.sites)
    assert sites[found["site"]].tolist() == neurons["site"].tolist()
    for name in ("neuron", "n_examples", "n_clusters", "mean_distance", "density"):
        np.testing.assert_array_equal(found[name], neurons[name].astype(found[name].dtype))


def test_examples_trees_and_metrics(run, files, described):
    for neuron, reader in every_neuron(run, files, described):
        examples = neuron.examples
        assert reader.part("counts") == len(examples)
        assert reader.part("feature_counts") == len(neuron.features)
        for name, column in (
            ("input_number", "input"),
            ("position", "position"),
            ("activation", "activation"),
            ("feature", "feature"),
        ):
            assert reader.part(name, "counts").tolist() == examples[column].tolist()
        index = run.folder.inputs["index"]
        assert index[reader.part("input", "counts")].tolist() == examples["input"].tolist()
        sizes = [feature.n_examples for feature in neuron.features]
        assert reader.part("feature_sizes", "feature_counts").tolist() == sizes
        for name in ("mean_distance", "max_activation", "participation_ratio"):
            assert reader.part(f"neuron_{name}") == pytest.approx(
                neuron.row[name], rel=1e-6, nan_ok=True
            )
        np.testing.assert_array_equal(
            reader.part("histogram"),
            run.folder.site(neuron.info.number)["histogram"][neuron.number],
        )
        random = neuron.random_examples
        assert reader.part("random_input_number", "random_counts").tolist() == (
            random["input"].tolist()
        )
        # The heights are those of the run to the last bit, so a cut is the same anywhere.
        tree = np.column_stack(
            [
                reader.part("tree_nodes", "counts", less=1).astype(float),
                reader.part("tree_heights", "counts", less=1),
            ]
        )
        np.testing.assert_array_equal(tree, neuron.clustering.tree[:, :3])
        if len(examples):
            whole = np.column_stack([tree, neuron.clustering.tree[:, 3]])
            threshold = described["sites"][neuron.info.number]["threshold"]
            again = Clustering(np.zeros(len(examples), int), whole, 2.0, "average").cut(threshold)
            assert again.labels.tolist() == examples["feature"].tolist()


def test_windows_of_text(text_run):
    files = RunFiles(text_run, "texts")
    described = json.loads(files.file("run.json"))
    before, after = described["window"]
    seen = set()
    for neuron, reader in every_neuron(text_run, files, described):
        words = [*reader.metadata["vocabulary"], None]
        tokens = reader.part("window_tokens", "counts")
        shares = reader.part("window_shares", "counts")
        activation = reader.part("activation", "counts")
        assert tokens.shape[1] == before + 1 + after
        for row, window in enumerate(neuron.texts()):
            inside = tokens[row] >= 0
            assert [words[token] for token in tokens[row][inside]] == window.tokens
            assert words[tokens[row][before]] == window.tokens[window.centre]
            np.testing.assert_allclose(
                shares[row][inside].astype(float) * activation[row], window.activations, rtol=1e-3
            )
            seen.update(window.tokens)
        for side, frame in neuron.tokens().items():
            read = [words[token] for token in reader.part(f"{side}_tokens")]
            assert read == frame["token"].tolist()
            assert reader.part(f"{side}_logits").tolist() == frame["logit"].tolist()
        labels = reader.metadata["labels"]
        ends = np.cumsum(reader.arrays["feature_counts"].astype(int))
        assert len(labels) == ends[-1]
    assert seen >= set(HOSTILE)


def test_windows_end_where_the_context_ends(text_run):
    """Tokens of two contexts are never mixed, which few contexts would not show by chance."""
    files = RunFiles(text_run, "texts")
    described = json.loads(files.file("run.json"))
    contexts, metadata = decoded(files.file("contexts/0.safetensors"))
    whole = [
        [metadata["vocabulary"][token] for token in row[:length]]
        for row, length in zip(contexts["tokens"], contexts["lengths"], strict=True)
    ]
    assert (contexts["tokens"][0][contexts["lengths"][0] :] < 0).all()
    before, after = described["window"]
    for kind in ("", "random_"):
        for _, reader in every_neuron(text_run, files, described):
            words = reader.metadata["vocabulary"]
            name = "random_tokens" if kind else "window_tokens"
            rows = zip(
                *(
                    reader.part(part, f"{kind}counts")
                    for part in (name, f"{kind}input", f"{kind}position")
                ),
                strict=True,
            )
            for tokens, context, position in rows:
                text = whole[context]
                wanted = [
                    text[place] if 0 <= place < len(text) else None
                    for place in range(int(position) - before, int(position) + after + 1)
                ]
                assert [words[t] if t >= 0 else None for t in tokens] == wanted


def test_many_contexts_are_not_kept(text_run, monkeypatch):
    files = RunFiles(text_run, "texts")
    kept = files.file("packs/0.safetensors")
    monkeypatch.setattr("polyseme.explorer.run_texts._MOST_KEPT_TOKENS", 0)
    assert RunFiles(text_run, "texts").file("packs/0.safetensors") == kept


def test_pictures(grey_run):
    files = RunFiles(grey_run, "grey")
    described = json.loads(files.file("run.json"))
    image = described["image"]
    assert image["thumb"] == [5, 4, 1]
    assert (image["mean"], image["std"], image["float"]) == (0.4, 0.3, False)
    for neuron, reader in every_neuron(grey_run, files, described):
        thumbs = reader.arrays["thumbs"][reader.part("thumb", "counts")]
        assert thumbs.dtype == np.uint8
        np.testing.assert_array_equal(thumbs[..., 0], neuron.inputs())
        of_random = reader.arrays["thumbs"][reader.part("random_thumb", "random_counts")]
        np.testing.assert_array_equal(of_random[..., 0], neuron.inputs(neuron.random_examples))
        names = [image["class_names"][k] for k in reader.part("class", "counts")]
        assert names == list(neuron.examples.get("label", []))
        assert ("weights" in reader.arrays) == (neuron.site == "first")
        if neuron.site == "first":
            np.testing.assert_array_equal(
                reader.part("weights")[..., 0], neuron.weights.reshape(5, 4)
            )
        if "activation_map" in reader.arrays:
            drawn = grey_run.folder.site(neuron.info.number)["activation_map"][neuron.number]
            np.testing.assert_array_equal(reader.part("activation_map")[..., 0], drawn)


def test_pictures_of_three_channels(rgb_run):
    files = RunFiles(rgb_run, "rgb")
    described = json.loads(files.file("run.json"))
    shape = rgb_run.metadata["data"]["image_shape"]
    assert described["image"]["thumb"] == [*shape[1:], shape[0]]
    for neuron, reader in every_neuron(rgb_run, files, described):
        kernel = neuron.info.extra["kernel_shape"]
        wanted = np.moveaxis(neuron.weights.reshape(kernel), 0, -1)
        np.testing.assert_array_equal(reader.part("kernel"), wanted)
        embedding = (neuron.vectors * neuron.weights).reshape(-1, *kernel).sum(axis=1)
        np.testing.assert_allclose(
            reader.part("embedding", "counts")[..., 0], embedding, rtol=1e-3, atol=1e-4
        )
    site = described["sites"][0]["convolution"]
    assert len(site["grid"]) == len(site["covers"]) == 2
    assert all(0 < share <= 1 for share in site["covers"])


def test_large_images_are_averaged_down(grey_run):
    pictures = Pictures(grey_run.folder)
    pictures.shape = (100, 130)
    assert pictures.thumb == (34, 44, 1)
    assert max(pictures.thumb) <= LARGEST_SIDE
    values = np.arange(13_000, dtype=np.float32).reshape(1, -1)
    found = pictures.arrays(values)[0, :, :, 0]
    image = values.reshape(100, 130)
    for row, column in ((0, 0), (10, 20), (33, 43)):
        block = image[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert found[row, column] == pytest.approx(block.mean())


def test_runs_are_told_apart(text_run, grey_run, tmp_path):
    assert titles([text_run, grey_run]) == [
        f"{run.path.parent.name}/run" for run in (text_run, grey_run)
    ]
    assert titles([text_run]) == ["run"]
    here = text_run.path.parent.name
    assert titles([text_run, text_run]) == [f"{here}/run (1)", f"{here}/run (2)"]
    first, second = open_all([text_run.path, grey_run])
    assert first.summary()["kind"], second.summary()["kind"] == ("text", "image")


def test_packs_are_of_a_size(text_run, monkeypatch):
    """A power of two, below the bytes, but never so small that there are too many files."""
    files = RunFiles(text_run, "texts")
    assert files.pack & (files.pack - 1) == 0
    monkeypatch.setattr("polyseme.explorer.runfiles._PACK_BYTES", 1)
    assert RunFiles(text_run, "texts").pack == 1
    monkeypatch.setattr("polyseme.explorer.runfiles._MOST_PACKS", 7)
    small = RunFiles(text_run, "texts")
    assert json.loads(small.file("run.json"))["n_packs"] <= 7


def test_a_pack_is_as_large_as_fits(text_run, monkeypatch):
    folder = text_run.folder
    example = 40 + 5 * (sum(RunTexts(folder).window) + 1)
    neuron = 2_000 + example * len(folder.examples) / len(folder.neurons)
    monkeypatch.setattr("polyseme.explorer.runfiles._PACK_BYTES", 8 * neuron + 1e-6)
    assert RunFiles(text_run, "texts").pack == 8
    monkeypatch.setattr("polyseme.explorer.runfiles._PACK_BYTES", 8 * neuron - 1e-6)
    assert RunFiles(text_run, "texts").pack == 4
    monkeypatch.setattr("polyseme.explorer.runfiles._PACK_BYTES", 1e12)
    assert RunFiles(text_run, "texts").pack == 1024
    packs = sum(-(-site.n_neurons // 2) for site in folder.sites)
    monkeypatch.setattr("polyseme.explorer.runfiles._PACK_BYTES", 1)
    for most, size in ((packs, 2), (packs - 1, 4)):
        monkeypatch.setattr("polyseme.explorer.runfiles._MOST_PACKS", most)
        assert RunFiles(text_run, "texts").pack == size


@pytest.mark.parametrize("most", [1, 3, 5])
def test_contexts_are_in_so_many_files_at_most(text_run, monkeypatch, most):
    monkeypatch.setattr("polyseme.explorer.runfiles._CONTEXT_TOKENS", 1)
    monkeypatch.setattr("polyseme.explorer.runfiles._MOST_CONTEXT_FILES", most)
    files, n = RunFiles(text_run, "texts"), len(text_run.folder.inputs["index"])
    assert n == 7
    paths = [path for path in files.paths() if path.startswith("contexts/")]
    sizes = [len(decoded(files.file(path))[0]["lengths"]) for path in paths]
    assert len(paths) <= most
    assert sum(sizes) == n
    assert set(sizes[:-1]) <= {-(-n // most)}


def test_the_largest_feature_has_a_share(run, files):
    found, _ = decoded(files.file("neurons.safetensors"))
    for row, (site, neuron) in enumerate(
        zip(run.neurons()["site"], run.neurons()["neuron"], strict=True)
    ):
        view = run.neuron(site, neuron)
        sizes = [feature.n_examples for feature in view.features]
        wanted = max(sizes) / len(view.examples) if sizes else np.nan
        assert found["largest_share"][row] == pytest.approx(wanted, nan_ok=True)


@pytest.fixture(scope="module")
def with_similar(text_run, tmp_path_factory):
    """The run of texts with similar features and importances, made up."""
    folder, out = text_run.folder, tmp_path_factory.mktemp("similar") / "run"
    rng = np.random.default_rng(0)
    n = len(folder.features)
    with RunWriter(out, fingerprint={}) as writer:
        for site in folder.sites:
            own = int(folder.offsets("features")[folder.first_neuron(site.number) + site.n_neurons])
            own -= int(folder.offsets("features")[folder.first_neuron(site.number)])
            arrays = dict(folder.site(site.number))
            similar = rng.integers(-1, n, (own, 3))
            shape = arrays["windows"].shape
            writer.write_site(
                site.number,
                {
                    **arrays,
                    "similar_features": similar,
                    "similar_similarity": np.where(similar < 0, np.nan, rng.random(similar.shape)),
                    "importances": rng.integers(0, 256, shape).astype(np.uint8),
                },
            )
        writer.write_inputs(dict(folder.inputs))
        tables = ("neurons", "examples", "features", "random")
        writer.write_tables(**{name: getattr(folder, name) for name in tables})
        keys = ("settings", "model", "data", "sites")
        writer.finish({key: folder.metadata[key] for key in keys})
    return open_run(out)


def test_similar_features_with_a_sample_of_each(with_similar):
    run = with_similar
    files = RunFiles(run, "similar")
    described = json.loads(files.file("run.json"))
    assert described["has"]["similar"]
    assert described["has"]["importances"]
    features = run.folder.features
    row = 0
    for neuron, reader in every_neuron(run, files, described):
        arrays = run.folder.site(neuron.info.number)
        first = run.folder.offsets("features")[run.folder.first_neuron(neuron.info.number)]
        words = reader.metadata["vocabulary"]
        counts = reader.arrays["similar_counts"].astype(int)
        before = int(reader.arrays["feature_counts"][: reader.at].astype(int).sum())
        for feature in range(len(neuron.features)):
            start = counts[: before + feature].sum()
            entries = range(start, start + counts[before + feature])
            stored = arrays["similar_features"][row - first]
            stored = stored[stored >= 0]
            assert len(entries) == len(stored)
            for at, target in zip(entries, stored, strict=True):
                other = features.iloc[target]
                site, number, of = (
                    int(reader.arrays[f"similar_{part}"][at])
                    for part in ("site", "neuron", "feature")
                )
                assert (run.sites[site], number, of) == (
                    other["site"],
                    other["neuron"],
                    other["feature"],
                )
                view = run.neuron(other["site"], other["neuron"])
                (window,) = view.texts(view.examples.iloc[[other["medoid"]]], before=8, after=4)
                tokens = reader.arrays["similar_tokens"][at]
                assert [words[t] for t in tokens if t >= 0] == window.tokens
            row += 1
        np.testing.assert_array_equal(
            reader.part("importances", "counts"),
            neuron._of_site("importances"),
        )
    assert row == len(features)


@pytest.mark.parametrize(
    ("names", "addresses"),
    [
        (["model.layers.1.mlp", "model.layers.10.mlp", "lm_head"], ["1", "10", "lm_head"]),
        # Two sites carry 3, and one carries two numbers: any might be meant.
        (
            ["encoder.3.fc", "decoder.3.fc", "layers.4.experts.0", "layers.5"],
            ["encoder.3.fc", "decoder.3.fc", "layers.4.experts.0", "5"],
        ),
        (["conv1", "layer2", "x.٣.y", "3"], ["conv1", "layer2", "x.٣.y", "3"]),
        (["h.07.mlp"], ["7"]),
    ],
)
def test_sites_go_by_the_layer_that_their_name_carries(names, addresses):
    sites = [SiteInfo(n, name, "linear", 4, 4) for n, name in enumerate(names)]
    assert site_addresses(sites) == addresses


def test_inputs_of_missing_shards_are_counted() -> None:
    assert n_missing([[0, 64], [128, 130]]) == 66
    for invalid in (None, [], [[0]], [[64, 0]], [["a", 3]], 7, [[0.5, 3]]):
        assert n_missing(invalid) == 0
