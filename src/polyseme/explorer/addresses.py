"""What sites are called in addresses, such as 12/345: the layer of the site, or else its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from polyseme.store import SiteInfo

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


def layer_of(name: str) -> int | None:
    """The layer that a site's name carries: the one part between dots that is a number.

    None where no part is, or several are, of which any might be the layer:
    ``model.layers.12.mlp`` carries 12, ``layers.3.experts.7`` carries none.
    """
    numbers = [part for part in name.split(".") if _NUMBER.fullmatch(part)]
    return int(numbers[0]) if len(numbers) == 1 else None


def site_addresses(sites: Sequence[SiteInfo]) -> list[str]:
    """What each site is called: its layer, where no other site carries the same; else its name."""
    layers = [layer_of(site.name) for site in sites]
    times = Counter(layers)
    return [
        site.name if layer is None or times[layer] > 1 else str(layer)
        for site, layer in zip(sites, layers, strict=True)
    ]
