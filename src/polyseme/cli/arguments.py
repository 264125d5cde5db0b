"""What the commands' arguments name: models, selectors, numbers, data."""

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

from polyseme.errors import InputError, MissingDependencyError, PolysemeError, one_of
from polyseme.remote import local_path

if TYPE_CHECKING:
    from torch import nn

    from polyseme.capture import Selector
    from polyseme.data import Images

_SELECTORS = ("TopK", "AboveFraction", "FirstActive", "Stratified")
MODEL_HELP = (
    "MODULE:NAME or FILE.py:NAME of a torch.nn.Module, or of a function without arguments that "
    "returns one; importing it runs its code"
)


def numbers(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number; give one, or several with commas: 0.5,0.4,0.3"
        ) from None
    return values[0] if len(values) == 1 else values


def image_shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape; give height,width or channels,height,width: 28,28"
        ) from None


def add_data_options(command: Any) -> None:
    """The options that say how data is read."""
    data = command.add_argument_group("data")
    data.add_argument("--split", default="train", help="train or test; default: %(default)s")
    data.add_argument("--limit", type=int, help="read at most this many inputs")
    data.add_argument(
        "--mean", type=numbers, help="for uint8 images: input = (pixel / 255 - mean) / std"
    )
    data.add_argument("--std", type=numbers, help="one value, or one per channel: 0.5,0.5,0.5")
    data.add_argument("--images-key", metavar="KEY", help="array in an .npz, if unclear")
    data.add_argument("--labels-key", metavar="KEY", help="likewise")


def read_data(options: argparse.Namespace) -> Images:
    """The images that the options name."""
    from polyseme.data import read_images

    return read_images(
        options.data,
        split=options.split,
        mean=options.mean,
        std=options.std,
        images_key=options.images_key,
        labels_key=options.labels_key,
        limit=options.limit,
    )


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
            f"The model cannot be moved to device {device!r}, which holds no numbers. Give cpu, "
            "cuda or mps."
        )
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The model cannot be moved to device {device!r}: {reason}. Try --device cpu."
        ) from error


def selector(text: str) -> Selector:
    """A selector from its Python spelling, with literals only."""
    capture = importlib.import_module("polyseme.capture")
    expected = "TopK(100) or FirstActive(100, minimum=0.005) is the form that is expected."
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
    """The model that MODULE:NAME or FILE.py:NAME names."""
    from torch import nn

    local_path(spec, "A model")
    where, colon, name = spec.rpartition(":")
    is_file = where.endswith(".py")
    named = is_file or all(part.isidentifier() for part in where.split("."))
    if not colon or not named or not name:
        raise InputError(
            f"The model is given as {spec!r}; MODULE:NAME or FILE.py:NAME is expected, such as "
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
    # Every exception: this is the user's own code. Some scripts leave with sys.exit.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()) or "it says no more"
        raise InputError(
            f"{spec} cannot be loaded: its code raises {type(error).__name__}{_place(error)}: "
            f"{reason}."
        ) from error
    if not isinstance(target, nn.Module):
        raise InputError(
            f"{spec} gives a {type(target).__name__}; a torch.nn.Module is expected, or a function "
            "without arguments that returns one."
        )
    return target


def _place(error: BaseException) -> str:
    """The line of the user's code where an error arose, as far as it is known."""
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    package = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", package, *installed))
    ]
    return f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""


def _takes_nothing(function: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:
        # Written in C, without a signature.
        return True
    return True


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.py"))
        raise InputError(
            f"There is no file {str(path)!r} to load the model from. "
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
    # As `python -m` does: a package beside the user counts, installed or not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"There is no module {error.name!r} to load the model from. Install it, run from the "
            "folder that it lies in, or give a file: path/to/file.py:NAME."
        ) from error
