"""SAEs that others trained: state dicts, SAELens folders and releases, each read as a site."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyseme.capture import find_sites, list_sites
from polyseme.capture.sites import SAESite
from polyseme.errors import InputError, MissingDependencyError
from polyseme.sae import PlainSAE, check_width, load_sae, sae_shape, sae_tensors
from polyseme.sae.load import import_sae_lens

D_IN, D_SAE = 4, 7


@pytest.fixture
def sae_lens() -> Any:
    if importlib.util.find_spec("sae_lens") is None:
        print("sae-lens is not installed here")
        pytest.skip("sae-lens is not installed here")
    return import_sae_lens("this test")


def state(d_in: int = D_IN, d_sae: int = D_SAE, prefix: str = "") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    shapes |= {"decoder.weight": (d_in, d_sae), "decoder.bias": (d_in,)}
    return {prefix + n: torch.randn(*s, generator=generator) for n, s in shapes.items()}


def activations(tensors: dict[str, Tensor], h: Tensor, *, centred: bool = True) -> Tensor:
    """What the SAE of `state` does, in float64."""
    wide = {name.split("sae.")[-1]: tensor.double() for name, tensor in tensors.items()}
    h = h.double() - (wide["decoder.bias"] if centred else 0)
    return (h @ wide["encoder.weight"].T + wide["encoder.bias"]).relu()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


H = torch.linspace(-2, 2, 5 * D_IN).reshape(5, D_IN).sin()


# Plain state dicts.


def test_the_published_sae(shared_data: Path) -> None:
    file = shared_data / "reference" / "standard-sae" / "weights.safetensors"
    sae = load_sae(file)
    assert isinstance(sae, PlainSAE)
    assert sae_shape(sae) == (64, 512)
    assert not sae.training
    h = torch.rand(20, 64)
    inputs: list[Tensor] = []
    sae.encoder.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    a = sae.encode(h)
    assert torch.equal(inputs[0], h - sae.decoder.bias)
    weights = load_file(file)
    own = {name: tensor for name, tensor in weights.items() if name.startswith("sae.")}
    close(a, activations(own, h))
    close(sae(h), a.double() @ own["sae.decoder.weight"].double().T + own["sae.decoder.bias"])


def renamed(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    w, b, v, c = tensors.values()
    return {
        "linear layers": {f"deep.sae.{name}": tensor for name, tensor in tensors.items()},
        "saelens": {"W_enc": w.T, "b_enc": b, "W_dec": v.T, "b_dec": c},
        "saelens turned": {"W_enc": w, "b_enc": b, "W_dec": v, "b_dec": c},
        "dictionary_learning": {
            "encoder.weight": w,
            "encoder.bias": b,
            "decoder.weight": v,
            "bias": c,
        },
        "sparsify": {"encoder.weight": w, "encoder.bias": b, "W_dec": v.T, "b_dec": c},
    }[kind]


@pytest.mark.parametrize(
    "kind", ["linear layers", "saelens", "saelens turned", "dictionary_learning", "sparsify"]
)
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_names_and_orientations(kind: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"sae{ending}"
    tensors = {name: tensor.contiguous() for name, tensor in renamed(state(), kind).items()}
    tensors["head.weight"] = torch.zeros(3, 3)  # of the model around it
    if ending == ".pt":
        torch.save({"epoch": 3, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    sae = load_sae(file)
    assert sae_shape(sae) == (D_IN, D_SAE)
    close(sae.encode(H), activations(state(), H))


@pytest.mark.parametrize("kind", ["linear layers", "saelens", "sparsify"])
def test_a_square_sae_goes_by_its_names(kind: str, tmp_path: Path) -> None:
    square = state(D_IN, D_IN)
    tensors = {name: tensor.contiguous() for name, tensor in renamed(square, kind).items()}
    save_file(tensors, tmp_path / "sae.safetensors")
    sae = load_sae(tmp_path / "sae.safetensors")
    close(sae.encode(H), activations(square, H))
    close(sae.decode(H), H.double() @ square["decoder.weight"].double().T + square["decoder.bias"])


def save(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "sae.safetensors")
    return tmp_path / "sae.safetensors"


def test_the_decoders_bias_on_the_input(tmp_path: Path) -> None:
    file = save(state(), tmp_path)
    sae = load_sae(file, apply_b_dec_to_input=False)
    close(sae.encode(H), activations(state(), H, centred=False))


def test_other_activations(tmp_path: Path) -> None:
    threshold = torch.linspace(0.1, 2, D_SAE)
    file = save(state() | {"threshold": threshold}, tmp_path)
    dense = activations(state(), H)
    sae = load_sae(file, activation="jumprelu")
    close(sae.encode(H), dense * (dense > threshold))
    assert torch.equal(sae_tensors(sae)["threshold"], threshold)
    sae = load_sae(save(state(), tmp_path), activation="topk", k=2)
    smallest = dense.topk(2, dim=1).values[:, -1:]
    close(sae.encode(H), dense * (dense >= smallest))


def test_one_of_several_saes(tmp_path: Path) -> None:
    file = save(state(prefix="a.sae.") | state(5, 6, prefix="b.sae."), tmp_path)
    with pytest.raises(InputError, match=r"several SAEs\. .* one of: 'a\.sae\.', 'b\.sae\.'"):
        load_sae(file)
    assert sae_shape(load_sae(file, prefix="a.sae")) == (D_IN, D_SAE)
    assert sae_shape(load_sae(file, prefix="b.sae.")) == (5, 6)


def without(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {n: tensor for n, tensor in state(prefix="sae.").items() if n != name}


def with_tensor(name: str, tensor: Tensor) -> Callable[[], dict[str, Tensor]]:
    return lambda: state(prefix="sae.") | {name: tensor}


BAD: list[tuple[Callable[[], dict[str, Tensor]], dict[str, Any], str]] = [
    (lambda: {"head.weight": torch.zeros(2, 2)}, {}, r"holds no SAE: .* It has: head\.weight\."),
    (without("sae.encoder.weight"), {}, r"no encoder weight: a tensor sae\.encoder\.weight or"),
    (
        without("sae.encoder.bias"),
        {},
        r"no encoder bias: a tensor sae\.encoder\.bias or sae",
    ),
    (without("sae.decoder.weight"), {}, "no decoder weight"),
    (without("sae.decoder.bias"), {}, r"no decoder bias: .*It has: sae\.decoder\.weight, sae"),
    (
        with_tensor("sae.encoder.bias", torch.zeros(9)),
        {},
        r"do not fit each other: sae\.encoder\.weight \(7, 4\), .* d_in 4 and d_sae 9, so sae\.enc",
    ),
    (
        with_tensor("sae.decoder.weight", torch.zeros(7, 5)),
        {},
        r"d_in 4 and d_sae 7, so sae\.decoder\.weight should be of 4 and 7",
    ),
    (with_tensor("sae.encoder.bias", torch.zeros(1, 7)), {}, "two matrices with a vector each"),
    (with_tensor("sae.encoder.bias", torch.full((7,), torch.nan)), {}, "holds NaN or infinity"),
    (with_tensor("sae.encoder.bias", torch.zeros(7).int()), {}, "holds torch.int32 values; floats"),
    (
        with_tensor("sae.r_mag", torch.zeros(7)),
        {},
        r"'sae\.r_mag', which an SAE with activation 'relu' does not have: .* another architecture",
    ),
    (with_tensor("sae.threshold", torch.zeros(7)), {}, "Give its activation .*jumprelu"),
    (state, {"activation": "jumprelu"}, "no tensor threshold of 7 values"),
    (state, {"activation": "topk"}, "activation is 'topk' and k is None. Give k with it"),
    (state, {"activation": "topk", "k": 8}, "k is 8; at least 1 and at most d_sae, 7"),
    (state, {"k": 3}, "activation is 'relu' and k is 3. Leave k out"),
    (state, {"activation": "rellu"}, "Unknown activation: 'rellu'. Did you mean 'relu'"),
    (state, {"prefix": "other"}, r"no encoder weight: a tensor other\.encoder\.weight"),
]


@pytest.mark.parametrize(("tensors", "options", "told"), BAD, ids=[told[:30] for *_, told in BAD])
def test_bad_state_dicts(
    tensors: Callable[[], dict[str, Tensor]], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        load_sae(save(tensors(), tmp_path), **options)


class Payload:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def test_damaged_files_and_pickles(tmp_path: Path) -> None:
    file = save(state(), tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"sae\.safetensors is truncated or not a safetensors"):
        load_sae(file)
    torch.save(state() | {"more": Payload()}, tmp_path / "sae.pt")
    with pytest.raises(InputError, match=r"sae\.pt is truncated, or holds pickled objects"):
        load_sae(tmp_path / "sae.pt")
    torch.save(state(), tmp_path / "sae.pt")
    (tmp_path / "sae.pt").write_bytes((tmp_path / "sae.pt").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"sae\.pt is truncated, or holds pickled objects"):
        load_sae(tmp_path / "sae.pt")
    torch.save([1, 2], tmp_path / "sae.pt")
    with pytest.raises(InputError, match="holds a list; a state dict is expected"):
        load_sae(tmp_path / "sae.pt")
    (tmp_path / "sae.npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"sae\.npz is neither \.safetensors nor \.pt"):
        load_sae(tmp_path / "sae.npz")


# As a site.


def test_a_loaded_sae_is_a_site(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(3, D_IN)
            self.sae = load_sae(save(state(), tmp_path))

    (site,) = find_sites(Model(), "sae")
    assert isinstance(site, SAESite)
    assert (site.n_neurons, site.d_in) == (D_SAE, D_IN)
    assert torch.equal(site.weights(), state()["encoder.weight"])


def test_an_sae_that_does_not_fit_the_site(tmp_path: Path) -> None:
    sae = load_sae(save(state(), tmp_path))
    check_width(sae, D_IN, "layers.0")
    told = r"length 4 \(it has 7 latents\), but those at 'layers\.0' have length 64"
    with pytest.raises(InputError, match=told):
        check_width(sae, 64, "layers.0")
    with pytest.raises(InputError, match="Linear is not an SAE that polyseme knows"):
        check_width(nn.Linear(2, 2), 2, "layers.0")


# SAELens folders and releases.


@pytest.fixture
def folder(sae_lens: Any, tmp_path: Path) -> Path:
    config = sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)
    sae_lens.StandardSAE(config).save_model(tmp_path / "sae")
    return tmp_path / "sae"


def test_a_saelens_folder(folder: Path, sae_lens: Any) -> None:
    sae = load_sae(folder)
    stock = sae_lens.SAE.load_from_disk(folder)
    assert torch.equal(sae.encode(H), stock.encode(H))
    assert not sae.training
    assert sae_shape(sae) == (D_IN, D_SAE)
    (site,) = list_sites(nn.ModuleDict({"sae": sae}))
    assert isinstance(site, SAESite)
    assert (site.n_neurons, site.d_in) == (D_SAE, D_IN)


def test_bad_saelens_folders(folder: Path) -> None:
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    good, tensors = json.loads(config.read_text()), weights.read_bytes()
    with pytest.raises(InputError, match=r"activation is given, but .* says itself what it is"):
        load_sae(folder, activation="relu")
    config.write_text(json.dumps(good | {"architecture": "standart"}))
    with pytest.raises(InputError, match=r"Unknown architecture in .*'standart'. Did .*'standard'"):
        load_sae(folder)
    config.write_text(json.dumps(good | {"architecture": "gated"}))
    with pytest.raises(InputError, match="its weights lack the tensor 'b_gate'"):
        load_sae(folder)
    config.write_text(json.dumps(good | {"d_sae": 9}))
    with pytest.raises(InputError, match=r"'W_dec' has shape \(7, 4\), .* should have \(9, 4\)"):
        load_sae(folder)
    config.write_text("{")
    with pytest.raises(InputError, match=r"cfg\.json is damaged: it is not JSON"):
        load_sae(folder)
    config.write_text(json.dumps(good))
    weights.write_bytes(tensors[:-5])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        load_sae(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"not the folder of an SAE: it has no sae_weights\.saf"):
        load_sae(folder)


def test_a_release_is_fetched_by_saelens(sae_lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(release: str, sae_id: str, device: str) -> nn.Module:
        asked.append((release, sae_id, device))
        return nn.Linear(1, 1)

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fetch)
    load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    load_sae("someone/some-saes/layer_1/width_16k")
    assert asked == [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "cpu"),
        ("someone/some-saes", "layer_1/width_16k", "cpu"),
    ]


def test_releases_that_cannot_be_had(sae_lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"Cannot fetch .* \(ConnectionError: no route to host\)"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    with pytest.raises(InputError, match="Unknown SAE of the release 'gpt2-small-res-jb': 'blocks"):
        load_sae("gpt2-small-res-jb/blocks.88")
    with pytest.raises(InputError, match=r"no file or folder 'gpt2-small-res-jp/x', and .* Did"):
        load_sae("gpt2-small-res-jp/x")


@pytest.mark.parametrize("source", ["nowhere", "./saes/none", "saes/"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(InputError, match=f"There is no file or folder '{source}'"):
        load_sae(source)


def test_saelens_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"needs sae-lens, .*'polyseme\[sae\]'"):
        load_sae(tmp_path)
