"""A kernel that only reads: what a kernel that waits for memory is compared with."""

from __future__ import annotations

from memcomp.codegen.tvm.isa import isa
from memcomp.codegen.tvm.launcher import CHUNKS
from memcomp.ir.target import Target
from memcomp.ir.tile import Kernel, TileProgram

LINE, LINES = 16, 8  # 32-bit words of a cache line, lines of a stream that are in flight a step


def probe(target: Target, streams: int, ahead: int = 0) -> Kernel:
    """Text of main(x, out): every word of x (n,) int32 is read once, out (CHUNKS * 16,) int32 gets the lanes' sums.

    streams: places of x that a task reads in turn, as a kernel does that walks as many tensors; ahead: bytes beyond the
    present place that are asked for beforehand, 0 for none.  n is a multiple of streams * CHUNKS * 128.
    """
    block = LINE * LINES
    lines = ["@T.prim_func(s_tir=True)", "def main(x_arg: T.handle, out_arg: T.handle):",
             '    T.func_attr({"global_symbol": "main"})', "    n = T.int64()",
             '    x = T.match_buffer(x_arg, (n,), "int32")',
             f'    out = T.match_buffer(out_arg, (i64({CHUNKS * LINE}),), "int32")',
             f"    tasks(i64({CHUNKS}))", f"    for c in T.parallel(i64({CHUNKS})):"]
    sums = [f"s{k}" for k in range(LINES)]
    lines += [f'        {s} = acc(splat(cast("int32", i64(0)), {LINE}))' for s in sums]
    lines += [f"        size: T.let = T.truncdiv(n, i64({streams * CHUNKS}))",
              f"        for i in T.serial(T.truncdiv(size, i64({block}))):"]
    for k in range(streams):
        start = f"start{k}"
        lines.append(f"            {start}: T.let = (c + i64({k * CHUNKS})) * size + i * i64({block})")
        for j, s in enumerate(sums):
            if ahead:
                lines.append(f"            prefetch(T.address_of(x[{start} + i64({j * LINE + ahead // 4})]))")
            lines.append(f"            {s}[at({LINE})] = {s}[at({LINE})] + x[at({LINE}, {start} + i64({j * LINE}))]")
    lines.append(f"        out[at({LINE}, c * i64({LINE}))] = " + " + ".join(f"{s}[at({LINE})]" for s in sums))
    source = "\n".join(lines) + "\n"
    return Kernel("probe", "tvm", source, "main", TileProgram("probe", (), (), ()), isa(target).name)
