"""Running a model on token ids, only as far as the requested sites."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.errors import InputError, SiteError
from polyseme.sites.hooks import Feed, Reached, first_tensor, in_this_thread
from polyseme.sites.site import Site
from polyseme.sites.transformer import is_transformer

#: rows, positions and neurons of the activations wanted of a site
Wanted = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


class Reach:
    """Runs a model on token ids until all sites have been reached.

    Parameters
    ----------
    model : torch.nn.Module
        A `transformers` model, or a module called with token ids alone.
    sites : sequence of Site
        With one position per token and known activations.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._model = model
        self._sites = sites
        self._feed = Feed(model)
        self.device = self._feed.device
        base = getattr(model, "base_model", None)
        self._base = base if isinstance(base, nn.Module) else model

    @property
    def takes_past(self) -> bool:
        """Whether the model can continue from cached keys and values of earlier tokens."""
        return is_transformer(self._model) and "past_key_values" in (
            inspect.signature(self._base.forward).parameters
        )

    def __call__(
        self,
        ids: NDArray[np.int64],
        attended: NDArray[np.bool_],
        wanted: Sequence[Wanted],
        past: Any = None,
    ) -> list[Tensor]:
        """Get the wanted activations of each site.

        Parameters
        ----------
        ids : ndarray of int64, shape (B, L)
        attended : ndarray of bool, shape (B, L)
            False for padding.
        wanted : sequence of (rows, places, neurons)
            For each site, arrays of int64 of shape (n,).
        past : Cache, optional
            Keys and values of the tokens before ``ids``; those of ``ids`` are added.

        Returns
        -------
        list of Tensor of float32, each of shape (n,)

        Raises
        ------
        InputError
            For padding given to a model that does not accept it.
        SiteError
            For a site that the model does not reach, or one without one position per token.
        """
        inputs: Any = ids
        if is_transformer(self._model):
            inputs = {"input_ids": ids}
            if not attended.all():
                inputs["attention_mask"] = attended.astype(np.int64)
        elif not attended.all():
            raise InputError(
                f"The contexts hold padding, but a {type(self._model).__name__} is called with "
                f"token ids alone; expected a transformers model, which takes an attention mask, "
                f"or contexts of equal length."
            )
        caught: dict[int, Tensor] = {}

        def catch(number: int, activations: Tensor) -> None:
            site = self._sites[number]
            if activations.shape[:-1].numel() != ids.size:
                raise SiteError(
                    f"Site {site.name!r} has activations of shape {tuple(activations.shape)} "
                    f"for token ids of shape {ids.shape}; expected "
                    f"{(*ids.shape, site.n_neurons)}. Name a layer that runs on each token."
                )
            rows, places, neurons = (
                torch.as_tensor(index, device=activations.device) for index in wanted[number]
            )
            caught[number] = activations.reshape(*ids.shape, -1)[rows, places, neurons].float()

        with _stopping_at(self._sites, catch):
            if past is None:
                self._feed(inputs)
            else:
                tokens = torch.as_tensor(ids, device=self.device)
                self._base(input_ids=tokens, past_key_values=past, use_cache=True)
        for number, site in enumerate(self._sites):
            if number not in caught:
                raise SiteError(
                    f"The model does not run site {site.name!r} on token ids; name a layer "
                    "that it uses."
                )
        return [caught[number] for number in range(len(self._sites))]


@contextmanager
def _stopping_at(sites: Sequence[Site], catch: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Capture activations of sites, (B, L, n_neurons), and end the forward pass after the last.

    A site that runs twice in a forward pass is captured once.
    """
    pending = set(range(len(sites)))

    def reach(number: int, activations: Callable[[], Tensor]) -> None:
        if number in pending:
            catch(number, activations())
            pending.remove(number)
            if not pending:
                raise Reached

    with ExitStack() as hooks:
        for number, site in enumerate(sites):
            hooks.callback(_hook(site, number, reach).remove)
        with suppress(Reached):
            yield


def _hook(site: Site, number: int, reach: Callable[[int, Callable[[], Tensor]], None]) -> Any:
    def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
        reach(number, lambda: _first(args, kwargs))

    hidden = site.hidden

    def leaving(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if hidden is None:
            reach(number, lambda: site.activation(output))
        else:
            vectors = first_tensor(output) if hidden.reads_output else _first(args, kwargs)
            reach(number, lambda: hidden.encode(vectors))

    if hidden is not None and hidden.decoder is not None:
        return hidden.decoder.register_forward_pre_hook(in_this_thread(entering), with_kwargs=True)
    module = site.output_module if hidden is None else hidden.last_module
    return module.register_forward_hook(in_this_thread(leaving), with_kwargs=True)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if torch.is_tensor(value))
