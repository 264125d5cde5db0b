"""The folder of an SAE and of its unfinished training: locking, resuming, publishing.

During training, ``<out>.partial/state`` holds its last checkpoint: tensors and JSON in one
safetensors file. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from polyseme.store.files import read_json, writing
from polyseme.store.kind import Kind
from polyseme.store.partial import Partial
from polyseme.store.safetensors_files import load_state, save_state

FORMAT = "polyseme-sae-training"
FORMAT_VERSION = 2

# The files of an SAE: the first two are SAELens's, the others record the training.
SAE_CONFIG = "cfg.json"
SAE_WEIGHTS = "sae_weights.safetensors"
RECORD_JSON = "polyseme-training.json"
RECORD_TENSORS = "polyseme-training.safetensors"
_SAE_FILES = {SAE_CONFIG, SAE_WEIGHTS, "sparsity.safetensors", RECORD_JSON, RECORD_TENSORS}

CHECKPOINT = "checkpoint.safetensors"

Content = dict[str, Any]


def _fingerprint(path: Path) -> Content | None:
    """Fingerprint of an SAE, empty if polyseme did not train it; None if there is no SAE."""
    try:
        config = json.loads((path / SAE_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or "d_sae" not in config:
        return None
    return read_json(path / RECORD_JSON).get("fingerprint") or {}


SAE = Kind(
    work="training",
    result="an SAE",
    format=f"{FORMAT} {FORMAT_VERSION}",
    fingerprint=_fingerprint,
    foreign=lambda path: {entry.name for entry in path.iterdir()} - _SAE_FILES,
    manifest=SAE_CONFIG,
)


class TrainingFolder(Partial):
    """The output of one training run, locked for the duration of the context; see `Partial`."""

    def __init__(
        self,
        out: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        super().__init__(out, SAE, fingerprint, overwrite=overwrite, resume=resume)

    def load(self) -> tuple[dict[str, Tensor], Content] | None:
        """Load the tensors and JSON of the last checkpoint; None if there is none.

        Raises
        ------
        RunError
            It is damaged.
        """
        checkpoint = load_state(self.state / CHECKPOINT)
        if checkpoint is None:
            return None
        arrays, content = checkpoint
        return {name: torch.from_numpy(array) for name, array in arrays.items()}, content

    def save(self, tensors: Mapping[str, Tensor], content: Content) -> None:
        """Write a checkpoint, replacing the previous one."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        save_state(self.state / CHECKPOINT, arrays, content)

    def finish(self, write: Callable[[Path, Content], None]) -> None:
        """Write the SAE to a separate folder and rename it into place.

        Parameters
        ----------
        write : callable (folder, fingerprint)
            Writes the files of the SAE into an empty folder.

        Raises
        ------
        RunError
            As `Partial.publish`.
        """
        with writing(self.result):
            for file in self.result.iterdir():
                file.unlink()
            write(self.result, self.fingerprint)
        self.publish()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, on any device, to a safetensors file.

    Raises
    ------
    OSError
        It cannot be written.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
