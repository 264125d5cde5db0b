"""Gradients of activations without a closed form in core."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyseme.errors import InputError


def activation_gradient(activation: Callable[[Tensor], Tensor], h: Any) -> Tensor:
    """Compute the gradient ∂a/∂h of any neuron at each example, by automatic differentiation.

    ``neuron_embeddings(h, activation_gradient(f, h))`` are the embeddings of a neuron that is
    neither linear nor gated.

    Parameters
    ----------
    activation : callable
        Maps pre-neuron embeddings (n, d) to the neuron's activations (n,), row by row.
    h : array or tensor of float, shape (n, d)

    Returns
    -------
    Tensor, shape (n, d)
    """
    inputs = torch.as_tensor(h).detach().clone().requires_grad_()
    with torch.enable_grad():
        values = activation(inputs)
        if values.shape != inputs.shape[:1]:
            raise InputError(
                f"activation returned shape {tuple(values.shape)} for {len(inputs)} examples; "
                f"expected ({len(inputs)},)."
            )
        (gradient,) = torch.autograd.grad(values.sum(), inputs)
    return gradient
