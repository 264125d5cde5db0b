"""Analysis of data in parts: reading shards, and merging them into a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from polyseme.analysis.describe import check_model
from polyseme.analysis.flow import Prepared, plan_of, prepare, prove_again, run_analysis
from polyseme.analysis.image_data import ImageData
from polyseme.analysis.kinds import Arrays, Data, Engine, Found, Selected, Work
from polyseme.analysis.passes import Passes
from polyseme.analysis.progress import progress_bars
from polyseme.analysis.settings import Settings
from polyseme.analysis.source import source_of
from polyseme.analysis.text_data import TextData
from polyseme.capture import Collected, RandomActive, Selection, Stream
from polyseme.capture.accumulate import SiteCollector, below
from polyseme.capture.statistics import TOGETHER
from polyseme.data.contexts import Contexts
from polyseme.data.text import Texts
from polyseme.errors import InputError, RunError
from polyseme.options import Job, ReadingOptions, ShardOptions, takes
from polyseme.sites import Site
from polyseme.sites.language import load_language_model, loaded_name
from polyseme.store.files import plain_json
from polyseme.store.partial import differences
from polyseme.store.shards import Shard, ShardWriter
from polyseme.views import Run

_LISTED = 5
_CUT = ("length", "max_tokens", "leave_out")


def checked_shard(shard: str | tuple[int, int]) -> tuple[int, int]:
    """Parse a shard, "3/64" or (3, 64), to its number and the number of shards.

    Shards are numbered from 1; 0 stands for the last, so that counting from 0 also covers all.
    """
    try:
        number, n = (int(part) for part in (shard.split("/") if isinstance(shard, str) else shard))
    except (TypeError, ValueError):
        number = n = -1
    if n < 1 or not 0 <= number <= n:
        raise InputError(
            f"shard is {shard!r}; expected the number of a shard and the number of shards, such as "
            f"'3/64'."
        )
    return number or n, n


def shard_range(number: int, n: int, total: int, batch_size: int) -> tuple[int, int]:
    """The range of inputs of shard `number`, counted from 1: ``start``, ``stop``.

    Shards begin at boundaries of batches and of partial sums of statistics, so that together they
    have the batches and sums of a single pass.
    """
    block = math.lcm(batch_size, TOGETHER)
    n_blocks = -(-total // block)
    first, stop = (n_blocks * end // n * block for end in (number - 1, number))
    return min(first, total), min(stop, total)


@takes(ShardOptions)
def analyse_shard(options: ShardOptions) -> Shard:
    """Read one part of the data; `merge` makes a run of all parts.

    Parts may be read at any time, in any order, on any machine. The merged run is the one that
    `analyse` would write with the same batch size, bit for bit if the model itself computes the
    same numbers. The options are those of `analyse`, the same for all shards; the run is written
    by `merge`, and the shard to ``out``. The length of the data must be known; texts are tokenized
    once to count them, and again up to the end of the shard.

    Returns
    -------
    Shard

    Raises
    ------
    InputError, SiteError, RunError
        As for `analyse`, or if the length of the data is unknown.
    """
    number, n = checked_shard(options.shard)
    reader = ShardReader(options)
    total = reader.source.count()
    first, stop = shard_range(number, n, total, reader.source.settings.batch_size)
    return reader.read((first, stop, total), options.out)


class ShardReader:
    """Reads any parts of the data.

    Attributes
    ----------
    source : ImageData or TextData
    """

    def __init__(self, options: ReadingOptions) -> None:
        self._options = options
        self.source = source_of(options)
        self._prepared = prepare(options, self.source)

    def read(self, part: tuple[int, int, int], out: str | Path) -> Shard:
        """Read inputs ``start`` to ``stop - 1``, of ``total``."""
        options, source, prepared = self._options, self.source, self._prepared
        model = options.model
        fingerprint = {"run": fingerprint_of(prepared, source), "inputs": list(part)}
        with ShardWriter(
            out, fingerprint=fingerprint, overwrite=options.overwrite, resume=options.resume
        ) as writer:
            if writer.finished:
                return Shard(out)
            with progress_bars(options.progress) as bars:
                if writer.resumed:
                    prove_again(model, prepared.sites, source)
                passes = Passes(model, source, prepared.sites, writer, bars, part[:2])
                remaining = [prepared.sites[place] for place in passes.remaining]
                passes.run(plan_of(model, source, remaining, None))
            for place, found in enumerate(passes.parts()):
                writer.write_site(place, found)
            inputs, low, high = passes.held()
            writer.write_inputs(inputs)
            writer.finish(
                {
                    **dict(zip(("start", "stop", "total"), part, strict=True)),
                    # These are infinite if the inputs are tokens, and JSON has no infinity.
                    "low": low if np.isfinite(low) else None,
                    "high": high if np.isfinite(high) else None,
                    "model": loaded_name(model),
                    "options": source.settings.recorded(),
                }
            )
        return Shard(out)

    def proved(self) -> tuple[nn.Module, list[Site]]:
        """The model and its sites, proved."""
        if not all(site.proved for site in self._prepared.sites):
            prove_again(self._options.model, self._prepared.sites, self.source)
        return self._options.model, self._prepared.sites


def fingerprint_of(prepared: Prepared, data: Data) -> dict[str, Any]:
    """What all shards of an analysis share, including the batch size, on which sums depend."""
    return {**prepared.fingerprint, "batch_size": data.settings.batch_size}


def merge(
    shards: Iterable[str | Path],
    *,
    out: str | Path,
    model: nn.Module | None = None,
    data: Any = None,
    tokenizer: Any = None,
    labels: Any = None,
    sites: str | Site | Iterable[str | Site] | None = None,
    allow_missing: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Merge shards of the data into a run.

    Peak memory is that of one site, whatever the number of shards.

    Parameters
    ----------
    shards : iterable of str or Path
        Folders that `analyse_shard` wrote (``polyseme analyse --shard``), in any order. Duplicates
        count once.
    out : str or Path
        Folder of the run.
    model : torch.nn.Module, optional
        The model of the shards. May be left out for a model that `load_language_model` loaded by
        name, which is loaded again.
    data, labels : optional
        The images of the shards, as for `analyse`. Texts are not read again.
    tokenizer : optional
        Tokenizer of the model, if a language model is given.
    sites : str, Site, or a list of them, optional
        Needed if the sites of the shards were made by hand, such as by `attach_sae`.
    allow_missing : bool
        Merge the shards given, even if others are missing. The run records which inputs are
        missing.
    overwrite, resume, progress
        As for `analyse`.

    Returns
    -------
    Run

    Raises
    ------
    RunError
        Shards are missing or damaged, overlap, or belong to different analyses or another model.
    InputError
        The model or the images are needed but were not given.
    """
    parts = _in_order([Shard(path) for path in shards], allow_missing=allow_missing)
    first = parts[0]
    for shard in parts:
        shard.check()
    if model is not None:
        check_model(model)
    settings, names, recorded = _recorded(first, labels)
    source: ImageData | TextData
    if recorded is not None:
        if model is None and tokenizer is None:
            model, tokenizer = _loaded(first)
        elif model is None or tokenizer is None:
            raise InputError("Only one of model and tokenizer was given; give both or neither.")
        texts, cut = recorded
        source = TextData(model, Contexts(texts, tokenizer, **cut), settings)
    elif model is None or data is None:
        raise InputError(
            "The shards are of images, so merge needs the model and the data: give the same model= "
            "and data= (MODEL and --data) as for the shards."
        )
    else:
        source = ImageData(model, data, settings)
    job = Job(
        model,
        data,
        sites=names if sites is None else sites,
        out=out,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )
    return run_analysis(job, source, Merged(model, source, parts))


def _in_order(shards: list[Shard], *, allow_missing: bool) -> list[Shard]:
    """Deduplicate and sort the shards of one analysis; refuse gaps and overlaps."""
    if not shards:
        raise InputError("There are no shards to merge; give the folder of at least one.")
    first = shards[0]
    for shard in shards[1:]:
        if changed := differences(first.fingerprint, shard.fingerprint):
            raise RunError(
                f"{first.path} and {shard.path} are shards of different analyses: {changed}. "
                "Merge shards of the same model, data and settings."
            )
    by_range = {(shard.start, shard.stop): shard for shard in reversed(shards)}
    ordered = [by_range[key] for key in sorted(by_range) if key[0] < key[1]] or shards[:1]
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise RunError(
                f"{before.path} and {after.path} overlap: both hold inputs {after.start:,} to "
                f"{min(before.stop, after.stop):,}. Merge shards of one split, i/n with the same n."
            )
    if (gaps := missing_inputs(ordered)) and not allow_missing:
        listed = ", ".join(f"{a:,} to {b:,}" for a, b in gaps[:_LISTED])
        more = f" and {len(gaps) - _LISTED} more" if len(gaps) > _LISTED else ""
        raise RunError(
            f"Shards are missing: none holds the inputs {listed}{more} of {first.total:,}. Make "
            f"those shards, or merge the others with allow_missing=True (--allow-missing)."
        )
    return ordered


def missing_inputs(shards: Sequence[Shard]) -> list[tuple[int, int]]:
    """Ranges of inputs before, between and after sorted shards."""
    ends = [0, *(end for shard in shards for end in (shard.start, shard.stop)), shards[0].total]
    return [(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]


def _recorded(
    shard: Shard, labels: Any
) -> tuple[Settings, list[str], tuple[Texts, dict[str, Any]] | None]:
    """A shard's settings and sites, and for texts, unread, how contexts are cut."""
    try:
        settings = Settings.restored(shard.metadata["options"], labels)
        names = [str(name) for name in shard.fingerprint["sites"]]
        if settings.kind != "texts":
            return settings, names, None
        about: Any = shard.fingerprint["data"]
        identity = {key: value for key, value in about["texts"].items() if key != "name"}
        texts = Texts(about["name"], lambda: iter(()), lambda: identity)
        return settings, names, (texts, {key: about[key] for key in _CUT})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"The shard {shard.path} is damaged: its description of the analysis is not what "
            f"polyseme writes ({type(error).__name__}: {error}). Make it again."
        ) from None


def _loaded(shard: Shard) -> tuple[nn.Module, Any]:
    """Load a shard's language model and tokenizer by the model's name."""
    name = shard.metadata.get("model")
    remedy = "Give model= and tokenizer= (--model)."
    if not isinstance(name, str):
        raise InputError(f"{shard.path} does not say how its model is loaded. {remedy}")
    try:
        model, tokenizer = load_language_model(name)
    except InputError as error:
        reason = str(error).split(". ")[0].rstrip(".")
        raise InputError(
            f"{shard.path} is of the model {name!r}, which cannot be loaded by that name alone "
            f"({reason}). {remedy}"
        ) from error
    return model, tokenizer


class Merged(Engine):
    """Shards instead of a pass over the data: an engine and its results."""

    stage = "merging"

    def __init__(self, model: nn.Module, data: Data, shards: Sequence[Shard]) -> None:
        self._model, self._data, self._shards = model, data, shards
        self._sites: list[Site] = []

    def check(self, prepared: Prepared) -> dict[str, Any]:
        self._sites = prepared.sites
        here = plain_json("fingerprint", fingerprint_of(prepared, self._data))
        if changed := differences(self._shards[0].fingerprint, here):
            raise RunError(
                f"{self._shards[0].path} is a shard of another model or other data: {changed}. "
                "Give the model and the data of the shards."
            )
        gaps = missing_inputs(self._shards)
        return {"missing_inputs": [list(gap) for gap in gaps]} if gaps else {}

    def read(self, work: Work) -> Found:
        prove_again(self._model, self._sites, self._data)
        return self

    def _collector(self, site: Site) -> SiteCollector:
        settings = self._data.settings
        draw = RandomActive(settings.random_examples, settings.seed)
        return SiteCollector(site, settings.select, draw, settings.window, self._data.half, None)

    def results(self) -> Iterator[Collected]:
        for number, site in enumerate(self._sites):
            collector = self._collector(site)
            empty = collector.part()
            for shard in self._shards:
                collector.merge(_checked(shard.site(number), empty, site, shard))
            yield collector.result()

    def _streams(self, number: int, names: Sequence[str]) -> list[Stream]:
        """Merge the shards' streams of examples of a site's neurons."""
        collector = self._collector(self._sites[number])
        parts = [f"{name}." for name in names]
        empty = {k: a for k, a in collector.part().items() if k.startswith(tuple(parts))}
        streams: list[Stream] = [getattr(collector, name) for name in names]
        for shard in self._shards:
            part = _checked(shard.site(number, parts), empty, self._sites[number], shard)
            for name, stream in zip(names, streams, strict=True):
                stream.merge(below(part, name))
        return streams

    def selected(self) -> Selected:
        live = np.empty(0, np.int64)
        for number in range(len(self._sites)):
            for stream in self._streams(number, ("examples", "random")):
                live = np.union1d(live, stream.result().index)
        lows, highs = (
            [shard.metadata.get(end) for shard in self._shards] for end in ("low", "high")
        )
        return Selected(
            self._sites,
            self._examples(),
            self._inputs(live),
            sum(shard.stop - shard.start for shard in self._shards),
            min((float(low) for low in lows if low is not None), default=np.inf),
            max((float(high) for high in highs if high is not None), default=-np.inf),
        )

    def _examples(self) -> Iterator[tuple[Site, Selection]]:
        for number, site in enumerate(self._sites):
            (examples,) = self._streams(number, ("examples",))
            yield site, examples.result()

    def _inputs(self, live: Any) -> Arrays:
        """The rows of these inputs, each from the shard that read it."""
        held: dict[str, list[Any]] = {}
        for shard in self._shards:
            inputs = shard.inputs()
            index = inputs["index"]
            if len(index) and not shard.start <= index[0] <= index[-1] < shard.stop:
                raise RunError(f"The shard {shard.path} is damaged: inputs out of its range.")
            kept = np.isin(index, live)
            for name, array in inputs.items():
                if len(index) and len(array) == len(index):
                    held.setdefault(name, []).append(array[kept])
        merged = {name: np.concatenate(arrays) for name, arrays in held.items()}
        merged.setdefault("index", live[:0])
        if not np.array_equal(merged["index"], live):
            raise RunError(
                f"The shards lack {len(live) - len(merged['index']):,} inputs that examples refer "
                f"to; make them again."
            )
        return merged


def _checked(part: Arrays, empty: Arrays, site: Site, shard: Shard) -> Arrays:
    """Check that a shard's arrays of a site have the form of a collector's."""
    for name, array in empty.items():
        new = part.get(name)
        # Rows of examples may be any number; all other arrays have one row per neuron.
        is_rows = name.split(".")[0] in ("vectors", "windows", "background")
        if new is None or new.dtype != array.dtype or new.ndim != array.ndim:
            break
        if new.shape[is_rows:] != array.shape[is_rows:]:
            break
        rows = part.get(name.replace(".keys", ".rows"), new)
        if len(rows) != len(new) or (name == "vectors.keys" and rows.shape[1:] != (site.d_in,)):
            break
    else:
        streams = [name for name in ("examples", "random") if f"{name}.count" in empty]
        if all(_is_sound(below(part, name), shard) for name in streams):
            return part
        name = "index"
    raise RunError(
        f"The shard {shard.path} is damaged: {name!r} of site {site.name!r} is not what polyseme "
        "writes. Make it again."
    )


def _is_sound(stream: Arrays, shard: Shard) -> bool:
    count, index = stream["count"], stream["index"]
    if len(count) and not 0 <= count.min() <= count.max() <= index.shape[1]:
        return False
    used = index[np.arange(index.shape[1]) < count[:, None]]
    return not len(used) or bool(shard.start <= used.min() <= used.max() < shard.stop)
