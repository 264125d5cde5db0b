"""Activation maps, logit effects and gradients, against loops and automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.attribution import (
    LogitEffects,
    activation_gradient,
    activation_maps,
    count_classes,
    logit_effects,
)
from polyseme.attribution import maps as attribution
from polyseme.attribution.maps import cells_of
from polyseme.core import gated_gradient, neuron_embeddings
from polyseme.errors import InputError
from polyseme.sites import Feed, Site, evaluating, find_sites, prove_sites
from reference import oracles
from sites.models import SAE, ParameterSAE, WithSAE, convolutional


def found_sites(model: nn.Module, x: Tensor, names: Any = "*") -> list[Site]:
    sites = find_sites(model, names)
    with evaluating(model):
        prove_sites(model, sites, Feed(model), x)
    return sites


# --- gradients ---------------------------------------------------------------------------------


def test_the_gradient_is_that_of_finite_differences() -> None:
    w = torch.randn(2, 4, dtype=torch.float64)

    def neuron(h: Tensor) -> Tensor:
        return torch.tanh(h @ w[0]) * (h**2).sum(dim=1) + h @ w[1]

    h = np.random.default_rng(0).standard_normal((5, 4))
    found = activation_gradient(neuron, h)
    expected = [
        oracles.finite_differences(lambda x: float(neuron(torch.tensor(x[None]))), row) for row in h
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_a_gated_neuron_is_its_closed_form() -> None:
    gate, up = torch.randn(2, 4, dtype=torch.float64)
    h = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        found = activation_gradient(lambda x: F.silu(x @ gate) * (x @ up), h)
    np.testing.assert_allclose(found.numpy(), gated_gradient(h, gate, up), rtol=1e-10)
    assert not found.requires_grad
    assert h.grad is None
    assert neuron_embeddings(h, found).shape == (6, 4)


def test_the_gradient_of_what_is_no_neuron() -> None:
    with pytest.raises(
        InputError, match=r"activation returned shape \(3, 2\) for 3 examples; expected \(3,\)"
    ):
        activation_gradient(lambda h: h * 2, torch.ones(3, 2))


# --- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (4096,), (28, 28), (1, 28, 28), (3, 32, 32), (2, 3, 4, 5)])
def test_small_inputs_have_a_cell_for_each_value(shape: tuple[int, ...]) -> None:
    assert np.array_equal(cells_of(shape), np.arange(np.prod(shape)).reshape(shape))


@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 64, 64), 2), ((3, 224, 224), 7), ((1, 65, 64), 2), ((100, 90), 2), ((3, 5, 5000), 5)],
)
def test_large_images_have_blocks(shape: tuple[int, ...], size: int) -> None:
    cells = cells_of(shape)
    assert cells.shape == shape
    assert np.array_equal(np.unique(cells), np.arange(cells.max() + 1))
    assert cells.max() < 4096
    expected: dict[tuple[int, ...], int] = {}
    for at in np.ndindex(shape):
        block = (*at[:-2], at[-2] // size, at[-1] // size)
        # The same block is always the same cell, and no other block is.
        assert expected.setdefault(block, int(cells[at])) == cells[at]
    assert len(expected) == cells.max() + 1


@pytest.mark.parametrize("shape", [(4097,), (5000, 1, 1)])
def test_inputs_with_too_many_values(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InputError, match=r"Inputs of shape \(.*\) have more than 4096 values on axes other than"
    ):
        cells_of(shape)


# --- activation maps ---------------------------------------------------------------------------


def maps_of(model: nn.Module, sites: list[Site], **options: Any) -> dict[str, np.ndarray]:
    steps = list(activation_maps(model, sites, **options))
    shares, last = [share for share, _ in steps], steps[-1][1]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert last is not None
    return last


def test_the_map_of_a_first_layer_is_its_weights_times_the_farther_end() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2))
    sites = found_sites(model, torch.randn(2, 3, 4), "1")
    baseline = np.zeros((3, 4), np.float32)
    weights = model[1].weight.detach().numpy().reshape(5, 3, 4)
    for low, high, end in ((-0.4, 2.8, 2.8), (-3.0, 1.0, -3.0), (0.0, 1.0, 1.0)):
        found = maps_of(model, sites, baseline=baseline, low=low, high=high)["1"]
        np.testing.assert_allclose(found, weights * end, rtol=1e-4, atol=1e-6)
    # Each pixel may have a range of its own.
    rng = np.random.default_rng(0)
    bottom, top = -rng.uniform(0, 1, (3, 4)), rng.uniform(0, 1, (3, 4))
    farther = np.where(top > -bottom, top, bottom)
    found = maps_of(model, sites, baseline=baseline, low=bottom, high=top)["1"]
    np.testing.assert_allclose(found, weights * farther, rtol=1e-4, atol=1e-6)
    assert found.dtype == np.float32


def sequential_drives(model: nn.Sequential, upto: dict[str, int]) -> dict[str, Callable[..., Any]]:
    """Drive of each site, by running the model's first layers by hand."""

    def drive(stop: int) -> Callable[[np.ndarray], np.ndarray]:
        def run(image: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                output = model[:stop](torch.from_numpy(image[None]).float())[0]
            return output.flatten(1).amax(dim=1).numpy() if output.ndim == 3 else output.numpy()

        return run

    return {name: drive(stop) for name, stop in upto.items()}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_the_maps_of_deep_layers_equal_loops(
    inplace: bool, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convolutional(inplace=inplace)
    sites = found_sites(model, torch.randn(2, 2, 7, 6))
    rng = np.random.default_rng(0)
    baseline = rng.normal(size=(2, 7, 6)).astype(np.float32)
    low, high = -rng.uniform(1, 2, baseline.shape), rng.uniform(1, 2, baseline.shape)
    if blocks:
        monkeypatch.setattr(attribution, "MAX_CELLS", 30)
    cells = cells_of(baseline.shape)
    assert cells.max() + 1 == (24 if blocks else 84)
    options = {"baseline": baseline, "low": low, "high": high, "levels": 4}
    found = maps_of(model, sites, **options, batch_size=37)
    model.eval()
    # A layer's drive comes after its batch norm and before its nonlinearity.
    drives = sequential_drives(model, {"0": 2, "4": 5, "7": 9, "10": 11})
    assert set(found) == set(drives)
    for name, drive in drives.items():
        expected = oracles.activation_map(drive, baseline, cells, low, high, 4)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
    for name, array in maps_of(model, sites, **options, batch_size=1000).items():
        np.testing.assert_allclose(array, found[name], rtol=1e-4, atol=1e-5)


def test_the_maps_of_saes() -> None:
    baseline = np.zeros(6, np.float32)
    options = {"baseline": baseline, "low": -1.0, "high": 2.0}
    for sae in (SAE(5, 8), ParameterSAE(5, 8)):
        model = WithSAE(sae, amid=True)
        sites = found_sites(model, torch.randn(2, 6), "sae")

        def drive(x: np.ndarray, model: WithSAE = model, sae: Any = sae) -> Any:
            with torch.no_grad():
                h = F.relu(model.hidden(torch.from_numpy(x).float()))
                if isinstance(sae, SAE):
                    return sae.encoder(h - sae.decoder.bias).numpy()
                # Its nonlinearity is inside its encode: what comes out is all there is.
                return sae.encode(h).numpy()

        found = maps_of(model, sites, **options)["sae"]
        low, high = np.full(6, -1.0), np.full(6, 2.0)
        expected = oracles.activation_map(drive, baseline, np.arange(6), low, high, 5)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# --- logit effects -----------------------------------------------------------------------------


def effects_of(
    model: nn.Module, site: Site, x: Tensor, neuron: Any, example: Any, **options: Any
) -> LogitEffects | None:
    pairs = np.asarray(neuron), np.asarray(example)
    steps = list(logit_effects(model, site, 3, lambda i: x[i], *pairs, **options))
    shares = [share for share, _ in steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return steps[-1][1]


def some_pairs(n_neurons: int, n_inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Several examples for each neuron but the last, which has none."""
    rng = np.random.default_rng(0)
    neuron = np.sort(rng.integers(0, n_neurons - 1, 5 * n_neurons))
    return neuron, rng.integers(0, n_inputs, len(neuron))


def test_of_a_last_hidden_layer_both_are_activation_times_output_weight() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(20, 6)
    (site,) = found_sites(model, x, "0")
    neuron, example = some_pairs(5, 20)
    found = effects_of(model, site, x, neuron, example, batch_size=7)
    assert found is not None
    with torch.no_grad():
        a, w = model[:2](x).numpy(), model[2].weight.numpy()
    expected = oracles.mean_effects(lambda j, i: a[i, j] * w[:, j], neuron, example, 5, 3)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.ablation, expected, rtol=1e-4, atol=1e-6)
    assert np.isnan(found.gradient[4]).all()
    assert np.isnan(found.ablation[4]).all()
    assert not np.isnan(found.gradient[:4]).any()


def split_effects(
    head: Callable[[Tensor], Tensor], tail: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Callable[[int, int], Any], Callable[[int, int], Any]]:
    """Effects of a neuron in an example, of a model that is cut in two at its activations."""

    def gradient(j: int, i: int) -> list[float]:
        activations = head(x[i : i + 1]).detach().requires_grad_()
        out = []
        for c in range(3):
            (slope,) = torch.autograd.grad(tail(activations)[0, c], activations)
            channel = 1 if activations.ndim == 4 else activations.ndim - 1
            out.append(float((slope * activations).detach().select(channel, j).sum()))
        return out

    @torch.no_grad()
    def ablation(j: int, i: int) -> np.ndarray:
        activations = head(x[i : i + 1])
        without = activations.clone()
        without.select(1 if activations.ndim == 4 else activations.ndim - 1, j).zero_()
        return (tail(activations.clone()) - tail(without))[0].numpy()

    return gradient, ablation


def assert_effects(
    found: LogitEffects | None, effects: Any, neuron: Any, example: Any, n_neurons: int
) -> None:
    assert found is not None
    for array, effect in zip((found.gradient, found.ablation), effects, strict=True):
        expected = oracles.mean_effects(effect, neuron, example, n_neurons, 3)
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("layer", "after"), [("0", 3), ("4", 6), ("7", 10), ("10", 11)])
def test_effects_in_a_deep_net_equal_loops(
    inplace: bool, frozen: bool, layer: str, after: int
) -> None:
    model = convolutional(inplace=inplace).requires_grad_(not frozen)
    x = torch.randn(12, 2, 7, 6)
    (site,) = found_sites(model, x, layer)
    neuron, example = some_pairs(site.n_neurons, 12)
    found = effects_of(model, site, x, neuron, example, batch_size=8)
    model.eval()
    effects = split_effects(model[:after], model[after:], x)
    assert_effects(found, effects, neuron, example, site.n_neurons)


@pytest.mark.parametrize("layer", ["0", "2"])
def test_effects_where_later_layers_work_in_place_equal_loops(layer: str) -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x += x.sum(1, keepdim=True)
            return x.mul_(-1.5)

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), Shift(), nn.Linear(4, 3))
    if layer == "0":
        model.insert(2, Shift())
    x = torch.randn(9, 6)
    (site,) = found_sites(model, x, layer)
    neuron, example = some_pairs(site.n_neurons, 9)
    found = effects_of(model, site, x, neuron, example)
    after = {"0": 2, "2": 3}[layer]
    effects = split_effects(model[:after], lambda a: model[after:](a.clone()), x)
    assert_effects(found, effects, neuron, example, site.n_neurons)


def test_effects_in_sequences_equal_loops() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * x.flip(2)).mean(dim=1)

    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), Mean(), nn.Linear(5, 3))
    x = torch.randn(9, 4, 6)
    (site,) = found_sites(model, x, "0")
    neuron, example = some_pairs(5, 9)
    found = effects_of(model, site, x, neuron, example)
    assert_effects(found, split_effects(model[:2], model[2:], x), neuron, example, 5)


def test_effects_of_an_sae_amid_the_model_equal_loops() -> None:
    model = WithSAE(SAE(5, 8), amid=True)
    sae = model.sae
    x = torch.randn(9, 6)
    (site,) = found_sites(model, x, "sae")
    neuron, example = some_pairs(8, 9)
    found = effects_of(model, site, x, neuron, example)

    def head(part: Tensor) -> Tensor:
        return F.relu(sae.encoder(F.relu(model.hidden(part)) - sae.decoder.bias))

    effects = split_effects(head, lambda a: model.out(sae.decoder(a)), x)
    assert_effects(found, effects, neuron, example, 8)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_site_that_does_not_reach_the_logits_has_no_effects(frozen: bool) -> None:
    model = WithSAE(SAE(5, 8), amid=False).requires_grad_(not frozen)
    x = torch.randn(9, 6)
    (site,) = found_sites(model, x, "sae")
    assert effects_of(model, site, x, [0, 1], [0, 1]) is None


def test_an_sae_without_a_decoder_module_has_no_effects() -> None:
    model = WithSAE(ParameterSAE(5, 8), amid=True)
    x = torch.randn(9, 6)
    (site,) = found_sites(model, x, "sae")
    assert effects_of(model, site, x, [0, 1], [0, 1]) is None


def test_which_outputs_are_logits() -> None:
    assert count_classes(torch.zeros(4, 10)) == 10
    assert count_classes(torch.zeros(4, 1024)) == 1024
    for output in (torch.zeros(4, 1), torch.zeros(4, 1025), torch.zeros(4, 5, 3), torch.zeros(4)):
        assert count_classes(output) is None
    assert count_classes({"logits": torch.zeros(4, 10)}) is None
