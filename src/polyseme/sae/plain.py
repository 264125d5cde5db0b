"""Plain SAEs: two linear layers, read from a state dict with a named encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.errors import InputError, one_of
from polyseme.sae.formats import NO_TRANSCODERS, Formula, formula_of
from polyseme.sae.untrusted_files import as_floats, read_tensors

ACTIVATIONS = ("relu", "topk", "jumprelu")

# Possible names of the four tensors, after any prefix.
_NAMES = {
    "encoder weight": ("encoder.weight", "W_enc", "w_enc"),
    "encoder bias": ("encoder.bias", "b_enc", "latent_bias"),
    "decoder weight": ("decoder.weight", "W_dec", "w_dec"),
    "decoder bias": ("decoder.bias", "b_dec", "pre_bias", "bias"),
}
# Tensors of other architectures, each refused with its own message.
_GATED = "a gated SAE, which polyseme reads only from a SAELens folder. Convert it to one"
_SKIP = f"a transcoder with a skip connection. {NO_TRANSCODERS}"
_OTHERS = dict.fromkeys(("r_mag", "gate_bias", "mag_bias", "b_gate", "b_mag"), _GATED)
_OTHERS |= dict.fromkeys(("W_skip", "affine_skip_connection"), _SKIP)
# Other tensors allowed beside encoder and decoder: dictionary_learning saves k and a shared
# threshold for both of its top-k SAEs, and reads one of them.
_BESIDES: dict[str, set[str]] = {"relu": set(), "topk": {"k", "threshold"}}
_BESIDES["jumprelu"] = {"k", "threshold", "group_sizes"}


class TopKActivation(nn.Module):
    """The k largest pre-activations of each input, if positive."""

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
        Maps pre-activations to activations.
    apply_b_dec_to_input : bool
        Whether the decoder bias is subtracted from the input.
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
        """Encoder weight in SAELens's layout, (d_in, d_sae)."""
        return self.encoder.weight.T

    @property
    def W_dec(self) -> Tensor:
        """Decoder weight in SAELens's layout, (d_sae, d_in)."""
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
        """Tensors by their SAELens names: W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in), ..."""
        tensors = {"W_enc": self.encoder.weight.T, "b_enc": self.encoder.bias}
        tensors |= {"W_dec": self.decoder.weight.T, "b_dec": self.decoder.bias}
        if isinstance(self.activation, JumpReLU):
            tensors["threshold"] = self.activation.threshold
        return {name: tensor.detach() for name, tensor in tensors.items()}


def read_plain(
    file: Path,
    *,
    prefix: str | None = None,
    activation: str | None = None,
    k: int | None = None,
    apply_b_dec_to_input: bool | None = None,
) -> PlainSAE:
    """Read an SAE from a state dict file; see `polyseme.sae.load_sae` for the parameters.

    Raises
    ------
    InputError
        The file is damaged or lacks a tensor, its tensors do not match, or what the SAE computes is
        ambiguous.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(one_of("activation", str(activation), ACTIVATIONS))
    if not isinstance(apply_b_dec_to_input, bool | None):
        raise InputError(
            f"apply_b_dec_to_input is {apply_b_dec_to_input!r}; expected True or False."
        )
    tensors = read_tensors(file)
    if prefix is None:
        prefix = _prefix(tensors, file)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    # The tensors with the prefix, by the rest of their names.
    besides = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    for name, refusal in _OTHERS.items():
        if name in besides:
            raise InputError(f"{file} holds {prefix + name!r}: it is {refusal}.")
    names = {role: _find(tensors, prefix, role, file) for role in _NAMES}
    known = formula_of(file, besides)
    formula = known or _as_given(activation, apply_b_dec_to_input, besides, file)
    options = {"activation": activation, "apply_b_dec_to_input": apply_b_dec_to_input}
    for option, value in options.items():
        if value is not None and value != (stated := getattr(formula, option)):
            raise InputError(
                f"{option} is {value!r}, but by {formula.said_by} it is {stated!r}. Leave it out."
            )
    encoder, decoder = _layers(tensors, names, file, by_custom=known is not None)
    for what, actual, stated in (
        ("d_in is", encoder.in_features, formula.d_in),
        ("d_sae is", encoder.out_features, formula.d_sae),
        (
            "decoder's bias is called",
            names["decoder bias"].removeprefix(prefix),
            formula.decoder_bias,
        ),
    ):
        if stated is not None and stated != actual:
            raise InputError(
                f"The {what} {actual} in {file}, but {stated} by {formula.said_by}: the two do not "
                f"belong together. Give the file alone, with activation and apply_b_dec_to_input."
            )
    besides -= {name.removeprefix(prefix) for name in names.values()}
    if unknown := sorted(besides - _BESIDES[formula.activation]):
        raise InputError(
            f"{file} holds {prefix + unknown[0]!r}, which an SAE with activation "
            f"{formula.activation!r} does not have: it is from another architecture, or from the "
            f"model around the SAE. Convert it to a SAELens folder, or save only the SAE's tensors."
        )
    function = _activation(tensors, prefix, formula, k, encoder.out_features, file)
    sae = PlainSAE(encoder, decoder, function, apply_b_dec_to_input=formula.apply_b_dec_to_input)
    return sae.eval()


def _prefix(tensors: Mapping[str, Tensor], file: Path) -> str:
    """The prefix of tensor names of the only SAE in a state dict."""
    prefixes = {
        name.removesuffix(alias)
        for name in tensors
        for role in ("encoder weight", "decoder weight")
        for alias in _NAMES[role]
        if name == alias or name.endswith(f".{alias}")
    }
    if not prefixes:
        raise InputError(
            f"{file} holds no SAE: no tensor is named encoder.weight or W_enc, after any prefix. "
            f"It has: {_listing(tensors)}."
        )
    if len(prefixes) > 1:
        raise InputError(
            f"{file} holds several SAEs. Choose one with prefix, one of: "
            f"{', '.join(repr(name) for name in sorted(prefixes))}."
        )
    return prefixes.pop()


def _as_given(
    activation: str | None, apply_b_dec_to_input: bool | None, besides: set[str], file: Path
) -> Formula:
    if activation is None or apply_b_dec_to_input is None:
        hint = (
            " As it holds k and threshold, it may be from dictionary_learning: its AutoEncoderTopK "
            "is 'topk', its BatchTopKSAE 'jumprelu', and both subtract the bias."
            if besides >= {"k", "threshold"}
            else ""
        )
        raise InputError(
            f"{file} does not say what its SAE computes, and there is no configuration beside it "
            f"that polyseme knows. Give both activation ({', '.join(ACTIVATIONS)}) and "
            f"apply_b_dec_to_input (whether the decoder bias is subtracted from the input), or put "
            f"its library's configuration beside it.{hint}"
        )
    return Formula("what is given", activation, apply_b_dec_to_input)


def _find(tensors: Mapping[str, Tensor], prefix: str, role: str, file: Path) -> str:
    names = [prefix + alias for alias in _NAMES[role]]
    present = [name for name in names if name in tensors]
    if not present:
        raise InputError(
            f"{file} has no {role}; expected a tensor {' or '.join(names)}. It has: "
            f"{_listing(tensors)}."
        )
    return present[0]


def _layers(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], file: Path, *, by_custom: bool
) -> tuple[nn.Linear, nn.Linear]:
    floats = {role: as_floats(tensors[name], name, file) for role, name in names.items()}
    listing = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names.values())
    shapes = [len(floats[role].shape) for role in _NAMES]
    if shapes != [2, 1, 2, 1] or not all(tensor.numel() for tensor in floats.values()):
        raise InputError(
            f"{file} holds {listing}; expected a matrix and a vector each for an encoder and a "
            f"decoder."
        )
    d_sae, d_in = len(floats["encoder bias"]), len(floats["decoder bias"])
    if sorted(floats["decoder weight"].shape) == sorted((d_sae, d_in)):
        read = [*floats["encoder weight"].shape]
        if d_sae in read and d_in not in read:
            read.remove(d_sae)
            raise InputError(
                f"{file} holds {listing}: it reads vectors of length {read[0]} and writes vectors "
                f"of length {d_in}, as a transcoder does. {NO_TRANSCODERS}."
            )
    layers = []
    for part, n_out, n_in in (("encoder", d_sae, d_in), ("decoder", d_in, d_sae)):
        weight, name = floats[f"{part} weight"], names[f"{part} weight"]
        fits = {False: weight.shape == (n_out, n_in), True: weight.shape == (n_in, n_out)}
        if not any(fits.values()):
            raise InputError(
                f"The tensors in {file} do not match: {listing}. By its biases, the SAE has d_in "
                f"{d_in} and d_sae {d_sae}, so {name} should have dimensions {n_out} and {n_in}."
            )
        transposed = fits[True]
        if all(fits.values()):
            transposed = not name.endswith(".weight")
            if transposed and not by_custom:
                raise InputError(
                    f"{name} in {file} is square, so its orientation is ambiguous. Save it as "
                    f"{part}.weight, of shape (outputs, inputs)."
                )
        layer = nn.Linear(n_in, n_out, device="meta")
        layer.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        layer.bias = nn.Parameter(floats[f"{part} bias"])
        layers.append(layer)
    return layers[0], layers[1]


def _activation(
    tensors: Mapping[str, Tensor],
    prefix: str,
    formula: Formula,
    k: int | None,
    d_sae: int,
    file: Path,
) -> nn.Module:
    if formula.activation == "topk":
        return TopKActivation(_k(tensors.get(prefix + "k"), formula, k, d_sae, file))
    if k is not None:
        raise InputError(f"activation is {formula.activation!r} and k is {k!r}. Leave k out.")
    if formula.activation == "relu":
        return nn.ReLU()
    threshold = prefix + "threshold"
    if threshold not in tensors or tensors[threshold].numel() not in (1, d_sae):
        raise InputError(
            f"{file} has no tensor {threshold} of {d_sae} values, which a JumpReLU SAE needs. It "
            f"has: {_listing(tensors)}."
        )
    values = as_floats(tensors[threshold], threshold, file)
    return JumpReLU(values.flatten().expand(d_sae).clone())


def _k(tensor: Tensor | None, formula: Formula, k: int | None, d_sae: int, file: Path) -> int:
    stored: object = tensor
    if tensor is not None and tensor.numel() == 1:
        stored = tensor.item()
    claims = {"the argument": k, formula.said_by: formula.k, f"the tensor k in {file}": stored}
    stated: dict[str, Any] = {by: value for by, value in claims.items() if value is not None}
    for by, value in stated.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= d_sae:
            shown = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(f"k is {shown} by {by}; expected an integer from 1 to d_sae, {d_sae}.")
    if not stated:
        raise InputError("activation is 'topk' but k is None. Give k as well.")
    if len({*stated.values()}) > 1:
        listing = " and ".join(f"{value} by {by}" for by, value in stated.items())
        raise InputError(f"k is {listing}. Leave out the argument, or correct the files.")
    return int(next(iter(stated.values())))


def _listing(tensors: Mapping[str, Tensor], limit: int = 8) -> str:
    names = list(tensors)
    suffix = f", … ({len(names)} in all)" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "no tensors") + suffix
