"""Where neurons fire most: by blocks, and by looking at every position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyseme.errors import InputError
from polyseme.sites.reading import PositionMask, strongest


def slow(values: Tensor, mask: Tensor) -> tuple[list[list[float]], list[list[int]]]:
    """Each neuron's activation and place in each input, by the plainest loops."""
    found: tuple[list[list[float]], list[list[int]]] = ([], [])
    for one, row_mask in zip(values.tolist(), mask.tolist(), strict=True):
        allowed = [p for p, counts in enumerate(row_mask) if counts]
        best = [max(allowed, key=lambda p: one[p][j], default=None) for j in range(len(one[0]))]
        found[0].append([0.0 if p is None else one[p][j] for j, p in enumerate(best)])
        found[1].append([p or 0 for p in best])
    return found


@given(
    seed=st.integers(0, 100_000),
    n_positions=st.sampled_from([1, 2, 15, 16, 17, 33, 40, 300]),
    kind=st.sampled_from(["all", "but the first", "some", "few", "none in one"]),
    transposed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_equals_a_look_at_every_position(
    seed: int, n_positions: int, kind: str, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different values, so that there are ties within blocks and across them.
    values = torch.randint(-3, 3, (4, n_positions, 5), generator=generator) * 0.5
    if transposed:
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    drawn = torch.rand((4, n_positions), generator=generator)
    mask = {
        "all": drawn >= 0,
        "but the first": torch.arange(n_positions).expand(4, -1) > 0,
        "some": drawn < 0.6,
        "few": drawn < 0.05,
        "none in one": (torch.arange(4) != 2)[:, None] & (drawn < 0.9),
    }[kind]
    reading = strongest(values, None if kind == "all" else PositionMask(mask))
    activations, positions = slow(values, mask)
    assert reading.activations.tolist() == activations
    assert reading.positions.tolist() == positions
    active, n = reading.active(slice(1, 4))
    kept = values[1:][mask[1:]].tolist()
    assert n == len(kept)
    assert active.tolist() == [sum(row[j] > 0 for row in kept) for j in range(5)]
    # A few at a time and all together are looked for in different ways.
    few = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 1])
    for rows, neurons in (few, torch.ones(4, 5).nonzero(as_tuple=True)):
        at = reading.locate(rows, neurons)
        assert at.tolist() == [positions[row][j] for row, j in zip(rows, neurons, strict=True)]
        around = reading.around(rows, neurons, at, 2, 1)
        for window, row, neuron, place in zip(around, rows, neurons, at, strict=True):
            for offset, value in zip(range(-2, 2), window.tolist(), strict=True):
                p = int(place) + offset
                if 0 <= p < n_positions:
                    assert value == values[row, p, neuron]
                else:
                    assert value != value


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"mask has shape \(2, 3\), but the layer has \(2, 4\)"):
        strongest(torch.zeros(2, 4, 5), PositionMask(torch.ones(2, 3, dtype=torch.bool)))
