"""The unembedding of a language model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyseme.sites.layers import is_linear
from polyseme.sites.transformer import multiplies_by_its_weight


class Unembedding(NamedTuple):
    """The linear map from a language model's final residual stream to logits.

    Attributes
    ----------
    weight : Tensor of float, shape (vocabulary, d)
        The LM head, detached.
    gain : Tensor of float, shape (d,), or None
        Gain of the final norm; None without such a norm.
    centred : bool
        Whether the final norm subtracts the mean over d, as a layer norm does.
    """

    weight: Tensor
    gain: Tensor | None
    centred: bool


def unembedding(model: nn.Module) -> Unembedding | None:
    """Get the LM head of a `transformers` model and the linear part of its final norm.

    The norm's division by the size of the residual stream is left out: it depends on the input,
    and changes neither the order of a direction's effects nor their signs. Any scaling or capping
    of logits is left out too.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    Unembedding or None
        None for a model without an LM head, or whose head is more than a matrix, as in masked
        language models or with an adapter; callers then skip logit effects.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    body: Any = getattr(model, "base_model", None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module) or body is model:
        return None
    within = {id(parameter) for module in (body, head) for parameter in module.parameters()}
    if any(id(parameter) not in within for parameter in model.parameters()):
        return None
    if not is_linear(head) or not multiplies_by_its_weight(head):
        return None
    weight = head.weight
    assert isinstance(weight, Tensor)
    norm = _final_norm(body, weight.shape[1])
    if norm is None:
        return Unembedding(weight.detach(), None, False)
    gain, centred = _probe(norm, weight)
    return Unembedding(weight.detach(), gain, centred)


def _final_norm(body: nn.Module, width: int) -> nn.Module | None:
    """The last norm outside the stack of layers.

    Not simply the last norm: some models create the final norm before their layers.
    """
    stacks = [name for name, module in body.named_modules() if isinstance(module, nn.ModuleList)]
    norms = [
        module
        for name, module in body.named_modules()
        if "norm" in type(module).__name__.lower()
        and not any(name.startswith(f"{stack}.") for stack in stacks)
        and all(parameter.shape == (width,) for parameter in module.parameters())
    ]
    return norms[-1] if norms else None


@torch.no_grad()
def _probe(norm: nn.Module, like: Tensor) -> tuple[Tensor, bool]:
    """Measure a norm's gain, and whether it subtracts the mean.

    Its weight is not enough: in some norms, the gain is 1 + weight.
    """
    # Mean 0 and equal magnitudes, so that a norm divides all entries by the same number; large, so
    # that the norm's epsilon is negligible.
    size = 1000.0
    signs = torch.ones(like.shape[1], dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    # The difference cancels the norm's bias.
    gain = (norm(signs * size) - norm(-signs * size)).float() / 2 * signs.float()
    shift = norm(signs * size + size).float() - norm(signs * size).float()
    return gain, bool(shift.abs().max() <= 1e-2 * gain.abs().max())
