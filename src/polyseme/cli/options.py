"""Parsers of commands, and options made from the parameters of the functions they call."""

from __future__ import annotations

import argparse
import inspect
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

from polyseme.options import descriptions

_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float}
_METAVARS = {"int": "N", "str": "NAME", "str | Path": "DIR"}
# Flags that turn a parameter off.
_OFF = {
    "panels": ("--no-panels", "skip activation maps and logit effects, which is faster"),
    "progress": ("--quiet", "show no progress"),
}


class Parser(argparse.ArgumentParser):
    """Reports errors in one sentence, without the usage. So do the parsers of its commands.

    The arguments of a command are added when it is used, because importing the functions that
    define them takes longer than some commands.
    """

    add_arguments: Callable[[Any], None] | None = None

    def complete(self) -> None:
        """Add the arguments."""
        add, self.add_arguments = self.add_arguments, None
        if add:
            add(self)

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        self.complete()
        namespace, unknown = super().parse_known_args(*arguments, **named)
        if unknown:
            # Here the command is known; argparse would report the error for the whole program.
            self.error(f"unknown arguments: {shlex.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See: {self.prog} --help\n")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    add_arguments: Callable[[Any], None],
) -> None:
    """Add a command, which the docstring of the function that it runs describes."""
    text = " ".join((run.__doc__ or "").split())
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, command=command)
    command.add_arguments = add_arguments


def add_options(
    command: Any, definition: Callable[..., Any], names: str, **special: dict[str, Any]
) -> None:
    """Add options for parameters of a function or dataclass.

    It defines their types and defaults, and its docstring their help: the first sentence.

    Parameters
    ----------
    command : ArgumentParser or group
    definition : callable
    names : str
        Names of parameters, separated by spaces.
    **special : dict
        For a parameter, arguments of ``add_argument`` to replace, and ``flag``; in its ``help``,
        ``{}`` stands for the text of the docstring.
    """
    parameters, texts = inspect.signature(definition).parameters, descriptions(definition)
    for name in names.split():
        annotation, default = parameters[name].annotation, parameters[name].default
        if name in _OFF:
            flag, text = _OFF[name]
            command.add_argument(flag, dest=name, action="store_false", default=default, help=text)
            continue
        options = dict(special.get(name, {}))
        flag = options.pop("flag", f"--{name.replace('_', '-')}")
        text = options.pop("help", "{}").format(_sentence(texts.get(name, ["", ""])[1:]))
        options = {"dest": name, "default": default, **options}
        if annotation == "bool":
            options["action"] = "store_true"
        else:
            shown = flag.strip("-").replace("-", "_").upper()
            options.setdefault("metavar", _METAVARS.get(annotation.removesuffix(" | None"), shown))
            options.setdefault("type", _TYPES.get(annotation.split(" | ")[0], str))
        if default is inspect.Parameter.empty:
            options |= {"required": True, "default": None}
        elif default is not None and default is not False and default != ():
            text += " (default: %(default)s)"
        command.add_argument(flag, help=text, **options)


def values_of(options: argparse.Namespace, names: str) -> dict[str, Any]:
    """The values of options, by parameter."""
    return {name: getattr(options, name) for name in names.split()}


def _sentence(lines: list[str]) -> str:
    """The first sentence, as a phrase in plain text."""
    text = " ".join(lines).partition(". ")[0].rstrip(".").translate(str.maketrans("", "", '`"'))
    # Not the first letter of a name such as L1.
    start = text[:1].lower() if text[1:2].islower() or text[1:2] == " " else text[:1]
    return f"{start}{text[1:]}".replace("%", "%%")
