"""Language models and texts on the command line."""

from __future__ import annotations

import argparse
import re
from types import ModuleType
from typing import Any

from polyseme.cli.arguments import load_model, module
from polyseme.errors import InputError

LANGUAGE_MODEL_HELP = (
    "With --text: smollm2 or minilm, a folder that transformers wrote, a .gguf file, or a name on "
    "the Hugging Face hub"
)
_UNITS = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def count(text: str) -> int:
    """A number such as 50000, 50k or 1.5M."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not found or value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens; give one such as 50000, 50k or 1M"
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
        help=".txt, .jsonl or .parquet, gzipped or not, a folder of them, or a data set on the "
        "hub; without a PATH, English that ships with Python",
    )
    text.add_argument(
        "--tokens", type=count, metavar="N", help="only the first so many: 50k, 1M; default: all"
    )
    text.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens at a time; default: 128"
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


def analyse_language_model(
    options: argparse.Namespace, pipeline: ModuleType, shared: dict[str, Any]
) -> Any:
    """The run of ``polyseme analyse MODEL --text ...``."""
    language = module("polyseme.capture.language", "Analysing a language model")
    data = module("polyseme.data", "Reading texts")
    if ":" in options.model:
        raise InputError(
            f"The model is given as {options.model!r}; with --text a language model that comes "
            "with its tokenizer is expected: a name, a folder or a .gguf file. For one that your "
            "own code makes, call polyseme.analyse(model, Contexts(texts, tokenizer), ...)."
        )
    texts = data.read_text(options.text or None, field=options.field, split=options.split)
    model, tokenizer = language.load_language_model(options.model, device=options.device)
    contexts = data.Contexts(
        texts,
        tokenizer,
        length=options.context,
        max_tokens=options.tokens,
        leave_out=[entry for entry in ("special", "first") if entry not in options.keep],
    )
    sites = options.sites or module("polyseme.capture", "Finding MLPs").find_mlp_sites(model)
    return pipeline.analyse(
        model,
        contexts,
        sites=sites,
        batch_size=options.batch_size,
        memory_budget=options.memory_budget,
        **shared,
    )


def load_any_model(spec: str) -> Any:
    """The model of ``polyseme sites``: as for images, or a language model by its name."""
    if ":" in spec or spec.endswith(".py"):
        return load_model(spec)
    language = module("polyseme.capture.language", "Loading a language model")
    try:
        return language.load_language_model(spec)[0]
    except InputError as error:
        raise InputError(
            f"{error} A model of your own is given as MODULE:NAME or FILE.py:NAME."
        ) from error
