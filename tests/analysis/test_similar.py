"""The stage that finds similar features: what a run holds, and an interrupt right after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import polyseme as ps
from analysis import small
from polyseme.analysis import feature_search
from polyseme.store import RunWriter


def go(out: Path, **options: object) -> ps.Run:
    return ps.analyse(
        small.make(small.WithSAE),
        small.flat_inputs(),
        sites="*",
        out=out,
        select=ps.TopK(20),
        threshold=0.9,
        panels=False,
        progress=False,
        **options,
    )


def test_similar_features_in_a_run(tmp_path: Path) -> None:
    folder = go(tmp_path / "run").folder
    features = folder.features
    found = np.concatenate([folder.site(s.number)["similar_features"] for s in folder.sites])
    similarity = np.concatenate([folder.site(s.number)["similar_similarity"] for s in folder.sites])
    assert found.shape == (len(features), feature_search.NEIGHBOURS)
    held = found >= 0
    assert np.array_equal(held, np.isfinite(similarity))
    small_ones = (features["n_examples"] < 3).to_numpy()
    assert small_ones.any()
    assert not held[small_ones].any()
    assert held[~small_ones].any(axis=1).mean() > 0.5
    width = features["site"].map({site.name: site.d_in for site in folder.sites}).to_numpy()
    mine, theirs = np.nonzero(held)[0], found[held]
    assert len(set(width)) > 1
    assert (width[mine] == width[theirs]).all(), "vectors of one length"
    assert not small_ones[theirs].any()
    same = (features["site"].to_numpy()[mine] == features["site"].to_numpy()[theirs]) & (
        features["neuron"].to_numpy()[mine] == features["neuron"].to_numpy()[theirs]
    )
    assert not same.any(), "none of the neuron's own"


def test_interrupted_after_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small.contents(go(tmp_path / "whole").path)
    with monkeypatch.context() as patch:
        patch.setattr(
            RunWriter, "overwrite_in_site", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "run")
    with monkeypatch.context() as patch:
        # What was found is kept, so it is not looked for again.
        patch.setattr(feature_search, "nearest_features", None)
        run = go(tmp_path / "run", resume=True)
    assert small.contents(run.path) == whole
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "whole"]
