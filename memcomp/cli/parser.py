"""All commands and their options as one parser.  Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

# what the help lists, in its order: modules of this folder, or of others where they have commands of their own
GROUPS = {
    "look": ("memcomp.cli.show", "memcomp.cli.explain", "memcomp.cli.opt", "memcomp.cli.cost", "memcomp.cli.emit"),
    "measure": ("memcomp.cli.check", "memcomp.cli.bench", "memcomp.cli.tune", "memcomp.cache.commands"),
    "more": ("memcomp.cli.lists",),
}


@dataclass(frozen=True, slots=True)
class Commands:
    """Where a module adds its commands."""

    parsers: Any  # what add_subparsers returns: argparse does not name it

    def add(self, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        """A command: `run` gets what was parsed and returns the exit code; `text` is its help, in a sentence."""
        p: argparse.ArgumentParser = self.parsers.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        return p

    def family(self, name: str, text: str) -> Commands:
        """A command that has commands of its own."""
        p = self.parsers.add_parser(name, help=text, description=text)
        return Commands(p.add_subparsers(required=True, metavar="command"))


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a parsed command is `args.run(args)`."""
    top = argparse.ArgumentParser(prog="memcomp", description="A compiler for attention and memory layers.")
    commands = Commands(top.add_subparsers(required=True, metavar="command"))
    for modules in GROUPS.values():
        for module in modules:
            import_module(module).add(commands)
    return top
