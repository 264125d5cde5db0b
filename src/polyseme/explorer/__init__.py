"""The explorer: shows any neuron of a run in the browser, from a server or from static files."""

from polyseme.explorer.export import export
from polyseme.explorer.server import Explorer, explore

__all__ = ["Explorer", "explore", "export"]
