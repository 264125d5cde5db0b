"""SAEs as sites: a linear encoder and decoder, or parameters with an encode method."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from polyseme.core import Neurons
from polyseme.errors import SiteError
from polyseme.sites.activation import tensors_in, tolerance
from polyseme.sites.hookpoints import HookPoint
from polyseme.sites.layers import ConvSite, LinearSite, base_layer, is_linear, linear_weight
from polyseme.sites.seen import Seen, deviation, difference, percent
from polyseme.sites.site import Describe, HiddenSite, Site, as_array

# The published threshold for SAE neurons.
_THRESHOLD = 0.05
# Number of active latents whose slopes are checked.
_N_SLOPES = 8


class SAESite(HiddenSite):
    """A sparse autoencoder: any module with an encoder weight, inside a model or attached to one.

    Either a linear ``encoder`` with a linear ``decoder``, or a parameter ``W_enc`` of shape
    (d_in, d_sae) with an ``encode`` method. Its input vector is what its weights multiply, without
    subtracting the decoder bias: the module's own input, unless it has a norm of its own before the
    encoder. Its activations are the decoder's input, if each depends only on its own latent;
    otherwise the module is not an SAE, and its encoder is read as a linear layer.

    Parameters
    ----------
    name : str
    module : torch.nn.Module
    point : HookPoint, optional
        Hook point of an attached SAE that is not part of the model, which runs unchanged. The SAE
        is read through ``W_enc`` and ``encode``, see `polyseme.sites.attach_sae`.
    centred : bool
        Whether the SAE reads the vectors there minus their mean over coordinates.
    """

    kind = "sae"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        point: HookPoint | None = None,
        *,
        centred: bool = False,
    ) -> None:
        encoder = sae_encoder(module) if point is None else None
        self._encoder = LinearSite(name, encoder) if encoder is not None else None
        if self._encoder is None:
            d_in, n_neurons = _parameter(module).shape
        else:
            d_in, n_neurons = self._encoder.d_in, self._encoder.n_neurons
        if point is not None and d_in != point.width:
            raise SiteError(
                f"The SAE reads vectors of length {d_in}, but those at {point.name!r} have length "
                f"{point.width}; give the hook point that it was trained on."
            )
        super().__init__(name, module, int(n_neurons), int(d_in))
        self.point = point
        self.centred = centred
        #: Whether the input vectors are the module's own input.
        self._reads_whole = True
        #: What is taken off them before they reach the encoder.
        self._offset: Tensor | None = None

    @property
    def hidden(self) -> HiddenSite | None:
        return self if self.kind == "sae" else None

    @property
    def has_chain(self) -> bool:
        return self.point is None

    @property
    def tests_slopes(self) -> bool:
        return self.decoder is not None

    @property
    def decoder(self) -> nn.Module | None:
        """Module of the model that takes the activations, if there is one."""
        decoder = getattr(self.module, "decoder", None)
        here = self.point is None and self.kind == "sae"
        return decoder if here and isinstance(decoder, nn.Module) else None

    @property
    def whole_module(self) -> nn.Module:
        return self.module if self.point is None else self.point.module

    @property
    def output_module(self) -> nn.Module:
        return self._encoder.module if self._encoder else self.whole_module

    @property
    def input_module(self) -> nn.Module:
        return self.output_module if self._encoder and not self._reads_whole else self.whole_module

    @property
    def last_module(self) -> nn.Module:
        return self.whole_module if self._reads_whole else self.decoder or self.output_module

    @property
    def reads_output(self) -> bool:
        return self.point is not None and self.point.of_output

    @property
    def called_once(self) -> list[nn.Module]:
        return [self.output_module]

    def weights(self) -> Tensor:
        if self._encoder:
            return self._encoder.weights()
        return _parameter(self.module).detach().T

    def encode(self, inputs: Tensor) -> Tensor:
        return dense(self._encode(self._handed(inputs))).to(inputs.device)

    def _encode(self, handed: Tensor) -> Tensor:
        encode: Any = self.module.encode
        latents: Tensor = encode(handed)
        return latents

    def _handed(self, inputs: Tensor) -> Tensor:
        """Convert vectors from the model to the input of ``encode``."""
        if self.point is None:
            return inputs
        weight = _parameter(self.module)
        handed = self._as_read(inputs).to(weight.device, weight.dtype)
        # SAELens takes heads and their coordinates on two axes, and flattens them.
        joins_heads = getattr(self.module, "hook_z_reshaping_mode", False)
        return handed[..., None, :] if joins_heads else handed

    def _as_read(self, vectors: Tensor) -> Tensor:
        return vectors - vectors.mean(dim=-1, keepdim=True) if self.centred else vectors

    def layer_output(self, inputs: Tensor, output: Any) -> Tensor:
        return super().layer_output(inputs, output) if self._encoder else self.encode(inputs)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        if self._encoder is None and not self._reads_whole:
            handed = self._handed(inputs)
            read = watched_encode(self._encode, _parameter(self.module), handed)[1]
            return super().gather(read, rows, places)
        vectors = self._as_read(super().gather(inputs, rows, places))
        return vectors if self._offset is None else vectors + self._offset

    def default_threshold(self, data: Literal["images", "texts"]) -> float:
        return _THRESHOLD if self.kind == "sae" else super().default_threshold(data)

    def output_directions(self) -> Tensor:
        decoder = self.decoder
        if decoder is not None and is_linear(decoder):
            return linear_weight(decoder).T
        weight = getattr(self.module, "W_dec", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and len(weight) == self.n_neurons:
            return weight.detach()
        return super().output_directions()

    def residual_directions(self) -> Tensor | None:
        if self.point is None:
            return None
        with contextlib.suppress(SiteError):
            directions = self.output_directions()
            if directions.shape[1] == self.d_in:
                return self.point.written(directions)
        return None

    def metadata(self, neurons: Neurons) -> dict[str, Any]:
        return {} if self.point is None else {"hook": self.point.name}

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        with contextlib.suppress(SiteError):  # an SAE may lack a decoder
            return {"decoder": as_array(self.output_directions())} if self.kind == "sae" else {}
        return {}

    def identity(self, describe: Describe) -> dict[str, Any]:
        if self.point is None:
            return {}
        description = describe(self.module, self.encode, self.d_in)
        return {"saes": {self.name: {"hook": self.point.name, **description}}}

    def prove(self, runs: Sequence[Seen]) -> None:
        if self._encoder is None:
            handed = [replace(run, inputs=self._handed(run.inputs)) for run in runs]
            weight = _parameter(self.module)
            self._reads_whole = prove_encode(self.name, self._encode, weight, handed)
            return
        self._encoder.prove(
            [
                Seen(r.n_inputs, r.encoded, r.output, again=r.again)
                for r in runs
                if r.encoded is not None
            ]
        )
        if self.kind == "sae" and not all(self._is_sae(run) for run in runs):
            self.kind = "linear"
        self._reads_whole = all(run.called and _is_shifted(run) for run in runs)
        self._offset = None
        if not self._reads_whole and self.kind == "sae":
            offsets = [run.taken_off for run in runs]
            if all(offset is not None for offset in offsets):
                self._offset = offsets[0]

    def _is_sae(self, run: Seen) -> bool:
        """Whether each activation that reaches the decoder depends only on its own latent."""
        reached = run.activations
        return reached is not None and reached.shape == run.output.shape and run.own_latents


def _is_shifted(run: Seen) -> bool:
    """Whether the encoder's input was the module's input minus a constant vector."""
    if run.encoded is None or run.inputs.shape != run.encoded.shape:
        return False
    less = (run.inputs - run.encoded).reshape(-1, run.inputs.shape[-1])
    far = (less - less[0]).abs().amax(dim=0)
    size = run.inputs.abs().max() + run.encoded.abs().max()
    return bool((far <= tolerance(run.inputs) * size).all())


def _parameter(module: nn.Module) -> Tensor:
    """An SAE's encoder weight as a parameter, (d_in, d_sae)."""
    weight = module.W_enc
    assert isinstance(weight, Tensor)
    return weight


def sae_encoder(module: nn.Module) -> nn.Module | None:
    """An SAE's linear encoder layer, if it has one."""
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and is_linear(encoder) else None


def may_be_sae(module: nn.Module) -> bool:
    """Whether a module looks like an SAE (see `SAESite`); its runs prove whether it is one."""
    if (encoder := sae_encoder(module)) is not None:
        decoder = getattr(module, "decoder", None)
        if not isinstance(decoder, nn.Module) or not is_linear(decoder):
            return False
        return linear_weight(encoder).shape == linear_weight(decoder).shape[::-1]
    weight = getattr(module, "W_enc", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and callable(getattr(module, "encode", None))
    )


def layer_site(name: str, module: nn.Module) -> Site | None:
    """The site made by a single module, if it makes one."""
    if may_be_sae(module):
        return SAESite(name, module)
    if is_linear(module) or base_layer(module) is not None:
        return LinearSite(name, module)
    if isinstance(module, nn.Conv2d):
        return ConvSite(name, module)
    return None


class _Operand(TorchFunctionMode):
    """Captures the operand that a weight multiplies, and the product."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self._made: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self.operand: Tensor | None = None
        self.result: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.operand is not None or not isinstance(result, Tensor):
            return result
        tensors = tensors_in((args, kwargs or {}))
        rest = [tensor for tensor in tensors if not self._is_weight(tensor)]
        vectors = [
            tensor
            for tensor in rest
            if tensor.shape == (*result.shape[:-1], self._weight.shape[0]) and result.ndim > 1
        ]
        if len(rest) < len(tensors) and vectors and result.shape[-1] == self._weight.shape[1]:
            self.operand, self.result = vectors[0], result
        else:
            self._made[id(result)] = (result, tensors)
        return result

    def _is_weight(self, tensor: Tensor) -> bool:
        weight = self._weight
        return tensor.data_ptr() == weight.data_ptr() and tensor.numel() == weight.numel()

    def before_bias(self) -> Tensor | None:
        """The operand before a constant vector was subtracted from it."""
        if self.operand is None:
            return None
        _, operands = self._made.get(id(self.operand), (None, []))
        whole = [t for t in operands if t.shape == self.operand.shape and t is not self.operand]
        same = [t for t in operands if t.shape == self.operand.shape[-1:]]
        if len(whole) == 1 and len(same) == 1:
            shifted = whole[0] - same[0].to(whole[0].dtype)
            if difference(shifted, self.operand) <= tolerance(self.operand):
                return whole[0]
        return self.operand


def watched_encode(
    encode: Callable[[Tensor], Tensor], weight: Tensor, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents of an SAE, the vectors that its weights multiply, and the product.

    The vectors are those before a decoder bias is subtracted. If no product with the weight is
    observed, they are ``inputs``, and the product is None.
    """
    with _Operand(weight) as seen:
        latents = encode(inputs)
    vectors = seen.before_bias()
    return latents, inputs if vectors is None else vectors, seen.result


def prove_encode(
    name: str, encode: Callable[[Tensor], Tensor], weight: Tensor, runs: Sequence[Seen]
) -> bool:
    """Check that an SAE's latents follow from its weights times the gathered vectors.

    Returns
    -------
    bool
        Whether the vectors that the weights multiply are the inputs of ``encode``.

    Raises
    ------
    SiteError
        If they do not, or if these latents are not what reaches the decoder.
    """
    whole = True
    for run in runs:
        inputs = run.inputs.detach().requires_grad_()
        with torch.enable_grad():
            latents, vectors, product = watched_encode(encode, weight, inputs)
        limit = tolerance(latents)
        w = weight.detach().T
        error = _slope_error(latents, vectors, w, unknown=float("inf") if product is None else 0.0)
        if product is not None:
            rows = [tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in (vectors, product)]
            error = max(error, deviation(rows[0], w, rows[1]))
        if not error <= limit:
            raise SiteError(
                f"SAE {name!r} cannot be read: its latents are not elementwise functions of its "
                f"weights times its input plus a constant (off by {percent(error)}); expected an "
                f"SAE whose encode() multiplies by W_enc."
            )
        latents = dense(latents)
        if run.activations is not None:
            error = difference(latents.detach(), run.activations.reshape(latents.shape))
            if not error <= 10 * limit:
                raise SiteError(
                    f"SAE {name!r} cannot be read: its decoder's input is not the output of its "
                    f"encode() (off by {percent(error)})."
                )
        whole &= vectors.shape == inputs.shape and difference(vectors, inputs) <= limit
    return whole


def dense(latents: Tensor) -> Tensor:
    """Convert possibly sparse latents to a dense tensor."""
    return latents if latents.layout == torch.strided else latents.to_dense()


@torch.enable_grad()
def rests_on_own(activations: Tensor, latents: Tensor) -> bool:
    """Whether a sample of active activations has a gradient in their own latents only.

    Parameters
    ----------
    activations, latents : Tensor of the same shape
        The first computed from the second, with a graph.
    """
    for index in _spread(activations.detach().reshape(-1).nonzero()[:, 0]).tolist():
        slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
            activations.reshape(-1)[index], latents, retain_graph=True, allow_unused=True
        )
        if (slope := slopes[0]) is None:
            return False
        others = slope.reshape(-1).clone()
        others[index] = 0
        if bool((others.abs() > 1e-6 * slope.abs().max()).any()):
            return False
    return True


@torch.enable_grad()
def _slope_error(latents: Tensor, vectors: Tensor, weights: Tensor, unknown: float) -> float:
    """Deviation of some active latents' gradients from the direction of their weights."""
    latents = dense(latents)
    if not (latents.requires_grad and vectors.requires_grad):
        return unknown
    flat = latents.reshape(-1, latents.shape[-1])
    worst = 0.0
    for row, latent in _spread(flat.detach().nonzero()).tolist():
        slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
            flat[row, latent], vectors, retain_graph=True, allow_unused=True
        )
        if (slope := slopes[0]) is None:
            return unknown
        direction = slope.reshape(-1, slope.shape[-1])[row].float()
        cosine = torch.cosine_similarity(direction, weights[latent].float(), dim=0)
        worst = max(worst, 1 - float(cosine))
    return worst


def _spread(places: Tensor) -> Tensor:
    """An evenly spaced selection of the places."""
    return places[torch.linspace(0, len(places) - 1, min(len(places), _N_SLOPES)).long()]
