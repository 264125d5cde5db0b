"""Options for language models and texts."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from polyseme.cli.arguments import load_model, module
from polyseme.cli.options import add_options, values_of
from polyseme.errors import InputError
from polyseme.remote import cache_folder, is_url, local_path

LANGUAGE_MODEL_HELP = (
    "With --text: smollm2 or minilm, a folder written by transformers, a .gguf file, or a name on "
    "the Hugging Face hub"
)
ENGINE = "engine address workers"
_READING = "encoding field"
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def count(text: str) -> int:
    """Parse a number such as 50000, 50k or 1.5M."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not match or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens; give a number such as 50000, 50k or 1M"
        )
    return int(value)


def add_text_options(command: Any) -> None:
    """Add the options for reading texts."""
    from polyseme import data

    text = command.add_argument_group("text")
    text.add_argument(
        "--text",
        nargs="?",
        const="",
        metavar="PATH",
        help=".txt, .jsonl or .parquet, optionally gzipped, a folder or URL of them, or a data set "
        "on the Hugging Face hub, as NAME:CONFIGURATION if it has several configurations; without "
        "a PATH, English text that ships with Python",
    )
    add_options(
        text,
        data.Contexts,
        "max_tokens length",
        max_tokens={"flag": "--tokens", "type": count, "help": "{}; for example 50k or 1M"},
        length={"flag": "--context"},
    )
    add_options(text, data.read_text, _READING)
    text.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=("special", "first"),
        help="include special tokens, or the first token of each context, both excluded by "
        "default; may be repeated",
    )
    add_remote_code(text)


def add_remote_code(command: Any) -> None:
    """Add the option that allows a checkpoint to run its own code."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow the checkpoint to run its own code",
    )


def load_named_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the language model that ``--model`` or MODEL names, and its tokenizer."""
    language = module("polyseme.sites.language", "Loading a language model")
    return tuple(
        language.load_language_model(
            options.model,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )


# Options that apply to only one kind of data.
_OF_TEXTS = ["max_tokens", "length", "encoding", "field", "keep", "trust_remote_code"]
_OF_TEXTS += ["importances"]
_OF_IMAGES = ["limit", "mean", "std", "images_key", "labels_key", "image_shape", "panels"]


def check_source(options: argparse.Namespace) -> None:
    """Check that either --data or --text is given, and no option of the other."""
    if (options.data is None) == (options.text is None):
        raise InputError(
            "Give either --data for images or --text for a language model; --text without a value "
            "reads English text that ships with Python."
        )
    source, other, useless = (
        ("--data", "--text", _OF_TEXTS)
        if options.text is None
        else ("--text", "--data", _OF_IMAGES)
    )
    for action in options.command._actions:
        if action.dest in useless and getattr(options, action.dest) != action.default:
            flag = action.option_strings[0]
            raise InputError(f"{flag} applies to {other}, not to {source}; leave it out.")


def read_contexts(options: argparse.Namespace) -> tuple[Any, Any]:
    """Load the language model and the contexts that the options specify."""
    data = module("polyseme.data", "Reading texts")
    local_path(options.model, "A model folder")
    if ":" in options.model:
        raise InputError(
            f"The model is {options.model!r}; with --text, expected a language model with its "
            "tokenizer: a name, a folder or a .gguf file. For a model that your own code creates, "
            "call polyseme.analyse(model, Contexts(texts, tokenizer), ...)."
        )
    texts = data.read_text(
        options.text or None, split=options.split, **values_of(options, _READING)
    )
    model, tokenizer = load_named_model(options)
    contexts = data.Contexts(
        texts,
        tokenizer,
        **values_of(options, "length max_tokens"),
        leave_out=[entry for entry in ("special", "first") if entry not in options.keep],
    )
    return model, contexts


def analyse_language_model(
    options: argparse.Namespace, analysis: ModuleType, shared: dict[str, Any]
) -> Any:
    """Carry out ``polyseme analyse MODEL --text ...``."""
    model, contexts = read_contexts(options)
    sites = [*(options.sites or []), *_attached(model, options)]
    if not sites:
        transformer = module("polyseme.sites.transformer", "Finding MLPs")
        sites = transformer.find_mlp_sites(model)
        if options.progress and (note := transformer.unread(model).strip()):
            print(note, file=sys.stderr)
    return analyse_or_shard(options, analysis, model, contexts, sites=sites, **shared)


def analyse_or_shard(
    options: argparse.Namespace, analysis: ModuleType, model: Any, data: Any, **named: Any
) -> Any:
    """Write the run or, with ``--shard``, one shard of it."""
    if options.shard is None:
        return analysis.analyse(model, data, **named, **values_of(options, ENGINE))
    if options.engine != "local" or options.address is not None or options.workers is not None:
        raise InputError(
            "--shard reads in this process, so it excludes --engine, --address and --workers; "
            "leave them out, or leave --shard out and let Ray read all the data."
        )
    return analysis.analyse_shard(model, data, options.shard, **named)


def add_attached_saes(command: Any) -> None:
    """Add the options for SAEs at hook points."""
    command.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="SAE",
        help="an SAE to analyse, at the hook point that it was trained on: a folder, a state dict "
        "or a SAELens release; may be repeated; without --sites, only the SAEs are analysed",
    )
    command.add_argument(
        "--hook",
        action="append",
        default=[],
        metavar="NAME",
        help="the hook point of each --sae, such as blocks.5.hook_resid_post, or a module; "
        "overrides the SAE's metadata, and is required if the metadata names none",
    )


def _attached(model: Any, options: argparse.Namespace) -> list[Any]:
    """Attach the SAEs that the options name, as sites."""
    if options.hook and len(options.hook) not in (1, len(options.sae)):
        raise InputError(
            f"--hook is given {len(options.hook)} times and --sae {len(options.sae)} times; give "
            "it once for all SAEs, or once for each."
        )
    if options.hook and not options.sae:
        raise InputError("--hook is given without an SAE; give the SAE with --sae.")
    if not options.sae:
        return []
    attach = module("polyseme.sites", "Attaching an SAE").attach_sae
    load = module("polyseme.sae", "Loading an SAE").load_sae
    hooks = options.hook * len(options.sae) if len(options.hook) == 1 else options.hook
    sites: list[Any] = []
    for path, hook in zip(options.sae, hooks or [None] * len(options.sae), strict=True):
        site = attach(model, load(path), hook)
        if any(site.name == other.name for other in sites):
            # Several SAEs at one hook point: tell them apart by folder.
            site.name = f"{site.name}.{Path(path).name}"
        sites.append(site)
    return sites


@contextmanager
def activations_of_text(options: argparse.Namespace) -> Iterator[tuple[Any, Any, Any]]:
    """The model, the contexts and the activations for ``polyseme train-sae MODEL --text ...``.

    The activations are kept on disk while the context is open.
    """
    analysis = module("polyseme.analysis", "Reading a model's activations")
    model, contexts = read_contexts(options)
    folder = cache_folder() if is_url(options.out) else Path(options.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    # Next to the output, where there is room; unnamed, so that a crash leaves nothing behind.
    with tempfile.TemporaryFile(dir=folder) as file:
        activations = analysis.token_vectors(
            model, contexts, options.site, file=file, progress=options.progress
        )
        yield model, contexts, activations


def load_any_model(options: argparse.Namespace) -> Any:
    """Load the model of ``polyseme sites``: from code, or a language model by name."""
    if ":" in options.model or options.model.endswith(".py"):
        return load_model(options.model)
    try:
        return load_named_model(options)[0]
    except InputError as error:
        raise InputError(
            f"{error} To give a model of your own, use MODULE:NAME or FILE.py:NAME."
        ) from error


def add_saes(command: argparse.ArgumentParser) -> None:
    """Add ``--sae`` to a command that takes a run."""
    command.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="SAE",
        help="an SAE of the run; repeat for each, in the order of the run's sites",
    )


def saes_of_run(run: Any, paths: list[str]) -> dict[str, Any]:
    """Load the SAEs that ``--sae`` names, by site of the run."""
    hooked = [site.name for site in run.folder.sites if "hook" in site.extra]
    if paths and len(paths) != len(hooked):
        raise InputError(
            f"--sae is given {len(paths)} times, but {len(hooked)} sites of the run are SAEs "
            f"({', '.join(hooked) or 'none'}); give one for each, in this order."
        )
    if not paths:
        return {}
    load = module("polyseme.sae", "Loading an SAE").load_sae
    return {name: load(path) for name, path in zip(hooked, paths, strict=True)}
