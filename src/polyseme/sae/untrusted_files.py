"""Reading tensors and JSON from untrusted files, which may be damaged or malicious."""

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
# Globals in a pickle of plain tensors, which may also name dtypes and devices.
_HARMLESS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (\w+Storage|device|Size|bool|u?int\d+|b?float\d+)"
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights hardly compress; padding and zeros of a tiny file do.
_PACKED, _TINY = 16, 1 << 20
_LONGEST_JSON = 1 << 24


def read_json(file: Path) -> Any:
    """Read a small JSON file.

    Raises
    ------
    InputError
        It cannot be read, or is not JSON.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(_LONGEST_JSON + 1)
        if len(content) > _LONGEST_JSON:
            raise InputError(f"{file} is over 16 MiB, too large for the configuration of an SAE.")
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
    """Read the tensors of a state dict, by name.

    Parameters
    ----------
    file : Path
        ``.safetensors``; ``.pt``, ``.pth`` or ``.bin`` as `torch.save` writes it; or ``.npz``.

    Raises
    ------
    InputError
        The file is damaged or of another kind, or holds more than plain arrays.
    """
    if file.suffix not in _READERS:
        raise InputError(
            f"{file} is not .safetensors, .pt or .npz, so polyseme cannot read it. Save the state "
            f"dict as safetensors."
        )
    return _READERS[file.suffix](file)


@contextmanager
def reading_safetensors(file: Path) -> Iterator[None]:
    """Convert safetensors' errors on a damaged file to one clear sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file} is truncated or not a safetensors file ({error}). Download or save it again."
        ) from error


def as_floats(tensor: Tensor, name: str, file: Path) -> Tensor:
    """A tensor of a file as float32.

    Raises
    ------
    InputError
        It is not floating point, holds NaN, or has fewer values than its shape implies.
    """
    if tensor.dtype not in _FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(
            f"{name} in {file} holds {kind} values; expected floats of 16, 32 or 64 bits."
        )
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{name} in {file} is an expanded view: its shape {tuple(tensor.shape)} implies more "
            f"values than are stored. Save a copy of it (.contiguous())."
        )
    wide = tensor.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        raise InputError(f"{name} in {file} holds NaN or infinity: its training failed.")
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
                        f"unpickles. Save only the state dict, preferably as safetensors."
                    )
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping):
        raise InputError(f"{file} holds a {type(content).__name__}; expected a state dict.")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise InputError(
                f"{file} holds {str(name)!r}, a {type(value).__name__}, among its tensors, which "
                f"polyseme cannot interpret. Save only the state dict."
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
                    raise InputError(f"{name} in {file} holds {array.dtype}; expected floats.")
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
    """Convert any error in a reader to one clear sentence."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from error
    # On damaged files, zipfile, zlib, torch and NumPy raise all kinds of exceptions.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{file} is truncated, {otherwise} ({reason}). Download it again, or save the state "
            f"dict as safetensors."
        ) from error


def _check_unpacked(archive: zipfile.ZipFile, file: Path) -> None:
    """Bound the memory that a zip file can demand by its size on disk."""
    packed, unpacked = file.stat().st_size, sum(info.file_size for info in archive.infolist())
    if unpacked > _TINY + _PACKED * packed:
        raise InputError(
            f"{file} has {packed:,} bytes and would decompress to {unpacked:,}, too much for the "
            f"weights of an SAE. Save them again, preferably as safetensors."
        )
