"""Tiny language models of several families, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCABULARY = 50

_COMMON = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 32},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_OWN: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        **{"n_inner": 24, "bos_token_id": 1, "eos_token_id": 2},
    },
    "opt": {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gemma": {**_COMMON, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
}
_GROUPED = ("llama", "mistral", "qwen2", "phi3")

# Family: kind of its MLPs, name of the first one, and of its linear layers, the decoder last.
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "gpt2": ("mlp", "transformer.h.0.mlp", ["c_fc", "c_proj"]),
    "gpt_neox": ("mlp", "gpt_neox.layers.0.mlp", ["dense_h_to_4h", "dense_4h_to_h"]),
    "opt": ("mlp", "model.decoder.layers.0.fc1", ["", "../fc2"]),
    "bert": ("mlp", "bert.encoder.layer.0.intermediate.dense", ["", "../../output.dense"]),
    "llama": ("gated", "model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
    "mistral": ("gated", "model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
    "qwen2": ("gated", "model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
    "gemma": ("gated", "model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"]),
    "phi": ("mlp", "model.layers.0.mlp", ["fc1", "fc2"]),
    "phi3": ("gated", "model.layers.0.mlp", ["gate_up_proj", "down_proj"]),
}


def layer_names(family: str) -> list[str]:
    """Full names of the linear layers of the first MLP, its decoder last."""
    _, name, layers = FAMILIES[family]
    found = []
    for layer in layers:
        base, rest = name, layer
        while rest.startswith("../"):
            base, rest = base.rpartition(".")[0], rest.removeprefix("../")
        found.append(".".join(filter(None, [base, rest])))
    return found


def tiny(family: str, seed: int = 0) -> nn.Module:
    """A model of two layers, 16 wide, with MLPs of 24 neurons; norms and biases are random."""
    import transformers

    options = _OWN.get(family, {**_COMMON, "intermediate_size": 24})
    if family in _GROUPED:
        options = {**options, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(family, **options)
    auto = (
        transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    )
    generator = torch.Generator().manual_seed(seed)
    model: nn.Module = auto.from_config(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            # Of a norm or a bias, about what it was; of a matrix, enough to bend a nonlinearity.
            tensor.copy_(tensor + 0.3 * noise if tensor.ndim == 1 else 0.4 * noise)
    return model


def tokens(n: int = 6, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random contexts, padded on the right to lengths of 2 and more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator)
    lengths = torch.randint(2, length + 1, (n, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.where(mask > 0, ids, 0), "attention_mask": mask}
