"""The demo on real digits: a classifier, its neurons, and two SAEs of them."""

from polyseme.demo.classifier import (
    Classifier,
    accuracy,
    load_classifier,
    train_and_test,
    train_classifier,
)
from polyseme.demo.job import SITE, Demo, run_demo
from polyseme.demo.report import as_json, report

__all__ = [
    "SITE",
    "Classifier",
    "Demo",
    "accuracy",
    "as_json",
    "load_classifier",
    "report",
    "run_demo",
    "train_and_test",
    "train_classifier",
]
