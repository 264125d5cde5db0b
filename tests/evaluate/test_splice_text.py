"""An SAE spliced into a language model, against the model edited by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyseme.data import TokenBatch
from polyseme.evaluate.sae import evaluate_splice, next_tokens

transformers = pytest.importorskip("transformers")


class SAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(16, 40) / 4)
        self.W_dec = nn.Parameter(torch.randn(40, 16) / 6)

    def encode(self, h):
        return torch.relu(h @ self.W_enc)

    def decode(self, a):
        return a @ self.W_dec


def test_cross_entropy_of_the_next_token():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, (6, 9))
    attention = np.ones(ids.shape, bool)
    attention[-1, 5:] = False
    batches = [
        TokenBatch(ids[k : k + 2], attention[k : k + 2], attention[k : k + 2]) for k in (0, 2, 4)
    ]
    sae = SAE()
    layer = model.model.layers[1].mlp.down_proj
    found = evaluate_splice(model, "model.layers.1.mlp.down_proj", sae, next_tokens(batches))

    def by_hand(edit):
        handle = layer.register_forward_hook(lambda _, args, output: edit(output))
        total, right, n = 0.0, 0, 0
        with torch.no_grad():
            for row, mask in zip(ids, attention, strict=True):
                length = int(mask.sum())
                logits = model(torch.tensor(row[:length])[None]).logits[0, :-1].log_softmax(-1)
                following = torch.tensor(row[1:length])
                total -= float(logits[torch.arange(length - 1), following].sum())
                right += int((logits.argmax(-1) == following).sum())
                n += length - 1
        handle.remove()
        return total / n, right / n, n

    loss, accuracy, n = by_hand(lambda output: output)
    assert found.n == n == 5 * 8 + 4
    assert (found.cross_entropy, found.accuracy) == pytest.approx((loss, accuracy), abs=1e-5)
    spliced, *_ = by_hand(lambda output: sae.decode(sae.encode(output)))
    ablated, *_ = by_hand(torch.zeros_like)
    assert found.spliced_cross_entropy == pytest.approx(spliced, abs=1e-5)
    assert found.ablated_cross_entropy == pytest.approx(ablated, abs=1e-5)
    assert found.recovered == pytest.approx((ablated - spliced) / (ablated - loss), rel=1e-3)
