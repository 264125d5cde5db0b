"""SAEs at hook points of a language model, as sites of that model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyseme.errors import InputError
from polyseme.sites.attach import check_sae
from polyseme.sites.encoders import SAESite
from polyseme.sites.hookpoints import HookPoint, find_hook_point
from polyseme.sites.hooks import Feed, evaluating, first_tensor, in_this_thread
from polyseme.sites.unembedding import unembedding


def attach_sae(
    model: nn.Module, sae: Any, hook: str | None = None, *, name: str | None = None
) -> SAESite:
    """Attach an SAE to a language model as a site, at the hook point whose vectors it reads.

    Include the result in ``sites`` of `analyse`, along with the model's own sites. The model is not
    modified, and its output does not change.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers language model.
    sae : torch.nn.Module
        From `load_sae` or `train_sae`.
    hook : str, optional
        Name of the hook point, see `polyseme.sites.hookpoints.find_hook_point`; by default the
        one in the SAE's metadata: SAELens's ``hook_name``, or the ``site`` that it was trained on.
    name : str, optional
        Name of the site; by default the hook point's name followed by ``.sae``.

    Returns
    -------
    SAESite

    Raises
    ------
    SiteError
        The model has no such hook point, or its vectors do not have the length that the SAE reads.
    InputError
        ``sae`` is not an SAE, or neither it nor ``hook`` names a hook point.
    """
    if isinstance(sae, str | bytes) or not isinstance(sae, nn.Module):
        raise InputError(f"sae is a {type(sae).__name__}; expected an SAE from polyseme.load_sae.")
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None) or {}
    if hook is None:
        hook = metadata.get("hook_name") or metadata.get("site")
    if not isinstance(hook, str) or not hook:
        raise InputError(
            "The SAE does not say at which hook point it was trained; give hook="
            "'blocks.5.hook_resid_post', or the name of a module (--hook on the command line)."
        )
    point = find_hook_point(model, hook)
    check_sae(sae)
    return SAESite(
        f"{hook}.sae" if name is None else name,
        sae,
        point,
        centred=point.in_residual and _was_centred(model, metadata),
    )


def _was_centred(model: nn.Module, metadata: Any) -> bool:
    """Whether TransformerLens centred everything written to the residual stream, as SAELens asked.

    It does so only if every norm subtracts the mean anyway.
    """
    options = metadata.get("model_from_pretrained_kwargs")
    if not isinstance(options, Mapping) or not options.get("center_writing_weights"):
        return False
    head = unembedding(model)
    return head is not None and head.centred


class _Reached(Exception):
    """The hook point was reached; the rest of the forward pass is not needed."""


def vectors_at(model: nn.Module, point: HookPoint, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Vectors at a hook point, one per token that counts, for training an SAE.

    Parameters
    ----------
    model : torch.nn.Module
    point : HookPoint
    batches : iterable of TokenBatch
        From `polyseme.data.Contexts.batches`. Padding never counts, nor do the tokens that the
        contexts leave out: by default, special tokens and the first position.

    Yields
    ------
    Tensor of float32, shape (m, width)
        On the CPU, in the order of the text.
    """
    inside = {id(module) for module in getattr(model, "base_model", model).modules()}
    feed = Feed(model, head=id(point.module) not in inside)
    for batch in batches:
        seen: list[Tensor] = []

        def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, seen: Any = seen) -> None:
            value = output if point.of_output else (*args, *kwargs.values())
            seen.append(first_tensor(value).detach().reshape(-1, point.width).clone())
            raise _Reached

        handle = point.module.register_forward_hook(in_this_thread(keep), with_kwargs=True)
        try:
            with evaluating(model), torch.no_grad(), suppress(_Reached):
                feed({"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)})
        finally:
            handle.remove()
        rows = torch.from_numpy(np.flatnonzero(batch.mask)).to(seen[0].device)
        yield seen[0][rows].float().cpu()
