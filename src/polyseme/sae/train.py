"""Training an SAE on activations, optionally with the NE loss."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata as installed
from numbers import Integral
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from polyseme import __version__
from polyseme.errors import InputError, one_of
from polyseme.interrupts import interrupt_between_steps
from polyseme.sae.batches import Batches, RowBatches, batches_of, digest
from polyseme.sae.checkpoint import TrainingFolder
from polyseme.sae.load import import_sae_lens, load_sae, sae_tensors
from polyseme.sae.ne_loss import FORMS
from polyseme.sae.record import TrainingRecord, read_training
from polyseme.sae.trainer import (
    ARCHITECTURES,
    GRADIENT_CLIP_NORM,
    WITH_K,
    WITH_L1,
    Trainer,
    build_sae,
    start_from,
)
from polyseme.store.files import RESUME, encode_json

EPOCHS = 10
# Slow steps are saved by time rather than by number, and an interrupt waits at most this long for a
# step to end.
CHECKPOINT_SECONDS, PATIENCE = 300.0, 3.0

# Multiplications per product of a step. At 8 million (256 × 64 × 512), two threads were three times
# slower than one, as they mostly wait for each other.
_WORTH_THREADS = 100_000_000


def train_sae(
    activations: Any,
    d_sae: int,
    *,
    architecture: str = "standard",
    ne_coefficient: float = 0.0,
    ne_form: str = "weighted",
    ne_momentum: float = 0.9,
    ne_start: int = 0,
    l1_coefficient: float | None = None,
    k: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    init_from: nn.Module | str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 1000,
    progress: bool = True,
    device: str | torch.device | None = None,
    architecture_options: Mapping[str, Any] | None = None,
    trainer_options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Any:
    """Train a sparse autoencoder with SAELens, plus the NE loss if its coefficient is positive.

    The losses are SAELens's, so published coefficients may need converting:

    - The reconstruction error is *summed* over the d_in coordinates and averaged over the batch.
      Multiply by d_in any coefficients (of both L1 and NE) that were published for an error
      averaged over coordinates.
    - The L1 loss is the sum over latents of activation times the norm of the latent's decoder
      row, averaged over the batch. It equals the sum of activations if those norms are 1.
    - The NE loss is a mean over active pairs (`polyseme.ne_loss`), times ``ne_coefficient``.
    - The optimizer is Adam; the norm of the gradient is clipped to 1, which is fixed in SAELens. So
      losses much larger than 1 train at a smaller effective rate: scale the activations.

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
        Coefficient of the NE loss. 0 disables it.
    ne_form : str
        The form of the NE loss, as in `polyseme.ne_loss`: "weighted", the paper's;
        "unweighted", whose latents had the fewest meanings and the purest examples in our study
        (docs/ne-loss-study.md); "calibrated".
    ne_momentum : float
        Momentum of the running means of the inputs that activate each latent, in [0, 1).
    ne_start : int
        Number of steps at the start without the NE loss, whose running means begin after them.
    l1_coefficient : float, optional
        For "standard" and "gated"; 1 by default.
    k : int or float, optional
        Active latents per input ("topk"), or on average ("batchtopk" and "matryoshka_batchtopk").
        By default, an eighth of d_sae, but at most 32.
    steps : int, optional
        Number of batches to train on. Needed for an iterable.
    epochs : float, optional
        For an array, the number of passes over it, instead of steps; 10 if neither is given.
    batch_size : int
    lr : float
        Adam's learning rate.
    weight_decay : float
        Added to the gradient, times the weight (Adam's own, not AdamW's).
    seed : int
        Determines the SAE's initial weights and the order of rows.
    init_from : torch.nn.Module, str or Path, optional
        An SAE to start from, or a source for `load_sae`.
    out : str, Path or URL, optional
        Folder to write the SAE to, in SAELens's format, with the training record beside it. During
        training, checkpoints are kept in ``<out>.partial``.
    overwrite : bool
        Replace an SAE in ``out`` once the new one is complete.
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

    Returns
    -------
    sae_lens.SAE
        The SAE for inference, in evaluation mode, as stock SAELens loads it from ``out``. Its
        ``cfg.metadata["polyseme"]`` holds the settings; its ``training_record`` is a
        `TrainingRecord`, which `read_training` reads from ``out``.

    Raises
    ------
    InputError
        An argument is invalid, the activations hold NaN or infinity, or the training diverges.
    RunError
        ``out`` is in the way, in use, or holds a different training from the one to resume.
    MissingDependencyError
        sae-lens is not installed.
    """
    settings: dict[str, Any] = {
        "architecture": _choice("architecture", architecture, ARCHITECTURES),
        "d_sae": _integer("d_sae", d_sae, 1),
        "ne_coefficient": _number("ne_coefficient", ne_coefficient),
        "ne_form": _choice("form of the NE loss", ne_form, FORMS),
        "ne_momentum": _momentum(ne_momentum),
        "ne_start": _integer("ne_start", ne_start, 0),
        "batch_size": _integer("batch_size", batch_size, 1),
        "lr": _number("lr", lr, above=True),
        "weight_decay": _number("weight_decay", weight_decay),
        "seed": _integer("seed", seed, 0),
        "architecture_options": dict(architecture_options or {}),
        "trainer_options": dict(trainer_options or {}),
        "metadata": dict(metadata or {}),
    }
    settings |= _sparsity(settings, l1_coefficient, k)
    every = _integer("checkpoint_every", checkpoint_every, 1)
    if resume and out is None:
        raise InputError("resume was given without out. Give the folder of the training.")
    import_sae_lens("Training an SAE")
    batches = batches_of(activations, settings["batch_size"], settings["seed"])
    settings["steps"] = _steps(batches, settings["batch_size"], steps, epochs)
    _refuse_what_is_not_json(settings)
    place = torch.device(device) if device is not None else batches.device
    sae = build_sae(architecture, batches.d_in, settings, settings["metadata"])
    if init_from is not None:
        source = load_sae(init_from) if isinstance(init_from, str | Path) else init_from
        start_from(sae, source)
        settings["init_from"] = _digest_of(source)
    trainer = Trainer(sae, settings, place)
    fingerprint = {"settings": settings, "data": batches.fingerprint()}

    folder = None
    if out is not None:
        folder = TrainingFolder(out, fingerprint, overwrite=overwrite, resume=resume)
    with folder or nullcontext():
        if folder is None or not folder.finished:
            with _threads_for(settings["batch_size"] * batches.d_in * settings["d_sae"]):
                _train(trainer, batches, folder, every, progress)
            return _finish(trainer, fingerprint, folder, place)
        return _open(folder.shown, place)


# The training.


def _train(
    trainer: Trainer, batches: Batches, folder: TrainingFolder | None, every: int, progress: bool
) -> None:
    seen = None
    if folder is not None and (checkpoint := folder.load()) is not None:
        tensors, content = checkpoint
        trainer.restore(tensors, content)
        seen = str(content["last_batch"])
    stream = batches.from_step(trainer.done, seen)
    batch: Tensor | None = None
    saved, last = trainer.done, time.monotonic()

    def save() -> None:
        nonlocal saved, last
        last = time.monotonic()
        if folder is not None and batch is not None and trainer.done > saved:
            tensors, content = trainer.state()
            folder.save(tensors, content | {"last_batch": digest(batch)})
            saved = trainer.done

    whole = True  # between two steps, when the state can be saved
    with interrupt_between_steps(PATIENCE) as pause, _bar(progress, trainer) as show:
        try:
            while trainer.done < trainer.steps:
                pause()
                following = next(stream)
                whole, batch = False, following
                trainer.step(batch)
                whole = True
                late = time.monotonic() - last > CHECKPOINT_SECONDS
                if late or trainer.done % every == 0 or trainer.done == trainer.steps:
                    save()
                show()
        except BaseException as error:
            if whole:
                save()
            if saved and folder is not None:
                error.add_note(f"The checkpoint of step {saved} is kept. Resume with {RESUME}.")
            raise


def _finish(
    trainer: Trainer,
    fingerprint: Mapping[str, Any],
    folder: TrainingFolder | None,
    device: torch.device,
) -> Any:
    details = {
        "polyseme_version": __version__,
        "sae_lens_version": installed.version("sae-lens"),
        "torch_version": torch.__version__,
        **({} if folder is None else {"versions": folder.versions}),
        **fingerprint,
        "reconstruction_loss": "squared error, summed over coordinates, mean over the batch",
        "optimizer": "Adam",
        "gradient_clip_norm": GRADIENT_CLIP_NORM,
        "last_step": trainer.losses,
    }

    def write(path: Path, identity: Mapping[str, Any]) -> None:
        tensors = trainer.finish(path, details)
        TrainingRecord(details, trainer.history, tensors).save(path, identity)

    if folder is not None:
        folder.finish(write)
        return _open(folder.shown, device)
    with tempfile.TemporaryDirectory() as path:
        write(Path(path), fingerprint)
        return _open(Path(path), device)


def _open(path: str | Path, device: torch.device) -> Any:
    sae: Any = load_sae(path, device=device)
    sae.training_record = read_training(path)
    return sae


@contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """Use one thread if steps are so small that threads cost more than they save."""
    before = torch.get_num_threads()
    if products < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _bar(show: bool, trainer: Trainer) -> Iterator[Callable[[], None]]:
    """A progress bar; yields the function that updates it."""
    with Progress(
        TextColumn("training {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    ) as bars:
        task = bars.add_task("", total=trainer.steps, completed=trainer.done)

        def update() -> None:
            losses = " ".join(
                f"{name.removesuffix('_loss')} {value:.3g}"
                for name, value in trainer.losses.items()
                if name in ("loss", "ne_loss", "l0")
            )
            bars.update(task, completed=trainer.done, description=losses)

        yield update


# Checks of the arguments.


def _integer(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} is {value!r}; a whole number of at least {least} is expected.")
    return int(value)


def _float(value: Any) -> float:
    """Convert to a float; NaN for anything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return math.nan
    return float(value)


def _number(name: str, value: Any, *, above: bool = False) -> float:
    number = _float(value)
    if not math.isfinite(number) or number < 0 or (above and number == 0):
        kind = "above 0" if above else "of at least 0"
        raise InputError(f"{name} is {value!r}; a finite number {kind} is expected.")
    return number


def _choice(kind: str, value: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if value not in names:
        raise InputError(one_of(kind, str(value), names))
    return str(value)


def _momentum(value: Any) -> float:
    if not 0 <= (number := _float(value)) < 1:
        raise InputError(
            f"ne_momentum is {value!r}; expected a number of at least 0 and below 1, the share of "
            f"the old mean that is kept."
        )
    return number


def _sparsity(settings: Mapping[str, Any], l1: Any, k: Any) -> dict[str, Any]:
    """Settings that make the architecture sparse; refuses any that it would ignore."""
    architecture, d_sae = settings["architecture"], settings["d_sae"]
    for name, value, takes in (("l1_coefficient", l1, WITH_L1), ("k", k, WITH_K)):
        if value is not None and architecture not in takes:
            raise InputError(
                f"{name} is {value!r}, but the architecture {architecture!r} does not use it; it "
                f"is for {', '.join(takes)}. Leave it out."
            )
    if architecture in WITH_L1:
        return {"l1_coefficient": _number("l1_coefficient", 1.0 if l1 is None else l1)}
    if architecture not in WITH_K:
        return {}
    if k is None:
        k = min(32, max(1, d_sae // 8))
    active = _integer("k", k, 1) if architecture == "topk" else _number("k", k, above=True)
    if active > d_sae:
        raise InputError(f"k is {k!r}, more than the {d_sae} latents of d_sae. Give a smaller one.")
    if int(active * settings["batch_size"]) < 1:
        raise InputError(
            f"k is {k!r}, which leaves no active latent in a batch of {settings['batch_size']}. "
            "Give a larger one."
        )
    return {"k": active}


def _steps(batches: Batches, batch_size: int, steps: Any, epochs: Any) -> int:
    if steps is not None and epochs is not None:
        raise InputError(f"steps is {steps!r} and epochs is {epochs!r}; give only one of them.")
    if steps is not None:
        return _integer("steps", steps, 1)
    if not isinstance(batches, RowBatches):
        raise InputError(
            "activations is an iterable of batches, of unknown length. Give steps, the number of "
            "batches to train on."
        )
    passes = _number("epochs", EPOCHS if epochs is None else epochs, above=True)
    return max(1, int(passes * batches.n_rows // batch_size))


def _refuse_what_is_not_json(settings: Mapping[str, Any]) -> None:
    for name in ("architecture_options", "trainer_options", "metadata"):
        try:
            encode_json(settings[name])
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{name} must be plain JSON (no NaN, no NumPy scalars), as it is saved with the "
                f"SAE: {error}."
            ) from None
    if "polyseme" in settings["metadata"]:
        raise InputError("metadata holds 'polyseme', which is reserved. Rename it.")


def _digest_of(sae: nn.Module) -> str:
    tensors = sorted(sae_tensors(sae).items())
    digests = "".join(f"{name}{digest(tensor)}" for name, tensor in tensors)
    return hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()
