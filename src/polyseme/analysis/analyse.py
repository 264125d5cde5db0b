"""From a model and data to a run."""

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

    The data is read once, for all sites together, in bounded memory. The model is used in
    evaluation mode and is left as it was. In a text, each neuron has at most one example in a
    context: the place where it fires most, among the tokens that count (`Contexts`).

    An option that the data has no use for is refused: those from ``labels`` to ``baseline`` are
    for images and other arrays, ``window`` and ``importances`` for texts.

    Parameters
    ----------
    model : torch.nn.Module
        On any device; inputs follow it there. For texts, a language model of transformers.
    data : array, tensor, pair, path, Images, Contexts, data set or iterable
        Texts as `Contexts` of tokens; for all else see `polyseme.data.sources.as_source`. uint8
        images are scaled to [0, 1]; for another scaling give `polyseme.data.Images`.
    sites : str, Site, or a list of them
        Names of modules, or globs over them: ``"layers.0"``, ``"features.*"``, or
        ``"model.layers.*.mlp"`` for the neurons of every MLP of a language model. An SAE is a site
        by its own name or by its encoder's; one at a hook point of a language model becomes a site
        by `polyseme.attach_sae`. Of layers that a glob matches, those that the model does not run
        are left out, with a warning.
    exclude : str or list of str
        Names, or globs over them, of sites to leave out.
    out : str or Path
        Folder of the run, or a URL such as ``s3://bucket/run``, to which the run is sent when it
        is complete.
    select : Selector, optional
        Which examples stand for a neuron; by default ``TopK(100)``. The paper's for texts are
        ``AboveFraction(0.75, 100)``.
    threshold : float, optional
        Cosine distance in (0, 2] at which trees are cut; by default the published 0.05 for
        SAEs and 0.2 for other neurons, of texts 0.5. It can be changed later, the whole tree is
        kept.
    linkage : {"average", "single"}
    labels : array of int, shape (n,), optional
        Class of each input, where ``data`` is an array.
    class_names : iterable of str, optional
        Name of each class.
    image_shape : tuple of int, optional
        How to show an input, where its own shape is flat: (height, width) or (channels,
        height, width).
    panels : bool, optional
        Whether to compute activation maps and, for classifiers, logit effects, as is done by
        default: more forward passes, 5 for each pixel and 2 for each of ``panel_examples`` of
        each neuron.
    panel_examples : int, optional
        Examples a neuron, the first of its selection, that logit effects are averaged over; 32
        by default.
    baseline : float or array of the shape of one input, optional
        The input from which activation maps start, in the model's units; 0 by default.
    window : (int, int), optional
        Tokens before and after each example that are kept with their activations; (20, 10) by
        default.
    importances : {"none", "exact"}, optional
        Whether to find, by masking, how much of each example's activation rests on each token
        of its window; see `polyseme.attribution.token_importances`. For a causal model it costs
        about as much as reading ``window[0] + 1`` times the contexts that examples are in, so it
        is left out unless asked for, and can be had later, neuron by neuron, by
        `polyseme.analysis.importances.neuron_importances`.
    memory_budget : int or str, optional
        Memory limit, excluding the loaded model and the libraries at work: bytes, or such as
        "4GB". If not all sites fit at once, the data is read several times, for some of them each.
        It does not change the results.
    random_examples, seed : int
        Random activating examples kept for each neuron, and the seed that they are drawn with.
    batch_size : int, optional
        Inputs in one forward pass; 256 by default, of contexts 4,096 tokens. You may resume with
        a different batch size; only the same size reproduces the run byte for byte. If the device
        runs out of memory in the pass, batches are halved.
    engine : {"local", "ray"}
        "ray": processes of Ray read the data, on this machine or on a cluster; this one does the
        rest. The run is the same.
    address : str, optional
        Of the Ray cluster, "auto" or "ray://host:10001"; by default Ray is started here.
    workers : int, optional
        Processes of Ray; by default one for each GPU where the model is on one, else for each CPU.
    overwrite, resume : bool
        Replace a run that exists; or resume an analysis that was interrupted.
    progress : bool
        Whether to show progress on the terminal, and first of all the plan: passes, memory, disk
        and time.

    Returns
    -------
    Run

    Raises
    ------
    InputError
        For data that the model cannot take, NaN or infinite values, an empty data set, an
        option out of range.
    SiteError
        For a site that the model does not have.
    RunError
        If the folder is in the way, or belongs to another analysis.

    References
    ----------
    A. Foote, *Tackling Polysemanticity with Neuron Embeddings*, arXiv 2411.08166 (2024).
    """
    if engine not in _ENGINES:
        raise InputError(one_of("engine", str(engine), _ENGINES))
    # An engine goes through them more than once.
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
        raise InputError("address and workers are for engine='ray'; leave them out, or give it.")
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
