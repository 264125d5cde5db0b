"""The tokens that a neuron promotes and suppresses by its direct effect on the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.core.arrays import as_floats
from polyseme.errors import InputError
from polyseme.sites.unembedding import unembedding

# Values in the largest matrix of effects held at once: 64 MiB.
MAX_VALUES = 2**24
# Columns per block, whose maximum is checked first.
_BLOCK = 64


class TopLogits(NamedTuple):
    """The tokens whose logits each direction changes the most.

    Attributes
    ----------
    promoted_ids, suppressed_ids : ndarray of int64, shape (n, k)
        Token ids, the largest effect first; ties in the order of ids.
    promoted, suppressed : ndarray of float32, shape (n, k)
        The effects, in units of logits for a final residual stream of norm √d.
    """

    promoted_ids: NDArray[np.int64]
    promoted: NDArray[np.float32]
    suppressed_ids: NDArray[np.int64]
    suppressed: NDArray[np.float32]


class LogitLens:
    """The direct logit effects of directions written to a model's residual stream.

    Each direction goes directly through the final norm's gain and the unembedding, bypassing all
    later layers: the logit lens of the weights. The mean over the vocabulary is subtracted, because
    softmax ignores what all logits have in common: a token is promoted if its logit rises more than
    the others'.

    Parameters
    ----------
    model : torch.nn.Module
        With an `unembedding`.

    Raises
    ------
    InputError
        For a model without one.
    """

    def __init__(self, model: nn.Module) -> None:
        head = unembedding(model)
        if head is None:
            raise InputError(
                f"The model is a {type(model).__name__} without an LM head that is one matrix "
                f"after the last layer; expected a causal language model, as loaded by "
                f"AutoModelForCausalLM. Leave logit effects out."
            )
        self._gain, self._centred = head.gain, head.centred
        self._weight = head.weight.float()
        self._mean = self._weight.mean(dim=0)

    def takes(self, directions: Any, k: int = 10) -> bool:
        """Whether the unembedding reads directions of this length and has at least k tokens.

        The length differs if there is a projection between the residual stream and the LM head.
        """
        vocabulary, d = self._weight.shape
        return directions.shape[1] == d and k <= vocabulary

    @torch.no_grad()
    def top(self, directions: Any, k: int = 10) -> TopLogits:
        """Find the tokens that each direction promotes and suppresses the most.

        Parameters
        ----------
        directions : array or Tensor of float, shape (n, d)
            Such as `Site.residual_directions`.
        k : int
            Number of tokens to keep of each kind.

        Returns
        -------
        TopLogits

        Raises
        ------
        InputError
            For directions of a length that the unembedding does not read, or a k above the
            vocabulary's size.
        """
        vocabulary, d = self._weight.shape
        if not 1 <= k <= vocabulary:
            raise InputError(f"k is {k}; expected 1 to {vocabulary}, the vocabulary's size.")
        rows = as_floats(directions, "directions", 2, np.float32)
        if rows.shape[1] != d:
            raise InputError(
                f"directions has shape {rows.shape}, but the unembedding reads {d} values; "
                f"expected (n, {d}). Give directions of the residual stream."
            )
        kept: list[list[NDArray[Any]]] = [[], [], [], []]
        step = max(1, MAX_VALUES // vocabulary)
        for start in range(0, max(len(rows), 1), step):
            part = torch.as_tensor(rows[start : start + step]).to(self._weight.device)
            if self._centred:
                part = part - part.mean(dim=1, keepdim=True)
            if self._gain is not None:
                part = part * self._gain
            effects = torch.addmm(-(part @ self._mean)[:, None], part, self._weight.T)
            high, low = _top(effects, k), _top(effects.neg_(), k)
            for column, tensor in zip(kept, (*high, low[0], -low[1]), strict=True):
                column.append(tensor.cpu().numpy())
        return TopLogits(*(np.concatenate(column) for column in kept))


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns and values of the k largest of each row; ties go to the first columns."""
    n_blocks = values.shape[1] // _BLOCK
    if n_blocks <= 2 * k:
        return _top_of_all(values, k)
    # The largest values are in the blocks with the largest maxima; the remainder after the last
    # whole block is also a block.
    whole = values[:, : n_blocks * _BLOCK].reshape(len(values), n_blocks, _BLOCK)
    peaks, blocks = whole.amax(dim=2).topk(k + 1, dim=1)
    inside = torch.arange(_BLOCK, device=values.device)
    columns = (blocks.sort(dim=1).values[:, :, None] * _BLOCK + inside).flatten(1)
    rest = torch.arange(n_blocks * _BLOCK, values.shape[1], device=values.device)
    columns = torch.cat([columns, rest.expand(len(values), -1)], dim=1)
    among, largest = _top_of_all(values.gather(1, columns), k)
    columns = columns.gather(1, among)
    # No other block has a value as large, unless it ties with the last of the peaks.
    tied = largest[:, -1] <= peaks[:, -1]
    if bool(tied.any()):
        columns[tied], largest[tied] = _top_of_all(values[tied], k)
    return columns, largest


def _top_of_all(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    limit = values.topk(k, dim=1).values[:, -1:]
    above, equal = values > limit, values == limit
    # topk picks arbitrarily among values equal to the last one.
    room = k - above.sum(dim=1, keepdim=True)
    kept = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
    columns = kept.nonzero()[:, 1].reshape(-1, k)
    largest, order = values.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order), largest
