"""A shard: the results of the pass over one part of the data, to be merged with the others.

Its folder holds ``shard.json`` (format, fingerprint, range and the digests of the other files),
``site-0.safetensors`` and so on, one for each site, and ``inputs.safetensors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polyseme.errors import RunError
from polyseme.remote import fetched
from polyseme.store.files import ASIDE, LITTER, encode_json, read_json, replace_bytes, sha256
from polyseme.store.format import JSON
from polyseme.store.kind import Kind
from polyseme.store.safetensors_files import load_state, save_state
from polyseme.store.writer import Writer

FORMAT, VERSION = "polyseme-shard", 1
SHARD_JSON = "shard.json"
_INPUTS = "inputs.safetensors"

Arrays = dict[str, np.ndarray]


def _site_file(number: int) -> str:
    return f"site-{number}.safetensors"


def _fingerprint(path: Path) -> dict[str, JSON] | None:
    content = read_json(path / SHARD_JSON) if path.is_dir() else {}
    return content.get("fingerprint", {}) if content.get("format") == FORMAT else None


def _foreign(path: Path) -> set[str]:
    return {
        entry.name
        for entry in path.iterdir()
        if entry.name not in {SHARD_JSON, SHARD_JSON + ASIDE, _INPUTS, *LITTER}
        and not (entry.name.startswith("site-") and entry.suffix == ".safetensors")
    }


SHARD = Kind(
    work="analysis of a shard",
    result="a polyseme shard",
    format=f"{FORMAT} {VERSION}",
    fingerprint=_fingerprint,
    foreign=_foreign,
    manifest=SHARD_JSON,
    check=lambda path: Shard(path).check(),
)


class ShardWriter(Writer):
    """Writes one shard; see `Writer`."""

    kind = SHARD

    def write_site(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the results of one site."""
        save_state(self._at_work().result / _site_file(number), arrays, {})

    def write_inputs(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the inputs that examples may refer to."""
        save_state(self._at_work().result / _INPUTS, arrays, {})

    def finish(self, metadata: Mapping[str, JSON]) -> str | Path:
        """Seal the shard with shard.json and move it into place."""
        partial = self._at_work()
        files = sorted(partial.result.glob("*.safetensors"))
        content: dict[str, JSON] = {
            "format": FORMAT,
            "version": VERSION,
            **metadata,
            "fingerprint": partial.fingerprint,
            "files": {file.name: sha256(file) for file in files},
        }
        replace_bytes(partial.result / SHARD_JSON, encode_json(content))
        partial.publish()
        self.finished = True
        self.close()
        return self.path


class Shard:
    """A finished shard, whose files are not trusted.

    Parameters
    ----------
    path : str or Path
        A folder, or a URL whose files are copied to the cache.

    Attributes
    ----------
    path : str or Path
        As given.
    start, stop : int
        Its range of inputs, ``start`` to ``stop - 1``.
    total : int
        Number of inputs in all of the data.
    fingerprint : dict
        Of the run into which the shards merge.
    metadata : dict
        The other entries of shard.json.

    Raises
    ------
    RunError
        There is no shard, or it is damaged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._folder = fetched(path)
        content = read_json(self._folder / SHARD_JSON)
        if content.get("format") != FORMAT:
            raise RunError(f"{self.path} is not a shard; give folders that analyse --shard wrote.")
        if content.get("version") != VERSION:
            raise RunError(
                f"{self.path} is a shard of version {content.get('version')!r}, but this polyseme "
                f"reads version {VERSION}; make it again with the version that merges."
            )
        try:
            self.start, self.stop, self.total = (
                _whole(content[name]) for name in ("start", "stop", "total")
            )
            self.fingerprint: dict[str, JSON] = dict(content["fingerprint"]["run"])
            self.metadata = dict(content)
            self._files = {str(name): str(digest) for name, digest in content["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(f"{SHARD_JSON} is not what polyseme writes ({error})") from None
        if not 0 <= self.start <= self.stop <= self.total:
            raise self._damaged(f"its inputs are {self.start} to {self.stop} of {self.total}")

    def __repr__(self) -> str:
        return f"Shard({str(self.path)!r}: inputs {self.start:,} to {self.stop:,})"

    def _damaged(self, why: str) -> RunError:
        return RunError(f"The shard {self.path} is damaged: {why}. Make it again.")

    def check(self) -> None:
        """Compare the files with their digests in shard.json."""
        for name, digest in self._files.items():
            if Path(name).name != name or not (self._folder / name).is_file():
                raise self._damaged(f"{name} is missing")
            if sha256(self._folder / name) != digest:
                raise self._damaged(f"{name} was changed after it was written")

    def site(self, number: int, parts: Sequence[str] = ("",)) -> Arrays:
        """The results of one site: all arrays, or only those of these parts."""
        return self._arrays(_site_file(number), parts)

    def inputs(self) -> Arrays:
        """The inputs that examples may refer to."""
        return self._arrays(_INPUTS)

    def _arrays(self, name: str, parts: Sequence[str] = ("",)) -> Arrays:
        state = load_state(self._folder / name, parts)
        if state is None or name not in self._files:
            raise self._damaged(f"{name} is missing")
        return state[0]


def _whole(value: JSON) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")
    return value
