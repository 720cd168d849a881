"""The ways a general program can be mapped: its forms, each with knobs, and for each mapping who writes the kernels
and how.  What is tuned is a member of this space.

Knobs are named by their order here (k0, k1, ...), and so are sizes (r0, r1, ...): two models whose programs differ in
names only share what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from math import prod
from typing import Any

from memcomp.cache.entry import Choice
from memcomp.ir.errors import OptionError, nearest
from memcomp.ir.program import Program, close, knobs


def _own(closed: Program) -> Iterable[tuple[str, str]]:
    return (("", ""),)


@dataclass(frozen=True, slots=True)
class Space:
    """forms: words of `memcomp.choice` -> mapped program with open knobs.  ways: of a closed program, backends that can
    write it with settings that each can be told (`memcomp.backends.ways`)."""

    forms: Mapping[str, Program]
    ways: Callable[[Program], Iterable[tuple[str, str]]] = _own

    def __len__(self) -> int:
        """How many mappings there are."""
        return sum(prod(len(k.choices) for k in knobs(p)) for p in self.forms.values())

    def mappings(self) -> Iterator[Choice]:
        """Every form with every value of its knobs, for the target's own backend as it thinks best."""
        for words, p in self.forms.items():
            for values in product(*(k.choices for k in knobs(p))):
                yield Choice(words, {f"k{n}": v for n, v in enumerate(values)})

    def __contains__(self, choice: object) -> bool:
        """Is this a member?"""
        try:
            return isinstance(choice, Choice) and self.closed(choice) is not None
        except OptionError:
            return False

    def near(self, choice: Choice) -> Iterator[Choice]:
        """Those of one form that differ from a choice in two knobs at most."""
        values = {f"k{n}": k.choices for n, k in enumerate(knobs(self.forms[choice.form]))}
        for some in (*((k,) for k in values), *combinations(values, 2)):
            for other in product(*(values[k] for k in some)):
                yield replace(choice, knobs={**choice.knobs, **dict(zip(some, other, strict=True))})

    def written(self, mapping: Choice) -> Iterator[Choice]:
        """The members of a mapping, its own backend's first."""
        for backend, setting in self.ways(self._mapped(mapping)):
            yield replace(mapping, backend=backend, setting=setting)

    def choices(self) -> Iterator[Choice]:
        """Every member."""
        return (c for mapping in self.mappings() for c in self.written(mapping))

    @property
    def open(self) -> bool:
        """Is there more than one member?"""
        return len(list(islice(self.choices(), 2))) > 1

    def choice(self, form: str, values: Mapping[str, int]) -> Choice:
        """The member with these values, by the knobs' own names."""
        return Choice(form, {f"k{n}": values[k.name] for n, k in enumerate(knobs(self.forms[form]))})

    def closed(self, choice: Choice) -> Program:
        """The program of a member.  Raises OptionError where the choice is none."""
        closed = self._mapped(choice)
        if (choice.backend or choice.setting) and (choice.backend, choice.setting) not in self.ways(closed):
            raise OptionError(f"no kernel of {choice} can be asked for here")
        return closed

    def _mapped(self, choice: Choice) -> Program:
        if choice.form not in self.forms:
            raise OptionError(f"the program has no form {choice.form!r}", hint=nearest(choice.form, self.forms))
        form = self.forms[choice.form]
        own = {f"k{n}": k.name for n, k in enumerate(knobs(form))}
        if own.keys() != choice.knobs.keys():
            raise OptionError(f"the form {choice.form!r} has the knobs {', '.join(own) or 'none'}",
                              f"the choice names {', '.join(choice.knobs) or 'none'}")
        return close(form, {own[n]: v for n, v in choice.knobs.items()})


def problem(general: Program, named: tuple[str, ...], extents: Mapping[str, int], backend: str) -> dict[str, Any]:
    """What decides which choice is best, on one machine.  Which choices there are follows from it, the machine and the
    code, but for forms that depend on the very sizes; a choice is looked up in the space before it is taken.

    named: ranks whose size no shape shows; extents: of the symbolic ranks; backend: "" where it is open.
    """
    return {"program": general.digest, "named": len(named), "target": general.target, "backend": backend,
            "extents": dict(buckets(general, extents))}


def buckets(general: Program, extents: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Sizes, coarsely: a kernel takes any, and what is best for one is about best for those near it."""
    return tuple((f"r{n}", 1 << max(0, extents[r.name] - 1).bit_length())
                 for n, r in enumerate(general.cascade.ranks) if r.name in extents)
