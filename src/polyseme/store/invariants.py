"""Constraints on the values of a run, beyond dtypes and shapes.

Every check is vectorised over a whole table or site, as runs have millions of rows. Each raises
`Problem` for the first violation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from polyseme.store.format import (
    INPUTS_FILE,
    Problem,
    SiteInfo,
    neuron_offsets,
    site_file,
    table_file,
    token_texts,
)

# A cosine distance is at most 2; the slack allows for rounding of float64 sums.
HIGHEST_MERGE = 2 + 1e-6


@dataclass(frozen=True)
class Held:
    """The inputs that the run holds.

    Attributes
    ----------
    index : ndarray of int64, shape (M,)
        Input numbers, increasing.
    lengths : ndarray of int32, shape (M,), or None
        For texts, the number of tokens in each.
    """

    index: np.ndarray
    lengths: np.ndarray | None = None


def check_neurons(sites: Sequence[SiteInfo], neurons: pd.DataFrame) -> None:
    """Check one row per neuron, in order, with possible counts."""
    file = table_file("neurons")
    rows = _neuron_rows(sites, file, neurons)
    if not np.array_equal(rows, np.arange(neuron_offsets(sites)[-1])):
        raise Problem(file, "it must have one row per neuron, ordered by site, then neuron number")
    examples = neurons["n_examples"].to_numpy()
    clusters = neurons["n_clusters"].to_numpy()
    _refuse(file, examples < 0, "'n_examples' is negative in row {row}")
    _refuse(
        file,
        (clusters > examples) | ((clusters < 1) & (examples > 0)) | (clusters < 0),
        "'n_clusters' must be from 1 to n_examples, or 0 for a dead neuron; row {row} does not",
    )
    _refuse(file, neurons["n_random"].to_numpy() < 0, "'n_random' is negative in row {row}")
    if "n_meanings" in neurons:
        meanings = neurons["n_meanings"].to_numpy()
        _refuse(
            file,
            (meanings > examples) | ((meanings < 1) != (examples < 1)) | (meanings < 0),
            "'n_meanings' must be from 1 to n_examples, or 0 for a dead neuron; row {row} does not",
        )


def check_examples(
    sites: Sequence[SiteInfo],
    neurons: pd.DataFrame,
    examples: pd.DataFrame,
    n_vectors: Sequence[int],
    held: Held,
    start: int,
    stop: int,
) -> None:
    """Check that rows are in the order of the neurons and point only at what the run holds.

    Parameters
    ----------
    sites, neurons, examples
        The run's sites, its valid neurons table, and the rows to check.
    n_vectors : sequence of int
        Number of rows of each site's ``vectors``.
    held : Held
        The inputs that the run holds.
    start, stop : int
        Rows ``start`` to ``stop - 1`` of the neurons table, whose examples these are.
    """
    file = table_file("examples")
    rows = _neuron_rows(sites, file, examples)
    counts = neurons["n_examples"].to_numpy(np.int64)[start:stop]
    if not np.array_equal(rows, np.repeat(np.arange(start, stop), counts)):
        raise Problem(
            file, "it must have n_examples rows for each neuron, in the order of neurons.parquet"
        )
    _refuse(
        file,
        examples["example"].to_numpy() != _within(counts),
        "'example' must count 0, 1, … within each neuron; row {row} does not",
    )
    _check_moments(file, rows, examples, held)
    feature = examples["feature"].to_numpy()
    _refuse(
        file,
        (feature < 0) | (feature >= neurons["n_clusters"].to_numpy()[rows]),
        "'feature' must be from 0 to n_clusters - 1 of its neuron; row {row} is outside",
    )
    if "meaning" in examples and "n_meanings" in neurons:
        meaning = examples["meaning"].to_numpy()
        _refuse(
            file,
            (meaning < 0) | (meaning >= neurons["n_meanings"].to_numpy()[rows]),
            "'meaning' must be from 0 to n_meanings - 1 of its neuron; row {row} is outside",
        )
    site_of_row = np.searchsorted(neuron_offsets(sites), rows, side="right") - 1
    vector = examples["vector"].to_numpy()
    _refuse(
        file,
        (vector < 0) | (vector >= np.asarray(n_vectors, dtype=np.int64)[site_of_row]),
        "'vector' must be a row of its site's 'vectors'; row {row} is outside",
    )


def check_features(
    sites: Sequence[SiteInfo],
    neurons: pd.DataFrame,
    features: pd.DataFrame,
    examples: pd.DataFrame,
    start: int,
    stop: int,
) -> None:
    """Check that rows are in the order of the neurons and agree with their (valid) examples."""
    file = table_file("features")
    rows = _neuron_rows(sites, file, features)
    clusters = neurons["n_clusters"].to_numpy(np.int64)[start:stop]
    if not np.array_equal(rows, np.repeat(np.arange(start, stop), clusters)):
        raise Problem(
            file, "it must have n_clusters rows for each neuron, in the order of neurons.parquet"
        )
    _refuse(
        file,
        features["feature"].to_numpy() != _within(clusters),
        "'feature' must count 0, 1, … within each neuron; row {row} does not",
    )
    rows = rows - start
    counts = neurons["n_examples"].to_numpy(np.int64)[start:stop]
    first_feature = np.cumsum(clusters) - clusters
    example_neuron = np.repeat(np.arange(len(counts)), counts)
    feature = examples["feature"].to_numpy()
    n_assigned = np.bincount(first_feature[example_neuron] + feature, minlength=len(features))
    n_examples = features["n_examples"].to_numpy()
    _refuse(
        file,
        (n_examples != n_assigned) | (n_examples < 1),
        "'n_examples' must be the number of the feature's examples, at least 1; row {row} differs",
    )
    _refuse(
        file,
        n_examples > n_examples[first_feature[rows]],
        "feature 0 must be the neuron's largest; row {row} is larger",
    )
    medoid = features["medoid"].to_numpy()
    outside = (medoid < 0) | (medoid >= counts[rows])
    _refuse(file, outside, "'medoid' must be an example of the neuron; row {row} is not")
    first_example = np.cumsum(counts) - counts
    central = first_example[rows] + medoid
    _refuse(
        file,
        feature[central] != features["feature"].to_numpy(),
        "'medoid' must be one of the feature's own examples; row {row} is not",
    )
    for column in ("input", "position"):
        if column in features:
            _refuse(
                file,
                features[column].to_numpy() != examples[column].to_numpy()[central],
                f"{column!r} must be that of the medoid; row {{row}} differs",
            )


def check_random(
    sites: Sequence[SiteInfo],
    counts: np.ndarray,
    random: pd.DataFrame,
    held: Held,
    start: int,
    stop: int,
) -> None:
    """Check that rows are in the order of the neurons, ``n_random`` for each."""
    file = table_file("random")
    rows = _neuron_rows(sites, file, random)
    if not np.array_equal(rows, np.repeat(np.arange(start, stop), counts[start:stop])):
        raise Problem(
            file, "it must have n_random rows for each neuron, in the order of neurons.parquet"
        )
    _check_moments(file, rows, random, held)


def check_index(index: np.ndarray) -> None:
    """Check that input numbers increase, so that binary search works."""
    if index.size and index[0] < 0:
        raise Problem(INPUTS_FILE, "'index' holds a negative input number")
    if np.any(index[1:] <= index[:-1]):
        raise Problem(INPUTS_FILE, "'index' must be strictly increasing")


def check_vocabulary(vocabulary: np.ndarray) -> None:
    """Check that token ids increase, so that binary search works."""
    if (vocabulary.size and vocabulary[0] < 0) or np.any(vocabulary[1:] <= vocabulary[:-1]):
        raise Problem(INPUTS_FILE, "'vocabulary' must be strictly increasing, from 0")


def check_texts(inputs: Mapping[str, np.ndarray]) -> None:
    """Check that the arrays of texts agree.

    Raises
    ------
    Problem
        A length exceeds the number of tokens, or a token has no text.
    """
    check_contexts(inputs["tokens"], inputs["lengths"], inputs["vocabulary"])
    token_texts(inputs)


def check_contexts(tokens: np.ndarray, lengths: np.ndarray, vocabulary: np.ndarray) -> None:
    """Check some or all contexts as `check_texts` does."""
    check_lengths(lengths, tokens.shape[1])
    index = np.minimum(np.searchsorted(vocabulary, tokens), max(len(vocabulary) - 1, 0))
    known = vocabulary[index] == tokens if len(vocabulary) else np.zeros(tokens.shape, bool)
    used = np.arange(tokens.shape[1]) < lengths[:, None]
    if not known[used].all():
        raise Problem(INPUTS_FILE, "'tokens' holds a token that 'vocabulary' does not have")


def check_lengths(lengths: np.ndarray, most: int) -> None:
    """Check that no context is longer than the array of tokens."""
    if np.any((lengths < 0) | (lengths > most)):
        raise Problem(INPUTS_FILE, f"'lengths' must be from 0 to {most}")


def check_histogram(number: int, histogram: np.ndarray) -> None:
    """Check that counts are not negative."""
    if np.any(histogram < 0):
        raise Problem(site_file(number), "'histogram' holds a negative count")


def check_similar(number: int, features: np.ndarray, n_features: int) -> None:
    """Check for rows of the table of features, or -1 for none."""
    if np.any((features < -1) | (features >= n_features)):
        raise Problem(
            site_file(number),
            f"'similar_features' must be rows of features.parquet, below {n_features}, or -1",
        )


def check_token_features(features: np.ndarray, n_features: int) -> None:
    """Check for rows of the table of features."""
    if np.any((features < 0) | (features >= n_features)):
        raise Problem(
            INPUTS_FILE, f"'token_features' must be rows of features.parquet, below {n_features}"
        )


def check_token_features_ends(ends: np.ndarray, n: int) -> None:
    """Check that the ends partition ``token_features`` into consecutive groups."""
    starts = np.concatenate([[0], ends])
    if np.any(starts[1:] < starts[:-1]) or starts[-1] != n:
        raise Problem(INPUTS_FILE, "'token_features_ends' do not fit 'token_features'")


def tree_rows(n_examples: np.ndarray) -> np.ndarray:
    """Number of merges in the tree of each neuron: (n_neurons,) int64."""
    return np.maximum(n_examples.astype(np.int64) - 1, 0)


def check_tree(number: int, tree: np.ndarray, n_examples: np.ndarray, name: str = "tree") -> None:
    """Check linkage matrices, so that SciPy or a recursive reader can walk them.

    Parameters
    ----------
    number : int
        The site's number, for the message.
    tree : ndarray of float64, (sum of max(n_examples - 1, 0), 4)
        The matrices of the site's neurons, one after another.
    n_examples : ndarray, (n_neurons,)
        Number of examples of each neuron.
    name : str
        Name of the array, for the message.
    """
    file = site_file(number)
    merges = tree_rows(n_examples)
    starts = np.cumsum(merges) - merges
    neuron = np.repeat(np.arange(len(merges)), merges)
    leaves = n_examples.astype(np.int64)[neuron]
    step = _within(merges)

    if not np.all(np.isfinite(tree)):
        raise Problem(file, f"{name!r} holds a NaN or an infinity")
    _refuse(
        file,
        (tree[:, 2] < 0) | (tree[:, 2] > HIGHEST_MERGE),
        f"{name!r} must have heights from 0 to 2, the range of a cosine distance; row {{row}} "
        "does not",
    )
    children = tree[:, :2]
    in_range = (children >= 0) & (children < (leaves + step)[:, None])
    _refuse(
        file,
        ~(in_range & (children == np.floor(children))).all(axis=1),
        f"{name!r} must merge existing nodes, given as whole numbers; row {{row}} does not",
    )
    nodes = children.astype(np.int64)
    # A neuron's n - 1 merges have 2(n - 1) children: each node except the root, exactly once.
    uses = np.bincount((nodes + 2 * starts[neuron][:, None]).ravel(), minlength=2 * len(tree))
    again = uses[nodes + 2 * starts[neuron][:, None]] > 1
    _refuse(
        file,
        again.any(axis=1),
        f"{name!r} must merge each node once; row {{row}} merges a node that another row merges",
    )
    inner = nodes - leaves[:, None]
    # If the child is a leaf, the row looked up is meaningless, and not used.
    row = np.where(inner >= 0, starts[neuron][:, None] + inner, 0)
    sizes = np.where(inner >= 0, tree[:, 3][row] if len(tree) else 0, 1)
    _refuse(
        file,
        tree[:, 3] != sizes.sum(axis=1),
        f"{name!r} must count the examples under each merge; row {{row}} has a wrong count",
    )


def _neuron_rows(sites: Sequence[SiteInfo], file: str, table: pd.DataFrame) -> np.ndarray:
    """For each row, its neuron's row in the neurons table: (rows,) int64."""
    # Arrow looks up names several times faster than pandas.
    sites_of_rows = pa.array(table["site"], pa.large_string(), from_pandas=True)
    names = pa.array([site.name for site in sites], pa.large_string())
    number = pc.index_in(sites_of_rows, names).fill_null(-1).to_numpy(zero_copy_only=False)
    _refuse(file, number < 0, "row {row} names a site that run.json does not have")
    neuron = table["neuron"].to_numpy()
    sizes = np.asarray([site.n_neurons for site in sites], dtype=np.int64)
    _refuse(
        file,
        (neuron < 0) | (neuron >= sizes[number]),
        "'neuron' in row {row} is not a neuron of its site",
    )
    rows: np.ndarray = neuron_offsets(sites)[number] + neuron
    return rows


def _check_moments(file: str, rows: np.ndarray, table: pd.DataFrame, inputs: Held) -> None:
    """Check for held inputs, one row per (neuron, input), and finite activations."""
    index, number = inputs.index, table["input"].to_numpy()
    place = np.searchsorted(index, number)
    held = (
        index[np.minimum(place, len(index) - 1)] == number
        if len(index)
        else np.zeros(len(number), dtype=bool)
    )
    _refuse(file, ~held, "'input' in row {row} is not in the 'index' of inputs.safetensors")
    pairs = rows * len(index) + place
    repeated = np.zeros(len(pairs), dtype=bool)
    if (np.diff(np.sort(pairs)) == 0).any():
        order = np.argsort(pairs, kind="stable")
        repeated[order[1:][np.diff(pairs[order]) == 0]] = True
    _refuse(file, repeated, "row {row} repeats an input of the same neuron")
    position = table["position"].to_numpy()
    _refuse(file, position < 0, "'position' is negative in row {row}")
    if inputs.lengths is not None:
        _refuse(
            file,
            position >= inputs.lengths[place],
            "'position' in row {row} is beyond the end of its context",
        )
    _refuse(
        file,
        ~np.isfinite(table["activation"].to_numpy()),
        "'activation' is not a finite number in row {row}",
    )


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, … within each group: (sum of counts,) int64."""
    numbers: np.ndarray = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def _refuse(file: str, broken: np.ndarray, sentence: str) -> None:
    """Raise for the first row that breaks a rule."""
    if broken.any():
        raise Problem(file, sentence.format(row=int(np.argmax(broken))))
