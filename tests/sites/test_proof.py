"""Sites prove themselves: right values for layers of every making, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.capture import Batch, Collector, TopK
from polyseme.errors import SiteError
from polyseme.sites import Feed, evaluating, find_sites, list_sites, prove_sites
from polyseme.sites.proof import sites_that_run

from .models import SAE
from .test_sites import read


def after(layer: nn.Module) -> nn.Sequential:
    """A model that reads a layer's output through a ReLU."""
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


def proved(model: nn.Module, name: str, x: Tensor) -> Any:
    with torch.no_grad():
        model.eval()(x[:2])
        (site,) = find_sites(model, name)
        prove_sites(model, [site], Feed(model), x)
    return site


# --- layers that are not what their class says ---------------------------------------------------


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.arange(self.weight.numel()).view_as(self.weight) % 3 > 0).float()
        return F.linear(x, self.weight * mask, self.bias)


class Adapted(nn.Module):
    """A linear layer with a low-rank addition, as adapters have it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(7, 6)
        self.lora_A = nn.Linear(7, 2, bias=False)
        self.lora_B = nn.Linear(2, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("make", [lambda: Masked(7, 6), Adapted], ids=["masked", "adapted"])
def test_linear_layers_are_read_by_the_weights_that_they_have(
    make: Callable[[], nn.Module],
) -> None:
    layer = make()
    model, x = after(layer), torch.randn(20, 7)
    site = proved(model, "0", x)
    jacobian = torch.autograd.functional.jacobian(layer, x[0])
    torch.testing.assert_close(site.weights(), jacobian)
    _, reading, vectors = read(model, "0", x)
    with torch.no_grad():
        assert torch.equal(reading.activations, F.relu(layer(x)))
    assert torch.equal(vectors, x[:, None].expand(-1, 6, -1))


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = (f(self.weight, (1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        w = (self.weight - mean) / std
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": (2, 1), "padding": (1, 2)}, {"groups": 2, "dilation": 2}],
)
def test_convolutions_are_read_by_the_weights_that_they_have(options: dict[str, Any]) -> None:
    layer = Standardised(4, 6, 3, **options)
    x = torch.randn(5, 4, 9, 8) + 1
    site = proved(after(layer), "0", x)
    weight = layer.weight.detach()
    mean, std = (f(weight, (1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    torch.testing.assert_close(site.weights(), ((weight - mean) / std).flatten(1))


class Padding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


class Normalising(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, x.shape[-1:]), self.weight, self.bias)


class Rounding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x * 4).round() / 4, self.weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Padding(3, 6, 3, padding=1), (8, 3, 9, 9)),
        (Normalising(7, 6), (20, 7)),
        (Rounding(7, 6), (20, 7)),
    ],
    ids=["own padding", "own norm", "own rounding"],
)
def test_layers_that_change_what_they_read_are_refused(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    with pytest.raises(
        SiteError,
        match=r"Site '0' cannot be read: its output is not its weights times its input plus a "
        rf"constant \(off by .*%\), as its {type(layer).__name__} or a hook changes the input",
    ):
        proved(after(layer), "0", torch.randn(shape) * 3 + 2)


def test_a_hook_that_changes_the_output_is_noticed() -> None:
    model = after(nn.Linear(7, 6))
    model[0].register_forward_hook(lambda m, args, out: out * args[0].norm(dim=1, keepdim=True))
    with pytest.raises(SiteError, match=r"Site '0' cannot be read: its output is not"):
        proved(model, "0", torch.randn(20, 7))


def test_an_adapted_layers_inside_is_not_read_by_itself() -> None:
    model = after(Adapted())
    assert [site.name for site in list_sites(model)] == ["0", "3"]
    with pytest.raises(
        SiteError, match=r"'0' wraps '0\.base_layer' and adds to its output; name '0' instead, or"
    ):
        find_sites(model, "0.base_layer")


# --- encoders and decoders -----------------------------------------------------------------------


class Inside(nn.Module):
    """An encoder and a decoder inside a larger model, with something before and between."""

    def __init__(self, between: nn.Module, d_in: int = 5) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_in, 5)
        self.encoder = nn.Linear(5, 9)
        self.between = between
        self.decoder = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.between(self.encoder(F.relu(self.hidden(x)))))


@pytest.mark.parametrize("d_in", [5, 7], ids=["as wide", "wider"])
@pytest.mark.parametrize(
    ("between", "kind"),
    [
        (nn.ReLU(), "sae"),
        (nn.Sequential(nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout()), "sae"),
        (nn.Sequential(nn.ReLU(), nn.Linear(9, 9), nn.ReLU()), "linear"),
        (nn.Sequential(nn.LayerNorm(9), nn.ReLU()), "linear"),
    ],
    ids=["ReLU", "BatchNorm", "a layer between", "LayerNorm"],
)
def test_an_encoder_reads_what_it_is_called_with(between: nn.Module, kind: str, d_in: int) -> None:
    model, x = Inside(between, d_in), torch.randn(20, d_in)
    assert [site.name for site in list_sites(model)][:2] == ["hidden", "encoder"]
    site, reading, vectors = read(model, "encoder", x)
    assert site.kind == kind
    with torch.no_grad():
        h = F.relu(model.hidden(x))
        latents = model.encoder(h)
        expected = {
            "sae": lambda: between(latents),
            "linear": lambda: latents if "LayerNorm" in str(between) else F.relu(latents),
        }[kind]()
    assert torch.equal(vectors, h[:, None].expand(-1, 9, -1))
    assert torch.equal(reading.activations, expected)


class Norm(SAE):
    def __init__(self) -> None:
        super().__init__(5, 9)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(F.relu(self.encoder(self.norm(x))))


def test_an_saes_own_norm_counts_as_what_it_is() -> None:
    model, x = Norm(), 3 * torch.randn(20, 5) + 2
    site, _, vectors = read(model, "encoder", x)
    assert site.kind == "sae"
    torch.testing.assert_close(vectors[:, 0], model.norm(x).detach())


class Past(nn.Module):
    """An SAE whose parts are called past it, with the decoder's bias taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(7, 5)
        self.sae = SAE(5, 9)
        nn.init.normal_(self.sae.decoder.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.hidden(x))
        return self.sae.decoder(F.relu(self.sae.encoder(h - self.sae.decoder.bias)))


def test_the_decoders_bias_is_not_taken_off_where_an_sae_is_called_past() -> None:
    model, x = Past(), torch.randn(20, 7)
    _, reading, vectors = read(model, "sae", x)
    with torch.no_grad():
        h = F.relu(model.hidden(x))
        expected = F.relu(model.sae.encoder(h - model.sae.decoder.bias))
    torch.testing.assert_close(vectors[:, 0], h)
    assert torch.equal(reading.activations, expected)


class Encoding(nn.Module):
    """An SAE of parameters whose encode does as told."""

    def __init__(self, encode: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(5, 9))
        self.b_dec = nn.Parameter(torch.randn(5))
        self._encode = encode

    def encode(self, x: Tensor) -> Tensor:
        return self._encode(self, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def _normalised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


@pytest.mark.parametrize(
    ("encode", "read_as"),
    [
        (lambda s, x: F.relu(x @ s.W_enc), lambda x: x),
        (lambda s, x: F.relu(F.linear(x - s.b_dec, s.W_enc.T)), lambda x: x),
        (lambda s, x: F.relu(_normalised(x) @ s.W_enc), _normalised),
        (lambda s, x: F.relu((_normalised(x) - s.b_dec) @ s.W_enc), _normalised),
        # A gate beside the magnitude: both along the same weights.
        (lambda s, x: (x @ s.W_enc > 0) * F.relu(x @ (2 * s.W_enc) + 1), lambda x: x),
    ],
    ids=["plain", "less its bias", "normalised", "normalised, less its bias", "gated"],
)
def test_an_sae_of_parameters_reads_what_its_weights_multiply(
    encode: Callable[[Any, Tensor], Tensor], read_as: Callable[[Tensor], Tensor]
) -> None:
    sae, x = Encoding(encode), 2 * torch.randn(20, 5) + 1
    _, reading, vectors = read(sae, "W_enc", x)
    torch.testing.assert_close(vectors[:, 0], read_as(x))
    torch.testing.assert_close(reading.activations, sae(x).detach())


def test_an_encode_that_mixes_its_latents_is_refused() -> None:
    sae = Encoding(lambda s, x: F.relu((x @ s.W_enc).cumsum(-1)))
    with pytest.raises(
        SiteError, match=r"SAE 'W_enc' cannot be read: its latents are not elementwise"
    ):
        read(sae, "W_enc", torch.randn(20, 5))


# --- the batch, and how often a layer is called --------------------------------------------------


class Sequences(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc, self.out, self.how = nn.Linear(6, 8), nn.Linear(8, 2), how

    def forward(self, x: Tensor) -> Tensor:
        n, length, d = x.shape
        changed = {
            "positions first": lambda: x.transpose(0, 1),
            "in one row": lambda: x.reshape(n * length, d),
            "half of the batch": lambda: x[: n // 2],
            "of the others": lambda: x - x.mean(0, keepdim=True),
        }[self.how]()
        return self.out(F.relu(self.fc(changed))).mean()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "positions first",
            r"returned 4 rows for 2 inputs, and 4 for 3; .* batch is on axis 1: gi",
        ),
        (
            "in one row",
            r"returned 8 rows for 2 inputs, and 12 for 3; the first axis must be the b",
        ),
        ("half of the batch", r"returned 1 rows for 2 inputs, and 1 for 3; .* splits, joins or"),
        ("of the others", r"gives different values for one input in batches of 2 and 3 \(off"),
    ],
)
@pytest.mark.parametrize("n", [4, 30], ids=["as many as positions", "more"])
def test_an_axis_is_taken_for_the_batch_only_if_it_is_one(how: str, message: str, n: int) -> None:
    with pytest.raises(SiteError, match=rf"Site 'fc' {message}"):
        proved(Sequences(how), "fc", torch.randn(n, 4, 6))


class Turning(nn.Module):
    """Another nonlinearity for large inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.out(torch.tanh(y) if float(x.detach().max()) > 100 else torch.relu(y))


def test_a_function_that_changes_with_the_data_is_noticed_later() -> None:
    model = Turning().eval()
    x = torch.randn(40, 6)
    x[32] = 200
    collector = Collector(model, find_sites(model, "fc"), TopK(5))
    parts = [x[at : at + 4].numpy() for at in range(0, 40, 4)]
    with pytest.raises(
        SiteError,
        match=r"output of site 'fc' changes with the input: .* after relu\. Expected",
    ):
        list(collector.run([Batch(part, part) for part in parts]))


def test_one_input_is_enough() -> None:
    model, x = after(nn.Linear(7, 6)), torch.randn(1, 7)
    assert proved(model, "0", x).activation.name == "relu"


def test_a_compiled_model_is_read_like_the_original() -> None:
    inner = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    model = torch.compile(inner, backend="eager")
    x = torch.randn(20, 7)
    model(x)
    site, reading, _ = read(model, "_orig_mod.0", x)
    assert site.activation.name == "relu"
    assert torch.equal(reading.activations, F.relu(inner[0](x)).detach())


# --- names ---------------------------------------------------------------------------------------


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.same = self.used

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.used(x)))


def test_a_glob_leaves_out_what_the_model_does_not_run() -> None:
    model, x = Idle().eval(), torch.randn(3, 6)
    with pytest.warns(UserWarning, match=r"does not run these layers, so they are left out: idle"):
        kept = sites_that_run(model, find_sites(model, "*"), x)
    assert [site.name for site in kept] == ["used", "out"]
    with pytest.raises(SiteError, match=r"The model runs none of the named sites \(idle"):
        sites_that_run(model, find_sites(model, "idl*"), x)
    # One that is named is asked for.
    named = find_sites(model, ["idle", "used"])
    assert sites_that_run(model, named, x) == named
    with pytest.raises(SiteError, match=r"The model runs site 'idle' 0 times for one input"):
        prove_sites(model, named, Feed(model), x)


def test_sites_are_excluded_by_name_and_by_glob() -> None:
    model = Idle()
    assert [s.name for s in find_sites(model, "*", exclude="idle")] == ["used", "out"]
    assert [s.name for s in find_sites(model, "*", exclude=["u*", "out"])] == ["idle"]
    with pytest.raises(SiteError, match=r"exclude holds 'x', which matches none of the named"):
        find_sites(model, "*", exclude="x")
    with pytest.raises(SiteError, match=r"exclude is '\*', which leaves no site"):
        find_sites(model, "*", exclude="*")


def test_a_second_name_of_a_layer_is_told() -> None:
    with pytest.raises(SiteError, match=r"'same' is site 'used' by another name; give that one"):
        find_sites(Idle(), "same")


def test_layers_without_weights_are_refused() -> None:
    with pytest.raises(SiteError, match=r"'0' is a LazyLinear that has no weights before its"):
        find_sites(nn.Sequential(nn.LazyLinear(3)), "0")
    with pytest.raises(SiteError, match=r"weights of site '0' are on the meta device"):
        find_sites(nn.Sequential(nn.Linear(3, 3, device="meta")), "0")


def test_a_layer_that_returns_more_than_a_tensor_is_refused() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Two(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)[0]

    with pytest.raises(SiteError, match=r"Site 'fc' returns a tuple; expected one floating"):
        proved(Model(), "fc", torch.randn(5, 6))


class Residual(nn.Module):
    """Adds what it is given to its own output, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        y += x
        return torch.relu_(y)


def test_following_a_layer_leaves_what_the_model_computes_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), *(Residual() for _ in range(3)), nn.Linear(6, 2)).eval()
    x = torch.randn(8, 4)
    sites = find_sites(model, "*")
    with evaluating(model):
        prove_sites(model, sites, Feed(model), x)
    assert all(site.proved for site in sites)
