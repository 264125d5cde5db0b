"""Sites: which layers they are, and that what is read of them is what the model computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.errors import SiteError
from polyseme.sites import Feed, Reading, Site, find_sites, list_sites, prove_sites, read_sites
from polyseme.sites.find import SAESite
from reference import oracles

from .models import SAE, Conv1D, Functional, ParameterSAE, WithSAE, convolutional

Read = tuple[Reading, Tensor]


def read(model: nn.Module, name: str | Site, x: Tensor) -> tuple[Site, Reading, Tensor]:
    """A site, its reading, and the vector that each neuron read: (B, n_neurons, d_in)."""
    model.eval()
    (site,) = find_sites(model, name)
    feed = Feed(model)
    found: list[Read] = []

    def on_reading(site: Site, reading: Reading, gather: Any) -> None:
        n, m = reading.activations.shape
        rows, neurons = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        places = site.place(reading.positions[rows, neurons], neurons)
        vectors = gather(rows, places).reshape(n, m, -1).clone()
        copied = Reading(reading.activations.clone(), reading.everywhere.clone())
        found.append((copied, vectors))

    with torch.no_grad():
        prove_sites(model, [site], feed, x[:1])
        with read_sites(model, [site], on_reading):
            feed(x)
    ((reading, vectors),) = found
    assert vectors.shape[2] == site.d_in
    return site, reading, vectors


def assert_recomputed(
    site: Site, reading: Reading, vectors: Tensor, bias: Tensor, f: Any = F.relu
) -> None:
    """The key property: a = f(w·h + b) from the gathered h is the activation on record."""
    with torch.no_grad():
        a = f(torch.einsum("bnd,nd->bn", vectors, site.weights()) + bias)
    torch.testing.assert_close(a, reading.activations, rtol=1e-4, atol=1e-5)
    assert (reading.activations > 0).any()


def test_linear() -> None:
    model = Functional(F.gelu)
    x = torch.randn(30, 7)
    site, reading, vectors = read(model, "first", x)
    assert (site.kind, site.n_neurons, site.d_in) == ("linear", 6, 7)
    assert torch.equal(vectors, x[:, None].expand(-1, 6, -1))
    assert_recomputed(site, reading, vectors, model.first.bias, F.gelu)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(7, 6), lambda: Conv1D(6, 7)])
def test_sequences_are_read_where_the_neuron_fires_most(layer: Any) -> None:
    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(8, 5, 7)
    site, reading, vectors = read(model, "0", x)
    assert (site.kind, site.n_neurons, site.d_in) == ("linear", 6, 7)
    with torch.no_grad():
        every = F.relu(model[0](x))
    for b in range(8):
        for j in range(6):
            strongest = int(every[b, :, j].argmax())
            assert reading.positions[b, j] == strongest
            assert reading.activations[b, j] == every[b, strongest, j]
            assert torch.equal(vectors[b, j], x[b, strongest])
    bias = model[0].bias
    assert isinstance(bias, Tensor)
    assert_recomputed(site, reading, vectors, bias)


def test_conv1d_has_a_row_of_weights_for_each_neuron() -> None:
    model = nn.Sequential(Conv1D(6, 7))
    (site,) = find_sites(model, "0")
    weight = model[0].weight
    assert isinstance(weight, Tensor)
    assert torch.equal(site.weights(), weight.detach().T)
    assert not site.weights().requires_grad


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding": (1, 2)},
    "stride": {"stride": (2, 3), "padding": 1},
    "dilation": {"dilation": (2, 1), "padding": (2, 0)},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out": 8, "padding": 1},
    "same": {"padding": "same"},
    "same, even": {"padding": "same", "kernel": (2, 4)},
    "same, dilated": {"padding": "same", "dilation": 2, "kernel": (2, 3)},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "same, reflect": {"padding": "same", "padding_mode": "reflect", "kernel": (4, 3)},
    "all": {
        **{"groups": 2, "stride": (2, 1), "dilation": (1, 2), "padding": (1, 3)},
        **{"padding_mode": "reflect", "kernel": (3, 2)},
    },
    "one pixel": {"kernel": (1, 1)},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind: str) -> None:
    options = {"kernel": (3, 2), "out": 6, **CONVOLUTIONS[kind]}
    kernel, out = options.pop("kernel"), options.pop("out")
    conv = nn.Conv2d(4, out, kernel, **options)
    model = nn.Sequential(conv, nn.ReLU())
    x = torch.randn(5, 4, 9, 8)
    site, reading, vectors = read(model, "0", x)
    assert (site.kind, site.n_neurons) == ("conv", out)
    assert_recomputed(site, reading, vectors, conv.bias)
    with torch.no_grad():
        strongest = F.relu(conv(x)).flatten(2)
    assert torch.equal(reading.activations, strongest.amax(dim=2))
    for b in range(5):
        for j in range(out):
            patch = oracles.conv_patch(
                x[b].numpy(),
                j,
                int(reading.positions[b, j]),
                out_channels=out,
                kernel=conv.kernel_size,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                groups=conv.groups,
                mode=conv.padding_mode,
            )
            np.testing.assert_allclose(vectors[b, j].numpy(), patch, rtol=1e-6)


def test_neurons_of_one_group_share_a_place() -> None:
    (site,) = find_sites(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), "0")
    neurons = torch.arange(6)
    found = site.place(torch.tensor([7, 7, 7, 7, 7, 3]), neurons)
    assert found.tolist() == [14, 14, 14, 15, 15, 7]


@pytest.mark.parametrize("amid", [True, False])
def test_an_sae_of_two_layers(amid: bool) -> None:
    sae = SAE(5, 9)
    nn.init.normal_(sae.decoder.bias)
    model = WithSAE(sae, amid=amid)
    x = torch.randn(20, 6)
    site, reading, vectors = read(model, "sae", x)
    assert (site.kind, site.n_neurons, site.d_in) == ("sae", 9, 5)
    # Its input vector is what it is called with: no decoder bias is taken off.
    with torch.no_grad():
        h = F.relu(model.hidden(x))
        bias = sae.encoder.bias - sae.encoder.weight @ sae.decoder.bias
    assert torch.equal(vectors, h[:, None].expand(-1, 9, -1))
    assert_recomputed(site, reading, vectors, bias)


def test_an_sae_of_parameters() -> None:
    sae = ParameterSAE(5, 9)
    model = WithSAE(sae, amid=True)
    x = torch.randn(20, 6)
    site, reading, vectors = read(model, "sae", x)
    assert (site.kind, site.n_neurons, site.d_in) == ("sae", 9, 5)
    with torch.no_grad():
        h = F.relu(model.hidden(x))
        bias = sae.b_enc - sae.b_dec @ sae.W_enc
    assert torch.equal(vectors, h[:, None].expand(-1, 9, -1))
    assert_recomputed(site, reading, vectors, bias)


@pytest.mark.parametrize(("make", "name"), [(SAE, "encoder"), (ParameterSAE, "W_enc")])
def test_a_model_that_is_an_sae(make: Any, name: str) -> None:
    model = make(5, 9)
    assert [site.name for site in list_sites(model)] == [name]
    x = torch.randn(20, 5)
    site, reading, vectors = read(model, name, x)
    assert isinstance(site, SAESite)
    assert site.module is model
    assert torch.equal(vectors, x[:, None].expand(-1, 9, -1))
    with torch.no_grad():
        expected = (
            model.encode(x) if name == "W_enc" else F.relu(model.encoder(x - model.decoder.bias))
        )
    assert torch.equal(reading.activations, expected)


def test_an_saes_sequences() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sae = SAE(5, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.sae(x.tanh())

    model = Sequences()
    x = torch.randn(6, 4, 5)
    site, reading, vectors = read(model, "sae", x)
    sae = model.sae
    with torch.no_grad():
        bias = sae.encoder.bias - sae.encoder.weight @ sae.decoder.bias
    assert len(torch.unique(reading.positions)) == 4
    assert_recomputed(site, reading, vectors, bias)


def test_the_encoder_of_an_sae_stands_for_the_sae() -> None:
    model = WithSAE(SAE(5, 9), amid=True)
    assert [site.name for site in list_sites(model)] == ["hidden", "sae", "out"]
    (site,) = find_sites(model, "sae.encoder")
    assert isinstance(site, SAESite)
    assert site.module is model.sae


def test_encoders_and_decoders_that_make_no_sae() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 9)
            self.decoder = nn.Linear(4, 5)

    model = Other()
    assert [(site.name, site.kind) for site in list_sites(model)] == [
        ("encoder", "linear"),
        ("decoder", "linear"),
    ]


# --- names -------------------------------------------------------------------------------------


def names(model: nn.Module, wanted: Any) -> list[str]:
    return [site.name for site in find_sites(model, wanted)]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = convolutional()
        self.head = nn.ModuleDict({"first": nn.Linear(3, 4), "last": nn.Linear(4, 2)})


def test_names_and_globs() -> None:
    model = Named()
    everything = ["features.0", "features.4", "features.7", "features.10"]
    everything += ["head.first", "head.last"]
    assert names(model, "*") == everything
    assert names(model, "head.last") == ["head.last"]
    assert names(model, "head.*") == ["head.first", "head.last"]
    assert names(model, "features.?") == everything[:3]
    assert names(model, "features.[07]") == ["features.0", "features.7"]
    # Each once, and in the order of the model.
    assert names(model, ["head.last", "features.4", "head.*"]) == [
        *("features.4", "head.first", "head.last")
    ]
    (site,) = find_sites(model, "features.0")
    assert find_sites(model, site) == [site]
    assert names(model, [site, "head.first"]) == ["features.0", "head.first"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "head.frist",
            r"Unknown site: 'head\.frist'\. Did you mean 'head\.first'.* Must be one of: features",
        ),
        ("", "Unknown site: ''"),
        (
            "head",
            r"'head' is a ModuleDict, which has no neurons of its own\. Layers inside it are: "
            r"head\.first, head\.last\.",
        ),
        (
            "features.2",
            r"'features\.2' is a ReLU, which has no neurons of its own\. The model's sites are: "
            r"features\.0, features\.4",
        ),
        ("tail.*", r"No site matches 'tail\.\*'\. The model's sites are: features\.0"),
        (["head.first", "tail"], "Unknown site: 'tail'"),
        ([], r"sites is \[\], which names no site\. The model's sites are: features\.0"),
    ],
)
def test_names_that_the_model_does_not_have(wanted: Any, message: str) -> None:
    with pytest.raises(SiteError, match=f"^{message}"):
        find_sites(Named(), wanted)


def test_a_model_without_neurons() -> None:
    with pytest.raises(SiteError, match="The model has no layer that polyseme knows: Linear"):
        find_sites(nn.Sequential(nn.ReLU()), "*")


def test_a_long_list_of_sites_is_cut_short() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(30)))
    with pytest.raises(SiteError, match=r"0, 1, .*11, … \(30 in all\)"):
        find_sites(model, "x*")
    with pytest.raises(SiteError, match=r"11, … \(30 in all\)"):
        find_sites(model, "x")


def test_a_site_shows_what_it_is() -> None:
    (site,) = find_sites(nn.Sequential(nn.Linear(3, 4)), "0")
    assert repr(site) == "LinearSite('0', 4 neurons × 3)"


@pytest.mark.parametrize("sites", [0, [1], nn.Linear(2, 2), [None]])
def test_sites_are_named_by_text(sites: object) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(SiteError, match=r"sites holds a \w+ \(.*names of layers, as text"):
        find_sites(model, sites)  # type: ignore[arg-type]
