"""The neurons of a transformer's MLP, plain or gated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.core import Gated, General, Neurons
from polyseme.core.arrays import Floats
from polyseme.core.gates import known_gate
from polyseme.errors import SiteError
from polyseme.sites.activation import Activation
from polyseme.sites.gradient import activation_gradient
from polyseme.sites.layers import is_linear, linear_weight
from polyseme.sites.site import Describe, HiddenSite, as_array


class MLPSite(HiddenSite):
    """The MLP of a transformer; its neurons' activations are the decoder's input.

    Either ``a = f(W h + b)``, of kind "mlp", or ``a = f(W h + b) * (V h + c)``, of kind
    "gated", with ``h`` the input of the first linear layer.

    Parameters
    ----------
    name : str
        Name of the MLP's module, or of its first linear layer if it has no module of its own.
    reads : sequence of torch.nn.Module
        The linear layers that read h: one; or the gate and the up projection; or one fused layer
        with the gate in the first half of its outputs.
    decoder : torch.nn.Module
        The linear layer that takes the activations.
    act : callable
        The elementwise nonlinearity f: a module or a function.
    module : torch.nn.Module, optional
        The MLP's module; the first of ``reads`` by default.

    Attributes
    ----------
    reads : tuple of torch.nn.Module
    act : callable
    gain, shift : Tensor of shape (d_in,), or None
        Gain and bias of the folded layer norm, see `fold`.

    Raises
    ------
    SiteError
        If these are not linear layers, if their widths do not match, or if these weights do not
        determine embeddings under the nonlinearity.
    """

    def __init__(
        self,
        name: str,
        reads: Sequence[nn.Module],
        decoder: nn.Module,
        act: Callable[[Tensor], Tensor],
        *,
        module: nn.Module | None = None,
    ) -> None:
        if not 1 <= len(reads) <= 2:
            raise SiteError(
                f"MLP {name!r} has {len(reads)} layers in reads; expected one, or a gate and an up "
                f"projection."
            )
        for layer in (*reads, decoder):
            if not is_linear(layer):
                raise SiteError(
                    f"MLP {name!r} has a {type(layer).__name__} among its layers; expected Linear "
                    f"or Conv1D. Give the layers themselves, not their container."
                )
        if not callable(act):
            raise SiteError(
                f"MLP {name!r} has {act!r} as its nonlinearity; expected a function or a module, "
                f"such as torch.nn.functional.gelu."
            )
        shapes = [tuple(linear_weight(layer).shape) for layer in reads]
        n_neurons = linear_weight(decoder).shape[1]
        fused = len(reads) == 1 and shapes[0][0] == 2 * n_neurons
        if not fused and (shapes[0][0] != n_neurons or len(set(shapes)) > 1):
            raise SiteError(
                f"MLP {name!r} reads with layers of shapes {shapes}, but its decoder takes "
                f"{n_neurons} values; expected as many outputs from each layer (twice as many from "
                f"a fused gate and up projection), and inputs of one length."
            )
        super().__init__(name, module if module is not None else reads[0], n_neurons, shapes[0][1])
        self.kind = "gated" if fused or len(reads) == 2 else "mlp"
        self.reads = tuple(reads)
        self.act = act
        self.gain: Tensor | None = None
        self.shift: Tensor | None = None
        self._decoder = decoder
        self.activation = Activation.from_function(act)
        self._check_nonlinearity()

    def _check_nonlinearity(self) -> None:
        weight = linear_weight(self.reads[0])
        sizes = torch.logspace(-2, 2, 60)
        grid = torch.cat([-sizes.flip(0), sizes])[:, None].expand(-1, self.n_neurons)
        z = grid.to(weight.device, weight.dtype).clone().requires_grad_()
        other = z.detach().clone()
        other[::2, ::2] = -1.5
        same = torch.ones_like(other, dtype=torch.bool)
        same[::2, ::2] = False
        with torch.enable_grad():
            values = self.act(z)
        with torch.no_grad():
            changed = self.act(other)
        if values.shape != z.shape or not torch.equal(values[same], changed[same]):
            raise self._unfit("does not act on each neuron by itself")
        if self.kind == "gated":
            if not torch.equal(values, values[:, :1].expand_as(values)):
                raise self._unfit("differs from neuron to neuron")
        elif values.requires_grad:
            (slope,) = torch.autograd.grad(values.sum(), z)
            if bool(((values > 0) & (slope < 0)).any()):
                raise self._unfit(
                    "falls where it is positive, so that a neuron fires on opposite inputs, which "
                    "its weights alone cannot distinguish"
                )

    def _unfit(self, what: str) -> SiteError:
        return SiteError(
            f"MLP {self.name!r} has a nonlinearity, {self.activation.name}, that {what}; it cannot "
            "be read. Name its linear layers instead."
        )

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The MLP's linear layers, its decoder last."""
        return (*self.reads, self._decoder)

    @property
    def input_module(self) -> nn.Module:
        return self.reads[0]

    @property
    def output_module(self) -> nn.Module:
        return self.reads[0]

    @property
    def decoder(self) -> nn.Module:
        return self._decoder

    @property
    def last_module(self) -> nn.Module:
        return self._decoder

    def flatten(self, output: Tensor) -> Tensor:
        # The gate half of a fused layer's output.
        return super().flatten(output)[..., : self.n_neurons]

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        vectors = super().gather(inputs, rows, places)
        if self.gain is None or self.shift is None:
            return vectors
        # A coordinate with gain 0 is lost in the norm's output; its folded weights are 0, so
        # reading 0 there gives the same activations.
        normalised = (vectors - self.shift) / self.gain
        return torch.where(self.gain == 0, torch.zeros_like(normalised), normalised)

    def fold(self, gain: Tensor, shift: Tensor) -> MLPSite:
        """The same neurons, with a layer norm's gain and bias in their weights.

        For ``h = gain * x + shift``, the input vectors are x, the norm's output before gain and
        bias, and the weights are ``W * gain``; activations do not change. A coordinate with gain 0
        reads 0, as its weights are 0. The model is not modified.

        Parameters
        ----------
        gain, shift : Tensor, shape (d_in,)

        Returns
        -------
        MLPSite
        """
        for name, tensor in (("gain", gain), ("shift", shift)):
            if tensor.shape != (self.d_in,):
                raise SiteError(
                    f"The {name} has shape {tuple(tensor.shape)}; expected ({self.d_in},), one "
                    f"value for each input of MLP {self.name!r}."
                )
        if self.gain is not None:
            raise SiteError(f"MLP {self.name!r} already has a layer norm folded in.")
        site = MLPSite(self.name, self.reads, self._decoder, self.act, module=self.module)
        site.gain, site.shift = gain.detach(), shift.detach()
        return site

    def _part(self, up: bool) -> tuple[Tensor, Tensor | None]:
        """Unfolded weight (n_neurons, d_in) and bias of the gate or the up projection."""
        layer = self.reads[-1] if up else self.reads[0]
        weight, bias = linear_weight(layer), getattr(layer, "bias", None)
        offset = bias.detach() if isinstance(bias, Tensor) else None
        if len(weight) == self.n_neurons:
            return weight, offset
        half = slice(self.n_neurons, None) if up else slice(self.n_neurons)
        return weight[half], None if offset is None else offset[half]

    def _folded(self, up: bool) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._part(up)
        if self.gain is None or self.shift is None:
            return weight, bias
        offset = weight @ self.shift
        return weight * self.gain, offset if bias is None else bias + offset

    def weights(self) -> Tensor:
        """Input weights W, shape (n_neurons, d_in), detached; for a gated MLP, of its gate."""
        return self._folded(up=False)[0]

    def bias(self) -> Tensor | None:
        """Bias b, shape (n_neurons,), if there is one."""
        return self._folded(up=False)[1]

    def up_weights(self) -> Tensor | None:
        """Weights V of the up projection, shape (n_neurons, d_in); None if it is not gated."""
        return self._folded(up=True)[0] if self.kind == "gated" else None

    def up_bias(self) -> Tensor | None:
        """Bias c of the up projection, shape (n_neurons,), if there is one."""
        return self._folded(up=True)[1] if self.kind == "gated" else None

    def encode(self, inputs: Tensor) -> Tensor:
        """Compute activations (..., n_neurons) of input vectors (..., d_in) by the formula."""
        drives = [F.linear(inputs, *self._folded(up)) for up in (False, True)[: self._n_drives]]
        return self._of_drives(drives)

    def of_outputs(self, outputs: Sequence[Tensor]) -> Tensor:
        """Compute activations (..., n_neurons) from the outputs of the layers in ``reads``."""
        drives = list(outputs)
        if len(drives) < self._n_drives:
            drives = list(drives[0].chunk(2, dim=-1))
        return self._of_drives(drives)

    @property
    def _n_drives(self) -> int:
        return 2 if self.kind == "gated" else 1

    def _of_drives(self, drives: Sequence[Tensor]) -> Tensor:
        activations = self.act(drives[0])
        return activations * drives[1] if self.kind == "gated" else activations

    def output_directions(self) -> Tensor:
        return linear_weight(self._decoder).T

    def residual_directions(self) -> Tensor:
        return self.output_directions()

    def metadata(self, neurons: Neurons) -> dict[str, Any]:
        # Readers treat a gated site without a known gate as general.
        return {} if self.gain is None else {"folded": True}

    def identity(self, describe: Describe) -> dict[str, Any]:
        return {} if self.gain is None else {"folded": [self.name]}

    def neurons(self) -> Neurons:
        if self.kind == "mlp":
            return super().neurons()
        weights, up_weights, gate_bias, up_bias = (
            np.zeros(self.n_neurons, np.float32) if tensor is None else as_array(tensor)
            for tensor in (self.weights(), self.up_weights(), self.bias(), self.up_bias())
        )
        with torch.no_grad():
            gate = known_gate(lambda grid: as_array(self.act(torch.from_numpy(grid))))
        if gate is None:
            return General(weights, self._gradient)
        return Gated(weights, up_weights, gate_bias, up_bias, gate)

    def _gradient(self, h: Floats, neurons: NDArray[np.integer[Any]]) -> Floats:
        """Gradient of each neuron's activation in the vector of the same row."""
        device = self.weights().device
        rows = torch.from_numpy(neurons).to(device)

        def activations(vectors: Tensor) -> Tensor:
            drives = []
            for up in (False, True):
                weight, bias = self._folded(up)
                drive = (vectors * weight[rows].float()).sum(dim=1)
                drives.append(drive if bias is None else drive + bias[rows].float())
            return self._of_drives(drives)

        return as_array(activation_gradient(activations, torch.from_numpy(h).to(device)))
