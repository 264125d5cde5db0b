"""Details of a neuron's meanings for its page, beyond the examples of each meaning."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from polyseme.errors import InputError
from polyseme.explorer.page_errors import page_message
from polyseme.explorer.strict_json import finite
from polyseme.views import Run
from polyseme.views.meanings import NeuronMeanings

# The cosines between all of a neuron's examples must fit in memory. Stability and verdict need
# about a hundred random draws of as many, in time cubic in the number of examples.
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
        ``groups``: a list of dicts with ``examples`` (numbers of examples), ``medoid`` and
        ``label``; ``cuts``: a list of dicts with ``threshold``, the largest overlap at which the
        examples form these groups, and ``groups``, their indices in the former; ``separation``,
        ``stability`` and ``verdict`` of the run's own cut, None if unknown. What cannot be
        computed is left out, and ``problem`` says why.

    Raises
    ------
    RunError
        The run is damaged.
    """
    try:
        return _described(run, site, neuron)
    except InputError as error:
        return nothing(page_message(error))
    except (ArithmeticError, IndexError, KeyError, ValueError):
        # The checks of the format do not rule out every contradiction between these arrays.
        return nothing("The run's data on the meanings of this neuron is inconsistent.")


def nothing(problem: str | None = None) -> dict[str, Any]:
    """The details of a neuron without meanings, or with unreadable ones."""
    return {"cuts": [], "groups": [], **({"problem": problem} if problem else {})}


def _described(run: Run, site: str, neuron: int) -> dict[str, Any]:
    found = run.neuron(site, neuron)
    n = int(found.row["n_examples"])
    if not n:
        return nothing()
    if n > _MOST_EXAMPLES:
        raise InputError(
            f"This neuron has {n:,} examples; meanings are described for at most "
            f"{_MOST_EXAMPLES:,}."
        )
    labels = found.examples.get("meaning")
    if labels is not None:
        numbers = np.unique(labels.to_numpy())
        if not np.array_equal(numbers, np.arange(len(numbers))):
            raise ValueError
    with np.errstate(all="ignore"):
        meanings = found.meanings
        own = meanings.groups
        if not (np.isfinite(own.cosines).all() and np.isfinite(own.drives).all()):
            raise ValueError
        drawn = n <= _MOST_DRAWN
        return {
            **_cuts(meanings, all_cuts=drawn),
            "separation": finite(float(meanings.separation)),
            "stability": finite(float(meanings.stability)) if drawn else None,
            "verdict": meanings.verdict if drawn or meanings.number == 1 else None,
        }


def _cuts(meanings: NeuronMeanings, *, all_cuts: bool) -> dict[str, Any]:
    """All cuts, or only the run's own, and their groups, each described once."""
    own = meanings.groups
    cuts = own.cuts() if all_cuts else [own]
    # Use the run's stored cut: a recomputed one may differ in the last digit.
    at = next(n for n, cut in enumerate(cuts) if own.threshold <= cut.threshold)
    cuts[at] = dataclasses.replace(own, threshold=cuts[at].threshold)
    places: dict[bytes, int] = {}  # by the group's examples
    groups: list[dict[str, Any]] = []
    described = []
    for cut in cuts:
        numbers = []
        for number in range(cut.number):
            rows = np.flatnonzero(cut.labels == number)
            place = places.setdefault(rows.tobytes(), len(groups))
            if place == len(groups):
                meaning = meanings.described.meaning(number, rows)
                groups.append(
                    {"examples": rows.tolist(), "medoid": meaning.medoid, "label": meaning.label}
                )
            numbers.append(place)
        described.append({"threshold": finite(cut.threshold), "groups": numbers})
    return {"cuts": described, "groups": groups}
