"""Batches of activations of equal size, in an order that is resumable at any step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyseme.errors import InputError

_SAMPLED_ROWS = 1024


class RowBatches:
    """Rows of an array, reshuffled in each epoch; no row is dropped.

    The order depends only on the seed and the epoch number, so training can resume at any step. A
    batch may hold the end of one epoch and the beginning of the next.

    Parameters
    ----------
    rows : Tensor or array, shape (n, d)
        Stays on its device or on disk; one batch at a time is copied.
    batch_size : int
    seed : int
    """

    def __init__(self, rows: Any, batch_size: int, seed: int) -> None:
        if len(rows.shape) != 2 or not rows.shape[1]:
            raise InputError(
                f"activations has shape {tuple(rows.shape)}; expected (rows, d_in). Flatten the "
                "positions of sequences or images into rows."
            )
        if rows.shape[0] < batch_size:
            raise InputError(_too_few(rows.shape[0], batch_size))
        self._rows = rows.detach() if isinstance(rows, Tensor) else rows
        self._size = batch_size
        self.d_in = int(rows.shape[1])
        self.n_rows = int(rows.shape[0])
        self.device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        _as_float32(self._take(torch.arange(0)), "activations")  # refuses non-numeric values

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            return torch.randperm(self.n_rows, generator=generator)

        self._order = order

    def fingerprint(self) -> dict[str, Any]:
        """Shape, dtype, and a digest of evenly spaced rows."""
        places = np.linspace(0, self.n_rows - 1, min(_SAMPLED_ROWS, self.n_rows)).astype(np.int64)
        return {
            "shape": [self.n_rows, self.d_in],
            "dtype": str(self._rows.dtype).removeprefix("torch."),
            "digest": digest(_as_float32(self._take(torch.from_numpy(places)), "activations")),
        }

    def from_step(self, step: int, expected: str | None = None) -> Iterator[Tensor]:
        """Iterate endlessly over the batches from a step on, counted from 0."""
        while True:
            places = self._places(step)
            batch = _as_float32(self._take(places), "activations")
            refuse_non_finite(
                batch, step, lambda row, places=places: f"row {int(places[row])} of the array"
            )
            yield batch
            step += 1

    def _places(self, step: int) -> Tensor:
        start, end = step * self._size, (step + 1) * self._size
        parts = []
        while start < end:
            epoch, offset = divmod(start, self.n_rows)
            part = self._order(epoch)[offset : offset + end - start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def _take(self, places: Tensor) -> Any:
        if isinstance(self._rows, Tensor):
            return self._rows[places.to(self._rows.device)]
        return self._rows[places.numpy()]


class StreamBatches:
    """Batches of any size from an iterable, recut to equal size, in order.

    At its end, an iterable that can be restarted (a list, a ``DataLoader``) is restarted; an
    iterator that ends before training does raises an error. No row is dropped: a remainder starts
    the next batch.

    Parameters
    ----------
    batches : iterable of Tensor or array, shape (B, d)
    batch_size : int
    """

    def __init__(self, batches: Iterable[Any], batch_size: int) -> None:
        self._batches = batches
        self._size = batch_size
        self._passes = iter(batches)
        self._once = self._passes is batches
        self._number = 0
        self._rows_in_pass = 0
        self.d_in = 0
        first = self._next_rows(0)
        self._waiting = [first]
        self.d_in = int(first.shape[1])
        self.device = first.device

    def fingerprint(self) -> dict[str, Any]:
        """What is known before reading the batches; the rest is checked as they are read."""
        return {"d_in": self.d_in}

    def from_step(self, step: int, expected: str | None = None) -> Iterator[Tensor]:
        """Iterate over the batches from a step on, counted from 0; earlier ones are discarded.

        Parameters
        ----------
        step : int
        expected : str, optional
            Digest of the batch before that step; a mismatch means different activations.
        """
        for now in range(step):
            batch = self._batch(now)
            if now == step - 1 and expected is not None and digest(batch) != expected:
                raise InputError(
                    f"The activations of step {step} are not those that the unfinished training "
                    f"saw there. To resume it, give the same batches in the same order, starting "
                    f"from the first."
                )
        while True:
            batch = self._batch(step)
            refuse_non_finite(batch, step, lambda row: f"row {row} of the batch")
            yield batch
            step += 1

    def _batch(self, step: int) -> Tensor:
        while sum(len(rows) for rows in self._waiting) < self._size:
            self._waiting.append(self._next_rows(step))
        rows = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting = [rows[self._size :]]
        return rows[: self._size]

    def _next_rows(self, step: int) -> Tensor:
        while True:
            try:
                batch = next(self._passes)
            except StopIteration:
                self._start_again(step)
                continue
            self._number += 1
            rows = self._check(batch)
            if len(rows):
                self._rows_in_pass += len(rows)
                return rows

    def _start_again(self, step: int) -> None:
        if not self._rows_in_pass:
            raise InputError(
                "activations is an iterable that yields no rows. Give batches of shape (B, d_in)."
            )
        if self._once:
            raise InputError(
                f"activations is an iterator that ended after {step} whole batches, before "
                f"training did. Give fewer steps, or an iterable that can be restarted, such as a "
                f"list."
            )
        if self._rows_in_pass < self._size:
            raise InputError(_too_few(self._rows_in_pass, self._size))
        self._passes, self._rows_in_pass = iter(self._batches), 0

    def _check(self, batch: Any) -> Tensor:
        what = f"Batch {self._number} of activations"
        if not isinstance(batch, Tensor | np.ndarray):
            raise InputError(
                f"{what} is a {type(batch).__name__}; a tensor or an array of shape (B, d_in) is "
                "expected."
            )
        if batch.ndim != 2 or not batch.shape[1]:
            raise InputError(f"{what} has shape {tuple(batch.shape)}; (B, d_in) is expected.")
        if self.d_in and batch.shape[1] != self.d_in:
            raise InputError(
                f"{what} has rows of {batch.shape[1]} values, but earlier batches have "
                f"{self.d_in}; all must be from one site."
            )
        # A copy, as the caller may reuse the memory for the next batch.
        return _as_float32(batch.detach().clone() if isinstance(batch, Tensor) else batch, what)


Batches = RowBatches | StreamBatches


def batches_of(activations: Any, batch_size: int, seed: int) -> Batches:
    """Make batches from an array or an iterable of batches.

    Raises
    ------
    InputError
        It is neither, is not two-dimensional, or has too few rows.
    """
    if isinstance(activations, Tensor | np.ndarray):
        return RowBatches(activations, batch_size, seed)
    if isinstance(activations, Iterable) and not isinstance(activations, str | bytes | dict):
        return StreamBatches(activations, batch_size)
    raise InputError(
        f"activations is a {type(activations).__name__}; expected a tensor or an array of shape "
        f"(rows, d_in), or an iterable of such batches."
    )


def digest(rows: Tensor) -> str:
    """Digest of the values of a tensor."""
    values = rows.detach().cpu().contiguous().numpy()
    return hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


def refuse_non_finite(batch: Tensor, step: int, where: Any) -> None:
    """Refuse a batch that holds NaN or infinity.

    Raises
    ------
    InputError
        Names the step, counted from 1, and the position of the value.
    """
    good = torch.isfinite(batch)
    if bool(good.all()):
        return
    row, column = (int(index) for index in (~good).nonzero()[0])
    raise InputError(
        f"activations holds {batch[row, column].item()} at step {step + 1} ({where(row)}, column "
        f"{column}), so training stopped before that step. Leave out such rows, or find where they "
        f"come from."
    )


def _as_float32(values: Any, what: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.is_complex() or values.dtype == torch.bool:
            raise InputError(f"{what} holds {values.dtype} values; real numbers are expected.")
        return values.to(torch.float32)
    if values.dtype.kind not in "fiu":
        raise InputError(f"{what} holds {values.dtype} values; real numbers are expected.")
    with np.errstate(over="ignore"):  # values that become infinite are refused on use
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _too_few(n_rows: int, batch_size: int) -> str:
    return (
        f"activations has {n_rows} rows, fewer than batch_size {batch_size}. Give more rows, or a "
        "smaller batch_size."
    )
