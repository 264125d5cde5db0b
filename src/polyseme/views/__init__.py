"""Views of a run: the whole run, one neuron, its features, its figure. Without torch."""

from polyseme.views.features import Feature
from polyseme.views.neuron import Neuron
from polyseme.views.panel import ImagePanel
from polyseme.views.probe import Probe
from polyseme.views.run import Run, is_dead, is_without_examples, open_run

__all__ = [
    "Feature",
    "ImagePanel",
    "Neuron",
    "Probe",
    "Run",
    "is_dead",
    "is_without_examples",
    "open_run",
]
