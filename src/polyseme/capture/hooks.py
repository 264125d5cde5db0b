"""Reading and editing a model's sites, with the model left exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyseme.capture.activation import Watch
from polyseme.capture.sites import Reading, SAESite, Site
from polyseme.errors import InputError, SiteError

Gather = Callable[[Tensor, Tensor], Tensor]
OnReading = Callable[[Site, Reading, Gather], None]
Edit = Callable[[Tensor], Tensor | None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class Feed:
    """Turns arrays into what a model takes: its device, its floating-point type.

    Parameters
    ----------
    model : torch.nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.float32

    def __call__(self, inputs: Any) -> Any:
        """The model's output for a batch, or an `InputError` that says what it would not take."""
        batch = torch.as_tensor(np.asarray(inputs) if not torch.is_tensor(inputs) else inputs)
        batch = batch.to(self.device)
        if batch.is_floating_point():
            batch = batch.to(self.dtype)
        try:
            return self._model(batch)
        except (InputError, torch.OutOfMemoryError):
            # From a hook of ours, which has said what is wrong; or not about the inputs.
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            shape = tuple(batch.shape[1:])
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"The model cannot take a batch of inputs of shape {shape}: {reason}. "
                f"{_first_layer(self._model)}Reshape the data, or wrap the model in one that does."
            ) from error


def _first_layer(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            return f"Its first layer, {name!r}, takes {module.in_features} values. "
        if isinstance(module, nn.Conv2d):
            return f"Its first layer, {name!r}, takes images of {module.in_channels} channels. "
    return ""


@contextmanager
def read_sites(model: nn.Module, sites: Sequence[Site], on_reading: OnReading) -> Iterator[None]:
    """Call back with every site's reading whenever the model runs; hooks always go again.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of Site
    on_reading : callable (site, reading, gather)
        Called from within the forward pass, before a later layer can change a tensor in
        place. ``gather(rows, places)`` gives pre-neuron embeddings, see `Site.gather`.
    """
    with ExitStack() as hooks:
        for site in sites:
            for handle in _hook(site, on_reading):
                hooks.callback(handle.remove)
        yield


def _hook(site: Site, on_reading: OnReading) -> list[Any]:
    if not isinstance(site, SAESite):

        def read(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs = _first(args, kwargs)
            on_reading(site, site.read(output), lambda r, p: site.gather(inputs, r, p))

        return [site.module.register_forward_hook(read, with_kwargs=True)]

    reached: list[Tensor] = []

    def decoding(_: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append(_first(args, kwargs))

    def read_sae(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = _first(args, kwargs)
        activations = reached.pop() if reached else _encode(site, inputs)
        reached.clear()
        reading = site.read_activations(activations)
        on_reading(site, reading, lambda r, p: site.gather(inputs, r, p))

    handles = [site.module.register_forward_hook(read_sae, with_kwargs=True)]
    if site.decoder is not None:
        handles.append(site.decoder.register_forward_pre_hook(decoding, with_kwargs=True))
    return handles


def _encode(site: SAESite, inputs: Tensor) -> Tensor:
    if not callable(getattr(site.module, "encode", None)):
        raise SiteError(
            f"The SAE {site.name!r} neither calls its decoder nor has an encode method, so its "
            "activations cannot be read; give it an encode method."
        )
    with torch.no_grad():
        return site.encode(inputs)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
    return values[0]


def find_activations(model: nn.Module, sites: Sequence[Site], feed: Feed, inputs: Any) -> Any:
    """Run one batch and learn what the model applies to each site's output.

    Sets ``site.activation``. Returns the model's output.

    Raises
    ------
    SiteError
        If the model does not reach a site, or reaches it more than once.
    """
    # An SAE's encoder may be called past the SAE, which is where it is read: both count.
    calls = {site.name: {site.module: 0, site.output_module: 0} for site in sites}
    watch = Watch()

    def follow(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[site.name][module] += 1
            if torch.is_tensor(output) and module is site.output_module:
                watch.follow(site.name, output)

        return hook

    with ExitStack() as hooks:
        for site in sites:
            for module in calls[site.name]:
                handle = module.register_forward_hook(follow(site))
                hooks.callback(handle.remove)
        with watch, torch.no_grad():
            output = feed(inputs)
    for site in sites:
        times = next((n for n in calls[site.name].values() if n != 1), 1)
        if times != 1:
            raise SiteError(
                f"The model runs site {site.name!r} {times} times for one input; "
                "once is expected: "
                + (
                    "name a layer that the model uses, and let it call the layer itself."
                    if not times
                    else "wrap the model so that one call is one input."
                )
            )
        if not (isinstance(site, SAESite) and site.output_module is site.module):
            site.activation = watch.chains[site.name]
    return output


@contextmanager
def edit_site(site: Site, edit: Edit) -> Iterator[None]:
    """Replace a site's activations on their way through the model.

    Parameters
    ----------
    site : Site
        With its activation known, see `find_activations`.
    edit : callable (activations) -> Tensor or None
        Called with the activations as the model has them: (B, ..., n_neurons), or for a
        convolution (B, channels, height, width).
    """
    with ExitStack() as stack:
        if isinstance(site, SAESite):
            if site.decoder is None:
                raise SiteError(f"The SAE {site.name!r} has no decoder module to edit before.")

            def before(_: nn.Module, args: Any) -> Any:
                edited = edit(args[0])
                return None if edited is None else (edited, *args[1:])

            stack.callback(site.decoder.register_forward_pre_hook(before).remove)
        else:
            watch = Watch({site.name: site.activation}, lambda _, tensor: edit(tensor))

            def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
                return watch.follow(site.name, output)

            stack.callback(site.output_module.register_forward_hook(hook).remove)
            stack.enter_context(watch)
        yield
