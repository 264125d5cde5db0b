"""What a run of the model on a few inputs has shown of a site, and how far numbers may differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyseme.sites.watch import Track


@dataclass
class Seen:
    """What a run of the model on a few inputs has shown of a site.

    Attributes
    ----------
    n_inputs : int
    inputs : Tensor, shape (n_inputs, ...)
        What the site reads, as `Site.gather` takes it.
    output : Tensor, shape (n_inputs, ...)
        What its layer put out.
    activations : Tensor, shape (n_inputs, ...), optional
        Of a hidden layer: what reached its decoder.
    track : Track, optional
        What the model called on the layer's output.
    again : callable (Tensor) -> Tensor, optional
        The layer by itself, on other inputs of the same shape.
    called : bool
        Of an SAE: whether the model called the module that holds encoder and decoder.
    encoded : Tensor, optional
        Of an SAE: what its encoder was called with.
    taken_off : Tensor, shape (d_in,), optional
        Of an SAE: the decoder's bias, if the encoder was called with something less that.
    own_latents : bool
        Of an SAE: whether each activation that reached the decoder rests on its own latent alone.
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
    """How far outputs are from ``W h`` plus a constant for each neuron, as a share of their size.

    Parameters
    ----------
    vectors : Tensor, shape (m, d)
    weights : Tensor, shape (n, d)
    outputs : Tensor, shape (m, n)

    Returns
    -------
    float
        0 if they are just that; infinity if shapes do not fit, or numbers are not finite.
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
    """The largest difference of two tensors, as a share of the second's largest number."""
    if tensor.shape != reference.shape:
        return float("inf")
    if not bool(torch.isfinite(reference).all()):
        # It is said where activations are collected.
        return 0.0
    tensor, reference = tensor.detach().float(), reference.detach().float()
    far = float((tensor - reference).abs().max()) / (float(reference.abs().max()) + 1e-30)
    return far if far == far else float("inf")


def percent(share: float) -> str:
    """A share of 1 in words, for messages."""
    return f"{share:.1%}" if share < 10 else "more than 1,000%"
