"""Finding a run's sites in its model, and proving that it is the run's model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from polyseme.errors import InputError, SiteError
from polyseme.sites import Site, find_mlp_sites, find_sites
from polyseme.sites.saes import attach_sae
from polyseme.views import Neuron, Run


def sites_of_run(
    run: Run, model: nn.Module, names: Sequence[str], saes: Mapping[str, Any]
) -> list[Site]:
    """Find sites of a model by their names in a run, in the run's order.

    Parameters
    ----------
    run : Run
    model : torch.nn.Module
    names : sequence of str
        Names of sites in the run.
    saes : mapping of str to SAE
        By site name, for sites that are SAEs at a hook point.

    Raises
    ------
    InputError
        If the model has no such site, or one of another shape, or if an SAE is missing.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}; expected the torch.nn.Module that was analysed."
        )
    infos = [run.site(name) for name in names]
    hooked = [info for info in infos if isinstance(info.extra.get("hook"), str)]
    missing = [info.name for info in hooked if info.name not in saes]
    if missing:
        raise InputError(
            f"Site {missing[0]!r} of the run is an SAE at {run.site(missing[0]).extra['hook']!r}; "
            f"give the SAE by the site's name, saes={{...}} (--sae on the command line), or choose "
            "other sites."
        )
    folded = [info.name for info in infos if info.extra.get("folded")]
    plain = [info.name for info in infos if info not in hooked and info.name not in folded]
    try:
        sites: list[Site] = find_sites(model, plain) if plain else []
        sites += find_mlp_sites(model, folded, fold_layer_norm=True) if folded else []
        for info in hooked:
            sites.append(attach_sae(model, saes[info.name], info.extra["hook"], name=info.name))
    except SiteError as error:
        raise InputError(
            f"The model is not the one of the run, which was a {run.metadata['model']['class']}: "
            f"{error}"
        ) from error
    by_name = {site.name: site for site in sites}
    for info in infos:
        site = by_name.get(info.name)
        if site is None or (site.n_neurons, site.d_in) != (info.n_neurons, info.d_in):
            shape = "no such site" if site is None else f"{site.n_neurons} of {site.d_in} values"
            raise InputError(
                f"Site {info.name!r} of the run has {info.n_neurons} neurons that read "
                f"{info.d_in} values, but the model has {shape}; give the model that was analysed."
            )
    return [by_name[info.name] for info in infos]


def same_weights(neuron: Neuron, site: Site) -> None:
    """Check, by its input weights, that a neuron of a run is the model's.

    Raises
    ------
    InputError
        The weights differ by more than the rounding of half precision.
    """
    stored, current = neuron.weights, site.weights()[neuron.number].float().cpu().numpy()
    scale = float(np.abs(stored).max(initial=0))
    if not np.allclose(stored, current, rtol=0.02, atol=0.01 * scale):
        raise InputError(
            f"Neuron {neuron.number} of site {site.name!r} has different weights in the model and "
            f"in the run; give the model that was analysed."
        )
