"""The maths of neuron embeddings: arrays in, arrays out; no models and no files."""

from polyseme.core.clustering import Clustering, Clusterings, cluster, cluster_many, cut_trees
from polyseme.core.distances import cosine_distances
from polyseme.core.embeddings import GATES, gate_factors, gated_gradient, neuron_embeddings
from polyseme.core.features import assign, feature_centres, medoids, medoids_many
from polyseme.core.layout import principal_coordinates
from polyseme.core.metrics import (
    Polysemanticity,
    background_distance,
    gated_background_distance,
    participation_ratio,
    polysemanticity,
)

__all__ = [
    "GATES",
    "Clustering",
    "Clusterings",
    "Polysemanticity",
    "assign",
    "background_distance",
    "cluster",
    "cluster_many",
    "cosine_distances",
    "cut_trees",
    "feature_centres",
    "gate_factors",
    "gated_background_distance",
    "gated_gradient",
    "medoids",
    "medoids_many",
    "neuron_embeddings",
    "participation_ratio",
    "polysemanticity",
    "principal_coordinates",
]
