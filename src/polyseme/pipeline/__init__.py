"""The main job: from a model and data to a run."""

from polyseme.pipeline.analysis import analyse

__all__ = ["analyse"]
