"""The last value that each rule allows, and the first that it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from polyseme.store import invariants
from polyseme.store.format import Problem


@pytest.mark.parametrize(
    ("check", "fine", "wrong"),
    [
        (invariants.check_index, [[], [0], [0, 1, 7]], [[-1], [0, 0], [1, 5, 3], [1, 5, 5]]),
        (invariants.check_vocabulary, [[], [0], [0, 1, 7]], [[-1], [0, 0], [1, 5, 3], [1, 5, 5]]),
        (lambda a: invariants.check_histogram(0, a), [[], [0], [3, 0]], [[-1], [3, -1]]),
        (lambda a: invariants.check_similar(0, a, 3), [[], [-1, 0, 2]], [[-2], [3], [0, 3, 0]]),
        (lambda a: invariants.check_token_features(a, 3), [[], [0, 2]], [[-1], [3], [0, 3, 0]]),
        (
            lambda a: invariants.check_token_features_ends(a, 3),
            [[3], [0, 3], [1, 1, 3]],
            [[], [2], [4], [-1, 3], [2, 1, 3], [3, 2]],
        ),
    ],
)
def test_numbers_in_range(check, fine, wrong):
    for values in fine:
        check(np.array(values, np.int64))
    for values in wrong:
        with pytest.raises(Problem):
            check(np.array(values, np.int64))


@pytest.mark.parametrize("height", [0, 2, invariants.HIGHEST_MERGE])
def test_heights_of_trees(height):
    tree, n_examples = np.array([[0, 1, height, 2.0]]), np.array([1, 2, 0])
    invariants.check_tree(0, tree, n_examples)
    for wrong in (-1e-300, np.nextafter(invariants.HIGHEST_MERGE, 3), np.nan):
        tree[0, 2] = wrong
        with pytest.raises(Problem, match="'tree'"):
            invariants.check_tree(0, tree, n_examples)


@pytest.mark.parametrize(
    ("children", "sentence"),
    [
        ([[0, 1], [2, 3]], None),
        ([[2, 1], [3, 0]], None),
        ([[0, 1], [2, 4]], "must merge existing nodes, given as whole numbers; row 1"),
        ([[0, 3], [1, 2]], "must merge existing nodes, given as whole numbers; row 0"),
        ([[0, 1], [0, 3]], "merge each node once; row 0"),
        ([[0, 1], [2, 2]], "merge each node once; row 1"),
        ([[0, 1.5], [2, 3]], "must merge existing nodes, given as whole numbers; row 0"),
        ([[0, -1], [2, 3]], "must merge existing nodes, given as whole numbers; row 0"),
    ],
)
def test_nodes_of_trees(children, sentence):
    tree = np.array([[*children[0], 0.1, 2], [*children[1], 0.2, 3]])
    if sentence is None:
        invariants.check_tree(0, tree, np.array([3]))
        tree[1, 3] = 2
        sentence = "count the examples under each merge; row 1"
    with pytest.raises(Problem, match=sentence):
        invariants.check_tree(0, tree, np.array([3]))
