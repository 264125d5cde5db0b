"""Names of sites in addresses such as 12/345: the layer number of the site, or its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from polyseme.store import SiteInfo

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


def layer_of(name: str) -> int | None:
    """The layer number in a site's name: the only part between dots that is a number.

    None if no part is a number, or if several are, since any of them might be the layer:
    ``model.layers.12.mlp`` gives 12, ``layers.3.experts.7`` gives None.
    """
    numbers = [part for part in name.split(".") if _NUMBER.fullmatch(part)]
    return int(numbers[0]) if len(numbers) == 1 else None


def site_addresses(sites: Sequence[SiteInfo]) -> list[str]:
    """The address of each site: its layer number, if no other site has it, or its name."""
    layers = [layer_of(site.name) for site in sites]
    times = Counter(layers)
    return [
        site.name if layer is None or times[layer] > 1 else str(layer)
        for site, layer in zip(sites, layers, strict=True)
    ]
