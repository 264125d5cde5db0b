"""The main job: from a model and data to a run."""

from polyseme.pipeline.analysis import analyse
from polyseme.pipeline.vectors import token_vectors

__all__ = ["analyse", "token_vectors"]
