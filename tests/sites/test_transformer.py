"""MLPs of transformers: that they are found, and that what is read is what the model computes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyseme.capture import Batch, Collector, TopK
from polyseme.core import gated_gradient, neuron_embeddings
from polyseme.errors import InputError, SiteError
from polyseme.sites import (
    Feed,
    MLPSite,
    Reading,
    Site,
    edit_site,
    evaluating,
    find_mlp_sites,
    find_sites,
    list_sites,
    prove_sites,
    read_sites,
)
from polyseme.sites.layers import LinearSite

from .language_models import FAMILIES, VOCABULARY, layer_names, tiny, tokens
from .models import convolutional
from .test_hooks import assert_equal, everything

pytest.importorskip("transformers")

GATED = [family for family, (kind, *_) in FAMILIES.items() if kind == "gated"]


def everywhere(inputs: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool)


@cache
def model_of(family: str) -> Any:
    return tiny(family)


def called(model: nn.Module, name: str, inputs: Any) -> tuple[Tensor, Tensor]:
    """What a module is called with and what it gives, by a hook of the test's own."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    ((given, output),) = seen
    # OPT lays all positions one after the other.
    shape = (*inputs["input_ids"].shape, -1)
    return given.reshape(shape), output.reshape(shape)


def read(model: nn.Module, site: Site, inputs: Any, mask: Tensor | None) -> tuple[Reading, Tensor]:
    """A site's reading of a batch, and the vector that each neuron read: (B, n, d_in)."""
    found: list[tuple[Reading, Tensor]] = []

    def on_reading(site: Site, reading: Reading, gather: Any) -> None:
        n, m = reading.activations.shape
        rows, neurons = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        places = site.place(reading.positions[rows, neurons], neurons)
        found.append((reading, gather(rows, places).reshape(n, m, -1)))

    with torch.no_grad(), read_sites(model, [site], on_reading, mask):
        Feed(model, head=False)(inputs)
    ((reading, vectors),) = found
    return reading, vectors


# --- finding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mlps_of_each_family(family: str) -> None:
    model = model_of(family)
    kind, name, _ = FAMILIES[family]
    sites = find_mlp_sites(model)
    assert [site.name for site in sites] == [name, name.replace(".0.", ".1.")]
    for site in sites:
        assert isinstance(site, MLPSite)
        assert (site.kind, site.n_neurons, site.d_in) == (kind, 24, 16)
        assert site.weights().shape == (24, 16)
    *reads, decoder = (model.get_submodule(layer) for layer in layer_names(family))
    assert sites[0].reads == tuple(reads)
    assert sites[0].decoder is decoder
    assert sites[0].module is model.get_submodule(name)
    # Without the head, and as the base model of it, they are the same.
    bare = find_mlp_sites(model.base_model)
    assert [site.module for site in bare] == [site.module for site in sites]


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_follow_from_input_and_weights(family: str) -> None:
    model, inputs = model_of(family), tokens()
    site = find_mlp_sites(model)[0]
    *reads, decoder = layer_names(family)
    h, _ = called(model, reads[0], inputs)
    a, _ = called(model, decoder, inputs)
    with torch.no_grad():
        torch.testing.assert_close(site.encode(h), a)
        # By the formula, from the parts that are public.
        drive = F.linear(h, site.weights(), site.bias())
        expected = site.act(drive)
        if site.kind == "gated":
            expected = expected * F.linear(h, site.up_weights(), site.up_bias())
        else:
            assert site.up_weights() is None
            assert site.up_bias() is None
    torch.testing.assert_close(expected, a)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_reaches_the_output(family: str) -> None:
    model, inputs = model_of(family), tokens()
    site = find_mlp_sites(model)[0]
    decoder = model.get_submodule(layer_names(family)[-1])
    with torch.no_grad():
        before = model(**inputs).logits
        with edit_site(site, lambda a: None):
            assert torch.equal(model(**inputs).logits, before)
        with edit_site(site, torch.zeros_like):
            found = model(**inputs).logits
        kept = decoder.weight.clone()
        decoder.weight.zero_()
        expected = model(**inputs).logits
        decoder.weight.copy_(kept)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


def test_looking_for_mlps_leaves_no_trace() -> None:
    model = tiny("llama").train()
    model.model.layers[0].mlp.eval()
    before = everything(model)
    find_mlp_sites(model, fold_layer_norm=True)
    list_sites(model)
    assert_equal(everything(model), before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(family: str, dtype: torch.dtype) -> None:
    sites = find_mlp_sites(tiny(family).to(dtype))
    assert [site.name for site in sites] == [site.name for site in find_mlp_sites(tiny(family))]
    assert sites[0].decoder.weight.dtype == dtype


def test_a_gate_is_told_from_an_up_projection() -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    # What the names say is not what the module does.
    mlp.forward = lambda h: mlp.down_proj(mlp.act_fn(mlp.up_proj(h)) * mlp.gate_proj(h))
    first, second = find_mlp_sites(model)
    assert first.reads == (mlp.up_proj, mlp.gate_proj)
    other = model.model.layers[1].mlp
    assert second.reads == (other.gate_proj, other.up_proj)


def test_names_alone_prove_nothing() -> None:
    model = tiny("gpt2")
    for block in model.transformer.h:
        mlp = block.mlp
        mlp.forward = lambda h, mlp=mlp: mlp.c_proj(torch.tanh(mlp.c_fc(h)))
    with pytest.raises(
        SiteError,
        match=r"^No MLP was recognised in this GPT2LMHeadModel; expected a linear layer, or a gate "
        r"and an up projection, then the model's nonlinearity .*\. The closest is "
        r"'transformer\.h\.\d\.mlp' with NewGELUActivation, .*\. Make a site by hand, "
        r"MLPSite\(name, reads=\[first linear layers\], decoder=second linear layer, "
        r"act=nonlinearity\), or give the name of a linear layer \(--sites; polyseme sites lists "
        r"them\)\.$",
    ):
        find_mlp_sites(model)
    # As the message says, by hand.
    mlp = model.transformer.h[0].mlp
    site = MLPSite("mine", reads=[mlp.c_fc], decoder=mlp.c_proj, act=torch.tanh)
    reading, vectors = read(model, site, tokens(), None)
    with torch.no_grad():
        drive = torch.einsum("bnd,nd->bn", vectors, site.weights()) + site.bias()
    torch.testing.assert_close(torch.tanh(drive), reading.activations)
    assert site.activation.name == "tanh"


def test_an_mlp_that_nothing_reads_is_none() -> None:
    model = tiny("gpt2")
    mlp = model.transformer.h[0].mlp
    mlp.forward = lambda h: mlp.c_proj(mlp.act(mlp.c_fc(h))) * 0
    assert [site.name for site in find_mlp_sites(model)] == ["transformer.h.1.mlp"]


def test_a_layer_that_is_called_twice_is_none() -> None:
    model = tiny("gpt2")
    mlp, plain = model.transformer.h[1].mlp, model.transformer.h[1].mlp.forward
    mlp.forward = lambda h: plain(plain(h))
    assert [site.name for site in find_mlp_sites(model)] == ["transformer.h.0.mlp"]


def test_models_that_are_refused() -> None:
    import transformers

    with pytest.raises(SiteError, match=r"^The model is a Sequential, not a transformers model"):
        find_mlp_sites(convolutional())
    config = transformers.AutoConfig.for_model(
        "t5", d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8, vocab_size=20
    )
    t5 = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(
        SiteError,
        match=r"^T5ForConditionalGeneration is an encoder-decoder, .* model\.get_encoder\(\)\.$",
    ):
        find_mlp_sites(t5)
    config = transformers.AutoConfig.for_model(
        **{"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8},
        **{"num_attention_heads": 1, "intermediate_size": 12, "patch_size": 4},
    )
    vit = transformers.AutoModel.from_config(config)
    with pytest.raises(
        SiteError, match=r"^ViTModel has no token embedding; expected a language model"
    ):
        find_mlp_sites(vit)
    # Such models are read by their layers.
    assert {site.kind for site in list_sites(vit)} == {"conv", "linear"}


def test_quantised_weights_are_refused() -> None:
    model = tiny("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    for look in (find_mlp_sites, list_sites):
        with pytest.raises(
            SiteError,
            match=r"^The weights of layer 'model\.layers\.1\.mlp\.up_proj' are quantised "
            r"\(torch\.int8\), so neurons have no weight vectors to read; load the model in flo",
        ):
            look(model)


def test_a_model_that_wants_more_than_tokens() -> None:
    model = tiny("gpt2")
    model.transformer.forward = lambda input_ids, attention_mask, image=None: image.shape
    with pytest.raises(
        SiteError, match=r"^GPT2LMHeadModel does not run on 5 tokens alone, which finding its MLPs "
    ):
        find_mlp_sites(model)
    assert {site.kind for site in list_sites(model)} == {"linear"}


# --- names -------------------------------------------------------------------------------------


def test_names_and_globs() -> None:
    model = model_of("llama")
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    for wanted in (None, "*", "model.layers.*.mlp", names):
        assert [site.name for site in find_mlp_sites(model, wanted)] == names
    assert [site.name for site in find_mlp_sites(model, names[1])] == names[1:]
    with pytest.raises(
        SiteError,
        match=r"^No MLP matches 'model\.layers\.9\.mlp'\. The model's MLPs are: model\.layers\.0",
    ):
        find_mlp_sites(model, "model.layers.9.mlp")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_mlp_is_one_site_among_the_others(family: str) -> None:
    model = model_of(family)
    kind, name, _ = FAMILIES[family]
    sites = {site.name: site for site in list_sites(model)}
    assert sites[name].kind == kind
    inside = set(layer_names(family)) - {name}
    assert not inside & set(sites)
    assert {site.kind for site in sites.values()} == {kind, "linear"}
    (found,) = find_sites(model, name)
    assert isinstance(found, MLPSite)
    glob = name.replace(".0.", ".*.")
    assert [site.name for site in find_sites(model, glob)] == [name, name.replace(".0.", ".1.")]
    # Any one of its layers is a site by itself when it is named.
    for layer in inside:
        (alone,) = find_sites(model, layer)
        assert type(alone) is LinearSite


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [True, False])
def test_readings_are_of_positions_that_count(family: str, padded: bool) -> None:
    model, inputs = model_of(family), tokens()
    mask = inputs["attention_mask"].bool() if padded else everywhere(inputs)
    if padded:
        mask[2] = False  # nothing counts in this one
        mask[3] = torch.arange(9) % 2 == 1
    site = find_mlp_sites(model)[1]
    name = [layer.replace(".0.", ".1.") for layer in layer_names(family)]
    h, _ = called(model, name[0], inputs)
    a, _ = called(model, name[-1], inputs)
    reading, vectors = read(model, site, inputs, mask)
    for b in range(len(a)):
        for j in range(24):
            allowed = mask[b].nonzero()[:, 0].tolist()
            best = max(allowed, key=lambda p: a[b, p, j].item(), default=None)
            if best is None:
                assert reading.activations[b, j] == 0
                assert reading.positions[b, j] == 0
                assert not reading.input_mask[b]
                continue
            torch.testing.assert_close(reading.activations[b, j], a[b, best, j])
            assert int(reading.positions[b, j]) == best
            torch.testing.assert_close(vectors[b, j], h[b, best])


def test_rows_of_all_positions_one_after_the_other() -> None:
    model, inputs = tiny("gpt2"), tokens()
    site = find_mlp_sites(model)[0]
    expected, vectors = read(model, site, inputs, inputs["attention_mask"].bool())
    mlp, plain = model.transformer.h[0].mlp, model.transformer.h[0].mlp.forward
    # As OPT has long done it.
    mlp.forward = lambda h: plain(h.reshape(-1, h.shape[-1])).reshape(h.shape)
    (same,) = find_mlp_sites(model, site.name)
    found, rows = read(model, same, inputs, inputs["attention_mask"].bool())
    torch.testing.assert_close(found.activations, expected.activations)
    assert torch.equal(found.positions, expected.positions)
    torch.testing.assert_close(rows, vectors)


def test_mask_must_fit_the_layer() -> None:
    model, inputs = model_of("gpt2"), tokens()
    site = find_mlp_sites(model)[0]
    wrong = torch.arange(7) < torch.arange(6)[:, None]
    with pytest.raises(
        InputError, match=r"^mask has shape \(6, 7\), but the layer has \(6, 9\) inputs and pos"
    ):
        read(model, site, inputs, wrong)


# --- embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", [True, False])
def test_embeddings_against_the_models_own_mlp(
    family: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    if not known:  # as of a gate that core has no closed form of
        monkeypatch.setattr("polyseme.sites.mlp.known_gate", lambda _: None)
    site = find_mlp_sites(model)[0]
    generator = torch.Generator().manual_seed(3)
    h = torch.randn(50, 16, generator=generator)
    neurons = torch.randint(24, (50,), generator=generator)
    layer = site.neurons()
    assert layer.is_general == (site.kind == "gated" and not known)
    found = torch.from_numpy(layer.embed(h.numpy(), neurons.numpy()))
    reached: list[Tensor] = []
    handle = site.decoder.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    leaf = h.clone().requires_grad_()
    if site.module is site.reads[0]:
        site.decoder(site.act(site.module(leaf)))
    else:
        site.module(leaf)
    handle.remove()
    a = reached[0][torch.arange(50), neurons]
    (gradient,) = torch.autograd.grad(a.sum(), leaf)
    if site.kind == "gated":
        torch.testing.assert_close(found, h * gradient, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, h * site.weights()[neurons])
        # The same direction as the gradient's, wherever the nonlinearity has a slope.
        sloping = gradient.abs().amax(dim=1) > 1e-3
        assert sloping.sum() > 15
        cosine = F.cosine_similarity(found, h * gradient).abs()[sloping]
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-5, atol=1e-5)


def test_embeddings_against_the_closed_form() -> None:
    site = find_mlp_sites(model_of("llama"))[0]
    h = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    found = site.neurons().embed(h, np.full(9, 5))
    weights = site.weights().numpy(), site.up_weights().numpy()
    gradient = gated_gradient(h, weights[0][5], weights[1][5], activation="silu")
    np.testing.assert_allclose(found, neuron_embeddings(h, gradient), atol=1e-5)
    assert found.dtype == np.float32


def test_embeddings_of_other_sites() -> None:
    linear = nn.Linear(5, 4).bfloat16()
    (site,) = find_sites(nn.Sequential(linear), "0")
    h, neurons = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 3, 0])
    found = site.neurons().embed(h.numpy(), neurons.numpy())
    torch.testing.assert_close(torch.from_numpy(found), h * linear.weight.detach().float()[neurons])


# --- by hand -----------------------------------------------------------------------------------


def test_layers_that_make_no_mlp() -> None:
    first, second = nn.Linear(4, 6), nn.Linear(6, 4)
    assert MLPSite("m", [first], second, F.relu).kind == "mlp"
    assert MLPSite("m", [nn.Linear(4, 12)], second, F.relu).kind == "gated"
    assert MLPSite("m", [first, nn.Linear(4, 6)], second, F.relu).kind == "gated"
    for reads, decoder, act, message in (
        ([], second, F.relu, "has 0 layers in reads; expected one, or a gate and an up"),
        ([first] * 3, second, F.relu, "has 3 layers in reads"),
        ([nn.ReLU()], second, F.relu, "has a ReLU among its layers; expected Linear or Conv1D"),
        ([first], nn.Sequential(second), F.relu, "has a Sequential among its layers"),
        (
            [first],
            second,
            "relu",
            "has 'relu' as its nonlinearity; expected a function or a module",
        ),
        ([nn.Linear(4, 5)], second, F.relu, r"shapes \[\(5, 4\)\], but its decoder takes 6 values"),
        ([first, nn.Linear(3, 6)], second, F.relu, r"shapes \[\(6, 4\), \(6, 3\)\], but its dec"),
    ):
        with pytest.raises(SiteError, match=f"^MLP 'm' (reads with layers of )?{message}"):
            MLPSite("m", reads, decoder, act)  # type: ignore[arg-type]


# --- the norm before ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_norm_changes_no_activation(family: str) -> None:
    model, inputs = tiny(family), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, folded = find_mlp_sites(model)[0], find_mlp_sites(model, fold_layer_norm=True)[0]
    one, vectors = read(model, plain, inputs, everywhere(inputs))
    two, normalised = read(model, folded, inputs, everywhere(inputs))
    assert torch.equal(one.activations, two.activations)
    torch.testing.assert_close(vectors, normalised * folded.gain + folded.shift)
    # What is read is the norm's output before its gain: of length √d, and centred or not.
    assert 0.9 < float(normalised.square().mean()) < 1.01
    assert not torch.allclose(normalised, vectors, atol=0.1)
    with torch.no_grad():
        again = folded.encode(normalised)[:, torch.arange(24), torch.arange(24)]
    torch.testing.assert_close(again, one.activations, rtol=1e-4, atol=1e-4)
    assert torch.equal(folded.weights(), plain.weights() * folded.gain)
    # The embeddings are those of the folded weights: gradient times what is read.
    h = normalised[:, 0].clone().requires_grad_()
    neurons = torch.arange(6)
    (slope,) = torch.autograd.grad(folded.encode(h)[neurons, neurons].sum(), h)
    found = torch.from_numpy(folded.neurons().embed(h.detach().numpy(), neurons.numpy()))
    expected = (h * slope).detach()
    if folded.kind == "mlp":
        # Along the gradient; of ReLU, nothing where it is flat.
        expected = F.normalize(expected) * (found * expected).sum(1, keepdim=True).sign()
        found = F.normalize(found) * (expected != 0).any(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_equal(dict(model.state_dict()), before)


def test_a_gain_of_zero_reads_zero() -> None:
    model, inputs = tiny("llama"), tokens()
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = 0
    site = find_mlp_sites(model, fold_layer_norm=True)[0]
    reading, vectors = read(model, site, inputs, None)
    assert (vectors[..., 3] == 0).all()
    assert torch.isfinite(vectors).all()
    with torch.no_grad():
        again = site.encode(vectors)[:, torch.arange(24), torch.arange(24)]
    torch.testing.assert_close(again, reading.activations, rtol=1e-4, atol=1e-4)


def test_an_mlp_without_a_norm_before_it() -> None:
    model = tiny("gpt2")
    model.transformer.h[0].ln_2 = nn.Identity()
    assert len(find_mlp_sites(model)) == 2
    with pytest.raises(
        SiteError,
        match=r"^MLP 'transformer\.h\.0\.mlp' does not read the output of a layer norm with "
        "its own gain, so there is nothing to fold; leave fold_layer_norm out",
    ):
        find_mlp_sites(model, fold_layer_norm=True)
    site = find_mlp_sites(model)[0]
    with pytest.raises(SiteError, match=r"^The gain has shape \(3,\); expected \(16,\)"):
        site.fold(torch.ones(3), torch.zeros(16))
    folded = site.fold(torch.ones(16), torch.zeros(16))
    with pytest.raises(SiteError, match="already has a layer norm folded in"):
        folded.fold(torch.ones(16), torch.zeros(16))


# --- the pass over the data --------------------------------------------------------------------


def batches(inputs: dict[str, Tensor], sizes: list[int], mask: Any = None) -> list[Batch]:
    parts, at = [], 0
    for size in sizes:
        part = slice(at, at + size)
        named = {name: values[part] for name, values in inputs.items()}
        raw = inputs["input_ids"][part].numpy()
        parts.append(Batch(named, raw, mask=None if mask is None else mask[part]))
        at += size
    return parts


def collect(model: nn.Module, parts: list[Batch]) -> Any:
    work = Collector(model, find_sites(model, "*.mlp"), TopK(3), n_random=2, seed=1)
    assert list(work.run(parts))[-1] == sum(len(part.raw) for part in parts)
    return work.result()


def test_a_pass_over_tokens() -> None:
    model, inputs = model_of("llama"), tokens(40)
    mask = inputs["attention_mask"].bool()
    mask[:, 0] = False
    mask[7] = False
    results, kept = collect(model, batches(inputs, [11, 29], mask))
    assert [found.site.name for found in results] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for number, found in enumerate(results):
        layer = f"model.layers.{number}.mlp"
        a, _ = called(model, f"{layer}.down_proj", inputs)
        h, _ = called(model, f"{layer}.gate_proj", inputs)
        strongest = a.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
        strongest[7] = 0
        for j in range(24):
            own = found.examples.neuron == j
            order = np.argsort(-strongest[:, j].numpy(), kind="stable")[:3]
            chosen = [i for i in order if strongest[i, j] > 0]
            assert sorted(found.examples.index[own].tolist()) == sorted(chosen)
        index, position = found.examples.index, found.examples.position
        assert mask[index, position].all()
        torch.testing.assert_close(
            torch.from_numpy(found.vectors[found.vector]), h[index, position]
        )
        # The background: nothing of padding, and nothing of the input without a position.
        assert found.background.shape == (1, 39, 16)
        allowed = h[mask]
        for row in torch.from_numpy(found.background[0]):
            assert (allowed - row).abs().amax(dim=1).min() < 1e-5
        assert all(len(values) == 24 for values in found.statistics.values())
    assert np.array_equal(kept["rows"], inputs["input_ids"][kept["index"]].numpy())


def test_the_attention_mask_counts_where_nothing_else_is_said() -> None:
    model, inputs = model_of("llama"), tokens(20)
    given, _ = collect(model, batches(inputs, [20], inputs["attention_mask"]))
    implied, _ = collect(model, batches(inputs, [20]))
    for one, two in zip(given, implied, strict=True):
        assert np.array_equal(one.examples.index, two.examples.index)
        assert np.array_equal(one.examples.position, two.examples.position)
        assert inputs["attention_mask"][two.examples.index, two.examples.position].all()
    bare = {"input_ids": inputs["input_ids"]}
    everywhere, _ = collect(model, batches(bare, [20]))
    assert everywhere[0].examples.position.max() == 8


def test_mask_is_a_value_for_each_position() -> None:
    model, inputs = model_of("llama"), tokens(4)
    for mask in (np.ones(4, bool), np.ones((3, 9), bool)):
        with pytest.raises(
            InputError, match=r"^mask has shape .* for 4 inputs; expected one value per"
        ):
            collect(model, [Batch(inputs, inputs["input_ids"].numpy(), mask=mask)])


def test_the_head_is_left_out_where_no_site_needs_it() -> None:
    model, inputs = model_of("llama"), tokens(4)
    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    collect(model, batches(inputs, [4]))
    assert not calls
    # A site in the head does need it.
    work = Collector(model, find_sites(model, "lm_head"), TopK(3))
    list(work.run(batches(inputs, [4])))
    assert calls
    handle.remove()


def test_nothing_is_found_out_about_an_mlp() -> None:
    model = model_of("llama")
    sites = find_mlp_sites(model)
    names = [site.activation.name for site in sites]
    with evaluating(model):
        prove_sites(model, sites, Feed(model, head=False), tokens(2))
    assert [site.activation.name for site in sites] == names == ["SiLUActivation"] * 2


def test_tokens_that_the_model_does_not_know() -> None:
    inputs = tokens(2)
    inputs["input_ids"] += VOCABULARY
    with pytest.raises(
        InputError,
        match=r"^The model does not accept a batch of input_ids \(2, 9\), attention_mask \(2, 9\): "
        r".*Give it arrays from its own tokenizer, no longer than the model allows\.$",
    ):
        Feed(model_of("gpt2"))(inputs)


def test_a_model_behind_the_hooks_of_device_map_is_read_where_it_lies() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = tiny("llama"), tokens(12)
    parts = batches(inputs, [12], inputs["attention_mask"].bool())
    expected, _ = collect(model, parts)
    hooks.attach_align_device_hook(model, execution_device="cpu")
    assert "forward" in vars(model.model.layers[0].mlp.gate_proj)
    results, _ = collect(model, parts)
    for found, wanted in zip(results, expected, strict=True):
        assert np.array_equal(found.vectors, wanted.vectors)
        assert np.array_equal(found.examples.activation, wanted.examples.activation)
        assert np.array_equal(found.neurons.weights, wanted.neurons.weights)


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.*.mlp"])
def test_rejects_offloaded_weights(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny("llama"), execution_device="cpu")
    with pytest.raises(SiteError, match=r"are not in memory: load the model without offloading"):
        find_sites(model, name)
