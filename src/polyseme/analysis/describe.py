"""Descriptions of an analysis's settings and model, as JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseme.capture import Selector
from polyseme.errors import InputError
from polyseme.sites import Site, evaluating

# Number of output values compared, and of characters of a module's description kept.
_VALUES, _LONGEST = 256, 300
_NOT_OF_THE_MODEL = frozenset({"transformers_version", "device", "metadata"})


def check_model(model: Any) -> None:
    """Refuse anything but a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module. If it is a function "
            f"that makes one, call it."
        )


def describe_selector(select: Selector) -> dict[str, Any]:
    """Describe a selector by name and settings."""
    fields: dict[str, Any] = dataclasses.asdict(select) if dataclasses.is_dataclass(select) else {}
    return {"name": type(select).__name__, **{k: plain(v) for k, v in fields.items()}}


def plain(value: Any) -> Any:
    """Convert a NumPy number to a Python number."""
    return value.item() if isinstance(value, np.generic) else value


def digest(arrays: Iterable[Any]) -> str:
    """SHA-256 of arrays."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe a model by its class, size and weights."""
    sha = hashlib.sha256()
    count = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        count += tensor.numel()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        sha.update(flat.view(torch.uint8).cpu().numpy().data if flat.numel() else b"")
    return {"class": type(model).__name__, "n_parameters": count, "sha256": sha.hexdigest()}


def behaviour(model: nn.Module, run: Callable[[Any], Any], inputs: Any) -> dict[str, Any]:
    """Describe what a model computes, to distinguish models with the same weights.

    Parameters
    ----------
    model : torch.nn.Module
    run : callable (inputs) -> Tensor, or tensors in mappings and sequences
    inputs : anything
        A few fixed inputs.

    Returns
    -------
    dict
        ``modules``, each module's type and ``extra_repr``, by name; ``config``, if it has one; and
        the outputs' shapes, precision and some values, which reveal what names do not.
    """
    config: Any = getattr(model, "config", None) or getattr(model, "cfg", None)
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        outputs = list(_tensors(run(inputs)))
    precisions = [
        torch.finfo(t.dtype).eps for t in (*outputs, *model.parameters()) if t.is_floating_point()
    ]
    flat = [tensor.detach().double().cpu().flatten() for tensor in outputs]
    values = torch.cat([torch.empty(0).double(), *flat]).nan_to_num(0.0, 0.0, 0.0)
    some = np.linspace(0, max(len(values) - 1, 0), min(len(values), _VALUES)).astype(np.int64)
    return {
        "config": _config(config.to_dict()) if hasattr(config, "to_dict") else None,
        "modules": {name or "(model)": _module(module) for name, module in model.named_modules()},
        "output_shapes": [list(tensor.shape) for tensor in outputs],
        "precision": max(precisions, default=0.0),
        "outputs": [float(f"{value:.8g}") for value in values[some]],
    }


def few_tokens(model: Any, length: int) -> dict[str, NDArray[np.int64]]:
    """Inputs for a language model: a few tokens spread over its vocabulary."""
    n = len(model.get_input_embeddings().weight)
    # Not those at either end, which are often special.
    ids = np.linspace(n // 8, n // 2, 2 * min(8, length)).astype(np.int64).reshape(2, -1)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def few_vectors(d_in: int) -> Tensor:
    """Inputs for an SAE: a few patternless vectors, (4, d_in)."""
    return torch.sin(torch.linspace(-4, 4, 4 * d_in) ** 3).reshape(4, d_in)


def made_by_hand(sites: Sequence[Site]) -> dict[str, Any]:
    """Describe what the model's weights and the names of sites do not determine about them."""

    def describe(module: nn.Module, run: Callable[[Tensor], Tensor], d_in: int) -> dict[str, Any]:
        described = behaviour(module, run, few_vectors(d_in))
        return {"sha256": describe_model(module)["sha256"], **described}

    joined: dict[str, Any] = {}
    for site in sites:
        for key, value in site.identity(describe).items():
            if isinstance(value, dict):
                joined.setdefault(key, {}).update(value)
            else:
                joined.setdefault(key, []).extend(value)
    return joined


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output.to_dense() if output.layout != torch.strided else output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _module(module: nn.Module) -> str:
    """A module's type, its ``extra_repr``, and the functions it was given."""
    functions = [
        f"{name}={_name(value)}"
        for name, value in sorted(vars(module).items())
        if inspect.isroutine(value) and (name == "forward" or not name.startswith("_"))
    ]
    description = _without_addresses(", ".join(filter(None, [module.extra_repr(), *functions])))
    if len(description) > _LONGEST:
        description = (
            f"{description[:_LONGEST]}… sha256 {hashlib.sha256(description.encode()).hexdigest()}"
        )
    return f"{_name(type(module))}({description})"


def _name(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{getattr(thing, '__module__', None) or 'builtins'}.{name}"


def _config(value: Any) -> Any:
    """A configuration as JSON, without entries on where the model is stored."""
    if isinstance(value, Mapping):
        return {
            str(key): _config(part)
            for key, part in value.items()
            if str(key) not in _NOT_OF_THE_MODEL and not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_config(part) for part in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and np.isfinite(value):
        return value
    return _without_addresses(str(value))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)
