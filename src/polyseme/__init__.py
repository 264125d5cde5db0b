"""Split any neuron into its meanings.

polyseme finds what activates each neuron of a trained model, tells the neuron's distinct
behaviours apart by clustering neuron embeddings, and measures how polysemantic it is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The module of each public name. It is imported when the name is first used, so that reading a run
# does not need torch, and `import polyseme` is instant.
_NAMES = {
    "AboveFraction": "capture",
    "Clustering": "core",
    "Contexts": "data",
    "FirstActive": "capture",
    "Images": "data",
    "MLPSite": "sites",
    "Meanings": "core",
    "Neuron": "views",
    "Polysemanticity": "core",
    "PolysemeError": "errors",
    "Probe": "views",
    "Run": "views",
    "Stratified": "capture",
    "TopK": "capture",
    "analyse": "analysis",
    "analyse_shard": "analysis",
    "attach_sae": "sites",
    "cluster": "core",
    "compare": "evaluate.compare",
    "digits": "data",
    "evaluate_splice": "evaluate.sae",
    "explore": "explorer",
    "export": "explorer",
    "find_mlp_sites": "sites",
    "gated_gradient": "core",
    "list_sites": "sites",
    "load_language_model": "sites.language",
    "load_sae": "sae",
    "meanings": "core",
    "merge": "analysis",
    "ne_loss": "sae",
    "neuron_embeddings": "core",
    "neuron_importances": "analysis.importances",
    "next_tokens": "evaluate.sae",
    "open_run": "opening",
    "participation_ratio": "core",
    "polysemanticity": "core",
    "read_images": "data",
    "read_text": "data",
    "sweep": "evaluate.sweep",
    "token_vectors": "analysis",
    "train_sae": "sae",
}
_NEED_TORCH = frozenset({"analysis", "capture", "evaluate", "sae", "sites"})

__all__ = [*_NAMES, "__version__"]

if TYPE_CHECKING:
    from polyseme.analysis import analyse, analyse_shard, merge, token_vectors
    from polyseme.analysis.importances import neuron_importances
    from polyseme.capture import AboveFraction, FirstActive, Stratified, TopK
    from polyseme.core import (
        Clustering,
        Meanings,
        Polysemanticity,
        cluster,
        gated_gradient,
        meanings,
        neuron_embeddings,
        participation_ratio,
        polysemanticity,
    )
    from polyseme.data import Contexts, Images, digits, read_images, read_text
    from polyseme.errors import PolysemeError
    from polyseme.evaluate.compare import compare
    from polyseme.evaluate.sae import evaluate_splice, next_tokens
    from polyseme.evaluate.sweep import sweep
    from polyseme.explorer import explore, export
    from polyseme.opening import open_run
    from polyseme.sae import load_sae, train_sae
    from polyseme.sae.ne_loss import ne_loss
    from polyseme.sites import MLPSite, attach_sae, find_mlp_sites, list_sites
    from polyseme.sites.language import load_language_model
    from polyseme.views import Neuron, Probe, Run


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'polyseme' has no attribute {name!r}")
    home = _NAMES[name]
    try:
        module = importlib.import_module(f"polyseme.{home}")
    except ModuleNotFoundError as error:
        if home.partition(".")[0] in _NEED_TORCH and error.name == "torch":
            from polyseme.errors import MissingDependencyError

            raise MissingDependencyError(f"polyseme.{name}", "torch", "torch") from error
        raise
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
