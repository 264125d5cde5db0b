"""What one batch did to a site: the place where each neuron fired most in each input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polyseme.errors import InputError

# A maximum without its place is several times as quick as one with it. So maxima are taken of
# blocks of positions, and places are looked for in one block of the few neurons that matter.
_BLOCK = 16


class Counted:
    """Which positions of a batch count, and what every site's reading needs to know of it.

    Parameters
    ----------
    mask : Tensor of bool, shape (B, positions)

    Attributes
    ----------
    mask : Tensor of bool, shape (B, positions)
    inputs : Tensor of bool, shape (B,)
        Inputs with a position that counts.
    all_inputs : bool
        Whether that is all of them.
    first : int
        The first position that counts in any input.
    holes : (rows, blocks, kept), or None
        Blocks from ``first`` on in which not all positions count: two Tensors of int64 (k,),
        and which of the block's positions do, bool (k, 16).
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.inputs = mask.any(dim=1)
        self.all_inputs = bool(self.inputs.all())
        self.first = int(mask.any(dim=0).to(torch.uint8).argmax())
        rest = mask[:, self.first :]
        self.holes: tuple[Tensor, Tensor, Tensor] | None = None
        if not bool(rest.all()):
            beyond = -rest.shape[1] % _BLOCK
            shape = (len(mask), -1, _BLOCK)
            blocks = F.pad(rest, (0, beyond), value=True).view(shape)
            where = (~blocks.all(dim=2)).nonzero(as_tuple=True)
            kept = F.pad(rest, (0, beyond), value=False).view(shape)[where]
            self.holes = (where[0], where[1], kept)


@dataclass(frozen=True)
class Reading:
    """What one batch did to a site.

    Attributes
    ----------
    activations : Tensor, shape (B, n_neurons)
        Each neuron's activation in each input, at the place where it is strongest; 0 in an
        input without a position that counts.
    everywhere : Tensor, shape (B, positions, n_neurons)
        The activations at all positions, those that do not count too.
    places : Counted, optional
        The positions that count; all of them where this is None.
    maxima : Tensor, shape (B, n_blocks, n_neurons), optional
        Of blocks of positions, from the first that counts on; None where one block is all.
    """

    activations: Tensor
    everywhere: Tensor
    places: Counted | None = None
    maxima: Tensor | None = None

    @property
    def counted(self) -> Tensor | None:
        """Inputs with a position that counts, bool of shape (B,); None for all of them."""
        return None if self.places is None else self.places.inputs

    @property
    def positions(self) -> Tensor:
        """The place of each of ``activations``, int64 of shape (B, n_neurons)."""
        shape = self.activations.shape
        rows, neurons = torch.ones(shape, device=self.activations.device).nonzero(as_tuple=True)
        return self.locate(rows, neurons).view(shape)

    def locate(self, rows: Tensor, neurons: Tensor) -> Tensor:
        """The place where a neuron is strongest, the first of equals; 0 where nothing counts.

        Parameters
        ----------
        rows, neurons : Tensor of int64, shape (m,)
            Inputs of the batch, and neurons.

        Returns
        -------
        Tensor of int64, shape (m,)
            A flat index into the layer's spatial or sequence positions.
        """
        n_positions = self.everywhere.shape[1]
        first = 0 if self.places is None else self.places.first
        start: Tensor | int = first
        width = n_positions - first
        if self.maxima is not None:
            width = min(_BLOCK, width)
            blocks = torch.arange(self.maxima.shape[1], device=rows.device)
            best = _pick(self.maxima, rows[:, None], blocks, neurons[:, None]).argmax(dim=1)
            start = (first + _BLOCK * best)[:, None]
        # Beyond the last position it stands again: the first of equals is what counts.
        at = (start + torch.arange(width, device=rows.device)).clamp(max=n_positions - 1)
        at = at.expand(len(rows), width)
        values = _pick(self.everywhere, rows[:, None], at, neurons[:, None])
        if self.places is not None and self.places.holes is not None:
            values = values.masked_fill(~self.places.mask[rows[:, None], at], -torch.inf)
        positions = at.gather(1, values.argmax(dim=1, keepdim=True))[:, 0]
        if self.places is not None and not self.places.all_inputs:
            positions = positions.masked_fill(~self.places.inputs[rows], 0)
        return positions

    def around(
        self, rows: Tensor, neurons: Tensor, positions: Tensor, before: int, after: int
    ) -> Tensor:
        """Activations around places, float32 of shape (m, before + 1 + after).

        NaN stands for what is beyond the input's ends.
        """
        n_positions = self.everywhere.shape[1]
        device = rows.device
        # For each position where its window is, so that this is worked out once.
        at = torch.arange(n_positions, device=device)[:, None]
        at = at + torch.arange(-before, after + 1, device=device)
        inside = at.clamp(0, n_positions - 1)
        values = _pick(self.everywhere, rows[:, None], inside[positions], neurons[:, None]).float()
        return values.masked_fill_((at != inside)[positions], torch.nan)


def _pick(tensor: Tensor, rows: Tensor, positions: Tensor, neurons: Tensor) -> Tensor:
    """Single values of a tensor of three axes, by indices that are broadcast to one shape."""
    # By one offset each, as three indices at once take three times as long.
    a, b, c = tensor.stride()
    span = sum((size - 1) * step for size, step in zip(tensor.shape, (a, b, c), strict=True)) + 1
    if span < 1 << 31:
        rows, positions, neurons = rows.int(), positions.int(), neurons.int()
    offsets = (rows * a + neurons * c) + positions * b
    flat = tensor.as_strided((span,), (1,), tensor.storage_offset())
    return flat.index_select(0, offsets.reshape(-1)).view(offsets.shape)


def strongest(activations: Tensor, counted: Counted | None = None) -> Reading:
    """Reading of activations of shape (B, positions, n_neurons).

    Raises
    ------
    InputError
        If what counts is of other inputs or positions.
    """
    first = 0
    if counted is not None:
        if counted.mask.shape != activations.shape[:2]:
            raise InputError(
                f"counted has shape {tuple(counted.mask.shape)}, but the layer has "
                f"{tuple(activations.shape[:2])} inputs and positions; the same is expected."
            )
        first = counted.first
    rest = activations[:, first:]
    if rest.shape[1] == 1:
        maxima = rest
    else:
        whole = rest.shape[1] // _BLOCK
        parts = []
        if whole:
            blocks = rest[:, : whole * _BLOCK].view(len(rest), whole, _BLOCK, -1)
            parts.append(blocks.amax(dim=2))
        if whole * _BLOCK < rest.shape[1]:
            parts.append(rest[:, whole * _BLOCK :].amax(dim=1, keepdim=True))
        maxima = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    if counted is not None and counted.holes is not None:
        rows, blocks, kept = counted.holes
        at = blocks[:, None] * _BLOCK + torch.arange(_BLOCK, device=rows.device)
        values = rest[rows[:, None], at.clamp(max=rest.shape[1] - 1)]
        again = values.masked_fill(~kept[:, :, None], -torch.inf).amax(dim=1)
        maxima = maxima.index_put((rows, blocks), again)
    values = maxima.amax(dim=1) if maxima.shape[1] > 1 else maxima[:, 0]
    if counted is not None and not counted.all_inputs:
        values = values.masked_fill(~counted.inputs[:, None], 0)
    return Reading(values, activations, counted, maxima if maxima.shape[1] > 1 else None)
