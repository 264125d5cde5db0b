"""Configuration files of SAE training libraries, stored beside the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseme.errors import InputError, one_of
from polyseme.sae.untrusted_files import read_json

# Name of the weights file in each library's folders.
WEIGHTS = {
    "sae_weights.safetensors": "SAELens",
    "ae.pt": "dictionary_learning",
    "sae.safetensors": "sparsify",
    "params.npz": "Gemma Scope",
    "params.safetensors": "Gemma Scope 2",
}
NO_TRANSCODERS = "Polyseme does not read transcoders yet: give an SAE"

# dictionary_learning's classes: activation, whether the decoder bias is subtracted, and its name
# (trainers write their usual class, whichever they were given). Its batch top-k applies only in
# training; afterwards all latents share a threshold.
_DICTIONARIES = {
    "AutoEncoder": ("relu", True, "bias"),
    "AutoEncoderNew": ("relu", False, "decoder.bias"),
    "AutoEncoderTopK": ("topk", True, "b_dec"),
    "BatchTopKSAE": ("jumprelu", True, "b_dec"),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True, "b_dec"),
    "JumpReluAutoEncoder": ("jumprelu", False, "b_dec"),
}
# Gemma Scope folders whose weights look like those of SAEs but are not.
_TRANSCODERS = re.compile(r"(transcoder|crosscoder|clt)\w*|.*gemma-scope-.*-transcoders")


@dataclass(frozen=True)
class Formula:
    """How an SAE computes activations from its inputs, as far as its files say.

    Attributes
    ----------
    said_by : str
        Where this is stated, for errors.
    activation : str
        One of `polyseme.sae.plain.ACTIVATIONS`.
    apply_b_dec_to_input : bool
        Whether the decoder bias is subtracted from the input.
    k, d_in, d_sae : int, optional
    decoder_bias : str, optional
        Name of the decoder bias.
    """

    said_by: str
    activation: str
    apply_b_dec_to_input: bool
    k: int | None = None
    d_in: int | None = None
    d_sae: int | None = None
    decoder_bias: str | None = None


def formula_of(file: Path, names: set[str]) -> Formula | None:
    """Read the formula of the SAE in a file, if its library wrote it beside the file.

    Parameters
    ----------
    file : Path
    names : set of str
        Names of its tensors: Gemma Scope's files may have no configuration.

    Returns
    -------
    Formula or None
        None if there is no configuration that polyseme knows.

    Raises
    ------
    InputError
        The configuration is damaged, or of a kind that polyseme does not read.
    """
    folders = [file.parent]
    if file.parent.name == "checkpoints":  # dictionary_learning's
        folders.append(file.parent.parent)
    for config in (folder / name for folder in folders for name in ("config.json", "cfg.json")):
        if config.is_file() and isinstance(content := read_json(config), Mapping):
            trainer = content.get("trainer")
            if isinstance(trainer, Mapping) and "dict_class" in trainer:
                return _dictionary_learning(config, trainer)
            if content.keys() >= {"k", "d_in", "expansion_factor"}:
                return _sparsify(config, content)
            if "hf_hook_point_in" in content:
                return _gemma_scope(config, content)
    gemma_scope = {"w_enc", "b_enc", "w_dec", "b_dec", "threshold"}
    if "Gemma" in WEIGHTS.get(file.name, "") and {name.lower() for name in names} == gemma_scope:
        for folder in file.absolute().parent.parts:
            if _TRANSCODERS.fullmatch(folder):
                raise InputError(
                    f"{file} is in a folder {folder!r}, so it is not an SAE. {NO_TRANSCODERS}."
                )
        return Formula(f"{WEIGHTS[file.name]}'s {file.name}", "jumprelu", False)
    return None


def _dictionary_learning(config: Path, trainer: Mapping[str, Any]) -> Formula:
    kind = trainer["dict_class"]
    if not isinstance(kind, str) or kind not in _DICTIONARIES:
        raise InputError(one_of(f"dict_class in {config}", str(kind), _DICTIONARIES))
    activation, centred, decoder_bias = _DICTIONARIES[kind]
    return Formula(
        f"{config} ({kind})",
        activation,
        centred,
        k=_count(config, trainer, "k") if activation == "topk" else None,
        d_in=_count(config, trainer, "activation_dim"),
        d_sae=_count(config, trainer, "dict_size"),
        decoder_bias=decoder_bias,
    )


def _sparsify(config: Path, content: Mapping[str, Any]) -> Formula:
    for name in ("transcode", "skip_connection"):
        if content.get(name, False) is not False:
            raise InputError(
                f"By {config}, whose {name!r} is {content[name]!r}, the weights are those of a "
                f"transcoder. {NO_TRANSCODERS}."
            )
    activation = content.get("activation", "topk")
    if activation != "topk" or content.get("signed", False) is not False:
        kind = repr(activation) if activation != "topk" else "a signed top-k"
        raise InputError(
            f"By {config}, the activation is {kind}; polyseme reads only 'topk' there."
        )
    return Formula(
        str(config),
        "topk",
        True,
        k=_count(config, content, "k"),
        d_in=_count(config, content, "d_in"),
        # 0 stands for a multiple of d_in.
        d_sae=_count(config, content, "num_latents") if content.get("num_latents") else None,
    )


def _gemma_scope(config: Path, content: Mapping[str, Any]) -> Formula:
    read = content["hf_hook_point_in"]
    written = content.get("hf_hook_point_out") or read
    kind = content.get("type") or "sae"
    if kind != "sae" or written != read or content.get("affine_connection"):
        raise InputError(
            f"By {config}, the weights are of type {kind!r}: they read {read!r} and write "
            f"{written!r}. {NO_TRANSCODERS}."
        )
    if content.get("architecture") != "jump_relu":
        architecture = str(content.get("architecture"))
        raise InputError(one_of(f"architecture in {config}", architecture, ["jump_relu"]))
    return Formula(str(config), "jumprelu", False)


def _count(config: Path, content: Mapping[str, Any], name: str) -> int | None:
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} in {config} is {value!r}; an integer of at least 1 is expected.")
    return value
