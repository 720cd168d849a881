"""Loops and branches: what threads hold of a reduction agrees where ways meet, and loops ask for their steps ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcomp.codegen.cuda.sums import Partial
from memcomp.codegen.triton.parts import parts
from memcomp.ir.expr import Access, walk
from memcomp.ir.tile import Load, Loop, Statement, Store, When, expressions, joins, statements
from memcomp.ir.tile import made as tiles_of

if TYPE_CHECKING:
    from memcomp.codegen.cuda.emit import Writer

AT_MOST = 4         # steps under way at once
EXCHANGE = 32 * 64  # bytes of shared memory that a warp's threads pass to others: `combine` has two rooms of AT_ONCE
OWN = 16 * EXCHANGE  # for the most warps; the system's 1,024 are within


class Steps:
    """Loops and branches of one kernel.  most: bytes of shared memory of a block; shared: those that steps take which
    are asked for ahead."""

    def __init__(self, w: Writer, most: int) -> None:
        self.w, self.most, self.shared = w, most, 0
        self.crowded = False   # is there a loop whose steps have no room to be asked for ahead?

    def when(self, s: When) -> None:
        self.w.sums.settle(s.cond)
        start, sides, ends = dict(self.w.sums.pending), [], []
        for body in (s.body, s.orelse):
            self.w.sums.pending = dict(start)
            self.w.depth += 1
            with self.w.aside() as lines:
                self.w.body(body)
            self.w.depth -= 1
            sides.append(lines)
            ends.append(self.w.sums.pending)
        agreed = dict(ends[0])
        for t in sorted({*ends[0], *ends[1]}):
            a, b = ends[0].get(t), ends[1].get(t)
            if a != b:
                self._agree(t, a or b if not (a and b) else None, ends, sides)
                agreed.pop(t, None)
                if part := ends[0].get(t):
                    agreed[t] = part
        self.w.sums.pending = {t: p for t, p in agreed.items() if ends[0].get(t) == p}  # a list is two tiles
        self.w.line(f"if ({self.w.scope.cast(s.cond, 'bool', {})}) {{")
        self.w.lines += sides[0]
        if sides[1]:
            self.w.line("} else {")
            self.w.lines += sides[1]
        self.w.line("}")

    def _agree(self, tile: str, part: Partial | None, ends: list[dict[str, Partial]], sides: list[list[str]]) -> None:
        """Make both sides of a branch hold a tile alike: each thread its part, or joined."""
        for n in range(2):
            self.w.sums.pending = ends[n]
            if self.w.sums.pending.get(tile) == part:
                continue
            self.w.depth += 1
            with self.w.aside() as lines:
                if part is None:
                    self.w.sums.join(tile)
                else:
                    self.w.sums.divide(tile, part)
            self.w.depth -= 1
            sides[n] += lines

    def loop(self, s: Loop) -> None:
        """A loop in parts, of which the long one has no masks."""
        self.w.sums.settle(s.lo, s.hi)
        own, pieces = self._own(s), parts(self.w.k, s)
        start, last = self.w.scope.whole(s.lo), self.w.names.fresh("end")
        self.w.line(f"const int {last} = {self.w.scope.whole(s.hi)};")
        for p in pieces:
            end = last
            if p.end is not None:
                self.w.sums.settle(p.end)
                end = self.w.names.fresh("end")
                self.w.line(f"const int {end} = least(most({self.w.scope.whole(p.end)}, {start}), {last});")
            before = set(self.w.full)
            self.w.full |= {d for d in p.full if self.w.block.dims[d].exact}
            self.steps(s.var, start, end, early(p.body, self.w.memory.written), own)
            self.w.full, start = before, end

    def steps(self, var: str, lo: str, hi: str, body: tuple[Statement, ...], own: set[str]) -> None:
        """Steps that leave each tile to threads as they found it: joined, or each with its part.  Tried until they do;
        own: tiles that live within one step."""
        whole: set[str] = set()
        divided: dict[str, Partial] = {}
        start, known = dict(self.w.sums.pending), (set(self.w.names.used), dict(self.w.names.known))
        while True:
            self.w.sums.pending = dict(start)
            self.w.names.used, self.w.names.known = set(known[0]), dict(known[1])
            with self.w.aside() as lines:
                for t in sorted(whole & set(self.w.sums.pending)):
                    self.w.sums.join(t)
                for t in sorted(divided.keys() - whole - set(self.w.sums.pending)):
                    self.w.sums.divide(t, divided[t])
                entry = dict(self.w.sums.pending)
                ahead = self.ahead(body)
                rest = body[len(ahead):]
                if ahead:
                    self.first(var, lo, hi, ahead)
                self.w.line("#pragma unroll 1")
                name = self.w.names[var]
                self.w.line(f"for (int {name} = {lo}; {name} < {hi}; ++{name}) {{")
                self.w.depth += 1
                self.w.open.append(var)
                if ahead:
                    self.next(var, hi, ahead)
                self.w.counts(var)
                for s, at in ahead:
                    self.w.memory.load(s, f"{self.w.names['room']} + {at}" if at else self.w.names["room"])
                self.w.body(rest)
                for t in sorted(own & set(self.w.sums.pending)):
                    self.w.sums.pending.pop(t)
                for t in sorted(whole & set(self.w.sums.pending)):
                    self.w.sums.join(t)
                self.w.open.pop()
                self.w.depth -= 1
                self.w.line("}")
            if self.w.sums.pending == entry:
                break
            for t in {*entry, *self.w.sums.pending}:
                if entry.get(t) != self.w.sums.pending.get(t):
                    if t in entry:
                        whole.add(t)
                    else:
                        divided[t] = self.w.sums.pending[t]
        self.w.lines += lines

    def ahead(self, body: tuple[Statement, ...]) -> list[tuple[Load, int]]:
        """The loads that begin a step and can be asked for steps before, as they rest on nothing that a step writes,
        and where they lie in a room.  None in a loop round another."""
        made = {t for x in statements(body) for t in tiles_of(x)}
        found: list[tuple[Load, int]] = []
        size = 0
        for s in () if any(isinstance(x, Loop) for x in statements(body)) else body:
            read = {n.tensor for n in walk(s.source) if isinstance(n, Access)} if isinstance(s, Load) else made
            if not isinstance(s, Load) or read & (made | self.w.memory.written) or not (n := self.w.memory.room(s)):
                break
            found.append((s, size))
            size += n
        fits = 2 * size <= self.most - OWN
        self.crowded |= not fits
        return found if fits else []

    def rooms_of(self, ahead: list[tuple[Load, int]]) -> tuple[int, int]:
        """How many steps are under way, with the one at hand, and bytes of each: as many as let two blocks share a
        processor's memory, and two at least."""
        size = sum(self.w.memory.room(s) for s, _ in ahead)
        n = max(2, min(AT_MOST, (self.most // 2 - OWN) // size))
        self.shared = max(self.shared, n * size)
        return n, size

    def first(self, var: str, lo: str, hi: str, ahead: list[tuple[Load, int]]) -> None:
        """Before a loop: ask for its first steps."""
        n, size = self.rooms_of(ahead)
        slot, step = self.w.names["slot"], self.w.names["step"]
        self.meet(ahead)
        self.w.line("#pragma unroll 1")
        self.w.line(f"for (int {step} = 0; {step} < {n - 1}; ++{step}) {{")
        self.w.depth += 1
        self.ask(var, f"{lo} + {step}", hi, ahead, f"{self.w.names['staged']} + {step} * {size}")
        self.w.depth -= 1
        self.w.line("}")
        self.w.line(f"{slot} = 0;")

    def next(self, var: str, hi: str, ahead: list[tuple[Load, int]]) -> None:
        """At the beginning of a step: ask for one that comes, wait for this one."""
        n, size = self.rooms_of(ahead)
        slot, staged = self.w.names["slot"], self.w.names["staged"]
        before = f"({slot} == 0 ? {n - 1} : {slot} - 1)"
        self.meet(ahead)
        self.ask(var, f"{self.w.names[var]} + {n - 1}", hi, ahead, f"{staged} + {before} * {size}")
        self.w.line(f"come<{n - 1}>();")
        self.meet(ahead)
        self.w.line(f"const char *{self.w.names['room']} = {staged} + {slot} * {size};")
        self.w.line(f"{slot} = {slot} == {n - 1} ? 0 : {slot} + 1;")

    def meet(self, ahead: list[tuple[Load, int]]) -> None:
        """Where lanes ask for others: what those read of a room has been read, and what they wait for has come."""
        if any(self.w.memory.together(s) > 1 for s, _ in ahead):
            self.w.line("__syncwarp();")

    def ask(self, var: str, step: str, hi: str, ahead: list[tuple[Load, int]], room: str) -> None:
        later, place = self.w.names["later"], self.w.names["place"]
        self.w.line(f"if (const int {later} = {step}; {later} < {hi}) {{")
        self.w.depth += 1
        self.w.open.append(var)
        self.w.line(f"const int {self.w.names[var]} = {later};")
        self.w.line(f"char *{place} = {room};")
        self.w.counts(var)
        for s, at in ahead:
            self.w.memory.ask(s, f"{place} + {at}" if at else place)
        self.w.open.pop()
        self.w.depth -= 1
        self.w.line("}")
        self.w.line("asked();")

    def _own(self, s: Loop) -> set[str]:
        """Tiles that live within one step: written before they are read, and nowhere else touched."""
        inside = list(statements(s.body))
        within = {id(x) for x in inside}
        outside: set[str] = set()
        for x in statements(self.w.k.body):
            if id(x) not in within:
                outside |= self._touched(x)
        own: set[str] = set()
        seen: set[str] = set()
        for x in s.body:
            own |= {*tiles_of(x)} - seen - self._read(x)
            seen |= self._touched(x)
            if isinstance(x, (Loop, When)):
                for y in statements((x,)):
                    seen |= self._touched(y)
        return own - outside

    def _read(self, s: Statement) -> set[str]:
        found = set(self.w.sums.reads(*expressions(s)))
        if isinstance(s, Store):
            found |= {s.tile, *self.w.sums.reads(s.target)}
        return found | ({*tiles_of(s)} if joins(s) else set())

    def _touched(self, s: Statement) -> set[str]:
        return self._read(s) | {*tiles_of(s)}


def early(body: tuple[Statement, ...], written: set[str]) -> tuple[Statement, ...]:
    """Loads first, so that they are under way together: those of params that the kernel does not write, into tiles that
    nothing reads before, at places that the step does not compute."""
    first: list[Statement] = []
    rest: list[Statement] = []
    touched: set[str] = set()
    for s in body:
        if isinstance(s, Load):
            read = {n.tensor for n in walk(s.source) if isinstance(n, Access)}
            if not read & (touched | written) and s.tile not in touched:
                first.append(s)
                continue
        rest.append(s)
        for x in statements((s,)):
            more = (x.target,) if isinstance(x, Store) else ()
            touched |= {n.tensor for e in (*expressions(x), *more) for n in walk(e) if isinstance(n, Access)}
            touched |= {x.tile} if isinstance(x, Store) else {*tiles_of(x)}
    return (*first, *rest)
