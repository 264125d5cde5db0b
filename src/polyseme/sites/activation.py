"""What the model does with a layer's output, as replayable function calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Functions that only move numbers, left out of an activation's name.
PLUMBING = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
        *("to", "float", "double", "half", "bfloat16", "type_as", "detach", "get", "getitem"),
        *("transpose", "permute", "movedim", "view_as", "reshape_as", "expand_as"),
    }
)


# Largest relative difference between two computations of a number that counts as rounding.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE_ON_DEVICES = 1e-2  # Products may be in TF32, which the dtype does not show.


def tolerance(tensor: Tensor) -> float:
    """Largest relative rounding error of numbers in a tensor's dtype, on its device."""
    bound = _TOLERANCE.get(tensor.dtype, _TOLERANCE[torch.float32])
    return bound if tensor.device.type == "cpu" else max(bound, _TOLERANCE_ON_DEVICES)


@dataclass(frozen=True)
class Value:
    """Placeholder for a tensor computed from the layer's output; 0 is the output itself."""

    number: int


@dataclass(frozen=True)
class _Batches:
    """Placeholder for a size that grows with the batch: this many per input."""

    each: int


@dataclass
class Call:
    """A torch function called on something computed from the layer's output.

    Attributes
    ----------
    function : callable
    args, kwargs
        With a `Value` for each tensor computed from the output.
    results : dict of int to int
        Values that it returned, by index among the tensors returned.
    changes : dict of int to int
        Values that it made in place, by the value they replaced.
    """

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: dict[int, int] = field(default_factory=dict)
    changes: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__).strip("_")

    @property
    def uses(self) -> set[int]:
        """Numbers of the values that it was called on."""
        return {leaf.number for leaf in _leaves((self.args, self.kwargs)) if _is_value(leaf)}

    @property
    def makes(self) -> set[int]:
        """Numbers of the values that it made."""
        return {*self.results.values(), *self.changes.values()}

    def run(self, values: dict[int, Tensor], n_inputs: int) -> None:
        """Call the function on these values, and add its results to them."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf.number]
            return leaf.each * n_inputs if isinstance(leaf, _Batches) else leaf

        args, kwargs = mapped(fill, self.args), mapped(fill, self.kwargs)
        returned = tensors_in(self.function(*args, **kwargs))
        for before, after in self.changes.items():
            values[after] = values[before]
        for place, number in self.results.items():
            values[number] = returned[place]


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, Value)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the leaves of nested tuples, lists, dicts and slices."""
    if isinstance(value, tuple | list):
        items = [mapped(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(mapped(function, end) for end in (value.start, value.stop, value.step)))
    return function(value)


def _leaves(value: Any) -> list[Any]:
    leaves: list[Any] = []
    mapped(leaves.append, value)
    return leaves


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def replay(calls: Sequence[Call], value: int, output: Tensor) -> Tensor:
    """Compute a value from an output by replaying the calls that it needs."""
    if not value:
        return output
    numbers = needed(calls, value)
    # Some calls modify their arguments in place.
    values = {0: output.clone() if any(calls[n].changes for n in numbers) else output}
    for number in numbers:
        calls[number].run(values, len(output))
    return values[value]


def needed(calls: Sequence[Call], value: int) -> list[int]:
    """Numbers of the calls needed to compute a value, in order."""
    wanted, numbers = {value}, []
    for number in range(len(calls) - 1, -1, -1):
        if calls[number].makes & wanted:
            wanted |= calls[number].uses
            numbers.append(number)
    return numbers[::-1]


@dataclass(frozen=True)
class Activation:
    """The function from a layer's output to its neurons' activations: ``a = f(output)``.

    Attributes
    ----------
    calls : tuple
        The model's calls on the output, in order, up to the last call of f.
    end : int
        Number of the value that is the activations; 0 for the output itself.
    drive_end : int
        Number of the value that enters the nonlinearity.
    before : str
        Names of the functions that take the activations, if f may not be everything that acts
        elementwise on neurons; otherwise "".
    """

    calls: tuple[Call, ...] = ()
    end: int = 0
    drive_end: int = 0
    before: str = ""

    @classmethod
    def from_function(cls, function: Callable[[Tensor], Tensor]) -> Activation:
        """Make an activation from a single known nonlinearity, a function or a module."""
        return cls((Call(function, (Value(0),), {}, {0: 1}),), 1)

    @property
    def name(self) -> str:
        """What f is, such as "batch_norm, relu" or "the layer's output, before layer_norm"."""
        names = [self.calls[number].name for number in needed(self.calls, self.end)]
        parts = [name for name in names if name not in PLUMBING] or ["the layer's output"]
        return ", ".join([*parts, *([f"before {self.before}"] if self.before else [])])

    def __call__(self, output: Tensor) -> Tensor:
        """Activations, in the shape of ``output``, which is not modified."""
        return replay(self.calls, self.end, output)

    def drive(self, output: Tensor) -> Tensor:
        """Input of the nonlinearity: the output after affine steps only."""
        return replay(self.calls, self.drive_end, output)

    def same(self, other: Activation) -> bool:
        """Whether both consist of the same functions with the same constants."""
        return (self.end, len(self.calls)) == (other.end, len(other.calls)) and all(
            agreed(a, b, 1, 1) for a, b in zip(self.calls, other.calls, strict=True)
        )


def agreed(
    first: Call, second: Call, n_first: int, n_second: int, n_neurons: int = 0
) -> Call | None:
    """The common form of two calls on batches of these sizes; None if their constants differ."""
    if first.function is not second.function and first.name != second.name:
        return None
    if (first.results, first.changes) != (second.results, second.changes):
        return None
    try:
        args = _same(first.args, second.args, n_first, n_second, n_neurons)
        kwargs = _same(first.kwargs, second.kwargs, n_first, n_second, n_neurons)
    except _DiffersError:
        return None
    return Call(first.function, args, kwargs, first.results, first.changes)


class _DiffersError(Exception):
    """Two constants differ."""


def _same(first: Any, second: Any, n_first: int, n_second: int, n_neurons: int) -> Any:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        # One value for all, or one per neuron; any other constant may depend on these inputs.
        fits = not n_neurons or first.numel() in (1, n_neurons)
        if first is second and fits:
            return first
        alike = fits and first.shape == second.shape and first.dtype == second.dtype
        if alike and torch.equal(first.nan_to_num(), second.nan_to_num()):
            return first
        raise _DiffersError
    if type(first) is not type(second):
        raise _DiffersError
    if isinstance(first, tuple | list):
        if len(first) != len(second):
            raise _DiffersError
        pairs = zip(first, second, strict=True)
        parts = [_same(a, b, n_first, n_second, n_neurons) for a, b in pairs]
        return parts if isinstance(first, list) else tuple(parts)
    if isinstance(first, Mapping):
        if first.keys() != second.keys():
            raise _DiffersError
        return {k: _same(first[k], second[k], n_first, n_second, n_neurons) for k in first}
    if isinstance(first, slice):
        ends = [(first.start, second.start), (first.stop, second.stop), (first.step, second.step)]
        return slice(*(_same(a, b, n_first, n_second, n_neurons) for a, b in ends))
    if first == second or (first != first and second != second):
        return first
    if isinstance(first, int) and not first % n_first and first // n_first * n_second == second:
        return _Batches(first // n_first)
    raise _DiffersError
