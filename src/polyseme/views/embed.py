"""Neuron embeddings from what a run holds of a site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyseme.core import gate_factors
from polyseme.errors import RunError
from polyseme.store import SiteInfo

#: the arrays of a site that say how its neurons embed
EMBEDDED_BY = ("weights", "up_weights", "gate_bias", "up_bias")


def embeddings_of(
    info: SiteInfo,
    arrays: Mapping[str, NDArray[Any]],
    vectors: NDArray[Any],
    neurons: NDArray[np.int64],
) -> NDArray[np.floating[Any]]:
    """Neuron embeddings of pre-neuron embeddings, each for a neuron of its own.

    Parameters
    ----------
    info : SiteInfo
    arrays : mapping of str to ndarray
        Of the site's file.
    vectors : ndarray, shape (m, d_in)
    neurons : ndarray of int64, shape (m,)

    Returns
    -------
    ndarray, shape (m, d_in)
    """
    if vectors.dtype == np.float16:
        vectors = vectors.astype(np.float32)
    weights = arrays["weights"][neurons]
    if info.kind != "gated":
        return np.asarray(vectors * weights)
    gate = info.extra.get("gate")
    if not isinstance(gate, str) or "up_weights" not in arrays:
        raise RunError(
            f"The run does not hold what the embeddings of the gated neurons of {info.name!r} "
            "are made of, as their nonlinearity is none that polyseme knows: silu, gelu, "
            "gelu_tanh, relu or sigmoid."
        )
    up = arrays["up_weights"][neurons]
    g = np.einsum("md,md->m", vectors, weights) + arrays["gate_bias"][neurons]
    u = np.einsum("md,md->m", vectors, up) + arrays["up_bias"][neurons]
    of_gate, of_up = gate_factors(g, u, gate)
    return np.asarray(vectors * (of_gate[:, None] * weights + of_up[:, None] * up))
