"""Tensors and JSON from files that others wrote, which may be damaged or made to do harm."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polyseme.errors import InputError

_NESTS = ("state_dict", "model_state_dict", "model")
# What a pickle of plain tensors calls; it may name a data type or a device besides.
_HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|device|Size|bool|u?int\d+|b?float\d+)"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights hardly pack; padding and zeros of a tiny file do.
_PACKED, _TINY = 16, 1 << 20
_LONGEST_JSON = 1 << 24


def read_json(file: Path) -> Any:
    """What a small JSON file holds.

    Raises
    ------
    InputError
        It cannot be read, or is not JSON.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_LONGEST_JSON + 1)
        if len(content) > _LONGEST_JSON:
            raise InputError(f"{file} is over 16 MiB, and no configuration of an SAE is.")
        return json.loads(content)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise InputError(f"{file} is damaged: its JSON is nested too deeply.") from error
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged: it is not JSON ({error}).") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, by name.

    Parameters
    ----------
    file : Path
        ``.safetensors``; ``.pt``, ``.pth`` or ``.bin`` as `torch.save` writes it; or ``.npz``.

    Raises
    ------
    InputError
        The file is damaged, of another kind, or holds more than plain arrays.
    """
    if file.suffix not in _READERS:
        raise InputError(
            f"{file} is neither .safetensors nor .pt nor .npz, so polyseme does not know how to "
            "read it. Save the state dict as safetensors."
        )
    return _READERS[file.suffix](file)


@contextmanager
def reading_safetensors(file: Path) -> Iterator[None]:
    """Turn what safetensors says of a damaged file into one clear sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({error}). Fetch or save it again."
        ) from error


def as_floats(tensor: Tensor, name: str, file: Path) -> Tensor:
    """A tensor of a file as float32.

    Raises
    ------
    InputError
        It holds no floats, or NaN, or fewer values than its shape promises.
    """
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} in {file} holds {kind} values; floats of 16, 32 or 64 bits are expected."
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{name} in {file} is an expanded view: its shape {tuple(tensor.shape)} promises more "
            "values than are stored. Save a copy of it (.contiguous())."
        )
    wide = tensor.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        raise InputError(f"{name} in {file} holds NaN or infinity: the SAE did not train.")
    return wide


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with reading_safetensors(file):
        return load_file(file)


def _read_torch(file: Path) -> dict[str, Tensor]:
    with _reading(file, "or not what torch.save writes"):
        with zipfile.ZipFile(file) as archive:
            _check_unpacked(archive, file)
            pickles = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{len(pickles)} pickles in it")
            for opcode, named, _ in pickletools.genops(archive.read(pickles[0])):
                harmless = isinstance(named, str) and _HARMLESS.fullmatch(named)
                if "GLOBAL" in opcode.name and not harmless:
                    what = str(named).replace(" ", ".") if named else "an object"
                    raise InputError(
                        f"{file} holds more than plain tensors ({what}), and polyseme never "
                        "unpickles. Save the state dict alone, best as safetensors."
                    )
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}; a state dict is expected.")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{file} holds {str(name)!r}, a {type(value).__name__}, among its tensors, and "
                "polyseme does not know what it means for the SAE. Save the state dict alone."
            )
    return {str(name): value for name, value in content.items()}


def _read_numpy(file: Path) -> dict[str, Tensor]:
    tensors = {}
    with _reading(file, "or not a .npz file"):
        with zipfile.ZipFile(file) as archive:
            _check_unpacked(archive, file)
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if array.dtype.kind not in "fiub":
                    raise InputError(f"{name} in {file} holds {array.dtype}; floats are expected.")
                tensors[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    return tensors


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".npz": _read_numpy,
}


@contextmanager
def _reading(file: Path, otherwise: str) -> Iterator[None]:
    """Turn whatever goes wrong in a reader into one clear sentence."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    # zipfile, zlib, torch and NumPy raise whatever the damage leads to.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{file} is truncated, {otherwise} ({reason}). Fetch it again, or save the state dict "
            "as safetensors."
        ) from error


def _check_unpacked(archive: zipfile.ZipFile, file: Path) -> None:
    """Bound the memory that a zip file can ask for by its size on disk."""
    packed, unpacked = file.stat().st_size, sum(info.file_size for info in archive.infolist())
    if unpacked > _TINY + _PACKED * packed:
        raise InputError(
            f"{file} has {packed:,} bytes and would unpack to {unpacked:,}, which the weights of "
            "an SAE do not. Save them again, best as safetensors."
        )
