"""The sites of a model, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn

from polyseme.capture.layers import (
    ConvSite,
    HiddenSite,
    LinearSite,
    SAESite,
    Site,
    is_sae,
    layer_site,
    sae_encoder,
)
from polyseme.capture.mlp import MLPSite
from polyseme.capture.reading import Reading
from polyseme.capture.transformer import find_mlp_sites, is_transformer, refuse_quantised
from polyseme.errors import SiteError, one_of

__all__ = [
    "ConvSite",
    "HiddenSite",
    "LinearSite",
    "MLPSite",
    "Reading",
    "SAESite",
    "Site",
    "find_sites",
    "list_sites",
]


def list_sites(model: nn.Module) -> list[Site]:
    """Every layer of a model whose neurons can be analysed, in the order of its modules.

    An SAE counts as one site; a model that is an SAE goes by the name of its encoder. So does
    an MLP of a transformers language model: its linear layers are not listed.
    """
    sites: list[Site] = []
    inside: list[str] = []
    mlps = {id(layer): mlp for mlp in _mlps(model) for layer in (mlp.module, *mlp.layers)}
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if (mlp := mlps.get(id(module))) is not None:
            if module is mlp.module:
                sites.append(mlp)
            continue
        site = layer_site(name, module)
        if site is None:
            continue
        if isinstance(site, SAESite):
            inside.append(f"{name}." if name else "")
            site.name = name or ("encoder" if sae_encoder(module) is not None else "W_enc")
        sites.append(site)
    return sites


def _mlps(model: nn.Module) -> list[MLPSite]:
    if not is_transformer(model):
        return []
    refuse_quantised(model)
    try:
        return find_mlp_sites(model)
    except SiteError:
        # A model of images, say: it is read by its layers.
        return []


def find_sites(model: nn.Module, names: str | Site | Iterable[str | Site]) -> list[Site]:
    """Sites of a model by name or by glob, in the order of the model's modules.

    Parameters
    ----------
    model : torch.nn.Module
    names : str, Site, or a list of them
        Names of modules, or globs over them, such as ``"features.*"``. The encoder of an SAE
        stands for the SAE, and so does the first layer of an MLP that has no module of its
        own (OPT, BERT); any other layer of an MLP is a site by itself.

    Raises
    ------
    SiteError
        For a name that the model does not have, or whose module has no neurons of its own.
    """
    if isinstance(names, str | Site):
        names = [names]
    found: dict[str, Site] = {}
    wanted = list(names) if isinstance(names, Iterable) else [names]
    given = bool(wanted) and all(isinstance(name, Site) for name in wanted)
    known = [] if given else list_sites(model)
    for name in wanted:
        if not isinstance(name, str | Site):
            raise SiteError(
                f"sites holds a {type(name).__name__} ({str(name)[:60]!r}); names of layers, as "
                f"text, are expected. {_choices(known)}"
            )
    for name in wanted:
        for site in [name] if isinstance(name, Site) else _match(model, known, name):
            if all(site.module is not other.module for other in found.values()):
                if site.name in found:
                    raise SiteError(
                        f"Two sites are called {site.name!r}; give one of them another name."
                    )
                found[site.name] = site
    if not found:
        raise SiteError(f"sites is {wanted!r}, which names no site. {_choices(known)}")
    order = {id(module): number for number, (_, module) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda site: order.get(id(site.module), len(order)))


def _choices(known: list[Site]) -> str:
    names = ", ".join(site.name for site in known[:12])
    more = f", … ({len(known)} in all)" if len(known) > 12 else ""
    if not known:
        return "The model has no layer that polyseme knows: Linear, Conv1D, Conv2d or an SAE."
    return f"The model's sites are: {names}{more}."


def _match(model: nn.Module, known: list[Site], name: str) -> list[Site]:
    by_name = {site.name: site for site in known}
    if name in by_name:
        return [by_name[name]]
    modules = dict(model.named_modules())
    if any(sign in name for sign in "*?["):
        matches = [site for site in known if fnmatch.fnmatchcase(site.name, name)]
        if not matches:
            raise SiteError(f"No site matches {name!r}. {_choices(known)}")
        return matches
    if name in modules and name:
        head = name.rpartition(".")[0]
        parent = modules[head]
        if is_sae(parent) and sae_encoder(parent) is modules[name]:
            return [SAESite(name, parent)]
        if (site := layer_site(name, modules[name])) is not None:
            return [site]
        inside = [site.name for site in known if site.name.startswith(f"{name}.")]
        remedy = f"Layers inside it are: {', '.join(inside[:8])}." if inside else _choices(known)
        raise SiteError(
            f"{name!r} is a {type(modules[name]).__name__}, which has no neurons of its own. "
            f"{remedy}"
        )
    raise SiteError(one_of("site", name, by_name))
