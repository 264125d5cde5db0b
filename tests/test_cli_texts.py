"""The command line on a language model: a folder as transformers writes it, and texts."""

from __future__ import annotations

import argparse
import json
from collections import Counter

import numpy as np
import pytest
import torch

import polyseme as ps
from polyseme import cli
from polyseme.cli.language_models import count
from polyseme.data import Contexts, read_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "the bank of the river is green and the bank lends money on the river " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model with its tokenizer, saved as any checkpoint is."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = ["<eos>", "<unk>", *sorted(set(TEXT.split()))]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def said(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_analyse(place, folder, capsys):
    arguments = ["analyse", folder, "--text", "text.txt", "--context", "16", "--out", "run"]
    status, out, err = said(capsys, *arguments, "--quiet", "--select", "TopK(4)")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]
    run = ps.open_run("run")
    assert run.metadata["data"]["kind"] == "text"
    assert run.metadata["data"]["length"] == 16
    assert run.metadata["data"]["leave_out"] == ["special", "first"]
    assert (run.folder.examples["position"] > 0).all()
    window = run.neuron("model.layers.0.mlp", 3).texts()[0]
    assert window.tokens[window.centre] in TEXT.split()
    status, _, err = said(capsys, *arguments, "--quiet")
    assert status == 1
    assert "--overwrite" in err


def test_shards_are_merged_into_the_run_of_one_pass(place, folder, capsys):
    (place / "long.txt").write_text(TEXT * 24)
    arguments = ["analyse", folder, "--text", "long.txt", "--context", "16", "--batch-size", "32"]
    arguments += ["--quiet", "--select", "TopK(4)"]
    assert said(capsys, *arguments, "--out", "whole")[0] == 0
    for shard in ("2/2", "1/2"):
        status, out, err = said(capsys, *arguments, "--shard", shard, "--out", f"s/{shard[0]}")
        assert (status, err) == (0, "")
        assert out.startswith(f"The shard is at s/{shard[0]}: inputs ")
    status, out, err = said(capsys, "merge", "s/1", "s/2", "--out", "run", "--quiet")
    assert (status, out) == (1, "")
    assert "Give model= and tokenizer= (--model)" in err
    merge = ["merge", "s/1", "s/2", "--model", folder, "--quiet"]
    status, out, err = said(capsys, *merge, "--out", "run")
    assert (status, err) == (0, "")
    assert "The run is at run" in out
    for file in ("examples.parquet", "neurons.parquet", "inputs.safetensors"):
        assert (place / "run" / file).read_bytes() == (place / "whole" / file).read_bytes()
    status, out, err = said(capsys, *merge[:2], *merge[3:], "--out", "part")
    assert (status, out) == (1, "")
    assert "Shards are missing" in err
    assert "--allow-missing" in err
    assert said(capsys, *merge[:2], *merge[3:], "--out", "part", "--allow-missing")[0] == 0
    assert ps.open_run("part").metadata["missing_inputs"]
    for wrong in (["--shard", "3/2"], ["--shard", "1/2", "--engine", "ray"], ["--workers", "2"]):
        status, out, err = said(capsys, *arguments, *wrong, "--out", "none")
        assert (status, out) == (1, "")
        assert err.count("\n") == 1


def test_fewer_tokens_one_layer_and_the_first_token(place, folder, capsys):
    arguments = ["analyse", folder, "--text", "text.txt", "--context", "16", "--out", "run"]
    arguments += ["--tokens", "32", "--sites", "*.1.mlp", "--keep", "first", "--quiet"]
    status, out, _ = said(capsys, *arguments)
    assert status == 0
    assert out.count("neurons") == 1
    run = ps.open_run("run")
    assert run.metadata["data"]["n_inputs"] == 2
    assert run.metadata["data"]["max_tokens"] == 32
    assert run.metadata["data"]["leave_out"] == ["special"]
    assert (run.folder.examples["position"] == 0).any()


def test_sites(folder, capsys):
    status, out, err = said(capsys, "sites", folder)
    assert (status, err) == (0, "")
    assert "model.layers.0.mlp  " in out
    assert "gated" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["models.py:net"], "Give either --data for images or --text for a language model; --text"),
        (["x", "--text", "text.txt", "--data", "x.npz"], "Give either --data for images or --text"),
        (
            ["models.py:net", "--text", "text.txt"],
            "with --text, expected a language model with its",
        ),
        (["./nowhere", "--text", "text.txt"], "nowhere"),
        (["FOLDER", "--text", "missing.txt"], "missing.txt"),
        (["FOLDER", "--text", "text.txt", "--sites", "layers.9"], "layers.9"),
        (["FOLDER", "--text", "text.txt", "--context", "2"], "length is 2"),
        (["models.py:net", "--data", "x.npz"], "No layers given; pass --sites"),
    ],
)
def test_bad_input(place, folder, capsys, arguments, message):
    arguments = [str(folder) if word == "FOLDER" else word for word in arguments]
    status, out, err = said(capsys, "analyse", *arguments, "--out", "run", "--quiet")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("source", "option", "other"),
    [
        *(("--text", option, "--data") for option in ("--limit 5", "--mean 0.5", "--no-panels")),
        ("--text", "--image-shape 2,2", "--data"),
        *(("--data", option, "--text") for option in ("--tokens 50k", "--context 64")),
        *(("--data", option, "--text") for option in ("--keep first", "--importances exact")),
    ],
)
def test_options_of_the_other_kind_of_data(source, option, other, capsys):
    flag = option.split()[0]
    for command in (
        ["analyse", "M", "--sites", "x"],
        ["train-sae", "M", "--site", "x"],
        ["sweep", "M", "--site", "x"],
    ):
        if command[0] != "analyse":
            if flag in ("--no-panels", "--image-shape", "--importances"):
                continue
            command.extend(["--d-sae", "4"])
        given = [*command, source, "here", "--out", "none", *option.split()]
        assert cli.main(given) == 1
        expected = f"{flag} applies to {other}, not to {source}; leave it out."
        assert expected in capsys.readouterr().err


def test_sweep(place, folder, capsys):
    pytest.importorskip("sae_lens")
    (place / "text.txt").write_text(TEXT * 5)
    arguments = ["sweep", folder, "--text", "text.txt", "--context", "16", "--out", "swept"]
    arguments += ["--site", "model.layers.1.post_attention_layernorm", "--d-sae", "8"]
    arguments += ["--architecture", "topk", "--k", "4", "--epochs", "2", "--batch-size", "32"]
    arguments += ["--ne", "0,5", "--seeds", "1", "--quiet"]
    status, out, err = said(capsys, *arguments)
    assert (status, err) == (0, "")
    records = sorted((place / "swept" / "records").glob("*.json"))
    assert [file.stem for file in records] == ["none-ne0-seed0", "weighted-ne5-seed0"]
    record = json.loads(records[0].read_text())
    assert "accuracy" not in record
    # Tokens are the labels; "the" is the most common of the 13 words.
    contexts = Contexts(
        read_text("text.txt"), transformers.AutoTokenizer.from_pretrained(folder), length=16
    )
    tokens = contexts.counted_tokens()
    counted = [batch.ids[batch.mask] for batch in contexts.batches(1)]
    assert tokens.tolist() == np.concatenate(counted).tolist()
    common = Counter(tokens.tolist()).most_common(1)[0][1] / len(tokens)
    assert record["random_n"] > 0
    assert common / 2 < record["random_purity_null"] <= record["random_purity"] <= 1
    assert said(capsys, *arguments)[1] == out, "a sweep goes on with the same text"
    status, _, err = said(capsys, *arguments, "--context", "17")
    assert status == 1
    assert "swept holds a different sweep" in err


def test_counts():
    assert [count(t) for t in ("7", "50k", "1M", "1.5M", "2B")] == [7, 50_000, 10**6, 1.5e6, 2e9]
    for text in ("0", "-3", "k", "1.5", "3 m", "", "1e6", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of tokens"):
            count(text)
