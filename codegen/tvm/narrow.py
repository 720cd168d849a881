"""Which tiles of 64-bit integers are held in 32 bits, so that twice as many fit a register.

Two arguments allow it.  What is the sum of one contraction of short numbers is known to fit (`ir.target.sums_fit`).
And taking the low bits of integers commutes with adding them: a sum that nothing but a store of at most 32 bits reads
may be kept by its low 32 bits all the way.
"""

from __future__ import annotations

from memcomp.codegen.tvm.writer import Writer, read_tiles
from memcomp.ir.expr import Access, Const, walk
from memcomp.ir.target import BYTES, INTEGERS
from memcomp.ir.tile import Dot, Map, Store, expressions, statements


def narrow(w: Writer) -> set[str]:
    """Names of tiles, all of them written by products of pairs."""
    everything = list(statements(w.kernel.body))
    found = set()
    for t in w.tiles.values():
        writers = [s for s in everything if not isinstance(s, Store) and getattr(s, "tile", "") == t.name]
        sums = [s for s in writers if isinstance(s, Dot) and id(s) in w.products]
        if t.dtype != "i64" or not sums:
            continue
        if writers == sums and len(sums) == 1 and not sums[0].accumulate:
            found.add(t.name)
            continue
        starts = [s for s in writers if isinstance(s, Map) and isinstance(s.body, Const)]
        readers = [s for s in everything if t.name in read_tiles(s, w.tiles)]
        stored = [s for s in readers if isinstance(s, Store) and s.tile == t.name and _short(w, s)]
        if len(sums) + len(starts) == len(writers) and all(s in stored or s in sums for s in readers):
            found.add(t.name)
    return found


def _short(w: Writer, s: Store) -> bool:
    """Does a store keep low bits only, and read the tile in no other way?"""
    dtype = w.params[s.target.tensor].dtype
    asked = {n.tensor for e in expressions(s) for n in walk(e) if isinstance(n, Access)}
    return dtype in INTEGERS and dtype != "bool" and BYTES[dtype] <= 4 and s.tile not in asked
