"""The maths of neuron embeddings: arrays in, arrays out; no models and no files."""

from polyseme.core.clustering import Clustering, Clusterings, cluster, cluster_many, cut_trees
from polyseme.core.distances import cosine_distances
from polyseme.core.embeddings import gated_gradient, neuron_embeddings
from polyseme.core.features import assign, feature_centres, medoids
from polyseme.core.metrics import (
    Polysemanticity,
    background_distance,
    participation_ratio,
    polysemanticity,
)

__all__ = [
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
    "gated_gradient",
    "medoids",
    "neuron_embeddings",
    "participation_ratio",
    "polysemanticity",
]
