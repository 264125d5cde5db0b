"""Evaluation of an SAE on activations and, if there is a model, spliced into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.core import participation_ratio
from polyseme.data.contexts import TokenBatch
from polyseme.errors import InputError
from polyseme.sites import Feed, Site, evaluating, prove_sites
from polyseme.sites.attach import find_site, replacing
from polyseme.views import Run, measured


@dataclass(frozen=True)
class Reconstruction:
    """How well and how sparsely an SAE reconstructs activations.

    Attributes
    ----------
    n : int
        Number of activation vectors.
    l0 : float
        Mean number of active latents (a > 0) per vector.
    mse : float
        Mean squared error per coordinate.
    fvu : float
        Fraction of variance unexplained: the squared error over the squared distance of the
        activations from their mean. 0 is perfect, 1 is no better than the mean.
    n_latents, n_dead : int
        Number of latents, and of dead ones, which no vector activates (a > 0).
    density : ndarray of float64, shape (d_sae,)
        Share of vectors that activate each latent.
    participation_ratio : ndarray of float64, shape (d_sae,)
        Participation ratio of each row of the encoder.
    """

    n: int
    l0: float
    mse: float
    fvu: float
    n_latents: int
    n_dead: int
    density: NDArray[np.float64]
    participation_ratio: NDArray[np.float64]

    def density_histogram(self, bins: int = 30) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts of live latents by log10 of density, and the bin edges."""
        alive = self.density[self.density > 0]
        low = np.floor(np.log10(1 / self.n))
        counts, edges = np.histogram(np.log10(alive), bins=bins, range=(low, 0))
        return counts.astype(np.int64), edges


def evaluate_reconstruction(sae: Any, activations: Iterable[Tensor]) -> Reconstruction:
    """Measure sparsity and error of an SAE, in one pass over batches of activations.

    Parameters
    ----------
    sae : torch.nn.Module
        With ``encode``, ``decode`` and ``W_enc`` (d_in, d_sae), as from `load_sae`.
    activations : iterable of Tensor, shape (B, d_in)

    Raises
    ------
    InputError
        Without activations, or for NaN or infinite values.
    """
    n, active, error, total, square = 0, None, 0.0, None, 0.0
    weights = sae.W_enc.detach()
    with torch.no_grad():
        for rows in activations:
            rows = rows.to(weights.device, weights.dtype)
            if not bool(torch.isfinite(rows).all()):
                raise InputError(
                    f"Activations {n} to {n + len(rows) - 1} hold NaN or infinite values; expected "
                    f"finite ones. Check the model and the data."
                )
            latents = sae.encode(rows)
            wrong = (sae.decode(latents) - rows).double()
            latents = latents.to_dense() if latents.is_sparse else latents
            count = (latents > 0).sum(dim=0, dtype=torch.float64)
            exact = rows.double()
            active = count if active is None else active + count
            total = exact.sum(dim=0) if total is None else total + exact.sum(dim=0)
            error += float((wrong**2).sum())
            square += float((exact**2).sum())
            n += len(rows)
    if active is None or total is None:
        raise InputError("There are no activations to evaluate the SAE on; expected at least 1.")
    variance = square - float((total**2).sum()) / n
    density = (active / n).cpu().numpy()
    return Reconstruction(
        n=n,
        l0=float(active.sum()) / n,
        mse=error / (n * len(total)),
        fvu=error / variance if variance > 0 else float("nan"),
        n_latents=len(density),
        n_dead=int((density == 0).sum()),
        density=density,
        participation_ratio=participation_ratio(weights.T),
    )


@dataclass(frozen=True)
class Splice:
    """What a classifier or language model loses with an SAE's reconstruction spliced in.

    Attributes
    ----------
    n : int
        Number of inputs or, for a language model, of predicted tokens.
    accuracy, cross_entropy : float
        Of the unmodified model.
    spliced_accuracy, spliced_cross_entropy : float
        With the site's activations replaced with their reconstruction.
    ablated_accuracy, ablated_cross_entropy : float
        With the site's activations replaced with 0.
    """

    n: int
    accuracy: float
    cross_entropy: float
    spliced_accuracy: float
    spliced_cross_entropy: float
    ablated_accuracy: float
    ablated_cross_entropy: float

    @property
    def recovered(self) -> float:
        """Share of the cross-entropy gap between the ablated and the full model recovered."""
        lost = self.ablated_cross_entropy - self.cross_entropy
        return (self.ablated_cross_entropy - self.spliced_cross_entropy) / lost if lost else np.nan


# The label that torch's cross-entropy ignores.
_IGNORED = -100


def next_tokens(batches: Iterable[TokenBatch]) -> Iterator[tuple[dict[str, Any], NDArray[Any]]]:
    """Pair contexts with the token that follows each position, for `evaluate_splice`.

    Parameters
    ----------
    batches : iterable of TokenBatch
        From `polyseme.data.Contexts.batches`.

    Yields
    ------
    inputs : dict
        ``input_ids`` and ``attention_mask``, (B, length).
    labels : ndarray of int64, shape (B, length)
        -100 at the last token of a context, and in padding.
    """
    for batch in batches:
        labels = np.full(batch.ids.shape, _IGNORED, np.int64)
        labels[:, :-1] = np.where(batch.attention[:, 1:], batch.ids[:, 1:], _IGNORED)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)}
        yield inputs, labels


def evaluate_splice(
    model: nn.Module,
    site: str | Site,
    sae: Any,
    batches: Iterable[tuple[Any, Any]],
) -> Splice:
    """Measure a model's accuracy and cross-entropy: unmodified, with the SAE, and without the site.

    Parameters
    ----------
    model : torch.nn.Module
        Returns logits, as a tensor or in ``logits``: a classifier's (B, n_classes), or a language
        model's (B, length, vocabulary).
    site : str or Site
    sae : torch.nn.Module
    batches : iterable of (inputs, labels)
        Labels are the class of each input, or the next token at each position (`next_tokens`); -100
        if there is nothing to predict.
    """
    feed = Feed(model)
    place = find_site(model, site)
    known = False
    n = 0
    right, loss = np.zeros(3), np.zeros(3)
    for inputs, labels in batches:
        if labels is None:
            raise InputError("The data has no labels; accuracy needs a label for each input.")
        target = torch.as_tensor(np.asarray(labels), device=feed.device)
        with evaluating(model), torch.no_grad():
            if not known:
                prove_sites(model, [place], feed, inputs)
                known = True
            logits = [feed(inputs)]
            for function in (lambda rows: sae.decode(sae.encode(rows)), torch.zeros_like):
                with replacing(place, function):
                    logits.append(feed(inputs))
        target = target.flatten()
        for number, output in enumerate(logits):
            values = getattr(output, "logits", output).flatten(0, -2)
            if int(target.max()) >= values.shape[1]:
                raise InputError(
                    f"The highest label is {int(target.max())}, but the model returns "
                    f"{values.shape[1]} logits; expected classes numbered from 0, one per logit. "
                    f"Number the labels as the model does."
                )
            right[number] += float((values.argmax(dim=1) == target).sum())
            loss[number] += float(nn.functional.cross_entropy(values, target, reduction="sum"))
        n += int((target != _IGNORED).sum())
    if not n:
        raise InputError("There are no inputs to evaluate the SAE on; expected at least 1.")
    (a, b, c), (d, e, f) = right / n, loss / n
    return Splice(n, a, d, b, e, c, f)


@dataclass(frozen=True)
class Purity:
    """How far a neuron's examples belong to one class, compared with chance.

    Attributes
    ----------
    purity : float
        Share of the most common label among a neuron's examples, averaged over neurons.
    null : float
        The same with labels shuffled among all examples.
    n : int
        Number of neurons in the averages, those with at least two examples.
    """

    purity: float
    null: float
    n: int


def label_purity(run: Run, site: str, *, shuffles: int = 20, seed: int = 0) -> Purity:
    """Compute the label purity of a site's neurons, with its null.

    Parameters
    ----------
    run : Run
        A run of labelled data.
    site : str
    shuffles : int
        Over which the null is averaged.
    seed : int
    """
    inputs = run.folder.inputs
    if "labels" not in inputs:
        raise InputError("The run's data has no labels; label purity needs them.")
    examples = run.folder.examples
    examples = examples[examples["site"] == site]
    labels = inputs["labels"][np.searchsorted(inputs["index"], examples["input"])]
    return purity_of(examples["neuron"].to_numpy(), labels, shuffles=shuffles, seed=seed)


def purity_of(
    neuron: NDArray[np.integer[Any]], labels: NDArray[Any], *, shuffles: int = 20, seed: int = 0
) -> Purity:
    """Compute the label purity of neurons, with its null.

    Parameters
    ----------
    neuron : ndarray of int, shape (n,)
        Neuron of each example.
    labels : ndarray, shape (n,)
        Label of each example.
    shuffles : int
        Over which the null is averaged.
    seed : int
    """
    _, classes = np.unique(labels, return_inverse=True)
    n_neurons = int(neuron.max(initial=-1)) + 1
    sizes = np.bincount(neuron, minlength=n_neurons)
    measured = sizes >= 2
    n_classes = int(classes.max(initial=0)) + 1

    def mean(assigned: NDArray[Any]) -> float:
        # Only pairs that occur, as a full table would be large if labels are tokens.
        pairs, counts = np.unique(neuron * n_classes + assigned, return_counts=True)
        most = np.zeros(n_neurons, np.int64)
        np.maximum.at(most, pairs // n_classes, counts)
        return float((most[measured] / sizes[measured]).mean()) if measured.any() else float("nan")

    rng = np.random.default_rng(seed)
    null = [mean(rng.permutation(classes)) for _ in range(shuffles)]
    return Purity(mean(classes), float(np.mean(null)), int(measured.sum()))


@dataclass(frozen=True)
class SAEReport:
    """All results for one SAE.

    Attributes
    ----------
    name : str
    reconstruction : Reconstruction
    splice : Splice or None
        None if the model is not a classifier or the data has no labels.
    purity : Purity or None
    neurons : pandas.DataFrame
        The latents' rows of `Run.neurons`.
    """

    name: str
    reconstruction: Reconstruction
    splice: Splice | None
    purity: Purity | None
    neurons: pd.DataFrame

    def as_dict(self) -> dict[str, float]:
        """Flat record, with metrics averaged over the latents for which they are defined."""
        record = measured(self.neurons)
        return {"n_latents": record.pop("neurons"), **record, **self.evaluation()}

    def evaluation(self) -> dict[str, float]:
        """Results that the analysis of the latents does not give: cost and purity."""
        r = self.reconstruction
        record: dict[str, float] = {"l0": r.l0, "fvu": r.fvu, "mse": r.mse}
        if self.splice is not None:
            record.update({k: v for k, v in asdict(self.splice).items() if k != "n"})
            record["recovered"] = self.splice.recovered
        if self.purity is not None:
            record["purity"], record["purity_null"] = self.purity.purity, self.purity.null
        return record
