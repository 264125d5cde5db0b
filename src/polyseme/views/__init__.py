"""Views of a run: the whole run, one neuron, its features, its figure. Without torch."""

from polyseme.views.features import Feature
from polyseme.views.measures import MEASURES, Measure, is_dead, is_without_examples, measured
from polyseme.views.neuron import Neuron
from polyseme.views.panel import ImagePanel
from polyseme.views.probe import Probe
from polyseme.views.run import Run

__all__ = [
    "MEASURES",
    "Feature",
    "ImagePanel",
    "Measure",
    "Neuron",
    "Probe",
    "Run",
    "is_dead",
    "is_without_examples",
    "measured",
]
