"""What drives a neuron, and its effects: activation maps and logit effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.errors import InputError
from polyseme.sites.hooks import Feed, edit_site, evaluating, first_tensor, in_this_thread
from polyseme.sites.site import Site

Floats = NDArray[np.float32]

# Above this many cells, pixels are changed in blocks, as each cell costs forward passes.
MAX_CELLS = 4096
MAX_CLASSES = 1024


def cells_of(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Cell of each value of an input: one per value, or blocks of pixels for large images.

    Parameters
    ----------
    shape : tuple of int
        Shape of one input, whose last two axes are rows and columns.

    Returns
    -------
    ndarray of int64, shape ``shape``
        Cell numbers from 0, at most 4,096 cells.
    """
    size = 1
    while True:
        counts = [
            -(-n // size) if len(shape) > 1 and axis >= len(shape) - 2 else n
            for axis, n in enumerate(shape)
        ]
        if int(np.prod(counts)) <= MAX_CELLS:
            break
        if len(shape) < 2 or size > max(shape[-2:]):
            raise InputError(
                f"Inputs of shape {shape} have more than {MAX_CELLS} values on axes other than "
                f"rows and columns, too many to change one by one; leave out activation maps."
            )
        size += 1
    grid = np.arange(int(np.prod(counts))).reshape(counts)
    for axis in range(max(len(shape) - 2, 0), len(shape)):
        if len(shape) > 1:
            grid = np.repeat(grid, size, axis=axis).take(range(shape[axis]), axis=axis)
    return grid


def activation_maps(
    model: nn.Module,
    sites: list[Site],
    *,
    baseline: Floats,
    low: float | Floats,
    high: float | Floats,
    levels: int = 5,
    batch_size: int = 256,
) -> Iterator[tuple[float, dict[str, Floats] | None]]:
    """How much each pixel alone can change each neuron, through the whole network.

    Starting from a baseline input, one pixel at a time runs over its range while all others stay
    fixed. The map holds the resulting change of the neuron's drive, the input of its nonlinearity,
    that is largest in magnitude, with its sign, so a pixel that can only inhibit is negative. For a
    neuron that reads the pixels, with a baseline of 0, the map is its weights times the end of the
    range that is farther from 0: a picture of the weights.

    All neurons of all sites share the same forward passes.

    Parameters
    ----------
    model : torch.nn.Module
    sites : list of Site
        With known activations.
    baseline : ndarray of float32, shape of one input
    low, high : float or ndarray
        The range of each pixel, in the units of the model's input.
    levels : int
        Number of values tried, evenly spaced over the range, including both ends.
    batch_size : int

    Yields
    ------
    done : float
        Fraction of the work done.
    maps : dict of str to ndarray, or None
        Only at the end: for each site's name, float32 (n_neurons, *shape of one input).
    """
    feed = Feed(model)
    cells = cells_of(baseline.shape)
    n_cells = int(cells.max()) + 1
    steps = np.linspace(0, 1, levels, dtype=np.float32)
    span = np.broadcast_to(np.asarray(high, np.float32) - low, baseline.shape)
    bottom = np.broadcast_to(np.asarray(low, np.float32), baseline.shape)

    def drives(inputs: Floats) -> dict[str, Floats]:
        by_site: dict[str, Floats] = {}

        def on_output(site: Site, output: Tensor) -> None:
            strongest = site.flatten(site.activation.drive(output)).amax(dim=1)
            by_site[site.name] = strongest.float().cpu().numpy()

        with evaluating(model), torch.no_grad(), _outputs(sites, on_output):
            feed(inputs)
        return by_site

    start = drives(baseline[None])
    best = {site.name: np.zeros((n_cells, site.n_neurons), np.float32) for site in sites}
    jobs = [(cell, step) for cell in range(n_cells) for step in steps]
    for first in range(0, len(jobs), batch_size):
        part = jobs[first : first + batch_size]
        inputs = np.repeat(baseline[None], len(part), axis=0)
        for row, (cell, step) in zip(inputs, part, strict=True):
            row[cells == cell] = (bottom + step * span)[cells == cell]
        for name, values in drives(inputs).items():
            change = values - start[name]
            for (cell, _), row in zip(part, change, strict=True):
                held = best[name][cell]
                np.copyto(held, row, where=np.abs(row) > np.abs(held))
        yield min(first + batch_size, len(jobs)) / len(jobs), None
    yield (
        1.0,
        {
            name: np.ascontiguousarray(largest[cells.ravel()].T).reshape(-1, *cells.shape)
            for name, largest in best.items()
        },
    )


@contextmanager
def _outputs(sites: list[Site], on_output: Callable[[Site, Tensor], None]) -> Iterator[None]:
    with ExitStack() as hooks:
        for site in sites:

            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any, site: Site = site) -> None:
                inputs = first_tensor((*args, *kwargs.values()))
                on_output(site, site.layer_output(inputs, output))

            handle = site.output_module.register_forward_hook(
                in_this_thread(hook), with_kwargs=True
            )
            hooks.callback(handle.remove)
        yield


@dataclass(frozen=True)
class LogitEffects:
    """How a site's neurons change the model's logits, averaged over each neuron's examples.

    Attributes
    ----------
    gradient : ndarray of float32, shape (n_neurons, n_classes)
        To first order: the neuron's activation times the logit's gradient in it, through all later
        layers.
    ablation : ndarray of float32, shape (n_neurons, n_classes)
        Exact: the logit minus the logit with the neuron's activation set to 0. Both are NaN for a
        neuron without examples.
    """

    gradient: Floats
    ablation: Floats


def count_classes(output: Any) -> int | None:
    """Number of logits of a classifier's output; None for anything else."""
    if torch.is_tensor(output) and output.ndim == 2 and 2 <= output.shape[1] <= MAX_CLASSES:
        return int(output.shape[1])
    return None


def logit_effects(
    model: nn.Module,
    site: Site,
    n_classes: int,
    inputs: Callable[[NDArray[np.int64]], Any],
    neuron: NDArray[np.int64],
    example: NDArray[np.int64],
    *,
    batch_size: int = 256,
) -> Iterator[tuple[float, LogitEffects | None]]:
    """Compute each neuron's effect on each class's logit, to first order and by ablation.

    Parameters
    ----------
    model : torch.nn.Module
    site : Site
        With a known activation.
    n_classes : int
        See `count_classes`.
    inputs : callable
        Returns the model's inputs for an array of example numbers.
    neuron, example : ndarray of int64, shape (n_pairs,)
        Pairs of a neuron and an example in which to measure it.
    batch_size : int

    Yields
    ------
    done : float
        Fraction of the work done.
    effects : LogitEffects or None
        Only at the end, and None even then if the site does not reach the logits.
    """
    if not site.can_be_edited:
        # Unknown where its reconstruction would enter the model.
        yield 1.0, None
        return
    feed = Feed(model)
    gradient = np.zeros((site.n_neurons, n_classes))
    ablation = np.zeros((site.n_neurons, n_classes))
    counts = np.bincount(neuron, minlength=site.n_neurons)
    for start in range(0, len(neuron), batch_size):
        batch = inputs(example[start : start + batch_size])
        part = neuron[start : start + batch_size]
        neurons = torch.as_tensor(part, device=feed.device)
        rows = torch.arange(len(part), device=feed.device)
        seen: list[Tensor] = []

        def watch(activations: Tensor, seen: list[Tensor] = seen) -> Tensor:
            # Detached, so that only later layers are differentiated.
            leaf = activations.detach().clone().requires_grad_()
            seen.append(leaf)
            # An in-place layer must not modify the leaf.
            return leaf.clone()

        def ablate(activations: Tensor, rows: Tensor = rows, neurons: Tensor = neurons) -> Tensor:
            edited = activations.clone()
            edited.movedim(site.neuron_axis, 1)[rows, neurons] = 0
            return edited

        with evaluating(model):
            with torch.enable_grad(), edit_site(site, watch):
                logits = feed(batch)
            if not seen or not logits.requires_grad:
                yield 1.0, None
                return
            active = (
                seen[0].detach().movedim(site.neuron_axis, 1)[rows, neurons].reshape(len(part), -1)
            )
            for c in range(n_classes):
                slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
                    logits[:, c].sum(), seen[0], retain_graph=True, allow_unused=True
                )
                if (slope := slopes[0]) is None:
                    # The logits depend on the model's weights, but not on this site.
                    yield 1.0, None
                    return
                slope = slope.movedim(site.neuron_axis, 1)[rows, neurons].reshape(len(part), -1)
                effect = (slope * active).sum(dim=1).double().cpu().numpy()
                np.add.at(gradient[:, c], part, effect)
            with torch.no_grad(), edit_site(site, ablate):
                without = feed(batch)
        change = (logits.detach() - without).double().cpu().numpy()
        np.add.at(ablation, part, change)
        yield min(start + batch_size, len(neuron)) / len(neuron), None
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.where(counts > 0, 1 / counts, np.nan)[:, None]
    yield (
        1.0,
        LogitEffects((gradient * scale).astype(np.float32), (ablation * scale).astype(np.float32)),
    )
