"""A site's activations as data, and SAEs attached to a site of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.errors import InputError, SiteError
from polyseme.sites.find import find_sites
from polyseme.sites.hooks import Feed, Reached, edit_site, evaluating
from polyseme.sites.proof import prove_sites
from polyseme.sites.site import Site


def find_site(model: nn.Module, name: str | Site) -> Site:
    """Find the one site of that name."""
    sites = find_sites(model, name)
    if len(sites) != 1:
        names = ", ".join(site.name for site in sites[:8])
        raise SiteError(f"{name!r} matches {len(sites)} sites ({names}); name one of them.")
    return sites[0]


def site_activations(model: nn.Module, site: Site, batches: Iterable[Any]) -> Iterator[Tensor]:
    """Activations of a site, batch by batch, for training or testing an SAE.

    Parameters
    ----------
    model : torch.nn.Module
    site : Site
    batches : iterable of array or Tensor, shape (B, ...), or of a dict of them
        Inputs of the model, see `Feed`.

    Yields
    ------
    Tensor of float, shape (B · positions, n_neurons)
        Outputs of the nonlinearity at every position, padding included, on the model's device.
    """
    feed = Feed(model)
    known = False
    for inputs in batches:
        with evaluating(model), torch.no_grad():
            if not known:
                prove_sites(model, [site], feed, inputs)
                known = True
            seen: list[Tensor] = []

            def keep(activations: Tensor, seen: list[Tensor] = seen) -> None:
                seen.append(rows_of(site, activations).clone())
                raise Reached

            with suppress(Reached), edit_site(site, keep):
                feed(inputs)
        yield seen[0]


def _last(site: Site, activations: Tensor) -> Tensor:
    """Activations with the neurons on the last axis: (B, ..., n_neurons)."""
    return activations.movedim(site.neuron_axis, -1)


def rows_of(site: Site, activations: Tensor) -> Tensor:
    """Reshape the model's activations to one row per position: (m, n_neurons)."""
    last = _last(site, activations)
    return last.reshape(-1, last.shape[-1])


@contextmanager
def replacing(site: Site, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Replace a site's activations with a function of them while the model runs.

    Parameters
    ----------
    site : Site
        With its activation known.
    function : callable (activations) -> Tensor or None
        Maps (B, ..., n_neurons) to the same shape; None leaves the activations unchanged.
    """

    def edit(activations: Tensor) -> Tensor | None:
        changed = function(_last(site, activations))
        return None if changed is None else changed.movedim(-1, site.neuron_axis)

    with edit_site(site, edit):
        yield


class _Decode(nn.Module):
    """An SAE's decoder as a module, so that hooks can read and edit its input."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._decode = decode

    def forward(self, latents: Tensor) -> Tensor:
        """Reconstruction (..., d_in) from latents (..., d_sae)."""
        return self._decode(latents)


def check_sae(sae: Any) -> None:
    """Refuse anything that cannot be an SAE."""
    for name in ("encode", "decode"):
        if not callable(getattr(sae, name, None)):
            raise InputError(
                f"The SAE is a {type(sae).__name__} without {name}(); expected an SAE with "
                f"encode(), decode() and W_enc. Load it with polyseme.load_sae."
            )


class AttachedSAE(nn.Module):
    """An SAE wrapped so that it can be read as a site: encode, then a decoder module.

    Parameters
    ----------
    sae : torch.nn.Module
        With ``encode`` and ``decode``, and its encoder weight as ``W_enc`` (d_in, d_sae).
    """

    def __init__(self, sae: Any) -> None:
        super().__init__()
        check_sae(sae)
        self.sae = sae
        self.decoder = _Decode(sae.decode)

    @property
    def W_enc(self) -> Tensor:
        """Encoder weight, (d_in, d_sae)."""
        weight: Tensor = self.sae.W_enc
        return weight

    @property
    def W_dec(self) -> Tensor:
        """Decoder weight, (d_sae, d_in), if the SAE has one."""
        weight: Tensor = self.sae.W_dec
        return weight

    def encode(self, activations: Tensor) -> Tensor:
        """Latents (..., d_sae)."""
        latents: Tensor = self.sae.encode(activations)
        return latents

    def forward(self, activations: Tensor) -> Tensor:
        """Reconstruction (..., d_in)."""
        return self.decode(self.encode(activations))

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction (..., d_in) from latents (..., d_sae)."""
        reconstruction: Tensor = self.decoder(latents)
        return reconstruction


class WithSAE(nn.Module):
    """A model with an SAE spliced in at a site: later layers see the SAE's reconstruction.

    Its latents are the neurons of site ``"sae"``, and the model's own sites are under
    ``"model."``.

    Parameters
    ----------
    model : torch.nn.Module
        Not modified.
    site : str or Site
        The site whose activations the SAE reads.
    sae : torch.nn.Module
        See `AttachedSAE`.
    inputs : array or Tensor, shape (n, ...)
        A few inputs of the model, to learn what it does with the site's output.
    splice : bool
        False leaves the model's activations unchanged, so that the SAE only reads them.
    """

    def __init__(
        self, model: nn.Module, site: str | Site, sae: Any, inputs: Any, *, splice: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.sae = AttachedSAE(sae)
        self.splice = splice
        self._site = find_site(model, site)
        d_in = int(self.sae.W_enc.shape[0])
        if d_in != self._site.n_neurons:
            raise SiteError(
                f"The SAE reads {d_in} values, but site {self._site.name!r} has "
                f"{self._site.n_neurons} neurons; give the site that the SAE was trained on."
            )
        with evaluating(model):
            prove_sites(model, [self._site], Feed(model), inputs)

    def forward(self, inputs: Tensor) -> Any:
        """The model's output for its inputs."""

        def through(activations: Tensor) -> Tensor | None:
            reconstruction: Tensor = self.sae(activations)
            return reconstruction.to(activations.dtype) if self.splice else None

        with replacing(self._site, through):
            return self.model(inputs)
