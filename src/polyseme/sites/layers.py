"""Single layers as sites: linear layers and convolutions."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.core import Neurons
from polyseme.errors import SiteError
from polyseme.sites.activation import tolerance
from polyseme.sites.seen import Seen, deviation, percent
from polyseme.sites.site import Site, flat_rows, spread


class _WeightedSite(Site):
    """A layer that outputs ``W h`` plus a constant per neuron."""

    #: Measured weights, for a layer that does not multiply by its own weight.
    _measured: Tensor | None = None
    #: Classes with a known forward.
    _stock: tuple[type[nn.Module], ...] = ()

    def weights(self) -> Tensor:
        return self._nominal() if self._measured is None else self._measured

    @abstractmethod
    def _nominal(self) -> Tensor:
        """The module's own weight, (n_neurons, d_in)."""

    @abstractmethod
    def _measure(self, example: Tensor) -> Tensor:
        """Measure the weights, (n_neurons, d_in), by the layer's response to single coordinates."""

    @abstractmethod
    def _rows(self, inputs: Tensor, output: Tensor) -> list[tuple[Tensor, slice, Tensor]]:
        """For each group: gathered vectors (m, d_in), its neurons, and their outputs (m, n)."""

    def prove(self, runs: Sequence[Seen]) -> None:
        pairs = [(run.inputs, run.output) for run in runs]
        limit = tolerance(runs[0].output)
        if not all(bool(torch.isfinite(t).all()) for pair in pairs for t in pair):
            # NaN from the data or the model is reported where activations are collected.
            return
        again = runs[0].again
        if again is not None and not self._is_stock():
            # Noise reveals custom forwards that a few inputs may not.
            noise = _noise_like(runs[0].inputs)
            pairs.append((noise, again(noise)))
        error = self._error(pairs)
        if error > limit and again is not None:
            with contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError):
                self._measured = self._measure(runs[0].inputs)
                error = self._error(pairs)
        if not error <= limit:
            self._measured = None
            raise SiteError(
                f"Site {self.name!r} cannot be read: its output is not its weights times its input "
                f"plus a constant (off by {percent(error)}), as its {type(self.module).__name__} "
                f"or a hook changes the input, the weights or the output in a way that depends on "
                f"the input. Name another layer, or replace this one with a plain layer that "
                f"computes the same."
            )

    def _is_stock(self) -> bool:
        forward = type(self.module).forward
        return "forward" not in vars(self.module) and any(
            forward is stock.forward for stock in self._stock
        )

    def _error(self, pairs: list[tuple[Tensor, Tensor]]) -> float:
        try:
            parts = [self._rows(inputs, output) for inputs, output in pairs]
        except (RuntimeError, IndexError):
            # Positions that the layer does not have.
            return float("inf")
        weights = self.weights()
        if weights.shape != (self.n_neurons, self.d_in):
            return float("inf")
        return max(
            deviation(
                torch.cat([vectors for vectors, _, _ in group]),
                weights[group[0][1]],
                torch.cat([outputs for _, _, outputs in group]),
            )
            for group in zip(*parts, strict=True)
        )


def _noise_like(inputs: Tensor) -> Tensor:
    """Normal noise of the inputs' shape and scale, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    scale = float(inputs.float().square().mean().sqrt()) or 1.0
    noise = torch.randn(inputs.shape, generator=generator) * scale
    return noise.to(inputs.device, inputs.dtype)


class LinearSite(_WeightedSite):
    """`torch.nn.Linear`, or the transposed linear layer of GPT-2 in transformers (`Conv1D`).

    A module that wraps such a layer (its ``base_layer``) and adds to its output is read as one
    layer, with measured weights.
    """

    kind = "linear"
    _stock = (nn.Linear,)

    def __init__(self, name: str, module: nn.Module) -> None:
        around = base_layer(module)
        #: The layer itself, which ``module`` may wrap.
        self._layer = module if around is None else around
        super().__init__(name, module, *_linear_shape(self._layer))

    def _nominal(self) -> Tensor:
        return linear_weight(self._layer)

    def _measure(self, example: Tensor) -> Tensor:
        forward: Any = self.module.forward
        eye = torch.eye(self.d_in, device=example.device, dtype=example.dtype)
        with torch.no_grad():
            measured: Tensor = forward(eye) - forward(torch.zeros_like(eye))
        return measured.T

    def _rows(self, inputs: Tensor, output: Tensor) -> list[tuple[Tensor, slice, Tensor]]:
        flat = self.flatten(output)
        index = spread(flat.shape[0] * flat.shape[1], 32).to(flat.device)
        rows, places = index // flat.shape[1], index % flat.shape[1]
        return [(self.gather(inputs, rows, places), slice(None), flat[rows, places])]

    def flatten(self, output: Tensor) -> Tensor:
        return flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return flat_rows(inputs)[rows, places]


class ConvSite(_WeightedSite):
    """`torch.nn.Conv2d`: a neuron is a channel, an input vector the patch that it reads.

    The vector holds the patch's values as the kernel does: channel, row, column.
    """

    kind = "conv"
    neuron_axis = 1
    _stock = (nn.Conv2d,)

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module, module.out_channels, module.weight[0].numel())
        self.n_groups = module.groups
        #: Rows and columns of positions, once the layer has run.
        self.grid: tuple[int, int] | None = None

    def prove(self, runs: Sequence[Seen]) -> None:
        self.grid = runs[0].output.shape[2], runs[0].output.shape[3]
        super().prove(runs)

    def _nominal(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1)

    def _measure(self, example: Tensor) -> Tensor:
        conv: Any = self.module
        position, start, size = [0, 0], [0, 0], [0, 0]
        for axis in (0, 1):
            padding = conv._reversed_padding_repeated_twice[2 - 2 * axis]
            # The first position whose patch is inside the image, and where the patch begins.
            position[axis] = -(-padding // conv.stride[axis])
            start[axis] = position[axis] * conv.stride[axis] - padding
            size[axis] = start[axis] + conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
        per_group = conv.in_channels // self.n_groups
        measured = []
        with torch.no_grad():
            blank = example.new_zeros((1, conv.in_channels, *size))
            constant = conv.forward(blank)[0, :, position[0], position[1]]
            for channel in range(per_group):
                impulses = blank.repeat(conv.kernel_size[0] * conv.kernel_size[1], 1, 1, 1)
                for number, impulse in enumerate(impulses):
                    row, column = divmod(number, conv.kernel_size[1])
                    y, x = start[0] + row * conv.dilation[0], start[1] + column * conv.dilation[1]
                    impulse[channel::per_group, y, x] = 1
                measured.append(conv.forward(impulses)[:, :, position[0], position[1]] - constant)
        return torch.cat(measured).T

    def _rows(self, inputs: Tensor, output: Tensor) -> list[tuple[Tensor, slice, Tensor]]:
        flat = self.flatten(output)
        index = spread(flat.shape[0] * flat.shape[1], 32).to(flat.device)
        rows, positions = index // flat.shape[1], index % flat.shape[1]
        n = self.n_neurons // self.n_groups
        return [
            (
                self.gather(inputs, rows, positions * self.n_groups + group),
                slice(group * n, (group + 1) * n),
                flat[rows, positions][:, group * n : (group + 1) * n],
            )
            for group in range(self.n_groups)
        ]

    def metadata(self, neurons: Neurons) -> dict[str, Any]:
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        kernel = [conv.in_channels // self.n_groups, *conv.kernel_size]
        if self.grid is None:
            return {"kernel_shape": kernel}
        return {"kernel_shape": kernel, "grid": list(self.grid), "stride": list(conv.stride)}

    def flatten(self, output: Tensor) -> Tensor:
        return output.flatten(2).transpose(1, 2)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        padding = conv._reversed_padding_repeated_twice
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = nn.functional.pad(inputs, padding, mode=mode)
        patches = padded
        for axis, (size, step, gap) in enumerate(
            zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
        ):
            # A view: only the requested patches are copied.
            patches = patches.unfold(2 + axis, gap * (size - 1) + 1, step)
        patches = patches[..., :: conv.dilation[0], :: conv.dilation[1]]
        across = patches.shape[3]
        position, group = places // self.n_groups, places % self.n_groups
        per_group = conv.in_channels // self.n_groups
        channels = group[:, None] * per_group + torch.arange(per_group, device=group.device)
        picked = patches[
            rows[:, None], channels, (position // across)[:, None], (position % across)[:, None]
        ]
        return picked.flatten(1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `torch.nn.Linear` or transformers' `Conv1D`."""
    # transformers' Conv1D, recognised without importing transformers.
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "weight", None), Tensor)
        and hasattr(module, "nf")
    )


def linear_weight(module: nn.Module) -> Tensor:
    """Weight of a linear layer, shape (outputs, inputs), detached."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach() if isinstance(module, nn.Linear) else weight.detach().T


def base_layer(module: nn.Module) -> nn.Module | None:
    """The linear layer that a module such as an adapter wraps; None if there is none."""
    inside = getattr(module, "base_layer", None)
    return inside if isinstance(inside, nn.Module) and is_linear(inside) else None


def _linear_shape(layer: nn.Module) -> tuple[int, int]:
    """Numbers of outputs and inputs of a linear layer; its weight may be packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    n_neurons, d_in = linear_weight(layer).shape
    return n_neurons, d_in
