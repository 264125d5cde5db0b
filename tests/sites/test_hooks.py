"""Reading and editing leave the model exactly as it was, whatever happens within."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.attribution import activation_maps, logit_effects
from polyseme.capture import Batch, Collector, TopK
from polyseme.errors import InputError, SiteError
from polyseme.sites import (
    Feed,
    Site,
    edit_site,
    evaluating,
    find_sites,
    prove_sites,
    read_sites,
    stopping_after,
)

from .models import SAE, ParameterSAE, WithSAE, convolutional


class Fragile(nn.Module):
    """Fails, if told to, after its sites have run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = WithSAE(SAE(5, 8), amid=True)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.error: BaseException | None = None
        # Modes that are not all alike, and a gradient and buffers to be left alone.
        self.train()
        self.body.sae.eval()
        self.norm.eval()
        self.body(torch.randn(4, 6)).sum().backward()

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm(self.body(x)))
        if self.error is not None:
            raise self.error
        return y


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that a pass over data must not change."""
    return {
        "hooks": [
            (name, hooks, list(getattr(module, hooks)))
            for name, module in model.named_modules()
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ],
        "modes": [module.training for module in model.modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "random": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    else:
        assert a == b


def found_sites(model: Fragile, x: Tensor) -> list[Site]:
    sites = find_sites(model, "*")
    error, model.error = model.error, None
    with evaluating(model):
        prove_sites(model, sites, Feed(model), x)
    model.error = error
    return sites


def collect(model: Fragile, x: Tensor) -> None:
    for _ in Collector(model, find_sites(model, "*"), TopK(2)).run([Batch(x, x.numpy())]):
        pass


def stop_early(model: Fragile, x: Tensor) -> None:
    passing = Collector(model, find_sites(model, "*"), TopK(2)).run([Batch(x, x.numpy())] * 3)
    next(passing)
    passing.close()


def find(model: Fragile, x: Tensor) -> None:
    with evaluating(model):
        prove_sites(model, find_sites(model, "*"), Feed(model), x)


def read(model: Fragile, x: Tensor) -> None:
    with evaluating(model), read_sites(model, find_sites(model, "*"), lambda *_: None):
        Feed(model)(x)


def edit(model: Fragile, x: Tensor) -> None:
    for site in found_sites(model, x):
        with evaluating(model), edit_site(site, lambda a: a * 2):
            Feed(model)(x)


def draw_maps(model: Fragile, x: Tensor) -> None:
    baseline = np.zeros(6, np.float32)
    for _ in activation_maps(model, found_sites(model, x), baseline=baseline, low=-1, high=1):
        pass


def attribute(model: Fragile, x: Tensor) -> None:
    for site in found_sites(model, x):
        pairs = np.array([0, 1])
        for _ in logit_effects(model, site, 3, lambda i: x[i], pairs, pairs):
            pass


PASSES: list[Callable[[Fragile, Tensor], None]] = [
    *(collect, stop_early, find, read, edit, draw_maps, attribute)
]


@pytest.mark.parametrize("work", PASSES)
def test_a_pass_leaves_no_trace(work: Callable[[Fragile, Tensor], None]) -> None:
    model, x = Fragile(), torch.randn(6, 6)
    before, kept = everything(model), x.clone()
    work(model, x)
    assert_equal(everything(model), before)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("work", PASSES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), KeyError("k")])
def test_nor_does_a_pass_that_fails(
    work: Callable[[Fragile, Tensor], None], error: BaseException
) -> None:
    model, x = Fragile(), torch.randn(6, 6)
    model.error = error
    before = everything(model)
    with pytest.raises((type(error), InputError)):
        work(model, x)
    assert_equal(everything(model), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nor_does_an_interruption_from_within_a_hook(error: type[BaseException]) -> None:
    model, x = Fragile(), torch.randn(6, 6)
    sites = found_sites(model, x)
    before = everything(model)

    def fail(*_: Any) -> None:
        raise error

    for site in sites:
        with pytest.raises((error, InputError)), evaluating(model), read_sites(model, [site], fail):
            model(x)
        assert_equal(everything(model), before)
        with pytest.raises((error, InputError)), evaluating(model), edit_site(site, fail):
            model(x)
        assert_equal(everything(model), before)
    with pytest.raises(error), read_sites(model, sites, fail):
        raise error
    assert_equal(everything(model), before)


def test_the_trace_would_be_seen() -> None:
    model = Fragile()
    before = everything(model)
    handle = model.body.out.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError):
        assert_equal(everything(model), before)
    handle.remove()
    torch.rand(1)
    with pytest.raises(AssertionError):
        assert_equal(everything(model), before)


def test_calls_from_other_threads_pass() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    sites = find_sites(model, "0")
    prove_sites(model, sites, Feed(model), torch.ones(1, 4))
    alone = model(torch.ones(4))
    given: list[Tensor] = []
    read: list[int] = []
    with (
        read_sites(
            model, sites, lambda site, reading, gather: read.append(len(reading.activations))
        ),
        edit_site(sites[0], torch.zeros_like),
        ThreadPoolExecutor(1) as other,
    ):
        # No batch at all: the reading would fail of it.
        given.append(other.submit(model, torch.ones(4)).result())
        assert not read
        assert not model(torch.ones(2, 4)).any()
    assert read == [2]
    assert torch.equal(given[0], alone)


def test_evaluating_gives_every_module_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model[1][0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == [True, True, True, False, True]


# --- feeding -----------------------------------------------------------------------------------


def test_arrays_become_what_the_model_takes() -> None:
    model = nn.Linear(3, 2).double()
    for inputs in (np.ones((4, 3), np.float32), np.ones((4, 3)), torch.ones(4, 3), [[1.0] * 3]):
        assert Feed(model)(inputs).dtype == torch.float64
    embedding = nn.Embedding(5, 2)
    assert Feed(embedding)(np.array([[1, 4]])).shape == (1, 2, 2)
    assert Feed(nn.Identity())(np.ones((1, 2))).dtype == torch.float32


def test_inputs_of_the_wrong_shape() -> None:
    with pytest.raises(
        InputError,
        match=r"^The model does not accept a batch of inputs of shape \(5,\): .+\. Its first "
        r"layer, 'body\.hidden', takes 6 values\. Reshape the data, or wrap the model in one",
    ):
        collect(Fragile(), torch.randn(4, 5))
    with pytest.raises(
        InputError, match=r"shape \(3, 7, 6\): .* Its first layer, '0', takes images of 2 channels"
    ):
        Feed(convolutional())(torch.randn(4, 3, 7, 6))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_named(bad: float) -> None:
    model = Fragile()
    collector = Collector(model, find_sites(model, "*"), TopK(2))
    good, x = torch.randn(7, 6), torch.randn(5, 6)
    x[3, 1] = bad
    passing = collector.run([Batch(good, good.numpy()), Batch(x, x.numpy())])
    assert next(passing) == 7
    with pytest.raises(
        InputError,
        match=rf"^Input 10 of the data holds {bad} at \[1\]; expected finite float32 values\. "
        "Leave that input out or repair it",
    ):
        next(passing)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = WithSAE(SAE(5, 8), amid=True)
    with torch.no_grad():
        model.sae.encoder.bias[2] = bad
    x = torch.randn(4, 6)
    collector = Collector(model, find_sites(model, "sae"), TopK(2))
    with pytest.raises(
        InputError,
        match=r"^Input 0 gives NaN or infinite activations at site 'sae'; expected finite ones\. "
        r"Check the data and the model's weights\.$",
    ):
        list(collector.run([Batch(x, x.numpy())]))


def test_a_layer_whose_first_axis_is_not_the_batch() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1))

    model, x = Turned(), torch.randn(3, 4, 6)
    collector = Collector(model, find_sites(model, "layer"), TopK(2))
    with pytest.raises(
        InputError,
        match=r"^Site 'layer' returned 4 rows for 2 inputs, and 4 for 3; the first axis must be "
        r"the batch: its batch is on axis 1: give the model batch_first=True",
    ):
        list(collector.run([Batch(x, x.numpy())]))


# --- reaching a site ---------------------------------------------------------------------------


class Route(nn.Module):
    def __init__(self, route: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.sae = SAE(6, 8)
        self.other = ParameterSAE(6, 8)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        return self.route(self, x)


@pytest.mark.parametrize(
    ("route", "site", "times"),
    [
        (lambda m, x: m.layer(x), "layer", 1),
        (lambda m, x: x, "layer", 0),
        (lambda m, x: m.layer(m.layer(x)), "layer", 2),
        (lambda m, x: m.sae(x), "sae", 1),
        (lambda m, x: x, "sae", 0),
        (lambda m, x: m.sae(m.sae(x)), "sae", 2),
        # Past the SAE, and with no decoder: a linear layer.
        (lambda m, x: F.relu(m.sae.encoder(x)), "sae", 1),
        (lambda m, x: m.other(x), "other", 1),
        (lambda m, x: m.other.encode(x), "other", 0),
        (lambda m, x: m.other(m.other(x)), "other", 2),
    ],
)
def test_a_site_must_be_reached_once(route: Any, site: str, times: int) -> None:
    model = Route(route)
    sites = find_sites(model, site)
    if times == 1:
        prove_sites(model, sites, Feed(model), torch.randn(2, 6))
        return
    with pytest.raises(
        SiteError,
        match=rf"^The model runs site '{site}' {times} times for one input; expected once: "
        + ("name a layer that the model uses" if times == 0 else "wrap the model so that one call"),
    ):
        prove_sites(model, sites, Feed(model), torch.randn(2, 6))


def test_an_encoder_whose_decoder_is_not_called_is_a_linear_layer() -> None:
    sae = SAE(5, 8)
    sae.forward = lambda x: sae.encoder(x)  # type: ignore[method-assign]
    model, x = WithSAE(sae, amid=False), torch.randn(4, 6)
    (site,) = find_sites(model, "sae")
    found: list[Tensor] = []
    with torch.no_grad():
        prove_sites(model, [site], Feed(model), x)
        with read_sites(model, [site], lambda s, reading, g: found.append(reading.activations)):
            model(x)
        assert torch.equal(found[0], sae.encoder(F.relu(model.hidden(x))))
    assert site.kind == "linear"


# --- editing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("layer", "reader"), [("0", "3"), ("4", "6"), ("7", "10"), ("10", None)])
def test_an_edit_reaches_what_follows(inplace: bool, layer: str, reader: str | None) -> None:
    model = convolutional(inplace=inplace).eval()
    sites = find_sites(model, layer)
    x = torch.randn(4, 2, 7, 6)
    with torch.no_grad():
        prove_sites(model, sites, Feed(model), x)
        seen: list[Tensor] = []

        def halve(activations: Tensor) -> Tensor:
            seen.append(activations.clone())
            return activations / 2 + 1

        at = int(reader) if reader else len(model)
        activations = model[:at](x) if layer == "10" else model[: int(reader or 0)](x)
        with edit_site(sites[0], halve):
            edited = model(x)
        expected = model[at:](activations / 2 + 1)
        assert torch.equal(seen[0], activations)
        torch.testing.assert_close(edited, expected)
        # Looking without editing changes nothing.
        with edit_site(sites[0], lambda a: None):
            assert torch.equal(model(x), model[at:](activations))


def test_an_edit_reaches_a_model_that_goes_on_with_the_tensor_it_handed_in() -> None:
    def route(m: Any, x: Tensor) -> Tensor:
        y = m.layer(x)
        y.relu_()
        return y + 0

    model, x = Route(route), torch.randn(4, 6)
    sites = find_sites(model, "layer")
    with torch.no_grad():
        prove_sites(model, sites, Feed(model), x)
        with edit_site(sites[0], lambda a: a + 5):
            found = model(x)
        assert torch.equal(found, model(x) + 5)


def test_an_edit_of_an_sae_reaches_its_decoder() -> None:
    model = WithSAE(SAE(5, 8), amid=True)
    sites = find_sites(model, "sae")
    x = torch.randn(4, 6)
    with torch.no_grad():
        prove_sites(model, sites, Feed(model), x)
        with edit_site(sites[0], torch.zeros_like):
            found = model(x)
        torch.testing.assert_close(found[0], model.out(model.sae.decoder.bias))


def test_an_sae_without_a_decoder_module_cannot_be_edited() -> None:
    (site,) = find_sites(ParameterSAE(5, 8), "W_enc")
    with (
        pytest.raises(SiteError, match="The SAE 'W_enc' has no decoder module"),
        edit_site(site, torch.zeros_like),
    ):
        pass


class Counting(nn.Module):
    """Three layers; remembers which of them ran."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.ran: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            self.ran.append(number)
            x = torch.relu(layer(x))
        return x


def test_a_pass_ends_at_the_last_site_that_is_read() -> None:
    model, x = Counting(), torch.randn(64, 6)
    sites = find_sites(model, ["layers.0", "layers.1"])
    with stopping_after(sites):  # also before they are proved
        Feed(model)(x)
    assert model.ran == [0, 1]
    prove_sites(model, sites, Feed(model), x)
    plain, stopped = {}, {}
    for values, until in ((plain, nullcontext()), (stopped, stopping_after(sites))):
        model.ran.clear()
        reading = read_sites(model, sites, lambda s, r, _, v=values: v.update({s.name: r}))
        with torch.no_grad(), evaluating(model), reading, until:
            Feed(model)(x)
    assert model.ran == [0, 1]
    assert plain.keys() == stopped.keys() == {"layers.0", "layers.1"}
    for name, reading in plain.items():
        assert torch.equal(reading.activations, stopped[name].activations)
    model.ran.clear()
    collector = Collector(model, sites, TopK(2))
    for _ in collector.run([Batch(x, x.numpy())] * 2):
        pass
    # The proof runs the whole model, twice, on the first batch.
    assert model.ran.count(2) == 2
    assert model.ran.count(1) == 4


def test_a_site_that_some_batch_does_not_run_is_named() -> None:
    class Sometimes(Counting):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(self.ran) < 9 else torch.relu(self.layers[0](x))

    model, x = Sometimes(), torch.randn(4, 6)
    collector = Collector(model, find_sites(model, ["layers.0", "layers.2"]), TopK(2))
    message = r"did not run site 'layers\.2' on inputs 4 to 7; expected a layer that runs on all"
    with pytest.raises(SiteError, match=message):
        for _ in collector.run([Batch(x, x.numpy())] * 2):
            pass
