"""The command line: what it prints, what it refuses, and with which status."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import polyseme as ps
from polyseme import cli

ROOT = Path(__file__).resolve().parents[1]

MODEL = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
deep = nn.ModuleDict({"features": nn.Sequential(*(nn.Linear(12, 12) for _ in range(2)))})
long = nn.ModuleDict({"a_block_with_quite_a_long_name" * 4: nn.Linear(12, 1200)})
nothing = nn.Sequential(nn.ReLU())
number = 3


class Box:
    net = net


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.last = nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.last(torch.relu(self.conv(x)).flatten(1))


def load():
    torch.manual_seed(0)
    return Conv()


def needs(path):
    return net


def gives_text():
    return "model"


def asks_for_too_much():
    return {}["weights"]


def leaves():
    raise SystemExit("not today")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a model and data."""
    monkeypatch.chdir(tmp_path)
    # Models from files are remembered by their names, which these tests share.
    for name in ("models", "many", "slow", "notes", "needs"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    Path("models.py").write_text(MODEL)
    Path("notes.py").write_text("to do: nothing much\n")
    Path("needs.py").write_text("import json\nimport no_such_module\n")
    rng = np.random.default_rng(0)
    np.savez(
        "flat.npz", images=rng.normal(size=(40, 12)).astype(np.float32), labels=np.arange(40) % 3
    )
    np.savez("rgb.npz", images=rng.integers(0, 256, (20, 3, 8, 8), dtype=np.uint8))
    return tmp_path


def said(capsys, *arguments):
    """Status, standard output and standard error of a command."""
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def analyse(*more, sites="0", model="models.py:net", data="flat.npz", out="run"):
    return ["analyse", model, "--data", data, "--sites", sites, "--out", out, "--quiet", *more]


# --- sites -----------------------------------------------------------------------------------


def test_sites(place, capsys):
    status, out, err = said(capsys, "sites", "models.py:load")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "site  kind    neurons  reads",
        "conv  conv          4     27",
        "last  linear        5    144",
    ]


def test_long_names_of_sites_can_be_copied(place, capsys):
    status, out, _ = said(capsys, "sites", "models.py:long")
    assert status == 0
    assert out.splitlines()[1].split() == [
        "a_block_with_quite_a_long_name" * 4,
        "linear",
        "1,200",
        "12",
    ]


def test_sites_of_a_package_of_ones_own(place, capsys, monkeypatch):
    (place / "mypackage").mkdir()
    (place / "mypackage" / "__init__.py").touch()
    (place / "mypackage" / "nets.py").write_text(MODEL)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    status, out, _ = said(capsys, "sites", "mypackage.nets:Box.net")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["site", "0", "2"]
    for name in ("mypackage", "mypackage.nets"):
        monkeypatch.delitem(sys.modules, name)


def test_the_demos_classifier(place, capsys):
    status, out, err = said(capsys, "sites", "polyseme.demo:Classifier")
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["layers.0", "linear", "64", "784"],
        ["layers.2", "linear", "10", "64"],
    ]
    status, _, err = said(capsys, "sites", "polyseme.demo:load_classifier")
    assert status == 1
    assert err == (
        "polyseme: There is no classifier at 'runs/demo/classifier.safetensors'; train one with: "
        "polyseme demo\n"
    )


# --- analyse ---------------------------------------------------------------------------------


def test_analyse_is_the_librarys_analyse(place, capsys):
    status, out, err = said(
        capsys,
        *analyse(
            *("--select", "FirstActive(9, minimum=0.1)", "--threshold", "0.3"),
            *("--linkage", "single", "--seed", "4", "--batch-size", "16"),
            *("--image-shape", "3x4", "--limit", "30", "--sites", "2"),
        ),
    )
    assert (status, err) == (0, "")
    run = ps.open_run("run")
    lines = out.splitlines()
    assert len(lines) == 3
    for line, row in zip(lines, run.summary().itertuples(), strict=False):
        if row.dead == row.neurons:
            assert line == f"{row.site}: {row.neurons} neurons, all dead: no input activates them"
            continue
        unlisted = f"{row.without_examples} without examples, " if row.without_examples else ""
        if row.dead + row.without_examples == row.neurons:
            assert line.endswith("none with examples: no activation meets the selection")
            continue
        assert line == (
            f"{row.site}: {row.neurons} neurons, {row.dead} dead, {unlisted}"
            f"{row.mean_meanings:.1f} meanings and {row.mean_clusters:.1f} features per neuron, "
            f"mean distance {row.mean_distance:.3f} "
            f"(over {row.mean_distance_n})"
        )
    assert lines[-1] == (
        "The run is at run. View it with polyseme explore run, or open it in Python with "
        "polyseme.open_run('run')."
    )
    images = ps.read_images("flat.npz", limit=30)
    same = ps.analyse(
        cli.arguments.load_model("models.py:net"),
        images,
        sites=["0", "2"],
        out="same",
        select=ps.FirstActive(9, minimum=0.1),
        threshold=0.3,
        linkage="single",
        seed=4,
        batch_size=16,
        image_shape=(3, 4),
        progress=False,
    )
    pd.testing.assert_frame_equal(run.neurons(), same.neurons())
    assert run.metadata["fingerprint"] == same.metadata["fingerprint"]
    run.neuron("0", 0).figure("figure.png")


def test_scaling_and_globs_and_no_panels(place, capsys):
    status, _, err = said(
        capsys,
        *analyse("--mean", "0.5,0.4,0.3", "--std", "0.25", "--no-panels", "--device", "cpu"),
    )
    assert status == 1
    assert "flat.npz: mean=" in err
    status, _, err = said(
        capsys,
        *analyse(
            *("--mean", "0.5,0.4,0.3", "--std", "0.25", "--no-panels", "--device", "cpu"),
            model="models.py:load",
            data="rgb.npz",
            sites="c*",
        ),
    )
    assert (status, err) == (0, "")
    run = ps.open_run("run")
    assert run.sites == ["conv"]
    assert run.metadata["data"]["mean"] == [0.5, 0.4, 0.3]
    assert run.metadata["data"]["std"] == 0.25
    assert "activation_map" not in run.folder.site(0)


def test_progress_goes_to_standard_error(place, capsys):
    arguments = [word for word in analyse() if word != "--quiet"]
    status, out, err = said(capsys, *arguments)
    assert status == 0
    assert "Reading the data" in err
    assert "Reading the data" not in out


def test_existing_overwrite_and_resume(place, capsys):
    assert said(capsys, *analyse())[0] == 0
    created = ps.open_run("run").metadata["created"]
    status, _, err = said(capsys, *analyse())
    assert status == 1
    assert err.startswith(
        "polyseme: run already exists. Replace it with overwrite=True (--overwrite)"
    )
    assert said(capsys, *analyse("--resume"))[0] == 0
    assert ps.open_run("run").metadata["created"] == created
    status, _, err = said(capsys, *analyse("--resume", "--threshold", "0.1"))
    assert status == 1
    assert "settings.threshold was null and is now 0.1" in err
    status, _, err = said(capsys, *analyse("--resume", "--overwrite"))
    assert status == 1
    assert "mutually exclusive" in err
    assert said(capsys, *analyse("--overwrite", "--threshold", "0.1"))[0] == 0
    assert ps.open_run("run").folder.sites[0].extra["threshold"] == 0.1


def test_a_mistake_is_not_in_the_way_of_its_correction(place, capsys):
    assert said(capsys, *analyse(data="rgb.npz"))[0] == 1
    assert said(capsys, *analyse())[0] == 0


# --- refusals --------------------------------------------------------------------------------

REFUSED = {
    "no file": (
        ["sites", "modles.py:net"],
        r"The model's file 'modles\.py' does not exist\. Python files there: models\.py",
    ),
    "no module": (["sites", "no_such.nets:net"], r"The model's module 'no_such' was not found"),
    "no submodule": (["sites", "json.nets:net"], r"The model's module 'json\.nets' was not found"),
    "no attribute": (["sites", "models.py:nett"], r"has no 'nett'.* Did you mean 'net'"),
    "no inner attribute": (["sites", "models.py:Box.nett"], r"has no 'Box\.nett'"),
    "no colon": (
        ["sites", "models.py"],
        r"The model is 'models\.py'; expected MODULE:NAME or FILE\.py:NAME",
    ),
    "no language model": (
        ["sites", "./models"],
        r"To give a model of your own, use MODULE:NAME or",
    ),
    "no name": (["sites", "models.py:"], r"expected MODULE:NAME or FILE\.py:NAME"),
    "a number": (["sites", "models.py:number"], r"gives a int; expected a torch\.nn\.Module"),
    "a function that gives text": (
        ["sites", "models.py:gives_text"],
        r"gives a str; expected a torch",
    ),
    "a function that fails": (
        ["sites", "models.py:asks_for_too_much"],
        r"models\.py:asks_for_too_much cannot be loaded: its code raised KeyError in .*models\.py, "
        r"line \d+: 'weights'\.",
    ),
    "a function that leaves": (["sites", "models.py:leaves"], r"SystemExit in .*: not today\."),
    "a file that is no Python": (
        ["sites", "notes.py:net"],
        r"raised SyntaxError: .*notes\.py, line 1",
    ),
    "a file that needs another": (
        ["sites", "needs.py:net"],
        r"needs\.py:net cannot .* ModuleNotFoundError in .*needs\.py, line 2: No module named",
    ),
    "a function of something": (
        ["sites", "models.py:needs"],
        r"gives a function; expected a torch\.nn\.Module, or a function that takes no arguments",
    ),
    "no layers": (
        ["sites", "models.py:nothing"],
        r"no layer that polyseme can read: Linear, Conv1D",
    ),
    "no data": (analyse(data="falt.npz"), r"'falt\.npz' does not exist\. Did you mean 'flat\.npz'"),
    "wrong data": (
        analyse(data="models.py"),
        r"models\.py: polyseme cannot read this as a file of",
    ),
    "wrong shape": (
        analyse(data="rgb.npz"),
        r"does not accept a batch of inputs of shape \(3, 8, 8\)",
    ),
    "no site": (
        analyse(model="models.py:deep", sites="feature.1"),
        r"Unknown site: 'feature\.1'\. Did you mean 'features\.1' or 'features\.0'",
    ),
    "no glob": (analyse(sites="x*"), r"No site matches 'x\*'\. The model's sites are: 0, 2"),
    "threshold": (
        analyse("--threshold", "3"),
        r"threshold is 3\.0; expected a cosine distance greater",
    ),
    "threshold nan": (analyse("--threshold", "nan"), r"threshold is nan"),
    "linkage": (analyse("--linkage", "ward"), r"Unknown linkage: 'ward'"),
    "batch size": (analyse("--batch-size", "0"), r"batch_size is 0; a whole number of at least 1"),
    "seed": (analyse("--seed", "-1"), r"seed is -1; a whole number of at least 0"),
    "limit": (analyse("--limit", "0"), r"limit is 0; it must be a whole number of images"),
    "image shape": (analyse("--image-shape", "5,5"), r"image_shape is \(5, 5\), but an input has"),
    "key": (analyse("--images-key", "pictures"), r"pictures"),
    "device": (
        analyse("--device", "abacus"),
        r"cannot be moved to device 'abacus': .*--device cpu",
    ),
    "no numbers": (
        analyse("--device", "meta"),
        r"device 'meta', which stores no values\. Use cpu",
    ),
    "not a run": (analyse("--overwrite", out="."), r"output '\.' has no name"),
    "in the way": (analyse(out="flat.npz"), r"flat\.npz already exists"),
    "no run to replace": (
        analyse("--overwrite", out="flat.npz"),
        r"flat\.npz is not a polyseme run",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_are_one_sentence(place, capsys, what):
    arguments, match = REFUSED[what]
    before = sorted(path.name for path in place.iterdir())
    status, out, err = said(capsys, *arguments)
    assert status == 1
    assert out == ""
    assert err.startswith("polyseme: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    pd.testing.assert_series_equal(
        pd.Series([err]).str.contains(match), pd.Series([True]), obj=f"{match!r} in {err!r}"
    )
    after = sorted(path.name for path in place.iterdir())
    assert [name for name in after if name != "__pycache__"] == before


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('evaluated')",
        "TopK(__import__('os').mkdir('evaluated'))",
        "TopK(k=__import__('os').mkdir('evaluated') or 5)",
        "TopK(*[__import__('os').mkdir('evaluated')])",
        "TopK(**{'k': __import__('os').mkdir('evaluated')})",
        "(lambda: __import__('os').mkdir('evaluated'))()",
        "TopK(f\"{__import__('os').mkdir('evaluated')}\")",
        "capture.TopK(5)",
        "TopK(5).reduce(1)",
        "TopK(5); TopK(6)",
        "TopK(",
        "TopK(5",
        "",
        "5",
        "[5]",
        "TopK(2 ** 99)",
        "TopK({[]: 1})",
        "TopK(k=1, k=2)",
        "TopK(\0)",
        "TopK(" + "(" * 500 + "1" + ")" * 500 + ")",
        "TopK(" + "-" * 50_000 + "1)",
    ],
)
def test_no_selector_is_ever_evaluated(place, capsys, text):
    status, _, err = said(capsys, *analyse("--select", text))
    assert status == 1
    assert err.startswith("polyseme: --select is ")
    assert (
        "is not a selector; expected a call such as TopK(100) or FirstActive(100, minimum=0.005)"
        in err
    )
    assert not Path("evaluated").exists()
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("TopN(5)", "Unknown selector: 'TopN'. Did you mean 'TopK'? Must be one of: TopK, Above"),
        ("Selector()", "Unknown selector: 'Selector'"),
        ("topk(5)", "Unknown selector: 'topk'"),
        ("__class__()", "Unknown selector: '__class__'"),
        ("TopK(5, 6, 7)", "--select is 'TopK(5, 6, 7)', but "),
        ("TopK(size=5)", "unexpected keyword argument 'size'"),
        ("TopK(**{'k': 5})", "but "),
        ("TopK(0)", "k is 0; a whole number of at least 1 is expected"),
        ("TopK('many')", "k is 'many'; a whole number"),
        ("TopK(5.5)", "k is 5.5; a whole number"),
        ("AboveFraction(2)", "fraction is 2; a number greater than 0 and at most 1 is expected"),
        ("FirstActive(5, minimum=-1)", "minimum is -1; a number at least 0"),
        ("Stratified(5, bins=9)", "bins is 9 and k is 5"),
    ],
)
def test_selectors_that_are_wrong(place, capsys, text, match):
    status, _, err = said(capsys, *analyse("--select", text))
    assert status == 1
    assert err.count("\n") == 1
    assert match in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TopK(7)", {"name": "TopK", "k": 7}),
        (" TopK( k = 7 ) ", {"name": "TopK", "k": 7}),
        ("TopK", {"name": "TopK", "k": 100}),
        ("TopK()", {"name": "TopK", "k": 100}),
        (
            "AboveFraction(0.5, max_examples=9)",
            {"name": "AboveFraction", "fraction": 0.5, "max_examples": 9},
        ),
        ("FirstActive(9, 0.25)", {"name": "FirstActive", "n": 9, "minimum": 0.25}),
        ("Stratified(9, 3)", {"name": "Stratified", "k": 9, "bins": 3, "seed": 0}),
    ],
)
def test_selectors_that_are_right(place, capsys, text, expected):
    assert said(capsys, *analyse("--select", text, "--no-panels"))[0] == 0
    assert ps.open_run("run").metadata["settings"]["select"] == expected


# --- argparse's own part ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["analyze"], "invalid choice: 'analyze'"),
        (["analyse", "m.py:net"], "required: --out"),
        (analyse("--threshold", "wide"), "argument --threshold: invalid float value: 'wide'"),
        (
            analyse("--mean", "grey"),
            "argument --mean: 'grey' is not a number; give one, or several",
        ),
        (
            analyse("--image-shape", "big"),
            "argument --image-shape: 'big' is not a shape; give heig",
        ),
        (["sites", "m.py:net", "--all", "x y"], "polyseme sites: unknown arguments: --all 'x y'."),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_usage(capsys, arguments, match):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1, "no usage before it"
    assert re.search(r"^polyseme( \w+)?: .* See: polyseme( \w+)? --help\n$", err)


def test_a_file_that_cannot_be_written(place, capsys):
    assert said(capsys, *analyse("--no-panels"))[0] == 0
    Path("folder").mkdir()
    for name in ("folder", "no/such/table.csv", "a" * 300 + ".csv"):
        status, _, err = said(capsys, "benchmark", "features", "run", "--csv", name)
        assert status == 1
        assert re.fullmatch(r"polyseme: .* could not be read or written: .*\n", err)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["demo", "analyse", "sites", "Split any neuron into its meanings"]),
        (["demo", "--help"], ["--data", "--out", "--seed", "--overwrite", "--json"]),
        (["analyse", "--help"], ["--select", "Stratified(k, bins)", "0.05 for SAEs", "--resume"]),
        (["sites", "--help"], ["MODULE:NAME", "FILE.py:NAME"]),
        (["--version"], [f"polyseme {ps.__version__}"]),
    ],
)
def test_help(capsys, arguments, words):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(word in shown for word in words), shown


# --- interrupts ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (analyse(), "; nothing is lost. To continue, run the same command with --resume."),
        (
            analyse("--overwrite"),
            "; nothing is lost. To continue, run the same command with --resume instead of "
            "--overwrite.",
        ),
        (["sites", "models.py:net"], "."),
    ],
)
def test_interrupt_messages(place, capsys, monkeypatch, arguments, message):
    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("load_model", "load_any_model"):
        monkeypatch.setattr(f"polyseme.cli.commands.{name}", interrupt)
    status, _, err = said(capsys, *arguments)
    assert status == 130
    assert err == f"polyseme: interrupted{message}\n"


SLOW = """
import os, signal
import torch
from torch import nn

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the parent ignores it


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(12, 8)
        self.batches = 0

    def forward(self, x):
        self.batches += len(x) == 10
        if self.batches == 2 and len(x) == 10:
            # One after the other, as each is handled at the next step of Python.
            for name in os.environ.get("SIGNALS", "").split():
                os.kill(os.getpid(), getattr(signal, name))
        return torch.relu(self.layer(x))
"""


def command(place, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "polyseme.cli", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("signals", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_real_interrupt_and_then_resume(place, capsys, signals, status):
    Path("slow.py").write_text(SLOW)
    arguments = analyse(
        "--batch-size", "10", "--no-panels", model="slow.py:Slow", sites="layer", out="run"
    )
    done = command(place, *arguments, SIGNALS=signals)
    assert done.returncode == status
    assert done.stderr == (
        "polyseme: interrupted; nothing is lost. To continue, run the same command with --resume.\n"
    )
    assert not Path("run").exists()
    status, _, err = said(capsys, *arguments)
    assert status == 1
    assert "run.partial holds an unfinished analysis" in err
    done = command(place, *arguments, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    arguments[arguments.index("run")] = "whole"
    assert said(capsys, *arguments)[0] == 0
    for name in ("neurons.parquet", "examples.parquet", "sites/0.safetensors"):
        assert (place / "run" / name).read_bytes() == (place / "whole" / name).read_bytes()


@pytest.mark.parametrize(("signals", "status"), [("SIGINT SIGINT", 130), ("SIGINT SIGTERM", 143)])
def test_several_interrupts_show_no_traceback(place, signals, status):
    Path("slow.py").write_text(SLOW)
    arguments = analyse("--batch-size", "10", model="slow.py:Slow", sites="layer")
    done = command(place, *arguments, SIGNALS=signals)
    assert done.returncode == status
    assert done.stderr.startswith("polyseme: interrupted; nothing is lost")
    assert done.stderr.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_the_one_before_is_acted_on(name):
    code = f"""
import os, signal
from polyseme.cli.commands import _interrupted_once
signal.signal(signal.SIGINT, signal.default_int_handler)
with _interrupted_once():
    try:
        os.kill(os.getpid(), signal.{name})
    finally:
        os.kill(os.getpid(), signal.{name})
        print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.Signals[name], "", "")


def test_the_installed_command(place):
    script = Path(sys.executable).with_name("polyseme")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"polyseme {ps.__version__}\n")
    done = command(place, "sites", "models.py:missing")
    assert done.returncode == 1
    assert done.stderr.startswith("polyseme: models.py has no 'missing'.")
    assert done.stdout == ""


def test_a_pipe_that_closes_is_no_error(place):
    Path("many.py").write_text(
        "from torch import nn\nnet = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9000)))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "polyseme.cli", "sites", "many.py:net"],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_without_torch(place):
    block = (
        "import sys; sys.modules['torch'] = None; from polyseme.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    for arguments, what in (
        (["sites", "models.py:net"], "Listing a model's sites"),
        (analyse(), "Analysing a model"),
        (["demo", "--out", "demo"], "The demo"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", block, *arguments],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr == (
            f"polyseme: {what} needs torch, which is not installed. "
            "Install it with: pip install 'polyseme[torch]'\n"
        )
