"""The text of a cache specification: `parse(show(s)) == s`.

    kv NAME
    cut STREAM, ...                                what is kept; without the line: cut k, v
    share WORD                                     layers, heads or prefixes of one storage
    region NAME [layers [0, -1]] [heads [::2]]: first N | last N | blocks N every M | chosen WORD | rest
      select WORD                                  which of the region's tokens stay, or are read
      merge WORD
      STREAM, ...: WORD | WORD | CODEC [along n]   basis, projection, residue, codec, in this order
      drop                                         instead of streams: the region keeps nothing
    map WORD
    place STREAM WORD
    update WORD

A WORD is `name` or `name{field=value, ...}`: fields that are not named have their defaults.  Comments start with `#`.
Where a text is one line without `kv`, it is a name of the table of systems with its parameters: `kivi{bits=4}`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from memcomp.ir.errors import ParseError, nearest
from memcomp.ir.lex import Line, Token, read_line, spelled
from memcomp.passes.kv.slots import (
    Basis,
    Cut,
    Encode,
    KVSpec,
    Map,
    Merge,
    Place,
    Points,
    Project,
    Region,
    Residue,
    Select,
    Share,
    Side,
    Span,
    Tokens,
    Update,
    Value,
)
from memcomp.passes.kv.words import CHOICES, WHERE, WORDS

HEADS = ("cut", "share", "region", "map", "place", "update")
INNER: tuple[type[Any], ...] = (Basis, Project, Residue)
TOKENS = ("first", "last", "blocks", "chosen", "rest")
_FIRST = "the first line is kv NAME, or the text is one line: a system with its parameters, kivi{bits=4}"
_SIDE = "write k: hadamard | int{bits=4, group=32}, or k: int{bits=2, group=32} along n"
_TOKENS = "write first 4, last 128, blocks 64 every 8, chosen attention{share=0.1}, or rest"
Env = Mapping[str, Value]


# -- writing ----------------------------------------------------------------------------------------------------------

def show_value(v: Value) -> str:
    if isinstance(v, bool):
        return str(v).lower()
    return f"[{', '.join(map(str, v))}]" if isinstance(v, tuple) else str(v)


def _braces(pairs: Iterable[tuple[str, Value]]) -> str:
    text = ", ".join(f"{name}={show_value(v)}" for name, v in pairs)
    return f"{{{text}}}" if text else ""


def show_word(slot: Any) -> str:
    """`hadamard{size=64}`: the word, and the fields that are not as they always are."""
    if isinstance(slot, Encode):
        return f"{slot.word}{_braces(slot.given)}" + (" along n" if slot.along == "n" else "")
    named = [(f.name, getattr(slot, f.name)) for f in fields(slot) if f.name not in ("word", "stream")]
    return str(slot.word) + _braces((n, v) for n, v in named if v != _default(type(slot), n))


def _default(slot: type[Any], name: str) -> Any:
    return next(f.default for f in fields(slot) if f.name == name)


def show_points(points: Points) -> str:
    """`[0, 4:8, -1]`."""
    shown = []
    for p in points or ():
        if isinstance(p, Span):
            text = ":".join("" if x is None else str(x) for x in (p.start, p.stop))
            shown.append(text if p.step is None else f"{text}:{p.step}")
        else:
            shown.append(str(p))
    return f"[{', '.join(shown)}]"


def show_tokens(t: Tokens) -> str:
    """`last 128`."""
    if t.word in ("first", "last"):
        return f"{t.word} {t.count}"
    if t.word == "blocks":
        return f"blocks {t.count} every {t.stride}"
    return f"chosen {show_word(t.select)}" if t.select is not None else t.word


def show_side(s: Side) -> str:
    """`hadamard | int{bits=4, group=32}`."""
    steps = [*s.basis, *((s.project,) if s.project else ()), *s.residue, s.encode]
    return " | ".join(map(show_word, steps))


def _region(r: Region) -> list[str]:
    where = "".join(f" {name} {show_points(p)}" for name, p in (("layers", r.layers), ("heads", r.heads))
                    if p is not None)
    lines = [f"region {r.name}{where}: {show_tokens(r.tokens)}"]
    lines += [f"  select {show_word(r.select)}"] if r.select else []
    lines += [f"  merge {show_word(r.merge)}"] if r.merge else []
    alike: dict[str, list[str]] = {}
    for s in r.sides:
        alike.setdefault(show_side(s), []).append(s.stream)
    if [n for names in alike.values() for n in names] != [s.stream for s in r.sides]:  # in the order of the sides
        return [*lines, *(f"  {s.stream}: {show_side(s)}" for s in r.sides)]
    lines += [f"  {', '.join(names)}: {text}" for text, names in alike.items()]
    return lines if r.sides else [*lines, "  drop"]


def show(s: KVSpec) -> str:
    """The text of a specification, with what is as always left out."""
    lines = [f"kv {s.name}"]
    if s.cuts != (Cut("k"), Cut("v")):
        lines.append(f"cut {', '.join(map(show_word, s.cuts))}")
    lines += [f"share {show_word(x)}" for x in s.shares]
    lines += [line for r in s.regions for line in _region(r)]
    lines += [f"map {show_word(s.map)}"] if s.map != Map() else []
    lines += [f"place {p.stream} {show_word(p)}" for p in s.places]
    lines += [f"update {show_word(s.update)}"] if s.update != Update() else []
    return "\n".join(lines) + "\n"


def canonical(s: KVSpec) -> KVSpec:
    """The same cache with nothing that is only a way of writing it: names, the order of a codec's parameters."""
    def side(x: Side) -> Side:
        return replace(x, encode=replace(x.encode, given=_said(x.encode)))

    regions = tuple(replace(r, name=f"r{i}", sides=tuple(sorted(map(side, r.sides), key=lambda x: x.stream)))
                    for i, r in enumerate(s.regions))
    return replace(s, name="cache", regions=regions, cuts=tuple(sorted(s.cuts, key=lambda c: c.word)),
                   places=tuple(sorted(s.places, key=lambda p: p.stream)))


def _said(e: Encode) -> tuple[tuple[str, Value], ...]:
    """Parameters of a codec by name, without those that say what is so anyway."""
    import inspect

    from memcomp.passes.kv.codecs import FAMILIES

    known = inspect.signature(FAMILIES[e.word]).parameters if e.word in FAMILIES else {}
    return tuple(sorted((n, v) for n, v in e.given if n not in known or known[n].default != v))


def digest(s: KVSpec) -> str:
    """sha256 of the canonical text, in 64 hexadecimal digits: equal for specifications that say the same."""
    return hashlib.sha256(show(canonical(s)).encode()).hexdigest()


# -- reading ----------------------------------------------------------------------------------------------------------

def _read_value(line: Line, env: Env) -> Value:
    t = line.next
    hint = "a value is a number, a name, true, false or a list of integers [0, 0, 2]"
    if line.take("["):
        return tuple(line.listed(lambda ln: _integer(ln, env), "]"))
    if t.text == "-" or t.kind == "number":
        negative = line.take("-") is not None
        n = line.next
        if n.kind != "number":
            line.fail(f"expected a number, found {spelled(n)}", hint)
        line.at += 1
        x: int | float = line.number_of(n) if n.text.isdigit() else float(n.text)
        return -x if negative else x
    name = line.name("a value", hint).text
    if name in ("true", "false"):
        return name == "true"
    return env.get(name, name)


def _integer(line: Line, env: Env) -> int:
    t = line.next
    v = _read_value(line, env)
    if isinstance(v, bool) or not isinstance(v, int):
        known = f"; parameters here: {', '.join(env)}" if env else ""
        line.fail(f"expected an integer, found {spelled(t)}", f"write 4{known}", t)
    return v


def read_pairs(line: Line, env: Env) -> list[tuple[Token, Value]]:
    """`{name=value, ...}`, or nothing."""
    def pair(ln: Line) -> tuple[Token, Value]:
        name = ln.name("a parameter", "write {bits=4, group=32}")
        ln.expect("=", f"write {name.text}=value")
        return name, _read_value(ln, env)

    if not line.take("{"):
        return []
    found = line.listed(pair, "}")
    names = [t.text for t, _ in found]
    for i, (t, _) in enumerate(found):
        if t.text in names[:i]:
            line.fail(f"{t.text!r} is said twice", "a parameter is said once", t)
    return found


def _typed(line: Line, slot: type[Any], of: str, name: Token, value: Value, takes: tuple[str, ...]) -> Value:
    if name.text not in takes:
        line.fail(f"{of} has no parameter {name.text!r}", nearest(name.text, takes) if takes else f"{of} takes none",
                  name)
    default = _default(slot, name.text)
    choices = WHERE.get(slot, ()) if name.text == "where" else CHOICES.get(name.text, ())
    if isinstance(default, str):
        if value not in choices:
            line.fail(f"{name.text} of {of} cannot be {show_value(value)}", nearest(show_value(value), choices), name)
        return value
    wanted = type(default) if isinstance(default, (bool, float, tuple)) else int
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        kind = {bool: "true or false", float: "a number", tuple: "a list [0, 0, 2]", int: "an integer"}[wanted]
        line.fail(f"{name.text} of {of} cannot be {show_value(value)}", f"it is {kind}", name)
    return value


def _word(line: Line, slots: tuple[type[Any], ...], what: str, env: Env, **more: Any) -> Any:
    """One word of the table of `slots` with its fields."""
    t = line.one_of(what, [w for s in slots for w in WORDS[s]])
    slot = next(s for s in slots if t.text in WORDS[s])
    takes = WORDS[slot][t.text].takes
    given = {n.text: _typed(line, slot, t.text, n, v, takes) for n, v in read_pairs(line, env)}
    for f in fields(slot):
        if f.name in takes and f.name not in given and f.default is f.default_factory:  # neither: it must be said
            line.fail(f"{t.text} needs its {f.name}", f"write {t.text}{{{f.name}=32}}", t)
    return slot(t.text, **given, **more)


def _points(line: Line, env: Env) -> Points:
    def part(ln: Line) -> int | None:
        return None if ln.next.text in (":", ",", "]") else _integer(ln, env)

    def point(ln: Line) -> int | Span:
        start = part(ln)
        if not ln.take(":"):
            if start is None:
                ln.fail(f"expected a number, found {spelled(ln.next)}", "write [0, -1] or [::3]")
            return start
        stop = part(ln)
        return Span(start, stop, part(ln) if ln.take(":") else None)

    line.expect("[", "write [0, -1] or [::3]")
    return tuple(line.listed(point, "]"))


def _tokens(line: Line, env: Env) -> Tokens:
    kind = line.one_of("kind of tokens", TOKENS).text
    if kind in ("first", "last"):
        return Tokens(kind, _integer(line, env))
    if kind == "blocks":
        size = _integer(line, env)
        line.expect("every", _TOKENS)
        return Tokens(kind, size, _integer(line, env))
    return Tokens(kind, select=_word(line, (Select,), "score", env) if kind == "chosen" else None)


def _side(line: Line, env: Env) -> tuple[Side, ...]:
    streams = line.listed(lambda ln: ln.one_of("stream", WORDS[Cut]).text)
    line.expect(":", _SIDE)
    steps: list[tuple[Token, Any]] = []
    words = {w: slot for slot in INNER for w in WORDS[slot]}
    while line.next.text in words:
        t = line.next
        steps.append((t, _word(line, INNER, "step", env)))
        at = [INNER.index(type(s)) for _, s in steps]
        if at != sorted(at) or at.count(INNER.index(Project)) > 1:
            line.fail(f"{t.text!r} comes too late", "the order is: basis, one projection, residues, codec", t)
        line.expect("|", f"a codec comes last: {t.text} | int{{bits=4, group=32}}")
    named = line.name("a codec", _SIDE).text
    codec = str(env.get(named, named))
    encode = Encode(codec, tuple((n.text, v) for n, v in read_pairs(line, env)))
    if line.take("along"):
        encode = replace(encode, along=line.one_of("rank of groups", ("e", "n")).text)
    if line.next.text == "|":
        line.fail(f"{codec!r} is none of the steps before a codec", nearest(codec, words), line.tokens[line.at - 1])
    made = [s for _, s in steps]
    basis, project, residue = (tuple(s for s in made if isinstance(s, slot)) for slot in INNER)
    return tuple(Side(s, encode, basis, project[0] if project else None, residue) for s in streams)


@dataclass(slots=True)
class _Reader:
    """A specification as it is read, a line at a time."""

    name: str
    env: Env
    cuts: tuple[Cut, ...] = ()
    shares: tuple[Share, ...] = ()
    regions: tuple[Region, ...] = ()
    map: Map | None = None
    places: tuple[Place, ...] = ()
    update: Update | None = None
    inside: set[str] = field(default_factory=set)  # what the last region has said

    def take(self, line: Line) -> None:
        t = line.next
        if t.kind == "name" and line.peek().text in (":", ",") and t.text in WORDS[Cut]:
            self._inside(line, t, lambda r: replace(r, sides=r.sides + _side(line, self.env)), "drop")
            return
        line.at += 1
        if t.text == "cut":
            self.cuts += tuple(line.listed(lambda ln: _word(ln, (Cut,), "stream", self.env)))
        elif t.text == "share":
            self.shares += (_word(line, (Share,), "rank", self.env),)
        elif t.text == "region":
            self._close()
            self.regions += (self._region(line),)
        elif t.text == "select":
            self._inside(line, t, lambda r: replace(r, select=_word(line, (Select,), "score", self.env)), "select")
        elif t.text == "merge":
            self._inside(line, t, lambda r: replace(r, merge=_word(line, (Merge,), "group", self.env)), "merge")
        elif t.text == "drop":
            self._inside(line, t, lambda r: r, "drop", "streams")
        elif t.text == "place":
            stream = line.one_of("stream", WORDS[Cut]).text
            self.places += (_word(line, (Place,), "place", self.env, stream=stream),)
        elif t.text in ("map", "update"):
            if getattr(self, t.text) is not None:
                line.fail(f"a second {t.text!r}", "a specification has one", t)
            setattr(self, t.text, _word(line, (Map if t.text == "map" else Update,), t.text, self.env))
        else:
            line.fail(f"a line cannot start with {spelled(t)}",
                      nearest(t.text, (*HEADS, "select", "merge", "drop")) + ", or a stream: k: f16", t)
        line.end("one thing to a line")

    def _region(self, line: Line) -> Region:
        name = line.name("a name", "write region body: rest").text
        points: dict[str, Points] = {}
        while line.next.text in ("layers", "heads"):
            t = line.name("", "")
            if t.text in points:
                line.fail(f"{t.text!r} is said twice", "write them in one list: [0, -1]", t)
            points[t.text] = _points(line, self.env)
        line.expect(":", "write region body: rest, or region edge layers [0, -1]: rest")
        return Region(name, _tokens(line, self.env), (), points.get("layers"), points.get("heads"))

    def _inside(self, line: Line, t: Token, change: Callable[[Region], Region], *without: str) -> None:
        """A line of the last region; without: what the region cannot have said before."""
        if not self.regions:
            line.fail(f"{spelled(t)} belongs to a region", "write region body: rest first", t)
        for word in without:
            if word in self.inside:
                line.fail(f"{spelled(t)} behind {word}", "a region says each thing once, and streams or drop", t)
        self.inside.add(t.text if t.text in ("select", "merge", "drop") else "streams")
        self.regions = (*self.regions[:-1], change(self.regions[-1]))
        line.end(_SIDE)

    def _close(self) -> None:
        """The last region is said."""
        if self.regions and not self.inside & {"streams", "drop"}:
            raise ParseError(f"region {self.regions[-1].name} says nothing of its streams", hint=f"{_SIDE}, or drop")
        self.inside = set()

    def made(self) -> KVSpec:
        self._close()
        return KVSpec(self.name, self.cuts or (Cut("k"), Cut("v")), self.regions, self.shares, self.map or Map(),
                      self.places, self.update or Update())


def parse_lines(lines: Iterable[tuple[int, str]], env: Env | None = None) -> KVSpec:
    """The specification of numbered lines; a name that `env` knows stands for its value.  Raises ParseError."""
    reader: _Reader | None = None
    for number, source in lines:
        line = read_line(number, source)
        if line.next.kind == "end":
            continue
        if reader is None:
            line.expect("kv", _FIRST)
            reader = _Reader(line.name("a name", "write kv NAME").text, env or {})
            line.end("write kv NAME")
        else:
            reader.take(line)
    if reader is None:
        raise ParseError("the text holds no specification", hint=_FIRST)
    return reader.made()


def parse(text: str) -> KVSpec:
    """The specification a text says: written out, or a system of the table with its parameters.

    Raises ParseError: what is wrong, the source line with a caret, a hint with the known spellings.  What is written
    may still be illegal: `memcomp.passes.kv.rules.verify` says so.
    """
    lines = [(n, s) for n, s in enumerate(text.splitlines(), 1) if s.partition("#")[0].strip()]
    if len(lines) == 1 and lines[0][1].split()[:1] != ["kv"]:
        from memcomp.passes.kv.systems import expand

        return expand(read_line(*lines[0]))
    return parse_lines(lines)
