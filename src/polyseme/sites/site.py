"""What a layer of neurons is: how it is read, edited, embedded, and told of in a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.core import Linear, Neurons
from polyseme.errors import SiteError
from polyseme.sites.activation import Activation, tolerance
from polyseme.sites.reading import PositionMask, Reading, strongest
from polyseme.sites.seen import Seen, difference, percent

Describe = Callable[[nn.Module, Callable[[Tensor], Tensor], int], dict[str, Any]]

# The published threshold for neurons that read pixels; of texts chosen by eye on SmolLM2, see
# docs/features-study.md.
_THRESHOLDS = {"images": 0.2, "texts": 0.5}


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
    #: Axis of the model's activations that its neurons are on.
    neuron_axis = -1

    def __init__(self, name: str, module: nn.Module, n_neurons: int, d_in: int) -> None:
        self.name = name
        self.module = module
        self.n_neurons = n_neurons
        self.d_in = d_in
        self.activation = Activation()
        #: Whether a run of the model has proved what is read of it.
        self.proved = False
        #: Whether it was named by a glob, so that it is left out if the model does not run it.
        self.by_glob = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.n_neurons} neurons × {self.d_in})"

    @property
    def output_module(self) -> nn.Module:
        """Module whose output the nonlinearity acts on."""
        return self.module

    @property
    def hidden(self) -> HiddenSite | None:
        """Itself, where it is read between its input and its decoder; None elsewhere."""
        return None

    @property
    def whole_module(self) -> nn.Module | None:
        """Module whose call begins what is read of a `HiddenSite`."""
        return None

    @property
    def reads_output(self) -> bool:
        """Whether the input vectors are what that module returns, not what it is given."""
        return False

    @property
    def decoder(self) -> nn.Module | None:
        """Module that the activations go into, where that is known."""
        return None

    @property
    def has_chain(self) -> bool:
        """Whether its activations are learned from what the model does with its output."""
        return True

    @property
    def can_be_edited(self) -> bool:
        """Whether the model goes on with its activations, so that another value reaches it."""
        return True

    @property
    def called_once(self) -> list[nn.Module]:
        """Modules that the model must call once for a batch."""
        return [self.output_module]

    @abstractmethod
    def prove(self, runs: Sequence[Seen]) -> None:
        """Check what is read of the site against what two runs of the model have shown.

        Raises
        ------
        SiteError
            What was gathered, times the weights, is not what the layer put out, or the
            activations are not what the model goes on with.
        """

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

    def layer_output(self, inputs: Tensor, output: Any) -> Tensor:
        """What enters its nonlinearity, by a call of `output_module` on ``inputs``."""
        assert isinstance(output, Tensor)
        return output

    def neurons(self) -> Neurons:
        """How its neurons read their input, which says what their embeddings are.

        Made anew at each call, of the weights as they are: whoever asks keeps it.
        """
        return Linear(as_array(self.weights()))

    def default_threshold(self, data: Literal["images", "texts"]) -> float:
        """Cosine distance at which its trees are cut, where none is given."""
        return _THRESHOLDS[data]

    def output_directions(self) -> Tensor:
        """What each neuron writes for an activation of 1, by the layer that reads it.

        Returns
        -------
        Tensor of float, shape (n_neurons, d)
            Detached: a column of an MLP's second weight, a row of an SAE's ``W_dec``.

        Raises
        ------
        SiteError
            For a site that is followed by no decoder.
        """
        raise SiteError(
            f"Site {self.name!r} has neither a linear decoder nor a W_dec of {self.n_neurons} "
            "rows, so what its neurons write is not known; the MLP of a transformer or an SAE is "
            "expected."
        )

    def residual_directions(self) -> Tensor | None:
        """Likewise in the residual stream, (n_neurons, d); None where it does not write there."""
        return None

    def metadata(self, neurons: Neurons) -> dict[str, Any]:
        """What a run says of it in ``sites`` besides name, kind, size, activation and gate."""
        # Readers take the weights for all that there is to an embedding, unless they are told.
        return {"general": True} if neurons.is_general else {}

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """What a run holds of it besides how its neurons read, by the names of the run format."""
        return {}

    def identity(self, describe: Describe) -> dict[str, Any]:
        """What neither its name nor the model's weights tell of it, for a run's fingerprint.

        Parameters
        ----------
        describe : callable
            Describes a module that is not the model's, by its weights and by what the function
            of vectors (m, d) that is handed over with it and d makes of some.

        Returns
        -------
        dict
            Lists or dicts by key of the fingerprint; those of a run's sites are joined.
        """
        return {}


class HiddenSite(Site):
    """A hidden layer that is read between its input and its decoder.

    Its input vectors are what ``input_module`` is called with, its activations what reaches
    ``decoder``: nothing has to be found out about what the model does in between.
    """

    @property
    def hidden(self) -> HiddenSite | None:
        return self

    @property
    def has_chain(self) -> bool:
        return False

    @property
    def can_be_edited(self) -> bool:
        return self.hidden is None or self.decoder is not None

    @property
    def input_module(self) -> nn.Module:
        """Module that is called with the input vectors."""
        return self.module

    @property
    @abstractmethod
    def decoder(self) -> nn.Module | None:
        """Module that the activations go into, where there is one."""

    @property
    def whole_module(self) -> nn.Module:
        """Module whose call begins what is read of it; `input_module`, but for an SAE's parts."""
        return self.input_module

    @property
    def tests_slopes(self) -> bool:
        """Whether it has to be shown that each activation rests on its own neuron alone."""
        return False

    @property
    def last_module(self) -> nn.Module:
        """Module that has been called when the activations are known."""
        return self.module

    @property
    def called_once(self) -> list[nn.Module]:
        return [self.input_module, self.last_module, self.output_module]

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Activations (..., n_neurons) of input vectors (..., d_in)."""

    def prove(self, runs: Sequence[Seen]) -> None:
        for run in runs:
            if run.activations is None:
                continue
            reached = flat_rows(run.activations)
            index = spread(reached.shape[0] * reached.shape[1], 32).to(reached.device)
            rows, places = index // reached.shape[1], index % reached.shape[1]
            with torch.no_grad():
                encoded = self.encode(self.gather(run.inputs, rows, places))
            expected = reached[rows, places]
            error = difference(encoded, expected)
            if not error <= 10 * tolerance(expected):
                raise SiteError(
                    f"Site {self.name!r} cannot be read: the activations that its weights and its "
                    f"nonlinearity give are not what reaches its decoder (off by "
                    f"{percent(error)}). Name its linear layers instead."
                )

    def flatten(self, output: Tensor) -> Tensor:
        return flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return flat_rows(inputs)[rows, places]

    def read_activations(self, activations: Tensor, mask: PositionMask | None = None) -> Reading:
        """Reading from the activations themselves; ``mask`` as in `read`."""
        return strongest(flat_rows(activations), mask)


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor as float32 of the processor's memory, row after row; a view where it is that."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def flat_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def spread(n: int, most: int) -> Tensor:
    """Up to ``most`` numbers below n, evenly spread."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()
