"""Examples in text: the tokens around each, and the activation at each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from polyseme.errors import InputError
from polyseme.store import RunFolder, SiteInfo


@dataclass(frozen=True)
class TextWindow:
    """Tokens around one example.

    Attributes
    ----------
    tokens : list of str
        How they read.
    activations : ndarray of float32, shape (n,)
        The neuron's, at each of them.
    centre : int
        Which of them the example is: the one that activates the neuron most.
    """

    tokens: list[str]
    activations: NDArray[np.float32]
    centre: int

    def __str__(self) -> str:
        before, after = self.tokens[: self.centre], self.tokens[self.centre + 1 :]
        return f"{''.join(before)}»{self.tokens[self.centre]}«{''.join(after)}".replace("\n", "⏎")


def windows_of(
    folder: RunFolder, info: SiteInfo, examples: pd.DataFrame, rows: NDArray[np.int64]
) -> list[TextWindow]:
    """The windows of examples of one site.

    Parameters
    ----------
    folder : RunFolder
    info : SiteInfo
    examples : pandas.DataFrame
        With ``input``, ``position`` and ``activation``.
    rows : ndarray of int64
        Their numbers among the site's examples.
    """
    arrays, inputs = folder.site(info.number), folder.inputs
    if "tokens" not in inputs or "windows" not in arrays:
        raise InputError("The run is one of images; its examples have no text.")
    before = int(folder.metadata["settings"]["window"][0])
    texts = folder.token_texts
    found = []
    contexts = np.searchsorted(inputs["index"], examples["input"].to_numpy(np.int64))
    for context, position, activation, shares in zip(
        contexts, examples["position"], examples["activation"], arrays["windows"][rows], strict=True
    ):
        length = int(inputs["lengths"][context])
        start = max(0, int(position) - before)
        stop = min(length, int(position) - before + len(shares))
        ids = inputs["tokens"][context, start:stop]
        skipped = start - (int(position) - before)
        shown = shares[skipped : skipped + len(ids)].astype(np.float32) * np.float32(activation)
        found.append(TextWindow(list(texts.loc[ids]), shown, int(position) - start))
    return found


def top_tokens(folder: RunFolder, info: SiteInfo, neuron: int) -> dict[str, pd.DataFrame]:
    """Tokens that a neuron promotes and suppresses, by name of the direction; empty if unknown."""
    arrays = folder.site(info.number)
    if "promoted_tokens" not in arrays:
        return {}
    texts = folder.token_texts
    return {
        side: pd.DataFrame(
            {
                "token": [
                    texts.get(int(token), f"<{token}>")
                    for token in arrays[f"{side}_tokens"][neuron]
                ],
                "logit": arrays[f"{side}_logits"][neuron],
            }
        )
        for side in ("promoted", "suppressed")
    }
