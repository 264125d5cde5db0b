"""Training an SAE on activations, optionally with the NE loss."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
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
from polyseme.options import TrainingOptions, takes
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

_EPOCHS = 10
_JSON = ("architecture_options", "trainer_options", "metadata")
# Slow steps are saved by time rather than by number, and an interrupt waits at most this long for a
# step to end.
CHECKPOINT_SECONDS, PATIENCE = 300.0, 3.0

# Multiplications per product of a step. At 8 million (256 × 64 × 512), two threads were three times
# slower than one, as they mostly wait for each other.
_WORTH_THREADS = 100_000_000


@takes(TrainingOptions)
def train_sae(options: TrainingOptions) -> Any:
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
    settings = _checked(options)
    every = _integer("checkpoint_every", options.checkpoint_every, 1)
    if options.resume and options.out is None:
        raise InputError("resume was given without out. Give the folder of the training.")
    import_sae_lens("Training an SAE")
    batches = batches_of(options.activations, settings["batch_size"], settings["seed"])
    settings["steps"] = _steps(batches, settings["batch_size"], options.steps, options.epochs)
    _refuse_what_is_not_json(settings)
    place = batches.device if options.device is None else torch.device(options.device)
    sae = build_sae(settings["architecture"], batches.d_in, settings, settings["metadata"])
    if (source := options.init_from) is not None:
        source = load_sae(source) if isinstance(source, str | Path) else source
        start_from(sae, source)
        settings["init_from"] = _digest_of(source)
    trainer = Trainer(sae, settings, place)
    fingerprint = {"settings": settings, "data": batches.fingerprint()}

    folder = None
    if options.out is not None:
        folder = TrainingFolder(
            options.out, fingerprint, overwrite=options.overwrite, resume=options.resume
        )
    with folder or nullcontext():
        if folder is None or not folder.finished:
            with _threads_for(settings["batch_size"] * batches.d_in * settings["d_sae"]):
                _train(trainer, batches, folder, every, options.progress)
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


# Checks of the options.


def _checked(options: TrainingOptions) -> dict[str, Any]:
    """The options that determine the SAE, except the number of steps, as recorded with it."""
    checks: dict[str, Callable[[str, Any], Any]] = {
        "architecture": partial(_choice, allowed=ARCHITECTURES),
        "d_sae": partial(_integer, least=1),
        "ne_coefficient": _number,
        "ne_form": lambda _, form: _choice("form of the NE loss", form, FORMS),
        "ne_momentum": _share,
        "ne_start": partial(_integer, least=0),
        "batch_size": partial(_integer, least=1),
        "lr": partial(_number, above=True),
        "weight_decay": _number,
        "seed": partial(_integer, least=0),
        **dict.fromkeys(_JSON, lambda _, mapping: dict(mapping or {})),
    }
    settings = {name: check(name, getattr(options, name)) for name, check in checks.items()}
    return settings | _sparsity(settings, options.l1_coefficient, options.k)


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


def _share(name: str, value: Any) -> float:
    if not 0 <= (number := _float(value)) < 1:
        raise InputError(
            f"{name} is {value!r}; expected a number of at least 0 and below 1, the share of "
            f"the old mean that is kept."
        )
    return number


def _sparsity(settings: Mapping[str, Any], l1: Any, k: Any) -> dict[str, Any]:
    """Settings that make the architecture sparse; refuses any that it would ignore."""
    architecture, d_sae = settings["architecture"], settings["d_sae"]
    for name, value, users in (("l1_coefficient", l1, WITH_L1), ("k", k, WITH_K)):
        if value is not None and architecture not in users:
            raise InputError(
                f"{name} is {value!r}, but the architecture {architecture!r} does not use it; it "
                f"is for {', '.join(users)}. Leave it out."
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
    passes = _number("epochs", _EPOCHS if epochs is None else epochs, above=True)
    return max(1, int(passes * batches.n_rows // batch_size))


def _refuse_what_is_not_json(settings: Mapping[str, Any]) -> None:
    for name in _JSON:
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
