"""The instructions of `isa.PRODUCTS` as LLVM text, which TVM takes in as it is: it has no bf16 vectors, nor tiles."""

from __future__ import annotations

from memcomp.codegen.tvm.isa import TILE, Multiply

_LLVM = {"f32": "float", "i32": "i32"}
_BF16 = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @memcomp_vdpbf16ps16(<16 x float> %total, <16 x i32> %a, <16 x i32> %b) {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %total, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define <16 x i32> @memcomp_in_pairs(<16 x float> %low, <16 x float> %high) {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %s = bitcast <32 x bfloat> %r to <16 x i32>
  ret <16 x i32> %s
}
define <16 x i32> @memcomp_pair_up(<16 x float> %low, <16 x float> %high) {
  %r = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %s = shufflevector <32 x bfloat> %r, <32 x bfloat> %r, <32 x i32> <INTERLEAVE>
  %t = bitcast <32 x bfloat> %s to <16 x i32>
  ret <16 x i32> %t
}
""".replace("INTERLEAVE", ", ".join(f"i32 {k + h}" for k in range(16) for h in (0, 16)))
_INT8 = """
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <16 x i32>, <16 x i32>)
define <16 x i32> @memcomp_vpdpbusd16(<16 x i32> %total, <16 x i32> %a, <16 x i32> %b) {
  %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %total, <16 x i32> %a, <16 x i32> %b)
  ret <16 x i32> %r
}
"""
_VECTORS = {"vdpbf16ps": _BF16, "vpdpbusd": _INT8}


def _wide(m: Multiply, lanes: int) -> str:
    """A product of vectors as two of half as many lanes."""
    half, kind = lanes // 2, _LLVM[m.sums]
    types = {"t": f"<{half} x {kind}>", "a": f"<{half} x i32>", "b": f"<{half} x i32>"}
    lines = [f"define <{lanes} x {kind}> @memcomp_{m.instruction}{lanes}(<{lanes} x {kind}> %t, <{lanes} x i32> %a, "
             f"<{lanes} x i32> %b) {{"]
    for h in (0, 1):
        take = ", ".join(f"i32 {k}" for k in range(h * half, (h + 1) * half))
        for n, part in types.items():
            whole = part.replace(str(half), str(lanes), 1)
            lines.append(f"  %{n}{h} = shufflevector {whole} %{n}, {whole} poison, <{half} x i32> <{take}>")
        arguments = ", ".join(f"{part} %{n}{h}" for n, part in types.items())
        lines.append(f"  %r{h} = call {types['t']} @memcomp_{m.instruction}{half}({arguments})")
    take = ", ".join(f"i32 {k}" for k in range(lanes))
    lines.append(f"  %r = shufflevector {types['t']} %r0, {types['t']} %r1, <{lanes} x i32> <{take}>")
    return "\n".join([*lines, f"  ret <{lanes} x {kind}> %r", "}", ""])


# Tile registers: 0-3 sums, 4-5 rows, 6-7 columns; every one 16 rows of 64 bytes.
_TILES = """
@memcomp_shapes = internal constant { i8, i8, [14 x i8], [8 x i16], [16 x i8], [8 x i8], [8 x i8] } {
  i8 1, i8 0, [14 x i8] zeroinitializer, [8 x i16] [EIGHT_WIDTHS], [16 x i8] zeroinitializer, [8 x i8] [EIGHT_ROWS],
  [8 x i8] zeroinitializer }
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
define void @memcomp_tile_start() {
  call void @llvm.x86.ldtilecfg(ptr @memcomp_shapes)
  ret void
}
define void @memcomp_tile_stop() {
  call void @llvm.x86.tilerelease()
  ret void
}
""".replace("EIGHT_WIDTHS", ", ".join(["i16 64"] * 8)).replace("EIGHT_ROWS", ", ".join([f"i8 {TILE}"] * 8))


def _block(m: Multiply, rows: int, columns: int, add: bool) -> str:
    """The product of rows x columns tiles over `steps` tiles along the contracted dim."""
    sums = [(r, c) for r in range(rows) for c in range(columns)]
    lines = [f"define void @memcomp_{m.instruction}_{rows}{columns}{int(add)}(ptr %total0, i64 %wide, ptr %a, "
             "i64 %arow, ptr %b, i64 %brow, i64 %steps) {", "entry:", f"  %adown = mul i64 %arow, {TILE}",
             f"  %bdown = mul i64 %brow, {TILE}", f"  %down = mul i64 %wide, {TILE}",
             "  %total1 = getelementptr i8, ptr %total0, i64 %down"]
    lines += [f"  %place{r}{c} = getelementptr i8, ptr %total{r}, i64 {64 * c}" for r, c in sums]
    begin = "tileloadd64(i8 {k}, ptr %place{r}{c}, i64 %wide)" if add else "tilezero(i8 {k})"
    lines += [f"  call void @llvm.x86.{begin.format(k=2 * r + c, r=r, c=c)}" for r, c in sums]
    lines += ["  %any = icmp sgt i64 %steps, 0", "  br i1 %any, label %loop, label %done", "loop:",
              "  %k = phi i64 [ 0, %entry ], [ %next, %loop ]",
              "  %right = mul i64 %k, 64", "  %below = mul i64 %k, %bdown",
              "  %a0 = getelementptr i8, ptr %a, i64 %right", "  %a1 = getelementptr i8, ptr %a0, i64 %adown",
              "  %b0 = getelementptr i8, ptr %b, i64 %below", "  %b1 = getelementptr i8, ptr %b0, i64 64"]
    lines += [f"  call void @llvm.x86.tileloadd64(i8 {4 + r}, ptr %a{r}, i64 %arow)" for r in range(rows)]
    lines += [f"  call void @llvm.x86.tileloadd64(i8 {6 + c}, ptr %b{c}, i64 %brow)" for c in range(columns)]
    lines += [f"  call void @llvm.x86.{m.instruction}(i8 {2 * r + c}, i8 {4 + r}, i8 {6 + c})" for r, c in sums]
    lines += ["  %next = add i64 %k, 1", "  %more = icmp slt i64 %next, %steps",
              "  br i1 %more, label %loop, label %done", "done:"]
    lines += [f"  call void @llvm.x86.tilestored64(i8 {2 * r + c}, ptr %place{r}{c}, i64 %wide)" for r, c in sums]
    return "\n".join([*lines, "  ret void", "}", ""])


def text(products: tuple[Multiply, ...]) -> str:
    """LLVM text of these instructions, and of what goes with them."""
    parts = [_TILES] if any(m.tiles for m in products) else []
    for m in products:
        if m.tiles:
            parts.append(f"declare void @llvm.x86.{m.instruction}(i8, i8, i8)\n")
            parts += [_block(m, r, c, add) for r in (1, 2) for c in (1, 2) for add in (False, True)]
        else:
            parts += [_VECTORS[m.instruction], _wide(m, 32), _wide(m, 64)]
    return "".join(parts)
