"""Plain SAEs: two linear layers, read from a state dict with a named encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from polyseme.errors import InputError, one_of

ACTIVATIONS = ("relu", "topk", "jumprelu")

# What the four tensors may be called, after any prefix.
_NAMES = {
    "encoder weight": ("encoder.weight", "W_enc"),
    "encoder bias": ("encoder.bias", "b_enc", "latent_bias"),
    "decoder weight": ("decoder.weight", "W_dec"),
    "decoder bias": ("decoder.bias", "b_dec", "pre_bias", "bias"),
}
_TRANSPOSED = ("W_enc", "W_dec")  # (in, out) by custom; told apart only where d_in is d_sae
_NESTS = ("state_dict", "model_state_dict", "model")


class TopK(nn.Module):
    """The k largest pre-activations of each input, where they are positive."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        values, places = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, places, values.relu())


class JumpReLU(nn.Module):
    """Pre-activations that exceed their latent's threshold."""

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Tensor) -> Tensor:
        return pre.relu() * (pre > self.threshold)


class PlainSAE(nn.Module):
    """An SAE of two linear layers: ``decoder(f(encoder(h - decoder.bias)))``.

    Parameters
    ----------
    encoder, decoder : torch.nn.Linear
    activation : torch.nn.Module
        From pre-activations to activations.
    apply_b_dec_to_input : bool
        Whether the decoder's bias is taken off the input.
    """

    def __init__(
        self,
        encoder: nn.Linear,
        decoder: nn.Linear,
        activation: nn.Module,
        *,
        apply_b_dec_to_input: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.activation = activation
        self.apply_b_dec_to_input = apply_b_dec_to_input

    @property
    def W_enc(self) -> Tensor:
        """Encoder weight as SAELens has it, (d_in, d_sae)."""
        return self.encoder.weight.T

    @property
    def W_dec(self) -> Tensor:
        """Decoder weight as SAELens has it, (d_sae, d_in)."""
        return self.decoder.weight.T

    def encode(self, h: Tensor) -> Tensor:
        """Activations, shape (..., d_sae), of inputs of shape (..., d_in)."""
        h = h - self.decoder.bias if self.apply_b_dec_to_input else h
        activations: Tensor = self.activation(self.encoder(h))
        return activations

    def decode(self, activations: Tensor) -> Tensor:
        """Reconstructions, shape (..., d_in)."""
        rebuilt: Tensor = self.decoder(activations)
        return rebuilt

    def forward(self, h: Tensor) -> Tensor:
        return self.decode(self.encode(h))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by SAELens's names: W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), ..."""
        tensors = {"W_enc": self.encoder.weight.T, "b_enc": self.encoder.bias}
        tensors |= {"W_dec": self.decoder.weight.T, "b_dec": self.decoder.bias}
        if isinstance(self.activation, JumpReLU):
            tensors["threshold"] = self.activation.threshold
        return {name: tensor.detach() for name, tensor in tensors.items()}


def read_plain(
    file: Path,
    *,
    prefix: str | None = None,
    activation: str = "relu",
    k: int | None = None,
    apply_b_dec_to_input: bool = True,
) -> PlainSAE:
    """Read an SAE from the file of a state dict; `polyseme.sae.load_sae` tells the parameters.

    Raises
    ------
    InputError
        The file is damaged, lacks a tensor, or its tensors do not fit each other.
    """
    if activation not in ACTIVATIONS:
        raise InputError(one_of("activation", str(activation), ACTIVATIONS))
    tensors = _read(file)
    if prefix is None:
        prefix = _prefix(tensors, file)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    names = {role: _find(tensors, prefix, role, file) for role in _NAMES}
    encoder, decoder = _layers(tensors, names, file)
    function = _activation(tensors, prefix, set(names.values()), activation, k, encoder, file)
    sae = PlainSAE(encoder, decoder, function, apply_b_dec_to_input=apply_b_dec_to_input)
    return sae.eval()


@contextmanager
def reading_safetensors(file: Path) -> Iterator[None]:
    """Turn what safetensors says of a damaged file into one clear sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({error}). Fetch or save it again."
        ) from error


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        with reading_safetensors(file):
            return load_file(file)
    if file.suffix not in (".pt", ".pth", ".bin"):
        raise InputError(
            f"{file} is neither .safetensors nor .pt, so polyseme does not know how to read it. "
            "Save the state dict as safetensors."
        )
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise InputError(
            f"{file} is truncated, or holds pickled objects besides tensors, and polyseme never "
            "unpickles. Save the state dict alone, best as safetensors."
        ) from error
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}; a state dict is expected.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _prefix(tensors: Mapping[str, Tensor], file: Path) -> str:
    """What stands before the names of the one SAE in a state dict."""
    found = {
        name.removesuffix(alias)
        for name in tensors
        for role in ("encoder weight", "decoder weight")
        for alias in _NAMES[role]
        if name == alias or name.endswith(f".{alias}")
    }
    if not found:
        raise InputError(
            f"{file} holds no SAE: no tensor is called encoder.weight or W_enc, after any prefix. "
            f"It has: {_listing(tensors)}."
        )
    if len(found) > 1:
        raise InputError(
            f"{file} holds several SAEs. Say which by prefix, one of: "
            f"{', '.join(repr(name) for name in sorted(found))}."
        )
    return found.pop()


def _find(tensors: Mapping[str, Tensor], prefix: str, role: str, file: Path) -> str:
    names = [prefix + alias for alias in _NAMES[role]]
    found = [name for name in names if name in tensors]
    if not found:
        raise InputError(
            f"{file} has no {role}: a tensor {' or '.join(names)} is expected. It has: "
            f"{_listing(tensors)}."
        )
    return found[0]


def _layers(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], file: Path
) -> tuple[nn.Linear, nn.Linear]:
    found = {role: _floats(tensors[name], name, file) for role, name in names.items()}
    told = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names.values())
    shapes = [len(found[role].shape) for role in _NAMES]
    if shapes != [2, 1, 2, 1]:
        raise InputError(
            f"{file} holds {told}; two matrices with a vector each are expected, those of an "
            "encoder and a decoder."
        )
    d_sae, d_in = len(found["encoder bias"]), len(found["decoder bias"])
    layers = []
    for part, n_out, n_in in (("encoder", d_sae, d_in), ("decoder", d_in, d_sae)):
        weight, name = found[f"{part} weight"], names[f"{part} weight"]
        fits = {False: weight.shape == (n_out, n_in), True: weight.shape == (n_in, n_out)}
        if not any(fits.values()):
            raise InputError(
                f"The tensors in {file} do not fit each other: {told}. By its biases the SAE has "
                f"d_in {d_in} and d_sae {d_sae}, so {name} should be of {n_out} and {n_in}."
            )
        by_name = name.endswith(_TRANSPOSED)
        transposed = by_name if all(fits.values()) else fits[True]
        layer = nn.Linear(n_in, n_out, device="meta")
        layer.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        layer.bias = nn.Parameter(found[f"{part} bias"])
        layers.append(layer)
    return layers[0], layers[1]


def _activation(
    tensors: Mapping[str, Tensor],
    prefix: str,
    used: set[str],
    activation: str,
    k: int | None,
    encoder: nn.Linear,
    file: Path,
) -> nn.Module:
    d_sae = encoder.out_features
    # What stands beside encoder and decoder, not in a module of its own, belongs to the SAE.
    beside = {
        name
        for name in tensors.keys() - used
        if name.startswith(prefix) and "." not in name[len(prefix) :]
    }
    threshold = prefix + "threshold"
    known = {"topk": {prefix + "k"}, "jumprelu": {threshold}}.get(activation, set())
    if unknown := sorted(beside - known):
        raise InputError(
            f"{file} holds {unknown[0]!r}, which an SAE with activation {activation!r} does not "
            f"have: it is of another architecture. Give its activation ({', '.join(ACTIVATIONS)}), "
            "or convert it to a SAELens folder."
        )
    if (k is not None) != (activation == "topk"):
        remedy = "Give k with it" if k is None else "Leave k out"
        raise InputError(f"activation is {activation!r} and k is {k}. {remedy}.")
    if k is not None:
        if not 0 < k <= d_sae:
            raise InputError(f"k is {k}; at least 1 and at most d_sae, {d_sae}, is expected.")
        return TopK(k)
    if activation == "relu":
        return nn.ReLU()
    if threshold not in tensors or tensors[threshold].numel() not in (1, d_sae):
        raise InputError(
            f"{file} has no tensor {threshold} of {d_sae} values, which a JumpReLU SAE needs. It "
            f"has: {_listing(tensors)}."
        )
    values = _floats(tensors[threshold], threshold, file)
    return JumpReLU(values.flatten().expand(d_sae).clone())


def _floats(tensor: Tensor, name: str, file: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise InputError(f"{name} in {file} holds {tensor.dtype} values; floats are expected.")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{name} in {file} holds NaN or infinity: the SAE did not train.")
    return tensor.to(torch.float32)


def _listing(tensors: Mapping[str, Tensor], limit: int = 8) -> str:
    names = list(tensors)
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "no tensors") + more
