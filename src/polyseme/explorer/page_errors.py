"""What a page is told of an error."""

from __future__ import annotations

import re

# Of an absolute path all but the last part: POSIX, Windows, or a file's URL, but no other URL.
_FOLDERS = re.compile(
    r"(?<![\w.~</\\-])(?!(?<=:)//\w)"
    r"(?:[A-Za-z]:[\\/]+|\\\\+|/+)(?=[\w.~@%+-])(?:[^\\/:,;'\"\n]+[\\/]+)*"
)


class NoSuchFileError(KeyError):
    """No file has the path that was asked for."""


def page_message(error: Exception | str) -> str:
    """The sentence of an error, with names of files alone: where they lie is no page's business.

    Parameters
    ----------
    error : Exception or str
        Of one that knows its problem apart from the folder, the problem.
    """
    return _FOLDERS.sub("", str(getattr(error, "problem", error)))
