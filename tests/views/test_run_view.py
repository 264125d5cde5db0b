"""The run as a whole: its tables, its neurons by name, its look in a notebook."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from torch import nn

import polyseme as ps
from analysis import small
from polyseme.errors import InputError, RunError
from polyseme.views.notebook import png
from views import runs

ROOT = Path(__file__).resolve().parents[2]
METRICS = ("max_distance", "mean_distance", "intra_cluster_distance", "inter_cluster_distance")


def test_neurons_are_the_table_on_disk_and_a_copy_of_it(grey_run):
    table = grey_run.neurons()
    stored = pd.read_parquet(grey_run.path / "neurons.parquet")
    pd.testing.assert_frame_equal(table, stored, check_dtype=False)
    assert table.groupby("site", sort=False).size().to_dict() == {
        "first": 10,
        "second": 20,
        "last": 3,
    }
    table["n_examples"] = -1
    assert (grey_run.neurons()["n_examples"] >= 0).all()
    differ = table["mean_distance"] - table["background_distance"]
    np.testing.assert_allclose(table["calibrated_distance"], differ, atol=1e-9)


def test_summary_is_what_pandas_says(grey_run):
    summary = grey_run.summary().set_index("site")
    table = grey_run.neurons()
    assert list(summary.index) == grey_run.sites == ["first", "second", "last"]
    for site, row in summary.iterrows():
        mine = table[table["site"] == site]
        live = [number for number in mine["n_examples"] if number > 0]
        assert row["neurons"] == len(mine)
        dead = [number for number in mine["density"] if number == 0]
        assert row["dead"] == len(dead)
        assert row["dead_share"] == pytest.approx(len(dead) / len(mine))
        assert row["without_examples"] == len(mine) - len(live) - len(dead)
        assert row["mean_examples"] == pytest.approx(sum(live) / len(live))
        clusters = [n for n in mine["n_clusters"] if n > 0]
        assert row["mean_clusters"] == pytest.approx(sum(clusters) / len(live))
        for metric in METRICS:
            defined = [value for value in mine[metric] if value == value]
            assert row[f"{metric}_n"] == len(defined)
            mean = sum(defined) / len(defined) if defined else np.nan
            assert row[metric] == pytest.approx(mean, nan_ok=True)
        ratios = sorted(mine["participation_ratio"][mine["n_examples"] > 0])
        assert row["median_participation_ratio"] == pytest.approx(np.median(ratios))
    first = summary.loc["first"]
    assert first["dead"] >= 1
    assert first["mean_distance_n"] < first["neurons"] - first["dead"], "one has a lone example"


def test_opening_again_gives_the_same(grey_run):
    again = ps.open_run(str(grey_run.path))
    pd.testing.assert_frame_equal(again.neurons(), grey_run.neurons())
    assert again.sites == grey_run.sites
    assert again.metadata == grey_run.metadata
    match = r"^Run\('.*run': 3 sites, 33 neurons, \d+ dead\)$"
    assert pd.Series([repr(again)]).str.match(match).all()


def test_open_run_rejects_a_folder_without_a_run(tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        ps.open_run(tmp_path / "nowhere")
    with pytest.raises(RunError):
        ps.open_run(tmp_path)


def test_neurons_by_name_and_number(grey_run, tmp_path):
    assert grey_run.neuron("second", 7).number == 7
    assert grey_run.neuron("second", np.int64(7)).site == "second"
    single = runs.analyse_grey(tmp_path / "run", sites="first", panels=False)
    assert single.neuron(4).site == "first"
    assert single.neuron(np.int32(4)).number == 4
    assert single.neuron("first", 4).row.equals(single.neuron(4).row)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            (2,),
            r"The run has 3 sites; give the site's name too: run\.neuron\('first', 2\)",
        ),
        (("first",), r"neuron is None; site 'first' has neurons 0 to 9"),
        (("first", 10), r"neuron is 10; site 'first' has neurons 0 to 9"),
        (("first", -1), r"neuron is -1; site 'first' has"),
        (("first", True), r"neuron is True; site 'first' has"),
        (("first", 1.0), r"neuron is 1\.0; site 'first' has"),
        (("first", "1"), r"neuron is '1'; site 'first' has"),
        (("frist", 1), r"Unknown site: 'frist'\. Did you mean 'first'.*: first, second, last"),
    ],
)
def test_neurons_that_are_not_there(grey_run, arguments, match):
    with pytest.raises(InputError, match=match):
        grey_run.neuron(*arguments)


# --- in a notebook ---------------------------------------------------------------------------


class Wellformed(HTMLParser):
    """Collects tags and text, and fails where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.sources: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        allowed = {"src", "alt"} if tag == "img" else {"style", "class"}
        assert {name for name, _ in attrs} <= allowed
        self.sources |= {value.partition(",")[0] for name, value in attrs if name == "src"}
        self.tags.add(tag)
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


PLAIN = {"p", "b", "br", "table", "thead", "tbody", "tr", "th", "td"}
HOSTILE = "<script>alert('1')&quot;"


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({HOSTILE: nn.Linear(12, 4)})

        def forward(self, x):
            return self.layers[HOSTILE](x)

    Model.__name__ = HOSTILE
    return ps.analyse(
        small.make(Model),
        ps.Images(small.flat_inputs(), np.arange(90) % 2, name=HOSTILE),
        sites="*",
        out=tmp_path_factory.mktemp("hostile") / HOSTILE,
        class_names=["<img src=x onerror=alert(1)>", "b</td>"],
        image_shape=(3, 4),
        progress=False,
    )


def test_a_run_in_a_notebook(grey_run, hostile_run):
    for run in (grey_run, hostile_run):
        page = Wellformed(run._repr_html_())
        assert page.tags <= PLAIN
        assert str(run.path) in page.text
    assert page.text.count(HOSTILE) == 4, "path, class of the model, name of the data, site"
    assert "grey (70 inputs)" in Wellformed(grey_run._repr_html_()).text


def test_a_neuron_in_a_notebook(grey_run, hostile_run):
    hostile = hostile_run.neuron(0)
    page = Wellformed(hostile._repr_html_())
    assert page.tags == {"p", "b", "table", "tr", "th", "td", "img"}
    assert page.sources == {"data:image/png;base64"}
    assert HOSTILE in page.text
    assert "<img src=x onerror=alert(1)> ×" in page.text
    meanings = hostile.meanings
    assert f"verdict on the meanings: {meanings.verdict}" in page.text
    for meaning in meanings:
        assert f"meaning {meaning.number}" in page.text
        assert meaning.label in page.text
    for number in (3, 5):
        page = Wellformed(grey_run.neuron("first", number)._repr_html_())
        assert page.tags <= {*PLAIN, "img"}


@pytest.mark.parametrize("shape", [(5, 4), (3, 7, 3), (1, 1)])
def test_a_picture_in_a_notebook(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = np.asarray(Image.open(io.BytesIO(png(image))))
    np.testing.assert_array_equal(read, image)


def test_pictures_are_of_the_examples(grey_run):
    """The medoid, though it is not the strongest, then the strongest."""
    for number in range(10):
        neuron = grey_run.neuron("first", number)
        meaning = neuron.meanings[0] if len(neuron.examples) else None
        if meaning and meaning.medoid != meaning.examples["example"][0]:
            break
    order = meaning.examples.sort_values("activation", ascending=False, kind="stable")
    assert meaning.medoid != order["example"].iloc[0]
    wanted = [meaning.medoid, *(n for n in order["example"] if n != meaning.medoid)][:6]
    row = neuron._repr_html_().split("<tr>")[2]
    found = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"base64,([^\"]+)", row)
    ]
    np.testing.assert_array_equal(found, neuron.inputs()[wanted])


def test_a_hostile_run_can_be_drawn(hostile_run, tmp_path):
    hostile_run.neuron(0).figure(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# --- without torch ---------------------------------------------------------------------------

LOOK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "sklearn"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import numpy as np
import polyseme as ps

run = ps.open_run(sys.argv[1])
neuron = run.neuron("first", 0)
print(len(run.neurons()), len(run.summary()), len(neuron.features), len(neuron.similar(3)))
print(neuron.recut(0.9).metrics.n_clusters, neuron.assign(neuron.vectors).tolist())
import matplotlib

def settings():
    # Asking for the backend would choose one, and load pyplot.
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

before = settings()
neuron.figure(sys.argv[2])
assert settings() == before, "the figure changed a global setting"
assert "matplotlib.pyplot" not in sys.modules, "pyplot opens windows"
assert "torch" not in sys.modules
run._repr_html_(), neuron._repr_html_()
try:
    ps.analyse
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_views_need_no_torch(grey_run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, str(grey_run.path), str(tmp_path / "f.png")],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "MPLCONFIGDIR": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    neuron = grey_run.neuron("first", 0)
    lines = done.stdout.splitlines()
    assert lines[0] == f"33 3 {len(neuron.features)} {len(neuron.similar(3))}"
    again = neuron.assign(neuron.vectors).tolist()
    assert lines[1] == f"{neuron.recut(0.9).metrics.n_clusters} {again}"
    assert lines[2] == (
        "MissingDependencyError polyseme.analyse needs torch, which is not installed. "
        "Install it with: pip install 'polyseme[torch]'"
    )
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
