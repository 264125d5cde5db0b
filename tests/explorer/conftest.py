"""Small runs of every kind to show, and a reader of packs that shares nothing with the writer."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import polyseme as ps
from polyseme.data import Contexts, read_text
from views import runs as image_runs

HOSTILE = ["<script>alert(1)</script>", "../../etc", "\u202eabc", '"onerror="x', "&amp;", "{{x}}"]
TEXT = [
    "the river bank was green and the bank of the river was wide",
    "the bank lent money to the bank that lent it on",
    " ".join(HOSTILE) + " money and " + " ".join(HOSTILE[::-1]),
    "a green light and a wide river " * 5,
    "money money on the light green bank",
]


def decoded(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and metadata of a file of data, by the library of the format."""
    plain = gzip.decompress(raw)
    header = json.loads(plain[8 : 8 + int.from_bytes(plain[:8], "little")])
    metadata = {}
    for key, text in header.get("__metadata__", {}).items():
        try:
            metadata[key] = json.loads(text)
        except ValueError:
            metadata[key] = text
    return safetensors.numpy.load(plain), metadata


@pytest.fixture(scope="session")
def text_run(tmp_path_factory) -> ps.Run:
    """Two gated layers of a tiny random Llama, on a few sentences, some of them hostile."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<eos>", "<pad>", "<unk>", *sorted({word for text in TEXT for word in text.split()})]
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>")
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return ps.analyse(
        transformers.LlamaForCausalLM(config).eval(),
        Contexts(read_text(TEXT), tokenizer, length=12),
        sites="model.layers.*.mlp",
        select=ps.TopK(5),
        out=tmp_path_factory.mktemp("text") / "run",
        progress=False,
    )


@pytest.fixture(scope="session")
def grey_run(tmp_path_factory) -> ps.Run:
    """Layers that read pixels and deeper ones, with a dead neuron."""
    return image_runs.analyse_grey(tmp_path_factory.mktemp("grey") / "run")


@pytest.fixture(scope="session")
def rgb_run(tmp_path_factory) -> ps.Run:
    """Convolutions on images of three channels."""
    return image_runs.analyse_rgb(tmp_path_factory.mktemp("rgb") / "run")


@pytest.fixture
def copied(tmp_path):
    """``copied(run)``: a copy of a run's folder for the test to damage."""

    def copied(run: ps.Run) -> Path:
        return shutil.copytree(run.path, tmp_path / "copy")

    return copied
