"""An analysis that is interrupted goes on, and ends as if it had never been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import polyseme as ps
from analysis import small
from polyseme.analysis import image_data, kinds
from polyseme.errors import InputError, RunError

ROOT = Path(__file__).resolve().parents[2]
FLAT = small.flat_inputs()
LABELS = np.arange(len(FLAT)) % 3


def batches(stop=None):
    """Batches of 20 with their labels; an interrupt in place of one of them."""
    for number, at in enumerate(range(0, len(FLAT), 20)):
        if number == stop:
            raise KeyboardInterrupt
        yield FLAT[at : at + 20], LABELS[at : at + 20]
    if stop == "end":
        raise KeyboardInterrupt


def go(out, data, model=None, **options):
    model = small.make(small.WithSAE) if model is None else model
    options = {
        "sites": "*",
        "select": ps.TopK(6),
        "threshold": 0.1,
        "image_shape": (3, 4),
        "class_names": ["a", "b", "c"],
        "progress": False,
        **options,
    }
    return ps.analyse(model, data, out=out, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an analysis that nothing interrupted."""
    return small.contents(go(tmp_path_factory.mktemp("whole") / "run", batches()).path)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, "end"])
def test_interrupted_in_the_pass(tmp_path, whole, stop):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(stop))
    assert not (tmp_path / "run").exists()
    seen = []

    def watched():
        for batch in batches():
            seen.append(len(batch[0]))
            yield batch

    model = small.make(small.WithSAE)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    run = go(tmp_path / "run", watched(), model, resume=True)
    handle.remove()
    assert small.contents(run.path) == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert len(seen) >= 1


def test_batches_that_were_read_are_not_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(3), panels=False)
    model = small.make(small.WithSAE)
    rows = []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    go(tmp_path / "run", batches(), model, panels=False, resume=True)
    assert [n for n in rows if n > 4] == [20, 10], "the last two batches alone"


@pytest.mark.parametrize(
    ("module", "stage"),
    [(image_data, "activation_maps"), (kinds, "cluster_site"), (image_data, "logit_effects")],
)
def test_interrupted_after_the_pass(tmp_path, whole, monkeypatch, module, stage):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", batches())
    taken = []

    def watched():
        for batch in batches():
            taken.append(1)
            yield batch

    run = go(tmp_path / "run", watched(), resume=True)
    assert small.contents(run.path) == whole
    assert len(taken) == 1, "the pass is not made again"


def test_convolutions_after_the_pass(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    options = {"sites": "conv", "image_shape": None, "panels": False}
    images = small.rgb_inputs()

    def at(name, **more):
        return go(tmp_path / name, images, small.make(small.ConvNet), **options, **more).path

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "cluster_site", interrupt)
        with pytest.raises(KeyboardInterrupt):
            at("run")
    assert small.contents(at("run", resume=True)) == small.contents(at("whole"))


def test_other_settings_are_refused_by_name_and_the_same_go_on(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2))
    with pytest.raises(RunError, match=r"settings\.select\.k was 6 and is now 7"):
        go(tmp_path / "run", batches(), select=ps.TopK(7), resume=True)
    with pytest.raises(RunError, match=r"sites\S* was"):
        go(tmp_path / "run", batches(), sites="sae", resume=True)
    with pytest.raises(RunError, match=r"holds an unfinished analysis\. Continue it with resume"):
        go(tmp_path / "run", batches())
    assert small.contents(go(tmp_path / "run", batches(), resume=True).path) == whole


class Shifted(small.WithSAE):
    def forward(self, x):
        return super().forward(x + 0.001)


def gelu(model):
    model.sae.encoder.register_forward_hook(lambda *given: nn.functional.gelu(given[-1]))


def other_function(model):
    model.hidden.forward = lambda x: nn.Linear.forward(model.hidden, x).clamp(max=1)


def other_module(model):
    model.act = nn.GELU()


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (
            small.WithSAE,
            lambda m: setattr(m, "__class__", Shifted),
            r"class was \"WithSAE\" and",
        ),
        (
            small.WithSAE,
            gelu,
            r"model\.outputs differ by up to \S+ of the largest\. Resume",
        ),
        (
            small.WithSAE,
            other_function,
            r"modules\.hidden was .* is now .*Linear\(.*forward=",
        ),
        (small.MLP, other_module, r"model\.modules\.act was .*ReLU\(\)\" and is now .*GELU\(app"),
    ],
)
def test_another_model_of_the_same_weights_is_refused(tmp_path, kind, change, match):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2), small.make(kind))
    other = small.make(kind)
    change(other)
    with pytest.raises(RunError, match=match):
        go(tmp_path / "run", batches(), other, resume=True)
    run = go(tmp_path / "run", batches(), small.make(kind), resume=True)
    with pytest.raises(RunError, match=match.split(r"\. Resume")[0]):
        go(run.path, batches(), other, resume=True)


def test_last_digits_are_the_machines_own(tmp_path):
    """Sums in another order, as by another number of threads."""

    def sums(model):
        model.last.register_forward_hook(lambda *given: given[-1] * (1 + 3e-7))
        return model

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2))
    go(tmp_path / "run", batches(), sums(small.make(small.WithSAE)), resume=True)


def test_data_that_begins_otherwise_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2))
    shuffled = ((inputs[::-1].copy(), labels[::-1].copy()) for inputs, labels in batches())
    with pytest.raises(RunError, match=r"data\.first was .* and is now"):
        go(tmp_path / "run", shuffled, resume=True)


def test_overwrite_starts_an_unfinished_one_again(tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2))
    assert small.contents(go(tmp_path / "run", batches(), overwrite=True).path) == whole


def test_nan_after_a_resume_is_numbered_from_the_beginning(tmp_path):
    def bad():
        for number, (inputs, labels) in enumerate(batches()):
            inputs = inputs.copy()
            if number == 3:
                inputs[5, 0] = np.inf
            yield inputs, labels

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", batches(2))
    with pytest.raises(InputError, match=r"Input 65 of the data holds inf at \[0\]"):
        go(tmp_path / "run", bad(), resume=True)
    go(tmp_path / "run", batches(), resume=True)


def test_an_iterator_that_was_used_up_is_refused(tmp_path):
    data = batches()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", (next(data) if i < 3 else interrupt() for i in range(9)))
    with pytest.raises(
        RunError, match=r"a different unfinished analysis: .*data\.first was \S+ and"
    ):
        go(tmp_path / "run", data, resume=True)
    short = (batch for batch, _ in zip(batches(), range(2), strict=False))
    with pytest.raises(InputError, match=r"ended \d+ inputs before the point .* a new iterator"):
        go(tmp_path / "run", short, resume=True)
    assert not (tmp_path / "run").exists()


def interrupt():
    raise KeyboardInterrupt


def test_an_empty_iterator_after_the_pass_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "cluster_site", lambda *_: interrupt())
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", batches())
    with pytest.raises(
        InputError, match="generator yields no inputs: it is empty, or an exhausted"
    ):
        go(tmp_path / "run", iter(x for x in ()), resume=True)


def test_resume_of_nothing_starts(tmp_path, whole):
    assert small.contents(go(tmp_path / "run", batches(), resume=True).path) == whole


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, "tests")
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the parent ignores it
import numpy as np, torch
torch.set_num_threads(2)
from analysis import small
from analysis.test_resume import batches, go

def slowly():
    for number, batch in enumerate(batches()):
        if number == 2:
            print("ready", flush=True)
            if sys.argv[2] == "inside":
                # The signal comes while the pass is at work, and is acted on after the batch.
                os.kill(os.getpid(), signal.SIGINT)
            else:
                time.sleep(60)
        yield batch

go(sys.argv[1], slowly())
"""


def run_script(out: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), how],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_real_interrupt(tmp_path, whole):
    process = run_script(tmp_path / "run", "inside")
    out, err = process.communicate(timeout=120)
    assert "KeyboardInterrupt" in err
    assert process.returncode not in (0, 1), (out, err)
    assert (tmp_path / "run.partial" / "state" / "pass-0.safetensors").exists()
    rows = []
    model = small.make(small.WithSAE)
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    run = go(tmp_path / "run", batches(), model, resume=True)
    read = [n for n in rows if n > 4]  # without the fingerprint and the proof
    assert read[:2] == [20, 10], "the batch that it came in was taken in"
    assert small.contents(run.path) == whole


def test_a_kill_leaves_no_half_run(tmp_path, whole):
    process = run_script(tmp_path / "run", "sleep")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "run").exists()
    assert small.contents(go(tmp_path / "run", batches()).path) == whole, "nothing was saved"


def test_two_interrupts_act_at_once(tmp_path):
    """A model that hangs can still be stopped."""

    class Hangs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 3)

        def forward(self, x):
            if len(x) > 2:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
                raise AssertionError("the second interrupt did nothing")
            return self.layer(x)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run", batches(), Hangs(), sites="layer")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
