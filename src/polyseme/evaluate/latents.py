"""Meanings and label purity of an SAE's latents, on two kinds of examples."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from polyseme.capture import TopK
from polyseme.capture.stream import Selection
from polyseme.core.distances import cosine_matrices
from polyseme.core.meaning import OVERLAP, Meanings, effective_number, meanings_many
from polyseme.core.space import Space
from polyseme.evaluate.compare import collect_latents
from polyseme.evaluate.sae import purity_of

#: Latents with fewer examples are left out, as fewer examples show fewer meanings.
N_EXAMPLES = 100
#: Number of latents whose verdict is computed, as its null takes most of the time.
N_VERDICTS = 50
# Latents processed together.
_BLOCK = 64


def latent_meanings(
    sae: Any, activations: Tensor, labels: NDArray[Any] | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Measure the meanings and label purity of an SAE's latents.

    Parameters
    ----------
    sae : torch.nn.Module
    activations : Tensor, shape (n, d_in)
    labels : ndarray, shape (n,), optional
        Class or token of each.
    seed : int
        Seed for drawing the latents whose verdict is computed.

    Returns
    -------
    dict
        The following twice: ``strongest_...`` from the 100 examples that activate a latent most, on
        which the count was validated; ``random_...`` from 100 random activating ones.

        - ``n``: number of latents with that many examples, over which all means are taken;
        - ``meanings`` and ``effective_meanings`` per latent;
        - ``several``: share with several meanings by count;
        - ``verdict_several``: share whose `Meanings.verdict` is "several", among 50 latents drawn
          with the seed;
        - ``purity`` and ``purity_null`` with labels, see `Purity`.

        NaN where there are none.
    """
    collected = collect_latents(sae, activations, TopK(N_EXAMPLES), n_random=N_EXAMPLES)
    space = Space.of(collected.mean[0], collected.covariance[0])
    directions = space.directions(collected.neurons.weights)
    record: dict[str, float] = {}
    for name, examples in (("strongest", collected.examples), ("random", collected.random)):
        described = _described(examples, activations, labels, space, directions, seed)
        record.update({f"{name}_{measure}": value for measure, value in described.items()})
    return record


def _described(
    examples: Selection,
    activations: Tensor,
    labels: NDArray[Any] | None,
    space: Space,
    directions: NDArray[np.float32],
    seed: int,
) -> dict[str, float]:
    latents = np.flatnonzero(examples.counts == N_EXAMPLES)
    index = examples.index[np.isin(examples.neuron, latents)].reshape(len(latents), N_EXAMPLES)
    judged = np.random.default_rng(seed).permutation(len(latents))[:N_VERDICTS]
    numbers, effective, verdicts = [], [], []
    for start in range(0, len(latents), _BLOCK):
        block = slice(start, start + _BLOCK)
        units = space.inputs(activations[index[block]].cpu().numpy())
        drives = np.einsum("gnd,gd->gn", units, directions[latents[block]])
        cosines = cosine_matrices(units, np.ones(drives.shape, bool))
        found = meanings_many(cosines, drives)
        for row, labelled in enumerate(found.labels):
            numbers.append(labelled.max() + 1)
            effective.append(effective_number(np.bincount(labelled) / N_EXAMPLES))
            if start + row in judged:
                meanings = Meanings(
                    labelled,
                    found.trees[row],
                    found.overlaps[row],
                    OVERLAP,
                    cosines[row],
                    drives[row],
                )
                verdicts.append(meanings.verdict == "several")
    record = {
        "n": len(latents),
        "meanings": _mean(numbers),
        "effective_meanings": _mean(effective),
        "several": _mean([number > 1 for number in numbers]),
        "verdict_several": _mean(verdicts),
    }
    if labels is not None:
        purity = purity_of(np.repeat(latents, N_EXAMPLES), labels[index.ravel()])
        record.update(purity=purity.purity, purity_null=purity.null)
    return record


def _mean(values: list[Any]) -> float:
    return float(np.mean(values)) if values else float("nan")
