"""The commands of the explorer: explore, export, verify."""

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
from polyseme.cli.options import add_options, values_of
from polyseme.errors import InputError, RunError
from polyseme.remote import is_url

#: the keys of `polyseme.sites.language.PACKAGED`, repeated here to avoid importing torch
PACKAGED = ("smollm2", "minilm")
_EXPORT = "overwrite progress"
_LONGEST_RUN_JSON = 64 * 2**20


def add_explore(explore: Any) -> None:
    """Add the arguments of ``polyseme explore``."""
    explore.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder or URL of a run; give several to compare them",
    )
    explore.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that was analysed, to probe texts, compute token importances or classify "
        "images: a name or folder as for polyseme analyse, or MODULE:NAME or FILE.py:NAME, whose "
        "code is run (default: the run's own model, if that is smollm2 or minilm)",
    )
    add_saes(explore)
    explore.add_argument("--device", default=None, help="device for the model: cpu, cuda, mps")
    explore.add_argument(
        "--port",
        type=int,
        default=0,
        metavar="N",
        help="port to listen on (default: any free port)",
    )
    explore.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; anything but a loopback address exposes the runs to other "
        "machines (default: %(default)s)",
    )
    explore.add_argument(
        "--no-browser", action="store_true", help="print the address without opening a browser"
    )
    add_remote_code(explore)


def add_export(export: Any) -> None:
    """Add the arguments of ``polyseme export``."""
    from polyseme import explorer

    export.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder or URL of a run; give several to compare them",
    )
    export.add_argument("out", metavar="OUT", help="folder to create, or a URL")
    add_options(export, explorer.export, _EXPORT)


def add_verify(verify: Any) -> None:
    """Add the arguments of ``polyseme verify``."""
    verify.add_argument("path", metavar="RUN", help="folder or URL of a run")


def verify(options: argparse.Namespace) -> None:
    """Check that every file of a run is valid and unchanged since it was written."""
    from polyseme.store import RunFolder, local_run, refuse_altered

    folder = local_run(options.path, again=True)
    # First: a run with altered files may not even open.
    refuse_altered(folder)
    RunFolder(folder).load_all()
    print(f"{options.path} is intact.")


def export(options: argparse.Namespace) -> None:
    """Write the explorer's pages as static files, for any web host."""
    from polyseme import explorer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        out = explorer.export(options.runs, options.out, **values_of(options, _EXPORT))
    if isinstance(out, Path):
        print(_about_export(out))
    else:
        print(f"The pages are at {out}.")
    if caught:
        # A script that publishes the pages must not mistake them for complete.
        raise RunError(" ".join(str(warning.message) for warning in caught))


def _about_export(out: Path) -> str:
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    return (
        f"The pages are in {out}: {len(files):,} files, {size / 1e6:,.1f} MB. Copy them to any web "
        f"host, or view them here: python -m http.server --bind 127.0.0.1 --directory {out}"
    )


def explore(options: argparse.Namespace) -> None:
    """View runs in the browser: every neuron, split into its meanings."""
    from polyseme import explorer

    if any(map(is_url, options.runs)):
        from polyseme.store import local_run

        options.runs = [str(local_run(run)) for run in options.runs]
    live = _live_functions(options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        server = explorer.explore(
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
    print(f"The explorer is at {server.url} until you press Ctrl-C.", flush=True)
    server.wait()


def _live_functions(options: argparse.Namespace) -> dict[str, Callable[..., Any]]:
    """The functions that need the model, which is loaded on first use."""
    kind, recorded = _about(Path(options.runs[0]))
    if kind != "text":
        if options.sae:
            raise InputError(
                f"--sae is given, but {options.runs[0]} is not a run on texts; leave it out."
            )
        return {"classify": _Loaded(lambda: _classify(options.model))} if options.model else {}
    # A run may come from a stranger: load the model that it names only if it is a package.
    options.model = options.model or (recorded if recorded in PACKAGED else None)
    if options.model is None:
        if options.sae:
            raise InputError("--sae requires --model; give the model that was analysed.")
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
    """The kind of a run's data and the name of its model; None if this is not a run.

    `open_run` would tell, but takes longer to import than the server takes to start.
    """
    file = folder / "run.json"
    if not file.is_file():  # opening a pipe would block forever
        return None, None
    try:
        with file.open("rb") as opened:
            metadata = json.loads(opened.read(_LONGEST_RUN_JSON))
        return metadata["data"].get("kind"), metadata["model"].get("name")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None, None


class _Once:
    """A value that is created on first use, by whichever thread asks first."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._lock = functools.cache(make), threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            return self._make()


class _Loaded:
    """A function that is created on its first call."""

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
