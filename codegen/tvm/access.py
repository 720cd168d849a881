"""Elements of params: where they lie, how they are converted, and the Load and Store statements."""

from __future__ import annotations

from collections.abc import Callable

from memcomp.codegen.tvm import diagonal
from memcomp.codegen.tvm.express import Expressions, linear, truth
from memcomp.codegen.tvm.writer import BITS, ELEMENT, TILE_ELEMENT, Point, Writer, times
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Expr, variables, walk
from memcomp.ir.inside import cut_to
from memcomp.ir.tile import Load, Param, Store, Tile

Body = Callable[[Point], None]
Strip = Callable[[str, int, str], None]           # base, lanes, mask
Square = Callable[[Point, str, str, int], None]   # point, first row, first column, side


def loaded(p: Param, text: str) -> str:
    """Text of a stored element (or vector) in its natural kind: f32 for every short float, int64 for integers."""
    if p.dtype == "bf16":
        return f"from_bf16({text})"
    if p.dtype in ("f32", "f64", "i64"):
        return text
    if p.dtype == "bool":
        return f"cast('int32', {text})"
    if p.dtype in ELEMENT:
        return f"cast({'float32' if p.dtype[0] == 'f' else 'int64'!r}, {text})"
    raise Refusal(f"{p.name} is stored as {p.dtype}", hint="the tvm backend does not read it")


def stored(p: Param, text: str) -> str:
    """Text of a value (in the tile's kind) as it is stored, rounded to nearest even."""
    if p.dtype == "bf16":
        return f"to_bf16(cast('float32', {text}))"
    if p.dtype == "bool":
        return f"cast('uint8', ne({text}, 0))"
    return f"cast({ELEMENT[p.dtype]!r}, {text})"


def view(w: Writer, p: Param) -> tuple[str, list[int]]:
    """The buffer through which a param is addressed, and the order of its dims there.

    bf16 and bool go as their bits, and the dim with stride 1 is last: TVM takes vectors nowhere else.  An output over
    an input is a view of that input, so that no compiler takes the two for different memory.
    """
    u, n = unit(w, p), len(p.shape)
    order = [k for k in range(n) if k != u] + ([u] if u >= 0 else [])
    own = p.dtype not in BITS and order == list(range(n)) and not p.over
    return w.names[p.name] if own else f"{w.names[p.name]}_view", order


def some_element(w: Writer, a: Access) -> list[Expr]:
    """Extents that must not be 0 where an element is read: those that an index is cut to."""
    found = [n for e in walk(a) if isinstance(e, Access) and e.tensor in w.params
             for i, n in zip(e.index, w.params[e.tensor].shape, strict=True) if cut_to(i, n)]
    return [n for n in dict.fromkeys(found) if not isinstance(n, Const)]


def scalar_element(w: Writer, a: Access, point: Point) -> str:
    """Text of one element in its natural kind; a bool comes as int32."""
    p = w.params[a.tensor]
    return loaded(p, place(w, a, point))


def place(w: Writer, a: Access, point: Point, lane: str = "", lanes: int = 1, base: str = "") -> str:
    """Text of the element itself (assignable), or of `lanes` neighbours along `lane`."""
    name, order = view(w, w.params[a.tensor])
    index = []
    for i in (a.index[k] for k in order):
        if lane and lane in variables(i):
            at = Expressions(w, point.at(**{lane: base})).index(i)
            index.append(f"at({lanes}, {at})")
        else:
            index.append(Expressions(w, point).index(i))
    return f"{name}[{', '.join(index) if index else '()'}]"


def gathered(w: Writer, a: Access, point: Point, count: str) -> str:
    """Text of an element per lane in its natural kind (a bool comes as int32), of lanes below `count` only.

    Where they lie is computed for all lanes at once, then they are read one by one.
    """
    name, order = view(w, w.params[a.tensor])
    index, k = [], w.names.fresh("k")
    for i in (a.index[n] for n in order):
        v = Expressions(w, point).value(i, "i64")
        if v.vec:
            places = w.names.fresh("places")
            w.line(f"{places} = acc({v.text})")
            index.append(f"{places}[{k}]")
        else:
            index.append(v.text)
    p, got = w.params[a.tensor], w.names.fresh("gather")
    element = {"bool": "int32", "f64": "float64"}.get(p.dtype, "int64" if p.dtype[0] in "iu" else "float32")
    w.line(f"{got} = acc(splat(cast({element!r}, i64(0)), {point.width}))")
    with w.block(f"for {k} in T.serial(T.max(T.min({count}, {point.width}), 0)):"):
        where = ", ".join(index) or "()"
        w.line(f"{got}[{k}] = {loaded(p, f'{name}[{where}]')}")
    return f"{got}[at({point.width})]"


def unit(w: Writer, p: Param) -> int:
    """The position whose stride is 1 in memory, or -1."""
    return w.units[p.name]


def contiguous(w: Writer, a: Access, dim: str) -> bool:
    """Are neighbours along `dim` neighbours in memory?"""
    u = unit(w, w.params[a.tensor])
    holders = [k for k, i in enumerate(a.index) if dim in variables(i)]
    if holders != [u]:
        return False
    got = linear(a.index[u], dim)
    return got is not None and got[0] == 1


def load(w: Writer, s: Load, point: Point) -> None:
    """Fill a tile from a param: by vectors where memory runs along the tile's last dim, by squares turned in registers
    where it runs along another of its dims, else one by one."""
    t, p = w.tiles[s.tile], w.params[s.source.tensor]
    element = TILE_ELEMENT[t.dtype]
    last = t.dims[-1] if t.dims else ""
    if last and contiguous(w, s.source, last):
        def strip(q: Point, base: str, lanes: int, mask: str) -> None:
            got = vector(w, s.source, q, last, lanes, base, mask)
            w.line(f"{w.tile_at(t.name, q.scalars, f'at({lanes}, {base})')} = cast({element!r}, {got})")

        over_points(w, t.dims[:-1], point, lambda q: strips(w, last, lambda b, n, m: strip(q, b, n, m)))
        return

    if any(linear(i, last) is None for i in s.source.index) and not any(contiguous(w, s.source, d) for d in t.dims):
        _load_gathered(w, s, point)
        return

    def one(q: Point) -> None:
        w.line(f"{w.tile_at(t.name, q.scalars)} = cast({element!r}, {scalar_element(w, s.source, q)})")

    def square(q: Point, row: str, column: str, size: int) -> None:
        along = turned[0]
        points = [q.at(**{last: f"({row} + {r})"}) for r in range(size)]
        rows = [place(w, s.source, x, along, size, column) for x in points]
        index = [f"({column})" if d == along else q.scalars[d] for d in t.dims[:-1]]
        to = f"{w.names[t.name]}, [{', '.join(index)}, {row}], {t.dims.index(along)}"
        w.line(f"put_turned({to}, [{', '.join(rows)}], {p.dtype!r})")

    turned = _turned(w, s.source, t)
    _by_squares(w, t, turned, point, square, one, _memory_order(w, s.source, t.dims))


def _load_gathered(w: Writer, s: Load, point: Point) -> None:
    """Fill a tile whose elements lie anywhere; those that depend on the difference of two dims are read once each."""
    t = w.tiles[s.tile]
    element, a = TILE_ELEMENT[t.dtype], t.dims[-1]
    lanes, number = w.vector(a), w.count(a)
    b = next((d for d in t.dims[:-1] if d in variables(s.source) and w.dims[d].capacity >= diagonal.FEWEST
              and diagonal.by_difference(w, s.source, a, d)), "")

    def row(q: Point, put: Callable[[str], str], count: str) -> None:
        j = w.names.fresh("j")
        with w.block(f"for {j} in T.serial(T.truncdiv({count} + {lanes - 1}, {lanes})):"):
            base = f"({j} * {lanes})"
            here = Point(q.scalars, a, lanes, base, q.held)
            got = gathered(w, s.source, here, f"{count} - {base}")
            w.line(f"{put(f'at({lanes}, {base})')} = cast({element!r}, {got})")

    if not b:
        over_points(w, t.dims[:-1], point, lambda q: row(q, lambda at: w.tile_at(t.name, q.scalars, at), number))
        return
    name = w.names.fresh("diagonal")
    w.buffers[name] = ((diagonal.length(w, a, b),), element)

    def plane(q: Point) -> None:
        other = w.count(b)
        with w.block(f"if T.min({number}, {other}) > 0:"):  # where no point of the tile is, no element of the param is
            row(q.at(**{b: f"({other} - 1)"}), lambda at: f"{name}[{at}]", f"({number} + {other} - 1)")
            v, j = w.names.fresh(w.names[b]), w.names.fresh("j")
            with w.block(f"for {v} in T.serial({other}):"), \
                    w.block(f"for {j} in T.serial(T.truncdiv({number} + {lanes - 1}, {lanes})):"):
                to = w.tile_at(t.name, q.scalars | {b: v}, f"at({lanes}, {j} * {lanes})")
                w.line(f"{to} = {name}[at({lanes}, {j} * {lanes} + ({other} - 1 - {v}))]")

    over_points(w, tuple(d for d in t.dims[:-1] if d != b), point, plane)


def store(w: Writer, s: Store, point: Point) -> None:
    """Write a tile to a param, in the manner of `load`."""
    t, p = w.tiles[s.tile], w.params[s.target.tensor]
    last = t.dims[-1] if t.dims else ""

    def kept(q: Point, body: Callable[[], None]) -> None:
        if s.mask is None:
            body()
            return
        with w.block(f"if {truth(Expressions(w, q).value(s.mask)).text}:"):
            body()

    if last and contiguous(w, s.target, last) and not (s.mask and last in variables(s.mask)):
        def strip(q: Point, base: str, lanes: int, mask: str) -> None:
            value = stored(p, w.tile_at(t.name, q.scalars, f"at({lanes}, {base})"))
            if mask:
                w.line(f"masked_store(T.address_of({place(w, s.target, q.at(**{last: base}))}), {mask}, {value})")
            else:
                w.line(f"{place(w, s.target, q, last, lanes, base)} = {value}")

        over_points(w, t.dims[:-1], point,
                    lambda q: kept(q, lambda: strips(w, last, lambda b, n, m: strip(q, b, n, m))))
        return

    def one(q: Point) -> None:
        kept(q, lambda: w.line(f"{place(w, s.target, q)} = {stored(p, w.tile_at(t.name, q.scalars))}"))

    def square(q: Point, row: str, column: str, size: int) -> None:
        along, at = turned[0], f"at({size}, {row})"
        columns = [w.tile_at(t.name, q.scalars | {along: f"({column} + {c})"}, at) for c in range(size)]
        name, order = view(w, p)
        target = [s.target.index[k] for k in order]
        index = [Expressions(w, q.at(**{last: f"({row})", along: f"({column})"})).index(i) for i in target]
        r = next(k for k, i in enumerate(target) if last in variables(i))
        w.line(f"store_turned({name}, [{', '.join(index)}], {r}, {p.dtype!r}, [{', '.join(columns)}])")

    turned = _turned(w, s.target, t) if s.mask is None else ("", 0)
    _by_squares(w, t, turned, point, square, one, _memory_order(w, s.target, t.dims))


def _turned(w: Writer, a: Access, t: Tile) -> tuple[str, int]:
    """(the dim along which the param's memory runs, side of the squares), or ("", 0) where squares do not fit."""
    if not t.dims or any(d not in _once(a) for d in t.dims):
        return "", 0
    for d in t.dims[:-1]:
        if contiguous(w, a, d):
            size = min(w.vector(t.dims[-1]), w.vector(d))
            while size > w.dims[d].capacity or w.dims[d].capacity % size:
                size //= 2
            if size >= 4:
                return d, size
    return "", 0


def _once(a: Access) -> set[str]:
    """Dims that one index holds, with factor 1."""
    found: dict[str, list[int]] = {}
    for i in a.index:
        for v in variables(i):
            got = linear(i, v)
            found.setdefault(v, []).append(got[0] if got is not None else 0)
    return {v for v, factors in found.items() if factors == [1]}


def _by_squares(w: Writer, t: Tile, turned: tuple[str, int], point: Point, square: Square, one: Body,
                order: tuple[str, ...]) -> None:
    """All points of a tile: whole squares over (turned dim, last dim), and what remains one by one."""
    column, size = turned
    if not size:
        over_points(w, order, point, one)
        return
    last = t.dims[-1]

    def plane(q: Point) -> None:
        whole = {}
        for d in (last, column):
            n = w.fixed(d)
            whole[d] = f"T.truncdiv({w.count(d)}, {size})" if n is None else f"i64({n // size})"
        i, j = w.names.fresh("i"), w.names.fresh("j")
        with w.block(f"for {i} in T.serial({whole[last]}):"), w.block(f"for {j} in T.serial({whole[column]}):"):
            square(q, f"{i} * {size}", f"{j} * {size}", size)
        for d, other in ((last, column), (column, last)):
            n = w.fixed(d)
            if n is not None and n % size == 0:
                continue
            v, u = w.names.fresh(w.names[d]), w.names.fresh(w.names[other])
            stop = w.count(other) if d == last else f"{whole[other]} * {size}"
            heads = f"for {v} in T.serial({whole[d]} * {size}, {w.count(d)}):", f"for {u} in T.serial({stop}):"
            with w.block(heads[0]), w.block(heads[1]):
                one(q.at(**{d: v, other: u}))

    over_points(w, tuple(d for d in t.dims if d not in (last, column)), point, plane)


def vector(w: Writer, a: Access, point: Point, lane: str, lanes: int, base: str, mask: str) -> str:
    """Text of `lanes` neighbours in their natural kind; where `mask` is given, lanes outside it are not read."""
    p = w.params[a.tensor]
    if not mask:
        return loaded(p, place(w, a, point, lane, lanes, base))
    address = f"T.address_of({place(w, a, point.at(**{lane: base}))})"
    element = BITS.get(p.dtype, ELEMENT[p.dtype])
    return loaded(p, f"masked_load({address}, {mask}, {element!r})")


def strips(w: Writer, dim: str, body: Strip, lanes: int = 0) -> None:
    """Call `body(base, lanes, mask)` for every vector of a dim; the mask is "" for whole vectors."""
    lanes = lanes or w.vector(dim)
    n = w.fixed(dim)
    whole = f"i64({n // lanes})" if n is not None else f"T.truncdiv({w.count(dim)}, {lanes})"
    if n is None or n >= lanes:
        with w.repeat("j", whole) as j:
            body(times(j, lanes), lanes, "")
    if n is not None and n % lanes == 0:
        return
    base = f"{whole} * {lanes}" if n is None else f"i64({n // lanes * lanes})"
    mask = f"lane({lanes}) < clip({w.count(dim)} - {base})"

    def tail() -> None:
        if lanes == 1:
            body(base, 1, "")
        else:
            body(base, lanes, mask)

    if n is not None:
        tail()
    else:
        with w.block(f"if {w.count(dim)} > {base}:"):
            tail()


def over_points(w: Writer, dims: tuple[str, ...], point: Point, body: Body) -> None:
    """Nested loops over all points of `dims`."""
    if not dims:
        body(point)
        return
    v = w.names.fresh(w.names[dims[0]])
    with w.block(f"for {v} in T.serial({w.count(dims[0])}):"):
        over_points(w, dims[1:], point.at(**{dims[0]: v}), body)


def _memory_order(w: Writer, a: Access, dims: tuple[str, ...]) -> tuple[str, ...]:
    """The dims so that neighbours in memory come last."""
    u = unit(w, w.params[a.tensor])

    def where(d: str) -> int:
        holders = [k for k, i in enumerate(a.index) if d in variables(i)]
        return -1 if not holders else len(a.index) if u in holders else max(holders)

    return tuple(sorted(dims, key=where))

