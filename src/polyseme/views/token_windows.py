"""Examples in texts: the tokens around each, and the activation at each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.errors import InputError
from polyseme.store import RunFolder, SiteInfo, decode_importances


@dataclass(frozen=True)
class TextWindow:
    """Tokens around one example.

    Attributes
    ----------
    tokens : list of str
        The texts of the tokens.
    activations : ndarray of float32, shape (n,)
        The neuron's activation at each token; NaN outside the window that the run stores.
    centre : int
        Index of the example's own token, which activates the neuron most.
    importances : ndarray of float32, shape (n,), or None
        How much of the neuron's activation depends on each token, from 0 to 1; NaN where
        unknown. None if the run has no importances.
    """

    tokens: list[str]
    activations: NDArray[np.float32]
    centre: int
    importances: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"TextWindow({str(self)!r})"

    def __str__(self) -> str:
        before, after = self.tokens[: self.centre], self.tokens[self.centre + 1 :]
        return f"{''.join(before)}»{self.tokens[self.centre]}«{''.join(after)}".replace("\n", "⏎")


def windows_of(
    folder: RunFolder,
    info: SiteInfo,
    neuron: int,
    examples: pd.DataFrame,
    before: int | None = None,
    after: int | None = None,
) -> list[TextWindow]:
    """The text windows around examples of one neuron.

    Parameters
    ----------
    folder : RunFolder
    info : SiteInfo
    neuron : int
    examples : pandas.DataFrame
        With ``example``, ``input``, ``position`` and ``activation``.
    before, after : int, optional
        Number of tokens before and after each example; by default those of the run's window.
    """
    arrays, inputs = folder.site(info.number), folder.inputs
    if "tokens" not in inputs or "windows" not in arrays:
        raise InputError("The run is on images; its examples have no text.")
    kept = int(folder.metadata["settings"]["window"][0])
    numbers = examples["example"].to_numpy(np.int64)
    shares = folder.site_rows(info.number, "windows", neuron, neuron + 1)[numbers]
    activations = shares.astype(np.float32)
    activations *= examples["activation"].to_numpy(np.float32)[:, None]
    importances = None
    if "importances" in arrays:
        stored = folder.site_rows(info.number, "importances", neuron, neuron + 1)[numbers]
        importances = decode_importances(stored)
    sizes = []
    for name, size, default in (
        ("before", before, kept),
        ("after", after, shares.shape[1] - kept - 1),
    ):
        if size is not None and (isinstance(size, bool) or int(size) != size or size < 0):
            raise InputError(f"{name} is {size!r}; expected a non-negative number of tokens.")
        sizes.append(default if size is None else int(size))
    contexts = np.searchsorted(inputs["index"], examples["input"].to_numpy(np.int64))
    tokens, lengths = folder.contexts(contexts)
    ids = np.unique(tokens[np.arange(tokens.shape[1]) < lengths[:, None]])
    texts = dict(zip(ids.tolist(), folder.token_texts.loc[ids], strict=True))
    windows = []
    for row, position in enumerate(examples["position"].to_numpy(np.int64)):
        start = max(0, int(position) - sizes[0])
        stop = min(int(lengths[row]), int(position) + sizes[1] + 1)
        first = int(position) - kept
        windows.append(
            TextWindow(
                [texts[token] for token in tokens[row, start:stop].tolist()],
                _moved(activations[row], start - first, stop - first),
                int(position) - start,
                None
                if importances is None
                else _moved(importances[row], start - first, stop - first),
            )
        )
    return windows


def _moved(values: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    """Entries ``start`` to ``stop - 1``, NaN where there are none."""
    moved = np.full(stop - start, np.nan, np.float32)
    first, last = max(start, 0), max(min(stop, len(values)), max(start, 0))
    moved[first - start : last - start] = values[first:last]
    return moved


def top_tokens(folder: RunFolder, info: SiteInfo, neuron: int) -> dict[str, pd.DataFrame]:
    """Tokens that a neuron promotes and suppresses most; empty if unknown."""
    if "promoted_tokens" not in folder.site(info.number):
        return {}
    texts = folder.token_texts
    by_side = {}
    for side in ("promoted", "suppressed"):
        tokens, logits = (
            folder.site_rows(info.number, f"{side}_{what}", neuron, neuron + 1)[0]
            for what in ("tokens", "logits")
        )
        words = [texts.get(int(token), f"<{token}>") for token in tokens]
        by_side[side] = pd.DataFrame({"token": words, "logit": logits})
    return by_side
