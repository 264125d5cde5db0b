"""The command line on language models: probing, SAEs at hook points, and input that is no good."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from pathlib import Path

import pytest

import polyseme as ps
from analysis.tiny_texts import TEXTS, make_model, make_tokenizer
from polyseme import cli

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

TEXT = "\n\n".join(TEXTS * 3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model as transformers writes it, with variants that are damaged or of other kinds."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    for name in ("tiny", "quantised", "cut", "bare"):
        model.save_pretrained(folder / name)
        if name != "bare":
            tokenizer.save_pretrained(folder / name)
    config = json.loads((folder / "quantised" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    t5 = transformers.T5Config(
        d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=len(tokenizer)
    )
    transformers.T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    mixtral = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    transformers.MixtralForCausalLM(mixtral).save_pretrained(folder / "experts")
    transformers.PreTrainedModel.half(model).save_pretrained(folder / "half")
    for name in ("t5", "experts", "half"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    for folder in made.iterdir():
        Path(folder.name).symlink_to(folder)
    Path("text.txt").write_text(TEXT)
    return tmp_path


def said(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def analyse(*more, model="tiny", text="text.txt"):
    return [
        *("analyse", model, "--text", text, "--context", "16", "--out", "run", "--quiet"),
        *("--select", "TopK(6)", *more),
    ]


def test_probe(place, capsys, monkeypatch):
    assert said(capsys, *analyse())[0] == 0
    assert ps.open_run("run").metadata["model"]["name"] == "tiny"
    command = ["probe", "run", "the river bank", "--model", "tiny", "-k", "2"]
    status, out, err = said(capsys, *command)
    assert (status, err) == (0, "")
    assert out.startswith("The 2 neurons with the largest share of their maximum at each token")
    assert out.count("model.layers.") == 4
    words = [line.split()[0] for line in out.splitlines() if "model.layers" in line]
    assert [word for word in words if word in ("the", "river", "bank")] == ["river", "bank"]
    status, out, _ = said(capsys, *command, "--sites", "*.0.mlp", "--by", "activation")
    assert (status, out.count("model.layers.0.mlp/")) == (0, 4)
    assert "largest activation" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("money\nlent"))
    status, out, _ = said(capsys, "probe", "run", "-", "--model", "tiny", "-k", "1")
    assert (status, out.count("model.layers.")) == (0, 1)
    assert "lent" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "bank"], "(according to the run, 'tiny'): give model and tokenizer"),
        (
            ["run", " ", "--model", "tiny"],
            "text is ' '; expected text with a character other than white",
        ),
        (["run", "bank", "--device", "cpu"], "--device requires --model; give the model."),
        (["run", "bank", "--model", "half", "-k", "0"], "k is 0; a whole number of at least 1"),
        (["nowhere", "bank"], "nowhere does not exist. Give the folder that polyseme analyse"),
        (["run", "bank", "--model", "t5"], "'t5' is an encoder-decoder (t5)"),
        (["run", "bank", "--sae", "x"], "--sae is given 1 times, but 0 sites of the run are SAEs"),
    ],
)
def test_probes_that_are_refused(place, capsys, arguments, message):
    assert said(capsys, *analyse("--sites", "*.0.mlp"))[0] == 0
    status, out, err = said(capsys, "probe", *arguments)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


def test_an_sae_at_a_hook_point(place, capsys):
    pytest.importorskip("sae_lens")
    training = ["--d-sae", "12", "--epochs", "30", "--batch-size", "16", "--l1", "0.01", "--quiet"]
    train = ["train-sae", "tiny", "--text", "text.txt", "--context", "16", *training]
    hook = "blocks.0.hook_resid_post"
    status, out, err = said(capsys, *train, "--site", hook, "--out", "saes/mine")
    assert (status, err) == (0, "")
    assert out.startswith("saes/mine: 12 latents, ")
    # Nothing else is left behind: what it was trained on is gone.
    assert [file.name for file in Path("saes").iterdir()] == ["mine"]
    assert ps.load_sae("saes/mine").cfg.metadata["hook_name"] == hook
    status, _, err = said(capsys, *train, "--site", hook, "--out", "saes/mine")
    assert status == 1
    assert err.startswith("polyseme: saes/mine already exists. Replace it with --overwrite")
    status, _, err = said(capsys, *train, "--site", "blocks.7.hook_resid_post", "--out", "saes/x")
    assert (status, err.count("\n")) == (1, 1)
    assert "is in block 7, but this LlamaForCausalLM has 2 blocks" in err
    assert [file.name for file in Path("saes").iterdir()] == ["mine"]

    status, out, err = said(capsys, *analyse("--sae", "saes/mine", "--sites", "*.1.mlp"))
    assert (status, err) == (0, "")
    run = ps.open_run("run")
    assert run.sites == ["model.layers.1.mlp", f"{hook}.sae"]
    assert run.neuron(f"{hook}.sae", 0).tokens()["promoted"]["logit"].notna().all()
    probe = ["probe", "run", "the river bank", "--model", "tiny"]
    status, _, err = said(capsys, *probe)
    assert status == 1
    assert "is an SAE at 'blocks.0.hook_resid_post'; give the SAE by the site's name" in err
    status, out, _ = said(capsys, *probe, "--sae", "saes/mine", "--sites", "*.sae", "-k", "100")
    assert status == 0
    assert f"{hook}.sae/" in out

    # Only the latents by default; two SAEs of one place are told apart by their folders.
    shutil.copytree("saes/mine", "saes/other")
    both = ["--sae", "saes/mine", "--sae", "saes/other", "--hook", "blocks.1.hook_resid_pre"]
    assert said(capsys, *analyse("--overwrite", *both))[0] == 0
    assert ps.open_run("run").sites == [
        "blocks.1.hook_resid_pre.sae",
        "blocks.1.hook_resid_pre.sae.other",
    ]
    status, _, err = said(
        capsys, *analyse("--overwrite", *both[:2], "--hook", "model.layers.1.mlp")
    )
    assert status == 1
    assert (
        "The SAE reads vectors of length 16, but those at 'model.layers.1.mlp' have length 24"
        in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sae", "nowhere"], "There is no file or folder 'nowhere'"),
        (
            ["--hook", "blocks.0.hook_resid_post"],
            "--hook is given without an SAE; give the SAE with --sae.",
        ),
        (["--sae", "a", "--hook", "b", "--hook", "c"], "--hook is given 2 times and --sae 1 times"),
        (
            ["--context", "5000"],
            "The contexts have 5,000 tokens, but the model accepts at most 2,048",
        ),
        (["--device", "nonsense"], "Unknown device: 'nonsense'"),
    ],
)
def test_options_that_are_refused(place, capsys, arguments, message):
    status, out, err = said(capsys, *analyse(*arguments))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


def test_saes_are_for_texts(place, capsys):
    arguments = ["analyse", "models.py:net", "--data", "x.npz", "--sites", "0", "--out", "run"]
    status, _, err = said(capsys, *arguments, "--sae", "x")
    assert status == 1
    assert err.startswith(
        "polyseme: --sae and --hook require --text; to analyse SAEs of an image model"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("t5", "'t5' is an encoder-decoder (t5); expected a model with one stack"),
        (
            "quantised",
            "The model 'quantised' is quantised (gptq), so its neurons have no weight ve",
        ),
        ("cut", "The model 'cut' cannot be loaded: Error while deserializing header: "),
        ("bare", "The model 'bare' comes without a tokenizer that transformers can read; save one"),
        (
            "experts",
            "No MLP was recognised in this MixtralForCausalLM; expected a linear layer, ",
        ),
        ("experts", "give the name of a linear layer (--sites; polyseme sites lists them)"),
    ],
)
def test_models_that_are_refused(place, capsys, model, message):
    status, out, err = said(capsys, *analyse(model=model))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt holds no text; expected at least one document with"),
        ("blank.txt", b"\n\n  \n", "blank.txt holds no text"),
        (
            "latin.txt",
            b"caf\xe9 bank",
            "byte 3 is not utf-8 text (invalid continuation byte, 0xE9)",
        ),
        ("latin.txt", b"caf\xe9 bank", "with encoding=... (--encoding), such as 'latin-1'"),
        (
            "a.jsonl",
            b'{"body": "the bank"}\n',
            "line 1: Unknown field: 'text'. Must be one of: bod",
        ),
        ("a.jsonl", b'{"body": "the bank"}\n', "Name the text field with field=... (--field)."),
        ("a.jsonl", b'{"text": "the"\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": null}\n', "line 1: the field 'text' is null; expected text"),
    ],
)
def test_texts_that_are_refused(place, capsys, name, content, message):
    Path(name).write_bytes(content)
    status, out, err = said(capsys, *analyse(text=name))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert not Path("run").exists()


def test_texts_that_are_odd_but_good(place, capsys):
    """Empty lines, one line of a megabyte, other encodings, gzip, less than a context."""
    Path("long.txt").write_text(" ".join(TEXTS) * 6000)
    Path("latin.txt").write_bytes("the bank of the café ".encode("latin-1") * 9)
    Path("lines.jsonl").write_text(json.dumps({"body": TEXT}) + "\n\n" * 3)
    with gzip.open("zipped.txt.gz", "wt") as file:
        file.write(TEXT)
    Path("short.txt").write_text("river bank")
    for text, more, contexts in (
        ("long.txt", ["--tokens", "100"], 7),
        ("latin.txt", ["--encoding", "latin-1"], 3),
        ("lines.jsonl", ["--field", "body"], 13),
        ("zipped.txt.gz", [], 13),
        ("short.txt", [], 1),
    ):
        status, out, err = said(capsys, *analyse("--overwrite", *more, text=text))
        assert (status, err) == (0, ""), text
        assert "features per neuron" in out
        assert ps.open_run("run").metadata["data"]["n_inputs"] == contexts, text
    assert "no neuron has two examples to compare" in out
    # A single token, which stands first: nothing counts.
    Path("one.txt").write_text("bank")
    status, out, _ = said(capsys, *analyse("--overwrite", text="one.txt"))
    assert status == 0
    assert "48" not in out
    assert out.count("24 neurons, all dead: no input activates any of them") == 2


def test_half_precision_is_read_in_full(place, capsys):
    assert said(capsys, *analyse(model="half"))[0] == 0
    run = ps.open_run("run")
    stored = run.neuron("model.layers.0.mlp", 0).weights
    whole = make_model(len(make_tokenizer())).model.layers[0].mlp.gate_proj.weight[0]
    assert stored == pytest.approx(whole.detach().numpy(), rel=1e-3)
