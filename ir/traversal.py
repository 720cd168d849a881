"""Count passes: how often a cascade must traverse a fiber, whatever the mapping (FuseMax section 3).

A pass over a fiber visits each of its elements; another pass begins where an element is needed again after something
that depended on all of them.  For one fiber the statements are walked in order, and every tensor computed from it gets

* `passes`, the pass during which its elements appear, and `late`: once that pass has ended (the fiber was reduced);
* which of its own dimensions still walk along the fiber.  A reader that walks the whole fiber again and needs something
  late starts the next pass.  An iterative rank is a prefix dependence, no barrier: `RM[m1]` feeds `RM[m1+1]`.

Walking a summary (the M1 maxima of tiles) is no pass over M: only statements that touch all elements count.  A tensor
that is recomputed counts for what it is computed from: K is passed as often as the scores made of it.  A fiber that
does not walk along an iterative rank is counted within one round of it.  Integer and bool inputs (page tables, lengths)
steer and are not counted.

Only what the fiber reaches is looked at, and nothing behind the last statement that still walks along it; dimensions
that no statement waits for (`fibers.Walks.parallel`) take one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from memcomp.ir.cascade import Cascade
from memcomp.ir.fibers import Fiber, Step, Use, Walks
from memcomp.ir.program import Program


@dataclass(frozen=True, slots=True)
class Traversal:
    """The passes over one fiber.

    passes: how often its elements are needed, by direct reads or by recomputation of what was read from it.
    chain:  why: the tensors of one longest chain of dependences from it, a group for each pass.  The last tensor of a
            group needs the whole fiber; the first of the next is made of that and of the fiber's elements again.
    reads:  the passes in which the tensor itself is read.
    of:     the rank that `rank` is a part of, or itself: M for the M1 tiles of a fiber and for the M0 elements of one.
    waits:  does some statement need the whole fiber before it can go on?
    """

    tensor: str
    rank: str
    passes: int
    chain: tuple[tuple[str, ...], ...]
    reads: tuple[int, ...]
    of: str
    waits: bool

    @property
    def witness(self) -> tuple[tuple[str, str], ...]:
        """For each further pass, (the tensor that needed the whole fiber, the tensor whose statement reads again)."""
        return tuple((a[-1], b[0]) for a, b in zip(self.chain, self.chain[1:], strict=False))

    @property
    def live(self) -> str:
        """What must be kept along the rank: "tile" where all direct reads happen in one pass, else "fiber", the whole
        of it, unless it is read or computed again."""
        return "tile" if len(self.reads) <= 1 else "fiber"


def passes(program: Program | Cascade) -> dict[tuple[str, str], int]:
    """(tensor, rank) -> number of passes, for every fiber that some statement walks."""
    return {(t.tensor, t.rank): t.passes for t in traversals(program)}


def traversals(program: Program | Cascade, ranks: Collection[str] | None = None) -> tuple[Traversal, ...]:
    """All fibers (those of `ranks`) of all tensors that are read, in order of declaration, then of first writing."""
    walks = Walks(program.cascade if isinstance(program, Program) else program)
    found = (_Count(walks, f).traversal() for f in walks.fibers() if ranks is None or f.rank in ranks)
    return tuple(t for t in found if t is not None)


@dataclass(frozen=True, slots=True)
class Taxon:
    """How often a cascade walks along a rank, and what (FuseMax Table I: 3-pass, 2-pass, 1-pass).

    walks: the rank that each pass walks along at its longest: `rank` itself where it touches the data, a part of it
           where it touches one summary for each tile only, as in ("M", "M1", "M").
    """

    tensor: str
    rank: str
    walks: tuple[str, ...]

    @property
    def passes(self) -> int:
        """Passes over the data."""
        return self.walks.count(self.rank)

    def weight(self, extent: Callable[[str], int]) -> float:
        """All passes, each by the length of what it walks along over that of the data.  extent: of a rank."""
        return sum(extent(r) / extent(self.rank) for r in self.walks)

    def __str__(self) -> str:
        return f"{self.passes}-pass over {self.rank}"


def classify(program: Program | Cascade, rank: str | None = None) -> Taxon | None:
    """The class of the cascade along a rank, by the tensor walked most often; of all ranks the one that is walked most.

    None where nothing walks along it."""
    walks = Walks(program.cascade if isinstance(program, Program) else program)
    found = []
    for f in walks.fibers():
        if f.part is None and f.rank == f.of and rank in (None, f.rank):
            count = _Count(walks, f, summaries=True)
            if count.best:
                parts = walks.families.get(f.rank, (f.rank,))
                found.append(Taxon(f.tensor, f.rank, tuple(f.rank if k in count.data else parts[0]
                                                           for k in range(1, count.best + 1))))
    return max(found, key=lambda t: (t.passes, len(t.walks)), default=None)


def stages(program: Program | Cascade, rank: str) -> dict[str, int]:
    """Tensor -> the pass over `rank` in which it is made, 0 where that needs none: for each result of a statement the
    latest pass over any whole fiber of that rank."""
    walks = Walks(program.cascade if isinstance(program, Program) else program)
    out = {o.tensor: 0 for s in walks.steps for o in s.outs}
    for f in walks.fibers():
        if f.rank == rank:
            count = _Count(walks, f, everything=True)
            for name, state in count.states.items():
                out[name] = max(out[name], state.passes)
    return out


# -- counting ---------------------------------------------------------------------------------------------------------


class _Link(NamedTuple):
    """A chain of dependences, from its end: the tensor made, and whether that began another pass."""

    tensor: str
    again: bool = False
    before: _Link | None = None

    def chain(self) -> tuple[tuple[str, ...], ...]:
        groups: list[list[str]] = [[]]
        at: _Link | None = self
        while at is not None:
            groups[-1].append(at.tensor)
            if at.again:
                groups.append([])
            at = at.before
        return tuple(tuple(reversed(g)) for g in reversed(groups))


class _State(NamedTuple):
    """What a tensor computed from the fiber knows of it (made by the ten thousand: a tuple).

    walks: alternatives (one per way it was read), each position -> dimensions here, outermost first; () = reduced.
    whole: per alternative, does it still have every element?  again: further passes on the chain.
    """

    walks: tuple[tuple[tuple[int, ...], ...], ...]
    whole: tuple[bool, ...]
    passes: int
    late: bool
    link: _Link
    again: int


class _Read(NamedTuple):
    """One access in a statement: per position the variables it walks with; `late` if it waits for the whole fiber."""

    tensor: str
    position: tuple[tuple[str, ...], ...]
    whole: bool
    passes: int
    late: bool
    link: _Link
    again: int


class _Count:
    """The statements that a fiber reaches, in order; `states` of what they make of it.

    everything: also what lies behind the last walk.  summaries: count passes over these too; `data` are the passes in
    which the whole fiber is walked."""

    def __init__(self, walks: Walks, fiber: Fiber, *, everything: bool = False, summaries: bool = False) -> None:
        self.walks, self.fiber, self.everything, self.summaries = walks, fiber, everything, summaries
        self.data = {1}  # the fiber itself is data
        self.states: dict[str, _State] = {}
        self.best, self.waits = 0, False
        self.read_in: dict[int, int] = {}  # statement that reads the tensor itself -> pass
        self.root = self.link = _Link(fiber.tensor)
        direct = [p for u in walks.uses.get(fiber.tensor, ()) if (p := self._positions(u))]
        self.simple = not everything and all((fiber.tensor, d) in walks.parallel for d in fiber.dims)
        if self.simple or not direct:
            self.best, self.read_in = (1, {0: 1}) if direct else (0, {})
            return
        self.along = {v for p in direct for k, (v,) in enumerate(p) if fiber.part in (None, k)}
        early = self._sweep(set(walks.readers[fiber.tensor]))
        if early:  # prefix reads of what a later statement wrote
            self._sweep(early)

    def traversal(self) -> Traversal | None:
        if not self.best:
            return None
        f, read_in = self.fiber, tuple(sorted(set(self.read_in.values())))
        return Traversal(f.tensor, f.rank, self.best, self.link.chain(), read_in, f.of, self.waits)

    def _sweep(self, queued: set[int]) -> set[int]:
        """Visit these statements and what they reach, in order; those that read something before it was complete."""
        walks, todo = self.walks, sorted(queued)
        until, early = todo[-1], set[int]()
        while todo and (todo[0] <= until or self.everything):
            k = heappop(todo)
            until = max(until, walks.loop_end[k])
            for o in self._visit(k):
                at = walks.readers.get(o.tensor, ())
                for j in at:
                    if j > k and j not in queued:
                        queued.add(j)
                        heappush(todo, j)
                    elif j < k and not all(self._last_round(u) for u in walks.steps[j].uses if u.tensor == o.tensor):
                        early.add(j)
                if at and self.states[o.tensor].walks:
                    until = max(until, at[-1])
        return early

    def _visit(self, k: int) -> Iterator[Use]:
        """What one statement makes of the fiber; the results of which that says something new."""
        name, s = self.fiber.tensor, self.walks.steps[k]
        found: list[_Read] = []
        for u in s.uses:
            if u.tensor == name or u.tensor in self.states:
                self._reads(u, s, found)
        if not found:
            return
        focus = self.fiber.part or 0
        whole = any(r.whole for r in found)
        walks_all = whole or (self.summaries and any(r.position[focus:] and r.position[focus] for r in found))
        worst = max(found, key=lambda r: (r.passes + (r.late and walks_all), r.again, r.late))
        again = worst.late and walks_all
        number = worst.passes + again
        link = _Link(s.outs[0].tensor, again, worst.link)
        if whole:
            self.data.add(number)
        if walks_all:
            if number > self.best:
                self.best, self.link = number, link
            if any(r.whole and r.tensor == name for r in found):
                self.read_in[k] = number
        late = not walks_all and any(r.late for r in found)
        for o, place in zip(s.outs, s.place, strict=True):
            if o.tensor != name:
                mine = link if o is s.outs[0] else _Link(o.tensor, again, worst.link)
                new = self._made(place, found, number, late, mine, worst.again + again)
                old = self.states.get(o.tensor)
                self.states[o.tensor] = joined = new if old is None else _joined(old, new)
                if joined is not old:
                    yield o

    def _positions(self, u: Use) -> tuple[tuple[str, ...], ...]:
        return tuple((v,) for d in self.fiber.dims for v in u.index[d].walked)

    def _last_round(self, u: Use) -> bool:
        """Does this read stand for the last round of an iterative rank that the fiber does not walk along?"""
        return u.tensor in self.walks.carried and any(
            i.plain and self.walks.stepping.get((u.tensor, d)) == i.walked and self.along.isdisjoint(i.walked)
            for d, i in enumerate(u.index))

    def _reads(self, u: Use, s: Step, out: list[_Read]) -> None:
        """Add what one access means for the fiber: nothing, or one reading for each way its tensor walks along it."""
        if u.tensor == self.fiber.tensor:
            if direct := self._positions(u):
                out.append(_Read(u.tensor, direct, True, 1, False, self.root, 0))
            return
        state = self.states[u.tensor]
        if any(o.tensor == u.tensor for o in s.outs) or self._last_round(u):
            return
        if not state.walks:
            out.append(_Read(u.tensor, (), False, state.passes, state.late, state.link, state.again))
        for dims, whole in zip(state.walks, state.whole, strict=True):
            position, barrier, everywhere = self.walks.walked(u, dims)
            late = state.late or barrier
            self.waits |= late
            out.append(_Read(u.tensor, position, whole and everywhere, state.passes, late, state.link, state.again))

    def _made(self, place: dict[str, int], found: list[_Read], number: int, late: bool, link: _Link,
              again: int) -> _State:
        """The state of a result that walks along `place`, made of these reads."""
        walks: dict[tuple[tuple[int, ...], ...], bool] = {}
        focus = self.fiber.part or 0  # the whole ends where its outermost position does
        for r in found:
            dims, some, everywhere = self.walks.placed(place, r.position)
            if focus < len(dims) and r.position[focus] and not dims[focus]:
                late = True
            if some:
                walks[dims] = walks.get(dims, False) or (r.whole and everywhere)
        self.waits |= late
        return _State(tuple(walks), tuple(walks.values()), number, late, link, again)


def _joined(old: _State, new: _State) -> _State:
    """Two writers of one tensor (initial value and step, or several regions); `old` where that says nothing new."""
    if new.passes > old.passes:
        return new
    if new.passes == old.passes and new.late == old.late:
        walks = dict(zip(old.walks, old.whole, strict=True))
        for w, whole in zip(new.walks, new.whole, strict=True):
            walks[w] = walks.get(w, False) or whole
        if (tuple(walks), tuple(walks.values())) == (old.walks, old.whole):
            return old
        return _State(tuple(walks), tuple(walks.values()), old.passes, old.late, old.link, old.again)
    return old if old.passes > new.passes or old.late else new
