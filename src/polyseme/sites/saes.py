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
    """An SAE as a site of a language model, at the hook point whose vectors it reads.

    Give what this returns among ``sites`` of `analyse`, beside the model's own. The model is left
    as it is, and what it puts out does not change.

    Parameters
    ----------
    model : torch.nn.Module
        A language model of transformers.
    sae : torch.nn.Module
        As `load_sae` and `train_sae` give it.
    hook : str, optional
        Name of the hook point, see `polyseme.sites.hookpoints.find_hook_point`; by default the
        one in the SAE's metadata: SAELens's ``hook_name``, or the ``site`` that it was trained on.
    name : str, optional
        Of the site; by default that of the hook point with ``.sae`` after it.

    Returns
    -------
    SAESite

    Raises
    ------
    SiteError
        The model has no such hook point, or its vectors have another length than the SAE reads.
    InputError
        There is no SAE, or it does not say where it belongs and ``hook`` is not given.
    """
    if isinstance(sae, str | bytes) or not isinstance(sae, nn.Module):
        raise InputError(
            f"sae is a {type(sae).__name__}; an SAE is expected, as polyseme.load_sae gives it."
        )
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None) or {}
    if hook is None:
        hook = metadata.get("hook_name") or metadata.get("site")
    if not isinstance(hook, str) or not hook:
        raise InputError(
            "The SAE does not say at which hook point it was trained; give it: hook="
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
    """Whether TransformerLens took the mean off all that is written, as SAELens told it to.

    It does so only where every norm takes off the mean anyway.
    """
    options = metadata.get("model_from_pretrained_kwargs")
    if not isinstance(options, Mapping) or not options.get("center_writing_weights"):
        return False
    head = unembedding(model)
    return head is not None and head.centred


class _Reached(Exception):
    """The hook point is passed; what the model would do after it is not needed."""


def vectors_at(model: nn.Module, point: HookPoint, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Vectors at a hook point, to train an SAE on: one for each token that counts.

    Parameters
    ----------
    model : torch.nn.Module
    point : HookPoint
    batches : iterable of TokenBatch
        From `polyseme.data.Contexts.batches`. Padding never counts, nor does what the contexts
        leave out: special tokens and the first position, unless they were told otherwise.

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
