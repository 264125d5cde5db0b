"""Which tokens can be among the first, found in half the precision and a fraction of the time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Tokens in a block, of which only the best is looked at at first.
_BLOCK = 64
# Effects that are held at a time, values of tokens that are measured, and tokens made ready.
_EFFECTS, _MEASURED, _TOKENS = 3 << 22, 1 << 20, 4096
# How far, at most, rounding to bfloat16 takes a value from itself, as a share of it.
_ROUNDING = 2.0**-8
# Processors may take smaller numbers for 0.
_SMALLEST = 2.0**-126


class TokenCandidates(NamedTuple):
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

    Of a direction v, rounded to r, and a token w, rounded to q, the effect v·w differs from r·q
    by v·(w - q) + (v - r)·q, so by at most |v| |w - q| + |v - r| |q|.

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
        n_blocks = -(-vocabulary // _BLOCK)
        norm = torch.cat([_norms(part - mean) for part in torch.split(weight, _TOKENS)])
        padding = torch.full((n_blocks * _BLOCK - vocabulary,), -1)
        ranked = torch.cat([norm.argsort(descending=True, stable=True), padding])
        # A block is a column: it is quicker to compare rows with one another than within.
        self._token = ranked.view(n_blocks, _BLOCK).T.contiguous()
        self._rounded = torch.zeros(ranked.numel(), d, dtype=torch.bfloat16)
        lost, size = torch.zeros(2, ranked.numel())
        for start in range(0, ranked.numel(), _TOKENS):
            part = slice(start, start + _TOKENS)
            token = self._token.view(-1)[part]
            rows = (weight[token.clamp(min=0)] - mean).masked_fill_(token[:, None] < 0, 0)
            self._rounded[part] = rows
            kept = self._rounded[part].float()
            size[part] = _norms(kept)
            # And what adding up in single precision may lose.
            lost[part] = _norms(rows - kept) + 2 * d * 2.0**-24 * _norms(rows)
        # One for each block: its tokens are so alike that their own would tell little more.
        self._lost, self._size = (
            values.view(self._token.shape).amax(dim=0) for values in (lost, size)
        )
        rows_at_once = max(1, _EFFECTS // ranked.numel())
        self._room = torch.empty(rows_at_once, ranked.numel(), dtype=torch.bfloat16)

    @staticmethod
    def serves(vocabulary: int, k: int) -> bool:
        """Whether there are blocks enough to find the first k of so many tokens."""
        return vocabulary >= 4 * k * _BLOCK

    def top(self, directions: Tensor, k: int) -> tuple[TokenCandidates, TokenCandidates]:
        """Tokens with the largest effects, and with the smallest.

        Parameters
        ----------
        directions : Tensor of float32, shape (n, d)
        k : int
            One that it `serves`.
        """
        candidates: list[list[TokenCandidates]] = [[], []]
        for part in torch.split(directions, len(self._room)):
            effects = self._room[: len(part)]
            rounded = part.bfloat16()
            torch.mm(rounded, self._rounded.T, out=effects)
            effects = effects.view(len(part), *self._token.shape)
            off = self._off(part, rounded)
            for side, sign in zip(candidates, (1, -1), strict=True):
                side.append(self._first(part, effects, off, sign, k))
        high, low = (
            TokenCandidates(*map(torch.cat, zip(*side, strict=True))) for side in candidates
        )
        return high, low

    def _off(self, directions: Tensor, rounded: Tensor) -> Tensor:
        """How far each block's effects may be from the true ones: (n, n_blocks)."""
        d = directions.shape[1]
        length = _norms(directions)[:, None]
        lost = _norms(directions - rounded.float())[:, None]
        off: Tensor = length * self._lost + lost * self._size
        off += _SMALLEST * (4 * d + 2 * d**0.5 * (length + self._size))
        return off

    def _first(
        self, directions: Tensor, effects: Tensor, off: Tensor, sign: int, k: int
    ) -> TokenCandidates:
        peaks = effects.amax(dim=1) if sign > 0 else -effects.amin(dim=1)
        block, rest = _largest(_at_most(peaks.float(), off), 2 * k)
        inside = effects.gather(2, block[:, None].expand(-1, _BLOCK, -1)).float().mul_(sign)
        inside = _at_most(inside, off.gather(1, block)[:, None]).flatten(1)
        place, others = _largest(inside, 2 * k + 4)
        column = block.gather(1, place % block.shape[1])
        ids = self._token[place // block.shape[1], column].sort(dim=1).values
        at_once = max(1, _MEASURED // (ids.shape[1] * directions.shape[1]))
        parts = zip(torch.split(ids, at_once), torch.split(directions, at_once), strict=True)
        # Not matrix products, in which those of equal tokens may differ in the last digit.
        exact = torch.cat(
            [self._weight[some].mul_(part[:, None]).sum(dim=2) for some, part in parts]
        )
        exact = (exact - (directions @ self._mean)[:, None]).mul_(sign)
        exact = exact.masked_fill_(ids < 0, -torch.inf)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        # Not the other way round: NaN must not count as sure.
        sure = torch.maximum(rest, others) < exact[:, k - 1]
        return TokenCandidates(ids.gather(1, order)[:, :k], exact[:, :k] * sign, sure)


def _norms(rows: Tensor) -> Tensor:
    # Squares of small numbers are none in single precision.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.float()


def _at_most(rounded: Tensor, off: Tensor) -> Tensor:
    # The product itself was rounded too.
    most = rounded + off + rounded.abs() * (1.01 * _ROUNDING)
    # What is beyond all numbers, or none, may be anything.
    return most.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the k largest of each row, in no order, and the largest of the others."""
    negative = values.neg().numpy()
    # NumPy parts several times as quickly as torch finds the first ones in order.
    columns = np.argpartition(negative, k, axis=1)
    rest = -np.take_along_axis(negative, columns[:, k : k + 1], axis=1)[:, 0]
    return torch.from_numpy(columns[:, :k]), torch.from_numpy(rest)
