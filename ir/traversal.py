"""Count passes: how often a cascade must traverse a fiber, whatever the mapping (FuseMax section 3).

A pass over a fiber visits each of its elements; another pass begins where an element is needed again after something
that depended on all of them.  For one fiber the statements are walked in order, and every tensor computed from it gets

* `passes`, the pass during which its elements appear, and `late`: once that pass has ended (the fiber was reduced);
* which of its own dimensions still walk along the fiber.  A reader that walks the whole fiber again and needs something
  late starts the next pass.  An iterative rank is a prefix dependence, no barrier: `RM[m1]` feeds `RM[m1+1]`.

A rank cut in parts (`K[m1*M0 + m0]`) is a fiber too, M, beside its parts M1 and M0.  Walking a summary (the M1 maxima
of tiles) is no pass over M: only statements that touch all elements count.  A tensor that is recomputed counts for what
it is computed from: K is passed as often as the scores made of it.  A fiber that does not walk along an iterative rank
is counted within one round of it.  Integer and bool inputs (page tables, lengths) steer and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, reads, variables, walk
from memcomp.ir.poly import cofactor
from memcomp.ir.program import Program
from memcomp.ir.simplify import polynomial, simplify


@dataclass(frozen=True, slots=True)
class Traversal:
    """The passes over one fiber.

    passes:  how often its elements are needed, by direct reads or by recomputation of what was read from it.
    witness: for each further pass, (the tensor that needed the whole fiber, the tensor whose statement reads again).
    reads:   the passes in which the tensor itself is read.
    live:    "tile" where all direct reads happen in one pass, else "fiber": the whole fiber must be kept or read again.
    """

    tensor: str
    rank: str
    passes: int
    witness: tuple[tuple[str, str], ...]
    reads: tuple[int, ...]

    @property
    def live(self) -> str:
        return "tile" if len(self.reads) <= 1 else "fiber"


_STEERING = ("i64", "i32", "i16", "bool")  # bytes hold quantised data


def passes(program: Program | Cascade) -> dict[tuple[str, str], int]:
    """(tensor, rank) -> number of passes, for every fiber that some statement walks."""
    return {(t.tensor, t.rank): t.passes for t in traversals(program)}


def traversals(program: Program | Cascade) -> tuple[Traversal, ...]:
    """All fibers of all tensors that are read, in order of declaration, then of first writing."""
    c = program.cascade if isinstance(program, Program) else program
    names = dict.fromkeys([t.name for t in c.tensors] + [n for e in c.einsums for n in e.names])
    families = _families(c)
    out: list[Traversal] = []
    for name in names:
        for fiber in _fibers(c, name, families):
            found = _count(c, fiber)
            if found is not None:
                out.append(found)
    return tuple(out)


# -- fibers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fiber:
    """Dimensions of a tensor that make up one fiber, and the part of it whose passes are counted ("" = all)."""

    tensor: str
    rank: str
    dims: tuple[int, ...]
    part: str = ""


def _families(c: Cascade) -> dict[str, tuple[str, ...]]:
    """Rank -> its parts, outermost first, from `M1 = ceil(M/M0)` and from indices `m1*M0 + m0`."""
    out: dict[str, tuple[str, ...]] = {}
    for r in c.ranks:
        x = r.extent
        if isinstance(x, Call) and x.op in ("ceildiv", "floordiv"):
            whole, part = x.args
            if isinstance(whole, Size) and isinstance(part, Size):
                out[whole.rank] = (r.name, part.rank)
    for e in c.einsums:
        for a in _accesses(e):
            t = c.declared(a.tensor)
            for d, i in enumerate(a.index):
                vs = _walked(i)
                if t is not None and len(vs) > 1:
                    out.setdefault(t.ranks[d], tuple(v.upper() for v in vs))
    return out


def _fibers(c: Cascade, name: str, families: dict[str, tuple[str, ...]]) -> Iterator[_Fiber]:
    found = [a for e in c.einsums for a in _accesses(e) if a.tensor == name]
    try:
        ranks = c.tensor(name).ranks
    except KeyError:  # its writers name no single rank: `verify` says so
        return
    t = c.declared(name)
    if not found or (t is not None and t.dtype in _STEERING):
        return
    for whole, parts in families.items():
        dims = tuple(ranks.index(p) for p in parts if p in ranks)
        if len(dims) == len(parts) > 1:
            yield _Fiber(name, whole, dims)
    for d, rank in enumerate(ranks):
        mates = next((p for p in families.values() if rank in p and all(x in ranks for x in p)), (rank,))
        dims = tuple(ranks.index(p) for p in mates) if len(mates) > 1 else (d,)
        walks = {_walked(a.index[d]) for a in found if d < len(a.index)} - {()}
        yield _Fiber(name, rank, dims, rank if len(dims) > 1 else "")
        if len(walks) == 1 and len(vs := next(iter(walks))) > 1:
            for v in vs:
                yield _Fiber(name, v.upper(), (d,), v.upper())


@lru_cache(maxsize=1 << 10)
def _accesses(e: Einsum) -> tuple[Access, ...]:
    """Reads of a statement, index gathers included."""
    where = (e.body, *((e.guard,) if e.guard is not None else ()), *(i for o in e.outs for i in o.index))
    return tuple(dict.fromkeys(n for x in where for n in walk(x) if isinstance(n, Access)))


@lru_cache(maxsize=1 << 12)
def _walked(i: Expr) -> tuple[str, ...]:
    """Variables of an index, outermost (largest stride) first."""
    return tuple(dict.fromkeys(n.name for n in walk(simplify(i, index=True)) if isinstance(n, Var)))


@lru_cache(maxsize=1 << 12)
def _forward(i: Expr) -> bool:
    """Does the index visit elements in the order of its variables, so that a prefix is enough?"""
    if reads(i):
        return False
    p = polynomial(i, index=True)
    if p is None:
        return False
    for v in variables(i):
        parts = cofactor(p, Var(v))
        if parts is None or any(k < 0 for k in parts[0].values()):
            return False
    return True


# -- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """What a tensor computed from the fiber knows of it.

    walks: alternatives (one per way it was read), each position -> dimensions here, outermost first; () = reduced.
    whole: per alternative, does it still have every element?
    """

    walks: tuple[tuple[tuple[int, ...], ...], ...]
    whole: tuple[bool, ...]
    passes: int
    late: bool
    witness: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Read:
    """One access in a statement: per position the variables it walks with; `late` if it waits for the whole fiber."""

    tensor: str
    position: tuple[tuple[str, ...], ...]
    whole: bool
    passes: int
    late: bool
    witness: tuple[tuple[str, str], ...]


def _stepped(c: Cascade) -> dict[str, list[tuple[int, str]]]:
    """Tensor -> (dimension, variable) where it is written at `v+1` and v runs in order: at `v` it is the last round's."""
    order = {r.var for r in c.ranks if r.iterative}
    out: dict[str, list[tuple[int, str]]] = {}
    for e in c.einsums:
        for o in e.outs:
            for d, i in enumerate(o.index):
                if isinstance(i, Call) and i.op == "add" and len(vs := variables(i) & order) == 1:
                    out.setdefault(o.tensor, []).append((d, *vs))
    return out


def _count(c: Cascade, fiber: _Fiber) -> Traversal | None:
    along = {v for e in c.einsums for a in _accesses(e) if a.tensor == fiber.tensor for d in fiber.dims
             for v in _walked(a.index[d])} if not fiber.part else {fiber.part.lower()}
    earlier = {t: [(d, v) for d, v in steps if v not in along] for t, steps in _stepped(c).items()}
    states: dict[str, _State] = {}
    best, direct = 0, set[int]()
    witness: tuple[tuple[str, str], ...] = ()
    for _ in range(2):  # a prefix read looks at what a later statement writes
        best, direct, witness = 0, set(), ()
        for e in c.einsums:
            found = _reads(e, fiber, states, earlier)
            if not found:
                continue
            walks_all = any(r.whole for r in found)
            number = max(r.passes + (r.late and walks_all) for r in found)
            worst = max(found, key=lambda r: (r.passes + (r.late and walks_all), len(r.witness)))
            chain = worst.witness + (((worst.tensor, e.out.tensor),) if worst.late and walks_all else ())
            if walks_all:
                if number > best:
                    best, witness = number, chain
                if any(r.tensor == fiber.tensor and r.whole for r in found):
                    direct.add(number)
            for o in e.outs:
                if o.tensor != fiber.tensor:
                    new = _made(o, fiber, found, number, not walks_all and any(r.late for r in found), chain)
                    states[o.tensor] = _joined(states.get(o.tensor), new)
    return Traversal(fiber.tensor, fiber.rank, best, witness, tuple(sorted(direct))) if best else None


def _focus(fiber: _Fiber, vs: tuple[tuple[str, ...], ...]) -> tuple[int, ...]:
    """Positions whose loss ends the pass: the counted part, or the outermost position of the whole fiber."""
    if not fiber.part:
        return (0,)
    at = tuple(k for k, p in enumerate(vs) if fiber.part.lower() in p)
    return at or (0,)


def _reads(e: Einsum, fiber: _Fiber, states: dict[str, _State], earlier: dict[str, list[tuple[int, str]]]
           ) -> list[_Read]:
    own = set(e.names)
    out: list[_Read] = []
    for a in _accesses(e):
        if a.tensor == fiber.tensor:
            position = tuple((v,) for d in fiber.dims if d < len(a.index) for v in _walked(a.index[d]))
            if position:
                out.append(_Read(a.tensor, position, True, 1, False, ()))
        elif a.tensor in states and a.tensor not in own:
            if any(d < len(a.index) and a.index[d] == Var(v) for d, v in earlier.get(a.tensor, ())):
                continue  # made from the last round's fiber, not from this one
            s = states[a.tensor]
            for walk_, whole in zip(s.walks, s.whole, strict=True):
                late, walked = s.late, list[tuple[str, ...]]()
                for dims in walk_:
                    index = [a.index[d] for d in dims if d < len(a.index)]
                    walked.append(tuple(v for i in index if not reads(i) for v in _walked(i)))
                    for i in index:
                        if not isinstance(i, Const) and not (variables(i) and _forward(i)):
                            late = True  # the last element, a gather or a walk backwards need all that comes before
                out.append(_Read(a.tensor, tuple(walked), whole and all(walked), s.passes, late, s.witness))
            if not s.walks:
                out.append(_Read(a.tensor, (), False, s.passes, s.late, s.witness))
    return out


def _made(o: Access, fiber: _Fiber, found: list[_Read], number: int, late: bool,
          chain: tuple[tuple[str, str], ...]) -> _State:
    """The state of a tensor written at `o` from these reads."""
    # a scatter does not walk along anything
    place = {v: d for d, i in reversed(list(enumerate(o.index))) if not reads(i) for v in variables(i)}
    walks: dict[tuple[tuple[int, ...], ...], bool] = {}
    for r in found:
        dims = tuple(tuple(dict.fromkeys(place[v] for v in p if v in place)) if p and p[0] in place else ()
                     for p in r.position)
        whole = r.whole and all(v in place for p in r.position for v in p)
        lost = [k for k, (p, d) in enumerate(zip(r.position, dims, strict=True)) if p and not d]
        if set(lost) & set(_focus(fiber, r.position)):
            late = True
        if any(dims):
            walks[dims] = walks.get(dims, False) or whole
    return _State(tuple(walks), tuple(walks.values()), number, late, chain)


def _joined(old: _State | None, new: _State) -> _State:
    """Two writers of one tensor (initial value and step, or several regions)."""
    if old is None or new.passes > old.passes:
        return new
    if new.passes == old.passes and new.late == old.late:
        walks = dict(zip(old.walks, old.whole, strict=True))
        for w, whole in zip(new.walks, new.whole, strict=True):
            walks[w] = walks.get(w, False) or whole
        return _State(tuple(walks), tuple(walks.values()), old.passes, old.late, old.witness)
    return old if old.passes > new.passes or old.late else new
