"""What sites of a language model read at every token of a text, and the text around them."""

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
from polyseme.sites import Feed, Site, evaluating, read_sites
from polyseme.views.meanings import are_spaced, word_shares
from polyseme.views.token_windows import TextWindow

Ints = NDArray[np.int64]

_CONTEXTS = 32
_BEFORE, _AFTER = 16, 4  # tokens of a window
_WINDOWS = 64
_LABEL = 24  # tokens to both sides that a label may come from


def read_positions(
    model: nn.Module,
    tokenizer: Any,
    sites: Sequence[Site],
    texts: Texts,
    max_tokens: int,
    advance: Callable[[int], object],
) -> tuple[list[Positions], Ints]:
    """What each site reads at every token that counts, in half precision; and the tokens, (n,).

    ``advance`` is called with the tokens of each batch.
    """
    parts: dict[str, list[NDArray[np.float16]]] = {site.name: [] for site in sites}
    tokens, groups = [], []
    feed, n_contexts = Feed(model, head=False), 0
    for batch in Contexts(texts, tokenizer, max_tokens=max_tokens).batches(_CONTEXTS):
        counted = torch.from_numpy(batch.mask)
        where = counted.nonzero(as_tuple=True)

        def keep(site: Site, _: Any, gather: Any, where: tuple[Tensor, ...] = where) -> None:
            parts[site.name].append(gather(*where).half().cpu().numpy())

        with evaluating(model), torch.no_grad(), read_sites(model, sites, keep, counted):
            feed({"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)})
        tokens.append(batch.ids[batch.mask])
        groups.append(where[0].numpy() + n_contexts)
        n_contexts += len(batch.ids)
        advance(len(tokens[-1]))
    context = np.concatenate(groups)
    of_sites = [Positions(np.concatenate(parts[site.name]), context) for site in sites]
    return of_sites, np.concatenate(tokens)


class TextAround:
    """The text around tokens, as a run would keep it for its examples.

    Parameters
    ----------
    tokens, groups : ndarray of int64, shape (n,)
        All tokens of the text, and the context of each.
    tokenizer
        That made them.
    """

    def __init__(self, tokens: Ints, groups: Ints, tokenizer: Any) -> None:
        self._tokens, self._groups, self._tokenizer = tokens, groups, tokenizer
        ids, counts = np.unique(tokens, return_counts=True)
        texts = pieces(tokenizer, ids)
        self.shares, self.spaced = word_shares(texts, counts), are_spaced(texts)

    def windows(self, at: Ints) -> list[TextWindow]:
        """The window around each of some tokens."""
        windows = []
        for place in at:
            around = np.arange(max(0, place - _LABEL), min(len(self._tokens), place + 1 + _LABEL))
            around = around[self._groups[around] == self._groups[place]]
            texts = pieces(self._tokenizer, self._tokens[around])
            centre = int(place - around[0])
            windows.append(TextWindow(texts, np.full(len(texts), np.nan, np.float32), centre))
        return windows


class Windows:
    """Vectors of the text around tokens, by a sentence encoder.

    Parameters
    ----------
    tokens, groups : ndarray of int64, shape (n,)
        All tokens of the text, and the context of each.
    tokenizer
        That made them.
    load_encoder : callable () -> (torch.nn.Module, tokenizer)
        Such as MiniLM. A window is the mean of what it gives for its tokens.
    """

    def __init__(
        self,
        tokens: Ints,
        groups: Ints,
        tokenizer: Any,
        load_encoder: Callable[[], tuple[nn.Module, Any]],
    ) -> None:
        self._tokens, self._groups, self._tokenizer = tokens, groups, tokenizer
        self._encoder = cache(load_encoder)
        self._known: dict[int, NDArray[np.float32]] = {}

    def __call__(self, at: Ints) -> NDArray[np.float32]:
        """Vectors (n, width) of the windows around some tokens."""
        new = [int(token) for token in at if int(token) not in self._known]
        for start in range(0, len(new), _WINDOWS):
            part = new[start : start + _WINDOWS]
            self._known.update(zip(part, self._encoded(part), strict=True))
        return np.stack([self._known[int(token)] for token in at])

    def _encoded(self, at: list[int]) -> NDArray[np.float32]:
        model, tokenizer = self._encoder()
        spans = [np.arange(max(0, i - _BEFORE), min(len(self._tokens), i + 1 + _AFTER)) for i in at]
        texts = [
            self._tokenizer.decode(self._tokens[span[self._groups[span] == self._groups[i]]])
            for span, i in zip(spans, at, strict=True)
        ]
        encoded = tokenizer(
            texts, padding=True, return_tensors="pt", truncation=True, max_length=64
        )
        mask = encoded["attention_mask"][:, :, None]
        with evaluating(model), torch.no_grad():
            states = model(**encoded).last_hidden_state
            means = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return np.asarray(means.float().cpu().numpy(), np.float32)
