"""Loads and stores as Triton text: a 64-bit scalar address plus 32-bit offsets inside the tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcomp.codegen.triton.boxes import FORMATS, Box, Side, box
from memcomp.codegen.triton.express import DTYPES, dims_of
from memcomp.codegen.triton.layout import Axis
from memcomp.ir.expr import Access, Call, Const, Expr, call, reads, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import (
    Load,
    Loop,
    Param,
    Statement,
    Store,
    When,
    expressions,
    made,
    statements,
)

if TYPE_CHECKING:
    from memcomp.codegen.triton.values import Values

_ELEMENT = {"f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "i64": "tl.int64", "i32": "tl.int32",
            "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1"}


class Memory:
    """What a kernel reads and writes of its params."""

    def __init__(self, w: Values) -> None:
        self.w = w
        self.descriptors: dict[object, str] = {}
        loops = [s for s in statements(w.k.body) if isinstance(s, (Loop, When))]
        self.moving = {s.var for s in loops if isinstance(s, Loop)}
        self.moving |= {t for s in loops for x in statements((s,)) for t in made(x)}
        every = list(statements(w.k.body))
        self.read = {t for s in every for e in expressions(s) for t in reads(e)}
        self.written = {s.target.tensor for s in every if isinstance(s, Store)}

    def address(self, a: Access, axes: tuple[Axis, ...]) -> str:
        """Pointers to an element at each point of axes, or to one."""
        scope, strides = self.w.scope, {x.at: x.name for x in self.w.given.args
                                        if x.kind == "stride" and x.of == a.tensor}
        base, offsets = [scope.names[f"{a.tensor}_ptr"]], []
        for n, index in enumerate(a.index):
            fixed, moving = self.split(index)
            stride = scope.names[strides[n]] if n in strides else ""
            start = "" if fixed is None else f"{scope.word('wide')}({scope.scalar(fixed)})"
            # the tile's own offsets times the stride do not change in a loop, and LLVM would keep each in a register;
            # added to where the step begins, they are made anew
            together = bool(start) and moving is not None and bool(stride)
            if start and not together:
                base.append(self.scaled(start, stride))
            if moving is not None:
                text = scope.text(moving, axes)
                if any(isinstance(x, (Access, Call)) and self._large(x) for x in walk(moving)):
                    text = f"{scope.word('wide')}({text})"
                offsets.append(self.scaled(f"({start} + {text})" if together else text, stride))
        return " + ".join((*base, *(f"({t})" if " " in t else t for t in offsets)))

    def _large(self, e: Expr) -> bool:
        """May the value be as large as a tensor, not as a tile?"""
        return isinstance(e, Access) or (isinstance(e, Call) and e.op not in ("add", "mul", "sub", "neg"))

    def scaled(self, text: str, stride: str) -> str:
        return f"{text} * {stride}" if stride else text

    def split(self, index: Expr) -> tuple[Expr | None, Expr | None]:
        """The part of an index that is one for the tile, and the part that its points move; None for 0."""
        dims = self.w.scope.dims
        if not dims_of(index, dims):
            return (None if index == Const(0) else index), None
        data = {n.tensor for n in walk(index) if isinstance(n, Access)}
        terms = linear(index, integers=data)
        if terms is None:
            return None, index
        fixed: Expr = Const(0)
        moving: Expr = Const(0)
        for term, c in terms.items():
            part: Expr = Const(c) if term is None else term if c == 1 else call("mul", term, c)
            if term is not None and dims_of(term, dims):
                moving = part if moving == Const(0) else call("add", moving, part)
            else:
                fixed = part if fixed == Const(0) else call("add", fixed, part)
        fixed = simplify(fixed, index=True)
        return (None if fixed == Const(0) else fixed), moving

    def masks(self, axes: tuple[Axis, ...]) -> list[str]:
        return self.w.live(axes)

    def element(self, a: Access, axes: tuple[Axis, ...]) -> str:
        """The elements of a param that an expression reads at each point."""
        own = tuple(x for x in axes if dims_of(a, self.w.scope.dims) & set(x.dims))
        address = self.address(a, own)
        conditions = self.masks(own)
        mask = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        return self.w.scope.spread(f"tl.load({address}{mask})", own, axes)

    # -- boxes -------------------------------------------------------------------------------------------------------

    def box(self, s: Statement) -> Box | None:
        """The box that a statement loads or stores by a descriptor; None where it has none.

        Only in formats that tensor cores read, and not in tensors that the kernel both reads and writes: the copy
        engine does not see what threads have just written.
        """
        w = self.w
        if not w.boxed or not isinstance(s, (Load, Store)):
            return None
        a, axes = s.source if isinstance(s, Load) else s.target, w.scope.tiles[s.tile]
        p = w.params[a.tensor]
        if p.dtype not in FORMATS or isinstance(s, Load) and s.tile not in w.stored or isinstance(s, Store) and s.mask:
            return None
        if self.same(p) & (self.read if isinstance(s, Store) else self.written):
            return None
        strided = {x.at for x in w.given.args if x.kind == "stride" and x.of == p.name}
        unit = next((n for n in range(len(p.shape)) if n not in strided), -1)
        return box(a, p, unit, axes, {d.name: d for d in w.k.dims}, self.moving,
                   {x.name for x in w.given.args if x.kind == "size"})

    def same(self, p: Param) -> set[str]:
        """Params that may be the same memory."""
        return {p.name, p.over} | {q.name for q in self.w.params.values() if q.over in (p.name, p.over) and q.over}

    def describe(self, s: Statement) -> None:
        """Make the descriptors of what a statement of the kernel's body loads and stores, itself and inside."""
        scope = self.w.scope
        for x in statements((s,)):
            if (b := self.box(x)) is None or b.descriptor in self.descriptors:
                continue
            name = self.descriptors[b.descriptor] = scope.names.fresh(f"{b.tensor}_box", plain=True)
            strides = {y.at: scope.names[y.name] for y in self.w.given.args
                       if y.kind == "stride" and y.of == b.tensor}
            base = [scope.names[f"{b.tensor}_ptr"]]
            base += [f"{scope.word('wide')}({scope.scalar(e)}) * {strides[n]}" for n, e in b.base if e != Const(0)]
            extents = [self.short(call("max", e, 1) if not isinstance(e, Const) else e) for e in
                       (side.extent for side in b.sides)]
            self.w.line(f"{name} = tl.make_tensor_descriptor({' + '.join(base)}, shape=[{', '.join(extents)}], "
                        f"strides=[{', '.join(strides.get(side.position, '1') for side in b.sides)}], "
                        f"block_shape={[side.size for side in b.sides]})")

    def short(self, e: Expr) -> str:
        """An integer of 32 bits, as a descriptor takes them."""
        text = self.w.scope.scalar(e)
        return f"tl.cast({text}, tl.int32)" if reads(e) else text

    def place(self, b: Box) -> str:
        return f"[{', '.join(self.short(side.at) for side in b.sides)}]"

    def unboxed(self, b: Box, axes: tuple[Axis, ...]) -> str:
        """What a descriptor loads, over axes."""
        text = f"{self.descriptors[b.descriptor]}.load({self.place(b)})"
        sides = [side for side in b.sides if side.dim]
        if len(sides) < len(b.sides):
            text = f"tl.reshape({text}, {[side.size for side in sides]})"
        text, sides = self.turned(text, sides, [d for a in axes for d in a.dims])
        shape = [a.size for a in axes]
        return text if [side.size for side in sides] == shape else f"tl.reshape({text}, {shape})"

    def boxes(self, b: Box, axes: tuple[Axis, ...], value: str) -> str:
        """The store of a value over axes by a descriptor."""
        by = {side.dim: side for side in b.sides}
        sides = [by[d] for a in axes for d in a.dims]
        if len(sides) != len(axes):
            value = f"tl.reshape({value}, {[side.size for side in sides]})"
        value, sides = self.turned(value, sides, [side.dim for side in b.sides if side.dim])
        if len(sides) < len(b.sides):
            value = f"tl.reshape({value}, {[side.size for side in b.sides]})"
        return f"{self.descriptors[b.descriptor]}.store({self.place(b)}, {value})"

    def turned(self, text: str, sides: list[Side], want: list[str]) -> tuple[str, list[Side]]:
        order = [[side.dim for side in sides].index(d) for d in want]
        if order == sorted(order):
            return text, sides
        return f"tl.trans({text}, {', '.join(map(str, order))})", [sides[n] for n in order]

    # -- statements --------------------------------------------------------------------------------------------------

    def load(self, s: Load) -> None:
        w, axes = self.w, self.w.scope.tiles[s.tile]
        if (b := self.box(s)) is not None:
            w.assign(s.tile, self.unboxed(b, axes))
            return
        own = tuple(x for x in axes if dims_of(s.source, w.scope.dims) & set(x.dims))
        text = self.element(s.source, axes)
        dtype = w.scope.dtypes[s.tile]
        stored = w.params[s.source.tensor].dtype
        if s.tile not in w.stored and s.tile not in w.small and stored != dtype:
            text = f"({text} != 0)" if dtype == "bool" else f"tl.cast({text}, {DTYPES[dtype]})"
        if own != axes:
            text = w.widened(text, axes)
        w.assign(s.tile, text)

    def store(self, s: Store) -> None:
        w, axes = self.w, self.w.scope.tiles[s.tile]
        value = w.scope.names[s.tile]
        dtype = w.params[s.target.tensor].dtype
        if s.tile in w.stored:
            value = f"{value}.to(tl.float32)"
        if dtype == "bf16":
            value = f"{w.scope.word('to_bf16')}({value})"
        elif dtype != w.scope.dtypes[s.tile] or s.tile in w.small:
            value = f"({value} != 0)" if dtype == "bool" else f"tl.cast({value}, {_ELEMENT[dtype]})"
        if (b := self.box(s)) is not None:
            w.line(self.boxes(b, axes, value))
            return
        conditions = self.masks(axes)
        if s.mask is not None:
            test = w.scope.text(s.mask, axes)
            if axes and not dims_of(s.mask, w.scope.dims):
                # the interpreter of 3.9 makes no mask of a single truth value
                i = w.scope.spread(w.scope.names[f"i_{axes[0].name}"], (axes[0],), axes)
                test = f"tl.where({test}, {i} >= 0, {i} < 0)"
            conditions.append(test)
        mask = f", mask={' & '.join(conditions)}" if conditions else ""
        address = self.address(s.target, axes)
        if axes and not dims_of(s.target, w.scope.dims):
            address = f"{address} + {w.constant(axes, '0', 'tl.int32')}"
        w.line(f"tl.store({address}, {value}{mask})")
