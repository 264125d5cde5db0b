"""Language models and texts on the command line."""

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
from polyseme.errors import InputError
from polyseme.remote import cache_folder, is_url, local_path

LANGUAGE_MODEL_HELP = (
    "With --text: smollm2 or minilm, a folder that transformers wrote, a .gguf file, or a name on "
    "the Hugging Face hub"
)
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def count(text: str) -> int:
    """A number such as 50000, 50k or 1.5M."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text.strip())
    value = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not match or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens; give one such as 50000, 50k or 1M"
        )
    return int(value)


def add_text_options(command: Any) -> None:
    """The options that say which text is read, and how."""
    text = command.add_argument_group("text")
    text.add_argument(
        "--text",
        nargs="?",
        const="",
        metavar="PATH",
        help=".txt, .jsonl or .parquet, gzipped or not, a folder or URL of them, or a data set on "
        "the hub, with :CONFIGURATION after its name where it has several; without a PATH, English "
        "that ships with Python",
    )
    text.add_argument(
        "--tokens", type=count, metavar="N", help="read at most this many: 50k, 1M; default: all"
    )
    text.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens at a time; default: 128"
    )
    text.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="of .txt and .jsonl; default: utf-8"
    )
    text.add_argument("--field", default="text", help="of .jsonl and .parquet; default: text")
    text.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=("special", "first"),
        help="count special tokens, or the first token of each context, which are left out "
        "otherwise; may be repeated",
    )
    add_remote_code(text)


def add_remote_code(command: Any) -> None:
    """The option that lets a checkpoint run code of its own."""
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the model's own folder, or its page on the hub, run the code that it brings",
    )


def load_named_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The language model that ``--model`` or MODEL names, and its tokenizer."""
    language = module("polyseme.sites.language", "Loading a language model")
    return tuple(
        language.load_language_model(
            options.model,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
        )
    )


# Options that go with one kind of data alone.
_OF_TEXTS = ["tokens", "context", "encoding", "field", "keep", "trust_remote_code", "importances"]
_OF_IMAGES = ["limit", "mean", "std", "images_key", "labels_key", "image_shape", "no_panels"]


def check_source(options: argparse.Namespace) -> None:
    """Either --data or --text, and no option of the other."""
    if (options.data is None) == (options.text is None):
        raise InputError(
            "Give --data for images or --text for a language model, one of them; --text alone "
            "reads English that ships with Python."
        )
    source, other, useless = (
        ("--data", "--text", _OF_TEXTS)
        if options.text is None
        else ("--text", "--data", _OF_IMAGES)
    )
    for name in useless:
        # A command need not have all of them.
        if getattr(options, name, None) != options.command.get_default(name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} goes with {other}, not with {source}; leave it out.")


def read_contexts(options: argparse.Namespace) -> tuple[Any, Any]:
    """The language model and the contexts that the options name."""
    data = module("polyseme.data", "Reading texts")
    local_path(options.model, "The folder of a model")
    if ":" in options.model:
        raise InputError(
            f"The model is given as {options.model!r}; with --text a language model that comes "
            "with its tokenizer is expected: a name, a folder or a .gguf file. For one that your "
            "own code makes, call polyseme.analyse(model, Contexts(texts, tokenizer), ...)."
        )
    texts = data.read_text(
        options.text or None, field=options.field, split=options.split, encoding=options.encoding
    )
    model, tokenizer = load_named_model(options)
    contexts = data.Contexts(
        texts,
        tokenizer,
        length=options.context,
        max_tokens=options.tokens,
        leave_out=[entry for entry in ("special", "first") if entry not in options.keep],
    )
    return model, contexts


def analyse_language_model(
    options: argparse.Namespace, analysis: ModuleType, shared: dict[str, Any]
) -> Any:
    """The run of ``polyseme analyse MODEL --text ...``."""
    model, contexts = read_contexts(options)
    sites = [*(options.sites or []), *_attached(model, options)]
    if not sites:
        transformer = module("polyseme.sites.transformer", "Finding MLPs")
        sites = transformer.find_mlp_sites(model)
        if not options.quiet and (note := transformer.unread(model).strip()):
            print(note, file=sys.stderr)
    return analyse_or_shard(
        options,
        analysis,
        model,
        contexts,
        sites=sites,
        importances=options.importances,
        **shared,
    )


def analyse_or_shard(
    options: argparse.Namespace, analysis: ModuleType, model: Any, data: Any, **named: Any
) -> Any:
    """The run, or with ``--shard`` a shard of it."""
    engine = {"engine": options.engine, "address": options.address, "workers": options.workers}
    if options.shard is None:
        return analysis.analyse(model, data, **named, **engine)
    if options.engine != "local" or options.address is not None or options.workers is not None:
        raise InputError(
            "--shard is read by this process, so --engine, --address and --workers do not go with "
            "it; leave them out, or leave --shard out and let Ray read all of the data."
        )
    return analysis.analyse_shard(model, data, options.shard, **named)


def add_analysis_options(command: Any) -> None:
    """The options of an analysis of texts alone: importances, and SAEs at hook points."""
    command.add_argument(
        "--importances",
        default="none",
        metavar="HOW",
        help="exact: how much of each activation rests on each token around it, by masking, which "
        "takes some twenty times as long as reading the text; default: none",
    )
    command.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="SAE",
        help="an SAE whose latents are analysed, at the hook point that it was trained on: a "
        "folder, a state dict or a SAELens release; may be repeated; without --sites only these",
    )
    command.add_argument(
        "--hook",
        action="append",
        default=[],
        metavar="NAME",
        help="the hook point of each --sae, where its metadata does not say it or to say "
        "otherwise: blocks.5.hook_resid_post and the like, or a module",
    )


def _attached(model: Any, options: argparse.Namespace) -> list[Any]:
    """The SAEs that the options name, as sites."""
    if options.hook and len(options.hook) not in (1, len(options.sae)):
        raise InputError(
            f"--hook is given {len(options.hook)} times and --sae {len(options.sae)} times; give "
            "it once for all of them, or once for each."
        )
    if options.hook and not options.sae:
        raise InputError("--hook says where an SAE belongs; give the SAE too, by --sae.")
    if not options.sae:
        return []
    attach = module("polyseme.sites", "Attaching an SAE").attach_sae
    load = module("polyseme.sae", "Loading an SAE").load_sae
    hooks = options.hook * len(options.sae) if len(options.hook) == 1 else options.hook
    sites: list[Any] = []
    for path, hook in zip(options.sae, hooks or [None] * len(options.sae), strict=True):
        site = attach(model, load(path), hook)
        if any(site.name == other.name for other in sites):
            # Several of one place: by their folders too.
            site.name = f"{site.name}.{Path(path).name}"
        sites.append(site)
    return sites


@contextmanager
def activations_of_text(options: argparse.Namespace) -> Iterator[tuple[Any, Any, Any]]:
    """Model, contexts and what ``polyseme train-sae MODEL --text ...`` trains on.

    The activations are on disk for as long as it takes.
    """
    analysis = module("polyseme.analysis", "Reading a model's activations")
    model, contexts = read_contexts(options)
    folder = cache_folder() if is_url(options.out) else Path(options.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the output, where there is room; and without a name, so that nothing can be left.
    with tempfile.TemporaryFile(dir=folder) as file:
        activations = analysis.token_vectors(
            model, contexts, options.site, file=file, progress=not options.quiet
        )
        yield model, contexts, activations


def load_any_model(options: argparse.Namespace) -> Any:
    """The model of ``polyseme sites``: as for images, or a language model by its name."""
    if ":" in options.model or options.model.endswith(".py"):
        return load_model(options.model)
    try:
        return load_named_model(options)[0]
    except InputError as error:
        raise InputError(
            f"{error} A model of your own is given as MODULE:NAME or FILE.py:NAME."
        ) from error


def add_saes(command: argparse.ArgumentParser) -> None:
    """``--sae`` of commands that are given a run."""
    command.add_argument(
        "--sae",
        action="append",
        default=[],
        metavar="SAE",
        help="the SAE of each site that is one, in the order of the run; may be repeated",
    )


def saes_of_run(run: Any, paths: list[str]) -> dict[str, Any]:
    """The SAEs of a run's sites that are given by ``--sae``, by site."""
    hooked = [site.name for site in run.folder.sites if "hook" in site.extra]
    if paths and len(paths) != len(hooked):
        raise InputError(
            f"--sae is given {len(paths)} times, but {len(hooked)} sites of the run are SAEs "
            f"({', '.join(hooked) or 'none'}); give one for each, in that order."
        )
    if not paths:
        return {}
    load = module("polyseme.sae", "Loading an SAE").load_sae
    return {name: load(path) for name, path in zip(hooked, paths, strict=True)}
