"""`memcomp completion`: a script that completes memcomp's commands, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator

from memcomp.cli.parser import Commands, parser
from memcomp.ir.errors import Refusal

SHELLS = {
    "bash": 'eval "$(memcomp completion bash)"   # in ~/.bashrc',
    "zsh": "memcomp completion zsh > ~/.zfunc/_memcomp   # a folder of $fpath",
    "fish": "memcomp completion fish > ~/.config/fish/completions/memcomp.fish",
}


def add(commands: Commands) -> None:
    p = commands.add("completion", run, "Print a script for your shell that completes commands, options and names.",
                     list(SHELLS.values()))
    p.add_argument("shell", choices=tuple(SHELLS), help="the shell that is to run the script")


def run(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise Refusal("completion needs shtab, which is not installed", hint="pip install shtab") from error

    top = parser()
    for action in _actions(top):
        if action.dest in NAMES:
            action.choices = tuple(NAMES[action.dest]())
        elif action.dest == "input":
            action.complete = _inputs(tuple(_models()))  # type: ignore[attr-defined]
        elif action.metavar in ("FILE", "file"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in ("FOLDER", "DIR"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(top, args.shell))
    return 0


def _actions(p: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in p._actions:
        yield action
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _actions(sub)


def _targets() -> Iterable[str]:
    from memcomp.ir.target import targets

    return targets()


def _backends() -> Iterable[str]:
    from memcomp.backends import backends

    return backends()


def _stations() -> Iterable[str]:
    from memcomp.stations import STATIONS

    return (*STATIONS, "all")


def _models() -> Iterable[str]:
    from memcomp.inputs import workloads

    return (name for name, _ in workloads())


def _cases() -> Iterable[str]:
    from memcomp.bench import named

    return (case.name for case in named())


def _systems() -> Iterable[str]:
    from memcomp.passes.kv.systems import systems

    return systems()


NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "target": _targets, "backend": _backends, "dump_after": _stations, "only": _cases, "system": _systems}


def _inputs(names: tuple[str, ...]) -> dict[str, str | dict[str, str]]:
    """What stands for an input: a workload's name, or a file."""
    words = " ".join(names)
    return {
        "bash": "_memcomp_inputs", "zsh": "_memcomp_inputs",
        "fish": f"{words} (__fish_complete_path (commandline -ct))",
        "preamble": {
            "bash": f'_memcomp_inputs() {{\n  compgen -W "{words}" -- "$1"\n  compgen -f -- "$1"\n}}\n',
            "zsh": f"_memcomp_inputs() {{\n  compadd -- {words}\n  _files\n}}\n",
        },
    }
