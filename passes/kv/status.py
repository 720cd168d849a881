"""What a specification promises (its class), and what of it cannot run yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memcomp.ir.errors import MemcompError
from memcomp.passes.kv.account import Shape, channels, codec_of, stored
from memcomp.passes.kv.slots import Cut, KVSpec, Map, Update
from memcomp.passes.kv.words import CLASSES, FLOATS, word


def slots(spec: KVSpec) -> Iterator[Any]:
    """Every slot's value that has a row in the table of words."""
    yield from (*spec.cuts, *spec.shares, spec.map, *spec.places, spec.update)
    for r in spec.regions:
        yield from filter(None, (r.tokens.select, r.select, r.merge))
        for s in r.sides:
            yield from (*s.basis, *filter(None, (s.project,)), *s.residue)


def used(spec: KVSpec) -> tuple[str, ...]:
    """The slots that say something beyond plain keys and values in one region, in the order of the normal form."""
    sides = [s for r in spec.regions for s in r.sides]
    said = {
        "CUT": spec.cuts != (Cut("k"), Cut("v")), "SHR": bool(spec.shares),
        "PART": len(spec.regions) > 1,
        "SEL": any(r.select or r.tokens.select for r in spec.regions), "MRG": any(r.merge for r in spec.regions),
        "BAS": any(s.basis for s in sides), "PROJ": any(s.project for s in sides), "RES": any(s.residue for s in sides),
        "ENC": any(s.encode.word not in FLOATS for s in sides), "MAP": spec.map != Map(), "PLC": bool(spec.places),
        "UPD": spec.update != Update(),
    }
    return tuple(name for name, so in said.items() if so)


def correctness(spec: KVSpec) -> str:
    """`exact`: equals the float64 cascade to rounding; `bounded`: equals decode(encode(x)), bit for bit, with an
    error of its own; `semantic`: equals the same choice in a reference, and only the model can say what it costs."""
    kinds = {"exact", *(word(s).kind for s in slots(spec) if s is not None)}
    kinds |= {"bounded" for r in spec.regions for s in r.sides if s.encode.word not in FLOATS}
    if any(not r.sides for r in spec.regions) or any(not s.trained for s in spec.shares):
        kinds.add("semantic")
    wide = [r for r in spec.regions if r.tokens.select]  # a choice of how wide to store drops nothing
    if wide and all(r.sides for r in spec.regions) and not any(r.select or r.merge for r in spec.regions) and all(
            s.trained for s in spec.shares):
        kinds.discard("semantic")
    return max(kinds, key=CLASSES.index)


def needed(spec: KVSpec, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Tables that calibration or the model must give, by name, with the shape for all heads alike (`side`)."""
    found: dict[str, tuple[int, ...]] = {}
    for cut in spec.cuts:
        if cut.word in ("x", "c"):
            found |= {f"{cut.word}.{what}": (shape.heads, channels(spec, cut.word, shape), shape.head)
                      for what in ("keys", "values")}
    for r in spec.regions:
        if any(s is not None and s.word == "direction" for s in (r.select, r.tokens.select)):
            found["k.direction"] = (shape.head,)
        for side in r.sides:
            whole = channels(spec, side.stream, shape)
            for b in side.basis:
                extent = whole if b.rank == "e" else shape.heads
                if b.word != "hadamard":
                    found[f"{side.stream}.{b.word}"] = (b.size or extent,) * (1 + (b.word == "orthogonal"))
            if side.project:
                name = f"{side.stream}.project"
                found[name] = (whole, max(side.project.rank, found.get(name, (0, 0))[1]))
            made = codec_of(side.encode, stored(side, whole))
            found |= {f"{side.stream}.{t.name}": t.shape for t in made.tables if t.values is None}
    return found


def lacks(spec: KVSpec, shape: Shape | None = None) -> tuple[str, ...]:
    """Why the numpy interpreter does not run it, a reason each; empty where it does."""
    found = [f"{s.word}: {why}" for s in slots(spec) if s is not None and (why := word(s).lacks)]
    found += [f"share {s.word}: a producer behind its readers needs a fixed point of the whole model"
              for s in spec.shares if s.producer == "last" or any(p > i for i, p in enumerate(s.map))]
    for r in spec.regions:
        for side in r.sides:
            try:
                codec_of(side.encode, stored(side, channels(spec, side.stream, shape or Shape())))
            except MemcompError as e:  # another one is for the rules to say
                if "is not built" in e.what:
                    found.append(f"{side.encode.word}: {e.where}")
    return tuple(dict.fromkeys(found))
