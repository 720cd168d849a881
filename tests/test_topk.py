"""The best of a row: lists of values and places, on every backend the same as the program's meaning, places too."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

import memcomp
from memcomp.codegen.lower import lower
from memcomp.config import Config
from memcomp.ir.errors import Refusal, VerifyError
from memcomp.ir.interpret import interpret
from memcomp.ir.places import ordered
from memcomp.ir.program import Program
from memcomp.ir.text import parse, show
from memcomp.ir.tile import Best, TileProgram, statements
from memcomp.ir.tile_interpret import interpret_tile
from memcomp.ir.verify import verify
from memcomp.passes.reduce_passes import reduce_passes
from memcomp.passes.spell_places import spell_places
from memcomp.pipeline import map_program
from tests.mapped import arguments, mapped

torch = pytest.importorskip("torch")

HEAD = "program p\nrank P\nrank M{bound}\nrank N = 3\nrank K = {k}\nin S[P, M]: {dtype}\nin T[P, N]: {dtype}\n" \
       "in ok[P, M]: bool\nout V[P, K]: {value}\nout I[P, K]: i64\n"
FORMS = {
    "row": "V[p, k], I[p, k] = topk{m} S[p, m]\n",
    "computed": "V[p, k], I[p, k] = topk{m} 2.0*S[p, m] - 1.0\n",
    "masked": "V[p, k], I[p, k] = topk{m} S[p, m] where ok[p, m]\n",
    "two ranks": "V[p, k], I[p, k] = topk{n, m} S[p, m] + T[p, n]\n",
    "causal": "V[p, k], I[p, k] = topk{m} S[p, m] where m <= p\n",
}


def program(form: str, k: int = 4, dtype: str = "f32", bound: str = "") -> Program:
    value = dtype if dtype == "f64" or dtype[0] == "i" and dtype != "i1" else "f32"
    return parse(HEAD.format(k=k, dtype=dtype, bound=bound, value="i64" if value[0] == "i" else value) + FORMS[form])


def rows(p: int, m: int, seed: int, dtype: str = "f32") -> dict[str, Any]:
    """Ties, NaN, infinities of both signs, rows of one value: all that a format holds."""
    rng = np.random.default_rng(seed)
    s = np.round(rng.standard_normal((p, m)) * 3) / 2
    if dtype[0] == "i":
        s = s.astype(np.int64)
    elif m:
        s[0, rng.integers(m)] = np.nan
        s[1 % p] = -np.inf
        s[2 % p, : m // 2] = -np.inf
        s[3 % p, rng.integers(m, size=m // 3)] = np.nan
        s[3 % p, m // 2] = np.inf
        s[4 % p] = 1.0
    t = np.arange(p * 3).reshape(p, 3) % 5 / 2
    return {"S": s, "T": t.astype(s.dtype), "ok": rng.random((p, m)) < 0.6}


def exactly(want: dict[str, Any], got: dict[str, Any], data: dict[str, Any], form: str, note: Any) -> None:
    """Values are equal; so are places, but of points that a guard keeps out, which are only inside the row."""
    for n in want:
        a, b = (np.asarray(x[n], np.float64) for x in (want, got))
        if n == "I" and form in ("causal", "masked"):
            kept = np.asarray(want["V"], np.float64) != -np.inf
            assert ((b >= 0) & (b < max(data["S"].shape[1], 1))).all(), (n, note, b)
            a, b = np.where(kept, a, 0), np.where(kept, b, 0)
        np.testing.assert_array_equal(a, b, f"{n} {note}")


def closed(p: Program, **config: Any) -> Program:
    return map_program(p, config=Config(**config), sizes={"P": 5, "M": 200})


def lists(tp: TileProgram) -> list[Best]:
    return [s for k in tp.kernels for s in statements(k.body) if isinstance(s, Best)]


# -- meaning -----------------------------------------------------------------------------------------------------------


def brute(s: Any, k: int) -> tuple[list[float], list[int]]:
    """By sorting pairs."""
    order = sorted(range(len(s)), key=lambda m: (s[m] == s[m], 0 if s[m] != s[m] else -s[m], m))[:k]
    return [s[m] for m in order], order


def test_the_meaning_is_a_sort() -> None:
    data = rows(7, 11, 0)
    got = interpret(program("row", 5), data)
    for p in range(7):
        value, place = brute(data["S"][p], 5)
        np.testing.assert_array_equal(got["V"][p], value)
        assert got["I"][p].tolist() == place


GIVEN = "program p\nrank P\nrank M\nrank K = 3\nin S[P, M]: f32\nin J[P, M]: i64\nin W[P, K]: f32\nin L[P, K]: i64\n" \
        "out V[P, K]: f32\nout I[P, K]: i64\n"


def test_the_least_integer_is_the_last() -> None:
    s = np.array([[np.iinfo(np.int64).min, 0, np.iinfo(np.int64).max, 5]])
    assert ordered(s, np.arange(4)[None])[1].tolist() == [[2, 3, 1, 0]]
    assert ordered(s, np.arange(4)[None], rising=True)[1].tolist() == [[0, 1, 3, 2]]


def test_places_are_read_in_a_condition() -> None:
    """By which the best pairs of two lists are looked up: what is not known yet bounds nothing."""
    p = parse("program p\nrank P = 5\nrank M = 10\nrank U = 10\nrank Z = 4\nin S[P, M]: f32\nin N[U]: i64\n"
              "temp I[P, Z]: i64\nout O[P, Z]: i64\nout V[P, Z]: f32\nV[p, z], I[p, z] = topk{m} S[p, m]\n"
              "O[p, z] = sum{u} N[u] where u == I[p, z]\n")
    data = {"S": rows(5, 10, 0)["S"], "N": np.arange(10) ** 2}
    np.testing.assert_array_equal(interpret_tile(lower(mapped(p)), data)["O"], interpret(p, data)["O"])


def test_what_is_made_again_is_compared_as_exactly_as_it_was_stored() -> None:
    """Scores at least the third best of them: three in each row, where a number in f64 makes them f64."""
    p = parse("program p\nrank P\nrank M\nrank E = 8\nrank K = 3\nin Q[P, E]: f32\nin H[M, E]: f32\nin c[]: f64\n"
              "temp I[P, K]: i64\nout O[P]: f32\nD[p, m] = sum{e} Q[p, e] * H[m, e]\n"
              "S[p, m] = c[] * D[p, m]\nV[p, k], I[p, k] = topk{m} S[p, m]\n"
              "O[p] = sum{m} where(S[p, m] < V[p, 2], 0.0, 1.0)\n")
    rng = np.random.default_rng(0)
    data = {n: rng.standard_normal((k, 8)).astype(np.float32) for n, k in (("Q", 5), ("H", 200))} | {"c": np.array(0.3)}
    tp = lower(closed(p))
    assert all(w.dtype in ("f64", "i64") for w in tp.params if w.role == "work")
    np.testing.assert_array_equal(interpret_tile(tp, data)["O"], 3.0)


@pytest.mark.filterwarnings("ignore:memcomp")
@pytest.mark.parametrize("score, refused", [
    (lambda s: s * 0.7, False), (lambda s: s * 0.7 + 0.3, True), (lambda s: (s * 0.7).softmax(-1), True)])
@pytest.mark.parametrize("best", [lambda s: s.topk(3)[0][..., -1:], lambda s: s.amax(-1, keepdim=True)])
def test_what_rounding_decides_is_refused(score: Any, best: Any, refused: bool) -> None:
    """A score made a second time is compared with the best of the first ones: it must be the same to the bit."""
    def layer(q: Any, k: Any, v: Any) -> Any:
        s = score(q @ k.mT)
        s = torch.where(s >= best(s), s, 0.0)
        return s / s.sum(-1, keepdim=True) @ v

    q, k, v = torch.randn(3, 2, 200, 8, generator=torch.Generator().manual_seed(0)).unbind()
    torch._dynamo.reset()
    memcomp.reset()
    got = torch.compile(layer, backend="memcomp", options={"chains": "all"})(q, k, v)
    torch.testing.assert_close(got, layer(q, k, v), rtol=1e-3, atol=1e-4)
    assert refused == any("made anew" in why for why in memcomp.stats()["fallbacks"])


def test_joining_lists_is_associative_and_commutative() -> None:
    """`onto` and `at`: however the points of a row are divided, the list is the same."""
    rng = np.random.default_rng(1)
    s, j = rng.integers(0, 4, (6, 12)) / 2, np.argsort(rng.random((6, 12)), -1)
    body = "V[p, k], I[p, k] = topk{m} at(S[p, m], J[p, m])\n"
    none = {"W": np.full((6, 3), -np.inf), "L": np.full((6, 3), 99)}
    whole = interpret(parse(GIVEN + body), {"S": s, "J": j} | none)
    joined = parse(GIVEN + "V[p, k], I[p, k] = topk{m} onto(at(S[p, m], J[p, m]), W[p, k], L[p, k])\n")
    for parts in ((slice(0, 5), slice(5, 12)), (slice(5, 12), slice(0, 5)), (slice(0, 1), slice(1, 2), slice(2, 12))):
        held = dict(none)
        for x in parts:
            got = interpret(joined, {"S": s[:, x], "J": j[:, x]} | held)
            held = {"W": got["V"], "L": got["I"]}
        np.testing.assert_array_equal(held["W"], whole["V"])
        np.testing.assert_array_equal(held["L"], whole["I"])
    tp = lower(mapped(joined))
    got = interpret_tile(tp, {"S": s, "J": j} | none)
    np.testing.assert_array_equal(got["I"], whole["I"])


@pytest.mark.parametrize(("line", "message"), [
    ("V[p, k], I[p, k] = topk{m} S[p, m] + at(S[p, m], m)", "'at' stands outermost"),
    ("V[p, k], I[p, k] = topk{m} at(S[p, m], S[p, m])", "a place is an integer"),
    ("V[p, k], I[p, k] = topk{m} onto(S[p, m], W[p, 0], L[p, k])", "two lists in the order of 'k'"),
    ("V[p, k], I[p, k] = topk{m} at(S[p, m], k)", "'k' orders the results"),
])
def test_places_are_checked(line: str, message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify(parse(GIVEN + line + "\n"))


@pytest.mark.parametrize("options", [{}, {"splits": 2}, {"splits": 3}])
@pytest.mark.parametrize("form", FORMS)
def test_a_streamed_list_is_the_list(form: str, options: dict[str, Any]) -> None:
    """In tiles shorter than the list, in shares: the same places."""
    p = program(form, 5)
    new = reduce_passes(p, tile=(2,), ranks=("M",), **options)
    assert form in ("two ranks",) or "onto" in show(new)
    for m in (1, 4, 9, 23):
        data = rows(5, m, m)
        exactly(interpret(p, data), interpret(new, data), data, form, (m, options))


@pytest.mark.parametrize("k", [1, 7])
@pytest.mark.parametrize("form", FORMS)
def test_tiles_say_the_same(form: str, k: int) -> None:
    """A row as one tile, a row in steps of the mapping, and of the derived loop."""
    for p in (program(form, k, bound=" <= 64"), program(form, k)):
        for q in (mapped(spell_places(p)), closed(p)):
            tp = lower(q)
            assert lists(tp), show(q)
            for m in (1, 2, 5, 40) if "64" in show(p) else (1, 2, 5, 300):
                data = rows(5, m, m + k)
                exactly(interpret(p, data), interpret_tile(tp, data), data, form, (m, k))


# -- backends ----------------------------------------------------------------------------------------------------------

ON = {
    "python": {},
    "tvm": {},
    "cuda": {"target": "h100", "interpret": True},
    "triton": {"target": "h100", "interpret": True},
}
MISSING = {"tvm": "tvm", "triton": "triton"}


def ready(backend: str) -> dict[str, Any]:
    if backend in MISSING:
        pytest.importorskip(MISSING[backend])
    if backend == "cuda" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler: kernels cannot run here")
    return {"backend": backend, **ON[backend]}


def built(p: Program, backend: str) -> tuple[TileProgram, Any]:
    from memcomp.backends import build, emit
    from memcomp.stations import observers

    config = Config(**ready(backend))
    tiles, kernel = emit(closed(p, **ready(backend)), config=config, observe=observers(Config()))
    return tiles, build(kernel, config)


def ran(tp: TileProgram, f: Any, data: dict[str, Any]) -> dict[str, Any]:
    args, sizes = arguments(tp, data, {})
    f(*args, *sizes)
    return {p.name: x.double().numpy() for p, x in zip(tp.params, args, strict=True) if p.role == "out"}


INPUTS = {"S": "f32", "T": "f32", "ok": "bool", "H": "f16", "B": "bf16", "J": "i32", "D": "f64"}
LINES = {   # of outputs: dtype of the values, length, statement
    "row": ("f32", 1, "topk{m} S[p, m]"), "masked": ("f32", 3, "topk{m} S[p, m] where ok[p, m]"),
    "computed": ("f32", 16, "topk{m} 2.0*H[p, m] - 1.0"), "bf16": ("f32", 4, "topk{m} B[p, m]"),
    "two ranks": ("f32", 7, "topk{n, m} S[p, m] + T[p, n]"), "i32": ("i64", 5, "topk{m} J[p, m]"),
    "f64": ("f64", 2, "topk{m} D[p, m]"), "long": ("f32", 33, "topk{m} S[p, m]"),
}
APART = {"i32", "f64", "long"}  # which some backend refuses
TRIED = {   # interpreting Triton is slow: what is its own
    **dict.fromkeys(("python", "tvm", "cuda"), ([n for n in LINES if n not in APART], (1, 5, 200))),
    "triton": (["masked", "two ranks"], (1, 70)),
}


def several(names: list[str]) -> Program:
    """All of these in one program."""
    text, used = "program p\nrank P\nrank M\nrank N = 3\n", " ".join(LINES[n][2] for n in names)
    text += "".join(f"in {t}[P, {'N' if t == 'T' else 'M'}]: {d}\n" for t, d in INPUTS.items() if f"{t}[" in used)
    for n, name in enumerate(names):
        dtype, k, body = LINES[name]
        text = text.replace("rank P\n", f"rank P\nrank K{n} = {k}\n") + f"out V{n}[P, K{n}]: {dtype}\n" \
            f"out I{n}[P, K{n}]: i64\n"
    text += "".join(f"V{n}[p, k{n}], I{n}[p, k{n}] = {LINES[x][2]}\n" for n, x in enumerate(names))
    return parse(text)


@pytest.mark.parametrize("backend", ON)
def test_kernels_say_the_same(backend: str) -> None:
    """Places too, of every dtype, whatever the length of the row."""
    every, lengths = TRIED[backend]
    for names in (every, *([n] for n in sorted(APART))):
        p = several(names)
        try:
            tp, f = built(p, backend)
        except Refusal as why:
            assert (backend, names[0], "32 bits" in str(why)) in (("triton", "i32", True), ("triton", "f64", True)) or \
                (backend, names[0]) == ("cuda", "long") and "keeps the 33 best of a row" in str(why)
            continue
        if backend == "triton" and names != every:
            continue  # it is as the others are
        assert len(lists(tp)) >= len(names)
        for m in lengths:
            data = rows(5, m, m) | {"J": rows(5, m, m, "i32")["S"]}
            data |= {n: data["S"] for n in "HBD"}   # halves: every format holds them
            data = {t.name: data[t.name] for t in p.cascade.inputs()}
            want, got = interpret(p, data), ran(tp, f, data)
            for n, name in enumerate(names):
                pair = ({"V": x[f"V{n}"], "I": x[f"I{n}"]} for x in (want, got))
                exactly(*pair, {"S": np.zeros((5, m))}, name, (backend, name, m))


def test_rows_across_the_lanes() -> None:
    """Scores of a product: a tile of rows, each with a list of its own."""
    p = parse("program p\nrank P\nrank M\nrank E = 4\nrank K = 6\nin Q[P, E]: f32\nin X[M, E]: f32\nout V[P, K]: f32\n"
              "out I[P, K]: i64\nS[p, m] = sum{e} Q[p, e] * X[m, e]\nV[p, k], I[p, k] = topk{m} S[p, m]\n")
    rng = np.random.default_rng(3)
    for backend in ("tvm", "cuda"):
        tp, f = built(p, backend)
        for n, m in ((1, 7), (37, 150)):
            data = {"Q": np.round(rng.standard_normal((n, 4)) * 2), "X": np.round(rng.standard_normal((m, 4)) * 2)}
            exactly(interpret(p, data), ran(tp, f, data), {"S": np.zeros((n, m))}, "row", (backend, n, m))


def test_a_stage_may_hold_a_list_beside_sums() -> None:
    """Greatest probabilities, renormalised: one loop holds the list and nothing of the denominator."""
    p = parse("program p\nrank P\nrank M\nrank K = 3\nin S[P, M]: f32\nout W[P, K]: f32\nout I[P, K]: i64\n"
              "GM[p] = max{m} S[p, m]\nSN[p, m] = exp(S[p, m] - GM[p])\nSD[p] = sum{m} SN[p, m]\n"
              "A[p, m] = SN[p, m] / SD[p]\nV[p, k], I[p, k] = topk{m} A[p, m]\nT[p] = sum{k} V[p, k]\n"
              "W[p, k] = V[p, k] / T[p]\n")
    data = {"S": np.random.default_rng(5).standard_normal((4, 300))}
    want = interpret(p, data)
    for backend in ("tvm", "cuda"):
        tp, f = built(p, backend)
        assert len(tp.kernels) == 1 and len(lists(tp)) == 1
        got = ran(tp, f, data)
        np.testing.assert_array_equal(got["I"], want["I"])
        np.testing.assert_allclose(got["W"], want["W"], 1e-5)


@pytest.mark.parametrize("capability", [90, *(pytest.param(n, marks=pytest.mark.slow) for n in (80, 89, 100))])
def test_lists_of_sixteen_need_no_stack(capability: int) -> None:
    from memcomp.codegen.cuda.compile import compile_text, compilers
    from memcomp.codegen.cuda.emit import emit, launches

    if not compilers():
        pytest.skip("neither NVRTC nor nvcc is here")
    target = {80: "a100", 89: "rtx4090", 90: "h100", 100: "b200"}[capability]
    tp = lower(closed(program("row", 16), target=target, backend="cuda"))
    (binary,) = compile_text(emit(tp, target).source, launches(tp, target), capability)
    assert binary.resources.stack == 0, binary
