"""Baselines, evaluation of SAEs and comparisons between them."""
