"""What an SAE does: every number a second time, in the plainest way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyseme as ps
from polyseme.errors import InputError, SiteError
from polyseme.evaluate.sae import evaluate_reconstruction, evaluate_splice, label_purity
from polyseme.sites.attach import WithSAE, site_activations
from polyseme.sites.find import find_sites

from .models import SAE, Classifier, data


def test_the_reconstruction_equals_the_definitions() -> None:
    sae, h = SAE(), torch.relu(torch.randn(301, 5)) + 0.5
    with torch.no_grad():
        sae.b_enc[3] = -1000  # dead
    r = evaluate_reconstruction(sae, h.split(64))
    a = sae.encode(h).detach().double().numpy()
    wrong = sae.decode(sae.encode(h)).detach().double().numpy() - h.double().numpy()
    centred = h.double().numpy() - h.double().numpy().mean(axis=0)
    assert r.n == 301
    assert r.l0 == pytest.approx((a > 0).sum() / 301)
    assert r.mse == pytest.approx((wrong**2).mean())
    # Unexplained relative to the variance about the mean, not to the raw second moment.
    assert r.fvu == pytest.approx((wrong**2).sum() / (centred**2).sum())
    assert r.fvu > (wrong**2).sum() / (h.double().numpy() ** 2).sum() * 1.2
    assert r.n_dead == int(((a > 0).sum(axis=0) == 0).sum()) >= 1
    assert r.density.tolist() == pytest.approx(((a > 0).sum(axis=0) / 301).tolist())
    counts, edges = r.density_histogram(10)
    assert counts.sum() == r.n_latents - r.n_dead
    assert len(edges) == 11


def test_a_perfect_and_a_useless_reconstruction() -> None:
    h = torch.randn(200, 5) + 2
    sae = SAE()
    sae.decode = lambda a: h[: len(a)]  # type: ignore[method-assign]
    assert evaluate_reconstruction(sae, [h]).fvu == 0
    sae.decode = lambda a: h.mean(0).expand(len(a), 5)  # type: ignore[method-assign]
    assert evaluate_reconstruction(sae, [h]).fvu == pytest.approx(1)


def test_bad_activations_are_refused() -> None:
    with pytest.raises(InputError, match="no activations to evaluate the SAE on"):
        evaluate_reconstruction(SAE(), [])
    h = torch.zeros(4, 5)
    h[2, 1] = torch.nan
    with pytest.raises(InputError, match="Activations 4 to 7 hold NaN"):
        evaluate_reconstruction(SAE(), [torch.zeros(4, 5), h])


def test_splicing_equals_the_model_taken_apart() -> None:
    model, sae = Classifier(), SAE()
    x, y = data()
    found = evaluate_splice(model, "hidden", sae, [(x[:150], y[:150]), (x[150:], y[150:])])
    with torch.no_grad():
        h = torch.relu(model.hidden(x))
        spliced = model.out(sae.decode(sae.encode(h)))
        ablated = model.out(torch.zeros_like(h))
        for logits, accuracy, loss in (
            (model(x), found.accuracy, found.cross_entropy),
            (spliced, found.spliced_accuracy, found.spliced_cross_entropy),
            (ablated, found.ablated_accuracy, found.ablated_cross_entropy),
        ):
            assert accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())
            assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    lost = found.ablated_cross_entropy - found.cross_entropy
    kept = found.ablated_cross_entropy - found.spliced_cross_entropy
    assert found.recovered == pytest.approx(kept / lost)


def test_splicing_needs_labels_and_inputs() -> None:
    x, _ = data(4)
    with pytest.raises(InputError, match="The data has no labels"):
        evaluate_splice(Classifier(), "hidden", SAE(), [(x, None)])
    with pytest.raises(InputError, match="no inputs to evaluate the SAE on"):
        evaluate_splice(Classifier(), "hidden", SAE(), [])


def test_activations_of_a_site_are_what_the_next_layer_reads() -> None:
    model = Classifier()
    x, _ = data(50)
    [site] = find_sites(model, "hidden")
    found = torch.cat(list(site_activations(model, site, x.split(20))))
    assert torch.equal(found, torch.relu(model.hidden(x)).detach())


def test_a_spliced_model_gives_the_spliced_logits_and_its_latents_are_a_site(
    tmp_path: Path,
) -> None:
    model, sae = Classifier(), SAE()
    x, y = data()
    spliced = WithSAE(model, "hidden", sae, x)
    with torch.no_grad():
        h = torch.relu(model.hidden(x))
        assert torch.allclose(spliced(x), model.out(sae.decode(sae.encode(h))))
        assert torch.equal(WithSAE(model, "hidden", sae, x, splice=False)(x), model(x))
    run = ps.analyse(
        spliced, (x.numpy(), y.numpy()), sites="sae", out=tmp_path / "run", progress=False
    )
    a = sae.encode(h).detach().numpy()
    neurons = run.neurons()
    assert neurons["density"].tolist() == pytest.approx((a > 0).mean(axis=0).tolist())
    assert neurons["max_activation"].tolist() == pytest.approx(a.max(axis=0).tolist())
    # The vectors are the SAE's input, with no decoder bias taken off.
    live = int(neurons["n_examples"].idxmax())
    neuron = run.neuron("sae", live)
    assert np.array_equal(neuron.vectors, h.numpy()[neuron.examples["input"]])
    # What a latent does to the logits goes through the decoder and the later layers.
    direction = (sae.W_dec[live] @ model.out.weight.T).detach().numpy()
    effects = run.folder.site(0)["logit_ablation"][live]
    mean = neuron.examples["activation"].to_numpy()[:32].mean()
    assert effects == pytest.approx(direction * mean, rel=1e-3, abs=1e-5)


def test_an_sae_of_a_convolution_reads_every_position(tmp_path: Path) -> None:
    conv = torch.nn.Conv2d(1, 5, 2)
    model = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(20, 3))
    sae, x = SAE(), torch.randn(60, 1, 3, 3)
    h = torch.relu(conv(x)).detach()  # (60, 5, 2, 2)
    [site] = find_sites(model, "0")
    rows = torch.cat(list(site_activations(model, site, x.split(25))))
    assert torch.equal(rows, h.permute(0, 2, 3, 1).reshape(-1, 5))
    spliced = WithSAE(model, "0", sae, x)
    with torch.no_grad():
        back = sae.decode(sae.encode(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        assert torch.allclose(spliced(x), model[3](back.flatten(1)), atol=1e-6)
    run = ps.analyse(spliced, x, sites="sae", out=tmp_path / "run", panels=False, progress=False)
    strongest = sae.encode(h.permute(0, 2, 3, 1)).detach().flatten(1, 2).amax(dim=1).numpy()
    assert run.neurons()["max_activation"].tolist() == pytest.approx(
        np.maximum(strongest.max(axis=0), 0).tolist(), rel=1e-5
    )


def test_an_sae_of_another_width_or_shape_is_refused() -> None:
    model = Classifier()
    x, _ = data(4)
    with pytest.raises(SiteError, match=r"reads 5 values, but site 'out' has 3 neurons"):
        WithSAE(model, "out", SAE(), x)
    with pytest.raises(InputError, match=r"without encode\(\)"):
        WithSAE(model, "hidden", torch.nn.Linear(5, 5), x)
    with pytest.raises(SiteError, match="matches 2 sites"):
        WithSAE(model, "*", SAE(), x)


def test_label_purity_and_its_null(tmp_path: Path) -> None:
    # Neuron 0 fires for class 0 alone, neuron 1 for all alike, neuron 2 never, neuron 3 once,
    # of which nothing can be said, and neuron 4 for two inputs of class 0.
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    x = np.stack([np.where(y == 0, 1.0, -1.0), np.ones(300), *-np.ones((3, 300))], 1)
    x[7, 3] = 1
    x[np.flatnonzero(y == 0)[:2], 4] = 1
    x = (x + 0.01 * rng.random(x.shape)).astype(np.float32)
    model = torch.nn.Linear(5, 5)
    with torch.no_grad():
        model.weight.copy_(torch.eye(5))
        model.bias.zero_()
    run = ps.analyse(
        torch.nn.Sequential(model),
        (x, y),
        sites="0",
        out=tmp_path / "run",
        select=ps.FirstActive(60),
        panels=False,
        progress=False,
    )
    found = label_purity(run, "0")
    first = y[:60]
    assert found.n == 3
    assert found.purity == pytest.approx((1 + max(first.mean(), 1 - first.mean()) + 1) / 3)
    assert 0.5 < found.null < found.purity
