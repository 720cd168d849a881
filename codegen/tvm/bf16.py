"""Words for products of bf16: pairs of neighbours along the contracted dim, multiplied two at a time into f32.

A pair is an int32 whose low half is the first of two bf16 numbers.  Each word has a form in plain operations, which
is what the machine's instruction computes up to the order of the two additions; the machine's own is taken where the
text is compiled for it.  Instructions come as LLVM text (`text`): TVM has no bf16 vectors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T
from tvm.target import Target

from memcomp.codegen.tvm.isa import BF16_PAIRS, BF16_TILES, TILE
from memcomp.codegen.tvm.vocabulary import (
    Value,
    bits,
    cast,
    dtype,
    f32,
    i64,
    like,
    piece,
    reg,
    splat,
    to_bf16,
    vector,
    width,
)

_PAIRS = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define <16 x float> @memcomp_dot_pairs16(<16 x float> %total, <16 x i32> %a, <16 x i32> %b) {
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


def _wide(lanes: int) -> str:
    """LLVM text of `memcomp_dot_pairs` on two halves."""
    half = lanes // 2
    types = {"t": f"<{half} x float>", "a": f"<{half} x i32>", "b": f"<{half} x i32>"}
    lines = [f"define <{lanes} x float> @memcomp_dot_pairs{lanes}(<{lanes} x float> %t, <{lanes} x i32> %a, "
             f"<{lanes} x i32> %b) {{"]
    for h in (0, 1):
        take = ", ".join(f"i32 {k}" for k in range(h * half, (h + 1) * half))
        for n, kind in types.items():
            whole = kind.replace(str(half), str(lanes), 1)
            lines.append(f"  %{n}{h} = shufflevector {whole} %{n}, {whole} poison, <{half} x i32> <{take}>")
        arguments = ", ".join(f"{kind} %{n}{h}" for n, kind in types.items())
        lines.append(f"  %r{h} = call {types['t']} @memcomp_dot_pairs{half}({arguments})")
    take = ", ".join(f"i32 {k}" for k in range(lanes))
    lines.append(f"  %r = shufflevector {types['t']} %r0, {types['t']} %r1, <{lanes} x i32> <{take}>")
    return "\n".join([*lines, f"  ret <{lanes} x float> %r", "}", ""])


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
declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
define void @memcomp_tile_start() {
  call void @llvm.x86.ldtilecfg(ptr @memcomp_shapes)
  ret void
}
define void @memcomp_tile_stop() {
  call void @llvm.x86.tilerelease()
  ret void
}
""".replace("EIGHT_WIDTHS", ", ".join(["i16 64"] * 8)).replace("EIGHT_ROWS", ", ".join([f"i8 {TILE}"] * 8))


def _block(rows: int, columns: int, add: bool) -> str:
    """LLVM text of the product of rows x columns tiles over `steps` tiles along the contracted dim."""
    sums = [(r, c) for r in range(rows) for c in range(columns)]
    lines = [f"define void @memcomp_tiles_{rows}{columns}{int(add)}(ptr %total0, i64 %wide, ptr %a, i64 %arow, ptr %b, "
             "i64 %brow, i64 %steps) {", "entry:", f"  %adown = mul i64 %arow, {TILE}",
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
    lines += [f"  call void @llvm.x86.tdpbf16ps(i8 {2 * r + c}, i8 {4 + r}, i8 {6 + c})" for r, c in sums]
    lines += ["  %next = add i64 %k, 1", "  %more = icmp slt i64 %next, %steps",
              "  br i1 %more, label %loop, label %done", "done:"]
    lines += [f"  call void @llvm.x86.tilestored64(i8 {2 * r + c}, ptr %place{r}{c}, i64 %wide)" for r, c in sums]
    return "\n".join([*lines, "  ret void", "}", ""])


def text(attributes: tuple[str, ...]) -> str:
    """LLVM text of the instructions that a machine with these attributes has."""
    have, parts = set(attributes), []
    if have >= set(BF16_PAIRS):
        parts = [_PAIRS, _wide(32), _wide(64)]
    if have >= set(BF16_TILES):
        parts += [_TILES, *(_block(r, c, add) for r in (1, 2) for c in (1, 2) for add in (False, True))]
    return "".join(parts)


def _machine_has(needed: tuple[str, ...]) -> bool:
    """Is the text being compiled for a machine with these attributes?"""
    target = Target.current(allow_none=True)
    return target is not None and set(needed) <= {str(a) for a in target.attrs.get("mattr", ())}


# -- pairs -------------------------------------------------------------------------------------------------------------


def _lower(x: Value) -> Value:
    """The first number of each pair as float32."""
    return bits(x << like(x, 16), "float32")


def _upper(x: Value) -> Value:
    """The second number of each pair as float32."""
    return bits(x & like(x, -0x10000), "float32")


def dot_pairs(total: Value, a: Value, b: Value) -> Value:
    """total + a0 * b0 + a1 * b1 in every lane, summed in f32; a scalar pair serves all lanes."""
    w = width(total)
    if _machine_has(BF16_PAIRS) and w in (16, 32, 64):
        return T.call_extern(f"float32x{w}", f"memcomp_dot_pairs{w}", total, splat(a, w), splat(b, w))
    a, b = reg(a), reg(b)
    return total + splat(_lower(a), w) * splat(_lower(b), w) + splat(_upper(a), w) * splat(_upper(b), w)


def pair_up(low: Value, high: Value | None = None) -> Value:
    """Lane by lane the pair (low, high): bf16 bits as they are, f32 rounded to nearest even; 0 for a missing second."""
    if high is None:
        high = splat(like(low, 0), width(low))
    if dtype(low) == "float32":
        if _machine_has(BF16_PAIRS) and width(low) == 16:
            return T.call_extern("int32x16", "memcomp_pair_up", low, high)
        low, high = to_bf16(low), to_bf16(high)
    n = width(low)
    if n == 1:
        low, high = cast("uint32", low), cast("uint32", high)
        return bits(low | (high << like(high, 16)), "int32")
    return T.reinterpret(vector("int32", n), T.Shuffle([low, high], [k + h for k in range(n) for h in (0, n)]))


def in_pairs(x: Value) -> Value:
    """Neighbours as pairs, half as many: bf16 bits as they are, f32 rounded to nearest even."""
    half = width(x) // 2
    if dtype(x) == "float32":
        if _machine_has(BF16_PAIRS) and half == 16:
            x = reg(x)
            return T.call_extern("int32x16", "memcomp_in_pairs", piece(x, 0, 16), piece(x, 16, 16))
        x = to_bf16(x)
    return T.reinterpret(vector("int32", half), x)


# -- tiles -------------------------------------------------------------------------------------------------------------


def tile_start() -> None:
    """Shape the tile registers of this thread; `tile_stop` gives them back."""
    if _machine_has(BF16_TILES):
        T.evaluate(T.call_extern("void", "memcomp_tile_start"))


def tile_stop() -> None:
    if _machine_has(BF16_TILES):
        T.evaluate(T.call_extern("void", "memcomp_tile_stop"))


def tile_product(total: Value, at_total: Sequence[Value], a: Value, at_a: Sequence[Value], b: Value,
                 at_b: Sequence[Value], steps: Value, rows: int, columns: int, add: bool) -> None:
    """total (+)= a * b over `steps` tiles along the contracted dim: rows x columns tiles of 16 x 16 sums in f32.

    a: int32 [.., row, pair]; b: int32 [.., pair, column]; total: f32 [.., row, column]; each from its index on.
    """
    if _machine_has(BF16_TILES):
        places = [x for t, index in ((total, at_total), (a, at_a), (b, at_b))
                  for x in (T.address_of(t[tuple(index)]), i64(4 * int(t.shape[-1])))]
        T.evaluate(T.call_extern("void", f"memcomp_tiles_{rows}{columns}{int(add)}", *places, cast("int64", steps)))
        return

    def one(t: Value, index: Sequence[Value], down: Value, right: Value) -> Value:
        return t[(*index[:-2], index[-2] + down, index[-1] + right)]

    with T.serial(i64(TILE * rows)) as r, T.serial(i64(TILE * columns)) as c:
        place = [*at_total[:-2], at_total[-2] + r, at_total[-1] + c]
        if not add:
            T.buffer_store(total, f32(0.0), place)
        with T.serial(cast("int64", steps) * i64(TILE)) as k:
            x, y = one(a, at_a, r, k), one(b, at_b, k, c)
            T.buffer_store(total, dot_pairs(total[tuple(place)], x, y), place)
