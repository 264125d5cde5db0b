"""Follows a model's calls on a layer's output, and learns the activation from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from polyseme.errors import SiteError
from polyseme.sites.activation import (
    PLUMBING,
    Activation,
    Call,
    Value,
    agreed,
    mapped,
    needed,
    replay,
    tensors_in,
    tolerance,
)

# Number of calls on a layer's output to follow; later ones are ignored.
_MOST_CALLS = 64
# Share of a call's results that must stay equal when half of the layer's output changes; otherwise
# the call mixes neurons, as the next layer does.
_STAYS = 0.1
# Minimum number of values for estimating that share, and maximum number of changed outputs.
_ENOUGH, _MOST_VERSIONS = 200, 16
# Exceptions of torch functions on arguments they do not accept.
_CANNOT = (RuntimeError, TypeError, ValueError, IndexError)
# Functions that mix neurons, even if there are too few neurons to show it.
_MIXING = frozenset({"linear", "addmm", "matmul", "mm", "bmm", "conv1d", "conv2d", "conv3d"})


class Track:
    """The calls of one run of the model on one layer's output.

    Parameters
    ----------
    output : Tensor
    known : Activation, optional
        Follow only this activation's calls.
    """

    def __init__(self, output: Tensor, known: Activation | None = None) -> None:
        self.output = output if known else output.detach().clone()
        self.calls: list[Call] = []
        self.values: list[Tensor] = [output]
        self._known = known
        #: numbers of the calls whose results were not followed
        self.opaque: set[int] = set()
        self._number = {id(output): 0}
        self._versions = {0: _version(output)}
        #: actual values, by number, as first computed
        self.copies: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        self._changed: list[tuple[Tensor, Tensor]] = []
        if known is None:
            self._changed = _changed(self.output, generator)

    def touches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether any of these tensors was computed from the output."""
        return any(id(tensor) in self._number for tensor in tensors)

    def template(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with placeholders for values computed from the output, before the call."""

        def leave_open(leaf: Any) -> Any:
            number = self._number.get(id(leaf)) if isinstance(leaf, Tensor) else None
            return leaf if number is None else Value(number)

        return mapped(leave_open, args), mapped(leave_open, kwargs)

    def record(
        self, function: Callable[..., Any], template: tuple[Any, Any], result: Any
    ) -> int | None:
        """Record a completed call; return its number, or None if it only inspects."""
        call = Call(function, *template)
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
                # Another view of a value changed in place, whose new content is not followed.
                self._number[id(tensor)] = -1
                self._versions.pop(number)
        for place, tensor in enumerate(returned):
            if id(tensor) not in self._number:
                call.results[place] = self._add(tensor)
        # Replaying a call that writes to other data would overwrite the model's own.
        others = tensors_in(template)
        writes_elsewhere = any(tensor is other for tensor in returned for other in others)
        if self._known is not None:
            follow = number_of_call < len(self._known.calls)
        else:
            follow = (
                -1 not in used
                and not writes_elsewhere
                and len(self.calls) <= _MOST_CALLS
                and self._is_local(call)
            )
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

    def _is_local(self, call: Call) -> bool:
        """Whether each of a call's results depends on few of the layer's outputs."""
        for value in call.makes:
            try:
                plain = replay(self.calls, value, self.output)
                others = [replay(self.calls, value, z) for z, _ in self._changed]
            except _CANNOT:
                return False
            if not plain.numel() or any(plain.shape != other.shape for other in others):
                return False
            stays = [float((plain == other).float().mean()) for other in others]
            if sum(stays) < _STAYS * len(stays):
                return False
        return True

    def repeats(self, calls: Sequence[Call], value: int) -> bool:
        """Whether replaying these calls reproduces the model's value, neuron by neuron."""
        actual = self.copies.get(value)
        if actual is None or actual.shape != self.output.shape or not actual.is_floating_point():
            return False
        try:
            plain = replay(calls, value, self.output)
            others = [(replay(calls, value, z), same) for z, same in self._changed]
        except _CANNOT:
            return False
        return torch.allclose(plain, actual, rtol=1e-4, atol=1e-6, equal_nan=True) and all(
            torch.equal(other[same].nan_to_num(), plain[same].nan_to_num())
            for other, same in others
        )

    def is_affine(self, calls: Sequence[Call], value: int) -> bool:
        """Whether a value is an affine function of each neuron's output."""
        for (first, _), (second, _) in pairwise(self._changed):
            ends = [replay(calls, value, z).float() for z in (first, second, (first + second) / 2)]
            scale = float(ends[0].abs().max()) + float(ends[1].abs().max()) + 1e-30
            far = float(((ends[0] + ends[1]) / 2 - ends[2]).abs().max())
            if not far <= tolerance(self.output) * scale:
                return False
        return True

    def is_shift(self, calls: Sequence[Call], start: int, value: int) -> bool:
        """Whether a value is an earlier one plus a constant that differs between neurons."""
        shifts = [replay(calls, value, z) - replay(calls, start, z) for z, _ in self._changed]
        first = shifts[0].float()
        scale = tolerance(self.output) * float(first.abs().max())
        return bool((first - first.reshape(-1)[0]).abs().max() > scale) and all(
            bool((shift.float() - first).abs().max() <= scale) for shift in shifts
        )


def _changed(output: Tensor, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Copies of the output with half of the values changed, and which values are unchanged."""
    wide = output.float()
    scale = float(wide.abs().nan_to_num().mean()) + 1e-6
    versions = []
    for _ in range(min(_MOST_VERSIONS, max(2, -(-_ENOUGH // max(1, output.numel()))))):
        noise = torch.randn(output.shape, generator=generator).to(output.device) * 2 * scale
        same = (torch.rand(output.shape, generator=generator) < 0.5).to(output.device)
        versions.append((torch.where(same, wide, noise).to(output.dtype), same))
    return versions


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def learn(tracks: Sequence[Track], n_neurons: int) -> Activation:
    """The activation on which two runs, with different inputs and batch sizes, agree.

    It extends as far as functions act on each neuron separately, identically in both runs, and
    reproduce the model's values when replayed, but not past the last point through which
    everything computed from the output passes.

    Parameters
    ----------
    tracks : two Track
    n_neurons : int
    """
    first, second = tracks
    sizes = len(first.output), len(second.output)
    calls: list[Call] = []
    for a, b in zip(first.calls, second.calls, strict=False):
        both = agreed(a, b, *sizes, n_neurons)
        if both is None or len(calls) in first.opaque | second.opaque:
            break
        calls.append(both)
    end = drive = 0
    is_affine = True
    for value in sorted(value for call in calls for value in call.makes):
        if not _is_all(first, calls, value) or not _is_all(second, calls, value):
            continue
        if not all(track.repeats(calls, value) for track in tracks):
            continue
        is_affine = is_affine and first.is_affine(calls, value)
        drive = value if is_affine else drive
        # A constant subtracted from each neuron's activation belongs to the next layer, as an SAE's
        # bias does.
        end = end if first.is_shift(calls, end, value) else value
    drive = min(drive, end)
    last = max(needed(calls, end), default=-1)
    before = _before(first, end, nonlinear=not is_affine and end > drive)
    return Activation(tuple(calls[: last + 1]), end, drive, before)


def _is_all(track: Track, calls: Sequence[Call], value: int) -> bool:
    """Whether everything that the model computes from the output goes through a value."""
    numbers = needed(calls, value)
    through = {0}.union(*(calls[number].makes for number in numbers)) - {value}
    return all(number in numbers for number in _users(track, through))


def _users(track: Track, values: set[int]) -> list[int]:
    """Numbers of the calls on any of these values, except those with unused results."""
    read = {value for call in track.calls for value in call.uses}
    users = [n for n, call in enumerate(track.calls) if call.uses & values]
    alive = [
        n
        for n in users
        if n in track.opaque or track.calls[n].changes or set(track.calls[n].makes) & read
    ]
    return alive or users


def _before(track: Track, end: int, *, nonlinear: bool) -> str:
    """Names of the functions that take the activations, if f may be incomplete."""
    values = {end}
    while moves := {n for n in _users(track, values) if track.calls[n].name in PLUMBING}:
        if all(track.calls[n].makes <= values for n in moves):
            break
        values |= {value for n in moves for value in track.calls[n].makes}
    users = [n for n in _users(track, values) if track.calls[n].name not in PLUMBING]
    mixes = [n in track.opaque or track.calls[n].name in _MIXING for n in users]
    if nonlinear and all(mixes):
        # A nonlinearity was found, and a layer comes next.
        return ""
    return " and ".join(dict.fromkeys(track.calls[n].name for n in users))


class Watch(TorchFunctionMode):
    """Follows layers' outputs through the torch functions that a model calls on them.

    Call `follow` from a forward hook with a layer's output; ``tracks`` records the calls.

    Parameters
    ----------
    known : mapping of name to Activation, optional
        Activation of each site whose activations are to be edited.
    edit : callable (name, activations) -> Tensor or None, optional
        Called with the activations of a site; the model continues with its result.
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
        """Ignore calls within the block, such as those of a hook that only reads."""
        tracks, self.tracks = self.tracks, {}
        try:
            yield
        finally:
            self.tracks = tracks

    def follow(self, name: str, output: Tensor) -> Tensor | None:
        """Start following a layer's output; return its replacement if it is edited immediately."""
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
                f"At site {name!r}, the model calls {track.calls[number].name} but called "
                f"{known.calls[number].name} before; expected a model that always does the same."
            )
        if number < len(known.calls) - 1:
            return result
        del self.tracks[name]
        activations = track.values[known.end]
        edited = self._edit(name, activations)
        if edited is None:
            return result
        if activations is not result or known.end in track.calls[number].changes.values():
            # The model may continue with the tensor that it passed in.
            activations.copy_(edited)
            return result
        return edited
