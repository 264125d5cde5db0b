"""Which tokens can be among the first, found in half the precision and a fraction of the time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Tokens in a block, of which only the best is looked at at first.
_BLOCK = 64
# Directions that are worked on together: their effects fit into tens of megabytes.
_TOGETHER = 256
# How far, at most, rounding to bfloat16 takes a value from itself, as a share of it.
_ROUNDING = 2.0**-9
# Far less than any effect, and still a number when it is multiplied.
_NONE = -1e30


class Candidates(NamedTuple):
    """The tokens with the largest effects of each direction.

    Attributes
    ----------
    ids : Tensor of int64, shape (n, k)
        The largest effect first; equal ones in the order of ids.
    effects : Tensor of float32, shape (n, k)
        In single precision.
    sure : Tensor of bool, shape (n,)
        Whether rounding can't have kept another token from being found.
    """

    ids: Tensor
    effects: Tensor
    sure: Tensor


class RoundedUnembedding:
    """An unembedding in bfloat16, with a bound for how far each token's effect may be off.

    Tokens stand in blocks of about the same norm, the longest first, so that one bound does for
    a block: no token of a block can have a larger effect than the block's largest in bfloat16
    plus that bound. What is found to be among the first is then measured in single precision.

    Parameters
    ----------
    weight : Tensor of float32, shape (vocabulary, d)
        On the CPU.
    mean : Tensor of float32, shape (d,)
        What is taken off each row.
    """

    def __init__(self, weight: Tensor, mean: Tensor) -> None:
        self._weight, self._mean = weight, mean
        vocabulary, d = weight.shape
        self.n_blocks = -(-vocabulary // _BLOCK)
        norm = torch.cat([(part - mean).norm(dim=1) for part in torch.split(weight, 4096)])
        padding = torch.full((self.n_blocks * _BLOCK - vocabulary,), -1)
        ranked = torch.cat([norm.argsort(descending=True, stable=True), padding])
        # A block is a column: it is quicker to compare rows with one another than within.
        self._token = ranked.view(self.n_blocks, _BLOCK).T.contiguous()
        self._rounded = torch.zeros(ranked.numel(), d, dtype=torch.bfloat16)
        off = torch.full((ranked.numel(),), _NONE)
        for at in range(0, ranked.numel(), 4096):
            token = self._token.view(-1)[at : at + 4096]
            rows = weight[token.clamp(min=0)] - mean
            self._rounded[at : at + 4096] = rows
            lost = (rows - self._rounded[at : at + 4096].float()).norm(dim=1)
            # For a direction of length 1: what rounding the token loses, what rounding the
            # direction does, and what adding up in single precision may.
            bound = (1 + _ROUNDING) * lost + (_ROUNDING + 2 * d * 2.0**-24) * rows.norm(dim=1)
            off[at : at + 4096] = torch.where(token < 0, _NONE, bound)
        self._off = off.view(_BLOCK, self.n_blocks)
        self._block_off = self._off.amax(dim=0)
        self._room = torch.empty(_TOGETHER, ranked.numel(), dtype=torch.bfloat16)

    def top(self, directions: Tensor, k: int) -> tuple[Candidates, Candidates]:
        """Tokens with the largest effects, and with the smallest.

        Parameters
        ----------
        directions : Tensor of float32, shape (n, d)
        k : int
            So few that there are four blocks for each.
        """
        found: list[list[Candidates]] = [[], []]
        for part in torch.split(directions, _TOGETHER):
            effects = self._room[: len(part)]
            torch.mm(part.bfloat16(), self._rounded.T, out=effects)
            effects = effects.view(len(part), _BLOCK, self.n_blocks)
            for side, sign in zip(found, (1, -1), strict=True):
                side.append(self._first(part, effects, sign, k))
        high, low = (Candidates(*map(torch.cat, zip(*side, strict=True))) for side in found)
        return high, low

    def _first(self, directions: Tensor, effects: Tensor, sign: int, k: int) -> Candidates:
        length = directions.norm(dim=1, keepdim=True)
        peaks = effects.amax(dim=1) if sign > 0 else -effects.amin(dim=1)
        block, rest = _largest(_at_most(peaks.float(), length * self._block_off), 2 * k)
        inside = effects.gather(2, block[:, None].expand(-1, _BLOCK, -1)).float().mul_(sign)
        off = length[:, None] * self._off[:, block].transpose(0, 1)
        place, others = _largest(_at_most(inside, off).flatten(1), 2 * k + 4)
        column = block.gather(1, place % block.shape[1])
        ids = self._token[place // block.shape[1], column].sort(dim=1).values
        exact = torch.bmm(self._weight[ids], directions[:, :, None])[:, :, 0]
        exact = (exact - (directions @ self._mean)[:, None]).mul_(sign)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        # Not the other way round: what is no number is not sure.
        sure = torch.maximum(rest, others) < exact[:, k - 1]
        return Candidates(ids.gather(1, order)[:, :k], exact[:, :k] * sign, sure)


def _at_most(rounded: Tensor, off: Tensor) -> Tensor:
    # The product itself was rounded too.
    return rounded + off + rounded.abs() * (1.01 * _ROUNDING)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest of each row, in no order, and the largest of the others."""
    negative = values.neg().numpy()
    # NumPy parts several times as quickly as torch finds the first ones in order.
    columns = np.argpartition(negative, k, axis=1)
    rest = -np.take_along_axis(negative, columns[:, k : k + 1], axis=1)[:, 0]
    return torch.from_numpy(columns[:, :k]), torch.from_numpy(rest)
