"""Runs of texts: what the inputs hold, and what is refused."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from tests.store.run_builder import FINGERPRINT, contents, fill, write

from polyseme.errors import InputError, RunError
from polyseme.store import RunFolder, RunWriter, vocabulary_arrays
from polyseme.store.format import token_texts

TEXTS = ["the", " bank", "\n", "<0xE2>", "‏שלום", "<script>"]


def of_texts():
    made = contents()
    rng = np.random.default_rng(0)
    n = len(made.inputs["index"])
    lengths = rng.integers(1, 6, n)
    tokens = rng.choice([3, 8, 9, 40, 41, 1000], (n, 5))
    tokens[np.arange(5) >= lengths[:, None]] = 77  # padding needs no text
    made.inputs = {
        "index": made.inputs["index"],
        "tokens": tokens,
        "lengths": lengths,
        **vocabulary_arrays([3, 8, 9, 40, 41, 1000], TEXTS),
    }
    for table in ("examples", "random"):
        made.tables[table]["position"] = 0
    for site in made.sites:
        site.pop("activation_map", None)
    made.metadata["settings"]["window"] = [2, 1]
    made.metadata["data"] = {
        "kind": "text",
        "name": "d",
        "n_inputs": 100,
        "length": 5,
        "leave_out": ["special"],
        "tokenizer": {"class": "Tokenizer", "vocabulary_sha256": "0"},
    }
    return made


def test_a_run_of_texts_round_trips(tmp_path):
    made = of_texts()
    run = RunFolder(write(tmp_path / "run", made))
    run.verify()
    assert run.metadata["format_version"] == 1
    assert run.inputs["tokens"].dtype == np.int32
    assert run.inputs["tokens"].tolist() == made.inputs["tokens"].tolist()
    assert run.inputs["lengths"].tolist() == made.inputs["lengths"].tolist()
    assert run.token_texts.to_dict() == dict(zip([3, 8, 9, 40, 41, 1000], TEXTS, strict=True))


def test_no_text_at_all():
    made = vocabulary_arrays([], [])
    assert token_texts(made).empty
    with pytest.raises(InputError, match="2 tokens have 1 texts; expected one for each"):
        vocabulary_arrays([1, 2], ["a"])


def test_images_have_no_tokens(tmp_path):
    run = RunFolder(write(tmp_path / "run"))
    with pytest.raises(RunError, match="it holds images, which have no tokens"):
        run.token_texts  # noqa: B018


@pytest.mark.parametrize("name", ["lengths", "vocabulary", "vocabulary_ends", "vocabulary_text"])
def test_a_missing_array_is_refused_by_both_sides(tmp_path, name):
    made = of_texts()
    del made.inputs[name]
    with (
        RunWriter(tmp_path / "run", fingerprint=FINGERPRINT) as writer,
        pytest.raises(InputError, match=f"inputs.safetensors needs the array '{name}'"),
    ):
        fill(writer, made)


def change_lengths(inputs):
    inputs["lengths"][0] = 6


def change_a_token(inputs):
    inputs["tokens"][:, 0] = 5


def disorder(inputs):
    inputs["vocabulary"] = inputs["vocabulary"][::-1].copy()


def cut_text(inputs):
    inputs["vocabulary_text"] = inputs["vocabulary_text"][:-1]


def break_text(inputs):
    inputs["vocabulary_text"] = np.full_like(inputs["vocabulary_text"], 0xFF)


def turn_ends(inputs):
    inputs["vocabulary_ends"][1] = 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_lengths, "'lengths' must be from 0 to 5"),
        (change_a_token, "'tokens' holds a token that 'vocabulary' does not have"),
        (disorder, "'vocabulary' must be strictly increasing, from 0"),
        (cut_text, "'vocabulary_ends' do not fit 'vocabulary_text'"),
        (break_text, "'vocabulary_text' is not UTF-8"),
        (turn_ends, "'vocabulary_ends' do not fit 'vocabulary_text'"),
    ],
)
def test_texts_that_contradict_themselves(tmp_path, damage, message):
    made = of_texts()
    made.inputs = {name: np.array(array) for name, array in made.inputs.items()}
    damage(made.inputs)
    with pytest.raises(RunError, match=message):
        write(tmp_path / "run", made)


def test_cut_at_any_byte(tmp_path):
    folder = write(tmp_path / "run", of_texts())
    size = (folder / "inputs.safetensors").stat().st_size
    assert (
        json.loads((folder / "run.json").read_text())["files"]["inputs.safetensors"]["bytes"]
        == size
    )
    for cut in range(0, size, 37):
        os.truncate(folder / "inputs.safetensors", size - cut - 1)
        with pytest.raises(RunError, match="truncated or changed"):
            RunFolder(folder).token_texts  # noqa: B018
