"""Inputs of a language model's sites at every token of a text, and the text around tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.data import Contexts, Texts
from polyseme.data.token_texts import pieces
from polyseme.evaluate.planted import Positions
from polyseme.sites import Feed, Site, evaluating, read_sites, stopping_after
from polyseme.views.meanings import are_spaced, word_shares
from polyseme.views.token_windows import TextWindow

Ints = NDArray[np.int64]

_CONTEXTS = 32
_BEFORE, _AFTER = 16, 4  # tokens of a window
_WINDOWS = 64
_LABEL = 24  # tokens on either side that a label may use


def read_positions(
    model: nn.Module,
    tokenizer: Any,
    sites: Sequence[Site],
    texts: Texts,
    max_tokens: int,
    advance: Callable[[int], object],
) -> tuple[list[Positions], Ints]:
    """Read each site's input at every token that counts, in half precision, and the tokens, (n,).

    ``advance`` is called with the number of tokens of each batch.
    """
    parts: dict[str, list[NDArray[np.float16]]] = {site.name: [] for site in sites}
    tokens, groups = [], []
    feed, n_contexts = Feed(model, head=False), 0
    for batch in Contexts(texts, tokenizer, max_tokens=max_tokens).batches(_CONTEXTS):
        counted = torch.from_numpy(batch.mask)
        where = counted.nonzero(as_tuple=True)

        def keep(site: Site, _: Any, gather: Any, where: tuple[Tensor, ...] = where) -> None:
            parts[site.name].append(gather(*where).half().cpu().numpy())

        reading = read_sites(model, sites, keep, counted)
        with evaluating(model), torch.no_grad(), reading, stopping_after(sites):
            feed({"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)})
        tokens.append(batch.ids[batch.mask])
        groups.append(where[0].numpy() + n_contexts)
        n_contexts += len(batch.ids)
        advance(len(tokens[-1]))
    context = np.concatenate(groups)
    of_sites = [Positions(np.concatenate(parts[site.name]), context) for site in sites]
    return of_sites, np.concatenate(tokens)


class TextAround:
    """The text around tokens.

    Parameters
    ----------
    tokens, groups : ndarray of int64, shape (n,)
        All tokens of the text, and the context of each.
    tokenizer
        The tokenizer that made them.

    Attributes
    ----------
    shares : dict of str to float
        Share of each word in the text.
    spaced : bool
        Property of the vocabulary, see `polyseme.views.meanings.are_spaced`.
    """

    def __init__(self, tokens: Ints, groups: Ints, tokenizer: Any) -> None:
        self._tokens, self._groups, self._tokenizer = tokens, groups, tokenizer
        ids, counts = np.unique(tokens, return_counts=True)
        texts = pieces(tokenizer, ids)
        self.shares, self.spaced = word_shares(texts, counts), are_spaced(texts)

    def _around(self, place: int, before: int, after: int) -> Ints:
        """The tokens of one context around a place."""
        around = np.arange(max(0, place - before), min(len(self._tokens), place + 1 + after))
        return np.asarray(around[self._groups[around] == self._groups[place]])

    def windows(self, at: Ints) -> list[TextWindow]:
        """The window around each of some tokens, as a run stores it for its examples."""
        windows = []
        for place in at.tolist():
            around = self._around(place, _LABEL, _LABEL)
            texts = pieces(self._tokenizer, self._tokens[around])
            activations = np.full(len(texts), np.nan, np.float32)
            windows.append(TextWindow(texts, activations, int(place - around[0])))
        return windows

    def spelled(self, at: Ints) -> list[str]:
        """The text around each of some tokens."""
        around = [self._around(place, _BEFORE, _AFTER) for place in at.tolist()]
        return [self._tokenizer.decode(self._tokens[tokens]) for tokens in around]


class WindowVectors:
    """Vectors of the text around tokens, from a sentence encoder.

    Parameters
    ----------
    text : TextAround
    load_encoder : callable () -> (torch.nn.Module, tokenizer)
        Loads an encoder such as MiniLM. A vector is the mean of its outputs over tokens.
    """

    def __init__(self, text: TextAround, load_encoder: Callable[[], tuple[nn.Module, Any]]) -> None:
        self._text, self._encoder = text, cache(load_encoder)
        self._known: dict[int, NDArray[np.float32]] = {}

    def __call__(self, at: Ints) -> NDArray[np.float32]:
        """Vectors (n, width) of the text around some tokens."""
        new = np.array([token for token in at.tolist() if token not in self._known], np.int64)
        for start in range(0, len(new), _WINDOWS):
            part = new[start : start + _WINDOWS]
            self._known.update(zip(part.tolist(), self._encoded(part), strict=True))
        return np.stack([self._known[token] for token in at.tolist()])

    def _encoded(self, at: Ints) -> NDArray[np.float32]:
        model, tokenizer = self._encoder()
        encoded = tokenizer(
            self._text.spelled(at),
            padding=True,
            return_tensors="pt",
            truncation=True,
            max_length=64,
        )
        mask = encoded["attention_mask"][:, :, None]
        with evaluating(model), torch.no_grad():
            states = model(**encoded).last_hidden_state
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return np.asarray(means.float().cpu().numpy(), np.float32)
