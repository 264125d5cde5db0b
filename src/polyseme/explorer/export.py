"""The explorer as static files."""

from __future__ import annotations


def export(*a, **k): ...
