"""Sites: the layers of neurons in a model, and how each kind of layer is read."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.capture.activation import Activation
from polyseme.errors import SiteError, one_of


@dataclass(frozen=True)
class Reading:
    """What one batch did to a site.

    Attributes
    ----------
    activations : Tensor, shape (B, n_neurons)
        Each neuron's activation in each input, at the place where it is strongest.
    positions : Tensor of int64, shape (B, n_neurons)
        That place: a flat index into the layer's spatial or sequence positions.
    """

    activations: Tensor
    positions: Tensor


class Site(ABC):
    """A layer of neurons in a model.

    Attributes
    ----------
    name : str
        Name of the module, as in ``model.named_modules()``.
    kind : str
        "linear", "conv" or "sae".
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

    def read(self, output: Tensor) -> Reading:
        """Activations from the output of `output_module`."""
        return _strongest(self.flatten(self.activation(output)))


def _strongest(activations: Tensor) -> Reading:
    if activations.shape[1] == 1:
        flat = activations[:, 0]
        return Reading(flat, torch.zeros(flat.shape, dtype=torch.int64, device=flat.device))
    values, positions = activations.max(dim=1)
    return Reading(values, positions)


def _flat_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


class LinearSite(Site):
    """`torch.nn.Linear`, or the transposed linear layer of GPT-2 in transformers (`Conv1D`)."""

    kind = "linear"

    def __init__(self, name: str, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self._transposed = not isinstance(module, nn.Linear)
        n_neurons, d_in = weight.shape[::-1] if self._transposed else weight.shape
        super().__init__(name, module, n_neurons, d_in)

    def weights(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self._transposed else weight.detach()

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


class SAESite(Site):
    """A sparse autoencoder: any module with an encoder weight.

    Either a linear ``encoder`` (with a linear ``decoder``, if there is one), or a parameter
    ``W_enc`` of shape (d_in, d_sae) with an ``encode`` method. Its input vector is what the
    module is called with, with no decoder bias taken off; its activations are what reaches the
    decoder.
    """

    kind = "sae"

    def __init__(self, name: str, module: nn.Module) -> None:
        self._encoder = LinearSite(name, encoder) if (encoder := _encoder(module)) else None
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

    def flatten(self, output: Tensor) -> Tensor:
        return _flat_rows(output)

    def gather(self, inputs: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return _flat_rows(inputs)[rows, places]

    def encode(self, inputs: Tensor) -> Tensor:
        """Activations of an SAE without a decoder module, by its own ``encode``."""
        encode: Any = self.module.encode
        encoded: Tensor = encode(inputs)
        return encoded

    def read_activations(self, activations: Tensor) -> Reading:
        """Reading from the activations themselves."""
        return _strongest(_flat_rows(activations))


def _encoder(module: nn.Module) -> nn.Module | None:
    encoder = getattr(module, "encoder", None)
    return encoder if isinstance(encoder, nn.Module) and _is_linear(encoder) else None


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D, told by its look so that transformers need not be imported.
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D"
        and isinstance(getattr(module, "weight", None), Tensor)
        and hasattr(module, "nf")
    )


def _is_sae(module: nn.Module) -> bool:
    if (encoder := _encoder(module)) is not None:
        decoder = getattr(module, "decoder", None)
        if isinstance(decoder, nn.Module) and _is_linear(decoder):
            read, write = LinearSite("", encoder), LinearSite("", decoder)
            return (read.n_neurons, read.d_in) == (write.d_in, write.n_neurons)
        return decoder is None and callable(getattr(module, "encode", None))
    weight = getattr(module, "W_enc", None)
    return (
        isinstance(weight, Tensor)
        and weight.ndim == 2
        and callable(getattr(module, "encode", None))
    )


def _site(name: str, module: nn.Module) -> Site | None:
    if _is_sae(module):
        return SAESite(name, module)
    if _is_linear(module):
        return LinearSite(name, module)
    if isinstance(module, nn.Conv2d):
        return ConvSite(name, module)
    return None


def list_sites(model: nn.Module) -> list[Site]:
    """Every layer of a model whose neurons can be analysed, in the order of its modules.

    An SAE counts as one site; a model that is an SAE goes by the name of its encoder.
    """
    sites: list[Site] = []
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        site = _site(name, module)
        if site is None:
            continue
        if isinstance(site, SAESite):
            inside.append(f"{name}." if name else "")
            site.name = name or ("encoder" if _encoder(module) is not None else "W_enc")
        sites.append(site)
    return sites


def find_sites(model: nn.Module, names: str | Site | Iterable[str | Site]) -> list[Site]:
    """Sites of a model by name or by glob, in the order of the model's modules.

    Parameters
    ----------
    model : torch.nn.Module
    names : str, Site, or a list of them
        Names of modules, or globs over them, such as ``"features.*"``. The encoder of an SAE
        stands for the SAE.

    Raises
    ------
    SiteError
        For a name that the model does not have, or whose module has no neurons of its own.
    """
    known = list_sites(model)
    if isinstance(names, str | Site):
        names = [names]
    found: dict[str, Site] = {}
    wanted = list(names) if isinstance(names, Iterable) else [names]
    for name in wanted:
        if not isinstance(name, str | Site):
            raise SiteError(
                f"sites holds a {type(name).__name__} ({str(name)[:60]!r}); names of layers, as "
                f"text, are expected. {_choices(known)}"
            )
    for name in wanted:
        for site in [name] if isinstance(name, Site) else _match(model, known, name):
            if all(site.module is not other.module for other in found.values()):
                found[site.name] = site
    if not found:
        raise SiteError(f"sites is {wanted!r}, which names no site. {_choices(known)}")
    order = {id(module): number for number, (_, module) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda site: order.get(id(site.module), len(order)))


def _choices(known: list[Site]) -> str:
    names = ", ".join(site.name for site in known[:12])
    more = f", … ({len(known)} in all)" if len(known) > 12 else ""
    if not known:
        return "The model has no layer that polyseme knows: Linear, Conv1D, Conv2d or an SAE."
    return f"The model's sites are: {names}{more}."


def _match(model: nn.Module, known: list[Site], name: str) -> list[Site]:
    by_name = {site.name: site for site in known}
    if name in by_name:
        return [by_name[name]]
    modules = dict(model.named_modules())
    if any(sign in name for sign in "*?["):
        matches = [site for site in known if fnmatch.fnmatchcase(site.name, name)]
        if not matches:
            raise SiteError(f"No site matches {name!r}. {_choices(known)}")
        return matches
    if name in modules and name:
        head = name.rpartition(".")[0]
        parent = modules[head]
        if _is_sae(parent) and _encoder(parent) is modules[name]:
            return [SAESite(name, parent)]
        if (site := _site(name, modules[name])) is not None:
            return [site]
        inside = [site.name for site in known if site.name.startswith(f"{name}.")]
        remedy = f"Layers inside it are: {', '.join(inside[:8])}." if inside else _choices(known)
        raise SiteError(
            f"{name!r} is a {type(modules[name]).__name__}, which has no neurons of its own. "
            f"{remedy}"
        )
    raise SiteError(one_of("site", name, by_name))
