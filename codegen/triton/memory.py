"""Loads and stores as Triton text: a 64-bit scalar address plus 32-bit offsets inside the tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memcomp.codegen.triton.express import DTYPES, dims_of
from memcomp.codegen.triton.layout import Axis
from memcomp.ir.expr import Access, Call, Const, Expr, call, walk
from memcomp.ir.simplify import linear, simplify
from memcomp.ir.tile import Load, Store

if TYPE_CHECKING:
    from memcomp.codegen.triton.emit import _Writer

_ELEMENT = {"f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "i64": "tl.int64", "i32": "tl.int32",
            "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1"}


class Memory:
    """What a kernel reads and writes of its params."""

    def __init__(self, w: _Writer) -> None:
        self.w = w

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

    def load(self, s: Load) -> None:
        w, axes = self.w, self.w.scope.tiles[s.tile]
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
