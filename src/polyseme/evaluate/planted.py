"""Planted neurons, whose meanings are known by construction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core.gates import gate_factors
from polyseme.errors import InputError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
# (positions, the neuron's components, their scales) -> the meaning at each position
TruthOf = Callable[[Ints, Ints, Floats], Ints]

SHOWN = 100
#: Fewest shown examples of a meaning.
LEAST = 5
#: A concept that occurs fewer times in a text is left out.
OCCURRENCES = 80
_RANK = 30  # rank of the position of a concept that is scaled to 1
_ROWS = 8192

# Each concept is a set of words, for a kind of thing or with one function in a sentence. The words
# of the second half are also frequent in technical English.
CONCEPTS = {
    "months": "january february march april june july august september october november december",
    "ships": "ship ships vessel vessels boat boats cruiser battleship destroyer frigate",
    "kin": "father mother brother sister son daughter wife husband uncle aunt",
    "songs": "song songs album albums music lyrics vocals guitar",
    "games": "game games matches season seasons league",
    "troops": "army troops soldiers battalion regiment infantry brigade division corps",
    "church": "church god religious temple christian bishop saint catholic",
    "compass": "north south east west northern southern eastern western",
    "film": "film films movie movies actor actress cinema",
    "colours": "red white black blue green yellow brown grey orange pink",
    "he": "he him his himself",
    "she": "she her herself hers",
    "countries": "england france germany japan china india spain italy canada australia russia "
    "america britain ireland scotland",
    "nationalities": "american british english french german japanese chinese irish scottish "
    "canadian australian russian spanish italian",
    "offices": "president minister king queen prince emperor governor",
    "storms": "storm storms hurricane cyclone tropical winds",
    "roads": "road roads highway route street avenue",
    "books": "book books novel novels magazine story stories",
    "body": "head hand hands eyes face body arm leg heart hair",
    "birds": "bird birds species eggs nest feathers",
    "periods": "years year months days day week weeks hours minutes",
    "saying": "said says stated noted commented remarked",
    "playing": "played playing play plays",
    "beginning": "began started start begin begins",
    "water": "river lake sea ocean coast island islands bay",
    "money": "money million pounds dollars cost price",
    "school": "school university college students student",
    "war": "war battle attack fighting combat",
    "measures": "metres feet miles kilometres inches km mi ft",
    "numbers": "two three four five six seven eight nine ten eleven twelve",
    "ordinals": "first second third fourth fifth sixth seventh eighth",
    "modals": "would could should might must can will may",
    "negation": "not never no nor neither cannot",
    "past": "was were",
    "present": "is are",
    "have": "had has have",
    "the": "the",
    "a": "a an",
    "and": "and",
    "or": "or",
    "but": "but however although",
    "to": "to",
    "of": "of",
    "by": "by",
    "in": "in",
    "on": "on",
    "with": "with",
    "from": "from",
    "for": "for",
    "as": "as",
    "at": "at",
    "be": "be been being",
    "it": "it its itself",
    "they": "they their them these",
    "that": "that this",
    "which": "which who whom",
    "if": "if unless whether",
    "when": "when while where",
    "quantity": "most many several some few all any each",
    "other": "other another such same",
    "order": "later then before after until during",
    "use": "used uses using use",
    "things": "object objects item items element elements",
    "kinds": "class classes type types kind kinds",
    "values": "value values number result results",
    "functions": "function functions method methods argument arguments",
    "words": "string strings name names word words",
    "errors": "exception exceptions error errors raised",
    "lists": "list lists sequence sequences dictionary series",
}


@dataclass(frozen=True, eq=False)
class Positions:
    """A site's input at every position of some data.

    Attributes
    ----------
    inputs : ndarray of float16 or float32, shape (n, d)
    groups : ndarray of int64, shape (n,)
        The context or image of each position; at most one example of each is shown.
    """

    inputs: Floats
    groups: Ints

    def rows(self, at: Any) -> NDArray[np.float32]:
        """Inputs at some positions."""
        return np.asarray(self.inputs[at], np.float32)

    def parts(self) -> Iterator[NDArray[np.float32]]:
        """All inputs, a few thousand at a time."""
        for start in range(0, len(self.inputs), _ROWS):
            yield self.rows(slice(start, start + _ROWS))

    @cached_property
    def mean(self) -> NDArray[np.float64]:
        """Mean of all inputs, (d,)."""
        return np.asarray(self.inputs.mean(axis=0, dtype=np.float64))

    @cached_property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of all inputs, (d, d)."""
        products = np.zeros((self.inputs.shape[1],) * 2)
        for part in self.parts():
            centred = part - self.mean.astype(np.float32)
            products += centred.T @ centred
        return products / len(self.inputs)

    def along(self, direction: Floats) -> NDArray[np.float32]:
        """Inner product of each input with a direction, (n,)."""
        return np.concatenate([part @ direction.astype(np.float32) for part in self.parts()])

    def strongest(self, activations: Floats) -> Ints:
        """The strongest positions, at most one per group, the strongest first."""
        order = np.argsort(-activations, kind="stable")
        _, first = np.unique(self.groups[order], return_index=True)
        return order[np.sort(first)[:SHOWN]]


@dataclass(frozen=True, eq=False)
class Planted:
    """A neuron with known meanings.

    Attributes
    ----------
    shown : ndarray of int64, shape (n,)
        The positions of its examples.
    truth : ndarray of int64, shape (n,)
        The meaning of each; -1 if it is none of the neuron's components.
    gradient : ndarray of float32, shape (d,) or (n, d)
        Its input weights or, for a gated neuron, ∂a/∂h at each example.
    """

    shown: Ints
    truth: Ints
    gradient: NDArray[np.float32]


def number_of(labels: Ints) -> int:
    """Number of meanings with enough examples, not counting -1."""
    _, counts = np.unique(labels[labels >= 0], return_counts=True)
    return int((counts >= LEAST).sum())


def by_label(labels: Ints, classes: Sequence[int]) -> TruthOf:
    """The meaning at a position: the index of its label's class, if a component of the neuron."""
    place = np.full(max(labels.max(), *classes) + 2, -1)  # for a label of -1 too
    place[list(classes)] = np.arange(len(classes))
    return lambda at, chosen, _: np.where(np.isin(place[labels[at]], chosen), place[labels[at]], -1)


def by_contribution(activations: Any) -> TruthOf:
    """The meaning at a position: the component that adds most, by activations (n, m)."""

    def truth(at: Ints, chosen: Ints, scales: Floats) -> Ints:
        rows = activations[at][:, chosen]
        parts = (rows if isinstance(rows, np.ndarray) else rows.toarray()) * scales
        return np.where(parts.max(axis=1) > 0, chosen[parts.argmax(axis=1)], -1)

    return truth


def sums(
    positions: Positions,
    directions: Floats,
    truth_of: TruthOf,
    sizes: Sequence[int],
    n: int,
    rng: np.random.Generator,
    *,
    up: Floats | None = None,
) -> list[Planted]:
    """Make neurons that are sums of directions, chosen and scaled (0.75 to 1) at random.

    Parameters
    ----------
    positions : Positions
    directions : ndarray, shape (m, d)
    truth_of : callable
        From `by_label` or `by_contribution`, with indices of the directions as labels.
    sizes : sequence of int
        Number of directions per neuron, in turn.
    n : int
        Number of neurons to make. A neuron without a meaning with 5 shown examples is dropped.
    rng : numpy.random.Generator
    up : ndarray, shape (d,), optional
        Makes the neurons gated: ``silu(4 g) u``, where g is the centred sum and u = 1 plus a third
        of a standard deviation along this direction.
    """
    made = []
    for turn in range(n):
        chosen = rng.choice(len(directions), min(sizes[turn % len(sizes)], len(directions)), False)
        scales = rng.uniform(0.75, 1, len(chosen))
        weights = (scales @ directions[chosen]).astype(np.float32)
        activations = positions.along(weights)
        gradient = weights
        if up is None:
            shown = positions.strongest(activations)
        else:
            side = positions.along(up)
            step = 1 / (3 * side.std())
            g, u = 4 * (activations - activations.mean()), 1 + (side - side.mean()) * step
            shown = positions.strongest(gate_factors(g, u, "silu")[1] * u)
            by_gate, by_up = gate_factors(g[shown], u[shown], "silu")
            gradient = 4 * by_gate[:, None] * weights + by_up[:, None] * (step * up)
        truth = truth_of(shown, chosen, scales)
        if number_of(truth):
            made.append(Planted(shown, truth, np.asarray(gradient, np.float32)))
    return made


def random_directions(positions: Positions, n: int, rng: np.random.Generator) -> list[Planted]:
    """Neurons that read meaningless directions, whose examples should stay together."""
    weights = rng.standard_normal((n, positions.inputs.shape[1])).astype(np.float32)
    shown = (positions.strongest(positions.along(direction)) for direction in weights)
    return [Planted(at, np.zeros_like(at), w) for at, w in zip(shown, weights, strict=True)]


def shuffled(neurons: Sequence[Planted], rng: np.random.Generator) -> list[Planted]:
    """A null: neurons with several meanings, with the truth shuffled among their examples."""
    several = [neuron for neuron in neurons if number_of(neuron.truth) > 1]
    return [Planted(n.shown, rng.permutation(n.truth), n.gradient) for n in several]


def class_directions(
    positions: Positions, labels: Ints, classes: Sequence[int], *, whitened: bool = False
) -> NDArray[np.float32]:
    """A direction for each class: the mean of its inputs minus that of all others, (m, d).

    Each is scaled so that its 30th strongest position is 1 above the median of the others.

    Parameters
    ----------
    positions : Positions
    labels : ndarray of int64, shape (n,)
    classes : sequence of int
    whitened : bool
        Multiply by the inverse of the covariance, as a linear discriminant does.
    """
    d = positions.inputs.shape[1]
    ridge = 0.01 * np.trace(positions.covariance) / d * np.eye(d)
    scaled = []
    for number in classes:
        own = labels == number
        inside = positions.inputs[own].mean(axis=0, dtype=np.float64)
        direction = (inside - positions.mean) * len(own) / max(1, (~own).sum())
        if whitened:
            direction = np.linalg.solve(positions.covariance + ridge, direction)
        along = positions.along(direction)
        strongest = np.sort(along[own])[-min(_RANK, int(own.sum()))]
        scaled.append(direction / (strongest - np.median(along[~own])))
    return np.array(scaled, np.float32)


def concept_labels(tokens: Ints, groups: Ints, pieces: Sequence[str]) -> Ints:
    """The concept of each token that is a whole word, by number in `CONCEPTS`; otherwise -1.

    Parameters
    ----------
    tokens, groups : ndarray of int64, shape (n,)
        Tokens in the order of the text, and the context of each.
    pieces : sequence of str
        The vocabulary in the tokenizer's spelling: byte-level (Ġ), SentencePiece (▁), WordPiece
        (##).
    """
    words = [piece.lstrip("Ġ▁").lower() for piece in pieces]
    marks = any(piece.startswith(("Ġ", "▁")) for piece in pieces)
    begins = np.array(
        [
            piece.startswith(("Ġ", "▁")) or not piece[:1].isalnum()
            if marks
            else not piece.startswith("##")
            for piece in pieces
        ]
    )
    concept = {w: at for at, words in enumerate(CONCEPTS.values()) for w in words.split()}
    table = np.array([concept.get(word, -1) for word in words])
    table[~begins] = -1
    ends = np.append(begins[tokens[1:]] | (groups[1:] != groups[:-1]), True)
    return np.where(ends, table[tokens], -1)


def half_of(n: int, half: str, seed: int) -> Ints:
    """The numbers below n in a half, "development" or "test", by a seeded draw."""
    order = np.random.default_rng(seed).permutation(n)
    return np.sort(order[: n // 2] if half == "development" else order[n // 2 :])


def usable_concepts(labels: Ints, half: str, seed: int, text: str) -> list[int]:
    """Find the concepts of a half that are frequent enough in a text.

    Raises
    ------
    InputError
        If there are fewer than 4.
    """
    counts = np.bincount(labels[labels >= 0], minlength=len(CONCEPTS))
    concepts = [int(c) for c in half_of(len(CONCEPTS), half, seed) if counts[c] >= OCCURRENCES]
    if len(concepts) < 4:
        raise InputError(
            f"Only {len(concepts)} concepts of the {half} half occur at least {OCCURRENCES} times "
            f"in the {len(labels):,} tokens read of {text}; 4 are needed: give a longer text in "
            f"English."
        )
    return concepts


def synthetic(
    seed: int, *, d: int, features: int, probability: float, noise: float, n: int
) -> tuple[Positions, NDArray[np.float32], NDArray[np.float32]]:
    """Make sparse features in superposition with sae_lens.synthetic.

    Returns
    -------
    positions : Positions
    directions : ndarray, shape (features, d)
    activations : ndarray, shape (n, features)
    """
    import torch
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary

    rng = np.random.default_rng(seed)
    often = probability * np.exp(rng.uniform(-1, 1, features))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        # Random directions, as making them orthogonal would take longer than everything else.
        dictionary = FeatureDictionary(features, d, initializer=None)
        generator = ActivationGenerator(
            features,
            torch.from_numpy(often).float(),
            std_firing_magnitudes=0.3,
            mean_firing_magnitudes=1.0,
        )
        activations = generator.sample(n)
        inputs = dictionary(activations)
        inputs = inputs + noise * torch.randn_like(inputs)
        directions = dictionary.feature_vectors.detach().numpy().copy()
    return Positions(inputs.numpy(), np.arange(n)), directions, activations.numpy()
