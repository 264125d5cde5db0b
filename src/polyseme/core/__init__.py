"""The maths of neuron embeddings: arrays in, arrays out; no models and no files."""

from polyseme.core.clustering import Clustering, Clusterings, cluster, cluster_many, cut_trees
from polyseme.core.coordinates import principal_coordinates
from polyseme.core.distances import cosine_distances
from polyseme.core.features import assign, feature_centres, medoids, medoids_many
from polyseme.core.meaning import Meanings, meanings, meanings_many
from polyseme.core.metrics import Polysemanticity, participation_ratio, polysemanticity
from polyseme.core.neurons import (
    Gated,
    General,
    Linear,
    Neurons,
    gated_gradient,
    neuron_embeddings,
    stored_neurons,
)

__all__ = [
    "Clustering",
    "Clusterings",
    "Gated",
    "General",
    "Linear",
    "Meanings",
    "Neurons",
    "Polysemanticity",
    "assign",
    "cluster",
    "cluster_many",
    "cosine_distances",
    "cut_trees",
    "feature_centres",
    "gated_gradient",
    "meanings",
    "meanings_many",
    "medoids",
    "medoids_many",
    "neuron_embeddings",
    "participation_ratio",
    "polysemanticity",
    "principal_coordinates",
    "stored_neurons",
]
