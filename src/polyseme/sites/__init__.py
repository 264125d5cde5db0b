"""Layers of neurons in models: kinds of sites, finding them, and reading them."""

from polyseme.sites.encoders import SAESite
from polyseme.sites.find import find_sites, list_sites
from polyseme.sites.hooks import Feed, edit_site, evaluating, read_sites, stopping_after
from polyseme.sites.mlp import MLPSite
from polyseme.sites.proof import prove_sites, sites_that_run
from polyseme.sites.reading import Reading
from polyseme.sites.saes import attach_sae
from polyseme.sites.site import Site
from polyseme.sites.transformer import find_mlp_sites

__all__ = [
    "Feed",
    "MLPSite",
    "Reading",
    "SAESite",
    "Site",
    "attach_sae",
    "edit_site",
    "evaluating",
    "find_mlp_sites",
    "find_sites",
    "list_sites",
    "prove_sites",
    "read_sites",
    "sites_that_run",
    "stopping_after",
]
