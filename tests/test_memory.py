"""No kernel leaves its tensors: guards on stored ranks, extents that divide nothing, places that are data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memcomp.codegen.lower import lower
from memcomp.codegen.python import build, emit
from memcomp.config import Config
from memcomp.ir.errors import InputError, Refusal, VerifyError
from memcomp.ir.expr import Access, Const, Var, call
from memcomp.ir.inside import Facts
from memcomp.ir.interpret import interpret
from memcomp.ir.program import Program
from memcomp.ir.text import parse
from memcomp.ir.tile import Load, Store, TileProgram
from memcomp.ir.tile_interpret import interpret_tile, solve_sizes
from memcomp.ir.tile_verify import verify_tile
from memcomp.ir.verify import verify
from memcomp.pipeline import map_program
from tests.mapped import extent, mapped, same

FOLDER = Path(__file__).parent / "cases"
CANARY, EDGE = 1e30, 3  # what stands around every output, and how many elements of it


def framed(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """An array in the middle of a larger one, both full of canaries."""
    whole = np.full(tuple(n + 2 * EDGE for n in shape), CANARY, np.float32)
    return whole, whole[tuple(slice(EDGE, EDGE + n) for n in shape)]


def run(tp: TileProgram, arrays: dict[str, Any], sizes: dict[str, int], kernel: Any) -> dict[str, Any]:
    """Outputs and states of a built kernel; fails where a canary beside one was overwritten."""
    known = solve_sizes(tp, {n: np.shape(a) for n, a in arrays.items()}, sizes)
    frames, args = {}, []
    for p in tp.params:
        if p.role == "in":
            args.append(np.asarray(arrays[p.name], np.int64 if p.dtype == "i64" else np.float32))
            continue
        whole, middle = framed(tuple(extent(n, known) for n in p.shape))
        if p.role == "state":
            middle[...] = arrays[p.name]
        frames[p.name] = whole, middle
        args.append(middle)
    kernel(*args, *known.values())
    for name, (whole, middle) in frames.items():
        edge = whole.copy()
        edge[tuple(slice(EDGE, EDGE + n) for n in middle.shape)] = CANARY
        assert (edge == np.float32(CANARY)).all(), f"{name} was left"
    return {p.name: frames[p.name][1] for p in tp.params if p.role in ("out", "state")}


def holds(p: Program, arrays: dict[str, Any], sizes: dict[str, int], backend: str = "python") -> bool:
    """The kernels of a mapped program give what it means and stay in their tensors; False where lower refuses."""
    want = interpret(p, arrays, sizes)
    try:
        tp = lower(p)
    except Refusal as refusal:
        assert "elements with others" in str(refusal), refusal
        return False
    got = interpret_tile(tp, arrays, sizes)
    if backend == "tvm":
        kernel = tvm(tp)
    else:
        kernel = build(emit(tp))
    also = run(tp, arrays, sizes, kernel)
    for name in want:
        assert same(got[name], want[name], 1e-9, 1e-9), (name, str(p), str(tp))
        assert same(also[name], want[name], 2e-4, 2e-4), (name, str(p), str(tp))
    return True


def tvm(tp: TileProgram) -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("tvm")
    from memcomp.codegen import tvm as backend
    from memcomp.ir.target import target

    kernel = backend.build(backend.emit(tp, target("cpu")))
    return lambda *args: kernel(*(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args))


# -- guards on stored ranks --------------------------------------------------------------------------------------------

GUARDS = (
    "p0 < min({t}, N - p1*{t})", "p1*{t} + p0 < N", "n <= 5", "2 <= n", "n < min(4, 11 - 3*n)", "max(n - 3, 1) <= n",
    "n//3 < 2",
    "n%2 == 0", "len[n] < 3", "n < len[n]", "len[n] <= n and n < N", "n + 1 < N", "n < N//2", "p1 + p0 < 4",
    "p0 < {t} - p1",
)
INDICES = (("N", "n"), ("N", "N - 1 - n"), ("N", "n + 2"), ("N", "len[n]"), ("2*N", "2*n"), ("2*N", "2*n + 1"),
           ("N + 2", "n + 2"), ("N + 2", "n + 1"), ("3", "n"))
CUT = (("N", "p1*{t} + p0"), ("N + 1", "p1*{t} + p0 + 1"), ("4*N", "p1*{t} + p0"))
BODIES = ("X[{n}, e]", "sum{{e}} X[{n}, e]", "max{{e}} X[{n}, e]", "sum{{m}} X[{n}, e] * Y[m, e]",
          "X[{n}, e] + Z[len[{n}]]")

HEAD = """program stored on cpu
rank N
rank M
rank E = 3
rank P0 = {t}
rank P1 = ceil(N/{t})
rank R = {rank}
in X[N, E]: f32
in Y[M, E]: f32
in Z[N]: f32
in len[N]: i64
out O[R{more}]: f32{empty}
"""


@st.composite
def guarded(draw: st.DrawFn) -> tuple[str, dict[str, int], int]:
    """The text of a program with a guard on what it stores, extents, a seed."""
    t = draw(st.integers(2, 5))
    cut = draw(st.booleans())
    rank, index = draw(st.sampled_from(CUT if cut else INDICES))
    known = [g for g in GUARDS if ("p1" in g) == cut]
    guards = draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True))
    if cut and draw(st.integers(0, 3)):
        guards.append("p1*{t} + p0 < N")
    n = f"p1*{t} + p0" if cut else "n"
    body = draw(st.sampled_from(BODIES if not cut else BODIES[:4])).format(n=n)
    e = "" if body.startswith(("sum{e}", "max{e}")) else ", e"
    empty = draw(st.sampled_from(["", " empty 2.0"]))
    text = HEAD.format(t=t, rank=rank, more=e.upper(), empty=empty).replace("{t}", str(t))
    text += f"O[{index}{e}] = {body} where {' and '.join(guards)}\n".replace("{t}", str(t))
    return text, {"N": draw(st.sampled_from([1, 3, 7, 10, 17])), "M": draw(st.sampled_from([0, 1, 5]))}, draw(
        st.integers(0, 99))


def arrays(sizes: dict[str, int], seed: int) -> dict[str, Any]:
    rng, n = np.random.default_rng(seed), sizes["N"]
    return {"X": rng.normal(size=(n, 3)), "Y": rng.normal(size=(sizes["M"], 3)), "Z": rng.normal(size=n),
            "len": rng.permutation(n)}


def attempt(case: tuple[str, dict[str, int], int], backend: str) -> bool:
    text, sizes, seed = case
    try:
        p = parse(text)
        verify(p)
        given_ = arrays(sizes, seed)
        want = interpret(p, given_, sizes)
    except (VerifyError, InputError):
        return False  # not a program, or one that leaves its tensors by its own meaning
    made = map_program(p, config=Config(target="cpu"))
    assert all(same(interpret(made, given_, sizes)[n], want[n], 1e-9, 1e-9) for n in want), text
    return holds(made, given_, sizes, backend)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(guarded())
def test_a_guard_on_a_stored_rank_is_kept(case: tuple[str, dict[str, int], int]) -> None:
    attempt(case, "python")


@pytest.mark.parametrize("n", [1, 7, 10])
@pytest.mark.parametrize("body", [
    "O[p1*4 + p0, e] = X[p1*4 + p0, e] where p1*4 + p0 < N",
    "O[n, e] = sum{m} X[n, e] * Y[m, e] where n < min(4, 11 - 3*n)",
    "O[len[n], e] = X[n, e] where 2 <= n",
])
def test_machine_code_keeps_it_too(body: str, n: int) -> None:
    text = HEAD.format(t=4, rank="N", more=", E", empty=" empty 2.0") + body
    assert attempt((text, {"N": n, "M": 5}, n), "tvm") or n == 1


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 131])
def test_rows_in_tiles_that_do_not_divide_them(rows: int) -> None:
    """FLAT (`tests/cases/taxonomy/flat.mc`): as written and in one pass; lanes run over the tiles of rows."""
    p, rng = parse((FOLDER / "taxonomy" / "flat.mc").read_text()), np.random.default_rng(rows)
    given_ = {"Q": rng.normal(size=(rows, 8)), "K": rng.normal(size=(7, 8)), "V": rng.normal(size=(7, 8))}
    made = map_program(p, config=Config(target="cpu"))
    assert same(interpret(made, given_)["O"], interpret(p, given_)["O"], 1e-9, 1e-9)
    assert holds(made, given_, {}) and holds(mapped(p), given_, {})


PIECES = """program pieces on cpu
rank N
rank R = N + 3
in X[N]: f32
out O[R]: f32 empty 1.5
O[n] = X[n] where n < N//2
O[n + 3] = X[n] + 1.0 where N//2 <= n
"""


@pytest.mark.parametrize("swapped", [False, True])
def test_pieces_of_one_tensor_leave_each_other_alone(swapped: bool) -> None:
    p = parse(PIECES)
    if swapped:
        p = replace(p, cascade=replace(p.cascade, einsums=p.cascade.einsums[::-1]))
    for n in (1, 4, 9):
        assert holds(mapped(p), {"X": np.arange(n) + 1.0}, {})


# -- places that are data ----------------------------------------------------------------------------------------------

PLACES = """program places on cpu
rank N
rank M
in X[M]: f32
in at[N]: i64
state S[M]: f32
out O[N]: f32
O[n] = X[at[n]]
S'[at[n]] = X[at[n]] * 2.0
"""


@pytest.mark.parametrize("backend", ["python", "tvm"])
@pytest.mark.parametrize("at", [[0, 3, 1], [4, -1, 1], [10**12, -(10**12), 2]])
def test_places_outside_a_tensor_are_not_written(at: list[int], backend: str) -> None:
    """`interpret` says where a place leaves its tensor; a kernel writes the others, and reads some element there."""
    p = parse(PLACES)
    given_ = {"X": np.arange(4.0), "at": np.array(at), "S": np.full(4, 7.0)}
    tp = lower(mapped(p))
    got = run(tp, given_, {}, tvm(tp) if backend == "tvm" else build(emit(tp)))
    valid = [i for i in at if 0 <= i < 4]
    if len(valid) == len(at):
        assert holds(mapped(p), given_, {}, backend)
    else:
        with pytest.raises(InputError, match="leaves"):
            interpret(p, given_)
    want = np.full(4, 7.0)
    want[valid] = 2.0 * np.array(valid)
    assert (got["S"] == want).all()
    assert all(x == i for x, i in zip(got["O"], at, strict=True) if i in valid)


@pytest.mark.parametrize("backend", ["python", "tvm"])
def test_nothing_is_read_from_a_tensor_without_elements(backend: str) -> None:
    text = PLACES.replace("O[n] = X[at[n]]", "O[n] = X[at[n]] where at[n] < M").replace(
        "S'[at[n]] = X[at[n]] * 2.0", "S'[m] = X[m]")
    p = parse(text)
    tp = lower(mapped(p))
    given_ = {"X": np.zeros(0), "at": np.array([0, 5]), "S": np.zeros(0)}
    kernel = tvm(tp) if backend == "tvm" else build(emit(tp))
    with pytest.raises(Exception, match="size 0|a task of the kernel failed"):
        run(tp, given_, {}, kernel)


BOUNDED = """program bounded on cpu
rank N
rank E <= 8
in X[N, E]: f32
out O[N, E]: f32
O[n, e] = X[n, e] * 2.0
group g0: O
  space N
  lane E
"""


@pytest.mark.parametrize("elements", [5, 8, 40])
def test_a_rank_over_its_bound_fills_no_tile(elements: int) -> None:
    p, x = parse(BOUNDED), np.ones((3, elements))
    tp = lower(p)
    if elements <= 8:
        assert holds(p, {"X": x}, {}, "tvm")
    else:
        with pytest.raises(Exception, match="a task of the kernel failed|over its bound"):
            run(tp, {"X": x}, {}, tvm(tp))


# -- the proof ---------------------------------------------------------------------------------------------------------


def test_a_tile_program_that_may_leave_its_tensors_is_refused() -> None:
    tp = lower(mapped(parse(HEAD.format(t=4, rank="N", more=", E", empty="") + "O[n, e] = X[n, e] where n < len[n]")))
    kernel = tp.kernels[-1]
    store = next(s for s in kernel.body if isinstance(s, Store))
    load = next(s for s in kernel.body if isinstance(s, Load))

    def changed(s: Load | Store) -> TileProgram:
        body = tuple(s if type(s) is type(x) and x in (store, load) else x for x in kernel.body)
        return replace(tp, kernels=(*tp.kernels[:-1], replace(kernel, body=body)))

    verify_tile(tp)
    up = tuple(call("add", i, 1) for i in store.target.index)
    with pytest.raises(VerifyError, match="nothing shows"):
        verify_tile(changed(replace(store, target=Access("O", up))))
    verify_tile(changed(replace(store, target=Access("O", up), mask=call(
        "and", call("lt", up[0], tp.param("O").shape[0]), call("lt", up[1], tp.param("O").shape[1])))))
    if load.source.tensor == "X":
        with pytest.raises(VerifyError, match="nothing shows"):
            verify_tile(changed(replace(load, source=Access("X", tuple(call("sub", i, 1) for i in load.source.index)))))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(-3, 9), st.integers(0, 12), st.integers(0, 6))
def test_what_is_proved_inside_is(k: int, tile: int, shift: int, n: int, off: int) -> None:
    """Every proof of the arithmetic, against all points."""
    size = parse("program s\nrank N\nX[n] = N").cascade.einsums[0].body
    count = call("min", tile, call("sub", size, call("mul", Var("a"), tile)))
    facts = Facts(()).within("a", 0, call("ceildiv", size, tile)).within("b", 0, count)
    index = call("add", call("floordiv", call("add", call("mul", Var("a"), tile), Var("b")), k), shift)
    end = call("add", call("ceildiv", size, k), off)
    if facts.inside(index, end):
        for a in range(-(-n // tile)):
            for b in range(min(tile, n - a * tile)):
                assert 0 <= (a * tile + b) // k + shift < -(-n // k) + off
    assert facts.inside(index, end) == (0 <= shift <= off) or index == Const(0)
