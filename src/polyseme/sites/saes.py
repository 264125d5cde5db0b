"""SAEs at hook points of a language model, as sites of that model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyseme.errors import InputError, SiteError
from polyseme.sites.attach import AttachedSAE
from polyseme.sites.encoders import dense, prove_encode, watched_encode
from polyseme.sites.hookpoints import HookPoint, find_hook_point
from polyseme.sites.hooks import Feed, evaluating, first_tensor, in_this_thread
from polyseme.sites.layers import HiddenSite
from polyseme.sites.seen import Seen
from polyseme.sites.unembedding import unembedding


class HookedSAE(HiddenSite):
    """The latents of an SAE that looks on at a hook point: the model runs as if it were not there.

    Made by `attach_sae`.

    Parameters
    ----------
    name : str
    sae : torch.nn.Module
        See `AttachedSAE`.
    point : HookPoint
    centred : bool
        Whether the SAE reads vectors less their mean over the coordinates.
    """

    kind = "sae"

    def __init__(self, name: str, sae: Any, point: HookPoint, *, centred: bool = False) -> None:
        weight = AttachedSAE(sae).W_enc
        d_in, d_sae = weight.shape
        if d_in != point.width:
            raise SiteError(
                f"The SAE reads vectors of length {d_in}, but those at {point.name!r} have length "
                f"{point.width}; give the hook point that it was trained on."
            )
        super().__init__(name, sae, int(d_sae), int(d_in))
        #: Whether its weights multiply the vectors at the hook point as they are.
        self._reads_whole = True
        self.point = point
        self.centred = centred

    @property
    def input_module(self) -> nn.Module:
        return self.point.module

    @property
    def output_module(self) -> nn.Module:
        return self.point.module

    @property
    def last_module(self) -> nn.Module:
        return self.point.module

    @property
    def reads_output(self) -> bool:
        return self.point.of_output

    @property
    def decoder(self) -> nn.Module | None:
        """None: nothing of the model reads the latents."""
        return None

    def weights(self) -> Tensor:
        weight: Any = self.module.W_enc
        found: Tensor = weight.detach().T
        return found

    def encode(self, inputs: Tensor) -> Tensor:
        """Latents (..., d_sae) of vectors at the hook point."""
        return dense(self._encode(self._given(inputs))).to(inputs.device)

    def _encode(self, given: Tensor) -> Tensor:
        encode: Any = self.module.encode
        latents: Tensor = encode(given)
        return latents

    def _given(self, inputs: Tensor) -> Tensor:
        """What the SAE is handed of the vectors at the hook point."""
        weight: Any = self.module.W_enc
        given = self._as_read(inputs).to(weight.device, weight.dtype)
        # SAELens takes heads and their coordinates on two axes, and joins them.
        return given[..., None, :] if self._joins_heads else given

    @property
    def _joins_heads(self) -> bool:
        return bool(getattr(self.module, "hook_z_reshaping_mode", False))

    def prove(self, runs: Sequence[Seen]) -> None:
        weight: Any = self.module.W_enc
        given = [Seen(run.n_inputs, self._given(run.inputs), run.output) for run in runs]
        self._reads_whole = prove_encode(self.name, self._encode, weight, given)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        if self._reads_whole:
            return self._as_read(super().gather(inputs, rows, places))
        weight: Any = self.module.W_enc
        vectors = watched_encode(self._encode, weight, self._given(inputs))[1]
        return super().gather(vectors, rows, places)

    def _as_read(self, vectors: Tensor) -> Tensor:
        return vectors - vectors.mean(dim=-1, keepdim=True) if self.centred else vectors

    def directions(self) -> Tensor | None:
        """What each latent writes to the residual stream, (d_sae, d); None if it is not known."""
        weight = getattr(self.module, "W_dec", None)
        if not isinstance(weight, Tensor):
            return None
        if weight.shape != (self.n_neurons, self.d_in):
            return None
        return self.point.written(weight.detach())


def attach_sae(
    model: nn.Module, sae: Any, hook: str | None = None, *, name: str | None = None
) -> HookedSAE:
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
    HookedSAE

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
    return HookedSAE(
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
    found = unembedding(model)
    return found is not None and found.centred


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
            given = output if point.of_output else (*args, *kwargs.values())
            seen.append(first_tensor(given).detach().reshape(-1, point.width).clone())

        handle = point.module.register_forward_hook(in_this_thread(keep), with_kwargs=True)
        try:
            with evaluating(model), torch.no_grad():
                feed({"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)})
        finally:
            handle.remove()
        rows = torch.from_numpy(np.flatnonzero(batch.counted)).to(seen[0].device)
        yield seen[0][rows].float().cpu()
