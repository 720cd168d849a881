"""Tiles by tensor descriptors: what they fill with zeros is what a mask would exclude, by Triton's interpreter."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from memcomp.codegen.launches import Layout
from memcomp.codegen.lower import lower
from memcomp.codegen.triton.layout import Axis
from memcomp.config import Config
from memcomp.ir.errors import Refusal
from memcomp.ir.expr import Access, Const, Size, Var, call
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.target import target
from memcomp.ir.text import parse
from memcomp.ir.tile import Dim, Param, TileProgram
from memcomp.pipeline import map_program
from tests.mapped import same

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")

from memcomp.codegen.triton import compiled, emit, interpreted  # noqa: E402
from memcomp.codegen.triton.arguments import arguments  # noqa: E402
from memcomp.codegen.triton.boxes import box  # noqa: E402
from memcomp.codegen.triton.build import text  # noqa: E402
from memcomp.codegen.triton.emit import function_names, settings_of  # noqa: E402
from memcomp.codegen.triton.offline import compile_text, module  # noqa: E402
from memcomp.codegen.triton.resources import Setting, need, options  # noqa: E402

HEAD = """
program attention
rank J
rank G = {g}
rank P
rank M
rank E = {e}
rank F = {e}
in Q[J, G, P, E]: bf16
in K[J, M, E]: bf16
in V[J, M, F]: bf16
in Z[J]: i64
out O[J, G, P, F]: {out}
S[j, g, p, m] = sum{{x}} Q[j, g, p, x] * K[j, m, x]
GM[j, g, p] = max{{m}} S[j, g, p, m] {guard}
W[j, g, p, m] = exp(S[j, g, p, m] - GM[j, g, p]) {guard}
D[j, g, p] = sum{{m}} W[j, g, p, m] {guard}
N[j, g, p, f] = sum{{m}} W[j, g, p, m] * V[j, m, f] {guard}
O[j, g, p, f] = N[j, g, p, f] / D[j, g, p]
"""
GUARDS = ("", "where m <= p", "where m <= p and m > p - 20", "where m <= p or m < 24", "where m < Z[j]",
          "where m >= p and m < Z[j]")


def made(guard: str, g: int = 1, e: int = 16, out: str = "bf16") -> Program:
    """Mapped for long sequences, so that it has large tiles and no shares."""
    p = parse(HEAD.format(g=g, e=e, guard=guard, out=out).replace("{x}", "{e}").replace("x]", "e]"))
    return map_program(p, config=Config(target="h100"), sizes={"J": 64, "P": 4096, "M": 4096})


def inputs(rows: int, keys: int, g: int, e: int, room: int = 16) -> dict[str, Any]:
    """Numbers of bf16 in memory with `room` more to a row."""
    rng = torch.Generator().manual_seed(rows + keys)

    def some(*shape: int) -> Any:
        whole = torch.randn(*shape[:-1], shape[-1] + room, generator=rng).to(torch.bfloat16)
        return whole[..., :shape[-1]]

    ends = torch.tensor([keys - 13, keys // 2])
    return {"Q": some(2, g, rows, e), "K": some(2, keys, e), "V": some(2, keys, e), "Z": ends}


def run(tp: TileProgram, given: dict[str, Any], settings: dict[str, Setting] | None = None) -> Any:
    (out,) = (p for p in tp.params if p.role == "out")
    got = torch.full(given["Q"].shape, float("nan"), dtype={"bf16": torch.bfloat16, "f32": torch.float32}[out.dtype])
    sizes = {"J": 2, "P": got.shape[2], "M": given["K"].shape[1]}
    interpreted(emit(tp, "h100", settings=settings))(*(got if p is out else given[p.name] for p in tp.params),
                                  *(sizes[r] for r in tp.sizes))
    return got.double().numpy()


def exact(p: Program, given: dict[str, Any]) -> Any:
    plain = {n: x.double().numpy() if x.is_floating_point() else x.numpy() for n, x in given.items()}
    return interpret(p, plain, {})["O"]


@pytest.mark.parametrize("guard", GUARDS)
def test_boxes_equal_the_program(guard: str) -> None:
    for rows, keys, g, e in ((150, 290, 1, 16), (5, 33, 3, 32)):
        p = made(guard, g, e)
        tp = lower(p)
        source = emit(tp, "h100").source
        assert {x for x in re.findall(r"(\w)_box = tl.make_tensor_descriptor", source)} == {"Q", "K", "V", "O"}
        assert not re.search(r"tl\.(load|store)\((Q|K|V|O)_ptr", source)
        given = inputs(rows, keys, g, e)
        assert same(run(tp, given), exact(p, given), 2e-2, 2e-2), (rows, keys, g)


SEEN = {"where m <= p": lambda m, p: m <= p,
        "where m <= p and m > p - 20": lambda m, p: (m <= p) & (m > p - 20),
        "where m <= p or m < 24": lambda m, p: (m <= p) | (m < 24)}


@pytest.mark.parametrize("guard", SEEN)
def test_what_no_point_may_see_is_not_seen(guard: str) -> None:
    """Keys and values behind the last one that counts are NaN, though they lie in the same boxes."""
    p, given = made(guard), inputs(20, 120, 1, 16)
    live = SEEN[guard](np.arange(120), np.arange(20)[:, None]).any(0)
    assert live.any() and not live.all()
    want = exact(p, given)
    for name in ("K", "V"):
        given[name] = torch.where(torch.from_numpy(live)[:, None], given[name], float("nan"))
    assert same(run(lower(p), given), want, 2e-2, 2e-2)


def test_what_is_not_aligned_takes_pointers() -> None:
    p = made("where m <= p")
    tp, given = lower(p), inputs(40, 90, 1, 16, room=3)
    layout = Layout(tuple(len(q.shape) - 1 for q in tp.params), frozenset({"K_s1"}))
    assert "make_tensor_descriptor" not in text(emit(tp, "h100"), layout)
    assert same(run(tp, given), exact(p, given), 2e-2, 2e-2)


def test_machines_without_a_copy_engine_take_pointers() -> None:
    tp = lower(made("where m <= p"))
    for machine, boxes in (("a100", False), ("rtx4090", False), ("h100", True), ("b200", True)):
        assert ("make_tensor_descriptor" in emit(tp, machine).source) == boxes
    assert "make_tensor_descriptor" not in emit(lower(made("", out="f32")), "h100").source.split("tl.store(O_ptr")[1]


def test_what_is_no_box() -> None:
    """Gathers, multiples, broadcasts, boxes that are too long, and counts whose end moves have pointers."""
    dims = {"m": Dim("m", 64, Const(64), Const(0)), "e": Dim("e", 64, Const(64), Const(0))}
    m, e = (Axis((d,), 64, 64) for d in dims)
    p = Param("K", "bf16", (Size("M"), Const(64)), "in")

    def ask(index: tuple[Any, ...], more: dict[str, Dim] | None = None, unit: int = 1, p: Param = p,
            axes: tuple[Axis, ...] = (m, e)) -> Any:
        return box(Access("K", index), p, unit, axes, dims | (more or {}), {"step"}, {"M"})

    row, column = call("add", call("mul", Var("step"), 64), Var("m")), Var("e")
    assert (found := ask((row, column))) is not None
    assert [s.size for s in found.sides] == [64, 64] and found.sides[0].extent == Size("M") and not found.base
    assert ask((Access("ids", (row,)), column)) is None, "a gather"
    assert ask((call("mul", Var("m"), 2), column)) is None, "every second row"
    assert ask((column, Var("m")), unit=1) is not None, "the other way round in memory"
    assert ask((row, column), unit=-1) is None, "no stride of 1"
    assert ask((row, Const(3))) is None, "a column"
    assert ask((row, column), axes=(m,)) is None
    ends = Dim("m", 64, call("min", Const(64), call("sub", Size("M"), call("mul", Var("step"), 64))), Const(0))
    assert ask((row, column), {"m": ends}) is not None
    moving = Dim("m", 64, call("min", Const(64), call("sub", Size("M"), Var("step"))), Const(0))
    assert ask((row, column), {"m": moving}) is None, "its end moves"
    unknown = Param("K", "bf16", (Size("N"), Const(64)), "in")
    assert ask((row, column), p=unknown) is None, "an extent that the kernel is not told"
    assert ask((row, column), {"m": ends}, p=unknown) is not None, "and need not be told"
    page = Param("K", "bf16", (Size("M"), Const(64), Const(64)), "in")
    assert (found := ask((Access("pages", (Var("step"),)), Var("m"), column), unit=2, p=page)) is not None
    assert [s.size for s in found.sides] == [1, 64, 64], "a page is a rank with one element"
    long = Axis(("m",), 512, 512)
    assert ask((row, column), {"m": Dim("m", 512, Const(512), Const(0))}, axes=(long, e)) is None


# -- machine code ------------------------------------------------------------------------------------------------------


def binary(tp: TileProgram, machine: str) -> Any:
    layout = tuple(len(p.shape) - 1 for p in tp.params)
    return compiled_text(tp, emit(tp, machine).source, layout, machine)


@lru_cache(maxsize=8)
def compiled_text(tp: TileProgram, source: str, layout: tuple[int, ...], machine: str) -> Any:
    (k,), (name,) = tp.kernels, function_names(tp)
    given, how = arguments(tp, k, layout), module(source).SETTINGS[name]
    return compile_text(source, name, given.signature, {}, given.aligned, target(machine).capability,
                        how["num_warps"], how["num_stages"])


def test_the_copy_engine_fetches_and_stores() -> None:
    """No thread computes an address or copies a tile; the descriptors' memory is told; fewer registers than without."""
    tp = lower(made("where m <= p", e=64))
    b = binary(tp, "h100")
    used = b.instructions("UTMALDG", "UTMASTG", "HGMMA", "LDGSTS", "STG")
    assert used["UTMALDG"] and used["UTMASTG"] and used["HGMMA"] and not used["LDGSTS"]
    assert b.scratch >= 4 * 128 and b.spills == 0
    (k,), layout = tp.kernels, tuple(len(p.shape) - 1 for p in tp.params)
    plain = compiled_text(tp, emit(tp, "h100", aligned=False).source, layout, "h100")
    assert plain.instructions("UTMALDG")["UTMALDG"] == 0 and plain.scratch == 0
    assert b.resources.registers < plain.resources.registers
    setting = Setting(b.warps, module(emit(tp, "h100").source).SETTINGS[function_names(tp)[0]]["num_stages"])
    assert b.shared <= need(tp, k, target("h100"), setting).shared <= b.shared + 2048


# -- warps that fetch beside warps that compute ------------------------------------------------------------------------


@pytest.mark.parametrize("guard", GUARDS)
def test_one_loop_with_masks_equals_the_program(guard: str) -> None:
    p = made(guard, e=32)
    tp, given = lower(p), inputs(20, 290, 1, 32)
    (name,) = function_names(tp)
    settings = {name: Setting(4, 2, specialised=True)}
    source = emit(tp, "h100", settings=settings).source
    assert source.count("warp_specialize=True") == source.count(" in range(") + source.count(" in tl.range(") == 1
    assert settings_of(source) == settings
    assert same(run(tp, given, settings), exact(p, given), 2e-2, 2e-2)


def test_specialised_warps_are_proved_by_the_machine_code() -> None:
    tp = lower(made("where m <= p", e=64))
    (k,), (name,) = tp.kernels, function_names(tp)
    layout = Layout(tuple(len(p.shape) - 1 for p in tp.params))
    (special,) = (s for s in options(tp, k, target("h100")) if s.specialised)
    kernel = emit(tp, "h100", settings={name: special})
    (launch,) = compiled(kernel, layout).launches
    assert launch.block == 12 * 32 and launch.shared <= need(tp, k, target("h100"), special).shared
    b = compiled_text(tp, kernel.source, layout.units, "h100")
    assert b.instructions("USETMAXREG")["USETMAXREG"] and b.spills == 0 and b.resources.stack == 0
    with pytest.raises(Refusal, match="without specialised warps"):   # Triton says nothing when it does not
        compiled(emit(tp, "h100", settings={name: replace(special, warps=8)}), layout)
    assert "specialised" not in text(kernel, replace(layout, loose=frozenset({"K_s1"}))), "only descriptors can"
    assert not any(s.specialised for m in ("a100", "b200") for s in options(tp, k, target(m)))


@pytest.mark.slow
def test_instances_that_take_tasks_in_turns_are_compiled_as_well() -> None:
    """The loop over tasks leaves the loop inside it its copies ahead, and takes no more memory."""
    tp = lower(made("where m <= p", e=64))
    (k,), (name,) = tp.kernels, function_names(tp)
    first, turns = (s for n, s in enumerate(options(tp, k, target("h100"))) if not n or s.programs)
    assert turns.programs >= target("h100").threads and replace(turns, programs=0) == first
    plain, b = binary(tp, "h100"), compiled_text(tp, emit(tp, "h100", settings={name: turns}).source,
                                                 tuple(len(p.shape) - 1 for p in tp.params), "h100")
    assert b.shared == plain.shared and b.spills == 0
    assert b.instructions("UTMALDG", "HGMMA") == plain.instructions("UTMALDG", "HGMMA")


DECODE = """
program decode
rank H
rank M
rank E = 64
in Q[H, E]: bf16
in K[H, M, E]: bf16
in V[H, M, E]: bf16
out O[H, E]: f32
S[h, m] = sum{e} Q[h, e] * K[h, m, e]
GM[h] = max{m} S[h, m]
W[h, m] = exp(S[h, m] - GM[h])
D[h] = sum{m} W[h, m]
N[h, e] = sum{m} W[h, m] * V[h, m, e]
O[h, e] = N[h, e] / D[h]
"""


@pytest.mark.parametrize("machine", ["a100", "h100"])
def test_loops_without_products_fetch_ahead(machine: str) -> None:
    """One query to a key: nothing for tensor cores; the loop is told its stages, and copies are asynchronous."""
    tp = lower(map_program(parse(DECODE), config=Config(target=machine), sizes={"H": 4096, "M": 4096}))
    source = emit(tp, machine).source
    (name,) = function_names(tp)
    stages = module(source).SETTINGS[name]["num_stages"]
    assert stages > 1 and f"num_stages={stages})" in source and "tl.dot" not in source
    b = binary(tp, machine)
    assert b.instructions("LDGSTS")["LDGSTS"] and b.spills == 0
    said = need(tp, tp.kernels[0], target(machine), Setting(b.warps, stages)).shared
    assert b.shared <= said <= b.shared + 4096
    (loaded,) = {d.capacity for d in tp.kernels[0].dims if d.name == "m0"}
    assert b.shared >= (stages - 1) * 2 * loaded * 64 * 2
