"""The public names: all there, all documented, and clear about what they need."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
import typing
from importlib import metadata
from pathlib import Path

import pytest

import polyseme
from polyseme.errors import (
    InputError,
    MissingDependencyError,
    PolysemeError,
    RunError,
    SiteError,
    one_of,
)

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = {
    *("analyse", "cluster", "neuron_embeddings", "open_run", "polysemanticity"),
    *("TopK", "AboveFraction", "FirstActive", "Stratified"),
}


@pytest.mark.parametrize("name", polyseme.__all__)
def test_every_name_is_there(name):
    value = getattr(polyseme, name)
    if name == "__version__":
        return
    assert value.__name__ == name
    assert value.__module__.startswith("polyseme.")
    assert inspect.getdoc(value).strip()
    assert vars(polyseme)[name] is value, "the second time it is simply there"


def test_the_contract_is_kept():
    assert set(polyseme.__all__) >= CONTRACT
    assert len(set(polyseme.__all__)) == len(polyseme.__all__)
    assert dir(polyseme) == sorted(polyseme.__all__)
    assert polyseme.__version__ == metadata.version("polyseme")


def test_every_name_is_on_the_page_of_the_reference():
    page = (ROOT / "docs" / "api.md").read_text()
    objects = re.findall(r"^::: ([\w.]+)$", page, re.M)
    assert sorted(path.rpartition(".")[2] for path in objects) == sorted(polyseme.__all__)
    for path in objects:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(polyseme, name)


def test_type_checkers_see_the_same_names(monkeypatch):
    """What is imported for them is what is loaded for everybody else."""
    source = Path(polyseme.__file__).read_text()
    monkeypatch.setattr(typing, "TYPE_CHECKING", True)
    namespace = {"__name__": "polyseme_for_type_checkers"}
    exec(compile(source, polyseme.__file__, "exec"), namespace)
    for name in polyseme.__all__:
        assert namespace[name] == getattr(polyseme, name)


@pytest.mark.parametrize("name", ["nonsense", "analyze", "_Names", "torch", "__wrapped__"])
def test_a_name_that_is_not_there(name):
    with pytest.raises(AttributeError, match=f"module 'polyseme' has no attribute '{name}'"):
        getattr(polyseme, name)
    assert not hasattr(polyseme, name)


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import polyseme
for name in polyseme.__all__:
    try:
        getattr(polyseme, name)
    except polyseme.errors.MissingDependencyError as error:
        assert isinstance(error, ImportError) and isinstance(error, polyseme.errors.PolysemeError)
        print(error)
"""


def without(*modules):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED, *modules],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_torch_only_what_needs_it_is_missing():
    needs = [
        name
        for name in polyseme.__all__
        if polyseme._NAMES.get(name) in ("analysis", "capture", "sites")
    ]
    refused = {line.split()[0]: line for line in without("torch")}
    assert [refused[f"polyseme.{name}"] for name in needs] == [
        f"polyseme.{name} needs torch, which is not installed. "
        "Install it with: pip install 'polyseme[torch]'"
        for name in needs
    ]


def test_without_what_is_optional_nothing_is_missing():
    assert without("matplotlib", "PIL", "mlxtend", "datasets", "sklearn") == []


def test_errors_are_one_family():
    for kind in (InputError, SiteError, RunError, MissingDependencyError):
        assert issubclass(kind, PolysemeError)
    assert issubclass(InputError, ValueError)
    assert issubclass(SiteError, InputError)
    assert issubclass(MissingDependencyError, ImportError)


def test_the_message_for_an_unknown_name():
    assert one_of("site", "layer.0", ["layers.0", "head"]) == (
        "Unknown site: 'layer.0'. Did you mean 'layers.0'? Must be one of: layers.0, head."
    )
    assert one_of("site", "x", []) == "Unknown site: 'x'. Must be one of: (there are none)."
    many = one_of("site", "x", [f"s{n}" for n in range(20)])
    assert many.endswith("s11, … (20 in all).")
