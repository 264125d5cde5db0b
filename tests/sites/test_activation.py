"""The nonlinearity behind a layer: what is found is what the model does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.sites import Feed, Site, edit_site, find_sites, prove_sites

from .models import Functional, convolutional

KINDS: dict[str, tuple[Callable[[], object], str]] = {
    "relu": (lambda: F.relu, "relu"),
    "torch.relu": (lambda: torch.relu, "relu"),
    "method": (lambda: lambda x: x.relu(), "relu"),
    "method in place": (lambda: lambda x: x.relu_(), "relu"),
    "by keyword": (lambda: lambda x: F.relu(input=x), "relu"),
    "ReLU": (nn.ReLU, "relu"),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), "relu"),
    "ReLU6": (nn.ReLU6, "hardtanh"),
    "gelu": (lambda: F.gelu, "gelu"),
    "GELU, tanh": (lambda: nn.GELU("tanh"), "gelu"),
    "silu": (lambda: F.silu, "silu"),
    "SiLU in place": (lambda: nn.SiLU(inplace=True), "silu"),
    "tanh": (lambda: torch.tanh, "tanh"),
    "Tanh": (nn.Tanh, "tanh"),
    "sigmoid": (lambda: torch.sigmoid, "sigmoid"),
    "Sigmoid": (nn.Sigmoid, "sigmoid"),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.3), "leaky_relu"),
    "LeakyReLU in place": (lambda: nn.LeakyReLU(0.3, inplace=True), "leaky_relu"),
    "Hardtanh": (lambda: nn.Hardtanh(-0.4, 0.6), "hardtanh"),
    "Hardtanh in place": (lambda: nn.Hardtanh(-0.4, 0.6, inplace=True), "hardtanh"),
    "PReLU": (lambda: nn.PReLU(6, init=0.2), "prelu"),
    "Softplus": (lambda: nn.Softplus(beta=2), "softplus"),
    "LogSigmoid": (nn.LogSigmoid, "log_sigmoid"),
    "Threshold": (lambda: nn.Threshold(0.1, -3.0), "threshold"),
    "Threshold in place": (lambda: nn.Threshold(0.1, -3.0, inplace=True), "threshold"),
    "Softshrink": (nn.Softshrink, "softshrink"),
    "ELU": (nn.ELU, "elu"),
    "Mish": (nn.Mish, "mish"),
    "clamp": (lambda: lambda x: x.clamp(min=0), "clamp"),
    "clamp in place": (lambda: lambda x: x.clamp_(min=0, max=0.5), "clamp"),
    "clamp_min": (lambda: lambda x: torch.clamp_min(x, 0.1), "clamp_min"),
    "none": (nn.Identity, "the layer's output, before linear"),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), "batch_norm, relu"),
    "dropout": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.4)), "relu, dropout"),
    "dropout in place": (
        lambda: nn.Sequential(nn.Dropout(0.4, inplace=True), nn.ReLU(inplace=True)),
        "dropout, relu",
    ),
    "alpha dropout": (lambda: nn.Sequential(nn.AlphaDropout(), nn.SELU()), "alpha_dropout, selu"),
    "two": (lambda: nn.Sequential(nn.Tanh(), nn.ReLU(inplace=True)), "tanh, relu"),
}


def capture(module: nn.Module, *, output: bool = False) -> list[Tensor]:
    """Copies of what a layer is handed, or of what it gives."""
    seen: list[Tensor] = []
    if output:
        module.register_forward_hook(lambda m, a, out: seen.append(out.detach().clone()))
    else:
        module.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
    return seen


def found(model: nn.Module, x: Tensor, name: str) -> Site:
    model.eval()
    (site,) = find_sites(model, name)
    with torch.no_grad():
        prove_sites(model, [site], Feed(model), x)
    return site


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_found_gives_what_the_next_layer_reads(kind: str) -> None:
    make, name = KINDS[kind]
    model = Functional(make())
    if kind == "batch norm":
        with torch.no_grad():
            model(3 * torch.randn(50, 7) + 1)
    site = found(model, torch.randn(2, 7), "first")
    assert site.activation.name == name
    # With other data than it was found with.
    before, after = capture(model.first, output=True), capture(model.second)
    with torch.no_grad():
        model(3 * torch.randn(20, 7))
        output = before[0].clone()
        assert torch.equal(site.activation(output), after[0])
    # What it is given stays as it is, whatever works in place.
    assert torch.equal(output, before[0])
    if kind != "none":
        assert not torch.equal(output, after[0])


def test_batch_norms_in_a_convolutional_net() -> None:
    model = convolutional(inplace=True)
    for layer, reader in (("0", "3"), ("4", "6"), ("7", "10")):
        site = found(model, torch.randn(2, 2, 7, 6), layer)
        before = capture(model.get_submodule(layer), output=True)
        after = capture(model.get_submodule(reader))
        with torch.no_grad():
            model(torch.randn(5, 2, 7, 6))
            assert torch.equal(site.activation(before[0]), after[0])


class Residual(nn.Module):
    def __init__(self, order: str) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 3)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.order == "relu, then add":
            return self.second(F.tanh(x + F.relu(y)))
        if self.order == "add, then relu":
            return self.second(F.relu(x + y))
        return self.second(y * F.relu(x))


@pytest.mark.parametrize(
    ("order", "name"),
    [
        ("relu, then add", "relu, before add"),
        ("add, then relu", "the layer's output, before add"),
        ("product", "the layer's output, before mul"),
    ],
)
def test_a_chain_ends_where_other_tensors_come_in(order: str, name: str) -> None:
    assert found(Residual(order), torch.randn(2, 6), "first").activation.name == name


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "two branches": lambda y: torch.relu(y) + torch.tanh(y),
    "SiLU spelled out": lambda y: y * torch.sigmoid(y),
    "quick GELU": lambda y: torch.sigmoid(1.702 * y) * y,
    "GELU spelled out": lambda y: 0.5 * y * (1 + torch.tanh(y + y**3)),
    "a product of two": lambda y: torch.tanh(torch.relu(y)) * torch.relu(y + 1),
    "squared ReLU": lambda y: torch.relu(y) ** 2,
    "a residual behind": lambda y: torch.tanh(torch.relu(y)) + torch.relu(y),
    "a bias of its own": lambda y: torch.relu(y + torch.arange(6.0)),
    "shifted ReLU": lambda y: torch.relu(y + 0.5),
    "ReLU of the opposite": lambda y: torch.relu(-y),
    "sine": torch.sin,
    "a mask": lambda y: y * (y > 0),
    "where": lambda y: torch.where(y > 0.2, y, torch.zeros_like(y)),
    "maximum": lambda y: torch.maximum(y, torch.zeros_like(y)),
    "in place, twice": lambda y: F.relu(y).mul_(2).add_(1),
    "in place, halved": lambda y: torch.tanh(y.div_(2)),
    "one neuron set": lambda y: F.relu(_set(y)),
    "neurons masked": lambda y: F.relu(y.masked_fill_(torch.arange(6) < 3, 0.0)),
    "by a view": lambda y: F.relu_(y.view(len(y), -1)),
    "reshaped": lambda y: F.relu(y.reshape(-1, 6)),
    "an axis more": lambda y: F.relu(y.unsqueeze(1)).squeeze(1),
    "in double": lambda y: F.relu(y.double()).float(),
    "in halves": lambda y: torch.cat([part.relu() for part in y.chunk(2, dim=-1)], dim=-1),
    "looked at": lambda y: torch.relu(y) * y.shape[1] if y.detach().numel() else y,
}


def _set(y: Tensor) -> Tensor:
    y[:, 3] = 5.0
    return y


@pytest.mark.parametrize("kind", FOLLOWED)
def test_elementwise_operations_are_followed(kind: str) -> None:
    model = Functional(FOLLOWED[kind])
    site = found(model, torch.randn(2, 7), "first")
    after = capture(model.second)
    x = 3 * torch.randn(20, 7)
    with torch.no_grad():
        model(x)
        assert torch.equal(site.activation(model.first(x)), after[0])
    assert "before" not in site.activation.name


ENDED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "layer norm": (
        lambda y: F.relu(F.layer_norm(y, (6,))),
        "the layer's output, before layer_norm",
    ),
    "softmax": (lambda y: y.softmax(-1), "the layer's output, before softmax"),
    "a limit of the data's": (
        lambda y: torch.clamp(y, min=y.mean()),
        "the layer's output, before mean and clamp",
    ),
    "a limit of the data's, as a number": (
        lambda y: torch.clamp(torch.relu(y), max=float(y.sum())),
        "the layer's output, before relu and sum",
    ),
    "a gate of two halves": (
        lambda y: torch.cat([y[:, :3] * torch.sigmoid(y[:, 3:])] * 2, dim=-1),
        "the layer's output, before sigmoid and mul",
    ),
    "dropout that is always on": (lambda y: F.dropout(F.relu(y), 0.5), "relu, before dropout"),
    "a vector taken off": (lambda y: F.relu(y) - torch.arange(6.0), "relu, before sub"),
    "a vector taken off the output": (
        lambda y: y - torch.arange(6.0),
        "the layer's output, before sub",
    ),
    "less its mean, in place": (
        lambda y: F.relu(y.sub_(y.mean(1, keepdim=True))),
        "the layer's output, before mean and sub",
    ),
}


@pytest.mark.parametrize("kind", ENDED)
def test_where_following_ends_is_said(kind: str) -> None:
    function, name = ENDED[kind]
    site = found(Functional(function), torch.randn(2, 7), "first")
    assert site.activation.name == name
    output = torch.randn(9, 6)
    expected = F.relu(output) if name.startswith("relu") else output
    assert torch.equal(site.activation(output), expected)


@pytest.mark.parametrize("kind", FOLLOWED)
def test_edited_activations_are_what_the_model_goes_on_with(kind: str) -> None:
    model = Functional(FOLLOWED[kind])
    x = torch.randn(5, 7)
    site = found(model, x, "first")
    after = capture(model.second)
    given = torch.randn(5, 6)
    with torch.no_grad(), edit_site(site, lambda activations: given.to(activations.dtype)):
        model(x)
    torch.testing.assert_close(after[-1], given)


def test_sites_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh())
    sites = find_sites(model, "*")
    prove_sites(model, sites, Feed(model), torch.randn(2, 3))
    assert [site.activation.name for site in sites] == ["relu", "tanh"]


def test_drive_is_what_enters_the_nonlinearity() -> None:
    norm = nn.BatchNorm1d(6)
    model = Functional(nn.Sequential(norm, nn.Dropout(0.5), nn.ReLU(), nn.Tanh()))
    with torch.no_grad():
        model(3 * torch.randn(50, 7) + 1)
    site = found(model, torch.randn(2, 7), "first")
    output = torch.randn(9, 6)
    with torch.no_grad():
        assert torch.equal(site.activation.drive(output), norm(output))
        assert torch.equal(
            site.activation(output), torch.tanh(torch.relu(site.activation.drive(output)))
        )
    for kind, expected in ((nn.ReLU(inplace=True), output), (nn.Identity(), output)):
        plain = found(Functional(kind), torch.randn(2, 7), "first")
        assert torch.equal(plain.activation.drive(output), expected)
    affine = found(Functional(norm), torch.randn(2, 7), "first")
    with torch.no_grad():
        assert torch.equal(affine.activation.drive(output), norm(output))
