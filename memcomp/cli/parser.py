"""All commands and their options as one parser.  Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NoReturn

from memcomp.ir.errors import OptionError, nearest

# what the help lists, in its order: modules of this folder, or of others where they have commands of their own
GROUPS = {
    "see what is made of a model": ("memcomp.cli.show", "memcomp.cli.explain", "memcomp.cli.opt", "memcomp.cli.cost",
                                    "memcomp.cli.emit"),
    "check and measure": ("memcomp.cli.check", "memcomp.cli.bench", "memcomp.cli.tune", "memcomp.cache.commands"),
    "deploy": ("memcomp.cli.compile", "memcomp.cli.run"),
    "more": ("memcomp.cli.lists", "memcomp.cli.kv", "memcomp.cli.completion"),
}
CODES = {
    0: "done",
    1: "done, and what was looked for was found: `check` a wrong result, `diff` a difference, `verify` a bad file, ...",
    2: "not done: a wrong option or input, or something that cannot be compiled; stderr says why",
    70: "a fault of memcomp itself",
    130: "ended by Ctrl-C",
}
_CHOICE = re.compile(r"(.*)invalid choice: '?(.*?)'? \(choose from")


class Parser(argparse.ArgumentParser):
    """Wrong use is an OptionError with the nearest word; a command's commands are listed in groups."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})
        self.groups: dict[str, dict[str, str]] = {}  # title -> command -> what it does
        self.given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.given = list(sys.argv[1:] if args is None else args)
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self._unknown(rest[0])
        return found, rest

    def _unknown(self, word: str) -> NoReturn:
        known = [o for a in self._actions for o in a.option_strings]
        raise OptionError(f"{self.prog}: unknown {'option' if word.startswith('-') else 'argument'} {word!r}",
                          hint=nearest(word.partition("=")[0], known))

    def error(self, message: str) -> NoReturn:
        if wrong := _CHOICE.match(message):
            action = next((a for a in self._actions if a.choices and _called(a) in wrong[1]), None)
            if action is not None:
                what = "command" if isinstance(action.choices, dict) else _called(action)
                raise OptionError(f"{self.prog}: unknown {what} {wrong[2]!r}", hint=nearest(wrong[2], action.choices))
        options = [w for w in self.given if w.startswith("--") and w != "--" and not self.groups]
        for word in options:  # what is missing may be behind what is wrong
            if not any(word.partition("=")[0] in a.option_strings for a in self._actions):
                self._unknown(word)
        raise OptionError(f"{self.prog}: {message}", hint=f"{self.prog} --help")

    def format_help(self) -> str:
        if not self.groups:
            return super().format_help()
        width = min(shutil.get_terminal_size().columns, 120)
        column = max(len(name) for rows in self.groups.values() for name in rows) + 4
        parts = [f"usage: {self.prog} COMMAND ...   ({self.prog} COMMAND --help tells more)", str(self.description)]
        for title, rows in self.groups.items():
            lines = [textwrap.fill(text, width, initial_indent=f"  {name}".ljust(column),
                                   subsequent_indent=" " * column) for name, text in rows.items()]
            parts.append("\n".join([f"{title}:", *lines] if title else lines))
        return "\n\n".join([*parts, *filter(None, [self.epilog])]) + "\n"


def _called(action: argparse.Action) -> str:
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


@dataclass(slots=True)
class Commands:
    """Where a module adds its commands."""

    parser: Parser
    parsers: Any = field(init=False)  # what add_subparsers returns: argparse does not name it
    title: str = ""

    def __post_init__(self) -> None:
        self.parsers = self.parser.add_subparsers(metavar="COMMAND")
        self.parser.set_defaults(run=self._help)

    def _help(self, args: argparse.Namespace) -> int:
        self.parser.print_help()
        return 0

    def add(self, name: str, run: Callable[[argparse.Namespace], int], text: str,
            examples: Sequence[str] = ()) -> Parser:
        """A command: `run` gets what was parsed and returns the exit code; `text` is its help, in a sentence."""
        p = self._named(name, text, "\n".join(["examples:", *(f"  {e}" for e in examples)]) if examples else None)
        p.set_defaults(run=run)
        return p

    def family(self, name: str, text: str) -> Commands:
        """A command that has commands of its own; alone it prints its help."""
        return Commands(self._named(name, text, None))

    def _named(self, name: str, text: str, epilog: str | None) -> Parser:
        self.parser.groups.setdefault(self.title, {})[name] = text
        p: Parser = self.parsers.add_parser(name, help=text, description=text, epilog=epilog)
        return p


def parser() -> Parser:
    """The parser of the whole command line; a parsed command is `args.run(args)`."""
    from memcomp import __version__

    top = Parser(prog="memcomp", description="A compiler for attention and memory layers.", epilog="\n\n".join((
        "examples:\n  memcomp explain memcomp.models.mha:build\n  memcomp check model.py:layer"
        "\n  memcomp emit program.mc --target h100", "exit codes:\n" + "\n".join(_codes()))))
    top.add_argument("--version", action="version", version=f"memcomp {__version__}")
    commands = Commands(top)
    for commands.title, modules in GROUPS.items():
        for module in modules:
            import_module(module).add(commands)
    return top


def _codes() -> Iterable[str]:
    return (f"  {code:<4}{text}" for code, text in CODES.items())
