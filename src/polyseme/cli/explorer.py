"""The explorer on the command line."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any


def add_explore(commands: Any) -> None:
    """``polyseme explore``."""
    text = "Look at runs in the browser: every neuron, split into its meanings."
    explore = commands.add_parser("explore", help=text, description=text)
    explore.set_defaults(run=_explore)
    explore.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several compare")
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


def add_export(commands: Any) -> None:
    """``polyseme export``."""
    text = "Write the explorer's pages as static files, to put on any web host."
    export = commands.add_parser("export", help=text, description=text)
    export.set_defaults(run=_export)
    export.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run; several compare")
    export.add_argument("out", metavar="OUT", help="folder to make")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument("--quiet", action="store_true", help="no progress")


def _export(options: argparse.Namespace) -> None:
    from polyseme.explorer import export

    out = export(options.runs, options.out, overwrite=options.overwrite, progress=not options.quiet)
    files = [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(
        f"The pages are in {out}: {len(files):,} files, {size / 1e6:,.1f} MB. Put them on any web "
        f"host, or look at them here: python -m http.server --bind 127.0.0.1 --directory {out}"
    )


def _explore(options: argparse.Namespace) -> None:
    from polyseme.explorer import explore

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        explorer = explore(
            *options.runs,
            port=options.port,
            host=options.host,
            open_browser=not options.no_browser,
        )
    for warning in caught:
        print(f"polyseme: {warning.message}", file=sys.stderr)
    print(f"The explorer is at {explorer.url} until you press Ctrl-C.", flush=True)
    explorer.wait()
