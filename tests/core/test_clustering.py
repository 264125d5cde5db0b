"""Trees, cuts and the clustering of a whole site, against the oracle and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score

from polyseme.core import (
    Clusterings,
    cluster,
    cluster_many,
    cut_trees,
    neuron_embeddings,
    polysemanticity,
)
from polyseme.core.distances import cosine_matrices
from polyseme.errors import InputError
from reference import oracles, published

from .test_distances import some_vectors

METRICS = ("max_distance", "mean_distance", "intra_cluster_distance", "inter_cluster_distance")
LINKAGES = ("average", "single")


def blobs(seed: int, n: int, d: int = 6, spread: float = 0.4) -> np.ndarray:
    """Vectors around a few directions: something to cluster, without ties."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((3, d))
    lengths = rng.uniform(0.5, 3, (n, 1))
    return lengths * (centres[rng.integers(0, 3, n)] + spread * rng.standard_normal((n, d)))


def groups_of(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == k).tolist()) for k in np.unique(labels)}


# --- one neuron ----------------------------------------------------------------------------


@pytest.mark.parametrize("linkage", LINKAGES)
@given(st.integers(0, 10_000), st.integers(2, 14), st.sampled_from([0.02, 0.1, 0.3, 0.9, 1.5]))
@settings(max_examples=25)
def test_equals_the_oracle(linkage: str, seed: int, n: int, threshold: float) -> None:
    vectors = blobs(seed, n)
    merges = oracles.linkage(oracles.cosine_distances(vectors), linkage)
    found = cluster(vectors, threshold, linkage)
    assert found.labels.tolist() == oracles.cut(merges, n, threshold)
    heights = [height for _, _, height in merges]
    np.testing.assert_allclose(found.tree[:, 2], heights, atol=1e-12)
    assert found.tree[:, 3].tolist() == [len(a) + len(b) for a, b, _ in merges]
    assert found.n_clusters == len(set(found.labels.tolist()))
    assert (found.threshold, found.linkage) == (threshold, linkage)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.8])
def test_equals_scikit_learn(dtype: type, linkage: str, threshold: float) -> None:
    for seed in range(5):
        vectors = blobs(seed, 60).astype(dtype)
        expected = AgglomerativeClustering(
            n_clusters=None, metric="cosine", linkage=linkage, distance_threshold=threshold
        ).fit_predict(vectors.astype(np.float64))
        for found in (
            cluster(vectors, threshold, linkage).labels,
            cluster_many(vectors[None], threshold=threshold, linkage=linkage).labels[0],
        ):
            assert adjusted_rand_score(expected, found) == 1


def test_the_tree_is_one_that_scipy_reads() -> None:
    from scipy.cluster.hierarchy import fcluster, is_valid_linkage

    found = cluster(blobs(3, 40), 0.3)
    assert is_valid_linkage(found.tree)
    expected = fcluster(found.tree, 0.3, criterion="distance")
    assert adjusted_rand_score(expected, found.labels) == 1


def test_clusters_are_numbered_by_size_then_by_first_example() -> None:
    x, y, z, u = np.eye(4)
    # z and u have two members each, and z comes first; x and y are alone.
    found = cluster([x, z, u, y, u, z], 0.1)
    assert found.labels.tolist() == [2, 0, 1, 3, 1, 0]
    # A larger cluster comes first however late it begins.
    assert cluster([x, y, y], 0.1).labels.tolist() == [1, 0, 0]


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from(LINKAGES))
@settings(max_examples=40)
def test_the_numbering_rule_holds(seed: int, n: int, linkage: str) -> None:
    labels = cluster(some_vectors(seed, n, 3), 0.3, linkage).labels
    sizes = np.bincount(labels)
    first = [int(np.flatnonzero(labels == k)[0]) for k in range(len(sizes))]
    keys = list(zip((-sizes).tolist(), first, strict=True))
    assert keys == sorted(keys)
    assert (sizes > 0).all()


@given(st.integers(0, 10_000), st.integers(1, 25), st.sampled_from(LINKAGES))
@settings(max_examples=25)
def test_cutting_anew_equals_a_fresh_clustering(seed: int, n: int, linkage: str) -> None:
    vectors = some_vectors(seed, n, 4)
    coarser: set[frozenset[int]] | None = None
    held = cluster(vectors, 0.05, linkage)
    for threshold in (2.0, 1.0, 0.7, 0.3, 0.1, 0.01):
        anew, fresh = held.cut(threshold), cluster(vectors, threshold, linkage)
        assert anew.labels.tolist() == fresh.labels.tolist()
        assert (anew.threshold, anew.linkage) == (threshold, linkage)
        assert np.array_equal(anew.tree, held.tree)
        finer = groups_of(anew.labels)
        # Monotonic: each cluster lies within one at the larger threshold.
        assert coarser is None or all(any(a <= b for b in coarser) for a in finer)
        coarser = finer


def test_a_merge_at_the_threshold_itself_is_not_made() -> None:
    found = cluster([[1, 0], [0, 1]], 1.0)
    assert found.tree[0, 2] == 1
    assert found.labels.tolist() == [0, 1]
    assert found.cut(np.nextafter(1, 2)).labels.tolist() == [0, 0]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_pairs_that_merge_at_the_threshold_itself_are_across_clusters(linkage: str) -> None:
    vectors = np.array([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    found = cluster_many(vectors[None], threshold=1.0, linkage=linkage)
    assert found.trees[0, :, 2].tolist() == [0, 1]
    assert found.n_clusters.tolist() == [2]
    assert found.intra_cluster_distance.tolist() == [0]
    assert found.inter_cluster_distance.tolist() == [1]
    expected = polysemanticity(vectors, found.labels[0]).as_dict()
    assert found.metrics(0).as_dict() == pytest.approx(expected)


def test_no_example_and_one() -> None:
    none = cluster(np.empty((0, 3)))
    assert none.labels.shape == (0,)
    assert none.tree.shape == (0, 4)
    assert none.n_clusters == 0
    assert none.cut(0.3).n_clusters == 0
    one = cluster([[0.0, 0.0]])
    assert one.labels.tolist() == [0]
    assert one.tree.shape == (0, 4)
    assert one.cut(2).labels.tolist() == [0]


def test_duplicates_are_at_distance_nought() -> None:
    vectors = np.tile(np.random.default_rng(0).standard_normal((1, 50)), (6, 1))
    scaled = vectors * np.arange(1, 7)[:, None]
    for same in (vectors, scaled):
        found = cluster(same, 1e-12)
        assert found.n_clusters == 1
        np.testing.assert_allclose(found.tree[:, 2], 0, atol=1e-15)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_zero_vectors_are_at_distance_one_from_all(linkage: str) -> None:
    vectors = [[0, 0], [1, 0], [0, 0], [2, 0]]
    found = cluster(vectors, 0.99, linkage)
    assert found.labels.tolist() == [1, 0, 2, 0]
    assert found.tree[:, 2].tolist() == [0, 1, 1]
    assert found.cut(1.01).n_clusters == 1


def test_single_linkage_chains_and_average_does_not() -> None:
    angles = np.deg2rad([0, 10, 20, 30, 40])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert cluster(vectors, 0.02, "single").n_clusters == 1
    assert cluster(vectors, 0.02, "average").n_clusters > 1


def test_tensors_are_taken() -> None:
    vectors = blobs(0, 12)
    for tensor in (torch.tensor(vectors, requires_grad=True), torch.tensor(vectors).half()):
        assert adjusted_rand_score(cluster(tensor, 0.2).labels, cluster(vectors, 0.2).labels) == 1


# --- many neurons --------------------------------------------------------------------------


def ragged(seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    n_neurons, n = 45, 14
    counts = rng.integers(0, n + 1, n_neurons)
    counts[:4] = 0, 1, 2, n
    values = np.stack([blobs(seed * 100 + j, n) for j in range(n_neurons)]).astype(dtype)
    # What lies beyond a neuron's count is never looked at.
    values[np.arange(n) >= counts[:, None]] = np.nan
    return values, counts


@pytest.mark.parametrize("linkage", LINKAGES)
def test_many_equal_the_oracle(linkage: str) -> None:
    values, counts = ragged(0)
    found = cluster_many(values, counts, threshold=0.3, linkage=linkage)
    for j, count in enumerate(counts):
        vectors = values[j, :count]
        labels = oracles.cluster(vectors, 0.3, linkage)
        assert found.labels[j].tolist() == labels + [-1] * (values.shape[1] - count)
        expected = oracles.metrics(vectors, labels)
        assert found.metrics(j).as_dict() == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("linkage", LINKAGES)
def test_one_call_equals_a_call_for_each_neuron(dtype: type, linkage: str) -> None:
    values, counts = ragged(1, dtype)
    together = cluster_many(values, counts, threshold=0.2, linkage=linkage)
    assert len(together) == len(counts)
    for j, (count, found) in enumerate(zip(counts, together, strict=True)):
        alone = cluster(values[j, :count], 0.2, linkage)
        assert found.labels.tolist() == alone.labels.tolist()
        np.testing.assert_allclose(found.tree[:, 2], alone.tree[:, 2], atol=1e-6)
        assert np.array_equal(found.tree[:, 3], alone.tree[:, 3])
        assert not together.trees[j, max(count - 1, 0) :].any()
        assert found.cut(0.4).labels.tolist() == alone.cut(0.4).labels.tolist()
        expected = polysemanticity(values[j, :count], alone.labels).as_dict()
        assert together.metrics(j).as_dict() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_cosines_that_are_known_are_not_worked_out_again() -> None:
    values, counts = ragged(2)
    used = np.arange(values.shape[1]) < counts[:, None]
    cosines = cosine_matrices(np.where(used[:, :, None], values, 0), used)
    found = cluster_many(values, counts, threshold=0.3, cosines=cosines)
    expected = cluster_many(values, counts, threshold=0.3)
    assert np.array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.trees, expected.trees, atol=1e-12)


def test_without_counts_every_row_is_an_example() -> None:
    values = np.stack([blobs(j, 9) for j in range(3)])
    full = cluster_many(values, np.full(3, 9), threshold=0.2)
    assert_same_bits(cluster_many(values, threshold=0.2), full)
    assert full.n_examples.tolist() == [9, 9, 9]


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (0, 0, 0)])
def test_nothing_to_cluster(shape: tuple[int, ...]) -> None:
    found = cluster_many(np.empty(shape))
    assert found.labels.shape == shape[:2]
    assert found.n_clusters.tolist() == [0] * shape[0]
    assert np.isnan(found.mean_distance).all()


def assert_same_bits(a: Clusterings, b: Clusterings) -> None:
    for name in ("labels", "trees", "n_examples", "n_clusters", *METRICS):
        assert getattr(a, name).tobytes() == getattr(b, name).tobytes(), name


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_number_of_threads_changes_no_bit(linkage: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 40, 50)).astype(np.float32)
    counts = rng.integers(0, 41, 64)
    one = cluster_many(values, counts, linkage=linkage, threads=1)
    assert_same_bits(one, cluster_many(values, counts, linkage=linkage, threads=2))
    assert_same_bits(one, cluster_many(values, counts, linkage=linkage))


@pytest.mark.parametrize("exponent", [-38, -30, -18, 18, 30])
@pytest.mark.parametrize("threads", [1, 2])
def test_single_precision_beyond_where_squares_fit(exponent: int, threads: int) -> None:
    values = np.stack([blobs(j, 8) for j in range(20)]).astype(np.float32)
    values /= np.abs(values).max()
    scaled = values * np.float32(10.0**exponent)
    expected = cluster_many(values, threshold=0.2, threads=threads)
    found = cluster_many(scaled, threshold=0.2, threads=threads)
    assert np.array_equal(found.labels, expected.labels)
    # The smallest of these numbers have fewer digits themselves.
    np.testing.assert_allclose(
        found.mean_distance, expected.mean_distance, atol=1e-6 if exponent > -38 else 1e-3
    )


@pytest.mark.parametrize("huge", [1e30, 1e-30])
def test_a_wild_neuron_leaves_its_neighbours_alone(huge: float) -> None:
    values = np.stack([blobs(j, 8) for j in range(20)]).astype(np.float32)
    expected = cluster_many(values, threshold=0.2)
    values[7, 3] *= np.float32(huge)
    values[9, 2] = 0
    found = cluster_many(values, threshold=0.2)
    same = np.arange(20) != 9
    assert np.array_equal(found.labels[same], expected.labels[same])
    np.testing.assert_allclose(found.max_distance[same], expected.max_distance[same], atol=1e-6)


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    vectors = blobs(0, 5)
    vectors[3, 2] = bad
    message = rf"embeddings holds {bad} at index \(3, 2\); every value must be finite: leave such"
    with pytest.raises(InputError, match=message):
        cluster(vectors)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("neuron", [0, 17, 33, 39])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_values_that_are_not_finite_in_any_neuron(
    dtype: type, neuron: int, bad: float, threads: int
) -> None:
    values = np.stack([blobs(j, 6) for j in range(40)]).astype(dtype)
    counts = np.full(40, 6)
    counts[10] = 4
    values[neuron, 2, 4] = bad
    message = rf"embeddings\[{neuron}\] holds {bad} at index \(2, 4\); every value must be finite"
    with pytest.raises(InputError, match=message):
        cluster_many(values, counts, threads=threads)
    # Also where it is the neuron's only example.
    values[neuron, 0, 1] = bad
    counts[neuron] = 1
    message = rf"embeddings\[{neuron}\] holds {bad} at index \(0, 1\); every value must be finite"
    with pytest.raises(InputError, match=message):
        cluster_many(values, counts, threads=threads)
    counts[neuron] = 0
    assert cluster_many(values, counts, threads=threads).n_clusters[neuron] == 0


@pytest.mark.parametrize("threshold", [0, -0.1, 2.001, np.nan, np.inf, None, "a", "", [0.1, 0.2]])
def test_thresholds_out_of_range(threshold: object) -> None:
    message = "expected a cosine distance greater than 0 and at most 2. The published"
    vectors = blobs(0, 4)
    for call in (
        lambda: cluster(vectors, threshold),  # type: ignore[arg-type]
        lambda: cluster_many(vectors[None], threshold=threshold),  # type: ignore[arg-type]
        lambda: cluster(vectors).cut(threshold),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert str(caught.value).startswith(f"threshold is {threshold!r}; ")


def test_other_bad_arguments() -> None:
    vectors = blobs(0, 4)
    with pytest.raises(
        InputError,
        match=r"Unknown linkage: 'averge'. Did you mean 'average'\? "
        r"Must be one of: average, single\.",
    ):
        cluster(vectors, linkage="averge")
    with pytest.raises(InputError, match=r"Unknown linkage: 'None'"):
        cluster(vectors, linkage=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"embeddings has shape \(6,\); an array of 2 dimensions"):
        cluster(vectors[0])
    with pytest.raises(InputError, match=r"embeddings has shape \(4, 6\); an array of 3 dimens"):
        cluster_many(vectors)
    for counts in ([4, 4], [5], [-1]):
        with pytest.raises(InputError, match=r"counts is .*; 1 integers from 0 to 4 are expected"):
            cluster_many(vectors[None], counts)
    with pytest.raises(InputError, match="embeddings holds object values; expected real numbers"):
        cluster([[None, 1]])


def test_cut_trees_of_many_neurons_equal_single_cuts() -> None:
    values = np.stack([blobs(j, 10) for j in range(7)])
    trees = cluster_many(values).trees
    found = cut_trees(trees, 0.3)
    for tree, labels in zip(trees, found, strict=True):
        assert cut_trees(tree[None], 0.3)[0].tolist() == labels.tolist()


# --- published results ---------------------------------------------------------------------


@pytest.mark.parametrize("site", ["hidden", "sae"])
@pytest.mark.parametrize("together", [False, True], ids=["cluster", "cluster_many"])
def test_published_clusters_and_metrics(shared_data: Path, site: str, together: bool) -> None:
    w = published.weights(shared_data)
    x = published.digits(shared_data)
    neurons = {
        int(j): neuron
        for j, neuron in published.results(shared_data)[site].items()
        if len(neuron["examples"]) >= 2
    }
    assert len(neurons) == {"hidden": 61, "sae": 382}[site]
    counts = np.array([len(neuron["examples"]) for neuron in neurons.values()])
    embeddings = np.zeros((len(neurons), 100, 784 if site == "hidden" else 64), np.float32)
    for row, (j, neuron) in zip(embeddings, neurons.items(), strict=True):
        h = x[neuron["examples"]]
        if site == "hidden":
            row[: len(h)] = neuron_embeddings(h, w["mlp.hidden.weight"][j])
        else:
            h = np.maximum(h @ w["mlp.hidden.weight"].T + w["mlp.hidden.bias"], 0)
            row[: len(h)] = neuron_embeddings(h, w["sae.encoder.weight"][j])
    threshold = published.THRESHOLDS[site]
    many = cluster_many(embeddings, counts, threshold=threshold) if together else None
    for at, (j, neuron) in enumerate(neurons.items()):
        if many is not None:
            labels, found = many[at].labels, many.metrics(at)
        else:
            labels = cluster(embeddings[at, : counts[at]], threshold).labels
            found = polysemanticity(embeddings[at, : counts[at]], labels)
        assert adjusted_rand_score(neuron["labels"], labels) == 1, j
        expected = {
            ours: float("nan") if neuron["metrics"][theirs] is None else neuron["metrics"][theirs]
            for ours, theirs in published.METRICS.items()
        }
        assert found.as_dict() == pytest.approx(expected, abs=1e-6, rel=0, nan_ok=True), j
