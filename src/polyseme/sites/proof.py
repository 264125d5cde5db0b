"""Proof of sites: each is checked against what the model does with a few inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyseme.errors import SiteError
from polyseme.sites.activation import tensors_in, tolerance
from polyseme.sites.encoders import rests_on_own
from polyseme.sites.hooks import Feed, by_input, evaluating, first_tensor, in_this_thread
from polyseme.sites.seen import Seen, difference, percent
from polyseme.sites.site import HiddenSite, Site
from polyseme.sites.watch import Watch, learn

# Inputs of the two runs: of different number, so that no other axis is mistaken for the batch, and
# with one in common, whose results must agree.
_RUNS = (slice(0, 2), slice(1, 4))
_N_INPUTS = 4


@torch.no_grad()
def prove_sites(model: nn.Module, sites: Sequence[Site], feed: Feed, inputs: Any) -> None:
    """Learn what the model does with each site's output, and prove each site.

    The model is run twice, on two and on three inputs. Each site's gathered vectors times its
    weights, plus a constant, must equal the layer's own output, and its activations must be what
    the next operation receives. Sets ``site.activation``; a site that already has one must still
    do the same.

    Parameters
    ----------
    model : torch.nn.Module
    sites : sequence of Site
    feed : Feed
    inputs : array or Tensor, shape (B, ...), or a dict of them
        The first four are used; if there are fewer, shifted copies of them are added.

    Raises
    ------
    SiteError
        The model does not call a site exactly once per batch, the batch is not its first axis, or
        the proof fails.
    """
    few = _at_least(inputs, _N_INPUTS)
    probes = [_rows(few, part) for part in _RUNS]
    watching = [_Run(model, sites, feed, probe) for probe in probes]
    for site in sites:
        runs = [run.seen(site) for run in watching]
        _check_batch(site, *runs)
        site.prove(runs)
        tracks = [run.track for run in runs if run.track is not None]
        if len(tracks) == len(runs) and site.has_chain:
            learned = learn(tracks, site.n_neurons)
            if site.proved and not learned.same(site.activation):
                raise SiteError(
                    f"What the model does with the output of site {site.name!r} changes with the "
                    f"input: {learned.name} after {site.activation.name}. Expected a layer whose "
                    f"output always goes into the same function; name another one."
                )
            site.activation = learned
        site.proved = True


@torch.no_grad()
def sites_that_run(model: nn.Module, sites: Sequence[Site], inputs: Any) -> list[Site]:
    """Drop sites that a glob matched but the model does not run, with a warning.

    Raises
    ------
    SiteError
        If none are left.
    """
    if not any(site.by_glob for site in sites):
        return list(sites)
    run = _Run(model, sites, Feed(model), _rows(_at_least(inputs, 2), slice(0, 2)))
    idle = [s for s in sites if s.by_glob and not any(run.calls[s.name].values())]
    if len(idle) == len(sites):
        raise SiteError(
            f"The model runs none of the named sites ({', '.join(s.name for s in idle)}) on these "
            f"inputs; name layers that it uses."
        )
    if idle:
        warnings.warn(
            f"The model does not run these layers, so they are left out: "
            f"{', '.join(site.name for site in idle)}.",
            stacklevel=4,
        )
    return [site for site in sites if site not in idle]


def _at_least(inputs: Any, n: int) -> Any:
    """A batch of at least n inputs; if there are fewer, copies shifted by a position are added."""
    if isinstance(inputs, Mapping):
        return {name: _at_least(values, n) for name, values in inputs.items()}
    values = inputs if torch.is_tensor(inputs) else torch.as_tensor(np.asarray(inputs))
    parts = [values[:n]]
    while sum(map(len, parts)) < n:
        last = parts[-1]
        parts.append(last.roll(1, dims=-1) if last.ndim > 1 else last)
    return torch.cat(parts)[:n]


def _rows(inputs: Any, part: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {name: values[part] for name, values in inputs.items()}
    return inputs[part]


@dataclass
class _Noted:
    """What the hooks of one run record about a site."""

    args: Any = None
    kwargs: Any = None
    output: Any = None
    whole: Tensor | None = None
    activations: Tensor | None = None
    decoded: int = 0
    taken_off: Tensor | None = None


class _Shifts(TorchFunctionMode):
    """Records results of subtracting one tensor from another."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "sub" in getattr(func, "__name__", ""):
            self.made[id(result)] = (result, tensors_in(args))
        return result


class _Run:
    """One run of the model on a few inputs, and what it shows about each site."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], feed: Feed, inputs: Any) -> None:
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        self._shape = None if ids is None else tuple(ids.shape)
        first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        self._n_inputs = len(first)
        self.calls = {site.name: dict.fromkeys(site.called_once, 0) for site in sites}
        self._noted = {site.name: _Noted() for site in sites}
        self._watch, self._shifts = Watch(), _Shifts()
        self._own_latents: dict[str, bool] = {}
        with ExitStack() as hooks, evaluating(model):
            for site in sites:
                self._hook(site, hooks)
            with self._watch, self._shifts, torch.no_grad():
                feed(inputs)
        hidden = [site.hidden for site in sites]
        tested = [site for site in hidden if site is not None and site.tests_slopes]
        if tested:
            self._look_at_slopes(model, tested, feed, inputs)

    def _hook(self, site: Site, hooks: ExitStack) -> None:
        noted, calls = self._noted[site.name], self.calls[site.name]

        def count(module: nn.Module, *_: Any) -> None:
            calls[module] += 1

        def leaving(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with self._watch.paused():
                noted.args, noted.kwargs = _copied(args), _copied(kwargs)
                noted.output = _copied(output) if site.has_chain else None
                argument = first_tensor((*args, *kwargs.values()))
                noted.taken_off = self._taken_off(site, argument)
            if torch.is_tensor(output) and output.is_floating_point() and site.has_chain:
                self._watch.follow(site.name, output)

        def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
            with self._watch.paused():
                noted.whole = first_tensor((*args, *kwargs.values())).clone()

        def returning(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            with self._watch.paused():
                noted.whole = first_tensor(output).clone()

        def decoding(_: nn.Module, args: Any, kwargs: Any) -> None:
            with self._watch.paused():
                activations = first_tensor((*args, *kwargs.values())).clone()
                # If a decoder is called twice, neither call represents the layer.
                noted.activations = activations if noted.decoded == 0 else None
                noted.decoded += 1

        def add(module: nn.Module, hook: Any, *, before: bool = False) -> None:
            register = module.register_forward_hook
            if before:
                register = module.register_forward_pre_hook  # type: ignore[assignment]
            hooks.callback(register(in_this_thread(hook), with_kwargs=True).remove)

        for module in calls:
            add(module, count)
        add(site.output_module, leaving)
        if (whole := site.whole_module) is not None:
            if site.reads_output:
                add(whole, returning)
            else:
                add(whole, entering, before=True)
            if site.decoder is not None:
                add(site.decoder, decoding, before=True)

    def _taken_off(self, site: Site, argument: Tensor) -> Tensor | None:
        """The SAE's decoder bias, if it was subtracted from the encoder's input."""
        bias = getattr(getattr(site, "decoder", None), "bias", None)
        _, terms = self._shifts.made.get(id(argument), (None, []))
        if not isinstance(bias, Tensor) or len(terms) != 2 or terms[1].shape != bias.shape:
            return None
        return bias.detach() if torch.equal(terms[1], bias) else None

    def _look_at_slopes(
        self, model: nn.Module, sites: Sequence[HiddenSite], feed: Feed, inputs: Any
    ) -> None:
        latents: dict[str, Tensor] = {}
        reached: dict[str, Tensor] = {}
        with ExitStack() as hooks, evaluating(model), torch.enable_grad():
            for site in sites:

                def leaving(_: nn.Module, args: Any, output: Any, name: str = site.name) -> Any:
                    latents[name] = output.detach().requires_grad_()
                    return latents[name].clone()

                def decoding(_: nn.Module, args: Any, name: str = site.name) -> None:
                    reached[name] = first_tensor(args)

                assert site.decoder is not None
                handle = site.output_module.register_forward_hook(in_this_thread(leaving))
                hooks.callback(handle.remove)
                handle = site.decoder.register_forward_pre_hook(in_this_thread(decoding))
                hooks.callback(handle.remove)
            feed(inputs)
        for name, activations in reached.items():
            site_latents = latents.get(name)
            self._own_latents[name] = (
                site_latents is not None
                and site_latents.shape == activations.shape
                and activations.requires_grad
                and rests_on_own(activations, site_latents)
            )

    def seen(self, site: Site) -> Seen:
        """What this run shows about a site; a `SiteError` if that is not enough."""
        noted = self._noted[site.name]
        times = next((n for n in self.calls[site.name].values() if n != 1), 1)
        if times != 1:
            raise SiteError(
                f"The model runs site {site.name!r} {times} times for one input; "
                "expected once: "
                + (
                    "name a layer that the model uses, and make it call the layer itself."
                    if not times
                    else "wrap the model so that one call is one input."
                )
            )
        output = noted.output
        if not torch.is_tensor(output) or not output.is_floating_point():
            if site.hidden is None:
                raise SiteError(
                    f"Site {site.name!r} returns a {type(output).__name__}; expected one "
                    f"floating-point tensor. Name the layer inside it that returns one."
                )
            output = torch.empty(0)
        argument = first_tensor((*noted.args, *noted.kwargs.values()))
        whole = argument if noted.whole is None else noted.whole
        return Seen(
            n_inputs=self._n_inputs,
            inputs=by_input(argument if site.hidden is None else whole, self._shape),
            output=by_input(output, self._shape),
            activations=(
                None if noted.activations is None else by_input(noted.activations, self._shape)
            ),
            track=self._watch.tracks.get(site.name),
            again=lambda inputs: self._again(site, noted, inputs),
            called=noted.whole is not None,
            encoded=by_input(argument, self._shape),
            taken_off=noted.taken_off,
            own_latents=self._own_latents.get(site.name, False),
        )

    def _again(self, site: Site, noted: _Noted, inputs: Tensor) -> Tensor:
        """Output of the layer alone, bypassing all hooks, for other inputs."""
        argument = first_tensor((*noted.args, *noted.kwargs.values()))
        other = inputs.reshape(argument.shape)
        args = [other if value is argument else value for value in noted.args]
        kwargs = {name: other if v is argument else v for name, v in noted.kwargs.items()}
        forward: Any = site.output_module.forward
        with torch.no_grad():
            return by_input(first_tensor(forward(*args, **kwargs)), self._shape)


def _copied(value: Any) -> Any:
    """Copy top-level tensors, as the model may modify them in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        return tuple(v.clone() if isinstance(v, Tensor) else v for v in value)
    if isinstance(value, dict):
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in value.items()}
    return value


def _check_batch(site: Site, first: Seen, second: Seen) -> None:
    """Check that the first axis is the batch, and that an input's rows are its own."""
    tensors = [(first.output, second.output)] if site.hidden is None else []
    tensors += [(first.inputs, second.inputs)]
    if first.activations is not None and second.activations is not None and site.hidden is not None:
        tensors.append((first.activations, second.activations))
    for a, b in tensors:
        sizes = (first.n_inputs, second.n_inputs)
        if (len(a), len(b)) != sizes:
            axes = [n for n in range(min(a.ndim, b.ndim)) if (a.shape[n], b.shape[n]) == sizes]
            remedy = (
                f"its batch is on axis {axes[0]}: give the model batch_first=True, or wrap it so "
                "that its layers are called with (batch, positions, features)."
                if axes
                else "the model splits, joins or selects inputs before it; name a layer that is "
                "called with the whole batch."
            )
            raise SiteError(
                f"Site {site.name!r} returned {len(a)} rows for {sizes[0]} inputs, and {len(b)} "
                f"for {sizes[1]}; the first axis must be the batch: {remedy}"
            )
        if a.shape[1:] != b.shape[1:]:
            raise SiteError(
                f"Site {site.name!r} has shape {tuple(a.shape)} for {sizes[0]} inputs, and "
                f"{tuple(b.shape)} for {sizes[1]}; only the first axis may grow with the batch."
            )
        far = difference(a[1:2], b[0:1])
        if not far <= min(0.2, 30 * tolerance(a)):
            raise SiteError(
                f"Site {site.name!r} gives different values for one input in batches of {sizes[0]} "
                f"and {sizes[1]} (off by {percent(far)}), so its rows cannot be assigned to "
                f"inputs; expected a model that treats each input independently."
            )
