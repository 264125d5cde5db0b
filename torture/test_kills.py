"""Every operation on files as the place where a process is killed: nothing is lost or mixed.

After each kill the output is the old result or the new one, whole; a resume, or the same command
again, succeeds and gives what an undisturbed process gives; and nothing else is left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.evaluate.models import SAE, Classifier
from tests.kills import Killing

import polyseme as ps
from polyseme.errors import RunError
from polyseme.evaluate.sweep import points, read_sweep, sweep
from polyseme.explorer.export import export

OUT = "out"
PRELOADED = ["polyseme.analysis.analyse", "polyseme.evaluate.sweep", "sae_lens", "pandas"]
INPUTS = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
LABELS = np.arange(60) % 3


def made(kind: type[torch.nn.Module], seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return kind().eval()


def analyse(folder: Path, **flags: bool) -> None:
    options = {"sites": "hidden", "batch_size": 20, "progress": False, **flags}
    ps.analyse(made(Classifier), (INPUTS, LABELS), out=folder / OUT, **options)


def analyse_other(folder: Path) -> None:
    model, options = made(Classifier, 1), {"sites": "hidden", "panels": False, "progress": False}
    ps.analyse(model, (INPUTS, LABELS), out=folder / OUT, **options)


def analyse_interrupted(folder: Path) -> None:
    from polyseme.analysis import kinds

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, kinds.cluster_site = kinds.cluster_site, interrupt
    try:
        analyse(folder)
    except KeyboardInterrupt:
        pass
    finally:
        kinds.cluster_site = before


def train(folder: Path, **flags: bool) -> None:
    _train(folder, 0, **flags)


def train_other(folder: Path) -> None:
    _train(folder, 1)


def _train(folder: Path, seed: int, **flags: bool) -> None:
    options = {"steps": 6, "batch_size": 16, "checkpoint_every": 2, "ne_coefficient": 1.0}
    rows = torch.from_numpy(INPUTS)
    ps.train_sae(rows, 8, out=folder / OUT, seed=seed, progress=False, **options, **flags)


def compare(folder: Path, **flags: bool) -> None:
    from polyseme.evaluate.compare import compare

    saes = {"one": made(SAE), "two": made(SAE, 1)}
    options = {"out": folder / OUT, "progress": False, **flags}
    table = compare(saes, made(Classifier), "hidden", (INPUTS, LABELS), **options)
    table.figure(folder / OUT / "comparison.png")


def sweeping(folder: Path, **_: bool) -> None:
    activations = torch.relu(torch.from_numpy(INPUTS[:, :5]))
    todo = points((0, 20), (3,), range(2))
    train = lambda point: made(SAE, point.seed)  # noqa: E731
    list(sweep(activations, todo, train, out=folder / OUT, settings={"epochs": 3}))


def exported(folder: Path, **flags: bool) -> None:
    export(folder / "run", folder / OUT, progress=False, overwrite=flags.get("overwrite", False))


def export_prepared(folder: Path) -> None:
    analyse(folder)
    os.rename(folder / OUT, folder / "run")


def export_to_replace(folder: Path) -> None:
    export_prepared(folder)
    exported(folder)
    (folder / OUT / "of the old one").touch()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; JSON in one order, as SAELens writes it from sets, and a run's without times."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.suffix == ".json":
                content = re.sub(rb'"created": ?"[^"]*"', b'"created": ""', content)
                with suppress(ValueError):  # a half-written one aside
                    parsed = json.loads(content)
                    if file.name == "run.json":  # how long it took, and what follows from that
                        parsed |= {"seconds": {}, "sha256": ""}
                    content = json.dumps(parsed, sort_keys=True).encode()
            found[file.relative_to(folder).as_posix()] = content
    return found


def nothing(folder: Path) -> None:
    """There is nothing before."""


@dataclass(frozen=True)
class Scenario:
    """Work that is killed, and what is there before it.

    Attributes
    ----------
    work, prepare : callable (Path)
    flags : dict
        Of the work that is killed.
    again : dict
        Of the same command after it.
    whole : tuple of str
        What is never half: folders and files, below the folder of the work.
    """

    work: Callable[..., None]
    prepare: Callable[[Path], None] = nothing
    flags: tuple[str, ...] = ()
    again: tuple[str, ...] = ("resume",)
    whole: tuple[str, ...] = (OUT,)

    def __call__(self, folder: Path) -> None:
        self.work(folder, **dict.fromkeys(self.flags, True))

    def go_on(self, folder: Path) -> None:
        try:
            self.work(folder, **dict.fromkeys(self.again, True))
        except RunError:
            # Killed before anything was begun, or after the result was in its place.
            if "overwrite" in self.flags:
                self(folder)


SCENARIOS = {
    "analyse": Scenario(analyse),
    "analyse --overwrite": Scenario(analyse, analyse_other, ("overwrite",)),
    "analyse --overwrite, the same": Scenario(analyse, analyse, ("overwrite",)),
    "analyse --resume": Scenario(analyse, analyse_interrupted, ("resume",)),
    "train-sae": Scenario(train),
    "train-sae --overwrite": Scenario(train, train_other, ("overwrite",)),
    "train-sae --overwrite, the same": Scenario(train, train, ("overwrite",)),
    "compare": Scenario(compare, whole=(f"{OUT}/one", f"{OUT}/two", f"{OUT}/comparison.png")),
    "sweep": Scenario(sweeping),
    "export": Scenario(exported, export_prepared, again=()),
    "export --overwrite": Scenario(exported, export_to_replace, ("overwrite",), ("overwrite",)),
}


@pytest.fixture(scope="module")
def killing() -> Killing:
    return Killing(PRELOADED)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_at_every_operation(
    name: str, killing: Killing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = SCENARIOS[name]
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    scenario.prepare(before)
    shutil.copytree(before, after)
    n = killing.operations(scenario, after)
    old, new = contents(before), contents(after)
    assert not any(".partial" in name for name in new)
    records = {f"{OUT}/sweep.json", *(name for name in new if "/records/" in name)}
    for at in range(1, n + 1):
        folder = tmp_path / str(at)
        shutil.copytree(before, folder)
        killing.kill(scenario, folder, at)
        found = contents(folder)
        for part in scenario.whole if name != "sweep" else sorted(records):
            stands = below(found, part)
            known = [below(old, part), below(new, part)]
            if part != OUT and name == "compare":  # its measures are added in a step of their own
                stands.pop("run.json", None), [k.pop("run.json", None) for k in known]
                stands.pop("run.json.new", None)
            if (folder / f"{OUT}.partial" / "old").is_dir() and not stands:
                stands = below(found, f"{OUT}.partial/old")  # until the next start
            assert stands in known, f"killed at {at} of {n}: {part} is half there"
        scenario.go_on(folder)
        assert contents(folder) == new, f"killed at {at} of {n}: gone on with, it is another"
        assert sorted(os.listdir(folder)) == sorted(os.listdir(after))
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"{name}: {n} kills")


def below(files: dict[str, bytes], part: str) -> dict[str, bytes]:
    """The files in a folder, or the one file."""
    return {
        name.removeprefix(part).removeprefix("/"): content
        for name, content in files.items()
        if name == part or name.startswith(f"{part}/")
    }


def test_a_sweep_holds_every_record(tmp_path: Path) -> None:
    sweeping(tmp_path)
    assert len(read_sweep(tmp_path / OUT)) == 4
