"""From a model and data to activations: sites, hooks, streaming selectors, attribution."""

from polyseme.capture.accumulate import Collected
from polyseme.capture.attribution import (
    LogitEffects,
    activation_gradient,
    activation_maps,
    count_classes,
    logit_effects,
)
from polyseme.capture.collect import Batch, Collector
from polyseme.capture.hooks import Feed, edit_site, evaluating, read_sites
from polyseme.capture.layers import Site
from polyseme.capture.mlp import MLPSite
from polyseme.capture.proof import prove_sites, sites_that_run
from polyseme.capture.reading import Reading
from polyseme.capture.saes import HookedSAE, attach_sae
from polyseme.capture.select import (
    AboveFraction,
    FirstActive,
    RandomActive,
    Selector,
    Stratified,
    TopK,
)
from polyseme.capture.sites import find_sites, list_sites
from polyseme.capture.stream import Selection, Stream
from polyseme.capture.transformer import find_mlp_sites

__all__ = [
    "AboveFraction",
    "Batch",
    "Collected",
    "Collector",
    "Feed",
    "FirstActive",
    "HookedSAE",
    "LogitEffects",
    "MLPSite",
    "RandomActive",
    "Reading",
    "Selection",
    "Selector",
    "Site",
    "Stratified",
    "Stream",
    "TopK",
    "activation_gradient",
    "activation_maps",
    "attach_sae",
    "count_classes",
    "edit_site",
    "evaluating",
    "find_mlp_sites",
    "find_sites",
    "list_sites",
    "logit_effects",
    "prove_sites",
    "read_sites",
    "sites_that_run",
]
