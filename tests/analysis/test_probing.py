"""A text through the model of a run, against the same worked out one token at a time."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

import polyseme as ps
from polyseme import views
from polyseme.analysis import probing
from polyseme.analysis.live import live_probe, probe_json
from polyseme.analysis.probing import Prober, probe
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError
from polyseme.sites import find_mlp_sites
from polyseme.store import RunFolder
from polyseme.views import Probe

from .tiny_texts import LAYERS, TEXTS, make_model, make_tokenizer, mlp_of

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

LENGTH = 8
NEW = "green money lent the river that was on a wide bank the light"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="module")
def run(model, tokenizer, tmp_path_factory):
    return ps.analyse(
        model,
        Contexts(read_text(TEXTS), tokenizer, length=LENGTH),
        sites=list(LAYERS),
        out=tmp_path_factory.mktemp("probed") / "run",
        select=ps.TopK(6),
        progress=False,
    )


def expected(run, model, tokenizer, text, k, by):
    """Rows (token, site, neuron, activation, share, feature), in plain loops."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    neurons = run.neurons().set_index(["site", "neuron"])
    rows = []
    for start in range(0, len(ids), LENGTH):
        context = np.array(ids[start : start + LENGTH])
        read = [mlp_of(model, layer, context) for layer in range(2)]
        for place in range(1, len(context)):
            found = []
            for layer, (h, a) in zip(LAYERS, read, strict=True):
                for number in range(24):
                    activation = float(a[place, number])
                    if activation <= 0:
                        continue
                    largest = float(neurons.loc[(layer, number), "max_activation"])
                    share = activation / largest if largest > 0 else np.nan
                    rank = activation if by == "activation" else np.nan_to_num(share)
                    neuron = run.neuron(layer, number)
                    feature = int(neuron.assign(h[place : place + 1])[0])
                    found.append((rank, start + place, layer, number, activation, share, feature))
            rows += [row[1:] for row in sorted(found, key=lambda row: -row[0])[:k]]
    return rows


@pytest.mark.parametrize(("by", "k"), [("share", 5), ("activation", 3), ("share", 1000)])
def test_the_most_active_neurons_and_their_features(run, model, tokenizer, by, k):
    found = run.probe(NEW, model, tokenizer, k=k, by=by)
    assert found.tokens == NEW.split()
    # 13 words in contexts of 8: the first of each is left out, as in the run.
    assert found.mask.tolist() == [place not in (0, 8) for place in range(13)]
    rows = expected(run, model, tokenizer, NEW, k, by)
    frame = found.neurons
    assert len(frame) == len(rows) > 20
    assert frame["text"].tolist() == [NEW.split()[row[0]] for row in rows]
    for column, name in enumerate(("token", "site", "neuron")):
        assert frame[name].tolist() == [row[column] for row in rows]
    assert frame["activation"].to_numpy() == pytest.approx([row[3] for row in rows], rel=1e-4)
    assert frame["share"].to_numpy() == pytest.approx(
        [row[4] for row in rows], rel=1e-4, nan_ok=True
    )
    assert frame["feature"].tolist() == [row[5] for row in rows]
    assert by == "activation" or {-1} < set(frame["feature"])
    features = run.folder.features.set_index(["site", "neuron", "feature"])
    for row in frame.itertuples():
        known = features.loc[(row.site, row.neuron, row.feature)] if row.feature >= 0 else None
        assert row.label == ("" if known is None else known["label"])
        assert row.n_examples == (0 if known is None else known["n_examples"])


def test_examples_of_the_run_are_found_again(run, model, tokenizer):
    """Probing what was analysed gives back each example, its activation and its feature."""
    found = run.probe(TEXTS[0], model, tokenizer, k=1000).neurons
    by_place = {(row.token, row.site, row.neuron): row for row in found.itertuples()}
    checked = 0
    for example in run.folder.examples.itertuples():
        if example.input != 0:
            continue
        row = by_place[example.position, example.site, example.neuron]
        assert row.activation == pytest.approx(example.activation, rel=1e-4)
        assert row.share <= 1 + 1e-5
        neuron = run.neuron(example.site, example.neuron)
        vector = neuron.vectors[example.example : example.example + 1]
        assert row.feature == neuron.assign(vector)[0]
        checked += 1
    assert checked > 10


def test_sites_and_long_texts(run, model, tokenizer):
    one = run.probe(NEW, model, tokenizer, sites="*.1.mlp", k=4)
    assert set(one.neurons["site"]) == {LAYERS[1]}
    long = " ".join([NEW] * 9)
    whole = run.probe(long, model, tokenizer, k=2)
    assert len(whole.tokens) == 9 * 13
    # In batches of eight contexts, and as if each context were all.
    assert whole.neurons["token"].is_monotonic_increasing
    part = Contexts(read_text([long]), tokenizer, length=LENGTH)
    words = [batch.ids[0] for batch in part.batches(1)]
    last = " ".join(tokenizer.convert_ids_to_tokens(words[12].tolist()))
    alone = run.probe(last, model, tokenizer, k=2).neurons
    same = whole.neurons[whole.neurons["token"].between(12 * LENGTH, 13 * LENGTH - 1)]
    assert same["neuron"].tolist() == alone["neuron"].tolist()
    cut = run.probe(long, model, tokenizer, k=2, max_tokens=20)
    assert (len(cut.tokens), cut.truncated, whole.truncated) == (20, True, False)
    assert not run.probe(NEW, model, tokenizer, max_tokens=13).truncated


def test_a_neuron_that_the_run_never_saw_active_comes_last(run, model, tokenizer, monkeypatch):
    prober = Prober(run, model, tokenizer)
    full = prober.probe(NEW, k=1000).neurons
    first = full.iloc[0]
    row = LAYERS.index(first["site"]) * 24 + first["neuron"]
    monkeypatch.setitem(vars(prober), "_max", prober._max.copy())
    prober._max[row] = 0
    now = prober.probe(NEW, k=1000).neurons
    here = now[now["token"] == first["token"]]
    assert (here.iloc[-1]["site"], here.iloc[-1]["neuron"]) == (first["site"], first["neuron"])
    assert np.isnan(here.iloc[-1]["share"])
    assert here["share"].iloc[:-1].notna().all()


def test_the_text_of_a_probe(run, model, tokenizer):
    found = run.probe("the river bank", model, tokenizer, k=2)
    text = str(found)
    assert text.startswith(
        "The 2 neurons with the largest share of their maximum at each token; 1 tok"
    )
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "/" in line][:1] == ["river"]
    for row in found.neurons.itertuples():
        assert f"{row.site}/{row.neuron}" in text
        assert f"{row.share:.0%}" in text
    assert "<table" in found._repr_html_()
    assert repr(found).startswith("Probe(3 tokens, ")


def test_tokens_are_hostile():
    hostile = ["<script>", "[red]x[/red]", "\n", "[/]"]
    frame = pd.DataFrame(
        {
            "token": range(4),
            "text": hostile,
            "site": "[bold]s",
            "neuron": 1,
            "activation": np.float32(1.5),
            "share": np.float32(0.5),
            "meaning": [0, -1, 1, 0],
            "meaning_cosine": [0.5, 0.1, 0.25, -0.5],
            "feature": [0, -1, 2, 0],
            "label": ["[i]word", "", "<b>", ""],
            "n_examples": [3, 0, 2, 4],
        }
    )
    found = Probe(hostile, np.ones(4, bool), frame, "share", 1)
    page = io.StringIO()
    Console(file=page, width=200, color_system=None).print(found.table())
    for shown in ("<script>", "[red]x[/red]", "⏎", "[/]", "[bold]s/1", "[i]word (3)", "<b> (2)"):
        assert shown in page.getvalue()
    for shown in ("0 (0.50)", "none (0.10)", "1 (0.25)", "0 (-0.50)"):
        assert shown in page.getvalue()
    html = found._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_the_explorer_gets_json(run, model, tokenizer):
    live = live_probe(model, tokenizer)
    found = live(run, NEW, 3)
    assert json.loads(json.dumps(found)) == found
    plain = run.probe(NEW, model, tokenizer, k=3)
    assert found["tokens"] == plain.tokens
    assert found["left_out"] == (~plain.mask).tolist()
    assert found["truncated"] is False
    assert [row["neuron"] for row in found["active"]] == plain.neurons["neuron"].tolist()
    assert {row["site"] for row in found["active"]} == {0, 1}
    assert set(found["active"][0]) == {
        *("token", "site", "neuron", "activation", "share"),
        *("meaning", "meaning_cosine", "feature", "label", "n_examples"),
    }
    assert live(run, " ".join(["bank"] * 600), 1)["truncated"] is True
    with pytest.raises(InputError, match=r"^k is 1000; a whole number from 1 to 100 is expected\."):
        probe_json(Prober(run, model, tokenizer), NEW, 1000)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, r"^text is ''; expected text with a character other than white space\."),
        (" \n", {}, r"^text is ' \\n'; expected text"),
        (["a"], {}, r"^text is \['a'\]; expected text"),
        (NEW, {"k": 0}, r"^k is 0; a whole number of at least 1 is expected\."),
        (NEW, {"by": "size"}, r"^Unknown ranking: 'size'\. Must be one of: share, activation\."),
        (
            NEW,
            {"sites": "h.*"},
            r"^Unknown site of the run: 'h\.\*'\. .*Must be one of: model\.lay",
        ),
        (NEW, {"max_tokens": 0}, r"^max_tokens is 0; "),
    ],
)
def test_bad_options(run, model, tokenizer, text, options, message):
    with pytest.raises(InputError, match=message):
        run.probe(text, model, tokenizer, **options)


def test_another_model_or_tokenizer(run, model, tokenizer):
    with pytest.raises(
        InputError,
        match=r"^Neuron \d+ of site 'model\.layers\.\d\.mlp' has different weights in the "
        r"model and in the run; give the model that was analysed\.",
    ):
        run.probe(NEW, make_model(len(tokenizer), seed=1), tokenizer)
    with pytest.raises(
        InputError, match=r"^The tokenizer, a \w+, has a different vocabulary from the"
    ):
        run.probe(NEW, model, make_tokenizer("more"))
    with pytest.raises(
        InputError, match=r"^The model is not the one of the run, which was a Llama"
    ):
        run.probe(NEW, torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(
        InputError, match=r"^model is a str; expected the torch\.nn\.Module that was analysed"
    ):
        run.probe(NEW, "smollm2", tokenizer)
    with pytest.raises(
        InputError, match=r"^The tokenizer is missing; give model and tokenizer tog"
    ):
        run.probe(NEW, model)


def test_half_precision_is_the_same_model(run, model, tokenizer):
    half = make_model(len(tokenizer)).to(torch.bfloat16)
    found = run.probe(NEW, half, tokenizer, k=3).neurons
    exact = run.probe(NEW, model, tokenizer, k=3).neurons
    both = found.merge(exact, on=["token", "site", "neuron"])
    assert len(both) > 0.6 * len(exact)
    assert both["activation_x"].to_numpy() == pytest.approx(
        both["activation_y"].to_numpy(), rel=0.2, abs=0.1
    )


def test_a_model_is_loaded_only_if_it_comes_as_a_package(run, model, tokenizer, monkeypatch):
    loaded = []

    def load(name):
        loaded.append(name)
        return model, tokenizer

    monkeypatch.setattr(probing, "_packaged", load)
    reopened = ps.open_run(run.path)
    with pytest.raises(
        InputError,
        match=r"^Probing this run needs its model: give model and tokenizer, as polyseme\.s",
    ):
        reopened.probe(NEW)
    monkeypatch.setitem(reopened.metadata["model"], "name", "evil/model")
    with pytest.raises(InputError, match=r"\(according to the run, 'evil/model'\): give model"):
        reopened.probe(NEW)
    assert loaded == []
    monkeypatch.setitem(reopened.metadata["model"], "name", "smollm2")
    assert len(reopened.probe(NEW).neurons)
    assert loaded == ["smollm2"]


def test_a_run_opened_without_models(run):
    with pytest.raises(
        InputError, match=r"^This run was opened with polyseme\.views, which cannot"
    ):
        views.Run(RunFolder(run.path)).probe(NEW)


def test_norms_that_were_folded_in(model, tokenizer, tmp_path):
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.copy_(torch.rand(16) + 0.5)
    contexts = Contexts(read_text(TEXTS), tokenizer, length=LENGTH)
    runs = [
        ps.analyse(
            model,
            contexts,
            sites=find_mlp_sites(model, fold_layer_norm=folded),
            out=tmp_path / str(folded),
            select=ps.TopK(6),
            progress=False,
        )
        for folded in (True, False)
    ]
    probes = [probe(run, NEW, model, tokenizer, k=4).neurons for run in runs]
    assert probes[0]["neuron"].tolist() == probes[1]["neuron"].tolist()
    first = next(iter(runs[0].neurons().query("n_examples > 0").itertuples()))
    neuron = runs[0].neuron(first.site, first.neuron)
    gain = model.model.layers[0].post_attention_layernorm.weight.detach().numpy()
    plain = runs[1].neuron(first.site, first.neuron)
    # Kept in half precision, both of them.
    assert neuron.vectors * gain == pytest.approx(plain.vectors, rel=2e-3, abs=1e-5)


def test_images_are_not_probed(tmp_path):
    from .small import MLP, flat_inputs, make

    run = ps.analyse(make(MLP), flat_inputs(), sites="first", out=tmp_path / "run", progress=False)
    with pytest.raises(
        InputError, match=r"^The run is of images; probing a text needs a run of texts"
    ):
        run.probe(NEW)
