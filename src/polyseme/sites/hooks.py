"""Reading and editing a model's sites without changing the model."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyseme.errors import InputError, SiteError
from polyseme.sites.reading import PositionMask, Reading, strongest
from polyseme.sites.site import HiddenSite, Site
from polyseme.sites.watch import Watch

# Exceptions that models raise on inputs they do not accept.
_MODELS_RAISE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError),
    ArithmeticError,
)

Gather = Callable[[Tensor, Tensor], Tensor]
OnReading = Callable[[Site, Reading, Gather], None]
Edit = Callable[[Tensor], Tensor | None]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode within the block; always restore every module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _uncompiled(model: nn.Module) -> Any:
    """Context in which `torch.compile`d code runs uncompiled, so that hooks see it."""
    for module in model.modules():
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            return torch.compiler.set_stance("force_eager")
    return nullcontext()


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a hook so that it ignores calls from other threads.

    While the explorer uses a model in its own thread, its user may go on using the model; those
    calls are neither read, edited nor stopped. Use this for every hook set on a model.
    """
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


class Feed:
    """Feeds arrays to a model on its device and in its floating-point dtype.

    Parameters
    ----------
    model : torch.nn.Module
    head : bool
        False skips the head of a transformers model, such as the logits over its vocabulary, which
        sites inside the model do not need.
    """

    def __init__(self, model: nn.Module, *, head: bool = True) -> None:
        base = getattr(model, "base_model", None)
        self._model = base if not head and isinstance(base, nn.Module) else model
        tensors = [*model.parameters(), *model.buffers()]
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = floating[0].dtype if floating else torch.float32

    def __call__(self, inputs: Any) -> Any:
        """Run the model on a batch; an `InputError` explains inputs that it does not accept.

        Parameters
        ----------
        inputs : array or Tensor, shape (B, ...), or a dict of them
            A dict, such as of ``input_ids`` and ``attention_mask``, is passed as keyword arguments.
        """
        if isinstance(inputs, Mapping):
            named = {name: self._tensor(value) for name, value in inputs.items()}
            shapes = {name: tuple(t.shape) for name, t in named.items()}
            with self._explained(shapes), _uncompiled(self._model):
                return self._model(**named, **_without_cache(self._model))
        batch = self._tensor(inputs)
        with self._explained(tuple(batch.shape[1:])), _uncompiled(self._model):
            return self._model(batch)

    def _tensor(self, values: Any) -> Tensor:
        tensor = torch.as_tensor(values if torch.is_tensor(values) else np.asarray(values))
        tensor = tensor.to(self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @contextmanager
    def _explained(self, shape: Any) -> Iterator[None]:
        try:
            yield
        except (InputError, torch.OutOfMemoryError):
            # From our own hook, which says what is wrong, or not about the inputs.
            raise
        except _MODELS_RAISE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(shape, dict):
                shapes = ", ".join(f"{name} {size}" for name, size in shape.items())
                raise InputError(
                    f"The model does not accept a batch of {shapes}: {reason}. Give it arrays from "
                    f"its own tokenizer, no longer than the model allows."
                ) from error
            raise InputError(
                f"The model does not accept a batch of inputs of shape {shape}: {reason}. "
                f"{_first_layer(self._model)}Reshape the data, or wrap the model in one that does."
            ) from error


def some_inputs(inputs: Any, part: slice) -> Any:
    """A few inputs of a batch, which is an array or a dict of arrays."""
    if isinstance(inputs, Mapping):
        return {name: values[part] for name, values in inputs.items()}
    return inputs[part]


def _without_cache(model: nn.Module) -> dict[str, bool]:
    # Keys and values cached for a next token that never comes waste memory.
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes else {}


def _first_layer(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            return f"Its first layer, {name!r}, takes {module.in_features} values. "
        if isinstance(module, nn.Conv2d):
            return f"Its first layer, {name!r}, takes images of {module.in_channels} channels. "
    return ""


class Reached(Exception):
    """Ends a forward pass once all that is wanted of it is known."""


@contextmanager
def read_sites(
    model: nn.Module,
    sites: Sequence[Site],
    on_reading: OnReading,
    mask: Tensor | None = None,
) -> Iterator[None]:
    """Call back with every site's reading whenever the model runs within the block.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of Site
    on_reading : callable (site, reading, gather)
        Called from within the forward pass, before a later layer can change a tensor in
        place. ``gather(rows, places)`` gives pre-neuron embeddings, see `Site.gather`.
    mask : Tensor of bool, shape (B, positions), optional
        Positions that count, for a single run of the model; all by default.
    """
    reader = _Reader(on_reading, mask)
    with ExitStack() as hooks:
        for site in sites:
            hidden = site.hidden
            for handle in reader.hooks_at(site) if hidden is None else reader.hooks_between(hidden):
                hooks.callback(handle.remove)
        yield


def by_input(tensor: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Unflatten rows of all positions, as some models lay them out, by input.

    Parameters
    ----------
    tensor : Tensor
    shape : (int, int), optional
        Numbers of inputs and positions of the batch, if known.
    """
    if shape is None or tensor.ndim != 2 or len(tensor) != shape[0] * shape[1]:
        return tensor
    return tensor.view(*shape, -1) if shape[1] > 1 else tensor


@contextmanager
def stopping_after(sites: Sequence[Site]) -> Iterator[None]:
    """End the block, and the forward pass in it, once each site has run.

    What the model does after the last of them would take time for nothing. It suits sites that run
    once, as proved ones do. Enter it after `read_sites`, whose hooks then come first.
    """
    pending = {site.name for site in sites}

    def has_run(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            pending.discard(name)
            if not pending:
                raise Reached

        return hook

    with ExitStack() as hooks, suppress(Reached):
        for site in sites:
            last = site.output_module if site.hidden is None else site.hidden.last_module
            handle = last.register_forward_hook(in_this_thread(has_run(site.name)))
            hooks.callback(handle.remove)
        yield


class _Reader:
    """Makes the hooks that read sites."""

    def __init__(self, on_reading: OnReading, mask: Tensor | None) -> None:
        self._on_reading = on_reading
        self._shape = None if mask is None else mask.shape
        # If every position counts, there is nothing to leave out.
        self._mask = None if mask is None or bool(mask.all()) else PositionMask(mask)

    def _batched(self, tensor: Tensor) -> Tensor:
        return by_input(tensor, self._shape)

    def hooks_at(self, site: Site) -> list[Any]:
        """Hooks at a layer whose activations are computed from its output."""

        def read(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            inputs = self._batched(_first(args, kwargs))
            activations = self._batched(site.activation(output))
            reading = strongest(site.flatten(activations), self._mask)
            self._on_reading(site, reading, lambda r, p: site.gather(inputs, r, p))

        return [site.output_module.register_forward_hook(in_this_thread(read), with_kwargs=True)]

    def hooks_between(self, site: HiddenSite) -> list[Any]:
        """Hooks around a hidden layer: at its input, at its decoder's input, and at its end."""
        entered: list[Tensor] = []
        reached: list[Tensor] = []

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            entered[:] = [_first(args, kwargs)]
            reached.clear()

        def decoding(_: nn.Module, args: Any, kwargs: Any) -> None:
            reached[:] = [_first(args, kwargs)]

        def leaving(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entry = entered.pop()
            inputs = self._batched(first_tensor(output) if site.reads_output else entry)
            with torch.no_grad():
                activations = reached.pop() if reached else site.encode(inputs)
            reading = site.read_activations(self._batched(activations), self._mask)
            self._on_reading(site, reading, lambda r, p: site.gather(inputs, r, p))

        before = [(site.input_module, entering)]
        if site.decoder is not None:
            before.append((site.decoder, decoding))
        return [
            *(
                module.register_forward_pre_hook(in_this_thread(hook), with_kwargs=True)
                for module, hook in before
            ),
            site.last_module.register_forward_hook(in_this_thread(leaving), with_kwargs=True),
        ]


def first_tensor(values: Any) -> Tensor:
    """The tensor that a module returned, or the first of several."""
    parts = values.values() if isinstance(values, Mapping) else values
    tensor = values if torch.is_tensor(values) else next(v for v in parts if torch.is_tensor(v))
    assert isinstance(tensor, Tensor)
    return tensor


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
    return values[0]


@contextmanager
def edit_site(site: Site, edit: Edit) -> Iterator[None]:
    """Replace a site's activations while the model runs.

    Parameters
    ----------
    site : Site
        With a known activation, see `prove_sites`.
    edit : callable (activations) -> Tensor or None
        Called with the model's activations: (B, ..., n_neurons), or for a convolution (B, channels,
        height, width).
    """
    with ExitStack() as stack:
        if (hidden := site.hidden) is not None:
            if hidden.decoder is None:
                raise SiteError(f"The SAE {site.name!r} has no decoder module to edit before.")

            def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
                activations = _first(args, kwargs)
                edited = edit(activations)
                if edited is None:
                    return None
                swap = [edited if value is activations else value for value in args]
                return tuple(swap), {
                    k: edited if v is activations else v for k, v in kwargs.items()
                }

            handle = hidden.decoder.register_forward_pre_hook(
                in_this_thread(before), with_kwargs=True
            )
            stack.callback(handle.remove)
        else:
            watch = Watch({site.name: site.activation}, lambda _, tensor: edit(tensor))

            def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
                return watch.follow(site.name, output)

            handle = site.output_module.register_forward_hook(in_this_thread(hook))
            stack.callback(handle.remove)
            stack.enter_context(watch)
        yield
