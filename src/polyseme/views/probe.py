"""Probing a run with a text: which neurons fire at each token, and in which meaning."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: How neurons are ranked at a token: by activation as a share of the neuron's own maximum, so
#: that neurons with large activations do not always come first, or by activation itself.
RANKINGS = ("share", "activation")

_JSON_COLUMNS = (
    "token",
    "site",
    "neuron",
    "activation",
    "share",
    "meaning",
    "meaning_cosine",
    "feature",
    "label",
    "n_examples",
)


@dataclass(frozen=True, eq=False)
class Probe:
    """The tokens of a text and the most active neurons at each. Created by `Run.probe`."""

    tokens: list[str]
    """The texts of the tokens, including special ones."""
    mask: NDArray[np.bool_]
    """(n_tokens,): False for tokens that the run leaves out, such as special ones: these have no
    neurons."""
    neurons: pd.DataFrame
    """One row per token and neuron, in the order of the text, then by rank: ``token`` (index in
    ``tokens``), ``text``, ``site``, ``neuron``, ``activation``, ``share`` (of the neuron's maximum
    in the run; NaN if no text of the run activates it), ``meaning`` and ``feature`` (-1 if none is
    close), ``meaning_cosine`` (similarity to the nearest meaning, see `Neuron.meaning_cosines`; NaN
    without meanings), ``label`` and ``n_examples`` of the feature."""
    by: str
    """The ranking of neurons: "share" or "activation"."""
    k: int
    """Most neurons per token."""
    truncated: bool = False
    """Whether the text is longer than these tokens."""

    def table(self) -> Table:
        """The rows as a rich table, to print."""
        table = Table(title=self._title(), title_justify="left", box=None, pad_edge=False)
        known = bool((self.neurons["meaning"] >= 0).any())
        names = ["token", "neuron", "activation", "of max"]
        names += [*(["meaning"] if known else []), "feature", "about"]
        for name in names:
            number = name in ("activation", "of max", "meaning", "feature")
            table.add_column(
                name,
                justify="right" if number else "left",
                no_wrap=name == "neuron",
                overflow="fold",
            )
        columns = (self.neurons[name].tolist() for name in ("text", *_JSON_COLUMNS))
        last = -1
        for text, token, site, neuron, activation, share, meaning, near, feature, label, n in zip(
            *columns, strict=True
        ):
            table.add_row(
                # As rich text: a token may look like rich's markup.
                Text(_visible(text) if token != last else ""),
                Text(f"{site}/{neuron}"),
                f"{activation:.3g}",
                "–" if np.isnan(share) else f"{share:.0%}",
                *([f"{meaning if meaning >= 0 else 'none'} ({near:.2f})"] if known else []),
                str(feature) if feature >= 0 else "none",
                Text(_about(label, n) if feature >= 0 else ""),
            )
            last = token
        return table

    def _title(self) -> str:
        ranked = "share of their maximum" if self.by == "share" else "activation"
        silent = int(self.mask.sum()) - self.neurons["token"].nunique()
        notes = [f"The {self.k} neurons with the largest {ranked} at each token"]
        if silent:
            notes.append(f"{_tokens(silent)} activate{'s' * (silent == 1)} none")
        if left_out := int((~self.mask).sum()):
            verb = "is" if left_out == 1 else "are"
            notes.append(f"{_tokens(left_out)} {verb} left out, as in the run")
        if self.truncated:
            notes.append("the text was cut off here")
        return "; ".join(notes) + "."

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=120, color_system=None).print(self.table())
        return page.getvalue()

    def __repr__(self) -> str:
        return f"Probe({len(self.tokens)} tokens, {len(self.neurons)} rows, by {self.by})"

    def _repr_html_(self) -> str:
        frame = self.neurons.assign(text=[_visible(str(text)) for text in self.neurons["text"]])
        shown = frame.to_html(index=False, float_format=lambda x: f"{x:.3g}", border=0)
        return f"<p>{html.escape(self._title())}</p>{shown}"

    def as_json(self, sites: Sequence[str]) -> dict[str, Any]:
        """The same in a form for JSON, for the explorer.

        Parameters
        ----------
        sites : sequence of str
            All sites of the run; their indices replace their names.
        """
        number = {name: n for n, name in enumerate(sites)}
        frame = self.neurons
        columns = {name: frame[name].tolist() for name in _JSON_COLUMNS}
        columns["site"] = [number[name] for name in frame["site"].tolist()]
        for name in ("share", "meaning_cosine"):
            columns[name] = [None if np.isnan(value) else value for value in columns[name]]
        return {
            "tokens": self.tokens,
            "left_out": (~self.mask).tolist(),
            "truncated": self.truncated,
            "by": self.by,
            "active": [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ],
        }


def _tokens(n: int) -> str:
    return f"{n:,} token{'s' * (n != 1)}"


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥")


def _about(label: str, n_examples: int) -> str:
    return f"{label} ({n_examples})" if label else f"({n_examples} examples)"
