"""Parse arguments that several commands share: models, selectors, numbers, data."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polyseme.cli.options import add_options, values_of
from polyseme.errors import InputError, MissingDependencyError, PolysemeError, one_of
from polyseme.remote import local_path

if TYPE_CHECKING:
    from torch import nn

    from polyseme.capture import Selector
    from polyseme.data import Images

_SELECTORS = ("TopK", "AboveFraction", "FirstActive", "Stratified")
MODEL_HELP = (
    "MODULE:NAME or FILE.py:NAME of a torch.nn.Module, or of a function that takes no arguments "
    "and returns one; the code is run"
)


def numbers(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; give one, or several separated by commas: 0.5,0.4,0.3"
        ) from None
    return values[0] if len(values) == 1 else values


def image_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give height,width or channels,height,width, such as 28,28"
        ) from None


_DATA = "split limit mean std images_key labels_key"


def add_data_options(command: Any) -> None:
    """Add the options for reading data."""
    from polyseme.data import read_images

    values = {"type": numbers, "metavar": "X[,Y,Z]"}
    add_options(command.add_argument_group("data"), read_images, _DATA, mean=values, std=values)


def read_data(options: argparse.Namespace) -> Images:
    """Read the images that the options specify."""
    from polyseme.data import read_images

    return read_images(options.data, **values_of(options, _DATA))


def module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingDependencyError(what, "torch", "torch") from error
        raise


def to_device(model: nn.Module, device: str) -> nn.Module:
    if device.partition(":")[0] == "meta":
        raise InputError(
            f"The model cannot be moved to device {device!r}, which stores no values. Use cpu, "
            "cuda or mps."
        )
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The model cannot be moved to device {device!r}: {reason}. Try --device cpu."
        ) from error


def selector(text: str | None) -> Selector | None:
    """Parse a selector, written as a Python call with literal arguments."""
    if text is None:
        return None
    capture = importlib.import_module("polyseme.capture")
    expected = "expected a call such as TopK(100) or FirstActive(100, minimum=0.005)."
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise TypeError("not a call")
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        if len(named) < len(call.keywords):
            raise TypeError("a name twice")
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"--select is {text!r}, which is not a selector; {expected}") from error
    if name not in _SELECTORS:
        raise InputError(one_of("selector", name, _SELECTORS))
    try:
        selector: Selector = getattr(capture, name)(*positional, **named)
    except TypeError as error:
        raise InputError(f"--select is {text!r}, but {error}; {expected}") from error
    return selector


def load_model(spec: str) -> nn.Module:
    """Load the model that MODULE:NAME or FILE.py:NAME specifies."""
    from torch import nn

    local_path(spec, "A model")
    where, colon, name = spec.rpartition(":")
    is_file = where.endswith(".py")
    named = is_file or all(part.isidentifier() for part in where.split("."))
    if not colon or not named or not name:
        raise InputError(
            f"The model is {spec!r}; expected MODULE:NAME or FILE.py:NAME, such as "
            "mypackage.models:load."
        )
    try:
        module = _import_file(Path(where)) if is_file else _import_module(where)
        target: Any = module
        for part in name.split("."):
            if not hasattr(target, part):
                public = [entry for entry in vars(module) if not entry.startswith("_")]
                raise InputError(f"{where} has no {name!r}. {one_of('name', name, public)}")
            target = getattr(target, part)
        if not isinstance(target, nn.Module) and callable(target) and _takes_nothing(target):
            target = target()
    except PolysemeError:
        raise
    # Every exception: this is the user's own code. Some scripts call sys.exit.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "no message"
        raise InputError(
            f"{spec} cannot be loaded: its code raised {type(error).__name__}{_place(error)}: "
            f"{reason}."
        ) from error
    if not isinstance(target, nn.Module):
        raise InputError(
            f"{spec} gives a {type(target).__name__}; expected a torch.nn.Module, or a function "
            "that takes no arguments and returns one."
        )
    return target


def _place(error: BaseException) -> str:
    """Where the user's code raised an error, if known."""
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    package = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", package, *installed))
    ]
    return f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:
        # Functions written in C may have no signature.
        return True
    return True


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.py"))
        raise InputError(
            f"The model's file {str(path)!r} does not exist. "
            + (f"Python files there: {', '.join(near[:8])}." if near else "Check the path.")
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    # As `python -m` does: find a package in the current folder even if it is not installed.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"The model's module {error.name!r} was not found. Install it, run from the folder "
            "that contains it, or give a file: path/to/file.py:NAME."
        ) from error
