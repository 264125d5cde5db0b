"""The exceptions that polyseme raises on bad input.

Every message is one sentence, or two: what was wrong, the value that was given, what is
expected, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolysemeError(Exception):
    """Base of every exception that polyseme raises on purpose."""


class InputError(PolysemeError, ValueError):
    """An argument, an array or a file that polyseme cannot work with."""


class SiteError(InputError):
    """A site that the model does not have, or that polyseme cannot read."""


class RunError(PolysemeError):
    """A run folder that is missing, in the way, damaged or of another version."""


class MissingDependencyError(PolysemeError, ImportError):
    """An optional library that is needed here and is not installed."""

    def __init__(self, what: str, library: str, extra: str) -> None:
        super().__init__(
            f"{what} needs {library}, which is not installed. "
            f"Install it with: pip install 'polyseme[{extra}]'"
        )


def one_of(kind: str, value: str, allowed: Iterable[str], *, limit: int = 12) -> str:
    """Sentence for a name that is not among the allowed ones: near matches, then all of them."""
    names = list(allowed)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    shown = ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
    return f"Unknown {kind}: {value!r}.{hint} Must be one of: {shown or '(there are none)'}."
