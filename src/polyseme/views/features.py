"""The features of a neuron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

_PRINTED = 20


@dataclass(frozen=True)
class Feature:
    """One behaviour of a neuron: a feature cluster.

    Attributes
    ----------
    number : int
        0 is the largest.
    examples : pandas.DataFrame
        Its rows of `Neuron.examples`.
    medoid : int
        Number of the example nearest, on average, to the others.
    centre : ndarray, shape (d_in,)
        Direction of the mean of its unit embeddings.
    """

    number: int
    examples: pd.DataFrame
    medoid: int
    centre: Floats

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def mean_activation(self) -> float:
        """Mean activation of its examples."""
        return float(self.examples["activation"].mean())

    def label_counts(self) -> dict[Any, int]:
        """Number of examples of each class, most frequent first; empty without labels."""
        return label_counts(self.examples)

    def __repr__(self) -> str:
        labels = counted(self.label_counts())
        many = f"{self.n_examples} example{'s' * (self.n_examples > 1)}"
        return f"Feature({self.number}: {many}{'; ' * bool(labels)}{labels})"


def label_counts(examples: pd.DataFrame) -> dict[Any, int]:
    """Number of examples of each class, most frequent first; empty without labels."""
    if "label" not in examples:
        return {}
    return {k: int(v) for k, v in examples["label"].value_counts().items()}


def class_name(label: Any) -> str:
    """The display name of a class: "class 0" for a number, which alone would be unclear."""
    name = str(label)
    return f"class {name}" if name.isdigit() else name


def counted(counts: Mapping[Any, int], most: int = 4) -> str:
    """Counts in words: "class 0 ×8, class 6 ×3"."""
    return ", ".join(f"{class_name(label)} ×{n}" for label, n in list(counts.items())[:most])


class Features(list[Feature]):
    """A neuron's features, largest first. Prints one per line."""

    def __repr__(self) -> str:
        lines = [repr(feature) for feature in self[:_PRINTED]]
        if len(self) > _PRINTED:
            lines.append(f"… {len(self) - _PRINTED} more")
        return "[" + ",\n ".join(lines) + "]"
