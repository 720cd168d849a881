"""The law table: every law of the operator table as one named row, and numbers that contradict it where it is false.

A row is called `operator.kind` (`exp.hom`); a rewrite that relies on it says `str(law)` in the program's proofs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

from memcomp.ir.ops import OPS, Op

INF = math.inf
KINDS = ("hom", "degree", "linear", "monotone", "strict", "range", "positive", "domain", "limits")
_SIGN = {"add": "+", "mul": "*"}
_WHERE = {"real": "", "nonneg": " on x >= 0", "pos": " on x > 0"}
_NAMED = re.compile(r"\[(\w+\.\w+)\]")
_Numbers: TypeAlias = "tuple[float, ...]"


@dataclass(frozen=True, slots=True)
class Law:
    """op: the operator; kind: the field of its row; says: the law in words."""

    op: str
    kind: str
    says: str

    @property
    def name(self) -> str:
        return f"{self.op}.{self.kind}"

    def __str__(self) -> str:
        return f"{self.says} [{self.name}]"


def law(op: str, kind: str) -> Law | None:
    """The row of an operator's law; None where the table states none."""
    row = OPS.get(op)
    says = "" if row is None else _says(row, kind)
    return Law(op, kind, says) if says else None


def relied(op: str, kind: str) -> tuple[str, ...]:
    """The row of a law, and that of the domain on which it holds, as proof lines say them; () where there is none."""
    stated = law(op, kind)
    where = law(op, "domain")
    return () if stated is None else (str(stated),) if where is None else (str(stated), str(where))


def laws(rows: Iterable[Op] | None = None) -> tuple[Law, ...]:
    """All rows of the given operators (of the whole table where None)."""
    table = OPS.values() if rows is None else rows
    return tuple(Law(r.name, k, says) for r in table for k in KINDS if (says := _says(r, k)))


def named(lines: Iterable[str]) -> tuple[str, ...]:
    """Names of the rows that proof lines mention, in order, once each."""
    return tuple(dict.fromkeys(name for line in lines for name in _NAMED.findall(line)))


def _says(r: Op, kind: str) -> str:
    match kind:
        case "hom" if r.hom is not None:
            return f"{r.name} takes {_SIGN[r.hom[0]]} to {_SIGN[r.hom[1]]}{_WHERE[r.domain]}"
        case "degree" if r.degree is not None:
            return f"{r.name} is homogeneous of degree {r.degree:g}"
        case "linear" if r.linear:
            if r.arity > 1 and max(map(len, r.linear)) == 1:
                return f"{r.name} is linear in {' and in '.join(f'argument {g[0] + 1}' for g in r.linear)}"
            return f"{r.name} is linear" + (" in its branches" if r.name == "where" else "")
        case "monotone" if any(r.monotone):
            words = {"inc": "increasing", "dec": "decreasing", "sign": "monotone by a value of proved sign"}
            return f"{r.name} is " + " and ".join(dict.fromkeys(words[m] for m in r.monotone if m))
        case "strict" if r.strict:
            return f"{r.name} is strictly monotone"
        case "range" if r.range != (-INF, INF):
            return f"{r.name} lies in [{r.range[0]:g}, {r.range[1]:g}]"
        case "positive" if r.positive:
            return f"{r.name} is positive"
        case "domain" if r.domain != "real" and (r.hom is not None or r.degree is not None or any(r.monotone)):
            return f"the laws of {r.name} hold{_WHERE[r.domain]}"
        case "limits" if r.limits:
            return ", ".join(f"{r.name}({x:g}) = {y:g}" for x, y in r.limits)
    return ""


# -- counterexamples --------------------------------------------------------------------------------------------------

_STEPS = tuple(float(x) for x in (*np.linspace(-4, 4, 33), *np.linspace(-0.9, 0.9, 7)))
_FAR = (-300.0, -40.0, -1e-3, 1e-3, 40.0, 300.0)
_FEW = (-2.5, -1.0, -0.3, 0.0, 0.4, 1.0, 1.7, 3.0)


def counterexample(r: Op) -> tuple[Law, str] | None:
    """A law of the row that its numbers contradict, and the contradiction; None where none was found.

    The function is evaluated in float64 at points of its domain.  An agreement is no proof.
    """
    stated = laws([r])
    if stated and (why := _undefined(r)):
        return Law(r.name, "domain", f"the laws of {r.name} hold{_WHERE[r.domain] or ' everywhere'}"), why
    return next(((x, why) for x in stated if x.kind != "domain" and (why := _CHECKS[x.kind](r))), None)


def _inside(r: Op, xs: Iterable[float]) -> tuple[float, ...]:
    least = {"real": -INF, "nonneg": 0.0, "pos": math.ulp(0.0)}[r.domain]
    return tuple(x for x in sorted(set(xs)) if x >= least)


def value(r: Op, *args: float) -> float:
    """The function at one point, in float64."""
    first = (args[0] > 0,) if r.name == "where" else (np.float64(args[0]),)
    with np.errstate(all="ignore"):
        return float(r.numpy(*first, *map(np.float64, args[1:])))


def _value(r: Op, args: _Numbers) -> float:
    return value(r, *args)


def _close(a: float, b: float) -> bool:
    return a == b or math.isnan(a) or math.isnan(b) or math.isinf(a) or math.isinf(b) or \
        abs(a - b) <= 1e-9 * max(1.0, abs(a), abs(b))


def _call(r: Op, args: _Numbers) -> str:
    return f"{r.name}({', '.join(f'{a:g}' for a in args)}) = {_value(r, args):.6g}"


def _points(r: Op, xs: tuple[float, ...] = _FEW) -> Iterator[_Numbers]:
    yield from product(_inside(r, xs), *[_FEW] * (r.arity - 1))


def _hom(r: Op) -> str:
    assert r.hom is not None
    inner, outer = (OPS[n].numpy for n in r.hom)
    for args in _points(r):
        for y in _inside(r, _FEW):
            whole = _value(r, (float(inner(args[0], y)), *args[1:]))
            parts = float(outer(_value(r, args), _value(r, (y, *args[1:]))))
            if not _close(whole, parts):
                return f"{_call(r, args)} and {_call(r, (y, *args[1:]))}, but together {whole:.6g}"
    return ""


def _degree(r: Op) -> str:
    assert r.degree is not None
    for args in product(_inside(r, _FEW), repeat=r.arity):
        for c in (0.5, 3.0):
            scaled = tuple(c * a for a in args)
            if not _close(_value(r, scaled), c ** r.degree * _value(r, args)):
                return f"{_call(r, args)}, but {_call(r, scaled)}"
    return ""


def _linear(r: Op) -> str:
    for group in r.linear:
        for args in _points(r):
            other = tuple(a * a - 0.5 * a if k in group else a for k, a in enumerate(args))
            total = tuple(a + 2 * b if k in group else a for k, (a, b) in enumerate(zip(args, other, strict=True)))
            if not _close(_value(r, total), _value(r, args) + 2 * _value(r, other)):
                return f"{_call(r, args)} and {_call(r, other)}, but {_call(r, total)}"
    return ""


def _runs(r: Op, xs: tuple[float, ...]) -> Iterator[tuple[str, _Numbers, _Numbers]]:
    """Neighbouring points along each monotone argument, and how the value should move."""
    for k, way in enumerate(r.monotone):
        mine = _inside(r, xs) if k == 0 else tuple(sorted(set(xs)))
        rest = [_FEW] * (r.arity - 1) if k == 0 or r.domain == "real" else [_inside(r, _FEW)] * (r.arity - 1)
        for others in product(*rest) if way else ():
            for low, high in zip(mine, mine[1:], strict=False):
                a, b = (others[:k] + (x,) + others[k:] for x in (low, high))
                sign = next(iter(others), 1.0)
                if way != "sign":
                    yield way, a, b
                elif sign != 0:
                    yield "inc" if sign > 0 else "dec", a, b


def _monotone(r: Op) -> str:
    for way, a, b in _runs(r, (*_STEPS, *_FAR)):
        x, y = _value(r, a), _value(r, b)
        if (y - x if way == "inc" else x - y) < -1e-12 * max(1.0, abs(x)):
            return f"{_call(r, a)}, but {_call(r, b)}"
    return ""


def _strict(r: Op) -> str:
    if not any(r.monotone):
        return "no monotone argument is stated"
    return next((f"{_call(r, a)} and {_call(r, b)}" for _, a, b in _runs(r, _STEPS)
                 if _value(r, a) == _value(r, b)), "")


def _range(r: Op) -> str:
    low, high = r.range
    return next((_call(r, a) for a in _points(r, (*_STEPS, *_FAR))
                 if not low <= _value(r, a) <= high and not math.isnan(_value(r, a))), "")


def _positive(r: Op) -> str:  # far out a positive value may round to 0
    return next((_call(r, a) for a in _points(r, _STEPS) if not _value(r, a) > 0), "")


def _limits(r: Op) -> str:
    return next((_call(r, (x,)) for x, y in r.limits if _value(r, (x,)) != y), "")


def _undefined(r: Op) -> str:
    return next((_call(r, a) for a in _points(r) if all(a[1:]) and math.isnan(_value(r, a))), "")


_CHECKS: dict[str, Callable[[Op], str]] = {
    "hom": _hom, "degree": _degree, "linear": _linear, "monotone": _monotone, "strict": _strict, "range": _range,
    "positive": _positive, "limits": _limits,
}
