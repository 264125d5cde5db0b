"""Token importances of a run's examples: all at once, or one neuron's on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from polyseme.analysis.kinds import Engine
from polyseme.analysis.reopen import sites_of_run
from polyseme.attribution.masking import Places, is_causal, n_masked_tokens
from polyseme.attribution.token_importances import token_importances
from polyseme.capture import Selection
from polyseme.errors import InputError
from polyseme.interrupts import interrupt_between_steps
from polyseme.sites import Feed, Site, evaluating, prove_sites
from polyseme.store import NO_IMPORTANCE, RunWriter, encode_importances
from polyseme.views import Run

Array = NDArray[Any]

STATE = "importances"
CHECKPOINT_SECONDS = 300.0


def mask_token(tokenizer: Any) -> int:
    """The id to mask with: the tokenizer's mask token, or else its padding, end or start token.

    Raises
    ------
    InputError
        It has none of them.
    """
    for name in ("mask", "pad", "eos", "bos"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(token, int):
            return token
    raise InputError(
        f"The tokenizer, a {type(tokenizer).__name__}, has no mask, padding, end or start token, "
        f"so there is nothing to mask tokens with: set its pad_token, or leave out importances."
    )


def site_importances(
    model: nn.Module,
    sites: Sequence[Site],
    examples: Sequence[Selection],
    inputs: dict[str, Array],
    writer: RunWriter,
    engine: Engine,
    *,
    mask_id: int,
    window: tuple[int, int],
    show: Callable[[int], None],
) -> list[Array]:
    """Importances of all examples of all sites, with checkpoints for a resume.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of Site
    examples : sequence of Selection
        The examples of each site's neurons.
    inputs : dict of str to ndarray
        The run's contexts: ``index``, ``tokens`` and ``lengths``.
    writer : RunWriter
    engine : Engine
        Masks the tokens.
    mask_id : int
    window : (int, int)
    show : callable
        Called with the number of contexts completed.

    Returns
    -------
    list of ndarray of uint8, shape (n_examples, before + 1 + after)
        One array per site, as stored in the run.
    """
    before, after = window
    tokens, lengths = inputs["tokens"].astype(np.int64), inputs["lengths"]
    places = [
        Places(
            np.searchsorted(inputs["index"], chosen.index),
            np.asarray(chosen.position, dtype=np.int64),
            np.asarray(chosen.neuron, dtype=np.int64),
        )
        for chosen in examples
    ]
    importances = [
        np.full((len(place.contexts), before + 1 + after), NO_IMPORTANCE, np.uint8)
        for place in places
    ]
    done = 0
    saved = writer.load_state(STATE)
    if saved is not None:
        importances = [saved[0][str(number)] for number in range(len(importances))]
        done = int(saved[1]["done"])

    def save() -> None:
        arrays = {str(number): array for number, array in enumerate(importances)}
        writer.save_state(STATE, arrays, {"done": done})

    last = time.monotonic()
    if done < len(tokens):
        steps = engine.importances(
            model,
            sites,
            tokens,
            np.arange(tokens.shape[1]) < lengths[:, None],
            places,
            mask_id=mask_id,
            before=before,
            after=after,
            causal=is_causal(model, sites, tokens, lengths),
            start=done,
        )
        try:
            with interrupt_between_steps() as pause:
                for step in steps:
                    for array, (rows, shares) in zip(importances, step.importances, strict=True):
                        array[rows] = encode_importances(shares)
                    done = step.stop
                    show(done)
                    pause()
                    if time.monotonic() - last > CHECKPOINT_SECONDS:
                        save()
                        last = time.monotonic()
        finally:
            save()
    return importances


def estimated_seconds(
    lengths: Array, n_tokens: int, seconds: float, *, window: tuple[int, int]
) -> float:
    """Estimate the time of exact importances from the time of the pass."""
    return seconds / max(n_tokens, 1) * n_masked_tokens(lengths, before=window[0])


def neuron_importances(
    model: nn.Module,
    tokenizer: Any,
    run: Run,
    site: str,
    neuron: int,
    examples: Any = None,
    *,
    saes: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """Compute exact token importances of a neuron's examples, for runs without them.

    Parameters
    ----------
    model : torch.nn.Module
        The model that was analysed.
    tokenizer : transformers.PreTrainedTokenizerBase
    run : Run
        A run of texts.
    site : str
        Name of the site.
    neuron : int
    examples : array of int, optional
        Numbers of its examples; by default all.
    saes : mapping of str to SAE, optional
        By site name, if the run has sites that are SAEs at a hook point.

    Returns
    -------
    ndarray of float32, shape (n, before + 1 + after)
        See `polyseme.attribution.token_importances`. Columns are the positions of the run's window;
        NaN outside the context.

    Raises
    ------
    InputError
        The run is of images, has no such neuron or example, or is of another model.
    """
    frame = run.neuron(site, neuron).examples
    if "window" not in run.metadata["settings"]:
        raise InputError("The run is of images, so its examples have no tokens to mask.")
    before, after = (int(n) for n in run.metadata["settings"]["window"])
    numbers = np.arange(len(frame)) if examples is None else np.asarray(examples, dtype=np.int64)
    if numbers.ndim != 1 or ((numbers < 0) | (numbers >= len(frame))).any():
        raise InputError(
            f"examples is {examples!r}; expected numbers from 0 to {len(frame) - 1}, as neuron "
            f"{neuron} of site {site!r} has {len(frame)} examples."
        )
    chosen = frame.iloc[numbers]
    if not len(chosen):
        return np.empty((0, before + 1 + after), np.float32)
    rows = np.searchsorted(run.folder.inputs["index"], chosen["input"].to_numpy(np.int64))
    stored, lengths = run.folder.contexts(rows)
    tokens = stored.astype(np.int64)
    attention = np.arange(tokens.shape[1]) < lengths[:, None]
    # Padding may be stored as any id.
    tokens[~attention] = tokens[0, 0]
    [place] = sites_of_run(run, model, [site], saes or {})
    with evaluating(model):
        inputs = {"input_ids": tokens[:1], "attention_mask": attention[:1].astype(np.int64)}
        prove_sites(model, [place], Feed(model), inputs)
    steps = token_importances(
        model,
        place,
        tokens,
        attention,
        chosen["position"].to_numpy(np.int64),
        np.full(len(chosen), neuron),
        mask_id=mask_token(tokenizer),
        before=before,
        after=after,
        batch_size=64,
        causal=is_causal(model, [place], tokens, lengths),
    )
    *_, (_, importances) = steps
    assert importances is not None
    return importances


def live_importances(
    model: nn.Module, tokenizer: Any, *, saes: Mapping[str, Any] | None = None
) -> Callable[..., dict[str, Any]]:
    """Make the function ``importances(run, site, neuron, examples)`` for the explorer.

    ``site`` is a site's number. It returns ``{"importances": rows}``, with None for NaN. It is
    thread-safe: calls are served one at a time.

    Parameters
    ----------
    model, tokenizer, saes
        See `neuron_importances`.
    """
    lock = threading.Lock()

    def importances(run: Run, site: int, neuron: int, examples: Sequence[int]) -> dict[str, Any]:
        if not isinstance(site, int) or not 0 <= site < len(run.sites):
            raise InputError(
                f"site is {site!r}; a number from 0 to {len(run.sites) - 1} is expected."
            )
        with lock:
            values = neuron_importances(
                model, tokenizer, run, run.sites[site], neuron, list(examples), saes=saes
            )
        return {
            "importances": [
                [round(float(x), 4) if np.isfinite(x) else None for x in row] for row in values
            ]
        }

    return importances
