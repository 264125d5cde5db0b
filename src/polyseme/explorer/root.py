"""Everything that a browser can ask for, by path: what the server sends, and an export writes."""

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
# A server says more, and in a header; for files on any web host the page itself can.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


class WebRoot:
    """The front end and the data of one run or several, as files in a tree.

    Parameters
    ----------
    open_runs : callable
        Gives the runs; called once, when they are first needed, so that the front end can be
        served meanwhile.
    live : collection of str, optional
        The live functions that a server has: some of ``probe``, ``classify``, ``importances``.
        An export has no server, and its page says nothing of them.
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
        """The runs, opened if they are not yet.

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

        A path is looked up among those of `paths`; it is never joined to a folder, so that
        there is nothing to climb out of.

        Raises
        ------
        NoSuchFileError
            There is no such file.
        RunError
            What it is made from is damaged.
        """
        if path == "index.html":
            return self._index()
        if path in self._front:
            return self._front[path]
        if not path.startswith("data/"):  # told without a run, which may yet have to be opened
            raise NoSuchFileError(path)
        if path == "data/runs.json":
            return compact_json({"runs": [run.summary() for run in self.runs]}).encode()
        if len(self.runs) > 1 and path in ("data/compare.json", "data/pairs.safetensors"):
            return self._compared(path)
        for number, run in enumerate(self.runs):
            prefix = f"data/{number}/"
            if path.startswith(prefix):
                return run.file(path.removeprefix(prefix))
        raise NoSuchFileError(path)

    @staticmethod
    def changes(path: str) -> bool:
        """Whether a file may have other contents the next time it is asked for."""
        return path.endswith("/verified.json")

    def _compared(self, path: str) -> bytes:
        # Here, not above: what it needs takes longer to load than a server to start.
        from polyseme.explorer.comparison import best_matches, comparison
        from polyseme.explorer.tensors import encode

        if path == "data/compare.json":
            runs = [run.run for run in self.runs]
            titles = [run.title for run in self.runs]
            return compact_json(comparison(runs, titles)).encode()
        return encode(*best_matches(self.runs[0].folder, self.runs[1].folder))

    @cached_property
    def _front(self) -> dict[str, bytes]:
        """The files of the front end, by path: the page itself, and what it loads."""
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
