"""Evaluation: baselines, SAEs, comparisons, and benchmarks with a ground truth."""
