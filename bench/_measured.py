"""Shared by the benchmarks of language models: batches, a random model, a process's peak memory."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import nn

from polyseme.capture import Batch
from polyseme.data import Contexts, TokenBatch, read_text
from polyseme.sites.language import load_language_model

LENGTH = 128


def as_batch(batch: TokenBatch) -> Batch:
    inputs = {"input_ids": batch.ids, "attention_mask": batch.attention.astype(np.int64)}
    return Batch(inputs, batch.ids.astype(np.int32), mask=batch.mask)


def model_and_batches(name: str, size: int, device: str) -> tuple[nn.Module, Iterator[Batch]]:
    """A model, and an endless iterator of batches of 128-token contexts for it.

    Parameters
    ----------
    name : str
        As for `load_language_model`; the text is Python's manual and then the sources of its
        library, about 10,000 contexts before any repeats. Or "random": the size of GPT2-small,
        with random weights, on random tokens.
    """
    if name == "random":
        import transformers

        torch.manual_seed(0)
        config = transformers.GPT2Config()
        return transformers.GPT2LMHeadModel(config).to(device).eval(), _random(config, size)
    model, tokenizer = load_language_model(name, device=device)
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [*topics.values(), *(file.read_text("utf-8", "replace") for file in library)]
    contexts = Contexts(read_text(texts), tokenizer, length=LENGTH)

    def again() -> Iterator[Batch]:
        while True:
            # The last batch may be smaller.
            yield from (
                as_batch(batch) for batch in contexts.batches(size) if len(batch.ids) == size
            )

    return model, again()


def _random(config: Any, size: int) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    while True:
        ids = rng.integers(0, config.vocab_size, (size, LENGTH))
        mask = np.ones(ids.shape, bool)
        mask[:, 0] = False
        yield as_batch(TokenBatch(ids, np.ones(ids.shape, bool), mask))


def forget_peak() -> int:
    """Reset this process's peak memory (Linux); returns its current memory, in bytes."""
    gc.collect()
    # Return free memory to the system, or it would hide later allocations.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Peak memory of this process since `forget_peak`, in bytes."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def in_a_process_of_its_own(script: str, *arguments: str) -> dict[str, Any]:
    """Run a script with these arguments; returns the JSON object that it prints last."""
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
