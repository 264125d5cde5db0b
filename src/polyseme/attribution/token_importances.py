"""Which tokens of the context a neuron's activation depends on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.attribution.truncated import Reach
from polyseme.attribution.windows import Rows, examples_in_text, shares_of
from polyseme.sites.hooks import evaluating
from polyseme.sites.site import Site

Floats = NDArray[np.float32]


def token_importances(
    model: nn.Module,
    site: Site,
    ids: Any,
    attention: Any,
    positions: Any,
    neurons: Any,
    *,
    mask_id: int,
    before: int = 20,
    after: int = 10,
    batch_size: int = 256,
    causal: bool = True,
) -> Iterator[tuple[float, Floats | None]]:
    """Measure how much of a neuron's activation depends on each token of its example, by masking.

    Each token of the window around the max-activating token p is masked in turn, and the model is
    run again. The importance of token t is the drop in the neuron's activation at p, relative to
    the drop from masking p itself, clipped to [0, 1] (Foote, arXiv 2411.08166). The importance of p
    is 1. If masking p causes no drop (at most 0.0001 of the activation), as for a neuron that reads
    only the previous token, drops are relative to the activation itself: 1 means that nothing is
    left without the token. They are 0 if that is not positive either.

    The model sees the context before the window, but it is not masked. A forward pass ends at the
    site, so later layers and an LM head cost nothing.

    Parameters
    ----------
    model : torch.nn.Module
        A `transformers` model, or a module called with token ids alone.
    site : Site
        With one position per token and a known activation.
    ids : array of int, shape (m, L)
        Token ids of the examples' contexts.
    attention : array of bool, shape (m, L)
        False for padding.
    positions, neurons : array of int, shape (m,)
        The neuron of each example, and the position of its max-activating token.
    mask_id : int
        Token to mask with: the tokenizer's mask token, or else its padding, end or start token. If
        it already is in the context, masking changes nothing there, and its importance is 0.
    before, after : int
        Size of the window on either side of the max-activating token.
    batch_size : int
        Number of masked contexts per forward pass.
    causal : bool
        Whether the model's tokens see only earlier ones. Then tokens after p are not run, and have
        importance 0.

    Yields
    ------
    done : float
        Share of the work done.
    importances : ndarray of float32, shape (m, before + 1 + after), or None
        Only at the end. Column ``before`` is the max-activating token; NaN outside the context.

    Raises
    ------
    InputError
        For arrays that do not match, or padding for a model that does not accept it.
    SiteError
        For a site that the model does not reach, or one without one position per token.
    """
    examples = examples_in_text(
        site, ids, attention, positions, neurons, mask_id, before, after, causal
    )
    runner = _Runner(model, site, causal)
    masked = examples.seen & (examples.window_ids() != mask_id)
    # The unmasked contexts come first; a masked position of -1 masks nothing.
    example = np.concatenate([np.arange(len(examples)), np.nonzero(masked)[0]])
    place = np.concatenate([np.full(len(examples), -1), examples.places[masked]])
    # Contexts of equal length together; the longest first, so that memory runs out at once or
    # never.
    order = np.argsort(-examples.ends[example], kind="stable")
    values = np.zeros(len(example), np.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = examples.rows(example[part])
        changed = np.nonzero(place[part] >= 0)[0]
        rows.ids[changed, place[part][changed]] = mask_id
        with evaluating(model), torch.no_grad():
            values[part] = runner(rows).cpu().numpy()
        yield min(start + batch_size, len(order)) / len(order), None
    activations = values[: len(examples)]
    drops = np.zeros(examples.places.shape, np.float32)
    drops[masked] = activations[example[len(examples) :]] - values[len(examples) :]
    yield 1.0, shares_of(examples, drops, activations, before)


class _Runner:
    """Runs a model on token ids, up to a site, for one activation per context."""

    def __init__(self, model: nn.Module, site: Site, causal: bool) -> None:
        self._reach = Reach(model, [site])
        self._causal = causal
        self.device = self._reach.device

    def __call__(self, rows: Rows) -> Tensor:
        """Activation of each context's neuron at its position, float32 (B,)."""
        attended = rows.attention
        if self._causal:
            # Nothing after the position, padding included, affects it; and attention without a mask
            # is faster.
            attended = attended | (np.arange(rows.ids.shape[1]) > rows.positions[:, None])
        wanted = (np.arange(len(rows.ids)), rows.positions, rows.neurons)
        return self._reach(rows.ids, attended, [wanted])[0]
