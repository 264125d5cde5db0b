"""The command line: parse, call, print. Each command is one library call."""

from polyseme.cli.commands import build_parser, main

__all__ = ["build_parser", "main"]
