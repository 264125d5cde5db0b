"""Writes docs/cli.md from the command-line parser.

python tools/cli_reference.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from polyseme.cli import build_parser
from polyseme.cli.options import Parser

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def reference() -> str:
    """The page: for each command, a section with a table of its arguments."""
    parser = build_parser()
    lines = [
        "# Command line",
        "",
        "Each command is one library call. Errors go to standard error in one or two sentences, "
        "with exit status 1, or 2 for wrong arguments. An interrupt gives 130, SIGTERM 143.",
    ]
    for name, command in _commands(parser):
        lines += ["", f"## polyseme {name}", "", str(command.description)]
        lines += ["", "| argument | meaning |", "|---|---|"]
        command.complete()
        for action in command._actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            spelling = ", ".join(action.option_strings) or str(action.metavar)
            if action.option_strings and action.nargs != 0:
                spelling += f" {action.metavar or action.dest.upper()}"
            # As argparse would print it, with its %(default)s filled in.
            text = (action.help or "") % {**vars(action), "prog": command.prog}
            needed = " (required)" if action.option_strings and action.required else ""
            lines.append(f"| `{spelling}` | {text.replace('|', chr(92) + '|')}{needed} |")
    return "\n".join(lines) + "\n"


def _commands(parser: Parser, of: str = "") -> Iterator[tuple[str, Parser]]:
    """Each command with its full name; a group yields its subcommands."""
    kinds = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if of and not kinds:
        yield of, parser
    for kind in kinds:
        for name, command in kind.choices.items():
            yield from _commands(command, f"{of} {name}".strip())


def main() -> int:
    text = reference()
    if "--check" in sys.argv[1:]:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
