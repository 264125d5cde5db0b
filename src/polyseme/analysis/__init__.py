"""The main job: from a model and data to a run."""

from polyseme.analysis.analyse import analyse
from polyseme.analysis.vectors import token_vectors

__all__ = ["analyse", "token_vectors"]
