"""Sparse autoencoders: the NE loss, training with SAELens, and loading published SAEs."""

from polyseme.sae.load import check_width, load_sae, sae_shape, sae_tensors
from polyseme.sae.ne_loss import NETerm, ne_loss
from polyseme.sae.plain import PlainSAE
from polyseme.sae.record import TrainingRecord, read_training
from polyseme.sae.train import train_sae

__all__ = [
    "NETerm",
    "PlainSAE",
    "TrainingRecord",
    "check_width",
    "load_sae",
    "ne_loss",
    "read_training",
    "sae_shape",
    "sae_tensors",
    "train_sae",
]
