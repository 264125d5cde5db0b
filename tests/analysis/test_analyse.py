"""The numbers of a run, against a second computation from the model's own tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import nn

import polyseme as ps
from analysis import small
from polyseme.attribution import maps
from polyseme.errors import InputError, RunError, SiteError

FLAT = small.flat_inputs()
RGB = small.rgb_inputs()


def run_of(model, data, tmp_path, **options):
    options = {"out": tmp_path / "run", "progress": False, **options}
    return ps.analyse(model, data, **options)


def check(run, site, truth, choose, threshold, linkage="average"):
    """Compare every neuron of a site with what its tensors say."""
    table = run.neurons().query("site == @site").set_index("neuron")
    assert list(table.index) == list(range(truth.activations.shape[1]))
    for j, row in table.iterrows():
        values = truth.activations[:, j]
        chosen = choose(values)
        neuron = run.neuron(site, j)
        assert neuron.examples["input"].tolist() == chosen.tolist()
        np.testing.assert_allclose(neuron.examples["activation"], values[chosen], rtol=1e-5)
        assert neuron.examples["position"].tolist() == truth.positions[chosen, j].tolist()
        h = truth.h(j, chosen)
        np.testing.assert_allclose(neuron.vectors, h, atol=1e-6)
        np.testing.assert_array_equal(neuron.weights, truth.weights[j])
        embeddings = h * truth.weights[j]
        labels = small.cluster(embeddings, threshold, linkage)
        if len(chosen):
            assert adjusted_rand_score(labels, neuron.examples["feature"]) == 1
        for name, value in small.metrics(embeddings, labels).items():
            assert row[name] == pytest.approx(value, abs=1e-6, nan_ok=True), (j, name)
        assert neuron.metrics.as_dict() == pytest.approx(
            small.metrics(embeddings, labels), abs=1e-6, nan_ok=True
        )
        active = np.maximum(values, 0)
        assert row["density"] == pytest.approx((values > 0).mean(), abs=1e-12)
        assert row["max_activation"] == pytest.approx(active.max(), rel=1e-6)
        assert row["mean_activation"] == pytest.approx(active.mean(), rel=1e-5, abs=1e-12)
        w = truth.weights[j].astype(np.float64)
        ratio = (w**2).sum() ** 2 / (w**4).sum()
        assert row["participation_ratio"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.parametrize("linkage", ["average", "single"])
def test_linear_layers(tmp_path, linkage):
    model = small.make(small.MLP)
    sites = ["first", "second", "last"]
    run = run_of(
        model, FLAT, tmp_path, sites=sites, select=ps.TopK(15), threshold=0.3, linkage=linkage
    )
    assert run.sites == sites
    for site, truth in small.truths(model, FLAT).items():
        check(run, site, truth, lambda v: small.strongest(v, 15), 0.3, linkage)
    kinds = [(info.kind, info.extra["activation"]) for info in run.folder.sites]
    assert kinds == [
        ("linear", "relu, dropout"),
        ("linear", "relu"),
        ("linear", "the layer's output"),
    ]
    clusters = run.neurons()["n_clusters"]
    assert clusters.between(2, 10).any(), "the threshold tells nothing apart"


def test_convolutions_plain_and_in_groups(tmp_path):
    model = small.make(small.ConvNet)
    data = ps.Images(RGB, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    select = ps.FirstActive(20, minimum=0.1)
    run = run_of(model, data, tmp_path, sites="*", select=select, threshold=0.4, panels=False)
    assert run.sites == ["conv", "grouped", "last"]
    inputs = data.inputs(slice(None))
    for site, truth in small.truths(model, inputs).items():
        check(run, site, truth, lambda v: small.first_active(v, 20, 0.1), 0.4)
    grouped = run.folder.sites[1]
    assert (grouped.d_in, grouped.extra["n_groups"], grouped.extra["kernel_shape"]) == (
        18,
        2,
        [2, 3, 3],
    )
    for site in run.folder.sites[:2]:
        positions = run.folder.examples.query("site == @site.name")["position"]
        assert positions.max() < np.prod(site.extra["grid"])


def test_sae_by_its_own_name_and_by_its_encoders(tmp_path):
    model = small.make(small.WithSAE)
    run = run_of(model, FLAT, tmp_path, sites=["sae", "hidden"], select=ps.TopK(30))
    truths = small.truths(model, FLAT)
    assert run.sites == ["hidden", "sae"], "in the order of the model"
    check(run, "hidden", truths["hidden"], lambda v: small.strongest(v, 30), 0.2)
    check(run, "sae", truths["sae"], lambda v: small.strongest(v, 30), 0.05)
    other = run_of(
        model, FLAT, tmp_path, sites="sae.encoder", select=ps.TopK(30), out=tmp_path / "encoder"
    )
    assert other.sites == ["sae.encoder"]
    mine = other.neurons().drop(columns="site")
    theirs = run.neurons().query("site == 'sae'").drop(columns="site")
    assert mine.equals(theirs.reset_index(drop=True))


def test_the_defaults_are_those_that_are_documented(tmp_path):
    model = small.make(small.WithSAE)
    data = np.concatenate([FLAT, FLAT + 0.1])
    run = run_of(model, data, tmp_path, sites=["hidden", "sae"])
    assert run.metadata["settings"] == {
        "select": {"name": "TopK", "k": 100},
        "threshold": None,
        "linkage": "average",
        "random_examples": 16,
        "seed": 0,
        "batch_size": 256,
        "panels": True,
        "panel_examples": 32,
        "baseline": 0.0,
    }
    assert [info.extra["threshold"] for info in run.folder.sites] == [0.2, 0.05]
    assert run.neurons()["n_examples"].max() == 100
    assert run.metadata["data"]["n_inputs"] == 180
    assert run.metadata["model"]["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_globs_lists_and_sites_agree_and_share_one_pass(tmp_path):
    model = small.make(small.MLP)
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    run = run_of(
        model,
        FLAT,
        tmp_path,
        sites=["*st", "first"],
        panels=False,
        batch_size=30,
        out=tmp_path / "a",
    )
    handle.remove()
    assert run.sites == ["first", "last"]
    expected = 1 + 1 + 1 + 2 + 3
    assert len(seen) == expected, "its fingerprint, what runs, the plan, its proof, the batches"
    found = [site for site in ps.list_sites(model) if site.name == "second"]
    other = run_of(model, FLAT, tmp_path, sites=found, panels=False, out=tmp_path / "b")
    assert other.sites == ["second"]


@pytest.mark.parametrize(("sizes", "panels"), [((1, 7, 64), False), ((23, 64), True)])
def test_batch_size_does_not_matter(tmp_path, sizes, panels):
    model = small.make(small.ConvNet)
    options = {"sites": "*", "panels": panels, "panel_examples": 4}
    runs = [
        run_of(model, RGB, tmp_path, **options, batch_size=size, out=tmp_path / f"{size}")
        for size in sizes
    ]
    assert ("logit_ablation" in runs[0].folder.site(0)) == panels
    first = runs[-1]
    for run in runs[:-1]:
        for table in ("examples", "random", "features"):
            mine, theirs = getattr(run.folder, table), getattr(first.folder, table)
            exact = [c for c in mine.columns if "activation" not in c]
            assert mine[exact].equals(theirs[exact])
        whole = ["site", "neuron", "n_examples", "n_clusters"]
        mine, theirs = run.neurons(), first.neurons()
        assert mine[whole].equals(theirs[whole])
        rest = mine.columns.drop(whole)
        np.testing.assert_allclose(mine[rest], theirs[rest], atol=1e-6, rtol=1e-6)
        for info in run.folder.sites:
            mine, theirs = run.folder.site(info.number), first.folder.site(info.number)
            for name in ("activation_map", "logit_gradient", "logit_ablation", "background"):
                assert (name in mine) == (name in theirs)
                if name in mine:
                    np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5)


# --- neurons with few examples or none -------------------------------------------------------


def test_dead_neurons_are_a_result(tmp_path):
    model = small.make(small.MLP)
    with torch.no_grad():
        model.first.bias[2] = -1e3
    run = run_of(model, FLAT, tmp_path, sites="first", image_shape=(3, 4))
    row = run.neurons().iloc[2]
    assert (row["n_examples"], row["n_clusters"], row["density"]) == (0, 0, 0)
    assert row[["max_distance", "mean_distance", "intra_cluster_distance"]].isna().all()
    dead = run.neuron(2)
    assert dead.features == []
    assert dead.examples.empty
    assert dead.recut(0.5).metrics.n_clusters == 0
    assert dead.assign(FLAT[:4]).tolist() == [-1] * 4
    assert dead.similar().empty
    assert run.summary().loc[0, "dead"] == int((run.neurons()["density"] == 0).sum()) >= 1


@pytest.mark.parametrize("data", [FLAT, (RGB[:, 0, :3, :4], np.arange(60) % 3)], ids=["f", "u"])
def test_a_selector_that_finds_nothing_at_all(tmp_path, data):
    model = small.make(small.MLP)
    run = run_of(
        model, data, tmp_path, sites="first", select=ps.FirstActive(5, 1e6), image_shape=(3, 4)
    )
    run = ps.open_run(run.path)
    # Those that are active, if not enough, are not dead.
    pixels = data[0][:, :].reshape(60, -1) / np.float32(255) if isinstance(data, tuple) else data
    with torch.no_grad():
        dead = int((model.first(torch.from_numpy(pixels)) <= 0).all(dim=0).sum())
    counts = run.summary().loc[0, ["neurons", "dead", "without_examples"]]
    assert counts.tolist() == [8, dead, 8 - dead]
    assert repr(run).endswith(f"8 neurons, {dead} dead, {8 - dead} without examples)")
    assert len(run.neuron(0).random_examples) == 16
    assert run.neuron(0).metrics.n_examples == 0
    run.neuron(0).figure(tmp_path / "dead.png")


def test_no_neuron_ever_active(tmp_path):
    model = small.make(small.MLP)
    with torch.no_grad():
        model.first.bias.fill_(-1e3)
    run = run_of(model, FLAT, tmp_path, sites="first", image_shape=(3, 4))
    assert run.summary().loc[0, "dead_share"] == 1
    assert run.neuron(3).inputs().shape == (0, 12)
    run.neuron(3).figure(tmp_path / "dead.png")
    assert "0 features" in repr(run.neuron(3))


def test_one_example(tmp_path):
    model = small.make(small.MLP)
    run = run_of(model, FLAT[:1], tmp_path, sites="first", image_shape=(3, 4))
    table = run.neurons()
    assert sorted(set(table["n_examples"])) == [0, 1]
    lone = table[table["n_examples"] == 1]
    assert (lone["n_clusters"] == 1).all()
    assert lone["mean_distance"].isna().all()
    assert table["background_distance"].isna().all()
    neuron = run.neuron(int(lone["neuron"].iloc[0]))
    assert [feature.n_examples for feature in neuron.features] == [1]
    assert neuron.recut(1.0).examples["feature"].tolist() == [0]


# --- the model is left as it was -------------------------------------------------------------


def snapshot(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [
            (name, p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
            for name, p in model.named_parameters()
        ],
        [(name, b.clone()) for name, b in model.named_buffers()],
        [
            (name, list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
    )


def same(before, after):
    def equal(x, y):
        if torch.is_tensor(x):
            return torch.equal(x, y)
        if isinstance(x, tuple | list):
            return len(x) == len(y) and all(equal(*pair) for pair in zip(x, y, strict=True))
        return x == y

    return equal(before, after)


def busy_model():
    """A model in the middle of training: mixed modes, gradients, hooks, frozen weights."""
    model = nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    model.train()
    model[3].eval()
    model(torch.from_numpy(FLAT)).sum().backward()
    model[0].bias.requires_grad_(False)
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("trouble", [None, "nan", "interrupt", "error", "labels"])
def test_the_model_is_left_as_it_was(tmp_path, trouble):
    model = busy_model()
    before = snapshot(model)

    def batches():
        yield FLAT[:30]
        if trouble == "nan":
            bad = FLAT[30:60].copy()
            bad[7, 3] = np.nan
            yield bad
        if trouble == "interrupt":
            raise KeyboardInterrupt
        if trouble == "error":
            raise OSError("the disk is gone")
        if trouble == "labels":
            yield FLAT[:3], [1]
        yield FLAT[60:]

    expected = {
        "nan": (
            InputError,
            r"Input 37 of the data holds nan at \[3\]; expected finite float32 values",
        ),
        "interrupt": (KeyboardInterrupt, None),
        "error": (OSError, "disk is gone"),
        "labels": (InputError, r"labels have shape \(1,\) for 3 inputs"),
    }
    if trouble is None:
        run_of(model, batches(), tmp_path, sites="*")
    else:
        kind, match = expected[trouble]
        with pytest.raises(kind, match=match):
            run_of(model, batches(), tmp_path, sites="*")
    assert same(before, snapshot(model))
    assert torch.is_grad_enabled()


def test_the_snapshot_detects_changes_of_the_model():
    model = busy_model()
    before = snapshot(model)
    model[3].train()
    assert not same(before, snapshot(model))
    model[3].eval()
    assert same(before, snapshot(model))
    model[0].weight.grad += 1
    assert not same(before, snapshot(model))


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"select": 100}, r"select is 100; a selector is expected: TopK\(k\)"),
        ({"select": ps.TopK}, r"select is <class .*; a selector is expected"),
        (
            {"threshold": 0},
            r"threshold is 0; expected a cosine distance greater than 0 and at most 2",
        ),
        ({"threshold": 2.1}, r"threshold is 2.1; .*at most 2"),
        ({"threshold": float("nan")}, r"threshold is nan"),
        ({"threshold": "wide"}, r"threshold is 'wide'"),
        ({"linkage": "ward"}, r"Unknown linkage: 'ward'\. Must be one of: average, single"),
        ({"batch_size": 0}, r"batch_size is 0; a whole number of at least 1 is expected"),
        ({"batch_size": 2.5}, r"batch_size is 2.5; a whole number"),
        ({"batch_size": True}, r"batch_size is True; a whole number"),
        ({"random_examples": 0}, r"random_examples is 0; a whole number of at least 1"),
        ({"panel_examples": -1}, r"panel_examples is -1; a whole number of at least 1"),
        ({"seed": -1}, r"seed is -1; a whole number of at least 0"),
        ({"image_shape": (5, 5)}, r"image_shape is \(5, 5\), but an input has 12 values"),
        ({"image_shape": (12,)}, r"image_shape is \(12,\).*give \(height, width\)"),
        ({"image_shape": 12}, r"image_shape is 12; \(height, width\) or"),
        ({"image_shape": (3.0, 4.0)}, r"image_shape is \(3.0, 4.0\); \(height, width\) or"),
        ({"baseline": np.zeros(5)}, r"baseline has shape \(5,\), but an input has shape \(12,\)"),
        ({"baseline": float("nan")}, r"baseline is nan; expected a finite number"),
        ({"baseline": "black"}, r"baseline is 'black'; expected a finite number"),
        ({"labels": [0, 1]}, r"labels have shape \(2,\) for 90 inputs"),
        (
            {"overwrite": True, "resume": True},
            "overwrite=True .* resume=True .* mutually exclusive",
        ),
    ],
)
def test_options_out_of_range(tmp_path, options, match):
    with pytest.raises(InputError, match=match):
        run_of(small.make(small.MLP), FLAT, tmp_path, **{"sites": "first", **options})
    assert not list(tmp_path.iterdir()), "nothing is left in the way of a correction"


@pytest.mark.parametrize(
    ("sites", "match"),
    [
        ("fist", r"Unknown site: 'fist'\. Did you mean 'first'.* one of: first, second, last"),
        ("third.*", r"No site matches 'third\.\*'\. The model's sites are: first, second, last"),
        ("act", r"'act' is a ReLU, which has no neurons of its own"),
        ([], r"sites is \[\], which names no site"),
        (["first", "secnd"], r"Unknown site: 'secnd'\. Did you mean 'second'"),
    ],
)
def test_unknown_sites(tmp_path, sites, match):
    with pytest.raises(SiteError, match=match):
        run_of(small.make(small.MLP), FLAT, tmp_path, sites=sites)


def test_data_of_the_wrong_shape_and_then_of_the_right_one(tmp_path):
    model = small.make(small.MLP)
    match = r"does not accept a batch of inputs of shape \(5,\).*'first', takes 12 values\. Reshape"
    with pytest.raises(InputError, match=match):
        run_of(model, FLAT[:, :5], tmp_path, sites="first")
    assert run_of(model, FLAT, tmp_path, sites="first").path == tmp_path / "run"


def test_batches_of_different_shapes(tmp_path):
    batches = [np.zeros((4, 12), np.float32), np.zeros((4, 3, 4), np.float32)]
    with pytest.raises(InputError, match=r"shapes \(12,\) and \(3, 4\); expected one shape"):
        run_of(small.make(small.MLP), iter(batches), tmp_path, sites="first")


def test_inputs_too_large_for_maps_are_refused_before_they_are_read(tmp_path, monkeypatch):
    taken = []

    def wide(width):
        return nn.Sequential(nn.Linear(width, 2), nn.ReLU(), nn.Linear(2, 2))

    def batches(width):
        for _ in range(9):
            taken.append(1)
            yield np.ones((2, width), np.float32)

    with pytest.raises(InputError, match=r"shape \(5000,\) have more than 4096 values"):
        run_of(wide(5000), batches(5000), tmp_path, sites="0")
    assert len(taken) == 1
    # The analysis itself is of fewer: the covariance of 5,000 values takes a minute.
    monkeypatch.setattr(maps, "MAX_CELLS", 40)
    with pytest.raises(InputError, match=r"shape \(50,\) have more than 40 values"):
        run_of(wide(50), batches(50), tmp_path, sites="0")
    run_of(wide(50), batches(50), tmp_path, sites="0", panels=False)


def test_a_function_in_place_of_a_model(tmp_path):
    with pytest.raises(InputError, match=r"model is a function; .* call it"):
        run_of(lambda: None, FLAT, tmp_path, sites="first")


def test_empty_data(tmp_path):
    model = small.make(small.MLP)
    with pytest.raises(InputError, match="The data generator yields no inputs: it is empty, or"):
        run_of(model, (x for x in ()), tmp_path, sites="first")
    with pytest.raises(InputError, match="is empty; expected at least one input"):
        run_of(model, FLAT[:0], tmp_path, sites="first")
    with pytest.raises(InputError, match="data set list is empty"):
        run_of(model, [], tmp_path, sites="first")


def test_weights_that_are_not_finite(tmp_path):
    model = small.make(small.MLP)
    with torch.no_grad():
        model.first.weight[3, 3] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite activations at site 'first'"):
        run_of(model, FLAT, tmp_path, sites="first")


def test_a_site_that_the_model_does_not_use(tmp_path):
    model = small.make(small.MLP)
    model.spare = nn.Linear(12, 3)
    with pytest.raises(SiteError, match=r"runs site 'spare' 0 times .* name a layer that"):
        run_of(model, FLAT, tmp_path, sites="spare")


def test_labels_that_do_not_number_the_logits(tmp_path):
    model = small.make(small.MLP)
    with torch.no_grad():
        n = model(torch.as_tensor(FLAT[:1])).shape[1]
    from_one = 1 + np.arange(90) % n
    with pytest.raises(InputError, match=rf"from 1 to {n}, .* {n} logits .* give labels - 1"):
        run_of(model, FLAT, tmp_path, sites="first", labels=from_one)
    run_of(model, FLAT, tmp_path, sites="first", labels=from_one - 1, panels=False)


def test_class_names_for_every_label(tmp_path):
    model, labels = small.make(small.MLP), np.arange(90) % 3
    for data, given in ((FLAT, {"labels": labels}), (zip([FLAT], [labels], strict=True), {})):
        with pytest.raises(InputError, match="highest label is 2, but there are 2 class_names"):
            run_of(model, data, tmp_path, sites="first", class_names=["a", "b"], **given)


def test_a_stream_that_is_shuffled(tmp_path):
    model = small.make(small.MLP)
    loader = torch.utils.data.DataLoader(FLAT, batch_size=16, shuffle=True)
    with pytest.raises(
        InputError, match=r"DataLoader yields different inputs each .* shuffle=False"
    ):
        run_of(model, loader, tmp_path, sites="first")


def test_an_output_that_exists(tmp_path):
    model = small.make(small.MLP)
    run = run_of(model, FLAT, tmp_path, sites="first", labels=np.arange(90) % 3)
    before = small.contents(run.path)
    with pytest.raises(RunError, match=r"run already exists\. Replace it with overwrite=True"):
        run_of(model, FLAT, tmp_path, sites="first")
    with pytest.raises(RunError, match=r"a different analysis.*: sites\S* was \S*first"):
        run_of(model, FLAT, tmp_path, sites="second", resume=True)
    assert small.contents(run.path) == before
    new = run_of(model, FLAT, tmp_path, sites="second", overwrite=True)
    assert new.sites == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_an_overwrite_that_fails_keeps_the_old_run(tmp_path):
    model = small.make(small.MLP)
    run = run_of(model, FLAT, tmp_path, sites="first")
    before = small.contents(run.path)
    with pytest.raises(InputError, match="holds nan at"):
        run_of(model, np.full((3, 12), np.nan, np.float32), tmp_path, sites="last", overwrite=True)
    assert small.contents(run.path) == before
    assert ps.open_run(run.path).sites == ["first"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold": 0.4}, r"settings\.threshold was null and is now 0\.4"),
        ({"select": ps.TopK(7)}, r"settings\.select\.k was 100 and is now 7"),
        ({"select": ps.FirstActive(9)}, r"settings\.select\.name was \"TopK\" and is now"),
        ({"linkage": "single"}, r"settings\.linkage was \"average\" and is now \"single\""),
        ({"seed": 3}, r"settings\.seed was 0 and is now 3"),
        ({"panels": False}, r"settings\.panels was true and is now false"),
        ({"baseline": 1}, r"settings\.baseline was 0\.0 and is now 1\.0"),
        ({"labels": np.ones(90, int)}, r"data\.labels_sha256 was "),
        ({"class_names": ["a", "b", "c"]}, r"data\.class_names was null and is now"),
        ({"image_shape": (3, 4)}, r"data\.image_shape was null and is now \[3, 4\]"),
    ],
)
def test_resuming_a_finished_run(tmp_path, options, named):
    model = small.make(small.MLP)
    given = {"sites": "first", "labels": np.arange(90) % 3}
    run = run_of(model, FLAT, tmp_path, **given)
    before = (run.path / "run.json").read_bytes()
    again = run_of(model, FLAT, tmp_path, **given, resume=True)
    assert (again.path / "run.json").read_bytes() == before, "there was nothing to do"
    with pytest.raises(RunError, match=named):
        run_of(model, FLAT, tmp_path, **{**given, **options}, resume=True)


def test_resuming_with_another_model_or_other_data(tmp_path):
    model = small.make(small.MLP)
    run_of(model, FLAT, tmp_path, sites="first")
    with pytest.raises(RunError, match=r"data\.sha256 was"):
        run_of(model, FLAT + 1, tmp_path, sites="first", resume=True)
    with torch.no_grad():
        model.last.bias[0] += 1
    with pytest.raises(RunError, match=r"model\.sha256 was"):
        run_of(model, FLAT, tmp_path, sites="first", resume=True)


def test_numbers_of_numpy_are_numbers(tmp_path):
    run = run_of(
        small.make(small.MLP),
        FLAT,
        tmp_path,
        sites="first",
        select=ps.TopK(np.int64(5)),
        threshold=np.float32(0.25),
        batch_size=np.int64(16),
        seed=np.int64(2),
        image_shape=np.array([3, 4]),
        baseline=np.float64(0.5),
        labels=np.arange(90) % 3,
        class_names=np.array([10, 20, 30]),
    )
    settings = run.metadata["settings"]
    assert (settings["threshold"], settings["seed"], settings["baseline"]) == (0.25, 2, 0.5)
    assert run.metadata["data"]["class_names"] == ["10", "20", "30"]
    assert run.metadata["data"]["image_shape"] == [3, 4]


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"window": (5, 5)}, r"window is \(5, 5\)"),
        ({"importances": "exact"}, "importances is 'exact'"),
    ],
)
def test_options_that_images_have_no_use_for(option, shown, tmp_path):
    (name,) = option
    with pytest.raises(
        InputError,
        match=rf"^{shown}, but the data is images, and {name} is an option for texts only; leave "
        r"it out\. Options for images only are: labels, class_names, image_shape, .*, panels\.$",
    ):
        ps.analyse(nn.Linear(2, 2), np.zeros((2, 2)), sites="", out=tmp_path / "run", **option)


def test_options_that_ask_for_nothing_are_accepted(tmp_path):
    run = ps.analyse(
        nn.Sequential(nn.Linear(2, 2)),
        np.ones((3, 2), np.float32),
        sites="0",
        out=tmp_path / "run",
        importances="none",
        panels=False,
        progress=False,
    )
    assert len(run.neurons()) == 2
