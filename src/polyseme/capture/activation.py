"""The nonlinearity behind a layer, found by watching what the model does with its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that act on each neuron by itself, by the name that torch gives them. The first
# group is affine for a fixed neuron, so it changes neither the shape of a nonlinearity nor the
# direction of an embedding.
_AFFINE = frozenset(
    {
        *("batch_norm", "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d"),
        *("alpha_dropout", "feature_alpha_dropout"),
    }
)
_NONLINEAR = frozenset(
    {
        *("relu", "relu_", "relu6", "gelu", "silu", "silu_", "leaky_relu", "leaky_relu_"),
        *("elu", "elu_", "selu", "selu_", "celu", "celu_", "softplus", "mish", "mish_"),
        *("sigmoid", "sigmoid_", "tanh", "tanh_", "hardtanh", "hardtanh_", "softsign"),
        *("hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "prelu", "log_sigmoid"),
        *("rrelu", "rrelu_", "softshrink", "hardshrink", "tanhshrink", "_threshold"),
        *("clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_", "threshold"),
    }
)


# Functions that look at a tensor without making anything of it.
_LOOKS = frozenset({"__get__", "detach", "size", "requires_grad_"})


@dataclass(frozen=True)
class _Step:
    function: Callable[..., Tensor]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Activation:
    """What turns a layer's output into its neurons' activations: ``a = f(output)``.

    Attributes
    ----------
    steps : tuple
        Functions in the order in which the model applies them; none where it does something
        else with the output, such as a nonlinearity spelled out in several operations, so that
        the activation is the output itself.
    """

    steps: tuple[_Step, ...] = ()

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor]) -> Activation:
        """A single nonlinearity, a function or a module, that is known beforehand."""
        name = getattr(function, "__name__", type(function).__name__)
        return cls((_Step(function, name, (), {}),))

    @property
    def name(self) -> str:
        """The functions' names, such as "batch_norm, relu"; "identity" without any."""
        return ", ".join(step.name for step in self.steps) or "identity"

    def __call__(self, output: Tensor) -> Tensor:
        """Activations, shape of ``output``, which is left as it is."""
        return _apply(self.steps, output)

    def drive(self, output: Tensor) -> Tensor:
        """What enters the nonlinearity: the output after affine steps alone."""
        for number, step in enumerate(self.steps):
            if step.name not in _AFFINE:
                return _apply(self.steps[:number], output)
        return _apply(self.steps, output)


def _apply(steps: tuple[_Step, ...], output: Tensor) -> Tensor:
    for step in steps:
        # Some steps work in place, on what they are handed.
        output = step.function(output.clone(), *step.args, **step.kwargs)
    return output


def _same_function(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # nn.ReLU(inplace=True) and its like: replayed out of place, where there is such a form.
    return getattr(torch, name.rstrip("_"), function) if name.endswith("_") else function


class Watch(TorchFunctionMode):
    """Follows tensors through the element-wise functions that a model applies to them.

    Call `follow` from a forward hook with a layer's output; then `chains` tells which functions
    were applied to it, and ``edit`` may replace the activations on their way through the model.

    Parameters
    ----------
    ends : mapping of name to Activation, optional
        Where each site's chain ends, as an earlier watch found out. Needed for ``edit``.
    edit : callable (name, activations) -> Tensor or None, optional
        Called with the activations of a site; what it returns goes on through the model.
    """

    def __init__(
        self,
        ends: Mapping[str, Activation] | None = None,
        edit: Callable[[str, Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self._ends = ends or {}
        self._edit = edit
        self._followed: dict[int, tuple[str, Tensor]] = {}
        # Tensors that a step has read: site, tensor, number of steps before that one.
        self._read: dict[int, tuple[str, Tensor, int]] = {}
        self._steps: dict[str, list[_Step]] = {}

    def follow(self, name: str, output: Tensor) -> Tensor | None:
        """Begin to follow a layer's output; returns its replacement, if it is edited at once."""
        self._steps[name] = []
        end = self._ends.get(name)
        if self._edit is not None and end is not None and not end.steps:
            return self._edit(name, output)
        self._followed[id(output)] = (name, output)
        return None

    @property
    def chains(self) -> dict[str, Activation]:
        """What was found: the activation of each site."""
        return {name: Activation(tuple(steps)) for name, steps in self._steps.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if self._edit is None and isinstance(result, Tensor) and name not in _LOOKS:
            self._forget_what_is_read_again((*args, *kwargs.values()))
        known = self._followed.get(id(args[0])) if args else None
        if known is None or name not in _AFFINE | _NONLINEAR or not isinstance(result, Tensor):
            return result
        site, before = known
        steps = self._steps[site]
        del self._followed[id(before)]
        if result is not before:
            self._read[id(before)] = (site, before, len(steps))
        steps.append(_Step(_same_function(name, func), name.strip("_"), args[1:], kwargs))
        end = self._ends.get(site)
        if self._edit is not None and end is not None and len(steps) == len(end.steps):
            edited = self._edit(site, result)
            if edited is None:
                return result
            if result is before:
                # The model may go on with the tensor that it handed in.
                return before.copy_(edited)
            return edited
        self._followed[id(result)] = (site, result)
        return result

    def _forget_what_is_read_again(self, arguments: tuple[Any, ...]) -> None:
        """End a site's chain before a tensor that two functions read.

        ``x * sigmoid(x)`` is neither of its parts: what the model does with x is not the chain
        of functions that was seen.
        """
        for argument in arguments:
            known = self._read.get(id(argument))
            if known is None:
                continue
            site, _, n_steps = known
            del self._steps[site][n_steps:]
            for table in (self._followed, self._read):
                for key in [key for key, entry in table.items() if entry[0] == site]:
                    del table[key]
