"""All files of the explorer by path: those that the server sends and an export writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from polyseme.explorer.page_errors import NoSuchFileError
from polyseme.explorer.strict_json import compact_json

if TYPE_CHECKING:
    from polyseme.explorer.runfiles import RunFiles

STATIC = Path(__file__).parent / "static"
"""The front end: plain files, served as they are."""

_HEAD = b'<meta charset="utf-8">'
# The server sends a longer policy in a header; in an export, the page itself has this one.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


class WebRoot:
    """The front end and the data of one or more runs, as a tree of files.

    Parameters
    ----------
    open_runs : callable
        Returns the runs; called once, on first use, so that the front end can be served
        meanwhile.
    live : collection of str, optional
        The server's live functions: some of ``probe``, ``classify``, ``importances``. None for
        an export, which has no server.
    """

    def __init__(
        self, open_runs: Callable[[], list[RunFiles]], live: Collection[str] | None = None
    ) -> None:
        self._open_runs = open_runs
        self._live = live
        self._lock = threading.Lock()
        self._runs: list[RunFiles] | None = None

    @property
    def runs(self) -> list[RunFiles]:
        """The runs, opened on first use.

        Raises
        ------
        PolysemeError
            They cannot be opened.
        """
        with self._lock:
            if self._runs is None:
                self._runs = self._open_runs()
            return self._runs

    def paths(self) -> Iterator[str]:
        """The path of every file, front end first."""
        yield from self._front
        yield "data/runs.json"
        if len(self.runs) > 1:
            yield from ("data/compare.json", "data/pairs.safetensors")
        for number, run in enumerate(self.runs):
            for path in run.paths():
                yield f"data/{number}/{path}"

    def file(self, path: str) -> bytes:
        """The contents of a file.

        Paths are looked up among those of `paths` and never joined to a folder, so they cannot
        escape it.

        Raises
        ------
        NoSuchFileError
            There is no such file.
        RunError
            Its source is damaged.
        """
        if path == "index.html":
            return self._index()
        if path in self._front:
            return self._front[path]
        if not path.startswith("data/"):  # known without opening the runs
            raise NoSuchFileError(path)
        if path == "data/runs.json":
            # Imported here because pandas takes longer to load than the server takes to start.
            from polyseme.views.measures import COLUMNS

            runs = [run.summary() for run in self.runs]
            return compact_json({"runs": runs, "columns": COLUMNS}).encode()
        if len(self.runs) > 1 and path in ("data/compare.json", "data/pairs.safetensors"):
            return self._compared(path)
        for number, run in enumerate(self.runs):
            prefix = f"data/{number}/"
            if path.startswith(prefix):
                return run.file(path.removeprefix(prefix))
        raise NoSuchFileError(path)

    @staticmethod
    def changes(path: str) -> bool:
        """Whether the contents of a file may change between requests."""
        return path.endswith("/verified.json")

    def _compared(self, path: str) -> bytes:
        # Imported here because these take longer to load than the server takes to start.
        from polyseme.explorer.comparison import best_matches, comparison
        from polyseme.explorer.tensors import encode

        if path == "data/compare.json":
            runs = [run.run for run in self.runs]
            titles = [run.title for run in self.runs]
            return compact_json(comparison(runs, titles)).encode()
        return encode(*best_matches(self.runs[0].folder, self.runs[1].folder))

    @cached_property
    def _front(self) -> dict[str, bytes]:
        """The files of the front end by path: the page itself and what it loads."""
        files = {"index.html": (STATIC / "index.html").read_bytes()}
        for file in sorted(STATIC.rglob("*")):
            name = file.relative_to(STATIC).as_posix()
            if file.is_file() and name != "index.html":
                files[f"static/{name}"] = file.read_bytes()
        return files

    def _index(self) -> bytes:
        page = self._front["index.html"]
        if self._live is None:
            mark = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        else:
            mark = f'<meta name="polyseme-live" content="{" ".join(sorted(self._live))}">'
        return page.replace(_HEAD, _HEAD + b"\n" + mark.encode(), 1)
