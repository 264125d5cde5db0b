"""SAELens's trainer, with the NE loss for any SAELens architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyseme.errors import InputError, one_of
from polyseme.sae.load import import_sae_lens, load_sae, sae_tensors
from polyseme.sae.ne_loss import NETerm

# The architectures, each with its classes in SAELens: <name>TrainingSAE, <name>TrainingSAEConfig.
ARCHITECTURES = {
    "standard": "Standard",
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "jumprelu": "JumpReLU",
    "gated": "Gated",
    "matryoshka_batchtopk": "MatryoshkaBatchTopK",
}
WITH_L1 = ("standard", "gated")
WITH_K = ("topk", "batchtopk", "matryoshka_batchtopk")

# Options of SAELens's configurations that train_sae sets itself or does not support.
_NOT_OPTIONS = {
    "d_in": "the activations say it",
    "d_sae": "give d_sae",
    "k": "give k",
    "l1_coefficient": "give l1_coefficient",
    "device": "give device",
    "metadata": "give metadata",
    "dtype": "SAEs are trained in float32",
    "normalize_activations": "the NE loss reads what the encoder reads: scale the activations "
    "before training",
    "reshape_activations": "reshape the activations before training",
}
_TRAINER_OPTIONS = (
    "lr_end",
    "lr_scheduler_name",
    "lr_warm_up_steps",
    "lr_decay_steps",
    "n_restart_cycles",
    "adam_beta1",
    "adam_beta2",
    "dead_feature_window",
    "feature_sampling_window",
)
GRADIENT_CLIP_NORM = 1.0  # fixed in SAELens's trainer


class _WithNELoss:
    """Adds the NE loss to any of SAELens's training SAEs."""

    W_enc: nn.Parameter
    ne_term: NETerm
    ne_start: int

    def training_forward_pass(self, step_input: Any) -> Any:
        output = super().training_forward_pass(step_input)  # type: ignore[misc]
        if step_input.n_training_steps >= self.ne_start:
            # Its input is the SAE's, without subtracting the decoder bias.
            distance = self.ne_term.step(step_input.sae_in, self.W_enc.T, output.feature_acts)
            loss = self.ne_term.coefficient * distance
            output.losses["ne_loss"] = loss
            output.metrics["ne_distance"] = distance.detach()
            output.loss = output.loss + loss
        return output


def build_sae(
    architecture: str, d_in: int, settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> Any:
    """Build SAELens's training SAE, with the NE loss if its coefficient is positive.

    It is built on the CPU whatever the device, so that a seed gives the same SAE everywhere;
    torch's random state is restored.
    """
    sae_lens = import_sae_lens("Training an SAE")
    name = ARCHITECTURES[architecture]
    base = getattr(sae_lens, f"{name}TrainingSAE")
    config_class = getattr(sae_lens, f"{name}TrainingSAEConfig")
    options = _architecture_options(config_class, architecture, settings)
    random_state = torch.get_rng_state()
    torch.default_generator.manual_seed(settings["seed"])
    try:
        config = config_class(d_in=d_in, d_sae=settings["d_sae"], **options)
        for key, value in metadata.items():
            config.metadata[key] = value
        if settings["ne_coefficient"]:
            base = type(f"{base.__name__}WithNELoss", (_WithNELoss, base), {})
        return base(config)
    except (TypeError, ValueError) as error:
        raise InputError(f"SAELens rejects these options of {architecture!r}: {error}") from error
    finally:
        torch.set_rng_state(random_state)


def _architecture_options(
    config_class: Any, architecture: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    options = dict(settings["architecture_options"])
    fields = {field.name for field in dataclasses.fields(config_class)}
    for option in options:
        if option in _NOT_OPTIONS:
            raise InputError(
                f"architecture_options holds {option!r}, which cannot be set there: "
                f"{_NOT_OPTIONS[option]}."
            )
        if option not in fields:
            kind = f"option of the architecture {architecture!r}"
            raise InputError(one_of(kind, option, sorted(fields - _NOT_OPTIONS.keys())))
    if architecture in WITH_L1:
        options["l1_coefficient"] = settings["l1_coefficient"]
    if architecture in WITH_K:
        options["k"] = settings["k"]
    if architecture == "matryoshka_batchtopk":
        d_sae = settings["d_sae"]
        widths = options.get("matryoshka_widths") or [d_sae // 8, d_sae // 4, d_sae // 2]
        options["matryoshka_widths"] = sorted({*(width for width in widths if width), d_sae})
    return options


def start_from(sae: Any, source: nn.Module | str | Path) -> None:
    """Copy the weights of another SAE into the one to train.

    Raises
    ------
    InputError
        The other SAE has different widths or tensors, or treats its input differently.
    """
    other = load_sae(source) if isinstance(source, str | Path) else source
    weights = sae_tensors(other)
    expected = dict(sae.state_dict())
    if "topk_threshold" in expected and "threshold" in weights:
        # A trained BatchTopK SAE is a JumpReLU SAE whose latents share one threshold.
        weights["topk_threshold"] = weights.pop("threshold").double().mean()
    elif "topk_threshold" in expected:
        weights.setdefault("topk_threshold", expected["topk_threshold"])
    architecture = sae.cfg.architecture()
    if missing := sorted(expected.keys() - weights.keys()):
        raise InputError(f"init_from has no {missing[0]}, which a {architecture!r} SAE has.")
    if surplus := sorted(weights.keys() - expected.keys()):
        raise InputError(
            f"init_from has a tensor {surplus[0]!r}, which a {architecture!r} SAE does not have."
        )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise InputError(
                f"init_from has {name} of shape {tuple(weights[name].shape)}; from the activations "
                f"and d_sae, expected {tuple(tensor.shape)}."
            )
    source_of = getattr(other, "cfg", other)
    theirs = bool(getattr(source_of, "apply_b_dec_to_input", True))
    if theirs != sae.cfg.apply_b_dec_to_input:
        raise InputError(
            f"init_from has apply_b_dec_to_input {theirs}, but the SAE to train has "
            f"{sae.cfg.apply_b_dec_to_input}. Give architecture_options={{'apply_b_dec_to_input': "
            f"{theirs}}}."
        )
    if (norm := getattr(source_of, "normalize_activations", "none")) != "none":
        raise InputError(
            f"init_from has normalize_activations {norm!r}, but the SAE to train reads activations "
            f"unchanged. Start from an SAE that does so too."
        )
    sae.load_state_dict(weights)


class Trainer:
    """Training with SAELens's `SAETrainer`, a step at a time.

    SAELens's own loop shows its own progress and pickles its own checkpoints; its `step` is meant
    for callers with their own loop.

    Parameters
    ----------
    sae : a training SAE of SAELens
    settings : mapping
    device : torch.device
    """

    def __init__(self, sae: Any, settings: Mapping[str, Any], device: torch.device) -> None:
        sae_lens = import_sae_lens("Training an SAE")
        from sae_lens.config import LoggingConfig, SAETrainerConfig

        options = dict(settings["trainer_options"])
        for option in options:
            if option not in _TRAINER_OPTIONS:
                raise InputError(one_of("trainer option", option, _TRAINER_OPTIONS))
        options.setdefault("lr_end", settings["lr"] / 10)  # as SAELens's own runner sets it
        self.sae = sae.to(device=device)
        self.steps = int(settings["steps"])
        batch_size = settings["batch_size"]
        try:
            config = SAETrainerConfig(
                total_training_samples=self.steps * batch_size,
                train_batch_size_samples=batch_size,
                lr=settings["lr"],
                device=str(device),
                logger=LoggingConfig(log_to_wandb=False),
                **options,
            )
            self._trainer = sae_lens.SAETrainer(config, self.sae, iter(()))
        except (TypeError, ValueError) as error:
            raise InputError(f"SAELens rejects these options of its trainer: {error}") from error
        for group in self._trainer.optimizer.param_groups:
            group["weight_decay"] = settings["weight_decay"]
        self.term: NETerm | None = None
        if settings["ne_coefficient"]:
            # Not a module, as its state is not a weight of the SAE.
            self.term = self.sae.ne_term = NETerm(
                settings["ne_coefficient"],
                settings["d_sae"],
                self.sae.cfg.d_in,
                momentum=settings["ne_momentum"],
                form=settings["ne_form"],
                device=device,
            )
            self.sae.ne_start = settings["ne_start"]
        self._every = math.ceil(self.steps / 500)
        self.history: dict[str, list[float | None]] = {"step": []}
        self.losses: dict[str, float] = {}

    @property
    def done(self) -> int:
        """Number of completed steps."""
        return int(self._trainer.n_training_steps)

    def step(self, batch: Tensor) -> None:
        """Train on one batch.

        Raises
        ------
        InputError
            The loss is NaN or infinite, so the SAE is ruined; or torch lacks a kernel.
        """
        trainer = self._trainer
        trainer.maybe_reset_sparsity()
        try:
            output = trainer.step(batch)
        except NotImplementedError as error:
            raise InputError(
                f"torch cannot run a training step of this SAE on {trainer.cfg.device} "
                f"({str(error).split('.')[0]}). With use_sparse_activations, also give "
                f"rescale_acts_by_decoder_norm=False, or leave it out."
            ) from error
        trainer.n_training_steps += 1
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            self._diverged("The loss", loss)
        if self.done % self._every == 0 or self.done in (1, self.steps):
            self._remember(output, loss)

    def _diverged(self, what: str, value: float) -> None:
        raise InputError(
            f"{what} became {value} at step {self.done}: the training diverged. Give a smaller lr, "
            "or scale the activations to a mean square of about 1."
        )

    def _remember(self, output: Any, loss: float) -> None:
        acts = output.feature_acts.detach()
        active = (acts.coalesce().values() if acts.is_sparse else acts).count_nonzero()
        entry = {"step": self.done, "loss": loss, "l0": float(active) / len(acts)}
        entry |= {name: float(value.detach()) for name, value in output.losses.items()}
        if "ne_distance" in output.metrics:
            entry["ne_distance"] = float(output.metrics["ne_distance"])
        before = len(self.history["step"])
        for name in self.history.keys() | entry.keys():
            # The NE term may start later.
            self.history.setdefault(name, [None] * before).append(entry.get(name))
        self.losses = entry

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on, as tensors and plain JSON.

        Raises
        ------
        InputError
            A weight is NaN or infinite, so the state is not worth saving.
        """
        trainer = self._trainer
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, value in tensors.items():
            if not bool(torch.isfinite(value).all()):
                self._diverged(f"A weight in {name.removeprefix('sae.')}", math.nan)
        optimizer = trainer.optimizer.state_dict()
        for number, moments in optimizer["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        tensors["act_freq_scores"] = trainer.act_freq_scores
        tensors["n_forward_passes_since_fired"] = trainer.n_forward_passes_since_fired
        tensors |= self.ne_state()
        content = {
            "n_training_steps": trainer.n_training_steps,
            "n_training_samples": trainer.n_training_samples,
            "n_frac_active_samples": trainer.n_frac_active_samples,
            "param_groups": optimizer["param_groups"],
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficients": {
                name: scheduler.state_dict()
                for name, scheduler in trainer.coefficient_schedulers.items()
            },
            "history": self.history,
            "losses": self.losses,
        }
        return tensors, content

    def ne_state(self) -> dict[str, Tensor]:
        """State of the NE term, if there is one."""
        if self.term is None:
            return {}
        return {f"ne.{name}": value for name, value in self.term.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        """Restore a state, so that training continues exactly as it would have."""
        trainer = self._trainer

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): value
                for name, value in tensors.items()
                if name.startswith(prefix)
            }

        self.sae.load_state_dict(part("sae."))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = value
        groups = [group | {"betas": tuple(group["betas"])} for group in content["param_groups"]]
        trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        trainer.lr_scheduler.load_state_dict(content["lr_scheduler"])
        for name, state in content["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        device = trainer.act_freq_scores.device
        trainer.act_freq_scores = tensors["act_freq_scores"].to(device)
        trainer.n_forward_passes_since_fired = tensors["n_forward_passes_since_fired"].to(device)
        for counter in ("n_training_steps", "n_training_samples", "n_frac_active_samples"):
            setattr(trainer, counter, content[counter])
        if self.term is not None:
            self.term.load_state_dict(part("ne."))
        self.history = {name: list(values) for name, values in content["history"].items()}
        self.losses = dict(content["losses"])

    def finish(self, folder: Path, details: Mapping[str, Any]) -> dict[str, Tensor]:
        """Write the SAE in SAELens's format; return the other tensors worth keeping."""
        trainer = self._trainer
        trainer.set_final_sae_metadata()
        self.sae.cfg.metadata["polyseme"] = dict(details)
        self.sae.save_inference_model(folder)
        return {
            "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
            **self.ne_state(),
        }
