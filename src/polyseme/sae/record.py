"""The record of a training run, stored beside the SAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from polyseme.errors import InputError
from polyseme.remote import fetched
from polyseme.sae.checkpoint import (
    FORMAT,
    FORMAT_VERSION,
    RECORD_JSON,
    RECORD_TENSORS,
    save_tensors,
)
from polyseme.sae.untrusted_files import read_json, reading_safetensors
from polyseme.store.files import encode_json


@dataclass(frozen=True, eq=False)
class TrainingRecord:
    """How an SAE was trained.

    Attributes
    ----------
    details : dict
        Settings, data, conventions, versions and the losses of the last step, as in the SAE's own
        metadata under "polyseme".
    history : dict of str to list
        Subsampled losses during training: "step" (counted from 1), "loss", each of its terms by
        SAELens name ("mse_loss", "ne_loss", ...; including its coefficient, so that they add up to
        "loss"), "l0", and "ne_distance", the NE term without its coefficient.
    tensors : dict of str to Tensor
        "n_forward_passes_since_fired", shape (d_sae,), and, with the NE loss, the state of its term
        under names that begin with "ne.", including the running means.
    """

    details: dict[str, Any]
    history: dict[str, list[float | None]]
    tensors: dict[str, Tensor]

    def save(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        """Write the record into the folder of the SAE."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": dict(fingerprint),
            "details": self.details,
            "history": self.history,
        }
        (folder / RECORD_JSON).write_bytes(encode_json(content))
        save_tensors(folder / RECORD_TENSORS, self.tensors)


def read_training(folder: str | Path) -> TrainingRecord:
    """Read the training record of an SAE that `train_sae` wrote.

    Raises
    ------
    InputError
        The folder holds no such record, or it is damaged or of another version.
    """
    path = fetched(folder)
    if not (path / RECORD_JSON).is_file():
        raise InputError(
            f"{path} has no {RECORD_JSON}, so it is not the folder of an SAE that polyseme trained."
        )
    content = read_json(path / RECORD_JSON)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version is not None and version != FORMAT_VERSION:
        raise InputError(
            f"{path / RECORD_JSON} is of version {version!r}, but this polyseme reads version "
            f"{FORMAT_VERSION}. Read it with the polyseme that wrote it."
        )
    if version is None or not all(
        isinstance(content.get(name), dict) for name in ("details", "history")
    ):
        raise InputError(
            f"The training record in {path} is damaged: {RECORD_JSON} lacks its version, details "
            "or history."
        )
    with reading_safetensors(path / RECORD_TENSORS):
        tensors = load_file(path / RECORD_TENSORS)
    return TrainingRecord(content["details"], content["history"], tensors)
