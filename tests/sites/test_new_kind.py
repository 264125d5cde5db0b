"""A new kind of site is one class: two are defined here, and analysed against slow oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyseme as ps
from analysis import small
from polyseme.core import General, Neurons
from polyseme.errors import RunError, SiteError
from polyseme.sites import MLPSite
from polyseme.sites.activation import Activation
from polyseme.sites.gradient import activation_gradient
from polyseme.sites.site import HiddenSite, as_array
from reference import oracles


class Transcoder(nn.Module):
    """Reads vectors of one length and writes those of another, through sparse latents."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 10)
        self.decoder = nn.Linear(10, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.decoder(F.relu(self.encoder(h)))


class TranscoderSite(HiddenSite):
    """The latents of a transcoder: linear neurons."""

    kind = "transcoder"

    def __init__(self, name: str, module: Transcoder) -> None:
        super().__init__(name, module, *module.encoder.weight.shape)
        self.activation = Activation.from_function(F.relu)

    @property
    def output_module(self) -> nn.Module:
        return self.module.encoder

    @property
    def decoder(self) -> nn.Module:
        return self.module.decoder

    def weights(self) -> Tensor:
        return self.module.encoder.weight.detach()

    def encode(self, inputs: Tensor) -> Tensor:
        return F.relu(self.module.encoder(inputs))

    def default_threshold(self, data: str) -> float:
        return 0.1

    def arrays(self) -> dict[str, Any]:
        return {"decoder": as_array(self.module.decoder.weight.T)}


class Bilinear(nn.Module):
    """Neurons that are products of two linear ones, cut off at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 10)
        self.right = nn.Linear(8, 10)
        self.out = nn.Linear(10, 5)

    def latents(self, h: Tensor) -> Tensor:
        return F.relu(self.left(h) * self.right(h))

    def forward(self, h: Tensor) -> Tensor:
        return self.out(self.latents(h))


class BilinearSite(HiddenSite):
    """Bilinear neurons, of which core knows no closed form: a gradient embeds them."""

    kind = "bilinear"

    def __init__(self, name: str, module: Bilinear) -> None:
        super().__init__(name, module, *module.left.weight.shape)

    @property
    def decoder(self) -> nn.Module:
        return self.module.out

    def weights(self) -> Tensor:
        return self.module.left.weight.detach()

    def encode(self, inputs: Tensor) -> Tensor:
        return self.module.latents(inputs)

    def layer_output(self, inputs: Tensor, output: Any) -> Tensor:
        return self.encode(inputs)

    def neurons(self) -> Neurons:
        def gradient(h: np.ndarray, neurons: np.ndarray) -> np.ndarray:
            rows = torch.arange(len(h))
            return activation_gradient(lambda x: self.encode(x)[rows, neurons], h).numpy()

        return General(as_array(self.weights()), gradient)


class Net(nn.Module):
    """A layer, the new one, 3 logits."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.middle = middle
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.tanh(self.first(x))))


KINDS = {"transcoder": (Transcoder, TranscoderSite), "bilinear": (Bilinear, BilinearSite)}
INPUTS = small.flat_inputs(40)


@pytest.fixture(scope="module", params=KINDS)
def analysed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Net, HiddenSite, Any]:
    make_module, make_site = KINDS[request.param]
    torch.manual_seed(7)
    model = Net(make_module()).eval()
    site = make_site("middle", model.middle)
    out = tmp_path_factory.mktemp(request.param) / "run"
    run = ps.analyse(
        model, INPUTS, sites=[site, "first"], out=out, select=ps.TopK(8), progress=False
    )
    return model, site, run


def read_by(model: Net) -> Tensor:
    with torch.no_grad():
        return torch.tanh(model.first(torch.from_numpy(INPUTS)))


def slow_embeddings(site: HiddenSite, h: np.ndarray, neuron: int) -> np.ndarray:
    """``h ⊙ ∂a/∂h`` by finite differences, one example and one coordinate at a time."""
    module = site.module.double()

    def activation(x: Any) -> float:
        with torch.no_grad():
            return float(site.encode(torch.as_tensor(x, dtype=torch.float64)[None])[0, neuron])

    try:
        return np.array([row * oracles.finite_differences(activation, row) for row in h])
    finally:
        module.float()


def test_examples_and_metrics_are_those_of_the_oracle(analysed: tuple[Net, Any, Any]) -> None:
    model, site, run = analysed
    h = read_by(model)
    with torch.no_grad():
        activations = site.encode(h).numpy()
    table = run.neurons()
    table = table[table["site"] == "middle"]
    for neuron in range(site.n_neurons):
        examples = run.neuron("middle", neuron).examples
        order = small.strongest(activations[:, neuron], 8)
        assert examples["input"].tolist() == order.tolist()
        np.testing.assert_allclose(examples["activation"], activations[order, neuron], rtol=1e-5)
        if len(order) < 2:
            continue
        embeddings = slow_embeddings(site, h.numpy()[order].astype(float), neuron)
        expected = small.metrics(embeddings, examples["feature"].to_numpy())
        found = table.iloc[neuron]
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=2e-4, nan_ok=True), name


def test_embeddings_are_those_of_the_oracle(analysed: tuple[Net, Any, Any]) -> None:
    model, site, run = analysed
    layer = site.neurons()
    h = read_by(model).numpy()[:6]
    for neuron in (0, 4, 9):
        found = layer.embed(h, np.full(6, neuron))
        expected = slow_embeddings(site, h.astype(float), neuron)
        active = np.abs(expected).max(axis=1) > 0
        if not layer.is_general:
            # Where a linear neuron fires, its gradient is its weights.
            assert np.array_equal(found, h * site.weights().numpy()[neuron])
        np.testing.assert_allclose(found[active], expected[active], rtol=1e-3, atol=1e-4)
    stored = run.neuron("middle", 4)
    if layer.is_general:
        with pytest.raises(RunError, match="neurons of 'middle', because polyseme has"):
            _ = stored.embeddings
    else:
        of = np.full(len(stored.vectors), 4)
        assert np.array_equal(stored.embeddings, layer.embed(stored.vectors, of))


def test_the_run_describes_the_site(analysed: tuple[Net, Any, Any]) -> None:
    _, site, run = analysed
    info = run.site("middle")
    assert (info.kind, info.n_neurons, info.d_in) == (site.kind, 10, 8)
    general = site.kind == "bilinear"
    assert info.extra["threshold"] == (0.2 if general else 0.1)
    assert info.extra.get("general", False) == general
    arrays = run.folder.site(info.number)
    assert ("decoder" in arrays) != general
    table = run.neurons()
    background = table[table["site"] == "middle"]["background_distance"]
    assert background.isna().all() == general
    # Maps and logit effects come with it.
    assert np.abs(arrays["activation_map"]).max() > 0
    assert np.isfinite(arrays["logit_ablation"]).any()


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, h: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))


def test_gated_neurons_that_read_no_text_are_embedded_from_their_run(tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = Net(GatedMLP()).eval()
    mlp = model.middle
    site = MLPSite("middle", [mlp.gate, mlp.up], mlp.down, F.silu, module=mlp)
    run = ps.analyse(model, INPUTS, sites=site, out=tmp_path / "run", panels=False, progress=False)
    neuron = run.neuron("middle", 4)
    expected = slow_embeddings(site, neuron.vectors.astype(float), 4)
    np.testing.assert_allclose(neuron.embeddings, expected, rtol=1e-3, atol=1e-4)


def test_analyse_rejects_a_site_that_fails_its_proof(tmp_path: Path) -> None:
    model = Net(Transcoder()).eval()
    site = TranscoderSite("middle", model.middle)
    site.encode = lambda inputs: torch.sigmoid(model.middle.encoder(inputs))  # type: ignore[method-assign]
    with pytest.raises(
        SiteError, match=r"^Site 'middle' cannot be read: the activations computed from its"
    ):
        ps.analyse(model, INPUTS, sites=site, out=tmp_path / "run", progress=False)
