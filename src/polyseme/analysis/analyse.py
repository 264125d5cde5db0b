"""Analysis of a model and data into a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from polyseme.analysis.flow import run_analysis
from polyseme.analysis.kinds import Engine
from polyseme.analysis.source import source_of
from polyseme.capture import Selector
from polyseme.errors import InputError, one_of
from polyseme.sites import Site
from polyseme.views import Run

Array = NDArray[Any]

_ENGINES = ("local", "ray")


def analyse(
    model: nn.Module,
    data: Any,
    *,
    sites: str | Site | Iterable[str | Site],
    exclude: str | Iterable[str] = (),
    out: str | Path,
    select: Selector | None = None,
    threshold: float | None = None,
    linkage: str = "average",
    labels: Any = None,
    class_names: Iterable[str] | None = None,
    image_shape: tuple[int, ...] | None = None,
    panels: bool | None = None,
    panel_examples: int | None = None,
    baseline: float | Array | None = None,
    window: tuple[int, int] | None = None,
    importances: str | None = None,
    memory_budget: int | str | None = None,
    random_examples: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Run:
    """Find what activates each neuron, split it into features, and write it all to a run.

    The data is read once, for all sites together, in bounded memory. The model runs in evaluation
    mode and is restored afterwards. In texts, each neuron has at most one example per context: the
    position where it fires most, among the tokens that count (`Contexts`).

    An option that does not apply to the data is refused: those from ``labels`` to ``baseline`` are
    for images and other arrays, ``window`` and ``importances`` for texts.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; inputs are moved there. For texts, a transformers language model.
    data : array, tensor, pair, path, Images, Contexts, data set or iterable
        Texts as `Contexts`; for anything else see `polyseme.data.sources.as_source`. uint8 images
        are scaled to [0, 1]; for another scaling, give `polyseme.data.Images`.
    sites : str, Site, or a list of them
        Names of modules, or globs over them: ``"layers.0"``, ``"features.*"``, or
        ``"model.layers.*.mlp"`` for the neurons of every MLP of a language model. An SAE is a site
        by its own name or its encoder's; `polyseme.attach_sae` makes a site of an SAE at a hook
        point of a language model. Layers that match a glob but that the model does not run are left
        out, with a warning.
    exclude : str or list of str
        Names of sites to leave out, or globs over them.
    out : str or Path
        Folder of the run, or a URL such as ``s3://bucket/run``, to which the run is uploaded once
        complete.
    select : Selector, optional
        Which examples represent a neuron; by default ``TopK(100)``. The paper uses
        ``AboveFraction(0.75, 100)`` for texts.
    threshold : float, optional
        Cosine distance in (0, 2] at which trees are cut; by default the published 0.05 for SAEs and
        0.2 for other neurons, or 0.5 for other neurons on texts. It can be changed later, as whole
        trees are kept.
    linkage : {"average", "single"}
    labels : array of int, shape (n,), optional
        Class of each input, if ``data`` is an array.
    class_names : iterable of str, optional
        Name of each class.
    image_shape : tuple of int, optional
        How to show an input whose own shape is flat: (height, width) or (channels, height, width).
    panels : bool, optional
        Whether to compute activation maps and, for classifiers, logit effects; True by default.
        This takes extra forward passes: 5 per pixel, and 2 per neuron for each of
        ``panel_examples``.
    panel_examples : int, optional
        Number of examples per neuron, the first of its selection, over which logit effects are
        averaged; 32 by default.
    baseline : float or array of the shape of one input, optional
        The input from which activation maps start, in the model's units; 0 by default.
    window : (int, int), optional
        Numbers of tokens kept before and after each example, with their activations; (20, 10) by
        default.
    importances : {"none", "exact"}, optional
        Whether to measure, by masking, how much of each example's activation depends on each token
        of its window; see `polyseme.attribution.token_importances`. For a causal model, it costs
        about as much as reading the examples' contexts ``window[0] + 1`` times, so the default is
        "none"; `polyseme.analysis.importances.neuron_importances` computes them later, one neuron
        at a time.
    memory_budget : int or str, optional
        Memory limit, excluding the loaded model and libraries: bytes, or a string such as "4GB". If
        not all sites fit at once, the data is read several times, each time for some of the sites.
        The results do not depend on it.
    random_examples, seed : int
        Number of random activating examples kept per neuron, and the seed for drawing them.
    batch_size : int, optional
        Inputs per forward pass; 256 by default, or for texts as many contexts as hold 4,096 tokens.
        You may resume with a different batch size; only the same size reproduces the run byte for
        byte. If the device runs out of memory during the pass, batches are halved.
    engine : {"local", "ray"}
        "ray": Ray workers read the data, on this machine or a cluster, and this process does the
        rest. The run is the same.
    address : str, optional
        Address of the Ray cluster, "auto" or "ray://host:10001"; by default, Ray is started on this
        machine.
    workers : int, optional
        Number of Ray workers; by default one per GPU if the model is on a GPU, otherwise one per
        CPU.
    overwrite, resume : bool
        Replace an existing run, or resume an interrupted analysis.
    progress : bool
        Whether to show progress on the terminal, preceded by the plan: passes, memory, disk and
        time.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        For data that the model does not accept, NaN or infinite values, an empty data set, or an
        option out of range.
    SiteError
        For a site that the model does not have.
    RunError
        If the folder is in the way or belongs to another analysis.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    if engine not in _ENGINES:
        raise InputError(one_of("engine", str(engine), _ENGINES))
    # An engine iterates over them more than once.
    sites = [*sites] if isinstance(sites, Iterator) else sites
    exclude = [*exclude] if isinstance(exclude, Iterator) else exclude
    class_names = [*class_names] if isinstance(class_names, Iterator) else class_names
    options = {
        "select": select,
        "threshold": threshold,
        "linkage": linkage,
        "labels": labels,
        "class_names": class_names,
        "image_shape": image_shape,
        "panels": panels,
        "panel_examples": panel_examples,
        "baseline": baseline,
        "window": window,
        "importances": importances,
        "memory_budget": memory_budget,
        "random_examples": random_examples,
        "seed": seed,
        "batch_size": batch_size,
    }
    source = source_of(model, data, options)
    at_work: Engine | None = None
    if engine == "ray":
        from polyseme.analysis.ray_engine import RayEngine

        at_work = RayEngine(
            model, data, source, sites, exclude, options, address=address, workers=workers
        )
    elif address is not None or workers is not None:
        raise InputError(
            "address and workers apply only to engine='ray'; leave them out, or give engine='ray'."
        )
    return run_analysis(
        model,
        source,
        sites=sites,
        exclude=exclude,
        out=out,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
        engine=at_work,
    )
