"""The exceptions that polyseme raises on bad input.

Every message is one or two sentences: what was wrong, the value given, what is expected, and the
remedy.
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
    """A run folder that is missing, already exists, is damaged or has another version."""


class MissingDependencyError(PolysemeError, ImportError):
    """An optional library that is required here and not installed."""

    def __init__(self, what: str, library: str, extra: str) -> None:
        super().__init__(
            f"{what} needs {library}, which is not installed. "
            f"Install it with: pip install 'polyseme[{extra}]'"
        )


def one_of(kind: str, value: str, allowed: Iterable[str], *, limit: int = 12) -> str:
    """Message for an unknown name: close matches, then the allowed names."""
    names = list(allowed)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    shown = ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
    return f"Unknown {kind}: {value!r}.{hint} Must be one of: {shown or '(there are none)'}."
