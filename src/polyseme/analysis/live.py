"""Functions for the explorer's live pages: plain values in, JSON-serialisable values out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from polyseme.analysis.classifying import METHOD, ImageClassifier
from polyseme.analysis.probing import Prober
from polyseme.errors import InputError
from polyseme.views import Run

JSON = dict[str, Any]

# Neurons listed per token or class; tokens read of a text.
K, MAX_K, MAX_TOKENS = 10, 100, 512


def live_probe(
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    saes: Mapping[str, Any] | None = None,
) -> Callable[..., JSON]:
    """Make the function ``probe(run, text, k=10)`` for the explorer.

    Parameters
    ----------
    model, tokenizer, saes
        See `polyseme.Run.probe`.

    Returns
    -------
    callable
        Thread-safe: texts are read one at a time.
    """
    known: dict[Path, Prober] = {}
    lock = threading.Lock()

    def probe(run: Run, text: str, k: int = K) -> JSON:
        with lock:
            if run.path not in known:
                known[run.path] = Prober(run, model, tokenizer, saes=saes)
            return probe_json(known[run.path], text, k)

    return probe


def probe_json(prober: Prober, text: str, k: int = K) -> JSON:
    """Probe the first 512 tokens of a text.

    Returns
    -------
    dict
        ``tokens``: their text; ``left_out``: a bool for each; ``truncated``: whether the text
        continues; ``by``: what the neurons are ranked by; ``active``: for each token the top k
        neurons, as dicts of ``token``, ``site`` (its number), ``neuron``, ``activation``, ``share``
        (None without a maximum), ``feature`` (-1 if none is near), ``label``, ``n_examples``.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise InputError(f"k is {k!r}; a whole number from 1 to {MAX_K} is expected.")
    return prober.probe(text, k=k, max_tokens=MAX_TOKENS).as_json(prober.run.sites)


def live_classify(model: nn.Module) -> Callable[..., JSON]:
    """Make the thread-safe ``classify(run, pixels=None, index=None)`` for the explorer.

    Parameters
    ----------
    model : torch.nn.Module
        See `ImageClassifier`.
    """
    known: dict[Path, ImageClassifier] = {}
    lock = threading.Lock()

    def classify(run: Run, pixels: Sequence[float] | None = None, index: int | None = None) -> JSON:
        with lock:
            if run.path not in known:
                known[run.path] = ImageClassifier(run, model)
            return classify_json(known[run.path], pixels, index)

    return classify


def classify_json(
    classifier: ImageClassifier, pixels: Sequence[float] | None = None, index: int | None = None
) -> JSON:
    """Classify a drawn image or one in the run.

    Parameters
    ----------
    classifier : ImageClassifier
    pixels : sequence of float
        Each from 0, the lowest value of the run's data, to 1; in row-major order, channels last.
    index : int
        Instead of pixels: number of an input in the data.

    Returns
    -------
    dict
        ``pixels`` as above; ``label``: the true class or None; ``predicted``, ``logits``,
        ``probabilities``; ``neurons``: the most important for each class, as dicts of ``site`` (its
        number), ``neuron``, ``activation``, ``share``, ``feature``, ``label``, ``n_examples`` and
        ``contributions`` to each logit (None where unknown); ``totals``: for each site the sum of
        the ``contributions`` of all its neurons, and how many are ``active``; ``method``: what a
        contribution is.
    """
    run = classifier.run
    if (pixels is None) == (index is None):
        raise InputError("Give either pixels or index.")
    label = None
    if index is not None:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise InputError(f"index is {index!r}; the number of an input, from 0, is expected.")
        stored, label = classifier.stored(index)
    else:
        stored = _stored(run, pixels)
    classification = classifier.classify(stored)
    number = {name: n for n, name in enumerate(run.sites)}
    columns = {name: classification.neurons[name].tolist() for name in classification.neurons}
    columns["site"] = [number[name] for name in columns["site"]]
    columns["share"] = [_or_none(share) for share in columns["share"]]
    columns["contributions"] = [_or_none_each(row) for row in classification.contributions]
    sites = np.array(columns["site"], dtype=np.int64)
    return {
        "pixels": _shown(run, stored),
        "label": label,
        "predicted": classification.predicted,
        "logits": classification.logits.tolist(),
        "probabilities": classification.probabilities.tolist(),
        "neurons": [
            {name: values[row] for name, values in columns.items()}
            for row in classification.important(K + 2)
        ],
        "totals": [
            {
                "site": n,
                "active": int((sites == n).sum()),
                "contributions": _or_none_each(
                    classification.contributions[sites == n].sum(axis=0)
                ),
            }
            for n in number.values()
        ],
        "method": METHOD,
    }


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _or_none_each(values: Any) -> list[float | None]:
    return [_or_none(value) for value in values]


def _image_axes(run: Run) -> tuple[tuple[int, ...], bool]:
    """An input's shape as an image, and whether channels come first."""
    shape = run.metadata["data"].get("image_shape")
    if not shape:
        raise InputError("The run's inputs are not images; analyse with image_shape to draw one.")
    first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
    return tuple(shape), first


def _range(run: Run) -> tuple[float, float]:
    data = run.metadata["data"]
    low, high = float(data["low"]), float(data["high"])
    return low, high if high > low else low + 1


def _stored(run: Run, pixels: Any) -> Any:
    """Convert pixels from 0 to 1, channels last, to the form in which the run stores inputs."""
    shape, channels_first = _image_axes(run)
    try:
        values = np.asarray(pixels, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        values = np.full(1, np.nan)
    wanted = f"numbers from 0 to 1 are expected, those of an image of shape {shape}, channels last."
    if len(values) != int(np.prod(shape)):
        raise InputError(f"pixels are {len(values)} values; {int(np.prod(shape))} {wanted}")
    inside = (values >= 0) & (values <= 1)
    if not inside.all():
        place = int(np.argmin(inside))
        raise InputError(f"pixels hold {values[place]} at place {place}; {len(values)} {wanted}")
    if channels_first:
        values = np.moveaxis(values.reshape(*shape[1:], shape[0]), -1, 0)
    values = values.reshape(run.metadata["data"]["shape"])
    if run.folder.inputs["pixels"].dtype == np.uint8:
        return np.rint(values * 255).astype(np.uint8)
    low, high = _range(run)
    return (low + values * (high - low)).astype(np.float32)


def _shown(run: Run, stored: Any) -> list[float]:
    shape, channels_first = _image_axes(run)
    values = stored.reshape(shape).astype(np.float64)
    if stored.dtype == np.uint8:
        values = values / 255
    else:
        low, high = _range(run)
        values = np.clip((values - low) / (high - low), 0, 1)
    if channels_first:
        values = np.moveaxis(values, 0, -1)
    pixels: list[float] = np.round(values, 4).ravel().tolist()
    return pixels
