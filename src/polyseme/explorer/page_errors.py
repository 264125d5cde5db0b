"""Error messages for pages."""

from __future__ import annotations

import re

# All but the last part of an absolute path: POSIX, Windows or a file URL, but no other URL.
_FOLDERS = re.compile(
    r"(?<![\w.~</\\-])(?!(?<=:)//\w)"
    r"(?:[A-Za-z]:[\\/]+|\\\\+|/+)(?=[\w.~@%+-])(?:[^\\/:,;'\"\n]+[\\/]+)*"
)


class NoSuchFileError(KeyError):
    """No file has the requested path."""


def page_message(error: Exception | str) -> str:
    """The message of an error, with file names instead of paths: pages must not reveal folders.

    Parameters
    ----------
    error : Exception or str
        If the error has a ``problem``, apart from the folder, that is used.
    """
    return _FOLDERS.sub("", str(getattr(error, "problem", error)))
