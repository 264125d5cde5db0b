"""The meanings of one neuron of a run, and their labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from polyseme.core import Meanings
from polyseme.core.arrays import Floats
from polyseme.core.meaning import OVERLAP
from polyseme.core.space import Space
from polyseme.errors import InputError
from polyseme.store import RunFolder, SiteInfo
from polyseme.views.features import class_name
from polyseme.views.token_windows import TextWindow

# Number of words on each side of an example that its label may use.
_AROUND = 10
#: Most words or classes that a label names, and most words near.
NAMED = 4
# Significance level, over all words tested, for a word near that many examples by chance.
_SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Meaning:
    """One meaning of a neuron: a group of its examples.

    Attributes
    ----------
    number : int
        0 is the largest.
    examples : pandas.DataFrame
        Its rows of `Neuron.examples`.
    share : float
        Share of the neuron's examples.
    medoid : int
        Number of the example most similar to the others.
    counts : dict of str to int
        How often each word is at the maximum or, for images, each class is that of the input;
        most frequent first. Empty for images without labels.
    context : tuple of str
        Words near its examples more often than chance explains, most significant first.
    features : dict of int to int
        The features of its examples, and how many of them each has; largest first.
    """

    number: int
    examples: pd.DataFrame
    share: float
    medoid: int
    counts: dict[str, int]
    context: tuple[str, ...]
    features: dict[int, int]

    @property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(self.examples)

    @property
    def mean_activation(self) -> float:
        """Mean activation of its examples."""
        return float(self.examples["activation"].mean())

    @property
    def label(self) -> str:
        """Its label: "January ×8, June ×6; near: war"; empty if nothing is distinctive.

        The words at its maxima, or classes of its inputs, that occur more than once; then words
        from its contexts.
        """
        return label_of(self.counts, self.context)

    def __repr__(self) -> str:
        label = self.label or "nothing distinctive"
        return f"Meaning({self.number}: {self.n_examples} examples, {self.share:.0%}; {label})"


def label_of(counts: Mapping[str, int], context: Sequence[str] = ()) -> str:
    """See `Meaning.label`."""
    named = [f"{word} ×{n}" for word, n in counts.items() if n > 1][:NAMED]
    near = [f"near: {', '.join(context[:NAMED])}"] if context else []
    return "; ".join([*([", ".join(named)] if named else []), *near])


class Described:
    """What a neuron's examples are about, independent of their groups.

    Parameters
    ----------
    examples : pandas.DataFrame
        All examples, as in `Neuron.examples`.
    windows : list of TextWindow, optional
        The text around each example.
    frequency : dict of str to float
        Share of each word among the words of the run's texts.
    cosines : ndarray, shape (n, n)
        Between the examples.
    spaced : bool
        Of the vocabulary, see `are_spaced`.
    """

    def __init__(
        self,
        examples: pd.DataFrame,
        windows: Sequence[TextWindow] | None,
        frequency: dict[str, float],
        cosines: Floats,
        *,
        spaced: bool = True,
    ) -> None:
        self._examples, self._cosines = examples, cosines
        self._near: list[set[str]] | None = None
        self._names: list[str] | None = None
        self._frequency = frequency
        if windows is not None:
            words = [words_around(window, spaced=spaced) for window in windows]
            self._near, self._names = [near for near, _ in words], [word for _, word in words]
        elif "label" in examples:
            self._names = [class_name(label) for label in examples["label"].tolist()]

    def meaning(self, number: int, rows: NDArray[np.int64]) -> Meaning:
        """The meaning with the given rows as its examples."""
        counts = {} if self._names is None else _most_common(self._names[row] for row in rows)
        context: tuple[str, ...] = ()
        if self._near is not None:
            inside = np.zeros(len(self._near), bool)
            inside[rows] = True
            context = distinctive_words(self._near, inside, self._frequency, set(counts))
        features = self._examples["feature"].iloc[rows].value_counts()
        return Meaning(
            number=number,
            examples=self._examples.iloc[rows].reset_index(drop=True),
            share=len(rows) / len(self._examples),
            medoid=int(rows[self._cosines[np.ix_(rows, rows)].sum(axis=1).argmax()]),
            counts=counts,
            context=context,
            features={
                int(feature): int(n) for feature, n in zip(features.index, features, strict=True)
            },
        )


class NeuronMeanings(list[Meaning]):
    """A neuron's meanings, largest first.

    Parameters
    ----------
    described : Described
    groups : Meanings

    Attributes
    ----------
    described : Described
    groups : Meanings
        How they were found: their tree, separation, stability and verdict.
    """

    def __init__(self, described: Described, groups: Meanings) -> None:
        super().__init__(
            described.meaning(number, np.flatnonzero(groups.labels == number))
            for number in range(groups.number)
        )
        self.described = described
        self.groups = groups

    def cut(self, threshold: float) -> NeuronMeanings:
        """The meanings at another overlap, see `polyseme.Meanings.cut`."""
        return NeuronMeanings(self.described, self.groups.cut(threshold))

    @property
    def number(self) -> int:
        """Number of meanings."""
        return len(self)

    @property
    def effective_number(self) -> float:
        """Exponential of the entropy of their shares."""
        return self.groups.effective_number

    @property
    def separation(self) -> float:
        """See `polyseme.Meanings.separation`."""
        return self.groups.separation

    @property
    def stability(self) -> float:
        """See `polyseme.Meanings.stability`."""
        return self.groups.stability

    @property
    def verdict(self) -> str:
        """See `polyseme.Meanings.verdict`."""
        return self.groups.verdict

    def __repr__(self) -> str:
        return "[" + ",\n ".join(map(repr, self)) + "]"


class StoredMeanings:
    """A neuron's meanings as stored in a run.

    Parameters
    ----------
    folder : RunFolder
    info : SiteInfo
    neuron : int
    examples : pandas.DataFrame
        Its rows of the table of examples.
    vectors : ndarray, shape (n_examples, d_in)
        Its inputs in these examples.

    Raises
    ------
    InputError
        The run has no meanings.
    """

    def __init__(
        self,
        folder: RunFolder,
        info: SiteInfo,
        neuron: int,
        examples: pd.DataFrame,
        vectors: NDArray[Any],
    ) -> None:
        arrays = folder.site(info.number)
        if "meaning_tree" not in arrays or "meaning" not in examples:
            raise InputError(
                f"The run {str(folder.path)!r} has no meanings; repeat the analysis with this "
                "version of polyseme."
            )
        tree, overlaps, drives = (
            folder.site_rows(info.number, f"meaning_{part}", neuron, neuron + 1)
            for part in ("tree", "overlap", "drive")
        )
        group = neuron * len(arrays["space_mean"]) // info.n_neurons
        self._space = Space(arrays["space_mean"][group], arrays["space_matrix"][group])
        self._units = self._space.inputs(vectors)
        self.groups = Meanings(
            labels=examples["meaning"].to_numpy(np.int64),
            tree=tree,
            overlaps=overlaps.astype(np.float64),
            threshold=OVERLAP,
            cosines=self._units @ self._units.T,
            drives=drives.astype(np.float32),
        )

    def cosines(self, h: NDArray[Any]) -> NDArray[np.float64]:
        """Mean cosines of new inputs (m, d_in) with each meaning's examples: (m, n_meanings)."""
        member = np.eye(self.groups.number)[self.groups.labels]
        return np.asarray(
            self._space.inputs(h) @ self._units.T @ (member / member.sum(axis=0)), np.float64
        )

    def assign(self, h: NDArray[Any]) -> NDArray[np.int64]:
        """The meaning of new inputs (m, d_in), see `Neuron.assign_meaning`."""
        groups = self.groups
        if not len(groups.labels):
            return np.full(len(h), -1, np.int64)
        similar = self.cosines(h)
        nearest = similar.argmax(axis=1)
        member = np.eye(groups.number)[groups.labels]
        sizes = member.sum(axis=0)
        sums = (groups.cosines @ member)[np.arange(len(member)), groups.labels]
        # Each example's mean cosine with the others of its meaning; undefined for a lone example.
        alike = (sums - np.diagonal(groups.cosines)) / np.maximum(sizes[groups.labels] - 1, 1)
        least = np.array([alike[groups.labels == n].min() for n in range(groups.number)])
        return np.where(similar.max(axis=1) >= least[nearest], nearest, -1)


def word_shares(words: Iterable[str], counts: Iterable[int]) -> dict[str, float]:
    """Share of each lower-case word, from the number of times each token occurs in some texts.

    Exact only for words of a single token; for others it is the share of their first token.
    """
    totals: Counter[str] = Counter()
    for word, n in zip(words, counts, strict=True):
        totals[word.strip().lower()] += int(n)
    total = totals.total()
    return {word: n / total for word, n in totals.items()}


def are_spaced(tokens: Iterable[str]) -> bool:
    """Whether tokens of a vocabulary begin with spaces, as in all schemes but WordPiece."""
    return any(bool(token[:1].isspace() and token.strip()) for token in tokens)


def joined(tokens: Iterable[str], *, spaced: bool) -> tuple[list[str], list[int]]:
    """The words that tokens form, and the index of each token's word.

    White space belongs to the word before it. If words begin with a space, see `are_spaced`, a
    token without one continues the last word. In WordPiece a token that begins with ## continues
    the last word, and every other token is a word.
    """
    words: list[str] = []
    word_of = []
    ended = False
    for token in tokens:
        text = token.strip()
        if spaced:
            goes_on = not (ended or token[:1].isspace()) and text[:1].isalnum()
            ended = not token[-1:].isalnum()
        else:
            goes_on = text.startswith("##") and len(text) > 2
            text = text[2 * goes_on :]
        if text and words and goes_on:
            words[-1] += text
        elif text:
            words.append(text)
        word_of.append(max(0, len(words) - 1))
    return words, word_of


def words_around(window: TextWindow, *, spaced: bool) -> tuple[set[str], str]:
    """The lower-case words near an example, and the example's own word."""
    words, word_of = joined(window.tokens, spaced=spaced)
    centre = word_of[window.centre]
    near = words[max(0, centre - _AROUND) : centre] + words[centre + 1 : centre + 1 + _AROUND]
    return {word.lower() for word in near}, words[centre] if words else ""


def _most_common(words: Any) -> dict[str, int]:
    return dict(Counter(word for word in words if word).most_common())


def distinctive_words(
    near: Sequence[set[str]],
    inside: NDArray[np.bool_],
    frequency: dict[str, float],
    known: set[str],
) -> tuple[str, ...]:
    """Words near some examples more often than near the others and in the texts in general.

    Uses a binomial test against the texts and a hypergeometric test against the other examples,
    both at 0.01, corrected for the number of words tested; a word must be near at least 3 examples.

    Parameters
    ----------
    near : list of set of str
        Words near each example.
    inside : ndarray of bool, shape (n,)
        Which examples to describe.
    frequency : dict of str to float
        Share of each word among the words of the texts.
    known : set of str
        Words that the label already has.
    """
    size, total = int(inside.sum()), len(near)
    inner = [words for words, is_in in zip(near, inside, strict=True) if is_in]
    here = Counter(word for words in inner for word in words)
    everywhere = Counter(word for words in near for word in words)
    taken = {word.lower() for word in known}
    tried = [word for word, n in here.items() if n >= 3 and word not in taken and word[0].isalpha()]
    if not tried:
        return ()
    n_here = np.array([here[word] for word in tried])
    length = np.mean([len(words) for words in inner])
    share = 1 - (1 - np.array([frequency.get(word, 0.0) for word in tried])) ** length
    by_chance = stats.binom.sf(n_here - 1, size, np.clip(share, 1e-9, 1))
    if size < total:
        n_all = np.array([everywhere[word] for word in tried])
        of_others = stats.hypergeom.sf(n_here - 1, total, n_all, size)
        by_chance = np.maximum(by_chance, of_others)
    order = np.argsort(by_chance, kind="stable")
    return tuple(tried[n] for n in order if by_chance[n] * len(tried) < _SIGNIFICANT)
