"""Token importances of all examples at once: each masked context serves every neuron and site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from polyseme.attribution.truncated import Reach, Wanted
from polyseme.attribution.windows import Examples, Floats, Integers, examples_in_text, shares_of
from polyseme.errors import InputError
from polyseme.sites.hooks import evaluating
from polyseme.sites.site import Site

# Number of neighbouring masked tokens whose copies run together. A causal model runs from the first
# of these on, so a larger number would waste work.
_NEIGHBOURS = 8
# Largest allowed difference between activations computed with and without cached keys and values,
# relative to the effect of changing one earlier token.
_SAME = {torch.float32: 1e-2, torch.float64: 1e-2}
_SAME_IN_HALF = 0.1
# Largest allowed effect of changing later tokens on activations at earlier ones, relative to the
# effect at the changed tokens. Rounding, as when experts get other batches, is far below; one layer
# of attention in a freshly initialised model is far above.
_LEAK = 1e-5
# Numbers of contexts and of neurons per site for these checks.
_LOOKED_AT, _SAMPLE = 3, 1024


@dataclass(frozen=True)
class Places:
    """Examples of one site.

    Attributes
    ----------
    contexts : ndarray of int64, shape (m,)
        Row of each example's context.
    positions, neurons : ndarray of int64, shape (m,)
        The position of its max-activating token, and its neuron.
    """

    contexts: Integers
    positions: Integers
    neurons: Integers


@dataclass(frozen=True)
class ContextImportances:
    """Results of masking the tokens of a few contexts.

    Attributes
    ----------
    stop : int
        All contexts before this one are done.
    importances : list of (ndarray of int64, ndarray of float32)
        For each site, the examples in these contexts and their importances, (n, before + 1 +
        after); see `token_importances`.
    """

    stop: int
    importances: list[tuple[Integers, Floats]]


def context_importances(
    model: nn.Module,
    sites: Sequence[Site],
    ids: Any,
    attention: Any,
    places: Sequence[Places],
    *,
    mask_id: int,
    before: int = 20,
    after: int = 10,
    causal: bool = True,
    start: int = 0,
    stop: int | None = None,
    batch_size: int = 4,
) -> Iterator[ContextImportances]:
    """Compute `token_importances` for examples of many neurons in the same contexts.

    Token by token, a context is masked once for all of its examples, and the changes are read at
    all sites. A causal model runs only from the masked token to the end of the window, with cached
    keys and values of the tokens before, if the model proves to give the same results with them. So
    a context of L tokens costs about L * (before + 1) tokens, however many examples it has.

    Parameters
    ----------
    model : torch.nn.Module
        As in `token_importances`.
    sites : sequence of Site
    ids : array of int, shape (M, L)
        Token ids of the contexts.
    attention : array of bool, shape (M, L)
        False for padding.
    places : sequence of Places
        The examples of each site.
    mask_id, before, after, causal
        As in `token_importances`.
    start, stop : int
        The first context to process, if those before it are done, and the end; by default all.
    batch_size : int
        Number of contexts whose masked copies go through the model together.

    Yields
    ------
    ContextImportances
        For a few contexts each.

    Raises
    ------
    InputError, SiteError
        As `token_importances`.
    """
    ids, attended = np.asarray(ids, dtype=np.int64), np.asarray(attention).astype(bool)
    if len(places) != len(sites):
        raise InputError(f"There are {len(sites)} sites, but places for {len(places)}.")
    work = _Masking(model, sites, mask_id, before, after, causal)
    orders = [np.lexsort((place.positions, place.contexts)) for place in places]
    ends = [place.contexts[order] for place, order in zip(places, orders, strict=True)]
    last = len(ids) if stop is None else stop
    for first in range(start, last, batch_size):
        end_of_batch = min(first + batch_size, last)
        here = [
            order[slice(*np.searchsorted(end, [first, end_of_batch]))]
            for order, end in zip(orders, ends, strict=True)
        ]
        batch = [
            Places(place.contexts[rows] - first, place.positions[rows], place.neurons[rows])
            for place, rows in zip(places, here, strict=True)
        ]
        rows = slice(first, end_of_batch)
        importances = work(ids[rows], attended[rows], batch)
        yield ContextImportances(end_of_batch, list(zip(here, importances, strict=True)))


def is_causal(model: nn.Module, sites: Sequence[Site], ids: Any, lengths: Any = None) -> bool:
    """Whether a model's tokens see only earlier tokens, tested by changing later ones.

    The second half of a context is replaced with other tokens. The model is causal if activations
    before them stay the same while those at the replaced tokens change. If nothing changes, or the
    result is in doubt, it counts as not causal: then whole contexts are run, which is slower but
    correct for every model.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of Site
    ids : array of int, shape (L,) or (M, L)
        Token ids of contexts, of which the longest few are tested.
    lengths : array of int, shape (M,), optional
        Number of tokens of each context without padding; all by default.

    Returns
    -------
    bool
        True for contexts of a single token, where it makes no difference.
    """
    rows = np.atleast_2d(np.asarray(ids, dtype=np.int64))
    ends = np.full(len(rows), rows.shape[1]) if lengths is None else np.asarray(lengths)
    longest = np.argsort(-ends, kind="stable")[:_LOOKED_AT]
    contexts = [rows[row, : ends[row]] for row in longest if ends[row] > 1]
    reach = Reach(model, sites)
    with evaluating(model), torch.no_grad():
        return all(_sees_no_later(reach, sites, context) for context in contexts)


def _sees_no_later(reach: Reach, sites: Sequence[Site], row: Integers) -> bool:
    """Whether changing the second half of a context leaves activations in the first unchanged."""
    middle = len(row) // 2
    changed = row.copy()
    changed[middle:] = _others(row)[middle:]
    attended = np.ones((1, len(row)), bool)
    wanted = [_sample(site, np.arange(len(row))) for site in sites]
    # One context at a time, so that the same numbers go through the same operations.
    before, after = (reach(ids[None], attended, wanted) for ids in (row, changed))
    seen_to_change = False
    for old, new in zip(before, after, strict=True):
        moved = (old - new).abs().reshape(len(row), -1)
        earlier, later = moved[:middle].max(), moved[middle:].max()
        # NaN, from a site that overflows, is never within a limit.
        if not bool(earlier <= _LEAK * later):
            return False
        seen_to_change |= bool(later > 0)
    return seen_to_change


def _others(row: Integers) -> Integers:
    """Replace each token with another of the context's own, which the model knows."""
    known = np.unique(row)
    if len(known) == 1:
        return np.full(len(row), known[0] - 1 if known[0] > 0 else 1)
    return known[(np.searchsorted(known, row) + 1) % len(known)]


def _sample(site: Site, places: Integers, first: int = 0) -> Wanted:
    """Evenly spaced neurons of a site, at some positions of a context that begins at ``first``."""
    neurons = np.unique(np.linspace(0, site.n_neurons - 1, _SAMPLE).astype(np.int64))
    positions = np.repeat(places - first, len(neurons))
    return np.zeros(len(positions), np.int64), positions, np.tile(neurons, len(places))


def n_masked_tokens(lengths: NDArray[np.int64], *, before: int, causal: bool = True) -> int:
    """Estimate how many tokens `context_importances` runs, for contexts full of examples."""
    lengths = np.asarray(lengths, dtype=np.int64)
    each = np.minimum(lengths, before + (_NEIGHBOURS + 1) // 2) if causal else lengths
    return int((lengths * each).sum())


class _Masking:
    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        mask_id: int,
        before: int,
        after: int,
        causal: bool,
    ) -> None:
        self.model, self.sites, self.mask_id = model, sites, mask_id
        self.before, self.after, self.causal = before, after, causal
        self.reach = Reach(model, sites)
        #: None until known
        self.goes_on: bool | None = None if causal and self.reach.takes_past else False

    def __call__(
        self, ids: Integers, attended: NDArray[np.bool_], batch: list[Places]
    ) -> list[Floats]:
        examples = [
            examples_in_text(
                site,
                ids[place.contexts],
                attended[place.contexts],
                place.positions,
                place.neurons,
                self.mask_id,
                self.before,
                self.after,
                self.causal,
            )
            for site, place in zip(self.sites, batch, strict=True)
        ]
        with evaluating(self.model), torch.no_grad():
            unmasked, past = self._unmasked(ids, attended, batch)
            pairs = [
                _Pairs.from_places(place, e, self.mask_id)
                for place, e in zip(batch, examples, strict=True)
            ]
            for masked in self._copies(pairs, ids.shape[1]):
                self._mask(ids, attended, pairs, masked, past)
        importances = []
        for e, pair, activations in zip(examples, pairs, unmasked, strict=True):
            drops = np.zeros(e.places.shape, np.float32)
            drops[pair.example, pair.column] = activations[pair.example] - pair.values
            importances.append(shares_of(e, drops, activations, self.before))
        return importances

    def _unmasked(
        self, ids: Integers, attended: NDArray[np.bool_], batch: list[Places]
    ) -> tuple[list[Floats], Any]:
        """Each example's activation, and the keys and values of all tokens if usable."""
        wanted: list[Wanted] = [(place.contexts, place.positions, place.neurons) for place in batch]
        attended = self._attended(attended)
        plain = [a.cpu().numpy() for a in self.reach(ids, attended, wanted)]
        if self.goes_on is False:
            return plain, None
        past = self._keys_and_values(ids)
        if self.goes_on is None:
            self.goes_on = past is not None and self._is_the_same(ids, past)
        return plain, past if self.goes_on else None

    def _attended(self, attended: NDArray[np.bool_]) -> NDArray[np.bool_]:
        # In a causal model, tokens do not see the padding after them.
        return np.ones_like(attended) if self.causal else attended

    def _keys_and_values(self, ids: Integers) -> Any:
        from transformers import DynamicCache

        past = DynamicCache()
        nothing: Wanted = (np.empty(0, np.int64),) * 3
        try:
            self.reach(ids, np.ones(ids.shape, bool), [nothing] * len(self.sites), past)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # a model with its own kind of cache
        return past

    def _is_the_same(self, ids: Integers, past: Any) -> bool:
        """Whether continuing from the middle matches running all of a changed context."""
        middle = ids.shape[1] // 2
        changed = ids[:1].copy()
        changed[0, :middle] = _others(ids[0])[:middle]
        places = np.arange(middle, ids.shape[1])
        attended = np.ones(changed.shape, bool)
        wanted = [_sample(site, places) for site in self.sites]
        # Errors must be small relative to the effect of earlier tokens on these activations.
        whole = self.reach(ids[:1], attended, wanted)
        other = self.reach(changed, attended, wanted)
        try:
            part = self.reach(
                ids[:1, middle:],
                attended[:, middle:],
                [_sample(site, places, middle) for site in self.sites],
                _past_of(past, np.zeros(1, np.int64), middle),
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        limit = _SAME.get(next(self.model.parameters()).dtype, _SAME_IN_HALF)
        return all(
            bool((a - b).abs().max() <= limit * (a - c).abs().max())
            for a, b, c in zip(whole, part, other, strict=True)
        )

    def _copies(self, pairs: list[_Pairs], length: int) -> Iterator[Integers]:
        """Batches of the masked copies needed: flat indices of (context, token)."""
        wanted = np.unique(np.concatenate([pair.copy for pair in pairs]))
        token = wanted % length
        order = np.lexsort((wanted, token))
        group = token[order] // _NEIGHBOURS
        for part in np.split(order, np.flatnonzero(np.diff(group)) + 1):
            if len(part):
                yield np.sort(wanted[part])

    def _mask(
        self,
        ids: Integers,
        attended: NDArray[np.bool_],
        pairs: list[_Pairs],
        masked: Integers,
        past: Any,
    ) -> None:
        """Run masked copies, and store the activations of their examples."""
        length = ids.shape[1]
        context, token = masked // length, masked % length
        first = int(token.min()) if past is not None else 0
        wanted, chosen, end = [], [], 0
        for pair in pairs:
            mine = np.flatnonzero(np.isin(pair.copy, masked))
            row = np.searchsorted(masked, pair.copy[mine])
            wanted.append((row, pair.position[mine] - first, pair.neuron[mine]))
            chosen.append(mine)
            end = max(end, int(pair.position[mine].max(initial=-1)) + 1)
        end = end if self.causal else length
        copies = ids[context, :end].copy()
        copies[np.arange(len(copies)), token] = self.mask_id
        seen = self._attended(attended[context, :end])[:, first:]
        cache = _past_of(past, context, first) if first else None
        values = self.reach(copies[:, first:], seen, wanted, cache)
        for pair, mine, activations in zip(pairs, chosen, values, strict=True):
            pair.values[mine] = activations.cpu().numpy()


def _past_of(past: Any, contexts: Integers, stop: int) -> Any:
    """Keys and values of the first tokens of contexts, one context per masked copy."""
    cache = type(past)()
    for number, layer in enumerate(past.layers):
        rows = torch.as_tensor(contexts, device=layer.keys.device)
        cache.update(layer.keys[rows, :, :stop], layer.values[rows, :, :stop], number)
    return cache


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a site's example and a token masked for it."""

    example: Integers
    column: Integers
    position: Integers
    neuron: Integers
    # The masked copy it needs: context * length + token.
    copy: Integers
    # The example's activation in that copy.
    values: Floats

    @classmethod
    def from_places(cls, places: Places, examples: Examples, mask_id: int) -> _Pairs:
        # A token that already is the mask causes no drop.
        example, column = np.nonzero(examples.seen & (examples.window_ids() != mask_id))
        token = examples.places[example, column]
        return cls(
            example,
            column,
            places.positions[example],
            places.neurons[example],
            places.contexts[example] * examples.ids.shape[1] + token,
            np.zeros(len(example), np.float32),
        )
