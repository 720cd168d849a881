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

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from memcomp.ir.cascade import Cascade, Einsum
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, reads, walk
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
    iterative = {r.var for r in c.ranks if r.iterative}
    steps = tuple(_Step(tuple(_use(a) for a in _accesses(e)), tuple(_use(o, iterative) for o in e.outs))
                  for e in c.einsums)
    families = _families(c, steps)
    found = (_count(steps, fiber) for name in names for fiber in _fibers(c, steps, name, families))
    return tuple(t for t in found if t is not None)


# -- statements, reduced to what walks along what ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Index:
    """walked: its variables, outermost (largest stride) first; data: it gathers; fixed: a constant; forward: a prefix
    of elements is enough for a prefix of values; plain: the variable alone; steps: it is `v+1` of an iterative rank."""

    walked: tuple[str, ...]
    data: bool
    fixed: bool
    forward: bool
    plain: bool
    steps: bool = False


@dataclass(frozen=True, slots=True)
class _Use:
    tensor: str
    index: tuple[_Index, ...]


@dataclass(frozen=True, slots=True)
class _Step:
    uses: tuple[_Use, ...]
    outs: tuple[_Use, ...]


def _accesses(e: Einsum) -> dict[Access, None]:
    """Reads of a statement, index gathers included."""
    where = (e.body, *((e.guard,) if e.guard is not None else ()), *(i for o in e.outs for i in o.index))
    return {n: None for x in where for n in walk(x) if isinstance(n, Access)}


def _use(a: Access, iterative: Collection[str] = ()) -> _Use:
    return _Use(a.tensor, tuple(_index(i, iterative) for i in a.index))


def _index(i: Expr, iterative: Collection[str]) -> _Index:
    i = simplify(i, index=True)
    walked = tuple(dict.fromkeys(n.name for n in walk(i) if isinstance(n, Var)))
    plain = isinstance(i, Var)
    forward = plain or (bool(walked) and not reads(i) and _rising(i, walked))
    steps = isinstance(i, Call) and i.op == "add" and not reads(i) and any(v in iterative for v in walked)
    return _Index(walked, bool(reads(i)), isinstance(i, Const), forward, plain, steps)


def _rising(i: Expr, names: tuple[str, ...]) -> bool:
    """Does the index grow with each of its variables?"""
    p = polynomial(i, index=True)
    parts = [] if p is None else [cofactor(p, Var(v)) for v in names]
    return bool(parts) and all(c is not None and all(k > 0 for k in c[0].values()) for c in parts)


# -- fibers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fiber:
    """Dimensions of a tensor that make up one fiber, outermost first.  A fiber is walked at positions, one for each
    variable; part: the passes over this position are counted, not those over the whole."""

    tensor: str
    rank: str
    dims: tuple[int, ...]
    part: int | None = None


def _families(c: Cascade, steps: tuple[_Step, ...]) -> dict[str, tuple[str, ...]]:
    """Rank -> its parts, outermost first, from `M1 = ceil(M/M0)` and from indices `m1*M0 + m0`."""
    out: dict[str, tuple[str, ...]] = {}
    for r in c.ranks:
        x = r.extent
        if isinstance(x, Call) and x.op in ("ceildiv", "floordiv"):
            whole, part = x.args
            if isinstance(whole, Size) and isinstance(part, Size):
                out[whole.rank] = (r.name, part.rank)
    for use in (u for s in steps for u in s.uses):
        t = c.declared(use.tensor)
        for d, i in enumerate(use.index):
            if t is not None and len(i.walked) > 1:
                out.setdefault(t.ranks[d], tuple(v.upper() for v in i.walked))
    return out


def _fibers(c: Cascade, steps: tuple[_Step, ...], name: str, families: dict[str, tuple[str, ...]]) -> Iterator[_Fiber]:
    found = [u for s in steps for u in s.uses if u.tensor == name]
    try:
        t = c.tensor(name)
    except KeyError:  # its writers name no single rank: `verify` says so
        return
    if not found or (c.declared(name) is not None and t.dtype in _STEERING):
        return
    joint = {whole: tuple(t.ranks.index(p) for p in parts) for whole, parts in families.items()
             if len(parts) > 1 and set(parts) <= set(t.ranks)}
    for whole, dims in joint.items():
        yield _Fiber(name, whole, dims)
    for d, rank in enumerate(t.ranks):
        dims = next((dims for dims in joint.values() if d in dims), (d,))
        yield _Fiber(name, rank, dims, dims.index(d) if len(dims) > 1 else None)
        ways = {u.index[d].walked for u in found if u.index[d].walked}
        if len(ways) == 1 and len(names := next(iter(ways))) > 1:
            for k, v in enumerate(names):
                yield _Fiber(name, v.upper(), (d,), k)


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


def _count(steps: tuple[_Step, ...], fiber: _Fiber) -> Traversal | None:
    direct = [_positions(u, fiber) for s in steps for u in s.uses if u.tensor == fiber.tensor]
    along = {v for p in direct for k, (v,) in enumerate(p) if fiber.part in (None, k)}
    # written at v+1 of an iterative rank that the fiber does not walk along: at v it stands for the last round's
    last_round = {(o.tensor, d): i.walked for s in steps for o in s.outs for d, i in enumerate(o.index)
                  if o.tensor != fiber.tensor and i.steps and not along & set(i.walked)}
    states: dict[str, _State] = {}
    best, read_in = 0, set[int]()
    witness: tuple[tuple[str, str], ...] = ()
    for _ in range(2):  # a prefix read looks at what a later statement writes
        best, read_in, witness = 0, set(), ()
        for s in steps:
            found = [r for u in s.uses if not any(i.plain and last_round.get((u.tensor, d)) == i.walked
                                                  for d, i in enumerate(u.index)) for r in _reads(u, s, fiber, states)]
            if not found:
                continue
            walks_all = any(r.whole for r in found)
            number = max(r.passes + (r.late and walks_all) for r in found)
            worst = max(found, key=lambda r: (r.passes + (r.late and walks_all), len(r.witness)))
            chain = worst.witness + (((worst.tensor, s.outs[0].tensor),) if worst.late and walks_all else ())
            if walks_all:
                if number > best:
                    best, witness = number, chain
                if any(r.tensor == fiber.tensor and r.whole for r in found):
                    read_in.add(number)
            for o in s.outs:
                if o.tensor != fiber.tensor:
                    new = _made(o, fiber, found, number, not walks_all and any(r.late for r in found), chain)
                    states[o.tensor] = _joined(states.get(o.tensor), new)
    return Traversal(fiber.tensor, fiber.rank, best, witness, tuple(sorted(read_in))) if best else None


def _positions(u: _Use, fiber: _Fiber) -> tuple[tuple[str, ...], ...]:
    return tuple((v,) for d in fiber.dims for v in u.index[d].walked)


def _reads(u: _Use, s: _Step, fiber: _Fiber, states: dict[str, _State]) -> Iterator[_Read]:
    """What one access means for the fiber: nothing, or one reading for each way its tensor walks along the fiber."""
    if u.tensor == fiber.tensor:
        if position := _positions(u, fiber):
            yield _Read(u.tensor, position, True, 1, False, ())
        return
    state = states.get(u.tensor)
    if state is None or any(o.tensor == u.tensor for o in s.outs):
        return
    for walk_, whole in zip(state.walks, state.whole, strict=True):
        index = [[u.index[d] for d in dims] for dims in walk_]
        position = tuple(tuple(v for i in part if not i.data for v in i.walked) for part in index)
        # the last element, a gather or a walk backwards need all that comes before
        late = state.late or any(not i.fixed and not i.forward for part in index for i in part)
        yield _Read(u.tensor, position, whole and all(position), state.passes, late, state.witness)
    if not state.walks:
        yield _Read(u.tensor, (), False, state.passes, state.late, state.witness)


def _made(o: _Use, fiber: _Fiber, found: list[_Read], number: int, late: bool,
          chain: tuple[tuple[str, str], ...]) -> _State:
    """The state of a tensor written at `o` from these reads."""
    # a scatter does not walk along anything
    place = {v: d for d, i in reversed(list(enumerate(o.index))) if not i.data for v in i.walked}
    walks: dict[tuple[tuple[int, ...], ...], bool] = {}
    for r in found:
        dims = tuple(tuple(dict.fromkeys(place[v] for v in p if v in place)) if p and p[0] in place else ()
                     for p in r.position)
        focus = fiber.part or 0  # the whole ends where its outermost position does
        if focus < len(dims) and r.position[focus] and not dims[focus]:
            late = True
        if any(dims):
            whole = r.whole and all(v in place for p in r.position for v in p)
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
