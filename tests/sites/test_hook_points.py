"""Hook points by TransformerLens's names, against TransformerLens itself and by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyseme.errors import SiteError
from polyseme.sites import find_mlp_sites, list_sites
from polyseme.sites.hookpoints import KINDS, HookPoint, find_hook_point

from .language_models import tiny, tokens

pytest.importorskip("transformers")


def passing(model: nn.Module, point: HookPoint, inputs: dict[str, Tensor]) -> Tensor:
    """The vectors at a hook point, by a hook of this test's own."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
        returned = output if torch.is_tensor(output) else output[0]
        seen.append(returned if point.of_output else given)

    handle = point.module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    [found] = seen
    return found


def test_the_places_are_those_of_transformer_lens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = pytest.importorskip("transformer_lens")
        convert = pytest.importorskip("transformer_lens.pretrained.weight_conversions")
        model = tiny("gpt2")
        cfg = lens.HookedTransformerConfig(
            n_layers=2,
            d_model=16,
            n_ctx=32,
            d_head=8,
            n_heads=2,
            d_mlp=24,
            d_vocab=model.config.vocab_size,
            act_fn="gelu_new",
            normalization_type="LN",
            default_prepend_bos=False,
        )
        hooked = lens.HookedTransformer(cfg)
        hooked.load_state_dict(convert.convert_gpt2_weights(model, cfg), strict=False)
        ids = tokens(n=2, length=7)["input_ids"]
        with torch.no_grad():
            _, cache = hooked.run_with_cache(ids)
    for kind in KINDS:
        name = f"blocks.1.{kind}"
        expected = cache[name]
        if kind == "attn.hook_z":
            expected = expected.flatten(2)
        point = find_hook_point(model, name)
        found = passing(model, point, {"input_ids": ids})
        assert point.width == expected.shape[-1]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


SEQUENTIAL = ("opt", "gemma", "phi3")
PARALLEL = ("gpt_neox", "phi")


@pytest.mark.parametrize("family", [*SEQUENTIAL, *PARALLEL])
def test_the_parts_of_a_block_add_up(family: str) -> None:
    model = tiny(family)
    inputs = tokens()
    at = {
        kind: passing(model, find_hook_point(model, f"blocks.1.{kind}"), inputs).flatten(0, -2)
        for kind in KINDS
        if family in SEQUENTIAL or kind != "hook_resid_mid"
    }
    added = at["hook_attn_out"] + at["hook_mlp_out"]
    torch.testing.assert_close(at["hook_resid_pre"] + added, at["hook_resid_post"])
    if family in SEQUENTIAL:
        middle = at["hook_resid_pre"] + at["hook_attn_out"]
        torch.testing.assert_close(at["hook_resid_mid"], middle)
    mlp = find_mlp_sites(model)[1]
    with torch.no_grad():
        torch.testing.assert_close(mlp.decoder(at["mlp.hook_post"]), at["hook_mlp_out"])
    before = passing(model, find_hook_point(model, "blocks.0.hook_resid_post"), inputs)
    assert torch.equal(before.flatten(0, -2), at["hook_resid_pre"])


@pytest.mark.parametrize("family", PARALLEL)
def test_there_is_no_middle_where_the_halves_run_side_by_side(family: str) -> None:
    with pytest.raises(
        SiteError,
        match=r"^'blocks\.1\.hook_resid_mid' cannot be identified in this \w+: its block has no "
        r"norm that reads the residual stream right after attention\. Give the name of the module",
    ):
        find_hook_point(tiny(family), "blocks.1.hook_resid_mid")


def test_a_block_that_normalises_its_sum_is_refused() -> None:
    model = tiny("bert")
    for kind in ("hook_resid_post", "hook_mlp_out"):
        with pytest.raises(
            SiteError, match=r"cannot be identified in this BertForMaskedLM: the residual"
        ):
            find_hook_point(model, f"blocks.1.{kind}")
    point = find_hook_point(model, "blocks.1.mlp.hook_post")
    assert point.writes_by is model.bert.encoder.layer[1].output.dense


def test_modules_by_name() -> None:
    model = tiny("llama")
    mlp = find_hook_point(model, "model.layers.1.mlp")
    assert (mlp.width, mlp.of_output, mlp.writes_by) == (
        24,
        False,
        model.model.layers[1].mlp.down_proj,
    )
    for name, residual in (
        ("model.layers.1", True),
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.0.self_attn.q_proj", False),
        ("model.norm", False),
    ):
        point = find_hook_point(model, name)
        assert (point.module, point.of_output) == (model.get_submodule(name), True)
        assert (point.width, point.in_residual) == (16, residual)
    directions = torch.randn(3, 24)
    expected = directions @ model.model.layers[1].mlp.down_proj.weight.detach().T
    torch.testing.assert_close(mlp.written(directions), expected)
    assert find_hook_point(model, "model.norm").written(directions) is None
    assert {site.name for site in list_sites(model)} >= {"model.layers.1.mlp"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.2.hook_resid_post",
            r"^'blocks\.2\.hook_resid_post' is in block 2, but this Llama",
        ),
        (
            "blocks.0.hook_mlp_in",
            r"^'blocks\.0\.hook_mlp_in' is not supported\. Unknown hook: .* Mu",
        ),
        (
            "layers.1",
            r"^Unknown hook point: 'layers\.1'\. Did you mean .*Or give a hook point of Tr",
        ),
        ("", r"^Unknown hook point: ''\. "),
        (
            "model.rotary_emb",
            r"^'model\.rotary_emb' is a \w+ that does not return one vector per to",
        ),
    ],
)
def test_a_name_that_is_no_place(name: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_hook_point(tiny("llama"), name)


def test_a_model_that_is_none_of_transformers() -> None:
    with pytest.raises(SiteError, match=r"^The model is a Linear, not a transformers model, so"):
        find_hook_point(nn.Linear(2, 2), "blocks.0.hook_resid_post")
