"""The options of analyses and of SAE training: each name, type, default and meaning, once.

The library takes them as keyword arguments, and the command line makes its options of them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from polyseme.errors import InputError, one_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from polyseme.capture import Selector
    from polyseme.sites import Site

P = ParamSpec("P")
Options = TypeVar("Options")
Result = TypeVar("Result")


def takes(
    options: Callable[P, Options],
) -> Callable[[Callable[[Options], Result]], Callable[P, Result]]:
    """Decorate a function of an options object, so that it is called with the object's fields."""
    signature, texts = inspect.signature(options), descriptions(options)
    # Names that share a description stand in one line. Python may be run without docstrings.
    lines = dict.fromkeys("\n    ".join(texts.get(name, [])) for name in signature.parameters)
    parameters = "\n".join(["Parameters", "----------", *lines])

    def decorate(function: Callable[[Options], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def call(*arguments: P.args, **named: P.kwargs) -> Result:
            for name in named:
                if name not in signature.parameters:
                    raise InputError(one_of("option", name, sorted(signature.parameters)))
            try:
                signature.bind(*arguments, **named)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(options(*arguments, **named))

        # For help() and notebooks; type checkers have it from the types.
        about, returns, rest = inspect.cleandoc(function.__doc__ or "").partition("Returns\n---")
        call.__doc__ = f"{about}{parameters}\n\n{returns}{rest}"
        returned = inspect.signature(function).return_annotation
        vars(call)["__signature__"] = signature.replace(return_annotation=returned)
        return call

    return decorate


def descriptions(definition: Callable[..., Any]) -> dict[str, list[str]]:
    """The lines that describe each parameter of a function or class in its NumPy docstring."""
    classes = definition.__mro__[::-1] if isinstance(definition, type) else ()
    texts: dict[str, list[str]] = {}
    for documented in classes or (definition,):
        _, _, after = inspect.cleandoc(documented.__doc__ or "").partition("Parameters\n------")
        lines: list[str] = []
        for line in after.split("\n\n")[0].splitlines()[1:]:
            if not line.startswith(" "):
                lines = [line]
                texts |= dict.fromkeys(line.partition(" : ")[0].split(", "), lines)
            else:
                lines.append(line.strip())
    return texts


@dataclass(frozen=True, eq=False, repr=False)
class Job:
    """A model, data to read with it, and where the result goes.

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
    overwrite : bool
        Replace an existing run.
    resume : bool
        Resume an interrupted analysis.
    progress : bool
        Whether to show progress on the terminal, preceded by the plan: passes, memory, disk and
        time.
    """

    model: nn.Module
    data: Any
    _: KW_ONLY
    sites: str | Site | Iterable[str | Site]
    exclude: str | Iterable[str] = ()
    out: str | Path
    overwrite: bool = False
    resume: bool = False
    progress: bool = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AnalysisSettings:
    """Options for what an analysis finds and keeps.

    Parameters
    ----------
    select : Selector, optional
        Which examples represent a neuron: ``TopK(k)``, ``AboveFraction(fraction, max_examples)``,
        ``FirstActive(n, minimum)`` or ``Stratified(k, bins)``; by default ``TopK(100)``. The paper
        uses ``AboveFraction(0.75, 100)`` for texts.
    threshold : float, optional
        Cosine distance in (0, 2] at which trees are cut into features; by default the published
        0.05 for SAEs and 0.2 for other neurons, or 0.5 for other neurons on texts. It can be
        changed later, as whole trees are kept.
    linkage : {"average", "single"}
        How the distance between two clusters is defined: "average" or "single".
    labels : array of int, shape (n,), optional
        Class of each input, if ``data`` is an array.
    class_names : iterable of str, optional
        Name of each class.
    image_shape : tuple of int, optional
        How to show an input whose own shape is flat: (height, width) or (channels, height, width).
    panels : bool, optional
        Whether to compute activation maps and, for classifiers, logit effects; True by default for
        images. This takes extra forward passes: 5 per pixel, and 2 per neuron for each of
        ``panel_examples``.
    panel_examples : int
        Number of examples per neuron, the first of its selection, over which logit effects are
        averaged.
    baseline : float or array of the shape of one input, optional
        The input from which activation maps start, in the model's units; 0 by default.
    window : (int, int)
        Numbers of tokens kept before and after each example, with their activations.
    importances : {"none", "exact"}
        "exact": mask each token of an example's window to measure how much of the activation
        depends on it, which takes about 20 times as long as reading the text. See
        `polyseme.attribution.token_importances`. For a causal model, it costs about as much as
        reading the examples' contexts ``window[0] + 1`` times, so the default is "none";
        `polyseme.analysis.importances.neuron_importances` computes them later, one neuron at a
        time.
    memory_budget : int or str, optional
        Memory limit, excluding the loaded model and libraries: bytes, or a string such as "4GB"; if
        not all sites fit at once, the data is read several times, each time for some of the sites.
        The results do not depend on it.
    random_examples : int
        Number of random activating examples kept per neuron.
    seed : int
        Random seed, for drawing the random examples.
    batch_size : int, optional
        Inputs per forward pass; 256 by default, or for texts as many contexts as hold 4,096 tokens.
        You may resume with a different batch size; only the same size reproduces the run byte for
        byte. If the device runs out of memory during the pass, batches are halved.
    """

    select: Selector | None = None
    threshold: float | None = None
    linkage: str = "average"
    labels: Any = None
    class_names: Iterable[str] | None = None
    image_shape: tuple[int, ...] | None = None
    panels: bool | None = None
    panel_examples: int = 32
    baseline: float | NDArray[Any] | None = None
    window: tuple[int, int] | None = (20, 10)
    importances: str = "none"
    memory_budget: int | str | None = None
    random_examples: int = 16
    seed: int = 0
    batch_size: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class ReadingOptions(AnalysisSettings, Job):
    """What a pass over the data needs to know."""

    def __post_init__(self) -> None:
        for name in ("sites", "exclude", "class_names"):
            if isinstance(value := getattr(self, name), Iterator):
                # They are iterated over more than once.
                object.__setattr__(self, name, [*value])


@dataclass(frozen=True, eq=False, repr=False)
class ShardOptions(ReadingOptions):
    """Options of `polyseme.analyse_shard`.

    Parameters
    ----------
    shard : str or (int, int)
        Which part of the data to read, of how many: "3/64". Parts are numbered from 1; 0 is the
        last.
    """

    shard: str | tuple[int, int]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AnalysisOptions(ReadingOptions):
    """Options of `polyseme.analyse`.

    Parameters
    ----------
    engine : {"local", "ray"}
        "local", or "ray" to read the data with Ray workers, on this machine or a cluster, while
        this process does the rest. The run is the same.
    address : str, optional
        Address of the Ray cluster, "auto" or "ray://host:10001"; by default, Ray is started on this
        machine.
    workers : int, optional
        Number of Ray workers; by default one per GPU if the model is on a GPU, otherwise one per
        CPU.
    """

    engine: str = "local"
    address: str | None = None
    workers: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class TrainingOptions:
    """Options of `polyseme.train_sae`.

    Parameters
    ----------
    activations : Tensor, array or iterable
        Shape (n, d_in), reshuffled in each epoch by the seed; it stays on its device, or on disk if
        memory-mapped. Or an iterable of batches (B, d_in), read in order; batches of any size are
        recut to ``batch_size`` rows, and no row is dropped. Values are converted to float32.
    d_sae : int
        Number of latents.
    architecture : str
        "standard" (ReLU and L1), "topk", "batchtopk", "jumprelu", "gated" or
        "matryoshka_batchtopk".
    ne_coefficient : float
        Coefficient of the NE loss; 0 disables it.
    ne_form : str
        Form of the NE loss, as in `polyseme.ne_loss`: "weighted", the paper's; "unweighted", whose
        latents had the fewest meanings and the purest examples in our study
        (docs/ne-loss-study.md); or "calibrated".
    ne_momentum : float
        Momentum of the running means of the inputs that activate each latent, in [0, 1).
    ne_start : int
        Number of steps at the start without the NE loss, whose running means begin after them.
    l1_coefficient : float, optional
        L1 coefficient, for "standard" and "gated"; 1 by default.
    k : int or float, optional
        Active latents per input ("topk"), or on average ("batchtopk" and "matryoshka_batchtopk");
        by default, an eighth of d_sae, but at most 32.
    steps : int, optional
        Number of batches to train on. Needed for an iterable.
    epochs : float, optional
        Passes over the activations; 10 by default. Not for an iterable, nor with ``steps``.
    batch_size : int
        Activations per batch.
    lr : float
        Learning rate of Adam.
    weight_decay : float
        Weight decay, added to the gradient (Adam's own, not AdamW's).
    seed : int
        Random seed, for the initial weights and the order of rows.
    init_from : torch.nn.Module, str or Path, optional
        An SAE to start from, or a source for `load_sae`.
    out : str, Path or URL, optional
        Folder or URL to write the SAE to, in SAELens's format, with the training record beside it.
        During training, checkpoints are kept in ``<out>.partial``.
    overwrite : bool
        Replace an existing SAE, once the new one is complete.
    resume : bool
        Resume an interrupted training with the same settings, or start if there is none. On the
        CPU, the result is bit-identical. An iterable must yield the same batches again, from the
        first.
    checkpoint_every : int
        Steps between checkpoints. One is also written every five minutes, on an interrupt and if
        the activations raise an error.
    progress : bool
        Show a progress bar on the terminal.
    device : str or torch.device, optional
        Where to train; by default, the device of the activations.
    architecture_options : mapping, optional
        Other fields of SAELens's configuration of the architecture, such as
        ``{"aux_loss_coefficient": 0.03}`` or ``{"l0_coefficient": 0.5}``.
    trainer_options : mapping, optional
        Fields of SAELens's ``SAETrainerConfig``: ``lr_scheduler_name``, ``lr_end``,
        ``lr_warm_up_steps``, ``lr_decay_steps``, ``n_restart_cycles``, ``adam_beta1``,
        ``adam_beta2``, ``dead_feature_window``, ``feature_sampling_window``.
    metadata : mapping, optional
        Plain JSON to add to the SAE's metadata, such as SAELens's ``model_name``, ``hook_name``.
    """

    activations: Any
    d_sae: int
    _: KW_ONLY
    architecture: str = "standard"
    ne_coefficient: float = 0.0
    ne_form: str = "weighted"
    ne_momentum: float = 0.9
    ne_start: int = 0
    l1_coefficient: float | None = None
    k: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0
    init_from: nn.Module | str | Path | None = None
    out: str | Path | None = None
    overwrite: bool = False
    resume: bool = False
    checkpoint_every: int = 1000
    progress: bool = True
    device: str | torch.device | None = None
    architecture_options: Mapping[str, Any] | None = None
    trainer_options: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
