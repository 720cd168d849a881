"""Decode over keys and values of 8, 4 and 2 bits in the CUDA C++ backend: one kernel that reads the codes 16 bytes at a
time, converts them in registers and multiplies by a scale once for all that share it."""

from __future__ import annotations

import re
import shutil
from functools import cache
from typing import Any

import numpy as np
import pytest

import memcomp
from memcomp.codegen.cuda import admits, emit, interpreted, launches
from memcomp.codegen.cuda.compile import compile_text, compilers
from memcomp.codegen.cuda.emit import Writer, writers
from memcomp.codegen.cuda.host import COMPILERS, Form
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.target import target as named
from memcomp.ir.text import parse
from memcomp.ir.tile import TileProgram
from memcomp.pipeline import map_program
from tests.mapped import arguments, same, stored_and_back

torch = pytest.importorskip("torch")
on_host = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler: kernels cannot run here")
to_cubin = pytest.mark.skipif(not compilers(), reason="neither NVRTC nor nvcc is here")

# bits of a code, query heads of a key, width, neighbours of a scale, codes of one byte half a row apart, zero points
Case = tuple[int, int, int, int, bool, bool]
INT8: Case = (8, 3, 64, 32, False, False)
INT4: Case = (4, 4, 128, 32, False, True)
HALVES: Case = (4, 8, 64, 32, True, True)
INT2: Case = (2, 5, 128, 16, False, True)


def text(case: Case) -> str:
    bits, group, width, shared, halves, zeros = case
    n = 8 // bits

    def number(t: str, e: str) -> str:
        at, bit = (f"{e} % {width // n}", f"{e} // {width // n}") if halves else (f"{e} // {n}", f"{e} % {n}")
        code = f"{t}[j, m, {e}]" if bits == 8 else f"({t}[j, m, {at}] >> ({bit} * {bits}) & {2**bits - 1})"
        return f"({code}{f' - {t}Z[j, m, {e} // {shared}]' if zeros else ''}) * {t}S[j, m, {e} // {shared}]"

    ranks = "\n".join(f"rank {t} = {width}\nrank {t}W = {width // n}\nrank {t}G = {width // shared}" for t in "EF")
    stored = "\n".join(f"in {t}[J, M, {r}W]: {'u8' if zeros else 'i8'}\nin {t}S[J, M, {r}G]: f16"
                       + f"\nin {t}Z[J, M, {r}G]: u8" * zeros for t, r in ("KE", "VF"))
    return f"""
program decode
rank J
rank G = {group}
rank M
{ranks}
in Q[J, G, E]: bf16
{stored}
out O[J, G, F]: f32
KD[j, m, e] = {number("K", "e")}
VD[j, m, f] = {number("V", "f")}
S[j, g, m] = sum{{e}} Q[j, g, e] * KD[j, m, e] * 0.125
GM[j, g] = max{{m}} S[j, g, m]
W[j, g, m] = exp(S[j, g, m] - GM[j, g])
D[j, g] = sum{{m}} W[j, g, m]
N[j, g, f] = sum{{m}} W[j, g, m] * VD[j, m, f]
O[j, g, f] = N[j, g, f] / D[j, g]
"""


@cache
def closed(case: Case, target: str = "h100") -> Program:
    return map_program(parse(text(case)), config=Config(target=target, backend="cuda"), sizes={"J": 512, "M": 8192})


def tiles(case: Case, target: str = "h100") -> TileProgram:
    return lower(closed(case, target))


def first(case: Case, target: str = "h100") -> Writer:
    """The kernel that streams keys and values."""
    return writers(tiles(case, target), target)[0]


def values(case: Case, keys: int) -> dict[str, Any]:
    bits, group, width, shared, _, zeros = case
    rng = np.random.default_rng(0)
    least = 0 if zeros else -128
    a: dict[str, Any] = {"Q": rng.normal(size=(2, group, width))}
    for t in "KV":
        a[t] = rng.integers(least, least + 256, (2, keys, width * bits // 8))
        a[f"{t}S"] = 0.1 * rng.random((2, keys, width // shared))
        if zeros:
            a[f"{t}Z"] = rng.integers(0, 2**bits, (2, keys, width // shared))
    return stored_and_back(closed(case), a)


@on_host
@pytest.mark.parametrize("case", [INT8, INT4, HALVES, INT2])
def test_decode_equals_the_program(case: Case) -> None:
    tp, a = tiles(case), values(case, 77)
    args, known = arguments(tp, a, {})
    interpreted(emit(tp, "h100"))(*args, *known)
    got = args[[p.name for p in tp.params].index("O")].double().numpy()
    assert same(got, interpret(closed(case), a)["O"], 2e-4, 2e-4)


@on_host
def test_points_beyond_a_row_add_nothing_where_what_they_share_is_infinite() -> None:
    """The end of a tile has no scales; 1 over none of them is infinite."""
    p = map_program(parse("""
program divided
rank J
rank M
rank E = 64
rank G = 4
in Q[J, E]: f32
in K[J, M, E]: i8
in S[J, M, G]: f32
out O[J, M]: f32
O[j, m] = sum{e} Q[j, e] * (K[j, m, e] * recip(S[j, m, e // 16]))
"""), config=Config(target="h100", backend="cuda"), sizes={"J": 2, "M": 33})
    tp, rng = lower(p), np.random.default_rng(0)
    kernel = emit(tp, "h100")
    assert " * part" in kernel.source and "1.0f /" in kernel.source
    a = stored_and_back(p, {"Q": rng.normal(size=(2, 64)), "K": rng.integers(-128, 128, (2, 33, 64)),
                            "S": 1 + rng.random((2, 33, 4))})
    args, known = arguments(tp, a, {})
    interpreted(kernel)(*args, *known)
    got = args[[x.name for x in tp.params].index("O")].double().numpy()
    assert same(got, interpret(p, a)["O"], 2e-4, 2e-4)


@on_host
def test_lanes_that_ask_for_each_other_meet() -> None:
    """Without the meeting before and after, a lane reads what its neighbour has not brought yet."""
    tp, a = tiles(INT4), values(INT4, 200)
    kernel, want = emit(tp, "h100"), interpret(closed(INT4), a)["O"]
    assert "__syncwarp();" in first(INT4).text
    for source, right in ((kernel.source, True), (kernel.source.replace("    __syncwarp();\n", ""), False)):
        args, known = arguments(tp, a, {})
        Form(source, launches(tp, "h100")).run(
            {x.name: t for x, t in zip(tp.params, args, strict=True)}, dict(zip(tp.sizes, known, strict=True)))
        got = args[[p.name for p in tp.params].index("O")].double().numpy()
        assert same(got, want, 2e-4, 2e-4) == right


@pytest.mark.parametrize("case", [INT8, INT4, HALVES, INT2])
def test_codes_are_read_16_bytes_at_a_time_and_held_as_they_are_stored(case: Case) -> None:
    w = first(case)
    asked = re.findall(r"(ask\w*(?:<\d+)?).*?, (\w+)_ptr", w.text)
    assert {size for size, tensor in asked if tensor in "KV"} == {"ask<16"}
    assert {"K_t", "V_t"} <= w.packed.keys() and {"KD", "VD"} <= w.inline.keys()
    assert not re.search(r"float (KD|VD)\[", w.text)   # no dequantised tile, not in registers either


@pytest.mark.parametrize("case", [INT4, HALVES])
def test_a_scale_is_multiplied_once_for_all_that_share_it(case: Case) -> None:
    score = next(x for x in first(case).text.split("#pragma unroll 1") if "KS_t[" in x and "float part" in x)
    inner, after = score.split("float part = 0.0f;", 1)[1].split("total = total + ", 1)
    assert "KS_t[" not in inner and "KZ_t[" in inner and re.match(r"KS_t\[.*\] \* part;", after)
    # the weight with the scale, then the code
    assert re.search(r"S\[[^;]*\] \* VS_t\[[^;]*\] \* ", first(case).text)


def test_a_thread_holds_one_number_of_a_scale_for_all_that_share_it() -> None:
    w = first(INT4)
    along = w.block.dims["e"]
    assert w.numbers("KS_t") * along.vector == w.block.registers(("m0", "e"))
    assert w.numbers("K_t") * 2 == w.block.registers(("m0", "e"))   # two codes a byte


@pytest.mark.parametrize(("bits", "target"), [(8, "a100"), (2, "rtx4090")])
def test_groups_of_any_size_have_a_mapping_without_a_stack(bits: int, target: str) -> None:
    for group in (1, 8):
        assert admits(tiles((bits, group, 128, 32, False, True), target), named(target)) < 2, group


@to_cubin
@pytest.mark.parametrize(("case", "target"), [
    (INT4, "h100"), *(pytest.param((bits, group, width, 32, False, True), t, marks=pytest.mark.slow)
                      for t, width, groups in (("h100", 128, range(1, 9)), ("a100", 64, (3, 8)),
                                               ("rtx4090", 128, (1, 6)), ("b200", 64, (2,)))
                      for bits in (8, 4, 2) for group in groups)])
def test_machine_code_reads_16_bytes_and_needs_no_stack(case: Case, target: str) -> None:
    tp, machine = tiles(case, target), named(target)
    found = compile_text(emit(tp, machine).source, launches(tp, machine), machine.capability)
    assert all(b.resources.stack == 0 for b in found)
    sass = found[0].sass
    wide = re.findall(r"LDGSTS[.A-Z0-9]*", sass)
    assert any(".128" in x for x in wide) and not any(".64" in x for x in wide), set(wide)
    assert "STL" not in sass and "LDL" not in sass


@on_host
def test_codes_unpacked_in_torch_stay_codes_in_memory() -> None:
    def numbers(codes: Any, scale: Any, zero: Any) -> Any:
        x = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int32)
        return ((x.unflatten(-1, (-1, 32)) - zero[..., None].to(torch.int32)).float() * scale[..., None]).flatten(-2)

    def decode(q: Any, k: Any, ks: Any, kz: Any, v: Any, vs: Any, vz: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, numbers(k, ks, kz), numbers(v, vs, vz),
                                                                enable_gqa=True)

    torch.manual_seed(0)
    stored = [x for _ in "kv" for x in (torch.randint(0, 256, (1, 2, 300, 32), dtype=torch.uint8),
                                        0.1 * torch.rand(1, 2, 300, 2),
                                        torch.randint(0, 16, (1, 2, 300, 2), dtype=torch.uint8))]
    given = [torch.randn(1, 6, 1, 64), *stored]
    options: dict[str, Any] = {"target": "h100", "backend": "cuda"}
    torch._dynamo.reset()
    (region,) = memcomp.explain(decode, *given, **options).regions
    codes = [t for t in region.program.cascade.inputs() if t.dtype == "u8"]
    assert len(codes) == 4   # of keys and values: codes and zero points, nothing that was made of them
    streaming = writers(lower(region.program), "h100")[0].text
    assert len(re.findall(r"ask<16.*?ids", streaming)) >= 2
    torch._dynamo.reset()
    got = torch.compile(decode, backend="memcomp", options={**options, "interpret": True, "strict": True})(*given)
    exact = decode(*(x.double() if x.is_floating_point() else x for x in given))
    assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_smaller_tiles_are_taken_where_no_other_fits() -> None:
    wide = """
program wide
rank H
rank P
rank M
rank E = 256
rank F = 512
in Q[H, P, E]: f32
in K[H, M, E]: f32
in V[H, M, F]: f32
out O[H, P, F]: f32
S[h, p, m] = sum{e} Q[h, p, e] * K[h, m, e]
GM[h, p] = max{m} S[h, p, m]
W[h, p, m] = exp(S[h, p, m] - GM[h, p])
D[h, p] = sum{m} W[h, p, m]
N[h, p, f] = sum{m} W[h, p, m] * V[h, m, f]
O[h, p, f] = N[h, p, f] / D[h, p]
"""
    p = map_program(parse(wide), config=Config(target="h100", backend="cuda"), sizes={"H": 64, "P": 1024, "M": 1024})
    tp = lower(p)
    assert admits(tp, named("h100")) < 2
    assert min(d.capacity for d in tp.kernels[0].dims) < 32
