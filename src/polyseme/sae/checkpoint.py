"""The folder of an SAE and of its unfinished training: locked, resumed, moved into place.

While a training runs, ``<out>.partial/state`` holds::

    checkpoint-<step>/ state.safetensors and state.json: the last checkpoint

Checkpoints are safetensors and JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyseme.errors import RunError
from polyseme.store.files import ASIDE, OVERWRITE, read_json, to_disk, writing
from polyseme.store.format import encode_json
from polyseme.store.partial import Kind, Partial

FORMAT = "polyseme-sae-training"
FORMAT_VERSION = 2

# The files of an SAE: the first two are SAELens's, the others tell of the training.
SAE_CONFIG = "cfg.json"
SAE_WEIGHTS = "sae_weights.safetensors"
RECORD_JSON = "polyseme-training.json"
RECORD_TENSORS = "polyseme-training.safetensors"
_SAE_FILES = {SAE_CONFIG, SAE_WEIGHTS, "sparsity.safetensors", RECORD_JSON, RECORD_TENSORS}

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_STATE_JSON, _STATE_TENSORS = "state.json", "state.safetensors"

Content = dict[str, Any]


def _fingerprint(path: Path) -> Content | None:
    """That of an SAE, empty where polyseme did not train it; None where a folder is no SAE."""
    try:
        config = json.loads((path / SAE_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or "d_sae" not in config:
        return None
    found: Content = read_json(path / RECORD_JSON).get("fingerprint") or {}
    return found


SAE = Kind(
    work="training",
    result="an SAE",
    format=f"{FORMAT} {FORMAT_VERSION}",
    fingerprint=_fingerprint,
    foreign=lambda path: {entry.name for entry in path.iterdir()} - _SAE_FILES,
)


class TrainingFolder:
    """The output of one training, locked while the context lasts; see `Partial`.

    Attributes
    ----------
    finished : bool
        `path` is the finished SAE of this fingerprint: there is nothing to do.
    versions : list of dict
        Of polyseme and torch, that have worked on it.
    """

    def __init__(
        self,
        out: str | Path,
        fingerprint: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.path = Path(out)
        self._partial = Partial(out, SAE, fingerprint, overwrite=overwrite, resume=resume)
        self.finished = self._partial.finished
        self.versions = self._partial.versions

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._partial.__exit__(kind, error, trace)

    @property
    def checkpoint(self) -> Path | None:
        """Folder of the last checkpoint, where there is one."""
        found = [
            (int(match[1]), entry)
            for entry in self._partial.state.iterdir()
            if (match := _CHECKPOINT.fullmatch(entry.name))
        ]
        return max(found)[1] if found else None

    def load(self) -> tuple[dict[str, Tensor], Content] | None:
        """Tensors and JSON of the last checkpoint; None where there is none."""
        path = self.checkpoint
        if path is None:
            return None
        content = read_json(path / _STATE_JSON)
        try:
            tensors = load_file(path / _STATE_TENSORS)
        except (OSError, SafetensorError):
            content = {}
        if not content:
            raise RunError(
                f"The checkpoint {path} is damaged. Start again by {OVERWRITE}; it cannot be gone "
                "on with."
            )
        return tensors, content

    def save(self, step: int, tensors: Mapping[str, Tensor], content: Content) -> None:
        """Write a checkpoint aside, move it into place, and delete the one before."""
        state = self._partial.state
        path = state / f"checkpoint-{step}"
        aside = path.with_name(path.name + ASIDE)
        with writing(path):
            before = [entry for entry in state.iterdir() if entry.name != path.name]
            if path.exists():
                return
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_tensors(aside / _STATE_TENSORS, tensors)
            (aside / _STATE_JSON).write_bytes(encode_json(content))
            for file in aside.iterdir():
                to_disk(file, file.stat().st_mode & 0o777)
            os.rename(aside, path)
            for entry in before:
                shutil.rmtree(entry, ignore_errors=True)

    def publish(self, write: Callable[[Path, Content], None]) -> None:
        """Have the SAE written aside, and rename it into place.

        Parameters
        ----------
        write : callable (folder, fingerprint)
            Writes the files of the SAE into an empty folder.

        Raises
        ------
        RunError
            As `Partial.publish`.
        """
        result = self._partial.result
        with writing(result):
            for file in result.iterdir():
                file.unlink()
            write(result, self._partial.fingerprint)
        self._partial.publish()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, wherever they are, to a safetensors file.

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
