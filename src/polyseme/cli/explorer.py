"""The explorer on the command line."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyseme.cli.arguments import load_model, module
from polyseme.cli.language_models import add_remote_code, add_saes, load_named_model, saes_of_run
from polyseme.errors import InputError, RunError
from polyseme.remote import is_url

#: models that come as packages, `polyseme.sites.language.PACKAGED`, without loading torch
PACKAGED = ("smollm2", "minilm")
_LONGEST_RUN_JSON = 64 * 2**20


def add_explore(commands: Any) -> None:
    """``polyseme explore``."""
    text = "Look at runs in the browser: every neuron, split into its meanings."
    explore = commands.add_parser("explore", help=text, description=text)
    explore.set_defaults(run=_explore)
    explore.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder or URL of a run; several compare"
    )
    explore.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that was analysed, to probe texts, find token importances or classify "
        "images: a name or folder as for polyseme analyse, or MODULE:NAME or FILE.py:NAME, whose "
        "code is run (default: the run's own, where that is smollm2 or minilm)",
    )
    add_saes(explore)
    explore.add_argument("--device", default=None, help="of the model: cpu, cuda, mps")
    explore.add_argument(
        "--port", type=int, default=0, metavar="N", help="default: any that is free"
    )
    explore.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but this machine's own shows the runs to other machines "
        "(default: %(default)s)",
    )
    explore.add_argument(
        "--no-browser", action="store_true", help="print the address, and open nothing"
    )
    add_remote_code(explore)


def add_export(commands: Any) -> None:
    """``polyseme export``."""
    text = "Write the explorer's pages as static files, to put on any web host."
    export = commands.add_parser("export", help=text, description=text)
    export.set_defaults(run=_export)
    export.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder or URL of a run; several compare"
    )
    export.add_argument("out", metavar="OUT", help="folder to make, or a URL")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--quiet", action="store_true", help="no progress")


def add_verify(commands: Any) -> None:
    """``polyseme verify``."""
    text = "Check that every file of a run is as it was written, byte for byte, and valid."
    verify = commands.add_parser("verify", help=text, description=text)
    verify.set_defaults(run=_verify)
    verify.add_argument("path", metavar="RUN", help="folder or URL of a run")


def _verify(options: argparse.Namespace) -> None:
    from polyseme.store import RunFolder, local_run, refuse_altered

    folder = local_run(options.path, again=True)
    # First: a run whose files were altered may not even open.
    refuse_altered(folder)
    RunFolder(folder).load_all()
    print(f"{options.path} is as it was written.")


def _export(options: argparse.Namespace) -> None:
    from polyseme.explorer import export

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        out = export(
            options.runs, options.out, overwrite=options.overwrite, progress=not options.quiet
        )
    if isinstance(out, Path):
        print(_about_export(out))
    else:
        print(f"The pages are at {out}.")
    if caught:
        # A script that puts them on the web must not take them for all there is.
        raise RunError(" ".join(str(warning.message) for warning in caught))


def _about_export(out: Path) -> str:
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return (
        f"The pages are in {out}: {len(files):,} files, {size / 1e6:,.1f} MB. Put them on any web "
        f"host, or look at them here: python -m http.server --bind 127.0.0.1 --directory {out}"
    )


def _explore(options: argparse.Namespace) -> None:
    from polyseme.explorer import explore

    if any(map(is_url, options.runs)):
        from polyseme.store import local_run

        options.runs = [str(local_run(run)) for run in options.runs]
    live = _live_functions(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        explorer = explore(
            *options.runs,
            port=options.port,
            host=options.host,
            open_browser=not options.no_browser,
            probe=live.get("probe"),
            classify=live.get("classify"),
            importances=live.get("importances"),
        )
    for warning in caught:
        print(f"polyseme: {warning.message}", file=sys.stderr)
    print(f"The explorer is at {explorer.url} until you press Ctrl-C.", flush=True)
    explorer.wait()


def _live_functions(options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """What needs the model, which is loaded when a page first asks for it."""
    kind, recorded = _about(Path(options.runs[0]))
    if kind != "text":
        if options.sae:
            raise InputError(
                f"--sae is given, but {options.runs[0]} is not a run of texts; leave it out."
            )
        return {"classify": _Loaded(lambda: _classify(options.model))} if options.model else {}
    # A stranger's run is not believed: what it names is loaded if it comes as a package.
    options.model = options.model or (recorded if recorded in PACKAGED else None)
    if options.model is None:
        if options.sae:
            raise InputError("--sae is for --model; give the model that was analysed too.")
        return {}
    model = _Once(lambda: load_named_model(options))
    saes: dict[str, Any] = {}
    if options.sae:
        opening = module("polyseme.opening", "Loading an SAE")
        saes = saes_of_run(opening.open_run(options.runs[0]), options.sae)
    return {
        "probe": _Loaded(lambda: _live("live", "Probing a run").live_probe(*model(), saes=saes)),
        "importances": _Loaded(
            lambda: _live("importances", "Finding importances").live_importances(
                *model(), saes=saes
            )
        ),
    }


def _about(folder: Path) -> tuple[Any, Any]:
    """Kind of a run's data, and the name of its model; None where it is no run.

    That is told by the reader of runs, but it takes longer to load than the server to start.
    """
    file = folder / "run.json"
    if not file.is_file():  # a pipe would block for ever
        return None, None
    try:
        with file.open("rb") as opened:
            metadata = json.loads(opened.read(_LONGEST_RUN_JSON))
        return metadata["data"].get("kind"), metadata["model"].get("name")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None


class _Once:
    """What is made when it is first asked for, by whichever thread."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock = functools.cache(make), threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            return self._make()


class _Loaded:
    """A function that is made when it is first called."""

    def __init__(self, make: Callable[[], Callable[..., Any]]) -> None:
        self._function = _Once(make)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._function()(*arguments, **named)


def _live(name: str, what: str) -> Any:
    return module(f"polyseme.analysis.{name}", what)


def _classify(model: str) -> Callable[..., Any]:
    made: Callable[..., Any] = _live("live", "Classifying an image").live_classify(
        load_model(model)
    )
    return made
