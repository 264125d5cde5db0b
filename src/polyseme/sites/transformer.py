"""MLP neurons of transformers' language models: found by structure, proved by behaviour."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.errors import SiteError
from polyseme.sites.hooks import edit_site, evaluating
from polyseme.sites.layers import is_linear, linear_weight
from polyseme.sites.mlp import MLPSite
from polyseme.sites.trial import TURNED, Traced, come_in_order, run_on_tokens

Function = Callable[[Tensor], Tensor]

# Attributes where transformers modules keep their nonlinearity, and keys where configurations name
# it. What it computes decides which one it is, if any.
_ATTRIBUTES = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "activation", "gelu_impl")
_SETTINGS = ("hidden_act", "hidden_activation", "activation_function", "activation")

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_transformer(model: nn.Module) -> bool:
    """Whether a module is a transformers model, by its configuration."""
    return hasattr(getattr(model, "config", None), "model_type")


def find_mlp_sites(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    fold_layer_norm: bool = False,
) -> list[MLPSite]:
    """Find the MLPs of a transformers language model, in the order of its modules.

    Layers with matching widths are candidates. A candidate is accepted as an MLP only if it proves
    to be one on a few random tokens: its activations follow from its input and its weights; the
    model's own nonlinearity maps its linear layers' outputs, large or small, to its activations;
    input and activations are in order of positions; and changing these activations changes the
    model's output.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, with or without its head. It is run four times on 15 tokens.
    names : str or list of str, optional
        Names of MLPs, or globs over them, such as ``"model.layers.*.mlp"``; all by default. An MLP
        without a module of its own has the name of its first linear layer.
    fold_layer_norm : bool
        Read the output of the layer norm before the MLP without its gain and bias, which are folded
        into the weights instead; see `MLPSite`. The model is not modified.

    Raises
    ------
    SiteError
        If the model is not a language model with one stack, is quantised, has adapters in its MLPs,
        or has no recognisable MLP or none of that name; with ``fold_layer_norm``, if an MLP does
        not read the output of a layer norm.
    """
    _refuse(model)
    seen = Traced.watch(model)
    search = _Search(model, seen)
    sites = _changing_the_output(model, search.sites())
    why = f"{search.nearest}{unread(model)}"
    if not sites:
        raise SiteError(
            f"No MLP was recognised in this {type(model).__name__}; expected a linear layer, or a "
            "gate and an up projection, then the model's nonlinearity (an attribute such as "
            f"act_fn, or config.hidden_act), then a linear layer.{why} Make a site by hand, "
            "MLPSite(name, reads=[first linear layers], decoder=second linear layer, "
            "act=nonlinearity), or give the name of a linear layer (--sites; polyseme sites lists "
            "them)."
        )
    order = {id(module): number for number, module in enumerate(model.modules())}
    sites.sort(key=lambda site: order[id(site.module)])
    chosen = sites if names is None else _named(sites, names, why)
    return [_folded(site, seen) for site in chosen] if fold_layer_norm else chosen


def _named(sites: list[MLPSite], names: str | Iterable[str], why: str) -> list[MLPSite]:
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if not any(fnmatch.fnmatchcase(site.name, name) for site in sites):
            shown = ", ".join(site.name for site in sites[:4])
            suffix = f", … ({len(sites)} in all)" if len(sites) > 4 else ""
            raise SiteError(f"No MLP matches {name!r}. The model's MLPs are: {shown}{suffix}.{why}")
    return [site for site in sites if any(fnmatch.fnmatchcase(site.name, n) for n in wanted)]


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    if not is_transformer(model):
        raise SiteError(
            f"The model is a {kind}, not a transformers model, so polyseme does not look for MLPs; "
            f"give the names of linear layers."
        )
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SiteError(
            f"{kind} is an encoder-decoder, whose decoder needs its own text; expected a model "
            f"with one stack. Give its encoder, model.get_encoder()."
        )
    refuse_quantised(model)
    check_whole(model, "texts")
    for name, module in model.named_modules():
        # An adapter next to a nonlinearity is in an MLP, whose weights it changes.
        inside = [child for child in module.children() if _is_adapter(child)]
        if inside and any(callable(getattr(module, attribute, None)) for attribute in _ATTRIBUTES):
            raise SiteError(
                f"The layers of {name!r} have adapters ({type(inside[0]).__name__}), so what its "
                "neurons read is spread over several weights; merge them first: model = "
                "model.merge_and_unload()."
            )


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def offloaded(module: nn.Module) -> str:
    """Which weights are not in memory, as a sentence for messages; "" if all are."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            return (
                f" The weights of {name!r} are not in memory: load the model without offloading, "
                "onto devices that hold all of it."
            )
    return ""


def unread(model: nn.Module) -> str:
    """Parts of a model that are not read as MLPs, in sentences for messages; "" if none."""
    modules = dict(model.named_modules())
    message = offloaded(model)
    if adapters := [name for name, module in modules.items() if _is_adapter(module)]:
        message += (
            f" It has adapters, such as {adapters[0]!r}; merge them first: "
            "model = model.merge_and_unload()."
        )
    experts = {
        name: n
        for name, module in modules.items()
        if "expert" in name.rpartition(".")[2] and (n := _n_experts(module)) > 1
    }
    if experts:
        shown = ", ".join(f"{name} ({n})" for name, n in [*experts.items()][:3])
        suffix = f", … ({len(experts)} in all)" if len(experts) > 3 else ""
        message += (
            f" Its experts are not read: {shown}{suffix}. An expert gets only the tokens that a "
            f"router picks for it, so its rows are not the positions of a text."
        )
    return message


def _n_experts(module: nn.Module) -> int:
    """Number of experts in a module that holds nothing else; 0 if none."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    # As one tensor for all experts.
    stacked = [
        tensor
        for part in (module, *module.children())
        for tensor in part.parameters(recurse=False)
        if tensor.ndim == 3
    ]
    return len(stacked[0]) if stacked else 0


def check_whole(model: nn.Module, kind: str) -> None:
    """Refuse a model of several parts that does not run on the data alone, naming its parts.

    Parameters
    ----------
    model : torch.nn.Module
    kind : {"images", "texts"}
    """
    if not is_transformer(model):
        return
    base: nn.Module = getattr(model, "base_model", model)
    config: Any = model.config
    parts = {
        name: type(part).__name__
        for name, part in model.named_modules()
        # A model of another type, directly in the model or in its base.
        if part in {*model.children(), *base.children()} - {base}
        and is_transformer(part)
        and getattr(part.config, "model_type", None) != config.model_type
    }
    if len(parts) < 2:
        return
    if kind == "texts":
        try:
            run_on_tokens(model)
            return
        except SiteError:
            pass
    elif next(iter(inspect.signature(model.forward).parameters)) == "pixel_values":
        return
    shown = " or ".join(f"model.{name} ({type_name})" for name, type_name in parts.items())
    raise SiteError(
        f"{type(model).__name__} does not run on {kind} alone: it is made of several models; "
        f"analyse one of them, {shown}."
    )


def refuse_quantised(model: nn.Module) -> None:
    """Raise a `SiteError` if the weights of a linear layer are not floating-point."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "Linear" in type(module).__name__ and torch.is_tensor(weight):
            if weight.dtype not in _FLOATS:
                raise SiteError(
                    f"The weights of layer {name!r} are quantised ({weight.dtype}), so neurons "
                    "have no weight vectors to read; load the model in float32, float16 or "
                    "bfloat16."
                )
        elif hasattr(module, "qweight"):
            raise SiteError(
                f"The weights of layer {name!r} are quantised ({type(module).__name__}), so "
                "neurons have no weight vectors to read; load the model in float32, float16 or "
                "bfloat16."
            )


class _Search:
    """The search for a model's MLPs: candidates by structure, then proof."""

    def __init__(self, model: nn.Module, seen: Traced) -> None:
        self._model, self._seen = model, seen
        self._turned = Traced.watch(model, TURNED)
        self._driven = Traced.watch(model, driven={m for m in seen.calls if is_linear(m)})
        #: The nearest candidate that is not an MLP, as a sentence for messages; "" if none.
        self.nearest = ""
        self._least = float("inf")

    def sites(self) -> list[MLPSite]:
        candidates = list(self._candidates())
        readers: dict[tuple[nn.Module, ...], list[MLPSite]] = {}
        for site in candidates:
            readers.setdefault(site.reads, []).append(site)
        for same in readers.values():
            if len(same) > 1:
                names = {module: name for name, module in self._model.named_modules()}
                into = " and ".join(repr(names[site.decoder]) for site in same)
                self.nearest = (
                    f" The activations of {same[0].name!r} go into {into}, so what its neurons "
                    f"write is spread over several weights."
                )
        return [same[0] for same in readers.values() if len(same) == 1]

    def _candidates(self) -> Iterator[MLPSite]:
        modules = dict(self._model.named_modules())
        names = {module: name for name, module in modules.items()}
        seen, driven = self._seen.calls, self._driven.calls
        for decoder in seen:
            if not is_linear(decoder) or decoder not in driven:
                continue
            reached = driven[decoder].inputs
            best: tuple[float, MLPSite] | None = None
            for scope in _scopes(modules, names[decoder]):
                layers = [m for m in scope.modules() if is_linear(m) and m in seen and m in driven]
                for reads in _reads(layers, decoder, self._seen):
                    put_out = [driven[m].output for m in reads]
                    for act in _nonlinearities(self._model, modules, names, scope, reads):
                        try:
                            site = _make(names, scope, reads, decoder, act)
                        except SiteError as refusal:
                            if _holds_only(scope, reads, decoder):
                                self.nearest, self._least = f" {refusal}", 0.0
                            continue
                        with torch.no_grad():
                            error = _difference(site.of_outputs(put_out), reached)
                        self._note(site, error, reached)
                        # Several nonlinearities may be close: the closest is the model's.
                        if error <= _same(reached) and (not best or error < best[0]):
                            best = (error, site)
                if best:
                    if self._proves(best[1]):
                        yield best[1]
                    else:
                        self._least = 0.0
                        self.nearest = (
                            f" {best[1].name!r} comes close, but not all of its layers output "
                            f"their weights times their input, in order of contexts and tokens."
                        )
                    break

    def _note(self, site: MLPSite, error: float, reached: Tensor) -> None:
        """Record a near miss, unless it is similar to an MLP only in its widths."""
        likely = site.module not in site.reads or error < 1
        if likely and _same(reached) < error < self._least:
            self._least = error
            far = f"up to {error:.1%}" if error < 1 else "more than their size"
            self.nearest = (
                f" The closest is {site.name!r} with {site.activation.name}, but its decoder's "
                f"input differs from the resulting activations by {far}."
            )

    def _proves(self, site: MLPSite) -> bool:
        """Whether the weights reproduce the layers' outputs, at each position of each input."""
        h, a = self._seen.calls[site.reads[0]].inputs, self._seen.calls[site.decoder].inputs
        with torch.no_grad():
            encoded = site.encode(h)
        scale = a.abs().max()
        if not bool((encoded - a).abs().max() <= _tolerance(a) * scale) or not bool(scale > 0):
            return False
        ends = ((site.reads[0], h), (site.decoder, a))
        return all(
            layer in self._turned.calls and come_in_order(rows, self._turned.calls[layer].inputs)
            for layer, rows in ends
        ) and all(multiplies_by_its_weight(layer) for layer in site.layers)


def multiplies_by_its_weight(layer: nn.Module) -> bool:
    """Whether a linear layer computes ``W x + b`` with its own weight and bias for any x."""
    weight = linear_weight(layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((4, weight.shape[1]), generator=generator).to(weight)
    # So that products of large weights stay finite.
    x = x / weight.abs().max().clamp(min=1)
    bias: Any = getattr(layer, "bias", None)
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight, bias)
        difference = (layer(x) - expected).abs().max()
        return bool(difference <= _tolerance(x) * expected.abs().max())


def _scopes(modules: dict[str, nn.Module], name: str) -> Iterator[nn.Module]:
    """Modules around a layer, from the innermost out to the block, an item of a list of blocks."""
    while name:
        above = name.rpartition(".")[0]
        if isinstance(modules[above], nn.ModuleList):
            return
        yield modules[above]
        name = above


def _reads(layers: list[nn.Module], decoder: nn.Module, seen: Traced) -> Iterator[list[nn.Module]]:
    """First layers whose widths match a decoder: one, one with two halves, or a pair."""
    width = seen.calls[decoder].inputs.shape[1]
    before = [m for m in layers if seen.calls[m].number < seen.calls[decoder].number]
    widths = {m: seen.calls[m].output.shape[1] for m in before}
    yield from ([m] for m in before if widths[m] in (width, 2 * width))
    for gate, up in permutations([m for m in before if widths[m] == width], 2):
        if torch.equal(seen.calls[gate].inputs, seen.calls[up].inputs):
            yield [gate, up]


def _nonlinearities(
    model: nn.Module,
    modules: dict[str, nn.Module],
    names: dict[nn.Module, str],
    scope: nn.Module,
    reads: list[nn.Module],
) -> Iterator[Function]:
    for holder in (modules[names[reads[0]].rpartition(".")[0]], scope):
        for attribute in _ATTRIBUTES:
            if callable(act := getattr(holder, attribute, None)):
                yield act
    config: Any = model.config
    for setting in _SETTINGS:
        if isinstance(name := getattr(config, setting, None), str):
            from transformers.activations import ACT2FN

            if name in ACT2FN:
                yield ACT2FN[name]


def _make(
    names: dict[nn.Module, str],
    scope: nn.Module,
    reads: list[nn.Module],
    decoder: nn.Module,
    act: Function,
) -> MLPSite:
    # A module with exactly these linear layers is the MLP; otherwise it is a block.
    module = scope if _holds_only(scope, reads, decoder) and names[scope] else reads[0]
    return MLPSite(names[module], reads, decoder, act, module=module)


def _holds_only(scope: nn.Module, reads: list[nn.Module], decoder: nn.Module) -> bool:
    return {module for module in scope.modules() if is_linear(module)} == {*reads, decoder}


def _tolerance(values: Tensor) -> float:
    """Largest rounding error of sums, relative to the largest."""
    return 1e-3 if values.dtype in (torch.float32, torch.float64) else 3e-2


def _same(values: Tensor) -> float:
    """Largest relative rounding error of elementwise results."""
    return 1e-5 if values.dtype in (torch.float32, torch.float64) else 3e-2


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Largest difference between two tensors, relative to each number, or to a floor."""
    scale = float(expected.abs().max())
    if actual.shape != expected.shape or not scale > 0:
        return float("inf")
    differences = (actual - expected).abs() / (expected.abs() + 1e-2 * scale)
    error = float(differences.max())
    return error if error == error else float("inf")


def _changing_the_output(model: nn.Module, sites: Sequence[MLPSite]) -> list[MLPSite]:
    """Keep the sites whose activations, edited as by `edit_site`, affect the output.

    All are checked in one run: each is shifted by its own variable, equal to 0, and the output's
    gradient in that variable shows whether a shift would have an effect.
    """
    moved: dict[str, Tensor] = {}

    def moving(site: MLPSite) -> Callable[[Tensor], Tensor]:
        def edit(activations: Tensor) -> Tensor:
            moved[site.name] = torch.zeros_like(activations).requires_grad_()
            return activations + moved[site.name]

        return edit

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(edit_site(site, moving(site)))
        stack.enter_context(evaluating(model))
        with torch.enable_grad():
            output = run_on_tokens(model)
    hidden: Tensor = output if torch.is_tensor(output) else output[0]
    if not moved or not hidden.requires_grad:
        return []
    # Random weights, as the plain sum of a layer norm's output never changes.
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    slopes = torch.autograd.grad((hidden * weights).sum(), [*moved.values()], allow_unused=True)
    reaching = {
        name for name, slope in zip(moved, slopes, strict=True) if slope is not None and slope.any()
    }
    return [site for site in sites if site.name in reaching]


def _folded(site: MLPSite, seen: Traced) -> MLPSite:
    """The site with the gain and bias of the norm before it folded into its weights."""
    h = seen.calls[site.reads[0]].inputs
    for module, call in seen.calls.items():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not torch.is_tensor(weight) or weight.shape != (site.d_in,):
            continue
        if call.output.shape != h.shape or not torch.equal(call.output, h):
            continue
        for gain in (weight.detach(), 1 + weight.detach()):
            shift = bias.detach() if torch.is_tensor(bias) else torch.zeros_like(gain)
            if _is_norm(call.inputs, (h - shift), gain):
                return site.fold(gain, shift)
    raise SiteError(
        f"MLP {site.name!r} does not read the output of a layer norm with its own gain, so there "
        f"is nothing to fold; leave fold_layer_norm out."
    )


def _is_norm(inputs: Tensor, scaled: Tensor, gain: Tensor) -> bool:
    """Whether ``scaled`` is the gain times the inputs, centred or not, normalised to length √d."""
    x, tolerance = inputs.float(), _tolerance(inputs)
    for centred in (x, x - x.mean(dim=-1, keepdim=True)):
        wanted = centred * gain.float()
        # One factor per row, whatever was added to the variance.
        factor = (wanted * scaled.float()).sum(-1, keepdim=True) / wanted.square().sum(
            -1, keepdim=True
        )
        difference = float((wanted * factor - scaled.float()).abs().max())
        length = float((centred * factor).square().mean())
        if difference <= tolerance * float(scaled.abs().max()) and 0.5 < length < 1.1:
            return True
    return False
