"""Asking for memory before it is read.

A core has few requests on their way at a time and drops those it has no room for, silently.  So they are spread over
the work of a step, one for each line that it reads, and a line is asked for twice: a step ahead, and again shortly
before it is read, which costs nothing where the first was heard.  Those of a step go to several places in turn, since
the machine's own guesses are made page by page and in each page on its own.
"""

from __future__ import annotations

from memcomp.codegen.tvm.access import place
from memcomp.codegen.tvm.writer import Point, Writer
from memcomp.ir.expr import Access, reads, variables
from memcomp.ir.target import BYTES

LINE = 64    # bytes of a cache line
PLACES = 8   # that are read, or asked for of the next tile, in turn
SOON = 8192  # bytes before a line is read


def ahead(w: Writer, a: Access, point: Point, lane: str, lanes: int, base: str, row: str = "") -> None:
    """Ask for what will be read where this step of the innermost loop reads `lanes` neighbours along `lane`.

    row: the dim along which a tile is walked, if all of it is and its rows lie one after the other.  Only for addresses
    that are computed without reading data: those of a gather may leave its index table.
    """
    moving = [v for v in w.loops if v in variables(a)]
    if not moving or any(reads(i) for i in a.index):
        return
    size = BYTES[w.params[a.tensor].dtype]
    later = [point.at(**{moving[-1]: f"({point.scalars[moving[-1]]} + 1)"})]
    if row:
        at, rows = point.scalars[row], w.dims[row].capacity
        soon = max(SOON // (w.dims[lane].capacity * size), 1)
        if rows % PLACES == 0:
            turn = f"(({at}) & i64({PLACES - 1})) * {rows // PLACES} + (({at}) >> i64({PLACES.bit_length() - 1}))"
            later = [later[0].at(**{row: f"({turn})"})]
        if soon < rows:
            later.append(point.at(**{row: f"({at} + {soon})"}))
    line = LINE // size
    with w.repeat("line", f"i64({-(-lanes // line)})") as k:
        for q in later:
            start = q.at(**{lane: base if k == "i64(0)" else f"({base} + {k} * {line})"})
            w.line(f"prefetch(T.address_of({place(w, a, start)}))")
