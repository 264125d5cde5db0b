"""SAEs that others trained: state dicts, SAELens folders and releases, each read as a site."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polyseme.errors import InputError, MissingDependencyError
from polyseme.sae import PlainSAE, check_width, load_sae, sae_shape, sae_tensors
from polyseme.sae.load import import_sae_lens
from polyseme.sites import find_sites, list_sites
from polyseme.sites.find import SAESite

D_IN, D_SAE = 4, 7
PUBLISHED: dict[str, Any] = {"activation": "relu", "apply_b_dec_to_input": True}


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
    sae = load_sae(file, **PUBLISHED)
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
    if kind == "linear layers":
        tensors["head.weight"] = torch.zeros(3, 3)  # of the model around it
    if ending == ".pt":
        torch.save({"epoch": 3, "state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    sae = load_sae(file, **PUBLISHED)
    assert sae_shape(sae) == (D_IN, D_SAE)
    close(sae.encode(H), activations(state(), H))


def test_a_square_sae_goes_by_its_names(tmp_path: Path) -> None:
    square = state(D_IN, D_IN)
    sae = load_sae(save(square, tmp_path), **PUBLISHED)
    close(sae.encode(H), activations(square, H))
    close(sae.decode(H), H.double() @ square["decoder.weight"].double().T + square["decoder.bias"])
    for kind in ("saelens", "sparsify"):
        tensors = {name: tensor.contiguous() for name, tensor in renamed(square, kind).items()}
        told = r"is square, so its orientation .*(en|de)coder\.weight, of shape"
        with pytest.raises(InputError, match=told):
            load_sae(save(tensors, tmp_path), **PUBLISHED)
    # Where a configuration says whose it is, its customs hold.
    config = {"activation": "topk", "expansion_factor": 1, "k": D_IN, "d_in": D_IN}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    sae = load_sae(tmp_path)
    close(sae.encode(H), activations(square, H))
    close(sae.decode(H), H.double() @ square["decoder.weight"].double().T + square["decoder.bias"])


def save(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "sae.safetensors")
    return tmp_path / "sae.safetensors"


def test_the_decoders_bias_on_the_input(tmp_path: Path) -> None:
    file = save(state(), tmp_path)
    sae = load_sae(file, activation="relu", apply_b_dec_to_input=False)
    close(sae.encode(H), activations(state(), H, centred=False))


def test_other_activations(tmp_path: Path) -> None:
    threshold = torch.linspace(0.1, 2, D_SAE)
    file = save(state() | {"threshold": threshold}, tmp_path)
    dense = activations(state(), H)
    sae = load_sae(file, activation="jumprelu", apply_b_dec_to_input=True)
    close(sae.encode(H), dense * (dense > threshold))
    assert torch.equal(sae_tensors(sae)["threshold"], threshold)
    sae = load_sae(save(state(), tmp_path), activation="topk", k=2, apply_b_dec_to_input=True)
    smallest = dense.topk(2, dim=1).values[:, -1:]
    close(sae.encode(H), dense * (dense >= smallest))


def test_one_of_several_saes(tmp_path: Path) -> None:
    file = save(state(prefix="a.sae.") | state(5, 6, prefix="b.sae."), tmp_path)
    with pytest.raises(InputError, match=r"several SAEs\. .* one of: 'a\.sae\.', 'b\.sae\.'"):
        load_sae(file)
    assert sae_shape(load_sae(file, prefix="a.sae", **PUBLISHED)) == (D_IN, D_SAE)
    assert sae_shape(load_sae(file, prefix="b.sae.", **PUBLISHED)) == (5, 6)


def without(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {n: tensor for n, tensor in state(prefix="sae.").items() if n != name}


def with_tensor(name: str, tensor: Tensor) -> Callable[[], dict[str, Tensor]]:
    return lambda: state(prefix="sae.") | {name: tensor}


BAD: list[tuple[Callable[[], dict[str, Tensor]], dict[str, Any], str]] = [
    (lambda: {"head.weight": torch.zeros(2, 2)}, {}, r"holds no SAE: .* It has: head\.weight\."),
    (
        without("sae.encoder.weight"),
        {},
        r"no encoder weight; expected a tensor sae\.encoder\.weight or",
    ),
    (
        without("sae.encoder.bias"),
        {},
        r"no encoder bias; expected a tensor sae\.encoder\.bias or sae",
    ),
    (without("sae.decoder.weight"), {}, "no decoder weight"),
    (without("sae.decoder.bias"), {}, r"no decoder bias; .*It has: sae\.decoder\.weight, sae"),
    (
        with_tensor("sae.encoder.bias", torch.zeros(9)),
        {},
        r"do not match: sae\.encoder\.weight \(7, 4\), .* d_in 4 and d_sae 9, so sae\.enc",
    ),
    (
        with_tensor("sae.decoder.weight", torch.zeros(7, 5)),
        {},
        r"d_in 4 and d_sae 7, so sae\.decoder\.weight should have dimensions 4 and 7",
    ),
    (with_tensor("sae.encoder.bias", torch.zeros(1, 7)), {}, "expected a matrix and a vector each"),
    (with_tensor("sae.encoder.bias", torch.full((7,), torch.nan)), {}, "holds NaN or infinity"),
    (
        with_tensor("sae.encoder.bias", torch.zeros(7).int()),
        {},
        "holds int32 values; expected floats",
    ),
    (
        with_tensor("sae.encoder.bias", torch.full((7,), 1e300, dtype=torch.float64)),
        {},
        "holds NaN or infinity",
    ),
    (
        lambda: {n: t[:0] if "coder.weight" not in n else t for n, t in state().items()},
        {},
        "expected a matrix and a vector each",
    ),
    (with_tensor("sae.r_mag", torch.zeros(7)), {}, r"holds 'sae\.r_mag': it is a gated SAE, which"),
    (
        with_tensor("sae.norm.weight", torch.zeros(4)),
        {},
        r"'sae\.norm\.weight', which an SAE with activation 'relu' does not have: .* from another",
    ),
    (with_tensor("sae.threshold", torch.zeros(7)), {}, r"'sae\.threshold', which an SAE with"),
    (
        lambda: state() | {"decoder.weight": torch.zeros(5, 7), "decoder.bias": torch.zeros(5)},
        {},
        "it reads vectors of length 4 and writes vectors of length 5, as a transcoder does",
    ),
    (state, {"activation": "jumprelu"}, "no tensor threshold of 7 values"),
    (state, {"activation": "topk", "k": 0}, "k is 0 by the argument; expected an integer"),
    (state, {"activation": "topk", "k": 2.0}, r"k is 2\.0 by the argument; expected an integer"),
    (state, {"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input is 'no'; expected True or False"),
    (state, {"activation": "topk"}, "activation is 'topk' but k is None. Give k as well"),
    (state, {"activation": "topk", "k": 8}, "k is 8 by the argument; .* to d_sae, 7"),
    (state, {"k": 3}, "activation is 'relu' and k is 3. Leave k out"),
    (state, {"activation": "rellu"}, "Unknown activation: 'rellu'. Did you mean 'relu'"),
    (state, {"prefix": "other"}, r"no encoder weight; expected a tensor other\.encoder\.weight"),
]


@pytest.mark.parametrize(("tensors", "options", "told"), BAD, ids=[told[:30] for *_, told in BAD])
def test_bad_state_dicts(
    tensors: Callable[[], dict[str, Tensor]], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=told):
        load_sae(save(tensors(), tmp_path), **PUBLISHED | options)


class Payload:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was run",))


def test_damaged_files_and_pickles(tmp_path: Path) -> None:
    file = save(state(), tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"sae\.safetensors is truncated or not a safetensors"):
        load_sae(file)
    file = tmp_path / "sae.pt"
    torch.save(state() | {"more": Payload()}, file)
    with pytest.raises(InputError, match=r"sae\.pt holds more than plain tensors \(.*Fail\), and"):
        load_sae(file)
    for protocol in (2, 4):
        torch.save(state() | {"more": {1, 2}}, file, pickle_protocol=protocol)
        with pytest.raises(InputError, match=r"sae\.pt (holds more than plain|is truncated, or)"):
            load_sae(file)
    torch.save(state(), file)
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"sae\.pt is truncated, or not what torch\.save writes"):
        load_sae(file)
    torch.save([1, 2], file)
    with pytest.raises(InputError, match="holds a list; expected a state dict"):
        load_sae(file)
    torch.save(state() | {"activation": "TopK"}, file)
    with pytest.raises(InputError, match="holds 'activation', a str, among its tensors"):
        load_sae(file)
    file.with_suffix(".npz").write_bytes(b"")
    with pytest.raises(InputError, match=r"sae\.npz is truncated, or not a \.npz file"):
        load_sae(file.with_suffix(".npz"))
    file.with_suffix(".h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"sae\.h5 is not \.safetensors, \.pt or \.npz"):
        load_sae(file.with_suffix(".h5"))


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.eye(7, 4).to_sparse(), "more than plain tensors .*sparse_tensor"),
    "csr": (lambda: torch.eye(7, 4).to_sparse_csr(), "more than plain tensors .*sparse_tensor"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "more than plain tensors .*nested_tensor",
    ),
    "meta": (lambda: torch.ones(7, 4, device="meta"), "more than plain tensors .*meta_tensor"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(7, 4), 0.1, 0, torch.qint8),
        "more than plain tensors .*qtensor",
    ),
    "float8": (
        lambda: torch.ones(7, 4).to(torch.float8_e4m3fn),
        "more than plain tensors|holds float8_e4m3fn values; expected floats",
    ),
    "complex": (
        lambda: torch.ones(7, 4, dtype=torch.complex64),
        "holds complex64 values; expected floats",
    ),
    "expanded": (  # 40 GB in a file of two kilobytes
        lambda: torch.ones(1, 1).expand(100_000, 100_000),
        r"encoder\.weight in .* is an expanded view: its shape \(100000, 100000\) implies more",
    ),
    "scalar": (lambda: torch.tensor(5.0), "expected a matrix and a vector each"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that these are experimental
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_plain(kind: str, tmp_path: Path) -> None:
    tensor, told = ODD[kind]
    torch.save(state() | {"encoder.weight": tensor()}, tmp_path / "sae.pt")
    with pytest.raises(InputError, match=told):
        load_sae(tmp_path / "sae.pt", **PUBLISHED)


def test_float8_in_safetensors(tmp_path: Path) -> None:
    tensors = state() | {"encoder.weight": torch.ones(7, 4).to(torch.float8_e5m2)}
    with pytest.raises(InputError, match=r"holds float8_e5m2 values; expected floats of 16"):
        load_sae(save(tensors, tmp_path), **PUBLISHED)


def test_expanded_k_and_threshold(tmp_path: Path) -> None:
    expanded = torch.ones(1).expand(10**12)
    for name, activation in (("k", "topk"), ("threshold", "jumprelu")):
        torch.save(state() | {name: expanded}, tmp_path / "sae.pt")
        with pytest.raises(InputError, match=r"k is of shape \(1000000000000,\)|no tensor thresh"):
            load_sae(tmp_path / "sae.pt", activation=activation, apply_b_dec_to_input=True)


ARRAYS: dict[str, tuple[Any, str]] = {
    "scalar": (5.0, "expected a matrix and a vector each"),
    "text": (np.array(["a"]), "encoder.weight in .* holds <U1; expected floats"),
    "objects": (np.array([{}], object), r"sae\.npz is truncated, or not a \.npz file"),
    "NaN": (np.full((7, 4), np.nan), "holds NaN or infinity"),
    "zeros": (
        np.zeros((2000, 2000)),
        r"sae\.npz has .* bytes and would decompress to 32,.* too",
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_are_no_weights(kind: str, tmp_path: Path) -> None:
    array, told = ARRAYS[kind]
    arrays = {name: tensor.numpy() for name, tensor in state().items()} | {"encoder.weight": array}
    np.savez_compressed(tmp_path / "sae.npz", **arrays)
    with pytest.raises(InputError, match=told):
        load_sae(tmp_path / "sae.npz", **PUBLISHED)


def test_arrays_of_either_byte_order(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy().astype(">f4") for name, tensor in state().items()}
    np.savez(tmp_path / "sae.npz", **arrays)
    close(load_sae(tmp_path / "sae.npz", **PUBLISHED).encode(H), activations(state(), H))


def rezipped(file: Path, method: int, **changed: bytes) -> None:
    """Pack a zip file anew, with some of its members changed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, changed.get(Path(name).stem, content))


def test_files_made_to_fill_memory(tmp_path: Path) -> None:
    file = tmp_path / "sae.pt"
    torch.save(state() | {"encoder.weight": torch.zeros(2000, 2000)}, file)
    rezipped(file, zipfile.ZIP_DEFLATED)
    with pytest.raises(
        InputError, match=r"sae\.pt has .* bytes and would decompress to 16,.* too much"
    ):
        load_sae(file, **PUBLISHED)
    torch.save(state(), file)
    # A call that asks for a gigabyte: {"a": bytearray(2**30)}.
    rezipped(file, 0, data=b"\x80\x02}X\x01\0\0\0ac__builtin__\nbytearray\nJ\0\0\0\x40\x85Rs.")
    with pytest.raises(InputError, match=r"more than plain tensors \(__builtin__\.bytearray\)"):
        load_sae(file, **PUBLISHED)


@pytest.mark.parametrize("ending", ["safetensors", "pt", "npz"])
def test_changed_bytes_are_read_or_refused(ending: str, tmp_path: Path) -> None:
    """Whatever is done to a file, there is an SAE or a sentence."""
    file, packed = tmp_path / f"sae.{ending}", io.BytesIO()
    if ending == "pt":
        torch.save(state(), packed)
    elif ending == "npz":
        np.savez(packed, **{name: tensor.numpy() for name, tensor in state().items()})
    else:
        packed.write(save(state(), tmp_path).read_bytes())
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(packed.getvalue())
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.integers(256)
        file.write_bytes(
            content[: random.integers(len(content))] if not random.integers(8) else content
        )
        try:
            load_sae(file, **PUBLISHED)
        except InputError:
            refused += 1
    assert refused > 15


# As a site.


def test_a_loaded_sae_is_a_site(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(3, D_IN)
            self.sae = load_sae(save(state(), tmp_path), **PUBLISHED)

    (site,) = find_sites(Model(), "sae")
    assert isinstance(site, SAESite)
    assert (site.n_neurons, site.d_in) == (D_SAE, D_IN)
    assert torch.equal(site.weights(), state()["encoder.weight"])


def test_an_sae_that_does_not_fit_the_site(tmp_path: Path) -> None:
    sae = load_sae(save(state(), tmp_path), **PUBLISHED)
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


def test_a_file_in_a_saelens_folder(folder: Path, sae_lens: Any) -> None:
    sae = load_sae(folder / "sae_weights.safetensors")
    assert torch.equal(sae.encode(H), sae_lens.SAE.load_from_disk(folder).encode(H))
    (folder / "cfg.json").unlink()
    with pytest.raises(InputError, match="does not say what its SAE computes"):
        load_sae(folder / "sae_weights.safetensors")
    with pytest.raises(InputError, match=r"it has sae_weights\.safetensors and no cfg\.json"):
        load_sae(folder)


BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architecture": "standart"}, r"Unknown architecture in .*'standart'. Did .*'standard'"),
    ({"architecture": ["standard"]}, r"Unknown architecture in .*standard.* Must be one of"),
    ({"architecture": "gated"}, "its weights lack the tensor 'b_gate'"),
    ({"architecture": "skip_transcoder"}, "is 'skip_transcoder'. Polyseme does not read transcod"),
    ({"architecture": "temporal"}, "Unknown architecture in .*'temporal'"),
    ({"architecture": "matching_pursuit"}, "Unknown architecture in .*'matching_pursuit'"),
    ({"architecture": "topk", "k": 8}, "k of the SAE .* is 8; .* at most d_sae, 7"),
    ({"architecture": "topk", "k": "3"}, "k of the SAE .* is '3'; an integer"),
    ({"d_sae": 9}, r"'W_dec' has shape \(7, 4\), .* should have \(9, 4\)"),
    ({"metadata": 5}, "SAELens cannot load the SAE "),
    ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input of the SAE .* is 'no'; true or false"),
    (
        {"normalize_activations": "expected_average_only_in"},
        "normalize_activations 'expected_average_only_in', which is neither folded into its",
    ),
    (
        {"activation_fn_str": "tanh-relu"},
        "the activation is 'tanh-relu', but SAELens would read it as a 'standard' SAE",
    ),
]


@pytest.mark.parametrize(("change", "told"), BAD_CONFIGS, ids=[told for _, told in BAD_CONFIGS])
def test_bad_saelens_configurations(change: dict[str, Any], told: str, folder: Path) -> None:
    config = folder / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(InputError, match=told):
        load_sae(folder)


def test_bad_saelens_folders(folder: Path) -> None:
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    good, tensors = config.read_text(), weights.read_bytes()
    with pytest.raises(InputError, match=r"activation is given, but .* has its own configuration"):
        load_sae(folder, activation="relu")
    for content, told in (
        ("{", r"cfg\.json is damaged: it is not JSON"),
        ("[" * 100_000, r"cfg\.json is damaged: its JSON is nested too deeply"),
        ("[]", r"cfg\.json holds a list; a JSON object is expected"),
    ):
        config.write_text(content)
        with pytest.raises(InputError, match=told):
            load_sae(folder)
    config.write_text(good)
    weights.write_bytes(tensors[:-5])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        load_sae(folder)
    weights.write_bytes(tensors)
    spoilt = load_file(weights)
    spoilt["W_enc"][0, 0] = torch.inf
    save_file(spoilt, weights)
    with pytest.raises(InputError, match=r"W_enc of the SAE .* holds NaN or infinity"):
        load_sae(folder)
    weights.unlink()
    with pytest.raises(
        InputError, match=r"not the folder of an SAE: it has none of sae_weights\.saf"
    ):
        load_sae(folder)


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_the_input_of_a_saelens_sae(
    norm: str, architecture: str, sae_lens: Any, tmp_path: Path
) -> None:
    name = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU"}[architecture]
    options: dict[str, Any] = {"k": 2} if architecture == "topk" else {}
    config = getattr(sae_lens, f"{name}SAEConfig")(
        d_in=D_IN, d_sae=D_SAE, normalize_activations=norm, **options
    )
    made = getattr(sae_lens, f"{name}SAE")(config)
    torch.nn.init.normal_(made.b_dec)
    made.save_model(tmp_path)
    sae = load_sae(tmp_path)
    seen: list[Tensor] = []
    sae.hook_sae_acts_pre.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    sae.encode(H)
    h = sae.run_time_activation_norm_fn_in(H)
    constant = seen[0] - h @ sae.W_enc
    close(constant, constant[:1].double().expand(len(H), -1))
    assert torch.equal(h, H) == (norm == "none")


def test_a_release_is_fetched_by_saelens(
    folder: Path, sae_lens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, sae = [], sae_lens.SAE.load_from_disk(folder)

    def fetch(release: str, sae_id: str, device: str) -> nn.Module:
        asked.append((release, sae_id, device))
        return sae

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", fetch)
    assert load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre") is sae
    load_sae("someone/some-saes/layer_1/width_16k")
    assert asked == [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "cpu"),
        ("someone/some-saes", "layer_1/width_16k", "cpu"),
    ]
    sae = sae_lens.Transcoder(
        sae_lens.TranscoderConfig(d_in=4, d_out=4, d_sae=7, apply_b_dec_to_input=False)
    )
    with pytest.raises(InputError, match=r"some-saes/x is 'transcoder'\. Polyseme does not read"):
        load_sae("someone/some-saes/x")


def test_releases_that_cannot_be_had(sae_lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", unreachable)
    with pytest.raises(InputError, match=r"Cannot download .* \(ConnectionError: no route"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    with pytest.raises(InputError, match="Unknown SAE of the release 'gpt2-small-res-jb': 'blocks"):
        load_sae("gpt2-small-res-jb/blocks.88")
    with pytest.raises(InputError, match=r"no file or folder 'gpt2-small-res-jp/x', and .* Did"):
        load_sae("gpt2-small-res-jp/x")


@pytest.mark.parametrize("source", ["nowhere", "./saes/none", "saes/", "x" * 5000, "a\0b"])
def test_nothing_there(source: str) -> None:
    with pytest.raises(InputError, match=f"There is no file or folder {re.escape(repr(source))}"):
        load_sae(source)


def test_saelens_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(MissingDependencyError, match=r"needs sae-lens, .*'polyseme\[sae\]'"):
        load_sae(tmp_path)
