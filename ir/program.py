"""Program: the one value that flows; cascade + mapping + target.  Its text is its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from memcomp.ir.cascade import Cascade, Knob
from memcomp.ir.errors import OptionError, nearest
from memcomp.ir.expr import Const, Expr


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time of a machine with arrays of processing elements (its binding; TeAAL's word).

    bind:  (tensor, unit): the unit that computes the statements of that tensor; units of one phase run side by side.
    drain: nothing new starts: the last reduction of these tensors runs out through the rows of its array.
    """

    bind: tuple[tuple[str, str], ...]
    drain: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """Einsums that run as one kernel, and how (the mapping; FuseMax/TeAAL words).

    tensors:   the tensors whose writers belong to this group, in order.
    partition: (rank, tile size) for ranks that are cut by the mapping alone (P -> P1 tiles of P0 points); the size is
               a `Const` or a `Knob`.  A rank that the algebra cuts (M1, M0) is cut in the cascade instead.
    space:     ranks run in parallel, outermost first; a partitioned rank is named by its outer part (`P1`).
    loop_order: the sequential (iterative) ranks, outermost first.
    lane:      the rank laid across vector lanes (`P0` or another tile rank); None = each tile's own last rank.
    keep:      (tensor, level) for tensors held at a level of the target.
    phases:    what runs on which unit and side by side with what, in order, once a round of the loops; none: the
               statements follow one another, each on the unit that is done first.
    """

    name: str
    tensors: tuple[str, ...]
    partition: tuple[tuple[str, Expr | Knob], ...] = ()
    space: tuple[str, ...] = ()
    loop_order: tuple[str, ...] = ()
    lane: str | None = None
    keep: tuple[tuple[str, str], ...] = ()
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True)
class Mapping:
    """Groups in launch order; closed when no knob remains."""

    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """name, cascade, mapping, target name, and the proofs of the rewrites that made it (one line each)."""

    name: str
    cascade: Cascade
    mapping: Mapping = field(default_factory=Mapping)
    target: str = ""
    proofs: tuple[str, ...] = ()

    def __str__(self) -> str:
        from memcomp.ir.text import show

        return show(self)

    @property
    def digest(self) -> str:
        """sha256 over the text after canonical renaming (names, proofs and comments do not count)."""
        from memcomp.ir.text import digest

        return digest(self)


def knobs(p: Program) -> tuple[Knob, ...]:
    """Open knobs of the ranks and of the mapping, in order of appearance, each name once."""
    found: dict[str, Knob] = {}
    for r in p.cascade.ranks:
        if isinstance(r.extent, Knob):
            found.setdefault(r.extent.name, r.extent)
    for g in p.mapping.groups:
        for _, size in g.partition:
            if isinstance(size, Knob):
                found.setdefault(size.name, size)
    return tuple(found.values())


def close(program: Program, choices: dict[str, int]) -> Program:
    """The program with its knobs fixed to the chosen values; knobs that `choices` does not name stay open.

    Raises OptionError for a name that is no knob of the program and for a value that is not among its choices.
    """
    found = {k.name: k for k in knobs(program)}
    for name, value in choices.items():
        if name not in found:
            raise OptionError(f"{program.name} has no knob {name!r}", hint=nearest(name, found))
        if value not in found[name].choices:
            raise OptionError(f"knob {name!r} cannot be {value}", hint=nearest(str(value), found[name].choices))

    def fix(x: Expr | Knob | None) -> Expr | Knob | None:
        return Const(choices[x.name]) if isinstance(x, Knob) and x.name in choices else x

    return _sized(program, fix)


def finer(program: Program, least: int) -> Program:
    """The program with smaller choices for every knob: half the smallest one and half of that, not below `least`; and
    for the sizes of parts that are no knobs, which become some."""

    def more(x: Expr | Knob | None) -> Expr | Knob | None:
        if not isinstance(x, Knob):
            return x
        small = (n for part in (4, 2) if (n := min(x.choices) // part) >= least)
        return replace(x, choices=(*small, *x.choices))

    def opened(g: Group) -> Group:
        return replace(g, partition=tuple(
            (r, Knob(f"{r.lower()}0_{g.name}", (x.value,)) if isinstance(x, Const) and isinstance(x.value, int) else x)
            for r, x in g.partition))

    groups = tuple(map(opened, program.mapping.groups))
    return _sized(replace(program, mapping=replace(program.mapping, groups=groups)), more)


def _sized(program: Program, to: Callable[[Expr | Knob | None], Expr | Knob | None]) -> Program:
    """The program with other extents of ranks and other sizes of parts."""
    ranks = tuple(replace(r, extent=to(r.extent)) for r in program.cascade.ranks)
    groups = tuple(replace(g, partition=tuple((r, s if (s := to(size)) is not None else size)
                                              for r, size in g.partition)) for g in program.mapping.groups)
    cascade = replace(program.cascade, ranks=ranks)
    return replace(program, cascade=cascade, mapping=replace(program.mapping, groups=groups))
