"""What a run of the model on a few inputs shows about a site, and numeric differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyseme.sites.watch import Track


@dataclass
class Seen:
    """What a run of the model on a few inputs shows about a site.

    Attributes
    ----------
    n_inputs : int
    inputs : Tensor, shape (n_inputs, ...)
        Inputs of the site, as for `Site.gather`.
    output : Tensor, shape (n_inputs, ...)
        Output of its layer.
    activations : Tensor, shape (n_inputs, ...), optional
        For a hidden layer: the input of its decoder.
    track : Track, optional
        The model's calls on the layer's output.
    again : callable (Tensor) -> Tensor, optional
        The layer alone, on other inputs of the same shape.
    called : bool
        For an SAE: whether the model called the module that holds encoder and decoder.
    encoded : Tensor, optional
        For an SAE: the input of its encoder.
    taken_off : Tensor, shape (d_in,), optional
        For an SAE: the decoder bias, if it was subtracted from the encoder's input.
    own_latents : bool
        For an SAE: whether each activation that reached the decoder depends only on its own latent.
    """

    n_inputs: int
    inputs: Tensor
    output: Tensor
    activations: Tensor | None = None
    track: Track | None = None
    again: Callable[[Tensor], Tensor] | None = None
    called: bool = True
    encoded: Tensor | None = None
    taken_off: Tensor | None = None
    own_latents: bool = True


def deviation(vectors: Tensor, weights: Tensor, outputs: Tensor) -> float:
    """Deviation of outputs from ``W h`` plus a constant per neuron, relative to their size.

    Parameters
    ----------
    vectors : Tensor, shape (m, d)
    weights : Tensor, shape (n, d)
    outputs : Tensor, shape (m, n)

    Returns
    -------
    float
        0 for an exact match; infinity if shapes do not match or numbers are not finite.
    """
    if outputs.shape != (len(vectors), len(weights)) or vectors.shape[1:] != weights.shape[1:]:
        return float("inf")
    wide = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    h, w, z = (tensor.to(outputs.device, wide) for tensor in (vectors, weights, outputs))
    rest = z - h @ w.T
    size = (h.square() @ w.square().T).sqrt() + z.abs()
    far = (rest - rest.mean(dim=0)).abs().amax(dim=0) / (size.amax(dim=0) + 1e-30)
    worst = float(far.max())
    return worst if worst == worst else float("inf")


def difference(tensor: Tensor, reference: Tensor) -> float:
    """Largest difference between two tensors, relative to the second's largest number."""
    if tensor.shape != reference.shape:
        return float("inf")
    if not bool(torch.isfinite(reference).all()):
        # Reported where activations are collected.
        return 0.0
    tensor, reference = tensor.detach().float(), reference.detach().float()
    far = float((tensor - reference).abs().max()) / (float(reference.abs().max()) + 1e-30)
    return far if far == far else float("inf")


def percent(share: float) -> str:
    """Format a fraction as a percentage, for messages."""
    return f"{share:.1%}" if share < 10 else "more than 1,000%"
