"""Meanings of an SAE's latents, against `polyseme.meanings` on each latent by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import polyseme as ps
from polyseme.evaluate.latents import N_EXAMPLES, N_VERDICTS, latent_meanings
from polyseme.evaluate.sae import purity_of


class TwoConcepts(nn.Module):
    """Latents that read one direction, two of them, and none that is ever there."""

    def __init__(self, d: int) -> None:
        super().__init__()
        weights = torch.zeros(d, 4)
        weights[0, 0] = weights[[0, 1], [1, 1]] = weights[2, 2] = weights[3, 3] = 1
        self.W_enc = nn.Parameter(weights)
        self.b_enc = nn.Parameter(torch.tensor([-2.0, -2.0, -2.0, -1e3]))
        self.W_dec = nn.Parameter(weights.T.clone())
        self.b_dec = nn.Parameter(torch.zeros(d))

    def encode(self, h: Tensor) -> Tensor:
        return torch.relu(h @ self.W_enc + self.b_enc)

    def decode(self, a: Tensor) -> Tensor:
        return a @ self.W_dec + self.b_dec


@pytest.fixture(scope="module")
def found() -> tuple[TwoConcepts, Tensor, np.ndarray]:
    rng = np.random.default_rng(0)
    d = 32
    concept = rng.integers(0, 3, size=1200)
    concept[rng.permutation(1200)[:60]] = -1  # nothing in particular
    h = rng.normal(size=(1200, d)) * 0.7
    for number in range(2):
        h[concept == number, number] += 6
    h[concept == 2, 2] += rng.choice([0.0, 6.0], p=[0.9, 0.1], size=(concept == 2).sum())
    return TwoConcepts(d), torch.from_numpy(h.astype(np.float32)), concept


def by_hand(sae: TwoConcepts, h: Tensor, latent: int, rows: np.ndarray) -> ps.Meanings:
    values = h.numpy().astype(np.float64)
    return ps.meanings(
        values[rows],
        mean=values.mean(axis=0),
        covariance=np.cov(values.T, bias=True),
        direction=sae.W_enc[:, latent].detach().numpy(),
    )


def test_against_each_latent_by_hand(found: tuple[TwoConcepts, Tensor, np.ndarray]) -> None:
    sae, h, concept = found
    activations = sae.encode(h).detach().numpy()
    record = latent_meanings(sae, h, concept)
    enough = [n for n in range(4) if (activations[:, n] > 0).sum() >= N_EXAMPLES]
    assert enough == [0, 1], "the third has too few examples, the fourth is dead"
    strongest = [np.argsort(-activations[:, n], kind="stable")[:N_EXAMPLES] for n in enough]
    meanings = [by_hand(sae, h, n, rows) for n, rows in zip(enough, strongest, strict=True)]
    assert [m.number for m in meanings] == [1, 2]
    assert record["strongest_n"] == record["random_n"] == 2
    assert record["strongest_meanings"] == 1.5
    assert record["strongest_effective_meanings"] == pytest.approx(
        np.mean([m.effective_number for m in meanings])
    )
    assert record["strongest_several"] == 0.5
    assert record["strongest_verdict_several"] == np.mean(
        [m.verdict == "several" for m in meanings]
    )
    purity = [Counter(concept[rows]).most_common(1)[0][1] / N_EXAMPLES for rows in strongest]
    assert record["strongest_purity"] == pytest.approx(np.mean(purity))
    assert purity[0] > 0.95 > 0.7 > purity[1]
    # The null: both latents' labels mixed.
    share = Counter(concept[np.concatenate(strongest)]).most_common(1)[0][1] / (2 * N_EXAMPLES)
    assert record["strongest_purity_null"] == pytest.approx(share, abs=0.05)
    # Random examples are of the same two concepts.
    assert record["random_meanings"] == 1.5
    assert record["random_purity"] == pytest.approx(np.mean(purity), abs=0.1)


def test_without_labels_and_without_latents(
    found: tuple[TwoConcepts, Tensor, np.ndarray],
) -> None:
    sae, h, _ = found
    assert not any("purity" in name for name in latent_meanings(sae, h))
    few = latent_meanings(sae, h[:50], np.zeros(50))
    assert few["strongest_n"] == 0
    assert all(np.isnan(value) for name, value in few.items() if not name.endswith("_n"))


def test_verdicts_are_of_a_sample() -> None:
    torch.manual_seed(0)
    sae = TwoConcepts(6)
    with torch.no_grad():
        sae.W_enc = nn.Parameter(torch.randn(6, 2 * N_VERDICTS))
        sae.b_enc = nn.Parameter(torch.zeros(2 * N_VERDICTS))
        sae.W_dec = nn.Parameter(torch.randn(2 * N_VERDICTS, 6))
    record = latent_meanings(sae, torch.randn(400, 6))
    assert record["random_n"] == 2 * N_VERDICTS
    share = record["random_verdict_several"] * N_VERDICTS
    assert share == pytest.approx(round(share))


def test_purity_by_hand() -> None:
    neuron = np.array([0, 0, 0, 2, 2, 5])
    labels = np.array(["a", "a", "b", "b", "c", "c"])
    purity = purity_of(neuron, labels)
    assert (purity.purity, purity.n) == (pytest.approx((2 / 3 + 1 / 2) / 2), 2)
    assert np.isnan(purity_of(np.array([0, 1]), np.array([0, 0])).purity)
