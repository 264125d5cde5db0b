"""Places in a language model, named as in TransformerLens or by module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.errors import SiteError, one_of
from polyseme.sites.hooks import evaluating, first_tensor, in_this_thread
from polyseme.sites.layers import is_linear, linear_weight
from polyseme.sites.mlp import MLPSite
from polyseme.sites.transformer import find_mlp_sites, is_transformer, refuse_quantised
from polyseme.sites.trial import N_TOKENS, TURNED, come_in_order, run_on_tokens

#: Names of TransformerLens hook points in block N, after "blocks.N.".
KINDS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "mlp.hook_post",
    "attn.hook_z",
)
_LENS_NAME = re.compile(r"blocks\.(\d+)\.((?:hook_|attn\.|mlp\.|ln)\w[\w.]*)")


@dataclass(frozen=True, eq=False)
class HookPoint:
    """A place in a model: the input or the output of a module.

    Attributes
    ----------
    name : str
        As requested.
    module : torch.nn.Module
    of_output : bool
        Whether it is the module's output rather than its input.
    width : int
        Length of the vectors.
    in_residual : bool
        Whether vectors here are the residual stream or are added to it.
    writes_by : torch.nn.Module or None
        Otherwise the linear layer through which they are added to it.
    """

    name: str
    module: nn.Module
    of_output: bool
    width: int
    in_residual: bool = False
    writes_by: nn.Module | None = None

    def written(self, directions: Tensor) -> Tensor | None:
        """Map directions at this place to what they write to the residual stream.

        Parameters
        ----------
        directions : Tensor, shape (n, width)

        Returns
        -------
        Tensor of shape (n, d), or None if unknown
        """
        if self.writes_by is None:
            return directions if self.in_residual else None
        weight = linear_weight(self.writes_by)
        return directions.to(weight.device, weight.dtype) @ weight.T


def find_hook_point(model: nn.Module, name: str) -> HookPoint:
    """Find a place in a language model by name.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model. It is run on 15 tokens.
    name : str
        - As in TransformerLens: ``"blocks.5.hook_resid_post"`` and the other `KINDS`. These are
          found by structure and proved by behaviour: the outputs of attention and MLP must add up
          to the change of the residual stream.
        - Name of an MLP, as listed by `list_sites`: the activations of its neurons.
        - Name of any other module: its output.

    Raises
    ------
    SiteError
        There is no such place, or it cannot be identified in this model's blocks.
    """
    if not is_transformer(model):
        raise SiteError(
            f"The model is a {type(model).__name__}, not a transformers model, so it has no named "
            f"hook points; give the name of a site."
        )
    refuse_quantised(model)
    point = _find(model, name)
    first, turned = (_rows_at(model, point, order) for order in (range(len(TURNED)), TURNED))
    if first is None or turned is None or not come_in_order(first, turned):
        raise SiteError(
            f"The vectors at {name!r} are not in order of contexts and tokens, as in a layer that "
            f"gets only some of the tokens, or all contexts position by position; give another "
            f"module."
        )
    return point


def _find(model: nn.Module, name: str) -> HookPoint:
    modules, mlps = dict(model.named_modules()), _mlps(model)
    if lens := _LENS_NAME.fullmatch(name):
        return _of_block(model, modules, mlps, name, int(lens[1]), lens[2])
    if (mlp := {site.name: site for site in mlps}.get(name)) is not None:
        return HookPoint(name, mlp.decoder, False, mlp.n_neurons, writes_by=mlp.decoder)
    if name not in modules or not name:
        lens_names = f"a hook point of TransformerLens (blocks.5.{KINDS[2]})"
        raise SiteError(f"{one_of('hook point', name, modules)} Or give {lens_names}.")
    width = _Widths.watch(model, modules[name]).returned
    if width is None:
        raise SiteError(
            f"{name!r} is a {type(modules[name]).__name__} that does not return one vector per "
            f"token; give a module that does, such as a block or an MLP."
        )
    blocks = [modules[_block_name(site, modules)] for site in _blocks(mlps, modules).values()]
    into_residual = [*(site.decoder for site in mlps), *blocks]
    residual = any(modules[name] is module for module in into_residual)
    return HookPoint(name, modules[name], True, width, in_residual=residual)


def _mlps(model: nn.Module) -> list[MLPSite]:
    try:
        return find_mlp_sites(model)
    except SiteError:
        return []


def _blocks(mlps: list[MLPSite], modules: dict[str, nn.Module]) -> dict[int, MLPSite]:
    """The MLP in each block, by the block's index in the model's list of blocks.

    Empty if blocks are ambiguous: there are several lists, or several MLPs in a block.
    """
    blocks: dict[int, MLPSite] = {}
    lists = set()
    for site in mlps:
        name = _block_name(site, modules)
        above, _, number = name.rpartition(".")
        lists.add(above)
        if not name or len(lists) > 1 or int(number) in blocks:
            return {}
        blocks[int(number)] = site
    return blocks


def _block_name(mlp: MLPSite, modules: dict[str, nn.Module]) -> str:
    """Name of the item of the outermost module list that holds an MLP; "" if there is none."""
    parts = mlp.name.split(".")
    for end in range(1, len(parts)):
        if isinstance(modules[".".join(parts[:end])], nn.ModuleList):
            return ".".join(parts[: end + 1])
    return ""


def _of_block(
    model: nn.Module,
    modules: dict[str, nn.Module],
    mlps: list[MLPSite],
    name: str,
    number: int,
    kind: str,
) -> HookPoint:
    if kind not in KINDS:
        known = one_of("hook", kind, KINDS)
        raise SiteError(f"{name!r} is not supported. {known} Or give the name of a module.")
    blocks = _blocks(mlps, modules)
    if number not in blocks:
        numbers = f" ({', '.join(map(str, sorted(blocks)))})" if blocks else ""
        raise SiteError(
            f"{name!r} is in block {number}, but this {type(model).__name__} has {len(blocks)} "
            f"blocks with a recognised MLP{numbers}; give one of these, or the name of a module."
        )
    mlp = blocks[number]
    block = modules[_block_name(mlp, modules)]
    if kind == "mlp.hook_post":
        return HookPoint(name, mlp.decoder, False, mlp.n_neurons, writes_by=mlp.decoder)
    seen = _TransformerBlock.watch(model, block, mlp)
    point = seen.find(kind)
    if point is None:
        why = (
            "its block has no norm that reads the residual stream right after attention"
            if kind == "hook_resid_mid"
            else "the residual stream after its block is not its input plus the outputs of "
            "attention and MLP"
        )
        raise SiteError(
            f"{name!r} cannot be identified in this {type(model).__name__}: {why}. Give the name "
            f"of the module whose output is meant."
        )
    module, of_output, width = point
    writes_by = module if kind == "attn.hook_z" else None
    return HookPoint(name, module, of_output, width, writes_by is None, writes_by)


@contextmanager
def _noting(
    modules: list[nn.Module], note: Callable[[nn.Module, Any, Any], None]
) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        note(module, *(_tensor_of(values) for values in ((*args, *kwargs.values()), output)))

    with ExitStack() as hooks:
        for module in modules:
            handle = module.register_forward_hook(in_this_thread(hook), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _tensor_of(values: Any) -> Tensor | None:
    try:
        return first_tensor(values)
    except (StopIteration, TypeError, AttributeError):
        return None


def _run(model: nn.Module, order: Sequence[int] = range(len(TURNED))) -> None:
    with evaluating(model), torch.no_grad():
        run_on_tokens(model, order)


def _rows_at(model: nn.Module, point: HookPoint, order: Sequence[int]) -> Tensor | None:
    """Vectors at a hook point for inputs in a given order; None unless reached exactly once."""
    rows: list[Tensor] = []

    def note(_: nn.Module, inputs: Any, output: Any) -> None:
        value = output if point.of_output else inputs
        if value is not None and value.numel() == N_TOKENS * point.width:
            rows.append(value.reshape(N_TOKENS, point.width).float().clone())

    with _noting([point.module], note):
        _run(model, order)
    return rows[0] if len(rows) == 1 else None


@dataclass
class _Widths:
    returned: int | None

    @classmethod
    def watch(cls, model: nn.Module, module: nn.Module) -> _Widths:
        widths: list[int | None] = []

        def note(_: nn.Module, inputs: Any, output: Any) -> None:
            whole = output is not None and output.is_floating_point() and output.ndim > 1
            whole = whole and output.shape[:-1].numel() == N_TOKENS
            widths.append(int(output.shape[-1]) if whole else None)

        with _noting([module], note):
            _run(model)
        return cls(widths[0] if len(widths) == 1 else None)


class _TransformerBlock:
    """Inputs and outputs of the parts of one block, on a few tokens."""

    def __init__(self, block: nn.Module, mlp: MLPSite) -> None:
        self.block, self.mlp = block, mlp
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @classmethod
    def watch(cls, model: nn.Module, block: nn.Module, mlp: MLPSite) -> _TransformerBlock:
        seen = cls(block, mlp)

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            for kept, value in ((seen.inputs, inputs), (seen.outputs, output)):
                if value is not None and value.is_floating_point():
                    # As rows, as some models flatten all positions. Copies, as later code may work
                    # in place.
                    kept[module] = value.reshape(-1, value.shape[-1]).float().clone()

        with _noting(list(block.modules()), note):
            _run(model)
        return seen

    def find(self, kind: str) -> tuple[nn.Module, bool, int] | None:
        """Module, whether its output is meant, and the width; None if it cannot be identified."""
        before, after = self.inputs.get(self.block), self.outputs.get(self.block)
        if before is None or after is None or before.shape != after.shape:
            return None
        parts = self._parts(before, after)
        if parts is None:
            return None
        attention, of_attention, _, of_mlp = parts
        width = before.shape[1]
        if kind == "hook_resid_pre":
            return self.block, False, width
        if kind == "hook_resid_post":
            return self.block, True, width
        if kind == "hook_attn_out":
            return of_attention, True, width
        if kind == "hook_mlp_out":
            return of_mlp, True, width
        if kind == "attn.hook_z":
            return attention, False, linear_weight(attention).shape[1]
        middle = before + self.outputs[of_attention]
        # The norm before the MLP reads it; a block with parallel halves has none.
        for module, inputs in self.inputs.items():
            if module is not self.block and self._is_norm(module) and _same(inputs, middle):
                return module, False, width
        return None

    def _parts(
        self, before: Tensor, after: Tensor
    ) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module] | None:
        """Attention's last layer and where its output is added, and the same for the MLP."""
        mlp_layers = {*self.mlp.layers}
        for decoder, of_mlp in self._ends(self.mlp.decoder):
            added = after - before - self.outputs[of_mlp]
            for layer in self.outputs:
                if layer in mlp_layers or not is_linear(layer):
                    continue
                for attention, of_attention in self._ends(layer):
                    if _same(self.outputs[of_attention], added):
                        return attention, of_attention, decoder, of_mlp
        return None

    def _ends(self, layer: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a layer and the module whose output is added: itself, or a norm after it."""
        if layer not in self.outputs:
            return []
        output = self.outputs[layer]
        after = [
            module
            for module, inputs in self.inputs.items()
            if self._is_norm(module) and torch.equal(inputs, output)
        ]
        return [(layer, end) for end in (layer, *after)]

    def _is_norm(self, module: nn.Module) -> bool:
        return "norm" in type(module).__name__.lower() and module in self.outputs


def _same(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape:
        return False
    scale = float(expected.abs().max())
    return scale > 0 and float((tensor - expected).abs().max()) <= 1e-2 * scale
