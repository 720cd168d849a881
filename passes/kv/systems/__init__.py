"""Named systems: a block of a text file each, a composition of slots with parameters.

    system NAME{parameter=default, ...}
      title   what it is called
      source  where it is from
      says    what is reported of it (by its source), or what this row leaves out
      needs   what calibration or training must give, and what our own code gives instead
    kv NAME
    ...       the specification (`memcomp.passes.kv.text`); parameters stand for their values

No code knows a system's name: a new one is a new block in a file of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from memcomp.ir.errors import OptionError, ParseError, nearest
from memcomp.ir.lex import Line, read_line
from memcomp.passes.kv.slots import KVSpec, Value
from memcomp.passes.kv.text import parse_lines, read_pairs, show_value

FACTS = ("title", "source", "says", "needs")


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table: text facts, parameters with their defaults, and the numbered lines of its specification."""

    name: str
    group: str
    parameters: tuple[tuple[str, Value], ...]
    title: str
    source: str
    says: str
    needs: str
    lines: tuple[tuple[int, str], ...]

    def spec(self, **given: Value) -> KVSpec:
        """The specification with these parameters.  Raises OptionError for one that is not known or of another type."""
        known = dict(self.parameters)
        for name, value in given.items():
            if name not in known:
                raise OptionError(f"{self.name} has no parameter {name!r}", hint=nearest(name, known) if known else
                                  f"{self.name} has none")
            if type(value) is not type(known[name]) and not (type(known[name]) is float and type(value) is int):
                raise OptionError(f"{name} of {self.name} cannot be {show_value(value)}",
                                  hint=f"by default it is {show_value(known[name])}")
        return parse_lines(self.lines, {**known, **given})

    @property
    def text(self) -> str:
        """Its name with the parameters that it has."""
        said = ", ".join(f"{n}={show_value(v)}" for n, v in self.parameters)
        return f"{self.name}{{{said}}}" if said else self.name


@cache
def systems() -> dict[str, System]:
    """All rows by name, in the order of the files."""
    found: dict[str, System] = {}
    for file in sorted((f for f in files(__package__).iterdir() if f.name.endswith(".kv")), key=lambda f: f.name):
        for s in read(file.read_text(encoding="utf-8"), file.name.removesuffix(".kv")):
            if s.name in found:
                raise ParseError(f"two systems are called {s.name!r}", file.name)
            found[s.name] = s
    return found


def read(text: str, group: str) -> list[System]:
    """The blocks of a file.  Raises ParseError."""
    blocks: list[list[tuple[int, str]]] = []
    for number, source in enumerate(text.splitlines(), 1):
        if source.split()[:1] == ["system"]:
            blocks.append([])
        if blocks and source.partition("#")[0].strip():
            blocks[-1].append((number, source))
    return [_system(block, group) for block in blocks]


def _system(block: list[tuple[int, str]], group: str) -> System:
    head = read_line(*block[0])
    head.at += 1
    name = head.name("a name", "write system kivi{bits=2}").text
    parameters = tuple((t.text, v) for t, v in read_pairs(head, {}))
    head.end("write system kivi{bits=2}")
    facts = dict.fromkeys(FACTS, "")
    at = 1
    while at < len(block) and (words := block[at][1].split(maxsplit=1))[0] in FACTS:
        facts[words[0]] = f"{facts[words[0]]} {words[-1]}".strip()
        at += 1
    for fact in ("title", "source"):
        if not facts[fact]:
            head.fail(f"{name} has no {fact}", f"write {fact} and what it is", head.tokens[1])
    made = System(name, group, parameters, facts["title"], facts["source"], facts["says"], facts["needs"],
                  tuple(block[at:]))
    made.spec()
    return made


def system(name: str) -> System:
    """A row of the table.  Raises OptionError with the nearest name."""
    if name not in systems():
        raise OptionError(f"no system is called {name!r}", hint=nearest(name, systems()))
    return systems()[name]


def expand(line: Line) -> KVSpec:
    """The specification of `kivi{bits=4}`.  Raises ParseError with a caret."""
    t = line.one_of("system", systems())
    row = systems()[t.text]
    pairs = read_pairs(line, {})
    line.end("write a system with its parameters: kivi{bits=4}, or kv NAME and the lines of a specification")
    for name, value in pairs:
        try:
            row.spec(**{name.text: value})
        except OptionError as e:
            line.fail(e.what, e.hint, name)
    return row.spec(**{n.text: v for n, v in pairs})
