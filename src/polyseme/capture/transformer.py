"""MLP neurons of transformers' language models: found by structure, proved by behaviour."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, permutations
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from polyseme.capture.hooks import Feed, edit_site, evaluating, in_this_thread
from polyseme.capture.layers import is_linear
from polyseme.capture.mlp import MLPSite
from polyseme.errors import InputError, SiteError

Function = Callable[[Tensor], Tensor]

# Where transformers' modules keep their nonlinearity, and where their configurations name it.
# Which one it is, if any, is decided by what it computes.
_ATTRIBUTES = ("act", "act_fn", "activation_fn", "intermediate_act_fn", "activation", "gelu_impl")
_SETTINGS = ("hidden_act", "hidden_activation", "activation_function", "activation")

_INPUTS, _POSITIONS = 3, 5
#: Tokens that a model is run on to see how it is made.
N_TOKENS = _INPUTS * _POSITIONS
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_transformer(model: nn.Module) -> bool:
    """Whether a module is a model of transformers, told by its configuration."""
    return hasattr(getattr(model, "config", None), "model_type")


def find_mlp_sites(
    model: nn.Module,
    names: str | Iterable[str] | None = None,
    *,
    fold_layer_norm: bool = False,
) -> list[MLPSite]:
    """The MLPs of a transformers language model, in the order of its modules.

    Layers whose widths fit are candidates. One is taken for an MLP only if, on a few random
    tokens, its activations follow from its input, its weights and the model's own nonlinearity,
    and a change of these activations changes what the model puts out.

    Parameters
    ----------
    model : torch.nn.Module
        A model of transformers, with or without its head. It is run twice on 15 tokens.
    names : str or list of str, optional
        Names of MLPs, or globs over them, such as ``"model.layers.*.mlp"``; all by default. An
        MLP that has no module of its own goes by the name of its first linear layer.
    fold_layer_norm : bool
        Read the vector that the layer norm before the MLP makes before its gain and bias, which
        go into the weights instead; see `MLPSite`. The model is left as it is.

    Raises
    ------
    SiteError
        If the model is no language model of one stack, is quantised, has no MLP that can be
        recognised, or none of that name; with ``fold_layer_norm``, if an MLP does not read the
        output of a layer norm.
    """
    _refuse(model)
    seen = _Seen.watch(model)
    found = _changing_the_output(model, list(_candidates(model, seen)))
    if not found:
        raise SiteError(
            f"No MLP was recognised in this {type(model).__name__}: a linear layer, or a gate "
            "and an up projection, then the model's nonlinearity (an attribute such as act_fn, "
            "or config.hidden_act), then a linear layer was looked for. Make a site by hand, "
            "MLPSite(name, reads=[first linear layers], decoder=second linear layer, "
            "act=nonlinearity), or give the name of a linear layer (--sites; polyseme sites lists "
            "them)."
        )
    order = {id(module): number for number, module in enumerate(model.modules())}
    found.sort(key=lambda site: order[id(site.module)])
    chosen = found if names is None else _named(found, names)
    return [_folded(site, seen) for site in chosen] if fold_layer_norm else chosen


def _named(found: list[MLPSite], names: str | Iterable[str]) -> list[MLPSite]:
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if not any(fnmatch.fnmatchcase(site.name, name) for site in found):
            shown = ", ".join(site.name for site in found[:4])
            more = f", … ({len(found)} in all)" if len(found) > 4 else ""
            raise SiteError(f"No MLP matches {name!r}. The model's MLPs are: {shown}{more}.")
    return [site for site in found if any(fnmatch.fnmatchcase(site.name, n) for n in wanted)]


def _refuse(model: nn.Module) -> None:
    kind = type(model).__name__
    if not is_transformer(model):
        raise SiteError(
            f"The model is a {kind}, not a model of transformers, so its MLPs are not looked "
            "for; give the names of linear layers."
        )
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise SiteError(
            f"{kind} is an encoder-decoder, whose decoder wants a text of its own; a model of one "
            "stack is expected: give its encoder, model.get_encoder()."
        )
    refuse_quantised(model)


def refuse_quantised(model: nn.Module) -> None:
    """Raise a `SiteError` if the weights of a linear layer are no floating-point numbers."""
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


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    look: Any = getattr(model, "get_input_embeddings", None)
    try:
        embedding = look() if look is not None else None
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Embedding):
        raise SiteError(
            f"{type(model).__name__} has no embedding of tokens; a language model is expected."
        )
    shape = (_INPUTS, _POSITIONS)
    # A generator of its own: the caller's random numbers stay as they are.
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.num_embeddings, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def run_on_tokens(model: nn.Module) -> Any:
    """What a language model without its head makes of a few random tokens, always the same."""
    tokens = _tokens(model)
    try:
        return Feed(model, head=False)(tokens)
    except (InputError, AttributeError, KeyError, AssertionError) as error:
        # The latter three as models put it that miss an image, say.
        raise SiteError(
            f"{type(model).__name__} does not run on {_POSITIONS} tokens alone, which is how its "
            f"MLPs would be found: {error}"
        ) from error


@dataclass
class _Call:
    """One call of a module; tensors as rows of one position each."""

    inputs: Tensor
    output: Tensor
    number: int


def _is_hidden(value: Any) -> TypeGuard[Tensor]:
    return torch.is_tensor(value) and value.is_floating_point() and value.ndim > 1


@dataclass
class _Seen:
    """What went in and out of the modules that the model called once, position by position."""

    calls: dict[nn.Module, _Call]

    @classmethod
    def watch(cls, model: nn.Module) -> _Seen:
        seen: dict[nn.Module, list[_Call]] = {}
        numbers = count()

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = next((v for v in (*args, *kwargs.values()) if torch.is_tensor(v)), None)
            if not (_is_hidden(given) and _is_hidden(output)):
                return
            # Copies: what follows may work in place.
            rows = [t.reshape(-1, t.shape[-1]).clone() for t in (given, output)]
            if [len(t) for t in rows] == [N_TOKENS] * 2:
                seen.setdefault(module, []).append(_Call(rows[0], rows[1], next(numbers)))

        with ExitStack() as hooks:
            for module in model.modules():
                # Linear layers, and the norms that may stand before them.
                if isinstance(getattr(module, "weight", None), Tensor):
                    handle = module.register_forward_hook(in_this_thread(note), with_kwargs=True)
                    hooks.callback(handle.remove)
            with evaluating(model), torch.no_grad():
                run_on_tokens(model)
        return cls({module: calls[0] for module, calls in seen.items() if len(calls) == 1})


def _candidates(model: nn.Module, seen: _Seen) -> Iterator[MLPSite]:
    """MLPs by structure whose activations are what reaches their decoder."""
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    for decoder, reached in seen.calls.items():
        if not is_linear(decoder):
            continue
        best: tuple[float, MLPSite] | None = None
        for scope in _scopes(modules, names[decoder]):
            layers = [m for m in scope.modules() if is_linear(m) and m in seen.calls]
            for reads in _reads(layers, decoder, seen):
                for act in _nonlinearities(model, modules, names, scope, reads):
                    site = _make(names, scope, reads, decoder, act)
                    error = _error(site, seen.calls[reads[0]].inputs, reached.inputs)
                    # Several nonlinearities may be near: the nearest is the model's.
                    if error <= _tolerance(reached.inputs) and (not best or error < best[0]):
                        best = (error, site)
            if best:
                yield best[1]
                break


def _scopes(modules: dict[str, nn.Module], name: str) -> Iterator[nn.Module]:
    """Modules around a layer, from the nearest out to the block: an item of a list of blocks."""
    while name:
        above = name.rpartition(".")[0]
        if isinstance(modules[above], nn.ModuleList):
            return
        yield modules[above]
        name = above


def _reads(layers: list[nn.Module], decoder: nn.Module, seen: _Seen) -> Iterator[list[nn.Module]]:
    """First layers that fit a decoder by their widths: one, one of two halves, or a pair."""
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
    # A module that holds these linear layers and no others is the MLP; else it is a block.
    linear = {module for module in scope.modules() if is_linear(module)}
    module = scope if linear == {*reads, decoder} and names[scope] else reads[0]
    return MLPSite(names[module], reads, decoder, act, module=module)


def _tolerance(values: Tensor) -> float:
    return 1e-3 if values.dtype in (torch.float32, torch.float64) else 3e-2


def _error(site: MLPSite, inputs: Tensor, expected: Tensor) -> float:
    """Largest difference between the activations and what reached the decoder, relative."""
    with torch.no_grad():
        found = site.encode(inputs)
    scale = float(expected.abs().max())
    if found.shape != expected.shape or not scale > 0:
        return float("inf")
    error = float((found - expected).abs().max()) / scale
    return error if error == error else float("inf")


def _changing_the_output(model: nn.Module, sites: Sequence[MLPSite]) -> list[MLPSite]:
    """Those sites whose activations, edited as `edit_site` edits them, reach the output.

    All of them in one run: each is moved by an amount of its own, 0 for now, and the output's
    gradient by that amount says whether moving it would show.
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
    # Random weights: the plain sum of what a layer norm puts out never changes.
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    slopes = torch.autograd.grad((hidden * weights).sum(), [*moved.values()], allow_unused=True)
    reaching = {
        name for name, slope in zip(moved, slopes, strict=True) if slope is not None and slope.any()
    }
    return [site for site in sites if site.name in reaching]


def _folded(site: MLPSite, seen: _Seen) -> MLPSite:
    """The site with the gain and the bias of the norm before it in its weights."""
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
        f"MLP {site.name!r} does not read the output of a layer norm with a gain of its own, so "
        "there is nothing to fold; leave fold_layer_norm out."
    )


def _is_norm(inputs: Tensor, scaled: Tensor, gain: Tensor) -> bool:
    """Whether ``scaled`` is the gain times the inputs, centred or not, at a length of √d."""
    x, tolerance = inputs.float(), _tolerance(inputs)
    for centred in (x, x - x.mean(dim=-1, keepdim=True)):
        wanted = centred * gain.float()
        # One factor a row, whatever was added to the variance.
        factor = (wanted * scaled.float()).sum(-1, keepdim=True) / wanted.square().sum(
            -1, keepdim=True
        )
        difference = float((wanted * factor - scaled.float()).abs().max())
        length = float((centred * factor).square().mean())
        if difference <= tolerance * float(scaled.abs().max()) and 0.5 < length < 1.1:
            return True
    return False
