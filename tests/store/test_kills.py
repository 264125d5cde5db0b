"""A process killed while it writes a run, at some of the places that `make torture` tries."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import run_builder
from tests.kills import Killing

from polyseme.errors import RunError
from polyseme.store import RunFolder, RunWriter

OTHER = run_builder.FINGERPRINT | {"model": "other"}


def replace(folder: Path, **flags: bool) -> None:
    """Make a run anew, with a checkpoint before it."""
    made = run_builder.contents(seed=1)
    with RunWriter(folder / "run", fingerprint=OTHER, **(flags or {"overwrite": True})) as writer:
        if writer.finished:
            return
        writer.save_state("pass", {}, {})
        run_builder.fill(writer, made)
        writer.finish(made.metadata)


def test_a_kill_loses_and_leaves_nothing(tmp_path: Path) -> None:
    killing = Killing(["polyseme.store", "scipy.cluster.hierarchy"])
    run_builder.write(tmp_path / "before" / "run")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    n = killing.operations(replace, tmp_path / "after")
    published = set()
    # The last third is the publishing.
    for at in sorted({*range(1, n, n // 5), *range(n * 2 // 3, n, n // 20)}):
        folder = tmp_path / str(at)
        shutil.copytree(tmp_path / "before", folder)
        killing.kill(replace, folder, at)
        old = folder / "run.partial" / "old"
        standing = RunFolder(folder / "run" if (folder / "run").exists() else old)
        standing.verify()
        published.add(standing.metadata["fingerprint"]["model"])
        try:
            replace(folder, resume=True)
        except RunError:  # killed before anything was begun
            assert standing.metadata["fingerprint"]["model"] == "m"
            replace(folder)
        RunFolder(folder / "run").verify()
        assert RunFolder(folder / "run").metadata["fingerprint"]["model"] == "other"
        assert os.listdir(folder) == ["run"]
    assert published == {"m", "other"}, "kills both before and after it"
