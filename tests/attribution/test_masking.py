"""Importances of many neurons' examples at once, against masking for each example alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyseme.attribution import masking
from polyseme.attribution.masking import Places, context_importances, is_causal, n_masked_tokens
from polyseme.attribution.token_importances import token_importances
from polyseme.errors import InputError
from polyseme.sites import find_mlp_sites, find_sites, prove_sites
from polyseme.sites.hooks import Feed

from .test_token_importances import (
    MASK,
    N_NEURONS,
    VOCABULARY,
    contexts,
    drops_by_masking,
    made,
    oracle,
)

BEFORE, AFTER = 5, 3


def scattered(sites: list, lengths: np.ndarray, m: int = 24) -> list[Places]:
    rng = np.random.default_rng(1)
    found = []
    for site in sites:
        of = rng.integers(0, len(lengths), m)
        at = (rng.random(m) * lengths[of]).astype(np.int64)
        found.append(Places(of, at, rng.integers(0, site.n_neurons, m)))
    return found


def together(model: nn.Module, sites: list, ids, attention, places, **options) -> list[np.ndarray]:
    width = options["before"] + 1 + options["after"]
    found = [np.full((len(of.contexts), width), -1, np.float32) for of in places]
    last = options.get("start", 0)
    for step in context_importances(model, sites, ids, attention, places, **options):
        assert step.stop > last
        last = step.stop
        for array, (rows, shares) in zip(found, step.importances, strict=True):
            assert (array[rows] == -1).all()
            array[rows] = shares
    assert last == len(ids)
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_all_at_once_is_each_alone(kind):
    model, _ = made(kind)
    sites = find_mlp_sites(model)
    ids, attention, _, _ = contexts()
    places = scattered(sites, attention.sum(axis=1))
    options = {"mask_id": MASK, "before": BEFORE, "after": AFTER, "causal": kind != "bert"}
    found = together(model, sites, ids, attention, places, **options)
    for site, of, importances in zip(sites, places, found, strict=True):
        *_, (_, alone) = token_importances(
            model,
            site,
            ids[of.contexts],
            attention[of.contexts],
            of.positions,
            of.neurons,
            **options,
        )
        np.testing.assert_allclose(importances, alone, atol=1e-4)
    few = slice(6)
    rows = of.contexts[few]
    data = (ids[rows], attention[rows], of.positions[few], of.neurons[few])
    slow = oracle(drops_by_masking, model, sites[-1], data, BEFORE, AFTER)
    np.testing.assert_allclose(found[-1][few], slow, atol=1e-3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_earlier_tokens_are_run_once_where_the_model_can(kind, monkeypatch):
    model, _ = made(kind)
    sites = find_mlp_sites(model)
    ids = np.tile(contexts(padded=False)[0], 3)
    attention = np.ones(ids.shape, bool)
    places = scattered(sites, attention.sum(axis=1), 60)
    options = {"mask_id": MASK, "before": BEFORE, "after": AFTER}
    sizes = []
    plain = masking.Reach.__call__

    def counting(self, given, *rest):
        sizes.append(given.size)
        return plain(self, given, *rest)

    monkeypatch.setattr(masking.Reach, "__call__", counting)
    with_past = together(model, sites, ids, attention, places, **options)
    went_on = sum(sizes)
    sizes.clear()
    monkeypatch.setattr(masking.Reach, "takes_past", False)
    without = together(model, sites, ids, attention, places, **options)
    assert went_on < 0.6 * sum(sizes)
    for a, b in zip(with_past, without, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_keys_and_values_that_give_something_else_are_not_used(monkeypatch):
    model, _ = made("llama")
    sites = find_mlp_sites(model)
    ids, attention, _, _ = contexts()
    places = scattered(sites, attention.sum(axis=1))
    options = {"mask_id": MASK, "before": BEFORE, "after": AFTER}
    expected = together(model, sites, ids, attention, places, **options)
    plain = masking._past_of

    def broken(past, rows, stop):
        own = plain(past, rows, stop)
        for layer in own.layers:
            layer.values *= 1.1
        return own

    def missing(past, rows, stop):
        raise AttributeError("layers")

    for instead in (broken, missing):
        monkeypatch.setattr(masking, "_past_of", instead)
        found = together(model, sites, ids, attention, places, **options)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_masking_resumes_at_a_context():
    model, _ = made("llama")
    sites = find_mlp_sites(model)
    ids, attention, _, _ = contexts()
    places = scattered(sites, attention.sum(axis=1))
    options = {"mask_id": MASK, "before": BEFORE, "after": AFTER, "batch_size": 2}
    whole = together(model, sites, ids, attention, places, **options)
    rest = together(model, sites, ids, attention, places, start=4, **options)
    for a, b, of in zip(whole, rest, places, strict=True):
        late = of.contexts >= 4
        assert np.array_equal(a[late], b[late], equal_nan=True)
        assert (b[~late] == -1).all()


def test_a_site_without_examples_and_contexts_without_any():
    model, _ = made("gpt2")
    sites = find_mlp_sites(model)[:2]
    ids, attention, _, _ = contexts()
    none = np.empty(0, np.int64)
    places = [Places(none, none, none), Places(np.array([4]), np.array([1]), np.array([3]))]
    found = together(model, sites, ids, attention, places, mask_id=MASK, before=BEFORE, after=AFTER)
    assert found[0].shape == (0, BEFORE + 1 + AFTER)
    assert found[1][0, BEFORE] == 1
    with pytest.raises(InputError, match="There are 2 sites, but places for 1"):
        list(context_importances(model, sites, ids, attention, places[:1], mask_id=MASK))


def test_a_model_of_ones_own():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.first = nn.Linear(8, N_NEURONS)

        def forward(self, ids):
            return torch.relu(self.first(self.embed(ids).cumsum(dim=1)))

    torch.manual_seed(0)
    model = Plain()
    sites = find_sites(model, "first")
    ids, attention, _, _ = contexts(padded=False)
    prove_sites(model, sites, Feed(model), ids)
    places = scattered(sites, attention.sum(axis=1))
    options = {"mask_id": MASK, "before": BEFORE, "after": AFTER}
    found = together(model, sites, ids, attention, places, **options)
    *_, (_, alone) = token_importances(
        model, sites[0], ids[places[0].contexts], attention[places[0].contexts],
        places[0].positions, places[0].neurons, **options,
    )  # fmt: skip
    np.testing.assert_allclose(found[0], alone, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_is_causal_detects_models_that_see_later_tokens(kind, scale):
    model, _ = made(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Less than what models begin their training with.
                parameter.mul_(scale)
    sites = find_mlp_sites(model)
    ids = contexts(padded=False)[0]
    for given in (ids, ids[0], ids[0, :2], np.zeros(6, np.int64), np.full(6, 7)):
        assert is_causal(model, sites, given) == (kind != "bert")
    # There is no later token to see.
    assert is_causal(model, sites, ids[:, :1])
    assert is_causal(model, sites, ids, np.ones(len(ids), np.int64))


def test_any_context_may_show_that_later_tokens_are_seen():
    class Looking(nn.Module):
        """Token 9 alone is told what comes after it."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.first = nn.Linear(8, N_NEURONS)

        def forward(self, ids):
            x = self.embed(ids)
            return self.first(x + (ids == 9)[..., None] * x.sum(dim=1, keepdim=True))

    torch.manual_seed(0)
    model = Looking()
    sites = find_sites(model, "first")
    rows = np.array([[1, 2, 3, 4], [9, 2, 3, 4]])
    assert is_causal(model, sites, rows[0])
    assert not is_causal(model, sites, rows)


def test_a_model_that_no_token_changes_is_not_called_causal():
    model, _ = made("gpt2")
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert not is_causal(model, find_mlp_sites(model), contexts(padded=False)[0])


def test_the_cost_is_told():
    lengths = np.array([128, 128, 10])
    assert n_masked_tokens(lengths, before=20) == 128 * 24 * 2 + 100
    assert n_masked_tokens(lengths, before=20, causal=False) == 2 * 128**2 + 100
