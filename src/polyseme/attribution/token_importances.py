"""Which tokens of the context a neuron's activation depends on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from polyseme.attribution.truncated import Reach
from polyseme.attribution.windows import Rows, examples_in_text, shares_of
from polyseme.errors import InputError, SiteError
from polyseme.sites.hooks import evaluating, in_this_thread
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


def gradient_importances(
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
    batch_size: int = 16,
    causal: bool = True,
) -> Iterator[tuple[float, Floats | None]]:
    """First-order estimate of `token_importances`, at the cost of one backward pass per example.

    The drop from masking token t is estimated as ``(x_t - x_mask) · ∂a/∂x_t``, where x are the
    input embeddings, and a is the neuron's activation at p: attribution patching (Nanda, 2023; Syed
    et al., arXiv 2310.10348) of the tokens. Drops are then treated the same way.

    It is rough: replacing a token is a large step, over which attention and norms are far from
    linear. In layers 2 and 15 of SmolLM2-135M, its `rank_correlation` with masking was 0.11 and
    0.08 (100 examples each), less than that of mere proximity to p (0.40 in layer 2). Check it on
    your model before relying on it, and prefer masking for anything shown to people.

    Parameters
    ----------
    model : torch.nn.Module
        As in `token_importances`; it, or a module inside it, must have ``get_input_embeddings()``.
    site, ids, attention, positions, neurons, mask_id, before, after, causal
        As in `token_importances`.
    batch_size : int
        Number of contexts per pass. Every layer keeps what the backward pass needs, so this takes
        far more memory than the same number of masked contexts.

    Yields
    ------
    done : float
        Share of the work done.
    importances : ndarray of float32, shape (m, before + 1 + after), or None
        As in `token_importances`.

    Raises
    ------
    InputError
        As for `token_importances`, or for a model without input embeddings.
    SiteError
        As for `token_importances`, or for activations without a gradient in the embeddings.
    """
    examples = examples_in_text(
        site, ids, attention, positions, neurons, mask_id, before, after, causal
    )
    runner = _Runner(model, site, causal)
    embedding = _input_embedding(model, mask_id)
    with torch.no_grad():
        mask = embedding(torch.tensor([mask_id], device=runner.device))[0]
    order = np.argsort(-examples.ends, kind="stable")
    activations = np.zeros(len(examples), np.float32)
    drops = np.zeros(examples.places.shape, np.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = examples.rows(part)
        with evaluating(model), _frozen(model), torch.enable_grad():
            with _leaf(embedding) as leaves:
                chosen = runner(rows)
            if not chosen.requires_grad:
                raise SiteError(
                    f"The activations of site {site.name!r} have no gradient in the input "
                    f"embeddings; expected a site that tokens reach with gradients enabled. Use "
                    f"token_importances, which needs none."
                )
            (slope,) = torch.autograd.grad(chosen.sum(), leaves[0])
        estimate = ((leaves[0].detach() - mask) * slope).float().sum(dim=-1).cpu().numpy()
        inside = np.clip(examples.places[part], 0, estimate.shape[1] - 1)
        drops[part] = np.take_along_axis(estimate, inside, axis=1)
        activations[part] = chosen.detach().cpu().numpy()
        yield min(start + batch_size, len(order)) / len(order), None
    drops[~examples.seen] = 0
    yield 1.0, shares_of(examples, drops, activations, before)


@dataclass(frozen=True)
class RankCorrelation:
    """How similarly two kinds of token importances rank the tokens.

    Attributes
    ----------
    mean : float
        Mean over examples of Spearman's rank correlation; NaN without examples.
    n_examples : int
        Number of examples in the mean: those with at least two tokens besides the max-activating
        one, not all equal in either array.
    """

    mean: float
    n_examples: int


def rank_correlation(
    exact: Any, approximate: Any, *, before: int = 20, causal: bool = True
) -> RankCorrelation:
    """Spearman correlation of two arrays of token importances, example by example.

    The max-activating token is left out, as it is 1 in both; for a causal model, so are the tokens
    after it, which are 0 in both.

    Parameters
    ----------
    exact, approximate : array of float, shape (m, before + 1 + after)
        See `token_importances`. NaN entries of either are left out.
    before : int
        Column of the max-activating token.
    causal : bool

    Returns
    -------
    RankCorrelation
    """
    first, second = np.asarray(exact, np.float64), np.asarray(approximate, np.float64)
    if first.ndim != 2 or first.shape != second.shape or not 0 <= before < first.shape[1]:
        raise InputError(
            f"exact has shape {first.shape}, approximate {second.shape} and before is {before}; "
            f"expected two arrays (m, before + 1 + after) of the same window."
        )
    used = np.isfinite(first) & np.isfinite(second)
    used[:, before] = False
    if causal:
        used[:, before:] = False
    correlations = []
    for a, b, use in zip(first, second, used, strict=True):
        # Ties get their mean rank. A constant has no rank correlation.
        ranks = [rankdata(values[use]) for values in (a, b)]
        if all(len(rank) > 1 and np.ptp(rank) > 0 for rank in ranks):
            correlations.append(np.corrcoef(*ranks)[0, 1])
    return RankCorrelation(
        float(np.mean(correlations)) if correlations else float("nan"), len(correlations)
    )


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


def _input_embedding(model: nn.Module, mask_id: int) -> nn.Module:
    # A model may be wrapped, for example to splice in an SAE.
    for module in model.modules():
        if callable(getter := getattr(module, "get_input_embeddings", None)):
            embedding: nn.Module = getter()
            break
    else:
        raise InputError(
            f"The model is a {type(model).__name__} without get_input_embeddings(); expected a "
            f"transformers model. Use token_importances, which needs no embeddings."
        )
    weight = embedding.weight
    assert isinstance(weight, Tensor)
    if mask_id >= len(weight):
        raise InputError(
            f"mask_id is {mask_id}, but the model has {len(weight)} tokens, numbered from 0; give "
            f"the id of a token of its tokenizer."
        )
    return embedding


@contextmanager
def _leaf(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """Cut the graph at the input embeddings, so that gradients are taken in them."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        # A layer that works in place must not touch the leaf.
        return leaves[-1].clone()

    hook = embedding.register_forward_hook(in_this_thread(cut))
    try:
        yield leaves
    finally:
        hook.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients in the weights, for which every layer would keep its input."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
