"""What the model does with a layer's output: watched once, repeated, and proved to be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyseme.errors import SiteError

# Calls on a layer's output that are followed; what comes later is not looked into.
_MOST_CALLS = 64
# Of what a call gives, the share that must stay when half of the layer's output changes, or it
# mixes neurons, as the next layer does.
_STAYS = 0.1
# Numbers that such a share is told from, at least; and versions of the output, at most.
_ENOUGH, _MOST_VERSIONS = 200, 16
# What functions of torch raise on arguments that they cannot take.
_CANNOT = (RuntimeError, TypeError, ValueError, IndexError)
# Functions that only move numbers, left out of an activation's name.
_PLUMBING = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
        *("to", "float", "double", "half", "bfloat16", "type_as", "detach", "get", "getitem"),
        *("transpose", "permute", "movedim", "view_as", "reshape_as", "expand_as"),
    }
)


# How far two ways to the same number may differ, as a share of its size: rounding, not more.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_TOLERANCE_ON_DEVICES = 1e-2  # Their products may be of ten bits, which is not told by the dtype.


def tolerance(tensor: Tensor) -> float:
    """How far numbers computed in a tensor's dtype, on its device, may be off by rounding."""
    own = _TOLERANCE.get(tensor.dtype, _TOLERANCE[torch.float32])
    return own if tensor.device.type == "cpu" else max(own, _TOLERANCE_ON_DEVICES)


# Functions that mix neurons, even if there are too few of these to show it.
_MIXING = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "conv1d", "conv2d", "conv3d"})


@dataclass(frozen=True)
class _Value:
    """Stands for a tensor that was made of the layer's output: 0 is the output itself."""

    number: int


@dataclass(frozen=True)
class _Batches:
    """Stands for a size that grows with the batch: so many for each input."""

    each: int


@dataclass
class _Call:
    """A function of torch that was called on something made of the layer's output.

    Attributes
    ----------
    function : callable
    args, kwargs
        With a `_Value` for each tensor that was made of the output.
    results : dict of int to int
        Values that it returned, by their place among the tensors returned.
    changes : dict of int to int
        Values that it made by working in place, by the value that was there before.
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
        """Call the function on these values, and add what it makes to them."""

        def fill(leaf: Any) -> Any:
            if isinstance(leaf, _Value):
                return values[leaf.number]
            return leaf.each * n_inputs if isinstance(leaf, _Batches) else leaf

        args, kwargs = _mapped(fill, self.args), _mapped(fill, self.kwargs)
        returned = tensors_in(self.function(*args, **kwargs))
        for before, after in self.changes.items():
            values[after] = values[before]
        for place, number in self.results.items():
            values[number] = returned[place]


def _is_value(leaf: Any) -> bool:
    return isinstance(leaf, _Value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """A nest of tuples, lists, dicts and slices with a function applied to what it holds."""
    if isinstance(value, tuple | list):
        items = [_mapped(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        return {key: _mapped(function, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(function, end) for end in (value.start, value.stop, value.step)))
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(found.append, value)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _replay(calls: Sequence[_Call], value: int, output: Tensor) -> Tensor:
    """The value of that number, by repeating the calls that it takes on an output."""
    if not value:
        return output
    needed = _needed(calls, value)
    # Some calls work in place, on what they are handed.
    values = {0: output.clone() if any(calls[n].changes for n in needed) else output}
    for number in needed:
        calls[number].run(values, len(output))
    return values[value]


def _needed(calls: Sequence[_Call], value: int) -> list[int]:
    """Numbers of the calls that make a value, in their order."""
    wanted, found = {value}, []
    for number in range(len(calls) - 1, -1, -1):
        if calls[number].makes & wanted:
            wanted |= calls[number].uses
            found.append(number)
    return found[::-1]


@dataclass(frozen=True)
class Activation:
    """What turns a layer's output into its neurons' activations: ``a = f(output)``.

    Attributes
    ----------
    calls : tuple
        What the model calls on the output, in its order, up to the last call of f.
    end : int
        Number of the value that is the activations; 0 for the output itself.
    drive_end : int
        Number of the value that enters the nonlinearity.
    before : str
        Names of the functions that the activations go into, where f may not be all that acts
        on each neuron by itself; else "".
    """

    calls: tuple[_Call, ...] = ()
    end: int = 0
    drive_end: int = 0
    before: str = ""

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor]) -> Activation:
        """A single nonlinearity, a function or a module, that is known beforehand."""
        return cls((_Call(function, (_Value(0),), {}, {0: 1}),), 1)

    @property
    def name(self) -> str:
        """What f is, such as "batch_norm, relu", or "the layer's output, before layer_norm"."""
        names = [self.calls[number].name for number in _needed(self.calls, self.end)]
        parts = [name for name in names if name not in _PLUMBING] or ["the layer's output"]
        return ", ".join([*parts, *([f"before {self.before}"] if self.before else [])])

    def __call__(self, output: Tensor) -> Tensor:
        """Activations, shape of ``output``, which is left as it is."""
        return _replay(self.calls, self.end, output)

    def drive(self, output: Tensor) -> Tensor:
        """What enters the nonlinearity: the output after affine steps alone."""
        return _replay(self.calls, self.drive_end, output)

    def same(self, other: Activation) -> bool:
        """Whether both repeat the same functions with the same constants."""
        return (self.end, len(self.calls)) == (other.end, len(other.calls)) and all(
            _agreed(a, b, 1, 1) for a, b in zip(self.calls, other.calls, strict=True)
        )


def _agreed(one: _Call, other: _Call, n_one: int, n_other: int, n_neurons: int = 0) -> _Call | None:
    """The call that both are, of batches of these sizes; None if their constants differ."""
    if one.function is not other.function and one.name != other.name:
        return None
    if (one.results, one.changes) != (other.results, other.changes):
        return None
    try:
        args = _same(one.args, other.args, n_one, n_other, n_neurons)
        kwargs = _same(one.kwargs, other.kwargs, n_one, n_other, n_neurons)
    except _DiffersError:
        return None
    return _Call(one.function, args, kwargs, one.results, one.changes)


class _DiffersError(Exception):
    """Two constants differ."""


def _same(one: Any, other: Any, n_one: int, n_other: int, n_neurons: int) -> Any:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        # One for all, or one for each neuron; any other may belong to these inputs alone.
        fits = not n_neurons or one.numel() in (1, n_neurons)
        if one is other and fits:
            return one
        alike = fits and one.shape == other.shape and one.dtype == other.dtype
        if alike and torch.equal(one.nan_to_num(), other.nan_to_num()):
            return one
        raise _DiffersError
    if type(one) is not type(other):
        raise _DiffersError
    if isinstance(one, tuple | list):
        if len(one) != len(other):
            raise _DiffersError
        pairs = zip(one, other, strict=True)
        parts = [_same(a, b, n_one, n_other, n_neurons) for a, b in pairs]
        return parts if isinstance(one, list) else tuple(parts)
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            raise _DiffersError
        return {k: _same(one[k], other[k], n_one, n_other, n_neurons) for k in one}
    if isinstance(one, slice):
        ends = [(one.start, other.start), (one.stop, other.stop), (one.step, other.step)]
        return slice(*(_same(a, b, n_one, n_other, n_neurons) for a, b in ends))
    if one == other or (one != one and other != other):
        return one
    if isinstance(one, int) and not one % n_one and one // n_one * n_other == other:
        return _Batches(one // n_one)
    raise _DiffersError


class Track:
    """What one run of the model called on one layer's output.

    Parameters
    ----------
    output : Tensor
    known : Activation, optional
        Follow this one's calls, instead of whatever comes.
    """

    def __init__(self, output: Tensor, known: Activation | None = None) -> None:
        self.output = output if known else output.detach().clone()
        self.calls: list[_Call] = []
        self.values: list[Tensor] = [output]
        self._known = known
        #: numbers of the calls whose results were not followed
        self.opaque: set[int] = set()
        self._number = {id(output): 0}
        self._versions = {0: _version(output)}
        #: actual values, by number, as they were when they were made
        self.copies: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._changed: list[tuple[Tensor, Tensor]] = []
        if known is None:
            self._changed = _changed(self.output, generator)

    def touches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these tensors was made of the output."""
        return any(id(tensor) in self._number for tensor in tensors)

    def template(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with what was made of the output left open; before the call is made."""

        def leave_open(leaf: Any) -> Any:
            number = self._number.get(id(leaf)) if isinstance(leaf, Tensor) else None
            return leaf if number is None else _Value(number)

        return _mapped(leave_open, args), _mapped(leave_open, kwargs)

    def record(
        self, function: Callable[..., Any], template: tuple[Any, Any], result: Any
    ) -> int | None:
        """Take in a call that was made; returns its number, or None for one that only looks."""
        call = _Call(function, *template)
        returned = tensors_in(result)
        used = call.uses
        changed = [
            number
            for number, version in self._versions.items()
            if self._number.get(id(self.values[number])) == number
            and (
                _version(self.values[number]) != version
                or (number in used and any(self.values[number] is tensor for tensor in returned))
                or (number in used and call.name == "setitem" and number == min(used))
            )
        ]
        if not returned and not changed:
            return None
        number_of_call = len(self.calls)
        self.calls.append(call)
        for number in changed:
            tensor = self.values[number]
            if number in used:
                call.changes[number] = self._add(tensor)
            else:
                # Another view of what was changed in place: what it holds now is not followed.
                self._number[id(tensor)] = -1
                self._versions.pop(number)
        for place, tensor in enumerate(returned):
            if id(tensor) not in self._number:
                call.results[place] = self._add(tensor)
        if self._known is not None:
            follow = number_of_call < len(self._known.calls)
        else:
            follow = -1 not in used and len(self.calls) <= _MOST_CALLS and self._is_local(call)
        if not follow:
            self.opaque.add(number_of_call)
            for value in call.makes:
                self._number.pop(id(self.values[value]), None)
                self._versions.pop(value, None)
        elif self._known is None:
            for value in call.makes:
                self.copies[value] = self.values[value].detach().clone()
        return number_of_call

    def _add(self, tensor: Tensor) -> int:
        number = len(self.values)
        self.values.append(tensor)
        self._number[id(tensor)] = number
        self._versions[number] = _version(tensor)
        return number

    def _is_local(self, call: _Call) -> bool:
        """Whether each number that a call gives rests on few of the layer's output."""
        for value in call.makes:
            try:
                plain = _replay(self.calls, value, self.output)
                others = [_replay(self.calls, value, z) for z, _ in self._changed]
            except _CANNOT:
                return False
            if not plain.numel() or any(plain.shape != other.shape for other in others):
                return False
            stays = [float((plain == other).float().mean()) for other in others]
            if sum(stays) < _STAYS * len(stays):
                return False
        return True

    def repeats(self, calls: Sequence[_Call], value: int) -> bool:
        """Whether these calls give the value that the model had, each neuron by itself."""
        actual = self.copies.get(value)
        if actual is None or actual.shape != self.output.shape or not actual.is_floating_point():
            return False
        try:
            plain = _replay(calls, value, self.output)
            others = [(_replay(calls, value, z), same) for z, same in self._changed]
        except _CANNOT:
            return False
        return torch.allclose(plain, actual, rtol=1e-4, atol=1e-6, equal_nan=True) and all(
            torch.equal(other[same].nan_to_num(), plain[same].nan_to_num())
            for other, same in others
        )

    def is_affine(self, calls: Sequence[_Call], value: int) -> bool:
        """Whether a value is an affine function of each neuron's output."""
        for (one, _), (other, _) in pairwise(self._changed):
            ends = [_replay(calls, value, z).float() for z in (one, other, (one + other) / 2)]
            scale = float(ends[0].abs().max()) + float(ends[1].abs().max()) + 1e-30
            far = float(((ends[0] + ends[1]) / 2 - ends[2]).abs().max())
            if not far <= tolerance(self.output) * scale:
                return False
        return True


def _changed(output: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Versions of the output with half of its numbers changed; and which of them are the same."""
    wide = output.float()
    scale = float(wide.abs().nan_to_num().mean()) + 1e-6
    found = []
    for _ in range(min(_MOST_VERSIONS, max(2, -(-_ENOUGH // max(1, output.numel()))))):
        noise = torch.randn(output.shape, generator=generator).to(output.device) * 2 * scale
        same = (torch.rand(output.shape, generator=generator) < 0.5).to(output.device)
        found.append((torch.where(same, wide, noise).to(output.dtype), same))
    return found


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def learn(tracks: Sequence[Track], n_neurons: int) -> Activation:
    """The activation that two runs on different inputs, in batches of different size, agree on.

    It reaches as far as each neuron is acted on by itself, in the same way in both runs, by
    functions that give what the model had when they are repeated, and no further than all that
    is made of the output comes together again.

    Parameters
    ----------
    tracks : two Track
    n_neurons : int
    """
    one, other = tracks
    sizes = len(one.output), len(other.output)
    calls: list[_Call] = []
    for a, b in zip(one.calls, other.calls, strict=False):
        agreed = _agreed(a, b, *sizes, n_neurons)
        if agreed is None or len(calls) in one.opaque | other.opaque:
            break
        calls.append(agreed)
    end = drive = 0
    for value in sorted(value for call in calls for value in call.makes):
        if not _is_all(one, calls, value) or not _is_all(other, calls, value):
            continue
        if not all(track.repeats(calls, value) for track in tracks):
            continue
        if drive == end and one.is_affine(calls, value):
            drive = value
        end = value
    last = max(_needed(calls, end), default=-1)
    return Activation(tuple(calls[: last + 1]), end, drive, _before(one, end, drive))


def _is_all(track: Track, calls: Sequence[_Call], value: int) -> bool:
    """Whether all that the model makes of the output goes through a value."""
    needed = _needed(calls, value)
    through = {0}.union(*(calls[number].makes for number in needed)) - {value}
    return all(number in needed for number in _users(track, through))


def _users(track: Track, values: set[int]) -> list[int]:
    """Numbers of the calls on any of these values, but those whose results nothing reads."""
    read = {value for call in track.calls for value in call.uses}
    users = [n for n, call in enumerate(track.calls) if call.uses & values]
    alive = [
        n
        for n in users
        if n in track.opaque or track.calls[n].changes or set(track.calls[n].makes) & read
    ]
    return alive or users


def _before(track: Track, end: int, drive: int) -> str:
    """Names of what the activations go into, if f may not be all there is of it."""
    values = {end}
    while moves := {n for n in _users(track, values) if track.calls[n].name in _PLUMBING}:
        if all(track.calls[n].makes <= values for n in moves):
            break
        values |= {value for n in moves for value in track.calls[n].makes}
    users = [n for n in _users(track, values) if track.calls[n].name not in _PLUMBING]
    mixes = [n in track.opaque or track.calls[n].name in _MIXING for n in users]
    if end != drive and all(mixes):
        # A nonlinearity was found, and a layer comes next.
        return ""
    return " and ".join(dict.fromkeys(track.calls[n].name for n in users))


class Watch(TorchFunctionMode):
    """Follows layers' outputs through the functions of torch that a model calls on them.

    Call `follow` from a forward hook with a layer's output; ``tracks`` holds what was called.

    Parameters
    ----------
    known : mapping of name to Activation, optional
        Of each site, where its activations are to be edited.
    edit : callable (name, activations) -> Tensor or None, optional
        Called with the activations of a site; what it returns goes on through the model.
    """

    def __init__(
        self,
        known: Mapping[str, Activation] | None = None,
        edit: Callable[[str, Tensor], Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self._known = known or {}
        self._edit = edit
        self.tracks: dict[str, Track] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let calls pass for a while, such as those of a hook that only looks."""
        tracks, self.tracks = self.tracks, {}
        try:
            yield
        finally:
            self.tracks = tracks

    def follow(self, name: str, output: Tensor) -> Tensor | None:
        """Begin to follow a layer's output; returns its replacement, if it is edited at once."""
        known = self._known.get(name)
        if self._edit is not None and known is not None and not known.end:
            return self._edit(name, output)
        self.tracks[name] = Track(output, known)
        return None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs)) if self.tracks else []
        touched = [(name, t) for name, t in self.tracks.items() if t.touches(tensors)]
        templates = [track.template(args, kwargs) for _, track in touched]
        result = func(*args, **kwargs)
        for (name, track), template in zip(touched, templates, strict=True):
            number = track.record(func, template, result)
            if number is not None and self._edit is not None:
                result = self._edited(name, track, number, result)
        return result

    def _edited(self, name: str, track: Track, number: int, result: Any) -> Any:
        assert self._edit is not None
        known = self._known[name]
        if track.calls[number].name != known.calls[number].name:
            raise SiteError(
                f"At site {name!r} the model calls {track.calls[number].name} where it called "
                f"{known.calls[number].name} before; a model that always does the same is expected."
            )
        if number < len(known.calls) - 1:
            return result
        del self.tracks[name]
        activations = track.values[known.end]
        edited = self._edit(name, activations)
        if edited is None:
            return result
        if activations is not result or known.end in track.calls[number].changes.values():
            # The model may go on with the tensor that it handed in.
            activations.copy_(edited)
            return result
        return edited
