"""Training SAEs: every architecture, the saved folder, resuming to the bit, and bad input."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from polyseme.errors import InputError, MissingDependencyError, RunError
from polyseme.interrupts import Terminated
from polyseme.sae import TrainingRecord, load_sae, read_training, train_sae
from polyseme.sae.batches import RowBatches, StreamBatches
from polyseme.sae.checkpoint import TrainingFolder
from polyseme.sae.load import import_sae_lens
from polyseme.sae.trainer import ARCHITECTURES, Trainer
from polyseme.store.partial import Partial

if importlib.util.find_spec("sae_lens") is None:
    print("sae-lens is not installed here, so no SAE is trained")
    pytest.skip("sae-lens is not installed here", allow_module_level=True)

D_IN, D_SAE = 16, 32
KEPT = ("sae_weights.safetensors", "cfg.json", "polyseme-training.json")


@pytest.fixture(autouse=True, scope="module")
def _one_thread(_threads: None) -> Iterator[None]:
    """So small a training only waits for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def activations() -> Tensor:
    """Sparse mixtures of 24 directions: what an SAE is for."""
    generator = torch.Generator().manual_seed(3)
    parts = torch.rand(1000, 24, generator=generator)
    parts = parts * (torch.rand(1000, 24, generator=generator) < 0.15)
    return parts @ torch.randn(24, D_IN, generator=generator)


def train(data: Any = None, **settings: Any) -> Any:
    architecture = settings.get("architecture", "standard")
    if "topk" in architecture:
        settings.setdefault("k", 4)
    if architecture in ("standard", "gated"):
        settings.setdefault("l1_coefficient", 0.1)
    if architecture == "jumprelu":
        settings.setdefault("architecture_options", {"l0_coefficient": 0.05})
    settings = {"d_sae": D_SAE, "steps": 200, "batch_size": 64, "progress": False} | settings
    return train_sae(activations() if data is None else data, **settings)


@cache
def trained(architecture: str, ne_coefficient: float) -> Any:
    return train(architecture=architecture, ne_coefficient=ne_coefficient)


def ne_distance(sae: Any) -> float:
    """The NE loss of a finished SAE, about the mean of all inputs that activate each latent."""
    h, W = activations(), sae.W_enc.detach().T
    with torch.no_grad():
        active = sae.encode(h) > 0
    total = []
    for latent in active.any(0).nonzero()[:, 0]:
        inputs = h[active[:, latent]]
        mean = inputs.mean(0) * W[latent]
        total.append(1 - torch.cosine_similarity(inputs * W[latent], mean[None], dim=1))
    return float(torch.cat(total).mean())


def same_folder(one: Path, other: Path) -> None:
    assert sorted(os.listdir(one)) == sorted(os.listdir(other))
    for name in KEPT:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    tensors, others = read_training(one).tensors, read_training(other).tensors
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name], others[name]), name


# The architectures.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_ne_loss_makes_latents_less_polysemantic(architecture: str) -> None:
    without, with_ne = trained(architecture, 0.0), trained(architecture, 20.0)
    assert ne_distance(with_ne) < 0.8 * ne_distance(without)
    assert "ne_loss" not in without.training_record.history
    history = with_ne.training_record.history
    assert history["ne_distance"][-1] < history["ne_distance"][0]
    np.testing.assert_allclose(np.array(history["ne_loss"]), 20 * np.array(history["ne_distance"]))
    terms = [v for name, v in history.items() if name not in ("step", "loss", "l0", "ne_distance")]
    np.testing.assert_allclose(np.sum(terms, 0), history["loss"], rtol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stock_saelens_loads_the_folder(architecture: str, tmp_path: Path) -> None:
    sae_lens = import_sae_lens("this test")
    sae = train(
        architecture=architecture,
        ne_coefficient=2.0,
        steps=20,
        out=tmp_path / "sae",
        metadata={"hook_name": "layers.0"},
    )
    stock = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    h = activations()[:50]
    assert torch.equal(stock.encode(h), sae.encode(h))
    assert torch.equal(stock(h), sae(h))
    assert not sae.training
    metadata = stock.cfg.metadata
    assert metadata.training_architecture == architecture
    assert metadata.hook_name == "layers.0"
    assert metadata.polyseme["settings"]["ne_coefficient"] == 2.0
    assert metadata.polyseme["settings"]["ne_momentum"] == 0.9
    assert metadata.polyseme["data"]["shape"] == [1000, D_IN]
    assert metadata.polyseme["gradient_clip_norm"] == 1.0
    assert metadata.polyseme["last_step"]["ne_loss"] > 0
    assert sorted(os.listdir(tmp_path)) == ["sae"]
    record = read_training(tmp_path / "sae")
    assert record.history == sae.training_record.history
    assert record.tensors["ne.means"].shape == (D_SAE, D_IN)
    assert record.history["step"] == list(range(1, 21))


def test_the_ne_loss_reads_the_input_with_no_bias_taken_off() -> None:
    # One step from zero means: they are the batch's means of the raw inputs.
    h = activations()[:64] + 5
    sae = train(h, ne_coefficient=1.0, steps=1, ne_momentum=0.5, lr=1e-9)
    with torch.no_grad():
        active = (sae.encode(h) > 0).float()
    expected = active.T @ h / active.sum(0)[:, None].clamp(min=1)
    assert torch.allclose(sae.training_record.tensors["ne.means"], expected, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_activations_give_the_same_sae() -> None:
    settings = {"architecture": "topk", "ne_coefficient": 5.0, "steps": 30}
    options = {"rescale_acts_by_decoder_norm": False}
    dense = train(**settings, architecture_options=options)
    sparse = train(**settings, architecture_options=options | {"use_sparse_activations": True})
    assert torch.allclose(dense.W_enc, sparse.W_enc, atol=1e-5)
    assert sparse.training_record.history["l0"] == dense.training_record.history["l0"]
    with pytest.raises(InputError, match="give rescale_acts_by_decoder_norm=False"):
        train(**settings, architecture_options={"use_sparse_activations": True})


@pytest.mark.parametrize("form", ["unweighted", "calibrated"])
def test_the_other_forms(form: str) -> None:
    sae = train(ne_coefficient=5.0, ne_form=form, steps=20)
    assert all(math.isfinite(value) for value in sae.training_record.history["ne_distance"])
    assert not torch.equal(sae.W_enc, train(ne_coefficient=5.0, steps=20).W_enc)


def test_the_ne_loss_from_a_step_on() -> None:
    late = train(ne_coefficient=5.0, steps=20, ne_start=10)
    assert late.training_record.history["ne_loss"][:10] == [None] * 10
    assert None not in late.training_record.history["ne_loss"][10:]
    plain = train(steps=20).training_record.history["loss"]
    assert late.training_record.history["loss"][:10] == plain[:10]
    never = train(ne_coefficient=5.0, steps=20, ne_start=99)
    assert torch.equal(never.W_enc, train(steps=20).W_enc)


# Seeds and settings.


def test_a_seed_gives_the_same_sae_and_leaves_torch_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (train(steps=20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.W_enc, two.W_enc)
    assert not torch.equal(one.W_enc, other.W_enc)


def test_weight_decay_shrinks_weights() -> None:
    decayed = train(weight_decay=5.0, steps=100)
    assert decayed.W_dec.norm() < 0.9 * train(steps=100).W_dec.norm()


@pytest.mark.parametrize(("options", "end"), [({}, 0.001), ({"lr_end": 0.004}, 0.004)])
def test_the_learning_rate_ends_at_a_tenth_unless_told_otherwise(
    options: dict[str, float], end: float
) -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(
        lambda adam, *_: rates.append(adam.param_groups[0]["lr"])
    )
    try:
        train(steps=4, lr=0.01, trainer_options={"lr_scheduler_name": "cosineannealing", **options})
    finally:
        hook.remove()
    expected = [end + (0.01 - end) * (1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(expected)


def test_epochs_and_their_default() -> None:
    assert train(steps=None, epochs=2.5).training_record.history["step"][-1] == 39
    record = train(steps=None, batch_size=500).training_record
    assert record.details["settings"]["steps"] == 20


@pytest.mark.parametrize("kind", ["array", "half", "memory map", "list"])
def test_kinds_of_activations(kind: str, tmp_path: Path) -> None:
    rows = activations()[:128]
    if kind == "memory map":
        np.save(tmp_path / "rows.npy", rows.numpy())
    data = {
        "array": lambda: rows.numpy().astype(np.float64),
        "half": rows.half,
        "memory map": lambda: np.load(tmp_path / "rows.npy", mmap_mode="r", allow_pickle=False),
        "list": lambda: [rows[:100].numpy(), rows[100:]],
    }[kind]()
    sae = train(data, steps=5)
    if kind in ("array", "memory map"):
        assert torch.equal(sae.W_enc, train(rows, steps=5).W_enc)


def test_starting_from_another_sae(tmp_path: Path) -> None:
    first = train(steps=20, out=tmp_path / "first")
    for source in (first, tmp_path / "first"):
        again = train(steps=1, lr=1e-12, init_from=source)
        assert torch.allclose(again.W_enc, first.W_enc, atol=1e-6)
    with pytest.raises(InputError, match=r"init_from has W_dec of shape \(32, 16\); .* \(64, 16\)"):
        train(steps=1, init_from=first, d_sae=64)
    with pytest.raises(InputError, match="init_from has no b_gate, which a 'gated' SAE has"):
        train(steps=1, init_from=first, architecture="gated")
    with pytest.raises(
        InputError, match="apply_b_dec_to_input True, but the SAE to train has False"
    ):
        train(steps=1, init_from=first, architecture_options={"apply_b_dec_to_input": False})
    first.cfg.normalize_activations = "layer_norm"
    with pytest.raises(InputError, match="init_from has normalize_activations 'layer_norm', but"):
        train(steps=1, init_from=first)


def test_starting_from_a_batchtopk_sae_keeps_its_threshold() -> None:
    first = trained("batchtopk", 0.0)
    again = train(architecture="batchtopk", steps=1, lr=1e-12, init_from=first)
    assert torch.allclose(again.threshold, first.threshold, rtol=0.02)
    with pytest.raises(InputError, match="init_from has a tensor 'threshold', which a 'topk'"):
        train(architecture="topk", steps=1, init_from=first)


# Batches.


def test_every_row_comes_once_in_each_epoch() -> None:
    rows = torch.arange(10.0)[:, None]
    stream = RowBatches(rows, 4, seed=0).from_step(0)
    seen = torch.cat([next(stream) for _ in range(5)])[:, 0]
    for epoch in (seen[:10], seen[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    later = RowBatches(rows, 4, seed=0).from_step(3)
    assert next(later)[:, 0].tolist() == seen[12:16].tolist()


@pytest.mark.parametrize("sizes", [[3, 0, 5, 2], [10], [1] * 10])
def test_batches_of_varying_size_are_cut_anew(sizes: list[int]) -> None:
    stream = StreamBatches(torch.arange(10.0)[:, None].split(sizes), 4).from_step(0)
    rows = torch.cat([next(stream) for _ in range(5)])[:, 0]
    assert rows.tolist() == [*range(10), *range(10)]


def test_an_iterator_may_write_into_the_same_memory() -> None:
    def batches() -> Iterator[np.ndarray]:
        memory = np.zeros((3, 1), np.float32)
        for number in range(4):
            memory[:] = number
            yield memory

    stream = StreamBatches(batches(), 4).from_step(0)
    rows = torch.cat([next(stream) for _ in range(3)])[:, 0]
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


# Going on with an interrupted training.


class Cut(Exception):
    """What a broken source of activations may raise."""


def batches_of_rows(cut: int | None = None, error: Any = Cut) -> Iterator[Tensor]:
    for number, rows in enumerate(activations().split([50] * 20)):
        if number == cut:
            if isinstance(error, signal.Signals):
                signal.raise_signal(error)
            else:
                raise error
        yield rows


LONG = {"steps": 12, "ne_coefficient": 5.0, "checkpoint_every": 5}
SCHEDULED = {
    "trainer_options": {
        "lr_warm_up_steps": 4,
        "lr_decay_steps": 4,
        "feature_sampling_window": 3,
        "dead_feature_window": 2,
    }
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_training_equals_an_uninterrupted_one(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"architecture": architecture, **LONG, **SCHEDULED}
    train(**settings, out=tmp_path / "whole")
    step = Trainer.step

    def killed(self: Trainer, batch: Tensor) -> None:
        if self.done == 8:
            raise KeyboardInterrupt  # in the middle of a step
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(**settings, out=tmp_path / "cut")
    assert "checkpoint of step 5 is kept. Resume with resume=True" in caught.value.__notes__[0]
    assert not (tmp_path / "cut").exists()
    assert checkpoint_step(tmp_path / "cut.partial") == 5
    monkeypatch.undo()
    train(**settings, out=tmp_path / "cut", resume=True)
    same_folder(tmp_path / "whole", tmp_path / "cut")
    assert not (tmp_path / "cut.partial").exists()


def checkpoint_step(partial: Path) -> int:
    """The step of the one checkpoint in an unfinished training."""
    assert os.listdir(partial / "state") == ["checkpoint.safetensors"]
    tensors = load_file(partial / "state" / "checkpoint.safetensors")
    return int(json.loads(bytes(tensors["metadata.json"].tolist()))["n_training_steps"])


@pytest.mark.parametrize("error", [Cut, KeyboardInterrupt, signal.SIGINT, signal.SIGTERM])
def test_a_resumed_training_on_an_iterator(error: Any, tmp_path: Path) -> None:
    train(batches_of_rows(), **LONG, out=tmp_path / "whole")
    raised = {Cut: Cut, signal.SIGTERM: Terminated}.get(error, KeyboardInterrupt)
    with pytest.raises(raised):
        train(batches_of_rows(cut=11, error=error), **LONG, out=tmp_path / "cut")
    # Eight whole batches of 64 are in 11 of 50 rows; at a signal, the step at hand is finished.
    kept = 9 if isinstance(error, signal.Signals) else 8
    assert checkpoint_step(tmp_path / "cut.partial") == kept
    train(batches_of_rows(), **LONG, out=tmp_path / "cut", resume=True)
    same_folder(tmp_path / "whole", tmp_path / "cut")


def test_a_step_that_takes_long_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, waited = Trainer.step, []

    def slow(self: Trainer, batch: Tensor) -> None:
        if self.done == 6:
            signal.raise_signal(signal.SIGINT)
            for _ in range(200):
                time.sleep(0.05)
            waited.append(True)
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", slow)
    monkeypatch.setattr("polyseme.sae.train.PATIENCE", 0.1)
    with pytest.raises(KeyboardInterrupt):
        train(**LONG, out=tmp_path / "sae")
    assert not waited
    assert checkpoint_step(tmp_path / "sae.partial") == 5


def test_slow_steps_are_saved_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyseme.sae.train.CHECKPOINT_SECONDS", 0.0)
    step = Trainer.step

    def killed(self: Trainer, batch: Tensor) -> None:
        if self.done == 3:
            raise KeyboardInterrupt
        step(self, batch)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(**LONG, out=tmp_path / "sae")
    assert checkpoint_step(tmp_path / "sae.partial") == 3


def test_other_activations_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=tmp_path / "sae")
    with pytest.raises(InputError, match="activations of step 8 are not those that the unfinished"):
        train((rows + 1 for rows in batches_of_rows()), **LONG, out=tmp_path / "sae", resume=True)
    assert checkpoint_step(tmp_path / "sae.partial") == 8


def test_other_settings_cannot_be_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=tmp_path / "sae")
    told = (
        r"settings\.ne_coefficient was 5\.0 and is now 7\.0; settings\.lr was 0\.001 and is now "
        r"0\.01\. Resume with the same .*, or .* overwrite=True"
    )
    other = LONG | {"ne_coefficient": 7.0, "lr": 0.01}
    with pytest.raises(RunError, match=told):
        train(batches_of_rows(), **other, out=tmp_path / "sae", resume=True)
    with pytest.raises(RunError, match=r"holds an unfinished training\. Continue it with resume"):
        train(batches_of_rows(), **LONG, out=tmp_path / "sae")
    train(batches_of_rows(), **other, out=tmp_path / "sae", overwrite=True)
    assert os.listdir(tmp_path) == ["sae"]


def test_resuming_what_is_finished_or_not_begun(tmp_path: Path) -> None:
    first = train(steps=5, out=tmp_path / "sae", resume=True)
    changed = (tmp_path / "sae" / "cfg.json").stat().st_mtime_ns
    again = train(steps=5, out=tmp_path / "sae", resume=True)
    assert torch.equal(first.W_enc, again.W_enc)
    assert again.training_record.history == first.training_record.history
    assert (tmp_path / "sae" / "cfg.json").stat().st_mtime_ns == changed
    with pytest.raises(RunError, match=r"result of a different training.*steps was 5 and is now 6"):
        train(steps=6, out=tmp_path / "sae", resume=True)
    assert os.listdir(tmp_path) == ["sae"]


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=tmp_path / "sae")
    state = tmp_path / "sae.partial" / "state" / "checkpoint.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"checkpoint\.safetensors is damaged .* Start over"):
        train(batches_of_rows(), **LONG, out=tmp_path / "sae", resume=True)


def test_a_damaged_record(tmp_path: Path) -> None:
    TrainingRecord({"seed": 1}, {"step": [1]}, {"ne.means": torch.ones(2)}).save(tmp_path, {})
    assert read_training(tmp_path).details == {"seed": 1}
    record, tensors = (tmp_path / f"polyseme-training.{end}" for end in ("json", "safetensors"))
    good = json.loads(record.read_text())
    for content, told in (
        ("[" * 100_000, "nested too deeply"),
        ("[]", "lacks its version, details or history"),
        (json.dumps(good | {"history": []}), "lacks its version, details or history"),
        (
            json.dumps(good | {"format_version": 9}),
            "is of version 9, but this polyseme reads version",
        ),
    ):
        record.write_text(content)
        with pytest.raises(InputError, match=told):
            read_training(tmp_path)
    record.write_text(json.dumps(good))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"polyseme-training\.safetensors is truncated"):
        read_training(tmp_path)


# The output folder.


def test_an_sae_is_replaced_only_when_asked_and_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "sae"
    old = train(steps=5, out=out)
    with pytest.raises(RunError, match=r"already exists\. Replace it with overwrite=True"):
        train(steps=6, out=out)
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=out, overwrite=True)
    assert torch.equal(load_sae(out).W_enc, old.W_enc)
    new = train(batches_of_rows(), **LONG, out=out, resume=True)
    assert torch.equal(load_sae(out).W_enc, new.W_enc)
    assert os.listdir(tmp_path) == ["sae"]


def test_train_sae_keeps_a_folder_that_is_not_an_sae(tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not an SAE, so it will not be replaced"):
        train(steps=5, out=out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "years of work"
    train(steps=5, out=tmp_path / "sae")
    (tmp_path / "sae" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds 'notes\.txt', which is not part of an SAE"):
        train(steps=5, out=tmp_path / "sae", overwrite=True)
    partial = tmp_path / "other.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"other\.partial is in the way"):
        train(steps=5, out=tmp_path / "other", overwrite=True)
    assert os.listdir(partial) == ["thesis.txt"]


def test_an_sae_of_saelens_is_replaced(tmp_path: Path) -> None:
    train(steps=5).save_model(tmp_path / "sae")
    train(steps=5, out=tmp_path / "sae", overwrite=True)
    assert read_training(tmp_path / "sae").details["settings"]["steps"] == 5


def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        TrainingFolder(tmp_path / "sae", {}),
        pytest.raises(RunError, match=r"sae\.partial is in use by another process"),
    ):
        train(steps=5, out=tmp_path / "sae")
    train(steps=5, out=tmp_path / "sae")


def test_a_failed_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sae"
    old = train(steps=5, out=out)
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        if Path(source).name == "result":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(RunError, match=r"No space left on device\. Fix this, then resume with"):
        train(**LONG, out=out, overwrite=True)
    monkeypatch.undo()
    assert torch.equal(load_sae(out).W_enc, old.W_enc)
    train(**LONG, out=out, resume=True)
    train(**LONG, out=tmp_path / "whole")
    same_folder(tmp_path / "whole", out)


def test_a_replacement_that_was_killed_between_its_renames(tmp_path: Path) -> None:
    out, partial = tmp_path / "sae", tmp_path / "sae.partial"
    old = train(steps=5, out=out)
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=out, overwrite=True)
    os.rename(out, partial / "old")
    with pytest.raises(RunError, match="already exists"):
        train(batches_of_rows(), **LONG, out=out)
    assert torch.equal(load_sae(out).W_enc, old.W_enc)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_process_that_was_killed_when_all_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        train(steps=5, seed=1, out=tmp_path / "sae")
    publish = Partial.publish

    def killed(self: Partial) -> None:
        monkeypatch.setattr(Partial, "_forget", lambda self: None)
        publish(self)

    monkeypatch.setattr(Partial, "publish", killed)
    sae = train(steps=5, out=tmp_path / "sae", overwrite=overwrite)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["sae", "sae.partial"]
    assert (tmp_path / "sae.partial" / "old").exists() == overwrite
    again = train(steps=5, out=tmp_path / "sae", resume=True)
    assert torch.equal(sae.W_enc, again.W_enc)
    assert os.listdir(tmp_path) == ["sae"]


def test_an_interrupt_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    def rows() -> Iterator[Tensor]:
        yield from activations().split(64)[:4]
        signal.raise_signal(signal.SIGINT)
        yield activations()[-64:]

    with pytest.raises(KeyboardInterrupt):
        train(rows(), steps=5, out=tmp_path / "sae")
    assert checkpoint_step(tmp_path / "sae.partial") == 5
    assert not (tmp_path / "sae").exists()


def test_checkpoints_are_not_pickles(tmp_path: Path) -> None:
    with pytest.raises(Cut):
        train(batches_of_rows(cut=11), **LONG, out=tmp_path / "sae")
    assert checkpoint_step(tmp_path / "sae.partial") == 8


# Bad input.


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_stop_the_training(value: float, tmp_path: Path) -> None:
    rows = activations().clone()
    rows[600, 3] = value
    told = rf"activations holds {value} at step 10 \(row 24 of the batch, column 3\)"
    with pytest.raises(InputError, match=told) as caught:
        train(rows.split(100), **LONG, out=tmp_path / "sae")
    assert "checkpoint of step 9 is kept" in caught.value.__notes__[0]
    assert checkpoint_step(tmp_path / "sae.partial") == 9
    with pytest.raises(InputError, match=r"at step \d+ \(row 600 of the array, column 3\)"):
        train(rows)


def test_a_training_that_diverges(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"became (nan|inf) at step \d+: the training diverged"):
        train(lr=1e30, steps=20, checkpoint_every=1, out=tmp_path / "sae")
    for file in (tmp_path / "sae.partial" / "state").glob("*"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"ne_coefficient": -1}, "ne_coefficient is -1; a finite number of at least 0"),
    ({"ne_coefficient": math.nan}, "ne_coefficient is nan; a finite number of at least 0"),
    ({"ne_coefficient": "10"}, "ne_coefficient is '10'; a finite number"),
    ({"ne_momentum": 1.0}, "ne_momentum is 1.0; expected a number of at least 0 and below 1"),
    ({"ne_momentum": -0.1}, "ne_momentum is -0.1; expected a number of at least 0 and below 1"),
    ({"ne_momentum": math.nan}, "ne_momentum is nan; expected a number of at least 0 and below 1"),
    ({"ne_start": -1}, "ne_start is -1; a whole number of at least 0"),
    ({"ne_form": "weigthed"}, "Unknown form of the NE loss: 'weigthed'. Did you mean 'weighted'"),
    ({"d_sae": 0}, "d_sae is 0; a whole number of at least 1 is expected"),
    ({"d_sae": -4}, "d_sae is -4; a whole number of at least 1"),
    ({"d_sae": 8.5}, "d_sae is 8.5; a whole number of at least 1"),
    ({"batch_size": 0}, "batch_size is 0; a whole number of at least 1"),
    ({"batch_size": 2000}, "activations has 1000 rows, fewer than batch_size 2000"),
    ({"steps": 0}, "steps is 0; a whole number of at least 1"),
    ({"epochs": 2}, "steps is 200 and epochs is 2; give only one of them"),
    ({"steps": None, "epochs": 0}, "epochs is 0; a finite number above 0"),
    ({"lr": 0}, "lr is 0; a finite number above 0"),
    ({"weight_decay": -1}, "weight_decay is -1; a finite number of at least 0"),
    ({"seed": -1}, "seed is -1; a whole number of at least 0"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0; a whole number of at least 1"),
    ({"architecture": "top_k"}, "Unknown architecture: 'top_k'. Did you mean .*'topk'"),
    ({"architecture": "matryoshka"}, "Did you mean 'matryoshka_batchtopk'"),
    ({"architecture": "crosscoder"}, "Must be one of: standard, topk, batchtopk, jumprelu, gated"),
    ({"architecture": "topk", "k": 33}, "k is 33, more than the 32 latents of d_sae"),
    ({"architecture": "topk", "k": 2.5}, "k is 2.5; a whole number of at least 1"),
    ({"architecture": "batchtopk", "k": 0.001}, "k is 0.001, which leaves no active latent"),
    (
        {"k": 4},
        "k is 4, but the architecture 'standard' does not use it; it is for topk",
    ),
    ({"architecture": "topk", "l1_coefficient": 1}, "l1_coefficient is 1, but the architecture"),
    ({"l1_coefficient": -1}, "l1_coefficient is -1; a finite number of at least 0"),
    ({"architecture_options": {"l1_warmup": 1}}, "Unknown option .*'l1_warmup'. .*l1_warm_up_st"),
    ({"architecture_options": {"k": 1}}, "holds 'k', which cannot be set there: give k"),
    ({"architecture_options": {"normalize_activations": "layer_norm"}}, "scale the activations"),
    ({"trainer_options": {"lr_warmup": 1}}, "Unknown trainer option: 'lr_warmup'. Did you mean"),
    ({"trainer_options": {"lr_scheduler_name": "up"}}, "SAELens rejects .* Unsupported scheduler"),
    ({"metadata": {"model": object()}}, "metadata must be plain JSON"),
    ({"metadata": {"polyseme": 1}}, "metadata holds 'polyseme'"),
    ({"resume": True}, "resume was given without out"),
    ({"data": "rows.npy"}, "activations is a str; expected a tensor or an array of shape"),
    ({"data": 3}, "activations is a int; expected a tensor or an array of shape"),
    ({"data": torch.zeros(100)}, r"activations has shape \(100,\); expected \(rows, d_in\)"),
    ({"data": torch.zeros(9, 9, 9)}, r"activations has shape \(9, 9, 9\); expected \(rows, d_in\)"),
    ({"data": torch.zeros(100, 0)}, r"activations has shape \(100, 0\)"),
    ({"data": torch.zeros(100, 2, dtype=torch.complex64)}, "holds torch.complex64 values; real"),
    ({"data": np.full((100, 2), "a")}, "activations holds <U1 values; real numbers"),
    ({"data": []}, "activations is an iterable that yields no rows"),
    ({"data": iter([])}, "activations is an iterable that yields no rows"),
    ({"data": [torch.zeros(0, 4)]}, "activations is an iterable that yields no rows"),
    ({"data": [[1.0]]}, "Batch 1 of activations is a list; a tensor or an array"),
    ({"data": [torch.zeros(4)]}, r"Batch 1 of activations has shape \(4,\); \(B, d_in\)"),
    (
        {"data": [torch.ones(64, 4), torch.ones(64, 5)]},
        "Batch 2 .* rows of 5 values, but .*have 4",
    ),
    ({"data": [torch.ones(60, 4)]}, "activations has 60 rows, fewer than batch_size 64"),
    ({"data": iter([torch.ones(99, 4)])}, "an iterator that ended after 1 whole batches"),
    ({"data": [torch.ones(99, 4)], "steps": None}, "of unknown length. Give steps"),
]


@pytest.mark.parametrize(("settings", "told"), BAD, ids=[told[:40] for _, told in BAD])
def test_bad_input(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    given = {"out": tmp_path / "sae"} | settings
    if "resume" in settings:
        given.pop("out")
    data = given.pop("data", None)
    if isinstance(data, Iterator):
        data = list(data)  # an iterator serves one test only, but a test may run again
        data = iter(data)
    with pytest.raises(InputError, match=told):
        train(data, **given)
    assert not (tmp_path / "sae").exists()


def test_both_flags_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"overwrite=True .* and resume=True .* mutually"):
        train(steps=5, out=tmp_path / "sae", overwrite=True, resume=True)


def test_saelens_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'polyseme\[sae\]'"):
        train(steps=5)


def test_importing_the_layer_does_not_load_saelens() -> None:
    code = "import sys, polyseme.sae; print({'sae_lens', 'transformer_lens'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_record_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no polyseme-training\.json"):
        read_training(tmp_path)


def test_progress_is_shown_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    train(steps=3, progress=True)
    assert "training" in capfd.readouterr().err
    train(steps=3)
    assert capfd.readouterr() == ("", "")
