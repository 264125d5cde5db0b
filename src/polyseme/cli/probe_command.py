"""The command that runs a text through the model of a run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from polyseme.cli.arguments import module
from polyseme.cli.language_models import add_remote_code, add_saes, load_named_model, saes_of_run
from polyseme.cli.options import add_options, values_of
from polyseme.errors import InputError

_PROBE = "k by"


def add_probe(command: Any) -> None:
    """Add the arguments of ``polyseme probe``."""
    from polyseme.views import Run

    command.add_argument("path", metavar="RUN", help="folder or URL of a run on texts")
    command.add_argument("text", metavar="TEXT", help="the text; - reads standard input")
    command.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that was analysed, as for polyseme analyse (default: the run's own model, "
        "if that is smollm2 or minilm)",
    )
    command.add_argument(
        "--sites",
        action="append",
        metavar="NAME",
        help="a site of the run, or a glob; may be repeated (default: all)",
    )
    add_saes(command)
    add_options(command, Run.probe, _PROBE, k={"flag": "-k"}, by={"metavar": "RANKING"})
    command.add_argument("--device", default=None, help="cpu, cuda, mps")
    add_remote_code(command)


def probe(options: argparse.Namespace) -> None:
    """Show which neurons of a run each token of a text activates, and in which meaning."""
    opening = module("polyseme.opening", "Probing a run")
    from rich.console import Console

    run = opening.open_run(options.path)
    text = sys.stdin.read() if options.text == "-" else options.text
    model, tokenizer = load_named_model(options) if options.model else (None, None)
    if model is None and options.device:
        raise InputError("--device requires --model; give the model.")
    probed = run.probe(
        text,
        model,
        tokenizer,
        sites=options.sites,
        saes=saes_of_run(run, options.sae),
        **values_of(options, _PROBE),
    )
    Console().print(probed.table())
