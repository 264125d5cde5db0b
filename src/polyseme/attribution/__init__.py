"""What drives a neuron, and its effects: pixels, tokens and logits."""

from polyseme.attribution.maps import (
    LogitEffects,
    activation_maps,
    count_classes,
    logit_effects,
)
from polyseme.sites.gradient import activation_gradient

__all__ = [
    "LogitEffects",
    "activation_gradient",
    "activation_maps",
    "count_classes",
    "logit_effects",
]
