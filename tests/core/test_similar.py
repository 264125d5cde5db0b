"""The nearest features, against one pair at a time."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyseme.core import similar
from polyseme.core.similar import NearestFeatures, nearest_features
from polyseme.errors import InputError, MissingDependencyError


def unit(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    rows = rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def oracle(vectors: np.ndarray, owners: np.ndarray, k: int) -> list[list[tuple[float, int]]]:
    """Similarity and row, the most similar first."""
    found = []
    for mine, owner in zip(vectors.astype(np.float64), owners, strict=True):
        pairs = [
            (float(mine @ theirs), row)
            for row, theirs in enumerate(vectors.astype(np.float64))
            if owners[row] != owner
        ]
        found.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k])
    return found


def check_exact(found: NearestFeatures, expected: list[list[tuple[float, int]]]) -> None:
    for rows, similarity, pairs in zip(*found, expected, strict=True):
        n = len(pairs)
        assert rows[:n].tolist() == [row for _, row in pairs]
        np.testing.assert_allclose(similarity[:n], [s for s, _ in pairs], atol=1e-6)
        assert (rows[n:] == -1).all()
        assert np.isnan(similarity[n:]).all()


@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(1, 6), st.integers(1, 7))
def test_all_pairs_equal_the_oracle(seed: int, n: int, k: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, owners = unit(rng, n, 8), np.sort(rng.integers(0, most, n))
    found = nearest_features(vectors, owners, k)
    assert found.neighbours.dtype == np.int64
    assert found.similarity.dtype == np.float32
    check_exact(found, oracle(vectors, owners, k))


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors, owners = unit(rng, 90, 8), np.sort(rng.integers(0, 9, 90))
    monkeypatch.setattr(similar, "_ROWS", 7)
    monkeypatch.setattr(similar, "_COLUMNS", 11)
    steps: list[float] = []
    found = nearest_features(vectors, owners, 5, progress=steps.append)
    check_exact(found, oracle(vectors, owners, 5))
    assert steps == sorted(steps)
    assert steps[-1] == 1


def test_equal_similarities_are_in_order_and_zeros_are_similar_to_none() -> None:
    vectors = np.array([[1, 0], [1, 0], [1, 0], [0, 0], [-1, 0]], np.float32)
    found = nearest_features(vectors, np.arange(5), 4)
    assert found.neighbours[2].tolist() == [0, 1, 3, 4]
    assert found.similarity[2].tolist() == [1, 1, 0, -1]
    assert found.similarity[3].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n", [0, 1])
def test_of_none_and_of_one(n: int) -> None:
    found = nearest_features(np.ones((n, 1), np.float32), np.zeros(n, np.int64), 3)
    assert found.neighbours.tolist() == [[-1] * 3] * n


def behaviours(n: int = 6000, d: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Features of 1,500 neurons: four in ten are one of 150 behaviours, the others are noise."""
    rng = np.random.default_rng(2)
    vectors = unit(rng, n, d)
    shared = rng.random(n) < 0.4
    vectors[shared] = unit(rng, 150, d)[rng.integers(150, size=shared.sum())]
    vectors[shared] += 0.5 * unit(rng, int(shared.sum()), d)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16), np.sort(rng.integers(0, 1500, n))


def test_cells_find_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(similar, "_COMPARED", 1500)  # of 6,000
    vectors, owners = behaviours()
    exact = nearest_features(vectors, owners, exact=True)
    steps: list[float] = []
    found = nearest_features(vectors, owners, exact=False, progress=steps.append)
    hit = (exact.neighbours[:, :, None] == found.neighbours[:, None, :]).any(axis=2)
    assert hit[exact.similarity > 0.7].mean() > 0.999
    assert hit.mean() > 0.95
    assert all(len(set(rows)) == 5 for rows in found.neighbours.tolist())
    assert not (owners[found.neighbours] == owners[:, None]).any()
    # The search is approximate in what it finds, not in how similar that is.
    for row in range(0, len(vectors), 500):
        similarity = vectors[found.neighbours[row]].astype(np.float64) @ vectors[row]
        np.testing.assert_allclose(found.similarity[row], similarity, atol=1e-5)
    assert (np.diff(found.similarity, axis=1) <= 0).all()
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1)


def test_cells_find_the_one_that_is_near_among_random_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(similar, "_COMPARED", 1500)  # of 6,000
    rng = np.random.default_rng(4)
    vectors = unit(rng, 6000, 256)
    for at, similarity in ((0, 0.9), (1000, 0.6)):
        first, second = vectors[at : at + 500], unit(rng, 500, 256)
        second -= (second * first).sum(axis=1, keepdims=True) * first
        second /= np.linalg.norm(second, axis=1, keepdims=True)
        second = similarity * first + np.sqrt(1 - similarity**2) * second
        vectors[at + 500 : at + 1000] = second
    found = nearest_features(vectors, np.arange(6000), exact=False)
    partner = np.arange(6000) + np.where(np.arange(6000) % 1000 < 500, 500, -500)
    hit = found.neighbours[:, 0] == partner
    assert hit[:1000].mean() > 0.99
    assert hit[1000:2000].mean() > 0.9


@pytest.mark.parametrize("d", [1, 3])
def test_cells_of_few_dimensions_and_zeros(d: int) -> None:
    pytest.importorskip("faiss")
    vectors = unit(np.random.default_rng(5), 700, d)
    vectors[::7] = 0
    owners = np.arange(700) // 2
    found = nearest_features(vectors, owners, exact=False)
    assert (found.similarity[::7] == 0).all()
    near = np.delete(np.arange(700), slice(None, None, 7))
    assert (found.similarity[near] > 0.9).all()
    # A vector that nothing is compared with has no neighbours, rather than wrong ones.
    alone = nearest_features(vectors, np.zeros(700, np.int64), exact=False)
    assert (alone.neighbours == -1).all()
    assert np.isnan(alone.similarity).all()


def test_cells_are_the_same_each_time_and_read_a_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    vectors, owners = behaviours(2000)
    first = nearest_features(vectors, owners, exact=False)
    # In one thread as in two.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float16, "r", shape=vectors.shape)
    second = nearest_features(mapped, owners, exact=False)
    assert first.neighbours.tobytes() == second.neighbours.tobytes()
    assert first.similarity.tobytes() == second.similarity.tobytes()


@pytest.mark.parametrize(
    "way", ["in single precision", "a few visitors at a time", "for many neighbours"]
)
def test_cells_find_what_is_near_in_each_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(similar, "_COMPARED", 1000)  # of 3,000
    vectors, owners = behaviours(3000)
    k = 20 if way == "for many neighbours" else 5
    if way == "in single precision":
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    elif way == "a few visitors at a time":
        for name in ("_PRODUCTS", "_MEASURED"):
            monkeypatch.setattr(similar, name, 1)
        monkeypatch.setattr(similar, "_READ", 10_000)
    exact = nearest_features(vectors, owners, k, exact=True)
    found = nearest_features(vectors, owners, k, exact=False)
    hit = (exact.neighbours[:, :, None] == found.neighbours[:, None, :]).any(axis=2)
    assert hit[exact.similarity > 0.7].mean() > 0.999
    assert hit.mean() > 0.9
    assert not (owners[found.neighbours] == owners[:, None]).any()


@given(st.integers(0, 2**32), st.integers(1, 20), st.sampled_from([256, 512]))
def test_the_best_of_columns_equal_a_sort(seed: int, k: int, n: int) -> None:
    torch = pytest.importorskip("torch")
    values = torch.from_numpy(np.random.default_rng(seed).integers(-40, 40, (n, 3)) / 8)
    rows, most = similar._best_of_columns(values, k)
    assert rows.shape == most.shape == (3, k)
    assert (values.T.gather(1, rows) == most).all()
    assert all(len(set(row)) == k for row in rows.tolist())
    expected = np.sort(values.numpy(), axis=0)[::-1][:k].T
    np.testing.assert_array_equal(np.sort(most.numpy(), axis=1)[:, ::-1], expected)


def test_the_copy_is_made_in_the_folder_and_leaves_nothing(tmp_path: Any) -> None:
    pytest.importorskip("faiss")
    vectors, owners = behaviours(1000)
    nearest_features(vectors, owners, exact=False, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        nearest_features(vectors, owners, exact=False, folder=tmp_path / "none")


def test_many_vectors_are_divided_into_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar, "MOST_EXACT", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    vectors = unit(np.random.default_rng(3), 11, 4)
    assert (nearest_features(vectors[:10], np.arange(10)).neighbours >= 0).all()
    with pytest.raises(
        MissingDependencyError,
        match=r"among more than 10 needs faiss-cpu.*pip install 'polyseme\[torch\]'",
    ):
        nearest_features(vectors, np.arange(11))


@pytest.mark.parametrize(
    ("vectors", "owners", "k", "match"),
    [
        (np.ones(3, np.float32), [0, 1, 2], 5, r"vectors has shape \(3,\) and dtype float32"),
        (np.ones((3, 2), int), [0, 1, 2], 5, r"dtype int64; expected floats of shape \(n, d\)"),
        (np.ones((3, 2)), [0, 1], 5, r"owners has shape \(2,\).*each of the 3 vectors"),
        (np.ones((3, 2)), [0, 2, 1], 5, r"owners\[2\] is 1, after 2; expected ascending order"),
        (np.ones((3, 2)), [0, 1, 2], 0, r"k is 0; a whole number of at least 1"),
        (np.ones((3, 2)), [0, 1, 2], True, r"k is True; a whole number of at least 1"),
    ],
)
def test_nearest_features_rejects_invalid_arguments(
    vectors: Any, owners: Any, k: Any, match: str
) -> None:
    with pytest.raises(InputError, match=match):
        nearest_features(vectors, owners, k)
