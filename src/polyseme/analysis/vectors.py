"""Vectors at a hook point of a language model, to train an SAE on."""

from __future__ import annotations

from contextlib import ExitStack
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from polyseme.analysis.progress import progress_bars
from polyseme.data.contexts import Contexts
from polyseme.errors import InputError
from polyseme.sites.hookpoints import HookPoint, find_hook_point
from polyseme.sites.saes import vectors_at


def token_vectors(
    model: nn.Module,
    contexts: Contexts,
    hook: str | HookPoint,
    *,
    file: IO[bytes] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Tensor:
    """Vectors at a hook point, one for each token that counts.

    Parameters
    ----------
    model : torch.nn.Module
        A Transformers language model.
    contexts : Contexts
        Padding never counts, nor do the tokens that the contexts exclude: by default, special
        tokens and the first position of each context.
    hook : str or HookPoint
        See `polyseme.sites.hookpoints.find_hook_point`.
    file : binary file, optional
        Holds the vectors, memory-mapped, instead of memory: an empty file, open for reading and
        writing, which must stay open while the tensor is used. A ``tempfile.TemporaryFile`` leaves
        nothing behind, even after a crash.
    batch_size : int
        Contexts per forward pass.
    progress : bool
        Whether to show progress on the terminal.

    Returns
    -------
    Tensor of float32, shape (n, width)

    Raises
    ------
    SiteError
        The model has no such hook point.
    InputError
        No token counts.
    """
    point = find_hook_point(model, hook) if isinstance(hook, str) else hook
    tokens = contexts.max_tokens
    total = None if tokens is None else -(-tokens // (contexts.length - 1))
    parts: list[Tensor] = []
    n = 0
    with ExitStack() as stack:
        bars = stack.enter_context(progress_bars(progress))
        task = bars.add_task(f"Reading {point.name}", total=total)
        for rows in vectors_at(model, point, contexts.batches(batch_size)):
            if file is None:
                parts.append(rows)
            else:
                file.write(rows.contiguous().numpy().tobytes())
            n += len(rows)
            bars.update(task, advance=batch_size)
    if not n:
        raise InputError(
            f"No token of {contexts.name} counts: all are special, or first in their context; give "
            "a longer text, or contexts that exclude fewer tokens."
        )
    if file is None:
        return torch.cat(parts)
    file.flush()
    # Mapped as writable, since torch warns about read-only arrays.
    return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(n, point.width)))
