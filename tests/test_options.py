"""Options that the library and the command line share: written once, the same in both."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import KW_ONLY, dataclass

import pytest

import polyseme as ps
from polyseme.cli.options import Parser, add_options, values_of
from polyseme.errors import InputError
from polyseme.options import AnalysisOptions, descriptions, takes


@dataclass
class Base:
    """What is common.

    Parameters
    ----------
    n, m : int
        L1 norms, at most 90%. Not read any further.
    """

    n: int
    _: KW_ONLY
    m: int = 0


@dataclass(kw_only=True)
class Options(Base):
    """What is special.

    Parameters
    ----------
    rate : float, optional
        Rate of `everything`,
        on two lines.
    name : str
    quick : bool
        Be quick.
    progress : bool
        Whether to show progress.

    Raises
    ------
    nothing : ever
        At all.
    """

    rate: float | None = None
    name: str = "plain"
    quick: bool = False
    progress: bool = True


@takes(Options)
def called(options: Options) -> tuple[object, ...]:
    """Do something.

    Returns
    -------
    tuple
    """
    return options.n, options.m, options.rate


def test_a_function_is_called_with_the_fields() -> None:
    assert called(3, rate=0.5) == (3, 0, 0.5)
    assert called(n=3, m=1) == (3, 1, None)
    with pytest.raises(InputError, match=r"^Unknown option: 'rat'\. Did you mean 'rate'\? Must"):
        called(3, rat=0.5)  # type: ignore[call-arg]


def test_the_function_is_described_by_the_fields() -> None:
    shown = (
        "(n: 'int', *, m: 'int' = 0, rate: 'float | None' = None, name: 'str' = 'plain', "
        "quick: 'bool' = False, progress: 'bool' = True) -> 'tuple[object, ...]'"
    )
    assert str(inspect.signature(called)) == shown
    assert inspect.getdoc(called) == (
        "Do something.\n\nParameters\n----------\n"
        "n, m : int\n    L1 norms, at most 90%. Not read any further.\n"
        "rate : float, optional\n    Rate of `everything`,\n    on two lines.\n"
        "name : str\n"
        "quick : bool\n    Be quick.\n"
        "progress : bool\n    Whether to show progress.\n\n"
        "Returns\n-------\ntuple"
    )


def options_of(*arguments: str) -> dict[str, object]:
    parser = Parser(prog="p")
    add_options(parser, Options, "n m rate name quick progress", rate={"flag": "--speed"})
    return values_of(parser.parse_args(arguments), "n m rate name quick progress")


def test_options_have_the_types_and_defaults_of_the_fields() -> None:
    unset = {"m": 0, "rate": None, "name": "plain", "quick": False, "progress": True}
    assert options_of("--n", "2") == {"n": 2, **unset}
    words = ["--n", "2", "--m", "3", "--speed", "0.5", "--name", "x", "--quick", "--quiet"]
    expected = {"n": 2, "m": 3, "rate": 0.5, "name": "x", "quick": True, "progress": False}
    assert options_of(*words) == expected


def test_help_is_the_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of("--help")
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert ["--n", "N", "L1 norms, at most 90%"] in lines
    assert ["--m", "N", "L1 norms, at most 90% (default: 0)"] in lines
    assert ["--speed", "SPEED", "rate of everything, on two lines"] in lines
    assert ["--name", "NAME", "(default: plain)"] in lines
    assert ["--quiet", "show", "no progress"] in lines


@pytest.mark.parametrize("function", [ps.analyse, ps.analyse_shard, ps.train_sae])
def test_every_parameter_is_described(function) -> None:
    texts = descriptions(function)
    assert texts.keys() == inspect.signature(function).parameters.keys()
    assert all(len(lines) > 1 for lines in texts.values())


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(TypeError, match=r"^analyse\(\): missing a required argument: 'sites'$"):
        ps.analyse(None, None, out="run")
    with pytest.raises(TypeError, match=r"^train_sae\(\): too many positional arguments$"):
        ps.train_sae(None, 8, "topk")


def test_excluded_sites_are_listed() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, AnalysisOptions, "exclude", exclude={"action": "append", "default": []})
    assert parser.parse_args([]).exclude == []
    assert parser.parse_args(["--exclude", "a", "--exclude", "b*"]).exclude == ["a", "b*"]
