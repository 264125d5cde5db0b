"""SAEs at hook points of language models: their latents against sae.encode of what passes there."""

from __future__ import annotations

import os
import tempfile
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import polyseme as ps
from polyseme.analysis import token_vectors
from polyseme.analysis.importances import neuron_importances
from polyseme.attribution.truncated import Reach
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError, RunError, SiteError
from polyseme.sae import PlainSAE
from polyseme.sites import SAESite
from polyseme.sites.hookpoints import find_hook_point
from polyseme.sites.language import load_language_model
from polyseme.sites.saes import vectors_at
from polyseme.store.format import LARGEST_IMPORTANCE, NO_IMPORTANCE

from .tiny_texts import TEXTS, make_model, make_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

LENGTH = 8
# Hook point, width, and what the latents write there to the residual stream.
PLACES = {
    "blocks.0.hook_resid_post": (16, None),
    "blocks.1.hook_resid_pre": (16, None),
    "blocks.1.hook_mlp_out": (16, None),
    "blocks.1.mlp.hook_post": (24, "model.layers.1.mlp.down_proj"),
    "model.layers.0.mlp": (24, "model.layers.0.mlp.down_proj"),
    "blocks.0.attn.hook_z": (16, "model.layers.0.self_attn.o_proj"),
}


def make_sae(d_in, d_sae=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return PlainSAE(encoder, decoder, nn.ReLU()).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="module")
def contexts(tokenizer):
    return Contexts(read_text(TEXTS), tokenizer, length=LENGTH)


def hidden(model, name, ids):
    """What passes at a hook point in one context, from transformers' own list of hidden states."""
    seen = {}
    layers = model.model.layers
    handles = [
        layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, a: seen.update(z=a[0][0])),
        layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.update(post0=a[0][0])),
        layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.update(post1=a[0][0])),
        layers[1].mlp.register_forward_hook(lambda _, a, out: seen.update(mlp=out[0])),
    ]
    with torch.no_grad():
        states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return {
        "blocks.0.hook_resid_post": states[1][0],
        "blocks.1.hook_resid_pre": states[1][0],
        "blocks.1.hook_mlp_out": seen["mlp"],
        "blocks.1.mlp.hook_post": seen["post1"],
        "model.layers.0.mlp": seen["post0"],
        "blocks.0.attn.hook_z": seen["z"],
    }[name]


@pytest.mark.parametrize("name", PLACES)
def test_latents_are_what_the_sae_makes_of_what_passes(name, model, contexts, tmp_path):
    width, writes_by = PLACES[name]
    sae = make_sae(width)
    before = model(torch.tensor([[3, 4, 5]])).logits
    run = ps.analyse(
        model,
        contexts,
        sites=[ps.attach_sae(model, sae, name), "model.layers.1.mlp"],
        out=tmp_path / "run",
        select=ps.TopK(4),
        batch_size=3,
        progress=False,
    )
    assert torch.equal(model(torch.tensor([[3, 4, 5]])).logits, before)
    assert run.sites == ["model.layers.1.mlp", f"{name}.sae"]
    assert run.site(f"{name}.sae").extra["hook"] == name
    latents, reads = [], []
    for batch in contexts.batches(1):
        h = hidden(model, name, batch.ids[0][batch.attention[0]])
        a = sae.encode(h).detach()
        a[~torch.from_numpy(batch.mask[0][batch.attention[0]])] = -torch.inf
        latents.append(a)
        reads.append(h)
    for number in range(20):
        neuron = run.neuron(f"{name}.sae", number)
        best = torch.stack([a[:, number].max() for a in latents])
        where = [int(a[:, number].argmax()) for a in latents]
        order = [i for i in best.argsort(descending=True, stable=True).tolist() if best[i] > 0][:4]
        assert neuron.examples["input"].tolist() == order
        assert neuron.examples["position"].tolist() == [where[i] for i in order]
        assert neuron.examples["activation"].to_numpy() == pytest.approx(
            best[order].numpy(), rel=1e-4
        )
        for vector, i in zip(neuron.vectors, order, strict=True):
            # Runs of texts hold them in half precision.
            assert vector == pytest.approx(reads[i][where[i]].numpy(), rel=2**-10, abs=1e-5)
        assert neuron.weights == pytest.approx(sae.encoder.weight[number].detach().numpy())
    # Logit effects: the decoder's direction, through what follows, the norm and the unembedding.
    direction = sae.decoder.weight[:, 3].detach()
    if writes_by:
        direction = model.get_submodule(writes_by).weight.detach() @ direction
    effect = model.lm_head.weight.detach() @ (model.model.norm.weight.detach() * direction)
    effect -= effect.mean()
    top = run.neuron(f"{name}.sae", 3).tokens()["promoted"]
    assert top["logit"].to_numpy() == pytest.approx(
        effect.sort(descending=True).values[:10].numpy(), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("name", PLACES)
def test_a_run_that_stops_at_an_sae_reads_what_passes_there(name, model, contexts):
    sae = make_sae(PLACES[name][0])
    ids = next(iter(contexts.batches(1))).ids[:, :5]
    places, latents = (axis.ravel() for axis in np.indices((5, 20)))
    reach = Reach(model, [ps.attach_sae(model, sae, name)])
    with torch.no_grad():
        [found] = reach(ids, np.ones_like(ids, bool), [(0 * places, places, latents)])
        expected = sae.encode(hidden(model, name, ids[0])).flatten()
    torch.testing.assert_close(found, expected)


def test_several_saes_and_their_identity(model, contexts, tmp_path):
    name = "blocks.0.hook_resid_post"
    sites = [
        ps.attach_sae(model, make_sae(16, seed=seed), name, name=f"sae {seed}") for seed in (0, 1)
    ]
    options = {"out": tmp_path / "run", "select": ps.TopK(3), "progress": False}
    run = ps.analyse(model, contexts, sites=sites, **options)
    assert run.sites == ["sae 0", "sae 1"]
    assert not np.allclose(run.neuron("sae 0", 0).weights, run.neuron("sae 1", 0).weights)
    # The same again is the same analysis; with other SAEs it is another one.
    ps.analyse(model, contexts, sites=sites, resume=True, **options)
    others = [sites[0], ps.attach_sae(model, make_sae(16, seed=2), name, name="sae 1")]
    with pytest.raises(RunError):
        ps.analyse(model, contexts, sites=others, resume=True, **options)
    twins = [ps.attach_sae(model, make_sae(16, seed=s), name, name="x") for s in (0, 1)]
    with pytest.raises(SiteError, match=r"^Two sites are called 'x'; give one of them another n"):
        ps.analyse(model, contexts, sites=twins, out=tmp_path / "twins", progress=False)


def test_probing_takes_the_sae_too(model, tokenizer, contexts, tmp_path):
    name, sae = "blocks.0.hook_resid_post", make_sae(16)
    run = ps.analyse(
        model,
        contexts,
        sites=[ps.attach_sae(model, sae, name), "model.layers.1.mlp"],
        out=tmp_path / "run",
        progress=False,
    )
    text = "the green bank lent money"
    with pytest.raises(
        InputError,
        match=r"^Site 'blocks\.0\.hook_resid_post\.sae' of the run is an SAE at 'blocks\.0\.hook_r"
        r"esid_post'; give the SAE by the site's name, saes=\{\.\.\.\} \(--sae on the command lin",
    ):
        run.probe(text, model, tokenizer)
    assert set(run.probe(text, model, tokenizer, sites="*.mlp").neurons["site"]) == {
        "model.layers.1.mlp"
    }
    found = run.probe(text, model, tokenizer, saes={f"{name}.sae": sae}, k=100).neurons
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    latents = sae.encode(hidden(model, name, ids)).detach().numpy()
    mine = found[found["site"] == f"{name}.sae"]
    assert len(mine) == (latents[1:] > 0).sum()
    assert mine["activation"].to_numpy() == pytest.approx(
        latents[mine["token"], mine["neuron"]], rel=1e-4
    )
    with pytest.raises(InputError, match=r"has different weights in the model and in the run"):
        run.probe(text, model, tokenizer, saes={f"{name}.sae": make_sae(16, seed=5)})


def test_importances_on_demand_are_those_that_a_run_stores(model, tokenizer, contexts, tmp_path):
    name, sae = "blocks.0.hook_resid_post", make_sae(16)
    run = ps.analyse(
        model,
        contexts,
        sites=ps.attach_sae(model, sae, name),
        out=tmp_path / "run",
        importances="exact",
        progress=False,
    )
    [site] = run.sites
    counts = run.neurons()["n_examples"].to_numpy()
    first = np.cumsum(counts) - counts
    stored = run.folder.site(0)["importances"].astype(float)
    latents = np.flatnonzero(counts > 2)[:3]
    assert len(latents) == 3
    for latent in latents.tolist():
        found = neuron_importances(model, tokenizer, run, site, latent, saes={site: sae})
        mine = stored[first[latent] : first[latent] + counts[latent]]
        expected = np.where(mine == NO_IMPORTANCE, np.nan, mine / LARGEST_IMPORTANCE)
        assert found == pytest.approx(expected, abs=0.003, nan_ok=True)
    with pytest.raises(InputError, match=r"give the SAE by the site's name, saes=\{"):
        neuron_importances(model, tokenizer, run, site, 0)


class _Described(nn.Module):
    """An SAE that says where it belongs, as those of SAELens do."""

    def __init__(self, sae, **metadata):
        super().__init__()
        self.sae = sae
        self.cfg = type("Config", (), {"metadata": metadata})()

    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.decoder.weight.T)

    def encode(self, h):
        return self.sae.encode(h)

    def decode(self, a):
        return self.sae.decode(a)


def test_the_hook_point_comes_from_the_sae(model):
    described = _Described(make_sae(16), hook_name="blocks.1.hook_resid_pre")
    site = ps.attach_sae(model, described)
    assert isinstance(site, SAESite)
    assert (site.name, site.point.name) == (
        "blocks.1.hook_resid_pre.sae",
        "blocks.1.hook_resid_pre",
    )
    assert ps.attach_sae(model, described, "model.layers.1").point.name == "model.layers.1"
    assert ps.attach_sae(model, _Described(make_sae(24), site="model.layers.1.mlp")).d_in == 24


def test_vectors_less_their_mean(tokenizer):
    """TransformerLens takes the mean off what is written, where every norm does so anyway."""
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpt2 = transformers.GPT2LMHeadModel(config).eval()
    sae = make_sae(16)
    metadata = {
        "hook_name": "blocks.1.hook_resid_post",
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
    }
    site = ps.attach_sae(gpt2, _Described(sae, **metadata))
    h = torch.randn(5, 16)
    centred = h - h.mean(dim=1, keepdim=True)
    torch.testing.assert_close(site.encode(h), sae.encode(centred))
    rows = torch.arange(5)
    torch.testing.assert_close(site.gather(h[:, None], rows, 0 * rows), centred)
    # Not what passes within the MLP, and not for a model whose norms leave the mean in.
    assert not ps.attach_sae(
        gpt2, _Described(make_sae(64), **{**metadata, "hook_name": "blocks.1.mlp.hook_post"})
    ).centred
    llama = make_model(len(tokenizer))
    assert not ps.attach_sae(llama, _Described(sae, **metadata)).centred


def test_bad_saes(model):
    with pytest.raises(
        SiteError,
        match=r"^The SAE reads vectors of length 12, but those at 'blocks\.0\.hook_resid_post' "
        r"have length 16; give the hook point that it was trained on\.",
    ):
        ps.attach_sae(model, make_sae(12), "blocks.0.hook_resid_post")
    with pytest.raises(
        InputError, match=r"^The SAE does not say at which hook point it was trained"
    ):
        ps.attach_sae(model, make_sae(16))
    with pytest.raises(InputError, match=r"^sae is a str; expected an SAE from polyseme\.load_sae"):
        ps.attach_sae(model, "saes/mine", "blocks.0.hook_resid_post")
    with pytest.raises(InputError, match=r"^The SAE is a Linear without encode\(\)"):
        ps.attach_sae(model, nn.Linear(16, 16), "blocks.0.hook_resid_post")


def test_vectors_of_tokens_that_count(model, tokenizer, contexts, tmp_path):
    name = "blocks.1.hook_resid_pre"
    wanted = []
    for batch in contexts.batches(1):
        h = hidden(model, name, batch.ids[0][batch.attention[0]])
        wanted.append(h[torch.from_numpy(batch.mask[0][batch.attention[0]])])
    expected = torch.cat(wanted)
    assert len(expected) < sum(int(batch.attention.sum()) for batch in contexts.batches(1))
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        for options in ({}, {"file": file, "batch_size": 3}):
            found = token_vectors(model, contexts, name, progress=False, **options)
            torch.testing.assert_close(found, expected)
        assert os.fstat(file.fileno()).st_size == expected.numel() * 4
    assert not list(tmp_path.iterdir())
    point = find_hook_point(model, name)
    parts = list(vectors_at(model, point, contexts.batches(2)))
    assert torch.equal(torch.cat(parts), token_vectors(model, contexts, point, progress=False))
    short = Contexts(read_text(["bank"]), tokenizer, length=LENGTH)
    with pytest.raises(InputError, match=r"^No token of list counts: all are special, or first in"):
        token_vectors(model, short, name, progress=False)


def test_an_sae_of_smollm2(smollm2_folder, tmp_path):
    """Trained on real activations, saved, loaded, attached where it says it belongs, analysed."""
    pytest.importorskip("sae_lens")
    model, tokenizer = load_language_model(smollm2_folder)
    # Nothing after the layer that is read matters here, and this is quicker.
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    contexts = Contexts(read_text(), tokenizer, length=64, max_tokens=700)
    hook = "blocks.2.hook_resid_post"
    vectors = token_vectors(model, contexts, hook, progress=False)
    ps.train_sae(
        vectors,
        64,
        steps=200,
        batch_size=128,
        l1_coefficient=0.1,
        out=tmp_path / "sae",
        progress=False,
        metadata={"hook_name": hook},
    )
    sae = ps.load_sae(tmp_path / "sae")
    site = ps.attach_sae(model, sae)
    run = ps.analyse(
        model, contexts, sites=site, out=tmp_path / "run", select=ps.TopK(8), progress=False
    )
    with torch.no_grad():
        latents = sae.encode(vectors)
    # Its strongest activation, over all tokens that count, is the neuron's maximum in the run.
    neurons = run.neurons()
    assert neurons["max_activation"].to_numpy() == pytest.approx(
        latents.amax(dim=0).numpy(), rel=1e-3, abs=1e-3
    )
    assert (neurons["n_examples"] > 0).mean() > 0.5
    alive = int(neurons["n_examples"].argmax())
    again = sae.encode(torch.from_numpy(run.neuron(alive).vectors))[:, alive].detach()
    assert run.neuron(alive).examples["activation"].to_numpy() == pytest.approx(
        again.numpy(), rel=5e-3
    )
