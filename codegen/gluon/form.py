"""What a tile kernel must be for warps to divide its work: loops in which one product feeds another.

    for j: S = Q . K(j);  P = elementwise operations on S, and reductions over its keys;  O = O * again;  O += P . V(j)

Of O nothing is read in between but by statements that write it, so a step's second product can run while the next
step's S is reduced.  K and V are tiles that the memory unit can fetch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from memcomp.codegen.triton.layout import Axis, Layout
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, walk
from memcomp.ir.tile import (
    Best,
    Dot,
    Load,
    Loop,
    Map,
    Statement,
    Store,
    TileKernel,
    When,
    expressions,
    joins,
    made,
    statements,
)

HALF = 64   # rows of one group: what four warps multiply at once
ROWS = 2 * HALF
ELSE = "the triton backend takes it"


@dataclass(frozen=True, slots=True)
class Form:
    """The parts of such a kernel.

    before, loops, after: its statements in order.  query, left, right: the loads of the operands, the first outside the
    loops, the others in each.  first, last: the products: one over rows and keys that sums over depth, the other over
    rows and columns that sums over keys.
    """

    before: tuple[Statement, ...]
    loops: tuple[Loop, ...]
    after: tuple[Statement, ...]
    query: Load
    left: Load
    right: Load
    first: Dot
    last: Dot
    rows: Axis
    depth: Axis
    keys: Axis
    columns: Axis

    @property
    def fetched(self) -> tuple[Load, Load, Load]:
        """What the memory unit brings."""
        return self.query, self.left, self.right


def form(k: TileKernel, layout: Layout) -> Form:
    """The parts of a kernel.  Raises Refusal with what keeps it from having this form."""
    for s in statements(k.body):
        if isinstance(s, Best):
            raise Refusal(f"{s.tile} keeps the best of a row", k.name, ELSE)
    at = [n for n, s in enumerate(k.body) if any(isinstance(x, Dot) for x in statements((s,)))]
    loops = tuple(s for s in k.body[at[0]:at[-1] + 1] if isinstance(s, Loop)) if at else ()
    if not at or len(loops) != at[-1] - at[0] + 1:
        raise Refusal("its products are not all in loops that follow one another", k.name, ELSE)
    pairs = {_pair(s) for s in loops}
    pair = pairs.pop()
    if pair is None or pairs:
        raise Refusal("a loop has other than one product that feeds a second one", k.name, ELSE)
    first, last = pair
    x, y = layout.matrices(k, first), layout.matrices(k, last)
    if x is None or y is None or x.batch or y.batch:
        raise Refusal("its products are none of two matrices", k.name, ELSE)
    if (x.left, x.right, x.left) != (y.left, y.over, y.left) or y.a.tensor != first.tile:
        raise Refusal(f"{first.tile} is not the left operand of {last.tile}", k.name, ELSE)
    if x.left.size != ROWS or x.left.points > ROWS:
        raise Refusal(f"a task has {x.left.points} rows, and two groups of four warps take {ROWS}", k.name,
                      f"cut the rows in tiles of {ROWS}, or use the triton backend")
    before, after = k.body[:at[0]], k.body[at[-1] + 1:]
    query, left, right = (_load(k, t) for t in (x.a.tensor, x.b.tensor, y.b.tensor))
    if query not in before or any(left not in s.body or right not in s.body for s in loops):
        raise Refusal("its operands are not one tile for all steps and two for each", k.name, ELSE)
    read = [t for s in statements(k.body) for t in _reads(s)]
    if shared := [s.tile for s in (query, left, right) if read.count(s.tile) != len(loops)]:
        raise Refusal(f"{shared[0]} is read by other than a product", k.name, ELSE)
    made = Form(before, loops, after, query, left, right, first, last, x.left, x.over, x.right, y.right)
    for s in loops:
        _apart(k, made, s)
    return made


def _pair(s: Loop) -> tuple[Dot, Dot] | None:
    dots = [x for x in s.body if isinstance(x, Dot)]
    inside = [x for x in statements(s.body) if isinstance(x, Dot)]
    if len(dots) != 2 or len(inside) != 2 or dots[0].accumulate or not dots[1].accumulate:
        return None
    return dots[0], dots[1]


def _load(k: TileKernel, tile: str) -> Load:
    """The load that alone writes a tile."""
    writers = {s for s in statements(k.body) if tile in made(s)}
    only = writers.pop() if len(writers) == 1 else None
    if not isinstance(only, Load):
        raise Refusal(f"the operand {tile} is computed", k.name, ELSE)
    return only


def _apart(k: TileKernel, x: Form, s: Loop) -> None:
    """Refuses a loop whose second product cannot wait for the next step."""
    total, start, end = x.last.tile, s.body.index(x.first), s.body.index(x.last)
    if start > end or x.first.tile in wrote(s.body[end + 1:]):
        raise Refusal(f"{x.first.tile} changes after {total} has taken it", k.name, ELSE)
    for n, one in enumerate(s.body):
        written = wrote((one,))
        if total not in written:
            if total in reads((one,)):
                raise Refusal(f"{total} is read in the loop that sums it", k.name, ELSE)
            continue
        rest = {t for later in s.body[n + 1:] for t in wrote((later,)) - {total}}
        late = one is not x.last and rest & reads((one,))
        if written != {total} or not isinstance(one, (Map, Dot)) or not start < n <= end or late:
            raise Refusal(f"what becomes of {total} in a step cannot wait for the next", k.name, ELSE)


def wrote(body: Iterable[Statement]) -> set[str]:
    """Tiles that statements write, inner ones included."""
    return {t for s in statements(tuple(body)) for t in made(s)}


def reads(body: Iterable[Statement]) -> set[str]:
    """Tensors and tiles that statements read, inner ones included."""
    return {t for s in statements(tuple(body)) for t in _reads(s)}


def _reads(s: Statement) -> Iterator[str]:
    for e in (s.source.index if isinstance(s, Load) else expressions(s)):
        yield from (n.tensor for n in walk(e) if isinstance(n, Access))
    yield from (s.tile,) if isinstance(s, Store) else made(s) if joins(s) else ()


def useful(body: tuple[Statement, ...]) -> tuple[Statement, ...]:
    """The statements without those whose tiles nothing reads on the way to a store."""
    wanted: set[str] = set()
    while not (read := reads(kept := tuple(_kept(body, wanted)))) <= wanted:
        wanted |= read
    return kept


def _kept(body: tuple[Statement, ...], wanted: set[str]) -> Iterator[Statement]:
    for s in body:
        if isinstance(s, Loop):
            if inner := tuple(_kept(s.body, wanted)):
                yield replace(s, body=inner)
        elif isinstance(s, When):
            inner, other = tuple(_kept(s.body, wanted)), tuple(_kept(s.orelse, wanted))
            if inner or other:
                yield replace(s, body=inner, orelse=other)
        elif isinstance(s, Store) or s.tile in wanted:
            yield s


def taken(body: tuple[Statement, ...]) -> set[str]:
    """Tiles whose value from before the statements they read."""
    out: set[str] = set()
    written: set[str] = set()
    for s in body:
        out |= (taken(s.body) | reads((replace(s, body=()),)) if isinstance(s, Loop) else reads((s,))) - written
        if not isinstance(s, (Loop, When)):
            written |= wrote((s,))
    return out


def needed(body: tuple[Statement, ...], wanted: Iterable[str]) -> tuple[Statement, ...]:
    """The statements that make the tiles wanted, in order."""
    out: list[Statement] = []
    want = set(wanted)
    for s in reversed(body):
        if wrote((s,)) & want:
            out.insert(0, s)
            want |= reads((s,))
    return tuple(out)
