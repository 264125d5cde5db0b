"""A layer of neurons: how it is read, edited, embedded, and described in a run."""

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

# The published threshold for neurons that read pixels; for texts see docs/features-study.md.
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
        Number of neurons, and length of the vector that each reads.
    activation : Activation
        What the model applies to the layer's output.
    """

    kind: str
    n_groups = 1
    #: Axis of neurons in the model's activations.
    neuron_axis = -1

    def __init__(self, name: str, module: nn.Module, n_neurons: int, d_in: int) -> None:
        self.name = name
        self.module = module
        self.n_neurons = n_neurons
        self.d_in = d_in
        self.activation = Activation()
        #: Whether a run of the model has proved the site.
        self.proved = False
        #: Whether a glob matched it, so that it is left out if the model does not run it.
        self.by_glob = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.n_neurons} neurons × {self.d_in})"

    @property
    def output_module(self) -> nn.Module:
        """Module whose output the nonlinearity acts on."""
        return self.module

    @property
    def hidden(self) -> HiddenSite | None:
        """Itself, if it is read between its input and its decoder; otherwise None."""
        return None

    @property
    def whole_module(self) -> nn.Module | None:
        """Module whose call begins a reading of a `HiddenSite`."""
        return None

    @property
    def reads_output(self) -> bool:
        """Whether the input vectors are that module's output rather than its input."""
        return False

    @property
    def decoder(self) -> nn.Module | None:
        """Module that takes the activations, if known."""
        return None

    @property
    def has_chain(self) -> bool:
        """Whether its activation function is learned from the model's calls on its output."""
        return True

    @property
    def can_be_edited(self) -> bool:
        """Whether the model uses its activations, so that edited values have an effect."""
        return True

    @property
    def called_once(self) -> list[nn.Module]:
        """Modules that the model must call exactly once per batch."""
        return [self.output_module]

    @abstractmethod
    def prove(self, runs: Sequence[Seen]) -> None:
        """Check the site against two runs of the model.

        Raises
        ------
        SiteError
            Gathered vectors times the weights are not the layer's output, or the activations are
            not what the next operation receives.
        """

    @abstractmethod
    def weights(self) -> Tensor:
        """Input weights of the neurons, shape (n_neurons, d_in), detached."""

    @abstractmethod
    def flatten(self, output: Tensor) -> Tensor:
        """The layer's output with one axis of positions: shape (B, positions, n_neurons)."""

    @abstractmethod
    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Gather pre-neuron embeddings: the vectors that the layer multiplied by its weights.

        Parameters
        ----------
        inputs : Tensor, shape (B, ...)
            Input of the module.
        rows : Tensor of int64, shape (m,)
            Which input of the batch.
        places : Tensor of int64, shape (m,)
            ``position * n_groups + group``, see `place`.

        Returns
        -------
        Tensor, shape (m, d_in)
        """

    def place(self, positions: Tensor, neurons: Tensor) -> Tensor:
        """Index of the vector a neuron reads at a position; neurons in a group share vectors."""
        return positions * self.n_groups + neurons * self.n_groups // self.n_neurons

    def layer_output(self, inputs: Tensor, output: Any) -> Tensor:
        """Input of its nonlinearity, from a call of `output_module` on ``inputs``."""
        assert isinstance(output, Tensor)
        return output

    def neurons(self) -> Neurons:
        """How its neurons read their input, which defines their embeddings.

        Built from the current weights on every call, so callers should keep it.
        """
        return Linear(as_array(self.weights()))

    def default_threshold(self, data: Literal["images", "texts"]) -> float:
        """Default cosine distance at which its trees are cut."""
        return _THRESHOLDS[data]

    def output_directions(self) -> Tensor:
        """What each neuron writes per unit of activation, through the layer that reads it.

        Returns
        -------
        Tensor of float, shape (n_neurons, d)
            Detached: a column of an MLP's second weight, a row of an SAE's ``W_dec``.

        Raises
        ------
        SiteError
            For a site without a decoder.
        """
        raise SiteError(
            f"Site {self.name!r} has neither a linear decoder nor a W_dec of {self.n_neurons} "
            "rows, so what its neurons write is unknown; the MLP of a transformer or an SAE is "
            "expected."
        )

    def residual_directions(self) -> Tensor | None:
        """Likewise in the residual stream, (n_neurons, d); None if it does not write there."""
        return None

    def metadata(self, neurons: Neurons) -> dict[str, Any]:
        """Its entries in ``sites`` of run.json besides name, kind, size, activation and gate."""
        # Readers assume that weights alone determine embeddings, unless told otherwise.
        return {"general": True} if neurons.is_general else {}

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Its arrays in a run besides those of how its neurons read, by run-format name."""
        return {}

    def identity(self, describe: Describe) -> dict[str, Any]:
        """What neither its name nor the model's weights determine, for a run's fingerprint.

        Parameters
        ----------
        describe : callable
            Describes a module outside the model, given a function of vectors (m, d) and d, by its
            weights and the function's outputs on sample vectors.

        Returns
        -------
        dict
            Lists or dicts by key of the fingerprint; those of a run's sites are joined.
        """
        return {}


class HiddenSite(Site):
    """A hidden layer that is read between its input and its decoder.

    Its input vectors are the input of ``input_module`` and its activations the input of
    ``decoder``, so what the model does in between need not be known.
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
        """Module whose input is the input vectors."""
        return self.module

    @property
    @abstractmethod
    def decoder(self) -> nn.Module | None:
        """Module that takes the activations, if there is one."""

    @property
    def whole_module(self) -> nn.Module:
        """Module whose call begins a reading; `input_module`, except for the parts of an SAE."""
        return self.input_module

    @property
    def tests_slopes(self) -> bool:
        """Whether the proof must show that each activation depends only on its own neuron."""
        return False

    @property
    def last_module(self) -> nn.Module:
        """Module whose return means that the activations are known."""
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
                    f"Site {self.name!r} cannot be read: the activations computed from its weights "
                    f"and nonlinearity are not what reaches its decoder (off by {percent(error)}). "
                    f"Name its linear layers instead."
                )

    def flatten(self, output: Tensor) -> Tensor:
        return flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return flat_rows(inputs)[rows, places]

    def read_activations(self, activations: Tensor, mask: PositionMask | None = None) -> Reading:
        """Make a reading from the activations; ``mask`` as in `read`."""
        return strongest(flat_rows(activations), mask)


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """Convert a tensor to a contiguous float32 array in CPU memory; a view if it already is."""
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())


def flat_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def spread(n: int, most: int) -> Tensor:
    """Up to ``most`` evenly spaced numbers below n."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()
