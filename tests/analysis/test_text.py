"""Texts through a language model to a run, against the model run one context at a time."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
import torch

import polyseme as ps
from polyseme.analysis import kinds
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError, RunError, SiteError
from polyseme.sites import find_sites
from polyseme.sites.activation import Activation
from polyseme.sites.layers import LinearSite

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = [
    "the river bank was green and the bank of the river was wide",
    "the bank lent money to the bank that lent it on",
    "a green light and a wide river " * 5,
    "money money on the light green bank",
]


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<eos>", "<pad>", "<unk>", *sorted({word for text in TEXT for word in text.split()})]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _rotary(model):
    model.model.rotary_emb.inv_freq *= 2


def _act_fn(model):
    model.model.layers[1].mlp.act_fn = transformers.activations.ACT2FN["gelu"]


def _eps(model):
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_rotary, r"model\.outputs differ by up to \S+ of the largest"),
        (_act_fn, r"modules\.model\.layers\.1\.mlp\.act_fn was .*SiLU.* and is now .*GELU"),
        (_eps, r"model\.config\.rms_norm_eps was 1e-06 and is now 0\.5"),
    ],
)
def test_a_model_that_computes_something_else_is_not_gone_on_with(
    tmp_path, tokenizer, monkeypatch, change, match
):
    model, sites = make("llama", len(tokenizer))
    contexts = Contexts(read_text(TEXT), tokenizer, length=8)
    options = {"sites": sites, "out": tmp_path / "run", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "cluster_site", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ps.analyse(model, contexts, **options)
    change(model)
    with pytest.raises(RunError, match=match):
        ps.analyse(model, contexts, **options, resume=True)


def interrupt(*_):
    raise KeyboardInterrupt


def make(family, vocabulary):
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64
        )
        return transformers.GPT2LMHeadModel(config).eval(), "transformer.h.*.mlp"
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval(), "model.layers.*.mlp"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def analysed(request, tokenizer, tmp_path_factory):
    model, sites = make(request.param, len(tokenizer))
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    out = tmp_path_factory.mktemp("text") / "run"
    run = ps.analyse(
        model, contexts, sites=sites, out=out, batch_size=3, select=ps.TopK(5), progress=False
    )
    return request.param, model, contexts, run


def hidden(model, layer, family, ids, attention):
    """What an MLP reads and its activations, for one context, by hooks of this test's own."""
    seen = {}
    if family == "gpt2":
        block = model.transformer.h[layer].mlp
        first, last = block.c_fc, block.c_proj
    else:
        block = model.model.layers[layer].mlp
        first, last = block.gate_proj, block.down_proj
    handles = [
        first.register_forward_pre_hook(lambda _, args: seen.update(h=args[0][0])),
        last.register_forward_pre_hook(lambda _, args: seen.update(a=args[0][0])),
    ]
    with torch.no_grad():
        mask = torch.tensor(attention)[None].long()
        model(input_ids=torch.tensor(ids)[None], attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen["h"], seen["a"]


def test_examples_are_the_strongest_places(analysed):
    family, model, contexts, run = analysed
    everything = [
        (ids, attention, mask)
        for batch in contexts.batches(4)
        for ids, attention, mask in zip(batch.ids, batch.attention, batch.mask, strict=True)
    ]
    for layer, site in enumerate(run.sites):
        name = site if isinstance(site, str) else site.name
        best, where, inputs, active_tokens = [], [], [], []
        for ids, attention, mask in everything:
            h, a = hidden(model, layer, family, ids, attention)
            a = a.masked_fill(~torch.tensor(mask)[:, None], -torch.inf)
            active_tokens.append((a[torch.tensor(mask)] > 0).double())
            values, positions = a.max(dim=0)
            best.append(values)
            where.append(positions)
            inputs.append(h)
        values, positions = torch.stack(best), torch.stack(where)
        neurons = run.neurons().query("site == @name")
        density = torch.cat(active_tokens).mean(dim=0)
        assert neurons["token_density"].to_numpy() == pytest.approx(density.numpy())
        for neuron in (0, 7, 15):
            mine = run.neuron(name, neuron).examples
            active = (values[:, neuron] > 0).nonzero()[:, 0]
            order = active[values[active, neuron].argsort(descending=True, stable=True)][:5]
            assert mine["input"].tolist() == order.tolist()
            assert mine["position"].tolist() == positions[order, neuron].tolist()
            assert mine["activation"].to_numpy() == pytest.approx(
                values[order, neuron].numpy(), abs=1e-5
            )
            vectors = torch.stack([inputs[i][positions[i, neuron]] for i in order])
            # They are kept in half precision, which rounds by up to 2^-11.
            found = run.neuron(name, neuron).vectors
            assert found == pytest.approx(vectors.numpy(), rel=2**-11, abs=1e-5)
            assert run.folder.site(layer)["vectors"].dtype == np.float16


def test_embeddings_are_h_times_the_gradient(analysed):
    family, model, _, run = analysed
    name = run.neurons()["site"].iloc[-1]
    block = (model.transformer.h if family == "gpt2" else model.model.layers)[1].mlp
    for neuron in (1, 9):
        mine = run.neuron(name, neuron)
        h = torch.tensor(mine.vectors, requires_grad=True)
        if family == "gpt2":
            # Of a linear neuron the direction counts: h ⊙ w.
            expected = h.detach() * block.c_fc.weight[:, neuron].detach()
        else:
            a = block.act_fn(block.gate_proj(h)) * block.up_proj(h)
            (gradient,) = torch.autograd.grad(a[:, neuron].sum(), h)
            expected = h.detach() * gradient
        assert mine.embeddings == pytest.approx(expected.numpy(), abs=1e-6)
        fresh = ps.cluster(mine.embeddings, mine.threshold)
        assert mine.clustering.labels.tolist() == fresh.labels.tolist()
        found = mine.assign(mine.vectors)
        assert set(found) <= {-1, *range(len(mine.features))}
        assert (found[[f.medoid for f in mine.features]] >= -1).all()


def test_windows(analysed):
    family, model, contexts, run = analysed
    name = run.neurons()["site"].iloc[0]
    batches = list(contexts.batches(1))
    neuron = run.neuron(name, 3)
    for window, row in zip(neuron.texts(), neuron.examples.itertuples(), strict=True):
        ids, attention = batches[row.input].ids[0], batches[row.input].attention[0]
        length = int(attention.sum())
        words = contexts.tokenizer.convert_ids_to_tokens(ids[:length].tolist())
        start = max(0, row.position - 20)
        assert window.tokens == words[start : row.position + 11]
        assert window.centre == row.position - start
        _, a = hidden(model, 0, family, ids, attention)
        expected = a[start : min(length, row.position + 11), 3].numpy()
        assert window.activations == pytest.approx(expected, rel=2e-3, abs=1e-4)
        assert f"»{words[row.position]}«" in str(window)


def test_texts_are_no_images(analysed):
    neuron = analysed[3].neuron(analysed[3].neurons()["site"].iloc[0], 3)
    for look in (neuron.figure, neuron.panel, neuron.inputs):
        with pytest.raises(InputError, match=r"on texts, not images; show its examples with te"):
            look()
    window = neuron.texts(neuron.examples.iloc[[neuron.features[0].medoid]])[0]
    words = [html.escape(word) for word in window.tokens]
    marked = "".join(
        f"<b>{word}</b>" if n == window.centre else word for n, word in enumerate(words)
    )
    assert f"<td>{marked}" in neuron._repr_html_()


def test_labels_and_logits(analysed):
    family, model, contexts, run = analysed
    features = run.folder.features
    words = {"<eos>", "<unk>", *contexts.tokenizer.get_vocab()}
    assert all(set(label.split()) <= words for label in features["label"])
    assert (features["label"].str.len() > 0).all()
    top = run.neuron(run.neurons()["site"].iloc[-1], 2).tokens()
    block = (model.transformer.h if family == "gpt2" else model.model.layers)[1].mlp
    direction = (
        block.c_proj.weight[2] if family == "gpt2" else block.down_proj.weight[:, 2]
    ).detach()
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    effect = (model.lm_head.weight * norm.weight).detach() @ (
        direction - direction.mean() if family == "gpt2" else direction
    )
    effect -= effect.mean()
    first = effect.argsort(descending=True)[:3].tolist()
    expected = contexts.tokenizer.convert_ids_to_tokens(first)
    assert top["promoted"]["token"].tolist()[:3] == expected
    assert (top["promoted"]["logit"].diff().dropna() <= 0).all()


def test_pictures_show_the_angles_between_examples(analysed):
    run = analysed[3]
    for number, name in enumerate(run.sites):
        for neuron in (0, 9):
            mine = run.neuron(name, neuron)
            for array, rows in (("layout", mine.embeddings), ("layout_input", mine.vectors)):
                stored = run.folder.site_rows(number, array, neuron, neuron + 1)
                unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                left, values, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
                assert (stored**2).sum() == pytest.approx((values[:2] ** 2).sum(), rel=1e-3)
                distances = np.linalg.norm(stored[:, None] - stored, axis=2)
                plane = (left * values)[:, :2]
                best = np.linalg.norm(plane[:, None] - plane, axis=2)
                if values[1] - values[2] > 0.2 * values[0]:
                    assert distances == pytest.approx(best, abs=0.03)


def test_features_are_found_by_their_tokens(analysed):
    run = analysed[3]
    folder = run.folder
    words = folder.token_texts
    features, examples = folder.features, folder.examples
    tokens = folder.inputs["tokens"][
        np.searchsorted(folder.inputs["index"], examples["input"]), examples["position"]
    ]
    expected: dict[str, list[tuple[int, int]]] = {word: [] for word in words}
    for row, feature in features.iterrows():
        mine = tokens[
            (examples["site"] == feature["site"])
            & (examples["neuron"] == feature["neuron"])
            & (examples["feature"] == feature["feature"])
        ]
        at = examples.query(
            "site == @feature.site and neuron == @feature.neuron and example == @feature.medoid"
        )
        assert feature[["input", "position"]].tolist() == at[["input", "position"]].iloc[0].tolist()
        for token, word in words.items():
            n = int((mine == token).sum())
            named = word in feature["label"].split() and len(mine) > 1
            if named or (n >= 2 and n >= 0.25 * len(mine)):
                expected[word].append((-n, row))
    for number, word in enumerate(words):
        found = folder.features_of_token(number).tolist()
        assert found == [row for _, row in sorted(expected[word])], word
    assert folder.neurons["n_random"].sum() == len(folder.random)


def test_a_resumed_run_is_identical_byte_for_byte(analysed, tokenizer, tmp_path):
    family, model, contexts, run = analysed
    sites = "transformer.h.*.mlp" if family == "gpt2" else "model.layers.*.mlp"
    arguments = {"sites": sites, "out": tmp_path / "again", "batch_size": 3, "progress": False}
    batches, given = contexts.batches, []

    def stopping(size, start=0):
        for batch in batches(size, start):
            if len(given) == 1:
                raise KeyboardInterrupt
            given.append(start)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "batches", stopping)
        with pytest.raises(KeyboardInterrupt):
            ps.analyse(model, contexts, select=ps.TopK(5), **arguments)
    ps.analyse(model, contexts, select=ps.TopK(5), resume=True, **arguments)
    for file in run.path.rglob("*"):
        if file.is_file() and file.name != "run.json":
            other = tmp_path / "again" / file.relative_to(run.path)
            assert other.read_bytes() == file.read_bytes(), file.name


def test_a_layer_knows_its_nonlinearity_after_the_pass_is_resumed(tokenizer, tmp_path):
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    layer = LinearSite("model.decoder.layers.0.fc1", model.model.decoder.layers[0].fc1)
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    arguments = {"sites": layer, "out": tmp_path / "run", "batch_size": 3, "progress": False}

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "cluster_site", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ps.analyse(model, contexts, **arguments)
    layer.activation, layer.proved = Activation(), False  # as in a new process
    run = ps.analyse(model, contexts, resume=True, **arguments)
    assert run.metadata["sites"][0]["activation"] == "relu"


def test_the_background_of_gated_neurons(tokenizer):
    model, sites = make("llama", len(tokenizer))
    [site, _] = find_sites(model, sites)
    neurons = site.neurons()
    assert neurons.gate == "silu"
    h = np.random.default_rng(0).normal(size=(9, 16))
    found = neurons.background_distance(h)
    for neuron in (0, 11):
        e = neurons.embed(h, np.full(9, neuron))
        unit = e / np.linalg.norm(e, axis=1, keepdims=True)
        cosines = (unit @ unit.T)[np.triu_indices(9, 1)]
        assert found[neuron] == pytest.approx(1 - cosines.mean(), abs=1e-5)


def test_bad_input(tokenizer, tmp_path, analysed):
    model, sites = make("gpt2", len(tokenizer))
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    with pytest.raises(SiteError, match=r"No (site|MLP) matches"):
        ps.analyse(model, contexts, sites="h.*.attention", out=tmp_path / "a", progress=False)
    with pytest.raises(InputError, match=r"batch_size is 0; a whole number of at least 1"):
        ps.analyse(model, contexts, sites=sites, out=tmp_path / "a", batch_size=0, progress=False)
    for window in ((1,), (-1, 2), (3, 2000), 5):
        with pytest.raises(InputError, match=re.escape(f"window is {window!r}; ")):
            ps.analyse(
                model, contexts, sites=sites, out=tmp_path / "a", window=window, progress=False
            )
    assert not (tmp_path / "a").exists()
    run = analysed[3]
    with pytest.raises(RunError, match=r"belongs to|other settings|exists"):
        ps.analyse(model, contexts, sites=sites, out=run.path, progress=False)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ({"labels": np.zeros(2, np.int64)}, "labels is given"),
        ({"class_names": ["a", "b"]}, "class_names is given"),
        ({"image_shape": (2, 2)}, r"image_shape is \(2, 2\)"),
        ({"panels": True}, "panels is True"),
        ({"panel_examples": 8}, "panel_examples is 8"),
        ({"baseline": 0.0}, r"baseline is 0\.0"),
    ],
)
def test_options_that_texts_have_no_use_for(tokenizer, option, shown, tmp_path):
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    (name,) = option
    with pytest.raises(
        InputError,
        match=rf"^{shown}, but the data is texts, and {name} is an option for images only; leave "
        r"it out\. Options for texts only are: window, importances\.$",
    ):
        ps.analyse(torch.nn.Linear(2, 2), contexts, sites="", out=tmp_path / "run", **option)
    assert not (tmp_path / "run").exists()


def test_the_window_is_an_option_of_analyse(tokenizer, tmp_path):
    model, sites = make("llama", len(tokenizer))
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    run = ps.analyse(
        model,
        contexts,
        sites=sites,
        out=tmp_path / "run",
        window=(2, 1),
        panels=False,
        progress=False,
    )
    assert run.metadata["settings"]["window"] == [2, 1]
    assert run.folder.site(0)["windows"].shape[1] == 4


def test_what_a_tokenizer_or_a_head_does_not_know_fails_nothing(tokenizer, tmp_path):
    contexts = Contexts(read_text(TEXT), tokenizer, length=12)
    # A vocabulary that is padded, as those of many models are.
    model, sites = make("llama", len(tokenizer) + 40)
    options = {"sites": sites, "progress": False, "select": ps.TopK(3)}
    run = ps.analyse(model, contexts, out=tmp_path / "padded", **options)
    words = run.folder.inputs
    assert "promoted_tokens" in run.folder.site(0)
    assert run.folder.site(0)["promoted_tokens"].max() >= len(tokenizer)
    assert words is not None
    # A projection between the residual stream and the head.
    config = transformers.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        ffn_dim=24,
        word_embed_proj_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    opt = transformers.OPTForCausalLM(config).eval()
    options["sites"] = "model.decoder.layers.0.fc1"
    run = ps.analyse(opt, contexts, out=tmp_path / "projected", **options)
    assert "promoted_tokens" not in run.folder.site(0)
