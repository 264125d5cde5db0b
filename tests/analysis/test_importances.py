"""Token importances in runs: all of them in one go, and a neuron's on demand."""

from __future__ import annotations

import re

import numpy as np
import pytest

import polyseme as ps
from polyseme.analysis import kinds
from polyseme.analysis.importances import (
    estimated_seconds,
    live_importances,
    mask_token,
    neuron_importances,
)
from polyseme.attribution.token_importances import token_importances
from polyseme.data import Contexts, read_text
from polyseme.errors import InputError
from polyseme.sites import find_sites
from polyseme.store import NO_IMPORTANCE

from .test_text import TEXT, make, tokenizer  # noqa: F401 - a fixture

WINDOW = (4, 2)


@pytest.fixture(scope="module")
def setting(tokenizer):  # noqa: F811
    model, sites = make("llama", len(tokenizer))
    for parameter in model.parameters():
        parameter.data *= 3  # so that attention does something
    return model, sites, Contexts(read_text(TEXT), tokenizer, length=12)


def analysed(setting, out, **options):
    model, sites, contexts = setting
    return ps.analyse(
        model, contexts, sites=sites, out=out, window=WINDOW, select=ps.TopK(5),
        **{"progress": False, **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(setting, tmp_path_factory):
    return analysed(setting, tmp_path_factory.mktemp("exact") / "run", importances="exact")


def test_they_are_those_of_each_neuron_alone(setting, exact):
    model, sites, contexts = setting
    exact.folder.verify()
    assert exact.metadata["settings"]["importances"] == "exact"
    assert exact.metadata["settings"]["mask_id"] == contexts.tokenizer.pad_token_id
    for number, site in enumerate(find_sites(model, sites)):
        for neuron in (0, 5, 23):
            frame = exact.neuron(site.name, neuron).examples
            tokens, lengths = exact.folder.contexts(
                np.searchsorted(exact.folder.inputs["index"], frame["input"])
            )
            *_, (_, alone) = token_importances(
                model, site, tokens, np.arange(12) < lengths[:, None], frame["position"].to_numpy(),
                np.full(len(frame), neuron), mask_id=contexts.tokenizer.pad_token_id,
                before=4, after=2,
            )  # fmt: skip
            stored = exact.folder.site_rows(number, "importances", neuron, neuron + 1)
            assert ((stored == NO_IMPORTANCE) == np.isnan(alone)).all()
            inside = stored != NO_IMPORTANCE
            np.testing.assert_allclose(stored[inside] / 254, alone[inside], atol=0.5 / 254 + 1e-4)
            found = neuron_importances(model, contexts.tokenizer, exact, site.name, neuron, [2, 0])
            np.testing.assert_allclose(found, alone[[2, 0]], atol=1e-4)
    assert exact.folder.site(0)["importances"].max() >= 254


def test_windows_carry_them(exact):
    neuron = exact.neuron(exact.sites[0], 3)
    for window in neuron.texts():
        assert len(window.importances) == len(window.tokens) == len(window.activations)
        assert window.importances[window.centre] == 1
        assert (window.importances[window.centre + 1 :] == 0).all()
    more = neuron.texts(before=11, after=11)
    for short, long in zip(neuron.texts(), more, strict=True):
        assert len(long.tokens) >= len(short.tokens)
        start = long.centre - short.centre
        inside = slice(start, start + len(short.tokens))
        assert long.tokens[inside] == short.tokens
        np.testing.assert_array_equal(long.importances[inside], short.importances)
        np.testing.assert_array_equal(long.activations[inside], short.activations)
        assert np.isnan(np.delete(long.activations, np.r_[inside])).all()
    narrow = neuron.texts(before=0, after=0)
    assert [window.tokens for window in narrow] == [
        [window.tokens[window.centre]] for window in neuron.texts()
    ]
    for wrong in (-1, 1.5, True):
        with pytest.raises(
            InputError, match=f"before is {wrong}; expected a non-negative number of tokens"
        ):
            neuron.texts(before=wrong)


def test_they_are_left_out_unless_asked_for(setting, tmp_path, capsys):
    run = analysed(setting, tmp_path / "run", progress=True)
    assert "importances" not in run.folder.site(0)
    assert run.neuron(run.sites[0], 3).texts()[0].importances is None
    printed = " ".join(capsys.readouterr().err.split())
    assert (
        "Token importances were not computed; importances='exact' (--importances exact)" in printed
    )
    assert re.search(r"would take about \d+ s\.", printed)


def test_they_go_on_byte_for_byte(setting, exact, tmp_path, monkeypatch):
    plain = kinds.context_importances
    steps = []

    def stopping(*arguments, **options):
        for step in plain(*arguments, batch_size=2, **options):
            steps.append(step.stop)
            if len(steps) == 2:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(kinds, "context_importances", stopping)
    with pytest.raises(KeyboardInterrupt):
        analysed(setting, tmp_path / "run", importances="exact")
    analysed(setting, tmp_path / "run", importances="exact", resume=True)
    assert steps == [2, 4, 4, 6]
    for file in exact.path.rglob("*"):
        if file.is_file() and file.name != "run.json":
            other = tmp_path / "run" / file.relative_to(exact.path)
            assert other.read_bytes() == file.read_bytes(), file.name


def test_the_explorer_is_given_plain_values(setting, exact):
    model, _, contexts = setting
    ask = live_importances(model, contexts.tokenizer)
    answer = ask(exact, 1, 7, [1])
    expected = neuron_importances(model, contexts.tokenizer, exact, exact.sites[1], 7, [1])
    [row] = answer["importances"]
    assert len(row) == 7
    for given, value in zip(row, expected[0], strict=True):
        assert given is None if np.isnan(value) else given == pytest.approx(value, abs=1e-4)
    assert ask(exact, 1, 7, [])["importances"] == []
    with pytest.raises(InputError, match="site is 2; a number from 0 to 1"):
        ask(exact, 2, 7, [1])
    with pytest.raises(InputError, match=r"examples is \[9\]; expected numbers from 0 to 4"):
        ask(exact, 1, 7, [9])


def test_mask_token(tokenizer):  # noqa: F811
    class Bare:
        eos_token_id = 7

    assert mask_token(tokenizer) == tokenizer.pad_token_id
    assert mask_token(Bare()) == 7
    Bare.mask_token_id = 3
    assert mask_token(Bare()) == 3
    with pytest.raises(InputError, match="has no mask, padding, end or start token"):
        mask_token(object())


def test_the_estimate_follows_the_pass():
    lengths = np.full(10, 100)
    assert estimated_seconds(lengths, 1000, 5.0, window=(20, 10)) == pytest.approx(5 * 24)


def test_bad_input(setting, tmp_path):
    with pytest.raises(InputError, match="Unknown kind of importances: 'gradient'"):
        analysed(setting, tmp_path / "run", importances="gradient")
    assert not (tmp_path / "run").exists()
