"""How each group runs: which ranks are parallel, which are cut, what lies across the lanes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memcomp.ir import flow
from memcomp.ir.cascade import Cascade, Einsum, Knob, Rank
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Call, Const, Expr, Size, Var, call, reads, substitute, variables
from memcomp.ir.ops import MONOIDS
from memcomp.ir.places import explicit, order_of
from memcomp.ir.program import Group, Program
from memcomp.ir.target import BYTES, target
from memcomp.passes._roles import WHOLE, accesses, carried, common, largest, out_vars, product_operands, shared, whole

PARTS = 64, 128, 256  # of a rank that is summed, or broadcast, beside a tile of sums
SUMS = 1 << 17  # of such a tile (512 KiB of f32: half of what a core has nearby)
LANES = 16  # of a vector, at least: a shorter one does its share of a tile several times
ROWS = 32  # row ranks of at most so many points together stay whole tile dims


def partition(program: Program, *, lanes: int = 0) -> Program:
    """Give every group its space, loop order, cuts and lane; tile sizes stay knobs where a search may choose.

    lanes: elements of a vector, by default those of the target, at least 16; row tiles are one, two or four vectors
    wide.

    Row ranks are those that some streamed operand of a product lacks (queries: a key row serves all of them).  A long
    row rank is cut and laid across the lanes, so that elements of the streamed operands are broadcast; short ones stay
    in the tile, so that each streamed row is read once for all of them.  Other ranks run in parallel.

    Two long row ranks of one product, each missing from another operand (tokens and outputs), are both cut: one lies
    across the lanes, elements of the other's operand are broadcast, and the parts of the summed rank are long, so that
    a tile of sums is worth what is loaded for it.  What has only one of the two is made again for each tile of the
    other.

    A long rank of a running state that the others lack (the features of a value) is a dim of the tile.  Where that is
    more than the cache nearest to the registers holds, the rank gets a knob: whole, or in tiles that run in parallel,
    each of which makes the other states (the scores) anew.  The cost model charges for that and chooses.

    before:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out S[B]: f32
        S[b] = sum{m} X[b, m]
        group g0: S
    after:
        program p
        rank B
        rank M
        in X[B, M]: f32
        out S[B]: f32
        S[b] = sum{m} X[b, m]
        group g0: S
          partition M: 256
          space B
          loop-order M1
    """
    lanes = lanes or max(LANES, target(program.target).lanes if program.target else 0)
    out = program
    for k, g in enumerate(program.mapping.groups):
        if not (g.space or g.loop_order or g.partition):
            out = _Mapper(out, k, lanes).run()
    return out


@dataclass(slots=True)
class _Mapper:
    program: Program
    at: int
    lanes: int

    def run(self) -> Program:
        c, g = self.program.cascade, self.program.mapping.groups[self.at]
        places = c.once(_places)
        where = sorted({k for t in g.tensors for k in places[t]})
        paths = [c.once(flow.loops)[k] for k in where]
        loops = {path[0][0] for path in paths if path}
        if any(len(path) > 1 for path in paths) or len(loops) > 1:
            raise Refusal(
                f"group {g.name} has nested or several sequential ranks", ", ".join(g.tensors), "a kernel runs one loop"
            )
        members = [c.einsums[k] for k in where]
        if loops:
            return self._loop(c, g, members, loops.pop())
        return self._plain(c, g, members, where)

    def _with(self, c: Cascade, g: Group) -> Program:
        groups = list(self.program.mapping.groups)
        if groups[self.at] == g and c is self.program.cascade:
            return self.program
        groups[self.at] = _own_knobs(g, groups[:self.at])
        return replace(self.program, cascade=c, mapping=replace(self.program.mapping, groups=tuple(groups)))

    # -- a loop ------------------------------------------------------------------------------------------------------

    def _loop(self, c: Cascade, g: Group, members: list[Einsum], v: str) -> Program:
        own = shared(c, [e for e in members if v in out_vars(e)], v)
        operands = [a for e in members for a in product_operands(e) if v in variables(a)]
        rows = [x for x in own if any(x not in variables(a) for a in operands)]
        long = [x for x in rows if not whole(c, x) or (largest(c, x.upper()) or 0) > ROWS]
        cut, held = "", list[str]()
        if crossed := self._crossed(c, members, v, long):
            return self._both(c, g, members, v, own, *crossed)
        if long:
            cut = next((x for x in reversed(long) if self._free(c, x)), "")
        else:
            points = 1
            for x in reversed(rows):
                points *= largest(c, x.upper()) or 1
                if points <= ROWS:
                    held.append(x)
        space = tuple(f"{x.upper()}1" if x == cut else x.upper() for x in own if x not in held)
        parts: tuple[tuple[str, Expr | Knob], ...] = ()
        if cut:
            parts = ((cut.upper(), Knob(f"{cut}0", (self.lanes, 2 * self.lanes, 4 * self.lanes))),)
        points = self.lanes if cut else math.prod(largest(c, x.upper()) or 1 for x in held)
        if wide := self._wide(c, members, v, own, points):
            parts = (*parts, (wide, Knob(f"{wide.lower()}0", tiles_of(largest(c, wide) or 1, self.lanes))))
            space = (*space, f"{wide}1")  # the last: what its tiles share is read again while it is near
        lane = f"{cut.upper()}0" if cut else None
        if self._feature(c, members, v, cut):
            c = _in_parts(c, members, v)
        if operands and not long:  # few rows: what a step costs besides its products is shared by more points
            c = replace(c, ranks=tuple(_longer(r) if r.name in _summed(members, v) else r for r in c.ranks))
        return self._with(c, replace(g, partition=parts, space=space, loop_order=(v.upper(),), lane=lane))

    def _crossed(self, c: Cascade, members: list[Einsum], v: str, long: list[str]) -> tuple[str, str] | None:
        """Two long row ranks of a product, each of which one operand lacks; first the one to lay across the lanes.

        It is that of an operand which the loop computes: its tile is written as it is wanted.  The other operand's
        elements are broadcast from where they lie.
        """
        made = {n for e in members for n in e.names if v in out_vars(e)}
        free = [x for x in long if self._free(c, x)]
        for e in members:
            operands = [a for a in product_operands(e) if v in variables(a)]
            for x in sorted(free, key=lambda x: not any(x in variables(a) and reads(a) & made for a in operands)):
                others = [b for b in operands if x not in variables(b)]
                for y in free:
                    if any(y in variables(b) for b in others) and \
                            any(x in variables(a) and y not in variables(a) for a in operands):
                        return x, y
        return None

    def _both(self, c: Cascade, g: Group, members: list[Einsum], v: str, own: tuple[str, ...], x: str, y: str,
              ) -> Program:
        """Tiles over two row ranks, x across the lanes, with parts of the summed rank that are worth a tile of sums."""
        names, n = {x.upper(), y.upper()}, largest(c, y.upper())
        sizes = PARTS if n is None else tiles_of(n, self.lanes)
        sizes = tuple(k for k in sizes if k <= SUMS // (4 * self.lanes)) or sizes[:1]
        parts = ((x.upper(), Knob(f"{x}0", (self.lanes, 2 * self.lanes, 4 * self.lanes))),
                 (y.upper(), Knob(f"{y}0", sizes)))
        space = tuple(f"{z.upper()}1" if z.upper() in names else z.upper() for z in own)
        mapped = replace(g, partition=parts, space=space, loop_order=(v.upper(),), lane=f"{x.upper()}0")
        return self._with(_in_parts(c, members, v), mapped)

    def _feature(self, c: Cascade, members: list[Einsum], v: str, cut: str) -> bool:
        """Is the rank that is cut one of features of what is summed, for which tiles were made short?"""
        made = {n for e in members for n in e.names}
        fixed = cut and not whole(c, cut) and largest(c, cut.upper()) is not None
        return bool(fixed) and any({v, cut} <= variables(a) and a.tensor not in made
                                   for e in members for a in accesses(e))

    def _wide(self, c: Cascade, members: list[Einsum], v: str, own: tuple[str, ...], points: int) -> str:
        """The rank whose tiles may run in parallel: a tile of a state over it and `points` points of rows is large."""
        if not self.program.target:
            return ""  # nothing says how much fits
        mine = c.once(carried)
        states = [e for e in members if any(n in mine and mine[n][1] is e and mine[n][0] == v for n in e.names)]
        fixed = {v, *own, *(x for e in members if e.reduce for x in e.reduce.over)}
        extents = {x: largest(c, x.upper()) or 0 for e in states for x in out_vars(e) if x not in fixed}
        levels = target(self.program.target).levels
        room = levels[min(1, len(levels) - 1)].bytes
        found = [x for x, n in extents.items() if points * n * BYTES["f32"] > room and self._free(c, x)]
        return max(found, key=extents.__getitem__).upper() if found else ""

    def _free(self, c: Cascade, var: str) -> bool:
        """May the rank be cut: are the names of its parts free?"""
        return not {f"{var.upper()}0", f"{var.upper()}1"} & {r.name for r in c.ranks}

    # -- maps and plain reductions -----------------------------------------------------------------------------------

    def _plain(self, c: Cascade, g: Group, members: list[Einsum], where: list[int]) -> Program:
        if len(members) > 1 and len({e.out.tensor for e in members}) == 1 and len({e.out.index for e in members}) > 1:
            return self._pieces(c, g, members)
        long = _long(c, members)
        if long:
            c, members = self._stream(c, members, where, long)
        return self._with(c, self._cut(c, g, members, _long(c, members)))

    def _pieces(self, c: Cascade, g: Group, members: list[Einsum]) -> Program:
        """One tensor that several statements write piece by piece: each piece is a kernel and reads what it can use."""
        cut: dict[str, Expr | Knob] = {}
        space: dict[str, None] = {}
        for e in members:
            long = _long(c, [e])
            if len(long) > 1:
                raise Refusal(f"{e.out.tensor} reduces over {_names(long)}", g.name, "a kernel streams one rank")
            one = self._cut(c, g, [e], long)
            for r, size in one.partition:
                cut.setdefault(r, size)
            space |= dict.fromkeys(one.space)
            g = replace(g, loop_order=tuple(dict.fromkeys((*g.loop_order, *one.loop_order))))
        space = {r: None for r in space if f"{r}1" not in space}
        return self._with(c, replace(g, partition=tuple(cut.items()), space=tuple(space)))

    def _cut(self, c: Cascade, g: Group, members: list[Einsum], long: list[str]) -> Group:
        """The last common rank is cut into tiles, the one before it too where a product can reuse what it loads."""
        # a scatter has no mask: whether a point is stored must be the same in a whole tile
        scattered = [e for e in members if any(reads(i) for i in e.out.index)]
        alone = {v for e in scattered for x in e.guards() for v in variables(x)}
        points = list(common(members))
        cut: list[tuple[str, Expr | Knob]] = []
        held: list[str] = []
        product = any(product_operands(e) for e in members)
        wide = any(set(out_vars(e)) - set(points) for e in members)  # tiles have a dim of their own for the lanes
        for x, size in zip(reversed(points), () if wide else (4 * self.lanes, self.lanes), strict=False):
            n = largest(c, x.upper())
            if x in alone:
                continue
            if cut and all(x in variables(a) for e in members for a in product_operands(e)):
                break  # nothing that is loaded serves more than one of its points
            if n is not None and n <= size:
                held.append(x)
                if not product:
                    break
            elif self._free(c, x) and (len(points) > 1 or not long):
                # what a product loads serves all rows of a tile: how many are worth it, cost tells
                wider = (size, 4 * size, 8 * size) if product and cut else ()
                cut.append((x.upper(), Knob(f"{x}0", wider) if wider else Const(size)))
                if not product:
                    break
            else:
                break
        names = {r for r, _ in cut}
        space = tuple(f"{x.upper()}1" if x.upper() in names else x.upper() for x in points if x not in held)
        longest = 16 * self.lanes
        short = tuple(longest // k for k in (4, 2, 1)) if product and len(cut) > 1 else ()
        streams = tuple((x.upper(), Knob(f"{x}0", short) if short else Const(longest // 4 if cut else longest))
                        for x in long)
        return replace(g, partition=(*cut, *streams), space=space, loop_order=tuple(f"{x.upper()}1" for x in long))

    def _stream(
        self, c: Cascade, members: list[Einsum], where: list[int], long: list[str]
    ) -> tuple[Cascade, list[Einsum]]:
        """One long reduced rank whose parts have free names: several become one, a taken name gets a new one."""
        if len(long) == 1 and self._free(c, long[0]):
            return c, members
        walks = [(e, e.reduce) for e in members if e.reduce is not None]
        for e, reduce in walks:  # together, or not at all: statements of one kernel stay in step
            if not (MONOIDS[reduce.monoid].join or order_of(e)) or {*reduce.over} & {*long} not in ({*long}, set()):
                raise Refusal(f"{e.out.tensor} reduces over {_names(long)}", "", "a kernel streams one rank")
        taken = {r.name for r in c.ranks}
        name = next(
            n
            for n in ("".join(x.upper() for x in long) + "_" * k for k in range(1, 99))
            if not {n, f"{n}0", f"{n}1"} & taken
        )
        flat, table = Var(name.lower()), dict[Expr, Expr]()
        extent: Expr | None = None
        for x in reversed(long):
            part: Expr = flat if extent is None else call("floordiv", flat, extent)
            extent = Size(x.upper()) if extent is None else call("mul", extent, Size(x.upper()))
            table[Var(x)] = part if x == long[0] else call("mod", part, Size(x.upper()))
        bounds = [c.rank(x.upper()).extent for x in long]
        if any(isinstance(b, Call | Access) and reads(b) for b in bounds):
            raise Refusal(
                f"{walks[0][0].out.tensor} reduces over several ranks, one of them ragged",
                "",
                "a kernel streams one rank",
            )

        def walked(e: Einsum) -> Einsum:
            if e.reduce is None or not {*e.reduce.over} & {*long}:
                return e
            e = explicit(e)
            assert e.reduce is not None
            over = (name.lower(), *(v for v in e.reduce.over if v not in long))
            guard = None if e.guard is None else substitute(e.guard, table)
            return replace(e, body=substitute(e.body, table), guard=guard, reduce=replace(e.reduce, over=over))

        rest, new = list(c.einsums), [walked(e) for e in members]
        for k, e in zip(where, new, strict=True):
            rest[k] = e
        return replace(c, ranks=(*c.ranks, Rank(name, extent)), einsums=tuple(rest)), new


def _own_knobs(g: Group, others: Sequence[Group]) -> Group:
    """The group with knobs of its own where another group has one of the same name and other choices."""
    taken = {k.name: k.choices for x in others for _, k in x.partition if isinstance(k, Knob)}
    return replace(g, partition=tuple(
        (r, Knob(f"{k.name}_{g.name}", k.choices) if isinstance(k, Knob) and taken.get(k.name, k.choices) != k.choices
         else k) for r, k in g.partition))


def tiles_of(extent: int, lanes: int) -> tuple[int, ...]:
    """Sizes that a wide rank may be cut into: halves of halves of it down to what is no wide rank, and the whole."""
    found = [extent]
    while found[-1] > WHOLE:
        found.append(-(-found[-1] // (2 * lanes)) * lanes)
    return tuple(sorted(found[:-1] if found[-1] < WHOLE else found))


def _summed(members: list[Einsum], v: str) -> set[str]:
    """Ranks that statements inside the loop reduce."""
    return {d.upper() for e in members if v in out_vars(e) and e.reduce for d in e.reduce.over}


def _in_parts(c: Cascade, members: list[Einsum], v: str) -> Cascade:
    """Where the ranks summed in the loop over v are cut by a knob, sizes that keep a tile of sums busy."""
    over = _summed(members, v)
    return replace(c, ranks=tuple(replace(r, extent=Knob(r.extent.name, PARTS))
                                  if r.name in over and isinstance(r.extent, Knob) else r for r in c.ranks))


def _longer(r: Rank) -> Rank:
    """The rank with tiles twice as long as any among its choices, where their size is open."""
    if not isinstance(r.extent, Knob):
        return r
    return replace(r, extent=Knob(r.extent.name, (*r.extent.choices, 2 * max(r.extent.choices))))


def _places(c: Cascade) -> dict[str, list[int]]:
    """Tensor -> the numbers of the statements that write it."""
    out: dict[str, list[int]] = {}
    for k, e in enumerate(c.einsums):
        for n in e.names:
            out.setdefault(n, []).append(k)
    return out


def _long(c: Cascade, members: list[Einsum]) -> list[str]:
    """Reduced variables whose rank is no tile as it is."""
    return list(dict.fromkeys(v for e in members for v in (e.reduce.over if e.reduce else ()) if not whole(c, v)))


def _names(vs: list[str]) -> str:
    return ", ".join(v.upper() for v in vs)
