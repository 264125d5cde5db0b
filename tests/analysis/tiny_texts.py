"""A tiny language model with random weights, its tokenizer, a few texts, and what it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

TEXTS = [
    "the river bank was green and the bank of the river was wide",
    "the bank lent money to the bank that lent it on",
    "a green light and a wide river " * 5,
    "money money on the light green bank",
]
LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")


def make_tokenizer(*extra: str) -> Any:
    """A tokenizer of whole words, with an end of text and without a token for padding."""
    import tokenizers
    import transformers

    words = {word for text in TEXTS for word in text.split()}
    listed = ["<eos>", "<unk>", *sorted(words), *extra]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(listed)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"
    )


def make_model(vocabulary: int, seed: int = 0) -> Any:
    """A Llama of two layers, 16 wide, with gated MLPs of 24 neurons."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    return model


def mlp_of(model: Any, layer: int, ids: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """What one MLP reads at each token of one context, and its activations there."""
    mlp = model.model.layers[layer].mlp
    seen: dict[str, torch.Tensor] = {}
    handles = [
        mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.update(h=args[0][0])),
        mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(a=args[0][0])),
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids)[None])
    for handle in handles:
        handle.remove()
    return seen["h"], seen["a"]
