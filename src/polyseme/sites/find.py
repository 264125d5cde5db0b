"""The sites of a model, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import UninitializedParameter

from polyseme.errors import SiteError, one_of
from polyseme.sites.encoders import SAESite, layer_site, may_be_sae, sae_encoder
from polyseme.sites.layers import ConvSite, LinearSite, base_layer
from polyseme.sites.mlp import MLPSite
from polyseme.sites.reading import Reading
from polyseme.sites.site import HiddenSite, Site
from polyseme.sites.transformer import (
    find_mlp_sites,
    is_transformer,
    offloaded,
    refuse_quantised,
    unread,
)

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

    An SAE counts as one site; a model that is itself an SAE has the name of its encoder. An MLP of
    a transformers language model also counts as one site: its linear layers are not listed.
    """
    sites: list[Site] = []
    inside: list[str] = []
    hidden: set[int] = set()
    mlps = {id(layer): mlp for mlp in _mlps(model) for layer in (mlp.module, *mlp.layers)}
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if (mlp := mlps.get(id(module))) is not None:
            if module is mlp.module:
                sites.append(mlp)
            continue
        site = layer_site(name, module)
        if site is None or id(module) in hidden or not (name or isinstance(site, SAESite)):
            # A model that is a single layer has no name for it.
            continue
        if isinstance(site, SAESite):
            encoder = sae_encoder(module)
            site.name = name or ("W_enc" if encoder is None else "encoder")
            # The SAE's own layers; a larger model may have other layers beside them.
            hidden |= {id(encoder), id(getattr(module, "decoder", None))}
        if base_layer(module) is not None or hasattr(module, "W_enc"):
            inside.append(f"{name}." if name else "")
        sites.append(site)
    return _in_order(model, sites)


def _in_order(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of the model's modules; attached SAEs come last."""
    order = {id(module): number for number, module in enumerate(model.modules())}

    def place(site: Site) -> int:
        return order.get(id(site.output_module), 0) if id(site.module) in order else len(order)

    return sorted(sites, key=place)


def _mlps(model: nn.Module) -> list[MLPSite]:
    if not is_transformer(model):
        return []
    refuse_quantised(model)
    try:
        return find_mlp_sites(model)
    except SiteError:
        # For example, a model of images, which is read by its layers.
        return []


def find_sites(
    model: nn.Module,
    names: str | Site | Iterable[str | Site],
    *,
    exclude: str | Iterable[str] = (),
) -> list[Site]:
    """Find sites of a model by name or glob, in the order of the model's modules.

    Parameters
    ----------
    model : torch.nn.Module
    names : str, Site, or a list of them
        Names of modules, or globs over them, such as ``"features.*"``. The encoder of an SAE stands
        for the SAE, and the first layer of an MLP without a module of its own (OPT, BERT) stands
        for the MLP; any other layer of an MLP is its own site.
    exclude : str or list of str
        Names of sites to leave out, or globs over them.

    Raises
    ------
    SiteError
        For a name that the model does not have, or whose module has no neurons of its own.
    """
    if isinstance(names, str | Site):
        names = [names]
    sites: dict[str, Site] = {}
    wanted = list(names) if isinstance(names, Iterable) else [names]
    as_objects = bool(wanted) and all(isinstance(name, Site) for name in wanted)
    known = [] if as_objects else list_sites(model)
    for name in wanted:
        if not isinstance(name, str | Site):
            raise SiteError(
                f"sites holds a {type(name).__name__} ({str(name)[:60]!r}); expected names of "
                f"layers, as text. {_choices(known)}"
            )
    for name in wanted:
        for site in [name] if isinstance(name, Site) else _match(model, known, name):
            if all(site.module is not other.module for other in sites.values()):
                if site.name in sites:
                    raise SiteError(
                        f"Two sites are called {site.name!r}; give one of them another name."
                    )
                sites[site.name] = site
    if not sites:
        raise SiteError(f"sites is {wanted!r}, which names no site. {_choices(known)}")
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        left_out = [name for name in sites if fnmatch.fnmatchcase(name, pattern)]
        if not left_out:
            raise SiteError(
                f"exclude holds {pattern!r}, which matches none of the named sites: "
                f"{', '.join(list(sites)[:12])}."
            )
        sites = {name: site for name, site in sites.items() if name not in left_out}
    if not sites:
        raise SiteError(f"exclude is {exclude!r}, which leaves no sites of {wanted!r}.")
    for site in sites.values():
        _check_loaded(site)
    return _in_order(model, sites.values())


def _check_loaded(site: Site) -> None:
    """Refuse a layer without weights."""
    for parameter in site.module.parameters():
        if isinstance(parameter, UninitializedParameter):
            raise SiteError(
                f"Site {site.name!r} is a {type(site.module).__name__} that has no weights before "
                "its first call; run the model on a batch first."
            )
        if parameter.is_meta:
            raise SiteError(
                f"The weights of site {site.name!r} are on the meta device, which holds no "
                "numbers; load the model's weights first."
            )


def _choices(known: list[Site]) -> str:
    names = ", ".join(site.name for site in known[:12])
    suffix = f", … ({len(known)} in all)" if len(known) > 12 else ""
    if not known:
        return "The model has no layer that polyseme knows: Linear, Conv1D, Conv2d or an SAE."
    return f"The model's sites are: {names}{suffix}."


def _match(model: nn.Module, known: list[Site], name: str) -> list[Site]:
    by_name = {site.name: site for site in known}
    if name in by_name:
        return [by_name[name]]
    modules = dict(model.named_modules(remove_duplicate=False))
    same = [site for site in known if name and modules.get(name) is site.module]
    if same:
        raise SiteError(f"{name!r} is site {same[0].name!r} by another name; give that one.")
    if any(sign in name for sign in "*?["):
        matches = [site for site in known if fnmatch.fnmatchcase(site.name, name)]
        if not matches:
            raise SiteError(f"No site matches {name!r}. {_choices(known)}{_unread(model)}")
        for site in matches:
            site.by_glob = True
        return matches
    if name in modules and name:
        head = name.rpartition(".")[0]
        parent = modules[head]
        if (around := base_layer(parent)) is not None and around is modules[name]:
            raise SiteError(
                f"{head!r} wraps {name!r} and adds to its output; name {head!r} instead, or merge "
                f"the adapter into the model first."
            )
        if may_be_sae(parent) and sae_encoder(parent) is modules[name]:
            return [SAESite(name, parent)]
        if (layer := layer_site(name, modules[name])) is not None:
            return [layer]
        if absent := offloaded(modules[name]):
            raise SiteError(f"Site {name!r} cannot be read.{absent}")
        inside = [site.name for site in known if site.name.startswith(f"{name}.")]
        remedy = f"Layers inside it are: {', '.join(inside[:8])}." if inside else _choices(known)
        raise SiteError(
            f"{name!r} is a {type(modules[name]).__name__}, which has no neurons of its own. "
            f"{remedy}"
        )
    raise SiteError(one_of("site", name, by_name) + _unread(model))


def _unread(model: nn.Module) -> str:
    return unread(model) if is_transformer(model) else ""
