"""Trains a small classifier, analyses and draws its hidden neurons, and trains two SAEs on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file

from polyseme.analysis import analyse
from polyseme.capture import FirstActive
from polyseme.data import Images
from polyseme.demo.classifier import (
    Classifier,
    accuracy,
    load_classifier,
    train_and_test,
    train_classifier,
)
from polyseme.errors import InputError
from polyseme.evaluate.compare import Comparison, compare
from polyseme.remote import local_path
from polyseme.sae import train_sae
from polyseme.sae.load import import_sae_lens
from polyseme.sites.attach import find_site, site_activations
from polyseme.store.files import whole, writing
from polyseme.views import Run

SITE = "layers.0"
# As in the published analysis of a similar classifier: the first 100 inputs that clearly activate
# a neuron.
SELECT = FirstActive(100, minimum=4.0)
FEWEST_EXAMPLES = 20
# The study in docs/saes.md uses the same widths and coefficients.
SAE_STEPS, D_SAE, L1, NE, WEIGHT_DECAY = 3000, 512, 5.0, 60.0, 1e-3


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes
    ----------
    run : Run
        The analysis of the 64 hidden neurons.
    accuracy : float
        Accuracy of the classifier on test digits.
    figures : list of Path
        Panels of the most and least polysemantic neurons, and the comparison of the SAEs.
    most, least : pandas.DataFrame
        The most and the least polysemantic neurons: rows of `Run.neurons`.
    comparison : Comparison
        A standard SAE of the hidden layer, and one with the NE loss.
    """

    run: Run
    accuracy: float
    figures: list[Path]
    most: pd.DataFrame
    least: pd.DataFrame
    comparison: Comparison


def run_demo(
    data: str | Path | None = None,
    out: str | Path = "runs/demo",
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Demo:
    """Train, analyse, rank, draw, compare. Existing results of the same settings are kept.

    Parameters
    ----------
    data : str or Path, optional
        See `train_and_test`.
    out : str or Path
        Folder for the classifier, its run, the SAEs, their runs, and the figures.
    seed : int
    overwrite : bool
        Start over.
    progress : bool
    """
    folder = local_path(out, "The demo's folder")
    import_sae_lens("The demo")  # fail early if it is missing
    train, test = train_and_test(data)
    weights = folder / "classifier.safetensors"
    made_from = {"data": train.digest(), "seed": str(seed)}
    if weights.exists() and not overwrite:
        model = load_classifier(weights)
        with safe_open(weights, framework="pt") as file:
            if file.metadata() != made_from:
                raise InputError(
                    f"{str(weights)!r} was trained on other digits or with another seed. Choose "
                    "another folder with --out, or replace it with --overwrite."
                )
    else:
        model = train_classifier(train, seed=seed, progress=progress)
        with writing(weights, resumable=False):
            folder.mkdir(parents=True, exist_ok=True)
            with whole(weights) as aside:
                save_file(model.state_dict(), aside, made_from)
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
    for neuron in track(
        chosen, "Drawing neurons", console=Console(stderr=True), disable=not progress
    ):
        path = folder / "figures" / f"neuron-{neuron:02d}.png"
        run.neuron(SITE, int(neuron)).figure(path)
        figures.append(path)
    comparison = _compare_saes(
        model, train, folder, seed=seed, overwrite=overwrite, progress=progress
    )
    figures.append(folder / "figures" / "saes.png")
    comparison.figure(figures[-1])
    return Demo(run, accuracy(model, test), figures, most, least, comparison)


def _compare_saes(
    model: Classifier, images: Images, folder: Path, *, seed: int, overwrite: bool, progress: bool
) -> Comparison:
    """Train a standard SAE of the hidden layer and one with the NE loss, and compare them."""
    batches = (images.inputs(slice(start, start + 512)) for start in range(0, len(images), 512))
    activations = torch.cat(list(site_activations(model, find_site(model, SITE), batches)))
    saes = {
        name: train_sae(
            activations,
            D_SAE,
            ne_coefficient=coefficient,
            l1_coefficient=L1,
            weight_decay=WEIGHT_DECAY,
            steps=SAE_STEPS,
            batch_size=min(256, len(activations)),
            seed=seed,
            out=folder / "saes" / name,
            overwrite=overwrite,
            resume=not overwrite,
            progress=progress,
            metadata={"site": SITE},
        )
        for name, coefficient in (("standard", 0.0), ("ne", NE))
    }
    return compare(
        saes,
        model,
        SITE,
        images,
        out=folder / "latents",
        overwrite=overwrite,
        resume=not overwrite,
        progress=progress,
    )
