"""The layers of neurons in a model, and how each kind of layer is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.capture.activation import Activation
from polyseme.capture.reading import Counted, Reading, strongest
from polyseme.errors import InputError


class Site(ABC):
    """A layer of neurons in a model.

    Attributes
    ----------
    name : str
        Name of the module, as in ``model.named_modules()``.
    kind : str
        "linear", "conv", "sae", "mlp" or "gated".
    module : torch.nn.Module
        The layer itself.
    n_neurons, d_in : int
        Number of neurons, and length of the vector that each of them reads.
    activation : Activation
        What the model applies to the layer's output.
    """

    kind: str
    n_groups = 1

    def __init__(self, name: str, module: nn.Module, n_neurons: int, d_in: int) -> None:
        self.name = name
        self.module = module
        self.n_neurons = n_neurons
        self.d_in = d_in
        self.activation = Activation()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.n_neurons} neurons × {self.d_in})"

    @property
    def output_module(self) -> nn.Module:
        """Module whose output the nonlinearity acts on."""
        return self.module

    def look(self, output: Tensor) -> None:  # noqa: B027 - most need not
        """Learn from the output of a batch what the module alone does not tell."""

    @abstractmethod
    def weights(self) -> Tensor:
        """Input weights of the neurons, shape (n_neurons, d_in), detached."""

    @abstractmethod
    def flatten(self, output: Tensor) -> Tensor:
        """The layer's output with one axis of positions: shape (B, positions, n_neurons)."""

    @abstractmethod
    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Pre-neuron embeddings: what the layer multiplied by its weights.

        Parameters
        ----------
        inputs : Tensor, shape (B, ...)
            What the module was called with.
        rows : Tensor of int64, shape (m,)
            Which input of the batch.
        places : Tensor of int64, shape (m,)
            ``position * n_groups + group``, see `place`.

        Returns
        -------
        Tensor, shape (m, d_in)
        """

    def place(self, positions: Tensor, neurons: Tensor) -> Tensor:
        """Where a neuron reads at a position: neurons of one group read the same vector there."""
        return positions * self.n_groups + neurons * self.n_groups // self.n_neurons

    def embeddings(self, vectors: Any, neurons: Any) -> Tensor:
        """Neuron embeddings: how each input vector met its neuron's weights.

        Parameters
        ----------
        vectors : array or Tensor of float, shape (m, d_in)
            Pre-neuron embeddings, as `gather` gives them.
        neurons : array or Tensor of int, shape (m,)
            The neuron that read each of them.

        Returns
        -------
        Tensor of float32, shape (m, d_in)
            On the device of ``vectors``.

        Raises
        ------
        InputError
            If the shapes do not fit.
        """
        h, which = torch.as_tensor(vectors), torch.as_tensor(neurons)
        if h.shape != (len(which), self.d_in) or which.ndim != 1:
            raise InputError(
                f"vectors has shape {tuple(h.shape)} and neurons {tuple(which.shape)}; "
                f"(m, {self.d_in}) and (m,) are expected at site {self.name!r}."
            )
        found = torch.empty(h.shape, dtype=torch.float32, device=h.device)
        device = self.weights().device
        for at in range(0, len(h), _CHUNK):
            part = slice(at, at + _CHUNK)
            found[part] = self._embeddings(h[part].to(device).float(), which[part].to(device))
        return found

    def _embeddings(self, vectors: Tensor, neurons: Tensor) -> Tensor:
        return vectors * self.weights()[neurons]

    def read(self, output: Tensor, counted: Counted | None = None) -> Reading:
        """Activations from the output of `output_module`.

        Parameters
        ----------
        output : Tensor, shape (B, ...)
        counted : Counted, optional
            Positions that count; all of them without it.
        """
        return strongest(self.flatten(self.activation(output)), counted)


# Rows of embeddings made at a time, so that the weights picked for them stay small.
_CHUNK = 4096


def _flat_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


class LinearSite(Site):
    """`torch.nn.Linear`, or the transposed linear layer of GPT-2 in transformers (`Conv1D`)."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        n_neurons, d_in = linear_weight(module).shape
        super().__init__(name, module, n_neurons, d_in)

    def weights(self) -> Tensor:
        return linear_weight(self.module)

    def flatten(self, output: Tensor) -> Tensor:
        return _flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return _flat_rows(inputs)[rows, places]


class ConvSite(Site):
    """`torch.nn.Conv2d`: a neuron is a channel, an input vector the patch that it reads.

    The vector holds the patch's values as the kernel does: channel, row, column.
    """

    kind = "conv"

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module, module.out_channels, module.weight[0].numel())
        self.n_groups = module.groups
        #: Rows and columns of positions, once the layer has run.
        self.grid: tuple[int, int] | None = None

    def look(self, output: Tensor) -> None:
        self.grid = output.shape[2], output.shape[3]

    def weights(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1)

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
            # A view: no patch is copied but those that are asked for.
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


class HiddenSite(Site):
    """A hidden layer that is read between its input and its decoder.

    Its input vectors are what ``input_module`` is called with, its activations what reaches
    ``decoder``: nothing has to be found out about what the model does in between.
    """

    @property
    def input_module(self) -> nn.Module:
        """Module that is called with the input vectors."""
        return self.module

    @property
    @abstractmethod
    def decoder(self) -> nn.Module | None:
        """Module that the activations go into, where there is one."""

    @property
    def reads_output(self) -> bool:
        """Whether the input vectors are what that module returns, not what it is given."""
        return False

    @property
    def last_module(self) -> nn.Module:
        """Module that has been called when the activations are known."""
        return self.module

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Activations (..., n_neurons) of input vectors (..., d_in)."""

    def flatten(self, output: Tensor) -> Tensor:
        return _flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return _flat_rows(inputs)[rows, places]

    def read_activations(self, activations: Tensor, counted: Counted | None = None) -> Reading:
        """Reading from the activations themselves; ``counted`` as in `read`."""
        return strongest(_flat_rows(activations), counted)


class SAESite(HiddenSite):
    """A sparse autoencoder: any module with an encoder weight.

    Either a linear ``encoder`` (with a linear ``decoder``, if there is one), or a parameter
    ``W_enc`` of shape (d_in, d_sae) with an ``encode`` method. Its input vector is what the
    module is called with, with no decoder bias taken off; its activations are what reaches the
    decoder.
    """

    kind = "sae"

    def __init__(self, name: str, module: nn.Module) -> None:
        self._encoder = LinearSite(name, encoder) if (encoder := sae_encoder(module)) else None
        if self._encoder:
            n_neurons, d_in = self._encoder.n_neurons, self._encoder.d_in
        else:
            weight = module.W_enc
            assert isinstance(weight, Tensor)
            d_in, n_neurons = weight.shape
        super().__init__(name, module, n_neurons, d_in)

    @property
    def decoder(self) -> nn.Module | None:
        """Module that the activations go into, where there is one."""
        decoder = getattr(self.module, "decoder", None)
        return decoder if isinstance(decoder, nn.Module) else None

    @property
    def output_module(self) -> nn.Module:
        return self._encoder.module if self._encoder else self.module

    def weights(self) -> Tensor:
        if self._encoder:
            return self._encoder.weights()
        weight = self.module.W_enc
        assert isinstance(weight, Tensor)
        return weight.detach().T

    def encode(self, inputs: Tensor) -> Tensor:
        """Activations of an SAE without a decoder module, by its own ``encode``."""
        encode: Any = self.module.encode
        encoded: Tensor = encode(inputs)
        return encoded


def sae_encoder(module: nn.Module) -> nn.Module | None:
    """The linear layer that is an SAE's encoder, where it has one."""
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and is_linear(encoder) else None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is `torch.nn.Linear` or transformers' `Conv1D`."""
    # transformers' Conv1D, told by its look so that transformers need not be imported.
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


def is_sae(module: nn.Module) -> bool:
    """Whether a module is an SAE, see `SAESite`."""
    if (encoder := sae_encoder(module)) is not None:
        decoder = getattr(module, "decoder", None)
        if isinstance(decoder, nn.Module) and is_linear(decoder):
            read, write = LinearSite("", encoder), LinearSite("", decoder)
            return (read.n_neurons, read.d_in) == (write.d_in, write.n_neurons)
        return decoder is None and callable(getattr(module, "encode", None))
    weight = getattr(module, "W_enc", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and callable(getattr(module, "encode", None))
    )


def layer_site(name: str, module: nn.Module) -> Site | None:
    """The site that a module is by itself, if it is one."""
    if is_sae(module):
        return SAESite(name, module)
    if is_linear(module):
        return LinearSite(name, module)
    if isinstance(module, nn.Conv2d):
        return ConvSite(name, module)
    return None
