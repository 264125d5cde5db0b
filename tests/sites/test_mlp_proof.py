"""What looks like an MLP and is not read as one: a sentence instead of wrong numbers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import polyseme as ps
from polyseme.errors import SiteError
from polyseme.sites import MLPSite, find_mlp_sites
from polyseme.sites.hookpoints import find_hook_point
from polyseme.sites.transformer import unread
from polyseme.sites.unembedding import unembedding

from .language_models import VOCABULARY, tiny

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "act",
    [
        # Near the tanh form that this model has, and far from it; the same up to a limit.
        F.gelu,
        lambda z: z * torch.sigmoid(1.702 * z),
        lambda z: F.gelu(z, approximate="tanh").clamp(max=5),
        lambda z: F.layer_norm(F.gelu(z, approximate="tanh"), (24,)),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_another_nonlinearity_than_the_models(act: Any, scale: float) -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        for block in model.transformer.h:
            mlp = block.mlp
            # So small that all of them are nearly the same line.
            mlp.c_fc.weight.mul_(scale)
            mlp.c_fc.bias.mul_(scale)
            mlp.forward = lambda h, mlp=mlp: mlp.c_proj(act(mlp.c_fc(h)))
    with pytest.raises(
        SiteError,
        match=r"The closest is 'transformer\.h\.\d\.mlp' with NewGELUActivation, but its "
        r"decoder's input differs from the resulting activations by "
        r"(up to [\d.]+%|more than their size)\. ",
    ):
        find_mlp_sites(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_tiny_weights_is_told_from_an_up_projection(dtype: torch.dtype) -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.mul_(1e-4)
    mlp.forward = lambda h: mlp.down_proj(mlp.act_fn(mlp.up_proj(h)) * mlp.gate_proj(h))
    (site,) = find_mlp_sites(model.to(dtype), "model.layers.0.mlp")
    assert site.reads == (mlp.up_proj, mlp.gate_proj)


class Normalised(nn.Linear):
    """A linear layer that normalises what it reads first, as BitNet's does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.layer_norm(x, (x.shape[-1],)), self.weight, self.bias)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_layers_with_a_forward_of_their_own(name: str) -> None:
    model = tiny("llama")
    for block in model.model.layers:
        plain = getattr(block.mlp, name)
        other = Normalised(plain.in_features, plain.out_features, bias=False)
        other.weight = plain.weight
        setattr(block.mlp, name, other)
    with pytest.raises(
        SiteError, match=r"comes close, but not all of its layers output their weig"
    ):
        find_mlp_sites(model)


def test_rows_that_are_not_in_the_order_of_the_text() -> None:
    model = tiny("gpt2")
    for block in model.transformer.h:
        plain = block.mlp.forward
        # All contexts at one position after the other.
        block.mlp.forward = lambda h, plain=plain: plain(h.transpose(0, 1).contiguous()).transpose(
            0, 1
        )
    with pytest.raises(SiteError, match=r"comes close, .* in order of contexts and tokens\."):
        find_mlp_sites(model)
    with pytest.raises(
        SiteError,
        match=r"^The vectors at 'transformer\.h\.0\.mlp\.c_fc' are not in",
    ):
        find_hook_point(model, "transformer.h.0.mlp.c_fc")


class Adapted(nn.Module):
    """A linear layer as PEFT adapts it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2 * self.lora_B["default"](self.lora_A["default"](x))


def adapted(family: str, target: str) -> Any:
    model = tiny(family)
    for name, module in list(model.named_modules()):
        if name.endswith(f".{target}"):
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, Adapted(module))
    return model


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "gate_proj"), ("llama", "down_proj"), ("opt", "fc2"), ("bert", "output.dense")],
)
def test_adapters_in_an_mlp(family: str, target: str) -> None:
    with pytest.raises(SiteError, match=r"several weights.*model = model\.merge_and_unload\(\)"):
        find_mlp_sites(adapted(family, target))


def test_adapters_elsewhere() -> None:
    model = adapted("llama", "q_proj")
    assert [site.name for site in find_mlp_sites(model)] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    assert "adapters, such as 'model.layers.0.self_attn.q_proj'" in unread(model)
    # An adapter of the head is no part of its weight.
    assert unembedding(model) is not None
    model.lm_head = Adapted(model.lm_head)
    assert unembedding(model) is None


def test_nonlinearities_whose_embeddings_the_weights_do_not_give() -> None:
    mlp = tiny("gpt2").transformer.h[0].mlp
    gated = tiny("llama").model.layers[0].mlp
    for act, what in (
        (torch.abs, "falls where it is positive, so that a neuron fires on opposite inputs"),
        (lambda z: F.normalize(z, dim=-1), "does not act on each neuron by itself"),
        (lambda z: torch.relu(z - z.mean(dim=0)), "does not act on each neuron by itself"),
    ):
        with pytest.raises(SiteError, match=rf"^MLP 'mine' has a nonlinearity, .*, that {what}"):
            MLPSite("mine", [mlp.c_fc], mlp.c_proj, act)
    slopes = torch.linspace(0, 1, 24)
    reads, decoder = [gated.gate_proj, gated.up_proj], gated.down_proj
    with pytest.raises(SiteError, match="that differs from neuron to neuron; it cannot be read"):
        MLPSite("mine", reads, decoder, lambda z: torch.where(z > 0, z, slopes * z))
    # What multiplies it may have any sign anyway.
    assert MLPSite("mine", reads, decoder, torch.abs).kind == "gated"


class Mixture(nn.Module):
    """Experts that are all asked, each for its tokens in the order of the router's choice."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        shares, chosen = self.router(flat).softmax(-1).topk(2)
        found = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            choice, token = torch.where(chosen.T.eq(number))
            found.index_add_(0, token, expert(flat[token]) * shares[token, choice, None])
        return found.reshape(x.shape)


def test_experts_are_named_and_not_read() -> None:
    torch.manual_seed(0)
    model = tiny("llama")
    model.model.layers[1].mlp = Mixture(model.model.layers[1].mlp)
    assert [site.name for site in find_mlp_sites(model)] == ["model.layers.0.mlp"]
    named = (
        r"Its experts are not read: model\.layers\.1\.mlp\.experts \(2\)\. An expert gets only the "
        r"tokens that a router picks for it"
    )
    with pytest.raises(SiteError, match=named):
        find_mlp_sites(model, "model.layers.1.*")
    # Weights of all experts in one tensor.
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    with pytest.raises(SiteError, match=r"not read: model\.layers\.0\.mlp\.experts \(3\)\."):
        find_mlp_sites(transformers.MixtralForCausalLM(config))


def test_blocks_have_the_models_own_numbers() -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda h: mlp.down_proj(torch.tanh(mlp.gate_proj(h)) * mlp.up_proj(h))
    point = find_hook_point(model, "blocks.1.hook_resid_post")
    assert point.module is model.model.layers[1]
    with pytest.raises(
        SiteError, match=r"in block 0, but .* has 1 blocks with a recognised MLP.* \(1\); "
    ):
        find_hook_point(model, "blocks.0.hook_resid_post")


def test_a_model_of_several_parts_names_them(tmp_path: Any) -> None:
    size = {
        **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
        **{"num_attention_heads": 2},
    }
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**size, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**size, "image_size": 8, "patch_size": 4},
        )
    ).eval()
    parts = r"model\.text_model \(CLIPTextModel\) or model\.vision_model \(CLIPVisionModel\)\.$"
    with pytest.raises(SiteError, match=rf"^CLIPModel does not run on texts alone: .* {parts}"):
        find_mlp_sites(clip)
    with pytest.raises(SiteError, match=rf"^CLIPModel does not run on images alone: .* {parts}"):
        ps.analyse(
            clip,
            np.zeros((2, 3, 8, 8), np.float32),
            sites="vision_model.*",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    (site,) = find_mlp_sites(clip.text_model)
    assert site.activation.name == "QuickGELUActivation"
