"""Every family of language models: what a site reads is what the model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyseme.errors import SiteError
from polyseme.sites import MLPSite, find_mlp_sites

transformers = pytest.importorskip("transformers")
modeling_auto = pytest.importorskip("transformers.models.auto.modeling_auto")

TABLES = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
SIZES = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "embedding_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 2),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_inner", "hidden_dim"], 24),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "d_ff"], 24),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 12),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 8, "head_dim": 8, "rotary_dim": 4, "word_embed_proj_dim": 16},
    **{"vocab_size": 50, "max_position_embeddings": 40, "n_positions": 40},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def small(family: str, kind: str) -> nn.Module:
    """A small model with random weights that are large enough to bend a nonlinearity."""
    plain = transformers.AutoConfig.for_model(family)
    own = {name: value for name, value in SIZES.items() if hasattr(plain, name)}
    name = TABLES[kind][family]
    make = getattr(transformers, name if isinstance(name, str) else name[0])
    model: nn.Module = make(transformers.AutoConfig.for_model(family, **own)).float().eval()
    if sum(parameter.numel() for parameter in model.parameters()) > 10**7:
        raise ValueError("large")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor + 0.3 * noise if tensor.ndim == 1 else 0.4 * noise)
    return model


class _StopError(Exception):
    pass


def seen(model: nn.Module, site: MLPSite, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the first layer is called with; a leaf in its place; what reaches the decoder."""
    first: list[Tensor] = []
    handle = site.reads[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    h = first[0]
    leaf = h.detach().clone().requires_grad_()
    reached: list[Tensor] = []

    def swap(_: nn.Module, args: Any, kwargs: Any) -> Any:
        def other(value: Any) -> Any:
            same = torch.is_tensor(value) and value.shape == h.shape and value.dtype == h.dtype
            return leaf if same and torch.allclose(value, h, rtol=1e-4, atol=1e-5) else value

        return tuple(map(other, args)), {name: other(value) for name, value in kwargs.items()}

    def stop(_: nn.Module, args: Any) -> None:
        reached.append(args[0])
        raise _StopError

    handles = [
        module.register_forward_pre_hook(swap, with_kwargs=True)
        for module in model.modules()
        if module is not model
    ]
    handles.append(site.decoder.register_forward_pre_hook(stop))
    with torch.enable_grad(), pytest.raises(_StopError):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return h, leaf, reached[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "family"), [(kind, family) for kind in TABLES for family in sorted(TABLES[kind])]
)
def test_embeddings_are_those_of_the_models_own_gradient(kind: str, family: str) -> None:
    try:
        model = small(family, kind)
    # Whatever a configuration of these sizes is no good for.
    except Exception as error:
        pytest.skip(f"not built: {type(error).__name__}")
    try:
        sites = find_mlp_sites(model)
    except SiteError:
        return
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(5))
    for site in sites:
        h, leaf, a = seen(model, site, {"input_ids": ids})
        rows = a.reshape(-1, a.shape[-1])
        active = (rows > 1e-3 * rows.abs().max()).nonzero()
        assert len(active)
        vectors, expected = h.reshape(-1, site.d_in), []
        for row, neuron in active[:: max(1, len(active) // 40)].tolist():
            (slope,) = torch.autograd.grad(rows[row, neuron], leaf, retain_graph=True)
            slope = slope.reshape(-1, site.d_in)
            assert not slope.any(dim=1)[torch.arange(len(slope)) != row].any()
            expected.append(vectors[row] * slope[row])
        picked = active[:: max(1, len(active) // 40)]
        found = site.embeddings(vectors[picked[:, 0]], picked[:, 1])
        truth = torch.stack(expected).detach()
        if site.kind == "mlp":
            # h ⊙ w: the same direction.
            found = found * (truth.norm(dim=1) / found.norm(dim=1))[:, None]
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-4 * float(truth.abs().max()))
