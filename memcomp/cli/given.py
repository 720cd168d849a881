"""What the command line names, read: a program, a function with its inputs, or the programs of its regions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

from memcomp.cli import options
from memcomp.inputs import Function, read, used
from memcomp.ir.errors import InputError, OptionError, nearest
from memcomp.ir.program import Program


def whole(args: argparse.Namespace) -> Program | Function:
    """The input as it is.  Raises InputError, and OptionError where --size names nothing that is open in it."""
    ask = options.ask(args)
    found = read(args.input, ask)
    if isinstance(found, Program):
        _open([found], ask.sizes)
    elif unknown := sorted(ask.sizes.keys() - ask.names):
        raise OptionError(f"--size {unknown[0]}: no extent of the inputs is named {unknown[0]}",
                          hint=nearest(unknown[0], ask.names) if ask.names else "e.g. --input 'x=f32[S,64]' names S")
    return found


def sizes(args: argparse.Namespace, program: Program) -> dict[str, int]:
    """What --size says of a program's open ranks."""
    return {name: n for name, n in options.ask(args).sizes.items() if name in _ranks(program)}


def programs(args: argparse.Namespace) -> list[Program]:
    """The program given, or those of the regions of the function given, each distinct one once."""
    return list({p.digest: p for p, _ in regions(args)}.values())


def regions(args: argparse.Namespace) -> list[tuple[Program, Mapping[str, int]]]:
    """As `programs`, with the extents of open ranks as far as they are known: --size says them first.  One program of
    sizes that are mapped apart is there for each of them."""
    return [(p, known) for _, p, known in sourced(args)]


def sourced(args: argparse.Namespace) -> list[tuple[str, Program, Mapping[str, int]]]:
    """As `regions`, with where each was found."""
    ask = options.ask(args)
    found = read(args.input, ask)
    made = [(found.name, found, {})] if isinstance(found, Program) else _regions(args, found)
    ranks = {name: n for name, n in ask.sizes.items() if name not in ask.names}
    _open([p for _, p, _ in made], ranks)
    return [(at, p, {**known, **{r: n for r, n in ranks.items() if r in _ranks(p)}}) for at, p, known in made]


def _regions(args: argparse.Namespace, found: Function) -> list[tuple[str, Program, Mapping[str, int]]]:
    from memcomp.config import config
    from memcomp.report import explain
    from memcomp.tune.space import buckets

    if getattr(args, "target", None):
        for target in (args.target,) if isinstance(args.target, str) else args.target:
            config({"target": target, "backend": ""})
    with used(found):  # what is read is the same for every machine, and not every one can be compiled for here
        explained = explain(found.fn, *found.marked(), target="cpu", backend="")
    left: dict[str, list[str]] = {}
    for x in explained.refusals:
        left.setdefault(x.why, []).append(x.where)
    for why, places in left.items():
        more = f" ({len(places) - 1} more like it)" if places[1:] else ""
        print(f"left to torch: {places[0]}: {why}{more}", file=sys.stderr)
    if not explained.regions:
        raise InputError(f"nothing in {args.input} is an attention or memory layer that memcomp can express",
                         hint="`memcomp explain` says what was left to torch and why")
    return list({(r.read.digest, buckets(r.read, r.known)): (r.source, r.read, r.known)
                 for r in explained.regions}.values())


def _ranks(program: Program) -> dict[str, int | None]:
    """The open ranks, and what bounds them."""
    return {r.name: r.bound for r in program.cascade.ranks if r.extent is None}


def _open(programs: Sequence[Program], sizes: Mapping[str, int]) -> None:
    """Is each of `sizes` of a rank that is open in one of the programs, and within its bound?"""
    for name, n in sizes.items():
        bounds = [b for p in programs for r, b in _ranks(p).items() if r == name]
        if not bounds:
            fixed = any(r.name == name for p in programs for r in p.cascade.ranks)
            known = {r for p in programs for r in _ranks(p)}
            raise OptionError(f"the extent of rank {name} is not open" if fixed else f"no rank is called {name!r}",
                              hint=nearest(name, known) if known else "no extent is: --input names those to leave open")
        if any(b is not None and n > b for b in bounds):
            raise OptionError(f"--size {name}={n}: {name} is at most {min(b for b in bounds if b is not None)}")
        if n < 1:
            raise OptionError(f"--size {name}={n} leaves nothing to compute", hint=f"e.g. --size {name}=4096")


def at(sizes: Iterable[tuple[str, int]]) -> str:
    """Extents as a reader sees them."""
    return ", ".join(f"{name}={n}" for name, n in sorted(sizes)) or "fixed sizes"
