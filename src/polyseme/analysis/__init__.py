"""The main job: from a model and data to a run."""

from polyseme.analysis.analyse import analyse
from polyseme.analysis.shards import analyse_shard, merge
from polyseme.analysis.vectors import token_vectors

__all__ = ["analyse", "analyse_shard", "merge", "token_vectors"]
