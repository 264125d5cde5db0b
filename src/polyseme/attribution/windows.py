"""Examples in texts: which tokens of their windows are masked, and importances from drops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.errors import InputError
from polyseme.sites.site import Site

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

# A smaller drop, relative to the activation, is rounding; dividing by it would turn all other
# importances into noise.
NO_DROP = 1e-4


@dataclass(frozen=True)
class Rows:
    """Contexts that go through the model together, cut to the length of the longest."""

    ids: Integers
    attention: NDArray[np.bool_]
    positions: Integers
    neurons: Integers


@dataclass(frozen=True)
class Examples:
    ids: Integers
    attention: NDArray[np.bool_]
    positions: Integers
    neurons: Integers
    # Position in the context of each window column (m, before + 1 + after), whether it is inside
    # the context, and whether the max-activating token can see it.
    places: Integers
    inside: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    # End of the part of each context that is run.
    ends: Integers

    def __len__(self) -> int:
        return len(self.ids)

    def window_ids(self) -> Integers:
        return np.take_along_axis(self.ids, np.clip(self.places, 0, self.ids.shape[1] - 1), axis=1)

    def rows(self, numbers: Integers) -> Rows:
        end = self.ends[numbers].max()
        return Rows(
            self.ids[numbers, :end],
            self.attention[numbers, :end],
            self.positions[numbers],
            self.neurons[numbers],
        )


def examples_in_text(
    site: Site,
    ids: Any,
    attention: Any,
    positions: Any,
    neurons: Any,
    mask_id: int,
    before: int,
    after: int,
    causal: bool,
) -> Examples:
    ids = np.asarray(ids)
    attended = np.asarray(attention).astype(bool)
    positions, neurons = np.asarray(positions), np.asarray(neurons)
    n = ids.shape[:1]
    if (
        ids.ndim != 2
        or attended.shape != ids.shape
        or not positions.shape == neurons.shape == n
        or any(array.size and array.dtype.kind not in "iu" for array in (ids, positions, neurons))
    ):
        raise InputError(
            f"ids has shape {ids.shape} ({ids.dtype}), attention {attended.shape}, positions "
            f"{positions.shape} ({positions.dtype}) and neurons {neurons.shape} "
            f"({neurons.dtype}); expected integers (m, L), booleans (m, L) and integers (m,) and "
            "(m,)."
        )
    ids, positions, neurons = (x.astype(np.int64) for x in (ids, positions, neurons))
    for name, value in (("mask_id", mask_id), ("before", before), ("after", after)):
        if value < 0:
            raise InputError(f"{name} is {value}; expected 0 or more.")
    bad = (neurons < 0) | (neurons >= site.n_neurons)
    if bad.any():
        example = int(np.argmax(bad))
        raise InputError(
            f"neurons[{example}] is {neurons[example]}, but site {site.name!r} has "
            f"{site.n_neurons} neurons, numbered from 0."
        )
    length = ids.shape[1]
    last = max(length - 1, 0)
    bad = (positions < 0) | (positions >= length)
    bad |= ~np.take_along_axis(attended, np.clip(positions, 0, last)[:, None], axis=1)[:, 0]
    if bad.any():
        example = int(np.argmax(bad))
        raise InputError(
            f"positions[{example}] is {positions[example]}, which is padding or outside its "
            f"context of {length} tokens; expected the position of the max-activating token."
        )
    places = positions[:, None] + np.arange(-before, after + 1)
    inside = (places >= 0) & (places < length)
    inside &= np.take_along_axis(attended, np.clip(places, 0, last), axis=1)
    seen = inside & (places <= positions[:, None]) if causal else inside
    ends = positions + 1 if causal else np.where(attended, np.arange(1, length + 1), 0).max(axis=1)
    return Examples(ids, attended, positions, neurons, places, inside, seen, ends)


def shares_of(examples: Examples, drops: Floats, activations: Floats, before: int) -> Floats:
    if not (np.isfinite(drops).all() and np.isfinite(activations).all()):
        bad = ~(np.isfinite(drops).all(axis=1) & np.isfinite(activations))
        example = int(np.argmax(bad))
        raise InputError(
            f"The activation of neuron {examples.neurons[example]} in example {example}, or in a "
            "masked copy of it, is not finite; run the model in a dtype with more range, such as "
            "float32 or bfloat16."
        )
    own_drop = drops[:, before]
    scale = np.where(own_drop > NO_DROP * np.abs(activations), own_drop, activations)[:, None]
    shares = np.divide(drops, scale, out=np.zeros_like(drops), where=scale > 0)
    shares = np.clip(shares, 0, 1)
    shares[:, before] = 1
    shares[~examples.inside] = np.nan
    return shares
