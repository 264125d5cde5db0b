"""SAEs as the libraries that train them write them, each against that library's own formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from polyseme.errors import InputError
from polyseme.sae import load_sae

D_IN, D_SAE, K, SHARED = 5, 12, 3, 0.7
GENERATOR = torch.Generator().manual_seed(0)
W_ENC, W_DEC = torch.randn(2, D_SAE, D_IN, generator=GENERATOR)  # a latent a row
B_ENC, B_DEC = torch.randn(D_SAE, generator=GENERATOR), torch.randn(D_IN, generator=GENERATOR)
THRESHOLD = torch.rand(D_SAE, generator=GENERATOR)
H = torch.randn(40, D_IN, generator=GENERATOR).double()


def pre(h: Tensor) -> Tensor:
    return h @ W_ENC.double().T + B_ENC.double()


def relu(h: Tensor) -> Tensor:
    return pre(h).clamp(min=0)


def top(h: Tensor) -> Tensor:
    """Each row's K largest, where they are positive, by plain sorting."""
    rows = relu(h)
    for row in rows:
        row[row.sort(descending=True).indices[K:]] = 0
    return rows


def above(h: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pre(h) > threshold, relu(h), 0)


def written(file: Path, tensors: dict[str, Tensor], config: object = None) -> Path:
    """Save tensors as file names tell, and a configuration as the library that uses that name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file.suffix == ".pt":
        torch.save(tensors, file)
    elif file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file(tensors, file)
    if config is not None:
        name = "cfg.json" if file.name == "sae.safetensors" else "config.json"
        (file.parent / name).write_text(json.dumps(config))
    return file


LINEAR = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
BY_ROW = {"W_enc": W_ENC.T, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
CUT = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(SHARED)}
SPARSIFY = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
GEMMA_2 = {"w_enc": W_ENC.T, "b_enc": B_ENC, "w_dec": W_DEC, "b_dec": B_DEC, "threshold": THRESHOLD}


def dictionary(kind: str, **more: Any) -> dict[str, Any]:
    trainer = {"trainer_class": "Trainer", "dict_class": kind, "lr": 0.001, "lm_name": "gpt2"}
    sizes = {"activation_dim": D_IN, "dict_size": D_SAE}
    return {"trainer": trainer | sizes | more, "buffer": {"d_submodule": D_IN}}


def sparsify(**more: Any) -> dict[str, Any]:
    config = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True}
    config |= {"num_latents": D_SAE, "k": K, "multi_topk": False}
    return config | {"skip_connection": False, "transcode": False, "d_in": D_IN} | more


def gemma(**more: Any) -> dict[str, Any]:
    config = {"hf_hook_point_in": "model.layers.12.output", "width": D_SAE, "l0": 60}
    config |= {"hf_hook_point_out": "model.layers.12.output", "model_name": "gemma-v3-1b-pt"}
    return config | {"architecture": "jump_relu", "affine_connection": False, "type": "sae"} | more


CENTRED = H - B_DEC.double()
SAES: dict[str, tuple[str, dict[str, Tensor], object, Tensor]] = {
    "AutoEncoder": ("ae.pt", LINEAR | {"bias": B_DEC}, dictionary("AutoEncoder"), relu(CENTRED)),
    "AutoEncoderNew": (
        "ae.pt",
        LINEAR | {"decoder.bias": B_DEC},
        dictionary("AutoEncoderNew"),
        relu(H),
    ),
    "AutoEncoderTopK": (
        "ae.pt",
        LINEAR | {"b_dec": B_DEC} | CUT,
        dictionary("AutoEncoderTopK", k=K),
        top(CENTRED),
    ),
    "AutoEncoderTopK before it saved k": (
        "ae.pt",
        LINEAR | {"b_dec": B_DEC},
        dictionary("AutoEncoderTopK", k=K),
        top(CENTRED),
    ),
    "BatchTopKSAE": (
        "ae.pt",
        LINEAR | {"b_dec": B_DEC} | CUT,
        dictionary("BatchTopKSAE", k=K),
        above(CENTRED, torch.tensor(SHARED)),
    ),
    "MatryoshkaBatchTopKSAE": (
        "ae.pt",
        BY_ROW | CUT | {"group_sizes": torch.tensor([4, 8])},
        dictionary("MatryoshkaBatchTopKSAE", k=K, group_sizes=[4, 8]),
        above(CENTRED, torch.tensor(SHARED)),
    ),
    "JumpReluAutoEncoder": (
        "ae.pt",
        BY_ROW | {"threshold": THRESHOLD},
        dictionary("JumpReluAutoEncoder"),
        above(H, THRESHOLD),
    ),
    "sparsify": ("sae.safetensors", SPARSIFY, sparsify(), top(CENTRED)),
    "sparsify, width by a factor": (
        "sae.safetensors",
        SPARSIFY,
        sparsify(num_latents=0),
        top(CENTRED),
    ),
    "Gemma Scope": ("params.npz", BY_ROW | {"threshold": THRESHOLD}, None, above(H, THRESHOLD)),
    "Gemma Scope 2": ("params.safetensors", GEMMA_2, gemma(), above(H, THRESHOLD)),
    "Gemma Scope 2, without a configuration": (
        "params.safetensors",
        GEMMA_2,
        None,
        above(H, THRESHOLD),
    ),
}


@pytest.mark.parametrize("kind", SAES)
def test_a_librarys_folder(kind: str, tmp_path: Path) -> None:
    name, tensors, config, expected = SAES[kind]
    file = written(tmp_path / "layers.3" / name, tensors, config)
    for source in (file.parent, file):
        sae: Any = load_sae(source)
        found = sae.encode(H.float())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        rebuilt = expected @ W_DEC.double() + B_DEC.double()
        torch.testing.assert_close(sae.decode(found).double(), rebuilt, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_dictionary_learning(tmp_path: Path) -> None:
    _, tensors, config, expected = SAES["AutoEncoderNew"]
    written(tmp_path / "ae.pt", tensors, config)
    checkpoint = written(tmp_path / "checkpoints" / "ae_100.pt", tensors)
    found = load_sae(checkpoint).encode(H.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_options_may_repeat_a_configuration_and_not_gainsay_it(tmp_path: Path) -> None:
    file = written(tmp_path / "sae.safetensors", SPARSIFY, sparsify())
    sae: Any = load_sae(file, activation="topk", k=K, apply_b_dec_to_input=True)
    assert sae.activation.k == K
    told = r"activation is 'relu', but by .*cfg\.json it is 'topk'\. Leave it out"
    with pytest.raises(InputError, match=told):
        load_sae(file, activation="relu")
    told = r"apply_b_dec_to_input is False, but by .*cfg\.json it is True"
    with pytest.raises(InputError, match=told):
        load_sae(tmp_path, apply_b_dec_to_input=False)
    with pytest.raises(InputError, match=r"k is 4 by the argument and 3 by .*cfg\.json\. Leave"):
        load_sae(file, k=4)


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
REFUSED: list[tuple[str, Change, str]] = [
    (
        "AutoEncoder",
        lambda c, t: c["trainer"].update(dict_class="GatedAutoEncoder"),
        "Unknown dict_class in .*config.json: 'GatedAutoEncoder'.* Must be one of: AutoEncoder, ",
    ),
    (
        "AutoEncoder",
        lambda c, t: c["trainer"].update(dict_class=["AutoEncoder"]),
        "Unknown dict_class in .*config.json: .*AutoEncoder",
    ),
    (
        "AutoEncoder",
        lambda c, t: t.update({name: B_ENC for name in ("r_mag", "gate_bias", "mag_bias")}),
        "holds 'r_mag': it is a gated SAE, which polyseme reads only from a SAELens folder",
    ),
    (
        "AutoEncoder",  # as a trainer writes that was given another class
        lambda c, t: t.update({"decoder.bias": t.pop("bias")}),
        r"decoder's bias is called decoder\.bias in .*, but bias by .*\(AutoEncoder\): the two do",
    ),
    (
        "AutoEncoder",
        lambda c, t: c["trainer"].update(dict_size=13),
        r"d_sae is 12 in .*ae\.pt, but 13 by .*config\.json \(AutoEncoder\): the two do not belong",
    ),
    (
        "AutoEncoderTopK",
        lambda c, t: c["trainer"].update(k=4),
        r"k is 4 by .*config\.json \(AutoEncoderTopK\) and 3 by the tensor k in .*ae\.pt",
    ),
    (
        "AutoEncoderTopK",
        lambda c, t: c["trainer"].update(k=True),
        "k in .*config.json is True; an integer of at least 1",
    ),
    (
        "AutoEncoderTopK",
        lambda c, t: t.update(k=torch.tensor(2.5)),
        r"k is 2\.5 by the tensor k in .*; expected an integer from 1 to d_sae, 12",
    ),
    (
        "AutoEncoderTopK",
        lambda c, t: t.update(k=torch.ones(2)),
        r"k is of shape \(2,\) by the tensor k in .*; expected an integer",
    ),
    (
        "sparsify",
        lambda c, t: c.update(k=13),
        r"k is 13 by .*cfg\.json; expected an integer from 1 to d_sae, 12",
    ),
    (
        "sparsify",
        lambda c, t: c.update(transcode=True),
        "whose 'transcode' is True, the weights are those of a transcoder. Polyseme does not read",
    ),
    (
        "sparsify",
        lambda c, t: c.update(skip_connection=True),
        "whose 'skip_connection' is True, the weights are those of a transcoder",
    ),
    (
        "sparsify",
        lambda c, t: t.update(W_skip=torch.eye(D_IN)),
        "holds 'W_skip': it is a transcoder with a skip connection. Polyseme does not read",
    ),
    (
        "sparsify",
        lambda c, t: t.update({"W_dec": torch.ones(D_SAE, 6), "b_dec": torch.ones(6)}),
        "it reads vectors of length 5 and writes vectors of length 6, as a transcoder does",
    ),
    (
        "sparsify",
        lambda c, t: c.update(activation="groupmax"),
        "the activation is 'groupmax'; polyseme reads only 'topk' there",
    ),
    ("sparsify", lambda c, t: c.update(signed=True), "the activation is a signed top-k; polyseme"),
    (
        "Gemma Scope 2",
        lambda c, t: c.update(type="transcoder"),
        "config.json, the weights are of type 'transcoder': .* does not read transcoders",
    ),
    (
        "Gemma Scope 2",
        lambda c, t: c.update(hf_hook_point_out="model.layers.12.mlp.output"),
        "they read 'model.layers.12.output' and write 'model.layers.12.mlp.output'",
    ),
    (
        "Gemma Scope 2, without a configuration",
        lambda c, t: t.update(affine_skip_connection=torch.eye(D_IN)),
        "holds 'affine_skip_connection': it is a transcoder with a skip connection",
    ),
    (
        "Gemma Scope 2",
        lambda c, t: c.update(architecture="topk"),
        "Unknown architecture in .*config.json: 'topk'.* Must be one of: jump_relu",
    ),
]


@pytest.mark.parametrize(("kind", "change", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_load_sae_rejects_unreadable_saes(
    kind: str, change: Change, told: str, tmp_path: Path
) -> None:
    name, tensors, config, _ = SAES[kind]
    config, tensors = json.loads(json.dumps(config)), dict(tensors)
    change(config, tensors)
    file = written(tmp_path / name, tensors, config)
    for source in (file, tmp_path):
        with pytest.raises(InputError, match=told):
            load_sae(source)


@pytest.mark.parametrize("folder", ["transcoder_all", "clt", "gemma-scope-2b-pt-transcoders"])
def test_transcoders_of_gemma_scope_go_by_their_folder(folder: str, tmp_path: Path) -> None:
    tensors = BY_ROW | {"threshold": THRESHOLD}
    file = written(tmp_path / folder / "layer_1" / "params.npz", tensors)
    with pytest.raises(
        InputError, match=rf"params\.npz is in a folder '{folder}', so it is not an SAE"
    ):
        load_sae(file)


def test_without_a_configuration_nothing_is_guessed(tmp_path: Path) -> None:
    told = (
        r"does not say what its SAE computes, .* Give both activation \(relu, topk, jumprelu\) and "
    )
    for name, tensors in (("a.safetensors", GEMMA_2), ("b.pt", LINEAR | {"b_dec": B_DEC})):
        file = written(tmp_path / name, tensors)
        for options in ({}, {"activation": "jumprelu"}, {"apply_b_dec_to_input": True}):
            with pytest.raises(InputError, match=told):
                load_sae(file, **options)
    # A model's own configuration says nothing of an SAE.
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2"], "k": 3}))
    with pytest.raises(InputError, match=told):
        load_sae(file)


def test_a_file_with_k_and_threshold_alone(tmp_path: Path) -> None:
    """What dictionary_learning saves for two architectures, without their configuration."""
    file = written(tmp_path / "ae.pt", LINEAR | {"b_dec": B_DEC} | CUT)
    with pytest.raises(InputError, match="AutoEncoderTopK is 'topk', its BatchTopKSAE 'jumprelu'"):
        load_sae(file)
    for activation, expected in (("topk", "AutoEncoderTopK"), ("jumprelu", "BatchTopKSAE")):
        sae: Any = load_sae(file, activation=activation, apply_b_dec_to_input=True)
        torch.testing.assert_close(
            sae.encode(H.float()).double(), SAES[expected][3], rtol=1e-5, atol=1e-5
        )


def test_folders_of_folders(tmp_path: Path) -> None:
    for point in ("layers.3", "layers.10"):
        written(tmp_path / point / "sae.safetensors", SPARSIFY, sparsify())
    told = r"holds the folders of 2 SAEs: layers\.10, layers\.3\. Give one of them, such as"
    with pytest.raises(InputError, match=told):
        load_sae(tmp_path)
    written(tmp_path / "layers.3" / "ae.pt", LINEAR)
    with pytest.raises(InputError, match=r"several SAEs\. .*files: ae\.pt, sae\.safetensors"):
        load_sae(tmp_path / "layers.3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has none of .* ae\.pt \(dictionary_learning\), "):
        load_sae(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", r"config\.json is damaged: it is not JSON"),
        ("[" * 100_000, r"config\.json is damaged: its JSON is nested too deeply"),
        ("\udcff", r"config\.json is damaged: it is not JSON"),
        (" " * (1 << 24) + "1", r"config\.json is over 16 MiB"),
    ],
    ids=["truncated", "nested", "encoding", "long"],
)
def test_a_damaged_configuration(content: str, told: str, tmp_path: Path) -> None:
    file = written(tmp_path / "ae.pt", LINEAR | {"bias": B_DEC})
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=told):
        load_sae(file)
