"""What the page of a neuron is told of its meanings, beyond which examples each has."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyseme.errors import InputError
from polyseme.explorer.page_errors import page_message
from polyseme.explorer.strict_json import finite
from polyseme.views import Run

# Cosines between all of a neuron's examples have to fit in memory; those of some hundred draws
# of as many, for stability and verdict, take the cube of that in time.
_MOST_EXAMPLES = 3_000
_MOST_DRAWN = 300


def neuron_meanings(run: Run, site: str, neuron: int) -> dict[str, Any]:
    """Meanings of one neuron, for JSON.

    Parameters
    ----------
    run : Run
    site : str
    neuron : int

    Returns
    -------
    dict
        ``meanings``: a list of dicts with ``number``, ``n_examples``, ``share``, ``medoid`` and
        ``examples`` (numbers of examples), ``label`` and ``features`` (how many of its examples
        each of the run's features has); ``separation``, ``stability`` and ``verdict``, which are
        None where they are unknown. What cannot be told is left out, and ``problem`` says why.

    Raises
    ------
    RunError
        The run is damaged.
    """
    try:
        return _described(run, site, neuron)
    except InputError as error:
        return {"meanings": [], "problem": page_message(error)}
    except (ArithmeticError, IndexError, KeyError, ValueError):
        # The format has no rules for these arrays that would rule out every contradiction.
        return {"meanings": [], "problem": "What the run holds of its meanings contradicts itself."}


def _described(run: Run, site: str, neuron: int) -> dict[str, Any]:
    found = run.neuron(site, neuron)
    n = int(found.row["n_examples"])
    if not n:
        return {"meanings": []}
    if n > _MOST_EXAMPLES:
        raise InputError(
            f"It has {n:,} examples; its meanings are described where there are at most "
            f"{_MOST_EXAMPLES:,}."
        )
    labels = found.examples.get("meaning")
    if labels is not None:
        numbers = np.unique(labels.to_numpy())
        if not np.array_equal(numbers, np.arange(len(numbers))):
            raise ValueError
    with np.errstate(all="ignore"):
        meanings = found.meanings
        groups = meanings.groups
        if not (np.isfinite(groups.cosines).all() and np.isfinite(groups.drives).all()):
            raise ValueError
        drawn = n <= _MOST_DRAWN
        return {
            "meanings": [
                {
                    "number": meaning.number,
                    "n_examples": meaning.n_examples,
                    "share": finite(float(meaning.share)),
                    "medoid": meaning.medoid,
                    "label": meaning.label,
                    "examples": meaning.examples["example"].tolist(),
                    "features": {str(feature): n for feature, n in meaning.features.items()},
                }
                for meaning in meanings
            ],
            "separation": finite(float(meanings.separation)),
            "stability": finite(float(meanings.stability)) if drawn else None,
            "verdict": meanings.verdict if drawn or meanings.number == 1 else None,
        }
