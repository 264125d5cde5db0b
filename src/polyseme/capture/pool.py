"""Rows that examples point at, kept once however many neurons share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Pool:
    """Rows by key, with those that nothing points at any more dropped from time to time.

    A key is added once: inputs come one time each.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, dtype=np.int64)
        self._parts: list[Array] = []
        self._n_live = 0

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, keys: Array, rows: Array) -> None:
        """Rows under new keys: (m,) of int64 and (m, ...)."""
        if len(keys):
            self._keys = np.concatenate([self._keys, keys])
            self._parts.append(np.ascontiguousarray(rows))

    @property
    def is_bloated(self) -> bool:
        """Whether it may hold twice what was live when last asked, so that sorting out pays."""
        return len(self._keys) > 2 * self._n_live + 256

    def keep(self, live: Array) -> None:
        """Drop every row whose key is not among the live ones."""
        ordered = np.sort(live)
        place = np.searchsorted(ordered, self._keys).clip(max=max(0, len(ordered) - 1))
        kept = ordered[place] == self._keys if len(ordered) else np.zeros(len(self), bool)
        rows = self._rows()
        self._parts = [rows[kept]] if rows is not None else []
        self._keys = self._keys[kept]
        self._n_live = len(self._keys)

    def _rows(self) -> Array | None:
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0] if self._parts else None

    def sorted(self) -> tuple[Array, Array | None]:
        """Keys in ascending order and their rows; no rows at all where there never were any."""
        order = np.argsort(self._keys, kind="stable")
        rows = self._rows()
        return self._keys[order], None if rows is None else rows[order]

    def state(self) -> dict[str, Array]:
        """Everything, to go on later from here."""
        rows = self._rows()
        return {"keys": self._keys} if rows is None else {"keys": self._keys, "rows": rows}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state`."""
        self._keys = np.array(state["keys"])
        self._parts = [np.array(state["rows"])] if "rows" in state else []
        self._n_live = len(self._keys)
