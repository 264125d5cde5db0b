"""The data files of one run; the server and an export produce the same bytes."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from polyseme.core.meaning import MIN_SIZE, OVERLAP
from polyseme.core.space import ENOUGH
from polyseme.errors import RunError
from polyseme.explorer.addresses import layer_of, site_addresses
from polyseme.explorer.meaning_files import neuron_meanings, nothing
from polyseme.explorer.packs import Pack
from polyseme.explorer.page_errors import NoSuchFileError, page_message
from polyseme.explorer.pictures import Pictures, convolution
from polyseme.explorer.run_texts import RunTexts
from polyseme.explorer.search import WordIndex
from polyseme.explorer.strict_json import compact_json, finite
from polyseme.explorer.tensors import encode
from polyseme.store import SiteInfo, altered_files
from polyseme.views import Run

# A pack is one request, so its size is limited; web hosts limit the number of files.
_PACK_BYTES = 800_000
_MOST_PACKS = 1_600
_CONTEXT_TOKENS = 65_536
_MOST_CONTEXT_FILES = 100
# The server describes the meanings of a neuron on request. An export would have to do so for all
# neurons, which takes a hundred times as long as the rest, so an export of a larger run has no
# descriptions: its pages show the meanings without labels, stability and verdict.
_MOST_MEANINGS = 2_048
_NUMBERED = re.compile(
    r"(packs/(?P<pack>N)|contexts/(?P<contexts>N))\.safetensors"
    r"|(search/(?P<shard>N)|meanings/(?P<meanings>N))\.json".replace("N", "0|[1-9][0-9]{0,8}"),
    re.ASCII,
)


class RunFiles:
    """The data files of one run.

    Parameters
    ----------
    run : Run
    title : str
        The run's title on the pages.
    """

    def __init__(self, run: Run, title: str) -> None:
        self.run = run
        self.folder = folder = run.folder
        self.title = title
        self._content: RunTexts | Pictures | None = None
        self._met: dict[str, None] = {}  # damage found while reading
        self._altered: list[str] | None = None
        try:
            self.is_text = "tokens" in folder.inputs
        except RunError:  # reported by `damage`
            self.is_text = folder.metadata["data"].get("kind") == "text"
        else:
            self._content = RunTexts(folder) if self.is_text else Pictures(folder)

    @property
    def damage(self) -> list[str]:
        """The damage found so far, in sentences that begin with the file's name."""
        problems = list(dict.fromkeys([*self.folder.damage, *self._met]))
        for name in self._altered or []:
            if not any(problem.startswith(f"{name}:") for problem in problems):
                problems.append(f"{name}: its SHA-256 is not the one that run.json records")
        return problems

    @cached_property
    def _words(self) -> WordIndex | None:
        index = WordIndex(self.folder) if isinstance(self._content, RunTexts) else None
        return index if index and index.exists else None

    @cached_property
    def check(self) -> threading.Thread:
        """The thread that compares the run's files with their digests, started on first use."""

        def compare() -> None:
            self._altered = altered_files(self.folder.path, self.folder.metadata)

        thread = threading.Thread(target=compare, daemon=True)
        thread.start()
        return thread

    def _verified(self) -> dict[str, Any]:
        """Whether the run's files are unchanged, as far as is known."""
        if self.check.is_alive() or self._altered is None:
            return {"state": "checking", "files": []}
        return {"state": "altered" if self._altered else "verified", "files": self._altered}

    # ---------------------------------------------------------------------------- sizes

    @cached_property
    def pack(self) -> int:
        """Neurons per pack: a power of two."""
        bytes_a_neuron = self._bytes_an_example * self._mean_examples + 2_000
        size = 1
        while size < 1024 and 2 * size * bytes_a_neuron <= _PACK_BYTES:
            size *= 2
        while self._count_packs(size) > _MOST_PACKS:
            size *= 2
        return size

    @property
    def _mean_examples(self) -> float:
        return float(self.folder.neurons["n_examples"].mean())

    @property
    def _bytes_an_example(self) -> float:
        """Approximate bytes of an example before compression."""
        if isinstance(self._content, RunTexts):
            return 40 + 5 * (sum(self._content.window) + 1)
        if self._content is None or self._content.shape is None:
            return 60
        return 60 + math.prod(self._content.thumb) / 3

    @cached_property
    def _with_meanings(self) -> range:
        """Rows of the neurons with meanings: all of the run, or none."""
        has = "n_meanings" in self.folder.neurons
        return range(len(self.folder.neurons) if has else 0)

    @property
    def _exports_meanings(self) -> bool:
        return 0 < len(self._with_meanings) <= _MOST_MEANINGS

    def _count_packs(self, size: int) -> int:
        return sum(-(-site.n_neurons // size) for site in self.folder.sites)

    @cached_property
    def _first_packs(self) -> list[int]:
        """Number of each site's first pack, then the number of packs."""
        counts = (-(-site.n_neurons // self.pack) for site in self.folder.sites)
        return list(accumulate(counts, initial=0))

    @cached_property
    def _contexts_per_file(self) -> int:
        n, length = self.folder.inputs.headers["tokens"][1]
        return int(max(1, _CONTEXT_TOKENS // max(1, length), -(-n // _MOST_CONTEXT_FILES)))

    @cached_property
    def _n_context_files(self) -> int:
        if not isinstance(self._content, RunTexts):
            return 0
        return -(-len(self.folder.inputs["index"]) // self._contexts_per_file)

    # ---------------------------------------------------------------------------- files

    def paths(self) -> Iterator[str]:
        """The path of every file, relative to the run's own folder."""
        yield "run.json"
        yield "verified.json"
        yield "neurons.safetensors"
        for number in range(self._first_packs[-1]):
            yield f"packs/{number}.safetensors"
        for number in range(self._n_context_files):
            yield f"contexts/{number}.safetensors"
        if self._exports_meanings:
            for row in self._with_meanings:
                yield f"meanings/{row}.json"
        if self._words:
            yield "search/words.json"
            for number in range(self._words.n_shards):
                yield f"search/{number}.json"

    def file(self, path: str) -> bytes:
        """The contents of a file.

        Raises
        ------
        NoSuchFileError
            There is no such file.
        RunError
            Its source is damaged.
        """
        if path == "run.json":
            return compact_json(self.describe()).encode()
        if path == "verified.json":
            return compact_json(self._verified()).encode()
        if path == "neurons.safetensors":
            return encode(self._neurons())
        if path == "search/words.json" and self._words:
            return compact_json(self._words.words()).encode()
        numbered = _NUMBERED.fullmatch(path)
        if numbered:
            numbers = {key: int(text) for key, text in numbered.groupdict().items() if text}
            match numbers:
                case {"pack": number} if number < self._first_packs[-1]:
                    return self._pack_file(number)
                case {"contexts": number} if number < self._n_context_files:
                    return self._context_file(number)
                case {"meanings": row} if row in self._with_meanings:
                    return self._meanings_file(row)
                case {"shard": number} if self._words and number < self._words.n_shards:
                    return compact_json(self._words.shard(number)).encode()
        raise NoSuchFileError(path)

    def summary(self) -> dict[str, Any]:
        """The run's entry in the list of runs."""
        return {
            "title": self.title,
            "kind": "text" if self.is_text else "image",
            "n_neurons": len(self.folder.neurons),
            "n_sites": len(self.folder.sites),
        }

    def describe(self) -> dict[str, Any]:
        """What the pages need to know about the run as a whole."""
        metadata = self.folder.metadata
        return {
            **self.summary(),
            "created": metadata["created"],
            "polyseme_version": metadata["polyseme_version"],
            **{key: finite(metadata[key]) for key in ("model", "data", "settings")},
            "n_missing": n_missing(metadata.get("missing_inputs")),
            "sites": [self._describe_site(site) for site in self.folder.sites],
            "pack": self.pack,
            "n_packs": self._first_packs[-1],
            "contexts_per_file": self._contexts_per_file if self._n_context_files else 0,
            "n_contexts": len(self.folder.inputs["index"]) if self._n_context_files else 0,
            "window": list(self._content.window) if isinstance(self._content, RunTexts) else None,
            "image": self._content.describe() if isinstance(self._content, Pictures) else None,
            "has": self._has(),
            "meanings_exported": self._exports_meanings,
            "meaning_cut": {"overlap": OVERLAP, "smallest": MIN_SIZE},
            "damage": [page_message(sentence) for sentence in self.folder.damage],
        }

    @cached_property
    def _addresses(self) -> list[str]:
        return site_addresses(self.folder.sites)

    def _describe_site(self, site: SiteInfo) -> dict[str, Any]:
        return {
            "number": site.number,
            "name": site.name,
            "layer": layer_of(site.name),
            "address": self._addresses[site.number],
            "kind": site.kind,
            "activation": finite(site.extra.get("activation")),
            "gate": finite(site.extra.get("gate")),
            "n_neurons": site.n_neurons,
            "d_in": site.d_in,
            "threshold": finite(site.extra.get("threshold")),
            "convolution": convolution(site),
            "n_moments": _count(site.extra.get("n_moments")),
            "enough_moments": ENOUGH * site.d_in,
            "first": self.folder.first_neuron(site.number),
            "first_pack": self._first_packs[site.number],
        }

    def _has(self) -> dict[str, bool]:
        """Which optional parts the run has, at any undamaged site."""
        folder = self.folder
        names: set[str] = set()
        for site in folder.sites:
            with suppress(RunError):
                names.update(folder.site(site.number))
        columns: list[str] = []
        with suppress(RunError):
            columns = folder.columns("features")
        return {
            "importances": "importances" in names,
            "layout": "layout" in names,
            "meanings": bool(self._with_meanings),
            "similar": "similar_features" in names,
            "logits": "promoted_tokens" in names or "logit_gradient" in names,
            "activation_map": "activation_map" in names,
            "labels": "label" in columns,
            "classes": isinstance(self._content, Pictures) and "labels" in folder.inputs,
            "search": self._words is not None,
        }

    def _neurons(self) -> Mapping[str, Any]:
        neurons = self.folder.neurons
        arrays: dict[str, Any] = {
            "site": np.repeat(
                np.arange(len(self.folder.sites)), [s.n_neurons for s in self.folder.sites]
            ),
            "neuron": neurons["neuron"].to_numpy(),
            "n_examples": neurons["n_examples"].to_numpy(),
            "n_clusters": neurons["n_clusters"].to_numpy(),
        }
        if "n_meanings" in neurons:
            arrays["n_meanings"] = neurons["n_meanings"].to_numpy()
        for name, values in neurons.items():
            if values.dtype.kind == "f":
                arrays[str(name)] = values.to_numpy(np.float32)
        return arrays

    def _pack_file(self, number: int) -> bytes:
        site = self.folder.sites[int(np.searchsorted(self._first_packs, number, side="right")) - 1]
        start = (number - self._first_packs[site.number]) * self.pack
        stop = min(start + self.pack, site.n_neurons)
        pack = Pack(self.folder, site, start, stop, self._content)
        body = pack.encode()
        self._met.update(dict.fromkeys(pack.damage))
        return body

    def _meanings_file(self, row: int) -> bytes:
        firsts = [self.folder.first_neuron(site.number) for site in self.folder.sites]
        site = self.folder.sites[int(np.searchsorted(firsts, row, side="right")) - 1]
        try:
            described = neuron_meanings(self.run, site.name, row - firsts[site.number])
        except RunError as error:
            problem = page_message(error)
            self._met[problem] = None
            described = nothing(problem)
        return compact_json(described).encode()

    def _context_file(self, number: int) -> bytes:
        assert isinstance(self._content, RunTexts)
        start = number * self._contexts_per_file
        stop = min(start + self._contexts_per_file, len(self.folder.inputs["index"]))
        arrays, vocabulary = self._content.contexts(start, stop)
        return encode(arrays, {"vocabulary": vocabulary})


def n_missing(ranges: Any) -> int:
    """Number of inputs in ranges [first, end); 0 if a run records no valid ranges."""
    try:
        counts = [_count(end - first) for first, end in ranges or []]
    except (TypeError, ValueError):
        return 0
    return 0 if None in counts else sum(n for n in counts if n)


def _count(value: Any) -> int | None:
    """A count that the run records; None if it is not a valid count."""
    return value if type(value) is int and 0 <= value < 2**53 else None
