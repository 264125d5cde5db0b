"""The command that judges a run's features by what is known of its examples."""

from __future__ import annotations

import argparse
from typing import Any

from polyseme.cli.arguments import module


def add_benchmark(commands: Any) -> None:
    text = (
        "Compare a run's features with the tokens, or the classes, of their examples, at several "
        "thresholds, beside clusters of plain pre-neuron embeddings."
    )
    command = commands.add_parser("benchmark", help=text, description=text)
    command.set_defaults(run=_benchmark)
    command.add_argument("path", metavar="RUN", help="folder of a run")
    command.add_argument(
        "--site", action="append", metavar="NAME", help="may be repeated; default: all sites"
    )
    command.add_argument(
        "--neurons", type=int, default=100, metavar="N", help="of each site; default: %(default)s"
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--csv", metavar="FILE", help="write the table, site by site, to a file")


def _benchmark(options: argparse.Namespace) -> None:
    evaluate = module("polyseme.evaluate.agreement", "Judging a run's features")
    from rich.console import Console
    from rich.table import Table

    from polyseme.views import open_run

    frame = evaluate.agreement(
        open_run(options.path), sites=options.site, n_neurons=options.neurons, seed=options.seed
    )
    if options.csv:
        frame.to_csv(options.csv, index=False)
    n = int(frame.groupby("site")["neurons"].first().sum())
    sites = frame["site"].nunique()
    means = frame.drop(columns=["site", "neurons"]).groupby(["space", "threshold"], sort=False)
    table = Table(
        title=f"Means over {sites} site{'s' * (sites > 1)}, {n:,} neurons",
        caption="of: neuron embeddings, or pre-neuron embeddings; cut: cosine distance; "
        "≥ 2: features of two examples or more; largest: its share of the examples; same, "
        "others: pairs of equal and of different tokens or classes that are in one feature; "
        "Rand: adjusted Rand index; random: pairs of random inputs nearer than the cut",
    )
    table.add_column("of")
    for name in ("cut", "features", "≥ 2", "largest", "same", "others", "Rand", "random"):
        table.add_column(name, justify="right", no_wrap=True)
    before = ""
    for (space, threshold), row in means.mean().iterrows():
        if before and space != before:
            table.add_section()
        before = space
        table.add_row(
            {"neuron": "h ⊙ w", "pre-neuron": "h"}[space],
            f"{threshold:g}",
            f"{row['features']:.1f}",
            f"{row['repeated']:.1f}",
            *(f"{row[name]:.3f}" for name in ("largest", "same_together", "others_together")),
            f"{row['rand_index']:.3f}",
            f"{row['random_near']:.4f}",
        )
    Console().print(table)
