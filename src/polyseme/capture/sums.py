"""Sums that do not depend on the order of their terms."""

from __future__ import annotations

from typing import Any


class Sum:
    """A sum of float64 arrays or tensors that also tracks its rounding error.

    Parts of the data may be summed in any order and grouping: totals are equal except for about one
    rounding in 2⁵⁰, whereas the last digits of plain sums would differ in nearly every value.

    Parameters
    ----------
    zeros : ndarray or Tensor of float64
        Zeros in the shape of the terms.

    References
    ----------
    T. Ogita, S. Rump and S. Oishi, *Accurate sum and dot product* (2005), Sum2.
    """

    def __init__(self, zeros: Any) -> None:
        self._high, self._low = zeros, zeros * 0

    @property
    def total(self) -> Any:
        """The sum so far."""
        return self._high + self._low

    def add(self, term: Any) -> None:
        """Add one term."""
        total = self._high + term
        rounded = total - self._high
        self._low += (self._high - (total - rounded)) + (term - rounded)
        self._high = total

    def merge(self, high: Any, low: Any) -> None:
        """Add the `parts` of another sum."""
        self.add(high)
        self._low += low

    @property
    def parts(self) -> tuple[Any, Any]:
        """Two arrays whose sum is the total, for restoring or merging."""
        return self._high, self._low

    @parts.setter
    def parts(self, parts: tuple[Any, Any]) -> None:
        self._high, self._low = parts
