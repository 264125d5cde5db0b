"""A site's reading of one batch: where each neuron fired most in each input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from polyseme.errors import InputError

# A maximum is several times faster than a maximum with its position. So maxima are taken over
# blocks of positions, and positions are found only in one block, for the few neurons that matter.
_BLOCK = 16
# If more than a third of a batch's activations matter, searching all of them is faster.
_MANY = 3
# Elements per step of that search, so that they stay in the processor's caches.
_AT_ONCE = 1 << 20


class PositionMask:
    """Which positions of a batch count, with what every site's reading derives from it.

    Parameters
    ----------
    values : Tensor of bool, shape (B, positions)

    Attributes
    ----------
    values : Tensor of bool, shape (B, positions)
    inputs : Tensor of bool, shape (B,)
        Inputs with a position that counts.
    all_inputs : bool
        Whether that is every input.
    first : int
        The first position that counts in any input.
    holes : (rows, blocks, positions, left_out), or None
        Blocks from ``first`` on in which not all positions count: two int64 tensors (k,), the
        block's positions from ``first`` on, int64 (k, 16), and which of them do not count, bool (k,
        16, 1).
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.inputs = values.any(dim=1)
        self.all_inputs = bool(self.inputs.all())
        self.first = int(values.any(dim=0).to(torch.uint8).argmax())
        rest = values[:, self.first :]
        self.holes: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        if not bool(rest.all()):
            beyond = -rest.shape[1] % _BLOCK
            shape = (len(values), -1, _BLOCK)
            blocks = F.pad(rest, (0, beyond), value=True).view(shape)
            where = (~blocks.all(dim=2)).nonzero(as_tuple=True)
            kept = F.pad(rest, (0, beyond), value=False).view(shape)[where]
            positions = where[1][:, None] * _BLOCK + torch.arange(_BLOCK, device=values.device)
            positions = positions.clamp(max=rest.shape[1] - 1)
            self.holes = (where[0], where[1], positions, ~kept[:, :, None])
        self._left_out: Tensor | None = None

    def left_out(self, rows: Tensor, start: Tensor, width: int) -> Tensor:
        """Which positions from ``start`` on do not count, bool (m, width), for inputs (m,)."""
        if self._left_out is None or self._left_out.shape[2] != width:
            self._left_out = (~self.values).unfold(1, width, 1).contiguous()
        table = self._left_out
        return table.view(-1, width).index_select(0, rows * table.shape[1] + start)


@dataclass(frozen=True)
class Reading:
    """A site's reading of one batch.

    Attributes
    ----------
    activations : Tensor, shape (B, n_neurons)
        Each neuron's largest activation in each input; 0 in an input without a position that
        counts.
    everywhere : Tensor, shape (B, positions, n_neurons)
        The activations at all positions, including those that do not count.
    mask : PositionMask, optional
        The positions that count; None for all.
    maxima : Tensor, shape (B, n_blocks, n_neurons), optional
        Maxima over blocks of positions, from the first that counts; None if there is only one
        block.
    """

    activations: Tensor
    everywhere: Tensor
    mask: PositionMask | None = None
    maxima: Tensor | None = None

    @property
    def input_mask(self) -> Tensor | None:
        """Inputs with a position that counts, bool of shape (B,); None for all."""
        return None if self.mask is None else self.mask.inputs

    @property
    def positions(self) -> Tensor:
        """Position of each of ``activations``, int64 of shape (B, n_neurons)."""
        n_positions = self.everywhere.shape[1]
        first = 0 if self.mask is None else self.mask.first
        result = torch.zeros(self.activations.shape, dtype=torch.int64, device=self._device)
        if n_positions == 1:
            return result
        width = min(max(_BLOCK, _AT_ONCE // max(1, self.activations.numel())), 255)
        # From the last to the first, so that the first remains.
        for start in range(first + (n_positions - 1 - first) // width * width, first - 1, -width):
            block = self.everywhere[:, start : start + width]
            here = block.shape[1]
            # The first of equal values has the highest number; 0 means none.
            number = torch.arange(here, 0, -1, dtype=torch.uint8, device=self._device)
            if self.mask is not None and self.mask.holes is not None:
                number = number * self.mask.values[:, start : start + here]
            equal = (block == self.activations[:, None]).view(torch.uint8)
            highest = (equal * number[..., None]).amax(dim=1)
            result = torch.where(highest > 0, start + here - highest.long(), result)
        return result

    def active(self, rows: slice) -> tuple[Tensor, int]:
        """Count the positions where each neuron is active, int64 (n_neurons,), and all positions.

        Only positions that count, in the batch's inputs ``rows``.
        """
        part = self.everywhere[rows]
        mask = None if self.mask is None else self.mask.values[rows]
        counts = torch.zeros(part.shape[2], dtype=torch.int64, device=self._device)
        # Summing bytes is several times faster than wider types, and 255 ones fit in a byte.
        for start in range(0, part.shape[1], 255):
            block = slice(start, start + 255)
            active = part[:, block] > 0
            if mask is not None:
                active &= mask[:, block, None]
            counts += active.view(torch.uint8).sum(1, dtype=torch.uint8).sum(0, dtype=torch.int64)
        return counts, int(part.shape[:2].numel() if mask is None else mask.sum())

    @property
    def _device(self) -> torch.device:
        return self.activations.device

    def locate(self, rows: Tensor, neurons: Tensor) -> Tensor:
        """Position of a neuron's maximum, the first of equal ones; 0 if no position counts.

        Parameters
        ----------
        rows, neurons : Tensor of int64, shape (m,)
            Inputs of the batch, and neurons.

        Returns
        -------
        Tensor of int64, shape (m,)
            A flat index into the layer's spatial or sequence positions.
        """
        if _MANY * len(rows) > self.activations.numel():
            return self.positions[rows, neurons]
        n_positions = self.everywhere.shape[1]
        start = torch.zeros_like(rows)
        width = n_positions
        if self.maxima is not None:
            blocks = torch.arange(self.maxima.shape[1], device=self._device)
            in_blocks = _pick(self.maxima, rows, 0, neurons, blocks)
            start = _BLOCK * in_blocks.argmax(dim=1)
            if self.mask is not None:
                start += self.mask.first
            # The last block may start earlier; positions before it are smaller or do not count.
            width = min(_BLOCK, n_positions)
            start = start.clamp(max=n_positions - width)
        places = torch.arange(width, device=self._device)
        values = _pick(self.everywhere, rows, start, neurons, places)
        if self.mask is not None:
            values = values.masked_fill(self.mask.left_out(rows, start, width), -torch.inf)
        positions = start + values.argmax(dim=1)
        if self.mask is not None and not self.mask.all_inputs:
            positions = positions.masked_fill(~self.mask.inputs[rows], 0)
        return positions

    def around(
        self, rows: Tensor, neurons: Tensor, positions: Tensor, before: int, after: int
    ) -> Tensor:
        """Activations around positions, float32 of shape (m, before + 1 + after).

        NaN outside the input. ``rows`` are in ascending order.
        """
        n_positions = self.everywhere.shape[1]
        if _MANY * len(rows) > self.activations.numel():
            return self._around_many(rows, neurons, positions, before, after)
        places, beyond = _windows(n_positions, before, after, rows.device)
        values = _pick(self.everywhere, rows, 0, neurons, places.index_select(0, positions)).float()
        return values.masked_fill_(beyond.index_select(0, positions), torch.nan)

    def _around_many(
        self, rows: Tensor, neurons: Tensor, positions: Tensor, before: int, after: int
    ) -> Tensor:
        """The same, one input at a time, with each neuron's activations contiguous."""
        _, n_positions, n_neurons = self.everywhere.shape
        width = before + 1 + after
        values = torch.empty((len(rows), width), device=rows.device)
        side = torch.full((n_neurons, before + n_positions + after), torch.nan, device=rows.device)
        windows = side.view(-1).unfold(0, width, 1)
        starts = neurons * side.shape[1] + positions
        part = slice(0, 0)
        for row, n in enumerate(rows.bincount(minlength=len(self.activations)).tolist()):
            side[:, before : before + n_positions] = self.everywhere[row].T
            part = slice(part.stop, part.stop + n)
            torch.index_select(windows, 0, starts[part], out=values[part])
        return values


@lru_cache(maxsize=4)
def _windows(
    n_positions: int, before: int, after: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of the window around each position, int32, and which are out of range."""
    places = torch.arange(n_positions, dtype=torch.int32, device=device)[:, None]
    places = places + torch.arange(-before, after + 1, dtype=torch.int32, device=device)
    inside = places.clamp(0, n_positions - 1)
    return inside, places != inside


def _pick(
    tensor: Tensor, rows: Tensor, start: Tensor | int, neurons: Tensor, positions: Tensor
) -> Tensor:
    """Values of a tensor (B, positions, n_neurons), (m, width): at ``start`` plus ``positions``.

    ``rows``, ``start`` and ``neurons`` are of shape (m,), ``positions`` (width,) or (m, width).
    """
    # One flat offset each, as indexing with three indices takes three times as long.
    a, b, c = tensor.stride()
    span = sum((size - 1) * step for size, step in zip(tensor.shape, (a, b, c), strict=True)) + 1
    first = rows * a + neurons * c + start * b
    if span < 1 << 31:
        first, positions = first.int(), positions.int()
    offsets = torch.add(first[:, None], positions, alpha=b)
    flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
    return flat.index_select(0, offsets.view(-1)).view(offsets.shape)


def strongest(activations: Tensor, mask: PositionMask | None = None) -> Reading:
    """Reading of activations of shape (B, positions, n_neurons).

    Raises
    ------
    InputError
        If the mask has a different number of inputs or positions.
    """
    first = 0
    if mask is not None:
        if mask.values.shape != activations.shape[:2]:
            raise InputError(
                f"mask has shape {tuple(mask.values.shape)}, but the layer has "
                f"{tuple(activations.shape[:2])} inputs and positions; expected the same shape."
            )
        first = mask.first
    rest = activations[:, first:]
    if rest.shape[1] == 1:
        maxima = rest
    else:
        n_inputs, n_positions, n_neurons = rest.shape
        whole = n_positions // _BLOCK
        maxima = rest.new_empty((n_inputs, -(-n_positions // _BLOCK), n_neurons))
        if whole:
            blocks = rest[:, : whole * _BLOCK].view(n_inputs, whole, _BLOCK, n_neurons)
            torch.amax(blocks, dim=2, out=maxima[:, :whole])
        if whole < maxima.shape[1]:
            torch.amax(rest[:, whole * _BLOCK :], dim=1, out=maxima[:, whole])
    if mask is not None and mask.holes is not None:
        rows, at_block, positions, left_out = mask.holes
        if maxima is rest:
            maxima = rest.clone()
        values = rest[rows[:, None], positions].masked_fill_(left_out, -torch.inf)
        maxima[rows, at_block] = values.amax(dim=1)
    values = maxima.amax(dim=1) if maxima.shape[1] > 1 else maxima[:, 0]
    if mask is not None and not mask.all_inputs:
        values = values.masked_fill(~mask.inputs[:, None], 0)
    return Reading(values, activations, mask, maxima if maxima.shape[1] > 1 else None)
